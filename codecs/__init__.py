"""compand: learned codecs for images and audio.

```python
import compand

data = compand.encode("photo.png", quality=4)   # the bytes of a .cpd file
picture = compand.decode(data)                  # compand.Picture: pixels, alpha, icc; .save("out.png")
sound = compand.decode(compand.encode("a.wav")) # compand.Sound: samples, rate; .save("out.wav")
codec = compand.load("hyperprior")              # a torch module, ready to code
y_hat = codec.latents(data)                     # dequantised latents, without synthesis
tokens = codec.tokens(data)                     # of a codec with codebooks: [codebooks, frames] or [height, width]
stem = compand.latent_stem(codec)               # a torch module: the input layer of a model that reads latents
compand.available()                             # the checkpoints that ship with this version
```

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

if __name__ != "compand":
    raise ImportError("install with pip install -e . and keep the repository root off PYTHONPATH")

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compand.errors import (
    BitstreamError,
    CheckpointError,
    CompandError,
    MediaError,
    PackedSetError,
    UsageError,
)

if TYPE_CHECKING:
    from compand.checkpoint import CheckpointInfo as CheckpointInfo
    from compand.checkpoint import available as available
    from compand.checkpoint import load as load
    from compand.codec import Codec as Codec
    from compand.data.stem import latent_stem as latent_stem
    from compand.pictures import Picture as Picture
    from compand.registry import register as register
    from compand.sounds import Sound as Sound

_LAZY = {
    "CheckpointInfo": "compand.checkpoint",
    "available": "compand.checkpoint",
    "load": "compand.checkpoint",
    "Codec": "compand.codec",
    "Picture": "compand.pictures",
    "register": "compand.registry",
    "Sound": "compand.sounds",
    "latent_stem": "compand.data.stem",
}

__all__ = [
    "BitstreamError",
    "CheckpointError",
    "CheckpointInfo",
    "Codec",
    "CompandError",
    "MediaError",
    "PackedSetError",
    "Picture",
    "Sound",
    "UsageError",
    "available",
    "decode",
    "encode",
    "latent_stem",
    "load",
    "register",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("compand")
    if name not in _LAZY:
        raise AttributeError(f"module compand has no attribute {name}")
    return getattr(import_module(_LAZY[name]), name)


def encode(source: Any, codec: str | None = None, *, device: str = "auto", **options: Any) -> bytes:
    """Encodes a picture or a sound with a checkpoint.

    The codec is loaded anew at each call; keep the result of `compand.load` to code many files.

    Args:
        source: a picture as `ImageCodec.encode` takes it or a sound as `AudioCodec.encode` takes it.
        codec: a checkpoint; None: "hyperprior" for pictures, "wavelet-stereo-2x" for sounds.
        options: of these methods: quality; bpp for pictures, kbps for sounds; psnr; progress.
    """
    from compand.checkpoint import load
    from compand.media import DEFAULT_CODEC, medium_of

    return load(codec or DEFAULT_CODEC[medium_of(source)], device=device).encode(source, **options)


def decode(
    data: bytes | str | Path, *, device: str = "auto", partial: bool = False, conceal: bool = False
) -> Picture | Sound:
    """Decodes a .cpd file, given by its bytes or by its path, with the checkpoint that it names.

    Returns:
        A `Picture` or a `Sound`, by what was encoded.

    Raises:
        MediaError: there is no such file.
        BitstreamError: the file is damaged; with `partial`, only if its header is or no part can be decoded. With
            `conceal` also what is lost of tokens is estimated.
        CheckpointError: the file needs a checkpoint that is not installed.
        UsageError: `conceal`, of a codec without tokens.
    """
    from compand.checkpoint import for_header, load
    from compand.coding.container import read_header

    if isinstance(data, (str, Path)):
        path = Path(data)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MediaError(f"{path} cannot be read: {error.strerror}") from None
    name = for_header(read_header(data, partial=partial or conceal)).name
    signal: Picture | Sound = load(name, device=device).decode(data, partial=partial, conceal=conceal)
    return signal
