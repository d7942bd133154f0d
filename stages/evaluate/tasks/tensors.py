"""Tensors on disk that several runs of a task read: teachers' logits and states, altered copies.

A safetensors file holds one tensor. Its metadata hold a key: the hash of what it was made from.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distilcache.data.storage.files import write_bytes


def write_tensor(path: Path, name: str, values: NDArray[Any], key: str) -> None:
    """Write a tensor; the file is either whole or absent."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    write_bytes(path, save({name: tensor}, metadata={"key": key}))


def has_tensor(path: Path, key: str) -> bool:
    """Whether the file holds the tensor with this key; the tensor is not read."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("key") == key
    except (OSError, SafetensorError):
        return False


def read_tensor(path: Path, name: str, key: str) -> Tensor | None:
    """The tensor with this key; None where it is missing or has another key."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (OSError, SafetensorError):
        return None
