"""Recipes: TOML and --set into frozen dataclasses, with errors that name the field."""

from pathlib import Path

import pytest

from distilcache.data.errors import UserError
from distilcache.pipeline.recipe import Recipe, load_recipe, override_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.teacher.model or recipe.teacher.size


def test_defaults_are_the_papers_loss():
    train = Recipe().train
    assert (train.alpha_ce, train.alpha_mlm, train.alpha_cos) == (5.0, 2.0, 1.0)
    assert train.temperature == 2.0


def test_the_old_name_of_a_signal_is_refused_with_the_new_one():
    with pytest.raises(UserError, match=r"'replay\+head' is called 'replay\+topk' since 0.2.0"):
        load_recipe("demo", ["train.signal=replay+head"])


def test_a_recipe_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("own") == load_recipe(RECIPES[0].parent / "own.toml")
    (tmp_path / "own").mkdir()  # such as a folder of results
    assert load_recipe("own").name == "own"
    with pytest.raises(UserError, match="of one that comes with the package: bert-large, demo, "):
        load_recipe("none")
    (tmp_path / "demo").write_text('name = "a file comes first"')
    assert load_recipe("demo").name == "a file comes first"


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfname = 'b'\n")
    assert load_recipe(tmp_path / "a.toml").name == "b"


def test_set_overrides_the_file_and_converts_types(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[train]\nlr = 1e-4\n[student]\nsizes = ["2x64"]\n')
    recipe = load_recipe(
        file,
        [
            "train.lr=1",
            "student.sizes=3x384 2x128",
            "corpus.sources=a.txt",
            "cache.temperatures=[1, 4.0]",
            "teacher.train.steps=7",
            "student.control=true",
        ],
    )
    assert recipe.name == "mine"
    assert recipe.train.lr == 1.0
    assert recipe.student.sizes == ("3x384", "2x128")
    assert recipe.corpus.sources == ("a.txt",)
    assert recipe.cache.temperatures == (1.0, 4.0)
    assert recipe.teacher.train.steps == 7
    assert recipe.train.steps == 0
    assert recipe.student.control is True


@pytest.mark.parametrize("value", ["2024", "2026-12-01", "12345e3", "12e4567", "0x10", "true"])
def test_a_field_of_text_takes_what_is_typed(value):
    recipe = override_recipe(
        Recipe(name="a"),
        ["teacher.model=a/b", f"teacher.revision={value}", f"corpus.sources={value}"],
    )
    assert (recipe.teacher.revision, recipe.corpus.sources) == (value, (value,))
    assert override_recipe(recipe, ['teacher.revision="7"']).teacher.revision == "7"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.lr=1", ["'trian'", "'train'"]),
        ("train.leaning_rate=1", ["'train.leaning_rate'"]),
        ("train.batch_sizes=1", ["'batch_size'"]),
        ("train.lr=fast", ["train.lr", "a number", "'fast'"]),
        ("train.steps=1.5", ["train.steps", "a whole number", "1.5"]),
        ("student.init_layers=a,1", ["student.init_layers", "numbers with commas", "'a,1'"]),
        ("train.lr=1,5", ["train.lr", "a number", "'1,5'"]),
        ("student.control=1", ["student.control", "true or false"]),
        ("train=3", ["train", "section"]),
        ("train.lr", ["section.field=value"]),
        ("train.lr.x=3", ["train.lr"]),
        ("student.sizes=3x100", ["3x100", "divisible", "100 and 3"]),
        ("student.sizes=big", ["LAYERSxWIDTH", "'big'"]),
        ("device=tpu", ["device", "'tpu'"]),
        ("dtype=int8", ["dtype", "'int8'"]),
        ("name=a/b", ["name", "'a/b'"]),
        ("train.temperature=0", ["temperature", "above 0"]),
        ("evaluate.seed=-1", ["evaluate: seed", "-1"]),
        ("masking.mask=0.95", ["masking"]),
        ("corpus.packing=rows", ["packing", "'rows'"]),
        ("cache.hidden_quality=0", ["hidden_quality", "nats"]),
        ("train.adam_eps=-1.0", ["adam_eps", "at least 0", "-1.0"]),
        ("train.lr=inf", ["train.lr", "64 bits", "inf"]),
        ("train.lr=nan", ["train.lr", "64 bits", "nan"]),
        (f"evaluate.seed={2**63}", ["evaluate.seed", "64 bits"]),
        (f"train.lr={10**400}", ["train.lr", "64 bits"]),
        (f"cache.rounds={2**31}", ["cache: rounds", "2^31"]),
        ("corpus.sources=", ["corpus: sources", "at least one source", "got none"]),
        ("device=cuda:\N{SUPERSCRIPT TWO}", ["recipe: device", "'cuda:N'"]),
        ("masking.unit=word masking.policy=smoothed", ["masking: policy", "'uniform'"]),
        ("corpus.document=page", ["corpus: document", "blank_line, line, file", "'page'"]),
        ("corpus.max_length=7", ["corpus: max_length", "between 8 and 65535", "got 7"]),
        ("corpus.min_tokens=2", ["corpus: min_tokens", "between 3 and max_length", "got 2"]),
        ("corpus.block_sequences=0", ["corpus: block_sequences", "between 1 and", "got 0"]),
        ("corpus.tokenizer=train corpus.vocab_size=299", ["corpus: vocab_size", "300", "299"]),
        ("tasks.seeds=", ["tasks: seeds", "at least one seed", "got none"]),
        ("tasks.seeds=-1", ["tasks: seeds", "from 0 to", "-1"]),
        ("tasks.seeds=1,2,1", ["tasks: seeds", "different ones", "(1, 2, 1)"]),
        ("tasks.names=sst2,rte,sst2", ["tasks: names", "different tasks", "sst2, rte, sst2"]),
        ("student.sizes=", ["student: sizes", "at least one size", "got none"]),
        ("student.init=random student.init_layers=1", ["student: init_layers", "[1]", "'random'"]),
        ("cache.relation_quality=0", ["cache: relation_quality", "above 0 nats", "got 0"]),
        ("cache.hidden_layers=", ["cache: hidden_layers", "hidden_dtype=none", "got none"]),
        ("cache.top_p=0", ["cache: top_p", "(0, 1]", "got 0"]),
        ("cache.top_p=0.9 cache.top_k=65536", ["cache: top_k", "below 65536", "got 65536"]),
    ],
)
def test_bad_fields_are_named(override, words):
    with pytest.raises(UserError) as caught:
        load_recipe(None, override.split(" "))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_empty_text_is_an_empty_list():
    recipe = load_recipe(None, ["corpus.heldout_sources=", "train.report_to= "])
    assert recipe.corpus.heldout_sources == recipe.train.report_to == ()


def test_lists_need_no_brackets():
    given = {
        "tasks.seeds": "0,1,2",
        "tasks.names": "sst2,rte",
        "student.sizes": "3x128, 1x64",
        "cache.temperatures": "1,2.5",
        "teacher.train.report_to": "wandb,mlflow",
        "corpus.sources": "2024,2025",  # one file
        "root": "1,2",
        "teacher.model": "",
    }
    recipe = load_recipe(None, [f"{name}={value}" for name, value in given.items()])
    assert recipe.tasks.seeds == (0, 1, 2)
    assert recipe.tasks.names == ("sst2", "rte")
    assert recipe.student.sizes == ("3x128", "1x64")
    assert recipe.cache.temperatures == (1.0, 2.5)
    assert recipe.teacher.train.report_to == ("wandb", "mlflow")
    assert recipe.corpus.sources == ("2024,2025",)
    assert recipe.root == "1,2"
    assert recipe.teacher.model == ""


@pytest.mark.parametrize("content", [b"[train\n", b"\xff\xfe"])
def test_damaged_files_are_one_line(tmp_path, content):
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.toml"):
        load_recipe(file)
    with pytest.raises(UserError, match=r"none\.toml"):
        load_recipe(tmp_path / "none.toml")
