"""The wheel, installed where the working folder has modules called as ours once were."""

import compileall
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.command_line import ROOT, make_project, write_student_recipe

FOREIGN = 'WHOSE = "mine"\n'
FILES = ("data.py", "stages.py", "pipeline/__init__.py", "data/dataset.py")
SCRIPT = """
import data
from distilcache import CachedDistillationTrainer, build_student, open_cache

cache = open_cache({cache!r})
student = build_student(cache, "1x16")
trainer = CachedDistillationTrainer(
    student, train_dataset=cache, output_dir={out!r}, steps=2, batch_size=8
)
trainer.train()
trainer.save_model()
print(data.WHOSE)
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """The folder that an installer puts the wheel's files in."""
    pytest.importorskip("setuptools", minversion="77")
    home = tmp_path_factory.mktemp("wheel")
    for name in ("data", "stages", "pipeline", "src", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        ignored = {"ignore": shutil.ignore_patterns("__pycache__", "*.egg-info")}
        copy(
            ROOT / name,
            home / name,
            **({"symlinks": True, **ignored} if copy is shutil.copytree else {}),
        )
    build = "pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir dist ."
    subprocess.run([sys.executable, "-m", *build.split()], cwd=home, check=True)
    (wheel,) = (home / "dist").glob("distilcache-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(home / "site")
    compileall.compile_dir(home / "site", quiet=1)
    return home / "site"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of somebody's own code."""
    home = tmp_path / "own"
    for name in FILES:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(FOREIGN)
    return home


@pytest.fixture
def python(installed, tmp_path):
    """``python(*arguments, cwd=...)``: its output, in a process that finds the wheel alone."""

    def call(*arguments, cwd):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_it_holds_one_package_whole(installed):
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"distilcache"}
    folders = [ROOT / name for name in ("data", "stages", "pipeline")]
    ours = {path.relative_to(ROOT) for folder in folders for path in files_of(folder)}
    package = installed / "distilcache"
    there = {path.relative_to(package) for path in files_of(package)}
    assert there == ours | {Path("__init__.py"), Path("py.typed")}


def files_of(folder):
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"]


def test_no_other_name_is_taken(python, tmp_path):
    names = ("data", "stages", "pipeline", "tests", "benchmarks", "recipes")
    code = f"from importlib.util import find_spec; print([n for n in {names} if find_spec(n)])"
    assert python("-c", code, cwd=tmp_path).strip() == "[]"
    code = "import distilcache.data; print(distilcache.data.__file__)"
    assert "/site/distilcache/data/" in python("-c", code, cwd=tmp_path)


def test_a_script_beside_foreign_modules(python, folder, small_cache, tmp_path):
    script = SCRIPT.format(cache=str(small_cache()), out=str(tmp_path / "student"))
    (folder / "script.py").write_text(script)
    assert python("script.py", cwd=folder).split()[-1] == "mine"
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_a_notebook_beside_foreign_modules(python, folder, small_cache, tmp_path):
    """An interactive interpreter looks in its folder first, as a notebook's kernel does."""
    code = f"""
import data, sys
from distilcache import open_cache

print(len(open_cache({str(small_cache())!r})), sys.path[0] == "", data.WHOSE)
"""
    assert python("-c", code, cwd=folder).split()[-2:] == ["True", "mine"]


def test_two_ranks_beside_foreign_modules(python, folder, small_cache, tmp_path):
    train = {"batch_size": 8, "streams": 2, "steps": 2}
    recipe = write_student_recipe(tmp_path, small_cache(), student={"sizes": ["1x16"]}, train=train)
    command = ["student-train", "--recipe", recipe, "--nproc", 2]
    python("-m", "distilcache.pipeline.cli", *command, cwd=folder)
    assert (tmp_path / "runs/tiny/students/1x16/model.safetensors").is_file()


def test_a_worker_beside_foreign_modules(python, folder, small_corpus, small_teacher):
    recipe = make_project(folder, small_corpus(), small_teacher)
    command = ["teacher-cache", "--recipe", recipe, "--engine", "local", "--workers", 1]
    python("-m", "distilcache.pipeline.cli", *command, cwd=folder)
    assert (folder / "p/cache/manifest.json").is_file()


def test_a_recipe_by_its_name(python, tmp_path):
    words = ("plan", "--recipe", "distilbert", "--tokens", "1e9")
    assert "bert-base-uncased" in python("-m", "distilcache.pipeline.cli", *words, cwd=tmp_path)
