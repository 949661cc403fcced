"""Wavelet packets in one and two dimensions, differentiable and fast.

Two engines compute the same transform. *Lifting* (Daubechies & Sweldens 1998, "Factoring wavelet transforms into
lifting steps") serves short symmetric filters such as bior4.4, the CDF 9/7 pair of JPEG 2000, on a CPU: the signal is
first folded into its 2**levels phases, planes contiguous in memory, between which the lifting steps of all levels and
all bands then work in place. *Matrix products* serve every other wavelet, mode and device: a few levels together are
a banded matrix that repeats along the signal, so that blocks of the signal times one small matrix are the transform,
with a second matrix for the two ends. A GPU gets the matrix products because they are few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pywt
import torch
from torch import Tensor, nn

from compand.errors import UsageError

Array = npt.NDArray[np.float64]

MODES = ("reflect", "periodization", "symmetric")

LONGEST_LIFTED = 18
"""Longest filters that are lifted: those of bior6.8 in pywavelets' form."""
JOINED_TAPS = 64
"""Levels become one matrix as long as its filters have no more taps."""
BLOCK_SAMPLES = 32
"""Samples that a block of a banded matrix stands for: a longer one computes more zeros, a shorter one more halo."""


Step = tuple[bool, tuple[tuple[int, float], ...]]
"""Whether the odd samples change, and pairs (k, coefficient)."""


class Lifting(NamedTuple):
    """A step adds to every sample of one parity neighbours of the other: a[i] += sum of coefficient * b[i + k].

    Both parities count their samples from 0: sample 2 i of the signal is even[i], sample 2 i + 1 is odd[i].
    """

    steps: tuple[Step, ...]
    scales: tuple[float, float]  # factors of the low and of the high band after all steps


@dataclass(frozen=True)
class FilterBank:
    """One level of a wavelet transform as PyWavelets defines it, extension at the ends included.

    band[i] = sum_k dec[k] x[2 i + offset - k] and x[j] = sum over bands and i of rec[j + shift - 2 i] band[i].
    """

    wavelet: str
    mode: str

    @cached_property
    def filters(self) -> tuple[Array, Array, Array, Array]:
        """dec_lo, dec_hi, rec_lo, rec_hi."""
        low, high, low_inverse, high_inverse = map(np.array, pywt.Wavelet(self.wavelet).filter_bank)
        return low, high, low_inverse, high_inverse

    @property
    def taps(self) -> int:
        return len(self.filters[0])

    @property
    def offset(self) -> int:
        return 1 if self.mode == "symmetric" else self.taps // 2

    @property
    def shift(self) -> int:
        return self.taps - 1 - self.offset

    @cached_property
    def whole_sample(self) -> bool:
        """Whether both filters are symmetric about a sample, an even one for the low band and an odd one for the
        high band, so that whole-sample extension leaves a signal critically sampled. Haar needs no extension."""
        low, high = self.filters[:2]
        return self.taps == 2 or (
            self.taps % 4 == 2
            and np.allclose(low[1:], low[:0:-1], atol=1e-9)
            and np.allclose(high[:-1], high[-2::-1], atol=1e-9)
        )

    def band_length(self, n: int) -> int:
        """Samples of a band of a signal of n samples."""
        return (n + self.taps - 1) // 2 if self.mode == "symmetric" else (n + 1) // 2

    def lengths(self, n: int, levels: int) -> list[int]:
        """Samples before level 1, 2, .. and after the last one."""
        result = [n]
        for _ in range(levels):
            result.append(self.band_length(result[-1]))
        return result

    def extended(self, p: npt.NDArray[np.intp], n: int) -> npt.NDArray[np.intp]:
        """Index of the sample of a signal of n samples that stands at any place p."""
        if self.mode == "periodization":  # an odd signal first gets its last sample twice
            return np.minimum(p % (n + n % 2), n - 1)
        period = 2 * n - 2 if self.mode == "reflect" else 2 * n
        p = p % period
        return np.minimum(p, (period if self.mode == "reflect" else period - 1) - p)

    def split_matrix(self, n: int) -> Array:
        """One level of analysis: [2 * n', n], the low band first."""
        count = self.band_length(n)
        matrix = np.zeros((2, count, n))
        i, k = np.arange(count)[:, None], np.arange(self.taps)
        source = self.extended(2 * i + self.offset - k, n)
        for band in range(2):
            np.add.at(matrix[band], (i, source), self.filters[band])
        return matrix.reshape(2 * count, n)

    def merge_matrix(self, n: int) -> Array:
        """One level of synthesis: [n, 2 * n']."""
        count = self.band_length(n)
        matrix = np.zeros((n, 2, count))
        reach = self.taps
        for band in range(2):
            i = np.arange(-reach, count + reach)
            if self.mode == "reflect":
                # Band positions mirror as the samples 2 i (low) and 2 i + 1 (high) of the signal do.
                source = self.extended(2 * i + band, n) // 2
            elif self.mode == "periodization":
                source = i % count
            else:
                i = source = np.arange(count)
            k = np.arange(n)[:, None] + self.shift - 2 * i
            j, place = np.nonzero((k >= 0) & (k < self.taps))
            np.add.at(matrix[:, band], (j, source[place]), self.filters[2 + band][k[j, place]])
        return matrix.reshape(n, 2 * count)

    def analysis_matrix(self, n: int, levels: int) -> Array:
        """All levels: [bands, n', n]."""
        result = np.eye(n)[None]
        for length in self.lengths(n, levels)[:-1]:
            result = (self.split_matrix(length) @ result).reshape(2 * len(result), -1, n)
        return result

    def synthesis_matrix(self, n: int, levels: int) -> Array:
        """All levels: [n, bands, n']."""
        lengths = self.lengths(n, levels)
        inputs = 2**levels * lengths[-1]
        result = np.eye(inputs)
        for j in reversed(range(levels)):
            result = self.merge_matrix(lengths[j]) @ result.reshape(2**j, 2 * lengths[j + 1], inputs)
        return result.reshape(n, 2**levels, lengths[-1])

    def lifting(self) -> Lifting | None:
        """Factors the pair of filters into symmetric lifting steps, or None where that does not serve.

        The longer filter is the shorter one times a symmetric polynomial, plus a rest that is shorter still: Euclid's
        algorithm on Laurent polynomials, of which symmetry lets us keep one half.
        """
        if not self.whole_sample or self.mode == "symmetric" or not 2 < self.taps <= LONGEST_LIFTED:
            return None
        centre = self.taps // 2
        # halves[band][k] weighs the samples at distance k from the centre of the filter.
        halves = np.zeros((2, centre + 1))
        halves[0, :centre] = self.filters[0][centre:]
        halves[1] = self.filters[1][centre - 1 :]
        steps: list[Step] = []
        while (degrees := [int(np.flatnonzero(np.abs(half) > 1e-9)[-1]) for half in halves]) != [0, 0]:
            band = int(degrees[1] > degrees[0])
            taps: list[tuple[int, float]] = []
            for distance in range(degrees[band] - degrees[1 - band], 0, -2):
                longer, shorter = halves[band], np.pad(halves[1 - band], (0, centre + 1 + distance))
                coefficient = longer[degrees[1 - band] + distance] / shorter[degrees[1 - band]]
                # longer -= coefficient (z^distance + z^-distance) shorter
                k = np.arange(centre + 1)
                longer -= coefficient * (shorter[np.abs(k - distance)] + shorter[k + distance])
                # Neighbours at this distance of the odd sample 2 i + 1, or of the even sample 2 i, in their own count.
                near = (distance - 1) // 2
                taps += [(place, coefficient) for place in ((-near, near + 1) if band else (-near - 1, near))]
            if not taps:
                return None
            steps.append((bool(band), tuple(taps)))
        low, high = float(halves[0, 0]), float(halves[1, 0])
        # The scales move behind the steps.
        ordered = [
            (odd, tuple((k, float(c) * (low / high if odd else high / low)) for k, c in taps))
            for odd, taps in reversed(steps)
        ]
        return Lifting(tuple(ordered), (low, high))


class Coupling(NamedTuple):
    """One addition within the memory of a folded signal: the elements at offset `target` gain `coefficient` times
    those at offset `source`, both of this size and stride. The two never overlap."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    target: int
    source: int
    coefficient: float


@lru_cache(maxsize=128)
def couplings(bank: FilterBank, levels: int, dimensions: int, shape: tuple[int, ...]) -> tuple[Coupling, ...]:
    """All lifting steps of a packet transform, in order, for a signal folded into contiguous phase planes.

    At every level the phases along an axis are viewed as [position in block, even or odd, bands so far]: the next
    sample of the same parity is the next position, or position 0 of the next block, which is a plane shifted by one.

    Args:
        bank: a filter bank with a lifting.
        levels: depth of the tree.
        dimensions: 1 (width) or 2.
        shape: (signals, phases along the width, phases along the height, h', w') of the memory.
    """
    lifting = bank.lifting()
    assert lifting is not None
    signals, wide, high, rows, columns = shape
    result: list[Coupling] = []
    for axis in range(dimensions):
        if axis == 0:
            lead, phases, blocks = signals, wide, columns
            phase, line, unit = high * rows * columns, columns, 1  # strides of phases, of runs, of blocks
        else:
            lead, phases, blocks = signals * wide, high, rows
            phase, line, unit = rows * columns, rows * columns, columns
        for level in range(levels):
            bands, positions = 1 << level, phases >> (level + 1)
            stride = phases * phase, 2 * bands * phase, line, 1
            for odd, taps in lifting.steps:
                target, source = (bands * phase, 0) if odd else (0, bands * phase)
                for k, coefficient in taps:
                    for first, count, block, length, position, other in _shifted(
                        bank, positions, blocks, k, odd
                    ):
                        result.append(
                            Coupling(
                                (lead, count, bands * phase // line, length * unit),
                                stride,
                                target + first * stride[1] + block * unit,
                                source + position * stride[1] + other * unit,
                                coefficient,
                            )
                        )
    return tuple(result)


def _shifted(
    bank: FilterBank, positions: int, blocks: int, k: int, odd: bool
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Where the k-th neighbours of all samples of one parity are, sample i being (i % positions, i // positions).

    Yields:
        (first position, positions, first block, blocks) of samples and (position, block) of the first one's neighbour.
    """
    turn, far = k % positions, k // positions
    for first, last, shift in ((0, positions - turn, far), (positions - turn, positions, far + 1)):
        start, stop = max(0, -shift), blocks - max(0, shift)
        if first < last and start < stop:
            yield first, last - first, start, stop - start, first + k - shift * positions, start + shift
    samples = positions * blocks
    for i in range(max(0, samples - k), samples) if k > 0 else range(min(-k, samples)):
        place = int(bank.extended(np.array(2 * (i + k) + (not odd)), 2 * samples)) // 2
        yield i % positions, 1, i // positions, 1, place % positions, place // positions


class _Lifted(torch.autograd.Function):
    """The lifted transform, its inverse, and the transposes of both, which are their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packets: WaveletPackets, inverse: bool, transposed: bool) -> Tensor:
        ctx.arguments = packets, inverse, transposed
        return packets.lifted(x, inverse, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        packets, inverse, transposed = ctx.arguments
        return _Lifted.apply(gradients[0], packets, inverse, not transposed), None, None, None


class Blocks(NamedTuple):
    """How a few levels along one axis, a banded matrix, divide into equal blocks and two ends.

    A unit is a position of the bands, or the 2**levels samples that it stands for.
    """

    size: int  # units that a block computes
    before: int  # units left of the first block
    number: int  # of blocks; 0: the signal is short and the matrix is kept whole
    first: int  # inputs of one band (samples in analysis) left of the first block's window
    window: int  # inputs of one band that a block looks at
    hop: int  # inputs of one band from one window to the next
    stand_in: int  # samples of the shortest signal with the same matrices


def divide(bank: FilterBank, inverse: bool, levels: int, n: int) -> Blocks:
    """The blocks of a signal of n samples; inverse: of its synthesis."""
    stride = 2**levels
    taps = (bank.taps - 1) * (stride - 1) + 1
    size = max(1, BLOCK_SAMPLES // stride)
    least = 4 * taps + 2 * size * stride
    if inverse:
        shift = bank.shift * (stride - 1)
        before, after = (taps - 1 - shift) // stride, (stride - 1 + shift) // stride
        end = min(bank.lengths(n, levels)[-1] - after, n // stride)
        first, window, hop = 0, before + size + after, size
    else:
        start = bank.shift * (stride - 1)
        before = -(-start // stride)
        end = (n + start - taps) // stride + 1
        first, window, hop = stride * before - start, stride * (size - 1) + taps, stride * size
    if n < least:
        return Blocks(size, 0, 0, 0, 0, 0, n)
    return Blocks(
        size, before, (end - before) // size, first, window, hop, least + (n - least) % (size * stride)
    )


class Banded(NamedTuple):
    """Matrices of a few levels along one axis, columns ordered (band, place)."""

    interior: Tensor  # [inputs of a block, outputs of a block]
    ends: Tensor  # [first `head` and last `tail` inputs of every band, all outputs outside the blocks]
    head: int
    tail: int


class WaveletPackets(nn.Module):
    """All bands of a full wavelet packet tree, equal to `pywt.WaveletPacket` and `pywt.WaveletPacket2D`.

    Bands come in the natural order of their paths, the first level most significant: along one axis a, d are 0, 1; in
    two dimensions a, h, v, d are 0 .. 3, where h is high-pass along the height and v along the width.

    The mode says how a signal, and every band before the next level, goes on beyond its ends:

    - "periodization": it repeats. A band has ceil(n / 2) samples. As in PyWavelets.
    - "symmetric": mirrored between samples (half-sample). A band has floor((n + taps - 1) / 2) samples, so the
      transform expands. As in PyWavelets.
    - "reflect": mirrored about the first and the last sample (whole-sample), as in JPEG 2000 (ISO/IEC 15444-1, annex
      F): critically sampled and yet continuous. For filters of odd length alone, and sides that are multiples of
      2**levels. PyWavelets has no such mode (what it calls reflect expands).

    Away from the ends the modes agree, up to a shift of the bands in "symmetric". Synthesis inverts analysis up to
    rounding if the wavelet itself is exact, which pywavelets' dmey is not.

    Float32 and float64 are computed as they are, half precision in float32. There are no parameters, and nothing is
    kept in the state dict. Matrices for a size are made at its first use, so that a CUDA graph can be captured after
    one call. On a GPU, matrix products follow PyTorch's setting for TF32.

    Args:
        dimensions: 1 transforms along the width alone, 2 along the height as well.
        levels: depth of the tree, at least 1.
        wavelet: a discrete wavelet of PyWavelets, `pywt.wavelist(kind="discrete")`.
        mode: "reflect", "periodization" or "symmetric".

    Attributes:
        bands: 2**levels in one dimension, 4**levels in two.
        stride: 2**levels, samples per position of a band along an axis.
        reach: a position stands for `stride` samples; analysis looks at this many more on either side of them at
            most, and synthesis changes this many more at most.

    Raises:
        UsageError: wavelet, mode or their combination do not exist.
    """

    def __init__(self, dimensions: int, levels: int, wavelet: str = "bior4.4", mode: str = "reflect") -> None:
        super().__init__()
        if dimensions not in (1, 2):
            raise UsageError(f"wavelet packets have 1 or 2 dimensions, not {dimensions}: change dimensions")
        if levels < 1:
            raise UsageError(f"wavelet packets have 1 level or more, not {levels}: change levels")
        if wavelet not in pywt.wavelist(kind="discrete"):
            raise UsageError(f"wavelet {wavelet!r} is unknown: take one of pywt.wavelist(kind='discrete')")
        if mode not in MODES:
            raise UsageError(f"mode {mode!r} is unknown: take one of {', '.join(MODES)}")
        self.bank = FilterBank(wavelet, mode)
        if mode == "reflect" and not self.bank.whole_sample:
            raise UsageError(
                f"wavelet {wavelet} has no symmetric filters of odd length, which mode reflect needs: "
                "take bior4.4, bior2.2 or bior6.8, or mode periodization"
            )
        self.dimensions, self.levels, self.wavelet, self.mode = dimensions, levels, wavelet, mode
        self.stride = 2**levels
        self.bands = self.stride**dimensions
        self.reach = (self.bank.taps - 1 - min(self.bank.offset, self.bank.shift + 1)) * (self.stride - 1)
        taps = self.bank.taps
        joined = max(g for g in range(1, levels + 1) if g == 1 or (taps - 1) * (2**g - 1) < JOINED_TAPS)
        self._groups = [min(joined, levels - done) for done in range(0, levels, joined)]
        self._lifting = self.bank.lifting()
        self._scales: dict[tuple[bool, torch.dtype], Tensor] = {}
        self._banded: dict[tuple[bool, int, int, torch.dtype, torch.device], Banded] = {}

    def analysis(self, x: Tensor) -> Tensor:
        """Splits signals into bands.

        Args:
            x: [batch, channels, h, w] in any memory layout.

        Returns:
            [batch, channels * bands, h', w'], channel by channel; in one dimension h' = h.

        Raises:
            UsageError: in mode reflect, a side is no multiple of `stride`.
        """
        if self.mode == "reflect" and not self._folds(x.shape[2], x.shape[3]):
            raise UsageError(
                f"mode reflect needs multiples of {self.stride} samples, not {x.shape[2]} x {x.shape[3]}: "
                "pad the signal"
            )
        x = _full_precision(x)
        if self._is_lifted(x, x.shape[2], x.shape[3]):
            return cast(Tensor, _Lifted.apply(x, self, False, False))
        with torch.autocast(x.device.type, enabled=False):
            y = self._split(x)
            if self.dimensions == 1:
                return y.transpose(2, 3).flatten(1, 2)
            y = self._split(y.permute(0, 1, 3, 4, 2))  # [batch, channels, bands, w', bands, h']
            j, (b, c, _, columns, _, rows) = self.levels, y.shape
            y = y.unflatten(4, (2,) * j).unflatten(2, (2,) * j)
            digits = [axis for level in range(j) for axis in (2 + level, 3 + j + level)]
            return y.permute(0, 1, *digits, 3 + 2 * j, 2 + j).reshape(b, c * self.bands, rows, columns)

    def synthesis(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """Joins bands into signals, the inverse of `analysis`.

        Args:
            y: [batch, channels * bands, h', w'] in any memory layout.
            size: (h, w) of the signals.

        Returns:
            [batch, channels, h, w].

        Raises:
            UsageError: signals of that size have other bands.
        """
        h, w = size
        rows = h if self.dimensions == 1 else self.bank.lengths(h, self.levels)[-1]
        expected = rows, self.bank.lengths(w, self.levels)[-1]
        folds = self.mode != "reflect" or self._folds(h, w)
        if y.shape[1] % self.bands or tuple(y.shape[2:]) != expected or not folds:
            raise UsageError(
                f"bands of shape {tuple(y.shape)} do not make up {h} x {w} samples: give the size that was analysed"
            )
        y = _full_precision(y)
        if self._is_lifted(y, h, w):
            return cast(Tensor, _Lifted.apply(y, self, True, False))
        with torch.autocast(y.device.type, enabled=False):
            y = y.unflatten(1, (-1, *(2,) * self.levels * self.dimensions))
            j, b, c = self.levels, y.shape[0], y.shape[1]
            if self.dimensions == 1:
                return self._merge(y.flatten(2, 1 + j).transpose(2, 3), w)
            y = y.permute(0, 1, *range(2, 2 + 2 * j, 2), 3 + 2 * j, *range(3, 3 + 2 * j, 2), 2 + 2 * j)
            y = self._merge(y.reshape(b, c, self.stride, expected[1], self.stride, rows), h)
            return self._merge(y.permute(0, 1, 4, 2, 3), w)

    # --------------------------------------------------------------------------------------------------- lifting

    def _folds(self, h: int, w: int) -> bool:
        """Whether the sides divide into whole phases."""
        return w % self.stride == 0 and (self.dimensions == 1 or h % self.stride == 0)

    def _is_lifted(self, x: Tensor, h: int, w: int) -> bool:
        return self._lifting is not None and x.device.type == "cpu" and self._folds(h, w)

    def _scale(self, inverse: bool, dtype: torch.dtype) -> Tensor:
        """Factors of all bands after the lifting steps: [2, .., 2, 1, 1]."""
        if (inverse, dtype) not in self._scales:
            assert self._lifting is not None
            scale = torch.ones((), dtype=torch.float64)
            for _ in range(self.levels * self.dimensions):
                scale = scale[..., None] * torch.tensor(self._lifting.scales, dtype=torch.float64)
            self._scales[inverse, dtype] = (1 / scale if inverse else scale)[..., None, None].to(dtype)
        return self._scales[inverse, dtype]

    def lifted(self, x: Tensor, inverse: bool, transposed: bool) -> Tensor:
        """Analysis, or its inverse, or the transpose of either, by lifting.

        Args:
            x: signals [batch, channels, h, w], or bands where the inverse or else the transpose is asked for.
        """
        to_bands = inverse == transposed
        scale = self._scale(inverse, x.dtype)
        if to_bands:
            memory = self._folded(x, x.dtype)
            planes = self._ordered(memory)
        else:
            memory = x.new_empty(x.shape[0], x.shape[1] // self.bands, *self._phases, *x.shape[2:])
            planes = self._ordered(memory)
            torch.mul(x.view(planes.shape), scale, out=planes)
        self._couple(memory, inverse, transposed)
        b, c, wide, high, rows, columns = memory.shape
        if to_bands:
            y = x.new_empty(planes.shape)
            torch.mul(planes, scale, out=y)
            return y.view(b, c * self.bands, rows, columns)
        signal = x.new_empty(b, c, rows, high, columns, wide)
        signal.copy_(memory.permute(0, 1, 4, 3, 5, 2))
        return signal.view(b, c, rows * high, columns * wide)

    @property
    def _phases(self) -> tuple[int, int]:
        """Phases along the width and along the height."""
        return self.stride, self.stride if self.dimensions == 2 else 1

    def _folded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Signals [batch, channels, h, w] as phase planes [batch, channels, *_phases, h', w'], contiguous."""
        wide, high = self._phases
        x = x.unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 1, 5, 3, 2, 4)
        return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)

    def _ordered(self, memory: Tensor) -> Tensor:
        """Phase planes as bands, a view [batch, channels, 2, .., 2, h', w'] with one digit of the band an axis."""
        # The first level is the lowest bit of a phase, but the first digit of a band.
        j, (b, c, _, _, rows, columns) = self.levels, memory.shape
        order = [1 + j * (axis + 1) - level for level in range(j) for axis in range(self.dimensions)]
        planes = memory.view(b, c, *(2,) * j * self.dimensions, rows, columns)
        return planes.permute(0, 1, *order, -2, -1)

    def _couple(self, memory: Tensor, inverse: bool, transposed: bool) -> None:
        """All lifting steps, in place."""
        b, c, *shape = memory.shape
        steps = couplings(self.bank, self.levels, self.dimensions, (b * c, *shape))
        for size, stride, target, source, coefficient in steps if inverse == transposed else reversed(steps):
            to, of = (source, target) if transposed else (target, source)
            memory.as_strided(size, stride, to).add_(
                memory.as_strided(size, stride, of), alpha=-coefficient if inverse else coefficient
            )

    def lifts(self, x: Tensor) -> bool:
        """Whether `unscaled` can analyse these signals."""
        return self._is_lifted(x, x.shape[2], x.shape[3])

    def unscaled(self, x: Tensor, level: float = 0.0) -> Tensor:
        """Bands as the lifting leaves them, without the pass that scales and orders them: `absorbed` gives that to the
        matrix behind. Not differentiable.

        Args:
            x: [batch, channels, h, w] in any memory layout; 8-bit samples become float32 on the way.
            level: is subtracted from every sample. A constant is in the lowest band alone.

        Returns:
            [batch, channels * bands, h', w'].
        """
        memory = self._folded(x, x.dtype if x.is_floating_point() else torch.float32)
        self._couple(memory, False, False)
        if level:
            assert self._lifting is not None
            growth = (math.sqrt(2) / self._lifting.scales[0]) ** (self.levels * self.dimensions)
            memory[:, :, 0, 0] -= level * growth
        return memory.flatten(1, 3)

    def absorbed(self, weight: Tensor) -> Tensor:
        """The matrix that does to the bands of `unscaled` what `weight` does to those of `analysis`.

        Args:
            weight: [n, channels * bands].
        """
        n = len(weight)
        memory = weight.new_empty(n, weight.shape[1] // self.bands, *self._phases, 1, 1)
        planes = self._ordered(memory)
        torch.mul(weight.reshape(planes.shape), self._scale(False, weight.dtype), out=planes)
        return memory.view(n, -1)

    # ------------------------------------------------------------------------------------------- matrix products

    def _split(self, x: Tensor) -> Tensor:
        """[.., n] -> [.., bands, n'], along one axis."""
        y = x.reshape(-1, 1, x.shape[-1])
        for levels in self._groups:
            y = self._product(y.reshape(-1, 1, y.shape[-1]), False, levels, y.shape[-1])
        return y.reshape(*x.shape[:-1], self.stride, y.shape[-1])

    def _merge(self, y: Tensor, n: int) -> Tensor:
        """[.., bands, n'] -> [.., n], along one axis."""
        lengths = [n]
        for levels in self._groups:
            lengths.append(self.bank.lengths(lengths[-1], levels)[-1])
        x = y
        for levels, length in zip(reversed(self._groups), lengths[-2::-1], strict=True):
            x = self._product(x.reshape(-1, 2**levels, x.shape[-1]), True, levels, length)
        return x.reshape(*y.shape[:-2], n)

    def _product(self, x: Tensor, inverse: bool, levels: int, n: int) -> Tensor:
        """A few levels: [r, 1, n] -> [r, 2**levels, n'], or the inverse."""
        blocks = divide(self.bank, inverse, levels, n)
        matrices = self._matrices(inverse, levels, blocks, x)
        outputs, unit = (1, 2**levels) if inverse else (2**levels, 1)
        if not blocks.number:
            return (x.flatten(1) @ matrices.ends).unflatten(1, (outputs, -1))
        last = blocks.first + (blocks.number - 1) * blocks.hop + blocks.window
        windows = x[:, :, blocks.first : last].unfold(2, blocks.window, blocks.hop).transpose(1, 2)
        middle = windows.reshape(-1, matrices.interior.shape[0]) @ matrices.interior
        middle = middle.view(len(x), blocks.number, outputs, -1).transpose(1, 2).flatten(2)
        ends = torch.cat((x[:, :, : matrices.head], x[:, :, x.shape[2] - matrices.tail :]), 2).flatten(1)
        ends = (ends @ matrices.ends).unflatten(1, (outputs, -1))
        left = blocks.before * unit
        return torch.cat((ends[:, :, :left], middle, ends[:, :, left:]), 2)

    def _matrices(self, inverse: bool, levels: int, blocks: Blocks, like: Tensor) -> Banded:
        """The matrices of a signal divided like this, made at the first use."""
        key = inverse, levels, blocks.stand_in, like.dtype, like.device
        if key not in self._banded:
            n = blocks.stand_in
            if inverse:  # [bands, inputs, 1, outputs]
                whole, unit = self.bank.synthesis_matrix(n, levels).transpose(1, 2, 0)[:, :, None], 2**levels
            else:  # [1, inputs, bands, outputs]
                whole, unit = self.bank.analysis_matrix(n, levels).transpose(2, 0, 1)[None], 1
            here = divide(self.bank, inverse, levels, n)
            start, stop = unit * here.before, unit * (here.before + here.number * here.size)
            columns = slice(start, start + unit * here.size if here.number else start)
            interior = whole[:, here.first : here.first + here.window, :, columns]
            ends = np.concatenate((whole[..., :start], whole[..., stop:]), 3)
            inputs = ends.shape[1]
            head, tail = inputs, 0
            if here.number:
                used = ends.any((0, 2, 3))
                left, right = used[: inputs // 2], used[inputs // 2 :]
                head = max(np.flatnonzero(left), default=-1) + 1
                tail = len(right) - min(np.flatnonzero(right), default=len(right))
                ends = np.concatenate((ends[:, :head], ends[:, inputs - tail :]), 1)
            # Made in validation, they must still serve in training.
            with torch.inference_mode(False):
                self._banded[key] = Banded(_matrix(interior, like), _matrix(ends, like), head, tail)
        return self._banded[key]


def _matrix(whole: Array, like: Tensor) -> Tensor:
    """[bands, inputs, bands, outputs] -> a matrix of this type on this device."""
    rows, columns = whole.shape[0] * whole.shape[1], whole.shape[2] * whole.shape[3]
    return torch.from_numpy(whole.reshape(rows, columns).copy()).to(like)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
