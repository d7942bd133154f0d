"""A second device, made of tensors on the CPU, for machines without a GPU.

As on a GPU, an operation takes tensors of one device only, and the host waits where it reads a
number: both are seen here, with real numbers. What CUDA alone has (streams, pinned memory,
bfloat16) is not. The device stays in a process once it is there, so tests fork one: :func:`run`.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.command_line import ROOT, environment
from tests.forked import Forked

NAME = "second"
THERE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this torch can have devices that are written in Python."""
WAITS: list[str] = []
"""What the host has waited for: the operation, and the lines of code that led there."""
aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal,
         aten.unique_dim, aten.unique_consecutive, aten.bincount)  # fmt: skip
INDEXES = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
FRAMES = 4
"""Lines of code that are told of each."""


def run(function: Callable[..., Any], *args: Any, folder: Path) -> list[str]:
    """Call a function where the device is, in a process of its own; returns ``WAITS``."""
    process = Forked(_child, function, args, folder / "waits.json", env=environment(), cwd=ROOT)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    waits: list[str] = json.loads((folder / "waits.json").read_text())
    return waits


def _child(function, args, path):
    install()
    with Constructors(), Device():
        function(*args)
    path.write_text(json.dumps(WAITS))


def install() -> None:
    """Make the device, let the stages take it by its name, and Trainer where it may."""
    import transformers
    from accelerate.state import PartialState

    from distilcache.stages.models.device import resolve_device
    from distilcache.stages.teacher_cache import pipeline
    from distilcache.stages.teacher_cache.config import WORK_SIZES

    class Backend(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16]

        def get_rng_state(self, device=None):
            return torch.get_rng_state()

    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    # Parameters stay the objects that they are, as on a GPU; ties between them stay as well.
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.inference_mode = _NoGrad  # tensors of such a device know no other
    here = torch.device(NAME, 0)
    for name, module in list(sys.modules.items()):
        if name.startswith("distilcache") and hasattr(module, "resolve_device"):
            module.resolve_device = lambda name: here if name == NAME else resolve_device(name)
    PartialState.default_device = property(lambda state: here)
    transformers.TrainingArguments.device = property(lambda arguments: here)
    WORK_SIZES[NAME] = WORK_SIZES["cpu"]
    pipeline.ahead = lambda items, *_: items  # the device is known to this thread alone
    pipeline.to_host = lambda signals: (tree_map_only(Second, lambda x: x.here, signals), None)


class _NoGrad(torch.no_grad):
    def __init__(self, mode=True):
        super().__init__()


class Constructors(TorchFunctionMode):
    """``torch.tensor`` on the device, which C++ would make."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_second(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class Second(torch.Tensor):
    """A tensor on the device; ``here`` is what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )

    def __init__(self, here, requires_grad=False):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})

    def __repr__(self):
        return f"Second({self.here})"

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), Second(self.here.clone(), self.requires_grad))

    # What torch does for these in C++ knows no device in Python.

    def tolist(self):
        _wait("tolist")
        return self.here.tolist()

    def numpy(self, **_):
        raise TypeError("a tensor on a device has no array")

    def new_tensor(self, data, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype).to(self.device)

    def __contains__(self, value):
        _wait("in")
        return value in self.here

    def __getitem__(self, index):
        return super().__getitem__(_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(_index(index), value)

    def storage(self):
        return self.here.storage()

    def untyped_storage(self):
        return self.here.untyped_storage()

    def data_ptr(self):
        return self.here.data_ptr()


def _index(index):
    """An index without lists."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index).to(NAME) if isinstance(index, list) else index


class Device(TorchDispatchMode):
    """Makes the tensors that are asked for on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = (isinstance(x, Second) for x in tree_leaves((args, kwargs)))
        if _is_second(kwargs.get("device")) or any(there):
            return _computed(func, args, kwargs)
        return func(*args, **kwargs)


def _is_second(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def _wait(operation) -> None:
    roots = ("distilcache", "stages", "data", "transformers")
    frames = [f for f in traceback.extract_stack() if any(f"/{r}/" in f.filename for r in roots)]
    lines = [f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-FRAMES:])]
    WAITS.append(f"{operation}: {' < '.join(lines)}")


def _computed(func, args, kwargs):
    """The operation on the CPU, after a look at where its tensors lie."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    second = [x for x in tensors if isinstance(x, Second)]
    kind, goes = func.overloadpacket, kwargs.get("device")
    if kind in (aten._to_copy, aten.copy_):
        _look_at_copy(func, args, kwargs)
    elif second:
        _look(func, args, kwargs, tensors)
    host_args, host_kwargs = tree_map_only(Second, lambda x: x.here, (args, kwargs))
    if goes is not None:
        host_kwargs = {**host_kwargs, "device": torch.device("cpu"), "pin_memory": None}
        host_kwargs = {k: v for k, v in host_kwargs.items() if k in kwargs}
    out = func(*host_args, **host_kwargs)
    if kind is aten.copy_ and not isinstance(args[0], Second):
        return args[0]
    if kind is aten._local_scalar_dense or not (_is_second(goes) or (goes is None and second)):
        return out
    made = tree_map_only(torch.Tensor, lambda x: x if isinstance(x, Second) else Second(x), out)
    return return_and_correct_aliasing(func, args, kwargs, made) if second else made


def _look(func, args, kwargs, tensors) -> None:
    """Refuse tensors of two devices; note where the host reads a number, or how many there are."""
    # A number may come from the CPU, as a tensor without axes.
    first = [tuple(x.shape) for x in tensors if not isinstance(x, Second) and x.dim()]
    if first:
        raise RuntimeError(f"{func} of tensors on two devices: {first}")
    kind = func.overloadpacket
    masks = kind in INDEXES and any(x is not None and x.dtype == torch.bool for x in args[1])
    repeats = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    if kind in READS or masks or repeats:
        _wait(func)


def _look_at_copy(func, args, kwargs) -> None:
    """Note copies from the device, and those to it for which the host waits."""
    if func.overloadpacket is aten.copy_:
        there, goes = isinstance(args[1], Second), isinstance(args[0], Second)
        waits = not args[2:] or not args[2]
    else:
        there = isinstance(args[0], Second)
        goes = there if kwargs.get("device") is None else _is_second(kwargs["device"])
        waits = not kwargs.get("non_blocking")
    if there and not goes:
        _wait(f"{func}, from the device")
    elif goes and not there and waits:
        _wait(f"{func}, to the device")
