"""One block: what goes in comes out, in any reader; damage never goes unseen."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distilcache.data.cache.frames import METADATA_KEY, decode_block, encode_block
from distilcache.data.cache.schema import SCHEMA_VERSION
from distilcache.data.codecs.planes import Packing
from distilcache.data.errors import UserError
from tests.stages.corpus.text.streams import compress, stream_of

VERSION = {"schema_version": SCHEMA_VERSION}
DTYPES = [np.uint8, np.uint16, np.uint32, np.int8, np.int16, np.float16, np.float32]
NAMES = st.sampled_from(["lengths", "input_ids", "labels", "logit_ids", "hidden_6", "x"])
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays(
        dtype, st.one_of(st.integers(0, 30), st.tuples(st.integers(0, 5), st.integers(0, 6)))
    )
)
JSON = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


def small_frame() -> bytes:
    columns = {
        "lengths": np.array([3, 2], dtype=np.uint16),
        "input_ids": np.array([2, 4, 3, 2, 3], dtype=np.uint16),
        "logit_values": np.array([1.5, -2.25], dtype=np.float16),
    }
    return encode_block(columns, {**VERSION, "round": 3})


@settings(max_examples=150, deadline=None)
@given(columns=st.dictionaries(NAMES, ARRAYS, min_size=1), metadata=JSON)
def test_round_trip(columns, metadata):
    metadata = {**metadata, **VERSION}
    decoded, found = decode_block(encode_block(columns, metadata))
    assert found == metadata
    assert list(decoded) == list(columns)
    for name, values in columns.items():
        assert decoded[name].dtype == values.dtype
        assert decoded[name].tobytes() == np.ascontiguousarray(values).tobytes()
        assert not decoded[name].flags.writeable


def test_a_view_with_strides_is_stored_in_c_order():
    values = np.arange(12, dtype=np.int16).reshape(3, 4).T
    assert decode_block(encode_block({"x": values}, VERSION))[0]["x"].tolist() == [
        0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11,
    ]  # fmt: skip


def test_equal_columns_give_equal_bytes():
    assert small_frame() == small_frame()


def test_a_frame_is_what_the_format_says():
    frame = small_frame()
    assert frame[:4] == bytes.fromhex("28b52ffd")  # zstd magic, RFC 8878
    parameters = zstandard.get_frame_parameters(frame)
    assert parameters.has_checksum
    raw = zstandard.ZstdDecompressor().decompress(frame)
    assert parameters.content_size == len(raw)
    with pa.ipc.open_stream(raw) as stream:
        batches = list(stream)
    assert [b.num_rows for b in batches] == [1]
    (batch,) = batches
    assert batch.schema.field("lengths").type == pa.large_list(pa.uint16())
    assert batch.schema.field("logit_values").type == pa.large_list(pa.float16())
    assert batch.to_pydict() == {
        "lengths": [[3, 2]],
        "input_ids": [[2, 4, 3, 2, 3]],
        "logit_values": [[1.5, -2.25]],
    }
    assert json.loads(batch.schema.metadata[METADATA_KEY]) == {**VERSION, "round": 3}


def test_no_bit_flip_in_a_frame_gives_other_content():
    """A few flips hit redundant bits of the entropy code and change nothing: the checksum is of
    the content. The index holds a second one, of the frame, which sees these too."""
    frame = small_frame()
    columns, metadata = decode_block(frame)
    refused = 0
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found, said = decode_block(bytes(damaged))
        except UserError:
            refused += 1
        else:
            assert said == metadata
            assert list(found) == list(columns)
            assert all(found[n].tobytes() == columns[n].tobytes() for n in columns)
    assert refused > 0.98 * 8 * len(frame)


@pytest.mark.parametrize("cut", [0, 1, 4, 10, -1, -5])
def test_a_cut_frame_is_seen(cut):
    with pytest.raises(UserError, match="intact zstd frame"):
        decode_block(small_frame()[:cut])


def test_more_than_the_frame_is_seen():
    with pytest.raises(UserError, match="intact zstd frame"):
        decode_block(small_frame() + b"\0")
    with pytest.raises(UserError, match="intact zstd frame"):
        decode_block(small_frame() * 2)


def test_a_frame_that_declares_too_much_is_refused_before_it_is_read():
    huge = bytes.fromhex("28b52ffd") + b"\xe4" + (1 << 50).to_bytes(8, "little") + bytes(16)
    with pytest.raises(UserError, match="intact zstd frame"):
        decode_block(huge)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no arrow",
        stream_of(pa.schema([])),
        stream_of(pa.schema([("x", pa.int8())]), pa.record_batch({"x": pa.array([1], pa.int8())})),
    ],
    ids=["empty", "text", "no batch", "no lists"],
)
def test_a_sound_frame_of_something_else_is_refused(raw):
    with pytest.raises(UserError, match="intact zstd frame"):
        decode_block(compress(raw))


@pytest.mark.parametrize("metadata", [b"[]", b"{}", b"{", None])
def test_metadata_must_be_there(metadata):
    batch = pa.record_batch({"x": pa.array([[1]], pa.large_list(pa.int8()))})
    if metadata is not None:
        batch = batch.replace_schema_metadata({METADATA_KEY: metadata})
    with pytest.raises(UserError, match="cache: "):
        decode_block(compress(stream_of(batch.schema, batch)))


def test_another_version_is_named():
    for other in (1, 3):
        named = f"schema_version must be 2, got {other}; use the version"
        with pytest.raises(UserError, match=named):
            decode_block(encode_block({"x": np.zeros(1)}, {"schema_version": other}))


# ---- planes with entropy tables of their own ----------------------------------------------------


def planes_of(kind: str, planes: int, positions: int) -> np.ndarray:
    """Byte planes as the packing of codes makes them, or of one falling distribution each."""
    rng = np.random.default_rng(0)
    if kind == "geometric":
        shares = np.linspace(0.05, 0.7, planes)[:, None]
        values = rng.geometric(shares, (planes, positions)) + np.arange(planes)[:, None]
        return values.astype(np.uint8)
    if kind == "noise":
        return rng.integers(0, 256, (planes, positions), dtype=np.uint8)
    codec = Packing(tuple(np.ceil(np.geomspace(900, 1.5, 3 * planes)).astype(int).tolist()))
    limits = np.array(codec.limits)[:, None]
    codes = np.rint(rng.standard_t(5, (3 * planes, positions)) * limits / 5).clip(-limits, limits)
    table = codec.table(torch.device("cpu"))
    return table.pack(torch.from_numpy(codes.astype(np.int32))).numpy()


def frames_of(kind: str, positions: int = 5000, planes: int = 40) -> tuple[dict, bytes, bytes]:
    values = planes_of(kind, planes, positions)
    columns = {
        "input_ids": np.random.default_rng(1).integers(0, 999, 800).astype(np.uint16),
        "hidden_6": values,
        "empty": np.zeros(0, np.float16),
        "log_odds": np.linspace(-3, 3, 801).astype(np.float16),
    }
    cut = encode_block(columns, VERSION, {"hidden_6": values.shape[1]})
    return columns, cut, encode_block(columns, VERSION)


@pytest.mark.parametrize("kind", ["codes", "geometric", "noise"])
def test_cut_planes_read_as_any_other_frame(kind):
    columns, cut, whole = frames_of(kind)
    assert cut == frames_of(kind)[1]
    found = decode_block(cut)[0]
    raw = [zstandard.ZstdDecompressor().decompress(frame) for frame in (cut, whole)]
    assert raw[0] == raw[1]
    with pa.ipc.open_stream(raw[0]) as stream:
        plain = stream.read_next_batch()
    assert list(found) == plain.schema.names == list(columns)
    for name, values in columns.items():
        assert found[name].tobytes() == values.tobytes()
        assert plain.column(name)[0].values.to_numpy().tobytes() == values.tobytes()
    parameters = zstandard.get_frame_parameters(cut)
    assert (parameters.content_size, parameters.has_checksum) == (len(raw[0]), True)
    assert len(cut) <= 1.01 * len(whole)
    if kind != "noise":
        assert len(cut) < len(whole)


@pytest.mark.parametrize("positions", [0, 1, 2, 63, 64, 300])
def test_planes_of_any_size_are_cut(positions):
    """Down to none: a block may have no position with hidden states."""
    columns, cut, _ = frames_of("geometric", positions, planes=3)
    found = decode_block(cut)[0]
    assert all(found[name].tobytes() == values.tobytes() for name, values in columns.items())


@settings(max_examples=60, deadline=None)
@given(columns=st.dictionaries(NAMES, ARRAYS, min_size=1), size=st.integers(0, 9))
def test_cuts_anywhere_change_nothing(columns, size):
    cut = encode_block(columns, VERSION, dict.fromkeys(columns, size))
    found = decode_block(cut)[0]
    for name, values in columns.items():
        assert found[name].tobytes() == np.ascontiguousarray(values).tobytes()


def test_each_plane_ends_a_block_of_the_frame():
    """RFC 8878, 3.1.1.2: three bytes before each block hold its size and kind."""
    columns, cut, whole = frames_of("codes")
    counted = []
    for frame in (cut, whole):
        at, blocks, last = zstandard.frame_header_size(frame), 0, False
        while not last:
            header = int.from_bytes(frame[at : at + 3], "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            assert kind != 3
            at += 3 + (1 if kind == 1 else size)
            blocks += 1
        assert at + 4 == len(frame)  # the checksum
        counted.append(blocks)
    assert counted[0] >= len(columns["hidden_6"]) + len(columns) - 1
    assert counted[1] < counted[0]
