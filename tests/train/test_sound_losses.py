"""Distances of sounds and their discriminators."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compand.errors import UsageError
from compand.train.instruments import note
from compand.train.sound_discriminators import MultiPeriodDiscriminator, SpectralDiscriminator
from compand.train.sound_losses import SoundDistance, Spectrum

RATE = 16000


def sounds(batch: int = 2, channels: int = 1, length: int = 8000) -> torch.Tensor:
    generator = np.random.default_rng(0)
    waves = np.stack([note(generator)[:length] for _ in range(batch * channels)])
    return 0.5 * torch.from_numpy(waves).view(batch, channels, 1, length)


@pytest.mark.parametrize("size", [64, 512, 2048])
def test_a_sine_has_its_amplitude(size):
    place = torch.arange(4 * size)
    sine = 0.3 * torch.sin(2 * math.pi * 8 * place / size)
    magnitudes = Spectrum(size)(sine)
    assert magnitudes.shape == (size // 2 + 1, 17)
    assert magnitudes[8, 4:-4].allclose(torch.tensor(0.3), rtol=1e-3)


@pytest.mark.parametrize("channels", [1, 2])
def test_equal_sounds_have_no_distance_and_noise_adds_to_it(channels):
    torch.manual_seed(0)
    distance, x = SoundDistance(RATE), sounds(channels=channels)
    same = distance(x, x)
    assert set(same) == set(SoundDistance.names)
    assert all(value.ndim == 0 and float(value) < 1e-5 for value in same.values())
    noise = torch.randn_like(x)
    found = [distance(x + level * noise, x) for level in (0.001, 0.01, 0.1)]
    for name in SoundDistance.names:
        values = [float(terms[name]) for terms in found]
        assert 0 < values[0] < values[1] < values[2]


def test_polarity_is_seen_by_the_waveform_alone():
    x = sounds()
    terms = SoundDistance(RATE)(-x, x)
    assert terms["mel"] < 1e-5 and terms["stft"] < 1e-5 and terms["waveform"] > 0.01


def test_stereo_that_becomes_mono_is_noticed():
    left = sounds()
    x, x_hat = torch.cat([left, -left], 1), torch.cat([left, left], 1)
    assert SoundDistance(RATE)(x_hat, x)["mel"] > 0.5


@pytest.mark.parametrize("loud", [False, True])
def test_gradients_are_finite_beside_silence(loud):
    torch.manual_seed(0)
    silence, sound = torch.zeros(1, 1, 1, 4096), sounds(1, length=4096)
    for original, decoded in ((silence, silence), (silence, sound), (sound, silence)):
        x_hat = (decoded + loud * 0.1 * torch.randn_like(decoded)).requires_grad_()
        terms = SoundDistance(RATE)(x_hat, original)
        sum(terms.values()).backward()
        assert all(value.isfinite() for value in terms.values()) and x_hat.grad.isfinite().all()


def test_windows_that_do_not_do_are_refused():
    for windows in ((32, 512), (64, 128)):
        with pytest.raises(UsageError, match="windows"):
            SoundDistance(RATE, windows)


def test_every_mel_band_has_a_bin():
    for rate in (16000, 44100):
        distance = SoundDistance(rate)
        for window in distance.windows:
            assert (distance.get_buffer(f"bank_{window}").sum(0) > 0).all()


def judges(channels: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [
        MultiPeriodDiscriminator((2, 3, 7), (4, 8, 8)),
        SpectralDiscriminator(channels, (512, 256), 8, (1, 2)),
    ]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("index", [0, 1])
def test_each_item_is_judged_by_itself(index, channels):
    judge, x = judges(channels)[index], sounds(3, channels, 4001)
    logits, features = judge(x)
    assert len(logits) == len(judge.judges) and len(features) > len(logits)
    for both, one in zip(
        [*logits, *features], [each for part in judge(x[1:2]) for each in part], strict=True
    ):
        share = len(both) // 3
        assert len(both) == 3 * share and torch.allclose(both[share : 2 * share], one, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_a_discriminator_learns_what_noise_is(index):
    judge, x = judges(1)[index], sounds(4, length=4096)
    noisy = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(judge.parameters(), 3e-3)

    def margin() -> torch.Tensor:
        real, fake = (judge(each)[0] for each in (x, noisy))
        return torch.stack([a.mean() - b.mean() for a, b in zip(real, fake, strict=True)]).mean()

    before = float(margin().detach())
    for _ in range(30):
        optimizer.zero_grad()
        (-margin()).backward()
        optimizer.step()
    assert float(margin().detach()) > before + 0.2
