"""A run of seconds with a tiny teacher: all arms, all figures."""

import json

import pytest
from click.testing import CliRunner

from benchmarks.stage_one import ARMS, main
from benchmarks.utilisation import uncovered


def test_a_small_run(small_teacher, small_corpus, tmp_path, monkeypatch):
    from benchmarks import stage_one

    monkeypatch.setattr(stage_one, "text_corpus", lambda *_: small_corpus())
    text = tmp_path / "text.txt"
    text.touch()
    options = {"--teacher": small_teacher, "--text": text, "--out": tmp_path / "out",
               "--json": tmp_path / "figures.json", "--repetitions": 2,
               "--device": "cpu"}  # fmt: skip
    arguments = [str(part) for option in options.items() for part in option]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "ours / bare" in done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["tokens_per_s"]) == set(figures["utilisation"]) == set(ARMS)
    assert all(len(rates) == 2 for rates in figures["tokens_per_s"].values())
    assert figures["device_idle_share"] is None
    assert not (tmp_path / "out" / "cache").exists()


def test_the_time_that_no_kernel_covers():
    assert uncovered([(0, 4), (1, 2), (3, 5), (6, 8), (8, 10)]) == pytest.approx(0.1)
    assert uncovered([(2, 3)]) == 0
