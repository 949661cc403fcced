"""The LightningModule that trains codecs of codebooks: distances, discriminators, and losses that are balanced.

For pictures and sounds alike: what is particular to a medium is in the distance and in the discriminators.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand.bottlenecks.codebook import CodebookBottleneck
from compand.bottlenecks.codebooks import Quantiser
from compand.codec import QUALITY_STEPS, Codec
from compand.errors import UsageError
from compand.train.codec_training import CodecTraining, as_samples, rate_unit
from compand.train.optim import MuonAdam

ADVERSARIAL, FEATURES, DISCRIMINATOR = "adversarial", "features", "discriminator"
"""Names of the terms that discriminators add, and of their own loss."""

BOTTLENECK_LOSSES = ("commitment", "codebook", "prior")


class Discriminator(nn.Module, ABC):
    """Tells samples from reconstructions."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Judges each item of a batch on its own.

        Args:
            x: [batch, channels, h, w], pictures in [0, 1], sounds in [-1, 1] with h = 1.

        Returns:
            Logits of one or several judges, above zero where x looks real, and features for feature matching; the
            first axis of each is the batch.
        """


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Hinge loss of discriminators (Lim & Ye 2017), mean over judges: max(0, 1 - D(x)) + max(0, 1 + D(x_hat))."""
    parts = [F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, fake, strict=True)]
    return torch.stack(parts).mean()


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """max(0, 1 - D(x_hat)), mean over judges (Defossez et al. 2022, "High fidelity neural audio compression",
    section 3.4)."""
    return torch.stack([F.relu(1 - logits).mean() for logits in fake]).mean()


def feature_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean over features of |f(x) - f(x_hat)| / mean |f(x)| (Defossez et al. 2022, equation 2)."""
    parts = [
        (b - a.detach()).abs().mean() / a.detach().abs().mean().clamp(min=1e-4)
        for a, b in zip(real, fake, strict=True)
    ]
    return torch.stack(parts).mean()


class Balancer(nn.Module):
    """Turns several losses of one output into the gradient of that output, each with its share whatever its scale.

    With g_i the gradient of loss i, <|g_i|> the running mean of its norm of an item, and w_i the weights, the result is
    R sum_i (w_i / sum_j w_j) g_i / <|g_i|> (Defossez et al. 2022, section 3.4, "Balancer"). R is `total` times the norm
    of the gradient of a mean absolute error, so that what is not balanced (commitment) is weighed against one such.

    Args:
        weights: weight of each loss by name; names beside those of the losses do not matter.
        total: norm of the gradient, in units of a mean absolute error's.
        decay: of the running means.
    """

    def __init__(self, weights: Mapping[str, float], total: float = 1.0, decay: float = 0.999) -> None:
        super().__init__()
        self.weights, self.total, self.decay = dict(weights), total, decay
        self.places = {name: i for i, name in enumerate(self.weights)}
        self.sums: Tensor
        self.counts: Tensor
        self.register_buffer("sums", torch.zeros(len(self.places)))
        self.register_buffer("counts", torch.zeros(len(self.places)))

    def forward(self, losses: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """The gradient of `output` [batch, ...], which all losses, means over the batch, were computed from. Graphs are
        kept, for what else the losses depend on."""
        share = sum(self.weights[name] for name in losses)
        result = torch.zeros_like(output)
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            place = self.places[name]
            if self.training:
                norm = gradient.detach().flatten(1).norm(dim=1).mean().float()
                self.sums[place].mul_(self.decay).add_(norm)
                self.counts[place].mul_(self.decay).add_(1)
            mean = self.sums[place] / self.counts[place]
            result = result + (self.weights[name] / share / mean.clamp(min=1e-12)) * gradient
        return result * (self.total / (len(output) * math.sqrt(output[0].numel())))


class AdversarialTraining(CodecTraining):
    """Trains a codec of codebooks by distances, adversaries and the losses of its bottleneck, at all levels at once.

    Every item of a batch gets a level of its own, drawn uniformly from `levels` (quantiser dropout, Zeghidour et al.
    2021, "SoundStream", section III-C). The terms of the distance and of the discriminators meet in the gradient of the
    reconstruction: balanced, or weighted and summed. The bottleneck's losses are added as they are, by their weights;
    the prior learns beside the codec, from indices that its gradient does not reach.

    Phases: for `unquantised_steps` the transform learns alone; then the codebooks are initialised on a batch of its
    latents and quantisation starts; from `adversarial_start` on the discriminators take part, and learn.

    Weights are averaged by Lightning's callback EMAWeightAveraging. Across processes use the strategy
    ddp_find_unused_parameters_true, as not everything takes part in every phase.

    Args:
        codec: a codec whose bottleneck is a `CodebookBottleneck`, in its trainable state.
        distance: called with (x_hat, x), gives terms by name, means over the batch. May have a `description`, which the
            card of the checkpoint takes over.
        discriminators: judges of reconstructions; none: distances alone.
        weights: of every term of the distance, of "adversarial" and "features" where there are discriminators, and of
            losses of the bottleneck ("commitment", "codebook", "prior"; 1 for one that is not named).
        adversarial_start: when the discriminators begin: a step, or as a fraction a share of the training.
        lr: peak learning rate of the transform.
        bottleneck_lr: peak learning rate of what is learned by gradients in the bottleneck, by Adam.
        discriminator_lr: peak learning rate of the discriminators, by Adam with betas (0.5, 0.9).
        muon: whether matrices of the transform are trained by Muon, else by Adam as everything is.
        final_lr_fraction: what the decay leaves of the learning rates.
        warmup_steps: steps of warm-up.
        clip: largest norm of the codec's gradient.
        balance: whether the terms are balanced, see `Balancer`, or weighted as they are.
        balance_total: norm of the balanced gradient.
        levels: lowest and highest level that is trained and validated; None: all.
        unquantised_steps: steps before quantisation starts.
        train: "all"; "codebook" keeps the transform as it is, and makes smaller codebooks anew from the base where
            the quantiser has any; "prior" keeps the codebooks as well.
        start_from: checkpoint (name or folder) or run (.ckpt) whose weights the codec takes over where they fit.
        start_prior: False takes the rest alone of a checkpoint, for another kind of prior.
        cuda_graph: whether to capture steps where possible.
        compile_transform: whether to compile the transform with `torch.compile`.
        minutes: time limit, as for `RateDistortion`.

    Raises:
        UsageError: the codec has no codebooks, there are no such levels, nothing is named `train`, or a part alone is
            to be trained of nothing. In the first step: a term has no weight, or a weight no term.
    """

    def __init__(
        self,
        codec: Codec,
        distance: nn.Module,
        discriminators: list[Discriminator] | None = None,
        weights: dict[str, float] | None = None,
        adversarial_start: int | float = 0.25,
        lr: float = 1e-3,
        bottleneck_lr: float = 1e-3,
        discriminator_lr: float = 3e-4,
        muon: bool = True,
        final_lr_fraction: float = 0.02,
        warmup_steps: int = 200,
        clip: float = 1.0,
        balance: bool = True,
        balance_total: float = 1.0,
        levels: tuple[int, int] | None = None,
        unquantised_steps: int = 0,
        train: Literal["all", "codebook", "prior"] = "all",
        start_from: str | None = None,
        start_prior: bool = True,
        cuda_graph: bool = True,
        compile_transform: bool = False,
        minutes: float | None = None,
    ) -> None:
        super().__init__(codec, lr, final_lr_fraction, warmup_steps, cuda_graph, compile_transform, minutes)
        self.levels = levels or (1, codec.levels)
        if not isinstance(codec.bottleneck, CodebookBottleneck):
            raise UsageError(f"{codec.name} has no codebooks: train it with RateDistortion")
        if not 1 <= self.levels[0] <= self.levels[1] <= codec.levels:
            raise UsageError(f"levels {list(self.levels)} do not exist: choose from 1 to {codec.levels}")
        if train not in ("all", "codebook", "prior"):
            raise UsageError(f"there is nothing to train named {train}: choose all, codebook or prior")
        if train != "all" and start_from is None:
            raise UsageError(f"train: {train} needs a codec that is trained otherwise: give start_from")
        self.part = train
        self.starts_anew = start_from is None
        self.unquantised_steps = unquantised_steps if self.starts_anew else 0
        self.adversarial_start = adversarial_start
        self.bottleneck_lr, self.discriminator_lr, self.muon = bottleneck_lr, discriminator_lr, muon
        self.clip = clip
        if start_from is not None:
            self.take_over(start_from, prior=start_prior)
        codec.transform.requires_grad_(train == "all")
        recluster = getattr(self.quantiser, "recluster", None)
        if train == "codebook" and recluster is not None:
            recluster()
        self.quantiser.requires_grad_(train != "prior")
        self.distance = distance
        self.discriminators = nn.ModuleList(discriminators or [] if train != "prior" else [])
        self.weights = dict(weights or {})
        self.balancer = Balancer(self.weights, balance_total) if balance else None
        self._names: list[str] = []
        self._phase: tuple[bool, bool] | None = None

    @property
    def quantiser(self) -> Quantiser:
        """The codec's."""
        return cast(CodebookBottleneck, self.codec.bottleneck).quantiser

    def train(self, mode: bool = True) -> AdversarialTraining:
        """As of any module; the distance, and codebooks that are kept, stay as in evaluation."""
        super().train(mode)
        self.distance.eval()
        if self.part == "prior":
            self.quantiser.eval()
        return self

    # ----------------------------------------------------------------------------------------------------- a step

    def terms(self, x_hat: Tensor, x: Tensor, adversarial: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Terms of the reconstruction, and the loss of the discriminators if they take part.

        Args:
            x_hat: [batch, channels, h, w], float32, a leaf: the discriminators' loss ends here.
            x: samples of the same shape.
            adversarial: whether the discriminators take part.
        """
        terms: dict[str, Tensor] = dict(self.distance(x_hat, x))
        self._check_weights(terms)
        if not adversarial:
            return terms, None
        real: list[list[Tensor]] = [[], []]
        fake: list[list[Tensor]] = [[], []]
        for discriminator in self.discriminators:
            for i, outputs in enumerate(discriminator(torch.cat([x, x_hat]))):
                for output in outputs:
                    a, b = output.float().chunk(2)
                    real[i].append(a)
                    fake[i].append(b)
        terms[ADVERSARIAL] = generator_loss(fake[0])
        terms[FEATURES] = feature_loss(real[1], fake[1])
        return terms, discriminator_loss(real[0], fake[0])

    def backward_of(self, batch: Tensor, quantised: bool, adversarial: bool) -> Tensor:
        """Leaves the gradients of a step.

        Args:
            batch: samples as the data module yields them.
            quantised: whether latents are quantised.
            adversarial: whether discriminators take part.

        Returns:
            What `self._names` names, for the log.
        """
        x = as_samples(batch)
        low, high = self.levels
        quality = QUALITY_STEPS * torch.randint(low, high + 1, (x.shape[0],), device=x.device)
        y = self._analysis(x, quality)
        terms: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        shown: dict[str, Tensor] = {}
        if quantised:
            output = self.codec.bottleneck(y, quality)
            y, extra = output.y_hat, output.losses
            shown["rate"] = output.bits.mean() / (x.shape[2] * x.shape[3])
        if self.part == "prior":
            extra = {"prior": extra["prior"]}
            loss = extra["prior"]
        else:
            x_hat = self._synthesis(y, quality).float()
            leaf = x_hat.detach().requires_grad_()
            terms, judged = self.terms(leaf, x, adversarial)
            # Times its own gradient, the reconstruction has the gradient that the terms give it.
            loss = (x_hat * self._gradient(terms, leaf)).sum()
            for name, value in extra.items():
                loss = loss + self.weights.get(name, 1.0) * value
            if judged is not None:
                loss = loss + judged
                shown[DISCRIMINATOR] = judged
            shown["mse"] = (x_hat - x).square().mean()
        shown |= terms | extra
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.codec.parameters(), self.clip)
        self._names = list(shown)
        return torch.stack([value.detach().float() for value in shown.values()])

    def _check_weights(self, terms: Mapping[str, Tensor]) -> None:
        """Raises UsageError if a term of the distance has no weight, or a weight no term."""
        needed = {*terms, *((ADVERSARIAL, FEATURES) if self.discriminators else ())}
        known = needed | {ADVERSARIAL, FEATURES, *BOTTLENECK_LOSSES}
        for name in sorted(needed - self.weights.keys()):
            raise UsageError(f"the loss {name} has no weight: name it in model.weights")
        for name in sorted(self.weights.keys() - known):
            raise UsageError(
                f"model.weights names {name}, which is no loss here: name {', '.join(sorted(known))}"
            )

    def _gradient(self, terms: Mapping[str, Tensor], output: Tensor) -> Tensor:
        if self.balancer is not None:
            return cast(Tensor, self.balancer(terms, output))
        total = sum((self.weights[name] * term for name, term in terms.items()), output.new_zeros(()))
        return torch.autograd.grad(total, output, retain_graph=True)[0]

    def training_step(self, batch: Tensor, batch_index: int) -> None:
        found: Any = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        self._set_learning_rate(*optimizers)
        phase = self._entered_phase(batch, optimizers)
        shown = self.run_step(lambda x: self.backward_of(x, *phase), batch, optimizers, phase)
        optimizers[0].step()
        if phase[1]:
            # Past Lightning, which would count it as another step.
            optimizers[1].optimizer.step()
        # Reading a value waits for the device, so it is done only as often as the log asks for it.
        if (batch_index + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = dict(zip(self._names, shown.tolist(), strict=True))
            if not all(math.isfinite(value) for value in values.values()):
                raise FloatingPointError(
                    f"a loss is not finite at step {self.global_step} ({values}); lower --model.lr"
                )
            if "rate" in values:
                unit, factor = rate_unit(self.codec)
                values[unit] = factor * values.pop("rate")
            self.log_dict(values, prog_bar=True, on_step=True, on_epoch=False)

    def _entered_phase(self, batch: Tensor, optimizers: Sequence[Any]) -> tuple[bool, bool]:
        """Whether this step quantises and whether discriminators take part; prepares what a new phase needs."""
        quantised = self.global_step >= self.unquantised_steps
        begins = self.adversarial_start
        done = self.progress if isinstance(begins, float) else self.global_step
        phase = quantised, bool(self.discriminators) and done >= begins
        if phase != self._phase:
            if self.starts_anew and self.global_step == self.unquantised_steps:
                self._initialise(batch)
            for optimizer in optimizers:
                # Gradients of a phase lie elsewhere, and not all parameters had any.
                optimizer.optimizer.recapture()
            self._phase = phase
        return phase

    @torch.no_grad()
    def _initialise(self, batch: Tensor) -> None:
        """Gives the codebooks the latents of a batch to start from."""
        x = as_samples(batch)
        quality = torch.full((len(x),), QUALITY_STEPS * self.levels[1], device=x.device)
        # Autocast would keep the weights that it casts here, without gradients, for the step that follows.
        with torch.autocast(x.device.type, enabled=False):
            self.quantiser.initialise(self.codec.transform.analysis(x, quality))

    # ----------------------------------------------------------------------------------------------- the rest

    def _graphs(self) -> bool:
        # Codebooks that are kept choose as they do in evaluation, item by item, each at a depth that the host reads.
        # Of several processes, they exchange what they counted in the middle of a step.
        return self.part != "prior" and not self.several and super()._graphs()

    def on_fit_start(self) -> None:
        """Says what the distance is."""
        if self.part != "prior" and self.trainer.is_global_zero:
            print(f"distance: {self.description}")

    @property
    def description(self) -> str:
        """What the reconstruction was held to, in words."""
        text = getattr(self.distance, "description", type(self.distance).__name__)
        judges = ", ".join(type(judge).__name__ for judge in self.discriminators)
        return f"{text}; adversaries: {judges}" if judges else f"{text}; no adversaries"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["objective"] = self.description

    def validation_step(self, item: Tensor, batch_index: int, dataloader_idx: int = 0) -> None:
        """Estimated rate, PSNR and the terms of the distance of one whole picture, or of an excerpt of a sound, at
        every trained level. `val/distance` is the weighted sum of the terms, mean over levels; of items that are
        trained on, a second set, they are named `seen/`."""
        kind = "seen" if dataloader_idx else "val"
        x = as_samples(item)
        unit, factor = rate_unit(self.codec)
        total = 0.0
        low, high = self.levels
        for level in range(low, high + 1):
            x_hat, bits = self.at_level(x, level)
            psnr = -10 * torch.log10((x_hat - x).square().mean().clamp(min=1e-12))
            terms = self.distance(x_hat, x)
            weighted = sum(self.weights.get(name, 0.0) * float(term) for name, term in terms.items())
            total += weighted / (high - low + 1)
            values = {unit: factor * bits, "psnr": psnr} | terms
            named = {f"{kind}/{name}_{level}": value for name, value in values.items()}
            self.log_dict(named, batch_size=1, add_dataloader_idx=False)
        self.log(f"{kind}/distance", total, batch_size=1, prog_bar=True, add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        transform = [p for p in self.codec.transform.parameters() if p.requires_grad]
        bottleneck = [p for p in self.codec.bottleneck.parameters() if p.requires_grad]
        groups = [
            {"params": transform, "peak_lr": self.lr, "adam_only": not self.muon},
            {"params": bottleneck, "peak_lr": self.bottleneck_lr, "adam_only": True},
        ]
        filled = [group for group in groups if group["params"]]
        optimizers = [MuonAdam(filled, lr=self.lr, cuda_graph=self._graphs())]
        if self.discriminators:
            judges = {"params": list(self.discriminators.parameters()), "peak_lr": self.discriminator_lr}
            optimizers.append(
                MuonAdam(
                    [judges],
                    lr=self.discriminator_lr,
                    betas=(0.5, 0.9),
                    adam_only=True,
                    cuda_graph=self._graphs(),
                )
            )
        return optimizers
