"""What the weights of a run depend on."""

from types import SimpleNamespace

from distilcache.stages.student_train.asked import Run, settings_of
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.output import FREE_FIELDS

OF_0_2_0 = {
    "signal", "restrict_ce_to_mask", "alpha_ce", "alpha_mlm", "alpha_cos", "alpha_mse",
    "temperature", "epochs", "steps", "batch_size", "accumulation", "lr", "warmup",
    "weight_decay", "adam_eps", "max_grad_norm", "window_blocks", "streams", "row_chunk", "seed",
}  # fmt: skip
"""Fields of ``[train]`` that its runs name and that must stay the same."""


def asked(folder, **given):
    plain = {
        "cache": SimpleNamespace(manifest=SimpleNamespace(fingerprint="f")),
        "size": "2x32",
        "student": StudentConfig(sizes=("2x32",)),
        "train": TrainConfig(vocabulary_fraction=1.0),
        "role": "student",
        "recipe": None,
    }
    return Run(out=folder, start_dir=folder, **plain | given)


def test_fields_of_today_do_not_change_what_earlier_runs_named(tmp_path):
    """Left at their defaults: else a run that was begun before them would be refused."""
    settings = settings_of(asked(tmp_path, old=True), "torch.float32")
    assert settings["train"].keys() - FREE_FIELDS == OF_0_2_0
    assert settings["student"].keys() == {"heads", "ffn", "init", "dropout"}
    assert settings_of(asked(tmp_path), "torch.float32")["train"] == {
        **settings["train"],
        "vocabulary_fraction": 1.0,
    }


def test_a_run_of_the_usual_layers_does_not_name_them(tmp_path):
    """So students begun before there was a choice go on."""
    for student in (StudentConfig(), StudentConfig(init_layers=(0, 3), family="teacher")):
        found = settings_of(asked(tmp_path, student=student), "float32")["student"]
        usual = {"heads": 0, "ffn": 0, "init": "teacher", "dropout": 0.0}
        more = {"init_layers": [0, 3], "family": "teacher"} if student.init_layers else {}
        assert found == usual | more
