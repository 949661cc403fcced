"""What is lost with a fifth of the tokens of a picture, by what stands in for them.

Tokens of every picture are erased at random, or whole rows of them, as damaged packets are; then they are filled:

- nearest: the code of the nearest token that arrived;
- frequent: the most frequent code of the picture's tokens that arrived;
- frequent overall: the most frequent code of the level in training;
- concealer: the checkpoint's masked transformer, as `compand decode --conceal` does: the mean of what the codes stand
  for, each as likely as it holds it to be;
- concealer, codes: the codes that it holds to be likeliest, the surest first.

Quality is that against the original: PSNR in dB, and distances in the features of networks trained in this repository
(see `compand.train.perceptual`; no LPIPS, whose weights are not here). A loss is what a fill costs of it against the
undamaged tokens, on the same pictures. `of best simple` is the concealer's loss over that of the best of the simple
fills, by the mean over pictures; the aim is at most a half, of PSNR and of the features of `imagenette-classifier`.
Codec and concealer were trained on these features too, not on those of `camvid-segmenter`, which are shown beside.
`right` is the share of erased tokens that are filled with the code that was lost. Erasures are the same for all fills.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compand.bottlenecks.codebook import CodebookBottleneck
from compand.checkpoint import CheckpointInfo
from compand.codec import QUALITY_STEPS, Codec
from compand.concealment import ERASED, frequent_fill, nearest_fill
from compand.errors import UsageError
from compand.eval.benchmarks import program
from compand.eval.benchmarks.crew import crew, processes, say
from compand.eval.items import Item, find_items, load
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.image_codec import ImageCodec
from compand.pictures import Picture, psnr
from compand.train.perceptual import ImageDistance
from compand.weights import build

RATE = 0.2
SHAPES = ("random", "rows")
INTACT, CONCEALER, CODES = "intact", "concealer", "concealer, codes"
SIMPLE = ("nearest", "frequent", "frequent overall")

DISTANCES = {"features": "imagenette-classifier", "other_features": "camvid-segmenter"}
"""Distances of features, and the model that they are of."""

AIMED = ("psnr", "features")
"""Losses that are to be halved."""


class Filled(NamedTuple):
    """One picture with erased tokens, filled."""

    item: str
    level: int
    shape: str
    fill: str
    psnr: float
    features: float
    other_features: float
    right: float | None  # share of the erased tokens


class Options(NamedTuple):
    """What processes are told."""

    codec: CheckpointInfo
    levels: tuple[int, ...]
    rate: float
    device: str


Fill = Callable[[Tensor, int], Tensor]
"""Tokens [planes, h, w] with -1, and level -> tokens."""


def fills(codec: Codec) -> dict[str, Fill]:
    """Ways to fill tokens, by name."""
    bottleneck = codec.bottleneck
    assert isinstance(bottleneck, CodebookBottleneck)

    def overall(tokens: Tensor, level: int) -> Tensor:
        usage = bottleneck.quantiser.usage()
        sizes = bottleneck.quantiser.sizes[level - 1]
        # Quantisers whose levels have codebooks of their own list these in the order of levels.
        first = 0 if len(sizes) > 1 or len(usage) < codec.levels else level - 1
        codes = [int(share.argmax()) for share in usage[first : first + len(sizes)]]
        return frequent_fill(tokens, codes)

    found: dict[str, Fill] = {
        "nearest": lambda tokens, level: nearest_fill(tokens),
        "frequent": lambda tokens, level: frequent_fill(tokens),
        "frequent overall": overall,
    }
    if codec.concealer is not None:
        found[CODES] = codec.concealer.fill
    return found


def erasure(size: tuple[int, int], rate: float, shape: str, seed: int) -> Tensor:
    """Which tokens of a grid are lost, bool [h, w]; at least one is, and at least one is not.

    Args:
        size: rows and columns.
        rate: share that is lost, exactly but for rounding.
        shape: "random", or "rows" for whole ones.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    units = size[0] if shape == "rows" else size[0] * size[1]
    count = min(max(round(rate * units), 1), units - 1)
    lost = torch.zeros(units, dtype=torch.bool)
    lost[torch.randperm(units, generator=generator)[:count]] = True
    return lost[:, None].expand(size) if shape == "rows" else lost.view(size)


def as_batch(picture: Picture, device: torch.device) -> Tensor:
    """Pixels in [0, 1], [1, 3, h, w]."""
    pixels = torch.from_numpy(np.ascontiguousarray(picture.pixels)).permute(2, 0, 1)[None]
    return pixels.to(device).float() / 255


def codec_with_tokens(info: CheckpointInfo, device: str) -> ImageCodec:
    """The codec of a checkpoint. Raises UsageError if it has no tokens of pictures."""
    codec = build(info, device)
    if not isinstance(codec, ImageCodec) or not codec.vocabulary:
        raise UsageError(f"{info.name} has no tokens of pictures: choose a codec such as vqgan")
    return codec


class Bench:
    """Measures fills.

    Args:
        options: of the run.

    Raises:
        UsageError: the codec has no tokens of pictures.
    """

    def __init__(self, options: Options) -> None:
        self.codec, self.options = codec_with_tokens(options.codec, options.device), options
        self.distances = {
            name: ImageDistance((model,)).eval().requires_grad_(False).to(self.codec.device)
            for name, model in DISTANCES.items()
        }

    @torch.inference_mode()
    def conceal(self, picture: Picture, name: str, level: int, seed: int) -> list[Filled]:
        """All fills of a picture at a level, and the picture with nothing lost."""
        codec = self.codec
        original = as_batch(picture, codec.device)
        wanted = {key: distance.features(original) for key, distance in self.distances.items()}
        tokens = torch.from_numpy(codec.quantise(picture, quality=level)).long()

        def row(shape: str, fill: str, latents: Tensor, right: float | None) -> Filled:
            shown = codec.reconstruct(
                latents,
                height=picture.height,
                width=picture.width,
                channels=picture.pixels.shape[2],
                quality=level,
            )
            batch = as_batch(shown, codec.device)
            features = {
                key: float(distance.between(batch, wanted[key])) for key, distance in self.distances.items()
            }
            distortion = psnr(picture.pixels, shown.pixels)
            return Filled(name, level, shape, fill, distortion, **features, right=right)

        rows = [row("", INTACT, codec.dequantise(tokens, quality=level), None)]
        for shape in SHAPES:
            lost = erasure((tokens.shape[1], tokens.shape[2]), self.options.rate, shape, seed)
            damaged = tokens.masked_fill(lost, ERASED)
            for fill, of in fills(codec).items():
                filled = of(damaged, level).cpu()
                right = float((filled == tokens)[:, lost].double().mean())
                rows.append(row(shape, fill, codec.dequantise(filled, quality=level), right))
            if codec.concealer is not None:
                rows.append(row(shape, CONCEALER, codec.restore(damaged, level * QUALITY_STEPS), None))
        return rows


def measured(bench: Bench, task: tuple[int, Item]) -> list[Filled]:
    """All fills of a picture at all levels; task: seed of the erasures, and the picture."""
    seed, item = task
    picture = load(item)
    assert isinstance(picture, Picture)
    return [row for level in bench.options.levels for row in bench.conceal(picture, item.name, level, seed)]


def summary(rows: Sequence[Filled]) -> list[dict[str, Any]]:
    """Losses by level, shape and fill, as means over pictures."""
    intact = {(row.item, row.level): row for row in rows if row.fill == INTACT}
    groups: dict[tuple[int, str, str], list[Filled]] = {}
    for row in rows:
        if row.fill != INTACT:
            groups.setdefault((row.level, row.shape, row.fill), []).append(row)
    result: list[dict[str, Any]] = []
    for (level, shape, fill), own in groups.items():
        known = [row.right for row in own if row.right is not None]
        entry = {"level": level, "shape": shape, "fill": fill, "right": fmean(known) if known else None}
        for key, sign in (("psnr", -1), *((key, 1) for key in DISTANCES)):
            entry[key] = fmean(getattr(row, key) for row in own)
            costs = [getattr(row, key) - getattr(intact[row.item, level], key) for row in own]
            entry[f"{key}_loss"] = sign * fmean(costs)
        result.append(entry)
    for entry in result:
        if entry["fill"] in SIMPLE:
            continue
        beside = [
            other
            for other in result
            if (other["level"], other["shape"]) == (entry["level"], entry["shape"])
            and other["fill"] in SIMPLE
        ]
        for key in ("psnr_loss", *(f"{key}_loss" for key in DISTANCES)):
            best = min(other[key] for other in beside)
            entry[f"{key}_ratio"] = entry[key] / best if best > 0 else None
    return result


def table(entries: Sequence[dict[str, Any]]) -> str:
    """`summary` as Markdown."""

    def cell(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "" if value is None else f"{factor * value:.{digits}f}"

    columns = [("psnr", "PSNR, dB", 2), *((key, f"distance, {model}", 4) for key, model in DISTANCES.items())]
    return markdown_table(
        [
            *("fill", "level", "erased"),
            *(text for _, title, _ in columns for text in (title, "loss", "of best simple")),
            "right, %",
        ],
        [
            [
                *(entry["fill"], str(entry["level"]), entry["shape"]),
                *(
                    text
                    for key, _, digits in columns
                    for text in (
                        cell(entry[key], digits),
                        cell(entry[f"{key}_loss"], digits),
                        cell(entry.get(f"{key}_loss_ratio"), 2),
                    )
                ),
                cell(entry["right"], 1, 100),
            ]
            for entry in entries
        ],
    )


def outcome(entries: Sequence[dict[str, Any]]) -> str:
    """Whether the aim is met, in a sentence a shape."""
    lines = []
    for shape in SHAPES:
        own = [e for e in entries if e["shape"] == shape and e["fill"] == CONCEALER]
        ratios = [e.get(f"{key}_loss_ratio") for e in own for key in AIMED]
        known = [value for value in ratios if value is not None]
        if not known:
            continue
        worst = max(known)
        lines.append(
            f"- {shape}: {'met' if worst <= 0.5 else 'missed'}; "
            f"the worst of all levels and both measures is {worst:.2f}."
        )
    return "\n".join(lines) or "The checkpoint has no concealer: only the simple fills were measured."


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "concealment")
    program.add_codec(parser, "vqgan")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of pictures")
    add("--levels", type=int, nargs="+", help="levels; all unless given")
    add("--rate", type=float, default=RATE, help="share of the tokens that is lost")
    add("--limit", type=int, help="take so many pictures alone")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--jobs", type=int, help="processes; one a core, or one on a GPU, unless given")
    arguments = program.parse(parser, argv)
    if not 0 < arguments.rate < 1 or math.isnan(arguments.rate):
        raise UsageError(f"a rate of {arguments.rate} cannot be lost: give more than 0 and less than 1")
    codec = codec_with_tokens(arguments.codec, "cpu")
    levels = tuple(arguments.levels or range(1, codec.levels + 1))
    options = Options(arguments.codec, levels, arguments.rate, arguments.device)
    items = program.spread(find_items(arguments.data, "image")[0], arguments.limit)
    tasks = list(enumerate(items))
    found: dict[int, list[Filled]] = {}
    with crew(Bench, options, processes(arguments.jobs, arguments.device)) as people:
        for number, own in people.each(measured, tasks):
            found[number] = own
            say(f"{len(found)} of {len(items)} pictures")
    rows = [row for number in sorted(found) for row in found[number]]
    entries = summary(rows)
    data = f"{len(items)} pictures of {arguments.data.name}"
    report = "\n\n".join(
        [
            "# Lost tokens",
            (__doc__ or "").strip(),
            f"{arguments.codec.name}, {data}, {100 * arguments.rate:g} % erased.",
            outcome(entries),
            table(entries),
        ]
    )
    results = {
        "checkpoint": arguments.codec.name,
        "rate": arguments.rate,
        "summary": entries,
        "rows": [row._asdict() for row in rows],
    }
    write_results(arguments.output, results, provenance(data), report=report + "\n", force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
