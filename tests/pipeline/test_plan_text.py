"""How much text a plan counts with: that of real corpora, and what is masked in it."""

import gzip
import json
import lzma
import random
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.pipeline.flow import make_corpus
from distilcache.pipeline.plan import source_bytes as sizes
from distilcache.pipeline.plan.corpus_size import text_of
from distilcache.pipeline.plan.measure import _corpus
from distilcache.pipeline.plan.shapes import teacher_shape
from distilcache.pipeline.plan.size import formula_size
from distilcache.pipeline.recipe import load_recipe, override_recipe
from tests.builders import WORDS, build_corpus_of, random_texts, run_stage_one
from tests.command_line import refusal, run


def all_of(recipe_file, source, *settings):
    """The recipe with this source, of which nothing is held out."""
    own = [f"corpus.sources={source}", "corpus.heldout_fraction=0.0"]
    return load_recipe(recipe_file, [*own, *settings])


def test_text_is_counted_or_estimated(with_corpus, tmp_path):
    recipe = load_recipe(with_corpus)
    made = text_of(recipe, None)
    train = Corpus.open(tmp_path / "p/corpus").manifest.splits["train"]
    assert (made.tokens, made.sequences) == (train["tokens"], train["sequences"])
    assert made.source.startswith("counted in ")
    shutil.rmtree(tmp_path / "p/corpus")
    guessed = text_of(recipe, None)
    assert guessed.source.startswith("estimated: ")
    assert guessed.tokens == pytest.approx(train["tokens"], rel=0.15)  # held out by chance


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        *((kind, "blocks") for kind in ("txt", "txt.xz", "jsonl.gz", "csv", "parquet", "arrow")),
        ("txt", "lines"),
        ("parquet", "lines"),
    ],
)
def test_large_sources_are_sized_by_their_start(kind, packing, recipe_file, tmp_path, monkeypatch):
    texts = random_texts(2500, 400, 400, WORDS[:9])
    if packing == "lines":
        texts = [text.replace(" amber ", " amber\n") for text in texts]
    path = tmp_path / f"big.{kind}"
    lines = "\n".join(json.dumps({"text": d}) for d in texts)
    if kind == "txt":
        path.write_text("\n\n".join(texts))
    elif kind == "txt.xz":
        path.write_bytes(lzma.compress("\n\n".join(texts).encode()))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "csv":
        path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    elif kind == "arrow":
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        pq.write_table(pa.table({"text": texts}), path)
    monkeypatch.setattr(sizes, "SAMPLE_BYTES", 1 << 17)
    settings = [f"corpus.sources={path}", "corpus.heldout_fraction=0.0"]
    settings.append(f"corpus.packing={packing}")
    recipe = load_recipe(recipe_file, settings)
    whole = text_of(recipe, None)
    assert "estimated: 0.1 MB tokenised of 6." in whole.source
    monkeypatch.setattr(sizes, "READ_BYTES", 3 << 20)
    assert text_of(recipe, None).tokens == pytest.approx(whole.tokens, rel=0.03)
    limited = load_recipe(recipe_file, [*settings, "corpus.max_bytes=1000000"])
    part = text_of(limited, None).tokens
    assert part == pytest.approx(whole.tokens * 1e6 / sum(map(len, texts)), rel=0.02)


def test_a_text_shorter_than_a_sequence_is_planned_as_it_is_packed(recipe_file, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(" ".join(WORDS[:3]))
    settings = [f"corpus.sources={path}", "corpus.heldout_fraction=0.0", f"root={tmp_path}"]
    recipe = load_recipe(recipe_file, settings)
    guessed = text_of(recipe, None)
    train = make_corpus(recipe).manifest.splits["train"]
    assert (guessed.tokens, guessed.sequences) == (train["tokens"], 1)


def write_files(folder, texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)
    return folder


def test_a_folder_is_sized_as_one_file_of_its_text(recipe_file, tmp_path, monkeypatch):
    """Some of its files may be empty, as for the corpus itself."""
    monkeypatch.setattr(sizes, "SAMPLE_BYTES", 1 << 17)
    parts = ["\n\n".join(random_texts(1200, 400, 400, WORDS[:9], seed)) for seed in range(3)]
    folder = write_files(tmp_path / "texts", [parts[0], "", *parts[1:], "\n \n"])
    (tmp_path / "one.txt").write_text("\n\n".join(parts))
    one = text_of(all_of(recipe_file, tmp_path / "one.txt"), None)
    assert one.tokens > 5e5
    for source in (folder, folder / "*.txt"):
        found = text_of(all_of(recipe_file, source), None)
        assert found.tokens == pytest.approx(one.tokens, rel=0.02)
    for path in folder.iterdir():
        path.write_text("\n")
    line = refusal(run("plan", "--recipe", recipe_file, "--set", f"corpus.sources={folder}"))
    assert "must have text, got an empty file" in line


def test_of_many_files_a_few_are_read(recipe_file, tmp_path, monkeypatch):
    texts = [text * 8 for text in random_texts(60, 80, 120, WORDS[:9])]
    recipe = all_of(recipe_file, write_files(tmp_path / "texts", texts))
    monkeypatch.setattr(sizes, "READ_BYTES", 40_000)
    opened = []
    plain = sizes.open_bytes
    monkeypatch.setattr(sizes, "open_bytes", lambda *file: opened.append(file[0]) or plain(*file))
    found = text_of(recipe, None)
    mean = sum(map(len, texts)) / len(texts)
    assert len(opened) == 40_000 // int(mean) < 10
    assert max(opened) > str(tmp_path / "texts" / "045.txt")
    assert found.tokens == pytest.approx(text_of_all(recipe, tmp_path), rel=0.03)


def text_of_all(recipe, folder):
    """Tokens of the corpus that is really made."""
    recipe = override_recipe(recipe, [f"root={folder}", "name=made"])
    return make_corpus(recipe).manifest.splits["train"]["tokens"]


def test_the_sample_is_of_several_sources(recipe_file, tmp_path, monkeypatch):
    """Each in proportion: words of the vocabulary here, letters there."""
    letters = random.Random(0)
    spelt = [" ".join(letters.choices("abcdefgh", k=200)) for _ in range(400)]
    plain = "\n\n".join(random_texts(300, 100, 100, WORDS[:9]))
    folder = write_files(tmp_path / "texts", [plain, "\n\n".join(spelt)])
    monkeypatch.setattr(sizes, "SAMPLE_BYTES", 1 << 16)
    recipe = all_of(recipe_file, folder)
    assert text_of(recipe, None).tokens == pytest.approx(text_of_all(recipe, tmp_path), rel=0.05)


@pytest.mark.parametrize("nothing", ["", None])
def test_rows_without_text_count_as_rows(recipe_file, tmp_path, monkeypatch, nothing):
    texts = random_texts(6000, 80, 80, WORDS[:9])
    texts[::3] = [nothing] * 2000
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    recipe = all_of(recipe_file, tmp_path / "rows.parquet", "corpus.on_bad_row=skip")
    monkeypatch.setattr(sizes, "READ_BYTES", 1 << 18)
    monkeypatch.setattr(sizes, "SAMPLE_BYTES", 1 << 17)
    assert text_of(recipe, None).tokens == pytest.approx(text_of_all(recipe, tmp_path), rel=0.03)


def test_a_corpus_of_other_settings_is_not_counted(with_corpus, tmp_path):
    asked = load_recipe(with_corpus, ["corpus.max_length=32", "corpus.heldout_fraction=0.2"])
    found = text_of(asked, None)
    other = f"; {tmp_path / 'p/corpus'} has another heldout_fraction, max_length"
    assert found.source.startswith("estimated: ")
    assert found.source.endswith(other)
    assert found.length == 32
    made = _corpus(asked, 2, tmp_path / "measured").manifest
    assert made.max_length == 32
    same = load_recipe(with_corpus, ["corpus.workers=2", f"corpus.sources={tmp_path}/*.txt"])
    assert text_of(same, None).source.startswith("counted in ")
    assert _corpus(same, 2, tmp_path / "measured").path == tmp_path / "p/corpus"
    trained = load_recipe(with_corpus, ["corpus.max_length=32", "corpus.tokenizer=train"])
    assert "to be trained" not in text_of(trained, None).source
    again = _corpus(trained, 2, tmp_path / "trained").manifest
    assert again.tokenizer_sha256 == made.tokenizer_sha256


@pytest.mark.parametrize("probability", [0.15, 0.1])
def test_masked_positions_of_uneven_sequences(recipe_file, tmp_path, small_teacher, probability):
    """Each sequence has its own number of them, at least one: as a real cache counts them."""
    lines = ["\n".join(random_texts(400, 2, 9))]
    settings = {"packing": "lines", "max_length": 32, "heldout_fraction": 0.0}
    corpus = build_corpus_of(lines, tmp_path, small_teacher, **settings)
    masking = {"probability": probability}
    path = run_stage_one(tmp_path / "cache", corpus, small_teacher, masking=masking, mask_only=True)
    totals = Cache.open(path).manifest.totals
    recipe = all_of(
        recipe_file,
        tmp_path / "text.txt",
        "corpus.packing=lines",
        "corpus.max_length=32",
        "corpus.block_sequences=512",
        f"masking.probability={probability}",
    )
    shutil.copytree(corpus, tmp_path / "p" / "corpus")
    real = totals["masked"] / totals["tokens"]
    counted = text_of(recipe, None)
    shutil.rmtree(tmp_path / "p")
    guessed = text_of(recipe, None)
    for text, rel in ((counted, 1e-9), (guessed, 0.02)):
        size = formula_size(recipe, teacher_shape(recipe), text)
        assert size.masked == pytest.approx(real, rel=rel)
    plain = formula_size(recipe, teacher_shape(recipe), replace(counted, masked=0.0))
    assert plain.masked != pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("packing", ["blocks", "lines"])
def test_a_tokenizer_that_is_yet_to_be_trained(tmp_path, packing):
    texts = random_texts(500, 20, 40)
    (tmp_path / "text.txt").write_text("\n".join(texts))
    settings = [f"corpus.sources={tmp_path}/text.txt", f"corpus.packing={packing}"]
    settings += [f"root={tmp_path}", "corpus.heldout_fraction=0.0"]
    found = text_of(load_recipe("demo", settings), None)
    assert found.tokens == pytest.approx(sum(map(len, texts)) / 4, rel=0.1)
    assert found.source == (
        "estimated: 4 bytes a token, as its tokenizer is to be trained, of 0.1 MB of text"
    )
    options = [part for setting in settings for part in ("--set", setting)]
    done = run("plan", "--recipe", "demo", *options)
    assert done.exit_code == 0, done.output
    assert "tokens" in done.stdout
    assert not (tmp_path / "demo").exists()
