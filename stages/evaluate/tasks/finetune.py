"""Fine-tuning with ``transformers.Trainer``, and predictions.

What Trainer is not asked to do: batches come padded from :class:`Collate`, examples of like length
meet in a batch, and the loss may have a teacher's part.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from distilcache.stages.evaluate.tasks.catalogue import SCORE, SPAN
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.features import LANES, Collate, Encoded, Soft, fit_length
from distilcache.stages.evaluate.tasks.task_losses import cos_loss, hard_loss, soft_loss
from distilcache.stages.evaluate.tasks.task_models import (
    logits_and_state_of,
    logits_of,
    takes_types,
)
from distilcache.stages.models.device import autocast, one_device, trainer_place

PROJECTION = "distil_projection"
"""Module of a task model while it learns states of another width."""
PREDICT_BATCH = 4
"""Times the batch of training: nothing is kept for a backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype
    scratch: Path
    """Folder that Trainer asks for; nothing is written to it."""

    @property
    def multiple(self) -> int:
        """What lengths are rounded up to."""
        return LANES if self.device.type == "cuda" else 1


def steps_of(examples: int, config: TasksConfig) -> int:
    """Optimizer steps over that many examples."""
    per_epoch = math.ceil(examples / config.batch_size)
    return max(1, math.ceil(config.epochs * per_epoch), config.min_steps)


def distil_steps_of(examples: int, config: TasksConfig) -> int:
    """The same of a second distillation, which reads copies of them as well."""
    if not config.distil_epochs:
        return steps_of(examples, config)
    per_pass = math.ceil(examples * (1 + config.distil_copies) / config.batch_size)
    return max(math.ceil(config.distil_epochs * per_pass), config.distil_min_steps)


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
    """Train all weights of a task model.

    Of scores it learns the standardised ones: see :func:`standardised`.

    Args:
        model: Changed in place; left on the device.
        kind: Of the task.
        train: Examples.
        config: Recipe section.
        seed: Of order and dropout.
        place: Device and type.
        steps: Optimizer steps; 0: as many as the section says.
        soft: A fine-tuned teacher's part of the loss.
        step_done: Called after each step.

    Returns:
        ``steps``, ``training_seconds``, ``tokens_per_s``, and ``padding`` as a share of all
        positions.
    """
    if place.device.type == "cpu" and getattr(model, "_supports_sdpa", False):
        # torch's fused attention with dropout is float32 on a CPU; so steps take a sixth less.
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
    """From a student's hidden states to the teacher's width; nothing where they are as wide."""
    own = model.config.hidden_size
    same = own == width
    made = nn.Identity() if same else nn.Linear(own, width, bias=False)
    model.add_module(PROJECTION, made)


def standardised(train: Encoded) -> Encoded:
    """The same examples, their scores with mean 0 and variance 1; correlations see no difference.

    A new head begins at 0. Far from the scores' mean, the first hundreds of steps would teach the
    encoder a constant, from which a small one does not always come back.
    """
    scores = train.labels.astype(np.float64)
    spread = scores.std() or 1.0
    return replace(train, labels=((scores - scores.mean()) / spread).astype(np.float32))


def predict(
    model: nn.Module, kind: str, encoded: Encoded, batch_size: int, place: Place
) -> NDArray[np.float32]:
    """Logits of all examples, [N, C] or [N, 2, L] with L of the longest; the longest go first."""
    order, batches = _batches(model, encoded, batch_size, place)
    with torch.inference_mode(), autocast(place.device, place.dtype):
        found = [logits_of(model, kind, inputs) for inputs in batches]
    if kind == SPAN:
        longest = max(part.shape[-1] for part in found)
        found = [fit_length(part, longest) for part in found]
    return _unsorted(found, order)


def predict_with_states(
    model: nn.Module, encoded: Encoded, batch_size: int, place: Place
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Logits of all examples [N, C], and their final hidden states of [CLS], [N, W]; no spans."""
    order, batches = _batches(model, encoded, batch_size, place)
    logits, states = [], []
    with torch.inference_mode(), autocast(place.device, place.dtype):
        for inputs in batches:
            logits_BC, state_BW = logits_and_state_of(model, inputs, encoded.cls)
            logits.append(logits_BC)
            states.append(state_BW.half().cpu())  # Gigabytes for the largest tasks.
    return _unsorted(logits, order), _unsorted(states, order)


def _batches(
    model: nn.Module, encoded: Encoded, batch_size: int, place: Place
) -> tuple[NDArray[np.int64], Iterator[dict[str, Tensor]]]:
    """The order in which a model in evaluation mode is to see examples, and what it takes."""
    model.eval().to(place.device)
    order = np.argsort(-encoded.lengths, kind="stable")
    collate = Collate(encoded, types=takes_types(model), multiple=place.multiple)

    def inputs() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(order), batch_size * PREDICT_BATCH):
            batch = collate(order[start : start + batch_size * PREDICT_BATCH].tolist())
            del batch["labels"]
            yield {k: v.to(place.device, non_blocking=True) for k, v in batch.items()}

    return order, inputs()


def _unsorted(parts: Sequence[Tensor], order: NDArray[np.int64]) -> NDArray[Any]:
    """Rows in the examples' own order."""
    rows = torch.cat(list(parts)).cpu().numpy()
    found = np.empty_like(rows)
    found[order] = rows
    return found


class _Counter:
    """Counts tokens and positions of the batches that pass."""

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
    one_device(arguments)
    return arguments


class _TaskTrainer(Trainer):  # type: ignore[misc]
    """Trainer over numbers of examples; see the module's docstring for what differs."""

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
        """Cross-entropy with the labels; with ``soft`` and ``states``, the teacher's parts."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        model.train(self.drops)  # Trainer calls train() before each step.
        soft, share, states = (inputs.pop(name, None) for name in ("soft", "share", "states"))
        if states is None:
            logits = logits_of(model, self.kind, inputs)
        else:
            logits, state_BW = logits_and_state_of(model, inputs, self.cls)
        loss_B = hard_loss(self.kind, logits, labels)
        if soft is not None and share is not None:
            mask, temperature = inputs["attention_mask"], self.config.distil_temperature
            soft_B = soft_loss(self.kind, logits, soft, temperature, mask)
            loss_B = share * soft_B + (1 - share) * loss_B
        if states is not None:
            projected_BW = model.get_submodule(PROJECTION)(state_BW)
            loss_B = loss_B + self.config.distil_cos * cos_loss(projected_BW, states)
        loss = loss_B.mean()
        return (loss, logits) if return_outputs else loss


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the outside that a step is done."""

    def __init__(self, step_done: Callable[[], Any]) -> None:
        self.step_done = step_done

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each step."""
        self.step_done()
