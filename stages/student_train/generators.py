"""Random generators of a process: their state in a checkpoint, and how ranks are seeded."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from distilcache.stages.student_train.checkpoint_folders import step_of
from distilcache.stages.student_train.training_state import read_tensors


def rng_state() -> bytes:
    """All random generators of this process, as the content of a safetensors file."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if _on_gpu():
        tensors["cuda"] = torch.cuda.get_rng_state()
    scalars = {
        "python": [version, gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    content: bytes = save(tensors, metadata={"scalars": json.dumps(scalars)})
    return content


def _on_gpu() -> bool:
    """Whether this run uses a GPU: one on a CPU leaves those of the machine alone."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def restore_rng(folder: Path, rank: int, seed: int) -> None:
    """Set all random generators to their state in the checkpoint.

    A rank without one (there are more ranks now) is seeded by ``seed``, the rank and the step.
    """
    path = folder / f"rng-{rank}.safetensors"
    if not path.exists():
        seed_rank(seed, rank, step_of(folder))
        return
    tensors = read_tensors(folder, path.stem)
    with safe_open(path, "pt") as file:
        scalars = json.loads(file.metadata()["scalars"])
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = scalars["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and _on_gpu():
        torch.cuda.set_rng_state(tensors["cuda"])


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch so that every rank draws other dropout masks."""
    key = np.array([seed, rank << 40 | step], dtype=np.uint64)
    # torch's generator on a CPU reads only the lower 32 bits of a seed.
    torch.manual_seed(int(np.random.Philox(key=key).random_raw()) % 2**32)
