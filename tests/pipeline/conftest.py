"""A project that was made, recipes to plan with, and the page in a browser."""

from pathlib import Path

import pytest

from distilcache.pipeline.look.page.command import view_command
from tests.command_line import FLOW_RECIPE, make_project, run, write_recipe, write_text
from tests.pipeline.look import view_support

PLANNED = {"student": {"sizes": ["2x32", "1x16"]}, "train": {"batch_size": 4}}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project that went through the whole flow once: recipe.toml and runs/tiny."""
    home = tmp_path_factory.mktemp("project")
    write_text(home / "text.txt")
    (home / "tiny.toml").write_text(FLOW_RECIPE.format(text=home / "text.txt"))
    result = run("distill", "--recipe", home / "tiny.toml", "--set", f"root={home}/runs", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    (home / "distill.json").write_text(result.stdout)
    return home


@pytest.fixture
def recipe_file(tmp_path, small_corpus, small_teacher):
    """A recipe of which nothing is made yet."""
    text = small_corpus().parent / "text.txt"
    return write_recipe(tmp_path / "recipe.toml", text, small_teacher, **PLANNED)


@pytest.fixture
def with_corpus(tmp_path, small_corpus, small_teacher):
    """The same recipe with its corpus."""
    return make_project(tmp_path, small_corpus(), small_teacher, **PLANNED)


@pytest.fixture(scope="module")
def browser():
    yield from view_support.open_browser()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, small_cache, small_teacher):
    home = tmp_path_factory.mktemp("browser") / "home"
    cache = view_support.make_project(home, small_cache(), small_teacher)
    out = home / "view.html"
    view_command(str(cache), students=[], out=out, sequences=12, seed=0, device="cpu")
    return out


@pytest.fixture
def visit(browser, page_file):
    """``visit(path=..., **context)``: the page, and a list of what went wrong on it."""
    contexts = []

    def go(path=page_file, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        contexts.append(context)
        page = context.new_page()
        page.wrong = []
        page.on("console", lambda message: page.wrong.append(message.text))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda r: r.url == path.as_uri() or page.wrong.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#list [aria-selected=true]")
        return page

    yield go
    for context in contexts:
        context.close()
