"""The image tasks: their folders, how answers are judged, and the networks of their reference models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from compand.errors import MediaError, UsageError
from compand.eval.perception import models
from compand.eval.perception.models import TaskNetwork
from compand.eval.perception.networks.vision import (
    PlainClassifier,
    PyramidSegmenter,
    ResidualBlock,
    ResidualClassifier,
)
from compand.eval.perception.task import KINDS
from compand.eval.perception.tasks import camvid
from compand.eval.perception.tasks.camvid import CLASSES, CamVid, confusion, mean_iou
from compand.eval.perception.tasks.imagenette import SYNSETS, Imagenette
from compand.pictures import Picture
from compand.train.images import read_rgb

SMALL: dict[str, Any] = {"stem": 8, "widths": [8, 16, 16, 24], "blocks": [1, 1, 1, 1]}


class Answers:
    """A task model that gives the same answer to everything, and remembers what it was asked."""

    name, identity, trained_on = "answers", "00", None

    def __init__(self, answer: Any, kind: str) -> None:
        self.answer, self.kind, self.asked = answer, kind, []

    def __call__(self, signal: Any, /) -> Any:
        self.asked.append(signal)
        return self.answer


# ------------------------------------------------------------------------------------------------------ imagenette


@pytest.fixture
def imagenette(tmp_path, china, flower, hopper) -> Path:
    for folder, photograph in (("church", china), ("n01440764", flower), ("parachute", hopper)):
        (tmp_path / "val" / folder).mkdir(parents=True)
        shutil.copy(photograph, tmp_path / "val" / folder)
    (tmp_path / "val" / "church" / "notes.txt").write_text("no image")
    return tmp_path


def test_imagenette_items_have_the_labels_of_their_folders(imagenette):
    items = Imagenette(imagenette).items()
    assert [(item.name, item.target) for item in items] == [
        ("val/n01440764/flower.jpg", 0), ("val/church/china.jpg", 4), ("val/parachute/grace_hopper.jpg", 9),
    ]  # fmt: skip
    assert all(item.item.name == item.name and item.item.path.is_file() for item in items)
    bare = Imagenette(imagenette / "val").items()
    assert [item.target for item in bare] == [0, 4, 9] and bare[1].name == "church/china.jpg"


def test_a_folder_without_classes_is_refused(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(MediaError, match="no images in folders named tench, ") as error:
        Imagenette(tmp_path).items()
    assert "\n" not in str(error.value)


def test_accuracy(imagenette):
    task = Imagenette(imagenette)
    model = Answers(np.eye(10, dtype=np.float32)[4], "image-classifier")
    outcomes = np.array([task.outcome(model, task.load(item), item) for item in task.items()])
    assert outcomes.tolist() == [[0, 1], [1, 1], [0, 1]] and task.score(outcomes.sum(0)) == pytest.approx(
        1 / 3
    )
    assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in model.asked)
    gray = Picture(np.full((8, 9, 1), 7, np.uint8), None, None)
    task.outcome(model, gray, task.items()[0])
    assert model.asked[-1].shape == (8, 9, 3)


def test_classes_of_imagenet():
    from torchvision.models._meta import _IMAGENET_CATEGORIES as NAMES

    mapped = Imagenette.foreign_classes[1000]
    assert [mapped[index] for index in sorted(mapped)] == list(range(10))
    theirs = [NAMES[index].lower().replace(" ", "_") for index in sorted(mapped)]
    # They say "chainsaw", "gas pump" and so on: compare letters alone.
    assert [name.replace("_", "") for name in theirs] == [name.replace("_", "") for name in SYNSETS.values()]


# ---------------------------------------------------------------------------------------------------------- camvid


@pytest.fixture
def streets(tmp_path, china, flower) -> Path:
    generator = np.random.default_rng(0)
    for folder in ("image", "label"):
        (tmp_path / "val" / folder).mkdir(parents=True)
    for name, photograph in (("b", china), ("a", flower)):
        pixels = read_rgb(photograph)[:50, :70]
        Image.fromarray(pixels).save(tmp_path / "val" / "image" / f"{name}.png")
        labels = generator.integers(0, 12, (50, 70), dtype=np.uint8)
        Image.fromarray(labels).save(tmp_path / "val" / "label" / f"{name}.png")
    return tmp_path


def test_mean_iou_agrees_with_an_oracle(streets):
    task = CamVid(streets)
    items = task.items()
    assert [item.name for item in items] == ["val/image/a.png", "val/image/b.png"]
    generator = np.random.default_rng(1)
    answers = [generator.integers(0, 11, (50, 70)) for _ in items]
    outcomes = [
        task.outcome(Answers(answer, "segmenter"), task.load(item), item)
        for answer, item in zip(answers, items, strict=True)
    ]
    assert all(len(outcome) == len(task.outcome_names) for outcome in outcomes)
    truth = np.concatenate([camvid.read_labels(item.target).ravel() for item in items])
    counted = truth < 11
    expected = jaccard_score(truth[counted], np.concatenate(answers).ravel()[counted], average="macro")
    assert task.score(np.sum(outcomes, axis=0)) == pytest.approx(expected)
    stacked = task.score(np.stack([outcomes, outcomes]))
    assert stacked.shape == (2, 2) and stacked[0, 1] == task.score(np.array(outcomes[1]))


def test_perfect_and_foreign_answers():
    truth = np.array([[0, 1], [2, 11]], np.uint8)
    perfect = confusion(truth, truth.astype(int))
    assert perfect.sum() == 3 and mean_iou(perfect) == 1  # unlabelled pixels and absent classes do not count
    unknown = confusion(truth, np.array([[0, -1], [2, 0]]))
    assert unknown[1].tolist() == [0] * 11 + [1] and mean_iou(unknown) == pytest.approx(2 / 3)
    wrong = confusion(truth, np.array([[0, 5], [2, 0]]))
    # Class 5 is answered but nowhere true: it counts, with 0.
    assert mean_iou(wrong) == pytest.approx(2 / 4)


def test_camvid_folders_that_do_not_fit(streets, tmp_path_factory):
    with pytest.raises(MediaError, match="has no images"):
        CamVid(tmp_path_factory.mktemp("empty")).items()
    task = CamVid(streets)
    item = task.items()[0]
    with pytest.raises(UsageError, match=r"answer of answers is \[2, 2\], the label map \[50, 70\]"):
        task.outcome(Answers(np.zeros((2, 2), int), "segmenter"), task.load(item), item)
    Image.new("RGB", (70, 50)).save(streets / "val" / "label" / "a.png")
    with pytest.raises(MediaError, match=r"a\.png is no label map"):
        camvid.read_labels(item.target)
    item.target.write_bytes(b"no image")
    with pytest.raises(MediaError, match=r"a\.png cannot be read"):
        camvid.read_labels(item.target)
    item.target.unlink()
    with pytest.raises(MediaError, match=r"a\.png has no label map"):
        task.items()


def test_stored_results_are_bound_to_images_and_labels(streets):
    def hashes() -> list[str]:
        task = CamVid(streets)
        return [task.content_hash(item) for item in task.items()]

    first = hashes()
    assert len(set(first)) == 2 and hashes() == first and all(len(digest) == 16 for digest in first)
    Image.fromarray(np.full((50, 70), 3, np.uint8)).save(streets / "val" / "label" / "a.png")
    second = hashes()
    assert second[0] != first[0] and second[1] == first[1]
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(streets / "val" / "image" / "b.png")
    assert hashes()[0] == second[0] and hashes()[1] != second[1]


def test_consecutive_frames_are_one_group(tmp_path):
    for folder in ("image", "label"):
        (tmp_path / folder).mkdir()
    # Frame 9990 comes before 10010, though not in order of name.
    names = [f"0016E5_{number}" for number in range(9970, 10030, 2)] + ["0001TP_9972", "street"]
    for name in names:
        for folder in ("image", "label"):
            (tmp_path / folder / f"{name}.png").write_bytes(b"")
    task = CamVid(tmp_path)
    groups: dict[str, list[str]] = {}
    for item in task.items():
        groups.setdefault(task.group(item), []).append(Path(item.name).stem)
    blocks = [names[first : first + camvid.BLOCK] for first in (0, 10, 20)]
    expected = [*blocks, ["0001TP_9972"], ["street"]]
    assert sorted(sorted(group) for group in groups.values()) == sorted(sorted(block) for block in expected)
    assert any("one clip" in caveat for caveat in task.caveats)


def test_foreign_label_sets_map_into_ours():
    for count, mapping in CamVid.foreign_classes.items():
        assert all(0 <= theirs < count and 0 <= ours < CLASSES for theirs, ours in mapping.items())
        assert set(mapping.values()) == set(range(CLASSES))


# -------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("network", [ResidualClassifier(10), PlainClassifier(10), PyramidSegmenter(11)])
def test_networks_as_shipped_are_small(network):
    assert 1e6 < sum(p.numel() for p in network.parameters()) < 4e6 and network.kind in KINDS


@pytest.mark.parametrize("size", [(1, 1), (33, 64), (50, 47)])
def test_networks_take_any_size(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with torch.inference_mode():
        logits = ResidualClassifier(10, **SMALL).eval().predict(pixels)
        plain = PlainClassifier(10, (4, 6, 8)).eval().predict(pixels)
        classes = PyramidSegmenter(11, **SMALL, pyramid=8).eval().predict(pixels)
    assert logits.shape == plain.shape == (10,) and logits.dtype == plain.dtype == np.float32
    assert classes.shape == size and classes.min() >= 0 and classes.max() < 11


@pytest.mark.parametrize(
    ("network", "task"),
    [
        (ResidualClassifier(10, **SMALL, drop_path=0.5, dropout=0.5), Imagenette),
        (PlainClassifier(10, (4, 6, 8), dropout=0.5), Imagenette),
        (PyramidSegmenter(11, **SMALL, pyramid=8, drop_path=0.5), CamVid),
    ],
)
def test_networks_are_restored_from_their_folder(network: TaskNetwork, task, tmp_path, scenery):
    for parameter in network.parameters():  # gates that are zero at the start would hide what is lost
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    models.save_model(network, tmp_path / "model-v1", task=task.name, labels=task.labels)
    model = models.load_model(tmp_path / "model-v1")
    assert model.kind == task.kinds[0] and model.info.labels == task.labels
    with torch.inference_mode():
        expected = network.eval().predict(scenery[:64, :96])
    answer = model(scenery[:64, :96])
    if task is CamVid:
        assert np.mean(answer == expected) > 0.97  # kernels are stored in half precision
    else:
        np.testing.assert_allclose(answer, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())


def test_branches_are_dropped_in_training_alone():
    block = ResidualBlock(4, 4, 1, drop_path=0.5)
    torch.nn.init.ones_(block.branch[1][1].weight)  # type: ignore[index, arg-type]
    x = torch.rand(200, 4, 6, 6)
    with torch.no_grad():
        block.train()
        dropped = (block(x) == x).flatten(1).all(1).float().mean()
        block.eval()
        kept = block(x)
    assert 0.35 < dropped < 0.65 and not (kept == x).flatten(1).all(1).any()


def test_the_segmenter_sees_the_whole_picture():
    torch.manual_seed(0)
    network = PyramidSegmenter(11, **SMALL, pyramid=8).eval()
    x = torch.rand(1, 3, 256, 256)
    changed = x.clone()
    changed[..., -8:, -8:] = 1 - changed[..., -8:, -8:]
    with torch.inference_mode():
        assert not torch.equal(network(x)[..., :4, :4], network(changed)[..., :4, :4])
