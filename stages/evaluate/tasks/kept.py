"""A fine-tuned model as a checkpoint for ``transformers``: weights, labels, tokenizer, card."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import EvalResult
from torch import nn

from distilcache.data.errors import require
from distilcache.data.storage.files import hashes_of, new_folder, write_bytes
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, SCORE, SPAN, TAGS, Task
from distilcache.stages.evaluate.tasks.features import Encoded
from distilcache.stages.evaluate.tasks.finetune import PROJECTION, Place, scale_of
from distilcache.stages.evaluate.tasks.jobs import Job
from distilcache.stages.evaluate.tasks.predictions import predict
from distilcache.stages.evaluate.tasks.task_models import HEADS, takes_types
from distilcache.stages.models.cards import (
    PLACE,
    card,
    origin_of_model,
    usage,
    without_folders,
)
from distilcache.stages.models.hub import quiet
from distilcache.stages.models.opened import NORMS_FIRST, has_norms_first, run_norms_first
from distilcache.stages.models.piece_tokenizer import PieceTokenizer
from distilcache.stages.models.saving import config_json, save_tokenizer, write_weights
from distilcache.stages.models.tokenizers import load_tokenizer

CARD = "README.md"
PIPELINES = {
    CLASSES: "text-classification",
    SCORE: "text-classification",
    TAGS: "token-classification",
    SPAN: "question-answering",
}
"""What hubs call a kind of task."""
COMPARED = 8
"""Examples whose logits must be the same after the model was written and read."""
TYPES = "token_type_ids"
TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest: float32 in another order."""


def keep_model(
    model: Any, job: Job, train: Encoded, dev: Encoded, facts: Mapping[str, Any], place: Place
) -> dict[str, str]:
    """Write a fine-tuned model to ``job.kept_path``; the folder is whole or absent.

    A model of scores was trained on standardised ones. What is written gives them in the units of
    the task.

    Args:
        model: The model; changed.
        job: Its run.
        train: Examples that it was trained on, for the scale of scores.
        dev: Some held-out examples; the written model must give the same logits for the first.
        facts: What the card says of the run: metrics and settings.
        place: Where it was trained.

    Returns:
        SHA-256 of each file that a program reads; people may edit the card.

    Raises:
        UserError: It cannot be written, or gives other logits once it is read again.
    """
    task = job.data.task
    if PROJECTION in dict(model.named_children()):
        delattr(model, PROJECTION)
    # Trainer has put its autocast around the model's own forward.
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    exact = replace(place, dtype=torch.float32)
    some = dev.first(COMPARED)
    wanted = predict(model, task.kind, some, COMPARED, exact)
    if task.kind == SCORE:
        mean, spread = scale_of(train)
        _rescale(model, mean, spread)
        wanted = wanted * spread + mean
    with new_folder(job.kept_path) as folder:
        write_weights(model, folder)
        write_bytes(folder / "config.json", config_json(model))
        save_tokenizer(_tokenizer_of(job, model, train), folder)
        write_bytes(folder / CARD, _card(job, model, facts).encode())
        _require_same(folder, task, some, wanted, exact)
        return hashes_of(folder, [p.name for p in folder.iterdir() if p.name != CARD])


def _tokenizer_of(job: Job, model: nn.Module, train: Encoded) -> Any:
    """The model's tokenizer, which by itself gives the inputs that the model was taught with.

    Those of the general class, and Japanese ones, know token types and give them if asked alone; a
    BERT's gives them to a RoBERTa as well, which has but one.
    """
    # Opened anew: the one that was used still cuts texts, and would be saved so.
    tokenizer: Any = load_tokenizer(job.model.entry.path)
    names = [name for name in tokenizer.model_input_names if name != TYPES]
    given = TYPES in tokenizer.model_input_names or train.types.any()
    whole = job.data.task.kind in (CLASSES, SCORE)
    settings = {
        "model_input_names": [*names, TYPES] if given and takes_types(model) else names,
        "padding_side": "left" if train.pad_left else "right",
        "model_max_length": job.max_length if whole else job.model.positions,
    }
    for made in (tokenizer, getattr(tokenizer, "slow", tokenizer)):
        vars(made).update(settings)
        made.init_kwargs.update(settings)
    return tokenizer


def _rescale(model: nn.Module, mean: float, spread: float) -> None:
    """Multiply and shift the output of a model's last layer."""
    outputs = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not outputs or outputs[-1].bias is None:
        return  # The comparison that follows refuses it.
    with torch.no_grad():
        outputs[-1].weight.mul_(spread)
        outputs[-1].bias.mul_(spread).add_(mean)


def _require_same(folder: Path, task: Task, some: Encoded, wanted: Any, place: Place) -> None:
    with quiet():
        again = HEADS[task.kind].from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    found = predict(run_norms_first(again), task.kind, some, COMPARED, place)
    if task.kind in (TAGS, SPAN):
        # At padding a model may say anything; ModernBERTs do, beyond their local windows.
        places_L = np.arange(wanted.shape[-1])
        if some.pad_left:
            places_L = places_L[::-1]
        padding_N1L = (places_L >= some.lengths[:, None])[:, None]
        found, wanted = (np.where(padding_N1L, 0, logits) for logits in (found, wanted))
    worst = float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-9))
    require(
        worst <= TOLERANCE,
        f"tasks: keep must give a model of {task.name} that answers as the fine-tuned one, got "
        f"logits of {type(again).__name__} that differ by {worst:.2g} of the largest; leave the "
        "task out, or set tasks.keep=[]",
    )


def _card(job: Job, model: Any, facts: Mapping[str, Any]) -> str:
    """README.md: what the model is, how it was made, how to use it."""
    task, entry = job.data.task, job.model.entry
    published = entry.role == "student" and not (entry.path / "training.json").is_file()
    role = "model" if published else entry.role
    name = f"{entry.name} on {task.name}"
    made = card(
        _text(job, model, facts, name, role),
        pipeline_tag=PIPELINES[task.kind],
        tags=[model.config.model_type, *([] if published else [role])],
        origin=origin_of_model(entry.path) if entry.origin is None else entry.origin,
        name=name,
        results=_results(task, facts["metrics"]),
    )
    return str(made)


def _text(job: Job, model: Any, facts: Mapping[str, Any], name: str, role: str) -> str:
    task = job.data.task
    how = "from the labels and from the fine-tuned teacher" if job.soft_from else "from the labels"
    labels = f" Labels: {', '.join(task.labels)}." if task.labels else ""
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A {type(model).__name__}: the {role} `{job.model.entry.name}`, "
            f"fine-tuned {how} with distilcache, seed {job.seed}; "
            f"{model.num_parameters():,} parameters.{labels}",
            "",
            "## Use",
            "",
            "```python",
            *_usage(task, type(model).__name__, job.model.tokenizer),
            "```",
            *(["", NORMS_FIRST] if has_norms_first(model.config) else []),
            "",
            "## Scores",
            "",
            f"On {sum(map(len, job.data.dev.values())):,} held-out examples; "
            f"{len(job.data.train):,} were trained on.",
            "",
            "| metric | value |",
            "|---|---:|",
            *(f"| {name} | {value:.4f} |" for name, value in facts["metrics"].items()),
            "",
            "## Settings",
            "",
            "```json",
            json.dumps(without_folders(facts["settings"]), indent=1, sort_keys=True),
            "```",
            "",
        ]
    )


def _results(task: Task, metrics: Mapping[str, float]) -> list[EvalResult]:
    """The metrics as hubs read them."""
    return [
        EvalResult(
            task_type=PIPELINES[task.kind],
            dataset_type=task.hub[0] if task.hub else task.name,
            dataset_config=task.hub[1] if len(task.hub) > 1 else None,
            dataset_name=task.name,
            metric_type=metric,
            metric_value=round(value, 5),
        )
        for metric, value in metrics.items()
    ]


def _usage(task: Task, model: str, tokenizer: Any) -> list[str]:
    if task.kind == SPAN:
        asked = 'out = model(**tokenizer("A question?", "A text.", return_tensors="pt"))'
        return [*usage(model), asked]
    # With a tokenizer in Python transformers does not know the words, and refuses "first".
    in_python = isinstance(tokenizer, PieceTokenizer) and not tokenizer.slow.is_fast
    more = f', aggregation_strategy="{"simple" if in_python else "first"}"'
    more = more if task.kind == TAGS else ""
    pair = len(task.hub_columns) == 3
    given = '{"text": "A text.", "text_pair": "Another."}' if pair else '"A text."'
    given += "" if task.kind == TAGS else ", truncation=True"
    return [
        "from transformers import pipeline",
        "",
        f'ask = pipeline("{PIPELINES[task.kind]}", "{PLACE}"{more})',
        f"ask({given})",
    ]
