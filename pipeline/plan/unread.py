"""What a cache would hold that no loss of its recipe reads."""

from distilcache.pipeline.plan.shapes import Shape
from distilcache.pipeline.plan.size import Size, encoding_in
from distilcache.pipeline.recipe import Recipe
from distilcache.pipeline.report.text import span
from distilcache.stages.student_train.signals import required_signals


def unread(recipe: Recipe, teacher: Shape, size: Size) -> list[str]:
    """A line for each setting that costs bytes alone; none where the cache is made already."""
    if recipe.cache.mask_only or recipe.cache_from:
        return []
    encoding, trimmed = encoding_in(recipe, teacher), recipe.student.vocabulary != 1
    signals = required_signals(encoding, recipe.train, trimmed=trimmed)
    last = f"hidden_{teacher.layers}"
    states = [stored.column for stored in encoding.hidden]
    draws = signals.ce == "replay+residual"
    settings = {
        "cache.hidden_layers=-1": [name for name in states if name != last],
        "cache.hidden_dtype=none": [] if signals.hidden else [last],
        "cache.relation_layer=0": [] if signals.rel else _named(size, "relation"),
        "cache.top_k=0": [] if signals.topk or signals.ce == "sparse" else _named(size, "log"),
        "cache.tail_samples=0": [] if signals.tail_draws else _named(size, "tail"),
        "cache.residual_samples=0": [] if draws else _named(size, "residual"),
    }
    lines = []
    for setting, names in settings.items():
        there = [size.columns[name] for name in names if name in size.columns]
        if there:
            cost = [sum(pair[end] for pair in there) for end in (0, 1)]
            lines.append(
                f"cache: no loss of this recipe reads {', '.join(names)}: {span(cost, '.1f')} "
                f"of {span(size.per_token, '.1f')} bytes per token; --set {setting} spares them"
            )
    return lines


def _named(size: Size, start: str) -> list[str]:
    return [name for name in size.columns if name.startswith(start)]
