"""How much text a project reads: counted in its corpus, estimated from a sample, or given."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.packing import Array, pack_blocks, pack_lines
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.masks.masking import wanted_counts
from distilcache.pipeline.made import corpus_changes
from distilcache.pipeline.plan.source_bytes import sample_of, text_bytes
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.corpus.text.sources import resolve_sources
from distilcache.stages.corpus.tokenise import open_tokenizer, tokenise
from distilcache.stages.models.piece_tokenizer import PieceTokenizer, cutter
from distilcache.stages.models.pieces import CutFirst
from distilcache.stages.models.special_tokens import never_masked, role_tokens, special_ids
from distilcache.stages.models.tokenizers import load_tokenizer

BYTES_PER_TOKEN = 4
"""Of a tokenizer that is trained on the text: about those of English."""
READ_BLOCKS = 8
"""Blocks of a corpus that are read to count what can be masked."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The training split, made or to be made."""

    tokens: float
    sequences: float
    source: str
    """Where the figures come from, for people."""
    masked: float = 0.0
    """Masked positions per token; 0: those of a mean sequence."""

    @property
    def length(self) -> float:
        """Tokens of a mean sequence."""
        return self.tokens / self.sequences


def text_of(recipe: Recipe, tokens: float | None, made: Cache | None = None) -> Text:
    """Tokens and sequences of the recipe's training text.

    From the finished cache ``made`` that students read; from ``tokens`` if they are given; from the
    corpus if it exists; else from a sample of the sources.

    Raises:
        UserError: The sources cannot be read, or cannot be sized.
    """
    if made is not None:
        totals, rounds = made.manifest.totals, made.manifest.rounds
        return Text(
            tokens=totals["tokens"] / rounds,
            sequences=totals["sequences"] / rounds,
            source=f"counted in {recipe.cache_from}",
        )
    if tokens is not None:
        if not tokens > 0:
            raise UserError(f"plan: --tokens must be above 0, got {tokens:g}")
        sequences = max(1.0, tokens / recipe.corpus.max_length)
        return Text(tokens=tokens, sequences=sequences, source="as given")
    other = other_settings(recipe) if recipe.has_corpus else []
    if recipe.has_corpus and not other:
        return _counted(recipe)
    found = _sampled(recipe)
    if not other:
        return found
    source = f"{found.source}; {recipe.corpus_dir} has another {', '.join(other)}"
    return replace(found, source=source)


def other_settings(recipe: Recipe) -> list[str]:
    """Settings in which the project's corpus is not what the recipe says now, by name.

    Sources are left out, which may be the same text by other names.
    """
    left_out = ("tokenizer", "vocab_size", "sources", "heldout_sources")
    names = [name.removeprefix("corpus.") for name in corpus_changes(recipe, recipe.corpus_dir)]
    return [name for name in names if name not in left_out]


def _counted(recipe: Recipe) -> Text:
    """As in the project's corpus; what can be masked is counted in some of its blocks."""
    corpus = Corpus.open(recipe.corpus_dir)
    train, blocks = corpus.manifest.splits["train"], corpus.split("train")
    count = min(READ_BLOCKS, blocks.num_blocks)
    read = [blocks.block(i * blocks.num_blocks // count) for i in range(count)]
    ids, lengths = (np.concatenate(parts) for parts in zip(*read, strict=True))
    return Text(
        tokens=train["tokens"],
        sequences=train["sequences"],
        source=f"counted in {recipe.corpus_dir}",
        masked=_masked(recipe, ids, lengths, corpus.manifest.all_special_ids),
    )


def _masked(recipe: Recipe, ids: Array, lengths: Counts, special: tuple[int, ...]) -> float:
    """Masked positions per token of some sequences: flat ids, and tokens of each."""
    ordinary = np.add.reduceat(~np.isin(ids, special), np.cumsum(lengths) - lengths, dtype=np.int64)
    return int(wanted_counts(recipe.masking.probability, ordinary).sum()) / len(ids)


def _sampled(recipe: Recipe) -> Text:
    """Tokenise some of the text and scale it to all of it."""
    config = recipe.corpus
    kept = 1.0 if config.heldout_sources else 1.0 - config.heldout_fraction
    sources = resolve_sources(config.sources, recipe.needs)
    sized = text_bytes(config, sources, config.max_bytes / kept or math.inf)
    total = sum(size for _, size in sized) * kept
    if config.max_bytes:
        total = min(total, config.max_bytes)
    texts, sample = sample_of(config, sized)
    flat, lengths, special, never = _tokenised(recipe, texts)
    shape: dict[str, Any] = {"max_length": config.max_length, "min_tokens": config.min_tokens}
    shape |= {"cls_id": special["cls"], "sep_id": special["sep"]}
    if config.packing == "lines":
        packed = pack_lines(flat, lengths, unk_id=special["unk"], **shape)
    else:
        packed = pack_blocks(flat, lengths, keep_tail=True, **shape)
    if not len(packed.lengths):
        raise UserError("plan: sources must hold at least one sequence, got less text")
    scale = total / sample
    done = f"{sample / 1e6:.1f} MB tokenised"
    if tokenizer_of(recipe)[0] == "train":
        done = f"{BYTES_PER_TOKEN} bytes a token, as its tokenizer is to be trained,"
    return Text(
        tokens=len(packed.ids) * scale,
        sequences=len(packed.lengths) * scale,
        source=f"estimated: {done} of {total / 1e6:,.1f} MB of text",
        masked=_masked(recipe, packed.ids, packed.lengths, never),
    )


def tokenizer_of(recipe: Recipe) -> tuple[str, str]:
    """The tokenizer, and its revision; one that the project has trained is in its corpus."""
    if recipe.tokenizer == "train" and recipe.has_corpus:
        return str(recipe.corpus_dir / "tokenizer"), ""
    return recipe.tokenizer, recipe.tokenizer_revision


def _tokenised(
    recipe: Recipe, texts: list[str]
) -> tuple[Array, Counts, dict[str, int], tuple[int, ...]]:
    """Flat ids, tokens of each text, special ids by role, and all that are never masked.

    A tokenizer that is yet to be trained cuts texts into equal parts, of one id.
    """
    name, revision = tokenizer_of(recipe)
    if name == "train":
        sizes = np.array([len(text.encode()) for text in texts])
        lengths = (sizes + BYTES_PER_TOKEN // 2) // BYTES_PER_TOKEN
        return np.full(lengths.sum(), 2), lengths, {"cls": 0, "sep": 1, "unk": -1}, (0, 1)
    tokenizer = load_tokenizer(name, recipe.needs, revision=revision)
    roles = role_tokens(tokenizer)
    opened: Any = open_tokenizer(tokenizer.backend_tokenizer.to_str(), roles)
    if isinstance(tokenizer, PieceTokenizer):
        opened = CutFirst(opened, cutter(tokenizer.slow, roles))
    return *tokenise(opened, texts, np.uint32), special_ids(tokenizer), never_masked(tokenizer)
