"""Shards: plain tars, whole or absent, written the same twice."""

import hashlib
import io
import json
import os
import tarfile
import zlib

import numpy as np
import pytest

from distilcache.data.cache.frames import encode_block
from distilcache.data.cache.shards import (
    SEAL,
    BlockEntry,
    EncodedBlock,
    read_frame,
    read_marker,
    shard_path,
    write_shard,
)
from distilcache.data.errors import UserError
from distilcache.data.storage.files import sha256_json
from tests.damage import flip


def blocks(count=3, first=10):
    for number in range(count):
        columns = {"lengths": np.arange(number + 2, dtype=np.uint16)}
        frame = encode_block(columns, {"schema_version": 1, "block": first + number})
        yield EncodedBlock(
            block=first + number,
            frame=frame,
            sequences=number + 2,
            tokens=10 * number,
            masked=number,
            positions=number,
            column_bytes={"lengths": 2 * (number + 2)},
            clipped=number,
        )


def test_paths_follow_the_task(tmp_path):
    assert shard_path(tmp_path, 3, 17) == tmp_path / "shards" / "r03" / "shard-000017.tar"


def test_a_shard_is_a_tar_of_its_frames(tmp_path):
    tar = shard_path(tmp_path, 1, 2)
    marker = write_shard(tar, 1, 2, blocks(), "abc")
    assert read_marker(tar) == marker == json.loads(tar.with_suffix(".json").read_text())
    raw = tar.read_bytes()
    assert marker["bytes"] == len(raw)
    assert marker["sha256"] == hashlib.sha256(raw).hexdigest()
    assert (marker["identity"], marker["clipped_codes"]) == ("abc", 3)
    assert marker["column_bytes"] == {"lengths": 2 * (2 + 3 + 4)}
    frames = [b.frame for b in blocks()]
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == [f"r01-000002-{i:04d}.arrow.zst" for i in range(3)]
        assert [archive.extractfile(m).read() for m in members] == frames
        assert [(m.mtime, m.uid, m.gid, m.uname) for m in members] == [(0, 0, 0, "")] * 3
    for frame, row in zip(frames, marker["blocks"], strict=True):
        entry = BlockEntry(**row)
        assert raw[entry.offset : entry.offset + entry.size] == frame
        assert entry.crc32 == zlib.crc32(frame)
        assert read_frame(tar, entry) == frame
    assert [row["block"] for row in marker["blocks"]] == [10, 11, 12]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shard(shard_path(tmp_path / name, 0, 0), 0, 0, blocks(), "abc")
    for suffix in (".tar", ".json"):
        first, second = (
            shard_path(tmp_path / name, 0, 0).with_suffix(suffix).read_bytes() for name in "ab"
        )
        assert first == second


@pytest.mark.parametrize("identity", ["abc", "def"])
def test_a_shard_that_another_process_has_finished_stays(tmp_path, identity):
    """One of another cache does not."""
    tar = shard_path(tmp_path, 0, 0)

    def late():
        yield from blocks(2)
        write_shard(tar, 0, 0, blocks(3), identity)
        found.append((tar.stat().st_ino, read_marker(tar)))

    found = []
    marker = write_shard(tar, 0, 0, late(), "abc")
    assert ((tar.stat().st_ino, marker) == found[0]) == (identity == "abc")
    assert read_marker(tar) == marker
    assert marker["identity"] == "abc"
    assert sorted(tar.parent.iterdir()) == [tar.with_suffix(".json"), tar]


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def failing():
        yield from blocks(1)
        raise RuntimeError("device lost")

    tar = shard_path(tmp_path, 0, 0)
    with pytest.raises(RuntimeError, match="device lost"):
        write_shard(tar, 0, 0, failing(), "abc")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert read_marker(tar) is None


def test_the_marker_comes_after_the_tar(tmp_path, monkeypatch):
    """A run that dies between the two leaves no marker, so the shard counts as missing."""
    tar = shard_path(tmp_path, 0, 0)

    def killed(path, values):
        assert tar.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("distilcache.data.cache.shards.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tar, 0, 0, blocks(), "abc")
    assert read_marker(tar) is None


def test_a_marker_without_its_tar_or_with_another_is_refused(tmp_path):
    tar = shard_path(tmp_path, 0, 0)
    write_shard(tar, 0, 0, blocks(), "abc")
    raw = tar.read_bytes()
    tar.write_bytes(raw[:-1])
    with pytest.raises(UserError, match=rf"shard-000000.tar must be {len(raw)} bytes, got"):
        read_marker(tar)
    tar.unlink()
    with pytest.raises(UserError, match="got no file; delete"):
        read_marker(tar)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"bytes": 1}'])
def test_a_damaged_marker_is_named(tmp_path, content):
    tar = shard_path(tmp_path, 0, 0)
    write_shard(tar, 0, 0, blocks(), "abc")
    tar.with_suffix(".json").write_text(content)
    with pytest.raises(UserError, match="cache: shard marker must .*shard-000000.json") as caught:
        read_marker(tar)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [0, 1])
def test_rows_need_room_for_the_header_before_each(tmp_path, row):
    """A tar has 512 bytes before each frame; the marker is sealed again, as its writer would."""
    tar = shard_path(tmp_path, 0, 0)
    marker = write_shard(tar, 0, 0, blocks(), "abc")
    end = 0 if row == 0 else marker["blocks"][0]["offset"] + marker["blocks"][0]["size"]
    for room, sound in ((512, True), (511, False)):
        marker["blocks"][row]["offset"] = end + room
        del marker[SEAL]
        marker[SEAL] = sha256_json(marker)
        tar.with_suffix(".json").write_text(json.dumps(marker))
        if sound:
            assert read_marker(tar) == marker
        else:
            with pytest.raises(UserError, match="got rows that overlap or leave the shard"):
                read_marker(tar)


def test_a_damaged_frame_is_named(tmp_path):
    tar = shard_path(tmp_path, 0, 0)
    marker = write_shard(tar, 0, 0, blocks(), "abc")
    entry = BlockEntry(**marker["blocks"][1])
    flip(tar, 8 * entry.offset)
    with pytest.raises(UserError, match="shard shard-000000.tar block 11 must have crc32"):
        read_frame(tar, entry)
    os.truncate(tar, entry.offset + 3)
    with pytest.raises(UserError, match=rf"block 11 .* over 3 of {entry.size} bytes"):
        read_frame(tar, entry)
    tar.unlink()
    with pytest.raises(UserError, match="shard-000000.tar must be readable"):
        read_frame(tar, entry)
