"""Several processes that train one student: gradients, kill -9 of a rank, other numbers of ranks.

They are started as torchrun does, on the CPU (gloo); the truth is the same training in one process,
or without interruption.
"""
# ruff: noqa: F811

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distilcache.data.errors import UserError
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.storage.locks import locked
from distilcache.pipeline.ranks import launch as launching
from distilcache.pipeline.ranks.launch import _end_with, _keep_stdout, train_on_ranks
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.student_train import ranks, vocabulary
from distilcache.stages.student_train import run as training
from distilcache.stages.student_train.callbacks import MicroBatches
from distilcache.stages.student_train.checkpoint_folders import complete_checkpoints, step_of
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.generators import restore_rng, rng_state
from distilcache.stages.student_train.ranks import ALONE, claim_error, join_ranks
from distilcache.stages.student_train.trainer import DistillationTrainer
from tests.command_line import environment
from tests.forked import Forked
from tests.stages.student_train.trainer_support import (
    TRAIN,
    cache,  # noqa: F401
    metrics,
    ours,
    run,
    same,
    weights,
)

RANKS = {**TRAIN, "streams": 4, "window_blocks": 4}
"""147 sequences: 18 micro-batches, the last one longer than the others; 9 steps per epoch."""


def launch(world, restarts, job):
    """What torchrun does, but that the ranks are forks, which have imported everything."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=restarts,
        start_method="fork",
    )
    elastic_launch(config, one_rank)(job)


def one_rank(job):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher has its own
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    plain = DistillationTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if rank == 1 and job["kill"].get(attempt) == self.state.global_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **kwargs)

    DistillationTrainer.compute_loss = compute_loss
    vocabulary.LEAST = job["least"]
    training.LAST_RANKS_SECONDS = 0.1
    if job["gradients"] is not None:
        DistillationTrainer._clip_grad_norm = keep_gradients(job["gradients"], rank)
    alone(job["cache"], job["out"], **job["settings"])


def keep_gradients(folder, rank=0):
    """In place of clipping: the first rank writes each step's, and the weights' norm is 0."""

    def clip(self, model):
        step = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad}
        if rank == 0:
            save_file(step, folder / f"{self.state.global_step}.safetensors")
        return torch.zeros(())

    return clip


def torchrun(world, cache, out, *, kill=None, restarts=0, gradients=None, **settings):
    """The run on ``world`` ranks; ``kill``: step at which rank 1 is killed, by attempt."""
    job = {"cache": cache, "out": out, "kill": kill or {}, "gradients": gradients,
           "settings": settings, "least": vocabulary.LEAST}  # fmt: skip
    process = Forked(launch, world, restarts, job, env=environment(), cwd=out.parent)
    said = process.communicate(timeout=500)
    return CompletedProcess("torchrun", process.returncode, *said)


def alone(cache, out, **settings):
    return run(cache, out, **{**RANKS, **settings})


def near(a, b):
    left, right = weights(a), weights(b)
    return max((left[n] - right[n]).abs().max().item() for n in left) < 2e-4


def logged(out):
    """Loss terms by step, without the clock."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    names = ("loss", "ce", "mlm", "cos", "rel", "grad_norm")
    return {m["step"]: [m[name] for name in names if name in m] for m in lines}


@pytest.fixture(scope="module")
def killed(cache, tmp_path_factory):
    """Two ranks; one is killed in epoch 1, and again in epoch 2 after torchrun's restart."""
    out = tmp_path_factory.mktemp("killed") / "2x32"
    done = torchrun(2, cache, out, kill={0: 4, 1: 13}, restarts=1, dropout=0.0)
    assert done.returncode == 1
    assert len(ours(done)) == 2
    assert all(
        "lost another one (" in line and "; the same command goes on" in line for line in ours(done)
    )
    assert [step_of(p) for p in complete_checkpoints(out / "checkpoints")] == [9, 12]
    return out


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "2x32"
    assert torchrun(2, cache, out, dropout=0.0).returncode == 0
    return out


WAITING = """
import sys, time
import torch.distributed as dist
from distilcache.stages.student_train.ranks import Ranks
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
time.sleep(rank)
begun = time.monotonic()
Ranks(rank, 2).wait()
print(time.monotonic() - begun)
"""


def test_ranks_wait_for_each_other(tmp_path):
    command = [sys.executable, "-c", WAITING]
    first, late = (
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE)
        for rank in (0, 1)
    )
    waited = float(first.communicate(timeout=120)[0])
    assert late.wait(timeout=120) == 0
    assert waited > 0.5


def test_a_lost_rank_is_named_before_signals_are_given_back(cache, tmp_path, monkeypatch, capsys):
    """Torchrun ends the others by a signal, at once: this process must have said its line."""
    before = signal.getsignal(signal.SIGTERM)

    def lost(*args, **kwargs):
        monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(ranks.dist, "get_rank", lambda: 3)
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    def leave(code):
        assert signal.getsignal(signal.SIGTERM) != before
        raise SystemExit(code)

    monkeypatch.setattr(DistillationTrainer, "train", lost)
    monkeypatch.setattr(ranks, "_count", lambda key, amount: amount)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="75"):
        alone(cache, tmp_path / "2x32")
    line = capsys.readouterr().err
    assert "rank 3 lost another one (RuntimeError: [gloo/" in line
    assert "Connection closed by peer); the same command goes on" in line


@pytest.mark.parametrize(
    ("tokens", "steps", "train"),
    [
        (None, 9, {"epochs": 1.0}),
        (36, 5, {"steps": 5, "signal": "replay", "batch_size": 4, "logging_steps": 1}),
        (None, 4, {"steps": 4, "ids": 0.9}),
        (None, 3, {"steps": 3, "size": "1x32", "alpha_ce": 0.0, "alpha_mlm": 0.0}),
    ],
    ids=["whole", "sampled", "trimmed", "no logits"],
)
def test_gradients_are_those_of_one_rank(cache, tmp_path, monkeypatch, tokens, steps, train):
    """Every step of an epoch, the longer last one among them; the weights stand still.

    Or steps over samples of the vocabulary, which depend on the tokens that both ranks name. Or of
    a student with fewer ids than its teacher. Or without a loss on logits, which uses no LM head.
    """
    if tokens:
        monkeypatch.setattr(vocabulary, "LEAST", tokens)
    settings = {"dropout": 0.0, "lr": 1e-20, **train}
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
    done = torchrun(2, cache, tmp_path / "out2", gradients=tmp_path / "2", **settings)
    assert done.returncode == 0, done.stderr

    monkeypatch.setattr(DistillationTrainer, "_clip_grad_norm", keep_gradients(tmp_path / "1"))
    alone(cache, tmp_path / "out1", **settings)
    files = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert len(files) == steps
    assert {m.get("vocabulary") for m in metrics(tmp_path / "out2")} == {tokens}
    for step in files:
        one, two = (load_file(tmp_path / str(world) / step) for world in (1, 2))
        assert one.keys() == two.keys()
        for name in one:
            scale = one[name].abs().max()
            assert (one[name] - two[name]).abs().max() <= 2e-5 * scale + 1e-7, (step, name)
    one, two = logged(tmp_path / "out1"), logged(tmp_path / "out2")
    assert {s: pytest.approx(v, rel=1e-5) for s, v in one.items()} == two
    results = [json.loads((tmp_path / f"out{w}/training.json").read_text()) for w in (1, 2)]
    assert results[0]["result"]["tokens"] == results[1]["result"]["tokens"]


def test_killed_ranks_give_the_same_weights(cache, killed, uninterrupted, tmp_path):
    out = shutil.copytree(killed, tmp_path / "2x32")
    done = torchrun(2, cache, out, dropout=0.0)
    assert done.returncode == 0, done.stderr
    assert same(out, uninterrupted)
    # Means start anew at a checkpoint; lines whose steps it does not part are the same.
    ends = {step: values for step, values in logged(uninterrupted).items() if step not in (4, 16)}
    assert {s: v for s, v in logged(out).items() if s not in (4, 16)} == ends


def test_two_ranks_are_continued_by_one(cache, killed, uninterrupted, tmp_path, monkeypatch):
    read = []
    plain = CachedBatches.__getitem__
    monkeypatch.setattr(
        CachedBatches, "__getitem__", lambda self, k: read.append(k) or plain(self, k)
    )
    out = shutil.copytree(killed, tmp_path / "2x32")
    alone(cache, out, dropout=0.0)
    assert read == list(range(12 * 2, 27 * 2))
    assert near(out, uninterrupted)


def test_ranks_do_not_share_a_student(cache, tmp_path):
    out = tmp_path / "2x32"
    out.mkdir()
    with locked(out, "train"):
        done = torchrun(2, cache, out)
    assert done.returncode == 1
    assert "InUse: train: output must not be in use" in done.stderr
    assert list(out.iterdir()) == []


def test_sequences_per_second_are_those_of_all_ranks(uninterrupted):
    events = EventAccumulator(str(uninterrupted / "tensorboard")).Reload()
    rate, seconds = (
        events.Scalars(f"train/train_{name}")[-1].value
        for name in ("samples_per_second", "runtime")
    )
    assert rate * seconds == pytest.approx(27 * 2 * 8, rel=0.01)


def test_results_alone_go_to_stdout(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    before = os.dup(1)
    try:
        _keep_stdout()
        os.write(1, b"[Gloo] Rank 0 is connected")
        print("results", flush=True)
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert capfd.readouterr() == ("results\n", "[Gloo] Rank 0 is connected")


def test_a_rank_ends_with_its_launcher(monkeypatch):
    monkeypatch.setattr("distilcache.pipeline.ranks.launch.WATCH_SECONDS", 0.01)
    read, write = os.pipe()
    launcher = os.fork()
    if not launcher:
        launcher = os.getpid()
        if not os.fork():
            os.close(read)
            os.write(write, b"begun ")
            _end_with(launcher)
            os.write(write, b"not reached")
        time.sleep(0.3)
        os._exit(0)
    os.close(write)
    begun = time.monotonic()
    with os.fdopen(read, "rb") as said:
        assert said.read() == b"begun "  # up to the end of the last writer
    assert time.monotonic() - begun > 0.2
    os.waitpid(launcher, 0)


@pytest.mark.slow
def test_one_rank_is_continued_by_two(cache, uninterrupted, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "2x32"
    plain = MicroBatches.set_epoch
    with monkeypatch.context() as patch:
        patch.setattr(
            MicroBatches, "set_epoch", lambda self, e: fail() if e == 1 else plain(self, e)
        )
        with pytest.raises(KeyboardInterrupt):
            alone(cache, out, dropout=0.0)
    assert step_of(complete_checkpoints(out / "checkpoints")[-1]) == 9
    done = torchrun(2, cache, out, dropout=0.0)
    assert done.returncode == 0, done.stderr
    assert near(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_killed_with_dropout_and_restarted_by_torchrun(cache, tmp_path, world):
    """With four ranks rounding depends on how DDP packs gradients, too."""
    assert torchrun(world, cache, tmp_path / "whole").returncode == 0
    done = torchrun(world, cache, tmp_path / "killed", kill={0: 4, 1: 13}, restarts=3)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "whole", tmp_path / "killed")


def test_generators_come_back_and_new_ranks_draw_their_own(tmp_path):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        (folder / "rng-0.safetensors").write_bytes(rng_state())
        expected = torch.rand(3)
        restore_rng(folder, 0, seed=1)
        assert torch.equal(torch.rand(3), expected)
        drawn = set()
        for rank, seed in ((1, 1), (2, 1), (1, 2)):
            restore_rng(folder, rank, seed)
            drawn.add(tuple(torch.rand(3).tolist()))
        assert len(drawn) == 3


def test_alone_everything_is_its_own():
    assert ALONE.sum([1, 2.5]) == [1, 2.5]
    assert ALONE.from_first(7) == 7
    assert ALONE.gather(b"x") == [b"x"]
    assert ALONE.is_first
    assert not ALONE.any(False)


def test_more_ranks_than_gpus_is_found_by_all_and_said_once(monkeypatch):
    """Ranks without a GPU of their own must not leave the others waiting for them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(ranks, "_meet", lambda _: pytest.fail("waits for ranks that have ended"))
    said = r"processes must have a GPU each, got 3 with 2; use --nproc 2 or --set device=cpu"
    for device in ("auto", "cuda"):
        claims = []
        for rank in range(3):
            # The second of two machines: its first rank is not the first of all.
            values = {"RANK": 3 + rank, "LOCAL_RANK": rank, "WORLD_SIZE": 6, "LOCAL_WORLD_SIZE": 3}
            for name, value in values.items():
                monkeypatch.setenv(name, str(value))
            with pytest.raises(UserError, match=said):
                join_ranks(device)
            claims.append(claim_error())
        assert claims == [True, False, False]
    monkeypatch.delenv("WORLD_SIZE")
    recipe = Recipe(name="tiny", device="auto")
    monkeypatch.setattr(launching, "launch", lambda *_: pytest.fail("has started processes"))
    with pytest.raises(UserError, match=said):
        train_on_ranks(recipe, (), engine="local", nproc=3, max_restarts=0, ray_address=None)


def test_streams_must_divide_the_batch():
    with pytest.raises(UserError, match=r"streams must divide the batch size \(8\), got 3"):
        TrainConfig(batch_size=8, streams=3)
