"""All arms of the stage-two benchmark train, and its arithmetic is that of the shapes."""

import pytest

from benchmarks.stage_two import main
from benchmarks.training_arms import ARMS


def test_every_arm_trains(tmp_path, run_bench):
    # A made teacher has room for 128 positions, the small one has not.
    figures, _ = run_bench(
        main, teacher_size="2x32", sizes="1x32", batch_size=4, steps=3, repetitions=2, device="cpu"
    )
    (student,) = figures["students"]
    assert list(student["tokens_per_s"]) == list(ARMS)
    assert all(len(rates) == 2 and min(rates) > 0 for rates in student["tokens_per_s"].values())
    bounds = {name: ratio["bound"] for name, ratio in student["ratios"].items()}
    assert bounds["ours / memory"] == bounds["ours / mlm"] < 1
    assert 1 < bounds["ours / live"] < bounds["ours / reference"]
    work = student["multiply_adds"]
    assert work["ours"] / work["memory"] == pytest.approx(1 / bounds["ours / memory"])
    assert not list((tmp_path / "work").rglob("checkpoint-*"))
