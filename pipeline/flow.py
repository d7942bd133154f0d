"""The stages of a project as a readable list.

    corpus -> [teacher, where the recipe makes its own] -> teacher cache -> students -> evaluation

A step whose result exists is skipped, so each function may be called at any time. Training and
evaluation are imported where they are called: the import takes seconds, and corpora do not need it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.storage.files import require_writable
from distilcache.data.storage.locks import claimed
from distilcache.pipeline.check_recipe import check_heldout, check_recipe
from distilcache.pipeline.made import (
    fields_of_students,
    inputs_as_made,
    recipe_as_made,
    trained_differently,
)
from distilcache.pipeline.measured import (
    measured_corpus,
    models_of,
    require_heldout,
    require_same_tokens,
    tell_other_corpus,
)
from distilcache.pipeline.recipe import Recipe
from distilcache.pipeline.report.cards import write_cards
from distilcache.pipeline.report.pareto import write_sweep
from distilcache.pipeline.report.table import CONTROL_SUFFIX
from distilcache.pipeline.report.write import write_report
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.models.device import resolve_device
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.provenance import check_settings_of
from distilcache.stages.teacher_cache.run import build_cache


def distill(recipe: Recipe) -> dict[str, Any]:
    """Everything, from text to the report; without stage one if students read another cache."""
    check_heldout(recipe)
    if recipe.cache_from:
        check_recipe(recipe)
        corpus = _corpus_to_measure(recipe)
        require_heldout(recipe)
        require_same_tokens(recipe, corpus)
        tell_other_corpus(recipe, corpus, "distill")
    else:
        make_teacher_cache(recipe, measured=True)
    train_students(recipe)
    return evaluate(recipe)


def make_corpus(recipe: Recipe) -> Corpus:
    """Text to token blocks in ``<home>/corpus``; with ``cache_from`` in that cache's tokens."""
    check_recipe(recipe)
    tokenizer, revision = recipe.tokenizer, recipe.tokenizer_revision
    if recipe.cache_from and recipe.corpus.tokenizer in ("", "train"):
        tokenizer, revision = str(Cache.open(recipe.finished_cache).tokenizer_dir), ""
    out, needs = recipe.corpus_dir, recipe.needs
    return build_corpus(recipe.corpus, out, tokenizer, needs=needs, revision=revision)


def _corpus_to_measure(recipe: Recipe) -> Corpus:
    """That of ``cache_from`` where the recipe names no text, else the project's own, made anew."""
    path = measured_corpus(recipe)
    if path is None:
        raise UserError(
            "evaluate: held-out text must be named where there is none of the corpus of "
            f"cache_from beside it, got no [corpus] and {recipe.cache_from}; name text that no "
            "student was trained on in corpus.sources, a part of which is then held out, or in "
            "corpus.heldout_sources"
        )
    return make_corpus(recipe) if path == recipe.corpus_dir else Corpus.open(path)


def make_teacher_cache(recipe: Recipe, *, measured: bool = False) -> Cache:
    """Stage one: the teacher's signals in ``<home>/cache``; makes corpus and teacher first.

    With ``measured`` the corpus must have held-out text.
    """
    recipe = replace(recipe, cache_from="", needs=_needs(recipe))
    if recipe.engine.name != "ray":  # its workers are on other machines
        resolve_device(recipe.device)
    with _turn(recipe):
        make_corpus(recipe)
        if measured:
            require_heldout(recipe)
        teacher = None if recipe.cache.mask_only else recipe.teacher.model or make_teacher(recipe)
    build = build_of(recipe, recipe.corpus_dir, recipe.home / "cache", teacher)
    return build_cache(build, recipe.engine)


def _needs(recipe: Recipe) -> str:
    """What to do where text or teacher are gone; of a finished cache students need neither."""
    if not (recipe.has_corpus and (recipe.home / "cache" / "manifest.json").exists()):
        return recipe.needs
    return (
        f"{recipe.needs or 'correct the path'}; as corpus and cache are finished, student-train "
        "and evaluate work without"
    )


def build_of(recipe: Recipe, corpus_dir: Path, out: Path, teacher: str | None) -> Build:
    """Stage one of a recipe, from a corpus to a cache."""
    return Build(
        corpus_dir=corpus_dir,
        out=out,
        teacher=teacher,
        teacher_revision=recipe.teacher.revision,
        ensemble=recipe.teacher.ensemble,
        masking=recipe.masking,
        config=recipe.cache,
        device=recipe.device,
        dtype=recipe.dtype,
        needs=recipe.needs,
    )


@contextmanager
def _turn(recipe: Recipe) -> Iterator[None]:
    """Of the processes of a Slurm array, only one at a time makes corpus and teacher."""
    made = recipe.has_corpus and (recipe.teacher.model or recipe.cache.mask_only)
    if recipe.engine.name != "slurm" or made:
        yield
        return
    with claimed(recipe.home / "cache", wait=True):
        yield


def make_teacher(recipe: Recipe) -> str:
    """Pre-train a teacher: stage two on masks alone is plain MLM."""
    from distilcache.stages.student_train.run import train_student

    home = recipe.home / "teacher"
    build = Build(
        corpus_dir=recipe.corpus_dir,
        out=home / "cache",
        teacher=None,
        masking=recipe.masking,
        config=CacheConfig(mask_only=True, rounds=recipe.teacher.rounds),
        device=recipe.device,
        dtype=recipe.dtype,
    )
    build_cache(build)
    train_student(
        cache_dir=home / "cache",
        out=home / "model",
        size=recipe.teacher.size,
        student=StudentConfig(sizes=(recipe.teacher.size,), init="random"),
        train=_without_teacher(recipe.teacher.train),
        device=recipe.device,
        dtype=recipe.dtype,
        recipe=recipe.to_dict(),
        role="teacher",
    )
    return str(home / "model")


def train_students(recipe: Recipe, sizes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Stage two: all students from one cache, with their controls if the recipe asks for them."""
    from distilcache.stages.student_train.ranks import leave_ranks

    results = []
    for size in sizes or recipe.student.sizes:
        recipe.student.parse(size)
    for size in sizes or recipe.student.sizes:
        results.append(train_one(recipe, size))
        if recipe.student.control:
            results.append(train_one(recipe, size, control=True))
    leave_ranks()
    return results


def train_one(
    recipe: Recipe,
    size: str,
    *,
    control: bool = False,
    seed: int | None = None,
    label: str = "",
) -> dict[str, Any]:
    """One student, or its control; ``seed`` replaces the recipe's, ``label`` goes into its name."""
    from distilcache.stages.student_train.run import train_student

    if not recipe.cache_from:
        check_settings_of(Cache.open(recipe.finished_cache), recipe.masking, recipe.cache)
    train = recipe.train if seed is None else replace(recipe.train, seed=seed)
    if control:
        train = _without_teacher(train)
    name = student_name(recipe, size, train.seed, control=control, label=label)
    figures = train_student(
        cache_dir=recipe.finished_cache,
        out=recipe.home / "students" / name,
        size=size,
        student=recipe.student,
        train=train,
        device=recipe.device,
        dtype=recipe.dtype,
        recipe=inputs_as_made(replace(recipe, train=train)),
        role="control" if control else "student",
    )
    return {"name": name, **figures}


def _without_teacher(train: TrainConfig) -> TrainConfig:
    return replace(train, alpha_ce=0.0, alpha_mlm=1.0, alpha_cos=0.0, alpha_mse=0.0, alpha_rel=0.0)


def student_name(recipe: Recipe, size: str, seed: int, *, control: bool, label: str) -> str:
    """Folder of a student in ``students``.

    The number of its ids is part of it where it has not all of them, and a seed other than the
    recipe's.
    """
    if recipe.student.vocabulary != 1 and "-vocabulary=" not in label:
        label = f"-vocabulary={recipe.student.vocabulary:.10g}{label}"
    name = f"{size}{label}" if seed == recipe.train.seed else f"{size}{label}-seed{seed}"
    return f"{name}{CONTROL_SUFFIX}" if control else name


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Measure the teacher and all trained students; report in ``<home>/report``.

    Where students read another cache, the project may have no corpus yet: it is made.
    """
    from distilcache.stages.evaluate.run import evaluate_models

    entries = models_of(recipe)
    if recipe.has_corpus:
        corpus = Corpus.open(recipe.corpus_dir)
    else:
        check_heldout(recipe)
        corpus = _corpus_to_measure(recipe)
    require_same_tokens(recipe, corpus)
    tell_other_corpus(recipe, corpus, "evaluate")
    trained = fields_of_students(entries)
    differing = trained_differently(trained)
    made = recipe_as_made(recipe, corpus.path, trained, differing)
    report, students = recipe.home / "report", recipe.home / "students"
    require_writable(report)
    result = evaluate_models(
        entries,
        corpus.path,
        recipe.masking,
        recipe.evaluate,
        device=recipe.device,
        dtype=recipe.dtype,
    )
    result |= {"differing": differing} if differing else {}
    write_report(result, report, made)
    write_sweep(result, students, report)
    write_cards(result, students, recipe.name, corpus.datasets)
    return result
