"""Learning from latents: the network, the training on packed sets, and the comparison of inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import compand
from compand.cli import main as compand_main
from compand.errors import UsageError
from compand.eval.benchmarks import latent_learning
from compand.eval.benchmarks.latent_learning import GridInputs, Run, Settings, fewer, shuffled, statistics
from compand.sounds import Sound
from compand.train import cli
from compand.train.images import read_rgb
from compand.train.latent_tasks import (
    Fold,
    GridClassifier,
    ItemLevel,
    LatentClassification,
    Quantiser,
    strided_stem,
)

CONFIGS = Path(__file__).parents[2] / "train" / "configs" / "latents"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, china, flower) -> Path:
    """Two classes: pieces of one photograph each."""
    root = tmp_path_factory.mktemp("imagenette")
    generator = np.random.default_rng(0)
    for name, photograph in (("church", china), ("garbage_truck", flower)):
        pixels = read_rgb(photograph)
        for split, count in (("train", 6), ("val", 3)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                top, left = generator.integers(0, 427 - 112), generator.integers(0, 640 - 112)
                Image.fromarray(pixels[top : top + 112, left : left + 112]).save(
                    root / split / name / f"{i}.png"
                )
    return root


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Two words: tones of two pitches."""
    root = tmp_path_factory.mktemp("keywords")
    for word, pitch in (("alexa", 300), ("computer", 900)):
        for split, count in (("train", 3), ("val", 2)):
            (root / split / word).mkdir(parents=True)
            for i in range(count):
                time = np.arange(20000) / 16000
                tone = 0.1 * np.sin(2 * np.pi * pitch * (1 + 0.05 * i) * time)
                Sound(tone[None].astype(np.float32), 16000).save(root / split / word / f"{i}.flac")
    return root


@pytest.fixture(scope="module")
def quantiser():
    return Quantiser(compand.load("wavelet-rgb-16x", device="cpu").requires_grad_(False), 3)


# ------------------------------------------------------------------------------------------------------- network


def test_one_network_serves_pictures_and_sounds():
    network = GridClassifier(nn.Identity(), 12, 10, widths=(8, 16), blocks=(1, 2)).eval()
    assert network(torch.randn(2, 12, 28, 28)).shape == (2, 10)
    sounds = GridClassifier(nn.Identity(), 27, 6, axes=1, widths=(8, 16), blocks=(1, 1)).eval()
    assert sounds(torch.randn(2, 27, 1, 552)).shape == (2, 6)


def test_fold_keeps_every_sample_in_its_block():
    x = torch.arange(2 * 3 * 4 * 8.0).view(2, 3, 4, 8)
    assert torch.equal(Fold(2, 2)(x), F.pixel_unshuffle(x, 2))
    assert torch.equal(Fold(1, 4)(x[:, :1, :1])[0, :, 0, 1], x[0, 0, 0, 4:8])


def test_item_level_takes_loudness_out_and_leaves_silence():
    x = torch.randn(2, 3, 1, 50)
    assert torch.allclose(ItemLevel()(x), ItemLevel()(7 * x), atol=1e-5)
    assert not ItemLevel()(torch.zeros(1, 3, 1, 5)).any()


@pytest.mark.parametrize(("axes", "strides", "shape"), [(2, [2, 2, 2], (64, 64)), (1, [4, 4, 6], (1, 960))])
def test_strided_stem_comes_to_the_grid_of_the_latents(axes, strides, shape):
    stem = strided_stem(3, [4, 6, 8], strides, axes)
    step = int(np.prod(strides))
    grid = (shape[0] // step if axes == 2 else 1, shape[1] // step)
    assert stem(torch.randn(1, 3, *shape)).shape == (1, 8, *grid)


# -------------------------------------------------------------------------------------------------------- codecs


def test_quantiser_makes_what_a_packed_set_holds(quantiser, scenery):
    pixels = scenery[:64, :96]
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    integers = quantiser.integers(x)
    stored = quantiser.codec.quantise(pixels, quality=3)
    # From other samples of the same values, some are rounded the other way.
    assert np.abs(integers[0].numpy() - stored).max() <= 1
    assert (integers[0].numpy() != stored).mean() < 0.01
    expected = quantiser.codec.dequantise(integers[0].int(), quality=3)
    assert torch.equal(quantiser.latents(integers)[0], expected)


def test_preview_returns_to_nearly_the_same_latents(quantiser, scenery):
    x = torch.from_numpy(scenery[200:392, :320].copy()).permute(2, 0, 1)[None].float() / 255
    latents = quantiser.latents(quantiser.integers(x))
    again = quantiser.latents(quantiser.integers(quantiser.preview(latents)))
    assert F.mse_loss(again, latents) < 0.05 * latents.square().mean()
    # Mirrored there, they are near those of the mirrored picture, and the mirrored grid is not.
    mirrored = quantiser.latents(quantiser.integers(x.flip(3)))
    through = quantiser.latents(quantiser.integers(quantiser.preview(latents).flip(3)))
    assert F.mse_loss(through, mirrored) < 0.5 * F.mse_loss(latents.flip(3), mirrored)
    assert F.mse_loss(quantiser.decoded(latents), x) < F.mse_loss(quantiser.preview(latents), x)


# ------------------------------------------------------------------------------------------ training on packed sets


def packed(root: Path, target: Path, codec: str, quality: str) -> Path:
    for split in ("train", "val"):
        arguments = ["pack", str(root / split), str(target / split), "--codec", codec, "--quality", quality]
        with pytest.raises(SystemExit) as ended:
            compand_main([*arguments, "--device", "cpu"])
        assert not ended.value.code
    return target


@pytest.fixture(scope="module")
def packed_pair(pair, tmp_path_factory) -> Path:
    return packed(pair, tmp_path_factory.mktemp("packed"), "wavelet-rgb-16x", "3")


@pytest.mark.parametrize(
    ("field", "expand"),
    [("latents", None), ("latents", "fixed"), ("latents", "learned"), ("tokens", None), ("samples", None)],
)
def test_config_trains_on_a_packed_set(packed_pair, field, expand, tmp_path):
    small = {
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.precision": 32,
        "trainer.check_val_every_n_epoch": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.logger.init_args.save_dir": tmp_path,
        "trainer.callbacks": "null",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_checkpointing": "false",
        "model.train_set": packed_pair / "train",
        "model.field": field,
        "model.expand": expand or "null",
        "model.widths": "[8,16]",
        "model.blocks": "[1,1]",
        "data.train": packed_pair / "train",
        "data.val": packed_pair / "val",
        "data.fields": f"[{field}]",
        "data.batch_size": 6,
        "data.num_workers": 0,
    }
    options = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    cli.main(["fit", "--config", str(CONFIGS / "imagenette.yaml"), *options])
    (metrics,) = tmp_path.rglob("metrics.csv")
    lines = metrics.read_text().splitlines()
    assert "val/accuracy" in lines[0] and len(lines) >= 3


def test_expanded_latents_meet_the_layers_for_samples(packed_pair):
    module = LatentClassification(str(packed_pair / "train"), widths=(8,), blocks=(1,), expand="learned")
    latents = module._on_device().latents(torch.randint(-3, 4, (4, 12, 14, 14)))
    x, _ = module.varied(module._grid({"latents": latents}), torch.tensor([0, 1, 1, 0]))
    assert x.shape == (4, 12, 11, 11) and module.network(x).shape == (4, 2)
    expansion = module.network.stem[0]
    inside = (..., slice(40, -40), slice(40, -40))
    assert torch.allclose(expansion(latents)[inside], module._on_device().preview(latents)[inside], atol=0.03)
    with pytest.raises(UsageError, match="tokens are not expanded: choose field latents"):
        LatentClassification(str(packed_pair / "train"), "tokens", expand="learned")


def test_fixed_previews_are_what_is_varied_and_what_is_read(packed_pair, monkeypatch):
    module = LatentClassification(str(packed_pair / "train"), widths=(8,), blocks=(1,), expand="fixed")
    # Nothing is coded again, and no network of the codec runs.
    monkeypatch.setattr(module, "_on_device", None)
    monkeypatch.setattr(type(module._coder.codec.transform), "synthesis", None)
    latents = torch.randn(4, 12, 14, 14)
    x, y = module.varied(latents, torch.tensor([0, 1, 1, 0]))
    assert x.shape == (4, 3, 88, 88) and x.min() >= 0 and x.max() <= 1 and y.shape == (4, 2)
    module.loss(x, y).backward()
    learned = {name for name, p in module.named_parameters() if p.grad is not None}
    assert learned == {name for name, _ in module.named_parameters() if name.startswith("network.")}
    module.vary = False
    assert torch.equal(module.varied(latents, torch.tensor([0, 1, 1, 0]))[0], module.preview(latents))
    # Validation reads the same previews: a class that they alone show is found.
    module.network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    logged = []
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.append(float(value)))
    labels = module.preview(latents).mean((2, 3)).argmax(1)
    module.validation_step({"latents": latents, "label": labels}, 0)
    assert logged == [1.0]
    with pytest.raises(UsageError, match="tokens are not expanded"):
        LatentClassification(str(packed_pair / "train"), "tokens", expand="fixed")


@pytest.mark.parametrize("field", ["latents", "tokens"])
def test_varied_batches_stay_in_the_field(packed_pair, field):
    module = LatentClassification(str(packed_pair / "train"), field, (8,), (1,))
    integers = torch.randint(-3, 4, (4, 12, 14, 14))
    inputs = integers if field == "tokens" else module._on_device().latents(integers)
    x, y = module.varied(inputs, torch.tensor([0, 1, 1, 0]))
    assert x.shape == (4, 12, 11, 11) and y.shape == (4, 2)
    assert torch.allclose(y.sum(1), torch.ones(4))
    assert (x.dtype == torch.int16) == (field == "tokens")
    with pytest.raises(UsageError, match="not square"):
        module.varied(inputs[..., :8], torch.tensor([0, 1, 1, 0]))
    module.vary = False
    assert module.varied(inputs, torch.tensor([0, 1, 1, 0]))[0] is inputs


def test_sounds_are_varied_through_the_codec(words, tmp_path):
    folder = packed(words, tmp_path, "wavelet-stereo-20x", "5") / "train"
    module = LatentClassification(str(folder), widths=(8,), blocks=(1,))
    reader = compand.data.PackedReader(folder)
    coder = compand.data.RowCodec(reader.info)
    shape = reader.info.latent_shape(reader.row(0))
    latents = torch.from_numpy(coder.latents(reader.payload(0), shape))[None, :, None]
    x, _ = module.varied(latents.expand(2, -1, -1, -1), torch.tensor([0, 1]))
    assert x.shape == (2, *latents.shape[1:])
    assert not torch.equal(x[0], x[1])
    ratio = x.square().mean((1, 2, 3)) / latents.square().mean()
    assert ratio.min() > 0.3 and ratio.max() < 3
    with pytest.raises(UsageError, match="several lengths"):
        LatentClassification(str(folder), "samples")


# ----------------------------------------------------------------------------------------------- the comparison


def test_every_item_comes_once_before_any_comes_again():
    chosen = shuffled(10, 4, 0, CPU)
    seen = torch.cat([next(chosen) for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))


def test_statistics_in_parts():
    x = torch.randn(150, 3, 4, 5) * torch.tensor([1.0, 2, 3]).view(3, 1, 1) + 1
    mean, deviation = statistics(x)
    assert torch.allclose(mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(deviation, x.std((0, 2, 3), correction=0), atol=1e-4)


def test_fewer_samples_keep_a_tone():
    time = torch.arange(1600) / 1600
    tone = torch.sin(2 * torch.pi * 20 * time)[None]
    expected = torch.sin(2 * torch.pi * 20 * torch.arange(480) / 480)[None]
    assert torch.allclose(fewer(tone, 480), expected, atol=1e-4)


def grid_inputs(unit: int = 1) -> GridInputs:
    """Two classes that a mean tells apart; views hold their item's number."""
    targets = torch.arange(40) % 2
    items = torch.randn(40, 3, 14 * unit, 14 * unit) + 2 * targets.view(-1, 1, 1, 1)
    return GridInputs(
        torch.stack([items, items.flip(3)]), targets, items, targets, lambda: (nn.Identity(), 3), unit
    )


def test_grid_inputs_move_by_whole_positions_alone(monkeypatch):
    monkeypatch.setattr(latent_learning.augmentation, "mix", lambda x, y, *_: (x, y))
    inputs = grid_inputs(2)
    inputs.views = torch.arange(28.0).expand(2, 40, 3, 28, 28).clone()
    x, y = next(inputs.batches(64, 0))
    assert x.shape == (64, 3, 22, 22) and torch.allclose(y.sum(1), torch.ones(64))
    untouched = x[(x.diff(dim=3) == 1).all(3).all(2).all(1)]
    assert len(untouched) and (untouched[..., 0] % 2 == 0).all()


def test_the_update_is_that_of_sgd():
    settings = Settings("", 3, 20, 8, 0.1, 5e-4, (4, 8), (1, 1), 0.0)
    torch.manual_seed(0)
    run = Run(grid_inputs(), settings, 0)
    twin = Run(grid_inputs(), settings, 0).network
    weights = list(twin.parameters())
    sgd = torch.optim.SGD(
        [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in weights if p.ndim <= 1]},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    run._rate.fill_(0.1)
    run.network.train()
    for _ in range(3):
        x, y = torch.randn(8, 3, 11, 11), F.one_hot(torch.arange(8), 10).float()
        run._update(x, y)
        sgd.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        sgd.step()
    for ours, theirs in zip(run.network.parameters(), weights, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_run_learns_and_is_reproducible_but_for_the_seed():
    settings = Settings("", 3, 48, 16, 0.1, 5e-4, (8, 8), (1, 1), 0.0)

    def outcome(seed: int) -> tuple[np.ndarray, float]:
        torch.manual_seed(0)
        run = Run(grid_inputs(), settings, seed)
        while not run.done:
            run.advance()
        assert run.step == 48 and run.loss is not None
        return run.correct(run.inputs.tests["as stored"]), float(run.loss.detach())

    right, loss = outcome(0)
    assert right.mean() > 0.9
    assert outcome(0)[1] == loss != outcome(1)[1]


@pytest.mark.parametrize("seeds", [1, 2])
def test_pictures_are_compared(pair, seeds, tmp_path, capsys):
    output = tmp_path / "learning.json"
    names = ["full", "decoded", "latents", "tokens", "reduced", "latents-grid", "reduced-grid"]
    names += ["latents-expanded", "latents-previewed", "reduced-expanded"]
    names = names if seeds == 1 else ["latents", "reduced"]
    options = ["--edge", "112", "--steps", "1", "--batch", "4", "--widths", "8", "16", "--devices", "cpu"]
    latent_learning.main(
        ["--images", str(pair), *options, "--seeds", str(seeds), "--inputs", *names, "-o", str(output)]
    )
    results = json.loads(output.read_text())["results"]
    rows = results["summary"]["imagenette"]
    assert set(names) <= set(rows)
    assert rows["latents"]["values"] == rows["reduced"]["values"] == 12 * 14 * 14
    assert rows["latents"]["parameters"] == rows["reduced"]["parameters"]
    if "full" in names:
        # Latents are what is stored and read; the fixed convolution has no weight that is learned.
        assert rows["latents-previewed"]["values"] == rows["latents"]["values"]
        assert rows["latents-previewed"]["parameters"] == rows["full"]["parameters"]
        assert rows["latents-expanded"]["parameters"] > rows["full"]["parameters"]
    assert set(rows["latents"]["against"]) == ({"reduced", "full"} if "full" in names else {"reduced"})
    assert len(results["runs"]) == seeds * len(names)
    assert all(len(run["outcomes"]["as stored"]) == 6 for run in results["runs"])
    again = tmp_path / "again.json"
    latent_learning.main(["--tables-of", str(output), "-o", str(again)])
    assert json.loads(again.read_text()) == json.loads(output.read_text())
    assert "minus reduced" in capsys.readouterr().out


def test_sounds_are_compared(words, tmp_path):
    output = tmp_path / "learning.json"
    options = ["--sound-steps", "1", "--sound-batch", "2", "--sound-widths", "8", "16", "--seeds", "1"]
    latent_learning.main(["--keywords", str(words), *options, "--devices", "cpu", "-o", str(output)])
    rows = json.loads(output.read_text())["results"]["summary"]["keywords"]
    assert set(rows) == {"full", "latents", "tokens", "logmel", "reduced"}
    assert rows["latents"]["values"] == rows["reduced"]["values"] == 27 * 552
    assert rows["full"]["values"] == 51200


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(UsageError, match="nothing to learn from"):
        latent_learning.main(["-o", str(tmp_path / "none.json")])
