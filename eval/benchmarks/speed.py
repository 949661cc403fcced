"""Encoding and decoding of one 768 x 512 picture on two CPU threads, against CompressAI's mbt2018_mean.

Ours goes from uint8 pixels to the bytes of a .cpd file and back to uint8 pixels. The peer goes from a float tensor to
its byte strings and back to a float tensor; conversion from and to 8 bits, which it needs besides, is not counted
against it. Loading a model and reading a PNG file count for neither. "Tuned" means our allocator settings
(`compand.allocator`, as the command line sets them) and, for the peer, channels-last memory, which ours always has.

The peer is `mbt2018_mean(quality=4, pretrained=False)` after `update(force=True)`: random weights, because trained
ones must be downloaded. Its transforms take the same time with any weights. Its coder works on as many symbols, but on
nearly constant ones, as its bytes show, so a trained model would be no faster than this one.

Every variant runs in fresh processes, in turns with the others, since allocator settings belong to a process. Times
are medians and quartiles over all repetitions; parts of ours are medians from the same repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from compand.allocator import tune_allocator
from compand.coding.ans import AnsReader, AnsWriter
from compand.demo import photograph
from compand.eval.benchmarks import program
from compand.eval.benchmarks.provenance import markdown_table, provenance, write_results
from compand.weights import native_bfloat16

SIZE = (768, 512)
QUALITY = 4


class Variant(NamedTuple):
    """One way to code the picture."""

    title: str
    ours: bool
    tuned: bool
    reduced: bool = False  # bfloat16 transforms


VARIANTS = {
    "bfloat16": Variant("compand, bfloat16", ours=True, tuned=True, reduced=True),
    "float32": Variant("compand, float32", ours=True, tuned=True),
    "bfloat16-untuned": Variant(
        "compand, bfloat16, allocator as it comes", ours=True, tuned=False, reduced=True
    ),
    "float32-untuned": Variant("compand, float32, allocator as it comes", ours=True, tuned=False),
    "peer": Variant("mbt2018_mean as it comes", ours=False, tuned=False),
    "peer-tuned": Variant("mbt2018_mean, tuned", ours=False, tuned=True),
}


class Times(NamedTuple):
    """Seconds of one direction, one entry a repetition."""

    total: list[float]
    parts: dict[str, list[float]]  # of which

    def merged(self, other: Times) -> Times:
        names = self.parts.keys() | other.parts.keys()
        return Times(
            self.total + other.total,
            {name: self.parts.get(name, []) + other.parts.get(name, []) for name in names},
        )


class Stopwatch:
    """Seconds spent in functions, by part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def watch(self, part: str, owner: Any, *names: str) -> None:
        """Counts the time in these functions of an object or class under `part`."""
        for name in names:
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return timed

    def measure(self, action: Callable[[], object], warm_up: int, repetitions: int) -> Times:
        """Time an action and its parts; what no part claims is the "rest"."""
        times = Times([], {})
        for repetition in range(warm_up + repetitions):
            self.seconds.clear()
            start = time.perf_counter()
            action()
            total = time.perf_counter() - start
            if repetition < warm_up:
                continue
            times.total.append(total)
            parts = dict(self.seconds)
            if parts:
                parts["rest"] = total - sum(parts.values())
            for part, seconds in parts.items():
                times.parts.setdefault(part, []).append(seconds)
        return times


def load_picture(path: Path) -> NDArray[np.uint8]:
    """Pixels [512, 768, 3] of a picture, fitted to that size where it has another one."""
    with Image.open(path) as image:
        return np.array(ImageOps.fit(image.convert("RGB"), SIZE, Image.Resampling.LANCZOS))


def measure(variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one variant in this process. Returns its bytes, and the times of both directions."""
    torch.set_num_threads(arguments.threads)
    if variant.tuned and not tune_allocator():
        raise SystemExit("the allocator cannot be tuned on this system")
    pixels = load_picture(arguments.data[0])
    stopwatch = Stopwatch()
    encode, decode = (_ours if variant.ours else _peer)(variant, arguments, pixels, stopwatch)
    with torch.inference_mode():
        coded, size = encode()
        times = [
            stopwatch.measure(action, arguments.warm_up, arguments.repetitions)
            for action in (encode, partial(decode, coded))
        ]
    return {"bytes": size, "encode": times[0]._asdict(), "decode": times[1]._asdict()}


Coder = tuple[Callable[[], tuple[Any, int]], Callable[[Any], object]]
"""Encodes to something of so many bytes; decodes that."""


def _ours(
    variant: Variant, arguments: argparse.Namespace, pixels: NDArray[np.uint8], stopwatch: Stopwatch
) -> Coder:
    codec = program.image_codec(arguments.codec, "cpu", reduced=variant.reduced)
    stopwatch.watch("transform", codec.transform, "analysis", "synthesis")
    if hasattr(codec.bottleneck, "hyper_analysis"):
        stopwatch.watch("prior", codec.bottleneck.hyper_analysis, "forward")
        stopwatch.watch("prior", codec.bottleneck, "_predict")
    stopwatch.watch("entropy coding", AnsWriter, "push", "finish")
    stopwatch.watch("entropy coding", AnsReader, "__init__", "pull", "finish")

    def encode() -> tuple[bytes, int]:
        data = codec.encode(pixels, quality=QUALITY)
        return data, len(data)

    return encode, codec.decode


def _peer(
    variant: Variant, arguments: argparse.Namespace, pixels: NDArray[np.uint8], stopwatch: Stopwatch
) -> Coder:
    from compressai.zoo import mbt2018_mean

    torch.manual_seed(0)
    model = mbt2018_mean(quality=QUALITY, pretrained=False).eval()
    model.update(force=True)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(255).contiguous()
    if variant.tuned:
        model, x = (
            model.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )

    def encode() -> tuple[dict[str, Any], int]:
        coded = model.compress(x)
        return coded, sum(len(strings[0]) for strings in coded["strings"])

    return encode, lambda coded: model.decompress(coded["strings"], coded["shape"])["x_hat"]


def run_in_turns(arguments: argparse.Namespace, argv: list[str]) -> dict[str, dict[str, Any]]:
    """Measure every variant in a fresh process, `rounds` times in turns."""
    results: dict[str, dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for name in VARIANTS:
            command = [sys.executable, "-m", "compand.eval.benchmarks.speed", *argv, "--variant", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(output.splitlines()[-1])
            for direction in ("encode", "decode"):
                times = Times(**result[direction])
                result[direction] = results[name][direction].merged(times) if name in results else times
            results[name] = result
    return results


def summary(times: Times) -> dict[str, Any]:
    """Medians and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(times.total, n=4, method="inclusive")
    return {
        "median": 1e3 * middle,
        "quartiles": [1e3 * low, 1e3 * high],
        "repetitions": len(times.total),
        "parts": {name: 1e3 * statistics.median(seconds) for name, seconds in times.parts.items()},
    }


def render(results: dict[str, dict[str, Any]], ratios: list[dict[str, Any]]) -> str:
    """The report in Markdown."""
    rows = []
    for name, variant in VARIANTS.items():
        cells = [variant.title, f"{results[name]['bytes']:,}"]
        for direction in ("encode", "decode"):
            times = results[name][direction]
            low, high = times["quartiles"]
            cells += [f"{times['median']:.1f}", f"{low:.1f} to {high:.1f}"]
        rows.append(cells)
    totals = markdown_table(["", "bytes", "encode, ms", "quartiles", "decode, ms", "quartiles"], rows)
    names = ("transform", "prior", "entropy coding", "rest")
    parts = markdown_table(
        ["part, ms", *names],
        [
            [f"{VARIANTS[name].title}: {direction}"]
            + [f"{results[name][direction]['parts'].get(part, 0):.1f}" for part in names]
            for name in ("bfloat16", "float32")
            for direction in ("encode", "decode")
        ],
    )
    faster = markdown_table(
        ["times faster", "encode", "decode"],
        [[f"{r['ours']} than {r['peer']}", f"{r['encode']:.2f}", f"{r['decode']:.2f}"] for r in ratios],
    )
    return f"# Speed\n\n{(__doc__ or '').strip()}\n\n{totals}\n\n{faster}\n\n{parts}\n"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = program.parser(__doc__ or "", "speed")
    program.add_codec(parser)
    program.add_pictures(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=3, help="repetitions before those that count")
    parser.add_argument("--repetitions", type=int, default=9, help="of each direction in each process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant")
    parser.add_argument(
        "--variant", choices=VARIANTS, help="print the times of one variant as JSON, write nothing"
    )
    arguments = parser.parse_args(argv)
    arguments.data = arguments.data or [photograph()]
    if arguments.variant:
        print(json.dumps(measure(VARIANTS[arguments.variant], arguments)))
        return
    program.parse(parser, argv)
    measured = run_in_turns(arguments, argv)
    results = {
        name: {"bytes": result["bytes"]} | {d: summary(result[d]) for d in ("encode", "decode")}
        for name, result in measured.items()
    }
    ratios = [
        {"ours": VARIANTS[ours].title, "peer": VARIANTS[peer].title}
        | {d: results[peer][d]["median"] / results[ours][d]["median"] for d in ("encode", "decode")}
        for ours in ("bfloat16", "float32")
        for peer in ("peer", "peer-tuned")
    ]
    report = render(results, ratios)
    torch.set_num_threads(arguments.threads)
    fast = "has" if native_bfloat16(torch.device("cpu")) else "does not have"
    origin = provenance(
        f"{arguments.data[0].name}, {SIZE[0]} x {SIZE[1]}, quality {QUALITY}, {arguments.rounds} processes of "
        f"{arguments.repetitions} repetitions for each variant; the CPU {fast} bfloat16 arithmetic"
    )
    write_results(
        arguments.output,
        {"variants": results, "times_faster": ratios},
        origin,
        report=report,
        force=arguments.force,
    )
    print(report)


if __name__ == "__main__":
    main()
