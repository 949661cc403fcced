"""Tensors of a checkpoint <-> codec."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compand import registry
from compand.checkpoint import FROZEN, CheckpointInfo, fingerprint
from compand.codec import CONCEALER, Codec, subset
from compand.errors import CheckpointError, UsageError

SCALE = ".scale"
"""Suffix of the scales, one for each pair of channels, of a kernel that is kept in 8 bits."""


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto" is CUDA if there is one. Raises UsageError if it does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {device} cannot be used here ({str(error).splitlines()[0]}): try --device cpu"
        ) from None
    return chosen


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is faster than float32 on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _content(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _fingerprints(codec: Codec, tensors: dict[str, Tensor]) -> tuple[bytes, bytes]:
    symbols = {name: _content(value) for name, value in tensors.items() if name.startswith(FROZEN)}
    names = codec.decoder_state()
    synthesis = {
        name: _content(tensors[name])
        for name in [*names, *(name + SCALE for name in names if tensors[name].dtype == torch.int8)]
    }
    return fingerprint(symbols), fingerprint(synthesis)


def _weights_fingerprint(tensors: dict[str, Tensor]) -> bytes:
    return fingerprint({name: _content(value) for name, value in tensors.items()})


def check_new(folder: Path) -> None:
    """Raises CheckpointError if a folder holds anything: a released version never changes."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already: export to a new version")


def save(codec: Codec, folder: Path) -> None:
    """Writes model.safetensors and config.json of a codec whose bottleneck is frozen.

    Convolution kernels and codes of codebooks (of codecs with `half_kernels`) are stored in half precision;
    `coarse_parts` and the matrices and kernels of a concealer in 8 bits, the bottleneck's with a scale for each pair of
    channels, others for each output channel; all else in float32 or in integers of 16 or 32 bits. What only training
    needs is left out.

    Raises:
        CheckpointError: the folder holds a checkpoint already; a released version never changes.
    """
    check_new(folder)
    bare = codec.from_architecture(codec.architecture, trainable=False)
    state = codec.state_dict()
    by_pair = tuple(f"bottleneck.{part}" for part in codec.bottleneck.coarse_parts)
    by_output = tuple(f"transform.{part}" for part in codec.transform.coarse_parts)
    tensors: dict[str, Tensor] = {}
    for name in bare.state_dict():
        value = state[name].detach().float().cpu()
        concealing = name.startswith(f"{CONCEALER}.")
        if (value.ndim == 4 and name.startswith(by_pair + by_output)) or (concealing and value.ndim > 1):
            shared = (2, 3) if name.startswith(by_pair) else tuple(range(1, value.ndim))
            scale = (value.abs().amax(shared, keepdim=True) / 127).clamp(min=6e-8).half()
            tensors[name + SCALE] = scale
            tensors[name] = torch.round(value / scale.float()).clamp(-127, 127).to(torch.int8)
        else:
            half = (value.ndim >= 3 and codec.half_kernels) or concealing
            tensors[name] = value.half() if half else value
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    for name, array in codec.bottleneck.frozen_arrays().items():
        narrow = array.astype(np.int16)
        tensors[FROZEN + name] = torch.from_numpy(
            narrow if np.array_equal(narrow, array) else array
        ).contiguous()
    symbols, synthesis = _fingerprints(bare, tensors)
    config = {
        "codec": codec.name,
        "symbols": symbols.hex(),
        "synthesis": synthesis.hex(),
        "weights": _weights_fingerprint(tensors).hex(),
        "qualities": [1, codec.levels],
        "latent": codec.latent_layout(),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "architecture": codec.architecture,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: written beside its place, then renamed.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as draft:
        written = Path(draft, folder.name)
        written.mkdir()
        save_file(tensors, written / "model.safetensors")
        (written / "model.safetensors").chmod(0o644)
        (written / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written.rename(folder)


def _read(info: CheckpointInfo) -> dict[str, Tensor]:
    path = info.path / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be loaded ({error}): restore the checkpoint") from None


def _floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # A parameter may bear the suffix as its own name.
    scales = {name + SCALE for name in tensors}
    return {
        name: value.float() * tensors.get(name + SCALE, 1.0)
        for name, value in tensors.items()
        if not name.startswith(FROZEN) and name not in scales
    }


def _integers(tensors: dict[str, Tensor]) -> dict[str, NDArray[np.int32]]:
    return {name: value.int().numpy() for name, value in subset(tensors, FROZEN).items()}


def in_channels_last(codec: Codec) -> None:
    """Lays out convolution kernels for channels-last memory, in which they run about three times faster on a CPU."""
    for parameter in codec.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def warm_start(codec: Codec, info: CheckpointInfo, *, prior: bool = True) -> None:
    """Gives a trainable codec the weights of a checkpoint, as far as names and shapes agree.

    The checkpoint may belong to another codec with the same transform, or with one that has fewer blocks: further ones
    begin as the identity.

    Args:
        prior: False leaves the integer prior out, for a codec whose prior has other widths.

    Raises:
        CheckpointError: nothing fits, or the checkpoint's prior does not.
    """
    tensors = _read(info)
    own = codec.state_dict()
    shared = {name: v for name, v in _floats(tensors).items() if name in own and own[name].shape == v.shape}
    if not shared:
        raise CheckpointError(
            f"{info.name} has no weights in common with this {codec.name}: check its architecture"
        )
    codec.load_state_dict(shared, strict=False)
    codec.transform.settle_new_parts(subset(shared, "transform."))
    if prior and info.codec in (codec.name, *codec.prior_sources):
        try:
            codec.bottleneck.thaw(_integers(tensors))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"prior of {info.name} does not fit this {codec.name} ({error}): start without it (start_prior: false)"
            ) from None


def adopt_symbols(codec: Codec, info: CheckpointInfo) -> None:
    """Gives a trainable codec the integer tables and prior of a checkpoint, instead of freezing its own.

    For a codec of which only the synthesis was trained on: its files then are the checkpoint's files.

    Raises:
        CheckpointError: the checkpoint belongs to another codec, its integers do not fit, or something in the codec
            that meets them (gains, companding) is not the checkpoint's.
    """
    tensors = _read(info)
    if info.codec != codec.name:
        raise CheckpointError(
            f"{info.name} is a {info.codec}, this run trained a {codec.name}: give another checkpoint"
        )
    own = codec.state_dict()
    moved = [
        name
        for name, value in _floats(tensors).items()
        if name.startswith("bottleneck.")
        and not torch.allclose(own[name].cpu().float(), value, rtol=1e-6, atol=1e-7)
    ]
    if moved:
        raise CheckpointError(
            f"{moved[0]} is not as in {info.name}: its symbols need a run with train_encoder: false"
        )
    codec.bottleneck.load_frozen(_integers(tensors))


@torch.inference_mode(False)  # weights made in inference mode could not be differentiated through
def build(info: CheckpointInfo, device: str, *, reduced: bool | None = None) -> Codec:
    """The codec of a checkpoint, in evaluation mode and channels-last memory.

    Args:
        info: the checkpoint.
        device: see `choose_device`.
        reduced: whether transforms run in bfloat16; None: where the device is faster with it.

    Raises:
        CheckpointError: the weights are missing, damaged, of another architecture or not those that config.json names.
    """
    place = choose_device(device)
    path = info.path / "model.safetensors"
    tensors = _read(info)
    try:
        codec = (
            registry.by_name(info.codec).load_class().from_architecture(info.architecture, trainable=False)
        )
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        UsageError,
        ValueError,
    ) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{info.path}/config.json does not describe a codec ({problem})") from None
    floats = _floats(tensors)
    codec.float()  # whatever torch's default dtype is
    try:
        codec.load_state_dict(floats, strict=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit its config.json: {problem}") from None
    found = (*_fingerprints(codec, tensors), _weights_fingerprint(tensors))
    if (info.symbols, info.synthesis, info.weights) != found:
        raise CheckpointError(f"{path} is not the file that its config.json names: restore the checkpoint")
    codec.bottleneck.load_frozen(_integers(tensors))
    codec.info = info
    codec.requires_grad_(False).eval().to(place)
    in_channels_last(codec)
    if reduced if reduced is not None else native_bfloat16(place):
        codec.transform.reduce_precision(torch.bfloat16)
    return codec
