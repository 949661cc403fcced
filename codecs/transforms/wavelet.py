"""An encoder almost free of cost: wavelet packets, one matrix, and a small network; the work is left to synthesis."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand.codec import Transform
from compand.errors import UsageError
from compand.transforms.patch import DepthwiseBlock, LevelScale, colour_axes
from compand.transforms.wavelet_packets import WaveletPackets


class SpaceToDepth(nn.Module):
    """Samples of a block become channels: what is left of `WaveletPackets` without overlap and without filters.

    Same interface: a linear layer behind it can learn any transform of single blocks, so what wavelets gain over it is
    the gain of overlap.

    Args:
        dimensions: 1 folds the width alone, 2 both axes.
        levels: a block has 2**levels samples along an axis.
    """

    reach = 0

    def __init__(self, dimensions: int, levels: int) -> None:
        super().__init__()
        self.stride = 2**levels
        self.rows = self.stride if dimensions == 2 else 1
        self.bands = self.rows * self.stride

    def lifts(self, x: Tensor) -> bool:
        """Nothing is lifted here, see `WaveletPackets.lifts`."""
        return False

    def analysis(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] -> [batch, channels * bands, h / rows, w / stride]."""
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // self.rows, self.rows, w // self.stride, self.stride)
        return x.permute(0, 1, 3, 5, 2, 4).reshape(b, c * self.bands, h // self.rows, w // self.stride)

    def synthesis(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """Inverse of `analysis`; size: (h, w)."""
        b, c, h, w = y.shape
        y = y.reshape(b, c // self.bands, self.rows, self.stride, h, w)
        return y.permute(0, 1, 4, 2, 5, 3).reshape(b, c // self.bands, *size)


def band_frequencies(dimensions: int, levels: int) -> Tensor:
    """Centre frequency of every wavelet packet along each axis, in units of the band width.

    The bands come in the order of their paths (see `WaveletPackets`). A high-pass filter reverses the order of the
    frequencies below it, so that along one axis the path read as a Gray code is the place in frequency.

    Returns:
        [bands, dimensions], integers 0 .. 2**levels - 1.
    """
    path = torch.arange(2**levels)
    place = path.clone()
    for shift in range(1, levels):
        place ^= path >> shift
    if dimensions == 1:
        return place[:, None]
    # A path in two dimensions has two bits a level: a, h, v, d are (low, low), (high, low), (low, high), (high, high)
    # along (height, width).
    bands = torch.arange(4**levels)
    rows, columns = torch.zeros_like(bands), torch.zeros_like(bands)
    for level in range(levels):
        digit = bands >> (2 * level)
        rows |= (digit & 1) << level
        columns |= ((digit >> 1) & 1) << level
    return torch.stack([place[rows], place[columns]], 1)


def low_band_basis(channels: int, latent_channels: int, dimensions: int, levels: int) -> Tensor:
    """Selects the lowest wavelet packets of decorrelated channels: where training of the linear encoder starts.

    The first axis of the channels (luma, or the sum of left and right) gets most of the rows, each of the others
    1 / (2 channels) of them.

    Returns:
        [latent_channels, channels * bands] with orthonormal rows.

    Raises:
        UsageError: there are fewer than `latent_channels` coefficients.
    """
    frequencies = band_frequencies(dimensions, levels)
    bands = len(frequencies)
    if not 1 <= latent_channels <= channels * bands:
        raise UsageError(
            f"{channels} channels of {bands} bands have no {latent_channels} coefficients: change latent_channels"
        )
    order = torch.argsort(frequencies.double().square().sum(1), stable=True)
    other = latent_channels // (2 * channels) if channels > 1 else 0
    counts = [latent_channels - other * (channels - 1)] + [other] * (channels - 1)
    # What the first axis has no bands for goes to the others.
    for axis in range(channels - 1):
        surplus = max(counts[axis] - bands, 0)
        counts[axis] -= surplus
        counts[axis + 1] += surplus
    basis = torch.zeros(latent_channels, channels, bands, dtype=torch.float32)
    row = 0
    for axis, count in zip(colour_axes(channels), counts, strict=True):
        basis[torch.arange(row, row + count), :, order[:count]] = axis.float()
        row += count
    return basis.flatten(1)


class WaveletTransform(Transform):
    """Wavelet packets and a nearly linear encoder before the latents, a residual network behind them.

    ```
    x -> packets -> w --1x1--------------------> (+) -> y       (analysis)
                     \\-- 1x1 -> blocks -> 1x1 --/
    y_hat -------------1x1-------------> (+) -> packets^-1 -> x_hat      (synthesis)
         \\-- 1x1 -> blocks -> 1x1 -----/
    ```

    The packets turn C channels into C * 2**levels (along time) or C * 4**levels (images) channels at 1 / 2**levels of
    the resolution; a matrix keeps `latent_channels` combinations of them (Jacobellis & Yadwadkar 2025, "Learned
    Compression for Compressed Learning", section 3). Theirs ends there; here a network a few percent of the synthesis
    in size may add to it (`analysis_depth` 0 leaves the encoder linear). All networks work at the resolution of the
    latents.

    Args:
        channels: channels C of the samples.
        latent_channels: channels M of y.
        dimensions: 1 (signals [batch, C, 1, n]) or 2 (images).
        packet_levels: levels of the packet transform; the stride is 2**packet_levels.
        wavelet: any biorthogonal or orthogonal wavelet of pywavelets; None: `SpaceToDepth` instead.
        mode: extension at the edges, see `WaveletPackets`.
        levels: number of quality levels.
        analysis_width, analysis_depth, analysis_kernel: the encoder's network.
        synthesis_width, synthesis_depth, synthesis_kernel: the decoder's network; depth 0 leaves it linear.
        expansion: width factor inside the blocks.
        odd: evaluates the networks at both signs, (f(x) - f(-x)) / 2, at twice their cost. Then so is the whole
            transform, as sound is: silence stays silence, where the biases of a network would leave a hum.
        offset: value of the samples that the transform maps to zero.
    """

    encoder_parts = ("analysis_",)
    takes_bytes = True

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        dimensions: int = 2,
        packet_levels: int = 3,
        wavelet: str | None = "bior4.4",
        mode: str = "reflect",
        levels: int = 8,
        analysis_width: int = 64,
        analysis_depth: int = 2,
        analysis_kernel: int = 3,
        synthesis_width: int = 256,
        synthesis_depth: int = 8,
        synthesis_kernel: int = 5,
        expansion: int = 2,
        odd: bool = False,
        offset: float = 0.5,
    ) -> None:
        super().__init__()
        self.channels, self.latent_channels, self.dimensions = channels, latent_channels, dimensions
        self.packets: Any = (
            SpaceToDepth(dimensions, packet_levels)
            if wavelet is None
            else WaveletPackets(dimensions, packet_levels, wavelet, mode)
        )
        self.stride = self.packets.stride
        self.offset = offset
        reach = max(analysis_depth * (analysis_kernel // 2), synthesis_depth * (synthesis_kernel // 2))
        self.context = (-(-self.packets.reach // self.stride) + reach) * self.stride
        # Periodic extension mixes the two ends of a signal, so what lies beyond has to be coded; at a third of their
        # reach, packets have less than 1e-4 of their amplitude left.
        periodic = wavelet is not None and mode == "periodization" and dimensions == 1
        self.edge = -(-self.packets.reach // (3 * self.stride)) * self.stride if periodic else 0
        bands = channels * self.packets.bands

        self.analysis_linear = nn.Conv2d(bands, latent_channels, 1, bias=False)
        self.synthesis_linear = nn.Conv2d(latent_channels, bands, 1, bias=False)
        basis = low_band_basis(channels, latent_channels, dimensions, packet_levels)
        if wavelet is None:
            basis = _block_cosines(dimensions, packet_levels, basis, channels)
        with torch.no_grad():
            self.analysis_linear.weight.copy_(basis[:, :, None, None])
            self.synthesis_linear.weight.copy_(basis.T[:, :, None, None])

        def network(first: int, last: int, width: int, depth: int, kernel: int) -> list[nn.Module]:
            extent = (kernel, kernel) if dimensions == 2 else (1, kernel)
            blocks = nn.Sequential(*(DepthwiseBlock(width, extent, expansion) for _ in range(depth)))
            end = nn.Conv2d(width, last, 1)
            with torch.no_grad():
                end.weight.mul_(0.1)
                nn.init.zeros_(end.bias)  # type: ignore[arg-type]
            return [nn.Conv2d(first, width, 1), LevelScale(levels, width), blocks, end]

        if analysis_depth:
            self.analysis_in, self.analysis_scale, self.analysis_blocks, self.analysis_out = network(
                bands, latent_channels, analysis_width, analysis_depth, analysis_kernel
            )
        if synthesis_depth:
            self.synthesis_in, self.synthesis_scale, self.synthesis_blocks, self.synthesis_out = network(
                latent_channels, bands, synthesis_width, synthesis_depth, synthesis_kernel
            )
        self.analysis_depth, self.synthesis_depth, self.odd = analysis_depth, synthesis_depth, odd

    def analysis(self, x: Tensor, quality: Tensor) -> Tensor:
        exact = not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        if exact and self.packets.lifts(x):
            return self._analysis_lifted(x, quality)
        if x.dtype == torch.uint8:
            x = x.float() / 255
        # The linear path carries the amplitude: it stays in float32 in training with reduced precision too.
        with torch.autocast(x.device.type, enabled=False):
            w = self.packets.analysis(x - self.offset if self.offset else x)
            y: Tensor = self.analysis_linear(w)
        if self.analysis_depth:
            y = y + self._network("analysis", w, quality)
        return y

    def _analysis_lifted(self, x: Tensor, quality: Tensor) -> Tensor:
        """Analysis without gradients on a CPU: whatever scales or orders samples or bands is done by the matrices."""
        unit = 255.0 if x.dtype == torch.uint8 else 1.0
        bands = self.packets.unscaled(x, self.offset * unit)
        linear = self.packets.absorbed(self.analysis_linear.weight.flatten(1) / unit)
        y = torch.stack([linear @ item for item in bands.flatten(2)])
        if self.analysis_depth:
            into, out = cast(nn.Conv2d, self.analysis_in), cast(nn.Conv2d, self.analysis_out)
            weight = self.packets.absorbed(into.weight.flatten(1).float() / unit).to(into.weight.dtype)

            def network(weight: Tensor) -> Tensor:
                # Positions as rows of a matrix are channels-last memory, which the blocks want.
                rows = [F.linear(item.to(weight.dtype).T, weight, into.bias) for item in bands.flatten(2)]
                feature = torch.stack(rows).view(len(x), *bands.shape[2:], -1).permute(0, 3, 1, 2)
                feature = self.analysis_blocks(self.analysis_scale(feature, quality))
                rows = [
                    F.linear(item, out.weight.flatten(1), out.bias) for item in feature.permute(0, 2, 3, 1)
                ]
                return torch.stack(rows).flatten(1, 2).transpose(1, 2).float()

            y += (network(weight) - network(-weight)) / 2 if self.odd else network(weight)
        return y.unflatten(2, bands.shape[2:])

    def synthesis(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        with torch.autocast(y_hat.device.type, enabled=False):
            w = self.synthesis_linear(y_hat.float())
        if self.synthesis_depth:
            w = w + self._network("synthesis", y_hat, quality)
        return self._from_bands(w)

    def linear_synthesis(self, y_hat: Tensor) -> Tensor:
        """What the linear part of `synthesis` alone makes of latents: samples of the same shape, float32."""
        with torch.autocast(y_hat.device.type, enabled=False):
            return self._from_bands(self.synthesis_linear(y_hat.float()))

    def _from_bands(self, w: Tensor) -> Tensor:
        """Samples of the bands [batch, bands, h, w]."""
        rows = w.shape[2] * (self.stride if self.dimensions == 2 else 1)
        with torch.autocast(w.device.type, enabled=False):
            x: Tensor = self.packets.synthesis(w, (rows, w.shape[3] * self.stride))
        return x + self.offset if self.offset else x

    def _network(self, direction: str, x: Tensor, quality: Tensor) -> Tensor:
        """The nonlinear part of one direction; float32."""
        first, scale, blocks, last = (
            getattr(self, f"{direction}_{part}") for part in ("in", "scale", "blocks", "out")
        )

        def network(x: Tensor) -> Tensor:
            result: Tensor = last(blocks(scale(first(x.to(first.weight.dtype)), quality))).float()
            return result

        # Two calls, not one on a batch of both: items of a batch may be rounded differently, and then no zero remains.
        return (network(x) - network(-x)) / 2 if self.odd else network(x)

    def reduce_precision(self, dtype: torch.dtype) -> None:
        """Converts the networks; the linear path, which carries the amplitude, stays in float32."""
        for name in ("analysis_in", "analysis_blocks", "analysis_out"):
            if self.analysis_depth:
                getattr(self, name).to(dtype)
        for name in ("synthesis_in", "synthesis_blocks", "synthesis_out"):
            if self.synthesis_depth:
                getattr(self, name).to(dtype)


def _block_cosines(dimensions: int, levels: int, selected: Tensor, channels: int) -> Tensor:
    """The rows that `low_band_basis` selects, as block cosines on samples instead of packets."""
    size = 2**levels
    n = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi * (n[None] + 0.5) * n[:, None] / size) * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    places = band_frequencies(dimensions, levels)
    if dimensions == 1:
        atoms = cosines[places[:, 0]]
    else:
        atoms = (cosines[places[:, 0]][:, :, None] * cosines[places[:, 1]][:, None, :]).flatten(1)
    blocks = selected.view(len(selected), channels, -1).double() @ atoms
    return F.normalize(blocks.flatten(1), dim=1).float()
