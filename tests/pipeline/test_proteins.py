"""A protein model as it is published: one sequence a line, letters for words, a slow tokenizer."""

import random
import re

import numpy as np
import pytest
import torch

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.logits import unpack
from tests.command_line import one_line, run, write_recipe
from tests.stages.models.families_support import make_model, open_model

LETTERS = "LAGVSERTIDPKQNFYMHWC"
WORDS = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, "X", ".", "-", "<null_1>", "<mask>"]


@pytest.fixture
def project(tmp_path):
    """Recipe of an ESM teacher with the files of a published one, and its text."""
    teacher = tmp_path / "teacher"
    roles = {"pad_token_id": 1, "mask_token_id": 28, "cls_token_id": 0, "eos_token_id": 2}
    make_model("esm", len(WORDS), hidden_size=320, **roles).save_pretrained(teacher)
    (teacher / "vocab.txt").write_text("\n".join(WORDS))
    rng = random.Random(0)
    lines = ["".join(rng.choices(LETTERS, k=rng.randint(12, 30))) for _ in range(700)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return write_recipe(
        tmp_path / "recipe.toml",
        tmp_path / "text.txt",
        teacher,
        corpus={"packing": "lines", "max_length": 36, "block_sequences": 512},
        student={"sizes": ["2x320"]},
        train={"batch_size": 8},
    )


def test_words_are_refused_where_letters_stand_for_them(project):
    done = run("corpus", "--recipe", project, "--set", "masking.unit=word")
    assert "masking: unit must be 'token'" in one_line(done.exit_code, done.stderr)
    assert not (project.parent / "p").exists()


def test_all_logits_are_exact_and_cheaper_and_plan_says_so(project):
    planned = run("plan", "--recipe", project)
    assert planned.exit_code == 0, planned.output
    line = next(x for x in planned.stdout.splitlines() if "logits of all 29 ids" in x)
    promised = float(re.search(r"take ([\d.]+)", line)[1])
    advice = re.findall(r"--set (\S+)", line)
    options = [word for setting in advice for word in ("--set", setting)]
    result = run("distill", "--recipe", project, *options)
    assert result.exit_code == 0, (result.output, result.exception)

    cache = Cache.open(project.parent / "p/cache")
    totals = cache.manifest.totals
    assert totals["bytes"] / totals["tokens"] == pytest.approx(promised, rel=0.2)
    columns = cache.read_block(0)
    stored = unpack(columns, 29, 2)
    probabilities = np.exp(stored.values.astype(float))
    assert (np.sort(stored.ids, 1) == np.arange(29)).all()
    # ESM's embeddings depend on how many masks a sequence has, so each is read by itself.
    model, start, row = open_model(project.parent / "teacher"), 0, 0
    for length, masked in zip(columns["lengths"], columns["masked_counts"], strict=True):
        ids = torch.tensor(columns["input_ids"][start : start + length].astype(np.int64))[None]
        places = columns["masked_positions"][row : row + masked].astype(np.int64)
        with torch.no_grad():
            wanted = model(ids, attention_mask=torch.ones_like(ids)).logits[0, places].softmax(-1)
        ours = np.take_along_axis(probabilities, np.argsort(stored.ids, 1), 1)[row : row + masked]
        np.testing.assert_allclose(ours / ours.sum(1, keepdims=True), wanted.numpy(), atol=2e-3)
        start, row = start + length, row + masked
    assert row > 50
