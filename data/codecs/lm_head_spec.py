"""The manifest's description of a teacher's LM head. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

ROLES = (
    "dense.weight",
    "dense.bias",
    "norm.weight",
    "norm.bias",
    "decoder.weight",
    "decoder.columns",
    "decoder.bias",
)
"""Tensors of an LM head. Only ``decoder.weight`` is always there; dense and norm go together."""
ACTIVATION_NAMES = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")


@dataclass(frozen=True, kw_only=True, slots=True)
class LMHeadSpec:
    """Names of the LM head's tensors, and how logits are computed from them.

    ``logits = norm(activation(h W1' + b1)) [E F']' + b2`` with W1, b1 ``dense``, E
    ``decoder.weight``, F' ``decoder.columns`` (MobileBERT: further columns of E, transposed) and
    b2 ``decoder.bias``. Without ``dense`` (XLNet): ``logits = h E' + b2``. Absent biases are 0.
    """

    tensors: Mapping[str, str] = field(default_factory=dict)
    """Role (see ``ROLES``) to tensor name in ``model.safetensors``."""
    activation: str = "gelu"
    """One of ``ACTIVATION_NAMES``, as transformers calls it."""
    eps: float = 1e-12
    """Of the layer norm."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def is_whole(self) -> bool:
        """Whether this version can compute an LM head with these tensors."""
        roles = set(self.tensors)
        with_dense = {"dense.weight", "norm.weight"}
        return (
            "decoder.weight" in roles
            and roles <= set(ROLES)
            and (with_dense <= roles or not any(r.startswith(("dense", "norm")) for r in roles))
            and self.activation in ACTIVATION_NAMES
        )
