"""Which of the teacher's layers a student starts from."""

from collections.abc import Sequence
from typing import Any

from distilcache.stages.models.saving import global_distance
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.student_train.ranks import say


def pick_layers(teacher_layers: int, student_layers: int, named: Sequence[int] = ()) -> list[int]:
    """Teacher layers that a student starts from: the last of each of as many groups of equal size.

    Or those that are ``named``, where there are as many.

    ``ceil((i + 1) n / m) - 1``, TinyBERT's uniform mapping (Jiao et al. 2020, arXiv:1909.10351,
    section 4.3). 12 -> 6 gives 1, 3, 5, 7, 9, 11; n -> n all of them; more layers than the
    teacher's repeat some. One layer is the first.
    """
    if len(named) == student_layers and max(named) < teacher_layers:
        return [layer % teacher_layers for layer in named]
    if student_layers == 1:
        return [0]
    return [-(-(i + 1) * teacher_layers // student_layers) - 1 for i in range(student_layers)]


def evenly_spaced(teacher_layers: int, student_layers: int) -> list[int]:
    """As many of the teacher's layers, the first and the last among them (DistilBERT's choice)."""
    span = max(student_layers - 1, 1)
    return [(2 * i * (teacher_layers - 1) + span - 1) // (2 * span) for i in range(student_layers)]


def spaced_in_order(types: Sequence[str], student_layers: int) -> list[int]:
    """The teacher's layers nearest to evenly spaced ones that have its order of types.

    ::

        12 layers, the first of three "full_attention", -> 6      0, 2, 4, 6, 8, 11

    ModernBERT's published configuration gives but the distance of its layers with global
    attention, and programs other than transformers 5 read that alone. Evenly spaced ones where
    there is no such choice.
    """
    spaced = evenly_spaced(len(types), student_layers)
    # The least sum of distances, and the layers, by the last of these.
    best: dict[int, tuple[int, list[int]]] = {-1: (0, [])}
    for ideal, wanted in zip(spaced, types, strict=False):
        before = list(best.values())
        best = {
            here: min(
                (cost + abs(here - ideal), [*layers, here])
                for cost, layers in before
                if not layers or layers[-1] < here
            )
            for here, found in enumerate(types)
            if found == wanted and any(not layers or layers[-1] < here for _, layers in before)
        }
    whole = [found for found in best.values() if len(found[1]) == student_layers]
    return min(whole)[1] if whole else spaced


def named_layers(student: StudentConfig, teacher: Any, layers: int, old: bool) -> Sequence[int]:
    """Those that are named; with ModernBERT's, whose first layer differs, the first is one."""
    if student.init_layers or teacher.model_type != "modernbert":
        return student.init_layers
    if old:
        return evenly_spaced(teacher.num_hidden_layers, layers)
    return spaced_in_order(teacher.layer_types, layers)


def tell_order(config: Any) -> None:
    """A line where a student's order of local and global attention has not the published form."""
    if config.model_type != "modernbert" or global_distance(config.layer_types):
        return
    full = [at for at, kind in enumerate(config.layer_types) if kind == "full_attention"]
    say(
        f"student: layers {full} have global attention, which are not evenly apart: transformers 4 "
        "and other programs that know the published form alone would take other ones for these; "
        "without student.init_layers they are"
    )
