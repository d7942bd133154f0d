"""The last layer where only some positions matter.

Teacher and student are asked for hidden states at the signal positions alone, a seventh of all at
15 % masking, and what follows a layer's attention is three quarters of its products. So the last
layer goes on with those positions once its attention has read all of them.
"""

from typing import Any

import torch

from distilcache.stages.models.anatomy import in_evaluation, last_layer, probe_ids

ROW_WISE = ("attention.output", "sa_layer_norm")
"""Modules of a layer from which on each position may be computed on its own, all arguments
included: in BERT and its kin, and in DistilBERT."""
TOLERANCE = 1e-5


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


@torch.no_grad()
def filter_last_layer(model: Any) -> RowFilter | None:
    """Put a filter into the last layer of a masked LM; without chosen rows nothing changes.

    Whether a layer goes on position by position is tried: a residual connection may lead around
    it (MobileBERT), a convolution may follow (DeBERTa of one layer), or layers may be shared.

    Returns:
        None where the last layer has no part that is row by row.
    """
    layer = last_layer(model)
    parts = dict(layer.named_modules()) if layer is not None else {}
    part = next((parts[name] for name in ROW_WISE if name in parts), None)
    if part is None:
        return None
    rows = RowFilter()
    handle = part.register_forward_pre_hook(rows)
    if _works(model, rows):
        return rows
    handle.remove()
    return None


def _works(model: Any, rows: RowFilter) -> bool:
    ids_BL = probe_ids(model)
    # More than a sequence has positions: some models cut their output to these.
    rows_N = torch.arange(1, ids_BL.numel(), device=ids_BL.device)
    with in_evaluation(model):
        whole_BLD = model.base_model(input_ids=ids_BL).last_hidden_state
        rows.rows_N = rows_N
        try:
            cut_1ND = model.base_model(input_ids=ids_BL).last_hidden_state
        except (RuntimeError, ValueError, IndexError, AttributeError):
            return False
        finally:
            rows.rows_N = None
    wanted_ND = whole_BLD.flatten(0, 1)[rows_N]
    return cut_1ND.shape == wanted_ND[None].shape and torch.allclose(
        cut_1ND[0], wanted_ND, rtol=TOLERANCE, atol=TOLERANCE
    )
