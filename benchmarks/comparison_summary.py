"""Arms compared over several seeds: the summary, its tables and its plot.

Two arms are compared seed by seed: they share order, masks and dropout, so most of what a seed
changes cancels in the difference.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.arms import Arm
from distilcache.pipeline.report.plot import INK, QUIET, as_png, new_figure, quiet_frame
from distilcache.pipeline.report.text import markdown_table, spread_of, with_sd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUALITY = {
    "mlm_nll": ("MLM loss", ".4f"),
    "teacher_kl": ("KL to teacher", ".4f"),
    "teacher_top1_agreement": ("agreement", ".2%"),
    "ece": ("ECE", ".4f"),
}
"""Figures of held-out text: heading and format."""
_COLOURS = {
    "live": "#333333",
    "live everywhere": "#333333",
    "cache": "#0072B2",
    "inner": "#009E73",
    "logits": "#CC79A7",
    "mlm": "#E69F00",
}

Result = Mapping[str, Any]
BySeed = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which arms are compared."""

    arms: tuple[Arm, ...]
    reference: str
    """The arm that all others are compared with."""
    pairs: tuple[tuple[str, str], ...]
    """Further pairs of arms: the first is compared with the second."""
    tasks: tuple[str, ...] = ()
    """Tasks that all students are fine-tuned on in the end."""

    @property
    def names(self) -> list[str]:
        """Names of the arms."""
        return [arm.name for arm in self.arms]


# Summary


def paired(runs: BySeed, reference: BySeed) -> dict[str, Any]:
    """Spread of (arm - reference) over their common seeds, per figure; empty without any."""
    seeds = sorted(runs.keys() & reference.keys())
    return {f: spread_of([runs[s][f] - reference[s][f] for s in seeds]) for f in QUALITY if seeds}


def quality_of(results: Sequence[Result]) -> dict[str, dict[int, Mapping[str, float]]]:
    """Quality by arm and seed."""
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for result in results:
        found.setdefault(result["arm"], {})[result["seed"]] = result["quality"]
    return found


def summarise(comparison: Comparison, results: Sequence[Result]) -> dict[str, Any]:
    """Means over seeds, differences to the reference seed by seed, and verdicts on the pairs.

    Returns:
        ``arms``: per arm label, seeds, bytes per token and the spread of each figure, and under
        ``minus_reference`` the spread of its differences. ``verdicts``: one per pair and figure.
        ``teacher``: its own quality.
    """
    quality = quality_of(results)
    arms: dict[str, Any] = {}
    for name, runs in quality.items():
        first = next(r for r in results if r["arm"] == name)
        speeds = [r["training"]["tokens_per_s"] for r in results if r["arm"] == name]
        arms[name] = {
            "label": first["label"],
            "seeds": sorted(runs),
            "bytes_per_token": first["bytes_per_token"],
            "tokens_per_s": spread_of(speeds),
            **{f: spread_of([run[f] for run in runs.values()]) for f in QUALITY},
            "minus_reference": paired(runs, quality.get(comparison.reference, {})),
        }
    return {
        "arms": arms,
        "verdicts": [
            _verdict(arms, pair, figure, gap)
            for pair in comparison.pairs
            for figure, gap in paired(*(quality.get(name, {}) for name in pair)).items()
        ],
        "teacher": results[0]["teacher"],
    }


def _verdict(
    arms: Mapping[str, Any], pair: tuple[str, str], figure: str, gap: Mapping[str, Any]
) -> dict[str, Any]:
    """Whether the mean difference is at most the second arm's sd over seeds.

    Three seeds give an sd only within a factor of two or so: see the difference's own sd as well.
    """
    spread = arms[pair[1]][figure]["sd"]
    return {
        "arm": pair[0],
        "against": pair[1],
        "figure": figure,
        "difference": gap,
        "seed_spread": spread,
        "outside_by": None if spread is None else max(0.0, abs(gap["mean"]) - spread),
    }


# Tables


def tables(comparison: Comparison, summary: Mapping[str, Any]) -> str:
    """Figures of every arm, their differences to the reference, and a line per verdict."""
    arms = summary["arms"]
    figures, gaps = [], []
    for name, arm in arms.items():
        means = (with_sd(arm[f], form) for f, (_, form) in QUALITY.items())
        cost = (with_sd(arm["tokens_per_s"], ",.0f"), f"{arm['bytes_per_token']:.1f}")
        figures.append([name, arm["label"], str(len(arm["seeds"])), *means, *cost])
        minus = arm["minus_reference"]
        if minus and name != comparison.reference:
            cells = (with_sd(minus[f], f"+{form}") for f, (_, form) in QUALITY.items())
            gaps.append([name, arm["label"], *cells])
    own = (format(summary["teacher"][f], form) for f, (_, form) in QUALITY.items())
    figures.append(["", "the teacher", "", *own, "", ""])
    headings = [heading for heading, _ in QUALITY.values()]
    all_headings = ["arm", "signal", "seeds", *headings, "tokens/s", "bytes/token"]
    minus_heading = f"minus ({comparison.reference}), seed by seed"
    lines = [f"- {line}" for line in verdict_lines(summary)]
    return "\n\n".join(
        [
            markdown_table(all_headings, figures, left=2),
            markdown_table(["arm", minus_heading, *headings], gaps, left=2),
            "\n".join(lines),
        ]
    )


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per verdict."""
    lines = []
    for v in summary["verdicts"]:
        heading, form = QUALITY[v["figure"]]
        ours, theirs = (summary["arms"][v[key]]["label"] for key in ("arm", "against"))
        gap = v["difference"]
        line = f"{ours} against {theirs}: {heading} {with_sd(gap, f'+{form}')}"
        if gap["sd"]:
            errors = abs(gap["mean"]) / gap["sd"] * len(_common_seeds(summary, v)) ** 0.5
            line += f" ({errors:.1f} standard errors)"
        if v["seed_spread"] is not None:
            outside = f"OUTSIDE it by {format(v['outside_by'], form)}"
            line += f"; spread of seeds {format(v['seed_spread'], form)}: "
            line += outside if v["outside_by"] else "within it"
        lines.append(line)
    return lines


def _common_seeds(summary: Mapping[str, Any], verdict: Mapping[str, Any]) -> set[int]:
    ours, theirs = (set(summary["arms"][verdict[key]]["seeds"]) for key in ("arm", "against"))
    return ours & theirs


# Plot


def draw(comparison: Comparison, results: Sequence[Result]) -> bytes:
    """Held-out loss and agreement by arm: seeds as dots, mean and sd as bars; a PNG."""
    from matplotlib.ticker import PercentFormatter

    count = len(quality_of(results))
    figure = new_figure(10.0, 1.2 + 0.4 * count)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, comparison, results, "mlm_nll", "held-out MLM loss, nats  (lower is better)")
    title = "agreement with the teacher's first choice  (higher is better)"
    _panel(right, comparison, results, "teacher_top1_agreement", title)
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    title = f"Mean and standard deviation over seeds; grey: arm {comparison.reference}"
    left.set_title(title, loc="left", color=INK, fontsize=12, pad=10)
    return as_png(figure)


def _panel(
    axes: "Axes", comparison: Comparison, results: Sequence[Result], figure: str, title: str
) -> None:
    quality = quality_of(results)
    labels = {result["arm"]: (result["label"], _COLOURS[result["kind"]]) for result in results}
    quiet_frame(axes)
    for row, (name, runs) in enumerate(quality.items()):
        values, colour = [run[figure] for run in runs.values()], labels[name][1]
        mean, sd = statistics.fmean(values), spread_of(values)["sd"]
        if name == comparison.reference and sd is not None:
            axes.axvspan(mean - sd, mean + sd, color=QUIET, alpha=0.18, linewidth=0)
        axes.scatter(values, [row] * len(values), s=14, color=colour, alpha=0.45, linewidth=0)
        axes.errorbar(mean, row, xerr=sd, fmt="o", color=colour, markersize=7, capsize=4)
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(quality)), [labels[name][0] for name in quality], color=INK)
    axes.set_ylim(len(quality) - 0.5, -0.5)
    axes.set_xlabel(title, color=INK)
