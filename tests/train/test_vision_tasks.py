"""Training of the image tasks' reference models: distortions, data, and whole runs of a few steps."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compand.errors import CheckpointError, MediaError, UsageError
from compand.eval import subjects
from compand.eval.items import Item, load
from compand.eval.perception import models
from compand.eval.perception.tasks.camvid import CamVid
from compand.eval.perception.tasks.imagenette import Imagenette
from compand.train import augmentation, cli
from compand.train.images import read_rgb
from compand.train.vision_tasks import Batches, CamVidData, ImagenetteData, class_weights, squared

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, china, flower) -> Path:
    """Two classes: pieces of one photograph each, some gray, one of another size."""
    root = tmp_path_factory.mktemp("imagenette")
    generator = np.random.default_rng(0)
    for name, photograph in (("church", china), ("garbage_truck", flower)):
        pixels = read_rgb(photograph)
        for split, count in (("train", 12), ("val", 4)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                top, left = generator.integers(0, 427 - 64), generator.integers(0, 640 - 64)
                piece = Image.fromarray(pixels[top : top + 64, left : left + 64 + (i == 3)])
                (piece.convert("L") if i == 2 else piece).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def streets(tmp_path_factory, china) -> Path:
    """Pieces of a photograph with its bright half labelled as sky and the rest as buildings."""
    root = tmp_path_factory.mktemp("camvid")
    pixels = read_rgb(china)
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for folder in ("image", "label"):
            (root / split / folder).mkdir(parents=True)
        for i in range(count):
            top, left = generator.integers(0, 427 - 64), generator.integers(0, 640 - 96)
            piece = pixels[top : top + 64, left : left + 96]
            labels = np.where(piece.mean(2) > 128, 0, 1).astype(np.uint8)
            labels[:2] = 11
            Image.fromarray(piece).save(root / split / "image" / f"{i}.png")
            Image.fromarray(labels).save(root / split / "label" / f"{i}.png")
    return root


def fit(config: str, root: Path, folder: Path, output: Path, *arguments: str) -> None:
    """Runs a config with a small network on the CPU."""
    cli.main(
        [
            "fit", "--config", str(CONFIGS / config), f"--data.root={root}", f"--model.output={output}",
            "--trainer.accelerator=cpu", "--trainer.precision=32", "--trainer.enable_progress_bar=false",
            f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.default_root_dir={folder}",
            "--trainer.log_every_n_steps=5", "--trainer.val_check_interval=20", "--model.warmup_steps=5",
            "--trainer.callbacks.init_args.decay=0.5", "--trainer.callbacks.init_args.update_every_n_steps=1",
            "--model.network.init_args.stem=8", "--model.network.init_args.widths=[8, 16, 16, 16]",
            "--model.network.init_args.blocks=[1, 1, 1, 1]", "--model.network.init_args.drop_path=0", *arguments,
        ]
    )  # fmt: skip


SMALL_IMAGENETTE = ("--data.edge=64", "--data.crop=48", "--data.batch_size=16")


# ------------------------------------------------------------------------------------------------------ whole runs


def test_a_classifier_is_trained_and_written(pair, tmp_path, capsys):
    folder = tmp_path / "imagenette-classifier-v1"
    arguments = (*SMALL_IMAGENETTE, "--data.plain=true", "--trainer.max_steps=40", "--model.lr=0.05")
    fit("imagenette.yaml", pair, tmp_path, folder, *arguments)
    card = (folder / "CARD.md").read_text()
    stated = float(re.search(r"top-1 accuracy on the 8 undamaged test items: (\S+)", card)[1])  # type: ignore[index]
    assert stated >= 0.85 and "40 steps" in card and "on undamaged items" in card
    assert f"top-1 accuracy {stated:.4f} on 8 undamaged test items" in capsys.readouterr().out
    model = models.load_model(folder)
    assert model.info.trained_on is None and model.info.labels == Imagenette.labels
    task = Imagenette(pair)
    outcomes = [task.outcome(model, task.load(item), item) for item in task.items()]
    assert task.score(np.sum(outcomes, axis=0)) == pytest.approx(stated, abs=1e-4)
    with pytest.raises(CheckpointError, match="exists already"):
        fit("imagenette.yaml", pair, tmp_path, folder, *arguments)


def test_a_segmenter_is_trained_and_written(streets, tmp_path):
    folder = tmp_path / "camvid-segmenter-v1"
    fit(
        "camvid.yaml", streets, tmp_path, folder, "--data.crop=[48, 64]", "--data.batch_size=6",
        "--trainer.max_steps=40", "--model.network.init_args.pyramid=8", "--model.lr=0.1",
    )  # fmt: skip
    task, model = CamVid(streets), models.load_model(folder)
    total = np.sum([task.outcome(model, task.load(item), item) for item in task.items()], axis=0)
    matrix = total.reshape(11, 12)
    assert np.trace(matrix) / matrix.sum() > 0.8 and matrix.sum() == 2 * 62 * 96
    log = "".join(path.read_text() for path in tmp_path.glob("camvid/version_0/metrics.csv"))
    assert "val/mean_iou" in log and f"{task.score(total):.4f}" in (folder / "CARD.md").read_text()


def test_training_on_decoded_images_within_a_time(pair, tmp_path, monkeypatch):
    folder = tmp_path / "imagenette-jpeg-v1"
    fit(
        "imagenette.yaml", pair, tmp_path, folder, *SMALL_IMAGENETTE, "--data.codec=jpeg", "--data.quality=5",
        "--data.jobs=1", "--trainer.max_steps=100000", "--model.minutes=0.03", "--trainer.val_check_interval=10000",
    )  # fmt: skip
    assert models.load_model(folder).trained_on == {"codec": "jpeg", "quality": 5}
    card = (folder / "CARD.md").read_text()
    steps = int(re.search(r"(\d+) steps", card)[1])  # type: ignore[index]
    assert 0 < steps < 1000 and "on items decoded from jpeg at quality 5" in card


def test_decoded_images_are_those_of_the_codec(pair):
    data = ImagenetteData(str(pair), edge=64, codec="jpeg", quality=5, jobs=2)
    path = pair / "train" / "church" / "0.png"
    subject = subjects.find("jpeg", "image")
    expected = subject.decode(subject.encode(load(Item("0.png", path, "image")), 5))
    (decoded,) = data.pixels([path], decoded=True)
    assert np.array_equal(decoded, expected.pixels) and not np.array_equal(decoded, read_rgb(path))
    assert np.array_equal(data.pixels([path], decoded=False)[0], read_rgb(path))


# ------------------------------------------------------------------------------------------------------------ data


def test_codec_and_quality_belong_together(pair):
    with pytest.raises(UsageError, match="belong together"):
        ImagenetteData(str(pair), codec="jpeg")


def test_every_item_comes_once_before_any_comes_again():
    batches = Batches(7, 3, CPU, lambda chosen: (chosen, chosen))
    drawn = torch.cat([items for items, _ in islice(iter(batches), 14)]).reshape(6, 7)
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in drawn)
    assert len({tuple(epoch.tolist()) for epoch in drawn}) > 1
    (large, _) = next(iter(Batches(2, 5, CPU, lambda chosen: (chosen, chosen))))
    assert len(large) == 5 and set(large.tolist()) == {0, 1}


@pytest.mark.parametrize("plain", [True, False])
def test_batches_of_imagenette(pair, plain):
    data = ImagenetteData(str(pair), batch_size=32, edge=64, crop=40, plain=plain)
    data.setup()
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (32, 3, 40, 40) and images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(targets.sum(1), torch.ones(32))
    assert ((targets == 0) | (targets == 1)).all() == plain
    tests = list(data.val_dataloader())
    assert sum(len(labels) for _, labels in tests) == 8 and tests[0][0].dtype == torch.uint8


def test_plain_crops_are_pieces_of_the_images(pair):
    data = ImagenetteData(str(pair), edge=64, crop=48, plain=True)
    data.setup()
    assert data._train is not None
    image = data._train[0][:1]
    crops, _ = data.distorted(image.expand(20, -1, -1, -1), torch.zeros(20, dtype=torch.int64))
    ranges = (image.min() / 255, image.max() / 255)
    assert crops.min() >= ranges[0] - 1e-5 and crops.max() <= ranges[1] + 1e-5
    assert len({tuple(crop.flatten()[:9].tolist()) for crop in crops}) > 10


def test_camvid_needs_one_size(streets, tmp_path):
    import shutil

    shutil.copytree(streets, tmp_path / "camvid")
    Image.new("RGB", (90, 64)).save(tmp_path / "camvid" / "train" / "image" / "0.png")
    with pytest.raises(MediaError, match="several sizes"):
        CamVidData(str(tmp_path / "camvid")).setup()


def test_class_weights():
    counts = np.array([800, 0, 200])
    weights = class_weights(counts, 0.5)
    assert weights[1] == 0 and weights[2] / weights[0] == pytest.approx(2.0)
    assert float(weights @ torch.tensor([0.8, 0, 0.2])) == pytest.approx(1)
    assert class_weights(counts, 0).tolist() == [1, 0, 1]


def test_squares_are_cut_from_the_middle():
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, 10:40] = 200
    assert (squared(pixels, 30) == 200).all() and squared(pixels, 12).shape == (12, 12, 3)
    assert squared(pixels[:, :30], 30).shape == (30, 30, 3)


# ----------------------------------------------------------------------------------------------------- distortions


@pytest.fixture
def photograph(scenery) -> torch.Tensor:
    """[1, 3, 60, 100] in [0, 1]."""
    return torch.from_numpy(scenery[:60, :100].copy()).permute(2, 0, 1)[None].float() / 255


def test_the_whole_picture_is_itself_or_mirrored(photograph):
    maps = augmentation.crop_maps(torch.ones(40, 2), (60, 100))
    crops = augmentation.resample(photograph.expand(40, -1, -1, -1), maps, (60, 100))
    kept = torch.isclose(crops, photograph, atol=1e-4).flatten(1).all(1)
    mirrored = torch.isclose(crops, photograph.flip(3), atol=1e-4).flatten(1).all(1)
    assert bool((kept | mirrored).all()) and 8 < int(kept.sum()) < 32


def test_crops_lie_within_the_picture():
    extent = torch.rand(100, 2) * 0.9 + 0.1
    maps = augmentation.crop_maps(extent, (60, 100))
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, 1]]).T
    assert float((maps @ corners).abs().max()) <= 1 + 1e-5
    larger = augmentation.crop_maps(1 + extent, (60, 100))
    # A crop that is larger than the picture has all of it.
    assert bool(
        ((larger @ corners).amin(2) <= -1 + 1e-5).all() and ((larger @ corners).amax(2) >= 1 - 1e-5).all()
    )


def test_rotations_are_by_true_angles():
    maps = augmentation.crop_maps(torch.ones(50, 2), (60, 100), rotation=0.5, mirror=False)
    pixels = torch.diag(torch.tensor([50.0, 30]))
    turn = pixels @ maps[:, :, :2] @ pixels.inverse()
    torch.testing.assert_close(turn @ turn.mT, torch.eye(2).expand(50, 2, 2))
    angle = torch.atan2(turn[:, 1, 0], turn[:, 0, 0])
    assert float(angle.abs().max()) <= 0.5 and float(angle.abs().max()) > 0.3


def test_labels_move_with_their_picture():
    labels = torch.zeros(8, 60, 100, dtype=torch.uint8)
    labels[:, 20:40, 30:70] = 5
    images = (labels[:, None].float() / 5).expand(-1, 3, -1, -1)
    maps = augmentation.crop_maps(torch.full((8, 2), 1.3), (60, 100), rotation=0.4, shear=0.2)
    moved = augmentation.resample_labels(labels, maps, (78, 130), outside=11)
    crops = augmentation.resample(images, maps, (78, 130))[:, 0]
    assert set(moved.unique().tolist()) == {0, 5, 11}
    inner = moved != 11
    assert float(((moved == 5) == (crops > 0.5))[inner].float().mean()) > 0.995


def test_areas_and_aspects_stay_in_their_range():
    extent = augmentation.area_extents(2000, (0.2, 0.5), 4 / 3, CPU)
    area, ratio = extent.prod(1), extent[:, 0] / extent[:, 1]
    assert 0.199 <= area.min() < 0.22 and 0.48 < area.max() <= 0.501
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.34


def test_color_jitter(photograph):
    unchanged = augmentation.color_jitter(photograph, 0.0)
    torch.testing.assert_close(unchanged, photograph, rtol=0, atol=1e-5)
    many = photograph.expand(16, -1, -1, -1)
    gray = augmentation.color_jitter(many, 0.4, hue=0.3, gray=1.0)
    assert float((gray - gray.mean(1, keepdim=True)).abs().max()) < 1e-5
    middle = 0.4 + 0.2 * many  # far enough from the ends that nothing is cut
    turned = augmentation.color_jitter(middle, 0.0, hue=0.5)
    torch.testing.assert_close(turned.mean(1), middle.mean(1), rtol=0, atol=1e-5)
    assert float((turned - middle).abs().max()) > 0.02
    inverted = augmentation.color_jitter(many, 0.0, solarize=1.0)
    assert 0 < float((inverted != many).float().mean()) < 1
    strong = augmentation.color_jitter(many, 0.9, 0.5, 0.1, 0.5)
    assert float(strong.min()) >= 0 and float(strong.max()) <= 1


def test_erasing(photograph):
    many = photograph.expand(50, -1, -1, -1)
    assert torch.equal(augmentation.erase(many, 0.0), many)
    share = (augmentation.erase(many, 1.0) != many).any(1).float().mean((1, 2))
    assert share.min() > 0 and share.max() <= 0.32 and 0.05 < share.mean() < 0.2


def test_targets_are_mixed_as_images_are():
    """With constant images of value i for class i, a mixed image's mean is the mean class of its target."""
    classes = torch.arange(8)
    images = classes.view(8, 1, 1, 1).expand(-1, 3, 16, 16) / 8
    pure = torch.nn.functional.one_hot(classes, 8).float()
    seen_cut = seen_blend = False
    for _ in range(20):
        mixed, targets = augmentation.mix(images, pure, 0.8, 0.4)
        torch.testing.assert_close(mixed.mean((1, 2, 3)) * 8, targets @ classes.float())
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        values = [len(image.unique()) for image in mixed]
        impure = [len(target.nonzero()) == 2 for target in targets]
        seen_cut |= any(count == 2 for count in values)
        seen_blend |= any(count == 1 and two for count, two in zip(values, impure, strict=True))
    assert seen_cut and seen_blend
    same, kept = augmentation.mix(images, pure, 0.0, 0.4)
    assert torch.equal(same, images) and torch.equal(kept, pure)
