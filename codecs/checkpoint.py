"""Released models: folders NAME-vN with model.safetensors, config.json and CARD.md, found by name or fingerprint.

A file names the integers that decide its symbols by a fingerprint, and the synthesis by another. Nothing here imports
torch until a codec is built.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compand import registry
from compand.coding.container import Header
from compand.errors import CheckpointError

if TYPE_CHECKING:
    from compand.codec import Codec

FROZEN = "frozen."
"""Prefix, in model.safetensors, of the integers that decide symbols."""

FINGERPRINT_BYTES = 4


@dataclass(frozen=True)
class CheckpointInfo:
    """Facts of a checkpoint, read from its config.json.

    Attributes:
        name: "hyperprior-v1".
        codec, codec_id, medium: the codec it belongs to.
        version: number behind "-v"; 0 for a folder of another name.
        description: one line.
        parameters: number of weights.
        size: bytes of model.safetensors.
        path: its folder.
        symbols, synthesis: fingerprints of what decides symbols and of what turns them into samples, 4 bytes each.
        weights: fingerprint of all tensors together.
        qualities: lowest and highest quality.
        architecture: constructor arguments of the codec.
        latent: layout of the latents, see `Codec.latent_layout`; None where config.json does not tell.
    """

    name: str
    codec: str
    codec_id: int
    medium: str
    version: int
    description: str
    parameters: int
    size: int
    path: Path
    symbols: bytes
    synthesis: bytes
    weights: bytes
    qualities: tuple[float, float]
    architecture: Mapping[str, Any]
    latent: Mapping[str, Any] | None = None

    @property
    def family(self) -> str:
        """The name without its version."""
        return self.name.removesuffix(f"-v{self.version}")


def fingerprint(tensors: Mapping[str, bytes]) -> bytes:
    """First bytes of the SHA-256 over names, lengths and contents in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        content = tensors[name]
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.digest()[:FINGERPRINT_BYTES]


def read_info(folder: Path) -> CheckpointInfo:
    """Facts of the checkpoint in a folder. Raises CheckpointError if it is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        entry = registry.by_name(config["codec"])
        version = re.search(r"-v(\d+)$", folder.name)
        return CheckpointInfo(
            name=folder.name,
            codec=entry.name,
            codec_id=entry.codec_id,
            medium=entry.medium,
            version=int(version[1]) if version else 0,
            description=entry.description,
            parameters=int(config["parameters"]),
            size=(folder / "model.safetensors").stat().st_size,
            path=folder,
            symbols=bytes.fromhex(config["symbols"]),
            synthesis=bytes.fromhex(config["synthesis"]),
            weights=bytes.fromhex(config["weights"]),
            qualities=(float(config["qualities"][0]), float(config["qualities"][1])),
            architecture=config["architecture"],
            latent=config.get("latent"),
        )
    except OSError as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error.strerror} ({error.filename})") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}): restore or export the checkpoint again"
        ) from None


@lru_cache(maxsize=1)
def _shipped() -> tuple[CheckpointInfo, ...]:
    import compand.checkpoints

    configs = [path for root in compand.checkpoints.__path__ for path in Path(root).glob("*-v*/config.json")]
    infos = [read_info(path.parent) for path in configs if _describes_codec(path)]
    return tuple(sorted(infos, key=lambda info: (info.codec_id, info.codec, info.version)))


def _describes_codec(config: Path) -> bool:
    """Whether a config.json is a codec's: the models of perception tasks lie beside, and name a task instead."""
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # damaged: reading it as a codec's says so
    return not (isinstance(described, dict) and "task" in described and "codec" not in described)


def available() -> list[CheckpointInfo]:
    """The checkpoints that ship with compand, in order of codec id and version."""
    return list(_shipped())


def find(name: str | Path) -> CheckpointInfo:
    """A checkpoint by name, with its version or without, by codec name, or by folder.

    Of several the newest is meant, of several new ones (a codec may have more than one size) the last by name.

    Raises:
        CheckpointError: nothing of that name.
    """
    for key in ("name", "family", "codec"):
        found = [info for info in _shipped() if getattr(info, key) == str(name)]
        if found:
            return max(found, key=lambda info: (info.version, info.name))
    folder = Path(name)
    if folder.is_dir():
        return read_info(folder)
    known = ", ".join(info.name for info in _shipped())
    raise CheckpointError(f"checkpoint {name} not found: give a folder or one of {known}")


def for_header(header: Header) -> CheckpointInfo:
    """The shipped checkpoint that decodes a file: the one with its synthesis, else the newest with its symbols.

    A compact file does not name its synthesis; it belongs to the oldest checkpoint with its symbols, so that later
    releases do not change it.

    Raises:
        CheckpointError: no checkpoint here has the file's tables; decoding with another would give noise.
    """
    fits = [info for info in _shipped() if matches(info, header)]
    same = [info for info in fits if info.synthesis == header.synthesis]
    if same or fits:
        return fits[0] if header.compact else (same or fits)[-1]
    ids = {entry.codec_id: entry.name for entry in registry.entries()}
    codec = header.codec_name or ids.get(header.codec_id)
    if codec is None:
        raise CheckpointError(
            f"file needs codec id {header.codec_id}, unknown here: a newer compand may have it"
        )
    raise CheckpointError(
        f"file needs a {codec} checkpoint with symbols fingerprint {header.symbols.hex()}, not installed here: "
        "give its folder with --codec, or upgrade compand"
    )


def matches(info: CheckpointInfo, header: Header) -> bool:
    """Whether a file was written with a checkpoint's tables (of whose fingerprint a compact header has two bytes)."""
    same_codec = info.codec_id == header.codec_id and (
        header.codec_id != 0 or info.codec == header.codec_name
    )
    return same_codec and info.symbols.startswith(header.symbols)


def load(name_or_path: str | Path = "hyperprior", *, device: str = "auto") -> Codec:
    """Builds a codec, ready to encode and decode.

    Args:
        name_or_path: checkpoint name with or without version, codec name, or folder; see `find`.
        device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        CheckpointError: unknown, incomplete or damaged checkpoint.
        UsageError: the device does not exist.
    """
    from compand.weights import build

    return build(find(name_or_path), device)
