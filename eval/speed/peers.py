"""Learned codecs of another project in the same run: the models of CompressAI, with random weights.

A model's transforms and networks take the same time with any weights, and its entropy coder works on as many symbols
as with trained ones, but on nearly constant ones: its files are small, and a trained model would be no faster.
"""

from __future__ import annotations

import struct
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from compand.errors import MediaError, UsageError
from compand.eval.items import Signal
from compand.eval.subjects import Subject
from compand.pictures import Picture

NOT_INSTALLED = 'compressai is not installed, so no peer was timed: pip install "compand[train]"'

_QUALITIES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
_HEAD = struct.Struct("<IIIIB")  # height, width, rows and columns of z, number of strings


def installed() -> bool:
    """Whether compressai can be imported."""
    return find_spec("compressai") is not None


class Peer(Subject):
    """A model of `compressai.zoo` between pictures and bytes.

    From uint8 pixels to bytes and back to uint8 pixels, as every codec here: what a model needs besides (conversion
    from and to floating point, edges repeated up to its stride) is done, and counts as "other".

    Args:
        name: the model's name there ("mbt2018-mean").
        tuned: in channels-last memory, which convolutions on a CPU prefer.
        device: as `compand.load` takes it.

    Raises:
        UsageError: compressai has no such model.
    """

    medium = "image"
    kind = "peer"
    qualities = _QUALITIES
    suffix = ".bin"

    def __init__(self, name: str, *, tuned: bool = False, device: str = "cpu") -> None:
        from compressai.zoo import image_models

        if name not in image_models:
            known = ", ".join(sorted(image_models))
            raise UsageError(f"compressai has no model {name}: choose one of {known}")
        version = metadata.version("compressai")
        self.name = self.title = name
        self.tuned = tuned
        self._device = device
        self.identity = f"compressai {version} {name} random"
        layout = "channels-last memory" if tuned else "memory layout as it comes"
        self.settings_note = f"CompressAI {version}, random weights, {layout}"
        self.model: Any = None
        self._quality = 0.0

    def load(self, quality: float) -> None:
        """Builds the model of a quality. Raises UsageError if there is none."""
        import torch
        from compressai.zoo import image_models

        from compand.weights import choose_device

        if quality != int(quality):
            raise UsageError(f"{self.name} has no quality {quality:g}: give a whole number")
        device = choose_device(self._device)
        torch.manual_seed(0)
        try:
            model = image_models[self.name](quality=int(quality), pretrained=False)
        except ValueError as error:
            raise UsageError(f"{self.name} has no quality {quality:g} ({error})") from None
        model = model.eval().requires_grad_(False)
        model.update(force=True)
        if self.tuned:
            model = model.to(memory_format=torch.channels_last)
        self.model = model.to(device)
        self._quality = quality

    @property
    def device(self) -> Any:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def encode(self, signal: Signal, quality: float) -> bytes:
        import torch
        from torch.nn import functional as F

        if not isinstance(signal, Picture):
            raise UsageError(f"{self.name} codes pictures: choose another codec for sounds")
        if self.model is None or self._quality != quality:
            self.load(quality)
        stride = self.model.downsampling_factor
        with torch.inference_mode():
            x = torch.from_numpy(signal.pixels).to(self.device).permute(2, 0, 1)[None].float().div(255)
            x = F.pad(x, (0, -signal.width % stride, 0, -signal.height % stride), mode="replicate")
            layout = torch.channels_last if self.tuned else torch.contiguous_format
            coded = self.model.compress(x.contiguous(memory_format=layout))
        strings = [string for (string,) in coded["strings"]]
        head = _HEAD.pack(signal.height, signal.width, *coded["shape"], len(strings))
        return b"".join([head, *(struct.pack("<I", len(string)) + string for string in strings)])

    def decode(self, data: bytes) -> Picture:
        import torch

        if self.model is None:
            raise UsageError(f"{self.name} has no weights yet: encode something first")
        try:
            height, width, rows, columns, count = _HEAD.unpack_from(data)
            strings, position = [], _HEAD.size
            for _ in range(count):
                (length,) = struct.unpack_from("<I", data, position)
                strings.append([data[position + 4 : position + 4 + length]])
                position += 4 + length
        except struct.error:
            raise MediaError(f"this is no file of {self.name}: get an intact copy") from None
        with torch.inference_mode():
            x = self.model.decompress(strings, (rows, columns))["x_hat"][0, :, :height, :width]
            pixels = (x * 255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        return Picture(pixels, None, None)

    def overhead(self, data: bytes) -> int:
        return 0
