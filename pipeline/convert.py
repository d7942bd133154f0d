"""``distilcache convert``: pickled weights as safetensors; no code in them is run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, reason_of, require, tell
from distilcache.data.storage.files import read_json
from distilcache.data.storage.locks import new_output, require_new
from distilcache.pipeline.report.text import short_bytes
from distilcache.stages.models.hub import folder_of, names_on_hub
from distilcache.stages.models.weight_files import (
    ADAPTER,
    INDEX,
    PICKLED,
    WEIGHTS,
    names_in,
    other_weights,
    read_config,
    require_content,
    require_merged,
)

WHERE = "convert: model"
COPIED = ("*.json", "*.py", "*.txt", "*.model", "*.codes", "README.md", "LICENSE*")
"""Configuration, code that it names, tokenizer files, and what the model's card says of its
licence."""
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""First bytes of PyTorch files; the second is from before version 1.6."""


def convert_command(name: str, out: Path, revision: str = "") -> tuple[dict[str, Any], str]:
    """Copy a checkpoint with ``pytorch_model.bin``, folder or hub id, its tensors as safetensors.

    Names and types of the tensors do not change, so transformers loads the new checkpoint as it
    loads the old one. A tensor with several names is written under each of them. ``out`` appears
    when it is complete. ``revision`` is a branch, tag or commit of a hub id; "": the newest.

    Returns:
        Values for JSON, and the text for people.

    Raises:
        UserError: There is nothing to convert, a file is damaged or holds more than tensors, or
            ``out`` is there or cannot be written.
    """
    require_new(out, "convert: OUT")
    folder = folder_of(name, where=WHERE, revision=revision)
    if folder is None:
        folder = _download(name, revision)
    else:
        _require_pickled(names_in(folder), folder)
    from safetensors import SafetensorError

    tensors = {k: t for path in _pickled(folder) for k, t in _read(path).items()}
    config = read_config(folder / "config.json", WHERE, tensors)
    try:
        with new_output(out, "convert", "OUT") as part:
            _write(tensors, config, folder, part)
    except (ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{WHERE} must be one that safetensors can hold, got {name!r}: {reason_of(error)}"
        ) from None
    size = (out / WEIGHTS).stat().st_size
    values = {"path": str(out), "model": name, "tensors": len(tensors), "bytes": size}
    return values, (
        f"convert: {out}: {len(tensors)} tensors, {short_bytes(size)}; pass it in place of {name}"
    )


def _download(name: str, revision: str) -> Path:
    """Download the needed files of a hub id."""
    from huggingface_hub import snapshot_download

    try:
        _require_pickled(names_on_hub(name, revision), name)
        wanted = ["pytorch_model*", *COPIED]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as error:  # of the client and its transport
        raise UserError(
            f"{WHERE} must be one that can be downloaded, got {name!r}: {reason_of(error)}"
        ) from None


def _require_pickled(names: list[str], place: str | Path) -> None:
    """Refuse a checkpoint whose files, of these names, have no pickled weights among them."""
    require(
        WEIGHTS not in names and INDEX not in names,
        f"{WHERE} must have pickled weights, got {str(place)!r} with weights in safetensors; pass "
        "it as it is",
    )
    require_merged(ADAPTER in names, place, WHERE)
    require(
        not set(PICKLED).isdisjoint(names), other_weights(names, place, WHERE, wanted=PICKLED[0])
    )


def _pickled(folder: Path) -> list[Path]:
    """The files with weights; all of them exist."""
    one, index = (folder / name for name in PICKLED)
    paths = [one]
    if not one.exists() and index.exists():
        require_content(index, WHERE)
        try:
            names = read_json(index, "convert: index")["weight_map"].values()
            paths = [folder / str(file) for file in sorted(set(names))]
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{WHERE} must have an index with a weight_map, got {index}; download it again"
            ) from None
    for path in paths:
        require(
            path.is_file(),
            f"{WHERE} must be a folder with {PICKLED[0]}, or all files of {PICKLED[1]}, got no "
            f"{path.name} in {folder}; download it again",
        )
        require_content(path, WHERE)
    return paths


def _read(path: Path) -> Mapping[str, Any]:
    """The tensors of one file; a file with code is refused, and the code is not run."""
    import torch

    with path.open("rb") as file:
        start = file.read(len(ZIP))
    what = ""
    found: Any = {}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        what = error.strerror or str(error)
    except (RuntimeError, EOFError):
        what = "a file that is cut off or damaged; download it again"
    except Exception:  # of the unpickler, whose advice is to run the code
        what = "objects other than tensors, which would have to run code to be read"
    if start != ZIP and not start.startswith(PICKLE):
        what = "a file of another kind; download it again"
    if not what and not isinstance(found, Mapping):
        what = f"a {type(found).__name__} in place of named tensors"
    others = [] if what else [str(k) for k, v in found.items() if not torch.is_tensor(v)]
    if others:
        what = f"other things under {', '.join(others[:3])}; save the model's state_dict alone"
    if what:
        raise UserError(f"{WHERE} must hold named tensors and nothing else, got {path} with {what}")
    return dict(found)


def _write(tensors: Mapping[str, Any], config: Mapping[str, Any], folder: Path, part: Path) -> None:
    """All files of the new checkpoint."""
    from safetensors.torch import save_file

    for file in sorted({p for kind in COPIED for p in folder.glob(kind)}):
        if file.name != PICKLED[1]:
            shutil.copyfile(file, part / file.name)
    if "model_type" not in read_json(part / "config.json", f"{WHERE}: config.json"):
        (part / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        tell(f"convert: its tensors are those of a {config['model_type']}, as config.json now says")
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, part / WEIGHTS, metadata={"format": "pt"})
    (part / WEIGHTS).chmod((part / "config.json").stat().st_mode & 0o777)
