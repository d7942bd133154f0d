"""Queries, keys and values of a layer, whatever a family calls the maps that give them.

As with the LM head, a model is run on a few tokens, and its linear layers of known names are
watched. So a layer is known by the order of the runs: one that shares its weights with others
(ALBERT) is found, and so is what the maps read, which some families norm first. Runs on something
else than the tokens are left out (DeBERTa's maps also read its relative positions).

Shapes: ``B`` sequences, ``L`` positions, ``D`` width of what the layer reads, ``P`` of its queries,
``R`` relations (3).
"""

from collections import Counter, defaultdict
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
        self._open = False
        self._forget()
        require(
            1 <= self.layer <= layers,
            f"{where} must lie between 1 and {layers} (or -1: the last), got {layer}",
        )
        parent, self._turns = _find(model, self.layer, where)
        names = tuple(self._turns)
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
            self._gave[name].append(gave)
            self._read[name].append(read[0])

    def _forget(self) -> None:
        # By name: some families call them in another order (LUKE: keys first).
        self._read: dict[str, list[Tensor]] = defaultdict(list)
        self._gave: dict[str, list[Tensor]] = defaultdict(list)

    def __enter__(self) -> "RelationTap":
        self._open = True
        self._forget()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False

    def embedded(self, ids_T: Tensor) -> Tensor:
        """Word embeddings of some tokens, [T, E]."""
        embedded_TE: Tensor = self._embeddings.detach().index_select(0, ids_T)
        return embedded_TE

    def read(self) -> Tensor:
        """What the maps read in the last run, [B, L, D]."""
        name, turn = next(iter(self._turns.items()))
        read_BLD = self._read[name][turn]
        self._forget()
        return read_BLD

    def gave(self) -> Tensor:
        """Queries, keys and values of the last run, [R, B, L, P]; differentiable."""
        given = [self._gave[name][turn] for name, turn in self._turns.items()]
        self._forget()
        return stacked(given[0]) if len(given) == 1 else torch.stack(given)


def _find(model: Any, layer: int, where: str) -> tuple[str, dict[str, int]]:
    """Module that holds a layer's maps, and which run of each of them, by name, is the layer's."""
    shape, kind = shape_of(model.config), model.config.model_type
    runs = {} if family_of(model.config).mask == "permutation" else _runs(model, shape.width)
    for names in NAMES:
        if any(len(runs.get(name, ())) != shape.layers for name in names):
            continue
        parents, turns, read = zip(*(runs[name][layer - 1] for name in names), strict=True)
        heights = {
            len(model.get_submodule(f"{parent}.{name}").weight)
            for parent, name in zip(parents, names, strict=True)
        }
        if (
            len(set(parents)) == 1
            and heights == {shape.width * len(KINDS) // len(names)}
            and all(torch.equal(x, read[0]) for x in read)
        ):
            return parents[0], dict(zip(names, turns, strict=True))
    raise UserError(
        f"{where} must be 0 for a model of type {kind!r}, whose queries, keys and values are no "
        "linear maps, of its width, of what the layer reads"
    )


@torch.no_grad()
def _runs(model: Any, width: int) -> dict[str, list[tuple[str, int, Tensor]]]:
    """By name each run of a linear layer of such a name on all tokens.

    Given are the module it is in, which of the layer's runs it is, and what it read.
    """
    runs: dict[str, list[tuple[str, int, Tensor]]] = {}
    known = {name for names in NAMES for name in names}
    turns: Counter[str] = Counter()
    wanted = (*probe_ids(model).shape, width)

    def note(path: str, module: nn.Module, read: tuple[Tensor, ...], gave: Any) -> None:
        parent, _, name = path.rpartition(".")
        if tuple(read[0].shape) == wanted:
            runs.setdefault(name, []).append((parent, turns[path], read[0]))
        turns[path] += 1

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
