"""What a packed set holds: facts for `compand info`, read without a codec, and a grid of its first pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from compand import files
from compand.data.info import sizes_as_text
from compand.data.packed import INDEX, PackedReader
from compand.data.payload import RowCodec
from compand.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from compand.pictures import Picture

GRID = 4
"""Pictures on an edge of the grid."""

THUMBNAIL = 224
"""Longest edge of a picture of the grid, in pixels."""


def describe(path: str) -> dict[str, Any]:
    """Facts of a packed set, or of a shard, as JSON holds them. Raises PackedSetError."""
    reader = PackedReader(path)
    info = reader.info
    columns = {name: np.asarray(reader.column(name)) for name in (*info.geometry, "source_bytes")}
    size = sum(shard.stat().st_size for shard in reader.shards)
    sources = int(columns["source_bytes"].sum())
    record: dict[str, Any] = {
        "set": path,
        "rows": len(reader),
        "shards": len(reader.shards),
        "bytes": size,
        "bytes_a_row": size / len(reader),
        "source_bytes": sources,
        "ratio": sources / size,
        "medium": info.medium,
        "checkpoint": info.checkpoint,
        "installed": _installed(info.checkpoint, info.symbols, info.synthesis),
        "symbols": info.symbols,
        "synthesis": info.synthesis,
        "quality": info.level,
        "profile": info.profile,
        "compression": info.compression,
        "latent": dict(info.latent),
        "latent_shapes": _latent_shapes(reader, columns),
        "vocabulary": list(info.vocabulary),
        "columns": reader.columns,
        "skipped": _skipped(path),
    }
    if info.medium == "image":
        pixels = columns["height"].astype(np.int64) * columns["width"]
        record["sizes"] = {name: _span(columns[name]) for name in ("width", "height")}
        record["bpp"] = 8 * size / int(pixels.sum())
    else:
        seconds = float((columns["samples"] / columns["rate"]).sum())
        record["seconds"] = seconds
        record["rates"] = np.unique(columns["rate"]).tolist()
        record["kbps"] = size / 125 / seconds
    if "label" in reader.columns:
        record["classes"] = _classes(reader)
    return record


def _installed(name: str, symbols: str, synthesis: str) -> bool:
    from compand.checkpoint import find

    try:
        found = find(name)
    except CheckpointError:
        return False
    return (found.symbols.hex(), found.synthesis.hex()) == (symbols, synthesis)


def _latent_shapes(reader: PackedReader, columns: dict[str, NDArray[Any]]) -> list[list[int]]:
    """Shape of the smallest and of the largest row's latents; one where they are the same."""
    geometry = np.stack([columns[name] for name in reader.info.geometry], axis=1)
    distinct = np.unique(geometry, axis=0)
    shapes = {
        reader.info.latent_shape(dict(zip(reader.info.geometry, row, strict=True)))
        for row in distinct.tolist()
    }
    ordered = sorted(shapes, key=lambda shape: (int(np.prod(shape)), shape))
    return [list(ordered[0]), *([list(ordered[-1])] if len(ordered) > 1 else [])]


def _span(values: NDArray[Any]) -> list[int]:
    return [int(values.min()), int(values.max())]


def _classes(reader: PackedReader) -> dict[str, int]:
    """Rows of each class, or of each label where classes have no names."""
    labels = np.asarray(reader.column("label"))
    names = reader.info.classes
    if names is None:
        values, counts = np.unique(labels, return_counts=True)
        return {str(value): int(count) for value, count in zip(values, counts, strict=True)}
    return {name: int((labels == number).sum()) for number, name in enumerate(names)}


def _skipped(path: str) -> int:
    """Inputs that packing left out."""
    try:
        return int(json.loads((Path(path) / INDEX).read_text(encoding="utf-8"))["failures"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def as_text(record: dict[str, Any]) -> str:
    """`describe` for a reader."""
    sizes = record["vocabulary"]
    tokens = f"{len(sizes)} a position, of {sizes_as_text(sizes)} codes" if sizes else ""
    latents = " to ".join(" x ".join(map(str, shape)) for shape in record["latent_shapes"])
    if record["medium"] == "image":
        edges = " x ".join(
            f"{low} to {high}" if low != high else str(low) for low, high in record["sizes"].values()
        )
        content, rate = f"{record['rows']} pictures, {edges} pixels", f"{record['bpp']:.3f} bpp"
    else:
        rates = ", ".join(map(str, record["rates"]))
        content = f"{record['rows']} sounds, {record['seconds'] / 60:.1f} minutes, {rates} Hz"
        rate = f"{record['kbps']:.2f} kbps"
    profile = f"{record['profile']}{', ' + record['compression'] if record['compression'] else ''}"
    state = "" if record["installed"] else ", not installed here"
    shards = f"{record['shards']} shard{'s' * (record['shards'] != 1)}"
    classes = record.get("classes", {})
    shown = [f"{name} {count}" for name, count in list(classes.items())[:20]]
    shown += [f"and {len(classes) - 20} more"] if len(classes) > 20 else []
    rows = [
        ("content", content),
        ("skipped", f"{record['skipped']} inputs, see failures.csv" if record["skipped"] else ""),
        (
            "size",
            f"{record['bytes']} bytes in {shards}, {record['bytes_a_row']:.0f} a row, {rate}",
        ),
        ("source", f"{record['source_bytes']} bytes, {record['ratio']:.2f} times as many"),
        ("codec", f"{record['checkpoint']}, {record['symbols']} {record['synthesis']}{state}"),
        ("quality", f"{record['quality']:g}"),
        ("profile", profile),
        ("latents", latents),
        ("tokens", tokens),
        ("classes", f"{len(classes)}: {', '.join(shown)}" if classes else ""),
        ("columns", ", ".join(record["columns"])),
    ]
    return "\n".join([record["set"], *(f"  {label:<8} {value}" for label, value in rows if value)])


def write_grid(path: str, target: Path, *, device: str = "auto", force: bool = False) -> None:
    """Writes the first 16 pictures of a set, decoded, as one picture.

    Raises:
        UsageError: the set holds sounds, or the target is no picture.
        PackedSetError, MediaError: a row is damaged; the target cannot be written.
    """
    from PIL import Image

    from compand.checkpoint import load

    reader = PackedReader(path)
    if reader.info.medium != "image":
        raise UsageError(f"{path} holds sounds: --grid shows pictures")
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"{target} has no suffix of a picture format: name a .png file")
    coder = RowCodec(reader.info, load(reader.info.checkpoint, device=device))
    pictures: list[Image.Image] = []
    for index in range(min(GRID * GRID, len(reader))):
        row = reader.row(index, ("payload", *reader.info.geometry))
        picture = cast("Picture", coder.samples(row["payload"], row))
        image = picture.to_pil().convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        pictures.append(image)
    with files.atomic_write(target, force=force) as stream:
        _tiled(pictures).save(stream, format=Image.registered_extensions()[target.suffix.lower()])


def _tiled(pictures: list[Image.Image]) -> Image.Image:
    from PIL import Image

    columns = min(GRID, len(pictures))
    width, height = max(one.width for one in pictures), max(one.height for one in pictures)
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for number, one in enumerate(pictures):
        row, column = divmod(number, columns)
        grid.paste(
            one, (column * width + (width - one.width) // 2, row * height + (height - one.height) // 2)
        )
    return grid
