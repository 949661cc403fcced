"""A codec without weights, to test what surrounds codecs: lossless, one chunk, quick, faults on demand."""

from __future__ import annotations

import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

import compand
from compand.coding import container
from compand.errors import BitstreamError, CheckpointError, UsageError
from compand.pictures import Picture

SYMBOLS = b"fake"


@dataclass(frozen=True)
class FakeInfo:
    name: str = "fake-v1"
    codec: str = "fake"
    codec_id: int = 77
    version: int = 1
    medium: str = "image"
    description: str = "a codec without weights"
    parameters: int = 0
    size: int = 0
    path: Path = Path("fake-v1")
    symbols: bytes = SYMBOLS
    synthesis: bytes = b"synt"
    qualities: tuple[float, float] = (1.0, 8.0)
    latent: None = None


class FakeCodec:
    """Faults by the red value of the first pixel: 66 is slow, 99 is a bug."""

    medium = "image"

    def encode(self, picture, *, quality=4.0, bpp=None, psnr=None, compact=None, progress=None):
        if not 1 <= quality <= 8:
            raise UsageError(f"quality {quality:g} is outside 1 to 8")
        red = int(picture.pixels[0, 0, 0])
        if red == 66:
            sys.stdout.write("slow\n")
            sys.stdout.flush()
            time.sleep(30)
        if red == 99:
            raise RuntimeError("a bug\nof two lines")
        if progress is not None:
            progress(1, 1)
        header = container.Header(
            codec_id=77,
            codec_name="",
            symbols=SYMBOLS,
            synthesis=b"synt",
            settings=(round(quality * 32),),
            geometry=container.ImageGeometry(picture.height, picture.width, picture.pixels.shape[2], 8),
            chunk_size=0,
        )
        return container.write(header, [zlib.compress(picture.pixels.tobytes(), 1)], compact=bool(compact))

    def decode(self, data, *, partial=False, progress=None):
        content = container.read(data, partial=partial)
        shape = content.header.geometry
        pixels = np.zeros((shape.height, shape.width, shape.channels), np.uint8)
        if content.chunks[0] is not None:
            pixels = np.frombuffer(zlib.decompress(content.chunks[0]), np.uint8).reshape(pixels.shape)
        return Picture(pixels, None, None, damage=tuple(content.damage))

    def check(self, data, progress=None):
        try:
            zlib.decompress(container.read(data).chunks[0])
        except zlib.error as error:
            raise BitstreamError("symbols do not decode", chunk=0) from error


def find(name):
    if name not in ("hyperprior", "fake-v1"):
        raise CheckpointError(f"checkpoint {name} is unknown: see compand codecs")
    return FakeInfo()


def load(name="hyperprior", *, device="auto"):
    find(name)
    return FakeCodec()


def for_header(header):
    if header.symbols[:2] != SYMBOLS[:2]:
        raise CheckpointError(
            f"no checkpoint fits codec {header.codec_id}, {header.symbols.hex()}: upgrade compand"
        )
    return FakeInfo()


def install(set_attribute=setattr, set_item=dict.__setitem__):
    """Put the fake in the place of the real codecs; the arguments let monkeypatch do it, and undo it."""
    checkpoint = ModuleType("compand.checkpoint")
    checkpoint.find = find
    checkpoint.for_header = for_header
    set_item(sys.modules, "compand.checkpoint", checkpoint)
    set_attribute(compand, "load", load)
    set_attribute(compand, "available", lambda: [FakeInfo()])


if __name__ == "__main__":
    from compand.cli import main

    install()
    main()
