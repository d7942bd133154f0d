"""Evaluation on cached text that is not trained on."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import as_arguments, require
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.reading import OpenCache
from distilcache.stages.models.encoder import own_logits
from distilcache.stages.models.trimmed_ids import TrimmedIds
from distilcache.stages.student_train.assembly import batches_of, losses_around
from distilcache.stages.student_train.callbacks import MicroBatches
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.model import TERMS, DistillationModel
from distilcache.stages.student_train.signals import count_positions, required_signals
from distilcache.stages.student_train.trainer import DistillationTrainer


class EvaluatingTrainer(DistillationTrainer):
    """Trainer's evaluation, with the losses of the training.

    Shapes: ``M`` masked positions of a batch, ``V`` vocabulary.
    """

    cache: OpenCache
    train_settings: TrainConfig
    names: Mapping[str, str]
    """Arguments that are called otherwise than the fields of ``[train]``."""
    eval_batch_size: int
    trimmed: TrimmedIds | None
    """The student's ids, where it has fewer than its teacher."""
    losses_on: dict[Cache, DistillationModel]
    """By cache: the losses around the student; each cache has codecs of its own."""

    def _parts(self, given: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Which blocks are trained on and which are kept, where a fraction is; else None, None."""
        if not isinstance(given, float | int):
            return None, None
        return held_out(len(self.cache.cache.round_range(0)), given)

    def _eval_batches(self, given: Any, blocks: np.ndarray | None = None) -> Any:
        """What Trainer takes as ``eval_dataset``: batches of a cache, of several, or as given.

        Of ``blocks`` alone where these are named.
        """
        if isinstance(given, Mapping):
            return {name: self._eval_batches(cache) for name, cache in given.items()}
        if given is None or isinstance(given, CachedBatches):
            return given
        require(
            isinstance(given, OpenCache),
            "train: eval_dataset must be a cache from open_cache, a dict of caches or, where the "
            f"trainer is made, a fraction, got {given!r}",
        )
        ours, theirs = self.cache.encoding, given.encoding
        train = replace(self.train_settings, batch_size=self.eval_batch_size, streams=0)
        require(
            ours.vocab_size == theirs.vocab_size,
            f"train: eval_dataset must have the vocabulary of train_dataset ({ours.vocab_size}), "
            f"got {theirs.vocab_size}",
        )
        signals = required_signals(theirs, train, trimmed=self.trimmed is not None)
        width, other = (
            layer and layer.width for layer in (ours.hidden_layer(), theirs.hidden_layer())
        )
        require(
            not signals.cos or width == other,
            f"train: eval_dataset must have hidden states of {width} units, as train_dataset has, "
            f"got {other}; give a cache of the same teacher, or alpha_cos=0",
        )
        return batches_of(given.cache, train, signals, blocks=blocks, trimmed=self.trimmed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[dict[str, Tensor]]:
        """Batches of a cache, each sequence once.

        Args:
            eval_dataset: A cache, or the name of one of several; None: that of the constructor.
        """
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        with as_arguments(self.names):
            batches = self._eval_batches(
                self.eval_dataset if eval_dataset is None else eval_dataset
            )
        require(batches is not None, "train: eval_dataset must be given to evaluate, got None")
        batches.stop = batches.steps_per_epoch
        return self.loader(batches, MicroBatches(batches.steps_per_epoch))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[dict[str, Tensor]]:
        """The same, for ``predict``."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader[dict[str, Tensor]],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's; the loss is the mean over all positions, and so are its terms."""
        batches: CachedBatches = dataloader.dataset  # type: ignore[assignment]
        kept = self.losses, self._means
        if self._clock is not None:
            self._tick()
        self.losses, self._means = self._losses(batches.cache), self._means.empty()
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            terms = self._means.take()
        finally:
            self.losses, self._means = kept
            if self._clock is not None:  # The rate is that of training.
                self._clock = time.perf_counter()
        output.metrics.update({f"{metric_key_prefix}_{n}": value for n, value in terms.items()})
        return output._replace(num_samples=batches.layout.sequences)

    def _losses(self, cache: Cache) -> DistillationModel:
        if cache not in self.losses_on:
            train = replace(self.train_settings, vocabulary_fraction=1.0)
            signals = required_signals(cache.encoding, train, trimmed=self.trimmed is not None)
            made = losses_around(self.model, cache, train, signals, self.trimmed)
            made.projection = self.losses.projection
            self.losses_on[cache] = made.to(self.args.device)
        return self.losses_on[cache]

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of a batch; the student's logits at the masked positions, and the tokens there."""
        counts = count_positions(inputs)
        self._means.count([counts[term] for term in TERMS])
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs, num_items_in_batch=counts)
            if prediction_loss_only:
                return loss, None, None
            with self.accelerator.autocast():
                logits_MV = own_logits(
                    self.model,
                    inputs["input_ids"],
                    inputs.get("attention_mask"),
                    inputs["masked_index"],
                )
        return loss, logits_MV.float(), inputs["labels"]


def held_out(blocks: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of a round are trained on, and which are not: these lie evenly among them.

    Raises:
        UserError: The fraction leaves none of them.
    """
    count = max(1, round(fraction * blocks))
    require(
        0 < fraction < 1 and count < blocks,
        f"train: eval_dataset must be a fraction that leaves some of the cache's {blocks} blocks "
        f"to train on, got {fraction}; give a cache of other text instead",
    )
    kept = (2 * np.arange(count) + 1) * blocks // (2 * count)
    return np.setdiff1d(np.arange(blocks), kept), kept
