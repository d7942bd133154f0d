"""Masked LMs as evaluation takes them: whole, and of the corpus's vocabulary and length."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from data.encoder import model_class
from data.errors import UserError, require
from data.families import max_length as longest

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


def weight_files(path: Path) -> list[Path]:
    """The weights of a checkpoint: one file, or several with an index."""
    return sorted(path.glob("model*.safetensors"))


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
        size == vocab_size,
        f"{where}: vocabulary must be the corpus's {vocab_size} tokens, got {size}; build the "
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
    if not (path / "config.json").is_file():
        raise UserError(
            f"{where} must be a folder with a config.json, got {str(path)!r}; train it with "
            "distilcache student-train or correct the path"
        )
    if not weight_files(path):
        raise UserError(
            f"{where} must have its weights in model.safetensors, got none in {path}; save it "
            "again with save_pretrained"
        )
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            model, info = model_class(config).from_pretrained(
                path,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{where} must be a masked LM that transformers can read, got {path}: {reason}"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{where} must have all weights of {type(model).__name__}, got none for "
            f"{', '.join(missing)} in {path}; pass a checkpoint with its masked-LM head"
        )
    whole: PreTrainedModel = model.eval()
    return whole


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence load tables and bars of transformers; what matters in them is checked."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
