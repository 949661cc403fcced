"""What an evaluation compares: codecs of compand and classical anchors behind one contract, found by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from compand import checkpoint
from compand.checkpoint import CheckpointInfo
from compand.errors import CheckpointError, UsageError
from compand.eval.items import MEDIA, Signal

if TYPE_CHECKING:
    from compand.codec import Codec


class Subject(ABC):
    """One codec in an evaluation.

    Attributes:
        name: key in tables: "hyperprior-v1", "jpeg".
        title: the name for readers: "JPEG".
        medium: "image" or "audio".
        kind: "compand", "classical", "lossless" or "identity".
        identity: decides whether stored results are still of this codec: fingerprint of a checkpoint's weights, or
            library, version and settings.
        settings_note: one sentence on library, version and settings.
        qualities: default qualities in ascending order of rate.
        lowest, highest: range of the quality, as far as it is known before coding.
        whole: whether qualities are whole numbers.
        suffix: extension of its files.
        listed: whether `names` gives it; others must be asked for by name.
        source: the argument of `find` that gives the subject again, in another process too.
    """

    name: str
    title: str
    medium: str
    kind: str
    identity: str
    settings_note: str
    qualities: tuple[float, ...]
    lowest: float = -math.inf
    highest: float = math.inf
    whole: bool = False
    suffix: str
    listed: bool = True

    @property
    def source(self) -> str:
        """See the class."""
        return self.name

    def prepare(self) -> None:  # noqa: B027 (most subjects have nothing to load)
        """Loads what coding needs, so that the first file takes no longer than others."""

    @abstractmethod
    def encode(self, signal: Signal, quality: float) -> bytes:
        """A complete file.

        Raises:
            UsageError: the quality is out of range, or the codec cannot hold the signal.
        """

    @abstractmethod
    def decode(self, data: bytes) -> Signal:
        """The signal of a file, from its bytes alone, of the size, channels and rate that were encoded.

        Raises:
            BitstreamError, MediaError: the file is damaged.
        """

    def overhead(self, data: bytes) -> int:
        """Bytes of a file that belong to a container and carry no signal; 0 where that is not known.

        Rates count whole files. Where this is positive, a second rate without it may be stated beside the first.
        """
        return 0

    def check_quality(self, quality: float) -> None:
        """Raises UsageError for a quality that the codec is known not to have."""
        if not self.lowest <= quality <= self.highest:
            choice = f"choose {self.lowest:g} to {self.highest:g}"
            raise UsageError(f"{self.name} has no quality {quality:g}: {choice}")
        if self.whole and quality != int(quality):
            raise UsageError(f"{self.name} has no quality {quality:g}: choose a whole number")


class CompandSubject(Subject):
    """A checkpoint of compand; the model is loaded when it is first needed.

    Args:
        info: the checkpoint.
        source: what `find` was asked for, if it was a folder.
        device: as `compand.load` takes it.
    """

    kind = "compand"
    suffix = ".cpd"

    def __init__(self, info: CheckpointInfo, source: str | None = None, device: str = "auto") -> None:
        self.name = self.title = info.name
        self.medium = info.medium
        self.identity = info.weights.hex()
        self.lowest, self.highest = info.qualities
        self.qualities = tuple(map(float, range(int(self.lowest), int(self.highest) + 1)))
        size = f"{info.parameters / 1e6:.2f} M parameters, {info.size / 1e6:.2f} MB"
        self.settings_note = f"{info.description} ({info.codec}), checkpoint of {size}; quality is its level."
        self._info = info
        self._source = source
        self._device = device

    @property
    def source(self) -> str:
        """See `Subject`."""
        return self._source or self.name

    @cached_property
    def codec(self) -> Codec:
        """The loaded model."""
        from compand.weights import build

        return build(self._info, self._device)

    def prepare(self) -> None:
        """Loads the model. Raises CheckpointError if it is damaged."""
        self.codec  # noqa: B018 (a cached property)

    def encode(self, signal: Signal, quality: float) -> bytes:
        return self.codec.encode(signal, quality=quality)

    def decode(self, data: bytes) -> Signal:
        signal: Signal = self.codec.decode(data)
        return signal


_registered: dict[tuple[str, str], Callable[[], Subject]] = {}
"""Anchors of other packages, by medium and name."""


def register_anchor(name: str, factory: Callable[[], Subject], medium: str) -> None:
    """Adds an anchor, so that `find` and `names` know it. Registering the same factory again changes nothing.

    Args:
        name: its key in tables, the `name` of the subjects that the factory makes.
        factory: makes the subject without arguments, in any process that has imported the module.
        medium: "image" or "audio".

    Raises:
        UsageError: the name is taken, or the medium does not exist.
    """
    if medium not in MEDIA:
        raise UsageError(f"medium {medium} does not exist: choose image or audio")
    taken = _anchors().get((medium, name))
    if taken is not None and taken is not factory:
        raise UsageError(f"an anchor named {name} exists already: choose another name")
    _registered[medium, name] = factory


def load_plugins(modules: Sequence[str]) -> None:
    """Imports modules that register codecs (`compand.register`) or anchors (`register_anchor`).

    Raises:
        UsageError: a module is not found or fails on import.
    """
    for module in modules:
        try:
            import_module(module)
        except Exception as error:  # whatever the foreign module raises
            fact = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(
                f"plug-in {module} cannot be imported ({fact}): check its name and path"
            ) from error


def names(medium: str | None = None) -> list[str]:
    """All subjects of a medium that work here: the newest version of every shipped checkpoint, then the anchors."""
    newest = {info.family: info for info in checkpoint.available()}
    found = [info.name for info in newest.values() if medium in (None, info.medium)]
    anchors = [
        name
        for (kind, name), factory in _anchors().items()
        if medium in (None, kind) and getattr(factory, "listed", True)
    ]
    return list(dict.fromkeys(found + anchors))


def find(name: str, medium: str | None = None) -> Subject:
    """A subject by the name of an anchor, codec or checkpoint, or by the folder of a checkpoint.

    Args:
        name: what to find.
        medium: "image" or "audio"; needed only for names that both media have.

    Raises:
        UsageError: nothing of that name, or it is of the other medium, or needs a package that is not installed.
        CheckpointError: the folder is no checkpoint.
    """
    anchors = _anchors()
    media = [kind for kind in MEDIA if (kind, name) in anchors and medium in (None, kind)]
    if len(media) > 1:
        raise UsageError(f"{name} exists for images and for sounds: say which medium")
    if media:
        return anchors[media[0], name]()

    from compand.eval.anchors import MISSING

    if name in MISSING and medium in (None, MISSING[name][0]):
        raise UsageError(f"{name} is not available here: {MISSING[name][1]}")
    try:
        info = checkpoint.find(name)
    except CheckpointError:
        if Path(name).is_dir():
            raise
        raise UsageError(f"codec {name} is unknown: known are {', '.join(names(medium))}") from None
    if medium not in (None, info.medium):
        raise UsageError(f"{name} codes {info.medium}, not {medium}: leave it out")
    shipped = any(info.path == other.path for other in checkpoint.available())
    return CompandSubject(info, None if shipped else str(info.path.resolve()))


def _anchors() -> dict[tuple[str, str], Callable[[], Subject]]:
    from compand.eval.anchors import builtin

    return {**builtin(), **_registered}
