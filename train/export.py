"""`compand export`: a training run -> a checkpoint folder that encodes and decodes."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compand import registry
from compand.audio_codec import AudioCodec
from compand.checkpoint import CheckpointInfo, find
from compand.codec import QUALITY_STEPS, Codec
from compand.errors import CheckpointError
from compand.image_codec import TILE, ImageCodec, tile_rows
from compand.sounds import read_sound, resample
from compand.train import ledger
from compand.train.images import find_images, read_rgb
from compand.train.sounds import find_sounds, split
from compand.weights import adopt_symbols, check_new, choose_device, save

EXCERPT = 2**17
"""Samples of an excerpt of a sound whose symbols are counted."""

PART = 2**19
"""Samples of a sound in which one excerpt lies."""


def load_run(path: Path) -> tuple[Codec, dict[str, Any]]:
    """The codec of a Lightning checkpoint in its trainable state, with averaged weights if the run kept them.

    Returns:
        The codec and the facts of the run: steps, minutes, seconds of GPUs, the arguments of its data module, in words
        what it was held to if that is more than rate and squared error, what it started from and the ledger of that.

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
        state = run["state_dict"]
        facts = {
            "steps": run["global_step"],
            "minutes": run["elapsed_seconds"] / 60,
            "gpu_seconds": run.get("gpu_seconds", 0.0),
            "data": run.get("datamodule_hyper_parameters") or {},
            "objective": run.get("objective"),
            "started_from": run.get("started_from", ""),
            "ledger": run.get("ledger", []),
        }
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of `compand train`: give a .ckpt file of a run"
        ) from error
    prefix = "codec."
    codec.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return codec, facts


def picture_latents(codec: ImageCodec, path: Path, qualities: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    """Latents [1, M, h, w] of the first tile of a picture at every one of some qualities, with the quality."""
    pixels = read_rgb(path)
    tile = tile_rows(pixels.shape[0], pixels.shape[1], TILE)[0][0]
    yield from _at_each(codec, qualities, lambda quality: codec.analyse(pixels, tile, quality))


def sound_latents(
    codec: AudioCodec, path: Path, qualities: Sequence[int], generator: np.random.Generator
) -> Iterator[tuple[Tensor, int]]:
    """Latents [1, M, 1, n] of excerpts of a sound at every one of some qualities, with the quality.

    One excerpt of `EXCERPT` samples lies anywhere in each part of `PART`; each group of the codec's channels comes on
    its own.
    """
    sound = read_sound(path)
    if codec.rate is not None:
        sound = resample(sound, codec.rate)
    for begin in range(0, sound.length, PART):
        part = sound.samples[:, begin : begin + PART]
        start = int(generator.integers(max(part.shape[1] - EXCERPT, 0) + 1))
        excerpt = part[:, start : start + EXCERPT]
        for y, quality in _at_each(codec, qualities, partial(codec.analyse, excerpt)):
            for group in y.split(1):
                yield group, quality


def _at_each(
    codec: Codec, qualities: Sequence[int], analyse: Callable[[int], Tensor]
) -> Iterator[tuple[Tensor, int]]:
    """Latents at every one of some qualities, with the quality; analysed once where that does for all."""
    y = None
    for quality in qualities:
        if y is None or not codec.transform.one_analysis:
            y = analyse(quality)
        yield y, quality


@torch.inference_mode()
def count_symbols(codec: Codec, files: Iterable[Path], seed: int = 0) -> list[list[Counter[int]]]:
    """How often each symbol occurs with each table, every picture or sound at one random quality per level (of codecs
    with tokens, at the level itself)."""
    generator = np.random.default_rng(seed)
    totals: list[list[Counter[int]]] = []
    for path in files:
        # Between its levels, a codec with tokens is as at the level below.
        aside = 1.0 if codec.vocabulary else generator.uniform(0.5, 1.5, codec.levels)
        drawn = np.round(QUALITY_STEPS * (np.arange(codec.levels) + aside))
        qualities = drawn.astype(int).clip(QUALITY_STEPS, codec.levels * QUALITY_STEPS).tolist()
        latents = (
            sound_latents(codec, path, qualities, generator)
            if isinstance(codec, AudioCodec)
            else picture_latents(cast(ImageCodec, codec), path, qualities)
        )
        for y, quality in latents:
            for i, (indexes, symbols) in enumerate(codec.bottleneck.count(y, quality)):
                while len(totals) <= i:
                    totals.append([])
                _add(totals[i], indexes, symbols)
    return totals


def _add(totals: list[Counter[int]], indexes: NDArray[np.int64], symbols: NDArray[np.int32]) -> None:
    """Adds the symbols coded with each table to the counts of that table."""
    # An index and a symbol make one integer, so that one sort counts the pairs.
    keys, counts = np.unique((indexes.astype(np.int64) << 32) + symbols + (1 << 31), return_counts=True)
    tables, values = keys >> 32, (keys & 0xFFFFFFFF) - (1 << 31)
    totals.extend(Counter() for _ in range(int(tables.max(initial=-1)) + 1 - len(totals)))
    for table, value, number in zip(tables.tolist(), values.tolist(), counts.tolist(), strict=True):
        totals[table][value] += number


def export(
    codec: Codec,
    folder: Path,
    files: Sequence[Path],
    device: str = "auto",
    symbols_of: CheckpointInfo | None = None,
) -> None:
    """Freezes a trained codec and writes its checkpoint.

    The tables are made twice: from the trained densities, and again with the symbols that `files` give with those.

    Args:
        codec: trainable codec.
        folder: new folder NAME-vN.
        files: training pictures or sounds; without any, the tables follow the densities alone.
        symbols_of: checkpoint whose tables and prior are taken over, so that its files get this synthesis.
    """
    check_new(folder)
    codec.eval().to(choose_device(device))
    if symbols_of is not None:
        adopt_symbols(codec, symbols_of)
        save(codec, folder)
        return
    codec.bottleneck.freeze()
    if files:
        counts = count_symbols(codec, files)
        for part, number in zip(counts, codec.bottleneck.table_counts(), strict=True):
            part.extend(Counter() for _ in range(number - len(part)))
        codec.bottleneck.freeze(counts)
    save(codec, folder)


def training_files(codec: Codec, root: Path, data: Mapping[str, Any]) -> list[Path]:
    """The files below a folder that suit a codec's medium.

    Args:
        data: arguments of the run's data module; sounds that it held out are left out.
    """
    if codec.medium == "image":
        return find_images(root)
    return split(find_sounds(root), data.get("held_out") or (), data.get("every_third") or ())[0]


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
        "--data",
        type=Path,
        nargs="+",
        default=[],
        help="folders of training images or sounds, to count symbols for the tables; sounds that the run held out "
        "are left out",
    )
    parser.add_argument(
        "--files", "--images", type=int, default=200, help="how many to use of each folder (default 200)"
    )
    parser.add_argument(
        "--symbols-of",
        metavar="CHECKPOINT",
        help="keep the tables and the prior of this checkpoint, of which the run trained the synthesis on",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    if arguments.output is not None:
        check_new(arguments.output)
    codec, facts = load_run(arguments.run)
    folder = arguments.output or next_version(Path("checkpoints"), codec.name)
    symbols_of = find(arguments.symbols_of) if arguments.symbols_of else None
    if not arguments.data and symbols_of is None:
        print(
            "compand export: without --data FOLDER the tables follow the densities alone; files get larger",
            file=sys.stderr,
        )
    files: list[Path] = []
    for root in arguments.data:
        found = training_files(codec, root, facts["data"])
        files += found[:: max(math.ceil(len(found) / arguments.files), 1)]
    export(codec, folder, files, arguments.device, symbols_of)
    tables = (
        f"those of {symbols_of.name}"
        if symbols_of
        else f"symbols counted on {', '.join(path.name for path in arguments.data)}"
        if files
        else "of the trained densities alone"
    )
    write_card(folder, codec, facts, tables)
    print(f"{folder}: {codec.name} after {facts['steps']} steps, {facts['minutes']:.1f} minutes")


def write_card(folder: Path, codec: Codec, facts: Mapping[str, Any], tables: str) -> None:
    """A CARD.md with all that the run knows; terms and measurements are for the author to add.

    Args:
        facts: of `load_run`.
        tables: where the integer tables come from.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    latent = ", ".join(f"{name} {value}" for name, value in config["latent"].items())
    low, high = config["qualities"]
    data = ", ".join(f"{k} {v}" for k, v in facts["data"].items() if not k.startswith("_")) or "not recorded"
    levels = f"lambda {codec.lambdas[0]:g} to {codec.lambdas[-1]:g}"
    if codec.vocabulary:
        levels = f"codebooks of {' | '.join(', '.join(map(str, sizes)) for sizes in codec.vocabulary)}"
    rows = {
        "codec": f"{codec.name}, {config['parameters']:,} numbers",
        "qualities": f"{low} to {high}; {levels}",
        "latents": latent,
        "training": f"{facts['steps']} steps, {facts['minutes']:.1f} minutes"
        + (f", from {facts['started_from']}" if facts["started_from"] else ""),
        "objective": facts.get("objective") or "rate and mean squared error",
        "data": data,
        "tables": tables,
        "exported": f"{date.today().isoformat()}, torch {torch.__version__}",
        "terms": "to be stated by the author: of the weights and of the data",
    }
    measure = "Kodak BD-rate against VTM" if codec.medium == "image" else "measured"
    write_rows(folder, rows, ledger.table(ledger.extended(facts, folder.name), measure))


def write_rows(folder: Path, rows: Mapping[str, str], section: str = "") -> None:
    """The CARD.md of a checkpoint that nothing is measured of yet: a table of its facts, and a further section."""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    (folder / "CARD.md").write_text(
        f"# {folder.name}\n\n| | |\n|---|---|\n{table}\n\n## Measured\n\n"
        f"Nothing yet: `compand eval rd FOLDER -c {folder}` measures rate and distortion.\n"
        + (f"\n{section}\n" if section else ""),
        encoding="utf-8",
    )
