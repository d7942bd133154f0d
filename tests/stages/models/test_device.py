"""The device's settings, as far as they can be seen on any machine."""

import contextlib
import ctypes
import json
import resource
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from distilcache.stages.models import device
from tests.command_line import environment

CODE = """
import ctypes, json, torch
from distilcache.stages.models.device import keep_freed_memory

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks mapped usmblks fsmblks used free keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

info = ctypes.CDLL(None).mallinfo2
info.restype = Info

def tensor():
    values = torch.ones(12_000_000)
    mapped, place = info().mapped, values.data_ptr()
    del values
    return mapped, info().free, place

def many():
    found = [tensor() for _ in range(40)]
    mapped, free, places = zip(*found)
    return {"mapped": max(mapped), "free": min(free), "places": len(set(places))}

plain = many()
keep_freed_memory(torch.device("cpu"))
print(json.dumps([plain, many()]))
"""
BYTES = 48_000_000
"""Of a tensor."""


def told(code):
    """What a process of its own says."""
    run = [sys.executable, "-c", code]
    return json.loads(subprocess.check_output(run, env=environment(), text=True))


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs the C library's mallinfo2 (glibc)"
)
def test_memory_of_large_tensors_is_kept_for_the_next_ones():
    """By what the C library says of itself: faults of pages depend on the machine's load."""
    plain, kept = told(CODE)
    assert plain["mapped"] >= BYTES  # each from the kernel,
    assert plain["free"] < BYTES  # and back to it
    assert kept["mapped"] < BYTES
    assert kept["free"] >= BYTES
    assert kept["places"] <= 20  # of 40; the heap may grow now and then


HOLES = """
import json, torch
from distilcache.stages.models import device

def step(tensors, freed):
    values = [torch.ones(250_000) for _ in range(tensors)]
    before = device._own_pages()
    del values[::freed]
    memory.give_back()
    return values, before, device._own_pages()

device.keep_freed_memory(torch.device("cpu"))
memory = device.FreedMemory()
equal = [step(200, 1)[2] for _ in range(4)]
kept, *grown = step(600, 2)  # Every other one, so that none can join its neighbour.
print(json.dumps([equal, grown]))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs the C library's malloc_trim"
)
def test_memory_between_tensors_goes_back_but_not_what_each_step_takes():
    (least, *equal), (before, after) = told(HOLES)
    tensor = 250_000 * 4 // resource.getpagesize()
    assert min(equal) - least > 160 * tensor
    assert before - after > 240 * tensor


def test_a_system_that_does_not_tell_memory_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "STATM", tmp_path / "statm")
    device.FreedMemory().give_back()


def test_trainer_runs_on_the_device_of_the_recipe(monkeypatch):
    """It would take the first GPU. torch refuses to make "cuda", which has no number, current."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, index in (("cuda", None), ("cuda:1", 1)):
        place = torch.device(name)
        settings = device.trainer_place(place, torch.float32)
        assert settings["use_cpu"] is False
        arguments = TrainingArguments(output_dir="unused", **{**settings, "use_cpu": True})
        device.as_recipe_says(arguments, place)
        assert arguments.device.index == index
        assert arguments.device.type == ("cpu" if index is None else "cuda")
        assert Accelerator().device == arguments.device  # To which it sends the model.
    AcceleratorState._reset_state(reset_partial_state=True)
    assert current == [torch.device("cuda:1")]


def test_a_gpu_that_only_emulates_bfloat16_gets_float32(monkeypatch):
    @contextlib.contextmanager
    def there(_):
        yield

    monkeypatch.setattr(torch.cuda, "device", there)
    place = torch.device("cuda")
    for native, kind in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, n=native:
            n or including_emulation,
        )  # fmt: skip
        assert device.resolve_dtype("auto", place) == kind


SETTINGS = """
import json, sys, warnings, torch
from distilcache.stages.models.device import settle

def found():
    return [torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32]

def ask(precision):
    if precision and hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = precision  # as TrainingArguments(tf32=...) does

warnings.simplefilter("error")
said = [found()]
settle(torch.device("cpu"))
said.append(found())
ask(sys.argv[1])
settle(torch.device("cuda"))
said.append(found())
ask("tf32")
print(json.dumps([*said, found()]))
"""


@pytest.mark.parametrize("precision", ["", "ieee", "tf32"])
def test_a_gpu_computes_in_float32_and_plans_no_attention(precision):
    run = [sys.executable, "-c", SETTINGS, precision]
    plain, cpu, *cuda = json.loads(subprocess.check_output(run, env=environment(), text=True))
    assert plain == cpu == [True, True]
    assert cuda == [[False, False], [False, False]]
