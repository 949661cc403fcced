"""Encode-time refinement: its parts against what they stand in for, and its files against those without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from compand import checkpoint, cli, image_codec, refinement, registry
from compand.coding.container import read_header
from compand.coding.integer import IntegerNetwork
from compand.coding.tables import TableSet
from compand.errors import UsageError
from compand.pictures import Picture, psnr
from compand.refinement import NOISE, Relaxation, Rounded, Schedule, SoftRounding, TableCosts
from compand.weights import build

IMAGE_CODECS = [entry.name for entry in registry.entries() if entry.medium == "image"]
AUDIO_CODECS = [entry.name for entry in registry.entries() if entry.medium == "audio"]
HARD = 1e-3
"""A temperature at which every choice falls on the nearest integer."""


def rounding(temperature: float, seed: int = 0) -> SoftRounding:
    return SoftRounding(temperature, torch.Generator().manual_seed(seed))


WHOLE = refinement.SCHEDULES


def limit_steps(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    short = [schedule._replace(steps=min(schedule.steps, steps)) for schedule in WHOLE]
    monkeypatch.setattr(refinement, "SCHEDULES", tuple(short))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    limit_steps(monkeypatch, 12)


@pytest.fixture(params=IMAGE_CODECS)
def codec(request, exact):
    codec = exact(request.param)
    if not codec.bottleneck.refinable:
        pytest.skip(f"{request.param} has no rate with a gradient")
    return codec


@pytest.fixture(scope="session")
def crop(scenery):
    return scenery[150:246, 200:328]


def cost(codec, pixels: np.ndarray, data: bytes) -> float:
    """R + lambda D in bits, of real bytes and of the picture that a decoder gives."""
    error = np.square(codec.decode(data).pixels.astype(float) - pixels).sum() / pixels.shape[2]
    return 8 * len(data) + codec.multiplier_at(read_header(data).settings[0]) * float(error)


# ------------------------------------------------------------------------------------------------- parts


def test_soft_rounding_hardens_to_the_nearest_integer():
    x = torch.tensor([-2.7, -0.4, 0.0, 0.3, 1.0, 1.8, 40.25])
    rounded = rounding(HARD)(x)
    assert torch.equal(rounded.low, x.floor().long())
    torch.testing.assert_close(rounded.value, x.round())


@pytest.mark.parametrize("temperature", [0.5, 0.2])
def test_soft_rounding_chooses_by_distance_and_at_random(temperature):
    x = torch.tensor([[0.1], [0.4], [0.5], [0.6], [0.9]]).expand(-1, 20_000)
    chosen = (rounding(temperature)(x).share > 0.5).float().mean(1)
    above = x[:, 0].double()
    preference = (torch.atanh(above) - torch.atanh(1 - above)) / temperature
    # Noise of scale NOISE makes a choice with the logit preference / NOISE.
    torch.testing.assert_close(chosen.double(), torch.sigmoid(preference / NOISE), rtol=0, atol=0.015)


def test_soft_rounding_has_a_gradient_and_a_seed():
    x = torch.full((1000,), 0.4, requires_grad=True)
    first = rounding(0.5)(x)
    first.value.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.mean() > 0.1
    assert torch.equal(first.share, rounding(0.5)(x).share)
    assert not torch.equal(first.share, rounding(0.5, seed=1)(x).share)


def test_costs_are_those_of_the_tables_and_linear_between():
    tables = TableSet.gaussian([0.3, 2.0, 9.0])
    costs = TableCosts(tables, [2, 0], torch.device("cpu"))
    values = torch.arange(-int(tables.sizes.max()) // 2, int(tables.sizes.max()) // 2).repeat(2, 1)
    row = torch.tensor([[0], [1]])
    table = np.repeat([2, 0], values.shape[1])
    expected = torch.from_numpy(tables.bits(values.numpy().ravel(), table)).float().view(2, -1)
    torch.testing.assert_close(costs(Rounded(values, torch.zeros(values.shape)), row), expected)
    torch.testing.assert_close(costs(Rounded(values - 1, torch.ones(values.shape)), row), expected)
    between = costs(Rounded(values, torch.full(values.shape, 0.25)), row)[:, :-1]
    torch.testing.assert_close(between, 0.75 * expected[:, :-1] + 0.25 * expected[:, 1:])


def test_values_beyond_all_tables_cost_what_the_last_ones_do():
    costs = TableCosts(TableSet.gaussian([1.0]), [0], torch.device("cpu"))
    far = torch.tensor([-(1 << 30), -100_000, 100_000, 1 << 30])
    bits = costs(Rounded(far, torch.zeros(4)), torch.zeros(4, dtype=torch.long))
    assert bits.isfinite().all() and (bits > 20).all()


def test_a_relaxed_network_differs_by_rounding_alone():
    torch.manual_seed(0)
    layers = (nn.Conv2d(6, 32, 3, 1, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(8, 5, 1))
    network = IntegerNetwork.from_float(nn.Sequential(*layers))
    x = torch.randint(-5000, 5000, (2, 6, 7, 9))
    relaxed = x.float().requires_grad_()
    result = network.relaxed(relaxed)
    assert (result - network(x)).abs().max() < 4
    result.sum().backward()
    assert relaxed.grad is not None and relaxed.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------ relaxations


@pytest.mark.parametrize("level", [32, 100, 256])
def test_latents_that_no_step_has_moved_are_coded_as_ever(codec, crop, level):
    with torch.no_grad():
        y = codec.analyse(crop, image_codec.tile_rows(96, 128, 0)[0][0], level)
        payload, y_hat = codec.bottleneck.relaxed(y, level).code()
    assert [payload] == codec.bottleneck.compress(y, level)
    assert torch.equal(y_hat, codec.bottleneck(y, torch.tensor([level])).y_hat)


@pytest.mark.parametrize("level", [32, 100, 256])
def test_hard_samples_are_what_is_coded(codec, crop, level):
    with torch.no_grad():
        y = codec.analyse(crop, image_codec.tile_rows(96, 128, 0)[0][0], level)
        relaxation = codec.bottleneck.relaxed(y, level)
        payload, coded = relaxation.code()
        bits, y_hat = relaxation.sample(rounding(HARD))
    assert float(bits) == pytest.approx(8 * len(payload), rel=0.03, abs=64)
    # Where the relaxed prior's mean is not the rounded one's, a value half-way goes to the other side.
    assert (y_hat - coded).abs().median() < 0.01 and (y_hat - coded).square().mean() < 0.02 * coded.var()


def test_moved_latents_decode_to_what_the_search_saw(codec, crop):
    with torch.no_grad():
        y = codec.analyse(crop, image_codec.tile_rows(96, 128, 0)[0][0], 100)
        relaxation = codec.bottleneck.relaxed(y, 100)
        generator = torch.Generator().manual_seed(0)
        for variable in relaxation.variables:
            variable.add_(3 * torch.randn(variable.shape, generator=generator))
        payload, y_hat = relaxation.code()
    assert torch.equal(codec.bottleneck.decompress([payload], tuple(y.shape[2:]), 100), y_hat)


def test_every_variable_has_a_gradient(codec, crop):
    with torch.no_grad():
        y = codec.analyse(crop, image_codec.tile_rows(96, 128, 0)[0][0], 100)
        relaxation = codec.bottleneck.relaxed(y, 100)
    bits, y_hat = relaxation.sample(rounding(0.5))
    for loss in (bits, y_hat.square().sum()):
        gradients = torch.autograd.grad(loss, relaxation.variables, retain_graph=True, allow_unused=True)
        assert any(part is not None and part.abs().sum() > 0 for part in gradients)
    for part in torch.autograd.grad(bits, relaxation.variables):
        assert part.isfinite().all() and part.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("quality", [2, 6.5])
def test_refined_files_cost_less(codec, crop, quality, monkeypatch):
    limit_steps(monkeypatch, 25)
    plain, refined = (codec.encode(crop, quality=quality, effort=effort) for effort in (0, 1))
    assert cost(codec, crop, refined) < 0.995 * cost(codec, crop, plain)
    assert read_header(refined) == read_header(plain)
    codec.check(refined)


def test_the_same_picture_gives_the_same_file(codec, crop):
    first = codec.encode(crop, effort=1)
    torch.manual_seed(5)
    with torch.inference_mode():
        assert codec.encode(crop, effort=1) == first


def test_what_gets_no_better_stays_as_it_is(codec, crop, monkeypatch):
    def spoil(relaxation, distortion, schedule, report):
        with torch.no_grad():
            for variable in relaxation.variables:
                variable.add_(5)

    monkeypatch.setattr(image_codec, "anneal", spoil)
    assert codec.encode(crop, effort=3) == codec.encode(crop)


@pytest.mark.parametrize(
    ("size", "channels"), [((1, 1), 3), ((2, 70), 1), ((33, 17), 1), ((33, 17), 3)], ids=str
)
def test_any_size_gray_or_color_with_alpha(codec, scenery, size, channels):
    pixels = np.ascontiguousarray(scenery[: size[0], : size[1], :channels])
    alpha = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    plain, refined = (codec.encode(Picture(pixels, alpha, None), effort=effort) for effort in (0, 1))
    assert cost(codec, pixels, refined) <= cost(codec, pixels, plain)
    decoded = codec.decode(refined)
    assert decoded.pixels.shape == pixels.shape and np.array_equal(decoded.alpha, alpha)


def test_tiles_are_refined_for_the_pixels_around_them_too(codec, scenery, monkeypatch):
    edge = 2 * -(-codec.transform.context // 64) * 64
    monkeypatch.setattr(image_codec, "TILE", edge)
    pixels = scenery[: edge + 40, : edge + 70]
    if min(pixels.shape[:2]) <= edge:
        pixels = np.tile(scenery, (2, 2, 1))[: edge + 40, : edge + 70]
    seen = []
    refine = codec._refine_tile

    def watch(*arguments):
        candidate = arguments[2]
        before = candidate.payload
        refine(*arguments)
        seen.append(candidate.payload != before)

    monkeypatch.setattr(codec, "_refine_tile", watch)
    limit_steps(monkeypatch, 8)
    counted = []
    plain = codec.encode(pixels)
    refined = codec.encode(pixels, effort=1, progress=lambda done, total: counted.append((done, total)))
    assert len(seen) == read_header(refined).chunk_count() == 4 and any(seen)
    assert cost(codec, pixels, refined) < cost(codec, pixels, plain)
    assert counted == [(i + 1, 32) for i in range(32)]


@pytest.mark.parametrize("bpp", [0.9, 1.7])
def test_a_limit_of_bpp_is_kept_at_a_better_psnr(codec, crop, bpp):
    plain, refined = (codec.encode(crop, bpp=bpp, effort=effort) for effort in (0, 1))
    assert 8 * len(refined) / (96 * 128) <= bpp
    assert psnr(crop, codec.decode(refined).pixels) >= psnr(crop, codec.decode(plain).pixels)


def test_a_limit_of_psnr_is_kept_in_fewer_bytes(codec, crop):
    best = psnr(crop, codec.decode(codec.encode(crop, quality=5)).pixels)
    plain, refined = (codec.encode(crop, psnr=best - 0.1, effort=effort) for effort in (0, 1))
    assert psnr(crop, codec.decode(refined).pixels) >= best - 0.1
    assert len(refined) <= len(plain)


@pytest.mark.parametrize("name", IMAGE_CODECS)
def test_a_multiplier_is_interpolated_as_in_training(exact, name):
    codec = exact(name)
    assert codec.multiplier_at(32) == pytest.approx(codec.lambdas[0])
    assert codec.multiplier_at(32 * codec.levels) == pytest.approx(codec.lambdas[-1])
    middle = (codec.lambdas[0] * codec.lambdas[1]) ** 0.5
    assert codec.multiplier_at(48) == pytest.approx(middle)


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("effort", [-1, 4, 1.5, "2"])
def test_efforts_that_do_not_exist(exact, crop, effort):
    with pytest.raises(UsageError, match="does not exist: choose 0"):
        exact("hyperprior").encode(crop, effort=effort)


@pytest.mark.parametrize("name", IMAGE_CODECS)
def test_codecs_without_such_a_rate_say_so(exact, crop, name):
    codec = exact(name)
    if codec.bottleneck.refinable:
        pytest.skip("it has one")
    with pytest.raises(UsageError, match=f"files of {name} are not refined"):
        codec.encode(crop, effort=1)
    with pytest.raises(UsageError, match="no gradient"):
        codec.bottleneck.relaxed(torch.zeros(1, codec.transform.latent_channels, 2, 2), 32)


@pytest.mark.parametrize("name", AUDIO_CODECS)
def test_sounds_are_not_refined(exact, name):
    codec = exact(name)
    with pytest.raises(UsageError, match="are not refined"):
        codec.encode(np.zeros((codec.channels, 100), np.float32), effort=1)


# ----------------------------------------------------------------------------------------- command line


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


def test_the_command_line_refines(checkpoint_of, crop, tmp_path, capsys):
    Image.fromarray(crop).save(tmp_path / "a.png")
    place, folder = str(tmp_path / "a.png"), str(checkpoint_of("hyperprior"))
    common = (place, "-c", folder, "-q", "3", "--device", "cpu")
    assert run("encode", *common, "-o", str(tmp_path / "0.cpd")) == 0
    assert run("encode", *common, "-o", str(tmp_path / "1.cpd"), "--effort", "1") == 0
    plain, refined = ((tmp_path / f"{effort}.cpd").read_bytes() for effort in (0, 1))
    assert plain != refined
    assert run("decode", str(tmp_path / "1.cpd"), "-c", folder, "-o", str(tmp_path / "b.png")) == 0
    assert capsys.readouterr().err == ""


def test_the_command_line_refuses_sounds(tmp_path, capsys):
    (tmp_path / "a.wav").write_bytes(b"")
    assert run("encode", str(tmp_path / "a.wav"), "--effort", "2") == 2
    error = capsys.readouterr().err
    assert "a.wav is coded as a sound: --effort is for pictures" in error and error.count("\n") == 1


# -------------------------------------------------------------------------------------------------- on GPUs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def note_captures(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each attempt to capture a step went well."""
    noted: list[bool] = []
    capture = refinement._Descent._capture

    def noting(descent: refinement._Descent) -> None:
        capture(descent)
        noted.append(descent._graph is not None)

    monkeypatch.setattr(refinement._Descent, "_capture", noting)
    return noted


@needs_gpu
@pytest.mark.parametrize("name", IMAGE_CODECS)
def test_captured_steps_find_files_that_every_machine_decodes(name, checkpoint_of, exact, crop, monkeypatch):
    codec = build(checkpoint.read_info(checkpoint_of(name)), "cuda")
    if not codec.bottleneck.refinable:
        pytest.skip(f"{name} has no rate with a gradient")
    noted = note_captures(monkeypatch)
    plain, refined = (codec.encode(crop, quality=3, effort=effort) for effort in (0, 1))
    assert noted == [True]
    assert cost(codec, crop, refined) < 0.995 * cost(codec, crop, plain)
    assert codec.encode(crop, quality=3, effort=1) == refined
    difference = codec.decode(refined).pixels.astype(int) - exact(name).decode(refined).pixels
    assert np.abs(difference).max() <= 8 and np.abs(difference).mean() < 0.5


class Bowl(Relaxation):
    """Bits that are least where the variables are 2."""

    def __init__(self) -> None:
        self.variables = [torch.zeros(8, device="cuda").requires_grad_()]

    def sample(self, rounding: SoftRounding) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.variables[0]
        noise = torch.rand(8, generator=rounding.generator, device="cuda") - 0.5
        return (x + 0.01 * noise - 2).square().sum(), x

    def code(self) -> tuple[bytes, torch.Tensor]:
        return b"", self.variables[0]


@needs_gpu
@pytest.mark.parametrize("waits", [False, True])
def test_steps_that_cannot_be_captured_go_on(waits, monkeypatch):
    noted = note_captures(monkeypatch)
    bowl, done = Bowl(), []

    def distortion(y_hat: torch.Tensor) -> torch.Tensor:
        return y_hat.sum() * (0.0 * float(y_hat[0]) if waits else 0.0)

    refinement.anneal(bowl, distortion, Schedule(200, 0.1), lambda: done.append(1))
    assert noted == [not waits] and len(done) == 200
    assert (bowl.variables[0].detach().cpu() - 2).abs().max() < 0.2
