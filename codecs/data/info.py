"""What all shards of a packed set agree on."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from compand import registry
from compand.errors import PackedSetError, UsageError
from compand.registry import QUALITY_STEPS

if TYPE_CHECKING:
    from compand.checkpoint import CheckpointInfo

FORMAT = 1
PROFILES = ("train", "archive", "cpd")
COMPRESSIONS = ("zstd", "lz4")

GEOMETRY = {"image": ("height", "width", "channels"), "audio": ("samples", "rate", "channels")}
"""Columns that say what a row is of, by medium."""

MAX_INTEGERS = 1 << 28
"""Most integers of a row that readers accept, whatever its geometry claims: bounds their memory."""


def shown(name: str, value: Any) -> str:
    """A fact of a set as messages have it: qualities in levels."""
    return f"{value / QUALITY_STEPS:g}" if name == "quality" and isinstance(value, int) else str(value)


def sizes_as_text(sizes: Sequence[int]) -> str:
    """Sizes of codebooks for a reader.

    >>> sizes_as_text([1024, 1024]), sizes_as_text([1024, 512])
    ('1024', '1024, 512')
    """
    return ", ".join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))


def _layout(checkpoint: CheckpointInfo) -> dict[str, Any]:
    """The layout of latents where config.json does not tell it, as in the first releases: asks the codec, unloaded."""
    codec = registry.by_name(checkpoint.codec).load_class()
    return codec.from_architecture(checkpoint.architecture, trainable=False).latent_layout()


@dataclass(frozen=True)
class SetInfo:
    """What all shards of a set agree on.

    Attributes:
        checkpoint: name of the checkpoint that made the integers.
        symbols, synthesis: its fingerprints, in hexadecimal.
        medium: "image" or "audio".
        quality: in 1/32 level.
        profile: "train", "archive" or "cpd".
        compression: of the profile train: "zstd" or "lz4"; else None.
        latent: layout of the latents, see `Codec.latent_layout`.
        classes: names of the classes that labels count; None where labels are not classes.
        tables: of the profile archive, see `compand.data.payload.learn_tables`; None until they are learned.
    """

    checkpoint: str
    symbols: str
    synthesis: str
    medium: str
    quality: int
    profile: str
    compression: str | None
    latent: Mapping[str, Any]
    classes: tuple[str, ...] | None = None
    tables: bytes | None = None

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise UsageError(f"profile {self.profile} does not exist: choose {', '.join(PROFILES)}")
        if (self.profile == "train") != (self.compression is not None) or self.compression not in (
            None,
            *COMPRESSIONS,
        ):
            raise UsageError(f"compression {self.compression} does not go with profile {self.profile}")

    @classmethod
    def of(
        cls,
        checkpoint: CheckpointInfo,
        *,
        quality: float,
        profile: str = "train",
        compression: str | None = None,
        classes: Sequence[str] | None = None,
        tables: bytes | None = None,
    ) -> SetInfo:
        """For what a checkpoint codes; compression: None is zstd for the profile train.

        Raises:
            UsageError: quality out of range, unknown profile or compression.
        """
        low, high = checkpoint.qualities
        if not low <= quality <= high:
            raise UsageError(f"quality {quality:g} does not exist: choose {low:g} to {high:g}")
        return cls(
            checkpoint=checkpoint.name,
            symbols=checkpoint.symbols.hex(),
            synthesis=checkpoint.synthesis.hex(),
            medium=checkpoint.medium,
            quality=round(quality * QUALITY_STEPS),
            profile=profile,
            compression=compression or ("zstd" if profile == "train" else None),
            latent=dict(checkpoint.latent or _layout(checkpoint)),
            classes=None if classes is None else tuple(classes),
            tables=tables,
        )

    @property
    def level(self) -> float:
        """Quality, as `Codec.encode` takes it."""
        return self.quality / QUALITY_STEPS

    @property
    def vocabulary(self) -> tuple[int, ...]:
        """Number of codes of each codebook of a row's tokens; empty where its integers are amounts."""
        levels = self.latent.get("vocabulary")
        return tuple(levels[self.quality // QUALITY_STEPS - 1]) if levels else ()

    @property
    def geometry(self) -> tuple[str, ...]:
        """Columns that say what a row is of."""
        return GEOMETRY[self.medium]

    def with_classes(self, classes: Sequence[str] | None) -> SetInfo:
        """The same with names of classes."""
        return replace(self, classes=None if classes is None else tuple(classes))

    def with_tables(self, tables: bytes | None) -> SetInfo:
        """The same with the tables of the profile archive."""
        return replace(self, tables=tables)

    def latent_shape(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of the integers and latents of a row, from its geometry columns: [M, h, w]; of sounds [M, n], or
        [groups, M, n] where they have more channels than the codec takes at once.

        Raises:
            PackedSetError: no medium has this geometry.
        """
        size = [int(row[name]) for name in self.geometry]
        if min(size) < 1 or max(size) >= 1 << 40:
            raise PackedSetError(
                f"{dict(zip(self.geometry, size, strict=True))} is no geometry: the set is damaged"
            )
        channels, stride = int(self.latent["channels"]), int(self.latent["stride"])
        shape: tuple[int, ...]
        if self.medium == "image":
            shape = (channels, -(-size[0] // stride), -(-size[1] // stride))
        else:
            from compand.sounds import resampling_ratio

            ratio = resampling_ratio(size[1], self.latent["rate"])
            columns = math.ceil(math.ceil(size[0] * ratio) / stride)
            groups = -(-size[2] // int(self.latent["group"]))
            shape = (channels, columns) if groups == 1 else (groups, channels, columns)
        edges = 2 * int(self.latent.get("edge", 0)) // stride
        count = math.prod(shape[:-1]) * (shape[-1] + edges)
        if count > MAX_INTEGERS:
            raise PackedSetError(
                f"a row claims {count} integers, beyond the limit of {MAX_INTEGERS}: the set is damaged"
            )
        return shape

    def to_json(self) -> dict[str, Any]:
        """What json.dumps can write; `from_json` reads it."""
        fields = asdict(self)
        fields["latent"] = dict(self.latent)
        fields["classes"] = None if self.classes is None else list(self.classes)
        fields["tables"] = None if self.tables is None else base64.b64encode(self.tables).decode()
        return {"format": FORMAT} | fields

    @classmethod
    def from_json(cls, content: Any) -> SetInfo:
        """Inverse of `to_json`. Raises PackedSetError if it is none."""
        try:
            if content["format"] != FORMAT:
                raise PackedSetError(
                    f"packed format {content['format']} is not known here: a newer compand may read it"
                )
            tables = content["tables"]
            classes = content["classes"]
            latent = content["latent"]
            info = cls(
                **{
                    name: str(content[name])
                    for name in ("checkpoint", "symbols", "synthesis", "medium", "profile")
                },
                quality=int(content["quality"]),
                compression=content["compression"],
                latent=latent,
                classes=None if classes is None else tuple(str(name) for name in classes),
                tables=None if tables is None else base64.b64decode(tables, validate=True),
            )
            positive = ("channels", "stride") if info.medium == "image" else ("channels", "stride", "group")
            if info.medium not in GEOMETRY or any(int(latent[name]) < 1 for name in positive):
                raise ValueError(info.medium)
            if info.medium == "audio" and latent["rate"] is not None and int(latent["rate"]) < 1:
                raise ValueError(latent["rate"])
            if int(latent["axes"]) != (2 if info.medium == "image" else 1):
                raise ValueError(latent["axes"])
            edge = int(latent.get("edge", 0))
            if edge < 0 or edge % int(latent["stride"]) or (edge and info.medium == "image"):
                raise ValueError(edge)
            if latent.get("vocabulary") and min(map(int, info.vocabulary)) < 1:
                raise ValueError(info.vocabulary)
            bytes.fromhex(info.symbols), bytes.fromhex(info.synthesis)
        except PackedSetError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, UsageError, binascii.Error) as error:
            raise PackedSetError(
                f"the description of the packed set is damaged ({error!r}): pack it again"
            ) from None
        return info

    def difference(self, other: SetInfo) -> str | None:
        """The first fact in which two differ, as "fact: this, not other"; None where they agree."""
        own, others = self.to_json(), other.to_json()
        for name, value in own.items():
            if value != others[name]:
                long = name in ("tables", "classes", "latent")
                return (
                    f"other {name}"
                    if long
                    else f"{name} {shown(name, value)}, not {shown(name, others[name])}"
                )
        return None
