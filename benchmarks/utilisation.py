"""How well a device is used: the rate of its matrix products, and when no kernel runs."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from distilcache.stages.models.device import synchronise

MATMUL = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the product that utilisation is measured against."""
COPIES = ("Memcpy", "Memset")
"""How the profiler's names of copies begin."""


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product: the median of 20."""
    size = MATMUL[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(21):
        begun = time.perf_counter()
        torch.matmul(a, b)
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return float(2 * size**3 / statistics.median(seconds[1:]))


def idle_share(run: Callable[[], None], device: torch.device) -> float | None:
    """Share of the time from the first to the last kernel in which none ran.

    Copies are no kernels. None on a CPU, and where the profiler may not see the device.
    """
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        synchronise(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type.name == "CUDA" and not event.name.startswith(COPIES)
    ]
    return uncovered(spans) if spans else None


def top_kernels(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """The ten kernels that take most time, with their fractions of it; operators on a CPU."""
    kind = device.type.upper()
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
        synchronise(device)
    attribute = f"self_{'device' if kind == 'CUDA' else 'cpu'}_time_total"
    times = {event.key: getattr(event, attribute) for event in profiler.key_averages()}
    whole = sum(times.values()) or 1.0
    largest = sorted(times, key=lambda name: -times[name])[:10]
    return {name: times[name] / whole for name in largest}


def uncovered(spans: Iterable[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end that no span covers."""
    ordered = sorted(spans)
    begun = reached = ordered[0][0]
    busy = 0.0
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - begun)
