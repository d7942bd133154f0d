"""Task models: the encoder of a masked LM with a new task layer."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from distilcache.data.errors import require
from distilcache.data.storage.files import sha256_file
from distilcache.stages.evaluate.masked_lms import ModelEntry
from distilcache.stages.evaluate.masked_lms import read_model as read_masked_lm
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, SCORE, SPAN, TAGS, Task
from distilcache.stages.evaluate.tasks.task_losses import hide_padding
from distilcache.stages.models.checkpoints import open_config, open_model
from distilcache.stages.models.encoder import states_of
from distilcache.stages.models.families import family_of, max_length
from distilcache.stages.models.tokenizers import load_tokenizer, tokenizer_fingerprint
from distilcache.stages.models.weight_files import weight_files

HEADS = {
    CLASSES: AutoModelForSequenceClassification,
    SCORE: AutoModelForSequenceClassification,
    TAGS: AutoModelForTokenClassification,
    SPAN: AutoModelForQuestionAnswering,
}
"""Class of transformers by kind of task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A masked LM to fine-tune."""

    entry: ModelEntry
    config: Any
    weights: str
    """Hash of its configuration and weights."""
    positions: int
    """Longest sequence that it reads, in tokens."""
    tokenizer: Any
    tokenizer_hash: str


def open_candidate(entry: ModelEntry) -> Candidate:
    """Read the facts of a checkpoint without loading its weights.

    Raises:
        UserError: It is not a checkpoint with safetensors and a tokenizer.
    """
    where = f"tasks: model {entry.name!r}"
    config = open_config(entry.path, where=where, needs="train it with distilcache student-train")
    tokenizer = load_tokenizer(entry.path, where=f"tasks: tokenizer of model {entry.name!r}")
    files = weight_files(entry.path)
    hashes = [sha256_file(path) for path in (entry.path / "config.json", *files)]
    return Candidate(
        entry=entry,
        config=config,
        weights=":".join(hashes),
        positions=min(max_length(config) or 2**31, tokenizer.model_max_length),
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
    )


def load_model(entry: ModelEntry, task: Task, seed: int) -> nn.Module:
    """The encoder of a checkpoint with a new task layer, drawn by ``seed``, in float32.

    Of a checkpoint that was fine-tuned before the task layer is new as well: its rows may be in
    another order of the labels.

    Raises:
        UserError: Weights of the encoder are missing, or transformers cannot read it.
    """
    where = f"tasks: model {entry.name!r}"
    config = open_config(entry.path, where=where)
    kind, tuned = HEADS[task.kind], kind_of(config) is not None
    config.problem_type = None  # that of an earlier task, by which others would read the scores
    if task.kind == SCORE:
        config.num_labels, config.problem_type = 1, "regression"
    elif task.kind == SPAN:
        config.num_labels = 2  # the first token of an answer, and the last
    else:
        config.id2label = dict(enumerate(task.labels))  # with it, their number
        config.label2id = {name: number for number, name in enumerate(task.labels)}
    require(
        type(config) in kind._model_mapping,
        f"{where} must be of a type that transformers has a head of {task.name} for, got type "
        f"{config.model_type!r}; leave the task out",
    )
    torch.manual_seed(seed)
    model, _ = open_model(kind, config, entry.path, where=where, new_head=True, dtype=torch.float32)
    if tuned:
        torch.manual_seed(seed)
        drawn = kind.from_config(config).state_dict()
        inside = f"{model.base_model_prefix}."
        head = {name: value for name, value in drawn.items() if not name.startswith(inside)}
        model.load_state_dict(head, strict=False)
    loaded: nn.Module = model
    return loaded


def kind_of(config: Any) -> str | None:
    """Kind of the task that a checkpoint was fine-tuned on; None: it is a masked LM."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith("ForSequenceClassification"):
        return SCORE if config.num_labels == 1 else CLASSES
    if name.endswith("ForTokenClassification"):
        return TAGS
    return SPAN if name.endswith(("ForQuestionAnswering", "ForQuestionAnsweringSimple")) else None


def read_model(path: Path, where: str) -> tuple[Any, str | None]:
    """A masked LM, or a task model as :func:`load_model`'s were saved, with its kind.

    Returns:
        The model in float32 and evaluation mode, on the CPU; the kind of its task, or None.

    Raises:
        UserError: There is no model, or it lacks weights, which would be random.
    """
    config = open_config(path, where=where)
    kind = kind_of(config)
    if kind is None:
        return read_masked_lm(path, where), None
    model, _ = open_model(HEADS[kind], config, path, where=where, dtype=torch.float32)
    return model.eval(), kind


def takes_types(model: nn.Module) -> bool:
    """Whether the model marks first and second texts by token types."""
    config: Any = model.config
    named = "token_type_ids" in inspect.signature(model.forward).parameters
    of_cells = hasattr(config, "type_vocab_sizes")  # TAPAS: rows and columns of tables
    of_words = config.model_type in ("xlm", "flaubert")  # which add words in their place
    several = int(getattr(config, "type_vocab_size", 2)) > 1
    return named and several and not of_cells and not of_words


def reads_the_end(config: Any) -> bool:
    """Whether the heads of whole texts read the last position, as XLNet's do."""
    return family_of(config).mask == "permutation"


def logits_of(model: nn.Module, kind: str, inputs: dict[str, Tensor]) -> Tensor:
    """[B, C], [B, C, L] for tags, or [B, 2, L] for spans, in float32."""
    out = model(**inputs)
    if kind != SPAN:
        logits: Tensor = out.logits.float()
        return logits.transpose(1, 2) if kind == TAGS else logits
    both = torch.stack([out.start_logits, out.end_logits], dim=1)
    return hide_padding(both, inputs["attention_mask"])


def logits_and_state_of(
    model: nn.Module, inputs: dict[str, Tensor], position: int
) -> tuple[Tensor, Tensor]:
    """[B, C] in float32, and one position's final hidden state [B, W]; not for spans."""
    out = model(**inputs, output_hidden_states=True)
    return out.logits.float(), states_of(out)[-1][:, position]
