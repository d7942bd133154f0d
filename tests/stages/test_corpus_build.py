import gzip
import json
import lzma
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from transformers import AutoTokenizer

from data.corpus import Corpus
from data.errors import UserError
from data.tokenizers import tokenizer_fingerprint, train_wordpiece
from stages.corpus import pool
from stages.corpus.build import build_corpus
from stages.corpus.config import CorpusConfig
from stages.corpus.worker import part_name

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"

BUILD = """
import sys
from pathlib import Path
from stages.corpus.build import build_corpus
from stages.corpus.config import CorpusConfig
source, tokenizer, out = sys.argv[1:]
config = CorpusConfig(sources=(source,), max_length=16, chunk_bytes=2048, workers=2)
build_corpus(config, Path(out), tokenizer)
"""


def make_documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["the", "old", "harbour", "boat", "sailed", "north", "wind", "over", "quiet", "sea"]
    words += ["and", "nobody", "saw", "it", "again", "until", "spring", "came", "unbelievably"]
    return [
        "\n".join(
            " ".join(rng.choices(words, k=rng.randint(3, 40))).capitalize() + f", {i}."
            for _ in range(rng.randint(1, 4))
        )
        for i in range(count)
    ]


DOCUMENTS = make_documents(200)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece(make_documents(50, seed=1), 400).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    return path


def config(*given, **options) -> CorpusConfig:
    values = {"sources": tuple(str(g) for g in given), "max_length": 16, "workers": 1}
    return CorpusConfig(**(values | options))


def read_sequences(corpus: Corpus, split: str) -> list[list[int]]:
    found = []
    for index in range(corpus.split(split).num_blocks):
        ids, lengths = corpus.split(split).block(index)
        found += [piece.tolist() for piece in np.split(ids, np.cumsum(lengths)[:-1])]
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def failure(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        build_corpus(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    options = {"packing": "lines", "max_length": 40, "heldout_fraction": 0.0}
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
        assert tree(out).keys() == tree(tmp_path / "out").keys()


def test_worker_count_changes_no_byte(tmp_path, text, tokenizer):
    small = {"chunk_bytes": 1024, "heldout_fraction": 0.2}
    one = build_corpus(config(text, **small), tmp_path / "one", tokenizer)
    build_corpus(config(text, **small | {"workers": 3}), tmp_path / "three", tokenizer)
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    assert len(one.manifest.splits["train"]["parts"]) > 8
    assert len(one.manifest.splits["heldout"]["parts"]) > 2
    assert one.verify() == sum(len(s["parts"]) for s in one.manifest.splits.values())


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
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
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
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_finished_corpus_is_reused(tmp_path, text, tokenizer, monkeypatch, capsys):
    first = build_corpus(config(text), tmp_path / "out", tokenizer)
    monkeypatch.setattr("stages.corpus.build.run_units", None)
    again = build_corpus(config(text, workers=7), tmp_path / "out", tokenizer)
    assert again.manifest == first.manifest
    assert "reused" in capsys.readouterr().err


def test_other_settings_are_refused_by_name(tmp_path, text, tokenizer):
    out = tmp_path / "out"
    build_corpus(config(text), out, tokenizer)
    before = tree(out)
    message = failure(config(text, max_length=24, packing="lines"), out, tokenizer)
    assert "max_length is 16 there and 24 now" in message
    assert "packing is 'blocks' there and 'lines' now" in message
    assert f"delete {out}" in message
    assert "tokenizer" in failure(config(text), out, "train")
    text.write_text(text.read_text().replace("harbour", "Harbour"))
    assert "text.txt has changed" in failure(config(text), out, tokenizer)
    assert tree(out) == before


def test_blocks_beyond_arrows_offsets_are_refused():
    with pytest.raises(UserError, match="block_sequences x max_length must be below"):
        CorpusConfig(block_sequences=65535, max_length=65535)


def test_foreign_folders_are_left_alone(tmp_path, text, tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    assert "empty folder or a corpus" in failure(config(text), out, tokenizer)
    assert tree(out) == {"notes.md": b"mine"}
    assert str(text) in failure(config(text), text, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"", "empty file"),
        ("a.txt", b"text \0 text", "binary file"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 1}\n', "a.jsonl line 2"),
        ("a.txt", b"too short", "at least one training sequence"),
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


def test_locked_folder(tmp_path, text, tokenizer):
    script = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), 2)\n"
    script += "print('locked', flush=True); sys.stdin.read()"
    (out := tmp_path / "out").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout.readline() == b"locked\n"
        assert "another run" in failure(config(text), out, tokenizer)
    build_corpus(config(text), out, tokenizer)


def test_full_disk(tmp_path, text, tokenizer):
    """A limit on file sizes stands for the disk: real writes really fail."""
    settings = config(text, heldout_fraction=0.2)
    build_corpus(settings, tmp_path / "whole", tokenizer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = {path: len(data) for path, data in tree(tmp_path / "whole").items()}
    part = sizes["train/part-000000.arrow"]
    out = tmp_path / "out"
    try:
        for limit in (part - 1, sizes["tokenizer/tokenizer.json"] - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            message = failure(settings, out, tokenizer)
            assert "writable" in message
            assert not (out / "manifest.json").exists()
            assert not list(tmp_path.glob("out/**/*.tmp"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    build_corpus(settings, out, tokenizer)
    assert tree(out) == tree(tmp_path / "whole")


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_run_is_finished_to_the_same_bytes(tmp_path, tokenizer, monkeypatch, capsys):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(make_documents(1200)))
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", BUILD, str(path), tokenizer, str(out)]
    running = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("train/part-*.json"))) < 10:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = children(running.pid) if Path("/proc").exists() else []
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="incomplete"):
        Corpus.open(out)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they do not outlive it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    finished = {p: p.stat().st_mtime_ns for p in out.glob("*/part-*.json")}
    (out / "train" / ".part-000099.arrow.1.tmp").write_bytes(b"half")  # as a kill may leave it
    made = []
    real = pool.do_unit

    def counted(settings, tokenizer, unit, *rest):
        made.append(out / unit.split / Path(part_name(unit.index)).with_suffix(".json"))
        return real(settings, tokenizer, unit, *rest)

    monkeypatch.setattr(pool, "do_unit", counted)
    settings = config(path, chunk_bytes=2048)
    build_corpus(settings, out, tokenizer)
    assert not finished.keys() & set(made)
    assert all(p.stat().st_mtime_ns == t for p, t in finished.items())
    assert f"{len(finished)} finished parts are kept" in capsys.readouterr().err
    build_corpus(settings, tmp_path / "whole", tokenizer)
    assert tree(out) == tree(tmp_path / "whole")
    assert len(made) > 20


def test_parts_of_other_text_are_made_again(tmp_path, tokenizer):
    """A run stopped half-way, its source corrected, then run again."""
    path = tmp_path / "text.txt"
    documents = make_documents(60)
    settings = config(path, chunk_bytes=1024, heldout_fraction=0.0)
    path.write_text("\n\n".join(documents))
    build_corpus(settings, tmp_path / "out", tokenizer)
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "train" / "part-000001.arrow").write_bytes(b"damaged")
    path.write_text("\n\n".join([*documents[:30], "Corrected.", *documents[35:50]]))
    build_corpus(settings, tmp_path / "out", tokenizer)
    build_corpus(settings, tmp_path / "whole", tokenizer)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_workers_import_neither_torch_nor_transformers():
    script = "import stages.corpus.worker, data.docstrings, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not {"torch", "transformers", "datasets"}.intersection(done.stdout.split())


def test_dead_worker_is_one_line(tmp_path, text, tokenizer, monkeypatch):
    monkeypatch.setattr(pool, "start_process", os._exit)  # an initializer that ends the process
    settings = config(text, chunk_bytes=1024, workers=2)
    assert "must stay alive" in failure(settings, tmp_path / "out", tokenizer)
    monkeypatch.undo()
    build_corpus(settings, tmp_path / "out", tokenizer)


def test_config_replaced_by_worker_count_only_is_the_same_request(tmp_path, text, tokenizer):
    base = config(text)
    build_corpus(base, tmp_path / "out", tokenizer)
    build_corpus(replace(base, workers=2), tmp_path / "out", tokenizer)


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_real_text_and_tokenizer(tmp_path):
    source, teacher = SHARED / "corpus" / "wiki_valid_2MB.txt.xz", SHARED / "teacher"
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
