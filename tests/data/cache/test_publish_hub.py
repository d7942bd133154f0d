"""``distilcache publish`` to the Hugging Face hub, by its own client: data sets and buckets."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import HfApi, HfFileSystem

from distilcache.data.cache.cache import Cache
from distilcache.data.storage.remote import Remote
from tests.command_line import refusal, run
from tests.damage import flip_at
from tests.hub import TOKEN, hub_in

URL = "hf://datasets/me/caches/wiki"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("DISTILCACHE_HOME", str(tmp_path / "home"))
    with hub_in(tmp_path / "hub", tmp_path / "downloads") as server:
        (server.folder / "datasets" / "me" / "caches").mkdir(parents=True)
        HfFileSystem._cache.clear()
        yield server
        HfFileSystem._cache.clear()


def files_of(folder):
    found = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {str(name): content for name, content in found.items() if name.suffix != ".lock"}


def test_a_repository_gets_all_in_one_commit(hub, small_cache):
    done = run("publish", small_cache(), URL)
    assert done.exit_code == 0, (done.stderr, done.exception)
    ((name, branch, message, files),) = hub.commits
    assert (name, branch) == ("datasets/me/caches", "main")
    assert message.startswith("Teacher cache ")
    there = files_of(hub.folder / "datasets" / "me" / "caches" / "wiki")
    assert there == files_of(small_cache())
    assert sorted(f"wiki/{name}" for name in there) == files
    assert run("verify", URL).exit_code == 0
    assert Cache.open(URL).manifest.totals == Cache.open(small_cache()).manifest.totals
    # Again: the client sees that nothing has changed, or sends the same.
    assert run("publish", small_cache(), URL).exit_code == 0


def test_another_commit_in_between_is_not_overwritten(hub, small_cache, monkeypatch):
    """Two machines that publish to one place: the second is refused, and nothing is mixed."""
    monkeypatch.setattr(Remote, "head", lambda self: "e" * 40)
    line = refusal(run("publish", small_cache(), URL))
    assert "got: another commit since it was looked at" in line
    assert not hub.commits


def test_another_cache_or_damage_is_refused(hub, small_cache, tmp_path):
    assert run("publish", small_cache(), URL).exit_code == 0
    line = refusal(run("publish", small_cache(masking={"probability": 0.2}), URL))
    assert "must be empty or hold this cache, got another provenance" in line
    copy = shutil.copytree(small_cache(), tmp_path / "copy")
    flip_at(next(copy.glob("shards/*/*.tar")))
    assert "it is damaged" in refusal(run("publish", copy, "hf://datasets/me/caches/other"))
    assert len(hub.commits) == 1


def test_a_repository_that_is_not_there_is_one_line(hub, small_cache):
    line = refusal(run("publish", small_cache(), "hf://datasets/me/nothing/wiki"))
    assert "hf://datasets/me/nothing/wiki/ must be writable, got: no such" in line


@pytest.fixture
def bucket(hub, monkeypatch):
    """Buckets of the client: its calls, on a folder that the hub's server reads from."""
    buckets = pytest.importorskip("huggingface_hub._buckets", reason="a client without buckets")
    root = hub.folder / "buckets" / "me" / "store"
    root.mkdir(parents=True)

    def info(self, bucket_id, **_):
        now = "2026-11-28T12:00:00.000Z"
        return buckets.BucketInfo(id=bucket_id, private=True, createdAt=now, size=0, totalFiles=0)

    def change(self, bucket_id, *, add=(), delete=(), **_):
        for source, name in add:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            content = source if isinstance(source, bytes) else Path(source).read_bytes()
            (root / name).write_bytes(content)
        for name in delete:
            (root / name).unlink()

    def tree(self, bucket_id, prefix="", recursive=False, **_):
        found = (root / (prefix or "")).rglob("*") if (root / (prefix or "")).is_dir() else ()
        for path in sorted(found):
            if path.is_file():
                name, size = str(path.relative_to(root)), path.stat().st_size
                yield buckets.BucketFile(type="file", path=name, size=size, xetHash="0")

    monkeypatch.setattr(HfApi, "bucket_info", info)
    monkeypatch.setattr(HfApi, "batch_bucket_files", change)
    monkeypatch.setattr(HfApi, "list_bucket_tree", tree)
    return root


def test_a_bucket_takes_one_writer_and_says_so(bucket, small_cache):
    url = "hf://buckets/me/store/wiki"
    done = run("publish", small_cache(), url)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "let only one publish to it at a time" in done.stderr
    assert files_of(bucket / "wiki") == files_of(small_cache())
    assert run("verify", url).exit_code == 0
    assert run("publish", small_cache(), url).exit_code == 0


def test_two_writers_of_a_bucket_do_not_end_in_a_mixed_cache(bucket, small_cache, monkeypatch):
    """The other one comes between the look and the write; the first one's manifest stays away."""
    other = json.loads((small_cache() / "provenance.json").read_text())
    other["identity"]["dtype"] = "another"
    sizes = Remote.sizes

    def overtaken(self, folder):
        (bucket / "wiki" / "provenance.json").write_text(json.dumps(other))
        return sizes(self, folder)

    monkeypatch.setattr(Remote, "sizes", overtaken)
    line = refusal(run("publish", small_cache(), "hf://buckets/me/store/wiki"))
    assert "got another provenance" in line
    assert not (bucket / "wiki" / "manifest.json").exists()


def test_who_creates_exclusively(bucket, tmp_path):
    assert Remote("memory://a").exclusive
    assert Remote(URL).exclusive
    assert not Remote("hf://buckets/me/store/wiki").exclusive
    assert isinstance(fsspec.filesystem("hf"), HfFileSystem)
