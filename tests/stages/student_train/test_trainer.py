"""The training loop: logs, signals, counts, and what it refuses."""
# ruff: noqa: F811

from types import SimpleNamespace

import pytest
import torch

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.student_train.arguments import total_steps, training_arguments
from distilcache.stages.student_train.checkpoint_folders import complete_checkpoints, step_of
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.model import TERMS
from distilcache.stages.student_train.ranks import ALONE
from distilcache.stages.student_train.run import train_student
from distilcache.stages.student_train.trainer import DistillationTrainer, MicroBatches
from tests.stages.student_train.trainer_support import (
    cache,  # noqa: F401
    metrics,
    run,
    uninterrupted,  # noqa: F401
    weights,
)


def test_logs_hold_every_term(uninterrupted):
    out, figures = uninterrupted
    lines = metrics(out)
    assert [m["step"] for m in lines] == [4, 8, 12, 16, 20, 24, 28, 30]
    names = {
        "ce",
        "mlm",
        "cos",
        "rel",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_s",
        "epoch",
        "step",
    }
    assert all(m.keys() == names for m in lines)
    assert lines[-1]["epoch"] == 3.0
    assert lines[-1]["loss"] < lines[0]["loss"]
    first = lines[0]
    parts = 5 * first["ce"] + 2 * first["mlm"] + first["cos"] + 0.5 * first["rel"]
    assert lines[0]["loss"] == pytest.approx(parts, rel=1e-12)
    assert list((out / "tensorboard").glob("events*"))
    assert [step_of(p) for p in complete_checkpoints(out / "checkpoints")] == [27, 30]
    assert not list(out.rglob("*.bin")) + list(out.rglob("*.pt")) + list(out.rglob("*.pth"))
    assert figures["steps"] == 30
    assert figures["tokens_per_s"] > 0


def test_the_rate_rises_and_falls_by_straight_lines(uninterrupted):
    """2 of 30 steps (5 %, rounded up) up, the rest down to 0; a line has the rate of its step."""
    lines = metrics(uninterrupted[0])
    wanted = [5e-4 * (31 - m["step"]) / 28 for m in lines]
    assert [m["learning_rate"] for m in lines] == pytest.approx(wanted)


def test_the_recipe_reaches_the_optimizer(tmp_path):
    """Each setting by its own name; those that the recipe has not are AdamW's usual ones."""
    train = TrainConfig(
        lr=0.5, warmup=0.25, weight_decay=0.1, adam_eps=0.03, max_grad_norm=0.2, accumulation=3
    )
    found = training_arguments(
        train, steps=10, out=tmp_path, device=torch.device("cpu"), dtype=torch.float32
    )
    assert (found.learning_rate, found.warmup_steps, found.lr_scheduler_type) == (0.5, 3, "linear")
    assert (found.weight_decay, found.adam_epsilon, found.max_grad_norm) == (0.1, 0.03, 0.2)
    assert (found.adam_beta1, found.adam_beta2) == (0.9, 0.999)
    assert (found.gradient_accumulation_steps, found.max_steps) == (3, 10)


def test_control_and_teacher_need_no_signals(tiny_cache, tmp_path):
    plain = {"alpha_ce": 0.0, "alpha_cos": 0.0, "alpha_rel": 0.0, "epochs": 1.0}
    cache = tiny_cache(mask_only=True)
    figures = run(cache, tmp_path / "teacher", role="teacher", **plain)
    assert figures.keys() >= {"loss", "mlm"}
    assert "ce" not in figures
    run(tiny_cache(hidden_dtype="float16", top_k=0), tmp_path / "control", role="control", **plain)
    with pytest.raises(UserError, match=r"student\.init=random"):
        run(cache, tmp_path / "student", **plain)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("held", "train"),
    [
        ({"hidden_dtype": "none", "top_k": 8}, {"signal": "sparse", "alpha_cos": 0.0}),
        ({"top_k": 4, "tail_samples": 6, "positions": "masked+0.2"}, {"signal": "sparse"}),
        ({"top_k": 16, "top_p": 0.5, "residual_samples": 4}, {"signal": "replay+residual"}),
        ({"positions": "all"}, {"restrict_ce_to_mask": True, "alpha_mse": 0.01}),
        ({"relation_layer": -1}, {"alpha_rel": 1.0}),
    ],
    ids=["sparse", "sampled", "residual", "mse", "relations"],
)
def test_every_signal_trains_in_bfloat16(tiny_cache, tmp_path, held, train):
    figures = train_student(
        cache_dir=tiny_cache(calibration_sequences=64, **held),
        out=tmp_path / "out",
        size="1x32",
        student=StudentConfig(sizes=("1x32",)),
        train=TrainConfig(batch_size=16, steps=6, logging_steps=3, lr=5e-3, **train),
        device="cpu",
        dtype="bfloat16",
    )
    assert figures["steps"] == 6
    for name in ("mse", "rel"):
        assert (name in figures) == (f"alpha_{name}" in train)
    lines = metrics(tmp_path / "out")
    assert lines[1]["ce"] < lines[0]["ce"]
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.float32}


def test_counts_of_a_step_are_those_of_all_its_micro_batches(tiny_cache, tmp_path):
    """Positions; tokens where positions carry importance weights."""
    cache = Cache.open(
        tiny_cache(hidden_dtype="float16", positions="masked+0.3", logit_positions="masked")
    )
    for kind, weighted in (("sparse", False), ("replay+topk", True)):
        data = CachedBatches(cache, batch_size=8, seed=0, signal=kind)
        counted = []
        means = SimpleNamespace(count=counted.extend)
        losses = SimpleNamespace(vocabulary=None)
        trainer = SimpleNamespace(_clock=None, tokens=0, _means=means, ranks=ALONE, losses=losses)
        count = DistillationTrainer.get_batch_samples
        batches, counts = count(trainer, iter(data[k] for k in range(3)), 2, torch.device("cpu"))
        assert len(batches) == 2
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        masked = sum(len(batch["labels"]) for batch in batches)
        positions = tokens if weighted else masked
        assert counts == {
            "ce": positions, "mlm": masked, "cos": tokens, "mse": positions, "rel": tokens
        }  # fmt: skip
        assert trainer.tokens == tokens
        assert dict(zip(TERMS, counted, strict=True)) == counts


def test_micro_batches_and_total_steps():
    sampler = MicroBatches(3)
    sampler.set_epoch(2)
    assert list(sampler) == [[6], [7], [8]]
    assert total_steps(TrainConfig(epochs=1.5, accumulation=2), 19) == 15
    assert total_steps(TrainConfig(steps=7), 19) == 7


def test_foreign_folder_and_bad_settings_write_nothing(cache, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="output must be a new folder.* move them away"):
        run(cache, tmp_path)
    (tmp_path / "thesis.txt").rename(tmp_path.parent / "thesis.txt")
    run(cache, tmp_path, steps=1)
    with pytest.raises(UserError, match="residual_samples = 0"):
        run(cache, tmp_path / "new", signal="replay+residual")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("epochs", "said"), [(1.0, True), (1.5, False)])
def test_rounds_that_are_not_read_are_named(cache, tmp_path, capsys, epochs, said):
    run(cache, tmp_path / "out", recipe={}, epochs=epochs)
    words = "reads 1 of the cache's 2 rounds of masks; train.epochs=2 reads all"
    assert (words in capsys.readouterr().err) == said


def test_what_the_loss_is_made_of_and_too_few_steps_are_said_once(cache, tmp_path, capsys):
    run(cache, tmp_path / "out", recipe={}, size="1x16", steps=2, alpha_ce=4.5)
    said = capsys.readouterr().err
    assert said.count("train: loss = 4.5 L_ce (T^2 KL to the teacher, T = 2") == 1
    assert said.count("student 1x16: 2 steps are too few") == 1
    (last,) = metrics(tmp_path / "out")
    assert last["loss"] == pytest.approx(
        4.5 * last["ce"] + 2 * last["mlm"] + last["cos"] + 0.5 * last["rel"]
    )
    run(cache, tmp_path / "control", recipe={}, role="control", size="1x16", steps=2)
    run(cache, tmp_path / "measured", size="1x16", steps=2)
    assert "too few" not in capsys.readouterr().err


def test_loss_that_is_not_finite_stops(cache, tmp_path):
    with pytest.raises(UserError, match=r"loss must stay finite, got nan at step \d+; lower"):
        run(cache, tmp_path / "out", lr=1e30, warmup=0.0, max_grad_norm=0.0)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), UserError, "must have room for the student"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(x)`"),
            UserError,
            "smaller train.batch_size, and a train.accumulation larger by the same factor",
        ),
        (RuntimeError("CUDA error: an illegal address"), RuntimeError, "illegal address"),
    ],
)
def test_out_of_memory_is_one_line(cache, tmp_path, monkeypatch, error, kind, said):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(DistillationTrainer, "compute_loss", full)
    with pytest.raises(kind, match=said):
        run(cache, tmp_path / "out")
