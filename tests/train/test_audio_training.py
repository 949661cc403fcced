"""Training of the reference models for sound on synthetic sounds."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from compand.errors import CheckpointError, MediaError, UsageError
from compand.eval.perception.models import load_model
from compand.eval.perception.networks.audio import Separator, SoundClassifier
from compand.eval.perception.tasks import separation
from compand.eval.perception.tasks.digits import Digits
from compand.eval.perception.tasks.separation import (
    RATE,
    SECONDS,
    Separation,
    find_samples,
    read_samples,
    si_sdr,
)
from compand.sounds import Sound, read_sound
from compand.train import audio_tasks, cli
from compand.train.audio_tasks import (
    MixtureDataset,
    Mixtures,
    SourceSeparation,
    UtteranceDataset,
    Utterances,
    equalised,
    masked,
    noisy,
    uniform,
    warped,
    with_instruments,
)
from compand.train.instruments import drum, note

CONFIGS = Path(__file__).parents[2] / "train" / "configs"


def beep(
    frequency: float,
    seconds: float,
    rate: int,
    generator: np.random.Generator,
    octaves: float = 0,
    rough: bool = False,
) -> Sound:
    """A decaying tone that glides by a number of octaves, of many harmonics where it is rough."""
    time = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(frequency * 2 ** (octaves * (time / seconds - 0.5))) / rate
    wave = 0.4 * (np.tanh(9 * np.sin(phase / 4)) if rough else np.sin(phase)) * np.exp(-2 * time)
    return Sound((wave + 1e-3 * generator.standard_normal(len(time)))[None].astype(np.float32), rate)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """ "Digits" of three "speakers": beeps whose pitch is the digit's, twice as many takes to train on as to test."""
    root = tmp_path_factory.mktemp("spoken")
    generator = np.random.default_rng(0)
    for part, takes in (("val", range(1)), ("train", range(1, 3))):
        (root / part).mkdir()
        for digit in range(10):
            for index, speaker in enumerate(("ann", "bob", "eve")):
                for take in takes:
                    pitch, glide = 800 * (1 + 0.1 * index), 1.5 * (digit % 5 - 2)
                    sound = beep(pitch, generator.uniform(0.5, 0.6), 8000, generator, glide, digit >= 5)
                    sound.save(root / part / f"{digit}_{speaker}_{take}.wav")
    return root


@pytest.fixture(scope="module")
def samples_folder(tmp_path_factory) -> Path:
    """Short noises that are named as drums and long tones that are named as melody."""
    root = tmp_path_factory.mktemp("samples")
    generator = np.random.default_rng(0)
    for name in ("bd_a", "bd_b", "hat_gem", "sn_zome"):
        noise = generator.standard_normal(8000) * np.exp(-np.arange(8000) / 1000)
        Sound((noise / 5)[None].astype(np.float32), RATE).save(root / f"{name}.wav")
    for index, name in enumerate(("ambi_choir", "bass_a", "bass_hard_c", "bass_hit_c")):
        beep(220 * 1.3**index, 1.5, RATE, generator).save(root / f"{name}.wav")
    return root


@pytest.fixture
def short_mixtures(monkeypatch):
    """Four test mixtures of 0.4 s in place of a hundred of three seconds."""
    monkeypatch.setattr(separation, "MIXTURES", 4)
    monkeypatch.setattr(separation, "SECONDS", 0.4)
    monkeypatch.setattr(audio_tasks, "SECONDS", 0.4)


def fit(config: str, root: Path, folder: Path, *arguments: str) -> Path:
    """Runs `compand train fit` on a shipped config in a folder; returns the reference model's folder."""
    output = folder / f"{config}-v1"
    cli.main(
        [
            "fit", "--config", str(CONFIGS / f"{config}.yaml"), f"--data.root={root}", f"--model.output={output}",
            f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.default_root_dir={folder}",
            "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", *arguments,
        ]
    )  # fmt: skip
    return output


def logged(folder: Path, name: str, column: str) -> list[float]:
    (path,) = (folder / name).glob("version_*/metrics.csv")
    with open(path, newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


SMALL_CLASSIFIER = (
    "--model.network.init_args.widths=[8,16,32]", "--model.network.init_args.hop=160", "--data.batch_size=32",
    "--trainer.log_every_n_steps=10",
)  # fmt: skip
SMALL_SEPARATOR = (
    "--model.network.init_args.widths=[8,12]", "--model.network.init_args.bottom=[1]",
    "--model.network.init_args.window=1024", "--data.batch_size=2", "--data.validation=2",
    "--data.synthetic=4", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- variations


def pitch_of(waveform: torch.Tensor, rate: int) -> float:
    return float(torch.fft.rfft(waveform).abs().argmax()) * rate / len(waveform)


def test_speed_and_shift_warp_a_waveform():
    sound = torch.from_numpy(beep(400, 1.0, 8000, np.random.default_rng(0)).samples)
    one, none = torch.ones(1, 1), torch.zeros(1, 1)
    torch.testing.assert_close(warped(sound, one, none), sound)
    later = warped(sound, one, none + 100)
    torch.testing.assert_close(later[0, 100:], sound[0, :-100])
    assert not later[0, :100].any()
    assert pitch_of(warped(sound, 1.25 * one, none)[0], 8000) == pytest.approx(500, abs=3)


def test_a_random_filter_and_noise_do_what_they_say():
    generator = torch.Generator().manual_seed(0)
    sound = torch.randn(4, 4000, generator=generator)
    torch.testing.assert_close(equalised(sound, 0.0, generator), sound, atol=1e-5, rtol=0)
    gain = (torch.fft.rfft(equalised(sound, 6.0, generator)).abs() / torch.fft.rfft(sound).abs()).log10() * 20
    assert 2 < gain.std() < 10 and (gain[:, 100] - gain[:, 101]).abs().max() < 1
    ratio = torch.tensor([[0.0], [10.0], [20.0], [40.0]])
    added = noisy(sound, ratio, generator) - sound
    found = 10 * torch.log10(sound.square().mean(1) / added.square().mean(1))
    torch.testing.assert_close(found[:, None], ratio, atol=0.2, rtol=0)
    drawn = uniform(generator, 1000, 3, 5)
    assert drawn.shape == (1000, 1) and 3 <= drawn.min() < 3.1 and 4.9 < drawn.max() <= 5


@pytest.mark.parametrize("axis", [2, 3])
def test_stripes_are_masked_by_the_mean(axis):
    features = torch.rand(64, 1, 20, 30, generator=torch.Generator().manual_seed(0)) + 1
    torch.manual_seed(0)
    changed = masked(features, axis, 0.5, 1)
    touched = changed != features
    whole = touched.any(5 - axis).sum(2) == touched.all(5 - axis).sum(2)
    assert whole.all() and 0.1 < touched.float().mean() < 0.4
    torch.testing.assert_close(changed[0][touched[0]], features[0].mean().expand(int(touched[0].sum())))


# ----------------------------------------------------------------------------------------------- utterances


def test_every_utterance_comes_once_a_round_with_its_label():
    waveforms = torch.stack([torch.sin(2 * np.pi * (i + 4) / 32 * torch.arange(512.0)) for i in range(8)])
    dataset = UtteranceDataset(waveforms, torch.arange(8), 8, 8, 1.0, seed=3)
    batches = iter(dataset)
    inputs, targets = next(batches)
    assert inputs.shape == (8, 512) and torch.allclose(targets.sum(1), torch.ones(8))
    assert (targets[::2].amax(1) == 1).all() and ((targets[1::2] > 0) & (targets[1::2] < 1)).any()
    assert sorted(targets.argmax(1).tolist()) == list(range(8)) == sorted(next(batches)[1].argmax(1).tolist())
    for wave, label in zip(inputs[::2], targets[::2].argmax(1), strict=True):
        assert pitch_of(wave, 32) == pytest.approx(int(label) + 4, abs=0.6)
    again = next(iter(UtteranceDataset(waveforms, torch.arange(8), 8, 8, 1.0, seed=3)))
    assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)


def test_a_classifier_learns_and_is_written(spoken, tmp_path):
    folder = fit(
        "digits", spoken, tmp_path, *SMALL_CLASSIFIER, "--trainer.max_steps=60", "--trainer.val_check_interval=60",
        "--model.warmup_steps=10", "--model.lr=0.01",
    )  # fmt: skip
    losses = logged(tmp_path, "digits", "loss")
    assert losses[-1] < 0.75 * losses[0] and len(losses) == 6
    model = load_model(folder)
    task = Digits(spoken)
    right = [task.outcome(model, task.load(item), item)[0] for item in task.items()]
    assert len(right) == 30 and np.mean(right) >= 0.8
    assert model.info.labels == task.labels and model.trained_on is None
    assert f"{np.mean(right):.4f}" in (folder / "CARD.md").read_text()
    assert logged(tmp_path, "digits", "val/accuracy")[0] == pytest.approx(np.mean(right), abs=0.07)
    with pytest.raises(CheckpointError, match="exists already"):
        fit("digits", spoken, tmp_path, *SMALL_CLASSIFIER, "--trainer.max_steps=1")


def test_a_time_limit_ends_the_training(spoken, tmp_path):
    folder = fit("digits", spoken, tmp_path, *SMALL_CLASSIFIER, "--model.minutes=0.02")
    assert 0 < int((folder / "CARD.md").read_text().split("training: ")[1].split(" steps")[0]) < 1000


def test_a_speaker_is_held_out(spoken, tmp_path, monkeypatch):
    seen: list[int] = []
    real = UtteranceDataset.__init__

    def spy(self: Any, waveforms: torch.Tensor, *rest: Any) -> None:
        seen.append(len(waveforms))
        real(self, waveforms, *rest)

    monkeypatch.setattr(UtteranceDataset, "__init__", spy)
    short = (*SMALL_CLASSIFIER, "--trainer.max_steps=1", "--trainer.val_check_interval=1")
    fit("digits", spoken, tmp_path, *short, "--data.held_out_speaker=bob")
    assert seen == [60]  # two speakers, three takes, ten digits
    # The score is that on all thirty takes of the third speaker, none of which was trained on.
    model, task = load_model(tmp_path / "digits-v1"), Digits(spoken)
    items = [
        item
        for part in ("train", "val")
        for item in Digits.labelled(spoken / part)
        if "_bob_" in item.item.path.name
    ]
    score = np.mean([task.outcome(model, task.load(item), item)[0] for item in items])
    card = (tmp_path / "digits-v1" / "CARD.md").read_text()
    assert len(items) == 30
    assert (
        f"accuracy on the 30 undamaged takes of speaker bob, who was held out of training: {score:.4f}"
        in card
    )
    with pytest.raises(UsageError, match="known are ann, bob, eve"):
        fit("digits", spoken, tmp_path / "other", *short, "--data.held_out_speaker=mallory")


def test_a_classifier_can_learn_from_decoded_recordings(spoken, tmp_path, monkeypatch):
    asked: list[Any] = []

    def decoded(paths: Sequence[Path], *rest: Any) -> list[Sound]:
        asked.append((len(paths), *rest))
        return [read_sound(path) for path in paths]

    monkeypatch.setattr(audio_tasks, "decoded_items", decoded)
    folder = fit(
        "digits", spoken, tmp_path, *SMALL_CLASSIFIER, "--trainer.max_steps=1", "--data.codec=opus", "--data.quality=6"
    )  # fmt: skip
    assert asked == [(60, "audio", "opus", 6.0)]
    assert load_model(folder).trained_on == {"codec": "opus", "quality": 6.0}


def test_wrong_arguments_are_refused(spoken, tmp_path):
    with pytest.raises(UsageError, match="keywords or digits"):
        Utterances(str(spoken), "imagenette")
    with pytest.raises(UsageError, match="belong together"):
        Utterances(str(spoken), "digits", codec="mp3")
    with pytest.raises(UsageError, match="belong together"):
        Mixtures(str(spoken), quality=3)
    with pytest.raises(MediaError, match="no folder train"):
        Utterances(str(tmp_path), "digits").setup()


# ------------------------------------------------------------------------------------------------ mixtures


def test_mixtures_are_made_of_training_samples(samples_folder):
    samples = read_samples(find_samples(samples_folder, "train"))
    assert set(samples.names) == {"bd_a", "bd_b", "ambi_choir", "bass_a"}
    mixtures, sources = next(iter(MixtureDataset(samples, 3, seed=1)))
    assert mixtures.shape == (3, round(SECONDS * RATE)) and sources.shape == (3, 2, mixtures.shape[1])
    torch.testing.assert_close(mixtures, sources.sum(1))
    assert (sources.abs().amax(2) > 0.01).all()
    again, other = (next(iter(MixtureDataset(samples, 3, seed=seed)))[0] for seed in (1, 2))
    assert torch.equal(again, mixtures) and not torch.equal(other, mixtures)


@pytest.mark.parametrize("instrument", [drum, note])
def test_synthetic_instruments_sound(instrument):
    waves = [instrument(np.random.default_rng(seed)) for seed in range(20)]
    for seed, wave in enumerate(waves):
        assert wave.dtype == np.float32 and np.isfinite(wave).all() and np.abs(wave).max() == pytest.approx(1)
        assert np.abs(wave[0]) < 0.1  # no click
        assert np.array_equal(wave, instrument(np.random.default_rng(seed)))
    # What tells the two apart: the ear hears a pitch where the energy lies in few lines of the spectrum.
    lines = [np.sort(np.abs(np.fft.rfft(wave)) ** 2)[::-1] for wave in waves]
    share = np.median([energy[:300].sum() / energy.sum() for energy in lines])
    assert share > 0.95 if instrument is note else share < 0.95


def test_synthetic_samples_are_half_of_what_is_played(samples_folder):
    real = read_samples(find_samples(samples_folder, "train"))
    samples = with_instruments(real, 12, seed=3)
    assert samples.names[: len(real.names)] == real.names and len(samples.names) == len(real.names) + 24
    assert samples.waveforms.shape == (len(samples.names), real.waveforms.shape[1])
    for source, pool in enumerate(samples.pools):
        synthetic = pool >= len(real.names)
        assert synthetic.mean() == 0.5 and set(pool[~synthetic]) == set(real.pools[source])
        assert len(set(pool[synthetic])) == 12
    assert not set(samples.pools[0]) & set(samples.pools[1])


def test_a_separator_learns_and_is_written(samples_folder, short_mixtures, tmp_path):
    folder = fit(
        "separation", samples_folder, tmp_path, *SMALL_SEPARATOR, "--trainer.max_steps=50", "--data.batch_size=4",
        "--trainer.val_check_interval=50", "--model.warmup_steps=4", "--model.lr=0.01", "--trainer.callbacks=null",
    )  # fmt: skip
    losses = logged(tmp_path, "separation", "loss")
    assert len(losses) == 50 and np.mean(losses[-10:]) < np.mean(losses[:3]) - 2
    model = load_model(folder)
    task = Separation(samples_folder)
    gained = [task.outcome(model, task.load(item), item)[0] for item in task.items()]
    assert len(gained) == 4 and np.mean(gained) > 2 and model.kind == "separator"
    assert logged(tmp_path, "separation", "val/improvement")[0] > 2


def test_a_separator_is_watched_on_mixtures_that_are_neither_trained_nor_tested_on(
    samples_folder, short_mixtures, monkeypatch
):
    read: list[set[str]] = []
    real = read_samples

    def spy(items: Any) -> Any:
        samples = real(items)
        read.append(set(samples.names))
        return samples

    monkeypatch.setattr(audio_tasks, "read_samples", spy)
    watched = [batch[0].numpy() for batch in Mixtures(str(samples_folder), validation=3).val_dataloader()]
    assert read == [{"hat_gem", "bass_hard_c"}]
    assert len(watched) == 3 and watched[0].shape == (2, round(0.4 * RATE))
    task = Separation(samples_folder)
    tested = [task.sources(item) for item in task.items()]
    assert not any(np.array_equal(one, other) for one in watched for other in tested)
    assert not np.array_equal(watched[0], watched[1])


def test_a_perfect_separation_has_the_least_loss():
    sources = torch.randn(2, 2, 4000, generator=torch.Generator().manual_seed(0))
    module = SourceSeparation(Separator(), "unused")

    def loss(estimates: torch.Tensor) -> float:
        module.network.forward = lambda mixture: estimates  # type: ignore[method-assign]
        return float(module.loss(sources.sum(1), sources))

    assert loss(sources) == pytest.approx(-30, abs=0.1) == loss(0.2 * sources)
    noise = torch.randn(sources.shape, generator=torch.Generator().manual_seed(1))
    expected = -np.mean(
        [
            si_sdr(e, s)
            for e, s in zip(
                (sources + noise).numpy().reshape(4, -1), sources.numpy().reshape(4, -1), strict=True
            )
        ]
    )
    assert loss(sources + noise) == pytest.approx(expected, abs=0.05)


def test_a_separator_can_learn_from_decoded_mixtures(samples_folder, short_mixtures, tmp_path, monkeypatch):
    kept: list[Sound] = []

    def decoded(paths: Sequence[Path], *rest: Any) -> list[Sound]:
        kept.extend(read_sound(path) for path in paths)
        assert rest == ("audio", "mp3", 8.0)
        return [Sound(0.5 * sound.samples, sound.rate) for sound in kept]

    monkeypatch.setattr(audio_tasks, "decoded_items", decoded)
    folder = fit(
        "separation", samples_folder, tmp_path, *SMALL_SEPARATOR, "--trainer.max_steps=2", "--data.codec=mp3",
        "--data.quality=8", "--data.coded=5", "--trainer.val_check_interval=2",
    )  # fmt: skip
    assert len(kept) == 5 and kept[0].length == round(0.4 * RATE)
    assert load_model(folder).trained_on == {"codec": "mp3", "quality": 8.0}


@pytest.mark.parametrize(("name", "network"), [("keywords", SoundClassifier), ("digits", SoundClassifier)])
def test_shipped_configs_fit_their_task(name, network):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    arguments = config["model"]["init_args"]["network"]["init_args"]
    assert arguments["classes"] == len(audio_tasks.CLASSIFICATIONS[name].labels)
    assert config["model"]["init_args"]["task"] == config["data"]["init_args"]["task"] == name
    assert (
        config["model"]["init_args"]["output"]
        .split("/")[1]
        .startswith(audio_tasks.CLASSIFICATIONS[name].default_model)
    )
    assert sum(p.numel() for p in network(**arguments).parameters()) < 1.5e6
