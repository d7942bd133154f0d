"""The same bytes, once: caches that are reused, added to, and finished after an interruption."""
# ruff: noqa: F811

import shutil
import signal

import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.manifest import CacheManifest
from distilcache.data.cache.shards import shard_path
from distilcache.data.errors import UserError
from distilcache.stages.teacher_cache import phases
from distilcache.stages.teacher_cache.engines import worker
from tests.command_line import one_line, wait_until, watched
from tests.damage import check
from tests.faults_support import run
from tests.forked import fork
from tests.stages.teacher_cache.engines_support import (
    SETTINGS,
    project,  # noqa: F401
    uninterrupted,  # noqa: F401
)
from tests.stages.teacher_cache.teacher_cache_support import stamps


def test_two_builds_give_the_same_bytes(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    first = small_cache(rounds=2, hidden_layers=(1, -1))
    second = build_cache_in(
        tmp_path / "c", small_corpus(), small_teacher, rounds=2, hidden_layers=(1, -1)
    )
    assert tree(first) == tree(second)
    assert Cache.open(first).manifest.fingerprint == Cache.open(second).manifest.fingerprint


def test_a_finished_cache_is_reused(
    build_cache_in, small_corpus, small_teacher, tmp_path, capsys, monkeypatch
):
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher)
    before = stamps(out)
    capsys.readouterr()
    with monkeypatch.context() as patched:
        # Its teacher is known by its weights, not saved and hashed again.
        patched.setattr(phases, "stage_teacher", None)
        build_cache_in(out, small_corpus(), small_teacher)
    assert "is finished (1 rounds) and reused" in capsys.readouterr().err
    # How the work is cut may change; what is stored may not.
    build_cache_in(out, small_corpus(), small_teacher, row_chunk=7, batch_tokens=64)
    assert stamps(out) == before


def test_rounds_are_added_to_a_finished_cache(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    whole = small_cache(rounds=2, hidden_layers=(1, -1))
    out = tmp_path / "c"
    build_cache_in(out, small_corpus(), small_teacher, rounds=1, hidden_layers=(1, -1))
    one, before = Cache.open(out).manifest, stamps(out)
    build_cache_in(out, small_corpus(), small_teacher, rounds=2, hidden_layers=(1, -1))
    after = stamps(out)
    assert {n for n in before if before[n] != after[n]} == {"index.arrow", "manifest.json"}
    two = Cache.open(out).manifest
    assert (one.rounds, two.rounds) == (1, 2)
    assert two.totals["tokens"] == 2 * one.totals["tokens"]
    assert one.fingerprint != two.fingerprint
    assert tree(out) == tree(whole)
    build_cache_in(out, small_corpus(), small_teacher, rounds=1, hidden_layers=(1, -1))
    assert Cache.open(out).manifest == two


def test_a_run_that_died_between_index_and_manifest_goes_on(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    """Rounds were being added: the index is new, the manifest still the old one."""
    whole = small_cache(rounds=2, hidden_layers=(1, -1))
    old = build_cache_in(tmp_path / "a", small_corpus(), small_teacher, hidden_layers=(1, -1))
    out = shutil.copytree(whole, tmp_path / "b")
    shutil.copy(old / "manifest.json", out / "manifest.json")
    with pytest.raises(UserError, match="index.arrow must have sha256"):
        Cache.open(out)
    build_cache_in(out, small_corpus(), small_teacher, rounds=2, hidden_layers=(1, -1))
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("lost", ["tar and marker", "marker", "index", "manifest"])
def test_what_is_deleted_is_made_again(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, lost
):
    whole = small_cache()
    out = shutil.copytree(whole, tmp_path / "c")
    tar = shard_path(out, 0, 1)
    (out / "manifest.json").unlink()
    if lost == "index":
        (out / "index.arrow").unlink()
    elif lost != "manifest":
        tar.with_suffix(".json").unlink()
        if lost == "tar and marker":
            tar.unlink()
    before = stamps(out / "shards")
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(whole)
    after = stamps(out / "shards")
    remade = {n for n in after if before.get(n) != after[n]}
    assert remade == ({"r00/shard-000001.tar", "r00/shard-000001.json"} if "marker" in lost
                      else set())  # fmt: skip


@pytest.mark.parametrize(
    "lost", ["shards/r01/shard-000001.*", "shards/r01/shard-000001.json", "shards/r00/*.*",
             "index.arrow", "teacher/config.json", "teacher/hidden_codec_3.safetensors",
             "teacher/tokenizer_config.json", "teacher/*"]
)  # fmt: skip
def test_a_manifest_does_not_stand_for_files_that_are_gone(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, capsys, lost
):
    """The rounds that are there are kept, even where fewer are asked for."""
    whole = small_cache(rounds=2, hidden_layers=(1, -1))
    out = shutil.copytree(whole, tmp_path / "c")
    for path in list(out.glob(lost)):
        path.unlink()
    capsys.readouterr()
    build_cache_in(out, small_corpus(), small_teacher, rounds=1, hidden_layers=(1, -1))
    said = capsys.readouterr().err
    assert "is made again" in said
    assert "reused" not in said
    assert tree(out) == tree(whole)


def test_leftovers_of_a_killed_run_are_cleared_away(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    whole = small_cache()
    out = shutil.copytree(whole, tmp_path / "c")
    (out / "manifest.json").unlink()
    (out / "shards/r00/.shard-000001.tar.999999.tmp").write_bytes(b"half")
    (out / ".manifest.json.999999.tmp").write_bytes(b"half")
    (out / ".teacher.999999.tmp").mkdir()
    (out / ".teacher.999999.tmp" / "model.safetensors").write_bytes(b"half")
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(whole)
    assert not list(out.rglob(".*"))


def test_two_runs_do_not_share_a_folder(build_cache_in, small_corpus, small_teacher, tmp_path):
    from distilcache.data.storage.locks import locked

    out = tmp_path / "c"
    out.mkdir()
    with (
        locked(out, "cache"),
        pytest.raises(UserError, match="cache: output must not be in use, got .*another run"),
    ):
        build_cache_in(out, small_corpus(), small_teacher)
    build_cache_in(out, small_corpus(), small_teacher)


def test_progress_counts_every_token_once(
    build_cache_in, small_corpus, small_teacher, tmp_path, monkeypatch
):
    counted = []

    class Bar:
        initial = 0

        def __init__(self, total, **_):
            counted.append(-total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, n):
            counted.append(n)

    monkeypatch.setattr(worker, "Bar", Bar)
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher)
    assert sum(counted) == 0
    shard_path(out, 0, 1).with_suffix(".json").unlink()
    (out / "manifest.json").unlink()
    counted.clear()
    build_cache_in(out, small_corpus(), small_teacher)
    assert sum(counted) == 0
    assert isinstance(Cache.open(out).manifest, CacheManifest)


def test_kill_and_the_same_command_again(project, uninterrupted, tree):
    out = project.parent / "p" / "cache"
    process = fork(project, "teacher-cache", env=watched(project, 0.2))
    marker = shard_path(out, 0, 1).with_suffix(".json")
    wait_until(marker.exists, process)
    process.send_signal(signal.SIGKILL)
    _, log = process.communicate()
    assert process.returncode == -signal.SIGKILL, log
    assert not (out / "manifest.json").exists()
    done = sorted(p.relative_to(out) for p in out.glob("shards/*/*.json"))
    total = Cache.open(uninterrupted).manifest.totals["shards"]
    assert 2 <= len(done) < total
    with pytest.raises(UserError, match=rf"got {len(done)} finished shards and no manifest"):
        Cache.open(out)
    kept = {str(p.with_suffix(s)) for p in done for s in (".json", ".tar")}
    before = stamps(out)

    process = fork(project, "teacher-cache", env=watched(project))
    _, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    assert f"{len(done)} of {total} shards were there already" in log
    after = stamps(out)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert tree(out) == tree(uninterrupted)
    assert Cache.open(out).manifest.fingerprint == Cache.open(uninterrupted).manifest.fingerprint
    assert check(out) == []


@pytest.mark.parametrize("room", ["for half a teacher", "for no shard"])
def test_a_full_disk(project, uninterrupted, build_cache_in, small_teacher, room):
    """A limit on the size of a file stands for it: every write beyond fails with an OSError."""
    out = project.parent / "p" / "cache"
    teacher = (uninterrupted / "teacher" / "model.safetensors").stat().st_size
    limit = teacher // 2 if room == "for half a teacher" else teacher + 1
    arguments = ["teacher-cache", "--recipe", project, "--set", "cache.blocks_per_shard=400"]
    code, _, log = run(*arguments, file_bytes=limit)
    assert "File too large" in one_line(code, log)
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]
    assert not list(out.glob("shards/*/*"))
    assert not (out / "manifest.json").exists()
    if room == "for half a teacher":
        assert not out.exists()
    settings = {**SETTINGS, "blocks_per_shard": 400}
    build_cache_in(out, project.parent / "p" / "corpus", small_teacher, **settings)
    cache = Cache.open(out)
    assert check(cache.path) == []
    assert cache.manifest.totals["tokens"] == Cache.open(uninterrupted).manifest.totals["tokens"]
