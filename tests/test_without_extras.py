"""A core installation, without compressai and lightning, loads the released checkpoints, encodes and decodes."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"compressai", "lightning", "jsonargparse", "scipy", "sklearn", "torchmetrics"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import numpy as np
import torch
import compand

torch.set_num_threads(1)
pixels = np.full((40, 50, 3), 128, np.uint8)
data = compand.encode(pixels, quality=2, device="cpu")
assert np.abs(compand.decode(data, device="cpu").pixels.astype(int) - 128).max() < 8
from compand.hyperprior import HyperpriorCodec
try:
    HyperpriorCodec()
except ImportError as error:
    assert "compand[train]" in str(error), error
else:
    raise AssertionError("a trainable codec was built without compressai")
"""


def test_core_needs_no_training_extra() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
