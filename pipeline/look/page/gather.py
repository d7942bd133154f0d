"""The data of the page, as plain values for JSON.

::

    words        [text]                          texts of tokens; a token below is an index of it
    inner        [word]                          those that are the rest of a word
    bias         {temperature: [per word]}       see ``distilcache.pipeline.look.positions``
    temperatures [T], start (index), held [T]    of the slider
    students     [{name, role, parameters}]
    sequences    [{at, words, glued, masked: [[position, label, kind]], positions: [...]}]
    columns, histograms, facts, provenance, training, models

Numbers are rounded to what shows in a probability.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from distilcache.data.cache.cache import Cache
from distilcache.data.progress import Bar
from distilcache.pipeline.look.figures import (
    Histogram,
    column_costs,
    read_lengths,
    signal_histograms,
)
from distilcache.pipeline.look.positions import choose_positions, describe, temperatures_of
from distilcache.pipeline.look.report import facts_of, provenance_of
from distilcache.pipeline.look.sample import Sample, choose_blocks, read_samples
from distilcache.pipeline.look.students import Student
from distilcache.pipeline.look.teaching import Teaching
from distilcache.pipeline.look.words import Words

LOGIT_DIGITS = 3
"""Decimals: a relative error of a probability below 0.1 %."""
BLOCKS_READ = 6


class WordList:
    """Gives numbers to the tokens that a page shows."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self.tokens: dict[int, int] = {}

    def number(self, token: int) -> int:
        """Number of a token in the page's list."""
        return self.tokens.setdefault(int(token), len(self.tokens))

    def inner(self) -> list[int]:
        """Numbers of the tokens that are the rest of a word; alone, a … leads them."""
        return [
            number
            for token, number in self.tokens.items()
            if self.words.shown_alone(token) != self.words.token_text(token)[0]
        ]

    def texts(self) -> list[str]:
        """The list itself."""
        return [self.words.token_text(token)[0] for token in self.tokens]


def gather(
    cache: Cache, students: Sequence[Student], *, sequences: int, seed: int, title: str
) -> dict[str, Any]:
    """Everything that the page shows, except training curves and reports."""
    teaching, words = Teaching(cache), WordList(Words(cache.tokenizer_dir))
    samples = list(read_samples(cache, sequences, seed, BLOCKS_READ))
    blocks = choose_blocks(cache, BLOCKS_READ, seed)
    temperatures = temperatures_of(teaching)
    shown = [
        _sequence(teaching, students, words, sample, temperatures)
        for sample in Bar(samples, desc="view", unit="sequence")
    ]
    return {
        "title": title,
        "facts": facts_of(cache),
        "provenance": provenance_of(cache),
        "signal": _signal(cache, teaching),
        "columns": [asdict(column) for column in column_costs(cache, blocks[:3])],
        "totals": {name: cache.manifest.totals[name] for name in ("bytes", "tokens")},
        "histograms": [
            histogram.to_dict()
            for histogram in (
                Histogram.of("sequence length", "tokens", read_lengths(cache, blocks)),
                *signal_histograms(cache, teaching, samples, teaching.temperatures[:2]),
            )
        ],
        "temperatures": temperatures,
        "start": temperatures.index(1.0),
        "held": teaching.temperatures,
        "students": [
            {"name": s.name, "role": s.role, "parameters": s.model.num_parameters()}
            for s in students
        ],
        "sequences": shown,
        "words": words.texts(),
        "inner": words.inner(),
        "bias": {
            str(number): [round(teaching.bias(t, token), 5) for token in words.tokens]
            for number, t in enumerate(temperatures)
            if teaching.bias_at(t) is not None
        },
    }


def _signal(cache: Cache, teaching: Teaching) -> str:
    if cache.encoding.mask_only:
        return "masks"
    if teaching.replays:
        return "replay"
    return "sparse" if cache.encoding.top_k else "draws"


def _sequence(
    teaching: Teaching,
    students: Sequence[Student],
    words: WordList,
    sample: Sample,
    temperatures: Sequence[float],
) -> dict[str, Any]:
    original, chosen = sample.original_ids, choose_positions(sample)
    glued = "".join(str(int(g)) for _, g in words.words.token_texts(original))
    masked = [
        [int(place), words.number(label), _kind(words, int(sample.input_ids[place]), int(label))]
        for place, label in zip(sample.masked, sample.labels, strict=True)
    ]
    return {
        "at": [sample.round, sample.block, sample.row],
        "words": [words.number(token) for token in original],
        "seen": [words.number(sample.input_ids[place]) for place in sample.masked],
        "special": [n for n, t in enumerate(original) if words.words.is_special(int(t))],
        "glued": glued,
        "masked": masked,
        "positions": [
            _position(words, entry)
            for entry in describe(teaching, students, sample, chosen, temperatures)
        ],
    }


def _kind(words: WordList, seen: int, label: int) -> str:
    """What masking did: ``mask``, ``kept`` or ``random``."""
    if seen == words.words.mask_id:
        return "mask"
    return "kept" if seen == label else "random"


def _position(words: WordList, entry: dict[str, Any]) -> dict[str, Any]:
    """One entry of ``describe``, rounded."""
    return {
        "position": entry["position"],
        "tokens": [words.number(token) for token in entry["tokens"]],
        "stored": entry["stored"],
        "logits": _rounded(entry["logits"], LOGIT_DIGITS),
        "stored_norm": _rounded(entry["stored_norm"], LOGIT_DIGITS + 1),
        "rest_norm": _rounded(entry["rest_norm"], LOGIT_DIGITS + 1),
        "entropy": _rounded(entry["entropy"], LOGIT_DIGITS),
        "topk_mass": _rounded(entry["topk_mass"], LOGIT_DIGITS + 1),
        "students": [
            {
                "logits": _rounded(student["logits"], LOGIT_DIGITS),
                "norm": _rounded(student["norm"], LOGIT_DIGITS + 1),
                "kl": _rounded(student["kl"], LOGIT_DIGITS + 1),
                "cosine": None if student["cosine"] is None else round(student["cosine"], 4),
            }
            for student in entry["students"]
        ],
    }


def _rounded(values: Sequence[float | None], digits: int) -> list[float | None]:
    """Rounded; None for infinite or missing values, which JSON has not."""
    return [
        round(value, digits) if value is not None and np.isfinite(value) else None
        for value in values
    ]
