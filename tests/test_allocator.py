"""The allocator settings take hold where the C library is glibc, and only when asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")

# Page faults of filling a block of 48 MB ten times, without and with our settings.
MEASURE = """
import resource
import numpy as np
from compand.allocator import tune_allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.empty(48 << 20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
print(tune_allocator())
faults()
print(first, faults())
"""


@glibc
def test_large_blocks_are_reused():
    output = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True
    ).stdout
    accepted, before, after = output.split()
    assert accepted == "True"
    assert int(after) < int(before) / 10


def test_has_no_effect_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    from compand.allocator import tune_allocator

    assert tune_allocator() is False


def test_importing_the_library_tunes_nothing():
    code = "import sys, compand, compand.image_codec, compand.hyperprior; print('compand.allocator' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "False"
