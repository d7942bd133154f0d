"""Scores on tasks, and what is retained of the teacher's, as tables."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from distilcache.pipeline.report.pareto import front
from distilcache.pipeline.report.table import machine_line
from distilcache.pipeline.report.text import markdown_table, number, short_count, text_table

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""

_SHAPE = ("params", "layers", "heads")
"""What speed depends on."""
_NOTES = """\
- **Score**: 100 times the mean of the task's metrics ({metrics}) on its held-out part; the median
  over the seeds {seeds}, with half the distance between the lowest and the highest.
- **Macro**: the mean over tasks; its spread is that of the mean, seed by seed.
- **Retained**: a model's score as a fraction of the teacher's median.
- **Majority**: the most frequent training label as the answer to everything.
- **+distil**: fine-tuned from labels and from the fine-tuned teacher's logits on the same
  examples{copies}.
- **Front**: no other student has both as low a latency (as small a size) and as good a macro score;
  models of one shape count with the mean of their latencies.
- **Latency**: median of one sequence of {length} tokens through the whole task model; **size**:
  its weights in float32.
"""


def format_tasks(result: Mapping[str, Any]) -> str:
    """Both tables for a terminal, with a line on what was measured."""
    tables = [text_table(*score_table(result), 2), text_table(*retention_table(result))]
    return "\n\n".join([*tables, tasks_measured_on(result)])


def tasks_page(result: Mapping[str, Any], name: str, command: str) -> str:
    """The report as Markdown."""
    first = next(iter(result["tasks"].values()))
    metrics = "; ".join(
        f"{task}: {', '.join(facts['metrics'])}" for task, facts in result["tasks"].items()
    )
    seeds = ", ".join(map(str, result["settings"]["seeds"]))
    return "\n".join(
        [
            f"# {name}: teacher and students on tasks",
            "",
            "## What is retained of the teacher's score",
            "",
            markdown_table(*retention_table(result)),
            "",
            "![Retention against latency and size](tasks.png)",
            "",
            "## Scores",
            "",
            markdown_table(*score_table(result), 2),
            "",
            tasks_measured_on(result),
            "",
            "## How to read it",
            "",
            _NOTES.format(
                metrics=metrics,
                seeds=seeds,
                length=first["max_length"],
                copies=_copies(result["settings"]),
            ),
            "## Settings",
            "",
            f"`{command}` with",
            "",
            "```json",
            json.dumps(result["settings"], indent=1),
            "```",
            "",
        ]
    )


def _copies(settings: Mapping[str, Any]) -> str:
    """What else the distilled models learn from, and for how long."""
    count, epochs = settings["distil_copies"], settings["distil_epochs"]
    also = (
        f", and on {count} altered copies of each, whose replaced tokens the teacher's masked LM "
        "drew, from its logits alone"
        if count
        else ""
    )
    weight = settings["distil_cos"]
    cos = f"; L_cos on [CLS] with weight {weight:g}" if weight else ""
    cos += "" if settings["distil_dropout"] else "; without dropout"
    passes = f"{epochs:g} passes over all of these" if epochs else "as many steps as without"
    least = settings["distil_min_steps"]
    passes += f", at least {least:,} steps" if least else ""
    return f"{also}{cos}; {passes}"


def tasks_measured_on(result: Mapping[str, Any]) -> str:
    """One line: examples and machine."""
    counts = "; ".join(
        f"{name}: {facts['train']:,} for training, {facts['dev']:,} held out"
        for name, facts in result["tasks"].items()
    )
    return (
        f"Examples: {counts}. Seeds: {len(result['settings']['seeds'])}. "
        f"{machine_line(result['machine'])}"
    )


def score_table(result: Mapping[str, Any]) -> Table:
    """A row of scores per model, and one for the majority's label."""
    tasks = result["tasks"]
    rows = []
    for model in result["models"]:
        cells = [_spread(model["tasks"][t], "score") for t in tasks]
        rows.append([model["name"], model["role"], *cells, _spread(model, "macro", "macro_")])
    base = [facts["majority"] for facts in tasks.values()]
    values = [f"{100 * value:.1f}" for value in (*base, sum(base) / len(base))]
    return ["model", "role", *tasks, "macro"], [*rows, ["majority", "", *values]]


def retention_table(result: Mapping[str, Any]) -> Table:
    """A row per model: size, speed, and how much of the teacher's scores it keeps."""
    tasks, models = result["tasks"], result["models"]
    teacher = next((m for m in models if m["role"] == "teacher"), None)
    headings = ["model", "params", "MB", "latency ms", "size", "speed", *tasks, "macro retained"]
    fronts = _fronts(models)
    rows = []
    for model in models:
        size, speed = "-", "-"
        if teacher:
            size = f"{model['params'] / teacher['params']:.2f}x"
            speed = f"{teacher['latency_ms'] / model['latency_ms']:.2f}x"
        cells = [number(model["tasks"][t]["retention"], ".1%") for t in tasks]
        figures = [short_count(model["params"]), f"{model['size_mb']:.1f}"]
        figures += [f"{model['latency_ms']:.2f}", size, speed]
        rows.append([model["name"], *figures, *cells, _retained(model), fronts[model["name"]]])
    return [*headings, "front"], rows


def _fronts(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By name, the axes on whose Pareto front a model lies.

    Models of one shape are equally fast: their latencies differ by noise, so the front takes their
    mean.
    """
    found: dict[str, list[str]] = {model["name"]: [] for model in models}
    compared = [model for model in models if model["role"] != "teacher"]
    shapes = [tuple(model.get(name) for name in _SHAPE) for model in compared]
    latencies = defaultdict(list)
    for shape, model in zip(shapes, compared, strict=True):
        latencies[shape].append(model["latency_ms"])
    costs = {
        "latency": [statistics.fmean(latencies[shape]) for shape in shapes],
        "size": [model["size_mb"] for model in compared],
    }
    for axis, values in costs.items():
        points = [(cost, -model["macro"]) for cost, model in zip(values, compared, strict=True)]
        for index in front(points):
            found[compared[index]["name"]].append(axis)
    return {name: ", ".join(axes) for name, axes in found.items()}


def _spread(values: Mapping[str, Any], name: str, prefix: str = "") -> str:
    half = (values[f"{prefix}high"] - values[f"{prefix}low"]) / 2
    return f"{100 * values[name]:.1f} ±{100 * half:.1f}"


def _retained(model: Mapping[str, Any]) -> str:
    if model["retention"] is None:
        return "-"
    half = (model["retention_high"] - model["retention_low"]) / 2
    return f"{model['retention']:.1%} ±{100 * half:.1f}"
