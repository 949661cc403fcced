"""The benchmarks of codecs of codebooks, on next to nothing."""

from __future__ import annotations

import json
import math
import operator

import numpy as np
import pytest
import torch
from PIL import Image

from compand.checkpoint import read_info
from compand.errors import MediaError, UsageError
from compand.eval.benchmarks import (
    codebook_images,
    concealment,
    index_coding,
    quantiser_table,
    scores,
    speech_codecs,
)
from compand.eval.benchmarks.codebook_images import Point
from compand.eval.benchmarks.crew import crew
from compand.eval.benchmarks.index_coding import Coded
from compand.eval.perception.tasks.imagenette import SYNSETS
from compand.eval.perception.tasks.keywords import Keywords
from compand.eval.subjects import find
from compand.pictures import psnr, read_picture
from compand.sounds import Sound
from compand.train.instruments import RATE, drum, note

TRUNK = {
    "latent_channels": 24,
    "encoder_width": 8,
    "encoder_stages": [[4, 12, [1]], [10, 16, [1]], [8, 24, [1]]],
    "encoder_depth": 1,
    "decoder_stages": [[1, 32, 1]],
}


def results_of(path):
    return json.loads(path.read_text())["results"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, china, flower):
    folder = tmp_path_factory.mktemp("photographs")
    for path in (china, flower):
        with Image.open(path) as image:
            image.resize((192, 176)).save(folder / f"{path.stem}.png")
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Folder of audio data with a few sounds in the place of keywords."""
    root = tmp_path_factory.mktemp("audio")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for word in Keywords.labels[:2]:
            folder = root / "keywords" / split / word
            folder.mkdir(parents=True)
            for i in range(2):
                wave = 0.2 * (note(generator) + drum(generator))
                Sound(wave[None, :RATE:2].astype(np.float32), RATE // 2).save(folder / f"{i}.wav")
    return root


# ---------------------------------------------------------------------------------------------- quantisers


def test_quantisers_are_trained_measured_and_tabulated_again(spoken, tmp_path, capsys):
    output = tmp_path / "table.json"
    options = ["--data", str(spoken / "keywords"), "--steps", "6", "--batch", "2", "--crop", "3200"]
    options += ["--size", "64", "--seeds", "2", "--quantisers", "mcrvq", "fsq", "--probe-steps", "2"]
    options += ["--trunk", json.dumps(TRUNK), "--together", "2", "--devices", "cpu", "--keep", "2"]
    quantiser_table.main([*options, "-o", str(output)])
    results = results_of(output)
    runs = results["runs"]
    assert [(run["quantiser"], run["seed"]) for run in runs] == [
        ("mcrvq", 0),
        ("fsq", 0),
        ("mcrvq", 1),
        ("fsq", 1),
    ]
    for run in runs:
        assert (run["planes"], run["size"]) == (4, 64) and run["bits_raw"] == 50 * 4 * 6
        assert math.isfinite(run["loss"]) and 0 < run["perplexity"] <= 1 and 0 <= run["first_share"] <= 1
        assert run["latent_error_mapped"] <= run["latent_error"]
        assert len(run["scores"]["log_mel"]) == 4
    for run in runs:
        del run["scores"]["log_mel"]
    former = json.loads(output.read_text())
    former["results"]["runs"] = runs
    output.write_text(json.dumps(former))
    again = tmp_path / "again.json"
    quantiser_table.main(["--tables-of", str(output), "-o", str(again)])
    # Without their log-mel distances, the runs have to get them from the decoded sounds that were not written here.
    kept = {path.name for path in tmp_path.glob("*.npz")}
    assert kept == {f"table_{name}.npz" for name in ("originals", "mcrvq_0", "mcrvq_1", "fsq_0", "fsq_1")}
    assert [len(run["scores"]["log_mel"]) for run in results_of(again)["runs"]] == [2] * 4
    assert "mcrvq" in capsys.readouterr().out


def test_the_steps_can_follow_from_the_time(spoken, tmp_path, monkeypatch):
    monkeypatch.setattr(quantiser_table, "step_seconds", lambda *_: 1.0)
    output = tmp_path / "table.json"
    options = ["--data", str(spoken / "keywords"), "--minutes", "0.2", "--batch", "1", "--crop", "3200"]
    options += ["--size", "64", "--seeds", "1", "--quantisers", "product", "--probe-steps", "1"]
    quantiser_table.main([*options, "--trunk", json.dumps(TRUNK), "-o", str(output)])
    assert results_of(output)["settings"]["steps"] == 12


def test_runs_that_take_too_long_are_left_out(spoken, tmp_path):
    options = ["--data", str(spoken / "keywords"), "--steps", "1", "--batch", "1", "--crop", "3200"]
    options += ["--size", "64", "--trunk", json.dumps(TRUNK), "-o", str(tmp_path / "table.json")]
    with pytest.raises(UsageError, match="no run was over within 0 minutes"):
        quantiser_table.main([*options, "--within", "0"])


def test_steps_are_timed(spoken):
    settings = quantiser_table.Settings(100, 1, 3200, 1e-3, 64, trunk=TRUNK)
    assert quantiser_table.step_seconds("cpu", spoken / "keywords", settings, 2, None) > 0


def test_all_quantisers_have_the_same_bits():
    for kind in quantiser_table.QUANTISERS:
        made = quantiser_table.quantiser(kind, 24, 1024)
        sizes = made.sizes[made.depths - 1]
        assert len(sizes) == 4
        assert sum(map(math.log2, sizes)) == pytest.approx(40, rel=0.004)


def test_a_winner_wins_with_every_seed():
    assert quantiser_table.winner({"a": [1.0, 2.0], "b": [0.5, 0.9]}, 1) == "a"
    assert quantiser_table.winner({"a": [1.0, 2.0], "b": [0.5, 0.9]}, -1) == "b"
    assert quantiser_table.winner({"a": [1.0, 2.0], "b": [0.5, 1.1]}, 1) is None
    assert quantiser_table.winner({"a": [2.0], "b": [1.0]}, 1) is None


def test_an_affine_map_is_no_latent_error():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 200, generator=generator)
    z_hat = torch.randn(5, 5, generator=generator) @ z + 3
    assert quantiser_table.relative_error(z, z_hat) > 0.1
    assert quantiser_table.relative_error(z, quantiser_table.mapped(z, z_hat)) < 1e-6
    assert quantiser_table.relative_error(z, z.mean(1, keepdim=True)) == pytest.approx(1)


def test_perplexity_and_bits_of_static_tables():
    counts = np.array([[4.0, 4, 0, 0], [8, 0, 0, 0]])
    assert quantiser_table.perplexity(counts).tolist() == [2, 1]
    even = np.full((2, 4), 7.0)
    assert quantiser_table.static_bits(even, counts) == pytest.approx(2 * 16)
    assert quantiser_table.static_bits(1e6 * counts, counts) == pytest.approx(8, abs=1e-3)


def test_words_are_recognised_from_indices_that_tell_them():
    generator = torch.Generator().manual_seed(0)
    words = torch.arange(64) % 6
    indices = torch.randint(2, (64, 1, 40), generator=generator) + 2 * words[:, None, None]
    found = quantiser_table.recognised((indices, words), (indices, words), 16, 60, 0)
    assert found > 0.9


def test_training_needs_both_splits(tmp_path):
    with pytest.raises(MediaError, match="has no folders train and val"):
        quantiser_table.main(["--data", str(tmp_path), "-o", str(tmp_path / "a.json")])
    with pytest.raises(UsageError, match="give --data"):
        quantiser_table.main(["-o", str(tmp_path / "a.json")])


# --------------------------------------------------------------------------------------------------- indices


def test_index_coding_of_pictures(photographs, checkpoint_of, tmp_path):
    output = tmp_path / "coding.json"
    index_coding.main(
        [
            "-c",
            str(checkpoint_of("vqgan")),
            "--data",
            str(photographs),
            "--levels",
            "1",
            "8",
            "-o",
            str(output),
        ]
    )
    levels = results_of(output)["levels"]
    assert [row["level"] for row in levels] == [1, 8] and all(row["exact"] for row in levels)
    for row in levels:
        assert row["most_bytes_over"] <= 1
        assert row["rate_indices"] < row["rate_files"]
        assert row["savings"]["chosen"] >= row["savings"]["uniform"] - 1e-9
    assert levels[1]["bits_an_index"] == pytest.approx(math.log2(96))


def test_index_coding_of_sounds(spoken, checkpoint_of, tmp_path):
    output = tmp_path / "coding.json"
    folder = spoken / "keywords" / "val" / Keywords.labels[0]
    index_coding.main(
        [
            "-c",
            str(checkpoint_of("codebook-audio")),
            "--data",
            str(folder),
            "--levels",
            "2",
            "-o",
            str(output),
        ]
    )
    (row,) = results_of(output)["levels"]
    assert row["codes"] == [64, 64] and row["exact"] and row["most_bytes_over"] <= 1


def test_index_coding_needs_tokens(photographs, tmp_path):
    with pytest.raises(UsageError, match="has no tokens"):
        index_coding.main(["-c", "hyperprior", "--data", str(photographs), "-o", str(tmp_path / "a.json")])


def test_savings_are_against_bits_that_are_not_rounded():
    row = Coded("a", 1, 1, (8,), 10, 100.0, 30.0, 40, {"x": 3}, {"x": 1.0}, True)
    assert index_coding.saving([row], "x") == pytest.approx(1 - 24 / 30)
    assert index_coding.over(row, "x") == 3 - 4


# -------------------------------------------------------------------------------------------------- pictures


def test_pictures_at_the_lowest_rates(photographs, checkpoint_of, tmp_path, monkeypatch, capsys):
    root = tmp_path / "imagenette"
    for name, path in zip(list(SYNSETS.values())[:2], sorted(photographs.iterdir()), strict=True):
        (root / name).mkdir(parents=True)
        (root / name / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "images.json"
    options = ["-c", str(checkpoint_of("vqgan")), "--data", str(root), "--levels", "1", "8", "--close", "1"]
    options += ["--jobs", "1", "--device", "cpu"]
    seen = []
    measure = codebook_images.Bench.measure

    def interrupted(bench, source, part, plans):
        seen.append((part, source.name))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return measure(bench, source, part, plans)

    monkeypatch.setattr(codebook_images.Bench, "measure", interrupted)
    monkeypatch.setattr(codebook_images, "STEPS", 1)
    with pytest.raises(KeyboardInterrupt):
        codebook_images.main([*options, "-o", str(output)])
    assert not output.exists() and output.with_suffix(".rows.jsonl").exists()
    # What was done is not done again.
    codebook_images.main([*options, "-o", str(output)])
    assert [part for part, _ in seen] == ["ours", "ours", "rival", "rival", "rival"] and seen[3] == seen[4]
    assert not output.with_suffix(".rows.jsonl").exists()
    assert "2 of 2 pictures" in capsys.readouterr().err
    results = results_of(output)
    points = results["points"]
    assert [point["codec"] for point in points[:4]] == ["undamaged", "vqgan-v1", "vqgan-v1", "jpeg"]
    own = points[1:3]
    assert own[0]["bpp"] < own[1]["bpp"]
    for point in points[1:]:
        assert point["figures"]["features"] > 0 and point["figures"]["other_features"] > 0
    assert all(len(point["right"]["imagenette-classifier-v1"]) == 2 for point in points)
    # At equal rates a codec gets no fewer bytes, and no smaller picture than it needs.
    beside = [point for point in points if "as level" in point["setting"]]
    assert [point["setting"].split("as ")[1] for point in beside] == ["level 8"]
    assert beside[0]["bpp"] >= own[1]["bpp"]
    assert [row["codes"] for row in results["codebooks"]] == [8]
    recipes = results["codebooks"][0]["recipes"]
    assert set(recipes) == {"k-means and training", "k-means", "random subset"}
    assert recipes["k-means"]["psnr"] != recipes["random subset"]["psnr"]


def test_reduced_pictures_keep_their_size(photographs):
    picture = read_picture(sorted(photographs.iterdir())[0], strip=True)
    subject = find("jpeg", "image")
    for factor in (1, 3):
        encode, decode = codebook_images.reduced(subject, 50, factor)
        assert decode(encode(picture)).pixels.shape == picture.pixels.shape
    assert len(codebook_images.reduced(subject, 50, 3)[0](picture)) < len(subject.encode(picture, 50))


def test_recognition_is_compared_on_equal_pictures():
    def point(codec, setting, bpp, correct):
        figures = dict.fromkeys(codebook_images.FIGURES)
        return Point("imagenette", codec, setting, bpp, figures, {"one": correct, "other": correct[::-1]})

    points = [
        point("vqgan-v1", "level 1", 0.02, [True, False, False]),
        point("vqgan-v1", "level 2", 0.04, [True, True, False]),
        point("vqgan-v1", "level 3", 0.06, [True, True, True]),
        point("jpeg", "quality 1", 0.2, [True, False, False]),
        point("hyperprior-v1", "quality 1, 1/4 of the size, as level 1", 0.02, [True, True, False]),
        point("hyperprior-v1", "quality 1, 1/4 of the size, as level 3", 0.06, [True, True, False]),
    ]
    rows = codebook_images.comparisons(points, "vqgan-v1")
    assert [(row["ours"], row["judge"], row["other"], row["met"]) for row in rows] == [
        ("level 2", "one", "jpeg", True),
        ("level 2", "other", "jpeg", True),
        ("level 1", "one", "hyperprior-v1", False),
        ("level 1", "other", "hyperprior-v1", False),
    ]
    assert "| yes |" in codebook_images.render(points, [], rows)


# ----------------------------------------------------------------------------------------------- concealment


def test_fills_are_held_against_each_other(photographs, checkpoint_of, tmp_path, capsys):
    output = tmp_path / "concealment.json"
    options = ["-c", str(checkpoint_of("vqgan")), "--data", str(photographs), "--levels", "8"]
    concealment.main([*options, "--jobs", "1", "-o", str(output)])
    results = results_of(output)
    assert {(entry["shape"], entry["fill"]) for entry in results["summary"]} == {
        (shape, fill) for shape in concealment.SHAPES for fill in concealment.SIMPLE
    }
    assert all(entry["features"] > 0 and 0 <= entry["right"] <= 1 for entry in results["summary"])
    assert "has no concealer" in capsys.readouterr().out


def test_a_concealer_is_measured_too(photographs, checkpoint_of):
    info = read_info(checkpoint_of("vqgan"))
    bench = concealment.Bench(concealment.Options(info, (3,), 0.2, "cpu"))
    bench.codec.add_concealer(width=12, depth=1, heads=2)
    bench.codec.concealer.eval()
    picture = read_picture(sorted(photographs.iterdir())[0], strip=True)
    rows = bench.conceal(picture, "a", 3, 0)
    entries = concealment.summary(rows)
    for fill in (concealment.CONCEALER, concealment.CODES):
        ours = [entry for entry in entries if entry["fill"] == fill]
        assert [entry["shape"] for entry in ours] == list(concealment.SHAPES)
        assert {"psnr_loss_ratio", "features_loss_ratio", "other_features_loss_ratio"} <= ours[0].keys()
    assert "random" in concealment.outcome(entries)
    # What the concealer is measured by is what a decoder shows.
    codec, seen = bench.codec, torch.from_numpy(bench.codec.quantise(picture, quality=3)).long()
    lost = concealment.erasure(tuple(seen.shape[1:]), 0.2, "rows", 0)
    latents = codec.restore(seen.masked_fill(lost, -1), 3 * 32)
    shown = codec.reconstruct(latents, height=picture.height, width=picture.width, channels=3, quality=3)
    found = [row.psnr for row in rows if (row.shape, row.fill) == ("rows", concealment.CONCEALER)]
    assert found == [psnr(picture.pixels, shown.pixels)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_crews_keep_the_order(jobs):
    with crew(abs, -3, jobs) as people:
        assert people.all(operator.sub, [5, 1, 4]) == [-2, 2, -1]
        assert sorted(people.each(pow, [2, 3], 10)) == [(0, 9), (1, 7)]
        with pytest.raises(ZeroDivisionError):
            people.all(operator.floordiv, [1, 0])


def test_erasures_have_the_rate_and_the_shape():
    lost = concealment.erasure((10, 20), 0.2, "random", 0)
    assert int(lost.sum()) == 40 and bool((lost == concealment.erasure((10, 20), 0.2, "random", 0)).all())
    rows = concealment.erasure((10, 20), 0.2, "rows", 0)
    assert int(rows.sum()) == 40 and bool((rows.all(1) == rows.any(1)).all())
    assert int(concealment.erasure((1, 2), 0.01, "random", 0).sum()) == 1


def test_losses_are_against_intact_tokens():
    def row(fill, psnr, features, shape="random"):
        return concealment.Filled("a", 1, shape, fill, psnr, features, 2 * features, 0.5)

    rows = [
        row("intact", 30, 0.1, ""),
        row("nearest", 26, 0.3),
        row("frequent", 25, 0.2),
        row("concealer", 29, 0.14),
    ]
    entries = {entry["fill"]: entry for entry in concealment.summary(rows)}
    assert entries["nearest"]["psnr_loss"] == 4
    assert entries["concealer"]["psnr_loss_ratio"] == pytest.approx(1 / 4)
    assert entries["concealer"]["features_loss_ratio"] == pytest.approx(0.4)
    assert "met" in concealment.outcome(list(entries.values()))


# ---------------------------------------------------------------------------------------------------- speech


def test_speech_against_opus(spoken, checkpoint_of, tmp_path):
    output = tmp_path / "speech.json"
    options = ["--data", str(spoken), "--codecs", str(checkpoint_of("codebook-audio")), "--limit", "2"]
    options += ["--metrics", "pesq", "stoi", "--workers", "1"]
    speech_codecs.main([*options, "-o", str(output)])
    results = results_of(output)
    assert [trial["codec"] for trial in results["trials"]] == ["opus", "codebook-audio-v1"] * 2
    assert [row["opus_target"] for row in results["verdicts"]] == [6.0, 8.0]
    for trial in results["trials"]:
        assert 0 < trial["kbps_payload"] < trial["kbps_files"]
        assert len(trial["correct"]) == 2 and len(trial["scores"]["stoi"]) == 2


def test_opus_gets_the_rate_that_it_is_asked_for():
    generator = np.random.default_rng(0)
    sound = Sound(0.3 * generator.standard_normal((1, 32000)).astype(np.float32), 16000)
    encoder = speech_codecs.Encoder("opus", [sound, sound], map)
    setting = speech_codecs.rival(encoder, 20.0)
    assert setting > 6 and encoder.payload(setting / 1.02) < 20 <= encoder.payload(setting) < 22
    assert speech_codecs.rival(encoder, 1.0) == 6


@pytest.mark.parametrize(("target", "level"), [(0.5, 1), (3.1, 1), (6.0, 1), (6.2, 2), (9.5, 3), (99.0, 4)])
def test_the_best_level_within_a_target_is_found(monkeypatch, target, level):
    """Even where the recordings that are looked at first take more or less than the others."""
    sounds = [Sound(np.zeros((1, 16000), np.float32) + i / 100, 16000) for i in range(20)]
    asked = []

    def coded(_, sound, setting):
        asked.append(setting)
        size = 3 + (sound is sounds[4])  # kilobits a level and second; the fifth is not looked at first
        return speech_codecs.Coded(bytes(125 * size * int(setting)), 0, 1.0)

    monkeypatch.setattr(speech_codecs, "_ours_coded", coded)
    encoder = speech_codecs.Encoder("a codec", sounds, map)
    assert speech_codecs.ours(encoder, 4, target) == level
    assert encoder.files(level) <= target or level == 1
    number = len(asked)
    assert speech_codecs.ours(encoder, 4, target) == level and len(asked) == number


def test_folders_without_speech_are_refused(tmp_path):
    with pytest.raises(MediaError, match="neither keywords/val nor audio books"):
        speech_codecs.sets(tmp_path, None)


# ---------------------------------------------------------------------------------------------------- scores


def test_scores_are_the_same_from_several_processes():
    generator = np.random.default_rng(0)
    originals = [
        Sound(0.1 * generator.standard_normal((1, 8000)).astype(np.float32), 16000) for _ in range(2)
    ]
    pairs = [(sound, Sound(0.9 * sound.samples, 16000)) for sound in originals]
    short = Sound(originals[0].samples[:, :100], 16000)
    alone = scores.score([*pairs, (short, short)], ["stoi", "log_mel"])
    assert alone[2]["stoi"] is None and alone[0]["log_mel"] == pytest.approx(0.915, abs=0.01)
    assert scores.score([*pairs, (short, short)], ["stoi", "log_mel"], 2) == alone


def test_differences_are_paired():
    found = scores.difference([1.0, 2.0, None, 4.0], [0.5, 1.5, 3.0, 3.5])
    assert found == (0.5, 0.5, 0.5) and str(found) == "+0.500 [+0.500, +0.500]"
    assert scores.difference([None], [1.0]) is None
