"""The codec's basis and step: the named quality is met, and the basis is the better one."""

import math

import pytest
import torch

from distilcache.data.codecs.hidden import LIMIT_MAX, HiddenCodec, with_signs
from distilcache.data.errors import UserError
from distilcache.stages.teacher_cache import calibrate as calibration
from distilcache.stages.teacher_cache import calibrate_step
from distilcache.stages.teacher_cache.calibrate import (
    COSINE_WEIGHT,
    LIMIT_MARGIN,
    LIMIT_SPREADS,
    _sensitivity,
    calibrate,
    replay_kl,
)
from tests.stages.teacher_cache.calibrate_support import D, make_head, round_trip, states


def codes_of(codec: HiddenCodec, hidden: torch.Tensor) -> torch.Tensor:
    """Codes [D, N]."""
    return codec.packing.table(hidden.device).unpack(codec.encode(hidden)[0])


def code_entropy(codec: HiddenCodec, hidden: torch.Tensor) -> float:
    """Bits per position if every coordinate were coded on its own."""
    bits = 0.0
    for codes in codes_of(codec, hidden):
        p = codes.unique(return_counts=True)[1].double() / codes.numel()
        bits -= float((p * p.log2()).sum())
    return bits


@pytest.mark.parametrize("temperatures", [(2.0,), (1.0,), (1.0, 4.0)])
@pytest.mark.parametrize("quality", [1e-2, 1e-3, 1e-4])
def test_the_named_quality_is_met(temperatures, quality):
    head, hidden = make_head(), states()
    codec = calibrate(hidden, head, temperatures, quality)
    worst = max(replay_kl(hidden, round_trip(codec, hidden), head, temperatures))
    assert worst == pytest.approx(quality, rel=0.15)


def test_replay_kl_equals_the_dense_formula():
    head, hidden = make_head(), states(50)
    other = hidden + 0.1
    p = (head(hidden).double() / 2).softmax(-1)
    q = (head(other).double() / 2).softmax(-1)
    expected = float((p * (p.log() - q.log())).sum(-1).mean())
    assert replay_kl(hidden, other, head, (2.0,), row_chunk=7) == pytest.approx(
        [expected], rel=1e-3
    )
    assert replay_kl(hidden, hidden, head, (2.0,)) == pytest.approx([0], abs=1e-7)


def test_sensitivity_is_the_gauss_newton_matrix():
    """The random probes estimate E[J^T (diag(p) - p p^T) J] / T^2, here summed exactly."""
    head, hidden = make_head(), states(80)
    # What moves all logits alike is not felt: without -p p^T this direction would dominate.
    head.decoder_weight += 2 * torch.randn(1, D, generator=torch.Generator().manual_seed(9))
    exact = torch.zeros(D, D, dtype=torch.float64)
    for row in hidden:
        jacobian = torch.autograd.functional.jacobian(lambda h: head(h[None])[0], row).double()
        p = (head(row[None])[0] / 2).softmax(-1).double()
        fisher = torch.diag(p) - p[:, None] * p[None]
        exact += jacobian.T @ fisher @ jacobian / (len(hidden) * 4)
    estimated = _sensitivity(hidden.repeat(150, 1), head, (2.0,), 1024)
    assert float((estimated - exact).norm() / exact.norm()) < 0.15
    assert float(estimated.trace() / exact.trace()) == pytest.approx(1, abs=0.05)


def test_synthesis_inverts_analysis():
    codec = calibrate(states(), make_head(), (2.0,), 1e-3)
    torch.testing.assert_close(codec.analysis @ codec.synthesis, torch.eye(D), rtol=0, atol=1e-4)


def test_coordinates_are_uncorrelated_and_fall_in_variance():
    hidden = states()
    codec = calibrate(hidden, make_head(), (2.0,), 1e-3)
    coordinates = (hidden - codec.mean).double() @ codec.analysis.double()
    covariance = coordinates.T @ coordinates / len(hidden)
    variance = covariance.diagonal()
    assert (variance.diff() <= 1e-6 * variance[0]).all()
    correlation = covariance / (variance[:, None] * variance[None]).sqrt()
    assert float((correlation - torch.eye(D)).abs().max()) < 2e-2
    torch.testing.assert_close(codec.mean, hidden.mean(0), rtol=1e-4, atol=1e-4)


def test_the_sensitivity_basis_needs_fewer_bits_than_the_klt():
    """At the same replay error: what the whole construction is for."""
    hidden, head = states(), make_head()
    codec = calibrate(hidden, head, (2.0,), 1e-3)
    values, vectors = torch.linalg.eigh(torch.cov(hidden.T.double()))
    basis = vectors.flip(1).float()
    low, high = 1e-4, 10.0
    for _ in range(30):
        step = math.sqrt(low * high)
        klt = HiddenCodec(hidden.mean(0), basis, basis.T.contiguous(), step, (LIMIT_MAX,) * D)
        worse = replay_kl(hidden, round_trip(klt, hidden), head, (2.0,))[0] > 1e-3
        low, high = (low, step) if worse else (step, high)
    assert code_entropy(codec, hidden) < 0.95 * code_entropy(klt, hidden)


def test_inner_layers_take_the_klt_and_a_relative_error():
    hidden = states()
    codec = calibrate(hidden, None, (2.0,), 1e-3)
    error = (round_trip(codec, hidden) - hidden).pow(2).sum()
    error /= (hidden - hidden.mean(0)).pow(2).sum()
    assert float(error) == pytest.approx(1e-3, rel=0.15)
    torch.testing.assert_close(codec.analysis @ codec.analysis.T, torch.eye(D), rtol=0, atol=1e-4)


@pytest.mark.parametrize("quality", [1e-1, 1e-3, 1e-5])
def test_one_pass_is_enough_where_the_error_grows_as_the_square_of_the_step(monkeypatch, quality):
    hidden = states()
    noise = torch.randn(D, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(calibrate_step, "STEP_ITERATIONS", 1)
    monkeypatch.setattr(calibration, "_round_trip", lambda codec, rows: rows + codec.step * noise)
    step = calibrate(hidden, None, (2.0,), quality).step
    rows = calibration.spaced(hidden, calibration.QUALITY_ROWS)
    error = step**2 * noise.square().sum() / (rows - hidden.mean(0)).square().sum(1).mean()
    assert float(error) == pytest.approx(quality, rel=1e-4)


@pytest.mark.parametrize("quality", [1e-1, 1e-3, 1e-6])
def test_limits_leave_room(quality):
    """A quarter above all calibration codes, and 4.5 spreads: so little clips later."""
    hidden = states()
    codec = calibrate(hidden, make_head(), (2.0,), quality)
    codes = codes_of(codec, hidden)
    assert int(codec.encode(hidden)[1]) == 0
    limits = torch.tensor(codec.limits)
    assert (limits >= LIMIT_MARGIN * (codes.abs().amax(1) - 0.5)).all()
    assert (limits >= LIMIT_SPREADS * (codes.float().pow(2).mean(1).sqrt() - 0.5)).all()
    assert (limits <= 2 + 1.6 * LIMIT_MARGIN * (codes.abs().amax(1) + 1)).all()
    assert ((limits >= 1) & (limits <= LIMIT_MAX)).all()


@pytest.mark.parametrize("has_head", [True, False])
def test_a_quality_out_of_reach_gives_the_finest_code_that_fits(has_head):
    head, hidden = make_head() if has_head else None, states()
    codec = calibrate(hidden, head, (2.0,), 1e-16)
    again = round_trip(codec, hidden)
    assert int(codec.encode(hidden)[1]) == 0
    if head is None:
        assert float((again - hidden).pow(2).mean() / hidden.var()) < 1e-7
    else:
        assert replay_kl(hidden, again, head, (2.0,))[0] < 1e-6


@pytest.mark.parametrize("sharpness", [1, 30, 300])
def test_no_code_is_much_coarser_than_asked(sharpness, capsys):
    """Where the LM head is sharp, few positions make the error, and it leaps from step to step."""
    head, hidden = make_head(scale=sharpness), states()
    codec = calibrate(hidden, head, (2.0,), 1e-3)
    rows = calibration.spaced(hidden, calibration.QUALITY_ROWS)
    assert replay_kl(rows, round_trip(codec, rows), head, (2.0,))[0] <= 1.5e-3
    assert capsys.readouterr().err == ""


def test_a_quality_that_no_code_has_is_told(capsys):
    head, hidden = make_head(scale=300), states()
    codec = calibrate(hidden, head, (2.0,), 1e-5)
    rows = calibration.spaced(hidden, calibration.QUALITY_ROWS)
    found = replay_kl(rows, round_trip(codec, rows), head, (2.0,))[0]
    assert found > 1.5e-5
    line = f"code of the states has an error of {found:.2g} nats where 1e-05 were asked for"
    assert line in capsys.readouterr().err


def test_a_quality_that_no_inner_layer_has_is_told_in_its_own_unit(capsys):
    hidden = states()
    codec = calibrate(hidden, None, (2.0,), 1e-16, what="layer 3")
    rows = calibration.spaced(hidden, calibration.QUALITY_ROWS)
    lost = (round_trip(codec, rows) - rows).double().square().sum()
    found = float(lost / (rows - codec.mean).double().square().sum())
    line = f"code of layer 3 has an error of {found:.2g} of the variance where 1e-16 were asked for"
    assert line in capsys.readouterr().err


def test_finer_steps_take_more_planes():
    hidden = states()
    planes = [
        calibrate(hidden, make_head(), (2.0,), quality).packing.planes
        for quality in (1e-1, 1e-3, 1e-6)
    ]
    assert planes[0] < planes[1] < planes[2]
    assert planes[1] < D  # several codes to a byte at the default quality
    assert planes[2] > D  # and more than a byte for some at this one


def test_the_same_positions_give_the_same_codec():
    hidden, head = states(), make_head()
    first, second = (calibrate(hidden.clone(), head, (2.0,), 1e-3) for _ in range(2))
    torch.manual_seed(123)
    third = calibrate(hidden, head, (2.0,), 1e-3, row_chunk=1024)
    for codec in (second, third):
        assert codec.step == first.step
        assert torch.equal(codec.analysis, first.analysis)
        assert torch.equal(codec.synthesis, first.synthesis)


def test_the_sign_of_an_eigenvector_does_not_matter():
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))[0]
    signs = torch.where(torch.arange(D) % 3 == 0, -1.0, 1.0)
    assert torch.equal(with_signs(basis * signs), with_signs(basis))
    torch.testing.assert_close(with_signs(basis).abs(), basis.abs())


def test_random_state_of_the_run_is_not_touched():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    calibrate(states(200), make_head(), (2.0,), 1e-2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("rows", [1, 3, D])
def test_few_positions_still_give_an_invertible_basis(rows):
    """A tiny corpus: the covariance is singular, the metric is not."""
    hidden = states(rows)
    codec = calibrate(hidden, make_head(), (2.0,), 1e-3)
    assert math.isfinite(codec.step)
    assert codec.step > 0
    torch.testing.assert_close(codec.analysis @ codec.synthesis, torch.eye(D), rtol=0, atol=1e-3)
    assert round_trip(codec, hidden).isfinite().all()


def test_an_lm_head_that_hears_nothing_is_refused():
    head = make_head()
    head.eps = float("inf")
    with pytest.raises(UserError, match="logits must depend on its hidden states"):
        calibrate(states(), head, (2.0,), 1e-3)


def test_an_inner_layer_that_is_the_same_everywhere_is_kept():
    hidden = torch.ones(50, D)
    codec = calibrate(hidden, None, (2.0,), 1e-3)
    assert torch.allclose(round_trip(codec, hidden), hidden, atol=1e-3)


def test_a_dead_dimension_does_no_harm():
    hidden = states()
    hidden[:, 7] = 2.5
    codec = calibrate(hidden, make_head(), (2.0,), 1e-3)
    torch.testing.assert_close(round_trip(codec, hidden)[:, 7], hidden[:, 7], rtol=0, atol=0.2)


def test_directions_that_only_the_cosine_feels_are_kept():
    """A head blind to half of the directions: the share w still stores them coarsely."""
    head = make_head()
    head.dense_weight[:, D // 2 :] = 0
    hidden = states()
    hidden[:, D // 2 :] *= 5
    decoded = round_trip(calibrate(hidden, head, (2.0,), 1e-4), hidden)
    assert COSINE_WEIGHT > 0
    assert float(torch.cosine_similarity(decoded, hidden).mean()) > 0.95


def test_the_basis_is_fitted_to_positions_of_all_texts(monkeypatch):
    """The first half of the positions does not vary where the second does."""
    hidden = states(400)
    hidden[:200, 3] = 0.0
    hidden[200:, 3] *= 50
    seen = []

    def sensitivity(rows, *_):
        seen.append(rows)
        return torch.eye(D, dtype=torch.float64)

    monkeypatch.setattr("distilcache.stages.teacher_cache.calibrate._sensitivity", sensitivity)
    monkeypatch.setattr("distilcache.stages.teacher_cache.calibrate.SENSITIVITY_ROWS", 100)
    calibrate(hidden, make_head(), (2.0,), 1e-2)
    assert torch.equal(seen[0], hidden[::4])


def test_a_calibration_tells_how_far_it_is():
    moved = []
    calibrate(states(600), make_head(), (1.0, 2.0), 1e-3, row_chunk=100, progress=moved.append)
    assert sum(moved) == pytest.approx(1.0)
    assert len(moved) > 20
    assert max(moved) < 0.1
