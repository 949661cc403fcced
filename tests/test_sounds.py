"""Sounds in and out of files, and between sample rates."""

from __future__ import annotations

import io
import math
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from compand.errors import MediaError, UsageError
from compand.sounds import Sound, SoundReader, SoundWriter, as_stored, is_sound_path, read_sound, resample


def noise(channels: int = 2, length: int = 1000, rate: int = 8000, seed: int = 0) -> Sound:
    samples = np.random.default_rng(seed).uniform(-0.9, 0.9, (channels, length))
    return Sound(samples.astype(np.float32), rate)


def sine(frequency: float, rate: int, seconds: float = 0.5) -> Sound:
    time = np.arange(round(rate * seconds)) / rate
    return Sound((0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)[None], rate)


@pytest.mark.parametrize(("suffix", "subtype", "bits"), [("wav", "PCM_16", 16), ("flac", "PCM_24", 24)])
@given(channels=st.integers(1, 4), length=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_integer_samples_survive_any_number_of_generations(suffix, subtype, bits, channels, length, seed):
    levels = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (channels, length))
    levels.flat[0], levels.flat[-1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    sound = Sound((levels / 2.0 ** (bits - 1)).astype(np.float32), 44100)
    stream = io.BytesIO()
    sound.save(stream, suffix, subtype)
    again = read_sound(stream)
    assert again.rate == 44100
    np.testing.assert_array_equal(again.samples, sound.samples)


def test_samples_beyond_full_scale_are_clipped():
    loud = Sound(np.array([[-1.5, -1.0, 0.0, 1.0, 1.5]], np.float32), 8000)
    assert as_stored(loud.samples, "PCM_16")[:, 0].tolist() == [-32768, -32768, 0, 32767, 32767]
    assert as_stored(loud.samples, "PCM_24")[:, 0].tolist() == [
        -(2**31),
        -(2**31),
        0,
        2**31 - 256,
        2**31 - 256,
    ]


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".w64", ".caf", ".au"])
def test_every_extension_writes_its_own_format(tmp_path: Path, suffix: str):
    path = tmp_path / f"sound{suffix}"
    sound = noise(1, 4000)
    sound.save(path)
    info = soundfile.info(path)
    lossy = {".ogg": "VORBIS", ".opus": "OPUS", ".mp3": "MPEG_LAYER_III"}
    assert info.subtype == lossy.get(suffix, "PCM_16")
    again = read_sound(path)
    assert (again.channels, again.length, again.rate) == (1, 4000, 8000)
    assert is_sound_path(path)


def test_floats_are_kept_where_the_format_has_them(tmp_path: Path):
    sound = Sound(noise().samples * 3, 11025)
    sound.save(tmp_path / "a.wav", subtype="FLOAT")
    np.testing.assert_array_equal(read_sound(tmp_path / "a.wav").samples, sound.samples)


def test_a_sound_that_the_format_refuses_leaves_no_file(tmp_path: Path):
    with pytest.raises(MediaError, match="OGG OPUS cannot hold 1 channels at 11025 Hz"):
        noise(1, 100, 11025).save(tmp_path / "a.opus")
    with pytest.raises(MediaError, match="no audio format to write"):
        noise().save(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_properties_and_empty_sounds():
    sound = noise(2, 1000, 8000)
    assert (sound.channels, sound.length, sound.seconds) == (2, 1000, 0.125)
    empty = Sound(np.zeros((1, 0), np.float32), 8000)
    stream = io.BytesIO()
    empty.save(stream)
    again = read_sound(stream)
    assert again.length == 0 and again.notes == ("no samples",)
    assert resample(empty, 16000).length == 0


@pytest.mark.parametrize(
    ("samples", "rate", "fact"),
    [
        (np.zeros(5, np.float32), 8000, r"float32 \[5\]"),
        (np.zeros((1, 5)), 8000, "float64"),
        (np.zeros((0, 5), np.float32), 8000, r"\[0, 5\]"),
        (np.zeros((1, 5), np.float32), 0, "sample rate is 0"),
        (np.zeros((1, 5), np.float32), 44100.5, "sample rate is 44100.5"),
    ],
)
def test_impossible_sounds_are_refused(samples, rate, fact):
    with pytest.raises(UsageError, match=fact):
        Sound(samples, rate)


def test_unreadable_files_are_named(tmp_path: Path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "raw.raw").write_bytes(bytes(100))
    for name, fact in [
        ("empty.wav", "is empty"),
        ("text.wav", "is not a sound"),
        ("raw.raw", "is not a sound"),
        ("none.wav", "does not exist"),
        (".", "is a folder"),
    ]:
        with pytest.raises(MediaError, match=fact) as caught:
            read_sound(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_truncated_and_damaged_files_are_errors():
    stream = io.BytesIO()
    noise(1, 50000).save(stream, "flac")
    data = stream.getvalue()
    with pytest.raises(MediaError, match=r"truncated|not a sound"):
        read_sound(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(MediaError, match="not a sound"):
        read_sound(io.BytesIO(data[:20]))
    samples = np.array([[0.0, math.nan, 0.0]], np.float32)
    stream = io.BytesIO()
    Sound(samples, 8000).save(stream, "wav", "FLOAT")
    with pytest.raises(MediaError, match="not numbers"):
        read_sound(stream)


def test_a_header_cannot_claim_memory():
    stream = io.BytesIO()
    noise(1, 100).save(stream, "flac")
    data = bytearray(stream.getvalue())
    data[21] |= 0x0F  # the stated number of samples, 36 bits
    data[22:26] = b"\xff\xff\xff\xff"
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match=r"truncated|not a sound"):
            read_sound(io.BytesIO(bytes(data)))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@given(
    length=st.integers(1, 5000),
    old=st.sampled_from([8000, 11025, 22050, 44100, 48000]),
    new=st.sampled_from([8000, 12000, 16000, 24000, 48000]),
)
@settings(max_examples=40, deadline=None)
def test_resampling_gives_the_exact_length(length, old, new):
    sound = resample(noise(1, length, old), new)
    assert sound.rate == new
    assert sound.length == -(-length * new // old)


@pytest.mark.parametrize(("old", "new"), [(8000, 16000), (44100, 48000), (48000, 44100), (48000, 16000)])
def test_resampling_agrees_with_the_sampled_sine_and_with_scipy(old, new):
    frequency = 0.3 * min(old, new)
    ours = resample(sine(frequency, old), new).samples[0]
    exact = sine(frequency, new).samples[0]
    middle = slice(new // 10, -new // 10)
    assert np.abs(ours[middle] - exact[middle]).max() < 1e-4
    common = math.gcd(old, new)
    polyphase = scipy.signal.resample_poly(sine(frequency, old).samples[0], new // common, old // common)
    assert np.abs(ours[middle] - polyphase[: len(ours)][middle]).max() < 5e-3  # its default filter is short


def test_resampling_removes_what_the_new_rate_cannot_hold():
    assert np.abs(resample(sine(5000, 16000), 8000).samples[0][400:-400]).max() < 1e-4


def test_impossible_rates_are_refused():
    for rate in (0, -8000):
        with pytest.raises(UsageError, match="positive"):
            resample(noise(), rate)
    with pytest.raises(UsageError, match="simpler ratio"):
        resample(noise(1, 10, 47999), 48000)
    sound = noise()
    assert resample(sound, sound.rate) is sound


def test_extensions():
    assert is_sound_path("a/B.FLAC") and is_sound_path("x.opus")
    assert not any(map(is_sound_path, ("a.png", "a.txt", "a", "a.raw", "a.cpd")))


# ------------------------------------------------------------------------------------------------ block by block


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "opus", "mp3", "aiff", "caf", "w64", "au"])
def test_blocks_are_the_sound(tmp_path: Path, suffix: str):
    sound = noise(2, 24_000, 48_000)
    sound.save(tmp_path / f"whole.{suffix}")
    with SoundWriter(tmp_path / f"blocks.{suffix}", 48_000, 2) as writer:
        for start, stop in ((0, 1), (1, 1), (1, 9000), (9000, 24_000)):
            writer.write(sound.samples[:, start:stop])
    expected = read_sound(tmp_path / f"whole.{suffix}").samples
    np.testing.assert_array_equal(read_sound(tmp_path / f"blocks.{suffix}").samples, expected)
    with SoundReader(tmp_path / f"blocks.{suffix}") as reader:
        assert (reader.rate, reader.channels) == (48_000, 2)
        assert reader.frames in (24_000, None) and (reader.frames is None) == (suffix == "mp3")
        for size in (7777, 100_000):
            blocks = list(reader.blocks(size))
            assert all(block.shape == (2, size) and block.dtype == np.float32 for block in blocks[:-1])
            np.testing.assert_array_equal(np.concatenate(blocks, axis=1), expected)


class Pipe(io.RawIOBase):
    """What standard output is to a program: it takes bytes and cannot seek."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.content += bytes(data)
        return len(data)


def test_streams_get_what_files_get(tmp_path: Path):
    sound = noise(1, 5000)
    sound.save(tmp_path / "a.wav")
    stream, pipe = io.BytesIO(), Pipe()
    for target in (stream, pipe):
        with SoundWriter(target, 8000, 1, "wav") as writer:
            writer.write(sound.samples)
    assert stream.getvalue() == pipe.content == (tmp_path / "a.wav").read_bytes()
    with open(tmp_path / "b.wav", "wb") as opened, SoundWriter(opened, 8000, 1) as writer:
        writer.write(sound.samples)
        writer.close()
        assert not opened.closed
    assert (tmp_path / "b.wav").read_bytes() == pipe.content


def test_a_named_pipe_and_a_stream_that_cannot_seek_are_read(tmp_path: Path):
    sound = noise(2, 60_000)
    sound.save(tmp_path / "a.wav")
    content = (tmp_path / "a.wav").read_bytes()

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    with SoundReader(Stream(content)) as reader:
        assert sum(block.shape[1] for block in reader.blocks()) == 60_000
    if not hasattr(os, "mkfifo"):
        return
    os.mkfifo(tmp_path / "p.wav")
    thread = threading.Thread(target=lambda: (tmp_path / "p.wav").write_bytes(content), daemon=True)
    thread.start()
    with SoundReader(tmp_path / "p.wav") as reader:
        for _ in range(2):
            assert np.array_equal(
                np.concatenate(list(reader.blocks()), axis=1), read_sound(tmp_path / "a.wav").samples
            )
    thread.join()


def test_rates_that_no_format_holds_are_refused(tmp_path: Path):
    for rate in (2**31, 2**40, 2**70):
        with pytest.raises(MediaError, match=f"cannot hold 1 channels at {rate} Hz"):
            SoundWriter(tmp_path / "a.wav", rate, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_gets_nothing_of_a_sound_that_failed():
    pipe = Pipe()
    with pytest.raises(AttributeError), SoundWriter(pipe, 8000, 1) as writer:
        writer.write(noise(1, 100))
    assert pipe.content == b""


def test_a_writer_that_is_refused_leaves_no_file(tmp_path: Path):
    for name, rate, channels in (
        ("a.opus", 11025, 1),
        ("a.mp3", 8000, 5),
        ("a.png", 8000, 1),
        ("a", 8000, 1),
    ):
        with pytest.raises(MediaError, match=r"cannot hold|no audio format"):
            SoundWriter(tmp_path / name, rate, channels)
    with pytest.raises(OSError, match="No such file"):
        SoundWriter(tmp_path / "none" / "a.wav", 8000, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_needs_memory_for_a_block_alone(tmp_path: Path):
    noise(1, 2**20).save(tmp_path / "long.wav")
    tracemalloc.start()
    try:
        with SoundReader(tmp_path / "long.wav") as reader:
            total = sum(block.shape[1] for block in reader.blocks(4096))
        assert total == 2**20 and tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()


def test_a_reader_tells_a_truncated_file_at_its_end():
    stream = io.BytesIO()
    noise(1, 50_000).save(stream, "flac")
    cut = io.BytesIO(stream.getvalue()[: len(stream.getvalue()) // 2])
    with SoundReader(cut) as reader, pytest.raises(MediaError, match=r"truncated|not a sound"):
        list(reader.blocks(1000))
