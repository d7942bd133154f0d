"""What a student's folder says of its run."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from distilcache.data.errors import UserError
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.output import (
    FIGURES,
    FREE_FIELDS,
    UNSAID,
    read_record,
    settings_of,
    write_record,
)
from tests.damage import flip
from tests.refusals import refused

GOOD = {"settings": {"cache": "c", "train": {"signal": "replay+head"}}}


OF_0_2_0 = {
    "signal", "restrict_ce_to_mask", "alpha_ce", "alpha_mlm", "alpha_cos", "alpha_mse",
    "temperature", "epochs", "steps", "batch_size", "accumulation", "lr", "warmup",
    "weight_decay", "adam_eps", "max_grad_norm", "window_blocks", "streams", "row_chunk", "seed",
}  # fmt: skip
"""Fields of ``[train]`` that its runs name and that must stay the same."""


def record(folder, values):
    (folder / "training.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def test_a_record_has_the_present_names(tmp_path):
    assert read_record(record(tmp_path, GOOD), "train")["settings"]["train"] == {
        "signal": "replay+topk"
    }


def test_fields_of_today_do_not_change_what_earlier_runs_named():
    """Left at their defaults: else a run that was begun before them would be refused."""
    cache = SimpleNamespace(manifest=SimpleNamespace(fingerprint="f"))
    train = TrainConfig(vocabulary_fraction=1.0)
    student = StudentConfig(sizes=("2x32",))
    asked = (cache, "2x32", student, train, "student", "torch.float32")
    settings = settings_of(*asked, old=True)
    assert settings["train"].keys() - FREE_FIELDS == OF_0_2_0
    assert settings["student"].keys() == {"heads", "ffn", "init", "dropout"}
    assert settings_of(*asked)["train"] == {**settings["train"], "vocabulary_fraction": 1.0}


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
