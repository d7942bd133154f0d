"""Every type of masked LM that transformers has: from its cache to a student that opens everywhere.

The truth is the model itself, of random weights, as plain transformers runs it. Exported students
are opened in one process that knows nothing of this project.
"""

import functools
import json
import re

import numpy as np
import pytest
import torch

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.stages.models.encoder import model_class
from distilcache.stages.models.families import family_of, fewer_in_blocks, has_relations, max_length
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.export import CardFacts, export_model
from distilcache.stages.student_train.model import TERMS
from distilcache.stages.student_train.signals import count_positions
from distilcache.stages.teacher_cache.teacher import load_teacher
from tests.builders import build_corpus_of, random_texts, run_stage_one
from tests.command_line import run_alone
from tests.stages.models.families_support import (
    EVEN,
    REFUSED,
    WORKING,
    open_model,
    plain_outputs,
    same_logits,
    save_teacher,
)
from tests.stages.student_train.model_support import EXACT, build, in_losses

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
OPEN = """
import gc, json, sys
gc.disable()
import torch, transformers
found = {}
for kind, folder in json.load(open(sys.argv[1])).items():
    config = transformers.AutoConfig.from_pretrained(folder)
    ids = torch.arange(16).view(2, 8) + 20
    outputs, missing = [], []
    names = ["AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"]
    if kind == "xlnet":
        names[1] = "XLNetLMHeadModel"
    for name in names:
        opener = getattr(transformers, name)
        mapping = getattr(opener, "_model_mapping", None)
        if mapping is not None and type(config) not in mapping:
            continue
        model, info = opener.from_pretrained(folder, output_loading_info=True)
        encoder = model.base_model
        missing += [n for n in info["missing_keys"] if "pooler" not in n and (
            model is encoder or n.startswith(model.base_model_prefix + ".")
            or name == "AutoModelForMaskedLM")]
        with torch.no_grad():
            states = encoder.eval()(ids).last_hidden_state
        if states.shape[1] == ids.shape[1]:  # Funnel's classifier has the pooled half alone
            outputs.append(states)
    found[kind] = {
        "missing": missing,
        "openers": len(outputs),
        "difference": max(float((x - outputs[0]).abs().max()) for x in outputs),
        "states": outputs[0].tolist(),
    }
json.dump(found, open(sys.argv[2], "w"))
"""


class Made:
    """A teacher, its exact cache, and an exported student with all of its layers."""

    def __init__(self, kind, folder, **more):
        self.folder = folder
        teacher = save_teacher(kind, folder / "teacher", **more)
        packing = {"packing": "blocks" if kind in EVEN else "lines"}
        sizes = {"max_length": 24, "block_sequences": 16}
        corpus = build_corpus_of(random_texts(60), folder, teacher, **packing, **sizes)
        self.teacher = open_model(teacher)
        relations = {"relation_layer": -1} if has_relations(self.teacher.config) else {}
        run_stage_one(folder / "cache", corpus, teacher, **EXACT, **relations, top_k=4)
        self.cache = Cache.open(folder / "cache")
        size = f"{self.teacher.config.num_hidden_layers}x32"
        self.student = build(self.cache, size, family="teacher")
        facts = CardFacts(
            name="3x32", role="student", cache_fingerprint="0", train=TrainConfig(), settings={},
            figures={},
        )  # fmt: skip
        export_model(
            self.student, tokenizer_dir=self.cache.teacher_dir, out=self.exported, facts=facts
        )

    @property
    def exported(self):
        out = self.folder / "exported"
        out.mkdir(exist_ok=True)
        return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return functools.cache(lambda kind: Made(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def opened(made, tmp_path_factory):
    """What a process without this project finds in the exported students."""
    folder = tmp_path_factory.mktemp("opened")
    folders = {}
    for kind in WORKING:
        try:
            folders[kind] = str(made(kind).exported)
        except Exception:  # this type's own tests say why
            continue
    (folder / "in.json").write_text(json.dumps(folders))
    run_alone(OPEN, folder / "in.json", folder / "out.json", cwd=folder)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("kind", WORKING)
def test_cache_holds_the_models_own_logits(made, kind):
    lengths = holds_its_logits(made(kind))
    assert (len(set(lengths)) > 1) == (kind not in EVEN)


def holds_its_logits(made):
    """Compares a block with the model itself, sequence by sequence; returns the lengths."""
    cache, head = made.cache, made.cache.teacher.lm_head()
    columns = cache.read_block(0)
    starts = np.cumsum(columns["lengths"].astype(np.int64))[:-1]
    masks = np.cumsum(columns["masked_counts"].astype(np.int64))[:-1]
    parts = zip(
        np.split(columns["input_ids"].astype(np.int64), starts),
        np.split(columns["masked_positions"].astype(np.int64), masks),
        strict=True,
    )
    truth = torch.cat([plain_outputs(made.teacher, ids, rows.tolist())[0] for ids, rows in parts])
    states = torch.from_numpy(columns[f"hidden_{cache.encoding.num_layers}"].copy())
    torch.testing.assert_close(head(states.view(len(truth), -1)), truth, **CLOSE)
    assert truth.std() > 0.3
    return columns["lengths"].tolist()


@pytest.mark.parametrize("kind", WORKING)
def test_types_that_do_not_run_in_bfloat16_are_known(made, kind):
    folder, ids_BL = str(made(kind).folder / "teacher"), torch.arange(24).view(1, 24) + 20
    try:
        load_teacher(folder, torch.device("cpu"), torch.bfloat16)  # autocast
        with torch.no_grad():
            open_model(folder).to(torch.bfloat16)(ids_BL)  # and weights of that type, as for speed
        runs = True
    except (UserError, RuntimeError) as error:
        if not re.search("must run in bfloat16|BFloat16", str(error)):
            raise
        runs = False
    assert runs == family_of(made(kind).teacher.config).bfloat16


@pytest.mark.parametrize("kind", WORKING)
def test_a_student_with_all_layers_is_its_teacher(made, kind):
    student = made(kind).student
    same_logits(student, made(kind).teacher, padded=kind not in EVEN)
    alpha_rel = float(made(kind).cache.encoding.relation is not None)
    model, batches = in_losses(
        made(kind).cache, student, signal="replay+topk", batch_size=8, streams=1,
        alpha_rel=alpha_rel,
    )  # fmt: skip
    batch = batches[0]
    counts = count_positions(batch)
    loss, sums = model.train()(batch, counts)
    for term in ("ce", "cos", "rel"):
        assert abs(float(sums[TERMS.index(term)])) / counts[term] < 1e-5, term
    loss.backward()  # Ranks that train together wait for the gradient of every parameter.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", WORKING)
def test_half_a_student_has_layers_of_its_teacher(made, kind):
    student = build(made(kind).cache, "2x32", family="teacher")
    assert sum(p.numel() for p in student.parameters()) < sum(
        p.numel() for p in made(kind).teacher.parameters()
    ) or kind in ("albert", "squeezebert")
    name = next(n for n, m in student.named_modules() if isinstance(m, torch.nn.ModuleList))
    layers, picked = student.get_submodule(name), made(kind).teacher.get_submodule(name)
    # The last layer of the first half; a ModernBERT starts from its first, which has no norm.
    place = 0 if kind == "modernbert" else (len(picked) + 1) // 2 - 1
    first, source = layers[0].state_dict(), picked[place].state_dict()
    assert first
    assert all(torch.equal(tensor, source[name]) for name, tensor in first.items())
    model, batches = in_losses(made(kind).cache, student, batch_size=8, streams=1)
    loss, _ = model(batches[0], count_positions(batches[0]))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", WORKING)
def test_exported_students_open_everywhere(opened, made, kind):
    found = opened[kind]
    assert found["missing"] == []
    assert found["openers"] >= 2
    assert found["difference"] < 1e-5
    with torch.no_grad():
        encoder = made(kind).teacher.base_model
        wanted = encoder(torch.arange(16).view(2, 8) + 20).last_hidden_state
    torch.testing.assert_close(torch.tensor(found["states"]), wanted, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("bert", {"layers": 1}),
        ("bert", {"tie_word_embeddings": False}),
        ("bart", {"decoder_layers": 2, "tie_word_embeddings": False}),
        ("funnel", {"block_sizes": [1, 3]}),
        ("longformer", {"attention_window": [64, 64, 64]}),
        ("esm", {"position_embedding_type": "absolute", "token_dropout": False}),
        ("deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        ("eurobert", {"num_key_value_heads": 1, "num_attention_heads": 4, "head_dim": 8}),
        ("modernbert", {"classifier_bias": True, "norm_bias": True, "decoder_bias": False}),
        ("luke", {"tie_word_embeddings": False}),
        ("rembert", {"tie_word_embeddings": False}),
        ("xlm", {"sinusoidal_embeddings": True}),
    ],
)
def test_odd_configurations(kind, more, tmp_path):
    odd = Made(kind, tmp_path, **more)
    holds_its_logits(odd)
    same_logits(odd.student, odd.teacher, padded=kind not in EVEN)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("bert", {"hidden_act": "mish"}, "must use one of the activations gelu, .* another one in"),
        ("bert", {"layers": 0}, "must have a layer at least"),
        ("nystromformer", {"segment_means_seq_len": 24}, "must take sequences of any length"),
        ("yoso", {"use_expectation": False}, "must run on a few tokens"),
    ],
)
def test_odd_configurations_are_refused_with_their_reason(kind, more, words, tmp_path):
    teacher = save_teacher(kind, tmp_path, **more)
    with pytest.raises(UserError, match=words) as refusal:
        load_teacher(str(teacher), torch.device("cpu"), torch.float32)
    assert "\n" not in str(refusal.value)


def test_states_that_a_model_does_not_have_at_each_position_are_refused(made, tmp_path):
    """The second of Funnel's blocks sees pooled sequences."""
    teacher = save_teacher("funnel", tmp_path / "teacher", block_sizes=[1, 2])
    corpus = made("funnel").folder / "corpus"
    with pytest.raises(UserError, match="hidden_layers must be -1 for a teacher of type 'funnel'"):
        run_stage_one(tmp_path / "cache", corpus, teacher, **EXACT, hidden_layers=(2, -1))


def test_layers_of_blocks_are_shared_out():
    assert fewer_in_blocks([4, 4, 4], 6) == [2, 2, 2]
    assert fewer_in_blocks([1, 3], 4) == [1, 3]
    assert fewer_in_blocks([1, 3], 3) == [1, 2]
    assert fewer_in_blocks([1, 1], 2) == [1, 1]
    with pytest.raises(UserError, match="layers must be one at least for each of the teacher's 2"):
        fewer_in_blocks([1, 3], 1)


@pytest.mark.parametrize("kind", EVEN)
def test_padding_is_refused_where_it_changes_what_a_model_says(made, kind, tmp_path):
    teacher = made(kind).folder / "teacher"
    corpus = build_corpus_of(random_texts(30), tmp_path, teacher, packing="lines", max_length=24)
    with pytest.raises(UserError, match=f"packing must be .blocks. for .* type {kind!r}"):
        run_stage_one(tmp_path / "cache", corpus, teacher, **EXACT)


@pytest.mark.parametrize("kind", REFUSED)
def test_the_rest_is_refused_with_its_reason(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"must not be of type '{kind}', whose signals .*: "):
        load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)


def test_a_model_without_masks_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="must be a masked LM that transformers knows.*'gpt2'"):
        load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)


def test_big_bird_is_taken_as_far_as_its_attention_is_full(made):
    config = made("big_bird").teacher.config
    assert model_class(config).__name__ == "AutoModelForMaskedLM"
    assert max_length(config) == min(40, (5 + 2 * config.num_random_blocks) * config.block_size)
