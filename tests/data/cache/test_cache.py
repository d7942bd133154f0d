"""The cache as a whole: other readers, what blocks, index and manifest say of it."""

import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.frames import decode_block
from distilcache.data.cache.schema import Encoding
from distilcache.data.cache.shards import read_frame, shard_path
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from tests.command_line import run_alone
from tests.damage import check

FOREIGN_READER = """
import json, sys, zlib
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
print(json.dumps(found))
"""


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
    tars = sorted(path.glob("shards/*/*.tar"))
    assert len(tars) > 3
    found = json.loads(run_alone(FOREIGN_READER, *tars, cwd=tmp_path))
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


def test_a_block_alone_says_what_it_is(sound, small_teacher):
    cache = Cache.open(sound)
    entry = cache.entry(cache.num_blocks - 1)
    frame = read_frame(shard_path(sound, entry.round, entry.shard), entry)
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


def test_index_and_totals_describe_the_blocks(sound, small_corpus):
    cache = Cache.open(sound)
    corpus = Corpus.open(small_corpus(documents=30))
    split = corpus.split("train")
    totals = cache.manifest.totals
    assert cache.num_blocks == 2 * split.num_blocks == totals["blocks"]
    columns = Counter()
    for i in range(cache.num_blocks):
        entry, block = cache.entry(i), cache.read_block(i)
        assert entry.sequences == len(block["lengths"]) == split.block_sequences[entry.block]
        assert entry.tokens == len(block["input_ids"]) == len(split.block(entry.block)[0])
        assert entry.masked == entry.positions == len(block["labels"])
        columns.update({name: values.nbytes for name, values in block.items()})
    assert totals["column_bytes"] == dict(columns)
    assert totals["tokens"] == 2 * corpus.manifest.splits["train"]["tokens"]
    assert totals["bytes"] == sum(p.stat().st_size for p in sound.glob("shards/*/*.tar"))
    assert totals["shards"] == len(list(sound.glob("shards/*/*.json")))
    assert [list(cache.round_range(r)) for r in (0, 1)] == [
        list(range(split.num_blocks)),
        list(range(split.num_blocks, 2 * split.num_blocks)),
    ]
    assert len(cache.round_range(2)) == 0


def test_a_sound_cache_has_no_fault(sound, small_cache):
    assert check(sound) == []
    assert check(small_cache(mask_only=True)) == []


def test_the_index_is_plain_arrow(sound):
    with pa.ipc.open_file(str(sound / "index.arrow")) as reader:
        assert reader.num_record_batches == 1
        table = reader.read_all()
    order = list(zip(*(table.column(n).to_pylist() for n in ("round", "shard", "offset")),
                     strict=True))  # fmt: skip
    assert order == sorted(order)


def test_what_a_cache_does_not_hold_is_named(small_cache, sound):
    with pytest.raises(UserError, match=r"hidden_layers must hold layer 2, got \[1, 3\]"):
        Cache.open(sound).teacher.hidden_decoder(2)
    with pytest.raises(UserError, match="mask-only cache"):
        Cache.open(small_cache(mask_only=True)).teacher.lm_head()


def test_nothing_in_the_cache_names_this_machine(sound):
    """Bytes must not depend on where and when a cache is made."""
    for path in sound.rglob("*"):
        if path.is_file() and path.suffix in (".tar", ".arrow", ".safetensors"):
            raw = path.read_bytes()
            assert str(sound.parent).encode() not in raw
            assert str(Path.home()).encode() not in raw or len(str(Path.home())) < 4
