"""Exact integer networks against plain int64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compand.coding.integer import (
    ACCUMULATOR_LIMIT,
    ACTIVATION_LIMIT,
    FRACTION_BITS,
    WEIGHT_BITS,
    IntegerConvolution,
    IntegerNetwork,
    WidthShuffle,
    interpolate_levels,
    to_fixed,
)
from compand.errors import CheckpointError


def convolved(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, shuffle: tuple[int, int], rectify: bool
) -> np.ndarray:
    """One layer in int64, a sum at a time: x [batch, in, h, w]."""
    rows, columns = weight.shape[2:]
    frame = ((0, 0), (0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2))
    padded = np.pad(x.astype(np.int64), frame)
    b, _, h, w = x.shape
    total = np.zeros((b, weight.shape[0], h, w), np.int64) + bias.astype(np.int64)[:, None, None]
    for dy in range(rows):
        for dx in range(columns):
            kernel = weight[:, :, dy, dx].astype(np.int64)
            total += np.einsum("oi,bihw->bohw", kernel, padded[:, :, dy : dy + h, dx : dx + w])
    y = (total + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS
    y = y.clip(0 if rectify else -ACTIVATION_LIMIT, ACTIVATION_LIMIT)
    y = y.reshape(b, -1, *shuffle, h, w).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(b, -1, h * shuffle[0], w * shuffle[1])


def random_layer(
    generator: np.random.Generator, inputs: int, outputs: int, kernel: tuple[int, int], full: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Integer weights and biases; `full`: as large as exact arithmetic allows."""
    weight = generator.integers(-4096, 4097, (outputs, inputs, *kernel))
    bias = generator.integers(-(1 << 22), 1 << 22, outputs)
    if full:
        limit = ACCUMULATOR_LIMIT // ACTIVATION_LIMIT - 64
        weight = np.trunc(weight * (limit / np.abs(weight).sum((1, 2, 3), keepdims=True))).astype(np.int64)
    return weight, bias


def network(parts: list[tuple[np.ndarray, np.ndarray, int | tuple[int, int], bool]]) -> IntegerNetwork:
    return IntegerNetwork(
        [IntegerConvolution(torch.from_numpy(w), torch.from_numpy(b), s, r) for w, b, s, r in parts]
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
    shuffle=st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1)]),
    rectify=st.booleans(),
    full=st.booleans(),
    size=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    inputs=st.integers(1, 5),
)
def test_equal_to_int64_arithmetic(seed, kernel, shuffle, rectify, full, size, inputs):
    generator = np.random.default_rng(seed)
    first = *random_layer(generator, inputs, 3 * shuffle[0] * shuffle[1], kernel, full), shuffle, rectify
    second = *random_layer(generator, 3, 2, kernel[::-1], full), (1, 1), not rectify
    third = *random_layer(generator, 2, 3, (1, 1), full), (1, 1), not rectify
    x = generator.integers(-ACTIVATION_LIMIT, ACTIVATION_LIMIT + 1, (size[0], inputs, *size[1:]))
    expected = convolved(convolved(convolved(x, *first), *second), *third)
    got = network([first, second, third])(torch.from_numpy(x))
    assert got.dtype == torch.int32 and np.array_equal(got.numpy(), expected)


def test_sums_at_the_limit_are_exact():
    """Huge products that cancel, in any order, leave the one unit that decides how a sum is rounded."""
    largest = ACCUMULATOR_LIMIT // ACTIVATION_LIMIT // 64 - 1
    weight = np.array([largest] * 32 + [-largest] * 32 + [1])
    units = np.array([-2049, -2048, 2047, 2048])
    x = np.full((1, 65, 1, len(units)), ACTIVATION_LIMIT)
    x[0, -1, 0] = units
    generator = np.random.default_rng(0)
    for _ in range(10):
        order = generator.permutation(65)
        layer = (weight[order].reshape(1, 65, 1, 1), np.zeros(1, np.int64), 1, False)
        assert network([layer])(torch.from_numpy(x[:, order])).flatten().tolist() == [-1, 0, 0, 1]


def test_inputs_and_results_are_clamped():
    same = network([(np.full((1, 1, 1, 1), 1 << WEIGHT_BITS), np.zeros(1, np.int64), 1, False)])
    x = torch.tensor([-(1 << 40), -ACTIVATION_LIMIT - 1, -7, 0, 9, ACTIVATION_LIMIT + 1, 1 << 40])
    expected = x.clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
    assert torch.equal(same(x[None, None, None])[0, 0, 0], expected)
    double = network([(np.full((1, 1, 1, 1), 2 << WEIGHT_BITS), np.zeros(1, np.int64), 1, True)])
    assert torch.equal(double(x[None, None, None])[0, 0, 0], (2 * expected).clamp(0, ACTIVATION_LIMIT))


def test_halves_round_up():
    half = network([(np.full((1, 1, 1, 1), 1 << (WEIGHT_BITS - 1)), np.zeros(1, np.int64), 1, False)])
    x = torch.tensor([-3, -2, -1, 0, 1, 2, 3])
    assert half(x[None, None, None])[0, 0, 0].tolist() == [-1, -1, 0, 0, 1, 1, 2]


def test_accumulators_are_bounded():
    weight = torch.zeros(2, 4, 1, 1)
    weight[1] = ACCUMULATOR_LIMIT // ACTIVATION_LIMIT // 4
    with pytest.raises(CheckpointError, match="must be smaller"):
        IntegerConvolution(weight, torch.zeros(2))
    weight[1, 0] -= 1
    IntegerConvolution(weight, torch.tensor([0.0, ACTIVATION_LIMIT - 1]))
    with pytest.raises(CheckpointError, match="must be smaller"):
        IntegerConvolution(weight, torch.tensor([0.0, -ACTIVATION_LIMIT]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_diverged_weights_are_refused(value):
    with pytest.raises(CheckpointError, match="must be smaller"):
        IntegerConvolution(torch.full((1, 1, 1, 1), value), torch.zeros(1))
    with pytest.raises(CheckpointError, match="must be smaller"):
        IntegerConvolution(torch.zeros(1, 1, 1, 1), torch.tensor([value]))


def test_biases_that_a_checkpoint_cannot_hold_are_refused():
    with pytest.raises(CheckpointError, match="must be smaller"):
        IntegerConvolution(torch.zeros(1, 1, 1, 1), torch.tensor([2.0**31]))
    layer = IntegerConvolution(torch.zeros(1, 1, 1, 1), torch.tensor([2.0**31 - 1], dtype=torch.float64))
    restored = IntegerNetwork.from_arrays(IntegerNetwork([layer]).arrays())
    assert restored.layers[0].bias.item() == (1 << 31) - 1


@pytest.mark.parametrize(
    ("weight", "bias", "shuffle"),
    [((2, 2, 3), 2, 1), ((2, 2, 3, 2), 2, 1), ((2, 2, 2, 2), 2, 1), ((2, 2, 3, 3), 3, 1), ((2, 2, 1, 1), 2, 2),
     ((4, 2, 1, 1), 4, 0), ((4, 2, 1, 1), 4, -1), ((4, 2, 1, 1), 4, (1, 3)), ((4, 2, 1, 1), 4, (0, 1))],
)  # fmt: skip
def test_malformed_layers(weight, bias, shuffle):
    with pytest.raises(CheckpointError):
        IntegerConvolution(torch.zeros(weight), torch.zeros(bias), shuffle)


# ------------------------------------------------------------------------------------------------ from floats


def float_network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(8, 4 * 12, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(),
        nn.Conv2d(12, 4 * 8, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(),
        nn.Conv2d(8, 16, 5, padding=2, bias=False), nn.ReLU(),
        nn.Conv2d(16, 10, 1),
    )  # fmt: skip


def flat_network() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(8, 2 * 12, (1, 3), padding=(0, 1)), WidthShuffle(2), nn.ReLU(),
        nn.Conv2d(12, 2 * 8, (1, 5), padding=(0, 2)), WidthShuffle(2), nn.ReLU(),
        nn.Conv2d(8, 10, 1),
    )  # fmt: skip


def test_conversion_costs_little():
    floating = float_network()
    x = torch.round(torch.randn(2, 8, 5, 7) * 4)
    with torch.no_grad():
        expected = floating(x)
    got = IntegerNetwork.from_float(floating)(to_fixed(x)).double() / (1 << FRACTION_BITS)
    assert got.shape == expected.shape and float(expected.std()) > 0.1
    assert float((got - expected).abs().max()) < 0.01
    assert float((got - expected).square().mean().sqrt()) < 0.002


def test_conversion_along_the_width():
    floating = flat_network()
    x = torch.round(torch.randn(2, 8, 1, 7) * 4)
    with torch.no_grad():
        expected = floating(x)
    exact = IntegerNetwork.from_float(floating)
    got = exact(to_fixed(x)).double() / (1 << FRACTION_BITS)
    assert got.shape == expected.shape == (2, 10, 1, 28)
    assert float((got - expected).abs().max()) < 0.01
    assert [layer.shuffle for layer in exact.layers] == [(1, 2), (1, 2), (1, 1)]


def test_width_shuffle_is_a_pixel_shuffle_of_one_axis():
    x = torch.arange(2 * 6 * 1 * 5).view(2, 6, 1, 5)
    got = WidthShuffle(3)(x)
    assert got.shape == (2, 2, 1, 15)
    for channel in range(2):
        for place in range(15):
            assert torch.equal(got[:, channel, 0, place], x[:, channel * 3 + place % 3, 0, place // 3])


def test_conversion_keeps_structure():
    layers = IntegerNetwork.from_float(float_network()).layers
    assert [(layer.shuffle, layer.rectify) for layer in layers] == [
        ((2, 2), True),
        ((2, 2), True),
        ((1, 1), True),
        ((1, 1), False),
    ]


@pytest.mark.parametrize(
    "part",
    [
        nn.GELU(), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(4, 4, 2), nn.PixelShuffle(2), WidthShuffle(2), nn.ReLU(), nn.Conv2d(4, 4, (1, 3), padding=1),
        nn.Sequential(nn.Conv2d(4, 16, 1), nn.PixelShuffle(2), nn.PixelShuffle(2)),
    ],
    ids=str,
)  # fmt: skip
def test_layers_without_an_integer_form(part):
    with pytest.raises(CheckpointError, match="no integer form"):
        IntegerNetwork.from_float(part if isinstance(part, nn.Sequential) else nn.Sequential(part))


def test_weights_too_large_to_convert():
    layer = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        layer.weight.fill_(1e4)
    with pytest.raises(CheckpointError, match="must be smaller"):
        IntegerNetwork.from_float(nn.Sequential(layer))


def test_to_fixed_rounds_to_nearest():
    x = torch.tensor([0.0, 1.0, -1.0, 0.4 / 1024, -0.6 / 1024, 3.25])
    assert to_fixed(x).tolist() == [0, 1024, -1024, 0, -1, 3328]


# ------------------------------------------------------------------------------------------------- invariance


def test_threads_layout_and_library_change_nothing():
    exact = IntegerNetwork.from_float(float_network())
    x = torch.randint(-100_000, 100_000, (2, 8, 17, 21))
    expected = exact(x)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for layout in (torch.contiguous_format, torch.channels_last):
                exact.to(memory_format=layout)
                assert torch.equal(exact(x), expected)
                assert torch.equal(exact(x.contiguous(memory_format=torch.channels_last)), expected)
                with torch.backends.mkldnn.flags(enabled=False):
                    assert torch.equal(exact(x), expected)
                assert torch.equal(torch.cat([exact(item[None]) for item in x]), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpu_gives_the_same_integers(tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    exact = IntegerNetwork.from_float(float_network())
    x = torch.randint(-100_000, 100_000, (2, 8, 33, 41))
    expected = exact(x)
    assert torch.equal(exact.cuda()(x.cuda()).cpu(), expected)


def test_half_precision_transforms_leave_the_integers_alone():
    """Casting a codec's floating-point parts must not reach these buffers by way of a checkpoint."""
    assert IntegerNetwork.from_float(float_network()).state_dict() == {}


# ---------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(("floating", "columns"), [(float_network, 2), (flat_network, 3)])
def test_arrays_round_trip(floating, columns):
    exact = IntegerNetwork.from_float(floating())
    arrays = exact.arrays()
    assert all(array.dtype == np.int32 for array in arrays.values())
    # Square shuffles are kept as they always were: released checkpoints have two columns.
    assert arrays["shape"].shape == (len(exact.layers), columns)
    restored = IntegerNetwork.from_arrays(arrays)
    x = torch.randint(-100_000, 100_000, (1, 8, 6, 5))
    assert torch.equal(restored(x), exact(x))
    assert {k: v.tolist() for k, v in restored.arrays().items()} == {k: v.tolist() for k, v in arrays.items()}


def _without(name):
    return lambda arrays: arrays.pop(name)


def _with(name, value):
    return lambda arrays: arrays.update({name: np.array(value, np.int32)})


@pytest.mark.parametrize(
    "damage",
    [
        _without("shape"), _without("0.weight"), _without("3.bias"), _with("shape", [1, 1, 1]), _with("shape", []),
        _with("shape", [[2, 1], [2, 1], [1, 1], [3, 0]]), _with("shape", [[1, 1], [2, 1], [1, 1], [1, 0]]),
        _with("shape", [[0, 1], [2, 1], [1, 1], [1, 0]]), _with("0.weight", [1, 2]), _with("0.bias", [1, 2]),
        _with("1.weight", np.zeros((32, 11, 3, 3))), _with("3.weight", np.full((10, 16, 1, 1), 1 << 30)),
    ],
)  # fmt: skip
def test_arrays_that_are_no_network(damage):
    arrays = IntegerNetwork.from_float(float_network()).arrays()
    damage(arrays)
    with pytest.raises(CheckpointError):
        IntegerNetwork.from_arrays(arrays)


# ---------------------------------------------------------------------------------------------- interpolation


@given(low=st.integers(-(10**6), 10**6), high=st.integers(-(10**6), 10**6), quality=st.integers(32, 96))
def test_levels_are_interpolated_in_integers(low, high, quality):
    table = torch.tensor([[low], [high], [low]])
    (got,) = interpolate_levels(table, quality, 32).tolist()
    exact = np.interp(quality / 32, [1, 2, 3], [low, high, low])
    assert abs(got - exact) <= 0.5 + 1e-6
    if quality % 32 == 0:
        assert got == exact


def test_one_level_needs_no_interpolation():
    assert interpolate_levels(torch.tensor([[5, -6]]), 32, 32).tolist() == [5, -6]
