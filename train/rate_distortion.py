"""The LightningModule that trains any codec for rate and distortion at all of its qualities at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compand.codec import QUALITY_STEPS, Codec, level_table_at
from compand.errors import UsageError
from compand.train.codec_training import CodecTraining, as_samples, rate_unit
from compand.train.optim import MuonAdam


class RateDistortion(CodecTraining):
    """Minimises the mean over sampled qualities q of w(q) (R + lambda(q) 255^2 D).

    R is in bits per pixel (of a sound, per time step), D the mean squared error of samples in [0, 1] (of a sound, in
    [-1, 1]). Every item of a batch gets its own quality, drawn uniformly from the codec's continuous range, with its
    Lagrange multiplier interpolated geometrically between the codec's `lambdas`; w(q) = lambda(q)^-1/2, scaled to 1 at
    the middle, keeps the high rates from drowning the low ones (a relative saving counts about the same at every rate).
    Qualities of a batch may be stratified: an item each from as many equal parts of the range, all at one random place
    in their part (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1). Every item then still is uniform,
    but no batch has high or low rates alone, whose losses differ by far more than those of pictures.
    The auxiliary loss of the factorised density's quantiles is added; its gradient reaches the quantiles alone.

    Args:
        codec: the codec to train, in its trainable state.
        lr: peak learning rate; linear warm-up, then cosine decay at the trainer's `max_steps`.
        final_lr_fraction: what the decay leaves of it.
        warmup_steps: steps of warm-up.
        clip: largest gradient norm.
        cuda_graph: whether to capture graphs where possible.
        compile_transform: whether to compile the transform with `torch.compile`.
        minutes: time limit; the learning rate then decays by steps or by time, whichever is further on, and training
            ends with the schedule.
        start_from: checkpoint (name or folder) or run (.ckpt) whose weights the codec takes over where they fit.
        start_prior: False takes the rest alone, for a prior of other widths than the checkpoint's.
        train_transform: False keeps the transform and the gains as they are and trains the rest of the bottleneck.
        train_encoder: False trains the synthesis alone: whatever decides the symbols stays as `start_from` has it, so
            that the export decodes the same files (`compand export --symbols-of`).
        stratified: whether the qualities of a batch are spread over the range.

    Raises:
        UsageError: nothing is left to train.
    """

    def __init__(
        self,
        codec: Codec,
        lr: float = 2e-3,
        final_lr_fraction: float = 0.01,
        warmup_steps: int = 200,
        clip: float = 1.0,
        cuda_graph: bool = True,
        compile_transform: bool = False,
        minutes: float | None = None,
        start_from: str | None = None,
        start_prior: bool = True,
        train_transform: bool = True,
        train_encoder: bool = True,
        stratified: bool = False,
    ) -> None:
        super().__init__(codec, lr, final_lr_fraction, warmup_steps, cuda_graph, compile_transform, minutes)
        self.clip, self.stratified = clip, stratified
        if start_from is not None:
            self.take_over(start_from, prior=start_prior)
        if not train_transform:
            codec.transform.requires_grad_(False)
            codec.bottleneck.y_gain.requires_grad_(False)
        if not train_encoder:
            if not train_transform or start_from is None:
                raise UsageError(
                    "train_encoder: false leaves nothing to train: give start_from, and not train_transform: false"
                )
            for name, parameter in codec.named_parameters():
                parameter.requires_grad_(name.startswith("transform.synthesis"))
        self.log2_lambdas: Tensor
        self.register_buffer("log2_lambdas", torch.tensor(codec.lambdas).log2()[:, None], persistent=False)

    def evaluate(self, x: Tensor, quality: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x: [batch, channels, h, w]. Returns bits per pixel [batch], mean squared error [batch], further losses."""
        y = self._analysis(x, quality)
        output = self.codec.bottleneck(y, quality)
        x_hat = self._synthesis(output.y_hat, quality)
        mse = (x_hat.float() - x).square().mean((1, 2, 3))
        return output.bits / (x.shape[2] * x.shape[3]), mse, output.losses

    def draw_qualities(self, count: int, device: torch.device) -> Tensor:
        """Qualities of the items of a batch, int64 [count], in units of 1 / QUALITY_STEPS."""
        values = (self.codec.levels - 1) * QUALITY_STEPS + 1
        if not self.stratified:
            return QUALITY_STEPS + torch.randint(0, values, (count,), device=device)
        places = (torch.arange(count, device=device) + torch.rand((), device=device)) / count
        # Rounding may lift the last place to 1.
        return QUALITY_STEPS + (values * places).long().clamp(max=values - 1)

    def weight_of(self, quality: Tensor) -> Tensor:
        """w(q) of the items of a batch, [batch]."""
        log2_lambda = level_table_at(self.log2_lambdas, quality)[:, 0]
        return torch.exp2(-0.5 * (log2_lambda - self.log2_lambdas.mean()))

    def loss(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """crops: uint8 or float32 [batch, channels, h, w]. Returns the loss and [loss, bpp, mse] for the log."""
        x = as_samples(crops)
        quality = self.draw_qualities(x.shape[0], x.device)
        log2_lambda = level_table_at(self.log2_lambdas, quality)[:, 0]
        bpp, mse, losses = self.evaluate(x, quality)
        loss = (self.weight_of(quality) * (bpp + torch.exp2(log2_lambda) * 255**2 * mse)).mean()
        shown = torch.stack([loss, bpp.mean(), mse.mean()]).detach()
        return loss + sum(losses.values(), torch.zeros((), device=x.device)), shown

    def _backward(self, crops: Tensor) -> Tensor:
        loss, shown = self.loss(crops)
        self.leave_gradients(loss)
        return shown

    def training_step(self, crops: Tensor, batch_index: int) -> None:
        optimizer: Any = self.optimizers()
        self._set_learning_rate(optimizer)
        shown = self.run_step(self._backward, crops, [optimizer])
        self.average_gradients()
        optimizer.step()
        # Reading a value waits for the device, so it is done only as often as the log asks for it.
        if (batch_index + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            loss, bits, mse = shown.tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at step {self.global_step}; lower --model.lr")
            unit, factor = rate_unit(self.codec)
            values = {"loss": loss, unit: factor * bits, "psnr": -10 * math.log10(mse)}
            self.log_dict(values, prog_bar=True, on_step=True, on_epoch=False)

    def validation_step(self, item: Tensor, batch_index: int, dataloader_idx: int = 0) -> None:
        """Estimated rate and PSNR of one whole picture, or of an excerpt of a sound, at every quality level.

        `val/cost` is the mean over levels of log10(R) - PSNR / 20, R in bits per pixel or time step, which does not
        change along a curve of 6 dB a doubling of R and falls as the curve improves. Of a second set, items that are
        trained on, it is `seen/cost`: where that falls and `val/cost` does not, the codec over-fits.
        """
        kind = "seen" if dataloader_idx else "val"
        x = as_samples(item)
        unit, factor = rate_unit(self.codec)
        cost = 0.0
        for level in range(1, self.codec.levels + 1):
            x_hat, rate = self.at_level(x, level)
            mse = (x_hat - x).square().mean()
            # Silence costs nothing and has no error; the logarithms stay finite.
            bits = rate.clamp(min=1e-6)
            psnr = -10 * torch.log10(mse.clamp(min=1e-12))
            cost += (torch.log10(bits) - psnr / 20).item() / self.codec.levels
            if kind == "val":
                values = {f"val/{unit}_{level}": factor * bits, f"val/psnr_{level}": psnr}
                self.log_dict(values, batch_size=1, sync_dist=self.several, add_dataloader_idx=False)
        self.log(
            f"{kind}/cost",
            cost,
            batch_size=1,
            prog_bar=True,
            sync_dist=self.several,
            add_dataloader_idx=False,
        )

    def configure_optimizers(self) -> Any:
        quantiles = [p for name, p in self.named_parameters() if name.endswith("quantiles")]
        others = [p for name, p in self.named_parameters() if not name.endswith("quantiles")]
        groups = [
            {"params": others, "peak_lr": self.lr},
            {"params": quantiles, "peak_lr": 10 * self.lr, "adam_only": True},
        ]
        return MuonAdam(
            [g for g in groups if g["params"]], lr=self.lr, cuda_graph=self._graphs(), clip=self.clip
        )
