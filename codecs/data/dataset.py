"""Rows of a packed set as latents, tokens or decoded samples, at random or a batch at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from compand.data.collate import Item, Rows
from compand.data.info import SetInfo
from compand.data.packed import PackedReader
from compand.data.payload import RowCodec
from compand.data.sampling import RowBatch
from compand.data.transforms import Crop, LatentTransform
from compand.errors import PackedSetError, UsageError

if TYPE_CHECKING:
    from compand.codec import Codec

FIELDS = ("latents", "tokens", "samples")
"""What a row can be read as."""

ItemTransform = Callable[[Item], Item]

MOST_PAIRED = 16
"""Channels of pictures whose integers are looked up in pairs: the table has 512 KiB for each."""


class PackedDataset(Dataset[Item]):
    """A packed set for any DataLoader, with random access; picklable, for workers that are forked or spawned.

    An item is a dict of the fields and columns that were asked for:

    - "latents": float32 tensor [M, h, w] of pictures, [M, n] or [groups, M, n] of sounds; dequantised;
    - "tokens": the integers of the same shape, int16 (int32 in a row or batch that needs it); of a codec with tokens,
      these: [h, w] of pictures in one codebook, [codebooks, h, w] in several, [codebooks, n] or [groups, codebooks, n]
      of sounds;
    - "samples": decoded, uint8 [C, H, W] of a picture, with as many channels as its codec has (gray becomes RGB), or
      float32 [channels, n] of a sound at its own rate; whole, also where latents are cropped;
    - columns under their names, as Python has them.

    `__getitems__`, which DataLoader calls for the rows of a batch, reads them in the order of the file and dequantises
    all by one look-up. Random transforms draw from the batch's place in the epoch where a `PackedSampler` chose it,
    so that a batch is the same from every worker, else from torch's seed of the process.

    Args:
        path: folder of a packed set, or its shards, see `PackedReader`.
        fields: what rows are read as, of FIELDS.
        columns: columns that come along; None: "key", and "label" where there is one.
        transform: one or several, in their order: `LatentTransform` for latents (a leading `Crop` for tokens too), then
            any function from item to item, which costs the speed of batches.
        codec: the codec that packed the set; None: the checkpoint that the set names is loaded when it is needed.
        on_error: "raise", or "skip": rows that are damaged are left out of their batch with a warning that names shard
            and key. A single row that was asked for by number raises in any case.
        verify: compare payloads with their checksums.

    Attributes:
        info: what the set is.
        columns: that come along.
        axes: of the grid of latents: 2 of pictures, 1 of sounds.
        skipped: how many rows this process left out.

    Raises:
        PackedSetError: the set, or the codec for it, is not there or does not fit.
        UsageError: there is no such field or column, or a transform does not fit the fields.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        fields: Sequence[str] = ("latents",),
        columns: Sequence[str] | None = None,
        transform: LatentTransform | ItemTransform | Sequence[LatentTransform | ItemTransform] | None = None,
        codec: Codec | None = None,
        *,
        on_error: str = "raise",
        verify: bool = True,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error={on_error!r} does not exist: choose raise or skip")
        self.reader = PackedReader(path, verify=verify)
        self.info: SetInfo = self.reader.info
        self.fields = tuple(fields)
        for field in self.fields:
            if field not in FIELDS:
                raise UsageError(f"field {field} does not exist: choose {', '.join(FIELDS)}")
        if columns is None:
            columns = [name for name in ("key", "label") if name in self.reader.columns]
        self.columns = tuple(columns)
        for name in self.columns:
            if name not in self.reader.columns or name == "payload" or name in self.fields:
                there = ", ".join(sorted(set(self.reader.columns) - {"payload", *self.fields}))
                raise UsageError(f"the set has no column {name}: it has {there}")
        self.axes = int(self.info.latent["axes"])
        self.on_error = on_error
        self.skipped = 0
        self._crop, self._latent_transforms, self._item_transforms = self._sorted_transforms(transform)
        self._given_codec = codec
        self._row_codec = RowCodec(self.info, codec)
        self._levels: Tensor | None = None
        self._pairs: Tensor | None = None
        if "latents" in self.fields and self.info.profile != "cpd" and not self.info.vocabulary:
            self._levels = torch.from_numpy(self._row_codec.values).flatten()
        self._reads_grid = bool({"latents", "tokens"} & set(self.fields))
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._generator: tuple[int, np.random.Generator] | None = None
        self._names = [
            *dict.fromkeys((*self.columns, *self.info.geometry, *(["payload"] if self.fields else [])))
        ]

    def __len__(self) -> int:
        return len(self.reader)

    def __getstate__(self) -> dict[str, Any]:
        # Workers need the table of levels, not the network that made it. Tokens have none: each worker loads the codec.
        own = {"_row_codec": RowCodec(self.info, self._given_codec), "_generator": None, "_pairs": None}
        return {**self.__dict__, **own}

    def __getitem__(self, index: int) -> Item:
        """One row. Raises IndexError where there is none, PackedSetError if it is damaged."""
        rows = self._read([index], skip=False)
        item: Item = rows[0]
        return item

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        """The rows of a batch, in the order that they were asked for.

        Raises:
            IndexError: there is no such row.
            PackedSetError: a row is damaged, with on_error="raise".
        """
        return self._read(indices, skip=self.on_error == "skip")

    def _sorted_transforms(
        self, transform: Any
    ) -> tuple[Crop | None, list[LatentTransform], list[ItemTransform]]:
        """A crop that comes first, what is done to latents behind it, and what to items."""
        given = (
            list(transform) if isinstance(transform, Sequence) else [] if transform is None else [transform]
        )
        on_latents = [one for one in given if isinstance(one, LatentTransform)]
        on_items = given[len(on_latents) :]
        if any(isinstance(one, LatentTransform) for one in on_items) or not all(map(callable, on_items)):
            raise UsageError("transforms of latents come first, functions of items behind them: reorder them")
        for_tokens = [one for one in on_latents if isinstance(one, Crop) and one.geometric]
        if "tokens" in self.fields and (len(on_latents) > 1 or on_latents != for_tokens):
            raise UsageError(
                "tokens can be cropped and no more: give one RandomCrop or CenterCrop, or read latents"
            )
        if on_latents and not {"latents", "tokens"} & set(self.fields):
            raise UsageError("transforms of latents do nothing to samples: give a function from item to item")
        crop: Crop | None = None
        if on_latents and isinstance(on_latents[0], Crop):
            crop, on_latents = on_latents[0], on_latents[1:]
            crop.extent(self.axes)
        if "tokens" in self.fields and self.info.profile == "cpd" and not self.info.vocabulary:
            raise UsageError("a set of profile cpd has no tokens: pack with --profile train or archive")
        return crop, on_latents, on_items

    # -------------------------------------------------------------------------------------------------- reading

    def _read(self, indices: Sequence[int], skip: bool) -> Rows:
        generator = self._generator_for(indices)
        crop = self._crop
        numbers = generator.random((len(indices), crop.draws)).tolist() if crop is not None else None
        records: list[Item | None] = [None] * len(indices)
        skipped = []
        for place in sorted(range(len(indices)), key=indices.__getitem__):
            index = int(indices[place])
            try:
                records[place] = self._record(index, None if numbers is None else numbers[place])
            except PackedSetError as error:
                located = self._located(error, index)
                if not skip:
                    raise located from None
                warnings.warn(f"row left out: {located}", stacklevel=2)
                skipped.append(located)
        self.skipped += len(skipped)
        kept = [record for record in records if record is not None]
        values: dict[str, Any] = {name: [record[name] for record in kept] for name in self.columns}
        grids = [record["grid"] for record in kept] if self._reads_grid else []
        for field in self.fields:
            if field == "latents":
                values[field] = self._latents(grids, generator)
            elif field == "tokens":
                values[field] = self._tokens(grids)
            else:
                values[field] = [record["samples"] for record in kept]
        rows = Rows(values, len(kept), skipped)
        if not self._item_transforms or not kept:
            return rows
        items = list(rows)
        for transform in self._item_transforms:
            items = [transform(item) for item in items]
        return Rows({name: [item[name] for item in items] for name in items[0]}, len(items), skipped)

    def _record(self, index: int, numbers: Sequence[float] | None) -> Item:
        """The columns of a row, its window of the grid as "grid", and its samples, as far as they are asked for."""
        record = self.reader.row(index, self._names)
        if self._reads_grid:
            size = tuple([record[name] for name in self.info.geometry])
            shape = self._shapes.get(size)
            if shape is None:
                shape = self._shapes[size] = self.info.latent_shape(record)
            if self.info.profile == "cpd" and not self.info.vocabulary:
                grid: NDArray[Any] = self._row_codec.latents(record["payload"], shape)
            else:
                grid = self._row_codec.decode(record["payload"], shape)
            if numbers is not None and self._crop is not None:
                try:
                    window: Any = (..., *self._crop.window(shape[-self.axes :], numbers))
                    # A copy: what the window was cut from is large, and goes while the processor's cache still has it.
                    grid = grid[window].copy()
                except UsageError as error:
                    name, key = self.reader.place(index)
                    raise UsageError(f"{error} (shard {name}, key {key})") from None
            record["grid"] = grid
        if "samples" in self.fields:
            record["samples"] = self._samples(record["payload"], record)
        return record

    def _samples(self, payload: memoryview, record: Item) -> Tensor:
        signal: Any = self._row_codec.samples(payload, record)
        if self.info.medium == "audio":
            return torch.from_numpy(signal.samples)
        pixels = torch.from_numpy(signal.pixels).permute(2, 0, 1)
        channels = int(getattr(self._row_codec.codec, "channels", len(pixels)))
        return pixels.expand(channels, -1, -1).contiguous() if len(pixels) == 1 else pixels.contiguous()

    def _latents(self, grids: list[NDArray[Any]], generator: np.random.Generator) -> Tensor | list[Tensor]:
        if not grids:
            return []
        latents: Tensor | list[Tensor]
        if self.info.vocabulary and len({grid.shape for grid in grids}) == 1:
            latents = torch.from_numpy(self._row_codec.dequantise(np.stack(grids)))
        elif _alike(grids) and grids[0].dtype == np.int8:
            latents = self._looked_up(torch.from_numpy(np.stack(grids)))
        else:
            latents = [self._dequantised(grid) for grid in grids]
        if self._crop is not None:
            crop = self._crop
            if isinstance(latents, Tensor):
                latents = crop.finish(latents, self.axes)
            else:
                latents = torch.stack([crop.finish(one, self.axes) for one in latents])
        elif isinstance(latents, list) and len({one.shape for one in latents}) == 1:
            latents = torch.stack(latents)
        for transform in self._latent_transforms:
            if isinstance(latents, Tensor):
                latents = transform(latents, generator, self.axes)
            else:
                latents = [transform(one[None], generator, self.axes)[0] for one in latents]
        return latents

    def _tokens(self, grids: list[NDArray[Any]]) -> Tensor | list[Tensor]:
        wide = np.int32 if any(grid.dtype == np.int32 for grid in grids) else np.int16
        if len(self.info.vocabulary) == 1 and self.axes == 2:
            grids = [grid[0] for grid in grids]
        tokens = [torch.from_numpy(grid.astype(wide)) for grid in grids]
        if self._crop is not None:
            tokens = [self._crop.finish(one, self.axes) for one in tokens]
        return torch.stack(tokens) if tokens and _alike(tokens) else tokens

    def _dequantised(self, grid: NDArray[Any]) -> Tensor:
        """Latents of one row, from integers of any width or from the latents of a .cpd file."""
        if grid.dtype == np.int8 and not self.info.vocabulary:
            return self._looked_up(torch.from_numpy(np.ascontiguousarray(grid)))
        latents = grid if grid.dtype == np.float32 else self._row_codec.dequantise(grid)
        return torch.from_numpy(np.ascontiguousarray(latents))

    def _looked_up(self, integers: Tensor) -> Tensor:
        """int8 [..., M, *grid] -> float32 of the same shape."""
        assert self._levels is not None
        planes, table, span = integers.flatten(-self.axes), self._levels, 256
        # Those of loud sounds spread over more of a table of pairs than the processor's cache holds.
        small = self.axes == 2 and len(table) <= MOST_PAIRED * 256
        if small and planes.numel() and planes.shape[-1] % 2 == 0:
            if self._pairs is None:
                self._pairs = _paired(table.view(-1, 256))
            planes, table, span = planes.view(torch.int16), self._pairs, 1 << 16
        offsets = torch.arange(span // 2, len(table), span, dtype=torch.int32)[:, None]
        found = table.index_select(0, (planes + offsets).flatten())
        return found.view(torch.float32).view(integers.shape)

    def _generator_for(self, indices: Sequence[int]) -> np.random.Generator:
        if isinstance(indices, RowBatch):
            return np.random.default_rng(indices.stream)
        # A forked worker must not go on with the numbers of its parent.
        if self._generator is None or self._generator[0] != os.getpid():
            self._generator = os.getpid(), np.random.default_rng(torch.initial_seed())
        return self._generator[1]

    def _located(self, error: PackedSetError, index: int) -> PackedSetError:
        """The error with shard and key of its row."""
        if error.shard is not None and error.key is not None:
            return error
        try:
            shard, key = self.reader.place(index)
        except PackedSetError:
            return error if error.key is not None else PackedSetError(str(error), key=index)
        return PackedSetError(str(error), shard=shard, key=key)


def _paired(levels: Tensor) -> Tensor:
    """Of levels [M, 256] of single integers, those of two neighbours as one number, int64 [M * 65536]: in the order of
    the 16-bit integers that hold the bytes of both."""
    both = np.arange(-(1 << 15), 1 << 15).astype(np.int16).view(np.int8).reshape(-1, 2)
    return levels[:, torch.from_numpy(both.astype(np.int64) + 128)].view(torch.int64).flatten()


def _alike(arrays: Sequence[Any]) -> bool:
    first = arrays[0]
    return all(one.shape == first.shape and one.dtype == first.dtype for one in arrays)
