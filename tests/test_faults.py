"""Whatever ends a run, the same command goes on, and the end is the same to the bit.

Runs are those of the command line. They are forked from one process that has imported everything,
so that a run takes a second and dozens can be killed; a fork is killed like any process.
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
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from data.corpus import Corpus
from data.errors import UserError
from data.shards import shard_path
from data.verify import Settings, verify_cache
from stages.student_train.checkpoints import complete_checkpoints
from tests.command_line import ROOT, environment, start, wait_until, write_recipe

KILLS = 50
"""Per stage, in the slow run."""
ZYGOTE = """
import codecs, json, os, resource, signal, sys, time
codecs.lookup("utf-8-sig")  # its file may be out of reach of another user
import torch
torch.set_num_threads(1)
import transformers, stages.teacher_cache.pipeline, stages.verify.replay
from transformers import AutoModelForMaskedLM, BertForMaskedLM, DistilBertForMaskedLM, Trainer
from pipeline import flow
from pipeline.cli import main

def child(task):
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
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        child(task)
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


@pytest.fixture(scope="module")
def runs():
    found = Runs()
    yield found
    found.close()


@pytest.fixture(scope="module")
def whole(runs, small_corpus, small_teacher, tmp_path_factory):
    """A project of which every stage was run once without a fault, and the seconds of each."""
    home = tmp_path_factory.mktemp("faults")
    text = small_corpus().parent / "text.txt"
    return make_project(runs, home, text, small_teacher)


def make_project(runs, home, text, teacher):
    (home / "text.txt").write_bytes(text.read_bytes())
    write_recipe(home / "recipe.toml", home / "text.txt", teacher, **SECTIONS)
    seconds = {}
    for stage in STAGES:
        code, seconds[stage], log = runs(*command(stage, home))
        assert code == 0, log
    return home, seconds, teacher


def move_corpus(folder, old):
    """Corpora name their sources by path."""
    request = folder / "p" / "corpus" / "build.json"
    if request.exists():
        request.write_text(request.read_text().replace(str(old), str(folder)))


def command(stage, home):
    return stage, "--recipe", home / "recipe.toml"


@pytest.fixture
def project(whole, tmp_path):
    """``project(stage)``: all that comes before a stage, and the folder of what it makes."""
    home, _, teacher = whole

    def make(stage):
        folder = tmp_path / f"{stage}-{len(list(tmp_path.iterdir()))}"
        (folder / "p").mkdir(parents=True)
        shutil.copy(home / "text.txt", folder)
        write_recipe(folder / "recipe.toml", folder / "text.txt", teacher, **SECTIONS)
        for name in ("corpus", "cache")[: STAGES.index(stage)]:
            shutil.copytree(home / "p" / name, folder / "p" / name)
        move_corpus(folder, home)
        return folder

    return make


def result(home, stage) -> Path:
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
        faults = [fault.text for fault in verify_cache(folder, Settings(workers=1))]
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
            elif number == signal.SIGINT:
                assert code == 130, (code, log)
                assert "goes on from" in log
    return happened


# ---- ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_a_few_random_moments(runs, whole, project, tree, stage):
    assert interrupt(runs, whole, project, tree, stage, 4, seed=stage) == 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_many_random_moments(runs, whole, project, tree, stage):
    assert interrupt(runs, whole, project, tree, stage, KILLS, seed=f"many {stage}") == KILLS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_and_ctrl_c(runs, whole, project, tree, stage, number):
    interrupt(runs, whole, project, tree, stage, 1, seed=f"{stage} {number}", number=number)


def test_kill_9_of_a_fresh_command(whole, project, tree):
    """The same with a process that was started and not forked."""
    home, _, _ = whole
    folder = project("teacher-cache")
    process = start(folder / "recipe.toml", "teacher-cache")
    marker = shard_path(result(folder, "teacher-cache"), 0, 2).with_suffix(".json")
    wait_until(marker.exists, process)
    process.kill()
    process.communicate()
    check_unfinished(folder, "teacher-cache")
    process = start(folder / "recipe.toml", "teacher-cache")
    _, log = process.communicate()
    assert process.returncode == 0, log
    assert content(folder, "teacher-cache", tree) == content(home, "teacher-cache", tree)


# ---- storage ---------------------------------------------------------------------------------


def one_line(code, log) -> str:
    assert code == 2, log
    assert "Traceback" not in log, log
    (line,) = [line for line in log.splitlines() if line.startswith("distilcache: ")]
    return line


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(runs, whole, project, tree, stage):
    """A limit on the size of a file stands for it: every write beyond fails with an OSError."""
    home, _, _ = whole
    folder = project(stage)
    sizes = sorted(p.stat().st_size for p in result(home, stage).rglob("*") if p.is_file())
    for share in (0.3, 0.9):
        limit = max(600, int(sizes[-1] * share))
        code, _, log = runs(*command(stage, folder), file_bytes=limit)
        assert "File too large" in one_line(code, log)
        check_unfinished(folder, stage)
        assert not [p for p in result(folder, stage).rglob("*.tmp") if p.is_file()]
    code, _, log = runs(*command(stage, folder))
    assert code == 0, log
    assert content(folder, stage, tree) == content(home, stage, tree)


@pytest.fixture
def open_folder():
    """A folder that every user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def everybody_may_read(path):
    """Whether other users reach a folder."""
    return all(p.stat().st_mode & 0o005 == 0o005 for p in (path, *path.parents))


@pytest.mark.skipif(
    not everybody_may_read(Path(np.__file__).parent),
    reason="the environment lies in a folder that other users cannot read",
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_cannot_be_written(runs, whole, project, open_folder, stage):
    _, _, teacher = whole
    made = project(stage)
    folder = shutil.copytree(made, open_folder / "project")
    shutil.copytree(teacher, folder / "teacher")
    write_recipe(folder / "recipe.toml", folder / "text.txt", folder / "teacher", **SECTIONS)
    move_corpus(folder, made)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(p for p in folder.rglob("*"))
    code, _, log = runs(*command(stage, folder), user=65534)
    line = one_line(code, log)
    assert "denied" in line or "writable" in line or "sources" in line
    assert sorted(p for p in folder.rglob("*")) == before
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)


def test_a_truncated_tar_is_refused_repaired_and_made_again(runs, whole, project, tree):
    home, _, _ = whole
    folder = project("student-train")
    cache = folder / "p" / "cache"
    tar = shard_path(cache, 0, 2)
    os.truncate(tar, tar.stat().st_size // 4)  # the rest of so small a tar is padding
    code, _, log = runs(*command("student-train", folder))
    assert "shard-000002.tar" in one_line(code, log)
    code, _, log = runs("verify", cache)
    assert "repeat with --repair" in one_line(code, log)
    assert tar.exists()
    code, _, log = runs("verify", cache, "--repair")
    assert "to make again what was removed" in one_line(code, log)
    assert f"removed: {tar.relative_to(cache)}" in log
    code, _, log = runs(*command("teacher-cache", folder))
    assert code == 0, log
    assert content(folder, "teacher-cache", tree) == content(home, "teacher-cache", tree)
    assert runs("verify", cache)[0] == 0
    code, _, log = runs(*command("student-train", folder))
    assert code == 0, log
    assert content(folder, "student-train", tree) == content(home, "student-train", tree)


def test_a_verify_that_is_killed_goes_on(runs, whole, project):
    home, _, _ = whole
    cache = shutil.copytree(home / "p" / "cache", project("corpus") / "cache")
    code, seconds, log = runs("verify", cache, "--workers", 1)
    assert code == 0, log
    rng = random.Random(0)
    for _ in range(3):
        runs("verify", cache, after=rng.uniform(0, seconds), signal=int(signal.SIGKILL))
    code, _, log = runs("verify", cache)
    assert code == 0, log
    assert "no fault" in log
    assert not (cache / ".verify").exists()


# ---- others ----------------------------------------------------------------------------------


def test_two_runs_on_one_cache_at_once(whole, project, tree):
    home, _, _ = whole
    folder = project("teacher-cache")
    pair = [Runs(), Runs()]
    found = [None, None]

    def go(which):
        found[which] = pair[which](*command("teacher-cache", folder))

    threads = [threading.Thread(target=go, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in pair:
        each.close()
    assert 0 in [code for code, _, _ in found]
    for code, _, log in found:
        if code:
            assert "must not be in use" in one_line(code, log)
    assert content(folder, "teacher-cache", tree) == content(home, "teacher-cache", tree)


@pytest.mark.parametrize("stage", STAGES)
def test_a_clock_that_goes_back(runs, whole, project, tree, stage):
    """What is there seems to come from the future, and time goes back with every look at it."""
    home, seconds, _ = whole
    folder = project(stage)
    runs(*command(stage, folder), after=0.6 * seconds[stage], signal=int(signal.SIGKILL))
    future = 4e9
    for path in result(folder, stage).rglob("*"):
        os.utime(path, (future, future))
    code, _, log = runs(*command(stage, folder), clock=3600)
    assert code == 0, log
    assert content(folder, stage, tree) == content(home, stage, tree)


def test_a_text_that_changed_between_runs(runs, whole, project, tree):
    home, _, _ = whole
    folder = project("teacher-cache")
    before = content(folder, "corpus", tree)
    text = folder / "text.txt"
    text.write_text(text.read_text().replace("amber", "zebra"))
    os.utime(text, (1, 1))
    code, _, log = runs(*command("teacher-cache", folder))
    assert "corpus" in one_line(code, log)
    assert content(folder, "corpus", tree) == before
    assert not result(folder, "teacher-cache").exists()


def test_a_text_that_changed_while_the_corpus_was_made(runs, whole, project, tree):
    """Parts of the old text are not mixed with parts of the new."""
    _, seconds, _ = whole
    folder = project("corpus")
    text = folder / "text.txt"
    runs(*command("corpus", folder), after=0.7 * seconds["corpus"], signal=int(signal.SIGKILL))
    text.write_text(text.read_text().replace("amber", "zebra"))
    code, _, log = runs(*command("corpus", folder))
    if code:  # it was finished already
        one_line(code, log)
        return
    Corpus.open(result(folder, "corpus")).verify()
    found = content(folder, "corpus", tree)
    shutil.rmtree(result(folder, "corpus"))
    assert runs(*command("corpus", folder))[0] == 0
    assert content(folder, "corpus", tree) == found


def test_a_deleted_index(runs, whole, project, tree):
    home, _, _ = whole
    folder = project("student-train")
    (folder / "p" / "cache" / "index.arrow").unlink()
    code, _, log = runs(*command("student-train", folder))
    assert "index.arrow" in one_line(code, log)
    code, _, log = runs("verify", folder / "p" / "cache", "--repair")
    assert "manifest.json" in log
    one_line(code, log)
    code, _, log = runs(*command("teacher-cache", folder))
    assert code == 0, log
    assert content(folder, "teacher-cache", tree) == content(home, "teacher-cache", tree)


def test_the_moments_are_seeded():
    assert random.Random("corpus").uniform(0, 1) == random.Random("corpus").uniform(0, 1)
    assert len(np.unique([random.Random(stage).random() for stage in STAGES])) == 3
