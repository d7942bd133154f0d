"""Documents, a tokenizer for them, and looks at the corpora that are made of them."""

import random
from pathlib import Path

import numpy as np
import pytest

from distilcache.data.corpus.store import Corpus
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.models.wordpiece import train_wordpiece
from tests.refusals import refused


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


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file, by its path in the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def failure(*args, **options) -> str:
    """The one line that a build ends with."""
    return refused(build_corpus, *args, **options)
