"""Means of the loss terms over several ranks, and over an interruption."""

import pytest
import torch

from distilcache.stages.student_train.means import LossMeans
from distilcache.stages.student_train.model import TERMS


class Pair:
    """One of two ranks, which sums what both have."""

    def __init__(self, is_first):
        self.is_first = is_first
        self.means = []

    def sum_on_device(self, values):
        values.copy_(sum(means._sums for means in self.means))


def two_ranks():
    ranks = Pair(True), Pair(False)
    weights = dict.fromkeys(TERMS, 1.0) | {"mse": 0.0, "rel": 0.0}
    both = [LossMeans(weights, rank, torch.device("cpu")) for rank in ranks]
    for rank in ranks:
        rank.means = both
    return both


def test_sums_of_all_ranks_go_on_after_an_interruption():
    """Restored, the first rank has the sums of both, and the other one none of its own."""
    both = two_ranks()
    for means, sums in zip(both, ([8.0, 2.0, 4.0], [4.0, 2.0, 0.0]), strict=True):
        means.add(torch.tensor([*sums, 0.0, 0.0]))
        means.count([4, 2, 2, 0, 9])
    state = both[0].state()
    state["sums"].pop()  # As before that term.
    del state["counts"]["rel"]
    again = two_ranks()
    for means in again:
        means.restore(state)
        means.add(torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0]))
        means.count([4, 2, 2, 0, 9])
    found = again[0].take()
    assert found == pytest.approx({"ce": 2.0, "mlm": 1.5, "cos": 1.5, "loss": 5.0})
    nothing = dict.fromkeys(TERMS, 0)
    assert again[0].state() == {"sums": [2.0, 1.0, 1.0, 0.0, 0.0], "counts": nothing}
