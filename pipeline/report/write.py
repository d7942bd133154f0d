"""The report folder: figures as JSON, a page, and the plot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilcache.data.storage.files import write_bytes
from distilcache.pipeline.report.plot import as_png, quality_latency
from distilcache.pipeline.report.table import (
    HEADINGS,
    adapted_controls,
    how_compared,
    measured_on,
    not_alike,
    table_rows,
)
from distilcache.pipeline.report.text import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = """\
- **MLM loss**: mean cross-entropy in nats at masked positions; **top-1**: fraction of masked
  tokens ranked first. Good for comparing models that learnt from the same text in the same way. A
  control can be better here than its student, even than the teacher: it learns from this text
  alone and adapts to it.
- **KL to teacher**: mean KL(teacher || model) in nats at T = 1; **agreement**: fraction of
  masked positions where both rank the same token first. Good for ranking students: how much of
  the teacher they have learnt.
- **Tasks** (`distilcache evaluate --tasks`, in tasks.md) tell what a student is worth where it
  will be used. They have the last word.
- **ECE**: expected calibration error, the mean distance between the probability of the first
  choice and the fraction of right first choices (15 bins; Guo et al. 2017). Good for those who
  use the probabilities themselves.
- **latency**: median of one sequence of {max_length} tokens through the whole masked LM, for
  requests one by one; **tokens/s**: the same at {throughput_batch} sequences per batch, for
  much text at once ({speed_in}).
"""


def write_report(result: Mapping[str, Any], out: Path, recipe: Mapping[str, Any]) -> None:
    """Write ``quality_latency.png``, ``report.md`` and, last, ``report.json``.

    Args:
        result: What ``evaluate_models`` returned.
        out: Report folder; files of an earlier report are replaced one by one.
        recipe: What the models were made with, as plain values, written with the figures.

    Raises:
        UserError: The folder cannot be written.
    """
    write_files(
        out / "report",
        page=_page(result, recipe),
        values={**result, "recipe": recipe},
        pictures={"quality_latency.png": quality_latency(result["models"])},
    )


def write_files(
    path: Path, *, page: str, values: Mapping[str, Any], pictures: Mapping[str, "Figure"]
) -> None:
    """Write pictures as PNGs, a Markdown page and, last, figures as JSON.

    Args:
        path: Page and figures without their suffixes.
        page: Markdown.
        values: Figures.
        pictures: By file name.

    Raises:
        UserError: The folder cannot be written.
    """
    text = json.dumps(values, indent=1, ensure_ascii=False, default=str)
    for name, picture in pictures.items():
        write_bytes(path.with_name(name), as_png(picture))
    write_bytes(path.with_suffix(".md"), page.encode())
    write_bytes(path.with_suffix(".json"), f"{text}\n".encode())


def _page(result: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    settings = json.dumps(recipe, indent=1, ensure_ascii=False, default=str)
    notes = [*not_alike(result), *adapted_controls(result["models"]), *how_compared(result)]
    return "\n".join(
        [
            f"# {recipe.get('name', 'distilcache')}: teacher and students side by side",
            "",
            markdown_table(HEADINGS, table_rows(result["models"]), 2),
            "",
            *(line for text in notes for line in (text, "")),
            measured_on(result),
            "",
            "![Held-out loss against latency](quality_latency.png)",
            "",
            "## How to read it",
            "",
            _COLUMNS.format(**result["machine"]),
            "## Recipe",
            "",
            "As corpus, cache and students were made; a list where students differ.",
            "",
            "```json",
            settings,
            "```",
            "",
        ]
    )
