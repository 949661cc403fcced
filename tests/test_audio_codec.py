"""Sounds of every shape through a codec whose transform is a lapped cosine: what audio codecs share."""

from __future__ import annotations

import io
import math
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from compand import audio_codec, registry
from compand.audio_codec import AudioCodec, AudioEncoder
from compand.bottlenecks.factorized import FactorizedBottleneck
from compand.checkpoint import CheckpointInfo
from compand.codec import Transform
from compand.coding import container
from compand.coding.container import AudioFrameWriter, AudioGeometry
from compand.errors import BitstreamError, CheckpointError, CompandError, MediaError, UsageError
from compand.sounds import Resampler, Sound, SoundReader, resample, resampling_ratio

STRIDE = 16
RATE = 16000
SHORT = 256
"""A segment of 16 latent positions."""

slow = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class LappedCosine(Transform):
    """The modified discrete cosine transform: blocks overlap by half, and overlap-add restores the samples."""

    encoder_parts = ()
    stride = STRIDE
    context = STRIDE
    edge = STRIDE

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.latent_channels = channels, channels * STRIDE
        time, frequency = torch.arange(2 * STRIDE)[None], torch.arange(STRIDE)[:, None]
        window = torch.sin(math.pi * (time + 0.5) / (2 * STRIDE))
        phase = math.pi / STRIDE * (time + 0.5 + STRIDE / 2) * (frequency + 0.5)
        self.basis = nn.Parameter((window * torch.cos(phase) * math.sqrt(2 / STRIDE)).float()[:, None, None])

    def analysis(self, x: Tensor, quality: Tensor) -> Tensor:
        b, c, _, n = x.shape
        padded = F.pad(x.reshape(b * c, 1, 1, n), (0, STRIDE))
        return F.conv2d(padded, self.basis, stride=(1, STRIDE)).view(b, self.latent_channels, 1, n // STRIDE)

    def synthesis(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        b, _, _, n = y_hat.shape
        blocks = y_hat.reshape(b * self.channels, STRIDE, 1, n)
        x = F.conv_transpose2d(blocks, self.basis, stride=(1, STRIDE))
        return x[..., : n * STRIDE].reshape(b, self.channels, 1, n * STRIDE)

    def reduce_precision(self, dtype: torch.dtype) -> None:
        self.basis.data = self.basis.data.to(dtype)


class LappedCodec(AudioCodec):
    codec_id = 0

    def __init__(self, channels: int = 2, rate: int | None = RATE, trainable: bool = True) -> None:
        lambdas = [0.5 * 4**level for level in range(6)]
        bottleneck = FactorizedBottleneck(channels * STRIDE, lambdas, trainable)
        super().__init__(LappedCosine(channels), bottleneck, lambdas, channels=channels, rate=rate)
        self.architecture = {"channels": channels, "rate": rate}


def made(channels: int = 2, rate: int | None = RATE) -> LappedCodec:
    """A codec that is ready to code."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = LappedCodec(channels, rate)
    codec.bottleneck.freeze()
    codec.info = CheckpointInfo(
        name="lapped-v1",
        codec="lapped",
        codec_id=0,
        medium="audio",
        version=1,
        description="a test",
        parameters=0,
        size=0,
        path=Path("lapped-v1"),
        symbols=b"lapp",
        synthesis=b"synt",
        weights=b"none",
        qualities=(1, 6),
        architecture=codec.architecture,
    )
    return codec.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def codec() -> LappedCodec:
    return made()


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_codec, "SEGMENT", SHORT)


def music(channels: int = 2, length: int = 4000, seed: int = 0) -> np.ndarray:
    """Noise in which low frequencies prevail, float32 [channels, length]."""
    steps = np.random.default_rng(seed).normal(size=(channels, length))
    walk = np.cumsum(steps, 1) * 0.999 ** np.arange(length)[::-1]
    return (0.8 * walk / np.abs(walk).max()).astype(np.float32)


def pieces(samples: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    start = 0
    for size in sizes:
        yield samples[:, start : start + size]
        start += size
    yield samples[:, start:]


def encoded(encoder: AudioEncoder, parts: Iterator[np.ndarray]) -> list[bytes]:
    return [*map(encoder.push, parts), encoder.finish()]


def decibels(error: np.ndarray) -> float:
    return 10 * math.log10(max(float(np.square(error.astype(np.float64)).mean()), 1e-30))


def forged(
    data: bytes, change: Callable[[list[bytes]], list[bytes]] = lambda chunks: chunks, **header
) -> bytes:
    """The file with other chunks or another header, and checksums to match."""
    content = container.read(data)
    chunks = change(list(content.chunks))
    geometry = replace(content.header.geometry, segments=len(chunks))
    changed = replace(content.header, **({"geometry": geometry} | header))
    writer = AudioFrameWriter(changed)
    return b"".join([writer.head, *map(writer.frame, chunks), writer.end(changed.geometry.samples)])


# ---------------------------------------------------------------------------------------------------- any sound


@slow
@given(
    length=st.one_of(st.integers(1, 40), st.integers(1, 2000)),
    channels=st.integers(1, 8),
    rate=st.sampled_from([8000, 11025, 16000, 16001, 22050, 44100, 48000, 96000, 192000]),
    level=st.integers(32, 192),
    seed=st.integers(0, 99),
)
def test_sounds_of_any_length_rate_and_number_of_channels(
    codec, short_segments, length, channels, rate, level, seed
):
    sound = Sound(music(channels, length, seed), rate)
    data = codec.encode(sound, quality=level / 32)
    header = container.read_header(data)
    assert header.settings == (level,)
    assert (header.geometry.samples, header.geometry.sample_rate, header.geometry.channels) == (
        length,
        rate,
        channels,
    )
    codec.check(data)
    decoded = codec.decode(data)
    assert (decoded.samples.shape, decoded.rate, decoded.damage) == ((channels, length), rate, ())
    assert decoded.samples.dtype == np.float32
    coded = math.ceil(length * resampling_ratio(rate, RATE))
    shape = (2 * STRIDE, -(-coded // STRIDE))
    groups = -(-channels // 2)
    assert codec.latents(data).shape == (shape if groups == 1 else (groups, *shape))


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8])
def test_the_sound_comes_back(codec, short_segments, channels):
    samples = music(channels, 3001)
    decoded = codec.decode(codec.encode(samples, quality=6)).samples
    assert decibels(decoded - samples) < -60
    for one, other in zip(decoded, samples, strict=True):
        assert decibels(one - other) < -55


@pytest.mark.parametrize("rate", [8000, 12000, 24000, 44100, 48000, 15999])
def test_it_comes_back_from_another_rate(codec, short_segments, rate):
    # Below what either rate can hold, the ends included.
    time = np.arange(5000) / rate
    samples = 0.5 * np.sin(2 * np.pi * np.array([[300.0], [1700.0]]) * time + 1).astype(np.float32)
    decoded = codec.decode(codec.encode(Sound(samples, rate), quality=6))
    error = decoded.samples - samples
    assert decibels(error[:, 500:-500]) < -60 and decibels(error) < -45


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros((2, 1500)),
        np.full((2, 1500), 0.7),
        np.sign(np.sin(np.arange(3000).reshape(2, 1500) / 7)),
        np.full((1, 1), -1.0),
        np.random.default_rng(0).uniform(-1, 1, (2, 777)),
    ],
    ids=["silence", "constant", "full-scale square", "one sample", "noise"],
)
def test_extremes(codec, short_segments, samples):
    samples = samples.astype(np.float32)
    decoded = codec.decode(codec.encode(samples, quality=6)).samples
    assert np.abs(decoded - samples).max() < 0.02 and np.abs(decoded).max() <= 1


def test_only_what_was_beyond_full_scale_may_be(codec, short_segments):
    samples = np.sign(np.sin(np.arange(4000) / 9)).astype(np.float32)[None]
    data = codec.encode(samples, quality=1)
    assert np.abs(codec.decode(data).samples).max() == 1
    loud = samples.copy()
    loud[:, 2000:2050] *= 1.8
    decoded = codec.decode(codec.encode(loud, quality=4)).samples[0]
    # Positions 2000 to 2049 lie in the segments that begin at 1776 and at 2032.
    assert np.abs(decoded[2000:2050]).min() > 1.5
    assert max(np.abs(decoded[:1776]).max(), np.abs(decoded[2288:]).max()) <= 1


def test_a_codec_for_sensors_takes_any_rate_as_it_is():
    sensors = made(3, None)
    samples = music(3, 1000)
    data = sensors.encode(samples, quality=6, rate=50)
    decoded = sensors.decode(data)
    assert decoded.rate == 50 and decibels(decoded.samples - samples) < -60
    assert sensors.latents(data).shape == (48, 63)
    with pytest.raises(UsageError, match="give the samples' rate"):
        sensors.encode(samples)


def test_ratios_are_of_small_integers():
    assert resampling_ratio(48000, 44100) == Fraction(147, 160)
    assert resampling_ratio(44101, 44100) == 1 == resampling_ratio(7, None)
    assert resampling_ratio(8000, 44100) == Fraction(441, 80)
    for rate in (1, 3, 100, 7999, 12345, 96001, 10**6, 10**12):
        ratio = resampling_ratio(rate, 44100)
        assert Fraction(1, 16) <= ratio <= 16 and max(ratio.numerator, ratio.denominator) <= 1024
        if 3000 < rate < 700_000:
            assert abs(ratio * rate / 44100 - 1) < 0.01


# ------------------------------------------------------------------------------------------------- incremental


@slow
@given(
    length=st.integers(1, 3000),
    channels=st.integers(1, 3),
    rate=st.sampled_from([RATE, 8000, 44100]),
    sizes=st.lists(st.integers(0, 900), max_size=12),
    byte_sizes=st.lists(st.integers(1, 2000), max_size=12),
)
def test_pushing_in_pieces_gives_what_the_whole_gives(
    codec, short_segments, length, channels, rate, sizes, byte_sizes
):
    sound = Sound(music(channels, length), rate)
    data = codec.encode(sound, quality=3)
    parts = encoded(codec.encoder(rate, channels, quality=3), pieces(sound.samples, sizes))
    assert b"".join(parts) == data
    decoder = codec.decoder()
    cuts = np.cumsum([0, *byte_sizes])
    blocks = [decoder.push(data[a:b]) for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True)]
    blocks.append(decoder.finish())
    assert (decoder.rate, decoder.channels) == (rate, channels)
    streamed = np.concatenate([block for block in blocks if block.size], axis=1)
    assert np.array_equal(streamed, codec.decode(data).samples)
    assert np.array_equal(np.concatenate(list(codec.decode_blocks(data)), axis=1), streamed)


@pytest.mark.parametrize("rate", [RATE, 8000, 44100, 48000])
@pytest.mark.parametrize("segment", [64, 1024])
def test_latency_is_what_it_is_said_to_be(codec, rate, segment):
    samples = music(2, 12_000)
    encoder, decoder = codec.encoder(rate, 2, segment=segment), codec.decoder()
    out, held, waiting = 0, 0, 0
    for start in range(0, samples.shape[1], 50):
        out += decoder.push(encoder.push(samples[:, start : start + 50])).shape[1]
        coded = encoder.segments * segment - codec.edge
        bytes_out = min(math.floor(coded / resampling_ratio(rate, RATE)), start + 50)
        held = max(held, start + 50 - max(bytes_out, 0))
        waiting = max(waiting, bytes_out - out)
    assert held <= encoder.latency + 50 and waiting <= decoder.latency
    # And no more than that: the statement is of use.
    assert held > 0.6 * encoder.latency
    assert out >= samples.shape[1] - encoder.latency - decoder.latency - 50
    assert out + decoder.push(encoder.finish()).shape[1] + decoder.finish().shape[1] == samples.shape[1]


def test_short_segments_are_for_those_who_cannot_wait(codec):
    assert codec.encoder(RATE, 2, segment=64).latency < 100 < codec.encoder(RATE, 2).latency
    assert codec.encoder(RATE, 2, segment=65).segment == 128
    for segment in (0, -5, audio_codec.MAX_SEGMENT + 1):
        with pytest.raises(UsageError, match="choose 1 to"):
            codec.encoder(RATE, 2, segment=segment)


def test_what_an_encoder_refuses(codec):
    encoder = codec.encoder(RATE, 2)
    for samples in (np.zeros((2, 5)), np.zeros(5, np.float32), np.zeros((1, 5), np.float32)):
        with pytest.raises(UsageError, match="give float32"):
            encoder.push(samples)
    for value in (math.nan, math.inf):
        with pytest.raises(MediaError, match="not numbers"):
            encoder.push(np.array([[0, value], [0, 0]], np.float32))
        with pytest.raises(MediaError, match="not numbers"):
            codec.encode(np.full((1, 10), value, np.float32))
    with pytest.raises(MediaError, match="no samples"):
        encoder.finish()
    for rate, channels in ((0, 2), (8000.5, 2), (8000, 0), (8000, 33)):
        with pytest.raises(UsageError):
            codec.encoder(rate, channels)
    with pytest.raises(UsageError, match="choose 1 to 6"):
        codec.encoder(RATE, 2, quality=7)


def test_a_decoder_notices_what_is_missing(codec, short_segments):
    data = codec.encode(music(), quality=3)
    decoder = codec.decoder()
    assert decoder.push(data[:10]).shape == (0, 0) and decoder.rate == 0
    decoder.push(data[10:-20])
    with pytest.raises(BitstreamError, match="end of the file"):
        decoder.finish()
    with pytest.raises(BitstreamError):
        codec.decoder().finish()
    for broken in (
        forged(data, lambda chunks: chunks[:-1]),
        forged(data, lambda chunks: [*chunks, chunks[-1]]),
        forged(data, lambda chunks: [chunks[-1], *chunks]),
        forged(data, geometry=AudioGeometry(2000, RATE, 2)),
    ):
        decoder = codec.decoder()
        with pytest.raises(BitstreamError):
            raise_streamed(decoder, broken)


def raise_streamed(decoder: audio_codec.AudioDecoder, data: bytes) -> None:
    decoder.push(data)
    decoder.finish()


# ------------------------------------------------------------------------------------------------- its segments


def test_segments_fit_together_as_if_there_were_none(codec):
    samples = music(2, 5000)
    files = [
        b"".join(encoded(codec.encoder(RATE, 2, quality=6, segment=size), iter([samples])))
        for size in (64, 256, audio_codec.SEGMENT)
    ]
    whole = codec.decode(files[-1]).samples
    assert container.read_header(files[0]).chunk_count() == 79
    for data in files[:-1]:
        # Float rounding may move a latent across the border of two integers.
        assert decibels(codec.decode(data).samples - whole) < -90
        assert float((codec.latents(data) - codec.latents(files[-1])).abs().mean()) < 1e-4


@pytest.mark.parametrize("damage", ["checksum", "symbols", "first", "last"])
def test_a_damaged_segment_costs_that_segment_alone(codec, short_segments, damage):
    data = codec.encode(music(), quality=3)
    content = container.read(data)
    total = len(content.chunks)
    index = {"first": 0, "last": total - 1}.get(damage, 5)
    if damage == "symbols":
        broken = forged(data, lambda chunks: [c[:-4] if i == 5 else c for i, c in enumerate(chunks)])
    else:
        place = content.offsets[index] + 3
        broken = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
    for action in (codec.decode, codec.check, codec.latents):
        with pytest.raises(BitstreamError) as caught:
            action(broken)
        assert (caught.value.chunk, caught.value.offset) == (index, content.offsets[index])
    whole, rest = codec.decode(data).samples, codec.decode(broken, partial=True)
    assert [fault.chunk for fault in rest.damage] == [index] and rest.samples.shape == whole.shape
    start, stop = (max(i * SHORT - codec.edge, 0) for i in (index, index + 1))
    assert not rest.samples[:, start:stop].any()
    near = slice(max(start - codec.transform.context, 0), stop + codec.transform.context)
    same = np.abs(whole - rest.samples).max(0) < 1e-6
    same[near] = True
    assert same.all()


def test_a_file_that_was_cut_off_gives_what_it_has(codec, short_segments):
    samples = music(2, 4000)
    data = codec.encode(samples, quality=5)
    offsets = container.read(data).offsets
    whole = codec.decode(data).samples
    for cut in (offsets[3] + 2, offsets[9] + 50, len(data) - 1):
        with pytest.raises(BitstreamError):
            codec.decode(data[:cut])
        rest = codec.decode(data[:cut], partial=True)
        intact = sum(cut >= offset for offset in offsets[1:]) if cut < offsets[-1] else len(offsets)
        assert len(rest.damage) == 1
        if intact == len(offsets):
            assert 0 <= rest.length - 4000 < STRIDE
        else:
            assert rest.length == intact * SHORT - codec.edge
        keep = min(rest.length - codec.transform.context, 4000)
        assert np.abs(rest.samples[:, :keep] - whole[:, :keep]).max() < 1e-6
    with pytest.raises(BitstreamError, match="no part of the sound"):
        codec.decode(data[: offsets[0] + 5], partial=True)


@slow
@given(st.data())
def test_forged_chunks_end_in_an_error_or_a_sound(codec, short_segments, data):
    file = codec.encode(music(3, 700), quality=3)

    def change(chunks: list[bytes]) -> list[bytes]:
        index = data.draw(st.integers(0, len(chunks) - 1))
        chunk = bytearray(chunks[index])
        for _ in range(data.draw(st.integers(0, 3))):
            chunk[data.draw(st.integers(0, min(len(chunk) - 1, 12)))] = data.draw(st.integers(0, 255))
        chunks[index] = bytes(chunk[: data.draw(st.integers(0, len(chunk)))])
        return chunks

    broken = forged(file, change)
    for partial in (False, True):
        try:
            decoded = codec.decode(broken, partial=partial)
            assert decoded.samples.shape == (3, 700) and np.isfinite(decoded.samples).all()
        except BitstreamError as error:
            # A chunk that no segment fits in is no damage that a reader could leave out, but a forged length.
            assert error.chunk is not None and (not partial or "cannot hold a segment" in str(error))


# ----------------------------------------------------------------------------------------------------- the file


def test_the_estimate_is_what_the_file_weighs(codec, short_segments):
    for samples, quality in ((music(2, 9000), 2.5), (music(3, 5000), 5)):
        data = codec.encode(samples, quality=quality)
        payload = sum(map(len, container.read(data).chunks))
        estimate = codec.estimate(samples, quality) / 8
        segments = container.read_header(data).chunk_count()
        assert abs(payload - estimate) <= 0.01 * estimate + 12 * segments
        assert len(data) - payload <= 44 + 10 * segments


def test_latents_are_what_the_encoder_meant(codec, short_segments):
    samples = music(2, 3000)
    level = 133
    levels = torch.tensor([level])
    with torch.inference_mode():
        promised = codec.bottleneck(codec.analyse(samples, level), levels).y_hat[0, :, 0]
    latents = codec.latents(codec.encode(samples, quality=level / 32))
    assert latents.dtype == torch.float32 and torch.equal(latents, promised)


def test_every_kind_of_source_gives_the_same_file(codec, short_segments, tmp_path):
    sound = Sound((np.rint(music(2, 1000) * 2**15) / 2**15).astype(np.float32), RATE)
    sound.save(tmp_path / "same.wav")
    stream = io.BytesIO((tmp_path / "same.wav").read_bytes())
    with SoundReader(tmp_path / "same.wav") as reader, open(tmp_path / "same.wav", "rb") as opened:
        sources = [
            sound, sound.samples, sound.samples.astype(np.float64), torch.from_numpy(sound.samples),
            tmp_path / "same.wav", str(tmp_path / "same.wav"), stream, opened, reader, reader,
        ]  # fmt: skip
        assert len({codec.encode(source, quality=3) for source in sources}) == 1
    assert codec.encode(sound.samples[0], quality=3) == codec.encode(sound.samples[:1], quality=3)
    with pytest.raises(UsageError, match="is no sound"):
        codec.encode(np.zeros((2, 100), np.int16))
    with pytest.raises(UsageError, match="is no sound"):
        codec.encode(7)
    with pytest.raises(MediaError, match="does not exist"):
        codec.encode(tmp_path / "none.wav")
    with pytest.raises(MediaError, match="no samples"):
        codec.encode(Sound(np.zeros((1, 0), np.float32), RATE))


def test_kbps_is_the_best_quality_that_fits(codec, short_segments, tmp_path):
    sound = Sound(music(2, 4000), RATE)
    sound.save(tmp_path / "a.wav", subtype="FLOAT")

    def kbps(data: bytes) -> float:
        return 8 * len(data) * RATE / 4000 / 1000

    low, high = (kbps(codec.encode(sound, quality=quality)) for quality in (1, 6))
    wanted = (low + high) / 2
    data = codec.encode(tmp_path / "a.wav", kbps=wanted)
    (level,) = container.read_header(data).settings
    assert 32 <= level < 192 and kbps(data) <= wanted < kbps(codec.encode(sound, quality=(level + 1) / 32))
    with pytest.raises(CompandError, match=r"cannot be reached.*allow more"):
        codec.encode(sound, kbps=low / 2)


def test_psnr_is_the_smallest_quality_that_reaches_it(codec, short_segments, tmp_path):
    sound = Sound(music(2, 4000), 48000)
    sound.save(tmp_path / "a.wav", subtype="FLOAT")
    low, high = (
        -decibels(codec.decode(codec.encode(sound, quality=q)).samples - sound.samples) for q in (1, 6)
    )
    wanted = (low + high) / 2
    data = codec.encode(tmp_path / "a.wav", psnr=wanted)
    (level,) = container.read_header(data).settings
    below = codec.encode(sound, quality=(level - 1) / 32)
    assert -decibels(codec.decode(data).samples - sound.samples) >= wanted
    assert -decibels(codec.decode(below).samples - sound.samples) < wanted
    with pytest.raises(CompandError, match=r"cannot be reached.*ask for less"):
        codec.encode(sound, psnr=200)


def test_targets_that_make_no_sense(codec):
    for options, fact in (
        ({"quality": 2, "kbps": 3}, "exclude"),
        ({"kbps": math.nan}, "not a number"),
        ({"bpp": 1}, "give kbps"),
        ({"quality": 0}, "choose 1 to 6"),
    ):
        with pytest.raises(UsageError, match=fact):
            codec.encode(music(), **options)


def test_progress_counts_segments(codec, short_segments, monkeypatch):
    monkeypatch.setattr(audio_codec, "BLOCK", 200)
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    data = codec.encode(music(2, 1500), progress=note)
    assert seen[-1] == (6, 6) and all(total == 6 for _, total in seen) and seen == sorted(seen)
    for action in (codec.decode, codec.check):
        seen.clear()
        action(data, progress=note)
        assert seen == [(i, 6) for i in range(1, 7)]


def test_another_checkpoint_is_refused_by_name(codec, short_segments):
    data = codec.encode(music())
    for change in ({"symbols": b"\1\2\3\4"}, {"codec_name": "other"}):
        other = forged(data, **change)
        for action in (codec.decode, codec.check, codec.latents, lambda file: codec.decoder().push(file)):
            with pytest.raises(CheckpointError, match=r"lapped-v1 has 6c617070.*\(compand info\)"):
                action(other)
    assert np.array_equal(codec.decode(forged(data, synthesis=b"news")).samples, codec.decode(data).samples)
    fresh = LappedCodec(trainable=False)
    with pytest.raises(CheckpointError, match="export it"):
        fresh.encode(music())


@pytest.mark.parametrize(
    "change",
    [
        {"settings": (31,)},
        {"settings": (193,)},
        {"settings": (128, 128)},
        {"settings": ()},
        {"chunk_size": 0},
        {"chunk_size": 2 * audio_codec.MAX_SEGMENT},
        {"chunk_size": 512},
        {"geometry": AudioGeometry(1500, RATE, 33, 6)},
        {"geometry": AudioGeometry(15000, RATE, 2, 6)},
        {"geometry": AudioGeometry(1500, 2 * RATE, 2, 6)},
        {"geometry": AudioGeometry(1200, RATE, 2, 6)},
    ],
    ids=str,
)
def test_headers_that_no_encoder_writes(codec, short_segments, change):
    broken = forged(codec.encode(music(2, 1500)), **change)
    for action in (codec.decode, codec.check, codec.latents):
        with pytest.raises(BitstreamError, match="damaged"):
            action(broken)
    picture = container.Header(0, "lapped", b"lapp", b"synt", (64,), container.ImageGeometry(8, 8, 3), 0)
    with pytest.raises(BitstreamError, match="does not describe a sound"):
        codec.decode(container.write(picture, [b"x"]))


def test_a_codec_of_one_channel_codes_each_on_its_own(short_segments):
    mono = made(1)
    samples = music(3, 900)
    data = mono.encode(samples, quality=6)
    assert mono.latents(data).shape == (3, 16, 57)
    assert decibels(mono.decode(data).samples - samples) < -60
    # The peak of all channels decides how loud they are coded.
    shift = sum(container.read_header(data).settings[1:])
    encoder = mono.encoder(RATE, 1, quality=6, shift=shift)
    single = mono.latents(encoder.push(samples[1:2]) + encoder.finish())
    assert torch.equal(mono.latents(data)[1], single)


def test_layout_of_the_latents(codec):
    layout = {"channels": 32, "stride": 16, "axes": 1, "group": 2, "rate": RATE, "edge": codec.edge}
    assert codec.latent_layout() == layout


# ------------------------------------------------------------------------------------------------------- memory


def peak(action: Callable[[], object]) -> int:
    """Most bytes held at a time."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_sound(codec, monkeypatch, tmp_path):
    monkeypatch.setattr(audio_codec, "SEGMENT", 4096)
    monkeypatch.setattr(audio_codec, "BLOCK", 4096)
    peaks: dict[str, list[int]] = {"encode": [], "decode": []}
    for length in (2**17, 2**20):
        path = tmp_path / f"{length}.wav"
        time = np.arange(length)
        Sound(np.stack([0.3 * np.sin(time / 9), 0.2 * np.sin(time / 20)]).astype(np.float32), 24000).save(
            path
        )
        files: list[bytes] = []
        peaks["encode"].append(peak(lambda: files.append(codec.encode(path, quality=1))))  # noqa: B023
        (data,) = files
        blocks = [0]

        def drain() -> None:
            for block in codec.decode_blocks(data):  # noqa: B023
                blocks.append(block.shape[1])  # noqa: B023

        peaks["decode"].append(peak(drain))
        assert sum(blocks) == length and max(blocks) < 3 * 4096
        peaks["encode"][-1] -= 2 * len(data)
        peaks["decode"][-1] -= 2 * len(data)
    for small, large in peaks.values():
        assert large < 1.5 * small + 2**20 and large < 8 * 2**20


def test_registered_codecs_of_sounds_are_of_this_kind():
    audio = [entry.load_class() for entry in registry.entries() if entry.medium == "audio"]
    assert audio and all(issubclass(kind, AudioCodec) for kind in audio)


# --------------------------------------------------------------------------------------------------- resampling


@slow
@given(
    length=st.integers(1, 3000),
    up=st.integers(1, 12),
    down=st.integers(1, 12),
    block=st.integers(1, 500),
    sizes=st.lists(st.integers(0, 700), max_size=8),
)
def test_resampling_a_stream_does_not_depend_on_the_pieces(length, up, down, block, sizes):
    samples = music(2, length)
    ratio = Fraction(up, down)
    whole = Resampler(2, ratio, block)
    expected = np.concatenate((whole.push(samples), whole.finish()), axis=1)
    stream = Resampler(2, ratio, block)
    parts, taken, given = [], 0, 0
    for piece in pieces(samples, sizes):
        parts.append(stream.push(piece))
        taken += piece.shape[1]
        given += parts[-1].shape[1]
        assert given >= (taken - stream.latency) * ratio
    parts.append(stream.finish())
    assert np.array_equal(np.concatenate(parts, axis=1), expected)
    assert expected.shape == (2, math.ceil(length * ratio))


@pytest.mark.parametrize(("old", "new"), [(48000, 44100), (8000, 44100), (44100, 22050), (44100, 48000)])
def test_resampling_a_stream_is_resampling(old, new):
    sound = Sound(music(2, old // 4), old)
    stream = Resampler(2, Fraction(new, old))
    samples = np.concatenate((stream.push(sound.samples), stream.finish()), axis=1)
    middle = slice(new // 50, -new // 50)
    np.testing.assert_allclose(samples[:, middle], resample(sound, new).samples[:, middle], atol=1e-4)
    flat = Resampler(1, Fraction(new, old))
    level = np.concatenate((flat.push(np.full((1, 999), 0.5, np.float32)), flat.finish()), axis=1)
    np.testing.assert_allclose(level, 0.5, atol=1e-4)
