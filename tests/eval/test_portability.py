"""The portability benchmark in small, and that it notices differences."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from compand import checkpoint
from compand.eval.benchmarks import portability
from compand.eval.benchmarks.portability import Setting
from compand.sounds import Sound


@pytest.fixture(scope="module", params=["hyperprior", "factorized", "context"])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, scenery):
    folder = tmp_path_factory.mktemp("pictures")
    for i, (top, left) in enumerate([(0, 0), (100, 300), (200, 50)]):
        Image.fromarray(scenery[top : top + 96, left : left + 128]).save(folder / f"{i}.png")
    Image.fromarray(scenery[:50, :33]).save(folder / "odd.png")
    return sorted(folder.iterdir())


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr("compand.image_codec.TILE", 64)


def test_same_symbols_under_all_settings(checkpoint_of, name, pictures, tmp_path, small_tiles):
    info = checkpoint.read_info(checkpoint_of(name))
    ways = portability.settings(info)
    portability.write(ways[0].codec, pictures, (1, 4.5, 8), tmp_path)
    outcomes = portability.compare(tmp_path, ways)
    assert len(outcomes) == len(ways) >= 9
    for outcome in outcomes:
        assert len(outcome.files) == 12
        assert outcome.symbols == outcomes[0].symbols > 3 * 3 * 48 * 6 * 8
        assert (outcome.differing_symbols, outcome.differing_indexes) == (0, 0)
        assert not outcome.wrong_files
        assert outcome.latent_difference < 1e-5


def test_differences_are_noticed(exact, pictures, tmp_path):
    codec = exact("hyperprior")
    portability.write(codec, pictures[:2], (4,), tmp_path)
    digests = json.loads((tmp_path / portability.DIGESTS).read_text())
    digests["files"]["0-4.cpd"] = [64 * "0"]
    (tmp_path / portability.DIGESTS).write_text(json.dumps(digests))
    other = exact("hyperprior")
    # Other scales: other tables for the same symbols, which the stream then does not fit.
    other.bottleneck._shift = other.bottleneck._shift + 40
    outcomes = portability.compare(tmp_path, [Setting("as written", codec), Setting("other prior", other)])
    assert outcomes[0].wrong_files == {"0-4.cpd"}
    assert outcomes[1].wrong_files == {"0-4.cpd", "1-4.cpd"}


def test_counts_symbols_and_indexes_that_differ():
    def decoded(indexes, symbols, latent):
        exchange = portability.Exchange(np.array(indexes, np.uint16), np.array(symbols, np.int32))
        return portability.Decoded([exchange], portability.torch.full((1, 1, 1), latent))

    first, second = decoded([1, 2, 3], [0, 5, 0], 1.0), decoded([1, 2, 4], [0, 4, 1], 1.5)
    outcome = portability.Outcome("here", "there")
    payload = portability.Payload("a.cpd", 0, b"", (1, 1), 32)
    outcome.add(payload, portability.digest(first.exchanges), first, first)
    assert not outcome.wrong_files
    outcome.add(payload, portability.digest(first.exchanges), first, second)
    assert (outcome.symbols, outcome.differing_symbols, outcome.differing_indexes) == (6, 2, 1)
    assert outcome.latent_difference == 0.5
    assert outcome.wrong_files == {"a.cpd"}


def test_threads_and_flags_are_restored(exact):
    torch = portability.torch
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.backends.cudnn.allow_tf32
    with portability.applied(
        Setting("", exact("hyperprior"), threads=before[0] + 1, onednn=False, tf32=True)
    ):
        assert torch.get_num_threads() == before[0] + 1
        assert not torch.backends.mkldnn.enabled
    assert (torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.backends.cudnn.allow_tf32) == before


def test_writes_and_compares_from_the_command_line(checkpoint_of, pictures, tmp_path, capsys):
    common = ["--codec", str(checkpoint_of("hyperprior"))]
    written, results = str(tmp_path / "files"), tmp_path / "portability.json"
    portability.main([*common, "--data", str(pictures[0].parent), "--levels", "2", "--write", written])
    portability.main([*common, "--compare", written, "-o", str(results)])
    rows = json.loads(results.read_text())["results"]
    assert {row["differing_symbols"] for row in rows} == {0}
    assert "differing symbols" in results.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        portability.main([*common, "--compare", written, "-o", str(results)])
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("medium", ["image", "audio"])
def test_codebook_indices_are_compared(token_checkpoints, medium, pictures, tmp_path):
    info = checkpoint.read_info(token_checkpoints[medium])
    if medium == "audio":
        samples = np.random.default_rng(0).normal(0, 0.1, (2, 9000)).astype(np.float32)
        Sound(samples, 16000).save(tmp_path / "noise.wav")
        sources = portability.files_of(tmp_path, "audio")
    else:
        sources = pictures[:2]
    codec = portability.built(info, "cpu")
    portability.write(codec, sources, (1, 3), tmp_path / "files")
    ways = [Setting("one", codec), Setting("several", codec, batch=2)]
    for outcome in portability.compare(tmp_path / "files", ways):
        assert len(outcome.files) == 2 * len(sources) and outcome.symbols > 100
        assert outcome.differing_symbols == 0 and not outcome.wrong_files
    digests = json.loads((tmp_path / "files" / portability.DIGESTS).read_text())
    assert all(digests["files"].values())
    first = sorted(digests["files"])[0]
    digests["files"][first][0] = 64 * "0"
    (tmp_path / "files" / portability.DIGESTS).write_text(json.dumps(digests))
    assert portability.compare(tmp_path / "files", ways[:1])[0].wrong_files == {first}
