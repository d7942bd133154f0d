"""One training by Trainer, from its newest checkpoint to its last step."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from distilcache.data.errors import Stopped, require
from distilcache.data.storage.files import read_json
from distilcache.stages.student_train.arguments import total_steps, training_arguments
from distilcache.stages.student_train.asked import Run
from distilcache.stages.student_train.callbacks import (
    MetricsCallback,
    ProgressCallback,
    StopCallback,
    reporters,
)
from distilcache.stages.student_train.checkpoint_folders import (
    PREFIX,
    complete_checkpoints,
    newest_sound,
    step_of,
)
from distilcache.stages.student_train.model import TERMS, DistillationModel
from distilcache.stages.student_train.ranks import Ranks, ending_together, say
from distilcache.stages.student_train.trainer import Batches, DistillationTrainer


def fit(
    module: DistillationModel,
    dataset: Batches,
    run: Run,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Train, from the newest complete checkpoint where there is one.

    All ranks call it; the first one writes.

    Returns:
        steps, seconds, tokens, tokens_per_s and the last logged loss terms.

    Raises:
        Stopped: A signal ended the run at a checkpoint.
        UserError: The loss is no longer finite.
    """
    train, out = run.train, run.out
    steps = total_steps(train, dataset.steps_per_epoch)
    newest = newest_checkpoint(out / "checkpoints", ranks)
    done = step_of(newest) if newest else 0
    if done:
        say(f"{run.label}: goes on from step {done} of {steps}")
    # Inside StopCallback: torchrun's signal must not end this rank before it says what was lost.
    with StopCallback(ranks) as stop, ending_together(), _shown(run, ranks, done + 1) as shown:
        trainer = DistillationTrainer(
            module,
            training_arguments(train, steps=steps, out=out, device=device, dtype=dtype),
            dataset,
            [*shown, stop],
            ranks,
        )
        trainer.remove_callback(PrinterCallback)  # Of disable_tqdm.
        if newest is not None and done >= steps:  # Only the export is missing.
            trainer.restore(newest)
            state = read_json(newest / "trainer_state.json", "train: checkpoint")
            trainer.state.log_history = state["log_history"]
        else:
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if stop.stops and trainer.state.global_step < steps:
        raise Stopped(
            f"train: stopped by {stop.received} at step {trainer.state.global_step} of {steps}, "
            "checkpoint saved; the same command goes on from there",
            stop.number,
        )
    last = trainer.last_losses
    return {
        "steps": steps,
        "seconds": round(trainer.seconds, 3),
        "tokens": trainer.tokens,
        "tokens_per_s": round(trainer.tokens / max(trainer.seconds, 1e-9), 1),
        **{name: last[name] for name in ("loss", *TERMS) if name in last},
    }


@contextlib.contextmanager
def _shown(run: Run, ranks: Ranks, first_step: int) -> Iterator[list[TrainerCallback]]:
    """What the first rank writes and prints of its steps."""
    if not ranks.is_first:
        yield []
        return
    with (
        reporters(run.train.report_to, run.out, first_step) as told,
        contextlib.closing(ProgressCallback(run.label)) as progress,
    ):
        yield [MetricsCallback(run.out / "metrics.jsonl"), *told, progress]


def newest_checkpoint(folder: Path, ranks: Ranks) -> Path | None:
    """The newest sound checkpoint that the first rank sees; all must see it."""
    sound = newest_sound(folder) if ranks.is_first else None
    step = ranks.from_first(step_of(sound) if sound else 0)
    if not step:
        return None
    newest = folder / f"{PREFIX}{step}"
    require(
        newest in complete_checkpoints(folder),
        f"train: output must be one folder for all ranks, got no {newest} on rank {ranks.rank}; "
        "choose a root that all machines share",
    )
    return newest
