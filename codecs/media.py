"""Picture or sound: told from a name or the first bytes, before anything is decoded or heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from compand.coding import container
from compand.errors import BitstreamError

DEFAULT_CODEC = {"image": "hyperprior", "audio": "wavelet-stereo-2x"}
"""The checkpoint that codes a medium where none is named."""

OPENING_BYTES = 12
"""How many bytes of a file tell its medium."""

_SOUND_OPENINGS = (
    b"fLaC",
    b"OggS",
    b"ID3",
    b"caff",
    b".snd",
    b"RF64",
    b"riff",
    b"Creative Voice"[:OPENING_BYTES],
)
_MPEG_SYNC = 0xE0  # the bits of the second byte that are set in every frame of MPEG audio


def medium_of(source: Any) -> str:
    """ "image" or "audio", for whatever `compand.encode` takes.

    Paths are told apart by extension, else by content; a `Sound`, a `SoundReader` and floating-point arrays or tensors
    of at most two dimensions are sounds; all else is left to the image codecs, which say what they take.
    """
    if isinstance(source, (str, os.PathLike)):
        return medium_of_path(Path(source))
    if hasattr(source, "rate") and hasattr(source, "channels"):
        return "audio"
    floating = "float" in str(getattr(source, "dtype", ""))
    return "audio" if floating and source.ndim <= 2 else "image"


def medium_of_path(path: Path) -> str:
    """ "image" or "audio", by extension, else by content; "image" for a file that cannot be read or is neither."""
    from compand.pictures import is_image_path
    from compand.sounds import is_sound_path

    if is_sound_path(path):
        return "audio"
    if is_image_path(path):
        return "image"
    try:
        with open(path, "rb") as stream:
            return medium_of_opening(stream.read(OPENING_BYTES))
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return "image"


def medium_of_opening(opening: bytes) -> str:
    """ "audio" if a file begins as an audio file that libsndfile reads, else "image".

    >>> medium_of_opening(b"RIFF....WAVE"), medium_of_opening(b"RIFF....WEBP"), medium_of_opening(b"fLaC")
    ('audio', 'image', 'audio')
    """
    if opening.startswith(_SOUND_OPENINGS):
        return "audio"
    if opening[:4] in (b"RIFF", b"FORM") and opening[8:12] in (b"WAVE", b"AIFF", b"AIFC"):
        return "audio"
    # No other format that begins with 0xFF has its second byte in this range: JPEG has 0xD8 there.
    mpeg = len(opening) > 1 and opening[0] == 0xFF and opening[1] & _MPEG_SYNC == _MPEG_SYNC
    return "audio" if mpeg else "image"


def kind_of_cpd(opening: bytes) -> str | None:
    """What the `.cpd` file that begins with these bytes holds: "image", "bands" (a picture of neither gray nor RGB) or
    "audio"; None if it is no such file."""
    if opening.startswith(container.COMPACT_MAGIC):
        return "image"
    record: container.Record = {}
    try:
        source = container.Source(memoryview(opening), len(container.MAGIC))
        container.OPENING[0].read(record, source)
    except BitstreamError:
        return None
    return str(record["medium"]) if opening.startswith(container.MAGIC) else None
