"""What a user should know before a student is trained: too few steps, or a size out of place."""

from dataclasses import replace

from distilcache.stages.models.families import Shape
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.student_train.narrow import FAMILIES

FEWEST_STEPS = {"layers": 150, "projection": 1000, "random": 3000}
"""Steps by kind of start, below which a student is of little use.

``layers``: measured, in docs/benchmarks.md, "Offline equals online": after 150 steps of 16
sequences a 3x384 student agrees with its teacher at 47.4 % of the masked positions. The other two
are rules of thumb. ``random``: 300 steps give 11.9 % ("What each part of the loss is worth"), so
ten times as many are asked for. ``projection``: between the two; after 30 steps it is ahead of
random weights after 150 ("Start of a narrower student")."""
_WORDS = {
    "layers": "starts from the teacher's layers",
    "projection": "starts from a projection of the teacher",
    "random": "starts from random weights",
}


def start_of(init: str, ours: Shape, theirs: Shape, kind: str) -> str:
    """How a student gets its first weights: a key of ``FEWEST_STEPS``, or ``checkpoint``.

    ``theirs`` is the shape of the teacher (of the student where there is none), ``kind`` the
    student's ``model_type``.
    """
    if init != "teacher":
        return "random" if init == "random" else "checkpoint"
    if replace(ours, layers=theirs.layers) == theirs:
        return "layers"
    return "projection" if ours.width <= theirs.width and kind in FAMILIES else "random"


def advice(
    size: str, student: StudentConfig, ours: Shape, theirs: Shape, kind: str, steps: float
) -> list[str]:
    """What speaks against a student in this number of steps; shapes and kind as above."""
    found = []
    start = start_of(student.init, ours, theirs, kind)
    least = FEWEST_STEPS.get(start, 0)
    if steps < least:
        nearer = ""
        if start == "projection":
            nearer = f", or take the teacher's width, size={ours.layers}x{theirs.width}"
        found.append(
            f"student {size}: {steps:,.0f} steps are too few for a student that {_WORDS[start]}; "
            f"give it {least:,} or more (train.epochs or train.steps){nearer}"
        )
    if ours.layers > theirs.layers or ours.width > theirs.width:
        found.append(
            f"student {size}: larger than its teacher ({theirs.layers}x{theirs.width}), so it "
            "costs more and can hardly be better"
        )
    return found
