"""Which sequence is read when: a pure function of (seed, epoch) and the sizes of the blocks.

All blocks of a round are shuffled. Their sequences, laid end to end, are cut into S equal
streams, and every batch takes its share of each: whoever trains on w ranks gives each of them S / w
streams, of which it reads the blocks, and the batches stay the same. Each stream is cut into
windows of a fixed number of sequences, which are shuffled in themselves. Every sequence comes
exactly once per epoch, every epoch has the same number of batches, and any batch can be found
without replaying the ones before it.

::

    shuffled blocks   | 7 | 2 | 9 | 0 | 4 | 1 | 8 | 3 | 6 | 5 |       S = 2, B = 4
    streams           |------ stream 0 -------|------ stream 1 -------|
    batch k             2 sequences of it     + 2 sequences of it
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distilcache.data.errors import require

BUCKET = 2**20
"""Random words that a permutation sorts at once: 8 MB, where 15 million at once take 120."""
GROUP = 2**12
"""Blocks per stored running sum; the sums within a group are made when they are needed."""
STREAM_COUNTS = (8, 4, 2, 1)
"""Streams where the recipe names none: the first of these that divides the batch size."""


@dataclass(frozen=True, slots=True)
class WindowPart:
    """Sequences ``start`` to ``stop`` of one block, as one window needs them."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How the sequences of an epoch are cut into streams, windows and batches.

    Streams differ by one sequence at most. A batch takes ``batch_size / streams`` sequences from
    each; the last one takes what is left, at least one and at most one more than that from each,
    so that no rank is ever without a sequence.
    """

    sequences: int
    """Of an epoch."""
    batch_size: int
    """Sequences per batch, over all ranks."""
    streams: int
    window_sequences: int
    """Sequences shuffled together, over all streams; rounded up to whole batches."""

    def __post_init__(self) -> None:
        """Check that every stream has its share in every batch."""
        require(
            self.batch_size % self.streams == 0,
            f"train: batch_size must be a multiple of train.streams ({self.streams}), got "
            f"{self.batch_size}; use --set train.streams=0 to have it chosen",
        )
        require(
            self.sequences >= self.streams,
            f"train: streams must be at most the sequences of the cache ({self.sequences}), got "
            f"{self.streams}; use --set train.streams=1",
        )

    @property
    def share(self) -> int:
        """Sequences that a batch takes from each stream."""
        return self.batch_size // self.streams

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return -(-(self.sequences // self.streams) // self.share)

    @property
    def window_steps(self) -> int:
        """Batches per window; the last window may have fewer."""
        return -(-self.window_sequences // self.batch_size)

    @property
    def windows(self) -> int:
        """Windows per epoch."""
        return -(-self.steps // self.window_steps)

    def span(self, window: int, stream: int) -> tuple[int, int]:
        """First sequence of a stream's window in the order of the epoch, and the one after it."""
        shortest, longer = divmod(self.sequences, self.streams)
        begin = stream * shortest + min(stream, longer)
        end = begin + shortest + (stream < longer)
        size = self.window_steps * self.share
        low = begin + window * size
        return low, end if window == self.windows - 1 else low + size

    def steps_in(self, window: int) -> int:
        """Batches of one window."""
        return min(self.window_steps, self.steps - window * self.window_steps)

    def even_steps(self, window: int) -> int:
        """Batches of one window that take exactly :attr:`share` from every stream."""
        steps = self.steps_in(window)
        uneven = window == self.windows - 1 and self.sequences != self.steps * self.batch_size
        return steps - uneven


def choose_streams(streams: int, batch_size: int, sequences: int) -> int:
    """The number of streams: as asked for, or (0) as many of 8, 4, 2, 1 as fit.

    A function of recipe and cache alone, not of the ranks, on which the batches must not depend.
    """
    fitting = (s for s in STREAM_COUNTS if batch_size % s == 0 and sequences >= s)
    return streams or next(fitting, 1)


class EpochOrder:
    """The order of one epoch.

    It holds one uint32 per block, and takes a second or two to make for 15 million.

    Args:
        block_sequences: Sequences per block, int [n]; kept as it is, so that it may be mapped.
        seed: Seed of the run.
        epoch: Number of the epoch.
        layout: Streams, windows, batches.
    """

    def __init__(self, block_sequences: np.ndarray, seed: int, epoch: int, layout: Layout) -> None:
        self.layout = layout
        self._key = (seed, epoch)
        self._sizes = np.asarray(block_sequences)
        self._blocks = permutation(len(self._sizes), seed, epoch, 0)
        groups = range(0, len(self._blocks), GROUP)
        sums = [self._group_sizes(g // GROUP).sum(dtype=np.int64) for g in groups]
        self._group_ends = np.cumsum(sums, dtype=np.int64)
        assert self._group_ends[-1] == layout.sequences

    def parts(self, window: int, stream: int) -> list[WindowPart]:
        """The pieces of blocks that make up a stream's window, in order, before shuffling."""
        low, high = self.layout.span(window, stream)
        return [
            WindowPart(block, max(low, start) - start, min(high, end) - start)
            for block, start, end in self._blocks_from(low, high)
        ]

    def shuffle(self, window: int, stream: int) -> np.ndarray:
        """Permutation of the sequences of a stream's window."""
        low, high = self.layout.span(window, stream)
        return permutation(high - low, *self._key, 1 + window * self.layout.streams + stream)

    def batch_order(self, window: int) -> np.ndarray:
        """Permutation of a window's even batches, the same for all streams."""
        # Streams of random words that no window's sequences have.
        return permutation(self.layout.even_steps(window), *self._key, 2**39 + window)

    def _group_sizes(self, group: int) -> np.ndarray:
        sizes: np.ndarray = self._sizes[self._blocks[group * GROUP : (group + 1) * GROUP]]
        return sizes

    def _blocks_from(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """(block, first sequence, one after its last) of the blocks that hold ``low:high``."""
        group = int(np.searchsorted(self._group_ends, low, side="right"))
        end = int(self._group_ends[group - 1]) if group else 0
        while end < high:
            ends = end + np.cumsum(self._group_sizes(group), dtype=np.int64)
            first = int(np.searchsorted(ends, low, side="right"))
            for i in range(first, len(ends)):
                start = int(ends[i - 1]) if i else end
                if start >= high:
                    return
                yield int(self._blocks[group * GROUP + i]), start, int(ends[i])
            group, end = group + 1, int(ends[-1])


def permutation(size: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation from raw Philox words, whose stream is the same in every numpy version.

    It orders the numbers by one word each, whose low bits give way to the number itself. Only the
    words of one bucket, chosen by their high bits, are in memory at a time.

    Returns:
        uint32 [size].
    """
    key = np.array([seed, (epoch << 40) | stream], dtype=np.uint64)
    mask = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    bits = max(-(-size // BUCKET) - 1, 0).bit_length()
    shift = np.uint64(63 - bits)
    order = np.empty(size, np.uint32)
    filled = 0
    for bucket in range(1 << bits):
        generator = np.random.Philox(key=key)
        found = [np.empty(0, np.uint64)]
        for low in range(0, size, BUCKET):
            words = generator.random_raw(min(BUCKET, size - low))
            # By two shifts: one of 64 is not defined.
            chosen = np.flatnonzero(words >> shift >> np.uint64(1) == bucket)
            found.append((words[chosen] & ~mask) | (chosen + low).astype(np.uint64))
        packed = np.concatenate(found)
        packed.sort()
        order[filled : filled + len(packed)] = packed & mask
        filled += len(packed)
    return order


def group_by_length(
    lengths: np.ndarray, order: np.ndarray, share: int, batch_order: np.ndarray
) -> np.ndarray:
    """Reorder a stream's shuffled window so that sequences of like length share a batch.

    Batch i of every stream of a window holds sequences of the same rank by length, so the parts of
    a batch are alike too. The rest, which is no even batch, stays last. Sequences of one length
    are left as they are.

    Args:
        lengths: Tokens per sequence of the window, int [n].
        order: The window's permutation, int [n].
        share: Sequences per batch.
        batch_order: Permutation of the even batches, see :meth:`EpochOrder.batch_order`.
    """
    shuffled = lengths[order]
    if len(shuffled) == 0 or (shuffled == shuffled[0]).all():
        return order
    by_length = np.argsort(shuffled, kind="stable")
    even = len(batch_order) * share
    batches = by_length[:even].reshape(-1, share)[batch_order]
    grouped: np.ndarray = order[np.concatenate([batches.reshape(-1), by_length[even:]])]
    return grouped


def interleave(rows: list[np.ndarray], share: int, steps: int) -> np.ndarray:
    """Rows of several streams' windows, batch by batch: the last batch takes what is left."""
    even = (steps - 1) * share
    body = np.stack([r[:even].reshape(-1, share) for r in rows], axis=1).reshape(-1)
    return np.concatenate([body, *(r[even:] for r in rows)])
