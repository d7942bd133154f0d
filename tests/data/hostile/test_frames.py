"""Frames and Arrow streams of somebody else: refused before they take memory."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.frames import METADATA_KEY, decode_block
from distilcache.data.cache.schema import SCHEMA_VERSION
from distilcache.data.cache.shards import shard_path
from distilcache.data.errors import UserError
from tests.damage import check
from tests.data.hostile.hostile_support import put_frame
from tests.refusals import refused
from tests.stages.corpus.text.streams import compress, stream_of


def zeros(size: int) -> bytes:
    packer = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj(size)
    piece = bytes(1 << 24)
    return b"".join([*(packer.compress(piece) for _ in range(size >> 24)), packer.flush()])


def with_declared(frame: bytes, size: int) -> bytes:
    """The frame, its header declaring another content size in eight bytes."""
    body = zstandard.get_frame_parameters(frame)
    header = 6 + {0: 1, 1: 2, 2: 4, 3: 8}[frame[4] >> 6] - (1 if frame[4] & 0x20 else 0)
    assert body.has_checksum
    window = b"" if frame[4] & 0x20 else frame[5:6]
    return frame[:4] + bytes([frame[4] & 0x3F | 0xC0]) + window + size.to_bytes(8, "little") + (
        frame[header:]
    )  # fmt: skip


BOMBS = {
    "a gigabyte of zeros": lambda frame: zeros(1 << 30),
    "declares an exabyte": lambda frame: with_declared(frame, 1 << 60),
    "declares three gigabytes": lambda frame: with_declared(frame, 3 << 30),
    "declares little, holds much": lambda frame: with_declared(zeros(1 << 30), 1 << 16),
    "declares nothing": lambda frame: zstandard.ZstdCompressor(
        write_checksum=True, write_content_size=False
    ).compress(b"x" * 100),
    "no checksum": lambda frame: zstandard.ZstdCompressor().compress(b"x" * 100),
    "a skippable frame": lambda frame: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + frame,
    "two frames": lambda frame: frame * 2,
    "nothing": lambda frame: b"\0",
    "a pickle": lambda frame: pickle.dumps({"a": 1}),
    "a pickle in a frame": lambda frame: compress(pickle.dumps({"a": 1})),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_frame_that_is_a_bomb(copy, kind, little_memory):
    cache = Cache.open(copy)
    entry = cache.entry(0)
    frame = shard_path(copy, 0, 0).read_bytes()[entry.offset : entry.offset + entry.size]
    put_frame(copy, BOMBS[kind](frame))
    assert "block" in refused(lambda: Cache.open(copy).read_block(0))
    assert check(copy)
    with pytest.raises(UserError):
        decode_block(BOMBS[kind](frame), 1 << 20)


# ---- Arrow -----------------------------------------------------------------------------------


class Strange(pa.ExtensionType):
    def __init__(self):
        super().__init__(pa.large_list(pa.uint16()), "tests.strange")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        return cls()


def listed(values, dtype=None, offsets=None):
    values = pa.array(values, dtype or pa.uint16())
    offsets = pa.array(offsets or [0, len(values)], pa.int64())
    return pa.LargeListArray.from_arrays(offsets, values)


STREAMS = {
    "dictionary": lambda: {"x": pa.array(["a"]).dictionary_encode()},
    "lists of dictionaries": lambda: {
        "x": pa.LargeListArray.from_arrays([0, 2], pa.array(["a", "b"]).dictionary_encode())
    },
    "extension": lambda: {"x": pa.ExtensionArray.from_storage(Strange(), listed([1, 2]))},
    "text": lambda: {"x": pa.array(["abc"])},
    "lists of text": lambda: {"x": listed(["a"], pa.string())},
    "lists of lists": lambda: {
        "x": pa.LargeListArray.from_arrays([0, 1], pa.array([[1]], pa.large_list(pa.uint16())))
    },
    "deep": lambda: {"x": deep(60)},
    "struct": lambda: {"x": pa.array([{"a": 1}])},
    "union": lambda: {
        "x": pa.UnionArray.from_dense(
            pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]
        )
    },
    "runs": lambda: {"x": pa.RunEndEncodedArray.from_arrays([1], [7])},
    "decimals": lambda: {"x": listed([1], pa.decimal128(5))},
    "bits": lambda: {"x": listed([True], pa.bool_())},
    "nulls": lambda: {"x": listed([1, None])},
    "null row": lambda: {"x": pa.array([None], pa.large_list(pa.uint16()))},
    "two rows": lambda: {"x": pa.array([[1], [2]], pa.large_list(pa.uint16()))},
    "no row": lambda: {"x": pa.array([], pa.large_list(pa.uint16()))},
    "short lists": lambda: {"x": pa.array([[1]], pa.list_(pa.uint16()))},
}


def deep(levels: int):
    array = pa.array([1], pa.uint16())
    for _ in range(levels):
        array = pa.LargeListArray.from_arrays(pa.array([0, 1], pa.int64()), array)
    return array


def framed(batches, metadata=None, options=None, change=lambda raw: raw) -> bytes:
    said = metadata if metadata is not None else json.dumps({"schema_version": SCHEMA_VERSION})
    batches = [b.replace_schema_metadata({METADATA_KEY: said}) for b in batches]
    return compress(change(stream_of(batches[0].schema, *batches, options=options)))


@pytest.mark.parametrize("offsets", [(1, 4), (-3, 777), (777, 0), (0, 1 << 40), (0, -1), (0, 776)])
def test_offsets_that_are_not_those_of_one_whole_row(offsets, little_memory):
    """Our reader takes the values as they are; one that follows offsets must see the same."""
    batch = pa.record_batch({"x": listed(range(777))})
    own, others = (np.array(pair, np.int64).tobytes() for pair in ((0, 777), offsets))

    def change(raw):
        at = raw.rfind(own)  # the message before it has lengths of its own
        return raw[:at] + others + raw[at + 16 :]

    assert len(decode_block(framed([batch]))[0]["x"]) == 777
    assert "intact zstd frame" in refused(lambda: decode_block(framed([batch], change=change)))


def test_what_is_refused_below_is_sound_otherwise():
    columns, _ = decode_block(framed([pa.record_batch({"x": listed([1, 2])})]))
    assert columns["x"].tolist() == [1, 2]


@pytest.mark.parametrize("kind", STREAMS)
def test_an_arrow_stream_of_something_else(kind, little_memory, request):
    if kind == "extension":  # one that is not registered is read as what it stores
        pa.register_extension_type(Strange())
        request.addfinalizer(lambda: pa.unregister_extension_type("tests.strange"))
    frame = framed([pa.record_batch(STREAMS[kind]())])
    assert "intact zstd frame" in refused(lambda: decode_block(frame))


def test_arrow_streams_that_hide_more(little_memory):
    batch = pa.record_batch({"x": listed(np.zeros(1 << 22, np.uint16))})
    for codec in ("zstd", "lz4"):
        frame = framed([batch], options=pa.ipc.IpcWriteOptions(compression=codec))
        assert "compressed buffers" in refused(lambda frame=frame: decode_block(frame))
    small = pa.record_batch({"x": listed([1])})
    assert "more than one" in refused(lambda: decode_block(framed([small, small])))
    twice = pa.RecordBatch.from_arrays([listed([1]), listed([2])], names=["x", "x"])
    assert "two columns" in refused(lambda: decode_block(framed([twice])))


@pytest.mark.parametrize(
    "said",
    [b"", b"[]", b"7", b"{}", b"[" * 200_000, b'{"schema_version": 1e400}', b"\xff\xfe",
     b'{"schema_version": true}', b'{"schema_version": "2"}', b'{"schema_version": [2]}',
     b'{"schema_version": 1' + b"0" * 5000 + b"}", pickle.dumps(2)],
)  # fmt: skip
def test_metadata_that_is_none(said):
    refused(lambda: decode_block(framed([pa.record_batch({"x": listed([1])})], said)))


SAID = {
    "round": 1, "block": 1, "provenance_sha256": "0" * 64, "encoding": {}, "block ": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ["round", "block", "provenance_sha256", "encoding"])
def test_a_block_that_says_it_belongs_elsewhere(copy, name):
    cache = Cache.open(copy)
    entry = cache.entry(0)
    frame = shard_path(copy, 0, 0).read_bytes()[entry.offset : entry.offset + entry.size]
    columns, metadata = decode_block(frame)
    batch = pa.record_batch({n: listed(v, pa.from_numpy_dtype(v.dtype)) for n, v in
                             columns.items()})  # fmt: skip
    for said in (json.dumps({**metadata, name: SAID[name]}),
                 json.dumps({k: v for k, v in metadata.items() if k != name})):  # fmt: skip
        put_frame(copy, framed([batch], said))
        text = refused(lambda: Cache.open(copy).read_block(0))
        assert f"a block's {name} must be" in text
        assert any(f"a block's {name} must be" in fault for fault in check(copy))
