"""The order of sequences: a pure function of (seed, epoch) and the sizes of the blocks.

1. The blocks of a round are shuffled.
2. Their sequences, one after another, are cut into S equal streams. A batch of B sequences takes
   B / S from each stream. With w ranks, each rank reads S / w of the streams, so the batches do
   not depend on w.
3. Each stream is cut into windows of a fixed number of sequences. Each window is shuffled.

So an epoch has every sequence exactly once, all epochs have the same number of batches, and any
batch can be found without the batches before it.

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
"""Random words that a permutation sorts at once: 8 MB (15 million at once take 120 MB)."""
GROUP = 2**12
"""Blocks per stored running sum; sums within a group are computed when they are needed."""
STREAM_COUNTS = (8, 4, 2, 1)
"""Number of streams if the recipe sets none: the first of these that divides the batch size."""


@dataclass(frozen=True, slots=True)
class BlockSlice:
    """Sequences ``start`` to ``stop`` of one block."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How the sequences of an epoch are cut into streams, windows and batches.

    The lengths of streams differ by one sequence at most. A batch takes ``batch_size / streams``
    sequences from each stream. The last batch takes what is left: from each stream at least one
    sequence, and at most one more than other batches take, so that no rank is without a sequence.
    """

    sequences: int
    """Of an epoch."""
    batch_size: int
    """Sequences per batch, over all ranks."""
    streams: int
    window_sequences: int
    """Sequences shuffled together, over all streams; rounded up to whole batches."""

    def __post_init__(self) -> None:
        """Check that every batch has sequences of every stream."""
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
    def per_stream(self) -> int:
        """Sequences that a batch takes from each stream."""
        return self.batch_size // self.streams

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return -(-(self.sequences // self.streams) // self.per_stream)

    @property
    def window_steps(self) -> int:
        """Batches per window; the last window may have fewer."""
        return -(-self.window_sequences // self.batch_size)

    @property
    def windows(self) -> int:
        """Windows per epoch."""
        return -(-self.steps // self.window_steps)

    def span(self, window: int, stream: int) -> tuple[int, int]:
        """First sequence of a stream's window, and one after its last, in the epoch's order."""
        shortest, longer = divmod(self.sequences, self.streams)
        begin = stream * shortest + min(stream, longer)
        end = begin + shortest + (stream < longer)
        size = self.window_steps * self.per_stream
        low = begin + window * size
        return low, end if window == self.windows - 1 else low + size

    def steps_in(self, window: int) -> int:
        """Batches of one window."""
        return min(self.window_steps, self.steps - window * self.window_steps)

    def even_steps(self, window: int) -> int:
        """Batches of one window that take exactly :attr:`per_stream` from every stream."""
        steps = self.steps_in(window)
        uneven = window == self.windows - 1 and self.sequences != self.steps * self.batch_size
        return steps - uneven


def choose_streams(streams: int, batch_size: int, sequences: int) -> int:
    """The number of streams: ``streams``, or if that is 0 the first of 8, 4, 2, 1 that fits.

    It depends on recipe and cache alone, since the batches must not depend on the ranks.
    """
    fitting = (s for s in STREAM_COUNTS if batch_size % s == 0 and sequences >= s)
    return streams or next(fitting, 1)


class EpochOrder:
    """The order of one epoch.

    It takes 4 bytes per block, and a second or two to make for 15 million blocks. The sequences per
    block, int [n], are not copied (they may be mapped).
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

    def slices(self, window: int, stream: int) -> list[BlockSlice]:
        """The slices of blocks that make up a stream's window, in order, before it is shuffled."""
        low, high = self.layout.span(window, stream)
        return [
            BlockSlice(block, max(low, start) - start, min(high, end) - start)
            for block, start, end in self._blocks_from(low, high)
        ]

    def shuffle(self, window: int, stream: int) -> np.ndarray:
        """Permutation of the sequences of a stream's window."""
        low, high = self.layout.span(window, stream)
        return permutation(high - low, *self._key, 1 + window * self.layout.streams + stream)

    def batch_order(self, window: int) -> np.ndarray:
        """Permutation of a window's even batches (:meth:`Layout.even_steps`), for all streams."""
        # Far from the numbers that `shuffle` uses.
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
    """A permutation from raw Philox words, which are the same in every version of numpy.

    Each number gets a random word, and the numbers are sorted by their words. To save memory, the
    low bits of a word hold its number, and the words are sorted bucket by bucket (by high bits).
    ``stream``, below 2^40, tells the permutations of an epoch apart.

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
            # In two shifts: one by 64 bits is not defined.
            chosen = np.flatnonzero(words >> shift >> np.uint64(1) == bucket)
            found.append((words[chosen] & ~mask) | (chosen + low).astype(np.uint64))
        packed = np.concatenate(found)
        packed.sort()
        order[filled : filled + len(packed)] = packed & mask
        filled += len(packed)
    return order


def group_by_length(
    lengths: np.ndarray, order: np.ndarray, per_stream: int, batch_order: np.ndarray
) -> np.ndarray:
    """Reorder a stream's shuffled window so that a batch has sequences of similar length.

    Batch i takes sequences of the same rank by length from every stream, so all of a batch are
    similar. What does not fill a batch stays last. A window of one length is not reordered.

    Args:
        lengths: Tokens per sequence of the window, int [n].
        order: The window's permutation, int [n].
        per_stream: Sequences that a batch takes from the stream.
        batch_order: Permutation of the even batches, see :meth:`EpochOrder.batch_order`.

    Returns:
        The new permutation, int [n].
    """
    shuffled = lengths[order]
    if len(shuffled) == 0 or (shuffled == shuffled[0]).all():
        return order
    by_length = np.argsort(shuffled, kind="stable")
    even = len(batch_order) * per_stream
    batches = by_length[:even].reshape(-1, per_stream)[batch_order]
    grouped: np.ndarray = order[np.concatenate([batches.reshape(-1), by_length[even:]])]
    return grouped


def interleave(rows: list[np.ndarray], per_stream: int, steps: int) -> np.ndarray:
    """Join the windows of several streams batch by batch; the last batch takes what is left."""
    even = (steps - 1) * per_stream
    body = np.stack([r[:even].reshape(-1, per_stream) for r in rows], axis=1).reshape(-1)
    return np.concatenate([body, *(r[even:] for r in rows)])
