"""Codebooks: latent vectors to indices and back, by every arrangement of books that the literature has.

```
rows of z --(inward)--> vectors --nearest--> indices --look up--> values --(outward)--> rows of z_hat
```

A `Layer` quantises all channels once, by groups of channels side by side; a `ResidualQuantiser` is a chain of layers,
each for what the ones before it left. VQ, product VQ, RVQ, GRVQ and MCRVQ differ in the groups of their layers alone,
FSQ in its table. A `NestedQuantiser` has one table a quality.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from compand.bottlenecks.code_tables import (
    Codebooks,
    Projection,
    ScalarGrid,
    Table,
    distributed,
    kmeans,
    nearest,
)
from compand.errors import UsageError

CHUNK = 4096
"""Positions whose codes are looked up at a time outside training."""

VECTORS_A_CODE = 32
"""Vectors for each code that a quantiser is initialised with, at most."""

ENCODER_PARTS = ("usage", "inward", "inward_bias", "mean", "deviation")
"""Last part of the names of what `Quantiser.decode` does not need."""

NESTED_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass
class Quantised:
    """What a quantiser gives in training and evaluation.

    Attributes:
        z_hat: float32 [batch, M, h, w]; in training its gradient reaches z (straight-through estimator).
        indices: int64 [batch, planes, h, w]; -1 in the planes that an item's depth does not use.
        losses: "commitment", mean of (z - sg(e))^2, which moves the encoder, and "codebook", mean of (sg(z) - e)^2,
            which moves codes learned by gradient (van den Oord et al. 2017, equation 3); scalars, not weighted, over
            the layers that the items use. Zero where there is nothing of the kind.
    """

    z_hat: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


@dataclass
class _Step:
    indices: Tensor  # int64 [G, N]
    rows: Tensor  # the contribution to z_hat, [N, M]
    commitment: Tensor  # mean squared error of each row, [N]
    codebook: Tensor  # mean squared error of each row, [N]


def _step(projection: Projection, table: Table, rows: Tensor, vectors: Tensor, direct: bool) -> _Step:
    """Quantises with gradients.

    Without linear maps the contribution carries no gradient of the encoder: that of z_hat is handed to z as a whole.
    With them it runs through both maps (Kumar et al. 2023, section 3.2).

    Args:
        projection, table: the layer.
        rows: what is to be quantised, [N, M].
        vectors: `projection.vectors(rows)`.
        direct: whether the gradient of the contribution reaches codes.
    """
    indices = table.nearest(vectors)
    values = table.values(indices)
    handed = values if direct else values.detach()
    if projection.linear:
        straight = table.straight(vectors)
        handed = handed + (straight - straight.detach())
    contribution = projection.rows(handed)
    if isinstance(table, ScalarGrid):
        # Grids have no place of their own in the space of rows: the maps around them are tied to it as codes would be.
        nearby = projection.rows(values)
        by_row = [(rows - nearby.detach()).square().mean(1), (rows.detach() - nearby).square().mean(1)]
        projection.recentre(rows - nearby)
        return _Step(indices, contribution, *by_row)
    # Zeros that fill up a group are not values that a code stands for.
    count = vectors.shape[0] * vectors.shape[2] if projection.linear else rows.shape[1]
    by_row = [errors.expand(vectors.shape).sum((0, 2)) / count for errors in table.distances(vectors, values)]
    return _Step(indices, contribution, *by_row)


class Layer(nn.Module):
    """All channels quantised once: the vectors of each group of channels by a codebook of its own.

    Args:
        projection: channels to vectors.
        table: their values.
    """

    def __init__(self, projection: Projection, table: Table) -> None:
        super().__init__()
        self.projection, self.table = projection, table
        if isinstance(table, Codebooks) and not projection.linear:
            with torch.no_grad():  # what fills up the smaller groups is zero from the start
                table.codes.copy_(projection.split(projection.join(table.codes.clone())))

    def choose(self, rows: Tensor) -> Tensor:
        """[N, M] -> int64 [G, N]."""
        return self.table.nearest(self.projection.vectors(rows))

    def values(self, indices: Tensor) -> Tensor:
        """Int64 [G, N] -> [N, M]."""
        return self.projection.rows(self.table.values(indices))

    def initialise(self, rows: Tensor) -> None:
        """Fits projection and table to rows [N, M]."""
        self.projection.fit_inward(rows, whiten=isinstance(self.table, ScalarGrid))
        vectors = self.projection.vectors(rows)
        self.table.initialise(vectors)
        self.projection.fit_outward(rows, self.table.values(self.table.nearest(vectors)))


class Quantiser(nn.Module, ABC):
    """Latent vectors to indices and back, at several depths.

    Attributes:
        channels: M of the latents.
        sizes: sizes[d - 1] is the number of codes K of every plane of indices that depth d uses.
    """

    channels: int
    sizes: tuple[tuple[int, ...], ...]

    @property
    def depths(self) -> int:
        """Number of depths; they run from 1 to this."""
        return len(self.sizes)

    def planes(self, depth: int) -> int:
        """Planes of indices that a depth uses. Raises UsageError if there is no such depth."""
        if not 1 <= depth <= self.depths:
            raise UsageError(f"depth {depth} does not exist: choose 1 to {self.depths}")
        return len(self.sizes[depth - 1])

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that `decode` does not need."""
        return tuple(name for name in self.state_dict() if name.split(".")[-1] in ENCODER_PARTS)

    def forward(self, z: Tensor, depth: Tensor) -> Quantised:
        """Quantises each item to its own depth.

        In training mode, tables learn: moving averages, usage and restarts at once, gradients through the losses. Of
        residual layers all learn from all items, whatever their depths, which are drawn regardless of the item. Codes
        learned by gradient get that of z_hat too where z itself takes none, which is the case when the encoder is
        frozen. No value is read back from the device, so that the step can be captured or compiled.

        In evaluation mode, indices and z_hat are exactly those of `encode` and `decode`, without losses.

        Args:
            z: [batch, M, h, w].
            depth: int64 [batch], 1 .. depths.
        """
        if not self.training:
            return self._evaluated(z, depth)
        with torch.autocast(z.device.type, enabled=False):
            rows = _rows(z.float())
            positions = z.shape[2] * z.shape[3]
            row_depth = depth[:, None].expand(-1, positions).flatten()
            z_hat, indices, losses = self._learned(rows, row_depth)
            shape = (z.shape[0], *z.shape[2:])
            return Quantised(
                z_hat.unflatten(0, shape).permute(0, 3, 1, 2),
                indices.unflatten(1, shape).transpose(0, 1),
                losses,
            )

    def _evaluated(self, z: Tensor, depth: Tensor) -> Quantised:
        most = self.planes(self.depths)
        values, planes = [], []
        for item, level in zip(z, depth.tolist(), strict=True):
            indices = self.encode(item[None], level)
            values.append(self.decode(indices, level))
            planes.append(F.pad(indices, (0, 0, 0, 0, 0, most - indices.shape[1]), value=-1))
        return Quantised(torch.cat(values), torch.cat(planes), {})

    @torch.no_grad()
    def encode(self, z: Tensor, depth: int) -> Tensor:
        """z: [batch, M, h, w] -> int64 [batch, planes(depth), h, w].

        By so many positions of one item at a time that the memory for distances stays bounded, and the choice does not
        depend on what else is in the batch.

        Raises:
            UsageError: there is no such depth.
        """
        planes = self.planes(depth)
        with torch.autocast(z.device.type, enabled=False):
            items = []
            for item in z:
                chunks = [self._choose(rows, depth) for rows in _rows(item[None].float()).split(CHUNK)]
                items.append(torch.cat(chunks, 1).view(planes, *z.shape[2:]))
            return torch.stack(items)

    @torch.no_grad()
    def decode(self, indices: Tensor, depth: int) -> Tensor:
        """Indices, int64 [batch, planes(depth), h, w] -> z_hat, float32 [batch, M, h, w].

        Raises:
            UsageError: there is no such depth, another number of planes, or an index outside its codebook.
        """
        planes = self.planes(depth)
        if indices.shape[1] != planes:
            raise UsageError(
                f"{indices.shape[1]} planes of indices are not those of depth {depth}: give {planes}"
            )
        sizes = torch.tensor(self.sizes[depth - 1], device=indices.device)[:, None, None]
        if bool(((indices < 0) | (indices >= sizes)).any()):
            raise UsageError(
                f"indices {int(indices.min())} to {int(indices.max())} exceed codebooks of "
                f"{', '.join(str(size) for size in sorted(set(self.sizes[depth - 1])))}: give 0 to size - 1"
            )
        with torch.autocast(indices.device.type, enabled=False):
            items = [self._value(item.flatten(1), depth) for item in indices]
            z_hat = torch.stack(items).unflatten(1, indices.shape[2:])
            return z_hat.permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Fits codes (k-means) and linear maps (principal directions) to latents, before training; untrained codes
        that are not initialised restart from the vectors of their first batch instead. Of several processes all take
        what the first one found.

        Args:
            z: latents of one or several batches, [batch, M, h, w]; of more than 32 vectors a code, random ones are
                looked at.
        """
        rows = _rows(z.float())
        most = VECTORS_A_CODE * max(table.size for table in self.tables())
        with torch.autocast(z.device.type, enabled=False):
            self._initialise(rows[torch.randperm(len(rows), device=rows.device)[:most]])
        if distributed():
            for tensor in self.state_dict().values():
                dist.broadcast(tensor, 0)

    @property
    def initialised(self) -> bool:
        """Whether the tables have seen vectors: by `initialise`, training or loaded weights."""
        return any(bool(table.usage.any()) for table in self.tables())

    @abstractmethod
    def tables(self) -> list[Table]:
        """Every table, in the order of planes or, where each depth has its own, of depths."""

    def usage(self) -> list[Tensor]:
        """Frequency of each code in recent training, [K] of sum 1 for each codebook in the order of `tables`."""
        return [share for table in self.tables() for share in table.shares()]

    def perplexity(self) -> list[float]:
        """2 to the entropy of `usage` in bits, for each: how many codes, all used alike, it amounts to; 1 to K."""
        return [float(torch.special.entr(share.double()).sum().exp()) for share in self.usage()]

    @abstractmethod
    def energy_shares(self, z: Tensor) -> Tensor:
        """Energy (variance over all positions, summed over channels) of what each plane of the greatest depth
        contributes to z_hat, as shares of their sum: float32 [planes]. z: [batch, M, h, w]."""

    @abstractmethod
    def _learned(self, rows: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Rows [N, M], depths [N] -> z_hat [N, M], indices [planes, N], losses; one step of learning."""

    @abstractmethod
    def _choose(self, rows: Tensor, depth: int) -> Tensor:
        """Rows [N, M] -> int64 [planes(depth), N]."""

    @abstractmethod
    def _value(self, indices: Tensor, depth: int) -> Tensor:
        """Int64 [planes(depth), N] -> z_hat [N, M]."""

    @abstractmethod
    def _initialise(self, rows: Tensor) -> None:
        """Fits everything to rows [N, M]."""


def _rows(z: Tensor) -> Tensor:
    """[batch, M, h, w] -> [batch h w, M]."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def _losses(steps: Sequence[_Step], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean errors of the rows that each step counts for, by weights [N] in {0, 1}."""
    weight = torch.stack([*weights])
    total = weight.sum().clamp(min=1)
    return {
        "commitment": (torch.stack([step.commitment for step in steps]) * weight).sum() / total,
        "codebook": (torch.stack([step.codebook for step in steps]) * weight).sum() / total,
    }


class ResidualQuantiser(Quantiser):
    """A chain of layers, each for what the ones before it left; depth d is the first d of them.

    ```
    r_1 = z;   q_l = layer_l(r_l);   r_(l+1) = r_l - q_l;   z_hat = q_1 + ... + q_d
    ```

    Planes are in the order (layer, group): [l0g0, l0g1, l1g0, ...].

    Args:
        channels: M.
        layers: the layers.

    Raises:
        UsageError: there are none.
    """

    def __init__(self, channels: int, layers: Sequence[Layer]) -> None:
        super().__init__()
        if not layers:
            raise UsageError("a quantiser of 0 layers does not exist: give at least 1")
        self.channels = channels
        self.layers = nn.ModuleList(layers)
        by_layer = [(table.size,) * table.groups for table in self.tables()]
        self.sizes = tuple(itertools.accumulate(by_layer))

    @property
    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def tables(self) -> list[Table]:
        return [layer.table for layer in self._layers]

    def _learned(self, rows: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, residual = torch.zeros_like(rows), rows
        direct = not rows.requires_grad
        linear = self._layers[0].projection.linear
        planes: list[Tensor] = []
        steps: list[_Step] = []
        weights: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            vectors = layer.projection.vectors(residual)
            step = _step(layer.projection, layer.table, residual, vectors, direct)
            layer.table.learn(vectors, step.indices)
            used = depth > number
            total = total + step.rows * used[:, None]
            residual = residual - (step.rows if linear else step.rows.detach())
            planes.append(step.indices.where(used, -1))
            steps.append(step)
            weights.append(used.to(rows))
        if not linear:
            total = total + (rows - rows.detach())
        return total, torch.cat(planes), _losses(steps, weights)

    def _choose(self, rows: Tensor, depth: int) -> Tensor:
        planes = []
        for layer in self._layers[:depth]:
            planes.append(layer.choose(rows))
            rows = rows - layer.values(planes[-1])
        return torch.cat(planes)

    def _value(self, indices: Tensor, depth: int) -> Tensor:
        layers = self._layers[:depth]
        parts = indices.split([layer.table.groups for layer in layers])
        total = indices.new_zeros(indices.shape[1], self.channels, dtype=torch.float32)
        for layer, part in zip(layers, parts, strict=True):
            total = total + layer.values(part)
        return total

    def _initialise(self, rows: Tensor) -> None:
        for layer in self._layers:
            layer.initialise(rows)
            rows = rows - layer.values(layer.choose(rows))

    @torch.no_grad()
    def energy_shares(self, z: Tensor) -> Tensor:
        indices = self.encode(z, self.depths).transpose(0, 1).flatten(1)
        energies = []
        parts = indices.split([layer.table.groups for layer in self._layers])
        for layer, part in zip(self._layers, parts, strict=True):
            by_channel = layer.values(part).var(0, correction=0)
            energies += [group.sum() for group in by_channel.split(layer.projection.widths)]
        energy = torch.stack(energies)
        return energy / energy.sum().clamp(min=torch.finfo(torch.float32).tiny)


class NestedQuantiser(Quantiser):
    """One plane of indices into a codebook of each depth's own size, the largest of which is the base.

    After Mao et al. 2024 ("Extreme Image Compression using Fine-tuned VQGANs"): the base is trained first (every item
    at the greatest depth), `recluster` makes the smaller codebooks from its code vectors, and these are then trained
    on while encoder and decoder stay as they are. A table learns from the items of its own depth alone.

    Args:
        channels: M.
        sizes: codes of each depth, growing; the last is the base's.
        code_dim: see `Projection`; the maps are shared by all depths.
        book: further arguments of `Codebooks`.

    Raises:
        UsageError: the sizes do not grow, or an argument that does not exist.
    """

    def __init__(
        self, channels: int, sizes: Sequence[int] = NESTED_SIZES, code_dim: int | None = None, **book: Any
    ) -> None:
        super().__init__()
        if not sizes or any(small >= large for small, large in itertools.pairwise(sizes)):
            raise UsageError(f"codebooks of sizes {list(sizes)} are not nested: give growing sizes")
        self.channels = channels
        self.sizes = tuple((size,) for size in sizes)
        self.projection = Projection(channels, 1, code_dim)
        self.books = nn.ModuleList(Codebooks(1, size, self.projection.dimensions, **book) for size in sizes)

    @property
    def _books(self) -> list[Codebooks]:
        return [book for book in self.books if isinstance(book, Codebooks)]

    def tables(self) -> list[Table]:
        return [*self._books]

    @torch.no_grad()
    def recluster(self, seed: int = 0, attempts: int = 4) -> None:
        """Makes every smaller codebook from the base's code vectors, by k-means that weights them by their use.

        Args:
            seed: of the random numbers of k-means++.
            attempts: runs of k-means, of which the one with the least error is kept.
        """
        generator = torch.Generator().manual_seed(seed)
        vectors, weight = self._base()
        for book in self._books[:-1]:
            found = []
            for _ in range(attempts):
                centres, indices = kmeans(
                    vectors, book.size, 100, distance=book.distance, weight=weight, generator=generator
                )
                error = (vectors - centres[indices]).square().sum(1) @ weight
                found.append((float(error), centres))
            self._adopt(book, min(found, key=lambda pair: pair[0])[1])

    @torch.no_grad()
    def random_subset(self, seed: int = 0) -> None:
        """Makes every smaller codebook a random choice of the base's code vectors, what `recluster` is held against."""
        generator = torch.Generator().manual_seed(seed)
        vectors, _ = self._base()
        for book in self._books[:-1]:
            self._adopt(book, vectors[torch.randperm(len(vectors), generator=generator)[: book.size]])

    def _base(self) -> tuple[Tensor, Tensor]:
        """Code vectors [K0, C] and use [K0] of the base, float64; codes that were never used count a little."""
        base = self._books[-1]
        return base.codes[0].detach().double().cpu(), base.usage[0].double().cpu().clamp(min=1e-6)

    def _adopt(self, book: Codebooks, codes: Tensor) -> None:
        vectors, weight = self._base()
        share = torch.bincount(nearest(vectors, codes, book.distance), weight, book.size) / weight.sum()
        book.codes[0].copy_(codes)
        book.usage[0].copy_(share * book.size)

    def _learned(self, rows: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, chosen = torch.zeros_like(rows), torch.zeros_like(depth)
        vectors = self.projection.vectors(rows)
        steps: list[_Step] = []
        weights: list[Tensor] = []
        for number, book in enumerate(self._books, 1):
            step = _step(self.projection, book, rows, vectors, direct=not rows.requires_grad)
            used = depth == number
            weights.append(used.to(rows))
            book.learn(vectors, step.indices, weights[-1])
            total = total + step.rows * used[:, None]
            chosen = torch.where(used, step.indices[0], chosen)
            steps.append(step)
        if not self.projection.linear:
            total = total + (rows - rows.detach())
        return total, chosen[None], _losses(steps, weights)

    def _choose(self, rows: Tensor, depth: int) -> Tensor:
        return self._books[depth - 1].nearest(self.projection.vectors(rows))

    def _value(self, indices: Tensor, depth: int) -> Tensor:
        return self.projection.rows(self._books[depth - 1].values(indices))

    def _initialise(self, rows: Tensor) -> None:
        Layer(self.projection, self._books[-1]).initialise(rows)
        self.recluster()

    def energy_shares(self, z: Tensor) -> Tensor:
        return torch.ones(1, device=z.device)


def _chain(
    channels: int, groups: Sequence[int], size: int, code_dim: int | None, **book: Any
) -> ResidualQuantiser:
    projections = [Projection(channels, number, code_dim) for number in groups]
    layers = [Layer(part, Codebooks(part.groups, size, part.dimensions, **book)) for part in projections]
    return ResidualQuantiser(channels, layers)


def vq(channels: int, size: int = 1024, code_dim: int | None = None, **book: Any) -> Quantiser:
    """Vector quantisation (van den Oord et al. 2017): one plane, one depth."""
    return _chain(channels, [1], size, code_dim, **book)


def product(
    channels: int, groups: int = 4, size: int = 1024, code_dim: int | None = None, **book: Any
) -> Quantiser:
    """Product quantisation (Jegou et al. 2011): a plane for each group of channels, one depth."""
    return _chain(channels, [groups], size, code_dim, **book)


def rvq(
    channels: int, layers: int = 8, size: int = 1024, code_dim: int | None = None, **book: Any
) -> Quantiser:
    """Residual vector quantisation (Zeghidour et al. 2021, section III-C): a plane more with each depth."""
    return _chain(channels, [1] * layers, size, code_dim, **book)


def grvq(
    channels: int,
    groups: int = 2,
    layers: int = 4,
    size: int = 1024,
    code_dim: int | None = None,
    **book: Any,
) -> Quantiser:
    """Group-residual vector quantisation (Yang et al. 2023, HiFi-Codec, section 3.2): `groups` planes more with each
    depth. One group is `rvq`, one layer is `product`."""
    return _chain(channels, [groups] * layers, size, code_dim, **book)


def mcrvq(
    channels: int,
    parallel: int = 3,
    residual: int = 5,
    size: int = 1024,
    code_dim: int | None = None,
    **book: Any,
) -> Quantiser:
    """Masked-channel residual vector quantisation (Ji et al. 2025, Language-Codec, section 3.2).

    `parallel` codebooks each see z with all but their share of the channels masked; their codes are zero there, so
    that only the share is stored. Further books quantise what the sum of those leaves. Depth 1 is the parallel books,
    each depth more one residual book.
    """
    return _chain(channels, [parallel] + [1] * residual, size, code_dim, **book)


def fsq(
    channels: int, levels: Sequence[int] = (8, 5, 5, 5), groups: int = 1, layers: int = 1, decay: float = 0.99
) -> Quantiser:
    """Finite scalar quantisation, see `ScalarGrid`: `groups` planes of prod(levels) codes, as many more with each
    layer of residuals."""
    grids = [ScalarGrid(groups, levels, decay) for _ in range(layers)]
    return ResidualQuantiser(
        channels, [Layer(Projection(channels, groups, grid.dimensions), grid) for grid in grids]
    )


KINDS: dict[str, Callable[..., Quantiser]] = {
    "vq": vq,
    "product": product,
    "rvq": rvq,
    "grvq": grvq,
    "mcrvq": mcrvq,
    "fsq": fsq,
    "nested": NestedQuantiser,
}
"""Quantisers by the name that configurations give them."""

BOOK_OPTIONS = ("distance", "update", "decay", "restart")
"""Arguments of `Codebooks` that every quantiser with learned codes takes."""


def build(kind: str, channels: int, **options: Any) -> Quantiser:
    """The quantiser of that name.

    Args:
        kind: a name in KINDS.
        channels: M of the latents.
        options: arguments of what KINDS names, and, save for "fsq", those of BOOK_OPTIONS.

    Raises:
        UsageError: no such kind, an option that it does not take, or a value that does not exist.
    """
    if kind not in KINDS:
        raise UsageError(f"quantiser {kind!r} does not exist: choose one of {', '.join(KINDS)}")
    parameters = list(signature(KINDS[kind]).parameters.values())[1:]
    taken = [parameter.name for parameter in parameters if parameter.kind is not Parameter.VAR_KEYWORD]
    if len(taken) < len(parameters):
        taken += BOOK_OPTIONS
    unknown = [name for name in options if name not in taken]
    if unknown:
        raise UsageError(f"quantiser {kind!r} has no option {unknown[0]!r}: choose among {', '.join(taken)}")
    return KINDS[kind](channels, **options)
