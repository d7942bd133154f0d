"""The files of a checkpoint in its folder, read by their headers alone. No torch here."""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, require
from distilcache.data.storage.files import read_json

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
    require(
        not (folder / ADAPTER).is_file(),
        f"{where} must be a model with its adapter in its weights, got {folder} with {ADAPTER}; "
        "save what PEFT's merge_and_unload returns, with the tokenizer, and pass that folder",
    )
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
        raise UserError(_other_weights(folder, where))
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


def convert_hint(name: str | Path, found: str, revision: str = "") -> str:
    """What is said of weights that would have to be unpickled."""
    asked = f" --revision {shlex.quote(revision)}" if revision else ""
    return (
        f"weights in {WEIGHTS}, got {found} alone in {str(name)!r}, which could run code when it "
        f"is opened; write it anew with distilcache convert {shlex.quote(str(name))} OUT{asked}, "
        "and pass OUT"
    )


def _other_weights(folder: Path, where: str) -> str:
    """What to do with a folder that has no weights in safetensors."""
    for name in PICKLED:
        if (folder / name).is_file():
            require_content(folder / name, where)
            return f"{where} must have its {convert_hint(folder, name)}"
    others = sorted(path.name for kind in OTHER_WEIGHTS for path in folder.glob(kind))
    named = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in others)
    if len(named) == 1:
        return f"{where} must have its weights in {WEIGHTS}, got {folder / named[0]}; rename it"
    if named:
        return (
            f"{where} must have {INDEX} beside weights of several files, got {folder} with "
            f"{', '.join(named[:2])} and none; download it as well"
        )
    found = f"{', '.join(others)} alone" if others else "none"
    return (
        f"{where} must have its weights in {WEIGHTS}, got {found} in {folder}; open the model with "
        "the library that made it and save it with save_pretrained of transformers"
    )
