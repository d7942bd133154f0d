"""Bytes of a cache by column: from the format's arithmetic, or from an existing cache.

The size of a column before compression follows from the format (docs/format.md). What compression
leaves of it was measured on a default cache of Wikipedia (docs/benchmarks.md), except for the codes
of hidden states: they depend on what the teacher has learnt. Without a measurement they are known
for a well-trained teacher of width 384, and as a range for other widths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.checks import Column, column_layout
from distilcache.data.cache.frames import encode_block
from distilcache.data.cache.schema import Encoding
from distilcache.data.errors import require
from distilcache.data.masks.positions import extra_fraction
from distilcache.pipeline.plan.code_bytes import Range, code_bytes, relation_bytes
from distilcache.pipeline.plan.corpus_size import Text
from distilcache.pipeline.plan.shapes import Shape
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.teacher_cache.layout import encoding_of

UNMASKED = 1.19
"""Bytes of codes at a position that is not masked, over those at a masked one (docs/benchmarks.md,
the plan)."""
KEPT = {
    "lengths": 0.025,
    "input_ids": 0.739,
    "masked_counts": 0.025,
    "masked_positions": 0.509,
    "labels": 0.827,
    "logit_position_counts": 0.418,
    "logit_positions": 0.444,
    "hidden_position_counts": 0.418,
    "hidden_positions": 0.444,
    "logit_lengths": 0.5,
    "logit_ids": 0.77,
    "logit_values uint8": 0.9,
    "logit_values float16": 0.772,
    "logit_values float32": 0.92,
    "logit_base": 0.9,
    "logit_scale": 0.9,
    "log_odds": 0.898,
    "tail_ids": 0.94,
    "residual_ids": 0.94,
    "residual_mass": 0.9,
    "hidden float16": 0.92,
    "hidden float32": 0.92,
}
"""Fraction of a column that compression leaves (of ids: of 2 bytes), by name, by type where that
matters. Measured, but for ``logit_lengths``, those of uint8 logits, ``residual_mass`` and float32,
which matter little or are near noise."""
WIDE_IDS = 0.75
"""Compressed size of 4-byte ids per byte, relative to 2-byte ones: the third byte varies little,
the fourth never."""
SIZELESS = {
    "blocks_per_shard",
    "calibration_sequences",
    "rounds",
    "batch_tokens",
    "row_chunk",
    "seed",
}
"""Settings of a cache that do not change its bytes per token."""
TOKENIZER_BYTES = 24.0
"""Bytes of ``tokenizer.json`` per token of the vocabulary (BERT's)."""
TAR_END = 5632
"""Two empty records, and half of the 10,240 bytes that an archive is filled up to."""
BLOCK_REST = 5000
"""Bytes of a block without its columns: provenance, Arrow's frame, a tar header with padding, and
the tables of the columns that are no codes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Bytes of a cache, per token of text and round."""

    columns: Mapping[str, Range]
    """On disk, low and high; ``(rest)``: headers and metadata."""
    masked: float
    """Masked positions per token."""
    positions: float
    """Positions with signals per token."""
    logits: float
    """Positions with logits per token."""
    teacher: float
    """Bytes of the teacher's copy in the cache, once."""
    source: str
    """Where the figures come from, for people."""

    @property
    def per_token(self) -> Range:
        """All columns."""
        low, high = (sum(pair[i] for pair in self.columns.values()) for i in (0, 1))
        return low, high


def formula_size(recipe: Recipe, teacher: Shape, text: Text) -> Size:
    """From the settings and the text alone."""
    config = recipe.cache
    masked = text.masked or masked_fraction(recipe.masking.probability, text.length)
    encoding = encoding_in(recipe, teacher)
    counts = {
        "sequences": 1 / text.length,
        "tokens": 1.0,
        "masked": masked,
        "logit": _positions(encoding.logit_positions, masked),
        "hidden": _positions(encoding.hidden_positions, masked),
    }
    block = min(recipe.corpus.block_sequences, text.sequences) * text.length  # tokens
    columns: dict[str, float | Range] = {}
    for name, column in column_layout(encoding).items():
        most = _kept_bytes(name, column) * column.each * counts[column.per]
        fewer = encoding.top_p < 1 and name in ("logit_ids", "logit_values")
        columns[name] = (most / column.each, most) if fewer else most
    for stored in encoding.hidden:
        if stored.dtype == "coded":
            last = stored.layer == teacher.layers
            low, high = code_bytes(
                teacher.width, config.hidden_quality, block * counts["hidden"], last=last
            )
            others = UNMASKED if last else 1.0
            worth = masked + others * (counts["hidden"] - masked)  # in masked positions
            columns[stored.column] = low * worth, high * worth
    if encoding.relation is not None and encoding.relation.dtype == "coded":
        quality = config.relation_quality
        columns[encoding.relation.column] = relation_bytes(teacher.width, quality, block)
    columns["(rest)"] = BLOCK_REST / block
    ranges = {
        n: value if isinstance(value, tuple) else (value, value) for n, value in columns.items()
    }
    return Size(
        columns=ranges,
        masked=masked,
        positions=0.0 if config.mask_only else counts["hidden" if encoding.hidden else "logit"],
        logits=counts["logit"] if encoding.stores_logits else 0.0,
        teacher=0.0 if config.mask_only else copy_bytes(encoding, teacher),
        source="formula; the codes of hidden states are those of a well-trained teacher of width "
        "384, scaled; --measure N runs the teacher",
    )


def copy_bytes(encoding: Encoding, teacher: Shape) -> float:
    """Bytes of the teacher's copy: weights and codecs in float32, and the tokenizer."""
    numbers, square = teacher.parameters, teacher.width**2
    for stored in encoding.hidden:
        if stored.dtype == "coded":
            biases = max(1, len(encoding.temperatures)) if stored.layer == teacher.layers else 0
            numbers += 2 * square + biases * teacher.vocabulary
    if encoding.relation is not None and encoding.relation.dtype == "coded":
        numbers += 3 * square  # the prediction from the tokens, too
    return 4.0 * numbers + TOKENIZER_BYTES * teacher.vocabulary


def encoding_in(recipe: Recipe, teacher: Shape) -> Encoding:
    """What the cache of a recipe would hold."""
    return encoding_of(
        recipe.cache,
        vocab_size=teacher.vocabulary,
        max_length=recipe.corpus.max_length,
        pad_id=0,
        width=teacher.width,
        num_layers=teacher.layers,
    )


def masked_fraction(probability: float, length: float) -> float:
    """Masked positions per token: max(1, round(p n)) of the n tokens that are not special."""
    # Halves go up, as in masking: of 30 tokens 15 % are 5.
    return max(1.0, float(np.floor(probability * (length - 2) + 0.5))) / length


def _positions(policy: str, masked: float) -> float:
    return masked + extra_fraction(policy) * (1 - masked)


def _kept_bytes(name: str, column: Column) -> float:
    """Bytes that compression leaves of one value; of codes see ``code_bytes``."""
    if column.dtype == "uint32":
        return 4 * WIDE_IDS * KEPT[name]
    states = column.per == "hidden" or name.startswith("relation_")
    typed = f"{'hidden' if states else name} {column.dtype}"
    return np.dtype(column.dtype).itemsize * KEPT.get(typed, KEPT.get(name, 0.0))


def like_size(recipe: Recipe, path: str, teacher: Shape) -> Size:
    """From a finished cache of the same settings.

    Raises:
        UserError: There is none, or what it stores is something else.
    """
    cache = Cache.open(path)
    cache.teacher.check()
    identity = cache.manifest.provenance["identity"]
    there = {**identity.get("cache", {}), **identity.get("masking", {})}
    here: dict[str, Any] = {**asdict(recipe.cache), **asdict(recipe.masking)}
    here["logit_positions"] = recipe.cache.logit_positions or recipe.cache.positions
    last = cache.encoding.hidden_layer()
    if last is not None:
        there["width of the teacher"], here["width of the teacher"] = last.width, teacher.width
    names = [n for n in there if n in here and n not in SIZELESS and _plain(here[n]) != there[n]]
    other = "; ".join(f"{n} {there[n]!r} there and {here[n]!r} here" for n in names)
    require(
        not other, f"plan: --like must be a cache of the recipe's settings, got {path} with {other}"
    )
    return cache_size(cache, f"as in {path}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def cache_size(cache: Cache, source: str, most: int = 8, stored: float = 0.0) -> Size:
    """Size of an existing cache: the total from its manifest, columns from some of its blocks.

    Args:
        cache: Finished.
        source: Where the figures come from, for people.
        most: Blocks that are read.
        stored: Total bytes, in place of the manifest's; 0: the manifest's.
    """
    totals, encoding = cache.manifest.totals, cache.encoding
    masked = totals["masked"] / totals["tokens"]
    count = min(most, cache.num_blocks)
    chosen = sorted({i * cache.num_blocks // count for i in range(count)})
    sums: dict[str, float] = {}
    tokens = frames = 0
    for block in chosen:
        entry = cache.entry(block)
        for name, size in column_bytes(cache.read_block(block), encoding).items():
            sums[name] = sums.get(name, 0.0) + size
        tokens += entry.tokens
        frames += entry.size
    # Blocks that were not read, and columns that shared their tables with a neighbour.
    others = float(cache.index["size"].sum()) / totals["tokens"] / (frames / tokens)
    scale = min(1.0, frames / sum(sums.values())) * others
    columns = {name: scale * size / tokens for name, size in sums.items()}
    total = (stored or totals["bytes"]) / totals["tokens"]
    columns["(rest)"] = max(0.0, total - sum(columns.values()))
    return Size(
        columns={name: (value, value) for name, value in columns.items()},
        masked=masked,
        positions=totals["positions"] / totals["tokens"],
        logits=_positions(encoding.logit_positions, masked) if encoding.stores_logits else 0.0,
        teacher=sum((cache.teacher_dir / n).stat().st_size for n in cache.manifest.teacher_files),
        source=source,
    )


def tar_bytes(frames: Sequence[int], blocks_per_shard: int) -> float:
    """Bytes of blocks in full shards: a header each, whole records, and the end of the archive."""
    records = sum(512 + -(-size // 512) * 512 for size in frames)
    return records + len(frames) / blocks_per_shard * TAR_END


def column_bytes(columns: Mapping[str, np.ndarray[Any, Any]], encoding: Encoding) -> dict[str, int]:
    """Bytes of each column of a block when compressed alone, cut as the writer does."""
    planes = {h.column: h.planes for h in encoding.states if h.dtype == "coded"}
    found = {}
    for name, values in columns.items():
        cut = {name: len(values) // planes[name]} if planes.get(name) else None
        empty = len(encode_block({name: values[:0]}, {}))
        found[name] = max(0, len(encode_block({name: values}, {}, cut)) - empty)
    return found
