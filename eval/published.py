"""Rate-distortion curves that others published, as `data/kodak_published.json` keeps them with their sources."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from compand.eval.bdrate import Curve

TABLE = Path(__file__).parent / "data" / "kodak_published.json"


class Published(NamedTuple):
    """One codec on the 24 Kodak images: PSNR of RGB, mean over the images."""

    curve: Curve
    source: str  # repository and file that the numbers were copied from


@lru_cache(maxsize=1)
def kodak() -> dict[str, Published]:
    """Curves of every codec that published PSNR, by name: "vtm", "bpg", "mbt2018-mean", ..."""
    curves = {}
    for name, entry in json.loads(TABLE.read_text(encoding="utf-8")).items():
        points = sorted(zip(entry["bpp"], entry["psnr"], strict=False))
        if points:
            bpp, psnr = zip(*points, strict=True)
            curves[name] = Published(Curve(bpp, psnr), entry["source"])
    return curves
