"""Ask what a recipe alone can tell, before anything is read or written.

The recipe, the teacher's ``config.json`` and the headers of its weights say whether the stages will
go through; every command that begins a project asks them here.
"""

import json
from typing import Any

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.schema import Encoding
from distilcache.data.corpus.words import continuations
from distilcache.data.errors import require
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.models.families import check_dtype, shape_of
from distilcache.stages.models.tokenizers import (
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.fit import check_before_text, check_settings
from distilcache.stages.teacher_cache.layout import encoding_of


def check_recipe(
    recipe: Recipe, needs: str = "", published: Any = None
) -> dict[str, tuple[Any, Any]]:
    """Check that teacher, corpus, cache and students of a recipe fit together.

    With ``cache_from``, the cache and its teacher are asked.

    Args:
        recipe: The project.
        needs: What to do if the teacher is missing; "": ``recipe.needs``.
        published: Configuration of a well-known teacher that need not be at hand; None: it must be.

    Returns:
        By size the student's configuration, and its teacher's (None: it has none).

    Raises:
        UserError: There is no teacher, or something does not fit.
    """
    if recipe.cache_from:
        return _check_students_of(recipe, Cache.open(recipe.finished_cache))
    teacher = recipe.teacher
    require(
        bool(teacher.model or teacher.size or recipe.cache.mask_only),
        "teacher: model must name a checkpoint (or teacher.size a teacher to be made), got "
        "neither; pass --set teacher.model=PATH",
    )
    if recipe.cache.mask_only:
        config = None
    elif not teacher.model:
        config = made_teacher(recipe)
    else:
        config = published or _given_teacher(recipe, needs or recipe.needs)
    return _check_students(recipe, config, _encoding(recipe, config))


def check_heldout(recipe: Recipe) -> None:
    """Check that text will be held out, where the models are measured at the end."""
    require(
        recipe.corpus.heldout_fraction > 0 or bool(recipe.corpus.heldout_sources),
        "corpus: heldout_fraction must be above 0 where models are measured on held-out text, got "
        "0; pass --set corpus.heldout_fraction=0.02, or name corpus.heldout_sources",
    )


def _given_teacher(recipe: Recipe, needs: str) -> Any:
    teacher, tokenizer = recipe.teacher, recipe.tokenizer
    if tokenizer == "train":
        made = recipe.corpus_dir / "tokenizer"  # A teacher may have been made for it.
        require(
            made.is_dir(),
            f"corpus: tokenizer must be that of the teacher {teacher.model!r}, got 'train'; leave "
            "corpus.tokenizer out",
        )
        tokenizer = str(made)
    if recipe.masking.unit == "word":
        own = load_tokenizer(tokenizer, needs, revision=recipe.tokenizer_revision)
        continuations(json.loads(own.backend_tokenizer.to_str()), vocabulary_size(own))
    return check_before_text(
        [(teacher.model, teacher.revision), *((name, "") for name in teacher.ensemble)],
        tokenizer,
        recipe.corpus.max_length,
        recipe.corpus.packing == "blocks",
        recipe.cache,
        tokenizer_revision=recipe.tokenizer_revision,
        needs=needs,
    )


def made_teacher(recipe: Recipe) -> Any:
    """The configuration that the recipe's own teacher will have."""
    from distilcache.stages.student_train.student import student_config

    size, corpus = recipe.teacher.size, recipe.corpus
    masks = encoding_of(
        CacheConfig(mask_only=True),
        vocab_size=corpus.vocab_size,
        max_length=corpus.max_length,
        pad_id=0,
        width=0,
        num_layers=0,
    )
    config = student_config(size, StudentConfig(sizes=(size,), init="random"), masks, None)
    check_settings(config, corpus.max_length, corpus.packing == "blocks", recipe.cache)
    return config


def _encoding(recipe: Recipe, teacher: Any) -> Encoding:
    """What the recipe's cache will hold of a teacher; None: of masks alone."""
    shape = None if teacher is None else shape_of(teacher)
    return encoding_of(
        recipe.cache,
        vocab_size=recipe.corpus.vocab_size if teacher is None else teacher.vocab_size,
        max_length=recipe.corpus.max_length,
        pad_id=0,
        width=shape.width if shape else 0,
        num_layers=shape.layers if shape else 0,
    )


def _check_students_of(recipe: Recipe, cache: Cache) -> dict[str, tuple[Any, Any]]:
    from distilcache.stages.student_train.weights import config_in

    given = recipe.corpus.tokenizer
    if given not in ("", "train"):
        found = load_tokenizer(given, recipe.needs, revision=recipe.tokenizer_revision)
        require(
            tokenizer_fingerprint(found)
            == cache.manifest.provenance["identity"]["tokenizer_sha256"],
            f"corpus: tokenizer must be that of the cache {cache.source}, got {given!r}; leave "
            "corpus.tokenizer out",
        )
    return _check_students(recipe, config_in(cache.tokenizer_dir), cache.encoding)


def _check_students(recipe: Recipe, teacher: Any, encoding: Encoding) -> dict[str, tuple[Any, Any]]:
    """Check that the cache holds what students read, and that their sizes fit the teacher."""
    from distilcache.stages.student_train.arguments import check_reports, check_schedule
    from distilcache.stages.student_train.signals import relation_heads, required_signals
    from distilcache.stages.student_train.student import check_model, student_config

    check_dtype(recipe.dtype, [teacher] if teacher else [])
    required_signals(encoding, recipe.train, trimmed=recipe.student.vocabulary != 1)
    for train in (recipe.train, recipe.teacher.train):
        check_schedule(train)
        check_reports(train)
    found = {}
    for size in recipe.student.sizes:
        config = student_config(size, recipe.student, encoding, teacher)
        if recipe.train.alpha_rel > 0:
            relation_heads(recipe.train, shape_of(teacher or config), shape_of(config))
        check_model(config, size, recipe.student, teacher)
        found[size] = (config, teacher)
    return found
