"""Hours of a project, compared with live distillation of the same students.

In live distillation the teacher runs in every step of every student, with the same losses at the
same positions. A step from the cache runs the teacher's LM head alone, so a live step costs the
teacher's encoder more. Stage one costs the encoder, and the LM head for the logits that are stored,
once per round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distilcache.pipeline.plan.corpus_size import Text
from distilcache.pipeline.plan.shapes import Shape
from distilcache.pipeline.plan.size import Size
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.student_train.vocabulary import sample_size

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Tokens per second, measured or given; what is missing follows from ``tflops``."""

    teacher: float | None = None
    students: Mapping[str, float]
    """By size."""
    tflops: float | None = None
    """10^12 FLOPs per second that the device sustains in such work."""
    source: str = "as given"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """FLOPs per token of one model's part."""

    cached: float
    """Stage one of the teacher; a step of a student from the cache."""
    live_extra: float = 0.0
    """What a live step of the student costs in addition: the teacher's encoder."""


def teacher_work(recipe: Recipe, teacher: Shape, size: Size, length: float) -> Work:
    """Stage one, per token of text and round; members of an ensemble count as equally large."""
    if recipe.cache.mask_only:
        return Work(cached=0.0)
    body = teacher.body(length, min(1.0, size.positions))
    return Work(cached=_members(recipe) * (body + size.logits * teacher.lm_head))


def _members(recipe: Recipe) -> int:
    return 1 + len(recipe.teacher.ensemble)


def student_work(recipe: Recipe, student: Shape, teacher: Shape, size: Size, length: float) -> Work:
    """A step of stage two, per token; a backward pass is twice a forward pass."""
    train = recipe.train
    rows = sample_size(student.vocabulary, train.vocabulary_fraction)
    ours, theirs = (replace(shape, vocabulary=rows).lm_head for shape in (student, teacher))
    logits, states = train.alpha_ce + train.alpha_mse > 0, train.alpha_cos > 0
    # Positions of L_ce, of the student's LM head, and of its last layer.
    ce_positions = size.masked if train.restrict_ce_to_mask else size.positions
    headed = min(1.0, max(size.masked, ce_positions if logits else 0.0))
    fraction = min(1.0, max(headed, size.positions if states else 0.0))
    step = 3 * (student.body(length, fraction) + (headed * ours if train.has_head else 0.0))
    if not train.has_teacher:
        return Work(cached=step)
    relations = train.alpha_rel > 0
    if relations:  # Of each of the three a product of the teacher's and two of the student's.
        step += 3 * 2 * length * (teacher.width + 2 * student.width)
    replay = ce_positions * theirs if logits and train.signal != "sparse" else 0.0
    # Live, the LM head runs for L_ce whatever the signal from the cache would be.
    head = ce_positions * theirs if logits else 0.0
    body = teacher.body(length, min(1.0, size.positions))
    extra = _members(recipe) * (body + head) - replay
    if relations:  # Its codes, the prediction from the tokens, and three maps.
        replay += 2 * 5 * teacher.width**2
    return Work(cached=step + replay, live_extra=extra)


def passes(recipe: Recipe, text: Text) -> float:
    """How often a student reads the text."""
    train = recipe.train
    if not train.steps:
        return train.epochs
    return train.steps * train.batch_size * train.accumulation / text.sequences


def time_of(
    recipe: Recipe,
    teacher: Shape,
    students: Mapping[str, Shape],
    text: Text,
    size: Size,
    rates: Rates,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Work and, as far as rates are known, hours of stage one and of every student.

    Returns:
        The teacher's row (of 0 tokens where the cache is finished) and one per student: ``flops``
        in all, ``tokens_per_s`` and ``hours``
        (None: unknown); for a student also ``live_hours``, with the teacher in every step.
    """
    once = teacher_work(recipe, teacher, size, text.length)
    tokens = 0.0 if recipe.cache_from else text.tokens * recipe.cache.rounds
    rate = rates.teacher or _rate(rates, once.cached)
    first = {
        "parameters": teacher.parameters,
        "tokens": tokens,
        "flops": once.cached * tokens,
        "tokens_per_s": rate,
        "hours": _hours(tokens, rate) if tokens else 0.0,
    }
    rows = []
    read = passes(recipe, text)
    for name, shape in students.items():
        work = student_work(recipe, shape, teacher, size, text.length)
        own = rates.students.get(name) or _rate(rates, work.cached)
        hours, extra = _hours(read * text.tokens, own), 0.0 if not work.live_extra else None
        if rate and work.live_extra:
            extra = _hours(read * text.tokens, rate * once.cached / work.live_extra)
        rows.append(
            {
                "size": name,
                "parameters": shape.parameters,
                "tokens": read * text.tokens,
                "flops": work.cached * read * text.tokens,
                "live_flops": (work.cached + work.live_extra) * read * text.tokens,
                "tokens_per_s": own,
                "hours": hours,
                "live_hours": None if hours is None or extra is None else hours + extra,
            }
        )
    return first, rows


def _rate(rates: Rates, flops: float) -> float | None:
    return rates.tflops * 1e12 / flops if rates.tflops and flops else None


def _hours(tokens: float, rate: float | None) -> float | None:
    return tokens / rate / HOUR if rate else None


def against_live(
    recipe: Recipe, first: Mapping[str, Any], students: list[dict[str, Any]]
) -> dict[str, Any]:
    """Compare all students with live distillations, and find from how many on the cache pays.

    Returns:
        ``flops_ratio`` and ``hours_ratio`` (stage one and all students of the recipe over the same
        students live), ``break_even_students`` (how many average students pay for stage one), and
        ``not_counted``: other work of the recipe.
    """
    keys = ("flops", "live_flops", "hours", "live_hours")
    sums = {k: _sum([s[k] for s in students]) for k in keys}
    found: dict[str, Any] = {}
    for name, live in (("flops", "live_flops"), ("hours", "live_hours")):
        mine, theirs, once = sums[name], sums[live], first[name]
        known = None not in (mine, theirs, once)
        found[f"{name}_ratio"] = (once + mine) / theirs if known else None
    spared = (sums["live_flops"] - sums["flops"]) / len(students)
    pays = first["flops"] > 0 and spared > 0
    found["break_even_students"] = first["flops"] / spared if pays else None
    left_out = {
        "the teacher's own pre-training": not (
            recipe.teacher.model or recipe.cache.mask_only or recipe.cache_from
        ),
        "controls": recipe.student.control,
    }
    found["not_counted"] = [what for what, is_run in left_out.items() if is_run]
    return found


def _sum(values: list[Any]) -> Any:
    return None if None in values else sum(values)


def price_of(
    first: Mapping[str, Any],
    students: list[dict[str, Any]],
    total_bytes: Sequence[float],
    per_hour: float | None,
    per_tb_month: float | None,
) -> dict[str, Any]:
    """Price of both ways, and of a month of storage, as far as prices are given."""
    found: dict[str, Any] = {}
    mine = _sum([first["hours"], *(s["hours"] for s in students)])
    live = _sum([s["live_hours"] for s in students])
    if per_hour is not None:
        hours = {"teacher": first["hours"], "cache": mine, "live": live}
        found = {name: None if each is None else each * per_hour for name, each in hours.items()}
    if per_tb_month is not None:
        found["storage_month"] = [b / 1e12 * per_tb_month for b in total_bytes]
    return found
