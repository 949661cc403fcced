"""Packed datasets: pack a folder once, then train on its latents.

```python
from compand.data import PackedDataset, PackedLoader

train = PackedDataset("imagenette-packed/train", columns=("label",))
for batch in PackedLoader(train, batch_size=64, seed=0):
    batch["latents"], batch["label"]            # float32 [64, M, h, w], int64 [64]
```

Nothing is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compand.data.collate import Collate as Collate
    from compand.data.dataset import PackedDataset as PackedDataset
    from compand.data.info import SetInfo as SetInfo
    from compand.data.iterable import PackedIterable as PackedIterable
    from compand.data.loader import PackedLoader as PackedLoader
    from compand.data.module import PackedDataModule as PackedDataModule
    from compand.data.pack import PackSpec as PackSpec
    from compand.data.pack import pack_chunk as pack_chunk
    from compand.data.packed import PackedReader as PackedReader
    from compand.data.packed import Shard as Shard
    from compand.data.packed import ShardWriter as ShardWriter
    from compand.data.packed import check_set as check_set
    from compand.data.payload import RowCodec as RowCodec
    from compand.data.payload import learn_tables as learn_tables
    from compand.data.sampling import PackedSampler as PackedSampler
    from compand.data.sources import Record as Record
    from compand.data.stem import LatentExpansion as LatentExpansion
    from compand.data.stem import LatentPreview as LatentPreview
    from compand.data.stem import LatentStem as LatentStem
    from compand.data.stem import latent_stem as latent_stem
    from compand.data.transforms import CenterCrop as CenterCrop
    from compand.data.transforms import Flip as Flip
    from compand.data.transforms import LatentTransform as LatentTransform
    from compand.data.transforms import Normalize as Normalize
    from compand.data.transforms import RandomCrop as RandomCrop
    from compand.data.transforms import RandomResizedCrop as RandomResizedCrop
    from compand.data.transforms import measure_flip as measure_flip

_LAZY = {
    "PackedReader": "compand.data.packed",
    "SetInfo": "compand.data.info",
    "Shard": "compand.data.packed",
    "ShardWriter": "compand.data.packed",
    "check_set": "compand.data.packed",
    "RowCodec": "compand.data.payload",
    "learn_tables": "compand.data.payload",
    "Record": "compand.data.sources",
    "PackSpec": "compand.data.pack",
    "pack_chunk": "compand.data.pack",
    "PackedDataset": "compand.data.dataset",
    "PackedIterable": "compand.data.iterable",
    "PackedLoader": "compand.data.loader",
    "Collate": "compand.data.collate",
    "CenterCrop": "compand.data.transforms",
    "Flip": "compand.data.transforms",
    "LatentTransform": "compand.data.transforms",
    "Normalize": "compand.data.transforms",
    "RandomCrop": "compand.data.transforms",
    "RandomResizedCrop": "compand.data.transforms",
    "measure_flip": "compand.data.transforms",
    "PackedSampler": "compand.data.sampling",
    "PackedDataModule": "compand.data.module",
    "LatentExpansion": "compand.data.stem",
    "LatentPreview": "compand.data.stem",
    "LatentStem": "compand.data.stem",
    "latent_stem": "compand.data.stem",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module compand.data has no attribute {name}")
    return getattr(import_module(_LAZY[name]), name)
