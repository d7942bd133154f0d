"""The student and its distillation losses as one module: a batch in, a loss out.

Shapes: ``B`` sequences, ``L`` positions, ``N`` positions of L_ce, ``H`` positions with hidden
states, ``K`` stored tokens, ``V`` vocabulary, ``D`` hidden width.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilcache.data.codecs.hidden import HiddenDecoder
from distilcache.data.codecs.lm_head import decoder_bias, decoder_weight, lm_head_transform
from distilcache.data.codecs.logits import topk_log_probs
from distilcache.stages.models.anatomy import find_head
from distilcache.stages.models.encoder import RowEncoder, unused_parameters
from distilcache.stages.models.families import shape_of
from distilcache.stages.models.relations import RelationTap
from distilcache.stages.student_train.attention import use_cpu_kernels
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.lm_head_loss import HeadTerms, lm_head_loss
from distilcache.stages.student_train.losses import cosine_distance
from distilcache.stages.student_train.projection import first_projection
from distilcache.stages.student_train.relation_loss import at_the_teachers_tokens, relation_loss
from distilcache.stages.student_train.signals import Signals
from distilcache.stages.student_train.targets import (
    FullTarget,
    ResidualTarget,
    SparseTarget,
    TopkTarget,
)
from distilcache.stages.student_train.vocabulary import SampledVocabulary, TiedRows

TERMS = ("ce", "mlm", "cos", "mse", "rel")
"""Loss terms, in the order of :class:`DistillationModel`'s second result."""


class DistillationModel(nn.Module):
    """A student with the losses of one run. Only student and projection are trained and saved.

    Args:
        student: The model that is trained, of any family.
        train: Weights of the losses, temperature, rows per pass.
        signals: What the batches hold.
        lm_head: The teacher's frozen LM head (``transform``, ``decoder_weight``, ``decoder_bias``);
            for the replay signals.
        hidden_decoder: Decodes the stored hidden states of the teacher's last layer, batch ->
            [H, D]; its codec has the replay bias at T.
        vocabulary: Draws the tokens of each step; None: each step takes all of them.
        relations: Gives the teacher's queries, keys and values of a batch, for L_rel.
        relation_heads: Heads A of L_rel.
        kept_n: The teacher's ids that the student has, int64; None: all. The LM head is cut to
            them.
        teacher_width: D of the teacher. Where the student's differs, L_cos uses a linear
            projection, see :func:`first_projection`.
    """

    replay_bias: Tensor | None

    accepts_loss_kwargs = True  # The loss is already divided by the counts of the whole step.

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        train: TrainConfig,
        signals: Signals,
        lm_head: nn.Module | None = None,
        hidden_decoder: HiddenDecoder | None = None,
        teacher_width: int | None = None,
        vocabulary: SampledVocabulary | None = None,
        relations: nn.Module | None = None,
        relation_heads: int = 0,
        kept_n: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        for name in unused_parameters(student):
            student.get_parameter(name).requires_grad_(False)
        self._encoder = RowEncoder(student)
        use_cpu_kernels(student)
        self.train_config = train
        self.signals = signals
        self.vocabulary = vocabulary
        self._lm_head_spec = find_head(student)
        decoder = self._tensor(self._lm_head_spec.tensors["decoder.weight"])
        is_tied = decoder is student.get_input_embeddings().weight
        self._tied = TiedRows(decoder) if vocabulary is not None and is_tied else None
        width = shape_of(student.config).width
        self.projection: nn.Module = nn.Identity()
        if signals.cos and teacher_width is not None and teacher_width != width:
            self.projection = first_projection(student, lm_head, width, teacher_width, train.seed)
        self.lm_head = lm_head
        self.hidden_decoder = hidden_decoder
        self.relations = relations
        self._relation_heads = relation_heads
        self._tap = RelationTap(student, -1, "train: alpha_rel") if relations else None
        for frozen in (lm_head, hidden_decoder, relations):
            if frozen is not None:
                frozen.requires_grad_(False)
        self._decoder: Tensor | None = None
        codec = hidden_decoder.codec if hidden_decoder is not None and signals.replays else None
        bias_V = codec.bias_at(train.temperature) if codec is not None else None
        if bias_V is not None and kept_n is not None:
            bias_V = bias_V[kept_n]
        self.register_buffer("replay_bias", bias_V, persistent=False)

    def trained_tensors(self) -> dict[str, Tensor]:
        """Every trained tensor once, without the frozen teacher: what a checkpoint holds."""
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    def forward(
        self, batch: Mapping[str, Tensor], counts: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss of one micro-batch.

        Args:
            batch: See ``CachedBatches`` and ``SampledVocabulary.apply``.
            counts: Divisors per term, see ``count_positions``,
                over ALL micro-batches and devices of the step.

        Returns:
            ``alpha_ce L_ce + alpha_mlm L_mlm + alpha_cos L_cos + alpha_mse L_mse + alpha_rel
            L_rel``, each divided by its count, and the undivided sums of the five terms
            (``TERMS``), detached.
        """
        train, signals = self.train_config, self.signals
        index_N, labels_N = _logit_rows(batch, signals.ce is not None)
        hidden_index = batch["hidden_index"] if signals.cos else index_N
        with self._tap or contextlib.nullcontext():
            hidden_ND, hidden_HD = self._student_hidden(batch, index_N, hidden_index)
        teacher_HD = self._teacher_hidden(batch)
        lm_head = self._student_lm_head(batch.get("vocabulary"))
        terms = HeadTerms(
            target=self._target(batch, teacher_HD),
            labels_N=labels_N if train.alpha_mlm > 0 else None,
            temperature=train.temperature,
            ce_weight=_weight(train.alpha_ce, counts["ce"]),
            mlm_weight=_weight(train.alpha_mlm, counts["mlm"]),
            mse_weight=_weight(train.alpha_mse, counts["mse"]),
            row_weights_N=batch.get("ce_weight"),
            log_weight_V=batch.get("log_weight"),
            row_chunk=train.row_chunk,
        )
        head = self._lm_head_spec
        rows_ND = lm_head_transform(hidden_ND, lm_head, head.activation, head.eps)
        loss, ce, mlm, mse = lm_head_loss(
            rows_ND, decoder_weight(lm_head), decoder_bias(lm_head), terms
        )
        cos = torch.zeros_like(ce)
        if signals.cos and teacher_HD is not None:
            weight_H = batch.get("hidden_weight")
            cos = cosine_distance(self.projection(hidden_HD), teacher_HD, weight_H)
            loss = loss + _weight(train.alpha_cos, counts["cos"]) * cos
        rel = torch.zeros_like(ce)
        if self._tap is not None and self.relations is not None:
            student_RBLP, present_BL = at_the_teachers_tokens(self._tap.gave(), batch)
            weighted, rel = relation_loss(
                student_RBLP,
                self.relations(batch),
                self._relation_heads,
                present_BL,
                _weight(train.alpha_rel, counts["rel"]),
            )
            loss = loss + weighted
        return loss, torch.stack([ce, mlm, cos.detach(), mse, rel])

    def _student_lm_head(self, ids_S: Tensor | None) -> dict[str, Tensor]:
        """The student's LM head by role, with its decoder for the tokens of the step alone."""
        found = {role: self._tensor(name) for role, name in self._lm_head_spec.tensors.items()}
        if ids_S is None:
            return found
        weight = found["decoder.weight"]
        tied = self._tied if torch.is_grad_enabled() and weight.requires_grad else None
        found["decoder.weight"] = tied.rows(ids_S) if tied else weight.index_select(0, ids_S)
        if "decoder.columns" in found:
            found["decoder.columns"] = found["decoder.columns"].index_select(1, ids_S)
        if "decoder.bias" in found:  # BART's is [1, V].
            found["decoder.bias"] = found["decoder.bias"].flatten().index_select(0, ids_S)
        return found

    def _tensor(self, name: str) -> Tensor:
        """A parameter of the student, or a buffer: BART's bias is not trained."""
        module, _, tensor = name.rpartition(".")
        found: Tensor = getattr(self.student.get_submodule(module), tensor)
        return found

    def _student_hidden(
        self, batch: Mapping[str, Tensor], logits_N: Tensor, cos_H: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The student's last hidden states at two sets of flat positions, [N, D] and [H, D].

        Both are in ascending order and one contains the other, so the larger one is computed.
        """
        rows = max(logits_N, cos_H, key=len)
        hidden = self.encode(batch, rows)
        logits, cos = (
            hidden
            if len(index) == len(rows)
            else hidden.index_select(0, torch.searchsorted(rows, index))
            for index in (logits_N, cos_H)
        )
        return logits, cos

    def encode(self, batch: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
        """The student's last hidden states at flat positions, [N, D]."""
        return self._encoder(batch["input_ids"], batch.get("attention_mask"), rows_N)

    @torch.no_grad()
    def _teacher_hidden(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        if self.hidden_decoder is None or not self.signals.hidden:
            return None
        hidden_HD: Tensor = self.hidden_decoder(batch)
        return hidden_HD

    @torch.no_grad()
    def _target(
        self, batch: Mapping[str, Tensor], teacher_HD: Tensor | None
    ) -> FullTarget | SparseTarget | None:
        """The teacher's distribution at the rows of L_ce."""
        signals = self.signals
        if signals.ce == "sparse":
            topk = self._topk_target(batch)
            assert topk.log_p_NK is not None
            assert topk.log_tail_N is not None
            tail_ids_NR = batch["tail_ids"] if signals.tail_draws else None
            return SparseTarget(topk.ids_NK, topk.log_p_NK, topk.log_tail_N, tail_ids_NR)
        if signals.ce is None or teacher_HD is None or self.lm_head is None:
            return None
        lm_head: Any = self.lm_head
        device = teacher_HD.device.type
        if "ce_rows" in batch:
            teacher_HD = teacher_HD.index_select(0, batch["ce_rows"])
        rows_ND = lm_head.transform(teacher_HD)
        low = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if low else torch.float32
        if self._decoder is None or self._decoder.dtype != dtype:
            self._decoder = lm_head.decoder_weight.to(dtype)  # Once, not at every step.
        residual = None
        if signals.ce == "replay+residual":
            residual = ResidualTarget(batch["residual_ids"], batch["residual_mass"])
        weight, bias, replay_bias = self._decoder, lm_head.decoder_bias, self.replay_bias
        if "vocabulary" in batch:
            ids_S = batch["vocabulary"]
            weight, bias = weight.index_select(0, ids_S), bias.index_select(0, ids_S)
            replay_bias = None if replay_bias is None else replay_bias.index_select(0, ids_S)
        return FullTarget(
            rows_ND,
            weight,
            bias,
            replay_bias_V=replay_bias,
            topk=self._topk_target(batch) if signals.topk else None,
            residual=residual,
        )

    def _topk_target(self, batch: Mapping[str, Tensor]) -> TopkTarget:
        """The stored tokens, at the temperature of the loss."""
        ids_NK, values_NK = batch["logit_ids"], batch["logit_values"]
        if self.signals.trimmed:
            return TopkTarget(ids_NK, values_NK, None, None)
        log_odds_N = batch["log_odds"][:, self.signals.temperature_column]
        known = topk_log_probs(values_NK, log_odds_N, self.train_config.temperature)
        return TopkTarget(ids_NK, values_NK, *known)


def _weight(alpha: float, count: float) -> float:
    """Factor of a term's sum; 0 where no position was counted."""
    return alpha / count if count > 0 else 0.0


def _logit_rows(batch: Mapping[str, Tensor], teacher: bool) -> tuple[Tensor, Tensor]:
    """Flat positions whose logits are needed, and their labels (-100 where not masked).

    Every masked position is one of L_ce, so the rows of L_mlm are among its rows and the
    student's logits are computed once for both.
    """
    if not teacher:
        return batch["masked_index"], batch["labels"]
    labels = torch.full_like(batch["input_ids"].flatten(), -100)
    labels[batch["masked_index"]] = batch["labels"]
    return batch["ce_index"], labels[batch["ce_index"]]
