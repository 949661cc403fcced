"""`compand train`: LightningCLI over the module and the data module that a config names."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs LightningCLI (`fit`, `validate`; --config, --print_config and overrides) on `argv`, else on sys.argv."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.cli import LightningCLI

    torch.backends.cudnn.benchmark = True
    if argv is not None:
        # LightningCLI names the program in its messages after sys.argv and warns if that holds other arguments.
        sys.argv = ["compand train", *argv]
    LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
