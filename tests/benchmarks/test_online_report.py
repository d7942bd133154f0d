"""The summary of arms by hand, and its plot."""

import struct

import pytest
from benchmarks.online_report import draw, summarise, tables, verdict_lines

from benchmarks.arms import ARMS
from benchmarks.common import mean_of, median_of
from benchmarks.offline_equals_online import NAMES


def result(arm, seed, nll, **other):
    quality = {"mlm_nll": nll, "teacher_kl": nll / 4, "teacher_top1_agreement": 0.5, "ece": 0.01}
    return {
        "arm": arm,
        "label": ARMS[arm].label,
        "kind": ARMS[arm].kind,
        "seed": seed,
        "bytes_per_token": 20.0,
        "training": {"tokens_per_s": 1000.0 + seed},
        "quality": {**quality, **other},
        "teacher": {**quality, "mlm_nll": 3.0},
    }


def test_summary_by_hand():
    results = [result("a", s, n) for s, n in enumerate((4.0, 4.2, 4.4))]
    results += [result("b", s, n, ece=0.05) for s, n in enumerate((4.1, 4.3, 4.8))]
    summary = summarise(results)
    a, b = summary["arms"]["a"], summary["arms"]["b"]
    assert a["mlm_nll"] == pytest.approx({"mean": 4.2, "sd": 0.2})
    assert b["mlm_nll"]["mean"] == pytest.approx(4.4)
    # differences 0.1, 0.1, 0.4: mean 0.2, variance (0.01 + 0.01 + 0.04) / 2
    assert b["minus_a"]["mlm_nll"] == pytest.approx({"mean": 0.2, "sd": 0.03**0.5})
    assert a["minus_a"]["mlm_nll"] == {"mean": 0.0, "sd": 0.0}
    assert a["tokens_per_s"]["mean"] == 1001.0
    by_figure = {v["figure"]: v for v in summary["verdicts"]}
    assert {v["against"] for v in summary["verdicts"]} == {"a"}, "a_all is not there"
    assert by_figure["ece"]["within"] is False
    assert by_figure["ece"]["outside_by"] == pytest.approx(0.04)
    assert by_figure["teacher_top1_agreement"]["within"] is True
    assert by_figure["mlm_nll"]["seed_spread"] == pytest.approx(0.2)
    lines = verdict_lines(summary)
    assert "MLM loss +0.2000 (sd of the difference 0.1732, spread of seeds 0.2000)" in lines[0]
    assert lines[3].endswith("OUTSIDE the seed spread by 0.0400")
    assert "| b | cache (default) | +0.2000 ± 0.1732 |" in tables(summary, markdown=True)


def test_pairs_need_the_same_seed():
    summary = summarise([result("a", 0, 4.0), result("a", 1, 5.0), result("b", 1, 5.5)])
    assert summary["arms"]["b"]["minus_a"]["mlm_nll"] == {"mean": 0.5, "sd": None}
    assert summary["verdicts"][0]["within"] is True
    alone = summarise([result("a", 0, 4.0), result("b", 1, 5.5)])
    assert alone["verdicts"] == []
    assert "-" in tables(alone)
    single = summarise([result("a", 0, 4.0), result("b", 0, 5.5)])
    assert single["verdicts"][0]["within"] is None
    assert "no spread" in verdict_lines(single)[0]


def test_plot_of_any_number_of_arms():
    results = [result(arm, seed, 4.0 + 0.1 * seed) for arm in NAMES for seed in range(3)]
    for some in (results, results[:3], results[:1]):
        png = draw(summarise(some), some)
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", png[16:24])[0] == 1500


def test_spreads():
    assert mean_of([3.0]).sd is None
    assert (mean_of([1.0, 2.0, 6.0]).mean, mean_of([1.0, 3.0]).sd) == (3.0, 2**0.5)
    assert median_of([5.0]).q3 == 5.0
    assert (median_of([4.0, 1.0, 3.0, 2.0]).median, median_of([1.0, 2.0, 3.0]).q1) == (2.5, 1.5)
