"""What ``distilcache plan`` answers: from the recipe and its text to all figures."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError, require
from distilcache.pipeline.check_recipe import check_recipe
from distilcache.pipeline.plan.corpus_size import Text, text_of
from distilcache.pipeline.plan.cost import Rates, against_live, passes, price_of, time_of
from distilcache.pipeline.plan.lines import format_plan
from distilcache.pipeline.plan.shapes import (
    GIVE_A_SHAPE,
    Shape,
    published_config,
    shape_in,
    student_shape,
    teacher_shape,
)
from distilcache.pipeline.plan.size import Size, cache_size, formula_size, like_size
from distilcache.pipeline.plan.unread import unread
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.models.families import shape_of
from distilcache.stages.student_train.advice import advice
from distilcache.stages.student_train.arguments import total_steps


def plan_command(
    recipe: Recipe,
    *,
    tokens: float | None,
    measure: int,
    like: str | None,
    teacher_tokens_per_s: float | None,
    student_rates: Sequence[str],
    tflops: float | None,
    price_per_hour: float | None,
    price_per_tb_month: float | None,
) -> tuple[dict[str, Any], str]:
    """Values for JSON, and the text for people; arguments are the options of the command.

    Raises:
        UserError: Bad input.
    """
    _check_positive({
        "--teacher-tokens-per-s": teacher_tokens_per_s,
        "--tflops": tflops,
        "--price-per-hour": price_per_hour,
        "--price-per-tb-month": price_per_tb_month,
    })  # fmt: skip
    require(not (measure and like), "plan: --like must be left out with --measure, got both")
    made = _finished_cache(recipe, tokens, like) if recipe.cache_from else None
    if made is not None:
        recipe = _as_made(recipe, made)
    students = _rates(student_rates, recipe.student.sizes)
    given = Rates(teacher=teacher_tokens_per_s, students=students, tflops=tflops)
    teacher = teacher_shape(recipe) if made is None else shape_in(made)
    starts = check_recipe(recipe, GIVE_A_SHAPE, published_config(recipe))
    text = text_of(recipe, tokens, made)
    size, rates = _size_and_rates(recipe, measure, like, given, teacher, text, made)
    shapes = {name: student_shape(recipe, config) for name, (config, _) in starts.items()}
    first, rows = time_of(recipe, teacher, shapes, text, size, rates)
    stored = _bytes(recipe, teacher, text, size)
    named = recipe.teacher.model or recipe.teacher.size
    values = {
        "name": recipe.name,
        "teacher": {"model": recipe.cache_from or named, **_shape(teacher)},
        "text": {
            "tokens": text.tokens,
            "sequences": text.sequences,
            "masked_positions": size.masked * text.tokens,
            "signal_positions": size.positions * text.tokens,
            "rounds": recipe.cache.rounds,
            "source": text.source,
        },
        "bytes": stored,
        "rates": rates.source,
        "stage_one": first,
        "students": rows,
        "passes": passes(recipe, text),
        "against_live": against_live(recipe, first, rows),
        "advice": [*unread(recipe, teacher, size), *_advice(recipe, text, starts)],
        "price": price_of(first, rows, stored["total"], price_per_hour, price_per_tb_month),
    }
    return values, format_plan(values)


def _check_positive(numbers: dict[str, float | None]) -> None:
    """Refuse numbers that are not above 0; a price may be 0."""
    for name, number in numbers.items():
        above = number is None or number > 0 or (number == 0 and "price" in name)
        require(above, f"plan: {name} must be above 0, got {number}")


def _finished_cache(recipe: Recipe, tokens: float | None, like: str | None) -> Cache:
    """The finished cache that the students read; its text and size are known."""
    made = Cache.open(recipe.finished_cache)
    require(
        tokens is None and like is None,
        "plan: --tokens and --like must be left out where students read a finished cache, got "
        f"cache_from={recipe.cache_from}",
    )
    made.teacher.check()
    return made


def _as_made(recipe: Recipe, cache: Cache) -> Recipe:
    """The recipe with the rounds of a finished cache, and without a teacher where it has none."""
    mask_only = cache.encoding.mask_only
    config = replace(recipe.cache, rounds=cache.manifest.rounds, mask_only=mask_only)
    return replace(recipe, cache=config)


def _size_and_rates(
    recipe: Recipe,
    measure: int,
    like: str | None,
    given: Rates,
    teacher: Shape,
    text: Text,
    made: Cache | None,
) -> tuple[Size, Rates]:
    """Bytes and rates as the options say; given rates replace measured ones."""
    found = given
    if measure:
        from distilcache.pipeline.plan.measure import measured, measured_students
    if made is not None:
        size = cache_size(made, f"as in {recipe.cache_from}")
        found = measured_students(recipe, made) if measure else given
    elif measure:
        require(
            not recipe.cache.mask_only,
            "plan: --measure must run a teacher, got cache.mask_only = true",
        )
        size, found = measured(recipe, measure)
    else:
        size = like_size(recipe, like, teacher) if like else formula_size(recipe, teacher, text)
    students = {**found.students, **given.students}
    return size, replace(found, teacher=given.teacher or found.teacher, students=students)


def _advice(recipe: Recipe, text: Text, starts: dict[str, Any]) -> list[str]:
    """What speaks against the students in the steps that they will take."""
    steps = total_steps(recipe.train, math.ceil(text.sequences / recipe.train.batch_size))
    return [
        line
        for size, (config, teacher) in starts.items()
        for line in advice(
            size,
            recipe.student,
            shape_of(config),
            shape_of(teacher or config),
            config.model_type,
            steps,
        )
    ]


def _bytes(recipe: Recipe, teacher: Shape, text: Text, size: Size) -> dict[str, Any]:
    """What the cache takes on disk."""
    return {
        "source": size.source,
        "per_token": list(size.per_token),
        "all_logits_per_token": _all_logits(recipe, teacher, text),
        "teacher": size.teacher,
        "total": [n * text.tokens * recipe.cache.rounds + size.teacher for n in size.per_token],
        "columns": {n: {"per_token": list(pair)} for n, pair in size.columns.items()},
    }


def _all_logits(recipe: Recipe, teacher: Shape, text: Text) -> tuple[float, float] | None:
    """Bytes per token with the logit of every id in place of hidden states.

    That is exact, and smaller for vocabularies of some hundred ids, such as those of proteins.

    Returns:
        None if the recipe stores no hidden states, or students read a finished cache.
    """
    config = recipe.cache
    if config.mask_only or config.hidden_dtype == "none" or recipe.cache_from:
        return None
    logits = replace(
        config,
        top_k=teacher.vocabulary,
        top_p=1.0,
        hidden_dtype="none",
        tail_samples=0,
        residual_samples=0,
    )
    return formula_size(replace(recipe, cache=logits), teacher, text).per_token


def _rates(given: Sequence[str], sizes: Sequence[str]) -> dict[str, float]:
    """Rates by size; the recipe must have these sizes."""
    found = {}
    for text in given:
        size, _, number = text.partition("=")
        try:
            found[size.strip()] = float(number)
        except ValueError:
            number = ""
        if not number or found[size.strip()] <= 0:
            raise UserError(
                f"plan: --student-tokens-per-s must read SIZE=N, got {text!r}; for example "
                "6x768=1100"
            )
        require(
            size.strip() in sizes,
            f"plan: --student-tokens-per-s must name a size of the recipe ({', '.join(sizes)}), "
            f"got {size!r}",
        )
    return found


def _shape(teacher: Shape) -> dict[str, Any]:
    return {n: getattr(teacher, n) for n in ("layers", "width", "ffn", "vocabulary", "parameters")}
