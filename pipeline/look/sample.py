"""A few sequences of a cache, with the teacher's signals at their positions.

Shapes: ``L`` tokens, ``M`` masked and ``N`` signal positions of one sequence, ``K`` stored
logits, ``S`` stored temperatures, ``D`` hidden width, ``G`` byte planes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.schema import Encoding
from distilcache.data.loader.window import Plan, Sequences, read_sequences


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence."""

    round: int
    block: int
    """Number of the corpus block."""
    row: int
    """Number of the sequence in its block."""
    input_ids: np.ndarray
    """[L], masks applied."""
    masked: np.ndarray
    """Masked positions [M], ascending."""
    labels: np.ndarray
    """Original ids there, [M]."""
    positions: np.ndarray
    """Positions that carry signals, [N]; of a mask-only cache the masked ones."""
    signals: Mapping[str, np.ndarray]
    """``logit_ids`` and ``logit_values`` [N, K], ``log_odds`` [N, S]; ``hidden_<l>`` [N, D or G],
    of other positions where the cache holds no hidden states of the last layer."""

    @property
    def original_ids(self) -> np.ndarray:
        """The text before it was masked, [L]."""
        ids = self.input_ids.astype(np.int64)
        ids[self.masked] = self.labels
        return ids


def choose_blocks(cache: Cache, count: int, seed: int) -> list[int]:
    """Random blocks, equally many of every round, ascending."""
    rng = np.random.default_rng(seed)
    drawn = []
    for number in range(cache.manifest.rounds):
        blocks = cache.round_range(number)
        places = rng.choice(len(blocks), min(count, len(blocks)), replace=False)
        drawn.append([blocks[place] for place in places.tolist()])
    turns = [blocks[turn] for turn in range(count) for blocks in drawn if turn < len(blocks)]
    return sorted(turns[:count])


def read_samples(cache: Cache, sequences: int, seed: int, blocks: int = 6) -> Iterator[Sample]:
    """Random sequences of a few blocks, in the cache's order."""
    chosen = choose_blocks(cache, min(blocks, sequences), seed)
    rng = np.random.default_rng([seed, 1])
    sizes = cache.index["sequences"][chosen].astype(np.int64)
    counts = _even_counts(sizes.tolist(), sequences)
    for block, size, count in zip(chosen, sizes, counts, strict=True):
        columns = cache.read_block(block)
        entry = cache.entry(block)
        for row in np.sort(rng.permutation(size)[:count]).tolist():
            yield read_sample(cache.encoding, columns, entry.round, entry.block, row)


def _even_counts(sizes: list[int], wanted: int) -> list[int]:
    """Divide ``wanted`` over several blocks as evenly as their sizes allow."""
    counts = [0] * len(sizes)
    while sum(counts) < min(wanted, sum(sizes)):
        for number, size in enumerate(sizes):
            counts[number] += int(counts[number] < size and sum(counts) < wanted)
    return counts


def read_sample(
    encoding: Encoding, columns: Mapping[str, np.ndarray], round_index: int, block: int, row: int
) -> Sample:
    """One sequence of a decoded block."""
    layers = tuple(sorted(held.layer for held in encoding.hidden))
    plan = Plan(encoding, encoding.best_signal, layers, restrict_ce_to_mask=False)
    read = read_sequences(columns, row, row + 1, plan)
    ids, masked = read.columns["token"]["input_ids"], read.columns["masked"]
    carrier = plan.ce_set or plan.hidden_set or "masked"
    return Sample(
        round=round_index,
        block=block,
        row=row,
        input_ids=ids,
        masked=masked["positions"].astype(np.int64),
        labels=masked["labels"].astype(np.int64),
        positions=_positions_of(read, carrier, len(ids)),
        signals=_signals_of(read, carrier, plan.hidden_set),
    )


def _positions_of(read: Sequences, carrier: str, length: int) -> np.ndarray:
    if carrier == "token":
        return np.arange(length)
    positions: np.ndarray = read.columns[carrier]["positions"].astype(np.int64)
    return positions


def _signals_of(read: Sequences, carrier: str, hidden_set: str | None) -> dict[str, np.ndarray]:
    """Stored logits at the carrier's positions, hidden states at their own."""
    wanted = ("logit_ids", "logit_values", "log_odds")
    found = {n: v for n, v in read.columns[carrier].items() if n in wanted}
    held = read.columns[hidden_set or carrier]
    return found | {n: v for n, v in held.items() if n.startswith("hidden_")}
