"""All arms of the stage-two benchmark train, and its arithmetic is that of the shapes."""

import json

import pytest
from click.testing import CliRunner

from benchmarks.stage_two import main
from benchmarks.training_arms import ARMS


def test_every_arm_trains(tmp_path, small_corpus, small_teacher):
    options = {
        "--teacher": small_teacher,
        "--text": small_corpus().parent / "text.txt",
        "--teacher-size": "2x32",  # made with room for 128 positions
        "--sizes": "1x32",
        "--batch-size": 4,
        "--steps": 3,
        "--repetitions": 2,
        "--device": "cpu",
        "--out": tmp_path / "work",
        "--json": tmp_path / "figures.json",
    }
    words = [str(word) for pair in options.items() for word in pair]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (student,) = json.loads((tmp_path / "figures.json").read_text())["students"]
    assert list(student["tokens_per_s"]) == list(ARMS)
    assert all(len(rates) == 2 and min(rates) > 0 for rates in student["tokens_per_s"].values())
    bounds = {name: ratio["bound"] for name, ratio in student["ratios"].items()}
    assert bounds["ours / memory"] == bounds["ours / mlm"] < 1
    assert 1 < bounds["ours / live"] < bounds["ours / reference"]
    work = student["multiply_adds"]
    assert work["ours"] / work["memory"] == pytest.approx(1 / bounds["ours / memory"])
    assert not list((tmp_path / "work").rglob("checkpoint-*"))
