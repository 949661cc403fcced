"""Slices of channels in the halves of a checkerboard, each predicted from all that is decoded before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compand.bottlenecks.factorized import quantised, rounded, to_symbols
from compand.bottlenecks.hyperprior import (
    Coded,
    HyperpriorBottleneck,
    RelaxedHyperprior,
    scale_indexes,
    scale_places,
)
from compand.codec import QUALITY_STEPS, BottleneckOutput, Counts, level_table_at
from compand.coding.ans import AnsReader
from compand.coding.checkerboard import (
    AnchorConvolution,
    Checkerboard,
    IntegerAnchorConvolution,
    checkerboard,
)
from compand.coding.integer import (
    FRACTION_BITS,
    WEIGHT_BITS,
    IntegerConvolution,
    IntegerNetwork,
    interpolate_levels,
)
from compand.coding.integer_attention import (
    ChannelGate,
    IntegerAttention,
    IntegerGate,
    LinearAttention,
    silent,
)
from compand.errors import CheckpointError, UsageError
from compand.refinement import Relaxation, SoftRounding

CONTEXTS = (
    "channel",
    "global_inter",
    "local",
    "global_intra",
    "global_hyper",
    "reweighting",
    "residual_prediction",
)
"""What a slice is predicted from beside the hyperprior, and how; see `ContextBottleneck`."""

CONTEXT_SCALE = 4
"""Networks see latents this many times as large, since most are far below 1."""

SYMBOL_REACH = 8
"""Residual symbols beyond this look alike to the latent residual prediction."""

INVERSE_BITS = 16
"""Fractional bits of the decoder's gains."""

INVERSE_LIMIT = 1 << 21
"""Those gains, as integers, stay below this: 64-bit integers then hold all products with 32-bit symbols."""

_ONE = 1 << FRACTION_BITS

_EXACT: dict[type[nn.Module], type[Any]] = {
    nn.Sequential: IntegerNetwork,
    AnchorConvolution: IntegerAnchorConvolution,
    LinearAttention: IntegerAttention,
    ChannelGate: IntegerGate,
}
"""The integer forms of the parts that networks of a slice have."""


class Sizes(NamedTuple):
    """Widths of the networks of a slice, the same for all slices."""

    channel: tuple[int, int] = (96, 64)  # of the two convolutions over the slices before
    local: int = 64  # of what the neighbourhood gives
    attention: int = 32  # of what an attention gives
    hidden: tuple[int, int] = (160, 128)  # of the layers between contexts and entropy parameters
    correction: int = 64  # of the layer before the latent residual prediction


def uneven(channels: int) -> tuple[int, ...]:
    """Slices of growing width: few channels at first, which say much about the others."""
    first = channels // 16, channels // 16, channels // 8, channels // 4
    return *first, channels - sum(first)


class Slice(NamedTuple):
    """Channels that are coded together."""

    start: int
    stop: int
    previous: int  # channels of the slice before, 0 for the first

    @property
    def channels(self) -> slice:
        """Where they lie."""
        return slice(self.start, self.stop)


class Arithmetic(NamedTuple):
    """How `ContextBottleneck` computes: in floating point or in fixed-point integers."""

    one: float  # what stands for 1
    call: Callable[..., Tensor]  # (network, *inputs)
    restore: Callable[[Slice, Tensor, Tensor], Tensor]  # (slice, means, quantisation steps) -> y_hat


Decide = Callable[[Slice, slice, Tensor, Tensor], Tensor]
"""(slice, positions in the order of coding, means, log2 sigma) -> symbols, the latter three [batch, c, 1, n]."""


def _call(network: nn.Module, *inputs: Any) -> Tensor:
    result: Tensor = network(*inputs)
    return result


def _call_relaxed(network: Any, *inputs: Any) -> Tensor:
    result: Tensor = network.relaxed(*inputs)
    return result


class ContextBottleneck(HyperpriorBottleneck):
    """A hyperprior refined by what is decoded already: slices of channels (Minnen & Singh 2020, figure 3), growing in
    width (He et al. 2022, "ELIC", section 3.2), in two halves of a checkerboard each, with global contexts by linear
    attention (Jiang et al. 2023, "MLIC++", section 3).

    ```
    y --h_a--> z --*gain_z--> round --> z symbols;  z_hat --h_s--> features H --> mu, log2 sigma of the hyperprior
    for each slice i of channels, for each half of the positions (anchors, then the others):
        H, channel and global_inter (y_hat of slices < i), [local, global_intra: anchors of slice i]
            --> x --> + mu, + log2 sigma
        (y - mu) * gain --> round --> symbols (Gaussian tables, index from log2 sigma + log2 gain)
        y_hat = mu + inverse gain * (symbol + correction(x, symbol))
    ```

    All quantities but the symbols are in the units of y, whatever the quality. Networks are told the quality by hat
    functions of the level. The networks of slices add to what the hyperprior says and start at zero, so that training
    may begin from a hyperprior's checkpoint, whose h_s this one has.

    Args:
        latent_channels: channels M of y.
        lambdas: Lagrange multiplier of each quality level; sets the initial gains.
        hyper_channels: channels N of z.
        widths: channels of h_s, three; the last is that of H.
        trainable: as in `HyperpriorBottleneck`.
        slices: channels of each slice; None: M/16, M/16, M/8, M/4, M/2.
        contexts: which of CONTEXTS there are:

            - channel: convolutions over the slices before;
            - global_inter: attention among all positions of the slices before;
            - local: the anchors within 5x5 positions;
            - global_intra: attention of the other positions to anchors, alike where the slice before is alike;
            - global_hyper: the same for the first slice, alike where H is alike;
            - reweighting: a gate for each channel of these contexts, from its mean over the half that is coded;
            - residual_prediction: the correction of y_hat, half a quantisation step at most.

            Without local, global_intra and global_hyper, slices are coded in one piece.
        sizes: fields of `Sizes` that are not the default ones.

    Raises:
        UsageError: slices do not add up to M, unknown contexts or sizes, or h_s does not have three widths.
    """

    def __init__(
        self,
        latent_channels: int,
        lambdas: Sequence[float],
        hyper_channels: int = 128,
        widths: Sequence[int] = (128, 96, 192),
        trainable: bool = True,
        *,
        slices: Sequence[int] | None = None,
        contexts: Sequence[str] = CONTEXTS,
        sizes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(latent_channels, lambdas, hyper_channels, widths, trainable)
        m = latent_channels
        counts = tuple(slices) if slices is not None else uneven(m)
        if sum(counts) != m or min(counts) < 1:
            raise UsageError(
                f"slices of {', '.join(map(str, counts))} channels do not make {m}: change slices"
            )
        if unknown := set(contexts) - set(CONTEXTS):
            raise UsageError(f"context {min(unknown)!r} does not exist: choose from {', '.join(CONTEXTS)}")
        if len(widths) != 3:
            raise UsageError(f"h_s has {len(widths)} widths: give 3 where there are contexts")
        try:
            self.sizes = Sizes(**(sizes or {}))
        except TypeError:
            raise UsageError(f"sizes are {', '.join(Sizes._fields)}: {sizes} has others") from None
        self.contexts = frozenset(contexts)
        self.levels, self.features = len(lambdas), widths[2]
        self.slices = []
        for i, count in enumerate(counts):
            start = sum(counts[:i])
            self.slices.append(Slice(start, start + count, counts[i - 1] if i else 0))
        self._inverse = torch.zeros(0)
        self.exact_networks = nn.ModuleList()
        self._boards: dict[tuple[int, int, torch.device], Checkerboard] = {}
        if trainable:
            self.networks = nn.ModuleList(self._float_networks(part) for part in self.slices)
        else:
            self._blank_networks()  # what cannot be built is noticed now

    def forward(self, y: Tensor, quality: Tensor) -> BottleneckOutput:
        if self.prior is not None and not self.training:
            return self._forward_frozen(y, quality)
        if not self.trainable:
            raise CheckpointError("this codec is frozen: build it in its trainable state to train it")
        z_bits, hyper = self._side_information(y, quality)
        features, base = self._through_hyper_synthesis(hyper, y.shape[2:])
        board = self._board(y)
        with torch.autocast(y.device.type, enabled=False):
            shift = (self.y_gain.log2(quality) + level_table_at(self.scale_offset, quality))[:, :, None, None]
            inverse = level_table_at(self.y_gain.inverse_levels(), quality)[:, :, None, None]
            gain = self._gain(inverse, quality)
            ordered = board.ordered(y.float())
        symbols: list[Tensor] = []
        scales: list[Tensor] = []

        def decide(part: Slice, places: slice, means: Tensor, log2_scales: Tensor) -> Tensor:
            residual = (ordered[:, part.channels, :, places] - means) * gain[:, part.channels]
            coded, decoded = quantised(residual, self.quantization, self.training)
            symbols.append(coded.flatten(1))
            scales.append(self._scales(log2_scales, shift[:, part.channels]).flatten(1))
            return decoded

        def restore(part: Slice, means: Tensor, steps: Tensor) -> Tensor:
            return means + inverse[:, part.channels] * steps

        arithmetic = Arithmetic(1.0, _call, restore)
        y_hat = self._walk(
            self.networks, arithmetic, board, features, base.float(), self._planes(quality), decide
        )
        with torch.autocast(y.device.type, enabled=False):
            coded, deviations = torch.cat(symbols, 1), torch.cat(scales, 1)
            likelihood = self.y_density.likelihood_lower_bound(self.y_density._likelihood(coded, deviations))
            y_bits = -torch.log2(likelihood).sum(1)
        return BottleneckOutput(y_hat, y_bits + z_bits, {"auxiliary": self.z_density.auxiliary_loss()})

    def _walk(
        self,
        networks: nn.ModuleList,
        arithmetic: Arithmetic,
        board: Checkerboard,
        features: Tensor,
        base: Tensor,
        planes: Tensor,
        decide: Decide,
    ) -> Tensor:
        """Goes through slices and halves in the order of coding. Training, encoding, decoding and search differ in
        their arithmetic and in how symbols are decided, and in nothing else.

        Args:
            networks: of each slice.
            features: H, [batch, Ch, h, w].
            base: mu and log2 sigma of the hyperprior, [batch, 2 M, h, w].
            planes: what tells the quality, [batch, levels, 1, 1].

        Returns:
            y_hat [batch, M, h, w]; all in the units of the arithmetic.
        """
        one, call = arithmetic.one, arithmetic.call
        features, base = board.ordered(features), board.ordered(base)
        y_hat: list[Tensor] = []
        everywhere: list[Tensor] = []  # y_hat as networks see it
        for part, networks_of_slice in zip(self.slices, networks, strict=True):
            has = dict(_items(networks_of_slice))
            contexts: list[Tensor] = []
            if everywhere:
                previous = torch.cat(everywhere, 1)
                if "channel" in has:
                    contexts.append(board.ordered(call(has["channel"], board.spread(previous))))
                if "global_inter" in has:
                    contexts.append(call(has["global_inter"], previous, previous, previous))
            own = base[:, part.channels], base[:, self.latent_channels :][:, part.channels]
            guide = everywhere[-1] if everywhere else features
            restored: list[Tensor] = []
            for half, places in enumerate(board.halves if self.halves(part) == 2 else board.whole):
                seen = [context[..., places] for context in contexts]
                if half:
                    anchors = CONTEXT_SCALE * restored[0]
                    if "local" in has:
                        seen.append(call(has["local"], anchors, board))
                    if "global_intra" in has:
                        keys = guide[..., board.halves[0]]
                        seen.append(call(has["global_intra"], guide[..., places], keys, anchors))
                if f"reweighting{half}" in has:
                    seen = [call(has[f"reweighting{half}"], torch.cat(seen, 1))]
                here = features[..., places]
                told = planes.to(here.dtype).expand(len(here), -1, 1, here.shape[-1])
                x = call(has[f"hidden{half}"], torch.cat([here, *seen, told], 1))
                refined = call(has[f"parameters{half}"], x).to(base.dtype)
                means, log2_scales = (
                    hyper[..., places] + more for hyper, more in zip(own, refined.chunk(2, 1), strict=True)
                )
                steps = decide(part, places, means, log2_scales) * one
                if f"correction{half}" in has:
                    reach = SYMBOL_REACH * one
                    known = torch.cat([x, steps.clamp(-reach, reach)], 1)
                    bound = type(one)(one / 2)
                    steps = steps + call(has[f"correction{half}"], known).clamp(-bound, bound)
                restored.append(arithmetic.restore(part, means, steps))
            y_hat.append(torch.cat(restored, -1))
            everywhere.append(CONTEXT_SCALE * y_hat[-1])
        return board.spread(torch.cat(y_hat, 1))

    def _board(self, y: Tensor) -> Checkerboard:
        """The checkerboard for latents like y."""
        height, width = y.shape[2:]
        if not self.training:
            return checkerboard(height, width, y.device)
        # Captured graphs go on reading from what they were captured with, so it is kept. Crops have few sizes.
        key = height, width, y.device
        if key not in self._boards:
            self._boards[key] = checkerboard(height, width, y.device)
        return self._boards[key]

    @torch.no_grad()
    def _coded(self, y: Tensor, z: Tensor, quality: int) -> Coded:
        self._frozen()
        z_symbols = to_symbols(z)
        board = checkerboard(y.shape[2], y.shape[3], y.device)
        gain, _ = self._gains(quality)
        shift = self._exact_shift(quality).to(y.device)
        ordered = board.ordered(y.float())
        steps: list[tuple[Tensor, Tensor]] = []

        def decide(part: Slice, places: slice, means: Tensor, log2_scales: Tensor) -> Tensor:
            indexes = scale_indexes(log2_scales + shift[part.channels])
            residual = ordered[:, part.channels, :, places] - means.to(torch.float32) * self._unit
            steps.append((indexes, rounded(residual * gain[:, part.channels])))
            return steps[-1][1].long()

        y_hat = self._walk_exactly(torch.from_numpy(z_symbols), board, quality, decide)
        coded = [(indexes.cpu().numpy(), symbols.cpu().numpy()) for indexes, symbols in steps]
        return Coded((self._z_indexes(z_symbols.shape[2:]), z_symbols), coded, y_hat)

    @torch.no_grad()
    def decompress(self, payloads: Sequence[bytes], shape: tuple[int, int], quality: int) -> Tensor:
        z_tables, y_tables = self._frozen()
        z_shape = self._z_shape(shape)
        readers = [AnsReader(payload) for payload in payloads]
        z_indexes = self._z_indexes(z_shape)
        z = np.stack([reader.pull(z_indexes, z_tables).reshape(-1, *z_shape) for reader in readers])
        device = self.y_gain.log2_gain.device
        shift = self._exact_shift(quality).to(device)

        def decide(part: Slice, places: slice, means: Tensor, log2_scales: Tensor) -> Tensor:
            indexes = scale_indexes(log2_scales + shift[part.channels]).cpu().numpy()
            symbols = [
                reader.pull(index.ravel(), y_tables).reshape(index.shape)
                for reader, index in zip(readers, indexes, strict=True)
            ]
            return torch.from_numpy(np.stack(symbols)).to(device).long()

        y_hat = self._walk_exactly(torch.from_numpy(z), checkerboard(*shape, device), quality, decide)
        for reader in readers:
            reader.finish()
        return y_hat

    def _walk_exactly(self, z: Tensor, board: Checkerboard, quality: int, decide: Decide) -> Tensor:
        """`_walk` in integers, from symbols of z; decides are given and give integers, y_hat is float32."""
        self._frozen()
        device = self.y_gain.log2_gain.device
        inverse = self._exact_inverse(quality).to(device)
        features = self.exact_features(self._exact_hyper(z.to(device).long(), quality))
        base = self.exact_base(features)
        features, base = (x[..., : board.height, : board.width] for x in (features, base))

        def restore(part: Slice, means: Tensor, steps: Tensor) -> Tensor:
            half = 1 << (INVERSE_BITS - 1)
            return means + ((steps * inverse[part.channels] + half) >> INVERSE_BITS)

        position = torch.tensor([quality], device=device)
        planes = (self._planes(position) * _ONE).int()  # exact: hats are multiples of 1 / QUALITY_STEPS
        y_hat = self._walk(
            self.exact_networks, Arithmetic(_ONE, _call, restore), board, features, base, planes, decide
        )
        # Divided in float64 lest the largest be infinite, and by a power of two.
        return (y_hat.double() / _ONE).to(torch.float32)

    def relaxed(self, y: Tensor, quality: int) -> Relaxation:
        return _RelaxedContext(self, y, quality)

    def _exact_inverse(self, quality: int) -> Tensor:
        """The decoder's gains, int64 [M, 1, 1]."""
        return interpolate_levels(self._inverse, quality, QUALITY_STEPS)[:, None, None]

    def _gains(self, quality: int) -> tuple[Tensor, Tensor]:
        """Of encoder and decoder at one quality, as files are made; [1, M, 1, 1] each."""
        level = torch.tensor([quality], device=self.y_gain.log2_gain.device)
        inverse = self._exact_inverse(quality)[None].to(self._unit) / (1 << INVERSE_BITS)
        return self._gain(inverse, level), inverse

    def _planes(self, quality: Tensor) -> Tensor:
        """Hat functions of the quality, one for each level: networks tell by them what linear interpolation between
        levels can tell. [batch, levels, 1, 1]."""
        position = (quality.float() / QUALITY_STEPS - 1).clamp(0, self.levels - 1)
        distance = position[:, None] - torch.arange(self.levels, device=quality.device)
        return (1 - distance.abs()).clamp(min=0)[:, :, None, None]

    def _gain(self, inverse: Tensor, quality: Tensor) -> Tensor:
        """The encoder's gain, that fits the decoder's inverse one, which is linear between levels."""
        offset = level_table_at(self.y_gain.log2_inverse_offset, quality)
        return torch.exp2(offset)[:, :, None, None] / inverse

    def _through_hyper_synthesis(self, hyper: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """H and the hyperprior's own entropy parameters, of latents of a shape (h, w)."""
        *first, last = self.hyper_synthesis
        for layer in first:
            hyper = layer(hyper)
        return hyper[..., : shape[0], : shape[1]], last(hyper)[..., : shape[0], : shape[1]]

    @property
    def arrangement(self) -> dict[str, Any]:
        """The arguments slices, contexts and sizes, whichever of them were left to their defaults: what a checkpoint
        says of itself must not depend on these."""
        return {
            "slices": [part.stop - part.start for part in self.slices],
            "contexts": [name for name in CONTEXTS if name in self.contexts],
            "sizes": {
                name: list(size) if isinstance(size, Sequence) else size
                for name, size in self.sizes._asdict().items()
            },
        }

    def halves(self, part: Slice) -> int:
        """Steps in which a slice is coded."""
        own = "global_intra" if part.start else "global_hyper"
        return 2 if {"local", own} & self.contexts else 1

    def _blank_networks(self) -> nn.ModuleList:
        """All networks of slices, without memory for their weights."""
        with torch.device("meta"):
            return nn.ModuleList(self._float_networks(part) for part in self.slices)

    def _float_networks(self, part: Slice) -> nn.ModuleDict:
        size, count, before = self.sizes, part.stop - part.start, part.start
        networks: dict[str, nn.Module] = {}
        shared = own = 0  # channels of contexts, of both halves and of the second alone
        if before and "channel" in self.contexts:
            first, second = size.channel
            networks["channel"] = nn.Sequential(
                nn.Conv2d(before, first, 3, padding=1), nn.ReLU(), nn.Conv2d(first, second, 3, padding=1)
            )
            shared += second
        if before and "global_inter" in self.contexts:
            networks["global_inter"] = LinearAttention(before, before, size.attention)
            shared += size.attention
        if "local" in self.contexts:
            networks["local"] = AnchorConvolution(count, size.local)
            own += size.local
        if ("global_intra" if before else "global_hyper") in self.contexts:
            networks["global_intra"] = LinearAttention(part.previous or self.features, count, size.attention)
            own += size.attention
        for half in range(self.halves(part)):
            gathered = shared + own * half
            if gathered and "reweighting" in self.contexts:
                networks[f"reweighting{half}"] = ChannelGate(gathered)
            first, second = size.hidden
            networks[f"hidden{half}"] = nn.Sequential(
                nn.Conv2d(self.features + gathered + self.levels, first, 1), nn.ReLU(),
                nn.Conv2d(first, second, 1), nn.ReLU(),
            )  # fmt: skip
            networks[f"parameters{half}"] = nn.Sequential(silent(nn.Conv2d(second, 2 * count, 1)))
            if "residual_prediction" in self.contexts:
                networks[f"correction{half}"] = nn.Sequential(
                    nn.Conv2d(second + count, size.correction, 1), nn.ReLU(),
                    silent(nn.Conv2d(size.correction, count, 1)),
                )  # fmt: skip
        return nn.ModuleDict(networks)

    def freeze(self, counts: Sequence[Counts] | None = None) -> None:
        super().freeze(counts)
        inverse = self.y_gain.inverse_levels().detach().double() * (1 << INVERSE_BITS)
        self._inverse = inverse.round().clamp(1, INVERSE_LIMIT - 1).long().cpu()
        self._enter(self.networks)

    def _enter(self, networks: nn.ModuleList) -> None:
        """Enters the frozen state with networks of slices in floating point; the hyperprior's are there."""
        assert self.prior is not None
        self.exact_features = IntegerNetwork(self.prior.convolutions[:-1])
        self.exact_base = IntegerNetwork(self.prior.convolutions[-1:])
        self.exact_networks = nn.ModuleList(
            nn.ModuleDict({name: _EXACT[type(network)].from_float(network) for name, network in _items(has)})
            for has in networks
        ).to(self.y_gain.log2_gain.device)

    @torch.no_grad()
    def thaw(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        """As of a hyperprior, whose arrays may be given too: it, or a checkpoint with other slices or contexts, leaves
        the networks of slices as they are."""
        super().thaw(arrays)
        with suppress(CheckpointError):
            for i, has in enumerate(self._filled_networks(arrays)):
                self.networks[i].load_state_dict(has.state_dict())

    def frozen_arrays(self) -> dict[str, NDArray[np.int32]]:
        arrays = super().frozen_arrays() | {"inverse": self._inverse.numpy().astype(np.int32)}
        for i, has in enumerate(self.exact_networks):
            layers = [layer for layer in has.modules() if isinstance(layer, IntegerConvolution)]
            for name in ("weight", "bias"):
                parts = [getattr(layer, name).flatten() for layer in layers]
                arrays[f"slices.{i}.{name}"] = torch.cat(parts).cpu().numpy().astype(np.int32)
        return arrays

    def load_frozen(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        super().load_frozen(arrays)
        assert self.prior is not None
        shape = (self.levels, self.latent_channels)
        inverse = arrays.get("inverse", np.zeros(0))
        if inverse.shape != shape:
            raise CheckpointError(f"the checkpoint's inverse gains do not have shape {list(shape)}")
        if inverse.min() < 1 or inverse.max() >= INVERSE_LIMIT:
            raise CheckpointError("the checkpoint's inverse gains are out of range: export it again")
        base = IntegerNetwork(self.prior.convolutions[-1:])
        if base.channels[0] != self.features or not base.pointwise:
            raise CheckpointError("the checkpoint's integer prior does not fit its architecture")
        networks = self._filled_networks(arrays)
        self._inverse = torch.from_numpy(inverse.astype(np.int64))
        self._enter(networks)

    @torch.no_grad()
    def _filled_networks(self, arrays: Mapping[str, NDArray[np.int32]]) -> nn.ModuleList:
        """The networks of slices with the weights of a frozen state, in float64, which holds them exactly.

        Raises:
            CheckpointError: it has more or fewer of them.
        """
        networks = self._blank_networks().double().to_empty(device="cpu")
        for i, has in enumerate(networks):
            layers = [layer for layer in has.modules() if isinstance(layer, nn.Conv2d)]
            for kind, bits in (("weight", WEIGHT_BITS), ("bias", WEIGHT_BITS + FRACTION_BITS)):
                parameters = [getattr(layer, kind) for layer in layers]
                counts = [parameter.numel() for parameter in parameters]
                found = arrays.get(f"slices.{i}.{kind}", np.zeros(0))
                if found.shape != (sum(counts),):
                    raise CheckpointError(
                        f"networks of the checkpoint's slice {i} do not fit its architecture"
                    )
                values = torch.from_numpy(found.astype(np.float64)) / (1 << bits)
                for parameter, part in zip(parameters, values.split(counts), strict=True):
                    parameter.copy_(part.view(parameter.shape))
        return networks


def _items(networks: nn.Module) -> list[tuple[str, Any]]:
    assert isinstance(networks, nn.ModuleDict)
    return list(networks.items())


class _RelaxedContext(RelaxedHyperprior):
    """y and z, with all networks between them without their rounding.

    Symbols are drawn in the order of coding, since later ones depend on what earlier ones restore.
    """

    _bottleneck: ContextBottleneck

    def sample(self, rounding: SoftRounding) -> tuple[Tensor, Tensor]:
        y_offset, z_offset = self.variables
        z = rounding(self._z + z_offset)
        bottleneck, quality = self._bottleneck, self._quality
        board = checkerboard(self._y.shape[2], self._y.shape[3], self._y.device)
        steps, offsets = board.ordered(self._y), board.ordered(y_offset)
        shift = bottleneck._exact_shift(quality).to(steps)
        bits = [self._z_costs(z, self._z_rows).sum()]

        def decide(part: Slice, places: slice, means: Tensor, log2_scales: Tensor) -> Tensor:
            residual = (steps[:, part.channels, :, places] - means / _ONE) * self._gain[:, part.channels]
            y = rounding(residual + offsets[:, part.channels, :, places])
            bits.append(self._bits(y, scale_places(log2_scales + shift[part.channels])))
            return y.value

        def restore(part: Slice, means: Tensor, steps: Tensor) -> Tensor:
            return means + steps * self._inverse[:, part.channels]

        features = bottleneck.exact_features.relaxed(bottleneck._exact_hyper(z.value, quality))
        base = bottleneck.exact_base.relaxed(features)
        features, base = (x[..., : board.height, : board.width] for x in (features, base))
        planes = bottleneck._planes(torch.full((1,), quality, device=steps.device)) * _ONE
        arithmetic = Arithmetic(float(_ONE), _call_relaxed, restore)
        y_hat = bottleneck._walk(bottleneck.exact_networks, arithmetic, board, features, base, planes, decide)
        return torch.stack(bits).sum(), y_hat / _ONE
