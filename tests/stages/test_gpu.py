"""The same stages on a CUDA device: needs one, skipped where there is none."""

import pytest
import torch

from data.cache import Cache
from data.masking import MaskingConfig
from stages.student_train.config import StudentConfig, TrainConfig
from stages.student_train.run import train_student
from stages.teacher_cache.config import CacheConfig
from stages.teacher_cache.run import build_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("hidden_dtype", ["coded", "float32"])
def test_a_cache_made_on_cuda_agrees_with_the_cpu(
    tiny_corpus, tiny_teacher, tmp_path, hidden_dtype
):
    caches = []
    for device in ("cpu", "cuda"):
        build_cache(
            corpus_dir=tiny_corpus,
            out=tmp_path / device,
            teacher=str(tiny_teacher),
            masking=MaskingConfig(),
            config=CacheConfig(hidden_dtype=hidden_dtype),
            device=device,
            dtype="float32",
        )
        caches.append(Cache.open(tmp_path / device))
    for block in range(caches[0].num_blocks):
        cpu, cuda = (cache.read_block(block) for cache in caches)
        assert (cpu["input_ids"] == cuda["input_ids"]).all()
        torch.testing.assert_close(
            torch.tensor(cpu["logsumexp"]), torch.tensor(cuda["logsumexp"]), rtol=1e-3, atol=1e-3
        )


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
