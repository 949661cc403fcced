"""The tables of a report: which figures stand in them, with how many digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from compand.eval.report.results import Codec, Results, number

SPACE = "\N{NO-BREAK SPACE}"
"""Stands between a figure and its unit."""

_LONG = 24  # rows from which on a table scrolls in a box of its own
_DIGITS = 4  # significant ones of a column's median


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    value: float | None = None  # what numeric columns are sorted by
    strong: bool = False


class Table(NamedTuple):
    """A table; its first column names the row."""

    name: str  # id in the page
    title: str
    note: str  # what a reader must know beside it; "" for nothing
    columns: Sequence[tuple[str, bool]]  # header, and whether its cells are figures
    rows: Sequence[Sequence[Cell]]

    @property
    def long(self) -> bool:
        return len(self.rows) > _LONG


# ----------------------------------------------------------------------------------------------- figures


def decimals(values: Iterable[float | None]) -> int:
    """Digits after the point that show four significant digits of the median.

    >>> decimals([27.1, 35.2, 41.9]), decimals([0.91, 0.99]), decimals([12000.0]), decimals([])
    (2, 4, 0, 0)
    """
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and value]
    if not sizes:
        return 0
    middle = median(sizes)
    before = math.floor(math.log10(middle)) + 1 if middle >= 1 else 0
    return max(0, _DIGITS - before)


def shown(value: float | None, places: int, *, sign: bool = False) -> str:
    """A figure for people; "" where there is none.

    >>> shown(1234.5, 1), shown(3.25, 1, sign=True), shown(float("inf"), 2), shown(None, 2)
    ('1,234.5', '+3.2', '∞', '')
    """
    if value is None:
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:{'+' if sign else ''},.{places}f}"


def _column(values: Sequence[float | None], places: int | None = None, *, sign: bool = False) -> list[Cell]:
    """Cells of one column with the same number of decimals."""
    places = decimals(values) if places is None else places
    return [Cell(shown(value, places, sign=sign), value) for value in values]


def _whole(values: Iterable[Any]) -> list[Cell]:
    return _column([number(value) for value in values], 0)


def _significant(values: Sequence[float | None]) -> list[Cell]:
    """Cells with three significant digits each, for columns that span orders of magnitude."""
    return [Cell(_three(value), value) for value in values]


def _three(value: float | None) -> str:
    """A figure with three significant digits; more before the point.

    >>> _three(0.00465), _three(28.0), _three(103.2), _three(1553.7)
    ('0.00465', '28.0', '103', '1,554')
    """
    if value is None or math.isinf(value) or abs(value) >= 1000:
        return shown(value, 0)
    return f"{value:#.3g}".rstrip(".")


def _ranges(ends: Iterable[tuple[Any, Any]], places: int | None = None) -> list[Cell]:
    """Cells "LOW to HIGH", empty where an end is missing; with that many decimals, else three significant digits."""
    text = _three if places is None else partial(shown, places=places)
    pairs = [(number(low), number(high)) for low, high in ends]
    return [
        Cell("" if low is None or high is None else f"{text(low)} to {text(high)}", low)
        for low, high in pairs
    ]


def general(value: Any) -> Cell:
    """A cell for a value whose meaning is not known."""
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return Cell("" if value is None else str(value))
    if isinstance(value, (int, float)):
        return Cell(f"{value:.4g}", number(value))
    return Cell(", ".join(general(entry).text for entry in value))


# ------------------------------------------------------------------------------------------------ tables


def of_results(results: Results) -> list[Table]:
    """All tables of figures that are not empty, in the order of the page."""
    found = [
        *_deltas(results),
        _correlations(results),
        _pairs(results),
        _training(results),
        _speed(results),
        _ratios(results),
        _stages(results),
        _memory(results),
        points(results) if results.kind != "speed" else None,
    ]
    return [table for table in found if table and table.rows]


class _Builder:
    """Collects columns, and makes them a table."""

    def __init__(self, names: Sequence[Cell], header: str) -> None:
        self._columns: list[tuple[str, bool]] = [(header, False)]
        self._cells: list[Sequence[Cell]] = [names]

    def figures(self, header: str, cells: Sequence[Cell]) -> None:
        """Add a column of figures, unless it is empty."""
        self._add(header, True, cells)

    def texts(self, header: str, texts: Sequence[str]) -> None:
        """Add a column of texts, unless it is empty."""
        self._add(header, False, [Cell(text) for text in texts])

    def _add(self, header: str, numeric: bool, cells: Sequence[Cell]) -> None:
        if any(cell.text for cell in cells):
            # A unit stays on the line of its quantity.
            self._columns.append((header.replace(", ", f",{SPACE}"), numeric))
            self._cells.append(cells)

    def table(self, name: str, title: str, note: str = "") -> Table:
        return Table(name, title, note, self._columns, list(zip(*self._cells, strict=True)))


def _named(codecs: Iterable[Codec]) -> list[Cell]:
    return [Cell(codec.title, strong=codec.ours) for codec in codecs]


def points(results: Results, *, published: bool = False) -> Table:
    """Every point of the measured codecs, or of the published curves."""
    pairs = [
        (codec, point)
        for codec in results.codecs.values()
        if codec.published == published
        for point in codec.points
    ]
    builder = _Builder(_named(codec for codec, _ in pairs), "codec")

    def values(key: str) -> list[float | None]:
        return [number(point.get(key)) for _, point in pairs]

    qualities = values("quality")
    builder.figures(
        "quality", [Cell("" if quality is None else f"{quality:g}", quality) for quality in qualities]
    )
    builder.figures("items", _whole(values("items")))
    builder.figures(results.rate_unit, _column(values(results.rate)))
    builder.figures(f"{results.rate_unit} without container", _column(values(f"{results.rate}_payload")))
    builder.figures("bytes an item", _whole(values("bytes")))
    fewer = False
    for metric in results.metrics:
        cells = _column(values(metric.name))
        counts = values(f"{metric.name}_items")
        fewer = fewer or any(counts)
        builder.figures(
            metric.label,
            [
                cell._replace(text=f"{cell.text} ({count:.0f})") if count else cell
                for cell, count in zip(cells, counts, strict=True)
            ],
        )
    if results.score:
        builder.figures(results.score.title, _column(values("score")))
        fields = [point for _, point in pairs]
        builder.figures("95 % interval", _intervals(fields, "score_", 3))
        builder.figures("score drop", _column(values("score_drop"), 4))
        builder.figures("95 % interval", _intervals(fields, "score_drop_", 3))
    if published:
        return builder.table("published-points", "Published points")
    note = "Means over the items."
    if fewer:
        note += " In brackets: how many of the items have the metric, where it is not all."
    return builder.table("points", "Points", note)


def _deltas(results: Results) -> list[Table]:
    tables = []
    for place, delta in enumerate(results.deltas, start=1):
        metric = results.metric(delta["metric"])
        metric = metric._replace(unit=delta.get("unit", metric.unit))  # averaged on a scale of its own
        rows = [row for row in delta["rows"] if row["codec"] != delta["anchor"]]
        builder = _Builder(_named(_codec(results, row["codec"]) for row in rows), "codec")
        builder.figures("BD-rate, %", _column([number(row.get("bd_rate")) for row in rows], 1, sign=True))
        qualities = [number(row.get("bd_psnr")) for row in rows]
        builder.figures(f"BD-{metric.label}", _column(qualities, 2 if metric.unit else 4, sign=True))
        ends = [(number(row.get("low")), number(row.get("high"))) for row in rows]
        builder.figures(
            f"overlap, {metric.label}", _ranges(ends, decimals(end for pair in ends for end in pair))
        )
        builder.texts("remark", [row.get("reason") or "" for row in rows])
        note = (
            f"Against {results.codec_title(delta['anchor'])}, averaged over the {metric.title} that both reach "
            "(overlap). A negative BD-rate means fewer bits at equal quality."
        )
        title = f"Bjontegaard deltas, {metric.title}"
        tables.append(builder.table("bd" if place == 1 else f"bd-{place}", title, note))
    return tables


def _codec(results: Results, name: str) -> Codec:
    return results.codecs.get(name) or Codec(name, name, "")


def _correlations(results: Results) -> Table:
    perception = results.perception or {}
    rows = [row for row in perception.get("spearman") or () if number(row.get("rho")) is not None]
    builder = _Builder([Cell(results.metric(row["metric"]).title) for row in rows], "metric")
    builder.figures("Spearman ρ", _column([number(row["rho"]) for row in rows], 3))
    builder.figures("95 % interval", _intervals(rows, "", 3))
    reference = next((row["against"] for row in rows if row.get("against")), None)
    if reference is not None:
        header = f"ρ less that of {results.metric(reference).title}"
        builder.figures(header, _column([number(row.get("against_value")) for row in rows], 3, sign=True))
        builder.figures("95 % interval", _intervals(rows, "against_", 3))
    builder.figures("points", _whole(row.get("points") for row in rows))
    return builder.table("correlations", "Metrics against the score drop", _note(perception, "spearman_sign"))


def _intervals(rows: Iterable[Mapping[str, Any]], prefix: str, places: int) -> list[Cell]:
    return [interval(row, prefix, places) for row in rows]


def interval(fields: Mapping[str, Any], prefix: str, places: int) -> Cell:
    """A cell for the fields `low` and `high`, after a prefix."""
    return _ranges([(fields.get(f"{prefix}low"), fields.get(f"{prefix}high"))], places)[0]


def _note(fields: Mapping[str, Any], key: str) -> str:
    text = str(fields.get(key) or "")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _pairs(results: Results) -> Table:
    perception = results.perception or {}
    rows = list(perception.get("pairs") or ())
    builder = _Builder([Cell(str(row["a"])) for row in rows], "a")
    builder.texts("b", [str(row["b"]) for row in rows])
    for key, header in (("rate", results.rate_unit), ("score", "score")):
        for side in ("a", "b"):
            builder.figures(
                f"{header} of {side}", _column([number(row.get(f"{key}_{side}")) for row in rows])
            )
    _comparisons(builder, rows)
    return builder.table("pairs", "Pairs on the same items", _note(perception, "pairs_difference"))


def _comparisons(builder: _Builder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Columns of a paired comparison."""
    builder.figures("difference", _column([number(row.get("difference")) for row in rows], 4, sign=True))
    builder.figures("95 % interval", _intervals(rows, "", 4))
    for key, header in (("p", "p"), ("p_adjusted", "p adjusted")):
        chances = [number(row.get(key)) for row in rows]
        builder.figures(header, [Cell("" if p is None else f"{p:.2g}", p) for p in chances])
    builder.texts("test", [str(row.get("test") or "") for row in rows])


def _training(results: Results) -> Table:
    rows = list((results.perception or {}).get("lossy_training") or ())
    builder = _Builder([Cell(str(row["model"])) for row in rows], "model")
    builder.texts("trained on", [str(row.get("trained_on") or "") for row in rows])
    builder.texts("judged on", [results.codec_title(str(row.get("codec") or "")) for row in rows])
    builder.figures("quality", [general(row.get("quality")) for row in rows])
    builder.figures(results.rate_unit, _column([number(row.get("rate")) for row in rows]))
    builder.figures("score", _column([number(row.get("score")) for row in rows]))
    builder.figures("95 % interval", _intervals(rows, "score_", 3))
    builder.figures("score of the task model", _column([number(row.get("reference")) for row in rows]))
    _comparisons(builder, rows)
    note = "Difference: score of this model less that of the task model, on the same items."
    return builder.table("training", "Models trained on lossy items", note)


def words(key: str) -> str:
    """A key for people."""
    return key.replace("_", " ")


def _timed(results: Results) -> list[tuple[Codec, Mapping[str, Any]]]:
    return [(codec, codec.speed) for codec in results.codecs.values() if codec.speed]


def _directions(
    timed: Sequence[tuple[Codec, Mapping[str, Any]]], figure: Callable[[Mapping[str, Any], str], Any]
) -> Iterable[tuple[str, list[Any]]]:
    """A figure of every codec for both directions."""
    for direction in ("encode", "decode"):
        yield direction, [figure(speed, direction) for _, speed in timed]


def _speed(results: Results) -> Table | None:
    timed = _timed(results)
    unit = (results.speed or {}).get("unit", "")
    builder = _Builder(_named(codec for codec, _ in timed), "codec")
    builder.figures("quality", [general(speed.get("quality")) for _, speed in timed])
    builder.figures("bytes", _whole(speed.get("bytes") for _, speed in timed))
    for direction, entries in _directions(timed, lambda speed, direction: speed.get(direction) or {}):
        builder.figures(
            f"{direction}, {unit}", _significant([number(entry.get("median")) for entry in entries])
        )
        builder.figures("middle half", _ranges((entry.get("q1"), entry.get("q3")) for entry in entries))
    for direction, times in _directions(
        timed, lambda speed, direction: (speed.get("milliseconds") or {}).get(direction)
    ):
        builder.figures(f"{direction}, ms an item", _significant([number(time) for time in times]))
    counts = [number((speed.get("encode") or {}).get("repetitions")) for _, speed in timed]
    builder.figures("repetitions", _whole(counts))
    return builder.table("speed", "Speed", "Medians.")


def _ratios(results: Results) -> Table | None:
    timed = _timed(results)
    reference = (results.speed or {}).get("reference")
    if not reference:
        return None
    builder = _Builder(_named(codec for codec, _ in timed), "codec")
    for direction, ratios in _directions(timed, lambda speed, direction: speed.get(f"ratio_{direction}")):
        builder.figures(direction, _significant([number(ratio) for ratio in ratios]))
        ends = [speed.get(f"ratio_{direction}_range") or (None, None) for _, speed in timed]
        builder.figures("lowest to highest round", _ranges(ends))
    note = f"Times as fast as {results.codec_title(reference)}, measured in the same rounds."
    return builder.table("ratios", "Ratios", note)


def _stages(results: Results) -> Table | None:
    timed = _timed(results)
    entries = [
        (codec, direction, (speed.get("stages") or {}).get(direction) or {})
        for codec, speed in timed
        for direction in ("encode", "decode")
    ]
    builder = _Builder(_named(codec for codec, _, _ in entries), "codec")
    builder.texts("direction", [direction for _, direction, _ in entries])
    for stage in (results.speed or {}).get("stage_names") or ():
        builder.figures(words(stage), _significant([number(stages.get(stage)) for _, _, stages in entries]))
    return builder.table("stages", "Stages, ms an item", "")


def _memory(results: Results) -> Table | None:
    timed = _timed(results)
    builder = _Builder(_named(codec for codec, _ in timed), "codec")
    for key, header in (
        ("peak_rss_mb", "resident memory at its highest, MB"),
        ("baseline_rss_mb", "after loading, before coding, MB"),
        ("peak_gpu_mb", "GPU memory at its highest, MB"),
    ):
        builder.figures(header, _column([number(speed.get(key)) for _, speed in timed], 0))
    return builder.table("memory", "Memory", "Of the process of each codec.")


def codecs(results: Results) -> Table:
    """What each codec is, and the sources of published curves."""
    found = list(results.codecs.values())
    builder = _Builder(_named(found), "codec")
    builder.texts("kind", ["published" if codec.published else codec.kind for codec in found])
    builder.texts("settings or source", [codec.note for codec in found])
    return builder.table("codecs", "Codecs", "")


def problems(results: Results) -> Table:
    """What could not be measured."""
    found = results.problems
    builder = _Builder([Cell(str(problem.get("item") or "")) for problem in found], "item")
    builder.texts("codec", [results.codec_title(str(problem.get("codec") or "")) for problem in found])
    builder.figures("quality", [general(problem.get("quality")) for problem in found])
    builder.texts("problem", [str(problem["message"]) for problem in found])
    return builder.table("problems", "Problems", "")
