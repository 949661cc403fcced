"""What a number of latent channels allows: the unquantised ceiling of the wavelet codecs, and what files reach of it.

Learned, not rounded: analysis, bottleneck and synthesis at the highest quality level in float32, without rounding the
latents. The decoder's gains stay in: they are learned apart from the encoder's, and their product is no 1. Learned, as
they are: synthesis(analysis(x)), the latents passed on with neither companding nor gains, on whose scale the synthesis
was not trained; so this is no bound, and files may surpass it.

Linear: as many channels by a fixed orthogonal projection, with the projection's transpose as decoder. Of the wavelet
packets it is the low bands that the codec's training starts from, or the principal components of all coefficients of a
position; of 8 x 8 blocks the principal components, which no other linear transform of single blocks surpasses.
Components and means are fitted on training pictures.

Files: bits a pixel and PSNR at every whole level. All PSNR is of 8-bit pixels, rounded and clamped; figures are means
over the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from compand import checkpoint
from compand.bottlenecks.companding import CompandingBottleneck
from compand.bottlenecks.factorized import FactorizedBottleneck
from compand.bottlenecks.hyperprior import HyperpriorBottleneck
from compand.codec import QUALITY_STEPS, Bottleneck
from compand.errors import UsageError
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.image_codec import ImageCodec, tile_rows
from compand.pictures import psnr, read_picture
from compand.transforms.wavelet import SpaceToDepth, WaveletTransform, low_band_basis
from compand.transforms.wavelet_packets import WaveletPackets

CODECS = ("wavelet-rgb-16x", "wavelet-rgb-4x")

TRAINING_PICTURES = 200

PUBLISHED = {12: (0.617, 30.56), 48: (2.54, 37.34)}
"""Bits a pixel and PSNR on Kodak of WaLLoC (Jacobellis & Yadwadkar 2025), by its number of latent channels."""

WANTED = {12: (0.45, 30.5), 48: (2.0, 37.5)}
"""Bits a pixel that may be spent at most, and PSNR on Kodak to be reached with them."""

Pixels = NDArray[np.uint8]
Folding = WaveletPackets | SpaceToDepth


class Projection(NamedTuple):
    """A linear transform that keeps some dimensions of the coefficients of a position."""

    folding: Folding
    mean: Tensor  # float64 [coefficients, 1]
    basis: Tensor  # float64 [kept, coefficients], orthonormal rows

    def restored(self, pixels: Pixels) -> Pixels:
        """The picture after the projection and its transpose."""
        x = padded(pixels, self.folding.stride)
        w = self.folding.analysis(x).double()
        kept = self.basis @ (w[0].flatten(1) - self.mean)
        w = (self.basis.T @ kept + self.mean).view(w.shape)
        return as_pixels(self.folding.synthesis(w, (x.shape[2], x.shape[3])), pixels.shape)


def padded(pixels: Pixels, stride: int) -> Tensor:
    """A picture as float64 [1, 3, h, w] in [0, 1], with its edges repeated up to multiples of the stride."""
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double() / 255
    return F.pad(x, (0, -x.shape[3] % stride, 0, -x.shape[2] % stride), mode="replicate")


def as_pixels(x_hat: Tensor, shape: Sequence[int]) -> Pixels:
    """[1, 3, h, w] as 8-bit pixels of a shape [H, W, 3], without what was padded."""
    x = x_hat[0].permute(1, 2, 0)[: shape[0], : shape[1]]
    decoded: Pixels = (x * 255).round().clamp(0, 255).byte().numpy()
    return decoded


def components(foldings: Sequence[Folding], pictures: Sequence[Path]) -> list[tuple[Tensor, Tensor]]:
    """Mean [coefficients, 1] and principal components [coefficients, coefficients] of each folding, the first ones
    with the most variance."""
    sums: list[Tensor | float] = [0.0] * len(foldings)
    products: list[Tensor | float] = [0.0] * len(foldings)
    positions = 0
    for path in pictures:
        pixels = read_rgb(path)
        x = padded(pixels, foldings[0].stride)
        for i, folding in enumerate(foldings):
            w = folding.analysis(x)[0].flatten(1)
            sums[i] += w.sum(1, keepdim=True)
            products[i] += w @ w.T
        positions += w.shape[1]
    result = []
    for total, product in zip(sums, products, strict=True):
        mean = torch.as_tensor(total) / positions
        vectors = torch.linalg.eigh(torch.as_tensor(product) / positions - mean @ mean.T).eigenvectors
        result.append((mean, vectors.flip(1).T.contiguous()))
    return result


def projections(codec: ImageCodec, pictures: Sequence[Path]) -> dict[str, Projection]:
    """The linear transforms of as many channels, of the codec's packets and of blocks of the same size.

    Raises:
        UsageError: the codec has no wavelet packets.
    """
    transform = codec.transform
    if not isinstance(transform, WaveletTransform) or not isinstance(transform.packets, WaveletPackets):
        raise UsageError(f"{codec.name} has no wavelet packets: choose a checkpoint of wavelet-image")
    m, levels = transform.latent_channels, transform.packets.levels
    packets, blocks = transform.packets, SpaceToDepth(2, levels)
    basis = low_band_basis(codec.channels, m, 2, levels).double()
    (packet_mean, packet_rows), (block_mean, block_rows) = components([packets, blocks], pictures)
    edge = 2**levels
    return {
        "low bands of the wavelet packets": Projection(packets, packet_mean, basis),
        f"principal components of {edge}x{edge} blocks": Projection(blocks, block_mean, block_rows[:m]),
        "principal components of the wavelet packets": Projection(packets, packet_mean, packet_rows[:m]),
    }


def not_rounded(bottleneck: Bottleneck, y: Tensor, level: int) -> Tensor:
    """What the bottleneck makes of latents [1, M, h, w], all but the rounding.

    Raises:
        UsageError: a bottleneck of another kind than those of the wavelet codecs.
    """
    quality = torch.tensor([level])
    if isinstance(bottleneck, CompandingBottleneck):
        compander = bottleneck.compander
        return compander.expand(not_rounded(bottleneck.inner, compander.compress(y), level))
    if not isinstance(bottleneck, (HyperpriorBottleneck, FactorizedBottleneck)):
        raise UsageError("this bottleneck has no gains: choose a checkpoint of wavelet-image")
    means = bottleneck._encode(y, level)[2] if isinstance(bottleneck, HyperpriorBottleneck) else 0.0
    gain = bottleneck.y_gain.gain(quality) * bottleneck.y_gain.inverse(quality)
    return (y - means) * gain + means


def learned(codec: ImageCodec, pixels: Pixels, *, bottleneck: bool) -> Pixels:
    """The picture after analysis and synthesis at the highest quality, with the bottleneck but for its rounding, or
    with nothing in between."""
    (tile,) = tile_rows(pixels.shape[0], pixels.shape[1], 0)[0]
    level = codec.levels * QUALITY_STEPS
    y = codec.analyse(pixels, tile, level)
    if bottleneck:
        y = not_rounded(codec.bottleneck, y, level)
    return as_pixels(codec.transform.synthesis(y, torch.tensor([level])), pixels.shape)


def file_points(codec: ImageCodec, pictures: Sequence[Path]) -> Iterator[tuple[float, float]]:
    """Mean bits a pixel and PSNR of files at every whole level, ascending."""
    for level in range(1, codec.levels + 1):
        rates, qualities = [], []
        for path in pictures:
            pixels = read_rgb(path)
            data = codec.encode(pixels, quality=level)
            rates.append(8 * len(data) / (pixels.shape[0] * pixels.shape[1]))
            qualities.append(psnr(pixels, codec.decode(data).pixels))
        yield fmean(rates), fmean(qualities)


def quality_at(points: Sequence[tuple[float, float]], rate: float) -> float:
    """PSNR of a curve at a rate, linear in its logarithm between levels; beyond the curve, that of its end."""
    rates, qualities = zip(*points, strict=True)
    return float(np.interp(math.log(rate), np.log(rates), qualities))


def read_rgb(path: Path) -> Pixels:
    """Pixels of a picture, uint8 [H, W, 3]; gray ones get three equal channels."""
    pixels = read_picture(path, strip=True).pixels
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


class Outcome(NamedTuple):
    """Of one checkpoint."""

    channels: int
    ceilings: dict[str, float]  # mean PSNR by transform, unquantised
    files: list[tuple[float, float]]  # bits a pixel and PSNR, by level


@torch.inference_mode()
def measure(codec: ImageCodec, pictures: Sequence[Path], training: Sequence[Path]) -> Outcome:
    """All of one codec."""

    def mean_psnr(transform: Callable[[Pixels], Pixels]) -> float:
        return fmean(psnr(pixels, transform(pixels)) for pixels in map(read_rgb, pictures))

    ceilings = {
        name: mean_psnr(projection.restored) for name, projection in projections(codec, training).items()
    }
    ceilings["learned, as they are"] = mean_psnr(lambda pixels: learned(codec, pixels, bottleneck=False))
    ceilings["learned, not rounded"] = mean_psnr(lambda pixels: learned(codec, pixels, bottleneck=True))
    return Outcome(codec.transform.latent_channels, ceilings, list(file_points(codec, pictures)))


def render(outcomes: dict[str, Outcome], pictures: str, training: str) -> str:
    """The report in Markdown."""
    names = list(next(iter(outcomes.values())).ceilings)
    ceilings = [
        [name, str(o.channels), *(f"{o.ceilings[kind]:.2f}" for kind in names), f"{o.files[-1][1]:.2f}"]
        for name, o in outcomes.items()
    ]
    points = [
        [f"{name}: {level}", f"{rate:.3f}", f"{quality:.2f}", f"{o.ceilings[names[-1]] - quality:.2f}"]
        for name, o in outcomes.items()
        for level, (rate, quality) in enumerate(o.files, start=1)
    ]
    parts = [
        "# Ceiling of the wavelet codecs",
        (__doc__ or "").strip(),
        f"Measured on {pictures}; components fitted on {training}.",
        "PSNR in dB:",
        markdown_table(["checkpoint", "channels", *names, "file, highest level"], ceilings),
        markdown_table(["checkpoint: level", "bpp", "PSNR, dB", "below the ceiling, dB"], points),
    ]
    at_rates = []
    for name, outcome in outcomes.items():
        for rates, source in ((WANTED, "wanted"), (PUBLISHED, "WaLLoC as published")):
            if outcome.channels in rates:
                rate, quality = rates[outcome.channels]
                reached, used = quality_at(outcome.files, rate), min(rate, outcome.files[-1][0])
                cells = [source, f"{rate:.3f}", f"{quality:.2f}", f"{reached:.2f}", f"{used:.3f}"]
                at_rates.append([name, *cells])
    if at_rates:
        parts += [
            "Files at most as large, interpolated between levels, and at the highest level where it needs less:",
            markdown_table(["checkpoint", "against", "bpp", "PSNR, dB", "files, dB", "at bpp"], at_rates),
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "wavelet_ceiling")
    parser.add_argument("--codecs", nargs="+", default=CODECS, help="checkpoints: names or folders")
    program.add_pictures(parser, required=True)
    parser.add_argument(
        "--training",
        type=program.pictures,
        required=True,
        help="folder of pictures to fit linear transforms on",
    )
    parser.add_argument(
        "--training-pictures",
        type=int,
        default=TRAINING_PICTURES,
        help="how many of them, evenly spaced by name",
    )
    arguments = program.parse(parser, argv)
    step = max(len(arguments.training) // arguments.training_pictures, 1)
    training = arguments.training[::step][: arguments.training_pictures]
    outcomes = {}
    for name in arguments.codecs:
        info = checkpoint.find(name)
        outcomes[info.name] = measure(
            program.image_codec(info, "cpu", reduced=False), arguments.data, training
        )
    report = render(outcomes, program.folder_of(arguments.data), program.folder_of(training))
    results = {
        name: {
            "channels": outcome.channels,
            "ceilings": outcome.ceilings,
            "files": [{"bpp": rate, "psnr": quality} for rate, quality in outcome.files],
        }
        for name, outcome in outcomes.items()
    }
    data = f"{program.folder_of(arguments.data)}, {program.folder_of(training)}"
    write_results(arguments.output, results, provenance(data), report=report, force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
