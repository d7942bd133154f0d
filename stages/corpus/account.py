"""Remarks on the text for the console, and refusal of text that is of no use for training."""

import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from distilcache.data.corpus.manifest import CorpusManifest, SplitEntry
from distilcache.data.errors import UserError
from distilcache.data.progress import Bar
from distilcache.stages.corpus.worker import PartSettings
from distilcache.stages.models.tokenizers import MANY_UNKNOWN

MOST_UNKNOWN = 0.9
"""Fraction of unknown tokens or characters from which the text is refused: if the vocabulary lacks
the script, only digits and punctuation are known."""

MUCH_HELD_OUT = 0.1
"""Fraction of the tokens held out from which a line tells it, where less was asked for."""

_ADD = "add text, or lower"
_FITTING = "a teacher or corpus.tokenizer for its language and script"


class Lost(NamedTuple):
    """What is known of the unknown tokens of a text."""

    characters: float = 0.0
    """Fraction of the characters, without white space, that they stand for; 0 where Python code
    cuts the text, which does not tell."""
    remedy: str = ""
    """How to write the text so that the tokenizer knows it; empty if no such way is known."""


def say(line: str) -> None:
    """Print a line on the console, above a progress bar."""
    Bar.write(f"corpus: {line}", file=sys.stderr)


class Unusable(UserError):
    """Text and tokenizer make no corpus; other settings are needed, so no part is kept."""


def check_text(
    settings: PartSettings,
    splits: Mapping[str, SplitEntry],
    ordinary: int,
    tokenizer: str,
    lost: Lost,
) -> None:
    """Refuse a training split that is of no use.

    ``ordinary`` are the tokens of training sequences that may be masked; ``tokenizer`` is a folder
    or hub id, empty where it is trained on this text.

    Raises:
        Unusable: Names the cause.
    """
    train = splits["train"]
    name = tokenizer or "the trained tokenizer"
    unknown = _unknown_fraction([train])
    if max(unknown, lost.characters) >= MOST_UNKNOWN:
        raise Unusable(
            f"corpus: sources must be text that the tokenizer knows, got {_percent(unknown)} "
            f"unknown tokens{_in_place(unknown, lost)} with {name}; "
            f"{lost.remedy or f'choose {_FITTING}, or other text'}"
        )
    if not train["sequences"]:
        found = _nothing_left(settings, splits, lost)
        raise Unusable(f"corpus: sources must give at least one training sequence, got {found}")
    if not ordinary:
        raise Unusable(
            "corpus: sources must have tokens that can be masked, got only special ones in "
            f"{train['sequences']:,} sequences with {name}; choose other text"
        )


def _nothing_left(settings: PartSettings, splits: Mapping[str, SplitEntry], lost: Lost) -> str:
    train, heldout = splits["train"], splits["heldout"]
    if not train["documents"]:
        return no_training_text(heldout["documents"])
    tokens, short, unknown = (
        train[name] for name in ("text_tokens", "short_sequences", "unknown_sequences")
    )
    if short or unknown:
        fitting = lost.remedy or f"choose {_FITTING}"
        remedy = f"{_ADD} corpus.min_tokens" if short > unknown else fitting
        return (
            f"{short:,} lines of fewer than {settings.min_tokens} tokens and {unknown:,} that are "
            f"half unknown; {remedy}"
        )
    if tokens >= settings.max_length:
        return f"{tokens:,} tokens in units too small for one; raise corpus.chunk_bytes"
    longest = "corpus.min_tokens, corpus.max_length or corpus.heldout_fraction"
    return f"{_count(tokens, 'token')}, fewer than one has; {_ADD} {longest}"


def no_training_text(documents: int) -> str:
    """Description of the cause if every document is held out."""
    return (
        f"{_count(documents, 'document')}, all held out; {_ADD} "
        "corpus.heldout_fraction, or cut it into more documents with corpus.document"
    )


def remarks(
    settings: PartSettings, manifest: CorpusManifest, tokenizer: str, lost: Lost, asked: float
) -> Iterator[str]:
    """Lines about a finished corpus: unknown and dropped tokens, and how much is held out.

    ``asked`` is the fraction of documents to hold out; 0 where held-out text has its own sources.
    """
    splits = list(manifest.splits.values())
    if settings.special_ids["unk"] >= 0:
        unknown = _unknown_fraction(splits)
        line = f"{_percent(unknown)} of the tokens are unknown{_in_place(unknown, lost)}"
        if max(unknown, lost.characters) >= MANY_UNKNOWN:
            remedy = lost.remedy or f"choose {_FITTING}"
            line += f": {tokenizer or 'the tokenizer'} hardly fits this text; {remedy}"
        yield line
    short, unknown, kept, dropped, tokens = (
        sum(split[name] for split in splits)
        for name in (
            "short_sequences",
            "unknown_sequences",
            "sequences",
            "dropped_tokens",
            "text_tokens",
        )
    )
    if short or unknown:
        yield (
            f"{short + unknown:,} of {short + unknown + kept:,} sequences are dropped, with "
            f"{_percent(dropped / tokens)} of the tokens: {short:,} have fewer than "
            f"{settings.min_tokens} tokens (corpus.min_tokens), {unknown:,} are half unknown"
        )
    if not manifest.splits["heldout"]["sequences"]:
        yield _none_held_out(manifest.splits)
    train, heldout = (manifest.splits[name]["text_tokens"] for name in ("train", "heldout"))
    share = heldout / max(1, train + heldout)
    if asked and share > max(MUCH_HELD_OUT, 2 * asked):
        yield (
            f"{_percent(share)} of the text is held out, not {_percent(asked)}: documents are few "
            "or large, and each is in one split; set corpus.document to what ends one, or name "
            "corpus.heldout_sources"
        )


def _none_held_out(splits: Mapping[str, SplitEntry]) -> str:
    train, heldout = splits["train"]["documents"], splits["heldout"]["documents"]
    if heldout:
        found = f"the text held out, {_count(heldout, 'document')}, is too short for a sequence"
    else:
        found = f"no text is held out of {_count(train, 'document')}"
    remedy = "raise corpus.heldout_fraction"
    if train + heldout == 1:
        remedy = "set corpus.document to what ends one"
    return f"{found}; {remedy} or name corpus.heldout_sources to evaluate on this corpus"


def _unknown_fraction(splits: list[SplitEntry]) -> float:
    tokens = sum(split["text_tokens"] for split in splits)
    return sum(split["unknown_tokens"] for split in splits) / max(1, tokens)


def _in_place(unknown: float, lost: Lost) -> str:
    """What they stand for, where it is more than their number tells."""
    if lost.characters <= unknown:
        return ""
    return f" (in place of about {_percent(lost.characters)} of the characters)"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
