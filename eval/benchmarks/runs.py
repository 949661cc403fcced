"""Compares training runs on held-out data: ablations, sweeps.

Each run of `compand train` is taken in its trainable state, with averaged weights where the run kept them: rates are
what its densities estimate for rounded latents, distortion is PSNR (peak 255 for pictures, rounded to 8 bits; peak 1
for sounds). Means over the items of a level make the curve; the BD-rate is taken against the first run named.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from compand.audio_codec import AudioCodec
from compand.codec import QUALITY_STEPS, Codec
from compand.errors import MediaError, UsageError
from compand.eval.bdrate import Curve, bd_quality, bd_rate
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.pictures import is_image_path, read_picture
from compand.sounds import is_sound_path, read_sound, resample
from compand.train.codec_training import rate_unit
from compand.train.export import load_run
from compand.weights import choose_device, in_channels_last

SECONDS = 20
"""How much of each sound is taken, from its start."""


def read_samples(path: Path, codec: Codec) -> Tensor:
    """A held-out item as the codec's transform takes it, [1, channels, h, w]. Mono becomes equal channels."""
    if not isinstance(codec, AudioCodec):
        x = torch.from_numpy(read_picture(path, strip=True).pixels).permute(2, 0, 1)[None].float() / 255
        channels = 3
    else:
        sound = read_sound(path)
        sound = resample(sound, codec.rate or sound.rate)
        x = torch.from_numpy(sound.samples[:, : SECONDS * sound.rate].copy())[None, :, None]
        channels = codec.channels
    return x.expand(1, channels, *x.shape[2:]) if x.shape[1] == 1 else x


@torch.inference_mode()
def curve(codec: Codec, items: Sequence[Tensor]) -> Curve:
    """Mean rate (bits a pixel or time step) and PSNR in dB at the codec's whole levels."""
    stride, sound = codec.transform.stride, codec.medium == "audio"
    points = []
    for level in range(1, codec.levels + 1):
        quality = torch.tensor([level * QUALITY_STEPS], device=codec.device)
        rates, qualities = [], []
        for item in items:
            x = item.to(codec.device)
            height, width = x.shape[2:]
            padded = F.pad(x, (0, -width % stride, 0, 0 if sound else -height % stride), mode="replicate")
            output = codec.bottleneck(codec.transform.analysis(padded, quality), quality)
            x_hat = codec.transform.synthesis(output.y_hat, quality)[..., :height, :width].float()
            x_hat = x_hat.clamp(-1, 1) if sound else (x_hat * 255).round().clamp(0, 255) / 255
            rates.append(float(output.bits) / (height * width))
            qualities.append(-10 * math.log10(max(float((x_hat - x).square().mean()), 1e-12)))
        points.append((fmean(rates), fmean(qualities)))
    rate, quality_db = zip(*points, strict=True)
    return Curve(rate, quality_db)


def _run(argument: str) -> tuple[str, Path]:
    name, _, path = argument.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{argument} names no run: give NAME=CHECKPOINT.ckpt")
    return name, Path(path)


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "runs")
    parser.add_argument(
        "runs", type=_run, nargs="+", metavar="NAME=CKPT", help="runs; the first is the reference"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of pictures or sounds held out from training"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = program.parse(parser, argv)
    paths = sorted(p for p in arguments.data.rglob("*") if is_image_path(p) or is_sound_path(p))
    if not paths:
        raise MediaError(f"{arguments.data}: no picture or sound found; name another folder")
    device = choose_device(arguments.device)
    curves, facts = {}, {}
    for name, path in arguments.runs:
        codec, facts[name] = load_run(path)
        if {is_image_path(p) for p in paths} != {codec.medium == "image"}:
            raise UsageError(f"run {name} codes {codec.medium}: give a folder of that alone")
        in_channels_last(codec.eval().requires_grad_(False).to(device))
        curves[name] = curve(codec, [read_samples(p, codec) for p in paths])
        unit, factor = rate_unit(codec)
    reference = next(iter(curves.values()))
    rows = []
    for name, each in curves.items():
        try:
            differences = [
                f"{bd_rate(reference, each).percent:+.1f} %",
                f"{bd_quality(reference, each).difference:+.2f} dB",
            ]
        except (
            UsageError
        ) as error:  # a curve that does not grow, or has no quality in common with the reference
            differences = [str(error), ""]
        rows.append(
            [
                name,
                str(facts[name]["steps"]),
                f"{facts[name]['minutes']:.1f}",
                *differences,
                ", ".join(f"{factor * r:.3g}/{q:.2f}" for r, q in zip(each.rate, each.quality, strict=True)),
            ]
        )
    items = f"{len(paths)} files of {arguments.data.name}, held out from training"
    columns = ["run", "steps", "minutes", "BD-rate", "BD-PSNR", f"{unit}/PSNR by level"]
    report = "\n\n".join(
        ["# Training runs compared", (__doc__ or "").strip(), f"{items}.", markdown_table(columns, rows)]
    )
    results = {
        name: {unit: [factor * r for r in each.rate], "psnr": each.quality, **facts[name]}
        for name, each in curves.items()
    }
    write_results(arguments.output, results, provenance(items), report=report + "\n", force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
