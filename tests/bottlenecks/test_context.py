"""The context bottleneck: what each context sees, its integer form against its floats, and where training starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compand import checkpoint
from compand.bottlenecks.context import CONTEXTS, ContextBottleneck, uneven
from compand.bottlenecks.factorized import FactorizedDensity
from compand.bottlenecks.hyperprior import HyperpriorBottleneck
from compand.coding.tables import TableSet
from compand.context import ContextCodec
from compand.errors import CheckpointError, UsageError
from compand.hyperprior import HyperpriorCodec
from compand.weights import warm_start

LAMBDAS = [0.002, 0.01, 0.05, 0.25]
SLICES = (2, 4, 6)
SIZES = {"channel": [6, 5], "local": 5, "attention": 4, "hidden": [10, 8], "correction": 6}
QUALITY = 77
M, HEIGHT, WIDTH = 12, 9, 14


def make(
    contexts: Sequence[str] = CONTEXTS, *, trainable: bool = True, steep: float = 0.2, **arguments: Any
) -> ContextBottleneck:
    """A small bottleneck whose networks say something, in evaluation mode; `steep`: how much."""
    torch.manual_seed(0)
    arguments = {"slices": SLICES, "sizes": SIZES} | arguments
    bottleneck = ContextBottleneck(M, LAMBDAS, 4, (4, 4, 8), trainable, contexts=contexts, **arguments)
    if trainable:
        with torch.no_grad():
            for name, parameter in bottleneck.networks.named_parameters():
                if "parameters" in name or "correction" in name or "excitation" in name:
                    parameter.normal_(0, steep)
            bottleneck.hyper_synthesis[-1].weight.mul_(10)
            bottleneck.hyper_synthesis[-1].bias[M:] = 0.5
    return bottleneck.eval()


def latents(batch: int = 1, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, M, height, width, generator=generator) * torch.linspace(2, 0.2, M)[:, None, None]
    )


def frozen(contexts: Sequence[str] = CONTEXTS, **arguments: Any) -> ContextBottleneck:
    bottleneck = make(contexts, **arguments)
    bottleneck.freeze()
    return bottleneck


def without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in CONTEXTS if name not in names)


def levels(value: int) -> Tensor:
    return torch.tensor([value])


# ------------------------------------------------------------------------------------------------ bytes and steps


@pytest.mark.parametrize("contexts", [CONTEXTS, (), *(without(name) for name in CONTEXTS)], ids=str)
def test_bytes_give_what_forward_gave(contexts):
    bottleneck = frozen(contexts)
    for height, width, quality in ((1, 1, 32), (1, 2, 128), (HEIGHT, WIDTH, QUALITY)):
        y = latents(2, height, width)
        with torch.inference_mode():
            output = bottleneck(y, torch.full((2,), quality))
            payloads = bottleneck.compress(y, quality)
            assert torch.equal(bottleneck.decompress(payloads, (height, width), quality), output.y_hat)
        for payload, bits in zip(payloads, output.bits.tolist(), strict=True):
            assert abs(8 * len(payload) - bits) < 64


@pytest.mark.parametrize(
    ("contexts", "steps"),
    [
        (CONTEXTS, 6),
        ((), 3),
        (("channel", "global_inter", "reweighting", "residual_prediction"), 3),
        (("local",), 6),
        (("global_intra",), 5),
        (("global_hyper",), 4),
    ],
    ids=str,
)
def test_a_slice_takes_two_steps_where_its_halves_know_of_each_other(contexts, steps):
    bottleneck = frozen(contexts)
    y = latents()
    coded = bottleneck._coded(y, bottleneck._hyper_steps(y, QUALITY), QUALITY)
    assert len(coded.y) == steps == sum(bottleneck.halves(part) for part in bottleneck.slices)
    assert sum(symbols.size for _, symbols in coded.y) == y.numel()
    single = y[..., :1, :1]
    assert len(bottleneck._coded(single, bottleneck._hyper_steps(single, QUALITY), QUALITY).y) == 3


# -------------------------------------------------------------------------------------------- what contexts see


def tables_by_place(bottleneck: ContextBottleneck, y: Tensor) -> np.ndarray:
    """Table of each element of y [1, M, h, w], around the same hyper-latents whatever y is."""
    shape = bottleneck._z_shape(y.shape[2:])
    z = torch.ones(1, 4, *shape)
    board = bottleneck._board(y)
    result = np.zeros((M, y.shape[2] * y.shape[3]))
    steps = iter(bottleneck._coded(y, z, QUALITY).y)
    for part in bottleneck.slices:
        for places in board.halves if bottleneck.halves(part) == 2 else board.whole:
            result[part.channels, places] = next(steps)[0][0, :, 0]
    spread = board.spread(torch.from_numpy(result)[None, :, None])[0]
    return np.asarray(spread.numpy())


def seen_from(contexts: Sequence[str], channel: int, row: int, column: int) -> np.ndarray:
    """Whether the table of each element [M, h, w] depends on one that is changed."""
    bottleneck = frozen(contexts, steep=3.0)
    y = latents()
    changed = y.clone()
    changed[0, channel, row, column] += 40
    difference = tables_by_place(bottleneck, y) != tables_by_place(bottleneck, changed)
    return np.asarray(difference)


ANCHOR, OTHER = (4, 6), (4, 7)
ODD = (np.arange(HEIGHT)[:, None] + np.arange(WIDTH)) % 2 == 1


def near(place: tuple[int, int], reach: int) -> np.ndarray:
    rows, columns = np.arange(HEIGHT)[:, None] - place[0], np.arange(WIDTH) - place[1]
    return np.asarray(np.maximum(abs(rows), abs(columns)) <= reach)


@pytest.mark.parametrize("place", [ANCHOR, OTHER], ids=["anchor", "other"])
def test_channel_context_is_the_neighbourhood_in_later_slices(place):
    seen = seen_from(("channel",), 3, *place)
    assert not seen[:6].any() and seen[6:].any()
    assert not seen[:, ~near(place, 2)].any() and seen[6:, near(place, 1)].any()


@pytest.mark.parametrize("place", [ANCHOR, OTHER], ids=["anchor", "other"])
def test_global_inter_is_all_positions_in_later_slices(place):
    seen = seen_from(("global_inter",), 3, *place)
    assert not seen[:6].any()
    assert seen[6:].any(0)[~near(place, 4)].mean() > 0.2


def test_local_context_is_anchors_nearby_in_the_same_slice():
    seen = seen_from(("local",), 3, *ANCHOR)
    assert not seen[:2].any() and not seen[6:].any()
    assert not seen[:, ~(ODD & near(ANCHOR, 2))].any() and seen[2:6].any()
    # In the corners of the window, on its edges, and next to the anchor.
    reached = seen[2:6].any(0)
    assert reached[ODD & near(ANCHOR, 2)].sum() > 8
    assert not seen_from(("local",), 3, *OTHER).any()


@pytest.mark.parametrize(
    ("name", "channel", "channels"), [("global_intra", 3, (2, 6)), ("global_hyper", 1, (0, 2))]
)
def test_global_contexts_within_a_slice_are_all_anchors(name, channel, channels):
    seen = seen_from((name,), channel, *ANCHOR)
    own = seen[slice(*channels)]
    assert own.any(0)[ODD & ~near(ANCHOR, 4)].mean() > 0.2 and not own[:, ~ODD].any()
    # Nothing beyond the slice: of the slice before, attention takes what is alike, which is no word about this one's
    # anchors; but where they are looked up changes with it.
    assert not seen[: channels[0]].any()
    assert not seen_from((name,), channel, *OTHER)[slice(*channels)].any()
    elsewhere = 1 if name == "global_intra" else 3
    assert not seen_from((name,), elsewhere, *ANCHOR)[:2].any()


def test_reweighting_and_correction_have_no_context_of_their_own():
    assert not seen_from(("reweighting", "residual_prediction"), 3, *ANCHOR).any()


def test_reweighting_sees_the_mean_over_the_picture():
    alone, gated = (seen_from(names, 3, *ANCHOR)[6:] for names in (("channel",), ("channel", "reweighting")))
    assert gated[:, ~near(ANCHOR, 2)].any() and not alone[:, ~near(ANCHOR, 2)].any()


def test_corrections_stay_within_half_a_step():
    y, quality = latents(), levels(96)
    plain, corrected = frozen(without("residual_prediction")), frozen(steep=5.0)
    errors = []
    for bottleneck in (plain, corrected):
        with torch.inference_mode():
            errors.append((bottleneck(y, quality).y_hat - y) / bottleneck._gains(96)[1])
    assert float(errors[0].abs().max()) < 0.51
    assert 0.51 < float(errors[1].abs().max()) < 1.01


@pytest.mark.parametrize("quality", [32, 45, 48, 113, 128])
def test_large_values_are_restored_at_every_quality(quality):
    """Between levels too the encoder's gain is the decoder's inverse one: no share of the value is lost."""
    bottleneck = frozen(())
    y = 500 * latents()
    with torch.inference_mode():
        error = (bottleneck(y, levels(quality)).y_hat - y) / bottleneck._gains(quality)[1]
    assert float(error.abs().max()) < 0.52


def test_quality_reaches_the_networks():
    planes = make()._planes(torch.tensor([32, 48, 64, 128]))[:, :, 0, 0]
    expected = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert torch.equal(planes, expected)


# ---------------------------------------------------------------------------------------- floats and integers


@pytest.mark.parametrize("quality", [32, QUALITY, 128])
def test_integers_cost_nothing(quality):
    """Trained floats in evaluation mode against the integers made of them, symbols rounded alike."""
    y, bottleneck = latents(1, 16, 24), make()
    with torch.no_grad():
        floating = bottleneck(y, levels(quality))
        bottleneck.freeze()
        exact = bottleneck(y, levels(quality))
        z_bits = bottleneck.z_tables.bits(*reversed(bottleneck.count(y, quality)[0])).sum()
        z_floating, _ = bottleneck._side_information(y, levels(quality))
    assert float(exact.bits) - z_bits == pytest.approx(float(floating.bits - z_floating), rel=0.005)
    steps = (exact.y_hat - floating.y_hat).abs() / bottleneck._gains(quality)[1]
    # A symbol that falls on the other side of a half is a step off, and few do.
    assert float((steps > 0.1).float().mean()) < 0.03 and float(steps.median()) < 0.02


def test_a_frozen_state_decodes_elsewhere_and_is_thawed():
    source, other, trainable = frozen(), make(trainable=False), make()
    arrays = source.frozen_arrays()
    other.load_state_dict(source.state_dict(), strict=False)
    other.load_frozen(arrays)
    y = latents(2)
    with torch.inference_mode():
        payloads = source.compress(y, QUALITY)
        decoded = other.decompress(payloads, (HEIGHT, WIDTH), QUALITY)
        assert torch.equal(decoded, source(y, torch.full((2,), QUALITY)).y_hat)
    assert {k: v.tolist() for k, v in other.frozen_arrays().items()} == {
        k: v.tolist() for k, v in arrays.items()
    }
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.mul_(0.5)
    trainable.y_gain.load_state_dict(source.y_gain.state_dict())
    trainable.thaw(arrays)
    trainable.freeze()
    thawed = trainable.frozen_arrays()
    for name in arrays:
        if name.startswith(("slices.", "prior.", "shift", "inverse")):
            assert np.array_equal(thawed[name], arrays[name]), name


def test_what_other_slices_leave_is_the_hyperprior():
    source, other = frozen(), make(without("local"), steep=0.3)
    other.y_gain.load_state_dict(source.y_gain.state_dict())
    before = {name: parameter.clone() for name, parameter in other.networks.named_parameters()}
    other.hyper_synthesis[-1].weight.data.zero_()
    other.thaw(source.frozen_arrays())
    assert all(torch.equal(parameter, before[name]) for name, parameter in other.networks.named_parameters())
    other.freeze()
    thawed, arrays = other.frozen_arrays(), source.frozen_arrays()
    assert all(np.array_equal(thawed[name], arrays[name]) for name in arrays if name.startswith("prior."))


def test_integers_that_do_not_fit_are_refused():
    arrays = frozen().frozen_arrays()
    target = make(trainable=False)
    weight, inverse = arrays["slices.1.weight"], arrays["inverse"]
    changes = [
        {"slices.1.weight": weight[:-1]},
        {"slices.1.weight": np.append(weight, 0).astype(np.int32)},
        {"slices.1.weight": np.full_like(weight, 1 << 30)},
        {"slices.2.bias": arrays["slices.2.bias"][None]},
        {"inverse": inverse[:-1]},
        {"inverse": 0 * inverse},
        {"inverse": inverse + (1 << 21)},
    ]
    for change in changes:
        with pytest.raises(CheckpointError):
            target.load_frozen(arrays | change)
    for other in (make((), trainable=False), make(trainable=False, slices=(3, 3, 6))):
        with pytest.raises(CheckpointError, match="slice 0"):
            other.load_frozen(arrays)
    target.load_frozen(arrays)


def test_arguments_that_do_not_exist():
    for arguments, fact in (
        ({"slices": (4, 4)}, "do not make 12"),
        ({"slices": (12, 0)}, "do not make 12"),
        ({"contexts": ("local", "serial")}, "'serial' does not exist"),
        ({"sizes": {"width": 4}}, "sizes are channel, local"),
    ):
        with pytest.raises(UsageError, match=fact):
            make(**{"contexts": CONTEXTS, "trainable": False, **arguments})
    with pytest.raises(UsageError, match="2 widths"):
        ContextBottleneck(M, LAMBDAS, 4, (4, 8), slices=SLICES)
    assert uneven(256) == (16, 16, 32, 64, 128) and sum(uneven(40)) == 40


# ------------------------------------------------------------------------------------------------- where it starts


def test_it_starts_as_the_hyperprior():
    torch.manual_seed(0)
    plain = HyperpriorBottleneck(M, LAMBDAS, 4, (4, 4, 8)).eval()
    context = ContextBottleneck(M, LAMBDAS, 4, (4, 4, 8), slices=SLICES, sizes=SIZES).eval()
    context.load_state_dict(plain.state_dict(), strict=False)
    for quality in (32, 64, 128):
        with torch.no_grad():
            expected, got = (each(latents(), levels(quality)) for each in (plain, context))
        torch.testing.assert_close(got.bits, expected.bits)
        torch.testing.assert_close(got.y_hat, expected.y_hat)


def test_training_starts_from_a_hyperprior_with_fewer_blocks(checkpoint_of, scenery):
    info = checkpoint.read_info(checkpoint_of("hyperprior"))
    deeper = info.architecture | {"stages": [[8, 24, 3], [16, 32, 2]]}
    codec = ContextCodec(**deeper, context={"slices": [8, 16, 24], "sizes": SIZES}).eval()
    hyperprior = HyperpriorCodec(**info.architecture).eval()
    for each in (codec, hyperprior):
        warm_start(each, info)
    x = torch.from_numpy(scenery[:64, :96]).permute(2, 0, 1)[None].float() / 255
    quality = levels(96)
    with torch.no_grad():
        y, expected_y = (each.transform.analysis(x, quality) for each in (codec, hyperprior))
        torch.testing.assert_close(y, expected_y)
        got, expected = (each.bottleneck(expected_y, quality) for each in (codec, hyperprior))
        torch.testing.assert_close(got.y_hat, expected.y_hat)
        # The densities of z are learned from the tables each time.
        assert float(got.bits) == pytest.approx(float(expected.bits), rel=0.02)
        images = [each.transform.synthesis(expected_y, quality) for each in (codec, hyperprior)]
        torch.testing.assert_close(*images)
    # They have something to learn by.
    block = codec.transform.synthesis_blocks[0][2]
    codec.transform.synthesis(expected_y, quality).square().sum().backward()
    assert not block.project.weight.any() and float(block.project.weight.grad.abs().max()) > 0


def test_densities_learn_what_tables_say():
    masses = [np.array([1, 2, 8, 4, 1]) / 16, np.exp(-np.abs(np.arange(-20, 21)) / 5.0)]
    tables = TableSet.from_masses(masses, np.array([-1, -20], dtype=np.int32), [1e-4, 1e-4])
    density = FactorizedDensity(2)
    density.fit(tables)
    learned, lows, _ = density.masses(torch.ones(2))
    for mass, low, target, first in zip(learned, lows, masses, (-1, -20), strict=True):
        target = target / target.sum()
        found = np.array([mass[k - low] for k in range(first, first + len(target))])
        assert float((target * np.log2(target / found)).sum()) < 0.1
    assert all(parameter.grad is None for parameter in density.parameters())


def test_gradients_reach_every_network_under_autocast():
    bottleneck = make().train()
    y = latents(2, 8, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = bottleneck(y, torch.tensor([40, 120]))
    (output.bits.sum() + output.y_hat.square().sum()).backward()
    assert output.y_hat.dtype == output.bits.dtype == torch.float32
    for name, parameter in bottleneck.networks.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Of so few channels, rectifiers of a gate may be shut for both items.
        assert parameter.grad.any() or "excitation" in name, name
