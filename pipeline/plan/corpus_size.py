"""How much text a project reads: counted in its corpus, estimated from a sample, or given."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.packing import pack_blocks, pack_lines
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.corpus.text.documents import Segment, iter_documents
from distilcache.stages.corpus.text.readers import Source
from distilcache.stages.corpus.text.sources import TEXT_FORMATS, resolve_sources
from distilcache.stages.corpus.text.streams import open_bytes
from distilcache.stages.corpus.tokenise import open_tokenizer, tokenise
from distilcache.stages.models.piece_tokenizer import PieceTokenizer, cutter
from distilcache.stages.models.pieces import CutFirst
from distilcache.stages.models.special_tokens import role_tokens, special_ids
from distilcache.stages.models.tokenizers import load_tokenizer

SAMPLE_BYTES = 1 << 22
"""Text that is tokenised if there is no corpus yet."""
READ_BYTES = 1 << 26
"""Text that is read of each source to estimate its size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The training split, made or to be made."""

    tokens: float
    sequences: float
    source: str
    """Where the figures come from, for people."""

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
    if recipe.has_corpus:
        train = Corpus.open(recipe.corpus_dir).manifest.splits["train"]
        source = f"counted in {recipe.corpus_dir}"
        return Text(tokens=train["tokens"], sequences=train["sequences"], source=source)
    return _sampled(recipe)


def _sampled(recipe: Recipe) -> Text:
    """Tokenise the start of the sources and scale it to their size."""
    config = recipe.corpus
    if recipe.tokenizer == "train":
        raise UserError(
            "plan: corpus must be made first where its tokenizer is trained on it, got none in "
            f"{recipe.home}; run distilcache corpus, or pass --tokens N"
        )
    sources = resolve_sources(config.sources, recipe.needs)
    revision = recipe.tokenizer_revision
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.needs, revision=revision)
    texts, whole = _sample(config, sources)
    sample = sum(len(text.encode()) for text in texts)
    kept = 1.0 if config.heldout_sources else 1.0 - config.heldout_fraction
    total = sample * kept if whole else sum(_text_bytes(config, s) for s in sources) * kept
    if config.max_bytes:
        total = min(total, config.max_bytes)
    roles = role_tokens(tokenizer)
    opened: Any = open_tokenizer(tokenizer.backend_tokenizer.to_str(), roles)
    if isinstance(tokenizer, PieceTokenizer):
        opened = CutFirst(opened, cutter(tokenizer.slow, roles))
    flat, lengths = tokenise(opened, texts, np.uint32)
    special: dict[str, int] = special_ids(tokenizer)
    shape: dict[str, Any] = {"max_length": config.max_length, "min_tokens": config.min_tokens}
    shape |= {"cls_id": special["cls"], "sep_id": special["sep"]}
    if config.packing == "lines":
        packed = pack_lines(flat, lengths, unk_id=special["unk"], **shape)
    else:
        packed = pack_blocks(flat, lengths, keep_tail=True, **shape)
    if not len(packed.lengths):
        raise UserError("plan: sources must hold at least one sequence, got less text")
    scale = total / sample
    return Text(
        tokens=len(packed.ids) * scale,
        sequences=len(packed.lengths) * scale,
        source=f"estimated: {sample / 1e6:.1f} MB tokenised of {total / 1e6:,.1f} MB of text",
    )


def _sample(config: CorpusConfig, sources: list[Source]) -> tuple[list[str], bool]:
    """Texts up to ``SAMPLE_BYTES``, and whether these are all."""
    texts: list[str] = []
    size = 0
    for text, data, _ in _documents(config, sources):
        texts += text.split("\n") if config.packing == "lines" else (text,)
        size += len(data)
        if size >= SAMPLE_BYTES:
            return texts, False
    return texts, True


def _documents(config: CorpusConfig, sources: list[Source]) -> Iterator[Segment]:
    found = iter_documents(sources, config.reading(lambda _: None))
    with closing(found):
        yield from found


def _text_bytes(config: CorpusConfig, source: Source) -> float:
    """Bytes of text in one source, from the size of the file and the text at its start."""
    if source.kind == "hf":
        raise UserError(
            f"plan: size of {source.name} must be known, got a data set of the hub, whose size is "
            "not known; pass --tokens N"
        )
    counted = _Counted(source.filesystem)
    watched = source
    if source.kind in (*TEXT_FORMATS.values(), "arrow"):
        watched = replace(source, filesystem=counted)
    size, rows, seen = 0, 0, (0, 0)
    position = counted.position
    if source.kind == "parquet":
        config = replace(config, document="blank_line")  # a row is one, whatever its lines
    for _, data, begins in _documents(config, [watched]):
        if counted.position != position:  # all bytes read before have been returned as text by now
            seen, position = (size, position), counted.position
        size += len(data)
        rows += begins
        if size >= READ_BYTES and source.kind != "docstrings":
            break
    else:
        return size
    if source.kind == "parquet":
        return size / rows * _parquet_rows(source)
    text_size, file_size = seen if all(seen) else (size, counted.position)
    if (stored := source.size()) is None:
        raise UserError(
            f"plan: size of {source.name} must be known, got none from its server; pass --tokens N"
        )
    return text_size / file_size * stored


class _Counted:
    """A file system that knows how far its last opened file has been read.

    So the size of compressed text can be related to that of the file.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem
        self._file: Any = None
        self.position = 0

    def open(self, path: str, _: str) -> "_Counted":
        self._file = open_bytes(path, self._filesystem)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> Any:
        data = self._file.read(size)
        self.position = self._file.tell()
        return data


def _parquet_rows(source: Source) -> int:
    import pyarrow.parquet as pq

    with closing(open_bytes(source.path, source.filesystem)) as raw:
        return int(pq.ParquetFile(raw).metadata.num_rows)
