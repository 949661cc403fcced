"""Strided convolutions with divisive normalisation between them: the transforms of Balle et al. 2018."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand.codec import Transform
from compand.errors import UsageError

ACTIVATIONS = ("gdn", "relu")
DOWNSAMPLINGS = 4
BETA_MIN = 1e-6


class DivisiveNormalisation(nn.Module):
    """x_i / sqrt(beta_i + sum_j gamma_ij x_j^2), or its approximate inverse x_i sqrt(...) (Balle et al. 2016, "Density
    Modeling of Images Using a Generalized Normalization Transformation", equation 3, with all exponents 2 and 1/2).

    beta (less BETA_MIN) and gamma are held by their square roots, so that no step of training makes them negative.

    Args:
        channels: number of channels.
        inverse: multiply instead of dividing.
    """

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta_root = nn.Parameter(torch.ones(channels))
        # At 0 a square has no gradient.
        self.gamma_root = nn.Parameter((0.1 * torch.eye(channels)).sqrt() + 2.0**-9)

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma_root.square()[:, :, None, None]
        norm = F.conv2d(x.square(), gamma, self.beta_root.square() + BETA_MIN)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


class DivisiveTransform(Transform):
    """Four strided 5x5 convolutions with divisive normalisation (or ReLU) between them, and their mirror (Balle et al.
    2018, "Variational image compression with a scale hyperprior", figure 4).

    ```
    x -> (conv 5x5 / 2 -> GDN) x 3 -> conv 5x5 / 2 -> y - centre
    y_hat + centre -> (transposed conv 5x5 * 2 -> inverse GDN) x 3 -> transposed conv 5x5 * 2 -> x_hat
    ```

    Args:
        latent_channels: channels M of y.
        width: channels N of the layers between.
        activation: "gdn" or "relu".

    Raises:
        UsageError: an unknown activation.
    """

    encoder_parts = ("analysis_",)
    stride = 2**DOWNSAMPLINGS
    context = 2 * stride

    def __init__(self, latent_channels: int, width: int, activation: str = "gdn") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UsageError(f"activation {activation!r} does not exist: choose {' or '.join(ACTIVATIONS)}")
        self.latent_channels = latent_channels
        self.centre = nn.Parameter(torch.zeros(latent_channels))

        def between(inverse: bool) -> nn.Module:
            return DivisiveNormalisation(width, inverse) if activation == "gdn" else nn.ReLU()

        analysis: list[nn.Module] = [nn.Conv2d(3, width, 5, 2, 2)]
        synthesis: list[nn.Module] = [nn.ConvTranspose2d(latent_channels, width, 5, 2, 2, 1)]
        for outputs in (width, width, latent_channels):
            analysis += [between(inverse=False), nn.Conv2d(width, outputs, 5, 2, 2)]
        for outputs in (width, width, 3):
            synthesis += [between(inverse=True), nn.ConvTranspose2d(width, outputs, 5, 2, 2, 1)]
        self.analysis_layers, self.synthesis_layers = nn.Sequential(*analysis), nn.Sequential(*synthesis)
        for layer in (*analysis, *synthesis):
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                # Keeps variances; of a transposed kernel, a quarter of the taps meets in a sample.
                taps = layer.in_channels * 25 / (4 if isinstance(layer, nn.ConvTranspose2d) else 1)
                nn.init.normal_(layer.weight, std=taps**-0.5)
                assert layer.bias is not None
                nn.init.constant_(layer.bias, 0.5 if layer is synthesis[-1] else 0.0)

    def analysis(self, x: Tensor, quality: Tensor) -> Tensor:
        y: Tensor = self.analysis_layers(x)
        return y.float() - self.centre[:, None, None]

    def synthesis(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        x_hat: Tensor = self.synthesis_layers(y_hat + self.centre[:, None, None])
        return x_hat.float()

    def reduce_precision(self, dtype: torch.dtype) -> None:
        """Nothing: squares within the normalisation, and latents of some hundred steps, need all of float32."""
