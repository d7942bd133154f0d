"""``distilcache evaluate --tasks``: fine-tune all models, and write the report."""

from dataclasses import replace
from typing import Any

from distilcache.pipeline.recipe import Recipe

FROM_RECIPE = "recipe"
"""In place of names: those of the recipe's ``tasks.names``."""


def tasks_command(recipe: Recipe, names: str) -> tuple[dict[str, Any], str]:
    """Fine-tune teacher, students and controls; figures go to ``<home>/tasks``.

    Tasks are named with commas between; ``recipe``: those that the recipe names.

    Returns:
        Values for JSON, and the text for people.
    """
    config = recipe.tasks
    if names != FROM_RECIPE:
        chosen = tuple(name.strip() for name in names.split(",") if name.strip())
        config = replace(config, names=chosen)

    from distilcache.data.storage.files import require_writable
    from distilcache.pipeline.measured import models_of
    from distilcache.pipeline.report.tasks_plot import retention_figure
    from distilcache.pipeline.report.tasks_table import format_tasks, tasks_page
    from distilcache.pipeline.report.write import write_files
    from distilcache.stages.evaluate.tasks.run import run_tasks

    entries = models_of(recipe)
    require_writable(recipe.home / "report")
    result = run_tasks(entries, config, recipe.home / "tasks", recipe.device, recipe.dtype)
    command = f"distilcache evaluate --tasks {','.join(result['settings']['names'])}"
    report = recipe.home / "report" / "tasks"
    write_files(
        report,
        page=tasks_page(result, recipe.name, command),
        values=result,
        pictures={"tasks.png": retention_figure(result)},
    )
    return result, f"{format_tasks(result)}\n\nreport: {report}.md"
