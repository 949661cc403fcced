"""`compand train`: LightningCLI over the module and the data module that a config names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs LightningCLI (`fit`, `validate`; --config, --print_config and overrides) on `argv`, else on sys.argv."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.cli import LightningCLI

    torch.backends.cudnn.benchmark = True
    with warnings.catch_warnings():
        # sys.argv must stay as it is, for a distributed run starts its other processes with it.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        LightningCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_kwargs={"prog": "compand train"},
            args=list(argv) if argv is not None else None,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
        )
