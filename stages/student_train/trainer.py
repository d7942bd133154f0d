"""The training loop: ``transformers.Trainer`` over cached batches.

Trainer brings the loop, the schedule, mixed precision and clipping. Its ``model`` is the student;
the losses around it are its ``model_wrapped``. Four things differ here: the dataset returns whole
batches; losses are divided by the counts of the whole step, over all micro-batches and ranks; loss
terms are summed on the device and read only at log steps; checkpoints hold no pickles
(``checkpointing.py``).
"""

import math
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from distilcache.data.errors import UserError
from distilcache.data.loader.batch import without_idle_mask
from distilcache.stages.models.anatomy import last_layer
from distilcache.stages.models.device import room_for, sent, settle
from distilcache.stages.student_train.callbacks import EpochCallback, MemoryCallback, MicroBatches
from distilcache.stages.student_train.checkpointing import CheckpointingTrainer
from distilcache.stages.student_train.generators import seed_rank
from distilcache.stages.student_train.means import LossMeans
from distilcache.stages.student_train.model import TERMS, DistillationModel
from distilcache.stages.student_train.ranks import ALONE, Ranks
from distilcache.stages.student_train.signals import count_positions, count_tokens


class Batches(Protocol):
    """Map-style dataset whose item k is the k-th micro-batch of the run."""

    steps_per_epoch: int
    stop: int | None
    """None, or the item that follows the last one of a run."""

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        """This rank's sequences of micro-batch ``k = epoch * steps_per_epoch + i``.

        The same ones whenever k is asked for.
        """


class DistillationTrainer(CheckpointingTrainer):
    """Trainer over cached batches; the module's docstring says what differs.

    Args:
        losses: The student inside its losses.
        arguments: From :func:`training_arguments`.
        dataset: Whole batches by number.
        callbacks: Added to those of every run.
        ranks: The processes that train together.
        options: Further arguments of Trainer.
    """

    loss_is_scaled_for_ga = True  # Losses are divided by the counts of the whole step.

    def __init__(
        self,
        losses: DistillationModel,
        arguments: TrainingArguments,
        dataset: Batches,
        callbacks: list[TrainerCallback],
        ranks: Ranks = ALONE,
        **options: Any,
    ) -> None:
        self.ranks = ranks
        self.losses = losses
        self.sampler = MicroBatches(dataset.steps_per_epoch)
        self._prepared: dict[torch.nn.Module, torch.nn.Module] = {}
        student = losses.student
        student_config = dict(vars(student.config))
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=dataset,
            callbacks=[EpochCallback(self.sampler, dataset), MemoryCallback(), *callbacks],
            **options,
        )
        vars(student.config).clear()  # Trainer writes its use_cache there.
        vars(student.config).update(student_config)
        settle(arguments.device)
        losses.to(arguments.device)
        if ranks.rank > 0:  # Trainer has seeded all ranks alike.
            seed_rank(arguments.seed, ranks.rank)
        self._settled = False
        self._vocabulary = 0
        weights = {term: getattr(losses.train_config, f"alpha_{term}") for term in TERMS}
        self._means = LossMeans(weights, ranks, arguments.device)
        self._begin()

    @property
    def last_losses(self) -> dict[str, Any]:
        """The newest log line with a loss, up to the best model's step if the student is that one.

        Empty before the first.
        """
        lines, best = reversed(self.state.log_history), self._best
        return next((e for e in lines if "loss" in e and (best is None or e["step"] <= best)), {})

    def train(self, *arguments: Any, **named: Any) -> TrainOutput:
        """As Trainer's.

        Raises:
            UserError: The device has no memory left.
        """
        with room_for(
            "train: the student and a batch",
            "train it anew with a smaller train.batch_size, and a train.accumulation larger by the "
            "same factor",
        ):
            return super().train(*arguments, **named)

    # The student and its losses

    def _wrap_model(
        self, model: torch.nn.Module, training: bool = True, dataloader: Any = None
    ) -> torch.nn.Module:
        """The losses around the student: what is called, in autocast, inside DDP, compiled."""
        layer: Any = last_layer(self.model)
        if getattr(layer, "gradient_checkpointing", False):
            # It computes few positions, which a second pass of this layer would not know.
            layer.gradient_checkpointing = False
        prepared = self._prepared.get(self.losses, self.losses)
        self._prepared[self.losses] = self.accelerator.prepare(prepared)
        return self._prepared[self.losses]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's; the map of L_cos is trained as well."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model or self.losses)
        return optimizer

    # Batches

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Sequences of a step, for the rates that Trainer logs: a batch is that of all ranks."""
        return int(self._train_batch_size * args.gradient_accumulation_steps)

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """A loader whose items are whole batches, in the order of the sampler."""
        return self.loader(self.train_dataset, self.sampler)

    def loader(
        self, dataset: Dataset[dict[str, Tensor]], sampler: MicroBatches
    ) -> DataLoader[dict[str, Tensor]]:
        """Whole batches in the order of a sampler, read as the arguments say."""
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_single,
            # Else the loader draws from the global generator, which changes the dropout masks.
            generator=torch.Generator(),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
        """The micro-batches of one step, and what the sum of each loss term is divided by.

        That is the count over all ranks, divided by the number of ranks: DDP takes the mean of the
        ranks' gradients and Trainer the mean of their losses, but here each rank's loss is its
        fraction of the sum.
        """
        if self._clock is None:
            self._clock = time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if self.losses.vocabulary is not None:
            step = self.state.global_step
            self._vocabulary = self.losses.vocabulary.apply(batches, step, self.ranks)
        if self.ranks.world > 1 and not self._settled:
            self._settle_buckets(batches[0])
        positions = [count_positions(batch) for batch in batches]
        mine = [sum(counted[term] for counted in positions) for term in TERMS]
        *counts, tokens = self.ranks.sum([*mine, sum(map(count_tokens, batches))])
        self.tokens += int(tokens)
        self._means.count(counts)
        return batches, {
            term: count / self.ranks.world for term, count in zip(TERMS, counts, strict=True)
        }

    def _prepare_input(self, data: Any) -> Any:
        """To the device, for which Trainer would wait, with each tensor of every batch."""
        if isinstance(data, Tensor):
            return sent(data, self.args.device)
        return super()._prepare_input(data)

    def _settle_buckets(self, batch: Mapping[str, Tensor]) -> None:
        """Run a backward pass and drop its gradients, before the first step of a process.

        After its first backward pass DDP rebuilds its buckets, in the order in which gradients
        became ready. With three or more ranks the rounding of a sum depends on its place in the
        bucket, so without this the first step after resuming would differ in the last bit.
        """
        self._settled = True
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self.model_wrapped.train()
            inputs = self._prepare_inputs(batch)
            loss, _ = self.model_wrapped(inputs, dict.fromkeys(TERMS, 1.0))
            loss.backward()
        self.model_wrapped.zero_grad()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, float] | None = None,
    ) -> Any:
        """The weighted loss; its terms are added to the means of the next log line."""
        loss, sums = model(inputs, num_items_in_batch or count_positions(inputs))
        self._means.add(sums)
        return (loss, sums) if return_outputs else loss

    @cached_property
    def _parameters(self) -> int:
        """Without embeddings; Trainer would count them at every step."""
        return int(self.model.num_parameters(exclude_embeddings=True))

    def floating_point_ops(self, inputs: Mapping[str, Tensor]) -> int:
        """Trainer's estimate."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss and the mean of each term since the last line, and tokens per second.

        Raises:
            UserError: The loss is no longer finite.
        """
        if "loss" in logs:
            logs |= self._means.take()
            if not math.isfinite(logs["loss"]):
                step = self.state.global_step
                raise UserError(
                    f"train: loss must stay finite, got {logs['loss']} at step {step}; lower "
                    "train.lr or raise train.warmup"
                )
            self._tick()
            tokens, seconds = self._logged
            if self._vocabulary:
                logs["vocabulary"] = self._vocabulary
            logs["tokens_per_s"] = (self.tokens - tokens) / max(self.seconds - seconds, 1e-9)
            self._logged = (self.tokens, self.seconds)
        super().log(logs, start_time)


def _single(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return without_idle_mask(items[0])
