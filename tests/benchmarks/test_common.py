"""What benchmarks share: the machine that they name, names that an option lists."""

import pytest
import torch

from benchmarks.common import environment, median_of, names_among, ratios_to, take_turns
from distilcache.data.errors import UserError


def test_the_machine_is_that_of_the_device_that_auto_finds(monkeypatch):
    assert environment()["device"] == environment("cpu")["device"] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a fast {device.type}")
    assert environment("auto")["device"] == environment("cuda")["device"] == "a fast cuda"
    assert environment()["device"] == "cpu", "work that is on a CPU by its nature"


def test_unknown_names_are_refused():
    assert names_among("arms", "b,a c", {"a": 1, "b": 2, "c": 3}) == ["b", "a", "c"]
    with pytest.raises(UserError, match="--arms must be among a, b, got z"):
        names_among("arms", "a z", ("a", "b"))


def test_medians():
    assert median_of([5.0]).q3 == 5.0
    assert (median_of([4.0, 1.0, 3.0, 2.0]).median, median_of([1.0, 2.0, 3.0]).q1) == (2.5, 1.5)
    assert f"{median_of([1.0, 2.0, 3.0]):.1f}" == "2.0 [1.5, 2.5]"


def test_arms_take_turns_and_warm_up():
    calls = []
    arms = {name: lambda i, name=name: calls.append(name) or i for name in "ab"}
    assert take_turns(arms, 2, warm_up=True) == {"a": [1, 2], "b": [1, 2]}
    assert calls == list("ababab")
    assert take_turns(arms, 1) == {"a": [0], "b": [0]}


def test_ratios_are_of_one_repetition():
    found = {"x": [2.0, 9.0], "y": [1.0, 3.0], "z": [4.0, 1.0]}
    assert ratios_to(found, "x") == {"x / y": [2.0, 3.0], "x / z": [0.5, 9.0]}
