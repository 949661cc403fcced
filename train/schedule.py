"""How far a training is, by steps or by the clock, and the learning rate that follows from it."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl


class TimedModule(pl.LightningModule):
    """A module whose training may have a time limit, which goes on counting when a run is resumed.

    Attributes:
        minutes: time limit; None: the trainer's `max_steps` alone ends the training.
        warmup_steps: steps of linear warm-up.
        final_lr_fraction: what the cosine decay leaves of the peak learning rate.
        progress: share of the training that is done, by steps or by time, as of the last `learning_rate_factor`.
    """

    minutes: float | None = None
    warmup_steps: int = 0
    final_lr_fraction: float = 0.0
    progress: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._elapsed = 0.0
        self._last = 0.0

    def on_train_start(self) -> None:
        self._last = time.monotonic()

    def learning_rate_factor(self) -> float:
        """The share of the peak learning rate for this step: warm-up, then cosine decay by steps or by time, whichever
        is further on. Ends the training with the time limit. To be called once a step."""
        now = time.monotonic()
        self._elapsed, self._last = self._elapsed + now - self._last, now
        progress = self.global_step / self.trainer.max_steps if self.trainer.max_steps > 0 else 0.0
        if self.minutes is not None:
            # The clocks of several processes differ; all follow the first, or their weights would drift apart.
            elapsed = (
                self._elapsed
                if self.trainer.world_size == 1
                else self.trainer.strategy.broadcast(self._elapsed)
            )
            progress = max(progress, elapsed / (60 * self.minutes))
            self.trainer.should_stop = progress >= 1
        self.progress = progress
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        factor = self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine
        return factor * min(1, (self.global_step + 1) / max(self.warmup_steps, 1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["elapsed_seconds"] = self._elapsed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._elapsed = checkpoint["elapsed_seconds"]
