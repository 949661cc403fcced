"""`compand eval rd` from end to end: what it measures, survives, refuses and reports."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from foreign_codecs import DAMAGED, KILLS_DECODER, KILLS_ENCODER, LOG, PAUSE, UNFIT, WRONG_SIZE
from PIL import Image

from compand import cli as library_cli
from compand.errors import CompandError, UsageError
from compand.eval import cli, rd, runner
from compand.eval.decoder import Decoder
from compand.eval.items import Item, find_items
from compand.eval.measurements import MEASUREMENTS, Store
from compand.eval.rd import Options
from compand.eval.runner import _progress, example_folders, measure_all
from compand.eval.selection import select
from compand.sounds import Sound

QUICK = {"metrics": ["psnr"], "plugins": ("foreign_codecs",), "jobs": 1, "examples": 0, "quiet": True}


WRITE_PAGE = rd.write_page


@pytest.fixture(autouse=True)
def without_a_page(monkeypatch):
    """The page has tests of its own."""
    monkeypatch.setattr(rd, "write_page", lambda store: [])


def write_picture(path: Path, size: tuple[int, int] = (24, 32), *, red: int = 10, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), np.uint8)
    pixels = coarse.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
    pixels[0, 0, 0] = red
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path) -> Path:
    for place, name in enumerate("abc"):
        write_picture(tmp_path / "photos" / f"{name}.png", seed=place, red=place)
    return tmp_path / "photos"


def evaluate(data: Path, out: Path, **options) -> int:
    return rd.run(Options(data, out, **{**QUICK, **options}))


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def figures(out: Path) -> list[dict]:
    """Rows without what depends on the moment."""
    return [
        {name: value for name, value in row.items() if not name.endswith("code_seconds")}
        for row in results(out)["rows"]
    ]


# --------------------------------------------------------------------------------------- what is measured


def test_the_identity_scores_the_baseline(china, tmp_path):
    assert evaluate(china, tmp_path / "out", codecs=["identity"], metrics=["psnr", "ms_ssim"]) == 0
    (row,) = results(tmp_path / "out")["rows"]
    assert row["psnr"] == "inf"
    assert row["ms_ssim"] == 1
    assert row["bpp"] == pytest.approx(24, abs=0.01)


def test_a_thousand_bytes_on_100_x_100_pixels_are_0_8_bpp(tmp_path):
    write_picture(tmp_path / "photo.png", (100, 100))
    assert evaluate(tmp_path / "photo.png", tmp_path / "out", codecs=["sized"]) == 0
    (row,) = results(tmp_path / "out")["rows"]
    assert (row["bytes"], row["bpp"], row["overhead_bytes"]) == (1000, 0.8, 400)
    (record,) = csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines())
    assert (record["bytes"], record["bpp"]) == ("1000", "0.8")
    assert results(tmp_path / "out")["summary"]["codecs"]["sized"]["points"][0]["bpp"] == 0.8


def test_a_codec_that_peeks_at_the_original_gains_nothing(photos, tmp_path):
    assert evaluate(photos, tmp_path / "out", codecs=["sized", "cheat"]) == 0
    honest, cheat = (
        [row["psnr"] for row in results(tmp_path / "out")["rows"] if row["codec"] == name]
        for name in ("sized", "cheat")
    )
    assert honest == cheat
    assert max(cheat) < 20


def test_every_worker_gives_the_same(photos, tmp_path):
    for jobs in (1, 2):
        assert (
            evaluate(photos, tmp_path / str(jobs), codecs=["jpeg", "raw"], qualities="jpeg=20,80", jobs=jobs)
            == 0
        )
    assert len(figures(tmp_path / "1")) == 3 * 2 + 3 * 3
    assert figures(tmp_path / "1") == figures(tmp_path / "2")
    assert results(tmp_path / "1")["summary"] == results(tmp_path / "2")["summary"]


def test_a_checkpoint_in_a_folder_is_measured_at_its_rate(checkpoint_of, photos, tmp_path, monkeypatch):
    folder = checkpoint_of("factorized")
    monkeypatch.chdir(folder.parent)
    assert evaluate(photos, tmp_path / "out", codecs=[folder.name], qualities="1,8") == 0
    low, high = results(tmp_path / "out")["summary"]["codecs"][folder.name]["points"]
    assert low["items"] == high["items"] == 3
    assert (low["quality"], high["quality"]) == (1, 8)
    assert low["psnr"] < high["psnr"]


def test_sounds_have_kbps(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    tone = 0.3 * np.sin(np.arange(16000) * 0.05)
    soundfile.write(tmp_path / "tone.wav", tone, 16000)
    assert (
        evaluate(tmp_path / "tone.wav", tmp_path / "out", codecs=["identity", "flac"], metrics=["sdr"]) == 0
    )
    identity, *_, flac = results(tmp_path / "out")["rows"]
    assert identity["kbps"] == pytest.approx(16 * 32, rel=0.01)
    assert flac["kbps"] < 16 * 16
    assert identity["seconds"] == 1
    assert (identity["rate"], identity["channels"]) == (16000, 1)


def test_an_audio_checkpoint_is_measured_beside_anchors(checkpoint_of, tmp_path):
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for name, rate, channels in (("a.wav", 44100, 2), ("b.flac", 16000, 1)):
        time_axis = np.arange(rate // 2)[None] / rate
        pitches = np.array([[220.0], [330.0]])[:channels]
        Sound((0.4 * np.sin(2 * np.pi * pitches * time_axis)).astype(np.float32), rate).save(sounds / name)
    folder = str(checkpoint_of("wavelet-audio"))
    metrics = ["sdr", "psnr"]
    options = {"codecs": [folder, "flac"], "qualities": f"{folder}=1,8", "metrics": metrics, "examples": 1}
    assert evaluate(sounds, tmp_path / "out", **options) == 0
    content = results(tmp_path / "out")
    assert [metric["name"] for metric in content["summary"]["metrics"]] == ["psnr", "sdr"]
    low, high = content["summary"]["codecs"][Path(folder).name]["points"]
    assert low["items"] == high["items"] == 2
    assert low["kbps"] < high["kbps"]
    assert low["psnr"] < high["psnr"] and low["sdr"] < high["sdr"]
    sizes = {row["item"]: (row["rate"], row["channels"], row["seconds"]) for row in content["rows"]}
    assert sizes == {"a.wav": (44100, 2, 0.5), "b.flac": (16000, 1, 0.5)}


def test_originals_and_decoded_files_are_kept_as_examples(photos, tmp_path):
    assert evaluate(photos, tmp_path / "out", codecs=["raw"], qualities="raw=2,8", examples=2, jobs=2) == 0
    kept = results(tmp_path / "out")["summary"]["examples"]
    assert [example["item"] for example in kept] == ["a.png", "c.png"]
    folder = tmp_path / "out" / kept[1]["folder"]
    assert sorted(path.name for path in folder.iterdir()) == ["original.png", "raw-2.png", "raw-8.png"]
    pixels = [np.asarray(Image.open(folder / name)) for name in ("original.png", "raw-8.png", "raw-2.png")]
    assert np.array_equal(pixels[0], np.asarray(Image.open(photos / "c.png")))
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


def test_examples_are_spread_evenly_and_have_folders_of_their_own():
    items = [Item(f"{number:02}.png", Path(), "image") for number in range(24)]
    assert list(example_folders(items, 3)) == ["04.png", "12.png", "20.png"]
    assert len(example_folders(items, 99)) == 24
    assert example_folders(items, 0) == {}
    alike = [Item(name, Path(), "image") for name in ("a/b.png", "a/b.jpg", "a_b.png")]
    assert len(set(example_folders(alike, 3).values())) == 3


# ------------------------------------------------------------------------------------ Bjontegaard deltas


def summary_of(tmp_path, names, points, *, metric="psnr", **options):
    """The summary of a run with these rates and figures of the codecs, equal for every item."""
    description = {
        "kind": "rd", "medium": "image", "data": "photos", "items": dict.fromkeys(names, "0"),
        "metrics": [metric], "plugins": [],
    }  # fmt: skip
    with Store.open(tmp_path / "out", description, force=(tmp_path / "out").exists()) as store:
        for codec, curve in points.items():
            fact = {"title": codec.upper(), "kind": "classical", "note": "", "identity": "1"}
            store.add_codecs({codec: fact})
            for quality, (rate, figure) in enumerate(curve):
                for name in options.get("items", {}).get(codec, names):
                    store.append(
                        {
                            "item": name, "medium": "image", "codec": codec, "identity": "1", "quality": quality,
                            "bytes": 1, "overhead_bytes": 0, "bpp": rate, metric: figure,
                        }
                    )  # fmt: skip
        metrics = [rd.Metric(metric, metric.upper(), "dB", "higher", "image")]
        overlay = rd.published_curves(options.get("published", "auto"), names, "image")
        return rd.summarise(store, metrics, options["anchor"], overlay, [], [])


def test_deltas_of_measured_codecs(tmp_path):
    curve = [(0.1, 28.0), (0.2, 30.0), (0.4, 32.0)]
    points = {
        "jpeg": curve,
        "half": [(rate / 2, psnr) for rate, psnr in curve],
        "bent": [(0.1, 30.0), (0.2, 29.0)],
    }
    points["exact"] = [(9.0, float("inf"))]
    bd = summary_of(tmp_path, ["a.png", "b.png"], points, anchor="jpeg")["bd"]
    assert (bd["anchor"], bd["metric"], bd["unit"]) == ("jpeg", "psnr", "dB")
    half, bent, exact = bd["rows"]
    assert (half["codec"], half["low"], half["high"], half["reason"]) == ("half", 28, 32, None)
    assert half["bd_rate"] == pytest.approx(-50)
    assert half["bd_psnr"] == pytest.approx(2)
    assert bent["bd_rate"] is None
    assert "does not grow from rate 0.1 to 0.2" in bent["reason"]
    assert "fewer than two lossy points" in exact["reason"]


def test_curves_that_share_qualities_but_no_rate_have_a_rate_delta_alone(tmp_path):
    curve = [(0.1, 28.0), (0.2, 30.0), (0.4, 32.0)]
    points = {"jpeg": curve, "eightfold": [(8 * rate, psnr) for rate, psnr in curve]}
    summary = summary_of(tmp_path, ["a.png"], points, anchor="jpeg")
    row = summary["bd"]["rows"][0]
    assert row["bd_rate"] == pytest.approx(700) and row["bd_psnr"] is None and row["reason"] is None
    assert "+700.0 %  none" in rd.deltas_table(summary)


def test_deltas_count_the_items_that_both_have(tmp_path):
    """Were each mean over its own items, a codec that fails on hard items would win."""
    curve = [(0.1, 28.0), (0.4, 32.0)]
    names = [f"{number:02}.png" for number in range(20)]
    both = {"jpeg": curve, "webp": curve}
    summary = summary_of(tmp_path, names, both, anchor="jpeg", items={"webp": names[1:]})
    assert summary["bd"]["rows"][0]["bd_rate"] == pytest.approx(0)
    assert "WEBP: means are over 19 of 20 items, those measured at every point" in summary["notices"]
    summary = summary_of(tmp_path, names, both, anchor="jpeg", items={"webp": names[3:]})
    assert "no item was measured with both" in summary["bd"]["rows"][0]["reason"]
    assert summary["codecs"]["webp"]["points"] == []


KODAK = [f"kodim{number:02}.png" for number in range(1, 25)]


def test_published_curves_stand_beside_measured_ones_on_kodak(tmp_path):
    curve = [(0.3266, 26.5772), (0.5, 29.0), (1.0, 33.0)]
    summary = summary_of(tmp_path, KODAK, {"jpeg": curve, "ours": curve}, anchor="vtm")
    codecs = summary["codecs"]
    assert codecs["vtm"]["published"]
    assert not codecs["jpeg"]["published"]
    assert codecs["jpeg-published"]["published"]
    assert "CompressAI" in codecs["jpeg-published"]["note"]
    assert {"bpp", "psnr", "ms_ssim"} > codecs["elic2022"]["points"][0].keys() - {"quality", "items"}
    deltas = {row["codec"]: row for row in summary["bd"]["rows"]}
    assert summary["bd"]["anchor"] == "vtm"
    assert "vtm" not in deltas
    assert deltas["jpeg-published"]["bd_rate"] == pytest.approx(208, abs=1)
    assert deltas["jpeg"] == deltas["ours"] | {"codec": "jpeg"}
    assert deltas["ours"]["bd_rate"] > 100
    assert [
        notice for notice in summary["notices"] if notice.startswith("JPEG: PSNR at equal rate is +0.00 to")
    ]


def test_published_curves_are_means_over_all_24_images(tmp_path):
    curve = [(0.1, 28.0), (0.4, 32.0)]
    summary = summary_of(tmp_path, KODAK, {"ours": curve}, anchor="vtm", items={"ours": KODAK[1:]})
    reasons = {row["codec"]: row["reason"] for row in summary["bd"]["rows"]}
    assert reasons["ours"] == "measured on 23 of the 24 items of the published curve"
    assert reasons["jpeg"] is None
    assert "vtm" not in summary_of(tmp_path, KODAK[1:], {"ours": curve}, anchor=None)["codecs"]
    assert "vtm" not in summary_of(tmp_path, KODAK, {"ours": curve}, anchor=None, published="none")["codecs"]
    assert "vtm" in summary_of(tmp_path, ["a.png"], {"ours": curve}, anchor=None, published="kodak")["codecs"]


def test_nothing_is_compared_with_published_curves_on_other_images(tmp_path):
    curve = [(0.1, 28.0), (0.4, 32.0)]
    points = {"jpeg": curve, "ours": curve}
    for names in (["a.png"], KODAK[1:], [*KODAK, "kodim25.png"]):
        summary = summary_of(tmp_path, names, points, anchor="jpeg", published="kodak")
        assert summary["codecs"]["vtm"]["points"]
        assert [row["codec"] for row in summary["bd"]["rows"]] == ["ours"]
        assert any("not compared with" in notice for notice in summary["notices"])
        assert not any("PSNR at equal rate" in notice for notice in summary["notices"])
        rows = summary_of(tmp_path, names, points, anchor="vtm", published="kodak")["bd"]["rows"]
        assert [(row["codec"], row["bd_rate"]) for row in rows] == [("jpeg", None), ("ours", None)]
        assert all("24 Kodak images, which these items are not" in row["reason"] for row in rows)


def test_sounds_have_no_published_curves(tmp_path):
    assert rd.published_curves("auto", [f"kodim{number:02}.wav" for number in range(1, 25)], "audio") == {}
    (tmp_path / "tone.wav").write_bytes(b"nothing reads this")
    with pytest.raises(UsageError, match="--published kodak has no curves for audio"):
        evaluate(tmp_path / "tone.wav", tmp_path / "out", codecs=["flac"], metrics=["sdr"], published="kodak")
    assert not (tmp_path / "out").exists()


def test_an_anchor_without_a_published_curve_of_the_metric_is_a_reason(tmp_path):
    summary = summary_of(
        tmp_path, KODAK, {"jpeg": [(0.1, 0.9), (0.4, 0.95)]}, anchor="elic2022", metric="ms_ssim"
    )
    row = summary["bd"]["rows"][0]
    assert (row["codec"], row["reason"]) == ("jpeg", "ELIC (He 2022) has no published MS_SSIM")
    text = rd.deltas_table(summary)
    assert text.startswith("AGAINST ELIC (He 2022) (published)")


def test_an_anchor_must_be_among_the_curves():
    names = ["jpeg", "webp"]
    overlay = rd.published_curves("kodak", [], "image")
    assert rd._anchor(None, names, "image", overlay, comparable=True) == "vtm"
    assert rd._anchor(None, names, "image", overlay, comparable=False) == "jpeg"
    assert rd._anchor(None, names, "image", {}, comparable=True) == "jpeg"
    assert rd._anchor(None, ["webp"], "image", overlay, comparable=False) is None
    assert rd._anchor("webp", names, "image", overlay, comparable=True) == "webp"
    assert rd._anchor("bpg", names, "image", overlay, comparable=False) == "bpg"
    with pytest.raises(UsageError, match="--anchor avif is not measured"):
        rd._anchor("avif", names, "image", overlay, comparable=True)
    with pytest.raises(UsageError, match="unknown"):
        rd._anchor("nonsense", names, "image", overlay, comparable=True)


# ------------------------------------------------------------------------------------------- what fails


def test_bad_items_are_reported_and_the_others_measured(photos, tmp_path, capsys):
    write_picture(photos / "tiny.png", (100, 40))
    write_picture(photos / "large.png", (170, 180))
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (photos / "notes.txt").write_text("not for measuring")
    (photos / "mystery.xyz").write_text("what is this?")
    assert (
        evaluate(photos, tmp_path / "out", codecs=["jpeg"], qualities="jpeg=50", metrics=["psnr", "ms_ssim"])
        == 1
    )
    summary = results(tmp_path / "out")["summary"]
    problems = {(problem["item"], problem["codec"]) for problem in summary["problems"]}
    assert problems == {("broken.png", ""), ("mystery.xyz", "")} | {
        (name, "jpeg") for name in ("a.png", "b.png", "c.png", "tiny.png")
    }
    (point,) = summary["codecs"]["jpeg"]["points"]
    assert (point["items"], point["ms_ssim_items"]) == (5, 1)
    err = capsys.readouterr().err
    assert err.startswith("compand: 6 problems:\n")
    assert all(name in err for name in ("broken.png", "mystery.xyz", "tiny.png"))


def test_a_fault_of_a_codec_costs_one_item(photos, tmp_path):
    faults = {
        KILLS_ENCODER: "encoding with faulty ended its process (exit status 3)",
        KILLS_DECODER: "decoding with faulty ended its process (exit status 4): out of luck",
        DAMAGED: "the file is damaged",
        WRONG_SIZE: "faulty decodes to 32 x 23 pixels what was 32 x 24 pixels",
        UNFIT: "unexpected RuntimeError: a bug of two lines",
    }
    for red in faults:
        write_picture(photos / f"b{red}.png", red=red)
    assert evaluate(photos, tmp_path / "out", codecs=["faulty"], qualities="faulty=8") == 1
    content = results(tmp_path / "out")
    assert [row["item"] for row in content["rows"]] == ["a.png", "b.png", "c.png"]
    messages = {problem["item"]: problem["message"] for problem in content["summary"]["problems"]}
    assert messages.keys() == {f"b{red}.png" for red in faults}
    for red, fact in faults.items():
        assert fact in messages[f"b{red}.png"]


def test_what_failed_is_tried_again(photos, tmp_path):
    assert evaluate(photos, tmp_path / "out", codecs=["raw"], qualities="raw=4,20") == 1
    summary = results(tmp_path / "out")["summary"]
    assert len(summary["problems"]) == 3
    assert [point["quality"] for point in summary["codecs"]["raw"]["points"]] == [4]
    assert evaluate(photos, tmp_path / "out", codecs=["raw"], qualities="raw=4,6") == 0
    assert results(tmp_path / "out")["summary"]["problems"] == []


def test_empty_sounds_and_mixed_folders(tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    data = tmp_path / "data"
    write_picture(data / "cover.png")
    soundfile.write(data / "empty.wav", np.zeros(0), 8000)
    soundfile.write(data / "tone.wav", 0.3 * np.sin(np.arange(8000) * 0.1), 8000)
    with pytest.raises(UsageError, match="--medium image or --medium audio"):
        evaluate(data, tmp_path / "out", codecs=["flac"], metrics=["sdr"])
    assert evaluate(data, tmp_path / "out", codecs=["flac"], metrics=["sdr"], medium="audio") == 1
    content = results(tmp_path / "out")
    assert {row["item"] for row in content["rows"]} == {"tone.wav"}
    (problem,) = content["summary"]["problems"]
    assert problem["item"] == "empty.wav"
    assert "empty.wav" in capsys.readouterr().err


def test_a_run_without_any_row_still_has_results(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "broken.png").write_bytes(b"nonsense")
    assert evaluate(data, tmp_path / "out", codecs=["jpeg", "raw"]) == 1
    content = results(tmp_path / "out")
    assert content["rows"] == []
    assert content["summary"]["codecs"]["jpeg"]["points"] == []
    assert content["summary"]["bd"]["rows"][0]["reason"]


def test_workers_that_cannot_start_end_the_run(photos, tmp_path):
    items, _ = find_items(photos)
    description = {
        "kind": "rd",
        "medium": "image",
        "data": "photos",
        "items": {},
        "metrics": [],
        "plugins": [],
    }
    with (
        Store.open(tmp_path / "out", description) as store,
        pytest.raises(CompandError, match="no such file"),
    ):
        measure_all(items, {"jpeg": (50.0,)}, ["psnr"], store, judge_factory=Judge, jobs=1)


class Judge:
    """A judge whose model is missing."""

    def __init__(self) -> None:
        Path("/no/such/model").read_bytes()


# ------------------------------------------------------------------------------------ resuming, stopping


def start(data: Path, out: Path, log: Path) -> subprocess.Popen:
    """A run in processes of its own, which form a group."""
    line = f"-m compand.cli eval rd {data} -o {out} -c slow -j 2 --plugin foreign_codecs --metrics psnr --examples 0"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
        LOG: str(log),
        PAUSE: "0.1",
        "TMPDIR": str(log.parent),  # what a killed process leaves there
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *line.split()]
    return subprocess.Popen(command, env=environment, start_new_session=True, **streams)


def wait_for_rows(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    path = out / MEASUREMENTS
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "no rows came"
        time.sleep(0.02)


def wait_for_end(group: int) -> None:
    """Until no process of a group is left."""
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_run_is_resumed_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    for place in range(6):
        write_picture(tmp_path / "photos" / f"{place}.png", seed=place, red=place)
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(tmp_path / "photos", out, log)
    wait_for_rows(out, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for_end(process.pid)
    stored = (out / MEASUREMENTS).read_bytes()
    before = [json.loads(line) for line in stored.splitlines(keepends=True) if line.endswith(b"\n")]
    assert 5 <= len(before) < 18
    assert not (out / "results.json").exists()

    monkeypatch.setenv(LOG, str(tmp_path / "second"))
    assert evaluate(tmp_path / "photos", out, codecs=["slow"]) == 0
    again = (tmp_path / "second").read_text().splitlines()
    assert len(again) == 18 - len(before)
    assert (out / MEASUREMENTS).read_bytes().startswith(stored[: stored.rfind(b"\n") + 1])
    rows = results(out)["rows"]
    assert all(row in rows for row in before)

    assert evaluate(tmp_path / "photos", tmp_path / "whole", codecs=["slow"]) == 0
    assert figures(out) == figures(tmp_path / "whole")
    assert results(out)["summary"] == results(tmp_path / "whole")["summary"]

    monkeypatch.setenv(LOG, str(tmp_path / "third"))
    assert evaluate(tmp_path / "photos", out, codecs=["slow"]) == 0
    assert not (tmp_path / "third").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_ends_all_processes(number, tmp_path):
    for place in range(6):
        write_picture(tmp_path / "photos" / f"{place}.png", seed=place)
    process = start(tmp_path / "photos", tmp_path / "out", tmp_path / "log")
    wait_for_rows(tmp_path / "out", 1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends Ctrl-C to every process
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == ""
    assert err == "compand: interrupted; what was measured is kept: the same command continues\n"
    wait_for_end(process.pid)
    assert (tmp_path / "out" / MEASUREMENTS).read_bytes().count(b"\n") >= 1
    assert not list(tmp_path.glob("compand-*"))


def test_codecs_and_qualities_are_added_to_a_finished_run(photos, tmp_path):
    assert evaluate(photos, tmp_path / "out", codecs=["jpeg"], qualities="jpeg=50") == 0
    assert evaluate(photos, tmp_path / "out", codecs=["raw"], qualities="raw=2") == 0
    assert evaluate(photos, tmp_path / "out", codecs=["jpeg"], qualities="jpeg=90") == 0
    codecs = results(tmp_path / "out")["summary"]["codecs"]
    assert [[point["quality"] for point in codec["points"]] for codec in codecs.values()] == [[50, 90], [2]]


def test_further_metrics_do_not_cost_those_measured_before(photos, tmp_path):
    for place in range(3):
        write_picture(photos / f"large{place}.png", (170, 180), seed=place)
    chosen = {"codecs": ["raw"], "qualities": "raw=2"}
    assert evaluate(photos, tmp_path / "out", **chosen, metrics=["psnr"]) == 0
    before = [row["psnr"] for row in results(tmp_path / "out")["rows"]]
    assert evaluate(photos, tmp_path / "out", **chosen, metrics=["ms_ssim"]) == 1  # three are too small
    content = results(tmp_path / "out")
    assert [row["psnr"] for row in content["rows"]] == before
    assert [metric["name"] for metric in content["summary"]["metrics"]] == ["psnr", "ms_ssim"]
    (point,) = content["summary"]["codecs"]["raw"]["points"]
    assert (point["items"], point["ms_ssim_items"]) == (6, 3)
    assert point["psnr"] == pytest.approx(np.mean(before))
    assert [
        entry["versions"].keys() >= {"python", "numpy"} for entry in content["provenance"]["earlier"]
    ] == [True]


def test_a_metric_that_fails_is_measured_again_and_an_unfit_item_is_not(photos, tmp_path, monkeypatch):
    items, _ = find_items(photos)
    setup = runner.Setup(("psnr", "ms_ssim", "lpips"), (), None, runner.load, 1, tmp_path)

    def measure(metric, original, decoded):
        if metric == "ms_ssim":
            raise UsageError("too small: leave it out")
        if metric == "lpips":
            raise RuntimeError("out of luck in /home/ann/weights.pth")
        return 30.0

    monkeypatch.setattr(runner, "measure", measure)
    with Decoder(threads=1) as decoder:
        unit = runner.Unit(items[0], "jpeg", "jpeg", (50.0,), None)
        (row,) = runner._Measurer(setup, decoder).measured(unit)
    assert (row["psnr"], row["ms_ssim"]) == (30.0, None)
    assert "lpips" not in row
    assert row["problems"] == [
        "a.png: too small: leave it out",
        "a.png: unexpected RuntimeError: out of luck in weights.pth; COMPAND_DEBUG=1 shows where",
    ]


def test_an_unfinished_quality_of_an_earlier_run_does_not_shrink_the_others(photos, tmp_path):
    assert evaluate(photos, tmp_path / "out", codecs=["raw"], qualities="raw=2,6") == 0
    lines = (tmp_path / "out" / MEASUREMENTS).read_text().splitlines()
    kept = [line for line in lines if '"quality": 2.0' in line or '"item": "a.png"' in line]
    (tmp_path / "out" / MEASUREMENTS).write_text("\n".join([*kept, ""]))
    assert evaluate(photos, tmp_path / "out", codecs=["raw"], qualities="raw=2,4") == 0
    summary = results(tmp_path / "out")["summary"]
    points = summary["codecs"]["raw"]["points"]
    assert [(point["quality"], point["items"]) for point in points] == [(2, 3), (4, 3)]
    assert any("quality 6 is left out, it has 1 of 3 items" in notice for notice in summary["notices"])


def test_no_folder_of_this_machine_is_in_the_results(photos, tmp_path, monkeypatch):
    (photos / "broken.png").write_bytes(b"nonsense")
    write_picture(photos / "unfit.png", red=UNFIT)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["compand", "eval", "rd", str(photos), f"--output={out}"])
    assert evaluate(photos, out, codecs=["faulty"], qualities="faulty=8") == 1
    text = (out / "results.json").read_text()
    assert "broken.png" in text
    assert str(tmp_path) not in text
    assert results(out)["provenance"]["command"] == "compand eval rd photos --output=out"


def test_audio_results_inside_the_data_folder_do_not_make_it_mixed(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(np.arange(4000) * 0.1), 8000)
    out = tmp_path / "out"
    assert evaluate(tmp_path, out, codecs=["identity"], metrics=["sdr"], examples=1) == 0
    write_picture(out / "plot.png")
    assert evaluate(tmp_path, out, codecs=["identity", "flac"], metrics=["sdr"], examples=1) == 0
    assert {row["item"] for row in results(out)["rows"]} == {"tone.wav"}


def test_results_inside_the_data_folder_are_no_items(photos, tmp_path):
    for _ in range(2):
        assert evaluate(photos, photos / "out", codecs=["raw"], qualities="raw=2", examples=1) == 0
    assert len(results(photos / "out")["rows"]) == 3
    with pytest.raises(UsageError, match="holds all items"):
        evaluate(photos, photos, codecs=["raw"], force=True)
    assert len(list(photos.glob("*.png"))) == 3


def test_results_of_other_data_are_not_overwritten(photos, tmp_path):
    assert evaluate(photos, tmp_path / "out", codecs=["jpeg"], qualities="jpeg=50") == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    write_picture(photos / "new.png")
    with pytest.raises(UsageError, match="holds another run"):
        evaluate(photos, tmp_path / "out", codecs=["jpeg"], qualities="jpeg=50")
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert evaluate(photos, tmp_path / "out", codecs=["raw"], qualities="raw=2", force=True) == 0
    assert list(results(tmp_path / "out")["summary"]["codecs"]) == ["raw"]


# --------------------------------------------------------------------------------------------- selection


def test_qualities_by_codec_and_for_all_of_compand():
    grid = select(["hyperprior", "jpeg", "webp"], "2,1;jpeg=50,10", "image")
    assert grid["hyperprior-v1"] == (1.0, 2.0)
    assert grid["jpeg"] == (10.0, 50.0)
    assert len(grid["webp"]) >= 8
    assert select(["hyperprior"], "hyperprior=2.5", "image") == {"hyperprior-v1": (2.5,)}
    assert set(select(None, None, "image")) >= {"hyperprior-v1", "jpeg", "webp", "identity"}
    assert all(len(qualities) >= 8 for qualities in select(["hyperprior", "jpeg"], None, "image").values())


@pytest.mark.parametrize(
    ("codecs", "qualities", "fact"),
    [
        (["jpg"], None, "jpg"),
        (["jpeg", "jpeg"], None, "given twice"),
        (["hyperprior", "hyperprior-v1"], None, "given twice"),
        ([], None, "no codec"),
        (["jpeg"], "webp=3", "not among the codecs"),
        (["jpeg"], "jpeg=high", "no numbers"),
        (["jpeg"], "jpeg=1;jpeg=2", "twice"),
        (["opus"], None, "opus"),
        (["jpeg"], "jpeg=50,2000", "jpeg has no quality 2000: choose 1 to 100"),
        (["jpeg"], "jpeg=50.5", "jpeg has no quality 50.5: choose a whole number"),
        (["hyperprior", "jpeg"], "1,9", "hyperprior-v1 has no quality 9"),
        (["identity"], "identity=2", "identity has no quality 2"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused(codecs, qualities, fact):
    with pytest.raises(UsageError, match=fact):
        select(codecs, qualities, "image")


# ------------------------------------------------------------------------------------------ command line


def test_the_command_line_hands_every_option_over(monkeypatch):
    seen = []
    monkeypatch.setattr(rd, "run", lambda options: seen.append(options) or 1)
    line = "rd photos -o out -c jpeg,webp -q jpeg=1 --metrics psnr,ms_ssim --anchor webp --medium image"
    line += " --published none --examples 2 --plugin one --plugin two -j 3 --force --quiet"
    with pytest.raises(SystemExit) as end:
        library_cli.main(["eval", *line.split()])
    assert end.value.code == 1
    assert seen == [
        Options(
            Path("photos"), Path("out"), ["jpeg", "webp"], "jpeg=1", ["psnr", "ms_ssim"], "webp", "image", "none", 2,
            ("one", "two"), 3, True, True,
        )
    ]  # fmt: skip


def test_a_missing_package_is_named(monkeypatch, capsys):
    def run(options):
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(rd, "run", run)
    with pytest.raises(UsageError, match=r'timm is not installed: pip install "compand\[eval\]"'):
        cli.main(["rd", "photos", "-o", "out"])


@pytest.mark.parametrize("arguments", [["--help"], ["rd", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys\nfrom compand.cli import main\n"
        f"try:\n    main(['eval', *{arguments}])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([name for name in ('torch', 'numpy', 'PIL', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "rd" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_bar_is_for_terminals(monkeypatch, capsys):
    with _progress(3, shown=True) as advance:
        advance(3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with _progress(3, shown=True) as advance:
        advance(3)
    assert "3/3" in capsys.readouterr().err
    with _progress(3, shown=False) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_the_summary_is_printed(photos, tmp_path, capsys):
    assert (
        evaluate(photos, tmp_path / "out", codecs=["jpeg", "raw"], qualities="jpeg=50,90", quiet=False) == 0
    )
    out, err = capsys.readouterr()
    assert out.startswith("CODEC")
    assert "AGAINST JPEG" in out
    assert "results.csv" in out
    assert err == ""


def test_plots_and_a_page_are_written_and_replaced(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rd, "write_page", WRITE_PAGE)
    out = tmp_path / "out"
    chosen = {"codecs": ["jpeg", "raw"], "qualities": "jpeg=50,90"}
    assert evaluate(photos, out, **chosen, examples=1, quiet=False) == 0
    page = (out / "report.html").read_text()
    assert "JPEG" in page
    assert "Rate and distortion on photos" in page
    plots = list(out.glob("*.png"))
    assert plots
    assert all(str(path) in capsys.readouterr().out for path in plots[:1])
    assert evaluate(photos, out, **chosen, force=True, metrics=["ms_ssim"]) == 1
    assert not (out / "rd_psnr.png").exists()


def test_problems_are_grouped_and_a_long_list_is_cut(capsys):
    def problem(item, message):
        return {"item": item, "codec": "jpeg", "quality": 1, "message": message}

    problems = [problem(f"{number}.png", f"{number}.png: jpeg has no quality 0") for number in range(5)]
    rd.report_problems([*problems, problem("9.png", "9.png is broken")])
    assert capsys.readouterr().err.splitlines() == [
        "compand: 6 problems:",
        "  0.png, 1.png, 2.png and 2 more: jpeg has no quality 0",
        "  9.png is broken",
    ]
    rd.report_problems([problem("a.png", f"fault {number}") for number in range(30)])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compand: 30 problems:"
    assert lines[-1] == "  and 10 more, in results.json"
    assert len(lines) == 22
    rd.report_problems([])
    assert capsys.readouterr().err == ""
