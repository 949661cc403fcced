"""Which rows of a packed set come when: a pure function of (seed, epoch), cut into ranks and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch.distributed
from numpy.typing import NDArray
from torch.utils.data import Sampler

from compand.errors import UsageError

BLOCK = 256
"""Rows that a windowed shuffle keeps near each other on disk: a row group, as sets are packed."""

_FULL, _BLOCKS, _WINDOW = range(3)  # what a random number is drawn for


def process_place() -> tuple[int, int]:
    """Rank and number of the processes that train together, as torch.distributed has them; else (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class RowBatch(list[int]):
    """The rows of one batch, and what its random transforms draw their numbers from.

    Attributes:
        stream: (seed, epoch, place of the batch among those of all ranks): the same for the same batch, whichever
            process reads it.
    """

    stream: tuple[int, int, int]

    def __init__(self, rows: list[int], stream: tuple[int, int, int]) -> None:
        super().__init__(rows)
        self.stream = stream


class EpochOrder:
    """The rows of one epoch in their order, a permutation of range(length).

    Args:
        length: rows of the set.
        seed, epoch: what the order is drawn from, by PCG64's raw numbers: the same with every release of numpy.
        shuffle: False: as they are stored.
        window: 0: every order of the rows is equally likely, for which 8 bytes a row are held. Else blocks of BLOCK
            neighbouring rows come in random order, and rows are mixed within about `window` of them: reads stay near
            each other, for storage with slow seeks, and memory does not grow with the set.
    """

    def __init__(self, length: int, seed: int, epoch: int, *, shuffle: bool = True, window: int = 0) -> None:
        self.length, self.seed, self.epoch, self.shuffle = length, seed, epoch, shuffle
        self.blocks_in_window = max(round(window / BLOCK), 1) if window else 0
        self._full: NDArray[np.int64] | None = None
        self._window: tuple[int, NDArray[np.int64]] | None = None
        if self.blocks_in_window and shuffle:
            self._blocks = self._permutation(-(-length // BLOCK), _BLOCKS, 0)
            sizes = np.full(len(self._blocks), BLOCK, dtype=np.int64)
            if length % BLOCK:
                sizes[self._blocks == len(sizes) - 1] = length % BLOCK
            ends = np.cumsum(sizes)
            starts = np.concatenate([[0], ends])[:: self.blocks_in_window]
            self._starts = starts[starts < length]

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows at the places start .. stop - 1 of the order, 0 <= start <= stop <= length."""
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        if not self.blocks_in_window:
            if self._full is None:
                self._full = self._permutation(self.length, _FULL, 0)
            return self._full[start:stop]
        parts = []
        while start < stop:
            index = int(np.searchsorted(self._starts, start, side="right")) - 1
            first = int(self._starts[index])
            part = self._rows_of_window(index)[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _rows_of_window(self, index: int) -> NDArray[np.int64]:
        if self._window is None or self._window[0] != index:
            blocks = self._blocks[index * self.blocks_in_window : (index + 1) * self.blocks_in_window]
            rows = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
            rows = rows[rows < self.length]
            self._window = index, rows[self._permutation(len(rows), _WINDOW, index)]
        return self._window[1]

    def _permutation(self, length: int, purpose: int, index: int) -> NDArray[np.int64]:
        numbers = np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch, purpose, index]))
        return np.argsort(numbers.random_raw(length), kind="stable").astype(np.int64, copy=False)


class PackedSampler(Sampler[list[int]]):
    """Batches of rows for one rank; a `batch_sampler` for any DataLoader over a `PackedDataset`.

    The order of an epoch is a function of (seed, epoch) alone. Of it, each rank gets an interval of the same length, up
    to one row, and cuts it into batches: every row comes exactly once an epoch over all ranks. A position is a number
    of batches, the same for all ranks, so that the state that rank 0 saved serves all of them, with any number of
    workers.

    Iterating begins where `load_state_dict` or `seek` put it, else at the beginning of the epoch; an epoch that was
    exhausted is followed by the next one. A DataLoader asks for batches before they are used: `state_dict` counts what
    was asked for, `PackedLoader.state_dict` what was delivered.

    Args:
        length: rows of the set.
        batch_size: rows a batch; the last one of a rank may have fewer.
        seed: of the order.
        epoch: the first epoch.
        rank, world_size: which of how many processes this is.
        shuffle: False: rows come as they are stored.
        window: see `EpochOrder`; 0 shuffles all rows.
        drop_last: leave the last rows of every rank out, so that all batches of all ranks are full.
        even: where the ranks' shares differ by a row, repeat one, so that all ranks have the same number of batches,
            as gradients averaged over ranks need. Then some rows (fewer than world_size) come twice.

    Attributes:
        epoch: the epoch that iterating begins next, or that runs.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        window: int = 0,
        drop_last: bool = False,
        even: bool = False,
    ) -> None:
        if length < 0 or batch_size < 1 or seed < 0 or epoch < 0 or window < 0:
            fact = f"length {length}, batch_size {batch_size}, seed {seed}, epoch {epoch}, window {window}"
            raise UsageError(f"{fact}: give none below 0, and batches of at least 1")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size} does not exist: ranks begin at 0")
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, seed, epoch
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.window, self.drop_last, self.even = shuffle, window, drop_last, even
        self._start = self._asked = 0
        self._order: EpochOrder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None}

    def share(self) -> tuple[int, int]:
        """First place of this rank in the order, and how many places it has."""
        start = self.rank * self.length // self.world_size
        if self.drop_last:
            return start, self.length // self.world_size // self.batch_size * self.batch_size
        if self.even:
            return start, -(-self.length // self.world_size)
        return start, (self.rank + 1) * self.length // self.world_size - start

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return -(-self.share()[1] // self.batch_size)

    def batch(self, index: int) -> RowBatch:
        """Batch number `index` of this rank in the current epoch, 0 <= index < len."""
        order = self._order
        if order is None or order.epoch != self.epoch:
            order = self._order = EpochOrder(
                self.length, self.seed, self.epoch, shuffle=self.shuffle, window=self.window
            )
        start, rows = self.share()
        stop = start + min((index + 1) * self.batch_size, rows)
        rows_of_batch = order.rows(start + index * self.batch_size, stop).tolist()
        return RowBatch(rows_of_batch, (self.seed, self.epoch, index * self.world_size + self.rank))

    def __iter__(self) -> Iterator[list[int]]:
        if 0 < len(self) <= self._asked:  # by whoever took the last batch and did not ask for more
            self.seek(self.epoch + 1)
        epoch, first = self.epoch, self._start
        self._start = self._asked = 0
        for index in range(first, len(self)):
            batch = self.batch(index)
            self._asked = index + 1
            yield batch
            if self.epoch != epoch:
                return  # sought elsewhere meanwhile
        self.seek(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that iterating begins next; a position within another epoch is forgotten."""
        if epoch != self.epoch or 0 < len(self) <= self._asked:
            self.seek(epoch)

    def seek(self, epoch: int, batches: int = 0) -> None:
        """Iterating begins behind that many batches of that epoch."""
        self.epoch, self._start, self._asked = epoch, batches, batches

    def state_at(self, epoch: int, batches: int) -> dict[str, Any]:
        """The state behind that many batches of that epoch, for `load_state_dict`; all integers and booleans."""
        if batches and batches >= len(self):
            epoch, batches = epoch + 1, 0
        return {**self._settings(), "epoch": epoch, "batches": batches}

    def state_dict(self) -> dict[str, Any]:
        """The state behind the last batch that was asked for."""
        return self.state_at(self.epoch, self._asked)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Iterating begins behind the last batch that `state` counts.

        Raises:
            UsageError: the state is of a sampler with other settings, whose batches would be others, or is none.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise UsageError(
                    f"the state was saved with {name} {state.get(name)}, this loader has {value}: "
                    "resume with the same, or begin an epoch anew with set_epoch"
                )
        epoch, batches = state.get("epoch"), state.get("batches")
        if not isinstance(epoch, int) or not isinstance(batches, int) or epoch < 0 or batches < 0:
            raise UsageError(f"the state's epoch {epoch} and batches {batches} are no position: load another")
        self.seek(epoch, batches)

    def _settings(self) -> dict[str, Any]:
        names = ("length", "batch_size", "seed", "world_size", "shuffle", "window", "drop_last", "even")
        return {name: getattr(self, name) for name in names}
