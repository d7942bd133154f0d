"""Two plots side by side: the retained part of the teacher's score against latency and size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distilcache.pipeline.report.plot import (
    COLOURS,
    INK,
    QUIET,
    as_png,
    legend,
    new_figure,
    quiet_frame,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTILLED = "distilled twice"
_COLOURS = {**COLOURS, DISTILLED: "#009E73"}
_PANELS = (("latency_ms", "latency of one sequence, ms"), ("size_mb", "size in float32, MB"))


def draw_retention(result: Mapping[str, Any]) -> bytes:
    """Draw the plot and return it as a PNG.

    Args:
        result: What ``run_tasks`` returned. Without a teacher the plot
            shows the score itself.
    """
    models = result["models"]
    figure = new_figure(10.0, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    retained = all(model["retention"] is not None for model in models)
    name = "retention" if retained else "macro"
    for axes, (field, words) in zip((left, right), _PANELS, strict=True):
        _panel(axes, models, field, name)
        axes.set_xlabel(f"{words}  (left is better)", color=INK)
    what = "retained of the teacher's macro score" if retained else "macro score"
    left.set_ylabel(f"{what}, %" if retained else f"{what} x 100", color=INK)
    tasks, seeds = ", ".join(result["tasks"]), len(result["settings"]["seeds"])
    left.set_title(
        f"{tasks}: median of {seeds} seeds, lowest to highest" if seeds > 1 else tasks,
        loc="left",
        color=INK,
        fontsize=12,
        pad=10,
    )
    legend(right, _COLOURS, {_kind(model) for model in models})
    return as_png(figure)


def _panel(axes: "Axes", models: Sequence[Mapping[str, Any]], field: str, name: str) -> None:
    """A dot per model; a thin line spans the seeds."""
    quiet_frame(axes)
    if name == "retention":
        axes.axhline(100, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    for model in models:
        colour = _COLOURS[_kind(model)]
        x, y = model[field], 100 * model[name]
        ends = [100 * model[f"{name}_low"], 100 * model[f"{name}_high"]]
        axes.plot([x, x], ends, color=colour, linewidth=1.6, alpha=0.7, zorder=3)
        axes.scatter(x, y, s=90, color=colour, edgecolor="white", linewidth=1.2, zorder=4)
    axes.set_xlim(0, 1.3 * max(model[field] for model in models))
    axes.margins(y=0.15)
    _labels(axes, [(model[field], 100 * model[name], model["name"]) for model in models])


def _labels(axes: "Axes", dots: Sequence[tuple[float, float, str]]) -> None:
    """Names to the right of their dots, moved up where they would overlap."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    line, width = 0.045 * (high - low), 0.3 * (right - left)
    placed: list[tuple[float, float]] = []
    for x, y, name in sorted(dots, key=lambda dot: dot[1]):
        near = [above + line for at, above in placed if abs(at - x) < width]
        level = max([y, *near])
        placed.append((x, level))
        axes.annotate(
            name,
            (x + 0.02 * (right - left), level),
            va="center",
            fontsize=9,
            color=INK,
            zorder=5,
        )


def _kind(model: Mapping[str, Any]) -> str:
    return DISTILLED if model["distilled"] else str(model["role"])
