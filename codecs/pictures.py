"""Any image file to a :class:`Picture` and back: Pillow at the edge, plain uint8 arrays inside.

What becomes of a file's properties:

- Pixels: 8 bits a sample. Gray stays one channel; everything else becomes RGB, in the axes in which it is
  displayed (EXIF or XMP orientation applied). Deeper samples are reduced, with a note.
- Transparency (alpha channel, transparent palette entry or color key): a separate plane, not premultiplied.
- ICC profile: dropped if it is sRGB in effect; kept if it is small and describes the stored pixels; else
  applied, so that the pixels are sRGB.
- Animations and multi-page files: the first frame, with a note.
- All other metadata (EXIF, XMP, text, resolution): dropped.
"""

from __future__ import annotations

import io
import math
import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as numpy_format
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from compand.errors import BitstreamError, MediaError, UsageError

MAX_PIXELS = 2**29
"""Largest picture that is read unless the caller says otherwise, in pixels."""

MAX_BANDS = 255
"""Most channels of a picture."""

MAX_KEPT_PROFILE = 4096
"""Largest ICC profile that travels with a picture, in bytes; a larger one is applied to the pixels."""

_BLOCK_PIXELS = 2**20  # converted at a time, so that no step holds a second copy of a large image
_PSNR_ROWS = 256  # compared at a time, so that squares of a large picture need little memory
_NEAR_SRGB = 2  # largest difference from sRGB, in 8-bit levels, of a profile that counts as sRGB
_ALPHA_FORMATS = frozenset({"AVIF", "JPEG2000", "PNG", "TGA", "TIFF", "WEBP"})
_LOSSY_FORMATS = frozenset({"AVIF", "JPEG", "WEBP"})
_PROFILE_FORMATS = {"L": {"JPEG", "PNG", "TIFF"}, "RGB": {"AVIF", "JPEG", "PNG", "TIFF", "WEBP"}}
# Formats that Pillow registers for writing only, or that it identifies but cannot decode by itself.
_UNREADABLE_FORMATS = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"})
_CONVERTED_MODES = {
    "YCbCr": "YCbCr converted to RGB",
    "HSV": "HSV converted to RGB",
    "RGBa": "premultiplied alpha undone",
    "La": "premultiplied alpha undone",
}

UInt8Array = NDArray[np.uint8]


@dataclass(eq=False)
class Picture:
    """A decoded image.

    Attributes:
        pixels: uint8 [H, W, C], C = 1 (gray) or 3 (RGB); sRGB unless `icc` says otherwise. Other numbers of channels,
            up to 255, are bands without a color space.
        alpha: uint8 [H, W], 0 transparent to 255 opaque, not premultiplied; None where there is none.
        icc: ICC profile of `pixels`, or None for sRGB.
        bit_depth: bits a sample in the source, 8 or 16 (16 stands for anything deeper than 8).
        notes: what was converted on reading, one short sentence each.
        damage: what a decoder could not restore; empty unless it was asked for a partial result.

    Raises:
        UsageError: the arrays have another type or do not fit each other.
        MediaError: the picture has no pixels.
    """

    pixels: UInt8Array
    alpha: UInt8Array | None
    icc: bytes | None
    bit_depth: int = 8
    notes: tuple[str, ...] = ()
    damage: tuple[BitstreamError, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or not self.pixels.shape[2] <= MAX_BANDS:
            raise UsageError(
                f"pixels are {self.pixels.dtype} {list(self.pixels.shape)}: give uint8 [H, W, 1] or [H, W, 3]"
            )
        if self.pixels.size == 0:
            raise MediaError(f"picture has no pixels ({self.width}x{self.height}): give at least one")
        if self.alpha is not None and (
            self.alpha.dtype != np.uint8 or self.alpha.shape != self.pixels.shape[:2]
        ):
            raise UsageError(
                f"alpha is {self.alpha.dtype} {list(self.alpha.shape)}: "
                f"give uint8 {list(self.pixels.shape[:2])}, like the pixels"
            )
        if self.bit_depth not in (8, 16):
            raise UsageError(f"bit depth is {self.bit_depth}: give 8 or 16")

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.pixels.shape[1])

    def to_pil(self) -> Image.Image:
        """The picture as a Pillow image of mode L, LA, RGB or RGBA, with its ICC profile in `info`.

        Raises:
            MediaError: it has other than 1 or 3 channels.
        """
        if self.pixels.shape[2] not in (1, 3):
            raise MediaError(f"no image format holds {self.pixels.shape[2]} bands: save as .npy")
        gray = self.pixels.shape[2] == 1
        image = Image.fromarray(self.pixels[..., 0] if gray else self.pixels)
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        if self.icc is not None:
            image.info["icc_profile"] = self.icc
        return image

    def save(
        self,
        path_or_stream: str | Path | BinaryIO,
        format: str | None = None,  # noqa: A002 (as Pillow names it)
    ) -> None:
        """Writes an image file, at quality 95 where the format is lossy.

        Where the format cannot hold the ICC profile, the pixels are written as sRGB.

        Args:
            path_or_stream: where to; a path is opened and written in place (no temporary file).
            format: a Pillow format or an extension ("PNG", "jpg"); by default that of the path's extension,
                and PNG for a stream. "npy" writes `pixels` as numpy does, with any number of bands.

        Raises:
            MediaError: unknown format, or one that cannot hold this picture (alpha in JPEG, too large).
            OSError: the operating system refuses the path or the write (missing folder, full disk).
        """
        name = _name_of(path_or_stream)
        if _is_numpy(path_or_stream, format):
            if self.alpha is not None:
                raise MediaError(f"{name}: .npy holds bands, not transparency: save as .png instead")
            if isinstance(path_or_stream, (str, os.PathLike)):
                # numpy would add an extension of its own to a path that lacks it.
                with open(path_or_stream, "wb") as stream:
                    np.save(stream, self.pixels, allow_pickle=False)
            else:
                np.save(path_or_stream, self.pixels, allow_pickle=False)
            return
        pil_format = _writable_format(path_or_stream, format, name)
        if self.alpha is not None and pil_format not in _ALPHA_FORMATS:
            raise MediaError(f"{name}: {pil_format} cannot hold transparency: save as .png instead")
        icc = self.icc
        color = "L" if self.pixels.shape[2] == 1 else "RGB"
        if icc is not None and pil_format not in _PROFILE_FORMATS[color]:
            image = _from_image(self.to_pil(), name, strip=True).to_pil()
            icc = None
        else:
            image = self.to_pil()
        options: dict[str, Any] = {"icc_profile": icc} if icc is not None else {}
        if pil_format in _LOSSY_FORMATS:
            options["quality"] = 95
        if pil_format == "AVIF" and image.mode == "LA":
            image = image.convert("RGBA")
        try:
            image.save(path_or_stream, format=pil_format, **options)
        except OSError as error:
            if error.errno is not None:  # the file system's refusal, not the format's
                raise
            raise _unwritable(name, pil_format, error) from error
        except (ValueError, struct.error, OverflowError, RuntimeError) as error:
            raise _unwritable(name, pil_format, error) from error


def read_picture(
    source: str | Path | BinaryIO, *, strip: bool = False, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Reads any image that Pillow reads, and uint8 arrays of bands in numpy's format (.npy).

    Peak memory is Pillow's own image (4 bytes a pixel for RGB) and the result (3 bytes a pixel).

    Args:
        source: a path, or a binary stream (read from its start; standard input need not be seekable).
        strip: convert to sRGB whatever the profile, and keep no profile.
        max_pixels: refuse larger images before their pixels are decoded.

    Raises:
        MediaError: missing, empty, truncated, too large, or not an image.
    """
    name = _name_of(source)
    if isinstance(source, (str, os.PathLike)):
        try:
            with open(source, "rb") as stream:
                return _read_stream(stream, name, strip, max_pixels)
        except FileNotFoundError as error:
            raise MediaError(f"{name} does not exist: check the path") from error
        except IsADirectoryError as error:
            raise MediaError(f"{name} is a folder, not an image: name a file inside it") from error
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            if os.path.isdir(source):  # Windows reports a folder as a lack of permission
                raise MediaError(f"{name} is a folder, not an image: name a file inside it") from error
            raise MediaError(f"{name} cannot be opened ({_fact(error)}): check its permissions") from error
    return _read_stream(source if source.seekable() else io.BytesIO(source.read()), name, strip, max_pixels)


def as_picture(value: Any, channels: int = 3) -> Picture:
    """A picture from whatever the caller has at hand.

    Args:
        value: a Picture (returned as it is); a path or binary stream (:func:`read_picture`); a Pillow image
            (its current frame, orientation applied); a uint8 array [H, W] or [H, W, C]; a uint8 or float
            torch tensor [C, H, W]. C = 1 is gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha; float
            values lie in [0, 1].
        channels: of the codec that wants it. Where that is neither 1 nor 3, all channels of arrays and tensors are
            bands.

    Raises:
        UsageError: another type, shape or value range.
        MediaError: the image cannot be read or has no pixels.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, (str, os.PathLike)) or hasattr(value, "seekable"):
        return read_picture(value)
    if isinstance(value, Image.Image):
        return _from_image(value, _name_of(value), strip=False)
    if isinstance(value, np.ndarray):
        return _from_array(value, "array", bands=channels not in (1, 3))
    torch = sys.modules.get("torch")  # a tensor cannot exist before torch has been imported
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_tensor(value, bands=channels not in (1, 3))
    raise UsageError(
        f"{type(value).__name__} is not a picture: give a path, a Pillow image, "
        "a uint8 array [H, W, C] or a tensor [C, H, W]"
    )


def psnr(reference: UInt8Array, other: UInt8Array) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit samples, over all channels; infinite for equal arrays.

    Args:
        reference, other: uint8 arrays of one shape, the first axis of which is gone through in parts.

    >>> round(psnr(np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)), 3)
    0.0
    """
    total = 0
    for first in range(0, reference.shape[0], _PSNR_ROWS):
        rows = slice(first, first + _PSNR_ROWS)
        difference = reference[rows].astype(np.int64) - other[rows]
        total += int(np.sum(difference * difference))
    return 10 * math.log10(255**2 * reference.size / total) if total else math.inf


def is_image_path(path: str | Path) -> bool:
    """Whether the extension is .npy or one of an image format that Pillow reads (the file itself is not opened)."""
    if Path(path).suffix.lower() == ".npy":
        return True
    image_format = Image.registered_extensions().get(Path(path).suffix.lower())
    return image_format is not None and image_format not in _UNREADABLE_FORMATS


def encode_alpha(alpha: UInt8Array) -> bytes:
    """Codes an alpha plane, uint8 [H, W], without loss: the smaller of a WebP and a PNG file."""
    image = Image.fromarray(np.ascontiguousarray(alpha))
    candidates = []
    for image_format, options, limit in (
        ("WEBP", {"lossless": True, "quality": 100}, 2**14 - 1),
        ("PNG", {"optimize": True}, 2**31 - 1),
    ):
        if max(image.size) <= limit:
            stream = io.BytesIO()
            image.save(stream, format=image_format, **options)
            candidates.append(stream.getvalue())
    return min(candidates, key=len)


def decode_alpha(payload: bytes, height: int, width: int) -> UInt8Array:
    """Inverse of :func:`encode_alpha`: uint8 [height, width].

    Raises:
        BitstreamError: the payload is damaged or holds a plane of another size (found before it is decoded).
    """
    # Sizes come from fixed places in the two headers: Pillow's WebP reader would allocate the canvas first.
    if payload[:4] == b"RIFF" and payload[8:16] == b"WEBPVP8L" and len(payload) >= 25:
        image_format = "WEBP"
        packed = int.from_bytes(payload[21:25], "little")
        size = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    elif payload[:8] == b"\x89PNG\r\n\x1a\n" and payload[12:16] == b"IHDR" and len(payload) >= 33:
        image_format = "PNG"
        size = int.from_bytes(payload[16:20], "big"), int.from_bytes(payload[20:24], "big")
    else:
        raise BitstreamError("alpha plane is neither a lossless WebP nor a PNG: the file is damaged")
    if size != (width, height):
        raise BitstreamError(
            f"alpha plane is {size[0]}x{size[1]} pixels in an image of {width}x{height}: the file is damaged"
        )
    try:
        with _open_image(io.BytesIO(payload), (image_format,)) as image:
            if image.size != size:
                raise ValueError(f"{image.width}x{image.height} pixels inside")
            image.load()
            alpha = np.array(image.getchannel(0), dtype=np.uint8)
    except Exception as error:  # Pillow's readers raise many types on damaged data
        raise BitstreamError(f"alpha plane is damaged ({_fact(error)}): copy the file again") from error
    return alpha


def _open_image(stream: BinaryIO, formats: Iterable[str] | None = None) -> Image.Image:
    """`Image.open` for a seekable stream without its size limit.

    Pillow's limit is a global of its module, which a library must not change under an application; the caller
    compares the size with a limit of its own before it loads any pixels.
    """
    stream.seek(0)
    prefix = stream.read(16)
    tried: set[str] = set()
    for register in (Image.preinit, Image.init):  # the common formats first: importing all takes a while
        register()
        for image_format in Image.ID if formats is None else formats:
            if image_format in tried or image_format not in Image.OPEN:
                continue
            tried.add(image_format)
            factory, accept = Image.OPEN[image_format]
            verdict = accept(prefix) if accept is not None else True
            if not verdict or isinstance(verdict, str):
                continue
            stream.seek(0)
            try:
                return factory(stream, "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # how a reader says "not mine"
                continue
    raise UnidentifiedImageError("no image format fits its content")


def _read_stream(stream: BinaryIO, name: str, strip: bool, max_pixels: int) -> Picture:
    stream.seek(0)
    opening = stream.read(6)
    if not opening:
        raise MediaError(f"{name} is empty (0 bytes): copy it again")
    if opening == b"\x93NUMPY":
        stream.seek(0)
        return _read_bands(stream, name, max_pixels)
    try:
        image = _open_image(stream)
    except UnidentifiedImageError as error:
        raise MediaError(f"{name} is not an image ({error}): give a PNG, JPEG, WebP or TIFF file") from error
    except Exception as error:  # Pillow's readers raise many types on damaged data
        raise _undecodable(name, error) from error
    with image:
        return _from_image(image, name, strip=strip, max_pixels=max_pixels)


def _from_image(image: Image.Image, name: str, *, strip: bool, max_pixels: int = MAX_PIXELS) -> Picture:
    if 0 in image.size:
        raise MediaError(f"{name} has no pixels ({image.width}x{image.height}): give at least one")
    if image.width * image.height > max_pixels:
        raise MediaError(
            f"{name} has {image.width}x{image.height} pixels, over the limit of {max_pixels}: cut it up"
        )
    try:
        frames, layout = _frame_note(image), _stored_layout(image)
        _load(image)
        orientation = _orientation(image)
        conversion = _plan(image, layout, strip)
        height, width = image.height, image.width
        shape = (width, height) if orientation >= 5 else (height, width)
        pixels: UInt8Array = np.empty((*shape, conversion.channels), np.uint8)
        alpha: UInt8Array | None = np.empty(shape, np.uint8) if conversion.has_alpha else None
        stored_pixels = _as_stored(pixels, orientation)
        stored_alpha = None if alpha is None else _as_stored(alpha, orientation)
        for box in _blocks(width, height):
            place = slice(box[1], box[3]), slice(box[0], box[2])
            block_pixels, block_alpha = conversion.convert(image.crop(box))
            stored_pixels[place] = block_pixels
            if stored_alpha is not None:
                stored_alpha[place] = block_alpha
    except MemoryError as error:
        raise MediaError(
            f"{name} ({image.width}x{image.height}) does not fit into memory: cut it into parts"
        ) from error
    except Exception as error:  # Pillow's readers raise many types on damaged data
        raise _undecodable(name, error) from error
    return Picture(pixels, alpha, conversion.icc, conversion.bit_depth, (*frames, *conversion.notes))


def _load(image: Image.Image) -> None:
    """Decodes the pixels; the readers that ask for Pillow's limit once more do not get to warn of it."""
    if Image.MAX_IMAGE_PIXELS is None or image.width * image.height <= Image.MAX_IMAGE_PIXELS:
        image.load()
        return
    with warnings.catch_warnings():  # large images only, since the filters are shared by all threads
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image.load()


@dataclass(frozen=True)
class _Layout:
    """How the file stores its samples, known only until Pillow has loaded them."""

    rawmode: str  # of Pillow's decoder, such as "RGB;16B"; "" where there is none
    deep: bool  # more than 8 bits a sample


def _stored_layout(image: Image.Image) -> _Layout:
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        rawmode = arguments[0] if arguments and isinstance(arguments[0], str) else ""
        # PGM and PPM files give the largest sample value instead of a depth.
        scaled = image.format == "PPM" and len(arguments) > 1 and tile[0] != "raw" and arguments[1] > 255
        return _Layout(rawmode, scaled or ";16" in rawmode or ";12" in rawmode)
    return _Layout("", False)


def _frame_note(image: Image.Image) -> tuple[str, ...]:
    count = getattr(image, "n_frames", 1)
    if count < 2 or image.format == "PSD":  # frames of a Photoshop file are layers; their composite is read
        return ()
    position = image.tell()
    return (f"first of {count} frames" if position == 0 else f"frame {position + 1} of {count}",)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (as stored) to 8; read after loading, as Pillow applies that of TIFF itself."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata must not cost the image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _as_stored(displayed: UInt8Array, orientation: int) -> UInt8Array:
    """A view of an array [H, W, ...] in display axes, whose axes are those of the stored image."""
    view = displayed.swapaxes(0, 1) if orientation >= 5 else displayed
    rows = slice(None, None, -1 if orientation in (3, 4, 6, 7) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 7, 8) else 1)
    return view[rows, columns]


def _blocks(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) that cover an image, each of at most `_BLOCK_PIXELS`."""
    columns = min(width, _BLOCK_PIXELS)
    rows = max(1, _BLOCK_PIXELS // columns)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)


@dataclass(frozen=True)
class _Conversion:
    """How an image becomes arrays; `convert` maps a block of it to pixels [h, w, C] and alpha [h, w]."""

    channels: int
    has_alpha: bool
    convert: Callable[[Image.Image], tuple[UInt8Array, UInt8Array | None]]
    icc: bytes | None
    bit_depth: int
    notes: tuple[str, ...]


def _plan(image: Image.Image, layout: _Layout, strip: bool) -> _Conversion:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _plan_deep_gray(image, layout, strip)
    # Pillow has no 16-bit gray with alpha and gives RGBA.
    gray = image.mode in ("1", "L", "LA", "La") or layout.rawmode.startswith("LA;16")
    has_alpha = image.has_transparency_data
    target = ("L" if gray else "RGB") + ("A" if has_alpha else "")
    profile = _plan_profile(image, gray, strip)
    notes = [_CONVERTED_MODES[image.mode]] if image.mode in _CONVERTED_MODES else []
    if layout.deep:
        notes.append("16-bit samples reduced to 8 bits")
    key = _color_key(image, layout)

    def convert(block: Image.Image) -> tuple[UInt8Array, UInt8Array | None]:
        if key is not None:
            block.info["transparency"] = key
        if block.mode in ("CMYK", "LAB"):
            return np.asarray(profile.to_srgb(block)), None
        block = block.convert(target)
        alpha = np.asarray(block.getchannel("A")) if has_alpha else None
        color = profile.to_srgb(block.convert("L" if gray else "RGB"))
        return np.asarray(color).reshape(block.height, block.width, -1), alpha

    depth = 16 if layout.deep else 8
    return _Conversion(1 if gray else 3, has_alpha, convert, profile.kept, depth, (*notes, *profile.notes))


def _color_key(image: Image.Image, layout: _Layout) -> int | tuple[int, ...] | None:
    """The color that a PNG declares transparent, in the scale of the 8-bit samples that Pillow delivers."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple):
        return tuple(value >> 8 for value in key) if layout.deep else key
    if image.mode == "L" and isinstance(key, int):
        return key * {"L;2": 85, "L;4": 17}.get(layout.rawmode, 1)
    return None


def _plan_deep_gray(image: Image.Image, layout: _Layout, strip: bool) -> _Conversion:
    """16-bit, 32-bit and floating-point gray, scaled linearly to 8 bits."""
    profile = _plan_profile(image, True, strip)
    notes = profile.notes
    depth = 16
    low: float
    high: float
    if image.mode.startswith("I;") or layout.deep:
        low, high = (0, 4095) if layout.rawmode.endswith(";12") else (0, 65535)
        if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0:
            low, high = high, low  # photometric interpretation "white is zero", which Pillow leaves to us
        notes = ("16-bit samples reduced to 8 bits", *notes)
    else:
        kind = "32-bit" if image.mode == "I" else "floating-point"
        least, most = _finite_range(image)
        whites = (255, 65535) if image.mode == "I" else (1, 255, 65535)
        white = next((white for white in whites if least >= 0 and most <= white), None)
        if white is None:
            low, high = least, max(most, least + 1)
            notes = (f"{kind} samples from {least:g} to {most:g} stretched to 8 bits", *notes)
        else:
            low, high = 0, white
            notes = (f"{kind} samples reduced to 8 bits, white at {white}", *notes)
            depth = 8 if (image.mode, white) == ("I", 255) else 16
    key = image.info.get("transparency")
    has_alpha = isinstance(key, int)

    def convert(block: Image.Image) -> tuple[UInt8Array, UInt8Array | None]:
        samples = np.asarray(block)
        with np.errstate(invalid="ignore"):  # infinities
            scaled = np.nan_to_num((samples.astype(np.float64) - low) * (255 / (high - low)))
        gray = Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))
        alpha = np.where(samples == key, 0, 255).astype(np.uint8) if has_alpha else None
        return np.asarray(profile.to_srgb(gray))[..., None], alpha

    return _Conversion(1, has_alpha, convert, profile.kept, depth, notes)


def _finite_range(image: Image.Image) -> tuple[float, float]:
    """Least and greatest finite sample; (0, 0) where there is none."""
    extremes: list[float] = []
    for box in _blocks(image.width, image.height):
        samples = np.asarray(image.crop(box))
        samples = samples[np.isfinite(samples)]
        if samples.size:
            extremes += [float(samples.min()), float(samples.max())]
    return (min(extremes), max(extremes)) if extremes else (0.0, 0.0)


@dataclass(frozen=True)
class _ProfilePlan:
    """What becomes of an image's ICC profile; `to_srgb` maps a block to L or RGB, unchanged if `kept`."""

    to_srgb: Callable[[Image.Image], Image.Image]
    kept: bytes | None = None
    notes: tuple[str, ...] = ()


def _plan_profile(image: Image.Image, gray: bool, strip: bool) -> _ProfilePlan:
    icc = image.info.get("icc_profile")
    if not isinstance(icc, bytes) or not icc:
        icc = None
    if image.mode == "LAB":
        transform = _transform(icc, "LAB") or _transform(_lab_profile(), "LAB")
        if transform is None:
            raise ValueError("this Pillow has no color management, which LAB needs")
        return _ProfilePlan(transform, notes=("LAB converted to sRGB",))
    if image.mode == "CMYK":
        transform = _transform(icc, "CMYK")
        if transform is not None:
            return _ProfilePlan(transform, notes=("CMYK converted to sRGB by its color profile",))
        ignored = () if icc is None else ("unusable color profile ignored",)
        return _ProfilePlan(_to_rgb, notes=("CMYK converted to RGB without a color profile", *ignored))
    if icc is None:
        return _ProfilePlan(_unchanged)

    transform = _transform(icc, "L" if gray else "RGB")
    storable = transform is not None
    if transform is None and gray:  # an RGB profile on gray pixels has a meaning, but few readers know it
        in_color = _transform(icc, "RGB")
        if in_color is not None:
            transform = _through_rgb(in_color)
    if transform is None:
        return _ProfilePlan(_unchanged, notes=("unusable color profile ignored",))
    if _is_srgb(transform, gray):
        return _ProfilePlan(_unchanged)
    if storable and not strip and len(icc) <= MAX_KEPT_PROFILE:
        return _ProfilePlan(_unchanged, kept=icc)
    return _ProfilePlan(transform, notes=("color profile converted to sRGB",))


def _lab_profile() -> bytes | None:
    """Profile of CIELAB itself; None where Pillow was built without color management."""
    try:
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    except ImportError:
        return None


def _transform(profile: bytes | None, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Conversion to sRGB of images of a mode (gray stays gray); None where the profile is not usable."""
    if profile is None:
        return None
    space = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}[mode]
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != space:
            return None
        transform = ImageCms.ImageCmsTransform(
            source,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError, ImportError):
        return None
    if mode == "L":
        return lambda block: transform.apply(block).convert("L")
    return transform.apply


def _through_rgb(transform: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
    return lambda block: transform(block.convert("RGB")).convert("L")


def _is_srgb(transform: Callable[[Image.Image], Image.Image], gray: bool) -> bool:
    """Whether a conversion to sRGB moves no color of a grid (the name of a profile tells too little)."""
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    grid = levels[None] if gray else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
    moved = np.asarray(transform(Image.fromarray(grid)))
    return bool(np.abs(moved.astype(int) - grid).max() <= _NEAR_SRGB)


def _unchanged(block: Image.Image) -> Image.Image:
    return block


def _to_rgb(block: Image.Image) -> Image.Image:
    return block.convert("RGB")


def _from_array(array: NDArray[Any], kind: str, *, bands: bool = False) -> Picture:
    if array.dtype != np.uint8:
        raise UsageError(f"{kind} is {array.dtype}: give uint8 values, 0 to 255")
    if array.ndim == 2:
        array = array[..., None]
    if bands and array.ndim == 3 and 1 <= array.shape[2] <= MAX_BANDS:
        return Picture(np.ascontiguousarray(array), None, None)
    if array.ndim != 3 or not 1 <= array.shape[2] <= 4:
        order = "[C, H, W]" if kind == "tensor" else "[H, W] or [H, W, C]"
        raise UsageError(f"{kind} does not have the shape of one image: give {order} with 1 to 4 channels")
    channels = array.shape[2]
    color = 1 if channels <= 2 else 3
    alpha = np.ascontiguousarray(array[..., -1]) if channels in (2, 4) else None
    return Picture(np.ascontiguousarray(array[..., :color]), alpha, None)


def _from_tensor(tensor: Any, *, bands: bool = False) -> Picture:
    """See :func:`as_picture`; values slightly outside [0, 1] (rounding of resampling filters) are clamped."""
    if tensor.ndim != 3:
        raise UsageError(f"tensor has {tensor.ndim} dimensions: give one image, [C, H, W]")
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.numel():
        tensor = tensor.float()
        least, most = float(tensor.min()), float(tensor.max())
        if not (least >= -0.01 and most <= 1.01):
            raise UsageError(f"tensor has values from {least:g} to {most:g}: scale or clamp them to 0..1")
        tensor = (tensor.clamp(0, 1) * 255).round().byte()
    elif tensor.is_floating_point():
        tensor = tensor.byte()
    return _from_array(tensor.permute(1, 2, 0).numpy(), "tensor", bands=bands)


def _is_numpy(target: str | Path | BinaryIO, wanted: str | None) -> bool:
    """Whether a picture is to be written as numpy does."""
    if wanted is not None or not isinstance(target, (str, os.PathLike)):
        return (wanted or "").lower().lstrip(".") == "npy"
    return Path(target).suffix.lower() == ".npy"


def _read_bands(stream: BinaryIO, name: str, max_pixels: int) -> Picture:
    """A uint8 array [H, W] or [H, W, C] in numpy's format."""
    try:
        version = numpy_format.read_magic(stream)
        first = version == (1, 0)
        read_header = numpy_format.read_array_header_1_0 if first else numpy_format.read_array_header_2_0
        shape, fortran, kind = read_header(stream)
    except Exception as error:  # a forged header raises many types, from numpy's parser and from Python's
        raise MediaError(f"{name} is not a readable array ({_fact(error)}): save it again") from error
    size = (*shape, 1) if len(shape) == 2 else shape
    whole = all(type(edge) is int and edge > 0 for edge in size)
    if kind != np.uint8 or not whole or len(size) != 3 or size[2] > MAX_BANDS:
        raise MediaError(f"{name} is {kind} {list(shape)}: give bands as uint8 [H, W, C]")
    if size[0] * size[1] > max_pixels:
        raise MediaError(f"{name} has {size[1]}x{size[0]} pixels, over the limit of {max_pixels}: cut it up")
    count = math.prod(size)
    content = stream.read(count + 1)
    if len(content) != count:
        found = f"{len(content)} of" if len(content) < count else "more than"
        raise MediaError(f"{name} has {found} {count} bytes of bands: copy it again")
    pixels = np.frombuffer(content, np.uint8).reshape(size, order="F" if fortran else "C")
    return Picture(np.array(pixels, order="C"), None, None)


def _writable_format(target: str | Path | BinaryIO, wanted: str | None, name: str) -> str:
    """Pillow's name of the format to write."""
    extensions = Image.registered_extensions()
    if wanted is None and isinstance(target, (str, os.PathLike)):
        extension = Path(target).suffix.lower()
        found = extensions.get(extension)
        label = extension or "without an extension"
    else:
        label = (wanted or "png").lower().lstrip(".")
        found = extensions.get(f".{label}", label.upper())
    if found not in Image.SAVE:
        raise MediaError(f"{name}: no image format to write ({label}): use .png, .jpg, .webp or .tiff")
    return found


def _name_of(source: Any) -> str:
    """What to call a path, stream or image in a message."""
    if isinstance(source, (str, os.PathLike)):
        return " ".join(os.fspath(source).split("\n"))
    name = getattr(source, "filename" if isinstance(source, Image.Image) else "name", "")
    return name if isinstance(name, str) and name else "image"


def _fact(error: Exception) -> str:
    """An exception's message as part of one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()) or type(error).__name__


def _undecodable(name: str, error: Exception) -> MediaError:
    if isinstance(error, Image.DecompressionBombError):
        return MediaError(f"{name} is too large in this format ({_fact(error)}): convert it to PNG")
    return MediaError(f"{name} is truncated or damaged ({_fact(error)}): copy it again or convert it to PNG")


def _unwritable(name: str, image_format: str, error: Exception) -> MediaError:
    return MediaError(f"{name}: {image_format} cannot hold this picture ({_fact(error)}): save as .png")
