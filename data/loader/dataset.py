"""Training batches from the blocks of a cache, without a loop per sequence or token.

Background threads decode and shuffle a window of blocks; a batch is a slice of the window. Batch k
is a pure function of (cache, seed, k, rank), so a resumed run needs only its step number. Each
rank decodes only its own streams (see ``distilcache.data.loader.order``).

Shapes: ``B`` sequences, ``L`` positions, ``M`` masked positions of a batch, ``N`` positions of
L_ce, ``H`` positions with hidden states, ``K`` stored logits, ``R`` draws, ``S`` temperatures.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import require
from distilcache.data.loader.batch import Batch, batch_of
from distilcache.data.loader.order import (
    EpochOrder,
    Layout,
    choose_streams,
    group_by_length,
    interleave,
)
from distilcache.data.loader.window import (
    Plan,
    Sequences,
    Window,
    join,
    read_sequences,
    shuffle,
)

_OF_A_PROCESS = {"_process", "_orders", "_lock", "_cut_blocks", "_windows", "_pool"}
"""What :meth:`CachedBatches._begin` makes anew in each process."""


class CachedBatches(Dataset[Batch]):
    """Map-style dataset whose items are whole batches.

    Item ``k = epoch * steps_per_epoch + i`` is the i-th batch of an epoch; epoch e reads round
    ``e mod rounds``. Keys of a batch:

    - ``input_ids`` int64 [B, L], padded; ``attention_mask`` int64 [B, L], 0 at padding
    - ``masked_index`` int64 [M] into the flattened B * L positions, ``labels`` int64 [M]
    - ``hidden_index`` int64 [H] and ``hidden_<l>`` (the input of ``HiddenDecoder``) if hidden
      states are read; ``hidden_weight`` float32 [H] if the weights of the positions differ
    - ``ce_index`` int64 [N] if there is a ``signal``: positions of L_ce (those with logits where
      no hidden states are read), which include all masked ones; ``ce_weight`` float32 [N] if
      their weights differ; ``ce_rows`` int64 [N], their rows among the hidden states, if the
      signal is a replay and there are more hidden states
    - ``logit_ids`` int64 [N, K], ``logit_values`` float32 [N, K] and ``log_odds`` float32 [N, S]
      (see ``codecs/logits.py``) for ``sparse``, ``replay+topk`` and ``replay+residual``
    - ``tail_ids`` int64 [N, R] for ``sparse``; ``residual_ids`` int64 [N, R] and
      ``residual_mass`` float32 [N] for ``replay+residual``, if the cache has them

    - ``relation_<l>``, with ``input_ids`` the input of ``Relations``, if it is read;
      ``relation_index`` int64 [T], the tokens that are no padding, where there is any

    Args:
        cache: An open cache.
        batch_size: Sequences per batch B, over all ranks; the last batch of an epoch may be
            smaller, or larger by less than one sequence per stream.
        seed: Seed of the order.
        window_blocks: Blocks that are shuffled together, over all streams.
        signal: One of ``cache.encoding.signals``, or None: nothing is read for L_ce.
        hidden: Read the last layer's hidden states, if there are any.
        layers: Further layers whose hidden states are read (-1: the last).
        restrict_ce_to_mask: L_ce at masked positions only, even if the cache has more.
        relation: Read what relations are replayed from.
        streams: Logical streams; 0: as many as fit. The order of the sequences depends on them,
            so a resumed run keeps its number.
        blocks: Which blocks of each round are read, by their place in it; None: all.
        rank: Rank r of ``world`` reads the streams s with s % world = r.
        world: Number of ranks; must divide the streams.

    Raises:
        UserError: Batch size, streams, ranks and the size of the cache do not fit each other, or
            the cache does not store what is to be read.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        batch_size: int,
        seed: int,
        window_blocks: int = 16,
        signal: str | None = "replay",
        hidden: bool = True,
        layers: Sequence[int] = (),
        restrict_ce_to_mask: bool = False,
        relation: bool = False,
        streams: int = 0,
        blocks: np.ndarray | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.cache = cache
        self.batch_size = batch_size
        self.seed = seed
        self._chosen = blocks
        last = (-1,) if hidden and cache.encoding.hidden_layer() else ()
        self._plan = _plan(cache, signal, (*last, *layers), restrict_ce_to_mask, relation)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("window_blocks", window_blocks, 1),
            ("streams", streams, 0),
            ("seed", seed, 0),
        ):
            require(value >= least, f"train: {name} must be at least {least}, got {value}")
        require(0 <= rank < world, f"train: rank must be below {world} (world), got {rank}")
        sizes = self._block_sequences(0)
        total = int(sizes.sum())
        self.layout = Layout(
            total,
            batch_size,
            choose_streams(streams, batch_size, total),
            window_blocks * int(sizes.max()),
        )
        require(
            self.layout.streams % world == 0,
            f"train: ranks must divide the streams ({self.layout.streams}), got {world}; use "
            "another number of processes, or train.streams and train.batch_size that are "
            "multiples of it (a resumed run keeps its streams)",
        )
        self.streams = range(rank, self.layout.streams, world)
        self.steps_per_epoch = self.layout.steps
        self.stop: int | None = None
        """The item that follows the last one of a run: nothing is read ahead from there on."""
        self._begin()

    def _begin(self) -> None:
        """Start without threads and buffers, as they do not survive a fork."""
        self._process = os.getpid()
        self._orders: dict[int, EpochOrder] = {}
        self._lock = threading.Lock()
        self._cut_blocks: dict[int, tuple[Future[Mapping[str, np.ndarray]], int]] = {}
        self._windows: dict[tuple[int, int], Future[Window]] = {}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="distilcache-loader")

    def __getstate__(self) -> dict[str, Any]:
        """Without threads and buffers: for the workers of a ``DataLoader`` that are spawned."""
        return {name: value for name, value in vars(self).items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.steps_per_epoch

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Several batches at once (what a ``DataLoader`` calls)."""
        return [self[k] for k in indices]

    def __getitem__(self, k: int) -> Batch:
        """This rank's sequences of batch k of the run."""
        if self._process != os.getpid():  # A worker of a DataLoader.
            self._begin()
        epoch, step = divmod(k, self.steps_per_epoch)
        window, step = divmod(step, self.layout.window_steps)
        ready = self._prefetch(epoch, window).result()
        size = self.layout.per_stream * len(self.streams)
        is_last = step == self.layout.steps_in(window) - 1
        last = len(ready.lengths) if is_last else (step + 1) * size
        return batch_of(ready, step * size, last, self._plan)

    def _prefetch(self, epoch: int, window: int) -> Future[Window]:
        """Start to load this window, anew if that failed, and the next; forget all others."""
        is_last = window + 1 == self.layout.windows
        following = (epoch + 1, 0) if is_last else (epoch, window + 1)
        ready = self._windows.get((epoch, window))
        if ready is None or (ready.done() and ready.exception() is not None):
            ready = self._pool.submit(self._load_window, epoch, window)
        kept = {(epoch, window): ready}
        first = following[0] * self.steps_per_epoch + following[1] * self.layout.window_steps
        if self.stop is None or first < self.stop:
            ahead = self._windows.get(following)
            kept[following] = ahead or self._pool.submit(self._load_window, *following)
        self._windows = kept
        return ready

    def _blocks(self, epoch: int) -> Sequence[int] | np.ndarray:
        """Global numbers of the blocks that the epoch reads of its round."""
        whole = self.cache.round_range(epoch % self.cache.manifest.rounds)
        return whole if self._chosen is None else whole.start + self._chosen

    def _block_sequences(self, epoch: int) -> np.ndarray:
        """Sequences of each of these blocks; of a whole round, a view of the index."""
        blocks = self._blocks(epoch)
        rows = slice(blocks.start, blocks.stop) if isinstance(blocks, range) else blocks
        sizes: np.ndarray = self.cache.index["sequences"][rows]
        return sizes

    def _order(self, epoch: int) -> EpochOrder:
        """The order of an epoch; the last two are kept."""
        with self._lock:
            order = self._orders.pop(epoch, None)
            if order is None:
                order = EpochOrder(self._block_sequences(epoch), self.seed, epoch, self.layout)
            self._orders[epoch] = order
            if len(self._orders) > 2:
                self._orders.pop(next(iter(self._orders)))
        return order

    def _load_window(self, epoch: int, window: int) -> Window:
        order, layout = self._order(epoch), self.layout
        steps, batch_order = layout.steps_in(window), order.batch_order(window)
        parts: list[Sequences] = []
        rows, first = [], 0
        for stream in self.streams:
            read = list(self._read(epoch, window, stream))
            lengths = np.concatenate([part.counts["token"] for part in read])
            shuffled = order.shuffle(window, stream)
            grouped = group_by_length(lengths, shuffled, layout.per_stream, batch_order)
            rows.append(first + grouped.astype(np.int64))
            parts += read
            first += len(lengths)
        read.clear()
        joined = join(parts)
        parts.clear()  # So that their memory is free before the next copy.
        return shuffle(joined, interleave(rows, layout.per_stream, steps))

    def _read(self, epoch: int, window: int, stream: int) -> Iterator[Sequences]:
        """The slices of blocks that make up a stream's window, decoded."""
        blocks = self._blocks(epoch)
        for cut in self._order(epoch).slices(window, stream):
            block = self._decoded(int(blocks[cut.block]), cut.start, cut.stop)
            yield read_sequences(block, cut.start, cut.stop, self._plan)

    def _decoded(self, number: int, start: int, stop: int) -> Mapping[str, np.ndarray]:
        """A block; if several windows need it, it is decoded once and kept for the others."""
        size = int(self.cache.index["sequences"][number])
        if stop - start == size:
            return self.cache.read_block(number)
        with self._lock:
            future, left = self._cut_blocks.pop(number, (None, size))
            is_first = future is None
            future = future or Future()
            if left > stop - start:
                self._cut_blocks[number] = future, left - (stop - start)
            # The rest of an epoch's last block may belong to another rank: drop the oldest.
            if len(self._cut_blocks) > 2 * len(self.streams) + 2:
                self._cut_blocks.pop(next(iter(self._cut_blocks)))
        if is_first:
            try:
                future.set_result(self.cache.read_block(number))
            except BaseException as error:
                with self._lock:  # So that it is read anew by who asks again.
                    self._cut_blocks.pop(number, None)
                future.set_exception(error)
        return future.result()


def _plan(
    cache: Cache,
    signal: str | None,
    layers: Sequence[int],
    restrict_ce_to_mask: bool,
    relation: bool,
) -> Plan:
    """What is read of each block.

    Raises:
        UserError: The cache does not store it.
    """
    require(
        signal is None or signal in cache.encoding.signals,
        "cache: signal must be one that the cache holds "
        f"({', '.join((*cache.encoding.signals, 'None'))}), got {signal!r}; use one of these, "
        "or make a cache that stores it",
    )
    if relation:
        cache.teacher.stored_relation()
    stored = tuple(sorted({cache.teacher.stored(layer).layer for layer in layers}))
    return Plan(cache.encoding, signal, stored, restrict_ce_to_mask, relation)
