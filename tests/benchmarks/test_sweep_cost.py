"""All arms of all sizes run, and the ratio is that of the sums."""

import pytest

from benchmarks.sweep_cost import cost_ratio, main


def test_a_small_run(run_bench):
    values, printed = run_bench(
        main, teacher_size="2x32", sizes="2x32,1x16", sequences=4, batch_size=2, steps=3,
        repetitions=2, device="cpu",
    )  # fmt: skip
    assert list(values["students_us"]) == ["2x32", "1x16"]
    rates = values["tokens_per_s"]
    expected = [
        cost_ratio(
            rates["teacher"][i],
            [pair["ours"][i] for pair in rates["students"].values()],
            [pair["live"][i] for pair in rates["students"].values()],
        )
        for i in range(2)
    ]
    assert values["ratio"]["median"] == pytest.approx(sum(expected) / 2)
    # Two students beside a teacher pay it twice, a sweep once.
    assert 0.5 < values["bound"] < 1
    assert "sweep / live" in printed


def test_the_ratio_by_hand():
    """A teacher at 100 tokens a second; students at 50 and 200, with it beside them 40 and 80."""
    # (0.01 + 0.02 + 0.005) / (0.025 + 0.0125)
    assert cost_ratio(100, [50, 200], [40, 80]) == pytest.approx(0.035 / 0.0375)
