"""Two plots side by side: the retained part of the teacher's score against latency and size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distilcache.pipeline.report.plot import (
    COLOURS,
    DISTILLED,
    INK,
    QUIET,
    Style,
    legend,
    new_figure,
    quiet_frame,
    styles_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (("latency_ms", "latency of one sequence, ms"), ("size_mb", "size in float32, MB"))


def retention_figure(result: Mapping[str, Any]) -> "Figure":
    """The plot of what ``run_tasks`` returned; without a teacher it shows the score itself."""
    models = result["models"]
    figure = new_figure(11.0, 4.8)
    styles = styles_of([_kind(model) for model in models])
    left, right = figure.subplots(1, 2, sharey=True)
    retained = all(model["retention"] is not None for model in models)
    name = "retention" if retained else "macro"
    for axes, (field, words) in zip((left, right), _PANELS, strict=True):
        _panel(axes, models, styles, field, name)
        axes.set_xlabel(f"{words}  (left is better)", color=INK)
    what = "retained of the teacher's macro score" if retained else "macro score"
    left.set_ylabel(f"{what}, %" if retained else f"{what} x 100", color=INK)
    tasks, seeds = ", ".join(result["tasks"]), len(result["settings"]["seeds"])
    title = f"{tasks}: median of {seeds} seeds, lowest to highest" if seeds > 1 else tasks
    left.set_title(title, loc="left", color=INK, fontsize=12, pad=10)
    legend(figure, styles, [model["name"] for model in models])
    return figure


def _panel(
    axes: "Axes",
    models: Sequence[Mapping[str, Any]],
    styles: Sequence[Style],
    field: str,
    name: str,
) -> None:
    """A dot per model; a thin line spans the seeds."""
    quiet_frame(axes)
    if name == "retention":
        axes.axhline(100, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    for model, style in zip(models, styles, strict=True):
        colour = COLOURS[_kind(model)]
        x, y = model[field], 100 * model[name]
        ends = [100 * model[f"{name}_low"], 100 * model[f"{name}_high"]]
        axes.plot([x, x], ends, color=colour, linewidth=1.6, alpha=0.7, zorder=3)
        axes.scatter(x, y, s=90, zorder=4, **style)
    axes.set_xlim(0, 1.1 * max(model[field] for model in models))
    axes.margins(y=0.15)


def _kind(model: Mapping[str, Any]) -> str:
    return DISTILLED if model["distilled"] else str(model["role"])
