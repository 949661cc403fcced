"""How far a training is, by steps or by the clock, and the learning rate that follows from it."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl

CLOCK_STEPS = 20
"""Steps for which several processes keep to one reading of the clock."""


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
        self._gpu_seconds = 0.0
        self._shared: float | None = None

    def on_train_start(self) -> None:
        self._last = time.monotonic()

    def learning_rate_factor(self) -> float:
        """The share of the peak learning rate for this step: warm-up, then cosine decay by steps or by time, whichever
        is further on. Ends the training with the time limit. To be called once a step."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        self._elapsed += passed
        if self.on_gpu:
            self._gpu_seconds += passed * self.trainer.world_size
        progress = self.global_step / self.trainer.max_steps if self.trainer.max_steps > 0 else 0.0
        if self.minutes is not None:
            progress = max(progress, self._common_elapsed() / (60 * self.minutes))
            self.trainer.should_stop = progress >= 1
        self.progress = progress
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        factor = self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine
        return factor * min(1, (self.global_step + 1) / max(self.warmup_steps, 1))

    @property
    def on_gpu(self) -> bool:
        """Whether this module trains on GPUs."""
        return self.device.type == "cuda"

    def _common_elapsed(self) -> float:
        """Seconds of training by the clock that all processes follow, or their weights would drift apart: the first
        one's. Asking for it waits for the device, so that it is asked for now and then."""
        if self.trainer.world_size == 1:
            return self._elapsed
        if self._shared is None or self.global_step % CLOCK_STEPS == 0:
            self._shared = float(self.trainer.strategy.broadcast(self._elapsed))
        return self._shared

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["elapsed_seconds"] = self._elapsed
        checkpoint["gpu_seconds"] = self._gpu_seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._elapsed = checkpoint["elapsed_seconds"]
        self._gpu_seconds = checkpoint.get("gpu_seconds", 0.0)
