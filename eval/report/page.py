"""The page: one HTML file with tables, plots and examples, that loads nothing from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compand.eval.report import tables
from compand.eval.report.examples import Example, Medium, Selection, Version
from compand.eval.report.plots import DARK, Plot
from compand.eval.report.results import Metric, Results, number
from compand.eval.report.tables import SPACE, decimals, general, interval, shown, words

_TEMPLATES = Path(__file__).parent / "templates"


def render(results: Results, plots: Sequence[Plot], selection: Selection) -> str:
    """The page as HTML.

    Every text that comes from the results is escaped. Pictures, sounds and plots are data: URIs.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    template = environment.get_template("page.html")
    return template.render(
        results=results,
        style=_asset("page.css"),
        script=_asset("page.js"),
        plots=[(plot, svg_uri(plot.svg()), svg_uri(plot.svg(DARK))) for plot in plots],
        facts=_facts(results),
        findings=list((results.perception or {}).get("findings") or ()),
        conditions=list((results.speed or {}).get("conditions") or ()),
        tables=tables.of_results(results),
        published=tables.points(results, published=True),
        codecs=tables.codecs(results),
        problems=tables.problems(results),
        selection=selection,
        viewer=_viewer(results, selection.examples),
        provenance=_flat(results.provenance),
    )


def data_uri(medium: Medium) -> str:
    """A file as an address that contains it."""
    return f"data:{medium.kind};base64,{base64.b64encode(medium.content).decode('ascii')}"


def svg_uri(content: bytes) -> str:
    """An SVG file as an address that contains it."""
    return data_uri(Medium("image/svg+xml", content))


def _asset(name: str) -> Markup:
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------- facts and examples


def _facts(results: Results) -> list[tuple[str, str]]:
    """What was measured, as terms and their descriptions."""
    facts = [("data", results.data)]
    if results.provenance.get("date"):
        facts.append(("date", str(results.provenance["date"]).partition("T")[0]))
    if results.perception:
        baseline = number(results.perception.get("baseline"))
        ends = interval(results.perception, "baseline_", 3).text
        facts += [("task", str(results.perception["task"])), ("model", str(results.perception["model"]))]
        if baseline is not None:
            text = f"{shown(baseline, 4)}{f' (95 % interval {ends})' if ends else ''}"
            facts.append((f"{results.perception['score']} on originals", text))
    if results.speed:
        known = ("device", "threads", "rounds", "repetitions", "warm_up", "items")
        facts += [(words(key), general(results.speed[key]).text) for key in known if key in results.speed]
    return facts


def _flat(entries: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Terms and descriptions of nested dictionaries; a dictionary of texts alone becomes one description."""
    found = []
    for key, value in entries.items():
        name = f"{prefix}{words(str(key))}"
        if isinstance(value, Mapping):
            if all(isinstance(entry, str) for entry in value.values()):
                found.append((name, ", ".join(f"{package} {version}" for package, version in value.items())))
            else:
                found += _flat(value, f"{name}: ")
        elif isinstance(value, Sequence) and any(isinstance(entry, Mapping) for entry in value):
            for place, entry in enumerate(value, start=1):
                found += _flat(entry, f"{name} {place}: ")
        elif value is not None:
            found.append((name, general(value).text))
    return found


def _viewer(results: Results, examples: Sequence[Example]) -> dict[str, Any]:
    """What the script of the page knows of the examples."""
    places = {
        metric.name: decimals(
            version.figures.get(metric.name) for example in examples for version in example.versions
        )
        for metric in results.metrics
    }
    return {
        "medium": results.medium,
        "unit": results.rate_unit,
        "examples": [
            {
                "item": example.item,
                "note": example.note,
                "frequency": example.frequency,
                "seconds": example.seconds,
                "rates": example.rates,
                "versions": [
                    {
                        "codec": version.codec,
                        "title": results.codec_title(version.codec),
                        "quality": f"{version.quality:g}",
                        "rate": version.rate,
                        "figures": _figures(version, results.metrics, places),
                    }
                    for version in example.versions
                ],
            }
            for example in examples
        ],
    }


def _figures(version: Version, metrics: Iterable[Metric], places: Mapping[str, int]) -> list[str]:
    return [
        SPACE.join(
            filter(
                None, (metric.title, shown(version.figures[metric.name], places[metric.name]), metric.unit)
            )
        )
        for metric in metrics
        if metric.name in version.figures
    ] + [f"{version.size:,}{SPACE}bytes"]
