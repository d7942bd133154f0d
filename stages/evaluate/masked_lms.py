"""Masked LMs for evaluation: with all weights, and fit for the corpus's vocabulary and length."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distilcache.data.errors import require
from distilcache.stages.models.checkpoints import open_config, open_model
from distilcache.stages.models.encoder import model_class
from distilcache.stages.models.families import max_length as longest
from distilcache.stages.models.trimmed_ids import TrimmedIds, read_tokenizer
from distilcache.stages.models.trimmed_tokenizer import ids_of

ROLES = ("teacher", "student", "control")


@dataclass(frozen=True)
class ModelEntry:
    """One model to evaluate."""

    name: str
    """Name in tables and plots."""
    role: str
    """``teacher``, ``student`` or ``control``."""
    path: Path
    """Folder in Hugging Face layout, with weights in safetensors."""
    origin: Mapping[str, Any] | None = None
    """What cards of models made from it say of it; None: what its own card says."""

    def __post_init__(self) -> None:
        """Check the role."""
        require(
            self.role in ROLES,
            f"evaluate: role of {self.name} must be one of {', '.join(ROLES)}, got {self.role!r}",
        )


def load_model(
    entry: ModelEntry, vocab_size: int, max_length: int, tokenizer: Path
) -> tuple[PreTrainedModel, TrimmedIds | None]:
    """Load a masked LM in float32; refuse one that the corpus, of this size, does not fit.

    ``tokenizer`` is the folder of the corpus's.

    Returns:
        The model in evaluation mode, on the CPU; and its ids, where it has fewer than the corpus
        and a tokenizer of its own.

    Raises:
        UserError: It cannot be read, lacks weights, or does not fit.
    """
    where = f"evaluate: model {entry.name!r}"
    model = read_model(entry.path, where)
    size, trimmed = model.config.vocab_size, None
    if (entry.path / "tokenizer.json").is_file():
        if size < vocab_size:
            trimmed = TrimmedIds.of_student(tokenizer, entry.path, vocab_size)
        else:
            _check_ids(where, entry.path, tokenizer)
    require(
        # Many embeddings have more rows than the tokenizer has ids.
        size >= vocab_size or (trimmed is not None and len(trimmed) <= size),
        f"{where}: vocabulary must have the corpus's {vocab_size} tokens, got {size}; build the "
        "corpus with this model's tokenizer",
    )
    positions = longest(model.config)
    require(
        positions is None or positions >= max_length,
        f"{where}: positions must reach the corpus's max_length {max_length}, got {positions}; "
        "build a corpus of shorter sequences",
    )
    return model, trimmed


def _check_ids(where: str, path: Path, tokenizer: Path) -> None:
    """Refuse a model to which the corpus's ids are other tokens: its figures would be noise."""
    if not (tokenizer / "tokenizer.json").is_file():
        return
    own, ids = ids_of(read_tokenizer(path)), ids_of(read_tokenizer(tokenizer))
    other = next((token for token, index in ids.items() if own.get(token) != index), None)
    require(
        other is None,
        f"{where}: tokenizer must have the corpus's token ids, got another one for {other!r} in "
        f"{path}; leave the model out, or build the corpus with this model's tokenizer",
    )


def read_model(path: Path, where: str) -> PreTrainedModel:
    """Load a masked LM in float32 and evaluation mode, on the CPU.

    ``where`` is the stage and its name for error lines, such as ``evaluate: model '3x384'``.

    Raises:
        UserError: There is no model, or it lacks weights, which would be random.
    """
    config = open_config(path, where=where, needs="train it with distilcache student-train")
    model, _ = open_model(model_class(config), config, path, where=where, dtype=torch.float32)
    whole: PreTrainedModel = model.eval()
    return whole
