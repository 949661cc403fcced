"""`compand export`: a training run -> a checkpoint folder that encodes and decodes."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from compand import registry
from compand.codec import QUALITY_STEPS
from compand.errors import CheckpointError
from compand.image_codec import TILE, ImageCodec, tile_rows
from compand.train.images import find_images, read_rgb
from compand.weights import check_new, choose_device, save


def load_run(path: Path) -> tuple[ImageCodec, dict[str, Any]]:
    """The codec of a Lightning checkpoint in its trainable state, with averaged weights if the run kept them.

    Returns:
        The codec and the facts of the run (steps, minutes).

    Raises:
        CheckpointError: not a checkpoint of `compand train`.
    """
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        described = run["codec"]
        codec = (
            registry.by_name(described["name"])
            .load_class()
            .from_architecture(described["architecture"], trainable=True)
        )
        if not isinstance(codec, ImageCodec):
            raise TypeError(f"{codec.name} is no image codec")
        state = run["state_dict"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of `compand train`: give a .ckpt file of a run"
        ) from error
    prefix = "codec."
    codec.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return codec, {"steps": run["global_step"], "minutes": run["elapsed_seconds"] / 60}


@torch.inference_mode()
def count_symbols(codec: ImageCodec, images: Iterable[Path], seed: int = 0) -> list[list[Counter[int]]]:
    """How often each symbol occurs with each table, every image at one random quality per level."""
    generator = np.random.default_rng(seed)
    totals: list[list[Counter[int]]] = []
    for path in images:
        pixels = read_rgb(path)
        tile = tile_rows(pixels.shape[0], pixels.shape[1], TILE)[0][0]
        for level in range(codec.levels):
            quality = round(QUALITY_STEPS * (level + generator.uniform(0.5, 1.5)))
            quality = min(max(quality, QUALITY_STEPS), codec.levels * QUALITY_STEPS)
            y = codec.analyse(pixels, tile, quality)
            for i, (indexes, symbols) in enumerate(codec.bottleneck.count(y, quality)):
                keys, counts = np.unique(
                    (indexes.astype(np.int64) << 32) + symbols + (1 << 31), return_counts=True
                )
                tables = keys >> 32
                values = (keys & 0xFFFFFFFF) - (1 << 31)
                while len(totals) <= i:
                    totals.append([])
                total = totals[i]
                total.extend(Counter() for _ in range(int(tables.max()) + 1 - len(total)))
                for table, value, number in zip(
                    tables.tolist(), values.tolist(), counts.tolist(), strict=True
                ):
                    total[table][value] += number
    return totals


def export(codec: ImageCodec, folder: Path, images: Sequence[Path], device: str = "auto") -> None:
    """Freezes a trained codec and writes its checkpoint.

    The tables are made twice: from the trained densities, and again with the symbols that `images` give with those.

    Args:
        codec: trainable codec.
        folder: new folder NAME-vN.
        images: training images; without any, the tables follow the densities alone.
    """
    check_new(folder)
    codec.eval().to(choose_device(device))
    codec.bottleneck.freeze()
    if images:
        counts = count_symbols(codec, images)
        for part, number in zip(counts, codec.bottleneck.table_counts(), strict=True):
            part.extend(Counter() for _ in range(number - len(part)))
        codec.bottleneck.freeze(counts)
    save(codec, folder)


def next_version(root: Path, name: str) -> Path:
    """The first NAME-vN below `root` that does not exist."""
    versions = [int(m[1]) for p in root.glob(f"{name}-v*") if (m := re.fullmatch(rf"{name}-v(\d+)", p.name))]
    return root / f"{name}-v{max(versions, default=0) + 1}"


def main(argv: Sequence[str] | None = None) -> None:
    """`compand export RUN.ckpt`: see --help."""
    parser = argparse.ArgumentParser(
        prog="compand export", description="Turn a training run into a checkpoint."
    )
    parser.add_argument("run", type=Path, help="checkpoint of the run (.ckpt)")
    parser.add_argument(
        "-o", "--output", type=Path, help="checkpoint folder; default: the next checkpoints/NAME-vN"
    )
    parser.add_argument(
        "--data", type=Path, help="folder of training images, to count symbols for the tables"
    )
    parser.add_argument("--images", type=int, default=200, help="how many of them to use (default 200)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    codec, facts = load_run(arguments.run)
    folder = arguments.output or next_version(Path("checkpoints"), codec.name)
    paths = find_images(arguments.data) if arguments.data else []
    if not paths:
        print(
            "compand export: without --data FOLDER the tables follow the densities alone; files get larger",
            file=sys.stderr,
        )
    step = max(math.ceil(len(paths) / arguments.images), 1)
    export(codec, folder, paths[::step], arguments.device)
    write_card(folder, facts)
    print(f"{folder}: {codec.name} after {facts['steps']} steps, {facts['minutes']:.1f} minutes")


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """A CARD.md with what is known; data, licence and measurements are for the author to add."""
    (folder / "CARD.md").write_text(
        f"# {folder.name}\n\n"
        f"- training: {facts['steps']} steps, {facts['minutes']:.1f} minutes\n"
        "- data:\n- hardware:\n- command:\n- licence:\n- measured:\n",
        encoding="utf-8",
    )
