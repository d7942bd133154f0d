"""What a project was made with, where its recipe says something else now.

Corpus, cache and students have records of their own. Reports name what these say.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, tell
from distilcache.data.storage.files import read_json
from distilcache.data.storage.remote import is_url, located
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.models.tokenizers import load_tokenizer, tokenizer_fingerprint
from distilcache.stages.teacher_cache.provenance import settings_that_differ

if TYPE_CHECKING:
    from distilcache.stages.evaluate.masked_lms import ModelEntry

Changes = dict[str, tuple[Any, Any]]
"""By field: its value in the records, and in the recipe."""
Trained = Mapping[str, Mapping[str, Any]]
"""By model: what its record says."""
BY_OPTIONS = ("student.sizes", "train.seed")
"""Fields that options of the commands replace: nothing is remarked on them."""


def tell_changes(recipe: Recipe, stage: str) -> None:
    """A line where ``[corpus]`` or ``[teacher]`` is not what the project's own cache is of.

    Training refuses other changes.
    """
    _tell(recipe, stage, {**corpus_changes(recipe, recipe.corpus_dir), **teacher_changes(recipe)})


def recipe_as_made(
    recipe: Recipe, corpus_dir: Path, trained: Trained, differing: Iterable[str]
) -> dict[str, Any]:
    """The recipe as plain values, with what records say in their place; a line on such fields.

    Args:
        recipe: The project.
        corpus_dir: The corpus that is measured on.
        trained: See :func:`fields_of_students`.
        differing: Fields in which students differ; their values are lists.
    """
    of_corpus, of_students = corpus_changes(recipe, corpus_dir), student_changes(recipe, trained)
    of_cache = {**teacher_changes(recipe), **cache_changes(recipe)}
    own = {} if recipe.cache_from else of_cache  # of another cache a recipe says nothing
    own |= of_corpus if corpus_dir == recipe.corpus_dir else {}
    own |= {name: pair for name, pair in of_students.items() if name not in differing}
    _tell(recipe, "evaluate", own)
    return _with_made(recipe, {**of_corpus, **of_cache, **of_students})


def inputs_as_made(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, with what records of teacher, cache and its own corpus say."""
    own = {} if recipe.cache_from else corpus_changes(recipe, recipe.corpus_dir)
    return _with_made(recipe, {**own, **teacher_changes(recipe), **cache_changes(recipe)})


def _with_made(recipe: Recipe, changes: Changes) -> dict[str, Any]:
    values = recipe.to_dict()
    for name, (made, _) in changes.items():
        sections, _, field = name.rpartition(".")
        _value(values, sections)[field] = made
    return values


def _tell(recipe: Recipe, stage: str, changes: Changes) -> None:
    told = [
        f"{name} was {made!r}, is {now!r}"
        for name, (made, now) in changes.items()
        if name not in BY_OPTIONS
    ]
    if told:
        tell(
            f"{stage}: {recipe.home} was made with other settings than the recipe has now: "
            f"{'; '.join(told)}; what is made already is used as it is"
        )


def corpus_changes(recipe: Recipe, folder: Path) -> Changes:
    """Fields of ``[corpus]`` that the corpus in a folder was not made with."""
    there: Any = None
    with contextlib.suppress(UserError):  # absent or damaged, which `corpus` says
        there = read_json(folder / "build.json", "corpus: build.json")
    if not isinstance(there, dict):
        return {}
    asked = {k: _plain(v) for k, v in asdict(recipe.corpus).items() if k != "tokenizer"}
    changes = {
        f"corpus.{name}": (there[name], value)
        for name, value in asked.items()
        if _places(name, there.get(name, value)) != _places(name, value)
    }
    if _other_tokenizer(recipe, folder, there.get("tokenizer")):
        changes["corpus.tokenizer"] = (there.get("tokenizer"), recipe.corpus.tokenizer)
    return changes


def _places(field: str, value: Any) -> Any:
    """A field's value; of sources on this machine the absolute paths, however they are named."""
    if field not in ("sources", "heldout_sources") or not isinstance(value, list):
        return value
    return [
        name if name.startswith(("docstrings", "hf:")) or is_url(name) else _resolved(name)
        for name in map(str, value)
    ]


def _resolved(path: str) -> Path:
    return Path(located(path)).expanduser().resolve()


def _other_tokenizer(recipe: Recipe, folder: Path, made: Any) -> bool:
    """Whether the recipe names another tokenizer than the corpus has."""
    given = recipe.corpus.tokenizer
    if given in ("", "train"):  # with `cache_from` both mean that of the cache
        return given == "train" and made != "train" and not recipe.cache_from
    try:
        found = load_tokenizer(given, revision=recipe.tokenizer_revision)
        manifest = Corpus.open(folder).manifest
        return bool(tokenizer_fingerprint(found) != manifest.tokenizer_sha256)
    except UserError:
        return True


def teacher_changes(recipe: Recipe) -> Changes:
    """Fields of ``[teacher]`` that the cache, or the teacher that the project made, is not of."""
    environment = Cache.open(recipe.finished_cache).manifest.provenance["environment"]
    asked, taught = recipe.teacher, environment.get("teacher")
    if taught is None:
        return {}
    made_here = Path(taught).parts[-2:] == ("teacher", "model") and not recipe.cache_from
    if made_here and not asked.model:
        return _made_teacher_changes(recipe)
    changes: Changes = {}
    if not asked.model or _resolved(taught) != _resolved(asked.model):
        changes["teacher.model"] = (taught, asked.model)
    if (revision := environment.get("teacher_revision", "")) != asked.revision:
        changes["teacher.revision"] = (revision, asked.revision)
    others = environment.get("ensemble", [])
    if [*map(_resolved, others)] != [*map(_resolved, asked.ensemble)]:
        changes["teacher.ensemble"] = (others, list(asked.ensemble))
    return changes


def _made_teacher_changes(recipe: Recipe) -> Changes:
    from distilcache.stages.student_train.output import fields_of_record

    made = recipe.home / "teacher" / "model"
    if not (made / "training.json").is_file():
        return {}
    found = fields_of_record(made, "teacher")
    with contextlib.suppress(UserError):
        found["rounds"] = Cache.open(made.parent / "cache").manifest.rounds
    asked: dict[str, Any] = {"size": recipe.teacher.size, "rounds": recipe.teacher.rounds}
    asked |= {f"train.{k}": _plain(v) for k, v in asdict(recipe.teacher.train).items()}
    return {
        f"teacher.{name}": (found[name], value)
        for name, value in asked.items()
        if not name.startswith("train.alpha_") and found.get(name, value) != value
    }


def cache_changes(recipe: Recipe) -> Changes:
    """Fields of ``[masking]`` and ``[cache]`` that the cache was not made with."""
    cache = Cache.open(recipe.finished_cache)
    changes = {
        name: (_value(asdict(Recipe()), name) if made is None else made, now)
        for name, made, now in settings_that_differ(cache, recipe.masking, recipe.cache)
    }
    if (rounds := cache.manifest.rounds) != recipe.cache.rounds:
        changes["cache.rounds"] = (rounds, recipe.cache.rounds)
    return changes


def fields_of_students(models: "Iterable[ModelEntry]") -> Trained:
    """Of the models that were trained here: role, size, and fields of ``student`` and ``train``."""
    from distilcache.stages.student_train.output import fields_of_record

    return {
        model.name: {"role": model.role, **fields_of_record(model.path, "evaluate")}
        for model in models
        if model.role != "teacher" and (model.path / "training.json").is_file()
    }


def trained_differently(trained: Trained) -> dict[str, dict[str, str]]:
    """Fields in which students, or controls, differ besides size and seed: by model the value."""
    differing: dict[str, dict[str, str]] = {}
    for role in ("student", "control"):
        alike = {name: values for name, values in trained.items() if values["role"] == role}
        for field in sorted({field for values in alike.values() for field in values}):
            values = {name: str(values.get(field, "-")) for name, values in alike.items()}
            if field not in ("size", "train.seed") and len(set(values.values())) > 1:
                short = {name: v if len(v) <= 40 else f"...{v[-37:]}" for name, v in values.items()}
                differing.setdefault(field, {}).update(short)
    return differing


def student_changes(recipe: Recipe, trained: Trained) -> Changes:
    """Fields of ``[student]`` and ``[train]`` that no student, or not every one, was made with.

    Where students differ, the value of the records is a list.
    """
    students = [values for values in trained.values() if values["role"] == "student"]
    if not students:
        return {}
    sizes = list(dict.fromkeys(values["size"] for values in students))
    found = {"student.sizes": (sizes, list(recipe.student.sizes))}
    for section, config in (("student", recipe.student), ("train", recipe.train)):
        for name, now in asdict(config).items():
            field = f"{section}.{name}"
            there = [values[field] for values in students if field in values]
            different = [v for i, v in enumerate(there) if v not in there[:i]]
            if different:
                made = different[0] if len(different) == 1 else different
                found[field] = (made, _plain(now))
    return {field: pair for field, pair in found.items() if pair[0] != pair[1]}


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
