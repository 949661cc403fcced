"""Peak memory and time of the command line on a picture of 100 megapixels.

The picture, 11,000 x 9,100 pixels, is a mosaic of enlarged photographs under noise. `compand encode` and `compand
decode` run as commands of their own, from file to file; memory is the largest resident set of the command
(`ru_maxrss`), and its time includes starting Python and reading or writing the PNG file.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from compand.demo import photograph
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.pictures import psnr, read_picture

WIDTH, HEIGHT = 11_000, 9_100
CELL = 1_000
"""Edge of one photograph in the mosaic, in pixels."""

NOISE = 3.0
"""Standard deviation of the noise, in 8-bit steps."""

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Run(NamedTuple):
    """One command."""

    command: str
    peak_bytes: int
    seconds: float
    output_bytes: int


def mosaic(photographs: list[Path], height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Photographs side by side, each enlarged to a cell and perhaps mirrored, under Gaussian noise: [H, W, 3]."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    starts = [(top, left) for top in range(0, height, CELL) for left in range(0, width, CELL)]
    for index, (top, left) in enumerate(starts):
        cell = pixels[top : top + CELL, left : left + CELL]
        with Image.open(photographs[index % len(photographs)]) as image:
            fitted = ImageOps.fit(
                image.convert("RGB"), (cell.shape[1], cell.shape[0]), Image.Resampling.BICUBIC
            )
        if rng.random() < 0.5:
            fitted = ImageOps.mirror(fitted)
        noisy = np.asarray(fitted, dtype=np.float32) + rng.normal(0, NOISE, cell.shape).astype(np.float32)
        cell[:] = np.clip(np.rint(noisy), 0, 255)
    return pixels


def write_mosaic(photographs: list[Path], height: int, width: int, path: Path) -> None:
    """Save a mosaic as a quickly compressed PNG file."""
    Image.fromarray(mosaic(photographs, height, width)).save(path, compress_level=1)


def psnr_of_files(first: Path, second: Path) -> float:
    """PSNR in dB of two pictures of equal size."""
    return psnr(read_picture(first).pixels, read_picture(second).pixels)


def run(command: str, source: Path, target: Path, *options: str) -> Run:
    """Run `compand COMMAND source -o target`.

    Raises:
        CalledProcessError: it failed.
    """
    arguments = [sys.executable, "-m", "compand.cli", command, str(source), "-o", str(target), *options]
    start = time.perf_counter()
    process = os.posix_spawn(sys.executable, arguments, os.environ)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), arguments)
    return Run(command, usage.ru_maxrss * MAXRSS_UNIT, seconds, target.stat().st_size)


def render(runs: list[Run], pixels: int, quality: float) -> str:
    """The report in Markdown."""
    table = markdown_table(
        ["command", "peak resident memory, GB", "seconds", "output, bytes"],
        [[r.command, f"{r.peak_bytes / 1e9:.2f}", f"{r.seconds:.1f}", f"{r.output_bytes:,}"] for r in runs],
    )
    rate = 8 * runs[0].output_bytes / pixels
    summary = f"{pixels / 1e6:.1f} megapixels, {rate:.3f} bits per pixel, PSNR {quality:.2f} dB."
    return f"# Memory\n\n{(__doc__ or '').strip()}\n\n{table}\n\n{summary}\n"


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "memory")
    program.add_codec(parser)
    program.add_pictures(parser)
    parser.add_argument("--size", type=int, nargs=2, default=(WIDTH, HEIGHT), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--quality", type=float, default=4.0)
    arguments = program.parse(parser, argv)
    photographs = arguments.data or [photograph()]
    width, height = arguments.size
    # A command's largest resident set includes that of the process which starts it, so this one has to stay small:
    # the pictures are made and compared in processes of their own.
    processes = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, processes as pool:
        original, coded, decoded = (
            Path(folder, name) for name in ("original.png", "coded.cpd", "decoded.png")
        )
        pool.apply(write_mosaic, (photographs, height, width, original))
        options = ["--codec", str(arguments.codec.path), "--device", "cpu", "--quiet"]
        runs = [
            run("encode", original, coded, *options, "--quality", f"{arguments.quality:g}"),
            run("decode", coded, decoded, *options),
        ]
        quality = pool.apply(psnr_of_files, (original, decoded))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    report = render(runs, width * height, quality)
    data = f"mosaic of {program.folder_of(photographs)}, {width} x {height}, seed 0, quality {arguments.quality:g}"
    origin = provenance(data)
    results = {"runs": [r._asdict() for r in runs], "psnr": quality, "parent_peak_bytes": own}
    write_results(arguments.output, results, origin, report=report, force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
