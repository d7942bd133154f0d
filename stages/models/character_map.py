"""The map of characters in a SentencePiece model, which some classes of transformers leave out.

It makes a full-width letter a plain one and a no-break space a space. Without it these are unknown.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.utils.hub import cached_file

_ROLES = ("unk", "bos", "eos", "sep", "cls", "pad", "mask")


def with_character_map(tokenizer: Any, place: str | Path, options: Mapping[str, Any]) -> Any:
    """A fast tokenizer that was made of a SentencePiece model, with the model's map.

    Its own class would leave the map out again when it opens a copy, so the class is a general one.

    Args:
        tokenizer: The tokenizer.
        place: Folder or hub id that it was read from.
        options: What it was read with.
    """
    backend = tokenizer.backend_tokenizer
    found = b"" if "Precompiled" in str(backend.normalizer) else _map_of(tokenizer, place, options)
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


def _map_of(tokenizer: Any, place: str | Path, options: Mapping[str, Any]) -> bytes:
    """The map in the file that the tokenizer's class reads; nothing where it reads no such file."""
    for name in type(tokenizer).vocab_files_names.values():
        if not name.endswith(".model"):
            continue
        path = cached_file(place, name, **options, _raise_exceptions_for_missing_entries=False)
        if path:
            model = import_protobuf().ModelProto.FromString(Path(path).read_bytes())
            return bytes(model.normalizer_spec.precompiled_charsmap)
    return b""
