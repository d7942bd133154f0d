"""What was measured, in the model cards of the students."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilcache.pipeline.report.table import HEADINGS, how_compared, measured_on, table_rows
from distilcache.pipeline.report.text import markdown_table

METRICS = {
    "mlm_nll": ("loss", "cross-entropy at masked positions, nats"),
    "mlm_top1": ("accuracy", "masked tokens ranked first"),
    "teacher_kl": ("kl_divergence", "KL(teacher || student), nats"),
    "teacher_top1_agreement": ("agreement", "first choices that are the teacher's"),
}
"""Figures that hubs read: their fields in a report, types and names in a card."""


def write_cards(
    result: Mapping[str, Any], students: Path, name: str, datasets: Sequence[str]
) -> None:
    """Add the figures of an evaluation to the cards of what was trained here.

    Args:
        result: What ``evaluate_models`` returned.
        students: Folder of the students, by their names.
        name: Of the project, whose held-out text this is.
        datasets: Hub ids of the data sets that the text comes from; none: files.
    """
    from huggingface_hub import EvalResult

    from distilcache.stages.models.cards import add_results

    teachers = [model for model in result["models"] if model["role"] == "teacher"]
    rows = table_rows(result["models"])
    for model, row in zip(result["models"], rows, strict=True):
        folder = students / model["name"]
        if model["role"] == "teacher" or not (folder / "training.json").is_file():
            continue
        found = [
            EvalResult(
                task_type="fill-mask",
                dataset_type=datasets[0] if datasets else "text",
                dataset_name=f"held-out text of {name}",
                metric_type=kind,
                metric_name=meaning,
                metric_value=round(model[field], 5),
            )
            for field, (kind, meaning) in METRICS.items()
            if model[field] is not None
        ]
        table = markdown_table(HEADINGS, [*rows[: len(teachers)], row], 2)
        lines = [table, "", *how_compared(result), measured_on(result)]
        add_results(folder, found, lines)
