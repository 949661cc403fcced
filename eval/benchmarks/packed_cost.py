"""What a packed set costs, in bytes and in accuracy: Imagenette against its JPEG files.

The validation pictures are packed at some qualities and profiles, read back as decoded samples by `PackedDataset`, and
shown to the frozen classifier, which has never seen a lossy picture of ours. Bytes are those of all shards, which hold
keys, labels and checksums too, and `packed.json`; JPEG bytes are those of the files. Rows of the profiles train and
archive decode to the same pictures. At the lowest rate that keeps enough of the accuracy on the original JPEG files,
the training pictures are packed as well, and bytes are those of all. Intervals are 95 % bootstrap intervals over
pictures; p is of McNemar's test against the originals.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import compand
from compand.allocator import tune_allocator
from compand.codec import Codec
from compand.data import PackedDataset, local_engine, pack
from compand.errors import UsageError
from compand.eval.benchmarks import program
from compand.eval.perception.models import ReferenceModel, load_model
from compand.eval.perception.statistics import Bootstrap, interval, mcnemar
from compand.eval.perception.tasks.imagenette import Imagenette, labelled_images
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.pictures import read_picture

CODEC = "wavelet-rgb-16x"
QUALITIES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
PROFILES = {"archive": ("archive", "zstd"), "train, zstd": ("train", "zstd"), "train, lz4": ("train", "lz4")}
"""Profile and compression. Of the first one samples are decoded."""

KEPT = 0.97
"""Least share of the accuracy on the originals."""

SHARE = 0.25
"""Largest share of the JPEG bytes."""


def pack_folder(
    source: Path, target: Path, codec: str, quality: float, options: tuple[str, str], device: str
) -> int:
    """Packs a folder of class folders. Returns the bytes of the set."""
    profile, compression = options
    packing = pack.start(
        str(source),
        str(target),
        codec=codec,
        quality=quality,
        profile=profile,
        compression=compression,
        device=device,
    )
    local_engine.run_local(packing)
    if packing.finish().failures:
        raise UsageError(f"{source} has pictures that cannot be packed: see {target}/failures.csv")
    return sum(path.stat().st_size for path in target.iterdir())


def right_on_originals(model: ReferenceModel, pictures: Sequence[tuple[str, Path, int]]) -> NDArray[np.bool_]:
    """Whether the model recognises each of the files."""
    return np.array([_recognised(model, read_picture(path).pixels, label) for _, path, label in pictures])


def right_on_packed(
    model: ReferenceModel, folder: Path, codec: Codec, pictures: Sequence[tuple[str, Path, int]]
) -> NDArray[np.bool_]:
    """Whether the model recognises each picture as the set decodes it, in the order of `pictures`."""
    dataset = PackedDataset(folder, fields=("samples",), columns=("key",), codec=codec)
    labels = {key: label for key, _, label in pictures}
    found = {}
    for index in range(len(dataset)):
        item = dataset[index]
        pixels = item["samples"].permute(1, 2, 0).contiguous().numpy()
        found[item["key"]] = _recognised(model, pixels, labels[item["key"]])
    return np.array([found[key] for key, _, _ in pictures])


def _recognised(model: ReferenceModel, pixels: NDArray[np.uint8], label: int) -> bool:
    return int(np.argmax(model(pixels))) == label


def measure(
    data: Path, work: Path, codec: Codec, qualities: Sequence[float], model: ReferenceModel, device: str
) -> dict[str, Any]:
    """Packs and classifies.

    Args:
        data: folder of Imagenette, with `val` and perhaps `train`.
        work: where sets are made.

    Returns:
        pictures, jpeg_bytes, original (accuracy, low, high), points (quality, bytes by profile, accuracy, low, high,
        kept, p), chosen (the least bytes of those that keep enough: quality, jpeg_bytes and bytes by profile of `val`
        and `train` together; None where none does).
    """
    assert codec.info is not None  # it was loaded
    root, name = data / "val", str(codec.info.path)
    pictures = [
        (path.relative_to(root).with_suffix("").as_posix(), path, label)
        for path, label in labelled_images(root)
    ]
    original = right_on_originals(model, pictures)
    bootstrap = Bootstrap(len(pictures))
    jpeg_bytes = sum(path.stat().st_size for _, path, _ in pictures)
    points: list[dict[str, Any]] = []
    for quality in qualities:
        sizes = {
            title: pack_folder(root, work / f"val-{quality:g}-{title}", name, quality, options, device)
            for title, options in PROFILES.items()
        }
        right = right_on_packed(model, work / f"val-{quality:g}-{next(iter(PROFILES))}", codec, pictures)
        points.append(
            {
                "quality": quality,
                "bytes": sizes,
                **_accuracy(right, bootstrap),
                "kept": float(right.mean() / original.mean()),
                "p": mcnemar(original, right),
            }
        )
    enough = [point for point in points if point["kept"] >= KEPT]
    chosen = None
    if enough:
        best = min(enough, key=lambda point: min(point["bytes"].values()))
        chosen = {"quality": best["quality"], "jpeg_bytes": jpeg_bytes, "bytes": dict(best["bytes"])}
        if (data / "train").is_dir():
            chosen["jpeg_bytes"] += sum(path.stat().st_size for path, _ in labelled_images(data / "train"))
            for title, options in PROFILES.items():
                target = work / f"train-{title}"
                chosen["bytes"][title] += pack_folder(
                    data / "train", target, name, best["quality"], options, device
                )
    return {
        "pictures": len(pictures),
        "jpeg_bytes": jpeg_bytes,
        "original": _accuracy(original, bootstrap),
        "points": points,
        "chosen": chosen,
    }


def _accuracy(right: NDArray[np.bool_], bootstrap: Bootstrap) -> dict[str, float]:
    outcomes = right.astype(np.float64)[:, None]
    found = interval(float(right.mean()), bootstrap.means(outcomes)[..., 0])
    return {"accuracy": found.value, "low": found.low, "high": found.high}


def render(results: Mapping[str, Any], conditions: str) -> str:
    """The report in Markdown."""
    original, jpeg = results["original"], results["jpeg_bytes"]
    rows = [
        [
            "JPEG files",
            f"{jpeg / results['pictures']:,.0f}",
            *["1"] * len(PROFILES),
            _percent(original),
            "100 %",
            "",
        ]
    ]
    for point in results["points"]:
        shares = [f"1/{jpeg / point['bytes'][title]:.1f}" for title in PROFILES]
        size = f"{point['bytes']['archive'] / results['pictures']:,.0f}"
        kept = f"{100 * point['kept']:.1f} %"
        rows.append(
            [f"quality {point['quality']:g}", size, *shares, _percent(point), kept, f"{point['p']:.3g}"]
        )
    columns = ["", "bytes a picture", *PROFILES, "top-1 accuracy", "kept", "p"]
    parts = [
        "# What packed sets cost",
        (__doc__ or "").strip(),
        conditions,
        "Bytes a picture are those of the archive profile; profiles show their share of the JPEG bytes.",
        markdown_table(columns, rows),
    ]
    chosen = results["chosen"]
    if chosen is None:
        parts.append(f"No quality keeps {KEPT:.0%} of the accuracy.")
    else:
        shares_of_all = {title: size / chosen["jpeg_bytes"] for title, size in chosen["bytes"].items()}
        reached = "; ".join(
            f"{title} 1/{1 / share:.1f}, {'yes' if share <= SHARE else 'no'}"
            for title, share in shares_of_all.items()
        )
        parts.append(
            f"Least rate that keeps {KEPT:.0%}: quality {chosen['quality']:g}. Of the JPEG bytes of all pictures, "
            f"{chosen['jpeg_bytes'] / 1e6:.1f} MB, at most 1/{1 / SHARE:g} wanted: {reached}."
        )
    return "\n\n".join(parts) + "\n"


def _percent(score: Mapping[str, float]) -> str:
    return f"{100 * score['accuracy']:.1f} % ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "packed_cost")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of Imagenette: val/CLASS/*, train/CLASS/*"
    )
    parser.add_argument("--codec", default=CODEC, help="checkpoint: a name or a folder")
    parser.add_argument("--qualities", type=float, nargs="+", default=QUALITIES)
    parser.add_argument(
        "--model", default=Imagenette.default_model, help="reference model: a name or a folder"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = program.parse(parser, argv)
    tune_allocator()
    model = load_model(arguments.model, arguments.device)
    codec = compand.load(arguments.codec, device=arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(
            arguments.data, Path(temporary), codec, arguments.qualities, model, arguments.device
        )
    data = f"{results['pictures']} validation pictures of {arguments.data.name}"
    conditions = f"{data}; {arguments.codec}; {model.name}; {torch.get_num_threads()} threads."
    report = render(results, conditions)
    write_results(arguments.output, results, provenance(data), report=report, force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
