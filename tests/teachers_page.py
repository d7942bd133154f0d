"""Writes docs/teachers.md from the tables that the tests run: ``python -m tests.teachers_page``."""

from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distilcache.stages.models.encoder import model_class
from distilcache.stages.models.families import FAMILIES, NO_RELATIONS, Family
from tests.stages.models.families_support import REFUSED, TYPES, WORKING
from tests.stages.models.layouts import LAYOUTS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "teachers.md"
INTRO = """# Teachers

Which models can be teachers. Made by `python -m tests.teachers_page` from the rows of the tests;
each row is a test.

## Types

Of the {types} types of masked LM in transformers (XLNet included) {working} work. *Exactly* means:
the cache gives the model's own logits (float32, within 1e-5), and students of the same type start
from its layers and open with plain transformers. What a model is made of is read off the model
itself. So new types work, too, if their LM head is a decoder, or dense, activation, norm, decoder.
`deberta`, `fnet` and `xmod` do not run in bfloat16: with them `dtype = "auto"` is float32.

"""
RELATIONS = """
Relations (`cache.relation_layer`) can be stored of all teachers that work but {without}.
Their queries, keys and values are no linear maps, of the layer's width, of what the layer reads;
nor are those of models with fewer key than query heads.
"""
LAYOUT_INTRO = """
## Checkpoints as they are published

Many public checkpoints have other names and files than today's libraries write. For the tests each
was made anew as a tiny model, with the names, files and settings of the public one. *With ...* says
what you have to do first; the command says so as well when it refuses the checkpoint.

"""


def teachers_page() -> str:
    """The page as it should be."""
    types = [["type", "class", "teacher"]]
    for kind in TYPES:
        name = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind)
        name = name or model_class(CONFIG_MAPPING[kind]()).__name__
        types.append([f"`{kind}`", f"`{name}`", _verdict(FAMILIES.get(kind, Family()))])
    layouts = [["checkpoint", "what is special", "teacher"]]
    layouts += [[layout.name, layout.quirk, layout.verdict] for layout in LAYOUTS]
    counts = {"types": len(WORKING) + len(REFUSED), "working": len(WORKING)}
    *others, last = (f"`{kind}`" for kind in NO_RELATIONS)
    relations = RELATIONS.format(without=f"{', '.join(others)} and {last}")
    return INTRO.format(**counts) + _table(types) + relations + LAYOUT_INTRO + _table(layouts)


def _verdict(family: Family) -> str:
    if family.refused:
        return f"refused: {family.refused}"
    if family.even:
        return f'exactly, with `corpus.packing = "blocks"`: {family.even}'
    if family.mask == "permutation":
        return 'exactly, with `cache.positions = "masked"`: it predicts masked positions alone'
    return "exactly"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(teachers_page())
