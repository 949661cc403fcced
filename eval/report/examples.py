"""Decoded items for the page: whole or cut to a part, in formats that browsers restore exactly, within a size."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high, median_low
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from compand.errors import MediaError
from compand.eval.report.results import Results, number

ORIGINAL = "original"
SUFFIXES = {"image": ".png", "audio": ".flac"}

REGION = (512, 512)
"""Largest height and width of a picture in the page; of a larger one the middle is shown."""

SECONDS = 5.0
"""Longest sound in the page; of a longer one the loudest part is played."""

_MOST_RATES, _FEWEST_RATES = 24, 3
_WEBP_OF_PNG = (
    0.8  # size of a photograph as lossless WebP, relative to PNG; the middle has more detail than the rest
)
_FLAC_BITS = 9.0  # of a 16-bit sample of music
_SPECTROGRAM_BYTES = 30_000
_SPECTROGRAM = (160, 480)  # rows and columns
_SPECTROGRAM_LEVELS = 64
_FLOOR = 90.0  # dB below the loudest bin of the original
_WINDOW = 0.046  # seconds


class Medium(NamedTuple):
    """A file inside the page."""

    kind: str  # MIME type
    content: bytes


class Version(NamedTuple):
    """An item as one codec restored it at one quality."""

    codec: str  # name in the summary
    quality: float
    rate: float  # of this item: bpp or kbps
    size: int  # bytes of the coded file
    figures: Mapping[str, float]  # metrics of this item, by name
    medium: Medium
    spectrogram: Medium | None


class Example(NamedTuple):
    """An item in the page."""

    item: str
    note: str  # which part it is; "" for the whole
    original: Medium
    spectrogram: Medium | None
    frequency: float  # Hz at the top of the spectrograms; 0 for pictures
    seconds: float  # of the part; 0 for pictures
    rates: Sequence[float]  # to compare at, ascending; each codec has here its version nearest to any of them
    versions: Sequence[Version]


class Selection(NamedTuple):
    """What the page shows of the examples kept."""

    examples: Sequence[Example]
    notes: Sequence[str]  # what was left out, one sentence each


@dataclass(frozen=True)
class _Kept:
    """A decoded file in the examples folder, and its row."""

    path: Path
    row: Mapping[str, Any]
    rate: float
    cost: float  # bytes in the page, about


def select(out: Path, results: Results, *, count: int | None, megabytes: float) -> Selection:
    """Read as many of OUT/examples as the page has room for.

    An item's versions are compared at a list of rates. Where there is not room for all versions, each codec keeps
    those nearest to these rates; the list gets shorter, and then there are fewer items. Codecs that restore the
    original itself are not repeated.

    Args:
        out: folder of the run.
        results: what its results.json says.
        count: show this many items at most; None for all that were kept.
        megabytes: room for pictures, sounds and spectrograms, before they become text.

    Raises:
        MediaError: a kept file cannot be read.
    """
    kept = _kept(out, results)
    items = _spread(list(kept), len(kept) if count is None else min(count, len(kept)))
    plan = _plan({item: kept[item] for item in items}, 1e6 * megabytes)
    notes = []
    if len(plan) < len(kept):
        notes.append(f"{len(plan)} of the {len(kept)} items kept are shown.")
    available = sum(len(kept[item][1]) for item in plan)
    shown = sum(len(share.versions) for share in plan.values())
    if shown < available:
        notes.append(
            f"{shown} of {available} decoded files are shown, those nearest to the rates offered, to keep this "
            f"page below about {megabytes:g} MB of media."
        )
    lossless = [
        codec.title for codec in results.codecs.values() if codec.lossless and codec.kind != "identity"
    ]
    if plan and lossless:
        notes.append(f"Lossless, not shown: {', '.join(lossless)}.")
    names = [metric.name for metric in results.metrics]
    read = _picture_example if results.medium == "image" else _sound_example
    return Selection([read(item, share, names) for item, share in plan.items()], notes)


def _kept(out: Path, results: Results) -> dict[str, tuple[Path, list[_Kept]]]:
    """Original and decoded files of every item that has them, in the order of the summary."""
    suffix = SUFFIXES[results.medium]
    found: dict[str, tuple[Path, list[_Kept]]] = {
        item: (out / folder / f"{ORIGINAL}{suffix}", []) for item, folder in results.examples.items()
    }
    for row in results.rows:
        codec = results.codecs.get(row.get("codec", ""))
        if codec is None or codec.lossless or row.get("item") not in found:
            continue
        original, versions = found[row["item"]]
        path = original.with_name(f"{codec.name}-{row['quality']:g}{suffix}")
        rate = number(row.get(results.rate))
        if rate and path.is_file():
            versions.append(_Kept(path, row, rate, _cost(path, row)))
    return {item: kept for item, kept in found.items() if kept[0].is_file() and kept[1]}


def _cost(path: Path, row: Mapping[str, Any]) -> float:
    if row["medium"] == "image":
        height, width = int(row["height"]), int(row["width"])
        share = min(height, REGION[0]) * min(width, REGION[1]) / (height * width)
        return _WEBP_OF_PNG * share * path.stat().st_size
    seconds = min(SECONDS, float(row["seconds"]))
    return _SPECTROGRAM_BYTES + seconds * row["rate"] * row["channels"] * _FLAC_BITS / 8


class _Share(NamedTuple):
    """What the page shows of one item."""

    original: Path
    rates: list[float]
    versions: list[_Kept]


def _plan(kept: Mapping[str, tuple[Path, list[_Kept]]], room: float) -> dict[str, _Share]:
    """Which decoded files of which items fit: all, or those for fewer rates, or fewer items too."""
    for count in range(len(kept), 0, -1):
        items = _spread(list(kept), count)
        if sum(version.cost for item in items for version in kept[item][1]) <= room:
            return {
                item: _Share(kept[item][0], _rates(kept[item][1], _MOST_RATES), kept[item][1])
                for item in items
            }
        for length in range(_MOST_RATES, _FEWEST_RATES - 1, -1):
            shares = {item: _share(*kept[item], length) for item in items}
            if sum(version.cost for share in shares.values() for version in share.versions) <= room:
                return shares
    return {}


def _share(original: Path, versions: Sequence[_Kept], count: int) -> _Share:
    """Each codec's versions that are nearest to that many rates."""
    rates = _rates(versions, count)
    chosen = {_nearest(points, rate).path for points in _by_codec(versions) for rate in rates}
    return _Share(original, rates, [version for version in versions if version.path in chosen])


def _rates(versions: Sequence[_Kept], count: int) -> list[float]:
    """Rates that are evenly spaced in their logarithm over the range that half of the codecs or more reach."""
    ranges = [[version.rate for version in points] for points in _by_codec(versions)]
    low, high = median_high(map(min, ranges)), median_low(map(max, ranges))
    return np.geomspace(min(low, high), max(low, high), count).tolist()


def _by_codec(versions: Sequence[_Kept]) -> list[list[_Kept]]:
    codecs: dict[str, list[_Kept]] = {}
    for version in versions:
        codecs.setdefault(version.row["codec"], []).append(version)
    return list(codecs.values())


def _nearest(versions: Sequence[_Kept], rate: float) -> _Kept:
    """The version whose rate has the smallest ratio to `rate`, up or down."""
    return min(versions, key=lambda version: abs(math.log(version.rate / rate)))


def _spread(items: Sequence[str], count: int) -> list[str]:
    """That many items, evenly spaced."""
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def _version(kept: _Kept, names: Sequence[str], medium: Medium, spectrogram: Medium | None) -> Version:
    figures = {name: value for name in names if (value := number(kept.row.get(name))) is not None}
    return Version(
        kept.row["codec"],
        float(kept.row["quality"]),
        kept.rate,
        int(kept.row["bytes"]),
        figures,
        medium,
        spectrogram,
    )


# ---------------------------------------------------------------------------------------------- pictures


def _picture_example(item: str, share: _Share, names: Sequence[str]) -> Example:
    height, width, medium = _picture(share.original)
    versions = [_version(version, names, _picture(version.path)[2], None) for version in share.versions]
    size = f"{min(height, REGION[0])} x {min(width, REGION[1])}"
    whole = height <= REGION[0] and width <= REGION[1]
    note = "" if whole else f"the middle {size} of {height} x {width} pixels"
    return Example(item, note, medium, None, 0.0, 0.0, share.rates, versions)


def _picture(path: Path) -> tuple[int, int, Medium]:
    """Height and width of a picture, and its region for the page as lossless WebP."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            left, top = max(0, (width - REGION[1]) // 2), max(0, (height - REGION[0]) // 2)
            part = image.convert("RGB").crop(
                (left, top, min(width, left + REGION[1]), min(height, top + REGION[0]))
            )
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read ({error}): repeat the evaluation") from None
    stream = io.BytesIO()
    part.save(stream, "WEBP", lossless=True, method=1, quality=20)
    return height, width, Medium("image/webp", stream.getvalue())


# ------------------------------------------------------------------------------------------------ sounds


def _sound_example(item: str, share: _Share, names: Sequence[str]) -> Example:
    samples, rate = _samples(share.original)
    start, stop = _loudest(samples, round(SECONDS * rate))
    part = samples[:, start:stop]
    power = _power(part, rate)
    loudest = float(power.max(initial=0.0)) or 1.0
    versions = []
    for version in share.versions:
        decoded = _samples(version.path)[0][:, start:stop]
        picture = _spectrogram(_power(decoded, rate), loudest)
        versions.append(_version(version, names, _flac(decoded, rate), picture))
    whole = samples.shape[1] == part.shape[1]
    note = (
        ""
        if whole
        else f"{start / rate:.1f} s to {stop / rate:.1f} s of {samples.shape[1] / rate:.1f} s, the loudest"
    )
    return Example(
        item,
        note,
        _flac(part, rate),
        _spectrogram(power, loudest),
        rate / 2,
        part.shape[1] / rate,
        share.rates,
        versions,
    )


def _samples(path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples, float32 [channels, N], and samples a second."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise MediaError(f"{path} cannot be read ({error}): repeat the evaluation") from None
    return samples.T, int(rate)


def _loudest(samples: NDArray[np.float32], length: int) -> tuple[int, int]:
    """Start and end of the stretch of that length that has the most energy, on a grid of tenths of it."""
    total = samples.shape[1]
    if total <= length:
        return 0, total
    energy = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64).sum(axis=0))])
    starts = np.arange(0, total - length + 1, max(1, length // 10))
    start = int(starts[np.argmax(energy[starts + length] - energy[starts])])
    return start, start + length


def _flac(samples: NDArray[np.float32], rate: int) -> Medium:
    """The sound with 16 bits a sample, which every browser plays."""
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(samples.T, -1, 1), rate, format="FLAC", subtype="PCM_16")
    return Medium("audio/flac", stream.getvalue())


def _power(samples: NDArray[np.float32], rate: int) -> NDArray[np.float64]:
    """Short-time power spectrum, mean over the channels: [frequencies, columns], at most as many as `_SPECTROGRAM`."""
    length = 2 ** max(5, round(math.log2(rate * _WINDOW)))
    rows, columns = _SPECTROGRAM
    padded = np.pad(samples, ((0, 0), (length // 2, length // 2)), mode="symmetric")
    hop = max(1, -(-samples.shape[1] // columns))
    frames = np.lib.stride_tricks.sliding_window_view(padded, length, axis=1)[:, ::hop]
    spectrum = np.fft.rfft(frames * np.hanning(length), axis=2)
    power = (spectrum.real**2 + spectrum.imag**2).mean(axis=0).T
    # Rows merge neighboring bins by their loudest, so that single tones keep their height.
    edges = np.unique(np.linspace(0, len(power), rows + 1).astype(int))
    return np.maximum.reduceat(power, edges[:-1], axis=0)


def _spectrogram(power: NDArray[np.float64], loudest: float) -> Medium:
    """A power spectrum as a picture, low frequencies at the bottom; `loudest` is as bright as it gets."""
    import matplotlib

    decibels = 10 * np.log10(np.maximum(power / loudest, 1e-30))
    level = np.clip(1 + decibels / _FLOOR, 0, 1)
    index = np.round(level * (_SPECTROGRAM_LEVELS - 1)).astype(np.uint8)[::-1]
    colors = matplotlib.colormaps["inferno"](np.linspace(0, 1, _SPECTROGRAM_LEVELS), bytes=True)[:, :3]
    image = Image.fromarray(np.ascontiguousarray(index)).convert("P")
    image.putpalette(colors.tobytes())
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return Medium("image/png", stream.getvalue())
