"""Tensors of a checkpoint <-> codec."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compand import registry
from compand.checkpoint import FROZEN, CheckpointInfo, fingerprint
from compand.codec import Codec, subset
from compand.errors import CheckpointError, UsageError


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto" is CUDA if there is one. Raises UsageError if it does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device} cannot be used here ({str(error).splitlines()[0]}): try --device cpu") from None
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
    synthesis = {name: _content(tensors[name]) for name in codec.decoder_state()}
    return fingerprint(symbols), fingerprint(synthesis)


def save(codec: Codec, folder: Path) -> None:
    """Writes model.safetensors and config.json of a codec whose bottleneck is frozen.

    Convolution kernels are stored in half precision, all else in float32 or in integers of 16 or 32 bits. Training-only parameters are left out.

    Raises:
        CheckpointError: the folder holds a checkpoint already; a released version never changes.
    """
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a checkpoint already: export to a new version")
    bare = type(codec)(**codec.architecture, trainable=False)
    state = codec.state_dict()
    tensors = {
        name: (state[name].half() if state[name].ndim == 4 else state[name].float()).cpu().contiguous()
        for name in bare.state_dict()
    }
    for name, array in codec.bottleneck.frozen_arrays().items():
        narrow = array.astype(np.int16)
        tensors[FROZEN + name] = torch.from_numpy(narrow if np.array_equal(narrow, array) else array).contiguous()
    symbols, synthesis = _fingerprints(bare, tensors)
    config = {
        "codec": codec.name,
        "symbols": symbols.hex(),
        "synthesis": synthesis.hex(),
        "qualities": [1, codec.levels],
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "architecture": codec.architecture,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    try:
        tensors = load_file(path)
        codec = registry.by_name(info.codec).load_class()(**info.architecture, trainable=False)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be loaded ({error}): restore the checkpoint") from None
    floats = {name: value.float() for name, value in tensors.items() if not name.startswith(FROZEN)}
    try:
        codec.load_state_dict(floats, strict=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit its config.json: {problem}") from None
    if (info.symbols, info.synthesis) != _fingerprints(codec, tensors):
        raise CheckpointError(f"{path} is not the file that its config.json names: restore the checkpoint")
    codec.bottleneck.load_frozen({name: value.int().numpy() for name, value in subset(tensors, FROZEN).items()})
    codec.info = info
    codec.requires_grad_(False).eval().to(place).to(memory_format=torch.channels_last)
    if reduced if reduced is not None else native_bfloat16(place):
        codec.transform.reduce_precision(torch.bfloat16)
    return codec
