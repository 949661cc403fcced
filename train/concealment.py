"""Trains what estimates lost tokens, for a codec that is trained already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand import registry
from compand.checkpoint import find
from compand.codec import QUALITY_STEPS, Codec
from compand.concealment import ERASED, WINDOW, Concealer, nearest_fill
from compand.errors import UsageError
from compand.train.codec_training import CodecTraining, as_samples
from compand.train.export import load_run
from compand.train.optim import MuonAdam

LOST = 0.2
"""Share of the tokens that validation erases."""


def codec_of(start_from: str) -> Codec:
    """A codec as a checkpoint or a run has it, in its trainable state; of a checkpoint, weights are still to come.

    Args:
        start_from: a run (.ckpt), or a checkpoint by name or folder.

    Raises:
        CheckpointError: there is none.
    """
    if start_from.endswith(".ckpt"):
        return load_run(Path(start_from))[0]
    info = find(start_from)
    return registry.by_name(info.codec).load_class().from_architecture(info.architecture, trainable=True)


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


def _qualities(x: Tensor, levels: range) -> Tensor:
    """Of the items of a batch, in 1/32 level, as the levels share them evenly; int64 [items], made on the device."""
    each = torch.arange(levels.start, levels.stop, device=x.device) * QUALITY_STEPS
    return each[:, None].expand(-1, len(x) // len(levels)).flatten()


class ConcealmentTraining(CodecTraining):
    """Trains a concealer to give lost tokens, and latents that make up for them; the codec stays as it is.

    Cross-entropy of lost tokens given those that arrived (Chang et al. 2022, "MaskGIT", equation 1), every level on its
    share of the batch. With a `distance`, of codecs with one codebook a level, also that of what the frozen decoder
    makes of the estimated latents (`Concealer.estimate`) from the original picture: which mixture of codes looks best
    is not what a codebook index tells.

    Args:
        start_from: the codec, a checkpoint or a run (.ckpt); a concealer that it has is trained on.
        distance: of pictures, x_hat and x -> terms by name; None: cross-entropy alone. Terms need a weight each.
        weights: of "tokens" (nats a lost token), "mse" (mean squared error of samples in [0, 1]) and the terms of
            `distance`.
        width, depth, heads: of a new `Concealer`.
        most: largest share of tokens that a training item loses.
        lr: peak learning rate of Muon (matrices of the blocks) and Adam (the rest); linear warm-up, then cosine decay.
        final_lr_fraction, warmup_steps, cuda_graph, compile_transform, minutes: as of `CodecTraining`; the concealer
            is compiled with the transform.
        clip: largest gradient norm.

    Raises:
        CheckpointError: there is no such codec.
        UsageError: it has no tokens, or `distance` is given and it has several codebooks; weights of terms that there
            are not, or terms without weights, in the first step.
    """

    def __init__(
        self,
        start_from: str,
        distance: nn.Module | None = None,
        weights: dict[str, float] | None = None,
        width: int = 192,
        depth: int = 5,
        heads: int = 6,
        most: float = 0.6,
        lr: float = 1e-3,
        final_lr_fraction: float = 0.01,
        warmup_steps: int = 500,
        clip: float = 1.0,
        cuda_graph: bool = True,
        compile_transform: bool = False,
        minutes: float | None = None,
    ) -> None:
        codec = codec_of(start_from)
        super().__init__(codec, lr, final_lr_fraction, warmup_steps, cuda_graph, compile_transform, minutes)
        self.take_over(start_from)
        if self.codec.concealer is None:
            self.codec.add_concealer(width=width, depth=depth, heads=heads)
        self.most, self.clip = most, clip
        self.weights = {"tokens": 1.0, **(weights or {})}
        self.codec.requires_grad_(False)
        self.concealer.requires_grad_(True)
        self.distance = distance
        if distance is not None:
            distance.requires_grad_(False)
            for level in range(1, codec.levels + 1):
                self.register_buffer(f"_codes_{level}", codec.code_values(level), persistent=False)
        self._body: Callable[[Tensor], Tensor] = self.concealer.body
        self._names: list[str] = []
        self.train()

    @property
    def concealer(self) -> Concealer:
        """What is trained."""
        return cast(Concealer, self.codec.concealer)

    def train(self, mode: bool = True) -> ConcealmentTraining:
        """As of any module; the codec and the distance stay in evaluation."""
        super().train(mode)
        self.codec.eval()
        self.concealer.train(mode)
        if self.distance is not None:
            self.distance.eval()
        return self

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.compile_transform:
            self._body = torch.compile(self.concealer.body, dynamic=False)

    @property
    def description(self) -> str:
        """What the concealer was held to, in words."""
        text = "codec as it was; concealer: cross-entropy of lost tokens"
        if self.distance is None:
            return text
        told = getattr(self.distance, "description", type(self.distance).__name__)
        return f"{text}, and of pictures from estimated latents squared error and distance ({told})"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["objective"] = self.description

    def windowed(self, batch: Tensor) -> Tensor:
        """Samples as data modules yield them -> samples as large as one window of the concealer."""
        stride = self.codec.transform.stride
        rows, columns = WINDOW[self.concealer.axes]
        height = min(batch.shape[2] // stride, rows) * stride if self.concealer.axes == 2 else 1
        return as_samples(batch[:, :, :height, : min(batch.shape[3] // stride, columns) * stride])

    @torch.no_grad()
    def tokens_of(self, x: Tensor, levels: range) -> list[Tensor]:
        """Tokens of samples: int64 [items, planes, h, w] for each of the levels, among which the items are shared
        evenly, in this order."""
        # What is compiled is so for the shape of batches, not for that of every picture.
        analysis = self._analysis if self.training else self.codec.transform.analysis
        y = analysis(x, _qualities(x, levels)).float()
        found = []
        for level, part in zip(levels, y.chunk(len(levels)), strict=True):
            # As one high item: quantisers go through a batch item by item.
            high = part.transpose(0, 1).flatten(1, 2)[None]
            tokens = self.codec.bottleneck.quantise(high, level * QUALITY_STEPS)[0].long()
            found.append(tokens.unflatten(1, (len(part), part.shape[2])).transpose(0, 1))
        return found

    def terms(self, batch: Tensor) -> dict[str, Tensor]:
        """What a step minimises, by name: "tokens", nats a lost token; and with a distance "mse" and its terms.

        Args:
            batch: samples as data modules yield them; best a multiple of the levels. Of fewer items than levels, each
                serves several; others beyond a multiple are left out.
        """
        levels = range(1, self.codec.levels + 1)
        each = max(len(batch) // len(levels), 1)
        x = self.windowed(batch)[torch.arange(each * len(levels), device=batch.device) % len(batch)]
        tokens = self.tokens_of(x, levels)
        seen = [draw_erasures(part, self.most) for part in tokens]
        embedded = torch.cat([self.concealer.embed(part, level) for level, part in enumerate(seen, 1)])
        features = self._body(embedded).chunk(len(levels))
        total, count = x.new_zeros(()), sum(((part < 0).sum() for part in seen), x.new_zeros(()))
        latents = []
        for level, part, given, read in zip(levels, tokens, seen, features, strict=True):
            for plane in range(part.shape[1]):
                logits = self.concealer.logits(read, level, plane).float()
                # What is not lost is left out as an index that the loss ignores.
                wanted = part[:, plane].masked_fill(given[:, plane] >= 0, -1)
                total = total + F.cross_entropy(
                    logits.flatten(0, 2), wanted.flatten(), ignore_index=-1, reduction="sum"
                )
            if self.distance is not None:
                codes = getattr(self, f"_codes_{level}")
                with torch.autocast(x.device.type, enabled=False):
                    mean = logits.softmax(-1) @ codes
                known = F.embedding(part[:, 0], codes)
                latents.append(torch.where((given < 0)[:, 0, ..., None], mean, known))
        found = {"tokens": total / count.clamp(min=1)}
        if self.distance is not None:
            y_hat = torch.cat(latents).permute(0, 3, 1, 2)
            x_hat = self._synthesis(y_hat, _qualities(x, levels)).float()
            found["mse"] = (x_hat - x).square().mean()
            found |= self.distance(x_hat, x)
        return found

    def backward_of(self, batch: Tensor) -> Tensor:
        """Leaves the gradients of a step; returns what `self._names` names, for the log."""
        terms = self.terms(batch)
        for name in terms.keys() ^ self.weights.keys():
            raise UsageError(
                f"model.weights and the terms of the loss differ in {name}: weigh {', '.join(sorted(terms))}"
            )
        loss = sum(
            (self.weights[name] * term for name, term in terms.items()),
            batch.new_zeros((), dtype=torch.float32),
        )
        self.leave_gradients(loss)
        self._names = list(terms)
        return torch.stack([term.detach().float() for term in terms.values()])

    def training_step(self, batch: Tensor, batch_index: int) -> None:
        optimizer: Any = self.optimizers()
        self._set_learning_rate(optimizer)
        shown = self.run_step(self.backward_of, batch, [optimizer])
        self.average_gradients()
        optimizer.step()
        # Reading a value waits for the device, so it is done only as often as the log asks for it.
        if (batch_index + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = dict(zip(self._names, shown.tolist(), strict=True))
            if not all(math.isfinite(value) for value in values.values()):
                raise FloatingPointError(
                    f"a loss is not finite at step {self.global_step} ({values}); lower --model.lr"
                )
            self.log_dict(values, prog_bar=True, on_step=True, on_epoch=False)

    def validation_step(self, item: Tensor, batch_index: int, dataloader_idx: int = 0) -> None:
        """At every level, with the same LOST share erased, what the nearest tokens and what the concealer make of it:
        the share of lost tokens that `fill` gets right and, with a distance, what estimates cost: in dB of PSNR, and
        in terms of the distance. Of a second set, items that are trained on, they are named "seen" in place of
        "val"."""
        kind = "seen" if dataloader_idx else "val"
        x = self.windowed(item)
        for level in range(1, self.codec.levels + 1):
            (tokens,) = self.tokens_of(x, range(level, level + 1))
            generator = torch.Generator().manual_seed(batch_index)
            lost = (torch.rand(tokens.shape[2:], generator=generator) < LOST).to(tokens.device)
            if not lost.any() or lost.all():
                return
            seen = tokens.masked_fill(lost, ERASED)
            fills = {"filled": self.concealer.fill(seen, level), "nearest": nearest_fill(seen)}
            for name, fill in fills.items():
                self._show(f"{kind}/{name}", level, {"right": (fill == tokens)[..., lost].float().mean()})
            if self.distance is None:
                continue
            quality = level * QUALITY_STEPS
            intact = self._distances(self.codec.bottleneck.dequantise(tokens, quality), x, level)
            estimated = self.concealer.estimate(seen, level, getattr(self, f"_codes_{level}"))
            nearest = self.codec.bottleneck.dequantise(fills["nearest"], quality)
            for name, y_hat in (("estimated", estimated), ("nearest", nearest)):
                costs = {
                    term: value - intact[term] for term, value in self._distances(y_hat, x, level).items()
                }
                self._show(f"{kind}/{name}", level, costs)

    def _distances(self, y_hat: Tensor, x: Tensor, level: int) -> dict[str, Tensor]:
        """PSNR, with its sign turned, and the terms of the distance of a picture from its latents."""
        quality = _qualities(x, range(level, level + 1))
        x_hat = self.codec.transform.synthesis(y_hat, quality).float().clamp(0, 1)
        distance = cast(nn.Module, self.distance)
        return {"psnr": 10 * torch.log10((x_hat - x).square().mean().clamp(min=1e-12)), **distance(x_hat, x)}

    def _show(self, fill: str, level: int, values: Mapping[str, Tensor]) -> None:
        """Logs values of one level, and their mean over levels."""
        for name, value in values.items():
            self.log(f"{fill}_{name}_{level}", value, batch_size=1, add_dataloader_idx=False)
            self.log(f"{fill}_{name}", value, batch_size=1, prog_bar=True, add_dataloader_idx=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        matrices = list(self.concealer.blocks.parameters())
        own = set(matrices)
        others = [p for p in self.concealer.parameters() if p not in own]
        groups = [
            {"params": matrices, "peak_lr": self.lr},
            {"params": others, "peak_lr": self.lr, "adam_only": True},
        ]
        return MuonAdam(groups, lr=self.lr, cuda_graph=self._graphs(), clip=self.clip)
