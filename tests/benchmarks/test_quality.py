"""Students by loss, masking and start, fine-tuned in the end: four arms, one task."""

import json
from dataclasses import replace

from click.testing import CliRunner

from benchmarks.comparison import comparison_command
from benchmarks.quality import COMPARISON
from tests.builders import random_texts

ARMS = ("default", "rel_ce", "inner", "words")


def test_students_are_fine_tuned_when_all_are_there(tmp_path, small_corpus, small_teacher):
    texts = [small_corpus(seed=seed).parent / "text.txt" for seed in (0, 1)]
    lines = random_texts(24)
    for split in ("train", "dev"):
        path = tmp_path / "glue" / "RTE" / f"{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"{i}\t{a}\t{b}\t{('entailment', 'not_entailment')[i % 2]}"
                for i, (a, b) in enumerate(zip(lines, lines[1:], strict=False))]  # fmt: skip
        path.write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]))
    arms = tuple(arm for arm in COMPARISON.arms if arm.name in ARMS)
    two = replace(COMPARISON, arms=arms, pairs=(), tasks=("rte",))
    main = comparison_command(two, about="Two arms.", steps=3, out="unused")
    command = ["--teacher", small_teacher, "--text", texts[0], "--heldout", texts[1],
               "--out", tmp_path / "work", "--data", tmp_path / "glue", "--size", "2x32",
               "--batch-size", 6, "--max-length", 16, "--max-bytes", 10**6,
               "--heldout-sequences", 16, "--device", "cpu", "--dtype", "float32", "--lr", 3e-3,
               "--seeds", 0, "--json", tmp_path / "figures.json"]  # fmt: skip
    done = CliRunner().invoke(main, [str(word) for word in command], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    values = json.loads((tmp_path / "figures.json").read_text())
    scores = values["tasks"]["arms"]
    assert set(scores) == set(ARMS)
    for arm in ARMS:
        assert scores[arm]["macro"]["mean"] == scores[arm]["rte"]["mean"]
        ratio = scores[arm]["macro"]["mean"] / values["tasks"]["teacher"]
        assert abs(scores[arm]["retention"]["mean"] - ratio) < 1e-9
    assert "whole words masked" in done.stdout.splitlines()[-3]
    drawn = {r["arm"]: r["quality"]["mlm_nll"] for r in values["results"]}
    assert drawn["default"] != drawn["words"]
