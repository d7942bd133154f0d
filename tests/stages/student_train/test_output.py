"""What a student's folder says of its run."""

import json
from dataclasses import asdict

import pytest

from distilcache.data.errors import UserError
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.output import (
    FIGURES,
    UNSAID,
    read_record,
    write_record,
)
from tests.damage import flip
from tests.refusals import refused

GOOD = {"settings": {"cache": "c", "train": {"signal": "replay+head"}}}


def record(folder, values):
    (folder / "training.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def test_a_record_has_the_present_names(tmp_path):
    assert read_record(record(tmp_path, GOOD), "train")["settings"]["train"] == {
        "signal": "replay+topk"
    }


def test_what_a_run_of_today_leaves_out_is_still_the_default():
    """Else a run that was begun with it could not be told from an earlier one."""
    today = {**asdict(StudentConfig()), **asdict(TrainConfig())}
    changed = {n for n, value in UNSAID.items() if type(value)(today[n]) != value}
    assert changed == {"vocabulary_fraction"}


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


def test_every_flipped_bit_of_a_record_is_seen(tmp_path):
    """Or harmless: the case of an exponent, or the name of the hash."""
    whole = {
        "settings": {"size": "2x32", "train": {"signal": "replay", "lr": 2e-05}},
        "result": {**dict.fromkeys(FIGURES, 30), "loss": 3.5},
        "files": {"config.json": "0af"},
    }
    write_record(tmp_path, whole)
    path, seen = tmp_path / "training.json", 0
    bits = 8 * path.stat().st_size
    for bit in range(bits):
        flip(path, bit)
        try:
            found = read_record(tmp_path, "train")
        except UserError:
            seen += 1
        else:
            assert {name: found[name] for name in whole} == whole
        flip(path, bit)
    assert bits - 100 < seen < bits
    assert read_record(tmp_path, "train") == whole
