"""SentencePiece models as transformers converts them: what it needs, and what it leaves out."""

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from distilcache.data.errors import require, to_install
from distilcache.stages.models.tokenizer_files import TokenizerFiles

_ROLES = ("unk", "bos", "eos", "sep", "cls", "pad", "mask")


def require_converter(models: list[str], where: str) -> None:
    """What SentencePiece models without tokenizer.json are converted with."""
    needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    absent = [package for package, module in needed.items() if not _installed(module)]
    require(
        not (models and absent),
        f"{where} of {', '.join(models[:1])} alone must be converted with the packages "
        f"sentencepiece and protobuf, got no {' and no '.join(absent)}; "
        f"{to_install('sentencepiece')}",
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def require_its_kind(kind: Any, files: TokenizerFiles, tokenizer: Any = None) -> None:
    """Refuse a BPE that a class takes for a Unigram, or the other way round.

    Each class has one kind, whatever its file says. Words fall into other pieces, or it fails.

    Args:
        kind: The class of the tokenizer.
        files: Of the checkpoint.
        tokenizer: The fast tokenizer; None: it could not be read.

    Raises:
        UserError: The file is of another kind.
    """
    used, alike = _kind_of_class(kind), ""
    if tokenizer is not None:
        # Without a piece of more than one letter, all kinds cut in one way.
        used, alike = type(tokenizer.backend_tokenizer.model).__name__, "CHAR"
    file, found = _kind_of(kind, files)
    by = " with transformers 4" if found == "BPE" else ""
    made = "" if file == "tokenizer.json" else f"save a tokenizer.json of it there{by}, and "
    require(
        not used or found.upper() in ("", used.upper(), alike),
        f"{files.where} must be a {used} where {kind.__name__} reads it, got {str(files.name)!r} "
        f'with {file}, a {found}; {made}put "tokenizer_class": "PreTrainedTokenizerFast" and its '
        "special tokens into its tokenizer_config.json",
    )


def with_character_map(tokenizer: Any, files: TokenizerFiles) -> Any:
    """A fast tokenizer that was made of a SentencePiece model, with the model's map of characters.

    The map makes a full-width letter a plain one and a no-break space a space. Without it these
    are unknown. Its own class would leave the map out again when it opens a copy, so the class is a
    general one.

    Args:
        tokenizer: The tokenizer.
        files: What it was read from.
    """
    backend = tokenizer.backend_tokenizer
    found = b"" if "Precompiled" in str(backend.normalizer) else _map_of(tokenizer, files)
    if not found:
        return tokenizer
    after = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Precompiled(found), *after])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=tokenizer.name_or_path,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        extra_special_tokens=list(tokenizer.extra_special_tokens),
        **{f"{role}_token": getattr(tokenizer, f"{role}_token") for role in _ROLES},
    )


def _map_of(tokenizer: Any, files: TokenizerFiles) -> bytes:
    """The map in the file that the tokenizer's class reads; nothing where it reads no such file."""
    path = model_file(type(tokenizer), files)
    return bytes(_content(path).normalizer_spec.precompiled_charsmap) if path else b""


def _kind_of_class(kind: Any) -> str:
    """What a fast class takes every file for; "": it takes a file for what it is, or is none."""
    if kind is PreTrainedTokenizerFast or not issubclass(kind, PreTrainedTokenizerFast):
        return ""
    if kind.model is None:
        return "Unigram" if ".model" in str(kind.vocab_files_names) else ""
    return str(kind.model.__name__)


def _kind_of(kind: Any, files: TokenizerFiles) -> tuple[str, str]:
    """The file that a class for SentencePiece models reads, and its kind; "": not known."""
    with contextlib.suppress(Exception):  # a file is damaged
        if path := files.path("tokenizer.json"):
            return "tokenizer.json", json.loads(path.read_text(encoding="utf-8"))["model"]["type"]
        path = model_file(kind, files)
        if path:
            spec = _content(path).trainer_spec
            return path.name, spec.ModelType.Name(spec.model_type)
    return "", ""


def model_file(kind: Any, files: TokenizerFiles) -> Path | None:
    """The SentencePiece model that a tokenizer's class reads; None where it reads none."""
    for name in kind.vocab_files_names.values():
        if name.endswith(".model") and (found := files.path(name)):
            return found
    return None


def _content(path: Path) -> Any:
    return import_protobuf().ModelProto.FromString(path.read_bytes())
