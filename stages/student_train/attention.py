"""The student on a CPU: the same formulas, with faster attention, dropout and casts.

torch draws a dropout mask on a CPU at 7 to 10 ns an element, and its attention with dropout runs
in float32 with a dozen passes over [B, H, L, L]: together a sixth of a training step of 6x768 and
a quarter of 3x384 (measured). Here masks come from 16 bits of a fast generator and attention is
two products and a softmax in the autocast type, as in the fused kernels of other devices. Other
devices, and evaluation, use the usual kernels.

Shapes: ``B`` sequences, ``H`` attention heads, ``L`` positions, ``D`` width of a head.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from distilcache.stages.models.families import family_of

NAME = "distilcache"
"""Name of the attention function, for ``set_attn_implementation``."""
LEVELS = 2**16
"""Probabilities of dropout are multiples of 1 / LEVELS."""


class Dropout(nn.Dropout):
    """``nn.Dropout`` with :func:`keep_mask` on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """In training, zero a fraction p of the elements and divide the others by 1 - p."""
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        mask, scale = keep_mask(input, self.p)
        return (input * mask).mul_(scale)


def keep_mask(like: Tensor, p: float) -> tuple[Tensor, float]:
    """A random mask of zeros (a fraction p) and ones, of the shape and type of a CPU tensor.

    The seed is drawn from torch's generator, so that a resumed run draws the same masks.

    Returns:
        The mask, and 1 over the fraction of ones. This factor is not in the mask because bfloat16
        would round 1 / 0.9 by 0.2 %.
    """
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.SFC64(seed).random_raw(-(-like.numel() // 4))
    bits = torch.from_numpy(words.view(np.int16))[: like.numel()].view(like.shape)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    mask = torch.ge(bits, dropped - LEVELS // 2, out=torch.empty(like.shape, dtype=like.dtype))
    return mask, LEVELS / (LEVELS - dropped)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``dropout(softmax(scaling Q K')) V``, an attention function of transformers.

    Args:
        module: The attention layer.
        query: Q, [B, H, L, D].
        key: K, likewise; fewer heads are each read by as many of the queries.
        value: V, as the keys.
        attention_mask: True where a key counts, [B, 1, L, L]; None: everywhere.
        dropout: Fraction of attention weights that are zeroed.
        scaling: Factor of Q K'; None: 1 / sqrt(D).
        options: For transformers' own function.

    Returns:
        [B, L, H, D], and None for the weights.
    """
    if not module.training or query.device.type != "cpu":
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
        return output, None
    if torch.is_autocast_enabled("cpu"):  # rotary positions may have made Q and K float32
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (repeat_kv(x, groups) for x in (key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast("cpu", enabled=False):  # It would make the softmax float32.
        # A transposed view of contiguous keys needs no copy; one of other keys needs a slow one.
        scores = (query * factor) @ key.contiguous().transpose(-1, -2)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if dropout > 0:
            mask, scale = keep_mask(weights, dropout)
            output = (weights * mask @ value).mul_(scale)
        else:
            output = weights @ value
    return output.transpose(1, 2).contiguous(), None


class SharedCast:
    """Before linear layers in training: casts an input once for all layers that read it.

    Autocast casts it for each of them, so that of queries, keys and values three times, and three
    gradients back.
    """

    _given: Tensor | None = None
    _version = 0
    _cast: Tensor | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """The input in autocast's type; None: it stays as it is."""
        if not (inputs and layer.training and torch.is_grad_enabled()):
            return None
        given = inputs[0]
        on_cpu = given.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if not on_cpu or given.dtype != torch.float32:
            return None
        if self._given is not given or self._version != given._version:
            self._given, self._version = given, given._version
            self._cast = given.to(torch.get_autocast_dtype("cpu"))
        return self._cast

    def __getstate__(self) -> None:
        """Nothing: a copy of the student must not hold a tensor with a history."""


def use_cpu_kernels(student: PreTrainedModel) -> None:
    """Make a student use the functions of this module; its weights and export do not change.

    Families with an attention of their own (DeBERTa, XLNet, Longformer ...) keep it.
    """
    if family_of(student.config).mask in ("keys", "windows"):
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        student.set_attn_implementation(NAME)
    cast = SharedCast()
    for parent in list(student.modules()):
        if type(parent) is nn.Linear:
            parent.register_forward_pre_hook(cast)
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))
