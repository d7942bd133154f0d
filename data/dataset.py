"""Blocks to training batches: columns end to end, no loop per sequence or token.

A window of blocks is decoded and shuffled as a whole by background threads; a batch is then a
slice of the window. Batch k is a pure function of (cache, seed, k), so a resumed run needs only
its step number.

Shapes: ``B`` sequences, ``L`` positions, ``M`` masked and ``N`` signal positions of a batch,
``K`` stored logits, ``S`` temperatures, ``D`` hidden width, ``W`` wide planes.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from data.cache import Cache
from data.codecs.logits import unpack_values
from data.order import EpochOrder, group_by_length
from data.schema import Encoding, HiddenEncoding

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Window:
    """A decoded, shuffled window: flat columns and where each sequence starts in them."""

    lengths: np.ndarray
    token_starts: np.ndarray
    masked_starts: np.ndarray
    signal_starts: np.ndarray
    columns: dict[str, np.ndarray]
    """Row-major columns [items, ...] and planes [planes, items], see ``_AXIS``."""


class CachedBatches(Dataset[Batch]):
    """Map-style dataset whose items are whole batches.

    Item ``k = epoch * steps_per_epoch + i`` is the i-th batch of an epoch; epoch e reads round
    ``e mod rounds``. Keys of a batch:

    - ``input_ids`` int64 [B, L], padded; ``attention_mask`` int64 [B, L] where there is padding
    - ``masked_index`` int64 [M] into the flattened B * L positions, ``labels`` int64 [M]
    - ``signal_index`` int64 [N] where signals are read
    - ``logit_ids`` int64 [N, K], ``logit_values`` float32 [N, K], ``logsumexp`` and ``log_tail``
      float32 [N, S] for ``signal="sparse"``
    - ``hidden_*`` for :class:`data.codecs.hidden.HiddenDecoder` where ``hidden`` is set

    Args:
        cache: An open cache.
        batch_size: Sequences per batch B; the last batch of an epoch may be smaller.
        seed: Seed of the order.
        window_blocks: Blocks shuffled together.
        signal: ``replay``, ``sparse`` or None (masks and labels alone).
        hidden: Read the last layer's hidden states.
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
    ) -> None:
        self.cache = cache
        self.batch_size = batch_size
        self.seed = seed
        self._logits = signal == "sparse"
        self._hidden = cache.encoding.hidden_layer() if hidden else None
        self._signals = not cache.encoding.mask_only and (signal is not None or hidden)
        per_block = int(cache.index["sequences"][cache.round_blocks(0)].max())
        self._window_sequences = -(-window_blocks * per_block // batch_size) * batch_size
        self._total = int(cache.index["sequences"][cache.round_blocks(0)].sum())
        self.steps_per_epoch = -(-self._total // batch_size)
        self._orders: dict[int, EpochOrder] = {}
        self._windows: dict[tuple[int, int], Future[Window]] = {}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="distilcache-loader")

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.steps_per_epoch

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Several batches at once (what a ``DataLoader`` calls)."""
        return [self[k] for k in indices]

    def __getitem__(self, k: int) -> Batch:
        """Batch k of the run."""
        epoch, step = divmod(k, self.steps_per_epoch)
        window, first = divmod(step * self.batch_size, self._window_sequences)
        ready = self._prefetch(epoch, window).result()
        last = min(first + self.batch_size, len(ready.lengths))
        return self._slice(ready, first, last)

    def _prefetch(self, epoch: int, window: int) -> Future[Window]:
        """Start this window and the next, forget all others."""
        windows = -(-self._total // self._window_sequences)
        following = (epoch, window + 1) if window + 1 < windows else (epoch + 1, 0)
        kept = {}
        for key in ((epoch, window), following):
            future = self._windows.get(key)
            kept[key] = future or self._pool.submit(self._load_window, *key)
        self._windows = kept
        return kept[(epoch, window)]

    def _order(self, epoch: int) -> tuple[EpochOrder, np.ndarray]:
        blocks = self.cache.round_blocks(epoch % self.cache.manifest.rounds)
        sizes = self.cache.index["sequences"][blocks]
        return EpochOrder(sizes, self.seed, epoch, self._window_sequences), blocks

    def _load_window(self, epoch: int, window: int) -> Window:
        order, blocks = self._order(epoch)
        encoding = self.cache.encoding
        pieces = [
            _cut(
                self.cache.read_block(int(blocks[part.block])),
                part.start,
                part.stop,
                encoding,
                self._logits,
                self._hidden if self._signals else None,
            )
            for part in order.parts(window)
        ]
        joined = {
            name: np.concatenate([piece[name] for piece in pieces], axis=_AXIS.get(name, 0))
            for name in pieces[0]
        }
        rows = group_by_length(joined["lengths"], order.shuffle(window), self.batch_size)
        return _shuffle(joined, rows, encoding.positions)

    def _slice(self, window: Window, first: int, last: int) -> Batch:
        """Sequences ``first`` to ``last`` of a window as one padded batch."""
        lengths = window.lengths[first:last]
        width = int(lengths.max())
        tokens = slice(window.token_starts[first], window.token_starts[last])
        masked = slice(window.masked_starts[first], window.masked_starts[last])
        signal = slice(window.signal_starts[first], window.signal_starts[last])
        columns = window.columns
        batch: dict[str, np.ndarray] = {}
        ids = columns["input_ids"][tokens].astype(np.int64)
        present: np.ndarray | None = None
        if (lengths == width).all():
            batch["input_ids"] = ids.reshape(-1, width)
        else:
            present = np.arange(width) < lengths[:, None]
            padded = np.full(present.shape, self.cache.encoding.pad_id, np.int64)
            padded[present] = ids
            batch["input_ids"], batch["attention_mask"] = padded, present.astype(np.int64)
        per_sequence = np.diff(window.masked_starts[first : last + 1])
        rows = np.repeat(np.arange(last - first) * width, per_sequence)
        batch["masked_index"] = rows + columns["masked_positions"][masked]
        batch["labels"] = columns["labels"][masked].astype(np.int64)
        if self._signals:
            everywhere = self.cache.encoding.positions == "all"
            batch["signal_index"] = batch["masked_index"]
            if everywhere:
                size = (last - first) * width
                batch["signal_index"] = (
                    np.arange(size) if present is None else np.flatnonzero(present.reshape(-1))
                )
            for name in columns.keys() & _SIGNALS:
                cut = (slice(None), signal) if _AXIS.get(name) == 1 else signal
                batch[name] = np.ascontiguousarray(columns[name][cut])
        return {name: torch.from_numpy(array) for name, array in batch.items()}


_AXIS = {"hidden_wide": 1, "hidden_narrow": 1}
"""Planes are [planes, items]; every other column is [items, ...]."""
_SIGNALS = {
    "logit_ids",
    "logit_values",
    "logsumexp",
    "log_tail",
    "hidden_raw",
    "hidden_wide",
    "hidden_narrow",
}


def _cut(
    block: Mapping[str, np.ndarray],
    start: int,
    stop: int,
    encoding: Encoding,
    logits: bool,
    hidden: HiddenEncoding | None,
) -> dict[str, np.ndarray]:
    """Views of sequences ``start`` to ``stop`` of one decoded block, in loader names."""
    token_ends = np.concatenate([[0], np.cumsum(block["lengths"], dtype=np.int64)])
    masked_ends = np.concatenate([[0], np.cumsum(block["masked_counts"], dtype=np.int64)])
    masked = slice(masked_ends[start], masked_ends[stop])
    tokens = slice(token_ends[start], token_ends[stop])
    signal = tokens if encoding.positions == "all" else masked
    count = token_ends[-1] if encoding.positions == "all" else masked_ends[-1]
    piece = {
        "lengths": block["lengths"][start:stop],
        "masked_counts": block["masked_counts"][start:stop],
        "input_ids": block["input_ids"][tokens],
        "masked_positions": block["masked_positions"][masked],
        "labels": block["labels"][masked],
    }
    if logits:
        piece["logit_ids"] = block["logit_ids"].reshape(count, -1)[signal].astype(np.int64)
        piece["logit_values"] = unpack_values(block, encoding.top_k)[signal]
        piece["logsumexp"] = block["logsumexp"].reshape(count, -1)[signal]
        piece["log_tail"] = block["log_tail"].reshape(count, -1)[signal]
    if hidden is not None and hidden.dtype == "coded":
        for part, planes in (
            ("wide", hidden.wide_planes),
            ("narrow", hidden.width - hidden.wide_planes),
        ):
            stored = block[f"{hidden.column}_{part}"].reshape(planes, count)
            piece[f"hidden_{part}"] = stored[:, signal]
    elif hidden is not None:
        piece["hidden_raw"] = block[hidden.column].reshape(count, hidden.width)[signal]
    return piece


def _shuffle(columns: dict[str, np.ndarray], rows: np.ndarray, positions: str) -> Window:
    """Bring the sequences of all columns into the order ``rows``."""
    lengths = columns.pop("lengths").astype(np.int64)
    counts = columns.pop("masked_counts").astype(np.int64)
    tokens, token_starts = _gather(lengths, rows)
    masked, masked_starts = _gather(counts, rows)
    everywhere = positions == "all"
    signal = tokens if everywhere else masked
    picks = {"input_ids": tokens, "masked_positions": masked, "labels": masked}
    shuffled = {
        name: np.take(column, picks.get(name, signal), axis=_AXIS.get(name, 0))
        for name, column in columns.items()
    }
    return Window(
        lengths[rows],
        token_starts,
        masked_starts,
        token_starts if everywhere else masked_starts,
        shuffled,
    )


def _gather(counts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Item indices that bring ragged rows into a new order, and the new row starts [n + 1]."""
    starts = np.cumsum(counts) - counts
    picked = counts[rows]
    ends = np.cumsum(picked)
    shift = np.repeat(starts[rows] - (ends - picked), picked)
    return shift + np.arange(len(shift)), np.concatenate([[0], ends])
