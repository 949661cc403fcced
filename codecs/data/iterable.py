"""A packed set as a stream: neighbouring rows are read together and mixed within a buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from compand.data.collate import Collate, Item
from compand.data.dataset import PackedDataset
from compand.data.sampling import PackedSampler, process_place
from compand.errors import UsageError

RUN = 64
"""Items that one worker gives in a row where no batch size is given."""


class PackedIterable(IterableDataset[Any]):
    """A packed set for any DataLoader, as a stream.

    Blocks of neighbouring rows come in an order drawn from (seed, epoch), and rows are mixed among about
    `shuffle_buffer` of them, so that storage with slow seeks is read in large pieces and memory does not grow with the
    set. Rows are sharded over ranks and then, by runs, over the workers of a DataLoader: every row comes exactly once
    an epoch, in an order that does not depend on the number of workers where the DataLoader's batch size is that of
    the runs (`batch_size`, or 64).

    ```python
    DataLoader(PackedIterable("set", batch_size=64), batch_size=None, num_workers=2)  # batches
    DataLoader(PackedIterable("set"), batch_size=64, num_workers=2)  # items
    PackedLoader(PackedIterable("set"), batch_size=64, num_workers=2)  # resumable
    ```

    A pass that was exhausted is followed by the next epoch. Workers that a DataLoader starts anew for every pass begin
    with the epoch of the object that it has: call `set_epoch` before each pass, or use `PackedLoader`.

    Args:
        dataset: folder of a packed set or its shards, opened with `options`; or a `PackedDataset`.
        shuffle_buffer: rows among which rows are mixed; 0: as they are stored.
        seed, epoch, drop_last, even: see `PackedSampler`.
        batch_size: give batches; None: give items.
        rank, world_size: which of how many processes this is; None: as torch.distributed has them when this is made.
        collate: makes a batch of `Rows`; None: `Collate()`.
        options: of `PackedDataset`: fields, columns, transform, codec, on_error, verify.

    Attributes:
        dataset, sampler: what is read, and in which order.

    Raises:
        PackedSetError, UsageError: as `PackedDataset` and `PackedSampler`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        shuffle_buffer: int = 2048,
        seed: int = 0,
        epoch: int = 0,
        batch_size: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        even: bool = False,
        collate: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise UsageError("rank and world_size belong together: give both or none")
        if rank is None or world_size is None:
            rank, world_size = process_place()
        if isinstance(dataset, PackedDataset):
            if options:
                raise UsageError(f"{', '.join(options)} are of the PackedDataset: give them to it")
            self.dataset = dataset
        else:
            self.dataset = PackedDataset(dataset, **options)
        self.batch_size = batch_size
        self.collate = collate or Collate(axes=self.dataset.axes)
        self.sampler = PackedSampler(
            len(self.dataset),
            batch_size=RUN if batch_size is None else batch_size,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle_buffer > 0,
            window=shuffle_buffer,
            drop_last=drop_last,
            even=even,
        )
        # A place is a number of runs, and of items of the run behind them.
        self._start = self._given = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that iterating begins next; a position that was loaded for another epoch is forgotten."""
        if epoch != self.sampler.epoch or self._finished():
            self._seek(epoch, 0, 0)

    def __iter__(self) -> Iterator[Item | Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if self._finished():  # by whoever took the last row and did not ask for more
            self._seek(self.sampler.epoch + 1, 0, 0)
        epoch, (first, skip) = self.sampler.epoch, self._start
        self._start = self._given = (0, 0)
        for index in range(first, len(self.sampler)):
            if (index - first) % workers != worker:
                continue
            rows = self.dataset.__getitems__(self.sampler.batch(index))
            if self.batch_size is not None:
                self._given = index + 1, 0
                if len(rows):
                    yield self.collate(rows)
            else:
                for place in range(skip if index == first else 0, len(rows)):
                    self._given = (index, place + 1) if place + 1 < len(rows) else (index + 1, 0)
                    yield rows[place]
            if self.sampler.epoch != epoch:
                return  # sought elsewhere meanwhile
        self._seek(epoch + 1, 0, 0)

    def state_dict(self) -> dict[str, Any]:
        """The state behind what was given last, in this process: without workers. With them, see `PackedLoader`."""
        run, items = self._given
        return {**self.sampler.state_at(self.sampler.epoch, run), "items": items}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Iterating begins behind what `state` counts. Raises UsageError if it is of another order."""
        self.sampler.load_state_dict(state)
        self._seek(state["epoch"], state["batches"], int(state.get("items", 0)))

    def _finished(self) -> bool:
        return 0 < len(self.sampler) <= self._given[0]

    def _seek(self, epoch: int, run: int, items: int) -> None:
        self.sampler.seek(epoch, run)
        self._start = self._given = run, items
