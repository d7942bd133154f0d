"""Seeds to means, means to an order: table and plot of ``ablation.py``."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import markdown_table, text_table
from benchmarks.comparison import paired, spread_of, with_sd

LABELS = {
    "full": "all losses, teacher's layers",
    "no_mlm": "without L_mlm",
    "no_cos": "without L_cos",
    "no_ce": "without L_ce",
    "random": "random initialisation",
}
"""Arms and how tables call them."""
FULL = "full"
FIGURES = {
    "mlm_nll": ("MLM loss", ".4f"),
    "teacher_kl": ("KL to teacher", ".4f"),
    "teacher_top1_agreement": ("agreement", ".2%"),
}
"""Figures of held-out text: heading and format."""
CLAIMED = {"random", "no_ce"}
"""The two that are said to hurt most."""

Result = Mapping[str, Any]


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Means over seeds, differences to the full loss seed by seed, and the order of the arms.

    Returns:
        ``arms``: per arm label, seeds, mean and sd of each figure, and under ``minus_full`` the
        same of the differences. ``order``: per figure the arms by what they cost, the worst first.
        ``claim``: per figure whether the two of :data:`CLAIMED` cost most, and by how many
        standard errors of its difference the lesser of them is behind the next arm.
    """
    by_arm: dict[str, dict[int, Result]] = {}
    for name in LABELS:
        for result in results:
            if result["arm"] == name:
                by_arm.setdefault(name, {})[result["seed"]] = result["quality"]
    arms = {}
    for name, runs in by_arm.items():
        arms[name] = {
            "label": LABELS[name],
            "seeds": sorted(runs),
            **{f: spread_of([run[f] for run in runs.values()]) for f in FIGURES},
            "minus_full": paired(runs, by_arm.get(FULL, {}), FIGURES),
        }
    order = {figure: _order(arms, figure) for figure in FIGURES}
    return {
        "arms": arms,
        "order": order,
        "claim": {f: _claim(by_arm, names, f) for f, names in order.items()},
        "teacher": results[0]["teacher"],
    }


def _cost(arm: Mapping[str, Any], figure: str) -> float:
    """How much worse than the full loss; agreement is better where it is higher."""
    difference: float = arm["minus_full"][figure]["mean"]
    return -difference if figure == "teacher_top1_agreement" else difference


def _order(arms: Mapping[str, Any], figure: str) -> list[str]:
    compared = [n for n, arm in arms.items() if n != FULL and arm["minus_full"]]
    return sorted(compared, key=lambda name: -_cost(arms[name], figure))


def _claim(
    by_arm: Mapping[str, Mapping[int, Result]], order: Sequence[str], figure: str
) -> dict[str, Any] | None:
    """Whether the claimed two come first, and how surely.

    None where an arm is missing, or the two that decide have no seed in common.
    """
    if len(order) < len(LABELS) - 1:
        return None
    lesser = max((name for name in order if name in CLAIMED), key=order.index)
    other = min((name for name in order if name not in CLAIMED), key=order.index)
    seeds = sorted(by_arm[lesser].keys() & by_arm[other].keys())
    if not seeds:
        return None
    sign = -1 if figure == "teacher_top1_agreement" else 1
    gaps = [sign * (by_arm[lesser][s][figure] - by_arm[other][s][figure]) for s in seeds]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    return {
        "holds": set(order[:2]) == CLAIMED,
        "lesser": lesser,
        "next": other,
        "gap": statistics.fmean(gaps),
        "gap_stderr": error,
    }


def tables(summary: Mapping[str, Any], *, markdown: bool = False) -> str:
    """Figures of every arm with their differences to the full loss, and what they show."""
    table = markdown_table if markdown else text_table
    headings = ["arm", "seeds"]
    for heading, _ in FIGURES.values():
        headings += [heading, "minus full"]
    rows = []
    for name, arm in summary["arms"].items():
        cells = [arm["label"], str(len(arm["seeds"]))]
        for figure, (_, form) in FIGURES.items():
            minus = None if name == FULL else arm["minus_full"].get(figure)
            cells += [with_sd(arm[figure], form), with_sd(minus, f"+{form}")]
        rows.append(cells)
    own = ["the teacher", ""]
    for figure, (_, form) in FIGURES.items():
        own += [format(summary["teacher"][figure], form), ""]
    mark = "- " if markdown else ""
    lines = [f"{mark}{line}" for line in verdicts(summary)]
    return "\n\n".join([table(headings, [*rows, own]), "\n".join(lines)])


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per figure: who costs most, and whether the claim holds."""
    lines = []
    for figure, names in summary["order"].items():
        heading, form = FIGURES[figure]
        line = f"{heading}: worst first: {', '.join(LABELS[name] for name in names)}"
        claim = summary["claim"][figure]
        if claim is not None:
            word = "holds" if claim["holds"] else "does NOT hold"
            line += (
                f"; that random initialisation and no L_ce cost most {word}: "
                f"{LABELS[claim['lesser']]} against {LABELS[claim['next']]} "
                f"{format(claim['gap'], '+' + form)}"
            )
            if claim["gap_stderr"] is not None:
                line += f" (standard error {format(claim['gap_stderr'], form)})"
        lines.append(line)
    return lines


def draw(summary: Mapping[str, Any], results: Sequence[Result]) -> bytes:
    """What every arm costs against the full loss: seeds as dots, mean and sd as bars; a PNG."""
    from matplotlib.ticker import PercentFormatter

    from distilcache.pipeline.report.plot import INK, QUIET, as_png, new_figure, quiet_frame

    quality = {(r["arm"], r["seed"]): r["quality"] for r in results}
    names = list(reversed(summary["order"]["mlm_nll"]))
    figure = new_figure(10.0, 1.3 + 0.5 * len(names))
    panels = {
        "mlm_nll": "held-out MLM loss, nats above all losses",
        "teacher_top1_agreement": "agreement with the teacher, less all losses",
    }
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        quiet_frame(axes)
        axes.axvline(0.0, color=QUIET, linewidth=1)
        for row, name in enumerate(names):
            seeds = [s for s in summary["arms"][name]["seeds"] if (FULL, s) in quality]
            gaps = [quality[name, s][key] - quality[FULL, s][key] for s in seeds]
            axes.scatter(gaps, [row] * len(gaps), s=14, color="#0072B2", alpha=0.45, linewidth=0)
            found = summary["arms"][name]["minus_full"][key]
            axes.errorbar(found["mean"], row, xerr=found["sd"], fmt="o", color="#0072B2", capsize=4)
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(names)), [LABELS[name] for name in names], color=INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(title, color=INK)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.axes[0].set_title(
        "What each part is worth: mean and sd over seeds", loc="left", color=INK, fontsize=12
    )
    return as_png(figure)
