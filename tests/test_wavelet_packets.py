"""Wavelet packets against PyWavelets, their two engines against each other, inverses, gradients and reach."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from compand.errors import UsageError
from compand.transforms.wavelet_packets import FilterBank, WaveletPackets

EXACT = [
    "haar", "db2", "db4", "db10", "sym4", "sym20", "coif2", "bior1.3", "bior2.2", "bior4.4", "bior6.8", "rbio4.4",
]  # fmt: skip
WHOLE_SAMPLE = [
    "haar",
    "bior2.2",
    "bior2.4",
    "bior2.8",
    "bior4.4",
    "bior6.8",
    "rbio2.2",
    "rbio4.4",
    "rbio6.8",
]
LIFTED = [wavelet for wavelet in WHOLE_SAMPLE if wavelet != "haar"]
PYWAVELETS_MODES = ["periodization", "symmetric"]

# Both dimensions, tiny, odd, and long enough for blocks and ends of every filter.
SIGNALS = [(1, 1), (4, 2), (3, 5), (2, 37), (4, 64), (3, 331), (1, 1000), (2, 1023)]
IMAGES = [(3, 1, 2), (1, 5, 7), (2, 50, 37), (4, 33, 18), (3, 48, 64)]
LONG_IMAGES = [(2, 301, 6), (3, 8, 456)]


def signals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def reference(x: torch.Tensor, dimensions: int, levels: int, wavelet: str, mode: str) -> np.ndarray:
    """Bands of [batch, channels, h, w] by PyWavelets, ordered as `WaveletPackets` promises."""
    if dimensions == 1:
        tree = pywt.WaveletPacket(x.numpy(), wavelet, mode, maxlevel=levels, axis=-1)
    else:
        tree = pywt.WaveletPacket2D(x.numpy(), wavelet, mode, maxlevel=levels, axes=(-2, -1))
    paths = itertools.product("ad" if dimensions == 1 else "ahvd", repeat=levels)
    bands = np.stack([tree["".join(path)].data for path in paths], 2)
    return bands.reshape(bands.shape[0], -1, *bands.shape[3:])


@pytest.fixture(params=["lifting", "matrices"])
def engine(request, monkeypatch):
    """Computes by lifting where the wavelet allows it, or by matrix products, as on a GPU."""
    if request.param == "matrices":
        monkeypatch.setattr(WaveletPackets, "_is_lifted", lambda *_: False)
    return request.param


# -------------------------------------------------------------------------------------------------- PyWavelets


@pytest.mark.filterwarnings("ignore:Level value:UserWarning")
@pytest.mark.parametrize("mode", PYWAVELETS_MODES)
@pytest.mark.parametrize("wavelet", [*EXACT, "dmey"])
def test_signals_are_pywavelets(wavelet, mode, engine):
    for levels, n in SIGNALS:
        packets = WaveletPackets(1, levels, wavelet, mode)
        x = signals(2, 2, 3, n)
        y = packets.analysis(x)
        np.testing.assert_allclose(y, reference(x, 1, levels, wavelet, mode), atol=2e-10)
        if wavelet != "dmey":
            y = packets.analysis(x.float())
            assert y.dtype == torch.float32
            torch.testing.assert_close(packets.synthesis(y, (3, n)), x.float(), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Level value:UserWarning")
@pytest.mark.parametrize("mode", PYWAVELETS_MODES)
@pytest.mark.parametrize("wavelet", [*EXACT, "dmey"])
def test_images_are_pywavelets(wavelet, mode):
    for levels, h, w in IMAGES + LONG_IMAGES:
        packets = WaveletPackets(2, levels, wavelet, mode)
        x = signals(1, 2, h, w)
        y = packets.analysis(x)
        np.testing.assert_allclose(y, reference(x, 2, levels, wavelet, mode), atol=2e-10)
        if wavelet != "dmey":
            x_hat = packets.synthesis(packets.analysis(x.float()), (h, w))
            torch.testing.assert_close(x_hat, x.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", PYWAVELETS_MODES)
@pytest.mark.parametrize("wavelet", [*EXACT, "dmey"])
def test_synthesis_of_any_bands_is_pywavelets(wavelet, mode, engine):
    packets = WaveletPackets(1, 1, wavelet, mode)
    for bands in (7, 40, 300):
        y = signals(2, 2, 1, bands + packets.bank.taps)
        expected = pywt.idwt(y[:, 0].numpy(), y[:, 1].numpy(), wavelet, mode)
        got = packets.synthesis(y, (1, expected.shape[-1]))
        np.testing.assert_allclose(got[:, 0], expected, atol=2e-10)


@pytest.mark.parametrize("mode", ["reflect", *PYWAVELETS_MODES])
def test_dmey_is_as_inexact_as_its_filters(mode):
    """The filters of dmey are cut off: no synthesis gives back the signal, and the error adds up over levels."""
    packets = WaveletPackets(1, 2, "dmey", mode)
    x = signals(1, 1, 1, 512)
    error = float((packets.synthesis(packets.analysis(x), (1, 512)) - x).abs().max())
    assert 1e-5 < error < 0.05


@given(
    st.sampled_from(["haar", "db3", "coif1", "bior3.3", "bior4.4", "sym20"]),
    st.sampled_from(PYWAVELETS_MODES),
    st.integers(1, 3),
    st.integers(1, 450),
)
@settings(max_examples=40, deadline=None)
def test_any_length(wavelet, mode, levels, n):
    packets = WaveletPackets(1, levels, wavelet, mode)
    x = signals(1, 1, 2, n)
    y = packets.analysis(x)
    np.testing.assert_allclose(y, reference(x, 1, levels, wavelet, mode), atol=2e-10)
    torch.testing.assert_close(packets.synthesis(y, (2, n)), x, atol=1e-9, rtol=0)


# ----------------------------------------------------------------------------------------------------- lifting


@pytest.mark.parametrize(
    ("wavelet", "expected"),
    [
        ("bior2.2", [-0.5, 0.25]),
        ("bior4.4", [-1.586134342059924, -0.052980118572961, 0.882911075530934, 0.443506852043971]),
    ],
)
def test_lifting_steps_are_those_of_jpeg_2000(wavelet, expected):
    lifting = FilterBank(wavelet, "reflect").lifting()
    assert lifting is not None
    assert [odd for odd, _ in lifting.steps] == [True, False] * (len(expected) // 2)
    for (odd, taps), coefficient in zip(lifting.steps, expected, strict=True):
        assert sorted(k for k, _ in taps) == ([0, 1] if odd else [-1, 0])
        assert [c for _, c in taps] == pytest.approx([coefficient] * 2, abs=1e-8)


@given(
    st.sampled_from(LIFTED),
    st.sampled_from(["reflect", "periodization"]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_engines_agree(wavelet, mode, levels, rows, columns, dimensions):
    lifted = WaveletPackets(dimensions, levels, wavelet, mode)
    products = WaveletPackets(dimensions, levels, wavelet, mode)
    products._is_lifted = lambda *_: False
    h = rows * (lifted.stride if dimensions == 2 else 1)
    w = columns * lifted.stride
    x = signals(2, 2, h, w)
    assert lifted._is_lifted(x, h, w)
    y = lifted.analysis(x)
    assert y.shape == (2, 2 * lifted.bands, rows, columns)
    torch.testing.assert_close(products.analysis(x), y, atol=1e-9, rtol=0)
    other = signals(*y.shape, seed=1)
    torch.testing.assert_close(
        products.synthesis(other, (h, w)), lifted.synthesis(other, (h, w)), atol=1e-8, rtol=0
    )


@given(
    st.sampled_from(LIFTED),
    st.sampled_from(["reflect", "periodization"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 2]),
)
@settings(max_examples=40, deadline=None)
def test_a_matrix_absorbs_order_scales_and_level(wavelet, mode, levels, rows, columns, dimensions):
    packets = WaveletPackets(dimensions, levels, wavelet, mode)
    h, w = rows * (packets.stride if dimensions == 2 else 1), columns * packets.stride
    samples = torch.randint(0, 256, (2, 2, h, w), dtype=torch.uint8)
    weight = signals(5, 2 * packets.bands)
    assert packets.lifts(samples)
    bands = packets.unscaled(samples.double(), 100.0)
    assert bands.shape == (2, 2 * packets.bands, rows, columns)
    expected = weight @ packets.analysis(samples.double() - 100).flatten(2)
    torch.testing.assert_close(packets.absorbed(weight) @ bands.flatten(2), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(packets.unscaled(samples, 100.0), bands.float(), atol=1e-2, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------- reflect


@pytest.mark.parametrize("wavelet", WHOLE_SAMPLE)
def test_reflect_is_whole_sample_extension_at_every_level(wavelet, engine):
    x = signals(1, 1, 1, 64)
    bands = x.numpy()[0]
    for _ in range(2):
        # numpy's "reflect" repeats no sample; what periodization does to its ends stays within the padding.
        padded = np.pad(bands, ((0, 0), (0, 0), (20, 20)), mode="reflect")
        pair = pywt.dwt(padded, wavelet, "periodization")
        bands = np.stack([band[..., 10:-10] for band in pair], 1).reshape(-1, 1, bands.shape[-1] // 2)
    y = WaveletPackets(1, 2, wavelet).analysis(x)
    np.testing.assert_allclose(y[0], bands, atol=2e-10)


@pytest.mark.parametrize("wavelet", WHOLE_SAMPLE)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_reflect_is_inverted(wavelet, dimensions, engine):
    for levels, rows, columns in ((1, 1, 1), (2, 3, 1), (3, 2, 50), (3, 1, 5), (4, 1, 2)):
        packets = WaveletPackets(dimensions, levels, wavelet)
        size = (rows * packets.stride, columns * packets.stride)
        x = signals(1, 2, *size).float()
        y = packets.analysis(x)
        assert y.numel() == x.numel()
        torch.testing.assert_close(packets.synthesis(y, size), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_modes_agree_away_from_the_ends(dimensions, engine):
    reflect, periodic, symmetric = (
        WaveletPackets(dimensions, 2, "bior4.4", mode) for mode in ("reflect", *PYWAVELETS_MODES)
    )
    x = signals(1, 1, 96, 128)
    margin = -(-reflect.reach // 4)
    rows = slice(margin, -margin) if dimensions == 2 else slice(None)
    y = reflect.analysis(x)
    inside = y[:, :, rows, margin:-margin]
    torch.testing.assert_close(periodic.analysis(x)[:, :, rows, margin:-margin], inside, atol=1e-9, rtol=0)
    # A level of "symmetric" starts (taps / 2 - 1) / 2 = 2 positions earlier; 2 of level 1 are 1 of level 2.
    late = 1 + 2
    shifted = symmetric.analysis(x)[:, :, :, late + margin : late + 32 - margin]
    if dimensions == 2:
        shifted = shifted[:, :, late + margin : late + 24 - margin]
    torch.testing.assert_close(shifted, inside, atol=1e-9, rtol=0)
    assert not torch.allclose(periodic.analysis(x), y)


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize(
    ("wavelet", "mode"), [("bior4.4", "reflect"), ("bior2.4", "periodization"), ("db4", "symmetric")]
)
def test_gradients_are_the_adjoint(dimensions, wavelet, mode, engine):
    packets = WaveletPackets(dimensions, 2, wavelet, mode)
    size = (12, 300)
    x = signals(2, 2, *size).requires_grad_()
    y = packets.analysis(x)
    dy = signals(*y.shape, seed=1).requires_grad_()
    x_hat = packets.synthesis(dy, size)
    for source, result in ((x, y), (dy, x_hat)):
        weights, direction = signals(*result.shape, seed=2), signals(*source.shape, seed=3)
        (gradient,) = torch.autograd.grad(result, source, weights)
        with torch.no_grad():
            moved = packets.analysis(direction) if source is x else packets.synthesis(direction, size)
        assert float((gradient * direction).sum()) == pytest.approx(float((weights * moved).sum()), rel=1e-9)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_gradients_of_any_order(dimensions, engine):
    packets = WaveletPackets(dimensions, 2, "bior2.2")
    x, y = signals(1, 1, 4, 8).requires_grad_(), signals(1, 4**dimensions, 1, 2).requires_grad_()
    size = (4, 8) if dimensions == 2 else (1, 8)
    for function, argument in ((packets.analysis, x), (lambda y: packets.synthesis(y, size), y)):
        assert torch.autograd.gradcheck(function, argument)
        assert torch.autograd.gradgradcheck(function, argument)


def test_matrices_made_in_validation_serve_in_training():
    packets = WaveletPackets(1, 2, "db4", "periodization")
    with torch.inference_mode():
        packets.analysis(signals(1, 1, 1, 300))
    x = signals(1, 1, 1, 300).requires_grad_()
    packets.analysis(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), atol=1e-9, rtol=0)  # the wavelet is orthogonal


# ------------------------------------------------------------------------------------------------ memory, graphs


@pytest.mark.parametrize("dimensions", [1, 2])
def test_memory_layout_does_not_matter(dimensions, engine):
    packets = WaveletPackets(dimensions, 2)
    x = signals(2, 3, 16, 24).float()
    y = packets.analysis(x)
    back = packets.synthesis(y, (16, 24))
    wide = torch.zeros(2, 3, 16, 48)
    wide[..., ::2] = x
    for other in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.equal(other, x) and other.stride() != x.stride()
        assert torch.equal(packets.analysis(other), y)
    last = y.contiguous(memory_format=torch.channels_last)
    assert torch.equal(packets.synthesis(last, (16, 24)), back)
    assert torch.equal(x, signals(2, 3, 16, 24).float()), "the input was changed"


@pytest.mark.parametrize("n", [256, 1024])
def test_repeated_calls_can_be_captured(n, monkeypatch):
    """A CUDA graph holds no transfer, no synchronisation and no tensor made on the host; and launches are few."""
    monkeypatch.setattr(WaveletPackets, "_is_lifted", lambda *_: False)
    packets = WaveletPackets(2, 3)
    x = signals(1, 3, n, n).float()
    y = packets.analysis(x)
    packets.synthesis(y, (n, n))
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    with Record():
        packets.synthesis(packets.analysis(x), (n, n))
    launching = [f for f in called if not f.is_view]
    assert 4 <= len(launching) < 60
    names = {f.overloadpacket.__name__ for f in launching}
    assert names <= {"mm", "clone", "cat", "_unsafe_view"}


def test_half_precision_is_computed_in_single():
    packets = WaveletPackets(2, 2)
    x = signals(1, 1, 16, 16).bfloat16()
    y = packets.analysis(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, packets.analysis(x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        products = WaveletPackets(2, 2, "db2", "periodization")
        assert torch.equal(products.analysis(x), products.analysis(x.float()))
        assert products.synthesis(products.analysis(x), (16, 16)).dtype == torch.float32


def test_nothing_is_kept_in_checkpoints():
    packets = WaveletPackets(2, 3)
    packets.analysis(signals(1, 1, 8, 8))
    assert not packets.state_dict() and not list(packets.parameters())


# -------------------------------------------------------------------------------------------- facts and refusals


@pytest.mark.parametrize(
    ("wavelet", "mode"),
    [("bior4.4", "reflect"), ("haar", "periodization"), ("db4", "periodization"), ("db4", "symmetric")],
)
def test_nothing_beyond_reach_is_seen(wavelet, mode, engine):
    packets = WaveletPackets(1, 3, wavelet, mode)
    stride, n, place = 8, 1024, 64
    assert (packets.stride, packets.bands) == (8, 8) and WaveletPackets(2, 3, wavelet, mode).bands == 64
    y = signals(1, 8, 1, packets.bank.lengths(n, 3)[-1])
    changed = y.clone()
    changed[..., place] += 1
    spread = (packets.synthesis(y, (1, n)) != packets.synthesis(changed, (1, n))).flatten().nonzero()
    allowed = range(place * stride - packets.reach, (place + 1) * stride + packets.reach)
    assert len(spread) >= stride and set(spread.flatten().tolist()) <= set(allowed)

    x = signals(1, 1, 1, n)
    outside = signals(1, 1, 1, n, seed=1)
    outside[..., allowed.start : allowed.stop] = x[..., allowed.start : allowed.stop]
    a, b = packets.analysis(x), packets.analysis(outside)
    torch.testing.assert_close(a[..., place], b[..., place], atol=1e-12, rtol=0)
    assert not torch.allclose(a, b)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, 1), "dimensions"),
        ((2, 0), "levels"),
        ((1, 1, "bior9.9", "symmetric"), "bior9.9"),
        ((1, 1, "bior4.4", "zero"), "zero.*periodization"),
        ((1, 1, "db4"), "db4.*take bior4.4"),
        ((1, 1, "bior3.3"), "bior3.3.*take bior4.4"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        WaveletPackets(*arguments)


def test_sizes_that_do_not_fit_are_refused():
    packets = WaveletPackets(2, 3)
    for size in ((8, 12), (12, 8)):
        with pytest.raises(UsageError, match=r"multiples of 8.*pad"):
            packets.analysis(torch.zeros(1, 1, *size))
    assert WaveletPackets(1, 3).analysis(torch.zeros(1, 1, 3, 8)).shape == (1, 8, 3, 1)
    y = torch.zeros(1, 64, 2, 2)
    for size in ((16, 24), (8, 16), (15, 16)):
        with pytest.raises(UsageError, match="give the size"):
            packets.synthesis(y, size)
    with pytest.raises(UsageError, match="give the size"):
        packets.synthesis(y[:, :63], (16, 16))
    with pytest.raises(UsageError, match="give the size"):
        WaveletPackets(1, 2, "db2", "periodization").synthesis(torch.zeros(1, 4, 1, 3), (1, 16))
