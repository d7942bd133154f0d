"""``gpu.json`` as lines for a terminal and as the section "On a GPU" of docs/benchmarks.md.

python -m benchmarks.gpu_report runs/gpu/gpu.json
"""

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.common import checked_command, machine_line, median_of
from distilcache.data.errors import require
from distilcache.pipeline.report.text import markdown_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- On a GPU: begin -->", "<!-- On a GPU: end -->"


def lines_of(name: str, found: dict[str, Any]) -> list[str]:
    """What a part found, one line for each figure that a reader looks for."""
    head = f"{name}: {found['state']}, {found['seconds']:.0f} s"
    return [head, *(f"  {line}" for line in _figures(name, found["figures"]))]


def _figures(name: str, figures: dict[str, Any]) -> list[str]:
    if "tokens_per_s" in figures and isinstance(figures["tokens_per_s"], dict):
        return _rates(figures)
    if "students" in figures:
        return [line for student in figures["students"] for line in _student(student)]
    if name == "real":
        return _real(figures)
    return [f"{key}: {_text(value)}" for key, value in figures.items() if key != "environment"]


def _rates(figures: dict[str, Any]) -> list[str]:
    lines = [
        f"{arm}: {median_of(rates).median:,.0f} tokens/s, "
        f"{figures['utilisation'][arm]:.0%} of the matmul rate"
        for arm, rates in figures["tokens_per_s"].items()
    ]
    lines += [f"{name}: {median_of(v).median:.3f}" for name, v in figures["ratios"].items()]
    idle = figures["device_idle_share"]
    lines += [f"idle: {idle:.1%}"] if idle is not None else []
    return [*lines, f"kernels: {_text(figures['kernels'])}"]


def _student(student: dict[str, Any]) -> list[str]:
    rates = {name: median_of(r).median for name, r in student["tokens_per_s"].items()}
    used = f"{student['utilisation']:.0%} of the matmul rate"
    lines = [f"{student['size']} {name}: {rate:,.0f} tokens/s" for name, rate in rates.items()]
    lines[-1] += f", {used}" if "ours" in lines[-1] else ""
    for name, ratio in student["ratios"].items():
        lines.append(f"{name}: {ratio['measured']['median']:.3f} (bound {ratio['bound']:.3f})")
    peak = student.get("peak_gib") or {}
    return [*lines, *(f"{name}: peak {gib:.1f} GiB" for name, gib in peak.items())]


def _real(figures: dict[str, Any]) -> list[str]:
    lines = []
    if "training" in figures:
        training = figures["training"]
        rate = training["tokens_per_s"]
        lines.append(f"student: {training['tokens']:,} tokens, {rate:,.0f} tokens/s")
    lines += [
        f"{model['name']}: held-out loss {model['mlm_nll']:.4f}, KL to teacher "
        f"{model['teacher_kl']:.4f}, agreement {model['teacher_top1_agreement']:.1%}"
        for model in figures.get("heldout", {}).get("models", [])
    ]
    for model in figures.get("tasks", {}).get("models", []):
        scores = ", ".join(f"{name} {100 * t['score']:.1f}" for name, t in model["tasks"].items())
        lines.append(f"{model['name']}: {scores}; retained {model['retention']:.1%}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def section(results: dict[str, Any]) -> str:
    """The section as Markdown: the machine, then a table of all parts."""
    rows = []
    for name, found in results["parts"].items():
        first, *lines = lines_of(name, found)
        rows.append([name, first.partition(": ")[2], "<br>".join(line.strip() for line in lines)])
    command = f"`python -m benchmarks.gpu`. {machine_line(results['environment'])}"
    return f"{command}\n\n{markdown_table(('part', 'state', 'figures'), rows, left=3)}\n"


def update_page(results: dict[str, Any], page: Path = PAGE) -> None:
    """Put the section between its marks in the page.

    Raises:
        UserError: The page has no marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    require(bool(begin and end), f"benchmark: {page.name} must have {BEGIN} and {END}, got neither")
    page.write_text(f"{before}{begin}\n{section(results)}{end}{after}", encoding="utf-8")


@checked_command
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def main(path: Path) -> None:
    """Fill the section of docs/benchmarks.md from the results of a run."""
    update_page(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
