"""Trainer's own arguments: each works as in transformers, or is refused by its name."""

import inspect
import json
import pickle
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as hf_logging

from distilcache import CachedDistillationTrainer, UserError, build_student, open_cache
from distilcache.stages.models.hub import quiet
from distilcache.stages.student_train.arguments import REFUSED, checked, training_arguments
from distilcache.stages.student_train.config import TrainConfig
from tests.hub import TOKEN, hub_in
from tests.stages.models.families_support import make_model

TRAINED = {
    "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "seed": 5,
    "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5},
    "warmup_steps": 1, "optim": "adamw_torch", "optim_args": None, "optim_target_modules": None,
    "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-7,
    "gradient_accumulation_steps": 2, "average_tokens_across_devices": False,
    "max_grad_norm": 0.5, "bf16": True, "tf32": None, "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "use_cache": True,
    "neftune_noise_alpha": 1.0, "torch_empty_cache_steps": 1, "logging_strategy": "steps",
    "logging_steps": 1, "logging_first_step": True, "log_on_each_node": False,
    "logging_nan_inf_filter": False, "include_num_input_tokens_seen": "all",
    "log_level": "passive", "log_level_replica": "error", "disable_tqdm": False,
    "report_to": "none", "run_name": "name", "project": "mine", "trackio_space_id": None,
    "trackio_bucket_id": None, "trackio_static_space_id": None, "skip_memory_metrics": False,
    "debug": "underflow_overflow", "data_seed": 7, "use_cpu": True, "do_train": True,
    "do_eval": True, "do_predict": True, "resume_from_checkpoint": "unused", "local_rank": -1,
    "eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1, "per_device_eval_batch_size": 4,
    "prediction_loss_only": False, "eval_on_start": True, "eval_do_concat_batches": False,
    "eval_use_gather_object": True, "eval_accumulation_steps": 1,
    "include_for_metrics": ["inputs", "loss"], "save_strategy": "steps", "save_steps": 1,
    "save_on_each_node": True, "save_total_limit": 1, "load_best_model_at_end": True,
    "metric_for_best_model": "masked", "greater_is_better": False, "remove_unused_columns": False,
    "restore_callback_states_from_checkpoint": True, "ignore_data_skip": True,
}  # fmt: skip
"""One run with all of these."""
LOADED = {
    "num_train_epochs": 0.2, "dataloader_num_workers": 1, "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1,
    "dataloader_multiprocessing_context": "fork", "dataloader_in_order": False,
}  # fmt: skip
"""And one with these."""
PUSHED = {
    "push_to_hub": True, "hub_model_id": "me/small", "hub_token": TOKEN,
    "hub_private_repo": True, "hub_strategy": "all_checkpoints", "hub_always_push": True,
    "hub_revision": "main",
}  # fmt: skip
ELSEWHERE = {"output_dir", "full_determinism", "activation_checkpointing",
             "activation_checkpointing_kwargs", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
             "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"}  # fmt: skip
"""Of several processes, which are refused; of the whole process; new names of two in TRAINED."""


@pytest.fixture(scope="module")
def cache(tiny_cache):
    return open_cache(tiny_cache(hidden_dtype="float16", top_k=8))


@pytest.fixture
def make(cache, tmp_path):
    def make(size="2x32", arguments=None, **given):
        plain = {"max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True, "seed": 3}
        args = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "out"),
                "disable_tqdm": True,
                **plain,
                **(arguments or {}),
            }
        )
        student = build_student(cache, size, seed=1, dropout=0.1)
        return CachedDistillationTrainer(student, args, train_dataset=cache, **given)

    return make


@pytest.fixture(scope="module")
def plain(cache, tmp_path_factory):
    """The weights of three plain steps."""
    args = TrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("plain")),
        **{"max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True, "seed": 3},
    )
    trainer = CachedDistillationTrainer(
        build_student(cache, "2x32", seed=1, dropout=0.1), args, train_dataset=cache
    )
    trainer.train()
    return trainer.model


def equal(ours, theirs):
    left, right = ours.state_dict(), theirs.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_arguments_come_in_the_order_of_trainers():
    ours = list(inspect.signature(CachedDistillationTrainer.__init__).parameters)
    theirs = list(inspect.signature(Trainer.__init__).parameters)
    assert ours[: len(theirs)] == theirs
    for name in ("train", "evaluate", "predict", "save_model"):
        ours = inspect.signature(getattr(CachedDistillationTrainer, name)).parameters
        assert list(ours) == list(inspect.signature(getattr(Trainer, name)).parameters)


def test_a_search_is_left_to_the_sweep(make):
    with pytest.raises(UserError, match="hyperparameter_search has no place here; use distilcache"):
        make().hyperparameter_search(n_trials=2)


def test_every_field_of_training_arguments_is_tried_or_refused():
    tried = {*TRAINED, *LOADED, *PUSHED, *ELSEWHERE}
    assert not tried & REFUSED.keys()
    assert {f.name for f in fields(TrainingArguments)} <= tried | REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused_by_name(cache, tmp_path, name):
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    setattr(args, name, "another")
    with pytest.raises(UserError, match=f"^train: {name} must be .*, got 'another': ") as error:
        CachedDistillationTrainer(build_student(cache, "1x32"), args, train_dataset=cache)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_precision_is_not_that_of_the_environment(make, tmp_path, monkeypatch):
    """``accelerate launch`` says it there."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="mixed_precision must be no or bf16, got fp16"):
        make()
    recipes = training_arguments(
        TrainConfig(), steps=1, out=tmp_path, device=torch.device("cpu"), dtype=torch.float32
    )
    assert recipes.mixed_precision == "no"


def test_everything_else_at_once(make, capsys):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"masked": sum(map(len, prediction.label_ids))}

    trainer = make(arguments=TRAINED, eval_dataset=0.2, compute_metrics=metrics)
    done = trainer.train()
    assert done.global_step == 3
    sequences = done.metrics["train_samples_per_second"] * done.metrics["train_runtime"]
    assert sequences == pytest.approx(3 * 2 * 8, rel=0.01)
    assert len(seen) == 4  # before the first step, and after each
    assert seen[0].inputs is not None
    assert seen[0].losses is not None
    history = trainer.state.log_history
    assert [e["step"] for e in history if "loss" in e] == [1, 2, 3]
    assert all(
        {"learning_rate", "num_input_tokens_seen"} <= e.keys() for e in history if "loss" in e
    )
    assert trainer.state.best_model_checkpoint is not None
    assert {"train_loss", "total_flos"} <= history[-1].keys()
    assert trainer.args.data_seed == 7
    assert trainer.train_dataset.seed == 7
    assert "3/3" in capsys.readouterr().err  # its own progress bar


def test_workers_read_what_the_trainer_itself_reads(make, plain):
    epoch = make().train_dataset.steps_per_epoch
    arguments = {**LOADED, "num_train_epochs": 3 / epoch, "max_steps": -1}
    trainer = make(arguments=arguments)
    trainer.train()
    assert trainer.state.global_step == 3
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.in_order) == (1, 1, False)
    again = make(arguments={"dataloader_num_workers": 1})
    again.train()
    assert equal(again.model, plain)


def test_batches_can_be_pickled_for_spawned_workers(make):
    data = make().train_dataset
    again = pickle.loads(pickle.dumps(data))
    for k in (0, data.steps_per_epoch + 1):
        ours, theirs = again[k], data[k]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_recomputed_activations_change_nothing(make, plain):
    """But for the last layer, which must know its few positions."""
    trainer = make(arguments={"gradient_checkpointing": True})
    trainer.train()
    layers = trainer.model.distilbert.transformer.layer
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert equal(trainer.model, plain)


def test_noise_on_the_embeddings_is_there_in_training_alone(make, plain):
    trainer = make(arguments={"neftune_noise_alpha": 5.0})
    trainer.train()
    assert not equal(trainer.model, plain)
    assert not trainer.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(("kind", "reaches"), [("bert", True), ("bart", False), ("mbart", False)])
def test_noise_that_would_reach_no_embedding_is_refused(kind, reaches):
    """Their encoders look tokens up in modules of their own, which Trainer does not know."""
    student = make_model(kind, 40, layers=1)
    args = TrainingArguments(neftune_noise_alpha=5.0, use_cpu=True)
    if reaches:
        checked(args, student)
    else:
        with pytest.raises(UserError, match=f"neftune_noise_alpha must be None .* '{kind}', got 5"):
            checked(args, student)
    assert checked(TrainingArguments(use_cpu=True), student)


@pytest.mark.parametrize("size", ["2x32", "1x16"])
@pytest.mark.parametrize(
    "chosen", [{"optim": "adafactor"}, {"optim": "sgd", "optim_args": "momentum=0.9"}], ids=str
)
def test_other_optimizers_are_stored_and_resumed(make, chosen, size):
    arguments = {**chosen, "save_steps": 2, "max_steps": 4}
    whole = make(size, arguments)
    whole.train()
    resumed = make(size, arguments)
    folder = Path(resumed.args.output_dir)
    (folder / "checkpoint-2").rename(folder / "last-checkpoint")  # As the hub has it.
    resumed.train(resume_from_checkpoint=str(folder / "last-checkpoint"))
    assert equal(resumed.model, whole.model)


def test_bfloat16_is_refused_for_types_that_do_not_run_in_it(monkeypatch):
    student = make_model("deberta", 60)
    assert checked(TrainingArguments(use_cpu=True), student)
    asked = TrainingArguments(use_cpu=True, bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for args in (asked, TrainingArguments(use_cpu=True)):
        with pytest.raises(UserError, match="mixed_precision must be no for .* type 'deberta'"):
            checked(args, student)


class Averaging(torch.optim.SGD):
    """With the methods of schedulefree's."""

    def eval(self):
        raise AssertionError


def test_optimizers_that_average_weights_are_refused(make):
    chosen = {"optimizer_cls_and_kwargs": (Averaging, {"lr": 0.1})}
    for arguments, given in (({"optim": "schedule_free_adamw"}, {}), ({}, chosen)):
        with pytest.raises(UserError, match="must not be an optimizer that evaluates with average"):
            make("1x32", arguments, **given)


def test_an_optimizer_of_ones_own(make, cache):
    student = build_student(cache, "1x32")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    args = TrainingArguments(
        output_dir=make().args.output_dir, max_steps=2, logging_steps=1, use_cpu=True
    )
    trainer = CachedDistillationTrainer(
        student, args, train_dataset=cache, optimizers=(optimizer, schedule)
    )
    before = {name: p.clone() for name, p in student.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.25
    assert any(not torch.equal(before[name], p) for name, p in student.named_parameters())
    with pytest.raises(UserError, match="optimizers must be .*optimizer_cls_and_kwargs"):
        make("1x16", optimizers=(optimizer, None))
    made = make("1x16", optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    made.train()
    trained = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in made.losses.projection.parameters()} <= trained


class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        self.model, self.optimizer = model, optimizer


def test_trainer_and_callbacks_see_the_student(make):
    watch = Watch()
    trainer = make(callbacks=[watch])
    trainer.train()
    assert watch.model is trainer.model is trainer.student
    assert type(watch.model).__name__ == "DistilBertForMaskedLM"
    assert watch.optimizer is not None


@pytest.fixture
def usual_verbosity():
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_warning()
    yield hf_logging.get_verbosity()
    hf_logging.set_verbosity(before)


def test_the_rest_of_the_process_is_left_alone(cache, tmp_path, usual_verbosity, capsys):
    args = TrainingArguments(output_dir=str(tmp_path / "args"), max_steps=1, use_cpu=True)
    before = args.to_dict()
    trainer = CachedDistillationTrainer(build_student(cache, "1x32"), args, train_dataset=cache)
    trainer.train()
    assert args.to_dict() == before
    trainer = CachedDistillationTrainer(
        build_student(cache, "1x32"), train_dataset=cache, output_dir=tmp_path / "out", steps=1
    )
    trainer.train()
    assert hf_logging.get_verbosity() == usual_verbosity
    assert not TrainingArguments(output_dir=str(tmp_path)).disable_tqdm
    assert capsys.readouterr().err.count("1/1") >= 2


def test_pushed_models_open_as_those_that_are_saved(make, tmp_path):
    with quiet(), hub_in(tmp_path / "hub", tmp_path / "downloads") as hub:
        trainer = make("1x16", {**PUSHED, "save_steps": 2, "max_steps": 2})
        trainer.train()
        trainer.push_to_hub(tags="mine", language="en", blocking=True)
        opened = AutoModelForMaskedLM.from_pretrained("me/small")
        assert equal(opened, trainer.model)
        assert hub.private == {"me/small"}
    first, checkpoint, last = (files for *_, files in hub.commits)
    assert {"README.md", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {*first}
    assert all(name.startswith("checkpoint-2/") for name in checkpoint)
    assert [message for _, _, message, _ in hub.commits][-1] == "End of training"
    assert "README.md" in last
    card = (hub.folder / "me" / "small" / "README.md").read_text()
    assert "distilcache" in card
    assert "- mine" in card
    assert "language: en" in card
    assert 'model="me/small"' in card
    settings = json.loads(card.partition("```json")[2].partition("```")[0])
    assert settings["args"]["max_steps"] == 2


def test_a_tokenizer_of_ones_own_is_saved(make, cache, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(cache.cache.teacher_dir, model_max_length=7)
    make(processing_class=tokenizer).save_model(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").model_max_length == 7


def test_early_stopping_and_the_best_model(make, tmp_path):
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    trainer = make(
        arguments={
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
            "logging_steps": 1,
            "max_steps": 5,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "save_total_limit": 2,
        },  # fmt: skip
        eval_dataset=0.2,
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    stored = Path(trainer.args.output_dir) / "checkpoint-4" / "trainer_state.json"
    patience = json.loads(stored.read_text())["stateful_callbacks"]["EarlyStoppingCallback"]
    assert patience["attributes"]["early_stopping_patience_counter"] == 2
    opened = AutoModelForMaskedLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert equal(opened, trainer.model)
    trainer.save_model(tmp_path / "best")
    card = (tmp_path / "best" / "README.md").read_text()
    (loss,) = (e["loss"] for e in trainer.state.log_history if e["step"] == 2 and "loss" in e)
    assert "| steps | 2 |" in card
    assert f"| loss | {loss:,.4g} |" in card
