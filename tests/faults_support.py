"""Stages of the command line in processes that can be killed, and what they leave behind."""

import codecs
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.storage.locks import FILE as LOCK
from distilcache.pipeline.cli import main
from distilcache.stages.student_train.checkpoint_folders import complete_checkpoints
from tests.command_line import ROOT, environment, write_recipe
from tests.damage import check, read_corpus
from tests.forked import Forked, server

SECTIONS = {
    "corpus": {"chunk_bytes": 1024},
    "cache": {"rounds": 2, "blocks_per_shard": 1, "hidden_layers": [1, -1]},
    "student": {"sizes": ["2x32"]},
    "train": {"batch_size": 8, "epochs": 4.0, "logging_steps": 4, "save_steps": 3},
}
STAGES = ("corpus", "teacher-cache", "student-train")


def run(*arguments, after=None, number=signal.SIGKILL, **faults):
    """Exit code, seconds and output of one command, in a process of its own.

    Args:
        arguments: Of the command line.
        after: Seconds until the process gets a signal.
        number: That signal.
        faults: See :func:`faulty`.
    """
    ours, begun = server().Pipe(duplex=False)
    task = begun, [str(a) for a in arguments], faults
    process = Forked(faulty, *task, env=environment(), cwd=ROOT)
    begun.close()
    ours.poll(60)  # Faults are for the command, not for the making of its process.
    start = time.monotonic()
    if after is not None and not process.ends(after):
        process.send_signal(number)
    said = process.communicate(600)
    return process.returncode, time.monotonic() - start, "".join(said)


def faulty(begun, arguments, faults):
    """The command line where files may have ``file_bytes``, for a ``user``, or by a ``clock``
    that goes so many seconds back whenever it is read."""
    if "file_bytes" in faults:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults["file_bytes"],) * 2)
    if "clock" in faults:
        real, calls = time.time, itertools.count(1)
        time.time = lambda: real() - faults["clock"] * next(calls)
    if "user" in faults and os.geteuid() == 0:
        codecs.lookup("utf-8-sig")  # its file may be out of reach of another user
        os.setgroups([])
        os.setgid(faults["user"])
        os.setuid(faults["user"])
    begun.send(True)
    try:
        main(arguments)
    finally:  # A signal after the command's last line would meet nothing but its process's end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def make_project(home, text, teacher):
    """Every stage once, without a fault; the seconds of each."""
    (home / "text.txt").write_bytes(text.read_bytes())
    write_recipe(home / "recipe.toml", home / "text.txt", teacher, **SECTIONS)
    seconds = {}
    for stage in STAGES:
        code, seconds[stage], log = run(*command(stage, home))
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
    # A run that is killed once all is done leaves its lock, which is empty and nobody's.
    history = ("build.json", LOCK)
    return {n: found for n, found in tree(folder).items() if Path(n).name not in history}


def check_unfinished(home, stage):
    """What is there is whole, whenever it was interrupted."""
    folder = result(home, stage)
    if stage == "teacher-cache" and (folder / "provenance.json").exists():
        faults = check(folder)
        assert all("must be complete, got no manifest.json" in text for text in faults), faults
    if stage == "corpus":
        if (folder / "manifest.json").exists():
            read_corpus(folder)
        else:
            with pytest.raises(UserError, match="must be a finished corpus"):
                Corpus.open(folder)
    if stage == "student-train":
        for path in complete_checkpoints(folder / "checkpoints"):
            for file in path.glob("*.safetensors"):
                load_file(file)
            assert all(json.loads(file.read_text()) for file in path.glob("*.json"))


def interrupt(whole, project, tree, stage, count, seed, number=signal.SIGKILL):
    """Interrupt a stage at random moments until it has happened ``count`` times."""
    home, seconds, _ = whole
    expected = content(home, stage, tree)
    rng, happened, folder = random.Random(seed), 0, None
    while happened < count or folder is not None:
        folder = folder or project(stage)
        after = rng.uniform(0, seconds[stage]) if happened < count else None
        code, _, log = run(*command(stage, folder), after=after, number=number)
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
