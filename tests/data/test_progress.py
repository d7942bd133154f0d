"""Bars on a terminal, plain lines elsewhere."""

import io
import sys
import time
from types import SimpleNamespace

import pytest

from distilcache.data import progress
from distilcache.data.progress import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(monkeypatch, stream, steps=8, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    with Bar(total=steps, desc="stage", **options) as bar:
        for _ in range(steps):
            time.sleep(0.02)
            bar.update()
            Bar.write("stage: a remark", file=sys.stderr)
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.04)
    said = work(monkeypatch, io.StringIO(), unit="batch")
    assert "\r" not in said
    assert "\x1b" not in said
    lines = [line for line in said.splitlines() if line != "stage: a remark"]
    assert 2 <= len(lines) <= 6, lines
    assert lines[0].startswith("stage: ")
    assert "of 8, " in lines[0]
    assert lines[0].endswith("00:00 left")
    assert lines[-1].startswith("stage: 100%, 8 of 8, ")


def test_short_work_says_nothing(monkeypatch):
    assert set(work(monkeypatch, io.StringIO(), 3).splitlines()) == {"stage: a remark"}


def test_no_state_is_said_twice(monkeypatch):
    """Work whose first piece takes minutes says once that it has begun."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with Bar(total=4, desc="stage", unit="tok") as bar:
        for clock.now in range(300):
            bar.update(int(clock.now in (200, 201, 290)))
            bar.refresh()  # as tqdm's own thread does now and then
    done = [line.split(", ")[1] for line in stream.getvalue().splitlines()]
    assert done == ["0 of 4", "1 of 4", "2 of 4", "3 of 4"]


@pytest.mark.parametrize("total", [None, 2, 3])
def test_one_pass_over_something(monkeypatch, total):
    """A total that was an estimate, and too low, is left out in the end."""
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(Bar(iter("abc"), total=total, desc="view", unit="sequence")) == list("abc")
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("view: 100%, 3 of 3" if total == 3 else "view: 3 sequence")


def test_a_bar_on_a_terminal(monkeypatch):
    assert "\r" in work(monkeypatch, Terminal(), file=None)
