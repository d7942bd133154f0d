"""The stages of a project as a readable list.

    corpus -> [teacher, where the recipe makes its own] -> teacher cache -> students -> evaluation

A step whose result exists is skipped, so each function may be called at any time. Training and
evaluation are imported where they are called: the import takes seconds, and corpora do not need it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, require, tell
from distilcache.data.storage.locks import claimed
from distilcache.pipeline.check_recipe import check_heldout, check_recipe
from distilcache.pipeline.recipe import Recipe
from distilcache.pipeline.report.cards import write_cards
from distilcache.pipeline.report.pareto import write_sweep
from distilcache.pipeline.report.table import CONTROL_SUFFIX, FIRST_OF
from distilcache.pipeline.report.write import write_report
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.models.device import resolve_device
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.provenance import check_settings_of
from distilcache.stages.teacher_cache.run import build_cache

if TYPE_CHECKING:
    from distilcache.stages.evaluate.masked_lms import ModelEntry


def distill(recipe: Recipe) -> dict[str, Any]:
    """Everything, from text to the report; without stage one if students read another cache."""
    check_heldout(recipe)
    if recipe.cache_from:
        make_corpus(recipe)
        _require_heldout(recipe)
        _require_same_tokens(recipe)
        tell_other_inputs(recipe, "distill")
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


def _require_heldout(recipe: Recipe) -> None:
    """Refuse a corpus on which nothing can be measured, before the hours that are for that."""
    require(
        has_heldout(recipe),
        f"corpus: text must be held out where models are measured, got none in {recipe.corpus_dir};"
        " remove that folder, and raise corpus.heldout_fraction, end documents elsewhere "
        "(corpus.document), or name other text in corpus.heldout_sources",
    )


def make_teacher_cache(recipe: Recipe, *, measured: bool = False) -> Cache:
    """Stage one: the teacher's signals in ``<home>/cache``; makes corpus and teacher first.

    With ``measured`` the corpus must have held-out text.
    """
    recipe = replace(recipe, cache_from="")
    if recipe.engine.name != "ray":  # its workers are on other machines
        resolve_device(recipe.device)
    with _turn(recipe):
        make_corpus(recipe)
        if measured:
            _require_heldout(recipe)
        teacher = None if recipe.cache.mask_only else recipe.teacher.model or make_teacher(recipe)
    build = build_of(recipe, recipe.corpus_dir, recipe.home / "cache", teacher)
    return build_cache(build, recipe.engine)


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


def tell_other_inputs(recipe: Recipe, stage: str) -> None:
    """A line where the recipe's teacher or corpus is another than its cache was made from."""
    cache = Cache.open(recipe.finished_cache)
    made = cache.manifest.provenance
    taught, named = made["environment"].get("teacher"), recipe.teacher.model
    places = {Path(name).expanduser().resolve() for name in (taught, named) if name}
    if len(places) > 1 and not recipe.cache_from:  # perhaps the same one, moved
        tell(
            f"{stage}: {cache.path} was made by the teacher {taught!r}, and the recipe names "
            f"{named!r}; if that is another one, students learn from the first all the same"
        )
    if not recipe.has_corpus:
        return
    corpus = Corpus.open(recipe.corpus_dir)
    if made["identity"]["corpus_fingerprint"] == corpus.manifest.fingerprint:
        return
    remedy = "to use the new corpus, remove cache and students"
    if recipe.cache_from:
        remedy = f"to hold out the same text, remove {corpus.path} and copy that recipe's [corpus]"
    tell(
        f"{stage}: {recipe.finished_cache} was made from another corpus than is now in "
        f"{corpus.path}: students learn the cache's text, which may hold text that is held out "
        f"now; {remedy}",
        about=f"other corpus {corpus.path}",
    )


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
        recipe=replace(recipe, train=train).to_dict(),
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
    if not recipe.has_corpus:
        check_heldout(recipe)
        make_corpus(recipe)
    _require_same_tokens(recipe)
    tell_other_inputs(recipe, "evaluate")
    result = evaluate_models(
        entries,
        recipe.corpus_dir,
        recipe.masking,
        recipe.evaluate,
        device=recipe.device,
        dtype=recipe.dtype,
    )
    write_report(result, recipe.home / "report", recipe.to_dict())
    write_sweep(result, recipe.home / "students", recipe.home / "report")
    datasets = Corpus.open(recipe.corpus_dir).datasets
    write_cards(result, recipe.home / "students", recipe.name, datasets)
    return result


def has_heldout(recipe: Recipe) -> bool:
    """Whether the project has text to measure on, or would have once its corpus is made."""
    if not recipe.has_corpus:
        return recipe.corpus.heldout_fraction > 0 or bool(recipe.corpus.heldout_sources)
    try:
        splits = Corpus.open(recipe.corpus_dir).manifest.splits
    except UserError:  # damaged, which `evaluate` says
        return True
    return "heldout" in splits and splits["heldout"]["sequences"] > 0


def models_of(recipe: Recipe) -> "list[ModelEntry]":
    """The cache's teacher, if it has one, and all trained students with their controls."""
    from distilcache.stages.evaluate.masked_lms import ModelEntry
    from distilcache.stages.models.cards import origin_in_cache
    from distilcache.stages.student_train.output import require_sound

    cache = Cache.open(recipe.finished_cache)
    for path in sorted((recipe.home / "students").glob("*")):
        require_sound(path, "evaluate")
    students = trained_students(recipe.home / "students")
    require(
        bool(students),
        f"evaluate: {recipe.home / 'students'} must hold a trained student, got none; run "
        "distilcache student-train first",
    )
    entries = []
    if not cache.encoding.mask_only:
        cache.teacher.check()
        name = f"{FIRST_OF}{cache.num_teachers}" if cache.num_teachers > 1 else "teacher"
        origin = origin_in_cache(cache.manifest.provenance, cache.num_teachers)
        entries.append(ModelEntry(name, "teacher", cache.teacher_dir, origin))
    _say_foreign(students, cache)
    for path in students:
        role = "control" if path.name.endswith(CONTROL_SUFFIX) else "student"
        entries.append(ModelEntry(name=path.name, role=role, path=path))
    return entries


def trained_students(folder: Path) -> list[Path]:
    """Finished students, the largest first, each followed by its control."""
    found = [p.parent for p in folder.glob("*/model.safetensors")]
    size = {p: (p / "model.safetensors").stat().st_size for p in found}
    return sorted(found, key=lambda p: (-size[p], p.name))


def _say_foreign(students: Sequence[Path], cache: Cache) -> None:
    """Warn about students that were trained from another cache; they are compared all the same."""
    from distilcache.stages.student_train.output import read_record

    for path in students:
        if not (path / "training.json").is_file():  # from elsewhere, put here to be compared
            continue
        if read_record(path, "evaluate")["settings"].get("cache") != cache.manifest.fingerprint:
            tell(
                f"evaluate: {path} was trained from another cache than {cache.path}, perhaps with "
                "another teacher; remove the folder to leave it out"
            )


def _require_same_tokens(recipe: Recipe) -> None:
    """Refuse a corpus of another tokenizer: its ids would be other words to the models."""
    cache, corpus = Cache.open(recipe.finished_cache), Corpus.open(recipe.corpus_dir)
    wanted = cache.manifest.provenance["identity"]["tokenizer_sha256"]
    require(
        corpus.manifest.tokenizer_sha256 == wanted,
        f"evaluate: corpus must have the tokenizer of the cache, got another one in {corpus.path}; "
        f"remove that folder and make it again: distilcache corpus with --set "
        f"corpus.tokenizer={cache.teacher_dir}",
    )
