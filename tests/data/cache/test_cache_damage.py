"""Damage to a cache, and a cache that is no whole one: refused or named by ``verify``."""

import json
import os

import numpy as np
import pytest

from distilcache import open_cache
from distilcache.data.cache.cache import Cache
from distilcache.data.cache.shards import SEAL, read_marker, shard_path
from distilcache.data.cache.teacher_files import codec_path
from distilcache.data.errors import UserError
from distilcache.data.storage.files import sha256_json
from distilcache.data.verify.shard_check import ShardTask, check_shard
from tests.command_line import refusal, run
from tests.damage import check, flip, flip_at
from tests.data.hostile.hostile_support import write_manifest
from tests.refusals import refused


def test_every_bit_flip_in_a_shard_is_seen(copy):
    """``verify`` names the shard; reading the block that was hit names shard and block."""
    cache = Cache.open(copy)
    tar = shard_path(copy, 1, 2)
    rows = [i for i in range(cache.num_blocks) if (cache.entry(i).round, cache.entry(i).shard)
            == (1, 2)]  # fmt: skip
    entries = [cache.entry(i) for i in rows]
    identity = sha256_json(cache.manifest.provenance["identity"])
    rng = np.random.default_rng(0)
    hits = 0
    for bit in rng.choice(8 * tar.stat().st_size, 400, replace=False).tolist():
        flip(tar, bit)
        report = check_shard(ShardTask(tar, 1, 2, entries), cache, identity)
        faults = [fault.text for fault in report.faults]
        assert faults, bit
        assert all("shard-000002.tar" in fault and "\n" not in fault for fault in faults)
        for i in rows:
            entry = cache.entry(i)
            if entry.offset <= bit // 8 < entry.offset + entry.size:
                hits += 1
                named = f"shard-000002.tar block {entry.block} "
                assert named in refused(lambda i=i: cache.read_block(i))
                assert any(f"block {entry.block} " in fault for fault in faults)
            else:
                cache.read_block(i)
        flip(tar, bit)
    assert hits > 100
    assert check(cache.path) == []


def test_a_truncated_tar_is_seen(copy):
    cache = Cache.open(copy)
    tar = shard_path(copy, 0, 1)
    entry = cache.entry(3)
    assert (entry.round, entry.shard) == (0, 1)
    tar.write_bytes(tar.read_bytes()[: entry.offset + 7])
    assert f"shard-000001.tar block {entry.block} " in refused(lambda: cache.read_block(3))
    (fault,) = check(cache.path)
    assert "shard-000001.tar must be" in fault


def test_a_deleted_tar_or_marker_is_seen(copy):
    cache = Cache.open(copy)
    shard_path(copy, 0, 1).with_suffix(".json").unlink()
    shard_path(copy, 1, 0).unlink()
    faults = check(cache.path)
    assert len(faults) == 2
    assert "shard-000001.tar must have its .json marker" in faults[0]
    assert "shard-000000.tar must be" in faults[1]
    assert "got no file" in faults[1]


def test_an_edited_marker_is_seen(copy):
    marker = shard_path(copy, 0, 1).with_suffix(".json")
    values = json.loads(marker.read_text())
    for change in ({"sha256": "0" * 64}, {"blocks": values["blocks"][:1]}, {"bytes": 1}):
        edited = {name: value for name, value in {**values, **change}.items() if name != SEAL}
        for seal in ({SEAL: values[SEAL]}, {SEAL: sha256_json(edited)}, {}):
            marker.write_text(json.dumps({**edited, **seal}))
            faults = check(copy)
            assert len(faults) == 1, (change, seal)
            assert "shard-000001.tar" in faults[0]


@pytest.mark.parametrize("damage", ["delete", "flip", "cut"])
def test_a_damaged_index_is_refused(copy, damage):
    index = copy / "index.arrow"
    if damage == "delete":
        index.unlink()
    elif damage == "flip":
        flip_at(index)
    else:
        index.write_bytes(index.read_bytes()[:-8])
    text = refused(lambda: Cache.open(copy))
    assert "index.arrow must have sha256" in text
    assert "distilcache teacher-cache again" in text


EDITS = {
    "temperature": lambda m: m["encoding"].update(temperatures=[4.0]),
    "top_k": lambda m: m["encoding"].update(top_k=4),
    "rounds": lambda m: m.update(rounds=1),
    "seed": lambda m: m["provenance"]["identity"]["masking"].update(seed=1),
    "head": lambda m: m["head"].update(eps=0.1),
    "fingerprint": lambda m: m.update(fingerprint="0" * 64),
    "index": lambda m: m.update(index_sha256="0" * 64),
    "totals": lambda m: m["totals"].update(tokens=1),
    "field added": lambda m: m.update(extra=1),
    "field removed": lambda m: m.pop("totals"),
    "sha256 removed": lambda m: m.pop("sha256"),
    "encoding removed": lambda m: m.update(encoding={}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused(copy, edit):
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    EDITS[edit](values)
    path.write_text(json.dumps(values))
    assert "cache: manifest must" in refused(lambda: Cache.open(copy))


@pytest.mark.parametrize(
    ("edit", "words"),
    {
        "temperature": "a block's encoding must be",
        "top_k": "a block's encoding must be",
        "rounds": "index.arrow must hold 1 rounds (manifest), got 2",
        "seed": "manifest.json must be of the cache of its shards, got that of another",
        "index": f"index.arrow must have sha256 {'0' * 16}, got",
        "totals": "index.arrow must hold 1 tokens (manifest), got 1536",
        "field removed": "must be whole, got a bad field: 'totals'",
        "encoding removed": "must be whole, got a bad field: 'hidden'",
    }.items(),
)
def test_an_edited_manifest_with_a_right_seal_is_known_by_its_field(copy, edit, words):
    values = json.loads((copy / "manifest.json").read_text())
    EDITS[edit](values)
    write_manifest(copy, values)
    try:
        lines = check(copy)
    except UserError as error:
        lines = [str(error)]
    assert lines
    assert all(words in line for line in lines)


def test_a_manifest_may_be_reformatted(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert Cache.open(copy).manifest.rounds == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7"])
def test_a_manifest_that_is_none_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    assert "cache: " in refused(lambda: Cache.open(copy))


def test_another_schema_version_is_named(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 9}))
    text = refused(lambda: Cache.open(copy))
    assert "schema_version must be 2, got 9; use the version" in text


def test_an_incomplete_cache_is_named(copy, tmp_path):
    (copy / "manifest.json").unlink()
    count = len(list(copy.glob("shards/*/*.json")))
    text = refused(lambda: Cache.open(copy))
    assert f"got {count} finished shards and no manifest.json" in text
    assert "same distilcache teacher-cache command again" in text
    text = refused(lambda: Cache.open(tmp_path / "nowhere"))
    assert "run distilcache teacher-cache first" in text


def test_a_changed_codec_is_seen(copy):
    path = codec_path(copy, Cache.open(copy).encoding.hidden[-1])
    flip(path, -8)
    cache = Cache.open(copy)
    assert "hidden_codec_3.safetensors must be the codec" in refused(cache.teacher.hidden_decoder)
    path.unlink()
    assert "got no file" in refused(lambda: cache.teacher.hidden_decoder(3))


def test_a_changed_teacher_is_seen(copy):
    path = copy / "teacher" / "model.safetensors"
    flip(path, -8)
    (fault,) = check(copy)
    assert "model.safetensors must have sha256" in fault
    os.truncate(path, 100)
    assert "model.safetensors must have sha256" in refused(Cache.open(copy).teacher.lm_head)
    path.unlink()
    faults = check(copy)
    assert all("model.safetensors" in fault for fault in faults)
    assert any("got no file" in fault for fault in faults)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "hidden_codec_3.safetensors"])
def test_every_file_of_the_teacher_is_verified(copy, name):
    flip_at(copy / "teacher" / name)
    faults = check(copy)
    assert faults
    assert all(name in fault for fault in faults)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_no_text_is_shown_with_a_damaged_tokenizer(copy, name):
    flip_at(copy / "teacher" / name)
    assert f"{name} must have sha256" in refused(lambda: open_cache(copy).tokenizer)
    for command in ("inspect", "view"):
        assert f"{name} must have sha256" in refusal(run(command, copy))


@pytest.mark.parametrize("kind", ["device", "pipe"])
@pytest.mark.parametrize(
    "name", ["manifest.json", "index.arrow", "provenance.json", "shards/r00/shard-000001.json",
             "shards/r00/shard-000001.tar", "teacher/model.safetensors", "teacher/config.json",
             "teacher/hidden_codec_3.safetensors"]
)  # fmt: skip
def test_what_is_no_plain_file_is_never_read(copy, name, kind):
    """A link to a device may give bytes without end; a pipe waits for ever."""
    path = copy / name
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/null")  # /dev/zero would take all memory if this failed
    else:
        os.mkfifo(path)
    assert check(copy)
    if name in ("manifest.json", "index.arrow"):
        text = refused(lambda: Cache.open(copy))
        assert name in text
        assert "not a plain file" in text or "got no file" in text
        return
    cache = Cache.open(copy)
    if "teacher" in name:
        assert path.name in refused(cache.teacher.check)
    elif name.endswith(".tar"):
        assert "not a plain file" in refused(lambda: cache.read_block(2))
    elif name.startswith("shards"):
        assert "not a plain file" in refused(lambda: read_marker(shard_path(copy, 0, 1)))


def test_a_link_to_a_plain_file_is_read(copy, tmp_path):
    """Shards may lie on another disk."""
    tar = shard_path(copy, 0, 1)
    tar.rename(tmp_path / "elsewhere.tar")
    tar.symlink_to(tmp_path / "elsewhere.tar")
    Cache.open(copy).read_block(2)
    assert check(copy) == []
