"""Distortion metrics against closed forms, other implementations and published figures."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from importlib import resources, util
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.audio as reference_audio
import torchmetrics.functional.image as reference_image
import torchvision
from PIL import Image
from torchmetrics.functional.image import dists as reference_dists
from torchmetrics.functional.image.lpips import _LPIPS

from compand.errors import UsageError
from compand.eval import metrics, subjects
from compand.eval.metrics import audio, images
from compand.pictures import Picture
from compand.sounds import Sound

IMAGE_METRICS = [metric.name for metric in metrics.METRICS if metric.medium == "image"]
AUDIO_METRICS = [metric.name for metric in metrics.METRICS if metric.medium == "audio"]


def picture(pixels: np.ndarray) -> Picture:
    return Picture(np.ascontiguousarray(pixels), None, None)


def noisy(original: Picture, deviation: float) -> Picture:
    noise = np.random.default_rng(0).normal(0, deviation, original.pixels.shape)
    return picture((original.pixels + noise).round().clip(0, 255).astype(np.uint8))


def voice(seconds: float = 2.0, rate: int = 16000, channels: int = 1) -> Sound:
    """Harmonics of a gliding pitch under formants and syllables: speech enough for metrics of speech."""
    time_axis = np.arange(round(seconds * rate)) / rate
    pitch = 120 * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * time_axis))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    total = np.zeros_like(time_axis)
    for harmonic in range(1, 30):
        frequency = 120 * harmonic
        if frequency < 0.45 * rate:
            formants = sum(math.exp(-(((frequency - centre) / 300) ** 2)) for centre in (500, 1500, 2500))
            total += (0.05 + formants) * np.sin(harmonic * phase)
    total *= np.clip(np.sin(2 * np.pi * 2 * time_axis), 0, None)
    samples = np.tile(0.3 * total / np.abs(total).max(), (channels, 1))
    return Sound(samples.astype(np.float32), rate)


def with_noise(sound: Sound, level: float, seed: int = 0) -> Sound:
    noise = np.random.default_rng(seed).normal(0, level, sound.samples.shape)
    return Sound((sound.samples + noise).astype(np.float32), sound.rate)


# ------------------------------------------------------------------------------------------------------- choice


def test_metrics_are_chosen_by_medium_and_name():
    found, _ = metrics.for_medium("audio", ["sdr", "si_sdr"])
    assert [metric.name for metric in found] == ["si_sdr", "sdr"]
    assert all(metric.better in ("higher", "lower") and metric.title for metric in metrics.METRICS)
    everything, notices = metrics.for_medium("image")
    assert [metric.name for metric in everything][:2] == ["psnr", "ms_ssim"]
    assert len(everything) + len(notices) == len(IMAGE_METRICS)
    with pytest.raises(UsageError, match="metric pesq does not exist for image: choose from psnr"):
        metrics.for_medium("image", ["pesq"])


def test_what_is_not_installed_is_a_notice(monkeypatch: pytest.MonkeyPatch):
    find_spec = util.find_spec
    lacking = {"pesq", "pystoi", "visqol"}
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in lacking else find_spec(name))
    found, notices = metrics.for_medium("audio")
    assert [metric.name for metric in found] == ["psnr", "si_sdr", "sdr", "log_mel"]
    assert [notice.split(" is left out: ")[0] for notice in notices] == ["PESQ", "STOI", "ViSQOL"]
    assert 'pip install "compand[pesq]"' in notices[0]
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "numba" else object())
    assert "numba" in metrics.for_medium("audio")[1][-1]
    assert metrics.for_medium("audio", ["visqol"])[1] == []


def test_signals_that_cannot_be_compared_are_refused():
    small, large = picture(np.zeros((20, 20, 3), np.uint8)), picture(np.zeros((20, 21, 3), np.uint8))
    with pytest.raises(UsageError, match="21x20 instead of 20x20"):
        metrics.measure("psnr", small, large)
    with pytest.raises(UsageError, match="psnr cannot compare Picture and Sound"):
        metrics.measure("psnr", small, voice())
    with pytest.raises(UsageError, match="sdr cannot compare Picture and Picture"):
        metrics.measure("sdr", small, small)
    with pytest.raises(UsageError, match="metric psnrr does not exist"):
        metrics.measure("psnrr", small, small)
    sound = voice(0.5)
    for other in (voice(0.4), voice(0.5, channels=2), Sound(sound.samples, 8000)):
        with pytest.raises(UsageError, match="restore size and rate"):
            metrics.measure("sdr", sound, other)


# ------------------------------------------------------------------------------------------------------- images


def test_psnr_is_that_of_rgb_with_8_bits():
    original = picture(np.full((30, 40, 3), 100, np.uint8))
    decoded = picture(np.full((30, 40, 3), 110, np.uint8))
    assert metrics.measure("psnr", original, decoded) == pytest.approx(20 * math.log10(25.5))
    assert metrics.measure("psnr", original, original) == math.inf
    gray = picture(np.full((30, 40, 1), 110, np.uint8))
    assert metrics.measure("psnr", original, gray) == pytest.approx(20 * math.log10(25.5))


def test_ms_ssim_agrees_with_torchmetrics(scenery: np.ndarray):
    original = picture(scenery[:200, :256])
    for deviation in (2, 20, 60):
        decoded = noisy(original, deviation)
        x, y = (torch.from_numpy(each.pixels).permute(2, 0, 1)[None].float() for each in (decoded, original))
        expected = reference_image.multiscale_structural_similarity_index_measure(x, y, data_range=255.0)
        # Its windows reach over the edge, ours do not.
        assert metrics.measure("ms_ssim", original, decoded) == pytest.approx(float(expected), abs=4e-3)
    assert metrics.measure("ms_ssim", original, original) == 1


def test_ms_ssim_of_webp_on_kodak_is_the_published_one(kodak: list[Path]):
    webp = subjects.find("webp")
    figures = []
    for path in kodak:
        with Image.open(path) as image:
            original = picture(np.asarray(image.convert("RGB")))
        figures.append(metrics.measure("ms_ssim", original, webp.decode(webp.encode(original, 30))))
    text = (resources.files("compand.eval") / "data" / "kodak_published.json").read_text(encoding="utf-8")
    assert np.mean(figures) == pytest.approx(json.loads(text)["webp"]["msssim"][5], abs=1e-4)


@pytest.mark.parametrize(("metric", "edge"), [("ms_ssim", 161), ("lpips", 31), ("dists", 16)])
def test_pictures_smaller_than_a_window_are_unfit(metric: str, edge: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_network", untrained)
    original = picture(np.random.default_rng(0).integers(0, 256, (edge, edge + 9, 3), dtype=np.uint8))
    assert math.isfinite(metrics.measure(metric, original, noisy(original, 9)))
    small = picture(original.pixels[:-1])
    with pytest.raises(
        UsageError, match=f"{metric} needs edges of {edge} pixels, the shorter has {edge - 1}"
    ):
        metrics.measure(metric, small, small)


@functools.cache
def untrained(metric: str) -> torch.nn.Sequential:
    """The layers of a metric's backbone with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = {"lpips": torchvision.models.alexnet, "dists": torchvision.models.vgg16}[metric]
        features: torch.nn.Sequential = build(weights=None).features.eval()
    return features


def test_lpips_agrees_with_torchmetrics(scenery: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_network", untrained)
    model = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    weights = untrained("lpips").state_dict()
    model.net.load_state_dict(
        {name: weights[name.split(".", 1)[1]] for name in model.net.state_dict()}, strict=True
    )
    original = picture(scenery[100:170, 100:203])
    decoded = noisy(original, 20)
    x, y = (torch.from_numpy(each.pixels).permute(2, 0, 1)[None] / 255 for each in (original, decoded))
    with torch.inference_mode():
        expected = float(model(x, y, normalize=True))
    assert metrics.measure("lpips", original, decoded) == pytest.approx(expected, rel=1e-4)
    assert metrics.measure("lpips", original, original) == 0


def test_dists_agrees_with_torchmetrics(scenery: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_network", untrained)
    network = torch.nn.Module()
    network.features = untrained("dists")
    monkeypatch.setattr(reference_dists, "vgg16", lambda weights: network)
    model = reference_dists.DISTSNetwork(load_weights=False)
    trained = images._packaged_weights("dists_models/weights.pt")
    model.alpha.data, model.beta.data = trained["alpha"], trained["beta"]
    original = picture(scenery[100:164, 100:197])
    decoded = noisy(original, 20)
    x, y = (torch.from_numpy(each.pixels).permute(2, 0, 1)[None] / 255 for each in (original, decoded))
    with torch.inference_mode():
        expected = float(model(x, y))
    assert metrics.measure("dists", original, decoded) == pytest.approx(expected, rel=1e-3)
    assert metrics.measure("dists", original, original) == pytest.approx(0, abs=1e-5)


@pytest.fixture
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where weights would be kept, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    images._reachable.cache_clear()
    yield tmp_path / "hub" / "checkpoints"
    images._reachable.cache_clear()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of a server of the files in a folder "served"."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    ) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_weights_are_fetched_once_and_checked(weights_folder: Path, server: str, tmp_path: Path):
    content = b"weights" * 1000
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "served" / name).write_bytes(content)
    backbone = images.Backbone("net", f"{server}/{name}", (1,))
    assert images._obtain(backbone) == ""
    assert (weights_folder / name).read_bytes() == content
    (tmp_path / "served" / name).unlink()
    assert images._obtain(backbone) == ""
    (tmp_path / "served" / "net-00000000.pth").write_bytes(content)
    reason = images._obtain(images.Backbone("net", f"{server}/net-00000000.pth", (1,)))
    assert "fails (the file is not what its name says)" in reason
    assert [path.name for path in weights_folder.iterdir()] == [name]


def test_without_an_answer_the_notice_comes_soon(weights_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """One wait for all weights of a server, not one for each file."""
    monkeypatch.setattr(images, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        server = f"http://127.0.0.1:{silent.getsockname()[1]}"
        networks = {"lpips": "alexnet", "dists": "vgg16"}
        for metric, name in networks.items():
            backbone = images.Backbone(name, f"{server}/{name}-12345678.pth", (1,))
            monkeypatch.setitem(images._BACKBONES, metric, backbone)
        started = time.monotonic()
        found, notices = metrics.for_medium("image", ["psnr", "lpips", "dists"])
        assert 0.5 <= time.monotonic() - started < 10
    assert images._reachable.cache_info().misses == 1
    assert [metric.name for metric in found] == ["psnr"]
    assert "LPIPS is left out: its alexnet weights are not here and 127.0.0.1 cannot be reached" in notices[0]
    assert f"{server}/vgg16-12345678.pth in the checkpoints folder of torch's hub folder" in notices[1]
    assert str(weights_folder) not in "".join(notices)  # results keep notices, and no path of a machine


# -------------------------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("level", [0.001, 0.05, 1.0])
def test_sdr_and_si_sdr_agree_with_torchmetrics(channels: int, level: float):
    original = voice(0.5, channels=channels)
    decoded = with_noise(Sound(original.samples * 0.8, original.rate), level)
    x, y = (torch.from_numpy(sound.samples).double() for sound in (decoded, original))
    ratios = reference_audio.scale_invariant_signal_distortion_ratio(x, y)
    expected = float(ratios.clamp(min=audio.SI_SDR_FLOOR).mean())
    assert metrics.measure("si_sdr", original, decoded) == pytest.approx(expected, abs=1e-5)
    expected = float(reference_audio.signal_noise_ratio(x.ravel(), y.ravel()))
    assert metrics.measure("sdr", original, decoded) == pytest.approx(expected, abs=1e-5)


def test_sdr_and_si_sdr_of_closed_forms():
    time_axis = np.arange(8000) / 8000
    tone, other = (np.sin(2 * np.pi * f * time_axis).astype(np.float32) for f in (100, 200))
    original = Sound(tone[None], 8000)
    assert metrics.measure("sdr", original, Sound(tone[None] / 2, 8000)) == pytest.approx(20 * math.log10(2))
    assert metrics.measure("si_sdr", original, Sound((tone + other / 10)[None], 8000)) == pytest.approx(20)
    halves = Sound(np.full((2, 500), 0.5, np.float32), 8000)
    assert metrics.measure("psnr", halves, Sound(halves.samples * 1.2, 8000)) == pytest.approx(20, abs=1e-5)
    for metric in ("psnr", "sdr", "si_sdr"):
        assert metrics.measure(metric, original, original) == math.inf
    # A silent channel of the original says nothing and is not counted.
    stereo = Sound(np.stack([tone, 0 * tone]), 8000)
    decoded = Sound(np.stack([tone + other / 10, other]), 8000)
    assert metrics.measure("si_sdr", stereo, decoded) == pytest.approx(20)
    # SDR counts what leaks into it.
    assert metrics.measure("sdr", stereo, decoded) == pytest.approx(-10 * math.log10(0.01 + 1), abs=1e-3)


def test_sounds_decoded_to_silence_have_the_worst_value():
    sound = voice(1.0, 8000)
    silence = Sound(np.zeros_like(sound.samples), 8000)
    assert metrics.measure("si_sdr", sound, silence) == audio.SI_SDR_FLOOR
    assert metrics.measure("si_sdr", sound, with_noise(silence, 1.0)) == audio.SI_SDR_FLOOR
    assert metrics.measure("sdr", sound, silence) == pytest.approx(0)
    pytest.importorskip("pesq")
    assert metrics.measure("pesq", sound, silence) == audio.PESQ_WORST
    assert metrics.measure("pesq", sound, with_noise(sound, 0.3)) > audio.PESQ_WORST


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_log_mel_of_a_gain_is_the_gain(rate: int):
    noise = np.random.default_rng(0).normal(0, 0.1, (2, rate))
    original = Sound(noise.astype(np.float32), rate)
    for gain in (0.5, 0.9, 2.0):
        distance = metrics.measure("log_mel", original, Sound(original.samples * np.float32(gain), rate))
        assert distance == pytest.approx(abs(20 * math.log10(gain)), rel=1e-3)
    assert metrics.measure("log_mel", original, original) == 0


def test_log_mel_has_a_floor():
    quiet = with_noise(Sound(np.zeros((1, 8000), np.float32), 8000), 1e-6)
    assert metrics.measure("log_mel", quiet, Sound(quiet.samples * 3, 8000)) == 0


def mel_levels(samples: np.ndarray, rate: int, window: int) -> np.ndarray:
    """The formula of `log_mel` written out in NumPy."""
    hop, bands = window // 4, window // 32
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.pad(samples.astype(np.float64), window // 2)
    frames = [padded[start : start + window] * hann for start in range(0, len(padded) - window + 1, hop)]
    power = np.abs(np.fft.rfft(frames)) ** 2 * 4 / (window * np.sum(hann**2))
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + rate / 1400), bands + 2) / 2595) - 1)
    frequency = np.arange(window // 2 + 1) * rate / window
    levels = []
    for low, centre, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        slopes = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
        levels.append(power @ np.clip(np.minimum(*slopes), 0, None))
    return np.maximum(10 * np.log10(np.maximum(levels, 1e-30)), -80)


@pytest.mark.parametrize("length", [1, 100, 5000])
def test_log_mel_is_its_formula(length: int):
    original = with_noise(Sound(np.zeros((1, length), np.float32), 16000), 0.1)
    decoded = with_noise(original, 0.02, seed=1)
    expected = np.mean(
        [
            np.abs(
                mel_levels(original.samples[0], 16000, w) - mel_levels(decoded.samples[0], 16000, w)
            ).mean()
            for w in audio.MEL_WINDOWS
        ]
    )
    assert metrics.measure("log_mel", original, decoded) == pytest.approx(expected, rel=1e-3)


def test_a_full_scale_sine_has_level_0():
    sine = Sound(np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)[None], 16000)
    energy = 10 ** (audio._mel_levels(sine.samples[0].astype(np.float64), 16000, 2048)[:, 20] / 10)
    assert 0.9 < float(energy.sum()) <= 1.0001


@pytest.mark.parametrize(("rate", "best"), [(8000, 4.549), (16000, 4.644), (44100, 4.644)])
def test_pesq_is_bounded_and_falls_with_noise(rate: int, best: float):
    """P.862.1 and P.862.2 map the best raw score, 4.5, to these."""
    pytest.importorskip("pesq")
    original = voice(2.0, rate, channels=2)
    scores = [metrics.measure("pesq", original, with_noise(original, level)) for level in (0, 1e-3, 1e-2)]
    assert scores[0] == pytest.approx(best, abs=1e-3)
    assert scores[0] > scores[1] > scores[2] > 1


def test_pesq_of_long_sounds_is_the_mean_of_parts():
    pytest.importorskip("pesq")
    part = voice(15.0, 8000)
    silence = np.zeros_like(part.samples)
    original = Sound(np.concatenate([part.samples, silence, part.samples], axis=1), 8000)
    decoded = with_noise(part, 0.01).samples
    whole = Sound(np.concatenate([decoded, silence, decoded], axis=1), 8000)
    single = metrics.measure("pesq", part, Sound(decoded, 8000))
    assert metrics.measure("pesq", original, whole) == pytest.approx(single)


def test_stoi_is_1_and_falls_with_noise():
    original = voice(2.0, 16000, channels=2)
    scores = [metrics.measure("stoi", original, with_noise(original, level)) for level in (0, 0.03, 0.3)]
    assert scores[0] == pytest.approx(1)
    assert scores[0] > scores[1] > scores[2]
    clean, noise = (sound.samples.mean(0) for sound in (original, with_noise(original, 0.03)))
    from pystoi import stoi

    assert scores[1] == pytest.approx(float(stoi(clean, noise, 16000)), abs=1e-6)


def test_visqol_is_best_for_equal_sounds():
    pytest.importorskip("visqol")
    original = voice(1.2, 16000)
    scores = [metrics.measure("visqol", original, with_noise(original, level)) for level in (0, 0.1)]
    assert scores[0] == pytest.approx(5, abs=1e-6)
    assert 1 <= scores[1] < scores[0]
    with pytest.raises(UsageError, match="visqol cannot judge"):
        metrics.measure("visqol", voice(0.05), voice(0.05))


def test_unfit_sounds_say_why():
    silent = Sound(np.zeros((1, 8000), np.float32), 8000)
    empty = Sound(np.zeros((1, 0), np.float32), 8000)
    broken = Sound(np.full((1, 8000), np.nan, np.float32), 8000)
    sound = voice(1.0, 8000)
    for metric in AUDIO_METRICS:
        with pytest.raises(UsageError, match=f"{metric} is not defined, the original is silent"):
            metrics.measure(metric, silent, sound)
        with pytest.raises(UsageError, match="no samples"):
            metrics.measure(metric, empty, empty)
        with pytest.raises(UsageError, match="not numbers"):
            metrics.measure(metric, sound, broken)
    with pytest.raises(UsageError, match=r"stoi needs 0.4 s"):
        metrics.measure("stoi", voice(0.2, 8000), voice(0.2, 8000))
    opposite = Sound(np.concatenate([sound.samples, -sound.samples]), 8000)
    with pytest.raises(UsageError, match="cancel each other"):
        metrics.measure("stoi", opposite, opposite)


def test_pesq_refuses_what_it_cannot_judge():
    pytest.importorskip("pesq")
    short = voice(0.2, 8000)
    with pytest.raises(UsageError, match=r"0\.25 s"):
        metrics.measure("pesq", short, short)
