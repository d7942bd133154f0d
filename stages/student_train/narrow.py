"""First weights of a student that is narrower than its teacher, by truncated SVD.

The hidden states that flow from layer to layer are projected on the d directions in which the
teacher's word embeddings vary most: ``y = x P`` with orthonormal columns ``P`` [D, d]. Every matrix
that reads them becomes ``W P``, every one that writes them ``P' W``, so a product of the student
is that of the teacher with what lies outside of P left out. Then, layer by layer,

- an attention head becomes the best approximation, of the rank that the student's heads have, of
  its scores ``x Wq' Wk x'`` and of what it writes, ``Wo Wv x``; the heads that write most stay;
- of the feed-forward units those with the largest ``|in| |out|`` are kept.

Two things do not commute with P, so the student is near the teacher only in part: layer norms,
whose gains P mixes (each coordinate gets the gain that its own part of the sum has, scaled as the
student's norm divides by less), and the activation of the LM head (taken as if it did).

Shapes: ``D`` the teacher's width, ``d`` the student's, ``F`` feed-forward units.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distilcache.stages.models.anatomy import find_head, layer_lists
from distilcache.stages.models.families import Shape, shape_of


@dataclass(frozen=True, slots=True)
class Layout:
    """Modules of a layer, below its number."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    out: str = "attention.output.dense"
    norms: tuple[str, ...] = ("attention.output.LayerNorm", "output.LayerNorm")
    inner: str = "intermediate.dense"
    outer: str = "output.dense"


_BERT = Layout()
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "distilbert": Layout(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            out="attention.out_lin",
            norms=("sa_layer_norm", "output_layer_norm"),
            inner="ffn.lin1",
            outer="ffn.lin2",
        ),
        "bert": _BERT,
        "roberta": _BERT,
        "xlm-roberta": _BERT,
        "camembert": _BERT,
    }
)
"""Families whose students may be narrower than the teacher and still start from it."""


class _Narrow:
    """The teacher's tensors, and the student's parameters that they are projected into."""

    def __init__(self, student: PreTrainedModel, wide: Mapping[str, Tensor]) -> None:
        self.wide = {name: tensor.double() for name, tensor in wide.items()}
        self.small = dict(student.named_parameters(remove_duplicate=False))
        embeddings = student.get_input_embeddings().weight
        words_VD = self.wide[next(n for n, p in self.small.items() if p is embeddings)]
        width = shape_of(student.config).width
        centred_VD = words_VD - words_VD.mean(0)
        self.basis_Dd, self.share = principal_directions(centred_VD.T @ centred_VD, width)
        # A norm of the student divides by the root mean square of d coordinates with this share
        # of the variance, the teacher's by that of all D.
        self.gain = (self.share * len(self.basis_Dd) / width) ** 0.5

    def set(self, name: str, value: Tensor) -> None:
        """Fill a parameter from its first element; what is left stays random."""
        target = self.small[name]
        target[tuple(slice(0, n) for n in value.shape)] = value.to(target.dtype)

    def reads(self, module: str) -> tuple[Tensor, Tensor]:
        """``W P`` and bias of a linear layer that reads hidden states."""
        return self.wide[f"{module}.weight"] @ self.basis_Dd, self.wide[f"{module}.bias"]

    def writes(self, module: str) -> tuple[Tensor, Tensor]:
        """``P' W`` and ``P' b`` of one that writes them."""
        weight, bias = self.wide[f"{module}.weight"], self.wide[f"{module}.bias"]
        return self.basis_Dd.T @ weight, bias @ self.basis_Dd

    def norm(self, module: str) -> None:
        """Gains and shifts of a layer norm."""
        gain_d = self.wide[f"{module}.weight"] @ self.basis_Dd.square()
        self.set(f"{module}.weight", gain_d * self.gain)
        self.set(f"{module}.bias", self.wide[f"{module}.bias"] @ self.basis_Dd)


def principal_directions(covariance_DD: Tensor, width: int) -> tuple[Tensor, float]:
    """The ``width`` directions of largest variance, [D, width], and their share of all of it.

    As many as there are dimensions are these dimensions themselves.
    """
    if width == len(covariance_DD):
        return torch.eye(width, dtype=covariance_DD.dtype), 1.0
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    largest = values_D[-width:].sum() / values_D.sum()
    basis = vectors_DD[:, -width:].flip(1)
    # The sign of an eigenvector is any: the largest element is positive.
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return basis * signs, float(largest)


@torch.no_grad()
def narrow(student: PreTrainedModel, wide: Mapping[str, Tensor], heads: int) -> str:
    """Fill a student from the tensors of a teacher that is as wide or wider.

    Args:
        student: Of a family in ``LAYOUTS``, with random weights: heads and units beyond the
            teacher's keep them, and write nothing at first.
        wide: The teacher's tensor for each of its parameters, by all the student's names.
        heads: The teacher's attention heads.

    Returns:
        What was kept, in words.
    """
    own, layout = shape_of(student.config), LAYOUTS[student.config.model_type]
    projected = _Narrow(student, wide)
    embeddings = f"{student.base_model_prefix}.embeddings"
    for name, tensor in projected.wide.items():
        if tensor.ndim == 2 and name.startswith(embeddings):
            projected.set(name, tensor @ projected.basis_Dd)
    projected.norm(f"{embeddings}.LayerNorm")
    (layers,) = layer_lists(student)
    for i in range(own.layers):
        _attention(projected, f"{layers}.{i}", layout, own, heads)
        _feed_forward(projected, f"{layers}.{i}", layout)
    _lm_head(projected, find_head(student).tensors)
    theirs = len(wide[f"{layers}.0.{layout.inner}.weight"])
    return (
        f"{own.layers} layers, {min(own.heads, heads)} of {heads} heads, {min(own.ffn, theirs)} of "
        f"{theirs} feed-forward units and {own.width} of {len(projected.basis_Dd)} directions "
        f"({100 * projected.share:.0f} % of the embeddings)"
    )


def _attention(projected: _Narrow, layer: str, layout: Layout, own: Shape, heads: int) -> None:
    """The heads that write most, each in as many dimensions as the student's heads have.

    The key's bias adds the same to all scores of a query, which softmax ignores; the value's
    passes through attention unchanged, into the bias of what is written.
    """
    rank = own.width // own.heads
    query, key, value, out = (
        f"{layer}.{name}" for name in (layout.query, layout.key, layout.value, layout.out)
    )
    (q, q_bias), (k, _), (v, v_bias) = (projected.reads(m) for m in (query, key, value))
    o, o_bias = projected.writes(out)
    size = len(q) // heads
    q = torch.cat([q, q_bias[:, None]], 1)
    writes = [low_rank(o[:, s], v[s], rank) for s in _slices(heads, size)]
    norms = torch.stack([a.norm() for a, _ in writes])  # both factors have the roots of the product
    kept = norms.topk(min(own.heads, heads)).indices.sort().values.tolist()
    for name in (query, key, value):
        projected.small[f"{name}.bias"].zero_()
    # Dimensions beyond the teacher's begin without effect, and learn through the other factor.
    projected.small[f"{key}.weight"].zero_()
    projected.small[f"{out}.weight"].zero_()
    for place, head in zip(_slices(own.heads, rank), kept, strict=False):
        s = slice(head * size, (head + 1) * size)
        # Scores are divided by the root of a head's size.
        q_new, k_new = low_rank(q[s].T * (rank / size) ** 0.5, k[s], rank)
        o_new, v_new = writes[head]
        used = slice(place.start, place.start + len(k_new))
        projected.small[f"{query}.weight"][used] = q_new.T[:, :-1].float()
        projected.small[f"{query}.bias"][used] = q_new.T[:, -1].float()
        projected.small[f"{key}.weight"][used] = k_new.float()
        projected.small[f"{value}.weight"][used] = v_new.float()
        projected.small[f"{out}.weight"][:, used] = o_new.float()
    projected.set(f"{out}.bias", o_bias + o @ v_bias)
    projected.norm(f"{layer}.{layout.norms[0]}")


def low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``left @ right`` as a product of that rank at most, of equal weight on both sides."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)  # small: both sides are as thin as a head
    root = s[:rank].sqrt()
    return q_left @ (u[:, :rank] * root), root[:, None] * (v[:rank] @ q_right.T)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(i * size, (i + 1) * size) for i in range(count)]


def _feed_forward(projected: _Narrow, layer: str, layout: Layout) -> None:
    """The units with the largest product of norms."""
    inner, outer = f"{layer}.{layout.inner}", f"{layer}.{layout.outer}"
    weight_Fd, bias_F = projected.reads(inner)
    back_dF, back_d = projected.writes(outer)
    units = min(len(weight_Fd), len(projected.small[f"{inner}.weight"]))
    kept = (weight_Fd.norm(dim=1) * back_dF.norm(dim=0)).topk(units).indices.sort().values
    projected.small[f"{outer}.weight"].zero_()  # units beyond the teacher's begin without effect
    projected.set(f"{inner}.weight", weight_Fd[kept])
    projected.set(f"{inner}.bias", bias_F[kept])
    projected.set(f"{outer}.weight", back_dF[:, kept])
    projected.set(f"{outer}.bias", back_d)
    projected.norm(f"{layer}.{layout.norms[1]}")


def _lm_head(projected: _Narrow, tensors: Mapping[str, str]) -> None:
    weight, bias = projected.writes(tensors["dense.weight"].removesuffix(".weight"))
    projected.set(tensors["dense.weight"], weight @ projected.basis_Dd)
    projected.set(tensors["dense.bias"], bias)
    projected.norm(tensors["norm.weight"].removesuffix(".weight"))
    decoder_VD = projected.wide[tensors["decoder.weight"]]  # may be the word embeddings
    projected.set(tensors["decoder.weight"], decoder_VD @ projected.basis_Dd)
    projected.set(tensors["decoder.bias"], projected.wide[tensors["decoder.bias"]])
