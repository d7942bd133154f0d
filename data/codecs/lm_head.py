"""Replay: logits from stored hidden states, without the teacher.

An LM head is a few tensors: ``logits = norm(act(h W1' + b1)) E' + b2``, in some families without W1
or without biases (``LMHeadSpec``). The cache keeps the teacher's checkpoint, and its manifest names
these tensors, so any program can rebuild the LM head.

Shapes: ``N`` positions, ``D`` hidden width, ``D'`` width of the decoder's input, ``V`` vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from distilcache.data.codecs.lm_head_spec import ACTIVATION_NAMES, ROLES, LMHeadSpec
from distilcache.data.errors import UserError, reason_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
assert set(ACTIVATIONS) == set(ACTIVATION_NAMES)


def lm_head_transform(
    hidden_ND: Tensor, tensors: Mapping[str, Tensor], activation: str, eps: float
) -> Tensor:
    """Hidden states to the decoder's input: ``norm(act(h W1' + b1))``, or h if there is no W1.

    Args:
        hidden_ND: Hidden states, [N, D].
        tensors: Role to tensor, see ``distilcache.data.codecs.lm_head_spec.ROLES``.
        activation: Name, see ``ACTIVATIONS``.
        eps: Of the layer norm, which is computed in float32.

    Returns:
        float32 [N, D'].
    """
    if "dense.weight" not in tensors:
        return hidden_ND.float()
    x = functional.linear(hidden_ND, tensors["dense.weight"], tensors.get("dense.bias"))
    x = ACTIVATIONS[activation](x).float()
    norm = tensors["norm.weight"]
    return functional.layer_norm(x, norm.shape, norm, tensors.get("norm.bias"), eps)


def decoder_weight(tensors: Mapping[str, Tensor]) -> Tensor:
    """The decoder [V, D'] as one matrix."""
    if "decoder.columns" not in tensors:
        return tensors["decoder.weight"]
    return torch.cat([tensors["decoder.weight"], tensors["decoder.columns"].T], dim=1)


def decoder_bias(tensors: Mapping[str, Tensor]) -> Tensor:
    """The decoder's bias [V]; zeros if there is none."""
    bias = tensors.get("decoder.bias")
    weight = tensors["decoder.weight"]
    return weight.new_zeros(len(weight)) if bias is None else bias.flatten()  # BART's is [1, V]


class LMHead(torch.nn.Module):
    """A frozen LM head in float32.

    Args:
        tensors: Role to tensor: dense [D', D] and [D'], norm [D'] twice, decoder [V, D'] and [V];
            some families lack some of them.
        activation: Name, see ``ACTIVATIONS``.
        eps: Of the layer norm.
    """

    decoder_weight: Tensor
    decoder_bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], activation: str, eps: float) -> None:
        super().__init__()
        full = {
            **{role: tensor for role, tensor in tensors.items() if role != "decoder.columns"},
            "decoder.weight": decoder_weight(tensors),
            "decoder.bias": decoder_bias(tensors),
        }
        for role, tensor in full.items():
            name = role.replace(".", "_")
            self.register_buffer(name, tensor.detach().float(), persistent=False)
        self._roles = [role for role in full if not role.startswith("decoder")]
        self.activation = activation
        self.eps = eps

    @classmethod
    def load(cls, checkpoint: Path, spec: LMHeadSpec) -> "LMHead":
        """Read only the LM head's tensors from ``checkpoint/model.safetensors``.

        Raises:
            UserError: The file or one of the tensors is missing or damaged.
        """
        path = checkpoint / "model.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {role: file.get_tensor(name) for role, name in spec.tensors.items()}
            if "decoder.bias" in tensors:
                tensors["decoder.bias"] = decoder_bias(tensors)
            _check_shapes({role: tuple(tensor.shape) for role, tensor in tensors.items()})
            return cls(tensors, spec.activation, spec.eps)
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cache: {path} must hold the LM head, got: {reason_of(error)}"
            ) from None

    def keep(self, ids_n: Tensor) -> None:
        """Cut the decoder to some ids, int64 [n]; logits are then [N, n]."""
        self.decoder_weight = self.decoder_weight[ids_n]
        self.decoder_bias = self.decoder_bias[ids_n]

    def transform(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states to the decoder's input, [N, D] -> [N, D']."""
        tensors = {role: getattr(self, role.replace(".", "_")) for role in self._roles}
        return lm_head_transform(hidden_ND, tensors, self.activation, self.eps)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Logits of the full vocabulary, [N, D] -> [N, V]."""
        rows = self.transform(hidden_ND)
        return functional.linear(rows, self.decoder_weight, self.decoder_bias)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The tensors must fit each other: a manifest may name any."""
    vocabulary, inner = _two(shapes, "decoder.weight")
    if "decoder.columns" in shapes:
        inner += _two(shapes, "decoder.columns")[0]
    width = _two(shapes, "dense.weight")[1] if "dense.weight" in shapes else 0
    wanted = {
        "dense.weight": (inner, width),
        "dense.bias": (inner,),
        "norm.weight": (inner,),
        "norm.bias": (inner,),
        "decoder.columns": (shapes.get("decoder.columns", (0,))[0], vocabulary),
        "decoder.bias": (vocabulary,),
    }
    for role in set(ROLES) & set(shapes) & set(wanted):
        if shapes[role] != wanted[role]:
            raise ValueError(f"{role} of shape {list(shapes[role])}")


def _two(shapes: Mapping[str, tuple[int, ...]], role: str) -> tuple[int, int]:
    if len(shapes[role]) != 2:
        raise ValueError(f"{role} of shape {list(shapes[role])}")
    return shapes[role][0], shapes[role][1]
