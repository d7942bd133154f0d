"""The loader's benchmark runs, and its plain loader holds the same batches' content."""

import json

import torch
from click.testing import CliRunner

from benchmarks.loader import main, ours, samples
from data.cache import Cache


def test_every_arm_reads_the_cache(small_cache, tmp_path):
    written = tmp_path / "loader.json"
    cache = small_cache()
    threads = torch.get_num_threads()
    try:
        run = CliRunner().invoke(
            main,
            f"--cache {cache} --batch-size 4 --epochs 1 --repetitions 1 --json {written}".split(),
        )
    finally:
        torch.set_num_threads(threads)
    assert run.exit_code == 0, run.output
    found = json.loads(written.read_text())
    assert found["tokens_per_cpu_s"].keys() == {"inflate", "ours", "samples"}
    assert all(rate > 0 for rates in found["tokens_per_cpu_s"].values() for rate in rates)


def test_arms_count_the_tokens_that_they_read(small_cache):
    cache = Cache.open(small_cache())
    total = int(cache.index["tokens"].sum())
    assert ours(cache, "replay+head", 4, 2)() >= 2 * total  # padding included
    assert 0 < samples(cache, 4)() <= 2 * total
