"""Places that packing reads from and writes to: local paths, and URLs (s3://, gs://, ...) where fsspec is installed.

A place is a string. Local ones need no fsspec; `file://` URLs are local paths.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from compand import files
from compand.errors import UsageError


def normal(place: str | os.PathLike[str]) -> str:
    """A place in the form in which the other functions take it: without `file://` and a slash at the end."""
    text = os.fspath(place).removeprefix("file://")
    return text.rstrip("/") or "/"


def is_remote(place: str) -> bool:
    """Whether a place is a URL.

    >>> is_remote("s3://bucket/set"), is_remote("/data/set")
    (True, False)
    """
    return "://" in place


def absolute(place: str) -> str:
    """A local place that does not depend on a process's folder; URLs as they are."""
    return place if is_remote(place) else os.path.abspath(place)


def join(place: str, *names: str) -> str:
    """A place below another; an absolute name replaces it."""
    if is_remote(place) and not any(is_remote(name) or name.startswith("/") for name in names):
        return "/".join((place, *names))
    if names and is_remote(names[-1]):
        return names[-1]
    return os.path.join(place, *names)


def exists(place: str) -> bool:
    """Whether there is a file or folder."""
    if is_remote(place):
        system, path = _system(place)
        return bool(system.exists(path))
    return os.path.exists(place)


def is_folder(place: str) -> bool:
    """Whether the place is a folder, or a prefix of an object store."""
    if is_remote(place):
        system, path = _system(place)
        return bool(system.isdir(path))
    return os.path.isdir(place)


def size(place: str) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        if is_remote(place):
            system, path = _system(place)
            return int(system.size(path))
        return os.stat(place).st_size
    except FileNotFoundError:
        return None


def read(place: str) -> bytes:
    """All bytes of a file. Raises OSError."""
    with open_input(place) as stream:
        return stream.read()


def open_input(place: str) -> BinaryIO:
    """A stream that can seek. Raises OSError."""
    if is_remote(place):
        system, path = _system(place)
        return cast(BinaryIO, system.open(path, "rb"))
    return open(place, "rb")


def names(folder: str) -> list[str]:
    """The names of what is in a folder, sorted, hidden ones included; none where there is no folder."""
    if is_remote(folder):
        system, path = _system(folder)
        try:
            entries = system.ls(path, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        found = (entry.rstrip("/").rpartition("/")[2] for entry in entries)
        return sorted({name for name in found if name and name != path.rstrip("/").rpartition("/")[2]})
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def folders(folder: str) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    found = (name for name in names(folder) if not name.startswith("."))
    return [name for name in found if is_folder(join(folder, name))]


def walk(folder: str) -> Iterator[str]:
    """The files below a folder, without hidden ones, relative to it and with forward slashes, in no certain order."""
    if is_remote(folder):
        system, path = _system(folder)
        prefix = path.rstrip("/") + "/"
        for found in system.find(path):
            name = found.removeprefix(prefix)
            if not any(part.startswith(".") for part in name.split("/")):
                yield name
        return
    for parent, inner, found in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        place = Path(parent).relative_to(folder)
        yield from ((place / name).as_posix() for name in found if not name.startswith("."))


def remove(place: str) -> None:
    """Removes a file, or an empty folder; nothing happens where there is none."""
    with suppress(FileNotFoundError):
        if is_remote(place):
            system, path = _system(place)
            # Object stores have no folders that stay behind.
            system.rm_file(path) if system.isfile(path) else None
        elif os.path.isdir(place):
            os.rmdir(place)
        else:
            os.unlink(place)


@contextmanager
def writing(place: str) -> Iterator[BinaryIO]:
    """A stream whose content appears at a place whole, or not at all; it replaces what is there.

    Raises:
        MediaError: a local place cannot be written (folder, permission, full disk).
        OSError: a URL cannot be written.
    """
    if not is_remote(place):
        with files.atomic_write(Path(place), force=True) as stream:
            yield stream
        return
    # An fsspec file publishes what it has when it is closed by an exception, so it gets a finished file.
    system, path = _system(place)
    with tempfile.TemporaryFile() as spool:
        yield cast(BinaryIO, spool)
        length = spool.tell()
        spool.seek(0)
        parent = path.rpartition("/")[0]
        if parent:
            with suppress(FileExistsError):
                system.makedirs(parent, exist_ok=True)
        if length <= 1 << 28:
            system.pipe_file(path, spool.read())
        else:
            with system.open(path, "wb") as stream:
                shutil.copyfileobj(spool, stream, 1 << 24)


def write(place: str, content: bytes) -> None:
    """`writing` for what is in memory."""
    with writing(place) as stream:
        stream.write(content)


def _system(place: str) -> tuple[Any, str]:
    """The file system of a URL, and the path on it. Raises UsageError where it cannot be had."""
    try:
        import fsspec
    except ModuleNotFoundError:
        raise UsageError(
            f'{place} needs fsspec: pip install "compand[ray]", or copy it to a local folder'
        ) from None
    try:
        # Without caches of listings: others write to the same folders.
        system, path = fsspec.core.url_to_fs(place, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{place} cannot be opened ({' '.join(str(error).split())}): install what it needs"
        ) from None
    return system, path
