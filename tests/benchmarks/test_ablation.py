"""The ablation from the command line; finished runs are kept."""

import json

from click.testing import CliRunner

from benchmarks.ablation import COMPARISON, main


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
    # All that calls side by side need: masks as well.
    assert sorted(p.name for p in (out / "caches").iterdir()) == ["default", "masks"]
    part = call(*command, "--seeds", 0, "--arms", "full,random")
    assert "without L_ce" not in part.stdout
    written = ["--json", tmp_path / "figures.json", "--plot", tmp_path / "plot.png"]
    whole = call(*command, *written, "--seeds", 0)
    values = json.loads((tmp_path / "figures.json").read_text())
    assert [r["arm"] for r in values["results"]] == COMPARISON.names
    found = {r["arm"]: r["training"] for r in values["results"]}
    assert "ce" not in found["no_ce"]
    assert "cos" not in found["no_cos"]
    assert "mlm" not in found["no_mlm"]
    assert {"ce", "cos", "mlm"} <= found["full"].keys() & found["random"].keys()
    losses = {r["quality"]["mlm_nll"] for r in values["results"]}
    assert len(losses) == len(values["results"]), "every arm is a training of its own"
    assert "without L_ce against without L_cos: MLM loss" in whole.stdout
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    stamps = [p.stat().st_mtime_ns for p in sorted(out.glob("results/*"))]
    assert call(*command, "--seeds", 0).stdout == whole.stdout
    assert [p.stat().st_mtime_ns for p in sorted(out.glob("results/*"))] == stamps


def test_bad_input_is_refused(tmp_path):
    for words in (["--arms", "full,z"], ["--seeds", "0,-1"], ["--teacher", str(tmp_path / "no")]):
        done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
    assert not (tmp_path / "out").exists()
