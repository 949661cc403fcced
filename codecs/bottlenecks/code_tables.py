"""The parts of quantisers: tables of codes, and the maps between channels and the vectors that tables hold."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from compand.errors import UsageError

DISTANCES = ("euclidean", "cosine")
UPDATES = ("ema", "gradient")

STATISTICS_DECAY = 0.9
"""Of the mean and deviation that the dimensions of a grid are normalised by. Latents move quickly just after a
quantiser is put in; averages as slow as those of codes would lag behind."""

LEAST_VARIANCE = 1e-10

MOST_CODES = 1 << 20
"""Of one codebook: 4 MB of `Table.usage`."""

ITERATIONS = 12
"""Of k-means over vectors of a batch; training moves the codes on."""


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def nearest(vectors: Tensor, codes: Tensor, distance: str = "euclidean") -> Tensor:
    """Index of the nearest code of each vector: [..., N, C], [..., K, C] -> int64 [..., N]. Of equal ones the first.

    Euclidean distances are taken from the mean of the codes: v.c - |c|^2 / 2 is a small difference of large numbers
    where codes lie close together far from zero.
    """
    if distance == "cosine":
        scores = F.normalize(vectors, dim=-1) @ F.normalize(codes, dim=-1).mT
    else:
        centre = codes.mean(-2, keepdim=True)
        codes = codes - centre
        scores = (vectors - centre) @ codes.mT - codes.square().sum(-1)[..., None, :] / 2
    return scores.argmax(-1)


def _totals(vectors: Tensor, indices: Tensor, size: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and weighted sum of the vectors of each index, [..., K] and [..., K, C].

    By a matrix product, which adds in the same order every time; scattered additions on a GPU do not.
    """
    chosen = (indices[..., None] == torch.arange(size, device=indices.device)).to(vectors)
    if weight is not None:
        chosen = chosen * weight[..., None]
    return chosen.sum(-2), chosen.mT @ vectors


def _spread(vectors: Tensor, size: int, weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """`size` of the vectors, far from each other: each drawn by weight x squared distance to those before it
    (k-means++, Arthur & Vassilvitskii 2007). Returns their indices."""
    chosen = [torch.multinomial(weight, 1, generator=generator)]
    distance = (vectors - vectors[chosen[0]]).square().sum(1)
    for _ in range(size - 1):
        odds = weight * distance
        chosen.append(torch.multinomial(odds if float(odds.sum()) > 0 else weight, 1, generator=generator))
        distance = torch.minimum(distance, (vectors - vectors[chosen[-1]]).square().sum(1))
    return torch.cat(chosen)


def kmeans(
    vectors: Tensor,
    size: int,
    iterations: int,
    *,
    distance: str = "euclidean",
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random vectors, or, where they are weighted, from vectors far from each other.

    Args:
        vectors: [N, C]; fewer than `size` are taken repeatedly.
        size: number K of centres.
        iterations: how often centres move.
        distance: "euclidean" or "cosine".
        weight: positive, [N]; None: all count the same.
        generator: of random numbers; None: torch's.

    Returns:
        Centres [K, C] and the index of each vector's centre, int64 [N]. A centre that got no vector is moved to a
        random one, save in the last iteration.
    """

    def picks() -> Tensor:
        return torch.randint(vectors.shape[0], (size,), generator=generator, device=vectors.device)

    if weight is not None:
        start = _spread(vectors, size, weight, generator)
    elif vectors.shape[0] >= size:
        start = torch.randperm(vectors.shape[0], generator=generator, device=vectors.device)[:size]
    else:
        start = picks()
    centres = vectors[start]
    for step in range(iterations):
        counts, sums = _totals(vectors, nearest(vectors, centres, distance), size, weight)
        means = sums / counts.clamp(min=torch.finfo(counts.dtype).tiny)[:, None]
        spare = centres if step == iterations - 1 else vectors[picks()]
        centres = torch.where(counts[:, None] > 0, means, spare)
    return centres, nearest(vectors, centres, distance)


class Table(nn.Module, ABC):
    """Values of G codebooks side by side, of K codes of C dimensions each.

    Attributes:
        groups, size, dimensions: G, K and C.
        usage: how often each code is taken, 1 being its fair share, as a moving average of training; [G, K], zero
            before `initialise` or the first step.
    """

    usage: Tensor

    def __init__(self, groups: int, size: int, dimensions: int, decay: float) -> None:
        super().__init__()
        if groups < 1 or size < 2 or dimensions < 1:
            raise UsageError(
                f"{groups} codebooks of {size} codes of {dimensions} dimensions do not exist: take at least 1, 2 and 1"
            )
        if size > MOST_CODES:
            raise UsageError(f"codebooks of {size} codes are too large: choose at most {MOST_CODES} codes")
        if not 0 <= decay < 1:
            raise UsageError(f"decay {decay} does not exist: choose at least 0 and less than 1")
        self.groups, self.size, self.dimensions, self.decay = groups, size, dimensions, decay
        self.register_buffer("usage", torch.zeros(groups, size))

    @abstractmethod
    def nearest(self, vectors: Tensor) -> Tensor:
        """[G, N, C] -> int64 [G, N]."""

    @abstractmethod
    def values(self, indices: Tensor) -> Tensor:
        """Int64 [G, N] -> [G, N, C]."""

    @abstractmethod
    def straight(self, vectors: Tensor) -> Tensor:
        """What the gradient of the values is handed to: differentiable in the vectors, near to their values."""

    @abstractmethod
    def distances(self, vectors: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors of commitment and of codebook learning, each [G, N, C] or a zero that broadcasts."""

    @abstractmethod
    def learn(self, vectors: Tensor, indices: Tensor, weight: Tensor | None = None) -> None:
        """One training step outside the gradient: [G, N, C] and [G, N]; weight [N] in {0, 1}, None: all ones."""

    @abstractmethod
    def initialise(self, vectors: Tensor) -> None:
        """Fits the table to vectors [G, N, C]."""

    def shares(self) -> Tensor:
        """Frequency of each code, [G, K], each row of sum 1 (or 0 before training)."""
        return self.usage / self.usage.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def _count(self, counts: Tensor) -> Tensor:
        """Moves `usage` towards counts [G, K] of one batch; returns the new value, unchanged for an empty batch."""
        total = counts.sum(1, keepdim=True)
        share = counts * self.size / total.clamp(min=1)
        return torch.where(total > 0, torch.lerp(share, self.usage, self.decay), self.usage)


class Codebooks(Table):
    """Tables of learned vectors.

    Args:
        groups, size, dimensions: G, K and C.
        distance: "euclidean", or "cosine": codes are chosen by their direction and keep their length (Yu et al. 2022,
            section 3.1; Kumar et al. 2023, section 3.2).
        update: "ema": codes are moving averages of their vectors (van den Oord et al. 2017, appendix A.1), or
            "gradient": parameters, moved by the "codebook" loss.
        decay: of the moving averages.
        restart: codes of which `usage` falls below this are replaced by random vectors of the batch (Dhariwal et al.
            2020, section 3.1); 0: never.

    Raises:
        UsageError: an argument that does not exist.
    """

    codes: Tensor

    def __init__(
        self,
        groups: int,
        size: int,
        dimensions: int,
        *,
        distance: str = "euclidean",
        update: str = "ema",
        decay: float = 0.99,
        restart: float = 0.05,
    ) -> None:
        super().__init__(groups, size, dimensions, decay)
        if distance not in DISTANCES:
            raise UsageError(f"distance {distance!r} does not exist: choose {' or '.join(DISTANCES)}")
        if update not in UPDATES:
            raise UsageError(f"update {update!r} does not exist: choose {' or '.join(UPDATES)}")
        if not 0 <= restart < 1:
            raise UsageError(f"restart {restart} does not exist: choose at least 0 and less than 1")
        self.distance, self.update, self.restart = distance, update, restart
        codes = torch.randn(groups, size, dimensions) / math.sqrt(dimensions)
        if update == "gradient":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)

    def nearest(self, vectors: Tensor) -> Tensor:
        return nearest(vectors.detach(), self.codes.detach(), self.distance)

    def values(self, indices: Tensor) -> Tensor:
        first = torch.arange(self.groups, device=indices.device)[:, None] * self.size
        return F.embedding(indices + first, self.codes.flatten(0, 1))

    def straight(self, vectors: Tensor) -> Tensor:
        return vectors

    def distances(self, vectors: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        commitment = (vectors - values.detach()).square()
        if self.update == "ema":
            return commitment, commitment.new_zeros(())
        return commitment, (vectors.detach() - values).square()

    @torch.no_grad()
    def learn(self, vectors: Tensor, indices: Tensor, weight: Tensor | None = None) -> None:
        vectors = vectors.detach()
        counts, sums = _totals(vectors, indices, self.size, weight)
        if distributed():
            both = torch.cat([counts[..., None], sums], -1)
            dist.all_reduce(both)
            counts, sums = both[..., 0].contiguous(), both[..., 1:].contiguous()
        usage = self._count(counts)
        codes = self.codes.detach()
        if self.update == "ema":
            # usage x code is the moving average of the sums, so that those need no buffer of their own.
            scale = (1 - self.decay) * self.size / counts.sum(1, keepdim=True).clamp(min=1)
            moved = self.decay * self.usage[..., None] * codes + scale[..., None] * sums
            codes = torch.where(counts[..., None] > 0, moved / usage.clamp(min=1e-12)[..., None], codes)
        if self.restart > 0:
            # An empty batch (no item has this table's depth) has no vectors to restart from.
            dead = (usage < self.restart) & (counts.sum(1, keepdim=True) > 0)
            codes = torch.where(dead[..., None], self._random(vectors, weight), codes)
            usage = torch.where(dead, torch.ones_like(usage), usage)
        self.codes.copy_(codes)
        self.usage.copy_(usage)

    def _random(self, vectors: Tensor, weight: Tensor | None) -> Tensor:
        """A random one of the vectors for each code, [G, K, C], the same on every process."""
        number = vectors.shape[1]
        if weight is None:
            picks = torch.randint(number, (self.groups, self.size), device=vectors.device)
        else:
            places = torch.rand(self.groups, self.size, device=vectors.device) * weight.sum()
            picks = torch.searchsorted(weight.cumsum(0), places, right=True).clamp(max=number - 1)
        drawn = torch.gather(vectors, 1, picks[..., None].expand(-1, -1, self.dimensions))
        if distributed():
            drawn = drawn.contiguous()
            dist.broadcast(drawn, 0)
        return drawn

    @torch.no_grad()
    def initialise(self, vectors: Tensor) -> None:
        for group, rows in enumerate(vectors):
            centres, indices = kmeans(rows, self.size, ITERATIONS, distance=self.distance)
            self.codes[group].copy_(centres)
            self.usage[group].copy_(torch.bincount(indices, minlength=self.size) * self.size / len(rows))


class ScalarGrid(Table):
    """Finite scalar quantisation (Mentzer et al. 2023, section 3): each dimension is rounded to one of its levels.

    Nothing is learned by gradient here: the projections around the grid are. Dimensions are brought to zero mean and
    unit deviation by moving averages before they are bounded. Latents that move faster than the projections would
    otherwise leave the range where tanh has a slope, and never come back: every index would then be of a corner.

    Args:
        groups: vectors side by side.
        levels: number of values of each dimension, each at least 2; their product is K.
        decay: of `usage`.

    Raises:
        UsageError: no levels, fewer than two values in one, or more than MOST_CODES codes.
    """

    span: Tensor
    mean: Tensor
    deviation: Tensor
    offset: Tensor
    shift: Tensor
    centre: Tensor
    basis: Tensor
    counts: Tensor

    def __init__(self, groups: int, levels: Sequence[int], decay: float = 0.99) -> None:
        if not levels or min(levels) < 2:
            raise UsageError(f"levels {list(levels)} do not exist: give at least one, each of at least 2")
        super().__init__(groups, math.prod(levels), len(levels), decay)
        counts = torch.tensor(levels)
        # Even numbers of values lie half a step off the middle; the excess lets tanh reach the outermost ones.
        span = (counts - 1) * (1 + 1e-3) / 2
        offset = (counts % 2 == 0) * 0.5
        basis = torch.tensor([1, *itertools.accumulate(levels[:-1], lambda a, b: a * b)])
        constants = {
            "span": span,
            "offset": offset,
            "shift": torch.atanh(offset / span),
            "centre": counts // 2,
            "basis": basis,
            "counts": counts,
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("mean", torch.zeros(groups, 1, len(levels)))
        self.register_buffer("deviation", torch.ones(groups, 1, len(levels)))

    def _bounded(self, normal: Tensor) -> Tensor:
        return torch.tanh(normal + self.shift) * self.span - self.offset

    def nearest(self, vectors: Tensor) -> Tensor:
        bounded = self._bounded((vectors.detach() - self.mean) / self.deviation)
        digits = torch.nan_to_num(bounded).round().long() + self.centre
        return (digits.clamp(min=0).minimum(self.counts - 1) * self.basis).sum(-1)

    def values(self, indices: Tensor) -> Tensor:
        digits = indices[..., None].div(self.basis, rounding_mode="floor") % self.counts
        return (digits - self.centre) / self.centre.float()

    def straight(self, vectors: Tensor) -> Tensor:
        # By the batch's own statistics, through which the gradient goes too: else it would push latents as a whole,
        # which the moving averages undo, so that they ran away.
        variance, mean = torch.var_mean(vectors, 1, correction=0, keepdim=True)
        return self._bounded((vectors - mean) * (variance + LEAST_VARIANCE).rsqrt()) / self.centre

    def distances(self, vectors: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return vectors.new_zeros(()), vectors.new_zeros(())

    @torch.no_grad()
    def learn(self, vectors: Tensor, indices: Tensor, weight: Tensor | None = None) -> None:
        counts, _ = _totals(vectors.detach()[..., :1], indices, self.size, weight)
        if distributed():
            dist.all_reduce(counts)
        self.usage.copy_(self._count(counts))
        self._follow(vectors.detach(), weight, 1 - STATISTICS_DECAY)

    def _follow(self, vectors: Tensor, weight: Tensor | None, share: float) -> None:
        """Moves mean and deviation by a share of the way to those of [G, N, C]; an empty batch moves nothing."""
        weight = vectors.new_ones(vectors.shape[1]) if weight is None else weight
        total = weight.sum()
        sums = torch.cat([weight @ vectors, weight @ vectors.square()], -1)
        if distributed():
            both = torch.cat([sums.flatten(), total[None]])
            dist.all_reduce(both)
            sums, total = both[:-1].view_as(sums), both[-1]
        mean, square = (sums / total.clamp(min=1))[:, None].chunk(2, -1)
        moved = share * (total > 0)
        square = torch.lerp(self.deviation.square() + self.mean.square(), square, moved)
        self.mean.lerp_(mean, moved)
        self.deviation.copy_((square - self.mean.square()).clamp(min=LEAST_VARIANCE).sqrt())

    @torch.no_grad()
    def initialise(self, vectors: Tensor) -> None:
        self._follow(vectors, None, 1.0)
        for group, indices in enumerate(self.nearest(vectors)):
            seen = torch.bincount(indices, minlength=self.size)
            self.usage[group].copy_(seen * self.size / indices.numel())


class Projection(nn.Module):
    """Channels to the vectors of G codebooks and back: group g has the channels floor(g M / G) .. floor((g + 1) M / G).

    Args:
        channels: M.
        groups: G.
        dimensions: C, to which the channels of a group are mapped linearly (the factorised codes of Yu et al. 2022,
            section 3.1); None: its channels themselves, the smaller groups filled up with zeros.

    Raises:
        UsageError: more groups than channels, or more dimensions than a group has channels.
    """

    def __init__(self, channels: int, groups: int, dimensions: int | None = None) -> None:
        super().__init__()
        if not 1 <= groups <= channels:
            raise UsageError(f"{groups} groups of {channels} channels do not exist: choose 1 to {channels}")
        edges = [group * channels // groups for group in range(groups + 1)]
        self.channels, self.groups = channels, groups
        self.widths = [end - start for start, end in itertools.pairwise(edges)]
        self.width = max(self.widths)
        if dimensions is not None and not 1 <= dimensions <= min(self.widths):
            raise UsageError(
                f"codes of {dimensions} dimensions do not fit groups of {min(self.widths)} channels: "
                f"choose 1 to {min(self.widths)}"
            )
        self.linear = dimensions is not None
        self.dimensions = self.width if dimensions is None else dimensions
        if self.linear:
            inward = torch.stack(
                [nn.init.orthogonal_(torch.empty(self.width, self.dimensions)) for _ in range(groups)]
            )
            self.inward = nn.Parameter(inward)
            self.inward_bias = nn.Parameter(torch.zeros(groups, 1, self.dimensions))
            self.outward = nn.Parameter(inward.mT.contiguous())
            self.outward_bias = nn.Parameter(torch.zeros(groups, 1, self.width))

    def split(self, rows: Tensor) -> Tensor:
        """[N, M] -> [G, N, width], with zeros after the channels of smaller groups."""
        if min(self.widths) == self.width:
            return rows.unflatten(1, (self.groups, self.width)).transpose(0, 1)
        parts = rows.split(self.widths, 1)
        return torch.stack([F.pad(part, (0, self.width - part.shape[1])) for part in parts])

    def join(self, parts: Tensor) -> Tensor:
        """Inverse of `split`."""
        if min(self.widths) == self.width:
            return parts.transpose(0, 1).flatten(1)
        return torch.cat([part[:, :width] for part, width in zip(parts, self.widths, strict=True)], 1)

    def vectors(self, rows: Tensor) -> Tensor:
        """[N, M] -> [G, N, C]."""
        parts = self.split(rows)
        return torch.baddbmm(self.inward_bias, parts, self.inward) if self.linear else parts

    def rows(self, vectors: Tensor) -> Tensor:
        """[G, N, C] -> [N, M]."""
        return self.join(torch.baddbmm(self.outward_bias, vectors, self.outward) if self.linear else vectors)

    @torch.no_grad()
    def fit_inward(self, rows: Tensor, whiten: bool) -> None:
        """Principal directions of the rows; whitened to unit variance if asked."""
        if not self.linear:
            return
        parts = self.split(rows).double()
        mean = parts.mean(1, keepdim=True)
        covariance = (parts - mean).mT @ (parts - mean) / parts.shape[1]
        energies, directions = torch.linalg.eigh(covariance)
        directions = directions.flip(2)[..., : self.dimensions]
        if whiten:
            energies = energies.flip(1)[:, None, : self.dimensions]
            directions = directions / energies.clamp(min=1e-8).sqrt()
        self.inward.copy_(directions)
        self.inward_bias.copy_(-mean @ directions)

    @torch.no_grad()
    def recentre(self, errors: Tensor) -> None:
        """Moves the offset of `rows` some of the way to where errors [N, M], wanted less given, have no mean."""
        mean = errors.detach().mean(0, keepdim=True)
        if distributed():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.outward_bias.add_(self.split(mean), alpha=1 - STATISTICS_DECAY)

    @torch.no_grad()
    def fit_outward(self, rows: Tensor, values: Tensor) -> None:
        """The linear map of values [G, N, C] that comes nearest to the rows."""
        if not self.linear:
            return
        parts, given = self.split(rows).double(), F.pad(values.double(), (0, 1), value=1.0)
        gram = given.mT @ given / given.shape[1]
        gram = gram + 1e-6 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram, given.mT @ parts / given.shape[1])
        self.outward.copy_(solution[:, :-1])
        self.outward_bias.copy_(solution[:, -1:])
