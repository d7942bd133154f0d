"""Stages of the command line in processes that can be killed, and what they leave behind.

Runs are forked from one process that has imported everything, so that a run takes a second and
dozens can be killed; a fork is killed like any process.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.stages.student_train.training_state import complete_checkpoints
from tests.command_line import ROOT, environment, write_recipe
from tests.damage import check

ZYGOTE = """
import codecs, json, os, resource, signal, sys, time
codecs.lookup("utf-8-sig")  # its file may be out of reach of another user
import torch
torch.set_num_threads(1)
import transformers, distilcache.stages.teacher_cache.pipeline, distilcache.stages.verify.rerun
from transformers import AutoModelForMaskedLM, BertForMaskedLM, DistilBertForMaskedLM, Trainer
import distilcache.stages.evaluate.run, distilcache.stages.student_train.run
from distilcache.pipeline import flow
from distilcache.pipeline.cli import main

def child(task, begun):
    os.setsid()
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT
                      else signal.SIG_DFL)
    if task.get("file_bytes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_bytes"],) * 2)
    if task.get("clock"):
        real, calls = time.time, []
        time.time = lambda: calls.append(0) or real() - task["clock"] * len(calls)
    if task.get("user") and os.geteuid() == 0:
        os.setgroups([]), os.setgid(task["user"]), os.setuid(task["user"])
    code = 0
    try:
        os.write(begun, b"1")
        main(task["arguments"])
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    seen, begun = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(seen)
        child(task, begun)
    os.close(begun)
    os.read(seen, 1)  # Faults are for the command, not for the making of its process.
    os.close(seen)
    start = time.monotonic()
    deadline, status = task.get("after"), None
    while status is None:
        done, found = os.waitpid(pid, os.WNOHANG)
        if done:
            status = found
        elif deadline is not None and time.monotonic() - start >= deadline:
            os.kill(pid, task["signal"])
            deadline = None
        else:
            time.sleep(0.001)
    seconds = time.monotonic() - start
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": seconds}), flush=True)
"""
SECTIONS = {
    "corpus": {"chunk_bytes": 1024},
    "cache": {"rounds": 2, "blocks_per_shard": 1, "hidden_layers": [1, -1]},
    "student": {"sizes": ["2x32"]},
    "train": {"batch_size": 8, "epochs": 4.0, "logging_steps": 4, "save_steps": 3},
}
STAGES = ("corpus", "teacher-cache", "student-train")


class Runs:
    """The command line, in processes that can be killed."""

    def __init__(self):
        self.process = self.start()

    def start(self):
        process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        return process

    def __call__(self, *arguments, log=None, **task):
        """Exit code, seconds and output of one command."""
        with tempfile.NamedTemporaryFile(mode="w+", suffix=".log") as file:
            os.chmod(file.name, 0o666)
            task = {"arguments": [str(a) for a in arguments], "log": file.name, **task}
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            found = json.loads(self.process.stdout.readline())
            return found["code"], found["seconds"], Path(file.name).read_text(errors="replace")

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def make_project(runs, home, text, teacher):
    """Every stage once, without a fault; the seconds of each."""
    (home / "text.txt").write_bytes(text.read_bytes())
    write_recipe(home / "recipe.toml", home / "text.txt", teacher, **SECTIONS)
    seconds = {}
    for stage in STAGES:
        code, seconds[stage], log = runs(*command(stage, home))
        assert code == 0, log
    return home, seconds, teacher


def move_corpus(folder, old):
    """Tell a corpus where its text lies now: it names its sources by path."""
    request = folder / "p" / "corpus" / "build.json"
    if request.exists():
        request.write_text(request.read_text().replace(str(old), str(folder)))


def command(stage, home):
    """Arguments of a stage in a project."""
    return stage, "--recipe", home / "recipe.toml"


def result(home, stage) -> Path:
    """The folder that a stage makes."""
    return home / "p" / {"corpus": "corpus", "teacher-cache": "cache"}.get(stage, "students/2x32")


def content(home, stage, tree):
    """What a stage has made, as far as it must not depend on its history."""
    folder = result(home, stage)
    if stage == "student-train":
        weights = load_file(folder / "model.safetensors")
        return {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in weights.items()}
    if stage == "teacher-cache":
        return tree(folder)
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "build.json"
    }


def check_unfinished(home, stage):
    """What is there is whole, whenever it was interrupted."""
    folder = result(home, stage)
    if stage == "teacher-cache" and (folder / "provenance.json").exists():
        faults = check(folder)
        assert all("must be complete, got no manifest.json" in text for text in faults), faults
    if stage == "corpus":
        if (folder / "manifest.json").exists():
            Corpus.open(folder).verify()
        else:
            with pytest.raises(UserError, match="must be a finished corpus"):
                Corpus.open(folder)
    if stage == "student-train":
        for path in complete_checkpoints(folder / "checkpoints"):
            for file in path.glob("*.safetensors"):
                load_file(file)
            assert all(json.loads(file.read_text()) for file in path.glob("*.json"))


def interrupt(runs, whole, project, tree, stage, count, seed, number=signal.SIGKILL):
    """Interrupt a stage at random moments until it has happened ``count`` times."""
    home, seconds, _ = whole
    expected = content(home, stage, tree)
    rng, happened, folder = random.Random(seed), 0, None
    while happened < count or folder is not None:
        folder = folder or project(stage)
        after = rng.uniform(0, seconds[stage]) if happened < count else None
        code, _, log = runs(*command(stage, folder), after=after, signal=int(number))
        check_unfinished(folder, stage)
        if code == 0:
            assert content(folder, stage, tree) == expected
            shutil.rmtree(folder)
            folder = None
        else:
            happened += 1
            assert "Traceback" not in log, log
            if number == signal.SIGKILL:
                assert code == -signal.SIGKILL, (code, log)
            else:
                assert code == 128 + number, (code, log)
                assert "goes on from" in log
    return happened
