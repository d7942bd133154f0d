"""What ``distilcache evaluate --tasks`` does: models, runs, and the report's files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distilcache.data.storage.files import write_bytes
from distilcache.pipeline.recipe import Recipe

FROM_RECIPE = "recipe"
"""Stands for the recipe's ``tasks.names``."""


def tasks_command(recipe: Recipe, names: str) -> tuple[dict[str, Any], str]:
    """Fine-tune teacher, students and controls; figures go to ``<home>/tasks``.

    Args:
        recipe: The project.
        names: Tasks, separated by commas; ``recipe``: those that the recipe names.

    Returns:
        Values for JSON, and the text for people.

    Raises:
        UserError: Bad input.
    """
    config = recipe.tasks
    if names != FROM_RECIPE:
        chosen = tuple(name.strip() for name in names.split(",") if name.strip())
        config = replace(config, names=chosen)

    from distilcache.pipeline.flow import models_of
    from distilcache.pipeline.report.tasks_table import format_tasks
    from distilcache.stages.evaluate.tasks.run import run_tasks

    result = run_tasks(
        models_of(recipe), config, recipe.home / "tasks", recipe.device, recipe.dtype
    )
    _write(recipe, result)
    return result, f"{format_tasks(result)}\n\nreport: {recipe.home / 'report' / 'tasks.md'}"


def _write(recipe: Recipe, result: dict[str, Any]) -> None:
    """``tasks.png``, ``tasks.md`` and, last, ``tasks.json``."""
    from distilcache.pipeline.report.tasks_plot import draw_retention
    from distilcache.pipeline.report.tasks_table import tasks_page

    out = recipe.home / "report"
    page = tasks_page(result, recipe.name, command_of(result["settings"]["names"]))
    write_bytes(out / "tasks.png", draw_retention(result))
    write_bytes(out / "tasks.md", page.encode())
    values = json.dumps(result, indent=1, ensure_ascii=False)
    write_bytes(out / "tasks.json", (values + "\n").encode())


def command_of(names: Sequence[str]) -> str:
    """The command that made the figures, but for its recipe."""
    return f"distilcache evaluate --tasks {','.join(names)}"
