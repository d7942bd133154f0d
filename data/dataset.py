"""Blocks to training batches: columns end to end, no loop per sequence or token.

A window of blocks is decoded and shuffled as a whole by background threads; a batch is then a
slice of the window. Batch k is a pure function of (cache, seed, k), so a resumed run needs only
its step number.

Shapes: ``B`` sequences, ``L`` positions, ``M`` masked positions of a batch, ``N`` positions of
L_ce, ``H`` positions with hidden states, ``K`` stored logits, ``R`` draws, ``S`` temperatures.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset

from data.cache import Cache
from data.order import EpochOrder, group_by_length
from data.window import Plan, Window, join, read_piece, shuffle

Batch = dict[str, torch.Tensor]


class CachedBatches(Dataset[Batch]):
    """Map-style dataset whose items are whole batches.

    Item ``k = epoch * steps_per_epoch + i`` is the i-th batch of an epoch; epoch e reads round
    ``e mod rounds``. Keys of a batch:

    - ``input_ids`` int64 [B, L], padded; ``attention_mask`` int64 [B, L] where there is padding
    - ``masked_index`` int64 [M] into the flattened B * L positions, ``labels`` int64 [M]
    - ``hidden_index`` int64 [H] and ``hidden_<l>`` for :class:`data.codecs.hidden.HiddenDecoder`
      where hidden states are read (byte planes [G, H] lie by position in memory);
      ``hidden_weight`` float32 [H] where they count differently
    - ``ce_index`` int64 [N] where there is a ``signal``: positions of L_ce, all masked ones among
      them; ``ce_weight`` float32 [N] where they count differently; ``ce_rows`` int64 [N]: their
      rows among the hidden states, in replay where these are more
    - ``logit_ids`` int64 [N, K], ``logit_values`` float32 [N, K] and ``log_odds`` float32 [N, S]
      (see :mod:`data.codecs.logits`) for ``sparse``, ``replay+head`` and ``replay+residual``
    - ``tail_ids`` int64 [N, R] for ``sparse``; ``residual_ids`` int64 [N, R] and
      ``residual_mass`` float32 [N] for ``replay+residual``, where the cache has them

    Args:
        cache: An open cache.
        batch_size: Sequences per batch B; the last batch of an epoch may be smaller.
        seed: Seed of the order.
        window_blocks: Blocks shuffled together.
        signal: ``replay``, ``replay+head``, ``replay+residual``, ``sparse`` or None.
        hidden: Read the last layer's hidden states.
        layers: Further layers whose hidden states are read.
        restrict_ce_to_mask: L_ce at masked positions alone, whatever the cache holds.
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
        self._hidden_set, self._ce_set = self._plan.hidden_set, self._plan.ce_set
        per_block = int(cache.index["sequences"][cache.round_blocks(0)].max())
        self._window_sequences = -(-window_blocks * per_block // batch_size) * batch_size
        self._total = int(cache.index["sequences"][cache.round_blocks(0)].sum())
        self.steps_per_epoch = -(-self._total // batch_size)
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
        read = self.cache.read_block
        joined = join(  # Names no piece, so that their memory is free before the next copy.
            [
                read_piece(read(int(blocks[part.block])), part.start, part.stop, self._plan)
                for part in order.parts(window)
            ]
        )
        rows = group_by_length(joined.counts["token"], order.shuffle(window), self.batch_size)
        return shuffle(joined, rows)

    def _slice(self, window: Window, first: int, last: int) -> Batch:
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
            padded = np.full(present.shape, self.cache.encoding.pad_id, np.int64)
            padded[present] = ids
            batch["input_ids"], batch["attention_mask"] = padded, present.astype(np.int64)
        sets = dict.fromkeys(("masked", self._hidden_set, self._ce_set))
        index = {n: _index(window, n, first, last, width, present) for n in sets if n}
        masked = _items(window, "masked", first, last)
        batch["masked_index"] = index["masked"]
        batch["labels"] = masked["labels"].astype(np.int64)
        if self._hidden_set is not None:
            batch["hidden_index"] = index[self._hidden_set]
            stored = _items(window, self._hidden_set, first, last)
            if "weight" in stored:
                batch["hidden_weight"] = stored["weight"]
            for held in self.cache.encoding.hidden:
                if held.column in stored:
                    rows = stored[held.column]
                    batch[held.column] = rows.T if held.dtype == "coded" else rows
        if self._ce_set is not None:
            batch |= self._ce(_items(window, self._ce_set, first, last), index)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _ce(
        self, stored: dict[str, np.ndarray], index: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """What L_ce reads besides the hidden states."""
        batch = {"ce_index": index[str(self._ce_set)]}
        if "weight" in stored:
            batch["ce_weight"] = stored["weight"]
        if self._plan.signal != "sparse" and self._hidden_set not in (None, self._ce_set):
            batch["ce_rows"] = np.searchsorted(index[str(self._hidden_set)], batch["ce_index"])
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
