"""What the documents name is there: fields, links, tests, and pages that follow from the code."""

import os
import re
import runpy
import subprocess
import sys
from dataclasses import is_dataclass
from importlib import import_module
from typing import get_type_hints

import click
import pytest

import distilcache
from distilcache.pipeline.cli import main
from distilcache.pipeline.recipe import Recipe
from tests.documents import PAGES, ROOT, anchors, fences, inline, is_command, name, prose

LANGUAGES = {"", "sh", "bash", "text", "python", "toml", "json"}


def test_commands_are_found_in_every_form():
    text = (
        "```\nmake a   # why\ndistilcache b \\\n  --c d     what it does\n```\n"
        "```sh\nWORKERS=3 deploy/e.sh\n```\n```\n<folder>/\n  file\n```\n```text\nmake f\n```\n"
    )
    found = [fence.commands for fence in fences(text)]
    assert found == [["make a", "distilcache b --c d"], ["WORKERS=3 deploy/e.sh"], [], []]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_known(page):
    for fence in fences(page.read_text()):
        assert fence.language in LANGUAGES, fence
        for line in fence.commands:
            assert is_command(line), f"{line!r} stands among commands and is none"


def test_the_recipes_page_is_that_of_the_code():
    page = runpy.run_path(str(ROOT / "docs/recipe_fields.py"))["page"]
    current = (ROOT / "docs/recipes.md").read_text()
    assert current == page(current), "docs/recipes.md is behind the code; run make docs"
    assert "| `seed` | whole number | `1234` | Seed of the evaluation masking. |" in current


def test_the_api_page_names_what_exists_and_is_described():
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.M)
    found = {name: getattr(import_module(module), attribute, None)
             for name in names for module, _, attribute in [name.rpartition(".")]}  # fmt: skip
    assert len(found) > 10
    assert [name for name, value in found.items() if not getattr(value, "__doc__", None)] == []
    assert {n.rpartition(".")[2] for n in names} >= set(distilcache.__all__) - {"UserError"}


def test_the_site_has_every_page():
    named = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == [page.name for page in PAGES if page.parent.name == "docs"]


def test_the_site_is_built(tmp_path):
    for package in ("mkdocs", "mkdocstrings_handlers.python", "mkdocs_click"):
        pytest.importorskip(package, reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "commands.html").read_text()
    for command in main.commands.values():
        assert f"distilcache {command.name}" in shown
        for option in command.params:
            assert isinstance(option, click.Argument) or option.opts[0] in shown
    assert "distilcache.open_cache" in (tmp_path / "api.html").read_text()


def recipe_fields() -> set[str]:
    found = set()

    def walk(config, prefix):
        for field, kind in get_type_hints(config).items():
            found.add(f"{prefix}{field}")
            if is_dataclass(kind):
                walk(kind, f"{prefix}{field}.")

    walk(Recipe, "")
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "api.md"], ids=name)
def test_recipe_fields_exist(page):
    text = page.read_text()
    known = recipe_fields()
    sections = "|".join(sorted({field.split(".")[0] for field in known if "." in field}))
    named = re.findall(r"--set[ =]'?([\w.]+)=", text)
    for span in inline(text):
        named += re.findall(rf"(?:^|\s)((?:{sections})\.[a-z_.]+)(?=$|[=\s\[])", span)
    for block in fences(text):
        named += re.findall(r"""SET=["']?([\w.]+)=""", block.text)
    named = [n for n in named if n.lower() != "section.field" and not n.endswith((".py", ".json"))]
    missing = set(named) - known
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = prose(page.read_text())
    found = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text)
    found += re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in found:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


WRITTEN = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "guide.md", "settings.md", "design.md",
           "engines.md", "reliability.md", "scale.md"]  # fmt: skip
"""Pages that no code makes, and no specification or record of figures."""


def test_the_readme_is_read_at_one_sitting():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name in WRITTEN], ids=name)
def test_lines_of_prose_are_short(page):
    lines = [line for line in prose(page.read_text()).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "api.md"], ids=name)
def test_source_files_named_in_the_documents_exist(page):
    files = [text for text in inline(page.read_text()) if re.fullmatch(r"[\w./-]+/\w+\.py", text)]
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_tests_named_in_the_documents_exist():
    for page in PAGES:
        for file, test in re.findall(r"([\w/]+\.py)::(test_\w+)", page.read_text()):
            path = next((p for p in (ROOT / file, ROOT / "tests" / file) if p.exists()), None)
            assert path is not None, f"{page.name}: {file}"
            assert f"def {test}" in path.read_text(), f"{page.name}: {file}::{test}"
