"""Write the tables of docs/recipes.md, every recipe and every field, from the code."""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from distilcache.pipeline.recipe import Recipe

PAGE = Path(__file__).with_name("recipes.md")
MARK = "<!-- What follows is written by docs/recipe_fields.py from the code. -->\n"
TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def page(text: str) -> str:
    """The page with its tables as the code has them now."""
    return "\n".join([text.partition(MARK)[0] + MARK, _shipped(), *_sections(Recipe, "")])


def _shipped() -> str:
    """The recipes that come with the package, each by its first comment."""
    lines = ["| recipe | for |", "|---|---|"]
    for path in sorted((PAGE.parents[1] / "pipeline/recipes").glob("*.toml")):
        comment = re.match(r"(?:#[^\n]*\n)*", path.read_text(encoding="utf-8"))
        words = " ".join(line.lstrip("# ") for line in (comment[0] if comment else "").splitlines())
        lines.append(f"| [{path.name}](../pipeline/recipes/{path.name}) | {_cell(words)} |")
    return "\n".join(lines) + "\n"


def _sections(config: Any, name: str) -> Iterator[str]:
    """A table per section; a section within another of the same kind refers to it."""
    notes, hints = _notes(config), get_type_hints(config)
    intro = (config.__doc__ or "").strip().splitlines()[0]
    lines = [f"## {f'`[{name}]`' if name else 'Top level'}", "", intro, ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    below = []
    for field in fields(config):
        kind, note = hints[field.name], notes.get(field.name, "")
        if is_dataclass(kind) and not name:
            below.append((kind, field.name))
        elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            item = get_args(kind)[1]
            below.append((item, f"{name}.{field.name}.NAME"))
            lines.append(f"| `{field.name}` | sections | none | {note} |")
        elif is_dataclass(kind):
            lines.append(f"| `{field.name}` | section | as `[{field.name}]` | {note} |")
        else:
            default = "" if field.default is MISSING else f"`{_toml(field.default)}`"
            lines.append(f"| `{field.name}` | {_type(kind)} | {default} | {note} |")
    yield "\n".join(lines) + "\n"
    for kind, section in below:
        yield from _sections(kind, section)


def _notes(config: Any) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: _cell(note.value.value)
        for field, note in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    }


def _cell(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def _type(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"list of {TYPES[get_args(kind)[0]]}s"
    if get_origin(kind) is dict:
        return "section"
    return TYPES[kind]


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return json.dumps(value) if isinstance(value, str | bool) else f"{value!r}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
