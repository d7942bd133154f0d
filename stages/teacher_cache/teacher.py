"""The teacher: its checkpoint, its encoder, and its LM head."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional

from distilcache.data.codecs.lm_head import LMHead
from distilcache.data.codecs.lm_head_spec import LMHeadSpec
from distilcache.data.errors import UserError, reason_of, require
from distilcache.stages.models.anatomy import LENGTH, find_head, probe_ids
from distilcache.stages.models.checkpoints import open_model
from distilcache.stages.models.device import autocast
from distilcache.stages.models.encoder import RowEncoder, model_class, own_logits
from distilcache.stages.models.families import family_of, shape_of
from distilcache.stages.models.relations import RelationTap
from distilcache.stages.teacher_cache.fit import WHERE, teacher_config

HEAD_TOLERANCE = 1e-4
"""Largest difference of a logit between the rebuilt LM head and the model's own, in float32."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen teacher on its device."""

    model: Any
    lm_head: LMHead
    lm_head_spec: LMHeadSpec
    device: torch.device
    dtype: torch.dtype
    decoder: torch.Tensor
    """The LM head's decoder weight in the autocast type, cast once."""
    encoder: RowEncoder
    relation: RelationTap | None = None
    """The layer whose relations are stored."""

    @property
    def members(self) -> tuple["Teacher", ...]:
        """Itself alone; see :class:`Ensemble`."""
        return (self,)

    @property
    def num_layers(self) -> int:
        """Number of transformer layers n; the LM head reads hidden state n."""
        return shape_of(self.model.config).layers

    @property
    def width(self) -> int:
        """Hidden width D."""
        return shape_of(self.model.config).width

    @property
    def vocab_size(self) -> int:
        """Number of logits V."""
        return int(self.lm_head.decoder_bias.shape[0])

    @torch.no_grad()
    def encode(
        self,
        ids_BL: torch.Tensor,
        attention_BL: torch.Tensor | None,
        layers: tuple[int, ...],
        rows_N: torch.Tensor | None = None,
        most: int = 0,
    ) -> list[torch.Tensor]:
        """Hidden states of the listed layers (n: the last), on the device.

        Args:
            ids_BL: Token ids.
            attention_BL: True where there is a token, False at padding; None: no padding.
            layers: Any of 0 to n.
            rows_N: Flat index of the wanted positions, ascending; None: all. XLNet has hidden
                states only at masked positions.
            most: The largest number of rows in a sequence, where known: see :class:`RowEncoder`.

        Returns:
            [N, D] per layer; [B, L, D] where ``rows_N`` is None.
        """
        everywhere = rows_N is None
        if rows_N is None:
            assert family_of(self.model.config).mask != "permutation", "masked positions alone"
            rows_N = torch.arange(ids_BL.numel(), device=ids_BL.device)
        with autocast(self.device, self.dtype):
            states = self.encoder.states(ids_BL, attention_BL, rows_N, layers, most)
        return [state.view(*ids_BL.shape, -1) for state in states] if everywhere else states

    @torch.no_grad()
    def transform(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Last hidden states to what :meth:`decode` takes, float32 [N, D']."""
        return self.lm_head.transform(hidden_ND)

    @torch.no_grad()
    def decode(self, transformed_ND: torch.Tensor, precise: bool = False) -> torch.Tensor:
        """Logits [N, V] of transformed rows, in the autocast type or (``precise``) in float32."""
        decoder_VD = self.lm_head.decoder_weight if precise else self.decoder
        bias_V = self.lm_head.decoder_bias.to(decoder_VD.dtype)
        return functional.linear(transformed_ND.to(decoder_VD.dtype), decoder_VD, bias_V)

    @torch.no_grad()
    def decode_at(self, transformed_ND: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        """Logits [N, K] of some tokens per row, in float32."""
        weights_NKD = self.lm_head.decoder_weight[ids_NK]
        logits_NK = torch.einsum("nd,nkd->nk", transformed_ND, weights_NKD)
        return logits_NK + self.lm_head.decoder_bias[ids_NK]


def load_teacher(
    name: str, device: torch.device, dtype: torch.dtype, needs: str = "", revision: str = ""
) -> Teacher:
    """Load a masked-LM checkpoint with its LM head, from a path or the hub.

    ``dtype`` is the autocast type; ``needs`` is what the recipe says must be at hand, for errors.

    Raises:
        UserError: It cannot be found, is no safetensors checkpoint, lacks tensors (transformers
            would fill them with random numbers), or is of an unknown family.
    """
    model = _open_checkpoint(name, needs, revision)
    model.eval().requires_grad_(False)
    try:
        try:
            spec = find_head(model)
        except UserError as error:
            raise UserError(f"teacher: {error} ({name!r})") from None
        state = model.state_dict()
        tensors = {k: state[v] for k, v in spec.tensors.items()}
        head = LMHead(tensors, spec.activation, spec.eps)
        encoder = RowEncoder(model)
        _check(model, head, encoder, name)
        _check_autocast(model, encoder, dtype, name)
    except UserError:
        raise
    except Exception as error:  # whatever transformers' code raises for odd configurations
        raise UserError(
            f"{WHERE} must run on a few tokens, got {name!r}, which does not: {reason_of(error)}"
        ) from None
    head = head.to(device)
    decoder = head.decoder_weight.to(dtype)
    return Teacher(model.to(device), head, spec, device, dtype, decoder, encoder)


def _open_checkpoint(name: str, needs: str, revision: str) -> Any:
    config = teacher_config(name, revision, needs)
    config.chunk_size_feed_forward = 0  # the same numbers, for any number of rows
    kind = model_class(config)
    return open_model(kind, config, name, where=WHERE, revision=revision, dtype=torch.float32)[0]


def saved_names(teacher: Teacher, names: Mapping[str, str], checkpoint: Path) -> dict[str, str]:
    """Names of tensors of the model by role, as names in its saved checkpoint.

    A tied tensor is saved once, under one of its names. The others are found by their storage.
    """
    state = teacher.model.state_dict()
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        saved = {state[name].data_ptr(): name for name in file.keys() if name in state}  # noqa: SIM118
    return {role: saved[state[name].data_ptr()] for role, name in names.items()}


def saved_lm_head_spec(teacher: Teacher, checkpoint: Path) -> LMHeadSpec:
    """Where the LM head lies in the saved checkpoint."""
    spec = teacher.lm_head_spec
    return replace(spec, tensors=saved_names(teacher, spec.tensors, checkpoint))


@torch.no_grad()
def _check_autocast(model: Any, encoder: RowEncoder, dtype: torch.dtype, name: str) -> None:
    """Refuse a type whose code does not run in autocast, before the pass begins."""
    ids_BL = probe_ids(model)
    try:
        with autocast(ids_BL.device, dtype):
            encoder(ids_BL, torch.ones_like(ids_BL), torch.arange(1, LENGTH, 3))
    except Exception as error:  # whatever transformers' code raises
        raise UserError(
            f"{WHERE} must run in {str(dtype).removeprefix('torch.')}, got {name!r} of type "
            f"{model.config.model_type!r}, which does not: {reason_of(error)}; use --set "
            "dtype=float32"
        ) from None


@torch.no_grad()
def _check(model: Any, head: LMHead, encoder: RowEncoder, name: str) -> None:
    """Compare the rebuilt LM head at chosen rows with the model's own logits on a few tokens.

    One sequence is padded. It is also run without padding, which must make no difference.
    """
    ids_BL, shorter = probe_ids(model), LENGTH - 3
    attention_BL, rows_N = torch.ones_like(ids_BL), torch.arange(1, LENGTH + shorter, 3)
    even = family_of(model.config).even
    if not even:
        attention_BL[1, shorter:] = 0
        pad = model.config.pad_token_id or 0
        ids_BL[1, shorter:] = pad if 0 <= pad < model.config.vocab_size else 0
    own = own_logits(model, ids_BL, attention_BL, rows_N)
    rebuilt = head(encoder(ids_BL, attention_BL, rows_N))
    difference, allowed = float((own - rebuilt).abs().max()), float(own.abs().max())
    allowed = HEAD_TOLERANCE * max(1.0, allowed)
    require(
        difference <= allowed,
        f"teacher: model's LM head must be dense, activation, norm and decoder, got {name!r} whose "
        f"logits differ by {difference:.3g} from that",
    )
    if even:
        return
    alone, inner_N = ids_BL[1:, :shorter], rows_N[rows_N >= LENGTH]
    rebuilt_alone = head(encoder(alone, torch.ones_like(alone), inner_N - LENGTH))
    difference = float((rebuilt_alone - rebuilt[-len(inner_N) :]).abs().max())
    require(
        difference <= allowed,
        f"teacher: model must give a padded sequence the same logits, got {name!r} of type "
        f"{model.config.model_type!r} whose logits differ by {difference:.3g}",
    )
