"""The benchmark that leaves out contexts one by one, on next to nothing."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from compand import checkpoint
from compand.errors import UsageError
from compand.eval.benchmarks import context_ablation as ablation


def test_entropy_models_are_trained_without_each_context(
    checkpoint_of, scenery, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(ablation, "PASSES", 1)
    monkeypatch.setattr(ablation, "CHUNK", 2)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        Image.fromarray(scenery[100 * i : 100 * i + 80, :96]).save(data / f"{i}.png")
    output = tmp_path / "ablation.json"
    ablation.main(
        ["--data", str(data), "--train", str(data), "-c", str(checkpoint_of("hyperprior")), "-o", str(output),
         "--variants", "without local", "slices in one piece", "no contexts", "--steps", "3", "--batch", "2",
         "--crop", "64", "--threads", "1", "--devices", "cpu"]
    )  # fmt: skip
    results = json.loads(output.read_text())["results"]
    rows = results["rows"]
    assert list(rows) == ["all", "without local", "slices in one piece", "no contexts"]
    assert [row["sequential"] for row in rows.values()] == [10, 10, 5, 5]
    numbers = [row["parameters"] for row in rows.values()]
    assert numbers[0] > numbers[1] > numbers[2] > numbers[3]
    assert rows["all"]["bits"] == [0] and rows["all"]["bd_rate"] == [0]
    assert all(len(run["first_slice_bits"]) == 8 == len(run["bpp"]) for run in results["runs"])
    # Slices that are not coded first have no part in these bits.
    for run in results["runs"]:
        whole = [bpp * 80 * 96 for bpp in run["bpp"]]
        assert all(0 < first < total for first, total in zip(run["first_slice_bits"], whole, strict=True))
    assert all(set(row["milliseconds"]["cpu"]) == {"compress", "decompress"} for row in rows.values())
    assert "saved" in output.with_suffix(".md").read_text() and "without local" in capsys.readouterr().out


def test_runs_differ_in_their_contexts_alone(checkpoint_of, scenery):
    info = checkpoint.read_info(checkpoint_of("hyperprior"))
    settings = ablation.Settings(steps=4, batch=2, crop=64, lr=1e-3, threads=1)
    base = ablation.base_of(info, torch.device("cpu"))
    runs = [ablation.Run(name, 0, base, info, settings) for name in ("all", "no contexts")]
    states = [run.codec.state_dict() for run in runs]
    before = {name: value.clone() for name, value in states[0].items()}
    shared = [name for name in states[0] if ".networks." not in name]
    assert all(torch.equal(states[0][name], states[1][name]) for name in shared)
    batches = ablation.Batches(base, [scenery], settings, 0)
    while not all(run.done for run in runs):
        ablation.advance(runs, batches)
    changed = {
        name for name, value in runs[0].codec.state_dict().items() if not torch.equal(value, before[name])
    }
    kept = {name for name in before if name.startswith(("transform.", "bottleneck.y_gain."))}
    assert kept and not kept & changed
    assert any(name.startswith("bottleneck.hyper_analysis") for name in changed)
    assert any(".global_inter." in name for name in changed)


def test_other_codecs_have_no_contexts(checkpoint_of):
    with pytest.raises(UsageError, match="give a checkpoint of context or hyperprior"):
        ablation.codec_of(checkpoint.read_info(checkpoint_of("factorized")))


def test_what_is_added_is_relative_to_the_same_seed():
    def run(variant: str, seed: int, factor: float) -> dict:
        return {
            "variant": variant, "seed": seed, "sequential": 10, "parameters": 5, "psnr": [30.0, 33.0, 36.0],
            "bpp": [factor * bpp for bpp in (0.2, 0.5, 1.0)], "first_slice_bits": [factor**2, factor**2],
            "milliseconds": {"cpu": {"compress": 5 * factor, "decompress": 7 * factor}},
        }  # fmt: skip

    runs = [run("all", 0, 1), run("all", 1, 2), run("without local", 0, 1.1), run("without local", 1, 2.4)]
    rows = ablation.summary(runs)
    assert rows["without local"]["bits"] == pytest.approx([10, 20])
    assert rows["without local"]["bd_rate"] == pytest.approx([10, 20])
    assert rows["without local"]["first_slice"] == pytest.approx([21, 44])
    table = ablation.render(rows)
    assert "+15.00 % (+10.00 to +20.00)" in table and "7.7 (-0.7 saved)" in table
