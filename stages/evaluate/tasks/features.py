"""Texts to token ids, and batches padded to their longest example.

Shapes: N examples (span: windows of contexts), B of them in a batch, L tokens, C outputs.

Ids of all examples are concatenated: a task of 400,000 pairs takes about ten bytes per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distilcache.stages.evaluate.tasks.catalogue import SCORE, SPAN, Task
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.spans import Windows, cut_contexts

CHUNK = 2048
"""Examples per call of the tokenizer."""
LANES = 8
"""On a GPU, lengths are rounded up to a multiple of it, the step of its matrix units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Examples as token ids."""

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    """Token types; not every model takes them."""
    bounds: NDArray[np.int64]
    """Example i is ``ids[bounds[i]:bounds[i + 1]]``."""
    labels: NDArray[Any]
    """int64 [N] classes, float32 [N] scores, or int64 [N, 2] first and last token."""
    windows: Windows | None
    """Where tokens of a context lie in its text (span only)."""
    pad: tuple[int, int]
    """Id and type of padding."""
    pad_left: bool
    """Padding comes first, for models that read the last position."""

    def __len__(self) -> int:
        """N."""
        return len(self.bounds) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.bounds)

    @property
    def cls(self) -> int:
        """Position of [CLS] in a padded batch."""
        return -1 if self.pad_left else 0


def encode(task: Task, split: Split, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenise examples.

    Args:
        task: Task of the examples.
        split: The examples.
        tokenizer: A fast tokenizer.
        max_length: Tokens per example. Of a pair, the longer text is cut; a context is split into
            overlapping windows.
    """
    pad = (tokenizer.pad_token_id, tokenizer.pad_token_type_id)
    if task.kind == SPAN:
        found = cut_contexts(split, tokenizer, max_length)
        ids, types, labels, windows = found.ids, found.types, found.labels, found.windows
    else:
        ids, types = [], []
        for start in range(0, len(split), CHUNK):
            texts = [column[start : start + CHUNK] for column in split.texts]
            made = tokenizer(
                *texts,
                truncation=True,
                max_length=max_length,
                return_token_type_ids=True,
                return_attention_mask=False,
            )
            ids += [np.asarray(row, np.int32) for row in made["input_ids"]]
            types += [np.asarray(row, np.int32) for row in made["token_type_ids"]]
        labels = np.asarray(split.labels, np.float32 if task.kind == SCORE else np.int64)
        windows = None
    return Encoded(
        ids=np.concatenate(ids),
        types=np.concatenate(types),
        bounds=np.concatenate([[0], np.cumsum([len(row) for row in ids])]),
        labels=labels,
        windows=windows,
        pad=pad,
        pad_left=tokenizer.padding_side == "left" and task.kind != SPAN,
    )


@dataclass(frozen=True, slots=True)
class Soft:
    """A fine-tuned teacher's signals for examples."""

    logits: Tensor
    """[N, C] or [N, 2, L]."""
    weight: Tensor
    """[N] Weight of the teacher's logits in each example's loss; the labels' loss has the rest."""
    states: Tensor | None = None
    """[N, W] Its final hidden states of [CLS], if the student learns from them."""


class Collate:
    """Example numbers to a padded batch; a collate function of a data loader.

    Args:
        encoded: The examples.
        types: Whether the model takes token types.
        soft: A teacher's signals, which join the batch.
        multiple: Lengths are rounded up to a multiple of it.
    """

    def __init__(
        self, encoded: Encoded, *, types: bool, soft: Soft | None = None, multiple: int = 1
    ) -> None:
        self.encoded = encoded
        self.types = types
        self.soft = soft
        self.multiple = multiple

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs, ``labels``, and the fields of :class:`Soft` that there are."""
        encoded = self.encoded
        lengths = encoded.lengths[rows]
        longest = -(-int(lengths.max()) // self.multiple) * self.multiple
        columns = np.arange(longest)
        if encoded.pad_left:
            mask = columns >= longest - lengths[:, None]
        else:
            mask = columns < lengths[:, None]
        batch = {
            "input_ids": self._padded(encoded.ids, rows, mask, encoded.pad[0]),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(encoded.labels[rows]),
        }
        if self.types:
            batch["token_type_ids"] = self._padded(encoded.types, rows, mask, encoded.pad[1])
        if self.soft is not None:
            soft = self.soft.logits[rows]
            batch["soft"] = fit_length(soft, longest) if soft.ndim == 3 else soft
            batch["weight"] = self.soft.weight[rows]
            if self.soft.states is not None:
                batch["states"] = self.soft.states[rows]
        return batch

    def _padded(
        self, values: NDArray[np.int32], rows: Sequence[int], mask: NDArray[np.bool_], pad: int
    ) -> Tensor:
        bounds = self.encoded.bounds
        padded: NDArray[np.int64] = np.full(mask.shape, pad, np.int64)
        padded[mask] = np.concatenate([values[bounds[i] : bounds[i + 1]] for i in rows])
        return torch.from_numpy(padded)


def fit_length(logits_B2L: Tensor, length: int) -> Tensor:
    """Cut or pad the last axis; padded values are never read."""
    missing = length - logits_B2L.shape[-1]
    return torch.nn.functional.pad(logits_B2L, (0, missing))
