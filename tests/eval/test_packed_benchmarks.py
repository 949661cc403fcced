"""The benchmarks of packed sets, on next to nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from compand.data import PackedSampler
from compand.errors import UsageError
from compand.eval.benchmarks import loader_speed, packed_cost, packed_scale
from compand.eval.benchmarks.loader_speed import Subject


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, china, flower, hopper):
    folder = tmp_path_factory.mktemp("photographs")
    for path in (china, flower, hopper):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# ------------------------------------------------------------------------------------------------ speed


def test_loaders_are_timed_and_held_against_each_other(photographs, tmp_path, capsys):
    output = tmp_path / "loader_speed.json"
    options = ["--data", str(photographs), "--folder", str(tmp_path / "data"), "-o", str(output)]
    options += [
        "--profiles",
        "train, zstd",
        "archive",
        "--rounds",
        "1",
        "--repetitions",
        "1",
        "--workers",
        "0",
    ]
    loader_speed.main(options)
    results = json.loads(output.read_text())["results"]
    names = {"JPEG 500x375", "JPEG 224", "JPEG 112", "JPEG 224, as they are"} | {
        f"{title}, {size}{remark}"
        for size in ("224", "500x375")
        for title, remark in (("train, zstd", ""), ("archive", ""), ("train, zstd", ", resized"))
    }
    assert set(results["times"]["0"]) == set(results["bytes"]) == set(results["stages"]) == names
    sizes = results["bytes"]
    assert sizes["archive, 224"] < sizes["train, zstd, 224"] < sizes["JPEG 224"]
    jpeg, packed = results["stages"]["JPEG 224"], results["stages"]["train, zstd, 224"]
    assert all(value > 0 for value in (*jpeg.values(), *packed.values()))
    printed = capsys.readouterr().out
    assert "archive, 500x375 against JPEG 500x375 | 6 x" in printed
    assert "one process" in printed


def test_batches_of_all_loaders_are_what_a_network_gets(photographs, tmp_path):
    loader_speed.make_pictures(sorted(photographs.iterdir()), tmp_path)
    for size, edge in (("500x375", 224), ("224", 224), ("112", 112)):
        pixels, labels = next(iter(loader_speed.loader(loader_speed.jpeg_subject(tmp_path, size), 0)))
        assert pixels.shape == (3, 3, edge, edge) and pixels.dtype == torch.float32
        assert sorted(labels.tolist()) == [0, 1, 2]
        assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    with Image.open(next((tmp_path / "500x375" / "0").iterdir())) as image:
        assert image.size == (500, 375)


def test_a_pass_has_whole_epochs_in_different_orders():
    passes = loader_speed.Passes(PackedSampler(10, batch_size=4, seed=0), 2)
    batches = list(passes)
    assert len(batches) == len(passes) == 6
    first, second = ([row for batch in part for row in batch] for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_requirements_are_the_lowest_over_cores():
    speeds = {
        "0": {"JPEG 224": {"speed": 100.0}, "archive, 224": {"speed": 200.0}},
        "2": {"JPEG 224": {"speed": 200.0}, "archive, 224": {"speed": 280.0}},
    }
    (row,) = loader_speed._requirement_rows(speeds)
    assert row == ["archive, 224 against JPEG 224", "1.5 x", "2.00 x", "1.40 x", "no", "3,675", "200", "no"]


def test_stages_add_up_to_the_pass(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(loader_speed.Stopwatch, "_switch", _counting(clock))

    class Slow:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index):
            return torch.zeros(1, 1, 1), self.read(index)

        def read(self, index):
            return index

    slow = Slow()
    subject = Subject("slow", slow, 1.0, 1, [loader_speed.Hook("read", slow, ("read",))])
    stages = loader_speed.staged(subject, 1)
    # One second between any two switches: each of 2 reads is one, and the rest lies before, between and behind them.
    assert stages == {"read": 1e6, "decode": 0.0, "augment": 0.0, "rest": 1.5e6}


def _counting(clock):
    def switch(self):
        now = next(clock)
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    return switch


# ------------------------------------------------------------------------------------------------ scale


def test_a_set_of_many_rows(tmp_path, capsys):
    output = tmp_path / "packed_scale.json"
    packed_scale.main(["--rows", "9000", "--accesses", "50", "--folder", str(tmp_path), "-o", str(output)])
    results = json.loads(output.read_text())["results"]
    assert results["set"]["shards"] == 3
    assert 2000 < results["set"]["payload_bytes"] < 4000
    access = results["access"]
    assert 0 < access["open_s"] < 60 and 0 < access["first"]["median_ms"] <= access["first"]["p99_ms"]
    assert access["memory"]["again"]["peak"] >= access["memory"]["opened"]["resident"] > 0
    epoch = results["epoch"]
    assert (epoch["rows"], epoch["missing"], epoch["repeated"]) == (9000, 0, 0)
    assert all(min(batches) > 0 for batches in epoch["batches"])
    assert sum(map(sum, epoch["batches"])) == 8 * -(-9000 // 8 // 64)
    assert "random access" in capsys.readouterr().out


def test_a_row_that_an_epoch_misses_is_seen(monkeypatch):
    import compand.data

    class Forgetful(PackedSampler):
        def batch(self, index):
            rows = super().batch(index)
            rows[0] = rows[-1]
            return rows

    monkeypatch.setattr(compand.data, "PackedSampler", Forgetful)
    epoch = packed_scale.measure_epoch(1000, ranks=2, workers=0)
    assert epoch["missing"] == epoch["repeated"] == 2 * 8


# ------------------------------------------------------------------------------------------------ cost


class Greenish(nn.Module):
    """Tells pictures by their mean green: answers class 0 for dark ones."""

    name = "greenish"

    def __call__(self, pixels):
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        return np.array([100.0 - pixels[..., 1].mean(), 0.0])


def test_cost_in_bytes_and_accuracy(tmp_path, scenery):
    import compand

    rng = np.random.default_rng(0)
    for part, count in (("val", 3), ("train", 2)):
        for name, factor in (("tench", 0.3), ("english_springer", 1.0)):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                top, left = rng.integers(0, 100, 2)
                pixels = (scenery[top : top + 96, left : left + 96] * factor).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    codec = compand.load("wavelet-rgb-16x", device="cpu")
    data, work = tmp_path / "data", tmp_path / "work"
    work.mkdir()
    results = packed_cost.measure(data, work, codec, [3.0, 6.0], Greenish(), "cpu")
    low, high = results["points"]
    assert results["pictures"] == 6 and results["original"]["accuracy"] == low["accuracy"] == 1
    assert [low["kept"], low["p"]] == [1, 1]
    # Of so few pictures, archive is little but its tables.
    assert all(low["bytes"][title] < high["bytes"][title] for title in ("train, zstd", "train, lz4"))
    chosen = results["chosen"]
    assert chosen["quality"] == 3
    assert chosen["jpeg_bytes"] == sum(path.stat().st_size for path in data.rglob("*.jpg"))
    assert chosen["bytes"]["train, zstd"] > low["bytes"]["train, zstd"]
    report = packed_cost.render(results, "six pictures.")
    assert "quality 3. Of the JPEG bytes of all pictures" in report
    hopeless = {**results, "chosen": None}
    assert "No quality keeps 97%" in packed_cost.render(hopeless, "")


def test_a_set_with_failures_is_not_measured(tmp_path, scenery):
    folder = tmp_path / "source" / "tench"
    folder.mkdir(parents=True)
    Image.fromarray(scenery[:64, :64]).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"failures\.csv"):
        packed_cost.pack_folder(
            tmp_path / "source", tmp_path / "set", "wavelet-rgb-16x", 3.0, ("train", "zstd"), "cpu"
        )
