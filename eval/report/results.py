"""The results of a run as the report reads them: what results.json says, with every figure a finite float or absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from compand.errors import UsageError

RESULTS = "results.json"

RATES = {"image": ("bpp", "bpp"), "audio": ("kbps", "kbit/s")}
"""By medium: the field of the rate, and its unit."""

PUBLISHED = " (published)"
"""What titles of published curves end in."""

LOSSLESS = frozenset({"lossless", "identity"})
"""Kinds of codecs that restore the original itself."""


class Metric(NamedTuple):
    """A distortion metric, or the score of a task."""

    name: str
    title: str
    unit: str = ""  # "" where it has none
    better: str = "higher"  # or "lower"

    @property
    def label(self) -> str:
        """Title and unit, for axes and headers."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Codec:
    """One codec of the summary.

    Attributes:
        name: key in the summary.
        title: for people; tells a published curve from a measured one.
        kind: "compand", "classical", "lossless", "identity", "peer", ...
        note: library, version and settings, or the source of a published curve.
        published: whether its points were copied from others.
        points: one dictionary a quality, as the summary has them, in ascending rate.
        speed: what `compand eval speed` measured, or None.
    """

    name: str
    title: str
    kind: str
    note: str = ""
    published: bool = False
    points: Sequence[Mapping[str, Any]] = ()
    speed: Mapping[str, Any] | None = None

    @property
    def ours(self) -> bool:
        """Whether the codec is one of compand's."""
        return self.kind == "compand"

    @property
    def lossless(self) -> bool:
        """Whether the codec restores the original itself."""
        return self.kind in LOSSLESS

    def curve(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """The points that have finite values of both fields, in the order of `points`."""
        pairs = [(number(point.get(x)), number(point.get(y))) for point in self.points]
        finite = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a + b)]
        return [a for a, _ in finite], [b for _, b in finite]


@dataclass(frozen=True)
class Results:
    """A results.json: summary, measurements and their origin."""

    kind: str  # "rd", "perception" or "speed"
    title: str
    medium: str  # "image" or "audio"
    data: str  # in a few words
    codecs: Mapping[str, Codec]
    metrics: Sequence[Metric] = ()
    deltas: Sequence[Mapping[str, Any]] = ()  # Bjontegaard's, one entry a metric
    perception: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None
    problems: Sequence[Mapping[str, Any]] = ()
    notices: Sequence[str] = ()
    examples: Mapping[str, str] = field(default_factory=dict)  # folders below the results, by item
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()

    @property
    def rate(self) -> str:
        """The field that holds the rate: "bpp" or "kbps"."""
        return RATES[self.medium][0]

    @property
    def rate_unit(self) -> str:
        return RATES[self.medium][1]

    @property
    def score(self) -> Metric | None:
        """The score of a perception task."""
        return Metric("score", str(self.perception["score"])) if self.perception else None

    def metric(self, name: str) -> Metric:
        """The metric of that name; one that the summary does not describe goes by its name."""
        return next((metric for metric in self.metrics if metric.name == name), Metric(name, name))

    def codec_title(self, name: str) -> str:
        """Title of a codec of the summary; a name that it does not have stays as it is."""
        return self.codecs[name].title if name in self.codecs else name


def read_results(out: Path) -> Results:
    """Read OUT/results.json.

    Raises:
        UsageError: there is none, or it is not what an evaluation writes.
    """
    path = out / RESULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: name the folder of a finished evaluation") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): repeat the evaluation") from None
    try:
        return _results(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fact = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} is not the result of an evaluation ({fact}): repeat it") from None


def number(value: Any) -> float | None:
    """A figure of the summary as a float, "inf" included; None where there is none.

    >>> number("inf"), number(3), number(None), number("nan")
    (inf, 3.0, None, None)
    """
    if value is None or isinstance(value, bool):
        return None
    value = float(value)
    return None if math.isnan(value) else value


def _results(content: Mapping[str, Any]) -> Results:
    summary = content["summary"]
    if summary["medium"] not in RATES:
        raise ValueError(f"medium {summary['medium']!r}")
    rate = RATES[summary["medium"]][0]
    return Results(
        kind=summary["kind"],
        title=summary["title"],
        medium=summary["medium"],
        data=summary["data"],
        codecs={name: _codec(name, fields, rate) for name, fields in summary["codecs"].items()},
        metrics=[
            Metric(entry["name"], entry["title"], entry.get("unit") or "", entry["better"])
            for entry in summary.get("metrics") or ()
        ],
        deltas=[entry for entry in (summary.get("bd"), *(summary.get("bd_others") or ())) if entry],
        perception=summary.get("perception"),
        speed=summary.get("speed"),
        problems=summary.get("problems") or (),
        notices=summary.get("notices") or (),
        examples={entry["item"]: entry["folder"] for entry in summary.get("examples") or ()},
        provenance=content.get("provenance") or {},
        rows=content.get("rows") or (),
    )


def _codec(name: str, fields: Mapping[str, Any], rate: str) -> Codec:
    title, published = str(fields["title"]), bool(fields.get("published"))
    if published and not title.endswith(PUBLISHED):
        title += PUBLISHED
    return Codec(
        name=name,
        title=title,
        kind=fields["kind"],
        note=fields.get("note") or "",
        published=published,
        points=sorted(fields.get("points") or (), key=lambda point: number(point.get(rate)) or 0.0),
        speed=fields.get("speed"),
    )
