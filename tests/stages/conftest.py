"""A tiny corpus, a random BERT teacher and caches of it, made by stage one itself."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import WORDS


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A finished corpus with its own small vocabulary, 16 tokens per sequence."""
    from stages.corpus.build import build_corpus
    from stages.corpus.config import CorpusConfig

    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    documents = [" ".join(words.choices(WORDS[:9], k=words.randint(20, 60))) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    config = CorpusConfig(
        sources=(str(folder / "text.txt"),),
        tokenizer="train",
        vocab_size=300,
        max_length=16,
        block_sequences=16,
        heldout_fraction=0.1,
        workers=1,
    )
    build_corpus(config, folder / "out", "train")
    return folder / "out"


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory, tiny_corpus) -> Path:
    """A BERT with random weights and the corpus's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = AutoTokenizer.from_pretrained(tiny_corpus / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=24,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.3,
        )
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory, tiny_corpus, tiny_teacher) -> Callable[..., Path]:
    """``tiny_cache(mask_only=..., top_k=..., ...)``: a cache with these settings, made once."""
    from data.masking import MaskingConfig
    from stages.teacher_cache.config import CacheConfig
    from stages.teacher_cache.run import build_cache

    made: dict[str, Path] = {}

    def make(**settings) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("cache") / "cache"
            config = CacheConfig(**{"rounds": 2, "blocks_per_shard": 4, **settings})
            build_cache(
                corpus_dir=tiny_corpus,
                out=made[key],
                teacher=None if config.mask_only else str(tiny_teacher),
                masking=MaskingConfig(probability=0.3),
                config=config,
                device="cpu",
                dtype="float32",
            )
        return made[key]

    return make
