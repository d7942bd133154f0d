"""The device's settings, as far as they can be seen on any machine."""

import platform
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, torch
from distilcache.stages.models.device import keep_freed_memory

# PR_SET_THP_DISABLE: some kernels give huge pages, of which few are faulted in.
ctypes.CDLL(None).prctl(41, *map(ctypes.c_ulong, (1, 0, 0, 0)))

def faults():
    torch.ones(12_000_000).add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12_000_000).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
keep_freed_memory(torch.device("cpu"))
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_large_tensors_use_their_pages_again():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    plain, kept = map(int, run.stdout.split())
    assert plain > 100_000  # 48 MB each, in pages of 4 kB
    assert kept < plain / 3  # the heap may still grow once or twice
