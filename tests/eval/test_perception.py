"""`compand eval perception` from end to end, on a task of another package."""

from __future__ import annotations

import csv
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import texture_plugin  # noqa: F401 (registers the task)
import texture_task
import torch
from PIL import Image
from typer.testing import CliRunner

from compand.errors import CheckpointError, MediaError, UsageError
from compand.eval import cli, subjects
from compand.eval.items import load
from compand.eval.perception import adapters, models, runner, task
from compand.eval.perception.runner import JudgeFactory, Options, TaskJudge, TaskSource, run
from compand.pictures import Picture
from compand.train.images import read_rgb

BROKEN = "smooth_99.png"
QUALITIES = {"jpeg": (5.0, 30.0, 95.0), "identity": (1.0,)}


@pytest.fixture(scope="module")
def place(tmp_path_factory, china, flower) -> Path:
    """Crops and one file that is none, the task's model, and one that calls less of a picture textured."""
    folder = tmp_path_factory.mktemp("texture")
    texture_task.make_crops([read_rgb(china), read_rgb(flower)], folder / "data", count=24)
    (folder / "data" / BROKEN).write_bytes(b"no picture")
    network, other = texture_task.TextureNetwork(8.0), texture_task.TextureNetwork(4.0)
    models.save_model(network, folder / "texture-v1", task="texture", labels=texture_task.LABELS)
    trained_on = {"codec": "jpeg", "quality": 5}
    models.save_model(
        other, folder / "robust-v1", task="texture", labels=texture_task.LABELS, trained_on=trained_on
    )
    return folder


@pytest.fixture(scope="module")
def options(place) -> Options:
    return Options(
        task="texture",
        data=place / "data",
        output=place / "out",
        codecs=list(QUALITIES),
        qualities="jpeg=5,30,95",
        metrics=["psnr"],
        model=str(place / "texture-v1"),
        lossy_models=(str(place / "robust-v1"),),
        examples=1,
        plugins=("texture_plugin",),
        jobs=1,
        quiet=True,
    )


@pytest.fixture(scope="module")
def results(options) -> dict:
    assert run(options) == 1  # for the file that is no picture
    return json.loads((options.output / "results.json").read_text())


@pytest.fixture(scope="module")
def crops(place) -> dict[str, np.ndarray]:
    paths = sorted((place / "data").glob("*.png"))
    return {path.name: np.array(Image.open(path)) for path in paths if path.name != BROKEN}


def judged(place: Path, name: str, pixels: np.ndarray, model: str = "texture-v1") -> list[float]:
    answer = models.load_model(place / model)(pixels)
    return [float(texture_task.LABELS[int(answer.argmax())] == name.partition("_")[0]), 1.0]


def test_every_item_is_measured_with_every_codec(results, crops):
    keys = [(row["item"], row["codec"], row["quality"]) for row in results["rows"]]
    expected = {(name, codec, q) for name in crops for codec, values in QUALITIES.items() for q in values}
    assert len(keys) == len(set(keys)) and set(keys) == expected


def test_the_identity_codec_scores_exactly_the_baseline(results):
    perception = results["summary"]["perception"]
    (point,) = results["summary"]["codecs"]["identity"]["points"]
    assert point["score"] == perception["baseline"]
    assert (point["score_low"], point["score_high"]) == (
        perception["baseline_low"],
        perception["baseline_high"],
    )
    assert (point["score_drop"], point["score_drop_low"], point["score_drop_high"]) == (0, 0, 0)
    for row in results["rows"]:
        if row["codec"] == "identity":
            assert row["outcome"] == row["outcome_undamaged"]
            assert row["outcome_robust-v1"] == row["outcome_undamaged_robust-v1"]


def test_the_baseline_is_of_items_that_no_codec_touched(results, crops, place):
    for row in results["rows"]:
        assert row["outcome_undamaged"] == judged(place, row["item"], crops[row["item"]])
    right = [judged(place, name, pixels)[0] for name, pixels in crops.items()]
    assert results["summary"]["perception"]["baseline"] == pytest.approx(np.mean(right))
    assert 0.8 < np.mean(right) < 1


def test_outcomes_and_rates_are_those_of_the_files(results, crops, place, tmp_path):
    """Coded, written and decoded here once more; 8 bits a byte, as the file system counts bytes."""
    subject = subjects.find("jpeg", "image")
    scores = {}
    for row in results["rows"]:
        if row["codec"] != "jpeg":
            continue
        file = tmp_path / "file.jpg"
        file.write_bytes(subject.encode(Picture(crops[row["item"]], None, None), row["quality"]))
        assert row["bytes"] == os.path.getsize(file)
        assert row["bpp"] == pytest.approx(8 * os.path.getsize(file) / 64**2)
        decoded = np.array(Image.open(file))
        assert row["outcome"] == judged(place, row["item"], decoded)
        assert row["outcome_robust-v1"] == judged(place, row["item"], decoded, "robust-v1")
        scores.setdefault(row["quality"], []).append(row["outcome"][0])
    points = results["summary"]["codecs"]["jpeg"]["points"]
    assert [point["score"] for point in points] == pytest.approx(
        [np.mean(scores[q]) for q in QUALITIES["jpeg"]]
    )
    assert points[0]["score"] < points[2]["score"]


def test_what_failed_is_listed_and_left_out(results, crops):
    (problem,) = [problem for problem in results["summary"]["problems"] if not problem["codec"]]
    assert problem["item"] == BROKEN and "\n" not in problem["message"]
    assert any(
        f"{len(crops)} of {len(crops) + 1} items" in notice for notice in results["summary"]["notices"]
    )


def test_the_second_model_is_compared_on_its_codec_and_on_undamaged_items(results):
    perception = results["summary"]["perception"]
    keys = [(row["codec"], row["quality"]) for row in perception["lossy_training"]]
    assert keys == [("undamaged", None), ("jpeg", 5), ("jpeg", 30), ("jpeg", 95)]
    assert "robust-v1, trained on jpeg q5" in perception["findings"][2]
    assert len(perception["findings"]) == 3


def test_the_table_has_the_outcomes(results, options):
    with open(options.output / "results.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == len(results["rows"])
    assert [float(number) for number in table[0]["outcome"].split()] == results["rows"][0]["outcome"]


def test_examples_are_kept(results, options):
    (example,) = results["summary"]["examples"]
    folder = options.output / example["folder"]
    assert {path.name for path in folder.iterdir()} >= {"original.png", "jpeg-5.png", "identity-1.png"}


def test_a_finished_run_is_not_measured_again(results, options, monkeypatch):
    monkeypatch.setattr(runner, "write_page", lambda out: [])
    before = (options.output / "measurements.jsonl").read_bytes()
    assert run(replace(options, codecs=["jpeg"], qualities="jpeg=5")) == 1
    assert (options.output / "measurements.jsonl").read_bytes() == before
    again = json.loads((options.output / "results.json").read_text())
    assert again["summary"]["perception"] == results["summary"]["perception"]


@pytest.mark.parametrize("change", ["model", "second model", "items"])
def test_results_of_another_run_are_not_mixed_in(results, options, place, tmp_path, change):
    if change == "items":
        (tmp_path / "data").mkdir()
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "data" / "smooth_00.png")
        other = replace(options, data=tmp_path / "data")
    else:
        name = str(place / "robust-v1")
        other = replace(options, model=name if change == "model" else options.model, lossy_models=())
    with pytest.raises(UsageError, match="holds another run"):
        run(other)


# ---------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "nonsense"}, UsageError, "imagenette"),
        ({"plugins": ("no_such_module",)}, UsageError, "no_such_module"),
        ({"data": Path("/no/such/folder")}, MediaError, "no crops"),
        ({"codecs": ["opus"]}, UsageError, "opus"),
        ({"metrics": ["visqol"]}, UsageError, "visqol"),
        ({"model": None}, CheckpointError, "texture-v1 not found"),
        ({"lossy_models": ("texture-v1",)}, CheckpointError, "not found"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(options, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        run(replace(options, output=tmp_path / "out", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_where_nearly_everything_failed_the_problems_are_listed(
    options, place, tmp_path, capsys, monkeypatch
):
    def failing(self, signal, quality):
        raise UsageError("the library has no memory left")

    monkeypatch.setattr(type(subjects.find("jpeg", "image")), "encode", failing)
    (tmp_path / "data").mkdir()
    names = ("smooth_02.png", "textured_00.png")
    for name in names:
        (tmp_path / "data" / name).write_bytes(b"no picture")
    good = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    good.save(tmp_path / "data" / "smooth_00.png")
    other = replace(
        options, data=tmp_path / "data", output=tmp_path / "out", lossy_models=(), codecs=["jpeg"]
    )
    assert run(other) == 1
    errors = capsys.readouterr().err
    assert "no codec point has nine tenths of the items" in errors and "problem" in errors
    assert all(name in errors for name in names)


def test_what_a_run_is_includes_device_version_and_model(options, results, tmp_path, monkeypatch):
    described = json.loads((options.output / "run.json").read_text())
    # As runs were described before, which have to go on.
    assert "device" not in described and "task_version" not in described
    identity = results["summary"]["perception"]["model_identity"]
    assert identity == described["models"][0]["identity"]
    monkeypatch.setattr(texture_task.Texture, "version", 1)
    with pytest.raises(UsageError, match=r"holds another run \(task_version None there, 1 here"):
        run(options)
    monkeypatch.undo()
    real = JudgeFactory.models
    monkeypatch.setattr(JudgeFactory, "models", lambda self: real(replace(self, device="cpu")))
    with pytest.raises(UsageError, match=r"holds another run \(device None there, cuda here"):
        run(replace(options, device="cuda"))


def test_caveats_and_training_items_are_among_the_notices(options, results, tmp_path, monkeypatch):
    monkeypatch.setattr(texture_task.Texture, "caveats", ("crops overlap",))
    (tmp_path / "train").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "train" / "smooth_00.png")
    arguments = {"data": tmp_path / "train", "output": tmp_path / "out", "codecs": ["identity"]}
    assert run(replace(options, lossy_models=(), qualities=None, **arguments)) == 0
    notices = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]["notices"]
    assert "crops overlap" in notices and any("scores on training items" in notice for notice in notices)
    others = results["summary"]["notices"]
    assert "crops overlap" not in others and not any("training items" in notice for notice in others)


def test_two_models_of_one_name(options, tmp_path):
    with pytest.raises(UsageError, match="two task models are named texture-v1"):
        run(replace(options, output=tmp_path / "out", lossy_models=(options.model,)))


def test_options_reach_the_run(monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "run", lambda options: seen.append(options) or 0)
    arguments = (
        "perception digits --data folder -o out -c opus,mp3 -q opus=6,12 --metrics stoi --model a --lossy-model b "
        "--lossy-model c --plugin one --plugin two -j 3 --examples 0 --device cuda -f --quiet"
    )
    assert CliRunner().invoke(cli.app, arguments.split()).exit_code == 0
    assert seen == [
        Options(
            "digits", Path("folder"), Path("out"), ["opus", "mp3"], "opus=6,12", ["stoi"], "a", ("b", "c"), "cuda",
            0, ("one", "two"), 3, True, True,
        )
    ]  # fmt: skip
    assert CliRunner().invoke(cli.app, ["perception", "digits", "-o", "out"]).exit_code == 2


# ---------------------------------------------------------------------------------------------------- judges


@pytest.fixture
def factory(options, place) -> JudgeFactory:
    return JudgeFactory(
        TaskSource("texture", options.data, options.plugins), (str(place / "texture-v1"),), "cpu"
    )


def test_what_workers_get_can_be_sent_to_them(factory, options):
    other = pickle.loads(pickle.dumps(factory))
    assert other == factory
    item = factory.source.items()["smooth_02.png"]
    assert pickle.loads(pickle.dumps(factory.source.load))(item.item).pixels.shape == (64, 64, 3)


def test_task_models_run_in_one_thread_whatever_the_codec_does(factory, monkeypatch):
    """The last digits of a convolution depend on the number of threads, and so would outcomes on -j."""
    seen = []
    original = texture_task.TextureNetwork.predict

    def spy(self, signal):
        seen.append(torch.get_num_threads())
        return original(self, signal)

    monkeypatch.setattr(texture_task.TextureNetwork, "predict", spy)
    item = factory.source.items()["smooth_02.png"]
    judge = factory()
    torch.set_num_threads(2)
    try:
        columns = judge(item.name, load(item.item))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 1]
    assert list(columns) == ["outcome", "outcome_undamaged"]
    judge(item.name, load(item.item))
    assert len(seen) == 3  # the undamaged item is not judged twice


@pytest.mark.parametrize("outcome", [[1.0], [1.0, float("nan")], [1.0, 1.0, 1.0]])
def test_outcomes_that_do_not_keep_to_the_contract(factory, monkeypatch, outcome):
    monkeypatch.setattr(texture_task.Texture, "outcome", lambda *arguments: outcome)
    item = factory.source.items()["smooth_02.png"]
    with pytest.raises(UsageError, match="2 finite numbers"):
        factory()(item.name, load(item.item))


def test_answers_of_recognisers_and_of_classifiers_are_judged_alike(factory):
    class Speaker:
        name = identity = "speaker"
        kind = "recogniser"
        trained_on = None

        def __call__(self, signal):
            assert signal.shape == (64, 64, 3)
            return "Textured, I think."

    judge = TaskJudge(factory.source, [Speaker()])
    items = factory.source.items()
    for name in ("smooth_02.png", "textured_00.png"):
        gray = Picture(np.zeros((64, 64, 1), np.uint8), None, None)
        assert judge(name, gray)["outcome"] == [float(name.startswith("textured")), 1.0]
        assert items[name].target == int(name.startswith("textured"))


def test_tasks_are_registered_once():
    task.register("texture", "texture_task:Texture")
    assert task.find("texture") is texture_task.Texture and "texture" in task.names()
    with pytest.raises(UsageError, match="exists already"):
        task.register("imagenette", "elsewhere:Task")


def test_the_models_of_a_run_are_the_adapters(factory, place):
    (model,) = factory.models()
    assert model.identity == adapters.load(str(place / "texture-v1"), texture_task.Texture).identity
