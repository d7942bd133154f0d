"""Fixtures that every test may use: a tiny teacher, corpora and caches of it, ../shared."""

import gc
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.builders import (
    WORDS,
    build_corpus_of,
    once,
    random_texts,
    run_stage_one,
    save_random_bert,
)

ROOT = Path(__file__).resolve().parents[1]

# The library's profile for machines with other work: no deadline, and the same examples every time
# (``--hypothesis-profile default`` looks for others).
settings.load_profile("ci")

LONGEST = (
    "test_wheel.py", "test_tasks_run.py", "test_docs.py", "test_engines_local.py", "test_faults.py",
    "test_ranks.py", "test_ranks_command.py", "test_corpus_resume.py", "test_tasks_together.py",
    "test_sweep.py", "test_all_types.py", "test_student_families.py", "test_first_run.py",
    "test_trainer_resume.py",
)  # fmt: skip
"""Files of tests that take longest. They begin first, so that all workers end at one time."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small matrices on two contended cores: threads would only wait for each other.

    Processes that tests start inherit it, so that their sums have the same order of terms.
    """
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_stays():
    """Garbage is not looked for among what was imported: that took a fifth of all time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Shells start background jobs with Ctrl-C ignored, and what tests start would inherit it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real teacher and corpus."""
    folder = ROOT.parent / "shared"
    if not (folder / "teacher" / "model.safetensors").is_file():
        pytest.skip("needs the real teacher and corpus in ../shared")
    return folder


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory) -> Path:
    """A fast WordPiece tokenizer of about 120 ids."""
    from distilcache.stages.models.wordpiece import train_wordpiece

    folder = tmp_path_factory.mktemp("small") / "tokenizer"
    train_wordpiece([" ".join(WORDS)] * 20, 120).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory, small_tokenizer) -> Path:
    """A BERT of 3 layers x 32 with random weights."""
    folder = tmp_path_factory.mktemp("small") / "teacher"
    return save_random_bert(folder, small_tokenizer, layers=3, ffn=64, positions=32, bias=1.0)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory, small_tokenizer) -> Callable[..., Path]:
    """``small_corpus(packing=..., documents=..., block_sequences=...)``: made once per setting."""

    def make(documents: int = 60, seed: int = 0, **settings) -> Path:
        texts = random_texts(documents, seed=seed)
        settings = {"block_sequences": 8, **settings}
        return build_corpus_of(texts, tmp_path_factory.mktemp("small"), small_tokenizer, **settings)

    return once(make)


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory, small_corpus, small_teacher) -> Callable[..., Path]:
    """``small_cache(corpus={...}, masking={...}, top_k=..., ...)``: made once; do not change it."""

    def make(corpus=None, **settings) -> Path:
        out = tmp_path_factory.mktemp("small") / "cache"
        return build_small_cache(out, small_corpus(**(corpus or {})), small_teacher, **settings)

    return once(make)


@pytest.fixture(scope="session")
def build_cache_in() -> Callable[..., Path]:
    """``build_cache_in(out, corpus_dir, teacher_dir, masking={...}, ...)``: stage one, anew."""
    return build_small_cache


def build_small_cache(out: Path, corpus: Path, teacher: Path, **settings) -> Path:
    """Shards of two blocks, and a codec of few sequences."""
    small = {"blocks_per_shard": 2, "calibration_sequences": 24}
    return run_stage_one(out, corpus, teacher, **{**small, **settings})


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """``tree(folder)``: relative path to content hash of every file.

    The git revision is left out: it is recorded, and a commit may fall between two builds.
    """

    def hashes(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(content_of(path)).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def content_of(path: Path) -> bytes:
        raw = path.read_bytes()
        if path.name not in ("provenance.json", "manifest.json"):
            return raw
        try:
            values = json.loads(raw)
            values.pop("sha256", None)  # of the file with its revision
            values.get("provenance", values)["environment"].pop("git_revision")
        except (ValueError, KeyError):  # a test has damaged it
            return raw
        return json.dumps(values).encode()

    return hashes
