"""The last layer where only some positions matter.

Teacher and student are asked for hidden states at the signal positions alone, a seventh of all at
15 % masking, and what follows a layer's attention is three quarters of its products. So the last
layer goes on with those positions once its attention has read all of them.
"""

from typing import Any

import torch

from data.families import FAMILIES


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


def filter_last_layer(model: Any) -> RowFilter | None:
    """Put a filter into the last layer of a masked LM; without chosen rows nothing changes.

    Returns:
        None where the family's layers have no part that is row by row.
    """
    family = FAMILIES[model.config.model_type]
    layers = model.get_submodule(family.layers)
    # DeBERTa's convolution after the first layer reads neighbours.
    convolved = getattr(model.config, "conv_kernel_size", 0) > 0 and len(layers) == 1
    if not family.row_wise or convolved:
        return None
    rows = RowFilter()
    layers[-1].get_submodule(family.row_wise).register_forward_pre_hook(rows)
    return rows
