"""What all audio codecs share: sounds of any length, rate and number of channels <-> .cpd files, segment by segment."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compand.codec import QUALITY_STEPS, Bottleneck, Codec, Progress, Transform, first_level
from compand.coding import container
from compand.coding.container import (
    AudioFrameReader,
    AudioFrameWriter,
    AudioGeometry,
    Container,
    Header,
    Source,
    Varint,
)
from compand.errors import BitstreamError, CompandError, MediaError, UsageError
from compand.sounds import Resampler, Sound, SoundReader, resampling_ratio

Float32Array = NDArray[np.float32]

SEGMENT = 1 << 17
"""Samples of a segment at the codec's rate, unless a shorter one is asked for."""

MAX_SHIFT = 15
"""Most bits by which a quiet sound is made louder: one step of 16 bits becomes full scale."""

MAX_SEGMENT = 1 << 18
"""Longest segment that a decoder accepts; bounds its memory, whatever a file claims."""

MAX_CHANNELS = 32
"""Most channels of a sound."""

MAX_RATE = (1 << 31) - 1
"""Highest sample rate in Hz, as that of libsndfile."""

LATENT_BYTES = 16
"""Most bytes that a chunk needs for a latent, its share of the side information included: twice what escapes take."""

GROUP_BYTES = 1 << 16
"""Most bytes that a chunk needs for a group beside its latents."""

SLACK_BITS = 64
"""How many bits a stream may be shorter than the sum of its symbols' contents, by the coder's rounding."""

BLOCK = 1 << 16
"""Samples that are read from a file at a time."""

UNIT = 64
"""Segments are multiples of this, beside the transform's stride. Part of the format."""

LOUD, LAST = 1, 2
"""Flags that begin a chunk: its samples exceed [-1, 1]; it is the last, and the number of its latents follows."""

COLUMNS = Varint("number of latents")
LENGTH = Varint("length")


class AudioCodec(Codec):
    """A codec for sounds, and for signals of any other kind that are sampled in time.

    A sound is cut into segments on one grid of latents. Analysis of a segment sees `transform.context` samples of its
    neighbours, synthesis as much of their latents, so that segments fit together as if the sound had been transformed
    whole, while each segment's symbols stand on their own. Where the transform needs it (`transform.edge`), the grid
    begins before the first sample and ends after the last.

    A sound of other channels than the network's C is coded in groups of C; the last group is filled up with copies of
    the last channel, of which the decoder takes the mean. One of another rate is resampled, and back.

    A whole sound that is quiet is made louder by a power of two before it is coded, and quieter again afterwards: steps
    of quantisation that suit music at full scale would swallow it. A stream, whose loudest sample is not known in
    advance, may be given one.

    A chunk of a file is one segment: a byte of flags, for the last segment its number of latent positions, the length
    of every group's payload but the last's, the payloads.

    Attributes:
        channels: channels C that the network takes at once.
        rate: samples a second at which the network works; None: whatever rate a signal has.
    """

    medium = "audio"

    def __init__(
        self,
        transform: Transform,
        bottleneck: Bottleneck,
        lambdas: Sequence[float],
        *,
        channels: int,
        rate: int | None,
    ) -> None:
        super().__init__(transform, bottleneck, lambdas)
        self.channels = channels
        self.rate = rate
        self.edge = transform.edge

    def latent_layout(self) -> dict[str, Any]:
        """As of `Codec`, with the channels that are coded together, the rate that sounds are resampled to and, where
        there are any, the samples that are coded beyond either end."""
        own: dict[str, Any] = {"axes": 1, "group": self.channels, "rate": self.rate}
        return super().latent_layout() | own | ({"edge": self.edge} if self.edge else {})

    def encode(
        self,
        source: Any,
        *,
        quality: float | None = None,
        kbps: float | None = None,
        psnr: float | None = None,
        rate: int | None = None,
        bpp: float | None = None,
        compact: bool | None = None,
        packets: int = 0,
        effort: int = 0,
        progress: Progress | None = None,
    ) -> bytes:
        """Encodes a sound. Files are read block by block and never held whole.

        Args:
            source: a path, binary stream, `SoundReader` or `Sound`, or a floating-point array or tensor [channels, N]
                or [N], nominally within [-1, 1].
            quality: 1 (smallest file) to `levels`, fractions in steps of 1/32; 4 unless kbps or psnr is given.
            kbps: instead of `quality`, the best quality whose file has at most this many kilobits a second; of a codec
                with tokens, the highest whole level that fits.
            psnr: instead of `quality`, the lowest quality whose decoded sound has at least this PSNR in dB, for a peak
                of 1: 10 log10(1 / mean squared error); of a codec with tokens, the whole level of the fewest bytes.
            rate: samples a second of an array; None: those of the codec.
            bpp: for images only.
            compact: for images only; sounds have one form of header.
            packets: of a codec with tokens: stretches of time into which each segment is cut, up to 255. Each has a
                checksum, so that damage costs the packets that it meets (`decode` with `conceal`) and not the segment.
                0: none.
            effort: for images only.
            progress: called with the segments done and of the whole sound (one more than done, where it is not known).

        Returns:
            The bytes of a .cpd file.

        Raises:
            UsageError: quality out of range, more than one of quality, kbps and psnr, packets of a codec without
                tokens, an effort, or no sound.
            CompandError: no quality reaches the wanted kbps or psnr for this sound.
            MediaError: the source cannot be read, or has no samples, or some that are not numbers.
        """
        if bpp is not None:
            raise UsageError("bpp is for images: give kbps")
        self._check_packets(packets)
        self._check_effort(effort)
        if sum(target is not None for target in (quality, kbps, psnr)) > 1:
            raise UsageError("quality, kbps and psnr exclude each other: give one")
        if any(target is not None and math.isnan(target) for target in (kbps, psnr)):
            raise UsageError("kbps or psnr is not a number: give one")
        with _SoundSource.of(source, rate or self.rate) as sound:
            if sound.channels > MAX_CHANNELS:
                # A fault of this file, where the same number given to `encoder` is one of the call.
                fact = f"the sound has {sound.channels} channels"
                raise MediaError(f"{fact}: at most {MAX_CHANNELS} can be coded, split it")
            shift = _shift(sound)
            if kbps is None and psnr is None:
                level = self.quality_units(min(4.0, self.levels) if quality is None else quality)
                return self._encode(sound, level, shift, packets, progress)
            return self._search(sound, kbps, psnr, shift, packets, progress)

    def decode(
        self, data: bytes, *, partial: bool = False, conceal: bool = False, progress: Progress | None = None
    ) -> Sound:
        """Decodes a file written by this codec.

        Args:
            data: the bytes of a .cpd file.
            partial: decode what is intact; damaged segments come out silent and are listed in `Sound.damage`. Samples
                within `transform.context` of them differ from those of the intact file.
            conceal: as `partial`, but of a damaged segment tokens are estimated where packets are lost, as long as one
                is intact.
            progress: called after each segment.

        Raises:
            BitstreamError: damage (without `partial` or `conceal`), a damaged header, or no segment that can be
                decoded.
            CheckpointError: the file needs another checkpoint.
            UsageError: `conceal`, of a codec without tokens.
        """
        blocks = self.decode_blocks(data, partial=partial, conceal=conceal, progress=progress)
        samples = np.concatenate(list(blocks), axis=1)
        return Sound(samples, blocks.rate, damage=tuple(blocks.damage))

    def decode_blocks(
        self, data: bytes, *, partial: bool = False, conceal: bool = False, progress: Progress | None = None
    ) -> DecodedBlocks:
        """As `decode`, block by block: an hour of sound needs no more memory than a minute (beside the file)."""
        if conceal:
            self._require_tokens()
        content = self._read(data, partial or conceal)
        return DecodedBlocks(self, content, partial or conceal, data if conceal else None, progress)

    def check(self, data: bytes, progress: Progress | None = None) -> None:
        content = self._read(data, partial=False)
        for index in range(len(content.chunks)):
            self._segment(content, index)
            if progress is not None:
                progress(index + 1, len(content.chunks))

    def latents(self, data: bytes) -> Tensor:
        """The dequantised latents of a file, without synthesis: float32 [M, ceil(n / stride)] for n samples at the
        codec's rate; [groups, M, ...] where the file has more channels than the codec takes at once. Those of a quiet
        sound are of the sound made louder."""
        content = self._read(data, partial=False)
        geometry = _geometry(content.header)
        grid = torch.cat([self._segment(content, i).latents for i in range(len(content.chunks))], dim=3)
        begin = self.edge // self.transform.stride
        length = -(-self._coded_length(geometry) // self.transform.stride)
        y_hat = grid[:, :, 0, begin : begin + length]
        return y_hat[0] if len(y_hat) == 1 else y_hat

    def tokens(self, data: bytes) -> Tensor:
        """The tokens of a file, without synthesis: int64 [codebooks, frames] on the CPU; [groups, codebooks, frames]
        where the file has more channels than the codec takes at once. There are (n + 2 `edge`) / stride frames, rounded
        up, for n samples at the codec's rate; tokens of a codebook count from 0 to below `vocabulary[level - 1]`. Those
        of a quiet sound are of the sound made louder.

        Raises:
            BitstreamError, CheckpointError: as `decode`.
            UsageError: this codec has no tokens.
        """
        self._require_tokens()
        content = self._read(data, partial=False)
        parts = [self._segment_tokens(content, index) for index in range(len(content.chunks))]
        indices = torch.cat(parts, dim=2)
        return indices[0] if len(indices) == 1 else indices

    def token_geometry(self, data: bytes) -> dict[str, Any]:
        """Samples, rate, channels, quality and gain of a file, and where it is `loud`: `detokenize(tokens(data),
        **token_geometry(data))` has the samples of `decode(data)`."""
        content = self._read(data, partial=False)
        header = content.header
        geometry = _geometry(header)
        ratio = resampling_ratio(geometry.sample_rate, self.rate)

        def begin(segment: int) -> int:
            place = math.ceil((segment * header.chunk_size - self.edge) / ratio)
            return min(max(place, 0), geometry.samples)

        loud = [index for index, chunk in enumerate(content.chunks) if chunk and chunk[0] & LOUD]
        return {
            "samples": geometry.samples,
            "rate": geometry.sample_rate,
            "channels": geometry.channels,
            "quality": header.settings[0] / QUALITY_STEPS,
            "gain": 2.0 ** -sum(header.settings[1:]),
            "loud": [(begin(index), begin(index + 1)) for index in loud],
        }

    def detokenize(
        self,
        tokens: Any,
        *,
        samples: int | None = None,
        rate: int | None = None,
        channels: int | None = None,
        quality: float | None = None,
        gain: float = 1.0,
        loud: Sequence[tuple[int, int]] = (),
    ) -> Sound:
        """Tokens to a sound within [-1, 1], beyond it where it is said to be loud.

        Args:
            tokens: integers [codebooks, frames] or [groups, codebooks, frames], an array, tensor or nested list.
            samples: of the sound, at its own rate; None: as many as the frames hold.
            rate: samples a second of the sound; None: the codec's.
            channels: of the sound; None: those that the groups hold.
            quality: that of the tokens; None where the number of codebooks tells it.
            gain: what samples are multiplied by.
            loud: runs [start, stop) of samples that may exceed [-1, 1], as those of a source beyond full scale do.

        Raises:
            UsageError: tokens of another shape, beyond the vocabulary, or of a quality that has to be told; a sound
                that they are not of.
        """
        indices, chosen = self._checked_tokens(tokens, quality)
        groups = 1 if indices.ndim == 2 else len(indices)
        rate = rate or self.rate
        if rate is None:
            raise UsageError("this codec has no sample rate of its own: give the sound's rate")
        if samples is None:
            samples = self._most_samples(0, indices.shape[-1], rate)
        sound = self.reconstruct(
            self.dequantise(indices.int(), quality=chosen),
            samples=samples,
            rate=rate,
            channels=groups * self.channels if channels is None else channels,
            quality=chosen,
        )
        played = sound.samples * np.float32(gain)
        clipped = played.clip(-1, 1)
        for start, stop in loud:
            clipped[:, start:stop] = played[:, start:stop]
        return Sound(clipped, rate)

    @torch.inference_mode()
    def quantise(self, source: Any, *, quality: float) -> NDArray[np.int32]:
        """The integers of a whole sound, as a packed set keeps them. A quiet sound is not made louder, so that equal
        integers are equally loud.

        Args:
            source: as `encode` takes it.
            quality: 1 to `levels`.

        Returns:
            [M, (n + 2 edge) / stride, rounded up] for n samples at the codec's rate, where `edge` is
            `transform.edge`; [groups, M, ...] of a sound of more channels than the codec takes at once. Of a codec with
            tokens, codebooks stand in place of M.

        Raises:
            UsageError, MediaError: as `encode`.
        """
        level = self.quality_units(quality)
        with _SoundSource.of(source, self.rate) as sound:
            if sound.channels > MAX_CHANNELS:
                fact = f"the sound has {sound.channels} channels"
                raise MediaError(f"{fact}: at most {MAX_CHANNELS} can be coded, split it")
            cutter = _Cutter(self, sound.rate, sound.channels, self._segment_size(None))
            windows = chain(chain.from_iterable(map(cutter.push, sound.blocks())), cutter.finish())
            parts = [
                self.bottleneck.quantise(self._window_latents(window, level), level) for window in windows
            ]
        integers = torch.cat(parts, dim=3)[:, :, 0].cpu().numpy()
        return integers[0] if len(integers) == 1 else integers

    @torch.inference_mode()
    def reconstruct(
        self, latents: Tensor, *, samples: int, rate: int, channels: int, quality: float
    ) -> Sound:
        """Synthesis of dequantised latents, at the sound's own rate. Samples may exceed [-1, 1].

        Args:
            latents: float32 [M, N] or [groups, M, N], of the shape that `quantise` gives.
            samples, rate, channels: of the sound.
            quality: the one that the latents were made with.

        Raises:
            UsageError: the latents have another shape.
        """
        level, size = self.quality_units(quality), self._segment_size(None)
        geometry = AudioGeometry(samples, rate, channels)
        columns = self._grid_length(geometry) // self.transform.stride
        groups = -(-channels // self.channels)
        y_hat = latents.to(self.device)
        y_hat = y_hat if y_hat.ndim == 3 else y_hat[None]
        expected = (groups, self.transform.latent_channels, columns)
        if tuple(y_hat.shape) != expected:
            fact = (
                f"latents {list(latents.shape)} are no sound of {channels} x {samples} samples at {rate} Hz"
            )
            raise UsageError(f"{fact}: give {list(expected)}")
        player = _Player(self, geometry, (level,), size)
        step = size // self.transform.stride
        parts = [
            player.add(y_hat[:, :, None, start : start + step], last=start + step >= columns, state=LOUD)
            for start in range(0, columns, step)
        ]
        return Sound(np.concatenate([*parts, player.close(samples)], axis=1), rate)

    @torch.inference_mode()
    def estimate(self, source: Any, quality: float = 4.0, *, rate: int | None = None) -> float:
        """Information content of a sound's symbols in bits: what `encode` needs, without header and frames."""
        level = self.quality_units(quality)
        with _SoundSource.of(source, rate or self.rate) as sound:
            shift = _shift(sound)
            cutter = _Cutter(self, sound.rate, sound.channels, self._segment_size(None))
            windows = chain(chain.from_iterable(map(cutter.push, sound.blocks())), cutter.finish())
            return sum(self._bits(window.scaled(shift), level) for window in windows)

    def analyse(self, samples: Float32Array, level: int) -> Tensor:
        """y of a whole signal: [groups, M, 1, ceil(n / stride)].

        Args:
            samples: float32 [channels, n] at the codec's rate.
            level: quality in 1/32 level.
        """
        stride = self.transform.stride
        before = self.edge + self.transform.context if self.edge else 0
        columns = -(-samples.shape[1] // stride)
        after = columns * stride - samples.shape[1] + before
        window = np.pad(samples, ((0, 0), (before, after)), mode="edge")
        return self._analyse(window, level)[..., before // stride : before // stride + columns]

    def encoder(
        self,
        rate: int,
        channels: int,
        *,
        quality: float = 4.0,
        segment: int | None = None,
        shift: int = 0,
        packets: int = 0,
    ) -> AudioEncoder:
        """Encodes a sound as it comes.

        Args:
            rate: samples a second of what will be pushed.
            channels: number of its channels, 1 to 32.
            quality: 1 to `levels`.
            segment: samples of a segment at the codec's rate, rounded up to what the transform allows; shorter ones
                mean less latency, and more bytes. None: SEGMENT.
            shift: makes a quiet sound 2**shift times louder while it is coded, 0 to MAX_SHIFT.
            packets: see `encode`.

        Raises:
            UsageError: a value is out of range.
        """
        if not 0 <= shift <= MAX_SHIFT:
            raise UsageError(f"shift {shift} does not exist: choose 0 to {MAX_SHIFT}")
        self._check_packets(packets)
        level, size = self.quality_units(quality), self._segment_size(segment)
        return AudioEncoder(self, rate, channels, level, size, shift, packets)

    def decoder(self) -> AudioDecoder:
        """Decodes a file as its bytes come."""
        return AudioDecoder(self)

    # ------------------------------------------------------------------------------------------------- encoding

    def _encode(
        self, sound: _SoundSource, level: int, shift: int, packets: int, progress: Progress | None
    ) -> bytes:
        size = self._segment_size(None)
        encoder = AudioEncoder(self, sound.rate, sound.channels, level, size, shift, packets)
        total = None
        if sound.frames is not None:
            geometry = AudioGeometry(sound.frames, sound.rate, sound.channels)
            total = -(-self._grid_length(geometry) // encoder.segment)
        parts = []
        for block in sound.blocks():
            before = encoder.segments
            parts.append(encoder.push(block))
            if progress is not None and encoder.segments > before:
                progress(encoder.segments, total or encoder.segments + 1)
        parts.append(encoder.finish())
        if progress is not None:
            progress(encoder.segments, encoder.segments)
        return b"".join(parts)

    def _search(
        self,
        sound: _SoundSource,
        kbps: float | None,
        psnr: float | None,
        shift: int,
        packets: int,
        progress: Progress | None,
    ) -> bytes:
        """The file of the best quality within `kbps`, or of the lowest that reaches `psnr`; of a codec with tokens, of
        the highest level, or of the fewest bytes."""
        low, high = QUALITY_STEPS, self.levels * QUALITY_STEPS
        files: dict[int, bytes] = {}

        def rate_of(data: bytes) -> float:
            shape = _geometry(container.read_header(data))
            return 8 * len(data) * shape.sample_rate / (1000 * shape.samples)

        def reached_by(data: bytes) -> bool:
            """Whether a file has left the wanted range upwards (kbps) or reached it (psnr)."""
            return rate_of(data) > kbps if kbps is not None else self._psnr(sound, data) >= float(psnr or 0)

        def encoded(level: int) -> bytes:
            files[level] = data = self._encode(sound, level, shift, packets, progress)
            return data

        def reaches(level: int) -> bool:
            return reached_by(encoded(level))

        def level_of(data: bytes) -> int:
            return container.read_header(data).settings[0]

        def unreachable(tried: Sequence[bytes]) -> CompandError:
            if kbps is not None:
                reached = f"{min(map(rate_of, tried)):.2f} kbps is the least"
                return CompandError(f"{kbps:g} kbps cannot be reached for this sound: {reached}; allow more")
            reached = f"{max(self._psnr(sound, data) for data in tried):.2f} dB is the most"
            return CompandError(f"{psnr:g} dB cannot be reached for this sound: {reached}; ask for less")

        if self.vocabulary:
            # Squared error says little of what codebooks make of sounds: what fits a limit is chosen by its level.
            best, tried = self._best_whole_level(
                encoded,
                lambda data: reached_by(data) == (kbps is None),
                lambda data: (level_of(data) if kbps is not None else 0, -len(data)),
            )
            if best is None:
                raise unreachable(tried)
            return best
        first = first_level(low, high, reaches)
        wanted = first - 1 if kbps is not None else first
        if not low <= wanted <= high:
            raise unreachable([files[low if kbps is not None else high]])
        return files[wanted]

    def _psnr(self, sound: _SoundSource, data: bytes) -> float:
        tape = _Tape(sound.channels)
        original = sound.blocks()
        error, place = 0.0, 0
        for block in self.decode_blocks(data):
            stop = place + block.shape[1]
            while tape.stop < stop:
                tape.append(next(original))
            difference = block.astype(np.float64) - tape.window(place, stop)
            error += float(np.square(difference).sum())
            tape.drop(stop)
            place = stop
        return 10 * math.log10(place * sound.channels / error) if error else math.inf

    @torch.inference_mode()
    def _analyse(self, samples: Float32Array, level: int) -> Tensor:
        """y of a window: samples [channels, n], n a multiple of the stride -> [groups, M, 1, n / stride]."""
        channels = len(samples)
        groups = -(-channels // self.channels)
        chosen = np.minimum(np.arange(groups * self.channels), channels - 1)
        x = torch.from_numpy(samples[chosen]).to(self.device).view(groups, self.channels, 1, -1)
        return self.transform.analysis(x, torch.full((groups,), level, device=self.device))

    def _window_latents(self, window: _Window, level: int) -> Tensor:
        y = self._analyse(window.samples, level)
        return y[..., window.skip : window.skip + window.columns]

    def _bits(self, window: _Window, level: int) -> float:
        y = self._window_latents(window, level)
        return float(self.bottleneck(y, torch.full((len(y),), level, device=self.device)).bits.sum())

    def _compress(self, window: _Window, level: int, packets: int) -> bytes:
        """The chunk of a segment."""
        payloads = self._payloads(self._window_latents(window, level), level, packets)
        opening = bytes((LOUD * window.loud + LAST * window.last,))
        columns = COLUMNS.pack(window.columns) if window.last else b""
        return b"".join((opening, columns, *(LENGTH.pack(len(p)) for p in payloads[:-1]), *payloads))

    def _segment_size(self, wanted: int | None) -> int:
        """A segment of about `wanted` samples. Raises UsageError if that is more than decoders accept."""
        unit = math.lcm(self.transform.stride, UNIT)
        size = -(-(SEGMENT if wanted is None else wanted) // unit) * unit
        if not 0 < size <= MAX_SEGMENT:
            raise UsageError(f"segments of {wanted} samples cannot be coded: choose 1 to {MAX_SEGMENT}")
        return size

    def _coded_length(self, geometry: AudioGeometry) -> int:
        """Samples of a sound at the codec's rate."""
        return math.ceil(geometry.samples * resampling_ratio(geometry.sample_rate, self.rate))

    def _grid_length(self, geometry: AudioGeometry) -> int:
        """Samples that the latents of a sound stand for."""
        stride = self.transform.stride
        return -(-(self._coded_length(geometry) + 2 * self.edge) // stride) * stride

    def _most_samples(self, start: int, columns: int, rate: int) -> int:
        """The longest sound whose last segment begins at `start` and has so many latent positions."""
        coded = start + columns * self.transform.stride - 2 * self.edge
        return max(math.floor(coded / resampling_ratio(rate, self.rate)), 1)

    # ------------------------------------------------------------------------------------------------- decoding

    def _read(self, data: bytes, partial: bool) -> Container:
        content = container.read(data, partial=partial)
        self._check_header(content.header)
        self._check_lengths(content)
        return content

    def _check_lengths(self, content: Container) -> None:
        """Raises BitstreamError where a chunk, be it lost, is said to be shorter than its segment can be: damage does
        not forge lengths, and each would be given out as a segment's worth of silence."""
        header, final = content.header, len(content.chunks) - 1
        whole, rest = self._shortest_chunk(header, 0), self._shortest_chunk(header, final)
        for index, length in enumerate(content.lengths):
            if length < (whole if index < final else rest):
                fact = f"{length} bytes cannot hold a segment: the file is damaged, get an intact copy"
                raise BitstreamError(fact, chunk=index, offset=content.offsets[index])

    def _shortest_chunk(self, header: Header, index: int) -> int:
        """Bytes below which no chunk is that holds the segment `index` of a file."""
        known = index + 1 < header.chunk_count() or _geometry(header).samples > 0
        payload = self._shortest_payload(self._columns(header, index) if known else 1)
        groups = -(-_geometry(header).channels // self.channels)
        return 1 + (groups - 1) * LENGTH.size(payload) + groups * payload

    def _shortest_payload(self, columns: int) -> int:
        """Bytes below which no payload is that holds so many latent positions of a group."""
        return max(math.ceil((self.bottleneck.least_bits((1, columns)) - SLACK_BITS) / 8), 0)

    def _longest_chunk(self, header: Header) -> int:
        """Bytes above which no chunk of a file is."""
        groups = -(-_geometry(header).channels // self.channels)
        latents = self.transform.latent_channels * (header.chunk_size // self.transform.stride)
        return groups * (GROUP_BYTES + LATENT_BYTES * latents)

    def _check_header(self, header: Header) -> None:
        """Raises CheckpointError or BitstreamError unless this codec may have written the header."""
        info = self._info_for(header)
        geometry = header.geometry
        if not isinstance(geometry, AudioGeometry) or not 1 <= len(header.settings) <= 2:
            raise _implausible(f"it does not describe a sound of {info.codec}")
        if geometry.channels > MAX_CHANNELS:
            raise _implausible(f"it announces {geometry.channels} channels, beyond {MAX_CHANNELS}")
        if geometry.sample_rate > MAX_RATE:
            raise _implausible(f"it announces {geometry.sample_rate} samples a second, beyond {MAX_RATE}")
        size = header.chunk_size
        if not 0 < size <= MAX_SEGMENT or size % self.transform.stride:
            raise _implausible(f"it asks for segments of {size} samples")
        if not QUALITY_STEPS <= header.settings[0] <= self.levels * QUALITY_STEPS:
            raise _implausible(f"it asks for quality {header.settings[0] / QUALITY_STEPS:g}")
        if len(header.settings) == 2 and not 1 <= header.settings[1] <= MAX_SHIFT:
            raise _implausible(f"it asks for a shift by {header.settings[1]} bits")
        if geometry.samples and geometry.segments != -(-self._grid_length(geometry) // size):
            raise _implausible(f"{geometry.samples} samples do not fill {geometry.segments} segments")

    def _segment(self, content: Container, index: int) -> _Segment:
        """A segment of a file. Raises BitstreamError that names the chunk."""
        try:
            parts = self._parts(content, index)
            return _Segment(self._decompress(parts, content.header.settings[0]), parts.loud, parts.last)
        except BitstreamError as error:
            raise BitstreamError(str(error), chunk=index, offset=content.offsets[index]) from None

    @torch.inference_mode()
    def _segment_tokens(self, content: Container, index: int) -> Tensor:
        """Tokens of a segment of a file, int64 [groups, codebooks, columns] on the CPU. Raises BitstreamError that
        names the chunk."""
        level = content.header.settings[0]
        try:
            parts = self._parts(content, index)
            tokens = [
                self.bottleneck.decompress_indices(payload, (1, parts.columns), level)
                for payload in parts.payloads
            ]
            return torch.stack(tokens)[:, :, 0].cpu()
        except BitstreamError as error:
            raise BitstreamError(str(error), chunk=index, offset=content.offsets[index]) from None

    def _segment_concealed(self, content: Container, index: int, data: bytes) -> _Segment:
        """A damaged segment of a file whose number of samples is known, with estimates where packets are lost; says so
        in the damage. Raises BitstreamError where nothing is intact."""
        header, final = content.header, index + 1 == len(content.chunks)
        columns, groups = self._columns(header, index), -(-_geometry(header).channels // self.channels)
        if not _geometry(header).samples:
            raise BitstreamError("the end of the file is missing")
        start = content.offsets[index]
        source = Source(memoryview(data[start : start + content.lengths[index]]), 0)
        # What the header tells need not be believed of the chunk, whose opening may be damaged too.
        loud = bool(source.take(1)[0] & LOUD)
        source.take(len(COLUMNS.pack(columns)) if final else 0)
        lengths = [LENGTH.unpack(source) for _ in range(groups - 1)]
        payloads = [source.take(length) for length in lengths]
        payloads.append(source.take(len(source.view) - source.offset))
        intact: dict[int, tuple[Tensor, int]] = {}
        for group, payload in enumerate(payloads):
            with suppress(BitstreamError):
                intact[group] = self._concealed(payload, (1, columns), header.settings[0])
        if not intact:
            raise BitstreamError("no packet is intact")
        # For a group that is lost as a whole the nearest one: channels of a sound are alike.
        taken = [min(intact, key=lambda other: abs(other - group)) for group in range(groups)]
        lost = max(lost for _, lost in intact.values()) if len(intact) == groups else columns
        content.damage[:] = [fault for fault in content.damage if fault.chunk != index]
        fact = f"{lost} of {columns} positions are estimated"
        content.damage.append(BitstreamError(fact, chunk=index, offset=start))
        return _Segment(torch.stack([intact[group][0] for group in taken]), loud, final)

    def _parts(self, content: Container, index: int) -> _Parts:
        """What a chunk of a file consists of. Raises BitstreamError unless it is intact and fits its place."""
        chunk = content.chunks[index]
        if chunk is None:
            raise BitstreamError("the chunk is damaged")
        parts = self._split(chunk, content.header)
        final = index + 1 == len(content.chunks)
        if _geometry(content.header).samples:
            fits = parts.last == final and parts.columns == self._columns(content.header, index)
        else:
            fits = final or not parts.last
        if not fits:
            raise BitstreamError("the chunk does not fit its place: the file is damaged")
        return parts

    def _columns(self, header: Header, index: int) -> int:
        """Latent positions of a segment, as far as the header tells."""
        geometry, size = _geometry(header), header.chunk_size
        rest = self._grid_length(geometry) - index * size if geometry.samples else size
        return min(rest, size) // self.transform.stride

    def _split(self, chunk: bytes, header: Header) -> _Parts:
        """What `_compress` put together. Raises BitstreamError where it did not."""
        groups = -(-_geometry(header).channels // self.channels)
        most = header.chunk_size // self.transform.stride
        source = Source(memoryview(chunk), 0)
        try:
            flags = source.take(1)[0]
            columns = COLUMNS.unpack(source) if flags & LAST else most
            lengths = [LENGTH.unpack(source) for _ in range(groups - 1)]
            payloads = [source.take(length) for length in lengths]
        except BitstreamError:
            raise BitstreamError("the chunk does not decode: the file is damaged") from None
        payloads.append(chunk[source.offset :])
        if flags > LOUD + LAST or not 1 <= columns <= most:
            raise BitstreamError("the chunk does not decode: the file is damaged")
        shortest = min(map(len, payloads))
        if shortest < self._shortest_payload(columns):
            fact = f"{shortest} bytes cannot hold {columns * self.transform.stride} samples"
            raise BitstreamError(f"{fact}: the file is damaged")
        return _Parts(payloads, columns, bool(flags & LOUD), bool(flags & LAST))

    @torch.inference_mode()
    def _decompress(self, parts: _Parts, level: int) -> Tensor:
        """Latents [groups, M, 1, columns]. Raises BitstreamError on damaged payloads."""
        return self.bottleneck.decompress(parts.payloads, (1, parts.columns), level)

    @torch.inference_mode()
    def _synthesise(self, latents: Tensor, level: int, channels: int) -> Float32Array:
        """Latents [groups, M, 1, n] -> samples [channels, n * stride]."""
        groups = len(latents)
        x = self.transform.synthesis(latents, torch.full((groups,), level, device=self.device)).float()
        samples: Float32Array = x.reshape(groups * self.channels, -1).cpu().numpy()
        copies = samples[channels - 1 :].mean(0, keepdims=True)
        return np.concatenate((samples[: channels - 1], copies))


class AudioEncoder:
    """Samples in, bytes of a .cpd file out. Made by `AudioCodec.encoder`.

    Attributes:
        latency: samples (at the source's rate) that may be held before the bytes that tell them are out.
        segment: samples of a segment at the codec's rate.
        segments: number of segments that are out.
    """

    def __init__(
        self,
        codec: AudioCodec,
        rate: int,
        channels: int,
        level: int,
        segment: int,
        shift: int,
        packets: int = 0,
    ) -> None:
        info = codec._frozen_info()
        if not 1 <= channels <= MAX_CHANNELS:
            raise UsageError(f"{channels} channels cannot be coded: give 1 to {MAX_CHANNELS}")
        if not 1 <= rate <= MAX_RATE or int(rate) != rate:
            raise UsageError(f"sample rate is {rate}: give an integer from 1 to {MAX_RATE}, in Hz")
        self.segment = segment
        self.segments = 0
        self._codec, self._level, self._shift, self._packets = codec, level, shift, packets
        self._cutter = _Cutter(codec, rate, channels, segment)
        self.latency = self._cutter.latency
        self._writer = AudioFrameWriter(
            Header(
                codec_id=info.codec_id,
                codec_name="" if info.codec_id else info.codec,
                symbols=info.symbols,
                synthesis=info.synthesis,
                settings=(level, shift) if shift else (level,),
                geometry=AudioGeometry(0, int(rate), channels),
                chunk_size=segment,
            )
        )
        self._begun = self._finished = False

    def push(self, samples: Float32Array) -> bytes:
        """Takes samples, float32 [channels, n]; returns the bytes that are ready, b"" if none are.

        Raises:
            UsageError: another type or number of channels, or the file is finished.
            MediaError: samples that are not numbers.
        """
        self._require_unfinished()
        return self._written(self._cutter.push(samples))

    def finish(self) -> bytes:
        """The rest of the file. Raises MediaError if no samples were pushed, UsageError if it was given already."""
        self._require_unfinished()
        self._finished = True
        return self._written(self._cutter.finish()) + self._writer.end(self._cutter.taken)

    def _require_unfinished(self) -> None:
        if self._finished:
            raise UsageError("the file is finished: make another encoder")

    def _written(self, windows: Iterator[_Window]) -> bytes:
        parts = []
        for window in windows:
            chunk = self._codec._compress(window.scaled(self._shift), self._level, self._packets)
            parts.append(self._writer.frame(chunk))
            self.segments += 1
        if not self._begun:
            parts.insert(0, self._writer.head)
            self._begun = True
        return b"".join(parts)


class AudioDecoder:
    """Bytes of a .cpd file in, samples out. Made by `AudioCodec.decoder`.

    Attributes:
        rate, channels: of the sound; 0 until the header has been read.
        latency: samples (at the sound's rate) of complete segments that may be held; 0 until the header has been read.
    """

    def __init__(self, codec: AudioCodec) -> None:
        self.rate = self.channels = self.latency = 0
        self._codec = codec
        self._reader = AudioFrameReader(accept=self._begin)
        self._header: Header | None = None
        self._player: _Player | None = None
        self._count = 0
        self._ended = self._finished = False
        self._error: BitstreamError | None = None

    def push(self, data: bytes) -> Float32Array:
        """Takes bytes; returns the samples that are ready, float32 [channels, n] ([0, 0] until the header is read).

        Damage that follows intact segments in the same bytes is raised by the next call.

        Raises:
            BitstreamError: the bytes are damaged; so does every call after it.
            CheckpointError: the file needs another checkpoint.
            UsageError: the file is finished.
        """
        self._require_usable()
        chunks = self._reader.push(data)
        if self._player is None or self._header is None:
            return np.zeros((0, 0), np.float32)
        ready = [np.zeros((self.channels, 0), np.float32)]
        for index, chunk in enumerate(chunks):
            try:
                if self._ended:
                    raise BitstreamError("the chunk follows the last one")
                segment = self._codec._split(chunk, self._header)
                latents = self._codec._decompress(segment, self._header.settings[0])
            except BitstreamError as error:
                self._error = BitstreamError(str(error), chunk=self._count)
                if index == 0:
                    raise self._error from None
                break
            self._ended = segment.last
            self._count += 1
            ready.append(self._player.add(latents, segment.last, LOUD * segment.loud))
        return np.concatenate(ready, axis=1)

    def finish(self) -> Float32Array:
        """The rest of the samples [channels, n]. Raises BitstreamError if the file is damaged or not complete,
        UsageError if they were given already."""
        self._require_usable()
        header = self._reader.finish()
        self._codec._check_header(header)
        if self._player is None or not self._ended:
            raise BitstreamError("the last chunk is missing: get an intact copy", chunk=self._count)
        geometry = _geometry(header)
        if self._player.columns * self._codec.transform.stride != self._codec._grid_length(geometry):
            raise _implausible(f"{geometry.samples} samples do not fill it")
        self._finished = True
        return self._player.close(geometry.samples)

    def _begin(self, header: Header) -> int:
        """Takes the header; returns the most bytes of a chunk."""
        self._codec._check_header(header)
        self._header, self._player = header, _Player.of(self._codec, header)
        self.rate, self.channels = self._player.rate, self._player.channels
        self.latency = self._player.latency
        return self._codec._longest_chunk(header)

    def _require_usable(self) -> None:
        if self._finished:
            raise UsageError("the file is finished: make another decoder")
        if self._error is not None:
            raise self._error


class DecodedBlocks(Iterator[Float32Array]):
    """The samples of a file, float32 [channels, n] at a time, with bounded memory. Made by `AudioCodec.decode_blocks`.

    Attributes:
        rate: samples a second.
        channels: of the sound.
        damage: what could not be restored (partial only); complete after the last block.
    """

    def __init__(
        self,
        codec: AudioCodec,
        content: Container,
        partial: bool,
        data: bytes | None,
        progress: Progress | None,
    ) -> None:
        """data: the file, for tokens of damaged segments to be estimated; None: they are lost."""
        geometry = _geometry(content.header)
        self.rate, self.channels = geometry.sample_rate, geometry.channels
        self.damage = content.damage
        self._blocks = self._decoded(codec, content, partial, data, progress)

    def __next__(self) -> Float32Array:
        return next(self._blocks)

    def _decoded(
        self,
        codec: AudioCodec,
        content: Container,
        partial: bool,
        data: bytes | None,
        progress: Progress | None,
    ) -> Iterator[Float32Array]:
        player = _Player.of(codec, content.header)
        samples = _geometry(content.header).samples
        total = len(content.chunks)
        intact = 0
        if data is None and all(chunk is None for chunk in content.chunks):
            raise self._nothing()
        for index in range(total):
            last = index + 1 == total
            try:
                segment = self._segment(codec, content, index, data)
                intact += 1
                if segment.last and not samples:
                    # The end is lost, but not where it is: within a latent position.
                    samples = codec._most_samples(
                        index * content.header.chunk_size, segment.columns, self.rate
                    )
                block = player.add(segment.latents, last, LOUD * segment.loud)
            except BitstreamError as error:
                if not partial:
                    raise
                if content.chunks[index] is not None:
                    self.damage.append(error)
                columns = codec._columns(content.header, index)
                groups = -(-self.channels // codec.channels)
                lost = torch.zeros(groups, codec.transform.latent_channels, 1, columns, device=codec.device)
                block = player.add(lost, last, _SILENT)
            if block.shape[1]:
                yield block
            if progress is not None:
                progress(index + 1, total)
        if not intact:
            raise self._nothing()
        yield player.close(samples)

    def _segment(self, codec: AudioCodec, content: Container, index: int, data: bytes | None) -> _Segment:
        try:
            return codec._segment(content, index)
        except BitstreamError:
            if data is None:
                raise
            with suppress(BitstreamError):
                return codec._segment_concealed(content, index, data)
            raise

    def _nothing(self) -> BitstreamError:
        first = self.damage[0]
        fact = "no part of the sound is intact: get an intact copy"
        return BitstreamError(fact, chunk=first.chunk, offset=first.offset)


# ------------------------------------------------------------------------------------------------ parts of these


class _Window(NamedTuple):
    """What is analysed to code a segment."""

    samples: Float32Array  # [channels, n] at the codec's rate, with its surroundings
    skip: int  # latent positions before the segment's own
    columns: int  # latent positions of the segment
    loud: bool  # whether its source exceeds [-1, 1]
    last: bool

    def scaled(self, shift: int) -> _Window:
        """The window made 2**shift times louder."""
        return self._replace(samples=self.samples * np.float32(2**shift)) if shift else self


class _Parts(NamedTuple):
    """What a chunk consists of."""

    payloads: list[bytes]  # one a group
    columns: int  # latent positions
    loud: bool
    last: bool


class _Segment(NamedTuple):
    """What a chunk holds."""

    latents: Tensor  # [groups, M, 1, columns]
    loud: bool
    last: bool

    @property
    def columns(self) -> int:
        return self.latents.shape[3]


_SILENT = -1
"""Stands for the flags of a segment that is lost."""


class _Tape:
    """The latest stretch of a signal [channels, n], by absolute position [start, stop)."""

    def __init__(self, channels: int, start: int = 0) -> None:
        self.start = self.stop = start
        self._pieces = [np.zeros((channels, 0), np.float32)]

    def append(self, piece: Float32Array) -> None:
        self._pieces.append(piece)
        self.stop += piece.shape[1]

    def window(self, start: int, stop: int) -> Float32Array:
        self._pieces = [np.concatenate(self._pieces, axis=1)]
        return self._pieces[0][:, start - self.start : stop - self.start]

    def drop(self, before: int) -> None:
        """Forgets what lies before a position."""
        if before > self.start:
            self._pieces = [self.window(before, self.stop).copy()]
            self.start = before


class _Cutter:
    """Samples in, windows of the segments out.

    Positions count samples at the codec's rate from the beginning of the grid, `edge` samples before the sound. A
    segment is ready when a sample beyond it and its context is there, so that the last one is left to `finish`.

    Attributes:
        taken: samples that were pushed.
        latency: samples that may be held before the segment that has them is ready.
    """

    def __init__(self, codec: AudioCodec, rate: int, channels: int, segment: int) -> None:
        self._stride, self._context = codec.transform.stride, codec.transform.context
        self._edge, self._segment, self._channels = codec.edge, segment, channels
        self._ratio = resampling_ratio(rate, codec.rate)
        self._resampler = _resampler(channels, self._ratio, segment)
        self._ahead = max(self._context, 1)
        self.latency = math.ceil((segment + self._ahead) / self._ratio) + 1
        if self._resampler is not None:
            self.latency += self._resampler.latency
        # Where the grid begins before the sound, so does what analysis sees around it.
        self._around = self._edge + self._context if self._edge else 0
        self._tape = _Tape(channels, self._edge - self._around)
        self._loud: set[int] = set()
        self._next = 0
        self.taken = 0

    def push(self, samples: Float32Array) -> Iterator[_Window]:
        if samples.dtype != np.float32 or samples.ndim != 2 or len(samples) != self._channels:
            shape = f"{samples.dtype} {list(samples.shape)}"
            raise UsageError(f"samples are {shape}: give float32 [{self._channels}, n]")
        if not np.isfinite(samples).all():
            raise MediaError("the sound has samples that are not numbers: export it again")
        beyond = np.flatnonzero(np.abs(samples).max(0, initial=0) > 1)
        if beyond.size:
            # Counted from where the push begins, in Python integers: positions since the beginning, times the terms of
            # the ratio, may exceed 64 bits.
            up, down = self._ratio.numerator, self._ratio.denominator
            whole, part = divmod(self.taken * up, down)
            first, place = divmod(whole + self._edge, self._segment)
            segments = (place + (part + beyond * up) // down) // self._segment
            self._loud.update(first + segment for segment in np.unique(segments).tolist())
        self.taken += samples.shape[1]
        self._append(samples if self._resampler is None else self._resampler.push(samples))
        while self._tape.stop >= (self._next + 1) * self._segment + self._ahead:
            yield self._cut(self._segment, last=False)

    def finish(self) -> Iterator[_Window]:
        if self.taken == 0:
            raise MediaError("the sound has no samples: give one that has")
        if self._resampler is not None:
            self._append(self._resampler.finish())
        end = -(-(self._tape.stop + self._edge) // self._stride) * self._stride
        missing = end - self._tape.stop + (self._context if self._edge else 0)
        self._tape.append(np.repeat(self._tape.window(self._tape.stop - 1, self._tape.stop), missing, axis=1))
        while (rest := end - self._next * self._segment) > 0:
            yield self._cut(min(rest, self._segment), last=rest <= self._segment)

    def _append(self, samples: Float32Array) -> None:
        if self._tape.stop < self._edge and samples.shape[1]:
            self._tape.append(np.repeat(samples[:, :1], self._around, axis=1))
        self._tape.append(samples)

    def _cut(self, size: int, last: bool) -> _Window:
        begin = self._next * self._segment
        start = max(begin - self._context, self._tape.start)
        stop = min(begin + size + self._context, self._tape.stop)
        stop -= (stop - start) % self._stride
        samples = self._tape.window(start, stop)
        self._tape.drop(begin + self._segment - self._context)
        loud = self._next in self._loud
        self._loud.discard(self._next)
        self._next += 1
        return _Window(samples, (begin - start) // self._stride, size // self._stride, loud, last)


class _Player:
    """Latents in, samples out: the mirror of `_Cutter`.

    Samples come out as soon as the latents that synthesis looks at are there, those of the last segment by `close`,
    which knows where the sound ends.

    Attributes:
        rate, channels: of the sound.
        columns: latent positions added.
        latency: samples of the segments added that may be held.
    """

    def __init__(
        self, codec: AudioCodec, geometry: AudioGeometry, settings: tuple[int, ...], segment: int
    ) -> None:
        """settings: quality in 1/32 level and, of a sound that was made louder, the power of two."""
        self.rate, self.channels = geometry.sample_rate, geometry.channels
        self._codec, self._level, self._segment = codec, settings[0], segment
        self._scale = np.float32(2.0 ** -sum(settings[1:]))
        self._stride, self._edge = codec.transform.stride, codec.edge
        self._margin = codec.transform.context // self._stride
        self._ratio = resampling_ratio(self.rate, codec.rate)
        self._resampler = _resampler(self.channels, 1 / self._ratio, self._segment)
        held = codec.transform.context + (0 if self._resampler is None else self._resampler.latency)
        self.latency = math.ceil(held / self._ratio) + 1
        self._held: Tensor | None = None
        self._start = 0  # position of the first latent held
        self.columns = 0
        self._done = 0  # positions that have been synthesised
        self._coded = -self._edge  # samples that have been synthesised, from the first of the sound
        self._given = 0
        self._voids: deque[tuple[int, int]] = deque()  # runs [start, stop) of positions that are lost
        self._states: deque[int] = deque()  # of the segments from `_state_of` on
        self._state_of = 0

    @classmethod
    def of(cls, codec: AudioCodec, header: Header) -> _Player:
        """The player of a file."""
        return cls(codec, _geometry(header), header.settings, header.chunk_size)

    def add(self, latents: Tensor, last: bool, state: int) -> Float32Array:
        """Takes the latents of the next segment [groups, M, 1, n] and its flag LOUD, 0, or _SILENT."""
        self._held = latents if self._held is None else torch.cat((self._held, latents), dim=3)
        begin, self.columns = self.columns, self.columns + latents.shape[3]
        if state == _SILENT:
            if self._voids and self._voids[-1][1] == begin:
                begin = self._voids.pop()[0]
            self._voids.append((begin, self.columns))
        self._states.append(state)
        if last:
            return np.zeros((self.channels, 0), np.float32)
        return self._played(self._resampled(self._synthesised(self.columns - self._margin)))

    def close(self, samples: int) -> Float32Array:
        """The rest; samples: of the whole sound, 0 if that is not known."""
        coded = self._synthesised(self.columns)
        if samples:
            beyond = self._coded - math.ceil(samples * self._ratio)
            coded = coded[:, : coded.shape[1] - beyond]
        rest = self._resampled(coded)
        if self._resampler is not None:
            rest = np.concatenate((rest, self._resampler.finish()), axis=1)
        return self._played(rest[:, : samples - self._given] if samples else rest)

    def _synthesised(self, stop: int) -> Float32Array:
        """Samples of the sound from where the last call stopped to latent position `stop`, at the codec's rate."""
        parts = [np.zeros((self.channels, 0), np.float32)]
        while self._held is not None and self._done < stop:
            begin, end = self._void(stop)
            first = max(self._done - self._margin, 0)
            if begin > self._done:
                window = self._held[..., first - self._start : begin + self._margin - self._start]
                x = self._codec._synthesise(window.contiguous(), self._level, self.channels)
                x = x[:, (self._done - first) * self._stride : (begin - first) * self._stride] * self._scale
                self._done = begin
            else:
                x = np.zeros((self.channels, (end - self._done) * self._stride), np.float32)
                self._done = end
            parts.append(x[:, max(-self._coded, 0) :])
            self._coded += x.shape[1]
            self._held, self._start = self._held[..., first - self._start :], first
        return np.concatenate(parts, axis=1)

    def _void(self, stop: int) -> tuple[int, int]:
        """The next positions, below `stop`, for which synthesis would see nothing but lost ones: silence is given out
        there without it. (stop, stop) if there are none."""
        while self._voids:
            begin, end = self._voids[0]
            begin += self._margin if begin else 0
            end -= self._margin if end < self.columns else 0
            if end > max(begin, self._done):
                return min(begin, stop), min(end, stop)
            if self._voids[0][1] == self.columns:
                break
            self._voids.popleft()
        return stop, stop

    def _resampled(self, coded: Float32Array) -> Float32Array:
        return coded if self._resampler is None else self._resampler.push(coded)

    def _played(self, samples: Float32Array) -> Float32Array:
        """The samples as they are given out: clipped where the source was within [-1, 1], silent where it is lost."""
        samples = np.nan_to_num(samples)
        stop = self._given + samples.shape[1]
        while self._states:
            end = math.ceil(((self._state_of + 1) * self._segment - self._edge) / self._ratio)
            part = samples[:, max(self._begin() - self._given, 0) : max(min(end, stop) - self._given, 0)]
            if self._states[0] == _SILENT:
                part[:] = 0
            elif self._states[0] != LOUD:
                np.clip(part, -1, 1, out=part)
            if end > stop:
                break
            self._states.popleft()
            self._state_of += 1
        self._given = stop
        return samples

    def _begin(self) -> int:
        return math.ceil((self._state_of * self._segment - self._edge) / self._ratio)


@dataclass
class _SoundSource:
    """Where samples come from; a context manager that closes what it opened."""

    rate: int
    channels: int
    frames: int | None  # None: not known before the end
    blocks: Callable[[], Iterator[Float32Array]]  # all samples, from the first on, at every call
    opened: SoundReader | None = None

    @classmethod
    def of(cls, source: Any, rate: int | None) -> _SoundSource:
        """Raises UsageError for what is no sound, MediaError for files that cannot be read."""
        if isinstance(source, SoundReader):
            return cls(source.rate, source.channels, source.frames, lambda: source.blocks(BLOCK))
        if isinstance(source, (str, os.PathLike)) or hasattr(source, "read"):
            reader = SoundReader(source)
            return cls(reader.rate, reader.channels, reader.frames, lambda: reader.blocks(BLOCK), reader)
        sound = source if isinstance(source, Sound) else _as_sound(source, rate)

        def blocks() -> Iterator[Float32Array]:
            for start in range(0, sound.length, BLOCK):
                yield sound.samples[:, start : start + BLOCK]

        return cls(sound.rate, sound.channels, sound.length, blocks)

    def __enter__(self) -> _SoundSource:
        return self

    def __exit__(self, *_: object) -> None:
        if self.opened is not None:
            self.opened.close()


def _shift(sound: _SoundSource) -> int:
    """The largest power of two by which a sound may be multiplied to stay within [-1, 1], 0 to MAX_SHIFT."""
    peak = max((float(np.abs(block).max(initial=0)) for block in sound.blocks()), default=0.0)
    # NaN, which is refused when it is coded, compares false.
    return min(max(math.floor(-math.log2(peak)), 0), MAX_SHIFT) if 0 < peak < 1 else 0


def _as_sound(samples: Any, rate: int | None) -> Sound:
    array = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else samples
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind != "f":
        given = (
            f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(samples).__name__
        )
        raise UsageError(f"{given} is no sound: give a path, a Sound or floating-point samples [channels, N]")
    if rate is None:
        raise UsageError("this codec has no sample rate of its own: give the samples' rate")
    return Sound(np.atleast_2d(array).astype(np.float32, copy=False), rate)


def _resampler(channels: int, ratio: Fraction, segment: int) -> Resampler | None:
    """What brings a stream of segments to another rate, in steps that are short beside them."""
    return None if ratio == 1 else Resampler(channels, ratio, min(1 << 14, segment // 8))


def _geometry(header: Header) -> AudioGeometry:
    if not isinstance(header.geometry, AudioGeometry):
        raise _implausible("it does not describe a sound")
    return header.geometry


def _implausible(fact: str) -> BitstreamError:
    return BitstreamError(f"the header is damaged, {fact}: get an intact copy", offset=0)
