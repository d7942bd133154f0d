"""A trainer's way on from a checkpoint, and to one when it is stopped."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from distilcache.data.errors import as_arguments, require
from distilcache.data.storage.files import make_folder
from distilcache.data.storage.locks import locked
from distilcache.stages.student_train.callbacks import StopCallback
from distilcache.stages.student_train.checkpoint_folders import MARKER, fault_of, set_later_aside
from distilcache.stages.student_train.exporting import ExportingTrainer
from distilcache.stages.student_train.fitting import newest_checkpoint


class ResumingTrainer(ExportingTrainer):
    """Trainer's ``train`` with checkpoints that are complete, in a folder of its own."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or go on from a checkpoint; a run that has taken all of its steps takes no more.

        Args:
            resume_from_checkpoint: True: the newest complete one of the output folder; or a path.
            trial: See ``transformers.Trainer.train``.
            ignore_keys_for_eval: See there.

        Raises:
            KeyboardInterrupt: A signal stopped it; a checkpoint is saved.
            InUse: Another process trains into the output folder.
        """
        with as_arguments(self.names), self._alone(), StopCallback() as stop:
            checkpoint = self._checkpoint(resume_from_checkpoint)
            if checkpoint is not None:
                state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
                steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
                if state.global_step >= steps:
                    return self._finished(checkpoint, state)
            done = 0 if checkpoint is None else state.global_step
            if self.args.save_strategy != "no":
                set_later_aside(Path(self._get_output_dir(trial)), done)
            self._begin()
            self.add_callback(stop)
            try:
                output = super().train(
                    str(checkpoint) if checkpoint else None, trial, ignore_keys_for_eval
                )
            finally:
                self.remove_callback(stop)
        if stop.stops and self.state.global_step < self.state.max_steps:
            raise KeyboardInterrupt(
                f"stopped at step {self.state.global_step} of {self.state.max_steps}, checkpoint "
                "saved; train(resume_from_checkpoint=True) goes on from there"
            )
        return output

    def _alone(self) -> AbstractContextManager[None]:
        """Lock the output folder, unless all that lies there goes to the hub."""
        if self.args.push_to_hub:
            return nullcontext()
        make_folder(self.output_dir)
        return locked(self.output_dir, "train")

    def _checkpoint(self, asked: str | bool | None) -> Path | None:
        """The checkpoint that training goes on from."""
        if not asked:
            return None
        folder = Path(self._get_output_dir(None) if asked is True else asked)
        found = folder if (folder / MARKER).is_file() else None
        if asked is True:
            found = newest_checkpoint(folder, self.ranks)
        require(
            found is not None,
            f"train: {folder} must hold a complete checkpoint, got none; call train() without "
            "resume_from_checkpoint",
        )
        fault = fault_of(folder) if found == folder else None
        require(
            fault is None,
            f"train: checkpoint must be what was written, got {folder}: {fault}; give another one",
        )
        return found

    def _finished(self, checkpoint: Path, state: TrainerState) -> TrainOutput:
        """What is left of a run that has taken all of its steps."""
        self.restore(checkpoint)
        self.state = state
        output = TrainOutput(state.global_step, self.last_losses.get("loss", 0.0), {})
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return output
