"""Docstrings as they stand in the source, and as Markdown.

Nothing is imported that is documented by its docstrings alone, so no library's version shows.
"""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MADE_BY = "<!-- Made by `make docs`; edit the docstrings instead. -->\n"


def definition(module: str, name: str) -> Any:
    """The definition of a name in the source of a module."""
    path = ROOT / "src" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return next(node for node in body if getattr(node, "name", None) == name)


def notes_of(node: ast.AST) -> dict[str, str]:
    """The docstring under each field of a class."""
    body = getattr(node, "body", [])
    return {
        field.target.id: note.value.value
        for field, note in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    }


def markdown(text: str) -> str:
    """Sphinx roles and double backticks as plain code."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return text.replace("``", "`")


def cell(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(markdown(text).split()).replace("|", "\\|")
