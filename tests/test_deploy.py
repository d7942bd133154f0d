"""The files in deploy/ parse, and the commands in them exist."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml

from distilcache.pipeline.cli import main
from distilcache.pipeline.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / "deploy").rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
YAML = [path for path in FILES if path.suffix == ".yaml"]


def name(path):
    return str(path.relative_to(ROOT / "deploy"))


def texts(path):
    """Every text in which a command may stand."""
    if path.suffix != ".yaml":
        yield path.read_text()
        return
    waiting = [yaml.safe_load(path.read_text())]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        else:
            waiting += value.values() if isinstance(value, dict) else []
            waiting += value if isinstance(value, list) else []


def commands(path):
    """Arguments of every ``distilcache`` that a file calls."""
    for text in texts(path):
        for line in text.replace("\\\n", " ").splitlines():
            if found := re.match(r"\s*(?:exec |srun )*distilcache (.*)", line):
                plain = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", found[1])  # as where it is not set
                yield shlex.split(plain, comments=True)


def test_the_engines_have_their_files():
    assert [name(path) for path in FILES] == [
        "kuberay/rayjob.yaml",
        "kuberay/student-sweep.yaml",
        "kuberay/student-train.yaml",
        "skypilot/corpus.yaml",
        "skypilot/student-train.yaml",
        "skypilot/teacher-cache.yaml",
        "slurm/again.sbatch",
        "slurm/corpus.sbatch",
        "slurm/evaluate.sbatch",
        "slurm/settings.sh",
        "slurm/student-train.sbatch",
        "slurm/submit.sh",
        "slurm/teacher-cache.sbatch",
    ]


@pytest.mark.parametrize("path", [p for p in FILES if list(commands(p))], ids=name)
def test_commands_are_those_of_the_command_line(path):
    for arguments in commands(path):
        command = main.commands[arguments[0]]
        # Parses every option and value without running anything.
        context = command.make_context(arguments[0], arguments[1:])
        for text in context.params["overrides"]:
            assert load_recipe(None, [text])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("slurm/corpus.sbatch", ["corpus"]),
        ("slurm/teacher-cache.sbatch", ["teacher-cache"]),
        ("slurm/student-train.sbatch", ["student-train"]),
        ("slurm/evaluate.sbatch", ["evaluate"]),
        ("kuberay/rayjob.yaml", ["teacher-cache"]),
        ("kuberay/student-train.yaml", ["student-train"]),
        ("kuberay/student-sweep.yaml", ["student-sweep"]),
        ("skypilot/corpus.yaml", ["corpus"]),
        ("skypilot/teacher-cache.yaml", ["teacher-cache"]),
        ("skypilot/student-train.yaml", ["student-train", "evaluate"]),
    ],
)
def test_each_phase_is_there(path, expected):
    assert [arguments[0] for arguments in commands(ROOT / "deploy" / path)] == expected


def test_an_option_that_does_not_exist_is_noticed():
    with pytest.raises(click.UsageError):
        main.commands["teacher-cache"].make_context("teacher-cache", ["--engines", "ray"])


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if path.suffix == ".sbatch":
        assert path.read_text().startswith("#!")


@pytest.mark.parametrize("phase", ["rayjob", "student-train", "student-sweep"])
def test_ray_jobs_run_on_workers_with_gpus(phase):
    job = yaml.safe_load((ROOT / "deploy" / "kuberay" / f"{phase}.yaml").read_text())
    assert (job["kind"], job["apiVersion"]) == ("RayJob", "ray.io/v1")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (arguments,) = commands(ROOT / "deploy" / "kuberay" / f"{phase}.yaml")
    assert arguments[1:5] == ["--engine", "ray", "--ray-address", "auto"]
    if phase == "student-train":  # all at once, or none
        assert int(arguments[arguments.index("--workers") + 1]) <= group["maxReplicas"]


SBATCH = """#!/usr/bin/env bash
echo "$ATTEMPTS $*" >> "$CALLS"
echo $((100 + $(wc -l < "$CALLS")))
"""


@pytest.mark.parametrize(
    ("arguments", "attempts", "expected"),
    [
        (
            [],
            "2",
            [
                "2 --parsable deploy/slurm/corpus.sbatch",
                "2 --parsable --dependency=afterok:101 --kill-on-invalid-dep=yes --array=0-3 "
                "deploy/slurm/teacher-cache.sbatch",
                "2 --parsable --dependency=afterok:102 --kill-on-invalid-dep=yes "
                "deploy/slurm/student-train.sbatch",
                "2 --dependency=afterok:103 --kill-on-invalid-dep=yes deploy/slurm/evaluate.sbatch",
                "1 --dependency=afternotok:102 --kill-on-invalid-dep=yes deploy/slurm/again.sbatch "
                "102",
            ],
        ),
        (
            ["teacher-cache"],
            "0",
            [
                "0 --parsable --array=0-3 deploy/slurm/teacher-cache.sbatch",
                "0 --parsable --dependency=afterok:101 --kill-on-invalid-dep=yes "
                "deploy/slurm/student-train.sbatch",
                "0 --dependency=afterok:102 --kill-on-invalid-dep=yes deploy/slurm/evaluate.sbatch",
            ],
        ),
    ],
)
def test_what_is_submitted(slurm, arguments, attempts, expected):
    slurm.run("submit.sh", *arguments, ATTEMPTS=attempts)
    assert slurm.calls() == expected


@pytest.fixture
def slurm(tmp_path):
    """A folder with deploy/slurm, an sbatch that notes its calls, and a distilcache that obeys."""

    def program(name, text):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(script, *arguments, **more):
        variables = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "CALLS": str(tmp_path / "calls"),
            "WORKERS": "4",
            **more,
        }
        script = ["bash", f"deploy/slurm/{script}", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            script, cwd=tmp_path, env=variables, text=True, stderr=pipe, start_new_session=True
        )

    def run(script, *arguments, code=0, **more):
        process = start(script, *arguments, **more)
        error = process.communicate()[1]
        assert process.returncode == code, error
        return error

    def calls():
        found = tmp_path / "calls"
        return found.read_text().splitlines() if found.exists() else []

    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    (tmp_path / "logs").mkdir()
    program("sbatch", SBATCH)
    program("distilcache", "#!/bin/sh\n$DO\n")
    return SimpleNamespace(start=start, run=run, calls=calls, program=program, folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "begun", "phases"),
    [([], False, 3), (["102"], True, 3), (["102"], False, 4)],
    ids=["the array alone", "after the corpus", "a corpus that is not finished"],
)
def test_what_is_submitted_again(slurm, arguments, begun, phases):
    """What is left, whatever the tasks ended with: an outage ends them as bad input does."""
    (slurm.folder / "logs" / "distilcache-corpus-102.log").touch()
    if begun:
        (slurm.folder / "logs" / "distilcache-teacher-cache-102-3.log").touch()
    slurm.run("again.sbatch", *arguments, ATTEMPTS="2")
    expected = ["corpus", "teacher-cache", "student-train", "evaluate"][-phases:]
    found = re.findall(r"slurm/(\S+)\.sbatch", " ".join(slurm.calls()))
    assert found == [*expected, "again"]


@pytest.mark.parametrize("phase", ["corpus", "teacher-cache", "student-train", "evaluate"])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["its shell", "all"])
def test_a_job_that_is_stopped_waits_for_its_command(slurm, phase, send):
    """Slurm sends SIGTERM to all processes of a job or to its shell; the end of the job kills those
    that are left. The command gets it once: training does not save after a second one."""
    slurm.program(
        "distilcache",
        "#!/bin/sh\ntrap 'echo >> got; sleep 0.5; touch saved; exit 143' TERM\ntouch begun\n"
        "while true; do sleep 0.05; done\n",
    )
    job = slurm.start(f"{phase}.sbatch")
    while not (slurm.folder / "begun").exists():
        time.sleep(0.02)
    send(job.pid, signal.SIGTERM)
    assert job.wait(30) == 143
    assert (slurm.folder / "saved").exists()
    assert (slurm.folder / "got").read_text() == "\n"
    job.stderr.close()
