"""Files next to a cache: its students, their training logs, a report on models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError
from distilcache.pipeline.measured import trained_students

TERMS = ("loss", "ce", "mlm", "cos", "mse", "rel")
POINTS = 240
"""Points of a training curve; more log lines are averaged."""
MODEL_FIELDS = ("name", "role", "params", "latency_ms", "mlm_nll", "mlm_top1", "size_mb")
MOST_STUDENTS = 6
"""Students shown by default: there are this many colours."""


def find_students(cache: Path) -> list[Path]:
    """Finished students in the folder ``students`` next to a cache, the largest first."""
    found = trained_students(cache.parent / "students")
    return [path for path in found if (path / "config.json").is_file()][:MOST_STUDENTS]


def role_of(student: Path) -> str:
    """``student`` or ``control``, as its training noted."""
    settings = _read(student / "training.json").get("settings")
    role = settings.get("role") if isinstance(settings, dict) else None
    return role if role in ("student", "control", "teacher") else "student"


def training_curves(student: Path) -> dict[str, list[list[float]]]:
    """Loss terms by step, ``{term: [[step, value]]}``; empty if there is no log.

    Raises:
        UserError: The log is damaged.
    """
    path = student / "metrics.jsonl"
    if not path.is_file():
        return {}
    curves: dict[str, list[list[float]]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            for term in TERMS:
                if term in entry:
                    curves.setdefault(term, []).append([int(entry["step"]), float(entry[term])])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"view: {path} must hold one JSON object per line, got: {type(error).__name__} "
            f"{error}; move it away to leave the curves out"
        ) from None
    return {term: _thinned(curve) for term, curve in curves.items()}


def _thinned(curve: Sequence[list[float]]) -> list[list[float]]:
    """At most ``POINTS`` points: means of neighbours."""
    size = -(-len(curve) // POINTS)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [
        [group[-1][0], float(f"{sum(value for _, value in group) / len(group):.5g}")]
        for group in groups
    ]


def find_models(project: Path) -> list[dict[str, Any]]:
    """Figures of models for the plot of quality against latency; empty if there is no report.

    Taken from the report of a sweep, as means over seeds, if there is one.
    """
    for name, key in (("sweep.json", "rows"), ("report.json", "models")):
        models = _read(project / "report" / name).get(key)
        if isinstance(models, list):
            plain = [_figures(model) for model in models if isinstance(model, dict)]
            return [
                model
                for model in plain
                if all(_is_number(model[figure]) for figure in ("latency_ms", "mlm_nll"))
            ]
    return []


def _figures(model: dict[str, Any]) -> dict[str, Any]:
    values = {field: model.get(field) for field in MODEL_FIELDS}
    return {f: v.get("mean") if isinstance(v, dict) else v for f, v in values.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it cannot be read, since the page does without."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
