"""What learned coding of codebook indices saves against log2 K bits an index.

Every item is encoded at every level; its indices, read back from the file, are then coded with each prior of the
checkpoint by itself:

- uniform: log2 K bits, the reference in bytes;
- static: a table a plane;
- conditional: tables chosen by neighbouring indices or earlier planes;
- context: a causal network of integers.

`chosen` is what files use: the prior that was cheapest for the level in training, or the uniform one where the item
would take more bytes with it. Savings are of all bytes of the indices together, against the exact number of log2 K bits
without rounding to bytes; the worst item is the one with the least saving. A prior that takes more bytes than the
uniform one is replaced by it, item by item, as in files. Every payload is decoded and compared.

Whole files have a header and, in each tile or segment, a length and a checksum beside the indices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compand.audio_codec import AudioCodec
from compand.bottlenecks.codebook import CodebookBottleneck
from compand.checkpoint import CheckpointInfo
from compand.codec import QUALITY_STEPS, Codec
from compand.errors import UsageError
from compand.eval.benchmarks import program
from compand.eval.items import Item, find_items, load
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.pictures import Picture
from compand.sounds import Sound
from compand.weights import build

CHOSEN = "chosen"


class Coded(NamedTuple):
    """The indices of one item at one level."""

    item: str
    level: int
    planes: int
    codes: tuple[int, ...]  # K of each plane
    positions: int  # of one plane
    units: float  # pixels, or seconds
    raw_bits: float  # log2 K for every index
    file: int  # bytes of the whole file
    sizes: dict[str, int]  # bytes of the payload by prior
    decode_ms: dict[str, float]  # by prior
    exact: bool  # whether every payload decodes to the indices


def token_codec(info: CheckpointInfo, device: str = "cpu") -> Codec:
    """The codec of a checkpoint. Raises UsageError if it has no tokens."""
    codec = build(info, device)
    if not codec.vocabulary or not isinstance(codec.bottleneck, CodebookBottleneck):
        raise UsageError(f"{info.name} has no tokens: choose a codec with codebooks (compand codecs)")
    return codec


def priors(codec: Codec) -> list[str]:
    """Names of the priors that a checkpoint has, the uniform one first."""
    assert isinstance(codec.bottleneck, CodebookBottleneck)
    return [kind.name for kind in codec.bottleneck.kinds]


@torch.inference_mode()
def coded(codec: Codec, item: Item, level: int) -> Coded:
    """Codes an item at a level with every prior."""
    bottleneck = codec.bottleneck
    assert isinstance(bottleneck, CodebookBottleneck)
    signal, units = load(item), level * QUALITY_STEPS
    data = codec.encode(signal, quality=level)
    tokens = codec.tokens(data)
    sizes = codec.level_vocabulary(level)
    # Pictures of one plane have no axis for it; sounds have one axis, and groups where they have many channels.
    frames = codec.latent_layout()["axes"] == 1
    grids = tokens.reshape(-1, len(sizes), *((1,) if frames else ()), *tokens.shape[-1 if frames else -2 :])
    lengths: dict[str, int] = {}
    times: dict[str, float] = {}
    exact = True
    for name in (*priors(codec), CHOSEN):
        payloads = [
            bottleneck.compress_indices(grid, units, prior=None if name == CHOSEN else name) for grid in grids
        ]
        start = time.perf_counter()
        shape = (grids.shape[2], grids.shape[3])
        found = [bottleneck.decompress_indices(payload, shape, units) for payload in payloads]
        times[name] = 1000 * (time.perf_counter() - start)
        lengths[name] = sum(map(len, payloads))
        exact &= bool((torch.stack(found).cpu() == grids.cpu()).all())
    extent = signal.seconds if isinstance(signal, Sound) else _pixels(signal)
    positions = grids.shape[0] * grids.shape[2] * grids.shape[3]
    raw = positions * sum(math.log2(size) for size in sizes)
    return Coded(
        item.name,
        level,
        len(sizes),
        tuple(sizes),
        positions,
        extent,
        raw,
        len(data),
        lengths,
        times,
        exact,
    )


def _pixels(picture: Picture) -> float:
    return float(picture.width * picture.height)


def saving(rows: Sequence[Coded], prior: str) -> float:
    """Share of the bits of `rows` that a prior saves against log2 K."""
    return 1 - 8 * sum(row.sizes[prior] for row in rows) / sum(row.raw_bits for row in rows)


def over(row: Coded, prior: str) -> int:
    """Bytes by which a payload is longer than log2 K bits, rounded up to whole bytes."""
    return row.sizes[prior] - math.ceil(row.raw_bits / 8 - 1e-9)


def summary(rows: Sequence[Coded], names: Sequence[str]) -> list[dict[str, Any]]:
    """By level: savings of all priors, of the worst item, rates and times."""
    result = []
    for level in sorted({row.level for row in rows}):
        own = [row for row in rows if row.level == level]
        units = sum(row.units for row in own)
        result.append(
            {
                "level": level,
                "codes": list(own[0].codes),
                "bits_an_index": own[0].raw_bits / own[0].positions / own[0].planes,
                "savings": {name: saving(own, name) for name in names},
                "worst_item": min(saving([row], CHOSEN) for row in own),
                "most_bytes_over": max(over(row, CHOSEN) for row in own),
                "rate_raw": sum(row.raw_bits for row in own) / units,
                "rate_indices": 8 * sum(row.sizes[CHOSEN] for row in own) / units,
                "rate_files": 8 * sum(row.file for row in own) / units,
                "decode_ms": {name: sum(row.decode_ms[name] for row in own) / len(own) for name in names},
                "exact": all(row.exact for row in own),
            }
        )
    return result


def tables(levels: Sequence[dict[str, Any]], names: Sequence[str], sound: bool) -> str:
    """`summary` as Markdown."""
    unit, factor, digits = ("kbps", 1e-3, 3) if sound else ("bpp", 1.0, 4)
    header = ["level", "codes", *(f"{name}, %" for name in names), "worst item, %", "most bytes over log2 K"]
    rates = [f"log2 K, {unit}", f"indices, {unit}", f"files, {unit}"]
    savings = markdown_table(
        header,
        [
            [
                str(row["level"]),
                _codes(row["codes"]),
                *(f"{100 * row['savings'][name]:.2f}" for name in names),
                f"{100 * row['worst_item']:.2f}",
                str(row["most_bytes_over"]),
            ]
            for row in levels
        ],
    )
    rest = markdown_table(
        ["level", *rates, *(f"decode {name}, ms an item" for name in names)],
        [
            [
                str(row["level"]),
                *(f"{factor * row[key]:.{digits}f}" for key in ("rate_raw", "rate_indices", "rate_files")),
                *(f"{row['decode_ms'][name]:.1f}" for name in names),
            ]
            for row in levels
        ],
    )
    exact = all(row["exact"] for row in levels)
    checked = (
        "Every payload decodes to its indices."
        if exact
        else "**Some payloads do not decode to their indices.**"
    )
    return "\n\n".join(["## Bits saved", savings, "## Rates and times", rest, checked])


def _codes(sizes: Sequence[int]) -> str:
    same = set(sizes) == {sizes[0]}
    return f"{len(sizes)} x {sizes[0]}" if same and len(sizes) > 1 else ", ".join(map(str, sizes))


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "index_coding")
    program.add_codec(parser, "vqgan")
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures or sounds")
    parser.add_argument("--levels", type=int, nargs="+", help="levels; all unless given")
    parser.add_argument("--limit", type=int, help="take so many items alone")
    arguments = program.parse(parser, argv)
    codec = token_codec(arguments.codec)
    found, _ = find_items(arguments.data, codec.medium)
    items = program.spread(found, arguments.limit)
    chosen = arguments.levels or range(1, codec.levels + 1)
    rows = [coded(codec, item, level) for level in chosen for item in items]
    names = [*priors(codec), CHOSEN]
    levels = summary(rows, names)
    title = f"{arguments.codec.name}, {len(items)} items of {arguments.data.name}."
    report = "\n\n".join(
        [
            "# Coding of indices",
            (__doc__ or "").strip(),
            title,
            tables(levels, names, isinstance(codec, AudioCodec)),
        ]
    )
    results = {
        "checkpoint": arguments.codec.name,
        "symbols": arguments.codec.symbols.hex(),
        "levels": levels,
        "items": [row._asdict() for row in rows],
    }
    origin = provenance(f"{len(items)} items of {arguments.data.name}")
    write_results(arguments.output, results, origin, report=report + "\n", force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
