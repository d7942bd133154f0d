"""The comparison of models as a table, for the terminal and for Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distilcache.pipeline.report.text import number, short_count, text_table

HEADINGS = ("model", "role", "params", "MB", "MLM loss", "top-1", "KL to teacher", "agreement",
            "ECE", "latency ms", "tokens/s", "against the teacher")  # fmt: skip
CONTROL_SUFFIX = "-control"
"""What the name of a control adds to its student's."""
FIRST_OF = "teacher-1-of-"
"""How the teacher's name begins where a cache is of several: it holds the first."""


def format_table(result: Mapping[str, Any]) -> str:
    """What ``evaluate_models`` returned for a terminal, with a line on what was measured."""
    table = text_table(HEADINGS, table_rows(result["models"]), 2)
    notes = [*not_alike(result), *adapted_controls(result["models"]), *how_compared(result)]
    return "\n\n".join([table, *notes, measured_on(result)])


def not_alike(result: Mapping[str, Any]) -> list[str]:
    """What students were trained with that others were not, besides seeds; nothing: no line."""
    fields = []
    for name, values in result.get("differing", {}).items():
        models: dict[str, list[str]] = {}
        for model, value in values.items():
            models.setdefault(value, []).append(model)
        found = [f"{value} ({', '.join(names)})" for value, names in models.items()]
        fields.append(f"{name} {', '.join(found)}")
    return [f"Not trained alike: {'; '.join(fields)}."] if fields else []


def adapted_controls(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """How to read controls that have a lower MLM loss than their students; none: no line."""
    losses = {model["name"]: model["mlm_nll"] for model in models if model["role"] == "student"}
    ahead = [
        model["name"]
        for model in models
        if model["role"] == "control"
        and model["mlm_nll"] < losses.get(model["name"].removesuffix(CONTROL_SUFFIX), -math.inf)
    ]
    if not ahead:
        return []
    return [
        f"Lower MLM loss than its student: {', '.join(ahead)}. A control learns from this text "
        "alone and adapts to it; a student learns to answer as its teacher does. Compare them by "
        "agreement with the teacher, and by tasks (distilcache evaluate --tasks)."
    ]


def how_compared(result: Mapping[str, Any]) -> list[str]:
    """What figures are of the first of several teachers, or of a part of the ids; none: no line."""
    several = [model for model in result["models"] if model["name"].startswith(FIRST_OF)]
    first = [
        f"The students learnt from the mean of {model['name'].removeprefix(FIRST_OF)} teachers. KL "
        "and agreement are with the first of them alone, so they say less here."
        for model in several
    ]
    return [*first, *_trimmed_vocabularies(result)]


def _trimmed_vocabularies(result: Mapping[str, Any]) -> list[str]:
    """What is compared where students have fewer ids than the teacher; none do: no line."""
    heldout, models = result["heldout"], result["models"]
    if "common_ids" not in heldout:
        return []
    most = max(model["vocabulary"] for model in models)
    fewer = [model for model in models if model["vocabulary"] < most]
    tokens = ", ".join(
        f"{model['name']} has {model['vocabulary']:,} ids and writes the held-out text in "
        f"{model['fertility']:.2f} times as many tokens"
        for model in fewer
    )
    return [
        f"Of {most:,} ids, {tokens}. Losses, top-1, KL, agreement and ECE are over the "
        f"{heldout['common_ids']:,} ids that all models have, at the "
        f"{heldout['compared_share']:.1%} of the masked positions whose token is one of them."
    ]


def measured_on(result: Mapping[str, Any]) -> str:
    """One line: held-out text and machine."""
    heldout = result["heldout"]
    return (
        f"Held-out text: {heldout['sequences']:,} sequences, {heldout['tokens']:,} tokens, "
        f"{heldout['masked_positions']:,} masked positions. "
        f"{machine_line(result['machine'])}"
    )


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    return f"Machine: {machine['device']}, {machine['dtype']}, {machine['threads']} threads."


def table_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row of cells per model, in the order of ``HEADINGS``."""
    teacher = next((model for model in models if model["role"] == "teacher"), None)
    return [
        [
            model["name"],
            model["role"],
            short_count(model["params"]),
            f"{model['size_mb']:.1f}",
            f"{model['mlm_nll']:.3f}",
            f"{model['mlm_top1']:.1%}",
            number(model["teacher_kl"], ".3f"),
            number(model["teacher_top1_agreement"], ".1%"),
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
