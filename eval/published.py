"""Rate-distortion curves that others published, as `data/kodak_published.json` keeps them with their sources."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from compand.eval.bdrate import Curve

TABLE = Path(__file__).parent / "data" / "kodak_published.json"

TITLES = {
    "vtm": "VTM",
    "hm": "HM",
    "bpg": "BPG",
    "av1": "AV1",
    "webp": "WebP",
    "jpeg2000": "JPEG 2000",
    "jpeg": "JPEG",
    "bmshj2018-factorized": "factorized (Ballé 2018)",
    "bmshj2018-hyperprior": "hyperprior (Ballé 2018)",
    "mbt2018-mean": "mbt2018-mean (Minnen 2018)",
    "mbt2018": "mbt2018 (Minnen 2018)",
    "cheng2020-anchor": "cheng2020-anchor (Cheng 2020)",
    "elic2022": "ELIC (He 2022)",
    "mlicplusplus": "MLIC++ (Jiang 2023)",
    "walloc": "WaLLoC",
    "liveaction": "LiVeAction",
}
"""Curves that stand beside measured ones, and their names for readers. Those left out of the table's are variants of
these: trained for MS-SSIM, rounded to 8 bits, or measured by others."""

_COLUMNS = {"psnr": "psnr", "ms_ssim": "msssim"}


class Published(NamedTuple):
    """One codec on the 24 Kodak images: means over the images."""

    curve: Curve
    source: str  # repository and file that the numbers were copied from


@lru_cache(maxsize=2)
def kodak(metric: str = "psnr") -> dict[str, Published]:
    """Curves of every codec that published a metric, by name: "vtm", "bpg", "mbt2018-mean", ...

    Args:
        metric: "psnr" (dB, of RGB) or "ms_ssim" (0 to 1, of RGB).
    """
    curves = {}
    for name, entry in json.loads(TABLE.read_text(encoding="utf-8")).items():
        points = sorted(zip(entry["bpp"], entry[_COLUMNS[metric]], strict=False))
        if points:
            bpp, values = zip(*points, strict=True)
            curves[name] = Published(Curve(bpp, values), entry["source"])
    return curves


def is_kodak(items: Iterable[str]) -> bool:
    """Whether names are those of the 24 images, which published curves are means over."""
    stems = sorted(PurePosixPath(name).stem.lower() for name in items)
    return stems == [f"kodim{number:02}" for number in range(1, 25)]
