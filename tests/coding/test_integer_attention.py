"""Attention, gates and neighbourhoods on integers against plain int64 arithmetic and against their trainable forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compand.coding.checkerboard import TAPS, AnchorConvolution, IntegerAnchorConvolution, checkerboard
from compand.coding.integer import (
    ACTIVATION_LIMIT,
    FRACTION_BITS,
    WEIGHT_BITS,
    IntegerConvolution,
    IntegerNetwork,
    to_fixed,
)
from compand.coding.integer_attention import (
    LARGEST_KEY,
    LARGEST_VALUE,
    ChannelGate,
    IntegerAttention,
    IntegerGate,
    LinearAttention,
)
from compand.errors import CheckpointError

ONE = 1 << FRACTION_BITS
LARGEST_TILE = 128 * 128
"""Positions of the largest tile that decoders accept, at 1/16 resolution."""


def layer(weight: np.ndarray, bias: np.ndarray, rectify: bool = False) -> IntegerNetwork:
    """A network of one layer of kernel 1; weights [out, in]."""
    convolution = IntegerConvolution(
        torch.from_numpy(weight)[..., None, None], torch.from_numpy(bias), rectify=rectify
    )
    return IntegerNetwork([convolution])


def applied(weight: np.ndarray, bias: np.ndarray, x: np.ndarray) -> np.ndarray:
    """That layer in int64: x [batch, in, n]."""
    total = np.einsum("oi,bin->bon", weight, x.clip(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)) + bias[:, None]
    return ((total + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS).clip(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)


def quotient(dividend: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """The nearest integers, in int64; half way they are rounded up."""
    return (dividend + divisor // 2) // divisor


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention in int64, from what the layers give: [batch, c, n], [batch, c, m], [batch, d, m]."""
    q, k = (x.clip(0, LARGEST_KEY * ONE) + 1 for x in (q, k))
    v = v.clip(-LARGEST_VALUE * ONE, LARGEST_VALUE * ONE)
    gathered = quotient(np.einsum("bcm,bdm->bcd", k, v), k.sum(2, keepdims=True))
    return quotient(np.einsum("bcd,bcn->bdn", gathered, q), q.sum(1, keepdims=True))


def random_layer(generator: np.random.Generator, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    return generator.integers(-8192, 8193, (outputs, inputs)), generator.integers(
        -(1 << 24), 1 << 24, outputs
    )


SIZES = {
    "seed": st.integers(0, 2**32 - 1),
    "channels": st.tuples(st.integers(1, 5), st.integers(1, 4)),
    "batch": st.integers(1, 2),
    "largest": st.sampled_from([1, 50, 4000, 1 << 17, 1 << 20]),
}


@settings(max_examples=60, deadline=None)
@given(**SIZES, width=st.integers(1, 6), positions=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_attention_equals_int64_arithmetic(seed, channels, batch, largest, width, positions):
    generator = np.random.default_rng(seed)
    parts = [random_layer(generator, count, width) for count in (channels[0], channels[0], channels[1])]
    shapes = zip(
        (channels[0], channels[0], channels[1]), (positions[0], positions[1], positions[1]), strict=True
    )
    inputs = [generator.integers(-largest, largest + 1, (batch, *shape)) for shape in shapes]
    expected = attended(*(applied(*part, x) for part, x in zip(parts, inputs, strict=True)))
    got = IntegerAttention(*(layer(*part) for part in parts))(
        *(torch.from_numpy(x)[:, :, None] for x in inputs)
    )
    assert got.dtype == torch.int32 and np.array_equal(got[:, :, 0].numpy(), expected)


def passing(channels: int) -> IntegerNetwork:
    """The network that changes nothing."""
    return layer(np.eye(channels, dtype=np.int64) << WEIGHT_BITS, np.zeros(channels, np.int64))


@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_over_the_largest_tile_are_exact(sign):
    """Quotients next to where rounding changes, of the largest sums there are."""
    key, value = LARGEST_KEY * ONE, sign * LARGEST_VALUE * ONE
    exact = IntegerAttention(passing(2), passing(2), passing(2))
    query = torch.tensor([1 << 17, 0])[None, :, None, None]
    keys = torch.full((1, 2, 1, LARGEST_TILE), key)
    results = []
    for more in (0, 1):
        # The mean value is half a unit below the limit, or one unit in 2**14 from that.
        content = torch.full((1, 2, 1, LARGEST_TILE), value)
        content[..., : LARGEST_TILE // 2 + more] -= sign
        got = exact(query, keys, content)
        expected = attended(*(x[:, :, 0].numpy() for x in (query, keys, content)))
        assert np.array_equal(got[:, :, 0].numpy(), expected)
        results.append(got.flatten().tolist())
    # Halves are rounded up, so that of negative ones already the first is a unit nearer to zero.
    assert results == ([[value] * 2, [value - 1] * 2] if sign > 0 else [[value + 1] * 2] * 2)
    generator = torch.Generator().manual_seed(0)
    noisy = [
        torch.randint(-(1 << 18), 1 << 18, (1, 2, 1, LARGEST_TILE), generator=generator) for _ in range(3)
    ]
    assert np.array_equal(exact(*noisy)[:, :, 0].numpy(), attended(*(x[:, :, 0].numpy() for x in noisy)))


def test_one_position_gives_its_value():
    """Weights of a single key are 1, whatever it is; so are those of a picture of one color."""
    torch.manual_seed(0)
    exact = IntegerAttention(passing(3), passing(3), passing(3))
    query, key = torch.randint(-20_000, 20_000, (2, 1, 3, 1, 5))
    value = torch.randint(-60_000, 60_000, (1, 3, 1, 1))
    assert torch.equal(exact(query, key[..., :1], value), value.expand(1, 3, 1, 5).int())
    assert torch.equal(exact(query, key, value.expand(1, 3, 1, 5)), value.expand(1, 3, 1, 5).int())


def test_attention_looks_where_keys_are_large():
    exact = IntegerAttention(passing(2), passing(2), passing(2))
    key = torch.tensor([[16 * ONE, 0, 0], [0, 0, 16 * ONE]])[None, :, None]
    query = torch.tensor([[16 * ONE, 0], [0, 16 * ONE]])[None, :, None]
    value = torch.tensor([[1000, 5000, 9000], [-7, 0, 7]])[None, :, None]
    near = torch.tensor([[1000, 9000], [-7, 7]])[None, :, None]
    assert (exact(query, key, value) - near).abs().max() <= 2
    # Queries and keys below zero say as much as zero.
    assert torch.equal(
        exact(query - (query == 0) * 9999, key - (key == 0) * 9999, value), exact(query, key, value)
    )


def test_order_of_positions_does_not_matter():
    case = CASES["attention"]
    exact, (query, key, content) = case.exact(), case.inputs(5)
    expected = exact(query, key, content)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        order, other = torch.randperm(key.shape[-1], generator=generator), torch.randperm(query.shape[-1])
        assert torch.equal(exact(query, key[..., order], content[..., order]), expected)
        assert torch.equal(exact(query[..., other], key, content), expected[..., other])


@settings(max_examples=60, deadline=None)
@given(**SIZES, size=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_gates_equal_int64_arithmetic(seed, channels, batch, largest, size):
    generator = np.random.default_rng(seed)
    count, hidden = channels
    squeeze, excite = random_layer(generator, count, hidden), random_layer(generator, hidden, count)
    x = generator.integers(-largest, largest + 1, (batch, count, *size))
    flat = x.clip(-ACTIVATION_LIMIT, ACTIVATION_LIMIT).reshape(batch, count, -1)
    mean = quotient(flat.sum(2, keepdims=True), np.int64(flat.shape[2]))
    gate = applied(*excite, applied(*squeeze, mean).clip(0)) + ONE
    expected = (flat * gate.clip(0, 2 * ONE) + ONE // 2) >> FRACTION_BITS
    network = IntegerNetwork([*layer(*squeeze, rectify=True).convolutions, *layer(*excite).convolutions])
    given_x = torch.from_numpy(x).double()
    got = IntegerGate(network)(given_x)
    assert got.dtype == torch.int32 and np.array_equal(got.flatten(2).numpy(), expected)
    assert np.array_equal(given_x.numpy(), x), "what was given must not change"


def test_means_over_the_largest_tile_are_exact():
    """A gate that is shut at a mean of 0 and half open at 1 tells apart sums that differ by 1."""
    half = 1 << (WEIGHT_BITS + FRACTION_BITS - 1)
    gate = IntegerGate(layer(np.array([[0, 0], [0, half]]), np.array([0, -2 * half])))
    x = torch.full((1, 2, 128, 128), ACTIVATION_LIMIT)
    x[0, 1, :64] *= -1
    for total, opening in ((LARGEST_TILE // 2 - 1, 0), (LARGEST_TILE // 2, ONE // 2)):
        x[0, 1, 0, 0] = total - ACTIVATION_LIMIT
        assert int(x[0, 1].sum()) == total
        assert torch.equal(
            gate(x)[0], torch.stack([x[0, 0], (x[0, 1] * opening + ONE // 2) >> FRACTION_BITS]).int()
        )


def test_a_new_gate_is_open():
    x = torch.randn(2, 6, 3, 5)
    gate = ChannelGate(6)
    assert torch.equal(gate(x), x)
    fixed = to_fixed(x)
    assert torch.equal(IntegerGate.from_float(gate)(fixed), fixed.int())


# ------------------------------------------------------------------------------------- what all forms have in common


class Case(NamedTuple):
    """An integer form and its trainable one."""

    kind: type[Any]
    trainable: Callable[[], nn.Module]
    shapes: list[tuple[int, ...]]  # of inputs, without the batch
    place: tuple[int, int] | None = None  # size of the checkerboard that is the last argument, if one is

    def floating(self) -> nn.Module:
        """With weights of some size everywhere, those that begin at zero included."""
        torch.manual_seed(7)
        module = self.trainable()
        with torch.no_grad():
            for weight in module.parameters():
                weight.normal_(0, 0.3)
        return module

    def exact(self) -> Any:
        return self.kind.from_float(self.floating())

    def inputs(self, deviation: float = 2.0) -> list[Tensor]:
        """Fixed-point, in a batch of two."""
        generator = torch.Generator().manual_seed(3)
        return [to_fixed(deviation * torch.randn(2, *shape, generator=generator)) for shape in self.shapes]

    def board(self, device: str = "cpu") -> list[Any]:
        return [checkerboard(*self.place, torch.device(device))] if self.place else []

    def outcome(self, exact: Any, inputs: list[Tensor]) -> Tensor:
        result: Tensor = exact(*inputs, *self.board(inputs[0].device.type))
        return result


CASES = {
    "attention": Case(
        IntegerAttention, lambda: LinearAttention(6, 5, 8), [(6, 1, 17), (6, 1, 18), (5, 1, 18)]
    ),
    "gate": Case(IntegerGate, lambda: ChannelGate(12), [(12, 5, 7)]),
    "neighbourhood": Case(IntegerAnchorConvolution, lambda: AnchorConvolution(3, 9), [(3, 1, 18)], (5, 7)),
}
each_form = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_form
def test_conversion_costs_little(case):
    floating, inputs = case.floating(), case.inputs()
    with torch.no_grad():
        expected = floating(*(x.float() / ONE for x in inputs), *case.board())
    got = case.outcome(case.exact(), inputs).double() / ONE
    assert got.shape == expected.shape and float(expected.std()) > 0.1
    assert float((got - expected).square().mean().sqrt()) < 0.003 * float(expected.std())


@each_form
def test_relaxed_is_exact_but_for_rounding(case):
    exact, inputs = case.exact(), case.inputs()
    floats = [x.float().requires_grad_() for x in inputs]
    relaxed = exact.relaxed(*floats, *case.board())
    assert float((relaxed.detach() - case.outcome(exact, inputs)).abs().max()) < 6
    relaxed.square().mean().backward()
    assert all(x.grad is not None and float(x.grad.abs().max()) > 0 for x in floats)


@each_form
def test_relaxed_has_the_same_limits(case):
    exact, inputs = case.exact(), case.inputs(60.0)
    assert float(torch.stack([x.abs().max() for x in inputs]).min()) > 2 * LARGEST_VALUE * ONE
    relaxed = exact.relaxed(*(x.double() for x in inputs), *case.board())
    assert float((relaxed - case.outcome(exact, inputs)).abs().max()) < 2e-3 * float(relaxed.abs().max())


@each_form
def test_nothing_around_it_changes_the_integers(case):
    exact = case.exact()
    inputs = case.inputs(20.0)
    expected = case.outcome(exact, inputs)

    def check() -> None:
        assert torch.equal(case.outcome(exact, inputs), expected)
        batched = [torch.cat([x, x.flip(0)]) for x in inputs]
        assert torch.equal(case.outcome(exact, batched), torch.cat([expected, expected.flip(0)]))
        single = [case.outcome(exact, [x[i : i + 1] for x in inputs]) for i in range(2)]
        assert torch.equal(torch.cat(single), expected)
        wide = [torch.stack([x, -x], -1)[..., 0] for x in inputs]  # every second number of memory
        assert torch.equal(case.outcome(exact, wide), expected)
        last = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        assert torch.equal(case.outcome(exact, last), expected)
        for dtype in (torch.int32, torch.float64):
            assert torch.equal(case.outcome(exact, [x.to(dtype) for x in inputs]), expected)

    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            check()
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            check()
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.backends.mkldnn.flags(enabled=False):
        check()
    with torch.inference_mode():
        check()


@each_form
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpu_gives_the_same_integers(case, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    exact, inputs = case.exact(), case.inputs(20.0)
    expected = case.outcome(exact, inputs)
    assert torch.equal(case.outcome(exact.cuda(), [x.cuda() for x in inputs]).cpu(), expected)


@each_form
def test_half_precision_transforms_leave_the_integers_alone(case):
    """Casting a codec's floating-point parts must not reach these buffers by way of a checkpoint."""
    assert case.exact().state_dict() == {}


@each_form
def test_training_in_half_precision(case):
    """Under autocast gradients reach all weights, and the result is near that of full precision."""
    module, inputs = case.floating(), [x.float() / ONE for x in case.inputs()]
    with torch.no_grad():
        expected = module(*inputs, *case.board())
    with torch.autocast("cpu", torch.bfloat16):
        got = module(*inputs, *case.board())
    assert float((got.detach().float() - expected).square().mean().sqrt()) < 0.05 * float(expected.std())
    got.float().square().mean().backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in module.parameters()
    )


# ------------------------------------------------------------------------------------------------ malformed arrays


def blank(outputs: int, inputs: int) -> IntegerNetwork:
    return layer(np.zeros((outputs, inputs), np.int64), np.zeros(outputs, np.int64))


def test_parts_that_do_not_fit():
    IntegerAttention(blank(4, 3), blank(4, 3), blank(4, 2))
    for query, key, value in (((5, 3), (4, 3), (4, 2)), ((4, 3), (4, 2), (4, 2)), ((4, 3), (4, 3), (5, 2))):
        with pytest.raises(CheckpointError, match="attention"):
            IntegerAttention(blank(*query), blank(*key), blank(*value))
    with pytest.raises(CheckpointError, match="gate"):
        IntegerGate(blank(4, 3))
    IntegerAnchorConvolution(blank(4, 2 * TAPS))
    with pytest.raises(CheckpointError, match="neighbourhood"):
        IntegerAnchorConvolution(blank(4, TAPS + 1))
    with pytest.raises(CheckpointError, match="neighbourhood"):
        IntegerAnchorConvolution(
            IntegerNetwork([*blank(TAPS, TAPS).convolutions, *blank(2, TAPS).convolutions])
        )


def test_kernels_that_see_other_positions():
    wide = IntegerNetwork([IntegerConvolution(torch.zeros(TAPS, TAPS, 3, 1), torch.zeros(TAPS))])
    point = blank(TAPS, TAPS)
    for parts in ((wide, point, point), (point, wide, point), (point, point, wide)):
        with pytest.raises(CheckpointError, match="attention"):
            IntegerAttention(*parts)
    with pytest.raises(CheckpointError, match="gate"):
        IntegerGate(wide)
    with pytest.raises(CheckpointError, match="neighbourhood"):
        IntegerAnchorConvolution(wide)


@each_form
@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_diverged_weights_are_refused(case, value):
    for name, _ in case.floating().named_parameters():
        module = case.floating()
        with torch.no_grad():
            module.get_parameter(name).flatten()[0] = value
        with pytest.raises(CheckpointError, match="must be smaller"):
            case.kind.from_float(module)
