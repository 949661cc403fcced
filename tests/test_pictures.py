"""Image files of every kind, in and out."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, ImageFile

from compand.errors import BitstreamError, MediaError, UsageError
from compand.pictures import (
    MAX_KEPT_PROFILE,
    Picture,
    as_picture,
    decode_alpha,
    encode_alpha,
    is_image_path,
    read_picture,
)

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "images"
GRAY_MODES = ("1", "L", "LA", "La", "I", "F")
COLOR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
TRUNCATED_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "AVIF", "PPM")
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def photo() -> Path:
    """A photograph of 640x427 pixels."""
    return Path(str(resources.files("sklearn.datasets.images") / "china.jpg"))


@pytest.fixture(scope="module")
def samples() -> Path:
    """The folder of matplotlib's sample images."""
    return Path(str(resources.files("matplotlib") / "mpl-data" / "sample_data"))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def stored(image: Image.Image, image_format: str = "PNG", **options: Any) -> io.BytesIO:
    """The image as a file in memory."""
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    stream.seek(0)
    return stream


def png(
    width: int, height: int, depth: int, color: int, rows: bytes, chunks: dict[bytes, bytes]
) -> io.BytesIO:
    """A PNG file of samples that Pillow cannot write; `rows` begin with their filter byte."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0), **chunks}
    parts |= {b"IDAT": zlib.compress(rows), b"IEND": b""}
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + body)


def deep_png(samples: np.ndarray, color: int, chunks: dict[bytes, bytes] | None = None) -> io.BytesIO:
    """A 16-bit PNG of samples [H, W, C]."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png(samples.shape[1], samples.shape[0], 16, color, rows, chunks or {})


def icc_profile(space: bytes, gamma: float, size: int = 0, swap: bool = False) -> bytes:
    """A minimal ICC profile: b"GRAY", or b"RGB " with the primaries of sRGB (red and green swapped if asked).

    A profile of `size` bytes or more is padded with a private tag.
    """

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        red, green = (b"gXYZ", b"rXYZ") if swap else (b"rXYZ", b"gXYZ")
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"bXYZ": xyz(0.1431, 0.0606, 0.7141)}
        tags |= {red: xyz(0.4361, 0.2225, 0.0139), green: xyz(0.3851, 0.7169, 0.0971)}
    if size:
        tags[b"priv"] = b"data\0\0\0\0\0\0\0\1" + bytes(size)
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">II4s4s4s4s", offset + len(body), 0, b"\x02\x40\0\0", b"mntr", space, b"XYZ ")
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp")
    header = header.ljust(68, b"\0") + xyz(0.9642, 1.0, 0.8249)[8:]
    return header.ljust(128, b"\0") + table + body


def cmyk_profile() -> bytes:
    """A CMYK output profile whose table maps all inks to one gray, L* = 50."""
    corners = 2**4
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0])
    lut += b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    lut += bytes(range(256)) * 4 + bytes([128, 128, 128]) * corners + bytes(range(256)) * 3
    offset = 128 + 4 + 12
    header = struct.pack(">II4s4s4s4s", offset + len(lut), 0, b"\x02\x40\0\0", b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", offset, len(lut)) + lut


def srgb_of(image: Image.Image, profile: bytes) -> np.ndarray:
    """The color management module's own answer, for the whole image at once."""
    converted = ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None
    return np.asarray(converted)


def read_or_refusal(file: io.BytesIO, **options: Any) -> Picture | str:
    """The picture, or the message that says why there is none."""
    try:
        return read_picture(file, **options)
    except MediaError as error:
        return str(error)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal arrays, or None twice."""
    np.testing.assert_array_equal(actual, expected)


def assert_one_line(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert ": " in message, "object and fact, then the remedy"
    for word in words:
        assert word in message


# Reading


def test_photograph_as_pillow_decodes_it(photo: Path) -> None:
    picture = read_picture(photo)
    with Image.open(photo) as image:
        assert_same(picture.pixels, np.asarray(image))
    assert (picture.height, picture.width) == (427, 640)
    assert picture.pixels.flags.c_contiguous
    assert picture.pixels.flags.writeable
    assert (picture.alpha, picture.icc, picture.bit_depth) == (None, None, 8)
    assert (picture.notes, picture.damage) == ((), ())


def test_logo_keeps_its_alpha(samples: Path) -> None:
    picture = read_picture(str(samples / "logo2.png"))
    with Image.open(samples / "logo2.png") as image:
        expected = np.asarray(image.convert("RGBA"))
    assert picture.alpha is not None
    assert_same(np.dstack([picture.pixels, picture.alpha]), expected)


@pytest.mark.parametrize("name", ["grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"])
def test_sample_survives_a_png(samples: Path, name: str) -> None:
    picture = read_picture(samples / name)
    stream = io.BytesIO()
    picture.save(stream)
    again = read_picture(stream)
    assert_same(again.pixels, picture.pixels)
    assert_same(again.alpha, picture.alpha)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_photographs_with_camera_profiles() -> None:
    kept = converted = 0
    for path in sorted((SHARED / "train").glob("n0[2-4]*.JPEG"))[:250]:
        with Image.open(path) as image:
            icc = image.info.get("icc_profile")
        if icc is None:
            continue
        picture = read_picture(path)
        if picture.icc is not None:
            assert picture.icc == icc
            assert len(icc) <= MAX_KEPT_PROFILE
            assert picture.notes == ()
            kept += 1
        elif picture.notes:
            assert picture.notes == ("color profile converted to sRGB",)
            assert len(icc) > MAX_KEPT_PROFILE
            converted += 1
    assert kept > 0
    assert converted > 0


@pytest.mark.parametrize("mode", GRAY_MODES + COLOR_MODES)
@pytest.mark.parametrize("size", [(1, 1), (13, 7)])
def test_every_mode(mode: str, size: tuple[int, int]) -> None:
    width, height = size
    rgba = noise(height, width, 4)
    premultiplied = {"La": "LA", "RGBa": "RGBA"}
    source = Image.fromarray(rgba)
    if mode in ("I", "F", "La", "PA"):
        image = source.convert({"La": "LA", "PA": "P"}.get(mode, "L")).convert(mode)
    elif mode == "LAB":
        image = Image.merge("LAB", [Image.fromarray(band) for band in np.moveaxis(rgba[..., :3], -1, 0)])
    elif mode in ("RGBA", "RGBa"):
        image = source.convert(mode)
    else:
        image = source.convert("RGB").convert(mode)
    assert image.mode == mode
    picture = as_picture(image)
    gray = mode in GRAY_MODES
    assert picture.pixels.shape == (height, width, 1 if gray else 3)
    assert (picture.alpha is not None) == (mode in ("LA", "La", "PA", "RGBA", "RGBa"))
    assert bool(picture.notes) == (mode in ("La", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"))
    if mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        expected = srgb_of(image, lab)
    else:
        expected = np.asarray(image.convert(premultiplied.get(mode, "L" if gray else "RGB")))
    if picture.alpha is not None:
        reference = image.convert(premultiplied.get(mode, "LA" if gray else "RGBA"))
        assert_same(picture.alpha, np.asarray(reference.getchannel("A")))
        expected = np.asarray(reference)[..., :-1]
    assert_same(picture.pixels, expected.reshape(picture.pixels.shape))
    assert picture.to_pil().mode == ("L" if gray else "RGB") + ("A" if picture.alpha is not None else "")


@pytest.mark.parametrize("transparent", [3, bytes([0, 128, 255, 40])])
def test_palette_with_transparency(transparent: int | bytes) -> None:
    indexes = np.arange(20, dtype=np.uint8).reshape(4, 5) % 4
    image = Image.fromarray(indexes, "L")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 250, 240, 230])
    picture = read_picture(stored(image, transparency=transparent))
    levels = [255, 255, 255, 0] if isinstance(transparent, int) else list(transparent)
    assert_same(picture.alpha, np.array(levels)[indexes])
    palette = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [250, 240, 230]])
    assert_same(picture.pixels, palette[indexes])


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (1, 2, 3)), ("1", 255)])
def test_color_key(mode: str, key: Any) -> None:
    image = Image.new(mode, (3, 2), key)
    image.putpixel((1, 1), 0 if mode != "RGB" else (1, 2, 4))
    picture = read_picture(stored(image, transparency=key))
    assert_same(picture.alpha, [[0, 0, 0], [0, 255, 0]])
    assert_same(picture.pixels[0, 0], np.ravel(key))


@pytest.mark.parametrize("depth", [2, 4])
def test_color_key_of_narrow_samples(depth: int) -> None:
    levels = [0, 1, 2, 3]
    packed = sum(level << (8 * depth // 2 - depth * (1 + i)) for i, level in enumerate(levels))
    row = b"\0" + packed.to_bytes(depth // 2, "big")
    picture = read_picture(png(4, 1, depth, 0, row, {b"tRNS": b"\0\2"}))
    assert_same(picture.pixels[0, :, 0], np.array(levels) * (255 // (2**depth - 1)))
    assert_same(picture.alpha, [[255, 255, 0, 255]])


# Deeper than 8 bits


def test_every_16_bit_gray_level_is_rounded() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(levels / 257).astype(np.uint8)
    for stream in (deep_png(levels[..., None], 0), stored(Image.fromarray(levels).convert("I;16"), "TIFF")):
        picture = read_picture(stream)
        assert_same(picture.pixels[..., 0], expected)
        assert (picture.bit_depth, picture.notes) == (16, ("16-bit samples reduced to 8 bits",))


def test_16_bit_color_and_alpha() -> None:
    deep = np.random.default_rng(1).integers(0, 65536, (6, 5, 4), dtype=np.uint16)
    for color, bands in ((2, 3), (6, 4), (4, 2)):
        picture = read_picture(deep_png(deep[..., :bands], color))
        assert (picture.bit_depth, picture.notes) == (16, ("16-bit samples reduced to 8 bits",))
        assert picture.pixels.shape[2] == (1 if bands == 2 else 3)
        got = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
        assert np.abs(got - deep[..., :bands] / 257).max() <= 1


def test_16_bit_color_keys() -> None:
    gray = np.array([[[700], [701]]], dtype=np.uint16)
    picture = read_picture(deep_png(gray, 0, {b"tRNS": struct.pack(">H", 700)}))
    assert_same(picture.alpha, [[0, 255]])
    color = np.array([[[700, 9000, 65535], [40000, 9000, 65535]]], dtype=np.uint16)
    picture = read_picture(deep_png(color, 2, {b"tRNS": struct.pack(">3H", 700, 9000, 65535)}))
    assert_same(picture.alpha, [[0, 255]])


def test_tiff_whose_white_is_zero() -> None:
    content = bytearray(stored(Image.new("I;16", (2, 1), 65535 - 257 * 9), "TIFF").getvalue())
    tag = content.index(struct.pack("<HHI", 262, 3, 1))
    content[tag + 8 : tag + 10] = b"\0\0"
    assert read_picture(io.BytesIO(content)).pixels.tolist() == [[[9], [9]]]


def test_12_bit_tiff() -> None:
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    pixels = bytes([0x80, 0x0F, 0xFF])  # 2048, 4095
    content = b"II*\0" + struct.pack("<I", 12) + pixels + b"\0" + struct.pack("<H", len(tags)) + directory
    picture = read_picture(io.BytesIO(content + bytes(4)))
    assert picture.pixels.ravel().tolist() == [128, 255]
    assert picture.bit_depth == 16


@pytest.mark.parametrize(
    ("magic", "maximum", "values", "expected"),
    [("P5", 65535, [0, 200, 65535], [0, 1, 255]), ("P5", 1023, [0, 512, 1023], [0, 128, 255])],
)
def test_deep_pgm(magic: str, maximum: int, values: list[int], expected: list[int]) -> None:
    content = f"{magic} 3 1 {maximum}\n".encode() + struct.pack(">3H", *values)
    picture = read_picture(io.BytesIO(content))
    assert picture.pixels.ravel().tolist() == expected
    assert picture.bit_depth == 16


def test_deep_ppm_is_marked() -> None:
    picture = read_picture(io.BytesIO(b"P6 1 1 65535\n" + struct.pack(">3H", 0, 257 * 99, 65535)))
    assert picture.pixels.ravel().tolist() == [0, 99, 255]
    assert picture.bit_depth == 16


@pytest.mark.parametrize(
    ("mode", "values", "expected", "depth"),
    [
        ("I", [0, 7, 255], [0, 7, 255], 8),
        ("I", [0, 257, 65535], [0, 1, 255], 16),
        ("I", [-1000, 0, 1000], [0, 128, 255], 16),
        ("I", [100000, 100000, 100000], [0, 0, 0], 16),
        ("F", [0, 0.5, 1], [0, 128, 255], 16),
        ("F", [0, 7.4, 255], [0, 7, 255], 16),
        ("F", [-1, 0, 1], [0, 128, 255], 16),
        ("F", [np.nan, np.inf, 1], [0, 255, 255], 16),
        ("F", [np.nan, -np.inf, np.nan], [0, 0, 0], 16),
    ],
)
def test_wide_samples(mode: str, values: list[float], expected: list[int], depth: int) -> None:
    image = Image.fromarray(np.array([values], dtype=np.int32 if mode == "I" else np.float32))
    assert image.mode == mode
    for picture in (as_picture(image), read_picture(stored(image, "TIFF"))):
        assert picture.pixels.ravel().tolist() == expected
        assert picture.bit_depth == depth
        assert len(picture.notes) == 1
        assert "8 bits" in picture.notes[0]


# Orientation


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(photo: Path, image_format: str, orientation: int) -> None:
    upright = np.asarray(Image.open(photo).resize((48, 32)))
    # Where the stored image's first row and first column lie in the displayed one, by the EXIF standard.
    stored_pixels = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    best: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}
    options = best.get(image_format, {})
    file = stored(Image.fromarray(np.ascontiguousarray(stored_pixels)), image_format, exif=exif, **options)
    picture = read_picture(file)
    assert picture.pixels.shape == upright.shape
    difference = np.abs(picture.pixels.astype(int) - upright).mean()
    assert difference < 8 if image_format == "JPEG" else difference == 0
    assert picture.notes == ()


def test_orientation_turns_alpha_too_and_leaves_a_pillow_image_alone() -> None:
    image = Image.fromarray(noise(3, 5, 4))
    image.getexif()[ORIENTATION] = 6
    picture = as_picture(image)
    assert_same(picture.alpha, np.rot90(np.asarray(image)[..., 3], -1))
    assert image.size == (5, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_does_not_cost_the_image() -> None:
    image = Image.fromarray(noise(4, 4, 3))
    assert read_picture(stored(image, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).pixels.shape == (4, 4, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = 77
    assert_same(read_picture(stored(image, exif=exif)).pixels, np.asarray(image))


# Color profiles


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_small_profile_travels(mode: str) -> None:
    profile = icc_profile(b"GRAY" if mode[0] == "L" else b"RGB ", 1.0)
    image = Image.fromarray(noise(9, 8, 4)).convert(mode)
    picture = read_picture(stored(image, icc_profile=profile))
    assert (picture.icc, picture.notes) == (profile, ())
    assert_same(np.asarray(picture.to_pil()), np.asarray(image))
    assert picture.to_pil().info["icc_profile"] == profile


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("how", ["large", "strip"])
def test_profile_is_applied(mode: str, how: str) -> None:
    profile = icc_profile(b"GRAY" if mode[0] == "L" else b"RGB ", 1.0, size=5000 if how == "large" else 0)
    image = Image.fromarray(noise(9, 8, 4)).convert(mode)
    picture = read_picture(stored(image, icc_profile=profile), strip=how == "strip")
    assert (picture.icc, picture.notes) == (None, ("color profile converted to sRGB",))
    expected = srgb_of(image.convert("L" if mode[0] == "L" else "RGB"), profile)
    assert_same(picture.pixels, expected[..., : picture.pixels.shape[2]])
    if mode in ("LA", "RGBA"):
        assert_same(picture.alpha, np.asarray(image)[..., -1])
    # Linear light 0.2 is displayed as sRGB 124.
    flat = stored(Image.new("L", (1, 1), 51), icc_profile=icc_profile(b"GRAY", 1.0))
    assert abs(int(read_picture(flat, strip=True).pixels[0, 0, 0]) - 124) <= 1


def test_srgb_profile_is_dropped() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(noise(5, 5, 3))
    for strip in (False, True):
        picture = read_picture(stored(image, icc_profile=profile), strip=strip)
        assert (picture.icc, picture.notes) == (None, ())
        assert_same(picture.pixels, np.asarray(image))
    assert read_picture(stored(image.convert("L"), icc_profile=profile)).notes == ()


def test_profile_that_only_swaps_primaries_is_not_srgb() -> None:
    profile = icc_profile(b"RGB ", 2.2, swap=True)
    assert read_picture(stored(Image.new("RGB", (2, 2), "red"), icc_profile=profile)).icc == profile


def test_color_profile_on_gray_pixels_is_applied() -> None:
    image = Image.fromarray(noise(4, 6))
    profile = icc_profile(b"RGB ", 1.0)
    picture = read_picture(stored(image, icc_profile=profile))
    assert (picture.icc, picture.notes) == (None, ("color profile converted to sRGB",))
    expected = srgb_of(image.convert("RGB"), profile).astype(int)
    assert np.abs(picture.pixels - expected).max() <= 1
    assert np.abs(picture.pixels[..., 0] - np.asarray(image).astype(int)).max() > 50


@pytest.mark.parametrize(
    "profile", [b"not a profile" * 20, icc_profile(b"GRAY", 1.0), icc_profile(b"RGB ", 1.8)[:150]]
)
def test_unusable_profile_is_ignored(profile: bytes) -> None:
    image = Image.fromarray(noise(4, 6, 3))
    picture = read_picture(stored(image, icc_profile=profile))
    assert (picture.icc, picture.notes) == (None, ("unusable color profile ignored",))
    assert_same(picture.pixels, np.asarray(image))


def test_cmyk_photograph(photo: Path) -> None:
    image = Image.open(photo).resize((64, 48)).convert("CMYK")
    plain = read_picture(stored(image, "JPEG", quality=95))
    assert plain.notes == ("CMYK converted to RGB without a color profile",)
    assert np.abs(plain.pixels.astype(int) - np.asarray(image.convert("RGB"))).mean() < 5
    managed = read_picture(stored(image, "TIFF", icc_profile=cmyk_profile()))
    assert (managed.icc, managed.notes) == (None, ("CMYK converted to sRGB by its color profile",))
    assert_same(managed.pixels, srgb_of(image, cmyk_profile()))
    assert np.ptp(managed.pixels, axis=2).max() <= 1 < np.ptp(plain.pixels, axis=2).max()
    damaged = read_picture(stored(image, "TIFF", icc_profile=b"junk" * 50))
    assert damaged.notes == (
        "CMYK converted to RGB without a color profile",
        "unusable color profile ignored",
    )
    assert_same(damaged.pixels, np.asarray(image.convert("RGB")))


def test_lab_tiff() -> None:
    image = Image.merge("LAB", [Image.new("L", (2, 2), level) for level in (128, 128, 128)])
    picture = read_picture(stored(image, "TIFF"))
    assert picture.notes == ("LAB converted to sRGB",)
    assert np.abs(picture.pixels.astype(int) - 119).max() <= 1  # L* = 50.2


def test_16_bit_gray_keeps_its_profile() -> None:
    profile = icc_profile(b"GRAY", 1.0)
    levels = Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)).convert("I;16")
    picture = read_picture(stored(levels, icc_profile=profile))
    assert (picture.icc, picture.bit_depth) == (profile, 16)
    assert_same(picture.pixels.ravel(), range(256))


def test_other_metadata_is_dropped() -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    picture = read_picture(
        stored(Image.new("RGB", (2, 2)), "JPEG", exif=exif, comment=b"hello", dpi=(300, 300))
    )
    assert picture.notes == ()
    assert not picture.to_pil().info


# Animations


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame(image_format: str) -> None:
    if image_format not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow has no {image_format}")
    frames = [Image.new("RGB", (24, 16), color) for color in ("red", "lime", "blue")]
    options: dict[str, Any] = {"lossless": True} if image_format == "WEBP" else {}
    file = stored(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    picture = read_picture(file)
    assert picture.notes == ("first of 3 frames",)
    assert np.abs(picture.pixels.astype(int) - [255, 0, 0]).max() <= 3


def test_current_frame_of_a_pillow_image() -> None:
    frames = [Image.new("L", (4, 4), level) for level in (10, 20, 30)]
    with Image.open(stored(frames[0], "TIFF", save_all=True, append_images=frames[1:])) as image:
        image.seek(2)
        picture = as_picture(image)
    assert picture.notes == ("frame 3 of 3",)
    assert picture.pixels[0, 0, 0] == 30


# What cannot be read


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("image_format", TRUNCATED_FORMATS)
def test_truncated_file_is_refused(photo: Path, image_format: str) -> None:
    if image_format not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow has no {image_format}")
    whole = stored(Image.open(photo).resize((96, 64)), image_format).getvalue()
    intact = read_picture(io.BytesIO(whole)).pixels
    for kept in np.linspace(1, len(whole) - 1, 25).astype(int):
        outcome = read_or_refusal(io.BytesIO(whole[:kept]))
        if isinstance(outcome, Picture):  # only what follows the pixels is missing
            assert kept > len(whole) * 0.9
            assert_same(outcome.pixels, intact)
        else:
            assert "\n" not in outcome
    with pytest.raises(MediaError):
        read_picture(io.BytesIO(whole[: len(whole) // 2]))


def test_truncated_photograph_names_file_fact_and_remedy(photo: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    path.write_bytes(photo.read_bytes()[:50_000])
    with pytest.raises(MediaError) as error:
        read_picture(path)
    assert_one_line(error, "half.jpg", "truncated", "copy it again")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "TIFF"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=6)
)
def test_damaged_file_is_refused_or_read(image_format: str, place: int, damage: bytes) -> None:
    content = bytearray(stored(Image.fromarray(noise(16, 16, 3)), image_format).getvalue())
    place %= len(content)
    content[place : place + len(damage)] = damage
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
        outcome = read_or_refusal(io.BytesIO(content), max_pixels=10**6)
    assert isinstance(outcome, Picture) or "\n" not in outcome


def test_not_an_image(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("This is no picture.\n" * 10)
    empty = tmp_path / "empty.png"
    empty.touch()
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for path, fact in (
        (text, "is not an image"),
        (empty, "is empty"),
        (folder, "is a folder"),
        (tmp_path / "missing.png", "does not exist"),
        (tmp_path / "a\nb\0.png", "cannot be opened"),
    ):
        with pytest.raises(MediaError) as error:
            read_picture(path)
        assert_one_line(error, fact)


def test_no_pixels() -> None:
    with pytest.raises(MediaError) as error:
        as_picture(Image.new("RGB", (0, 5)))
    assert_one_line(error, "0x5")
    with pytest.raises(MediaError):
        read_picture(png(0, 4, 8, 2, b"", {}))
    with pytest.raises(MediaError):
        as_picture(np.zeros((4, 0, 3), np.uint8))
    with pytest.raises(MediaError):
        Picture(np.zeros((0, 4, 1), np.uint8), None, None)


# Limits


def test_declared_size_is_checked_before_pixels_are_decoded() -> None:
    forged = png(2**20, 2**20, 8, 2, b"\0", {})
    with pytest.raises(MediaError) as error:
        read_picture(forged)
    assert_one_line(error, "1048576x1048576", "limit of 536870912")
    small = stored(Image.new("L", (20, 10)))
    assert read_picture(small, max_pixels=200).width == 20
    with pytest.raises(MediaError):
        read_picture(small, max_pixels=199)


def test_limit_is_ours_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow itself would refuse 101 pixels
    pixels = noise(40, 30, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image_format in ("PNG", "JPEG2000", "BMP"):
            with monkeypatch.context() as patch:
                patch.setattr("compand.pictures._BLOCK_PIXELS", 50)
                picture = read_picture(stored(Image.fromarray(pixels), image_format))
            assert_same(picture.pixels, pixels)
    assert Image.MAX_IMAGE_PIXELS == 50


def test_no_warning_between_pillows_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(noise(40, 30, 3))
    file = stored(image, "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns from here, and refuses twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr("compand.pictures._BLOCK_PIXELS", 500)
        assert_same(read_picture(file).pixels, np.asarray(image))


def test_format_with_pillows_own_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    file = stored(Image.fromarray(noise(40, 30, 3)), "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(MediaError) as error:
        read_picture(file)
    assert_one_line(error, "too large", "convert it to PNG")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
def test_blocks_cover_the_image(monkeypatch: pytest.MonkeyPatch, orientation: int, limit: int) -> None:
    image = Image.fromarray(noise(9, 11, 4))
    image.getexif()[ORIENTATION] = orientation
    whole = as_picture(image)
    monkeypatch.setattr("compand.pictures._BLOCK_PIXELS", limit)
    parts = as_picture(image)
    assert_same(parts.pixels, whole.pixels)
    assert_same(parts.alpha, whole.alpha)


# Streams


def test_streams(photo: Path) -> None:
    expected = read_picture(photo).pixels
    with open(photo, "rb") as file:
        assert_same(read_picture(file).pixels, expected)
        assert not file.closed
        assert_same(as_picture(file).pixels, expected)

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, offset: int, whence: int = 0) -> int:
            raise io.UnsupportedOperation("seek")

    assert_same(read_picture(Pipe(photo.read_bytes())).pixels, expected)
    with pytest.raises(MediaError) as error:
        read_picture(Pipe(b""))
    assert_one_line(error, "empty")


# as_picture


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_arrays(channels: int | None) -> None:
    array = noise(5, 7) if channels is None else noise(5, 7, channels)
    picture = as_picture(array)
    together = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
    assert_same(together, array.reshape(together.shape))
    assert (picture.alpha is not None) == (channels in (2, 4))
    assert picture.pixels.flags.c_contiguous


def test_picture_passes_through() -> None:
    picture = as_picture(noise(2, 2, 3))
    assert as_picture(picture) is picture


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "bfloat16"])
def test_tensors(channels: int, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    array = np.where(noise(5, 7, channels) < 128, 0, 255).astype(np.uint8)  # exact in every type
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    if dtype != "uint8":
        tensor = (tensor / 255).to(getattr(torch, dtype)).requires_grad_()
    expected = as_picture(array)
    picture = as_picture(tensor)
    assert_same(picture.pixels, expected.pixels)
    assert_same(picture.alpha, expected.alpha)


def test_float_tensor_is_rounded_and_its_range_checked() -> None:
    torch = pytest.importorskip("torch")
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 16, 16) / 255
    assert_same(as_picture(levels).pixels.ravel(), range(256))
    assert as_picture(torch.full((1, 1, 1), 1.001)).pixels.item() == 255
    assert as_picture(torch.full((1, 1, 1), 0.4999 / 255)).pixels.item() == 0
    assert as_picture(torch.full((1, 1, 1), 0.5001 / 255)).pixels.item() == 1
    for wrong in (levels * 255, levels - 0.5, levels * float("nan")):
        with pytest.raises(UsageError) as error:
            as_picture(wrong)
        assert_one_line(error, "0..1")
    with pytest.raises(UsageError) as error:
        as_picture(levels[None])
    assert_one_line(error, "[C, H, W]")
    with pytest.raises(MediaError):
        as_picture(torch.zeros(3, 0, 4))
    with pytest.raises(UsageError):
        as_picture(torch.zeros(3, 4, 4, dtype=torch.int64))
    with pytest.raises(UsageError):
        as_picture(torch.zeros(5, 4, 4))


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        b"bytes",
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint16),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(UsageError) as error:
        as_picture(value)
    assert_one_line(error)


@pytest.mark.parametrize(
    "arguments",
    [
        (np.zeros((2, 2), np.uint8), None, None),
        (np.zeros((2, 2, 256), np.uint8), None, None),
        (np.zeros((2, 2, 3), np.float32), None, None),
        (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3), np.uint8), None),
        (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), bool), None),
        (np.zeros((2, 2, 3), np.uint8), None, None, 12),
    ],
)
def test_inconsistent_picture_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError) as error:
        Picture(*arguments)
    assert_one_line(error)


def test_import_needs_no_torch() -> None:
    code = "import sys, compand.pictures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Saving


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("extension", ["png", "tiff", "tga", "jp2", "TIF"])
def test_lossless_formats(tmp_path: Path, channels: int, extension: str) -> None:
    path = tmp_path / f"out.{extension}"
    picture = as_picture(noise(16, 24, channels))
    picture.save(path)
    again = read_picture(path)
    assert_same(again.pixels, picture.pixels)
    assert_same(again.alpha, picture.alpha)


@pytest.mark.parametrize("extension", ["jpg", "webp", "avif"])
def test_lossy_formats(photo: Path, tmp_path: Path, extension: str) -> None:
    if f".{extension}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {extension}")
    picture = as_picture(Image.open(photo).resize((160, 120)))
    picture.save(tmp_path / f"out.{extension}")
    again = read_picture(tmp_path / f"out.{extension}")
    error = np.square(again.pixels.astype(float) - picture.pixels).mean()
    assert 0 < error < 255**2 / 10**3.2, "32 dB and more; Pillow's default quality lies below"


@pytest.mark.parametrize("extension", ["webp", "avif"])
@pytest.mark.parametrize("channels", [2, 4])
def test_lossy_formats_keep_alpha(tmp_path: Path, extension: str, channels: int) -> None:
    if f".{extension}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {extension}")
    array = np.full((16, 16, channels), 200, np.uint8)
    array[:8, :, -1] = 0
    as_picture(array).save(tmp_path / f"out.{extension}")
    alpha = read_picture(tmp_path / f"out.{extension}").alpha
    assert alpha is not None
    assert np.abs(alpha.astype(int) - array[..., -1]).max() <= 8


def test_alpha_does_not_fit_into_jpeg(tmp_path: Path) -> None:
    for extension in ("jpg", "bmp", "ppm", "gif"):
        with pytest.raises(MediaError) as error:
            as_picture(noise(4, 4, 4)).save(tmp_path / f"out.{extension}")
        assert_one_line(error, "transparency", ".png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wanted", ["jpg", ".JPG", "JPEG", "jpeg"])
def test_format_names(wanted: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    as_picture(noise(8, 8, 3)).save(stream, format=wanted)
    assert stream.getvalue()[:2] == b"\xff\xd8"
    as_picture(noise(8, 8, 3)).save(tmp_path / "name.png", format=wanted)
    assert (tmp_path / "name.png").read_bytes()[:2] == b"\xff\xd8"


@pytest.mark.parametrize("name", ["out", "out.xyz", "out.txt"])
def test_unknown_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(MediaError) as error:
        as_picture(noise(4, 4)).save(tmp_path / name)
    assert_one_line(error, name, ".png")
    assert not list(tmp_path.iterdir())


def test_format_that_cannot_hold_the_picture(tmp_path: Path) -> None:
    with pytest.raises(MediaError) as error:
        as_picture(np.zeros((1, 16384, 3), np.uint8)).save(tmp_path / "wide.webp")
    assert_one_line(error, "WEBP")
    with pytest.raises(MediaError):
        as_picture(np.zeros((1, 4, 3), np.uint8)).save(tmp_path / "color.xbm")


def test_refusal_of_the_file_system_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        as_picture(noise(4, 4)).save(tmp_path / "missing" / "out.png")


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "webp", "avif", "bmp", "jp2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_saved_colors_stay_what_the_profile_says(tmp_path: Path, extension: str, channels: int) -> None:
    if f".{extension}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {extension}")
    profile = icc_profile(b"GRAY" if channels == 1 else b"RGB ", 1.0)
    picture = Picture(np.full((16, 16, channels), 51, np.uint8), None, profile)
    picture.save(tmp_path / f"out.{extension}")
    displayed = read_picture(tmp_path / f"out.{extension}", strip=True)
    assert np.abs(displayed.pixels.astype(int) - 124).max() <= 4
    if extension in ("png", "tif"):
        assert read_picture(tmp_path / f"out.{extension}").icc == profile


# Extensions


def test_image_paths() -> None:
    for name in ("a.png", "B.JPG", "c.jpeg", "d.tiff", "e.webp", "f.gif", "g.bmp", "h.jp2", "x/y.z/i.PnG"):
        assert is_image_path(name)
        assert is_image_path(Path(name))
    for name in ("a.cpd", "png", ".png", "a.txt", "a", "a.pdf", "a.h5", "a.mpg", "a.png.part", "x.png/a"):
        assert not is_image_path(name)


# Alpha planes


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.uint8,
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        elements=st.one_of(st.sampled_from([0, 255]), st.integers(0, 255)),
    )
)
def test_alpha_round_trip(alpha: np.ndarray) -> None:
    decoded = decode_alpha(encode_alpha(alpha), *alpha.shape)
    assert_same(decoded, alpha)
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable


@pytest.mark.parametrize("shape", [(1, 16383), (2, 16384), (20000, 1)])
def test_alpha_beyond_the_size_of_webp(shape: tuple[int, int]) -> None:
    alpha = noise(*shape)
    assert_same(decode_alpha(encode_alpha(alpha), *shape), alpha)


def test_alpha_of_a_real_logo_is_coded_with_the_smaller_file(samples: Path) -> None:
    alpha = read_picture(samples / "logo2.png").alpha
    assert alpha is not None
    payload = encode_alpha(alpha)
    assert_same(decode_alpha(payload, *alpha.shape), alpha)
    assert len(payload) <= len(stored(Image.fromarray(alpha), optimize=True).getvalue())
    gradient = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    assert len(encode_alpha(gradient)) < 256


@pytest.mark.parametrize("image_format", ["WEBP", "PNG"])
def test_damaged_alpha(image_format: str) -> None:
    alpha = noise(33, 21)
    options: dict[str, Any] = {"lossless": True} if image_format == "WEBP" else {}
    payload = stored(Image.fromarray(alpha), image_format, **options).getvalue()
    assert_same(decode_alpha(payload, 33, 21), alpha)
    for height, width in ((33, 22), (32, 21), (21, 33)):
        with pytest.raises(BitstreamError, match="21x33"):
            decode_alpha(payload, height, width)
    for kept in range(0, len(payload) - 20, 7):
        with pytest.raises(BitstreamError):
            decode_alpha(payload[:kept], 33, 21)
    rng = np.random.default_rng(5)
    for _ in range(300):
        forged = bytearray(payload)
        for place in rng.integers(0, len(forged), 3):
            forged[place] = rng.integers(256)
        try:
            assert decode_alpha(bytes(forged), 33, 21).shape == (33, 21)
        except BitstreamError:
            continue


def test_alpha_in_another_format_is_refused() -> None:
    for content in (b"", b"RIFF", stored(Image.new("L", (4, 4)), "GIF").getvalue()):
        with pytest.raises(BitstreamError):
            decode_alpha(content, 4, 4)


def test_forged_alpha_size_allocates_nothing() -> None:
    payload = png(2**31 - 1, 2**31 - 1, 8, 0, b"\0", {}).getvalue()
    with pytest.raises(BitstreamError, match="2147483647x2147483647"):
        decode_alpha(payload, 8, 8)


# -------------------------------------------------------------------------------------------------------- bands


def npy(header: str) -> io.BytesIO:
    """A .npy file of this header, followed by 2400 bytes."""
    text = header.encode().ljust(118) + b"\n"
    return io.BytesIO(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(2400))


@pytest.mark.parametrize(
    "shape",
    ["(-40, -20, 3)", "(True, True, True)", "(40, 20)", "(40, 20, 3, 1)", "(0, 20, 3)", "(40, 20, 300)", "(40, 60, 3)",
     "(99999999, 99999999, 3)", "(" * 90, "-" * 90 + "1", "40"],
)  # fmt: skip
def test_forged_arrays_are_refused(shape: str) -> None:
    stream = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}")
    with pytest.raises(MediaError) as error:
        read_picture(stream)
    assert_one_line(error)


@pytest.mark.parametrize("descr", ["'|O'", "'<f4'", "()", "'<u2'"])
def test_arrays_of_other_types_are_refused(descr: str) -> None:
    with pytest.raises(MediaError) as error:
        read_picture(npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': (40, 20, 3)}}"))
    assert_one_line(error)


def test_bands_are_saved_under_the_name_given_and_read_in_either_order(tmp_path: Path) -> None:
    bands = np.arange(40 * 20 * 3, dtype=np.uint8).reshape(40, 20, 3)
    picture = Picture(bands, None, None)
    for name, kind in (("a.npy", None), ("B.NPY", None), ("c.dat", "npy")):
        picture.save(tmp_path / name, kind)
        assert np.array_equal(read_picture(tmp_path / name).pixels, bands)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["B.NPY", "a.npy", "c.dat"]
    np.save(tmp_path / "fortran.npy", np.asfortranarray(bands))
    assert np.array_equal(read_picture(tmp_path / "fortran.npy").pixels, bands)
