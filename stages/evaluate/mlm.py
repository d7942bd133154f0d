"""Masked-LM quality on held-out text, and agreement with the teacher.

Shapes: M masked positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilcache.data.progress import Bar
from distilcache.stages.evaluate.common_ids import Asked
from distilcache.stages.evaluate.heldout import Batch, HeldOut, padded_batches
from distilcache.stages.models.device import autocast
from distilcache.stages.models.encoder import own_logits

# Logits per model and batch: 2^25 float32 values are 128 MiB.
_BATCH_LOGITS = 2**25
ECE_BINS = 15  # Guo et al. 2017


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Figures of one model, as means over the masked positions."""

    mlm_nll: float
    """Cross-entropy in nats."""
    mlm_nll_stderr: float
    """Standard error of ``mlm_nll`` over masked positions."""
    mlm_top1: float
    """Fraction of the masked tokens that the model ranks first."""
    teacher_kl: float | None
    """KL(teacher || model) in nats at T = 1; None if no teacher is measured."""
    teacher_top1_agreement: float | None
    """Fraction of the positions where teacher and model rank the same token first."""
    ece: float
    """Expected calibration error of the first choice, see :func:`calibration_gaps`."""


def quality_batch_size(heldout: HeldOut, vocab_size: int, limit: int) -> int:
    """Sequences per batch: ``limit``, or fewer if their logits would be too large."""
    widest = max(1, int(heldout.masked_counts.max()))
    return max(1, min(limit, _BATCH_LOGITS // (widest * vocab_size)))


def masked_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [M, V] at the masked positions, in float32."""
    logits_MV = own_logits(model, batch.input_ids, batch.attention_mask, batch.masked_index)
    return logits_MV.float()


def calibration_gaps(confidence_M: Tensor, hits_M: Tensor) -> Tensor:
    """Sums for the expected calibration error (Guo et al. 2017, arXiv:1706.04599, section 2).

    Bin b holds the positions with a confidence in ((b - 1) / 15, b / 15]::

        ECE = sum_b n_b / n |accuracy_b - confidence_b| = sum_b |sum_{i in b} (conf_i - hit_i)| / n

    so one signed sum per bin is enough. Bins are compared, not indexed, which would need atomic
    additions in varying order.

    Args:
        confidence_M: Probability of the first choice [M].
        hits_M: Whether it is right, bool [M].

    Returns:
        float64 [15]: sum of confidence - hit in each bin.
    """
    bin_M = (confidence_M * ECE_BINS).ceil().clamp(1, ECE_BINS)
    bins = torch.arange(1, ECE_BINS + 1, device=confidence_M.device)
    gap_M = confidence_M.double() - hits_M.double()
    return gap_M @ (bin_M[:, None] == bins).double()


class _Sums:
    """Running sums of one model, kept on the device until the end."""

    def __init__(self, device: torch.device) -> None:
        # nll, nll squared, own hits, KL, hits of the teacher's first choice
        self.values = torch.zeros(5, dtype=torch.float64, device=device)
        self.gaps = torch.zeros(ECE_BINS, dtype=torch.float64, device=device)

    def add(self, log_p_MV: Tensor, labels_M: Tensor, teacher_MV: Tensor | None) -> None:
        """Add one batch of log-probabilities."""
        nll_M = F.nll_loss(log_p_MV, labels_M, reduction="none").double()
        confidence_M, best_M = log_p_MV.max(dim=-1)
        hits_M = best_M == labels_M
        self.gaps += calibration_gaps(confidence_M.exp(), hits_M)
        sums = [nll_M.sum(), nll_M.square().sum(), hits_M.sum()]
        if teacher_MV is not None:
            kl_M = (teacher_MV.exp() * (teacher_MV - log_p_MV)).sum(dim=-1)
            sums += [kl_M.double().sum(), (best_M == teacher_MV.argmax(dim=-1)).sum()]
        self.values[: len(sums)] += torch.stack([value.double() for value in sums])

    def result(self, count: int, with_teacher: bool) -> Quality:
        """Means over ``count`` masked positions."""
        nll, square, top1, kl, agree = (self.values / count).tolist()
        return Quality(
            mlm_nll=nll,
            mlm_nll_stderr=(max(square - nll * nll, 0.0) / count) ** 0.5,
            mlm_top1=top1,
            # Of equal distributions, rounding may leave a negative 1e-9. NaN first stays NaN.
            teacher_kl=max(kl, 0.0) if with_teacher else None,
            teacher_top1_agreement=agree if with_teacher else None,
            ece=float(self.gaps.abs().sum()) / count,
        )


def measure_quality(
    models: Sequence[nn.Module],
    teacher: int | None,
    asked: Sequence[Asked],
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Quality]:
    """Score every model on the same batches.

    The teacher's log-probabilities of a batch are computed once, compared with every model, and
    dropped.

    Args:
        models: Masked LMs on ``device``, in evaluation mode.
        teacher: Index of the teacher in ``models``; None: no agreement is measured.
        asked: The same masked sequences for each model, in its ids. Probabilities are normalised
            over the ids that all models have.
        batch_size: Sequences per batch.
        device: Device of the models.
        dtype: Autocast type of matrix products; losses are float32.
    """
    columns = [of_one.columns_C.to(device) for of_one in asked]

    def log_probs(index: int, batches: Sequence[Batch]) -> Tensor:
        logits_MV = masked_logits(models[index], batches[index])
        return F.log_softmax(logits_MV.index_select(1, columns[index]), dim=-1)

    sums = [_Sums(device) for _ in models]
    order = [i for i in range(len(models)) if i != teacher]
    read = [
        padded_batches(of_one.heldout, batch_size=batch_size, pad_id=of_one.pad_id, device=device)
        for of_one in asked
    ]
    total = -(-len(asked[0].heldout.lengths) // batch_size)
    with torch.inference_mode(), autocast(device, dtype):
        for batches in Bar(zip(*read, strict=True), total=total, desc="quality", unit="batch"):
            labels_M = batches[0].labels  # places among the ids of all models
            teacher_MV = None
            if teacher is not None:
                teacher_MV = log_probs(teacher, batches)
                sums[teacher].add(teacher_MV, labels_M, teacher_MV)
            for i in order:
                sums[i].add(log_probs(i, batches), labels_M, teacher_MV)
    return [s.result(len(asked[0].heldout.labels), teacher is not None) for s in sums]
