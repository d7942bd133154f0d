"""The files in deploy/ parse, and the commands in them exist."""

import re
import shlex
import subprocess
from pathlib import Path

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
        ("slurm/student-train.sbatch", ["student-train", "evaluate"]),
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
                "2 --dependency=afterok:102 --kill-on-invalid-dep=yes "
                "deploy/slurm/student-train.sbatch",
                "1 --dependency=afternotok:102 --kill-on-invalid-dep=yes deploy/slurm/again.sbatch",
            ],
        ),
        (
            ["teacher-cache"],
            "0",
            [
                "0 --parsable --array=0-3 deploy/slurm/teacher-cache.sbatch",
                "0 --dependency=afterok:101 --kill-on-invalid-dep=yes "
                "deploy/slurm/student-train.sbatch",
            ],
        ),
    ],
)
def test_what_is_submitted(tmp_path, arguments, attempts, expected):
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    subprocess.run(
        ["bash", "deploy/slurm/submit.sh", *arguments],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "CALLS": str(tmp_path / "calls"),
            "WORKERS": "4",
            "ATTEMPTS": attempts,
        },
        check=True,
    )
    assert (tmp_path / "calls").read_text().splitlines() == expected
