"""A corpus holds what the tokenizer makes of its documents, whatever they come in."""
# ruff: noqa: F811

import gzip
import json
import lzma
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from transformers import AutoTokenizer

from distilcache.data.errors import UserError
from distilcache.stages.corpus import build
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.models.tokenizers import tokenizer_fingerprint
from tests.damage import read_corpus
from tests.stages.corpus.corpus_support import (
    DOCUMENTS,
    config,
    contents,
    failure,
    make_documents,
    read_sequences,
    text,  # noqa: F401
    tokenizer,  # noqa: F401
)


def test_blocks_are_the_tokenised_documents_in_order(tmp_path, text, tokenizer):
    corpus = build_corpus(config(text, heldout_fraction=0.2), tmp_path / "out", tokenizer)
    plain = AutoTokenizer.from_pretrained(tokenizer)
    found = {s: read_sequences(corpus, s) for s in ("train", "heldout")}
    streams = {s: [i for seq in found[s] for i in seq[1:-1]] for s in found}
    documents = {"train": 0, "heldout": 0}
    for document in DOCUMENTS:
        ids = [*plain(document, add_special_tokens=False)["input_ids"], plain.sep_token_id]
        # Each document continues exactly one of the two streams; the tail of each is cut off.
        split = next(s for s in streams if streams[s][: len(ids)] == ids[: len(streams[s])])
        streams[split] = streams[split][len(ids) :]
        documents[split] += 1
    assert streams == {"train": [], "heldout": []}
    for split, entry in corpus.manifest.splits.items():
        assert entry["documents"] == documents[split] > 20
        assert entry["sequences"] == len(found[split])
        assert entry["dropped_tokens"] < 14
        assert {len(sequence) for sequence in found[split]} == {16}
    train = [i for sequence in found["train"] for i in sequence]
    counts = np.bincount(train, minlength=corpus.manifest.vocab_size)
    assert corpus.token_counts.tolist() == counts.tolist()
    assert corpus.manifest.tokenizer_sha256 == tokenizer_fingerprint(plain)
    assert corpus.manifest.all_special_ids == (0, 1, 2, 3, 4)
    assert corpus.manifest.vocab_size == len(plain)
    assert AutoTokenizer.from_pretrained(corpus.tokenizer_dir).mask_token == "[MASK]"


def test_lines_are_what_the_tokenizer_gives(tmp_path, text, tokenizer):
    options = {"packing": "lines", "max_length": 40, "heldout_fraction": 0.0, "min_tokens": 12}
    corpus = build_corpus(config(text, **options), tmp_path / "out", tokenizer)
    plain = AutoTokenizer.from_pretrained(tokenizer)
    expected = []
    for line in text.read_text().split("\n"):
        ids = plain(line, add_special_tokens=False)["input_ids"]
        pieces = [ids[i : i + 38] for i in range(0, len(ids), 38)]
        expected += [[2, *piece, 3] for piece in pieces if len(piece) + 2 > 11]
        if len(ids) <= 38 and len(ids) + 2 > 11:
            assert expected[-1] == plain(line)["input_ids"]
    assert read_sequences(corpus, "train") == expected
    assert len({len(sequence) for sequence in expected}) > 5


def test_text_about_special_tokens_is_text(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("the [MASK] and [SEP] and [PAD] of the boat, " * 20)
    corpus = build_corpus(config(path, heldout_fraction=0.0), tmp_path / "out", tokenizer)
    for sequence in read_sequences(corpus, "train"):
        assert not {0, 2, 4}.intersection(sequence[1:-1])


def test_every_format_gives_the_same_corpus(tmp_path, text, tokenizer):
    raw = text.read_bytes()
    rows = "\n".join(json.dumps({"text": document}) for document in DOCUMENTS).encode()
    files = {"a.txt.gz": gzip.compress(raw), "a.txt.xz": lzma.compress(raw),
             "a.txt.zst": zstandard.ZstdCompressor().compress(raw), "a.jsonl": rows,
             "a.jsonl.gz": gzip.compress(rows),
             "a.jsonl.zst": zstandard.compress(rows)}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    expected = build_corpus(config(text), tmp_path / "out", tokenizer).manifest
    for name in (*files, "a.parquet"):
        out = tmp_path / f"out-{name}"
        assert build_corpus(config(tmp_path / name), out, tokenizer).manifest == expected
        assert contents(out).keys() == contents(tmp_path / "out").keys()


def test_worker_count_changes_no_byte(tmp_path, text, tokenizer):
    small = {"chunk_bytes": 1024, "heldout_fraction": 0.2}
    one = build_corpus(config(text, **small), tmp_path / "one", tokenizer)
    build_corpus(config(text, **small | {"workers": 3}), tmp_path / "three", tokenizer)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(one.manifest.splits["train"]["parts"]) > 8
    assert len(one.manifest.splits["heldout"]["parts"]) > 2
    read_corpus(one.path)


def test_a_share_of_the_cores_gives_as_many_processes(tmp_path, text, tokenizer, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    counts, own = [], build.run_units
    reading = CorpusConfig.reading
    monkeypatch.setattr(
        build, "run_units", lambda *a, **o: counts.append(o["workers"]) or own(*a, **o)
    )
    monkeypatch.setattr(
        CorpusConfig, "reading", lambda s, say, n: counts.append(n) or reading(s, say, n)
    )
    build_corpus(config(text, workers=0), tmp_path / "out", tokenizer)
    assert counts == [1, 1]


def test_a_bar_shows_how_much_text_there_is_if_that_is_known(
    tmp_path, text, tokenizer, monkeypatch
):
    totals, own = [], build.Bar
    monkeypatch.setattr(build, "Bar", lambda **o: totals.append(o["total"]) or own(**o))
    build_corpus(config(text), tmp_path / "known", tokenizer)
    monkeypatch.setattr(Source, "size", lambda self: None)
    build_corpus(config(text), tmp_path / "unknown", tokenizer)
    build_corpus(config(text, max_bytes=5000), tmp_path / "limited", tokenizer)
    assert totals == [text.stat().st_size, None, 5000]


def test_held_out_documents_do_not_depend_on_their_place(tmp_path, tokenizer):
    shuffled = random.Random(5).sample(DOCUMENTS, len(DOCUMENTS))
    found = []
    for index, documents in enumerate((DOCUMENTS, shuffled)):
        path = tmp_path / f"{index}.jsonl"
        path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
        options = {"heldout_fraction": 0.3, "packing": "lines"}
        corpus = build_corpus(config(path, **options), tmp_path / f"out{index}", tokenizer)
        found.append(sorted(map(tuple, read_sequences(corpus, "heldout"))))
    assert found[0] == found[1]
    assert len(found[0]) > 20


def test_held_out_sources_and_max_bytes(tmp_path, text, tokenizer):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(make_documents(20, seed=9)))
    options = {"heldout_sources": (str(other),), "max_bytes": 5000}
    manifest = build_corpus(config(text, **options), tmp_path / "out", tokenizer).manifest
    assert manifest.splits["heldout"]["documents"] == 20
    marker = json.loads((tmp_path / "out" / "train" / "part-000000.json").read_text())
    longest = max(len(d.encode()) for d in DOCUMENTS)
    assert 5000 <= marker["text_bytes"] < 5000 + longest


def test_copies_are_on_the_same_side(tmp_path, tokenizer):
    """Documents that differ in spaces and line ends alone, held out by hash."""
    copies = [f" {d} ".replace("\n", "  \n ").replace(" the ", "\t the ") for d in DOCUMENTS]
    found = []
    for name, documents in (("once", DOCUMENTS), ("twice", DOCUMENTS + copies)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
        corpus = build_corpus(config(path, heldout_fraction=0.3), tmp_path / name, tokenizer)
        found.append(corpus.manifest.splits["heldout"]["documents"])
    assert found[1] == 2 * found[0] > 60


@pytest.mark.parametrize("most", [1 << 19, 90])
def test_held_out_text_within_the_training_text(
    tmp_path, text, tokenizer, monkeypatch, capsys, most
):
    monkeypatch.setattr("distilcache.stages.corpus.duplicates.MAX_KEYS", most)
    copies = [d.replace(" ", "  ").replace("\n", " \n") for d in DOCUMENTS[:50]]
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(make_documents(20, seed=9)))
    build_corpus(config(text, heldout_sources=(str(other),)), tmp_path / "apart", tokenizer)
    assert "also training text" not in capsys.readouterr().err
    other.write_text("\n\n".join(make_documents(20, seed=9) + copies))
    build_corpus(config(text, heldout_sources=(str(other),)), tmp_path / "within", tokenizer)
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    [line] = [line for line in lines if "also training text" in line]
    if most > 1000:
        assert line.startswith("corpus: 50 of 70 held-out documents")
    else:
        assert line.startswith("corpus: about ")
        assert 20 < int(line.split()[2]) < 80


@pytest.mark.parametrize("document", ["blank_line", "file", "line"])
def test_what_ends_a_document(tmp_path, tokenizer, document):
    files = [DOCUMENTS[:60], DOCUMENTS[60:120], DOCUMENTS[120:]]
    for index, documents in enumerate(files):
        (tmp_path / f"{index}.txt").write_text("\n\n".join(documents))
    settings = config(tmp_path / "*.txt", document=document, heldout_fraction=0.4, packing="lines")
    corpus = build_corpus(settings, tmp_path / "out", tokenizer)
    splits = corpus.manifest.splits.values()
    lines = sum(len(d.split("\n")) for d in DOCUMENTS)
    count = {"blank_line": len(DOCUMENTS), "file": 3, "line": lines}[document]
    assert sum(entry["documents"] for entry in splits) == count
    # However a document is held out, its sequences are its lines.
    whole = config(tmp_path / "*.txt", heldout_fraction=0.0, packing="lines")
    whole = build_corpus(whole, tmp_path / "whole", tokenizer)
    found = [s for name in ("train", "heldout") for s in read_sequences(corpus, name)]
    assert sorted(found) == sorted(read_sequences(whole, "train"))


@pytest.mark.parametrize("document", ["", "line"])
def test_rows_of_several_lines(tmp_path, tokenizer, document, capsys):
    rows = [[line.replace("\n", " ") for line in DOCUMENTS[i::50][:3]] for i in range(50)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "\n".join(row)}) for row in rows))
    options = {"packing": "lines", "max_length": 300, "document": document}
    corpus = build_corpus(
        config(path, heldout_fraction=0.5, **options), tmp_path / "out", tokenizer
    )
    plain = AutoTokenizer.from_pretrained(tokenizer)
    held = set(map(tuple, read_sequences(corpus, "heldout")))
    counts = [sum(tuple(plain(line)["input_ids"]) in held for line in row) for row in rows]
    documents = sum(entry["documents"] for entry in corpus.manifest.splits.values())
    if document == "line":
        assert documents == 150
        assert {1, 2} & set(counts)
    else:
        assert documents == 50
        assert set(counts) == {0, 3}
    line = (
        "corpus: 50 rows have several lines: each line is a sequence, a row is held out as a whole"
    )
    assert (line in capsys.readouterr().err) == (not document)
    # The same sequences, whatever a document is.
    whole = build_corpus(config(path, heldout_fraction=0, **options), tmp_path / "all", tokenizer)
    assert read_sequences(whole, "train") == [plain(li)["input_ids"] for row in rows for li in row]


def test_a_long_document_stays_one(tmp_path, tokenizer, monkeypatch):
    for module in (
        "distilcache.stages.corpus.text.streams",
        "distilcache.stages.corpus.text.documents",
    ):
        monkeypatch.setattr(f"{module}.MAX_CHARS", 2000)
    long = [" ".join(make_documents(40, seed=i)).replace("\n", " \n") for i in range(40)]
    assert min(map(len, long)) > 6000
    (tmp_path / "a.txt").write_text("\n\n".join(long))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in long))
    for name in ("a.txt", "a.jsonl"):
        settings = config(tmp_path / name, heldout_fraction=0.5, chunk_bytes=1 << 16)
        corpus = build_corpus(settings, tmp_path / f"out-{name}", tokenizer)
        counts = {name: entry["documents"] for name, entry in corpus.manifest.splits.items()}
        assert sum(counts.values()) == 40
        # Documents of like length: no piece of one has gone to the other side.
        share = {name: entry["text_tokens"] for name, entry in corpus.manifest.splits.items()}
        ratio = share["heldout"] / sum(share.values())
        assert ratio == pytest.approx(counts["heldout"] / 40, abs=0.04)
        assert 8 < counts["heldout"] < 32


def test_short_split_keeps_its_tail(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("the old harbour boat sailed north over the quiet sea, until spring came.")
    options = {"heldout_fraction": 0.0, "max_length": 64}
    corpus = build_corpus(config(path, **options), tmp_path / "out", tokenizer)
    [sequence] = read_sequences(corpus, "train")
    assert sequence == AutoTokenizer.from_pretrained(tokenizer)(path.read_text())["input_ids"]
    assert corpus.manifest.splits["heldout"]["parts"] == []
    assert corpus.split("heldout").num_blocks == 0


def test_trained_tokenizer(tmp_path, text):
    options = {"vocab_size": 350, "max_length": 32}
    corpus = build_corpus(config(text, **options), tmp_path / "out", "train")
    build_corpus(config(text, **options), tmp_path / "again", "train")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    opened = AutoTokenizer.from_pretrained(corpus.tokenizer_dir)
    assert opened.mask_token_id == corpus.manifest.special_ids["mask"] == 4
    assert tokenizer_fingerprint(opened) == corpus.manifest.tokenizer_sha256
    train = " ".join(opened.convert_ids_to_tokens(corpus.split("train").block(0)[0]))
    assert "harbour" in train


@pytest.mark.parametrize("source", ["docstrings", "docstrings:numpy"])
def test_embedded_corpus(tmp_path, source):
    options = {"max_bytes": 60_000, "vocab_size": 600}
    corpus = build_corpus(config(source, **options), tmp_path / "out", "train")
    build_corpus(config(source, **options), tmp_path / "again", "train")
    assert corpus.manifest.splits["train"]["tokens"] > 10_000
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_blocks_beyond_arrows_offsets_are_refused():
    with pytest.raises(UserError, match="block_sequences x max_length must be below"):
        CorpusConfig(block_sequences=65535, max_length=65535)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"", "empty file"),
        ("a.txt", b"text \0 text", "text with NUL bytes"),
        ("a.txt", b"text \0\1 text", "binary file"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 1}\n', "a.jsonl line 2"),
        ("a.txt", b"a", "at least one training sequence, got 1 token, fewer"),
    ],
)
def test_bad_text_leaves_nothing_behind(tmp_path, tokenizer, name, content, problem):
    (tmp_path / name).write_bytes(content)
    settings = config(tmp_path / name, heldout_fraction=0.0)
    for tok in (tokenizer, "train"):
        message = failure(settings, tmp_path / "out", tok)
        assert problem in message
        assert name in message or "training sequence" in message
        assert not (tmp_path / "out").exists()


def test_what_the_recipe_needs_is_said(tmp_path, text, tokenizer):
    needs = "this recipe needs the files of the course"
    out = tmp_path / "out"
    assert needs in failure(config(tmp_path / "none.txt"), out, tokenizer, needs)
    assert needs in failure(config(text), out, str(tmp_path / "none"), needs)
    assert not out.exists()


def test_tokenizer_without_mask_is_refused(tmp_path, text, tokenizer):
    plain = AutoTokenizer.from_pretrained(tokenizer)
    plain.mask_token = None
    plain.save_pretrained(tmp_path / "plain")
    assert "mask_token" in failure(config(text), tmp_path / "out", str(tmp_path / "plain"))
    assert not (tmp_path / "out").exists()


@pytest.mark.shared_data
def test_real_text_and_tokenizer(shared, tmp_path):
    source, teacher = shared / "corpus" / "wiki_valid_2MB.txt.xz", shared / "teacher"
    settings = config(source, max_length=128, heldout_fraction=0.0, workers=2)
    corpus = build_corpus(settings, tmp_path / "out", str(teacher))
    with lzma.open(source, "rt", encoding="utf-8") as file:
        documents = [d.strip() for d in file.read().split("\n\n") if d.strip()]
    plain = AutoTokenizer.from_pretrained(teacher)
    joined = []
    for document in documents:
        joined += [*plain(document, add_special_tokens=False)["input_ids"], plain.sep_token_id]
    found = np.array(read_sequences(corpus, "train"))
    assert found.shape == (len(joined) // 126, 128)
    assert found[:, 1:-1].ravel().tolist() == joined[: found.shape[0] * 126]
    assert corpus.manifest.splits["train"]["documents"] == len(documents)
    assert corpus.manifest.tokenizer_sha256 == tokenizer_fingerprint(plain)
