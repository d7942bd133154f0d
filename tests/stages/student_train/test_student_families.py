"""Every family from its cache to an exported student that plain transformers opens."""

import functools
import json
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
)

from distilcache import CachedDistillationTrainer, open_cache
from distilcache import build_student as start_student
from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.evaluate.config import EvaluateConfig
from distilcache.stages.evaluate.run import ModelEntry, evaluate_models
from distilcache.stages.models.families import Shape, shape_of, student_values
from distilcache.stages.models.saving import config_json
from distilcache.stages.student_train import vocabulary
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.export import CardFacts, export_model
from distilcache.stages.student_train.run import train_student
from distilcache.stages.student_train.signals import count_positions
from distilcache.stages.student_train.student import build_student, student_config
from distilcache.stages.student_train.trimming import trimmed_ids
from distilcache.stages.student_train.weights import config_in
from tests.builders import build_corpus_of, random_texts, run_stage_one
from tests.stages.models.families_support import (
    FAMOUS,
    make_model,
    open_model,
    same_logits,
    save_teacher,
)
from tests.stages.student_train.model_support import EXACT, build, in_losses, same_over_a_sample

STUDENTS = [*((name, "usual") for name in FAMOUS), ("bert", "teacher")]
WITHOUT_RELATIONS = ("mobilebert", "xlnet")
OTHERS = [name for name in FAMOUS if name not in ("bert", "distilbert")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(kind)``: a teacher with random weights, and its cache in the exact mode."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        teacher = save_teacher(kind, folder / "teacher")
        lines = {"packing": "lines", "max_length": 24, "block_sequences": 16}
        corpus = build_corpus_of(random_texts(160), folder, teacher, **lines)
        relations = {} if kind in WITHOUT_RELATIONS else {"relation_layer": -1}
        run_stage_one(folder / "cache", corpus, teacher, **EXACT, top_k=4, **relations)
        return open_model(teacher), folder / "cache"

    return make


def losses(cache, student):
    """Mean loss terms of an epoch in training mode, its batches shuffled and in part padded."""
    alpha_rel = float(cache.encoding.relation is not None)
    model, batches = in_losses(
        cache, student, signal="replay+topk", batch_size=8, streams=1, alpha_rel=alpha_rel
    )
    model.train()
    total, count, padded = torch.zeros(5), 0, False
    for k in range(batches.steps_per_epoch):
        batch = batches[k]
        loss, sums = model(batch, count_positions(batch))
        total, count = total + sums, count + len(batch["masked_index"])
        padded |= bool((batch["attention_mask"] == 0).any())
    assert padded
    loss.backward()  # Ranks that train together wait for the gradient of every parameter.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    ce, mlm, cos, _, rel = (total / count).tolist()
    return {"ce": ce, "mlm": mlm, "cos": cos, "rel": rel}


@pytest.mark.parametrize(("kind", "choice"), STUDENTS)
def test_a_student_with_all_layers_is_its_teacher(made, kind, choice, tmp_path):
    """Copied, trained against the cache, exported: the teacher's own logits, and no loss."""
    teacher, folder = made(kind)
    cache = Cache.open(folder)
    student = build(cache, "3x32", family=choice)
    assert (student.config.model_type == kind) == (kind != "bert" or choice == "teacher")
    found = losses(cache, student)
    assert abs(found["ce"]) < 1e-5
    assert abs(found["cos"]) < 1e-5
    assert abs(found["rel"]) < 1e-5
    assert found["mlm"] > 1.0

    facts = CardFacts(
        name="3x32", role="student", cache_fingerprint="0", train=TrainConfig(), settings={},
        figures={},
    )  # fmt: skip
    export_model(student, tokenizer_dir=cache.teacher_dir, out=tmp_path / "out", facts=facts)
    opener = AutoModelForMaskedLM if kind != "xlnet" else transformers.XLNetLMHeadModel
    opened, info = opener.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(opened) is type(student)
    same_logits(opened, teacher)
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", cache.teacher_dir)]
    text = random_texts(1, seed=3)[0]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


@pytest.mark.parametrize("kind", FAMOUS)
def test_a_step_over_a_sample_of_the_vocabulary(made, kind, monkeypatch):
    _, folder = made(kind)
    cache = Cache.open(folder)
    monkeypatch.setattr(vocabulary, "LEAST", cache.encoding.vocab_size // 2)
    student = build(cache, "1x32")
    same_over_a_sample(*in_losses(cache, student, signal="replay", batch_size=2, streams=1))


def test_a_flaubert_with_norms_first_that_others_made_trains(made, tmp_path):
    """transformers 5 by itself cannot run it."""
    _, folder = made("bert")
    cache = Cache.open(folder)
    config = transformers.FlaubertConfig(
        vocab_size=cache.encoding.vocab_size, emb_dim=32, n_layers=1, n_heads=2, pre_norm=True
    )
    student = transformers.FlaubertWithLMHeadModel(config)
    with pytest.raises(TypeError, match="not subscriptable"):
        student(torch.arange(5, 9)[None])
    module, batches = in_losses(cache, student, signal="replay", batch_size=2, streams=1)
    loss, _ = module(batches[0], count_positions(batches[0]))
    assert loss.isfinite()
    facts = CardFacts(
        name="1x32", role="student", cache_fingerprint="0", train=TrainConfig(), settings={},
        figures={},
    )  # fmt: skip
    export_model(student, tokenizer_dir=cache.teacher_dir, out=tmp_path, facts=facts)
    assert "transformers 5 by itself does not" in (tmp_path / "README.md").read_text()


def measured(folder, student):
    """A cache's teacher and a student side by side."""
    teacher = ModelEntry("teacher", "teacher", Cache.open(folder).teacher_dir)
    return evaluate_models(
        [teacher, ModelEntry(student.name, "student", student)],
        folder.parent / "corpus",
        MaskingConfig(probability=0.3),
        EvaluateConfig(sequences=8, latency_repeats=1),
        device="cpu",
        dtype="float32",
    )


@pytest.mark.parametrize(("kind", "choice"), STUDENTS)
def test_a_shallower_student_trains(made, kind, choice, tmp_path):
    _, folder = made(kind)
    out = tmp_path / "2x32"
    figures = train_student(
        cache_dir=folder,
        out=out,
        size="2x32",
        student=StudentConfig(sizes=("2x32",), family=choice),
        # The labels' loss would pull away from a teacher that knows nothing.
        train=TrainConfig(steps=20, batch_size=16, lr=3e-3, logging_steps=2, alpha_mlm=0.0),
        device="cpu",
        dtype="bfloat16",
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for term in ("ce", "cos"):
        start, end = (sum(x[term] for x in part) / 2 for part in (lines[:2], lines[-2:]))
        assert end < start
    config = json.loads((out / "config.json").read_text())
    own = "distilbert" if (kind, choice) == ("bert", "usual") else kind
    assert config["model_type"] == own
    assert {name: config.get(name) for name in ("num_hidden_layers", "n_layers", "n_layer")}[
        {"distilbert": "n_layers", "xlnet": "n_layer"}.get(own, "num_hidden_layers")
    ] == 2
    model = open_model(out)
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]

    first, second = measured(folder, out)["models"]
    assert abs(first["teacher_kl"]) < 1e-6
    assert second["teacher_kl"] > 0
    assert second["params"] <= first["params"]


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "xlm-roberta", "mobilebert", "modernbert", "eurobert", "xlnet"]
)
def test_a_student_with_fewer_ids(made, kind, tmp_path):
    """It starts as its teacher over its ids, trains, is measured, and opens everywhere."""
    teacher, folder = made(kind)
    cache, out = Cache.open(folder), tmp_path / "3x32"
    trimmed = trimmed_ids(cache, 0.85)
    assert len(trimmed) < cache.encoding.vocab_size - 5
    own = StudentConfig(sizes=("3x32",), vocabulary=0.85)
    student = build_student(
        size="3x32", student=own, seed=0, encoding=cache.encoding, teacher_dir=cache.teacher_dir,
        trimmed=trimmed,
    )  # fmt: skip
    kept = torch.from_numpy(trimmed.old_n)
    ids = torch.randint(5, len(kept), (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = student.eval()(ids).logits, teacher(kept[ids]).logits[..., kept]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    train_student(
        cache_dir=folder, out=out, size="3x32", student=own, device="cpu", dtype="float32",
        train=TrainConfig(steps=2, batch_size=16, logging_steps=2, signal="replay+topk"),
    )  # fmt: skip
    model, opened = open_model(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(opened) == len(trimmed)
    before = Tokenizer.from_file(str(cache.teacher_dir / "tokenizer.json"))
    after, grown = Tokenizer.from_file(str(out / "tokenizer.json")), 0
    for text in random_texts(20, seed=3):
        plain = after.encode(text)
        assert opened(text)["input_ids"] == plain.ids
        assert after.decode(plain.ids) == before.decode(before.encode(text).ids)
        grown += len(plain.ids) - len(before.encode(text).ids)
    assert grown > 5
    found = measured(folder, out)
    first, second = found["models"]
    assert abs(first["teacher_kl"]) < 1e-6
    assert second["fertility"] > first["fertility"] == 1
    assert found["heldout"]["common_ids"] == second["vocabulary"] == len(trimmed)
    assert found["heldout"]["compared_share"] < 1


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_come_from_the_picked_ones(made, kind):
    teacher, folder = made(kind)
    student = build(Cache.open(folder), "2x32")
    theirs, ours = (
        next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        for model in (teacher, student)
    )
    pairs = {"albert": [(0, 0)], "modernbert": [(0, 0), (1, 1)]}.get(kind, [(0, 1), (1, 2)])
    for i, picked in pairs:
        for (name, a), (_, b) in zip(
            ours[i].named_parameters(), theirs[picked].named_parameters(), strict=True
        ):
            assert torch.equal(a, b), name
    if kind == "deberta-v2":  # a list as long as there may be layers, and none of layers
        assert student.config.pos_att_type == ["p2c", "c2p"]
    if kind == "modernbert":
        assert student.config.layer_types == ["full_attention", "sliding_attention"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The cache of a ModernBERT of 7 layers: every third sees all of a text, as published."""
    folder = tmp_path_factory.mktemp("deep")
    teacher = save_teacher("modernbert", folder / "teacher", layers=7, global_attn_every_n_layers=3)
    lines = {"packing": "lines", "max_length": 24, "block_sequences": 16}
    corpus = build_corpus_of(random_texts(60), folder, teacher, **lines)
    run_stage_one(folder / "cache", corpus, teacher, **EXACT)
    return folder / "cache"


def test_a_modernberts_student_keeps_the_published_order(deep, capsys):
    cache = Cache.open(deep)
    far, near = "full_attention", "sliding_attention"
    assert config_in(cache.teacher_dir).layer_types == [far, near, near, far, near, near, far]
    for size, named in (("4x32", (0, 2, 4, 6)), ("5x32", (0, 2, 4, 6))):
        student = build(cache, size)
        types = student.config.layer_types
        assert types == [near if at % 3 else far for at in range(len(types))], (size, named)
        written = json.loads(config_json(student))
        assert written["global_attn_every_n_layers"] == 3
    assert "evenly apart" not in capsys.readouterr().err
    # Runs that were begun before go on with the layers that they have.
    student = StudentConfig(sizes=("4x32",))
    old = student_config("4x32", student, cache.encoding, config_in(cache.teacher_dir), old=True)
    assert old.layer_types == [far, near, near, far]
    build(cache, "3x32", init_layers=(0, 3, 5))
    assert "layers [0, 1] have global attention, which are not evenly" in capsys.readouterr().err


def test_weights_of_another_order_are_not_gone_on_with(deep, tmp_path):
    train = {"steps": 2, "batch_size": 4, "save_steps": 1, "report_to": ()}
    cache = open_cache(deep)
    for named in ((0, 1, 2), (0, 3, 5)):
        student = start_student(cache, "3x32", init_layers=named)
        trainer = CachedDistillationTrainer(
            student, train_dataset=cache, output_dir=tmp_path, device="cpu", **train
        )
        if named == (0, 1, 2):
            trainer.train()
    with pytest.raises(UserError, match="student with the same order of attention"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-1"))


@pytest.mark.parametrize(("size", "named"), [("2x32", (0, 0)), ("5x32", ())])
def test_modernberts_first_layer_may_stand_elsewhere(made, size, named):
    """It has no norm before its attention, which all others have."""
    teacher, folder = made("modernbert")
    layer = build(Cache.open(folder), size, init_layers=named).model.layers[1]
    first = teacher.model.layers[0].state_dict()
    found = layer.state_dict()
    assert torch.equal(found.pop("attn_norm.weight"), torch.ones(32))
    assert found.keys() == first.keys()
    assert all(torch.equal(found[name], first[name]) for name in first)


def test_modernberts_other_layers_may_not_come_first(made):
    _, folder = made("modernbert")
    with pytest.raises(UserError, match=r"init_layers must begin with 0 .* got \[2, 0\]"):
        build(Cache.open(folder), "2x32", init_layers=(2, 0))


def test_dropout_is_the_students_in_all_of_its_layers_and_no_layer_is_dropped():
    """Whatever the teacher's is, 0 too; task heads keep theirs."""
    teacher = BartConfig(
        encoder_layerdrop=0.3, decoder_layerdrop=0.2, d_model=32, dropout=0.1,
        attention_dropout=0.0, activation_dropout=0.0, classifier_dropout=0.3,
    )  # fmt: skip
    shape = Shape(layers=2, width=32, heads=2, ffn=128)
    values = student_values(teacher, shape, 0.2, [0, 1])
    assert values["encoder_layerdrop"] == values["decoder_layerdrop"] == 0
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        assert values[name] == 0.2
    assert values["classifier_dropout"] == 0.3


def test_dropout_and_proportions(made):
    cache = Cache.open(made("electra")[1])
    student = build(cache, "1x64", init="random", dropout=0.2)
    assert (student.config.hidden_size, student.config.intermediate_size) == (64, 96)
    assert student.config.hidden_dropout_prob == student.config.attention_probs_dropout_prob == 0.2
    assert build(cache, "1x64", init="random", ffn=80).config.intermediate_size == 80
    wider = build(Cache.open(made("mobilebert")[1]), "1x64", init="random")
    assert (wider.config.hidden_size, wider.config.intra_bottleneck_size) == (64, 16)
    with pytest.raises(UserError, match=r"size must be one that a model of type 'mobilebert' can"):
        build(Cache.open(made("mobilebert")[1]), "1x8", init="random")


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2", "bart", "mbart", "mvp"])
def test_narrower_configurations_make_models_of_tasks(kind):
    """DeBERTa's pooler, and decoders, have sizes of their own."""
    config = make_model(kind, 120, layers=3).config
    shape = replace(shape_of(config), width=16, heads=1, ffn=24, layers=2)
    made = type(config)(**student_values(config, shape, 0.0, [0, 2]))
    ids_BL = torch.arange(5, 14)[None]
    ids_BL[:, -1] = 2
    assert AutoModelForSequenceClassification.from_config(made)(ids_BL).logits.isfinite().all()
    if kind in ("bart", "mbart", "mvp"):
        assert (made.decoder_attention_heads, made.decoder_ffn_dim) == (1, 24)
