"""Logits of fine-tuned teachers on disk: computed once per task and seed, read by every student.

One safetensors file with the tensor ``logits`` [N, C] or [N, 2, L] and, in its metadata, the key of
the run that they come from: weights, data and settings.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import write_bytes

NAME = "logits"


def write_soft(path: Path, logits: NDArray[np.float32], key: str) -> None:
    """Write logits so that the file is either whole or absent."""
    tensor = torch.from_numpy(np.ascontiguousarray(logits))
    write_bytes(path, save({NAME: tensor}, metadata={"key": key}))


def read_soft(path: Path, key: str) -> Tensor | None:
    """Logits of the run that ``key`` stands for; None where they are missing or of another."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tensor: Tensor = file.get_tensor(NAME)
            return tensor
    except (OSError, SafetensorError):
        return None
