"""The plot of the comparison: held-out loss against latency, a dot per model."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distilcache.pipeline.report.text import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = dict[str, Any]
"""Arguments of ``scatter``."""
# Okabe and Ito's palette: distinct for every kind of colour vision.
DISTILLED = "distilled twice"
COLOURS = {"teacher": "#333333", "student": "#0072B2", "control": "#E69F00", DISTILLED: "#009E73"}
"""By kind: a role, or a model that was fine-tuned with its teacher as well."""
INK, QUIET, GRID = "#222222", "#666666", "#E4E4E4"
# Areas in points squared: the largest model's dot, and the least that stays visible.
_LARGEST, _SMALLEST = 900.0, 40.0
_MARKERS = "os^DvP*X<>ph"
_LEGEND_ROWS = 22


def quality_latency(models: Sequence[Mapping[str, Any]]) -> "Figure":
    """The plot as a figure."""
    figure = new_figure(9.0, 5.2)
    axes = figure.add_subplot()
    styles = styles_of([model["role"] for model in models])
    _frame(axes, models)
    _dots(axes, models, styles)
    sizes = [short_count(model["params"]) for model in models]
    names = [f"{m['name']} ({size})" for m, size in zip(models, sizes, strict=True)]
    legend(figure, styles, names)
    return figure


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
    """Limits, names of the axes, quiet lines."""
    low, high = (pick(m["latency_ms"] for m in models) for pick in (min, max))
    reach = max(high - low, 0.5 * high)
    centre = (low + high) / 2
    axes.set_xlim(max(0.0, centre - 0.65 * reach), centre + 0.65 * reach)
    low, high = (pick(m["mlm_nll"] for m in models) for pick in (min, max))
    reach = max(high - low, 0.02 * high, 1e-3)
    axes.set_ylim(low - 0.2 * reach, high + 0.2 * reach)
    axes.set_xlabel("latency of one sequence, ms  (left is faster)", color=INK)
    axes.set_ylabel("held-out MLM loss, nats  (lower is better)", color=INK)
    title = "Quality against latency; area of a marker: parameters"
    axes.set_title(title, loc="left", color=INK, fontsize=12, pad=10)
    quiet_frame(axes)


def _dots(axes: "Axes", models: Sequence[Mapping[str, Any]], styles: Sequence[Style]) -> None:
    """A dot per model, big ones first; a thin line spans the quartiles of the latency."""
    largest = max(m["params"] for m in models)
    pairs = sorted(zip(models, styles, strict=True), key=lambda pair: -int(pair[0]["params"]))
    for model, style in pairs:
        x, y = model["latency_ms"], model["mlm_nll"]
        span = [model.get("latency_ms_q1", x), model.get("latency_ms_q3", x)]
        colour = COLOURS[model["role"]]
        axes.plot(span, [y, y], color=colour, linewidth=1.4, alpha=0.9, zorder=3)
        size = max(_SMALLEST, _LARGEST * model["params"] / largest)
        axes.scatter(x, y, s=size, alpha=0.8, zorder=4, **style)


def styles_of(kinds: Sequence[str]) -> list[Style]:
    """A colour by kind, and a marker that no other model of the kind has."""
    seen: Counter[str] = Counter()
    found = []
    for kind in kinds:
        row, place = divmod(seen[kind], len(_MARKERS))
        hollow = row % 2 == 1
        colour = COLOURS[kind]
        found.append(
            {
                "marker": _MARKERS[place],
                "facecolor": "none" if hollow else colour,
                "edgecolor": colour if hollow else "white",
                "linewidth": 1.2,
            }
        )
        seen[kind] += 1
    return found


def legend(figure: "Figure", styles: Sequence[Style], names: Sequence[str]) -> None:
    """What each marker stands for, beside the panels: names at dots would cover each other."""
    handles = [figure.axes[0].scatter([], [], s=60, **style) for style in styles]
    figure.legend(
        handles,
        names,
        loc="outside right upper",
        ncols=-(-len(names) // _LEGEND_ROWS),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handletextpad=0.3,
        columnspacing=1.2,
    )
