"""Which sequence is read when: a pure function of (seed, epoch) and the sizes of the blocks.

All blocks of a round are shuffled; their sequences, laid end to end, are cut into windows of a
fixed number of sequences; each window is shuffled in itself. Every sequence comes exactly once per
epoch, every epoch has the same number of batches, and any batch can be found without replaying
the ones before it.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class WindowPart:
    """Sequences ``start`` to ``stop`` of one block, as one window needs them."""

    block: int
    start: int
    stop: int


class EpochOrder:
    """The order of one epoch.

    Args:
        block_sequences: Sequences per block, int [n].
        seed: Seed of the run.
        epoch: Number of the epoch.
        window_sequences: Sequences shuffled together.
    """

    def __init__(
        self, block_sequences: np.ndarray, seed: int, epoch: int, window_sequences: int
    ) -> None:
        self._key = (seed, epoch)
        self._blocks = permutation(len(block_sequences), seed, epoch, 0)
        sizes = np.asarray(block_sequences, dtype=np.int64)[self._blocks]
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self.sequences = int(self._ends[-1])
        self.window_sequences = window_sequences

    @property
    def num_windows(self) -> int:
        """Windows per epoch; the last may be shorter."""
        return -(-self.sequences // self.window_sequences)

    def parts(self, window: int) -> list[WindowPart]:
        """The pieces of blocks that make up one window, in storage order before shuffling."""
        low = window * self.window_sequences
        high = min(low + self.window_sequences, self.sequences)
        first = int(np.searchsorted(self._ends, low, side="right"))
        last = int(np.searchsorted(self._starts, high, side="left"))
        return [
            WindowPart(
                int(self._blocks[i]),
                max(low, int(self._starts[i])) - int(self._starts[i]),
                min(high, int(self._ends[i])) - int(self._starts[i]),
            )
            for i in range(first, last)
        ]

    def shuffle(self, window: int) -> np.ndarray:
        """Permutation of the window's sequences, int64."""
        low = window * self.window_sequences
        size = min(self.window_sequences, self.sequences - low)
        return permutation(size, *self._key, window + 1)


def permutation(size: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation from raw Philox words, whose stream is the same in every numpy version."""
    key = np.array([seed, (epoch << 40) | stream], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(size)
    order: np.ndarray = np.argsort(words, kind="stable")
    return order


def group_by_length(lengths: np.ndarray, order: np.ndarray, batch_size: int) -> np.ndarray:
    """Reorder a shuffled window so that sequences of like length share a batch.

    Full batches keep the random order in which ``order`` first meets their sequences; a short
    last batch stays last. Sequences of one length are left as they are.

    Args:
        lengths: Tokens per sequence of the window, int [n].
        order: The window's permutation, int [n].
        batch_size: Sequences per batch.
    """
    shuffled = lengths[order]
    if len(shuffled) == 0 or (shuffled == shuffled[0]).all():
        return order
    by_length = np.argsort(shuffled, kind="stable")
    full = len(order) // batch_size * batch_size
    batches = by_length[:full].reshape(-1, batch_size)
    # The smallest shuffled rank in a batch of equal-length rows is random: it orders the batches.
    batches = batches[np.argsort(batches[:, -1], kind="stable")]
    grouped: np.ndarray = order[np.concatenate([batches.reshape(-1), by_length[full:]])]
    return grouped
