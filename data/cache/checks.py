"""Do the columns of a block fit each other and their encoding? Checked before anyone indexes.

A checksum says that the bytes are those that were written; this says that they mean something.
A hostile or wrongly written block is refused here, instead of reading past a buffer or stopping
a device on an index out of range.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from distilcache.data.cache.schema import Encoding
from distilcache.data.errors import UserError
from distilcache.data.masks.positions import extra_share

Columns = Mapping[str, np.ndarray]


def check_columns(columns: Columns, encoding: Encoding) -> None:
    """Hold a decoded block against its encoding.

    Raises:
        UserError: Names the first column that does not fit, what was found and expected.
    """
    for name, dtype in column_types(encoding).items():
        if name not in columns:
            raise UserError(f"cache: a block must have the column {name!r}, got none")
        if columns[name].dtype != dtype:
            raise UserError(f"cache: column {name} must be {dtype}, got {columns[name].dtype}")
    for name, found, wanted in _mismatches(columns, encoding):
        raise UserError(f"cache: column {name} must hold {wanted}, got {found}")


def check_encoding(encoding: Encoding) -> None:
    """Hold an encoding from a file against what an encoding may be.

    Raises:
        ValueError: Or TypeError: names the field.
        UserError: A position policy is none.
    """
    counts = {
        name: (getattr(encoding, name), largest)
        for name, largest in {
            "vocab_size": 1 << 32, "max_length": (1 << 16) - 1, "pad_id": 1 << 32,
            "top_k": 1 << 32, "tail_samples": 1 << 16, "residual_samples": 1 << 16,
            "num_layers": 1 << 16,
        }.items()
    }  # fmt: skip
    for number, held in enumerate(encoding.hidden):
        limits = {"layer": 1 << 16, "width": 1 << 20, "planes": 1 << 21}
        counts |= {f"{n} of hidden {number}": (getattr(held, n), limits[n]) for n in limits}
        if held.dtype not in ("coded", "float16", "float32"):
            raise ValueError(f"hidden has dtype {str(held.dtype)[:20]!r}")
        if not isinstance(held.codec_sha256, str):
            raise TypeError("codec_sha256 is no text")
    for name, (value, most) in counts.items():
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{name} must be 0 to {most}")
    if type(encoding.mask_only) is not bool:
        raise TypeError("mask_only must be true or false")
    if encoding.logits_dtype not in ("float16", "float32", "uint8"):
        raise ValueError(f"logits_dtype is {str(encoding.logits_dtype)[:20]!r}")
    numbers = (encoding.top_p, *encoding.temperatures)
    if not all(isinstance(x, int | float) and 0 < x < float("inf") for x in numbers):
        raise ValueError("top_p and temperatures must be above 0 and finite")
    for policy in (encoding.hidden_positions, encoding.logit_positions):
        extra_share(str(policy))


def check_sizes(columns: Columns, sequences: int, tokens: int, masked: int) -> None:
    """Hold a block against its row of the index: readers count on it before they decode.

    Raises:
        UserError: Names the column, what was found and expected.
    """
    sizes = {"lengths": sequences, "input_ids": tokens, "labels": masked}
    for name, found, wanted in _sized(columns, sizes):
        raise UserError(f"cache: column {name} must hold {wanted} (index), got {found}")


def largest_block(encoding: Encoding, sequences: int, tokens: int, masked: int) -> int:
    """Bytes that a block of these sizes may take before compression: frames that say more lie.

    Alignment, schema and metadata of an Arrow stream included.
    """
    sizes = {"masked": masked, "all": tokens}
    logits = sizes.get(encoding.logit_positions, tokens)
    per_logit = {
        "logit_ids": encoding.top_k,
        "logit_values": encoding.top_k,
        "log_odds": 1 + len(encoding.temperatures),
        "tail_ids": encoding.tail_samples,
        "residual_ids": encoding.residual_samples,
    }
    hidden = sizes.get(encoding.hidden_positions, tokens)
    per_hidden = {h.column: h.planes or h.width for h in encoding.hidden}
    total = _SLACK
    for name, dtype in column_types(encoding).items():
        if name in per_hidden:
            count = hidden * per_hidden[name]
        else:
            count = logits * per_logit[name] if name in per_logit else max(sequences, tokens)
        total += _SLACK_PER_COLUMN + count * np.dtype(dtype).itemsize
    return total


_SLACK = 1 << 20
"""Metadata of a block in bytes; ours take a few thousand."""
_SLACK_PER_COLUMN = 1 << 12
"""A field of the schema, its offsets and alignment."""


def column_types(encoding: Encoding) -> dict[str, str]:
    """Columns of a block, and the type of each."""
    token = encoding.token_dtype.name
    types = {"lengths": "uint16", "input_ids": token, "labels": token}
    types |= {"masked_counts": "uint16", "masked_positions": "uint16"}
    if encoding.mask_only:
        return types
    for signal, policy, used in (
        ("logit", encoding.logit_positions, encoding.stores_logits),
        ("hidden", encoding.hidden_positions, bool(encoding.hidden)),
    ):
        if used and 0 < extra_share(policy) < 1:
            types |= {f"{signal}_position_counts": "uint16", f"{signal}_positions": "uint16"}
    if encoding.top_k:
        types |= {"logit_ids": token, "logit_values": encoding.logits_dtype}
        if encoding.logits_dtype == "uint8":
            types |= {"logit_base": "float16", "logit_scale": "float16"}
    if encoding.stores_logits:
        if encoding.top_p < 1:
            types["logit_lengths"] = "uint16"
        types["log_odds"] = "float32" if encoding.logits_dtype == "float32" else "float16"
    if encoding.tail_samples:
        types["tail_ids"] = token
    if encoding.residual_samples:
        types |= {"residual_ids": token, "residual_mass": "float16"}
    raw = {h.column: "uint8" if h.dtype == "coded" else h.dtype for h in encoding.hidden}
    return types | raw


def _mismatches(columns: Columns, encoding: Encoding) -> Iterator[tuple[str, str, str]]:
    lengths = columns["lengths"]
    if not len(lengths) or not int(lengths.min()):
        yield "lengths", "none" if not len(lengths) else "0", "a length of 1 or more per sequence"
    tokens = int(lengths.sum(dtype=np.int64))
    masked = int(columns["masked_counts"].sum(dtype=np.int64))
    if int(lengths.max()) > encoding.max_length:
        yield "lengths", str(int(lengths.max())), f"at most max_length {encoding.max_length}"
    yield from _sized(columns, {"input_ids": tokens, "labels": masked})
    yield from _in_vocabulary(columns, ("input_ids", "labels"), encoding.vocab_size)
    yield from _placed(columns, "masked_counts", "masked_positions", lengths)
    if encoding.mask_only:
        return
    sizes = {"masked": masked, "all": tokens}
    logits = hidden = 0
    if encoding.stores_logits:
        yield from _policy(columns, "logit", encoding.logit_positions, lengths)
        logits = _count(columns, "logit", encoding.logit_positions, sizes)
        yield from _logits(columns, logits, encoding)
    if encoding.hidden:
        yield from _policy(columns, "hidden", encoding.hidden_positions, lengths)
        hidden = _count(columns, "hidden", encoding.hidden_positions, sizes)
    for stored in encoding.hidden:
        per_position = stored.planes if stored.dtype == "coded" else stored.width
        yield from _sized(columns, {stored.column: per_position * hidden})


def _logits(columns: Columns, count: int, encoding: Encoding) -> Iterator[tuple[str, str, str]]:
    stored = count * encoding.top_k
    if encoding.top_p < 1:
        kept = columns["logit_lengths"]
        yield from _sized(columns, {"logit_lengths": count})
        if len(kept) and not 1 <= int(kept.min()) <= int(kept.max()) <= encoding.top_k:
            yield "logit_lengths", f"{kept.min()} to {kept.max()}", f"1 to {encoding.top_k}"
        stored = int(kept.sum(dtype=np.int64))
    if encoding.top_k:
        yield from _sized(columns, {"logit_ids": stored, "logit_values": stored})
        yield from _in_vocabulary(columns, ("logit_ids",), encoding.vocab_size)
    if encoding.top_k and encoding.logits_dtype == "uint8":
        yield from _sized(columns, {"logit_base": count, "logit_scale": count})
    yield from _sized(columns, {"log_odds": count * (1 + len(encoding.temperatures))})
    for name, draws in (
        ("tail_ids", encoding.tail_samples),
        ("residual_ids", encoding.residual_samples),
    ):
        if draws:
            yield from _sized(columns, {name: count * draws})
            yield from _in_vocabulary(columns, (name,), encoding.vocab_size)
    if encoding.residual_samples:
        yield from _sized(columns, {"residual_mass": count})


def _policy(
    columns: Columns, signal: str, policy: str, lengths: np.ndarray
) -> Iterator[tuple[str, str, str]]:
    if 0 < extra_share(policy) < 1:
        names = f"{signal}_position_counts", f"{signal}_positions"
        yield from _placed(columns, *names, lengths)
        # Masked positions are among them: weights and rows are looked up by that.
        own, masked = (_keys(columns, *n, lengths) for n in (names, MASKED))
        if not np.isin(masked, own, assume_unique=True).all():
            yield names[1], "some of them missing", "all masked positions"


MASKED = ("masked_counts", "masked_positions")


def _keys(columns: Columns, counts: str, positions: str, lengths: np.ndarray) -> np.ndarray:
    """One ascending number per position of the block."""
    sequence = np.repeat(np.arange(len(lengths)), columns[counts])
    keys: np.ndarray = sequence * (1 << 16) + columns[positions]
    return keys


def _count(columns: Columns, signal: str, policy: str, sizes: Mapping[str, int]) -> int:
    known = sizes.get(policy)
    return len(columns[f"{signal}_positions"]) if known is None else known


def _placed(
    columns: Columns, counts: str, positions: str, lengths: np.ndarray
) -> Iterator[tuple[str, str, str]]:
    """Counts per sequence, and ascending positions within their sequences."""
    yield from _sized(columns, {counts: len(lengths)})
    yield from _sized(columns, {positions: int(columns[counts].sum(dtype=np.int64))})
    if not (columns[positions] < np.repeat(lengths, columns[counts])).all():
        yield positions, "one beyond its sequence", "positions within their sequences"
    if not (np.diff(_keys(columns, counts, positions, lengths)) > 0).all():
        yield positions, "another order", "ascending positions"


def _sized(columns: Columns, sizes: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    for name, wanted in sizes.items():
        if len(columns[name]) != wanted:
            yield name, f"{len(columns[name])}", f"{wanted} values"


def _in_vocabulary(
    columns: Columns, names: tuple[str, ...], vocab_size: int
) -> Iterator[tuple[str, str, str]]:
    for name in names:
        ids = columns[name]
        if len(ids) and int(ids.max()) >= vocab_size:
            yield name, str(int(ids.max())), f"token ids below {vocab_size}"
