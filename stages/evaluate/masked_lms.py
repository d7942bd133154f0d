"""Masked LMs as evaluation takes them: whole, and of the corpus's vocabulary and length."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from distilcache.data.errors import require
from distilcache.stages.models.checkpoints import open_config, open_model
from distilcache.stages.models.encoder import model_class
from distilcache.stages.models.families import max_length as longest

ROLES = ("teacher", "student", "control")


@dataclass(frozen=True)
class ModelEntry:
    """One model to evaluate."""

    name: str
    """How tables and plots call it."""
    role: str
    """``teacher``, ``student`` or ``control``."""
    path: Path
    """Folder in Hugging Face layout, weights in safetensors."""

    def __post_init__(self) -> None:
        """Check the role."""
        require(
            self.role in ROLES,
            f"evaluate: role of {self.name} must be one of {', '.join(ROLES)}, got {self.role!r}",
        )


def load_model(entry: ModelEntry, vocab_size: int, max_length: int) -> PreTrainedModel:
    """Load a masked LM in float32 and refuse what would be measured wrongly.

    Args:
        entry: Its name and folder.
        vocab_size: Tokens of the vocabulary that it has to have.
        max_length: Tokens that it has to take.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: It cannot be read, lacks weights, or does not fit.
    """
    where = f"evaluate: model {entry.name!r}"
    model = read_model(entry.path, where)
    size = model.config.vocab_size
    require(
        size >= vocab_size,  # Many embeddings have more rows than the tokenizer has ids.
        f"{where}: vocabulary must have the corpus's {vocab_size} tokens, got {size}; build the "
        "corpus with this model's tokenizer",
    )
    positions = longest(model.config)
    require(
        positions is None or positions >= max_length,
        f"{where}: positions must reach the corpus's max_length {max_length}, got {positions}; "
        "build a corpus of shorter sequences",
    )
    return model


def read_model(path: Path, where: str) -> PreTrainedModel:
    """Read a masked LM whole or not at all: missing weights would be random ones.

    Args:
        path: Its folder.
        where: Stage and name, for the error: ``evaluate: model '3x384'``.

    Returns:
        The model in float32 and evaluation mode, on the CPU.

    Raises:
        UserError: There is none, or it lacks weights.
    """
    config = open_config(path, where=where, needs="train it with distilcache student-train")
    model, _ = open_model(model_class(config), config, path, where=where, dtype=torch.float32)
    whole: PreTrainedModel = model.eval()
    return whole
