"""The report of a sweep: students as means over seeds, and the Pareto fronts.

A student is on the front of latency (or size) if no other one is as fast (as small) and as good,
and strictly better in one of the two. There is a front for each measure of quality. Students of
one architecture are equally fast: their latencies differ by noise, so the front takes their mean.
"""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilcache.pipeline.report.plot import (
    COLOURS,
    INK,
    Style,
    legend,
    new_figure,
    quiet_frame,
    styles_of,
)
from distilcache.pipeline.report.table import how_compared, measured_on, not_alike
from distilcache.pipeline.report.text import (
    markdown_table,
    short_count,
    spread_of,
    text_table,
    with_sd,
)
from distilcache.pipeline.report.write import write_files
from distilcache.stages.models.families import shape_of
from distilcache.stages.student_train.output import FREE_FIELDS, UNSAID, read_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("mlm_nll", "mlm_top1", "teacher_kl", "teacher_top1_agreement", "ece", "latency_ms",
           "tokens_per_s")  # fmt: skip
"""What is averaged over seeds."""
COSTS = {"latency": "latency of one sequence, ms", "size": "parameters, millions"}
"""Axes against which quality is drawn, with their labels."""
QUALITIES = {
    "mlm_nll": (1, "held-out MLM loss, nats  (lower is better)"),
    "teacher_top1_agreement": (-1, "agreement with the teacher  (higher is better)"),
}
"""Measures of quality: 1 where low values are good, -1 where high ones are; their labels."""
HEADINGS = ("student", "role", "seeds", "params", "MB", "MLM loss", "top-1", "KL to teacher",
            "agreement", "latency ms", "tokens/s", "front by loss",
            "front by agreement")  # fmt: skip

Row = dict[str, Any]


def write_sweep(result: Mapping[str, Any], students: Path, out: Path) -> None:
    """Write ``sweep.md``, ``sweep.json`` and ``pareto.png``; remove them if nothing is to compare.

    Args:
        result: What ``evaluate_models`` returned.
        students: Folder of the students with their ``training.json``.
        out: Report folder.
    """
    rows = sweep_rows(result["models"], students)
    if sum(row["role"] != "teacher" for row in rows) < 2:
        for name in ("sweep.json", "sweep.md", "pareto.png"):
            (out / name).unlink(missing_ok=True)
        return
    values = {"heldout": result["heldout"], "machine": result["machine"], "rows": rows}
    page = f"# Students of one cache\n\n{sweep_table(rows, markdown=True)}\n\n{_NOTES}\n"
    page += "".join(f"{text}\n\n" for text in (*not_alike(result), *how_compared(result)))
    page += f"{measured_on(result)}\n\n![Quality against latency and size](pareto.png)\n"
    pictures = {"pareto.png": pareto_figure(rows)}
    write_files(out / "sweep", page=page, values=values, pictures=pictures)


_NOTES = """\
Mean and standard deviation over seeds; report.md says what the other columns are good for.
**front**: no other student is both as fast (latency), or as small (size), and as good, in held-out
MLM loss or in agreement with the teacher. To choose a student, read the front by agreement: a
control can lead in MLM loss because it has adapted to this text.
"""


def sweep_rows(models: Sequence[Mapping[str, Any]], students: Path) -> list[Row]:
    """One row for all models that differ in their seed alone.

    Returns:
        Per row ``name``, ``role``, ``seeds``, ``params``, ``size_mb``, each of ``FIGURES`` as
        ``mean`` and ``sd`` (None for a single seed), ``cost`` (its place on each axis of
        ``COSTS``), and ``front``: by measure of quality, the axes on whose front it lies.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    names: dict[str, str] = {}
    for model in models:
        key, name = _identity(model, students)
        groups.setdefault(key, []).append(model)
        names.setdefault(key, name)
    shared = Counter(names.values())  # by students whose other settings differ
    rows = [
        _row(names[key] if shared[names[key]] == 1 else str(group[0]["name"]), group)
        for key, group in groups.items()
    ]
    compared = [row for row in rows if row["role"] != "teacher"]
    for row in rows:
        shape = _shape(row, students)
        alike = [r for r in compared if _shape(r, students) == shape] or [row]
        latency = statistics.fmean(r["latency_ms"]["mean"] for r in alike)
        row["cost"] = {"latency": latency, "size": row["params"] / 1e6}
    for quality, (sign, _) in QUALITIES.items():
        known = [row for row in compared if row[quality] is not None]
        for cost in COSTS:
            points = [(row["cost"][cost], sign * row[quality]["mean"]) for row in known]
            for index in front(points):
                known[index]["front"][quality].append(cost)
    return rows


def _identity(model: Mapping[str, Any], students: Path) -> tuple[str, str]:
    """A model's settings without its seed, and its name without it."""
    name = str(model["name"])
    if model["role"] == "teacher" or not (students / name / "training.json").is_file():
        return name, name
    settings = read_record(students / name, "evaluate")["settings"]
    said = {"vocabulary_fraction": UNSAID["vocabulary_fraction"], **settings["train"]}
    train = {name: value for name, value in said.items() if name not in FREE_FIELDS}
    seed = train.pop("seed", None)
    return json.dumps({**settings, "train": train}, sort_keys=True), name.replace(
        f"-seed{seed}", ""
    )


def _shape(row: Row, students: Path) -> tuple[int, ...]:
    """What speed depends on: parameters, and layers and heads (ALBERT's layers share parameters).

    Of a student without a configuration, parameters alone.
    """
    path = students / row["models"][0] / "config.json"
    if not path.is_file():
        return (row["params"],)
    from distilcache.stages.models.checkpoints import configuration

    shape = shape_of(configuration(path.parent, "evaluate: student"))
    return (row["params"], shape.layers, shape.heads)


def _row(name: str, models: Sequence[Mapping[str, Any]]) -> Row:
    first = models[0]
    row: Row = {"name": name, "role": first["role"], "models": [m["name"] for m in models]}
    row |= {"seeds": len(models), "params": first["params"], "size_mb": first["size_mb"]}
    for figure in FIGURES:
        known = [model[figure] for model in models if model[figure] is not None]
        row[figure] = spread_of(known) if known else None
    return {**row, "front": {quality: [] for quality in QUALITIES}}


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates (lower is better in both), by cost."""
    best = float("inf")
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        cost, loss = points[index]
        if loss < best or (found and points[found[-1]] == (cost, loss)):
            found.append(index)
            best = min(best, loss)
    return found


def sweep_table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """One line per row, in their order."""
    table = markdown_table if markdown else text_table
    return table(HEADINGS, [_cells(row) for row in rows], 2)


def _cells(row: Row) -> list[str]:
    return [
        row["name"],
        row["role"],
        str(row["seeds"]),
        short_count(row["params"]),
        f"{row['size_mb']:.1f}",
        with_sd(row["mlm_nll"], ".3f"),
        with_sd(row["mlm_top1"], ".1%"),
        with_sd(row["teacher_kl"], ".3f"),
        with_sd(row["teacher_top1_agreement"], ".1%"),
        with_sd(row["latency_ms"], ".2f"),
        with_sd(row["tokens_per_s"], ",.0f"),
        *(", ".join(row["front"][quality]) for quality in QUALITIES),
    ]


def pareto_figure(rows: Sequence[Row]) -> "Figure":
    """Quality against latency and against size, the front as a line.

    A row of panels for each measure of quality that is known.
    """
    known = [q for q in QUALITIES if any(row[q] for row in rows if row["role"] != "teacher")]
    figure = new_figure(13.0, 0.8 + 4.4 * len(known))
    grid = figure.subplots(len(known), len(COSTS), sharey="row", sharex="col", squeeze=False)
    styles = styles_of([row["role"] for row in rows])
    for panels, quality in zip(grid, known, strict=True):
        for axes, cost in zip(panels, COSTS, strict=True):
            _panel(axes, rows, styles, cost, quality)
        panels[0].set_ylabel(QUALITIES[quality][1], color=INK)
    for axes, label in zip(grid[-1], COSTS.values(), strict=True):
        axes.set_xlabel(f"{label}  (left is better)", color=INK)
    grid[0, 0].set_title("Mean and sd over seeds; line: Pareto front", loc="left", color=INK)
    legend(figure, styles, [row["name"] for row in rows])
    return figure


def _panel(
    axes: "Axes", rows: Sequence[Row], styles: Sequence[Style], cost: str, quality: str
) -> None:
    quiet_frame(axes)
    for row, style in zip(rows, styles, strict=True):
        if row[quality] is None:
            continue
        x, y, sd = row["cost"][cost], row[quality]["mean"], row[quality]["sd"]
        axes.errorbar(x, y, yerr=sd, fmt="none", ecolor=COLOURS[row["role"]], capsize=3)
        axes.scatter(x, y, s=64, alpha=0.85, zorder=3, **style)
    on_front = [row for row in rows if cost in row["front"][quality]]
    best = sorted((row["cost"][cost], row[quality]["mean"]) for row in on_front)
    axes.step(*zip(*best, strict=True), where="post", color=COLOURS["student"], alpha=0.6, zorder=1)
    axes.margins(x=0.1, y=0.12)
