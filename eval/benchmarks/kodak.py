"""Rate and distortion of one checkpoint on a folder of pictures, against published curves.

Every picture is encoded to a file, and decoded from it, at every quality level. Rate is counted from the length of
the file, PSNR over the 8-bit RGB pixels; both are means over the pictures of a level. BD-rate is averaged over the
PSNR that both curves reach between 0.1 and 1.5 bits per pixel (pchip, see `compand.eval.bdrate`).

The size of every file is held against the information content of its symbols under the model. The margin is
|bytes - content| - (1 % of the content + 16 bytes); a positive one is a violation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from compand.coding import container
from compand.errors import UsageError
from compand.eval.bdrate import BdRate, Curve, bd_rate
from compand.eval.benchmarks import program
from compand.eval.benchmarks.provenance import markdown_table, provenance, write_results
from compand.eval.published import kodak
from compand.image_codec import ImageCodec
from compand.pictures import psnr, read_picture

LEVELS = tuple(1 + step / 2 for step in range(15))
RATES = (0.1, 1.5)
"""Bits per pixel over which BD-rates are averaged."""

ANCHORS = {
    "vtm": "VTM",
    "jpeg": "JPEG",
    "webp": "WebP",
    "bpg": "BPG",
    "mbt2018-mean": "mbt2018-mean (Minnen 2018)",
    "bmshj2018-hyperprior": "hyperprior (Ballé 2018)",
    "bmshj2018-factorized": "factorized (Ballé 2018)",
}
"""Published curves and how the report calls them, the most important one first."""


class Trial(NamedTuple):
    """One picture at one level."""

    picture: str
    level: float
    file_bytes: int
    payload_bytes: int  # of the file, what entropy coding made
    content_bytes: float  # information content of the symbols
    bpp: float
    psnr: float  # dB

    @property
    def payload_margin(self) -> float:
        return self._margin(self.payload_bytes)

    @property
    def file_margin(self) -> float:
        return self._margin(self.file_bytes)

    def _margin(self, size: int) -> float:
        return abs(size - self.content_bytes) - (0.01 * self.content_bytes + 16)


class Comparison(NamedTuple):
    """BD-rates against one published curve."""

    anchor: str
    ours: BdRate | None  # None where the curves share no quality
    anchor_against_first: BdRate | None  # the anchor itself against the first one
    source: str


def measure(codec: ImageCodec, path: Path, level: float, file: Path) -> Trial:
    """Encode a picture to `file` and decode it from there."""
    picture = read_picture(path, strip=True)
    file.write_bytes(codec.encode(picture, quality=level))
    data = file.read_bytes()
    payload = sum(len(chunk or b"") for chunk in container.read(data).chunks)
    return Trial(
        path.stem,
        level,
        len(data),
        payload,
        codec.estimate(picture, level) / 8,
        8 * len(data) / (picture.height * picture.width),
        psnr(picture.pixels, codec.decode(data).pixels),
    )


def mean_curve(trials: Sequence[Trial]) -> Curve:
    """Mean rate and PSNR of every level, in ascending order."""
    levels = [
        [trial for trial in trials if trial.level == level] for level in sorted({t.level for t in trials})
    ]
    return Curve(
        [fmean(t.bpp for t in level) for level in levels], [fmean(t.psnr for t in level) for level in levels]
    )


def compare(curve: Curve) -> list[Comparison]:
    """BD-rates against all anchors."""
    published = kodak()
    first = published[next(iter(ANCHORS))].curve
    return [
        Comparison(
            title,
            _bd_rate(published[name].curve, curve),
            _bd_rate(first, published[name].curve),
            published[name].source,
        )
        for name, title in ANCHORS.items()
    ]


def _bd_rate(anchor: Curve, curve: Curve) -> BdRate | None:
    try:
        return bd_rate(anchor, curve, RATES)
    except UsageError:
        return None


def render(trials: Sequence[Trial], comparisons: Sequence[Comparison], name: str) -> str:
    """The report in Markdown."""
    first = comparisons[0].anchor
    rates = markdown_table(
        [
            "anchor (published)",
            f"{name} against it",
            "PSNR of the overlap, dB",
            f"it against {first}",
            "from",
        ],
        [
            [
                row.anchor,
                _percent(row.ours),
                f"{row.ours.low:.2f} to {row.ours.high:.2f}" if row.ours else "none",
                _percent(row.anchor_against_first),
                row.source,
            ]
            for row in comparisons
        ],
    )
    curve = mean_curve(trials)
    levels = sorted({trial.level for trial in trials})
    points = markdown_table(
        ["quality", "bpp", "PSNR, dB", "largest margin of the payload, bytes", "of the file, bytes"],
        [
            [
                f"{level:g}",
                f"{bpp:.4f}",
                f"{quality:.3f}",
                f"{max(t.payload_margin for t in trials if t.level == level):+.1f}",
                f"{max(t.file_margin for t in trials if t.level == level):+.1f}",
            ]
            for level, bpp, quality in zip(levels, curve.bpp, curve.psnr, strict=True)
        ],
    )
    payload, file = (sum(margin > 0 for margin in margins(trials, kind)) for kind in ("payload", "file"))
    return (
        f"# Rate and distortion\n\n{(__doc__ or '').strip()}\n\n## BD-rate\n\n{rates}\n\n## By level\n\n{points}\n\n"
        f"Sizes beyond 1 % + 16 bytes of the information content: {payload} of {len(trials)} payloads, "
        f"{file} of {len(trials)} files with their headers.\n"
    )


def _percent(rate: BdRate | None) -> str:
    return f"{rate.percent:+.1f} %" if rate else "none"


def margins(trials: Sequence[Trial], kind: str) -> list[float]:
    """`payload` or `file` margins of all trials."""
    return [trial.payload_margin if kind == "payload" else trial.file_margin for trial in trials]


def plot(curve: Curve, name: str, path: Path) -> None:
    """Draw the curve among the published ones."""
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    curves = {title: kodak()[key].curve for key, title in ANCHORS.items()} | {name: curve}
    # The legend lists the curves as they lie above each other in the middle of the plot.
    heights = {title: float(np.interp(0.8, other.bpp, other.psnr)) for title, other in curves.items()}
    for title in sorted(curves, key=lambda title: -heights[title]):
        look: dict[str, Any] = {
            "linewidth": 2.6,
            "marker": "o",
            "markersize": 5,
            "color": "black",
            "zorder": 3,
        }
        if title != name:
            look = {"linewidth": 1.3, "marker": ".", "linestyle": "-" if "(" in title else "--"}
        axes.plot(curves[title].bpp, curves[title].psnr, label=title, **look)
    axes.set(
        xlim=(0, 1.6),
        ylim=(25, 41),
        xlabel="bits per pixel (whole file)",
        ylabel="PSNR of RGB, dB",
        title="Mean over the 24 Kodak images; all curves but ours as published",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "kodak")
    program.add_codec(parser)
    program.add_pictures(parser, required=True)
    parser.add_argument(
        "--levels", type=float, nargs="+", default=LEVELS, help="quality levels (1, 1.5 .. 8)"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (cpu)")
    parser.add_argument(
        "--reduced",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 transforms; else where the device has it",
    )
    arguments = program.parse(parser, argv, ".png")
    codec = program.image_codec(arguments.codec, arguments.device, reduced=arguments.reduced)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.cpd")
        trials = [measure(codec, path, level, file) for path in arguments.data for level in arguments.levels]
    name, curve = arguments.codec.name, mean_curve(trials)
    comparisons = compare(curve)
    report = render(trials, comparisons, name)
    results = {
        "checkpoint": {"name": name, "symbols": arguments.codec.symbols.hex(), "device": arguments.device},
        "transforms": str(next(codec.transform.parameters()).dtype).removeprefix("torch."),
        "curve": curve._asdict() | {"level": sorted(arguments.levels)},
        "bd_rate": [
            {
                name: value._asdict() if isinstance(value, BdRate) else value
                for name, value in row._asdict().items()
            }
            for row in comparisons
        ],
        "largest_margin": {kind: max(margins(trials, kind)) for kind in ("payload", "file")},
        "violations": {kind: sum(m > 0 for m in margins(trials, kind)) for kind in ("payload", "file")},
        "trials": [trial._asdict() for trial in trials],
    }
    origin = provenance(f"{program.folder_of(arguments.data)}, {len(arguments.levels)} quality levels")
    write_results(arguments.output, results, origin, report=report, force=arguments.force)
    plot(curve, name, arguments.output.with_suffix(".png"))
    print(report)


if __name__ == "__main__":
    main()
