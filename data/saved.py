"""Folders that the library ``datasets`` has saved (``save_to_disk``): which files hold rows.

DatasetDict   dataset_dict.json, a folder per split
Dataset       state.json, dataset_info.json, data-00000-of-00002.arrow, ...
"""

import json
from collections.abc import Sequence
from typing import Any

from data.errors import UserError, require
from data.streams import open_bytes


def data_files(text: str, paths: Sequence[str], filesystem: Any = None) -> list[str]:
    """The files of a folder; of a saved data set, those with its rows, in their order.

    Args:
        text: The folder, as the recipe gives it.
        paths: All files below it.
        filesystem: fsspec filesystem; None: the local one.

    Raises:
        UserError: There are several splits, of which one must be named, or a file is missing.
    """
    there, kept = set(paths), []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name == "dataset_dict.json":
            splits = _read(path, filesystem, "splits")
            require(
                len(splits) == 1,
                f"corpus: source must be one split of a saved data set, got {text!r} with "
                f"{', '.join(map(str, splits))}; name one, as in {text.rstrip('/')}/{splits[0]}",
            )
        elif not {f"{folder}/state.json", f"{folder}/dataset_info.json"} <= there:
            kept.append(path)
        elif name == "state.json":
            files = [
                f"{folder}/{file['filename']}" for file in _read(path, filesystem, "_data_files")
            ]
            missing = [file for file in files if file not in there]
            require(
                not missing,
                f"corpus: source must be a whole data set, got {text!r} without "
                f"{', '.join(missing[:3])}; save it again",
            )
            kept += files
    return kept


def _read(path: str, filesystem: Any, name: str) -> list[Any]:
    try:
        with open_bytes(path, filesystem) as file:
            found = json.load(file)[name]
        if found and isinstance(found, list):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"corpus: source must be a data set as save_to_disk leaves it, got {path} without a list "
        f"{name!r}; save it again"
    )
