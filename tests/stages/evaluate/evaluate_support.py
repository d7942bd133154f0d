"""A held-out split in memory, models for it, and their evaluation."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distilcache.data.corpus.store import Corpus
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.evaluate.config import EvaluateConfig
from distilcache.stages.evaluate.run import ModelEntry, evaluate_models
from tests.stages.models.families_support import make_model

VOCAB = 100
LENGTH = 16
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
MASKING = MaskingConfig(seed=7)
QUICK = EvaluateConfig(sequences=24, batch_size=5, latency_repeats=2)


@dataclass
class MemorySplit:
    blocks: list[tuple[np.ndarray, np.ndarray]]

    @property
    def num_blocks(self):
        return len(self.blocks)

    @property
    def block_sequences(self):
        return np.array([len(lengths) for _, lengths in self.blocks], dtype=np.int64)

    def block(self, index):
        return self.blocks[index]


class MemoryCorpus:
    """The part of ``distilcache.data.corpus.store.Corpus`` that evaluation reads, without files."""

    masked = Corpus.masked

    def __init__(self, blocks, vocab_size=VOCAB):
        self.path = Path("corpus")
        self.token_counts = np.arange(vocab_size, dtype=np.int64)
        self.manifest = SimpleNamespace(
            vocab_size=vocab_size,
            max_length=LENGTH,
            special_ids=SPECIAL,
            all_special_ids=tuple(SPECIAL.values()),
            fingerprint="f" * 64,
            splits={"heldout": {}} if blocks is not None else {"train": {}},
        )
        self._split = MemorySplit(blocks or [])

    def split(self, name):
        assert name == "heldout"
        return self._split


def random_blocks(sizes=(9, 11, 10), *, full=False, seed=0):
    """Blocks of [CLS] ... [SEP] sequences, of mixed lengths unless ``full``."""
    rng = np.random.default_rng(seed)
    blocks = []
    for size in sizes:
        lengths = np.full(size, LENGTH) if full else rng.integers(6, LENGTH + 1, size)
        rows = [np.r_[2, rng.integers(5, VOCAB, n - 2), 3] for n in lengths]
        blocks.append((np.concatenate(rows).astype(np.uint16), lengths.astype(np.int64)))
    return blocks


def model(kind, vocab=VOCAB, positions=LENGTH):
    """With random weights."""
    return make_model(kind, vocab, layers=1, max_position_embeddings=positions)


def save(model, path):
    model.save_pretrained(path)
    return path


@pytest.fixture
def open_corpus(monkeypatch):
    """Let ``Corpus.open`` answer with a corpus in memory."""

    def install(corpus):
        monkeypatch.setattr("distilcache.stages.evaluate.run.Corpus.open", lambda path: corpus)
        return corpus

    return install


@pytest.fixture
def models(tmp_path):
    return [
        ModelEntry("teacher", "teacher", save(model("bert"), tmp_path / "teacher")),
        ModelEntry("1x32", "student", save(model("distilbert"), tmp_path / "student")),
    ]


def evaluate(entries, config=QUICK, masking=MASKING):
    return evaluate_models(entries, Path("corpus"), masking, config, "cpu", "float32")


def plain_ece(confidence, hits, bins=15):
    """Mean over bins of |accuracy - confidence|, weighted by their share (Guo et al. 2017)."""
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = hits[inside].double().mean() - confidence[inside].double().mean()
            total += float(inside.double().mean() * gap.abs())
    return total
