"""What all training of codecs shares: schedule, captured steps, and the checkpoint that `compand export` reads."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F

from compand.audio_codec import AudioCodec
from compand.checkpoint import find
from compand.codec import QUALITY_STEPS, Codec, subset
from compand.errors import UsageError
from compand.train import ledger
from compand.train.export import load_run
from compand.train.schedule import TimedModule
from compand.weights import warm_start


def as_samples(batch: Tensor) -> Tensor:
    """What a data module yields as samples of a codec: bytes of pictures become numbers in [0, 1], channels last;
    floating-point samples are taken as they are."""
    if batch.is_floating_point():
        return batch
    return (batch.float() / 255).contiguous(memory_format=torch.channels_last)


def rate_unit(codec: Codec) -> tuple[str, float]:
    """The unit in which rates of a medium are shown, and how many of it are one bit per pixel or time step."""
    if not isinstance(codec, AudioCodec):
        return "bpp", 1.0
    return ("bits", 1.0) if codec.rate is None else ("kbps", codec.rate / 1000)


class CodecTraining(TimedModule):
    """Trains a codec by steps of manual optimisation; the last weights are kept as `final.ckpt`.

    On CUDA devices the forward and backward pass are captured as a CUDA graph, since a step at these model sizes is
    bound by kernel launches; batches of another shape, or steps of another kind, are captured anew.

    Of several processes (`--trainer.strategy ddp`), each captures the pass over its own batch. What is captured ends
    with the gradients of that batch; their mean over all processes is taken behind it, in one piece, and the update,
    which clips and is captured as well, sees the mean alone (`leave_gradients`, `average_gradients`). The reducer of
    DistributedDataParallel, whose exchange within the backward pass no graph could hold, stays idle; the wrapper makes
    weights alike at the start. Nothing else is exchanged between processes but the clock (`TimedModule`).

    Args:
        codec: the codec to train, in its trainable state.
        lr: peak learning rate.
        final_lr_fraction: what the cosine decay leaves of it.
        warmup_steps: steps of linear warm-up.
        cuda_graph: whether to capture graphs where possible.
        compile_transform: whether to compile the transform with `torch.compile`.
        minutes: time limit; None: the trainer's `max_steps` alone.
    """

    def __init__(
        self,
        codec: Codec,
        lr: float,
        final_lr_fraction: float,
        warmup_steps: int,
        cuda_graph: bool,
        compile_transform: bool,
        minutes: float | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.codec = codec
        self.lr, self.final_lr_fraction, self.warmup_steps = lr, final_lr_fraction, warmup_steps
        self.cuda_graph, self.compile_transform, self.minutes = cuda_graph, compile_transform, minutes
        self._analysis, self._synthesis = codec.transform.analysis, codec.transform.synthesis
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: tuple[Tensor, Tensor] | None = None
        self._kind: Hashable = None
        self._warm = 0
        self._started_from = ""
        self._ledger: list[ledger.Entry] = []

    def take_over(self, start_from: str, *, prior: bool = True) -> None:
        """Gives the codec the weights of an earlier training as far as names and shapes agree; its ledger goes on.

        Args:
            start_from: checkpoint, by name or folder, or a run (.ckpt), which has all that training knows (densities of
                z, the use of codes).
            prior: False leaves the integer prior of a checkpoint out, see `compand.weights.warm_start`.

        Raises:
            CheckpointError: it cannot be read or nothing fits.
            UsageError: a run whose weights do not fit.
        """
        if not start_from.endswith(".ckpt"):
            info = find(start_from)
            warm_start(self.codec, info, prior=prior)
            self._started_from, self._ledger = info.name, ledger.read(info.path / "CARD.md")
            return
        run, facts = load_run(Path(start_from))
        own, given = self.codec.state_dict(), run.state_dict()
        shared = {
            name: value for name, value in given.items() if name in own and own[name].shape == value.shape
        }
        if not shared:
            raise UsageError(
                f"{start_from} has no weights in common with this {self.codec.name}: check its architecture"
            )
        self.codec.load_state_dict(shared, strict=False)
        self.codec.transform.settle_new_parts(subset(shared, "transform."))
        self._started_from = "a run"
        self._ledger = ledger.extended(facts, "a run that was not exported")

    @property
    def several(self) -> bool:
        """Whether several processes train together."""
        return self._trainer is not None and self.trainer.world_size > 1

    def leave_gradients(self, loss: Tensor) -> None:
        """The backward pass, whose gradients stay those of this process."""
        if not self.several:
            self.manual_backward(loss)
            return
        with self.trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
            self.manual_backward(loss)

    def average_gradients(self) -> None:
        """Makes the gradients, which lie where they lay, their means over all processes. Nothing happens in one."""
        if not self.several:
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.trainer.world_size
        means = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])

    def run_step(
        self,
        backward: Callable[[Tensor], Tensor],
        batch: Tensor,
        optimizers: Sequence[Any],
        kind: Hashable = None,
    ) -> Tensor:
        """Calls `backward`, which leaves gradients and returns numbers for the log; captured where possible.

        Args:
            backward: of static shapes, without a value that the host reads.
            batch: its argument.
            optimizers: whose gradients are cleared before a step that is not captured, and whose updates are captured
                anew together with steps.
            kind: steps of another kind than the last one are captured anew, as are those of batches of another shape.
        """
        if not (batch.is_cuda and self._graphs()):
            for optimizer in optimizers:
                optimizer.zero_grad()
            return backward(batch)
        if (kind, batch.shape) != self._kind:
            self._graph, self._static, self._warm, self._kind = None, None, 0, (kind, batch.shape)
            for optimizer in optimizers:
                optimizer.optimizer.recapture()
        if self._graph is not None and self._static is not None:
            self._static[0].copy_(batch)
            self._graph.replay()
            return self._static[1]
        self._warm += 1
        for p in self.parameters():
            p.grad = None
        if self._warm <= 3:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                shown = backward(batch)
            torch.cuda.current_stream().wait_stream(side)
            return shown
        static = batch.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Threads that watch the exchange between processes may go on while this one captures.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            shown = backward(static)
        self._static = (static, shown)
        self._graph.replay()
        return shown

    def _graphs(self) -> bool:
        """Whether steps are captured, where they run on CUDA devices."""
        return self.cuda_graph

    def at_level(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """One picture or excerpt of a sound of any size, coded at a quality level.

        Args:
            x: samples [1, channels, h, w].
            level: 1 to the codec's `levels`.

        Returns:
            The reconstruction, of the same shape, within the range of samples; estimated bits per pixel or time step.
        """
        height, width = x.shape[2:]
        stride, sound = self.codec.transform.stride, self.codec.medium == "audio"
        padded = F.pad(x, (0, -width % stride, 0, 0 if sound else -height % stride), mode="replicate")
        quality = torch.full((1,), level * QUALITY_STEPS, device=x.device)
        output = self.codec.bottleneck(self.codec.transform.analysis(padded, quality), quality)
        x_hat = self.codec.transform.synthesis(output.y_hat, quality)[..., :height, :width].float()
        return x_hat.clamp(-1 if sound else 0, 1), output.bits.sum() / (height * width)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.compile_transform:
            transform = self.codec.transform
            # For every shape of its own: there are few, and kernels for all of them at once are slower.
            self._analysis, self._synthesis = (
                torch.compile(transform.analysis, dynamic=False),
                torch.compile(transform.synthesis, dynamic=False),
            )

    def _set_learning_rate(self, *optimizers: Any) -> None:
        factor = self.learning_rate_factor()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]

    def on_train_end(self) -> None:
        """Keeps the end of the run as well: the last weights come after the last periodic checkpoint."""
        callback = self.trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            final = f"{callback.dirpath}/final.ckpt"
            self.trainer.save_checkpoint(final)
            if self.trainer.is_global_zero:
                print(f"trained: {final}; next: compand export {final} --data FOLDER")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["codec"] = {"name": self.codec.name, "architecture": self.codec.architecture}
        checkpoint["started_from"] = self._started_from
        checkpoint["ledger"] = [list(entry) for entry in self._ledger]
