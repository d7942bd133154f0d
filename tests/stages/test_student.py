"""Student architecture and initialisation."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from data.errors import UserError
from data.schema import Encoding
from stages.student_train.config import StudentConfig
from stages.student_train.student import build_student, pick_layers

VOCABULARY = 50
ENCODING = Encoding(vocab_size=VOCABULARY, max_length=12, pad_id=3)


def make_teacher(folder, layers=4, **changes):
    torch.manual_seed(1)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 20,
        "hidden_act": "relu",
        "initializer_range": 0.5,
        "pad_token_id": 3,
        **changes,
    }
    teacher = BertForMaskedLM(BertConfig(**values)).eval()
    torch.nn.init.normal_(teacher.cls.predictions.bias)
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


def same_logits(a, b):
    ids = torch.randint(4, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.inference_mode():
        left = a.eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        right = b.eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),
        (6, 3, [0, 2, 5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (12, 1, [0]),
        (12, 2, [0, 11]),
        (12, 3, [0, 5, 11]),
        (12, 4, [0, 4, 7, 11]),
        (24, 6, [0, 5, 9, 14, 18, 23]),
    ],
)
def test_pick_layers(teacher, student, expected):
    assert pick_layers(teacher, student) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_all_layers_reproduce_the_teacher(tmp_path, tied):
    teacher = make_teacher(tmp_path, tie_word_embeddings=tied)
    student = build(tmp_path, "4x24")
    assert (student.config.n_heads, student.config.hidden_dim) == (3, 40)
    assert student.config.activation == "relu"
    assert student.config.pad_token_id == 3
    same_logits(student, teacher)


def test_distilbert_teacher_reproduced(tmp_path):
    torch.manual_seed(1)
    config = DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=24,
        n_layers=2,
        n_heads=3,
        hidden_dim=40,
        max_position_embeddings=20,
        pad_token_id=3,
        initializer_range=0.5,
    )
    teacher = DistilBertForMaskedLM(config)
    teacher.save_pretrained(tmp_path)
    same_logits(build(tmp_path, "2x24"), teacher)


def test_every_other_layer_and_old_tensor_names(tmp_path):
    teacher = make_teacher(tmp_path, layers=4)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for n in tensors
    }
    renamed = dict(zip(sorted(old), sorted(old), strict=True))
    assert any("gamma" in n for n in renamed)
    save_file(
        {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): t
            for n, t in tensors.items()
        },
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    student = build(tmp_path, "2x24")
    for i, layer in enumerate((0, 3)):
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


def test_other_width_starts_at_random_and_says_so(tmp_path, capsys):
    make_teacher(tmp_path)
    student = build(tmp_path, "2x64")
    assert (student.config.n_heads, student.config.hidden_dim) == (2, 256)
    assert "start at random" in capsys.readouterr().err


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


def test_checkpoint_as_start(tmp_path):
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
    make_teacher(tmp_path)
    with pytest.raises(UserError, match=r"heads must be the teacher's 3 .* got 4"):
        build(tmp_path, "2x24", heads=4)
    with pytest.raises(UserError, match=r"ffn must be the teacher's 40 .* got 96"):
        build(tmp_path, "2x24", ffn=96)
    with pytest.raises(UserError, match=r"width must be divisible by the attention heads"):
        StudentConfig().parse("3x100")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights must be safetensors .*student\.init=random"):
        build(tmp_path, "2x24")
