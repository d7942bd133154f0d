"""What models of different vocabularies are asked: the same positions, over the ids that all have.

A student with a trimmed vocabulary reads the held-out text in its own ids. Losses compare where
every model can answer: at masked positions whose token all of them have, with the distribution of
each taken over the ids that all of them have.

Shapes: ``M`` masked positions, ``V`` the corpus's ids, ``C`` those of all models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from distilcache.data.errors import require
from distilcache.data.masks.positions import flat_rows
from distilcache.stages.evaluate.heldout import HeldOut
from distilcache.stages.models.trimmed_ids import TrimmedIds


@dataclass(frozen=True, slots=True)
class Asked:
    """What one model is asked."""

    heldout: HeldOut
    """The text in its ids; ``labels`` are places among the C ids."""
    columns_C: Tensor
    """Its logits of these, int64."""
    pad_id: int


def asked_of(
    heldout: HeldOut,
    vocab_size: int,
    pad_id: int,
    trimmed: Sequence[TrimmedIds | None],
    longest: Sequence[int | None],
) -> list[Asked]:
    """What each model is asked.

    Args:
        heldout: Masked sequences in the corpus's ids.
        vocab_size: V.
        pad_id: Id that fills padding.
        trimmed: The ids of each model that has not all of them; None: it has.
        longest: Tokens that each model reads at most; None: any number.

    Raises:
        UserError: No masked position is left.
    """
    common_V = np.ones(vocab_size, bool)
    for ids in trimmed:
        if ids is not None:
            common_V &= ids.new_V[:vocab_size] >= 0
    flat_M = flat_rows(heldout.lengths, heldout.masked_counts, heldout.masked_positions)
    stays_M = common_V[heldout.labels]
    texts: list[tuple[HeldOut, NDArray[np.int64]]] = []
    for ids, most in zip(trimmed, longest, strict=True):
        if ids is None:
            texts.append((heldout, heldout.masked_positions))
            continue
        recut = ids.recut(heldout.input_ids, heldout.lengths, most or len(heldout.input_ids) ** 2)
        places_M = recut.places_T[flat_M]
        stays_M = stays_M & (places_M >= 0)
        texts.append((replace(heldout, input_ids=recut.ids, lengths=recut.lengths), places_M))
    require(
        bool(stays_M.any()),
        "evaluate: models must have some tokens of the held-out text in common, got none at its "
        f"{len(stays_M)} masked positions; raise student.vocabulary or evaluate.sequences",
    )
    of_sequence = np.repeat(np.arange(len(heldout.lengths)), heldout.masked_counts)
    counts = np.bincount(of_sequence[stays_M], minlength=len(heldout.lengths))
    common = np.flatnonzero(common_V)
    labels = np.searchsorted(common, heldout.labels[stays_M])
    return [
        Asked(
            replace(text, masked_counts=counts, masked_positions=places_M[stays_M], labels=labels),
            torch.from_numpy(common if ids is None else ids.new_V[common]),
            pad_id if ids is None else int(ids.new_V[pad_id]),
        )
        for ids, (text, places_M) in zip(trimmed, texts, strict=True)
    ]


def fertilities(
    heldout: HeldOut, theirs: Tokenizer, trimmed: Sequence[TrimmedIds | None]
) -> list[float]:
    """Tokens that each model's tokenizer makes of the held-out text, over those of the corpus's."""
    ids = heldout.input_ids.copy()
    flat_M = flat_rows(heldout.lengths, heldout.masked_counts, heldout.masked_positions)
    ids[flat_M] = heldout.labels
    sequences = np.split(ids, np.cumsum(heldout.lengths)[:-1])
    texts = theirs.decode_batch([sequence.tolist() for sequence in sequences])
    before = _tokens(theirs, texts)
    return [
        1.0 if own is None else _tokens(own.tokenizer(), texts) / max(1, before) for own in trimmed
    ]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> int:
    tokenizer.no_truncation()  # Trainer's checkpoints keep what the last call asked for.
    tokenizer.no_padding()
    return sum(map(len, tokenizer.encode_batch(texts, add_special_tokens=False)))
