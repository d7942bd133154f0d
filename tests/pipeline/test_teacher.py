"""A teacher is looked at before the text: what does not fit is refused at once."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.stages.models.hub import quiet
from distilcache.stages.models.tokenizers import load_tokenizer, tokenizer_fingerprint
from tests.builders import build_corpus_of, random_texts, run_stage_one
from tests.command_line import refusal, run, write_recipe
from tests.stages.models.families_support import (
    make_model,
    make_tokenizer,
    same_logits,
    save_teacher,
    save_with_tokenizer,
)

COMMANDS = ("plan", "corpus", "teacher-cache", "distill")


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch):
    monkeypatch.setattr("distilcache.data.errors._printed", set())
    with quiet():
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher("bert", tmp_path_factory.mktemp("given") / "teacher")


@pytest.fixture
def text(small_corpus):
    return small_corpus().parent / "text.txt"


@pytest.fixture
def untouched(monkeypatch):
    """Text that must not be read."""

    def read(*_):
        raise AssertionError("the text was read")

    monkeypatch.setattr("distilcache.stages.corpus.build.resolve_sources", read)
    monkeypatch.setattr("distilcache.pipeline.plan.corpus_size.resolve_sources", read)


def without_head(folder, _):
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not k.startswith("cls.")}
    save_file(kept, path, metadata={"format": "pt"})


def of_unknown_family(folder, _):
    config = transformers.GPT2Config(
        vocab_size=150, n_embd=16, n_layer=1, n_head=2, n_inner=24, bos_token_id=1, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def of_few_ids(folder, _):
    make_model("bert", 30).save_pretrained(folder)


def of_an_id_too_large(folder, _):
    """As many tokens as before, and a gap below the last one."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    ids = state["model"]["vocab"]
    ids[max(ids, key=ids.get)] += 1
    path.write_text(json.dumps(state))


def another_tokenizer(folder, teacher):
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    ids = state["model"]["vocab"]
    ids["##a"], ids["##b"] = ids["##b"], ids["##a"]
    path.write_text(json.dumps(state))
    return {"corpus": {"tokenizer": str(teacher)}}


def weights_are_gone(folder, _):
    (folder / "model.safetensors").unlink()


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut_short(folder, _):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def of_one_width_alone(folder, _):
    """Its embeddings are as wide as its layers, and a student's stay so."""
    shutil.rmtree(folder)
    save_teacher("squeezebert", folder)
    return {"student": {"sizes": ["1x16"]}}


def odd_length(folder, _):
    change_json(folder / "tokenizer_config.json", model_max_length="gelu")


WRONG = {
    "head": (without_head, {}, "must hold a trained masked-LM head, .*with none among its"),
    "family": (of_unknown_family, {}, "must be a masked LM that transformers knows.*'gpt2'"),
    "ids": (of_few_ids, {}, "tokenizer must have at most the model's 30 ids, got"),
    "gap": (of_an_id_too_large, {}, "at most the model's 145 ids, got 146 in"),
    "tokenizer": (another_tokenizer, {}, "tokenizer must be the one the corpus was made with"),
    "weights": (weights_are_gone, {}, "weights in model.safetensors, got none"),
    "cut": (cut_short, {}, "weights must be a whole safetensors file, got"),
    "length": (odd_length, {}, "must have a model_max_length of 1 or more, got 'gelu'"),
    "positions": (None, {"corpus": {"max_length": 41}}, "the teacher's 40 positions, got 41"),
    "layers": (None, {"cache": {"hidden_layers": [7]}}, "hidden_layers must lie between 0 and 3"),
    "trained": (None, {"corpus": {"tokenizer": "train"}}, "leave corpus.tokenizer out"),
    "temperature": (None, {"train": {"temperature": 3.0}}, "temperature must be one that the"),
    "replay": (None, {"cache": {"hidden_dtype": "none"}}, "signal must be 'sparse' where"),
    "cosine": (
        None,
        {"cache": {"hidden_dtype": "none"}, "train": {"signal": "sparse"}},
        "alpha_cos must be 0 where the cache has no hidden states",
    ),
    "residual": (None, {"train": {"signal": "replay+residual"}}, "the cache has no residual draws"),
    "logits": (None, {"cache": {"top_k": 0}}, "signal must be 'replay' where the cache has no"),
    "masks": (None, {"cache": {"mask_only": True}}, "alpha_rel must be 0 on a mask-only cache"),
    "relations": (None, {"train": {"alpha_rel": 1.0}}, "alpha_rel must be 0 where the cache has"),
    "relation heads": (
        None,
        {"cache": {"relation_layer": -1}, "train": {"alpha_rel": 1.0, "relation_heads": 3}},
        "relation_heads must divide the width of the teacher",
    ),
    "relation layer": (None, {"cache": {"relation_layer": -4}}, "must lie between 1 and 3"),
    "start": (
        None,
        {"cache": {"mask_only": True}, "train": {"alpha_ce": 0.0, "alpha_cos": 0.0}},
        "init must be 'random' where the cache holds no teacher",
    ),
    "size": (of_one_width_alone, {}, "size must be one that a model of type 'squeezebert' can"),
    "checkpoint": (None, {"student": {"init": "nowhere"}}, "student: init must be 'teacher'"),
    "made": (
        None,
        {"teacher": {"model": "", "size": "2x32"}, "cache": {"hidden_layers": [3]}},
        "hidden_layers must lie between 0 and 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_before_the_text(
    command, case, tmp_path, text, untouched, teacher
):
    spoil, settings, words = WRONG[case]
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    more = (spoil and spoil(folder, teacher)) or settings
    recipe = write_recipe(tmp_path / "recipe.toml", text, folder, **more)
    assert re.search(words, refusal(run(command, "--recipe", recipe)))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("case", ["head", "family", "tokenizer", "positions", "layers"])
def test_stage_one_says_the_same_of_a_corpus_that_is_there(case, tmp_path, text, teacher):
    spoil, settings, _ = WRONG[case]
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    more = (spoil and spoil(folder, teacher)) or settings
    recipe = write_recipe(tmp_path / "recipe.toml", text, folder, **more)
    early = refusal(run("teacher-cache", "--recipe", recipe))
    settings = {"max_length": 16, **settings.get("corpus", {})}
    corpus = build_corpus_of(random_texts(), tmp_path, teacher, **settings)
    with pytest.raises(UserError) as late:
        run_stage_one(tmp_path / "cache", corpus, folder, **more.get("cache", {}))
    assert early == f"distilcache: {late.value}"


@pytest.mark.parametrize("pad", [-1, 5000, None])
def test_padding_that_positions_cannot_be_counted_from_is_one_line(tmp_path, text, pad):
    folder = save_teacher("roberta", tmp_path / "teacher")
    change_json(folder / "config.json", pad_token_id=pad)
    recipe = write_recipe(tmp_path / "recipe.toml", text, folder)
    line = refusal(run("teacher-cache", "--recipe", recipe))
    assert f"model {str(folder)!r} must have a pad_token_id in its vocabulary, since" in line


def of_more_ids(folder, _):
    make_model("bert", 170).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (of_more_ids, "ensemble must be of models with one vocabulary, got"),
        (without_head, "must hold a trained masked-LM head, got {other!r} with none"),
    ],
)
def test_each_of_an_ensemble_is_looked_at(tmp_path, text, untouched, teacher, spoil, said):
    other = shutil.copytree(teacher, tmp_path / "other")
    spoil(other, None)
    ensemble = {"teacher": {"ensemble": [str(other)]}, "cache": {"hidden_dtype": "none"}}
    recipe = write_recipe(tmp_path / "recipe.toml", text, teacher, **ensemble)
    line = refusal(run("corpus", "--recipe", recipe))
    assert said.format(other=str(other)) in line


def test_text_to_measure_on_is_asked_for_first(tmp_path, text, untouched, teacher):
    held = {"corpus": {"heldout_fraction": 0.0}}
    recipe = write_recipe(tmp_path / "recipe.toml", text, teacher, **held)
    line = refusal(run("distill", "--recipe", recipe))
    assert "heldout_fraction must be above 0 where models are measured" in line


@pytest.mark.parametrize("device", ["cuda:77", "cuda:99999999999"])
def test_a_device_is_asked_for_first(tmp_path, text, untouched, teacher, device):
    recipe = write_recipe(tmp_path / "recipe.toml", text, teacher)
    line = refusal(run("teacher-cache", "--recipe", recipe, "--set", f"device={device}"))
    assert f"device must be one that this machine has, got '{device}'" in line


def test_a_published_teacher_is_planned_with_what_students_read():
    line = refusal(run("plan", "--set", "teacher.model=roberta-base", "--set", "cache.top_k=0"))
    assert "signal must be 'replay' where the cache has no logits" in line


def test_a_teacher_without_tokenizer_takes_the_corpuss(tmp_path, text, teacher):
    """As a trainer leaves its checkpoints: the cache is the one of the whole folder."""
    bare = tmp_path / "checkpoint-500"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(teacher / name, bare / name)
    recipe = write_recipe(tmp_path / "recipe.toml", text, bare)
    line = refusal(run("corpus", "--recipe", recipe))
    assert f"got {str(bare)!r} without tokenizer files" in line
    assert "--set corpus.tokenizer=PATH" in line
    done = run("teacher-cache", "--recipe", recipe, "--set", f"corpus.tokenizer={teacher}")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count(f"{bare} has no tokenizer of its own") == 1
    whole = write_recipe(tmp_path / "whole.toml", text, teacher)
    assert run("teacher-cache", "--recipe", whole, "--set", "name=q").exit_code == 0
    ours, theirs = (Cache.open(tmp_path / name / "cache") for name in ("p", "q"))
    assert ours.manifest.fingerprint == theirs.manifest.fingerprint
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (ours.teacher_dir / name).read_bytes() == (theirs.teacher_dir / name).read_bytes()


def test_debertas_own_head_goes_all_the_way_to_a_cache(tmp_path, text):
    """As published: nothing in the configuration says which head it is."""
    folder = tmp_path / "teacher"
    tokenizer = make_tokenizer("deberta-v2")
    ids = {"pad_token_id": tokenizer.pad_token_id}
    model = make_model("deberta-v2", len(tokenizer), legacy=False, **ids)
    save_with_tokenizer(model, tokenizer, folder)
    values = json.loads((folder / "config.json").read_text())
    del values["legacy"]
    (folder / "config.json").write_text(json.dumps(values))
    recipe = write_recipe(tmp_path / "recipe.toml", text, folder)
    done = run("teacher-cache", "--recipe", recipe)
    assert done.exit_code == 0, done.stderr
    kept = transformers.DebertaV2ForMaskedLM.from_pretrained(tmp_path / "p" / "cache" / "teacher")
    same_logits(kept, model)


def test_an_embedding_with_more_rows_than_ids(tmp_path, text):
    """Of a round number of rows, as many are published: through all stages."""
    tokenizer = make_tokenizer("bert")
    rows = len(tokenizer) + 24
    teacher = save_with_tokenizer(make_model("bert", rows), tokenizer, tmp_path / "teacher")
    recipe = write_recipe(
        tmp_path / "recipe.toml",
        text,
        teacher,
        student={"sizes": ["1x32"], "control": False},
        train={"steps": 2, "batch_size": 4},
        evaluate={"sequences": 6, "latency_repeats": 1},
    )
    done = run("distill", "--recipe", recipe, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert [row["name"] for row in json.loads(done.stdout)["models"]] == ["teacher", "1x32"]
    assert run("verify", tmp_path / "p" / "cache", "--rerun", 1).exit_code == 0
    done = run("view", tmp_path / "p" / "cache", "--student", tmp_path / "p/students/1x32")
    assert done.exit_code == 0, (done.stderr, done.exception)


def test_a_revision_is_opened_and_recorded(tmp_path, text, teacher, monkeypatch):
    """Two commits of one hub id, without the hub; weights and tokenizer are the older one's."""
    monkeypatch.setattr("distilcache.stages.models.hub.hub_answers", lambda *_: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--some--model"
    (place / "refs").mkdir(parents=True)
    for commit, branch, folder in (
        ("a" * 40, "main", save_teacher("roberta", tmp_path / "newer")),
        ("b" * 40, "v1", teacher),
    ):
        (place / "refs" / branch).write_text(commit)
        shutil.copytree(folder, place / "snapshots" / commit)
    recipe = write_recipe(tmp_path / "recipe.toml", text, "some/model", teacher={"revision": "v1"})
    done = run("teacher-cache", "--recipe", recipe)
    assert done.exit_code == 0, done.stderr
    provenance = json.loads((tmp_path / "p" / "cache" / "provenance.json").read_text())
    assert provenance["environment"]["teacher"] == "some/model"
    assert provenance["environment"]["teacher_revision"] == "v1"
    assert provenance["environment"]["teacher_commit"] == "b" * 40
    assert provenance["environment"]["card"]["base_model"] == "some/model"
    kept, given = (
        transformers.BertForMaskedLM.from_pretrained(path)
        for path in (tmp_path / "p" / "cache" / "teacher", teacher)
    )
    same_logits(kept, given)
    corpus = Corpus.open(tmp_path / "p" / "corpus")
    wanted = tokenizer_fingerprint(load_tokenizer(str(teacher)))
    assert corpus.manifest.tokenizer_sha256 == wanted
    # The branch moves on: other weights are another cache.
    moved = shutil.copytree(place / "snapshots" / ("b" * 40), place / "snapshots" / ("d" * 40))
    model = transformers.BertForMaskedLM.from_pretrained(teacher)
    with torch.no_grad():
        model.cls.predictions.bias += 1
    model.save_pretrained(moved)
    (place / "refs" / "v1").write_text("d" * 40)
    line = refusal(run("teacher-cache", "--recipe", recipe))
    assert "differing fields: teacher_sha256" in line


def test_a_revision_of_a_folder_or_of_nothing_is_refused(tmp_path, text, teacher):
    recipe = write_recipe(tmp_path / "recipe.toml", text, teacher, teacher={"revision": "main"})
    line = refusal(run("corpus", "--recipe", recipe))
    assert "must be a hub id where a revision of it is asked for" in line
    line = refusal(run("corpus", "--recipe", recipe, "--set", "teacher.model="))
    assert "must be the hub id that revision 'main' is of, got none" in line


def test_the_demo_with_a_teacher_takes_its_tokenizer(tmp_path, text, teacher):
    """The recipe that is used where none is named, and one teacher of yours."""
    words = ("--set", f"root={tmp_path}", "--set", f"corpus.sources={text}")
    shorter = ("--set", "corpus.max_length=16")
    done = run("corpus", *words, *shorter, "--set", f"teacher.model={teacher}")
    assert done.exit_code == 0, done.stderr
    found = Corpus.open(tmp_path / "demo" / "corpus").manifest
    assert found.tokenizer_sha256 == tokenizer_fingerprint(load_tokenizer(str(teacher)))


def test_the_demo_alone_trains_its_vocabulary(tmp_path, text):
    words = ("--set", f"root={tmp_path}", "--set", f"corpus.sources={text}")
    done = run("corpus", *words)
    assert done.exit_code == 0, done.stderr
    build = json.loads((tmp_path / "demo" / "corpus" / "build.json").read_text())
    assert (build["tokenizer"], build["vocab_size"]) == ("train", 6000)
