"""What is said about students that cannot become good."""

import pytest

from distilcache.stages.models.families import Shape
from distilcache.stages.student_train.advice import FEWEST_STEPS, advice, start_of
from distilcache.stages.student_train.config import StudentConfig

TEACHER = Shape(layers=6, width=384, heads=6, ffn=1536)
SHALLOW = Shape(layers=3, width=384, heads=6, ffn=1536)
NARROW = Shape(layers=3, width=192, heads=3, ffn=768)
WIDE = Shape(layers=3, width=512, heads=8, ffn=2048)


@pytest.mark.parametrize(
    ("shape", "kind", "init", "start"),
    [
        (SHALLOW, "distilbert", "teacher", "layers"),
        (NARROW, "distilbert", "teacher", "projection"),
        (NARROW, "electra", "teacher", "random"),
        (WIDE, "bert", "teacher", "random"),
        (SHALLOW, "bert", "random", "random"),
        (SHALLOW, "bert", "some/checkpoint", "checkpoint"),
    ],
)
def test_too_few_steps_are_said_with_the_number_that_would_do(shape, kind, init, start):
    assert start_of(init, shape, TEACHER, kind) == start
    least = FEWEST_STEPS.get(start, 0)
    student = StudentConfig(init=init)
    few = advice("3x", student, shape, TEACHER, kind, max(0, least - 1))
    enough = advice("3x", student, shape, TEACHER, kind, least)
    assert len(few) == len(enough) + (start != "checkpoint")
    if start != "checkpoint":
        assert f"give it {least:,} or more" in few[0]
    if start == "projection":
        assert few[0].endswith("size=3x384")


def test_a_size_above_the_teachers_is_said():
    student = StudentConfig()
    (line,) = advice("medium", student, WIDE, TEACHER, "bert", 10**6)
    assert "larger than its teacher (6x384)" in line
    assert not advice("6x384", student, TEACHER, TEACHER, "bert", 10**6)
