"""Several commands share the runs of one folder."""
# ruff: noqa: F811

import json
import os
import signal
import subprocess
import sys

import pytest

from distilcache.data.errors import UserError
from distilcache.data.storage.locks import claimed, joined
from distilcache.stages.evaluate.tasks import run
from tests.command_line import ROOT, environment, wait_until
from tests.forked import Forked
from tests.stages.evaluate.tasks.tasks_support import (
    data,  # noqa: F401
    entries,  # noqa: F401
    run_on,
)

SETTINGS = {
    "names": ("sst2", "rte"),
    "epochs": 0.5,
    "seeds": (0, 1),
    "distil": True,
    "distil_copies": 2,
    "distil_cos": 1.0,
}


@pytest.fixture
def start(entries, data):
    """Start a command on one thread."""
    started = []

    def command(out):
        process = Forked(run_both, entries[:2], data, out, env=environment(), cwd=ROOT)
        started.append(process)
        return process

    yield command
    for process in started:
        if process.poll() is None:
            process.kill()


def run_both(models, data, out):
    run_on(models, data, out, **SETTINGS)


def figures(out):
    """What does not depend on the time of day, by file."""
    clocks = ("seconds", "training_seconds", "tokens_per_s")
    found = {
        path.relative_to(out): json.loads(path.read_text()) for path in sorted(out.glob("*/*.json"))
    }
    return {
        path: {name: value for name, value in values.items() if name not in clocks}
        for path, values in found.items()
    }


def test_every_run_is_done_once_though_one_command_is_killed(start, entries, data, tmp_path):
    out = tmp_path / "shared"
    processes = [start(out) for _ in range(2)]
    wait_until(lambda: list(out.glob("*/*.json")), processes[0])
    os.kill(processes[0].pid, signal.SIGKILL)
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert processes[1].returncode == 0, said
    jobs = 2 * 2 * 3
    done = [text.count(" s (") for text in said]
    # One figure may have been written by who was killed before he could say so.
    assert jobs - 1 <= sum(done) <= jobs
    # Who is killed may leave the file of a lock, but not the lock, and a half-written file.
    with joined(out):  # as the next command does
        pass
    hidden = [path for path in out.rglob(".*") if path.suffix != ".lock"]
    assert not hidden, "half-written files are gone"
    run_on(entries[:2], data, tmp_path / "alone", **SETTINGS)
    assert len(figures(out)) == jobs
    assert figures(out) == figures(tmp_path / "alone")


def test_a_teacher_that_another_command_replaced_is_not_waited_for(
    entries, data, tmp_path, monkeypatch
):
    original = run.run_job

    def replaced(job, *rest):
        result = original(job, *rest)
        if job.model.entry.role == "student":  # The teacher's run is done, the second step is not.
            run_on(entries[:1], data, tmp_path, epochs=0.2, distil=True)
        return result

    monkeypatch.setattr(run, "run_job", replaced)
    with pytest.raises(UserError, match=r"teacher-seed0.json must stay as it was written"):
        run_on(entries[:2], data, tmp_path, epochs=0.1, distil=True)


def test_a_claim_has_one_owner_at_a_time_and_leaves_nothing(tmp_path):
    path = tmp_path / "deep" / "run.json"
    with claimed(path) as first:
        assert first
        with claimed(path) as second:
            assert not second
        with claimed(path.with_name("other.json")) as other:
            assert other
    with claimed(path) as again:
        assert again
    assert list(path.parent.iterdir()) == []


def test_who_waits_for_a_claim_gets_a_file_that_is_still_there(tmp_path):
    program = (
        "import sys; from pathlib import Path; from distilcache.data.storage.locks import claimed\n"
        "counter = Path(sys.argv[1]) / 'counter'\n"
        "for _ in range(200):\n"
        "    with claimed(counter, wait=True) as ours:\n"
        "        assert ours\n"
        "        counter.write_text(str(int(counter.read_text()) + 1))\n"
    )
    (tmp_path / "counter").write_text("0")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=environment()
        )
        for _ in range(4)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "800"


def test_only_who_is_alone_cleans_up(tmp_path):
    left = tmp_path / "sst2" / ".half.tmp"
    left.parent.mkdir()
    left.write_text("x")
    with joined(tmp_path):
        assert not left.exists()
        left.write_text("x")
        with joined(tmp_path):
            assert left.exists(), "another run may be writing it"
    with joined(tmp_path):
        assert not left.exists()
