"""Anchors: what goes in comes out in the same shape, at the rates and qualities that their settings promise."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compand.errors import BitstreamError, MediaError, UsageError
from compand.eval import subjects
from compand.eval.anchors import audio, images
from compand.pictures import Picture, psnr
from compand.sounds import Sound

IMAGE_ANCHORS = [name for name in images.ANCHORS if name not in images.missing()]
AUDIO_ANCHORS = [name for name in audio.ANCHORS if name not in audio.missing()]
LOSSY_AUDIO = ["mp3", "mp3-abr", "vorbis", "opus"]


def music(rate: int, seconds: float = 1.0, channels: int = 1, seed: int = 0) -> Sound:
    """Noise with the spectrum of music, nothing below 60 Hz (which Opus turns in phase), and swells."""
    generator = np.random.default_rng(seed)
    length = round(rate * seconds)
    white = np.fft.rfft(generator.standard_normal((channels, length)))
    frequency = np.fft.rfftfreq(length, 1 / rate)
    pink = np.fft.irfft(white * (frequency > 60) / np.maximum(frequency, 60), length)
    pink *= 1 + np.sin(2 * np.pi * 3 * np.arange(length) / rate)
    return Sound((0.5 * pink / max(np.abs(pink).max(), 1e-9)).astype(np.float32), rate)


def sdr(original: Sound, decoded: Sound) -> float:
    error = original.samples.astype(np.float64) - decoded.samples
    return float(10 * np.log10(np.sum(original.samples.astype(np.float64) ** 2) / np.sum(error**2)))


# ------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", IMAGE_ANCHORS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (64, 48)])
def test_every_image_anchor_restores_the_size(name: str, shape: tuple[int, int]):
    subject = subjects.find(name, "image")
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    data = subject.encode(Picture(pixels, None, None), subject.qualities[-1])
    decoded = subject.decode(data)
    assert isinstance(decoded, Picture) and decoded.pixels.shape == (*shape, 3)
    if subject.kind in ("lossless", "identity"):
        np.testing.assert_array_equal(decoded.pixels, pixels)
    assert 0 <= subject.overhead(data) < len(data)


@pytest.mark.parametrize("name", [name for name in IMAGE_ANCHORS if name not in ("png", "identity")])
def test_image_qualities_ascend_in_rate_and_in_psnr(name: str, scenery: np.ndarray):
    subject = subjects.find(name, "image")
    original = Picture(scenery[:192, :256].copy(), None, None)
    files = [subject.encode(original, quality) for quality in subject.qualities]
    sizes = [len(data) for data in files]
    assert sizes == sorted(set(sizes))
    quality = [psnr(original.pixels, subject.decode(data).pixels) for data in files]
    assert quality == sorted(quality)
    assert quality[0] + 10 < quality[-1]


def test_jpeg2000_reaches_its_target_rate(scenery: np.ndarray):
    subject = subjects.find("jpeg2000")
    original = Picture(scenery, None, None)
    for bpp in (0.25, 1.0, 2.0):
        rate = 8 * len(subject.encode(original, bpp)) / scenery[..., 0].size
        assert rate == pytest.approx(bpp, rel=0.03)


def test_gray_and_transparent_pictures_are_coded_as_rgb(scenery: np.ndarray):
    gray = np.ascontiguousarray(scenery[:64, :64, :1])
    for name in ("jpeg", "png", "identity"):
        subject = subjects.find(name, "image")
        alpha = np.full((64, 64), 7, np.uint8)
        decoded = subject.decode(subject.encode(Picture(gray, alpha, None), subject.qualities[-1]))
        assert decoded.pixels.shape == (64, 64, 3) and decoded.alpha is None
        assert psnr(np.repeat(gray, 3, 2), decoded.pixels) > 35


def test_the_image_identity_has_24_bpp_and_finds_damage():
    subject = subjects.find("identity", "image")
    pixels = np.arange(100 * 50 * 3, dtype=np.uint32).astype(np.uint8).reshape(50, 100, 3)
    data = subject.encode(Picture(pixels, None, None), 1)
    assert 8 * (len(data) - subject.overhead(data)) == 24 * 50 * 100
    for damaged in (b"", data[:5], data[:-1], data + b"x", bytes(8), data[4:8] + data[4:]):
        with pytest.raises(BitstreamError):
            subject.decode(damaged)


@pytest.mark.parametrize("name", [name for name in IMAGE_ANCHORS if name != "identity"])
def test_damaged_images_are_media_errors(name: str, scenery: np.ndarray):
    subject = subjects.find(name, "image")
    data = subject.encode(Picture(scenery[:64, :64].copy(), None, None), subject.qualities[-1])
    for damaged in (b"", b"no image", data[: len(data) // 2]):
        with pytest.raises(MediaError):
            subject.decode(damaged)


def test_wrong_media_qualities_and_sizes_are_refused():
    picture, sound = Picture(np.zeros((8, 8, 3), np.uint8), None, None), music(8000)
    for name in IMAGE_ANCHORS:
        subject = subjects.find(name, "image")
        with pytest.raises(UsageError, match="takes pictures"):
            subject.encode(sound, subject.qualities[0])
        for quality in (-1, 101):
            with pytest.raises(UsageError, match=f"{name} has no quality"):
                subject.encode(picture, quality)
    for name in AUDIO_ANCHORS:
        subject = subjects.find(name, "audio")
        with pytest.raises(UsageError, match="takes sounds"):
            subject.encode(picture, subject.qualities[0])
        with pytest.raises(UsageError, match="no samples"):
            subject.encode(Sound(np.zeros((1, 0), np.float32), 8000), subject.qualities[0])
        for quality in (-1, 300):
            with pytest.raises(UsageError, match=f"{name} has no quality"):
                subject.encode(sound, quality)
    with pytest.raises(UsageError, match="flac has no quality 20: choose 16 or 24"):
        subjects.find("flac").encode(sound, 20)
    wide = Picture(np.zeros((1, 2**14, 3), np.uint8), None, None)
    with pytest.raises(UsageError, match="WebP cannot hold this picture"):
        subjects.find("webp").encode(wide, 50)
    with pytest.raises(UsageError, match="MP3 cannot hold 3 channels at 44100 Hz"):
        subjects.find("mp3").encode(music(44100, channels=3), 5)


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, list[float]]]:
    """Points that CompressAI publishes of JPEG and WebP, at qualities 5, 10, ... 95."""
    text = (resources.files("compand.eval") / "data" / "kodak_published.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, list[float]]] = json.loads(text)
    return table


@pytest.fixture(scope="module")
def kodak_pixels(kodak: list[Path]) -> list[np.ndarray]:
    pixels = []
    for path in kodak:
        with Image.open(path) as image:
            pixels.append(np.asarray(image.convert("RGB")))
    return pixels


def mean_point(files: list[int], decoded: list[np.ndarray], original: list[np.ndarray]) -> SimpleNamespace:
    rates = [8 * size / pixels[..., 0].size for size, pixels in zip(files, original, strict=True)]
    quality = [psnr(*pair) for pair in zip(original, decoded, strict=True)]
    return SimpleNamespace(bpp=float(np.mean(rates)), psnr=float(np.mean(quality)))


@pytest.mark.parametrize(("name", "tolerance"), [("webp", 0.001), ("jpeg", 0.15)])
def test_kodak_reproduces_the_published_points(kodak_pixels, published, name: str, tolerance: float):
    """WebP to all digits; JPEG has the same files within 0.3 %, but libjpeg-turbo interpolates chroma better than
    libjpeg 9, which the published points were made with (see the next test)."""
    subject = subjects.find(name)
    for quality in (30, 75):
        files = [subject.encode(Picture(pixels, None, None), quality) for pixels in kodak_pixels]
        decoded = [subject.decode(data).pixels for data in files]
        point = mean_point([len(data) for data in files], decoded, kodak_pixels)
        index = quality // 5 - 1
        assert point.bpp == pytest.approx(published[name]["bpp"][index], rel=0.003)
        assert point.psnr == pytest.approx(published[name]["psnr"][index], abs=tolerance)
        assert point.psnr >= published[name]["psnr"][index] - 0.001


def test_libjpeg_9_reproduces_the_published_jpeg(kodak_pixels, published):
    """The published points are libjpeg 9d with our settings: chroma 4:2:0, standard Huffman tables."""
    pytest.importorskip("jpeglib")
    subject = subjects.find("jpeg-9d")
    files = [subject.encode(Picture(pixels, None, None), 75) for pixels in kodak_pixels]
    point = mean_point(
        [len(data) for data in files], [subject.decode(data).pixels for data in files], kodak_pixels
    )
    assert point.bpp == pytest.approx(published["jpeg"]["bpp"][14], abs=0.0002)
    assert point.psnr == pytest.approx(published["jpeg"]["psnr"][14], abs=0.0002)


# -------------------------------------------------------------------------------------------------------- audio


@given(
    name=st.sampled_from(AUDIO_ANCHORS),
    rate=st.sampled_from([8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000]),
    channels=st.integers(1, 2),
    length=st.integers(1, 6000),
)
@settings(max_examples=80, deadline=None)
def test_every_audio_anchor_restores_rate_channels_and_length(name, rate, channels, length):
    subject = subjects.find(name, "audio")
    sound = music(rate, length / rate, channels)
    for quality in (subject.qualities[0], subject.qualities[-1]):
        data = subject.encode(sound, quality)
        decoded = subject.decode(data)
        assert isinstance(decoded, Sound)
        assert decoded.rate == rate and decoded.samples.shape == (channels, length)
        assert np.isfinite(decoded.samples).all()
        assert 0 <= subject.overhead(data) < len(data)


@pytest.mark.parametrize("name", LOSSY_AUDIO)
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 96000])
def test_the_delay_of_the_codec_is_undone(name: str, rate: int):
    subject = subjects.find(name)
    sound = music(rate, 1.0)
    decoded = subject.decode(subject.encode(sound, subject.qualities[-2]))
    correlation = scipy.signal.correlate(sound.samples[0], decoded.samples[0], method="fft")
    assert int(np.argmax(correlation)) - (sound.length - 1) == 0
    assert sdr(sound, decoded) > 15


@pytest.mark.parametrize("name", LOSSY_AUDIO)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2)])
def test_audio_qualities_ascend_in_rate(name: str, rate: int, channels: int):
    subject = subjects.find(name)
    sound = music(rate, 1.0, channels)
    files = [subject.encode(sound, quality) for quality in subject.qualities]
    sizes = [len(data) for data in files]
    assert (
        sizes == sorted(sizes) and len(set(sizes)) >= 8
    )  # LAME gives noise the same rate at its lowest levels
    assert sdr(sound, subject.decode(files[0])) + 6 < sdr(sound, subject.decode(files[-1]))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kbps", [16, 32, 96])
def test_opus_reaches_its_target_rate_a_channel(channels: int, kbps: int):
    subject = subjects.find("opus")
    sound = music(48000, 4.0, channels)
    data = subject.encode(sound, kbps)
    payload = 8 * (len(data) - subject.overhead(data)) / sound.seconds / 1000
    assert payload == pytest.approx(channels * kbps, rel=0.12)


def test_vorbis_takes_sounds_that_its_stack_would_not_hold():
    sound = Sound(np.tile(music(44100).samples, 50), 44100)
    vorbis = audio.ANCHORS["vorbis"]()
    assert vorbis.decode(vorbis.encode(sound, 0.0)).samples.shape == sound.samples.shape


def ogg_packets(data: bytes) -> list[int]:
    """Sizes of the packets of an Ogg file."""
    sizes, position, unfinished = [], 0, 0
    while position < len(data):
        assert data[position : position + 4] == b"OggS"
        lacing = data[position + 27 : position + 27 + data[position + 26]]
        for value in lacing:
            unfinished += value
            if value < 255:
                sizes.append(unfinished)
                unfinished = 0
        position += 27 + len(lacing) + sum(lacing)
    return sizes


@pytest.mark.parametrize(("name", "headers"), [("opus", 2), ("vorbis", 3)])
@pytest.mark.parametrize("seconds", [0.01, 0.4, 3.0])
def test_ogg_overhead_is_all_but_the_packets_of_sound(name: str, headers: int, seconds: float):
    subject = subjects.find(name)
    data = subject.encode(music(16000, seconds), subject.qualities[3])
    packets = ogg_packets(data)
    assert len(data) - subject.overhead(data) == sum(packets[headers:]) > 0


@pytest.mark.parametrize("name", ["mp3", "mp3-abr"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_mp3_overhead_is_the_first_frame(name: str, rate: int):
    subject = subjects.find(name)
    data = subject.encode(music(rate, 0.5), subject.qualities[2])
    first = subject.overhead(data)
    assert b"Xing" in data[:first] and 100 < first < 600
    # The next frame begins there, with the same version, layer and sample rate.
    assert data[first] == 0xFF and data[first + 1] == data[1] and data[first + 2] & 0x0C == data[2] & 0x0C
    assert subject.overhead(data[first:]) == 0


def test_rates_that_the_format_lacks_cost_twelve_bytes():
    subject = subjects.find("opus")
    packets = ogg_packets(data := subject.encode(music(48000), 32))
    assert len(packets) > 2
    data = subject.encode(music(44100), 32)
    assert data.endswith(b"RATE") and data[-12:-8] == (44100).to_bytes(4, "little")
    assert ogg_packets(data[:-12])[2:] and subject.overhead(data) - subject.overhead(data[:-12]) == 12
    for trailer in (
        (47999).to_bytes(4, "little") + data[-8:],
        (0).to_bytes(4, "little") + data[-8:],
        data[-12:-8] + (44000).to_bytes(4, "little") + b"RATE",
        data[-12:-8] + (45000).to_bytes(4, "little") + b"RATE",
    ):
        with pytest.raises(BitstreamError, match="intact copy"):
            subject.decode(data[:-12] + trailer)


def test_a_file_that_ends_like_a_trailer_gets_one(monkeypatch: pytest.MonkeyPatch):
    subject = subjects.find("opus")
    write = soundfile.write

    def write_and_add(stream, *arguments, **options):
        write(stream, *arguments, **options)
        stream.write(b"RATE")

    monkeypatch.setattr(soundfile, "write", write_and_add)
    sound = music(16000, 0.3)
    decoded = subject.decode(subject.encode(sound, 64))
    assert decoded.rate == 16000 and decoded.length == sound.length


@pytest.mark.parametrize("bits", [16, 24])
def test_flac_restores_integers_exactly(bits: int):
    subject = subjects.find("flac")
    levels = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, 3000))
    sound = Sound((levels / 2.0 ** (bits - 1)).astype(np.float32), 44100)
    np.testing.assert_array_equal(subject.decode(subject.encode(sound, bits)).samples, sound.samples)


def test_the_audio_identity_is_exact_and_finds_damage():
    subject = subjects.find("identity", "audio")
    sound = Sound(music(11025, 0.1, 3).samples * 5, 11025)
    data = subject.encode(sound, 1)
    decoded = subject.decode(data)
    assert decoded.rate == 11025
    np.testing.assert_array_equal(decoded.samples, sound.samples)
    assert len(data) == 8 + 4 * sound.samples.size and subject.overhead(data) == 8
    for damaged in (b"", data[:5], data[:-1], bytes(8) + data[8:]):
        with pytest.raises(BitstreamError):
            subject.decode(damaged)


@pytest.mark.parametrize("name", [name for name in AUDIO_ANCHORS if name != "identity"])
def test_what_is_no_sound_is_a_media_error(name: str):
    for damaged in (b"", b"no sound at all", bytes(1000)):
        with pytest.raises(MediaError):
            subjects.find(name).decode(damaged)
