"""A cache that somebody hostile may change, and little memory to read it with."""

import resource
from pathlib import Path

import pytest

ROOM = 700 << 20
"""Memory that a refusal may take at most, beyond what the process has: address space, not RAM."""


@pytest.fixture(scope="session")
def sound(small_cache) -> Path:
    """A cache of one round with coded hidden states of two layers."""
    return small_cache(corpus={"documents": 30}, hidden_layers=(1, -1))


@pytest.fixture
def little_memory():
    """No more address space than there is now, and some."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
