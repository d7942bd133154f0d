"""When no kernel runs, from the spans of a profiler."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.utilisation import idle_share, uncovered


def test_the_time_that_no_kernel_covers():
    assert uncovered([(0, 4), (1, 2), (3, 5), (6, 8), (8, 10)]) == pytest.approx(0.1)
    assert uncovered([(2, 3)]) == 0


class Profiler:
    """Has seen these events."""

    def __init__(self, events):
        self.events = lambda: events

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def event(name, start, end, device="CUDA"):
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        time_range=SimpleNamespace(start=start, end=end),
    )


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([event("gemm", 0, 4), event("Memcpy DtoH", 4, 6), event("softmax", 6, 10)], 0.2),
        ([event("gemm", 0, 4), event("gemm", 4, 10), event("launch", 0, 99, "CPU")], 0.0),
        ([event("launch", 0, 99, "CPU")], None),  # it may not see the device
    ],
)
def test_copies_are_no_kernels(monkeypatch, events, expected):
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profiler(events))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    ran = []
    share = idle_share(lambda: ran.append(1), torch.device("cuda"))
    assert share == (None if expected is None else pytest.approx(expected))
    assert ran == [1]
