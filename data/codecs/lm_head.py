"""Head replay: logits from stored hidden states, without the teacher.

A masked-LM head of the BERT family is six tensors: ``logits = norm(act(h W1' + b1)) E' + b2``.
The cache keeps the teacher's checkpoint and, in the manifest, the names of those six tensors in
it, so any program can rebuild the head.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from data.errors import UserError
from data.head import ACTIVATION_NAMES, ROLES
from data.head import HeadSpec as HeadSpec

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
}
assert set(ACTIVATIONS) == set(ACTIVATION_NAMES)


class LMHead(torch.nn.Module):
    """A frozen masked-LM head in float32.

    Args:
        tensors: Role to tensor: dense [D', D] and [D'], norm [D'] twice, decoder [V, D'] and [V].
        activation: ``gelu`` (exact) or ``relu``.
        eps: Of the layer norm.
    """

    dense_weight: torch.Tensor
    dense_bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    decoder_weight: torch.Tensor
    decoder_bias: torch.Tensor

    def __init__(self, tensors: Mapping[str, torch.Tensor], activation: str, eps: float) -> None:
        super().__init__()
        for role in ROLES:
            name = role.replace(".", "_")
            self.register_buffer(name, tensors[role].detach().float(), persistent=False)
        self.activation = ACTIVATIONS[activation]
        self.eps = eps

    @classmethod
    def load(cls, checkpoint: Path, spec: HeadSpec) -> "LMHead":
        """Read the six tensors, and nothing else, from ``checkpoint/model.safetensors``.

        Raises:
            UserError: The file or one of the tensors is missing or damaged.
        """
        path = checkpoint / "model.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {role: file.get_tensor(name) for role, name in spec.tensors.items()}
            _check_shapes({role: tuple(tensor.shape) for role, tensor in tensors.items()})
            return cls(tensors, spec.activation, spec.eps)
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"cache: {path} must hold the LM head, got: {reason}") from None

    def transform(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Hidden states to the decoder's input, [N, D] -> [N, D']."""
        x = self.activation(functional.linear(hidden_ND, self.dense_weight, self.dense_bias))
        return functional.layer_norm(
            x.float(), self.norm_weight.shape, self.norm_weight, self.norm_bias, self.eps
        )

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits of the full vocabulary, [N, D] -> [N, V]."""
        rows = self.transform(hidden_ND)
        return functional.linear(rows, self.decoder_weight, self.decoder_bias)

    def logits_at(self, hidden_ND: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        """Logits of some tokens per row in float32, [N, D] and [N, K] -> [N, K]."""
        rows_ND = self.transform(hidden_ND)
        weights_NKD = self.decoder_weight[ids_NK]
        return torch.einsum("nd,nkd->nk", rows_ND, weights_NKD) + self.decoder_bias[ids_NK]


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The six tensors must fit each other, whatever names a manifest gave."""
    inner, vocabulary = shapes["dense.bias"], shapes["decoder.bias"]
    wanted = {
        "dense.weight": (*inner, *shapes["dense.weight"][1:2]),
        "norm.weight": inner,
        "norm.bias": inner,
        "decoder.weight": (*vocabulary, *inner),
    }
    for role, shape in wanted.items():
        if shapes[role] != shape or len(inner) != 1 or len(vocabulary) != 1:
            raise ValueError(f"{role} of shape {list(shapes[role])}")
