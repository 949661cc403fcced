"""The files of a data folder that an evaluation measures."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compand.errors import MediaError, UsageError
from compand.files import explain
from compand.pictures import Picture, is_image_path, read_picture
from compand.sounds import Sound, is_sound_path, read_sound

Signal = Picture | Sound

MEDIA = ("image", "audio")

_COMPANIONS = frozenset(
    {".cfg", ".csv", ".db", ".gz", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".lst", ".mat", ".md"}
    | {
        ".npy",
        ".npz",
        ".parquet",
        ".pdf",
        ".pkl",
        ".py",
        ".rst",
        ".sh",
        ".tar",
        ".tgz",
        ".toml",
        ".tsv",
        ".txt",
    }
    | {".xml", ".yaml", ".yml", ".zip"}
)
"""Extensions of labels, notes and archives that data sets carry beside their signals."""
_COMPANION_NAMES = frozenset({"AUTHORS", "COPYING", "LICENCE", "LICENSE", "NOTICE", "README"})


@dataclass(frozen=True)
class Item:
    """One file to be measured.

    Attributes:
        name: path relative to the data folder, with "/" and its suffix; the key in every table.
        path: where it is.
        medium: "image" or "audio".
    """

    name: str
    path: Path
    medium: str


class Problem(NamedTuple):
    """What could not be measured, and why; empty fields where it does not concern them."""

    item: str
    codec: str
    quality: float | None
    message: str  # one line


_FOLDERS = re.compile(r"(?<![\w:/.~-])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:;,'\"()]+[/\\])+(?=[^\s/\\])")
"""Folders of an absolute path inside a text; not those of an address, which follow a colon."""


def reason(error: BaseException, item: Item) -> str:
    """An exception as the message of a problem: one line that names the item, and no folder of this machine.

    >>> item = Item("b/a.png", Path("/home/ann/my photos/b/a.png"), "image")
    >>> reason(MediaError("/home/ann/my photos/b/a.png is damaged"), item)
    'b/a.png is damaged'
    """
    text = explain(error, item.name)
    # The item first, whose folders may have any character; then whatever else a library has put into its message.
    for path in (item.path.resolve(), item.path.absolute(), item.path):
        text = text.replace(str(path), item.name)
    text = _FOLDERS.sub("", text)
    return text if item.name in text else f"{item.name}: {text}"


def find_items(
    root: Path, medium: str | None = None, *, exclude: Path | None = None
) -> tuple[list[Item], list[Problem]]:
    """The images or sounds of a folder and of all folders in it, in order of name.

    Hidden files, text, labels and archives are passed over silently; so are the files of the other medium where
    `medium` is given. A single file counts as a folder of one.

    Args:
        root: folder or file.
        medium: "image", "audio", or None for whatever the folder has.
        exclude: a folder that is passed over with all that it holds: that of the results.

    Returns:
        The items, and a problem for every file that is neither an image nor a sound.

    Raises:
        UsageError: nothing there, nothing of the medium, or both media while none was chosen.
    """
    if medium is not None and medium not in MEDIA:
        raise UsageError(f"medium {medium} does not exist: choose image or audio")
    if not root.exists():
        raise UsageError(f"{root} does not exist: check the path")
    items: list[Item] = []
    problems: list[Problem] = []
    for path in [root] if root.is_file() else _files(root, exclude):
        name = path.name if path == root else path.relative_to(root).as_posix()
        kind = "image" if is_image_path(path) else "audio" if is_sound_path(path) else None
        if kind is not None:
            items.append(Item(name, path, kind))
        elif path == root or not _is_companion(path):
            problems.append(Problem(name, "", None, f"{name} is neither an image nor a sound by its name"))
    counts = {kind: sum(item.medium == kind for item in items) for kind in MEDIA}
    if medium is None and all(counts.values()):
        both = f"{counts['image']} images and {counts['audio']} sounds"
        raise UsageError(f"{root} has {both}: choose with --medium image or --medium audio")
    chosen = [item for item in items if medium in (None, item.medium)]
    if not chosen:
        wanted = {"image": "image", "audio": "sound"}.get(medium or "", "image or sound")
        raise UsageError(f"{root} has no {wanted}: name a folder that has some")
    return chosen, problems


def load(item: Item) -> Signal:
    """The samples of an item: an RGB picture in sRGB without transparency, or a sound.

    Gray is repeated, since sizes and figures of gray and color images do not compare; transparency is dropped, with
    a note, since most anchors have none.

    Raises:
        MediaError: the file cannot be read, or is a sound without samples.
    """
    if item.medium == "audio":
        sound = read_sound(item.path)
        if sound.length == 0:
            raise MediaError(f"{item.name} has no samples: leave it out")
        return sound
    return to_rgb(read_picture(item.path, strip=True))


def to_rgb(picture: Picture) -> Picture:
    """A picture of three channels without transparency."""
    notes = picture.notes if picture.alpha is None else (*picture.notes, "transparency dropped")
    pixels = picture.pixels if picture.pixels.shape[2] == 3 else np.repeat(picture.pixels, 3, axis=2)
    return Picture(pixels, None, picture.icc, picture.bit_depth, notes, picture.damage)


def content_hash(item: Item) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the file. Raises MediaError if it cannot be read."""
    try:
        with open(item.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise MediaError(f"{item.name} cannot be read: {error.strerror}") from None


def _files(root: Path, exclude: Path | None) -> list[Path]:
    found = []
    left_out = exclude and exclude.resolve()
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if not name.startswith(".") and Path(folder, name).resolve() != left_out
        ]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _is_companion(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in _COMPANIONS
    return path.name.upper() in _COMPANION_NAMES
