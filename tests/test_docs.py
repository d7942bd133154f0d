"""What the documents tell one to type works: commands run, code runs.

Commands of README.md and docs/*.md run as they stand, page by page and in order, in a folder that
looks like a fresh clone whose recipes are tiny. A line that cannot run here must be in ``CHECKED``
with the reason; one that is neither fails.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from distilcache.pipeline.cli import main
from distilcache.pipeline.recipe import load_recipe
from tests.command_line import FLOW_RECIPE, environment, write_text
from tests.documents import PAGES, PROGRAMS, ROOT, fences, inline, is_command, lines_of, name

TINY = {"6x768": "2x32", "s3://bucket": "memory://docs", "CACHE": "runs/demo/cache"}
"""What stands in a document, and what stands for it here."""

CHECKED = {
    r"make (setup|test|lint|docs|bench|gpu-check|clean|help)\b": "sets up, or is, this test run",
    r"distilcache .*--engine (slurm|ray)": "needs a cluster: test_engines_*.py",
    r"distilcache .*--ray-address": "needs a cluster: test_engines_ray.py",
    r"([A-Z]+=\S+ )*deploy/slurm/": "needs Slurm: tests/test_deploy.py, test_engines_slurm.py",
    r"torchrun ": "several machines: test_ranks.py starts ranks as it does",
    r"sky ": "needs a cloud: tests/test_deploy.py reads the files",
    r"pip install ": "needs a network: the extra must be one of pyproject.toml",
    r"python -m benchmarks\.": "takes an hour: module and options must exist",
    r"distilcache finetune ": "needs labelled lines: tests/pipeline/test_finetune.py",
    r"distilcache .*--tasks": "needs data sets: tests/stages/test_tasks*.py",
}
"""Lines that are not run, by pattern, and why; their words are checked."""
FROM_NOTHING = ("README.md", "guide.md")
"""Pages whose first commands make what the later ones need; the others find a project made."""
LONG = r"--nproc [2-9]|--engine local|student-sweep|--workers [2-9]"
"""Lines that start processes of their own: each in a test of its own."""


def reason_of(line: str) -> str | None:
    return next((why for pattern, why in CHECKED.items() if re.match(pattern, line)), None)


# A clone with tiny recipes


@pytest.fixture(scope="session")
def clone(tmp_path_factory, small_teacher) -> Path:
    """Files that commands look for in the folder they are typed in."""
    home = tmp_path_factory.mktemp("clone")
    for part in ("Makefile", "pyproject.toml", "constraints.txt", "deploy"):
        (home / part).symlink_to(ROOT / part)
    (home / "path/to/text").mkdir(parents=True)
    write_text(home / "path/to/text/a.txt")
    shutil.copytree(small_teacher, home / "path/to/bert")
    (home / "recipes").mkdir()
    for recipe in (ROOT / "recipes").glob("*.toml"):
        tiny = FLOW_RECIPE.format(text="path/to/text/a.txt")
        if recipe.name != "demo.toml":  # They are for teachers that are there, and their tokenizer.
            tiny = tiny.replace('tokenizer = "train"\nvocab_size = 320\n', "")
        (home / "recipes" / recipe.name).write_text(tiny)
    shutil.copy(home / "recipes/own.toml", home / "my.toml")
    (home / ".venv").mkdir()
    (home / ".venv/.installed").touch()
    return home


@pytest.fixture
def at(clone, tmp_path, monkeypatch):
    """``at(made=...)``: a copy of the clone to work in; with the demo's results, or bare."""

    def enter(made: bool) -> Path:
        done = clone.parent / "made"
        if made and not done.exists():
            shutil.copytree(clone, done, symlinks=True)
            monkeypatch.chdir(done)
            run_all(["distilcache distill", "distilcache student-train --size 2x128"])
            (done / "runs/own").symlink_to("demo")
        home = tmp_path / "clone"
        shutil.copytree(done if made else clone, home, symlinks=True)
        monkeypatch.chdir(home)
        monkeypatch.setenv("DISTILCACHE_HOME", str(tmp_path / "kept"))
        return home

    return enter


def in_small(line: str) -> str:
    for large, small in TINY.items():
        line = line.replace(large, small)
    return line


def arguments_of(line: str) -> list[list[str]]:
    """Argument lists of every ``distilcache`` that a line runs, ``make``'s by its own dry run."""
    if not line.startswith("make"):
        return [shlex.split(line)[1:]]
    shown = subprocess.run(
        ["bash", "-c", f"{line} --dry-run --no-print-directory"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace("\\\n", " ")
    found = re.findall(r"^\S*/bin/distilcache (.*)$", shown, re.M)
    assert found, f"{line!r} runs no command:\n{shown}"
    return [shlex.split(arguments) for arguments in found]


def run_all(lines: list[str]) -> None:
    """Run command lines one after the other; each must end well."""
    for line in lines:
        for arguments in arguments_of(in_small(line)):
            with_recipe = "recipes/demo.toml"
            if "--recipe" not in arguments and arguments[0] not in ("verify", "publish"):
                arguments += ["--recipe", with_recipe] if takes_recipe(arguments[0]) else []
            done = CliRunner().invoke(main, arguments)
            assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"


def takes_recipe(command: str) -> bool:
    return any("--recipe" in option.opts for option in main.commands[command].params)


def check_words(line: str) -> None:
    """The parts of a line that is not run must exist all the same."""
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    program = words[0]
    if program == "make":
        assert set(words[1:]) <= targets(), line
    elif program == "distilcache" or "distilcache.pipeline.cli" in words:
        check_options(
            words[words.index("distilcache.pipeline.cli") + 1 :]
            if program != "distilcache"
            else words[1:]
        )
    elif program == "python":
        benchmark = import_module(words[2]).main
        known = {option for parameter in benchmark.params for option in parameter.opts}
        assert {word for word in words[3:] if word.startswith("--")} <= known, line
    elif program == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", line)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in ",".join(extras).split(","):
            assert not extra or extra in known["optional-dependencies"], line
    else:
        for word in words:
            assert not word.startswith("deploy/") or (ROOT / word).exists(), line


def check_options(arguments: list[str]) -> None:
    """Parse a command line without running it."""
    command = main.commands[arguments[0]]
    given = [in_small(word) for word in arguments[1:]]
    context = command.make_context(arguments[0], given)
    for text in context.params.get("overrides", ()):
        load_recipe(None, [text])


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


# Commands


@pytest.mark.parametrize("page", [p for p in PAGES if lines_of(p)], ids=name)
def test_commands_run(page, at):
    at(made=page.name not in FROM_NOTHING)
    lines = lines_of(page)
    for line in lines:
        if reason_of(line) or re.search(LONG, line):
            check_words(line)
        else:
            run_all([line])


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    sorted({x for p in PAGES for x in lines_of(p) if re.search(LONG, x) and not reason_of(x)}),
)
def test_long_commands_run(line, at):
    """In a process of their own, since they start others.

    Every run of the tests parses these lines; that such commands work is seen in test_wheel.py
    (``--nproc``, ``--workers``) and test_sweep.py.
    """
    at(made=True)
    for arguments in arguments_of(in_small(line)):
        if "--recipe" not in arguments:
            arguments += ["--recipe", "recipes/demo.toml"]
        done = subprocess.run(
            [sys.executable, "-m", "distilcache.pipeline.cli", *arguments],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_newcomers_path_word_for_word(tmp_path):
    """The first section of the README on a fresh clone, nothing made small; needs a network."""
    home = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(home)], check=True)
    section = re.split(r"^## ", (home / "README.md").read_text(), flags=re.M)[1]
    lines = [line for fence in fences(section) for line in fence.commands]
    assert lines == ["make distill"]
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=home, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 0, done.stderr.decode()
    assert (home / "runs/demo/report/report.md").is_file()
    # By its path, unless another environment's is on the PATH.
    assert re.search(rb"\nnext: (\.venv/bin/)?distilcache view runs/demo/cache", done.stderr)


def test_reasons_are_of_lines_that_are_there():
    lines = [line for page in PAGES for line in lines_of(page)]
    lines += [text for page in PAGES for text in inline(page.read_text())]
    for pattern in CHECKED:
        if "tasks" not in pattern:
            assert any(re.match(pattern, line) for line in lines), pattern


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_within_sentences_exist(page):
    for text in inline(page.read_text()):
        if not is_command(text) or "..." in text or text in PROGRAMS:
            continue
        words = text.split()
        if words[0] == "make":
            assert words[1] in targets(), text
        elif words[0] == "distilcache" and words[1] in main.commands:
            known = {o for p in main.commands[words[1]].params for o in p.opts}
            assert {w for w in words if w.startswith("--")} <= known, text
        elif words[0] == "distilcache":
            assert words[1].startswith("--"), text
        elif text.startswith("python -m benchmarks."):
            check_words(text)


# Python


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(f.language == "python" for f in fences(p.read_text()))],
    ids=name,
)
def test_python_runs(page, at, capsys):
    home = at(made=True)
    code = "\n".join(f.text for f in fences(page.read_text()) if f.language == "python")
    exec(compile(code, page.name, "exec"), {"__name__": "notebook"})
    if "runs/notebook/2x128" in code:
        assert (home / "runs/notebook/2x128/model.safetensors").is_file()
        assert "tokens in" in capsys.readouterr().out
