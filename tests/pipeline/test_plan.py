"""A plan against a really made cache, and its hours and prices by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.pipeline.plan import measure, source_bytes
from distilcache.pipeline.plan.corpus_size import Text
from distilcache.pipeline.plan.cost import passes, student_work, teacher_work
from distilcache.pipeline.plan.lines import _break_even
from distilcache.pipeline.plan.shapes import Shape, teacher_shape
from distilcache.pipeline.plan.size import cache_size, formula_size, masked_fraction
from distilcache.pipeline.recipe import load_recipe, override_recipe
from distilcache.pipeline.report.text import duration
from distilcache.stages.corpus.text.documents import Segment
from distilcache.stages.models.families import shape_of
from tests.command_line import refusal, run
from tests.pipeline.plan_support import students_of


def plan(recipe, *options, json_too=True):
    done = run("plan", "--recipe", recipe, *options, *(["--json"] if json_too else []))
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout) if json_too else done.stdout


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
    copy = sum(file.stat().st_size for file in (path / "teacher").iterdir())
    assert found["bytes"]["teacher"] == copy
    twice = plan(with_corpus, "--like", path, "--set", "cache.rounds=2")
    assert twice["bytes"]["total"] == pytest.approx([2 * totals["bytes"] + copy] * 2)


@pytest.mark.parametrize("option", ["--like={}", "--set=cache_from={}"])
def test_a_cache_without_its_teacher_is_refused(recipe_file, small_cache, tmp_path, option):
    cache = shutil.copytree(small_cache(), tmp_path / "cache")
    (cache / "teacher" / "model.safetensors").unlink()
    line = refusal(run("plan", "--recipe", recipe_file, option.format(cache)))
    assert "model.safetensors must" in line


def test_a_finished_cache_is_counted_and_only_students_cost(recipe_file, small_cache):
    cache = Cache.open(small_cache(rounds=2))
    totals = cache.manifest.totals
    own = ("--set", f"cache_from={cache.path}")
    # Settings of a cache, and a teacher, that are not those of the finished one.
    own += ("--set", "cache.top_k=3", "--set", "teacher.model=", "--set", "teacher.size=")
    found = plan(recipe_file, *own, "--tflops", 1)
    assert found["text"]["tokens"] == totals["tokens"] / 2
    whole = totals["bytes"] + found["bytes"]["teacher"]
    assert found["bytes"]["total"] == pytest.approx([whole, whole])
    assert (found["teacher"]["layers"], found["teacher"]["width"]) == (3, 32)
    assert found["stage_one"]["hours"] == found["stage_one"]["tokens"] == 0
    against, students = found["against_live"], found["students"]
    hours, live = (sum(s[name] for s in students) for name in ("hours", "live_hours"))
    assert against["hours_ratio"] == pytest.approx(hours / live)
    assert against["break_even_students"] is None
    assert [line.split(":")[0] for line in found["advice"]] == ["student 2x32", "student 1x16"]
    text = plan(recipe_file, *own, json_too=False)
    assert "2 students from the finished cache: " in text
    assert "stage one" not in text
    assert "cache.top_k" not in text
    measured = plan(recipe_file, *own, "--measure", 2)["students"]
    assert all(s["tokens_per_s"] > 0 for s in measured)
    refused = run("plan", "--recipe", recipe_file, *own, "--tokens", 1e6)
    assert "--tokens and --like must be left out where students read" in refusal(refused)


def test_what_was_measured_is_what_is_made(with_corpus, small_cache, tmp_path, monkeypatch):
    """Blocks of the small run are those of the cache, coded by the same codec."""
    shards = ("--set", "cache.blocks_per_shard=2")
    work = tmp_path / "temporary"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    count = Corpus.open(tmp_path / "p/corpus").split("train").num_blocks
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


def test_the_students_of_the_recipe_are_measured(with_corpus, monkeypatch):
    """With their start, heads and feed-forward, and no tracker hears of it."""
    seen = []

    def watched(**given):
        train_student(**given)
        config = AutoConfig.from_pretrained(given["out"])
        seen.append((shape_of(config), given["train"].report_to))

    train_student = measure.train_student
    monkeypatch.setattr(measure, "train_student", watched)
    own = ["student.sizes=1x32", "student.init_layers=1", "train.report_to=tensorboard"]
    settings = [part for setting in own for part in ("--set", setting)]
    plan(with_corpus, "--measure", 2, *settings)
    ((trained, reports),) = seen
    (planned,) = students_of(load_recipe(with_corpus, own))
    assert (trained.ffn, trained.width, trained.heads) == (planned.ffn, planned.width, 2)
    assert planned.ffn == 64
    assert reports == ()


def test_measured_without_a_corpus(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("distilcache.data.progress.FIRST_SECONDS", 0.0)
    done = run("plan", "--recipe", recipe_file, "--measure", 2, "--tokens", "1e6", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert "plan: teacher: 100%, " in done.stderr
    assert "student 1x16: step 8/8" in done.stderr
    # Nothing about the small text, which is not the user's.
    assert "corpus: no text" not in done.stderr
    assert "train: " not in done.stderr
    assert found["bytes"]["source"] == "measured on 2 blocks"
    assert found["stage_one"]["hours"] == pytest.approx(
        1e6 / found["stage_one"]["tokens_per_s"] / 3600
    )
    assert not (tmp_path / "p").exists()


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
    masked = masked_fraction(0.3, 16)
    encoder = shape.body(16, masked)
    beside = 3 * 2.0 * encoder / (encoder + masked * shape.lm_head)
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
    told = "pays for itself with the first student (each reads the text 3 times, of 2 rounds)"
    assert told in text
    assert "4.0 h\n" in text
    assert " 1.5 h " in text
    assert "price: live" in text


@pytest.mark.parametrize(
    ("students", "words"),
    [
        (0.3, "with the first student"),
        (1.0, "from 2 students on, with 1 it costs as much"),
        (0.998, "from 2 students on, with 1 it costs as much"),
        (2.4, "from 3 students on"),
    ],
)
def test_from_how_many_students_on_it_pays(students, words):
    assert _break_even(students) == f"stage one pays for itself {words}"


def test_times_have_units():
    found = [duration(hours) for hours in (0.004, 0.03, 0.99, 3.0, 72, None)]
    assert found == ["14 s", "1.8 min", "59.4 min", "3.0 h", "3.0 d", "-"]


def test_students_that_cannot_become_good_are_named(recipe_file):
    options = ["--tokens", "1e3", "--set", 'student.sizes=["2x32", "1x16", "9x32"]']
    lines = plan(recipe_file, *options)["advice"]
    assert [line.split(":")[0] for line in lines] == [
        *(f"student {size}" for size in ("2x32", "1x16", "9x32")),
        "student 9x32",
    ]
    assert "starts from a projection" in lines[1]
    assert "larger than its teacher" in lines[3]
    text = plan(recipe_file, *options, json_too=False)
    assert all(line in text for line in lines)
    assert not plan(recipe_file, "--tokens", "1e9")["advice"]


def test_only_what_the_losses_want_is_counted(recipe_file):
    """Replay for L_mse as for L_ce, masked positions alone where it is said so, or no teacher."""
    recipe = load_recipe(recipe_file, ["student.sizes=2x16", "cache.positions=all"])
    teacher = teacher_shape(recipe)
    text = Text(tokens=1e6, sequences=62500, source="")
    size = formula_size(recipe, teacher, text)
    (student,) = students_of(recipe)
    assert size.positions == 1 > size.masked

    def work(*overrides):
        return student_work(override_recipe(recipe, overrides), student, teacher, size, 16)

    usual = work()
    assert work("train.alpha_ce=0", "train.alpha_mse=1") == usual
    spared = (1 - size.masked) * (3 * student.lm_head + teacher.lm_head)
    masked = work("train.restrict_ce_to_mask=true")
    assert usual.cached - masked.cached == pytest.approx(spared)
    assert masked.live_extra == usual.live_extra  # its encoder is run for L_cos at all positions
    alone = work("train.alpha_ce=0", "train.alpha_cos=0")
    own = 3 * (student.body(16, size.masked) + size.masked * student.lm_head)
    assert (alone.cached, alone.live_extra) == (pytest.approx(own), 0.0)
    states = work("train.alpha_ce=0", "train.alpha_mlm=0")
    assert states.cached == pytest.approx(3 * student.body(16, 1.0))  # no logits, no LM head
    options = ["--tokens", 1e6, "--tflops", 1, "--set", "train.alpha_ce=0"]
    found = plan(recipe_file, *options, "--set", "train.alpha_cos=0")["students"][0]
    assert found["live_hours"] == found["hours"]


@pytest.mark.parametrize(("positions", "measured"), [("masked", 17.7), ("all", 134.4)])
def test_hidden_states_are_as_measured(recipe_file, positions, measured):
    """Of the 6x384 teacher on Wikipedia, in blocks of 512 sequences (docs/benchmarks.md)."""
    settings = [f"cache.positions={positions}", "cache.hidden_quality=1e-3",
                "masking.probability=0.15", "corpus.max_length=128",
                "corpus.block_sequences=512"]  # fmt: skip
    recipe = load_recipe(recipe_file, settings)
    teacher = Shape(layers=6, width=384, ffn=1536, vocabulary=30522)
    size = formula_size(recipe, teacher, Text(tokens=1.28e7, sequences=1e5, source=""))
    assert size.columns["hidden_6"][0] == pytest.approx(measured, rel=0.03)


def test_lm_heads_are_counted_where_logits_are_made(recipe_file):
    """Stage one's for the positions of stored logits; a step's over its sample of the ids."""
    recipe = load_recipe(recipe_file, ["student.sizes=2x16", "cache.positions=all"])
    teacher = replace(teacher_shape(recipe), vocabulary=30522)
    text = Text(tokens=1e6, sequences=62500, source="")

    def once(*overrides):
        changed = override_recipe(recipe, overrides)
        return teacher_work(changed, teacher, formula_size(changed, teacher, text), 16).cached

    body = teacher.body(16, 1.0)
    masked = formula_size(recipe, teacher, text).masked
    assert once() == pytest.approx(body + teacher.lm_head)
    assert once("cache.logit_positions=masked") == pytest.approx(body + masked * teacher.lm_head)
    assert once("cache.top_k=0") == pytest.approx(body)

    size = formula_size(recipe, teacher, text)
    student = replace(*students_of(recipe), vocabulary=30522)
    whole, sampled = (
        student_work(override_recipe(recipe, [f"train.vocabulary_fraction={f}"]), student, teacher,
                     size, 16)
        for f in (1, 0.5)
    )  # fmt: skip
    rest = 2 * 15261 * (3 * 16 + teacher.width)
    assert whole.cached - sampled.cached == pytest.approx(rest)
    assert whole.live_extra == sampled.live_extra


@pytest.mark.parametrize(
    ("settings", "names", "remedy"),
    [
        (["cache.hidden_layers=[1, -1]"], "hidden_1", "cache.hidden_layers=-1"),
        (["cache.relation_layer=-1"], "relation_3", "cache.relation_layer=0"),
        (["train.signal=replay"], "log_odds, logit_ids, logit_values", "cache.top_k=0"),
        (["cache.residual_samples=4"], "residual_ids, residual_mass", "cache.residual_samples=0"),
        (
            ["cache.tail_samples=4", "cache.hidden_dtype=none", "train.signal=sparse",
             "train.temperature=1", "train.alpha_cos=0"],
            "tail_ids", "cache.tail_samples=0",
        ),
        (["train.signal=sparse", "train.alpha_cos=0"], "hidden_3", "cache.hidden_dtype=none"),
        (
            ["cache.mask_only=true", "train.alpha_ce=0", "train.alpha_cos=0",
             "student.init=random", "train.steps=3000"],
            "", "",
        ),
        (["cache.relation_layer=-1", "train.alpha_rel=1"], "", ""),
    ],
)  # fmt: skip
def test_bytes_that_no_loss_reads_are_named(recipe_file, settings, names, remedy):
    """With the share that they have, which is that without them."""
    options = ["--tokens", "1e9"]
    for setting in settings:
        options += ["--set", setting]
    found = plan(recipe_file, *options)
    if not names:
        assert found["advice"] == []
        return
    (line,) = found["advice"]
    assert line.startswith(f"cache: no loss of this recipe reads {names}: ")
    assert line.endswith(f"; --set {remedy} spares them")
    without = plan(recipe_file, *options, "--set", remedy)
    assert without["advice"] == []
    ends = zip(found["bytes"]["per_token"], without["bytes"]["per_token"], strict=True)
    spared = [f"{more - less:.1f}" for more, less in ends]
    assert f": {spared[0]} " in line


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
    assert "hours: pass --tflops, --measure BLOCKS, or --teacher-tokens-per-s" in unknown


def test_the_papers_job_without_weights_or_text():
    """BERT-base by its name alone; bytes are a range as no teacher of its width was measured."""
    recipe = Path(__file__).parents[2] / "recipes" / "distilbert.toml"
    found = plan(recipe, "--tokens", "4.4e9")
    assert (found["teacher"]["layers"], found["teacher"]["vocabulary"]) == (12, 30522)
    low, high = found["bytes"]["per_token"]
    assert 30 < low < 36 < high < 45
    copy = found["bytes"]["teacher"]
    assert copy == pytest.approx(4 * found["teacher"]["parameters"], rel=0.02)
    wanted = [3 * 4.4e9 * low + copy, 3 * 4.4e9 * high + copy]
    assert found["bytes"]["total"] == pytest.approx(wanted)
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
        (["--set", "teacher.model=no/such/thing"], "or its shape: --set teacher.model= --set"),
        (["--set", "teacher.model="], "plan: teacher must be named"),
        (["--set", "corpus.tokenizer=train"], "leave corpus.tokenizer out"),
        (["--set", "corpus.sources=hf:some/thing:train"], "--tokens"),
    ],
)
def test_bad_input_is_one_line(recipe_file, small_cache, options, word, tmp_path, monkeypatch):
    monkeypatch.setattr("distilcache.stages.models.hub.hub_answers", lambda *_: False)
    text = "amber bridge " * 99
    found = [Segment(text, text.encode(), True)]
    monkeypatch.setattr(source_bytes, "segments_of", lambda *_: (segment for segment in found))
    monkeypatch.setattr(source_bytes, "SAMPLE_BYTES", len(text))
    words = [option.format(cache=small_cache()) for option in options]
    done = run("plan", "--recipe", recipe_file, *words)
    assert word in refusal(done)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("length", "sequences", "text_bytes"),
    [(128, 256, 1_500_000), (128, 64, 500_000), (32, 64, 300_000)],
)
def test_a_small_run_scaled_up_is_the_real_cache(shared, tmp_path, length, sequences, text_bytes):
    """A real teacher on real text: two blocks against all, and the formula against all."""
    path = tmp_path / "real.toml"
    path.write_text(
        f"""
root = "{tmp_path / "runs"}"
device = "cpu"
[corpus]
sources = ["{shared / "corpus" / "wiki_train_10MB.txt.xz"}"]
max_bytes = {text_bytes}
max_length = {length}
block_sequences = {sequences}
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
    made = run("teacher-cache", "--recipe", path, "--json")
    assert made.exit_code == 0, made.output
    cache = Cache.open(tmp_path / "runs" / "real" / "cache")
    real = cache.manifest.totals["bytes"]
    copy = sum(file.stat().st_size for file in cache.teacher_dir.iterdir())
    for name, found in before.items():
        assert found["teacher"] == pytest.approx(copy, rel=0.05)
        low, high = (total - found["teacher"] for total in found["total"])
        print(f"{name}: {low / real - 1:+.2%} to {high / real - 1:+.2%} of {real:,} bytes")
        assert low == pytest.approx(real, rel=0.1)
        assert high == pytest.approx(real, rel=0.1)


def test_passes_of_a_run_with_a_number_of_steps(recipe_file):
    """Steps are of the optimizer, each of ``accumulation`` batches."""
    text = Text(tokens=16000, sequences=200, source="")
    settings = ["train.steps=10", "train.batch_size=8", "train.accumulation=5"]
    assert passes(load_recipe(recipe_file, settings), text) == pytest.approx(2.0)
    assert passes(load_recipe(recipe_file, ["train.epochs=3", *settings[1:]]), text) == 3.0
