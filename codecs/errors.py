"""Exceptions that users meet. Every message is one line: the object, the fact, the remedy."""

from __future__ import annotations

from collections.abc import Callable


class CompandError(Exception):
    """Base of all errors that compand raises on purpose; the command line prints them without a traceback."""


class BitstreamError(CompandError):
    """A `.cpd` file, or a part of one, cannot be decoded.

    Attributes:
        chunk: index of the damaged chunk (tile or segment), or None where the header itself is at fault.
        offset: byte offset in the file at which the fault was found, or None where it is not known.
    """

    def __init__(self, message: str, *, chunk: int | None = None, offset: int | None = None) -> None:
        place = ", ".join(
            f"{name} {value}" for name, value in (("chunk", chunk), ("offset", offset)) if value is not None
        )
        super().__init__(f"{message} ({place})" if place else message)
        self.chunk = chunk
        self.offset = offset


class CheckpointError(CompandError):
    """A checkpoint is missing, unknown, inconsistent or does not fit the file."""


class MediaError(CompandError):
    """An image or audio file cannot be read or written."""


class UsageError(CompandError):
    """An argument has a value that cannot be used."""


class PackedSetError(CompandError):
    """A packed set, a shard of one or a row of a shard cannot be read, or does not fit what reads it.

    Attributes:
        shard: name of the shard at fault, or None where no single one is.
        key: key of the row at fault (or its number, where the key itself cannot be read), or None.
    """

    def __init__(self, message: str, *, shard: str | None = None, key: str | int | None = None) -> None:
        place = ", ".join(
            f"{name} {value}" for name, value in (("shard", shard), ("key", key)) if value is not None
        )
        super().__init__(f"{message} ({place})" if place else message)
        self._arguments = (message, shard, key)
        self.shard = shard
        self.key = key

    def __reduce__(self) -> tuple[Callable[..., PackedSetError], tuple[str, str | None, str | int | None]]:
        # Errors travel from the workers of a loader to its process.
        return _packed_set_error, self._arguments


def _packed_set_error(message: str, shard: str | None, key: str | int | None) -> PackedSetError:
    return PackedSetError(message, shard=shard, key=key)
