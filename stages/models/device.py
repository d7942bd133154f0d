"""Which device and which autocast type a run uses."""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from distilcache.data.errors import UserError, require, tell
from distilcache.stages.models.device_names import check_device_name, check_dtype_name
from distilcache.stages.models.families import check_dtype

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's ``mallopt(3)``."""
OF_ACCELERATE = (
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
)
"""Variables of ``accelerate launch``."""
STATM = Path("/proc/self/statm")
"""Where Linux tells a process how much memory it has."""


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is really there.

    Raises:
        UserError: It is none of these, or CUDA is asked for and there is none, or not that many
            devices.
    """
    check_device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name[5:] or 0) >= count:  # Of a huge number torch makes no device.
            raise UserError(
                f"recipe: device must be one that this machine has, got {name!r} with {count} "
                "CUDA devices; use --set device=cpu or --set device=auto"
            )
    return torch.device(name)


def check_variables() -> None:
    """Refuse what accelerate would do unasked; before any ``TrainingArguments``, which do it.

    Raises:
        UserError: Names the variable.
    """
    for name in OF_ACCELERATE:
        value = os.environ.get(name, "")
        require(
            value.lower() in ("", "0", "no", "false"),
            f"train: {name} must not be set, got {value}: the model is trained in one piece, and "
            "not compiled; unset it",
        )


def trainer_place(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What every ``TrainingArguments`` here says: where Trainer runs, and that it keeps quiet."""
    check_variables()
    return {
        "bf16": dtype == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "logging_nan_inf_filter": False,  # It would wait for the device at every step.
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


def one_device(arguments: Any) -> None:
    """Keep Trainer from DataParallel: here a process has one device, however many it sees."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


def as_recipe_says(arguments: Any, device: torch.device) -> None:
    """One device, the recipe's, and the precision of the arguments, not of accelerate's variables.

    Trainer takes the first GPU, and makes it the current one, whatever the current one was.
    """
    one_device(arguments)
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    if device.type == "cuda" and device.index is not None:
        vars(arguments)["_setup_devices"] = device
        arguments.distributed_state.device = device  # accelerate's
        torch.cuda.set_device(device)


def settle(device: torch.device) -> None:
    """What a process sets once before models run on a device."""
    keep_freed_memory(device)
    if device.type != "cuda":
        return
    # It makes a plan for each batch size and length, which are many here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Convolutions in float32 are float32, as matrix products are.
    torch.backends.cudnn.allow_tf32 = False
    for kind in ("conv", "rnn"):  # From torch 2.9 on; else a setting for all kinds comes first.
        if (settings := getattr(torch.backends.cudnn, kind, None)) is not None:
            settings.fp32_precision = "ieee"


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let the C library keep large freed blocks for the next tensor.

    By default glibc maps every block above 32 MB anew and the kernel clears its pages: a quarter
    of a training step's CPU time where the logits of a chunk are that large (measured). Other
    C libraries are left as they are.
    """
    if device.type != "cpu":
        return
    mallopt = _of_c_library("mallopt")
    for option, limit in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
        if mallopt is not None:
            mallopt(option, limit)


class FreedMemory:
    """Gives freed memory back to the system where much of it has gathered.

    Tensors whose sizes differ from step to step leave holes in the C library's heap, which grows to
    several times what is in use (measured in the training of a student with its own vocabulary:
    5.3 GB for 1.2 GB after 80 steps). Other C libraries than glibc are left as they are.
    """

    def __init__(self) -> None:
        self._trim = _of_c_library("malloc_trim") if STATM.exists() else None
        self._usual = 0
        self._just_done = False

    def give_back(self) -> None:
        """At the end of a step: cheap where memory is at most a quarter above what steps need.

        They need what one that follows a giving back leaves, its freed tensors included: the next
        step takes them again, and the system would have to clear their pages.
        """
        if self._trim is None:
            return
        pages = _own_pages()
        if self._just_done:
            self._usual = max(self._usual, pages)
            self._just_done = False
        elif pages > 1.25 * self._usual:
            self._trim(0)
            self._just_done = True


def _own_pages() -> int:
    """Pages of memory in use by this process, without those of files."""
    resident, of_files = STATM.read_text().split()[1:3]
    return int(resident) - int(of_files)


def _of_c_library(name: str) -> Any:
    """A function of the C library; None: there is none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device that copies it while the host goes on; it must not change any more."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")  # which may copy what is freed


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left; libraries of CUDA say it so."""
    named = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in named)
    )


@contextlib.contextmanager
def room_for(what: str, remedy: str) -> Iterator[None]:
    """Say in one line that the device has no memory for what runs inside, and what to do.

    Args:
        what: The stage, and what there must be room for.
        remedy: Besides another device of that kind.

    Raises:
        UserError: It is out of memory.
    """
    stage, _, thing = what.partition(": ")
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"{stage}: device must have room for {thing}, got out of memory; end what else runs on "
            f"it, use another one, or {remedy}"
        ) from None


def synchronise(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_has_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # not in every torch that we allow
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _gpu_has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def resolve_dtype(name: str, device: torch.device, configs: Iterable[Any] = ()) -> torch.dtype:
    """Turn ``auto``, ``bfloat16`` or ``float32`` into the autocast type.

    ``auto`` is bfloat16 where the hardware multiplies it natively (on CPUs avx512_bf16 or AMX, on
    GPUs of NVIDIA from compute capability 8 on), and the code of all models runs in it.

    Args:
        name: Of the recipe.
        device: Where the models run.
        configs: Configurations of the models that run together.

    Raises:
        UserError: It is none of the three, or bfloat16 for a model that does not run in it.
    """
    check_dtype_name(name)
    if name == "float32":
        return torch.float32
    kind = check_dtype(name, configs)
    native = _gpu_has_bfloat16(device) if device.type == "cuda" else _cpu_has_bfloat16()
    if kind is not None and native:
        tell(f"recipe: dtype is float32, as no model of type {kind!r} runs in bfloat16")
    return torch.bfloat16 if name == "bfloat16" or (native and kind is None) else torch.float32


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run matrix products in ``dtype``; float32 switches autocast off."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield
