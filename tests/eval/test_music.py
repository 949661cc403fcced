"""The benchmark on held-out music, on a few seconds of noise and notes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from compand.errors import MediaError
from compand.eval.anchors.audio import ANCHORS
from compand.eval.benchmarks import music
from compand.eval.benchmarks.music import Rival, Trial, Verdict
from compand.sounds import Sound

CONFIGS = Path(__file__).parents[2] / "train" / "configs"


def noise(seconds: float, channels: int = 2, rate: int = 44100, seed: int = 0) -> Sound:
    generator = np.random.default_rng(seed)
    samples = np.cumsum(generator.standard_normal((channels, round(seconds * rate))), axis=1)
    samples -= samples.mean(axis=1, keepdims=True)
    return Sound((0.5 * samples / np.abs(samples).max()).astype(np.float32), rate)


@pytest.fixture
def data(tmp_path):
    """A folder like that of the audio data."""
    folder = tmp_path / "audio"
    for name in ("music", "samples"):
        (folder / name).mkdir(parents=True)
    noise(0.8).save(folder / "music" / "Hungarian_Dance.wav")
    noise(0.7, seed=1).save(folder / "music" / "admiralbob77_-_Drum.wav")
    noise(0.7, seed=2).save(folder / "music" / "seen.wav")
    for i, (channels, rate) in enumerate([(1, 44100), (2, 44100), (2, 44100), (2, 22050)]):
        noise(0.4, channels, rate, seed=i).save(folder / "samples" / f"{i}.wav")
    return folder


@pytest.mark.parametrize("name", music.CODECS)
def test_items_are_what_training_kept_apart(name):
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]["init_args"]
    assert options["held_out"] == list(music.HELD_OUT.values())
    assert options["every_third"] == list(music.EVERY_THIRD.values())


def test_samples_are_joined_as_stereo(data):
    files = music.held_out(data)
    assert [[path.name for path in paths] for paths in files.values()] == [
        ["Hungarian_Dance.wav"],
        ["admiralbob77_-_Drum.wav"],
        ["0.wav", "3.wav"],
    ]
    sound = music.joined(files["samples"])
    assert (sound.channels, sound.rate, sound.length) == (2, 44100, 2 * 17640)
    assert np.array_equal(sound.samples[0, :17640], sound.samples[1, :17640])
    assert not np.array_equal(sound.samples[0, 17640:], sound.samples[1, 17640:])
    (data / "music" / "Hungarian_Dance.wav").unlink()
    with pytest.raises(MediaError, match="Hungarian dance"):
        music.held_out(data)


def test_a_rival_never_gets_fewer_bytes():
    rival = Rival(ANCHORS["opus"](), noise(1.0))
    sizes = {step: len(rival.file(step)) for step in range(0, music.SETTINGS + 1, music.SETTINGS // 16)}
    wanted = (sizes[0] + sizes[music.SETTINGS // 4]) // 2
    setting, data = rival.smallest_from(wanted)
    assert wanted <= len(data) <= min(size for size in sizes.values() if size >= wanted)
    assert len(data) < 1.02 * wanted
    assert len(rival.subject.encode(noise(1.0), setting)) == len(data)
    assert len(rival.smallest_from(1)[1]) == min(sizes.values())
    assert rival.smallest_from(max(sizes.values()) + 1) is None


def trial(codec: str, sdr: float, visqol: float, kbps: float = 12.0) -> Trial:
    scores = {"psnr": sdr + 20, "sdr": sdr, "si_sdr": sdr, "log_mel": 2.0, "visqol": visqol}
    return Trial("waltz", 12.0, "ours-v1", codec, 1.0, 1000, kbps, scores)


@pytest.mark.parametrize(
    ("sdr", "visqol", "kbps", "outcome", "better"),
    [
        (10.0, 3.0, 12.0, "met", "neither"),
        (11.0, 4.0, 12.0, "met", "ours"),
        (8.0, 2.0, 12.0, "missed by 2.0 dB", "Opus"),
        (11.0, 2.0, 9.0, "missed: ends at 9.0 kbps", "Opus"),
    ],
)
def test_verdicts(sdr, visqol, kbps, outcome, better):
    verdict = Verdict(trial("ours-v1", sdr, visqol, kbps), trial("opus", 10.0, 3.0))
    assert (verdict.outcome, verdict.sounds_better) == (outcome, better)
    words = music.conclusion([verdict])
    assert ("rate: 1 of 1" in words) == (outcome == "met")
    assert ("Opus is better in PSNR and SDR: 1 of 1" in words) == (sdr < 10)
    assert ("Opus sounds better by ViSQOL: 1 of 1" in words) == (better == "Opus")


def test_results_hold_every_file_against_opus(checkpoint_of, data, tmp_path, monkeypatch, capsys):
    measure = music.metrics.measure  # ViSQOL takes seconds
    monkeypatch.setattr(music, "SETTINGS", 32)
    monkeypatch.setattr(music, "METRICS", ("psnr", "sdr", "log_mel", "visqol"))
    monkeypatch.setattr(
        music.metrics, "measure", lambda name, x, y: 3.0 if name == "visqol" else measure(name, x, y)
    )
    monkeypatch.setattr(
        music.metrics, "for_medium", lambda medium, names: ([], {})
    )  # it need not be installed
    folder = checkpoint_of("wavelet-audio")
    output = tmp_path / "music.json"
    music.main(["--data", str(data), "--codecs", str(folder), "--kbps", "150", "-o", str(output)])
    results = json.loads(output.read_text())["results"]
    trials = [Trial(**each) for each in results["trials"]]
    ours = {each.item: each for each in trials if each.codec == folder.name}
    assert list(ours) == ["Hungarian dance", "drum and bass", "samples"]
    for each in trials:
        assert each.size >= ours[each.item].size
    assert {each["item"] for each in results["verdicts"]} == set(ours)
    for name, limit in results["unquantised_sdr"][folder.name].items():
        assert limit > ours[name].scores["sdr"]
    assert str(tmp_path) not in output.read_text()
    assert output.with_suffix(".md").read_text().startswith(capsys.readouterr().out.rstrip())
