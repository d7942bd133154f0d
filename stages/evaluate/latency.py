"""Speed of models: latency at batch 1 and throughput.

A pass is timed as a user calls the saved model: for a masked LM, encoder and LM head at every
position. Models take turns, so that a slow minute of the machine affects all of them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distilcache.data.progress import Bar
from distilcache.stages.models.device import synchronise

Times = npt.NDArray[np.float64]
# Logits of one throughput batch: 2^28 float32 values are 1 GiB.
_BATCH_LOGITS = 2**28
# Passes of each model before the clock counts; a batched one is long enough to warm up alone.
_WARMUP_SINGLE, _WARMUP_BATCHED = 2, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Median and quartiles of one model."""

    latency_ms: float
    """Median time of a forward pass of one sequence, in milliseconds."""
    latency_ms_q1: float
    """First quartile of the same."""
    latency_ms_q3: float
    """Third quartile of the same."""
    tokens_per_s: float
    """Median throughput at the throughput batch."""
    tokens_per_s_q1: float
    """First quartile of the same."""
    tokens_per_s_q3: float
    """Third quartile of the same."""


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where figures were measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def throughput_batch_size(limit: int, max_length: int, vocab_size: int) -> int:
    """Sequences per throughput batch: ``limit``, or fewer if the logits would be too large."""
    return max(1, min(limit, _BATCH_LOGITS // (max_length * vocab_size)))


def measure_speed(
    models: Sequence[nn.Module],
    *,
    max_length: int,
    vocab_size: int,
    batch_size: int,
    repeats: int,
    device: torch.device,
    end_id: int | None = None,
) -> list[Speed]:
    """Time every model at batch 1 and at ``batch_size``.

    Args:
        models: Models on ``device``, in evaluation mode, with weights in the type to time.
        max_length: Tokens per sequence.
        vocab_size: Ids are drawn below it.
        batch_size: Sequences per throughput pass.
        repeats: Timed passes per model at batch 1; a fifth of them for throughput.
        device: Device of the models.
        end_id: A token that ends each sequence and stands nowhere else; None: none.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, max_length)
    ids_BL = torch.randint(vocab_size, shape, generator=generator).to(device)
    if end_id is not None:
        ids_BL[ids_BL == end_id] = 0 if end_id else 1
        ids_BL[:, -1] = end_id
    passes = max(3, repeats // 5)
    with Bar(total=repeats + passes, desc="speed", unit="turn") as bar:
        single = _take_turns(models, ids_BL[:1], _WARMUP_SINGLE, repeats, device, bar)
        batched = _take_turns(models, ids_BL, _WARMUP_BATCHED, passes, device, bar)
    return [
        Speed(
            **_quartiles("latency_ms", 1e3 * latency_s),
            **_quartiles("tokens_per_s", ids_BL.numel() / pass_s),
        )
        for latency_s, pass_s in zip(single, batched, strict=True)
    ]


def _quartiles(name: str, values: Times) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {name: median, f"{name}_q1": low, f"{name}_q3": high}


def _take_turns(
    models: Sequence[nn.Module],
    ids_BL: Tensor,
    warmup: int,
    repeats: int,
    device: torch.device,
    bar: Bar,
) -> list[Times]:
    """Seconds per pass, ``repeats`` per model, after a warm-up."""
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for model in models:
            for _ in range(warmup):
                _timed(model, ids_BL, device)
        for _ in range(repeats):
            for model, times in zip(models, seconds, strict=True):
                times.append(_timed(model, ids_BL, device))
            bar.update()
    return [np.array(times) for times in seconds]


def _timed(model: nn.Module, ids_BL: Tensor, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    model(input_ids=ids_BL)
    synchronise(device)
    return time.perf_counter() - start
