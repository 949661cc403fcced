"""Rows to a batch: equal sizes are stacked, mixed ones padded or sorted into buckets on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compand.errors import PackedSetError, UsageError

MIXED = ("error", "pad", "bucket")
"""What can be done with rows of mixed sizes."""

Item = dict[str, Any]


class Rows(Sequence[Item]):
    """The rows of one batch as a `PackedDataset` reads them: a sequence of items, whose tensors are stacked already
    where their sizes are equal.

    Attributes:
        values: of each field and column, one a row; a tensor [rows, ...] or a list.
        skipped: why rows that were asked for are missing.
    """

    def __init__(
        self, values: Mapping[str, Tensor | list[Any]], length: int, skipped: Sequence[PackedSetError] = ()
    ) -> None:
        self.values = dict(values)
        self.skipped = list(skipped)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        return {name: values[index] for name, values in self.values.items()}


class Collate:
    """Makes a batch of items; a `collate_fn` for any DataLoader.

    Tensors become tensors [batch, ...], numbers become tensors [batch] (int64, float64 or bool), all else lists.

    Args:
        mixed: what to do with rows of mixed sizes. "error" refuses them. "pad" fills up with zeros at the end of each
            axis of the grid and adds "FIELD_mask", bool [batch, *grid], True where the row is. "bucket" gives a list of
            batches instead of one, each of rows of one size.
        axes: trailing axes along which sizes may differ: 2 for pictures, 1 for sounds.

    Raises:
        UsageError: `mixed` is none of these.
    """

    def __init__(self, mixed: str = "error", axes: int = 2) -> None:
        if mixed not in MIXED:
            raise UsageError(f"mixed={mixed!r} does not exist: choose {', '.join(MIXED)}")
        self.mixed, self.axes = mixed, axes

    def __call__(self, items: Sequence[Item]) -> Any:
        """A dict of batched values, or a list of them ("bucket").

        Raises:
            PackedSetError: there are no items: all were damaged.
            UsageError: sizes differ, with "error", or other axes than those of the grid do.
        """
        if not len(items):
            raise PackedSetError(
                "no row of the batch can be read: pack the set again, or read it by PackedLoader"
            )
        if isinstance(items, Rows):
            values: dict[str, Any] = items.values
        else:
            values = {name: [item[name] for item in items] for name in items[0]}
        if self.mixed == "bucket":
            return self._buckets(values, len(items))
        batch: Item = {}
        for name, column in values.items():
            if isinstance(column, Tensor):
                batch[name] = column
            elif not isinstance(column[0], Tensor):
                batch[name] = _plain(column)
            elif len({tensor.shape for tensor in column}) == 1:
                batch[name] = torch.stack(column)
            else:
                self._mix(name, column, batch)
            if self.mixed == "pad" and isinstance(column[0], Tensor) and column[0].ndim >= self.axes:
                # A batch that happens to be of one size has a mask like the others.
                grid = batch[name].shape[-self.axes :]
                batch.setdefault(f"{name}_mask", torch.ones((len(items), *grid), dtype=torch.bool))
        return batch

    def _buckets(self, values: Mapping[str, Any], length: int) -> list[Item]:
        sized = [column for column in values.values() if isinstance(column[0], Tensor)]
        buckets: dict[tuple[torch.Size, ...], list[int]] = {}
        for row in range(length):
            buckets.setdefault(tuple(column[row].shape for column in sized), []).append(row)
        stack = Collate("error", self.axes)
        return [
            stack([{name: column[row] for name, column in values.items()} for row in rows])
            for rows in buckets.values()
        ]

    def _mix(self, name: str, column: list[Tensor], batch: Item) -> None:
        sizes = [tuple(tensor.shape[-self.axes :]) for tensor in column]
        others = {tensor.shape[: -self.axes] for tensor in column}
        if self.mixed == "error" or len(others) > 1:
            first, second = list(dict.fromkeys("x".join(map(str, tensor.shape)) for tensor in column))[:2]
            remedy = "crop them" if len(others) > 1 else "crop them, or give mixed='pad' or mixed='bucket'"
            raise UsageError(f"{name} of a batch have sizes {first} and {second}: {remedy}")
        largest = tuple(map(max, zip(*sizes, strict=True)))
        padded, masks = [], []
        for tensor, size in zip(column, sizes, strict=True):
            edges = [
                edge
                for most, found in zip(largest[::-1], size[::-1], strict=True)
                for edge in (0, most - found)
            ]
            padded.append(F.pad(tensor, edges))
            masks.append(F.pad(torch.ones(size, dtype=torch.bool), edges))
        batch[name] = torch.stack(padded)
        batch[f"{name}_mask"] = torch.stack(masks)


def _plain(column: list[Any]) -> Tensor | list[Any]:
    """Numbers of one kind as a tensor; all else as it is."""
    kinds = {type(value) for value in column}
    if kinds in ({int}, {float}, {bool}):
        return torch.tensor(
            column, dtype={int: torch.int64, float: torch.float64, bool: torch.bool}[kinds.pop()]
        )
    return column
