"""Altered copies of training examples, on which a student learns its teacher's logits.

Some tokens of an example are replaced by tokens that the teacher's masked LM draws; the fine-tuned
teacher gives logits for the result. This is data augmentation as in TinyBERT (Jiao et al. 2020,
arXiv:1909.10351, section 3.2), except that all tokens of a copy are drawn at once and that the
fraction of replaced tokens varies from copy to copy. Lengths and special tokens stay the same.

Shapes: N examples, T tokens of all of them, B examples of a batch, L positions, M replaced tokens,
V vocabulary, A copies of each example.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distilcache.data.progress import Bar
from distilcache.data.storage.locks import claimed
from distilcache.stages.evaluate.masked_lms import ModelEntry, read_model
from distilcache.stages.evaluate.tasks.features import Collate, Encoded
from distilcache.stages.evaluate.tasks.finetune import Place
from distilcache.stages.evaluate.tasks.tensors import read_tensor, write_tensor
from distilcache.stages.models.device import autocast
from distilcache.stages.models.encoder import own_logits
from distilcache.stages.models.special_tokens import never_masked
from distilcache.stages.models.trimmed_ids import TrimmedIds

FRACTIONS = (0.05, 0.40)
"""Smallest and largest fraction of an example's tokens that is replaced."""
CANDIDATES = 15
"""One of this many likeliest tokens is drawn, by its probability."""
BATCH = 64
"""Examples per batch, of similar length."""
LOGITS = 2**26
"""Approximate limit of logits per batch: 256 MiB."""
NAME = "input_ids"


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """The copies that a task's distilled runs read."""

    count: int
    """A."""
    teacher: ModelEntry
    """The masked LM that draws tokens."""
    path: Path
    """Safetensors file with the ids of the copies, int32 [A T]."""
    key: str
    """Hash of everything that they depend on."""

    def of(self, encoded: Encoded, tokenizer: Any, place: Place) -> Encoded:
        """The examples, followed by their copies; these are drawn if they are not on disk yet."""
        with claimed(self.path, wait=True):
            ids = read_tensor(self.path, NAME, self.key)
            if ids is None:
                model = read_model(self.teacher.path, f"tasks: model {self.teacher.name!r}")
                made = alter(encoded, model, tokenizer, self.count, place)
                write_tensor(self.path, NAME, made, self.key)
                ids = torch.from_numpy(made)
        return with_copies(encoded, ids.numpy(), self.count)


def with_copies(encoded: Encoded, ids: NDArray[np.int32], count: int) -> Encoded:
    """Examples followed by ``count`` copies of each, with the same types, lengths and labels."""
    starts = np.arange(count + 1)[:, None] * len(encoded.ids)
    bounds = (starts + encoded.bounds[:-1]).ravel()
    return replace(
        encoded,
        ids=np.concatenate([encoded.ids, ids]),
        types=np.tile(encoded.types, count + 1),
        bounds=np.append(bounds, len(encoded.ids) * (count + 1)),
        labels=np.concatenate([encoded.labels] * (count + 1)),
        words=None if encoded.words is None else np.tile(encoded.words, count + 1),
    )


def recut_copies(own: Encoded, theirs: Encoded, trimmed: TrimmedIds, max_length: int) -> Encoded:
    """A student's examples, followed by the copies in its ids.

    Args:
        own: The examples as its tokenizer writes them.
        theirs: The examples as the teacher's tokenizer writes them, followed by their copies.
        trimmed: The student's ids.
        max_length: Tokens per example.
    """
    first = theirs.bounds[len(own)]
    recut = trimmed.recut(theirs.ids[first:], theirs.lengths[len(own) :], max_length)
    return replace(
        own,
        ids=np.concatenate([own.ids, recut.ids.astype(np.int32)]),
        types=np.concatenate([own.types, theirs.types[first:][recut.sources]]),
        bounds=np.concatenate([own.bounds, own.bounds[-1] + np.cumsum(recut.lengths)]),
        labels=theirs.labels,
    )


def alter(
    encoded: Encoded, model: Any, tokenizer: Any, count: int, place: Place
) -> NDArray[np.int32]:
    """Ids of ``count`` copies of all examples, int32 [A T]: first copies of all, then second ones.

    Args:
        encoded: The examples.
        model: A masked LM with the tokenizer's vocabulary.
        tokenizer: Knows the special tokens, which are neither replaced nor drawn.
        count: A.
        place: Device and type.
    """
    model.eval().to(place.device)
    size = model.config.vocab_size
    special_V = torch.ones(size, dtype=torch.bool, device=place.device)  # ids of no token, too
    special_V[[i for i in tokenizer.get_vocab().values() if i < size]] = False
    special_V[list(never_masked(tokenizer))] = True
    generator = torch.Generator().manual_seed(0)  # On the CPU: the same draws for any device.
    order = np.argsort(encoded.lengths, kind="stable")
    collate = Collate(encoded, types=False, multiple=place.multiple)
    copies = np.tile(encoded.ids, (count, 1))
    bar = Bar(total=count * len(encoded), desc="tasks: copies", unit="ex")
    with bar, torch.inference_mode(), autocast(place.device, place.dtype):
        for rows in _batches(order, encoded.lengths, len(special_V)):
            batch = collate(rows)
            ids_BL = batch["input_ids"].to(place.device)
            there_BL = batch["attention_mask"].to(place.device)
            mask_BL = batch["attention_mask"].numpy().astype(bool)
            places_BL = encoded.bounds[rows][:, None] + mask_BL.cumsum(1) - 1
            for copy in copies:
                drawn_BL = _draw(
                    model, tokenizer.mask_token_id, special_V, ids_BL, there_BL, generator
                )
                copy[places_BL[mask_BL]] = drawn_BL.cpu().numpy()[mask_BL]
            bar.update(count * len(rows))
    return copies.ravel()


def _batches(
    order: NDArray[np.int64], lengths: NDArray[np.int64], vocabulary: int
) -> Iterator[list[int]]:
    """Batches of examples in the given order, small enough for the limit of logits."""
    start = 0
    while start < len(order):
        longest = lengths[order[: start + BATCH][-1]]
        size = max(1, min(BATCH, int(LOGITS / (longest * FRACTIONS[1] * vocabulary))))
        yield order[start : start + size].tolist()
        start += size


def _draw(
    model: Any,
    mask_id: int,
    special_V: Tensor,
    ids_BL: Tensor,
    there_BL: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """One copy of a batch: a random fraction of each example's tokens is replaced."""
    low, high = FRACTIONS
    fraction_B1 = low + (high - low) * torch.rand(len(ids_BL), 1, generator=generator)
    chosen_BL = torch.rand(ids_BL.shape, generator=generator) < fraction_B1
    chosen_BL = chosen_BL.to(ids_BL.device) & there_BL.bool() & ~special_V[ids_BL]
    rows_M = chosen_BL.flatten().nonzero()[:, 0]
    if not len(rows_M):
        return ids_BL
    masked_BL = ids_BL.masked_fill(chosen_BL, mask_id)
    logits_MV = own_logits(model, masked_BL, there_BL, rows_M).float()
    values_MC, tokens_MC = logits_MV.masked_fill_(special_V, -torch.inf).topk(
        min(CANDIDATES, len(special_V))
    )
    # Gumbel's trick, so that these draws come from the CPU's generator as well.
    uniform_MC = torch.rand(values_MC.shape, generator=generator).clamp_(min=1e-20)
    best_M1 = (values_MC - (-uniform_MC.log()).log().to(values_MC.device)).argmax(-1, keepdim=True)
    return ids_BL.flatten().scatter(0, rows_M, tokens_MC.gather(1, best_M1)[:, 0]).view_as(ids_BL)
