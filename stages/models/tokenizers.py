"""Tokenizers: load, check, identify."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)
from transformers.models.auto.tokenization_auto import (
    TOKENIZER_MAPPING_NAMES,
    tokenizer_class_from_name,
)

from distilcache.data.errors import UserError, reason_of, require, tell, to_install
from distilcache.stages.models.esm_tokenizer import fast_esm
from distilcache.stages.models.hub import folder_of, own_code, quiet, source, tell_own_code
from distilcache.stages.models.piece_tokenizer import fits_a_file, of_pieces
from distilcache.stages.models.sentencepiece_files import (
    require_converter,
    require_its_kind,
    with_character_map,
)
from distilcache.stages.models.spellings import (
    require_ids_of_files,
    require_ids_of_their_own,
    require_spelling,
    require_unknown,
)
from distilcache.stages.models.tokenizer_doubts import own_words, tell_doubts
from distilcache.stages.models.tokenizer_files import TokenizerFiles
from distilcache.stages.models.trimmed_tokenizer import ids_of
from distilcache.stages.models.weight_files import require_content

MANY_UNKNOWN = 0.03
"""Fraction of unknown tokens or characters from which a line warns; in suitable text it is far
below 1 %."""
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab",
    "merges",
    "bpe.codes",
    "spiece.model",
    "spm.model",
    "sentencepiece",
)
"""How the names of files begin that hold the vocabulary of a tokenizer."""
OF_TEXT = {"LukeTokenizer": RobertaTokenizer, "MLukeTokenizer": XLMRobertaTokenizer}
"""In place of tokenizers of text and entities: they give entities ids that the model lacks."""


def load_tokenizer(
    name: str | Path, needs: str = "", *, where: str = "corpus: tokenizer", revision: str = ""
) -> PreTrainedTokenizerFast:
    """Open a tokenizer from a folder or the Hugging Face hub.

    Args:
        name: Folder with a tokenizer, or a hub id; a ``Path`` is a folder.
        needs: What the recipe says must be at hand; appended where the folder is missing.
        where: Stage and what is asked for, for errors.
        revision: Branch, tag or commit of a hub id; "": the newest.

    Raises:
        UserError: The folder or hub id cannot be read, or holds no tokenizer of texts alone.
    """
    tokenizer = find_tokenizer(name, needs, where=where, revision=revision)
    if tokenizer is None:
        raise UserError(
            f"{where} must be a folder with a tokenizer, got {str(name)!r} without tokenizer files "
            "that hold words (tokenizer.json, or the vocabulary that it was trained with); copy "
            "those of the model there, or name another folder: --set corpus.tokenizer=PATH"
        )
    return tokenizer


def find_tokenizer(
    name: str | Path, needs: str = "", *, where: str = "corpus: tokenizer", revision: str = ""
) -> PreTrainedTokenizerFast | None:
    """:func:`load_tokenizer`, and None where there are no files of one.

    A trainer's checkpoint may hold the model alone; transformers then makes up a tokenizer that
    knows the special tokens and nothing else.
    """
    folder = folder_of(name, where=where, revision=revision, needs=needs)
    if folder is not None:
        there = sorted(p for p in folder.iterdir() if p.name.startswith(VOCABULARIES))
        for path in there:
            require_content(path, where)
        if not there:
            return None
        if "tokenizer.json" not in (path.name for path in there):
            require_converter([path.name for path in there if path.suffix == ".model"], where)
    files = TokenizerFiles(folder or str(name), source(folder, revision), name, where)
    tokenizer, state = _opened(files)
    require_ids_of_their_own(tokenizer, files)
    require_ids_of_files(tokenizer, state, files)
    require_spelling(tokenizer, files)
    require_unknown(tokenizer, state, files)
    longest = tokenizer.model_max_length
    require(
        isinstance(longest, int | float) and 1 <= longest < math.inf,
        f"{where} must have a model_max_length of 1 or more, got {longest!r} in {str(name)!r}; "
        "correct its tokenizer_config.json",
    )
    if not own_words(tokenizer):
        _require_its_files(tokenizer, files)
        return None
    _without_dropout(tokenizer, name)
    tell_own_code(files.settings(), ("AutoTokenizer",), tokenizer, f"tokenizer: {name}")
    tell_doubts(tokenizer, state, name)
    for key in ("is_local", "local_files_only", "trust_remote_code", "auto_map"):
        for made in (tokenizer, getattr(tokenizer, "slow", tokenizer)):
            made.init_kwargs.pop(key, None)  # how it was opened is no part of what it is
    return tokenizer


def _opened(files: TokenizerFiles) -> tuple[Any, dict[str, Any]]:
    """A fast tokenizer, and the content of its ``tokenizer.json`` where it is read from there."""
    try:
        with quiet():
            tokenizer, state = _read(files)
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError and its parsers' own types here.
        require_converter(re.findall(r"[\w.]+\.model\b", str(error)), files.where)
        kind = _named_class(files)
        if kind is not None:
            require_its_kind(kind, files)
        remedy = _install(error) if isinstance(error, ImportError) else _needs(kind, files)
        why = "" if "custom code" in str(error) else f": {reason_of(error).rstrip('.')}"
        raise UserError(
            f"{files.where} must be one that transformers can read, got {str(files.name)!r}{why}; "
            f"{remedy}"
        ) from None
    kind = type(tokenizer)
    if kind.__name__ == "EsmTokenizer":
        return fast_esm(tokenizer), {}
    if not (tokenizer.is_fast and fits_a_file(tokenizer)):
        # The rules are the code's; a tokenizer.json beside it, as PhoBERT's, is not read.
        return of_pieces(tokenizer, files), {}
    if state:
        return _of_its_kind(tokenizer, state, files), state
    require_its_kind(kind, files, tokenizer)
    return with_character_map(tokenizer, files), state


def _read(files: TokenizerFiles) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of texts as transformers reads it, and the content of ``tokenizer.json``."""
    place, options = files.place, files.options
    tokenizer: Any = AutoTokenizer.from_pretrained(place, **options)
    if of_text := OF_TEXT.get(type(tokenizer).__name__):
        tokenizer = of_text.from_pretrained(place, **options)
    path = files.path("tokenizer.json")
    state = json.loads(path.read_text(encoding="utf-8")) if path else {}
    own = _own_tokens(tokenizer, state, files.settings())
    if own is not None:
        tokenizer = AutoTokenizer.from_pretrained(place, additional_special_tokens=own, **options)
    return tokenizer, state


def _own_tokens(
    tokenizer: Any, state: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str] | None:
    """The further special tokens of a checkpoint, where its tokenizer's class adds others.

    A CamemBERT's does. The model has no rows for them, and no file of the checkpoint names them.
    """
    given = [str(token) for token in tokenizer.extra_special_tokens]
    named = settings.keys() & {"additional_special_tokens", "extra_special_tokens"}
    if not given or not state or named:
        return None
    there = ids_of(state)
    own = [token for token in given if token in there]
    return own if len(own) < len(given) else None


def _install(error: ImportError) -> str:
    """How to get the package that the error names."""
    japanese = re.search("fugashi|ipadic|unidic_lite", str(error))
    return to_install("japanese") if japanese else "install it"


def _named_class(files: TokenizerFiles) -> Any:
    """The class that the files of a checkpoint name for its tokenizer; None where none does."""
    with contextlib.suppress(Exception):  # a file is damaged as well
        name = files.settings().get("tokenizer_class")
        if not name:
            config = PreTrainedConfig.get_config_dict(files.place, **files.options)[0]
            name = config.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES[config["model_type"]]
        return tokenizer_class_from_name(name)
    return None


def _needs(kind: Any, files: TokenizerFiles) -> str:
    """What files a tokenizer of a class that cannot be read would need."""
    with contextlib.suppress(Exception):  # a file is damaged as well
        if code := own_code(files.settings()):
            return code
    if kind is not None:
        return f"{kind.__name__} reads {', '.join(sorted(kind.vocab_files_names.values()))}"
    return (
        "it needs tokenizer.json, or beside its vocabulary the config.json of the model or a "
        'tokenizer_config.json with "tokenizer_class", which say how to read it'
    )


def _require_its_files(tokenizer: Any, files: TokenizerFiles) -> None:
    """Refuse a vocab.txt that the class passes over, as that of an ALBERT with BERT's words."""
    kind = type(tokenizer)
    wanted = sorted(set(kind.vocab_files_names.values()) - {"tokenizer.json"})
    require(
        files.path("vocab.txt") is None or "vocab.txt" in wanted,
        f"{files.where} must have the files that its class reads, got {str(files.name)!r} with "
        f"vocab.txt where {kind.__name__} reads {', '.join(wanted)}; put "
        '"tokenizer_class": "BertTokenizer" into its tokenizer_config.json',
    )


def _of_its_kind(tokenizer: Any, state: Mapping[str, Any], files: TokenizerFiles) -> Any:
    """The tokenizer, or the general one where its class reads a kind that is not in its file.

    A WordPiece has no merges, so that a BPE of its words would cut all text into letters.
    """
    there = (state.get("model") or {}).get("type")
    used = type(tokenizer.backend_tokenizer.model).__name__
    if there in (None, used) or {there, used} == {"WordLevel", "WordPiece"}:
        return tokenizer
    tell(
        f"tokenizer: {files.name} is read as the {there} in its tokenizer.json, and not by "
        f"{type(tokenizer).__name__}, which takes it for a {used}"
    )
    with quiet():
        return PreTrainedTokenizerFast.from_pretrained(files.place, **files.options)


def _without_dropout(tokenizer: Any, name: str | Path) -> None:
    """Let a BPE cut each text in one way: dropout is for training, and would go on in silence."""
    model = tokenizer.backend_tokenizer.model
    if getattr(model, "dropout", None):
        tell(f"tokenizer: {name} skips merges at random (dropout {model.dropout:g}), not so here")
        model.dropout = None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the tokenizer's model and vocabulary, whatever its truncation and padding."""
    return _fingerprint(tokenizer.backend_tokenizer.to_str())


def saved_fingerprint(path: Path) -> str:
    """:func:`tokenizer_fingerprint` of a ``tokenizer.json``; "no tokenizer" where it is none."""
    try:
        return _fingerprint(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return "no tokenizer"


def _fingerprint(text: str) -> str:
    state = json.loads(text)
    state["truncation"] = state["padding"] = None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest token id, added tokens included."""
    return 1 + max(int(i) for i in tokenizer.get_vocab().values())
