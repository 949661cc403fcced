"""Codecs by their fixed ids. An id, once given, means the same codec for ever: it stands in every file.

A codec of compand's own is one entry here, one module and one training config. Codecs of other packages need no id:
they register by name with `register` and their files carry the name.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from compand.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from compand.codec import Codec


QUALITY_STEPS = 32
"""Qualities are stored as integers in units of 1/32 level."""


@dataclass(frozen=True)
class CodecEntry:
    """What is known of a codec without importing it.

    Attributes:
        codec_id: number in the header of its files; 0 for third-party codecs, which travel by name.
        name: name on the command line.
        medium: "image" or "audio".
        target: "module:Class" of the `Codec`.
        description: one line.
    """

    codec_id: int
    name: str
    medium: str
    target: str
    description: str

    def load_class(self) -> type[Codec]:
        """Imports the codec's class."""
        module, _, name = self.target.partition(":")
        codec_class: type[Codec] = getattr(import_module(module), name)
        return codec_class


_ENTRIES = [
    CodecEntry(
        1, "hyperprior", "image", "compand.hyperprior:HyperpriorCodec", "mean-scale Gaussian hyperprior"
    ),
    CodecEntry(2, "factorized", "image", "compand.hyperprior:FactorizedCodec", "fully factorised prior"),
    CodecEntry(
        3, "wavelet-image", "image", "compand.wavelet:WaveletImageCodec", "wavelet packets, fast to encode"
    ),
    CodecEntry(
        4, "wavelet-audio", "audio", "compand.wavelet:WaveletAudioCodec", "wavelet packets, fast to encode"
    ),
    CodecEntry(5, "vqgan", "image", "compand.vqgan:VqganCodec", "tokens of a codebook, for the lowest rates"),
    CodecEntry(
        6,
        "codebook-audio",
        "audio",
        "compand.codebook_audio:CodebookAudioCodec",
        "codebooks, sound as tokens at the lowest rates",
    ),
    CodecEntry(
        7, "compressai", "image", "compand.compressai:CompressaiCodec", "models imported from CompressAI"
    ),
    CodecEntry(
        8, "context", "image", "compand.context:ContextCodec", "contexts of what is decoded, fewest bytes"
    ),
]


def entries() -> tuple[CodecEntry, ...]:
    """All registered codecs."""
    return tuple(_ENTRIES)


def register(name: str, medium: str, target: str, description: str) -> None:
    """Adds a third-party codec. Its files carry `name`; whoever decodes them must have registered it too.

    Raises:
        UsageError: the name is taken.
    """
    if any(entry.name == name for entry in _ENTRIES):
        raise UsageError(f"a codec named {name} exists already: choose another name")
    _ENTRIES.append(CodecEntry(0, name, medium, target, description))


def by_name(name: str) -> CodecEntry:
    """The codec of that name. Raises CheckpointError if there is none."""
    for entry in _ENTRIES:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in _ENTRIES)
    raise CheckpointError(f"codec {name} is unknown here: known are {known}; a newer compand may have it")


def name_of(codec: Codec) -> str:
    """The name under which a codec's class is registered. Raises CheckpointError if it is not."""
    target = f"{type(codec).__module__}:{type(codec).__qualname__}"
    for entry in _ENTRIES:
        if entry.target == target:
            return entry.name
    raise CheckpointError(f"{target} is not registered: call compand.register first")
