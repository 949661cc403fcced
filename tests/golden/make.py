"""Writes the golden files of a new release: python tests/golden/make.py NAME-vN

Run once, when a checkpoint is released; what it writes never changes afterwards. Each file is kept with a digest of the
integers that the entropy decoder gives and with the picture or sound that it decoded to.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_sample_image

import compand
from compand.bottlenecks.codebook import CodebookBottleneck
from compand.coding.ans import AnsReader
from compand.pictures import Picture
from compand.sounds import Sound
from compand.train.instruments import RATE, drum, note

FOLDER = Path(__file__).parent


@contextmanager
def symbol_digest() -> Iterator[Any]:
    """A SHA-256 over everything that is entropy-decoded meanwhile: table indexes and symbols, or codebook indices."""
    digest = hashlib.sha256()
    pull, decompress = AnsReader.pull, CodebookBottleneck.decompress_indices

    def recorded(self: AnsReader, indexes: Any, tables: Any) -> Any:
        values = pull(self, indexes, tables)
        digest.update(np.asarray(indexes).astype("<i8").tobytes() + values.astype("<i4").tobytes())
        return values

    def recorded_indices(self: CodebookBottleneck, *arguments: Any, **options: Any) -> Any:
        indices = decompress(self, *arguments, **options)
        digest.update(indices.numpy().astype("<i8").tobytes())
        return indices

    AnsReader.pull = recorded  # type: ignore[method-assign]
    CodebookBottleneck.decompress_indices = recorded_indices  # type: ignore[method-assign]
    try:
        yield digest
    finally:
        AnsReader.pull = pull  # type: ignore[method-assign]
        CodebookBottleneck.decompress_indices = decompress  # type: ignore[method-assign]


def pictures() -> dict[str, tuple[Picture, float]]:
    """Pictures and qualities: a photograph at both ends and between, odd sizes, gray, alpha, tiles, one pixel."""
    china, flower = load_sample_image("china.jpg"), load_sample_image("flower.jpg")
    gray = china[100:165, 200:301].mean(2).round().astype(np.uint8)[..., None]
    alpha = np.linspace(0, 255, 61 * 47).astype(np.uint8).reshape(61, 47)
    wide = np.ascontiguousarray(np.concatenate([china[200:240], flower[200:240]], axis=1))
    return {
        "photo-low": (Picture(china[100:228, 200:392], None, None), 1),
        "photo-middle": (Picture(flower[100:229, 200:391], None, None), 4.53125),
        "photo-high": (Picture(china[100:180, 200:290], None, None), 8),
        "gray": (Picture(gray, None, None), 5),
        "alpha": (Picture(flower[50:111, 300:347], alpha, None, 16), 3),
        "tiles": (Picture(wide, None, None), 2),
        "pixel": (Picture(china[:1, :1], None, None), 6.5),
    }


def sounds() -> dict[str, tuple[Sound, float]]:
    """Sounds and qualities: stereo at both ends, mono and three channels at other rates, silence, one sample."""
    generator = np.random.default_rng(0)
    left, right = note(generator)[:RATE], drum(generator)[:RATE]
    stereo = (0.5 * np.stack([left + 0.3 * right, 0.4 * left + 0.9 * right])).astype(np.float32)
    three = np.concatenate([stereo, stereo[:1] * 0.5])[:, : RATE // 4]
    return {
        "music-low": (Sound(stereo, RATE), 1),
        "music-middle": (Sound(stereo[:, : RATE // 2], RATE), 4.53125),
        "music-high": (Sound(stereo[:, : RATE // 4], RATE), 8),
        "mono-8k": (Sound(stereo[:1, :4001], 8000), 5),
        "three-48k": (Sound(three, 48000), 3),
        "silence": (Sound(np.zeros((2, 3000), np.float32), RATE), 4),
        "sample": (Sound(np.full((1, 1), 0.25, np.float32), RATE), 6.5),
    }


def main(release: str) -> None:
    folder = FOLDER / release
    folder.mkdir()
    codec = compand.load(release, device="cpu")
    digests = {}
    sources: dict[str, tuple[Any, float]] = pictures() if codec.medium == "image" else sounds()
    for name, (source, quality) in sources.items():
        data = codec.encode(source, quality=quality)
        (folder / f"{name}.cpd").write_bytes(data)
        with symbol_digest() as digest:
            decoded = codec.decode(data)
        digests[name] = digest.hexdigest()
        if codec.medium == "image":
            decoded.save(folder / f"{name}.png")
        else:
            decoded.save(folder / f"{name}.flac", subtype="PCM_24")
    (folder / "symbols.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
