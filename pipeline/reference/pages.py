"""All pages, and those that need no module of their own: recipe fields and commands."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import click

from distilcache.pipeline.reference.api import api_page
from distilcache.pipeline.reference.source import MADE_BY, ROOT, cell, definition, notes_of

WIDTH = 100
"""Columns of the help texts."""
TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}

RECIPES = """# Recipes

A recipe is one TOML file that describes a whole project. Every field has a default, so a recipe
names only the fields that differ. Unknown fields, values of a wrong type and values out of range
are refused before anything is written. Paths are relative to the folder where the command runs.

On the command line `--set section.field=value` overrides one field; it may be repeated. With
`make` the same goes into `SET`, separated by spaces. A value is read as TOML where it is valid
TOML, else as plain text. A list of one value may be written without brackets.

```
distilcache student-train --set train.lr=3e-4 --set 'student.sizes=["3x128", "1x64"]'
```

`[corpus]`, `[masking]`, `[teacher]` and `[cache]` decide what a cache holds. To change one of them,
give the project another `name`. The exception is `cache.rounds`, which may be raised.

`[student]` and `[train]` may differ for each student of a cache. To train a size again with other
values, use `student-sweep --vary`, or another `name` with `cache_from`.

Which setting is for which wish: [settings.md](settings.md). A project leaves these files:

```text
<root>/<name>/
  corpus/                    token blocks and the tokenizer
  teacher/                   only if the recipe trains its own teacher: masks and model
  cache/                     the teacher's signals, see format.md
  students/3x384/            a Hugging Face model, its card in README.md
    metrics.jsonl            losses, learning rate, tokens per second; the same in tensorboard/
    training.json            settings and result
    checkpoints/             the newest two
  students/3x384-control/    its control; a sweep adds 3x384-seed1/, 3x384-alpha_cos=0/ ...
  report/                    report.md, sweep.md, tasks.md, each with a .json and a plot
  tasks/                     one file per fine-tuning
  view.html                  the page of distilcache view
```
"""

COMMANDS = """# Commands

The help text (`--help`) of each command. Results go to stdout, everything else to stderr.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | bad input, or a check that failed; one line says which |
| 130, 143 | stopped by Ctrl-C or SIGTERM; the same command goes on |
| 1 | processes that train together were lost too often; the same command goes on |
"""


def pages() -> dict[str, str]:
    """Name in ``docs/`` to content."""
    return {"recipes.md": recipes_page(), "commands.md": commands_page(), "api.md": api_page()}


def recipes_page() -> str:
    """Every field of a recipe with type, default and meaning."""
    from distilcache.pipeline.recipe import Recipe

    parts = [RECIPES + "\n" + MADE_BY, _shipped(), *_sections(Recipe, "")]
    return "\n".join(parts)


def _shipped() -> str:
    """The recipes of this checkout, by their first comment."""
    lines = ["| recipe | for |", "|---|---|"]
    for path in sorted((ROOT / "pipeline" / "recipes").glob("*.toml")):
        comment = re.match(r"(?:#[^\n]*\n)*", path.read_text(encoding="utf-8"))
        words = " ".join(line.lstrip("# ") for line in (comment[0] if comment else "").splitlines())
        lines.append(f"| [{path.name}](../pipeline/recipes/{path.name}) | {cell(words)} |")
    return "\n".join(lines) + "\n"


def _sections(config: Any, name: str) -> Iterator[str]:
    """A table per section; a section within another of the same kind refers to it."""
    notes, hints = notes_of(definition(config.__module__, config.__name__)), get_type_hints(config)
    title = f"`[{name}]`" if name else "Top level"
    intro = (config.__doc__ or "").strip().splitlines()[0]
    lines = [
        f"## {title}",
        "",
        intro,
        "",
        "| field | type | default | meaning |",
        "|---|---|---|---|",
    ]
    below = []
    for field in fields(config):
        kind = hints[field.name]
        if is_dataclass(kind):
            if name:
                note = cell(notes.get(field.name, ""))
                lines.append(f"| `{field.name}` | section | as `[{field.name}]` | {note} |")
            else:
                below.append((kind, field.name))
            continue
        default = "" if field.default is MISSING else f"`{_toml(field.default)}`"
        lines.append(f"| `{field.name}` | {_type(kind)} | {default} | {cell(notes[field.name])} |")
    yield "\n".join(lines) + "\n"
    for kind, field_name in below:
        yield from _sections(kind, field_name)


def _type(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"list of {TYPES[get_args(kind)[0]]}s"
    return TYPES[kind]


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return json.dumps(value) if isinstance(value, str | bool) else f"{value!r}"


def commands_page() -> str:
    """The help of every command."""
    from distilcache.pipeline.cli import main

    parts = [COMMANDS + "\n" + MADE_BY]
    settings = {**main.context_settings, "terminal_width": WIDTH}
    parent = click.Context(main, info_name="distilcache", **settings)
    for name in main.list_commands(parent):
        command = copy.copy(main.commands[name])
        command._help_option = None  # Click keeps that of the first context, whatever it was.
        context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH)
        text = command.get_help(context)
        parts.append(f"## distilcache {name}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)
