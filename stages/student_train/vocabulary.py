"""The tokens over which one training step takes L_ce and L_mlm.

Most of a small student's step is the vocabulary: two decoders and their softmaxes over V tokens.
Here each step takes its losses over a set S of tokens, a fraction of V: a half A that is sure, and
a half B drawn at random from all others, each with probability r. With ``w = 1`` on A and ``1 / r``
on B, log w is added to the logits, the teacher's and the student's, after the division by the
temperature. Every loss is then its ordinary softmax loss over S: sums over the vocabulary, such as
the normalisers ``sum_v exp(z_v / T)``, become unbiased estimates (importance sampling as in Bengio
and Senecal 2008; here for both sides of a KL divergence).

A holds every token that the step's batches name (labels, stored logits, draws), and the tokens that
are most frequent in the cache's text. So all that the cache says of single tokens stays exact.

Shapes: ``V`` vocabulary, ``S`` tokens of a step.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distilcache.data.cache.cache import Cache
from distilcache.stages.student_train.ranks import ALONE, Ranks

LEAST = 4096
"""Tokens of a step at least: the error of a sampled sum depends on their number, not on V."""
NAMED = ("labels", "logit_ids", "tail_ids", "residual_ids")
"""Columns of a batch that hold token ids for the losses."""

Ids = npt.NDArray[np.int64]


class SampledVocabulary:
    """Draws the tokens of each step.

    Args:
        order_V: All ids, the most frequent first.
        size: Tokens of a step.
        seed: Of the draws.
    """

    def __init__(self, order_V: Ids, size: int, seed: int) -> None:
        self._order_V = order_V
        self._sure, self._drawn = size // 2, size - size // 2
        self._seed = seed

    @classmethod
    def of_cache(
        cls, cache: Cache, rows: int, fraction: float, seed: int
    ) -> "SampledVocabulary | None":
        """For training from a cache; None where each step takes the whole vocabulary.

        Args:
            cache: Its first block tells which tokens are frequent.
            rows: V, rows of the decoders; may be more than the tokenizer has ids.
            fraction: Of V in each step; at least ``LEAST`` tokens.
            seed: Of the draws.
        """
        size = max(LEAST, round(fraction * rows))
        if rows < 2 * LEAST or size >= rows:
            return None
        counts_V = np.bincount(cache.read_block(0)["input_ids"], minlength=rows)
        return cls(np.argsort(-counts_V, kind="stable"), size, seed)

    def apply(self, batches: Sequence[dict[str, Tensor]], step: int, ranks: Ranks = ALONE) -> int:
        """Choose S for one step, and rewrite its batches, which are on the CPU.

        Ids that the losses read become places in S. Added are ``vocabulary`` int64 [S], the ids of
        S in ascending order, and ``log_weight`` float32 [S], log w of each. S depends only on the
        seed, the step and the batches of all ranks, and is the same on all of them.

        Args:
            batches: The step's micro-batches of this rank.
            step: Number of the step.
            ranks: The processes that train together; all must call.

        Returns:
            Size of S. It is the size that was asked for unless the batches name more tokens than
            half of that: then the sure half grows by as much again, as often as it must. Where S
            would be all of V, the batches stay as they are.
        """
        vocabulary = len(self._order_V)
        named_V = np.zeros(vocabulary, dtype=np.uint8)
        for batch in batches:
            for name in NAMED:
                if name in batch:
                    named_V[batch[name].numpy()] = 1
        named_V = ranks.any_of_each(named_V)
        others = self._order_V[named_V[self._order_V] == 0]
        named = vocabulary - len(others)
        sure = self._sure * max(1, -(-named // self._sure))
        if sure + self._drawn >= vocabulary:
            return vocabulary
        pool = others[sure - named :]
        generator = np.random.default_rng((self._seed, step))
        drawn = pool[generator.choice(len(pool), self._drawn, replace=False, shuffle=False)]
        log_weight_V = np.full(vocabulary, -np.inf, dtype=np.float32)
        log_weight_V[named_V > 0] = 0.0
        log_weight_V[others[: sure - named]] = 0.0
        log_weight_V[drawn] = np.log(len(pool) / self._drawn)
        ids = np.flatnonzero(np.isfinite(log_weight_V))
        self._rewrite(batches, ids, log_weight_V[ids])
        return len(ids)

    def _rewrite(
        self, batches: Sequence[dict[str, Tensor]], ids: Ids, log_weight: npt.NDArray[np.float32]
    ) -> None:
        place_V = np.zeros(len(self._order_V), dtype=np.int64)
        place_V[ids] = np.arange(len(ids))
        for batch in batches:
            for name in NAMED:
                if name in batch:
                    batch[name] = torch.from_numpy(place_V[batch[name].numpy()])
            batch["vocabulary"] = torch.from_numpy(ids)
            batch["log_weight"] = torch.from_numpy(log_weight)
