"""Relations of a layer's queries, keys and values, and the linear maps that give these.

Of a sequence of L positions, one relation head is the row-wise softmax(X X' / sqrt(d)), with X the
queries, the keys or the values of d units (Wang et al. 2021, arXiv:2012.15828). X is what the
layer's linear maps give, before any rotation or norm. A cache names the tensors of these maps in
the teacher's checkpoint, so that relations follow from what the layer reads.

Shapes: ``R`` relations (3: of queries, keys, values), ``B`` sequences, ``L`` positions, ``A``
relation heads, ``d`` units of a head, ``D`` width of what the layer reads, ``P`` of its queries,
``T`` tokens, ``G`` byte planes.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from distilcache.data.codecs.hidden import HiddenCodec, HiddenDecoder
from distilcache.data.codecs.relation_spec import FUSED, KINDS, TOKENS
from distilcache.data.errors import UserError

FAR = -1e4
"""Logit of a position that is not there: its exponential is 0, and 0 times it is 0."""


class RelationMaps(torch.nn.Module):
    """What a layer reads to its queries, keys and values.

    Args:
        tensors: By role (``relation_spec.ROLES``); others are left alone.

    Raises:
        UserError: They are not the tensors of such maps.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        kinds = [kind for kind in (*KINDS, FUSED) if f"{kind}.weight" in tensors]
        weights = [tensors[f"{kind}.weight"].detach().float() for kind in kinds]
        if (
            tuple(kinds) not in (KINDS, (FUSED,))
            or any(weight.ndim != 2 for weight in weights)
            or len({weight.shape for weight in weights}) != 1
            or sum(map(len, weights)) % len(KINDS)
        ):
            found = {k: list(w.shape) for k, w in zip(kinds, weights, strict=True)}
            raise UserError(
                "cache: relation layer must have maps of one shape for queries, keys and values, "
                f"got {found}"
            )
        biases = [
            tensors.get(f"{kind}.bias", weight.new_zeros(len(weight))).detach().float()
            for kind, weight in zip(kinds, weights, strict=True)
        ]
        self.register_buffer("weight", torch.cat(weights), persistent=False)
        self.register_buffer("bias", torch.cat(biases), persistent=False)

    @property
    def width(self) -> int:
        """Units P of queries, of keys and of values."""
        return len(self.weight) // len(KINDS)

    def forward(self, read_BLD: Tensor) -> Tensor:
        """Queries, keys and values, [R, B, L, P]."""
        return stacked(functional.linear(read_BLD, self.weight, self.bias))


def stacked(fused_BLP: Tensor) -> Tensor:
    """Queries, keys and values side by side, [B, L, 3 P], as [R, B, L, P]."""
    return torch.stack(fused_BLP.chunk(len(KINDS), -1))


class Relations(HiddenDecoder):
    """Decodes what a layer reads on the batch's device, and gives its queries, keys and values.

    Args:
        name: Key of the batch: ``relation_<l>``.
        codec: Of what the layer reads; None where it is stored as float16 or float32.
        tensors: The layer's maps and the word embeddings by role.
    """

    offsets: Tensor
    prediction: Tensor
    embeddings: Tensor

    def __init__(self, name: str, codec: HiddenCodec | None, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(name, codec)
        self.maps = RelationMaps(tensors)
        nothing = torch.empty(0)
        for kept, tensor in (
            ("offsets", codec.offsets if codec else None),
            ("prediction", codec.prediction if codec else None),
            ("embeddings", tensors[TOKENS].float() if codec else None),
        ):
            self.register_buffer(kept, nothing if tensor is None else tensor, persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Queries, keys and values of a batch of sequences, [R, B, L, P]; at padding any.

        They are those of ``relation_ids`` [B, L], or of ``input_ids`` in a batch without them.
        """
        ids_BL = batch.get("relation_ids", batch["input_ids"])
        index_T = batch.get("relation_index")
        ids_T = ids_BL.flatten() if index_T is None else ids_BL.flatten().index_select(0, index_T)
        with torch.autocast(ids_BL.device.type, enabled=False):
            read_TD = self.read(batch[self.name], ids_T)
        if index_T is not None:
            padded = read_TD.new_zeros(ids_BL.numel(), read_TD.shape[1])
            read_TD = padded.index_copy_(0, index_T, read_TD)
        queries: Tensor = self.maps(read_TD.view(*ids_BL.shape, -1))
        return queries

    def read(self, stored: Tensor, ids_T: Tensor) -> Tensor:
        """What the layer read, float32 [T, D].

        Args:
            stored: Planes of codes [G, T], or states [T, D].
            ids_T: The tokens there.
        """
        if self.codec is None:
            return stored.float()
        values_DT = self.codec.packing.table(stored.device).unpack(stored).float()
        values_DT += values_DT.sign() * self.offsets[:, None]
        predicted_TD = self.embeddings.index_select(0, ids_T) @ self.prediction
        return predicted_TD.add_(self.mean).addmm_(values_DT.T, self.synthesis)


def load_tensors(teacher: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of the teacher's checkpoint by role.

    Raises:
        UserError: One is missing.
    """
    path = teacher / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return {role: file.get_tensor(name) for role, name in names.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cache: {path} must hold the maps of the relation layer, got: {error}"
        ) from None


def in_heads(x_BLP: Tensor, heads: int) -> Tensor:
    """Queries, keys or values cut into relation heads, a view [B, A, L, d]."""
    return x_BLP.view(*x_BLP.shape[:2], heads, -1).transpose(1, 2)


def relation_logits(x_BLP: Tensor, heads: int, present_BL: Tensor | None = None) -> Tensor:
    """``X X' / sqrt(d)`` of each relation head, [B, A, L, L].

    Args:
        x_BLP: Queries, keys or values.
        heads: Relation heads A.
        present_BL: Where there is a token; None: everywhere. To others no relation leads.
    """
    x_BALd = in_heads(x_BLP, heads)
    logits: Tensor = (x_BALd @ x_BALd.transpose(-1, -2)) * x_BALd.shape[-1] ** -0.5
    if present_BL is None:
        return logits
    return logits.masked_fill(~present_BL.bool()[:, None, None], FAR)


def relation_kl(
    true_RBLP: Tensor, other_RBLP: Tensor, heads: int, present_BL: Tensor | None = None
) -> Tensor:
    """KL in nats between true relations and others, summed over positions: [R, A]."""
    sums = []
    for true_BLP, other_BLP in zip(true_RBLP, other_RBLP, strict=True):
        p, q = (
            relation_logits(x.float(), heads, present_BL).log_softmax(-1)
            for x in (true_BLP, other_BLP)
        )
        rows_BAL = (p.exp() * (p - q)).sum(-1)
        if present_BL is not None:
            rows_BAL = rows_BAL * present_BL[:, None]
        sums.append(rows_BAL.sum((0, 2), dtype=torch.float64))
    return torch.stack(sums)
