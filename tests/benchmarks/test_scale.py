"""The benchmark of a very large index, with a small one."""

import json

import psutil
import pytest
from click.testing import CliRunner

from benchmarks.scale import STEPS, made_up_markers, main, memory
from distilcache.data.cache.cache import Cache
from distilcache.data.cache.manifest import finish_cache
from distilcache.data.cache.schema import Encoding
from distilcache.data.verify.run import Settings, verify_cache

PROVENANCE = {"identity": {"made_up": True}, "environment": {}}


def test_every_step_is_measured(tmp_path):
    arguments = ["--shards", "40", "--blocks", "1200", "--repetitions", "1"]
    out, figures = tmp_path / "scale", tmp_path / "scale.json"
    done = CliRunner().invoke(main, [*arguments, "--out", str(out), "--json", str(figures)])
    assert done.exit_code == 0, (done.output, done.exception)
    steps = json.loads(figures.read_text())["steps"]
    assert tuple(steps) == STEPS
    assert steps["finish"]["blocks"] == steps["open"]["blocks"] == 1200
    assert 0 <= steps["resume"]["step"] < steps["resume"]["steps"]
    assert steps["order"]["blocks_read"] > 10
    assert all(found["peak_mb"] >= found["private_mb"] > 1 for found in steps.values())
    assert not out.exists()


def test_memory_is_in_millions_of_bytes():
    known = psutil.Process().memory_info().rss / 1e6
    assert memory()["resident_mb"] == pytest.approx(known, rel=0.02)


def test_memory_does_not_grow_with_the_index(tmp_path, monkeypatch):
    """Markers are taken one by one, and no column is ever in memory as a whole."""
    import tracemalloc

    peaks = []
    for shards in (200, 2000):
        out = tmp_path / str(shards)
        (out / "teacher").mkdir(parents=True)
        tracemalloc.start()
        finish_cache(
            out,
            made_up_markers(shards, 30 * shards, 2),
            encoding=Encoding(vocab_size=100, max_length=128, pad_id=0, mask_only=True),
            head=None,
            provenance=PROVENANCE,
            rounds=2,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 100_000, peaks
    cache = Cache.open(out)
    assert cache.num_blocks == 60_000
    markers = list(made_up_markers(2000, 60_000, 2))
    rows = [row for marker in markers for row in marker["blocks"]]
    for number in (0, 1, 31, 29_999, 30_000, 59_999):
        entry = cache.entry(number)
        assert {name: getattr(entry, name) for name in rows[number]} == rows[number]
    assert cache.round_range(1) == range(30_000, 60_000)
    assert cache.manifest.totals["tokens"] == sum(row["tokens"] for row in rows)
    # No shard is there, and each is named.
    names = {fault.text for fault in verify_cache(out, Settings(workers=1, fast=True))}
    assert sum("must have its .json marker" in text for text in names) == 1000  # of two rounds
