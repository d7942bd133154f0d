"""What a task model answers to examples, and its hidden states of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distilcache.stages.evaluate.tasks.catalogue import SPAN, TAGS
from distilcache.stages.evaluate.tasks.features import Collate, Encoded, fit_length
from distilcache.stages.evaluate.tasks.finetune import Place
from distilcache.stages.evaluate.tasks.task_models import (
    logits_and_state_of,
    logits_of,
    takes_types,
)
from distilcache.stages.models.device import autocast
from distilcache.stages.models.families import family_of

PREDICT_BATCH = 4
"""Prediction batches are this many times larger: they keep nothing for a backward pass."""


def predict(
    model: nn.Module, kind: str, encoded: Encoded, batch_size: int, place: Place
) -> NDArray[np.float32]:
    """Logits of all examples, [N, C]; [N, 2, L] or [N, C, L] with L of the longest."""
    order, batches = _batches(model, encoded, batch_size, place)
    with torch.inference_mode(), autocast(place.device, place.dtype):
        found = [logits_of(model, kind, inputs) for inputs in batches]
    if kind in (SPAN, TAGS):
        longest = max(logits.shape[-1] for logits in found)
        found = [fit_length(logits, longest) for logits in found]
    return _unsorted(found, order)


def predict_with_states(
    model: nn.Module, encoded: Encoded, batch_size: int, place: Place
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Logits of all examples [N, C], and their final hidden states of [CLS], [N, W]; no spans."""
    order, batches = _batches(model, encoded, batch_size, place)
    logits, states = [], []
    with torch.inference_mode(), autocast(place.device, place.dtype):
        for inputs in batches:
            logits_BC, state_BW = logits_and_state_of(model, inputs, encoded.cls)
            logits.append(logits_BC)
            states.append(state_BW.half().cpu())  # In float32, gigabytes for the largest tasks.
    return _unsorted(logits, order), _unsorted(states, order)


def _batches(
    model: nn.Module, encoded: Encoded, batch_size: int, place: Place
) -> tuple[NDArray[np.int64], Iterator[dict[str, Tensor]]]:
    """Order of examples, the longest first, and the model's inputs in that order."""
    model.eval().to(place.device)
    order = np.argsort(-encoded.lengths, kind="stable")
    # Some models read padding: what they say of a text must not depend on those beside it.
    even = bool(family_of(model.config).even)
    collate = Collate(encoded, types=takes_types(model), multiple=1 if even else place.multiple)
    ends: Any = np.flatnonzero(np.diff(encoded.lengths[order])) + 1 if even else []

    def inputs() -> Iterator[dict[str, Tensor]]:
        for group in np.split(order, ends):
            for start in range(0, len(group), batch_size * PREDICT_BATCH):
                batch = collate(group[start : start + batch_size * PREDICT_BATCH].tolist())
                del batch["labels"]
                yield {k: v.to(place.device, non_blocking=True) for k, v in batch.items()}

    return order, inputs()


def _unsorted(batches: Sequence[Tensor], order: NDArray[np.int64]) -> NDArray[Any]:
    """Rows in the original order of the examples."""
    rows = torch.cat(list(batches)).cpu().numpy()
    found = np.empty_like(rows)
    found[order] = rows
    return found
