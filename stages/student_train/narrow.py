"""First weights of a student that is narrower than its teacher, by truncated SVD.

The hidden states between layers are projected on the d directions in which the teacher's word
embeddings vary most: ``y = x P`` with orthonormal columns ``P`` [D, d]. Every matrix that reads
hidden states becomes ``W P``, every one that writes them ``P' W``: the student computes what the
teacher does within the span of P. Then, layer by layer,

- an attention head becomes the best approximation, of the rank that the student's heads have, of
  its scores ``x Wq' Wk x'`` and of what it writes, ``Wo Wv x``; the heads that write most stay;
- of the feed-forward units those with the largest ``|in| |out|`` are kept.

Two things do not commute with P, so the student only comes near the teacher: layer norms, whose
gains P mixes (each coordinate gets their mean, weighted by the squares of its column of P, and
scaled because the student's norm divides by less), and the activation of the LM head, which is
treated as if it did.

Shapes: ``D`` the teacher's width, ``d`` the student's, ``F`` feed-forward units.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distilcache.data.codecs.hidden import with_signs
from distilcache.stages.models.anatomy import find_head, layer_lists
from distilcache.stages.models.families import Shape, shape_of
from distilcache.stages.student_train.weights import DISTILBERT_FROM_BERT

FAMILIES = ("distilbert", "bert", "roberta", "xlm-roberta", "camembert")
"""Types whose students may be narrower than the teacher and still start from it."""
QUERY, KEY, VALUE = (f"attention.self.{name}" for name in ("query", "key", "value"))
OUT, OUT_NORM = "attention.output.dense", "attention.output.LayerNorm"
INNER, OUTER, OUTER_NORM = "intermediate.dense", "output.dense", "output.LayerNorm"
"""Modules of a layer, by their names in a BERT."""


class _Narrow:
    """The teacher's tensors, and the student's parameters that they are projected into."""

    def __init__(self, student: PreTrainedModel, wide: Mapping[str, Tensor]) -> None:
        self.wide = {name: tensor.double() for name, tensor in wide.items()}
        self.small = dict(student.named_parameters(remove_duplicate=False))
        self._names: dict[str, str] = {}
        if student.config.model_type == "distilbert":
            self._names = {bert: own for own, bert in DISTILBERT_FROM_BERT.items()}
        embeddings = student.get_input_embeddings().weight
        words_VD = self.wide[next(n for n, p in self.small.items() if p is embeddings)]
        width = shape_of(student.config).width
        centred_VD = words_VD - words_VD.mean(0)
        self.basis_Dd, self.fraction = principal_directions(centred_VD.T @ centred_VD, width)
        # A norm of the student divides by the root mean square of d coordinates, which have this
        # fraction of the variance; the teacher's divides by that of all D.
        self.gain = (self.fraction * len(self.basis_Dd) / width) ** 0.5

    def module(self, layer: str, name: str) -> str:
        """A module of a layer, from its name in a BERT."""
        return f"{layer}.{self._names.get(name, name)}"

    def set(self, name: str, value: Tensor) -> None:
        """Fill the first elements of a parameter; the others keep their values."""
        target = self.small[name]
        target[tuple(slice(0, n) for n in value.shape)] = value.to(target.dtype)

    def reads(self, module: str) -> tuple[Tensor, Tensor]:
        """``W P`` and bias of a linear layer that reads hidden states."""
        return self.wide[f"{module}.weight"] @ self.basis_Dd, self.wide[f"{module}.bias"]

    def writes(self, module: str) -> tuple[Tensor, Tensor]:
        """``P' W`` and ``P' b`` of a linear layer that writes hidden states."""
        weight, bias = self.wide[f"{module}.weight"], self.wide[f"{module}.bias"]
        return self.basis_Dd.T @ weight, bias @ self.basis_Dd

    def norm(self, module: str) -> None:
        """Gains and shifts of a layer norm."""
        gain_d = self.wide[f"{module}.weight"] @ self.basis_Dd.square()
        self.set(f"{module}.weight", gain_d * self.gain)
        self.set(f"{module}.bias", self.wide[f"{module}.bias"] @ self.basis_Dd)


def principal_directions(covariance_DD: Tensor, width: int) -> tuple[Tensor, float]:
    """The ``width`` directions of largest variance, [D, width], and their fraction of it.

    Where ``width`` is D, these are the axes themselves.
    """
    if width == len(covariance_DD):
        return torch.eye(width, dtype=covariance_DD.dtype), 1.0
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    largest = values_D[-width:].sum() / values_D.sum()
    return with_signs(vectors_DD[:, -width:].flip(1)), float(largest)


@torch.no_grad()
def narrow(student: PreTrainedModel, wide: Mapping[str, Tensor], heads: int) -> str:
    """Fill a student from the tensors of a teacher that is as wide or wider.

    Args:
        student: Of a type in ``FAMILIES``, with random weights: heads and units beyond the
            teacher's keep them, and write nothing at first.
        wide: The teacher's tensors by the student's names, tied ones under each name.
        heads: The teacher's attention heads.

    Returns:
        What was kept, in words.
    """
    own = shape_of(student.config)
    projected = _Narrow(student, wide)
    embeddings = f"{student.base_model_prefix}.embeddings"
    for name, tensor in projected.wide.items():
        if tensor.ndim == 2 and name.startswith(embeddings):
            projected.set(name, tensor @ projected.basis_Dd)
    projected.norm(f"{embeddings}.LayerNorm")
    (layers,) = layer_lists(student)
    for i in range(own.layers):
        _attention(projected, f"{layers}.{i}", own, heads)
        _feed_forward(projected, f"{layers}.{i}")
    _lm_head(projected, find_head(student).tensors)
    theirs = len(wide[f"{projected.module(f'{layers}.0', INNER)}.weight"])
    return (
        f"{own.layers} layers, {min(own.heads, heads)} of {heads} heads, {min(own.ffn, theirs)} of "
        f"{theirs} feed-forward units and {own.width} of {len(projected.basis_Dd)} directions "
        f"({100 * projected.fraction:.0f} % of the embeddings)"
    )


def _attention(projected: _Narrow, layer: str, own: Shape, heads: int) -> None:
    """Keep the heads that write most, each reduced to the size of the student's heads.

    The key's bias adds the same to all scores of a query, which softmax ignores. The value's bias
    passes through attention unchanged and joins the bias of the output.
    """
    rank = own.width // own.heads
    query, key, value, out = (projected.module(layer, name) for name in (QUERY, KEY, VALUE, OUT))
    (q, q_bias), (k, _), (v, v_bias) = (projected.reads(m) for m in (query, key, value))
    o, o_bias = projected.writes(out)
    size = len(q) // heads
    q = torch.cat([q, q_bias[:, None]], 1)
    writes = [low_rank(o[:, s], v[s], rank) for s in _slices(heads, size)]
    norms = torch.stack(
        [a.norm() for a, _ in writes]
    )  # each factor has the roots of the singular values
    kept = norms.topk(min(own.heads, heads)).indices.sort().values.tolist()
    for name in (query, key, value):
        projected.small[f"{name}.bias"].zero_()
    # Dimensions beyond the teacher's start without effect, and learn through the other factor.
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
    projected.norm(projected.module(layer, OUT_NORM))


def low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``left @ right`` of that rank, as two factors of equal norm."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)  # small: both sides are as thin as a head
    root = s[:rank].sqrt()
    return q_left @ (u[:, :rank] * root), root[:, None] * (v[:rank] @ q_right.T)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(i * size, (i + 1) * size) for i in range(count)]


def _feed_forward(projected: _Narrow, layer: str) -> None:
    """Keep the units with the largest product of norms."""
    inner, outer = (projected.module(layer, name) for name in (INNER, OUTER))
    weight_Fd, bias_F = projected.reads(inner)
    back_dF, back_d = projected.writes(outer)
    units = min(len(weight_Fd), len(projected.small[f"{inner}.weight"]))
    kept = (weight_Fd.norm(dim=1) * back_dF.norm(dim=0)).topk(units).indices.sort().values
    projected.small[f"{outer}.weight"].zero_()  # units beyond the teacher's start without effect
    projected.set(f"{inner}.weight", weight_Fd[kept])
    projected.set(f"{inner}.bias", bias_F[kept])
    projected.set(f"{outer}.weight", back_dF[:, kept])
    projected.set(f"{outer}.bias", back_d)
    projected.norm(projected.module(layer, OUTER_NORM))


def _lm_head(projected: _Narrow, tensors: Mapping[str, str]) -> None:
    weight, bias = projected.writes(tensors["dense.weight"].removesuffix(".weight"))
    projected.set(tensors["dense.weight"], weight @ projected.basis_Dd)
    projected.set(tensors["dense.bias"], bias)
    projected.norm(tensors["norm.weight"].removesuffix(".weight"))
    decoder_VD = projected.wide[tensors["decoder.weight"]]  # may be the word embeddings
    projected.set(tensors["decoder.weight"], decoder_VD @ projected.basis_Dd)
    projected.set(tensors["decoder.bias"], projected.wide[tensors["decoder.bias"]])
