"""Teachers of a given size with random weights, and corpora and caches of them.

What lies in a work folder is used again where it was made from the same text, teacher and settings;
stages refuse the rest, so that no arm reads what another run had asked for.
"""

from collections.abc import Callable
from pathlib import Path

import click
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from benchmarks.common import Command, excerpt
from distilcache.data.cache.cache import Cache
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.phases import Build
from distilcache.stages.teacher_cache.run import build_cache

CHARACTERS = 5
"""Of English text per WordPiece token, with some room."""


def teacher_option(name: str, size: str = "") -> Callable[[Command], Command]:
    """An option with the size of :func:`chosen_teacher`, and that size by default."""
    return click.option(
        name,
        default=size,
        metavar="LAYERSxWIDTH",
        show_default=bool(size) or "--teacher itself",
        help='Random teacher of this size with the tokenizer of --teacher; "": --teacher itself.',
    )


def chosen_teacher(folder: Path, size: str, teacher: Path) -> Path:
    """A random teacher of a size, made once in ``folder``; of none the given one."""
    return random_teacher(folder, size, teacher) if size else teacher


def random_teacher(folder: Path, size: str, tokenizer: Path) -> Path:
    """A BERT of ``LAYERSxWIDTH`` with random weights and a given tokenizer, made once."""
    path = folder / f"teacher_{size}"
    if (path / "config.json").exists():
        return path
    shape = StudentConfig(sizes=(size,)).parse(size)
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.ffn,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForMaskedLM(config)
    words.save_pretrained(path)
    model.save_pretrained(path)
    return path


def text_corpus(
    folder: Path, text: Path, tokenizer: Path, sequences: int, block_sequences: int
) -> Path:
    """A corpus of at least so many sequences of 128 tokens, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "text.txt"
    source.write_text(excerpt(text, sequences * 128 * CHARACTERS + 10_000))
    config = CorpusConfig(
        sources=(str(source),),
        heldout_fraction=0.0,
        block_sequences=block_sequences,
        workers=1,
    )
    build_corpus(config, folder / "corpus", str(tokenizer))
    return folder / "corpus"


def default_cache(
    folder: Path, corpus: Path, teacher: Path, *, device: str = "auto", dtype: str = "auto"
) -> Cache:
    """The default cache of a corpus, made once."""
    build = Build(
        corpus_dir=corpus,
        out=folder / "cache",
        teacher=str(teacher),
        masking=MaskingConfig(),
        config=CacheConfig(),
        device=device,
        dtype=dtype,
    )
    return build_cache(build)
