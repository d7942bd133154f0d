"""What a refused command says to do is done, to the letter, and then it works."""

import json
import re
import shutil

import pytest

from distilcache.stages.models.hub import quiet
from tests.builders import build_corpus_of, random_texts
from tests.command_line import refusal, run, write_recipe
from tests.stages.models.families_support import save_teacher

TINY = {
    "student": {"sizes": ["1x32"]},
    "train": {"steps": 2, "batch_size": 4},
    "evaluate": {"sequences": 6, "latency_repeats": 1},
}


@pytest.fixture(autouse=True)
def _no_bars():
    with quiet():
        yield


def swap_two_ids(folder):
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    ids = state["model"]["vocab"]
    ids["##a"], ids["##b"] = ids["##b"], ids["##a"]
    path.write_text(json.dumps(state))


def give_another_role(folder):
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "cls_token": "[SEP]", "sep_token": "[CLS]"}))


ANEW = {
    "length": ("bert", None, {"max_length": 41}, "corpus.max_length=40"),
    "packing": ("fnet", None, {"packing": "lines"}, "corpus.packing=blocks"),
    "tokenizer": ("bert", swap_two_ids, {}, "corpus.tokenizer"),
    "roles": ("bert", give_another_role, {}, "corpus.tokenizer"),
}
"""A corpus that a teacher cannot read: the teacher's type, its tokenizer, settings, the remedy."""


@pytest.mark.parametrize("case", ANEW)
def test_a_corpus_that_does_not_fit_is_made_anew_by_another_name(case, tmp_path):
    kind, spoil, settings, remedy = ANEW[case]
    old = save_teacher(kind, tmp_path / "old")
    teacher = shutil.copytree(old, tmp_path / "teacher")
    if spoil:
        spoil(teacher)
        settings = {"tokenizer": str(old)}
    (tmp_path / "p").mkdir()
    build_corpus_of(random_texts(), tmp_path / "p", old, **({} if spoil else settings))
    recipe = write_recipe(
        tmp_path / "recipe.toml", tmp_path / "p" / "text.txt", teacher, corpus=settings
    )
    line = refusal(run("teacher-cache", "--recipe", recipe))
    assert f"set {remedy}" in line
    assert line.endswith("give the project another name if its corpus is made already")
    field = remedy if "=" in remedy else re.search(r"corpus\.tokenizer=[^,]+", line)[0]
    done = run("teacher-cache", "--recipe", recipe, "--set", field, "--set", "name=q")
    assert done.exit_code == 0, done.output


def test_text_to_measure_on_is_named_after_training(tmp_path, small_teacher):
    """A part of the training text, held out now, would be known to the students."""
    for name, seed in (("text", 0), ("other", 1)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(random_texts(seed=seed)))
    none = {**TINY, "corpus": {"heldout_fraction": 0.0}}
    recipe = write_recipe(tmp_path / "recipe.toml", tmp_path / "text.txt", small_teacher, **none)
    for command in ("teacher-cache", "student-train"):
        assert run(command, "--recipe", recipe).exit_code == 0
    line = refusal(run("evaluate", "--recipe", recipe))
    assert (
        "move it away, name text that no student was trained on in corpus.heldout_sources" in line
    )
    (tmp_path / "p" / "corpus").rename(tmp_path / "away")
    named = ("--recipe", recipe, "--set", f"corpus.heldout_sources={tmp_path / 'other.txt'}")
    for command in ("corpus", "evaluate"):
        done = run(command, *named)
        assert done.exit_code == 0, done.output


def test_what_another_setting_is_refused_with_costs_nothing(tmp_path, small_teacher):
    """A finished corpus or cache is not to be deleted for a stray setting, or for another text."""
    (tmp_path / "text.txt").write_text("\n\n".join(random_texts()))
    recipe = write_recipe(tmp_path / "recipe.toml", tmp_path / "text.txt", small_teacher, **TINY)
    assert run("teacher-cache", "--recipe", recipe).exit_code == 0
    (tmp_path / "other.txt").write_text("\n\n".join(random_texts(seed=1)))
    for changed in (
        "cache.top_k=3",
        "masking.seed=4",
        "corpus.max_length=12",
        f"corpus.sources={tmp_path}/other.txt",
    ):
        line = refusal(run("teacher-cache", "--recipe", recipe, "--set", changed))
        assert re.search(
            r"; put (that|them) back to use this .*, or (use|choose) another name", line
        )
        assert "delete" not in line
    for more in ((), ("--set", changed, "--set", "name=q")):
        done = run("teacher-cache", "--recipe", recipe, *more)
        assert done.exit_code == 0, done.output
