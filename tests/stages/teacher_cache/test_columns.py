"""Which signals the losses need, which caches hold them, and how many positions count."""

import pytest
import torch

from distilcache.data.cache.schema import Encoding, HiddenEncoding
from distilcache.data.errors import UserError
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.model import TERMS
from distilcache.stages.student_train.signals import count_positions, required_signals
from tests.stages.student_train.model_support import VOCABULARY, gradient, make


def encoding(**changes):
    last = HiddenEncoding(layer=2, width=32, dtype="float16")
    values = {
        "vocab_size": VOCABULARY,
        "max_length": 16,
        "pad_id": 0,
        "temperatures": (2.0,),
        "top_k": 8,
        "hidden": (last,),
        "num_layers": 2,
    }
    return Encoding(**{**values, **changes})


@pytest.mark.parametrize(
    ("held", "train", "message"),
    [
        ({"mask_only": True}, {}, "alpha_mse and alpha_rel must be 0 on a mask-only"),
        ({"hidden": ()}, {}, "no hidden states of the last layer, got 'replay.topk'.*sparse"),
        (
            {"hidden": (HiddenEncoding(layer=1, width=32, dtype="float16"),)},
            {"signal": "sparse"},
            r"alpha_cos must be 0 .* got 1 \(stored layers: 1\)",
        ),
        ({"top_k": 0}, {"signal": "sparse"}, "signal must be 'replay' .* got 'sparse'"),
        ({"top_k": 0}, {}, r"got 'replay.topk' \(top_k = 0\); use --set train.signal=replay "),
        *(
            (
                {"hidden": (), "top_k": 0},
                {"signal": signal},
                "alpha_ce and alpha_mse must be 0 .* neither hidden .* got 5 and 0; .*top_k=8",
            )
            for signal in ("sparse", "replay")
        ),
        (
            {"top_k": 0, "tail_samples": 4},
            {"signal": "sparse", "temperature": 1.0},
            r"temperature must be the one of the cache's draws .*; 2\), got 1; .*top_k=8",
        ),
        (
            {},
            {"signal": "sparse", "temperature": 3.0},
            r"temperature must be one that the cache holds .*\(1, 2\), got 3; .*replay",
        ),
        ({}, {"temperature": 3.0}, r"temperature must be one that the cache holds .*'replay.topk'"),
        ({}, {"signal": "replay+residual"}, r"residual_samples = 0\); make the cache with"),
        (
            {"residual_samples": 4},
            {"signal": "replay+residual", "temperature": 1.0},
            r"temperature must be the one of the cache's draws .*\(2\), got 1; .*replay\+topk",
        ),
    ],
)
def test_missing_signals_are_refused(held, train, message):
    with pytest.raises(UserError, match=message) as caught:
        required_signals(encoding(**held), TrainConfig(**train))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"signal": "top_k"}, r"signal must be one of replay, replay\+topk, .*, got 'top_k'"),
        ({"signal": "sparse", "alpha_mse": 1.0}, "alpha_mse must be 0 .* got 1; use"),
        ({"alpha_mse": -1.0}, "alpha_mse must be at least 0"),
        (
            {f"alpha_{name}": 0.0 for name in TERMS},
            "alpha_ce, alpha_mlm, alpha_cos, alpha_mse and alpha_rel must not all be 0",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(train, message):
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig(**train)
    assert "\n" not in str(caught.value)


def test_every_signal_finds_what_it_needs():
    rich = encoding(temperatures=(4.0, 2.0), tail_samples=4, residual_samples=4)
    for signal, temperature, column, head, draws in (
        ("replay", 3.0, 0, False, False),
        ("replay+topk", 1.0, 0, True, False),
        ("replay+topk", 2.0, 2, True, False),
        ("replay+residual", 4.0, 1, True, False),
        ("sparse", 4.0, 1, False, True),
        ("sparse", 2.0, 2, False, False),
    ):
        found = required_signals(rich, TrainConfig(signal=signal, temperature=temperature))
        assert (found.temperature_column, found.topk, found.tail_draws) == (column, head, draws)
        assert found.replays == (signal != "sparse")
    plain = encoding(top_k=0, residual_samples=4)
    assert not required_signals(plain, TrainConfig(signal="replay+residual")).topk
    draws_alone = encoding(top_k=0, tail_samples=4)
    assert required_signals(draws_alone, TrainConfig(signal="sparse")).tail_draws


def test_the_default_signal_works_with_the_default_cache(tiny_cache):
    model, data = make(tiny_cache(calibration_sequences=64))
    assert model.signals.ce == "replay+topk"
    loss, _, grads = gradient(model, data[0])
    assert loss.isfinite()
    assert grads.norm() > 0


def test_padding_is_not_counted():
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {
        "input_ids": torch.zeros(2, 4, dtype=torch.int64),
        "attention_mask": attention,
        "labels": torch.zeros(2),
        "ce_index": torch.arange(3),
        "hidden_index": torch.arange(5),
    }
    assert count_positions(batch) == {"ce": 3, "mlm": 2, "cos": 5, "mse": 3, "rel": 6}
    batch |= {"ce_weight": torch.ones(3), "hidden_weight": torch.ones(5)}
    assert count_positions(batch) == {"ce": 6, "mlm": 2, "cos": 6, "mse": 6, "rel": 6}
