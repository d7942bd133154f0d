"""Seeds to means, means to verdicts: tables and plot of ``offline_equals_online.py``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.common import markdown_table, text_table
from benchmarks.comparison import paired, spread_of, with_sd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE = "a"
QUALITY = {
    "mlm_nll": ("MLM loss", ".4f"),
    "teacher_kl": ("KL to teacher", ".4f"),
    "teacher_top1_agreement": ("agreement", ".2%"),
    "ece": ("ECE", ".4f"),
}
"""Figures of held-out text: heading and format."""
CLAIMS = (("b", "a"), ("b_extra", "a_all"))
"""Offline arms and the live ones that they stand for."""
_COLOURS = {
    "live": "#333333",
    "live everywhere": "#333333",
    "cache": "#0072B2",
    "logits": "#CC79A7",
    "mlm": "#E69F00",
}

Result = Mapping[str, Any]


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Means over seeds, paired differences to the live arm, verdicts.

    Two arms are compared seed by seed: they share order, masks and dropout, so that most of what a
    seed brings cancels in the difference.

    Returns:
        ``arms``: per arm label, kind, seeds and per figure mean and sd; the same of the
        differences under ``minus_<reference>``. ``verdicts``: one per claim and figure.
        ``teacher``: its own quality.
    """
    by_arm: dict[str, dict[int, Result]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    quality = {
        name: {seed: run["quality"] for seed, run in runs.items()} for name, runs in by_arm.items()
    }
    arms: dict[str, Any] = {}
    for name, runs in by_arm.items():
        first = next(iter(runs.values()))
        arms[name] = {
            "label": first["label"],
            "kind": first["kind"],
            "seeds": sorted(runs),
            "bytes_per_token": first["bytes_per_token"],
            "tokens_per_s": spread_of([r["training"]["tokens_per_s"] for r in runs.values()]),
            **{f: spread_of([run[f] for run in quality[name].values()]) for f in QUALITY},
            f"minus_{REFERENCE}": paired(quality[name], quality.get(REFERENCE, {}), QUALITY),
        }
    return {
        "arms": arms,
        "verdicts": [
            _verdict(arms, offline, live, figure, paired(quality[offline], quality[live], QUALITY))
            for offline, live in CLAIMS
            if {offline, live} <= arms.keys() and by_arm[offline].keys() & by_arm[live].keys()
            for figure in QUALITY
        ],
        "teacher": results[0]["teacher"],
    }


def _verdict(
    arms: Mapping[str, Any], offline: str, live: str, figure: str, gaps: Mapping[str, Any]
) -> dict[str, Any]:
    """Whether the mean paired difference is at most the live arm's sd over seeds.

    Three seeds tell an sd only to within a factor of two or so: read ``difference`` against
    ``difference_sd`` as well.
    """
    difference, spread = gaps[figure]["mean"], arms[live][figure]["sd"]
    return {
        "arm": offline,
        "against": live,
        "figure": figure,
        "difference": difference,
        "difference_sd": gaps[figure]["sd"],
        "seed_spread": spread,
        "within": None if spread is None else abs(difference) <= spread,
        "outside_by": None if spread is None else max(0.0, abs(difference) - spread),
    }


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """One sentence per verdict."""
    lines = []
    for v in summary["verdicts"]:
        heading, form = QUALITY[v["figure"]]
        arms = summary["arms"]
        text = (
            f"{arms[v['arm']]['label']} against {arms[v['against']]['label']}: {heading} "
            f"{format(v['difference'], f'+{form}')}"
        )
        if v["within"] is None:
            lines.append(f"{text}; one seed, no spread")
            continue
        text += (
            f" (sd of the difference {format(v['difference_sd'] or 0.0, form)}, spread of seeds "
            f"{format(v['seed_spread'], form)}): "
        )
        outside = f"OUTSIDE the seed spread by {format(v['outside_by'], form)}"
        lines.append(text + ("within the seed spread" if v["within"] else outside))
    return lines


def tables(summary: Mapping[str, Any], *, markdown: bool = False) -> str:
    """Figures of every arm, and their paired differences to the live one."""
    table = markdown_table if markdown else text_table
    headings = [heading for heading, _ in QUALITY.values()]
    arms = summary["arms"]
    rows = [
        [
            name,
            arm["label"],
            str(len(arm["seeds"])),
            *(with_sd(arm[figure], form) for figure, (_, form) in QUALITY.items()),
            with_sd(arm["tokens_per_s"], ",.0f"),
            f"{arm['bytes_per_token']:.1f}",
        ]
        for name, arm in arms.items()
    ]
    own = summary["teacher"]
    figures = [format(own[figure], form) for figure, (_, form) in QUALITY.items()]
    rows.append(["", "the teacher", "", *figures, "", ""])
    first = table(["arm", "signal", "seeds", *headings, "tokens/s", "bytes/token"], rows, left=2)
    differences = [
        [
            name,
            arm["label"],
            *(
                with_sd(arm[f"minus_{REFERENCE}"].get(figure), f"+{form}", missing="-")
                for figure, (_, form) in QUALITY.items()
            ),
        ]
        for name, arm in arms.items()
        if name != REFERENCE and REFERENCE in arms
    ]
    second = table(["arm", f"minus ({REFERENCE}), seed by seed", *headings], differences, left=2)
    mark = "- " if markdown else ""
    lines = [f"{mark}{line}" for line in verdict_lines(summary)]
    return "\n\n".join([first, second, "\n".join(lines)])


def draw(summary: Mapping[str, Any], results: Sequence[Result]) -> bytes:
    """Held-out loss and agreement by arm: seeds as dots, mean and sd as bars; a PNG."""
    from matplotlib.ticker import PercentFormatter

    from distilcache.pipeline.report.plot import INK, as_png, new_figure

    figure = new_figure(10.0, 1.2 + 0.4 * len(summary["arms"]))
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, summary, results, "mlm_nll", "held-out MLM loss, nats  (lower is better)")
    _panel(
        right,
        summary,
        results,
        "teacher_top1_agreement",
        "agreement with the teacher's first choice  (higher is better)",
    )
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    seeds = max(len(arm["seeds"]) for arm in summary["arms"].values())
    left.set_title(
        f"Mean and standard deviation, {seeds} seed{'s' * (seeds > 1)}; grey: the live arm",
        loc="left",
        color=INK,
        fontsize=12,
        pad=10,
    )
    return as_png(figure)


def _panel(
    axes: "Axes", summary: Mapping[str, Any], results: Sequence[Result], figure: str, title: str
) -> None:
    from distilcache.pipeline.report.plot import INK, QUIET, quiet_frame

    arms = summary["arms"]
    quiet_frame(axes)
    reference = arms.get(REFERENCE)
    if reference is not None and reference[figure]["sd"] is not None:
        mean, sd = reference[figure]["mean"], reference[figure]["sd"]
        axes.axvspan(mean - sd, mean + sd, color=QUIET, alpha=0.18, linewidth=0)
    for row, (name, arm) in enumerate(arms.items()):
        colour = _COLOURS[arm["kind"]]
        seeds = [r["quality"][figure] for r in results if r["arm"] == name]
        axes.scatter(seeds, [row] * len(seeds), s=14, color=colour, alpha=0.45, linewidth=0)
        axes.errorbar(
            arm[figure]["mean"],
            row,
            xerr=arm[figure]["sd"],
            fmt="o",
            color=colour,
            markersize=7,
            capsize=4,
        )
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(arms)), [arm["label"] for arm in arms.values()], color=INK)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(title, color=INK)
