"""What the benchmark programs share: their options, and what these name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from compand import checkpoint
from compand.errors import CheckpointError, UsageError
from compand.eval.provenance import RESULTS, check_unwritten
from compand.image_codec import ImageCodec
from compand.pictures import is_image_path
from compand.weights import build

T = TypeVar("T")


def parser(documentation: str, name: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; `name` is the stem of its results."""
    result = argparse.ArgumentParser(description=documentation.splitlines()[0])
    result.add_argument(
        "-o", "--output", type=Path, default=RESULTS / f"{name}.json", help="results, a .json file"
    )
    result.add_argument("-f", "--force", action="store_true", help="replace existing results")
    return result


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, *suffixes: str) -> argparse.Namespace:
    """The arguments; ends the program if the results, or a file of the same stem and one of `suffixes`, exist."""
    arguments = parser.parse_args(argv)
    try:
        for path in (arguments.output, *map(arguments.output.with_suffix, (".md", *suffixes))):
            check_unwritten(path, force=arguments.force)
    except UsageError as error:
        parser.error(str(error))
    return arguments


def add_codec(parser: argparse.ArgumentParser, default: str = "hyperprior") -> None:
    """The option --codec."""
    parser.add_argument(
        "-c", "--codec", type=_checkpoint, default=default, help="checkpoint: a name or a folder"
    )


def add_pictures(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The option --data: the pictures of a folder, sorted by name."""
    parser.add_argument("--data", type=pictures, required=required, help="folder of pictures")


def image_codec(info: checkpoint.CheckpointInfo, device: str, *, reduced: bool | None = None) -> ImageCodec:
    """The codec of a checkpoint; see `compand.weights.build`. Raises UsageError if it is not one for images."""
    codec = build(info, device, reduced=reduced)
    if not isinstance(codec, ImageCodec):
        raise UsageError(f"{info.name} codes {info.medium}: choose an image codec")
    return codec


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, evenly from all; all of them if there is no limit."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def folder_of(pictures: Sequence[Path]) -> str:
    """Name of the folder that pictures lie in, with their number."""
    return f"{len(pictures)} pictures of {pictures[0].parent.name}"


def _checkpoint(name: str) -> checkpoint.CheckpointInfo:
    try:
        return checkpoint.find(name)
    except CheckpointError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def pictures(folder: str) -> list[Path]:
    """The pictures of a folder, sorted by name, as the type of an option."""
    found = sorted(path for path in Path(folder).glob("*") if is_image_path(path))
    if not found:
        raise argparse.ArgumentTypeError(f"{folder} holds no pictures")
    return found
