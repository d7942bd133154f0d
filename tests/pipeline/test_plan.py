"""Arithmetic of the plan against counted FLOPs, real columns and really made caches."""

import gzip
import json
import lzma
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM

from data.cache import Cache
from data.corpus import Corpus
from pipeline.cli import main
from pipeline.plan import size as size_module
from pipeline.plan import text as text_module
from pipeline.plan.cost import student_work
from pipeline.plan.shapes import Shape, student_shape, teacher_shape
from pipeline.plan.size import cache_size, code_bytes, formula_size, masked_share
from pipeline.plan.text import Text, text_of
from pipeline.recipe import load_recipe, override_recipe
from stages.teacher_cache.adapters import load_teacher

RECIPE = """
root = "{root}"
device = "cpu"
dtype = "float32"
[corpus]
sources = ["{text}"]
max_length = 16
block_sequences = 8
[masking]
probability = 0.3
[teacher]
model = "{teacher}"
[cache]
calibration_sequences = 24
[student]
sizes = ["2x32", "1x16"]
[train]
batch_size = 4
"""


@pytest.fixture
def recipe_file(tmp_path, small_corpus, small_teacher) -> Path:
    path = tmp_path / "tiny.toml"
    text = small_corpus().parent / "text.txt"
    path.write_text(RECIPE.format(root=tmp_path / "runs", text=text, teacher=small_teacher))
    return path


@pytest.fixture
def with_corpus(recipe_file, tmp_path, small_corpus) -> Path:
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/corpus").symlink_to(small_corpus())
    return recipe_file


def plan(recipe, *options, json_too=True):
    words = ["plan", "--recipe", recipe, *options, *(["--json"] if json_too else [])]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout) if json_too else done.stdout


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(small_teacher, recipe_file):
    shape = teacher_shape(load_recipe(recipe_file))
    assert (shape.layers, shape.width, shape.ffn) == (3, 32, 64)
    ids = torch.randint(shape.vocabulary, (3, 16))
    model = AutoModelForMaskedLM.from_pretrained(small_teacher, attn_implementation="eager")
    found = counted(lambda: model(input_ids=ids))
    assert found == ids.numel() * (shape.body(16, 1.0) + shape.head)

    # What stage one spares in the last layer; attention is the same in both.
    teacher = load_teacher(str(small_teacher), torch.device("cpu"), torch.float32)
    rows = torch.arange(0, 48, 4)
    whole, part = (
        counted(lambda index=index: teacher.encode(ids, None, (3,), index))
        for index in (None, rows)
    )
    assert whole - part == ids.numel() * (shape.body(16, 1.0) - shape.body(16, 0.25))


def test_parameters_are_those_of_the_model():
    base = size_module.Shape(layers=12, width=768, ffn=3072, vocabulary=30522)
    assert base.parameters == pytest.approx(109.5e6, rel=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_only": True},
        {"hidden_dtype": "float16", "top_k": 5, "temperatures": (2.0, 4.0)},
        {"hidden_dtype": "float32", "hidden_layers": (0, -1), "logits_dtype": "float32"},
        {"hidden_dtype": "none", "logits_dtype": "uint8", "tail_samples": 6},
        {"hidden_dtype": "float16", "residual_samples": 4, "positions": "all"},
        {"hidden_dtype": "float16", "positions": "masked+0.4", "logit_positions": "masked"},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_raw_columns_are_those_of_a_real_cache(settings, small_cache, monkeypatch):
    """With nothing compressed away, the formula gives the bytes that shards count per column."""
    cache = Cache.open(small_cache(**settings))
    totals, encoding = cache.manifest.totals, cache.encoding
    tokens = totals["tokens"]
    monkeypatch.setattr(size_module, "KEPT", dict.fromkeys(size_module.KEPT, 1.0))
    monkeypatch.setattr(size_module, "masked_share", lambda *_: totals["masked"] / tokens)
    given = {n: list(v) if isinstance(v, tuple) else v for n, v in settings.items()}
    recipe = load_recipe(None, [f"cache.{n}={json.dumps(v)}" for n, v in given.items()])
    shape = Shape(layers=3, width=32, ffn=64, vocabulary=encoding.vocab_size)
    text = Text(tokens=tokens, sequences=totals["sequences"], source="", estimated=False)
    found = dict(formula_size(recipe, shape, text).columns)
    found.pop("(rest)")
    merged = found.pop("logit_base, logit_scale", (0.0, 0.0))[0]
    raw = {name: size / tokens for name, size in totals["column_bytes"].items()}
    assert merged == pytest.approx(raw.pop("logit_base", 0.0) + raw.pop("logit_scale", 0.0))
    assert found.keys() == raw.keys()
    drawn = {"hidden_positions", "hidden_3"} if "+" in encoding.hidden_positions else set()
    for name, (low, high) in found.items():
        assert low == high == pytest.approx(raw[name], rel=0.1 if name in drawn else 1e-9), name


def test_masked_share_is_that_of_masking(small_cache):
    totals = Cache.open(small_cache()).manifest.totals
    assert masked_share(0.3, 16) == pytest.approx(totals["masked"] / totals["tokens"], rel=0.05)
    assert masked_share(0.15, 128) == 19 / 128
    assert masked_share(0.01, 16) == 1 / 16


def test_codes_between_and_beyond_what_was_measured():
    at = size_module.CODE_BYTES
    assert code_bytes(384, 1e-3) == (at[1e-3], at[1e-3])
    low, high = code_bytes(768, 1e-3)
    assert (low, high) == pytest.approx((1.6 * at[1e-3], 2 * at[1e-3]), rel=1e-3)
    assert code_bytes(128, 1e-3)[0] == pytest.approx(at[1e-3] / 3)
    assert at[2e-3] < code_bytes(384, 1.5e-3)[0] < at[1e-3]
    finer = [code_bytes(384, q)[0] for q in (2.5e-4, 1.25e-4, 6.25e-5)]
    assert finer[1] - finer[0] == pytest.approx(24)
    assert finer[2] - finer[1] == pytest.approx(24)


def test_a_cache_like_it(with_corpus, small_cache):
    path = small_cache()
    totals = Cache.open(path).manifest.totals
    found = plan(with_corpus, "--like", path)
    real = totals["bytes"] / totals["tokens"]
    assert found["bytes"]["per_token"] == pytest.approx([real, real])
    columns = [c["per_token"][0] for c in found["bytes"]["columns"].values()]
    assert sum(columns) == pytest.approx(real)
    assert found["bytes"]["columns"]["hidden_3"]["per_token"][0] > 1
    assert found["text"]["tokens"] == totals["tokens"]
    assert found["text"]["masked_positions"] == pytest.approx(totals["masked"])
    twice = plan(with_corpus, "--like", path, "--set", "cache.rounds=2")
    assert twice["bytes"]["total"] == pytest.approx([2 * totals["bytes"]] * 2)


def test_what_was_measured_is_what_is_made(with_corpus, small_cache, tmp_path, monkeypatch):
    """Blocks of the small run are those of the cache, coded by the same codec."""
    shards = ("--set", "cache.blocks_per_shard=2")
    work = tmp_path / "temporary"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    count = Corpus.open(tmp_path / "runs/tiny/corpus").split("train").num_blocks
    found = plan(with_corpus, "--measure", count, *shards)
    cache = Cache.open(small_cache())
    whole = cache_size(cache, "", cache.num_blocks)
    for name, (size, _) in whole.columns.items():
        there = found["bytes"]["columns"][name]["per_token"][0]
        tolerance = 0.3 if name == "(rest)" else 0.02  # archives are filled up to 10,240 bytes
        assert there == pytest.approx(size, rel=tolerance), name
    assert found["stage_one"]["tokens_per_s"] > 0
    assert [s["size"] for s in found["students"]] == ["2x32", "1x16"]
    assert all(s["tokens_per_s"] > 0 and s["live_hours"] > s["hours"] for s in found["students"])
    assert not list(work.iterdir())
    given = plan(with_corpus, "--measure", 2, "--student-tokens-per-s", "1x16=1234")
    assert given["students"][1]["tokens_per_s"] == 1234


def test_measured_without_a_corpus(recipe_file, tmp_path):
    found = plan(recipe_file, "--measure", 2, "--tokens", "1e6")
    assert found["bytes"]["source"] == "measured on 2 blocks"
    assert found["stage_one"]["hours"] == pytest.approx(
        1e6 / found["stage_one"]["tokens_per_s"] / 3600
    )
    assert not (tmp_path / "runs").exists()


def test_hours_break_even_and_price_by_hand(recipe_file):
    options = ["--tokens", "7.2e6", "--set", "cache.rounds=2", "--set", "train.epochs=3"]
    options += ["--teacher-tokens-per-s", 1000, "--student-tokens-per-s", "2x32=2000"]
    options += ["--student-tokens-per-s", "1x16=4000"]
    options += ["--price-per-hour", 10, "--price-per-tb-month", 1e6]
    found = plan(recipe_file, *options)
    first, (large, small) = found["stage_one"], found["students"]
    assert first["hours"] == pytest.approx(4.0)
    assert (large["hours"], small["hours"]) == pytest.approx((3.0, 1.5))
    # Live adds the teacher's encoder, its share of the pass, to each of three epochs.
    shape = teacher_shape(load_recipe(recipe_file))
    masked = masked_share(0.3, 16)
    encoder = shape.body(16, masked)
    beside = 3 * 2.0 * encoder / (encoder + masked * shape.head)
    assert large["live_hours"] == pytest.approx(3.0 + beside)
    assert small["live_hours"] == pytest.approx(1.5 + beside)
    against = found["against_live"]
    assert against["hours_ratio"] == pytest.approx(8.5 / (4.5 + 2 * beside))
    assert against["break_even_students"] == pytest.approx(4.0 / beside)
    price = found["price"]
    assert (price["teacher"], price["cache"]) == pytest.approx((40, 85))
    assert price["live"] == pytest.approx(10 * (4.5 + 2 * beside))
    assert price["storage_month"] == pytest.approx([b * 1e-6 for b in found["bytes"]["total"]])
    text = plan(recipe_file, *options, json_too=False)
    assert "pays for itself from" in text
    assert "price: live" in text


def test_only_what_the_losses_want_is_counted(recipe_file):
    """Replay for L_mse as for L_ce, masked positions alone where it is said so, or no teacher."""
    recipe = load_recipe(recipe_file, ["student.sizes=2x16", "cache.positions=all"])
    teacher = teacher_shape(recipe)
    text = Text(tokens=1e6, sequences=62500, source="", estimated=True)
    size = formula_size(recipe, teacher, text)
    student = student_shape(recipe, "2x16", teacher)
    assert size.positions == 1 > size.masked

    def work(*overrides):
        return student_work(override_recipe(recipe, overrides), student, teacher, size, 16)

    usual = work()
    assert work("train.alpha_ce=0", "train.alpha_mse=1") == usual
    spared = (1 - size.masked) * (3 * student.head + teacher.head)
    masked = work("train.restrict_ce_to_mask=true")
    assert usual.cached - masked.cached == pytest.approx(spared)
    assert masked.beside == usual.beside  # its encoder is run for L_cos at all positions
    alone = work("train.alpha_ce=0", "train.alpha_cos=0")
    own = 3 * (student.body(16, size.masked) + size.masked * student.head)
    assert (alone.cached, alone.beside) == (pytest.approx(own), 0.0)
    options = ["--tokens", 1e6, "--tflops", 1, "--set", "train.alpha_ce=0"]
    found = plan(recipe_file, *options, "--set", "train.alpha_cos=0")["students"][0]
    assert found["live_hours"] == found["hours"]


def test_students_of_the_teachers_width_have_its_feed_forward(recipe_file):
    recipe = load_recipe(recipe_file)
    shapes = [student_shape(recipe, size, teacher_shape(recipe)) for size in ("1x32", "1x16")]
    assert [shape.ffn for shape in shapes] == [64, 64]
    random = override_recipe(recipe, ["student.init=random"])
    assert student_shape(random, "1x32", teacher_shape(recipe)).ffn == 128


def test_what_is_not_counted_is_said(recipe_file):
    assert "not counted" not in plan(recipe_file, "--tokens", 1e6, json_too=False)
    made = [
        "--set",
        "teacher.model=",
        "--set",
        "teacher.size=2x32",
        "--set",
        "student.control=true",
    ]
    text = plan(recipe_file, "--tokens", 1e6, *made, json_too=False)
    assert "not counted: the teacher's own pre-training, controls" in text


def test_sustained_flops_give_hours(recipe_file):
    found = plan(recipe_file, "--tokens", "1e9", "--tflops", "0.5")
    for row in (found["stage_one"], *found["students"]):
        assert row["hours"] == pytest.approx(row["flops"] / 0.5e12 / 3600)
    for student in found["students"]:
        assert student["live_hours"] == pytest.approx(student["live_flops"] / 0.5e12 / 3600)
    unknown = plan(recipe_file, "--tokens", "1e9", json_too=False)
    assert "hours: pass --measure BLOCKS, rates, or --tflops" in unknown


def test_text_is_counted_or_estimated(with_corpus, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    made = text_of(recipe, None)
    train = Corpus.open(tmp_path / "runs/tiny/corpus").manifest.splits["train"]
    assert (made.tokens, made.sequences) == (train["tokens"], train["sequences"])
    assert not made.estimated
    (tmp_path / "runs/tiny/corpus").unlink()
    guessed = text_of(load_recipe(recipe_file, ["corpus.heldout_fraction=0.1"]), None)
    assert guessed.estimated
    assert guessed.tokens == pytest.approx(train["tokens"], rel=0.15)  # held out by chance


@pytest.mark.parametrize("kind", ["txt", "txt.xz", "jsonl.gz", "parquet"])
def test_large_sources_are_sized_by_their_start(kind, recipe_file, tmp_path, monkeypatch):
    words = ["amber", "bridge", "cedar", "delta", "ember", "forest", "garden", "harbor", "island"]
    rng = random.Random(0)
    documents = [" ".join(rng.choices(words, k=400)) for _ in range(2500)]
    path = tmp_path / f"big.{kind}"
    lines = "\n".join(json.dumps({"text": d}) for d in documents)
    if kind == "txt":
        path.write_text("\n\n".join(documents))
    elif kind == "txt.xz":
        path.write_bytes(lzma.compress("\n\n".join(documents).encode()))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        pq.write_table(pa.table({"text": documents}), path)
    monkeypatch.setattr(text_module, "SAMPLE_BYTES", 1 << 17)
    settings = [f"corpus.sources={path}", "corpus.heldout_fraction=0.0"]
    recipe = load_recipe(recipe_file, settings)
    whole = text_of(recipe, None)
    assert "estimated: 0.1 MB tokenised of 6." in whole.source
    monkeypatch.setattr(text_module, "READ_BYTES", 3 << 20)
    assert text_of(recipe, None).tokens == pytest.approx(whole.tokens, rel=0.03)
    limited = load_recipe(recipe_file, [*settings, "corpus.max_bytes=1000000"])
    part = text_of(limited, None).tokens
    assert part == pytest.approx(whole.tokens * 1e6 / sum(map(len, documents)), rel=0.02)


def test_the_papers_job_without_weights_or_text():
    """BERT-base by its name alone; bytes are a range as no teacher of its width was measured."""
    recipe = Path(__file__).parents[2] / "recipes" / "distilbert.toml"
    found = plan(recipe, "--tokens", "4.4e9")
    assert (found["teacher"]["layers"], found["teacher"]["vocabulary"]) == (12, 30522)
    low, high = found["bytes"]["per_token"]
    assert 30 < low < 36 < high < 45
    assert found["bytes"]["total"] == pytest.approx([3 * 4.4e9 * low, 3 * 4.4e9 * high])
    text = plan(recipe, "--tokens", "4.4e9", json_too=False)
    assert "4,400,000,000 (as given)" in text
    assert " to " in next(line for line in text.splitlines() if line.startswith("cache"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--tokens", "-1"], "--tokens must be above 0"),
        (["--tflops", "0"], "--tflops"),
        (["--student-tokens-per-s", "2x32"], "SIZE=N"),
        (["--student-tokens-per-s", "2x32=-3"], "SIZE=N"),
        (["--student-tokens-per-s", "3x32=9"], "must name a size of the recipe (2x32, 1x16)"),
        (["--like", "nowhere"], "teacher-cache first"),
        (["--like", "{cache}", "--set", "cache.top_k=3"], "top_k 8 there and 3 here"),
        (["--like", "{cache}", "--measure", "2"], "--like must be left out"),
        (["--measure", "1"], "2 blocks or more"),
        (["--set", "teacher.model=no/such/thing"], "plan: teacher must be"),
        (["--set", "teacher.model="], "plan: teacher must be named"),
        (["--set", "corpus.tokenizer=train"], "run distilcache corpus, or pass --tokens"),
        (["--set", "corpus.sources=hf:some/thing:train"], "--tokens"),
    ],
)
def test_bad_input_is_one_line(recipe_file, small_cache, options, word, tmp_path, monkeypatch):
    monkeypatch.setattr("data.tokenizers.hub_answers", lambda _: False)
    monkeypatch.setattr(text_module, "_sample", lambda *_: (["amber bridge"] * 99, False))
    words = [option.format(cache=small_cache()) for option in options]
    done = CliRunner().invoke(main, ["plan", "--recipe", str(recipe_file), *words])
    assert done.exit_code == 2, done.output
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.shared_data
def test_a_small_run_scaled_up_is_the_real_cache(shared, tmp_path):
    """A real teacher on real text: two blocks against all, and the formula against all."""
    path = tmp_path / "real.toml"
    path.write_text(
        f"""
root = "{tmp_path / "runs"}"
device = "cpu"
[corpus]
sources = ["{shared / "corpus" / "wiki_train_10MB.txt.xz"}"]
max_bytes = 1_500_000
max_length = 128
block_sequences = 256
[teacher]
model = "{shared / "teacher"}"
[student]
sizes = ["1x128"]
[train]
batch_size = 4
"""
    )
    before = {
        "measured": plan(path, "--measure", 2)["bytes"],
        "formula": plan(path)["bytes"],
    }
    made = CliRunner().invoke(main, ["teacher-cache", "--recipe", str(path), "--json"])
    assert made.exit_code == 0, made.output
    real = Cache.open(tmp_path / "runs" / "real" / "cache").manifest.totals["bytes"]
    for name, found in before.items():
        low, high = found["total"]
        print(f"{name}: {low / real - 1:+.2%} to {high / real - 1:+.2%} of {real:,} bytes")
        assert low == pytest.approx(real, rel=0.1)
        assert high == pytest.approx(real, rel=0.1)
