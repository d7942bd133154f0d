"""A finished cache as people read it: totals, provenance, blocks, batches."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from distilcache.data.block import Block, best_signal
from distilcache.data.cache.cache import Cache
from distilcache.data.cache.schema import Encoding
from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.codecs.lm_head import LMHead
from distilcache.data.errors import require
from distilcache.data.loader.dataset import CachedBatches

KINDS = ("torch", "numpy")


class OpenCache:
    """A finished teacher cache, open for reading; made by :func:`distilcache.open_cache`.

    ``len(cache)`` is the number of blocks of all rounds; iterating yields them in order.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        """The same cache with all of its parts, for programs that want the stored columns."""

    @property
    def path(self) -> Path:
        """Its folder; of a cache behind a URL, this machine's copy of the small files."""
        return self.cache.path

    @property
    def encoding(self) -> Encoding:
        """What the blocks hold and how: temperatures, stored logits, hidden layers, positions."""
        return self.cache.encoding

    @property
    def totals(self) -> dict[str, Any]:
        """Counts: shards, blocks, sequences, tokens, masked, positions, bytes, column_bytes."""
        return dict(self.cache.manifest.totals)

    @property
    def provenance(self) -> dict[str, Any]:
        """What it was made of: ``identity`` (teacher, corpus, settings), ``environment``."""
        return dict(self.cache.manifest.provenance)

    @property
    def rounds(self) -> int:
        """Maskings of the corpus."""
        return self.cache.manifest.rounds

    def __len__(self) -> int:
        """Blocks of all rounds."""
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
        """One block by its number over all rounds.

        Args:
            number: From 0; a negative one counts from the end.
            as_: ``torch`` or ``numpy``: what its arrays are.

        Raises:
            UserError: There is no such block, or it is damaged.
        """
        require(as_ in KINDS, f"cache: as_ must be 'torch' or 'numpy', got {as_!r}")
        size = len(self)
        require(-size <= number < size, f"cache: block must be below {size}, got {number}")
        return Block(self, number % size, as_)

    def blocks(self, round: int | None = None, as_: str = "torch") -> Iterator[Block]:
        """Blocks one after another, each read when it is asked for.

        Args:
            round: Of this round alone; None: of all.
            as_: ``torch`` or ``numpy``: what their arrays are.
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
            seed: Of the order.
            options: Further arguments of ``CachedBatches``; ``signal`` is the best that is stored
                where it is not given.
        """
        options = {"signal": best_signal(self.encoding), **options}
        return CachedBatches(self.cache, batch_size=batch_size, seed=seed, **options)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The teacher's tokenizer."""
        return Tokenizer.from_file(str(self.cache.teacher_dir / "tokenizer.json"))

    @cached_property
    def lm_head(self) -> LMHead:
        """The teacher's LM head: hidden states [N, D] to logits [N, V]."""
        return self.cache.lm_head()

    @cached_property
    def decoders(self) -> dict[int, HiddenDecoder]:
        """By layer, what turns stored hidden states into numbers."""
        return {held.layer: self.cache.hidden_decoder(held.layer) for held in self.encoding.hidden}
