"""Several processes that train one student: gradients, kill -9 of a rank, other numbers of ranks.

They are started by torchrun, on the CPU (gloo); the truth is the same training in one process, or
without interruption.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.cache import Cache
from data.dataset import CachedBatches
from data.errors import UserError
from data.shards import shard_path
from stages.student_train.callbacks import MicroBatches
from stages.student_train.checkpoints import complete_checkpoints, restore_rng, rng_state, step_of
from stages.student_train.config import StudentConfig, TrainConfig
from stages.student_train.ranks import ALONE
from stages.student_train.run import train_student
from stages.student_train.trainer import DistillationTrainer

ROOT = Path(__file__).parents[2]
TRAIN = {
    "batch_size": 8, "streams": 4, "accumulation": 2, "epochs": 3.0, "logging_steps": 4,
    "save_steps": 3, "window_blocks": 4,
}  # fmt: skip
"""147 sequences: 18 micro-batches, the last one longer than the others; 9 steps per epoch."""

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from data.dataset import CachedBatches
from stages.student_train.config import StudentConfig, TrainConfig
from stages.student_train.run import train_student
from stages.student_train.trainer import DistillationTrainer

job = json.loads(sys.argv[1])
rank, attempt = int(os.environ.get("RANK", 0)), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

plain = DistillationTrainer.compute_loss
def compute_loss(self, *args, **kwargs):
    if rank == 1 and job["kill"].get(attempt) == self.state.global_step:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *args, **kwargs)
DistillationTrainer.compute_loss = compute_loss

if job["gradients"]:
    def clip(self, model):
        step = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad}
        if rank == 0:
            save_file(step, Path(job["gradients"]) / f"{self.state.global_step}.safetensors")
        return torch.zeros(())
    DistillationTrainer._clip_grad_norm = clip

train_student(
    cache_dir=Path(job["cache"]), out=Path(job["out"]), size="2x32",
    student=StudentConfig(sizes=("2x32",), dropout=job["dropout"]),
    train=TrainConfig(**job["train"]), device="cpu", dtype="float32",
)
"""


def torchrun(world, cache, out, *, kill=None, restarts=0, gradients="", dropout=0.1, **train):
    """The run on ``world`` ranks; ``kill``: step at which rank 1 is killed, by attempt."""
    job = {
        "cache": str(cache), "out": str(out), "kill": kill or {}, "gradients": str(gradients),
        "dropout": dropout, "train": {**TRAIN, **train},
    }  # fmt: skip
    script = out.parent / f"{out.name}.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["--local-addr", "127.0.0.1", "--max-restarts", str(restarts)]
    return subprocess.run(
        [*command, str(script), json.dumps(job)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def alone(cache, out, *, dropout=0.1, **train):
    return train_student(
        cache_dir=cache,
        out=out,
        size="2x32",
        student=StudentConfig(sizes=("2x32",), dropout=dropout),
        train=TrainConfig(**{**TRAIN, **train}),
        device="cpu",
        dtype="float32",
    )


def weights(out):
    return load_file(out / "model.safetensors")


def same(a, b):
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def near(a, b):
    left, right = weights(a), weights(b)
    return max((left[n] - right[n]).abs().max().item() for n in left) < 2e-4


def logged(out):
    """Loss terms by step, without the clock."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {m["step"]: (m["loss"], m["ce"], m["mlm"], m["cos"], m["grad_norm"]) for m in lines}


def ours(done):
    """Lines that this project says."""
    return [line for line in done.stderr.splitlines() if line.startswith("distilcache: ")]


@pytest.fixture(scope="module")
def cache(tiny_cache):
    """Positions that count differently, in two sets."""
    return tiny_cache(hidden_dtype="float16", positions="masked+0.3", logit_positions="masked")


@pytest.fixture(scope="module")
def killed(cache, tmp_path_factory):
    """Two ranks; one is killed in epoch 1, and again in epoch 2 after torchrun's restart."""
    out = tmp_path_factory.mktemp("killed") / "2x32"
    done = torchrun(2, cache, out, kill={"0": 4, "1": 13}, restarts=1, dropout=0.0)
    assert done.returncode == 1
    assert "exitcode  : -9" in done.stderr
    assert len(ours(done)) == 2
    assert all("lost another one; the same command goes on" in line for line in ours(done))
    assert [step_of(p) for p in complete_checkpoints(out / "checkpoints")] == [9, 12]
    return out


def test_gradients_are_those_of_one_rank(cache, tmp_path, monkeypatch):
    """Every step of an epoch, the longer last one among them; the weights stand still."""
    settings = {"dropout": 0.0, "lr": 1e-20, "epochs": 1.0}
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
    done = torchrun(2, cache, tmp_path / "out2", gradients=tmp_path / "2", **settings)
    assert done.returncode == 0, done.stderr

    def clip(self, model):
        step = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        save_file(step, tmp_path / "1" / f"{self.state.global_step}.safetensors")
        return torch.zeros(())

    monkeypatch.setattr(DistillationTrainer, "_clip_grad_norm", clip)
    alone(cache, tmp_path / "out1", **settings)
    steps = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert len(steps) == 9
    for step in steps:
        one, two = (load_file(tmp_path / str(world) / step) for world in (1, 2))
        assert one.keys() == two.keys()
        for name in one:
            scale = one[name].abs().max()
            assert (one[name] - two[name]).abs().max() <= 2e-5 * scale + 1e-7, (step, name)
    one, two = logged(tmp_path / "out1"), logged(tmp_path / "out2")
    assert {s: pytest.approx(v, rel=1e-5) for s, v in one.items()} == two
    results = [json.loads((tmp_path / f"out{w}/training.json").read_text()) for w in (1, 2)]
    assert results[0]["result"]["tokens"] == results[1]["result"]["tokens"]


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "2x32"
    assert torchrun(2, cache, out, dropout=0.0).returncode == 0
    return out


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
    done = torchrun(world, cache, tmp_path / "killed", kill={"0": 4, "1": 13}, restarts=3)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "whole", tmp_path / "killed")


RECIPE = """
root = "{root}"
cache_from = "{cache}"
[student]
sizes = ["1x32"]
[train]
batch_size = 8
streams = 2
window_blocks = 1
epochs = 1.0
"""


def nproc(tmp_path, cache, *options):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.format(root=tmp_path / "runs", cache=cache))
    command = [sys.executable, "-m", "pipeline.cli", "student-train", "--recipe", str(recipe)]
    return subprocess.run(
        [*command, "--nproc", "2", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_an_error_on_one_rank_ends_all_with_one_line(cache, tmp_path):
    """A damaged block that the second rank alone reads."""
    copy = shutil.copytree(cache, tmp_path / "cache")
    opened = Cache.open(copy)
    data = CachedBatches(opened, batch_size=8, seed=0, window_blocks=1, streams=2)
    order = data._order(0)
    blocks = [
        {p.block for w in range(data.layout.windows) for p in order.parts(w, s)} for s in (0, 1)
    ]
    entry = opened.entry(min(blocks[1] - blocks[0]))
    tar = shard_path(copy, entry.round, entry.shard)
    content = bytearray(tar.read_bytes())
    content[entry.offset + 40] ^= 1
    tar.write_bytes(content)
    done = nproc(tmp_path, copy)
    assert done.returncode == 2, done.stderr
    assert len(ours(done)) == 1, done.stderr
    assert "crc32" in ours(done)[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_one_command_trains_on_two_processes(cache, tmp_path):
    done = nproc(tmp_path, cache, "--json")
    assert done.returncode == 0, done.stderr
    assert [r["name"] for r in json.loads(done.stdout)] == ["1x32"]
    assert (tmp_path / "runs/tiny/students/1x32/model.safetensors").is_file()
    refused = nproc(tmp_path, cache, "--set", "train.streams=1")
    assert refused.returncode == 2
    assert len(ours(refused)) == 1


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


def test_streams_must_divide_the_batch():
    with pytest.raises(UserError, match=r"streams must divide the batch size \(8\), got 3"):
        TrainConfig(batch_size=8, streams=3)
