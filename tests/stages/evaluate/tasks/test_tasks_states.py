"""L_cos of the second distillation: states of [CLS] are the model's own, and teach a student."""
# ruff: noqa: F811

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from distilcache.data.errors import UserError
from distilcache.pipeline.report.tasks_table import tasks_page
from distilcache.stages.evaluate.masked_lms import ModelEntry
from distilcache.stages.evaluate.tasks.catalogue import TASKS
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import Split, read_task
from distilcache.stages.evaluate.tasks.features import Soft, encode
from distilcache.stages.evaluate.tasks.finetune import Place, fine_tune
from distilcache.stages.evaluate.tasks.predictions import predict, predict_with_states
from distilcache.stages.evaluate.tasks.task_losses import cos_loss
from distilcache.stages.evaluate.tasks.task_models import load_model, open_candidate, takes_types
from tests.builders import WORDS
from tests.stages.evaluate.tasks.tasks_support import (
    FAST,
    data,  # noqa: F401
    entries,  # noqa: F401
    run_on,
)
from tests.stages.models.families_support import FAMOUS, save_teacher


@pytest.fixture
def place(tmp_path):
    return Place(device=torch.device("cpu"), dtype=torch.float32, scratch=tmp_path)


@pytest.mark.parametrize("kind", FAMOUS)
def test_states_of_every_family_are_the_model_s_own_of_cls(kind, tmp_path, place):
    entry = ModelEntry(name=kind, role="teacher", path=save_teacher(kind, tmp_path / kind))
    tokenizer = open_candidate(entry).tokenizer
    split = Split((["amber bridge", "cedar", " ".join(WORDS[3:9])],), [0, 1, 1])
    encoded = encode(TASKS["sst2"], split, tokenizer, 36, pad_left=kind == "xlnet")
    model = load_model(entry, TASKS["sst2"], 0)
    if kind == "mobilebert":  # It reads a token's neighbours, padding as well; as trained: 0.
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.pad_token_id] = 0
    logits, states = predict_with_states(model, encoded, 2, place)
    np.testing.assert_allclose(logits, predict(model, "class", encoded, 2, place), rtol=1e-5)
    assert states.dtype == np.float16
    for row in range(3):
        first, last = encoded.bounds[row : row + 2]
        inputs = {"input_ids": torch.tensor(encoded.ids[None, first:last]).long()}
        if takes_types(model):
            inputs["token_type_ids"] = torch.tensor(encoded.types[None, first:last]).long()
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True)
        is_cls = inputs["input_ids"][0] == tokenizer.cls_token_id
        assert is_cls.sum() == 1
        wanted = out.hidden_states[-1][0][is_cls][0]
        np.testing.assert_allclose(states[row], wanted, rtol=2e-3, atol=2e-3)


def test_l_cos_is_the_dense_formula():
    states, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    norms = (states.square().sum(1) * teacher.square().sum(1)).sqrt()
    wanted = 1 - (states * teacher).sum(1) / norms
    torch.testing.assert_close(cos_loss(states, teacher), wanted.float())
    torch.testing.assert_close(cos_loss(states, 3 * states), torch.zeros(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [32, 24])
def test_a_student_takes_the_direction_of_its_teacher_s_states(width, entries, data, place):
    task = TASKS["sst2"]
    train = encode(task, read_task(task, str(data)).train, open_candidate(entries[1]).tokenizer, 32)
    # One direction per label: what a student can learn, and its classifier alone would not.
    directions = torch.randn(2, width, generator=torch.Generator().manual_seed(3))
    states = directions[train.labels]
    soft = Soft(torch.zeros(len(train), 2), torch.zeros(len(train)), states)
    left = []
    for weight in (1e-12, 10.0):
        model = load_model(entries[1], task, 0)
        config = TasksConfig(**{**FAST, "epochs": 8.0}, distil=True, distil_cos=weight)
        fine_tune(model, task.kind, train, config, seed=0, place=place, soft=soft)
        _, said = predict_with_states(model, train, 16, place)
        with torch.no_grad():
            projected = model.distil_projection(torch.tensor(said).float())
        left.append(cos_loss(projected, states).mean().item())
        right = predict(model, task.kind, train, 16, place).argmax(-1) == train.labels
        assert right.mean() > 0.9
    assert left[1] < 0.1 < 0.5 * left[0]


def test_states_are_written_once_and_made_again_where_they_are_lost(
    entries, data, tmp_path, capsys
):
    settings = {"epochs": 0.3, "distil": True, "distil_copies": 1}
    run_on(entries[:2], data, tmp_path, **settings)
    capsys.readouterr()
    # The teacher's run has to be repeated for its states; the plain student's has not.
    result = run_on(entries[:2], data, tmp_path, **settings, distil_cos=2.0)
    assert "1 of 3 runs found" in capsys.readouterr().err
    assert "L_cos on [CLS] with weight 2" in " ".join(tasks_page(result, "toy", "x").split())
    path = tmp_path / "sst2" / "teacher-seed0.states.safetensors"
    logits = load_file(path.with_name("teacher-seed0.safetensors"))["logits"]
    states = load_file(path)["states"]
    assert (len(logits), states.shape) == (400, (400, 32))
    run_on(entries[:2], data, tmp_path, **settings, distil_cos=1.0)
    assert "2 of 3 runs found" in capsys.readouterr().err
    path.unlink()
    run_on(entries[:2], data, tmp_path, **settings, distil_cos=1.0)
    assert "2 of 3 runs found" in capsys.readouterr().err
    np.testing.assert_array_equal(load_file(path)["states"], states)


def test_spans_are_distilled_without_states(entries, data, tmp_path):
    settings = {"names": ("squad",), "epochs": 0.1, "distil": True, "distil_cos": 1.0}
    run_on(entries[:2], data, tmp_path, **settings)
    assert (tmp_path / "squad" / "1x32+distil-seed0.json").is_file()
    assert not list(tmp_path.rglob("*.states.safetensors"))


@pytest.mark.parametrize("taught", [True, False])
def test_without_dropout_is_a_model_that_has_none(taught, entries, data, place):
    """Off in the second distillation alone; other rows keep their dropout."""
    task = TASKS["sst2"]
    train = encode(task, read_task(task, str(data)).train, open_candidate(entries[1]).tokenizer, 32)
    soft = Soft(torch.randn(len(train), 2), torch.ones(len(train))) if taught else None
    found = []
    for probability, on in ((0.2, False), (0.0, True), (0.2, True)):
        model = load_model(entries[1], task, 0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = probability
        config = TasksConfig(**{**FAST, "epochs": 0.3}, distil=True, distil_dropout=on)
        fine_tune(model, task.kind, train, config, seed=0, place=place, soft=soft)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1 if taught else 2])
    assert not torch.equal(found[1], found[2])


def test_dropout_is_part_of_what_a_run_depends_on(entries, data, tmp_path, capsys):
    settings = {"epochs": 0.3, "distil": True}
    run_on(entries[:2], data, tmp_path, **settings)
    capsys.readouterr()
    result = run_on(entries[:2], data, tmp_path, **settings, distil_dropout=False)
    assert "2 of 3 runs found" in capsys.readouterr().err
    assert "without dropout" in " ".join(tasks_page(result, "toy", "x").split())
    with pytest.raises(UserError, match="distil_dropout must be true where distil is false"):
        TasksConfig(distil_dropout=False)


@pytest.mark.parametrize(
    "name", ["distil_copies", "distil_epochs", "distil_min_steps", "distil_cos"]
)
def test_settings_of_the_second_distillation_need_it(name):
    with pytest.raises(UserError, match=rf"{name} must be 0 where distil is false, got 2"):
        TasksConfig(**{name: 2})
    with pytest.raises(UserError, match=rf"{name} must be at least 0, got -1"):
        TasksConfig(distil=True, **{name: -1})
