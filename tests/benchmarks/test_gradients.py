"""The fidelity benchmark's angle against one worked out from whole gradients."""

import math

import pytest
import torch

from benchmarks.gradients import Source, gradient_gaps, replay_error
from benchmarks.rivals import lloyd_max, nearest
from distilcache.data.cache.cache import Cache
from distilcache.stages.student_train.config import StudentConfig
from distilcache.stages.student_train.student import build_student

EXACT = {"hidden_dtype": "float32", "top_k": 0}


@pytest.fixture
def student(small_cache):
    cache = Cache.open(small_cache(**EXACT))
    return build_student(
        size="2x32",
        student=StudentConfig(sizes=("2x32",)),
        seed=0,
        encoding=cache.encoding,
        teacher_dir=cache.teacher_dir,
    )


def whole_gradient(source, student, batches):
    student.zero_grad()
    for k in batches:
        source.loss(k).backward()
    return torch.cat([p.grad.flatten().double() for p in student.parameters()])


def test_angle_and_norm_ratio_are_those_of_the_whole_gradients(small_cache, student):
    live = Source(Cache.open(small_cache(**EXACT)), "replay", student, 4, 2.0)
    coarse = Cache.open(small_cache(hidden_quality=5e-2))
    stored = {s: Source(coarse, s, student, 4, 2.0) for s in ("replay", "replay+topk", "sparse")}
    gaps = list(gradient_gaps(live, stored, student, range(3)))
    assert len(gaps) == 3
    for count in (1, 3):
        exact = whole_gradient(live, student, range(count))
        for name, source in stored.items():
            found = whole_gradient(source, student, range(count))
            cosine = float(exact @ found / exact.norm() / found.norm())
            gap = gaps[count - 1][name]
            assert gap.degrees == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-3)
            assert gap.norm_ratio == pytest.approx(float(found.norm() / exact.norm()), rel=1e-4)
            assert gap.degrees > 0.05
    same = {"live": Source(live.batches.cache, "replay", student, 4, 2.0)}
    assert next(gradient_gaps(live, same, student, [0]))["live"].degrees < 1e-4


def test_replay_error_falls_with_the_quality(small_cache):
    live = Cache.open(small_cache(**EXACT))
    coarse, fine = (
        replay_error(Cache.open(small_cache(hidden_quality=q)), live, "replay+topk", 4)
        for q in (5e-2, 1e-3)
    )
    assert 0 < fine["kl_2"] < 5e-3 < coarse["kl_2"]
    assert 0 < fine["cosine_error"] < coarse["cosine_error"]
    assert replay_error(live, live, "replay", 4)["kl_2"] == pytest.approx(0, abs=1e-6)


def test_lloyd_max_levels_are_the_published_ones():
    """Max (1960), table I: 4 levels of N(0, 1) at 0.4528 and 1.510, distortion 0.1175."""
    levels = lloyd_max(2)
    assert levels.tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=1e-3)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert float((x - nearest(x, levels)).pow(2).mean()) == pytest.approx(0.1175, abs=2e-3)
