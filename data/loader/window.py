"""Windows: the sequences of several blocks, decoded and shuffled as flat columns.

Columns are grouped by their positions. The sets of positions are ``token`` (all), ``masked``, and
if the policies of the cache are others, ``hidden`` (of hidden states) and ``ce`` (of L_ce). Two
signals at the same positions share one set.

Shapes: ``B`` sequences, ``N`` positions of a set, ``K`` stored logits, ``R`` draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distilcache.data.cache.schema import Encoding, HiddenEncoding
from distilcache.data.codecs.logits import unpack
from distilcache.data.masks.positions import flat_rows, weights_of

TILE = 64
"""Planes that are transposed at a time: a cache line (half the time of all at once)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which columns of a block are read."""

    encoding: Encoding
    signal: str | None
    """``replay``, ``replay+topk``, ``replay+residual``, ``sparse``; None: no L_ce."""
    layers: tuple[int, ...]
    """Layers whose hidden states are read."""
    restrict_ce_to_mask: bool
    relation: bool = False
    """Whether the states that relations are replayed from are read."""

    @property
    def ce_policy(self) -> str | None:
        """Position policy of L_ce; None: there is no L_ce, or nothing is read for it."""
        if self.signal is None or not (self.layers or self.encoding.stores_logits):
            return None
        if self.restrict_ce_to_mask:
            return "masked"
        from_logits = self.signal == "sparse" or not self.layers
        return self.encoding.logit_positions if from_logits else self.encoding.hidden_positions

    @property
    def hidden_policy(self) -> str | None:
        """Position policy of hidden states; None: none are read."""
        return self.encoding.hidden_positions if self.layers else None

    @property
    def ce_set(self) -> str | None:
        """Name of the set of positions of L_ce."""
        if self.ce_policy == self.hidden_policy:
            return self.hidden_set
        return _set_name(self.ce_policy, "ce")

    @property
    def hidden_set(self) -> str | None:
        """Name of the set of positions of hidden states."""
        return _set_name(self.hidden_policy, "hidden")

    @property
    def reads_logits(self) -> bool:
        """Whether stored logits are read."""
        return self.signal in ("sparse", "replay+topk", "replay+residual")


def _set_name(policy: str | None, name: str) -> str | None:
    return {None: None, "masked": "masked", "all": "token"}.get(policy, name)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Some sequences of one or more blocks as flat columns."""

    counts: dict[str, np.ndarray]
    """Items per sequence of each set, [B]."""
    columns: dict[str, dict[str, np.ndarray]]
    """Per set its columns by name."""


@dataclass(frozen=True, slots=True)
class Window:
    """Shuffled sequences: flat columns, and the start of each sequence in them."""

    lengths: np.ndarray
    """Tokens per sequence, [B]."""
    starts: dict[str, np.ndarray]
    """First item of each sequence per set, int64 [B + 1]."""
    columns: dict[str, dict[str, np.ndarray]]


def read_sequences(block: Mapping[str, np.ndarray], start: int, stop: int, plan: Plan) -> Sequences:
    """Views of sequences ``start`` to ``stop`` of one decoded block."""
    lengths, counts = block["lengths"], block["masked_counts"]
    masked = flat_rows(lengths, counts, block["masked_positions"])
    sizes = {"token": lengths, "masked": counts}
    columns: dict[str, dict[str, np.ndarray]] = {
        "token": {"input_ids": block["input_ids"]},
        "masked": {"positions": block["masked_positions"], "labels": block["labels"]},
    }
    rows = {"masked": masked, "token": np.arange(len(block["input_ids"]))}
    for name, policy, signal in (
        (plan.hidden_set, plan.hidden_policy, "hidden"),
        (plan.ce_set, plan.ce_policy, "logit"),
    ):
        if name is None or policy is None or name in rows:
            continue
        sizes[name], positions = block[f"{signal}_position_counts"], block[f"{signal}_positions"]
        rows[name] = flat_rows(lengths, sizes[name], positions)
        columns[name] = {"positions": positions}
        weights = weights_of(policy, rows[name], masked)
        if weights is not None:
            columns[name]["weight"] = weights
    if plan.reads_logits and plan.ce_set is not None:
        columns[plan.ce_set] |= _logits_at(block, rows[plan.ce_set], masked, plan)
    if plan.hidden_set is not None:
        for stored in (h for h in plan.encoding.hidden if h.layer in plan.layers):
            columns[plan.hidden_set][stored.column] = _rows_of(block, stored)
    if plan.relation and plan.encoding.relation is not None:
        columns["token"][plan.encoding.relation.column] = _rows_of(block, plan.encoding.relation)
    return _cut(Sequences(sizes, columns), start, stop)


def _rows_of(block: Mapping[str, np.ndarray], stored: HiddenEncoding) -> np.ndarray:
    """Stored states as one row per position."""
    values = block[stored.column]
    if stored.dtype == "coded":
        return values.reshape(stored.planes, -1).T
    return values.reshape(-1, stored.width)


def _logits_at(
    block: Mapping[str, np.ndarray], wanted: np.ndarray, masked: np.ndarray, plan: Plan
) -> dict[str, np.ndarray]:
    """Stored logits at the flat token indices ``wanted``; padding at positions without any."""
    encoding = plan.encoding
    kept = unpack(block, encoding.top_k, 1 + len(encoding.temperatures))
    columns = {"logit_ids": kept.ids, "logit_values": kept.values, "log_odds": kept.log_odds}
    if plan.signal == "sparse" and kept.tail_ids is not None:
        columns["tail_ids"] = kept.tail_ids.reshape(-1, encoding.tail_samples)
    if plan.signal == "replay+residual":
        columns["residual_ids"] = block["residual_ids"].reshape(-1, encoding.residual_samples)
        columns["residual_mass"] = block["residual_mass"]
    stored = masked
    if encoding.logit_positions == "all":
        stored = np.arange(len(block["input_ids"]))
    elif encoding.logit_positions != "masked":
        stored = flat_rows(
            block["lengths"], block["logit_position_counts"], block["logit_positions"]
        )
    if len(stored) == len(wanted) and np.array_equal(stored, wanted):
        return columns
    if not len(stored):
        # No masked position in the block: one row of padding for all that is wanted.
        stored = np.array([-1])
        columns = {n: np.zeros((1, *c.shape[1:]), c.dtype) for n, c in columns.items()}
    place = np.minimum(np.searchsorted(stored, wanted), len(stored) - 1)
    absent = stored[place] != wanted
    columns = {name: column[place] for name, column in columns.items()}
    columns["logit_values"][absent] = -np.inf
    columns["logit_ids"][absent] = 0
    columns["log_odds"][absent] = -np.inf
    return columns


def _cut(block: Sequences, start: int, stop: int) -> Sequences:
    """Views of sequences ``start`` to ``stop``."""
    counts, columns = {}, {}
    for name, sizes in block.counts.items():
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        items = slice(ends[start], ends[stop])
        counts[name] = sizes[start:stop]
        columns[name] = {key: values[items] for key, values in block.columns[name].items()}
    return Sequences(counts, columns)


def join(parts: Sequence[Sequences]) -> Sequences:
    """The sequences of all parts, in order."""
    first = parts[0]
    return Sequences(
        {name: np.concatenate([p.counts[name] for p in parts]) for name in first.counts},
        {
            name: {key: _join([p.columns[name][key] for p in parts]) for key in columns}
            for name, columns in first.columns.items()
        },
    )


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of all parts in one contiguous array; planes [G, N] come as [N, G] views."""
    if all(part.flags.c_contiguous for part in parts):
        return np.concatenate(parts)
    rows = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    end = 0
    for part in parts:
        into, end = rows[end : end + len(part)], end + len(part)
        for first in range(0, part.shape[1], TILE):
            into[:, first : first + TILE] = part[:, first : first + TILE]
    return rows


def shuffle(sequences: Sequences, rows: np.ndarray) -> Window:
    """Bring the sequences into the order ``rows``, int [B]."""
    starts, columns = {}, {}
    for name, counts in sequences.counts.items():
        items, starts[name] = _gather(counts.astype(np.int64), rows)
        flat = sequences.columns[name]
        columns[name] = {key: np.take(values, items, axis=0) for key, values in flat.items()}
    return Window(sequences.counts["token"][rows], starts, columns)


def in_order(sequences: Sequences) -> Window:
    """A window that is not shuffled."""
    starts = {
        name: np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        for name, counts in sequences.counts.items()
    }
    return Window(sequences.counts["token"], starts, sequences.columns)


def _gather(counts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Item indices that bring ragged rows into a new order, and the new starts [n + 1]."""
    starts = np.cumsum(counts) - counts
    picked = counts[rows]
    ends = np.cumsum(picked)
    shift = np.repeat(starts[rows] - (ends - picked), picked)
    return shift + np.arange(len(shift)), np.concatenate([[0], ends])
