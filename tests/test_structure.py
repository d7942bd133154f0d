"""What holds for the source as a whole."""

import ast
import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import ROOT, SRC, environment

PACKAGES = ("data", "stages", "pipeline")
DOOR = SRC / "distilcache" / "__init__.py"
SOURCES = [DOOR, *sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
# Modules that may be read before a command is chosen.
LIGHT = [path for path in SOURCES if path.name in ("config.py", "__init__.py")] + [
    ROOT / "pipeline" / "cli.py",
    ROOT / "pipeline" / "recipe.py",
    ROOT / "data" / "errors.py",
]
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "matplotlib", "accelerate", "webdataset"}

# What a module of each package must not import; the longest prefix that matches counts.
FORBIDDEN = {
    "distilcache.data": ("distilcache.stages", "distilcache.pipeline", "benchmarks"),
    "distilcache.stages": ("distilcache.pipeline", "benchmarks"),
    "distilcache.stages.teacher_cache": (
        "distilcache.pipeline",
        "benchmarks",
        "distilcache.stages.student_train",
    ),
    "distilcache.stages.student_train": (
        "distilcache.pipeline",
        "benchmarks",
        "distilcache.stages.teacher_cache",
    ),
    "distilcache.pipeline": ("benchmarks",),
    "distilcache": ("distilcache.pipeline", "benchmarks"),
}


def module_name(path):
    if path == DOOR:
        return "distilcache"
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("distilcache", *parts) if parts[0] in PACKAGES else parts)


def imports(path, *, top_level_only=False):
    """Absolute dotted names that a module imports, those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path) if path.name == "__init__.py" else module_name(path.parent / "x")
    package = package.removesuffix(".x")
    names = []
    for node in _top_level(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def _top_level(tree):
    """Statements that run at import; ``if TYPE_CHECKING`` does not."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node


def within(name, package):
    return name == package or name.startswith(package + ".")


def upward_imports(path):
    name = module_name(path)
    scope = max((p for p in FORBIDDEN if within(name, p)), key=len)
    return [i for i in imports(path) if any(within(i, banned) for banned in FORBIDDEN[scope])]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_those_of_this_checkout(package):
    module = importlib.import_module(f"distilcache.{package}")
    assert Path(module.__file__).resolve().parent == ROOT / package


def test_dependencies_point_one_way():
    wrong = {module_name(path): upward_imports(path) for path in SOURCES}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_the_direction_check_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    folder = tmp_path / "stages" / "teacher_cache"
    folder.mkdir(parents=True)
    path = folder / "task.py"
    for text in (
        "import distilcache.pipeline.flow",
        "from distilcache.pipeline import flow",
        "from distilcache import pipeline",
        "from distilcache.stages import student_train",
        "from distilcache.stages.student_train.losses import x",
        "from ..student_train import losses",
        "def f():\n    from .. import student_train",
    ):
        path.write_text(text)
        assert upward_imports(path), text
    path.write_text(
        "from distilcache.data import cache\nfrom . import task\nfrom ..evaluate import x"
    )
    assert upward_imports(path) == []


def circles(graph):
    """Sets of modules that import each other in a loop: Tarjan's strongly connected components."""
    number, low, stack, found = {}, {}, [], []

    def visit(name):
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in graph[name]:
            if other not in number:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == number[name]:
            circle = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(circle) > 1 or name in graph[name]:
                found.append(circle)

    for name in graph:
        if name not in number:
            visit(name)
    return found


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other():
    paths = {module_name(path): path for path in SOURCES + BENCHMARKS}
    graph = {name: {i for i in imports(path) if i in paths} for name, path in paths.items()}
    # A package's own file names what lies below it; importing a module from it is no arrow to it.
    packages = {name for name, path in paths.items() if path.name == "__init__.py"}
    graph = {name: found - packages - {name} for name, found in graph.items()}
    assert circles(graph) == []


@pytest.mark.parametrize("path", LIGHT, ids=module_name)
def test_light_modules_import_nothing_heavy(path):
    found = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    assert found & HEAVY == set()


def test_text_waits_for_no_trainer():
    """It takes seconds to import; ``distilcache corpus`` and the parents of workers need none."""
    found = imports(ROOT / "pipeline" / "flow.py", top_level_only=True)
    late = (
        "distilcache.stages.student_train.run",
        "distilcache.stages.student_train.ranks",
        "distilcache.stages.evaluate",
    )
    assert [name for name in found if name.startswith(late)] == []


def test_progress_is_shown_in_one_way():
    """By data/progress.py, which knows what a log file needs."""
    users = {module_name(path) for path in SOURCES if "tqdm" in imports(path)}
    assert users == {"distilcache.data.progress"}


def test_the_tree_in_the_design_is_that_on_disk():
    text = (ROOT / "docs" / "design.md").read_text()
    tree = text.partition("## The tree")[2].partition("```text\n")[2].partition("```")[0]
    named = [line.split(" ")[0].rstrip("/") for line in tree.splitlines()]
    files = [*SOURCES[1:], *(ROOT / "pipeline" / "recipes").glob("*.toml")]
    assert sorted(named) == sorted({str(path.parent.relative_to(ROOT)) for path in files})


def unpickling(path):
    """Names and calls in a module that can run code out of a data file."""
    found = [n for n in imports(path) if n.split(".")[0] in ("pickle", "dill", "joblib", "shelve")]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # Tensors alone are read, and anything else is refused, where the call itself says so.
    safe = [
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(ast.unparse(keyword) == "weights_only=True" for keyword in node.keywords)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found += [] if node in safe else ["torch.load"]
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            value = node.value
            if not (isinstance(value, ast.Constant) and value.value is False):
                found.append("allow_pickle")
    return found + [name for name in imports(path) if name == "torch.load"]


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    found = {module_name(path): unpickling(path) for path in SOURCES + BENCHMARKS}
    assert {name: calls for name, calls in found.items() if calls} == {}

    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "module.py"
    for text in (
        "import pickle",
        "x = torch.load('a')",
        "x = torch.load('a', weights_only=False)",
        "load = torch.load\ntorch.save(load, weights_only=True)",
        "from torch import load",
        "f(allow_pickle=1)",
    ):
        path.write_text(text)
        assert unpickling(path), text
    path.write_text("x = torch.load('a', weights_only=True)")
    assert unpickling(path) == []


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def help_seconds():
    """Of the processor: those of the clock belong to other processes as well."""
    before = cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "distilcache.pipeline.cli", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "teacher-cache" in done.stdout
    return cpu_seconds() - before


def test_help_answers_at_once():
    # The first run may have to compile the modules.
    assert min(help_seconds() for _ in range(3)) < 0.5


def test_the_command_line_loads_nothing_heavy():
    code = f"import sys, distilcache.pipeline.cli\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
