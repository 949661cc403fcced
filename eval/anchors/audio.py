"""Audio anchors: what libsndfile writes, and raw samples.

libsndfile removes the codecs' delay and padding itself, so that files at a sample rate that the format has restore the
length exactly. Sounds at another rate are resampled to the next higher rate that it has, else to its highest, and back
after decoding; their files end with a trailer of 12 bytes that gives the rate and the length.
"""

from __future__ import annotations

import io
import struct
from abc import abstractmethod
from typing import Any

import numpy as np
import soundfile

from compand.errors import BitstreamError, UsageError
from compand.eval.items import Signal
from compand.eval.subjects import Subject
from compand.sounds import Sound, as_stored, read_sound, resample

_LIBRARY = f"libsndfile {soundfile.__libsndfile_version__} of soundfile {soundfile.__version__}"
_WRITTEN = 2**20  # frames written at a time: the Vorbis encoder keeps them on the stack, 8 MB in all
_MAX_RATE = 2**20  # Hz; bounds what a damaged trailer can ask for
_KBPS_MPEG1 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBPS_MPEG2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
"""Bit rates of layer III by the index in a frame header, from 1."""


class _SoundfileSubject(Subject):
    """A format that libsndfile writes.

    Attributes:
        container, subtype: libsndfile's names of the format.
        settings: one clause on the fixed settings and on what the quality is.
        rates: sample rates of the format in ascending order; empty where it takes any.
    """

    medium = "audio"
    kind = "classical"
    container: str
    subtype: str
    settings: str
    lowest = 0.0
    highest = 10.0
    rates: tuple[int, ...] = ()
    _trailer = struct.Struct("<II4s")  # rate, length, mark
    _mark = b"RATE"

    def __init__(self) -> None:
        self.settings_note = f"{self.title} by {_LIBRARY}; {self.settings}."
        self.identity = f"{_LIBRARY}, {self.settings}"

    @abstractmethod
    def options(self, quality: float) -> dict[str, Any]:
        """Arguments of `soundfile.write`."""

    def encode(self, signal: Signal, quality: float) -> bytes:
        self.check_quality(quality)
        sound = _sound(signal)
        rate = sound.rate
        if self.rates and rate not in self.rates:
            rate = next((each for each in self.rates if each > rate), self.rates[-1])
        coded = resample(sound, rate)
        options = {"subtype": self.subtype, **self.options(quality)}
        stream = io.BytesIO()
        try:
            samples = as_stored(coded.samples, options["subtype"])
            with soundfile.SoundFile(
                stream, "w", rate, sound.channels, format=self.container, **options
            ) as file:
                for start in range(0, len(samples), _WRITTEN):
                    file.write(samples[start : start + _WRITTEN])
        except (soundfile.SoundFileError, ValueError, TypeError) as error:
            shape = f"{sound.channels} channels at {sound.rate} Hz"
            raise UsageError(f"{self.title} cannot hold {shape}: leave the file out") from error
        data = stream.getvalue()
        if self.rates and (rate != sound.rate or data.endswith(self._mark)):
            data += self._trailer.pack(sound.rate, sound.length, self._mark)
        return data

    def decode(self, data: bytes) -> Signal:
        if not self._has_trailer(data):
            return read_sound(io.BytesIO(data))
        rate, length, _ = self._trailer.unpack(data[-self._trailer.size :])
        coded = read_sound(io.BytesIO(data[: -self._trailer.size]))
        excess = -(-coded.length * rate // coded.rate) - length
        if not 0 < rate <= _MAX_RATE or not 0 <= excess <= rate // coded.rate + 1:
            raise BitstreamError(f"trailer gives {length} samples at {rate} Hz: get an intact copy")
        try:
            sound = resample(coded, rate)
        except UsageError as error:
            raise BitstreamError(f"trailer gives an impossible rate ({error}): get an intact copy") from error
        return Sound(np.ascontiguousarray(sound.samples[:, :length]), rate, sound.notes)

    def overhead(self, data: bytes) -> int:
        return self._trailer.size if self._has_trailer(data) else 0

    def _has_trailer(self, data: bytes) -> bool:
        return bool(self.rates) and len(data) > self._trailer.size and data.endswith(self._mark)


class _OggSubject(_SoundfileSubject):
    """A codec inside Ogg pages.

    Attributes:
        header_packets: packets before the first that carries sound.
    """

    container = "OGG"
    header_packets: int

    def overhead(self, data: bytes) -> int:
        return super().overhead(data) + _ogg_overhead(data, self.header_packets)


class Mp3(_SoundfileSubject):
    """MP3 at a variable bit rate, which LAME's authors recommend."""

    name, title, suffix = "mp3", "MP3", ".mp3"
    container, subtype = "MP3", "MPEG_LAYER_III"
    settings = (
        "LAME, variable bit rate; quality 0 to 10 is 10 less the number of LAME's option -V; "
        "overhead is the frame with the table of contents"
    )
    qualities: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
    rates = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
    mode = "VARIABLE"

    def options(self, quality: float) -> dict[str, Any]:
        # libsndfile refuses a compression level of exactly 1.
        return {"compression_level": min(1 - quality / 10, 0.9999), "bitrate_mode": self.mode}

    def overhead(self, data: bytes) -> int:
        return super().overhead(data) + _xing_frame(data)


class Mp3Abr(Mp3):
    """MP3 at a given average bit rate, for rates below those of the variable bit rate."""

    name, title = "mp3-abr", "MP3 (average bit rate)"
    settings = (
        "LAME, average bit rate; quality 0 to 10 spans the rates of MPEG linearly: 32 to 320 kbps from 32 kHz on, "
        "8 to 160 kbps from 16 kHz on, 8 to 64 kbps below; overhead is the frame with the table of contents"
    )
    qualities = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    mode = "AVERAGE"


class Vorbis(_OggSubject):
    """Ogg Vorbis."""

    name, title, suffix = "vorbis", "Vorbis", ".ogg"
    subtype = "VORBIS"
    settings = (
        "variable bit rate; quality 0 to 10 is that of oggenc -q; overhead is Ogg pages and all three headers"
    )
    qualities = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
    header_packets = 3  # identification, comment, setup (codebooks)

    def options(self, quality: float) -> dict[str, Any]:
        return {"compression_level": 1 - quality / 10}


class Opus(_OggSubject):
    """Opus in Ogg."""

    name, title, suffix = "opus", "Opus", ".opus"
    subtype = "OPUS"
    settings = (
        "variable bit rate; quality 6 to 256 is the target rate in kbps a channel; "
        "overhead is Ogg pages with OpusHead and OpusTags"
    )
    qualities = (6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)
    lowest, highest = 6.0, 256.0
    rates = (8000, 12000, 16000, 24000, 48000)
    header_packets = 2

    def options(self, quality: float) -> dict[str, Any]:
        return {"compression_level": 1 - (quality - self.lowest) / (self.highest - self.lowest)}


class Flac(_SoundfileSubject):
    """FLAC, exact for sounds of as many bits a sample as its quality."""

    name, title, suffix = "flac", "FLAC", ".flac"
    kind = "lossless"
    container, subtype = "FLAC", "PCM_16"
    settings = "level 8; quality is the bits a sample to which the sound is rounded, 16 or 24"
    qualities = (16.0,)
    lowest, highest = 16.0, 24.0

    def check_quality(self, quality: float) -> None:
        if quality not in (16, 24):
            raise UsageError(f"{self.name} has no quality {quality:g}: choose 16 or 24")

    def options(self, quality: float) -> dict[str, Any]:
        return {"subtype": f"PCM_{quality:g}", "compression_level": 1.0}


class AudioIdentity(Subject):
    """Channels, rate and the samples as they are."""

    name, title, suffix = "identity", "identity", ".f32"
    medium = "audio"
    kind = "identity"
    identity = "raw float32 1"
    settings_note = "Raw 32-bit floating-point samples behind a header of 8 bytes; its only quality is 1."
    qualities = (1.0,)
    lowest = highest = 1.0
    _header = struct.Struct("<II")  # channels, rate

    def encode(self, signal: Signal, quality: float) -> bytes:
        self.check_quality(quality)
        sound = _sound(signal)
        return self._header.pack(sound.channels, sound.rate) + sound.samples.astype("<f4").tobytes()

    def decode(self, data: bytes) -> Signal:
        if len(data) < self._header.size:
            raise BitstreamError("raw sound has no header: get an intact copy")
        channels, rate = self._header.unpack_from(data)
        size = len(data) - self._header.size
        if not channels or not rate or size % (4 * channels):
            raise BitstreamError(f"{size} bytes are no samples of {channels} channels: get an intact copy")
        samples = np.frombuffer(data, "<f4", offset=self._header.size).astype(np.float32)
        return Sound(samples.reshape(channels, -1), rate)

    def overhead(self, data: bytes) -> int:
        return self._header.size


ANCHORS: dict[str, type[Subject]] = {
    subject.name: subject for subject in (Mp3, Mp3Abr, Vorbis, Opus, Flac, AudioIdentity)
}


def missing() -> dict[str, tuple[str, str]]:
    """The anchors that do not work here: medium and remedy by name."""
    formats = soundfile.available_formats()
    return {
        subject.name: (
            "audio",
            f"this libsndfile was built without {subject.title}; install soundfile from PyPI",
        )
        for subject in (Mp3, Mp3Abr, Vorbis, Opus, Flac)
        if subject.container not in formats
        or subject.subtype not in soundfile.available_subtypes(subject.container)
    }


def _ogg_overhead(data: bytes, header_packets: int) -> int:
    """Bytes of Ogg page headers and of the first packets (RFC 3533, section 6)."""
    total = position = packets = 0
    while data.startswith(b"OggS", position) and position + 27 <= len(data):
        segments = data[position + 27 : position + 27 + data[position + 26]]
        total += 27 + len(segments)
        for size in segments:
            if packets < header_packets:
                total += size
            packets += size < 255  # a packet ends with its first segment that is not full
        position += 27 + len(segments) + sum(segments)
    return total


def _xing_frame(data: bytes) -> int:
    """Bytes of a first MPEG layer III frame that carries no sound but a Xing table (lengths, delay); 0 without one."""
    if len(data) < 40 or data[0] != 0xFF or not (b"Xing" in data[:40] or b"Info" in data[:40]):
        return 0
    version, kbps_index, rate_index = data[1] >> 3 & 3, data[2] >> 4, data[2] >> 2 & 3
    if not 1 <= kbps_index <= 14 or rate_index == 3 or version == 1:
        return 0
    first = version == 3  # MPEG 1; else 2 or 2.5
    kbps = (_KBPS_MPEG1 if first else _KBPS_MPEG2)[kbps_index - 1]
    rate = (44100, 48000, 32000)[rate_index] // {3: 1, 2: 2, 0: 4}[version]
    return (144 if first else 72) * 1000 * kbps // rate + (data[2] >> 1 & 1)


def _sound(signal: Signal) -> Sound:
    if not isinstance(signal, Sound):
        raise UsageError("an audio codec takes sounds: choose an image codec for pictures")
    if signal.length == 0:
        raise UsageError("the sound has no samples: leave it out")
    return signal
