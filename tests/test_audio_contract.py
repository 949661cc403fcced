"""What every audio codec promises, checked on each one that is registered."""

from __future__ import annotations

import copy
import functools
import math
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compand
from compand import audio_codec, registry
from compand.bottlenecks.codebook import CodebookBottleneck
from compand.checkpoint import read_info
from compand.coding import container
from compand.errors import BitstreamError, CheckpointError, MediaError, UsageError
from compand.sounds import Sound, read_sound, resampling_ratio
from compand.train.instruments import drum, note
from compand.weights import build

AUDIO_CODECS = [entry.name for entry in registry.entries() if entry.medium == "audio"]
SHARED_MUSIC = Path(__file__).parents[1].parent / "shared" / "data" / "audio" / "music"
LEVELS = (32, 77, 133, 256)
"""Qualities in 1/32 level: both ends, and some in between."""

SHORT = 4096
"""Samples of a segment where sounds are to have many."""

slow = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def shift_of(data: bytes) -> int:
    """By how many bits a file's sound was made louder."""
    return sum(container.read_header(data).settings[1:])


@pytest.fixture(scope="module", params=AUDIO_CODECS)
def codec(request, checkpoint_of):
    return compand.load(checkpoint_of(request.param), device="cpu")


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(audio_codec, "SEGMENT", SHORT)


@functools.cache
def played(seed: int) -> tuple[np.ndarray, np.random.Generator]:
    """Eight seconds of notes and of drums, float32 [2, N], and the generator that they came from."""
    generator = np.random.default_rng(seed)
    sources = np.concatenate([np.stack([note(generator), drum(generator)]) for _ in range(4)], axis=1)
    return sources, generator


def music(channels: int = 2, length: int = 20_000, seed: int = 0) -> np.ndarray:
    """Notes and drums at different strengths in every channel, float32 [channels, length]."""
    sources, generator = played(seed)
    sources = np.tile(sources, (1, -(-length // sources.shape[1])))[:, :length]
    balance = copy.deepcopy(generator).uniform(0.2, 0.8, (channels, 2))
    return (0.4 * balance @ sources).astype(np.float32)


def sweep(rate: int, length: int) -> np.ndarray:
    """Two sines that rise through all frequencies, one of them an octave lower, float32 [2, length]."""
    time = np.arange(length) / rate
    top = 0.45 * rate
    phase = 2 * np.pi * (20 * time + (top - 20) * time**2 / (2 * time[-1]))
    return (0.5 * np.sin(np.stack([phase, phase / 2]))).astype(np.float32)


def decibels(error: np.ndarray) -> float:
    return 10 * math.log10(max(float(np.square(error.astype(np.float64)).mean()), 1e-30))


def rate_of(codec) -> int:
    return codec.rate or 8000


def sound_of(codec, *arguments) -> Sound:
    return Sound(music(*arguments), rate_of(codec))


# ---------------------------------------------------------------------------------------------------- any sound


@slow
@given(
    length=st.one_of(st.integers(1, 300), st.integers(1, 12_000)),
    channels=st.integers(1, 8),
    rate=st.sampled_from([8000, 11025, 16000, 22050, 44100, 44101, 48000, 96000, 192000]),
    level=st.integers(32, 256),
)
def test_sounds_of_any_length_rate_and_number_of_channels(
    codec, short_segments, length, channels, rate, level
):
    sound = Sound(music(channels, length), rate)
    data = codec.encode(sound, quality=level / 32)
    geometry = container.read_header(data).geometry
    assert (geometry.samples, geometry.sample_rate, geometry.channels) == (length, rate, channels)
    codec.check(data)
    decoded = codec.decode(data)
    assert (decoded.samples.shape, decoded.rate) == ((channels, length), rate)
    assert np.isfinite(decoded.samples).all() and np.abs(decoded.samples).max() <= 1
    stride, groups = codec.transform.stride, -(-channels // codec.channels)
    shape = (
        codec.transform.latent_channels,
        -(-math.ceil(length * resampling_ratio(rate, codec.rate)) // stride),
    )
    assert codec.latents(data).shape == (shape if groups == 1 else (groups, *shape))


@pytest.mark.parametrize("channels", range(1, 9))
def test_every_channel_comes_back_as_itself(codec, short_segments, channels):
    sound = sound_of(codec, channels)
    decoded = codec.decode(codec.encode(sound, quality=codec.levels)).samples
    for one, own in zip(decoded, sound.samples, strict=True):
        assert decibels(one - own) < decibels(own) - 3


def test_quality_buys_bytes_and_fidelity(codec, short_segments):
    sound = sound_of(codec)
    files = [codec.encode(sound, quality=quality) for quality in (1, 2.5, 4, 6, codec.levels)]
    errors = [decibels(codec.decode(data).samples - sound.samples) for data in files]
    assert [len(data) for data in files] == sorted(len(data) for data in files)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("kind", ["silence", "constant", "square", "sample", "shorter than a position"])
def test_extremes(codec, short_segments, kind):
    samples = {
        "silence": np.zeros((2, 9000)),
        "constant": np.full((2, 9000), 0.5),
        "square": np.sign(np.sin(np.arange(18_000).reshape(2, 9000) / 40)),
        "sample": np.full((1, 1), -0.8),
        "shorter than a position": music(2, codec.transform.stride - 1),
    }[kind].astype(np.float32)
    decoded = codec.decode(codec.encode(Sound(samples, rate_of(codec)), quality=codec.levels)).samples
    assert decoded.shape == samples.shape and np.abs(decoded).max() <= 1
    # Of codebooks a code of small vectors stands for silence, none need be zero, and none stand for a constant, which
    # cannot be heard: it is only to be nearer than nothing is.
    codes = isinstance(codec.bottleneck, CodebookBottleneck)
    if kind == "silence":
        assert decibels(decoded) < (-40 if codes else -60)
    elif kind == "constant":
        assert decibels(decoded - samples) < (decibels(samples) - 1 if codes else -30)


@pytest.mark.parametrize("quality", [1, 12])
def test_silence_of_the_shipped_codebooks_cannot_be_heard(quality):
    released = compand.load("speech-rvq-v1", device="cpu")
    silence = Sound(np.zeros((1, 16_000), np.float32), 16_000)
    samples = released.decode(released.encode(silence, quality=quality)).samples
    assert decibels(samples) < -80
    assert np.abs(samples).max() < 3e-4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_no_numbers_are_refused(codec, value):
    samples = music(2, 3000)
    samples[1, 1234] = value
    with pytest.raises(MediaError, match="not numbers"):
        codec.encode(Sound(samples, rate_of(codec)))
    with pytest.raises(MediaError, match="no samples"):
        codec.encode(Sound(samples[:, :0], rate_of(codec)))


def test_silence_costs_next_to_nothing(codec):
    rate = rate_of(codec)
    silence = codec.encode(Sound(np.zeros((2, 10 * rate), np.float32), rate), quality=1)
    sound = codec.encode(Sound(music(2, 10 * rate), rate), quality=4)
    assert len(silence) < 0.2 * len(sound)


# ----------------------------------------------------------------------------------------------------- segments


@pytest.mark.parametrize("level", LEVELS)
def test_no_click_at_the_borders_of_segments(codec, level):
    """Seams of synthesis and of analysis, each against what one transform of the whole sound gives."""
    rate = rate_of(codec)
    samples = sweep(rate, 60_000)
    unit = math.lcm(codec.transform.stride, audio_codec.UNIT)
    size = -(-SHORT // unit) * unit
    encoder = codec.encoder(rate, 2, quality=level / 32, segment=size)
    data = encoder.push(samples) + encoder.finish()
    decoded = codec.decode(data).samples
    content = container.read(data)
    with torch.inference_mode():
        grid = torch.cat([codec._segment(content, i).latents for i in range(len(content.chunks))], dim=3)
        whole = codec._synthesise(grid, level, 2)[:, codec.edge : codec.edge + samples.shape[1]].clip(-1, 1)
    assert len(content.chunks) > 10 and np.abs(decoded - whole).max() < 1e-3
    # Where segments meet, the error has no peak that stands out from its surroundings by more than -60 dB.
    error = np.abs(decoded - samples).max(0)
    for place in range(size - codec.edge, samples.shape[1] - size // 2, size):
        around = error[place - size // 2 : place + size // 2].copy()
        near = around[size // 2 - 16 : size // 2 + 16].copy()
        around[size // 2 - 16 : size // 2 + 16] = 0
        assert near.max() < around.max() + 1e-3
    cutter = audio_codec._Cutter(codec, rate, 2, size)
    windows = [*cutter.push(samples), *cutter.finish()]
    y = torch.cat([codec._window_latents(window, level) for window in windows], dim=3)
    begin = codec.edge // codec.transform.stride
    expected = codec.analyse(samples, level)
    difference = y[..., begin : begin + expected.shape[3]] - expected
    assert float(difference.abs().max()) < 1e-3 * float(expected.abs().max())


@slow
@given(
    length=st.integers(1, 15_000),
    rate=st.sampled_from([None, 48000, 16000]),
    sizes=st.lists(st.integers(0, 5000), max_size=6),
    byte_sizes=st.lists(st.integers(1, 3000), max_size=6),
)
def test_streaming_gives_what_the_whole_gives(codec, short_segments, length, rate, sizes, byte_sizes):
    rate = rate or rate_of(codec)
    samples = music(2, length)
    data = codec.encode(Sound(samples, rate), quality=3)
    shift = shift_of(data)
    encoder, decoder = codec.encoder(rate, 2, quality=3, shift=shift), codec.decoder()
    cuts = np.cumsum([0, *sizes])
    parts = [encoder.push(samples[:, a:b]) for a, b in zip(cuts, [*cuts[1:], length], strict=True) if a <= b]
    assert b"".join(parts) + encoder.finish() == data
    cuts = np.cumsum([0, *byte_sizes])
    blocks = [decoder.push(data[a:b]) for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True)]
    blocks.append(decoder.finish())
    streamed = np.concatenate([block for block in blocks if block.size], axis=1)
    assert np.array_equal(streamed, codec.decode(data).samples)


def test_quiet_sounds_are_coded_as_well_as_loud_ones(codec):
    loud = np.float32(0.75) * music(2, 20_000) / np.abs(music(2, 20_000)).max()
    rate = rate_of(codec)
    reference = codec.encode(Sound(loud, rate), quality=4)
    assert shift_of(reference) == 0
    for bits in (1, 6, 15, 20):
        quiet = Sound(loud * np.float32(2.0**-bits), rate)
        data = codec.encode(quiet, quality=4)
        assert shift_of(data) == min(bits, 15)
        if bits <= 15:
            assert container.read(data).chunks == container.read(reference).chunks
            assert np.array_equal(codec.decode(data).samples * 2.0**bits, codec.decode(reference).samples)
    content = container.read(codec.encode(Sound(loud / 4, rate), quality=4))
    for shift in (0, 16):
        settings = (content.header.settings[0], shift)
        with pytest.raises(BitstreamError, match="shift"):
            codec.decode(container.write(replace(content.header, settings=settings), content.chunks))
    for shift in (-1, 16):
        with pytest.raises(UsageError, match="shift"):
            codec.encoder(rate, 2, shift=shift)


def test_latency_is_what_it_is_said_to_be(codec):
    rate, step = 48000, 480
    samples = music(2, 96_000)
    encoder, decoder = codec.encoder(rate, 2, segment=1024), codec.decoder()
    out, behind = 0, 0
    for start in range(0, samples.shape[1], step):
        out += decoder.push(encoder.push(samples[:, start : start + step])).shape[1]
        behind = max(behind, start + step - out)
    assert 0 < behind <= encoder.latency + decoder.latency + step
    assert out + decoder.push(encoder.finish()).shape[1] + decoder.finish().shape[1] == samples.shape[1]


def test_a_damaged_segment_costs_that_segment_alone(codec, short_segments):
    sound = sound_of(codec, 2, 60_000)
    data = codec.encode(sound, quality=5)
    content = container.read(data)
    index = 7
    place = content.offsets[index] + 5
    for broken in (
        data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :],
        data[:place] + data[place + 3 :],
        data[: content.offsets[index] - 6] + b"\xff" + data[content.offsets[index] - 5 :],
    ):
        with pytest.raises(BitstreamError) as caught:
            codec.decode(broken)
        assert caught.value.chunk == index
        whole, rest = codec.decode(data).samples, codec.decode(broken, partial=True)
        assert [fault.chunk for fault in rest.damage] == [index]
        size = container.read_header(data).chunk_size
        start, stop = index * size - codec.edge, (index + 1) * size - codec.edge
        assert not rest.samples[:, start:stop].any()
        same = np.abs(whole - rest.samples).max(0) < 1e-5
        same[max(start - codec.transform.context, 0) : stop + codec.transform.context] = True
        assert same.all() and np.abs(rest.samples).max() <= 1


def test_a_file_that_was_cut_off_gives_what_it_has(codec, short_segments):
    data = codec.encode(sound_of(codec, 2, 60_000), quality=4)
    whole = codec.decode(data).samples
    rest = codec.decode(data[: len(data) // 2], partial=True)
    size = container.read_header(data).chunk_size
    assert rest.damage and rest.length > 0 and (rest.length + codec.edge) % size == 0
    keep = rest.length - codec.transform.context
    assert keep > 0 and np.abs(rest.samples[:, :keep] - whole[:, :keep]).max() < 1e-5


def test_a_stream_gives_all_that_precedes_the_damage(codec, short_segments):
    data = codec.encode(sound_of(codec, 2, 60_000), quality=5)
    broken = bytearray(data)
    broken[container.read(data).offsets[9] + 3] ^= 1
    given = []
    for step in (len(data), 5000, 50):
        decoder, blocks = codec.decoder(), []

        def push_all(decoder, blocks, step):
            for start in range(0, len(broken), step):
                blocks.append(decoder.push(bytes(broken[start : start + step])))
            decoder.finish()

        with pytest.raises(BitstreamError) as caught:
            push_all(decoder, blocks, step)
        assert caught.value.chunk == 9
        for action in (decoder.finish, lambda decoder=decoder: decoder.push(b"")):
            with pytest.raises(BitstreamError, match="damaged"):
                action()
        given.append(np.concatenate([block for block in blocks if block.size], axis=1))
    assert all(np.array_equal(samples, given[0]) for samples in given)
    assert given[0].shape[1] > 7 * SHORT


def test_a_stream_gives_what_precedes_a_chunk_that_does_not_decode(codec, short_segments):
    data = codec.encode(sound_of(codec, 2, 60_000), quality=5)
    content = container.read(data)
    broken = container.write(content.header, [*content.chunks[:9], b"\xff" * 50, *content.chunks[10:]])
    decoder = codec.decoder()
    assert decoder.push(broken).shape[1] > 7 * SHORT
    for action in (decoder.finish, lambda: decoder.push(b"")):
        with pytest.raises(BitstreamError, match="does not decode") as caught:
            action()
        assert caught.value.chunk == 9


def test_what_is_finished_takes_no_more(codec):
    encoder, decoder = codec.encoder(rate_of(codec), 2), codec.decoder()
    data = encoder.push(music(2, 3000)) + encoder.finish()
    decoder.push(data)
    decoder.finish()
    for action in (
        encoder.finish,
        lambda: encoder.push(music(2, 3000)),
        decoder.finish,
        lambda: decoder.push(data),
    ):
        with pytest.raises(UsageError, match="is finished"):
            action()


def test_lost_segments_are_silence_that_costs_no_synthesis(codec, short_segments, monkeypatch):
    data = codec.encode(sound_of(codec, 2, 60 * SHORT), quality=4)
    whole, content = codec.decode(data).samples, container.read(data)
    broken = bytearray(data)
    first, last = 10, 50
    for place in content.offsets[first:last]:
        broken[place] ^= 8
    stretches, synthesise = [], codec._synthesise

    def counted(latents, *arguments):
        stretches.append(latents.shape[3] * codec.transform.stride)
        return synthesise(latents, *arguments)

    monkeypatch.setattr(codec, "_synthesise", counted)
    rest = codec.decode(bytes(broken), partial=True)
    assert [fault.chunk for fault in rest.damage] == list(range(first, last))
    windows = len(content.chunks) - (last - first) + 2 * codec.transform.context // SHORT + 4
    assert sum(stretches) <= windows * (SHORT + 2 * codec.transform.context)
    size, context = content.header.chunk_size, codec.transform.context
    start, stop = first * size - codec.edge, last * size - codec.edge
    assert rest.samples.shape == whole.shape and not rest.samples[:, start:stop].any()
    for part in (np.s_[:, : start - context], np.s_[:, stop + context :]):
        assert rest.samples[part].size and np.abs(whole[part] - rest.samples[part]).max() < 1e-5


def test_chunks_that_cannot_hold_a_segment_announce_no_silence(codec):
    """Half a kilobyte with one intact chunk, whose end announces minutes of lost ones, a byte each."""
    rate = rate_of(codec)
    encoder = codec.encoder(rate, 2, segment=audio_codec.MAX_SEGMENT)
    content = container.read(encoder.push(music(2, 1000)) + encoder.finish())
    size = content.header.chunk_size
    assert (
        codec._shortest_chunk(
            replace(content.header, geometry=container.AudioGeometry(9 * size, rate, 2, 9)), 0
        )
        > 1
    )
    for length in (0, 1):
        writer = container.AudioFrameWriter(content.header)
        file = (
            writer.head
            + writer.frame(content.chunks[0])
            + b"".join(writer.frame(b"0" * length) for _ in range(599))
        )
        file = bytearray(file + writer.end(600 * size - codec.edge * 2))
        for partial in (True, False):
            with pytest.raises(BitstreamError, match="cannot hold a segment"):
                codec.decode_blocks(bytes(file), partial=partial)
        file[len(writer.head) + 2 + len(content.chunks[0]) + 8] ^= 1
        with pytest.raises(BitstreamError, match="cannot hold a segment"):
            codec.decode_blocks(bytes(file), partial=True)


def test_a_file_without_an_intact_chunk_gives_no_silence(codec, short_segments):
    data = codec.encode(sound_of(codec, 2, 20_000))
    broken = bytearray(data)
    for place in container.read(data).offsets:
        broken[place] ^= 8
    with pytest.raises(BitstreamError, match="no part of the sound"):
        next(codec.decode_blocks(bytes(broken), partial=True))


def test_a_decoder_holds_a_chunk_at_most(codec):
    encoder = codec.encoder(rate_of(codec), 2)
    head = encoder.push(np.zeros((2, 0), np.float32))
    for opening in (b"\0", container.FRAME.pack(container.FRAME.limit - 1)):
        decoder = codec.decoder()
        with pytest.raises(BitstreamError):
            decoder.push(head + opening + b"\1" * 100)
        assert len(decoder._reader._rest) == 0


def test_the_longest_chunk_is_longer_than_any(codec):
    rate = rate_of(codec)
    noise = np.random.default_rng(0).choice(np.float32([-1e30, 1e30]), (2, 20_000))
    for samples, segment in ((noise, 64), (noise, 20_000)):
        encoder = codec.encoder(rate, 2, quality=codec.levels, segment=segment)
        content = container.read(encoder.push(samples) + encoder.finish())
        assert 2 * max(map(len, content.chunks)) < codec._longest_chunk(content.header)


def test_rates_beyond_those_of_sound_files_are_refused(codec, short_segments):
    highest = audio_codec.MAX_RATE
    samples = music(2, 3000)
    content = container.read(codec.encode(Sound(samples, highest)))
    for rate in (0, 44100.5, highest + 1, math.inf, math.nan):
        with pytest.raises(UsageError, match="sample rate is"):
            codec.encoder(rate, 2)
    forged = replace(content.header, geometry=replace(content.header.geometry, sample_rate=highest + 1))
    with pytest.raises(BitstreamError, match="samples a second"):
        codec.decode(container.write(forged, content.chunks))


@pytest.mark.parametrize("rate", [44_100, 48_000, 44_101])
def test_loud_samples_are_placed_without_a_set_of_them(codec, monkeypatch, rate):
    size, channels, length = 64 * codec.transform.stride, 1, 300_000
    start = 2**54  # where positions times the ratio exceed 64 bits
    samples = np.full((channels, length), 2, np.float32)
    cutter = audio_codec._Cutter(codec, rate, channels, size)
    cutter.taken = start
    monkeypatch.setattr(cutter, "_append", lambda samples: None)
    tracemalloc.start()
    try:
        assert not list(cutter.push(samples))
        assert tracemalloc.get_traced_memory()[1] < 12 * samples.nbytes
    finally:
        tracemalloc.stop()
    ratio = resampling_ratio(rate, codec.rate)
    assert cutter._loud == {
        (i * ratio.numerator // ratio.denominator + codec.edge) // size for i in range(start, start + length)
    }


# --------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("level", LEVELS)
def test_the_estimate_is_what_the_file_weighs(codec, level):
    sound = sound_of(codec, 2, 50_000)
    data = codec.encode(sound, quality=level / 32)
    estimate = codec.estimate(sound, level / 32) / 8
    payload = sum(map(len, container.read(data).chunks))
    assert payload - estimate <= 0.01 * estimate + 16
    # What is coded first may cost less: the coder begins at zero, where the first symbol of a table is free.
    assert estimate - payload <= 0.02 * estimate + 16
    assert len(data) - payload <= 50


def test_latents_are_what_the_encoder_meant(codec):
    samples, rate = music(2, 30_000), rate_of(codec)
    for level in LEVELS:
        cutter = audio_codec._Cutter(codec, rate, 2, audio_codec.SEGMENT)
        (window,) = [*cutter.push(samples), *cutter.finish()]
        data = codec.encode(Sound(samples, rate), quality=level / 32)
        with torch.inference_mode():
            y = codec._window_latents(window.scaled(shift_of(data)), level)
            promised = codec.bottleneck(y, torch.tensor([level])).y_hat[0, :, 0]
        latents = codec.latents(data)
        begin = codec.edge // codec.transform.stride
        assert latents.dtype == torch.float32
        assert torch.equal(latents, promised[:, begin : begin + latents.shape[1]])


def test_decompress_gives_exactly_what_forward_promised(codec):
    for level in LEVELS:
        y = torch.cat([codec.analyse(music(2, 4000, seed), level) for seed in range(3)])
        with torch.inference_mode():
            promised = codec.bottleneck(y, torch.full((3,), level)).y_hat
            payloads = codec.bottleneck.compress(y, level)
            batch = codec.bottleneck.decompress(payloads, tuple(y.shape[2:]), level)
            single = [codec.bottleneck.decompress([part], tuple(y.shape[2:]), level) for part in payloads]
        assert torch.equal(batch, promised) and torch.equal(batch, torch.cat(single))


def test_other_checkpoints_are_refused(codec, short_segments):
    data = codec.encode(sound_of(codec, 2, 5000))
    content = container.read(data)
    other = container.write(replace(content.header, symbols=b"\1\2\3\4"), content.chunks)
    for action in (codec.decode, codec.check, codec.latents, codec.decoder().push):
        with pytest.raises(CheckpointError, match="with the checkpoint that it names"):
            action(other)


def test_mutated_files_end_in_an_error_or_a_sound(codec, short_segments):
    files = [codec.encode(sound_of(codec, channels, 12_000, channels), quality=2) for channels in (1, 2, 3)]
    rng = random.Random(1)
    outcomes = {"error": 0, "part": 0}
    for _ in range(120):
        data = bytearray(rng.choice(files))
        donor = rng.choice(files)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(data))
            end = place + rng.randrange(1, 40)
            rng.choice(
                (
                    lambda: data.__setitem__(place, data[place] ^ 1 << rng.randrange(8)),  # noqa: B023
                    lambda: data.__delitem__(slice(place, end)),  # noqa: B023
                    lambda: data.__setitem__(slice(place, place), donor[place:end]),  # noqa: B023
                    lambda: data.__delitem__(slice(place, None)) if place > 50 else None,  # noqa: B023
                )
            )()
        if bytes(data) in files:
            continue
        with pytest.raises(BitstreamError):
            codec.check(bytes(data))
        try:
            decoded = codec.decode(bytes(data), partial=True)
            assert decoded.damage and decoded.samples.size < 10 * 12_000
            assert np.isfinite(decoded.samples).all()
            outcomes["part"] += 1
        except (BitstreamError, CheckpointError):
            outcomes["error"] += 1
    assert outcomes["part"] > 25


@slow
@given(data=st.data())
def test_forged_payloads_end_in_an_error_or_a_sound(codec, short_segments, data):
    content = container.read(codec.encode(sound_of(codec, 2, 9000), quality=3))
    payload = bytearray(content.chunks[1])
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    forged = [*content.chunks]
    forged[1] = bytes(payload[:cut] if data.draw(st.booleans()) else payload)
    if len(forged[1]) < codec._shortest_chunk(content.header, 1):
        with pytest.raises(BitstreamError, match="cannot hold a segment"):
            codec.decode(container.write(content.header, forged), partial=True)
        return
    decoded = codec.decode(container.write(content.header, forged), partial=True)
    assert decoded.samples.shape == (2, 9000) and np.isfinite(decoded.samples).all()
    assert all(fault.chunk == 1 and fault.offset is not None for fault in decoded.damage)


# ------------------------------------------------------------------------------------------------- portability


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_torchs_default_dtype_decides_nothing(codec, checkpoint_of, dtype):
    """Processes that serve language models often set it to half precision."""
    sound = sound_of(codec, 2, 9000)
    data = codec.encode(sound, quality=5)
    expected = codec.latents(data)
    torch.set_default_dtype(dtype)
    try:
        loaded = compand.load(checkpoint_of(codec.name), device="cpu")
        for each in (codec, loaded):
            assert torch.equal(each.latents(data), expected)
        other = loaded.encode(sound, quality=5)
        samples = loaded.decode(other).samples
    finally:
        torch.set_default_dtype(torch.float32)
    codec.check(other)
    assert samples.dtype == np.float32 and np.abs(codec.decode(other).samples - samples).max() < 0.05


def test_symbols_do_not_depend_on_threads_layout_or_library(codec):
    level = 147
    y = torch.cat([codec.analyse(music(2, 9000, seed), level) for seed in range(3)])
    shape = tuple(y.shape[2:])
    with torch.inference_mode():
        payloads = codec.bottleneck.compress(y, level)
        expected = codec.bottleneck.decompress(payloads, shape, level)
    threads = torch.get_num_threads()

    def decoded() -> torch.Tensor:
        with torch.inference_mode():
            single = torch.cat([codec.bottleneck.decompress([part], shape, level) for part in payloads])
            batch = codec.bottleneck.decompress(payloads, shape, level)
        assert torch.equal(single, batch)
        return batch

    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for layout in (torch.contiguous_format, torch.channels_last):
                codec.bottleneck.to(memory_format=layout)
                assert torch.equal(decoded(), expected)
                with torch.backends.mkldnn.flags(enabled=False):
                    assert torch.equal(decoded(), expected)
    finally:
        torch.set_num_threads(threads)
        codec.bottleneck.to(memory_format=torch.channels_last)


def test_files_of_one_precision_decode_in_another(codec, checkpoint_of):
    info = read_info(checkpoint_of(codec.name))
    plain, reduced = build(info, "cpu", reduced=False), build(info, "cpu", reduced=True)
    sound = sound_of(codec, 2, 9000)
    for writer, reader in ((plain, reduced), (reduced, plain)):
        data = writer.encode(sound, quality=6)
        assert torch.equal(writer.latents(data), reader.latents(data))
        assert decibels(writer.decode(data).samples - reader.decode(data).samples) < -40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_files_of_one_device_decode_on_another(codec, checkpoint_of):
    cuda = compand.load(checkpoint_of(codec.name), device="cuda")
    sound = sound_of(codec, 3, 40_000)
    for writer, reader in ((codec, cuda), (cuda, codec)):
        for level in LEVELS:
            data = writer.encode(sound, quality=level / 32)
            reader.check(data)
            latents = [side.latents(data).cpu() for side in (writer, reader)]
            assert torch.allclose(*latents, rtol=1e-5, atol=1e-6 * float(latents[0].abs().max()))


def test_threads_may_share_a_codec(codec, checkpoint_of, short_segments):
    sounds = [sound_of(codec, 1 + i % 3, 5000 + 700 * i, i) for i in range(6)]
    expected = [codec.encode(sound, quality=1 + i % 7) for i, sound in enumerate(sounds)]
    decoded = [codec.decode(data).samples for data in expected]
    # A fresh one, whose caches the threads fill together.
    shared = compand.load(checkpoint_of(codec.name), device="cpu")

    def work(i: int) -> tuple[bytes, np.ndarray]:
        data = shared.encode(sounds[i], quality=1 + i % 7)
        return data, shared.decode(data).samples

    with ThreadPoolExecutor(3) as pool:
        for i, (data, samples) in enumerate(pool.map(work, range(6))):
            assert data == expected[i] and np.array_equal(samples, decoded[i])


def test_recorded_music_by_its_path(codec, tmp_path):
    paths = sorted(
        path for path in SHARED_MUSIC.glob("*") if path.suffix in (".ogg", ".mp3", ".flac", ".wav")
    )
    if not paths:
        pytest.skip("the recordings are not on this machine")
    sound = read_sound(paths[0])
    excerpt = Sound(sound.samples[:, : 3 * sound.rate], sound.rate)
    excerpt.save(tmp_path / "excerpt.flac")
    data = codec.encode(tmp_path / "excerpt.flac", quality=codec.levels)
    decoded = codec.decode(data)
    assert (decoded.samples.shape, decoded.rate) == (excerpt.samples.shape, sound.rate)
    assert decibels(decoded.samples - excerpt.samples) < decibels(excerpt.samples) - 3
