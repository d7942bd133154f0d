"""Trainer callbacks: order of epochs, log files, progress, stop signals."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from distilcache.data.errors import UserError, one_line
from distilcache.data.progress import Bar
from distilcache.data.storage.files import unwritable, write_bytes
from distilcache.stages.models.device import FreedMemory
from distilcache.stages.student_train.model import TERMS
from distilcache.stages.student_train.ranks import ALONE, Ranks

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class MicroBatches:
    """Batch sampler: yields the numbers of one epoch's micro-batches, one at a time."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches per epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Global micro-batch numbers, each as a batch of one item."""
        first = self.epoch * self.steps_per_epoch
        yield from ([k] for k in range(first, first + self.steps_per_epoch))


class EpochCallback(TrainerCallback):  # type: ignore[misc]
    """Sets the sampler's epoch, also when a run is resumed, and where the dataset's items end.

    Trainer sets it only for samplers of its own types: a run resumed in a later epoch would
    silently read the order of the first one.
    """

    def __init__(self, sampler: MicroBatches, dataset: Any) -> None:
        self.sampler = sampler
        self.dataset = dataset

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Log and save at the intervals of this run, not at those of the checkpoint."""
        state.compute_steps(args, state.max_steps)
        each, size = self.sampler.steps_per_epoch, args.gradient_accumulation_steps
        epochs, rest = divmod(state.max_steps, math.ceil(each / size))
        self.dataset.stop = epochs * each + rest * size

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Set the epoch before the loader is iterated."""
        self.sampler.set_epoch(int(state.epoch or 0))


class MemoryCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps the process's memory near what a step needs."""

    def __init__(self) -> None:
        self.freed = FreedMemory()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Give memory back where much is free."""
        self.freed.give_back()


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """``metrics.jsonl``: one line per log step, each with the loss and its terms.

    A resumed run first rewrites the file from the checkpoint's history, so that lines logged after
    the checkpoint are not there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Start from the history of the checkpoint."""
        lines = [_line(entry) for entry in state.log_history if "loss" in entry]
        write_bytes(self.path, "".join(lines).encode())

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any, **_: Any) -> None:
        """Append one line."""
        if "loss" in logs:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_line({**logs, "step": state.global_step}))
            except OSError as error:  # the one of a full disk does not name the file
                raise unwritable(self.path, error) from None


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"


@contextlib.contextmanager
def event_writer(folder: Path, first_step: int) -> Iterator[SummaryWriter]:
    """TensorBoard's events of a run.

    TensorBoard drops older points from ``first_step`` on; they are logged again.

    Raises:
        UserError: The disk is full. Events are written in a thread, which would print a traceback
            of its own and name no file.
    """
    failures: list[OSError] = []
    show = threading.excepthook

    def keep(failed: threading.ExceptHookArgs) -> None:
        of_events = type(failed.thread).__module__.startswith("tensorboard.")
        if of_events and isinstance(failed.exc_value, OSError):
            failures.append(failed.exc_value)
        else:
            show(failed)

    threading.excepthook = keep
    try:
        writer = SummaryWriter(str(folder), purge_step=first_step)
        try:
            yield writer
        finally:
            try:
                writer.close()
            except OSError as error:
                failures.append(error)
    finally:
        threading.excepthook = show
        if failures:
            raise unwritable(folder, failures[0]) from None


@contextlib.contextmanager
def reporters(names: Sequence[str], out: Path, first_step: int) -> Iterator[list[TrainerCallback]]:
    """Trainer's callbacks of these names; nothing leaves this machine unless variables say so."""
    variables = {
        "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": str(out.parent)},  # One per process.
        "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"},
    }
    with contextlib.ExitStack() as closing:
        found = []
        for name in names:
            if name == "tensorboard":
                writer = closing.enter_context(event_writer(out / "tensorboard", first_step))
                found.append(TensorBoardCallback(writer))
                continue
            for variable, value in variables.get(name, {}).items():
                os.environ.setdefault(variable, value)
            found.append(_named(name, INTEGRATION_TO_CALLBACK[name]()))
            if name == "wandb":  # Else the next student of this process would go on with this run.
                closing.callback(sys.modules["wandb"].finish)
        yield found


def _named(name: str, callback: TrainerCallback) -> TrainerCallback:
    """A callback that says in one line why it cannot begin."""
    begin = callback.on_train_begin

    def on_train_begin(*words: Any, **named: Any) -> None:
        try:
            begin(*words, **named)
        except Exception as error:  # Each package has types of its own.
            raise UserError(
                f"train: report_to {name!r} must be able to begin a run, got "
                f"{one_line(error)}; set what it asks for, or leave it out: the same command goes "
                "on"
            ) from None

    callback.on_train_begin = on_train_begin
    return callback


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """A progress bar on a terminal; elsewhere one plain line per log step."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None
        self._begun = (0.0, 0)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Open the bar at the step that the run starts from."""
        self._begun = (time.perf_counter(), state.global_step)
        done, total = state.global_step, state.max_steps
        self.bar = Bar(total=total, initial=done, desc=self.label, unit="step", disable=None)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Advance the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any, **_: Any) -> None:
        """Show the loss terms."""
        if "loss" not in logs or self.bar is None:
            return
        shown = {name: f"{logs[name]:.4g}" for name in ("loss", *TERMS) if name in logs}
        shown["tok/s"] = f"{logs['tokens_per_s']:,.0f}"
        if not self.bar.disable:
            self.bar.set_postfix(shown)
            return
        begun, first = self._begun
        rate = (time.perf_counter() - begun) / max(state.global_step - first, 1)
        left = round(rate * (state.max_steps - state.global_step))
        values = "  ".join(f"{name} {value}" for name, value in shown.items())
        print(
            f"{self.label}: step {state.global_step}/{state.max_steps}  {values}  "
            f"{left // 60}:{left % 60:02d} left",
            file=sys.stderr,
        )

    def close(self) -> None:
        """Close the bar, also when training stops with an error."""
        if self.bar is not None:
            self.bar.close()


class StopCallback(TrainerCallback):  # type: ignore[misc]
    """On SIGINT or SIGTERM: finish the step, save a checkpoint, stop. A second one kills.

    All ranks stop at the same step, whichever got the signal. Several ranks, and workers of a
    sweep, ignore a second signal: the process that started them passes signals on, and kills them
    in the end. Use it as a context manager around training. It also makes Trainer log the last
    step.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.received: str | None = None
        self.number = int(signal.SIGTERM)
        """Of the signal; SIGTERM where another rank got it."""
        self.stops = False
        self._ranks = ranks
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopCallback":
        """Install the handlers; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            for number in STOP_SIGNALS:
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the handlers that were there before."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.number = signal.Signals(number).name, number
        if self._ranks.world > 1 or multiprocessing.parent_process() is not None:
            return
        before: Callable[..., Any] | int | None = self._before[number]
        signal.signal(number, before if before is not None else signal.SIG_DFL)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Ask Trainer to save and stop."""
        # In the last step as well: a lost rank is found here, not where Trainer waits for it.
        stop = self._ranks.any(self.received is not None)
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif stop:
            self.received = self.received or "a signal to another rank"
            self.stops = True
            control.should_save = True
            control.should_training_stop = True
