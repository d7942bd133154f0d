"""The training loop: resuming bit for bit after kill -9, signals, logs, reuse."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from data.cache import Cache
from data.dataset import CachedBatches
from data.errors import UserError
from data.files import locked
from stages.student_train import callbacks
from stages.student_train.checkpoints import complete_checkpoints, rotate, step_of
from stages.student_train.config import StudentConfig, TrainConfig
from stages.student_train.model import TERMS
from stages.student_train.ranks import ALONE
from stages.student_train.run import train_student
from stages.student_train.trainer import DistillationTrainer, MicroBatches, total_steps

TRAIN = {
    "batch_size": 8, "streams": 2, "accumulation": 2, "epochs": 3.0, "logging_steps": 4,
    "save_steps": 3,
}  # fmt: skip
"""147 sequences: 19 micro-batches, the last one short, so 10 steps per epoch and 30 in all."""


def run(cache, out, *, role="student", size="2x32", **train):
    student = StudentConfig(sizes=(size,), init="teacher" if role == "student" else "random")
    return train_student(
        cache_dir=cache,
        out=out,
        size=size,
        student=student,
        train=TrainConfig(**{**TRAIN, **train}),
        device="cpu",
        dtype="float32",
        role=role,
    )


def weights(out):
    return load_file(out / "model.safetensors")


def same(a, b):
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_clock(lines):
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


@pytest.fixture(scope="module")
def cache(tiny_cache):
    """What the default signal, replay+head, reads; the two sets of positions differ."""
    return tiny_cache(hidden_dtype="float16", positions="masked+0.3", logit_positions="masked")


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "2x32"
    return out, run(cache, out)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from data import files
from stages.student_train import checkpoints
from stages.student_train.config import StudentConfig, TrainConfig
from stages.student_train.model import TERMS
from stages.student_train.run import train_student
from stages.student_train.trainer import DistillationTrainer

cache, out, train, step, where, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

if where == "step":
    plain = DistillationTrainer.compute_loss
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == int(step):
            die()
        return plain(self, *args, **kwargs)
    DistillationTrainer.compute_loss = compute_loss
else:
    plain = checkpoints.write_json
    def write_json(path, values):
        if path.parent.name == "checkpoint-" + step and path.name == "complete.json":
            die()
        plain(path, values)
    checkpoints.write_json = write_json

train_student(
    cache_dir=Path(cache), out=Path(out), size="2x32", student=StudentConfig(sizes=("2x32",)),
    train=TrainConfig(**eval(train)), device="cpu", dtype="float32",
)
"""


def killed(cache, out, step, where):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED,
            *(str(cache), str(out), repr(TRAIN), str(step), where, str(torch.get_num_threads())),
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_twice_gives_the_same_weights(cache, uninterrupted, tmp_path):
    expected, figures = uninterrupted
    out = tmp_path / "2x32"
    killed(cache, out, 4, "step")  # First epoch, one step after checkpoint 3.
    assert [step_of(p) for p in complete_checkpoints(out / "checkpoints")] == [3]
    assert not (out / "config.json").exists()
    killed(cache, out, 15, "marker")  # Second epoch, within the writing of checkpoint 15.
    assert (out / "checkpoints" / "checkpoint-15").is_dir()
    assert [step_of(p) for p in complete_checkpoints(out / "checkpoints")] == [9, 12]
    again = run(cache, out)
    assert same(out, expected)
    assert again["tokens"] == figures["tokens"]
    assert [m["step"] for m in metrics(out)] == [4, 8, 12, 16, 20, 24, 28, 30]
    # Also the lines whose steps a checkpoint has cut in two, at 3 and at 15.
    assert without_clock(metrics(out)) == without_clock(metrics(expected))


def test_two_runs_of_one_student_at_once(cache, tmp_path):
    out = tmp_path / "2x32"
    out.mkdir()
    with locked(out, "train"), pytest.raises(UserError, match="another run is building"):
        run(cache, out)
    assert list(out.iterdir()) == []


def test_signal_saves_and_the_same_command_goes_on(cache, uninterrupted, tmp_path, monkeypatch):
    read = []
    plain_item = CachedBatches.__getitem__
    monkeypatch.setattr(
        CachedBatches, "__getitem__", lambda self, k: read.append(k) or plain_item(self, k)
    )
    plain = DistillationTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "compute_loss", compute_loss)
        # With two micro-batches a step the second signal would kill: send it once.
        patch.setattr(
            callbacks.StopCallback,
            "_handle",
            lambda self, number, frame: setattr(self, "received", "SIGTERM"),
        )
        with pytest.raises(UserError, match=r"stopped by SIGTERM at step 14 of 30, .* goes on"):
            run(cache, tmp_path / "2x32")
    assert signal.getsignal(signal.SIGTERM) == before
    assert step_of(complete_checkpoints(tmp_path / "2x32" / "checkpoints")[-1]) == 14
    assert read == list(range(19 + 4 * 2))  # Epoch 0, four steps of epoch 1, nothing skipped.
    run(cache, tmp_path / "2x32")
    assert read == list(range(3 * 19))
    assert same(tmp_path / "2x32", uninterrupted[0])


def test_killed_between_last_checkpoint_and_export(cache, uninterrupted, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stages.student_train.run.export_model", fail)
        with pytest.raises(KeyboardInterrupt):
            run(cache, tmp_path / "2x32")
    figures = run(cache, tmp_path / "2x32")
    assert same(tmp_path / "2x32", uninterrupted[0])
    assert figures["loss"] == uninterrupted[1]["loss"]
    assert figures["tokens"] == uninterrupted[1]["tokens"]


def test_finished_run_is_reused_and_another_one_is_refused(
    cache, uninterrupted, tiny_cache, capsys
):
    out, figures = uninterrupted
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert run(cache, out) == figures
    assert "reused" in capsys.readouterr().err
    assert run(cache, out, save_steps=7, logging_steps=1) == figures
    with pytest.raises(UserError, match=r"train\.lr 0\.0005 -> 0\.1, train\.seed 0 -> 1") as caught:
        run(cache, out, lr=0.1, seed=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"got other cache '"):
        run(tiny_cache(hidden_dtype="float32"), out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(("epochs", "said"), [(1.0, True), (1.5, False)])
def test_rounds_that_are_not_read_are_named(cache, tmp_path, capsys, epochs, said):
    run(cache, tmp_path / "out", epochs=epochs)
    words = "reads 1 of the cache's 2 rounds of masks; train.epochs=2 reads all"
    assert (words in capsys.readouterr().err) == said


def test_foreign_folder_and_bad_settings_write_nothing(cache, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="output must be a new folder"):
        run(cache, tmp_path)
    with pytest.raises(UserError, match="residual_samples = 0"):
        run(cache, tmp_path / "new", signal="replay+residual")
    assert not (tmp_path / "new").exists()


def test_logs_hold_every_term(uninterrupted):
    out, figures = uninterrupted
    lines = metrics(out)
    assert [m["step"] for m in lines] == [4, 8, 12, 16, 20, 24, 28, 30]
    names = {"ce", "mlm", "cos", "loss", "lr", "grad_norm", "tokens_per_s", "epoch", "step"}
    assert all(m.keys() == names for m in lines)
    assert lines[-1]["epoch"] == 3.0
    assert lines[-1]["loss"] < lines[0]["loss"]
    parts = 5 * lines[0]["ce"] + 2 * lines[0]["mlm"] + lines[0]["cos"]
    assert lines[0]["loss"] == pytest.approx(parts, rel=1e-12)
    assert list((out / "tensorboard").glob("events*"))
    assert [step_of(p) for p in complete_checkpoints(out / "checkpoints")] == [27, 30]
    assert not list(out.rglob("*.bin")) + list(out.rglob("*.pt")) + list(out.rglob("*.pth"))
    assert figures["steps"] == 30
    assert figures["tokens_per_s"] > 0


def test_control_and_teacher_need_no_signals(tiny_cache, tmp_path):
    plain = {"alpha_ce": 0.0, "alpha_cos": 0.0, "epochs": 1.0}
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
    ],
    ids=["sparse", "sampled", "residual", "mse"],
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
    assert ("mse" in figures) == ("alpha_mse" in train)
    lines = metrics(tmp_path / "out")
    assert lines[1]["ce"] < lines[0]["ce"]
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.float32}


def test_counts_of_a_step_are_those_of_all_its_micro_batches(tiny_cache, tmp_path):
    """Positions; tokens where positions carry importance weights."""
    cache = Cache.open(
        tiny_cache(hidden_dtype="float16", positions="masked+0.3", logit_positions="masked")
    )
    for kind, weighted in (("sparse", False), ("replay+head", True)):
        data = CachedBatches(cache, batch_size=8, seed=0, signal=kind)
        counted = []
        means = SimpleNamespace(count=counted.extend)
        trainer = SimpleNamespace(_clock=None, tokens=0, _means=means, ranks=ALONE)
        count = DistillationTrainer.get_batch_samples
        batches, counts = count(trainer, iter(data[k] for k in range(3)), 2, torch.device("cpu"))
        assert len(batches) == 2
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        masked = sum(len(batch["labels"]) for batch in batches)
        positions = tokens if weighted else masked
        assert counts == {"ce": positions, "mlm": masked, "cos": tokens, "mse": positions}
        assert trainer.tokens == tokens
        assert dict(zip(TERMS, counted, strict=True)) == counts


def test_loss_that_is_not_finite_stops(cache, tmp_path):
    with pytest.raises(UserError, match=r"loss must stay finite, got nan at step \d+; lower"):
        run(cache, tmp_path / "out", lr=1e30, warmup=0.0, max_grad_norm=0.0)


def test_full_disk_leaves_no_half_checkpoint(cache, tmp_path, monkeypatch):
    def full(path, values):
        raise UserError(f"storage: {path} must be writable, got: No space left on device")

    monkeypatch.setattr("stages.student_train.checkpoints.write_json", full)
    with pytest.raises(UserError, match="No space left"):
        run(cache, tmp_path / "out")
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def test_micro_batches_and_total_steps():
    sampler = MicroBatches(3)
    sampler.set_epoch(2)
    assert list(sampler) == [[6], [7], [8]]
    assert total_steps(TrainConfig(epochs=1.5, accumulation=2), 19) == 15
    assert total_steps(TrainConfig(steps=7), 19) == 7


def test_rotate_keeps_the_newest_complete(tmp_path):
    for step in (5, 10, 9, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 100:
            (tmp_path / f"checkpoint-{step}" / "complete.json").write_text("{}")
    assert [step_of(p) for p in complete_checkpoints(tmp_path)] == [5, 9, 10]
    rotate(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_rotate_leaves_checkpoints_of_other_trainers(tmp_path):
    """A script may give the output folder of a run of plain transformers."""
    theirs = ["model.safetensors", "optimizer.pt", "trainer_state.json", "training_args.bin"]
    half = ["model.safetensors", "rng-0.safetensors", ".trainer.json.7.1a2b3c4d.tmp"]
    for step, names in ((5, theirs), (7, half), (10, ["model.safetensors", "complete.json"])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in names:
            (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    rotate(tmp_path, 1)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-10", "checkpoint-5", "checkpoint-notes.txt"]
    assert len(list((tmp_path / "checkpoint-5").iterdir())) == len(theirs)
