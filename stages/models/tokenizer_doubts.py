"""Lines on tokenizers that open, and may not be what their model was trained with."""

import contextlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from distilcache.data.errors import tell

PROBE = "Caf\u00e9 n\u00ba 12,5: it's don_t \uff21\u4e2d\u6587"
"""Text with what rules treat in different ways."""
RARE = "\ua66e"
"""A letter that hardly any vocabulary has."""
MARKED = "\u00e9\u0915\u0941\uac00"
"""A letter with an accent, one with a vowel sign, and Hangul."""
FEW = 0.01
"""Share of words that no text can become which a vocabulary may have by oversight."""


def tell_doubts(tokenizer: Any, state: Mapping[str, Any], name: str | Path) -> None:
    """Print a line for each doubt.

    Args:
        tokenizer: A fast tokenizer.
        state: The content of its ``tokenizer.json``; nothing where there is none.
        name: Its folder or hub id.
    """
    _tell_lower_cased(tokenizer, name)
    _tell_without_marks(tokenizer, state, name)
    _tell_other_rules(tokenizer, state, name)
    _tell_no_bytes(tokenizer, state, name)
    _tell_left_out(tokenizer, name)
    _tell_cut(tokenizer, name)
    if not reads_all(tokenizer):
        _tell(
            name,
            "has no token for what it does not know; a text with a letter or word that its "
            "vocabulary lacks is refused",
        )


def reads_all(tokenizer: Any) -> bool:
    """Whether it reads any letter: not where its model lacks the unknown token, and bytes too."""
    text = getattr(tokenizer, "pieces", str)(RARE)
    try:
        tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # the library's own type
        return False
    return True


def rare_pieces(tokenizer: Any) -> list[str]:
    """What a letter that hardly any vocabulary has becomes; nothing where it has no token."""
    backend = tokenizer.backend_tokenizer
    with contextlib.suppress(Exception):  # the library's own, where the model has no unknown token
        return [backend.id_to_token(piece.id) for piece in backend.model.tokenize(RARE)]
    return []


def _tell(name: str | Path, doubt: str) -> None:
    """Once, also of the copies of a tokenizer that a run makes."""
    tell(f"tokenizer: {name} {doubt}", about=doubt)


def own_words(tokenizer: Any) -> set[str]:
    """The vocabulary without special tokens and what looks like one: [unused0], <NAME>."""
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - {"▁", "▁▁", ""}
    return {word for word in words if len(word) == 1 or word[0] not in "[<"}


def _tell_lower_cased(tokenizer: Any, name: str | Path) -> None:
    """One line on words with capitals that no text can become, since it is lower-cased before."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str("A") != "a":
        return
    words = own_words(tokenizer)
    lost = sorted(word for word in words if word.lower() != word)
    if len(lost) > FEW * len(words):
        _tell(
            name,
            f"has {len(lost):,} words with capitals ({', '.join(lost[:3])}) and makes all text "
            "small before it looks; if the model was trained with case, put "
            '{"do_lower_case": false} into its tokenizer_config.json',
        )


def _tell_without_marks(tokenizer: Any, state: Mapping[str, Any], name: str | Path) -> None:
    """One line on words that no text can become, since marks and Hangul are taken apart before."""
    normalizer = tokenizer.backend_tokenizer.normalizer

    def seen(word: str) -> str:
        return str(normalizer.normalize_str(word)).replace(" ", "").replace("▁", "")

    if normalizer is None or seen(MARKED) == MARKED:
        return
    words = {word.lower().replace("▁", "") for word in own_words(tokenizer)}
    lost = sorted(word for word in words if seen(word) != word)
    if len(lost) > FEW * len(words):
        known = inspect.signature(type(tokenizer).__init__).parameters
        remedy = "take that rule out of the normalizer in its tokenizer.json"
        if "strip_accents" in known:
            remedy = 'put {"strip_accents": false} into its tokenizer_config.json'
        elif "keep_accents" in known or not state:
            remedy = 'put {"keep_accents": true} into its tokenizer_config.json'
        _tell(
            name,
            f"has {len(lost):,} words with accents, vowel signs or Hangul ({', '.join(lost[:3])}) "
            "and takes these off or apart before it looks; if the model was trained with them, "
            f"{remedy}",
        )


def _tell_other_rules(tokenizer: Any, state: Mapping[str, Any], name: str | Path) -> None:
    """One line where text is split, or pairs are made, by other rules than ``tokenizer.json``'s.

    Tokenizers of a class of their own take the vocabulary from there, and the rules of the class.
    """
    if not state:
        return
    used = tokenizer.backend_tokenizer
    parts = ("normalizer", "pre_tokenizer", "post_processor")
    rules = {part: state.get(part) or {} for part in parts}
    content = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}
    try:
        there = tokenizers.Tokenizer.from_str(
            json.dumps(content | {part: rule or None for part, rule in rules.items()})
        )
    except Exception:  # of rules that the library no longer reads
        return
    for part, usual in (("normalizer", "BertNormalizer"), ("pre_tokenizer", "ByteLevel")):
        if rules[part].get("type") == usual:  # its settings are those of tokenizer_config.json
            setattr(there, part, getattr(used, part))
    for reading in (_split, _pair):
        found, wanted = reading(used), reading(there)
        if wanted and found != wanted:
            _tell(
                name,
                f"is of {type(tokenizer).__name__}, which reads {' '.join(found)!r} where the "
                f"rules in its tokenizer.json read {' '.join(wanted)!r}; if the model was trained "
                'with these, put "tokenizer_class": "PreTrainedTokenizerFast" and its special '
                "tokens into its tokenizer_config.json",
            )


def _tell_no_bytes(tokenizer: Any, state: Mapping[str, Any], name: str | Path) -> None:
    """One line where the file spells what it does not know in bytes, and the class does not."""
    if not (state.get("model") or {}).get("byte_fallback"):
        return
    found = rare_pieces(tokenizer)
    if found == [tokenizer.unk_token]:
        _tell(
            name,
            f"is of {type(tokenizer).__name__}, which reads unknown characters as {found[0]} where "
            "its tokenizer.json spells them in bytes (byte_fallback); if the model was trained "
            'with these, put "tokenizer_class": "PreTrainedTokenizerFast" into its '
            "tokenizer_config.json",
        )


def _tell_left_out(tokenizer: Any, name: str | Path) -> None:
    """One line where a BPE passes over what it does not know: nothing counts it as unknown."""
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, tokenizers.models.BPE) or backend.model.unk_token is not None:
        return
    if not backend.encode(RARE, add_special_tokens=False).ids:
        _tell(
            name,
            "leaves out characters that it does not know, and unknown tokens do not count them; "
            'unless the model was trained so, put its "unk_token" into the model of tokenizer.json',
        )


def _tell_cut(tokenizer: Any, name: str | Path) -> None:
    """One line on words that tokenizer_config.json keeps whole: fast tokenizers do not look there.

    Words that the vocabulary lacks are left out: they would be unknown.
    """
    words = tokenizer.init_kwargs.get("never_split")
    vocabulary = tokenizer.get_vocab()
    kept = [w for w in words if w in vocabulary] if isinstance(words, list) else []
    cut = [word for word in kept if tokenizer.tokenize(word) != [word]]
    if cut:
        _tell(
            name,
            f"cuts {', '.join(cut)}, which its never_split keeps whole; if the model was trained "
            f'so, put "extra_special_tokens": {json.dumps(cut, ensure_ascii=False)} into its '
            "tokenizer_config.json",
        )


def _split(backend: tokenizers.Tokenizer) -> list[str]:
    """A text, before it is cut into tokens of the vocabulary."""
    text = backend.normalizer.normalize_str(PROBE) if backend.normalizer else PROBE
    if backend.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _pair(backend: tokenizers.Tokenizer) -> list[str]:
    """Two texts A and B with the tokens around them; nothing where no rule is given."""
    if backend.post_processor is None:
        return []
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"A": 0, "B": 1}, unk_token="A"))
    pair = backend.post_processor.process(words.encode("A"), words.encode("B"))
    return list(pair.tokens)
