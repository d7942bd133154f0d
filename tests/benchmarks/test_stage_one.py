"""A run of seconds with a tiny teacher: all arms, all figures."""

import pytest

from benchmarks import stage_one
from benchmarks.stage_one import ARMS, main
from benchmarks.utilisation import uncovered


def test_a_small_run(run_bench, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_one, "text_corpus", lambda *_: small_corpus())
    figures, printed = run_bench(main, repetitions=2, device="cpu")
    assert "ours / bare" in printed
    assert set(figures["tokens_per_s"]) == set(figures["utilisation"]) == set(ARMS)
    assert all(len(rates) == 2 for rates in figures["tokens_per_s"].values())
    assert figures["device_idle_share"] is None
    assert not (tmp_path / "work" / "cache").exists()


def test_the_time_that_no_kernel_covers():
    assert uncovered([(0, 4), (1, 2), (3, 5), (6, 8), (8, 10)]) == pytest.approx(0.1)
    assert uncovered([(2, 3)]) == 0
