"""`compand eval speed`: what is timed, how it is split, and what comes of it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import speed_codecs
import torch
from PIL import Image, ImageFile

from compand import checkpoint, registry
from compand.coding import container
from compand.coding.ans import AnsReader, AnsWriter
from compand.errors import MediaError, UsageError
from compand.eval import cli, subjects
from compand.eval.items import Item, load
from compand.eval.speed import contenders, material, peers, results, runner, stages, worker
from compand.eval.speed.contenders import Contender
from compand.eval.speed.results import Amounts, Entry
from compand.eval.speed.runner import Options
from compand.eval.speed.stages import Hook, Stopwatch, codec_hooks, hooked, peer_hooks
from compand.eval.speed.worker import Coder, Timing
from compand.eval.subjects import CompandSubject
from compand.pictures import Picture


def nothing():
    pass


@pytest.fixture
def picture(scenery):
    return Picture(np.ascontiguousarray(scenery[100:197, 200:331]), None, None)


# ----------------------------------------------------------------------------------------------- stages


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stages.time, "perf_counter", lambda: clock.now)
    return clock


def test_a_stage_within_another_one_interrupts_it(clock):
    synchronized = []
    stopwatch = Stopwatch(lambda: synchronized.append(clock.now))
    with stopwatch.stage("outer"):
        clock.now += 1
        with stopwatch.stage("inner"):
            clock.now += 10
            with stopwatch.stage("outer"):
                clock.now += 100
        clock.now += 1000
    clock.now += 10000
    with stopwatch.stage("inner"):
        clock.now += 100000
    assert stopwatch.seconds == {"outer": 1101, "inner": 100010}
    assert synchronized == [100, 101, 111, 211, 211, 1211, 11211, 111211]


def test_a_stage_that_fails_ends(clock):
    stopwatch = Stopwatch(nothing)

    def fail():
        clock.now += 1
        raise ValueError("fault")

    with stopwatch.stage("outer"):
        with pytest.raises(ValueError, match="fault"):
            stopwatch.timed("inner", fail)()
        clock.now += 10
    assert stopwatch.seconds == {"inner": 1, "outer": 10}


def test_hooks_are_gone_afterwards():
    class Base:
        def inherited(self):
            return "inherited"

    class Owner(Base):
        def own(self):
            return "own"

    before = dict(vars(Owner))
    owner = Owner()
    stopwatch = Stopwatch(nothing)
    hooks = [Hook("a", Owner, ("own", "inherited")), Hook("b", owner, ("own",))]

    def use_and_fail():
        with hooked(hooks, stopwatch):
            assert (owner.own(), owner.inherited()) == ("own", "inherited")
            assert set(stopwatch.seconds) == {"a", "b"}
            raise ValueError("fault")

    with pytest.raises(ValueError, match="fault"):
        use_and_fail()
    assert dict(vars(Owner)) == before
    assert vars(owner) == {}
    stopwatch.seconds.clear()
    owner.own()
    assert not stopwatch.seconds


@pytest.mark.parametrize("name", [entry.name for entry in registry.entries() if entry.medium == "image"])
def test_every_codec_is_split_into_stages(name, exact, picture):
    codec = exact(name)
    watched = [codec.transform, codec.bottleneck, AnsWriter, AnsReader, container]
    before = [dict(vars(owner)) for owner in watched]
    plain = codec.encode(picture, quality=3)
    stopwatch = Stopwatch(nothing)
    with hooked(codec_hooks(codec), stopwatch):
        with stopwatch.stage("other"):
            data = codec.encode(picture, quality=3)
        encoding = dict(stopwatch.seconds)
        stopwatch.seconds.clear()
        start = time.perf_counter()
        with stopwatch.stage("other"):
            decoded = codec.decode(data)
        total = time.perf_counter() - start
    assert data == plain
    assert np.array_equal(decoded.pixels, codec.decode(plain).pixels)
    for seconds in (encoding, stopwatch.seconds):
        assert set(seconds) == {"transform", "prior", "entropy_coding", "io", "other"}
        assert all(value > 0 for value in seconds.values())
    assert 0.5 * total < sum(stopwatch.seconds.values()) <= total
    assert [dict(vars(owner)) for owner in watched] == before


# ------------------------------------------------------------------------------------------ what is timed


def test_warm_up_does_not_count_and_nothing_but_the_pass_is_timed():
    log = []
    timing = Timing(
        lambda enter: log.append("pass"), lambda: log.append("prepare"), lambda: log.append("sync")
    )
    assert len(timing.passes(warm_up=2, repetitions=3)) == 3
    assert log == ["prepare", "sync", "pass", "sync"] * 5


def test_work_that_a_device_puts_off_is_timed():
    queue = []

    def act(enter):
        queue.append(threading.Timer(0.03, nothing))
        queue[-1].start()

    def synchronize():
        while queue:
            queue.pop().join()

    timing = Timing(act, nothing, synchronize)
    assert all(seconds >= 0.03 for seconds in timing.passes(0, 2))
    assert all(seconds >= 0.03 for seconds in timing.stages([], 2)["codec"])


def test_a_gpu_is_synchronized_at_both_ends_of_all_that_is_timed(china, tmp_path, monkeypatch):
    calls = []
    cuda = SimpleNamespace(
        synchronize=lambda device: calls.append(device),
        reset_peak_memory_stats=lambda device: calls.clear(),
        max_memory_allocated=lambda device: {"cuda:1": 123}[device],
    )
    monkeypatch.setattr(worker, "_cuda", lambda: cuda)
    monkeypatch.setattr(worker, "_load", lambda *arguments: ("cuda:1", [], ""))
    found = worker.measure(
        worker.Job("jpeg", False, "image", [str(china)], "auto", 1, 1, 2, [], [], str(tmp_path))
    )
    assert (found["device"], found["peak_gpu"]) == ("cuda:1", 123)
    whole_passes, both_stages = 2 * (1 + 2), 2 + 2
    assert calls == ["cuda:1"] * (2 * (whole_passes + both_stages))


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif", "jpeg2000", "png"])
def test_pixels_are_decoded_within_the_timed_pass(name, picture, tmp_path, monkeypatch):
    """Pillow opens files lazily: until the pixels are wanted, next to nothing is done."""
    if name not in subjects.names("image"):
        pytest.skip("Pillow was built without it")
    subject = subjects.find(name)
    coder = Coder(subject, contenders.middle_quality(subject), [picture], tmp_path)
    coder.encode(worker._no_stage)
    original = ImageFile.ImageFile.load
    loads = []

    def slow_load(self):
        loads.append(time.sleep(0.03))
        return original(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", slow_load)
    timing = Timing(coder.decode, nothing, nothing)
    assert timing.passes(0, 1)[0] >= 0.03
    assert len(loads) >= 1
    loads.clear()
    assert timing.stages([], 1)["codec"][0] >= 0.03
    assert len(loads) >= 1


def test_samples_that_a_codec_puts_off_are_timed(tmp_path):
    class Lazy:
        def __array__(self, dtype=None, copy=None):
            time.sleep(0.03)
            return np.zeros((1, 8), np.float32)

    subject = SimpleNamespace(suffix=".lazy", decode=lambda data: SimpleNamespace(samples=Lazy()))
    coder = Coder(subject, 1, [None], tmp_path)
    (tmp_path / "0.lazy").write_bytes(b"")
    assert Timing(coder.decode, nothing, nothing).passes(0, 1)[0] >= 0.03


def test_a_codec_that_changes_the_shape_is_refused(picture, tmp_path):
    half = Picture(picture.pixels[::2], None, None)
    subject = SimpleNamespace(
        name="half", suffix=".half", encode=lambda signal, quality: b"", decode=lambda d: half
    )
    coder = Coder(subject, 1, [picture], tmp_path)
    coder.encode(worker._no_stage)
    with pytest.raises(MediaError, match="half does not restore"):
        coder.check()


def test_time_in_files_is_io(picture, tmp_path, monkeypatch):
    subject = subjects.find("png")
    coder = Coder(subject, 1, [picture, picture], tmp_path)
    read, write = Path.read_bytes, Path.write_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (time.sleep(0.02), read(path))[1])
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (time.sleep(0.02), write(path, data))[1])
    for action in (coder.encode, coder.decode):
        seconds = Timing(action, nothing, nothing).stages([], 1)
        assert set(seconds) == {"io", "codec"}
        assert seconds["io"][0] >= 0.04
    assert coder.sizes() == [len(subject.encode(picture, 1))] * 2


def test_a_classical_codec_is_timed_without_torch(china):
    """Its memory would be torch's otherwise."""
    code = (
        "import sys; from compand.eval.speed import contenders, worker; from compand.eval.items import Item, load\n"
        "from pathlib import Path\n"
        f"signal = load(Item('a', Path({str(china)!r}), 'image'))\n"
        "subject = contenders.parse('jpeg').subject('image', 'auto')\n"
        "subject.decode(subject.encode(signal, 50)); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --------------------------------------------------------------------------------------------- contenders


def test_a_contender_is_read_from_its_text():
    assert contenders.parse("jpeg") == Contender("jpeg")
    assert contenders.parse("jpeg@75.5") == Contender("jpeg", "@75.5", False, 75.5)
    whole = contenders.parse("runs/v2:b@4:float32:untuned")
    assert whole == Contender("runs/v2:b", "@4:float32:untuned", False, 4.0, ("float32", "untuned"))
    assert whole.text_for("hyperprior-v1") == "hyperprior-v1@4:float32:untuned"
    assert (whole.reduced, whole.tuned) == (False, False)
    assert contenders.parse("a:bfloat16").reduced
    assert contenders.parse("a").reduced is None
    assert [contenders.parse(text, peer=True).tuned for text in ("m", "m:tuned")] == [False, True]


@pytest.mark.parametrize("text", ["", "a:float32:bfloat16", "a:untuned:untuned", "a@1.2.3"])
def test_a_text_that_names_no_contender_is_refused(text):
    with pytest.raises(UsageError):
        contenders.parse(text)


@pytest.mark.parametrize(
    ("text", "peer", "fact"),
    [
        ("jpeg:float32", False, "jpeg cannot be timed as float32"),
        ("hyperprior:tuned", False, "hyperprior cannot be timed as tuned"),
        ("mbt2018-mean:untuned", True, "mbt2018-mean cannot be timed as untuned"),
        ("mbt2018-meany", True, "compressai has no model mbt2018-meany"),
        ("nothing", False, "codec nothing is unknown"),
    ],
)
def test_a_setting_or_name_that_does_not_exist_is_refused(text, peer, fact):
    with pytest.raises(UsageError, match=fact):
        contenders.parse(text, peer=peer).subject("image", "cpu")


def test_settings_reach_the_model(checkpoint_of, picture, tmp_path, monkeypatch):
    tuned = []
    monkeypatch.setattr("compand.allocator.tune_allocator", lambda: tuned.append(True) or True)
    path = tmp_path / "picture.png"
    Image.fromarray(picture.pixels).save(path)
    for setting, dtype, note in (
        (":bfloat16", torch.bfloat16, "bfloat16 transforms, allocator tuned"),
        (":float32:untuned", torch.float32, "float32 transforms, allocator as it comes"),
    ):
        tuned.clear()
        contender = contenders.parse(f"{checkpoint_of('factorized')}@2{setting}")
        subject = contender.subject("image", "cpu")
        job = worker.Job(
            contender.text_for(subject.source),
            False,
            "image",
            [str(path)],
            "cpu",
            1,
            0,
            1,
            [],
            [],
            str(tmp_path),
        )
        device, hooks, found = worker._load(contender, subject, 2, job)
        assert (device, found) == ("cpu", note)
        assert isinstance(subject, CompandSubject)
        assert dtype in {parameter.dtype for parameter in subject.codec.transform.parameters()}
        assert subject.codec.transform in [hook.owner for hook in hooks]
        assert bool(tuned) == contender.tuned
        assert worker.measure(job)["sizes"] == [len(subject.encode(picture, 2))]


# -------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("name", ["mbt2018-mean", "bmshj2018-factorized"])
def test_a_peer_codes_pictures_of_any_size(name, picture):
    pytest.importorskip("compressai")
    plain, tuned = (peers.Peer(name, tuned=setting, device="cpu") for setting in (False, True))
    for peer in (plain, tuned):
        peer.load(1)
    data = plain.encode(picture, 1)
    decoded = plain.decode(data)
    assert decoded.pixels.shape == picture.pixels.shape
    # Random weights give a gray picture; that the right one is meant shows in what another order of memory gives.
    assert np.abs(tuned.decode(data).pixels.astype(int) - decoded.pixels).max() <= 1
    assert plain.model.g_a[0].weight.is_contiguous()
    assert tuned.model.g_a[0].weight.is_contiguous(memory_format=torch.channels_last)
    stopwatch = Stopwatch(nothing)
    with hooked(peer_hooks(plain.model), stopwatch), stopwatch.stage("other"):
        assert plain.encode(picture, 1) == data
    assert {"transform", "entropy_coding", "other"} <= set(stopwatch.seconds)
    assert ("prior" in stopwatch.seconds) == (name == "mbt2018-mean")
    assert not {"forward", "compress"} & set(vars(plain.model.g_a) | vars(plain.model.entropy_bottleneck))


def test_a_peer_says_what_it_does_not_code(picture):
    pytest.importorskip("compressai")
    peer = peers.Peer("bmshj2018-factorized")
    with pytest.raises(UsageError, match="no weights"):
        peer.decode(b"")
    with pytest.raises(UsageError, match="has no quality 99"):
        peer.load(99)
    with pytest.raises(UsageError, match=r"has no quality 4\.5"):
        peer.load(4.5)
    peer.load(1)
    with pytest.raises(MediaError, match="no file of"):
        peer.decode(b"short")


# ------------------------------------------------------------------------------------------------ results


def entry(text, *reports, kind="classical", peer=False):
    subject = SimpleNamespace(
        name=text.partition("@")[0], title=text.upper(), kind=kind, settings_note="A note."
    )
    return Entry(contenders.parse(text, peer=peer), subject, list(reports))


def report(encode, decode, stages=None, sizes=(1000, 3000), peak=3e6):
    return {
        "quality": 4.0,
        "device": "cpu",
        "note": "",
        "sizes": list(sizes),
        "baseline_rss": 2_000_000,
        "peak_rss": int(peak),
        "peak_gpu": None,
        "totals": {"encode": encode, "decode": decode},
        "stages": stages or {"encode": {"codec": [0.1]}, "decode": {"codec": [0.1]}},
    }


AMOUNTS = Amounts("image", [0.5, 1.5])


def test_speeds_are_medians_with_quartiles_and_ratios_to_the_reference():
    staged = {"encode": {"io": [0.2, 0.4], "codec": [1.0, 3.0]}, "decode": {"codec": [1.0]}}
    entries = [
        entry("fast", report([1.0, 2.0], [4.0, 4.0], staged), report([3.0, 4.0], [4.0, 8.0], peak=5e6)),
        entry("slow", report([10.0, 10.0], [8.0, 8.0]), report([20.0, 20.0], [8.0, 8.0])),
    ]
    found = results.codec_summaries(entries, AMOUNTS, "slow")
    fast = found["fast"]["speed"]
    assert fast["encode"] == {
        "median": pytest.approx(2 / 2.5),
        "q1": pytest.approx(2 / 3.25),
        "q3": pytest.approx(2 / 1.75),
        "unit": "MP/s",
        "repetitions": 4,
    }
    assert fast["milliseconds"] == {"encode": pytest.approx(1250), "decode": pytest.approx(2000)}
    # Milliseconds an item, medians over all rounds.
    assert fast["stages"]["encode"] == {"io": pytest.approx(150), "codec": pytest.approx(500)}
    assert list(fast["stages"]["encode"]) == ["io", "codec"]
    assert fast["ratio_encode"] == pytest.approx(15 / 2.5)
    assert fast["ratio_encode_range"] == [pytest.approx(20 / 3.5), pytest.approx(10 / 1.5)]
    assert fast["ratio_decode"] == pytest.approx(2)
    assert (fast["peak_rss_mb"], fast["baseline_rss_mb"], fast["peak_gpu_mb"]) == (5.0, 2.0, None)
    slow = found["slow"]["speed"]
    assert (slow["ratio_encode"], slow["ratio_decode_range"]) == (1.0, [1.0, 1.0])


def test_rates_are_means_over_items_and_peers_have_none():
    entries = [
        entry("jpeg", report([1.0], [1.0])),
        entry("m@4", report([1.0], [1.0]), kind="peer", peer=True),
    ]
    found = results.codec_summaries(entries, AMOUNTS, "jpeg")
    assert found["jpeg"]["points"] == [
        {"quality": 4.0, "items": 2, "bytes": 4000, "bpp": pytest.approx((8e3 / 5e5 + 24e3 / 15e5) / 2)}
    ]
    assert found["m@4"]["points"] == []
    assert found["m@4"]["title"] == "M@4, as it comes"
    assert Amounts("audio", [2.0]).rate([1000]) == {"kbps": 4.0}


def test_tables_compare_our_codecs_with_every_peer():
    entries = [
        entry("ours", report([1.0], [2.0]), kind="compand"),
        entry("jpeg", report([0.5], [0.5])),
        entry("a", report([4.0], [3.0]), kind="peer", peer=True),
        entry("a:tuned", report([3.0], [2.0]), kind="peer", peer=True),
    ]
    run = {
        "unit": "MP/s",
        "reference": "a",
        "items": 2,
        "stage_names": stages.STAGES,
        "conditions": ["So it was."],
    }
    summary = {"title": "Speed", "speed": run, "codecs": results.codec_summaries(entries, AMOUNTS, "a")}
    text = results.render(summary | {"notices": ["Take note."], "problems": [{"message": "A fault."}]})
    assert "| OURS | 4.00 x | 1.50 x | 3.00 x | 1.00 x |" in text
    assert "| JPEG | 4 | 4.00 | 4.00 to 4.00 | 8.00 x | 4.00 | 4.00 to 4.00 | 6.00 x |" in text
    assert all(line in text for line in ("- So it was.", "- Take note.", "- A fault."))


def test_a_row_for_every_pass():
    staged = {"encode": {"io": [0.25, 0.5], "codec": [1.0, 2.0]}, "decode": {"codec": [1.0]}}
    rows = results.rows([entry("jpeg", report([1.0, 2.0], [4.0], staged), report([1.0], [1.0]))], AMOUNTS)
    assert len(rows) == (2 + 2 + 1 + 1) + 4
    assert all(list(row) == list(results.COLUMNS) for row in rows)
    second = rows[1]
    assert (second["timed"], second["repetition"], second["seconds"], second["speed"]) == (
        "total",
        2,
        2.0,
        1.0,
    )
    last = rows[3]
    assert (last["timed"], last["repetition"], last["seconds"]) == ("stages", 2, 2.5)
    assert (last["io_ms"], last["codec_ms"], last["prior_ms"]) == (500.0, 2000.0, None)
    read = list(csv.DictReader(results.as_csv(rows).splitlines()))
    assert [row["round"] for row in read] == ["1"] * 6 + ["2"] * 4
    assert (read[3]["io_ms"], read[3]["prior_ms"]) == ("500.0", "")


# ------------------------------------------------------------------------------------------------ the run


def test_a_run_from_files_to_tables(checkpoint_of, scenery, tmp_path, capsys):
    pytest.importorskip("compressai")
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        Image.fromarray(scenery[: 64 + 32 * number, :96]).save(data / f"{number}.png")
    (data / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    out = tmp_path / "out"
    ballast = np.ones(40_000_000)  # 320 MB that children must not count as theirs
    options = Options(
        out, data, codecs=["jpeg", f"{checkpoint_of('factorized')}@2:float32", "jpeg@1000"],
        peers=["bmshj2018-factorized@1"], threads=1, rounds=1, warm_up=0, repetitions=3,
    )  # fmt: skip
    assert runner.run(options) == 1  # for the broken picture, and for the quality that does not exist
    assert ballast.all()
    captured = capsys.readouterr()
    assert "broken.png" in captured.err
    assert "1000" in captured.err

    document = json.loads((out / "results.json").read_text())
    summary = document["summary"]
    assert (summary["kind"], summary["medium"], summary["metrics"]) == ("speed", "image", [])
    assert summary["title"] == "Speed on 2 items of data, 1 thread"
    assert len(summary["problems"]) == 2
    assert list(summary["codecs"]) == ["jpeg", "factorized-v1@2:float32", "bmshj2018-factorized@1"]
    run = summary["speed"]
    assert (run["reference"], run["threads"], run["items"]) == ("bmshj2018-factorized@1", 1, 2)
    assert run["amount"] == pytest.approx((64 * 96 + 96 * 96) / 1e6)
    for codec in summary["codecs"].values():
        speed = codec["speed"]
        for direction in ("encode", "decode"):
            figures = speed[direction]
            assert 0 < figures["q1"] <= figures["median"] <= figures["q3"]
            assert figures["repetitions"] == 3
            assert speed[f"ratio_{direction}"] > 0
            parts = set(speed["stages"][direction])
            inner = {"codec"} if codec["kind"] == "classical" else {"transform", "entropy_coding", "other"}
            assert parts == inner | {"io"} | ({"prior"} if codec["kind"] == "compand" else set())
        assert 20 < speed["baseline_rss_mb"] <= speed["peak_rss_mb"]
    memory = {key: codec["speed"]["peak_rss_mb"] for key, codec in summary["codecs"].items()}
    assert memory["jpeg"] < 200 < memory["factorized-v1@2:float32"]
    jpeg = summary["codecs"]["jpeg"]
    subject = subjects.find("jpeg")
    coded = [subject.encode(load(Item("", data / f"{number}.png", "image")), 40) for number in range(2)]
    assert jpeg["points"][0]["bytes"] == sum(map(len, coded)) == jpeg["speed"]["bytes"]

    with open(out / "results.csv", newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    assert list(table[0]) == list(document["schema"])
    assert len(table) == len(document["rows"]) == 3 * 2 * (3 + 1)
    tables = captured.out
    for words in (
        "relative to bmshj2018-factorized",
        "factorized-v1, float32 transforms",
        "random weights",
        "Command",
    ):
        assert words in tables
    assert {"speed.png", "speed_stages.png", "report.html"} <= {path.name for path in out.iterdir()}
    assert "factorized-v1, float32 transforms" in (out / "report.html").read_text()
    before = (out / "results.json").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        runner.run(options)
    assert (out / "results.json").read_bytes() == before


def probing(tmp_path, monkeypatch, *codecs, **further):
    monkeypatch.setenv(speed_codecs.PLACE, str(tmp_path / "facts"))
    chosen = {"threads": 1, "rounds": 2, "warm_up": 0, "repetitions": 1, "peers": [], "quiet": True} | further
    return Options(tmp_path / "out", codecs=codecs, plugins=["speed_codecs"], **chosen)


def test_codecs_take_turns_in_fresh_processes(tmp_path, monkeypatch, capsys):
    assert runner.run(probing(tmp_path, monkeypatch, "probe@3", "probe@1", "dying", "probe")) == 1
    facts = speed_codecs.facts(tmp_path / "facts")
    processes = list(dict.fromkeys((fact["pid"], fact["quality"]) for fact in facts))
    assert [quality for _, quality in processes] == [3, 1, 2] * 2
    assert len({pid for pid, _ in processes} | {os.getpid()}) == 7
    assert all(fact["omp"] == "1" for fact in facts)
    if sys.platform == "linux":
        assert all(fact["cores"] == 1 for fact in facts)
    assert "dying ended its process (exit status 7)" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    assert list(summary["codecs"]) == ["probe@3", "probe@1", "probe"]
    assert summary["data"] == "grace_hopper.jpg fitted to 768 x 512"
    assert summary["speed"]["amount"] == pytest.approx(0.393216)


def test_without_the_reference_ratios_are_relative_to_another(tmp_path, monkeypatch, capsys):
    options = probing(tmp_path, monkeypatch, "dying", "probe", reference="dying", rounds=1)
    assert runner.run(options) == 1
    summary = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    assert summary["speed"]["reference"] == "probe"
    assert summary["notices"] == ["dying failed: ratios are relative to probe instead"]
    assert "exit status 7" in capsys.readouterr().err


def test_nothing_is_written_where_nothing_could_be_timed(tmp_path, monkeypatch, capsys):
    assert runner.run(probing(tmp_path, monkeypatch, "dying", rounds=1)) == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.png").write_bytes(b"broken")
    assert runner.run(probing(tmp_path, monkeypatch, "probe", data=tmp_path / "data")) == 1
    assert not (tmp_path / "out").exists()
    assert "broken.png" in capsys.readouterr().err


def test_without_compressai_there_is_a_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert runner.run(probing(tmp_path, monkeypatch, "probe", peers=None, rounds=1)) == 0
    summary = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    assert summary["notices"] == [peers.NOT_INSTALLED]
    assert capsys.readouterr().err.count("compressai is not installed") == 1


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"codecs": ["jpeg", "jpeg"]}, "named twice"),
        ({"codecs": ["jpeg"], "reference": "webp"}, "webp does not take part"),
        ({"codecs": ["opus"], "peers": ["mbt2018-mean"]}, "code images"),
        ({"codecs": [], "peers": []}, "nothing to time"),
        ({"threads": 100_000}, "100000 threads do not fit"),
        ({"medium": "smell"}, "medium smell"),
        ({"data": Path("nowhere")}, "does not exist"),
        ({"plugins": ["no.such.module"]}, "no.such.module"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(change, fact, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_report", lambda *arguments: pytest.fail("a process was started"))
    options = {"codecs": ["jpeg"], "peers": []} | change
    with pytest.raises(UsageError, match=fact):
        runner.run(Options(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_run_leaves_nothing(tmp_path):
    place = tmp_path / "facts"
    arguments = ["eval", "speed", "-o", str(tmp_path / "out"), "-c", "endless", "--peers", "none"]
    process = subprocess.Popen(
        [sys.executable, "-m", "compand.cli", *arguments, "--plugin", "speed_codecs"],
        env=os.environ
        | {speed_codecs.PLACE: str(place), "PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (place.exists() and place.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert told == "compand: interrupted; the results of an unfinished run are not kept\n"
    assert [path.name for path in tmp_path.iterdir()] == ["facts"]
    with pytest.raises(ProcessLookupError):
        os.kill(speed_codecs.facts(place)[0]["pid"], 0)


def test_the_command_line_passes_its_options_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "run", lambda options: seen.append(options) or 1)
    with pytest.raises(SystemExit) as end:
        cli.main(["speed", "-o", str(tmp_path), "-c", "jpeg@75,hyperprior:float32", "--peers", "none",
                  "--data", "photos", "--reference", "jpeg", "--threads", "1", "--rounds", "5", "--warm-up", "0",
                  "--repetitions", "7", "--plugin", "a", "--plugin", "b", "--device", "cpu", "-f"])  # fmt: skip
    assert end.value.code == 1
    assert seen == [
        Options(
            tmp_path, Path("photos"), None, ["jpeg@75", "hyperprior:float32"], [], "jpeg", "cpu", 1, 5, 0, 7,
            ("a", "b"), True, False,
        )
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- what is coded


def test_the_default_picture_and_sound(tmp_path):
    path, words = material.write_picture(tmp_path)
    assert load(Item("", path, "image")).pixels.shape == (512, 768, 3)
    assert "grace_hopper.jpg" in words
    path, words = material.write_sound(tmp_path)
    sound = load(Item("", path, "audio"))
    assert (sound.rate, sound.samples.shape) == (48_000, (2, 480_000))
    assert "synthetic" in words
    assert np.abs(sound.samples - material.mixture()).max() < 2**-15
    assert np.array_equal(material.mixture(), material.mixture())
    spectrum = np.abs(np.fft.rfft(sound.samples[0]))
    assert spectrum[100:100_000].max() > 30 * np.median(spectrum[100:100_000])  # tones
    assert np.median(spectrum[200_000:]) > 1  # over noise
    assert np.abs(sound.samples[0] - sound.samples[1]).max() > 0.1  # in stereo


def test_the_medium_is_that_of_the_codecs():
    assert runner._medium_of(["identity", "opus"]) == "audio"
    assert runner._medium_of(["identity", "hyperprior"]) == "image"
    assert runner._medium_of(["identity"]) == "image"
    assert checkpoint.find("hyperprior").medium == "image"
