"""Training end to end on a few photographs, and its parts."""

from __future__ import annotations

import copy
import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from torch import nn

import compand
from compand import image_codec, registry
from compand.errors import CheckpointError, MediaError, UsageError
from compand.hyperprior import FactorizedCodec, HyperpriorCodec
from compand.train import cli, codec_training, export, ledger
from compand.train.adversarial import AdversarialTraining
from compand.train.concealment import ConcealmentTraining
from compand.train.images import CropDataset, ImageFolder, Stage, find_images, read_rgb
from compand.train.optim import NEWTON_SCHULZ, MuonAdam, orthogonalise
from compand.train.rate_distortion import RateDistortion
from compand.train.sounds import SoundFolder
from compand.train.tasks import TaskTraining

CONFIGS = Path(__file__).parents[2] / "train" / "configs"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, china, flower, hopper) -> Path:
    """A folder with three photographs, one of them deeper."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "deeper").mkdir()
    shutil.copy(china, root)
    shutil.copy(flower, root / "deeper")
    shutil.copy(hopper, root)
    (root / "notes.txt").write_text("no picture")
    return root


def fit(root: Path, folder: Path, *arguments: str) -> Path:
    """Runs `compand train fit` on the smoke config in a folder; returns where checkpoints lie."""
    cli.main(
        [
            "fit", "--config", str(CONFIGS / "smoke.yaml"), f"--data.root={root}",
            f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.default_root_dir={folder}", *arguments,
        ]
    )  # fmt: skip
    return max(folder.glob("smoke/version_*"), key=lambda path: int(path.name.split("_")[1])) / "checkpoints"


@pytest.fixture(scope="module")
def smoke(photographs, tmp_path_factory) -> Path:
    """The checkpoints of a run of the smoke config."""
    return fit(photographs, tmp_path_factory.mktemp("run"))


def metrics(checkpoints: Path, name: str) -> list[float]:
    with open(checkpoints.parent / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


# -------------------------------------------------------------------------------------------------- the whole


def test_the_loss_falls(smoke):
    losses = metrics(smoke, "loss")
    assert len(losses) == 10 and np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert all(0 < value < 20 for value in metrics(smoke, "bpp"))
    assert all(10 < value < 60 for value in metrics(smoke, "psnr"))
    (bpp_1,), (bpp_8,) = metrics(smoke, "val/bpp_1"), metrics(smoke, "val/bpp_8")
    (psnr_1,), (psnr_8,) = metrics(smoke, "val/psnr_1"), metrics(smoke, "val/psnr_8")
    assert bpp_1 < bpp_8 and psnr_1 < psnr_8 and len(metrics(smoke, "val/cost")) == 1


def test_a_run_resumes_where_it_stopped(smoke, photographs, tmp_path):
    last = loaded(smoke / "last.ckpt")
    assert last["global_step"] == 50 and last["elapsed_seconds"] > 0
    longer = fit(photographs, tmp_path, "--trainer.max_steps=60", f"--ckpt_path={smoke / 'last.ckpt'}")
    assert len(metrics(longer, "loss")) == 2
    final = loaded(longer / "final.ckpt")
    assert final["global_step"] == 60 and final["elapsed_seconds"] > last["elapsed_seconds"]
    old, new = (run["optimizer_states"][0]["state"] for run in (last, final))
    counted = [key for key, value in new.items() if "step" in value]
    assert counted and all(int(new[key]["step"]) == int(old[key]["step"]) + 10 == 60 for key in counted)
    before, after = last["state_dict"], final["state_dict"]
    moved = [
        float((after[key] - before[key]).abs().mean()) for key in before if before[key].is_floating_point()
    ]
    assert sum(value > 0 for value in moved) > 0.9 * len(moved)


def test_an_export_encodes_and_decodes(smoke, photographs, tmp_path, capsys, scenery, monkeypatch):
    folder = tmp_path / "hyperprior-v7"
    final = str(smoke / "final.ckpt")
    arguments = [final, "-o", str(folder), "--data", str(photographs), "--images", "2", "--device=cpu"]
    export.main(arguments)
    card = (folder / "CARD.md").read_text()
    assert "hyperprior-v7" in capsys.readouterr().out and "50 steps" in card
    assert f"counted on {photographs.name}" in card and "channels" in card and "batch_size" in card
    assert ledger.read(folder / "CARD.md") == [ledger.Entry("hyperprior-v7", 50, 0, ledger.UNMEASURED)]
    codec = compand.load(folder, device="cpu")
    data = codec.encode(scenery[:128, :128], quality=6)
    decoded = codec.decode(data)
    error = np.mean((decoded.pixels.astype(float) - scenery[:128, :128]) ** 2)
    assert 10 * np.log10(255**2 / error) > 18 and len(data) < 128 * 128 * 3 / 4
    with pytest.raises(CheckpointError, match="exists already"):
        export.main(arguments)
    monkeypatch.chdir(tmp_path)
    export.main([final, "--device=cpu"])
    assert (tmp_path / "checkpoints" / "hyperprior-v1" / "config.json").exists()


def test_a_ledger_goes_on_from_run_to_run(smoke, photographs, tmp_path):
    first = tmp_path / "hyperprior-v1"
    export.main([str(smoke / "final.ckpt"), "-o", str(first), "--device=cpu"])
    card = first / "CARD.md"
    card.write_text(card.read_text().replace("0.00 | not measured", "1.25 | +9.0 %") + "\n## More\n\n| a |\n")
    next_run = fit(
        photographs, tmp_path, f"--model.start_from={first}", "--trainer.max_steps=4",
        "--data.late_crop=[64, 128]", "--data.late_share=0.5", "--data.seen=1", "--trainer.val_check_interval=4",
    )  # fmt: skip
    assert len(metrics(next_run, "seen/cost")) == len(metrics(next_run, "val/cost")) == 1
    run = loaded(next_run / "final.ckpt")
    torch.save(run | {"gpu_seconds": 1800.0}, tmp_path / "gpu.ckpt")
    second = tmp_path / "hyperprior-v2"
    export.main([str(tmp_path / "gpu.ckpt"), "-o", str(second), "--device=cpu"])
    rows = [
        ledger.Entry("hyperprior-v7", 50, 1.25, "+9.0 %")._replace(run="hyperprior-v1"),
        ledger.Entry("hyperprior-v2, from hyperprior-v1", 4, 1.75, ledger.UNMEASURED),
    ]
    assert ledger.read(second / "CARD.md") == rows
    assert (
        "4 steps" in (second / "CARD.md").read_text() and "Kodak BD-rate" in (second / "CARD.md").read_text()
    )

    # A run goes on from another run as from its export, with all that training knows.
    codec = export.load_run(smoke / "final.ckpt")[0]
    other = RateDistortion(HyperpriorCodec(**codec.architecture), start_from=str(tmp_path / "gpu.ckpt"))
    state = other.codec.state_dict()
    assert all(torch.equal(value, run["state_dict"][f"codec.{name}"]) for name, value in state.items())
    saved: dict[str, Any] = {}
    other.on_save_checkpoint(saved)
    assert [row[2] for row in saved["ledger"]] == [1.25, 1.75]


def test_ledgers_that_are_none(tmp_path):
    card = tmp_path / "CARD.md"
    assert ledger.read(card) == []
    card.write_text("# a\n\n| x | y |\n")
    assert ledger.read(card) == []
    card.write_text(ledger.table([ledger.Entry("a", 1000, 2.5, "")], "b") + "\n| c | 5 | much | |\n")
    with pytest.raises(CheckpointError, match=r"row .* c .* is not run, steps"):
        ledger.read(card)


def test_averaged_weights_are_exported(smoke):
    run = loaded(smoke / "last.ckpt")
    codec, facts = export.load_run(smoke / "last.ckpt")
    assert facts["steps"] == 50 and 0 < facts["minutes"] < 5
    name = "codec.transform.analysis_linear.weight"
    assert torch.equal(codec.state_dict()[name.removeprefix("codec.")], run["state_dict"][name])
    current = run["current_model_state"][name.removeprefix("module.")]
    assert not torch.equal(current, run["state_dict"][name])


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\3\4 nor this", b"\x80\x02}q\0."])
def test_files_that_are_no_run(content, tmp_path):
    path = tmp_path / "run.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.ckpt is no checkpoint of `compand train`") as error:
        export.load_run(path)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        export.load_run(tmp_path / "missing.ckpt")


def test_next_version(tmp_path):
    assert export.next_version(tmp_path, "a").name == "a-v1"
    for name in ("a-v1", "a-v12", "a-v3", "ab-v40", "a-v9x", "b-v99"):
        (tmp_path / name).mkdir()
    assert export.next_version(tmp_path, "a").name == "a-v13"


def test_symbols_are_counted_as_they_are_coded(trained, china, monkeypatch):
    monkeypatch.setattr(export, "TILE", 96)
    codec = trained("hyperprior", steps=3)
    codec.bottleneck.freeze()
    seen: list[list[tuple[np.ndarray, np.ndarray]]] = []
    count = codec.bottleneck.count
    monkeypatch.setattr(codec.bottleneck, "count", lambda y, q: (seen.append(count(y, q)), seen[-1])[1])
    totals = export.count_symbols(codec, [china])
    assert len(seen) == codec.levels and len(totals) == 2
    for i, total in enumerate(totals):
        indexes = np.concatenate([push[i][0] for push in seen])
        symbols = np.concatenate([push[i][1] for push in seen])
        for table in range(len(total)):
            values, counts = np.unique(symbols[indexes == table], return_counts=True)
            assert total[table] == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_tables_see_every_quality(trained, china, monkeypatch):
    codec = trained("factorized", steps=3)
    codec.bottleneck.freeze()
    levels: list[int] = []
    analyse = codec.analyse
    monkeypatch.setattr(codec, "analyse", lambda p, t, q: (levels.append(q), analyse(p, t, q))[1])
    monkeypatch.setattr(export, "TILE", 64)
    export.count_symbols(codec, [china] * 12)
    assert len(levels) == 12 * 8 and min(levels) == 32 and max(levels) == 256
    assert len(set(levels)) > 40 and all(
        any(abs(q - level * 32) <= 16 for q in levels) for level in range(1, 9)
    )


def test_every_config_builds_its_parts(tmp_path, photographs, monkeypatch, capsys):
    from lightning.pytorch.cli import LightningCLI

    for path in sorted(CONFIGS.glob("*.yaml")):
        text = path.read_text()
        # An overlay names, at its beginning, the config that it is to be given after.
        named = re.findall(r"--config train/configs/(\S+)", text) or [path.name]
        assert named[-1] == path.name
        text = "".join((CONFIGS / name).read_text() for name in named)
        sounds = "SoundFolder" in text
        data = "--data.batch_size=2" if sounds else f"--data.root={photographs}"
        # Parts are trained of something, which a user names.
        part = ["--model.init_args.train=all"] if "train: codebook" in text else []
        configs = [f"--config={CONFIGS / name}" for name in named]
        instance = LightningCLI(
            args=[*configs, *part, data, "--trainer.accelerator=cpu",
                  "--trainer.precision=32", "--trainer.logger=false"],
            run=False, subclass_mode_model=True, subclass_mode_data=True, save_config_callback=None,
        )  # fmt: skip
        pair = type(instance.model), type(instance.datamodule)
        assert issubclass(pair[0], TaskTraining) or (
            pair[0] in (RateDistortion, AdversarialTraining, ConcealmentTraining)
            and pair[1] is (SoundFolder if sounds else ImageFolder)
        )


# ------------------------------------------------------------------------------------------------------ the loss


def small(**arguments) -> HyperpriorCodec:
    torch.manual_seed(0)
    return HyperpriorCodec(24, [[8, 12, 1]], 8, [8, 8, 8], **arguments)


def test_the_loss_is_its_formula(monkeypatch):
    codec = small(levels=4)
    module = RateDistortion(codec)
    crops = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(5)
    quality = 32 + torch.randint(0, 3 * 32 + 1, (3,))
    seen: list[torch.Tensor] = []
    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda x, q: (seen.append(q), evaluate(x, q))[1])
    torch.manual_seed(5)
    loss, shown = module.loss(crops)
    assert torch.equal(seen[0], quality) and set(quality.tolist()) <= set(range(32, 129))
    torch.manual_seed(5)
    torch.randint(0, 97, (3,))
    x = crops.float() / 255
    y = codec.transform.analysis(x, quality)
    output = codec.bottleneck(y, quality)
    mse = (codec.transform.synthesis(output.y_hat, quality) - x).square().mean((1, 2, 3))
    lambdas = torch.tensor(
        [2 ** float(np.interp(q / 32, [1, 2, 3, 4], np.log2(codec.lambdas))) for q in quality]
    )
    middle = 2 ** float(np.log2(codec.lambdas).mean())
    expected = ((lambdas / middle) ** -0.5 * (output.bits / 1024 + lambdas * 255**2 * mse)).mean()
    torch.testing.assert_close(shown[0], expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss, expected + output.losses["auxiliary"], rtol=1e-3, atol=0)
    assert shown[1].item() == pytest.approx(float(output.bits.mean()) / 1024, rel=1e-3)
    assert shown[2].item() == pytest.approx(float(mse.mean()), rel=1e-3)


@pytest.mark.parametrize("count", [1, 5, 32, 1000])
def test_qualities_of_a_batch_can_be_spread(count):
    module = RateDistortion(small(), stratified=True)
    drawn = torch.stack([module.draw_qualities(count, torch.device("cpu")) for _ in range(400)])
    assert drawn.shape == (400, count) and drawn.dtype == torch.int64
    assert int(drawn.min()) >= 32 and int(drawn.max()) <= 256
    part = 225 / count
    places = (drawn - 32) / part
    assert ((places >= torch.arange(count) - 1 / part) & (places <= torch.arange(count) + 1)).all()
    # Uniform all the same, over all batches.
    assert float(drawn.float().mean()) == pytest.approx(144, abs=16 / count**0.5)
    if count == 1:
        assert float(drawn.float().std()) == pytest.approx(225 / 12**0.5, rel=0.1)


def test_gradients_of_several_processes_are_averaged(monkeypatch):
    class FakeTrainer:
        world_size = 4

    module = RateDistortion(small())
    module._trainer = FakeTrainer()
    others = list(module.parameters())[::2]
    for p in others:
        p.grad = torch.randn(p.shape)
    places = [p.grad.data_ptr() for p in others]
    before = [p.grad.clone() for p in others]
    # Three more processes, with the gradient 1 everywhere.
    monkeypatch.setattr(codec_training.dist, "all_reduce", lambda flat: flat.add_(3))
    module.average_gradients()
    for p, place, old in zip(others, places, before, strict=True):
        assert p.grad.data_ptr() == place
        torch.testing.assert_close(p.grad, (old + 3) / 4)


def test_every_parameter_learns_and_has_one_group():
    codec = small()
    module = RateDistortion(codec)
    loss, _ = module.loss(torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8))
    loss.backward()
    assert not [name for name, p in codec.named_parameters() if p.grad is None]
    groups = module.configure_optimizers().param_groups
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in module.parameters())
    (quantiles,) = [group for group in groups if group["adam_only"]]
    assert len(quantiles["params"]) == 1 and quantiles["peak_lr"] == 10 * groups[0]["peak_lr"]


def test_the_transform_can_be_kept(checkpoint_of):
    folder = checkpoint_of("hyperprior")
    architecture = compand.load(folder, device="cpu").architecture
    codec = FactorizedCodec(architecture["latent_channels"], architecture["stages"])
    module = RateDistortion(codec, start_from=str(folder), train_transform=False)
    loss, _ = module.loss(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    loss.backward()
    learning = {name for name, p in codec.named_parameters() if p.grad is not None}
    assert learning and all(name.startswith("bottleneck.density") for name in learning)


def test_a_synthesis_trained_alone_decodes_the_same_files(checkpoint_of, tmp_path, scenery):
    info = compand.checkpoint.read_info(checkpoint_of("wavelet-image"))
    transform = info.architecture["transform"] | {"synthesis_width": 40}
    codec = registry.by_name("wavelet-image").load_class()(**info.architecture | {"transform": transform})
    module = RateDistortion(codec, start_from=str(info.path), train_encoder=False)
    loss, _ = module.loss(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    loss.backward()
    learning = {name for name, p in codec.named_parameters() if p.grad is not None}
    assert learning and all(name.startswith("transform.synthesis") for name in learning)

    export.export(codec, tmp_path / "large-v1", [], "cpu", info)
    reference, large = (
        compand.load(info.path, device="cpu"),
        compand.load(tmp_path / "large-v1", device="cpu"),
    )
    assert large.info.symbols == info.symbols and large.info.synthesis != info.synthesis
    data = reference.encode(scenery[:64, :96], quality=3)
    assert torch.equal(large.latents(data), reference.latents(data))
    assert not np.array_equal(large.decode(data).pixels, reference.decode(data).pixels)

    with torch.no_grad():
        codec.bottleneck.y_gain.log2_gain += 1
    with pytest.raises(CheckpointError, match="train_encoder: false"):
        export.export(codec, tmp_path / "moved-v1", [], "cpu", info)
    with pytest.raises(UsageError, match="nothing to train"):
        RateDistortion(codec, train_encoder=False)


def test_the_learning_rate_warms_up_and_decays():
    module = RateDistortion(small(), lr=1.0, warmup_steps=10, final_lr_fraction=0.1)
    optimizer = module.configure_optimizers()
    rates = []

    class FakeTrainer:
        max_steps = 100
        global_step = 0
        should_stop = False
        world_size = 1

    module._trainer = FakeTrainer()
    for step in range(101):
        FakeTrainer.global_step = step
        module._set_learning_rate(optimizer)
        rates.append([group["lr"] for group in optimizer.param_groups])
    first = [rate[0] for rate in rates]
    assert first[0] == pytest.approx(0.1, rel=0.01) and first[4] == pytest.approx(0.5, rel=0.01)
    assert first.index(max(first)) == 9 and first[-1] == pytest.approx(0.1)
    assert first[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 0.55)))
    assert all(b == pytest.approx(10 * a) for a, b in rates)
    module.minutes = 1e-9
    module._set_learning_rate(optimizer)
    assert FakeTrainer.should_stop or module.trainer.should_stop


TWO_PROCESSES = """
import hashlib, sys
from compand.train.cli import main
from compand.train.rate_distortion import RateDistortion

finish = RateDistortion.on_train_end

def report(self):
    content = b"".join(p.detach().cpu().numpy().tobytes() for p in self.parameters())
    # One write a process, so that lines do not mix.
    sys.stdout.write(f"weights {hashlib.sha256(content).hexdigest()} after {self.global_step}\\n")
    sys.stdout.flush()
    finish(self)

RateDistortion.on_train_end = report
main(sys.argv[1:])
"""


GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("device", "steps"),
    [("cpu", 3), pytest.param("cuda", 24, marks=pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"))],
)
def test_two_processes_stay_alike(photographs, tmp_path, device, steps):
    """Distributed data parallel: every process sees other crops, all end with the same weights. On GPUs, steps are
    captured, and again where crops become larger."""
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    arguments = [
        "fit", "--config", str(CONFIGS / "smoke.yaml"), f"--data.root={photographs}",
        f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.devices=2", "--trainer.strategy=ddp",
        f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0", "--model.minutes=5",
        f"--trainer.accelerator={device}", "--data.late_crop=128", "--data.late_share=0.5",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(reports) == 2 and reports[0] == reports[1] and reports[0].endswith(f"after {steps}")
    assert list(tmp_path.glob("smoke/version_0/checkpoints/final.ckpt"))


# ------------------------------------------------------------------------------------------------------ MuonAdam


def test_orthogonalise_makes_singular_values_alike():
    torch.manual_seed(0)
    matrices = torch.randn(3, 20, 50) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None]
    result = orthogonalise(matrices)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.4 and float(values.max()) < 1.35
    # The directions stay: with U S V^T, U^T result V is near the identity.
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.mT @ result @ vt.mT
    off = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) < 0.1 and float(turned.diagonal(dim1=1, dim2=2).min()) > 0.4
    assert orthogonalise(torch.zeros(1, 4, 6)).abs().max() == 0


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.ModuleDict(
        {
            "a": nn.Conv2d(6, 10, 1), "b": nn.Conv2d(6, 10, 1), "tall": nn.Linear(4, 12), "wide": nn.Linear(12, 4),
            "kernel": nn.Conv2d(3, 5, 3), "depthwise": nn.Conv2d(5, 5, 3, groups=5), "one": nn.Linear(7, 1),
        }
    )  # fmt: skip


def gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def plain_step(
    state: list[dict[str, torch.Tensor]], parameters: list[nn.Parameter], t: int, lr: float
) -> None:
    """The update of Jordan et al. 2024 for matrices, of Kingma & Ba 2015 for the rest, one parameter at a time."""
    a, b, c = NEWTON_SCHULZ
    for memory, p in zip(state, parameters, strict=True):
        g = p.grad
        m = memory.setdefault("m", torch.zeros_like(g))
        if p.ndim in (2, 4) and p.shape[0] > 1 and p.shape[1] > 1:
            m.mul_(0.95).add_(g, alpha=0.05)
            direction = (0.05 * g + 0.95 * m).flatten(1)
            x = (direction if direction.shape[0] <= direction.shape[1] else direction.T).bfloat16()
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            x = x.float() if direction.shape[0] <= direction.shape[1] else x.float().T
            p.data.sub_(lr * 0.2 * max(direction.shape) ** 0.5 * x.reshape(p.shape))
        else:
            v = memory.setdefault("v", torch.zeros_like(g))
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.99).add_(g * g, alpha=0.01)
            p.data.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8))


def test_stacked_updates_are_those_of_each_matrix():
    own, plain = model(), model()
    first, second = list(own.parameters()), list(plain.parameters())
    optimizer = MuonAdam(first, lr=0.01)
    state: list[dict[str, torch.Tensor]] = [{} for _ in second]
    for t in range(1, 5):
        gradients(first, t)
        gradients(second, t)
        optimizer.step()
        plain_step(state, second, t, 0.01)
    start = model()
    for (name, p), q, origin in zip(own.named_parameters(), second, start.parameters(), strict=True):
        # Newton-Schulz runs in bfloat16, whose rounding depends on the order of summation.
        muon = p.ndim in (2, 4) and p.shape[0] > 1 and p.shape[1] > 1
        scale = float((q - origin).abs().mean())
        assert scale > 1e-3, name
        assert float((p - q).abs().mean()) <= (0.1 if muon else 1e-4) * scale, name


def test_updates_of_both_kinds_have_one_size():
    parameters = [
        nn.Parameter(torch.zeros(32, 64)),
        nn.Parameter(torch.zeros(64, 32)),
        nn.Parameter(torch.zeros(4096)),
    ]
    optimizer = MuonAdam(parameters, lr=1.0)
    gradients(parameters, 0)
    optimizer.step()
    sizes = [float(p.square().mean().sqrt()) for p in parameters]
    assert sizes[0] == pytest.approx(0.2, rel=0.2) and sizes[1] == pytest.approx(0.2, rel=0.2)
    assert sizes[2] == pytest.approx(1, rel=0.01)


def test_adam_only_groups_and_learning_rates():
    a, b = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8, 8))
    optimizer = MuonAdam([{"params": [a], "lr": 0.5, "adam_only": True}, {"params": [b], "lr": 0.0}])
    gradients([a, b], 3)
    optimizer.step()
    torch.testing.assert_close(a.detach(), -0.5 * a.grad.sign(), atol=1e-4, rtol=0)
    assert not b.any() and "square" in optimizer.state[a] and "square" not in optimizer.state[b]
    optimizer.param_groups[1]["lr"] = 0.5
    optimizer.step()
    assert b.any()


def test_state_round_trip():
    one, two = model(), model()
    a, b = MuonAdam(one.parameters(), lr=0.01), MuonAdam(two.parameters(), lr=0.01)
    for t in range(3):
        gradients(list(one.parameters()), t)
        a.step()
    two.load_state_dict(one.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for t in range(3, 6):
        for net, optimizer in ((one, a), (two, b)):
            gradients(list(net.parameters()), t)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_parameters_without_gradient_stay():
    p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = MuonAdam([p, q], lr=0.1)
    gradients([p], 0)
    loss = optimizer.step(lambda: 7)
    assert loss == 7 and torch.equal(q, torch.ones(3, 3)) and not torch.equal(p, torch.ones(3, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("restored", [False, True])
def test_captured_updates_are_the_plain_ones(restored):
    nets = [model().cuda(), model().cuda()]
    optimizers = [MuonAdam(net.parameters(), lr=0.01, cuda_graph=i == 1) for i, net in enumerate(nets)]
    for net in nets:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
    for t in range(10):
        for net, optimizer in zip(nets, optimizers, strict=True):
            generator = torch.Generator().manual_seed(t)
            for p in net.parameters():
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            if restored and t == 5:
                state = optimizer.state_dict()
                for values in state["state"].values():
                    if "step" in values:
                        values["step"] = values["step"].cpu()
                optimizer.load_state_dict(state)
            optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SMALL)
def test_captured_steps_lose_as_much_as_plain_ones(name, monkeypatch):
    torch.manual_seed(0)
    module = RateDistortion(registry.by_name(name).load_class()(**SMALL[name]), clip=1e9).cuda()
    monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
    crops = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, device="cuda")
    for _ in range(3):
        module.run_step(module._backward, crops, [])
    captured = [module.run_step(module._backward, crops, [])[0].item() for _ in range(40)]
    plain = [module.loss(crops)[1][0].item() for _ in range(40)]
    assert len(set(captured)) > 1, "qualities and noise must differ from replay to replay"
    assert np.mean(captured) == pytest.approx(np.mean(plain), rel=0.3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_are_captured_anew_for_other_shapes(monkeypatch):
    """Of two trainings on the same batches, with the same draws, one captured: the weights stay near each other."""
    weights = []
    for captured in (False, True):
        torch.manual_seed(0)
        codec = HyperpriorCodec(**SMALL["hyperprior"])
        module = RateDistortion(codec, lr=1e-3, cuda_graph=captured, stratified=True).cuda()
        monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
        optimizer = module.configure_optimizers()
        optimizer.optimizer = optimizer  # as Lightning wraps it
        generator = torch.Generator("cuda").manual_seed(1)
        losses = []
        for step in range(60):
            shape = (8, 3, 64, 64) if step < 30 else (2, 3, 128, 128)
            crops = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)
            losses.append(module.run_step(module._backward, crops, [optimizer])[0].item())
            optimizer.step()
        weights.append(losses)
    plain, replayed = (np.mean(np.reshape(losses, (6, 10)), 1) for losses in weights)
    assert np.allclose(plain, replayed, rtol=0.25) and plain[-1] < plain[0] and replayed[-1] < replayed[0]


# --------------------------------------------------------------------------------------------------------- crops


def labelled(number: int, height: int, width: int) -> np.ndarray:
    """Every pixel says where it comes from: (number and high bits, row, column)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([np.full_like(rows, number), rows, columns], axis=2).astype(np.uint8)


def test_crops_come_from_the_images():
    images = [labelled(0, 100, 60), labelled(1, 40, 200), labelled(2, 40, 39), labelled(3, 32, 250)]
    batches = iter(CropDataset(images, 64, 40, torch.device("cpu"), 0))
    seen = {0: 0, 1: 0, 2: 0, 3: 0}
    mirrored = 0
    corners = set()
    for _ in range(20):
        batch = next(batches)
        assert batch.shape == (64, 3, 40, 40) and batch.dtype == torch.uint8
        for crop in batch.permute(0, 2, 3, 1).numpy():
            number = int(crop[0, 0, 0])
            seen[number] += 1
            flip = int(crop[0, 0, 2]) > int(crop[0, 1, 2])
            mirrored += flip
            crop = crop[:, ::-1] if flip else crop
            _, top, left = crop[0, 0].tolist()
            assert np.array_equal(crop, images[number][top : top + 40, left : left + 40])
            corners.add((number, top, left))
    # Images too small for a crop are left out; the others are drawn by their number of pixels.
    assert seen[2] == seen[3] == 0
    assert seen[0] / 1280 == pytest.approx(6000 / 14000, abs=0.06)
    assert mirrored / 1280 == pytest.approx(0.5, abs=0.06)
    assert {(0, 0), (0, 60)} <= {(number, top) for number, top, _ in corners}
    assert {(1, 0), (1, 160)} <= {(number, left) for number, _, left in corners}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_crops_have_two_edges_and_are_transposed(share):
    images = [labelled(0, 60, 100), labelled(1, 100, 60), labelled(2, 90, 90), labelled(3, 60, 60)]
    crops = CropDataset(images, 64, (50, 80), torch.device("cpu"), 0, transposed=share)
    turned: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    batch = next(iter(crops))
    assert batch.shape == (64, 3, 50, 80)
    for crop in batch.permute(0, 2, 3, 1).numpy():
        number = int(crop[0, 0, 0])
        turn = bool(crop[0, 0, 1] != crop[0, 1, 1])  # rows of the image lie beside each other
        turned[number].append(turn)
        along = 1 if turn else 2
        crop = crop[:, ::-1] if crop[0, 0, along] > crop[0, 1, along] else crop
        _, top, left = crop[0, 0].tolist()
        tall, wide = (80, 50) if turn else (50, 80)
        found = crop.transpose(1, 0, 2) if turn else crop
        assert np.array_equal(found, images[number][top : top + tall, left : left + wide])
    assert not any(turned[0]) and all(turned[1]) and turned[0] and turned[1]
    assert (0 < sum(turned[2]) < len(turned[2])) == (share > 0)


def test_larger_crops_come_late():
    images = [labelled(0, 40, 40), labelled(1, 100, 60)]
    done = 0.0
    crops = CropDataset(
        images, 12, 32, torch.device("cpu"), 0, later=[Stage(0.5, 3, (64, 60))], progress=lambda: done
    )
    batches = iter(crops)
    assert next(batches).shape == (12, 3, 32, 32)
    done = 0.49
    assert {int(number) for number in next(batches)[:, 0].unique()} <= {0, 1}
    done = 0.5
    late = next(batches)
    assert late.shape == (3, 3, 64, 60) and (late[:, 0] == 1).all()
    with pytest.raises(MediaError, match="edges of at least 101 and 60"):
        CropDataset(images, 1, 32, torch.device("cpu"), 0, later=[Stage(0.5, 1, (101, 60))])


def test_late_batches_have_as_many_pixels(many, photographs):
    data = ImageFolder(str(photographs), held_out=1, crop=256, late_crop=(320, 448), late_share=0.25, seen=2)
    assert data.later == [Stage(0.75, 15, (320, 448))]
    data.setup()
    held_out, seen = data.val_dataloader()
    assert len(held_out) == 1 and len(seen) == 2
    with pytest.raises(UsageError, match="give an edge, or height and width"):
        ImageFolder(str(many), late_crop=(1, 2, 3))
    copies = ImageFolder(str(many), crop=8, held_out=0, copies=3)
    copies.setup()
    assert len(copies._train) == 4 * 20 and len({image.shape for image in copies._train[20:]}) > 5


def test_crops_follow_the_seed():
    images = [labelled(0, 90, 90)]

    def first(seed: int) -> torch.Tensor:
        return next(iter(CropDataset(images, 8, 16, torch.device("cpu"), seed)))

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))
    batches = iter(CropDataset(images, 8, 16, torch.device("cpu"), 3))
    assert not torch.equal(next(batches), next(batches))


def test_no_image_is_large_enough():
    with pytest.raises(MediaError, match="at least 64 pixels"):
        CropDataset([labelled(0, 63, 100)], 1, 64, torch.device("cpu"), 0)


@pytest.fixture
def many(tmp_path) -> Path:
    """Twenty plain pictures, each of its own gray."""
    for i in range(20):
        Image.fromarray(np.full((20, 24), 10 * i, np.uint8)).save(tmp_path / f"{i:02}.png")
    return tmp_path


@pytest.mark.parametrize("held_out", [0, 1, 4, 10, 15])
def test_held_out_images_are_not_trained_on(many, held_out):
    data = ImageFolder(str(many), batch_size=2, crop=8, held_out=held_out)
    data.setup()
    kept = {int(image[0, 0, 0]) for image in data._held_out}
    originals = {int(image[0, 0, 0]) for image in data._train if image.shape == (20, 24, 3)}
    every = {int(image[0, 0, 0]) for image in data._train}
    assert len(kept) == min(held_out, 10) and not kept & every
    assert kept | every == {10 * i for i in range(20)} and originals == every
    assert len(data._train) == 2 * (20 - len(kept))
    validation = list(data.val_dataloader())
    assert [int(image[0, 0, 0, 0]) for image in validation] == sorted(kept)
    assert all(image.shape == (1, 3, 20, 24) for image in validation)


def test_second_copies_are_reduced(many):
    data = ImageFolder(str(many), crop=8, held_out=4, reduce=(0.5, 0.75))
    data.setup()
    reduced = data._train[len(data._train) // 2 :]
    assert all(10 <= image.shape[0] <= 15 and 12 <= image.shape[1] <= 18 for image in reduced)
    assert len({image.shape for image in reduced}) > 2
    assert [int(image[0, 0, 0]) for image in reduced] == [int(image[0, 0, 0]) for image in data._train[:16]]


def test_validation_may_have_its_own_folder(many, photographs):
    data = ImageFolder(str(many), crop=8, held_out=4, validation=str(photographs))
    data.setup()
    assert len(data._held_out) == 3 and len(data._train) == 40


def test_find_and_read_images(photographs, tmp_path, china):
    assert [path.name for path in find_images(photographs)] == ["china.jpg", "flower.jpg", "grace_hopper.jpg"]
    with pytest.raises(MediaError, match="no image found"):
        find_images(tmp_path)
    Image.open(china).convert("L").save(tmp_path / "gray.png")
    gray = read_rgb(tmp_path / "gray.png")
    assert gray.shape == (427, 640, 3) and np.array_equal(gray[..., 0], gray[..., 2])
    assert image_codec.TILE >= 640
