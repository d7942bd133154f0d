"""The cache as a whole: other readers, damage, sealed index and manifest."""

import json
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.cache import Cache, codec_path
from data.corpus import Corpus
from data.errors import UserError
from data.files import sha256_json
from data.schema import Encoding, decode_block
from data.shard_check import ShardTask, check_shard
from data.shards import SEAL, read_frame, shard_path

FOREIGN_READER = """
import json, sys, zlib
class NoProject:
    # an editable install reaches this interpreter too
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("data", "stages", "pipeline"):
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, NoProject())
import pyarrow as pa, webdataset as wds, zstandard
found = {"sums": {}, "blocks": [], "metadata": []}
for sample in wds.WebDataset(sys.argv[1:], shardshuffle=False):
    (frame,) = [v for k, v in sample.items() if not k.startswith("__")]
    stream = pa.ipc.open_stream(zstandard.ZstdDecompressor().decompress(frame))
    table = stream.read_all()
    assert table.num_rows == 1
    metadata = json.loads(table.schema.metadata[b"distilcache"])
    found["metadata"].append(metadata)
    found["blocks"].append([sample["__key__"], metadata["round"], metadata["block"]])
    for name in table.column_names:
        values = table.column(name)[0].values.to_numpy()
        entry = found["sums"].setdefault(name, [0, 0.0, 0, str(values.dtype)])
        entry[0] += len(values)
        entry[2] = zlib.crc32(values.tobytes(), entry[2])
        values = values.astype("float64")
        entry[1] += float(values[values > -1e30].sum())
assert not {"data", "stages"} & set(sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def coded(small_cache) -> Path:
    """Coded hidden states of two layers, 8 logits, two rounds."""
    return small_cache(rounds=2, hidden_layers=(1, -1))


@pytest.fixture
def copy(coded, tmp_path) -> Path:
    """The same cache, to be damaged."""
    return shutil.copytree(coded, tmp_path / "copy")


def message(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "kind",
    [
        {"rounds": 2, "hidden_layers": (1, -1)},
        {"positions": "all", "hidden_dtype": "float16", "logits_dtype": "uint8"},
        {"positions": "masked+0.2", "top_p": 0.5, "tail_samples": 4, "residual_samples": 6},
        {"mask_only": True},
    ],
    ids=["coded", "raw", "drawn", "mask-only"],
)
def test_every_shard_opens_without_this_project(small_cache, tmp_path, kind):
    path = small_cache(**kind)
    tars = sorted(str(p) for p in path.glob("shards/*/*.tar"))
    assert len(tars) > 3
    done = subprocess.run(
        [sys.executable, "-I", "-c", FOREIGN_READER, *tars],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cache = Cache.open(path)
    assert len(found["blocks"]) == cache.num_blocks
    sums = Counter(), Counter()
    crc = {}
    for i in range(cache.num_blocks):
        entry = cache.entry(i)
        key, round_index, block = found["blocks"][i]
        assert key.startswith(f"r{entry.round:02d}-{entry.shard:06d}-")
        assert (round_index, block) == (entry.round, entry.block)
        for name, values in cache.read_block(i).items():
            sums[0][name] += len(values)
            assert found["sums"][name][3] == str(values.dtype)
            crc[name] = zlib.crc32(values.tobytes(), crc.get(name, 0))
            values = values.astype(np.float64)
            sums[1][name] += float(values[values > -1e30].sum())
    assert {n: v[0] for n, v in found["sums"].items()} == dict(sums[0])
    assert {n: v[1] for n, v in found["sums"].items()} == pytest.approx(dict(sums[1]))
    assert {n: v[2] for n, v in found["sums"].items()} == crc
    for metadata in found["metadata"]:
        assert Encoding.from_dict(metadata["encoding"]) == cache.encoding


def test_a_block_alone_says_what_it_is(coded, small_teacher):
    cache = Cache.open(coded)
    entry = cache.entry(cache.num_blocks - 1)
    frame = read_frame(shard_path(coded, entry.round, entry.shard), entry)
    _, metadata = decode_block(frame)
    assert metadata["schema_version"] == 2
    assert (metadata["round"], metadata["block"]) == (1, entry.block)
    encoding = metadata["encoding"]
    assert encoding["vocab_size"] == cache.encoding.vocab_size > 100
    assert encoding["temperatures"] == [2.0]
    assert (encoding["hidden_positions"], encoding["logit_positions"]) == ("masked", "masked")
    assert (encoding["top_k"], encoding["logits_dtype"]) == (8, "float16")
    assert [(h["layer"], h["width"], h["dtype"]) for h in encoding["hidden"]] == [
        (1, 32, "coded"),
        (3, 32, "coded"),
    ]
    assert all(len(h["codec_sha256"]) == 64 for h in encoding["hidden"])
    provenance = metadata["provenance"]
    assert provenance["masking"] == {
        "policy": "uniform", "probability": 0.3, "mask": 0.8, "random": 0.1, "smoothing": 0.7,
        "seed": 0,
    }  # fmt: skip
    for name in ("teacher_sha256", "tokenizer_sha256", "corpus_fingerprint"):
        assert len(provenance[name]) == 64
    assert provenance["dtype"] == "float32"
    assert provenance == cache.manifest.provenance["identity"]


def test_index_and_totals_describe_the_blocks(coded, small_corpus):
    cache = Cache.open(coded)
    split = Corpus.open(small_corpus()).split("train")
    totals = cache.manifest.totals
    assert cache.num_blocks == 2 * split.num_blocks == totals["blocks"]
    columns = Counter()
    for i in range(cache.num_blocks):
        entry, block = cache.entry(i), cache.read_block(i)
        assert entry.sequences == len(block["lengths"]) == split.block_sequences[entry.block]
        assert entry.tokens == len(block["input_ids"]) == split.block_tokens[entry.block]
        assert entry.masked == entry.positions == len(block["labels"])
        columns.update({name: values.nbytes for name, values in block.items()})
    assert totals["column_bytes"] == dict(columns)
    assert totals["tokens"] == 2 * split.block_tokens.sum()
    assert totals["bytes"] == sum(p.stat().st_size for p in coded.glob("shards/*/*.tar"))
    assert totals["shards"] == len(list(coded.glob("shards/*/*.json")))
    assert [list(cache.round_range(r)) for r in (0, 1)] == [
        list(range(split.num_blocks)),
        list(range(split.num_blocks, 2 * split.num_blocks)),
    ]
    assert len(cache.round_range(2)) == 0


def test_a_sound_cache_has_no_fault(coded, small_cache):
    assert list(Cache.open(coded).verify()) == []
    assert list(Cache.open(small_cache(mask_only=True)).verify()) == []


def test_every_bit_flip_in_a_shard_is_seen(copy):
    """``verify`` names the shard; reading the block that was hit names shard and block."""
    cache = Cache.open(copy)
    tar = shard_path(copy, 1, 2)
    rows = [i for i in range(cache.num_blocks) if (cache.entry(i).round, cache.entry(i).shard)
            == (1, 2)]  # fmt: skip
    entries = [cache.entry(i) for i in rows]
    identity = sha256_json(cache.manifest.provenance["identity"])
    raw = tar.read_bytes()
    rng = np.random.default_rng(0)
    hits = 0
    for bit in rng.choice(8 * len(raw), 400, replace=False).tolist():
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        tar.write_bytes(damaged)
        report = check_shard(ShardTask(tar, 1, 2, entries), cache, identity)
        faults = [fault.text for fault in report.faults]
        assert faults, bit
        assert all("shard-000002.tar" in fault and "\n" not in fault for fault in faults)
        for i in rows:
            entry = cache.entry(i)
            if entry.offset <= bit // 8 < entry.offset + entry.size:
                hits += 1
                named = rf"shard-000002\.tar block {entry.block} "
                with pytest.raises(UserError, match=named):
                    cache.read_block(i)
                assert any(f"block {entry.block} " in fault for fault in faults)
            else:
                cache.read_block(i)
    assert hits > 100
    tar.write_bytes(raw)
    assert list(cache.verify()) == []


def test_a_truncated_tar_is_seen(copy):
    cache = Cache.open(copy)
    tar = shard_path(copy, 0, 1)
    entry = cache.entry(3)
    assert (entry.round, entry.shard) == (0, 1)
    tar.write_bytes(tar.read_bytes()[: entry.offset + 7])
    with pytest.raises(UserError, match=f"shard-000001.tar block {entry.block} "):
        cache.read_block(3)
    (fault,) = cache.verify()
    assert "shard-000001.tar must be" in fault


def test_a_deleted_tar_or_marker_is_seen(copy):
    cache = Cache.open(copy)
    shard_path(copy, 0, 1).with_suffix(".json").unlink()
    shard_path(copy, 1, 0).unlink()
    faults = list(cache.verify())
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
            faults = list(Cache.open(copy).verify())
            assert len(faults) == 1, (change, seal)
            assert "shard-000001.tar" in faults[0]


@pytest.mark.parametrize("damage", ["delete", "flip", "cut"])
def test_a_damaged_index_is_refused(copy, damage):
    index = copy / "index.arrow"
    raw = bytearray(index.read_bytes())
    if damage == "delete":
        index.unlink()
    elif damage == "flip":
        raw[len(raw) // 2] ^= 16
        index.write_bytes(raw)
    else:
        index.write_bytes(raw[:-8])
    with pytest.raises(UserError, match="index.arrow must have sha256") as caught:
        Cache.open(copy)
    assert "distilcache teacher-cache again" in message(caught)


def test_the_index_is_plain_arrow(coded):
    with pa.ipc.open_file(str(coded / "index.arrow")) as reader:
        assert reader.num_record_batches == 1
        table = reader.read_all()
    order = list(zip(*(table.column(n).to_pylist() for n in ("round", "shard", "offset")),
                     strict=True))  # fmt: skip
    assert order == sorted(order)


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
    with pytest.raises(UserError, match="cache: manifest must") as caught:
        Cache.open(copy)
    message(caught)


def test_a_manifest_may_be_reformatted(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert Cache.open(copy).manifest.rounds == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7"])
def test_a_manifest_that_is_none_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="cache: ") as caught:
        Cache.open(copy)
    message(caught)


def test_another_schema_version_is_named(copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 9}))
    with pytest.raises(UserError, match="schema_version must be 2, got 9; use the version"):
        Cache.open(copy)


def test_an_incomplete_cache_is_named(copy, tmp_path):
    (copy / "manifest.json").unlink()
    count = len(list(copy.glob("shards/*/*.json")))
    with pytest.raises(UserError, match=f"got {count} finished shards and no manifest.json") as e:
        Cache.open(copy)
    assert "same distilcache teacher-cache command again" in message(e)
    with pytest.raises(UserError, match="run distilcache teacher-cache first"):
        Cache.open(tmp_path / "nowhere")


def test_a_changed_codec_is_seen(copy):
    path = codec_path(copy, 3)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    cache = Cache.open(copy)
    with pytest.raises(UserError, match="hidden_codec_3.safetensors must be the codec"):
        cache.hidden_decoder()
    path.unlink()
    with pytest.raises(UserError, match="got no file"):
        cache.hidden_decoder(3)


def test_a_changed_teacher_is_seen(copy):
    path = copy / "teacher" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (fault,) = Cache.open(copy).verify()
    assert "model.safetensors must have sha256" in fault
    path.write_bytes(raw[:100])
    with pytest.raises(UserError, match="model.safetensors must have sha256"):
        Cache.open(copy).lm_head()
    path.unlink()
    faults = list(Cache.open(copy).verify())
    assert all("model.safetensors" in fault for fault in faults)
    assert any("got no file" in fault for fault in faults)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "hidden_codec_3.safetensors"])
def test_every_file_of_the_teacher_is_verified(copy, name):
    path = copy / "teacher" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    faults = list(Cache.open(copy).verify())
    assert faults
    assert all(name in fault for fault in faults)


def test_what_a_cache_does_not_hold_is_named(small_cache, coded):
    with pytest.raises(UserError, match=r"hidden_layers must hold layer 2, got \[1, 3\]"):
        Cache.open(coded).hidden_decoder(2)
    with pytest.raises(UserError, match="mask-only cache"):
        Cache.open(small_cache(mask_only=True)).lm_head()


def test_nothing_in_the_cache_names_this_machine(coded):
    """Bytes must not depend on where and when a cache is made."""
    for path in coded.rglob("*"):
        if path.is_file() and path.suffix in (".tar", ".arrow", ".safetensors"):
            raw = path.read_bytes()
            assert str(coded.parent).encode() not in raw
            assert str(Path.home()).encode() not in raw or len(str(Path.home())) < 4
