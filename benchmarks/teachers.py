"""Teachers of a given size with random weights; corpora and caches of benchmarks.

All are made once in a work folder. The stages refuse a folder that was made from another text, with
another teacher or with other settings.
"""

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from benchmarks.common import Command, excerpt
from distilcache.data.cache.cache import Cache
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.models.wordpiece import train_wordpiece
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.run import build_cache

ROOT = Path(__file__).resolve().parents[1]
CHARACTERS = 5
"""Of English text per WordPiece token, with some room (measured on Wikipedia: 4.6)."""
SPARE = 16
"""Sequences' worth of text that a corpus has beyond those asked for."""


def teacher_option(name: str, size: str = "") -> Callable[[Command], Command]:
    """An option for the size of :func:`chosen_teacher`."""
    return click.option(
        name,
        default=size,
        metavar="LAYERSxWIDTH",
        show_default=bool(size) or "--teacher itself",
        help='Random teacher of this size with the tokenizer of --teacher; "": --teacher itself.',
    )


def chosen_teacher(folder: Path, size: str, teacher: Path) -> Path:
    """A random teacher of this size; the given one where the size is empty."""
    return random_teacher(folder, size, teacher) if size else teacher


def random_teacher(folder: Path, size: str, tokenizer: Path) -> Path:
    """A BERT of ``LAYERSxWIDTH`` with random weights and a given tokenizer."""
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
    folder: Path,
    text: Path,
    tokenizer: Path,
    sequences: int,
    block_sequences: int,
    length: int = 128,
    skip: int = 0,
) -> Path:
    """A corpus of at least this many sequences.

    Args:
        folder: Where text and corpus are written.
        text: Taken from its beginning.
        tokenizer: A checkpoint.
        sequences: How many.
        block_sequences: Sequences per block.
        length: Tokens per sequence.
        skip: Sequences' worth of text that is left out at the beginning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "text.txt"
    first, last = (n * length * CHARACTERS for n in (skip, skip + sequences + SPARE))
    source.write_text(excerpt(text, last)[first:])
    config = CorpusConfig(
        sources=(str(source),),
        max_length=length,
        heldout_fraction=0.0,
        block_sequences=block_sequences,
        workers=1,
    )
    build_corpus(config, folder / "corpus", str(tokenizer))
    return folder / "corpus"


def make_cache(
    out: Path,
    corpus: Path,
    teacher: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    masking: MaskingConfig | None = None,
    **settings: Any,
) -> Cache:
    """A cache with the default settings of section ``[cache]`` but for those given."""
    config = CacheConfig(**settings)
    build = Build(
        corpus_dir=corpus,
        out=out,
        teacher=None if config.mask_only else str(teacher),
        masking=masking or MaskingConfig(),
        config=config,
        device=device,
        dtype=dtype,
    )
    return build_cache(build)


def rehearsal_data(folder: Path) -> Path:
    """What ``gpu.py`` reads, in small: a random teacher, this project's documents, three tasks."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    train_wordpiece([text], 400).save_pretrained(folder / "words")
    made = random_teacher(folder, "2x32", folder / "words")
    if not (folder / "teacher").exists():
        made.rename(folder / "teacher")
    (folder / "corpus").mkdir(exist_ok=True)
    for name, part in (("train_10MB", text), ("valid_2MB", text[:20_000][::-1])):
        with lzma.open(folder / "corpus" / f"wiki_{name}.txt.xz", "wt", encoding="utf-8") as file:
            file.write(part)
    lines = [line.replace("\t", " ") for line in text.splitlines() if len(line) > 40][:64]
    rows = list(enumerate(zip(lines, lines[1:], strict=False)))
    tasks = {
        "SST-2": ["sentence\tlabel", *(f"{a}\t{i % 2}" for i, (a, _) in rows)],
        "RTE": [
            "index\tsentence1\tsentence2\tlabel",
            *(f"{i}\t{a}\t{b}\t{('entailment', 'not_entailment')[i % 2]}" for i, (a, b) in rows),
        ],
        "STS-B": [f"g\tf\t2012\t{i}\tn\tn\t{a}\t{b}\t{i % 6}.000" for i, (a, b) in rows],
    }
    for name, found in tasks.items():
        (folder / "glue" / name).mkdir(parents=True, exist_ok=True)
        for split in ("train", "dev"):
            (folder / "glue" / name / f"{split}.tsv").write_text("\n".join(found) + "\n")
    return folder
