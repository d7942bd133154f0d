"""Files with rows in folders that the library ``datasets`` has written, or would read: one split.

DatasetDict   ``save_to_disk``: dataset_dict.json, a folder per split
Dataset       ``save_to_disk``: state.json, dataset_info.json, data-00000-of-00002.arrow, ...
its cache     dataset_info.json, json-train.arrow, ...; what was made of these is cache-0123.arrow
on the hub    train-00000-of-00002.parquet, test-00000-of-00001.parquet, ...
"""

import glob
import json
import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import PurePosixPath
from typing import Any

from distilcache.data.errors import UserError, require
from distilcache.data.split_names import SPLITS, named_split
from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.corpus.text.streams import open_bytes

_OF_SPLIT = re.compile(r".+?-([\w.]+?)(?:-\d{5}-of-\d{5})?\.arrow")
"""A file of the library's cache, and the split that it is of."""
_LOGS = {
    "_delta_log/*.json": "Delta Lake",
    ".hoodie/hoodie.properties": "Hudi",
    "metadata/*.metadata.json": "Iceberg",
}
"""Logs in the folders of tables, which say which rows count."""
_PARTITIONS = re.compile(r"/(?:[^/]+=[^/]*/)+")
"""Folders of a table's parts, such as ``year=2020/``."""


def data_files(
    text: str, paths: Sequence[str], filesystem: Any, beside: Sequence[str] = ()
) -> list[str]:
    """Of all files of a folder, ``text``, those to read; of a saved data set those with rows.

    Of what a glob matches, which may be a part of a data set, ``beside`` are those of
    :func:`files_beside`.

    Raises:
        UserError: There are several splits, so one must be named; or a file is missing.
    """
    there, kept = {*paths, *beside}, []
    in_cache: dict[str, list[str]] = {}
    for path in sorted(there):
        name = path.rpartition("/")[2]
        folder = path.removesuffix(name)
        if name == "dataset_dict.json":
            listed = _names(path, filesystem, "splits")
            splits = [s for s in listed if any(p.startswith(f"{folder}{s}/") for p in paths)]
            _require_one(text, splits, f"{folder}{(splits or listed)[0]}", filesystem)
        elif not {f"{folder}state.json", f"{folder}dataset_info.json"} <= there:
            cached = f"{folder}dataset_info.json" in there
            made = name.startswith("cache-") and name.endswith(".arrow")
            if not (cached and (made or name == "dataset_info.json")):
                kept.append(path)
                if cached and (match := _OF_SPLIT.fullmatch(name)):
                    in_cache.setdefault(folder, []).append(match[1])
        elif name == "state.json":
            files = [f"{folder}{f}" for f in _names(path, filesystem, "_data_files")]
            missing = [file for file in files if file not in there]
            require(
                not missing or path in beside,
                f"corpus: source must be a whole data set, got {text!r} without "
                f"{', '.join(missing[:3])}; save it again",
            )
            kept += [file for file in files if file in there]
    for folder, found in in_cache.items():
        _require_one(text, list(dict.fromkeys(found)), f"{folder}*-{found[0]}*.arrow", filesystem)
    return kept


def _require_one(text: str, splits: Sequence[str], one: str, filesystem: Any = None) -> None:
    """Check that a data set has one split; ``one`` is the path of the first."""
    named = one if filesystem is None else filesystem.unstrip_protocol(one)
    require(
        len(splits) <= 1,
        f"corpus: source must be one split of a data set, got {text!r} with {', '.join(splits)}; "
        f"name one, as in {named}, or each as a source of its own",
    )


def one_split(text: str, sources: Sequence[Source]) -> Sequence[Source]:
    """What a folder or glob has, if its files with rows name no two splits of a data set.

    Raises:
        UserError: They do, so one must be named.
    """
    names = [source.name for source in sources if source.kind not in ("txt", "fasta")]
    shared = os.path.commonprefix([name[: name.rfind("/") + 1] for name in names])
    root = shared[: shared.rfind("/") + 1]
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if named := named_split(name.removeprefix(root)):
            folder = f"{root}{named.folder}"
            below = name.startswith(f"{folder}{named.label}/")
            one = f"{folder}{named.label}" if below else f"{folder}*{named.label}*"
            found.setdefault(folder, {}).setdefault(named.split, one)
    for splits in found.values():
        there = [split for split in SPLITS if split in splits]
        _require_one(text, there, splits[there[0]])
    return sources


def require_no_log(text: str, paths: Sequence[str], filesystem: Any) -> None:
    """Refuse files of a table that keeps rows which were deleted or replaced, and a log of these.

    Raises:
        UserError: They are parquet files of a Delta Lake, Hudi or Iceberg table.
    """
    find = glob.glob if filesystem is None else filesystem.glob
    is_folder = os.path.isdir if filesystem is None else filesystem.isdir
    places = {
        f"{place}/"
        for path in paths
        if path.endswith(".parquet")
        for place in map(str, list(PurePosixPath(_PARTITIONS.sub("/", path)).parents)[:3])
    }
    for place, (log, kind) in product(sorted(places), _LOGS.items()):
        folder, _, name = f"{place}{log}".rpartition("/")
        if is_folder(folder) and find(f"{glob.escape(folder)}/{name}"):
            raise UserError(
                f"corpus: source must have each row once, got {text!r} with the files of a {kind} "
                f"table, which keep old rows: {place}; write its present rows as parquet, and "
                "name that"
            )


def of_data_set(path: str) -> bool:
    """Whether a file may be a part of a saved data set."""
    about = ("dataset_dict.json", "dataset_info.json", "state.json")
    return path.endswith(".arrow") or path.rpartition("/")[2] in about


def files_beside(paths: Sequence[str], filesystem: Any) -> list[str]:
    """Files about saved data sets in the folders of some files, or above, and not among these."""
    exists = os.path.isfile if filesystem is None else filesystem.exists
    there = set(paths)
    folders = dict.fromkeys(path[: path.rfind("/") + 1] for path in paths)
    above = dict.fromkeys(folder[: folder.rfind("/", 0, -1) + 1] for folder in folders)
    whole = [f"{folder}dataset_dict.json" for folder in above]
    found = [file for file in whole if file not in there and exists(file)]
    for folder in folders:
        for file in (f"{folder}dataset_info.json", f"{folder}state.json"):
            if file in there:
                continue
            if not exists(file):
                break
            found.append(file)
    return found


def _names(path: str, filesystem: Any, field: str) -> list[str]:
    """Names of splits, or of files, in one of the library's JSON files."""
    try:
        with open_bytes(path, filesystem) as file:
            found = json.load(file)[field]
        names = [item["filename"] if isinstance(item, dict) else item for item in found]
        if names and all(isinstance(name, str) for name in names):
            return names
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"corpus: source must be a data set as save_to_disk writes it, got {path} without a list "
        f"{field!r}; save it again"
    )
