"""Packed sets for Lightning: sharded over its ranks, resumed from its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from compand.data.collate import Rows
from compand.data.dataset import ItemTransform, PackedDataset
from compand.data.loader import PackedLoader
from compand.data.sampling import process_place
from compand.data.transforms import LatentTransform

Transforms = LatentTransform | ItemTransform | Sequence[LatentTransform | ItemTransform] | None


class PackedDataModule(pl.LightningDataModule):
    """Training and validation from packed sets.

    Each rank reads its share of every epoch: for training, shares have equally many batches (at most one row is
    repeated a rank); for validation every row comes exactly once. Checkpoints that Lightning writes in the middle of an
    epoch hold the position, and training goes on behind the last batch.

    Args:
        train, val: folders of packed sets; val may be left out.
        fields, columns, codec, on_error: see `PackedDataset`.
        train_transform, val_transform: see `PackedDataset`.
        batch_size: rows a batch on each rank.
        seed, window: of the order of training, see `PackedSampler`.
        num_workers, multiprocessing_context, pin_memory: as of DataLoader, for each of the two loaders.
        mixed, collate: see `PackedLoader`.
        drop_last: leave short batches of training out.

    Raises:
        PackedSetError, UsageError: in `setup`, as `PackedDataset`.
    """

    def __init__(
        self,
        train: str | Path,
        val: str | Path | None = None,
        *,
        fields: Sequence[str] = ("latents",),
        columns: Sequence[str] | None = None,
        train_transform: Transforms = None,
        val_transform: Transforms = None,
        codec: Any = None,
        batch_size: int = 64,
        seed: int = 0,
        window: int = 0,
        num_workers: int = 0,
        multiprocessing_context: str | None = None,
        pin_memory: bool = False,
        mixed: str = "error",
        collate: Callable[[Rows], Any] | None = None,
        drop_last: bool = False,
        on_error: str = "raise",
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.seed, self.window, self.drop_last = batch_size, seed, window, drop_last
        self._transforms = {"train": train_transform, "val": val_transform}
        self._read = {"fields": fields, "columns": columns, "codec": codec, "on_error": on_error}
        self._load: dict[str, Any] = {
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "multiprocessing_context": multiprocessing_context if num_workers else None,
            "pin_memory": pin_memory,
            "mixed": mixed,
            "collate": collate,
        }
        self._sets: dict[str, PackedDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Opens the sets; stage: "fit" both, "validate" the second, None both."""
        wanted = {"fit": ("train", "val"), "validate": ("val",)}.get(stage or "fit", ())
        for name, path in (("train", self.train), ("val", self.val)):
            if name in wanted and path is not None and name not in self._sets:
                self._sets[name] = PackedDataset(path, transform=self._transforms[name], **self._read)

    def train_dataloader(self) -> PackedLoader:
        """Shuffled; a new order every epoch."""
        return self._loader(
            "train", shuffle=True, seed=self.seed, window=self.window, drop_last=self.drop_last, even=True
        )

    def val_dataloader(self) -> PackedLoader | list[Any]:
        """In the order of the set; nothing without one."""
        if self.val is None:
            return []
        return self._loader("val", shuffle=False)

    def _loader(self, name: str, **order: Any) -> PackedLoader:
        trainer = self.trainer
        rank, world_size = process_place() if trainer is None else (trainer.global_rank, trainer.world_size)
        return PackedLoader(
            self._sets[name],
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            **order,
            **self._load,
        )
