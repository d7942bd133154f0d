"""``train.lr_schedule``: Trainer's schedules by their names, and what is said of wrong ones."""
# ruff: noqa: F811

import json
import math

import pytest
from transformers.trainer_utils import SchedulerType

from distilcache.data.errors import UserError
from distilcache.pipeline.recipe import load_recipe
from distilcache.stages.student_train.arguments import BY_EVALUATION, check_schedule
from distilcache.stages.student_train.config import TrainConfig
from tests.stages.student_train.trainer_support import (
    cache,  # noqa: F401
    metrics,
    run,
    same,
    stopped_at,
)

NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}
SHORT = {"steps": 10, "accumulation": 1, "logging_steps": 1, "save_steps": 4, "warmup": 0.2}


def test_every_schedule_of_trainer_is_known():
    for kind in SchedulerType:
        if kind.value in BY_EVALUATION:
            with pytest.raises(UserError, match="lr_schedule must be one of linear, cosine, "):
                check_schedule(TrainConfig(lr_schedule=kind.value))
        else:
            needed = NEEDED.get(kind.value, {})
            check_schedule(TrainConfig(lr_schedule=kind.value, lr_schedule_kwargs=needed), 10)


def test_a_cosine_is_one_and_goes_on_to_the_bit(cache, tmp_path, monkeypatch):
    """Two steps up, then half a cosine down to 0; and so after an interruption."""
    cosine = {**SHORT, "lr_schedule": "cosine", "lr": 1e-3}
    run(cache, tmp_path / "whole", **cosine)
    rates = [line["learning_rate"] for line in metrics(tmp_path / "whole")]
    down = [5e-4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates == pytest.approx([0, 5e-4, *down], rel=1e-6)
    with stopped_at(6, monkeypatch):
        run(cache, tmp_path / "cut", **cosine)
    run(cache, tmp_path / "cut", **cosine)
    assert same(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(UserError, match="lr_schedule 'cosine' -> 'linear'"):
        run(cache, tmp_path / "whole", **{**cosine, "lr_schedule": "linear"})


def test_a_stable_rate_falls_at_the_end(cache, tmp_path):
    wanted = {"num_decay_steps": 2, "decay_type": "linear"}
    stable = {**SHORT, "lr_schedule": "warmup_stable_decay", "lr_schedule_kwargs": wanted}
    run(cache, tmp_path / "a", **stable, lr=1e-3)
    rates = [line["learning_rate"] for line in metrics(tmp_path / "a")]
    assert rates == pytest.approx([0, 5e-4, *[1e-3] * 7, 5e-4], abs=1e-9)


def test_runs_of_before_do_not_name_what_they_did_not_know(cache, tmp_path):
    run(cache, tmp_path / "a", **SHORT)
    train = json.loads((tmp_path / "a" / "training.json").read_text())["settings"]["train"]
    assert not {"lr_schedule", "lr_schedule_kwargs"} & train.keys()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lr_schedule": "cosin"}, "lr_schedule must be one of linear, cosine, .*got 'cosin'"),
        ({"lr_schedule": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_schedule": "warmup_stable_decay"}, r"\(num_decay_steps, .*'num_decay_steps'"),
        ({"lr_schedule_kwargs": {"power": 2}}, r"'linear' takes \(nothing\), .*no setting 'power'"),
        (
            {"lr_schedule": "polynomial", "lr_schedule_kwargs": {"lr_end": 9}},
            "must be smaller than initial lr",
        ),
        ({"lr_schedule": "cosine", "lr_schedule_kwargs": {"num_cycles": "a"}}, "num_cycles"),
        ({"lr_schedule": "polynomial", "lr_schedule_kwargs": {"lr_end": -1}}, "learning rates of"),
    ],
)
def test_a_wrong_schedule_is_one_line(cache, tmp_path, settings, line):
    with pytest.raises(UserError, match=line) as error:
        run(cache, tmp_path / "a", **SHORT, **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_a_recipe_gives_a_section():
    recipe = load_recipe(None, ["train.lr_schedule_kwargs.min_lr_rate=0.1"])
    assert recipe.train.lr_schedule_kwargs == {"min_lr_rate": 0.1}
    with pytest.raises(UserError, match=r"train\.lr_schedule_kwargs must be a section, got 3"):
        load_recipe(None, ["train.lr_schedule_kwargs=3"])
