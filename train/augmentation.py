"""Random distortions of batches of images, computed on the device that holds them. Every item draws its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def uniform(items: int, low: float, high: float, device: torch.device) -> Tensor:
    """[items], uniform in [low, high)."""
    return low + (high - low) * torch.rand(items, device=device)


def crop_maps(
    extent: Tensor, source: tuple[int, int], *, rotation: float = 0.0, shear: float = 0.0, mirror: bool = True
) -> Tensor:
    """Affine maps from the coordinates of a crop to those of its picture, as `torch.nn.functional.affine_grid` takes.

    A crop smaller than the picture lies anywhere within it, a larger one anywhere around it.

    Args:
        extent: height and width of the crops as fractions of the picture's, [items, 2].
        source: height and width of the pictures in pixels; rotations are by true angles.
        rotation: largest angle in radians.
        shear: largest horizontal shear, as a tangent.
        mirror: whether half the crops are mirrored.

    Returns:
        [items, 2, 3].
    """
    items, device = extent.shape[0], extent.device
    sign = (
        torch.randint(0, 2, (items,), device=device) * 2.0 - 1 if mirror else torch.ones(items, device=device)
    )
    scale = torch.stack([extent[:, 1] * sign, extent[:, 0]], 1)  # affine_grid's order is x, y
    angle = uniform(items, -rotation, rotation, device)
    cosine, sine, slant = angle.cos(), angle.sin(), uniform(items, -shear, shear, device)
    turn = torch.stack([cosine, cosine * slant - sine, sine, sine * slant + cosine], 1).view(-1, 2, 2)
    half = torch.tensor([source[1] / 2, source[0] / 2], device=device)
    linear = turn * (half[None, :] / half[:, None]) * scale[:, None, :]
    room = (1 - extent.flip(1)).abs()
    centre = (2 * torch.rand(items, 2, device=device) - 1) * room
    return torch.cat([linear, centre[:, :, None]], 2)


def area_extents(items: int, area: tuple[float, float], aspect: float, device: torch.device) -> Tensor:
    """Extents of crops of a random fraction of the area and random aspect, [items, 2] (Szegedy et al. 2015).

    Args:
        area: least and greatest fraction.
        aspect: greatest factor, either way, by which the aspect differs from the picture's.
    """
    side = uniform(items, *area, device).sqrt()
    ratio = torch.exp(uniform(items, -1, 1, device) * (math.log(aspect) / 2))
    return torch.stack([side * ratio, side / ratio], 1).clamp(max=1)


def resample(images: Tensor, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops of images [items, 3, h, w] by `crop_maps`, bilinear, mirrored beyond the edges: [items, 3, *size]."""
    grid = F.affine_grid(maps, [images.shape[0], images.shape[1], *size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def resample_labels(labels: Tensor, maps: Tensor, size: tuple[int, int], outside: int) -> Tensor:
    """Crops of label maps [items, h, w] by `crop_maps`, nearest, `outside` beyond the edges: int64 [items, *size]."""
    grid = F.affine_grid(maps, [labels.shape[0], 1, *size], align_corners=False)
    shifted = labels[:, None].float() - outside  # so that the padding, zero, stands for `outside`
    crops = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return crops[:, 0].round().long() + outside


def color_jitter(
    images: Tensor, strength: float, hue: float = 0.0, gray: float = 0.0, solarize: float = 0.0
) -> Tensor:
    """Random brightness, contrast, saturation and hue.

    Args:
        images: [items, 3, h, w] in [0, 1].
        strength: brightness, contrast and saturation are scaled by factors in [1 - strength, 1 + strength].
        hue: greatest rotation of the hue, as a fraction of a turn.
        gray: probability of losing all color.
        solarize: probability that values above a random threshold are inverted.
    """
    items, device = images.shape[0], images.device
    brightness, contrast, saturation = (
        uniform(items, 1 - strength, 1 + strength, device).view(-1, 1, 1) for _ in range(3)
    )
    saturation = saturation * (torch.rand_like(saturation) >= gray)
    luma = torch.tensor([0.299, 0.587, 0.114], device=device)
    eye, ones = torch.eye(3, device=device), torch.ones(3, 3, device=device)
    to_gray = luma.expand(3, 3)
    # Rotation about the gray axis (1, 1, 1), by Rodrigues' formula.
    angle = uniform(items, -hue, hue, device).view(-1, 1, 1) * (2 * math.pi)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / math.sqrt(3)
    turn = angle.cos() * eye + (1 - angle.cos()) * ones / 3 + angle.sin() * cross
    matrix = turn @ (saturation * eye + (1 - saturation) * to_gray) * contrast
    mean = (images.mean((2, 3)) @ luma).view(-1, 1, 1)
    jittered = torch.baddbmm(mean * (1 - contrast), matrix, images.flatten(2)) * brightness
    jittered = jittered.clamp(0, 1).view_as(images)
    if solarize:
        threshold = torch.rand(items, 1, 1, 1, device=device)
        inverted = (torch.rand_like(threshold) < solarize) & (jittered > threshold)
        jittered = torch.where(inverted, 1 - jittered, jittered)
    return jittered


def rectangles(area: Tensor, size: tuple[int, int], aspect: float = 1.0) -> Tensor:
    """Masks with one random rectangle each, cut where it passes an edge.

    Args:
        area: fraction of the picture that the rectangles cover, [items].
        size: height and width of the masks.
        aspect: greatest factor by which a rectangle's aspect differs from the picture's.

    Returns:
        bool [items, 1, h, w].
    """
    items, device = area.shape[0], area.device
    ratio = torch.exp(uniform(items, -1, 1, device) * (math.log(aspect) / 2))
    inside = []
    for edge, half in zip(size, (area.sqrt() * ratio / 2, area.sqrt() / ratio / 2), strict=True):
        position = (torch.arange(edge, device=device) + 0.5) / edge
        inside.append((position - torch.rand(items, 1, device=device)).abs() < half[:, None])
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def erase(images: Tensor, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020): a rectangle of 2 to 30 % of the picture filled with noise."""
    items, device = images.shape[0], images.device
    area = uniform(items, 0.02, 0.3, device) * (torch.rand(items, device=device) < probability)
    return torch.where(
        rectangles(area, (images.shape[2], images.shape[3]), 3.0), torch.rand_like(images), images
    )


def mix(images: Tensor, targets: Tensor, probability: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixes items with their neighbours in the batch by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019).

    Args:
        images: [items, 3, h, w].
        targets: class probabilities [items, classes].
        probability: of an item being mixed.
        alpha: mixup's weights are drawn from Beta(alpha, alpha); the areas of CutMix are uniform.
    """
    items, device = images.shape[0], images.device
    concentration = torch.full((items, 1, 1, 1), alpha, device=device)
    # Validation would wait for the device.
    blend = torch.distributions.Beta(concentration, concentration, validate_args=False).sample()
    size = (images.shape[2], images.shape[3])
    pasted = rectangles(torch.rand(items, device=device), size)
    cut = torch.rand(items, 1, 1, 1, device=device) < 0.5
    own = torch.where(cut, (~pasted).float(), blend)
    own = torch.where(torch.rand(items, 1, 1, 1, device=device) < probability, own, 1.0)
    share = own.mean((1, 2, 3))[:, None]
    return torch.lerp(images.roll(1, 0), images, own), torch.lerp(targets.roll(1, 0), targets, share)
