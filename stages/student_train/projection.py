"""Where L_cos compares hidden states of two widths: the map between them."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def first_projection(
    student: PreTrainedModel, lm_head: Any, width: int, teacher_width: int, seed: int
) -> nn.Linear:
    """A map from the student's hidden states to the teacher's; trained, but not exported.

    It starts as the least-squares map between their word embeddings, or at random where the widths
    of these are not those of the hidden states.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not those of GPUs
        projection = nn.Linear(width, teacher_width)
    ours_VD = student.get_input_embeddings().weight.detach().cpu()
    theirs_VD = getattr(lm_head, "decoder_weight", ours_VD).detach().cpu()
    if ours_VD.shape == (len(theirs_VD), width) and theirs_VD.shape[1] == teacher_width:
        ours, theirs = (x.double() - x.double().mean(0) for x in (ours_VD, theirs_VD))
        with torch.no_grad():
            projection.weight.copy_(torch.linalg.lstsq(ours, theirs).solution.T)
            projection.bias.zero_()
    return projection
