"""The bias of replayed logits: what it puts right, and that it fits no chance."""

import pytest
import torch

from distilcache.stages.teacher_cache.calibrate import (
    calibrate,
    replay_bias,
)
from tests.stages.teacher_cache.calibrate_support import V, make_head, round_trip, states


def mean_distributions(head, hidden, decoded, temperature, bias=0.0):
    found = [head(hidden), head(decoded) + bias]
    return [(z.double() / temperature).softmax(-1).mean(0) for z in found]


def divergence(p, q):
    return float((p * (p.log() - q.log())).sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_bias_moves_the_mean_replayed_distribution_to_the_true_one(temperature):
    head, hidden = make_head(), states()
    codec = calibrate(hidden, head, (temperature,), 5e-2)
    assert codec.temperatures == (temperature,)
    bias = codec.bias_at(temperature)
    assert (bias.dtype, tuple(bias.shape)) == (torch.float32, (V,))
    decoded = round_trip(codec, hidden)
    plain = divergence(*mean_distributions(head, hidden, decoded, temperature))
    corrected = divergence(*mean_distributions(head, hidden, decoded, temperature, bias))
    assert plain > 1e-5
    assert corrected < plain  # by how much depends on what may be chance


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chance_is_not_fitted(temperature):
    """With a fine code the bias is mostly chance: at other positions it must do no harm."""
    head, hidden = make_head(), states(4000)
    codec = calibrate(hidden[:1000].clone(), head, (temperature,), 1e-3)
    rest = hidden[1000:]
    decoded, bias = round_trip(codec, rest), codec.bias_at(temperature)
    plain = divergence(*mean_distributions(head, rest, decoded, temperature))
    corrected = divergence(*mean_distributions(head, rest, decoded, temperature, bias))
    assert corrected < 1.1 * plain


def test_the_bias_holds_for_positions_that_it_was_not_fitted_to():
    """Where rounding moves the mean by more than the fitted positions scatter."""
    head, hidden = make_head(), states(16000)
    codec = calibrate(hidden[::2].clone(), head, (4.0,), 5e-2)
    rest = hidden[1::2]
    decoded, bias = round_trip(codec, rest), codec.bias_at(4.0)
    plain = divergence(*mean_distributions(head, rest, decoded, 4.0))
    corrected = divergence(*mean_distributions(head, rest, decoded, 4.0, bias))
    assert corrected < 0.1 * plain


def test_the_bias_does_not_cost_quality():
    head, hidden = make_head(), states()
    codec = calibrate(hidden, head, (2.0,), 1e-2)
    decoded = round_trip(codec, hidden)
    p = (head(hidden).double() / 2).log_softmax(-1)
    kls = []
    for bias in (0.0, codec.bias_at(2.0)):
        q = ((head(decoded) + bias).double() / 2).log_softmax(-1)
        kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert kls[1] < kls[0]


def test_a_constant_error_of_the_logits_is_taken_back_exactly():
    """Replay through a head whose bias is off by c: the fit is -c, up to a constant for all."""
    true, wrong, hidden = make_head(), make_head(), states(400)
    off = torch.randn(V, generator=torch.Generator().manual_seed(4))
    wrong.decoder_bias += off

    class Either(torch.nn.Module):
        """The last unit says which head."""

        decoder_bias = true.decoder_bias

        def forward(self, rows):
            return (wrong if rows[0, -1] else true)(rows[:, :-1])

    marked = [torch.cat([hidden, torch.full((400, 1), mark)], 1) for mark in (0.0, 1.0)]
    found = replay_bias(*marked, Either(), (2.0,), row_chunk=64)[0]
    found, off = found - found.mean(), off - off.mean()
    assert float((found + off).abs().max()) < 0.05 * float(off.abs().max())
    assert float(replay_bias(hidden, hidden, true, (2.0,)).abs().max()) < 1e-5


def test_inner_layers_have_no_bias():
    codec = calibrate(states(), None, (2.0,), 1e-3)
    assert (codec.replay_bias, codec.temperatures) == (None, ())
    assert codec.bias_at(2.0) is None
