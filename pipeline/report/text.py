"""Tables and figures as text, for a terminal and for Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width for a terminal.

    Args:
        headings: One per column.
        rows: Cells.
        left: Number of first columns that are aligned left, as text is; figures go right.
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        names = map(str.ljust, cells[:left], widths)
        return "  ".join([*names, *map(str.rjust, cells[left:], widths[left:])]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headings), rule, *map(line, rows)])


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same table in Markdown."""
    marks = ["---" if i < left else "---:" for i in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, marks, *rows])


def number(value: float | None, form: str) -> str:
    """A formatted number; ``-`` where there is none."""
    return "-" if value is None else format(value, form)


def spread_of(values: Sequence[float]) -> dict[str, float | None]:
    """``mean`` and sample standard deviation ``sd``; None for a single value."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd}


def with_sd(value: Mapping[str, Any] | None, form: str) -> str:
    """``mean ± sd``; the mean alone of a single value, ``-`` of none."""
    if value is None:
        return "-"
    mean = format(value["mean"], form)
    return mean if value["sd"] is None else f"{mean} ± {format(value['sd'], form.lstrip('+'))}"


def duration(hours: float | None) -> str:
    """A time with its unit: ``40 s``, ``12.5 min``, ``7.3 h`` or ``9.2 d``."""
    if hours is None:
        return "-"
    for size, unit in ((48.0, "d"), (1.0, "h"), (1 / 60, "min")):
        if hours >= size:
            return f"{hours / (24.0 if unit == 'd' else size):,.1f} {unit}"
    return f"{3600 * hours:.0f} s"


def span(ends: Sequence[float], form: str) -> str:
    """``3.2``, or ``3.2 to 4.1`` where the ends differ in print."""
    low, high = format(ends[0], form), format(ends[-1], form)
    return low if low == high else f"{low} to {high}"


def short_count(count: float) -> str:
    """``950``, ``12.3k`` or ``66.4M``."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{suffix}"
    return f"{count:.0f}"


def short_bytes(*ends: float) -> str:
    """A size, or a range of sizes, with three digits and a unit: ``12.3 MB``, ``1.2 to 3 GB``."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = next((i for i in range(5) if ends[-1] < 999.5 * 1000**i), 5)
    return f"{span([end / 1000**power for end in ends], ',.3g')} {units[power]}"
