"""The context prior: a small causal network in integers that predicts an index from its neighbourhood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compand.bottlenecks.indices import (
    LEFT,
    RIGHT,
    TOP,
    Indices,
    ModelledPrior,
    Near,
    Vocabulary,
)
from compand.codec import subset
from compand.coding.integer import ACTIVATION_LIMIT, FRACTION_BITS, WEIGHT_BITS, IntegerNetwork
from compand.coding.tables import share_out
from compand.errors import CheckpointError, UsageError

WIDTHS = ((64, 128), (48, 96), (32, 64), (24, 48), (16, 32), (8, 16))
"""(embedding, hidden) that a network is given by default: the first with which all slots fit MOST_INTEGERS."""

MOST_INTEGERS = 1_200_000
"""Of a context prior in a checkpoint, unless widths are asked for."""

PLANAR = (Near(0, 0, -1), Near(0, -1, 0), Near(0, -1, -1), Near(0, -1, 1), Near(0, 0, -2), Near(0, -2, 0))
LINEAR = (Near(0, 0, -1), Near(0, 0, -2))
"""Neighbours in the same plane."""

OCTAVES = 16
"""Range of probabilities below the largest; symbols that are less likely yet get the least of `share_out` alone."""

LARGEST_POWER = 24
ROOT_BITS = 64
WEIGHT_LIMIT = (1 << 15) - 1

EXACT_LIMIT = 1 << 24
"""Integers below this are exact in float32."""


@cache
def powers() -> NDArray[np.float64]:
    """2**LARGEST_POWER times 2**-(i / 2**FRACTION_BITS) for i = 0, 1, ..., rounded down, and 0 last: by multiplying
    integers with the root of 1/2 that integer square roots give, whose last places the results depend on."""
    root = 1 << (ROOT_BITS << FRACTION_BITS) - 1
    for _ in range(FRACTION_BITS):
        root = math.isqrt(root)
    values = [1 << (LARGEST_POWER + ROOT_BITS)]
    while len(values) < OCTAVES << FRACTION_BITS:
        values.append(values[-1] * root >> ROOT_BITS)
    return np.array([*(value >> ROOT_BITS for value in values), 0], dtype=np.float64)


def contexts(vocabulary: Vocabulary, slot: int) -> tuple[Near, ...]:
    """Neighbours that the network of a slot sees: in its plane, and here and on the left in all planes before."""
    plane = vocabulary.slots[slot][1]
    before = [Near(back, 0, column) for back in range(1, plane + 1) for column in (0, -1)]
    return (*(PLANAR if vocabulary.planar else LINEAR), *before)


def context_codes(vocabulary: Vocabulary, slot: int) -> list[int]:
    """K of the plane of each of a slot's neighbours."""
    found = [vocabulary.codes_before(slot, near.back) for near in contexts(vocabulary, slot)]
    return [codes for codes in found if codes is not None]


def integers(vocabulary: Vocabulary, embedding: int, hidden: int) -> int:
    """Numbers of the networks of all slots together."""
    total = 0
    for slot in range(len(vocabulary.slots)):
        codes, seen = vocabulary.codes(slot), len(contexts(vocabulary, slot))
        total += (codes + 1) * embedding + (seen * embedding + 1) * hidden
        total += (hidden + 1) * hidden + (hidden + 1) * codes
    return total


class IndexNetworks(nn.Module):
    """The context prior while it is trained: a network for each slot, which gives logits in octaves.

    ```
    neighbours --embedding--> [contexts embedding] --1x1--> ReLU --1x1--> ReLU --1x1--> K logits
    ```

    After the causal networks over codes of van den Oord et al. 2017 (section 3.3), without softmax or recurrence, so
    that `ContextPrior` can be made of it.

    Args:
        vocabulary: the codebooks.
        embedding: numbers that stand for an index; None: see WIDTHS.
        hidden: channels of the layers between; None: see WIDTHS.

    Raises:
        UsageError: only one of the widths is given, or one is not positive.
    """

    def __init__(
        self, vocabulary: Vocabulary, embedding: int | None = None, hidden: int | None = None
    ) -> None:
        super().__init__()
        if (embedding is None) != (hidden is None):
            raise UsageError("a context prior needs both embedding and hidden, or neither")
        if embedding is None or hidden is None:
            fitting = [widths for widths in WIDTHS if integers(vocabulary, *widths) <= MOST_INTEGERS]
            embedding, hidden = (fitting or WIDTHS[-1:])[0]
        if embedding < 1 or hidden < 1:
            raise UsageError(
                f"a context prior of widths {embedding} and {hidden} does not exist: give 1 or more"
            )
        self.vocabulary = vocabulary
        slots = range(len(vocabulary.slots))
        self.embeddings = nn.ModuleList(nn.Embedding(vocabulary.codes(s) + 1, embedding) for s in slots)
        self.first = nn.ModuleList(
            nn.Conv2d(len(contexts(vocabulary, s)) * embedding, hidden, 1) for s in slots
        )
        self.rest = nn.ModuleList(
            nn.Sequential(nn.Conv2d(hidden, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, vocabulary.codes(s), 1))
            for s in slots
        )
        depths = range(1, len(vocabulary.sizes) + 1)
        self.register_buffer(
            "_family_of", torch.tensor([vocabulary.family_of[d - 1] for d in depths]), persistent=False
        )

    _family_of: Tensor

    def forward(self, indices: Tensor, depth: Tensor) -> Tensor:
        """Information of indices.

        Args:
            indices: int64 [batch, planes, h, w]; -1 in planes that an item does not use.
            depth: int64 [batch], 1 .. depths.

        Returns:
            Bits of each item, [batch].
        """
        family_of = self._family_of[depth - 1][:, None, None]
        total = torch.zeros(len(indices), device=indices.device)
        for family, sizes in enumerate(self.vocabulary.families):
            meant = [(indices[:, p] >= 0) & (family_of == family) for p in range(len(sizes))]
            planes = [
                F.pad(indices[:, p].where(meant[p], codes), (LEFT, RIGHT, TOP, 0), value=codes)
                for p, codes in enumerate(sizes)
            ]
            for plane, codes in enumerate(sizes):
                logits = self._logits(self.vocabulary.slots.index((family, plane)), planes)
                target = indices[:, plane].clamp(0, codes - 1)
                nats = F.cross_entropy(logits * math.log(2), target, reduction="none")
                total = total + (nats * meant[plane]).sum((1, 2)) / math.log(2)
        return total

    def _logits(self, slot: int, planes: Sequence[Tensor]) -> Tensor:
        """Logits [batch, K, h, w] in octaves, from padded planes."""
        plane = self.vocabulary.slots[slot][1]
        height, width = planes[0].shape[1] - TOP, planes[0].shape[2] - LEFT - RIGHT
        parts = []
        for near in contexts(self.vocabulary, slot):
            top, left = TOP + near.row, LEFT + near.column
            seen = planes[plane - near.back][:, top : top + height, left : left + width]
            parts.append(self.embeddings[slot - near.back](seen))
        hidden = self.first[slot](torch.cat(parts, 3).permute(0, 3, 1, 2)).relu()
        logits: Tensor = self.rest[slot](hidden)
        return logits

    def layers(self, slot: int) -> tuple[nn.Embedding, nn.Conv2d, nn.Sequential]:
        """Embedding, first and further layers of a slot."""
        embedding, first, rest = self.embeddings[slot], self.first[slot], self.rest[slot]
        assert isinstance(embedding, nn.Embedding)
        assert isinstance(first, nn.Conv2d) and isinstance(rest, nn.Sequential)
        return embedding, first, rest

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        """Takes over the integers of a `ContextPrior`. Raises CheckpointError or RuntimeError if they do not fit."""
        prior = ContextPrior.from_arrays(self.vocabulary, arrays)
        one, accumulated = 1 << FRACTION_BITS, 1 << (FRACTION_BITS + WEIGHT_BITS)
        for slot, network in enumerate(prior.networks):
            embedding, first, rest = self.layers(slot)
            embedding.weight.copy_(torch.from_numpy(prior.embeddings[slot] / one))
            first.weight.copy_(torch.from_numpy(prior.weights[slot] / (1 << WEIGHT_BITS))[..., None, None])
            convolutions = [part for part in rest if isinstance(part, nn.Conv2d)]
            biases = [torch.from_numpy(prior.biases[slot] / one)]
            for layer, exact in zip(convolutions, network.convolutions, strict=True):
                layer.weight.copy_(exact.weight / (1 << WEIGHT_BITS))
                biases.append(exact.bias / accumulated)
            for layer, bias in zip((first, *convolutions), biases, strict=True):
                assert layer.bias is not None
                layer.bias.copy_(bias)


class ContextPrior(ModelledPrior):
    """`IndexNetworks` in integers, see `coding.integer`.

    The first layer is one look-up a neighbour, of rows that are made once: products of embeddings and weights, rounded
    to FRACTION_BITS. Sums of these stay below EXACT_LIMIT, where float32 is exact; the layers behind are float64 as in
    `IntegerConvolution`. Logits are octaves with FRACTION_BITS, and `powers` makes weights of them.

    Args:
        vocabulary: the codebooks.
        embeddings: for each slot, fixed-point with FRACTION_BITS, [K + 1, embedding].
        weights: of its first layer, fixed-point with WEIGHT_BITS, [hidden, contexts * embedding].
        biases: of its first layer, fixed-point with FRACTION_BITS, [hidden].
        networks: its further layers, hidden to K.

    Raises:
        CheckpointError: shapes that do not fit, or a first layer whose sums may reach EXACT_LIMIT.
    """

    name = "context"
    code = 3

    def __init__(
        self,
        vocabulary: Vocabulary,
        embeddings: Sequence[NDArray[np.int32]],
        weights: Sequence[NDArray[np.int32]],
        biases: Sequence[NDArray[np.int32]],
        networks: Sequence[IntegerNetwork],
    ) -> None:
        super().__init__(vocabulary)
        self.embeddings, self.weights, self.biases = list(embeddings), list(weights), list(biases)
        self.networks = list(networks)
        self._layers = [self._prepared(slot) for slot in range(len(vocabulary.slots))]

    def _prepared(self, slot: int) -> _Layers:
        codes = context_codes(self.vocabulary, slot)
        width = self.embeddings[slot].shape[1] if self.embeddings[slot].ndim == 2 else 0
        hidden = self.biases[slot].size
        network = self.networks[slot].convolutions
        fits = (
            self.embeddings[slot].shape == (self.vocabulary.codes(slot) + 1, width)
            and self.weights[slot].shape == (hidden, len(codes) * width)
            and [tuple(layer.weight.shape) for layer in network]
            == [(hidden, hidden, 1, 1), (self.vocabulary.codes(slot), hidden, 1, 1)]
            and [(layer.rectify, layer.shuffle) for layer in network] == [(True, (1, 1)), (False, (1, 1))]
        )
        if not fits:
            raise CheckpointError("the checkpoint's context prior does not fit its architecture")
        rows = []
        bias = self.biases[slot].clip(-ACTIVATION_LIMIT, ACTIVATION_LIMIT).astype(np.float32)
        bound = np.abs(bias).astype(np.float64)
        blocks = np.split(self.weights[slot].astype(np.float64), len(codes), axis=1)
        for near, block in zip(contexts(self.vocabulary, slot), blocks, strict=True):
            products = self.embeddings[slot - near.back].astype(np.float64) @ block.T
            rounded = np.floor((products + (1 << (WEIGHT_BITS - 1))) / (1 << WEIGHT_BITS))
            rows.append(rounded.clip(-ACTIVATION_LIMIT, ACTIVATION_LIMIT))
            bound += np.abs(rows[-1]).max(0)
        if bound.max(initial=0) >= EXACT_LIMIT:
            raise CheckpointError(
                f"the first layer of the context prior's network {slot} exceeds exact arithmetic: use smaller "
                "weights"
            )
        starts = np.cumsum([0, *[count + 1 for count in codes]])[:-1]
        return _Layers(
            np.concatenate(rows).astype(np.float32),
            starts,
            bias,
            [layer.taps[0].T.contiguous().cpu().numpy() for layer in network],
            [layer.offset[:, 0].cpu().numpy() for layer in network],
        )

    def neighbours(self, slot: int) -> Sequence[Near]:
        return contexts(self.vocabulary, slot)

    def rows(self, slot: int, near: Indices) -> NDArray[np.float32]:
        own = self._layers[slot]
        x = own.rows.take(near + own.starts, axis=0).sum(1)
        x += own.bias
        x = _rectified(x).astype(np.float64) @ own.taps[0]
        x += own.offsets[0]
        logits = _rectified(np.floor(x, out=x)) @ own.taps[1]
        logits += own.offsets[1]
        np.floor(logits, out=logits)
        # Layers reach less than 2**28, see `IntegerConvolution`: 32 bits hold the differences.
        below = np.subtract(logits.max(1, keepdims=True), logits, out=logits).astype(np.int32)
        return share_out(powers().take(below, mode="clip"))

    @classmethod
    def from_networks(cls, networks: IndexNetworks) -> ContextPrior:
        """Rounds trained networks. Raises CheckpointError where weights are too large for exact arithmetic."""

        def fixed(x: Tensor, bits: int) -> NDArray[np.int32]:
            scaled = torch.round(x.detach().double().cpu() * (1 << bits))
            return scaled.clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT).to(torch.int32).numpy()

        slots = [networks.layers(slot) for slot in range(len(networks.vocabulary.slots))]
        return cls(
            networks.vocabulary,
            [fixed(embedding.weight, FRACTION_BITS) for embedding, _, _ in slots],
            [fixed(first.weight[:, :, 0, 0], WEIGHT_BITS) for _, first, _ in slots],
            [fixed(first.bias, FRACTION_BITS) for _, first, _ in slots if first.bias is not None],
            [IntegerNetwork.from_float(rest).cpu() for _, _, rest in slots],
        )

    def arrays(self) -> dict[str, NDArray[np.int32]]:
        """By slot: `embedding`, `weight` and `bias` of the first layer, and the further layers' arrays."""
        result: dict[str, NDArray[np.int32]] = {}
        for slot, network in enumerate(self.networks):
            own = {
                "embedding": self.embeddings[slot],
                "weight": self.weights[slot],
                "bias": self.biases[slot],
            } | {f"layers.{name}": array for name, array in network.arrays().items()}
            result |= {f"{slot}.{name}": array for name, array in own.items()}
        return result

    @classmethod
    def from_arrays(cls, vocabulary: Vocabulary, arrays: Mapping[str, NDArray[np.int32]]) -> ContextPrior:
        """Inverse of `arrays`. Raises CheckpointError if they are not those of such a vocabulary."""
        parts: dict[str, list[NDArray[np.int32]]] = {"embedding": [], "weight": [], "bias": []}
        networks = []
        for slot in range(len(vocabulary.slots)):
            own = subset(arrays, f"{slot}.")
            for name, found in parts.items():
                array = own.get(name)
                if array is None or (array.size and np.abs(array.astype(np.int64)).max() > WEIGHT_LIMIT):
                    raise CheckpointError(
                        f"the checkpoint's context prior lacks a sound {name}: get the checkpoint again"
                    )
                found.append(array)
            networks.append(IntegerNetwork.from_arrays(subset(own, "layers.")))
        return cls(vocabulary, parts["embedding"], parts["weight"], parts["bias"], networks)


def _rectified(x: NDArray[Any]) -> NDArray[Any]:
    """x between 0 and ACTIVATION_LIMIT, in place (`clip` takes longer than all layers on a few positions)."""
    np.maximum(x, 0, out=x)
    np.minimum(x, ACTIVATION_LIMIT, out=x)
    return x


class _Layers:
    """What `ContextPrior.rows` works with.

    Attributes:
        rows: the first layer's contribution of each index of each neighbour, [sum of K' + 1, hidden].
        starts: where the rows of each neighbour begin.
        bias: of the first layer, [hidden].
        taps, offsets: of the further layers, [in, out] and [out], as in `IntegerConvolution`.
    """

    def __init__(
        self,
        rows: NDArray[np.float32],
        starts: NDArray[np.int64],
        bias: NDArray[np.float32],
        taps: Sequence[NDArray[Any]],
        offsets: Sequence[NDArray[Any]],
    ) -> None:
        self.rows, self.starts, self.bias = rows, starts, bias
        self.taps, self.offsets = list(taps), list(offsets)
