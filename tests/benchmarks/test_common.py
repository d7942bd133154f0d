"""What benchmarks share: the machine that they name, names that an option lists."""

import pytest
import torch

from benchmarks.common import environment, names_among
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
