"""Concealment: tokens that were lost on the way are estimated from those that arrived.

```
tokens, some -1 --embed--> [h, w, width] --blocks (convolution, attention, network)--> logits of every codebook
```

A masked bidirectional transformer (Chang et al. 2022, "MaskGIT", sections 3.1 and 3.2) over the grid of tokens, as Mao
et al. 2024 ("Extreme Image Compression using Fine-tuned VQGANs") propose for lost indices. It stands outside of what
files mean: intact files decode without it, and what it makes up may differ in the last digit between machines.
`Concealer.fill` gives tokens; `Concealer.estimate` the mean of what the codes stand for, which a decoder that was
trained on codes alone takes as well and from which pictures are nearer to what was lost than from the likeliest codes.
`nearest_fill` and `frequent_fill` do without a network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand.errors import UsageError

ERASED = -1
"""Stands for a token that is lost."""

WINDOW = {1: (1, 256), 2: (32, 32)}
"""Most rows and columns that attention sees at once, by the axes of the grid."""

OVERLAP = 8
"""Least rows or columns that neighbouring windows share."""

KERNEL = {1: (1, 9), 2: (5, 5)}
"""Extent of the convolutions that tell attention where tokens lie, by the axes of the grid."""

ITERATIONS = 4

Place = tuple[slice, slice, slice, slice]
"""Part of [batch, planes, h, w]."""


class Concealer(nn.Module):
    """Estimates lost tokens of one codec, at every quality level.

    Where tokens lie is told by depth-wise convolutions before each attention (Chu et al. 2021, "Conditional Positional
    Encodings"), so that grids of any size are served. Codebooks that several levels share have one embedding.

    Args:
        vocabulary: codes of each codebook of a level, level by level, as `Codec.vocabulary`.
        axes: of the grid: 2 (rows and columns) or 1 (time).
        width: channels of the transformer.
        depth: number of blocks.
        heads: of attention; they divide `width`.

    Raises:
        UsageError: there are no codebooks, or the sizes do not fit each other.
    """

    def __init__(
        self,
        vocabulary: Sequence[Sequence[int]],
        axes: int = 2,
        width: int = 192,
        depth: int = 5,
        heads: int = 6,
    ) -> None:
        super().__init__()
        if not vocabulary:
            raise UsageError("this codec has no tokens: there is nothing to conceal")
        if width < 1 or depth < 1 or heads < 1 or width % heads:
            raise UsageError(f"{heads} heads do not divide a width of {width}: choose other numbers")
        self.vocabulary = tuple(tuple(sizes) for sizes in vocabulary)
        self.axes = axes
        planes = max(map(len, self.vocabulary))
        widest = max(self.vocabulary, key=len)
        shared = all(sizes == widest[: len(sizes)] for sizes in self.vocabulary)
        levels = [widest] if shared else self.vocabulary
        starts = [0] * len(self.vocabulary)
        if not shared:
            starts = [sum(map(len, levels[:level])) for level in range(len(levels))]
        self._starts = starts  # of each level, its first table
        self.tables = nn.ParameterList(
            [torch.randn(size, width) * width**-0.5 for sizes in levels for size in sizes]
        )
        self.biases = nn.ParameterList([torch.zeros(size) for sizes in levels for size in sizes])
        self.erased = nn.Parameter(torch.randn(planes, width) * width**-0.5)
        self.level = nn.Parameter(torch.zeros(len(self.vocabulary), width))
        self.blocks = nn.ModuleList([_Block(width, heads, KERNEL[axes]) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList([nn.Linear(width, width) for _ in range(planes)])

    def embed(self, tokens: Tensor, level: int) -> Tensor:
        """What `body` works on.

        Args:
            tokens: int64 [batch, planes, h, w], -1 where one is lost.
            level: quality level, from 1.

        Returns:
            [batch, h, w, width].
        """
        first = self._starts[level - 1]
        x = self.level[level - 1].expand(tokens.shape[0], *tokens.shape[2:], -1)
        for plane in range(tokens.shape[1]):
            known = F.embedding(tokens[:, plane].clamp(min=0), self.tables[first + plane])
            x = x + torch.where(tokens[:, plane, ..., None] < 0, self.erased[plane], known)
        return x

    def body(self, x: Tensor) -> Tensor:
        """`embed`'s results of any levels, [batch, h, w, width] -> what `logits` reads off, of the same shape."""
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.norm(x)
        return result

    def logits(self, features: Tensor, level: int, plane: int) -> Tensor:
        """Unnormalised log-probabilities of the codes of a plane: [..., K], of features [..., width] of that level."""
        table = self._starts[level - 1] + plane
        return F.linear(self.heads[plane](features), self.tables[table], self.biases[table])

    def forward(self, tokens: Tensor, level: int) -> list[Tensor]:
        """Tokens [batch, planes, h, w] with -1 where they are lost -> `logits` of each plane."""
        features = self.body(self.embed(tokens, level))
        return [self.logits(features, level, plane) for plane in range(tokens.shape[1])]

    @torch.no_grad()
    def fill(self, tokens: Tensor, level: int, iterations: int = ITERATIONS) -> Tensor:
        """Estimates what is lost: the likeliest code, the surest places first, codebook after codebook.

        Args:
            tokens: int64 [planes, h, w] or [batch, planes, h, w], -1 where one is lost. Grids beyond WINDOW are filled
                window by window.
            level: quality level, from 1.
            iterations: steps in which the first codebook is filled (MaskGIT's cosine schedule); the others take one.

        Returns:
            Tokens of the same shape, none of them -1; those that were there are as they were.

        Raises:
            UsageError: there is no such level, or it has another number of codebooks.
        """
        filled = self._batch(tokens, level).clone()
        for seen, own, inner in self._windows(filled):
            window = self._filled(filled[seen], level, iterations)
            filled[own] = window[inner]
        return filled.to(tokens.device).reshape(tokens.shape)

    @torch.no_grad()
    def estimate(self, tokens: Tensor, level: int, values: Tensor) -> Tensor:
        """Estimates the latents of tokens of one codebook: those of tokens that are there, and of lost ones the mean of
        what the codes stand for, each as likely as the network holds it to be in a single step.

        Args:
            tokens: int64 [1, h, w] or [batch, 1, h, w], -1 where one is lost.
            level: quality level, from 1.
            values: what the codes of the level stand for, [K, M].

        Returns:
            [M, h, w] or [batch, M, h, w], of the type and on the device of `values`.

        Raises:
            UsageError: there is no such level, or it has another number of codebooks than one.
        """
        batch = self._batch(tokens, level)
        if batch.shape[1] != 1:
            raise UsageError(f"level {level} has {batch.shape[1]} codebooks: use fill")
        y = F.embedding(batch[:, 0].clamp(min=0).to(values.device), values)
        for seen, own, inner in self._windows(batch):
            features = self.body(self.embed(batch[seen], level))
            lost = batch[own][:, 0] < 0
            likely = self.logits(features[:, inner[2], inner[3]][lost], level, 0).softmax(-1)
            y[:, own[2], own[3]][lost.to(y.device)] = (likely.to(values) @ values).to(values)
        y = y.permute(0, 3, 1, 2)
        return y if tokens.ndim == 4 else y[0]

    def _batch(self, tokens: Tensor, level: int) -> Tensor:
        """Tokens as [batch, planes, h, w] where the network is. Raises UsageError if they are not of the level."""
        if not 1 <= level <= len(self.vocabulary):
            raise UsageError(f"quality level {level} does not exist: choose 1 to {len(self.vocabulary)}")
        batch = tokens if tokens.ndim == 4 else tokens[None]
        if batch.ndim != 4 or batch.shape[1] != len(self.vocabulary[level - 1]):
            expected = len(self.vocabulary[level - 1])
            raise UsageError(f"tokens are {list(tokens.shape)}: give [{expected}, h, w] for level {level}")
        return batch.to(self.level.device)

    def _windows(self, tokens: Tensor) -> Iterator[tuple[Place, Place, Place]]:
        """The windows of [batch, planes, h, w] that have lost tokens to be filled: what they see, what they fill, and
        where this is in what they see."""
        every = slice(None)
        spans = [_spans(size, most) for size, most in zip(tokens.shape[2:], WINDOW[self.axes], strict=True)]
        for (top, bottom, up, down), (left, right, before, behind) in product(*spans):
            own = (every, every, slice(up, down), slice(before, behind))
            if (tokens[own] < 0).any():
                inner = (every, every, slice(up - top, down - top), slice(before - left, behind - left))
                yield (every, every, slice(top, bottom), slice(left, right)), own, inner

    def _filled(self, window: Tensor, level: int, iterations: int) -> Tensor:
        """One window [batch, planes, h, w], filled."""
        tokens = window.clone()
        for plane in range(tokens.shape[1]):
            steps = iterations if plane == 0 else 1
            lost = (tokens[:, plane] < 0).flatten(1).sum(1)
            for step in range(steps):
                erased = tokens[:, plane] < 0
                features = self.body(self.embed(tokens, level))
                sureness, codes = self.logits(features, level, plane).log_softmax(-1).max(-1)
                left = (lost * math.cos(math.pi / 2 * (step + 1) / steps)).long()
                order = sureness.masked_fill(~erased, -torch.inf).flatten(1).argsort(1, descending=True)
                rank = order.argsort(1).view(erased.shape)
                settled = erased & (rank < (erased.flatten(1).sum(1) - left)[:, None, None])
                tokens[:, plane] = torch.where(settled, codes, tokens[:, plane])
        return tokens


class _Block(nn.Module):
    """x + convolution, x + attention, x + network; pre-normalised."""

    def __init__(self, width: int, heads: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.number = heads
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.place = nn.Conv2d(width, width, kernel, padding=padding, groups=width)
        self.before = nn.LayerNorm(width)
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, h, w, width] -> the same."""
        x = x + self.place(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        parts = self.inward(self.before(x)).view(batch, height * width, 3, self.number, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value)
        x = x + self.outward(seen.transpose(1, 2).reshape(batch, height, width, channels))
        result: Tensor = x + self.project(F.gelu(self.expand(self.between(x))))
        return result


def _spans(size: int, most: int) -> list[tuple[int, int, int, int]]:
    """Windows along an axis, evenly spaced: first position and the one behind the last, of all that is seen and of
    what is filled."""
    if size <= most:
        return [(0, size, 0, size)]
    count = -(-(size - OVERLAP) // (most - OVERLAP))
    starts = [round(index * (size - most) / (count - 1)) for index in range(count)]
    borders = [
        0,
        *((first + most + second) // 2 for first, second in pairwise(starts)),
        size,
    ]
    return [
        (start, start + most, own, end) for start, (own, end) in zip(starts, pairwise(borders), strict=True)
    ]


def nearest_fill(tokens: Tensor) -> Tensor:
    """Gives every lost token the code of the nearest place of its plane that arrived; of equally near ones, the first
    row by row.

    Args:
        tokens: int64 [..., h, w], -1 where one is lost.

    Raises:
        UsageError: nothing arrived of a plane.
    """
    planes = tokens.reshape(-1, *tokens.shape[-2:]).clone()
    for plane in planes:
        lost, there = (plane < 0).nonzero(), (plane >= 0).nonzero()
        if len(lost) and not len(there):
            raise _nothing_arrived()
        for part in lost.split(1024):
            distance = (part[:, None] - there).square().sum(2)
            source = there[distance.argmin(1)]
            plane[part[:, 0], part[:, 1]] = plane[source[:, 0], source[:, 1]]
    return planes.view(tokens.shape)


def frequent_fill(tokens: Tensor, codes: Sequence[int] | None = None) -> Tensor:
    """Gives every lost token the most frequent code of its plane.

    Args:
        tokens: int64 [planes, h, w] or [batch, planes, h, w], -1 where one is lost.
        codes: for each plane; None: those that are most frequent (of equally frequent ones, the least) among the tokens
            of the item that arrived.

    Raises:
        UsageError: nothing arrived of a plane, and no codes are given.
    """
    planes = tokens.reshape(-1, *tokens.shape[-2:]).clone()
    for number, plane in enumerate(planes):
        arrived = plane[plane >= 0]
        if codes is not None:
            plane[plane < 0] = codes[number % tokens.shape[-3]]
        elif not arrived.numel():
            raise _nothing_arrived()
        else:
            plane[plane < 0] = arrived.bincount().argmax()
    return planes.view(tokens.shape)


def _nothing_arrived() -> UsageError:
    return UsageError("every token of a codebook is lost: there is nothing to fill from")
