"""A finished cache for notebooks and scripts: totals, provenance, blocks, batches.

Shapes: ``B`` sequences, ``L`` positions, ``N`` positions with the teacher's distribution,
``H`` positions with hidden states, ``V`` vocabulary, ``D`` hidden width.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.schema import Encoding
from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.codecs.lm_head import LMHead
from distilcache.data.distribution import Distribution
from distilcache.data.errors import as_arguments, require
from distilcache.data.loader.batch import batch_of
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.loader.window import Plan, in_order, join, read_sequences
from distilcache.data.predictions import Predictions

KINDS = ("torch", "numpy")


class Block:
    """One block: its sequences, and the teacher's predictions at N of their positions.

    ``block[name]`` is an array as in a training batch, see ``CachedBatches``; the properties and
    methods are more convenient. Arrays are torch tensors or numpy arrays, see ``OpenCache.block``.
    """

    def __init__(self, source: "OpenCache", number: int, as_: str) -> None:
        self.number = number
        """Its number, counted over all rounds."""
        entry = source.cache.entry(number)
        self.round, self.shard = entry.round, entry.shard
        self._source = source
        self._as = as_
        encoding = source.encoding
        layers = tuple(stored.layer for stored in encoding.hidden)
        plan = Plan(
            encoding,
            encoding.best_signal,
            layers,
            restrict_ce_to_mask=False,
            relation=encoding.relation is not None,
        )
        size = entry.sequences
        read = read_sequences(source.cache.read_block(number), 0, size, plan)
        self._batch = batch_of(in_order(join([read])), 0, size, plan)

    def __getitem__(self, name: str) -> Any:
        """One of the arrays of ``keys()``."""
        return self._given(self._batch[name])

    def keys(self) -> list[str]:
        """Names for ``block[name]``."""
        return list(self._batch)

    def __len__(self) -> int:
        """Sequences B."""
        return len(self._batch["input_ids"])

    def __repr__(self) -> str:
        """One line."""
        rows = len(self._batch.get("ce_index", ()))
        return (
            f"<block {self.number} of round {self.round}: {len(self)} sequences, "
            f"{len(self._batch['labels'])} masked positions, the teacher at {rows}>"
        )

    @property
    def input_ids(self) -> Any:
        """Token ids with masks applied, int64 [B, L]."""
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        """1 at tokens, 0 at padding, int64 [B, L]."""
        return self._given(self._batch["attention_mask"])

    @property
    def labels(self) -> Any:
        """The original ids of the masked tokens, -100 elsewhere, int64 [B, L]."""
        labels = torch.full_like(self._batch["input_ids"], -100)
        labels.view(-1)[self._batch["masked_index"]] = self._batch["labels"]
        return self._given(labels)

    @property
    def positions(self) -> Any:
        """Sequence and position of each of the N rows of ``teacher_log_probs``, int64 [N, 2]."""
        width = self._batch["input_ids"].shape[1]
        rows = self._predictions.positions
        return self._given(torch.stack([rows // width, rows % width], 1))

    def text(self, sequence: int, original: bool = False) -> str:
        """A sequence as text.

        Args:
            sequence: Its number in the block.
            original: Show the original tokens in place of the masks.
        """
        ids = self._batch["input_ids"][sequence].clone()
        if original:
            labels = torch.from_numpy(np.array(self.labels))[sequence]
            ids[labels != -100] = labels[labels != -100]
        there = torch.from_numpy(np.array(self.attention_mask))[sequence] > 0
        text: str = self._source.tokenizer.decode(ids[there].tolist(), skip_special_tokens=False)
        return text

    def hidden_states(self, layer: int = -1) -> Any:
        """The teacher's hidden states at the positions ``hidden_index``, float32 [H, D].

        Args:
            layer: A stored layer; -1: the last.

        Raises:
            UserError: The cache does not store this layer.
        """
        decoder = self._source.decoders.get(layer) or self._source.cache.teacher.hidden_decoder(
            layer
        )
        with torch.no_grad():
            return self._given(decoder(self._batch))

    def teacher_log_probs(self, temperature: float = 1.0, rows: Any = slice(None)) -> Any:
        """The teacher's log probabilities over the vocabulary, float32 [N, V].

        The LM head computes them from the stored hidden states (replay); stored logits replace
        those of the replay. Row n belongs to ``positions[n]``.

        Args:
            temperature: T, above 0. At 1 and at the temperatures of the cache the result is most
                accurate: the mass of the stored logits is known, and the bias of codes corrected.
            rows: Slice or index of some of the N rows. All rows take N x V x 4 bytes.

        Raises:
            UserError: The cache stores no hidden states of the last layer.
        """
        return self._given(self._predictions.log_probs(temperature, rows))

    def top_tokens(
        self, k: int = 5, temperature: float = 1.0, rows: Any = slice(None)
    ) -> list[list[tuple[str, float]]]:
        """The teacher's likeliest tokens with their probabilities, row by row.

        Args:
            k: Number of tokens, 1 or more; fewer are given where there are fewer: in the
                vocabulary, or among the stored ones without hidden states.
            temperature: T, above 0; without hidden states one of the cache.
            rows: Slice or index of some of the N rows.

        Raises:
            UserError: k or T is none of these.
        """
        ids, log_p = self._predictions.likeliest(k, temperature, rows)
        name = self._source.tokenizer.id_to_token
        return [
            [(str(name(i)), p) for i, p in zip(*row, strict=True) if p > 0]
            for row in zip(ids.tolist(), log_p.exp().tolist(), strict=True)
        ]

    def _given(self, tensor: Tensor) -> Any:
        return tensor if self._as == "torch" else tensor.numpy()

    @cached_property
    def _predictions(self) -> Predictions:
        return Predictions(self._source.distribution, self._batch)


class OpenCache:
    """A finished teacher cache, open for reading; made by ``distilcache.open_cache``.

    ``len(cache)`` is the number of blocks of all rounds; iterating yields them in order.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        """The cache itself, for programs that need the stored columns."""

    @property
    def path(self) -> Path:
        """Its folder; of a cache under a URL, the local copy of its small files."""
        return self.cache.path

    @property
    def encoding(self) -> Encoding:
        """What the blocks hold: temperatures, stored logits, hidden layers, positions."""
        return self.cache.encoding

    @property
    def totals(self) -> dict[str, Any]:
        """Counts: shards, blocks, sequences, tokens, masked, positions, bytes, column_bytes."""
        return dict(self.cache.manifest.totals)

    @property
    def provenance(self) -> dict[str, Any]:
        """What it was made from: ``identity`` (teacher, corpus, settings), ``environment``."""
        return dict(self.cache.manifest.provenance)

    @property
    def rounds(self) -> int:
        """Number of maskings of the corpus."""
        return self.cache.manifest.rounds

    def __len__(self) -> int:
        """Number of blocks of all rounds."""
        return self.cache.num_blocks

    def __iter__(self) -> Iterator[Block]:
        """All blocks as torch tensors."""
        return self.blocks()

    def __repr__(self) -> str:
        """One line."""
        totals = self.totals
        return (
            f"<cache {self.path}: {totals['tokens']:,} tokens in {totals['sequences']:,} "
            f"sequences, {self.rounds} round{'s' * (self.rounds > 1)}, "
            f"{totals['bytes'] / totals['tokens']:.1f} bytes per token>"
        )

    def block(self, number: int, as_: str = "torch") -> Block:
        """One block by its number, counted over all rounds.

        Args:
            number: From 0; a negative number counts from the end.
            as_: Type of its arrays: ``torch`` or ``numpy``.

        Raises:
            UserError: There is no such block, or it is damaged.
        """
        require(as_ in KINDS, f"cache: as_ must be 'torch' or 'numpy', got {as_!r}")
        size = len(self)
        require(-size <= number < size, f"cache: block must be below {size}, got {number}")
        return Block(self, number % size, as_)

    def blocks(self, round: int | None = None, as_: str = "torch") -> Iterator[Block]:
        """All blocks in order; each is read when it is needed.

        Args:
            round: Only this round; None: all rounds.
            as_: Type of their arrays: ``torch`` or ``numpy``.
        """
        require(
            round is None or 0 <= round < self.rounds,
            f"cache: round must be below {self.rounds}, got {round}",
        )
        numbers = range(len(self)) if round is None else self.cache.round_range(round)
        return (self.block(number, as_) for number in numbers)

    def batches(self, batch_size: int = 32, seed: int = 0, **options: Any) -> CachedBatches:
        """Shuffled batches as training reads them, see ``CachedBatches``.

        Args:
            batch_size: Sequences per batch.
            seed: Seed of the order.
            options: More arguments of ``CachedBatches``; the default of ``signal`` is the best
                that is stored.
        """
        options = {"signal": self.encoding.best_signal, **options}
        with as_arguments():
            return CachedBatches(self.cache, batch_size=batch_size, seed=seed, **options)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The teacher's tokenizer."""
        return Tokenizer.from_file(str(self.cache.tokenizer_dir / "tokenizer.json"))

    @cached_property
    def distribution(self) -> Distribution:
        """How the stored signals give the teacher's distribution."""
        return Distribution(self.cache)

    @property
    def lm_head(self) -> LMHead:
        """The teacher's LM head: hidden states [N, D] to logits [N, V]."""
        return self.distribution.lm_head

    @cached_property
    def decoders(self) -> dict[int, HiddenDecoder]:
        """The decoder of each stored layer, by its number; that of the last layer also by -1."""
        stored = {h.layer: self.cache.teacher.hidden_decoder(h.layer) for h in self.encoding.hidden}
        last = self.encoding.hidden_layer()
        return stored if last is None else {**stored, -1: stored[last.layer]}
