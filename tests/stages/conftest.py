"""A tiny corpus, a random BERT teacher and caches of it, made by stage one itself."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders import (
    WORDS,
    build_corpus_of,
    once,
    random_texts,
    run_stage_one,
    save_random_bert,
)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A finished corpus with its own small vocabulary, 16 tokens per sequence."""
    texts = random_texts(60, 20, 60, WORDS[:9])
    folder = tmp_path_factory.mktemp("tiny")
    return build_corpus_of(texts, folder, "train", vocab_size=300, block_sequences=16)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory, tiny_corpus) -> Path:
    """A BERT of 2 layers x 32 with random weights and the corpus's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    return save_random_bert(
        folder, tiny_corpus / "tokenizer", layers=2, ffn=48, positions=24, bias=0.0
    )


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory, tiny_corpus, tiny_teacher) -> Callable[..., Path]:
    """``tiny_cache(mask_only=..., top_k=..., ...)``: a cache with these settings, made once."""

    def make(**settings) -> Path:
        out = tmp_path_factory.mktemp("tiny") / "cache"
        settings = {"rounds": 2, "blocks_per_shard": 4, **settings}
        return run_stage_one(out, tiny_corpus, tiny_teacher, **settings)

    return once(make)
