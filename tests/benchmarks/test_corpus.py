"""The corpus benchmark's arms on a little text."""

import shutil

import pytest
from transformers import AutoTokenizer

from benchmarks import corpus
from distilcache.stages.models.wordpiece import train_wordpiece

SENTENCE = "The old harbour lay quiet until spring, when every boat sailed north again.\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece([SENTENCE], 300).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text((SENTENCE * 5 + "\n") * 100)
    return path


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """No fresh process per arm: its imports would take longer than the arm."""

    def run_arm(name, work):
        cost = corpus.ARMS[name](work)
        shutil.rmtree(work.out, ignore_errors=True)
        return cost

    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # restored, whatever the arms set
    monkeypatch.setattr(corpus, "run_arm", run_arm)


def test_every_arm_is_measured(tmp_path, text, tokenizer, run_bench):
    found, _ = run_bench(corpus.main, teacher=tokenizer, text=text, megabytes=0.02, repetitions=1)
    assert found["megabytes"] == pytest.approx(0.02)
    assert found["megabytes_per_s"].keys() == corpus.ARMS.keys()
    assert all(rate > 0 for rates in found["megabytes_per_s"].values() for rate in rates)
    assert found["ratios"]["wall"].keys() == found["ratios"]["cpu"].keys()
    assert set(found["ratios"]["wall"]) >= {"ours / processes", "ours / threads", "ours-xz / naive"}
    assert not (tmp_path / "work").exists()


def test_the_naive_script_cuts_what_the_tokenizer_gives(tmp_path, text, tokenizer):
    import pyarrow as pa

    work = corpus.Work(text, tokenizer, tmp_path / "out", 1)
    assert corpus.naive(work).seconds > 0
    with pa.memory_map(str(tmp_path / "out" / "data.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all().column("input_ids").to_pylist()
    whole = AutoTokenizer.from_pretrained(tokenizer)(text.read_text().splitlines())["input_ids"]
    joined = [i for ids in whole for i in ids]
    assert [i for row in rows for i in row] == joined[: len(rows) * corpus.MAX_LENGTH]
    assert len(rows) == len(joined) // corpus.MAX_LENGTH > 50
