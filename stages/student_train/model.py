"""The student inside its distillation losses: one forward, one loss.

Shapes: ``B`` sequences, ``L`` positions, ``N`` positions with teacher signals, ``M`` masked
positions, ``V`` vocabulary, ``D`` hidden width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DistilBertForMaskedLM

from data.errors import require
from data.schema import Encoding
from stages.student_train.config import TrainConfig
from stages.student_train.head_loss import FullTarget, SparseTarget, head_loss
from stages.student_train.losses import cosine_distance, sparse_log_probs

TERMS = ("ce", "mlm", "cos")
"""Loss terms, in the order of :class:`DistillationModel`'s second result."""


@dataclass(frozen=True, slots=True)
class Signals:
    """Which of the teacher's signals the losses of a run read."""

    ce: str | None
    """``replay``, ``sparse``, or None: no L_ce."""
    cos: bool
    temperature_column: int = 0
    """Sparse: column of the cache's logsumexp and tail mass that holds T."""

    @property
    def hidden(self) -> bool:
        """Whether stored hidden states are read."""
        return self.cos or self.ce == "replay"


def required_signals(encoding: Encoding, train: TrainConfig) -> Signals:
    """Match the losses of a run with what the cache holds.

    Raises:
        UserError: A loss with a weight above 0 needs a signal that is not stored.
    """
    ce = train.signal if train.alpha_ce > 0 else None
    cos = train.alpha_cos > 0
    if ce is None and not cos:
        return Signals(None, False)
    require(
        not encoding.mask_only,
        "train: alpha_ce and alpha_cos must be 0 on a mask-only cache, got "
        f"{train.alpha_ce} and {train.alpha_cos}; make a cache with a teacher",
    )
    has_hidden = encoding.hidden_layer() is not None
    stored = ", ".join(str(h.layer) for h in encoding.hidden) or "none"
    require(
        ce != "replay" or has_hidden,
        "train: signal must be 'sparse' where the cache has no hidden states of the last layer, "
        f"got 'replay' (stored layers: {stored}); make the cache with cache.hidden_layers=[-1]",
    )
    require(
        not cos or has_hidden,
        "train: alpha_cos must be 0 where the cache has no hidden states of the last layer, got "
        f"{train.alpha_cos:g} (stored layers: {stored}); make the cache with "
        "cache.hidden_layers=[-1]",
    )
    if ce != "sparse":
        return Signals(ce, cos)
    require(
        encoding.top_k > 0,
        "train: signal must be 'replay' where the cache has no logits, got 'sparse' (top_k = 0); "
        "make the cache with cache.top_k=8",
    )
    held = (1.0, *encoding.temperatures)
    require(
        train.temperature in held,
        f"train: temperature must be one that the cache holds in sparse mode "
        f"({', '.join(f'{t:g}' for t in held)}), got {train.temperature:g}; make the cache with "
        f"cache.temperatures=[{train.temperature:g}] or use --set train.signal=replay",
    )
    return Signals(ce, cos, held.index(train.temperature))


class DistillationModel(nn.Module):
    """A student with the losses of one run; only student and projection are trained and saved.

    Args:
        student: The model that is trained.
        train: Weights of the losses, temperature, rows per pass.
        signals: What the batches hold.
        lm_head: The teacher's frozen head (``transform``, ``decoder_weight``, ``decoder_bias``);
            for ``replay``.
        hidden_decoder: Stored hidden states of the teacher's last layer, batch -> [N, D].
        teacher_width: D of the teacher. Where it differs from the student's, L_cos goes through
            a linear projection that is trained along and dropped at export.
    """

    accepts_loss_kwargs = True  # The loss is already divided by the counts of the whole step.

    def __init__(
        self,
        student: DistilBertForMaskedLM,
        *,
        train: TrainConfig,
        signals: Signals,
        lm_head: nn.Module | None = None,
        hidden_decoder: nn.Module | None = None,
        teacher_width: int | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.train_config = train
        self.signals = signals
        width = student.config.dim
        self.projection: nn.Module = nn.Identity()
        if signals.cos and teacher_width is not None and teacher_width != width:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(train.seed)
                self.projection = nn.Linear(width, teacher_width)
        self.lm_head = lm_head
        self.hidden_decoder = hidden_decoder
        for frozen in (lm_head, hidden_decoder):
            if frozen is not None:
                frozen.requires_grad_(False)
        self._decoder: Tensor | None = None

    def trained_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: every trained tensor once, without the frozen teacher."""
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    def forward(
        self, batch: Mapping[str, Tensor], counts: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss of one micro-batch.

        Args:
            batch: See :class:`data.dataset.CachedBatches`.
            counts: Positions per term (``TERMS``) over ALL micro-batches and devices of the step.

        Returns:
            ``alpha_ce L_ce + alpha_mlm L_mlm + alpha_cos L_cos``, each divided by its count, and
            the undivided sums of the three terms, detached.
        """
        train, signals = self.train_config, self.signals
        hidden_BLD = self.student.distilbert(
            input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")
        ).last_hidden_state
        hidden = hidden_BLD.flatten(0, 1)
        teacher_ND = self._teacher_hidden(batch)
        index_N, labels_N = _head_rows(batch, signals.ce is not None)
        rows_ND = hidden.index_select(0, index_N)
        loss, ce, mlm = head_loss(
            self._head_transform(rows_ND),
            self.student.vocab_projector.weight,
            self.student.vocab_projector.bias,
            target=self._target(batch, teacher_ND),
            labels_N=labels_N if train.alpha_mlm > 0 else None,
            temperature=train.temperature,
            ce_weight=train.alpha_ce / max(counts["ce"], 1),
            mlm_weight=train.alpha_mlm / max(counts["mlm"], 1),
            row_chunk=train.row_chunk,
        )
        cos = torch.zeros_like(ce)
        if signals.cos and teacher_ND is not None:
            same_rows = index_N is batch["signal_index"]
            if not same_rows:
                rows_ND = hidden.index_select(0, batch["signal_index"])
            cos = cosine_distance(self.projection(rows_ND), teacher_ND)
            loss = loss + train.alpha_cos / max(counts["cos"], 1) * cos
        return loss, torch.stack([ce, mlm, cos.detach()])

    def _head_transform(self, rows_ND: Tensor) -> Tensor:
        student: Any = self.student
        rows = student.vocab_layer_norm(student.activation(student.vocab_transform(rows_ND)))
        return rows  # type: ignore[no-any-return]

    @torch.no_grad()
    def _teacher_hidden(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        if self.hidden_decoder is None or not self.signals.hidden:
            return None
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            hidden_ND: Tensor = self.hidden_decoder(batch)
        return hidden_ND

    @torch.no_grad()
    def _target(
        self, batch: Mapping[str, Tensor], teacher_ND: Tensor | None
    ) -> FullTarget | SparseTarget | None:
        """The teacher's distribution at the head rows, in the form that is cheapest to chunk."""
        if self.signals.ce == "sparse":
            column = self.signals.temperature_column
            log_p_NK, log_tail_N = sparse_log_probs(
                batch["logit_values"].float(),
                batch["logsumexp"][:, column],
                batch["log_tail"][:, column],
                self.train_config.temperature,
            )
            return SparseTarget(batch["logit_ids"], log_p_NK, log_tail_N)
        if self.signals.ce is None or teacher_ND is None or self.lm_head is None:
            return None
        head: Any = self.lm_head
        device = teacher_ND.device.type
        with torch.autocast(device, enabled=False):
            rows_ND = head.transform(teacher_ND)
        low = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if low else torch.float32
        if self._decoder is None or self._decoder.dtype != dtype:
            self._decoder = head.decoder_weight.to(dtype)  # Once, not at every step.
        return FullTarget(rows_ND, self._decoder, head.decoder_bias)


def _head_rows(batch: Mapping[str, Tensor], teacher: bool) -> tuple[Tensor, Tensor]:
    """Flat positions whose logits are needed, and their labels (-100 where not masked).

    Every masked position carries signals, so the rows of L_mlm are among those of L_ce and the
    student's logits are computed once for both.
    """
    if not teacher:
        return batch["masked_index"], batch["labels"]
    labels = torch.full_like(batch["input_ids"].flatten(), -100)
    labels[batch["masked_index"]] = batch["labels"]
    return batch["signal_index"], labels[batch["signal_index"]]
