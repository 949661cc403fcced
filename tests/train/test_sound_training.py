"""Training on folders of sounds: crops, held-out files, the loss, the whole way to an exported codec."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, stereo
from hypothesis import given, settings
from hypothesis import strategies as st

import compand
from compand.codec import QUALITY_STEPS
from compand.errors import MediaError, UsageError
from compand.sounds import Sound, read_sound
from compand.train import cli, export
from compand.train.codec_training import rate_unit
from compand.train.instruments import RATE
from compand.train.rate_distortion import RateDistortion
from compand.train.sounds import (
    SoundCrops,
    SoundFolder,
    Variation,
    as_int16,
    find_sounds,
    split,
    stretched,
    with_channels,
)
from compand.wavelet import WaveletAudioCodec

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
MUSIC = Path(__file__).parents[2].parent / "shared" / "data" / "audio"
PLAIN = Variation(gain=(0.0, 0.0), mixing=0.0, spatial=False)
CPU = torch.device("cpu")


def ramp(channels: int, length: int, first: int = 1) -> np.ndarray:
    """int16 [channels, length] that counts up, so that every sample tells where it lies."""
    return np.arange(first, first + channels * length, dtype=np.int16).reshape(channels, length)


def integers(batch: torch.Tensor) -> np.ndarray:
    """A batch [B, C, 1, N] in units of 2^-15, [B, C, N]."""
    return (batch[:, :, 0] * 32768).numpy().astype(np.int64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """A folder of four stereo pieces and one of six short mono sounds, some at other rates."""
    root = tmp_path_factory.mktemp("sounds")
    generator = np.random.default_rng(0)
    for name in ("music", "samples"):
        (root / name).mkdir()
    for i in range(4):
        Sound(stereo(generator), RATE).save(root / "music" / f"piece_{i}.flac")
    for i in range(6):
        sound = Sound(stereo(generator)[:1, : 4000 + 100 * i], RATE if i % 2 else 2 * RATE)
        sound.save(root / "samples" / f"loop_{i}.wav")
    (root / "music" / "notes.txt").write_text("no sound")
    return [str(root / "music"), str(root / "samples")]


def folder_of(roots: list[str], **arguments: Any) -> SoundFolder:
    data = SoundFolder(roots, **({"rate": RATE, "crop": 4096, "batch_size": 8} | arguments))
    data.setup()
    return data


# ------------------------------------------------------------------------------------------------ held-out files


def test_held_out_files_are_named_by_patterns():
    paths = [Path("a/music") / name for name in ("Waltz.ogg", "Dance_1.ogg", "Dance_2.ogg")]
    paths += [Path("a/samples") / f"{i}.flac" for i in range(7)]
    train, apart = split(paths, ["Dance*"], ["samples/*"])
    assert [path.name for path in apart] == ["Dance_1.ogg", "Dance_2.ogg", "0.flac", "3.flac", "6.flac"]
    assert sorted(train + apart) == sorted(paths)
    assert split(paths, [], []) == (paths, [])
    assert split(paths[::-1], [], ["samples/*"])[1] == [path for path in paths[::-1] if path.stem in "036"]


def test_the_shipped_configs_hold_out_two_pieces_and_a_third_of_the_samples():
    roots = [MUSIC / "music", MUSIC / "samples"]
    if not all(root.is_dir() for root in roots):
        pytest.skip("the music is not on this machine")
    for name in ("wavelet-stereo-2x", "wavelet-stereo-5x", "wavelet-stereo-20x"):
        data = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]["init_args"]
        music, samples = (split(find_sounds(root), data["held_out"], data["every_third"]) for root in roots)
        assert len(music[1]) == 2 and {path.name.split("_")[0] for path in music[1]} == {
            "Hungarian",
            "admiralbob77",
        }
        assert samples[1] == find_sounds(roots[1])[::3]


def test_a_folder_without_sounds(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(MediaError, match="no sound found"):
        find_sounds(tmp_path)


# --------------------------------------------------------------------------------------------------------- crops


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 90)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_crops_are_cut_from_one_sound(sizes, channels, crop, seed):
    sounds, first = [], 1
    for count, length in sizes:
        sounds.append(ramp(count, length, first))
        first += count * length
    batch = next(iter(SoundCrops(sounds, 5, crop, channels, CPU, seed, variation=PLAIN)))
    assert batch.shape == (5, channels, 1, crop) and batch.dtype == torch.float32
    for item in integers(batch):
        (sound,) = [s for s in sounds if s[0, 0] <= item[0].max() <= s[0, -1]]
        expected = with_channels(sound, channels).astype(np.int64)
        length = sound.shape[1]
        place = np.flatnonzero(item[0])[0]
        start = item[0, place] - sound[0, 0]
        if length >= crop:
            assert np.array_equal(item, expected[:, start : start + crop])
        elif (item[0] == 0).any():
            assert start == 0 and np.array_equal(item[:, place : place + length], expected)
            assert not item[:, :place].any() and not item[:, place + length :].any()
        else:
            assert np.array_equal(item, expected[:, (start + np.arange(crop)) % length])


def test_crops_follow_from_their_seed():
    sounds = [ramp(2, 1000), ramp(1, 50)]
    first, again, other = (next(iter(SoundCrops(sounds, 4, 64, 2, CPU, seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_sounds_come_in_proportion_to_length_and_weight():
    sounds = [np.full((1, length), value, np.int16) for length, value in ((100, 1), (300, 2), (100, 3))]
    batch = next(iter(SoundCrops(sounds, 8000, 10, 1, CPU, 0, [1.0, 1.0, 6.0], PLAIN)))
    seen = Counter(integers(batch)[:, 0, 0].tolist())
    for value, share in ((1, 0.1), (2, 0.3), (3, 0.6)):
        assert seen[value] / 8000 == pytest.approx(share, abs=0.025)
    with pytest.raises(MediaError, match="no sound is left"):
        SoundCrops([], 1, 1, 1, CPU, 0)


def test_short_sounds_are_padded_and_repeated():
    batch = integers(next(iter(SoundCrops([ramp(1, 30)], 400, 90, 1, CPU, 0, variation=PLAIN))))[:, 0]
    padded = (batch == 0).any(1)
    assert padded.mean() == pytest.approx(0.5, abs=0.1)
    places = {int(np.flatnonzero(item)[0]) for item in batch[padded]}
    assert min(places) < 5 and max(places) > 55


def test_gain_and_order_of_channels_and_balance_vary():
    level = 1000
    sound = np.stack([np.full(64, level), np.full(64, 2 * level)]).astype(np.int16)
    varied = Variation(gain=(-18.0, 6.0), mixing=0.0)
    crops = next(iter(SoundCrops([sound], 2000, 32, 2, CPU, 0, variation=varied)))[:, :, 0, 0] * 32768
    swapped = crops[:, 0].abs() > crops[:, 1].abs()
    assert swapped.float().mean() == pytest.approx(0.5, abs=0.05)
    assert (crops[:, 0] < 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(crops[:, 0] < 0, crops[:, 1] < 0)
    gain = 20 * torch.log10(crops.abs().amin(1) / level)
    torch.testing.assert_close(crops.abs().amax(1), 2 * crops.abs().amin(1))
    histogram = torch.histc(gain, 6, -18, 6)
    assert gain.min() > -18.01 and gain.max() < 6.01 and histogram.min() > 0.7 * 2000 / 6
    mono = next(iter(SoundCrops([sound[:1]], 2000, 32, 2, CPU, 0, variation=varied)))[:, :, 0, 0]
    ratio = mono.abs().amin(1) / mono.abs().amax(1)
    assert (ratio > 0.999).float().mean() == pytest.approx(0.5, abs=0.05) and ratio.min() < 0.3


def test_crops_are_mixed_and_never_beyond_full_scale():
    sounds = [np.full((1, 64), 3, np.int16), np.full((1, 64), 2000, np.int16)]
    mixed = Variation(gain=(0.0, 0.0), mixing=0.3, spatial=False)
    crops = integers(next(iter(SoundCrops(sounds, 4000, 8, 1, CPU, 0, variation=mixed))))[:, 0, 0]
    assert set(crops.tolist()) == {3, 6, 2000, 2003, 4000}
    assert np.isin(crops, [6, 2003, 4000]).mean() == pytest.approx(0.3, abs=0.03)
    generator = np.random.default_rng(0)
    loud = [generator.integers(-32768, 32768, (2, 500)).astype(np.int16) for _ in range(3)]
    batch = next(iter(SoundCrops(loud, 200, 128, 2, CPU, 0, variation=Variation(gain=(-6, 12)))))
    peaks = batch.abs().amax((1, 2, 3))
    assert float(peaks.max()) <= 1 and (peaks > 0.999).float().mean() > 0.4


# ---------------------------------------------------------------------------------------------------- the folder


@given(st.integers(0, 2**31), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_sixteen_bits_are_kept(seed, channels):
    wanted = np.random.default_rng(seed).integers(-32768, 32768, (channels, 50)).astype(np.int16)
    assert np.array_equal(as_int16(Sound((wanted / 32768).astype(np.float32), RATE)), wanted)


def test_a_sound_beyond_full_scale_keeps_its_shape():
    samples = np.array([[0.5, -2.0, 1.0]], np.float32)
    assert as_int16(Sound(samples, RATE)).tolist() == [[8192, -32768, 16384]]


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25])
def test_speed_changes_pitch_and_length(speed):
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)[None].astype(np.float32)
    played = stretched(Sound(tone, 8000), speed)
    assert played.rate == 8000 and played.length == pytest.approx(8000 / speed, rel=0.01)
    pitch = np.abs(np.fft.rfft(played.samples[0])).argmax() * 8000 / played.length
    assert pitch == pytest.approx(440 * speed, rel=0.01)


def test_a_folder_keeps_its_held_out_sounds_apart(folders):
    data = folder_of(folders, held_out=["piece_1*"], every_third=["samples/*"], copies=2)
    assert len(data._train) == 3 * (4 - 1 + 6 - 2)
    whole = read_sound(Path(folders[0]) / "piece_0.flac").samples
    assert np.array_equal(data._train[0], as_int16(Sound(whole, RATE)))
    for copy in data._train[1:3]:
        assert 0.79 < whole.shape[1] / copy.shape[1] < 1.26 and copy.shape[1] != whole.shape[1]
    piece = read_sound(Path(folders[0]) / "piece_1.flac").samples
    loops = [read_sound(Path(folders[1]) / f"loop_{i}.wav") for i in (0, 3)]
    lengths = [-(-loop.length * RATE // loop.rate) for loop in loops]
    (item,) = data.val_dataloader()
    assert item.shape == (1, 2, 1, piece.shape[1] + sum(lengths)) and item.dtype == torch.float32
    torch.testing.assert_close(item[0, :, 0, : piece.shape[1]], torch.from_numpy(piece), atol=2e-5, rtol=0)
    tail = item[0, :, 0, piece.shape[1] :]
    assert torch.equal(tail[0], tail[1])
    last = torch.from_numpy(loops[1].samples[0])
    torch.testing.assert_close(tail[0, lengths[0] :], last, atol=2e-5, rtol=0)


def test_excerpts_have_ten_seconds(folders):
    data = folder_of(folders, held_out=["*.wav"], copies=0, rate=1000)
    total = sum(sound.shape[1] for sound in data._held_out)
    data._held_out *= 25_000 // total + 1
    items = list(data.val_dataloader())
    assert len(items) == 25 * sum(sound.shape[1] for sound in data._held_out) // 250_000
    assert {tuple(item.shape) for item in items} == {(1, 2, 1, 10_000)}
    assert len(folder_of(folders).val_dataloader()) == 0


def test_shares_weigh_folders_whatever_their_length(folders):
    data = folder_of(folders, shares=[1.0, 3.0])
    crops = data.train_dataloader().dataset
    lengths = np.array([sound.shape[1] for sound in data._train])
    pieces = 3 * 4
    assert lengths[:pieces].sum() > 5 * lengths[pieces:].sum()
    assert float(crops.share[:pieces].sum()) == pytest.approx(0.25)
    within = crops.share[:pieces].numpy() / lengths[:pieces]
    np.testing.assert_allclose(within, within[0])
    with pytest.raises(UsageError, match="3 shares for 2 folders"):
        SoundFolder(folders, shares=[1, 2, 3])


def test_a_resumed_run_sees_other_crops(folders):
    data = folder_of(folders)
    first = next(iter(data.train_dataloader()))

    class FakeTrainer:
        global_step = 0
        global_rank = 0

        class strategy:  # noqa: N801 (as Lightning names it)
            root_device = CPU

    data.trainer = FakeTrainer()
    assert torch.equal(next(iter(data.train_dataloader())), first)
    FakeTrainer.global_step = 100
    assert not torch.equal(next(iter(data.train_dataloader())), first)


# ------------------------------------------------------------------------------------------------------ the loss


def small(**arguments: Any) -> WaveletAudioCodec:
    torch.manual_seed(0)
    return WaveletAudioCodec(**(SMALL["wavelet-audio"] | {"levels": 4} | arguments))


def test_the_loss_of_sounds_is_its_formula(monkeypatch):
    codec = small(lambda_range=[0.01, 1.0])
    module = RateDistortion(codec)
    x = 0.3 * torch.randn(3, 2, 1, 1024, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    seen: list[torch.Tensor] = []
    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda x, q: (seen.append(q), evaluate(x, q))[1])
    torch.manual_seed(5)
    loss, shown = module.loss(x)
    torch.manual_seed(5)
    torch.randint(0, 97, (3,))
    output = codec.bottleneck(codec.transform.analysis(x, seen[0]), seen[0])
    mse = (codec.transform.synthesis(output.y_hat, seen[0]) - x).square().mean((1, 2, 3))
    lambdas = 0.01 * 100 ** ((seen[0] / 32 - 1) / 3)
    expected = ((lambdas / 0.1) ** -0.5 * (output.bits / 1024 + lambdas * 255**2 * mse)).mean()
    torch.testing.assert_close(shown[0], expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss, expected + output.losses["auxiliary"], rtol=1e-3, atol=0)
    assert shown[1].item() == pytest.approx(float(output.bits.mean()) / 1024, rel=1e-3)
    loss.backward()
    assert not [name for name, p in codec.named_parameters() if p.grad is None]


@pytest.mark.parametrize(("rate", "unit", "factor"), [(44100, "kbps", 44.1), (None, "bits", 1.0)])
def test_rates_of_sounds_have_their_unit(rate, unit, factor, monkeypatch):
    codec = small(rate=rate)
    module = RateDistortion(codec).eval()
    assert rate_unit(codec) == (unit, pytest.approx(factor))
    logged: dict[str, float] = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    x = torch.from_numpy(stereo(np.random.default_rng(3)))[None, :, None, :1001]
    module.validation_step(x, 0)
    padded = torch.cat([x, x[..., -1:].expand(1, 2, 1, -1001 % 32)], 3)
    quality = torch.tensor([2 * QUALITY_STEPS])
    output = codec.bottleneck(codec.transform.analysis(padded, quality), quality)
    error = codec.transform.synthesis(output.y_hat, quality)[..., :1001].clamp(-1, 1) - x
    assert float(logged[f"val/{unit}_2"]) == pytest.approx(factor * float(output.bits) / 1001, rel=1e-4)
    assert float(logged["val/psnr_2"]) == pytest.approx(float(-10 * error.square().mean().log10()), abs=1e-2)
    module.validation_step(torch.zeros(1, 2, 1, 500), 0)
    assert all(np.isfinite(float(value)) for value in logged.values())


# ----------------------------------------------------------------------------------------------------- the whole


def fit(folder: Path, roots: list[str], data: dict[str, Any], codec: dict[str, Any]) -> Path:
    """Runs `compand train fit` on a shipped config, made small by a second one; returns where checkpoints lie."""
    small_data = {"roots": roots, "shares": None, "batch_size": 8} | data
    small_codec = SMALL["wavelet-audio"] | {"lambda_range": [0.0001, 0.5]} | codec
    model = {"lr": 0.01, "warmup_steps": 5, "compile_transform": False, "codec": {"init_args": small_codec}}
    changes = folder / "changes.yaml"
    changes.write_text(yaml.safe_dump({"model": {"init_args": model}, "data": {"init_args": small_data}}))
    cli.main(
        [
            "fit", "--config", str(CONFIGS / "wavelet-stereo-5x.yaml"), "--config", str(changes),
            f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.default_root_dir={folder}",
            "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.precision=32-true",
            "--trainer.max_steps=70", "--trainer.val_check_interval=70", "--trainer.log_every_n_steps=5",
        ]
    )  # fmt: skip
    return folder / "wavelet-stereo-5x" / "version_0" / "checkpoints"


def metrics(checkpoints: Path, name: str) -> list[float]:
    with open(checkpoints.parent / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory) -> Path:
    """The checkpoints of a short run that held out a piece and two loops."""
    data = {"held_out": ["piece_1*"], "rate": RATE, "crop": 2048}
    return fit(tmp_path_factory.mktemp("run"), folders, data, {"rate": RATE})


def test_training_on_sounds_lowers_the_loss(run):
    losses = metrics(run, "loss")
    assert len(losses) == 14 and np.mean(losses[-4:]) < 0.8 * np.mean(losses[:3])
    (low,), (high,) = metrics(run, "val/kbps_1"), metrics(run, "val/kbps_8")
    (worse,), (better,) = metrics(run, "val/psnr_1"), metrics(run, "val/psnr_8")
    assert 0 < low < high < 1000 and 10 < worse < better


def test_an_export_counts_what_the_run_did_not_hold_out(run, folders, tmp_path, monkeypatch):
    counted: list[Path] = []
    real = export.sound_latents

    def spy(codec: Any, path: Path, *rest: Any) -> Any:
        counted.append(path)
        return real(codec, path, *rest)

    monkeypatch.setattr(export, "sound_latents", spy)
    folder = tmp_path / "wavelet-audio-v3"
    arguments = [str(run / "final.ckpt"), "-o", str(folder), "--data", *folders, "--files", "3"]
    export.main([*arguments, "--device=cpu"])
    assert [path.stem for path in counted] == ["piece_0", "piece_2", "piece_3", "loop_1", "loop_4"]
    codec = compand.load(folder, device="cpu")
    sound = read_sound(Path(folders[0]) / "piece_1.flac")
    decoded = codec.decode(data := codec.encode(sound, quality=6))
    assert decoded.samples.shape == sound.samples.shape and decoded.rate == RATE
    error = np.mean((decoded.samples - sound.samples) ** 2)
    assert error < 0.2 * np.mean(sound.samples**2) and len(data) < sound.samples.size


def test_symbols_of_sounds_are_counted_as_they_are_coded(trained, folders, monkeypatch):
    monkeypatch.setattr(export, "PART", 1500)
    monkeypatch.setattr(export, "EXCERPT", 512)
    codec = trained("wavelet-audio", steps=3)
    codec.bottleneck.freeze()
    seen: list[list[tuple[np.ndarray, np.ndarray]]] = []
    levels: list[int] = []
    count = codec.bottleneck.count

    def spy(y: torch.Tensor, quality: int) -> Any:
        levels.append(quality)
        seen.append(count(y, quality))
        return seen[-1]

    monkeypatch.setattr(codec.bottleneck, "count", spy)
    path = find_sounds(folders[1])[1]
    totals = export.count_symbols(codec, [path])
    parts = -(-read_sound(path).length * 44100 // RATE // 1500)
    assert len(seen) == parts * codec.levels and len(set(levels)) == codec.levels
    for i, total in enumerate(totals):
        indexes = np.concatenate([push[i][0] for push in seen])
        symbols = np.concatenate([push[i][1] for push in seen])
        for table in range(len(total)):
            values, counts = np.unique(symbols[indexes == table], return_counts=True)
            assert total[table] == dict(zip(values.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize(("name", "calls"), [("codebook-audio", 1), ("wavelet-audio", 3)])
def test_sounds_are_analysed_at_each_quality_only_where_it_matters(
    trained, folders, monkeypatch, name, calls
):
    codec = trained(name, steps=1)
    sound = find_sounds(folders[1])[1]
    qualities = [32, 64, 32 * codec.levels]
    analyse, made = codec.analyse, []

    def spy(samples: np.ndarray, quality: int) -> torch.Tensor:
        made.append((analyse(samples, quality), quality))
        return made[-1][0]

    monkeypatch.setattr(codec, "analyse", spy)
    with torch.inference_mode():
        found = list(export.sound_latents(codec, sound, qualities, np.random.default_rng(0)))
        assert len(made) == calls and [quality for _, quality in found] == qualities
        sample = analyse(read_sound(sound).samples[:, :2048], qualities[0])
        other = analyse(read_sound(sound).samples[:, :2048], qualities[-1])
    assert torch.equal(sample, other) == (calls == 1)
    assert all(torch.equal(y, made[min(i, calls - 1)][0]) for i, (y, _) in enumerate(found))


def test_a_codec_of_sensor_signals_is_trained_and_used(tmp_path):
    """Six channels at 100 Hz, each a mixture of the same three oscillations: neither sound nor picture."""
    generator = np.random.default_rng(0)
    time = np.arange(6000) / 100
    (tmp_path / "signals").mkdir()
    mixture = generator.standard_normal((6, 3))
    for i in range(6):
        frequency, phase = generator.uniform(0.2, 3, (3, 1)), generator.uniform(0, 6, (3, 1))
        signal = 0.1 * mixture @ np.sin(2 * np.pi * frequency * time + phase)
        Sound(signal.clip(-1, 1).astype(np.float32), 100).save(tmp_path / "signals" / f"{i}.wav")
    data = {"channels": 6, "rate": None, "spatial": False, "mixing": 0.0, "gain": [-6, 0], "copies": 0}
    data |= {"crop": 512, "held_out": ["5.wav"]}
    checkpoints = fit(tmp_path, [str(tmp_path / "signals")], data, {"channels": 6, "rate": None})
    losses = metrics(checkpoints, "loss")
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:3]) and metrics(checkpoints, "val/bits_8")
    folder = tmp_path / "wavelet-audio-v1"
    signals = str(tmp_path / "signals")
    export.main([str(checkpoints / "final.ckpt"), "-o", str(folder), "--data", signals, "--device=cpu"])
    codec = compand.load(folder, device="cpu")
    held_out = read_sound(tmp_path / "signals" / "5.wav")
    data = codec.encode(held_out, quality=8)
    decoded = codec.decode(data)
    assert decoded.samples.shape == (6, 6000) and decoded.rate == 100
    error = np.mean((decoded.samples - held_out.samples) ** 2)
    assert error < 0.1 * np.mean(held_out.samples**2) and len(data) < held_out.samples.size
    assert codec.latents(data).shape[0] == SMALL["wavelet-audio"]["latent_channels"]
