"""JSON and pickles of somebody else: refused in one line, and never run."""

import copy as copies
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.shards import SEAL, read_marker, shard_path
from distilcache.data.errors import UserError
from distilcache.data.storage.files import read_json, sha256_json
from tests.damage import check, fuzzed
from tests.data.hostile.hostile_support import write_manifest
from tests.refusals import refused

ABSURD = [None, True, -1, 1 << 70, 1.5, 0, float("inf"), float("nan"), "", "x", "../../../x",
          "0" * 64, [], {}, [[]], {"a": 1}, [1, 2], ["x"] * 3, "x" * 70_000]  # fmt: skip


def places(values, prefix=()):
    """Paths of every value within some JSON."""
    yield prefix
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from places(value, (*prefix, key))
        else:
            yield (*prefix, key)


def put(values, place, new):
    values = copies.deepcopy(values)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    if place:
        inner[place[-1]] = new
        return values
    return new


def read_all(path) -> None:
    cache = Cache.open(path)
    for block in range(cache.num_blocks):
        cache.read_block(block)
    cache.round_range(0)
    assert cache.manifest.clipped_fraction >= 0
    for hidden in cache.encoding.hidden:
        cache.teacher.hidden_decoder(hidden.layer)
    if cache.manifest.head is not None:
        cache.teacher.lm_head()


def without(sound, name, tmp_path_factory):
    """A copy of a cache that lacks one file; the others are links."""
    path = tmp_path_factory.mktemp("absurd") / "cache"
    shutil.copytree(sound, path, copy_function=os.link)
    (path / name).unlink()
    return path


def passes_or_refuses(call):
    """What a call gives, or its refusal in one line; nothing else may come out."""
    try:
        return call()
    except UserError as error:
        text = str(error)
    assert "\n" not in text
    assert len(text) < 2000
    return text


@fuzzed(150)
@given(data=st.data(), new=st.sampled_from(ABSURD), sealed=st.booleans())
def test_a_manifest_of_absurd_values(sound, data, new, sealed, tmp_path_factory):
    values = read_json(sound / "manifest.json", "cache: manifest")
    place = data.draw(st.sampled_from(sorted(places(values), key=repr)))
    path = without(sound, "manifest.json", tmp_path_factory)
    changed = put(values, place, new)
    if sealed and isinstance(changed, dict):
        write_manifest(path, changed)
    else:
        (path / "manifest.json").write_text(json.dumps(changed))
    for call in (lambda: read_all(path), lambda: check(path)):
        passes_or_refuses(call)
    shutil.rmtree(path.parent)


@fuzzed(150)
@given(data=st.data(), new=st.sampled_from(ABSURD), sealed=st.booleans())
def test_a_marker_of_absurd_values(sound, data, new, sealed, tmp_path_factory):
    values = read_json(shard_path(sound, 0, 0).with_suffix(".json"), "marker")
    place = data.draw(st.sampled_from(sorted(places(values), key=repr)))
    marker = shard_path(sound, 0, 0).with_suffix(".json").relative_to(sound)
    path = without(sound, marker, tmp_path_factory)
    marker = path / marker
    changed = put(values, place, new)
    if sealed and isinstance(changed, dict):
        changed.pop(SEAL, None)
        changed[SEAL] = sha256_json(changed)
    marker.write_text(json.dumps(changed))
    same = json.loads(marker.read_text()) == values
    assert passes_or_refuses(lambda: read_marker(shard_path(path, 0, 0))) is not None
    faults = check(path)
    assert same or faults, (place, new)
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    "name", ["manifest.json", "provenance.json", "shards/r00/shard-000000.json"]
)
@pytest.mark.parametrize(
    "content",
    [b"[" * 500_000, b'{"a":' * 200_000, b"1" * 10_000, b"\xff\xfe\x00", b"NaN", b"1e400",
     pickle.dumps({"a": 1}), b"", b'"\\ud800"', b'{"schema_version": 2}'],
)  # fmt: skip
def test_json_that_is_none(copy, name, content):
    (copy / name).write_bytes(content)
    faults = check(copy)
    assert faults
    assert all("\n" not in fault for fault in faults)
    if name != "provenance.json":
        call = {"manifest.json": lambda: Cache.open(copy)}.get(
            name, lambda: read_marker(shard_path(copy, 0, 0))
        )
        refused(call)


def test_json_of_any_length_is_not_read(copy, little_memory):
    marker = shard_path(copy, 0, 0).with_suffix(".json")
    with marker.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    assert "must be JSON, got" in refused(lambda: read_marker(shard_path(copy, 0, 0)))
    assert check(copy)


# ---- pickles ---------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_ever_opened(copy, tmp_path):
    evil = pickle.dumps(Evil(tmp_path / "opened"))
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    for path, raw in before.items():
        path.write_bytes(evil)
        assert check(copy), path
        try:
            read_all(copy)
            Cache.open(copy).teacher.check()
        except UserError:
            pass
        else:  # what no reader reads
            assert path.suffix == ".json"
            assert path.name != "manifest.json"
        path.write_bytes(raw)
    (copy / "teacher" / "pytorch_model.bin").write_bytes(evil)
    (copy / "teacher" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors must have sha256"):
        Cache.open(copy).teacher.lm_head()
    assert check(copy)
    assert not (tmp_path / "opened").exists()
    pickle.loads(evil)  # the check itself
    assert (tmp_path / "opened").exists()
