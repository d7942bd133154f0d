"""The stages on a device that is not the CPU: what they compute, and when the host waits for it."""

import copy
import json

import numpy as np
import pytest
import torch

from distilcache import CachedDistillationTrainer, build_student, open_cache
from distilcache.data.cache.cache import Cache
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.evaluate.config import EvaluateConfig
from distilcache.stages.evaluate.run import ModelEntry, evaluate_models
from distilcache.stages.models.encoder import RowEncoder
from distilcache.stages.models.families import FAMILIES, Family
from distilcache.stages.student_train import vocabulary
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.model import TERMS
from distilcache.stages.student_train.run import train_student
from distilcache.stages.student_train.trainer import DistillationTrainer
from distilcache.stages.teacher_cache import pipeline
from distilcache.stages.verify.rerun import RerunSettings, rerun
from tests import second_device
from tests.builders import run_stage_one, save_random_bert
from tests.stages.models.families_support import WORKING, make_model

pytestmark = pytest.mark.skipif(not second_device.THERE, reason="needs a newer torch")
STEPS = 5
RELATIONS = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 5.0, "alpha_rel": 1.0}
STUDENTS = {
    "default": ({}, {}),
    "accumulated": ({}, {"accumulation": 2, "alpha_mse": 0.1, "vocabulary_fraction": 1.0}),
    "sampled, wider codes": ({"hidden_quality": 1e-4}, {"vocabulary_fraction": 0.5}),
    "sparse": ({}, {"signal": "sparse", "alpha_cos": 0.0}),
    "drawn": ({"residual_samples": 8, "positions": "masked+0.3"}, {"signal": "replay+residual"}),
    "everywhere": ({"positions": "all", "hidden_dtype": "float32"}, {"restrict_ce_to_mask": True}),
    "relations": ({"relation_layer": -1}, RELATIONS),
    "labels": ({"mask_only": True}, {"alpha_ce": 0.0, "alpha_cos": 0.0}),
}


def train(cache, out, device, settings):
    vocabulary.LEAST = 16
    init = "teacher" if settings.get("alpha_cos", 1.0) or "signal" in settings else "random"
    train_student(
        cache_dir=cache,
        out=out,
        size="1x16",
        student=StudentConfig(sizes=("1x16",), init=init),
        train=TrainConfig(steps=STEPS, batch_size=8, logging_steps=STEPS, report_to=(), **settings),
        device=device,
        dtype="float32",
    )


def losses(folder):
    result = json.loads((folder / "training.json").read_text())["result"]
    return {name: result[name] for name in ("loss", *TERMS) if name in result}


def train_there(cache, out, settings):
    step = DistillationTrainer.training_step

    def marked(trainer, *args, **options):
        second_device.WAITS.append(f"step {trainer.state.global_step}")
        return step(trainer, *args, **options)

    DistillationTrainer.training_step = marked
    train(cache, out, second_device.NAME, settings)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_the_same_and_no_step_waits(tiny_cache, tmp_path, monkeypatch, name):
    stored, settings = STUDENTS[name]
    cache = tiny_cache(**stored)
    monkeypatch.setattr(vocabulary, "LEAST", 16)
    train(cache, tmp_path / "cpu", "cpu", settings)
    waits = second_device.run(train_there, cache, tmp_path / "second", settings, folder=tmp_path)
    one, other = (losses(tmp_path / name) for name in ("cpu", "second"))
    assert other == pytest.approx(one, rel=1e-5)
    begun, ended = waits.index("step 1"), waits.index(f"step {STEPS - 1}")
    assert [wait for wait in waits[begun:ended] if not wait.startswith("step ")] == []
    assert any("means.py" in wait for wait in waits[ended:])  # for the log line


CACHES = {
    "coded": {"hidden_layers": (-1, 1), "tail_samples": 8},
    "drawn": {"positions": "masked+0.3", "top_p": 0.9, "top_k": 20},
    "exact, relations": {"hidden_dtype": "float32", "relation_layer": -1},
}


PLACES = ("input_ids", "labels", "lengths", "masked_counts", "masked_positions")


def cache_there(out, corpus, teacher, settings):
    signals = pipeline._signals

    def marked(*args):
        second_device.WAITS.append("block")
        found = signals(*args)
        second_device.WAITS.append("done")
        return found

    pipeline._signals = marked
    run_stage_one(out, corpus, teacher, device=second_device.NAME, **settings)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_the_same_and_no_block_waits(tiny_corpus, tiny_teacher, tmp_path, name):
    run_stage_one(tmp_path / "cpu", tiny_corpus, tiny_teacher, **CACHES[name])
    waits = second_device.run(
        cache_there, tmp_path / "second", tiny_corpus, tiny_teacher, CACHES[name], folder=tmp_path
    )
    one, other = (Cache.open(tmp_path / n) for n in ("cpu", "second"))
    assert one.num_blocks == other.num_blocks
    for block in range(one.num_blocks):
        ours, theirs = one.read_block(block), other.read_block(block)
        assert ours.keys() == theirs.keys()
        for column in ours:
            same = np.isclose(ours[column], theirs[column], rtol=1e-2, atol=1e-4)
            if column.endswith("ids") or ours[column].dtype.kind != "f":
                same = ours[column] == theirs[column]
            # A code or a draw moves with the last bits of sums.
            assert same.mean() >= (1.0 if column in PLACES else 0.97), column
    rest = waits[waits.index("done") :]  # the first block brings the tables
    assert set(rest) == {"block", "done"}


def evaluate(corpus, teacher, student, device):
    entries = [ModelEntry("teacher", "teacher", teacher), ModelEntry("other", "student", student)]
    found = evaluate_models(
        entries, corpus, MaskingConfig(), EvaluateConfig(sequences=16), device, "float32"
    )
    return found["models"][1]


def evaluate_there(corpus, teacher, student, expected):
    found = evaluate(corpus, teacher, student, second_device.NAME)
    for name in ("mlm_nll", "mlm_top1", "teacher_kl", "ece"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_an_evaluation_is_the_same(tiny_corpus, tiny_teacher, tmp_path):
    student = save_random_bert(
        tmp_path / "other", tiny_corpus / "tokenizer", layers=1, ffn=48, positions=24, bias=0.1
    )
    expected = evaluate(tiny_corpus, tiny_teacher, student, "cpu")
    assert expected["teacher_kl"] > 0.1
    models = (tiny_teacher, student)
    second_device.run(evaluate_there, tiny_corpus, *models, expected, folder=tmp_path)


def rerun_there(path):
    rows = rerun(Cache.open(path), RerunSettings(blocks=3, device=second_device.NAME))
    assert [row for row in rows if not row.passed] == []


def test_a_cache_of_the_cpu_is_verified(tiny_cache, tmp_path):
    second_device.run(rerun_there, tiny_cache(residual_samples=4), folder=tmp_path)


def notebook_there(path, out, expected):
    found = evaluated_in_a_notebook(path, out, second_device.NAME)
    for name, value in expected.items():
        if "loss" in name or "kl" in name:
            assert found[name] == pytest.approx(value, rel=1e-4), name


def evaluated_in_a_notebook(path, out, device):
    cache, other = open_cache(path), open_cache(path)  # the other has a head of its own
    trainer = CachedDistillationTrainer(
        build_student(cache, "1x16"), train_dataset=cache, eval_dataset=other, output_dir=out,
        device=device, dtype="float32", epochs=1, batch_size=8, report_to=(),
    )  # fmt: skip
    trainer.train()
    return trainer.evaluate()


def test_a_notebook_trains_and_evaluates_the_same(tiny_cache, tmp_path):
    path = tiny_cache()
    expected = evaluated_in_a_notebook(path, tmp_path / "cpu", "cpu")
    assert expected["eval_loss"]
    second_device.run(notebook_there, path, tmp_path / "second", expected, folder=tmp_path)


def encode_there(kinds):
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(5, 120, (3, 16), generator=generator)
    attention_BL = torch.ones_like(ids_BL)
    attention_BL[1, 9:], ids_BL[1, 9:] = 0, 0
    rows_N = torch.tensor([1, 5, 18, 20, 33, 40])
    for kind in kinds:
        model = make_model(kind, 120)
        moved = copy.deepcopy(model).to(second_device.NAME)
        inputs = [x.to(second_device.NAME) for x in (ids_BL, attention_BL, rows_N)]
        encoder = RowEncoder(moved)
        second_device.WAITS.append(kind)
        found_ND = encoder(*inputs)
        found_ND.square().sum().backward()
        second_device.WAITS.append("done")
        expected_ND = RowEncoder(model)(ids_BL, attention_BL, rows_N)
        torch.testing.assert_close(found_ND.here, expected_ND, rtol=1e-4, atol=1e-4)
        expected_ND.square().sum().backward()
        both = zip(moved.parameters(), model.parameters(), strict=True)
        pairs = [(mine.grad.here, its.grad) for mine, its in both if its.grad is not None]
        ours, theirs = (torch.cat([x.flatten() for x in part]) for part in zip(*pairs, strict=True))
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), kind


def test_every_family_stays_on_its_device(tmp_path):
    """None mixes it with the CPU; those whose masks need no look at them never wait."""
    waits = second_device.run(encode_there, WORKING, folder=tmp_path)
    for kind in WORKING:
        begun = waits.index(kind) + 1
        if FAMILIES.get(kind, Family()).mask != "tokens" and kind != "xmod":  # looks for languages
            assert waits[begun : waits.index("done", begun)] == [], kind


def mix():
    there = torch.ones(3, device=second_device.NAME)
    with pytest.raises(RuntimeError, match="two devices"):
        there + torch.ones(3)
    assert (there + 1).sum().item() == 6
    there[there > 0].cpu()
    torch.ones(3).to(second_device.NAME)
    torch.ones(3).to(second_device.NAME, non_blocking=True)


def test_the_device_itself_tells(tmp_path):
    waits = second_device.run(mix, folder=tmp_path)
    assert [wait.split(":")[0] for wait in waits] == [
        "aten._local_scalar_dense.default",
        "aten.index.Tensor",
        "aten._to_copy.default, from the device",
        "aten._to_copy.default, to the device",
    ]
