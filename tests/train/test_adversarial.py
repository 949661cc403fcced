"""Adversarial training of codebook codecs: its losses, its phases, and what it hands to the export."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL
from torch import Tensor, nn

import compand
from compand.errors import UsageError
from compand.hyperprior import HyperpriorCodec
from compand.train import cli, export
from compand.train.adversarial import (
    AdversarialTraining,
    Balancer,
    Discriminator,
    discriminator_loss,
    feature_loss,
    generator_loss,
)
from compand.train.discriminators import PatchDiscriminator
from compand.train.images import find_images
from compand.train.perceptual import FeatureDistance, ImageDistance
from compand.vqgan import VqganCodec

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
WEIGHTS = {"pixel": 1.0, "adversarial": 0.5, "features": 2.0, "commitment": 0.25}


class Pixels(nn.Module):
    """A distance of one term."""

    description = "mean absolute error"

    def forward(self, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
        return {"pixel": (x_hat - x).abs().mean()}


class Judge(Discriminator):
    """One convolution, its output judge and feature alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, 2)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        feature = self.layer(x).tanh()
        return [feature.mean(1, keepdim=True)], [feature]


def small(**arguments) -> VqganCodec:
    torch.manual_seed(0)
    return VqganCodec(**SMALL["vqgan"] | arguments)


def training(codec: VqganCodec | None = None, **arguments) -> AdversarialTraining:
    defaults: dict[str, Any] = {"distance": Pixels(), "discriminators": [Judge()], "weights": WEIGHTS}
    module = AdversarialTraining(codec or small(), **defaults | arguments)
    # What Lightning's does without a trainer, beside scaling.
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    return module


# ------------------------------------------------------------------------------------------------------ losses


def test_losses_are_their_formulas():
    real, fake = [torch.tensor([2.0, 0.5])], [torch.tensor([-3.0, 0.5])]
    assert discriminator_loss(real, fake) == pytest.approx((0 + 0.5) / 2 + (0 + 1.5) / 2)
    assert generator_loss(fake) == pytest.approx((4 + 0.5) / 2)
    assert feature_loss(real, fake) == pytest.approx((5 + 0) / 2 / 1.25)
    two = discriminator_loss([real[0], torch.full((3,), 9.0)], [fake[0], torch.full((3,), -9.0)])
    assert two == pytest.approx(1.0 / 2)
    feature = torch.ones(2, requires_grad=True)
    feature_loss([feature], [torch.zeros(2, requires_grad=True)]).backward()
    assert feature.grad is None


def test_balanced_losses_have_their_shares_whatever_their_scale():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    directions = torch.randn(2, *x.shape)
    balancer = Balancer({"a": 1.0, "b": 3.0, "unused": 7.0}, total=2.0)
    unit = directions / directions.flatten(2).norm(dim=2).mean(1)[:, None, None, None, None]
    expected = 2.0 / (4 * np.sqrt(75)) * (0.25 * unit[0] + 0.75 * unit[1])
    for scale in (1e-6, 1e6):
        balancer = Balancer({"a": 1.0, "b": 3.0, "unused": 7.0}, total=2.0)
        losses = {"a": (directions[0] * x).sum(), "b": scale * (directions[1] * x).sum()}
        torch.testing.assert_close(balancer(losses, x), expected)
    # Of one loss alone, the gradient has the norm of a mean absolute error's.
    alone = Balancer({"a": 1.0})({"a": (directions[0] * x).sum()}, x)
    mean_error = torch.autograd.grad((x - x.detach() + 1).abs().mean(), x)[0]
    assert alone.flatten(1).norm(dim=1).mean() == pytest.approx(
        float(mean_error.flatten(1).norm(dim=1).mean())
    )


def test_norms_are_running_means():
    x, balancer = torch.zeros(1, 4, requires_grad=True), Balancer({"a": 1.0}, decay=0.5)
    for factor in (1.0, 4.0):
        gradient = balancer({"a": factor * x[0, 0]}, x)
    mean = (0.5 * 1 + 4) / (0.5 + 1)
    assert gradient[0, 0] == pytest.approx(4 / mean / np.sqrt(4))
    balancer.eval()
    assert balancer({"a": 4.0 * x[0, 0]}, x)[0, 0] == pytest.approx(4 / mean / np.sqrt(4))


# ------------------------------------------------------------------------------------------------------ a step


def test_gradients_are_those_of_the_whole_loss():
    """The detour over the gradient of the reconstruction gives each part what differentiating its loss gives."""
    module = training(balance=False, clip=1e9, levels=(8, 8)).train()
    codec, judge = module.codec, module.discriminators[0]
    codec.bottleneck.quantiser.eval()  # so that nothing depends on what ran before
    batch = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    module.backward_of(batch, True, True)
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    x, quality = batch.float() / 255, torch.full((3,), 256)
    output = codec.bottleneck(codec.transform.analysis(x, quality), quality)
    x_hat = codec.transform.synthesis(output.y_hat, quality)
    _, (real_feature,) = judge(x)
    (fake,), (fake_feature,) = judge(x_hat)
    loss = (x_hat - x).abs().mean()
    loss = loss + 0.5 * generator_loss([fake]) + 2.0 * feature_loss([real_feature], [fake_feature])
    codec_parameters = {
        name: p for name, p in module.named_parameters() if name.startswith("codec.transform.synthesis")
    }
    expected = dict(
        zip(codec_parameters, torch.autograd.grad(loss, list(codec_parameters.values())), strict=True)
    )
    judged = discriminator_loss([judge(x)[0][0]], [judge(x_hat.detach())[0][0]])
    own = dict(judge.named_parameters())
    judging = torch.autograd.grad(judged, list(own.values()))
    expected |= {f"discriminators.0.{name}": g for name, g in zip(own, judging, strict=True)}
    for name, gradient in expected.items():
        # Float32 sums in another order: what is small beside the largest number of a tensor is known less well.
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_before_quantisation_the_bottleneck_does_not_learn():
    module = training().train()
    module.backward_of(torch.rand(2, 3, 32, 32), False, False)
    learning = {name for name, p in module.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in module.named_parameters() if name.startswith("codec.transform")}


def test_levels_are_drawn_for_each_item(monkeypatch):
    module = training(levels=(2, 5)).train()
    seen: list[int] = []
    forward = module.codec.bottleneck.forward
    monkeypatch.setattr(
        module.codec.bottleneck, "forward", lambda y, q: (seen.extend(q.tolist()), forward(y, q))[1]
    )
    for _ in range(8):
        module.backward_of(torch.rand(6, 3, 16, 16), True, False)
    assert set(seen) == {64, 96, 128, 160}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("phase", [(False, False), (True, False), (True, True)], ids=str)
def test_captured_steps_are_the_plain_ones(phase):
    """The same numbers as long as nothing moves; behind quantisation codes do, by moving averages and restarts."""
    torch.manual_seed(0)
    module = training(discriminators=[PatchDiscriminator((16, 32))], distance=ImageDistance()).cuda().train()
    module.weights["perceptual"] = 1.0
    module.balancer = Balancer(module.weights).cuda()
    batch = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        plain = module.backward_of(batch, *phase)
        names = module._names
        for _ in range(8):
            shown = module.run_step(lambda x: module.backward_of(x, *phase), batch, [], phase)
    assert module._graph is not None and module._names == names
    torch.testing.assert_close(shown, plain, rtol=0.5 if phase[0] else 0.05, atol=0.05)
    learning = {name for name, p in module.named_parameters() if p.grad is not None}
    assert any(name.startswith("codec.transform.analysis") for name in learning)
    assert any(name.startswith("discriminators") for name in learning) == phase[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": (0, 3)}, "levels \\[0, 3\\] do not exist"),
        ({"levels": (1, 9)}, "choose from 1 to 8"),
        ({"train": "codebook"}, "give start_from"),
        ({"train": "prior"}, "give start_from"),
        ({"train": "synthesis"}, "choose all, codebook or prior"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        training(**arguments)
    assert "\n" not in str(error.value)


def test_codecs_without_codebooks_are_refused():
    with pytest.raises(UsageError, match="hyperprior has no codebooks"):
        training(HyperpriorCodec(24, [[8, 12, 1]], 8, [8, 8, 8]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"adversarial": 1.0, "features": 1.0}, "loss pixel has no weight"),
        ({"pixel": 1.0, "features": 1.0}, "loss adversarial has no weight"),
        (WEIGHTS | {"perceptaul": 1.0}, "perceptaul, which is no loss here"),
    ],
)
def test_weights_name_the_terms(weights, message):
    module = training(weights=weights).train()
    with pytest.raises(UsageError, match=message):
        module.backward_of(torch.rand(2, 3, 16, 16), False, True)


# --------------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, china, flower) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for path in (china, flower):
        shutil.copy(path, root)
    return root


def fit(config: str, root: Path, folder: Path, **model: Any) -> Path:
    """Runs a config with a small codec on the CPU; returns where checkpoints lie."""
    described = yaml.safe_load((CONFIGS / config).read_text())
    described["trainer"] |= {
        "max_steps": 12, "accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 2,
        "val_check_interval": 12, "limit_val_batches": 1, "enable_progress_bar": False, "default_root_dir": str(folder),
    }  # fmt: skip
    described["trainer"]["logger"]["init_args"] = {"save_dir": str(folder), "name": "run"}
    described["trainer"]["callbacks"][1]["init_args"] = {"decay": 0.5, "update_every_n_steps": 1}
    arguments = described["model"]["init_args"]
    arguments |= {"minutes": None, "warmup_steps": 2, "compile_transform": False} | model
    update = arguments["codec"]["init_args"]["quantiser"].get("update", "ema")
    quantiser = SMALL["vqgan"]["quantiser"] | {"update": update}
    arguments["codec"]["init_args"] = SMALL["vqgan"] | {"quantiser": quantiser}
    arguments["distance"]["init_args"] = {"scales": 1}
    for discriminator in arguments.get("discriminators", []):
        discriminator["init_args"] = {"widths": [8, 8], "scales": 1}
    described["data"]["init_args"] = {"root": [str(root)], "batch_size": 4, "crop": 64, "held_out": 1}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(described))
    cli.main(["fit", "--config", str(path)])
    return max(folder.glob("run/version_*"), key=lambda path: int(path.name.split("_")[1])) / "checkpoints"


@pytest.fixture(scope="module")
def base(photographs, tmp_path_factory) -> Path:
    """Checkpoints of a run of vqgan-f16.yaml that went through all phases."""
    return fit(
        "vqgan-f16.yaml",
        photographs,
        tmp_path_factory.mktemp("base"),
        unquantised_steps=3,
        adversarial_start=0.5,
    )


def logged(checkpoints: Path, name: str) -> list[float]:
    with open(checkpoints.parent / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_phases_follow_each_other(base):
    assert len(logged(base, "pixel")) == len(logged(base, "perceptual")) == 6
    assert len(logged(base, "commitment")) == 5  # of steps 4 to 12
    assert len(logged(base, "adversarial")) == len(logged(base, "discriminator")) == 3
    assert len(logged(base, "val/psnr_8")) == len(logged(base, "val/distance")) == 1
    assert not logged(base, "val/psnr_1")
    run = torch.load(base / "final.ckpt", weights_only=True)
    assert run["global_step"] == 12 and "imagenette-classifier" in run["objective"]
    assert "PatchDiscriminator" in run["objective"]


def test_a_run_exports_and_encodes(base, photographs, scenery, tmp_path):
    folder = tmp_path / "vqgan-v1"
    export.main([str(base / "final.ckpt"), "-o", str(folder), "--data", str(photographs), "--device=cpu"])
    card = (folder / "CARD.md").read_text()
    assert "imagenette-classifier" in card and "codebooks of 8 | 12" in card and "lambda" not in card
    codec = compand.load(folder, device="cpu")
    data = codec.encode(scenery[:64, :96], quality=8)
    assert codec.decode(data).pixels.shape == (64, 96, 3)


def test_codebooks_alone_are_trained(base, photographs, tmp_path):
    end = fit(
        "vqgan-f16-finetune.yaml",
        photographs,
        tmp_path,
        start_from=str(base / "final.ckpt"),
        adversarial_start=6,
    )
    before, after = (export.load_run(path / "final.ckpt")[0].state_dict() for path in (base, end))
    for name, value in before.items():
        if name.startswith("transform."):
            assert torch.equal(after[name], value), name
    moved = [name for name in before if "codes" in name and not torch.equal(after[name], before[name])]
    assert len(moved) == 8
    assert len(logged(end, "val/psnr_1")) == len(logged(end, "val/psnr_8")) == 1


def test_the_prior_alone_is_trained(base):
    codec = small(prior={"kind": "context"})
    module = training(codec, start_from=str(base / "final.ckpt"), train="prior").train()
    assert not module.discriminators and not module.codec.bottleneck.quantiser.training
    before = {name: value.clone() for name, value in codec.bottleneck.quantiser.state_dict().items()}
    for _ in range(2):
        shown = module.backward_of(torch.rand(2, 3, 32, 32), True, False)
    assert module._names == ["rate", "prior"] and shown.isfinite().all()
    assert all(
        torch.equal(value, before[name]) for name, value in codec.bottleneck.quantiser.state_dict().items()
    )
    learning = {name for name, p in codec.named_parameters() if p.grad is not None}
    assert learning and all(name.startswith("bottleneck.") for name in learning)
    assert not any(name.startswith("bottleneck.quantiser") for name in learning)


def test_a_run_of_another_architecture_is_refused(base):
    codec = VqganCodec(
        5, {"kind": "vq", "size": 7}, {"kind": "static"},
        transform={"analysis_stages": [[4, 6, 1]], "synthesis_stages": [[4, 6, 1]]},
    )  # fmt: skip
    with pytest.raises(UsageError, match="no weights in common"):
        training(codec, start_from=str(base / "final.ckpt"))


# -------------------------------------------------------------------------------------- distances, discriminators


def test_the_perceptual_distance():
    torch.manual_seed(0)
    distance = ImageDistance().train()
    assert not any(module.training for module in distance.networks[0].modules())
    assert not any(p.requires_grad for p in distance.parameters())
    x = torch.rand(2, 3, 64, 96)
    assert all(float(value) == 0 for value in distance(x, x).values())
    near, far = (distance(x + scale * torch.randn_like(x), x) for scale in (0.02, 0.3))
    assert set(near) == {"pixel", "perceptual"}
    assert all(0 < near[name] < far[name] for name in near)
    x_hat = torch.rand_like(x).requires_grad_()
    gradient = torch.autograd.grad(distance(x_hat, x)["perceptual"], x_hat)[0]
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert "imagenette-classifier-v1" in distance.description


def test_pictures_are_shifted_alike_in_training(monkeypatch):
    distance = ImageDistance(scales=1)
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(FeatureDistance, "features", lambda self, b: [b])
    monkeypatch.setattr(
        FeatureDistance,
        "between",
        lambda self, a, wanted: (seen.append((a.detach(), wanted[0].detach())), (a - wanted[0]).sum())[1],
    )
    x = torch.rand(1, 3, 40, 48)
    for _ in range(12):
        distance(x.clone().requires_grad_(), x)
    assert all(torch.equal(a, b) and a.shape == (1, 3, 25, 33) for a, b in seen)
    assert len({float(a[0, 0, 0, 0]) for a, _ in seen}) > 6
    distance(x, x)
    assert torch.equal(seen[-1][0], x)


def test_models_without_an_image_encoder_are_refused():
    with pytest.raises(UsageError, match="does not look at pictures"):
        FeatureDistance("keywords-classifier")


def test_discriminators_judge_items_one_by_one():
    torch.manual_seed(0)
    judge = PatchDiscriminator((8, 16, 16), scales=2).eval()
    x = torch.rand(3, 3, 64, 48)
    with torch.no_grad():
        logits, features = judge(x)
        alone, _ = judge(x[1:2])
    assert len(logits) == 2 and len(features) == 6 and logits[0].shape == (3, 1, 16, 12)
    for whole, one in zip(logits, alone, strict=True):
        torch.testing.assert_close(whole[1:2], one, atol=1e-5, rtol=1e-4)


def test_images_of_several_folders(china, flower, tmp_path):
    for folder, path in (("b", china), ("a", flower)):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder)
    found = find_images([str(tmp_path / "b"), str(tmp_path / "a")])
    assert [path.name for path in found] == [china.name, flower.name]
