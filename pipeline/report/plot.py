"""The plot of the comparison: held-out loss against latency, a dot per model."""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distilcache.pipeline.report.text import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for every kind of colour vision.
COLOURS = {"teacher": "#333333", "student": "#0072B2", "control": "#E69F00"}
INK, QUIET, GRID = "#222222", "#666666", "#E4E4E4"
# Areas in points squared: the largest model's dot, and the least that stays visible.
_LARGEST, _SMALLEST = 900.0, 40.0
# Points between dot and label.
_GAP = 5.0


def draw_quality_latency(result: Mapping[str, Any]) -> bytes:
    """Draw the plot and return it as a PNG.

    Args:
        result: What ``evaluate_models`` returned.
    """
    models = result["models"]
    figure = new_figure(8.0, 5.2)
    axes = figure.add_subplot()
    _frame(axes, models)
    _dots(axes, models)
    legend(axes, COLOURS, {model["role"] for model in models})
    _labels(axes, models)
    return as_png(figure)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of the house style; sizes in inches of 150 dots."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def as_png(figure: "Figure") -> bytes:
    """The picture's file; equal figures give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def quiet_frame(axes: "Axes") -> None:
    """Pale grid behind the data, no box around it."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#BBBBBB")


def _frame(axes: "Axes", models: Sequence[Mapping[str, Any]]) -> None:
    """Limits with room for labels, names of the axes, quiet lines."""
    low, high = (pick(m["latency_ms"] for m in models) for pick in (min, max))
    reach = max(high - low, 0.5 * high)
    centre = (low + high) / 2
    axes.set_xlim(max(0.0, centre - 0.72 * reach), centre + 0.80 * reach)
    low, high = (pick(m["mlm_nll"] for m in models) for pick in (min, max))
    reach = max(high - low, 0.02 * high, 1e-3)
    axes.set_ylim(low - 0.35 * reach, high + 0.30 * reach)
    axes.set_xlabel("latency of one sequence, ms  (left is faster)", color=INK)
    axes.set_ylabel("held-out MLM loss, nats  (lower is better)", color=INK)
    axes.set_title(
        "Quality against latency; area of a dot: parameters",
        loc="left",
        color=INK,
        fontsize=12,
        pad=10,
    )
    quiet_frame(axes)


def _area(params: int, largest: int) -> float:
    return max(_SMALLEST, _LARGEST * params / largest)


def _dots(axes: "Axes", models: Sequence[Mapping[str, Any]]) -> None:
    """A dot per model, big ones first; a thin line spans the quartiles of the latency."""
    largest = max(m["params"] for m in models)
    for model in sorted(models, key=lambda m: -int(m["params"])):
        colour = COLOURS[model["role"]]
        x, y = model["latency_ms"], model["mlm_nll"]
        span = [model.get("latency_ms_q1", x), model.get("latency_ms_q3", x)]
        axes.plot(span, [y, y], color=colour, linewidth=1.4, alpha=0.9, zorder=3)
        axes.scatter(
            x,
            y,
            s=_area(model["params"], largest),
            color=colour,
            alpha=0.8,
            edgecolor="white",
            linewidth=1.2,
            zorder=4,
        )


def legend(axes: "Axes", colours: Mapping[str, str], present: Collection[str]) -> None:
    """Kinds of models that are present, outside the field of dots."""
    for kind, colour in colours.items():
        if kind in present:
            axes.scatter([], [], s=70, color=colour, alpha=0.8, label=kind)
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


def _labels(axes: "Axes", models: Sequence[Mapping[str, Any]]) -> None:
    """Name and size at each dot: above those of controls, below all others."""
    largest = max(m["params"] for m in models)
    for model in models:
        above = model["role"] == "control"
        distance = (_area(model["params"], largest) / math.pi) ** 0.5 + _GAP
        axes.annotate(
            f"{model['name']}\n{short_count(model['params'])} params",
            (model["latency_ms"], model["mlm_nll"]),
            xytext=(0, distance if above else -distance),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=9,
            linespacing=1.15,
            color=INK,
            zorder=5,
        )
