"""What a project does whose students read the cache of another one."""

import json
import shutil

import pytest
import yaml

from distilcache.data import errors
from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.pipeline import flow, measured
from distilcache.pipeline.evaluate_tasks import tasks_command
from distilcache.pipeline.recipe import load_recipe
from distilcache.stages.corpus.build import build_corpus
from distilcache.stages.corpus.config import CorpusConfig
from distilcache.stages.models.wordpiece import train_wordpiece
from tests.builders import WORDS
from tests.command_line import refusal, run, write_text
from tests.damage import flip_at

SETTINGS = {
    "student.sizes": "1x16",
    "train.steps": 2,
    "train.batch_size": 8,
    "evaluate.sequences": 8,
    "evaluate.latency_repeats": 1,
}


@pytest.fixture
def project(tmp_path, small_cache):
    """``project(**fields)``: the recipe of a project without a cache of its own."""

    def make(**fields):
        values = {**SETTINGS, "root": tmp_path, "cache_from": small_cache(), **fields}
        return load_recipe(None, [f"{name}={value}" for name, value in values.items()])

    return make


def _card(recipe):
    return (recipe.home / "students" / "1x16" / "README.md").read_text()


def _front(recipe):
    return yaml.safe_load(_card(recipe).split("---\n")[1])


def test_no_teacher_runs_where_students_read_another_cache(project, small_teacher, tmp_path):
    write_text(tmp_path / "text.txt", words=WORDS)
    recipe = project(
        **{
            "teacher.model": small_teacher,
            "corpus.sources": tmp_path / "text.txt",
            "corpus.max_length": 16,
            "corpus.heldout_fraction": 0.2,
            "corpus.workers": 1,
        }
    )
    names = [model["name"] for model in flow.distill(recipe)["models"]]
    assert names == ["teacher", "1x16"]
    assert not (recipe.home / "cache").exists()


@pytest.mark.parametrize("own", [True, False])
def test_nothing_runs_for_a_report_without_text(project, small_teacher, tmp_path, own):
    """One document is in one split, whatever the fraction."""
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS) for _ in range(50)))
    recipe = project(
        **{
            "teacher.model": small_teacher,
            "corpus.sources": tmp_path / "text.txt",
            "corpus.max_length": 16,
            "corpus.heldout_fraction": 1e-6,
            "corpus.workers": 1,
            **({"cache_from": ""} if own else {}),
        }
    )
    with pytest.raises(UserError, match="text must be held out .* got none in"):
        flow.distill(recipe)
    assert [path.name for path in recipe.home.iterdir()] == ["corpus"]


def test_students_are_of_the_settings_that_the_recipe_has(project, small_teacher, tmp_path):
    write_text(tmp_path / "text.txt", words=WORDS)
    fields = {
        "cache_from": "",
        "teacher.model": small_teacher,
        "corpus.sources": tmp_path / "text.txt",
        "corpus.max_length": 16,
        "corpus.workers": 1,
    }
    flow.make_teacher_cache(project(**fields))
    others = {
        "masking.probability": 0.3,
        "masking.unit": "word",
        "cache.hidden_quality": 0.01,
        "cache.positions": "all",
        "cache.relation_layer": -1,
        "cache.mask_only": "true",
        "cache.rounds": 2,
    }
    for field, value in others.items():
        with pytest.raises(UserError, match=rf"cache: .*{field.partition('.')[2]}"):
            flow.train_students(project(**fields, **{field: value}))
    assert not (project().home / "students").exists()
    free = {"cache.batch_tokens": 99, "cache.row_chunk": 99, "masking.unit": "token"}
    assert len(flow.train_students(project(**fields, **free))) == 1


def test_a_corpus_that_was_made_anew_and_another_teacher_are_told(
    project, small_teacher, tmp_path, capsys, monkeypatch
):
    write_text(tmp_path / "text.txt", words=WORDS)
    fields = {
        "cache_from": "",
        "teacher.model": small_teacher,
        "corpus.sources": tmp_path / "text.txt",
        "corpus.max_length": 16,
        "corpus.heldout_fraction": 0.2,
        "corpus.workers": 1,
    }
    recipe = project(**fields)
    flow.make_teacher_cache(recipe)
    flow.train_students(recipe)
    flow.evaluate(recipe)
    assert " was made " not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # The same text by another name.
    for name in ("text.txt", f"file://{tmp_path}/text.txt"):
        flow.evaluate(project(**fields | {"corpus.sources": name}))
        assert " was made " not in capsys.readouterr().err
    other = shutil.copytree(small_teacher, tmp_path / "other")
    changed = {"teacher.model": other, "corpus.sources": "else.txt", "masking.probability": 0.3}
    flow.evaluate(project(**fields | changed | {"train.lr": 7e-3}))
    told = f"evaluate: {recipe.home} was made with other settings than the recipe has now: "
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(told)]
    assert f"corpus.sources was ['{tmp_path}/text.txt'], is ['else.txt']" in line
    assert f"teacher.model was '{small_teacher}', is '{other}'" in line
    assert "masking.probability was 0.15, is 0.3" in line
    assert f"train.lr was {recipe.train.lr}, is 0.007" in line
    report = json.loads((recipe.home / "report" / "report.json").read_text())["recipe"]
    assert report["corpus"]["sources"] == [str(tmp_path / "text.txt")]
    assert report["teacher"]["model"] == str(small_teacher)
    assert report["masking"]["probability"] == 0.15
    assert report["train"]["lr"] == recipe.train.lr
    page = (recipe.home / "report" / "report.md").read_text()
    assert "else.txt" not in page
    assert "0.007" not in page
    shutil.rmtree(recipe.corpus_dir)
    recipe = project(**fields | {"corpus.heldout_fraction": 0.4})
    flow.make_corpus(recipe)
    flow.evaluate(recipe)
    told = f"evaluate: {recipe.home / 'cache'} was made from another corpus"
    assert told in capsys.readouterr().err
    options = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    errors._printed.clear()  # as in a new process
    found = run("student-train", *options, "--set", f"root={tmp_path}")
    assert "train: " + told.partition(": ")[2] in found.stderr


def test_training_tells_of_text_and_teacher_that_it_does_not_read(
    project, small_teacher, tmp_path, capsys
):
    """The settings that a card names are those of the cache."""
    write_text(tmp_path / "text.txt", words=WORDS)
    fields = {
        "teacher.model": small_teacher,
        "corpus.sources": tmp_path / "text.txt",
        "corpus.max_length": 16,
        "corpus.workers": 1,
        "student.control": "false",
    }
    recipe = project(**fields, cache_from="")
    flow.make_teacher_cache(recipe)
    other = {"corpus.sources": tmp_path / "none.txt", "corpus.max_length": 32}
    other |= {"teacher.model": tmp_path / "none"}
    values = {**SETTINGS, "root": tmp_path, **fields, **other}
    options = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    for command in ("student-train", "student-sweep"):
        errors._printed.clear()
        found = run(command, *options, "--recipe", "own", "--set", "name=demo")
        assert found.exit_code == 0, found.output
        (line,) = [line for line in found.stderr.splitlines() if "other settings" in line]
        assert line.startswith(("train: ", "student-sweep: "))
        assert f"teacher.model was '{small_teacher}', is '{tmp_path}/none'" in line
        assert "corpus.max_length was 16, is 32" in line
        assert line.endswith("what is made already is used as it is")
    assert '"max_length": 16' in _card(recipe)
    assert "none" not in _card(recipe).partition("## Training")[2]


def test_students_of_other_settings_are_marked_in_the_report(project, small_corpus):
    shutil.copytree(small_corpus(), project().home / "corpus")
    flow.train_students(project(**{"student.control": "true"}))
    other = project(**{"train.lr": 0.125, "train.steps": 3})
    flow.train_one(other, "2x16")
    flow.train_one(other, "2x16", seed=9)
    result = flow.evaluate(other)
    alike = {"2x16": "0.125", "2x16-seed9": "0.125"}
    assert result["differing"] == {
        "train.lr": {"1x16": str(project().train.lr), **alike},
        "train.steps": {"1x16": "2", "2x16": "3", "2x16-seed9": "3"},
    }
    line = "Not trained alike: train.lr 0.125 (2x16, 2x16-seed9), 0.0005 (1x16); train.steps 3 "
    for name in ("report.md", "sweep.md"):
        assert line in (other.home / "report" / name).read_text()
    train = json.loads((other.home / "report" / "report.json").read_text())["recipe"]["train"]
    assert (train["lr"], train["steps"], train["seed"]) == ([0.125, 0.0005], [3, 2], [0, 9])
    for path in (other.home / "students").glob("2x16*"):
        shutil.rmtree(path)
    assert "differing" not in flow.evaluate(project())


def test_without_text_of_its_own_a_project_is_measured_on_that_of_its_cache(
    project, small_cache, small_corpus, tmp_path
):
    """Not on the docstrings, which are the default of ``corpus.sources``."""
    cache = shutil.copytree(small_cache(), tmp_path / "first" / "cache")
    recipe = project(cache_from=cache)
    for _ in range(2):
        with pytest.raises(UserError, match="held-out text must be named .* got no .corpus. and"):
            flow.distill(recipe)
        assert not recipe.home.exists()
        # Of another text: no corpus of this cache.
        shutil.copytree(small_corpus(seed=1), cache.parent / "corpus", dirs_exist_ok=True)
    shutil.rmtree(cache.parent / "corpus")
    corpus = shutil.copytree(small_corpus(), cache.parent / "corpus")
    for result in (flow.distill(recipe), flow.evaluate(recipe)):
        measured = json.loads((corpus / "manifest.json").read_text())
        assert result["heldout"]["corpus_fingerprint"] == measured["fingerprint"]
    assert not recipe.corpus_dir.exists()
    report = json.loads((recipe.home / "report" / "report.json").read_text())["recipe"]
    assert report["corpus"]["sources"] == json.loads((corpus / "build.json").read_text())["sources"]


def test_what_has_moved_is_not_needed_any_more(project, small_teacher, tmp_path):
    write_text(tmp_path / "text.txt", words=WORDS)
    teacher = shutil.copytree(small_teacher, tmp_path / "teacher")
    recipe = project(
        **{
            "cache_from": "",
            "teacher.model": teacher,
            "corpus.sources": tmp_path / "text.txt",
            "corpus.max_length": 16,
            "corpus.heldout_fraction": 0.2,
            "corpus.workers": 1,
        }
    )
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    with pytest.raises(UserError, match="source must exist.*correct corpus.sources$"):
        flow.distill(recipe)
    (tmp_path / "moved.txt").rename(tmp_path / "text.txt")
    flow.make_teacher_cache(recipe)
    helps = "as corpus and cache are finished, student-train and evaluate work without"
    for place in (tmp_path / "text.txt", teacher):
        place.rename(tmp_path / f"moved-{place.name}")
        with pytest.raises(UserError, match=f"exist.*correct the path; {helps}$"):
            flow.distill(recipe)
    flow.train_students(recipe)
    assert len(flow.evaluate(recipe)["models"]) == 2


def test_a_report_that_cannot_be_written_is_said_before_the_hours(
    project, small_corpus, monkeypatch
):
    def count(*_, **__):
        raise AssertionError("it was measured")

    monkeypatch.setattr("distilcache.stages.evaluate.run.evaluate_models", count)
    monkeypatch.setattr("distilcache.stages.evaluate.tasks.run.run_tasks", count)
    recipe = project()
    flow.train_students(recipe)
    shutil.copytree(small_corpus(), recipe.home / "corpus")
    (recipe.home / "report").write_text("a file")
    for measure in (flow.evaluate, lambda recipe: tasks_command(recipe, "rte")):
        with pytest.raises(UserError, match="storage: .*report.* must be writable"):
            measure(recipe)
    (recipe.home / "report").unlink()
    with pytest.raises(AssertionError, match="it was measured"):
        flow.evaluate(recipe)
    assert not list((recipe.home / "report").iterdir())


def test_a_finished_cache_of_another_corpus_is_told(project, small_teacher, tmp_path, capsys):
    """What is held out here, its students may have been trained on."""
    write_text(tmp_path / "text.txt", words=WORDS)
    fields = {
        "teacher.model": small_teacher,
        "corpus.sources": tmp_path / "text.txt",
        "corpus.max_length": 16,
        "corpus.heldout_fraction": 0.2,
        "corpus.workers": 1,
    }
    first = project(**fields, name="first", cache_from="")
    flow.make_teacher_cache(first)
    fields["cache_from"] = first.home / "cache"
    flow.distill(project(**fields, name="same"))
    told = f"{first.home / 'cache'} was made from another corpus than is now in {tmp_path}/"
    assert told not in capsys.readouterr().err
    flow.distill(project(**fields | {"corpus.heldout_fraction": 0.4}, name="other"))
    lines = [line for line in capsys.readouterr().err.splitlines() if told in line]
    assert [line.partition(": ")[0] for line in lines] == ["distill"]
    assert all(
        "/other/corpus: " in line and "copy that recipe's [corpus]" in line for line in lines
    )


def test_a_corpus_of_other_tokens_is_refused(project, small_corpus, tmp_path):
    recipe = project()
    flow.train_students(recipe)
    recipe.home.mkdir(exist_ok=True)
    shutil.copytree(small_corpus(), recipe.home / "corpus")
    guest = shutil.copytree(recipe.home / "students" / "1x16", recipe.home / "students" / "guest")
    (guest / "training.json").unlink()
    theirs = (guest / "README.md").read_bytes()
    models = {model["name"]: model for model in flow.evaluate(recipe)["models"]}
    assert (guest / "README.md").read_bytes() == theirs, "a card of somebody else's"
    assert models["guest"]["mlm_nll"] == models["1x16"]["mlm_nll"]
    shutil.rmtree(guest)
    measured = models["1x16"]
    (index,) = _front(recipe)["model-index"]
    (found,) = index["results"]
    figures = {metric["type"]: metric["value"] for metric in found["metrics"]}
    assert figures["loss"] == pytest.approx(measured["mlm_nll"], abs=1e-5)
    assert figures["agreement"] == pytest.approx(measured["teacher_top1_agreement"], abs=1e-5)
    assert f"{measured['mlm_nll']:.3f}" in _card(recipe).split("## Evaluation")[1]

    # As many ids, and others of them: every figure would be noise.
    shutil.rmtree(recipe.home / "corpus")
    size = Cache.open(recipe.finished_cache).encoding.vocab_size
    words = [word[::-1] for word in WORDS]
    train_wordpiece([" ".join(words)] * 20, size).save_pretrained(tmp_path / "other")
    write_text(tmp_path / "text.txt", words=words)
    config = CorpusConfig(
        sources=(str(tmp_path / "text.txt"),), max_length=16, heldout_fraction=0.3, workers=1
    )
    made = build_corpus(config, recipe.home / "corpus", str(tmp_path / "other"))
    assert made.manifest.vocab_size == size
    with pytest.raises(UserError, match="corpus must have the tokenizer of the cache"):
        flow.evaluate(recipe)

    # What the error says helps.
    shutil.rmtree(recipe.home / "corpus")
    tokenizer = Cache.open(recipe.finished_cache).teacher_dir
    build_corpus(config, recipe.home / "corpus", str(tokenizer))
    assert flow.evaluate(recipe)


def test_a_damaged_teacher_is_not_measured(project, small_cache, small_corpus, tmp_path):
    """Its figures would look like those of a worse teacher."""
    cache = shutil.copytree(small_cache(), tmp_path / "cache")
    recipe = project(cache_from=cache)
    flow.train_students(recipe)
    shutil.copytree(small_corpus(), recipe.home / "corpus")
    for name in ("model.safetensors", "config.json"):
        flip_at(cache / "teacher" / name)
        with pytest.raises(UserError, match=f"{name} must have sha256"):
            measured.models_of(recipe)
        shutil.copy(small_cache() / "teacher" / name, cache / "teacher" / name)
    assert len(measured.models_of(recipe)) == 2


def test_a_teachers_origin_goes_with_it(project, monkeypatch):
    recipe = project()
    flow.train_students(recipe)
    card = {"license": "mit", "base_model": "some/bert", "datasets": ["a/b"]}
    monkeypatch.setattr("distilcache.stages.models.cards.recorded_origin", lambda _: card)
    origins = [entry.origin for entry in measured.models_of(recipe)]
    assert origins == [{"license": "mit", "base_model": "some/bert"}, None]


def test_students_of_masks_alone_are_measured_without_a_teacher(project, small_cache, small_corpus):
    losses = {f"train.alpha_{name}": 0 for name in ("ce", "cos")}
    masks = small_cache(mask_only=True)
    recipe = project(**{"cache_from": masks, "student.init": "random", **losses})
    flow.train_students(recipe)
    shutil.copytree(small_corpus(), recipe.home / "corpus")
    (model,) = flow.evaluate(recipe)["models"]
    (found,) = _front(recipe)["model-index"][0]["results"]
    assert [metric["type"] for metric in found["metrics"]] == ["loss", "accuracy"]
    assert (model["name"], model["teacher_kl"]) == ("1x16", None)
    assert "| 1x16 | student |" in (recipe.home / "report" / "report.md").read_text()


def test_a_damaged_student_is_not_measured(project, tmp_path, monkeypatch):
    recipe = project()
    flow.train_students(recipe)
    weights = recipe.home / "students" / "1x16" / "model.safetensors"
    flip_at(weights)
    advice = "model.safetensors must have .* run the command that trained it again"
    with pytest.raises(UserError, match=advice):
        measured.models_of(recipe)
    monkeypatch.setattr("distilcache.pipeline.export_onnx.NEEDED", ())
    student, cache = weights.parent, recipe.finished_cache
    for words in (
        ("export", student, "--onnx", tmp_path / "x.onnx"),
        ("export", student, "--sentence-transformers", tmp_path / "x.sentences"),
        ("finetune", student, "a.csv", tmp_path / "x.out", "--text", "a", "--label", "b"),
        ("view", cache, "--student", student, "--out", tmp_path / "x.html"),
    ):
        assert "student must be what was exported" in refusal(run(*words))
    with pytest.raises(UserError, match="student must be what was exported"):
        flow.train_students(project(**{"name": "other", "student.init": student}))
    assert not list(tmp_path.glob("x.*"))
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors must be readable"):
        measured.models_of(recipe)
    flow.train_students(recipe)
    assert [entry.name for entry in measured.models_of(recipe)][1:] == ["1x16"]
