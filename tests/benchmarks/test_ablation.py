"""All arms from the command line, kept when repeated; order and claim by hand."""

import json

import pytest
from benchmarks.ablation_report import FIGURES, draw, summarise, tables, verdicts
from click.testing import CliRunner

from benchmarks.ablation import LABELS, main


def call(*words):
    done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def test_all_arms_from_the_command_line(tmp_path, small_corpus, small_teacher):
    texts = [small_corpus(seed=seed).parent / "text.txt" for seed in (0, 1)]
    out = tmp_path / "work"
    command = ["--teacher", small_teacher, "--text", texts[0], "--heldout", texts[1], "--out", out]
    command += ["--size", "2x32", "--steps", 3, "--batch-size", 6, "--max-length", 16]
    command += ["--max-bytes", 10**6, "--heldout-sequences", 16, "--device", "cpu"]
    command += ["--dtype", "float32", "--lr", 3e-3]
    call(*command, "--prepare")
    # All that parts need which then run side by side: masks as well.
    assert sorted(p.name for p in (out / "caches").iterdir()) == ["default", "masks"]
    call(*command, "--seeds", 0, "--arms", "full,random")
    written = ["--json", tmp_path / "figures.json", "--plot", tmp_path / "plot.png"]
    whole = call(*command, *written, "--seeds", 0)
    values = json.loads((tmp_path / "figures.json").read_text())
    assert [r["arm"] for r in values["results"]] == list(LABELS)
    found = {r["arm"]: r["training"] for r in values["results"]}
    assert "ce" not in found["no_ce"]
    assert "cos" not in found["no_cos"]
    assert "mlm" not in found["no_mlm"]
    assert {"ce", "cos", "mlm"} <= found["full"].keys() & found["random"].keys()
    losses = {r["quality"]["mlm_nll"] for r in values["results"]}
    assert len(losses) == len(values["results"]), "every part is a training of its own"
    assert "worst first: " in whole.stdout
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    stamps = [p.stat().st_mtime_ns for p in sorted(out.glob("results/*"))]
    assert call(*command, "--seeds", 0).stdout == whole.stdout
    assert [p.stat().st_mtime_ns for p in sorted(out.glob("results/*"))] == stamps


def result(arm, seed, nll):
    return {
        "arm": arm,
        "seed": seed,
        "quality": {"mlm_nll": nll, "teacher_kl": nll / 4, "teacher_top1_agreement": 1 - nll / 10},
        "teacher": {"mlm_nll": 3.0, "teacher_kl": 0.0, "teacher_top1_agreement": 1.0},
    }


def results(random):
    losses = {"full": 4.0, "no_mlm": 4.05, "no_cos": 4.1, "no_ce": 4.4, "random": random}
    noise = (0.0, 0.2, 0.1)
    made = [result(arm, s, x + noise[s]) for arm, x in losses.items() for s in range(3)]
    made[-1]["quality"]["mlm_nll"] += 0.3  # random, seed 2
    return made


def test_order_and_claim_by_hand():
    summary = summarise(results(4.7))
    assert summary["order"]["mlm_nll"] == ["random", "no_ce", "no_cos", "no_mlm"]
    assert summary["order"]["teacher_top1_agreement"] == ["random", "no_ce", "no_cos", "no_mlm"]
    assert summary["arms"]["no_ce"]["minus_full"]["mlm_nll"] == pytest.approx(
        {"mean": 0.4, "sd": 0.0}, abs=1e-9
    )
    # differences 0.7, 0.7, 1.0: mean 0.8, variance (0.01 + 0.01 + 0.04) / 2
    assert summary["arms"]["random"]["minus_full"]["mlm_nll"] == pytest.approx(
        {"mean": 0.8, "sd": 0.03**0.5}
    )
    claim = summary["claim"]["mlm_nll"]
    assert claim["holds"]
    assert (claim["lesser"], claim["next"]) == ("no_ce", "no_cos")
    assert claim["gap"] == pytest.approx(0.3)
    assert "cost most holds: without L_ce against without L_cos +0.3000" in verdicts(summary)[0]


def test_a_refuted_claim_says_so():
    summary = summarise(results(3.9))
    claim = summary["claim"]["mlm_nll"]
    assert not claim["holds"]
    assert summary["order"]["mlm_nll"][0] == "no_ce"
    # Against no L_cos: -0.2, -0.2, +0.1; mean -0.1, standard error sqrt(0.03 / 3).
    assert (claim["lesser"], claim["next"]) == ("random", "no_cos")
    assert claim["gap"] == pytest.approx(-0.1)
    assert claim["gap_stderr"] == pytest.approx(0.1)
    assert "does NOT hold" in verdicts(summary)[0]


def test_what_is_missing_is_left_out():
    some = [r for r in results(4.7) if r["arm"] in ("full", "no_ce") and r["seed"] == 0]
    summary = summarise(some)
    assert summary["claim"] == dict.fromkeys(FIGURES)
    assert summary["arms"]["no_ce"]["minus_full"]["mlm_nll"]["sd"] is None
    assert "| without L_ce | 1 | 4.4000 | +0.4000 |" in tables(summary, markdown=True)
    assert draw(summary, some)[:8] == b"\x89PNG\r\n\x1a\n"


def test_arms_without_a_common_seed_are_not_held_against_each_other():
    seeds = {"full": (0, 1, 2), "no_ce": (0,)}
    some = [r for r in results(4.7) if r["seed"] in seeds.get(r["arm"], (1, 2))]
    summary = summarise(some)
    assert summary["claim"] == dict.fromkeys(FIGURES)
    assert "worst first" in tables(summary)


def test_bad_input_is_one_line(tmp_path):
    for words in (["--arms", "full,z"], ["--seeds", "0,-1"], ["--teacher", str(tmp_path / "no")]):
        done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
    assert not (tmp_path / "out").exists()
