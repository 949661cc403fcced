"""Any audio file to a :class:`Sound` and back: libsndfile at the edge, plain float32 arrays inside.

Integer samples of b bits become multiples of 2^(1 - b), so that up to 24 bits are restored exactly on writing.
Metadata (tags, loops, cue points) is dropped.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from compand.errors import BitstreamError, MediaError, UsageError

Float32Array = NDArray[np.float32]

_FORMATS = {
    ".aif": "AIFF",
    ".aifc": "AIFF",
    ".aiff": "AIFF",
    ".au": "AU",
    ".caf": "CAF",
    ".flac": "FLAC",
    ".mp3": "MP3",
    ".oga": "OGG",
    ".ogg": "OGG",
    ".opus": "OGG",
    ".rf64": "RF64",
    ".snd": "AU",
    ".voc": "VOC",
    ".w64": "W64",
    ".wav": "WAV",
    ".wave": "WAV",
}
"""Extensions that mean sound, and libsndfile's name of their format. It reads more than these by content."""

_INTEGER_BITS = {"PCM_16": 16, "PCM_24": 24}
_BLOCK = 2**18  # frames read at a time, so that a damaged header cannot claim memory
_MAX_RATIO = 2**24  # product of the reduced rates; the resampling kernel has about as many coefficients


@dataclass(eq=False)
class Sound:
    """A decoded recording.

    Attributes:
        samples: float32 [channels, N], nominal range [-1, 1]; lossy formats may exceed it. N may be 0.
        rate: samples a second.
        notes: what was found or converted on reading, one short sentence each.
        damage: what a decoder could not restore; empty unless it was asked for a partial result.

    Raises:
        UsageError: the samples have another type or shape, or the rate is not a positive integer.
    """

    samples: Float32Array
    rate: int
    notes: tuple[str, ...] = ()
    damage: tuple[BitstreamError, ...] = ()

    def __post_init__(self) -> None:
        if self.samples.dtype != np.float32 or self.samples.ndim != 2 or self.samples.shape[0] == 0:
            raise UsageError(
                f"samples are {self.samples.dtype} {list(self.samples.shape)}: give float32 [channels, N]"
            )
        if int(self.rate) != self.rate or self.rate < 1:
            raise UsageError(f"sample rate is {self.rate}: give a positive integer, in Hz")
        self.rate = int(self.rate)

    @property
    def channels(self) -> int:
        """1 is mono, 2 is stereo."""
        return int(self.samples.shape[0])

    @property
    def length(self) -> int:
        """Samples a channel, N."""
        return int(self.samples.shape[1])

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.length / self.rate

    def save(
        self,
        path_or_stream: str | Path | BinaryIO,
        format: str | None = None,  # noqa: A002 (as soundfile names it)
        subtype: str | None = None,
    ) -> None:
        """Writes an audio file. Integer formats clip samples beyond [-1, 1].

        Args:
            path_or_stream: where to; a path is opened and written in place (no temporary file).
            format: a libsndfile format or an extension ("FLAC", "wav"); by default that of the path's extension,
                and WAV for a stream.
            subtype: libsndfile's name of the sample format ("PCM_16", "PCM_24", "FLOAT", "VORBIS", "OPUS"); by
                default 16 bits where the format has them, Opus for ".opus", else the format's usual one.

        Raises:
            MediaError: unknown format, or one that cannot hold this sound (sample rate, channels).
            OSError: the operating system refuses the path (missing folder, full disk).
        """
        name = _name_of(path_or_stream)
        if format is not None:
            suffix = f".{format.lower().lstrip('.')}"
        elif isinstance(path_or_stream, (str, os.PathLike)):
            suffix = Path(path_or_stream).suffix.lower()
        else:
            suffix = ".wav"
        container = _FORMATS.get(suffix, suffix[1:].upper())
        if container not in soundfile.available_formats():
            label = suffix or "without an extension"
            raise MediaError(f"{name}: no audio format to write ({label}): use .wav, .flac or .ogg")
        if subtype is None:
            subtypes = soundfile.available_subtypes(container)
            wanted = "OPUS" if suffix == ".opus" else "PCM_16"
            subtype = wanted if wanted in subtypes else soundfile.default_subtype(container)
        memory = io.BytesIO()  # formats seek while they are written, and a refusal must leave no file behind
        try:
            samples = as_stored(self.samples, subtype)
            soundfile.write(memory, samples, self.rate, format=container, subtype=subtype)
        except (soundfile.SoundFileError, ValueError, TypeError) as error:
            fact = f"{container} {subtype} cannot hold {self.channels} channels at {self.rate} Hz"
            raise MediaError(f"{name}: {fact} ({_fact(error)}): save as .wav") from error
        if isinstance(path_or_stream, (str, os.PathLike)):
            Path(path_or_stream).write_bytes(memory.getbuffer())
        else:
            path_or_stream.write(memory.getbuffer())


def read_sound(source: str | Path | BinaryIO) -> Sound:
    """Reads any audio file that libsndfile reads: WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF and others.

    Args:
        source: a path, or a binary stream (read from its start; standard input need not be seekable).

    Returns:
        The sound; one without samples is legal and carries a note.

    Raises:
        MediaError: missing, empty, truncated, not audio, or with samples that are not numbers.
    """
    name = _name_of(source)
    if not isinstance(source, (str, os.PathLike)):
        return _read_stream(source if source.seekable() else io.BytesIO(source.read()), name)
    try:
        with open(source, "rb") as stream:
            return _read_stream(stream, name)
    except FileNotFoundError as error:
        raise MediaError(f"{name} does not exist: check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if os.path.isdir(source):
            raise MediaError(f"{name} is a folder, not a sound: name a file inside it") from error
        raise MediaError(f"{name} cannot be opened ({_fact(error)}): check its permissions") from error


def is_sound_path(path: str | Path) -> bool:
    """Whether the extension is one of an audio format (the file itself is not opened)."""
    return Path(path).suffix.lower() in _FORMATS


def resample(sound: Sound, rate: int) -> Sound:
    """The sound at another sample rate, by windowed-sinc interpolation (Kaiser window, 64 zero crossings).

    The pass band ends at 0.948 of the lower Nyquist frequency.

    Args:
        sound: N samples at its rate.
        rate: the new rate in Hz.

    Returns:
        ceil(N x rate / sound.rate) samples a channel. The sound itself where it has the rate already.

    Raises:
        UsageError: the rate is not positive, or the two rates have no ratio of small integers.
    """
    if rate == sound.rate:
        return sound
    if rate < 1:
        raise UsageError(f"sample rate is {rate}: give a positive integer, in Hz")
    common = math.gcd(rate, sound.rate)
    if (rate // common) * (sound.rate // common) > _MAX_RATIO:
        raise UsageError(f"{sound.rate} Hz cannot be resampled to {rate} Hz: choose rates of a simpler ratio")
    if sound.length == 0:
        return Sound(sound.samples, rate, sound.notes, sound.damage)

    import torch
    from torchaudio.functional import resample as interpolate

    samples = interpolate(
        torch.from_numpy(np.ascontiguousarray(sound.samples)),
        sound.rate,
        rate,
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser",
        beta=14.769656459379492,
    )
    return Sound(samples.numpy(), rate, sound.notes, sound.damage)


def _read_stream(stream: BinaryIO, name: str) -> Sound:
    stream.seek(0)
    if not stream.read(1):
        raise MediaError(f"{name} is empty (0 bytes): copy it again")
    stream.seek(0)
    try:
        with soundfile.SoundFile(stream) as file:
            blocks = [np.zeros((0, file.channels), np.float32)]
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block)
            rate, stated, container = file.samplerate, file.frames, file.format
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise MediaError(f"{name} is not a sound ({_fact(error)}): give a WAV, FLAC or Ogg file") from error
    samples = np.ascontiguousarray(np.concatenate(blocks).T)
    # MP3 files do not state their length; streamed files state the largest number there is.
    if samples.shape[1] < stated < 2**62 and container != "MP3":
        raise MediaError(f"{name} is truncated ({samples.shape[1]} of {stated} samples): copy it again")
    if not np.isfinite(samples).all():
        raise MediaError(f"{name} has samples that are not numbers: export it again")
    return Sound(samples, rate, () if samples.shape[1] else ("no samples",))


def as_stored(samples: Float32Array, subtype: str) -> NDArray[Any]:
    """Samples [N, channels] for libsndfile to write: integers for 16 and 24 bits, which floats would not restore, since
    libsndfile scales them by other factors on writing than on reading; rounded and clipped to the range.

    Args:
        samples: float32 [channels, N].
        subtype: libsndfile's name of the sample format.
    """
    bits = _INTEGER_BITS.get(subtype)
    if bits is None:
        return samples.T
    full = 2.0 ** (bits - 1)
    levels = np.rint(samples.T.astype(np.float64) * full).clip(-full, full - 1).astype(np.int32)
    return levels.astype(np.int16) if bits == 16 else levels << (32 - bits)


def _name_of(source: Any) -> str:
    """What to call a path or stream in a message."""
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "")
    return " ".join(name.split("\n")) if isinstance(name, str) and name else "sound"


def _fact(error: Exception) -> str:
    """An exception's message as part of one line."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()).rstrip(".") or type(error).__name__
