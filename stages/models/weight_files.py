"""The files of a checkpoint in its folder, read by their headers alone. No torch here."""

import json
import shlex
from collections.abc import Iterable, Mapping
from fnmatch import filter as named_as
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import read_json
from distilcache.stages.models.hub import downloaded_id

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
OTHER_WEIGHTS = ("tf_model.h5", "flax_model.msgpack", "adapter_model.safetensors", "model.ckpt*")
ADAPTER = "adapter_config.json"
"""What PEFT writes; where it is installed, transformers opens the base that this file names."""
BERT = [
    {f"bert.embeddings.LayerNorm.{kind}", f"cls.predictions.transform.LayerNorm.{kind}"}
    for kind in ("weight", "gamma")
]
"""Tensors by which a BERT with its LM head is known: no other type has both."""
LFS = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for one which Git LFS has not fetched."""
HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows."""

Shapes = Mapping[str, tuple[int, ...]]
"""Names of tensors to their shapes."""


def require_content(path: Path, where: str) -> None:
    """Refuse a pointer of Git LFS; a file that is not there is none.

    ``where`` is the stage and what is asked for: ``teacher: model``.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS))
    except OSError:
        return
    require(
        start != LFS,
        f"{where} must have its files in full, got {path}, which is a Git LFS pointer to a file "
        f"that was not fetched; run git lfs pull in {path.parent}, or download the file",
    )


def read_config(path: Path, where: str, names: Iterable[str] = ()) -> dict[str, Any]:
    """The values of a ``config.json``, of a known layout.

    Args:
        path: The file.
        where: Stage and what is asked for, for errors.
        names: Of its tensors. Those of a BERT's LM head say what type it is where the file does
            not, as in the first releases.

    Raises:
        UserError: It is absent, no JSON object, a pointer, does not say its model's type, or an
            adapter lies beside it.
    """
    folder = path.parent
    require_merged((folder / ADAPTER).is_file(), folder, where)
    checkpoints = [found.parent for found in folder.glob("checkpoint-*/config.json")]
    last = max(checkpoints, key=lambda found: (len(found.name), found.name), default=None)
    remedy = f"pass one of its checkpoints, such as {last}" if last else ""
    require(
        path.is_file(),
        f"{where} must be a folder with a config.json, got none in {folder}; "
        f"{remedy or 'pass the folder that save_pretrained has written'}",
    )
    require_content(path, where)
    values = read_json(path, f"{where}: config.json")
    require(
        isinstance(values, dict),
        f"{where}: config.json must be a JSON object, got {path} with something else; download it "
        "again",
    )
    found = set(names)
    if "model_type" not in values and any(map(found.issuperset, BERT)):
        values["model_type"] = "bert"
    require(
        isinstance(values.get("model_type"), str),
        f"{where}: config.json must name the model's type, got {path} without model_type; add "
        f'"model_type": "bert" to it, or the type that the model is of (for a BERT with pickled '
        "weights distilcache convert does it)",
    )
    return dict(values)


def require_merged(adapter: bool, place: str | Path, where: str) -> None:
    """Refuse a folder or a hub id with an adapter that PEFT has written."""
    require(
        not adapter,
        f"{where} must be a model with its adapter in its weights, got {place} with {ADAPTER}; "
        "save what PEFT's merge_and_unload returns, with the tokenizer, and pass that folder",
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from; [] where there are none in safetensors.

    Files that an index names, and that are not there, are among them.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [folder / INDEX]  # :func:`tensors_in` says what is wrong with it


def tensors_in(folder: Path, where: str) -> Shapes:
    """Names and shapes of all tensors of a checkpoint.

    Raises:
        UserError: It has no weights in safetensors, or a file of them is damaged or absent.
    """
    files = weight_files(folder)
    if not files:
        for name in PICKLED:
            require_content(folder / name, where)
        raise UserError(other_weights(names_in(folder), folder, where))
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        require(
            path.is_file(),
            f"{where} must have all files that {INDEX} names, got no {path}; download it again",
        )
        require_content(path, where)
        require(
            path.name != INDEX,
            f"{where}: {INDEX} must be JSON with a weight_map, got {path}; download it again",
        )
        found.update(read_header(path, where))
    return found


def read_header(path: Path, where: str) -> Shapes:
    """Names and shapes of the tensors in one safetensors file, which must be whole.

    Raises:
        UserError: It is cut off, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            require(size >= 8 and length <= min(size - 8, HEADER_BYTES), "")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (UserError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(
                f"{where}: weights must be a whole safetensors file, got {path} ({size:,} bytes) "
                "whose header is cut off or damaged; download or save it again"
            ) from None
    require(
        size == 8 + length + end,
        f"{where}: weights must be a whole safetensors file, got {path} with {size:,} bytes of "
        f"{8 + length + end:,}; download or save it again",
    )
    return shapes


def names_in(folder: Path) -> list[str]:
    """Names of the files in a folder."""
    return [path.name for path in folder.iterdir() if path.is_file()]


def other_weights(
    names: list[str], place: str | Path, where: str, revision: str = "", wanted: str = WEIGHTS
) -> str:
    """What to do with a checkpoint that has no weights in safetensors.

    Args:
        names: Of its files.
        place: Its folder, as a ``Path``, or its hub id.
        where: Stage and what is asked for, for the error.
        revision: Of a hub id.
        wanted: The file with weights that is asked for.
    """
    pickled = [name for name in PICKLED if name in names]
    if pickled and wanted == WEIGHTS:
        asked = f" --revision {shlex.quote(revision)}" if revision else ""
        return (
            f"{where} must have its weights in {WEIGHTS}, got {pickled[0]} alone in "
            f"{str(place)!r}, which could run code when it is opened; write it anew with "
            f"distilcache convert {shlex.quote(str(place))} OUT{asked}, and pass OUT"
        )
    others = sorted(name for kind in OTHER_WEIGHTS for name in named_as(names, kind))
    named = sorted(set(named_as(names, "*.safetensors")).difference(others))
    if len(named) == 1:
        remedy = f"{'' if isinstance(place, Path) else 'download it and '}rename it to {WEIGHTS}"
        return f"{where} must have its weights in {wanted}, got {place}/{named[0]}; {remedy}"
    if named:
        return (
            f"{where} must have {INDEX} beside weights of several files, got {place} with "
            f"{', '.join(named[:2])} and none; download it as well"
        )
    hub_id = downloaded_id(place) if isinstance(place, Path) and not others else ""
    if hub_id:
        return (
            f"{where} must have its weights in {wanted}, got none in {place}, where other files "
            f"of {hub_id!r} alone are; download all of it where there is a network"
        )
    found = f"{', '.join(others)} alone" if others else "none"
    return (
        f"{where} must have its weights in {wanted}, got {found} in {place}; open the model with "
        "the library that made it and save it with save_pretrained of transformers"
    )
