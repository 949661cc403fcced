"""Models of CompressAI against the checkpoints that they become."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from compressai.models import FactorizedPrior, FactorizedPriorReLU, MeanScaleHyperprior, ScaleHyperprior
from safetensors.torch import save_file
from torch.nn import functional as F

import compand
from compand import cli
from compand.bottlenecks.linear_scales import PARTS, octave_thresholds
from compand.coding import container
from compand.coding.integer import (
    ACTIVATION_LIMIT,
    FRACTION_BITS,
    LEAK_BITS,
    IntegerConvolution,
    IntegerNetwork,
    to_fixed,
)
from compand.errors import BitstreamError, CheckpointError
from compand.train.images import CropDataset, read_rgb
from compand.train.import_compressai import as_shuffled, import_compressai, read_weights

MODELS = {
    "bmshj2018-factorized": FactorizedPrior,
    "bmshj2018-factorized-relu": FactorizedPriorReLU,
    "bmshj2018-hyperprior": ScaleHyperprior,
    "mbt2018-mean": MeanScaleHyperprior,
}
N, M = 12, 20


def random_model(name: str) -> torch.nn.Module:
    """An untrained model whose parameters have all left their initial values, and that codes something."""
    torch.manual_seed(1)
    model = MODELS[name](N, M).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("entropy_bottleneck"):
                parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.abs().mean())
        model.g_a[6].weight.mul_(30)
        model.entropy_bottleneck.quantiles[:, 0, 1] = torch.randn(model.entropy_bottleneck.channels)
        if hasattr(model, "h_s"):
            model.h_a[4].weight.mul_(20)
            model.h_s[4].weight.mul_(10)
            # Scales that suit the latents: CompressAI counts what is far out of scale as 30 bits, whatever it costs.
            model.h_s[4].bias[:M] += 6
    return model


@pytest.fixture(scope="module")
def trained_model(china, flower) -> Callable[[str], torch.nn.Module]:
    """trained_model(name) -> a model after some seconds of training, as CompressAI's example does it."""
    made: dict[str, torch.nn.Module] = {}

    def train(name: str) -> torch.nn.Module:
        if name in made:
            return made[name]
        torch.manual_seed(0)
        model = MODELS[name](N, M).train()
        quantiles = [p for key, p in model.named_parameters() if key.endswith("quantiles")]
        others = [p for key, p in model.named_parameters() if not key.endswith("quantiles")]
        optimizer = torch.optim.Adam(others, 2e-3)
        auxiliary = torch.optim.Adam(quantiles, 0.3)
        images = CropDataset([read_rgb(china), read_rgb(flower)], 8, 64, torch.device("cpu"), 0)
        crops = iter(images)
        for _ in range(80):
            x = next(crops).float() / 255
            result = model(x)
            bits = sum(-torch.log2(part).sum() for part in result["likelihoods"].values())
            loss = bits / (x.numel() / 3) + 0.02 * 255**2 * (result["x_hat"] - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            optimizer.step()
            auxiliary.zero_grad()
            model.aux_loss().backward()
            auxiliary.step()
        made[name] = model.eval()
        return made[name]

    return train


@pytest.fixture(params=["random", "trained"])
def model_of(request, trained_model):
    return random_model if request.param == "random" else trained_model


@pytest.fixture
def imported(tmp_path):
    """imported(model) -> the codec that a model becomes, on the CPU."""

    def load(model: torch.nn.Module) -> compand.Codec:
        torch.save(model.state_dict(), tmp_path / "model.pth")
        import_compressai(tmp_path / "model.pth", tmp_path / "model-v1", device="cpu")
        return compand.load(tmp_path / "model-v1", device="cpu")

    return load


@pytest.mark.parametrize("name", MODELS)
def test_latents_bits_and_picture_are_those_of_the_model(name, model_of, imported, scenery):
    model, pixels = model_of(name), scenery[:256, 100:420]
    codec = imported(model)
    model.update()
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        result = model(x)
        y, strings = model.g_a(x), model.compress(x)["strings"]
        means = torch.zeros_like(y)
        if name == "mbt2018-mean":
            z_hat, _ = model.entropy_bottleneck(model.h_a(y))
            means = model.h_s(z_hat).chunk(2, 1)[1]
        elif "factorized" in name:
            means = model.entropy_bottleneck.quantiles[:, 0, 1][:, None, None].expand_as(y)
        expected = torch.round(y - means) + means
    data = codec.encode(pixels)
    y_hat = codec.latents(data) + codec.transform.centre[:, None, None]
    error = (y_hat - expected[0]).abs()
    # Integers stand for the means, finely: a latent half way between two symbols may go to the other one.
    moved = error > 0.5
    assert float(moved.float().mean()) < (0.005 if name == "mbt2018-mean" else 1e-4)
    assert float(error[~moved].max()) < (0.02 if name == "mbt2018-mean" else 1e-5)

    estimate = float(sum(-torch.log2(part).sum() for part in result["likelihoods"].values())) / 8
    real = sum(len(string[0]) for string in strings)
    assert codec.estimate(pixels, 1) / 8 < 1.005 * estimate + 4
    assert len(data) < 1.005 * max(estimate, real) + 40
    decoded = codec.decode(data).pixels
    original = (result["x_hat"][0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    # Rounded to integers, and off by what a symbol does where one has moved.
    assert np.abs(decoded - original).mean() < (0.6 if name == "mbt2018-mean" else 0.3)
    if not moved.any() and name != "mbt2018-mean":
        assert np.abs(decoded - original).max() < 0.51
    noise = [float(np.mean((picture - pixels.astype(float)) ** 2)) for picture in (decoded, original)]
    assert noise[0] < 1.005 * noise[1] + 0.2


def test_rate_follows_the_pictures_that_are_counted(trained_model, imported, scenery, tmp_path, china):
    model = trained_model("mbt2018-mean")
    plain = imported(model)
    codec, _ = import_compressai(
        tmp_path / "model.pth", tmp_path / "counted-v1", files=[china], multiplier=0.02, device="cpu"
    )
    counted = compand.load(tmp_path / "counted-v1", device="cpu")
    assert counted.multiplier_at(32) == pytest.approx(0.02) and codec.levels == 1
    assert len(counted.encode(scenery)) < len(plain.encode(scenery))


@pytest.mark.parametrize("name", MODELS)
def test_any_size_any_threads_and_damage(name, trained_model, imported, scenery):
    codec = imported(trained_model(name))
    for height, width in ((1, 1), (17, 90), (64, 64), (65, 130)):
        data = codec.encode(scenery[:height, :width])
        assert container.read_header(data).settings == (32,)
        assert codec.decode(data).pixels.shape == (height, width, 3)
    codec.check(data)
    expected = codec.latents(data)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            codec.to(memory_format=torch.contiguous_format)
            assert torch.equal(codec.latents(data), expected)
    finally:
        torch.set_num_threads(threads)
    generator = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(data)
        damaged[generator.integers(len(data))] ^= 1 << generator.integers(8)
        with pytest.raises((BitstreamError, CheckpointError)):
            codec.decode(bytes(damaged))


def test_files_decode_without_compressai(trained_model, imported, scenery, tmp_path):
    codec = imported(trained_model("mbt2018-mean"))
    (tmp_path / "a.cpd").write_bytes(codec.encode(scenery[:40, :60]))
    code = (
        "import sys; sys.modules['compressai'] = None; import compand; "
        f"c = compand.load({str(tmp_path / 'model-v1')!r}, device='cpu'); "
        f"d = open({str(tmp_path / 'a.cpd')!r}, 'rb').read(); "
        "p = c.decode(d); assert c.encode(p) and p.pixels.shape == (40, 60, 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------- files


def old_names(state: dict[str, torch.Tensor], matrix: str) -> dict[str, torch.Tensor]:
    words = {"matrices": "matrix", "biases": "bias", "factors": "factor"}
    result = {}
    for key, value in state.items():
        for new, old in words.items():
            written = f"_{new}." if matrix == "list" else f"_{old}"
            key = key.replace(f"entropy_bottleneck.{new}.", f"entropy_bottleneck.{written}")
        result[key] = value
    return result


@pytest.mark.parametrize("form", ["plain", "run", "module", "list", "underscore", "safetensors", "updated"])
def test_all_forms_of_a_file_hold_the_same_weights(form, tmp_path):
    model = random_model("bmshj2018-hyperprior")
    torch.save(model.state_dict(), tmp_path / "reference.pth")
    if form == "updated":
        model.update()
    state, path = dict(model.state_dict()), tmp_path / "model.pth.tar"
    if form == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file({key: value for key, value in state.items() if value.numel()}, path)
    elif form == "run":
        optimizer = torch.optim.Adam(model.parameters()).state_dict()
        torch.save({"epoch": 3, "state_dict": state, "loss": 1.5, "optimizer": optimizer}, path)
    elif form == "module":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(old_names(state, form) if form in ("list", "underscore") else state, path)
    expected, got = read_weights(tmp_path / "reference.pth"), read_weights(path)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def refused(path, tmp_path, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        import_compressai(path, tmp_path / "new-v1", device="cpu", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "new-v1").exists()
    return str(error.value)


class Foreign:
    """What weights_only refuses to build."""


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights", Foreign(), [1, 2], {"a": 1}, {}],
    ids=["empty", "text", "object", "list", "numbers", "nothing"],
)
def test_what_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert "state" in refused(path, tmp_path) or not content


def test_what_cannot_be_read(tmp_path):
    assert "cannot be read" in refused(tmp_path / "absent.pth", tmp_path)
    (tmp_path / "odd.safetensors").write_bytes(b"12345678901234567890")
    assert "no weights" in refused(tmp_path / "odd.safetensors", tmp_path)


def test_other_architectures_are_named(tmp_path):
    from compressai.models import Cheng2020Anchor, JointAutoregressiveHierarchicalPriors

    for other in (Cheng2020Anchor(N), JointAutoregressiveHierarchicalPriors(N, M)):
        torch.save(other.state_dict(), tmp_path / "model.pth")
        assert "another architecture" in refused(tmp_path / "model.pth", tmp_path)
    torch.save(random_model("mbt2018-mean").state_dict(), tmp_path / "model.pth")
    message = refused(tmp_path / "model.pth", tmp_path, architecture="bmshj2018-factorized")
    assert "is a mbt2018-mean" in message


@pytest.mark.parametrize("name", MODELS)
def test_shapes_that_do_not_fit(name, tmp_path):
    state = random_model(name).state_dict()
    for key in ("g_s.2.weight", "g_a.0.weight", "entropy_bottleneck.quantiles", "h_s.0.weight"):
        if key in state:
            torch.save(state | {key: state[key][:-1]}, tmp_path / "model.pth")
            assert "shapes" in refused(tmp_path / "model.pth", tmp_path), key
    torch.save(state | {"g_a.0.bias": state["g_a.0.bias"] * float("nan")}, tmp_path / "model.pth")
    assert "no numbers" in refused(tmp_path / "model.pth", tmp_path)


def test_the_command(tmp_path, capsys, china, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(random_model("bmshj2018-factorized").state_dict(), tmp_path / "model.pth")

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main(["import-compressai", *map(str, arguments)])
        return int(end.value.code or 0)

    assert run("model.pth", "-o", "mine", "--lambda", "0.02") == 0
    assert "bmshj2018-factorized, N 12, M 20" in capsys.readouterr().out
    assert "model.pth" in (tmp_path / "mine" / "CARD.md").read_text()
    assert compand.load("mine", device="cpu").levels == 1
    assert run("model.pth", "--name", "other", "-o", "models") == run("model.pth") == 0
    assert (tmp_path / "models" / "other-v1").is_dir()
    assert (tmp_path / "checkpoints" / "bmshj2018-factorized-v1").is_dir()
    capsys.readouterr()
    assert run("model.pth", "-o", "mine") == 1
    assert capsys.readouterr().err == "compand: mine exists already: export to a new version\n"


# ------------------------------------------------------------------------------------------------ exact pieces


def test_a_transposed_convolution_is_a_convolution_and_a_shuffle():
    layer = torch.nn.ConvTranspose2d(5, 3, 5, 2, 2, 1).double()
    x = torch.randn(2, 5, 7, 4, dtype=torch.float64)
    with torch.no_grad():
        got = F.pixel_shuffle(
            F.conv2d(x, as_shuffled(layer.weight), layer.bias.repeat_interleave(4), padding=1), 2
        )
        torch.testing.assert_close(got, layer(x))


def test_thresholds_are_powers_of_two_rounded_up():
    thresholds = octave_thresholds(18)
    assert thresholds == sorted(thresholds) and thresholds[0] == 1 and thresholds[-1] == 1 << 18
    exact = 2.0 ** (np.arange(18 * PARTS + 1) / PARTS)
    assert np.array_equal(thresholds, np.ceil(exact - 1e-9))


def test_leaky_rectification_is_exact():
    one = torch.full((1, 1, 1, 1), 4096.0)
    layer = IntegerConvolution(one, torch.zeros(1), 1, True, round(0.01 * (1 << LEAK_BITS)))
    x = torch.tensor([-ACTIVATION_LIMIT, -12345, -151, -50, -49, 0, 7, ACTIVATION_LIMIT])
    got = IntegerNetwork([layer])(x[None, None, None]).flatten()
    expected = [(int(v) * 655 + (1 << 15)) >> 16 if v < 0 else int(v) for v in x]
    assert got.tolist() == expected
    restored = IntegerNetwork.from_arrays(IntegerNetwork([layer]).arrays())
    assert torch.equal(restored(x[None, None, None]).flatten(), got)
    for leak, rectify in ((-1, True), (1 << LEAK_BITS, True), (655, False)):
        with pytest.raises(CheckpointError, match="malformed"):
            IntegerConvolution(one, torch.zeros(1), 1, rectify, leak)


def test_leaky_networks_convert():
    torch.manual_seed(0)
    floating = torch.nn.Sequential(
        torch.nn.Conv2d(6, 32, 3, padding=1), torch.nn.PixelShuffle(2), torch.nn.LeakyReLU(),
        torch.nn.Conv2d(8, 5, 3, padding=1),
    )  # fmt: skip
    x = torch.round(torch.randn(1, 6, 5, 4) * 4)
    with torch.no_grad():
        expected = floating(x)
    exact = IntegerNetwork.from_float(floating)
    got = exact(to_fixed(x)).double() / (1 << FRACTION_BITS)
    assert float((got - expected).abs().max()) < 0.01
    relaxed = exact.relaxed(to_fixed(x).float()) / (1 << FRACTION_BITS)
    assert float((relaxed - expected).abs().max()) < 0.01
