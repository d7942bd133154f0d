"""The last layer where only some positions matter.

Teacher and student are asked for hidden states at the signal positions alone, a seventh of all at
15 % masking, and what follows a layer's attention is three quarters of its products. So the last
layer goes on with those positions once its attention has read all of them.
"""

from typing import Any

import torch

ROW_WISE = {"bert": "attention.output", "distilbert": "sa_layer_norm"}
"""Module of a layer from which on each position is computed on its own, per model type."""
ROW_WISE["roberta"] = ROW_WISE["xlm-roberta"] = ROW_WISE["camembert"] = ROW_WISE["bert"]


class RowFilter:
    """Cuts a module's arguments to chosen positions, as long as some are chosen.

    A forward pre-hook, so that no model code is repeated here.
    """

    rows_N: torch.Tensor | None = None
    """Flat index of the chosen positions in the batch; None: all go on."""

    def __call__(
        self, module: torch.nn.Module, states_BLD: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """The module's arguments, as [1, N, D]."""
        if self.rows_N is None:
            return None
        rows_N = self.rows_N
        return tuple(x.flatten(0, 1).index_select(0, rows_N)[None] for x in states_BLD)


def filter_last_layer(model: Any) -> RowFilter:
    """Put a filter into the last layer of a masked LM; without chosen rows nothing changes."""
    rows = RowFilter()
    last_layer = next(m for n, m in model.named_modules() if n.endswith(".layer"))[-1]
    module = last_layer.get_submodule(ROW_WISE[model.config.model_type])
    module.register_forward_pre_hook(rows)
    return rows
