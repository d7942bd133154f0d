"""``distilcache inspect``: provenance, sizes, histograms and samples of a cache."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import require
from distilcache.pipeline.report.text import short_bytes, short_count, text_table

if TYPE_CHECKING:
    from distilcache.pipeline.look.figures import Column, Histogram
    from distilcache.pipeline.look.sample import Sample
    from distilcache.pipeline.look.teaching import Teaching
    from distilcache.pipeline.look.words import Words

BLOCKS_READ = 4
SIGNAL_SAMPLES = 48
"""Sequences whose signals the histograms are made of."""
POSITIONS_SHOWN = 3
"""Positions of a sample whose top tokens are shown."""
TOP = 5
BAR = 32
"""Characters of the longest bar."""
LEGEND = (
    "[token] was masked, [token|other] replaced by the other, [token|token] kept as it was.",
    "Below: what the teacher expects there. …token: the rest of a word.",
)
_EIGHTHS = " ▏▎▍▌▋▊▉"


def inspect_command(
    path: str, *, samples: int, temperature: float, seed: int
) -> tuple[dict[str, Any], str]:
    """Look into a cache.

    Args:
        path: Folder or URL of a finished cache.
        samples: Sequences shown as text.
        temperature: Of the teacher's distribution.
        seed: Of the choice of blocks and sequences.

    Returns:
        Values for JSON, and the text for people.
    """
    from distilcache.pipeline.look.figures import (
        Histogram,
        column_costs,
        read_lengths,
        signal_histograms,
    )
    from distilcache.pipeline.look.sample import choose_blocks, read_samples
    from distilcache.pipeline.look.teaching import Teaching
    from distilcache.pipeline.look.words import Words

    require(samples >= 0, f"inspect: --samples must be 0 or more, got {samples}")
    require(seed >= 0, f"inspect: --seed must be 0 or more, got {seed}")
    cache = Cache.open(path)
    teaching, words = Teaching(cache), Words(cache.tokenizer_dir)
    _check_temperature(teaching, temperature)
    blocks = choose_blocks(cache, BLOCKS_READ, seed)
    columns = column_costs(cache, blocks)
    drawn = list(read_samples(cache, max(SIGNAL_SAMPLES, samples), seed, BLOCKS_READ))
    histograms = [
        Histogram.of("sequence length", "tokens", read_lengths(cache, blocks)),
        *signal_histograms(cache, teaching, drawn, [temperature]),
    ]
    step = max(1, len(drawn) // max(samples, 1))
    shown = [describe_sample(teaching, words, s, temperature) for s in drawn[::step][:samples]]
    values = {
        "path": path,
        "provenance": cache.manifest.provenance,
        "fingerprint": cache.manifest.fingerprint,
        "encoding": cache.encoding.to_dict(),
        "totals": cache.manifest.totals,
        "rounds": cache.manifest.rounds,
        "columns": [{**asdict(column), "ratio": column.ratio} for column in columns],
        "histograms": [histogram.to_dict() for histogram in histograms],
        "temperature": temperature,
        "samples": shown,
    }
    return values, "\n".join(_text(path, cache, columns, histograms, shown))


def _check_temperature(teaching: "Teaching", temperature: float) -> None:
    """Refuse a temperature at which the distribution is not known."""
    require(temperature > 0, f"inspect: --temperature must be above 0, got {temperature:g}")
    known = ", ".join(f"{t:g}" for t in teaching.temperatures)
    require(
        teaching.replays or temperature in teaching.temperatures or not teaching.encoding.top_k,
        f"inspect: --temperature must be one that the cache holds ({known}), got {temperature:g}; "
        "others need the hidden states of the last layer (cache.hidden_dtype, cache.hidden_layers)",
    )


def describe_sample(
    teaching: "Teaching", words: "Words", sample: "Sample", temperature: float
) -> dict[str, Any]:
    """A sequence as text, and the teacher's top tokens at some of its masked positions."""
    from distilcache.pipeline.look.positions import choose_positions, describe, log_probs_of

    chosen = choose_positions(sample)
    chosen = chosen[np.isin(sample.positions[chosen], sample.masked)]
    labels = dict(zip(sample.masked.tolist(), sample.labels.tolist(), strict=True))
    described = []
    for entry in describe(teaching, [], sample, chosen, (temperature,)):
        known = log_probs_of(teaching, entry, 0, temperature)
        likely = sorted(known, key=lambda token: -known[token])[:TOP]
        place = entry["position"]
        described.append(
            {
                "position": place,
                "original": words.token_text(labels[place])[0],
                "seen": words.token_text(int(sample.input_ids[place]))[0],
                "top": [(words.shown_alone(token), math.exp(known[token])) for token in likely],
            }
        )
    return {
        "round": sample.round,
        "block": sample.block,
        "row": sample.row,
        "text": marked_text(words, sample),
        "positions": described,
    }


def marked_text(words: "Words", sample: "Sample") -> str:
    """The original text; masked tokens in square brackets, a replacement after a bar."""
    original = sample.original_ids.tolist()
    masked = set(sample.masked.tolist())
    parts = []
    for place, (text, glued) in enumerate(words.token_texts(original)):
        if words.is_special(original[place]) and place not in masked:
            continue
        if place in masked:
            seen = int(sample.input_ids[place])
            instead = "" if seen == words.mask_id else f"|{words.token_text(seen)[0]}"
            text = f"[{text}{instead}]"
        parts.append(text if glued else f" {text}")
    return "".join(parts).strip()


def facts_of(cache: Cache) -> list[tuple[str, str]]:
    """The most important figures."""
    totals, rounds = cache.manifest.totals, cache.manifest.rounds
    facts = [
        ("tokens", f"{totals['tokens']:,}"),
        ("sequences", f"{totals['sequences']:,}"),
        ("masked", f"{totals['masked']:,}"),
        ("rounds", f"{rounds}"),
        ("blocks", f"{totals['blocks']:,}"),
        ("shards", f"{totals['shards']:,}"),
        ("size", short_bytes(totals["bytes"])),
        ("bytes per token", f"{totals['bytes'] / max(totals['tokens'], 1):.1f}"),
    ]
    if cache.manifest.clipped_fraction:
        facts.append(("codes clipped", f"1 in {short_count(1 / cache.manifest.clipped_fraction)}"))
    return facts


def provenance_of(cache: Cache) -> list[tuple[str, str]]:
    """Provenance and contents of a cache, as names and values."""
    encoding, manifest = cache.encoding, cache.manifest
    identity, environment = manifest.provenance["identity"], manifest.provenance["environment"]
    masking = identity.get("masking") or {}
    packages = environment.get("packages") or {}
    teacher = "none (masks alone)" if encoding.mask_only else str(environment.get("teacher"))
    lines = [
        ("teacher", teacher),
        ("teacher commit", str(environment.get("teacher_commit") or "")[:12]),
        ("teacher weights", _short(identity.get("teacher_sha256"))),
        ("tokenizer", _short(identity.get("tokenizer_sha256"))),
        ("corpus", _short(identity.get("corpus_fingerprint"))),
        ("cache", _short(manifest.fingerprint)),
        ("masking", ", ".join(f"{name} {value}" for name, value in masking.items())),
        ("signals", ", ".join(_signals(cache))),
        ("computed in", f"{identity.get('dtype')} on {environment.get('device')}"),
        ("made with", ", ".join(f"{name} {v}" for name, v in packages.items() if v)),
        ("revision", str(environment.get("git_revision") or "")[:12]),
    ]
    return [(name, value) for name, value in lines if value and value not in ("None", "none")]


def _signals(cache: Cache) -> Iterator[str]:
    encoding = cache.encoding
    if encoding.mask_only:
        yield "masks alone"
    for hidden in encoding.hidden:
        yield (
            f"hidden states of layer {hidden.layer} ({hidden.dtype}, {hidden.width} wide, "
            f"{encoding.hidden_positions})"
        )
    if (relation := encoding.relation) is not None:
        yield f"relations of layer {relation.layer} ({relation.dtype}, {relation.width} wide, all)"
    if encoding.top_k:
        most = f", up to {encoding.top_p:g} of the mass" if encoding.top_p < 1 else ""
        yield (
            f"{encoding.top_k} logits ({encoding.logits_dtype}, {encoding.logit_positions}{most})"
        )
    if encoding.stores_logits:
        yield "temperatures " + " ".join(f"{t:g}" for t in (1.0, *encoding.temperatures))
    if encoding.tail_samples:
        yield f"{encoding.tail_samples} draws from the tail"
    if encoding.residual_samples:
        yield f"{encoding.residual_samples} residual draws"


def _short(value: object) -> str:
    return str(value)[:16]


def _text(
    path: str,
    cache: Cache,
    columns: Sequence["Column"],
    histograms: Sequence["Histogram"],
    samples: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    """The report as lines."""
    yield f"inspect: {path}"
    yield ""
    for name, value in provenance_of(cache):
        yield f"  {name:<16}  {value}"
    yield ""
    facts = facts_of(cache)
    width = max(len(value) for _, value in facts)
    for name, value in facts:
        yield f"  {name:<16}  {value:>{width}}"
    yield from _columns(cache, columns)
    for histogram in histograms:
        yield from _histogram(histogram)
    if samples:
        yield ""
        yield from (f"  {line}" for line in LEGEND)
    for sample in samples:
        yield from _sample(sample)


def _columns(cache: Cache, columns: Sequence["Column"]) -> Iterator[str]:
    tokens = max(cache.manifest.totals["tokens"], 1)
    rows = [
        [
            column.name,
            short_bytes(column.raw_bytes),
            short_bytes(column.stored_bytes),
            f"{column.ratio:.0%}",
            f"{column.stored_bytes / tokens:.2f}",
        ]
        for column in columns
    ]
    table = text_table(("column", "raw", "on disk", "of raw", "bytes per token"), rows)
    largest = max(column.stored_bytes for column in columns) or 1
    bars = ["", "", *(_bar(column.stored_bytes / largest) for column in columns)]
    yield ""
    for line, bar in zip(table.splitlines(), bars, strict=True):
        yield f"  {line} {bar}".rstrip()
    yield "  (a block is one compressed frame; its bytes are divided as its columns compress alone)"


def _histogram(histogram: "Histogram") -> Iterator[str]:
    yield ""
    unit = f" {histogram.unit}" if histogram.unit else ""
    note = f" ({histogram.note})" if histogram.note else ""
    yield (
        f"  {histogram.name}: mean {histogram.mean:.4g}{unit}, median {histogram.median:.4g}{note}"
    )
    largest = int(histogram.counts.max()) or 1
    for low, count in zip(histogram.edges, histogram.counts, strict=False):
        yield f"  {low:>10.4g}  {count:>7,} {_bar(count / largest)}".rstrip()


def _bar(fraction: float) -> str:
    """A bar of eighths of a character."""
    eighths = round(fraction * BAR * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _sample(sample: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"  round {sample['round']}, block {sample['block']}, sequence {sample['row']}"
    yield from textwrap.wrap(
        sample["text"], 96, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
    )
    for entry in sample["positions"][:POSITIONS_SHOWN]:
        top = "  ".join(f"{text} {100 * p:.1f}%" for text, p in entry["top"])
        yield f"      [{entry['original']}] at {entry['position']}: {top or 'no stored tokens'}"
