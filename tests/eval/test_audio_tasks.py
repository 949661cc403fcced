"""The tasks on sound and their networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from compand.errors import CompandError, MediaError, UsageError
from compand.eval.items import find_items
from compand.eval.perception.models import load_model, save_model
from compand.eval.perception.networks.audio import Separator, SoundClassifier, loudest
from compand.eval.perception.tasks.digits import Digits
from compand.eval.perception.tasks.keywords import Keywords
from compand.eval.perception.tasks.separation import (
    MIXTURES,
    RATE,
    SECONDS,
    TEST_FAMILIES,
    VALIDATION_FAMILIES,
    Events,
    Samples,
    Separation,
    draw,
    family,
    find_samples,
    mix,
    part_of,
    play,
    read_samples,
    si_sdr,
    source_of,
    split,
)
from compand.sounds import Sound

AUDIO = Path(__file__).parents[2].parent / "shared" / "data" / "audio"
SMALL_SEPARATOR: dict[str, Any] = {"window": 512, "hop": 128, "widths": [8, 12], "bottom": [1]}


def tone(frequency: float, seconds: float = 0.5, rate: int = 16000) -> Sound:
    time = np.arange(round(seconds * rate)) / rate
    return Sound((0.5 * np.sin(2 * np.pi * frequency * time))[None].astype(np.float32), rate)


def small_classifier(**changes: Any) -> SoundClassifier:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"classes": 6, "seconds": 1.0, "bands": 32, "widths": [8, 16]}
    return SoundClassifier(**(arguments | changes)).eval().requires_grad_(False)


def answering(answer: Any) -> Any:
    """A task model that gives one answer whatever it is shown; a function is asked for it."""
    return type(
        "Model", (), {"name": "fixed", "__call__": lambda self, x: answer(x) if callable(answer) else answer}
    )()


@pytest.fixture(scope="module")
def samples_folder(tmp_path_factory) -> Path:
    """Decaying noises that are named as drums and decaying tones that are named as melody."""
    root = tmp_path_factory.mktemp("samples")
    generator = np.random.default_rng(0)
    decay = np.exp(-np.arange(22050) / 4000)
    for index, name in enumerate(
        ("bd_a", "bd_boom", "hat_gem", "sn_zome", "drum_tom_mid_soft", "drum_tom_mid_hard", "loop_x1")
    ):
        noise = np.cumsum(generator.standard_normal(22050)) if index % 2 else generator.standard_normal(22050)
        Sound((noise * decay / np.abs(noise).max())[None].astype(np.float32), RATE).save(root / f"{name}.wav")
    for index, name in enumerate(
        ("ambi_choir", "bass_a", "bass_hard_c", "bass_hit_c", "elec_chime", "elec_bell", "elec_bell2")
    ):
        sound = tone(110 * 1.4**index, 0.8, RATE)
        stereo = np.repeat(sound.samples, 2, 0) * np.exp(-np.arange(sound.length) / 20000)
        Sound(stereo.astype(np.float32), RATE).save(root / f"{name}.wav")
    tone(440).save(root / "vinyl_a.wav")
    return root


# ------------------------------------------------------------------------------------------- words and digits


def test_words_are_the_folders_of_the_recordings(tmp_path):
    for part in ("train", "val"):
        for word in ("alexa", "view glass", "stranger"):
            (tmp_path / part / word).mkdir(parents=True)
            tone(300).save(tmp_path / part / word / "007.wav")
    items = Keywords(tmp_path).items()
    assert [(item.name, item.target) for item in items] == [("alexa/007.wav", 0), ("view glass/007.wav", 5)]
    assert (
        items[0].item.path == tmp_path / "val" / "alexa" / "007.wav" and items[0].item.name == items[0].name
    )
    assert Keywords(tmp_path / "train").items()[1].item.path.parent.parent == tmp_path / "train"
    with pytest.raises(MediaError, match="no recordings in folders named alexa"):
        Keywords(tmp_path / "val" / "stranger").items()


def test_digits_are_in_the_names_of_the_recordings(tmp_path):
    for name in ("3_ann_0", "0_ann_12", "34_ann_0", "notes"):
        tone(300).save(tmp_path / f"{name}.wav")
    assert [(item.name, item.target) for item in Digits(tmp_path).items()] == [
        ("0_ann_12.wav", 0),
        ("3_ann_0.wav", 3),
    ]
    (tmp_path / "val").mkdir()
    with pytest.raises(CompandError):
        Digits(tmp_path).items()
    tone(300).save(tmp_path / "val" / "other.wav")
    with pytest.raises(MediaError, match="DIGIT_SPEAKER_TAKE"):
        Digits(tmp_path).items()


def test_a_digit_is_right_by_logits_or_by_transcript(tmp_path):
    for name in ("0_ann_0", "7_ann_0"):
        tone(300).save(tmp_path / f"{name}.wav")
    task = Digits(tmp_path)
    zero, seven = task.items()
    decoded = task.load(seven)
    assert task.outcome(answering(np.eye(10)[7]), decoded, seven) == [1.0, 1.0]
    assert task.outcome(answering(np.eye(10)[7]), decoded, zero) == [0.0, 1.0]
    said = {"Seven.": 1.0, "7": 1.0, "seven eight": 0.0, "": 0.0}
    assert {text: task.outcome(answering(text), decoded, seven)[0] for text in said} == said
    assert task.outcome(answering("oh"), decoded, zero) == [1.0, 1.0]
    assert task.score(np.array([[3.0, 4.0], [4.0, 4.0]])).tolist() == [0.75, 1.0]


# ------------------------------------------------------------------------------------------------ classifier


def test_the_loudest_part_is_looked_at():
    waveform = torch.zeros(100)
    waveform[60:70] = 1
    assert torch.equal(loudest(waveform, 10), torch.ones(10))
    assert loudest(torch.ones(3), 8).tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert torch.equal(loudest(waveform, 100), waveform)


def test_a_classifier_takes_any_sound():
    network = small_classifier()
    reference = network.predict(tone(500))
    assert reference.shape == (6,) and reference.dtype == np.float32 and np.isfinite(reference).all()
    stereo = Sound(np.repeat(tone(500).samples, 2, 0), 16000)
    np.testing.assert_allclose(network.predict(stereo), reference, atol=1e-4)
    np.testing.assert_allclose(network.predict(tone(500, rate=44100)), reference, atol=0.05)
    for sound in (
        Sound(np.ones((1, 1), np.float32), 8000),
        tone(500, 5.0),
        Sound(np.zeros((1, 99), np.float32), 16000),
    ):
        assert np.isfinite(network.predict(sound)).all()
    with pytest.raises(MediaError, match="no samples"):
        network.predict(Sound(np.zeros((1, 0), np.float32), 16000))


def test_neither_loudness_nor_silence_behind_a_word_shows():
    network = small_classifier()
    word = torch.zeros(1, 16000)
    word[0, 4000:12000] = torch.from_numpy(tone(500).samples[0])
    features = network.features(word)
    torch.testing.assert_close(network.features(0.01 * word), features, atol=1e-4, rtol=0)
    hiss = word + 2e-4 * torch.randn(word.shape, generator=torch.Generator().manual_seed(0))
    assert (network.features(hiss) - features).abs().max() < 0.1
    loud = word + 0.1 * torch.randn(word.shape, generator=torch.Generator().manual_seed(0))
    assert (network.features(loud) - features).abs().max() > 1
    assert torch.isclose(
        features.min(), torch.tensor(np.log(network.FLOOR) / 3, dtype=torch.float32), atol=0.05
    )


@pytest.mark.parametrize(
    "network", [small_classifier(), Separator(**SMALL_SEPARATOR).eval().requires_grad_(False)]
)
def test_a_saved_network_answers_as_before(network, tmp_path):
    info = save_model(network, tmp_path / "model-v3", task="some", labels=("a", "b"))
    model = load_model(info)
    signal = tone(500, rate=network.rate)
    with torch.inference_mode():
        np.testing.assert_allclose(model(signal), network.predict(signal), atol=5e-3)
    assert model.kind == network.kind and info.architecture == network.architecture and info.size < 1e6


def test_default_networks_are_small():
    sizes = [sum(p.numel() for p in network.parameters()) for network in (SoundClassifier(6), Separator())]
    assert 0.3e6 < sizes[0] < 1.5e6 and 0.3e6 < sizes[1] < 2e6


# ------------------------------------------------------------------------------------------------- separator


@pytest.mark.parametrize("length", [1, 100, 512, 5001])
def test_sources_sum_up_to_the_mixture(length):
    torch.manual_seed(0)
    network = Separator(**SMALL_SEPARATOR).eval().requires_grad_(False)
    samples = np.random.default_rng(length).uniform(-1, 1, (1, length)).astype(np.float32)
    sources = network.predict(Sound(samples, RATE))
    assert sources.shape == (2, length) and sources.dtype == np.float32
    np.testing.assert_allclose(sources.sum(0), samples[0], atol=1e-5)
    assert length < 512 or np.abs(sources[0]).max() > 0.01
    louder = network.predict(Sound(0.1 * samples, RATE))
    np.testing.assert_allclose(louder, 0.1 * sources, atol=1e-4)


def test_silence_separates_into_silence():
    sources = (
        Separator(**SMALL_SEPARATOR)
        .eval()
        .requires_grad_(False)
        .predict(Sound(np.zeros((1, 3000), np.float32), RATE))
    )
    assert np.abs(sources).max() == 0


# ------------------------------------------------------------------------------------------------- mixtures


def test_takes_of_one_instrument_stay_on_one_side(samples_folder):
    assert source_of("bd_808") == 0 and source_of("elec_bell2") == 1 and source_of("vinyl_a") is None
    items, _ = find_items(samples_folder, "audio")
    parts = split(items)
    assert sum(map(len, parts.values())) == len(items) - 1
    sides = {name: {family(item.path.stem) for item in part} for name, part in parts.items()}
    assert sides == {
        "train": {"bd_a", "loop_x", "ambi_choir", "bass_a", "elec_bell"},
        "validation": {"hat_gem", "bass_hard_c"},
        "test": {"bd_boom", "sn_zome", "drum_tom_mid", "bass_hit_c", "elec_chime"},
    }
    for name, part in parts.items():
        assert find_samples(samples_folder, name) == part
        assert {source_of(item.path.stem) for item in part} == {0, 1}


def test_other_files_of_a_folder_move_no_sample_to_another_part(samples_folder):
    items, _ = find_items(samples_folder, "audio")
    assert not TEST_FAMILIES & VALIDATION_FAMILIES
    for parts in (split(items[::2]), split(items[1::2])):
        for name, part in parts.items():
            assert {part_of(item.path.stem) for item in part} <= {name}
            assert all(item in split(items)[name] for item in part)


def test_a_folder_without_one_source_is_refused(tmp_path):
    for name in ("bd_a", "bd_boom", "bass_a"):
        tone(200).save(tmp_path / f"{name}.wav")
    with pytest.raises(MediaError, match="too few samples of melody"):
        Separation(tmp_path).items()
    Sound(np.zeros((1, 50), np.float32), RATE).save(tmp_path / "bass_a.wav")
    with pytest.raises(MediaError, match="silent"):
        read_samples(find_items(tmp_path, "audio")[0])


def test_events_play_samples_at_their_speed():
    ramp = torch.arange(1, 101, dtype=torch.float32)
    samples = Samples(
        torch.stack([torch.cat([ramp, torch.zeros(20)])]), torch.tensor([100]), (np.zeros(1, int),), ("a",)
    )

    def played(
        onset: float, speed: float, gain: float = 1.0, seconds: float = 9.0, length: int = 130
    ) -> torch.Tensor:
        values = (np.array([[value]]) for value in (onset / RATE, speed, gain, seconds))
        return play(samples, Events(np.zeros((1, 1), np.int64), *values), length)[0]

    as_it_is = played(10, 1)
    torch.testing.assert_close(as_it_is[10:109], ramp[:-1], atol=1e-3, rtol=0)
    assert not as_it_is[:10].any() and not as_it_is[110:].any()
    torch.testing.assert_close(played(0, 2, 0.5)[:49], 0.5 * ramp[:98:2], atol=1e-3, rtol=0)
    torch.testing.assert_close(played(0, 0.5)[1:21:2], ramp[:10] + 0.5, atol=1e-3, rtol=0)
    damped = played(0, 1, seconds=50 / RATE)
    assert damped[49] < 0.2 and not damped[50:].any() and damped[10] < ramp[10]


def test_mixtures_follow_from_the_seed(samples_folder):
    samples = read_samples(find_samples(samples_folder, "train"))
    first, again, other = (draw(np.random.default_rng(seed), samples, 5) for seed in (1, 1, 2))
    for source in range(2):
        assert all(np.array_equal(a, b) for a, b in zip(first[source], again[source], strict=True))
        assert not np.array_equal(first[source].onset, other[source].onset)
        assert set(first[source].sample.ravel()) <= set(samples.pools[source])
        assert (first[source].onset[:, 0] == 0).all() and (first[source].speed > 0.3).all()
    melody = first[1]
    np.testing.assert_allclose(melody.onset[:, 1:], (melody.onset + melody.seconds)[:, :-1])


def test_sources_are_balanced():
    sources = torch.randn(3, 2, 4000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[[5.0], [0.1]]]
    )
    balance = torch.tensor([-5.0, 0.0, 7.0])
    mixed = mix(sources, balance)
    power = mixed.square().mean(2)
    torch.testing.assert_close(10 * torch.log10(power[:, 0] / power[:, 1]), balance, atol=1e-3, rtol=0)
    torch.testing.assert_close(mixed.sum(1).abs().amax(1), torch.full((3,), 0.7))


def test_si_sdr_agrees_with_torchmetrics():
    generator = np.random.default_rng(0)
    reference = generator.standard_normal(4000).astype(np.float32)
    for noise in (0.01, 0.3, 3.0):
        estimate = (0.4 * reference + noise * generator.standard_normal(4000)).astype(np.float32)
        expected = scale_invariant_signal_distortion_ratio(
            torch.from_numpy(estimate), torch.from_numpy(reference), zero_mean=False
        )
        assert si_sdr(estimate, reference) == pytest.approx(float(expected), abs=0.01)
        assert si_sdr(7 * estimate, reference) == pytest.approx(si_sdr(estimate, reference), abs=1e-4)
    assert si_sdr(np.zeros_like(reference), reference) == -30
    assert si_sdr(reference, reference) >= 100


def test_separation_scores_by_what_is_gained_over_the_mixture(samples_folder):
    task = Separation(samples_folder)
    items = task.items()
    assert len(items) == MIXTURES == len({item.name for item in items})
    item = items[3]
    truth, mixture = task.sources(item), task.load(item)
    assert mixture.rate == RATE and mixture.channels == 1 and mixture.length == round(SECONDS * RATE)
    np.testing.assert_allclose(truth.sum(0), mixture.samples[0], atol=1e-6)
    assert not np.array_equal(truth, task.sources(items[4]))
    assert np.array_equal(truth, Separation(samples_folder).sources(Separation(samples_folder).items()[3]))

    unchanged = task.outcome(answering(lambda x: np.repeat(x.samples, 2, 0)), mixture, item)
    assert unchanged == [pytest.approx(0, abs=1e-6), 1.0]
    assert task.outcome(answering(truth), mixture, item)[0] > 50
    assert task.outcome(answering(truth[::-1]), mixture, item)[0] < -5
    nearly = truth + 0.05 * np.random.default_rng(0).standard_normal(truth.shape).astype(np.float32)
    assert 0 < task.outcome(answering(nearly), mixture, item)[0] < 50
    with pytest.raises(UsageError, match="drums and melody"):
        task.outcome(answering(truth[:1]), mixture, item)
    assert task.score(np.array([[30.0, 4.0]])).tolist() == [7.5]


def test_stored_results_are_bound_to_the_samples(samples_folder, tmp_path, monkeypatch):
    for path in samples_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    task, copied = Separation(samples_folder), Separation(tmp_path)
    hashes = [task.content_hash(item) for item in task.items()]
    assert len(set(hashes)) == MIXTURES
    items = copied.items()
    assert [copied.content_hash(item) for item in items] == hashes
    monkeypatch.setattr(Separation, "version", Separation.version + 1)  # drawn in another way
    redrawn = Separation(tmp_path)
    assert not set(hashes) & {redrawn.content_hash(item) for item in items}
    monkeypatch.undo()
    victim = find_samples(tmp_path, "test")[0].path
    tone(1234, 0.3, RATE).save(victim)
    changed = Separation(tmp_path)
    assert changed.content_hash(changed.items()[0]) != hashes[0]


def test_real_recordings_are_found():
    if not AUDIO.is_dir():
        pytest.skip("the recordings are not on this machine")
    keywords, digits = Keywords(AUDIO / "keywords").items(), Digits(AUDIO / "digits").items()
    assert len(keywords) == 210 and {item.target for item in keywords} == set(range(6))
    assert len(digits) == 250 and all(int(item.name[0]) == item.target for item in digits)
    parts = [find_samples(AUDIO / "samples", part) for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [67, 12, 27]
