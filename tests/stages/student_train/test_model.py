"""The student inside its losses: which positions and weights count."""

import pytest
import torch
from torch.nn import functional
from transformers import BertForMaskedLM

from distilcache.data.cache.cache import Cache
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.model import TERMS, DistillationModel
from distilcache.stages.student_train.projection import first_projection
from distilcache.stages.student_train.signals import count_positions, required_signals
from tests.stages.student_train.model_support import EXACT, VOCABULARY, build, gradient, make


def rows_of_terms(model, teacher, batch):
    """L_ce, L_cos and L_mse of every position of a batch, with the teacher beside the student."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        theirs = teacher(**inputs, output_hidden_states=True)
        mine = model.student(**inputs, output_hidden_states=True)
    t = model.train_config.temperature
    student, live = mine.logits.flatten(0, 1), theirs.logits.flatten(0, 1)
    p, log_q = (live / t).softmax(-1), (student / t).log_softmax(-1)
    return {
        "ce": t**2 * functional.kl_div(log_q, p, reduction="none").sum(-1),
        "cos": 1
        - functional.cosine_similarity(
            mine.hidden_states[-1].flatten(0, 1), theirs.hidden_states[-1].flatten(0, 1)
        ),
        "mse": functional.mse_loss(student, live, reduction="none").sum(-1),
    }


KINDS = {
    "replay": ({"top_k": 0}, {"signal": "replay", "alpha_mse": 0.1}),
    "replay+topk": ({"top_k": 8}, {"signal": "replay+topk", "alpha_mse": 0.1}),
    "replay+topk top_p": ({"top_k": 16, "top_p": 0.6}, {"alpha_mse": 0.1}),
    "replay+residual": ({"top_k": 4, "residual_samples": 4}, {"signal": "replay+residual"}),
    "sparse": ({"top_k": VOCABULARY}, {"signal": "sparse"}),
}


@pytest.mark.parametrize("policy", ["masked", "all", "masked+0.3"])
@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_weights_of_every_term(tiny_cache, tiny_teacher, kind, policy):
    """Each sum is that of the live rows at the stored positions, times their weights."""
    settings, train = KINDS[kind]
    cache = tiny_cache(positions=policy, **EXACT, **settings)
    model, data = make(cache, **train)
    teacher = BertForMaskedLM.from_pretrained(tiny_teacher).eval()
    batch = data[1]
    rows = rows_of_terms(model, teacher, batch)
    weights = torch.ones(batch["input_ids"].numel())
    index = batch["hidden_index"]
    if policy == "masked+0.3":
        weights = torch.full_like(weights, 1 / 0.3)
        weights[batch["masked_index"]] = 1.0
        assert len(batch["masked_index"]) < len(index) < len(weights)
    else:
        assert "hidden_weight" not in batch
        everything = torch.arange(len(weights))
        assert torch.equal(index, batch["masked_index"] if policy == "masked" else everything)
    assert torch.equal(batch["ce_index"], index)
    tokens = batch["input_ids"].numel()
    count = tokens if policy == "masked+0.3" else len(index)
    assert count_positions(batch) == {
        "ce": count, "mlm": len(batch["labels"]), "cos": count, "mse": count,
        "rel": tokens,
    }  # fmt: skip
    loss, sums, _ = gradient(model, batch)
    expected = {name: (weights * row)[index].sum() for name, row in rows.items()}
    if not train.get("alpha_mse"):
        expected["mse"] = torch.tensor(0.0)
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-4, atol=1e-4)
    config = model.train_config
    parts = [getattr(config, f"alpha_{n}") * sums[n] / count_positions(batch)[n] for n in TERMS]
    torch.testing.assert_close(loss, sum(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("signal", "policy"),
    [("replay", "all"), ("replay+topk", "masked+0.3"), ("replay+residual", "all")],
)
def test_ce_restricted_to_masked_positions(tiny_cache, tiny_teacher, signal, policy):
    """L_ce and L_mse at masked positions, L_cos where the cache holds hidden states."""
    cache = tiny_cache(positions=policy, top_k=4, residual_samples=4, **EXACT)
    model, data = make(cache, signal=signal, restrict_ce_to_mask=True, alpha_mse=0.1)
    teacher = BertForMaskedLM.from_pretrained(tiny_teacher).eval()
    batch = data[0]
    assert torch.equal(batch["ce_index"], batch["masked_index"])
    assert "ce_weight" not in batch
    counts = count_positions(batch)
    assert counts["ce"] == counts["mse"] == len(batch["labels"])
    assert counts["cos"] == batch["input_ids"].numel()
    rows = rows_of_terms(model, teacher, batch)
    _, sums, _ = gradient(model, batch)
    for name in ("ce", "mse"):
        expected = rows[name][batch["masked_index"]].sum()
        torch.testing.assert_close(sums[name], expected, rtol=1e-4, atol=1e-4)
    weights = batch.get("hidden_weight", torch.ones(len(batch["hidden_index"])))
    expected = (weights * rows["cos"][batch["hidden_index"]]).sum()
    torch.testing.assert_close(sums["cos"], expected, rtol=1e-4, atol=1e-4)


def test_logits_at_masked_positions_correct_a_replay_at_all(tiny_cache, tiny_teacher):
    """Rows without stored logits are plain replay."""
    settings = {"positions": "all", "logit_positions": "masked", "top_k": 6, **EXACT}
    model, data = make(tiny_cache(**settings), alpha_mse=0.1)
    batch = data[0]
    stored = (batch["logit_values"] > float("-inf")).any(-1)
    assert torch.equal(batch["ce_index"][stored], batch["masked_index"])
    teacher = BertForMaskedLM.from_pretrained(tiny_teacher).eval()
    rows = rows_of_terms(model, teacher, batch)
    _, sums, _ = gradient(model, batch)
    for name in ("ce", "mse"):
        torch.testing.assert_close(sums[name], rows[name].sum(), rtol=1e-4, atol=1e-4)


def test_stored_logits_put_a_coarse_replay_right(tiny_cache, tiny_teacher):
    """Against the live loss: coarse hidden states alone, then with stored logits and residuals."""
    settings = {"hidden_quality": 0.05, "top_k": 16, "residual_samples": 400}
    cache = tiny_cache(calibration_sequences=64, **settings)
    teacher = BertForMaskedLM.from_pretrained(tiny_teacher).eval()
    exact, exact_data = make(tiny_cache(top_k=0, **EXACT), signal="replay", alpha_cos=0.0)
    batches = range(8)
    _, expected = totals(exact, exact_data, batches)
    errors = {}
    for signal in ("replay", "replay+topk", "replay+residual"):
        model, data = make(cache, signal=signal, alpha_cos=0.0)
        assert torch.equal(data[0]["input_ids"], exact_data[0]["input_ids"])
        _, found = totals(model, data, batches)
        errors[signal] = float((found - expected).norm() / expected.norm())
    assert errors["replay+topk"] < 0.7 * errors["replay"]
    assert errors["replay+residual"] < 0.2 * errors["replay+topk"]  # So many draws are exact.
    rows = rows_of_terms(exact, teacher, exact_data[0])["ce"][exact_data[0]["ce_index"]]
    _, sums, _ = gradient(exact, exact_data[0])
    torch.testing.assert_close(sums["ce"], rows.sum(), rtol=1e-4, atol=1e-4)


def totals(model, data, batches):
    """Sums of L_ce, and the gradient of L_ce alone, over batches."""
    model.train_config = TrainConfig(alpha_mlm=0.0, alpha_cos=0.0, alpha_ce=1.0)
    counts = dict.fromkeys(TERMS, 1)
    parts = [gradient(model, data[k], counts) for k in batches]
    return sum(sums["ce"] for _, sums, _ in parts), sum(grad for *_, grad in parts)


def test_tail_draws_are_read_at_their_temperature_alone(tiny_cache):
    cache = tiny_cache(top_k=8, tail_samples=6, temperatures=(2.0, 4.0), **EXACT)
    results = {}
    for temperature in (1.0, 2.0, 4.0):
        model, data = make(cache, signal="sparse", temperature=temperature)
        assert model.signals.tail_draws == (temperature == 2.0)
        batch = data[0]
        results[temperature] = gradient(model, batch)[1]["ce"]
        batch["tail_ids"] = (batch["tail_ids"] + 1) % VOCABULARY
        other = gradient(model, batch)[1]["ce"]
        assert torch.equal(other, results[temperature]) == (temperature != 2.0)


def test_tail_draws_without_stored_logits(tiny_cache):
    """Pure sampling of the teacher's distribution: K = 0."""
    cache = tiny_cache(top_k=0, tail_samples=50, **EXACT)
    model, data = make(cache, signal="sparse", alpha_cos=0.0)
    assert data[0]["logit_ids"].shape[1] == 0
    exact, exact_data = make(tiny_cache(top_k=0, **EXACT), signal="replay", alpha_cos=0.0)
    batches = range(10)
    (_, found), (_, expected) = totals(model, data, batches), totals(exact, exact_data, batches)
    assert (found - expected).norm() < 0.25 * expected.norm()


@pytest.mark.parametrize("signal", ["replay+topk", "sparse"])
def test_importance_weights_estimate_the_losses_of_all_positions(tiny_cache, signal):
    """Over many draws of positions the weighted sums are right in expectation."""
    rounds = 16
    settings = {**EXACT, "rounds": rounds, "top_k": 4}
    everything = make(tiny_cache(positions="all", **settings), batch_size=147, signal=signal)
    sampled = make(tiny_cache(positions="masked+0.3", **settings), batch_size=147, signal=signal)
    differences = {name: [] for name in ("ce", "cos")}
    for k in range(rounds):
        batches = [data[k * data.steps_per_epoch] for _, data in (everything, sampled)]
        assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
        assert count_positions(batches[0]) == count_positions(batches[1])
        with torch.no_grad():
            sums = [
                model(batch, count_positions(batch))[1]
                for (model, _), batch in zip((everything, sampled), batches, strict=True)
            ]
        for name, values in differences.items():
            term = TERMS.index(name)
            values.append(float(sums[1][term] / sums[0][term]) - 1)
    for values in map(torch.tensor, differences.values()):
        error = values.std() / rounds**0.5
        assert error < 0.01
        assert values.mean().abs() < 4 * error
        assert values.abs().max() > 1e-3  # Single draws are off.


def test_micro_batches_add_up_to_the_whole_batch(tiny_cache):
    """Sums divided by global counts: accumulation changes neither loss nor gradient."""
    cache = tiny_cache(positions="masked+0.3", top_k=8, **EXACT)
    model, parts = make(cache, batch_size=3, alpha_mse=0.1)
    _, whole = make(cache, batch_size=6)
    batch, halves = whole[0], [parts[0], parts[1]]
    assert torch.equal(torch.cat([half["input_ids"] for half in halves]), batch["input_ids"])
    counts = count_positions(batch)
    assert counts == {n: sum(count_positions(h)[n] for h in halves) for n in TERMS}
    results = []
    for micro_batches in ([batch], halves):
        model.zero_grad()
        loss = sum(model(part, counts)[0] for part in micro_batches)
        loss.backward()
        results.append((loss, torch.cat([p.grad.flatten() for p in model.student.parameters()])))
    torch.testing.assert_close(*(loss for loss, _ in results))
    torch.testing.assert_close(*(grad for _, grad in results), rtol=1e-4, atol=1e-6)


def test_other_width_through_a_trained_projection(tiny_cache):
    model, data = make(tiny_cache(top_k=0, **EXACT), size="1x64", signal="replay")
    loss, _ = model(data[0], count_positions(data[0]))
    loss.backward()
    assert model.projection.weight.shape == (32, 64)
    assert model.projection.weight.grad.abs().sum() > 0
    assert {n.split(".")[0] for n in model.trained_tensors()} == {"student", "projection"}


def test_projection_begins_with_what_the_embeddings_have_in_common(tiny_cache):
    cache = Cache.open(tiny_cache(top_k=0, **EXACT))
    model, data = make(cache.path, size="2x16", signal="replay")
    loss, _ = model(data[0], count_positions(data[0]))
    loss.backward()
    assert model.projection.weight.grad.abs().sum() > 0
    ours, theirs = model.student.get_input_embeddings().weight, model.lm_head.decoder_weight
    ours, theirs = (x.detach() - x.detach().mean(0) for x in (ours, theirs))
    # Embeddings projected on principal directions: the best way back is by the same directions.
    left = (theirs - ours @ model.projection.weight.T).square().sum() / theirs.square().sum()
    values = torch.linalg.svdvals(theirs).square()
    torch.testing.assert_close(left, values[16:].sum() / values.sum(), rtol=1e-3, atol=1e-5)


def test_frozen_teacher_is_no_part_of_the_state(tiny_cache):
    model, _ = make(tiny_cache())
    assert {n.split(".")[0] for n in model.state_dict()} == {"student"}
    assert {n.split(".")[0] for n in model.trained_tensors()} == {"student"}


def test_replay_bias_of_the_codec_is_used_at_its_temperature(tiny_cache):
    """L_ce moves with it, L_mse does not: rounding biases the softmax, not the logits."""
    cache = tiny_cache(calibration_sequences=64)
    model, data = make(cache, alpha_mse=0.1, signal="replay")
    codec = Cache.open(cache).teacher.hidden_codec(2)
    assert torch.equal(model.replay_bias, codec.bias_at(2.0))
    before = gradient(model, data[0])[1]
    model.replay_bias = model.replay_bias + torch.linspace(-1, 1, len(model.replay_bias))
    after = gradient(model, data[0])[1]
    assert not torch.equal(after["ce"], before["ce"])
    assert torch.equal(after["mse"], before["mse"])
    assert make(cache, temperature=3.0, signal="replay")[0].replay_bias is None
    assert make(tiny_cache(top_k=0, **EXACT), signal="replay")[0].replay_bias is None


def test_mlm_alone_needs_no_teacher(tiny_cache):
    cache = Cache.open(tiny_cache(mask_only=True))
    train = TrainConfig(alpha_ce=0.0, alpha_cos=0.0)
    signals = required_signals(cache.encoding, train)
    assert (signals.ce, signals.hidden) == (None, False)
    student = build(cache, "1x32", init="random")
    model = DistillationModel(student, train=train, signals=signals)
    batch = CachedBatches(cache, batch_size=4, seed=0, signal=None, hidden=False)[0]
    loss, sums = model(batch, count_positions(batch))
    logits = student(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    expected = functional.cross_entropy(logits[batch["masked_index"]], batch["labels"])
    torch.testing.assert_close(loss, 2 * expected)
    assert sums[0] == sums[2] == sums[3] == 0


@pytest.mark.parametrize("alone", ["alpha_mse", "alpha_cos"])
def test_a_teachers_term_alone(tiny_cache, alone):
    """L_mse reads what L_ce reads; L_cos reads hidden states and no logits."""
    weights = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0, alone: 1.0}
    model, data = make(tiny_cache(positions="masked+0.3", **EXACT), **weights)
    batch = data[0]
    loss, sums, grads = gradient(model, batch)
    name = alone.removeprefix("alpha_")
    torch.testing.assert_close(loss, sums[name] / batch["input_ids"].numel())
    assert sums["ce"] == 0
    assert grads.norm() > 0
    assert ("logit_ids" in batch) == (alone == "alpha_mse")


def test_the_projection_depends_on_the_seed_alone(tiny_cache, monkeypatch):
    """Where it begins at random: a run that is repeated must begin alike, and leave draws alone."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    student = build(Cache.open(tiny_cache()), "1x16")
    first_projection(student, None, 16, 24, seed=5)
    assert not seeded  # Generators of GPUs are not brought back.
    torch.manual_seed(5)
    assert seeded == [5]
    found = [torch.nn.Linear(16, 24).weight]
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        found.append(first_projection(student, None, 16, 24, seed=5).weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weight, found[0]) for weight in found)
    assert not torch.equal(found[0], first_projection(student, None, 16, 24, seed=6).weight)
