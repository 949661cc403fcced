"""Packing on a Ray cluster of several processes on this machine."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from compand.data import local_engine, pack
from compand.errors import MediaError, UsageError

ray = pytest.importorskip("ray", reason="needs the extra ray")
ray_engine = pytest.importorskip("compand.data.ray_engine")

PICTURES, ROWS, CHUNKS = 35, 6, 6  # with the one that is no picture


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """Names of the moments at which a worker is still to die, as files."""
    return tmp_path_factory.mktemp("deaths")


@pytest.fixture(scope="module")
def cluster(deaths):
    """Two workers at a time, each of which dies by SIGKILL at every moment that `deaths` names, then never again."""

    def die_when_asked():
        import os
        import signal

        from compand.data import encoder, storage

        def die_before(moment, function):
            def wrapped(*arguments, **named):
                try:
                    os.unlink(os.path.join(folder, moment))
                except FileNotFoundError:
                    return function(*arguments, **named)
                return os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        storage.write = die_before("report", storage.write)  # all shards of a chunk are written by then
        encoder._code = die_before("coding", encoder._code)

    folder = str(deaths)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": die_when_asked},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, scenery):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(PICTURES):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(scenery[5 * i : 5 * i + 64, 7 * i : 7 * i + 80]).save(path)
    (folder / "class0" / "bad.png").write_bytes(b"no picture")
    return folder


def begin(source: Path, target: str | Path, **settings) -> pack.Packing:
    choices = {"codec": "wavelet-rgb-16x", "quality": 3, "rows_per_shard": ROWS, "device": "cpu"} | settings
    return pack.start(str(source), str(target), **choices)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def packed_here(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("here") / "set"
    packing = begin(pictures, folder)
    local_engine.run_local(packing)
    packing.finish()
    return folder


def test_workers_that_are_killed_lose_and_double_nothing(cluster, deaths, pictures, packed_here, tmp_path):
    moments = [deaths / "coding", deaths / "report"]
    for moment in moments:
        moment.touch()
    reports = []
    summary = ray_engine.pack(begin(pictures, tmp_path / "set"), workers=2, progress=reports.append)
    assert not any(moment.exists() for moment in moments)  # both have died
    assert summary.rows == sum(report.rows for report in reports) == PICTURES
    assert summary.failures == 1 and "bad" in (tmp_path / "set" / "failures.csv").read_text()
    assert sorted(report.index for report in reports) == list(range(CHUNKS))
    keys = [
        key for path in (tmp_path / "set").glob("*.parquet") for key in pq.read_table(path)["key"].to_pylist()
    ]
    assert len(keys) == len(set(keys)) == PICTURES
    assert contents(tmp_path / "set") == contents(packed_here)
    assert not list((tmp_path / "set").glob(".packing*"))


def test_through_fsspec_and_after_an_interruption(cluster, pictures, packed_here, tmp_path):
    pytest.importorskip("fsspec")
    target = f"local://{tmp_path}/set"  # of fsspec, though on this disk
    packing = begin(pictures, target)
    index, records = packing.todo()[2]
    pack.pack_chunk(packing.spec, index, records)
    reports = []
    ray_engine.pack(begin(pictures, target), workers=1, progress=reports.append)
    assert sorted(report.index for report in reports) == [0, 1, 3, 4, 5]
    assert contents(tmp_path / "set") == contents(packed_here)
    assert ray_engine.pack(begin(pictures, target)).rows == PICTURES  # complete: nothing to do


def test_what_ends_it_is_told(cluster, pictures, tmp_path):
    with pytest.raises(MediaError, match="bad"):
        ray_engine.pack(begin(pictures / "class0", tmp_path / "strict", fail_fast=True), workers=1)
    with pytest.raises(UsageError, match="at least 1"):
        ray_engine.pack(begin(pictures, tmp_path / "none"), workers=0)
