"""Priors of codebook indices: what a plane of indices costs, from log2 K bits each to what its neighbourhood tells.

```
indices [planes, h, w] --prior--> a row of integer frequencies for each --ANS--> bytes
```

Neighbours that a prior may look at are known to the decoder: left and above in the same plane, here and on the left in
the planes before. A position whose index is p + 2 r + c (plane, row, column) steps away is decoded in that step, with
all others of the step at once: anti-diagonals of a picture, one frame a plane later than the plane before in a sound.
Frequencies are integers made of integers, so that every machine decodes alike.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compand.coding import radix
from compand.coding.ans import AnsReader, AnsWriter
from compand.coding.tables import PRECISION, least_share, share_out
from compand.errors import CheckpointError, UsageError

Indices = NDArray[np.int64]

TOP, LEFT, RIGHT = 2, 2, 1
"""Margins of a frame: how far neighbours reach."""

MOST_CODES = 1 << 12
"""The largest codebook that a modelled prior takes."""

ROW_CHUNK = 1 << 17
"""Frequencies that are worked on at a time."""

CLASSES = 16
"""Of the indices of a neighbour, in a conditional prior; that there is none is one more."""

STRENGTH = 200.0
"""Observations that the table of all classes together counts for in that of each."""

LLOYD_STEPS = 12

MOST_WEIGHT = (1 << 15) - 1
"""Weights of stored tables, from 1: 16 bits."""


class Near(NamedTuple):
    """A neighbour: planes back (0: the same plane), and rows and columns from the position itself."""

    back: int
    row: int
    column: int


LEFTWARD, UPWARD, BEFORE = Near(0, 0, -1), Near(0, -1, 0), Near(1, 0, 0)


@dataclass(frozen=True)
class Vocabulary:
    """Codebooks of each depth, and which of them share a prior.

    A depth whose planes are the first of another's is of one family with it. Each plane of a family is a `slot`.

    Attributes:
        sizes: codes K of every plane, by depth from 1.
        planar: whether rows are neighbours (pictures); else there is one row (sounds).
    """

    sizes: tuple[tuple[int, ...], ...]
    planar: bool

    @cached_property
    def families(self) -> tuple[tuple[int, ...], ...]:
        """Codes of every plane of each family."""
        found: list[tuple[int, ...]] = []
        for sizes in self.sizes:
            if found and sizes[: len(found[-1])] == found[-1]:
                found[-1] = sizes
            else:
                found.append(sizes)
        return tuple(found)

    @cached_property
    def family_of(self) -> tuple[int, ...]:
        """Family of each depth."""
        return tuple(
            next(f for f, family in enumerate(self.families) if family[: len(sizes)] == sizes)
            for sizes in self.sizes
        )

    @cached_property
    def slots(self) -> list[tuple[int, int]]:
        """(family, plane) of each slot."""
        return [(f, plane) for f, family in enumerate(self.families) for plane in range(len(family))]

    def slot(self, depth: int, plane: int) -> int:
        """Slot of a plane of a depth."""
        return self.slots.index((self.family_of[depth - 1], plane))

    def shared(self, depth: int) -> int:
        """How many planes of a depth are those of the depth before it."""
        if depth == 1 or self.family_of[depth - 2] != self.family_of[depth - 1]:
            return 0
        return len(self.sizes[depth - 2])

    def codes(self, slot: int) -> int:
        """K of a slot."""
        family, plane = self.slots[slot]
        return self.families[family][plane]

    def codes_before(self, slot: int, back: int) -> int | None:
        """K of the plane so many before a slot's; None if there is none."""
        family, plane = self.slots[slot]
        return self.families[family][plane - back] if back <= plane else None


class Frame:
    """Planes of indices within a margin, where every plane has the number past its last index: no neighbour.

    Args:
        sizes: codes of each plane.
        height, width: positions.
    """

    def __init__(self, sizes: Sequence[int], height: int, width: int) -> None:
        shape = (len(sizes), TOP + height, LEFT + width + RIGHT)
        self.planes = np.empty(shape, np.int64)
        self.planes[:] = np.array(sizes)[:, None, None]
        self.inside = self.planes[:, TOP:, LEFT : LEFT + width]
        self.flat = self.planes.reshape(-1)

    @property
    def size(self) -> int:
        """Cells of one plane."""
        return self.planes[0].size

    def cells(self) -> Indices:
        """Numbers in `flat` of the positions of each plane, [planes, h w]."""
        numbers = np.arange(self.flat.size).reshape(self.planes.shape)
        return numbers[:, TOP:, LEFT : self.planes.shape[2] - RIGHT].reshape(len(self.planes), -1)

    def offsets(self, neighbours: Sequence[Near]) -> NDArray[np.int64]:
        """Where neighbours lie in `flat`, from the position itself."""
        columns = self.planes.shape[2]
        return np.array([-n.back * self.size + n.row * columns + n.column for n in neighbours], np.int64)


@lru_cache(maxsize=64)
def schedule(planes: int, height: int, width: int, ordered: bool) -> tuple[tuple[int, Indices], ...]:
    """Order of decoding: (plane, cells of `Frame.flat`) by steps, within a step by planes.

    Args:
        ordered: whether positions wait for their neighbours; else each plane is one step.
    """
    frame = Frame([0] * planes, height, width)
    every = frame.cells()
    if not ordered:
        return tuple(enumerate(every))
    plane, row, column = np.indices((planes, height, width)).reshape(3, -1)
    step = plane + 2 * row + column
    order = np.lexsort((plane, step))
    key = (step * planes + plane)[order]
    cells = np.split(every.ravel()[order], np.flatnonzero(np.diff(key)) + 1)
    return tuple((int(group[0]) // frame.size, group) for group in cells)


class IndexPrior(ABC):
    """Turns planes of indices into bytes.

    Attributes:
        name: what configurations call it.
        code: what payloads call it. Part of the format.
    """

    name: ClassVar[str]
    code: ClassVar[int]

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    @abstractmethod
    def encode(self, indices: Indices, depth: int) -> bytes:
        """indices: [planes(depth), h, w], each below the K of its plane."""

    @abstractmethod
    def decode(self, data: bytes, shape: tuple[int, int], depth: int) -> Indices:
        """Inverse of `encode` for h and w = shape. Raises BitstreamError on damaged data, as far as it shows."""

    @abstractmethod
    def bits(self, indices: Indices, depth: int) -> float:
        """Information of indices [planes(depth), h, w]."""

    @abstractmethod
    def least_bits(self, depth: int) -> float:
        """Bits that no position, of all planes together, can cost less than."""


class UniformPrior(IndexPrior):
    """Every index at log2 K bits, without the rounding of an entropy coder (`coding.radix`)."""

    name = "uniform"
    code = 0

    def encode(self, indices: Indices, depth: int) -> bytes:
        return radix.pack([plane.ravel() for plane in indices], self.vocabulary.sizes[depth - 1])

    def decode(self, data: bytes, shape: tuple[int, int], depth: int) -> Indices:
        return np.stack(radix.unpack(data, self._rows(shape, depth))).reshape(-1, *shape)

    def size(self, shape: tuple[int, int], depth: int) -> int:
        """Bytes of any indices of a shape (h, w)."""
        return radix.size(self._rows(shape, depth))

    def bits(self, indices: Indices, depth: int) -> float:
        return self.least_bits(depth) * indices[0].size

    def least_bits(self, depth: int) -> float:
        return sum(map(math.log2, self.vocabulary.sizes[depth - 1]))

    def _rows(self, shape: tuple[int, int], depth: int) -> list[tuple[int, int]]:
        return [(shape[0] * shape[1], base) for base in self.vocabulary.sizes[depth - 1]]


def require_modelled(name: str, vocabulary: Vocabulary) -> None:
    """Raises UsageError, which speaks of the prior of that name, where a codebook is too large for a model."""
    largest = max(map(max, vocabulary.sizes))
    if largest > MOST_CODES:
        raise UsageError(
            f"prior {name!r} does not take codebooks of {largest}: choose 'uniform' or at most {MOST_CODES}"
        )


class ModelledPrior(IndexPrior):
    """A prior that has a row of frequencies for every position, from its neighbours."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        require_modelled(self.name, vocabulary)

    @abstractmethod
    def neighbours(self, slot: int) -> Sequence[Near]:
        """Neighbours that the rows of a slot depend on; those of planes before the first are left out."""

    @abstractmethod
    def rows(self, slot: int, near: Indices) -> NDArray[np.float32]:
        """Frequencies of n positions.

        Args:
            near: indices of the neighbours, [n, neighbours]; K where there is none.

        Returns:
            Integers [n, K] of sum 2**PRECISION, as `share_out` gives them.
        """

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[np.int32]]:
        """The integers of the prior, for a checkpoint."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, vocabulary: Vocabulary, arrays: Mapping[str, NDArray[np.int32]]) -> ModelledPrior:
        """Inverse of `arrays`. Raises CheckpointError if they are not those of such a vocabulary."""

    def encode(self, indices: Indices, depth: int) -> bytes:
        _, starts, frequencies = self._ranges(indices, depth)
        order = np.concatenate([cells for _, cells in self._schedule(indices.shape[1:], depth)])
        writer = AnsWriter()
        writer.push_ranges(starts[order], frequencies[order])
        return writer.finish()

    def decode(self, data: bytes, shape: tuple[int, int], depth: int) -> Indices:
        sizes = self.vocabulary.sizes[depth - 1]
        frame = Frame(sizes, *shape)
        slots, offsets = self._slots(frame, depth)
        reader = AnsReader(data)
        for plane, cells in self._schedule(shape, depth):
            for part in _chunks(cells, sizes[plane]):
                near = frame.flat[part[:, None] + offsets[plane]]
                frame.flat[part] = reader.pull_rows(self.rows(slots[plane], near))
        reader.finish()
        return frame.inside.copy()

    def bits(self, indices: Indices, depth: int) -> float:
        return float(self.plane_bits(indices, depth).sum())

    def plane_bits(self, indices: Indices, depth: int) -> NDArray[np.float64]:
        """Information of each plane of indices [planes(depth), h, w]."""
        frame, _, frequencies = self._ranges(indices, depth)
        by_plane = frequencies.reshape(frame.planes.shape)[:, TOP:, LEFT : LEFT + indices.shape[2]]
        return (PRECISION - np.log2(by_plane.astype(np.float64))).sum((1, 2))

    def least_bits(self, depth: int) -> float:
        most = [
            (1 << PRECISION) - (codes - 1) * least_share(codes) for codes in self.vocabulary.sizes[depth - 1]
        ]
        return sum(PRECISION - math.log2(frequency) for frequency in most)

    def _ranges(self, indices: Indices, depth: int) -> tuple[Frame, NDArray[np.float32], NDArray[np.float32]]:
        """Frame, and start and frequency of the index in each of its cells."""
        sizes = self.vocabulary.sizes[depth - 1]
        frame = Frame(sizes, indices.shape[1], indices.shape[2])
        frame.inside[:] = indices
        slots, offsets = self._slots(frame, depth)
        starts = np.zeros(frame.flat.size, np.float32)
        frequencies = np.ones(frame.flat.size, np.float32)
        for plane, cells in enumerate(frame.cells()):
            for part in _chunks(cells, sizes[plane]):
                rows = self.rows(slots[plane], frame.flat[part[:, None] + offsets[plane]])
                symbol = frame.flat[part][:, None]
                own = np.take_along_axis(rows, symbol, 1)[:, 0]
                frequencies[part] = own
                starts[part] = np.take_along_axis(rows.cumsum(1), symbol, 1)[:, 0] - own
        return frame, starts, frequencies

    def _slots(self, frame: Frame, depth: int) -> tuple[list[int], list[NDArray[np.int64]]]:
        """Slot of each plane of a depth, and where its neighbours lie."""
        slots = [self.vocabulary.slot(depth, plane) for plane in range(len(frame.planes))]
        return slots, [frame.offsets(self.neighbours(slot)) for slot in slots]

    def _schedule(self, shape: Sequence[int], depth: int) -> tuple[tuple[int, Indices], ...]:
        planes = len(self.vocabulary.sizes[depth - 1])
        ordered = any(self.neighbours(self.vocabulary.slot(depth, plane)) for plane in range(planes))
        return schedule(planes, shape[0], shape[1], ordered)


def _chunks(cells: Indices, codes: int) -> list[Indices]:
    """Cells in parts for which rows of so many codes stay small."""
    most = max(ROW_CHUNK // codes, 1)
    return [cells[start : start + most] for start in range(0, cells.size, most)]


class StaticPrior(ModelledPrior):
    """One table a slot: how often each index occurs.

    Args:
        vocabulary: the codebooks.
        weights: integers 1 .. MOST_WEIGHT of each slot, [1, K].
    """

    name = "static"
    code = 1

    def __init__(self, vocabulary: Vocabulary, weights: Sequence[NDArray[np.int32]]) -> None:
        super().__init__(vocabulary)
        self.weights = list(weights)
        self._tables = [share_out(weight.astype(np.float64)) for weight in weights]

    def neighbours(self, slot: int) -> Sequence[Near]:
        return ()

    def rows(self, slot: int, near: Indices) -> NDArray[np.float32]:
        table = self._tables[slot]
        return np.broadcast_to(table, (len(near), table.shape[1]))

    @classmethod
    def from_counts(
        cls, vocabulary: Vocabulary, counts: Sequence[NDArray[np.float64]]
    ) -> tuple[StaticPrior, NDArray[np.float64]]:
        """Tables from counts.

        Args:
            counts: how often each index of each slot was seen, arrays [K].

        Returns:
            The prior, and what an index of each slot takes, see `held_out_bits`.
        """
        halves = [_halves(seen) for seen in counts]
        costs = [held_out_bits(held[None], smoothed(kept)[None]) for kept, held in halves]
        return cls(vocabulary, [as_weights(smoothed(seen)[None]) for seen in counts]), np.array(costs)

    def arrays(self) -> dict[str, NDArray[np.int32]]:
        return {"weights": _joined(self.weights)}

    @classmethod
    def from_arrays(cls, vocabulary: Vocabulary, arrays: Mapping[str, NDArray[np.int32]]) -> StaticPrior:
        shapes = [(1, vocabulary.codes(slot)) for slot in range(len(vocabulary.slots))]
        return cls(vocabulary, read_weights(arrays, "weights", shapes))


class ConditionalPrior(ModelledPrior):
    """A table for each class of indices of one neighbour: on the left, above, or in the plane before.

    Classes are clusters of indices after which the same indices follow; which neighbour a slot looks at is the one
    that costs least on what was counted. Having no such neighbour is a class of its own.

    Args:
        vocabulary: the codebooks.
        conditions: number of the neighbour of each slot among `candidates`.
        classes: class of each index of that neighbour, and last of there being none, [K' + 1].
        weights: integers 1 .. MOST_WEIGHT of each slot, [classes, K].
    """

    name = "conditional"
    code = 2

    def __init__(
        self,
        vocabulary: Vocabulary,
        conditions: Sequence[int],
        classes: Sequence[Indices],
        weights: Sequence[NDArray[np.int32]],
    ) -> None:
        super().__init__(vocabulary)
        self.conditions, self.classes, self.weights = list(conditions), list(classes), list(weights)
        self._tables = [share_out(weight.astype(np.float64)) for weight in weights]

    @staticmethod
    def candidates(vocabulary: Vocabulary) -> tuple[Near, ...]:
        """Neighbours that a slot may look at."""
        deep = max(map(len, vocabulary.families)) > 1
        return (LEFTWARD, *((UPWARD,) * vocabulary.planar), *((BEFORE,) * deep))

    def neighbours(self, slot: int) -> Sequence[Near]:
        return (self.candidates(self.vocabulary)[self.conditions[slot]],)

    def rows(self, slot: int, near: Indices) -> NDArray[np.float32]:
        return self._tables[slot][self.classes[slot][near[:, 0]]]

    @classmethod
    def pairs(
        cls, vocabulary: Vocabulary, indices: Indices, depth: int, first: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """For each of `candidates` what came with it in indices [planes(depth), h, w]: numbers of pair tables, which
        begin at `pair_starts` for each slot and have one for each index of the neighbour, and indices; from plane
        `first` on."""
        sizes = vocabulary.sizes[depth - 1]
        frame = Frame(sizes, indices.shape[1], indices.shape[2])
        frame.inside[:] = indices
        cells = frame.cells()
        result = []
        for near in cls.candidates(vocabulary):
            starts, offset = pair_starts(vocabulary, near), frame.offsets([near])
            tables = [
                starts[vocabulary.slot(depth, plane)] + frame.flat[cells[plane] + offset]
                for plane in range(max(first, near.back), len(sizes))
            ]
            symbols = indices[max(first, near.back) :].ravel().astype(np.int32)
            result.append((np.concatenate([np.zeros(0, np.int64), *tables]), symbols))
        return result

    @classmethod
    def from_counts(
        cls, vocabulary: Vocabulary, pairs: Callable[[int, int], NDArray[np.float64]]
    ) -> tuple[ConditionalPrior, NDArray[np.float64]]:
        """Classes and tables from counts.

        Args:
            pairs: for a slot and a number of `candidates`, how often each index came with each index of that
                neighbour (and last, with none), [K' + 1, K].

        Returns:
            The prior, and what an index of each slot takes, see `held_out_bits`.
        """
        fitted = []
        for slot in range(len(vocabulary.slots)):
            found = []
            for number, near in enumerate(cls.candidates(vocabulary)):
                if vocabulary.codes_before(slot, near.back) is not None:
                    found.append((number, *_fit(pairs(slot, number))))
            fitted.append(min(found, key=lambda entry: entry[3]))
        conditions, classes, tables, costs = zip(*fitted, strict=True)
        return cls(vocabulary, conditions, classes, [as_weights(table) for table in tables]), np.array(costs)

    def arrays(self) -> dict[str, NDArray[np.int32]]:
        return {
            "conditions": np.array(self.conditions, np.int32),
            "tables": np.array([len(weight) for weight in self.weights], np.int32),
            "classes": _joined(self.classes),
            "weights": _joined(self.weights),
        }

    @classmethod
    def from_arrays(cls, vocabulary: Vocabulary, arrays: Mapping[str, NDArray[np.int32]]) -> ConditionalPrior:
        candidates, slots = cls.candidates(vocabulary), range(len(vocabulary.slots))
        conditions = read_integers(arrays, "conditions", len(slots), 0, len(candidates) - 1).tolist()
        tables = read_integers(arrays, "tables", len(slots), 1, CLASSES + 1).tolist()
        before = [vocabulary.codes_before(slot, candidates[conditions[slot]].back) for slot in slots]
        sizes = [codes + 1 for codes in before if codes is not None]
        if len(sizes) != len(slots):
            raise CheckpointError(
                "the checkpoint's index prior looks at a plane before the first: get the checkpoint again"
            )
        joined = read_integers(arrays, "classes", sum(sizes), 0, CLASSES).astype(np.int64)
        classes = np.split(joined, list(itertools.accumulate(sizes))[:-1])
        if any(label.max() >= count for label, count in zip(classes, tables, strict=True)):
            raise CheckpointError(
                "the checkpoint's index prior has classes without a table: get the checkpoint again"
            )
        weights = read_weights(
            arrays, "weights", [(count, vocabulary.codes(s)) for s, count in enumerate(tables)]
        )
        return cls(vocabulary, conditions, classes, weights)


def pair_starts(vocabulary: Vocabulary, near: Near) -> NDArray[np.int64]:
    """First of the pair tables of each slot for a neighbour, and behind the last one how many there are."""
    codes = [vocabulary.codes_before(slot, near.back) for slot in range(len(vocabulary.slots))]
    return np.cumsum([0, *(0 if before is None else before + 1 for before in codes)])


def _fit(pairs: NDArray[np.float64]) -> tuple[Indices, NDArray[np.float64], float]:
    """Classes [K' + 1] and tables [classes, K] of pair counts [K' + 1, K], and what an index takes with such."""
    kept, held = _halves(pairs)
    labels = clusters(kept)
    cost = held_out_bits(_gathered(held, labels), _tables(_gathered(kept, labels), smoothed(kept.sum(0))))
    labels = clusters(pairs)
    return labels, _tables(_gathered(pairs, labels), smoothed(pairs.sum(0))), cost


def _gathered(rows: NDArray[np.float64], labels: Indices) -> NDArray[np.float64]:
    """Sums of the rows [n, K] of each label [n]."""
    totals = np.zeros((labels.max() + 1, rows.shape[1]))
    np.add.at(totals, labels, rows)
    return totals


def _halves(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Counts, each observation in one of two parts at random, always the same way."""
    kept = np.random.default_rng(0).binomial(counts.astype(np.int64), 0.5).astype(np.float64)
    return kept, counts - kept


def _tables(counts: NDArray[np.float64], prior: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities from counts [n, K], with what `prior` [K] expects of STRENGTH observations added to each row."""
    return (counts + STRENGTH * prior) / (counts.sum(1, keepdims=True) + STRENGTH)


def clusters(pairs: NDArray[np.float64]) -> Indices:
    """Classes of the rows of pair counts [n + 1, K], by Lloyd's algorithm on code lengths; the last row has its own.

    A row belongs to the class with whose table its counts take the fewest bits: the information bottleneck (Tishby et
    al. 1999, equation 16) at its hard limit. Each seed is the row that the ones before it would cost most.

    Returns:
        Labels without gaps, [n + 1]; the last row's is the greatest.
    """
    rows = pairs[:-1]
    marginal = smoothed(rows.sum(0))
    own = _tables(rows, marginal)
    least = -(rows * np.log2(own)).sum(1)
    cost = -(rows @ np.log2(marginal))
    seeds = [marginal]
    while len(seeds) < CLASSES and (cost - least).max() > 0:
        seeds.append(own[int((cost - least).argmax())])
        cost = np.minimum(cost, -(rows @ np.log2(seeds[-1])))
    centres = np.stack(seeds)
    for _ in range(LLOYD_STEPS):
        labels = (rows @ np.log2(centres).T).argmax(1)
        centres = _tables(_gathered(rows, labels), marginal)
    _, labels = np.unique((rows @ np.log2(centres).T).argmax(1), return_inverse=True)
    return np.append(labels, labels.max() + 1)


def held_out_bits(counts: NDArray[np.float64], tables: NDArray[np.float64]) -> float:
    """Mean bits of indices that were counted, [n, K], with tables [n, K] that were made of others; infinite for none.

    A prior is judged so by half of what was counted, with what the other half makes of it: on its own data, the one
    with the most tables would always win.
    """
    total = counts.sum()
    return float(-(counts * np.log2(tables)).sum() / total) if total else math.inf


def smoothed(count: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities from counts [K], half an observation added to each."""
    return (count + 0.5) / (count + 0.5).sum()


def as_weights(masses: NDArray[np.float64]) -> NDArray[np.int32]:
    """Probabilities [n, K] as weights of stored tables, the largest of each row as large as they may be."""
    scaled = masses / masses.max(1, keepdims=True) * MOST_WEIGHT
    return np.round(scaled).clip(1).astype(np.int32)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    return np.concatenate([part.ravel() for part in parts]).astype(np.int32)


def read_integers(
    arrays: Mapping[str, NDArray[np.int32]], name: str, count: int, low: int, high: int
) -> NDArray[np.int32]:
    """A row of `count` integers from `low` to `high`. Raises CheckpointError if it is anything else."""
    array = arrays.get(name)
    if array is None or array.ndim != 1 or array.size != count or array.dtype != np.int32:
        raise CheckpointError(f"the checkpoint's index prior lacks {count} {name}: get the checkpoint again")
    if count and (array.min() < low or array.max() > high):
        raise CheckpointError(
            f"{name} of the checkpoint's index prior leave {low} to {high}: get the checkpoint again"
        )
    return array


def read_weights(
    arrays: Mapping[str, NDArray[np.int32]], name: str, shapes: Sequence[tuple[int, int]]
) -> list[NDArray[np.int32]]:
    """Weights of several tables from one row. Raises CheckpointError if they are none of such shapes."""
    sizes = [rows * columns for rows, columns in shapes]
    joined = read_integers(arrays, name, sum(sizes), 1, MOST_WEIGHT)
    parts = np.split(joined, list(itertools.accumulate(sizes))[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
