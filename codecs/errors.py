"""Exceptions that users meet. Every message is one line: the object, the fact, the remedy."""

from __future__ import annotations


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
