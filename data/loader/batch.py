"""A slice of a window of sequences as one padded batch; its keys are those of ``CachedBatches``.

Shapes: ``B`` sequences, ``L`` positions.
"""

import numpy as np
import torch

from distilcache.data.loader.window import Plan, Window

Batch = dict[str, torch.Tensor]


def batch_of(window: Window, first: int, last: int, plan: Plan) -> Batch:
    """Sequences ``first`` to ``last`` of a window as one padded batch."""
    lengths = window.lengths[first:last]
    width = int(lengths.max())
    ids = _items(window, "token", first, last)["input_ids"].astype(np.int64)
    present: np.ndarray | None = None
    batch: dict[str, np.ndarray] = {}
    if (lengths == width).all():
        batch["input_ids"] = ids.reshape(-1, width)
        batch["attention_mask"] = np.ones(batch["input_ids"].shape, np.int64)
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
        for layer in plan.encoding.hidden:
            if layer.column in stored:
                rows = stored[layer.column]
                batch[layer.column] = rows.T if layer.dtype == "coded" else rows
    if plan.relation and plan.encoding.relation is not None:
        relation = plan.encoding.relation
        rows = _items(window, "token", first, last)[relation.column]
        batch[relation.column] = rows.T if relation.dtype == "coded" else rows
        if present is not None:
            batch["relation_index"] = np.flatnonzero(present.reshape(-1))
    if plan.ce_set is not None:
        batch |= _ce_columns(_items(window, plan.ce_set, first, last), index, plan)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def without_idle_mask(batch: Batch) -> Batch:
    """The batch without an ``attention_mask`` that masks nothing; models are faster without one.

    For a batch on the host: a device would have to be waited for.
    """
    if bool((batch["attention_mask"] == 0).any()):
        return batch
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


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
