"""What takes part in a run: a codec or a peer at one quality, in one setting.

A contender is written NAME[@QUALITY][:SETTING]...: `hyperprior`, `jpeg@75`, `hyperprior@4:float32:untuned`, or, among
the peers, `mbt2018-mean@4:tuned`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from compand.errors import UsageError
from compand.eval import subjects
from compand.eval.subjects import CompandSubject, Subject

SETTINGS = {
    "bfloat16": "bfloat16 transforms",
    "float32": "float32 transforms",
    "tuned": "tuned",
    "untuned": "allocator as it comes",
}
"""Settings by name, as titles say them."""

_OURS = frozenset({"bfloat16", "float32", "untuned"})
_PEERS = frozenset({"tuned"})
_TEXT = re.compile(rf"(?P<name>.+?)(@(?P<quality>[0-9.]+))?(?P<settings>(:({'|'.join(SETTINGS)}))*)")


@dataclass(frozen=True)
class Contender:
    """One row of the tables.

    Attributes:
        name: what `compand.eval.subjects.find` takes, or a model of compressai.
        suffix: what was written behind the name.
        peer: whether it is one of compressai.
        quality: the quality; None: the middle one of the codec's grid.
        settings: names of SETTINGS. Without any, a codec of compand runs as the command line runs it: allocator tuned,
            bfloat16 where the device is faster with it; a peer runs as it comes.
    """

    name: str
    suffix: str = ""
    peer: bool = False
    quality: float | None = None
    settings: tuple[str, ...] = ()

    @property
    def reduced(self) -> bool | None:
        """Whether transforms run in bfloat16; None where no setting says so."""
        if "bfloat16" in self.settings:
            return True
        return False if "float32" in self.settings else None

    @property
    def tuned(self) -> bool:
        """Whether its process calls `compand.allocator.tune_allocator`."""
        return "tuned" in self.settings if self.peer else "untuned" not in self.settings

    def subject(self, medium: str, device: str) -> Subject:
        """The codec, with its model not loaded yet.

        Args:
            medium: "image" or "audio".
            device: of codecs of compand and of peers, as `compand.load` takes it.

        Raises:
            UsageError: there is none of that name or medium, or it does not have these settings.
        """
        if self.peer:
            from compand.eval.speed.peers import Peer

            self._check(_PEERS)
            return Peer(self.name, tuned="tuned" in self.settings, device=device)
        subject = subjects.find(self.name, medium)
        self._check(_OURS if isinstance(subject, CompandSubject) else frozenset())
        return subject

    def text_for(self, name: str) -> str:
        """The text that means this contender, with another name for its codec."""
        return f"{name}{self.suffix}"

    def title(self, subject: Subject) -> str:
        """The name for readers."""
        words = [SETTINGS[setting] for setting in self.settings]
        if self.peer and not words:
            words = ["as it comes"]
        return ", ".join([subject.title, *words])

    def _check(self, allowed: frozenset[str]) -> None:
        wrong = [setting for setting in self.settings if setting not in allowed]
        if wrong:
            fact = f"its settings are {', '.join(sorted(allowed))}" if allowed else "it has no settings"
            raise UsageError(f"{self.name} cannot be timed as {wrong[0]}: {fact}")


def parse(text: str, *, peer: bool = False) -> Contender:
    """A contender from its text. Raises UsageError if it has no name, or settings that exclude each other."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} names no codec: write NAME, NAME@QUALITY or NAME@QUALITY:SETTING")
    settings = tuple(filter(None, match["settings"].split(":")))
    if len(set(settings)) < len(settings) or {"bfloat16", "float32"} <= set(settings):
        raise UsageError(f"settings of {text} exclude each other: give one of them")
    try:
        quality = None if match["quality"] is None else float(match["quality"])
    except ValueError:
        raise UsageError(f"{match['quality']} in {text} is no quality: give a number") from None
    return Contender(match["name"], text[match.end("name") :], peer, quality, settings)


def middle_quality(subject: Subject) -> float:
    """The middle quality of a codec's grid, the lower one of two."""
    return subject.qualities[(len(subject.qualities) - 1) // 2]
