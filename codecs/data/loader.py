"""Batches of a packed set: sharded over ranks, and resumable behind any batch that was delivered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from compand.data.collate import Collate, Rows
from compand.data.dataset import PackedDataset
from compand.data.iterable import PackedIterable
from compand.data.sampling import PackedSampler, process_place
from compand.errors import CompandError, PackedSetError, UsageError


class PackedLoader:
    """A DataLoader over a packed set whose state counts the batches that were delivered.

    ```python
    loader = PackedLoader(PackedDataset("set"), batch_size=64, seed=0, num_workers=2)
    loader.load_state_dict(state)  # where there is one
    while loader.epoch < epochs:
        for batch in loader:
            ...
            state = loader.state_dict()  # behind this batch
    ```

    An epoch that was exhausted is followed by the next one, in its own order; an epoch that was left early is begun
    again. The state of one rank serves all ranks; the number of workers may differ when it is loaded, the number of
    ranks and the batch size may not.

    Args:
        dataset: a `PackedDataset`, or a `PackedIterable`, whose seed, shuffling and ranks are taken unless given here.
        batch_size: rows a batch on each rank.
        shuffle, seed, epoch, window, drop_last, even: see `PackedSampler`.
        rank, world_size: None: as torch.distributed has them when the loader is made.
        collate: makes a batch of `Rows`; None: `Collate(mixed)`.
        mixed: what is done with rows of mixed sizes, see `Collate`.
        num_workers, prefetch_factor, persistent_workers, pin_memory, multiprocessing_context: as of DataLoader.

    Attributes:
        dataset: the `PackedDataset`.
        skipped: why rows were left out (on_error="skip"), of all workers, in the order of delivery.

    Raises:
        UsageError: arguments are out of range, or `rank` is without `world_size`.
        PackedSetError, UsageError: while iterating, as `PackedDataset` and `Collate`, from workers too.
    """

    def __init__(
        self,
        dataset: PackedDataset | PackedIterable,
        *,
        batch_size: int = 64,
        shuffle: bool | None = None,
        seed: int | None = None,
        epoch: int = 0,
        window: int | None = None,
        drop_last: bool = False,
        even: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        collate: Callable[[Rows], Any] | None = None,
        mixed: str = "error",
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory: bool = False,
        multiprocessing_context: Any = None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise UsageError("rank and world_size belong together: give both or none")
        stream = dataset.sampler if isinstance(dataset, PackedIterable) else None
        if rank is None or world_size is None:
            rank, world_size = process_place() if stream is None else (stream.rank, stream.world_size)
        self.dataset = dataset.dataset if isinstance(dataset, PackedIterable) else dataset
        self._sampler = PackedSampler(
            len(self.dataset),
            batch_size=batch_size,
            seed=(0 if stream is None else stream.seed) if seed is None else seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            shuffle=(True if stream is None else stream.shuffle) if shuffle is None else shuffle,
            window=(0 if stream is None else stream.window) if window is None else window,
            drop_last=drop_last,
            even=even,
        )
        self.skipped: list[PackedSetError] = []
        self.batch_size = batch_size
        self._epoch, self._start, self._delivered = epoch, 0, 0
        self._loader: DataLoader[Any] = DataLoader(
            _Guarded(self.dataset),
            batch_sampler=self._sampler,
            collate_fn=_Delivery(collate or Collate(mixed, self.dataset.axes)),
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory=pin_memory,
            multiprocessing_context=multiprocessing_context,
        )

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return len(self._sampler)

    @property
    def epoch(self) -> int:
        """The epoch that runs, or that iterating begins next."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch that iterating begins next; a position that was loaded for another epoch is forgotten."""
        if epoch != self._epoch or self._finished():
            self._epoch, self._start, self._delivered = epoch, 0, 0

    def __iter__(self) -> Iterator[Any]:
        if self._finished():  # by whoever took the last batch and did not ask for more
            self.set_epoch(self._epoch + 1)
        epoch, first = self._epoch, self._start
        self._start, self._delivered = 0, first
        self._sampler.seek(epoch, first)
        for batch, skipped in self._loader:
            if self._epoch != epoch:
                return  # sought elsewhere meanwhile
            if isinstance(batch, CompandError):
                try:
                    raise batch
                finally:
                    del batch  # else it keeps itself and, through this frame, the workers
            self._delivered += 1
            self.skipped += skipped
            if batch is not None:
                yield batch
        if self._epoch == epoch:
            self.set_epoch(epoch + 1)

    def _finished(self) -> bool:
        return 0 < len(self) <= self._delivered

    def state_dict(self) -> dict[str, Any]:
        """The state behind the last batch that was delivered: a few numbers."""
        return self._sampler.state_at(self._epoch, self._delivered)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Iterating begins behind the last batch that `state` counts. Raises UsageError if it is of other batches."""
        self._sampler.load_state_dict(state)
        self._epoch, self._start = state["epoch"], state["batches"]
        self._delivered = self._start


class _Guarded(Dataset[Any]):
    """A dataset whose errors are results: DataLoader would wrap them into the text of a traceback, without shard and
    key, and then wait ten seconds for its workers."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> Rows | CompandError:
        try:
            return self.dataset.__getitems__(indices)
        except CompandError as error:
            return error


class _Delivery:
    """Sends with each batch why rows are missing; a batch without rows is None, and one that failed its error."""

    def __init__(self, collate: Callable[[Rows], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Any) -> tuple[Any, list[PackedSetError]]:
        """rows: `Rows`, or why there are none."""
        if isinstance(rows, CompandError):
            return rows, []
        try:
            return (self.collate(rows) if len(rows) else None), rows.skipped
        except CompandError as error:
            return error, []
