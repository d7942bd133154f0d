"""Processes that have imported everything already: forks of a server, each made in a moment.

A fork is killed, waited for and read like any process. Tests of how a process starts take
:func:`tests.command_line.start`.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import runpy
import signal
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from subprocess import TimeoutExpired

import torch
from transformers import AutoModelForMaskedLM, BertForMaskedLM, DistilBertForMaskedLM, Trainer

import distilcache.pipeline.flow
import distilcache.stages.evaluate.run
import distilcache.stages.student_train.run
import distilcache.stages.teacher_cache.pipeline
import distilcache.stages.verify.rerun
from distilcache.pipeline.cli import main
from tests.command_line import ROOT, SRC

IMPORTED = (
    AutoModelForMaskedLM, BertForMaskedLM, DistilBertForMaskedLM, Trainer,
    distilcache.pipeline.flow, distilcache.stages.evaluate.run,
    distilcache.stages.student_train.run, distilcache.stages.teacher_cache.pipeline,
    distilcache.stages.verify.rerun,
)  # fmt: skip
"""What the server imports for all."""
gc.freeze()  # no fork looks for garbage among it


@functools.cache
def server():
    """The context of its forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{SRC}:{ROOT}"
    try:
        ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({"PYTHONPATH": path} if path is not None else {})
    return context


class Forked:
    """``function(*args)`` in a process of its own, with the methods of a ``Popen``."""

    def __init__(self, function: Callable[..., object], *args, env: Mapping[str, str], cwd: Path):
        self._said = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._said]
        self._process = server().Process(
            target=_run, args=(names, dict(env), str(cwd), function, args)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def ends(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        self._process.join(seconds)
        return self.returncode is not None

    def wait(self, timeout: float | None = None) -> int | None:
        if not self.ends(timeout):
            self.kill()
            raise TimeoutExpired("fork", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, log = (Path(file.name).read_text() for file in self._said)
        return out, log

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # It has just ended.
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(recipe: Path, command: str, *options: str, env: Mapping[str, str]) -> Forked:
    """A command on a recipe, as :func:`tests.command_line.start`; its workers are forks too."""
    arguments = [command, "--recipe", str(recipe), *options]
    return Forked(_command, arguments, env=env, cwd=recipe.parent)


def _run(said, environment, folder, function, args):
    torch.set_num_threads(1)
    for number, name in enumerate(said, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    function(*args)


def _command(arguments):
    multiprocessing.get_context = lambda method: WorkersContext()
    for folder in os.environ["PYTHONPATH"].split(":"):
        if (Path(folder) / "sitecustomize.py").exists():  # see tests.command_line.watch
            runpy.run_path(str(Path(folder) / "sitecustomize.py"))
    main(arguments)


class WorkersContext(ForkContext):
    """As "spawn": a worker does not hold its parent's ends of pipes open."""

    def Pipe(self, duplex=True):  # noqa: N802
        ours, theirs = super().Pipe(duplex)
        os.register_at_fork(after_in_child=ours.close)
        return ours, theirs
