"""Scores of a comparison's students on tasks, by labels alone, against the teacher's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import Plan
from distilcache.pipeline.report.text import markdown_table, spread_of, with_sd
from distilcache.stages.evaluate.masked_lms import ModelEntry
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.run import run_tasks

SETTINGS: Mapping[str, Any] = {
    "lr": 1e-4,
    "batch_size": 16,
    "epochs": 5.0,
    "limit": 9600,
    "seeds": (0,),
}
"""Of ``recipes/wiki100.toml``, with one seed: students of several seeds have several heads."""


def task_scores(
    plan: Plan, results: Sequence[Mapping[str, Any]], tasks: tuple[str, ...], data: Path
) -> dict[str, Any]:
    """Fine-tune the teacher and all students alike; finished runs are kept.

    Returns:
        ``teacher``: its macro score; ``arms``: per arm the spread of each task's score, of the
        macro score and of its ratio to the teacher's, over the students' seeds.
    """
    names = {f"{r['arm']}-{r['seed']}": r["arm"] for r in results}
    entries = [
        ModelEntry("teacher", "teacher", plan.teacher),
        *(ModelEntry(name, "student", plan.out / "runs" / name) for name in names),
    ]
    config = TasksConfig(names=tasks, data=str(data), **SETTINGS)
    found = run_tasks(entries, config, plan.out / "tasks", plan.device, plan.dtype)
    rows = {row["name"]: row for row in found["models"]}
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys(names.values()):
        mine = [rows[name] for name, of in names.items() if of == arm]
        arms[arm] = {
            **{t: spread_of([100 * row["tasks"][t]["score"] for row in mine]) for t in tasks},
            "macro": spread_of([100 * row["macro"] for row in mine]),
            "retention": spread_of([row["retention"] for row in mine]),
        }
    return {"teacher": 100 * rows["teacher"]["macro"], "arms": arms}


def task_table(scores: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """One row per arm; mean and standard deviation over the students' seeds."""
    arms = scores["arms"]
    columns = list(next(iter(arms.values())))
    rows = [
        [
            name,
            labels[name],
            *(with_sd(arm[c], ".1%" if c == "retention" else ".1f") for c in columns),
        ]
        for name, arm in arms.items()
    ]
    rows.append(["", "the teacher", *[""] * (len(columns) - 2), f"{scores['teacher']:.1f}", ""])
    return markdown_table(["arm", "student", *columns], rows, left=2)
