"""Which columns a block has, and whether a block has them.

A checksum says that bytes are those that were written; the checks here say that they make sense.
They refuse a hostile or wrongly written block before its numbers are used as indices.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from distilcache.data.cache.schema import Encoding
from distilcache.data.codecs.relation_spec import ROLES
from distilcache.data.errors import UserError
from distilcache.data.masks.positions import extra_fraction

Columns = Mapping[str, np.ndarray]


def check_columns(columns: Columns, encoding: Encoding) -> None:
    """Compare a decoded block with its encoding.

    Raises:
        UserError: Names the first column that does not fit, what was found and expected.
    """
    layout = column_layout(encoding)
    for name, column in layout.items():
        if name not in columns:
            raise UserError(f"cache: a block must have the column {name!r}, got none")
        if columns[name].dtype != column.dtype:
            raise UserError(
                f"cache: column {name} must be {column.dtype}, got {columns[name].dtype}"
            )
    for name, found, wanted in _mismatches(columns, encoding, layout):
        raise UserError(f"cache: column {name} must hold {wanted}, got {found}")


def check_encoding(encoding: Encoding) -> None:
    """Check every field of an encoding that was read from a file.

    Raises:
        ValueError: Or TypeError: names the field.
        UserError: A position policy is none of the three.
    """
    counts = {
        name: (getattr(encoding, name), largest)
        for name, largest in {
            "vocab_size": 1 << 32, "max_length": (1 << 16) - 1, "pad_id": 1 << 32,
            "top_k": 1 << 32, "tail_samples": 1 << 16, "residual_samples": 1 << 16,
            "num_layers": 1 << 16,
        }.items()
    }  # fmt: skip
    for number, stored in enumerate(encoding.states):
        limits = {"layer": 1 << 16, "width": 1 << 20, "planes": 1 << 21}
        counts |= {f"{n} of hidden {number}": (getattr(stored, n), limits[n]) for n in limits}
        if stored.dtype not in ("coded", "float16", "float32"):
            raise ValueError(f"hidden has dtype {str(stored.dtype)[:20]!r}")
        if not isinstance(stored.codec_sha256, str):
            raise TypeError("codec_sha256 is no text")
    for name, (value, most) in counts.items():
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{name} must be 0 to {most}")
    if encoding.relation is not None and not (
        isinstance(encoding.relation.tensors, dict)
        and all(isinstance(x, str) for pair in encoding.relation.tensors.items() for x in pair)
        and encoding.relation.tensors.keys() <= set(ROLES)
    ):
        raise ValueError("relation must name tensors by role")
    if type(encoding.mask_only) is not bool:
        raise TypeError("mask_only must be true or false")
    if encoding.logits_dtype not in ("float16", "float32", "uint8"):
        raise ValueError(f"logits_dtype is {str(encoding.logits_dtype)[:20]!r}")
    numbers = (encoding.top_p, *encoding.temperatures)
    if not all(isinstance(x, int | float) and 0 < x < float("inf") for x in numbers):
        raise ValueError("top_p and temperatures must be above 0 and finite")
    for policy in (encoding.hidden_positions, encoding.logit_positions):
        extra_fraction(str(policy))


def check_sizes(columns: Columns, sequences: int, tokens: int, masked: int) -> None:
    """Compare a block with its row of the index, on which readers rely before they decode.

    Raises:
        UserError: Names the column, what was found and expected.
    """
    sizes = {"lengths": sequences, "input_ids": tokens, "labels": masked}
    for name, found, wanted in _sized(columns, sizes):
        raise UserError(f"cache: column {name} must hold {wanted} (index), got {found}")


def largest_block(encoding: Encoding, sequences: int, tokens: int, masked: int) -> int:
    """Most bytes that a block of these sizes may take before compression.

    Alignment, schema and metadata of an Arrow stream included.
    """
    counts = {"sequences": sequences, "tokens": tokens, "masked": masked}
    for signal, policy in _policies(encoding).items():
        counts[signal] = masked if policy == "masked" else tokens
    return _SLACK + sum(
        _SLACK_PER_COLUMN + counts[column.per] * column.each * np.dtype(column.dtype).itemsize
        for column in column_layout(encoding).values()
    )


_SLACK = 1 << 20
"""Bytes for the metadata of a block; ours take a few thousand."""
_SLACK_PER_COLUMN = 1 << 12
"""Bytes for a field of the schema, its offsets and alignment."""


@dataclass(frozen=True, slots=True)
class Column:
    """Type and length of one column of a block."""

    dtype: str
    per: str
    """What it has values for: ``sequences``, ``tokens``, ``masked``, ``logit`` or ``hidden``
    positions."""
    each: int = 1
    """Values for each of these (``logit_ids`` and ``logit_values`` with ``top_p``: at most)."""


def _policies(encoding: Encoding) -> dict[str, str]:
    """Position policy of each kind of signal that blocks hold."""
    policies: dict[str, str] = {}
    if encoding.mask_only:
        return policies
    if encoding.stores_logits:
        policies["logit"] = encoding.logit_positions
    if encoding.hidden:
        policies["hidden"] = encoding.hidden_positions
    return policies


def column_layout(encoding: Encoding) -> dict[str, Column]:
    """The columns of a block (``distilcache.data.cache.schema`` says what they mean)."""
    token = encoding.token_dtype.name
    layout = {
        "lengths": Column("uint16", "sequences"),
        "input_ids": Column(token, "tokens"),
        "masked_counts": Column("uint16", "sequences"),
        "masked_positions": Column("uint16", "masked"),
        "labels": Column(token, "masked"),
    }
    if encoding.mask_only:
        return layout
    for signal, policy in _policies(encoding).items():
        if 0 < extra_fraction(policy) < 1:
            layout[f"{signal}_position_counts"] = Column("uint16", "sequences")
            layout[f"{signal}_positions"] = Column("uint16", signal)
    if encoding.stores_logits:
        temperatures = 1 + len(encoding.temperatures)
        odds_dtype = "float32" if encoding.logits_dtype == "float32" else "float16"
        layout["log_odds"] = Column(odds_dtype, "logit", temperatures)
        if encoding.top_p < 1:
            layout["logit_lengths"] = Column("uint16", "logit")
    if encoding.top_k:
        layout["logit_ids"] = Column(token, "logit", encoding.top_k)
        layout["logit_values"] = Column(encoding.logits_dtype, "logit", encoding.top_k)
        if encoding.logits_dtype == "uint8":
            layout["logit_base"] = layout["logit_scale"] = Column("float16", "logit")
    if encoding.tail_samples:
        layout["tail_ids"] = Column(token, "logit", encoding.tail_samples)
    if encoding.residual_samples:
        layout["residual_ids"] = Column(token, "logit", encoding.residual_samples)
        layout["residual_mass"] = Column("float16", "logit")
    for stored in encoding.states:
        coded = stored.dtype == "coded"
        each = stored.planes if coded else stored.width
        per = "tokens" if stored is encoding.relation else "hidden"
        layout[stored.column] = Column("uint8" if coded else stored.dtype, per, each)
    return layout


ID_COLUMNS = ("input_ids", "labels", "logit_ids", "tail_ids", "residual_ids")


def _mismatches(
    columns: Columns, encoding: Encoding, layout: Mapping[str, Column]
) -> Iterator[tuple[str, str, str]]:
    """What does not fit: column, found, expected. Later checks rely on earlier ones."""
    lengths = columns["lengths"]
    if not len(lengths) or not int(lengths.min()):
        yield "lengths", "none" if not len(lengths) else "0", "a length of 1 or more per sequence"
    if int(lengths.max()) > encoding.max_length:
        yield "lengths", str(int(lengths.max())), f"at most max_length {encoding.max_length}"
    counts = {
        "sequences": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "masked": int(columns["masked_counts"].sum(dtype=np.int64)),
    }
    drawn = []
    for signal, policy in _policies(encoding).items():
        if f"{signal}_positions" in layout:
            drawn.append((f"{signal}_position_counts", f"{signal}_positions"))
            counts[signal] = len(columns[f"{signal}_positions"])
        else:
            counts[signal] = counts["masked" if policy == "masked" else "tokens"]
    sizes = {name: counts[column.per] * column.each for name, column in layout.items()}
    if "logit_lengths" in layout:
        kept = columns["logit_lengths"]
        if len(kept) and not 1 <= int(kept.min()) <= int(kept.max()) <= encoding.top_k:
            yield "logit_lengths", f"{kept.min()} to {kept.max()}", f"1 to {encoding.top_k}"
        sizes["logit_ids"] = sizes["logit_values"] = int(kept.sum(dtype=np.int64))
    yield from _sized(columns, sizes)
    for name in (n for n in ID_COLUMNS if n in layout):
        largest = int(columns[name].max(initial=0))
        if largest >= encoding.vocab_size:
            yield name, str(largest), f"token ids below {encoding.vocab_size}"
    yield from _placed(columns, MASKED, lengths)
    for names in drawn:
        yield from _placed(columns, names, lengths)
        # Readers look up weights and rows of the masked positions among them.
        own, masked = (_keys(columns, n, lengths) for n in (names, MASKED))
        if not np.isin(masked, own, assume_unique=True).all():
            yield names[1], "some of them missing", "all masked positions"


MASKED = ("masked_counts", "masked_positions")


def _keys(columns: Columns, names: tuple[str, str], lengths: np.ndarray) -> np.ndarray:
    """One ascending number per position of the block."""
    sequence = np.repeat(np.arange(len(lengths)), columns[names[0]])
    keys: np.ndarray = sequence * (1 << 16) + columns[names[1]]
    return keys


def _placed(
    columns: Columns, names: tuple[str, str], lengths: np.ndarray
) -> Iterator[tuple[str, str, str]]:
    """Counts per sequence must sum to the positions, which ascend within their sequences."""
    counts, positions = names
    yield from _sized(columns, {positions: int(columns[counts].sum(dtype=np.int64))})
    if not (columns[positions] < np.repeat(lengths, columns[counts])).all():
        yield positions, "one beyond its sequence", "positions within their sequences"
    if not (np.diff(_keys(columns, names, lengths)) > 0).all():
        yield positions, "another order", "ascending positions"


def _sized(columns: Columns, sizes: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    for name, wanted in sizes.items():
        if len(columns[name]) != wanted:
            yield name, f"{len(columns[name])}", f"{wanted} values"
