"""Whatever ends a run, the same command goes on, and the end is the same to the bit."""

import os
import random
import shutil
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from distilcache.data.cache.shards import shard_path
from tests.command_line import one_line, start, wait_until, write_recipe
from tests.damage import read_corpus
from tests.faults_support import (
    SECTIONS,
    STAGES,
    check_unfinished,
    command,
    content,
    interrupt,
    make_project,
    move_corpus,
    result,
    run,
)

KILLS = 50
"""Per stage, in the slow run."""


@pytest.fixture(scope="module")
def whole(small_corpus, small_teacher, tmp_path_factory):
    """A project of which every stage was run once without a fault, and the seconds of each."""
    home = tmp_path_factory.mktemp("faults")
    text = small_corpus().parent / "text.txt"
    return make_project(home, text, small_teacher)


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


# ---- ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_a_few_random_moments(whole, project, tree, stage):
    assert interrupt(whole, project, tree, stage, 4, seed=stage) == 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_many_random_moments(whole, project, tree, stage):
    assert interrupt(whole, project, tree, stage, KILLS, seed=f"many {stage}") == KILLS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_and_ctrl_c(whole, project, tree, stage, number):
    interrupt(whole, project, tree, stage, 1, seed=f"{stage} {number}", number=number)


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


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(whole, project, tree, stage):
    """A limit on the size of a file stands for it: every write beyond fails with an OSError."""
    home, _, _ = whole
    folder = project(stage)
    sizes = sorted(p.stat().st_size for p in result(home, stage).rglob("*") if p.is_file())
    for share in (0.3, 0.9):
        limit = max(600, int(sizes[-1] * share))
        code, _, log = run(*command(stage, folder), file_bytes=limit)
        assert "File too large" in one_line(code, log)
        check_unfinished(folder, stage)
        assert not [p for p in result(folder, stage).rglob("*.tmp") if p.is_file()]
    code, _, log = run(*command(stage, folder))
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
def test_a_folder_that_cannot_be_written(whole, project, open_folder, stage):
    _, _, teacher = whole
    made = project(stage)
    folder = shutil.copytree(made, open_folder / "project")
    shutil.copytree(teacher, folder / "teacher")
    write_recipe(folder / "recipe.toml", folder / "text.txt", folder / "teacher", **SECTIONS)
    move_corpus(folder, made)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(p for p in folder.rglob("*"))
    code, _, log = run(*command(stage, folder), user=65534)
    line = one_line(code, log)
    there = result(folder, stage)
    refused = {
        "corpus": f"output must be a folder that can be made, got {there}: Permission denied",
        "teacher-cache": f"storage: {there} must be usable, got: Permission denied",
        "student-train": f"storage: {there.parent} must be usable, got: Permission denied",
    }
    assert refused[stage] in line
    assert sorted(p for p in folder.rglob("*")) == before
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)


def test_a_truncated_tar_is_refused_repaired_and_made_again(whole, project, tree):
    home, _, _ = whole
    folder = project("student-train")
    cache = folder / "p" / "cache"
    tar = shard_path(cache, 0, 2)
    os.truncate(tar, tar.stat().st_size // 4)  # the rest of so small a tar is padding
    code, _, log = run(*command("student-train", folder))
    assert "shard-000002.tar" in one_line(code, log)
    code, _, log = run("verify", cache)
    assert "repeat with --repair" in one_line(code, log)
    assert tar.exists()
    code, _, log = run("verify", cache, "--repair")
    assert "to make again what was removed" in one_line(code, log)
    assert f"removed: {tar.relative_to(cache)}" in log
    code, _, log = run(*command("teacher-cache", folder))
    assert code == 0, log
    assert content(folder, "teacher-cache", tree) == content(home, "teacher-cache", tree)
    assert run("verify", cache)[0] == 0
    code, _, log = run(*command("student-train", folder))
    assert code == 0, log
    assert content(folder, "student-train", tree) == content(home, "student-train", tree)


def test_a_verify_that_is_killed_goes_on(whole, project):
    home, _, _ = whole
    cache = shutil.copytree(home / "p" / "cache", project("corpus") / "cache")
    code, seconds, log = run("verify", cache, "--workers", 1)
    assert code == 0, log
    rng = random.Random(0)
    for _ in range(3):
        run("verify", cache, after=rng.uniform(0, seconds))
    code, _, log = run("verify", cache)
    assert code == 0, log
    assert "no fault" in log
    assert not (cache / ".verify").exists()


# ---- others ----------------------------------------------------------------------------------


def test_two_runs_on_one_cache_at_once(whole, project, tree):
    home, _, _ = whole
    folder = project("teacher-cache")
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: run(*command("teacher-cache", folder)), range(2)))
    assert 0 in [code for code, _, _ in found]
    for code, _, log in found:
        if code:
            assert "must not be in use" in one_line(code, log)
    assert content(folder, "teacher-cache", tree) == content(home, "teacher-cache", tree)


@pytest.mark.parametrize("stage", STAGES)
def test_a_clock_that_goes_back(whole, project, tree, stage):
    """What is there seems to come from the future, and time goes back with every look at it."""
    home, seconds, _ = whole
    folder = project(stage)
    run(*command(stage, folder), after=0.6 * seconds[stage])
    future = 4e9
    for path in result(folder, stage).rglob("*"):
        os.utime(path, (future, future))
    code, _, log = run(*command(stage, folder), clock=3600)
    assert code == 0, log
    assert content(folder, stage, tree) == content(home, stage, tree)


def test_a_text_that_changed_between_runs(whole, project, tree):
    home, _, _ = whole
    folder = project("teacher-cache")
    before = content(folder, "corpus", tree)
    text = folder / "text.txt"
    text.write_text(text.read_text().replace("amber", "zebra"))
    os.utime(text, (1, 1))
    code, _, log = run(*command("teacher-cache", folder))
    assert "corpus" in one_line(code, log)
    assert content(folder, "corpus", tree) == before
    assert not result(folder, "teacher-cache").exists()


def test_a_text_that_changed_while_the_corpus_was_made(whole, project, tree):
    """Parts of the old text are not mixed with parts of the new."""
    _, seconds, _ = whole
    folder = project("corpus")
    text = folder / "text.txt"
    run(*command("corpus", folder), after=0.7 * seconds["corpus"])
    text.write_text(text.read_text().replace("amber", "zebra"))
    code, _, log = run(*command("corpus", folder))
    if code:  # it was finished already
        one_line(code, log)
        return
    read_corpus(result(folder, "corpus"))
    found = content(folder, "corpus", tree)
    shutil.rmtree(result(folder, "corpus"))
    assert run(*command("corpus", folder))[0] == 0
    assert content(folder, "corpus", tree) == found


def test_a_deleted_index(whole, project, tree):
    home, _, _ = whole
    folder = project("student-train")
    (folder / "p" / "cache" / "index.arrow").unlink()
    code, _, log = run(*command("student-train", folder))
    assert "index.arrow" in one_line(code, log)
    code, _, log = run("verify", folder / "p" / "cache", "--repair")
    assert "manifest.json" in log
    one_line(code, log)
    code, _, log = run(*command("teacher-cache", folder))
    assert code == 0, log
    assert content(folder, "teacher-cache", tree) == content(home, "teacher-cache", tree)
