"""Check the recipe's teacher before anything else is read or written."""

from distilcache.data.errors import require
from distilcache.pipeline.recipe import Recipe
from distilcache.stages.teacher_cache.fit import check_before_text


def check_teacher(recipe: Recipe, needs: str = "") -> None:
    """Check type, LM head, vocabulary and positions from the headers of the checkpoint.

    Args:
        recipe: The project; with ``cache_from`` it needs no teacher.
        needs: What to do if the teacher is missing; "": ``recipe.needs``.

    Raises:
        UserError: There is no teacher, or it does not fit the recipe.
    """
    teacher = recipe.teacher
    require(
        bool(teacher.model or teacher.size or recipe.cache.mask_only),
        "teacher: model must name a checkpoint (or teacher.size a teacher to be made), got "
        "neither; pass --set teacher.model=PATH",
    )
    if not teacher.model or recipe.cache.mask_only or recipe.cache_from:
        return
    tokenizer = recipe.tokenizer
    if tokenizer == "train":
        made = recipe.home / "corpus" / "tokenizer"  # A teacher may have been made for it.
        require(
            made.is_dir(),
            f"corpus: tokenizer must be that of the teacher {teacher.model!r}, got 'train'; leave "
            "corpus.tokenizer out",
        )
        tokenizer = str(made)
    check_before_text(
        (teacher.model, *teacher.ensemble),
        tokenizer,
        recipe.corpus.max_length,
        recipe.corpus.packing == "blocks",
        recipe.cache,
        revision=teacher.revision,
        tokenizer_revision=recipe.tokenizer_revision,
        needs=needs or recipe.needs,
    )
