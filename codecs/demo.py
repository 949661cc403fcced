"""A demonstration on one photograph: its `.cpd` file beside JPEG and WebP at the same PSNR and the same size.

The photograph is Grace Hopper's portrait (public domain), which ships with matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from compand.errors import MediaError, UsageError
from compand.files import atomic_write, check_target
from compand.pictures import psnr, read_picture

Pixels = npt.NDArray[np.uint8]

CAPTION_HEIGHT = 56  # pixels
GAP = 8  # pixels between panels
PHOTOGRAPH = Path("mpl-data", "sample_data", "grace_hopper.jpg")


@dataclass(frozen=True)
class Comparison:
    name: str
    size: int  # bytes of the file
    bpp: float  # bits per pixel
    psnr: float  # dB, RGB, against the original
    remark: str = ""


@dataclass(frozen=True)
class Demonstration:
    comparisons: list[Comparison]
    bitstream: Path  # the .cpd file
    picture: Path  # original, compand, and JPEG at compand's size, side by side


@dataclass(frozen=True)
class Coded:
    """A picture after a classical codec."""

    setting: int  # the codec's quality, 1 to 100
    size: int  # bytes
    pixels: Pixels  # [H, W, 3]


def photograph() -> Path:
    """Path of the photograph. MediaError where matplotlib is installed without its sample data."""
    # Not through matplotlib.cbook: importing matplotlib takes a second and may build a font cache.
    spec = find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / PHOTOGRAPH
        if path.is_file():
            return path
    raise MediaError("the demonstration's photograph is missing: reinstall matplotlib, which ships it")


def classical(pixels: Pixels, pillow_format: str, setting: int) -> Coded:
    """Encode and decode with Pillow. pixels: [H, W, 3]; setting: 1 to 100."""
    stream = io.BytesIO()
    # WebP's slowest method and JPEG's optimised tables: the smallest files that these codecs give.
    options = {"method": 6} if pillow_format == "WEBP" else {"optimize": True}
    Image.fromarray(pixels).save(stream, pillow_format, quality=setting, **options)
    with Image.open(io.BytesIO(stream.getvalue())) as decoded:
        return Coded(setting, len(stream.getvalue()), np.asarray(decoded.convert("RGB")))


def search(encode: Callable[[int], Coded], enough: Callable[[Coded], bool]) -> Coded:
    """The lowest setting of 1 to 100 that is `enough`, by bisection; 100 where none is."""
    low, high = 1, 100
    tried: dict[int, Coded] = {}
    while low < high:
        middle = (low + high) // 2
        tried[middle] = encode(middle)
        low, high = (low, middle) if enough(tried[middle]) else (middle + 1, high)
    return tried.get(low) or encode(low)


def run(output: Path, *, quality: float = 4.0, device: str = "auto", force: bool = False) -> Demonstration:
    """Encode the photograph, compare, and write `output` (a picture) and the `.cpd` file beside it.

    Raises:
        UsageError: `output` has no picture format's suffix.
        MediaError: an output exists (without `force`) or cannot be written, or the photograph is missing.
    """
    import compand
    from compand.allocator import tune_allocator

    bitstream = output.with_suffix(".cpd")
    if output.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"{output} is no picture: name a .png file with -o")
    for target in (output, bitstream):
        check_target(target, force=force)
    picture = read_picture(photograph(), strip=True)
    original = picture.pixels
    tune_allocator()
    codec = compand.load(device=device)
    data = codec.encode(picture, quality=quality)
    decoded = codec.decode(data).pixels
    reached = psnr(original, decoded)

    def bits(size: int) -> float:
        return 8 * size / (original.shape[0] * original.shape[1])

    def row(name: str, coded: Coded, remark: str) -> Comparison:
        return Comparison(name, coded.size, bits(coded.size), psnr(original, coded.pixels), remark)

    def reaches(coded: Coded) -> bool:
        return psnr(original, coded.pixels) >= reached

    comparisons = [Comparison("compand", len(data), bits(len(data)), reached, f"quality {quality:g}")]
    for name, pillow_format in (("WebP", "WEBP"), ("JPEG", "JPEG")):
        same = search(partial(classical, original, pillow_format), reaches)
        level = "at the same PSNR" if reaches(same) else "at its best"
        comparisons.append(row(name, same, f"{level}: {same.size / len(data):.2f} x compand's size"))
    jpeg = partial(classical, original, "JPEG")
    above = search(jpeg, lambda coded: coded.size > len(data))
    small = jpeg(above.setting - 1) if above.size > len(data) and above.setting > 1 else above
    # Outside these bounds JPEG's best is smaller, or its smallest larger, than compand's file.
    level = "at the same size" if 0.8 * len(data) < small.size <= len(data) else "as near in size as it gets"
    comparisons.append(row("JPEG", small, level))
    panels = [
        ("original", original, f"{original.nbytes} bytes of pixels"),
        ("compand", decoded, _caption(comparisons[0])),
        (f"JPEG, {level}", small.pixels, _caption(comparisons[-1])),
    ]
    with atomic_write(bitstream, force=force) as stream:
        stream.write(data)
    with atomic_write(output, force=force) as stream:
        side_by_side(panels).save(stream, Image.registered_extensions()[output.suffix.lower()])
    return Demonstration(comparisons, bitstream, output)


def _caption(row: Comparison) -> str:
    return f"{row.size} bytes, {row.bpp:.3f} bpp, {row.psnr:.2f} dB"


def side_by_side(panels: list[tuple[str, Pixels, str]]) -> Image.Image:
    """Panels of equal size (title, pixels [H, W, 3], a line below the title) from left to right."""
    height, width = panels[0][1].shape[:2]
    sheet = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (title, pixels, line) in enumerate(panels):
        left = index * (width + GAP)
        draw.text((left + 4, 4), title, fill="black", font=ImageFont.load_default(22))
        draw.text((left + 4, 32), line, fill="black", font=ImageFont.load_default(16))
        sheet.paste(Image.fromarray(pixels), (left, CAPTION_HEIGHT))
    return sheet
