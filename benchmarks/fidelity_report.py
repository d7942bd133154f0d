"""Tables and plot of ``fidelity.py``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilcache.pipeline.report.plot import as_png, new_figure, quiet_frame
from distilcache.pipeline.report.text import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIGNAL_STYLES = {
    "replay": ("o", "-"),
    "replay+topk": ("s", "-"),
    "replay+residual": ("^", ""),
    "sparse": ("x", ""),
    "rival": ("d", ""),
}

NAMES = {"rival": "other codecs (hidden states alone)"}
TICKS = (20, 50, 100, 200)


def tables(results: Mapping[str, Any]) -> str:
    """All figures as Markdown."""
    price_names = ("encoding", "signal", "bytes_per_position", "bytes_per_token")
    parts = [
        "## Bytes and replay error\n",
        _table(results["prices"], (*price_names, "kl_1", "kl_2", "cosine_error", "clipped_codes")),
    ]
    for title, keep in (
        ("Angle in degrees against the live gradient (norm ratio)", lambda r: not _placed(r)),
        ("The same against the live gradient at ALL positions", _placed),
    ):
        parts += [f"\n## {title}\n", _angles([r for r in results["angles"] if keep(r)])]
    parts += ["\n## Bytes of the position policies (exact hidden states)\n"]
    parts.append(_table(results["positions"], price_names))
    return "\n".join(parts)


def _placed(row: Mapping[str, Any]) -> bool:
    return bool(row["encoding"].startswith("masked"))


def _angles(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per encoding and signal, one column per student, temperature and sum."""
    columns = list(dict.fromkeys((r["student"], r["temperature"], r["sequences"]) for r in rows))
    columns.sort(key=lambda c: (list(dict.fromkeys(r["student"] for r in rows)).index(c[0]), c[1:]))
    lines: dict[tuple[str, str], dict[Any, str]] = {}
    for row in rows:
        key = (row["student"], row["temperature"], row["sequences"])
        cell = f"{row['degrees']:.2f} ({row['norm_ratio']:.3f})"
        lines.setdefault((row["encoding"], row["signal"]), {})[key] = cell
    names = [f"{student}, T={t:g}, {count}" for student, t, count in columns]
    table = [
        {
            "encoding": e,
            "signal": s,
            **dict(zip(names, (cells.get(c) for c in columns), strict=True)),
        }
        for (e, s), cells in lines.items()
    ]
    return _table(table, ("encoding", "signal", *names))


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    return markdown_table(names, [[_text(row.get(n)) for n in names] for row in rows], left=2)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 10 else f"{value:.4f}"
    return str(value)


def save_plot(results: Mapping[str, Any], path: Path) -> None:
    """Angle (T = 2, 80 sequences or the nearest measured) against bytes per position."""
    price = {(r["encoding"], r["signal"]): r["bytes_per_position"] for r in results["prices"]}
    students = list(dict.fromkeys(r["student"] for r in results["angles"]))
    figure = new_figure(5.0 * len(students), 4.5)
    axes = figure.subplots(1, len(students), sharey=True, squeeze=False)
    for axis, student in zip(axes[0], students, strict=True):
        rows = [
            r
            for r in results["angles"]
            if r["student"] == student and r["temperature"] == 2 and not _placed(r)
        ]
        placed: list[tuple[float, float]] = []
        count = min((r["sequences"] for r in rows), key=lambda n: abs(n - 80))
        for signal, (marker, line) in SIGNAL_STYLES.items():
            points = sorted(
                (price[r["encoding"], signal], r["degrees"], r["encoding"])
                for r in rows
                if r["signal"] == signal and r["sequences"] == count
                if r["encoding"] != "float16"  # exact as far as this plot goes
            )
            if not points:
                continue
            x, y, names = zip(*points, strict=True)
            axis.plot(
                x, y, marker=marker, linestyle=line or "none", label=NAMES.get(signal, signal)
            )
            if not line:
                _label(axis, points, placed)
        axis.set(xscale="log", yscale="log", xlabel="bytes per position, on disk")
        axis.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axis.set_xlim(right=4 * axis.get_xlim()[1])  # for names beside the last points
        axis.minorticks_off()
        axis.set_title(f"{student}, {count} sequences, T = 2")
        quiet_frame(axis)
    axes[0][0].set_ylabel("angle to the live gradient (degrees)")
    axes[0][-1].legend(fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_png(figure))


def _label(
    axis: "Axes",
    points: Sequence[tuple[float, float, str]],
    placed: list[tuple[float, float]],
) -> None:
    """Names beside the points, left out where they would lie on one that is there."""
    for x, y, name in points:
        if all(abs(math.log(x / a)) > 0.9 or abs(math.log(y / b)) > 0.3 for a, b in placed):
            axis.annotate(name, (x, y), fontsize=6, xytext=(4, 3), textcoords="offset points")
            placed.append((x, y))
