"""What training takes for the reference model of any perception task: the schedule and the finished folder."""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compand.eval import subjects
from compand.eval.perception.models import TaskNetwork, load_model, save_model
from compand.eval.perception.task import find
from compand.train.schedule import TimedModule
from compand.weights import check_new


class DescentTraining(TimedModule):
    """SGD with Nesterov momentum: linear warm-up, then cosine decay to zero at the trainer's `max_steps`.

    Args:
        lr: peak learning rate.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty on kernels; biases and norms have none.
        warmup_steps: steps of warm-up.
        minutes: time limit; the learning rate then decays by steps or by time, whichever is further on, and training
            ends with the schedule.
    """

    def __init__(
        self, lr: float, momentum: float, weight_decay: float, warmup_steps: int, minutes: float | None
    ) -> None:
        super().__init__()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.warmup_steps, self.minutes = warmup_steps, minutes

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar loss of a batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        loss = self.loss(*batch)
        # Reading a value waits for the device, so it is done only as often as the log asks for it.
        if (batch_index + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"loss is {value} at step {self.global_step}; lower --model.lr")
            self.log("loss", value, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kernels = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [
            {"params": kernels, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        factor = self.learning_rate_factor()
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = factor * self.lr


class TaskTraining(DescentTraining):
    """Trains a task network with SGD and writes it, with averaged weights if the run keeps them, as a reference model.

    A subclass says what the loss of a batch is. The data module has the attributes `root` (the folder that the task
    takes), `codec` and `quality` (None for undamaged items). It may have `scored`: the items to score the finished
    model on in place of the task's, and a text that says which they are; None if there are none.

    Args:
        network: the network to train.
        task: name of the task it solves.
        output: new folder NAME-vN of the reference model.
        lr: peak learning rate; linear warm-up, then cosine decay to zero at the trainer's `max_steps`.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty on kernels; biases and norms have none.
        warmup_steps: steps of warm-up.
        minutes: time limit; the learning rate then decays by steps or by time, whichever is further on, and training
            ends with the schedule.
    """

    def __init__(
        self,
        network: TaskNetwork,
        task: str,
        output: str,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_steps: int = 200,
        minutes: float | None = None,
    ) -> None:
        super().__init__(lr, momentum, weight_decay, warmup_steps, minutes)
        self.network = network
        self.task, self.output = task, Path(output)

    def on_fit_start(self) -> None:
        check_new(self.output)

    def on_train_end(self) -> None:
        """Writes the reference model and its card, with the score of what was written."""
        if not self.trainer.is_global_zero:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        task = find(self.task)(Path(data.root))
        trained_on = None
        if data.codec is not None:
            # By its full name: "hyperprior" may be another version when the model is evaluated.
            codec = subjects.find(data.codec, task.medium).name
            trained_on = {"codec": codec, "quality": data.quality}
        save_model(self.network, self.output, task=self.task, labels=task.labels, trained_on=trained_on)
        # Measured as it was stored, in the way in which `compand eval perception` measures its baseline.
        model = load_model(self.output, str(self.device))
        items, which = getattr(data, "scored", None) or (task.items(), "undamaged test items")
        outcomes = [task.outcome(model, task.load(item), item) for item in items]
        score = float(task.score(np.sum(outcomes, axis=0)))
        self._write_card(f"{task.score_name} on the {len(outcomes)} {which}: {score:.4f}", trained_on)
        print(f"trained: {self.output}; {task.score_name} {score:.4f} on {len(outcomes)} {which}")

    def _write_card(self, scored: str, trained_on: dict[str, Any] | None) -> None:
        items = "undamaged items"
        if trained_on is not None:
            items = f"items decoded from {trained_on['codec']} at quality {trained_on['quality']:g}"
        (self.output / "CARD.md").write_text(
            f"# {self.output.name}\n\n"
            f"- task: {self.task}\n"
            f"- training: {self.global_step} steps, {self._elapsed / 60:.1f} minutes, on {items}\n"
            f"- {scored}\n"
            "- data:\n- hardware:\n- command:\n- licence:\n",
            encoding="utf-8",
        )
