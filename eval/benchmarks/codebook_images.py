"""Pictures as codebook indices: quality and recognition at the lowest rates, and what nested codebooks are made of.

Rates are of whole files, headers included, over the pixels of all pictures. PSNR, MS-SSIM and distances of features
(see `compand.train.perceptual`; no LPIPS, whose weights are not here) are means over the pictures that are looked at
closely; accuracy is what classifiers of Imagenette (`--judges`), trained on undamaged pictures and frozen, recognise of
what was decoded. Beside the checkpoint:

- JPEG, WebP and AVIF at the lowest quality that they have;
- the hyperprior codec at its lowest quality, and at the rate of every second level of the checkpoint. It does not go
  that low by itself: it then codes the picture reduced by a whole factor (Lanczos), and what is decoded is enlarged
  again (bicubic). The factor is the least whose lowest quality is within the rate, the quality the least whose files,
  with 4 bytes for the size, have at least the rate of ours on the first pictures.

Features of `imagenette-classifier` are what checkpoints of vqgan were held to in training. Its verdicts, and distances
of its features, therefore favour them; those of another judge and of `camvid-segmenter` do so no more than pictures as
such do. Accuracies on the same pictures are compared by McNemar's exact test.

The second table holds codebooks of K codes against each other, with encoder and decoder as they are, at equal bits
(log2 K a position): those of the checkpoint, which were trained on after k-means; k-means of the base codebook's
vectors alone; and random subsets of them (mean over draws). Both of the latter are made from the checkpoint itself: it
keeps the base codebook and how often each of its codes was used.

Pictures are measured in parallel processes. What is done is kept beside the output, in a file .rows.jsonl: a run that
was interrupted goes on from there.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compand.bottlenecks.codebook import CodebookBottleneck
from compand.bottlenecks.codebooks import NestedQuantiser
from compand.checkpoint import CheckpointInfo
from compand.errors import MediaError, UsageError
from compand.eval import metrics
from compand.eval.benchmarks import program
from compand.eval.benchmarks.concealment import DISTANCES, as_batch
from compand.eval.benchmarks.crew import Crew, crew, processes, say
from compand.eval.items import Item, Signal, find_items, load
from compand.eval.perception.models import load_model
from compand.eval.perception.statistics import mcnemar
from compand.eval.perception.tasks.imagenette import labelled_images
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.eval.subjects import Subject, find
from compand.image_codec import ImageCodec
from compand.pictures import Picture
from compand.train.perceptual import ImageDistance
from compand.weights import choose_device

CLASSICAL = ("jpeg", "webp", "avif")
FACTORS = (1, 2, 3, 4, 6, 8)
STEPS = 4
"""Qualities of the hyperprior that are tried within a level."""

SAMPLE = 16
"""Pictures on which the quality of equal rate is sought."""

SUBSETS = 2
"""Draws of random codebooks."""

RELEASED, KMEANS, RANDOM = "k-means and training", "k-means", "random subset"

LIMIT, CLOSE = 200, 24
"""Pictures of a folder, and those of them that are looked at closely, unless told."""

FIGURES = ("psnr", "ms_ssim", *DISTANCES)

MOST_CODES = 256
"""Largest codebook of the second table."""

BPP = 0.05
"""Most bits a pixel at which recognition is compared."""

Code = tuple[Callable[[Picture], bytes], Callable[[bytes], Signal]]
"""Encoder and decoder."""

Figures = dict[str, float | None]


class Source(NamedTuple):
    """A picture to be measured."""

    data: str  # its folder
    path: Path
    label: int | None  # its class
    close: bool  # whether it is looked at closely

    @property
    def name(self) -> str:
        """Folder and name of the file."""
        return f"{self.path.parent.name}/{self.path.name}"


class Row(NamedTuple):
    """A picture coded by a codec at a setting."""

    data: str
    item: str
    codec: str
    setting: str
    size: int  # bytes
    pixels: int
    figures: Figures  # none where it was not looked at closely
    right: dict[str, bool]  # by judge, of labelled pictures


class Nested(NamedTuple):
    """A picture as a codebook of a recipe shows it."""

    data: str
    item: str
    level: int
    recipe: str
    figures: Figures


class Plan(NamedTuple):
    """A setting of the hyperprior."""

    factor: int
    quality: float
    setting: str


class Options(NamedTuple):
    """What processes are told."""

    codec: CheckpointInfo
    levels: tuple[int, ...]
    hyperprior: str | None
    judges: tuple[str, ...]
    device: str


class Point(NamedTuple):
    """A codec at one setting on one folder of pictures."""

    data: str
    codec: str
    setting: str
    bpp: float
    figures: Figures  # means, by name
    right: dict[str, list[bool]]  # by judge, of labelled pictures

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of the pictures that each judge recognises."""
        return {judge: fmean(answers) for judge, answers in self.right.items() if answers}


ORIGINAL = "undamaged"


# ------------------------------------------------------------------------------------------------ in a process


class Bench:
    """Measures pictures. Codecs are loaded when they are first needed.

    Args:
        options: of the run.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = choose_device(options.device)
        self.distances = {
            figure: ImageDistance((model,)).eval().requires_grad_(False).to(self.device)
            for figure, model in DISTANCES.items()
        }
        self.judges = [load_model(judge, options.device) for judge in options.judges]
        self.codec = program.image_codec(options.codec, options.device)
        self.rival = find(options.hyperprior, "image") if options.hyperprior else None
        self._recipes: list[tuple[str, ImageCodec]] = []

    def recipes(self) -> list[tuple[str, ImageCodec]]:
        """The codec with codebooks of other recipes, by the name of the recipe."""
        if not self._recipes:
            changes: list[tuple[str, Callable[[NestedQuantiser], None]]] = [
                (KMEANS, lambda quantiser: quantiser.recluster()),
                *(
                    (RANDOM, lambda quantiser, seed=seed: quantiser.random_subset(seed))
                    for seed in range(SUBSETS)
                ),
            ]
            for recipe, change in changes:
                codec = program.image_codec(self.options.codec, self.options.device)
                change(nested(codec))
                self._recipes.append((recipe, codec))
        return self._recipes

    def measure(self, source: Source, part: str, plans: Sequence[Plan]) -> list[Row | Nested]:
        """All of a picture: part "ours" (with the classical codecs and the other recipes) or "rival"."""
        picture = read(source)
        view = View(self, source, picture)
        if part == "rival":
            assert self.rival is not None
            return [
                view.row(self.rival.name, plan.setting, reduced(self.rival, plan.quality, plan.factor))
                for plan in plans
            ]
        rows: list[Row | Nested] = [view.original()]
        for level in self.options.levels:
            code = (lambda picture, level=level: self.codec.encode(picture, quality=level), self.codec.decode)
            row = view.row(self.options.codec.name, f"level {level}", code)
            rows.append(row)
            sizes = nested(self.codec).sizes
            if source.close and level < len(sizes) and sizes[level - 1][0] <= MOST_CODES:
                rows.append(Nested(source.data, source.name, level, RELEASED, row.figures))
                rows += self._other_recipes(view, level)
        for subject in (*classical(), *([self.rival] if self.rival else [])):
            quality = subject.lowest
            rows.append(view.row(subject.name, f"quality {quality:g}", reduced(subject, quality, 1)))
        return rows

    def _other_recipes(self, view: View, level: int) -> Iterator[Nested]:
        picture = view.picture
        for recipe, codec in self.recipes():
            tokens = codec.quantise(picture, quality=level)
            shown = codec.detokenize(tokens, size=(picture.height, picture.width), quality=level)
            yield Nested(
                view.source.data, view.source.name, level, recipe, view.figures(shown, ms_ssim=False)
            )

    def size(self, source: Source, plan: Plan) -> int:
        """Bytes of a picture as the hyperprior codes it."""
        assert self.rival is not None
        return len(reduced(self.rival, plan.quality, plan.factor)[0](read(source)))


class View:
    """What is asked of everything that is made of one picture."""

    def __init__(self, bench: Bench, source: Source, picture: Picture) -> None:
        self.bench, self.source, self.picture = bench, source, picture
        self._wanted: dict[str, list[list[Tensor]]] = {}
        if source.close:
            with torch.inference_mode():
                batch = as_batch(picture, bench.device)
                self._wanted = {name: each.features(batch) for name, each in bench.distances.items()}

    def row(self, codec: str, setting: str, code: Code) -> Row:
        """The picture coded and measured."""
        encode, decode = code
        file = encode(self.picture)
        return self._row(codec, setting, len(file), _picture(decode(file)))

    def original(self) -> Row:
        """The picture itself, without figures."""
        return self._row(ORIGINAL, "", self.source.path.stat().st_size, self.picture, close=False)

    def _row(self, codec: str, setting: str, size: int, shown: Picture, close: bool = True) -> Row:
        right = {}
        if self.source.label is not None:
            right = {
                judge.name: int(np.argmax(judge(shown.pixels))) == self.source.label
                for judge in self.bench.judges
            }
        figures = self.figures(shown) if close and self.source.close else {}
        area = self.picture.width * self.picture.height
        return Row(self.source.data, self.source.name, codec, setting, size, area, figures, right)

    def figures(self, decoded: Picture, ms_ssim: bool = True) -> Figures:
        """FIGURES of what was decoded; MS-SSIM is None of pictures too small for it."""
        with torch.inference_mode():
            batch = as_batch(decoded, self.bench.device)
            found: Figures = {
                name: float(distance.between(batch, self._wanted[name]))
                for name, distance in self.bench.distances.items()
            }
        for name in ("psnr", "ms_ssim")[: 1 + ms_ssim]:
            try:
                found[name] = metrics.measure(name, self.picture, decoded)
            except UsageError:
                found[name] = None
        return found


def measured(bench: Bench, source: Source, part: str, plans: Sequence[Plan]) -> list[Row | Nested]:
    """`Bench.measure`."""
    return bench.measure(source, part, plans)


def sized(bench: Bench, source: Source, plan: Plan) -> int:
    """`Bench.size`."""
    return bench.size(source, plan)


# ------------------------------------------------------------------------------------------------- the pictures


def sources(path: Path, limit: int | None, close: int) -> list[Source]:
    """The pictures of a folder, with labels where its folders are those of Imagenette.

    Args:
        path: the folder.
        limit: take so many, evenly from all; None: all.
        close: how many of these are looked at closely.
    """
    try:
        root = path / "val" if (path / "val").is_dir() else path
        found: list[tuple[Path, int | None]] = list(labelled_images(root))
    except MediaError:
        found = [(item.path, None) for item in find_items(path, "image")[0]]
    chosen = program.spread(found, limit)
    near = set(program.spread(range(len(chosen)), close))
    return [Source(path.name, each, label, number in near) for number, (each, label) in enumerate(chosen)]


def read(source: Source) -> Picture:
    """Its picture."""
    return _picture(load(Item(source.name, source.path, "image")))


def _picture(signal: Signal) -> Picture:
    assert isinstance(signal, Picture)
    return signal


def classical() -> list[Subject]:
    """Those of CLASSICAL that this Pillow has."""
    found = []
    for name in CLASSICAL:
        try:
            found.append(find(name, "image"))
        except UsageError:
            continue
    return found


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


# ------------------------------------------------------------------------------------------------- all of them


class Journal:
    """Rows that are done, kept in a file so that a run can go on where it ended.

    Args:
        path: the file; what it holds of a run with other settings is lost.
        settings: of the run.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.done: dict[str, list[Row | Nested]] = {}
        head = json.dumps({"settings": settings}, sort_keys=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines[:1] == [head]:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except ValueError:  # cut off when the run ended
                    break
                self.done[entry["key"]] = [
                    *(Row(*row) for row in entry["rows"]),
                    *(Nested(*row) for row in entry["nested"]),
                ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + "\n", encoding="utf-8")
        for key, rows in self.done.items():
            self._write(key, rows)

    def add(self, key: str, rows: Sequence[Row | Nested]) -> None:
        """Keeps the rows of a task."""
        self.done[key] = list(rows)
        self._write(key, rows)

    def _write(self, key: str, rows: Sequence[Row | Nested]) -> None:
        entry = {
            "key": key,
            "rows": [row for row in rows if isinstance(row, Row)],
            "nested": [row for row in rows if isinstance(row, Nested)],
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def collect(
    people: Crew[Source], journal: Journal, tasks: Sequence[Source], part: str, plans: Sequence[Plan] = ()
) -> list[Row | Nested]:
    """The rows of all tasks in their order, of which those in the journal are not measured again."""
    keys = [f"{part} {task.data} {task.path}" for task in tasks]
    left = [number for number, key in enumerate(keys) if key not in journal.done]
    outcomes = people.each(measured, [tasks[number] for number in left], part, plans)
    for done, (number, rows) in enumerate(outcomes, len(tasks) - len(left) + 1):
        journal.add(keys[left[number]], rows)
        say(f"{tasks[0].data}, {part}: {done} of {len(tasks)} pictures")
    return [row for key in keys for row in journal.done[key]]


def equal_rates(
    people: Crew[Source], rival: Subject, pictures: Sequence[Source], wanted: Sequence[tuple[str, float]]
) -> list[Plan]:
    """Factors and qualities at which the rival has at least given rates, see above.

    Where no factor is low enough: the largest and the lowest quality; where no quality is high enough: the highest.

    Args:
        people: who codes.
        rival: the codec.
        pictures: those on which it is sought.
        wanted: settings, and bits a pixel on these pictures.
    """
    area = sum(picture.width * picture.height for picture in map(read, pictures))
    known: dict[tuple[int, float], float] = {}

    def rate(quality: float, factor: int) -> float:
        if (factor, quality) not in known:
            known[factor, quality] = 8 * sum(people.all(sized, pictures, Plan(factor, quality, ""))) / area
        return known[factor, quality]

    plans = []
    for setting, bpp in wanted:
        factor = next((each for each in FACTORS if rate(rival.lowest, each) <= bpp), FACTORS[-1])
        low, high = 0, round((rival.highest - rival.lowest) * STEPS)
        while low < high:
            middle = (low + high) // 2
            enough = rate(rival.lowest + middle / STEPS, factor) >= bpp
            low, high = (low, middle) if enough else (middle + 1, high)
        quality = rival.lowest + low / STEPS
        say(f"{rival.name} as {setting}: quality {quality:g}, 1/{factor} of the size")
        plans.append(Plan(factor, quality, f"quality {quality:g}, 1/{factor} of the size, as {setting}"))
    return plans


def means(rows: Iterable[Figures]) -> Figures:
    """Mean of each figure over the rows that have it."""
    every = list(rows)
    found: Figures = {}
    for name in FIGURES:
        values = [value for row in every if (value := row.get(name)) is not None and math.isfinite(value)]
        found[name] = fmean(values) if values else None
    return found


def points_of(rows: Iterable[Row | Nested]) -> list[Point]:
    """The first table: rows by folder, codec and setting."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if isinstance(row, Row):
            groups.setdefault((row.data, row.codec, row.setting), []).append(row)
    return [
        Point(
            *key,
            8 * sum(row.size for row in group) / sum(row.pixels for row in group),
            means(row.figures for row in group),
            {judge: [row.right[judge] for row in group] for judge in group[0].right},
        )
        for key, group in groups.items()
    ]


def nested(codec: ImageCodec) -> NestedQuantiser:
    """The nested codebooks of a codec. Raises UsageError if it has none."""
    bottleneck = codec.bottleneck
    if isinstance(bottleneck, CodebookBottleneck) and isinstance(bottleneck.quantiser, NestedQuantiser):
        return bottleneck.quantiser
    raise UsageError(f"{codec.name} has no nested codebooks: choose a codec such as vqgan")


def recipes_of(rows: Iterable[Row | Nested], sizes: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Rows of the second table: figures by folder, level and recipe.

    Args:
        rows: of all pictures.
        sizes: codes of each level.
    """
    groups: dict[tuple[str, int], dict[str, list[Figures]]] = {}
    for row in rows:
        if isinstance(row, Nested):
            groups.setdefault((row.data, row.level), {}).setdefault(row.recipe, []).append(row.figures)
    found = []
    for (data, level), recipes in groups.items():
        figures = {recipe: means(recipes[recipe]) for recipe in (RELEASED, KMEANS, RANDOM)}
        found.append({"data": data, "level": level, "codes": sizes[level - 1][0], "recipes": figures})
    return found


def best_recipe(row: dict[str, Any]) -> dict[str, bool]:
    """Whether the checkpoint's codebook is the best of a row, by each figure: the greatest PSNR, the least distance."""
    figures = row["recipes"]
    others = [figures[name] for name in (KMEANS, RANDOM)]
    best = {"psnr": all(figures[RELEASED]["psnr"] > other["psnr"] for other in others)}
    return best | {name: all(figures[RELEASED][name] < other[name] for other in others) for name in DISTANCES}


def comparisons(points: Sequence[Point], own: str) -> list[dict[str, Any]]:
    """Accuracies of the checkpoint at its highest level within BPP against every other codec on labelled data, and
    level by level against what was coded at the rate of that level; by every judge."""
    rows = []
    for data in dict.fromkeys(point.data for point in points if point.right):
        here = [point for point in points if point.data == data]
        mine = [point for point in here if point.codec == own and point.bpp <= BPP]
        for other in here if mine else ():
            if other.codec in (own, ORIGINAL):
                continue
            same = [point for point in mine if other.setting.endswith(f"as {point.setting}")]
            if "as level" in other.setting and not same:
                continue
            first = same[0] if same else mine[-1]
            for judge, answers in first.right.items():
                p = mcnemar(np.array(answers), np.array(other.right[judge]))
                gain = fmean(answers) - fmean(other.right[judge])
                rows.append(
                    {
                        "data": data,
                        "judge": judge,
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

    judges = list(dict.fromkeys(judge for point in points for judge in point.right))
    titles = ["PSNR, dB", "MS-SSIM", *(f"distance, {model}" for model in DISTANCES.values())]
    parts = [
        "## Rates",
        markdown_table(
            ["data", "codec", "setting", "bpp", *titles, *(f"accuracy, %, {judge}" for judge in judges)],
            [
                [
                    *(point.data, point.codec, point.setting, f"{point.bpp:.4f}"),
                    *(
                        cell(point.figures[name], digits)
                        for name, digits in zip(FIGURES, (2, 4, 4, 4), strict=True)
                    ),
                    *(cell(point.accuracy.get(judge), 1, 100) for judge in judges),
                ]
                for point in points
            ],
        ),
    ]
    if compared:
        parts += [
            "## Recognition",
            markdown_table(
                [
                    "data",
                    "judge",
                    "ours",
                    "bpp",
                    "against",
                    "setting",
                    "bpp",
                    "ours minus theirs, %",
                    "p",
                    "above",
                ],
                [
                    [
                        *(row["data"], row["judge"], row["ours"], f"{row['bpp']:.4f}", row["other"]),
                        *(row["setting"], f"{row['other_bpp']:.4f}", f"{100 * row['gain']:+.1f}"),
                        *(f"{row['p']:.2g}", "yes" if row["met"] else "no"),
                    ]
                    for row in compared
                ],
            ),
        ]
    if rows:
        shown = [("psnr", "PSNR", 2), *((name, model, 4) for name, model in DISTANCES.items())]
        names = (RELEASED, KMEANS, RANDOM)
        parts += [
            "## Codebooks",
            markdown_table(
                [
                    *("data", "K"),
                    *(f"{title}, {name}" for _, title, _ in shown for name in names),
                    "training best by",
                ],
                [
                    [
                        *(row["data"], str(row["codes"])),
                        *(
                            cell(row["recipes"][name][key], digits)
                            for key, _, digits in shown
                            for name in names
                        ),
                        ", ".join(title for key, title, _ in shown if best_recipe(row)[key]) or "none",
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
    add("--limit", type=int, default=LIMIT, help=f"pictures of a folder (default {LIMIT})")
    add("--close", type=int, default=CLOSE, help=f"how many of these give figures (default {CLOSE})")
    add(
        "--judges",
        nargs="+",
        default=["imagenette-classifier"],
        help="classifiers of Imagenette, by name or folder",
    )
    add(
        "--hyperprior",
        default="hyperprior",
        help="checkpoint of the codec at equal rates; none: leave it out",
    )
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--jobs", type=int, help="processes; one a core, or one on a GPU, unless given")
    arguments = program.parse(parser, argv)
    info = arguments.codec
    sizes = nested(program.image_codec(info, "cpu")).sizes
    levels = tuple(arguments.levels or range(1, len(sizes) + 1))
    rival = None if arguments.hyperprior == "none" else arguments.hyperprior
    options = Options(info, levels, rival, tuple(arguments.judges), arguments.device)
    settings = {
        "codec": info.weights.hex(),
        "rival": find(rival, "image").identity if rival else None,
        "judges": {judge: load_model(judge).identity for judge in options.judges},
        "levels": levels,
        "close": arguments.close,
        "limit": arguments.limit,
    }
    journal = Journal(arguments.output.with_suffix(".rows.jsonl"), settings)
    rows: list[Row | Nested] = []
    with crew(Bench, options, processes(arguments.jobs, arguments.device)) as people:
        for path in arguments.data:
            tasks = sources(path, arguments.limit, arguments.close)
            own = collect(people, journal, tasks, "ours")
            rows += own
            if rival is None:
                continue
            sample = program.spread(tasks, SAMPLE)
            names = {task.name for task in sample}
            rates = points_of(row for row in own if row.item in names)
            wanted = [
                (point.setting, point.bpp)
                for point in rates
                if point.codec == info.name and int(point.setting.split()[1]) in levels[::-1][::2]
            ]
            plans = equal_rates(people, find(rival, "image"), sample, wanted)
            rows += collect(people, journal, tasks, "rival", plans)
    points = points_of(rows)
    codebooks = recipes_of(rows, sizes)
    compared = comparisons(points, info.name)
    folders = ", ".join(path.name for path in arguments.data)
    counts = ", ".join(
        f"{data}: {len(own)} pictures, {sum(bool(row.figures) for row in own)} of them looked at closely"
        for data in dict.fromkeys(row.data for row in rows)
        if (
            own := [
                r for r in rows if isinstance(r, Row) and r.data == data and r.setting == f"level {levels[0]}"
            ]
        )
    )
    report = "\n\n".join(
        [
            "# Pictures as codebook indices",
            (__doc__ or "").strip(),
            f"{info.name}; {counts}.",
            render(points, codebooks, compared),
        ]
    )
    results = {
        "checkpoint": {"name": info.name, "symbols": info.symbols.hex(), "weights": info.weights.hex()},
        "points": [{**point._asdict(), "accuracy": point.accuracy} for point in points],
        "comparisons": compared,
        "codebooks": [{**row, "training_best": best_recipe(row)} for row in codebooks],
    }
    write_results(
        arguments.output,
        results,
        provenance(f"folders {folders}"),
        report=report + "\n",
        force=arguments.force,
    )
    journal.path.unlink()
    print(report)


if __name__ == "__main__":
    main()
