"""Factorised densities: every channel has one distribution, learned without a parametric form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compand.bottlenecks.gains import GainUnit, step_gains
from compand.codec import QUALITY_STEPS, Bottleneck, BottleneckOutput, Counts, subset
from compand.coding.ans import AnsReader, AnsWriter
from compand.coding.tables import TableSet
from compand.errors import CheckpointError, UsageError
from compand.refinement import Relaxation, SoftRounding, TableCosts

QUANTIZATIONS = ("mixed", "noise", "none")
"""What stands in for rounding in training, see `quantised`."""

MAX_REACH = 2000
"""Values of a table on either side; beyond them lies the escape."""


def ste_round(x: Tensor) -> Tensor:
    """Rounding with the gradient of the identity (straight-through estimator)."""
    return x + (torch.round(x) - x).detach()


def noisy(x: Tensor) -> Tensor:
    """x with noise uniform in [-1/2, 1/2] (Balle et al. 2017, equation 10)."""
    return x + torch.empty_like(x).uniform_(-0.5, 0.5)


def quantised(x: Tensor, quantization: str, training: bool) -> tuple[Tensor, Tensor]:
    """What the rate is estimated from and what is reconstructed from, for x in quantisation steps.

    Outside training both are rounded. In training, by the name of `quantization`:

    - mixed: rate from noise, reconstruction from rounding with a straight gradient (Minnen & Singh 2020, section 3.3);
    - noise: both from one and the same uniform noise (Balle et al. 2017, equation 10);
    - none: x itself; an ablation, which leaves training ignorant of quantisation.
    """
    if not training:
        return x.round(), ste_round(x)
    if quantization == "none":
        return x, x
    coded = noisy(x)
    return coded, coded if quantization == "noise" else ste_round(x)


def check_quantization(name: str) -> str:
    """The name, if `quantised` knows it. Raises UsageError if not."""
    if name not in QUANTIZATIONS:
        raise UsageError(f"quantization {name!r} does not exist: choose one of {', '.join(QUANTIZATIONS)}")
    return name


def rounded(x: Tensor) -> Tensor:
    """Rounded to int32, where x is; values beyond +-2**30 become that, NaN becomes 0."""
    limit = float(1 << 30)
    bounded = torch.nan_to_num(x.detach(), nan=0.0).clamp_(-limit, limit)
    return bounded.round_().to(torch.int32)


def to_symbols(x: Tensor) -> NDArray[np.int32]:
    """`rounded`, as an array."""
    return rounded(x).cpu().numpy()


class FactorizedDensity(nn.Module):
    """The non-parametric density of Balle et al. 2018 (appendix 6.1), one a channel, by compressai.

    Raises:
        ImportError: compressai is not installed; the message says how to install it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        try:
            from compressai.entropy_models import EntropyBottleneck
        except ImportError as error:
            raise ImportError('training needs compressai: pip install "compand[train]"') from error

        self.model = EntropyBottleneck(channels)

    def bits(self, coded: Tensor, step: Tensor | float = 1.0) -> Tensor:
        """Information of values that are quantised in steps.

        Args:
            coded: number of steps, [batch, channels, h, w]: integers, or what stands in for them (see `quantised`).
            step: quantisation step, broadcastable to `coded`.

        Returns:
            Bits of each item, [batch].
        """

        def logits(value: Tensor) -> Tensor:
            rows = (value * step).transpose(0, 1).flatten(1)[:, None]
            return self.model._logits_cumulative(rows, stop_gradient=False)

        likelihood = torch.sigmoid(logits(coded + 0.5)) - torch.sigmoid(logits(coded - 0.5))
        bits = -torch.log2(self.model.likelihood_lower_bound(likelihood))
        return bits.view(coded.shape[1], coded.shape[0], -1).sum((0, 2))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(self, tables: TableSet, steps: int = 200) -> None:
        """Learns what tables, one a channel, say of integers, as far as such a density can.

        Args:
            tables: of a checkpoint; their escapes are left out.
            steps: of gradient descent.
        """
        quantiles, device = self.model.quantiles, self.model.quantiles.device
        low = int(tables.lows.min())
        values = torch.arange(
            low, int((tables.lows + tables.sizes).max()), dtype=torch.float32, device=device
        )
        target = torch.zeros(len(tables), len(values))
        for row, first, mass in zip(target, tables.lows.tolist(), tables.frequencies, strict=True):
            row[first - low : first - low + len(mass) - 1] = torch.from_numpy(mass[:-1] / mass[:-1].sum())
        with torch.no_grad():
            ends = np.stack([tables.lows, np.zeros_like(tables.lows), tables.lows + tables.sizes - 1], 1)
            quantiles[:, 0] = torch.from_numpy(ends).to(quantiles)
        learned = [p for p in self.model.parameters() if p is not quantiles]
        optimizer = torch.optim.Adam(learned, 0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
        coded = values.expand(1, len(tables), 1, -1)
        target = target.to(device)[:, None]
        for _ in range(steps):
            edges = coded[0, :, :, :1] - 0.5, coded[0] + 0.5
            cumulative = torch.sigmoid(
                self.model._logits_cumulative(torch.cat(edges, -1), stop_gradient=False)
            )
            likelihood = self.model.likelihood_lower_bound(cumulative.diff(dim=-1))
            loss = -(target * torch.log2(likelihood)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()

    def auxiliary_loss(self) -> Tensor:
        """Pulls the learned quantiles to the tails of the density, where the tables will end."""
        return self.model.loss()

    @torch.no_grad()
    def masses(self, steps: Tensor) -> tuple[list[NDArray[np.float64]], list[int], list[float]]:
        """Probabilities of the integers n, for values n * step, out to the learned quantiles.

        Args:
            steps: quantisation step of each channel, [channels].

        Returns:
            Masses, lowest value and mass of everything else, by channel.
        """
        steps = steps.double().cpu()
        model = self.model.double()
        quantiles = model.quantiles[:, 0].cpu()
        low = torch.floor(quantiles[:, 0] / steps).clamp(-MAX_REACH, 0).long()
        high = torch.ceil(quantiles[:, 2] / steps).clamp(0, MAX_REACH).long()
        edges = torch.arange(int(low.min()), int(high.max()) + 2, dtype=torch.float64) - 0.5
        device = model.quantiles.device
        values = (edges[None] * steps[:, None])[:, None].to(device)
        cumulative = torch.sigmoid(model._logits_cumulative(values, stop_gradient=True))[:, 0].cpu().numpy()
        self.model.float()
        masses, escapes = [], []
        for row, a, b in zip(cumulative, low.tolist(), high.tolist(), strict=True):
            part = row[a - int(low.min()) : b - int(low.min()) + 2]
            masses.append(np.diff(part).clip(min=0))
            escapes.append(float(max(part[0] + 1 - part[-1], 0)))
        return masses, low.tolist(), escapes


def blend(
    masses: Sequence[NDArray[np.float64]],
    lows: Sequence[int],
    escapes: Sequence[float],
    counts: Counts,
    strength: float = 2000.0,
) -> TableSet:
    """Tables from a model's masses and from symbols that were counted on training data.

    The model counts for `strength` observations (a Dirichlet prior), so that tables seldom used stay with it.
    """
    mixed, tails = [], []
    for mass, low, escape, seen in zip(masses, lows, escapes, counts, strict=True):
        total = strength * mass / (mass.sum() + escape)
        tail = strength * escape / (mass.sum() + escape)
        for value, count in seen.items():
            if low <= value < low + mass.size:
                total[value - low] += count
            else:
                tail += count
        mixed.append(total)
        tails.append(tail)
    return TableSet.from_masses(mixed, lows, tails)


class FactorizedBottleneck(Bottleneck):
    """Fully factorised prior (Balle et al. 2018, section 2 and appendix 6.1), variable in rate by gain units.

    ```
    y --*gain--> round --> symbols --> ANS with one table a channel and quarter level
    ```

    The density belongs to y itself: quantising in steps of 1 / gain, its integral over a step is the probability of a
    symbol, so one density serves every quality. Tables are made for every quarter of a quality level; qualities in
    between use the nearest.

    Args:
        latent_channels: channels M of y.
        lambdas: Lagrange multiplier of each level; sets the initial gains.
        trainable: whether the densities are built (needs compressai) or only the frozen state is to be loaded.
        media_channels: channels of the samples; sets the initial gains.
        quantization: what stands in for rounding in training: "mixed", "noise" or "none", see `quantised`.

    Raises:
        UsageError: an unknown quantization.
    """

    encoder_parts = ()
    refinable = True
    TABLES_A_LEVEL = 4

    def __init__(
        self,
        latent_channels: int,
        lambdas: Sequence[float],
        trainable: bool = True,
        *,
        media_channels: int = 3,
        quantization: str = "mixed",
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.quantization = check_quantization(quantization)
        self.y_gain = GainUnit(latent_channels, step_gains(lambdas, media_channels))
        self.density = FactorizedDensity(latent_channels) if trainable else None
        self.tables: TableSet | None = None

    def forward(self, y: Tensor, quality: Tensor) -> BottleneckOutput:
        with torch.autocast(y.device.type, enabled=False):
            y = y.float()
            if self.tables is not None and not self.training:
                return self._forward_frozen(y, quality)
            if self.density is None:
                raise CheckpointError("this codec is frozen: build it in its trainable state to train it")
            gain = self.y_gain.gain(quality)
            coded, decoded = quantised(y * gain, self.quantization, self.training)
            bits_y = self.density.bits(coded, 1 / gain)
            losses = {"auxiliary": self.density.auxiliary_loss()}
            return BottleneckOutput(decoded * self.y_gain.inverse(quality), bits_y, losses)

    def _forward_frozen(self, y: Tensor, quality: Tensor) -> BottleneckOutput:
        tables = self._frozen()
        y_hats, bits = [], []
        # One item at a time, as `compress` and `decompress` take one quality: interpolating the gains of a batch may
        # round differently in the last bit.
        for item, level in zip(y, quality.tolist(), strict=True):
            symbols = to_symbols(item[None] * self.y_gain.gain(self._level(level, y)))
            bits.append(float(tables.bits(symbols.ravel(), self._indexes(item.shape[1:], level)).sum()))
            y_hats.append(self._dequantise(symbols, level))
        return BottleneckOutput(torch.cat(y_hats), torch.tensor(bits, dtype=torch.float64, device=y.device))

    def compress(self, y: Tensor, quality: int) -> list[bytes]:
        return self._push(to_symbols(y.float() * self.y_gain.gain(self._level(quality, y))), quality)

    def _push(self, symbols: NDArray[np.int32], quality: int) -> list[bytes]:
        tables = self._frozen()
        indexes = self._indexes(symbols.shape[2:], quality)
        payloads = []
        for item in symbols:
            writer = AnsWriter()
            writer.push(item.ravel(), indexes, tables)
            payloads.append(writer.finish())
        return payloads

    def decompress(self, payloads: Sequence[bytes], shape: tuple[int, int], quality: int) -> Tensor:
        tables = self._frozen()
        indexes = self._indexes(shape, quality)
        items = []
        for payload in payloads:
            reader = AnsReader(payload)
            items.append(reader.pull(indexes, tables).reshape(self.latent_channels, *shape))
            reader.finish()
        return self._dequantise(np.stack(items), quality)

    def _dequantise(self, symbols: NDArray[np.int32], quality: int) -> Tensor:
        values = torch.from_numpy(symbols).to(self.y_gain.log2_gain)
        return values * self.y_gain.inverse(self._level(quality, values))

    def relaxed(self, y: Tensor, quality: int) -> Relaxation:
        return _RelaxedFactorized(self, y, quality)

    def quantise(self, y: Tensor, quality: int) -> Tensor:
        return self.y_gain.quantise(y, quality)

    def dequantise(self, integers: Tensor, quality: int) -> Tensor:
        return self.y_gain.dequantise(integers, quality)

    def freeze(self, counts: Sequence[Counts] | None = None) -> None:
        """Makes the integer tables.

        Args:
            counts: how often each symbol was seen with each table; None: the model alone.
        """
        if self.density is None:
            raise CheckpointError("this bottleneck is frozen already")
        masses: list[NDArray[np.float64]] = []
        lows: list[int] = []
        escapes: list[float] = []
        levels = self.y_gain.log2_gain.shape[0]
        for step in range((levels - 1) * self.TABLES_A_LEVEL + 1):
            quality = torch.tensor([QUALITY_STEPS + step * QUALITY_STEPS // self.TABLES_A_LEVEL])
            gain = self.y_gain.gain(quality.to(self.y_gain.log2_gain.device)).detach().flatten()
            part = self.density.masses(1 / gain)
            masses += part[0]
            lows += part[1]
            escapes += part[2]
        self.tables = blend(masses, lows, escapes, counts[0] if counts else [{}] * len(masses))

    def least_bits(self, shape: tuple[int, int]) -> float:
        by_level = self._frozen().least_bits.reshape(-1, self.latent_channels).sum(1)
        return float(shape[0] * shape[1] * by_level.min())

    def count(self, y: Tensor, quality: int) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """(table indexes, symbols) of every push of `compress`; what `freeze` wants counted."""
        symbols = to_symbols(y.float() * self.y_gain.gain(self._level(quality, y)))
        indexes = self._indexes(symbols.shape[2:], quality)
        return [(np.tile(indexes, len(symbols)), symbols.ravel())]

    def thaw(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        """Nothing: tables do not determine the density, which is learned anew within a few hundred steps."""

    def table_counts(self) -> list[int]:
        return [len(self._frozen())]

    def frozen_arrays(self) -> dict[str, NDArray[np.int32]]:
        return {f"tables.{name}": array for name, array in self._frozen().arrays().items()}

    def load_frozen(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        self.tables = TableSet.from_arrays(subset(arrays, "tables."))
        levels = self.y_gain.log2_gain.shape[0]
        expected = ((levels - 1) * self.TABLES_A_LEVEL + 1) * self.latent_channels
        if len(self.tables) != expected:
            raise CheckpointError(f"the checkpoint has {len(self.tables)} tables where {expected} are needed")

    def _frozen(self) -> TableSet:
        if self.tables is None:
            raise CheckpointError("this codec has no tables yet: export it first (compand export)")
        return self.tables

    def _level(self, quality: int, like: Tensor) -> Tensor:
        return torch.tensor([quality], device=like.device)

    def _indexes(self, shape: Sequence[int], quality: int) -> NDArray[np.int64]:
        return np.repeat(self._rows(quality), shape[0] * shape[1])

    def _rows(self, quality: int) -> NDArray[np.int64]:
        """Table of each channel."""
        first = round((quality - QUALITY_STEPS) * self.TABLES_A_LEVEL / QUALITY_STEPS) * self.latent_channels
        return np.arange(first, first + self.latent_channels)


class _RelaxedFactorized(Relaxation):
    """Symbols are y * gain, rounded."""

    def __init__(self, bottleneck: FactorizedBottleneck, y: Tensor, quality: int) -> None:
        self._bottleneck, self._quality = bottleneck, quality
        level = torch.tensor([quality], device=y.device)
        self._steps = y.float() * bottleneck.y_gain.gain(level)
        self._inverse = bottleneck.y_gain.inverse(level)
        self._costs = TableCosts(bottleneck._frozen(), bottleneck._rows(quality).tolist(), y.device)
        self._rows = torch.arange(y.shape[1], device=y.device)[:, None, None]
        self._offset = torch.zeros_like(self._steps).requires_grad_()
        self.variables = [self._offset]

    def sample(self, rounding: SoftRounding) -> tuple[Tensor, Tensor]:
        rounded = rounding(self._steps + self._offset)
        return self._costs(rounded, self._rows).sum(), rounded.value * self._inverse

    def code(self) -> tuple[bytes, Tensor]:
        symbols = to_symbols(self._steps + self._offset)
        return self._bottleneck._push(symbols, self._quality)[0], self._bottleneck._dequantise(
            symbols, self._quality
        )
