"""What is lost with a fifth of the tokens of a picture, by what stands in for them.

Tokens of every picture are erased at random, or whole rows of them, as damaged packets are; then they are filled:

- nearest: the code of the nearest token that arrived;
- frequent: the most frequent code of the picture's tokens that arrived;
- frequent overall: the most frequent code of the level in training;
- concealer: the checkpoint's masked transformer, as `compand decode --conceal` does.

A loss is what a fill costs against the undamaged tokens, on the same pictures: PSNR in dB, and distance in the features
of a classifier trained in this repository (see `compand.train.perceptual`; no LPIPS, whose weights are not here). `of
best simple` is the concealer's loss over that of the best of the other fills; the aim is at most a half, of both.
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
from compand.codec import Codec
from compand.concealment import ERASED, frequent_fill, nearest_fill
from compand.errors import UsageError
from compand.eval.benchmarks import program
from compand.eval.items import find_items, load
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.image_codec import ImageCodec
from compand.pictures import Picture, psnr
from compand.train.perceptual import ImageDistance
from compand.weights import build, choose_device

RATE = 0.2
SHAPES = ("random", "rows")
INTACT, CONCEALER = "intact", "concealer"
SIMPLE = ("nearest", "frequent", "frequent overall")


class Filled(NamedTuple):
    """One picture with erased tokens, filled."""

    item: str
    level: int
    shape: str
    fill: str
    psnr: float
    features: float
    right: float | None  # share of the erased tokens


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
        found[CONCEALER] = codec.concealer.fill
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


@torch.inference_mode()
def conceal(
    codec: ImageCodec,
    name: str,
    picture: Picture,
    level: int,
    rate: float,
    seed: int,
    distance: ImageDistance,
) -> list[Filled]:
    """All fills of a picture at a level, and the picture with nothing lost."""
    original = as_batch(picture, codec.device)
    tokens = torch.from_numpy(codec.quantise(picture, quality=level)).long()
    size = (picture.height, picture.width)

    def row(shape: str, fill: str, filled: Tensor, lost: Tensor | None) -> Filled:
        shown = codec.detokenize(filled, size=size, quality=level)
        features = float(distance(as_batch(shown, codec.device), original)["perceptual"])
        right = None
        if lost is not None:
            right = float((filled == tokens)[:, lost].double().mean())
        return Filled(name, level, shape, fill, psnr(picture.pixels, shown.pixels), features, right)

    rows = [row("", INTACT, tokens, None)]
    for shape in SHAPES:
        lost = erasure((tokens.shape[1], tokens.shape[2]), rate, shape, seed)
        damaged = tokens.masked_fill(lost, ERASED)
        rows += [row(shape, fill, of(damaged, level).cpu(), lost) for fill, of in fills(codec).items()]
    return rows


def summary(rows: Sequence[Filled]) -> list[dict[str, Any]]:
    """Losses by level, shape and fill, as means over pictures."""
    intact = {(row.item, row.level): row for row in rows if row.fill == INTACT}
    groups: dict[tuple[int, str, str], list[Filled]] = {}
    for row in rows:
        if row.fill != INTACT:
            groups.setdefault((row.level, row.shape, row.fill), []).append(row)
    result: list[dict[str, Any]] = []
    for (level, shape, fill), own in groups.items():
        result.append(
            {
                "level": level,
                "shape": shape,
                "fill": fill,
                "psnr": fmean(row.psnr for row in own),
                "psnr_loss": fmean(intact[row.item, level].psnr - row.psnr for row in own),
                "features": fmean(row.features for row in own),
                "features_loss": fmean(row.features - intact[row.item, level].features for row in own),
                "right": fmean(row.right or 0.0 for row in own),
            }
        )
    for entry in result:
        if entry["fill"] != CONCEALER:
            continue
        beside = [
            other
            for other in result
            if (other["level"], other["shape"]) == (entry["level"], entry["shape"])
            and other["fill"] in SIMPLE
        ]
        for key in ("psnr_loss", "features_loss"):
            best = min(other[key] for other in beside)
            entry[f"{key}_ratio"] = entry[key] / best if best > 0 else None
    return result


def table(entries: Sequence[dict[str, Any]]) -> str:
    """`summary` as Markdown."""

    def ratio(entry: dict[str, Any], key: str) -> str:
        value = entry.get(f"{key}_ratio")
        return "" if value is None else f"{value:.2f}"

    return markdown_table(
        [
            *("fill", "level", "erased", "PSNR, dB", "loss, dB", "of best simple"),
            *("feature distance", "loss", "of best simple", "right, %"),
        ],
        [
            [
                entry["fill"],
                str(entry["level"]),
                entry["shape"],
                f"{entry['psnr']:.2f}",
                f"{entry['psnr_loss']:.2f}",
                ratio(entry, "psnr_loss"),
                f"{entry['features']:.4f}",
                f"{entry['features_loss']:.4f}",
                ratio(entry, "features_loss"),
                f"{100 * entry['right']:.1f}",
            ]
            for entry in entries
        ],
    )


def outcome(entries: Sequence[dict[str, Any]]) -> str:
    """Whether the aim is met, in a sentence a shape."""
    lines = []
    for shape in SHAPES:
        own = [e for e in entries if e["shape"] == shape and e["fill"] == CONCEALER]
        ratios = [e.get(key) for e in own for key in ("psnr_loss_ratio", "features_loss_ratio")]
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
    arguments = program.parse(parser, argv)
    if not 0 < arguments.rate < 1 or math.isnan(arguments.rate):
        raise UsageError(f"a rate of {arguments.rate} cannot be lost: give more than 0 and less than 1")
    codec = build(arguments.codec, arguments.device)
    if not isinstance(codec, ImageCodec) or not codec.vocabulary:
        raise UsageError(f"{arguments.codec.name} has no tokens of pictures: choose a codec such as vqgan")
    items = program.spread(find_items(arguments.data, "image")[0], arguments.limit)
    distance = ImageDistance().eval().requires_grad_(False).to(choose_device(arguments.device))
    levels = arguments.levels or list(range(1, codec.levels + 1))
    rows: list[Filled] = []
    for seed, item in enumerate(items):
        picture = load(item)
        assert isinstance(picture, Picture)
        for level in levels:
            rows += conceal(codec, item.name, picture, level, arguments.rate, seed, distance)
    entries = summary(rows)
    data = f"{len(items)} pictures of {arguments.data.name}"
    report = "\n\n".join(
        [
            "# Lost tokens",
            (__doc__ or "").strip(),
            f"{arguments.codec.name}, {data}, {100 * arguments.rate:g} % erased. Distance: {distance.description}.",
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
