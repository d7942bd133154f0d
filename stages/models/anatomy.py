"""What a masked LM is made of, read off the model itself.

An LM head has other names in every family, and one of three forms: a decoder alone; dense,
activation, norm and decoder; or the same with the word embeddings as decoder. So the head is found
by running the model on a few tokens and looking at the modules that run after the encoder.

Shapes: ``B`` sequences, ``L`` positions, ``D`` hidden width, ``E`` width of the word embeddings,
``V`` vocabulary.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distilcache.data.codecs.lm_head import ACTIVATIONS
from distilcache.data.codecs.lm_head_spec import LMHeadSpec
from distilcache.data.errors import UserError, require

ACTIVATION_TOLERANCE = 1e-5
SEQUENCES, LENGTH = 2, 7
"""Of the tokens that a model is tried on: an odd length, which some models pad on their own."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A module of the head at work."""

    name: str
    module: nn.Module
    read: Tensor
    wrote: Tensor


def probe_ids(model: Any) -> Tensor:
    """A few token ids, int64 [B, L], on the model's device; rarely special ones."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH) + size // 2
    on_device: Tensor = (ids % size).to(model.device)
    return on_device


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout, and in the mode it was in afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def find_head(model: Any) -> LMHeadSpec:
    """Where the LM head lies in ``state_dict()`` of a model.

    Raises:
        UserError: It is of no form that this version can compute.
    """
    steps = _steps(model)
    kinds = [type(step.module) for step in steps]
    tensors: dict[str, str] = {}
    activation, eps = "gelu", 1e-12
    if kinds[:2] == [nn.Linear, nn.LayerNorm]:
        dense, norm = steps[:2]
        tensors |= _of(model, "dense", dense.name) | _of(model, "norm", norm.name)
        activation = _activation(dense.wrote, norm.read, model)
        eps = float(norm.module.eps)  # type: ignore[arg-type]
        steps = steps[2:]
    if [type(step.module) for step in steps] == [nn.Linear]:
        tensors |= _of(model, "decoder", steps[0].name)
    elif not steps and tensors:
        tensors |= _plain_decoder(model, tensors)
    else:
        found = ", ".join(kind.__name__ for kind in kinds) or "none of them"
        raise UserError(
            "model's LM head must be a linear layer, or dense, activation, norm and decoder, got "
            f"{found} in {type(model).__name__}"
        )
    if "decoder.bias" not in tensors:
        tensors |= _lone_bias(model, tensors)
    return LMHeadSpec(tensors=tensors, activation=activation, eps=eps)


def _steps(model: Any) -> list[_Step]:
    """The linear layers and norms that run after the encoder, in their order."""
    inside = {id(module) for module in model.base_model.modules()}
    steps: list[_Step] = []
    handles = [
        module.register_forward_hook(
            lambda module, read, wrote, name=name: steps.append(_Step(name, module, read[0], wrote))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm) and id(module) not in inside
    ]
    try:
        with in_evaluation(model):
            ids = probe_ids(model)
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return steps


def _of(model: Any, role: str, module: str) -> dict[str, str]:
    """Weight and bias of a module, by role."""
    ends = ("weight", "bias")
    there = {end: getattr(model.get_submodule(module), end) for end in ends}
    return {f"{role}.{end}": f"{module}.{end}" for end in ends if there[end] is not None}


def _outside(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers outside of the encoder, all names of tied ones."""
    prefix = f"{model.base_model_prefix}."
    return {n: t for n, t in model.state_dict().items() if not n.startswith(prefix)}


def _plain_decoder(model: Any, tensors: dict[str, str]) -> dict[str, str]:
    """A decoder whose module is not run: a matrix [V, E] of the head, else the word embeddings.

    Where E is below the head's width, another matrix adds the missing columns.
    """
    embeddings = model.get_input_embeddings().weight
    matrices = {
        name: tensor
        for name, tensor in _outside(model).items()
        if tensor.ndim == 2 and name not in tensors.values()
    }
    own = [name for name, tensor in matrices.items() if tensor.shape == embeddings.shape]
    if own:
        found = _of(model, "decoder", own[0].removesuffix(".weight"))
    else:
        names = model.named_parameters(remove_duplicate=False)
        found = {"decoder.weight": next(name for name, p in names if p is embeddings)}
    columns = [name for name, x in matrices.items() if x.shape[1] == len(embeddings)]
    return found | ({"decoder.columns": columns[0]} if columns else {})


def _lone_bias(model: Any, tensors: dict[str, str]) -> dict[str, str]:
    """A bias that is added to the logits outside of the decoder."""
    vocabulary = model.state_dict()[tensors["decoder.weight"]].shape[0]
    biases = [
        name
        for name, tensor in _outside(model).items()
        if tensor.numel() == vocabulary and name not in tensors.values()
    ]
    return {"decoder.bias": biases[0]} if biases else {}


def _activation(before: Tensor, after: Tensor, model: Any) -> str:
    """The function between two tensors, by its name; configurations name one in several ways."""
    off = {name: float((f(before) - after).abs().max()) for name, f in ACTIVATIONS.items()}
    nearest = min(off, key=lambda name: off[name])
    require(
        off[nearest] <= ACTIVATION_TOLERANCE * max(1.0, float(after.abs().max())),
        f"model's LM head must use one of the activations {', '.join(ACTIVATIONS)}, got another "
        f"one in {type(model).__name__}",
    )
    return nearest


def layer_lists(model: Any) -> dict[str, int]:
    """Module lists by name, with their lengths: layers, groups or blocks of them."""
    return {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}


def last_layer(model: Any) -> nn.Module | None:
    """The layer that is run last; None where a model has no list of whole layers."""
    layers = int(model.config.num_hidden_layers)
    lists = [
        m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers
    ]
    return lists[-1][-1] if lists else None
