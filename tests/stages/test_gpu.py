"""The same stages on a CUDA device: needs one, skipped where there is none."""

import pytest
import torch

from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student
from distilcache.stages.student_train.trainer import DistillationTrainer
from distilcache.stages.teacher_cache.build import Build
from distilcache.stages.teacher_cache.config import CacheConfig
from distilcache.stages.teacher_cache.run import build_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_dtype": "coded"},
        {"hidden_dtype": "float32", "positions": "all"},
        {
            "positions": "masked+0.2",
            "tail_samples": 8,
            "residual_samples": 8,
            "hidden_quality": 1e-2,
        },
    ],
    ids=["coded", "exact", "drawn"],
)
def test_a_cache_made_on_cuda_agrees_with_the_cpu(tiny_corpus, tiny_teacher, tmp_path, settings):
    caches = []
    for device in ("cpu", "cuda"):
        build = Build(
            corpus_dir=tiny_corpus,
            out=tmp_path / device,
            teacher=str(tiny_teacher),
            masking=MaskingConfig(),
            config=CacheConfig(**settings),
            device=device,
            dtype="float32",
        )
        caches.append(build_cache(build))
    for block in range(caches[0].num_blocks):
        cpu, cuda = (cache.read_block(block) for cache in caches)
        assert cpu.keys() == cuda.keys()
        for name in ("input_ids", "labels", "hidden_positions", "logit_positions"):
            assert name not in cpu or (cpu[name] == cuda[name]).all()
        torch.testing.assert_close(
            torch.tensor(cpu["log_odds"]), torch.tensor(cuda["log_odds"]), rtol=2e-3, atol=2e-3
        )
        # The same words, and all but the same distributions: a draw moves where sums differ.
        for name in ("logit_ids", "tail_ids"):
            assert name not in cpu or (cpu[name] == cuda[name]).mean() > 0.97
    states = []
    for cache in caches:
        stored = cache.encoding.hidden_layer()
        flat = torch.from_numpy(cache.read_block(0)[stored.column].copy())
        coded = stored.dtype == "coded"
        shaped = flat.reshape(stored.planes, -1) if coded else flat.reshape(-1, stored.width)
        states.append(cache.teacher.hidden_decoder()({stored.column: shaped}))
    assert (states[0] - states[1]).norm() < 0.2 * states[0].norm()


def test_a_student_trains_on_cuda_to_the_end(tiny_cache, tmp_path):
    figures = train_student(
        cache_dir=tiny_cache(),
        out=tmp_path / "student",
        size="1x32",
        student=StudentConfig(sizes=("1x32",)),
        train=TrainConfig(steps=40, batch_size=8, logging_steps=5, lr=2e-3),
        device="cuda",
    )
    assert figures["steps"] == 40
    assert torch.isfinite(torch.tensor(figures["loss"]))


def test_no_step_waits_for_the_device(tiny_cache, tmp_path, monkeypatch):
    """Torch itself says where the host would wait: an error in all steps but the first and last."""
    step = DistillationTrainer.training_step

    def strict(trainer, *args, **options):
        inner = 0 < trainer.state.global_step < 9
        torch.cuda.set_sync_debug_mode("error" if inner else "default")
        return step(trainer, *args, **options)

    monkeypatch.setattr(DistillationTrainer, "training_step", strict)
    try:
        train_student(
            cache_dir=tiny_cache(),
            out=tmp_path / "student",
            size="1x32",
            student=StudentConfig(sizes=("1x32",)),
            train=TrainConfig(steps=10, batch_size=8, logging_steps=10),
            device="cuda",
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
