"""The loader's benchmark runs, and its plain loader holds the same batches' content."""

import threading

import torch

from benchmarks.loader import main, ours, samples
from distilcache.data.cache.cache import Cache


def test_every_arm_reads_the_cache(small_cache, run_bench):
    threads = torch.get_num_threads()
    try:
        found, _ = run_bench(main, cache=small_cache(), batch_size=4, epochs=1, repetitions=1)
    finally:
        torch.set_num_threads(threads)
    assert found["tokens_per_cpu_s"].keys() == {"inflate", "ours", "samples"}
    assert all(rate > 0 for rates in found["tokens_per_cpu_s"].values() for rate in rates)


def test_arms_count_the_tokens_that_they_read(small_cache):
    cache = Cache.open(small_cache())
    total = int(cache.index["tokens"].sum())
    assert ours(cache, 4, 2)() >= 2 * total  # padding included
    assert 0 < samples(cache, 4)() <= 2 * total


def test_nothing_of_one_arm_is_left_to_the_next(small_cache):
    before = set(threading.enumerate())
    ours(Cache.open(small_cache()), 4, 1)()
    names = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in names if name.startswith("distilcache-loader")]
