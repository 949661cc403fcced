"""The benchmarks of the wavelet codecs, on next to nothing."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from compand import checkpoint
from compand.codec import QUALITY_STEPS
from compand.errors import UsageError
from compand.eval.benchmarks import ceiling, wavelet_speed
from compand.eval.benchmarks.wavelet_speed import Contender, WideDecoder
from compand.sounds import Sound
from compand.transforms.wavelet import SpaceToDepth
from compand.transforms.wavelet_packets import WaveletPackets


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, scenery):
    folder = tmp_path_factory.mktemp("pictures")
    for i, (top, left) in enumerate([(0, 0), (100, 300)]):
        Image.fromarray(scenery[top : top + 64, left : left + 100]).save(folder / f"{i}.png")
    return folder


# ---------------------------------------------------------------------------------------------- ceiling


def test_ceiling(checkpoint_of, pictures, tmp_path, capsys):
    output = tmp_path / "ceiling.json"
    options = ["--data", str(pictures), "--training", str(pictures), "-o", str(output)]
    ceiling.main([*options, "--codecs", str(checkpoint_of("wavelet-image")), "--training-pictures", "1"])
    (outcome,) = json.loads(output.read_text())["results"].values()
    assert outcome["channels"] == 12
    assert [b["bpp"] > a["bpp"] for a, b in zip(outcome["files"], outcome["files"][1:], strict=False)] == [
        True
    ] * 7
    ceilings = outcome["ceilings"]
    assert len(ceilings) == 5 and min(ceilings.values()) > 30
    assert ceilings["learned, not rounded"] > outcome["files"][0]["psnr"]
    printed = capsys.readouterr().out
    assert "1 pictures of" in printed and "WaLLoC as published" in printed


@pytest.mark.parametrize("folding", [SpaceToDepth(2, 3), WaveletPackets(2, 3)], ids=["blocks", "packets"])
def test_all_components_restore_the_picture(folding, pictures, scenery):
    ((mean, rows),) = ceiling.components([folding], sorted(pictures.iterdir()))
    assert torch.allclose(rows @ rows.T, torch.eye(192, dtype=torch.float64), atol=1e-9)
    pixels = scenery[:50, :77]
    assert np.array_equal(ceiling.Projection(folding, mean, rows).restored(pixels), pixels)


def test_the_first_components_are_the_largest(pictures):
    ((mean, rows),) = ceiling.components([SpaceToDepth(2, 3)], sorted(pictures.iterdir()))
    x = ceiling.padded(ceiling.read_rgb(sorted(pictures.iterdir())[0]), 8)
    variances = (rows @ (SpaceToDepth(2, 3).analysis(x)[0].flatten(1) - mean)).square().mean(1)
    assert variances[:12].sum() > 0.8 * variances.sum()


def test_only_rounding_is_left_out(exact, scenery):
    codec = exact("wavelet-image")
    level = codec.levels * QUALITY_STEPS
    with torch.inference_mode():
        y = codec.analyse(scenery[:64, :64], ceiling.tile_rows(64, 64, 0)[0][0], level)
        y_hat = codec.bottleneck(y, torch.tensor([level])).y_hat
        kept = ceiling.not_rounded(codec.bottleneck, y, level)
        # Half a step at most, which the compander's curve widens where it is flat.
        step = codec.bottleneck.y_gain.inverse(torch.tensor([level]))
        near = codec.bottleneck.compander.compress(kept) - codec.bottleneck.compander.compress(y_hat)
    assert not torch.equal(kept, y_hat)
    assert (near.abs() <= 0.5 * step + 1e-4).all()


def test_curve_at_a_rate():
    points = [(0.25, 30.0), (1.0, 34.0)]
    assert ceiling.quality_at(points, 0.5) == pytest.approx(32)
    assert ceiling.quality_at(points, 2.0) == 34


# ------------------------------------------------------------------------------------------------ speed


def test_wide_decoder_has_the_published_size():
    with torch.device("meta"):
        assert WideDecoder(12, 192).parameter_count == 56_883_648


def test_wide_decoder_keeps_the_resolution():
    decoder = WideDecoder(12, 192, 32).eval()
    with torch.inference_mode():
        assert decoder(torch.randn(2, 12, 5, 7)).shape == (2, 192, 5, 7)


def test_passes_are_interleaved(monkeypatch):
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr(wavelet_speed.time, "perf_counter", lambda: now[0])

    def action(name, *seconds):
        durations = iter(seconds)

        def run():
            order.append(name)
            now[0] += next(durations)

        return run

    quick = Contender("quick", action("quick", 0.9, 0.1, 0.2, 0.9, 0.3, 0.4), 3.0)
    slow = Contender("slow", action("slow", 2, 4, 2, 6), 3.0)
    timings = wavelet_speed.interleaved([quick, slow], rounds=2, repetitions=2)
    assert order == ["quick"] * 3 + ["slow"] * 2 + ["quick"] * 3 + ["slow"] * 2
    assert timings["quick"].milliseconds == pytest.approx(250)
    assert (timings["quick"].passes, timings["slow"].passes) == (4, 2)
    assert timings["quick"].speed == pytest.approx(12)
    assert (timings["slow"].q1, timings["slow"].q3) == pytest.approx((4500, 5500))


def test_stages_make_up_a_pass(exact, scenery):
    codec = exact("wavelet-image")
    pixels = scenery[:64, :64].copy()
    start = time.perf_counter()
    stages = wavelet_speed.staged(codec, lambda: codec.encode(pixels, quality=4), 1)
    assert list(stages) == list(wavelet_speed.STAGES)
    assert all(milliseconds > 0 for milliseconds in stages.values())
    assert sum(stages.values()) <= 1e3 * (time.perf_counter() - start)


def test_nearest_webp(scenery):
    pixels = np.ascontiguousarray(scenery[:64, :64])
    size = len(wavelet_speed.webp(pixels, 37))
    assert len(wavelet_speed.webp(pixels, wavelet_speed.nearest_webp(pixels, size))) == size


def test_stereo_of_any_sound(tmp_path):
    path = tmp_path / "mono.wav"
    Sound(np.linspace(-0.5, 0.5, 100, dtype=np.float32)[None], 44100).save(path)
    sound = wavelet_speed.stereo(path, 0.01)
    assert sound.samples.shape == (2, 441)
    assert np.array_equal(sound.samples[0], sound.samples[1])
    assert np.array_equal(sound.samples[:, 100:200], sound.samples[:, :100])


def test_speed(checkpoint_of, pictures, tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(wavelet_speed, "limit_threads", lambda count: None)
    monkeypatch.setattr(wavelet_speed, "tune_allocator", lambda: False)
    monkeypatch.setattr(wavelet_speed, "PEER_QUALITY", 1.0)
    sound = tmp_path / "sound.wav"
    Sound(np.random.default_rng(0).uniform(-0.5, 0.5, (2, 5000)).astype(np.float32), 44100).save(sound)
    image_codec, sound_codec = checkpoint_of("wavelet-image"), checkpoint_of("wavelet-audio")
    output = tmp_path / "speed.json"
    options = ["--picture", str(pictures / "0.png"), "--sound", str(sound), "--seconds", "0.2"]
    options += ["--image-codecs", str(image_codec), "--sound-codecs", str(sound_codec), "--width", "32"]
    options += ["--threads", "1", "--rounds", "1", "--repetitions", "1", "-o", str(output)]
    wavelet_speed.main(options)
    assert torch.get_num_threads() == threads == 1
    results = json.loads(output.read_text())["results"]
    name = f"{checkpoint.read_info(image_codec).name}@8"
    assert {"WebP, default quality", "WebP, nearest bytes"} < set(results["encode"]["ratios"][name])
    assert (
        results["encode"]["files"][name]["bytes"]
        > results["encode"]["files"][name.replace("@8", "@4")]["bytes"]
    )
    assert set(results["sound"]["decode"]) == set(results["sound"]["files"])
    encode = results["encode"]
    ratio = encode["times"]["WebP, quality 80"]["milliseconds"] / encode["times"][name]["milliseconds"]
    assert encode["ratios"][name]["WebP, default quality"] == pytest.approx(ratio)
    wanted = {what: wanted for what, wanted, _ in wavelet_speed.requirements(results)}
    assert sorted(set(wanted.values())) == [2, 10, 30, 100]
    assert "mbt2018-mean, tuned" in capsys.readouterr().out


def test_speed_refuses_codecs_of_the_other_medium(checkpoint_of):
    with pytest.raises(UsageError, match="choose an audio codec"):
        wavelet_speed._audio_codec(str(checkpoint_of("wavelet-image")))
