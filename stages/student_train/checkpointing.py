"""Trainer with the checkpoints of ``training_state.py``."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from distilcache.data.errors import require
from distilcache.data.storage.files import read_json
from distilcache.stages.models.saving import config_json, own_tensors
from distilcache.stages.student_train.checkpoint_folders import PREFIX, rotate, step_of
from distilcache.stages.student_train.generators import restore_rng, rng_state
from distilcache.stages.student_train.means import LossMeans
from distilcache.stages.student_train.model import DistillationModel
from distilcache.stages.student_train.ranks import Ranks
from distilcache.stages.student_train.training_state import (
    load_tensors,
    read_optimizer,
    read_tensors,
    read_trainer,
    write_checkpoint,
)


class CheckpointingTrainer(Trainer):  # type: ignore[misc]
    """Saves and restores the student, the map of L_cos, and the running totals of a training."""

    losses: DistillationModel
    ranks: Ranks
    tokens: int
    """Read so far."""
    seconds: float
    """Of training so far; :meth:`_tick` brings them up to date."""
    _means: LossMeans
    _clock: float | None
    _logged: tuple[int, float]
    """``tokens`` and ``seconds`` at the last log line."""
    _best: int | None
    """Step of the best model, once the student has its weights again."""

    def _begin(self) -> None:
        """Count anew: nothing of a training before this one."""
        self.tokens, self.seconds = 0, 0.0
        self._clock = None
        self._logged = (0, 0.0)
        self._best = None
        self._means = self._means.empty()

    def _tick(self) -> None:
        """Bring the running time up to date."""
        now = time.perf_counter()
        self.seconds += now - (self._clock if self._clock is not None else now)
        self._clock = now

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._tick()
        rng, means = self.ranks.gather(rng_state()), self._means.state()
        if not self.ranks.is_first:
            return
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX}{self.state.global_step}"
        best = folder / f"{PREFIX}{self.state.best_global_step}"
        if best == checkpoint or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                self._keep_state(callback)
        write_checkpoint(
            checkpoint,
            model=own_tensors(self.model),
            config=config_json(self.model),
            projection=dict(self.losses.projection.named_parameters()),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.lr_scheduler.state_dict(),
            state=dataclasses.asdict(self.state),
            totals={"tokens": self.tokens, "seconds": self.seconds},
            since_log={"from": self._logged, **means},
            rng=rng,
        )
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.save_total_limit:
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's; what it says decides alone on a checkpoint, but one may be asked for."""
        return bool(super()._determine_best_metric(metrics, trial) or self.control.should_save)

    def _keep_state(self, callback: ExportableState) -> None:
        """Put what a callback wants to find again into the state, as Trainer does."""
        kept = self.state.stateful_callbacks
        name = type(callback).__name__
        if isinstance(kept.get(name), list):
            kept[name].append(callback.state())
        else:
            kept[name] = callback.state()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        self.restore(Path(resume_from_checkpoint))

    def restore(self, checkpoint: Path) -> None:
        """Load weights and running totals.

        Raises:
            UserError: The weights are of layers with another order of attention.
        """
        _require_same_order(checkpoint, self.model.config)
        self._load_weights(checkpoint)
        self._best = None
        values = read_trainer(checkpoint)
        totals, since = values["totals"], values.get("since_log")
        self.tokens, self.seconds = int(totals["tokens"]), float(totals["seconds"])
        self._logged = (self.tokens, self.seconds)
        if since:  # Checkpoints of earlier versions lack it.
            self._logged = (int(since["from"][0]), float(since["from"][1]))
            self._means.restore(since)

    def _load_weights(self, checkpoint: Path) -> None:
        tensors = read_tensors(checkpoint, "model")
        projection = dict(self.losses.projection.named_parameters())
        if any(name.startswith("student.") for name in tensors):  # of 0.2.0
            load_tensors(self.losses.trained_tensors(), tensors)
            return
        load_tensors(own_tensors(self.model), tensors)
        if projection:
            load_tensors(projection, read_tensors(checkpoint, "projection"))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        self._load_weights(best)
        self._best = step_of(best)

    @property
    def weights_step(self) -> int:
        """The step that the student's weights are of."""
        return self.state.global_step if self._best is None else self._best

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(read_optimizer(Path(checkpoint)))
            self.lr_scheduler.load_state_dict(read_trainer(Path(checkpoint))["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_rng(Path(checkpoint), self.ranks.rank, self.args.seed)


def _require_same_order(checkpoint: Path, config: Any) -> None:
    """A ModernBERT's weights fit any order of local and global attention."""
    ours, path = getattr(config, "layer_types", None), checkpoint / "config.json"
    there = read_json(path, "train: checkpoint").get("layer_types") if path.is_file() else ours
    require(
        there == ours,
        f"train: {checkpoint} must be of a student with the same order of attention, got "
        f"layer_types {there} in place of {ours}; take the same init_layers, or train anew in "
        "another folder",
    )
