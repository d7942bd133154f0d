"""Evaluation on cached text during training, against the student's own logits."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback, TrainingArguments

from distilcache import CachedDistillationTrainer, UserError, build_student, open_cache
from distilcache.data.cache.cache import Cache
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.reading import OpenCache
from distilcache.stages.student_train.evaluation import held_out
from distilcache.stages.student_train.model import TERMS


@pytest.fixture(scope="module")
def cache(small_cache):
    """Coded states, so that every cache decodes them in its own way; lines of many lengths."""
    return open_cache(small_cache())


@pytest.fixture(scope="module")
def other(small_cache):
    return open_cache(small_cache(corpus={"documents": 20, "seed": 3}))


def trainer_on(cache, folder, size="1x32", **given):
    arguments = given.pop("arguments", {})
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, max_steps=2, **arguments)
    return CachedDistillationTrainer(
        build_student(cache, size, seed=1), args, train_dataset=cache, **given
    )


@torch.no_grad()
def slowly(student, blocks):
    """Means of the terms at T = 2 over the positions of some blocks, from whole logits."""
    student.eval()
    sums, counts = np.zeros(3), np.zeros(3)
    for block in blocks:
        output = student(
            block.input_ids, attention_mask=block.attention_mask, output_hidden_states=True
        )
        logits = output.logits[block.positions[:, 0], block.positions[:, 1]]
        teacher = block.teacher_log_probs(temperature=2.0)
        ours = (logits / 2).log_softmax(-1)
        mlm = functional.cross_entropy(output.logits.transpose(1, 2), block.labels, reduction="sum")
        states = output.hidden_states[-1].flatten(0, 1)[block["hidden_index"]]
        cos = 1 - functional.cosine_similarity(states, block.hidden_states(), dim=-1)
        sums += (
            4 * functional.kl_div(ours, teacher, log_target=True, reduction="sum"),
            mlm,
            cos.sum(),
        )
        counts += len(ours), (block.labels != -100).sum(), len(cos)
    return sums / counts


@pytest.mark.parametrize("batch_size", [3, 64])
def test_losses_are_those_of_whole_logits(cache, other, tmp_path, batch_size):
    trainer = trainer_on(
        cache,
        tmp_path,
        eval_dataset={"own": cache, "other": other},
        arguments={"per_device_eval_batch_size": batch_size},
    )
    found = trainer.evaluate()
    for name, data in (("own", cache), ("other", other)):
        wanted = slowly(trainer.model, data.blocks(round=0))
        got = [found[f"eval_{name}_{term}"] for term in ("ce", "mlm", "cos")]
        assert got == pytest.approx(wanted, rel=1e-5)
        assert found[f"eval_{name}_loss"] == pytest.approx(wanted @ [5, 2, 1], rel=1e-5)
    assert found["eval_own_mlm"] != found["eval_other_mlm"]


def test_a_fraction_is_trained_on_by_nobody(cache, tmp_path, monkeypatch):
    read = []
    plain = CachedBatches._decoded
    monkeypatch.setattr(
        CachedBatches, "_decoded", lambda self, n, *cut: read.append(n) or plain(self, n, *cut)
    )
    trainer = trainer_on(cache, tmp_path, eval_dataset=0.25)
    blocks = len(cache.cache.round_range(0))
    trained, kept = held_out(blocks, 0.25)
    trainer.train_dataset._load_window(0, 0)
    assert set(read) == set(trained.tolist())
    assert sorted({*trained, *kept}) == list(range(blocks))
    found = trainer.evaluate()
    wanted = slowly(trainer.model, [cache.block(int(n)) for n in kept])
    assert [found[f"eval_{n}"] for n in ("ce", "mlm", "cos")] == pytest.approx(wanted, rel=1e-5)
    assert found["eval_samples_per_second"] * found["eval_runtime"] == pytest.approx(
        sum(len(cache.block(int(n))) for n in kept), rel=0.05
    )


def test_held_out_blocks_lie_evenly():
    assert held_out(10, 0.3)[1].tolist() == [1, 5, 8]
    assert held_out(5, 0.01)[1].tolist() == [2]
    assert held_out(2, 0.5)[0].tolist() == [0]
    for blocks, fraction in ((1, 0.5), (10, 0.0), (10, -0.1), (10, 0.99)):
        with pytest.raises(UserError, match=f"leaves some of the cache's {blocks} blocks"):
            held_out(blocks, fraction)


def test_metrics_get_the_logits_of_masked_positions(cache, tmp_path):
    trainer = trainer_on(
        cache,
        tmp_path,
        eval_dataset=cache,
        compute_metrics=lambda p: {"right": (p.predictions == p.label_ids).mean()},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    right = []
    for block in cache.blocks(round=0):
        logits = trainer.model.eval()(block.input_ids, attention_mask=block.attention_mask).logits
        masked = block.labels != -100
        right += (logits.argmax(-1) == block.labels)[masked].tolist()
    assert trainer.evaluate()["eval_right"] == pytest.approx(np.mean(right))
    trainer.preprocess_logits_for_metrics = trainer.compute_metrics = None
    predicted = trainer.predict(cache)
    assert predicted.predictions.shape == (len(right), cache.encoding.vocab_size)
    labels = predicted.label_ids
    assert predicted.metrics["test_mlm"] == pytest.approx(
        -torch.tensor(predicted.predictions)
        .log_softmax(-1)[range(len(labels)), labels]
        .mean()
        .item(),
        rel=1e-5,
    )


@pytest.mark.parametrize("size", ["1x32", "1x16"])
def test_evaluation_changes_nothing_in_training(cache, other, tmp_path, size):
    arguments = {"logging_steps": 2}
    plain = trainer_on(cache, tmp_path / "plain", size, arguments=arguments)
    plain.train()
    arguments |= {"eval_strategy": "steps", "eval_steps": 1}
    evaluated = trainer_on(cache, tmp_path / "eval", size, eval_dataset=other, arguments=arguments)
    evaluated.train()
    ours, theirs = evaluated.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len([e for e in evaluated.state.log_history if "eval_loss" in e]) == 2
    mine, wanted = (next(e for e in t.state.log_history if "loss" in e) for t in (evaluated, plain))
    assert [mine[name] for name in ("loss", *TERMS[:3])] == [
        wanted[name] for name in ("loss", *TERMS[:3])
    ]
    # With the map of L_cos that has been trained.
    again = evaluated.evaluate(open_cache(cache.path))
    assert again["eval_loss"] == evaluated.evaluate(cache)["eval_loss"]
    assert again["eval_loss"] != evaluated.evaluate()["eval_loss"]


class Wider(OpenCache):
    """As if another teacher had made it."""

    @property
    def encoding(self):
        layer = replace(super().encoding.hidden[0], width=64)
        return replace(super().encoding, hidden=(layer,))


def test_evaluation_needs_states_of_the_same_width(cache, tmp_path):
    with pytest.raises(UserError, match="eval_dataset must have hidden states of 32 .* got 64"):
        trainer_on(cache, tmp_path / "out", eval_dataset=Wider(cache.cache))
    trainer = trainer_on(cache, tmp_path / "out", alpha_cos=0.0, alpha_ce=0.0)
    assert trainer.evaluate(Wider(cache.cache))["eval_mlm"] > 0


def test_evaluation_needs_text_of_the_same_vocabulary(cache, tiny_cache, tmp_path):
    trainer = trainer_on(cache, tmp_path)
    with pytest.raises(UserError, match="eval_dataset must be given to evaluate"):
        trainer.evaluate()
    with pytest.raises(UserError, match="eval_dataset must have the vocabulary of train_dataset"):
        trainer.evaluate(open_cache(tiny_cache()))


SCORES = {1: 1.0, 2: 3.0, 3: 2.0, 4: 1.0}


class Interrupt(TrainerCallback):
    """Ctrl-C in the third step, which is not the best."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_training_is_saved_also_where_only_the_best_is(cache, other, tmp_path):
    def trainer(name, callbacks=()):
        args = TrainingArguments(
            output_dir=str(tmp_path / name), use_cpu=True, max_steps=4, eval_steps=1,
            eval_strategy="steps", save_strategy="best", metric_for_best_model="score",
            greater_is_better=True,
        )  # fmt: skip
        made = CachedDistillationTrainer(
            build_student(cache, "1x32", seed=1),
            args,
            train_dataset=cache,
            eval_dataset=other,
            compute_metrics=lambda _: {"score": SCORES[made.state.global_step]},
            callbacks=list(callbacks),
        )
        return made

    whole = trainer("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt, match="step 3 of 4, checkpoint saved"):
        trainer("parts", [Interrupt()]).train()
    assert {p.name for p in (tmp_path / "parts").glob("c*")} >= {"checkpoint-2", "checkpoint-3"}
    assert not (tmp_path / "whole" / "checkpoint-3").exists()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.state.best_global_step == 2


def test_evaluation_reads_each_block_once(cache, other, tmp_path, monkeypatch):
    read, original = [], Cache.read_block
    monkeypatch.setattr(
        Cache, "read_block", lambda self, n: [read.append((self, n)), original(self, n)][1]
    )
    trainer_on(cache, tmp_path, eval_dataset=other).evaluate()
    blocks = [n for by, n in read if by is other.cache]
    assert sorted(blocks) == list(other.cache.round_range(0))
