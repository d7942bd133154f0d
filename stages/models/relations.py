"""Queries, keys and values of a layer, whatever a family calls the maps that give them.

As with the LM head, a model is run on a few tokens, and its linear layers of known names are
watched. So a layer is known by the order of the runs: one that shares its weights with others
(ALBERT) is found, and so is what the maps read, which some families norm first.

Shapes: ``B`` sequences, ``L`` positions, ``D`` width of what the layer reads, ``P`` of its queries,
``R`` relations (3).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distilcache.data.codecs.relation_spec import FUSED, KINDS, TOKENS
from distilcache.data.codecs.relations import stacked
from distilcache.data.errors import UserError, require
from distilcache.stages.models.anatomy import in_evaluation, probe_ids
from distilcache.stages.models.families import family_of, shape_of

NAMES = (
    ("query", "key", "value"),  # BERT and its kin
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),  # MPNet
    ("Wqkv",),  # ModernBERT
)
"""Names of the linear layers for queries, keys and values; of the one that gives all of them."""


class RelationTap:
    """What one layer's queries, keys and values read and give, kept while the model runs.

    Args:
        model: A masked LM. Hooks are put into it, which do nothing outside of ``with``.
        layer: 1 is the first layer; negative ones count from the top.
        where: Start of the error: which field asks for it.

    Raises:
        UserError: The model has no such layer, or these are no linear maps of one input.
    """

    def __init__(self, model: Any, layer: int, where: str) -> None:
        layers = shape_of(model.config).layers
        self.layer = layer + layers + 1 if layer < 0 else layer
        """From 1."""
        self._read: list[Tensor] = []
        self._gave: dict[str, list[Tensor]] = {}
        self._open = False
        require(
            1 <= self.layer <= layers,
            f"{where} must lie between 1 and {layers} (or -1: the last), got {layer}",
        )
        parent, names, self._turn = _find(model, self.layer, where)
        self.modules = {name: model.get_submodule(f"{parent}.{name}") for name in names}
        """The linear layers by their own names."""
        kinds = KINDS if len(names) == len(KINDS) else (FUSED,)
        self.tensors = {
            f"{kind}.{end}": f"{parent}.{name}.{end}"
            for kind, name in zip(kinds, names, strict=True)
            for end in ("weight", "bias")
            if getattr(self.modules[name], end) is not None
        }
        """Their tensors in the model by role."""
        embeddings = model.get_input_embeddings()
        found = (name for name, module in model.named_modules() if module is embeddings)
        self.tensors[TOKENS] = f"{next(found)}.weight"
        self._embeddings = embeddings.weight
        for name, module in self.modules.items():
            module.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, _: nn.Module, read: tuple[Tensor, ...], gave: Tensor) -> None:
        if self._open:
            self._gave.setdefault(name, []).append(gave)
            self._read.append(read[0])

    def __enter__(self) -> "RelationTap":
        self._open = True
        self._read, self._gave = [], {}
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False

    def embedded(self, ids_T: Tensor) -> Tensor:
        """Word embeddings of some tokens, [T, E]."""
        embedded_TE: Tensor = self._embeddings.detach().index_select(0, ids_T)
        return embedded_TE

    def read(self) -> Tensor:
        """What the maps read in the last run, [B, L, D]."""
        read_BLD = self._read[self._turn * len(self.modules)]
        self._read, self._gave = [], {}
        return read_BLD

    def gave(self) -> Tensor:
        """Queries, keys and values of the last run, [R, B, L, P]; differentiable."""
        given = [gave[self._turn] for gave in self._gave.values()]
        self._read, self._gave = [], {}
        return stacked(given[0]) if len(given) == 1 else torch.stack(given)


def _find(model: Any, layer: int, where: str) -> tuple[str, tuple[str, ...], int]:
    """Module that holds a layer's maps, their names in it, and which of its runs is the layer's."""
    shape, kind = shape_of(model.config), model.config.model_type
    runs = {} if family_of(model.config).mask == "permutation" else _runs(model)
    wanted = (*probe_ids(model).shape, shape.width)
    for names in NAMES:
        if any(len(runs.get(name, ())) != shape.layers for name in names):
            continue
        parents, read = zip(*(runs[name][layer - 1] for name in names), strict=True)
        heights = {
            len(model.get_submodule(f"{parent}.{name}").weight)
            for parent, name in zip(parents, names, strict=True)
        }
        if (
            len(set(parents)) == 1
            and heights == {shape.width * len(KINDS) // len(names)}
            and all(tuple(x.shape) == wanted and torch.equal(x, read[0]) for x in read)
        ):
            before = [parent for parent, _ in runs[names[0]][: layer - 1]]
            return parents[0], names, before.count(parents[0])
    raise UserError(
        f"{where} must be 0 for a model of type {kind!r}, whose queries, keys and values are no "
        "linear maps, of its width, of what the layer reads"
    )


@torch.no_grad()
def _runs(model: Any) -> dict[str, list[tuple[str, Tensor]]]:
    """By name each run of a linear layer of such a name: the module it is in, and what it read."""
    runs: dict[str, list[tuple[str, Tensor]]] = {}
    known = {name for names in NAMES for name in names}

    def note(path: str, module: nn.Module, read: tuple[Tensor, ...], gave: Any) -> None:
        parent, _, name = path.rpartition(".")
        runs.setdefault(name, []).append((parent, read[0]))

    handles = [
        module.register_forward_hook(partial(note, path))
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in known and type(module) is nn.Linear
    ]
    try:
        with in_evaluation(model):
            model.base_model(input_ids=probe_ids(model))
    finally:
        for handle in handles:
            handle.remove()
    return runs
