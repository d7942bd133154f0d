"""The summary of arms by hand, and its plot."""

import struct

import pytest

from benchmarks import ablation
from benchmarks.comparison_summary import draw, summarise, tables, verdict_lines
from benchmarks.offline_equals_online import COMPARISON
from distilcache.pipeline.report.text import spread_of

ARMS = {arm.name: arm for arm in (*COMPARISON.arms, *ablation.COMPARISON.arms)}


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


def summary_of(*results):
    return summarise(COMPARISON, results)


def test_summary_by_hand():
    results = [result("a", s, n) for s, n in enumerate((4.0, 4.2, 4.4))]
    results += [result("b", s, n, ece=0.05) for s, n in enumerate((4.1, 4.3, 4.8))]
    summary = summary_of(*results)
    a, b = summary["arms"]["a"], summary["arms"]["b"]
    assert a["mlm_nll"] == pytest.approx({"mean": 4.2, "sd": 0.2})
    assert b["mlm_nll"]["mean"] == pytest.approx(4.4)
    # differences 0.1, 0.1, 0.4: mean 0.2, variance (0.01 + 0.01 + 0.04) / 2
    assert b["minus_reference"]["mlm_nll"] == pytest.approx({"mean": 0.2, "sd": 0.03**0.5})
    assert a["minus_reference"]["mlm_nll"] == {"mean": 0.0, "sd": 0.0}
    assert a["tokens_per_s"]["mean"] == 1001.0
    by_figure = {v["figure"]: v for v in summary["verdicts"]}
    assert {v["against"] for v in summary["verdicts"]} == {"a"}, "a_all is not there"
    assert by_figure["ece"]["outside_by"] == pytest.approx(0.04)
    assert by_figure["teacher_top1_agreement"]["outside_by"] == 0
    assert by_figure["mlm_nll"]["seed_spread"] == pytest.approx(0.2)
    lines = verdict_lines(summary)
    # 0.2 / (0.03 ** 0.5 / 3 ** 0.5) = 2
    assert "MLM loss +0.2000 ± 0.1732 (2.0 standard errors); spread of seeds 0.2000: " in lines[0]
    assert lines[2].endswith("within it")
    assert lines[3].endswith("OUTSIDE it by 0.0400")
    assert "| b | cache (default) | +0.2000 ± 0.1732 |" in tables(COMPARISON, summary)


def test_pairs_need_the_same_seed():
    summary = summary_of(result("a", 0, 4.0), result("a", 1, 5.0), result("b", 1, 5.5))
    assert summary["arms"]["b"]["minus_reference"]["mlm_nll"] == {"mean": 0.5, "sd": None}
    assert summary["verdicts"][0]["outside_by"] == 0
    alone = summary_of(result("a", 0, 4.0), result("b", 1, 5.5))
    assert alone["verdicts"] == []
    assert "| a | live, masked | 1 |" in tables(COMPARISON, alone)
    single = summary_of(result("a", 0, 4.0), result("b", 0, 5.5))
    assert single["verdicts"][0]["outside_by"] is None
    assert "spread of seeds" not in verdict_lines(single)[0]


def test_the_ablation_compares_the_two_that_are_said_to_cost_most_with_the_others():
    losses = {"full": 4.0, "no_mlm": 4.05, "no_cos": 4.1, "no_ce": 4.4, "random": 3.9}
    results = [result(arm, s, x + s / 10) for arm, x in losses.items() for s in range(3)]
    results[-1]["quality"]["mlm_nll"] += 0.3
    found = {
        (v["arm"], v["against"]): v["difference"]
        for v in summarise(ablation.COMPARISON, results)["verdicts"]
        if v["figure"] == "mlm_nll"
    }
    assert found["no_ce", "no_cos"] == pytest.approx({"mean": 0.3, "sd": 0.0}, abs=1e-9)
    # -0.2, -0.2, +0.1: mean -0.1, variance 0.03
    assert found["random", "no_cos"] == pytest.approx({"mean": -0.1, "sd": 0.03**0.5})
    assert set(found) == {(a, b) for a in ("random", "no_ce") for b in ("no_cos", "no_mlm")}


def test_plot_of_any_number_of_arms():
    results = [result(a, seed, 4.0 + 0.1 * seed) for a in COMPARISON.names for seed in range(3)]
    for some in (results, results[:3], results[:1]):
        png = draw(COMPARISON, some)
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", png[16:24])[0] == 1500


def test_spreads():
    assert spread_of([3.0]) == {"mean": 3.0, "sd": None}
    assert spread_of([1.0, 3.0]) == {"mean": 2.0, "sd": 2**0.5}
