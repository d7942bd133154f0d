"""``dtype = "auto"`` on a machine with bfloat16, and models whose code does not run in it."""

import csv
import json

import pytest

from distilcache.data import errors
from distilcache.data.cache.cache import Cache
from distilcache.stages.models import device
from tests.command_line import refusal, run, write_recipe, write_text
from tests.stages.models.families_support import save_teacher

REVIEWS = [("good", 1), ("bad", 0), ("fine", 1), ("poor", 0)] * 5


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Of a DeBERTa (v1)."""
    monkeypatch.setattr(errors, "_printed", set())
    monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda: True)
    write_text(tmp_path / "text.txt")
    return write_recipe(
        tmp_path / "p.toml",
        tmp_path / "text.txt",
        save_teacher("deberta", tmp_path / "teacher"),
        student={"sizes": ["1x32"]},
        train={"steps": 2, "batch_size": 8},
        evaluate={"sequences": 8, "latency_repeats": 1},
    )


def test_auto_is_float32_for_such_a_model_in_all_stages(recipe, tmp_path):
    done = run("distill", "--recipe", recipe, "--set", "dtype=auto")
    assert done.exit_code == 0, done.output
    said = "dtype is float32, as no model of type 'deberta' runs in bfloat16"
    assert done.stderr.count(said) == 1
    cache = Cache.open(tmp_path / "p" / "cache")
    assert cache.manifest.provenance["identity"]["dtype"] == "float32"
    student = tmp_path / "p" / "students" / "1x32"
    settings = json.loads((student / "training.json").read_text())["settings"]
    assert settings["dtype"] == "float32"
    found = json.loads((tmp_path / "p" / "report" / "report.json").read_text())
    assert found["machine"]["dtype"] == "float32"
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *REVIEWS])
    tuned = run("finetune", student, tmp_path / "reviews.csv", tmp_path / "tuned", "--set",
                "dtype=auto", "--set", "device=cpu", "--set", "tasks.min_steps=2", "--set",
                "tasks.epochs=1", "--json")  # fmt: skip
    assert tuned.exit_code == 0, tuned.output


def test_bfloat16_is_refused_for_such_a_model(recipe, tmp_path):
    for command in ("plan", "distill", "teacher-cache"):
        line = refusal(run(command, "--recipe", recipe, "--set", "dtype=bfloat16"))
        assert "dtype must be 'float32' for a model of type 'deberta'" in line
        assert line.endswith("use --set dtype=float32")
    assert not (tmp_path / "p").exists()
