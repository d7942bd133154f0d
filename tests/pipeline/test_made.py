"""What was made, compared with what recipes and students say now."""

import os
import shutil

from distilcache.pipeline import flow, made
from distilcache.pipeline.recipe import load_recipe
from tests.builders import WORDS
from tests.command_line import write_text


def test_teachers_of_an_ensemble_are_the_same_by_any_name(small_teacher, tmp_path, monkeypatch):
    write_text(tmp_path / "text.txt", words=WORDS)
    second = shutil.copytree(small_teacher, tmp_path / "second")
    third = shutil.copytree(small_teacher, tmp_path / "third")
    monkeypatch.chdir(tmp_path)

    def recipe(*ensemble):
        fields = {
            "root": tmp_path,
            "corpus.sources": tmp_path / "text.txt",
            "corpus.max_length": 16,
            "corpus.heldout_fraction": 0.2,
            "corpus.workers": 1,
            "teacher.model": small_teacher,
            "teacher.ensemble": ",".join(map(str, ensemble)),
            "cache.hidden_dtype": "none",
            "cache.tail_samples": 4,
            "train.signal": "sparse",
            "train.alpha_cos": 0,
        }
        return load_recipe(None, [f"{name}={value}" for name, value in fields.items()])

    flow.make_teacher_cache(recipe("second"))
    for same in ("second", second, os.path.join("..", tmp_path.name, "second")):
        assert made.teacher_changes(recipe(same)) == {}
    assert made.teacher_changes(recipe(third)) == {"teacher.ensemble": (["second"], [str(third)])}
    assert made.teacher_changes(recipe(second, third)).keys() == {"teacher.ensemble"}


def test_students_differ_by_the_whole_of_a_value():
    start = "/models/of/one/team/with/a/long/name/in/front/of/it/"
    trained = {
        name: {"role": "student", "size": name, "student.init": f"{start}{last}", "train.lr": 1e-3}
        for name, last in (("1x16", "first"), ("2x16", "second"))
    }
    found = made.trained_differently(trained)
    assert found.keys() == {"student.init"}
    assert [value[-6:] for value in found["student.init"].values()] == ["/first", "second"]
    assert all(len(value) == 40 for value in found["student.init"].values())
