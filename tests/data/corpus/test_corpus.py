"""Corpora written piece by piece: their blocks, and damage that is named."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from distilcache.data.corpus import store
from distilcache.data.corpus.manifest import SPLITS, CorpusManifest
from distilcache.data.corpus.packing import Packed
from distilcache.data.corpus.parts import count_tokens, encode_counts, encode_part
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.masks.masking import MaskingConfig
from distilcache.data.storage.files import sha256_file, write_bytes, write_json
from tests.damage import flip

VOCAB = 100
BLOCK = 4


def some_sequences(seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCAB, rng.integers(12, 30)).tolist() for _ in range(count)]


PARTS = {"train": [some_sequences(1, 10), some_sequences(2, 4), some_sequences(3, 1)],
         "heldout": [some_sequences(4, 5)]}  # fmt: skip


def pack(sequences, dtype=np.uint16) -> Packed:
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    return Packed(np.array([i for s in sequences for i in s], dtype=dtype), lengths, 0)


@pytest.fixture
def corpus(tmp_path):
    """A corpus written piece by piece, without the stage that builds corpora."""
    folder = tmp_path / "corpus"
    write_json(folder / "build.json", {})
    write_bytes(folder / "tokenizer" / "tokenizer.json", b"{}")
    splits = {}
    for name in SPLITS:
        parts = []
        for index, sequences in enumerate(PARTS[name]):
            content, blocks = encode_part(pack(sequences), BLOCK)
            file = folder / name / f"part-{index:06d}.arrow"
            write_bytes(file, content)
            tokens = sum(map(len, sequences))
            parts.append({"file": file.name, "blocks": blocks, "sequences": len(sequences),
                          "tokens": tokens, "bytes": len(content),
                          "sha256": sha256_file(file)})  # fmt: skip
        totals = {k: sum(p[k] for p in parts) for k in ("blocks", "sequences", "tokens")}
        splits[name] = totals | {"documents": 3, "dropped_tokens": 0, "parts": parts}
    tokens = [i for part in PARTS["train"] for s in part for i in s]
    write_bytes(folder / "token_counts.arrow", encode_counts(np.bincount(tokens, minlength=VOCAB)))
    manifest = CorpusManifest(
        packing="lines", max_length=30, vocab_size=VOCAB, token_dtype="uint16",
        tokenizer_sha256="0", special_ids={"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
        all_special_ids=(0, 1, 2, 3, 4), source_fingerprint="0", splits=splits,
        tokenizer_files={"tokenizer.json": sha256_file(folder / "tokenizer" / "tokenizer.json")},
    ).seal()  # fmt: skip
    write_json(folder / "manifest.json", manifest.to_dict())
    return folder


def test_blocks_in_order(corpus):
    opened = Corpus.open(corpus)
    for name in SPLITS:
        split = opened.split(name)
        expected = [part[i : i + BLOCK] for part in PARTS[name] for i in range(0, len(part), BLOCK)]
        assert split.num_blocks == len(expected)
        assert split.block_sequences.tolist() == [len(b) for b in expected]
        for index in reversed(range(split.num_blocks)):
            ids, lengths = split.block(index)
            assert (ids.dtype, lengths.dtype) == (np.uint16, np.int64)
            assert ids.tolist() == [i for s in expected[index] for i in s]
            assert lengths.tolist() == [len(s) for s in expected[index]]
            assert not ids.flags.owndata
        with pytest.raises(IndexError):
            split.block(split.num_blocks)
    with pytest.raises(UserError, match="'test'"):
        opened.split("test")


def test_few_open_files_are_enough(corpus, monkeypatch):
    monkeypatch.setattr("distilcache.data.corpus.store.MAX_OPEN_PARTS", 1)
    split, (first, second, third) = Corpus.open(corpus).split("train"), PARTS["train"]
    held = [split.block(i)[0] for i in (0, 3, 0, 4, 2)]  # views outlive their reader
    expected = [first[:4], second, first[:4], third, first[8:]]
    assert [ids.tolist() for ids in held] == [[i for s in block for i in s] for block in expected]


def test_token_counts(corpus):
    tokens = [i for part in PARTS["train"] for s in part for i in s]
    expected = np.bincount(tokens, minlength=VOCAB)
    assert Corpus.open(corpus).token_counts.tolist() == expected.tolist()
    write_bytes(corpus / "token_counts.arrow", encode_counts(expected[:-1]))
    with pytest.raises(UserError, match=r"token_counts\.arrow must have 100 rows, got 99"):
        assert Corpus.open(corpus).token_counts.sum()


def test_plain_pyarrow_reads_a_part(corpus):
    with pa.ipc.open_file(pa.memory_map(str(corpus / "train" / "part-000000.arrow"))) as reader:
        table = reader.read_all()
        assert reader.num_record_batches == 3
    assert table.column("ids").to_pylist() == PARTS["train"][0]
    assert table.schema.field("ids").type == pa.list_(pa.uint16())


def test_wide_ids(tmp_path):
    sequences = [[70_000, 5, 90_000], [1, 2]]
    content, blocks = encode_part(pack(sequences, np.uint32), 10)
    write_bytes(tmp_path / "a.arrow", content)
    counts = count_tokens(tmp_path / "a.arrow", 100_000)
    assert blocks == 1
    assert {int(i): int(counts[i]) for i in counts.nonzero()[0]} == dict.fromkeys(
        [1, 2, 5, 70_000, 90_000], 1
    )


def test_absent_and_truncated_parts(corpus):
    part = corpus / "heldout" / "part-000000.arrow"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"heldout/part-000000\.arrow must have \d+ bytes, got"):
        Corpus.open(corpus)
    part.unlink()
    with pytest.raises(UserError, match=r"heldout/part-000000\.arrow .* no such file"):
        Corpus.open(corpus)


def test_damage_that_stops_arrow_is_one_line(corpus):
    part = corpus / "train" / "part-000000.arrow"
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(
        UserError, match=r"part-000000\.arrow must be a readable Arrow file"
    ) as caught:
        assert Corpus.open(corpus).split("train").block_sequences.size
    assert "\n" not in str(caught.value)


def test_no_flipped_byte_is_read(corpus):
    """Arrow files have no checksums: a part is held against its own before a block is given."""
    part = corpus / "train" / "part-000001.arrow"
    sound = [Corpus.open(corpus).split("train").block(i)[0].tolist() for i in range(5)]
    for at in range(0, part.stat().st_size, 97):
        flip(part, 8 * at)
        split = Corpus.open(corpus).split("train")
        assert [split.block(i)[0].tolist() for i in range(3)] == sound[:3]
        with pytest.raises(UserError, match=r"part-000001\.arrow must have sha256 .* damaged"):
            split.block(3)
        flip(part, 8 * at)


def test_counts_of_other_tokens_are_refused(corpus):
    """Smoothed masks depend on them."""
    path = corpus / "token_counts.arrow"
    counts = Corpus.open(corpus).token_counts
    first = 8 * path.read_bytes().index(counts.tobytes())
    for bit in range(first, first + 64 * len(counts), 13):
        flip(path, bit)
        with pytest.raises(UserError, match="must count .* tokens, got"):
            assert Corpus.open(corpus).token_counts.sum()
        flip(path, bit)


def test_unfinished_or_edited(corpus, tmp_path):
    with pytest.raises(UserError, match="got none; run distilcache corpus"):
        Corpus.open(tmp_path / "nowhere")
    file = corpus / "manifest.json"
    values = json.loads(file.read_text())
    write_json(file, values | {"max_length": 31})
    with pytest.raises(UserError, match="fingerprint"):
        Corpus.open(corpus)
    write_json(file, values | {"schema_version": 2})
    with pytest.raises(UserError, match="schema_version 1, got 2"):
        Corpus.open(corpus)
    write_json(file, {k: v for k, v in values.items() if k != "packing"})
    with pytest.raises(UserError, match="packing"):
        Corpus.open(corpus)
    file.write_text("{")
    with pytest.raises(UserError, match="JSON"):
        Corpus.open(corpus)
    file.unlink()
    with pytest.raises(UserError, match="an incomplete one; run distilcache corpus"):
        Corpus.open(corpus)


def test_a_damaged_tokenizer_is_named(corpus):
    path = corpus / "tokenizer" / "tokenizer.json"
    opened = Corpus.open(corpus)
    assert opened.tokenizer_fault(opened.tokenizer_dir) == ""
    flip(path, 3)
    fault = opened.tokenizer_fault(opened.tokenizer_dir)
    assert fault.startswith(f"{path} must have sha256 ")
    path.unlink()
    with pytest.raises(UserError, match="must hold tokenizer/tokenizer.json"):
        Corpus.open(corpus)


def test_a_corpus_of_before_opens_under_the_same_fingerprint(corpus):
    """It lists no files of its tokenizer."""
    new = Corpus.open(corpus).manifest
    values = json.loads((corpus / "manifest.json").read_text())
    del values["tokenizer_files"]
    write_json(corpus / "manifest.json", values)
    old = Corpus.open(corpus)
    assert old.manifest.fingerprint == new.fingerprint
    assert old.tokenizer_fault(old.tokenizer_dir) == ""
    write_json(corpus / "manifest.json", values | {"tokenizer_files": []})
    with pytest.raises(UserError, match="must list the tokenizer's files"):
        Corpus.open(corpus)


def test_fingerprint_is_of_the_content_alone(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "copy")
    assert Corpus.open(corpus).manifest == Corpus.open(tmp_path / "copy").manifest


def test_a_part_is_hashed_once_for_all_its_blocks(corpus, monkeypatch):
    opened, hashed = Corpus.open(corpus), []
    monkeypatch.setattr(store, "check_part", lambda file, _: hashed.append(file.name))
    for block in (0, 1, 0, 3):
        opened.masked("train", block, MaskingConfig())
        opened.split("train").block(block)
    assert hashed == ["part-000000.arrow", "part-000001.arrow"]
