"""``train.report_to``: where log lines go besides ``metrics.jsonl``."""
# ruff: noqa: F811

import os
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from distilcache import CachedDistillationTrainer, build_student, open_cache
from distilcache.data.errors import UserError
from distilcache.stages.student_train.config import REPORTS, TrainConfig
from tests.stages.student_train.trainer_support import (
    cache,  # noqa: F401
    metrics,
    run,
)

SHORT = {"steps": 2, "accumulation": 1, "logging_steps": 1}


class Recorder(TrainerCallback):
    """Stands in for a package of the field: keeps what Trainer tells it."""

    runs = []

    def on_train_begin(self, args, state, control, model=None, **_):
        self.runs.append([args.run_name, type(model).__name__])

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.runs[-1].append(logs["loss"])


@pytest.fixture
def mlflow(monkeypatch):
    """The package of this name, as if it were installed."""
    there = "distilcache.stages.student_train.arguments.get_available_reporting_integrations"
    monkeypatch.setattr(there, lambda: ["tensorboard", "mlflow"])
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", Recorder)
    monkeypatch.setattr(Recorder, "runs", [])
    unset(monkeypatch, "WANDB_MODE", "WANDB_DIR", "MLFLOW_DISABLE_TELEMETRY")
    return Recorder


def unset(monkeypatch, *names):
    """Until the test's end, when what a run has set goes too: ``delenv`` alone forgets a variable
    that was not there."""
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_names_are_trainers():
    assert set(REPORTS) <= INTEGRATION_TO_CALLBACK.keys()
    with pytest.raises(UserError, match="report_to must be of tensorboard, wandb, .*, got 'wanb'"):
        TrainConfig(report_to=("wanb",))


def test_each_run_is_told_with_its_name(cache, tmp_path, mlflow):
    for name in ("a", "b"):
        run(cache, tmp_path / name, **SHORT, report_to=("mlflow",))
        assert not (tmp_path / name / "tensorboard").exists()
    losses = [line["loss"] for line in metrics(tmp_path / "a")]
    kind = "DistilBertForMaskedLM"
    assert mlflow.runs == [["a", kind, *losses], ["b", kind, *losses]]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert "WANDB_MODE" not in os.environ  # transformers says a line where it is there


def test_what_the_user_has_set_stays(cache, tmp_path, mlflow, monkeypatch):
    """The rest stays on this machine."""
    there = "distilcache.stages.student_train.arguments.get_available_reporting_integrations"
    monkeypatch.setattr(there, lambda: ["wandb"])
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Recorder)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: None))
    monkeypatch.setenv("WANDB_MODE", "online")
    run(cache, tmp_path / "a", **SHORT, report_to=("wandb",))
    assert os.environ["WANDB_MODE"] == "online"
    assert os.environ["WANDB_DIR"] == str(tmp_path)


def test_a_run_may_go_on_with_other_reports(cache, tmp_path, mlflow):
    run(cache, tmp_path / "a", **SHORT)
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))
    run(cache, tmp_path / "a", **SHORT, report_to=("mlflow",))
    assert mlflow.runs == []  # it was complete


def test_what_is_not_installed_is_refused_before_anything(cache, tmp_path, monkeypatch):
    there = "distilcache.stages.student_train.arguments.get_available_reporting_integrations"
    monkeypatch.setattr(there, lambda: ["tensorboard"])
    line = "report_to must name installed packages, got 'wandb', which is not; pip install wandb"
    with pytest.raises(UserError, match=line):
        run(cache, tmp_path / "a", **SHORT, report_to=("wandb",))
    assert not (tmp_path / "a").exists()
    opened = open_cache(cache)
    with pytest.raises(UserError, match=line):
        CachedDistillationTrainer(
            build_student(opened, "1x32"),
            train_dataset=opened,
            output_dir=tmp_path / "a",
            report_to=("wandb",),
        )


def test_one_that_cannot_begin_says_why_in_one_line(cache, tmp_path, mlflow, monkeypatch):
    def begin(*_, **__):
        raise KeyError("no\nserver")

    monkeypatch.setattr(mlflow, "on_train_begin", begin)
    with pytest.raises(UserError, match="report_to 'mlflow' must be able to begin a run, got Key"):
        run(cache, tmp_path / "a", **SHORT, report_to=("mlflow",))


def test_a_notebook_reports_where_it_is_asked_to(cache, tmp_path, mlflow):
    opened = open_cache(cache)
    trainer = CachedDistillationTrainer(
        build_student(opened, "1x32"),
        train_dataset=opened,
        output_dir=tmp_path / "a",
        device="cpu",
        steps=1,
        batch_size=8,
        report_to=("mlflow",),
    )
    trainer.train()
    ((name, kind, *losses),) = mlflow.runs
    assert (name, kind, len(losses)) == ("a", "DistilBertForMaskedLM", 1)


def test_wandb_itself_keeps_runs_apart_and_at_home(cache, tmp_path, monkeypatch):
    """Without ``finish`` it would add the second student to the first one's run."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    unset(monkeypatch, "WANDB_MODE", "WANDB_DIR")
    for name in ("a", "b"):
        run(cache, tmp_path / name, **SHORT, report_to=("wandb",))
        assert wandb.run is None
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
