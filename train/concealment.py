"""Trains what estimates lost tokens, for a codec that is trained already."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from compand import registry
from compand.checkpoint import find
from compand.codec import QUALITY_STEPS, Codec
from compand.concealment import ERASED, WINDOW, Concealer, nearest_fill
from compand.train.codec_training import CodecTraining, as_samples
from compand.train.export import load_run
from compand.weights import warm_start

LOST = 0.2
"""Share of the tokens that validation erases."""


def codec_of(start_from: str) -> Codec:
    """A trained codec in its trainable state.

    Args:
        start_from: a run (.ckpt), or a checkpoint by name or folder.

    Raises:
        CheckpointError: there is none.
    """
    if start_from.endswith(".ckpt"):
        return load_run(Path(start_from))[0]
    info = find(start_from)
    codec = registry.by_name(info.codec).load_class().from_architecture(info.architecture, trainable=True)
    warm_start(codec, info)
    return codec


def draw_erasures(tokens: Tensor, most: float = 0.6) -> Tensor:
    """Tokens with losses as training shows them.

    Every item loses a share drawn from U(0, `most`): one half of the items single positions, the other half packets of
    neighbouring rows (of frames, where there is one row), of a size of their own. Of a lost position, the first
    codebooks may be there already, as they are while a `Concealer` fills one codebook after the other.

    Args:
        tokens: int64 [batch, planes, h, w].
        most: largest share.

    Returns:
        Tokens of the same shape, -1 where they are lost.
    """
    batch, planes, height, width = tokens.shape
    device = tokens.device
    share = most * torch.rand(batch, 1, device=device)
    single = torch.rand(batch, height * width, device=device) < share
    lines = height if height > 1 else width
    packets = 2 + (torch.rand(batch, 1, device=device) * (lines - 1)).long()
    number = torch.arange(lines, device=device) * packets // lines
    dropped = (torch.rand(batch, lines, device=device) < share).gather(1, number)
    rows = dropped[:, :, None].expand(-1, -1, width) if height > 1 else dropped[:, None]
    by_packets = torch.rand(batch, 1, 1, device=device) < 0.5
    lost = torch.where(by_packets, rows, single.view(batch, height, width))
    kept = torch.randint(planes, (batch, height, width), device=device)
    lost = lost[:, None] & (torch.arange(planes, device=device)[:, None, None] >= kept[:, None])
    return tokens.masked_fill(lost, ERASED)


class ConcealmentTraining(CodecTraining):
    """Cross-entropy of lost tokens given those that arrived (Chang et al. 2022, "MaskGIT", equation 1), at a random
    quality level each step; the codec stays as it is.

    Args:
        start_from: the codec, a checkpoint or a run (.ckpt); a concealer that it has is trained on.
        width, depth, heads: of a new `Concealer`.
        most: largest share of tokens that a training item loses.
        lr: peak learning rate of AdamW; linear warm-up, then cosine decay.
        weight_decay: of its matrices.
        final_lr_fraction, warmup_steps, compile_transform, minutes: as of `CodecTraining`.
        clip: largest gradient norm.

    Raises:
        CheckpointError: there is no such codec.
        UsageError: it has no tokens.
    """

    def __init__(
        self,
        start_from: str,
        width: int = 192,
        depth: int = 5,
        heads: int = 6,
        most: float = 0.6,
        lr: float = 1e-3,
        weight_decay: float = 0.02,
        final_lr_fraction: float = 0.01,
        warmup_steps: int = 500,
        clip: float = 1.0,
        compile_transform: bool = False,
        minutes: float | None = None,
    ) -> None:
        # Steps of different levels use different tables: there is no single graph to capture.
        super().__init__(
            codec_of(start_from), lr, final_lr_fraction, warmup_steps, False, compile_transform, minutes
        )
        if self.codec.concealer is None:
            self.codec.add_concealer(width=width, depth=depth, heads=heads)
        self.most, self.clip, self.weight_decay = most, clip, weight_decay
        self.codec.requires_grad_(False)
        self.concealer.requires_grad_(True)

    @property
    def concealer(self) -> Concealer:
        """What is trained."""
        return cast(Concealer, self.codec.concealer)

    def train(self, mode: bool = True) -> ConcealmentTraining:
        """As of any module; the codec stays in evaluation."""
        super().train(mode)
        self.codec.eval()
        self.concealer.train(mode)
        return self

    @torch.no_grad()
    def tokens_of(self, batch: Tensor, level: int) -> Tensor:
        """Samples as data modules yield them -> int64 [batch, planes, h, w] of a level, as large as one window."""
        stride = self.codec.transform.stride
        rows, columns = WINDOW[self.concealer.axes]
        height = min(batch.shape[2] // stride, rows) * stride if self.concealer.axes == 2 else 1
        x = as_samples(batch[:, :, :height, : min(batch.shape[3] // stride, columns) * stride])
        quality = torch.full((len(x),), level * QUALITY_STEPS, device=x.device)
        y = self._analysis(x, quality)
        return self.codec.bottleneck.quantise(y.float(), level * QUALITY_STEPS).long()

    def loss(self, batch: Tensor, level: int) -> Tensor:
        """Nats a lost token."""
        tokens = self.tokens_of(batch, level)
        seen = draw_erasures(tokens, self.most)
        total, count = batch.new_zeros((), dtype=torch.float32), (seen < 0).sum().clamp(min=1)
        for plane, logits in enumerate(self.concealer(seen, level)):
            # What is not lost is left out as an index that the loss ignores.
            wanted = tokens[:, plane].masked_fill(seen[:, plane] >= 0, -1)
            total = total + F.cross_entropy(
                logits.float().flatten(0, 2), wanted.flatten(), ignore_index=-1, reduction="sum"
            )
        return total / count

    def training_step(self, batch: Tensor, batch_index: int) -> None:
        optimizer: Any = self.optimizers()
        self._set_learning_rate(optimizer)
        level = int(torch.randint(1, self.codec.levels + 1, ()))
        loss = self.loss(batch, level)
        optimizer.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.concealer.parameters(), self.clip)
        optimizer.step()
        # Reading a value waits for the device, so it is done only as often as the log asks for it.
        if (batch_index + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"loss is {value} at step {self.global_step}; lower --model.lr")
            self.log("loss", value, prog_bar=True)

    def validation_step(self, item: Tensor, batch_index: int) -> None:
        """Share of lost tokens that are filled in exactly, at every level: by the concealer, and by the nearest ones;
        the same LOST share is erased each time."""
        mean = 0.0
        for level in range(1, self.codec.levels + 1):
            tokens = self.tokens_of(item, level)
            generator = torch.Generator().manual_seed(batch_index)
            lost = (torch.rand(tokens.shape[2:], generator=generator) < LOST).to(tokens.device)
            if not lost.any() or lost.all():
                return
            seen = tokens.masked_fill(lost, ERASED)
            fills = {"filled": self.concealer.fill(seen, level), "nearest": nearest_fill(seen)}
            values = {name: (fill == tokens)[..., lost].float().mean().item() for name, fill in fills.items()}
            mean += values["filled"] / self.codec.levels
            self.log_dict({f"val/{name}_{level}": value for name, value in values.items()}, batch_size=1)
        self.log("val/filled", mean, batch_size=1, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        matrices = [p for p in self.concealer.parameters() if p.ndim > 1]
        others = [p for p in self.concealer.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "peak_lr": self.lr, "weight_decay": self.weight_decay},
            {"params": others, "peak_lr": self.lr, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
