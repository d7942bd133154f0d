"""Where a teacher's LM head lies in its checkpoint; what the manifest says of it. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

ROLES = (
    "dense.weight",
    "dense.bias",
    "norm.weight",
    "norm.bias",
    "decoder.weight",
    "decoder.bias",
)
ACTIVATION_NAMES = ("gelu", "relu")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSpec:
    """Where the six tensors of the LM head lie and how they are joined."""

    tensors: Mapping[str, str] = field(default_factory=dict)
    """Role (see ``ROLES``) to tensor name in ``model.safetensors``."""
    activation: str = "gelu"
    eps: float = 1e-12

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
