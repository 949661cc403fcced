"""The bottleneck of discrete codecs: a quantiser makes indices of latents, a prior makes bytes of indices."""

from __future__ import annotations

import binascii
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compand.bottlenecks import codebooks
from compand.bottlenecks.index_context import ContextPrior, IndexNetworks
from compand.bottlenecks.indices import (
    ConditionalPrior,
    IndexPrior,
    ModelledPrior,
    StaticPrior,
    UniformPrior,
    Vocabulary,
    pair_starts,
    read_integers,
    require_modelled,
)
from compand.codec import QUALITY_STEPS, Bottleneck, BottleneckOutput, Counts, subset
from compand.coding.container import Source, Varint
from compand.errors import BitstreamError, CheckpointError, UsageError

MODELLED: tuple[type[ModelledPrior], ...] = (StaticPrior, ConditionalPrior, ContextPrior)
PRIORS: tuple[type[IndexPrior], ...] = (UniformPrior, *MODELLED)
"""By the code that payloads call them; a bottleneck has its own kind and all before it."""

MOST_PACKETS = 255

HEAD = Varint("packets and prior", limit=len(PRIORS) * (MOST_PACKETS + 1))
"""4 x number of packets + code of the prior; 0 packets: the rest is one, without length and checksum."""

LENGTH = Varint("packet length", limit=1 << 28)
CRC_BYTES = 2

SEARCHED = 1 << 12
"""Bytes in which the next packet is looked for behind a damaged one."""

EFFORT = 1 << 24
"""Bytes whose checksums are looked at to find packets of one payload behind damage, and CHECK_BYTES for each attempt:
whoever makes a file chooses how many places look like packets, and must not choose how long it takes."""

CHECK_BYTES = 1024

BELIEVED = 2
"""Intact packets that prove a head which is not the one that is read, if it has as many: one is found by chance in
one of 64 attempts with all heads that there may be."""

Frozen = dict[str, IndexPrior]


class CodebookBottleneck(Bottleneck):
    """Codebook indices and their entropy coder.

    ```
    y --quantiser--> indices [planes, h, w] --prior--> payload
                        |
                     look up --> y_hat
    ```

    A level of quality is a depth of the quantiser: how many planes of indices, or which of nested codebooks. Qualities
    between two levels mean the lower one.

    A payload is, in this order:

        head                    varint: 4 x packets + code of the prior
        without packets         indices
        for each packet         length of its indices in bytes (varint), CRC-16 of head, number and indices, indices

    Packets share the rows of a picture, or the frames of a sound, evenly among them; each can be decoded by itself.
    Whatever prior a level has, indices that it would make longer are stored at log2 K bits each: no payload without
    packets is longer than these and a byte.

    Args:
        latent_channels: channels M of y.
        quantiser: arguments of `codebooks.build`: kind and options.
        prior: kind ("uniform", "static", "conditional" or "context") and options of `IndexNetworks` for the last one.
        trainable: whether the parts that only training needs are built.
        dimensions: 2 for pictures; 1 for signals, y [batch, M, 1, n].

    Raises:
        UsageError: a kind, an option or dimensions that do not exist.
    """

    _log2_sizes: Tensor

    def __init__(
        self,
        latent_channels: int,
        quantiser: Mapping[str, Any],
        prior: Mapping[str, Any] | None = None,
        trainable: bool = True,
        dimensions: int = 2,
    ) -> None:
        super().__init__()
        if dimensions not in (1, 2):
            raise UsageError(f"codebook indices of {dimensions} dimensions do not exist: choose 1 or 2")
        self.latent_channels, self.trainable = latent_channels, trainable
        self.quantiser = codebooks.build(channels=latent_channels, **quantiser)
        self.books = Vocabulary(self.quantiser.sizes, dimensions == 2)
        options = dict(prior or {})
        kind = options.pop("kind", "uniform")
        names = [known.name for known in PRIORS]
        if kind not in names:
            raise UsageError(f"index prior {kind!r} does not exist: choose one of {', '.join(names)}")
        unknown = [
            name for name in options if kind != ContextPrior.name or name not in ("embedding", "hidden")
        ]
        if unknown:
            raise UsageError(f"index prior {kind!r} has no option {unknown[0]!r}: leave it out")
        if kind != UniformPrior.name:
            require_modelled(kind, self.books)
        self.kinds = PRIORS[: names.index(kind) + 1]
        self.prior = IndexNetworks(self.books, **options) if trainable and kind == ContextPrior.name else None
        self.encoder_parts = tuple(f"quantiser.{part}" for part in self.quantiser.encoder_parts)
        most = max(map(len, self.quantiser.sizes))
        log2_sizes = [[*np.log2(sizes), *[0.0] * (most - len(sizes))] for sizes in self.quantiser.sizes]
        self.register_buffer("_log2_sizes", torch.tensor(log2_sizes, dtype=torch.float32), persistent=False)
        self._priors: Frozen | None = None
        self._best: list[str] = []

    @property
    def vocabulary(self) -> tuple[tuple[int, ...], ...]:
        return self.quantiser.sizes

    def depth(self, quality: int) -> int:
        """Depth of a quality in 1/32 level."""
        return min(max(quality // QUALITY_STEPS, 1), self.quantiser.depths)

    def forward(self, y: Tensor, quality: Tensor) -> BottleneckOutput:
        with torch.autocast(y.device.type, enabled=False):
            y = y.float()
            if self._priors is not None and not self.training:
                return self._forward_frozen(y, quality)
            if not self.trainable:
                raise CheckpointError("this codec is frozen: build it in its trainable state to train it")
            depth = (quality // QUALITY_STEPS).clamp(1, self.quantiser.depths)
            quantised = self.quantiser(y, depth)
            if self.prior is None:
                bits = self._log2_sizes[depth - 1].sum(1) * (y.shape[2] * y.shape[3])
                return BottleneckOutput(quantised.z_hat, bits, quantised.losses)
            bits = self.prior(quantised.indices, depth)
            own = {"prior": bits.sum() / (quantised.indices >= 0).sum()} if self.training else {}
            return BottleneckOutput(quantised.z_hat, bits.detach(), quantised.losses | own)

    def _forward_frozen(self, y: Tensor, quality: Tensor) -> BottleneckOutput:
        y_hats, bits = [], []
        for item, level in zip(y, quality.tolist(), strict=True):
            indices = self.indices(item[None], level)
            y_hats.append(self.embed(indices, level))
            depth, grid = self.depth(level), indices[0].cpu().numpy()
            priors = (self._prior(name) for name in ("uniform", self._best[depth - 1]))
            bits.append(min(prior.bits(grid, depth) for prior in priors))
        return BottleneckOutput(torch.cat(y_hats), torch.tensor(bits, dtype=torch.float64, device=y.device))

    def compress(self, y: Tensor, quality: int, *, packets: int = 0) -> list[bytes]:
        """As the contract says; packets: see `compress_indices`."""
        return [self.compress_indices(item, quality, packets=packets) for item in self.indices(y, quality)]

    def decompress(self, payloads: Sequence[bytes], shape: tuple[int, int], quality: int) -> Tensor:
        items = [self.decompress_indices(payload, shape, quality) for payload in payloads]
        return self.embed(torch.stack(items), quality)

    def quantise(self, y: Tensor, quality: int) -> Tensor:
        """The indices, int32 [batch, planes, h, w]."""
        return self.indices(y, quality).int()

    def dequantise(self, integers: Tensor, quality: int) -> Tensor:
        """Indices [batch, planes, h, w] of any integer type -> y_hat, float32 [batch, M, h, w]."""
        return self.embed(integers, quality)

    def indices(self, y: Tensor, quality: int) -> Tensor:
        """y: [batch, M, h, w]; quality in 1/32 level -> int64 [batch, planes, h, w]."""
        return self.quantiser.encode(y, self.depth(quality))

    def embed(self, indices: Tensor, quality: int) -> Tensor:
        """Indices [batch, planes, h, w] -> y_hat, float32 [batch, M, h, w], on the device of the codec.

        Raises:
            UsageError: another number of planes than the quality has, or an index outside its codebook.
        """
        return self.quantiser.decode(indices.to(self._log2_sizes.device).long(), self.depth(quality))

    def compress_indices(
        self, indices: Tensor, quality: int, *, packets: int = 0, prior: str | None = None
    ) -> bytes:
        """The payload of indices [planes, h, w] of any integer type.

        Args:
            quality: in 1/32 level.
            packets: how many can be lost one by one, at most one a row (a frame); 0: the payload is one piece.
            prior: name of the prior to be used; None: the cheapest of the level.

        Raises:
            CheckpointError: the codec is not frozen.
            UsageError: indices that the quality does not have, or a prior that the checkpoint does not have.
        """
        depth = self.depth(quality)
        chosen = self._prior(prior or self._best_of(depth))
        grid = indices.detach().cpu().numpy().astype(np.int64)
        sizes = np.array(self.books.sizes[depth - 1])[:, None, None]
        if grid.ndim != 3 or len(grid) != len(sizes) or bool(((grid < 0) | (grid >= sizes)).any()):
            raise UsageError(
                f"indices {list(grid.shape)} are not those of level {depth}: give [{len(sizes)}, h, w] below "
                f"{', '.join(map(str, self.books.sizes[depth - 1]))}"
            )
        if not 0 <= packets <= MOST_PACKETS:
            raise UsageError(f"{packets} packets cannot be made: choose 0 (none) to {MOST_PACKETS}")
        parts = [np.ascontiguousarray(grid[part]) for part in self._parts(grid.shape[1:], packets)]
        bodies = [chosen.encode(part, depth) for part in parts]
        uniform = self._uniform()
        if sum(map(len, bodies)) > sum(uniform.size((part.shape[1], part.shape[2]), depth) for part in parts):
            chosen, bodies = uniform, [uniform.encode(part, depth) for part in parts]
        if not packets:
            return HEAD.pack(chosen.code) + bodies[0]
        head = len(PRIORS) * len(bodies) + chosen.code
        framed = (
            LENGTH.pack(len(body)) + _checksum(head, number, body) + body
            for number, body in enumerate(bodies)
        )
        return HEAD.pack(head) + b"".join(framed)

    def decompress_indices(
        self, payload: bytes, shape: tuple[int, int], quality: int, *, erasures: bool = False
    ) -> Tensor:
        """Inverse of `compress_indices`, int64 [planes, h, w] for h and w = shape.

        Args:
            erasures: whether indices of damaged packets are to be -1; else damage is an error.

        Raises:
            BitstreamError: a damaged payload, or with `erasures` one that has no packets, or neither a sound head nor
                packets that tell what it was.
        """
        depth, view = self.depth(quality), memoryview(payload)
        head, bodies = self._concealed_bodies(view, shape, depth) if erasures else (None, None)
        if head is None or bodies is None:
            head, rest = self._head(view, shape)
            count = head // len(PRIORS)
            if erasures and not count:
                raise BitstreamError("indices without packets have no part that is known to be intact")
            limit = self._uniform_size(shape, depth, count)
            bodies = _Packets(rest, limit).bodies(head, search=erasures) if count else [bytes(rest)]
        count, code = divmod(head, len(PRIORS))
        parts, prior = self._parts(shape, count), self._prior(self.kinds[code].name)
        grid = np.full((self.quantiser.planes(depth), *shape), -1, np.int64)
        for part, body in zip(parts, bodies, strict=True):
            try:
                if body is None:
                    raise BitstreamError("a packet of indices is damaged: get an intact copy or conceal it")
                height, width = grid[part].shape[1:]
                grid[part] = prior.decode(body, (height, width), depth)
            except BitstreamError:
                if not erasures:
                    raise
        return torch.from_numpy(grid).to(self._log2_sizes.device)

    def _head(self, view: memoryview, shape: tuple[int, int]) -> tuple[int, memoryview]:
        """Head of a payload, and what follows. Raises BitstreamError if there is none for such a shape."""
        source = Source(view, 0)
        try:
            head = HEAD.unpack(source)
        except BitstreamError:
            raise BitstreamError("indices do not begin with their packets: the file is damaged") from None
        count, code = divmod(head, len(PRIORS))
        if code >= len(self.kinds) or count not in (0, len(self._parts(shape, count))):
            raise BitstreamError(f"indices claim {count} packets of prior {code}: the file is damaged")
        return head, view[source.offset :]

    def _concealed_bodies(
        self, view: memoryview, shape: tuple[int, int], depth: int
    ) -> tuple[int | None, list[bytes | None] | None]:
        """Another head than the one that is read, and its packets, where these prove it: their checksums include it.

        None where the head that is read has intact packets, or no other has.
        """
        try:
            head, rest = self._head(view, shape)
            count = head // len(PRIORS)
            if count and any(
                _Packets(rest, self._uniform_size(shape, depth, count)).bodies(head, search=False)
            ):
                return None, None
        except BitstreamError:
            pass
        most = min(shape[0 if self.books.planar else 1], MOST_PACKETS)
        limit = self._uniform_size(shape, depth, most)
        behind = {size: _Packets(view[size:], limit) for size in (1, 2)}
        # Where all lengths are intact they tell the number of packets; else all numbers are tried.
        told = [packets.chain() for packets in behind.values()]
        counts = sorted(range(1, most + 1), key=lambda count: (count not in told, count))
        for count in counts:
            for kind in self.kinds:
                head = len(PRIORS) * count + kind.code
                packets = behind.get(HEAD.size(head))
                if packets is None or (count not in told and not packets.begins(head)):
                    continue
                if sum(body is not None for body in packets.bodies(head, search=False)) >= min(
                    BELIEVED, count
                ):
                    return head, packets.bodies(head, search=True)
        return None, None

    def _uniform_size(self, shape: tuple[int, int], depth: int, packets: int) -> int:
        """Bytes that the bodies of all packets together cannot exceed, see `compress_indices`."""
        uniform, axis = self._uniform(), 0 if self.books.planar else 1
        total = 0
        for part in self._parts(shape, packets):
            extent = part[1 + axis].stop - part[1 + axis].start
            total += uniform.size((extent, shape[1]) if axis == 0 else (shape[0], extent), depth)
        return total

    def _parts(self, shape: Sequence[int], packets: int) -> list[tuple[slice, slice, slice]]:
        """What each packet holds of indices of a shape (h, w): so many rows, or frames; at least one."""
        axis = 0 if self.books.planar else 1
        count = min(max(packets, 1), shape[axis])
        bounds = [shape[axis] * i // count for i in range(count + 1)]
        every = slice(None)
        cuts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        return [(every, cut, every) if axis == 0 else (every, every, cut) for cut in cuts]

    def least_bits(self, shape: tuple[int, int]) -> float:
        self._best_of(1)
        priors = [self._prior(kind.name) for kind in self.kinds]
        depths = range(1, self.quantiser.depths + 1)
        return shape[0] * shape[1] * min(prior.least_bits(depth) for prior in priors for depth in depths)

    def count(self, y: Tensor, quality: int) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """What `freeze` wants counted, as far as there are such priors: (slots, indices); for each candidate of the
        conditional prior (pair tables, indices); and (slots, bits) that the context prior takes for planes.

        Only of the planes that a depth adds to the one before it: levels share the tables of the others, and whoever
        counts at all levels would count them again.
        """
        if StaticPrior not in self.kinds:
            return []
        depth = self.depth(quality)
        items = [self._count(item, depth) for item in self.indices(y, quality).cpu().numpy()]
        return [
            (np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))
            for parts in zip(*items, strict=True)
        ]

    def _count(
        self, grid: NDArray[np.int64], depth: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        first = self.books.shared(depth)
        slots = np.array([self.books.slot(depth, plane) for plane in range(first, len(grid))])
        result = [(slots.repeat(grid[0].size), grid[first:].ravel().astype(np.int32))]
        if ConditionalPrior in self.kinds:
            result += ConditionalPrior.pairs(self.books, grid, depth, first)
        if ContextPrior in self.kinds:
            context = self._prior(ContextPrior.name)
            assert isinstance(context, ContextPrior)
            result.append((slots, np.round(context.plane_bits(grid, depth)[first:]).astype(np.int32)))
        return result

    def table_counts(self) -> list[int]:
        slots = len(self.books.slots)
        counts = [slots] if StaticPrior in self.kinds else []
        if ConditionalPrior in self.kinds:
            candidates = ConditionalPrior.candidates(self.books)
            counts += [int(pair_starts(self.books, near)[-1]) for near in candidates]
        return counts + [slots] * (ContextPrior in self.kinds)

    def freeze(self, counts: Sequence[Counts] | None = None) -> None:
        """Makes the integers of the priors, and chooses the cheapest of them for each level.

        Args:
            counts: of what `count` gives; None: tables are uniform, and so is the prior of every level.
        """
        if not self.trainable:
            raise CheckpointError("this bottleneck is frozen already")
        every = range(len(self.books.slots))
        sets = list(counts or [[{}] * number for number in self.table_counts()])
        uniform = UniformPrior(self.books)
        priors: list[IndexPrior] = [uniform]
        costs = [np.log2([self.books.codes(slot) for slot in every])]

        def table(number: int, first: int, codes: int, rows: int = 1) -> NDArray[np.float64]:
            found = np.zeros((rows, codes))
            for row, seen in enumerate(sets[number][first : first + rows]):
                found[row, list(seen)] = list(seen.values())
            return found

        if StaticPrior in self.kinds:
            seen = [table(0, slot, self.books.codes(slot))[0] for slot in every]
            static, cost = StaticPrior.from_counts(self.books, seen)
            priors.append(static)
            costs.append(cost)
        if ConditionalPrior in self.kinds:
            starts = [pair_starts(self.books, near) for near in ConditionalPrior.candidates(self.books)]

            def pairs(slot: int, candidate: int) -> NDArray[np.float64]:
                first, stop = starts[candidate][slot : slot + 2].tolist()
                return table(1 + candidate, first, self.books.codes(slot), stop - first)

            conditional, cost = ConditionalPrior.from_counts(self.books, pairs)
            priors.append(conditional)
            costs.append(cost)
        if self.prior is not None:
            priors.append(ContextPrior.from_networks(self.prior))
            spent = [sum(bits * number for bits, number in part.items()) for part in sets[-1]]
            numbers = [part.sum() for part in seen]
            costs.append(np.array([a / n if n else np.inf for a, n in zip(spent, numbers, strict=True)]))
        self._priors = {prior.name: prior for prior in priors}
        self._best = []
        for depth in range(1, self.quantiser.depths + 1):
            slots = [self.books.slot(depth, plane) for plane in range(self.quantiser.planes(depth))]
            self._best.append(priors[int(np.argmin([cost[slots].sum() for cost in costs]))].name)

    def thaw(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        """Restores the networks of a context prior; tables are counted anew when the codec is exported."""
        own = subset(arrays, f"{ContextPrior.name}.")
        if self.prior is not None and own:
            self.prior.restore(own)

    def frozen_arrays(self) -> dict[str, NDArray[np.int32]]:
        names = [kind.name for kind in self.kinds]
        best = [names.index(self._best_of(depth)) for depth in range(1, self.quantiser.depths + 1)]
        arrays = {"best": np.array(best, np.int32), "sizes": self._sizes()}
        for name in names[1:]:
            prior = self._prior(name)
            assert isinstance(prior, ModelledPrior)
            arrays |= {f"{name}.{part}": array for part, array in prior.arrays().items()}
        return arrays

    def load_frozen(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        if "sizes" not in arrays or not np.array_equal(arrays["sizes"], self._sizes()):
            raise CheckpointError("the checkpoint's codebooks do not fit its architecture")
        best = read_integers(arrays, "best", self.quantiser.depths, 0, len(self.kinds) - 1)
        priors: list[IndexPrior] = [UniformPrior(self.books)]
        for kind in MODELLED[: len(self.kinds) - 1]:
            priors.append(kind.from_arrays(self.books, subset(arrays, f"{kind.name}.")))
        self._priors = {prior.name: prior for prior in priors}
        self._best = [self.kinds[choice].name for choice in best.tolist()]

    def _sizes(self) -> NDArray[np.int32]:
        """Codes of each plane of each family, which end in 0."""
        return np.array([k for family in self.books.families for k in (*family, 0)], np.int32)

    def _best_of(self, depth: int) -> str:
        if self._priors is None:
            raise CheckpointError("this codec has no tables yet: export it first (compand export)")
        return self._best[depth - 1]

    def _prior(self, name: str) -> IndexPrior:
        if self._priors is None:
            raise CheckpointError("this codec has no tables yet: export it first (compand export)")
        if name not in self._priors:
            raise UsageError(
                f"index prior {name!r} is not in this checkpoint: choose one of {', '.join(self._priors)}"
            )
        return self._priors[name]

    def _uniform(self) -> UniformPrior:
        uniform = self._prior("uniform")
        assert isinstance(uniform, UniformPrior)
        return uniform


def _checksum(head: int, number: int, body: bytes | memoryview) -> bytes:
    """CRC-16 of a packet, and of the head and its number, with others of which it would mean something else."""
    place = HEAD.pack(head) + LENGTH.pack(number)
    return binascii.crc_hqx(body, binascii.crc_hqx(place, 0xFFFF)).to_bytes(CRC_BYTES, "big")


class _Packets:
    """What follows a head.

    Args:
        view: the bytes.
        limit: bytes of the longest body.
    """

    def __init__(self, view: memoryview, limit: int) -> None:
        self.view, self.limit = view, limit
        self.effort = EFFORT

    def bodies(self, head: int, *, search: bool) -> list[bytes | None]:
        """Bodies of the packets of a head; None for those that are damaged.

        Args:
            search: whether a packet that is not where the length of the one before says is looked for. That length may
                be what is damaged; a packet counts as found where the one after it, or the end, follows.
        """
        bodies: list[bytes | None] = []
        behind, claimed = 0, 0
        for number in range(head // len(PRIORS)):
            found = self._packet(claimed, head, number)
            if found is None and search and number:
                found = self._searched(behind, head, number)
            bodies.append(bytes(found[0]) if found else None)
            if found:
                behind = claimed = found[1]
                continue
            place = self._place(claimed)
            claimed = place[1] if place else len(self.view)
        return bodies

    def chain(self) -> int:
        """Number of packets that lengths tell, as long as each leads to the next and the last to the end; else 0."""
        offset = number = 0
        while offset < len(self.view) and number <= MOST_PACKETS:
            place = self._place(offset)
            if place is None:
                return 0
            offset, number = place[1], number + 1
        return number if offset == len(self.view) else 0

    def begins(self, head: int) -> bool:
        """Whether the first packet is one of a head."""
        return self._affordable(0) and self._packet(0, head, 0) is not None

    def _place(self, offset: int) -> tuple[int, int] | None:
        """Where the body of a packet that begins there does, and where it ends; None if none can."""
        source = Source(self.view, offset)
        try:
            length = LENGTH.unpack(source)
        except BitstreamError:
            return None
        start = source.offset + CRC_BYTES
        return (start, start + length) if length <= self.limit and start + length <= len(self.view) else None

    def _packet(self, offset: int, head: int, number: int) -> tuple[memoryview, int] | None:
        """Body of an intact packet that begins there, and where it ends."""
        place = self._place(offset)
        if place is None or (number + 1 == head // len(PRIORS) and place[1] != len(self.view)):
            return None
        body = self.view[place[0] : place[1]]
        intact = self.view[place[0] - CRC_BYTES : place[0]] == _checksum(head, number, body)
        return (body, place[1]) if intact else None

    def _searched(self, offset: int, head: int, number: int) -> tuple[memoryview, int] | None:
        """The first place behind an offset where a packet and the one after it are intact."""
        for start in range(offset, min(offset + SEARCHED, len(self.view))):
            if not self._affordable(start):
                return None
            found = self._packet(start, head, number)
            if found and (number + 1 == head // len(PRIORS) or self._packet(found[1], head, number + 1)):
                return found
        return None

    def _affordable(self, offset: int) -> bool:
        """Whether there is effort left for a packet that may begin there, which is taken."""
        place = self._place(offset)
        self.effort -= CHECK_BYTES + (place[1] - place[0] if place else 0)
        return self.effort >= 0
