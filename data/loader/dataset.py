"""Blocks to training batches: columns end to end, no loop per sequence or token.

A window of blocks is decoded and shuffled as a whole by background threads; a batch is then a
slice of the window. Batch k is a pure function of (cache, seed, k), so a resumed run needs only
its step number; and of the rank, each of which has its streams of every batch (see
``distilcache.data.loader.order``) and decodes no others.

Shapes: ``B`` sequences, ``L`` positions, ``M`` masked positions of a batch, ``N`` positions of
L_ce, ``H`` positions with hidden states, ``K`` stored logits, ``R`` draws, ``S`` temperatures.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import require
from distilcache.data.loader.order import (
    EpochOrder,
    Layout,
    choose_streams,
    group_by_length,
    interleave,
)
from distilcache.data.loader.window import Piece, Plan, Window, join, read_piece, shuffle

Batch = dict[str, torch.Tensor]


class CachedBatches(Dataset[Batch]):
    """Map-style dataset whose items are whole batches.

    Item ``k = epoch * steps_per_epoch + i`` is the i-th batch of an epoch; epoch e reads round
    ``e mod rounds``. Keys of a batch:

    - ``input_ids`` int64 [B, L], padded; ``attention_mask`` int64 [B, L] where there is padding
    - ``masked_index`` int64 [M] into the flattened B * L positions, ``labels`` int64 [M]
    - ``hidden_index`` int64 [H] and ``hidden_<l>`` for ``HiddenDecoder``
      where hidden states are read (byte planes [G, H] lie by position in memory);
      ``hidden_weight`` float32 [H] where they count differently
    - ``ce_index`` int64 [N] where there is a ``signal``: positions of L_ce, all masked ones among
      them; ``ce_weight`` float32 [N] where they count differently; ``ce_rows`` int64 [N]: their
      rows among the hidden states, in replay where these are more
    - ``logit_ids`` int64 [N, K], ``logit_values`` float32 [N, K] and ``log_odds`` float32 [N, S]
      (see ``codecs/logits.py``) for ``sparse``, ``replay+topk`` and ``replay+residual``
    - ``tail_ids`` int64 [N, R] for ``sparse``; ``residual_ids`` int64 [N, R] and
      ``residual_mass`` float32 [N] for ``replay+residual``, where the cache has them

    Args:
        cache: An open cache.
        batch_size: Sequences per batch B, over all ranks; the last batch of an epoch may be
            smaller, or larger by less than one sequence per stream.
        seed: Seed of the order.
        window_blocks: Blocks shuffled together, over all streams.
        signal: ``replay``, ``replay+topk``, ``replay+residual``, ``sparse`` or None.
        hidden: Read the last layer's hidden states.
        layers: Further layers whose hidden states are read.
        restrict_ce_to_mask: L_ce at masked positions alone, whatever the cache holds.
        streams: Logical streams; 0: as many as fit. They decide the order, so a run keeps its own.
        rank: Rank r of ``world`` has the streams s with s % world = r.
        world: Ranks; must divide the streams.

    Raises:
        UserError: Batch size, streams, ranks and the size of the cache do not fit each other.
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
        streams: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.cache = cache
        self.batch_size = batch_size
        self.seed = seed
        encoding = cache.encoding
        last = (encoding.num_layers,) if hidden and encoding.hidden_layer() else ()
        self._plan = Plan(
            encoding,
            None if encoding.mask_only else signal,
            () if encoding.mask_only else tuple(sorted({*last, *layers})),
            restrict_ce_to_mask,
        )
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
            "multiples of it (a run that was begun keeps its streams)",
        )
        self.streams = range(rank, self.layout.streams, world)
        self.steps_per_epoch = self.layout.steps
        self._begin()

    def _begin(self) -> None:
        """Threads, and what they have read, belong to a process: none survives a fork."""
        self._process = os.getpid()
        self._orders: dict[int, EpochOrder] = {}
        self._lock = threading.Lock()
        self._cut_blocks: dict[int, tuple[Future[Mapping[str, np.ndarray]], int]] = {}
        self._windows: dict[tuple[int, int], Future[Window]] = {}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="distilcache-loader")

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.steps_per_epoch

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Several batches at once (what a ``DataLoader`` calls)."""
        return [self[k] for k in indices]

    def __getitem__(self, k: int) -> Batch:
        """This rank's part of batch k of the run."""
        if self._process != os.getpid():  # A worker of a DataLoader.
            self._begin()
        epoch, step = divmod(k, self.steps_per_epoch)
        window, step = divmod(step, self.layout.window_steps)
        ready = self._prefetch(epoch, window).result()
        share = self.layout.share * len(self.streams)
        is_last = step == self.layout.steps_in(window) - 1
        last = len(ready.lengths) if is_last else (step + 1) * share
        return batch_of(ready, step * share, last, self._plan)

    def _prefetch(self, epoch: int, window: int) -> Future[Window]:
        """Start this window and the next, forget all others."""
        is_last = window + 1 == self.layout.windows
        following = (epoch + 1, 0) if is_last else (epoch, window + 1)
        kept = {}
        for key in ((epoch, window), following):
            future = self._windows.get(key)
            kept[key] = future or self._pool.submit(self._load_window, *key)
        self._windows = kept
        return kept[(epoch, window)]

    def _first_block(self, epoch: int) -> int:
        """Global number of the first block of the epoch's round."""
        rounds = self.cache.index["round"]
        # A needle of another type would make a copy of the column.
        needle = np.array(epoch % self.cache.manifest.rounds, rounds.dtype)
        return int(np.searchsorted(rounds, needle))

    def _block_sequences(self, epoch: int) -> np.ndarray:
        """Sequences per block of the epoch's round, as the index has them."""
        first, rounds = self._first_block(epoch), self.cache.manifest.rounds
        end = self._first_block(epoch + 1) if (epoch + 1) % rounds else self.cache.num_blocks
        sizes: np.ndarray = self.cache.index["sequences"][first:end]
        return sizes

    def _order(self, epoch: int) -> EpochOrder:
        """The order of an epoch; those of two epochs are kept."""
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
        pieces: list[Piece] = []
        rows, first = [], 0
        for stream in self.streams:
            read = list(self._read(epoch, window, stream))
            lengths = np.concatenate([piece.counts["token"] for piece in read])
            shuffled = order.shuffle(window, stream)
            grouped = group_by_length(lengths, shuffled, layout.share, batch_order)
            rows.append(first + grouped.astype(np.int64))
            pieces += read
            first += len(lengths)
        read.clear()
        joined = join(pieces)
        pieces.clear()  # So that their memory is free before the next copy.
        return shuffle(joined, interleave(rows, layout.share, steps))

    def _read(self, epoch: int, window: int, stream: int) -> Iterator[Piece]:
        """The pieces of blocks that a stream's window consists of, decoded."""
        first = self._first_block(epoch)
        for part in self._order(epoch).parts(window, stream):
            block = self._decoded(first + part.block, part.start, part.stop)
            yield read_piece(block, part.start, part.stop, self._plan)

    def _decoded(self, number: int, start: int, stop: int) -> Mapping[str, np.ndarray]:
        """A block; one that lies in several windows is decoded once, and kept for all of them."""
        size = int(self.cache.index["sequences"][number])
        if stop - start == size:
            return self.cache.read_block(number)
        with self._lock:
            future, left = self._cut_blocks.pop(number, (None, size))
            is_first = future is None
            future = future or Future()
            if left > stop - start:
                self._cut_blocks[number] = future, left - (stop - start)
            # What is left of an epoch's or a rank's last blocks nobody asks for.
            if len(self._cut_blocks) > 2 * len(self.streams) + 2:
                self._cut_blocks.pop(next(iter(self._cut_blocks)))
        if is_first:
            try:
                future.set_result(self.cache.read_block(number))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def batch_of(window: Window, first: int, last: int, plan: Plan) -> Batch:
    """Sequences ``first`` to ``last`` of a window as one padded batch."""
    lengths = window.lengths[first:last]
    width = int(lengths.max())
    ids = _items(window, "token", first, last)["input_ids"].astype(np.int64)
    present: np.ndarray | None = None
    batch: dict[str, np.ndarray] = {}
    if (lengths == width).all():
        batch["input_ids"] = ids.reshape(-1, width)
    else:
        present = np.arange(width) < lengths[:, None]
        padded = np.full(present.shape, plan.encoding.pad_id, np.int64)
        padded[present] = ids
        batch["input_ids"], batch["attention_mask"] = padded, present.astype(np.int64)
    sets = dict.fromkeys(("masked", plan.hidden_set, plan.ce_set))
    index = {n: _index(window, n, first, last, width, present) for n in sets if n}
    masked = _items(window, "masked", first, last)
    batch["masked_index"] = index["masked"]
    batch["labels"] = masked["labels"].astype(np.int64)
    if plan.hidden_set is not None:
        batch["hidden_index"] = index[plan.hidden_set]
        stored = _items(window, plan.hidden_set, first, last)
        if "weight" in stored:
            batch["hidden_weight"] = stored["weight"]
        for held in plan.encoding.hidden:
            if held.column in stored:
                rows = stored[held.column]
                batch[held.column] = rows.T if held.dtype == "coded" else rows
    if plan.ce_set is not None:
        batch |= _ce_columns(_items(window, plan.ce_set, first, last), index, plan)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _ce_columns(
    stored: dict[str, np.ndarray], index: dict[str, np.ndarray], plan: Plan
) -> dict[str, np.ndarray]:
    """What L_ce reads besides the hidden states."""
    batch = {"ce_index": index[str(plan.ce_set)]}
    if "weight" in stored:
        batch["ce_weight"] = stored["weight"]
    if plan.signal != "sparse" and plan.hidden_set not in (None, plan.ce_set):
        batch["ce_rows"] = np.searchsorted(index[str(plan.hidden_set)], batch["ce_index"])
    for name in ("logit_ids", "tail_ids", "residual_ids"):
        if name in stored:
            batch[name] = stored[name].astype(np.int64)
    for name in ("logit_values", "log_odds", "residual_mass"):
        if name in stored:
            batch[name] = stored[name].astype(np.float32, copy=False)
    return batch


def _items(window: Window, name: str, first: int, last: int) -> dict[str, np.ndarray]:
    """Columns of one set, cut to sequences ``first`` to ``last``; views."""
    cut = slice(*window.starts[name][[first, last]])
    return {key: column[cut] for key, column in window.columns[name].items()}


def _index(
    window: Window, name: str, first: int, last: int, width: int, present: np.ndarray | None
) -> np.ndarray:
    """Flat index into the padded B * L positions of each item of a set, ascending, int64."""
    if name == "token":
        size = (last - first) * width
        return np.arange(size) if present is None else np.flatnonzero(present.reshape(-1))
    counts = np.diff(window.starts[name][first : last + 1])
    rows = np.repeat(np.arange(last - first) * width, counts)
    index: np.ndarray = rows + _items(window, name, first, last)["positions"]
    return index
