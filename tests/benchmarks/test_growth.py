"""The growth benchmark: its figures from known usages, its index, and a command that it watches."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.growth import SIZES, Plan, growth_of, make_teacher, repeat_index, write_recipe
from benchmarks.usage import Usage, run_command
from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.pipeline.recipe import load_recipe


def usages(cpu, peak):
    return {
        size: [Usage(1.0, cpu[i], peak[i], peak[i] / 2, 1000 * size)]
        for i, size in enumerate(SIZES)
    }


def test_start_up_is_no_growth_and_curvature_is():
    flat = growth_of("corpus", usages((5.1, 5.4, 6.6), (100, 100, 106)))
    assert flat["time_ratio"] == pytest.approx(1.0)
    assert flat["peak_ratio"] == pytest.approx(1.06)
    assert flat["bytes_per_token"] == pytest.approx(3e6 / 15_000)
    assert growth_of("corpus", usages((5.1, 5.4, 7.8), (100,) * 3))["time_ratio"] == pytest.approx(
        2
    )
    assert growth_of("evaluate", usages((5, 5, 6), (100,) * 3))["time_ratio"] == pytest.approx(1.2)


def test_every_repetition_starts_from_nothing(tmp_path, monkeypatch):
    def run_stage(plan, stage, size):
        (plan.out / f"{size}x").mkdir(exist_ok=stage != "corpus")
        if stage == "index":
            (plan.out / f"index_{size}x").mkdir()
        return Usage(1.0, 1.0, 1.0, 1.0, 10)

    monkeypatch.setattr(growth, "run_stage", run_stage)
    monkeypatch.setattr(growth, "make_teacher", lambda plan: plan.out)
    monkeypatch.setattr(growth, "write_recipe", lambda plan, teacher, size: None)
    plan = Plan(tmp_path / "out", tmp_path / "text.txt", 0.01, 10)
    found = growth.measure(plan, repetitions=3)
    assert all(len(runs[size]) == 3 for runs in found.values() for size in SIZES)


def test_repeated_index_opens_and_reads(small_cache, tmp_path):
    source = small_cache()
    cache = Cache.open(source)
    blocks = 3 * cache.num_blocks
    repeat_index(source, tmp_path / "large", blocks)
    large = Cache.open(tmp_path / "large")
    assert large.num_blocks >= blocks
    assert large.manifest.fingerprint
    last = large.num_blocks - 1
    expected = cache.read_block(cache.num_blocks - 1)
    for name, column in large.read_block(last).items():
        assert np.array_equal(column, expected[name])


def test_recipe_and_teacher_fit_the_product(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "VOCABULARY", 300)
    words = ["the", "old", "harbour", "boat", "sailed", "north", "wind", "over", "quiet", "sea"]
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=30)) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    plan = Plan(tmp_path, tmp_path / "text.txt", 0.01, 10)
    teacher = make_teacher(plan)
    recipe = load_recipe(write_recipe(plan, teacher, 4))
    assert Path(recipe.corpus.sources[0]).stat().st_size == 40_000
    assert recipe.home == tmp_path / "4x"
    assert recipe.train.steps == growth.STEPS


def test_command_is_watched_and_its_failure_told(tmp_path):
    used = run_command(["--help"], tmp_path / "log.txt")
    assert 0 < used.private < used.peak < 1000
    assert used.cpu > 0
    assert used == replace(used, tokens=0)
    with pytest.raises(UserError, match="verify must succeed, got: .*a teacher cache, got none"):
        run_command(["verify", str(tmp_path)], tmp_path / "log.txt")
