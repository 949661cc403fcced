"""What converting a trained hyperprior to integers costs.

A run of `compand train` holds the floating-point prior. Its rate is compared with that of the integers that stand in
files, on the same pictures: once with tables made from the trained densities alone, which is what exactness costs, and
once with those of a release, in which symbols of training pictures were counted as well. Rates are the information
content of the symbols, distortion is PSNR of the 8-bit picture; both are means over the pictures of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from compand.codec import QUALITY_STEPS
from compand.errors import UsageError
from compand.eval.bdrate import Curve, bd_rate
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.image_codec import ImageCodec, tile_rows
from compand.pictures import psnr, read_picture
from compand.train.export import load_run
from compand.weights import in_channels_last

RATES = (0.1, 1.5)
"""Bits per pixel over which BD-rates are averaged."""


@torch.inference_mode()
def curve(codec: ImageCodec, pictures: Sequence[Path]) -> Curve:
    """Mean information content and PSNR of a codec, in whichever state its bottleneck is, at its whole levels."""
    points = []
    for level in range(1, codec.levels + 1):
        quality = torch.tensor([level * QUALITY_STEPS])
        rates, qualities = [], []
        for path in pictures:
            pixels = read_picture(path, strip=True).pixels
            (tile,) = tile_rows(pixels.shape[0], pixels.shape[1], 0)[0]
            output = codec.bottleneck(codec.analyse(pixels, tile, level * QUALITY_STEPS), quality)
            x_hat = codec.transform.synthesis(output.y_hat, quality)[0].permute(1, 2, 0)
            decoded = (x_hat[: tile.bottom, : tile.right] * 255).round().clamp(0, 255).byte().numpy()
            rates.append(float(output.bits) / (tile.bottom * tile.right))
            qualities.append(psnr(pixels, decoded))
        points.append((fmean(rates), fmean(qualities)))
    bpp, quality_db = zip(*points, strict=True)
    return Curve(bpp, quality_db)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "prior")
    program.add_codec(parser)
    program.add_pictures(parser, required=True)
    parser.add_argument("--run", type=Path, required=True, help="checkpoint of the training run (.ckpt)")
    arguments = program.parse(parser, argv)
    trained, facts = load_run(arguments.run)
    if not isinstance(trained, ImageCodec):
        raise UsageError(f"{arguments.run} is a run of a codec for sounds: give one for images")
    in_channels_last(trained.eval())
    curves = {"floating point": curve(trained, arguments.data)}
    trained.bottleneck.freeze()
    curves["integers, trained densities"] = curve(trained, arguments.data)
    curves["integers, released tables"] = curve(
        program.image_codec(arguments.codec, "cpu", reduced=False), arguments.data
    )
    reference = curves["floating point"]
    costs = {name: bd_rate(reference, each, RATES) for name, each in curves.items() if each is not reference}

    report = "\n\n".join(
        [
            "# Cost of the integer prior",
            (__doc__ or "").strip(),
            f"Run of {facts['steps']} steps, {arguments.codec.name}, {program.folder_of(arguments.data)}.",
            markdown_table(
                ["prior", "BD-rate against floating point", "over PSNR, dB"],
                [
                    [name, f"{each.percent:+.2f} %", f"{each.low:.1f} to {each.high:.1f}"]
                    for name, each in costs.items()
                ],
            ),
            markdown_table(
                ["prior", "bpp at levels 1 to 8", "PSNR, dB"],
                [[name, _listed(each.rate), _listed(each.quality)] for name, each in curves.items()],
            ),
        ]
    )
    results = {
        "checkpoint": arguments.codec.name,
        "curves": {name: {"bpp": each.rate, "psnr": each.quality} for name, each in curves.items()},
        "bd_rate": {name: each._asdict() for name, each in costs.items()},
    }
    origin = provenance(program.folder_of(arguments.data))
    write_results(arguments.output, results, origin, report=report + "\n", force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
