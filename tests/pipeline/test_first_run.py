"""What a newcomer sees: progress, what is reused, what comes next, and how to go on."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.builders import WORDS
from tests.command_line import (
    ROOT,
    environment,
    refusal,
    run,
    wait_until,
    watch_training,
    watched,
    work,
    write_text,
)
from tests.forked import fork

KNOWN = ("corpus", "evaluate", "view", "teacher", "teacher cache", "student", "control", "masks",
         "train", "next", "quality", "speed", "report", "starting")  # fmt: skip
"""How lines on stderr begin: with the stage that says something."""


def lines_of(stderr: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]


FOLLOW = """
import shlex, sys
from click.testing import CliRunner
from distilcache.pipeline.cli import main

arguments = sys.argv[1:]
while arguments:
    print("typed", arguments[0])
    done = CliRunner().invoke(main, arguments)
    sys.stderr.write(done.stderr)
    print(done.stdout)
    assert done.exit_code == 0, done.exception
    following = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
    assert len(following) <= 1, following
    arguments = shlex.split(following[0], comments=True)[2:] if following else []
"""
"""Runs a command, then the one that it names, and so on."""


@pytest.fixture
def options(project, tmp_path):
    return ["--recipe", str(project / "tiny.toml"), "--set", f"root={tmp_path}/runs"]


def test_each_command_names_the_next_and_the_last_makes_the_report(options):
    """In a fresh process, so that whatever a library would say is said."""
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, "corpus", *options],
        env={name: value for name, value in environment().items() if name != "MAKELEVEL"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    typed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("typed ")]
    assert typed == ["corpus", "teacher-cache", "student-train", "evaluate", "view"]
    assert "report.md" in done.stdout
    assert "view.html" in done.stdout
    for line in lines_of(done.stderr):
        assert line.startswith(KNOWN), line


def test_long_steps_tell_rate_and_time_left(options):
    """In a log file too, and there by lines of their own."""
    said = run("teacher-cache", *options).stderr
    assert "\r" not in said
    steps = [line for line in lines_of(said) if line.startswith("teacher 2x32: step")]
    assert all(re.search(r"tok/s [\d,]+  \d+:\d\d left$", line) for line in steps)
    assert steps


def test_what_is_there_is_reused_aloud(project, monkeypatch):
    options = ["--recipe", project / "tiny.toml", "--set", f"root={project}/runs"]
    home = project / "runs/tiny"
    done = run("distill", *options)
    said = lines_of(done.stderr)
    assert f"corpus: {home / 'corpus'} is finished and reused" in said
    assert any(f"{home / 'cache'} is finished" in line and "reused" in line for line in said)
    for name in ("1x32", "1x16"):
        assert f"student {name}: complete in {home / 'students' / name}, reused" in said
    assert f"teacher 2x32: complete in {home / 'teacher/model'}, reused" in said
    assert said[-1].startswith(f"next: distilcache view {home / 'cache'}")


def next_of(done):
    """The command that a command names, as words; empty: it names none."""
    assert done.exit_code == 0, (done.output, done.exception)
    named = [line for line in lines_of(done.stderr) if line.startswith("next: ")]
    return shlex.split(named[0], comments=True)[2:] if named else []


def followed(*words):
    """Run a command, then what it names, and so on; returns their names and the last result."""
    typed = []
    words = [str(word) for word in words]
    while words:
        typed.append(words[0])
        done = run(*words)
        words = next_of(done)
    return typed, done


@pytest.fixture
def again(project, monkeypatch):
    """Options of the project that is made already."""
    monkeypatch.delenv("MAKELEVEL", raising=False)
    return ["--recipe", project / "tiny.toml", "--set", f"root={project}/runs"]


@pytest.mark.parametrize(
    ("command", "more", "then"),
    [
        ("distill", [], ["view"]),
        ("student-sweep", ["--size", "1x32"], ["evaluate", "view"]),
    ],
)
def test_what_each_command_names_works(again, command, more, then):
    typed, _ = followed(command, *again, *more)
    assert typed == [command, *then]


def test_a_tokenizer_that_was_trained_may_be_given_later(again, project, tmp_path, small_tokenizer):
    own = [*again, "--set", f"cache_from={project}/runs/tiny/cache"]
    assert "is finished and reused" in run("corpus", *own).stderr
    line = refusal(run("distill", *own, "--set", f"corpus.tokenizer={small_tokenizer}"))
    assert "tokenizer must be that of the cache" in line


def test_training_that_went_well_does_not_end_in_a_fault_of_the_corpus(again, project, tmp_path):
    """It needs none; what comes next says what is wrong with it."""
    (tmp_path / "tiny" / "corpus").mkdir(parents=True)
    (tmp_path / "tiny" / "corpus" / "manifest.json").write_text("{")
    own = [
        *again[:2],
        "--set",
        f"root={tmp_path}",
        "--set",
        f"cache_from={project}/runs/tiny/cache",
    ]
    done = run("student-train", *own, "--size", "1x16", "--set", "student.control=false")
    assert next_of(done)[0] == "evaluate"
    assert "corpus: " in refusal(run("evaluate", *own))


@pytest.mark.parametrize(
    ("first", "more", "then"),
    [
        ("corpus", [], ["student-train", "evaluate", "view"]),
        ("student-train", [], ["evaluate", "view"]),
        # No text to measure on.
        ("student-train", ["--set", "corpus.heldout_fraction=0"], ["view"]),
    ],
)
def test_what_is_named_works_with_a_cache_under_a_url(
    again, project, tmp_path, monkeypatch, first, more, then
):
    """There is no corpus beside such a cache, and its students are not beside it."""
    monkeypatch.setenv("DISTILCACHE_HOME", str(tmp_path / "home"))
    url = f"memory://{uuid.uuid4()}/cache"
    assert run("publish", project / "runs/tiny/cache", url).exit_code == 0
    own = ["--set", f"root={tmp_path}", "--set", f"cache_from={url}"]
    # Other text, of which another tokenizer would be trained, and no teacher to take it from.
    write_text(tmp_path / "other.txt", words=WORDS)
    own += ["--set", f"corpus.sources={tmp_path / 'other.txt'}"]
    own += ["--set", "teacher.size=", "--set", "student.control=false"]
    typed, done = followed(first, *again[:2], *own, *more)
    assert typed == [first, *then]
    assert "2 students" in done.stdout
    if "evaluate" in then:  # and what is there now is taken
        assert "is finished and reused" in run("corpus", *again[:2], *own).stderr
    assert (tmp_path / "tiny" / "view.html").is_file()


def test_who_typed_make_is_told_what_to_make(project):
    options = ["--recipe", project / "tiny.toml", "--set", f"root={project}/runs"]
    done = run("corpus", *options, env={"MAKELEVEL": "1"})
    root = f"SET=root={project}/runs"
    assert lines_of(done.stderr)[-1] == (
        f"next: make teacher-cache RECIPE={project / 'tiny.toml'} {root}"
    )


def test_ctrl_c_in_training_is_one_line_and_the_same_command_goes_on(project, tmp_path):
    watch_training(tmp_path)
    recipe = Path(shutil.copy(project / "tiny.toml", tmp_path))
    steps = ["--set", "train.steps=12", "--set", f"cache_from={project}/runs/tiny/cache"]
    options = ["--size", "1x32", "--set", f"root={tmp_path}", "--set", "student.control=false"]
    options += steps
    process = fork(recipe, "student-train", *options, env=watched(recipe, 0.3))
    wait_until(lambda: len(work(recipe)) > 3, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (last,) = [line for line in lines_of(said) if not line.startswith(KNOWN)]
    assert re.match(r"distilcache: train: stopped by SIGINT at step \d+ of 12, .* goes on", last)
    assert lines_of(said)[-1] == last
    done = run("student-train", "--recipe", recipe, *options)
    assert done.exit_code == 0, done.stderr
    first = next(line for line in lines_of(done.stderr) if ": step " in line)
    assert int(re.search(r"step (\d+)/", first)[1]) > 3
