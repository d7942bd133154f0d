"""Students that are trained in seconds, and what training leaves of them."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student
from distilcache.stages.student_train.trainer import DistillationTrainer
from tests.command_line import ROOT, environment

TRAIN = {
    "batch_size": 8, "streams": 2, "accumulation": 2, "epochs": 3.0, "logging_steps": 4,
    "save_steps": 3, "alpha_rel": 0.5,
}  # fmt: skip
"""147 sequences: 19 micro-batches, the last one short, so 10 steps per epoch and 30 in all."""


def run(
    cache, out, *, role="student", size="2x32", dropout=0.1, ids=1.0, recipe=None, start="", **train
):
    init = start or ("teacher" if role == "student" else "random")
    student = StudentConfig(sizes=(size,), init=init, dropout=dropout, vocabulary=ids)
    return train_student(
        cache_dir=cache,
        out=out,
        size=size,
        student=student,
        train=TrainConfig(**{**TRAIN, **train}),
        device="cpu",
        dtype="float32",
        role=role,
        recipe=recipe,
    )


@contextmanager
def stopped_at(step, monkeypatch):
    """Within this context training is interrupted at a step."""
    plain = DistillationTrainer.compute_loss

    def stop(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(DistillationTrainer, "compute_loss", stop)
        yield


def weights(out):
    return load_file(out / "model.safetensors")


def same(a, b):
    """Whether two runs ended with the same weights, bit for bit."""
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tiny_cache):
    """What the default signal, replay+topk, and L_rel read; the sets of positions differ."""
    return tiny_cache(
        hidden_dtype="float16", positions="masked+0.3", logit_positions="masked", relation_layer=-1
    )


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "2x32"
    return out, run(cache, out)


def python(*arguments):
    """A Python with this checkout, once it has ended."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def ours(done):
    """Lines that this project says in a process that has ended."""
    return [line for line in done.stderr.splitlines() if line.startswith("distilcache: ")]
