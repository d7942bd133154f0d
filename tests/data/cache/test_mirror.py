"""Caches under a URL: published whole or not at all, mirrored, read by range."""

import errno
import json
import os
import pickle
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.mirror import home
from distilcache.data.cache.publish import publish_cache, total_bytes
from distilcache.data.cache.shards import shard_path
from distilcache.data.errors import UserError
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.storage import attempts
from distilcache.data.storage.files import write_bytes
from distilcache.data.storage.remote import Remote
from distilcache.data.verify.remote_verify import RemoteShards, remote_shards
from distilcache.data.verify.run import Settings, verify_cache
from distilcache.pipeline.verify import run_verify
from tests.damage import flip_at, sealed
from tests.refusals import refused


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "PAUSE", 0.001)
    monkeypatch.setenv("DISTILCACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def local(small_cache):
    return Cache.open(small_cache())


@pytest.fixture
def url():
    return f"memory://{uuid.uuid4()}/cache"


def put(local, url):
    sizes = []
    publish_cache(local.path, Remote(url), sizes.append)
    return sum(sizes)


def assert_same(local, url):
    away = Cache.open(url)
    assert away.manifest == local.manifest
    for block in range(local.num_blocks):
        mine, theirs = local.read_block(block), away.read_block(block)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[n], theirs[n]) for n in mine)


def test_a_published_cache_is_the_local_one(local, url):
    assert put(local, url) == total_bytes(local.path)
    assert_same(local, url)
    away = Cache.open(url)
    assert away.teacher.lm_head() is not None
    batches = [CachedBatches(c, batch_size=4, seed=0, signal="replay") for c in (local, away)]
    for k in range(3):
        mine, theirs = (b[k] for b in batches)
        assert all((mine[n] == theirs[n]).all() for n in mine)


def test_a_process_that_gets_a_cache_opens_it_again(local, url):
    put(local, url)
    for cache in (local, Cache.open(url)):
        again = pickle.loads(pickle.dumps(cache))
        assert again.source == cache.source
        mine, theirs = cache.read_block(0), again.read_block(0)
        assert all(np.array_equal(mine[n], theirs[n]) for n in mine)


def test_small_files_and_blocks_are_fetched_once(local, url, monkeypatch):
    put(local, url)
    assert_same(local, url)
    read, names = Remote.read, []
    monkeypatch.setattr(Remote, "read", lambda s, n, *a: names.append((s.url, n)) or read(s, n, *a))
    assert_same(local, url)
    # Loaders of earlier tests may still be reading caches at URLs of theirs.
    assert [name for at, name in names if at == url] == ["manifest.json"]


def test_what_is_here_is_read_where_nothing_can_be_written(local, url, tmp_path, monkeypatch):
    """As where an administrator filled DISTILCACHE_HOME."""
    put(local, url)
    assert_same(local, url)
    own = Path.open

    def read_only(self, mode="r", *args, **options):
        if "w" in mode and self.is_relative_to(tmp_path):
            raise OSError(errno.EROFS, "Read-only file system")
        return own(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", read_only)
    shutil.rmtree(tmp_path / "home" / "blocks")
    assert_same(local, url)
    (Cache.open(url).teacher_dir / "config.json").unlink()
    text = refused(lambda: Cache.open(url))
    assert "config.json must be writable, got: Read-only file system; set DISTILCACHE_HOME" in text


def test_the_home_may_be_named_from_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISTILCACHE_HOME", "~/kept")
    assert home() == tmp_path / "kept"


def test_a_reader_amid_a_publish_of_more_rounds_gets_them(local, url, small_cache, monkeypatch):
    more = Cache.open(small_cache(rounds=2))
    put(more, url)
    place = Remote(url)
    manifests = [(cache.path / "manifest.json").read_bytes() for cache in (local, more)]
    place.replace("manifest.json", manifests[0])  # the index comes first
    assert "if a publish is under way, wait for it" in refused(lambda: Cache.open(url))
    read, reads = Remote.read, []

    def overtaken(self, name, *rest):
        content = read(self, name, *rest)
        if self.url == url and name == "index.arrow":
            reads.append(name)
            if len(reads) == 1:
                place.replace("manifest.json", manifests[1])
        return content

    monkeypatch.setattr(Remote, "read", overtaken)
    assert_same(more, url)
    assert len(reads) == 2


def test_publishing_goes_on_where_it_was(local, url, monkeypatch):
    put_file, done = Remote.publish, []

    def fails_late(self, name, content):
        if len(done) >= 5:  # in several threads
            raise UserError("storage: gone")
        done.append(name)
        return put_file(self, name, content)

    monkeypatch.setattr(Remote, "publish", fails_late)
    with pytest.raises(UserError, match="gone"):
        put(local, url)
    with pytest.raises(UserError, match="must hold a finished teacher cache, got an unfinished"):
        Cache.open(url)
    monkeypatch.setattr(Remote, "publish", put_file)
    assert put(local, url) == total_bytes(local.path)
    assert_same(local, url)
    assert put(local, url) == total_bytes(local.path)


def test_a_tar_without_its_marker_is_completed(local, url):
    tar = next((local.path / "shards").rglob("*.tar"))
    name = tar.relative_to(local.path).as_posix()
    Remote(url).publish(name, tar.read_bytes())
    put(local, url)
    assert_same(local, url)


def test_something_else_of_the_same_name_is_refused(local, url):
    tar = next((local.path / "shards").rglob("*.tar"))
    name = tar.relative_to(local.path).as_posix()
    Remote(url).publish(name, b"cut off")
    with pytest.raises(UserError, match=f"{name} must be .* bytes, got 7"):
        put(local, url)
    assert Remote(url).size("manifest.json") is None


def test_two_caches_do_not_mix(local, url, small_cache):
    put(local, url)
    other = Cache.open(small_cache(top_k=2))
    with pytest.raises(UserError, match="must be empty or hold this cache"):
        put(other, url)
    assert_same(local, url)


def test_the_same_cache_of_another_machine_takes_the_place_of_the_first(local, url, tmp_path):
    put(local, url)
    other = shutil.copytree(local.path, tmp_path / "other")
    provenance = json.loads((other / "provenance.json").read_text())
    provenance["environment"]["device"] = "another"
    (other / "provenance.json").write_text(json.dumps(provenance))
    values = {**json.loads((other / "manifest.json").read_text()), "provenance": provenance}
    (other / "manifest.json").write_text(json.dumps(sealed(values)))
    assert put(Cache.open(other), url) == total_bytes(other)
    assert run_verify(url, workers=1, fast=False, mend=True, state=None) == ([], [])
    assert_same(Cache.open(other), url)


def test_fewer_rounds_do_not_take_the_place_of_more(local, url, small_cache):
    more = Cache.open(small_cache(rounds=2))
    put(local, url)
    put(more, url)
    text = refused(lambda: put(local, url))
    assert "must hold at most 1 rounds" in text
    assert "got 2; choose another URL" in text
    assert_same(more, url)


def test_two_caches_of_the_same_settings_do_not_mix(local, url, tmp_path):
    """Calibrated on other devices, they agree in all that their provenance says."""
    other = shutil.copytree(local.path, tmp_path / "other")
    codec = other / "teacher" / "hidden_codec_3.safetensors"
    place = Remote(url)
    put(local, url)
    place.remove("manifest.json")
    place.replace("teacher/hidden_codec_3.safetensors", codec.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="hidden_codec_3.safetensors must be this cache's"):
        put(local, url)
    place.replace("teacher/hidden_codec_3.safetensors", codec.read_bytes())
    marker = min(list(place.sizes("shards"))[::2])
    sound = place.read(marker)
    place.replace(marker, sound.replace(b"blocks", b"blocky"))
    with pytest.raises(UserError, match="shard-000000.json must be this cache's"):
        put(local, url)
    place.replace(marker, sound)
    tar = marker.replace(".json", ".tar")
    place.remove(marker)
    content = place.read(tar)
    place.replace(tar, content[:-1] + b"x")
    with pytest.raises(UserError, match="shard-000000.tar must be this cache's"):
        put(local, url)
    place.replace(tar, content)
    put(local, url)
    assert_same(local, url)


def test_nothing_is_left_of_another_cache_at_the_same_place(local, url, small_cache):
    """Files of a teacher are read by their names, whatever a manifest says of others."""
    before = Cache.open(small_cache(hidden_layers=(1, -1)))
    put(before, url)
    away = Cache.open(url)
    (away.teacher_dir / "added_tokens.json").write_text('{"new": 7}')
    place = Remote(url)
    for name in place.sizes(""):
        place.remove(name)
    put(local, url)
    assert_same(local, url)
    found = {path.name for path in Cache.open(url).teacher_dir.iterdir()}
    assert found == set(local.manifest.teacher_files)


def test_no_cache_and_no_place(url):
    with pytest.raises(UserError, match="must hold a finished teacher cache, got none"):
        Cache.open(url)
    with pytest.raises(UserError, match="must be a URL that fsspec can open"):
        Cache.open("nonesuch://bucket/cache")


def test_a_damaged_kept_block_is_fetched_again(local, url, tmp_path):
    put(local, url)
    assert_same(local, url)
    for path in (tmp_path / "home" / "blocks").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert_same(local, url)


def test_damage_at_the_other_end_is_refused(local, url):
    put(local, url)
    tar = next((local.path / "shards").rglob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    name = tar.relative_to(local.path).as_posix()
    Remote(url).replace(name, bytes(content))
    with pytest.raises(UserError, match=r"block \d+ must have crc32"):
        assert_same(local, url)
    Remote(url).remove(name)
    with pytest.raises(UserError, match="must be there, got none"):
        assert_same(local, url)


def test_another_index_or_teacher_is_refused(local, url):
    put(local, url)
    Remote(url).replace("teacher/config.json", b"{}")
    with pytest.raises(UserError, match="teacher/config.json must have sha256"):
        Cache.open(url)


def test_a_manifest_cannot_name_files_elsewhere(local, url, tmp_path, monkeypatch):
    put(local, url)
    values = json.loads((local.path / "manifest.json").read_text())
    values["teacher_files"]["../../../evil"] = "0" * 64
    Remote(url).replace("manifest.json", json.dumps(sealed(values)).encode())
    with pytest.raises(UserError, match="manifest must be whole, got a bad field"):
        Cache.open(url)
    assert not (tmp_path / "evil").exists()


def test_nothing_is_kept_where_the_bound_says_so(local, url, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILCACHE_KEEP_GB", "0")
    put(local, url)
    assert_same(local, url)
    assert not (tmp_path / "home" / "blocks").exists()
    monkeypatch.setenv("DISTILCACHE_KEEP_GB", "much")
    with pytest.raises(UserError, match="DISTILCACHE_KEEP_GB must be a number"):
        Cache.open(url)


def test_an_unfinished_cache_is_not_published(local, url, tmp_path):
    shutil.copytree(local.path, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    with pytest.raises(UserError, match="must be complete"):
        publish_cache(tmp_path / "copy", Remote(url), lambda size: None)
    assert Remote(url).sizes("") == {}


DAMAGE = {
    "tar": lambda c, tar: flip_at(tar),
    "tar cut": lambda c, tar: os.truncate(tar, tar.stat().st_size // 2),
    "tar padding cut": lambda c, tar: os.truncate(tar, tar.stat().st_size - 512),
    "tar gone": lambda c, tar: tar.unlink(),
    "marker": lambda c, tar: flip_at(tar.with_suffix(".json")),
    "marker gone": lambda c, tar: tar.with_suffix(".json").unlink(),
    "marker of another shard": lambda c, tar: shutil.copy(
        shard_path(c, 0, 1).with_suffix(".json"), tar.with_suffix(".json")
    ),
    "shard of another place": lambda c, tar: [
        shutil.copy(shard_path(c, 0, 1).with_suffix(s), tar.with_suffix(s))
        for s in (".tar", ".json")
    ],
    "weights": lambda c, tar: flip_at(c / "teacher" / "model.safetensors"),
    "tokenizer": lambda c, tar: flip_at(c / "teacher" / "tokenizer_config.json"),
    "a teacher's file gone": lambda c, tar: (c / "teacher" / "config.json").unlink(),
    "provenance": lambda c, tar: flip_at(c / "provenance.json"),
    "provenance gone": lambda c, tar: (c / "provenance.json").unlink(),
    "index": lambda c, tar: flip_at(c / "index.arrow"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_damaged_leaves_the_machine(local, url, tmp_path, damage):
    """Not at the first call, and not where the sound file is at the URL already."""
    copy = shutil.copytree(local.path, tmp_path / "copy")
    DAMAGE[damage](copy, shard_path(copy, 0, 2))
    text = refused(lambda: publish_cache(copy, Remote(url), lambda size: None))
    assert "run distilcache" in text
    place = Remote(url)
    assert place.size("manifest.json") is None
    for name in place.sizes(""):
        assert place.read(name) == (local.path / name).read_bytes(), name
    if "gone" in damage or "cut" in damage or "marker" in damage:
        put(local, url)
        refused(lambda: publish_cache(copy, place, lambda size: None))


def test_a_marker_at_the_url_does_not_stand_for_its_tar(local, url):
    put(local, url)
    name = next(n for n in Remote(url).sizes("shards") if n.endswith(".tar"))
    Remote(url).remove(name)
    put(local, url)
    assert_same(local, url)


@pytest.mark.parametrize("name", ["teacher/model.safetensors", ".tar"])
def test_what_is_cut_at_the_url_is_not_complete(local, url, name):
    """Its marker is whole, and the manifest would say that all is."""
    put(local, url)
    place = Remote(url)
    name = shard_at(url, name) if name == ".tar" else name
    place.replace(name, place.read(name)[:-100])
    place.remove("manifest.json")
    assert f"{name} must be" in refused(lambda: put(local, url))
    assert place.size("manifest.json") is None
    place.remove(name)
    put(local, url)
    assert_same(local, url)


def test_another_provenance_at_the_url_is_refused(local, url):
    Remote(url).publish("provenance.json", b"no JSON")
    assert "must be empty or hold this cache" in refused(lambda: put(local, url))


def shard_at(url, suffix):
    return next(n for n in Remote(url).sizes("shards") if n.endswith(suffix))


ELSEWHERE = {
    "weights": (lambda url: "teacher/model.safetensors", "delete it there and repeat"),
    "index": (lambda url: "index.arrow", "delete it there and repeat"),
    "shard gone": (lambda url: shard_at(url, ".tar"), "publish the cache again"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_said_of_damage_at_the_other_end_leads_out(local, url, name):
    put(local, url)
    find, words = ELSEWHERE[name]
    place, hit = Remote(url), find(url)
    if name == "shard gone":
        place.remove(hit)
    else:
        place.replace(hit, place.read(hit)[:-1] + b"x")

    def read():
        cache = Cache.open(url)
        for block in range(cache.num_blocks):
            cache.read_block(block)

    assert words in refused(read)
    if "delete" in words:
        place.remove(hit)
    put(local, url)
    assert_same(local, url)


@pytest.mark.parametrize("content", [b"cut off", None])
def test_what_publish_says_of_other_files_leads_out(local, url, content):
    """``None``: as long as this cache's, but of another."""
    place = Remote(url)
    tar = next((local.path / "shards").rglob("*.tar"))
    name = tar.relative_to(local.path).as_posix()
    place.publish(name, content or tar.read_bytes()[:-1] + b"x")
    assert "delete it there and repeat the command" in refused(lambda: put(local, url))
    place.remove(name)
    put(local, url)
    assert_same(local, url)


class TestVerify:
    """Each shard is fetched, checked, and dropped."""

    def faults(self, url, **options):
        shards = RemoteShards(url, **options)
        settings = Settings(
            workers=2,
            fetch=shards.fetch,
            stamp=shards.stamp,
            identities=shards.identities,
            state=shards.folder / "state",
            **options,
        )
        return shards, list(verify_cache(shards.folder, settings))

    def test_a_sound_cache_has_no_fault_and_leaves_no_shard(self, local, url):
        put(local, url)
        for options in ({}, {"fast": True}):
            shards, faults = self.faults(url, **options)
            assert faults == []
            assert list(shards.folder.rglob("shard-*")) == []

    def test_a_provenance_that_is_gone_is_missed(self, local, url):
        put(local, url)
        assert self.faults(url)[1] == []
        Remote(url).remove("provenance.json")
        assert "provenance.json" in self.faults(url)[1][0].text

    def test_damage_is_found_removed_and_published_again(self, local, url):
        put(local, url)
        place = Remote(url)
        name = next(n for n in place.sizes("shards") if n.endswith(".tar"))
        content = bytearray(place.read(name))
        content[len(content) // 2] ^= 4
        place.replace(name, bytes(content))
        shards, faults = self.faults(url)
        assert [fault.text for fault in faults] != []
        removed = shards.remove(faults)
        assert removed[0] == "manifest.json"
        assert name in removed
        with pytest.raises(UserError, match="got an unfinished one"):
            Cache.open(url)
        put(local, url)
        assert self.faults(url)[1] == []
        assert_same(local, url)

    def test_a_second_one_is_refused_and_nothing_that_was_left_is_believed(self, local, url):
        put(local, url)
        options = {"workers": 1, "fast": False, "mend": True, "state": None}
        with remote_shards(url) as shards:
            assert "must not be in use" in refused(lambda: run_verify(url, **options))
        for suffix in (".tar", ".json"):
            name = shard_at(url, suffix)
            write_bytes(shards.folder / name, Remote(url).read(name))
        Remote(url).remove(shard_at(url, ".tar"))
        faults, removed = run_verify(url, **options)
        assert ["got no file" in fault.text for fault in faults] == [True]
        assert removed[0] == "manifest.json"
        put(local, url)
        assert run_verify(url, **options) == ([], [])

    def test_a_provenance_of_another_environment_costs_only_itself(self, local, url):
        put(local, url)
        place = Remote(url)
        sound = place.read("provenance.json")
        values = json.loads(sound)
        values["environment"]["device"] = "another"
        place.replace("provenance.json", json.dumps(values).encode())
        options = {"workers": 1, "fast": False, "mend": True, "state": None}
        faults, removed = run_verify(url, **options)
        assert ["must be the manifest's provenance" in fault.text for fault in faults] == [True]
        assert removed == ["provenance.json (restored from the manifest)"]
        assert place.read("provenance.json") == sound
        assert_same(local, url)
        assert run_verify(url, **options) == ([], [])

    @pytest.mark.parametrize("names", [("manifest.json",), ("manifest.json", "provenance.json")])
    def test_another_cache_over_the_shards_costs_no_shard(self, local, url, small_cache, names):
        """Where it brings its provenance, too, which of them is right cannot be told."""
        put(local, url)
        place, other = Remote(url), small_cache(top_k=2)
        teacher = [f"teacher/{path.name}" for path in (other / "teacher").iterdir()]
        for name in ("index.arrow", *teacher, *names):
            place.replace(name, (other / name).read_bytes())
        before = place.sizes("")
        faults, removed = run_verify(url, workers=1, fast=False, mend=True, state=None)
        assert len(faults) == 1
        assert removed == (["manifest.json"] if len(names) == 1 else [])
        assert place.sizes("") == {n: size for n, size in before.items() if n not in removed}

    @pytest.mark.parametrize("change", ["cut", "gone"])
    @pytest.mark.parametrize("name", ["teacher/config.json", "index.arrow"])
    def test_sizes_of_small_files_are_compared_there(self, local, url, name, change):
        put(local, url)
        assert self.faults(url, fast=True)[1] == []
        place = Remote(url)
        content = place.read(name)
        place.remove(name)
        if change == "cut":
            place.replace(name, content[:-1])
        text = refused(lambda: self.faults(url, fast=True))
        assert f"{name} must be {len(content)} bytes" in text
        place.remove(name)
        put(local, url)
        assert self.faults(url, fast=True)[1] == []

    @pytest.mark.parametrize("name", ["teacher/model.safetensors", "index.arrow"])
    def test_small_files_are_read_there_and_not_here(self, local, url, name):
        put(local, url)
        assert self.faults(url)[1] == []
        place = Remote(url)
        content = bytearray(place.read(name))
        content[-1] ^= 1
        place.replace(name, bytes(content))
        assert f"{name} must have sha256" in refused(lambda: self.faults(url))
        assert Cache.open(url).num_blocks == local.num_blocks  # what is here is sound

    def test_a_shorter_tar_is_seen_without_reading_it(self, local, url):
        put(local, url)
        place = Remote(url)
        name = next(n for n in place.sizes("shards") if n.endswith(".tar"))
        place.replace(name, place.read(name)[:-512])
        (fault,) = self.faults(url, fast=True)[1]
        assert "must be" in fault.text

    def test_an_interrupted_run_fetches_only_what_is_left(self, local, url, monkeypatch):
        put(local, url)
        shards = RemoteShards(url)
        read, tars = Remote.read, []

        def counted(self, name, *rest):
            if self.url == url and name.endswith(".tar"):
                if len(tars) == 1:
                    raise KeyboardInterrupt
                tars.append(name)
            return read(self, name, *rest)

        settings = Settings(
            workers=1, fetch=shards.fetch, stamp=shards.stamp, state=shards.folder / "state"
        )
        monkeypatch.setattr(Remote, "read", counted)
        with pytest.raises(KeyboardInterrupt):
            list(verify_cache(shards.folder, settings))
        monkeypatch.setattr(Remote, "read", lambda s, n, *a: tars.append(n) or read(s, n, *a))
        assert list(verify_cache(shards.folder, settings)) == []
        assert tars.count(tars[0]) == 1
