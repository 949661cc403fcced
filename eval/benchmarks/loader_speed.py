"""Rows a second of loaders, batches ready for the network: packed latents against JPEG files.

The same photographs are cut to 500x375, 224x224 and 112x112 pixels, saved as JPEG files, and packed. The JPEG loaders
are torchvision's: `decode_jpeg`, RandomResizedCrop to 224 pixels (to 112 of the smallest files), flip, float32; of the
224-pixel files there is a second one, which takes pictures as they are and so spares the resizing. The packed loaders
read rows by random access, compare checksums, take a random window of 28x28 positions (224 pixels; of the 224-pixel
pictures that is all there is), flip half of the rows by the measured kernel, and dequantise to float32; "resized" has
RandomResizedCrop on the latent grid instead. All are plain DataLoaders with the same sampler and batches of 64, with
labels.

All loaders run in turns; a turn is a pass that does not count and then some that do, or one where a pass takes over a
second. Figures are medians over the passes of all rounds, ratios are of medians. Every process has one torch thread;
the C library's allocator is as it comes, and files are in the page cache, for all. With workers, the figure for a core
is that of all by the number of workers; what the process that gets the batches does is not counted as a core.

Stages are medians over further passes in one process, in which each stage is timed. Augmentation is all of
torchvision's transforms, and the flip of latents; crops, look-up and collation are the rest, with what DataLoader does.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

import compand
from compand.data import PackedDataset, PackedReader, PackedSampler, RowCodec, local_engine, pack
from compand.data.collate import Collate
from compand.data.transforms import Flip, FlipFit, RandomCrop, RandomResizedCrop, measure_flip
from compand.eval.benchmarks import program
from compand.eval.benchmarks.wavelet_speed import Contender, Timing, interleaved
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.eval.speed.stages import Hook, Stopwatch, hooked

CODEC, QUALITY = "wavelet-rgb-16x", 3.0
SIZES = {"500x375": (500, 375), "224": (224, 224), "112": (112, 112)}
"""Width and height of the pictures."""

PACKED_SIZES = ("500x375", "224")
PROFILES = {
    "train, zstd": ("train", "zstd"),
    "train, lz4": ("train", "lz4"),
    "archive": ("archive", "zstd"),
    "cpd": ("cpd", "zstd"),
}
"""Profile and compression, which the last two have no use for."""

EPOCHS = {"train": 8, "archive": 2, "cpd": 1}
"""Epochs of a pass: a pass of a fast loader would be too short."""

JPEG_QUALITY = 90
CLASSES = 10
BATCH = 64
EDGE, GRID = 224, 28
"""Edge of what a network gets, in pixels and on the latent grid."""

REQUIREMENTS = (
    ("train, zstd, 224", "JPEG 224", 8.0, 8 * 2450.0),
    ("train, zstd, 500x375", "JPEG 500x375", 20.0, 20 * 500.0),
    ("train, zstd, 224", "JPEG 112", 3.0, None),
    ("train, lz4, 224", "JPEG 224", 8.0, 8 * 2450.0),
    ("train, lz4, 500x375", "JPEG 500x375", 20.0, 20 * 500.0),
    ("train, lz4, 224", "JPEG 112", 3.0, None),
    ("archive, 224", "JPEG 224", 1.5, 1.5 * 2450.0),
    ("archive, 500x375", "JPEG 500x375", 6.0, 6 * 500.0),
)
"""Two loaders, the least ratio, and what it came to in rows a second on a core when it was asked for, by 2,450 images a
second at 224 pixels and 500 at 500x375."""

STAGES = ("read", "decode", "augment", "rest")


# --------------------------------------------------------------------------------------------- data


def make_pictures(photographs: Sequence[Path], folder: Path) -> None:
    """JPEG files FOLDER/SIZE/CLASS/NAME.jpg of all sizes; classes in turn. Files that are there stay."""
    for index, path in enumerate(photographs):
        with Image.open(path) as image:
            original = image.convert("RGB")
        for name, size in SIZES.items():
            target = folder / name / str(index % CLASSES) / f"{path.stem}.jpg"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                ImageOps.fit(original, size, Image.Resampling.BICUBIC).save(target, quality=JPEG_QUALITY)


class JpegFiles(Dataset[tuple[Tensor, int]]):
    """The pictures below a folder of class folders, read and augmented by torchvision.

    Args:
        folder: folder of folders.
        edge: of the square that a network gets; None: all of the picture.
    """

    def __init__(self, folder: Path, edge: int | None) -> None:
        classes = sorted(path.name for path in folder.iterdir())
        self.files = [
            (str(path), label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).iterdir())
        ]
        crop = [v2.RandomResizedCrop(edge, antialias=True)] if edge else []
        self._transforms = v2.Compose(
            [*crop, v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return self.augment(self.decode(self.read(path))), label

    def read(self, path: str) -> Tensor:
        return read_file(path)

    def decode(self, data: Tensor) -> Tensor:
        return decode_jpeg(data, ImageReadMode.RGB)

    def augment(self, pixels: Tensor) -> Tensor:
        augmented: Tensor = self._transforms(pixels)
        return augmented


class Passes(Sampler[list[int]]):
    """Batches of some epochs in one go: for loaders this fast the rows of one are few."""

    def __init__(self, sampler: PackedSampler, epochs: int) -> None:
        self._sampler, self._epochs = sampler, epochs

    def __len__(self) -> int:
        return self._epochs * len(self._sampler)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._epochs):
            yield from self._sampler


def pack_pictures(source: Path, target: Path, profile: str, compression: str) -> None:
    """Packs a folder on the CPU; a set that is there already stays."""
    packing = pack.start(
        str(source),
        str(target),
        codec=CODEC,
        quality=QUALITY,
        profile=profile,
        compression=compression,
        device="cpu",
    )
    local_engine.run_local(packing)
    packing.finish()


# ------------------------------------------------------------------------------------------ contenders


class Subject(NamedTuple):
    """A data set and how it is loaded."""

    name: str
    dataset: Any
    bytes_a_row: float  # of JPEG files, or of payloads
    epochs: int  # of a pass
    hooks: Sequence[Hook]


def jpeg_subject(folder: Path, size: str, *, cropped: bool = True) -> Subject:
    """The JPEG files of a size; not cropped, all of a picture is taken."""
    dataset = JpegFiles(folder / size, min(EDGE, SIZES[size][1]) if cropped else None)
    total = sum(Path(path).stat().st_size for path, _ in dataset.files)
    hooks = [Hook(stage, dataset, (stage,)) for stage in ("read", "decode", "augment")]
    name = f"JPEG {size}" if cropped else f"JPEG {size}, as they are"
    return Subject(name, dataset, total / len(dataset), 1, hooks)


def packed_subject(name: str, folder: Path, transforms: Sequence[Any]) -> Subject:
    """A packed set."""
    dataset = PackedDataset(folder, columns=("label",), transform=transforms)
    reader = PackedReader(folder)
    total = sum(len(reader.payload(row)) for row in range(len(reader)))
    hooks = [
        Hook("read", PackedReader, ("row",)),
        Hook("decode", RowCodec, ("decode", "latents")),
        Hook("augment", Flip, ("__call__",)),
        Hook("augment", RandomResizedCrop, ("finish",)),
    ]
    return Subject(name, dataset, total / len(reader), EPOCHS[reader.info.profile], hooks)


def subjects(folder: Path, profiles: Sequence[str], fit: FlipFit) -> list[Subject]:
    """All loaders; packs what is not packed yet."""
    found = [jpeg_subject(folder, size) for size in SIZES] + [jpeg_subject(folder, "224", cropped=False)]
    for size in PACKED_SIZES:
        for title in profiles:
            packed = folder / f"packed-{size}-{title.replace(', ', '-')}"
            pack_pictures(folder / size, packed, *PROFILES[title])
            found.append(packed_subject(f"{title}, {size}", packed, [RandomCrop(GRID), Flip(fit)]))
        resized = [RandomResizedCrop(GRID), Flip(fit)]
        packed = folder / f"packed-{size}-train-zstd"
        if packed.exists():
            found.append(packed_subject(f"train, zstd, {size}, resized", packed, resized))
    return found


def loader(subject: Subject, workers: int, seed: int = 0) -> DataLoader[Any]:
    """Shuffled batches; workers live as long as the loader."""
    packed = isinstance(subject.dataset, PackedDataset)
    return DataLoader(
        subject.dataset,
        batch_sampler=Passes(
            PackedSampler(len(subject.dataset), batch_size=BATCH, seed=seed), subject.epochs
        ),
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=Collate() if packed else None,
    )


def exhaust(batches: Iterable[Any]) -> None:
    """All batches of a pass, each touched."""
    for batch in batches:
        values = batch["latents"] if isinstance(batch, dict) else batch[0]
        float(values[-1, -1, -1, -1])


# ---------------------------------------------------------------------------------------------- timing


def measure(found: Sequence[Subject], workers: int, rounds: int, repetitions: int) -> dict[str, Timing]:
    """All loaders in turns, see above; by name. Speeds are in rows a second, of all workers together."""
    loaders = [loader(subject, workers) for subject in found]
    return interleaved(
        [
            Contender(subject.name, partial(exhaust, batches), len(subject.dataset) * subject.epochs)
            for subject, batches in zip(found, loaders, strict=True)
        ],
        rounds,
        repetitions,
    )


def staged(subject: Subject, repetitions: int) -> dict[str, float]:
    """Median microseconds a row of each of STAGES."""
    stopwatch = Stopwatch(lambda: None)
    batches = loader(subject, 0)
    rows = len(subject.dataset) * subject.epochs
    passes = []
    with hooked(subject.hooks, stopwatch):
        for _ in range(repetitions):
            stopwatch.seconds.clear()
            with stopwatch.stage("rest"):
                exhaust(batches)
            passes.append(dict(stopwatch.seconds))
    return {name: 1e6 / rows * statistics.median(one.get(name, 0.0) for one in passes) for name in STAGES}


# ---------------------------------------------------------------------------------------------- reports


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _requirement_rows(speeds: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """What was asked for and what was reached: ratios by the number of workers, then rows a second on one core."""
    rows = []
    for ours, rival, wanted, stated in REQUIREMENTS:
        if any(ours not in timings for timings in speeds.values()):
            continue
        ratios = [timings[ours]["speed"] / timings[rival]["speed"] for timings in speeds.values()]
        row = [f"{ours} against {rival}", f"{wanted:g} x", *(f"{ratio:.2f} x" for ratio in ratios)]
        row.append("yes" if min(ratios) >= wanted else "no")
        if stated is None:
            rows.append([*row, "", "", ""])
        else:
            (workers, timings), *_ = speeds.items()
            speed = timings[ours]["speed"] / max(int(workers), 1)
            rows.append([*row, f"{stated:,.0f}", f"{speed:,.0f}", "yes" if speed >= stated else "no"])
    return rows


def render(results: Mapping[str, Any], conditions: str) -> str:
    """The report in Markdown."""
    speeds, sizes = results["times"], results["bytes"]
    titles = [f"{workers} workers" if int(workers) else "one process" for workers in speeds]
    parts = [
        "# Speed of loaders",
        (__doc__ or "").strip(),
        conditions,
        "## Requirements",
        markdown_table(
            ["ratio", "wanted", *titles, "", "rows/s a core asked for then", "here", ""],
            _requirement_rows(speeds),
        ),
    ]
    for title, (workers, timings) in zip(titles, speeds.items(), strict=True):
        cores = max(int(workers), 1)
        rows = []
        for name, timing in timings.items():
            speed = timing["speed"] / cores
            spread = [timing["speed"] * timing["milliseconds"] / timing[q] / cores for q in ("q3", "q1")]
            row = [name, _figure(sizes[name]), _figure(speed), " to ".join(map(_figure, spread))]
            rows.append(
                [*row, _figure(1e6 / speed), _figure(speed * sizes[name] / 1e6), str(timing["passes"])]
            )
        columns = ["", "bytes a row", "rows/s a core", "quartiles", "us a row", "MB/s a core", "passes"]
        parts += [f"## {title.capitalize()}", markdown_table(columns, rows)]
    stages = [[name, *(_figure(of[stage]) for stage in STAGES)] for name, of in results["stages"].items()]
    parts += ["## Where the time goes", markdown_table(["us a row", *STAGES], stages)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "loader_speed")
    program.add_pictures(parser, required=True)
    parser.add_argument("--pictures", type=int, default=512, help="so many of them")
    parser.add_argument(
        "--folder", type=Path, help="where JPEG files and packed sets are made, or are already"
    )
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 2))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3, help="passes of a turn that count")
    arguments = program.parse(parser, argv)
    torch.set_num_threads(1)
    photographs = arguments.data[: arguments.pictures]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        make_pictures(photographs, folder)
        files = [path for path, _ in JpegFiles(folder / "500x375", None).files[:16]]
        fit = measure_flip(compand.load(CODEC, device="cpu"), files, quality=QUALITY)
        found = subjects(folder, arguments.profiles, fit)
        times = {
            str(workers): {
                name: timing._asdict()
                for name, timing in measure(found, workers, arguments.rounds, arguments.repetitions).items()
            }
            for workers in arguments.workers
        }
        results = {
            "times": times,
            "bytes": {subject.name: subject.bytes_a_row for subject in found},
            "stages": {subject.name: staged(subject, arguments.repetitions) for subject in found},
        }
    data = f"{program.folder_of(photographs)}, as JPEG files of quality {JPEG_QUALITY}"
    passes = f"{arguments.rounds} rounds, up to {arguments.repetitions} passes a turn"
    conditions = f"{data}; {CODEC} at quality {QUALITY:g}. {passes}."
    origin = provenance(data)
    report = render(results, conditions)
    write_results(arguments.output, results, origin, report=report, force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
