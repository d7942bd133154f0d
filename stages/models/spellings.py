"""Tokens that are read as others than the model was trained with: as a new one, or by other ids."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import models

from distilcache.data.errors import require
from distilcache.stages.models.sentencepiece_files import model_file
from distilcache.stages.models.tokenizer_doubts import RARE, own_words, rare_pieces, reads_all
from distilcache.stages.models.tokenizer_files import TokenizerFiles

_NAMES = {"pad": ("pad",), "unk": ("unk",), "cls": ("cls", "s"), "sep": ("sep", "/s"),
          "mask": ("mask",)}  # fmt: skip
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that name special tokens. One that stands in none of them is the class's own."""


def require_spelling(tokenizer: Any, files: TokenizerFiles) -> None:
    """Refuse a vocabulary with ``<mask>`` or ``[mask]`` to which a class adds ``[MASK]``.

    The model has no trained row for what is added. A BPE must hold the mask token, or a file must
    name it. To vocabularies of SentencePiece, published classes add their tokens.

    Args:
        tokenizer: A fast tokenizer.
        files: What it was read from.

    Raises:
        UserError: It has such a vocabulary.
    """
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, models.WordPiece | models.BPE):
        return
    words = backend.get_vocab(with_added_tokens=False)
    special = {w.strip("<>[]").lower(): w for w in words if w[:1] in "<[" and w[-1:] in ">]"}
    there = {
        role: special[spelt]
        for role, names in _NAMES.items()
        for spelt in names
        if spelt in special and getattr(tokenizer, f"{role}_token") not in (None, *words)
    }
    mask = tokenizer.mask_token
    added = isinstance(backend.model, models.BPE) and mask not in (None, *words)
    if not there and not added:
        return
    where, name = files.where, str(files.name)
    named = "".join(files.text(file) for file in _FILES)
    own = {r: w for r, w in there.items() if f'"{getattr(tokenizer, f"{r}_token")}"' not in named}
    settings = ", ".join(f'"{role}_token": "{word}"' for role, word in own.items())
    require(
        not own,
        f"{where} must name its special tokens as its vocabulary does, got {name!r} with "
        f"{', '.join(own.values())}, to which {type(tokenizer).__name__} adds its own; put "
        f"{settings} into its tokenizer_config.json",
    )
    require(
        not added or f'"{mask}"' in named,
        f"{where} must name its mask token in one of its files, got {name!r} with none, to "
        f"which {type(tokenizer).__name__} adds {mask}; put the one that the model was trained "
        'with into its tokenizer_config.json, as "mask_token"',
    )


def require_ids_of_files(tokenizer: Any, state: Mapping[str, Any], files: TokenizerFiles) -> None:
    """Refuse an added token whose id is another one than in the file that names it.

    The library numbers added tokens from the end of the vocabulary on, whatever the file says.

    Args:
        tokenizer: A fast tokenizer.
        state: The content of its ``tokenizer.json``; empty where that is not read.
        files: What it was read from.

    Raises:
        UserError: It has such a token.
    """
    name, settings = str(files.name), files.settings().get("added_tokens_decoder")
    if state:
        file, ids = "tokenizer.json", {t["content"]: t["id"] for t in state["added_tokens"]}
    elif settings:
        file = "tokenizer_config.json"
        ids = {token["content"]: int(index) for index, token in settings.items()}
    else:
        file = "added_tokens.json"
        ids = json.loads(files.text(file) or "{}")
    words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_vocab()
    for token in sorted(ids.keys() - words.keys()):
        index = added.get(token, ids[token])
        require(
            index == ids[token],
            f"{files.where} must read added tokens by the ids in its files, got {name!r}, whose "
            f"{file} gives {token!r} the id {ids[token]}, where it is read as {index}; put "
            "tokens without a use, such as [unused1], into the vocabulary for the ids before it",
        )


def require_ids_of_their_own(tokenizer: Any, files: TokenizerFiles) -> None:
    """Refuse tokens of one id: the library loses all but one of them when it saves them."""
    ids: dict[int, str] = {}
    for token, index in tokenizer.get_vocab().items():
        other = ids.setdefault(index, token)
        require(
            other == token,
            f"{files.where} must have an id for each token, got {other!r} and {token!r} of the "
            f"same id, {index}, in {str(files.name)!r}; use another model",
        )


def require_unknown(tokenizer: Any, state: Mapping[str, Any], files: TokenizerFiles) -> None:
    """Refuse a tokenizer to which what it does not know is the end of a text, or a word.

    The classes of ALBERT, XLM-R, XLNet and others look for the unknown token where published
    vocabularies have it.
    """
    where, name = files.where, str(files.name)
    backend, unknown = tokenizer.backend_tokenizer, tokenizer.unk_token
    require(
        # A vocabulary of words or letters may be all that the texts hold, as of proteins.
        isinstance(backend.model, models.WordLevel) or reads_all(tokenizer),
        f"{where} must have an unknown token in the vocabulary of its model, got none in "
        f"{name!r}, so that it cannot read other letters than its own; use the vocabulary "
        "that the model was trained with",
    )
    found = rare_pieces(tokenizer)
    others = set(tokenizer.all_special_tokens) - {unknown}
    is_one = isinstance(backend.model, models.Unigram) and len(found) == 1  # not bytes
    if is_one and found[0] not in (unknown, RARE):
        others |= own_words(tokenizer)
    file = None if state else model_file(type(tokenizer), files)
    remedy = f"copy its {file.name} to tokenizer.model" if file else "use its tokenizer.json"
    require(
        others.isdisjoint(found),
        f"{where} must read what it does not know as {unknown!r}, got {''.join(found)!r} from "
        f"{name!r}, whose class {type(tokenizer).__name__} expects its own order of tokens; "
        f'{remedy}, with "tokenizer_class": "PreTrainedTokenizerFast" and its special tokens in '
        "tokenizer_config.json",
    )
