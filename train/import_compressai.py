"""`compand import-compressai`: weights of CompressAI -> a checkpoint folder with integer tables and prior."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from compand.bottlenecks.factorized import MAX_REACH, FactorizedBottleneck, FactorizedDensity
from compand.bottlenecks.linear_scales import LinearScaleBottleneck
from compand.compressai import CompressaiCodec
from compand.errors import CheckpointError
from compand.train.export import export, next_version, write_rows
from compand.train.images import find_images
from compand.transforms.divisive import BETA_MIN
from compand.weights import check_new

PEDESTAL = 2.0**-36
"""What CompressAI's layers subtract from the squares that they hold beta and gamma by."""

TAIL = 1e-9
"""Mass beyond the ends of a table, as in CompressAI."""


@dataclass(frozen=True)
class Architecture:
    """One of CompressAI's: its prior and activation in the words of `CompressaiCodec`."""

    prior: str
    activation: str


ARCHITECTURES = {
    "bmshj2018-factorized": Architecture("factorized", "gdn"),
    "bmshj2018-factorized-relu": Architecture("factorized", "relu"),
    "bmshj2018-hyperprior": Architecture("scale", "gdn"),
    "mbt2018-mean": Architecture("mean-scale", "gdn"),
}
"""By the names that CompressAI's zoo gives them."""

IGNORED = re.compile(
    r"(entropy_bottleneck|gaussian_conditional)\.(_offset|_quantized_cdf|_cdf_length|target|scale_table|scale_bound"
    r"|.*lower_bound.*)$|.*\.(beta|gamma)_reparam\..*"
)
"""What follows from the rest: constants, and tables that are made anew."""

DENSITY = re.compile(r"entropy_bottleneck\._?(matri|bias|factor)(?:x|ces|es|s)?\.?(\d)$")
"""Layers of the density: releases of CompressAI call them _matrix0, _matrices.0 or matrices.0."""

DENSITY_PARTS = {"matri": "matrices", "bias": "biases", "factor": "factors"}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by the names that CompressAI has for them now.

    Args:
        path: what `torch.save` or safetensors wrote: a state dict, or a training checkpoint that holds one.

    Raises:
        CheckpointError: no such file, or nothing of the kind.
    """
    try:
        content = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (EOFError, KeyError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no weights that are safe to read: save the model's state_dict() again"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is no state dict of a CompressAI model: save model.state_dict()")
    weights = {}
    for given, value in content.items():
        name = str(given).removeprefix("module.")
        match = DENSITY.fullmatch(name)
        if match:
            name = f"entropy_bottleneck.{DENSITY_PARTS[match[1]]}.{match[2]}"
        if not IGNORED.fullmatch(name):
            weights[name] = value.float()
    return weights


def architecture_of(weights: Mapping[str, Tensor]) -> str:
    """The name of the architecture that weights belong to. Raises CheckpointError for others than `ARCHITECTURES`."""
    known = f"only {', '.join(ARCHITECTURES)} are imported"
    if "entropy_bottleneck.quantiles" not in weights or not any(name.startswith("g_a.") for name in weights):
        raise CheckpointError(f"these are not the weights of a CompressAI image codec: {known}")
    foreign = [
        name
        for name in weights
        if name.split(".")[0] not in ("entropy_bottleneck", "g_a", "g_s", "h_a", "h_s")
    ]
    plain = {f"g_{side}.{i}.weight" for side in "as" for i in (0, 2, 4, 6)}
    hyper = {f"h_{side}.{i}.weight" for side in "as" for i in (0, 2, 4)}
    deep = any(name.startswith("h_") for name in weights)
    missing = sorted((plain | hyper if deep else plain) - weights.keys())
    if foreign or missing:
        odd = f"has {foreign[0]}" if foreign else f"lacks {missing[0]}"
        raise CheckpointError(f"the model is of another architecture, it {odd}: {known}")
    if not deep:
        return "bmshj2018-factorized" if "g_a.1.beta" in weights else "bmshj2018-factorized-relu"
    doubled = len(weights["h_s.4.weight"]) == 2 * len(weights["g_a.6.weight"])
    return "mbt2018-mean" if doubled else "bmshj2018-hyperprior"


def as_shuffled(weight: Tensor) -> Tensor:
    """Kernel of the convolution that, before a pixel shuffle by 2, does what a transposed 5x5 convolution of stride 2
    does (padding 2, output padding 1).

    Sample 2 p + r of the result is the sum of tap k at position p + d over k = r + 2 - 2 d.

    Args:
        weight: [in, out, 5, 5].

    Returns:
        [4 out, in, 3, 3], channels ordered as by nn.PixelShuffle.
    """
    inputs, outputs = weight.shape[:2]
    kernel = weight.new_zeros(outputs, 2, 2, inputs, 3, 3)
    taps = [(r, d, r + 2 - 2 * d) for r in (0, 1) for d in (-1, 0, 1) if r + 2 - 2 * d < 5]
    for row, down, ky in taps:
        for column, right, kx in taps:
            kernel[:, row, column, :, down + 1, right + 1] = weight[:, :, ky, kx].T
    return kernel.reshape(4 * outputs, inputs, 3, 3)


@torch.no_grad()
def load_density(density: FactorizedDensity, weights: Mapping[str, Tensor]) -> Tensor:
    """Gives a density the weights of CompressAI's, moved so that the medians are at 0; returns them, [channels].

    CompressAI counts symbols from the median of each channel. The ends of the tables are looked for anew: training
    without the auxiliary loss leaves them where they were in the beginning.
    """
    medians = weights["entropy_bottleneck.quantiles"][:, 0, 1].double()
    prefix = "entropy_bottleneck."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    slope = F.softplus(own["matrices.0"].double())
    own["biases.0"] = (own["biases.0"].double() + slope * medians[:, None, None]).float()
    density.model.load_state_dict(density.model.state_dict() | own)
    low = torch.full((len(medians), 1, 1), -float(MAX_REACH), dtype=torch.float64)
    ends = []
    density.model.double()
    for target in (math.log(TAIL / 2), -math.log(TAIL / 2)):
        below, above = low, -low
        for _ in range(40):
            middle = (below + above) / 2
            beyond = density.model._logits_cumulative(middle, stop_gradient=True) > target
            below, above = torch.where(beyond, below, middle), torch.where(beyond, middle, above)
        ends.append(above)
    density.model.quantiles.copy_(torch.cat([ends[0], torch.zeros_like(low), ends[1]], 2))
    density.model.float()
    return medians.float()


def _transform_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, value in weights.items():
        side, _, rest = name.partition(".")
        if side not in ("g_a", "g_s"):
            continue
        prefix = "analysis_layers." if side == "g_a" else "synthesis_layers."
        least = BETA_MIN if rest.endswith(".beta") else 0.0
        if rest.endswith((".beta", ".gamma")):
            # CompressAI holds sqrt(beta + pedestal); what training moved below the least value counts as that.
            value = (value.double().clamp(min=0).square() - PEDESTAL - least).clamp(min=0).sqrt().float()
            rest += "_root"
        state[prefix + rest] = value
    return state


@torch.no_grad()
def _load_hyperprior(bottleneck: LinearScaleBottleneck, weights: Mapping[str, Tensor]) -> None:
    centre = load_density(bottleneck.z_density, weights)
    bottleneck.z_centre.copy_(centre)
    analysis = {name[4:]: value for name, value in weights.items() if name.startswith("h_a.")}
    analysis["4.bias"] = analysis["4.bias"] - centre
    bottleneck.hyper_analysis.load_state_dict(analysis)
    state = {}
    for given, own in (("0", "0"), ("2", "3")):
        state[f"{own}.weight"] = as_shuffled(weights[f"h_s.{given}.weight"])
        state[f"{own}.bias"] = weights[f"h_s.{given}.bias"].repeat_interleave(4)
    for part in ("weight", "bias"):
        value = weights[f"h_s.4.{part}"]
        # CompressAI has the scales first, compand the means.
        state[f"6.{part}"] = torch.cat(value.chunk(2)[::-1]) if bottleneck.means else value
    bottleneck.hyper_synthesis.load_state_dict(state)


def codec_from(weights: Mapping[str, Tensor], name: str, multiplier: float) -> CompressaiCodec:
    """A trainable codec of one quality level with CompressAI's weights.

    Args:
        weights: as `read_weights` gives them.
        name: one of `ARCHITECTURES`.
        multiplier: Lagrange multiplier that the model was trained with, for 255^2 x mean squared error.

    Raises:
        CheckpointError: shapes do not fit each other, or something is no number.
    """
    architecture = ARCHITECTURES[name]
    broken = [key for key, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{broken[0]} holds values that are no numbers: the model has diverged")
    try:
        width, latent_channels = len(weights["g_a.0.weight"]), len(weights["g_a.6.weight"])
        codec = CompressaiCodec(
            architecture.prior, width, latent_channels, architecture.activation, [multiplier]
        )
        transform = _transform_state(weights)
        bottleneck = codec.bottleneck
        centre = torch.zeros(latent_channels)
        if isinstance(bottleneck, LinearScaleBottleneck):
            _load_hyperprior(bottleneck, weights)
        elif isinstance(bottleneck, FactorizedBottleneck) and bottleneck.density is not None:
            centre = load_density(bottleneck.density, weights)
        codec.transform.load_state_dict(transform | {"centre": centre})
        for parameter_name, parameter in bottleneck.named_parameters():
            if "log2_gain" in parameter_name:
                parameter.data.zero_()  # one step of quantisation is one unit of y
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(
            f"weights do not have the shapes of {name} ({problem[:200]}): other kernels or filters are not imported"
        ) from error
    return codec


def import_compressai(
    path: Path,
    folder: Path,
    *,
    architecture: str | None = None,
    multiplier: float = 0.013,
    files: Sequence[Path] = (),
    device: str = "auto",
) -> tuple[CompressaiCodec, str]:
    """Writes the checkpoint that a file of CompressAI becomes.

    Args:
        path: see `read_weights`.
        folder: new folder.
        architecture: what the weights are expected to be; None: what they are.
        multiplier: see `codec_from`.
        files: pictures on which symbols are counted for the tables; without any, they follow CompressAI's densities.
        device: where to count.

    Returns:
        The codec and the name of its architecture.

    Raises:
        CheckpointError: the file or the folder cannot be used.
    """
    check_new(folder)
    weights = read_weights(path)
    found = architecture_of(weights)
    if architecture not in (None, found):
        raise CheckpointError(f"{path} is a {found}, not a {architecture}: leave out --architecture")
    codec = codec_from(weights, found, multiplier)
    export(codec, folder, files, device)
    return codec, found


def main(argv: Sequence[str] | None = None) -> None:
    """`compand import-compressai FILE`: see --help."""
    parser = argparse.ArgumentParser(
        prog="compand import-compressai",
        description="Turn weights of CompressAI into a checkpoint that encodes and decodes without it.",
        epilog=f"Architectures: {', '.join(ARCHITECTURES)}; any quality.",
    )
    parser.add_argument(
        "file", type=Path, help="state dict or training checkpoint (.pth, .pth.tar, .safetensors)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="checkpoint folder; with --name, the folder that it is made in"
    )
    parser.add_argument(
        "--name", help="NAME of NAME-vN, the next version (default: the architecture's, in checkpoints)"
    )
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), help="refuse weights of another one")
    parser.add_argument(
        "--lambda",
        dest="multiplier",
        type=float,
        default=0.013,
        help="the Lagrange multiplier it was trained with, for 255^2 MSE; `compand encode --effort` weighs rate and "
        "distortion by it (default 0.013)",
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="folders of images, to count symbols for the tables"
    )
    parser.add_argument("--files", type=int, default=200, help="how many to use of each folder (default 200)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    if not (math.isfinite(arguments.multiplier) and arguments.multiplier > 0):
        parser.error(f"--lambda {arguments.multiplier} is not above 0")
    files: list[Path] = []
    for root in arguments.data:
        found = find_images(root)
        files += found[:: max(math.ceil(len(found) / arguments.files), 1)]
    if arguments.output is not None and not arguments.name:
        folder = arguments.output
    else:
        name = arguments.name or architecture_of(read_weights(arguments.file))
        folder = next_version(arguments.output or Path("checkpoints"), name)
    codec, architecture = import_compressai(
        arguments.file,
        folder,
        architecture=arguments.architecture,
        multiplier=arguments.multiplier,
        files=files,
        device=arguments.device,
    )
    width, latent_channels = codec.architecture["width"], codec.architecture["latent_channels"]
    counted = f"symbols counted on {', '.join(path.name for path in arguments.data)}"
    write_rows(
        folder,
        {
            "imported": f"{architecture} of CompressAI, N {width}, M {latent_channels}, from {arguments.file.name}",
            "qualities": f"1; lambda {arguments.multiplier:g}",
            "tables": counted if files else "of the imported densities",
            "terms": "to be stated by the author: of the weights and of the data",
        },
    )
    print(f"{folder}: {architecture}, N {width}, M {latent_channels}")
