"""Student architecture and initialisation."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForMaskedLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from distilcache.data.cache.schema import Encoding
from distilcache.data.errors import UserError
from distilcache.stages.models.encoder import from_config
from distilcache.stages.models.families import Shape, student_values
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.student_train.layers import pick_layers
from distilcache.stages.student_train.narrow import low_rank
from distilcache.stages.student_train.student import build_student, student_config
from distilcache.stages.student_train.weights import check_start
from tests.stages.models.families_support import FAMOUS, make_model, same_logits

VOCABULARY = 50
ENCODING = Encoding(vocab_size=VOCABULARY, max_length=12, pad_id=3)


def make_teacher(folder, kind="bert", layers=4, **changes):
    own = CONFIG_MAPPING[kind].attribute_map
    names = ("hidden_size", "num_attention_heads", "max_position_embeddings")
    shape = {own.get(n, n): size for n, size in zip(names, (24, 3, 20), strict=True)}
    shape["hidden_dim" if kind == "distilbert" else "intermediate_size"] = 40
    teacher = make_model(kind, VOCABULARY, layers, pad_token_id=3, **shape, **changes)
    teacher.save_pretrained(folder)
    return teacher


def build(folder, size="2x24", seed=0, **student):
    return build_student(
        size=size,
        student=StudentConfig(**student),
        seed=seed,
        encoding=ENCODING,
        teacher_dir=folder,
    )


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (12, 6, [1, 3, 5, 7, 9, 11]),
        (6, 3, [1, 3, 5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (6, 4, [1, 2, 4, 5]),
        (12, 1, [0]),
        (12, 2, [5, 11]),
        (12, 4, [2, 5, 8, 11]),
        (24, 6, [3, 7, 11, 15, 19, 23]),
        (2, 4, [0, 0, 1, 1]),
    ],
)
def test_pick_layers(teacher, student, expected):
    assert pick_layers(teacher, student) == expected


@pytest.mark.parametrize("width", [24, 12])
def test_named_layers_are_those_of_the_teacher(tmp_path, width):
    """The middle ones, in another order: a teacher of just these layers gives the same student."""
    teacher = make_teacher(tmp_path)
    named = build(tmp_path, f"2x{width}", init_layers=(-2, 1))
    layers = teacher.bert.encoder.layer
    teacher.bert.encoder.layer = torch.nn.ModuleList([layers[2], layers[1]])
    teacher.config.num_hidden_layers = 2
    teacher.save_pretrained(tmp_path)
    plain = build(tmp_path, f"2x{width}")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, named.state_dict()[name]), name


@pytest.mark.parametrize(
    ("size", "layers", "said"),
    [
        ("2x24", (0, 1, 2), r"must name 2 layers .* from 0 to 3 .* got \[0, 1, 2\]"),
        ("2x24", (0, 4), r"must name 2 layers"),
        ("2x24", (0, -5), r"must name 2 layers"),
        ("2x48", (0, 1), r"must be left out where a student of size 2x48"),
    ],
)
def test_layers_that_the_teacher_lacks_are_refused(tmp_path, size, layers, said):
    make_teacher(tmp_path)
    with pytest.raises(UserError, match=f"student: init_layers {said}"):
        build(tmp_path, size, init_layers=layers)


@pytest.mark.parametrize("kind", ["albert", "funnel"])
def test_layers_that_are_not_one_each_are_refused(kind):
    """From the configuration alone, before stage one."""
    teacher = make_model(kind, VOCABULARY).config
    with pytest.raises(UserError, match=f"init_layers must be left out where layers .* '{kind}'"):
        student_config("2x32", StudentConfig(init_layers=(0, 1)), ENCODING, teacher)


@pytest.mark.parametrize("name", ["heads", "ffn"])
def test_sizes_below_0_are_refused(name):
    with pytest.raises(UserError, match=f"student: {name} must be at least 0, got -1"):
        StudentConfig(**{name: -1})


def test_layers_are_named_of_a_teacher_alone():
    with pytest.raises(UserError, match="init_layers must be left out .* init 'random'"):
        StudentConfig(init="random", init_layers=(0, 1))


@pytest.mark.parametrize("tied", [True, False])
def test_all_layers_reproduce_the_teacher(tmp_path, tied):
    teacher = make_teacher(tmp_path, tie_word_embeddings=tied, hidden_act="relu")
    student = build(tmp_path, "4x24")
    assert (student.config.n_heads, student.config.hidden_dim) == (3, 40)
    assert student.config.activation == "relu"
    assert student.config.pad_token_id == 3
    same_logits(student, teacher)


def test_a_bert_student_keeps_token_types(tmp_path):
    teacher = make_teacher(tmp_path)
    student = build(tmp_path, "4x24", family="teacher")
    assert isinstance(student, BertForMaskedLM)
    same_logits(student, teacher)
    ids = torch.arange(4, 16)[None]
    types = (ids > 9).long()
    with torch.inference_mode():
        theirs, ours = (
            m.eval()(input_ids=ids, token_type_ids=types).logits for m in (teacher, student)
        )
    torch.testing.assert_close(ours, theirs)
    half = build(tmp_path, "2x24", family="teacher")
    torch.testing.assert_close(
        half.bert.encoder.layer[1].output.dense.weight,
        teacher.bert.encoder.layer[3].output.dense.weight,
    )


def test_distilbert_teacher_reproduced(tmp_path):
    teacher = make_teacher(tmp_path, "distilbert", layers=2)
    same_logits(build(tmp_path, "2x24"), teacher)
    same_logits(build(tmp_path, "2x24", family="teacher"), teacher)


def test_every_other_layer_and_old_tensor_names(tmp_path):
    teacher = make_teacher(tmp_path, layers=4)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    student = build(tmp_path, "2x24")
    for i, layer in enumerate((1, 3)):
        torch.testing.assert_close(
            student.distilbert.transformer.layer[i].ffn.lin1.weight,
            teacher.bert.encoder.layer[layer].intermediate.dense.weight,
        )


def test_sharded_teacher(tmp_path):
    teacher = make_teacher(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    teacher.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    same_logits(build(tmp_path, "4x24"), teacher)


def test_a_wider_student_starts_at_random_and_says_so(tmp_path, capsys):
    make_teacher(tmp_path)
    student = build(tmp_path, "2x64")
    assert (student.config.n_heads, student.config.hidden_dim) == (2, 256)
    assert "start at random" in capsys.readouterr().err


def test_more_units_change_nothing_at_first(tmp_path, capsys):
    """The teacher's own function, in a student with room to learn more."""
    teacher = make_teacher(tmp_path)
    same_logits(build(tmp_path, "4x24", ffn=64), teacher)
    assert "40 of 40 feed-forward units and 24 of 24 directions" in capsys.readouterr().err


def test_silent_heads_and_units_are_dropped(tmp_path, capsys):
    """One head and half of the units write nothing: a student without them is the same."""
    teacher = make_teacher(tmp_path)
    with torch.no_grad():
        for layer in teacher.bert.encoder.layer:
            layer.attention.output.dense.weight[:, 8:16] = 0
            layer.output.dense.weight[:, ::2] = 0
    teacher.save_pretrained(tmp_path)
    student = build(tmp_path, "4x24", heads=2, ffn=20)
    assert (student.config.n_heads, student.config.hidden_dim) == (2, 20)
    same_logits(student, teacher)
    line = capsys.readouterr().err
    assert "4 layers, 2 of 3 heads, 20 of 40 feed-forward units" in line


def test_narrow_students_of_both_layouts(tmp_path, capsys):
    kinds = [("bert", "usual"), ("bert", "teacher"), ("roberta", "usual")]
    # Their LM head comes before the encoder, and so does its name of the word embeddings.
    for kind, family in (*kinds, ("xlm-roberta", "usual"), ("camembert", "usual")):
        make_teacher(tmp_path / kind, kind)
        student, again = (
            build(tmp_path / kind, "2x16", seed=s, heads=2, ffn=32, family=family) for s in (0, 1)
        )
        assert "16 of 24 directions" in capsys.readouterr().err
        for (name, a), b in zip(student.named_parameters(), again.parameters(), strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b), name  # nothing is left to the seed


def test_narrow_students_of_one_architecture_are_the_same(tmp_path):
    """Names come in another order in RoBERTa's kin; the weights are projected alike."""
    teachers = [make_teacher(tmp_path / kind, kind) for kind in ("roberta", "xlm-roberta")]
    teachers[1].load_state_dict(teachers[0].state_dict())
    teachers[1].save_pretrained(tmp_path / "xlm-roberta")
    ours, theirs = (
        build(tmp_path / kind, "2x16", heads=2, ffn=32).state_dict()
        for kind in ("roberta", "xlm-roberta")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_bert_of_another_epsilon_has_a_bert_for_student(tmp_path, capsys):
    """A DistilBERT's layer norms know no other than 1e-12."""
    teacher = make_teacher(tmp_path, layer_norm_eps=1e-2)
    student = build(tmp_path, "4x24")
    assert isinstance(student, BertForMaskedLM)
    same_logits(student, teacher)
    assert "layer_norm_eps is 0.01" in capsys.readouterr().err


def test_low_rank_is_the_truncated_svd():
    left, right = torch.randn(30, 6).double(), torch.randn(6, 20).double()
    u, s, v = torch.linalg.svd(left @ right, full_matrices=False)
    a, b = low_rank(left, right, 4)
    torch.testing.assert_close(a @ b, u[:, :4] * s[:4] @ v[:4])
    a, b = low_rank(left, right, 8)
    assert a.shape == (30, 6)
    torch.testing.assert_close(a @ b, left @ right)


@pytest.mark.shared_data
def test_a_narrow_student_begins_nearer_to_a_real_teacher(shared):
    folder = shared / "teacher"
    encoding = Encoding(vocab_size=30522, max_length=64, pad_id=0)
    teacher = BertForMaskedLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The capital of [MASK] is the city of Paris, where the [MASK] of the country sits."
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    gaps = {}
    for init in ("teacher", "random"):
        student = build_student(
            size="3x192",
            student=StudentConfig(init=init),
            seed=0,
            encoding=encoding,
            teacher_dir=folder,
        ).eval()
        with torch.inference_mode():
            p, q = (m(**inputs).logits.log_softmax(-1) for m in (teacher, student))
        gaps[init] = float((p.exp() * (p - q)).sum(-1).mean())
    assert gaps["teacher"] < gaps["random"]


def test_well_known_sizes():
    parse = StudentConfig().parse
    assert parse("tiny") == Shape(layers=2, width=128, heads=2, ffn=512)
    assert parse("Medium") == Shape(layers=8, width=512, heads=8, ffn=2048)
    assert parse("distilbert") == parse("6x768")
    assert parse("base", heads=8, ffn=100) == Shape(layers=12, width=768, heads=8, ffn=100)
    assert StudentConfig(heads=4).parse("tiny").heads == 4
    with pytest.raises(UserError, match=r"LAYERSxWIDTH or be one of tiny, mini, .* got 'huge'"):
        parse("huge")


def test_seed_decides_random_weights_and_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    states = [build(tmp_path, "2x32", seed=seed, init="random").state_dict() for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    name = "distilbert.transformer.layer.0.ffn.lin1.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_without_teacher_the_encoding_decides(tmp_path):
    config = build(tmp_path, "1x32", init="random", dropout=0.2).config
    assert (config.vocab_size, config.max_position_embeddings) == (VOCABULARY, 12)
    assert config.pad_token_id == 3
    assert config.dropout == config.attention_dropout == 0.2


def others(value):
    """Another value of a field, or several."""
    if isinstance(value, dict):
        return [{k: (others(v) or [v])[0] for k, v in value.items()}]
    if isinstance(value, list):
        return [value[::-1], value[:1] * len(value)]
    if isinstance(value, bool) or value is None:
        return [not value]
    if isinstance(value, str):
        return ["relu", "gelu", "absolute"]
    return [3 * value + 0.01] if isinstance(value, float) else [2 * value or 3, value + 1]


@torch.no_grad()
@pytest.mark.parametrize("kind", [*FAMOUS, "esm", "roberta-prelayernorm", "mbart"])
def test_a_start_that_computes_otherwise_is_refused(kind, tmp_path):
    """Each field by which models of the same weights say something else, found by trying them."""
    model = make_model(kind, 60)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[0, :3], ids[1, 9:] = torch.tensor([3, 4, 5]), 0
    wanted, weights, values = model(ids).logits, model.state_dict(), model.config.to_dict()
    check_start(model.config, tmp_path, with_ids=True)
    found = set()
    for name, value in values.items():
        for other in others(value) if name != "model_type" else ():
            try:
                changed = from_config(type(model.config)(**values | {name: other})).eval()
                changed.load_state_dict(weights)
                logits = changed(ids).logits
            except Exception:  # no such model, or of other weights
                continue
            if torch.allclose(logits, wanted, rtol=1e-4, atol=1e-4):
                continue
            found.add(name)
            with pytest.raises(UserError, match="must have the student's"):
                check_start(changed.config, tmp_path, with_ids=True)
    assert len(found) >= 2
    assert kind in ("distilbert", "mbart") or any(name.endswith("_eps") for name in found)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("bert", "layer_norm_eps", 1e-5),
        ("bert", "hidden_act", "relu"),
        ("deberta-v2", "position_buckets", 5),
        ("modernbert", "layer_types", ["full_attention", "full_attention", "sliding_attention"]),
        ("modernbert", "local_attention", 16),
        ("roberta", "pad_token_id", 1),
        ("esm", "position_embedding_type", "absolute"),
        ("esm", "mask_token_id", 5),
    ],
)
def test_the_field_in_which_a_start_differs_is_named(kind, field, value, tmp_path):
    model = make_model(kind, 60)
    model.save_pretrained(tmp_path)
    changed = type(model.config)(**model.config.to_dict() | {field: value})
    with pytest.raises(UserError, match=re.escape(f"must have the student's {field} {value!r}, ")):
        check_start(changed, tmp_path, with_ids=True)


def test_a_start_may_have_been_trained_otherwise(tmp_path):
    model = make_model("bert", 60)
    model.save_pretrained(tmp_path)
    changes = {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2, "initializer_range": 0.5,
               "pad_token_id": 7, "bos_token_id": None, "use_cache": False, "architectures": ["X"],
               "id2label": {0: "a"}, "dtype": "float16", "its_own": 3}  # fmt: skip
    changed = type(model.config)(**model.config.to_dict() | changes)
    check_start(changed, tmp_path, with_ids=True)
    changed.vocab_size = 61
    check_start(changed, tmp_path, with_ids=False)
    with pytest.raises(UserError, match="vocab_size 61, got 60"):
        check_start(changed, tmp_path, with_ids=True)


def test_checkpoint_as_start(tmp_path):
    make_teacher(tmp_path)
    first = build(tmp_path, "2x24")  # as wide as the teacher, so with its heads and FFN
    first.save_pretrained(tmp_path / "first")
    again = build(tmp_path, "2x24", init=str(tmp_path / "first"))
    assert (again.config.n_heads, again.config.hidden_dim) == (3, 40)
    (tmp_path / "config.json").unlink()
    start = build(tmp_path, "2x32", seed=7, init="random")
    start.save_pretrained(tmp_path / "start")
    again = build(tmp_path, "2x32", seed=0, init=str(tmp_path / "start"))
    same_logits(start, again)
    with pytest.raises(UserError, match=r"n_layers 3, got 2"):
        build(tmp_path, "3x32", init=str(tmp_path / "start"))
    with pytest.raises(UserError, match=r"init must be 'teacher', 'random' or a folder"):
        build(tmp_path, "3x32", init=str(tmp_path / "absent"))


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"student\.init=random"):
        build(tmp_path, "2x24")
    with pytest.raises(UserError, match=r"family must be 'usual' where the cache holds no teacher"):
        build(tmp_path, "2x24", family="teacher", init="random")
    with pytest.raises(UserError, match=r"family must be one of usual, teacher, got 'bert'"):
        StudentConfig(family="bert")
    make_teacher(tmp_path)
    with pytest.raises(UserError, match=r"width must be divisible by the attention heads"):
        StudentConfig().parse("3x100")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"got none .*student\.init=random"):
        build(tmp_path, "2x24")


def test_what_a_configuration_lists_by_layer_follows_the_layers(tmp_path):
    """And no other list, of whatever length."""
    model = make_model("longformer", VOCABULARY, 3, attention_window=[4, 8, 6])
    kept = student_values(model.config, Shape(layers=2, width=32, heads=2, ffn=48), 0.0, [0, 2])
    assert kept["attention_window"] == [4, 6]
    deberta = make_model(
        "deberta", VOCABULARY, 2, relative_attention=True, pos_att_type=["p2c", "c2p"]
    )
    kept = student_values(deberta.config, Shape(layers=1, width=32, heads=2, ffn=48), 0.0, [0])
    assert kept["pos_att_type"] == ["p2c", "c2p"]
