"""Batches on the host: every signal position once, in its place, and little padding."""

import numpy as np
import pytest
import torch

from distilcache.data.cache.schema import Encoding
from distilcache.data.masks.masking import MaskedBlock
from distilcache.stages.teacher_cache.batches import block_inputs, place_signals

CPU = torch.device("cpu")


def placed(lengths, policy="masked", logit_policy="masked"):
    """A block whose tokens are their own flat index, the first two of each sequence masked."""
    lengths = np.array(lengths)
    counts = np.minimum(lengths, 2)
    block = MaskedBlock(
        input_ids=np.arange(lengths.sum()).astype(np.uint16),
        masked_counts=counts.astype(np.uint16),
        masked_positions=np.concatenate([np.arange(n) for n in counts]).astype(np.uint16),
        labels=np.zeros(counts.sum(), np.uint16),
    )
    encoding = Encoding(
        vocab_size=60_000,
        max_length=128,
        pad_id=59_999,
        hidden_positions=policy,
        logit_positions=logit_policy,
        tail_samples=2,
    )
    return place_signals(block, lengths, encoding, (0, 0, 0)), encoding


@pytest.mark.parametrize("batch_tokens", [1, 20, 64, 10_000])
@pytest.mark.parametrize("lengths", [[8] * 9, [3, 9, 1, 9, 4, 30, 2, 3, 7, 7]])
@pytest.mark.parametrize("policy", ["masked", "masked+0.4", "all"])
def test_signal_positions_arrive_in_the_order_of_the_block(lengths, policy, batch_tokens):
    """The encoder stands for itself here: its hidden state is the token."""
    block, encoding = placed(lengths, "masked", policy)
    inputs = block_inputs(block, encoding, batch_tokens, CPU)
    taken, sizes = [], 0
    for batch in inputs.batches:
        padded = batch.ids_BL == encoding.pad_id
        assert (batch.attention_BL is None) == (not padded.any())
        if batch.attention_BL is not None:
            assert torch.equal(batch.attention_BL, ~padded)
        assert batch.ids_BL.numel() <= batch_tokens or len(batch.ids_BL) == 1
        sizes += int((~padded).sum())
        taken.append(batch.ids_BL.flatten()[batch.rows_N])
    assert sizes == sum(lengths)
    rows = torch.cat(taken)
    rows = rows if inputs.order_N is None else rows[inputs.order_N]
    assert rows.tolist() == block.rows.tolist()
    for index, wanted in (
        (inputs.hidden_index, block.hidden_rows),
        (inputs.logit_index, block.logit_rows),
    ):
        assert (rows if index is None else rows[index]).tolist() == wanted.tolist()
    assert inputs.tail_N.shape == (len(block.logit_rows),)
    assert inputs.residual_N2 is None


def test_equal_lengths_need_neither_mask_nor_order():
    inputs = block_inputs(*placed([16] * 8), 64, CPU)
    assert len(inputs.batches) == 2
    assert inputs.order_N is None
    assert all(batch.attention_BL is None for batch in inputs.batches)


def test_little_is_padded():
    lengths = np.random.default_rng(0).integers(4, 128, 512)
    inputs = block_inputs(*placed(lengths), 8192, CPU)
    padded = sum(batch.ids_BL.numel() for batch in inputs.batches)
    assert padded < 1.08 * lengths.sum()
