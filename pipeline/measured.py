"""What evaluation measures: the models of a project, and held-out text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, require, tell
from distilcache.pipeline.made import tell_changes
from distilcache.pipeline.recipe import Recipe
from distilcache.pipeline.report.table import CONTROL_SUFFIX, FIRST_OF
from distilcache.stages.corpus.config import CorpusConfig

if TYPE_CHECKING:
    from distilcache.stages.evaluate.masked_lms import ModelEntry


def measured_corpus(recipe: Recipe) -> Path | None:
    """The corpus to measure on: the project's, made or not.

    Without a corpus and a section ``[corpus]`` of its own, it is the one that ``cache_from`` was
    made from, beside that cache; None: it is not there, or has no held-out text.
    """
    if recipe.has_corpus or not recipe.cache_from or recipe.corpus != CorpusConfig():
        return recipe.corpus_dir
    cache = recipe.finished_cache
    if isinstance(cache, str) or not (cache.parent / "corpus" / "manifest.json").exists():
        return None
    corpus = Corpus.open(cache.parent / "corpus")
    return corpus.path if _is_of(Cache.open(cache), corpus) and _holds_out(corpus) else None


def _holds_out(corpus: Corpus) -> bool:
    splits = corpus.manifest.splits
    return "heldout" in splits and bool(splits["heldout"]["sequences"] > 0)


def _is_of(cache: Cache, corpus: Corpus) -> bool:
    made_from = cache.manifest.provenance["identity"]["corpus_fingerprint"]
    return bool(made_from == corpus.manifest.fingerprint)


def has_heldout(recipe: Recipe) -> bool:
    """Whether the project has text to measure on, or would have once its corpus is made."""
    try:
        path = measured_corpus(recipe)
        if path is None:
            return False
        if not (path / "manifest.json").exists():
            return recipe.corpus.heldout_fraction > 0 or bool(recipe.corpus.heldout_sources)
        return _holds_out(Corpus.open(path))
    except UserError:  # damaged, which `evaluate` says
        return True


def require_heldout(recipe: Recipe) -> None:
    """Refuse a corpus on which nothing can be measured, before the hours that are for that."""
    require(
        has_heldout(recipe),
        f"corpus: text must be held out where models are measured, got none in {recipe.corpus_dir};"
        " move that folder away, and raise corpus.heldout_fraction, end documents elsewhere "
        "(corpus.document), or name other text in corpus.heldout_sources",
    )


def require_same_tokens(recipe: Recipe, corpus: Corpus) -> None:
    """Refuse a corpus of another tokenizer: its ids would be other words to the models."""
    cache = Cache.open(recipe.finished_cache)
    wanted = cache.manifest.provenance["identity"]["tokenizer_sha256"]
    require(
        corpus.manifest.tokenizer_sha256 == wanted,
        f"evaluate: corpus must have the tokenizer of the cache, got another one in {corpus.path}; "
        f"move that folder away and make it again: distilcache corpus with --set "
        f"corpus.tokenizer={cache.teacher_dir}",
    )


def tell_other_corpus(recipe: Recipe, corpus: Corpus, stage: str) -> None:
    """A line where students learn another text than the corpus holds."""
    if _is_of(Cache.open(recipe.finished_cache), corpus):
        return
    remedy = "to use the new corpus, give the project another name: the teacher runs again"
    if recipe.cache_from:
        remedy = (
            f"to hold out the same text, move {corpus.path} away and copy that recipe's [corpus]"
        )
    tell(
        f"{stage}: {recipe.finished_cache} was made from another corpus than is now in "
        f"{corpus.path}: students learn the cache's text, which may hold text that is held out "
        f"now; {remedy}",
        about=f"other corpus {corpus.path}",
    )


def tell_other_inputs(recipe: Recipe, stage: str) -> None:
    """Lines where the recipe's teacher or corpus is another than its own cache is of."""
    tell_changes(recipe, stage)
    if recipe.has_corpus:
        tell_other_corpus(recipe, Corpus.open(recipe.corpus_dir), stage)


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
