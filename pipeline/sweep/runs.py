"""Which students a sweep has: all combinations of sizes, seeds and values of fields."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from distilcache.data.errors import require
from distilcache.pipeline.recipe import Recipe, override_recipe

VARIED = ("train", "student")
"""Sections of the recipe whose fields may be varied; they leave the cache as it is."""
OF_THE_TEACHER = tuple(
    f"train.{name}"
    for name in ("signal", "restrict_ce_to_mask", "temperature", "alpha_ce", "alpha_mlm",
                 "alpha_cos", "alpha_mse", "alpha_rel", "relation_heads")
)  # fmt: skip
"""Fields of losses that a control lacks; it is made once for all of their values."""


@dataclass(frozen=True, slots=True)
class Run:
    """One student of a sweep."""

    size: str
    seed: int
    control: bool = False
    settings: tuple[str, ...] = ()
    """``section.field=value`` of the fields that differ from the recipe."""

    @property
    def label(self) -> str:
        """The settings as part of the folder's name."""
        parts = [text.partition(".")[2] for text in self.settings]
        return "".join("-" + re.sub(r"[^\w.=+-]+", "_", part) for part in parts)


def runs_of(
    recipe: Recipe, sizes: Sequence[str], seeds: Sequence[int], vary: Sequence[str]
) -> Iterator[Run]:
    """All combinations. Those that differ in the teacher's losses alone have one control."""
    for seed in seeds:
        replace(recipe.train, seed=seed)  # checks its range
    axes = [_axis(text) for text in vary]
    names = [axis[0].partition("=")[0] for axis in axes]
    for name in names:
        require(
            names.count(name) == 1,
            f"student-sweep: --vary must name each field once, got {name} twice; give all of its "
            f"values in one, as in {name}=VALUE,VALUE",
        )
    made = _different(recipe, product(*axes))
    for settings in made:
        varied = override_recipe(recipe, settings)
        for size in sizes:
            varied.student.parse(size)
    plain = dict.fromkeys(
        tuple(text for text in settings if text.partition("=")[0] not in OF_THE_TEACHER)
        for settings in made
    )
    for size in {size.lower(): size for size in sizes}.values():
        for seed in dict.fromkeys(seeds):
            yield from (Run(size, seed, settings=settings) for settings in made)
            if recipe.student.control:
                yield from (Run(size, seed, True, settings) for settings in plain)


def _axis(text: str) -> list[str]:
    """``section.field=a,b`` as ``section.field=a`` and ``section.field=b``."""
    name, separator, values = text.partition("=")
    name = name.strip()
    section, _, field = name.partition(".")
    require(
        bool(separator and field)
        and section in VARIED
        and name not in ("train.seed", "student.control"),
        f"student-sweep: --vary must read train.FIELD=VALUE,VALUE or student.FIELD=..., got "
        f"{text!r}; for example train.alpha_cos=0,1 (seeds: --seed, sizes: --size)",
    )
    found = [value.strip() for value in re.split(r",(?![^\[]*\])", values)]  # not within a list
    require(
        all(found) and name != "student.sizes",
        f"student-sweep: --vary must name values, got {text!r}",
    )
    return [f"{name}={value}" for value in found]


def _different(recipe: Recipe, combinations: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Combinations that give different students, each by the settings that are not the recipe's.

    Only these are part of a student's name.
    """

    def value(of: Recipe, text: str) -> Any:
        found: Any = asdict(of)
        for name in text.partition("=")[0].split("."):
            found = (found or {}).get(name)
        return found

    found: list[tuple[str, ...]] = []
    recipes: list[Recipe] = []
    for chosen in combinations:
        varied = override_recipe(recipe, chosen)
        if varied not in recipes:
            recipes.append(varied)
            found.append(tuple(t for t in chosen if value(varied, t) != value(recipe, t)))
    labels = [Run("", 0, settings=settings).label for settings in found]
    for label in labels:
        require(
            labels.count(label) == 1,
            f"student-sweep: --vary must give each student a name of its own, got {label[1:]!r} "
            "twice; give one of the values another name",
        )
    return found
