"""FLOPs and bytes that a plan counts with: those of torch and of real caches."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, BertConfig

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.schema import Encoding, HiddenEncoding
from distilcache.pipeline.plan import size as size_module
from distilcache.pipeline.plan.code_bytes import CODE_BYTES, code_bytes
from distilcache.pipeline.plan.corpus_size import Text
from distilcache.pipeline.plan.shapes import Shape, shape_in, teacher_shape
from distilcache.pipeline.plan.size import (
    column_bytes,
    copy_bytes,
    formula_size,
    masked_fraction,
    tar_bytes,
)
from distilcache.pipeline.recipe import load_recipe, override_recipe
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.student_train.student import build_student
from distilcache.stages.teacher_cache.teacher import load_teacher
from tests.builders import build_corpus_of, random_texts, run_stage_one
from tests.pipeline.plan_support import students_of
from tests.stages.models.families_support import make_model, save_teacher


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
    assert found == ids.numel() * (shape.body(16, 1.0) + shape.lm_head)

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
    config = BertConfig()
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    assert base.parameters == model.num_parameters()


@pytest.mark.parametrize("kind", ["albert", "modernbert", "mobilebert", "longformer", "xlnet"])
def test_parameters_of_a_teacher_that_is_there_are_its_own(kind, tmp_path):
    """Layers of ALBERT share theirs, and others have more or fewer than BERT's."""
    model = make_model(kind, 60)
    model.save_pretrained(tmp_path)
    recipe = load_recipe(None, [f"teacher.model={tmp_path}"])
    assert teacher_shape(recipe).parameters == model.num_parameters()


@pytest.mark.parametrize("settings", [{}, {"relation_layer": -1}, {"hidden_dtype": "none"}])
def test_the_teachers_copy_is_as_large_as_a_real_one(settings, small_cache, monkeypatch):
    cache = Cache.open(small_cache(**settings))
    shape = shape_in(cache)
    weights = AutoModelForMaskedLM.from_pretrained(cache.teacher_dir).num_parameters()
    words = (cache.teacher_dir / "tokenizer.json").stat().st_size
    monkeypatch.setattr(size_module, "TOKENIZER_BYTES", words / shape.vocabulary)
    found = copy_bytes(cache.encoding, shape) + 4 * (weights - shape.parameters)
    # At this size headers are large.
    tensors = [load_file(path).values() for path in cache.teacher_dir.glob("*.safetensors")]
    held = words + sum(t.nbytes for file in tensors for t in file)
    assert found == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_only": True},
        {"hidden_dtype": "float16", "top_k": 5, "temperatures": (2.0, 4.0)},
        {"hidden_dtype": "float32", "hidden_layers": (0, -1), "logits_dtype": "float32"},
        {"hidden_dtype": "none", "logits_dtype": "uint8", "tail_samples": 6},
        {"hidden_dtype": "none", "top_k": 0, "tail_samples": 6},
        {"hidden_dtype": "float16", "residual_samples": 4, "positions": "all"},
        {"hidden_dtype": "float16", "relation_layer": -2},
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
    monkeypatch.setattr(size_module, "masked_fraction", lambda *_: totals["masked"] / tokens)
    given = {n: list(v) if isinstance(v, tuple) else v for n, v in settings.items()}
    recipe = load_recipe(None, [f"cache.{n}={json.dumps(v)}" for n, v in given.items()])
    shape = Shape(layers=3, width=32, ffn=64, vocabulary=encoding.vocab_size)
    text = Text(tokens=tokens, sequences=totals["sequences"], source="")
    found = dict(formula_size(recipe, shape, text).columns)
    found.pop("(rest)")
    raw = {name: size / tokens for name, size in totals["column_bytes"].items()}
    assert found.keys() == raw.keys()
    drawn = {"hidden_positions", "hidden_3"} if "+" in encoding.hidden_positions else set()
    for name, (low, high) in found.items():
        assert low == high == pytest.approx(raw[name], rel=0.1 if name in drawn else 1e-9), name


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_logits_of_a_mass_are_a_range(dtype, small_cache, monkeypatch):
    """How many they are depends on the teacher."""
    settings = {"hidden_dtype": "none", "top_k": 40, "top_p": 0.5, "logits_dtype": dtype}
    cache = Cache.open(small_cache(**settings))
    totals = cache.manifest.totals
    tokens = totals["tokens"]
    monkeypatch.setattr(size_module, "KEPT", dict.fromkeys(size_module.KEPT, 1.0))
    recipe = load_recipe(None, [f"cache.{n}={json.dumps(v)}" for n, v in settings.items()])
    shape = Shape(layers=3, width=32, ffn=64, vocabulary=cache.encoding.vocab_size)
    masked = totals["masked"] / tokens
    text = Text(tokens=tokens, sequences=totals["sequences"], source="", masked=masked)
    found = formula_size(recipe, shape, text).columns
    for name, (low, high) in found.items():
        if name in ("logit_ids", "logit_values"):
            assert low < totals["column_bytes"][name] / tokens < high, name
            assert high == pytest.approx(40 * low)
        else:
            assert low == high, name


def test_masked_fraction_is_that_of_masking(small_cache):
    totals = Cache.open(small_cache()).manifest.totals
    assert masked_fraction(0.3, 16) == pytest.approx(totals["masked"] / totals["tokens"], rel=0.05)
    assert masked_fraction(0.15, 128) == 19 / 128
    assert masked_fraction(0.15, 32) == 5 / 32  # of 4.5
    assert masked_fraction(0.01, 16) == 1 / 16


def test_codes_between_and_beyond_what_was_measured():
    at = CODE_BYTES
    assert code_bytes(384, 1e-3) == (at[1e-3], at[1e-3])
    low, high = code_bytes(768, 1e-3)
    assert (low, high) == pytest.approx((1.6 * at[1e-3], 2 * at[1e-3]), rel=1e-3)
    assert code_bytes(128, 1e-3)[0] == pytest.approx(at[1e-3] / 3)
    assert at[2e-3] < code_bytes(384, 1.5e-3)[0] < at[1e-3]
    finer = [code_bytes(384, q)[0] for q in (2.5e-4, 1.25e-4, 6.25e-5)]
    assert finer[1] - finer[0] == pytest.approx(24)
    assert finer[2] - finer[1] == pytest.approx(24)


def test_codes_of_small_blocks_have_a_table_per_plane():
    """As the writer compresses planes of normal codes, 275 of them at 3.4 bits."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(1.5, 4.0, (275, 1))
    planes = (128 + spread * rng.standard_normal((275, 9728))).round().astype(np.uint8)

    def written(positions):
        columns = {"hidden_6": planes[:, :positions].reshape(-1)}
        return column_bytes(columns, encoding)["hidden_6"] / positions

    coded = HiddenEncoding(layer=6, width=384, dtype="coded", planes=275)
    plain = Encoding(vocab_size=9, max_length=128, pad_id=0, mask_only=False, num_layers=6)
    encoding = replace(plain, hidden=(coded,))
    large = written(9728)
    assert large == pytest.approx(CODE_BYTES[1e-3], rel=0.1)
    for positions in (152, 304, 1216):
        more = code_bytes(384, 1e-3, positions)[0] / code_bytes(384, 1e-3)[0]
        assert more == pytest.approx(written(positions) / large, rel=0.08)
    assert more < 1.1 < 1.25 < code_bytes(384, 1e-3, 152)[0] / code_bytes(384, 1e-3)[0]


def test_students_of_the_teachers_width_have_its_feed_forward(recipe_file):
    recipe = load_recipe(recipe_file)
    assert [shape.ffn for shape in students_of(recipe, "1x32", "1x16")] == [64, 64]
    random = override_recipe(recipe, ["student.init=random"])
    assert [shape.ffn for shape in students_of(random, "1x32")] == [128]


@pytest.mark.parametrize("kind", ["bert", "albert", "electra", "deberta-v2", "modernbert"])
def test_parameters_of_students_are_their_own(kind, tmp_path):
    teacher = save_teacher(kind, tmp_path / "teacher")
    corpus = build_corpus_of(random_texts(60), tmp_path, teacher, max_length=16)
    run_stage_one(tmp_path / "cache", corpus, teacher)
    trained = build_student(
        size="2x32",
        student=StudentConfig(),
        seed=0,
        encoding=Cache.open(tmp_path / "cache").encoding,
        teacher_dir=teacher,
    )
    recipe = load_recipe(None, [f"teacher.model={teacher}", "corpus.max_length=16"])
    (shape,) = students_of(recipe, "2x32")
    assert shape.parameters == trained.num_parameters()


@pytest.mark.parametrize(("wanted", "ids"), [("50", 50), ("9000", 120), ("0.9", 120)])
def test_students_have_the_ids_that_the_recipe_says(recipe_file, wanted, ids):
    recipe = override_recipe(load_recipe(recipe_file), [f"student.vocabulary={wanted}"])
    teacher = teacher_shape(recipe)
    assert teacher.vocabulary == 120
    (shape,) = students_of(recipe, "1x32")
    assert shape.vocabulary == ids
    (whole,) = students_of(override_recipe(recipe, ["student.vocabulary=1"]), "1x32")
    assert whole.parameters - shape.parameters == (120 - ids) * 33  # a row, and a bias


def test_blocks_take_what_their_tars_take():
    """A header each and whole records, as tarfile writes them, and an end per shard."""
    frames, records = [1, 512, 513, 5000, 40_000, 7], 0
    for first in (0, 3):
        with tarfile.open(fileobj=io.BytesIO(), mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for size in frames[first : first + 3]:
                info = tarfile.TarInfo(str(size))
                info.size = size
                archive.addfile(info, io.BytesIO(bytes(size)))
            records += archive.offset
    assert tar_bytes(frames, 3) == records + 2 * size_module.TAR_END
