"""Any audio file to a :class:`Sound` and back: libsndfile at the edge, plain float32 arrays inside.

Integer samples of b bits become multiples of 2^(1 - b), so that up to 24 bits are restored exactly on writing.
Metadata (tags, loops, cue points) is dropped.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

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
_WRITTEN = 2**16  # frames written at a time
_ZERO_CROSSINGS = 64  # of the resampling filter, on either side
_ROLLOFF = 0.9475937167399596
_BETA = 14.769656459379492
_MAX_RATIO = 2**24  # product of the reduced rates; the resampling kernel has about as many coefficients


MAX_TERM = 1024
"""Largest term of the ratio between the rates of a sound and of the codec. Part of the format."""

MAX_RATIO = 16
"""Largest ratio between these rates; sounds beyond are coded at another rate than the codec's. Part of the format."""


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
        with SoundWriter(path_or_stream, self.rate, self.channels, format, subtype) as writer:
            writer.write(self.samples)


def read_sound(source: str | Path | BinaryIO) -> Sound:
    """Reads any audio file that libsndfile reads: WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF and others.

    Args:
        source: a path, or a binary stream (read from its start; standard input need not be seekable).

    Returns:
        The sound; one without samples is legal and carries a note.

    Raises:
        MediaError: missing, empty, truncated, not audio, or with samples that are not numbers.
    """
    with SoundReader(source) as reader:
        blocks = [np.zeros((reader.channels, 0), np.float32), *reader.blocks(_BLOCK)]
        samples = np.concatenate(blocks, axis=1)
        return Sound(samples, reader.rate, () if samples.shape[1] else ("no samples",))


class SoundReader:
    """An audio file, read block by block; a context manager.

    Args:
        source: a path, or a binary stream (read from its start; standard input need not be seekable).

    Attributes:
        rate: samples a second.
        channels: number of channels.
        frames: samples a channel; None where the file does not state it (MP3, streams).

    Raises:
        MediaError: missing, empty or not audio; by `blocks`: truncated, or with samples that are not numbers.
    """

    def __init__(self, source: str | Path | BinaryIO) -> None:
        self._name = _name_of(source)
        self._opened = isinstance(source, (str, os.PathLike))
        self._stream = _opened(source, self._name) if self._opened else cast(BinaryIO, source)
        try:
            with self._faults():
                self._make_seekable()
                self._stream.seek(0)
            if not self._stream.read(1):
                raise MediaError(f"{self._name} is empty (0 bytes): copy it again")
            self._stream.seek(0)
            with self._faults():
                self._file = soundfile.SoundFile(self._stream)
        except BaseException:
            self._close_stream()
            raise
        self.rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        # MP3 files do not state their length; streamed files state the largest number there is.
        stated = self._file.format != "MP3" and self._file.frames < 2**62
        self.frames: int | None = self._file.frames if stated else None

    def blocks(self, size: int = _BLOCK) -> Iterator[Float32Array]:
        """All samples from the first on, float32 [channels, n]; n is `size` but for the last block."""
        with self._faults():
            if self._file.tell() != 0:
                self._file.seek(0)
        while True:
            with self._faults():
                block = self._file.read(size, dtype="float32", always_2d=True)
            if not len(block):
                break
            if not np.isfinite(block).all():
                raise MediaError(f"{self._name} has samples that are not numbers: export it again")
            yield np.ascontiguousarray(block.T)
        if self.frames is not None and self._file.tell() < self.frames:
            fact = f"{self._file.tell()} of {self.frames} samples"
            raise MediaError(f"{self._name} is truncated ({fact}): copy it again")

    def close(self) -> None:
        """Closes the file; a stream that was given stays open."""
        self._file.close()
        self._close_stream()

    def __enter__(self) -> SoundReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_stream(self) -> None:
        if self._opened:
            self._stream.close()

    def _make_seekable(self) -> None:
        """Puts a copy in an unnamed temporary file in the place of a pipe."""
        if self._stream.seekable():
            return
        with ExitStack() as stack:
            spool = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(self._stream, spool)
            stack.pop_all()
        self._close_stream()
        self._stream, self._opened = cast(BinaryIO, spool), True

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MediaError(
                f"{self._name} cannot be read ({_fact(error)}): check its permissions"
            ) from error
        except (soundfile.SoundFileError, TypeError, ValueError) as error:
            fact = _fact(error)
            raise MediaError(f"{self._name} is not a sound ({fact}): give a WAV, FLAC or Ogg file") from error


class SoundWriter:
    """An audio file, written block by block; a context manager. Integer formats clip samples beyond [-1, 1].

    Formats seek while they are written. A stream that cannot seek therefore gets everything on closing; until then it
    is in a temporary file.

    Args:
        path_or_stream: where to; a path is opened and written in place (no temporary file).
        rate: samples a second.
        channels: number of channels.
        format: a libsndfile format or an extension ("FLAC", "wav"); by default that of the path's extension, and WAV
            for a stream.
        subtype: libsndfile's name of the sample format ("PCM_16", "PCM_24", "FLOAT", "VORBIS", "OPUS"); by default 16
            bits where the format has them, Opus for ".opus", else the format's usual one.

    Raises:
        MediaError: unknown format, or one that cannot hold this sound (sample rate, channels); no file is made then.
        OSError: the operating system refuses the path (missing folder, full disk).
    """

    def __init__(
        self,
        path_or_stream: str | Path | BinaryIO,
        rate: int,
        channels: int,
        format: str | None = None,  # noqa: A002 (as soundfile names it)
        subtype: str | None = None,
    ) -> None:
        self._name = _name_of(path_or_stream)
        self.rate, self.channels = rate, channels
        if format is not None:
            suffix = f".{format.lower().lstrip('.')}"
        elif isinstance(path_or_stream, (str, os.PathLike)):
            suffix = Path(path_or_stream).suffix.lower()
        else:
            suffix = ".wav"
        self._container = _FORMATS.get(suffix, suffix[1:].upper())
        if self._container not in soundfile.available_formats():
            label = suffix or "without an extension"
            raise MediaError(f"{self._name}: no audio format to write ({label}): use .wav, .flac or .ogg")
        if subtype is None:
            subtypes = soundfile.available_subtypes(self._container)
            wanted = "OPUS" if suffix == ".opus" else "PCM_16"
            subtype = wanted if wanted in subtypes else soundfile.default_subtype(self._container)
        self._subtype = subtype
        with self._faults():  # in memory first: a refusal must leave no file behind
            self._open(io.BytesIO()).close()
        self._target: BinaryIO | None = None
        if isinstance(path_or_stream, (str, os.PathLike)):
            self._stream: BinaryIO = open(path_or_stream, "wb")  # noqa: SIM115 (closed by close)
        elif path_or_stream.seekable():
            self._stream = path_or_stream
        else:
            self._target = path_or_stream
            self._stream = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
        self._own = self._stream is not path_or_stream
        self._held = np.zeros((channels, 0), np.float32)
        self._latch = _Latch(self._stream)
        self._file = self._open(cast(BinaryIO, self._latch))

    def write(self, samples: Float32Array) -> None:
        """Appends samples [channels, n], float32."""
        self._held = np.concatenate((self._held, samples), axis=1) if self._held.size else samples
        # In pieces, because the Vorbis encoder keeps each on the stack; of one size, so that the file does not depend
        # on how its samples came.
        start = 0
        while self._held.shape[1] - start >= _WRITTEN:
            self._write(self._held[:, start : start + _WRITTEN])
            start += _WRITTEN
        self._held = self._held[:, start:].copy()

    def close(self) -> None:
        """Completes the file; a stream that was given stays open."""
        if self._file.closed:
            return
        try:
            self._write(self._held)
            with self._faults():
                self._file.close()
            self._latch.check()
            if self._target is not None:
                self._stream.seek(0)
                shutil.copyfileobj(self._stream, self._target)
        finally:
            if self._own:
                self._stream.close()

    def __enter__(self) -> SoundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # Nothing rather than a part.
            self._target, self._held = None, np.zeros((self.channels, 0), np.float32)
        self.close()

    def _write(self, samples: Float32Array) -> None:
        with self._faults():
            self._file.write(as_stored(samples, self._subtype))
        self._latch.check()

    def _open(self, stream: BinaryIO) -> soundfile.SoundFile:
        return soundfile.SoundFile(
            stream, "w", self.rate, self.channels, format=self._container, subtype=self._subtype
        )

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (soundfile.SoundFileError, OverflowError, TypeError, ValueError) as error:
            fact = f"{self._container} {self._subtype} cannot hold {self.channels} channels at {self.rate} Hz"
            raise MediaError(f"{self._name}: {fact} ({_fact(error)}): save as .wav") from error


class _Latch:
    """A stream for libsndfile to write to. Exceptions cannot pass through libsndfile: the first is kept for `check`,
    and nothing is done after it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._error: BaseException | None = None

    def write(self, data: bytes) -> int:
        self._try(self._stream.write, data)
        return len(data)

    def read(self, size: int) -> bytes:
        return self._try(self._stream.read, size) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._try(self._stream.seek, offset, whence) or 0

    def tell(self) -> int:
        return self._try(self._stream.tell) or 0

    def check(self) -> None:
        """Raises what was kept."""
        if self._error is not None:
            raise self._error

    def _try(self, action: Callable[..., Any], *arguments: Any) -> Any:
        if self._error is None:
            try:
                return action(*arguments)
            except BaseException as error:  # an interrupt too
                self._error = error
        return None


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
        lowpass_filter_width=_ZERO_CROSSINGS,
        rolloff=_ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=_BETA,
    )
    return Sound(samples.numpy(), rate, sound.notes, sound.damage)


def resampling_ratio(rate: int, own: int | None) -> Fraction:
    """Rate at which a sound is coded over its own: that of the codec, as near as small integers come.

    44,101 Hz becomes 44,100 by leaving the samples as they are. As a decoder inverts the same ratio, all that an
    approximation changes is which frequencies the codec takes them for.

    Args:
        rate: of the sound, in Hz.
        own: of the codec; None: whatever rate the sound has.
    """
    if own is None:
        return Fraction(1)
    exact = Fraction(own, rate)
    small = max(min(exact, 1 / exact).limit_denominator(MAX_TERM), Fraction(1, MAX_RATIO))
    return small if exact < 1 else 1 / small


class Resampler:
    """Changes the sample rate of a stream, with the filter of `resample`; both ends are held at their last values.

    Blocks of a fixed size at fixed places are computed one by one, so that the result does not depend on how the
    samples were pushed.

    Args:
        channels: of the stream.
        ratio: new rate over old rate; numerator and denominator set the cost of a block.
        block: samples of a block, about.

    Attributes:
        latency: samples that may be held before what they decide is out.
    """

    def __init__(self, channels: int, ratio: Fraction, block: int = 2**14) -> None:
        self.channels, self.ratio = channels, ratio
        up, down = ratio.numerator, ratio.denominator
        self._reach = math.ceil(_ZERO_CROSSINGS * max(1, down / up) / _ROLLOFF)
        # A row of the matrix product computes the outputs of `step` samples, most of whose taps are then in use.
        periods = max(1, round(self._reach / down))
        self._step, self._outputs = periods * down, periods * up
        self._rows = max(1, round(block / self._step))
        self._block = self._rows * self._step
        self._kernel = _interpolation(self._reach, self._step, self._outputs)
        self.latency = self._block + self._reach
        self._held = np.zeros((channels, 0), np.float32)
        self._taken = 0
        self._given = 0

    def push(self, samples: Float32Array) -> Float32Array:
        """Takes samples [channels, n]; returns those [channels, m] at the new rate that they decide."""
        if self._taken == 0 and samples.shape[1]:
            self._held = np.repeat(samples[:, :1], self._reach, axis=1)
        self._taken += samples.shape[1]
        self._held = np.concatenate((self._held, samples), axis=1)
        given = [np.zeros((self.channels, 0), np.float32)]
        while self._held.shape[1] >= self._block + 2 * self._reach:
            given.append(self._next_block())
        self._given += sum(part.shape[1] for part in given)
        return np.concatenate(given, axis=1)

    def finish(self) -> Float32Array:
        """The rest: all in all ceil(N x ratio) samples for N."""
        rest = math.ceil(self._taken * self.ratio) - self._given
        given = [np.zeros((self.channels, 0), np.float32)]
        while sum(part.shape[1] for part in given) < rest:
            missing = self._block + 2 * self._reach - self._held.shape[1]
            self._held = np.pad(self._held, ((0, 0), (0, max(missing, 0))), mode="edge")
            given.append(self._next_block())
        return np.concatenate(given, axis=1)[:, :rest]

    def _next_block(self) -> Float32Array:
        import torch

        window = torch.from_numpy(self._held[:, : self._block + 2 * self._reach])
        frames = window.unfold(1, self._step + 2 * self._reach, self._step)
        block: Float32Array = (frames @ torch.from_numpy(self._kernel)).flatten(1).numpy()
        self._held = self._held[:, self._block :]
        return block


@lru_cache(maxsize=8)
def _interpolation(reach: int, step: int, outputs: int) -> Float32Array:
    """Matrix from `step` samples with `reach` more on either side to `outputs` samples of the same time: a sinc below
    the lower of the two Nyquist frequencies, in a Kaiser window of `_ZERO_CROSSINGS` zero crossings on either side."""
    taps = np.arange(-reach, step + reach)[:, None]
    cutoff = _ROLLOFF * min(1.0, outputs / step)
    place = (taps - np.arange(outputs) * step / outputs) * cutoff
    inside = np.abs(place) < _ZERO_CROSSINGS
    window = np.zeros(place.shape)
    window[inside] = np.i0(_BETA * np.sqrt(1 - (place[inside] / _ZERO_CROSSINGS) ** 2)) / np.i0(_BETA)
    return (np.sinc(place) * window * cutoff).astype(np.float32)


def _opened(path: str | Path | BinaryIO, name: str) -> BinaryIO:
    try:
        return open(cast(str, path), "rb")
    except FileNotFoundError as error:
        raise MediaError(f"{name} does not exist: check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if os.path.isdir(cast(str, path)):
            raise MediaError(f"{name} is a folder, not a sound: name a file inside it") from error
        raise MediaError(f"{name} cannot be opened ({_fact(error)}): check its permissions") from error


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
