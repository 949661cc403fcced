"""Speed of the wavelet codecs on a CPU, against WebP, a learned codec, and a decoder of WaLLoC's published shape.

All contenders of a table run in one process, in turns: a turn is a pass that does not count, so that caches hold what
they would in a row of pictures, and then some that do, or one where a pass takes over a second. Figures are medians
over the passes of all rounds, with quartiles; ratios are of medians. Encoding goes from 8-bit pixels (or float32
samples) in memory to the bytes of a whole file in memory, decoding from these bytes to all samples in memory. The C
library's allocator is tuned (`compand.allocator`) for all, as the command line has it; networks of compand run in
bfloat16 where the processor has it, as always. Pillow's WebP uses one thread.

mbt2018-mean is that of CompressAI with random weights, for which its coder works on as many, but nearly constant
symbols; as it comes, and tuned: in channels-last memory.

WaLLoC (Jacobellis & Yadwadkar 2025) decodes by diffusers' decoder of a variational autoencoder at the resolution of
the latents: here that shape built anew, with random weights, once in float32 and once in bfloat16, in channels-last
memory. It gets the same latents of the same file; finding them (container, entropy decoding, prior) counts for it as it
does for ours.

Stages are medians over further passes, in which each stage is timed. Prepare is what no other stage has, checks of the
picture for the most part; 8-bit samples become numbers while packets are folded. The prior has companding,
quantisation, hyper networks and the choice of tables.
"""

from __future__ import annotations

import copy
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from compand import checkpoint
from compand.allocator import tune_allocator
from compand.audio_codec import AudioCodec
from compand.errors import MediaError, UsageError
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.eval.speed import peers
from compand.eval.speed.peers import Peer
from compand.eval.speed.stages import Hook, Stopwatch, codec_hooks, hooked
from compand.eval.speed.worker import limit_threads
from compand.image_codec import ImageCodec
from compand.pictures import Picture, psnr, read_picture
from compand.sounds import Sound, read_sound, resample
from compand.weights import build

IMAGE_CODECS = ("wavelet-rgb-16x", "wavelet-rgb-4x")
SOUND_CODECS = ("wavelet-stereo-20x", "wavelet-stereo-5x", "wavelet-stereo-2x")

WEBP_QUALITY, WEBP_METHOD = 80, 4
"""Pillow's defaults."""

PEER, PEER_QUALITY = "mbt2018-mean", 4.0

SLOW = 1.0
"""Seconds of a pass from which on one pass a turn counts."""

RATE = 44100

GROUPS = 32
"""Of the group norms, as in diffusers."""

STAGES = {
    "other": "prepare",
    "packets": "packets",
    "transform": "linear + network",
    "prior": "prior",
    "entropy_coding": "entropy coding",
    "io": "container",
}
"""Stages and their titles, in the order of tables."""


# ------------------------------------------------------------------------------- WaLLoC's decoder


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3 kernels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width, eps=1e-6) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        feature = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            feature = convolution(F.silu(norm(feature)))
        return x + feature


class AttentionBlock(nn.Module):
    """x + attention of all positions to all positions, one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)[:, None]
        mixed = F.scaled_dot_product_attention(*self.inputs(tokens).chunk(3, -1))
        return x + self.output(mixed)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class WideDecoder(nn.Sequential):
    """Latents to sub-bands in the shape that WaLLoC publishes: diffusers' decoder with one block, which keeps the
    resolution. 56.9 million parameters at a width of 768, with random values.

    Args:
        latent_channels: channels of the latents.
        bands: channels of the sub-bands.
        width: channels in between, a multiple of 32.
    """

    def __init__(self, latent_channels: int, bands: int, width: int = 768) -> None:
        super().__init__(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            ResidualBlock(width),
            AttentionBlock(width),
            *(ResidualBlock(width) for _ in range(4)),
            nn.GroupNorm(GROUPS, width, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(width, bands, 3, padding=1),
        )

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


# ------------------------------------------------------------------------------------------ timing


class Contender(NamedTuple):
    """Something to be timed."""

    name: str
    action: Callable[[], object]
    amount: float  # megapixels, or seconds of sound


class Timing(NamedTuple):
    """Of all passes of a contender."""

    milliseconds: float  # median
    q1: float
    q3: float
    passes: int
    speed: float  # amount a second, at the median


def interleaved(contenders: Sequence[Contender], rounds: int, repetitions: int) -> dict[str, Timing]:
    """Time all contenders in turns, see above; by name."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for name, action, _ in contenders:
            uncounted = _seconds(action)
            seconds[name] += [_seconds(action) for _ in range(1 if uncounted > SLOW else repetitions)]
    return {name: _timing(seconds[name], amount) for name, _, amount in contenders}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _timing(seconds: Sequence[float], amount: float) -> Timing:
    q1, median, q3 = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return Timing(1e3 * median, 1e3 * q1, 1e3 * q3, len(seconds), amount / median)


def staged(codec: ImageCodec, action: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each of STAGES."""
    packets = getattr(codec.transform, "packets", None)
    hooks = codec_hooks(codec)
    if packets is not None:
        names = [name for name in ("unscaled", "analysis", "synthesis") if hasattr(packets, name)]
        hooks.append(Hook("packets", packets, names))
    stopwatch = Stopwatch(lambda: None)
    passes = []
    with hooked(hooks, stopwatch):
        for _ in range(repetitions):
            stopwatch.seconds.clear()
            with stopwatch.stage("other"):
                action()
            passes.append(dict(stopwatch.seconds))
    return {name: 1e3 * statistics.median(one.get(name, 0.0) for one in passes) for name in STAGES}


# ------------------------------------------------------------------------------------------ pictures


class Coded(NamedTuple):
    """A signal in a file of ours."""

    codec: Any
    quality: float
    data: bytes

    @property
    def release(self) -> str:
        """Name of the checkpoint."""
        return str(self.codec.info.name)

    @property
    def name(self) -> str:
        return f"{self.release}@{self.quality:g}"


def coded_files(codecs: Sequence[Any], signal: Picture | Sound, qualities: Sequence[float]) -> list[Coded]:
    """The signal by every codec at every quality."""
    return [Coded(c, quality, c.encode(signal, quality=quality)) for c in codecs for quality in qualities]


def webp(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """A WebP file by Pillow, by its defaults but for the quality."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="WEBP", quality=quality, method=WEBP_METHOD)
    return stream.getvalue()


def nearest_webp(pixels: NDArray[np.uint8], size: int) -> int:
    """The quality whose WebP file is nearest in bytes to a size."""
    return min(range(101), key=lambda quality: abs(len(webp(pixels, quality)) - size))


def webp_name(quality: int) -> str:
    return f"WebP, quality {quality}"


def file_facts(pixels: NDArray[np.uint8], data: bytes, decoded: NDArray[np.uint8]) -> dict[str, float]:
    """Size and PSNR of a file."""
    area = pixels.shape[0] * pixels.shape[1]
    return {"bytes": len(data), "bpp": 8 * len(data) / area, "psnr": psnr(pixels, decoded)}


def measure_encoding(
    files: Sequence[Coded], picture: Picture, rounds: int, repetitions: int
) -> dict[str, Any]:
    """Encoding of a picture by us, by WebP at its default quality and at the one nearest in bytes to each file of
    ours, and by a learned codec.

    Returns:
        files (name -> bytes, bpp, psnr), times (name -> `Timing`), ratios (name of ours -> rival -> how many times
        its duration is ours), stages (name of ours -> stage -> milliseconds).
    """
    pixels = picture.pixels
    megapixels = pixels.shape[0] * pixels.shape[1] / 1e6
    nearest = {coded.name: nearest_webp(pixels, len(coded.data)) for coded in files}
    qualities = sorted({WEBP_QUALITY, *nearest.values()})
    rivals = {}
    if peers.installed():
        for setting, tuned in (("as it comes", False), ("tuned", True)):
            rivals[f"{PEER}, {setting}"] = Peer(PEER, tuned=tuned)

    ours = {coded.name: partial(coded.codec.encode, picture, quality=coded.quality) for coded in files}
    actions: dict[str, Callable[[], object]] = dict(ours)
    actions |= {webp_name(quality): partial(webp, pixels, quality) for quality in qualities}
    actions |= {name: partial(peer.encode, picture, PEER_QUALITY) for name, peer in rivals.items()}
    times = interleaved([Contender(*item, megapixels) for item in actions.items()], rounds, repetitions)

    facts = {
        coded.name: file_facts(pixels, coded.data, coded.codec.decode(coded.data).pixels) for coded in files
    }
    for quality in qualities:
        data = webp(pixels, quality)
        with Image.open(io.BytesIO(data)) as image:
            facts[webp_name(quality)] = file_facts(pixels, data, np.asarray(image.convert("RGB")))
    ratios = {}
    for coded in files:
        against = {
            "WebP, default quality": webp_name(WEBP_QUALITY),
            "WebP, nearest bytes": webp_name(nearest[coded.name]),
        } | {name: name for name in rivals}
        ratios[coded.name] = {title: _ratio(times, name, coded.name) for title, name in against.items()}
    return {
        "files": facts,
        "times": {name: timing._asdict() for name, timing in times.items()},
        "ratios": ratios,
        "stages": {c.name: staged(c.codec, ours[c.name], rounds * repetitions) for c in files},
    }


def wide_decoding(coded: Coded, decoder: nn.Module, size: tuple[int, int]) -> Callable[[], object]:
    """Decoding of our file, with another network from its latents to the sub-bands."""
    transform = coded.codec.transform
    dtype = next(decoder.parameters()).dtype

    @torch.inference_mode()
    def decode() -> NDArray[np.uint8]:
        y_hat = coded.codec.latents(coded.data)[None]
        w = decoder(y_hat.to(dtype, memory_format=torch.channels_last)).float()
        edges = w.shape[2] * transform.stride, w.shape[3] * transform.stride
        x = transform.packets.synthesis(w, edges)[0, :, : size[0], : size[1]] + transform.offset
        decoded: NDArray[np.uint8] = (
            (x * 255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        )
        return decoded

    return decode


def measure_decoding(
    files: Sequence[Coded], picture: Picture, width: int, rounds: int, repetitions: int
) -> dict[str, Any]:
    """Decoding of files by us and, of one file of each checkpoint, by a decoder of WaLLoC's shape.

    Returns:
        parameters (of WaLLoC's shape, by checkpoint), times, ratios and stages as of `measure_encoding`.
    """
    size = picture.height, picture.width
    ours = {coded.name: partial(coded.codec.decode, coded.data) for coded in files}
    actions: dict[str, Callable[[], object]] = dict(ours)
    parameters, same_file = {}, {}
    firsts: dict[str, Coded] = {}
    for coded in files:
        firsts.setdefault(coded.release, coded)
    for coded in firsts.values():
        transform = coded.codec.transform
        torch.manual_seed(0)
        decoder: Any = WideDecoder(
            transform.latent_channels, coded.codec.channels * transform.packets.bands, width
        )
        decoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        parameters[coded.release] = decoder.parameter_count
        for dtype in (torch.float32, torch.bfloat16):
            name = f"WaLLoC's shape on {coded.name}, {str(dtype).removeprefix('torch.')}"
            actions[name] = wide_decoding(coded, copy.deepcopy(decoder).to(dtype), size)
            same_file[name] = coded.name
    megapixels = size[0] * size[1] / 1e6
    times = interleaved([Contender(*item, megapixels) for item in actions.items()], rounds, repetitions)
    ratios: dict[str, dict[str, float]] = {}
    for name, file in same_file.items():
        ratios.setdefault(file, {})[name.rpartition(", ")[2]] = _ratio(times, name, file)
    return {
        "parameters": parameters,
        "times": {name: timing._asdict() for name, timing in times.items()},
        "ratios": ratios,
        "stages": {c.name: staged(c.codec, ours[c.name], rounds * repetitions) for c in files},
    }


def _ratio(times: Mapping[str, Timing], rival: str, ours: str) -> float:
    return times[rival].milliseconds / times[ours].milliseconds


# -------------------------------------------------------------------------------------------- sounds


def stereo(path: Path, seconds: float) -> Sound:
    """So many seconds of a sound at 44.1 kHz in two channels, repeated if need be."""
    samples = resample(read_sound(path), RATE).samples[:2]
    if not samples.shape[1]:
        raise MediaError(f"{path.name} has no samples: give one that has")
    samples = np.repeat(samples, 3 - len(samples), axis=0)[:2]
    length = round(seconds * RATE)
    return Sound(np.tile(samples, -(-length // samples.shape[1]))[:, :length].copy(), RATE)


def measure_sound(files: Sequence[Coded], sound: Sound, rounds: int, repetitions: int) -> dict[str, Any]:
    """Encoding and decoding of a sound, streamed in segments as `AudioCodec` does it.

    Returns:
        seconds, files (name -> bytes, kbps), encode and decode (name -> `Timing`; speed in seconds a second).
    """
    times = {}
    for direction in ("encode", "decode"):
        actions: dict[str, Callable[[], object]] = {
            c.name: partial(c.codec.encode, sound, quality=c.quality)
            if direction == "encode"
            else partial(c.codec.decode, c.data)
            for c in files
        }
        contenders = [Contender(*item, sound.seconds) for item in actions.items()]
        timings = interleaved(contenders, rounds, repetitions)
        times[direction] = {name: timing._asdict() for name, timing in timings.items()}
    return {
        "seconds": sound.seconds,
        "files": {
            c.name: {"bytes": len(c.data), "kbps": 8 * len(c.data) / sound.seconds / 1000} for c in files
        },
        **times,
    }


# ------------------------------------------------------------------------------------------- reports


def requirements(results: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(what, wanted, reached) for every checkpoint: the lowest of its qualities."""
    least: dict[tuple[str, float], float] = {}

    def note(file: str, what: str, wanted: float, reached: float) -> None:
        key = f"{file.rpartition('@')[0]}: {what}", wanted
        least[key] = min(least.get(key, reached), reached)

    for file, ratios in results["encode"]["ratios"].items():
        for rival, ratio in ratios.items():
            note(file, f"encode against {rival}", 2 if rival.startswith("WebP") else 10, ratio)
    for file, ratios in results["decode"]["ratios"].items():
        for dtype, ratio in ratios.items():
            note(file, f"decode against WaLLoC's shape, {dtype}", 10, ratio)
    for direction, wanted in (("encode", 100), ("decode", 30)):
        for file, timing in results.get("sound", {}).get(direction, {}).items():
            note(file, f"{direction}, times real time", wanted, timing["speed"])
    return [(what, wanted, reached) for (what, wanted), reached in least.items()]


def _figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _times_table(times: Mapping[str, Mapping[str, float]], unit: str, files: Mapping[str, Any] | None) -> str:
    """Speeds, with what is known of the files."""
    columns = {"bytes": "{:,.0f}", "bpp": "{:.3f}", "kbps": "{:.2f}", "psnr": "{:.2f}"}
    known = [name for name in columns if any(name in facts for facts in (files or {}).values())]
    rows = []
    for name, timing in times.items():
        facts = (files or {}).get(name, {})
        row = [name, *(columns[key].format(facts[key]) if key in facts else "" for key in known)]
        quartiles = f"{_figure(timing['q1'])} to {_figure(timing['q3'])}"
        row += [_figure(timing["milliseconds"]), quartiles, str(timing["passes"]), _figure(timing["speed"])]
        rows.append(row)
    titles = ["PSNR, dB" if name == "psnr" else name for name in known]
    return markdown_table(["", *titles, "ms", "quartiles", "passes", unit], rows)


def _ratio_table(ratios: Mapping[str, Mapping[str, float]], what: str) -> str:
    rivals = list(next(iter(ratios.values())))
    rows = [[name, *(f"{_figure(of[rival])} x" for rival in rivals)] for name, of in ratios.items()]
    return markdown_table([what, *rivals], rows)


def _stage_table(stages: Mapping[str, Mapping[str, float]], first: str) -> str:
    rows = [[name, *(_figure(of[stage]) for stage in STAGES)] for name, of in stages.items()]
    return markdown_table(["ms", *(first if stage == "other" else STAGES[stage] for stage in STAGES)], rows)


def render(results: Mapping[str, Any], conditions: str) -> str:
    """The report in Markdown."""
    encode, decode = results["encode"], results["decode"]
    counts = ", ".join(f"{count:,} on {name}" for name, count in decode["parameters"].items())
    parts = [
        "# Speed of the wavelet codecs",
        (__doc__ or "").strip(),
        conditions,
        "## Requirements",
        markdown_table(
            ["ratio, lowest of the qualities", "wanted", "reached", ""],
            [
                [what, f"{wanted:g} x", f"{_figure(reached)} x", "yes" if reached >= wanted else "no"]
                for what, wanted, reached in requirements(results)
            ],
        ),
        "## Encoding a picture",
        _times_table(encode["times"], "MP/s", encode["files"]),
        _ratio_table(encode["ratios"], "so many times as fast as"),
        _stage_table(encode["stages"], "prepare"),
        "## Decoding a picture",
        _times_table(decode["times"], "MP/s", None),
        _ratio_table(decode["ratios"], "so many times as fast as WaLLoC's shape in"),
        f"Parameters of WaLLoC's shape, random: {counts}.",
        _stage_table(decode["stages"], "to 8 bits"),
    ]
    if "sound" in results:
        sound = results["sound"]
        for direction in ("encode", "decode"):
            parts += [
                f"## {direction.capitalize()[:-1]}ing {sound['seconds']:g} seconds of stereo sound",
                _times_table(sound[direction], "times real time", sound["files"]),
            ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "wavelet_speed")
    parser.add_argument("--picture", type=Path, required=True, help="a picture")
    parser.add_argument("--sound", type=Path, help="a sound; none: sounds are left out")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the sound, repeated if need be")
    parser.add_argument(
        "--image-codecs", nargs="+", default=IMAGE_CODECS, help="checkpoints: names or folders"
    )
    parser.add_argument(
        "--sound-codecs", nargs="+", default=SOUND_CODECS, help="checkpoints: names or folders"
    )
    parser.add_argument("--qualities", type=float, nargs="+", default=(4.0, 8.0))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=9, help="passes of a turn that count")
    parser.add_argument("--width", type=int, default=768, help="of the decoder of WaLLoC's shape")
    arguments = program.parse(parser, argv)
    limit_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    tune_allocator()
    counts = arguments.rounds, arguments.repetitions

    picture = read_picture(arguments.picture, strip=True)
    image_codecs = [program.image_codec(checkpoint.find(name), "cpu") for name in arguments.image_codecs]
    files = coded_files(image_codecs, picture, arguments.qualities)
    results = {
        "encode": measure_encoding(files, picture, *counts),
        "decode": measure_decoding(files, picture, arguments.width, *counts),
    }
    data = f"{arguments.picture.name}, {picture.width} x {picture.height}"
    if arguments.sound:
        sound_codecs = [_audio_codec(name) for name in arguments.sound_codecs]
        sound = stereo(arguments.sound, arguments.seconds)
        results["sound"] = measure_sound(
            coded_files(sound_codecs, sound, arguments.qualities), sound, *counts
        )
        data += f"; {arguments.seconds:g} s of {arguments.sound.name}"
    passes = f"{arguments.rounds} rounds, up to {arguments.repetitions} passes a turn"
    conditions = f"{data}. {arguments.threads} threads; {passes}."
    origin = provenance(data)
    write_results(
        arguments.output, results, origin, report=render(results, conditions), force=arguments.force
    )
    print(render(results, conditions))


def _audio_codec(name: str) -> AudioCodec:
    info = checkpoint.find(name)
    codec = build(info, "cpu")
    if not isinstance(codec, AudioCodec):
        raise UsageError(f"{info.name} codes {info.medium}: choose an audio codec")
    return codec


if __name__ == "__main__":
    main()
