"""Parts of an evaluation: held-out text in batches, masked logits, calibration error, turns."""

import math

import numpy as np
import pytest
import torch

from distilcache.stages.evaluate.heldout import padded_batches, read_heldout
from distilcache.stages.evaluate.latency import measure_speed, throughput_batch_size
from distilcache.stages.evaluate.mlm import (
    _Sums,
    calibration_gaps,
    masked_logits,
    quality_batch_size,
)
from tests.stages.evaluate.evaluate_support import (
    LENGTH,
    MASKING,
    VOCAB,
    MemoryCorpus,
    model,
    plain_ece,
    random_blocks,
)

CPU = torch.device("cpu")


def test_sequences_are_spread_and_their_masks_do_not_depend_on_how_many():
    corpus = MemoryCorpus(random_blocks(full=True))
    everything = read_heldout(corpus, MASKING, sequences=1000, seed=1)
    some = read_heldout(corpus, MASKING, sequences=6, seed=1)
    whole = everything.input_ids.reshape(-1, LENGTH)
    np.testing.assert_array_equal(some.input_ids.reshape(-1, LENGTH), whole[[0, 5, 10, 15, 20, 25]])
    other = read_heldout(corpus, MASKING, sequences=1000, seed=2)
    assert not np.array_equal(other.input_ids, everything.input_ids)


def test_full_sequences_need_no_attention_mask():
    corpus = MemoryCorpus(random_blocks(full=True))
    heldout = read_heldout(corpus, MASKING, sequences=7, seed=1)
    batches = list(padded_batches(heldout, batch_size=4, pad_id=0, device=CPU))
    assert [len(b.input_ids) for b in batches] == [4, 3]
    assert all(b.attention_mask is None for b in batches)


def test_batches_shrink_for_large_vocabularies():
    heldout = read_heldout(MemoryCorpus(random_blocks()), MASKING, sequences=30, seed=1)
    assert quality_batch_size(heldout, VOCAB, 32) == 32
    assert quality_batch_size(heldout, 10**9, 32) == 1
    assert throughput_batch_size(32, 128, 30522) == 32
    assert throughput_batch_size(32, 512, 250_000) == 2


def test_masked_logits_of_every_family_equal_full_logits():
    corpus = MemoryCorpus(random_blocks())
    heldout = read_heldout(corpus, MASKING, sequences=8, seed=1)
    (batch,) = padded_batches(heldout, batch_size=8, pad_id=0, device=CPU)
    assert batch.attention_mask is not None
    for kind in ("bert", "distilbert", "roberta"):
        own = model(kind, positions=LENGTH + 2)
        with torch.no_grad():
            full = own(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            cut = masked_logits(own, batch)
            after = own(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        torch.testing.assert_close(cut, full.flatten(0, 1)[batch.masked_index])
        assert torch.equal(full, after), "the hook must be gone"


def test_calibration_error_by_hand():
    # Bins of width 1/15: 0.2 and 0.9 lie in the third and the fourteenth.
    confidence = torch.tensor([0.19, 0.2, 0.9, 0.9, 0.9, 0.9])
    hits = torch.tensor([False, True, True, True, False, False])
    gaps = calibration_gaps(confidence, hits)
    wanted = torch.zeros(15, dtype=torch.float64)
    wanted[2], wanted[13] = 0.39 - 1, 3.6 - 2
    torch.testing.assert_close(gaps, wanted, atol=1e-6, rtol=0)
    # 2/6 |1/2 - 0.195| + 4/6 |1/2 - 0.9|
    assert float(gaps.abs().sum()) / 6 == pytest.approx(2 / 6 * 0.305 + 4 / 6 * 0.4)
    assert plain_ece(confidence, hits) == pytest.approx(float(gaps.abs().sum()) / 6)


def test_no_number_stays_none_in_every_mean():
    sums = _Sums(CPU)
    teacher_MV = torch.zeros(3, VOCAB).log_softmax(-1)
    sums.add(torch.full((3, VOCAB), torch.nan), torch.arange(3), teacher_MV)
    found = sums.result(3, True)
    means = (found.mlm_nll, found.mlm_nll_stderr, found.teacher_kl)
    assert all(math.isnan(mean) for mean in means)


def test_calibration_bins_end_at_zero_and_one():
    gaps = calibration_gaps(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([False, True, False]))
    assert gaps.tolist() == [0.0] * 14 + [1.0]


def test_batches_of_a_calibration_error_add_up():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(4000, generator=generator)
    honest = torch.rand(4000, generator=generator) < confidence
    parts = zip(confidence.split(700), honest.split(700), strict=True)
    gaps = sum(calibration_gaps(c, h) for c, h in parts)
    error = float(gaps.abs().sum()) / 4000
    assert error == pytest.approx(plain_ece(confidence, honest))
    assert error < 0.03, "as often right as it says"
    wrong = calibration_gaps(confidence, torch.zeros(4000, dtype=torch.bool))
    assert float(wrong.abs().sum()) / 4000 == pytest.approx(float(confidence.mean()))


def test_no_memory_is_taken_for_passes_that_are_to_come():
    class Once(torch.nn.Module):
        def forward(self, input_ids):
            raise EOFError

    with pytest.raises(EOFError):
        measure_speed(
            [Once()], max_length=8, vocab_size=VOCAB, batch_size=3, repeats=1 << 42, device=CPU
        )


def test_models_take_turns():
    calls = []

    class Recorder(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, input_ids):
            calls.append((self.name, tuple(input_ids.shape)))

    measure_speed(
        [Recorder("a"), Recorder("b")],
        max_length=8,
        vocab_size=VOCAB,
        batch_size=3,
        repeats=4,
        device=CPU,
    )
    single = [name for name, shape in calls if shape == (1, 8)]
    batched = [name for name, shape in calls if shape == (3, 8)]
    assert single == list("aabb") + list("ab") * 4
    assert batched == list("ab") + list("ab") * 3
