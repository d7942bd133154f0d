"""What somebody else may hand us as a cache: refused in one line, and nothing else happens."""

import copy as copies
import io
import json
import os
import pickle
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.cache import Cache
from data.errors import UserError
from data.files import read_json, sha256_file, sha256_json
from data.manifest import CacheManifest, finish_cache
from data.schema import METADATA_KEY, SCHEMA_VERSION, decode_block
from data.shards import INDEX_TYPES, SEAL, read_marker, shard_path
from data.verify import Settings, remove_damaged, verify_cache

ROOM = 700 << 20
"""Memory that a refusal may take at most, beyond what the process has: address space, not RAM."""


@pytest.fixture(scope="module")
def sound(small_cache) -> Path:
    return small_cache(corpus={"documents": 30}, hidden_layers=(1, -1))


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "outer" / "copy")


@pytest.fixture
def little_memory():
    """No more address space than there is now, and some."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert "must" in text
    assert len(text) < 1200
    return text


def check(path) -> list[str]:
    return [fault.text for fault in verify_cache(path, Settings(workers=1))]


def write_marker(tar, marker) -> None:
    """A marker that agrees with its tar and itself."""
    marker = {k: v for k, v in marker.items() if k != SEAL}
    marker |= {"bytes": tar.stat().st_size, "sha256": sha256_file(tar)}
    tar.with_suffix(".json").write_text(json.dumps({**marker, SEAL: sha256_json(marker)}))


def reseal(path, **changes) -> None:
    """Index and manifest that agree with whatever the markers now say."""
    old = CacheManifest.from_dict(read_json(path / "manifest.json", "cache: manifest"))
    markers = [read_json(p, "marker") for p in sorted(path.glob("shards/*/*.json"))]
    finish_cache(path, markers, encoding=old.encoding, head=old.head, provenance=old.provenance,
                 rounds=old.rounds)  # fmt: skip
    if changes:
        values = read_json(path / "manifest.json", "cache: manifest")
        write_manifest(path, {**values, **changes})


def write_manifest(path, values) -> None:
    content = {name: value for name, value in values.items() if name != "sha256"}
    text = json.dumps({**content, "sha256": sha256_json(content)})
    (path / "manifest.json").write_text(text)


# ---- tars ------------------------------------------------------------------------------------

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
        batch = pa.concat_batches([batch, batch])
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


# ---- frames ----------------------------------------------------------------------------------


def zeros(size: int) -> bytes:
    packer = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj(size)
    piece = bytes(1 << 24)
    return b"".join([*(packer.compress(piece) for _ in range(size >> 24)), packer.flush()])


def put_frame(path, frame: bytes) -> None:
    """Make it the first block of the cache, all sums right."""
    tar = shard_path(path, 0, 0)
    marker = read_marker(tar)
    frames = [tar.read_bytes()[r["offset"] :][: r["size"]] for r in marker["blocks"]]
    frames[0] = frame
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (row, content) in enumerate(zip(marker["blocks"], frames, strict=True)):
            info = tarfile.TarInfo(f"r00-000000-{number:04d}.arrow.zst")
            info.size = len(content)
            row["offset"] = archive.offset + 512
            row["size"], row["crc32"] = len(content), zstandard_crc(content)
            archive.addfile(info, io.BytesIO(content))
    write_marker(tar, marker)
    reseal(path)


def zstandard_crc(content: bytes) -> int:
    import zlib

    return zlib.crc32(content)


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
    "a pickle in a frame": lambda frame: zstandard.ZstdCompressor(write_checksum=True).compress(
        pickle.dumps({"a": 1})
    ),
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
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    raw = change(sink.getvalue().to_pybytes())
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


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


# ---- JSON ------------------------------------------------------------------------------------

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


FUZZED = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "150")), deadline=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip


def read_all(path) -> None:
    cache = Cache.open(path)
    for block in range(cache.num_blocks):
        cache.read_block(block)
    cache.round_range(0)
    assert cache.manifest.clipped_share >= 0
    for hidden in cache.encoding.hidden:
        cache.hidden_decoder(hidden.layer)
    if cache.manifest.head is not None:
        cache.lm_head()


@FUZZED
@given(data=st.data(), new=st.sampled_from(ABSURD), sealed=st.booleans())
def test_a_manifest_of_absurd_values(sound, data, new, sealed, tmp_path_factory):
    values = read_json(sound / "manifest.json", "cache: manifest")
    place = data.draw(st.sampled_from(sorted(places(values), key=repr)))
    path = tmp_path_factory.mktemp("absurd") / "cache"
    shutil.copytree(sound, path, copy_function=os.link)
    (path / "manifest.json").unlink()
    changed = put(values, place, new)
    if sealed and isinstance(changed, dict):
        write_manifest(path, changed)
    else:
        (path / "manifest.json").write_text(json.dumps(changed))
    for call in (lambda: read_all(path), lambda: check(path)):
        try:
            call()
        except UserError as error:
            text = str(error)
            assert "\n" not in text
            assert len(text) < 2000
    shutil.rmtree(path.parent)


@FUZZED
@given(data=st.data(), new=st.sampled_from(ABSURD), sealed=st.booleans())
def test_a_marker_of_absurd_values(sound, data, new, sealed, tmp_path_factory):
    values = read_json(shard_path(sound, 0, 0).with_suffix(".json"), "marker")
    place = data.draw(st.sampled_from(sorted(places(values), key=repr)))
    path = tmp_path_factory.mktemp("absurd") / "cache"
    shutil.copytree(sound, path, copy_function=os.link)
    marker = shard_path(path, 0, 0).with_suffix(".json")
    marker.unlink()
    changed = put(values, place, new)
    if sealed and isinstance(changed, dict):
        changed.pop(SEAL, None)
        changed[SEAL] = sha256_json(changed)
    marker.write_text(json.dumps(changed))
    same = json.loads(marker.read_text()) == values
    try:
        found = read_marker(shard_path(path, 0, 0))
        assert found is not None
    except UserError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 2000
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
            Cache.open(copy).check_teacher()
        except UserError:
            pass
        else:  # what no reader reads
            assert path.suffix == ".json"
            assert path.name != "manifest.json"
        path.write_bytes(raw)
    (copy / "teacher" / "pytorch_model.bin").write_bytes(evil)
    (copy / "teacher" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors must have sha256"):
        Cache.open(copy).lm_head()
    assert check(copy)
    assert not (tmp_path / "opened").exists()
    pickle.loads(evil)  # the check itself
    assert (tmp_path / "opened").exists()
