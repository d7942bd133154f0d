"""Recipes of tiny projects, the command line in processes of its own, and watching what it does.

The work that such a process does is told from a log that it appends to, whoever its parent is.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from click.testing import CliRunner, Result

from distilcache.pipeline.cli import main
from tests.builders import WORDS, random_texts

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
FLOW_RECIPE = """
[corpus]
sources = ["{text}"]
tokenizer = "train"
vocab_size = 320
max_length = 16
block_sequences = 32
heldout_fraction = 0.2
workers = 1

[teacher]
size = "2x32"

[teacher.train]
steps = 4
batch_size = 8
logging_steps = 2

[cache]
blocks_per_shard = 1
temperatures = [2.0]

[student]
sizes = ["1x32", "1x16"]
control = true

[train]
steps = 3
batch_size = 8
logging_steps = 1

[evaluate]
sequences = 16
latency_repeats = 2
"""
"""The whole flow in seconds, tokenizer and teacher included."""
PLACE = {"device": "cpu", "dtype": "float32"}
STEPS = """
def patch(module):
    plain = module.DistillationTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        with open(os.environ["WORK_LOG"], "a") as log:
            log.write(f"{os.getpid()} {self.ranks.rank} {self.state.global_step}\\n")
        time.sleep(float(os.environ["WORK_SECONDS"]))
        return plain(self, *args, **kwargs)

    module.DistillationTrainer.compute_loss = compute_loss
"""
WATCHED = '''
"""Every process that does the work: notes what it begins, then takes its time over it."""
import importlib.machinery, os, sys, time
{patch}
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "{module}":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = patched
        return spec

if "{module}" in sys.modules:  # of a fork
    patch(sys.modules["{module}"])
else:
    sys.meta_path.insert(0, Finder)
'''


def write_recipe(path, text, teacher, /, **sections):
    """A recipe whose project is made beside it; sections add to what stands here, or replace it."""
    values = {
        "corpus": {
            "sources": [str(text)],
            "max_length": 16,
            "block_sequences": 8,
            "heldout_fraction": 0.1,
            "workers": 1,
        },
        "masking": {"probability": 0.3},
        "teacher": {"model": str(teacher)},
        "cache": {"calibration_sequences": 24},
    }
    for name, settings in sections.items():
        values[name] = {**values.get(name, {}), **settings}
    return write_fields(path, {"name": "p", "root": path.parent}, values)


def write_student_recipe(folder, cache, /, **sections):
    """A recipe whose students read a cache that is there; they come below ``runs/tiny``."""
    fields = {"root": folder / "runs", "cache_from": cache}
    return write_fields(folder / "tiny.toml", fields, sections)


def write_fields(path, fields, sections):
    """A recipe of these fields and sections, for the CPU."""
    fields = {**{name: str(value) for name, value in fields.items()}, **PLACE}
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    for name, settings in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in settings.items())]
    path.write_text("\n".join([*lines, ""]))
    return path


def write_text(path, words=WORDS[:9]):
    """Documents enough for the whole flow."""
    path.write_text("\n\n".join(random_texts(80, 40, 40, words)))


def make_project(folder, corpus, teacher, /, **sections):
    """A recipe whose corpus is made already."""
    shutil.copytree(corpus, folder / "p" / "corpus")
    text = corpus.parent / "text.txt"
    return write_recipe(folder / "recipe.toml", text, teacher, **sections)


def run(*words, **options) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], **options)


def refusal(done: Result) -> str:
    """The line that a command refused with."""
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    return one_line(done.exit_code, done.stderr)


def one_line(code, log) -> str:
    """The line of a command that refused: exit code 2 and no traceback."""
    assert code == 2, log
    assert "Traceback" not in log, log
    (line,) = [line for line in log.splitlines() if line.startswith("distilcache: ")]
    return line


def environment(**more):
    """Of a process that finds this checkout, wherever it runs."""
    return {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", **more}


def start(recipe, command, *options, **process):
    """A command on a recipe, in a process of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "distilcache.pipeline.cli",
            command,
            "--recipe",
            str(recipe),
            *options,
        ],
        **{
            "cwd": recipe.parent,
            "env": environment(),
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            **process,
        },
    )


def run_alone(code, *arguments, cwd):
    """What a Python prints that cannot import this project, once it has ended well."""
    # Also where an editable install would let it.
    code = f"import sys; sys.modules['distilcache'] = None\n{code}"
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**variables, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def watch(folder, module, patch):
    """Processes with :func:`watched` as their environment call ``patch(module)`` once imported.

    Args:
        folder: That of the recipe.
        module: Name of the module that does the work.
        patch: Source of that function; it may use ``os`` and ``time``.
    """
    (folder / "watched").mkdir()
    source = WATCHED.format(patch=patch, module=module)
    (folder / "watched" / "sitecustomize.py").write_text(source)
    (folder / "log").touch()


def watch_training(folder):
    """Log every micro-batch that is begun: (pid, rank, step); see :func:`watch`."""
    watch(folder, "distilcache.stages.student_train.trainer", STEPS)


def watched(recipe, seconds=0.0, **more):
    """Environment of a process that is watched, and takes so long over each piece of work."""
    folder = recipe.parent
    return environment(
        PYTHONPATH=f"{folder / 'watched'}:{SRC}",
        WORK_LOG=str(folder / "log"),
        WORK_SECONDS=str(seconds),
        **more,
    )


def work(recipe):
    """The numbers that every piece of work was logged with: pid first."""
    return [tuple(map(int, line.split())) for line in (recipe.parent / "log").open()]


def wait_until(happened, process=None, seconds=120):
    """Look again and again, as long as the process lives."""
    deadline = time.monotonic() + seconds
    while True:
        ended = process is not None and process.poll() is not None
        if happened():  # looked for after the end, so that what it did last counts
            return
        assert not ended, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def gone(pid):
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
