"""Image anchors: what Pillow writes, and raw pixels."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import struct
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

from compand.errors import BitstreamError, MediaError, UsageError
from compand.eval.items import Signal, to_rgb
from compand.eval.subjects import Subject
from compand.pictures import Picture


class _PillowSubject(Subject):
    """A format that Pillow writes; files are those that Pillow makes, with nothing added.

    Attributes:
        pillow_format: Pillow's name of the format.
        library: the library behind it, with its version.
        settings: one clause on the fixed settings.
    """

    medium = "image"
    kind = "classical"
    pillow_format: str
    library: str
    settings: str
    lowest = 0.0
    highest = 100.0

    def __init__(self) -> None:
        self.settings_note = f"{self.library}, through Pillow {PIL.__version__}; {self.settings}."
        self.identity = f"Pillow {PIL.__version__}, {self.library}, {self.settings}"

    @abstractmethod
    def options(self, quality: float) -> dict[str, Any]:
        """Arguments of `Image.save`."""

    def encode(self, signal: Signal, quality: float) -> bytes:
        self.check_quality(quality)
        stream = io.BytesIO()
        try:
            image = Image.fromarray(to_rgb(_picture(signal)).pixels)
            image.save(stream, format=self.pillow_format, **self.options(quality))
        except (OSError, ValueError, RuntimeError) as error:
            fact = " ".join(str(error).split())
            raise UsageError(f"{self.title} cannot hold this picture ({fact}): leave it out") from error
        return stream.getvalue()

    def decode(self, data: bytes) -> Signal:
        # These files have neither profile nor orientation nor transparency, for which `read_picture` looks at length.
        try:
            with Image.open(io.BytesIO(data), formats=(self.pillow_format,)) as image:
                return Picture(np.array(image.convert("RGB")), None, None)
        except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            fact = " ".join(str(error).split())
            raise MediaError(f"{self.title} file is damaged ({fact}): get an intact copy") from error


class Jpeg(_PillowSubject):
    """JPEG with the settings of the curve that CompressAI publishes, which libjpeg 9d reproduces to all digits.

    libjpeg-turbo writes the same files within 0.3 %, but interpolates chroma where libjpeg 9 enlarges it by the DCT.
    """

    name, title, suffix = "jpeg", "JPEG", ".jpg"
    pillow_format = "JPEG"
    library = f"libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
    settings = "baseline, standard Huffman tables, chroma 4:2:0; quality is libjpeg's, 1 to 100"
    qualities = (5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0)
    lowest = 1.0
    whole = True

    def __init__(self) -> None:
        super().__init__()
        self.settings_note += (
            " On Kodak it is 0.07 to 0.14 dB above the published curve, which jpeg-9d reproduces."
        )

    def options(self, quality: float) -> dict[str, Any]:
        return {"quality": int(quality), "subsampling": "4:2:0"}


class Jpeg9(Subject):
    """JPEG by libjpeg 9d, with which the curve that CompressAI publishes was made; for comparison with that curve."""

    name, title, suffix = "jpeg-9d", "JPEG (libjpeg 9d)", ".jpg"
    medium = "image"
    kind = "classical"
    qualities = Jpeg.qualities
    lowest, highest, whole = 1.0, 100.0, True
    listed = False
    settings_note = f"libjpeg 9d, through jpeglib; {Jpeg.settings}."
    identity = f"libjpeg 9d, {Jpeg.settings}"

    def encode(self, signal: Signal, quality: float) -> bytes:
        import jpeglib

        self.check_quality(quality)
        with tempfile.TemporaryDirectory() as folder, jpeglib.version("9d"):
            path = Path(folder, "picture.jpg")
            image = jpeglib.from_spatial(np.ascontiguousarray(to_rgb(_picture(signal)).pixels))
            image.samp_factor = "4:2:0"
            image.write_spatial(str(path), qt=int(quality))
            return path.read_bytes()

    def decode(self, data: bytes) -> Signal:
        import jpeglib

        with tempfile.TemporaryDirectory() as folder, jpeglib.version("9d"):
            path = Path(folder, "picture.jpg")
            path.write_bytes(data)
            try:
                pixels = jpeglib.read_spatial(str(path)).spatial
            except (OSError, RuntimeError) as error:
                fact = " ".join(str(error).split())
                raise MediaError(f"{self.title} file is damaged ({fact}): get an intact copy") from error
        return Picture(np.ascontiguousarray(pixels), None, None)


class WebP(_PillowSubject):
    """Lossy WebP with the settings of the curve that CompressAI publishes, which it reproduces to all digits."""

    name, title, suffix = "webp", "WebP", ".webp"
    pillow_format = "WEBP"
    library = f"libwebp {features.version('webp')}"
    settings = "lossy, method 4, chroma 4:2:0; quality is libwebp's, 0 to 100"
    qualities = (1.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 75.0, 85.0, 90.0, 95.0, 100.0)

    def options(self, quality: float) -> dict[str, Any]:
        return {"quality": quality, "method": 4}


class Avif(_PillowSubject):
    """AVIF."""

    name, title, suffix = "avif", "AVIF", ".avif"
    pillow_format = "AVIF"
    library = f"libavif {features.version('avif')}"
    settings = "speed 6, chroma 4:2:0, one thread; quality is libavif's, 0 to 100"
    qualities = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0)
    whole = True

    def options(self, quality: float) -> dict[str, Any]:
        return {"quality": int(quality), "speed": 6, "subsampling": "4:2:0", "max_threads": 1}


class Jpeg2000(_PillowSubject):
    """JPEG 2000 at a target rate."""

    name, title, suffix = "jpeg2000", "JPEG 2000", ".jp2"
    pillow_format = "JPEG2000"
    library = f"OpenJPEG {features.version('jpg_2000')}"
    settings = (
        "9/7 wavelet, color transform, one quality layer; quality is the target rate in bpp, 0.01 to 24"
    )
    qualities = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
    lowest, highest = 0.01, 24.0

    def options(self, quality: float) -> dict[str, Any]:
        return {"irreversible": True, "mct": 1, "quality_mode": "rates", "quality_layers": [24 / quality]}


class JpegXl(_PillowSubject):
    """JPEG XL, by the plug-in pillow-jxl."""

    name, title, suffix = "jpegxl", "JPEG XL", ".jxl"
    pillow_format = "JXL"
    settings = "VarDCT, effort 7, one thread; quality is cjxl's, 0 to 100"
    qualities = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0)
    whole = True

    def __init__(self) -> None:
        importlib.import_module("pillow_jxl")  # registers the format with Pillow
        self.library = f"libjxl of pillow-jxl-plugin {importlib.metadata.version('pillow-jxl-plugin')}"
        super().__init__()

    def options(self, quality: float) -> dict[str, Any]:
        return {"quality": int(quality), "effort": 7, "lossless": False, "num_threads": 1}


class Png(_PillowSubject):
    """PNG, which restores every pixel."""

    name, title, suffix = "png", "PNG", ".png"
    kind = "lossless"
    pillow_format = "PNG"
    library = f"zlib {features.version('zlib')}"
    settings = "lossless; quality is zlib's level, 0 to 9"
    qualities = (9.0,)
    highest = 9.0
    whole = True

    def options(self, quality: float) -> dict[str, Any]:
        return {"compress_level": int(quality)}


class ImageIdentity(Subject):
    """Height, width and the pixels as they are."""

    name, title, suffix = "identity", "identity", ".rgb"
    medium = "image"
    kind = "identity"
    identity = "raw RGB 1"
    settings_note = "Raw 8-bit RGB behind a header of 8 bytes; its only quality is 1."
    qualities = (1.0,)
    lowest = highest = 1.0
    _header = struct.Struct("<II")  # height, width

    def encode(self, signal: Signal, quality: float) -> bytes:
        self.check_quality(quality)
        pixels = to_rgb(_picture(signal)).pixels
        return self._header.pack(*pixels.shape[:2]) + pixels.tobytes()

    def decode(self, data: bytes) -> Signal:
        if len(data) < self._header.size:
            raise BitstreamError("raw picture has no header: get an intact copy")
        height, width = self._header.unpack_from(data)
        if len(data) != self._header.size + 3 * height * width or not height * width:
            raise BitstreamError(
                f"raw picture of {width}x{height} pixels has {len(data)} bytes: it is damaged"
            )
        pixels = np.frombuffer(data, np.uint8, offset=self._header.size)
        return Picture(pixels.reshape(height, width, 3).copy(), None, None)

    def overhead(self, data: bytes) -> int:
        return self._header.size


ANCHORS: dict[str, type[Subject]] = {
    subject.name: subject for subject in (Jpeg, Jpeg9, WebP, Avif, Jpeg2000, JpegXl, Png, ImageIdentity)
}


def missing() -> dict[str, tuple[str, str]]:
    """The anchors that do not work here: medium and remedy by name."""
    lacking = {
        subject.name: ("image", f"Pillow was built without {subject.title}; install Pillow from PyPI")
        for subject, feature in ((WebP, "webp"), (Avif, "avif"), (Jpeg2000, "jpg_2000"))
        if not features.check(feature)
    }
    if importlib.util.find_spec("pillow_jxl") is None:
        lacking["jpegxl"] = ("image", "pip install pillow-jxl-plugin")
    if importlib.util.find_spec("jpeglib") is None:
        lacking["jpeg-9d"] = ("image", "pip install jpeglib")
    return lacking


def _picture(signal: Signal) -> Picture:
    if not isinstance(signal, Picture):
        raise UsageError("an image codec takes pictures: choose an audio codec for sounds")
    return signal
