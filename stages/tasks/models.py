"""Task models: a masked LM's encoder with a new head for the task."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from data.errors import UserError, require
from data.families import max_length
from data.files import sha256_file
from data.tokenizers import tokenizer_fingerprint
from stages.evaluate.models import ModelEntry
from stages.tasks.losses import hide_padding
from stages.tasks.table import SCORE, SPAN, Task

_BAD = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A masked LM that is to be fine-tuned."""

    entry: ModelEntry
    weights: str
    """Hash of its configuration and weights."""
    positions: int
    """Tokens that it can read at once."""
    tokenizer: Any
    tokenizer_hash: str


def open_candidate(entry: ModelEntry) -> Candidate:
    """Look at a checkpoint without loading it.

    Raises:
        UserError: It is no checkpoint with safetensors and a fast tokenizer.
    """
    where = f"tasks: model {entry.name!r}"
    files = sorted(entry.path.glob("model*.safetensors"))
    require(
        bool(files) and (entry.path / "config.json").is_file(),
        f"{where} must be a folder with config.json and model.safetensors, got {entry.path}; train "
        "it with distilcache student-train",
    )
    hf_logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(entry.path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(entry.path, local_files_only=True)
        fingerprint = tokenizer_fingerprint(tokenizer)
    except (*_BAD, AttributeError) as error:
        raise UserError(
            f"{where} must have a configuration and a fast tokenizer that transformers can read, "
            f"got {entry.path}: {_reason(error)}"
        ) from None
    hashes = [sha256_file(path) for path in (entry.path / "config.json", *files)]
    return Candidate(
        entry=entry,
        weights=":".join(hashes),
        positions=min(max_length(config) or 2**31, tokenizer.model_max_length),
        tokenizer=tokenizer,
        tokenizer_hash=fingerprint,
    )


def load_model(entry: ModelEntry, task: Task, seed: int) -> nn.Module:
    """The encoder of a checkpoint with a new head, in float32.

    Args:
        entry: The checkpoint.
        task: Decides the head.
        seed: The head's first weights.

    Raises:
        UserError: Weights of the encoder are missing, or transformers cannot read it.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    kind = AutoModelForSequenceClassification
    options: dict[str, Any] = {"num_labels": 1 if task.kind == SCORE else len(task.labels)}
    if task.kind == SPAN:
        kind, options = AutoModelForQuestionAnswering, {}
    torch.manual_seed(seed)
    try:
        model, info = kind.from_pretrained(
            entry.path,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **options,
        )
    except _BAD as error:
        raise UserError(
            f"tasks: model {entry.name!r} must be one that transformers has a head of {task.name} "
            f"for, got {entry.path}: {_reason(error)}"
        ) from None
    encoder = f"{model.base_model_prefix}."
    lost = [n for n in info["missing_keys"] if n.startswith(encoder) and "pooler" not in n]
    require(
        not lost,
        f"tasks: model {entry.name!r} must have all weights of its encoder, got none for "
        f"{', '.join(sorted(lost)[:3])} in {entry.path}",
    )
    loaded: nn.Module = model
    return loaded


def takes_types(model: nn.Module) -> bool:
    """Whether the model tells first and second texts apart by token types."""
    named = "token_type_ids" in inspect.signature(model.forward).parameters
    return named and int(getattr(model.config, "type_vocab_size", 2)) > 1


def logits_of(model: nn.Module, kind: str, inputs: dict[str, Tensor]) -> Tensor:
    """[B, C], or [B, 2, L] for spans, in float32."""
    out = model(**inputs)
    if kind != SPAN:
        logits: Tensor = out.logits
        return logits.float()
    both = torch.stack([out.start_logits, out.end_logits], dim=1)
    return hide_padding(both, inputs["attention_mask"])


def logits_and_state_of(
    model: nn.Module, inputs: dict[str, Tensor], position: int
) -> tuple[Tensor, Tensor]:
    """[B, C] in float32, and one position's final hidden state [B, W]; not for spans."""
    out = model(**inputs, output_hidden_states=True)
    return out.logits.float(), out.hidden_states[-1][:, position]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
