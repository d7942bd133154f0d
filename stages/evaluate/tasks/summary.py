"""From single runs to one row per model: medians over seeds, macro scores and retention.

The score of a task is the median over seeds; the macro score is the mean of these medians over
tasks. Retention is a model's score divided by the teacher's; its range over seeds is each seed's
score divided by the teacher's median.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summarise(
    results: Sequence[Mapping[str, Any]],
    speed: Mapping[str, Mapping[str, Any]],
    *,
    tasks: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that tables and plots show, in one dictionary.

    ``speed`` has role, size and speed by row name.

    Returns:
        ``settings``, ``machine``, ``tasks`` and ``models``. A model has ``name``, ``role``,
        ``distilled``, size and speed, ``tasks`` (``score``, ``low``, ``high``, ``retention``,
        ``retention_low``, ``retention_high``, ``metrics``, ``seconds`` and ``seeds`` by task),
        and ``macro``, ``retention`` with their ``_low`` and ``_high``. Retention is None
        without a teacher, and if the teacher's score is not above 0.
    """
    names = list(dict.fromkeys(result["model"] for result in results))
    rows = []
    for name in names:
        mine = [result for result in results if result["model"] == name]
        runs = {task: [r for r in mine if r["task"] == task] for task in tasks}
        by_task = {task: _of_task(found) for task, found in runs.items()}
        scores = [[run["score"] for run in found] for found in runs.values()]
        # One mean over tasks per seed, for the range of the macro score.
        macros = [statistics.fmean(column) for column in zip(*scores, strict=True)]
        rows.append(
            {
                "name": name,
                "distilled": mine[0]["distilled"],
                **speed[name],
                "tasks": by_task,
                "macro": statistics.fmean(task["score"] for task in by_task.values()),
                "macro_low": min(macros),
                "macro_high": max(macros),
                "seconds": sum(run["seconds"] for run in mine),
            }
        )
    _add_retention(rows)
    return {
        "settings": dict(settings),
        "machine": dict(machine),
        "tasks": {name: dict(facts) for name, facts in tasks.items()},
        "models": rows,
    }


def _of_task(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [run["score"] for run in runs]
    return {
        "score": statistics.median(scores),
        "low": min(scores),
        "high": max(scores),
        "metrics": {
            name: statistics.median(run["metrics"][name] for run in runs)
            for name in runs[0]["metrics"]
        },
        "seconds": statistics.median(run["seconds"] for run in runs),
        "seeds": {str(run["seed"]): run["score"] for run in runs},
    }


def _add_retention(rows: list[dict[str, Any]]) -> None:
    teacher = next((row for row in rows if row["role"] == "teacher"), None)
    for row in rows:
        reference = teacher["macro"] if teacher else None
        row |= _ratios(row["macro"], row["macro_low"], row["macro_high"], reference)
        for task, values in row["tasks"].items():
            reference = teacher["tasks"][task]["score"] if teacher else None
            values |= _ratios(values["score"], values["low"], values["high"], reference)


def _ratios(score: float, low: float, high: float, reference: float | None) -> dict[str, Any]:
    names = ("retention", "retention_low", "retention_high")
    if reference is None or reference <= 0:
        return dict.fromkeys(names)
    return {name: x / reference for name, x in zip(names, (score, low, high), strict=True)}
