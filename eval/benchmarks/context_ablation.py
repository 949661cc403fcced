"""What each context of the context codec saves, in bits and in time.

The transform and the gains of a checkpoint are frozen, and the entropy model is trained once with all contexts and once
without each of them. Hyper networks begin as the checkpoint has them, networks of slices anew, in all runs alike. Runs
see the same crops at the same qualities in the same order; optimiser and schedule are the same. As the synthesis is
frozen too, training looks at latents alone: the loss is their bits plus 6 / ln 2 bits for every squared quantisation
step between y and y_hat, which is what a squared step costs where uniform steps are chosen best (the derivative of the
rate, -1 / ln 2 over the step, is that of the error, step^2 / 12), weighted between qualities as in `RateDistortion`.

Measured on pictures that were not trained on, in floating point, as the codec estimates its rate: BD-rate against the
run with all contexts, with the synthesis as it is; bits added, mean over the levels, of all latents and of the first
slice alone, which has no slices before it; PSNR changed, which the latent residual prediction is for. Then each run is
frozen, and its integer form compresses and decompresses the latents of one picture: medians over several passes, on as
many threads as --threads says, and on a GPU if there is one. Sequential steps are those of a decode behind z.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from compand.bottlenecks.context import CONTEXTS, ContextBottleneck
from compand.checkpoint import CheckpointInfo
from compand.codec import QUALITY_STEPS, Codec
from compand.context import ContextCodec
from compand.errors import UsageError
from compand.eval.bdrate import Curve, bd_rate
from compand.eval.benchmarks import program
from compand.eval.benchmarks.runs import curve, read_samples
from compand.eval.benchmarks.sharing import QueuedSteps, devices, on_devices, prepared
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.pictures import read_picture
from compand.train.codec_training import as_samples
from compand.train.images import CropDataset, find_images, read_rgb
from compand.train.rate_distortion import RateDistortion
from compand.weights import in_channels_last, warm_start

ALL = "all"
SECOND_HALF = ("local", "global_intra", "global_hyper")
"""Without all of them, slices are coded in one piece."""

VARIANTS: dict[str, tuple[str, ...]] = {
    ALL: CONTEXTS,
    **{f"without {name}": tuple(other for other in CONTEXTS if other != name) for name in CONTEXTS},
    "slices in one piece": tuple(other for other in CONTEXTS if other not in SECOND_HALF),
    "no contexts": (),
}
"""Contexts of each run, by its name."""

STEP_BITS = 6 / math.log(2)
"""Bits that a squared quantisation step of error is worth."""

CHUNK = 16
"""Steps whose latents are made at once."""

WARM_UP = 0.05
"""Share of the steps that warm the rate up."""

PASSES = 7


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    steps: int
    batch: int
    crop: int
    lr: float
    threads: int
    clip: float = 1.0
    final: float = 0.01


def codec_of(info: CheckpointInfo, contexts: Sequence[str] | None = None) -> ContextCodec:
    """A trainable context codec with the transform of a checkpoint, and with these contexts or those that it has.

    Raises:
        UsageError: the checkpoint is of a codec that a context codec does not start from.
    """
    if info.codec not in ("context", *ContextCodec.prior_sources):
        raise UsageError(f"{info.name} is a {info.codec}: give a checkpoint of context or hyperprior")
    architecture: dict[str, Any] = dict(info.architecture)
    if contexts is not None:
        architecture["context"] = dict(architecture.get("context") or {}) | {"contexts": list(contexts)}
    return ContextCodec(**architecture)


def bottleneck_of(codec: Codec) -> ContextBottleneck:
    """That of a context codec."""
    return cast(ContextBottleneck, codec.bottleneck)


# ------------------------------------------------------------------------------------------------------ training


class Batches:
    """Latents of random crops at random qualities, which all runs of a device share.

    Args:
        codec: whose analysis makes them, on its device.
        images: to cut crops from.
        settings: see `Settings`.
        seed: of the crops and qualities.
    """

    def __init__(self, codec: ContextCodec, images: list[Any], settings: Settings, seed: int) -> None:
        self._module = RateDistortion(codec, stratified=True)
        self._device, self._batch = codec.device, settings.batch
        self._crops = iter(CropDataset(images, settings.batch, settings.crop, codec.device, seed))

    @torch.no_grad()
    def chunk(self) -> list[tuple[Tensor, Tensor]]:
        """CHUNK times y [batch, M, h, w] and qualities [batch]."""
        found = []
        for crops in islice(self._crops, CHUNK):
            quality = self._module.draw_qualities(self._batch, self._device)
            with torch.autocast(self._device.type, torch.bfloat16, self._device.type == "cuda"):
                y = self._module.codec.transform.analysis(as_samples(crops), quality)
            found.append((y.float(), quality))
        return found


class Run:
    """The training of one entropy model; see `QueuedSteps`.

    Args:
        name: of the variant.
        seed: of the weights.
        base: a codec whose weights all runs start from, but for the networks of slices.
        info: checkpoint that says the architecture.
        settings: see `Settings`.
    """

    def __init__(
        self, name: str, seed: int, base: ContextCodec, info: CheckpointInfo, settings: Settings
    ) -> None:
        self.name, self.seed, self.settings, self.device = name, seed, settings, base.device
        torch.manual_seed(seed)
        self.codec = codec_of(info, VARIANTS[name])
        self.codec.load_state_dict(
            {key: value for key, value in base.state_dict().items() if ".networks." not in key}, strict=False
        )
        # The whole step is captured here, the update with it.
        module = RateDistortion(
            self.codec, settings.lr, clip=settings.clip, cuda_graph=False, train_transform=False
        )
        self._module = module.to(self.device).train()
        self._rate = torch.zeros((), device=self.device)
        self._optimizer = self._module.configure_optimizers()
        self.step = 0
        self.steps = QueuedSteps(self.device, self._update, self._rate, self._forget)

    @property
    def parameters(self) -> int:
        """Numbers of the entropy model."""
        return sum(p.numel() for p in self.codec.bottleneck.parameters())

    @property
    def done(self) -> bool:
        """Whether all steps have been queued."""
        return self.step >= self.settings.steps

    def advance(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Queues the next steps."""
        with self.steps.queue():
            for y, quality in batches:
                if self.done:
                    return
                self._rate.fill_(self._factor())
                self.steps.step(y, quality)
                self.step += 1

    def _factor(self) -> float:
        progress = self.step / self.settings.steps
        cosine = (1 + math.cos(math.pi * progress)) / 2
        warm = min((self.step + 1) / max(WARM_UP * self.settings.steps, 1), 1)
        return warm * (self.settings.final + (1 - self.settings.final) * cosine)

    def _update(self, y: Tensor, quality: Tensor) -> None:
        self._optimizer.zero_grad()
        # Weights converted once would be stale when a captured step is replayed.
        with torch.autocast(y.device.type, torch.bfloat16, self.steps.captured, cache_enabled=False):
            output = self.codec.bottleneck(y, quality)
        error = (output.y_hat.float() - y) / bottleneck_of(self.codec).y_gain.inverse(quality)
        cost = output.bits + STEP_BITS * error.square().sum((1, 2, 3))
        pixels = y.shape[2] * y.shape[3] * self.codec.transform.stride**2
        loss = (self._module.weight_of(quality) * cost).mean() / pixels
        (loss + sum(output.losses.values())).backward()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * group["peak_lr"]
        self._optimizer.step()

    def _forget(self) -> None:
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()
        self._optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------ measuring


def first_slice(bottleneck: ContextBottleneck, likelihoods: Tensor) -> float:
    """Bits of the first slice, of the likelihoods of all elements of y in the order of coding, [1, M h w]."""
    count = likelihoods.shape[1] * bottleneck.slices[0].stop // bottleneck.latent_channels
    return float(-torch.log2(likelihoods[:, :count].float()).sum())


def timed(act: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds."""
    passes = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        passes.append(1000 * (time.perf_counter() - start))
    return statistics.median(passes[1:])


@torch.inference_mode()
def speed(codec: Codec, x: Tensor, device: torch.device) -> dict[str, float]:
    """Milliseconds to compress and decompress the latents of samples x [1, 3, h, w] at a middle quality."""
    codec.to(device)
    level = QUALITY_STEPS * (1 + codec.levels) // 2
    y = codec.transform.analysis(x.to(device), torch.full((1,), level, device=device)).float()
    payloads = codec.bottleneck.compress(y, level)
    shape = y.shape[2], y.shape[3]
    return {
        "compress": timed(lambda: codec.bottleneck.compress(y, level), device),
        "decompress": timed(lambda: codec.bottleneck.decompress(payloads, shape, level), device),
    }


def measured(run: Run, pictures: Sequence[Path]) -> dict[str, Any]:
    """All figures of a trained run."""
    run.steps.wait()
    codec = run.codec.eval().requires_grad_(False)
    bottleneck = bottleneck_of(codec)
    first: list[float] = []
    hook = bottleneck.y_density.likelihood_lower_bound.register_forward_hook(
        lambda module, inputs, output: first.append(first_slice(bottleneck, output))
    )
    items = [read_samples(path, codec) for path in pictures]
    found = curve(codec, items)
    hook.remove()
    return {
        "variant": run.name,
        "seed": run.seed,
        "contexts": list(VARIANTS[run.name]),
        "sequential": sum(bottleneck.halves(part) for part in bottleneck.slices),
        "parameters": run.parameters,
        "bpp": list(found.rate),
        "psnr": list(found.quality),
        "first_slice_bits": [fmean(first[i : i + len(items)]) for i in range(0, len(first), len(items))],
    }


def timings(codec: ContextCodec, picture: Path, place: str, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the integer form by kind of device, of a trained codec, which is frozen by that."""
    codec.eval().bottleneck.freeze()
    in_channels_last(codec)
    stride = codec.transform.stride
    x = read_samples(picture, codec)
    x = x[..., : x.shape[2] // stride * stride, : x.shape[3] // stride * stride]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kinds = {"cpu": torch.device("cpu")}
        if place.startswith("cuda"):
            kinds["gpu"] = torch.device(place)
        return {kind: speed(codec, x, device) for kind, device in kinds.items()}
    finally:
        torch.set_num_threads(before)


State = dict[str, NDArray[Any]]
"""Weights of a codec, so that they pass between processes by value."""


def trained(info: CheckpointInfo, variant: str, state: Mapping[str, NDArray[Any]]) -> ContextCodec:
    """The codec of a run, from its weights."""
    codec = codec_of(info, VARIANTS[variant])
    codec.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return codec


Job = tuple[int, list[str]]
"""A seed, and the variants that are trained with it side by side on one device."""


def advance(runs: Sequence[Run], batches: Batches) -> None:
    """Queues the next steps of all runs."""
    for run in runs:  # what they have read may be overwritten then
        run.steps.wait()
    chunk = batches.chunk()
    if runs[0].device.type == "cuda":
        torch.cuda.current_stream(runs[0].device).synchronize()
    for run in runs:
        run.advance(chunk)


def work(
    device: str,
    jobs: Iterator[Job],
    info: CheckpointInfo,
    settings: Settings,
    data: Path,
    pictures: list[Path],
) -> list[tuple[dict[str, Any], State]]:
    """Does jobs on a device, and measures what came of them; with the weights of the first seed."""
    place = prepared(device)
    base = base_of(info, place)
    images = [read_rgb(path) for path in find_images(data)]
    outcomes = []
    for seed, names in jobs:
        runs = [Run(name, seed, base, info, settings) for name in names]
        batches = Batches(base, images, settings, seed)
        start = time.perf_counter()
        while not all(run.done for run in runs):
            advance(runs, batches)
        for run in runs:
            with torch.backends.cudnn.flags(benchmark=False):
                figures = measured(run, pictures)
            print(
                f"{run.name}, seed {run.seed}: {figures['bpp'][0]:.4f} to {figures['bpp'][-1]:.4f} bpp, "
                f"{time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            weights = run.codec.state_dict() if seed == 0 else {}
            outcomes.append((figures, {name: value.cpu().numpy() for name, value in weights.items()}))
    return outcomes


def base_of(info: CheckpointInfo, device: torch.device) -> ContextCodec:
    """A trainable context codec with all that a checkpoint gives it."""
    codec = codec_of(info)
    warm_start(codec, info)
    codec.requires_grad_(False).to(device)
    in_channels_last(codec)
    return codec


def step_seconds(
    device: str, names: Sequence[str], info: CheckpointInfo, settings: Settings, data: Path
) -> float:
    """What a step of all these variants side by side takes on a device."""
    place = prepared(device)
    base = base_of(info, place)
    batches = Batches(base, [read_rgb(path) for path in find_images(data)[::20]], settings, 0)
    runs = [Run(name, 0, base, info, settings) for name in names]
    seconds = 0.0
    for _ in range(2):  # of which the first chooses kernels and captures
        start = time.perf_counter()
        advance(runs, batches)
        for run in runs:
            run.steps.wait()
        seconds = time.perf_counter() - start
    return seconds / CHUNK


# ------------------------------------------------------------------------------------------------------ the table


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures by variant: means over seeds."""
    rows: dict[str, dict[str, Any]] = {}
    complete = {run["seed"]: run for run in runs if run["variant"] == ALL}
    for name in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == name]

        def added(key: str, runs: Sequence[dict[str, Any]] = own) -> list[float]:
            """Percent by which each run needs more than the one with all contexts and its seed."""
            return [
                100 * (fmean(a / b for a, b in zip(run[key], complete[run["seed"]][key], strict=True)) - 1)
                for run in runs
            ]

        whole = complete[own[0]["seed"]]
        rows[name] = {
            "sequential": own[0]["sequential"],
            "parameters": own[0]["parameters"],
            "bd_rate": [
                bd_rate(_curve(complete[run["seed"]]), _curve(run)).percent if name != ALL else 0.0
                for run in own
            ],
            "bits": added("bpp"),
            "first_slice": added("first_slice_bits"),
            "psnr": fmean(a - b for a, b in zip(own[0]["psnr"], whole["psnr"], strict=True)),
            "milliseconds": own[0]["milliseconds"],
        }
    return rows


def _curve(run: dict[str, Any]) -> Curve:
    return Curve(run["bpp"], run["psnr"])


def render(rows: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown."""

    def percent(values: Sequence[float]) -> str:
        spread = f" ({min(values):+.2f} to {max(values):+.2f})" if len(values) > 1 else ""
        return f"{fmean(values):+.2f} %{spread}"

    kinds = list(rows[ALL]["milliseconds"])
    columns = ["entropy model", "steps", "numbers", "BD-rate", "bits", "of slice 1", "PSNR, dB"]
    columns += [f"{act} on a {kind.upper()}, ms" for kind in kinds for act in ("compress", "decompress")]
    lines = []
    for name, row in rows.items():
        cells = [name, f"{row['sequential']}", f"{row['parameters']:,}"]
        whole = name == ALL
        cells += [
            "" if whole else text
            for text in (percent(row["bd_rate"]), percent(row["bits"]), percent(row["first_slice"]))
        ]
        cells.append("" if whole else f"{row['psnr']:+.3f}")
        for kind in kinds:
            for act in ("compress", "decompress"):
                value = row["milliseconds"][kind][act]
                saved = rows[ALL]["milliseconds"][kind][act] - value
                cells.append(f"{value:.1f}" if whole else f"{value:.1f} ({saved:.1f} saved)")
        lines.append(cells)
    return markdown_table(columns, lines)


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "context_ablation")
    program.add_codec(parser, "context")
    program.add_pictures(parser, required=True)
    add = parser.add_argument
    add("--train", type=Path, required=True, help="folder of training images")
    add("--limit", type=int, help="measure on so many pictures alone, evenly from all")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="beside all contexts")
    add("--seeds", type=int, default=1)
    add("--steps", type=int, default=4000, help="steps of a run")
    add("--minutes", type=float, help="choose the steps so that training takes about this long")
    add("--batch", type=int, default=32, help="crops a step")
    add("--crop", type=int, default=256, help="edge of the crops, a multiple of 64")
    add("--lr", type=float, default=2e-3, help="peak rate")
    add("--threads", type=int, default=2, help="of the timings on the CPU")
    add("--devices", nargs="+", help="cpu, cuda:0 ...; all that there are unless given")
    arguments = program.parse(parser, argv)
    info: CheckpointInfo = arguments.codec
    settings = Settings(arguments.steps, arguments.batch, arguments.crop, arguments.lr, arguments.threads)
    places = devices(arguments.devices)
    names = list(dict.fromkeys([ALL, *arguments.variants]))
    groups = [group for i in range(len(places)) if (group := names[i :: len(places)])]
    jobs = [(seed, group) for seed in range(arguments.seeds) for group in groups]
    pictures = program.spread(arguments.data, arguments.limit)
    if arguments.minutes is not None:
        seconds = step_seconds(places[0], groups[0], info, settings, arguments.train)
        settings = replace(
            settings, steps=max(round(60 * arguments.minutes / (arguments.seeds * seconds)), CHUNK)
        )
        print(
            f"{1000 * seconds:.1f} ms a step of all: {settings.steps} steps a run",
            file=sys.stderr,
            flush=True,
        )
    outcomes = on_devices(work, places, jobs, info, settings, arguments.train, pictures)
    outcomes.sort(key=lambda outcome: (names.index(outcome[0]["variant"]), outcome[0]["seed"]))
    runs = []
    for figures, state in outcomes:
        if state:
            codec = trained(info, figures["variant"], state)
            figures["milliseconds"] = timings(codec, pictures[0], places[0], settings.threads)
        runs.append(figures)
    rows = summary(runs)
    tables = render(rows)
    size = read_picture(pictures[0], strip=True).pixels.shape
    data = f"{program.folder_of(pictures)}; trained on {arguments.train.name}"
    report = "\n\n".join(
        [
            "# Contexts, one by one",
            (__doc__ or "").strip(),
            f"{info.name}; {settings.steps} steps of {settings.batch} crops of {settings.crop} x {settings.crop}, "
            f"peak rate {settings.lr:g}, {arguments.seeds} seed{'s' * (arguments.seeds > 1)}. Times on latents of "
            f"{size[1]} x {size[0]} pixels, {settings.threads} threads on the CPU.",
            tables,
        ]
    )
    results = {"checkpoint": info.name, "settings": asdict(settings), "rows": rows, "runs": runs}
    write_results(arguments.output, results, provenance(data), report=report + "\n", force=arguments.force)
    print(tables)


if __name__ == "__main__":
    main()
