"""Storage of measurements, means over the same items, tables."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compand.errors import UsageError
from compand.eval.measurements import (
    MEASUREMENTS,
    RUN,
    Key,
    Store,
    as_csv,
    bits_per_pixel,
    complete_items,
    counted_rows,
    key_of,
    kilobits_per_second,
    mean_points,
    row_notices,
    row_problems,
    summary_codecs,
    write_results,
)

DESCRIPTION = {
    "kind": "rd", "medium": "image", "data": "photos", "items": {"a.png": "01", "b.png": "02"},
    "metrics": ["psnr"], "plugins": [],
}  # fmt: skip
FACTS = {"title": "JPEG", "kind": "classical", "note": "Pillow.", "identity": "j1"}


def row(item="a.png", codec="jpeg", quality=10.0, bpp=0.5, psnr=30.0, **more):
    return {
        "item": item, "medium": "image", "codec": codec, "identity": "j1", "quality": quality, "bytes": 100,
        "overhead_bytes": 0, "bpp": bpp, "height": 40, "width": 40, "psnr": psnr,
    } | more  # fmt: skip


def opened(folder, *, force=False, **changes):
    return Store.open(folder / "out", DESCRIPTION | changes, force=force)


def test_rates():
    assert bits_per_pixel(1000, 100, 100) == 0.8
    assert kilobits_per_second(750, 1.0) == 6.0


# ------------------------------------------------------------------------------------------------ storage


def test_rows_survive_and_a_torn_line_does_not(tmp_path):
    with opened(tmp_path) as store:
        store.add_codecs({"jpeg": FACTS})
        store.append(row(quality=20.0, psnr=math.inf))
        store.append(row(quality=10.0))
    path = tmp_path / "out" / MEASUREMENTS
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"item": "b.png", "medi')
    with opened(tmp_path) as store:
        assert [(each["quality"], each["psnr"]) for each in store.rows()] == [(10.0, 30.0), (20.0, math.inf)]
        assert store.done(Key("a.png", "jpeg", "j1", 10.0), ["psnr"])
        assert not store.done(Key("b.png", "jpeg", "j1", 10.0))
        store.append(row("b.png"))
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["item"] for line in path.read_text().splitlines()] == ["a.png", "a.png", "b.png"]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    with opened(tmp_path) as store:
        store.append(row())
    path = tmp_path / "out" / MEASUREMENTS
    path.write_bytes(b"{]\n" + path.read_bytes())
    with pytest.raises(UsageError, match=r"measurements\.jsonl, line 1, is damaged"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["item", "codec", "identity", "quality", "medium", "bytes", "bpp"])
def test_a_line_without_its_columns_is_an_error(tmp_path, name):
    with opened(tmp_path) as store:
        store.append(row())
    path = tmp_path / "out" / MEASUREMENTS
    lacking = {key: value for key, value in row().items() if key != name}
    for line in (json.dumps(lacking), "5", "[]"):
        path.write_text(f"{json.dumps(row())}\n{line}\n")
        with pytest.raises(UsageError, match=r"measurements\.jsonl, line 2, is damaged"):
            opened(tmp_path)


@pytest.mark.parametrize("change", [None, [], {"jpeg": {"title": "JPEG"}}, {"jpeg": 5}])
def test_a_description_without_codecs_is_an_error(tmp_path, change):
    with opened(tmp_path):
        pass
    path = tmp_path / "out" / RUN
    content = json.loads(path.read_text()) | {"codecs": change}
    if change is None:
        del content["codecs"]
    for text in (json.dumps(content), "[]"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"run\.json is damaged") as caught:
            opened(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_row_keeps_the_metrics_that_were_not_measured_again(tmp_path):
    with opened(tmp_path) as store:
        store.add_codecs({"jpeg": FACTS})
        store.append(row(psnr=30.0))
    with opened(tmp_path, metrics=["ms_ssim"]) as store:
        new = {name: value for name, value in row(ms_ssim=0.9).items() if name != "psnr"}
        store.append(new, ["ms_ssim"])
        assert [(each["psnr"], each["ms_ssim"]) for each in store.rows()] == [(30.0, 0.9)]
        store.append(new, ["psnr", "ms_ssim"])  # PSNR failed now
        assert "psnr" not in store.rows()[0]
        store.append(row(psnr=30.0))
        store.append(new | {"bytes": 99}, ["ms_ssim"])  # another file: its PSNR is not known
        assert "psnr" not in store.rows()[0]


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"items": {"a.png": "01"}}, "0 more, 1 fewer, 0 changed"),
        ({"items": {"a.png": "01", "b.png": "03", "c.png": "04"}}, "1 more, 0 fewer, 1 changed"),
        ({"kind": "perception"}, "kind rd there, perception here"),
        ({"model": "abc"}, "model None there, abc here"),
    ],
)
def test_another_run_is_not_mixed_in(tmp_path, changes, fact):
    with opened(tmp_path) as store:
        store.add_codecs({"jpeg": FACTS})
        store.append(row())
    with pytest.raises(UsageError, match=fact):
        opened(tmp_path, **changes)
    with opened(tmp_path) as store:
        assert len(store.rows()) == 1
    with opened(tmp_path, force=True, **changes) as store:
        assert store.rows() == []


def test_force_discards_what_the_run_wrote_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    with opened(tmp_path) as store:
        store.add_codecs({"jpeg": FACTS})
        store.append(row())
        store.add_written(["plot.png", "examples/a", "results.csv"])
    ours = ["plot.png", "results.csv", "examples/a/original.png", "examples/a/jpeg-10.flac"]
    others = ["photo.png", "report.html", "examples/mine.png", "examples/b/photo.png"]
    for name in (*ours, *others):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    with opened(tmp_path, force=True, items={"c.png": "3"}) as store:
        assert store.rows() == []
        assert not any((out / name).exists() for name in ours)
        assert all((out / name).exists() for name in others)


def test_a_folder_of_something_else_is_never_written_to(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "measurements.jsonl").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UsageError, match="holds files but no run"):
            opened(tmp_path, force=force)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [
        ("measurements.jsonl", "years of work")
    ]


def test_metrics_plugins_and_codecs_may_be_added(tmp_path):
    with opened(tmp_path) as store:
        store.add_codecs({"jpeg": FACTS})
        store.append(row())
    with opened(tmp_path, metrics=["ms_ssim"], plugins=["mine"], data="renamed") as store:
        assert not store.done(Key("a.png", "jpeg", "j1", 10.0), ["psnr", "ms_ssim"])
        store.append(row(ms_ssim=None))
        assert store.done(Key("a.png", "jpeg", "j1", 10.0), ["psnr", "ms_ssim"])
        assert len(store.rows()) == 1
        store.add_codecs({"webp": FACTS | {"title": "WebP"}})
    description = json.loads((tmp_path / "out" / RUN).read_text())
    assert description["metrics"] == ["psnr", "ms_ssim"]
    assert description["plugins"] == ["mine"]
    assert list(description["codecs"]) == ["jpeg", "webp"]


def test_rows_of_a_codec_that_changed_do_not_count(tmp_path):
    with opened(tmp_path) as store:
        store.add_codecs({"jpeg": FACTS})
        store.append(row())
        store.add_codecs({"jpeg": FACTS | {"identity": "j2"}})
        assert store.rows() == []
        assert not store.done(Key("a.png", "jpeg", "j2", 10.0))
        store.append(row(identity="j2", psnr=31.0))
        assert [each["psnr"] for each in store.rows()] == [31.0]


def test_two_runs_do_not_share_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    with opened(tmp_path) as store:
        with pytest.raises(UsageError, match="in use by another run"):
            opened(tmp_path)
        store.append(row())
    opened(tmp_path).__exit__(None, None, None)


# -------------------------------------------------------------------------------------------------- means


def test_points_are_means_over_the_same_items():
    rows = [
        row("a.png", quality=10, bpp=0.25, psnr=30.0),
        row("a.png", quality=20, bpp=0.5, psnr=32.0),
        row("b.png", quality=10, bpp=0.75, psnr=26.0),
        row("b.png", quality=20, bpp=1.0, psnr=28.0),
        row("c.png", quality=10, bpp=9.0, psnr=99.0),  # nothing at quality 20
        row("d.png", quality=10, bpp=9.0, psnr=99.0),
        row("d.png", quality=20, bpp=9.0, psnr=None),
    ]
    assert complete_items(rows, "psnr") == {"jpeg": ["a.png", "b.png"]}
    assert complete_items(rows) == {"jpeg": ["a.png", "b.png", "d.png"]}
    assert mean_points(rows, "psnr") == {"jpeg": [(10, 2, 0.5, 28.0), (20, 2, 0.75, 30.0)]}
    assert mean_points(rows, "psnr", ["b.png", "c.png"])["jpeg"] == [(10, 1, 0.75, 26.0), (20, 1, 1.0, 28.0)]
    assert mean_points(rows, "lpips") == {"jpeg": []}


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("xy"), st.sampled_from([1, 2, 3])), unique=True
    )
)
def test_every_point_of_a_codec_has_the_same_items(keys):
    rows = [row(item, codec, quality) for item, codec, quality in keys]
    complete = complete_items(rows)
    for codec, points in mean_points(rows, "psnr").items():
        qualities = {each["quality"] for each in rows if each["codec"] == codec}
        assert {point.items for point in points} <= {len(complete[codec])}
        assert {point.quality for point in points} == (qualities if complete[codec] else set())


def test_summary_says_what_its_means_leave_out(tmp_path):
    with opened(tmp_path) as store:
        store.add_codecs({"jpeg": FACTS, "webp": FACTS | {"title": "WebP"}})
        store.append(row("a.png", ms_ssim=0.9))
        store.append(row("b.png", bpp=1.0, ms_ssim=None))
        store.append(row("a.png", "webp", ms_ssim=0.9))
        codecs, notices = summary_codecs(store, ["psnr", "ms_ssim"], store.rows())
    (point,) = codecs["jpeg"]["points"]
    assert point == {
        "quality": 10.0, "items": 2, "bytes": 100, "bpp": 0.75, "psnr": 30.0, "ms_ssim": 0.9, "ms_ssim_items": 1,
    }  # fmt: skip
    assert codecs["webp"]["points"][0]["items"] == 1
    assert notices == [
        "JPEG: ms_ssim is the mean over 1 of 2 items",
        "WebP: means are over 1 of 2 items, those measured at every point",
    ]


def counted(folder, points, selected=None):
    """Qualities that count, by codec, and the notices, for numbers of items by codec and quality."""
    with opened(folder, items={f"{number:02}.png": "0" for number in range(20)}) as store:
        for codec, counts in points.items():
            store.add_codecs({codec: FACTS | {"title": codec.upper()}})
            for quality, numbers in counts.items():
                for number in numbers:
                    store.append(row(f"{number:02}.png", codec, float(quality)))
        rows, notices = counted_rows(store, selected)
    found = {codec: sorted({each["quality"] for each in rows if each["codec"] == codec}) for codec in points}
    return found, notices


def test_a_point_that_lacks_a_tenth_of_the_items_is_left_out(tmp_path):
    everything = range(20)
    found, notices = counted(
        tmp_path, {"jpeg": {10: everything, 20: range(18), 30: range(17)}, "webp": {1: range(3)}}
    )
    assert found == {"jpeg": [10, 20], "webp": []}
    assert notices == [
        "JPEG: quality 30 is left out, it has 17 of 20 items: see the problems",
        "WEBP: quality 1 is left out, it has 3 of 20 items: see the problems",
    ]


def test_points_of_earlier_runs_count_where_they_shrink_no_other(tmp_path):
    everything = range(20)
    points = {"jpeg": {10: everything, 20: range(19), 30: range(2)}, "webp": {1: everything, 2: range(19)}}
    found, notices = counted(tmp_path, points, {"jpeg": [10.0]})
    assert found == {"jpeg": [10], "webp": [1]}
    assert notices[:2] == [
        "JPEG: quality 20 is left out, it has 19 of 20 items: select it to have it measured wholly",
        "JPEG: quality 30 is left out, it has 2 of 20 items: select it to have it measured wholly",
    ]
    assert counted(tmp_path, points, {"jpeg": [20.0], "webp": [1.0, 2.0]})[0] == {
        "jpeg": [10, 20],
        "webp": [1, 2],
    }


def test_an_item_that_nothing_could_read_costs_no_point(tmp_path):
    found, notices = counted(tmp_path, {"jpeg": {10: range(10), 20: range(10)}})
    assert (found, notices) == ({"jpeg": [10, 20]}, [])


def test_problems_and_notes_of_rows():
    rows = [
        row(f"{name}.png", notes=["transparency dropped"], problems=[f"{name}.png is too small"])
        for name in "abcde"
    ]
    assert row_problems(rows)[1] == ("b.png", "jpeg", 10.0, "b.png is too small")
    assert row_notices(rows) == ["transparency dropped: a.png, b.png, c.png and 2 more"]


# ------------------------------------------------------------------------------------------------- tables


def test_results_are_written_as_json_and_csv(tmp_path):
    summary = {"codecs": {"jpeg": {"points": [{"psnr": math.inf}]}}}
    with opened(tmp_path) as store:
        store.add_codecs({"jpeg": FACTS})
        store.append(row("b, c.png", problems=["one", "two"]))
        store.append(row(psnr=math.inf, outcome=[1.0, 0.0]))
        table, text = write_results(store, summary, {"command": "compand eval rd"})
    written = json.loads(table.read_text(), parse_constant=pytest.fail)
    assert written["schema"] == 1
    assert written["provenance"] == {"command": "compand eval rd"}
    assert written["rows"][0]["psnr"] == written["summary"]["codecs"]["jpeg"]["points"][0]["psnr"] == "inf"
    records = list(csv.DictReader(io.StringIO(text.read_text())))
    assert [record["item"] for record in records] == ["a.png", "b, c.png"]
    assert [record["psnr"] for record in records] == ["inf", "30.0"]
    assert [record["outcome"] for record in records] == ["1.0 0.0", ""]
    assert records[1]["problems"] == "one; two"
    assert list(records[0])[:5] == ["item", "medium", "codec", "identity", "quality"]
    assert list(records[0])[-2:] == ["outcome", "problems"]


def origins(folder, command, *, measured=True):
    """The provenance that is written by a run of this command."""
    with opened(folder) as store:
        store.add_codecs({"jpeg": FACTS})
        if measured:
            store.add_origin({"command": command, "date": "begun"})
            store.append(row())
        path, _ = write_results(store, {"codecs": {}}, {"command": command, "date": "done"})
    return json.loads(path.read_text())["provenance"]


def test_every_run_that_measured_something_is_on_record(tmp_path):
    with opened(tmp_path) as store:  # a run that is killed
        store.add_origin({"command": "first", "date": "begun"})
    first, second = {"command": "first", "date": "begun"}, {"command": "second", "date": "done"}
    assert origins(tmp_path, "second") == second | {"earlier": [first]}
    assert origins(tmp_path, "third", measured=False) == second | {"earlier": [first]}
    assert origins(tmp_path, "fourth")["earlier"] == [first, second]


def test_folders_of_runs_without_a_record_are_continued(tmp_path):
    with opened(tmp_path):
        pass
    path = tmp_path / "out" / RUN
    content = json.loads(path.read_text())
    del content["origins"]
    path.write_text(json.dumps(content))
    assert origins(tmp_path, "later", measured=False) == {"command": "later", "date": "done"}
    assert origins(tmp_path, "again") == {"command": "again", "date": "done"}


def test_csv_of_nothing_is_empty():
    assert as_csv([]).strip() == ""


def test_keys_tell_rows_apart():
    assert len({key_of(each) for each in (row(), row("b.png"), row(codec="webp"), row(quality=5.0))}) == 4
    assert key_of(row(quality=10)) == key_of(row(quality=10.0, psnr=1.0))
