"""Two pictures side by side: what is retained of the teacher against latency and against size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.report.plot import COLOURS, INK, QUIET, as_png, new_figure, quiet_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTILLED = "distilled twice"
_COLOURS = {**COLOURS, DISTILLED: "#009E73"}
_PANELS = (("latency_ms", "latency of one sequence, ms"), ("size_mb", "size in float32, MB"))


def draw_retention(result: Mapping[str, Any]) -> bytes:
    """Draw the plot and return it as a PNG.

    Args:
        result: What :func:`stages.tasks.run.run_tasks` returned. Without a teacher the score
            itself takes the place of what is retained.
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
    _legend(right, models)
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
        axes.annotate(
            model["name"],
            (x, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
            zorder=5,
        )
    axes.margins(x=0.25, y=0.15)


def _kind(model: Mapping[str, Any]) -> str:
    return DISTILLED if model["distilled"] else str(model["role"])


def _legend(axes: "Axes", models: Sequence[Mapping[str, Any]]) -> None:
    """Kinds that are present, outside the field of dots."""
    present = {_kind(model) for model in models}
    for kind, colour in _COLOURS.items():
        if kind in present:
            axes.scatter([], [], s=70, color=colour, label=kind)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(present),
        frameon=False,
        labelcolor=INK,
        handletextpad=0.2,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
