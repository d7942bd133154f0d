"""The comparison of models as rows of text: for the terminal and for Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = (
    "model",
    "role",
    "params",
    "MB",
    "MLM loss",
    "top-1",
    "KL to teacher",
    "agreement",
    "ECE",
    "latency ms",
    "tokens/s",
    "against the teacher",
)
# Columns that read as text; the others are figures and line up on the right.
_TEXT = frozenset({"model", "role", "against the teacher"})


def format_table(result: Mapping[str, Any]) -> str:
    """Aligned columns for a terminal, with a line on what was measured.

    Args:
        result: What ``evaluate_models`` returned.
    """
    rows = table_rows(result["models"])
    widths = [max(len(row[i]) for row in [HEADINGS, *rows]) for i in range(len(HEADINGS))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if heading in _TEXT else cell.rjust(width)
            for cell, width, heading in zip(cells, widths, HEADINGS, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(HEADINGS), rule, *map(line, rows), "", measured_on(result)])


def format_markdown(result: Mapping[str, Any]) -> str:
    """The same table in Markdown."""
    marks = ["---" if heading in _TEXT else "---:" for heading in HEADINGS]
    lines = [HEADINGS, marks, *table_rows(result["models"])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def measured_on(result: Mapping[str, Any]) -> str:
    """One line: held-out text and machine."""
    heldout, machine = result["heldout"], result["machine"]
    return (
        f"Held-out text: {heldout['sequences']:,} sequences, {heldout['tokens']:,} tokens, "
        f"{heldout['masked_positions']:,} masked positions. "
        f"Machine: {machine['device']}, {machine['dtype']}, {machine['threads']} threads."
    )


def table_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row of cells per model, in the order of :data:`HEADINGS`."""
    teacher = next((model for model in models if model["role"] == "teacher"), None)
    return [
        [
            model["name"],
            model["role"],
            short_count(model["params"]),
            f"{model['size_mb']:.1f}",
            f"{model['mlm_nll']:.3f}",
            f"{model['mlm_top1']:.1%}",
            _optional(model["teacher_kl"], ".3f"),
            _optional(model["teacher_top1_agreement"], ".1%"),
            f"{model['ece']:.3f}",
            f"{model['latency_ms']:.2f}",
            f"{model['tokens_per_s']:,.0f}",
            against_teacher(model, teacher),
        ]
        for model in models
    ]


def against_teacher(model: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> str:
    """Size and latency relative to the teacher, as ``0.62x params, 1.9x faster``."""
    if teacher is None or model is teacher:
        return "-"
    size = f"{model['params'] / teacher['params']:.2f}x params"
    speed = teacher["latency_ms"] / model["latency_ms"]
    if 0.95 < speed < 1.05:
        return f"{size}, as fast"
    return f"{size}, " + (f"{speed:.1f}x faster" if speed > 1 else f"{1 / speed:.1f}x slower")


def short_count(count: int) -> str:
    """``950``, ``12.3k`` or ``66.4M``."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{suffix}"
    return str(count)


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
