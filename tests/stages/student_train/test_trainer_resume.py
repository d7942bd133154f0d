"""Training that ends early goes on to the same weights, bit for bit; what is finished is reused."""
# ruff: noqa: F811

import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, TrainerControl, TrainerState

from distilcache import CachedDistillationTrainer, build_student, open_cache
from distilcache.data.cache.cache import Cache
from distilcache.data.errors import InUse, UserError
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.storage.locks import locked
from distilcache.stages.student_train import callbacks, training_state, vocabulary
from distilcache.stages.student_train.arguments import training_arguments
from distilcache.stages.student_train.callbacks import EpochCallback, MicroBatches
from distilcache.stages.student_train.checkpoint_folders import (
    complete_checkpoints,
    rotate,
    step_of,
)
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.trainer import DistillationTrainer
from distilcache.stages.student_train.training_state import read_optimizer, write_checkpoint
from tests.command_line import ROOT, environment
from tests.damage import sealed
from tests.forked import Forked
from tests.refusals import refused
from tests.stages.student_train.trainer_support import (
    cache,  # noqa: F401
    metrics,
    run,
    same,
    stopped_at,
    uninterrupted,  # noqa: F401
    weights,
)


def without_clock(lines):
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def killed(cache, out, step, where):
    process = Forked(train_and_die, cache, out, step, where, env=environment(), cwd=ROOT)
    _, log = process.communicate(timeout=500)
    assert process.returncode == -signal.SIGKILL, log


def train_and_die(cache, out, step, where):
    """In a process that kills itself at a step, or at the marker of that step's checkpoint."""
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    plain_loss, plain_write = DistillationTrainer.compute_loss, training_state.write_json

    def compute_loss(self, *args, **kwargs):
        if where == "step" and self.state.global_step == step:
            die()
        return plain_loss(self, *args, **kwargs)

    def write_json(path, values):
        if where == "marker" and path == out / f"checkpoints/checkpoint-{step}/complete.json":
            die()
        plain_write(path, values)

    DistillationTrainer.compute_loss, training_state.write_json = compute_loss, write_json
    run(cache, out)


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


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_before_the_signal_was_renamed_goes_on(cache, uninterrupted, tmp_path, finished):
    expected, figures = uninterrupted
    out = tmp_path / "2x32"
    if finished:
        shutil.copytree(expected, out)
    else:
        killed(cache, out, 4, "step")
    path = out / "training.json"
    assert '"signal": "replay+topk"' in path.read_text()
    old = json.loads(path.read_text().replace("replay+topk", "replay+head"))
    path.write_text(json.dumps(sealed(old)))
    assert run(cache, out)["tokens"] == figures["tokens"]
    assert same(out, expected)


@pytest.mark.parametrize("age", ["of before 0.3.0", "of today"])
def test_a_run_that_began_over_the_whole_vocabulary_goes_on_so(cache, tmp_path, monkeypatch, age):
    """Earlier records have no field for that; steps after the first ones are as before."""
    monkeypatch.setattr(vocabulary, "LEAST", 24)
    few = {"signal": "replay", "batch_size": 2, "accumulation": 1, "vocabulary_fraction": 1.0}
    out, path, today = tmp_path / "cut", tmp_path / "cut/training.json", age == "of today"
    with stopped_at(4, monkeypatch):
        run(cache, out, steps=6, **few)
    begun = json.loads(path.read_text())
    if not today:
        assert begun["settings"]["train"].pop("vocabulary_fraction") == 1
        path.write_text(json.dumps(sealed(begun)))
    for fraction in (0.2, 0.5):
        other = {**few, "steps": 6, "vocabulary_fraction": fraction}
        if today:
            line = refused(lambda other=other: run(cache, out, **other))
            assert f"vocabulary_fraction 1.0 -> {fraction}" in line
        else:
            with stopped_at(5, monkeypatch):
                run(cache, out, **other)
            assert json.loads(path.read_text())["settings"] == begun["settings"]
    run(cache, tmp_path / "whole", steps=6, **few)
    last = few if today else {**few, "vocabulary_fraction": 0.5}
    for _ in range(2):  # resumed, then reused
        run(cache, out, steps=6, **last)
        assert same(out, tmp_path / "whole")


def test_a_teacher_that_began_with_dropout_goes_on_so(cache, tmp_path, monkeypatch):
    """No setting of a recipe says what dropout the teachers have that it makes."""
    masks = {"role": "teacher", "alpha_ce": 0.0, "alpha_cos": 0.0, "alpha_rel": 0.0, "steps": 6}
    run(cache, tmp_path / "whole", dropout=0.1, **masks)
    with stopped_at(4, monkeypatch):
        run(cache, tmp_path / "cut", dropout=0.1, **masks)
    for _ in range(2):  # resumed, then reused
        run(cache, tmp_path / "cut", dropout=0.0, **masks)
        assert same(tmp_path / "cut", tmp_path / "whole")


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
        patch.setattr("distilcache.stages.student_train.run.export_model", fail)
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
    changes = r"train\.lr 0\.0005 -> 0\.1, train\.seed 0 -> 1; set these back to go on"
    with pytest.raises(UserError, match=changes) as caught:
        run(cache, out, lr=0.1, seed=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"other cache '.*; set cache_from back"):
        run(tiny_cache(hidden_dtype="float32", relation_layer=-1), out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_start_with_other_weights_or_other_tokens_is_refused(cache, tmp_path):
    start = tmp_path / "start"
    run(cache, start, role="control", steps=1)
    (start / "training.json").unlink()  # it holds the files' hashes
    figures = run(cache, tmp_path / "2x32", start=str(start), steps=1)
    weights = load_file(start / "model.safetensors")
    save_file({k: t + 1 for k, t in weights.items()}, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"other student\.init_sha256 '.*; set these back"):
        run(cache, tmp_path / "2x32", start=str(start), steps=1)
    state = json.loads((start / "tokenizer.json").read_text())
    words = state["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]
    (start / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"init '.*start' must have the student's token ids"):
        run(cache, tmp_path / "other", start=str(start), steps=1)
    shutil.rmtree(start)  # It is needed no more.
    assert run(cache, tmp_path / "2x32", start=str(start), steps=1) == figures


def test_two_runs_of_one_student_at_once(cache, tmp_path):
    out = tmp_path / "2x32"
    out.mkdir()
    opened = open_cache(cache)
    notebook = CachedDistillationTrainer(
        build_student(opened, "2x32"), train_dataset=opened, output_dir=out, steps=2, device="cpu"
    )
    with locked(out, "train"):
        for start in (lambda: run(cache, out), notebook.train):
            with pytest.raises(InUse, match="another run is building"):
                start()
    assert list(out.iterdir()) == []


def test_a_second_signal_to_a_worker_does_not_kill_it(monkeypatch):
    """Its parent, a sweep, sends SIGTERM after the terminal's Ctrl-C, and waits."""
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "a sweep")
    with callbacks.StopCallback() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert stop.received == "SIGINT"


def test_full_disk_leaves_no_half_checkpoint(cache, tmp_path, monkeypatch):
    def full(path, values):
        raise UserError(f"storage: {path} must be writable, got: No space left on device")

    monkeypatch.setattr("distilcache.stages.student_train.training_state.write_json", full)
    with pytest.raises(UserError, match="No space left"):
        run(cache, tmp_path / "out")
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_of_the_events_names_their_folder(cache, tmp_path, monkeypatch):
    """TensorBoard writes in a thread."""
    shown = []
    monkeypatch.setattr("threading.excepthook", shown.append)
    with monkeypatch.context() as patch:
        patch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        with pytest.raises(UserError) as caught:
            run(cache, tmp_path / "out")
    line = f"storage: {tmp_path}/out/tensorboard must be writable, got: No space left on device"
    assert str(caught.value).startswith(line)
    assert threading.excepthook == shown.append
    assert not shown


def test_full_disk_of_the_log_names_it():
    state = SimpleNamespace(global_step=1)
    with pytest.raises(UserError, match="/dev/full must be writable, got: No space left on device"):
        callbacks.MetricsCallback(Path("/dev/full")).on_log(None, state, None, {"loss": 1.0})


def test_what_killed_runs_left_is_removed(cache, uninterrupted, tmp_path):
    out = tmp_path / "out"
    left = [out / ".model.safetensors.1.ab.tmp", out / "checkpoints" / "c" / ".rng.2.cd.tmp"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    record = json.loads((uninterrupted[0] / "training.json").read_text())
    (out / "training.json").write_text(json.dumps({"settings": record["settings"]}))
    run(cache, out)
    assert [path for path in left if path.exists()] == []


def as_of_0_2(checkpoint):
    """The weights of a checkpoint as they were stored: trained tensors alone, by other names."""
    tensors = load_file(checkpoint / "model.safetensors")
    old = {f"student.{name}": tensor for name, tensor in tensors.items()}
    projection = checkpoint / "projection.safetensors"
    if projection.exists():
        old |= {f"projection.{name}": tensor for name, tensor in load_file(projection).items()}
        projection.unlink()
    (checkpoint / "config.json").unlink()
    save_file(old, checkpoint / "model.safetensors")
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    assert trainer.pop("plain") == {}
    (checkpoint / "trainer.json").write_text(json.dumps(trainer))


@pytest.mark.parametrize("size", ["1x32", "1x16"])
def test_a_checkpoint_opens_as_a_model_and_one_of_0_2_goes_on(cache, tmp_path, size):
    out, whole = tmp_path / size, tmp_path / "whole"
    run(cache, out, size=size, epochs=1.0)
    shutil.copytree(out, whole)
    opened = AutoModelForMaskedLM.from_pretrained(out / "checkpoints" / "checkpoint-10")
    finished = weights(out)
    assert all(torch.equal(finished[name], opened.state_dict()[name]) for name in finished)
    shutil.rmtree(out / "checkpoints" / "checkpoint-10")
    as_of_0_2(out / "checkpoints" / "checkpoint-9")
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
    record = json.loads((out / "training.json").read_text())
    (out / "training.json").write_text(json.dumps({"settings": record["settings"]}))
    run(cache, out, size=size, epochs=1.0)
    assert same(out, whole)


def test_what_the_optimizer_keeps_beside_tensors_is_stored(tmp_path):
    """Adafactor counts its steps in a plain number; its pairs must stay pairs."""
    state = {0: {"step": 7, "mean": torch.ones(2)}, 1: {"scale": None}}
    groups = [{"params": [0, 1], "eps": (1e-30, 1e-3), "lr": None}]
    kept = {"config": b"{}", "projection": {}, "scheduler": {}, "state": {"global_step": 4}}
    rest = {"model": {}, "totals": {}, "since_log": {}, "rng": []}
    folder = tmp_path / "checkpoint-4"
    write_checkpoint(folder, optimizer={"state": state, "param_groups": groups}, **kept, **rest)
    found = read_optimizer(folder)
    assert found["param_groups"] == groups
    assert torch.equal(found["state"][0].pop("mean"), torch.ones(2))
    assert found["state"] == {0: {"step": 7}, 1: {"scale": None}}
    nested = {0: {"inner": {"mean": torch.ones(2)}}}
    with pytest.raises(UserError, match="must hold tensors and plain values") as error:
        write_checkpoint(
            folder, optimizer={"state": nested, "param_groups": groups}, **kept, **rest
        )
    assert "\n" not in str(error.value)
    assert not folder.exists()


@pytest.mark.parametrize(("keep", "left"), [(1, [5, 10]), (2, [5, 10]), (3, [5, 9, 10])])
def test_rotate_keeps_the_best(tmp_path, keep, left):
    for step in (4, 5, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete.json").write_text("{}")
    rotate(tmp_path, keep, str(tmp_path / "checkpoint-5"))
    assert [step_of(p) for p in complete_checkpoints(tmp_path)] == left


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


def test_a_resumed_run_logs_and_saves_at_its_own_intervals(tmp_path):
    """Not at those of the run whose checkpoint it goes on from."""
    train = TrainConfig(save_steps=7, logging_steps=3)
    arguments = training_arguments(
        train, steps=20, out=tmp_path, device=torch.device("cpu"), dtype=torch.float32
    )
    state = TrainerState(max_steps=20, save_steps=500, logging_steps=20)
    EpochCallback(MicroBatches(5), SimpleNamespace()).on_train_begin(arguments, state, None)
    assert (state.save_steps, state.logging_steps) == (7, 3)


def test_ranks_meet_in_the_last_step_too():
    """There a lost one is found in good order; after it Trainer waits for all on the devices."""
    asked = []
    ranks = SimpleNamespace(any=lambda flag: asked.append(flag) or flag, world=2)
    control = TrainerControl()
    stop = callbacks.StopCallback(ranks)
    stop.received = "SIGTERM"
    stop.on_step_end(None, TrainerState(global_step=5, max_steps=5), control)
    assert asked == [True]
    assert (control.should_log, control.should_training_stop, stop.stops) == (True, False, False)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_nothing_beyond_the_last_step_is_read(cache, tmp_path, monkeypatch, accumulation):
    """Epoch 1 would read the second round."""
    read, original = set(), Cache.read_block
    monkeypatch.setattr(Cache, "read_block", lambda self, n: [read.add(n), original(self, n)][1])
    run(cache, tmp_path / "out", epochs=1.0, window_blocks=1, accumulation=accumulation)
    assert read == set(Cache.open(cache).round_range(0))
