"""Choose the basis and the step of the hidden-state codec, once per cache, deterministically.

The basis weighs each direction of the hidden state by its effect on the losses. With the
Gauss-Newton sensitivity of the softened teacher distribution

    S = E[J^T (diag(p) - p p^T) J],   J = d logits / d h,  p = softmax(logits / T),

the metric A = (S + w I)^(1/2) turns replay error into plain Euclidean error; the eigenvectors U of
A Cov(h) A decorrelate it; analysis = A U, synthesis = U^T A^-1. The term w keeps the directions
that only L_cos depends on.

Shapes: ``N`` calibration positions, ``D`` hidden width, ``S`` temperatures, ``V`` vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from distilcache.data.codecs.hidden import LIMIT_MAX, HiddenCodec, with_signs
from distilcache.data.codecs.lm_head import LMHead
from distilcache.data.errors import require
from distilcache.stages.teacher_cache.calibrate_step import step_for

COSINE_WEIGHT = 0.05
"""w as a fraction of the mean sensitivity tr(S) / D."""
PROBES = 2
"""Random probes per position for S."""
LIMIT_MARGIN = 1.25
"""Room above the largest code of each coordinate among the calibration positions."""
LIMIT_SPREADS = 4.5
"""At least this many standard deviations: the largest of a hundred positions is no bound."""
TINY = 1e-300
"""In place of a variance of 0: that of a layer which is the same at every position."""
SENSITIVITY_ROWS = 4096
"""Positions that S is estimated from."""
QUALITY_ROWS = 768
"""Positions that the replay error is measured on."""
BIAS_ROWS = 8192
"""Positions that the replay bias is fitted to."""
SHARES = (0.5, 0.1, 0.4)
"""Time of sensitivity, step and bias, roughly; they tell how far a calibration is."""
CHANCE = 4.0
"""A token's squared mean gap below this many squared standard errors is taken for chance."""


def _unseen(fraction: float) -> None:
    """Nobody watches the progress."""


def calibrate(
    hidden_ND: torch.Tensor,
    lm_head: LMHead | None,
    temperatures: Sequence[float],
    quality: float,
    row_chunk: int = 1024,
    cosine_weight: float = COSINE_WEIGHT,
    progress: Callable[[float], Any] = _unseen,
    what: str = "the states",
) -> HiddenCodec:
    """Fit the codec to calibration positions.

    Args:
        hidden_ND: Hidden states, float32.
        lm_head: The LM head that reads this layer; None for inner layers (then the basis is the
            plain KLT, and ``quality`` is the relative squared error instead).
        temperatures: Temperatures at which the replayed distribution must hold.
        quality: Mean replay KL in nats at the worst of the temperatures.
        row_chunk: Positions per pass of the LM head.
        cosine_weight: w as a fraction of tr(S) / D; towards infinity the basis becomes the KLT.
        progress: Called with the fraction of the work that a part of it has been.
        what: Whose codec it is, for people.
    """
    sensitivity = None
    if lm_head is not None:
        rows = spaced(hidden_ND, SENSITIVITY_ROWS)
        felt = _sensitivity(rows, lm_head, temperatures, row_chunk, progress)
        require(
            0 < float(felt.trace()) < float("inf"),
            "teacher: model's logits must depend on its hidden states, got the same ones whatever "
            "they are; correct its config.json (epsilon of its norms), or use another checkpoint",
        )
        floor = cosine_weight * felt.trace() / len(felt)
        sensitivity = felt + floor * torch.eye(len(felt), dtype=felt.dtype)
    mean, analysis, synthesis, scale = basis_of(hidden_ND, sensitivity)

    def codec(step: float) -> HiddenCodec:
        return with_limits(mean, analysis, synthesis, step, hidden_ND)

    rows = spaced(hidden_ND, QUALITY_ROWS)

    def error(step: float) -> float:
        decoded = _round_trip(codec(step), rows)
        if lm_head is None:
            spread = (rows - mean.to(rows.device)).double().pow(2).sum().clamp_min(TINY)
            return float((decoded - rows).double().pow(2).sum() / spread)
        return max(replay_kl(rows, decoded, lm_head, temperatures, row_chunk))

    share, unit = (1.0, "of the variance") if lm_head is None else (SHARES[1], "nats")
    step = step_for(quality, error, scale, lambda part: progress(share * part), what, unit)
    fitted = codec(step)
    if lm_head is None:
        return fitted
    rows = spaced(hidden_ND, BIAS_ROWS)
    decoded = _round_trip(fitted, rows)
    bias = replay_bias(rows, decoded, lm_head, temperatures, row_chunk, progress)
    return replace(fitted, replay_bias=bias, temperatures=tuple(temperatures))


def spaced(hidden_ND: torch.Tensor, count: int) -> torch.Tensor:
    """At most ``count`` rows, evenly spaced: neighbours are of one text."""
    count = min(count, len(hidden_ND))
    index = torch.arange(count, device=hidden_ND.device) * len(hidden_ND) // max(1, count)
    return hidden_ND.index_select(0, index)


def basis_of(
    hidden_ND: torch.Tensor, metric: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Mean, analysis and synthesis (float32), and the typical spread of a coordinate.

    ``metric`` is S + w I, float64 [D, D]; None: the identity, which gives the plain KLT.
    """
    centred = hidden_ND.double()
    mean = centred.mean(0)
    centred -= mean
    # Passes over positions run on the teacher's device, the small eigenproblems on the CPU.
    covariance = (centred.T @ centred / len(centred)).cpu()
    mean = mean.cpu()
    if metric is None:
        metric = torch.eye(len(mean), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.sqrt() @ vectors.T
    inverse_root = vectors / values.sqrt() @ vectors.T
    spread, basis = torch.linalg.eigh(root @ covariance @ root)
    basis = with_signs(basis.flip(1))
    # The second term is for a few equal positions, whose spread is 0.
    typical = spread.clamp_min(0).mean().sqrt()
    scale = max(float(typical), 1e-3 * float((root @ mean).norm()), 1e-12)
    return mean.float(), (root @ basis).float(), (basis.T @ inverse_root).float(), scale


def replay_bias(
    hidden_ND: torch.Tensor,
    decoded_ND: torch.Tensor,
    lm_head: LMHead,
    temperatures: Sequence[float],
    row_chunk: int = 1024,
    progress: Callable[[float], Any] = _unseen,
) -> torch.Tensor:
    """What to add to replayed logits so that replay is right on average, float32 [S, V].

    Rounding noise in a logit raises the expectation of its exponential, and more so for tokens
    whose decoder rows are long: the replayed distribution is biased towards them, and this bias
    does not average out over positions. The bias moves the mean replayed distribution to the mean
    true one, b_v = s_v T log(mean p_v / mean p_hat_v). Both means are over few positions, so each
    token's correction is shrunk by the part of it that may be chance (after James and Stein 1961),
    s_v = max(0, 1 - 4 var(p_v - p_hat_v) / (N mean(p_v - p_hat_v)^2)). Without shrinking it did
    harm at T = 1, where the bias is small.
    """
    shape = (3, len(temperatures), len(lm_head.decoder_bias))
    sums = torch.zeros(shape, dtype=torch.float64, device=hidden_ND.device)
    for h, h_hat in zip(
        torch.split(hidden_ND, row_chunk), torch.split(decoded_ND, row_chunk), strict=True
    ):
        true, replayed = lm_head(h), lm_head(h_hat)
        for i, temperature in enumerate(temperatures):
            p = (true / temperature).softmax(-1)
            q = (replayed / temperature).softmax(-1)
            sums[0, i] += p.sum(0, dtype=torch.float64)
            sums[1, i] += q.sum(0, dtype=torch.float64)
            sums[2, i] += (p - q).square_().sum(0, dtype=torch.float64)
        progress(SHARES[2] * 2 / 3 * len(h) / len(hidden_ND))
    wanted, found, squares = sums / len(hidden_ND)
    gap = (wanted - found).square()
    chance = (squares - gap) / len(hidden_ND)
    shrunk = torch.where(gap > 0, 1 - CHANCE * chance / gap, 0.0).clamp_min(0)
    bias_SV = _correction(wanted, found, temperatures)
    found.zero_()
    for h_hat in torch.split(decoded_ND, row_chunk):
        replayed = lm_head(h_hat)
        for i, temperature in enumerate(temperatures):
            q = ((replayed + bias_SV[i]) / temperature).softmax(-1)
            found[i] += q.sum(0, dtype=torch.float64)
        progress(SHARES[2] / 3 * len(h_hat) / len(hidden_ND))
    # The first correction changes the normaliser of each row; the second makes up for that.
    bias_SV += _correction(wanted, found / len(hidden_ND), temperatures)
    return (shrunk * bias_SV).float().cpu()


def _correction(
    wanted_SV: torch.Tensor, found_SV: torch.Tensor, temperatures: Sequence[float]
) -> torch.Tensor:
    """T log(wanted / found); 0 for tokens that no position gives any mass."""
    known = (wanted_SV > 0) & (found_SV > 0)
    ratio = torch.where(known, wanted_SV / found_SV.clamp_min(1e-300), 1.0)
    return (ratio.log() * ratio.new_tensor(temperatures)[:, None]).float()


def replay_kl(
    hidden_ND: torch.Tensor,
    decoded_ND: torch.Tensor,
    lm_head: LMHead,
    temperatures: Sequence[float],
    row_chunk: int = 1024,
) -> list[float]:
    """Mean KL(p_T || p_hat_T) in nats between true and replayed distributions, per temperature."""
    totals = [0.0] * len(temperatures)
    for h, h_hat in zip(
        torch.split(hidden_ND, row_chunk), torch.split(decoded_ND, row_chunk), strict=True
    ):
        true, replayed = lm_head(h), lm_head(h_hat)
        for i, temperature in enumerate(temperatures):
            p = (true / temperature).log_softmax(-1)
            q = (replayed / temperature).log_softmax(-1)
            totals[i] += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return [total / len(hidden_ND) for total in totals]


def _sensitivity(
    hidden_ND: torch.Tensor,
    lm_head: LMHead,
    temperatures: Sequence[float],
    row_chunk: int,
    progress: Callable[[float], Any] = _unseen,
) -> torch.Tensor:
    """Estimate S, mean over temperatures, float64 [D, D].

    Noise with the Fisher covariance of the softened distribution is propagated back.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(hidden_ND.shape[1], hidden_ND.shape[1], dtype=torch.float64)
    with torch.enable_grad():
        for rows in torch.split(hidden_ND, row_chunk):
            rows = rows.clone().requires_grad_(True)
            logits = lm_head(rows)
            for _ in range(PROBES):
                noise = torch.randn(logits.shape, generator=generator).to(logits.device)
                for temperature in temperatures:
                    p = (logits.detach() / temperature).softmax(-1)
                    probe = p.sqrt() * noise
                    probe -= p * probe.sum(-1, keepdim=True)
                    (grad,) = torch.autograd.grad(logits, rows, probe, retain_graph=True)
                    total += (grad.T @ grad).double().cpu() / temperature**2
            progress(SHARES[0] * len(rows) / len(hidden_ND))
    return total / (PROBES * len(hidden_ND) * len(temperatures))


def _round_trip(codec: HiddenCodec, hidden_ND: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(hidden_ND)[0])


def with_limits(
    mean: torch.Tensor,
    analysis: torch.Tensor,
    synthesis: torch.Tensor,
    step: float,
    hidden_ND: torch.Tensor,
) -> HiddenCodec:
    """The codec at one step, with room for the codes of the calibration positions and more.

    Where codes would be too large for their type, the step is the least one that fits.
    """
    device = hidden_ND.device
    coordinates = (hidden_ND - mean.to(device)) @ analysis.to(device)
    largest = coordinates.abs().amax(0) * LIMIT_MARGIN
    largest = torch.maximum(largest, coordinates.pow(2).mean(0).sqrt() * LIMIT_SPREADS)
    step = max(step, float(largest.max()) / (LIMIT_MAX - 1))
    limits = (largest / step).ceil().add(1).clamp_max(LIMIT_MAX).to(torch.int32)
    return HiddenCodec(mean, analysis, synthesis, step, tuple(limits.tolist()))
