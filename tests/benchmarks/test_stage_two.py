"""All arms of the stage-two benchmark train, and its arithmetic is that of the shapes."""

import weakref
from dataclasses import replace

import pytest
import torch

from benchmarks import stage_two
from benchmarks.stage_two import main, one_turn
from benchmarks.training_arms import ARMS, Setting
from distilcache.data.cache.cache import Cache
from distilcache.stages.teacher_cache.teacher import load_teacher


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


def test_no_arm_is_there_while_another_one_runs(setting, tmp_path, monkeypatch):
    """Its peak of memory would be that of both."""
    made, plain = [], stage_two.rate

    def rate(arm, *arguments):
        assert not [module() for module in made if module() is not None]
        made.append(weakref.ref(arm[0]))
        return plain(arm, *arguments)

    monkeypatch.setattr(stage_two, "rate", rate)
    assert stage_two.measure(setting, tuple(ARMS), 2, tmp_path)["peak_gib"] == {}
    assert len(made) == 2 * len(ARMS)


def test_the_peak_of_an_arm_has_the_teacher_where_it_runs(setting, tmp_path, monkeypatch):
    """By a device that holds a teacher of 2 GiB and at most 3 more."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * gib)
    monkeypatch.setattr(stage_two, "rate", lambda *_: 1.0)
    monkeypatch.setattr(stage_two, "matmul_rate", lambda *_: 1.0)
    on_gpu = replace(setting, teacher=replace(setting.teacher, device=torch.device("cuda")))
    monkeypatch.setattr(stage_two, "ARMS", {name: lambda _: arm for name in ARMS})
    arm = ARMS["mlm"](setting)
    found = stage_two.measure(on_gpu, tuple(ARMS), 1, tmp_path)["peak_gib"]
    assert found == {"reference": 5, "live": 5, "memory": 3, "mlm": 3, "full": 3, "ours": 3}


@pytest.fixture
def setting(small_cache, small_teacher):
    teacher = load_teacher(str(small_teacher), torch.device("cpu"), torch.float32)
    return Setting(Cache.open(small_cache()), teacher, "1x32", one_turn(3, 4))


def test_arms_beside_a_teacher_read_nothing_of_what_it_said(setting):
    """They would pay for stored hidden states that they do not use."""
    held = {name: set(ARMS[name](setting)[1][0]) for name in ARMS}
    plain = {"input_ids", "attention_mask", "masked_index", "labels"}
    assert held["reference"] == held["mlm"] == plain
    assert held["live"] == plain | {"ce_index", "hidden_index"}
    assert held["memory"] == held["live"] | {"logits", "hidden_random"}
    assert held["ours"] > held["live"]


def test_targets_in_memory_lie_where_the_steps_run(setting):
    elsewhere = replace(setting.teacher, device=torch.device("meta"))
    batch = ARMS["memory"](replace(setting, teacher=elsewhere))[1][0]
    assert {n for n, tensor in batch.items() if tensor.is_meta} == {"logits", "hidden_random"}
