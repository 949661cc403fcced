"""The report: what its plots and its page say, that the page holds everything, and that a browser can work it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure
from PIL import Image

from compand.errors import CompandError, MediaError, UsageError
from compand.eval import cli
from compand.eval.report import MEGABYTES, PAGE, write
from compand.eval.report import examples as examples_module
from compand.eval.report.examples import ORIGINAL, REGION, SECONDS, select
from compand.eval.report.page import _flat
from compand.eval.report.plots import DARK, LIGHT, looks, plots
from compand.eval.report.results import PUBLISHED, Codec, Metric, Results, read_results
from compand.eval.report.tables import decimals, shown

ROOT = Path(__file__).parents[2]
HOSTILE = "a <b>&\"c' $x_1$ </script><script>alert(1)</script>"
PSNR = {"name": "psnr", "title": "PSNR", "unit": "dB", "better": "higher"}
NEW = {"name": "brand_new", "title": "Brand-new metric", "unit": "", "better": "lower"}
VOID = {"meta", "link", "img", "input", "br", "source"}


# --------------------------------------------------------------------------------------- results to draw


def stored(out: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    origin = {"command": "compand eval rd x", "date": "2025-01-31T10:00:00+00:00", "versions": {"numpy": "1"}}
    content = {"provenance": origin, "schema": 1, "summary": summary, "rows": rows}
    out.mkdir(exist_ok=True)
    (out / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return out


def changed(out: Path, change: Any) -> None:
    path = out / "results.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content["summary"])
    path.write_text(json.dumps(content), encoding="utf-8")


def coded(pixels: np.ndarray, kind: str, quality: int) -> tuple[int, np.ndarray]:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, quality=quality)
    with Image.open(stream) as image:
        return stream.tell(), np.asarray(image.convert("RGB"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def summarised(rows: list[dict[str, Any]], name: str, **fields: Any) -> dict[str, Any]:
    points = []
    for quality in sorted({row["quality"] for row in rows if row["codec"] == name}):
        group = [row for row in rows if row["codec"] == name and row["quality"] == quality]
        keys = [key for key in ("bytes", "bpp", "kbps", "psnr", "si_sdr", "brand_new") if key in group[0]]
        means = {key: float(np.mean([row[key] for row in group])) for key in keys}
        points.append({"quality": quality, "items": len(group), **means})
    return {"published": False, "note": f"{name}, as it comes", "points": points} | fields


def make_images(out: Path, photographs: dict[str, Path], size: tuple[int, int] = (200, 300)) -> Path:
    """Results of two real codecs on parts of photographs."""
    rows, kept = [], []
    for place, (item, path) in enumerate(photographs.items()):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))[: size[0], : size[1]]
        folder = out / "examples" / str(place)
        folder.mkdir(parents=True)
        kept.append({"item": item, "folder": f"examples/{place}"})
        Image.fromarray(pixels).save(folder / f"{ORIGINAL}.png")
        for codec, kind in {"jpeg": "JPEG", "ours-v1": "WEBP"}.items():
            for quality in (10, 40, 70, 95):
                length, decoded = coded(pixels, kind, quality)
                Image.fromarray(decoded).save(folder / f"{codec}-{quality}.png")
                rows.append(
                    {
                        "item": item,
                        "medium": "image",
                        "codec": codec,
                        "quality": quality,
                        "bytes": length,
                        "bpp": 8 * length / (pixels.shape[0] * pixels.shape[1]),
                        "height": pixels.shape[0],
                        "width": pixels.shape[1],
                        "psnr": psnr(pixels, decoded),
                        "brand_new": 1 / length,
                    }
                )
    published = {
        "title": "JPEG",
        "kind": "published",
        "published": True,
        "note": "somewhere/results.json",
        "points": [{"quality": None, "bpp": rate, "psnr": 20 + 9 * rate} for rate in (0.5, 1.0, 9.0)],
    }
    exact = {"quality": 9, "items": len(kept), "bpp": 14.2, "bytes": 99, "psnr": "inf", "brand_new": 0.0}
    summary = {
        "kind": "rd",
        "title": "Rate and distortion on photographs",
        "medium": "image",
        "data": f"{len(kept)} items of photographs",
        "codecs": {
            "jpeg": summarised(rows, "jpeg", title="JPEG", kind="classical"),
            "ours-v1": summarised(rows, "ours-v1", title=f"_{HOSTILE}", kind="compand"),
            "png": {"title": "PNG", "kind": "lossless", "published": False, "note": "", "points": [exact]},
            "jpeg-published": published,
        },
        "metrics": [PSNR, NEW],
        "bd": {
            "anchor": "jpeg-published",
            "metric": "psnr",
            "unit": "dB",
            "rows": [
                {
                    "codec": "ours-v1",
                    "bd_rate": -31.25,
                    "bd_psnr": 2.5,
                    "low": 25.0,
                    "high": 38.5,
                    "reason": None,
                },
                {"codec": "png", "bd_rate": None, "bd_psnr": None, "reason": "fewer than two lossy points"},
            ],
        },
        "bd_others": [
            {
                "anchor": "jpeg",
                "metric": "brand_new",
                "unit": "dB",
                "rows": [{"codec": "ours-v1", "bd_rate": 7.125, "bd_psnr": -0.5, "low": 3, "high": 4}],
            }
        ],
        "examples": kept,
        "problems": [{"item": HOSTILE, "codec": "jpeg", "quality": 10, "message": "cannot be read"}],
        "notices": [f"left out: {HOSTILE}"],
    }
    return stored(out, summary, rows)


def make_sounds(out: Path, seconds: float = 7.0, rate: int = 16_000) -> Path:
    """Results of real codecs on a rising tone that is loud from 1.5 s to 6.5 s."""
    time = np.arange(int(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (400 * time + 150 * time**2)) * np.where(abs(time - 4) <= 2.5, 0.5, 0.02)
    samples = np.stack([tone, 0.5 * tone])
    folder = out / "examples" / "tone"
    folder.mkdir(parents=True)
    soundfile.write(folder / f"{ORIGINAL}.flac", samples.T, rate, subtype="PCM_16")
    rows = []
    for codec, kind in {"vorbis": "VORBIS", "opus": "OPUS"}.items():
        for quality in (0.1, 0.5, 0.9):
            stream = io.BytesIO()
            soundfile.write(
                stream, samples.T, rate, format="OGG", subtype=kind, compression_level=1 - quality
            )
            size = stream.tell()
            stream.seek(0)
            decoded, _ = soundfile.read(stream, always_2d=True)
            soundfile.write(folder / f"{codec}-{quality}.flac", decoded, rate, subtype="PCM_16")
            noise = np.square(decoded - samples.T[: len(decoded)]).mean()
            rows.append(
                {
                    "item": "tone.wav",
                    "medium": "audio",
                    "codec": codec,
                    "quality": quality,
                    "bytes": size,
                    "kbps": 8 * size / seconds / 1000,
                    "seconds": seconds,
                    "rate": rate,
                    "channels": 2,
                    "si_sdr": float(10 * np.log10(np.square(samples).mean() / noise)),
                }
            )
    codecs = {name: summarised(rows, name, title=name, kind="classical") for name in ("vorbis", "opus")}
    for point in codecs["opus"]["points"]:
        point["kbps_payload"] = 0.875 * point["kbps"]
    summary = {
        "kind": "rd",
        "title": "Sounds",
        "medium": "audio",
        "data": "1 item",
        "codecs": codecs,
        "metrics": [{"name": "si_sdr", "title": "SI-SDR", "unit": "dB", "better": "higher"}],
        "bd": None,
        "examples": [{"item": "tone.wav", "folder": "examples/tone"}],
        "problems": [],
        "notices": [],
    }
    return stored(out, summary, rows)


def add_perception(summary: dict[str, Any]) -> None:
    """Turn a summary of rate and distortion into one of a task."""
    for codec in summary["codecs"].values():
        for place, point in enumerate(codec["points"]):
            score = 0.6 + 0.05 * place
            point |= {"score": score, "score_low": score - 0.03, "score_high": score + 0.03}
            point |= {"score_drop": 0.8 - score, "score_drop_low": 0.01, "score_drop_high": 0.21}
    interval = {"low": -0.0625, "high": 0.125}
    test = {"p": 0.0401, "p_adjusted": 0.0802, "test": "McNemar exact"}
    summary |= {
        "kind": "perception",
        "perception": {
            "task": "shapes",
            "score": "top-1 accuracy",
            "model": "shapes-v1",
            "baseline": 0.8,
            "baseline_low": 0.775,
            "baseline_high": 0.825,
            "spearman_sign": "+1: more distortion goes with a larger drop",
            "spearman": [
                {"metric": "psnr", "rho": 0.91, "low": 0.8, "high": 0.97, "points": 8},
                {
                    "metric": "brand_new",
                    "rho": 0.5,
                    "low": 0.1,
                    "high": 0.7,
                    "points": 8,
                    "against": "psnr",
                    "against_value": -0.41,
                    "against_low": -0.6,
                    "against_high": -0.2,
                },
            ],
            "pairs": [
                {"a": "jpeg q10", "b": "ours-v1 q10", "rate_a": 0.5, "rate_b": 0.51, "difference": 0.03125}
            ],
            "lossy_training": [
                {
                    "model": "shapes-jpeg10",
                    "trained_on": "jpeg q10",
                    "codec": "undamaged",
                    "quality": None,
                    "rate": None,
                    "score": 0.75,
                    "score_low": 0.7,
                    "score_high": 0.79,
                    "reference": 0.8,
                    "difference": -0.05,
                }
            ],
            "findings": ["The first finding holds: <0.1 bpp."],
        },
    }
    summary["perception"]["pairs"][0] |= interval | test
    summary["perception"]["lossy_training"][0] |= interval | test


def speed_of(scale: float, stages: dict[str, float]) -> dict[str, Any]:
    figures = {
        "median": 3.31 * scale,
        "q1": 3.1 * scale,
        "q3": 3.5 * scale,
        "unit": "MP/s",
        "repetitions": 27,
    }
    return {
        "quality": 4,
        "bytes": 40256,
        "encode": figures,
        "decode": figures,
        "milliseconds": {"encode": 118.6 / scale, "decode": 118.6 / scale},
        "stages": {"encode": stages, "decode": stages},
        "peak_rss_mb": 812.0,
        "baseline_rss_mb": None,
        "peak_gpu_mb": None,
        "ratio_encode": scale,
        "ratio_decode": scale,
        "ratio_encode_range": [0.9 * scale, 1.1 * scale],
        "ratio_decode_range": [0.9 * scale, 1.1 * scale],
    }


def make_speed(out: Path) -> Path:
    split = {"transform": 80.0, "prior": 28.0, "entropy_coding": 4.5, "io": 0.5, "other": 5.0}
    entry = {"note": "", "published": False, "points": []}
    summary = {
        "kind": "speed",
        "title": "Speed on 1 picture",
        "medium": "image",
        "data": "a.png",
        "metrics": [],
        "speed": {
            "unit": "MP/s",
            "reference": "peer",
            "threads": 2,
            "device": "cpu",
            "stage_names": ["transform", "prior", "entropy_coding", "io", "codec", "other"],
            "conditions": ["Pixels are decoded before the clock starts."],
        },
        "codecs": {
            "ours": entry | {"title": "ours", "kind": "compand", "speed": speed_of(4.0, split)},
            "jpeg": entry | {"title": "JPEG", "kind": "classical", "speed": speed_of(40.0, {"codec": 10.0})},
            "peer": entry | {"title": "peer, tuned", "kind": "peer", "speed": speed_of(1.0, split)},
        },
        "problems": [],
        "notices": [],
    }
    return stored(out, summary, [{"codec": "ours", "direction": "encode", "seconds": 0.1}])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, china: Path, flower: Path) -> Path:
    out = make_images(tmp_path_factory.mktemp("images"), {HOSTILE: china, "b/flower.jpg": flower})
    write(out)
    return out


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = make_sounds(tmp_path_factory.mktemp("sounds"))
    write(out)
    return out


@pytest.fixture(scope="module")
def perception(tmp_path_factory: pytest.TempPathFactory, hopper: Path) -> Path:
    out = make_images(tmp_path_factory.mktemp("perception"), {"hopper.jpg": hopper})
    changed(out, add_perception)
    write(out)
    return out


@pytest.fixture(scope="module")
def speed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = make_speed(tmp_path_factory.mktemp("speed"))
    write(out)
    return out


KINDS = ("images", "sounds", "perception", "speed")


# -------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Elements of a page; fails where tags do not balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((tuple(self._open), data.strip().replace("\xa0", " ")))

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]

    def text(self, tag: str) -> list[str]:
        return [text for path, text in self.texts if path[-1] == tag]


def page_of(out: Path) -> str:
    return (out / PAGE).read_text(encoding="utf-8")


def cells(page: str, name: str) -> list[list[str]]:
    """Texts of a table: header and rows."""
    section = page[page.index(f'<section id="{name}">') :]
    rows = []
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", section[: section.index("</table>")], re.DOTALL):
        found = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        rows.append([cell.replace("\xa0", " ") for cell in found])
    return rows


def viewer_of(page: str) -> dict[str, Any]:
    text = re.search(r'<script type="application/json" id="viewer">(.*?)</script>', page, re.DOTALL)
    assert text
    return json.loads(text[1])


def decoded_uri(uri: str) -> tuple[str, bytes]:
    match = re.fullmatch(r"data:([a-z]+/[a-z0-9+-]+);base64,([A-Za-z0-9+/]+=*)", uri)
    assert match, uri[:80]
    return match[1], base64.b64decode(match[2], validate=True)


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_well_formed_and_complete(kind, request):
    text = page_of(request.getfixturevalue(kind))
    page = Page(text)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    for name in ("aria-labelledby", "for"):
        assert set(page.attributes(name)) <= set(ids)
    assert {href[1:] for href in page.attributes("href") if href.startswith("#")} <= set(ids)
    addresses = page.attributes("src") + page.attributes("srcset")
    addresses += [href for href in page.attributes("href") if not href.startswith("#")]
    readers = {
        "image/webp": lambda data: Image.open(io.BytesIO(data)).load(),
        "image/png": lambda data: Image.open(io.BytesIO(data)).load(),
        "image/svg+xml": ET.fromstring,
        "audio/flac": lambda data: soundfile.read(io.BytesIO(data)),
    }
    assert "data:," in addresses  # no icon is asked for
    for address in set(addresses) - {"data:,"}:
        form, data = decoded_uri(address)
        readers[form](data)
    assert not re.search(
        r"""(?:src|href|srcset|action)=["']?(?:https?:)?//|url\(|@import|fetch\(|XMLHttp""", text
    )
    assert "default-src 'none'" in text
    assert all("alt" in attributes for tag, attributes in page.elements if tag == "img")
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.elements if tag == "th")


@pytest.mark.parametrize("kind", KINDS)
def test_plots_lie_beside_the_page(kind, request):
    out = request.getfixturevalue(kind)
    drawn = plots(read_results(out))
    assert drawn
    for plot in drawn:
        with Image.open(out / f"{plot.name}.png") as image:
            assert image.size == tuple(round(150 * inches) for inches in plot.size)
    images_shown = [a for tag, a in Page(page_of(out)).elements if tag == "img" and a["alt"]]
    assert [attributes["alt"] for attributes in images_shown] == [plot.title for plot in drawn]


def test_names_are_text_and_nothing_else(images):
    page = Page(page_of(images))
    # The problem, the notice, the item's option; as a title in tables.
    assert page.text("th").count(HOSTILE) == 1
    assert f"left out: {HOSTILE}" in page.text("li")
    assert HOSTILE in page.text("option")
    assert f"_{HOSTILE}" in page.text("th")
    assert [a.get("id", "") for tag, a in page.elements if tag == "script"] == ["viewer", ""]
    assert not [tag for tag, _ in page.elements if tag == "b"]
    assert viewer_of(page_of(images))["examples"][0]["item"] == HOSTILE


def test_tables_show_the_results(images):
    page = page_of(images)
    results = read_results(images)
    header, *rows = cells(page, "points")
    assert header == ["codec", "quality", "items", "bpp", "bytes an item", "PSNR, dB", "Brand-new metric"]
    assert len(rows) == 9
    for point, row in zip(results.codecs["jpeg"].points, rows, strict=False):
        assert row[:3] == ["JPEG", f"{point['quality']}", "2"]
        assert float(row[3]) == pytest.approx(point["bpp"], abs=5e-4)
        assert row[4] == f"{point['bytes']:,.0f}"
        assert float(row[5]) == pytest.approx(point["psnr"], abs=5e-3)
    assert rows[-1][0] == "PNG" and rows[-1][5] == "∞"
    header, ours, png = cells(page, "bd")
    assert header == ["codec", "BD-rate, %", "BD-PSNR, dB", "overlap, PSNR, dB", "remark"]
    assert ours[1:] == ["-31.2", "+2.50", "25.00 to 38.50", ""]
    assert png == ["PNG", "", "", "", "fewer than two lossy points"]
    assert f"Against JPEG{PUBLISHED}," in page
    assert cells(page, "bd-2")[1][1:3] == ["+7.1", "-0.50"]
    assert ["JPEG (published)", "published", "somewhere/results.json"] in cells(page, "codecs")
    assert "compand eval rd x" in Page(page).text("dd")


def test_the_container_has_a_column_of_its_own(sounds):
    header, *rows = cells(page_of(sounds), "points")
    whole, payload = header.index("kbit/s"), header.index("kbit/s without container")
    for row in rows:
        assert row[payload] == "" if row[0] == "vorbis" else float(row[payload]) < float(row[whole])


def test_means_over_fewer_items_are_marked(images, tmp_path):
    shutil.copytree(images, tmp_path / "out")
    changed(tmp_path / "out", lambda summary: summary["codecs"]["jpeg"]["points"][0].update(psnr_items=1))
    write(tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert cells(page, "points")[1][5].endswith(" (1)")
    assert "In brackets" in page
    assert "In brackets" not in page_of(images)


def test_perception(perception):
    page = page_of(perception)
    parsed = Page(page)
    assert "The first finding holds: <0.1 bpp." in parsed.text("li")
    assert "0.8000 (95 % interval 0.775 to 0.825)" in parsed.text("dd")
    pairs = dict(zip(*cells(page, "pairs"), strict=True))
    assert (pairs["a"], pairs["b"], pairs["difference"]) == ("jpeg q10", "ours-v1 q10", "+0.0312")
    assert (pairs["95 % interval"], pairs["p"], pairs["p adjusted"]) == ("-0.0625 to 0.1250", "0.04", "0.08")
    training = dict(zip(*cells(page, "training"), strict=True))
    assert (training["trained on"], training["judged on"], training["score"]) == (
        "jpeg q10",
        "undamaged",
        "0.7500",
    )
    correlations = cells(page, "correlations")
    assert [row[0] for row in correlations[1:]] == ["PSNR", "Brand-new metric"]
    assert correlations[2][3:5] == ["-0.410", "-0.600 to -0.200"]
    names = [plot.name for plot in plots(read_results(perception))]
    assert names == ["rate_score", "score_drop_psnr", "score_drop_brand_new", "rd_psnr", "rd_brand_new"]
    assert "0.91 [0.80, 0.97], 8 points" in page


def test_speed(speed):
    page = page_of(speed)
    header, ours, jpeg, peer = cells(page, "speed")
    row = dict(zip(header, ours, strict=True))
    assert (row["encode, MP/s"], row["middle half"]) == ("13.2", "12.4 to 14.0")
    assert [row[1] for row in (cells(page, "ratios")[1:])] == ["4.00", "40.0", "1.00"]
    assert jpeg[0] == "JPEG" and peer[0] == "peer, tuned"
    stages = cells(page, "stages")
    assert stages[0] == ["codec", "direction", "transform", "prior", "entropy coding", "io", "codec", "other"]
    assert stages[3] == ["JPEG", "encode", "", "", "", "", "10.0", ""]
    assert cells(page, "memory")[0] == ["codec", "resident memory at its highest, MB"]
    figure = Figure()
    by_name = {plot.name: plot for plot in plots(read_results(speed))}
    by_name["speed_stages"].draw(figure, LIGHT)
    ends = {round(bar.get_x() + bar.get_width(), 3) for axes in figure.axes for bar in axes.patches}
    assert 118.0 in ends  # the stages of a codec are stacked to their sum
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ours", "peer, tuned"]
    assert "Pixels are decoded before the clock starts." in page


def test_figures_keep_four_digits_of_the_median():
    assert decimals([0.001, 31.2, 33.3]) == 2
    assert decimals([float("inf"), None, 0.0]) == 0
    assert shown(-0.126, 2) == "-0.13"


# ------------------------------------------------------------------------------------------- the plots


def curve(name: str, kind: str, height: float, **fields: Any) -> Codec:
    points = [{"bpp": rate, "m": height + rate, "score": 0.5, "score_drop": 0.1} for rate in (0.1, 0.5, 2.0)]
    return Codec(name, fields.pop("title", name), kind, points=points, **fields)


def several(count: int = 3) -> Results:
    codecs = [curve(f"c{place}", "classical", 10.0 * place) for place in range(count)]
    codecs.append(curve("ours", "compand", 15.0))
    codecs.append(curve("p", "published", 5.0, published=True, title="c1 (published)"))
    codecs.append(curve("exact", "lossless", 90.0))
    return Results("rd", "t", "image", "d", {codec.name: codec for codec in codecs}, [Metric("m", "M", "dB")])


def test_curves_and_their_legend():
    figure = Figure(layout="constrained")
    (plot,) = plots(several())
    plot.draw(figure, LIGHT)
    lines = {line.get_ydata()[0]: line for line in figure.axes[0].lines}
    assert sorted(lines) == pytest.approx([0.1, 5.1, 10.1, 15.1, 20.1])  # the lossless codec has no curve
    assert lines[15.1].get_linewidth() > max(lines[y].get_linewidth() for y in lines if y != 15.1)
    assert [lines[y].is_dashed() for y in (5.1, 10.1, 15.1)] == [True, False, False]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["c2", "ours", "c1", "c1 (published)", "c0"]
    assert "exact (" in plot.caption and "Dashed: published." in plot.caption
    assert figure.axes[0].get_xlabel() == "rate, bpp (whole files)"
    assert figure.axes[0].get_ylabel() == "M, dB"


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_looks_tell_codecs_apart(theme):
    found = looks(several(40).codecs.values(), theme)
    measured = [(look.color, look.marker) for look in found.values() if not look.published]
    assert len(measured) == len(set(measured)) == 41
    assert found["ours"].color == theme.ink
    assert theme.ink not in {look.color for name, look in found.items() if name != "ours"}
    assert found["p"].color == found["c1"].color
    assert "exact" not in found


def test_scores_near_one_are_spread():
    points = [{"bpp": rate, "s": value} for rate, value in ((0.1, 0.9), (0.4, 0.99), (2.0, 0.999))]
    codec = Codec("a", "a", "classical", points=points)
    figure = Figure()
    plots(Results("rd", "t", "image", "d", {"a": codec}, [Metric("s", "S")]))[0].draw(figure, LIGHT)
    axes = figure.axes[0]
    heights = [axes.transData.transform((1.0, value))[1] for value in (0.9, 0.99, 0.999)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])


def test_published_curves_do_not_widen_the_plot(images):
    figure = Figure()
    plots(read_results(images))[0].draw(figure, LIGHT)
    rates = [row["bpp"] for row in read_results(images).rows]
    assert figure.axes[0].get_xlim()[1] < 1.2 * max(rates) < 9.0


def test_the_same_results_give_the_same_files(images):
    before = {path.name: path.read_bytes() for path in images.iterdir() if path.is_file()}
    written = write(images)
    assert [path.name for path in written] == ["rd_psnr.png", "rd_brand_new.png", PAGE]
    assert {path.name: path.read_bytes() for path in images.iterdir() if path.is_file()} == before


# ----------------------------------------------------------------------------------------- the examples


def test_pictures_are_exact(images):
    selection = select(images, read_results(images), count=None, megabytes=MEGABYTES)
    assert [example.item for example in selection.examples] == [HOSTILE, "b/flower.jpg"]
    for place, example in enumerate(selection.examples):
        assert len(example.versions) == 8 and example.note == ""
        files = {ORIGINAL: example.original}
        files |= {f"{each.codec}-{each.quality:g}": each.medium for each in example.versions}
        for name, medium in files.items():
            with (
                Image.open(images / "examples" / str(place) / f"{name}.png") as kept,
                Image.open(io.BytesIO(medium.content)) as shown_picture,
            ):
                assert np.array_equal(
                    np.asarray(kept.convert("RGB")), np.asarray(shown_picture.convert("RGB"))
                )
    assert "Lossless, not shown: PNG." in " ".join(selection.notes)


def test_versions_have_the_figures_of_their_item(images):
    viewer = viewer_of(page_of(images))
    assert viewer["unit"] == "bpp"
    rows = read_results(images).rows
    versions = viewer["examples"][1]["versions"]
    for row, version in zip([row for row in rows if row["item"] == "b/flower.jpg"], versions, strict=True):
        assert (version["codec"], version["quality"]) == (row["codec"], str(row["quality"]))
        assert version["rate"] == row["bpp"]
        assert version["figures"][0] == f"PSNR {row['psnr']:.2f} dB".replace(" ", "\xa0")
        assert version["figures"][-1] == f"{row['bytes']:,}\xa0bytes"


def test_large_pictures_show_their_middle(tmp_path, china, monkeypatch):
    out = make_images(tmp_path / "out", {"china.jpg": china}, (300, 640))
    monkeypatch.setattr(examples_module, "REGION", (128, 200))
    selection = select(out, read_results(out), count=None, megabytes=MEGABYTES)
    (example,) = selection.examples
    with Image.open(china) as image:
        middle = np.asarray(image.convert("RGB"))[86:214, 220:420]
    with Image.open(io.BytesIO(example.original.content)) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), middle)
    assert example.note == "the middle 128 x 200 of 300 x 640 pixels"
    assert min(REGION) >= 256


def test_page_stays_within_its_room(images):
    results = read_results(images)
    everything = select(images, results, count=None, megabytes=MEGABYTES)
    total = sum(len(v.medium.content) for example in everything.examples for v in example.versions)
    less = select(images, results, count=None, megabytes=0.7 * total / 1e6)
    kept = [len(v.medium.content) for example in less.examples for v in example.versions]
    assert len(less.examples) == 2 and 0 < sum(kept) < 0.7 * total
    assert f"{len(kept)} of 16 decoded files are shown" in less.notes[0]
    for example in less.examples:
        assert {version.codec for version in example.versions} == {"jpeg", "ours-v1"}
        assert example.rates == sorted(example.rates)
    one = select(images, results, count=1, megabytes=MEGABYTES)
    assert len(one.examples) == 1 and "1 of the 2 items kept are shown." in one.notes
    assert select(images, results, count=None, megabytes=0.001).examples == []


def test_sounds_play_their_loudest_part(sounds):
    (example,) = select(sounds, read_results(sounds), count=None, megabytes=MEGABYTES).examples
    whole, rate = soundfile.read(sounds / "examples" / "tone" / f"{ORIGINAL}.flac", dtype="int16")
    part, part_rate = soundfile.read(io.BytesIO(example.original.content), dtype="int16")
    assert part_rate == rate and len(part) == SECONDS * rate
    assert example.note == "1.5 s to 6.5 s of 7.0 s, the loudest"
    assert np.array_equal(part, whole[int(1.5 * rate) : int(6.5 * rate)])
    for version in example.versions:
        path = sounds / "examples" / "tone" / f"{version.codec}-{version.quality:g}.flac"
        kept, _ = soundfile.read(path, dtype="int16")
        heard, _ = soundfile.read(io.BytesIO(version.medium.content), dtype="int16")
        assert np.array_equal(heard, kept[int(1.5 * rate) : int(6.5 * rate)])


def test_spectrograms_show_the_tone(sounds):
    (example,) = select(sounds, read_results(sounds), count=None, megabytes=MEGABYTES).examples
    with Image.open(io.BytesIO(example.spectrogram.content)) as image:
        levels = np.asarray(image)
    assert example.frequency == 8000
    rows, columns = levels.shape
    for share in (0.2, 0.5, 0.8):
        seconds = 1.5 + share * SECONDS
        frequency = 400 + 300 * seconds
        brightest = rows - 1 - int(np.argmax(levels[:, int(share * columns)]))
        assert (brightest + 0.5) / rows * 8000 == pytest.approx(frequency, abs=1.5 * 8000 / rows)
    assert levels.max() == 63


def test_short_sounds_are_whole(tmp_path):
    out = make_sounds(tmp_path / "out", seconds=1.6, rate=8000)
    (example,) = select(out, read_results(out), count=None, megabytes=MEGABYTES).examples
    assert example.note == "" and example.seconds == 1.6


# ---------------------------------------------------------------------------------------------- refusals


def test_missing_and_damaged_results(tmp_path):
    with pytest.raises(UsageError, match=r"results\.json does not exist"):
        write(tmp_path)
    for content in ("{", "[]", '{"summary": {"kind": "rd"}}', '{"summary": 3}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UsageError, match=r"results\.json"):
            write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_damaged_examples(tmp_path, hopper):
    out = make_images(tmp_path / "out", {"hopper.jpg": hopper})
    path = out / "examples" / "0" / "jpeg-40.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(MediaError, match=r"jpeg-40\.png cannot be read"):
        write(out)
    assert not (out / PAGE).exists()


def test_results_without_examples_and_problems(tmp_path, hopper):
    out = make_images(tmp_path / "out", {"hopper.jpg": hopper})
    shutil.rmtree(out / "examples")
    changed(out, lambda summary: summary.update(problems=[], notices=[], bd=None, bd_others=[], examples=[]))
    write(out)
    page = page_of(out)
    Page(page)
    assert all(f'id="{name}"' not in page for name in ("problems", "notices", "bd", "examples"))


def test_every_run_of_a_continued_folder_has_its_origin():
    first = {"command": "compand eval rd x", "hardware": {"cores": 2}, "versions": {"numpy": "1"}}
    terms = dict(_flat({"command": "compand eval rd y", "earlier": [first, first]}))
    assert terms == {
        "command": "compand eval rd y",
        **{
            f"earlier {place}: {key}": value
            for place in (1, 2)
            for key, value in (
                ("command", "compand eval rd x"),
                ("hardware: cores", "2"),
                ("versions", "numpy 1"),
            )
        },
    }


def test_command_draws_again(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(tmp_path / "out"), "--examples", "1"])
    assert stop.value.code in (0, None)
    assert f"{PAGE}" in capsys.readouterr().out
    assert len(viewer_of(page_of(tmp_path / "out"))["examples"]) == 1
    with pytest.raises(CompandError, match="does not exist"):
        cli.main(["report", str(tmp_path)])


def test_templates_are_in_the_package():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    patterns = config["options.package_data"]["compand.eval.report"].split()
    folder = ROOT / "eval" / "report"
    data = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data == {path for pattern in patterns for path in folder.glob(pattern)}
    assert data


# --------------------------------------------------------------------------------------------- a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

WATCH = """<script>
window.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.blockedURI));
addEventListener("error", (event) => violations.push(event.message));
</script>"""


def acted(out: Path, folder: Path, actions: str) -> dict[str, Any]:
    """What a script, an async function's body, returns that runs in the page."""
    script = f"""<script>
    (async () => {{ {actions} }})().catch((error) => ({{ failed: String(error) }})).then((found) => {{
      found.violations = violations;
      found.loaded = performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 5));
      const text = JSON.stringify(found);
      document.body.append(Object.assign(document.createElement("pre"), {{ id: "found", textContent: text }}));
    }});
    </script>"""
    page = page_of(out).replace("<head>", f"<head>{WATCH}").replace("</body>", f"{script}</body>")
    path = folder / "acted.html"
    path.write_text(page, encoding="utf-8")
    command = [
        BROWSER,
        *QUIET,
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    (text,) = (text for tags, text in Page(done.stdout).texts if tags[-1] == "pre")
    found: dict[str, Any] = json.loads(text)
    assert "failed" not in found, found
    assert found["violations"] == []
    assert set(found["loaded"]) <= {"data:"}
    return found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_browser_compares_pictures_and_sorts(images, tmp_path):
    found = acted(
        images,
        tmp_path,
        """
        const panes = () => [...document.querySelectorAll("#panes canvas")];
        const rates = () => [...document.querySelectorAll("#panes figcaption")].map((each) => each.textContent);
        const set = (id, value) => {
          byId(id).value = value;
          for (const kind of ["input", "change"]) byId(id).dispatchEvent(new Event(kind));
        };
        const press = (key, options) =>
          byId("stage").dispatchEvent(new KeyboardEvent("keydown", { key, ...options, bubbles: true }));
        const settled = async () => {
          for (let turn = 0; turn < 40; turn++) await new Promise((done) => setTimeout(done, 50));
        };
        const content = () => panes().map((canvas) => canvas.toDataURL());
        const runs = (canvas) => {
          const { data } = canvas.getContext("2d").getImageData(0, 40, canvas.width, 1);
          const edges = [];
          for (let x = 1; x < canvas.width; x++)
            if ([0, 1, 2].some((k) => data[4 * x + k] !== data[4 * x + k - 4])) edges.push(x);
          return edges.slice(1).map((edge, place) => edge - edges[place]);
        };
        await settled();
        const found = { panes: panes().length, different: new Set(content()).size };
        set("target", 0);
        found.low = rates();
        set("target", byId("target").max);
        found.high = rates();
        set("zoom", 8);
        await settled();
        found.runs = runs(panes()[0]);
        const before = content()[0];
        const place = byId("window").style.left;
        press("ArrowRight");
        found.moved = byId("window").style.left !== place && content()[0] !== before;
        press("-");
        found.zoom = byId("zoom").value;
        byId("flip").click();
        found.flipped = new Set(content()).size;
        set("item", 1);
        await settled();
        found.items = document.querySelectorAll("#panes figure").length;
        document.querySelector("#choice input").click();
        found.fewer = document.querySelectorAll("#panes figure").length;
        const button = document.querySelectorAll("#points thead button")[5];
        const column = () => [...document.querySelectorAll("#points tbody tr")].map((row) => row.cells[5].textContent);
        button.click();
        found.rising = column();
        button.click();
        found.falling = column();
        found.sorted = button.parentElement.getAttribute("aria-sort");
        return found;
        """,
    )
    assert found["panes"] == found["different"] == 3
    first = viewer_of(page_of(images))["examples"][0]
    for end, captions in ((0, found["low"]), (-1, found["high"])):
        for codec, caption in zip(("jpeg", "ours-v1"), captions[1:], strict=True):
            versions = [version for version in first["versions"] if version["codec"] == codec]
            target = first["rates"][end]
            best = min(versions, key=lambda version: abs(np.log(version["rate"] / target)))
            assert f" quality {best['quality']}, " in caption
            assert f"({100 * (best['rate'] / target - 1):+.0f} %)" in caption
    assert found["runs"] and all(run % 8 == 0 for run in found["runs"])
    assert found["moved"] and found["zoom"] == "7"
    assert found["flipped"] == 1
    assert (found["items"], found["fewer"]) == (3, 2)
    figures = [float(text.replace("∞", "inf")) for text in found["rising"]]
    assert figures == sorted(figures) and len(figures) == 9
    assert found["falling"][0] == "∞" and found["sorted"] == "descending"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_browser_plays_sounds(sounds, tmp_path):
    found = acted(
        sounds,
        tmp_path,
        """
        const players = [...document.querySelectorAll("#panes audio")];
        const durations = [];
        for (const player of players) {
          const ready = new Promise((done, fail) => {
            player.addEventListener("loadedmetadata", done);
            player.addEventListener("error", () => fail(player.error.message));
          });
          player.load();
          player.preload = "auto";
          await ready;
          durations.push(player.duration);
        }
        const pictures = [...document.querySelectorAll("#panes img")];
        await Promise.all(pictures.map((picture) => picture.decode()));
        return { durations, controls: players.every((player) => player.controls), pictures: pictures.length };
        """,
    )
    assert found["durations"] == pytest.approx([SECONDS] * 3)
    assert found["controls"] and found["pictures"] == 3
