"""Tars and indexes of somebody else: what they claim is held against what is there."""

import tarfile

import pyarrow as pa
import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.shards import INDEX_TYPES, read_marker, shard_path
from distilcache.data.storage.files import read_json, sha256_file
from distilcache.data.verify.repair import remove_damaged
from distilcache.data.verify.run import Settings, verify_cache
from tests.damage import check
from tests.data.hostile.hostile_support import reseal, write_manifest, write_marker
from tests.refusals import refused

MEMBERS = {
    "traversal": {"name": "../../../evil"},
    "absolute": {"name": "/tmp/evil"},
    "of another block": {"name": "r00-000001-0001.arrow.zst"},
    "symbolic link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "hard link": {"type": tarfile.LNKTYPE, "linkname": "../../manifest.json"},
    "device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    "pipe": {"type": tarfile.FIFOTYPE},
    "folder": {"type": tarfile.DIRTYPE},
    "long name": {"type": tarfile.GNUTYPE_LONGNAME},
    "pax header": {"type": tarfile.XHDTYPE},
    "huge": {"size": 8**11 - 1},
    "empty": {"size": 0},
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_member_that_is_no_plain_file(copy, kind, little_memory):
    """``verify`` names it, and nothing is ever extracted: blocks are read by their offset."""
    tar = shard_path(copy, 0, 1)
    marker = read_marker(tar)
    raw = bytearray(tar.read_bytes())
    at = marker["blocks"][0]["offset"] - 512
    info = tarfile.TarInfo.frombuf(bytes(raw[at : at + 512]), "utf-8", "strict")
    for name, value in MEMBERS[kind].items():
        setattr(info, name, value)
    raw[at : at + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    tar.write_bytes(raw)
    write_marker(tar, marker)
    reseal(copy)
    before = {p: p.read_bytes() for p in copy.parent.rglob("*") if p.is_file()}
    (fault,) = check(copy)
    assert "tar member must be the file r00-000001-0000.arrow.zst" in fault
    cache = Cache.open(copy)
    for block in range(cache.num_blocks):
        cache.read_block(block)
    assert {p: p.read_bytes() for p in copy.parent.rglob("*") if p.is_file()} == before


# ---- index -----------------------------------------------------------------------------------

ROWS = {
    "behind the end": {"offset": 1 << 40},
    "far behind the end": {"offset": (1 << 64) - 1},
    "longer than the file": {"size": 1 << 40},
    "absurdly long": {"size": (1 << 64) - 1},
    "of few tokens": {"tokens": 1},
    "of all tokens": {"tokens": (1 << 32) - 1, "sequences": (1 << 32) - 1},
    "of no sequence": {"sequences": 0},
    "of all masks": {"masked": (1 << 32) - 1},
    "of another round": {"round": 7},
    "of another block": {"block": 5},
    "of the tar's header": {"offset": 0},
}


@pytest.mark.parametrize("kind", ROWS)
def test_an_index_row_that_lies(copy, kind, little_memory):
    """Its sums and the manifest's seal are right; read_block must not believe it."""
    table = pa.ipc.open_file(copy / "index.arrow").read_all().to_pydict()
    for name, value in ROWS[kind].items():
        table[name][0] = value
    columns = {n: pa.array(table[n], t) for n, t in INDEX_TYPES.items()}
    batch = pa.record_batch(columns)
    with pa.ipc.new_file(copy / "index.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    values = read_json(copy / "manifest.json", "cache: manifest")
    write_manifest(copy, {**values, "index_sha256": sha256_file(copy / "index.arrow")})
    refused(lambda: Cache.open(copy).read_block(0))
    assert check(copy)
    faults = list(verify_cache(copy, Settings(workers=1)))
    removed = remove_damaged(copy, faults)
    assert removed
    assert not [name for name in removed if name.endswith(".tar")]  # the shards are sound


@pytest.mark.parametrize("kind", ["overlap", "order", "twice", "none", "other columns", "nulls",
                                  "compressed", "text"])  # fmt: skip
def test_an_index_that_is_none(copy, kind, little_memory):
    index = copy / "index.arrow"
    batch = pa.ipc.open_file(index).read_all().to_batches()[0]
    options = None
    if kind == "overlap":
        offsets = batch.column("offset").to_pylist()
        offsets[1] = offsets[0] + 1
        column = pa.array(offsets, pa.uint64())
        batch = batch.set_column(3, "offset", column)
    elif kind == "order":
        batch = batch.take(pa.array(range(batch.num_rows))[::-1])
    elif kind == "twice":
        batch = pa.Table.from_batches([batch, batch]).combine_chunks().to_batches()[0]
    elif kind == "none":
        batch = batch.slice(0, 0)
    elif kind == "other columns":
        batch = batch.drop_columns(["crc32"])
    elif kind == "nulls":
        batch = batch.set_column(4, "size", pa.array([None] * batch.num_rows, pa.uint64()))
    elif kind == "compressed":
        options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(index, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    if kind == "text":
        index.write_text("no index at all")
    values = read_json(copy / "manifest.json", "cache: manifest")
    write_manifest(copy, {**values, "index_sha256": sha256_file(index)})
    assert check(copy)
    if kind in ("other columns", "nulls", "compressed", "text"):
        refused(lambda: Cache.open(copy))
