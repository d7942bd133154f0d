"""Fine-tuning with ``transformers.Trainer``.

Differences from plain Trainer use: batches come padded from :class:`Collate`, a batch has examples
of similar length, and the loss may include a fine-tuned teacher's signals.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from distilcache.stages.evaluate.tasks.catalogue import SCORE, TAGS
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.features import (
    LANES,
    NO_TAG,
    Collate,
    Encoded,
    Soft,
)
from distilcache.stages.evaluate.tasks.task_losses import cos_loss, hard_loss, soft_loss
from distilcache.stages.evaluate.tasks.task_models import (
    logits_and_state_of,
    logits_of,
    takes_types,
)
from distilcache.stages.models.device import as_recipe_says, trainer_place

PROJECTION = "distil_projection"
"""Module of a task model while it learns states of another width than its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype
    scratch: Path
    """Folder that Trainer requires; nothing is written to it."""

    @property
    def multiple(self) -> int:
        """Padded lengths are a multiple of it."""
        return LANES if self.device.type == "cuda" else 1


def steps_of(examples: int, config: TasksConfig, *, distilled: bool = False) -> int:
    """Optimizer steps over that many examples; a second distillation reads their copies as well."""
    if distilled and config.distil_epochs:
        per_pass = math.ceil(examples * (1 + config.distil_copies) / config.batch_size)
        return max(math.ceil(config.distil_epochs * per_pass), config.distil_min_steps)
    per_epoch = math.ceil(examples / config.batch_size)
    return max(1, math.ceil(config.epochs * per_epoch), config.min_steps)


def fine_tune(
    model: Any,
    kind: str,
    train: Encoded,
    config: TasksConfig,
    *,
    seed: int,
    place: Place,
    steps: int = 0,
    soft: Soft | None = None,
    step_done: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Train all weights of a task model; scores are standardised, see :func:`standardised`.

    Args:
        model: Changed in place; left on the device.
        kind: Of the task.
        train: Examples.
        config: Recipe section.
        seed: Of order and dropout.
        place: Device and type.
        steps: Optimizer steps; 0: by the recipe section.
        soft: A fine-tuned teacher's signals.
        step_done: Called after each step.

    Returns:
        ``steps``, ``training_seconds``, ``tokens_per_s``, and ``padding`` (fraction of
        all positions).
    """
    if place.device.type == "cpu" and getattr(model, "_supports_sdpa", False):
        # torch's fused attention with dropout is float32 on a CPU; eager steps take a sixth less.
        model.set_attn_implementation("eager")
    if kind == SCORE:
        train = standardised(train)
    steps = steps or steps_of(len(train), config)
    collate = Collate(train, types=takes_types(model), soft=soft, multiple=place.multiple)
    counter = _Counter(collate)
    arguments = _arguments(config, steps, seed, place)
    if soft is not None and soft.states is not None:
        add_projection(model, soft.states.shape[1])
    drops = soft is None or config.distil_dropout
    trainer = _TaskTrainer(model, kind, train, counter, arguments, config, drops=drops)
    trainer.add_callback(_StepCallback(step_done))
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    model.zero_grad(set_to_none=True)
    return {
        "steps": steps,
        "training_seconds": round(seconds, 3),
        "tokens_per_s": round(counter.tokens / max(seconds, 1e-9), 1),
        "padding": round(1 - counter.tokens / max(counter.positions, 1), 4),
    }


def add_projection(model: Any, width: int) -> None:
    """Add a map from a student's hidden states to the teacher's width; identity if equal."""
    own = model.config.hidden_size
    same = own == width
    made = nn.Identity() if same else nn.Linear(own, width, bias=False)
    model.add_module(PROJECTION, made)


def standardised(train: Encoded) -> Encoded:
    """The same examples, with scores of mean 0 and variance 1; correlations stay the same.

    A new task layer starts near 0. If the scores' mean is far from 0, the first hundreds of steps
    teach the encoder a constant, and a small encoder does not always recover from that.
    """
    mean, spread = scale_of(train)
    scores = train.labels.astype(np.float64)
    return replace(train, labels=((scores - mean) / spread).astype(np.float32))


def scale_of(train: Encoded) -> tuple[float, float]:
    """Mean and standard deviation of scores; 1 for the latter where they are all equal."""
    scores = train.labels.astype(np.float64)
    return float(scores.mean()), float(scores.std()) or 1.0


class _Counter:
    """Collates, and counts tokens and positions."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate
        self.tokens = self.positions = 0

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        batch = self.collate(rows)
        self.tokens += int(batch["attention_mask"].sum())
        self.positions += batch["attention_mask"].numel()
        return batch


def _arguments(config: TasksConfig, steps: int, seed: int, place: Place) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(place.scratch),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="linear",
        warmup_steps=int(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        seed=seed,
        dataloader_pin_memory=place.device.type == "cuda",
        **trainer_place(place.device, place.dtype),
    )
    as_recipe_says(arguments, place.device)
    return arguments


class _TaskTrainer(Trainer):  # type: ignore[misc]
    """Trainer over example numbers; see the docstring of the module for the differences."""

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        train: Encoded,
        collate: Callable[[list[int]], dict[str, Tensor]],
        arguments: TrainingArguments,
        config: TasksConfig,
        *,
        drops: bool,
    ) -> None:
        self.kind = kind
        self.drops = drops
        self.config = config
        self.cls = train.cls
        generator = torch.Generator().manual_seed(arguments.seed)
        self.sampler = LengthGroupedSampler(
            arguments.per_device_train_batch_size,
            lengths=train.lengths.tolist(),
            generator=generator,
        )
        super().__init__(
            model=model, args=arguments, train_dataset=range(len(train)), data_collator=collate
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return self.sampler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss from the labels and, where a batch has them, the teacher's logits and states."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        model.train(self.drops)  # Trainer calls train() before each step.
        soft, weight_B, states = (inputs.pop(name, None) for name in ("soft", "weight", "states"))
        if states is None:
            logits = logits_of(model, self.kind, inputs)
        else:
            logits, state_BW = logits_and_state_of(model, inputs, self.cls)
        loss_B = hard_loss(self.kind, logits, labels)
        if soft is not None and weight_B is not None:
            mask = labels != NO_TAG if self.kind == TAGS else inputs["attention_mask"]
            soft_B = soft_loss(self.kind, logits, soft, self.config.distil_temperature, mask)
            loss_B = weight_B * soft_B + (1 - weight_B) * loss_B
        if states is not None:
            projected_BW = model.get_submodule(PROJECTION)(state_BW)
            loss_B = loss_B + self.config.distil_cos * cos_loss(projected_BW, states)
        loss = loss_B.mean()
        return (loss, logits) if return_outputs else loss


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    """Calls a function after each step."""

    def __init__(self, step_done: Callable[[], Any]) -> None:
        self.step_done = step_done

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each step."""
        self.step_done()
