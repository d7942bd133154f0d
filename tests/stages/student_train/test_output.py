"""What a student's folder says of its run."""

import json

import pytest

from distilcache.stages.student_train.output import FIGURES, read_record
from tests.damage import refused

GOOD = {"settings": {"cache": "c", "train": {"signal": "replay+head"}}}


def record(folder, values):
    (folder / "training.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def test_a_record_has_the_present_names(tmp_path):
    assert read_record(record(tmp_path, GOOD), "train")["settings"]["train"] == {
        "signal": "replay+topk"
    }


@pytest.mark.parametrize(
    "values",
    [
        "{",
        [],
        {},
        {"settings": 1},
        {"settings": {"train": []}},
        {**GOOD, "result": None},
        {**GOOD, "result": dict.fromkeys(FIGURES, "1")},
    ],
)
def test_a_foreign_record_is_refused_by_name(values, tmp_path):
    line = refused(lambda: read_record(record(tmp_path, values), "evaluate"))
    assert line.startswith("evaluate: training.json must")
    assert str(tmp_path) in line
