"""The whole flow for every type of masked LM that transformers has, by the command."""

import json

import pytest

from tests.builders import random_texts
from tests.command_line import run, write_recipe
from tests.stages.models.families_support import EVEN, WORKING, save_teacher


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKING)
def test_distill(kind, tmp_path):
    """Text to a report, with a coded cache and a student of fewer layers."""
    teacher = save_teacher(kind, tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n\n".join(random_texts(400)))
    recipe = write_recipe(
        tmp_path / "recipe.toml",
        tmp_path / "text.txt",
        teacher,
        corpus={"packing": "blocks" if kind in EVEN else "lines", "max_length": 24},
        student={"sizes": ["2x32"], "control": False},
        train={"batch_size": 8},
    )
    result = run("distill", "--recipe", recipe, "--set", f"root={tmp_path}/runs", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = {row["role"]: row for row in json.loads(result.stdout)["models"]}
    assert abs(rows["teacher"]["teacher_kl"]) < 1e-4
    assert rows["student"]["teacher_kl"] > 0
    assert rows["student"]["params"] <= rows["teacher"]["params"]
