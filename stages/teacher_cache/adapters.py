"""The teacher: loading it whole or not at all, its encoder, and its LM head."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForMaskedLM
from transformers.utils import logging as transformers_logging

from data.codecs.lm_head import HeadSpec, LMHead
from data.device import autocast
from data.errors import UserError, require
from data.last_layer import RowFilter, filter_last_layer
from data.tokenizers import hub_answers

HEADS = {
    "bert": {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "decoder.weight": "cls.predictions.decoder.weight",
        "decoder.bias": "cls.predictions.decoder.bias",
        "activation": "hidden_act",
    },
    "roberta": {
        "dense": "lm_head.dense",
        "norm": "lm_head.layer_norm",
        "decoder.weight": "lm_head.decoder.weight",
        "decoder.bias": "lm_head.decoder.bias",
        "activation": "",
    },
    "distilbert": {
        "dense": "vocab_transform",
        "norm": "vocab_layer_norm",
        "decoder.weight": "vocab_projector.weight",
        "decoder.bias": "vocab_projector.bias",
        "activation": "activation",
    },
}
"""Names of the head's tensors per model type; ``activation`` names the config field."""
HEADS["xlm-roberta"] = HEADS["camembert"] = HEADS["roberta"]
HEAD_TOLERANCE = 1e-4
"""Largest difference of a logit between the rebuilt head and the model's own, in float32."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen teacher on its device."""

    model: Any
    head: LMHead
    spec: HeadSpec
    device: torch.device
    dtype: torch.dtype
    decoder: torch.Tensor
    """The head's decoder weight in the autocast type: cast once, not at every chunk of rows."""
    last_rows: RowFilter
    """Installed in the last layer."""

    @property
    def num_layers(self) -> int:
        """Number of transformer layers n; hidden state n is the one the head reads."""
        return int(self.model.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Hidden width D."""
        return int(self.model.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of logits V."""
        return int(self.head.decoder_bias.shape[0])

    @property
    def max_length(self) -> int:
        """Longest sequence; RoBERTa counts positions from the padding id on."""
        positions = int(self.model.config.max_position_embeddings)
        if HEADS[self.model.config.model_type] is HEADS["roberta"]:
            return positions - int(self.model.config.pad_token_id) - 1
        return positions

    @torch.no_grad()
    def encode(
        self,
        ids_BL: torch.Tensor,
        attention_BL: torch.Tensor | None,
        layers: tuple[int, ...],
        rows_N: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Hidden states of the listed layers (n: the last), on the device.

        Args:
            ids_BL: Token ids.
            attention_BL: Which of them are there, bool; None: all.
            layers: Any of 0 to n.
            rows_N: Flat index of the positions that are wanted; None: all.

        Returns:
            [N, D] per layer; [B, L, D] where ``rows_N`` is None.
        """
        inner = any(layer != self.num_layers for layer in layers)
        # transformers takes a mask of four axes as it is; of one with two it asks whether it
        # masks anything, for which the host would wait.
        mask = None if attention_BL is None else attention_BL[:, None, None]
        self.last_rows.rows_N = rows_N
        try:
            with autocast(self.device, self.dtype):
                output = self.model.base_model(
                    input_ids=ids_BL, attention_mask=mask, output_hidden_states=inner
                )
        finally:
            self.last_rows.rows_N = None
        last = output.last_hidden_state if rows_N is None else output.last_hidden_state[0]
        states = []
        for layer in layers:
            if layer == self.num_layers:
                states.append(last)
            elif rows_N is None:
                states.append(output.hidden_states[layer])
            else:
                states.append(output.hidden_states[layer].flatten(0, 1).index_select(0, rows_N))
        return states

    @torch.no_grad()
    def decode(self, transformed_ND: torch.Tensor, precise: bool = False) -> torch.Tensor:
        """Logits [N, V] of rows that the head has transformed: autocast type, or float32."""
        decoder_VD = self.head.decoder_weight if precise else self.decoder
        rows_ND, bias_V = (x.to(decoder_VD.dtype) for x in (transformed_ND, self.head.decoder_bias))
        return functional.linear(rows_ND, decoder_VD, bias_V)

    @torch.no_grad()
    def decode_at(self, transformed_ND: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        """Logits [N, K] of some tokens per row, in float32."""
        weights_NKD = self.head.decoder_weight[ids_NK]
        logits_NK = torch.einsum("nd,nkd->nk", transformed_ND, weights_NKD)
        return logits_NK + self.head.decoder_bias[ids_NK]


def load_teacher(name: str, device: torch.device, dtype: torch.dtype, needs: str = "") -> Teacher:
    """Load a masked-LM checkpoint with its LM head, from a path or the hub.

    Args:
        name: Folder or hub id.
        device: Where it runs.
        dtype: Autocast type.
        needs: The recipe's word on what must be at hand, for the error.

    Raises:
        UserError: It cannot be found, is no safetensors checkpoint, lacks tensors (transformers
            would fill them with random numbers), or is of a family that is not known.
    """
    model, info = _open_checkpoint(name, needs)
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if missing[4:] else "")
        raise UserError(
            f"teacher: model must hold a trained masked-LM head, got {name!r} without {shown}; "
            "use a checkpoint saved from AutoModelForMaskedLM (these weights would be random)"
        )
    model.eval().requires_grad_(False)
    spec = _head_spec(model, name)
    state = model.state_dict()
    head = LMHead({k: state[v] for k, v in spec.tensors.items()}, spec.activation, spec.eps)
    last_rows = filter_last_layer(model)
    _check(model, head, last_rows, name)
    head = head.to(device)
    decoder = head.decoder_weight.to(dtype)
    return Teacher(model.to(device), head, spec, device, dtype, decoder, last_rows)


def _open_checkpoint(name: str, needs: str) -> tuple[Any, dict[str, Any]]:
    is_path = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise UserError(
            f"teacher: model must be a checkpoint folder or a hub id, got {name!r}, which does "
            f"not exist; {needs or 'pass --set teacher.model=PATH'}"
        )
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # loading and saving take seconds, not minutes
    try:
        return AutoModelForMaskedLM.from_pretrained(  # type: ignore[no-any-return]
            name,
            output_loading_info=True,
            use_safetensors=True,
            dtype=torch.float32,
            local_files_only=is_path or not hub_answers(name),
            attn_implementation="sdpa",  # reads masks of type bool
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        if is_path:
            raise UserError(
                f"teacher: model must be a masked-LM checkpoint with config.json and "
                f"model.safetensors, got {name!r}: {reason}"
            ) from None
        raise UserError(
            f"teacher: model must be a hub id that can be reached, got {name!r}; download it "
            f"where there is a network and pass its folder: --set teacher.model=PATH ({reason})"
        ) from None
    finally:
        transformers_logging.set_verbosity(before)


def _head_spec(model: Any, name: str) -> HeadSpec:
    kind = model.config.model_type
    require(
        kind in HEADS,
        f"teacher: model must be of a known family ({', '.join(sorted(HEADS))}), got {kind!r} "
        f"from {name!r}",
    )
    table = HEADS[kind]
    activation = str(getattr(model.config, table["activation"])) if table["activation"] else "gelu"
    require(
        activation in ("gelu", "relu"),
        f"teacher: model must use the activation gelu or relu, got {activation!r} from {name!r}",
    )
    tensors = {
        "dense.weight": f"{table['dense']}.weight",
        "dense.bias": f"{table['dense']}.bias",
        "norm.weight": f"{table['norm']}.weight",
        "norm.bias": f"{table['norm']}.bias",
        "decoder.weight": table["decoder.weight"],
        "decoder.bias": table["decoder.bias"],
    }
    eps = float(getattr(model.config, "layer_norm_eps", 1e-12))
    return HeadSpec(tensors=tensors, activation=activation, eps=eps)


def saved_head_spec(teacher: Teacher, checkpoint: Path) -> HeadSpec:
    """The head's tensor names as the saved checkpoint has them.

    A tied tensor is saved once, under one of its names; the others are looked up by storage.
    """
    state = teacher.model.state_dict()
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        saved = {state[name].data_ptr(): name for name in file.keys() if name in state}  # noqa: SIM118
    tensors = {role: saved[state[name].data_ptr()] for role, name in teacher.spec.tensors.items()}
    return replace(teacher.spec, tensors=tensors)


@torch.no_grad()
def _check(model: Any, head: LMHead, last_rows: RowFilter, name: str) -> None:
    """Hold rebuilt head and filtered last layer against the model's own logits on a few tokens."""
    ids = torch.arange(8).unsqueeze(0) % head.decoder_bias.shape[0]
    own = model(input_ids=ids).logits[0]
    last_rows.rows_N = torch.arange(8)
    rebuilt = head(model.base_model(input_ids=ids).last_hidden_state[0])
    last_rows.rows_N = None
    difference = float((own - rebuilt).abs().max())
    require(
        difference <= HEAD_TOLERANCE * max(1.0, float(own.abs().max())),
        f"teacher: model's LM head must be dense, activation, norm and decoder, got {name!r} whose "
        f"logits differ by {difference:.3g} from that",
    )
