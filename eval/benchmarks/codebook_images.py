"""Pictures as codebook indices: quality and recognition at the lowest rates, and what nested codebooks are made of.

Rates are of whole files, headers included, over the pixels of all pictures. PSNR, MS-SSIM and the distance in features
of a classifier trained in this repository (see `compand.train.perceptual`; no LPIPS, whose weights are not here) are
means over pictures; accuracy is that of the frozen Imagenette classifier on what was decoded. Beside the checkpoint:

- JPEG, WebP and AVIF at the lowest quality that they have;
- the hyperprior codec at its lowest quality, and at the rate of each level of the checkpoint. It does not go that low
  by itself: it then codes the picture reduced by a whole factor (Lanczos), and what is decoded is enlarged again
  (bicubic). The factor is the least whose lowest quality is within the rate, the quality the least whose files, with 4
  bytes for the size, have at least the rate of ours on the first pictures.

Accuracies on the same pictures are compared by McNemar's exact test.

The second table holds codebooks of K codes against each other, with encoder and decoder as they are, at equal bits
(log2 K a position): those of the checkpoint, which were trained on after k-means; k-means of the base codebook's
vectors alone; and random subsets of them (mean over draws).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from compand.bottlenecks.codebook import CodebookBottleneck
from compand.bottlenecks.codebooks import NestedQuantiser
from compand.checkpoint import CheckpointInfo
from compand.errors import MediaError, UsageError
from compand.eval import metrics
from compand.eval.benchmarks import program
from compand.eval.benchmarks.concealment import as_batch
from compand.eval.items import Item, Signal, find_items, load
from compand.eval.perception.models import ReferenceModel, load_model
from compand.eval.perception.statistics import mcnemar
from compand.eval.perception.tasks.imagenette import labelled_images
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.eval.subjects import Subject, find
from compand.image_codec import ImageCodec
from compand.pictures import Picture
from compand.train.perceptual import ImageDistance
from compand.weights import build, choose_device

CLASSICAL = ("jpeg", "webp", "avif")
FACTORS = (1, 2, 3, 4, 6, 8)
STEPS = 4
"""Qualities of the hyperprior that are tried within a level."""

SAMPLE = 48
"""Pictures on which the quality of equal rate is sought."""

SUBSETS = 3
"""Draws of random codebooks."""

RELEASED, KMEANS, RANDOM = "k-means and training", "k-means", "random subset"

FIGURES = ("psnr", "ms_ssim", "features")

Code = tuple[Callable[[Picture], bytes], Callable[[bytes], Signal]]
"""Encoder and decoder."""


class Point(NamedTuple):
    """A codec at one setting on one folder of pictures."""

    data: str
    codec: str
    setting: str
    bpp: float
    figures: dict[str, float | None]  # means, by name
    correct: list[bool]  # of labelled pictures

    @property
    def accuracy(self) -> float | None:
        """Share of the pictures that are recognised."""
        return fmean(self.correct) if self.correct else None


class Pictures(NamedTuple):
    """A folder of pictures and their classes, if they have any."""

    name: str
    pictures: list[Picture]
    labels: list[int]


class Judge:
    """Measures what was decoded.

    Args:
        device: of the networks.
    """

    def __init__(self, device: str) -> None:
        self.device = choose_device(device)
        self.distance = ImageDistance().eval().requires_grad_(False).to(self.device)
        self.classifier: ReferenceModel = load_model("imagenette-classifier", device)

    def figures(self, original: Picture, decoded: Picture) -> dict[str, float | None]:
        """PSNR, MS-SSIM (None of pictures too small for it) and distance of features."""
        with torch.inference_mode():
            pair = (as_batch(each, self.device) for each in (decoded, original))
            found: dict[str, float | None] = {"features": float(self.distance(*pair)["perceptual"])}
        for name in ("psnr", "ms_ssim"):
            try:
                found[name] = metrics.measure(name, original, decoded)
            except UsageError:
                found[name] = None
        return found

    def point(self, data: Pictures, codec: str, setting: str, code: Code) -> Point:
        """Codes and measures all pictures of a folder."""
        encode, decode = code
        rows, correct, size = [], [], 0
        for place, picture in enumerate(data.pictures):
            file = encode(picture)
            size += len(file)
            decoded = decode(file)
            assert isinstance(decoded, Picture)
            rows.append(self.figures(picture, decoded))
            if data.labels:
                correct.append(int(np.argmax(self.classifier(decoded.pixels))) == data.labels[place])
        return Point(data.name, codec, setting, 8 * size / pixels(data.pictures), means(rows), correct)


def means(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean of each figure over the rows that have it."""
    found: dict[str, float | None] = {}
    for name in FIGURES:
        values = [value for row in rows if (value := row[name]) is not None and math.isfinite(value)]
        found[name] = fmean(values) if values else None
    return found


def pixels(pictures: Sequence[Picture]) -> int:
    """Pixels of all pictures."""
    return sum(picture.width * picture.height for picture in pictures)


def folder(path: Path, limit: int | None) -> Pictures:
    """The pictures of a folder, with labels where its folders are those of Imagenette."""
    try:
        root = path / "val" if (path / "val").is_dir() else path
        labelled = program.spread(labelled_images(root), limit)
    except MediaError:
        items = program.spread(find_items(path, "image")[0], limit)
        return Pictures(path.name, [_picture(load(item)) for item in items], [])
    found = [_picture(load(Item(each.name, each, "image"))) for each, _ in labelled]
    return Pictures(path.name, found, [label for _, label in labelled])


def _picture(signal: Signal) -> Picture:
    assert isinstance(signal, Picture)
    return signal


# ----------------------------------------------------------------------------------------------- reduced pictures

SIZE = struct.Struct("<HH")


def resized(picture: Picture, size: tuple[int, int], resample: Image.Resampling) -> Picture:
    """A picture of another size, (width, height)."""
    image = Image.fromarray(picture.pixels).resize(size, resample)
    return Picture(np.array(image), None, None)


def reduced(subject: Subject, quality: float, factor: int) -> Code:
    """A codec that codes pictures reduced by a factor. Files begin with the size, except where the factor is 1."""
    if factor == 1:
        return lambda picture: subject.encode(picture, quality), subject.decode

    def encode(picture: Picture) -> bytes:
        size = (-(-picture.width // factor), -(-picture.height // factor))
        small = resized(picture, size, Image.Resampling.LANCZOS)
        return SIZE.pack(picture.width, picture.height) + subject.encode(small, quality)

    def decode(data: bytes) -> Picture:
        size = SIZE.unpack_from(data)
        small = subject.decode(data[SIZE.size :])
        return resized(_picture(small), (size[0], size[1]), Image.Resampling.BICUBIC)

    return encode, decode


def equal_rate(subject: Subject, pictures: Sequence[Picture], bpp: float) -> tuple[int, float]:
    """Factor and quality at which a codec has at least a rate, see above. Where no factor is low enough, the largest
    and the lowest quality; where no quality is high enough, the highest."""

    def rate(quality: float, factor: int) -> float:
        encode, _ = reduced(subject, quality, factor)
        return 8 * sum(len(encode(picture)) for picture in pictures) / pixels(pictures)

    factor = next((each for each in FACTORS if rate(subject.lowest, each) <= bpp), FACTORS[-1])
    low, high = 0, round((subject.highest - subject.lowest) * STEPS)
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if rate(subject.lowest + middle / STEPS, factor) >= bpp else (middle + 1, high)
        )
    return factor, subject.lowest + low / STEPS


# ----------------------------------------------------------------------------------------------------- both tables


def rates(
    judge: Judge,
    info: CheckpointInfo,
    data: Pictures,
    levels: Sequence[int],
    hyperprior: str | None,
    device: str,
) -> Iterator[Point]:
    """Points of the first table on a folder."""
    codec = build(info, device)
    rival = find(hyperprior, "image") if hyperprior else None
    mine = []
    for level in levels:
        code = (lambda picture, level=level: codec.encode(picture, quality=level), codec.decode)
        mine.append(judge.point(data, info.name, f"level {level}", code))
        yield mine[-1]
    for name in CLASSICAL:
        try:
            subject = find(name, "image")
        except UsageError:  # not built into this Pillow
            continue
        quality = subject.lowest
        yield judge.point(data, subject.name, f"quality {quality:g}", reduced(subject, quality, 1))
    if rival is None:
        return
    yield judge.point(data, rival.name, f"quality {rival.lowest:g}", reduced(rival, rival.lowest, 1))
    for point in mine:
        factor, quality = equal_rate(rival, data.pictures[:SAMPLE], point.bpp)
        setting = f"quality {quality:g}, 1/{factor} of the size, as {point.setting}"
        yield judge.point(data, rival.name, setting, reduced(rival, quality, factor))


def nested(codec: ImageCodec) -> NestedQuantiser:
    """The nested codebooks of a codec. Raises UsageError if it has none."""
    bottleneck = codec.bottleneck
    if isinstance(bottleneck, CodebookBottleneck) and isinstance(bottleneck.quantiser, NestedQuantiser):
        return bottleneck.quantiser
    raise UsageError(f"{codec.name} has no nested codebooks: choose a codec such as vqgan")


@torch.inference_mode()
def recipes(
    judge: Judge, info: CheckpointInfo, data: Pictures, levels: Sequence[int], device: str
) -> list[dict[str, Any]]:
    """Rows of the second table on a folder: figures by level and recipe, for all but the base codebook."""
    rows: list[dict[str, Any]] = []
    changes: list[tuple[str, Callable[[NestedQuantiser], None]]] = [
        (RELEASED, lambda quantiser: None),
        (KMEANS, lambda quantiser: quantiser.recluster()),
        *((RANDOM, lambda quantiser, seed=seed: quantiser.random_subset(seed)) for seed in range(SUBSETS)),
    ]
    found: dict[tuple[int, str], list[dict[str, float | None]]] = {}
    for recipe, change in changes:
        codec = program.image_codec(info, device)
        change(nested(codec))
        for level in levels:
            for picture in data.pictures:
                tokens = codec.quantise(picture, quality=level)
                shown = codec.detokenize(tokens, size=(picture.height, picture.width), quality=level)
                found.setdefault((level, recipe), []).append(judge.figures(picture, shown))
    sizes = nested(codec).sizes
    for level in levels:
        figures = {recipe: means(found[level, recipe]) for recipe in (RELEASED, KMEANS, RANDOM)}
        rows.append({"data": data.name, "level": level, "codes": sizes[level - 1][0], "recipes": figures})
    return rows


def best_recipe(row: dict[str, Any]) -> bool:
    """Whether the checkpoint's codebook has the greatest PSNR and the least distance of features of a row."""
    figures = row["recipes"]
    others = [figures[name] for name in (KMEANS, RANDOM)]
    return all(
        figures[RELEASED]["psnr"] > other["psnr"] and figures[RELEASED]["features"] < other["features"]
        for other in others
    )


def comparisons(points: Sequence[Point], own: str) -> list[dict[str, Any]]:
    """Accuracies of the checkpoint at its highest level within 0.05 bpp against every other codec on labelled data, and
    level by level against what was coded at the rate of that level."""
    rows = []
    for data in dict.fromkeys(point.data for point in points if point.correct):
        here = [point for point in points if point.data == data]
        mine = [point for point in here if point.codec == own and point.bpp <= 0.05]
        if not mine:
            continue
        for other in here:
            if other.codec == own:
                continue
            same = [point for point in mine if other.setting.endswith(f"as {point.setting}")]
            if "as level" in other.setting and not same:
                continue
            first = same[0] if same else max(mine, key=lambda point: point.bpp)
            p = mcnemar(np.array(first.correct), np.array(other.correct))
            gain = fmean(first.correct) - fmean(other.correct)
            rows.append(
                {
                    "data": data,
                    "ours": first.setting,
                    "bpp": first.bpp,
                    "other": other.codec,
                    "setting": other.setting,
                    "other_bpp": other.bpp,
                    "gain": gain,
                    "p": p,
                    "met": gain > 0,
                }
            )
    return rows


def render(
    points: Sequence[Point], rows: Sequence[dict[str, Any]], compared: Sequence[dict[str, Any]]
) -> str:
    """All tables as Markdown."""

    def cell(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "" if value is None else f"{factor * value:.{digits}f}"

    parts = [
        "## Rates",
        markdown_table(
            ["data", "codec", "setting", "bpp", "PSNR, dB", "MS-SSIM", "feature distance", "accuracy, %"],
            [
                [
                    *(point.data, point.codec, point.setting, f"{point.bpp:.4f}"),
                    *(
                        cell(point.figures[name], digits)
                        for name, digits in zip(FIGURES, (2, 4, 4), strict=True)
                    ),
                    cell(point.accuracy, 1, 100),
                ]
                for point in points
            ],
        ),
    ]
    if compared:
        parts += [
            "## Recognition",
            markdown_table(
                ["data", "ours", "bpp", "against", "setting", "bpp", "ours minus theirs, %", "p", "above"],
                [
                    [
                        *(row["data"], row["ours"], f"{row['bpp']:.4f}", row["other"], row["setting"]),
                        *(f"{row['other_bpp']:.4f}", f"{100 * row['gain']:+.1f}", f"{row['p']:.2g}"),
                        "yes" if row["met"] else "no",
                    ]
                    for row in compared
                ],
            ),
        ]
    if rows:
        header = [f"{title}, {name}" for name in (RELEASED, KMEANS, RANDOM) for title in ("PSNR", "features")]
        parts += [
            "## Codebooks",
            markdown_table(
                ["data", "K", *header, "training best"],
                [
                    [
                        row["data"],
                        str(row["codes"]),
                        *(
                            cell(row["recipes"][name][key], digits)
                            for name in (RELEASED, KMEANS, RANDOM)
                            for key, digits in (("psnr", 2), ("features", 4))
                        ),
                        "yes" if best_recipe(row) else "no",
                    ]
                    for row in rows
                ],
            ),
        ]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "codebook_images")
    program.add_codec(parser, "vqgan")
    add = parser.add_argument
    add(
        "--data", type=Path, nargs="+", required=True, help="folders of pictures; Imagenette's are recognised"
    )
    add("--levels", type=int, nargs="+", help="levels; all unless given")
    add("--limit", type=int, help="take so many pictures of a folder alone")
    add("--nested-limit", type=int, help="take so many pictures of a folder for the codebooks")
    add(
        "--hyperprior",
        default="hyperprior",
        help="checkpoint of the codec at equal rates; none: leave it out",
    )
    add("--device", default="auto", help="auto, cpu or cuda")
    arguments = program.parse(parser, argv)
    info = arguments.codec
    codec = program.image_codec(info, arguments.device)
    sizes = nested(codec).sizes
    levels = arguments.levels or list(range(1, codec.levels + 1))
    rival = None if arguments.hyperprior == "none" else arguments.hyperprior
    judge = Judge(arguments.device)
    points: list[Point] = []
    rows: list[dict[str, Any]] = []
    for path in arguments.data:
        data = folder(path, arguments.limit)
        points += rates(judge, info, data, levels, rival, arguments.device)
        few = Pictures(data.name, program.spread(data.pictures, arguments.nested_limit), [])
        rows += recipes(judge, info, few, [level for level in levels if level < len(sizes)], arguments.device)
    compared = comparisons(points, info.name)
    tables = render(points, rows, compared)
    titles = ", ".join(path.name for path in arguments.data)
    report = "\n\n".join(
        [
            "# Pictures as codebook indices",
            (__doc__ or "").strip(),
            f"{info.name}, folders {titles}. Distance: {judge.distance.description}.",
            tables,
        ]
    )
    results = {
        "checkpoint": {"name": info.name, "symbols": info.symbols.hex(), "weights": info.weights.hex()},
        "points": [{**point._asdict(), "accuracy": point.accuracy} for point in points],
        "comparisons": compared,
        "codebooks": [{**row, "training_best": best_recipe(row)} for row in rows],
    }
    write_results(
        arguments.output,
        results,
        provenance(f"folders {titles}"),
        report=report + "\n",
        force=arguments.force,
    )
    print(report)


if __name__ == "__main__":
    main()
