"""Lost tokens: what is filled in, in files too, and how the network for it is trained."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import compand
from compand import audio_codec, cli, image_codec
from compand.checkpoint import read_info
from compand.coding import container
from compand.concealment import Concealer, _spans, frequent_fill, nearest_fill
from compand.errors import BitstreamError, UsageError
from compand.sounds import Sound
from compand.train import export as exporting
from compand.train.concealment import ConcealmentTraining, codec_of, draw_erasures
from compand.train.images import ImageFolder
from compand.train.instruments import note
from compand.weights import build, save

SMALL = {"width": 24, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def pictures(token_checkpoints):
    return compand.load(token_checkpoints["image"], device="cpu")


@pytest.fixture(scope="module")
def sounds(token_checkpoints):
    return compand.load(token_checkpoints["audio"], device="cpu")


def damaged(data: bytes, *places: int) -> bytes:
    broken = bytearray(data)
    for place in places:
        broken[place] ^= 0x55
    return bytes(broken)


def stripes(batch: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Diagonals of 8 codes that follow from any few of them and from no single neighbour, [batch, 1, h, w]."""
    start = torch.randint(8, (batch, 1, 1, 1), generator=generator)
    return (start + torch.arange(height)[:, None] + 3 * torch.arange(width)) % 8


# ------------------------------------------------------------------------------------------------- simple fills


def test_the_nearest_and_the_most_frequent():
    tokens = torch.tensor([[[5, -1, -1, 7], [-1, -1, -1, 7], [5, 5, -1, -1]]])
    assert nearest_fill(tokens).tolist() == [[[5, 5, 7, 7], [5, 5, 7, 7], [5, 5, 5, 7]]]
    assert frequent_fill(tokens).tolist() == [[[5, 5, 5, 7], [5, 5, 5, 7], [5, 5, 5, 5]]]
    assert frequent_fill(tokens, [3])[0, 0].tolist() == [5, 3, 3, 7]
    both = torch.stack([tokens, tokens.flip(2)])
    assert torch.equal(nearest_fill(both)[0], nearest_fill(tokens))
    assert torch.equal(frequent_fill(both)[1], frequent_fill(tokens.flip(2)))
    assert tokens.min() == -1
    for fill in (nearest_fill, frequent_fill):
        assert torch.equal(fill(tokens.clamp(min=0)), tokens.clamp(min=0))
        with pytest.raises(UsageError, match="nothing to fill from"):
            fill(torch.full((1, 2, 2), -1))
    generator = torch.Generator().manual_seed(0)
    large = torch.randint(4, (1, 40, 50), generator=generator)
    seen = large.masked_fill(torch.rand(large.shape, generator=generator) < 0.6, -1)
    filled = nearest_fill(seen)
    there = (seen[0] >= 0).nonzero()
    for y, x in ((0, 0), (39, 49), (17, 23)):
        distances = (there - torch.tensor([y, x])).square().sum(1)
        assert int(filled[0, y, x]) in {
            int(seen[0, a, b]) for a, b in there[distances == distances.min()].tolist()
        }


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(("size", "most"), [(1, 32), (32, 32), (33, 32), (64, 32), (100, 32), (1000, 256)])
def test_windows_cover_an_axis(size, most):
    spans = _spans(size, most)
    assert [own for span in spans for own in range(*span[2:])] == list(range(size))
    for start, stop, own, end in spans:
        assert 0 <= start <= own < end <= stop <= size
        assert stop - start == min(size, most)


@pytest.mark.parametrize(
    ("vocabulary", "tables"), [([[8], [16], [32]], 3), ([[16], [16] * 2, [16] * 3], 3), ([[9, 5]], 2)]
)
def test_codebooks_that_levels_share_have_one_table(vocabulary, tables):
    concealer = Concealer(vocabulary, 2, **SMALL)
    assert len(concealer.tables) == tables
    generator = torch.Generator().manual_seed(0)
    for level, sizes in enumerate(vocabulary, 1):
        whole = torch.stack([torch.randint(size, (2, 5, 7), generator=generator) for size in sizes], dim=1)
        seen = whole.masked_fill(torch.rand(2, 1, 5, 7, generator=generator) < 0.4, -1)
        logits = concealer(seen, level)
        assert [tuple(part.shape) for part in logits] == [(2, 5, 7, size) for size in sizes]
        filled = concealer.fill(seen, level)
        assert torch.equal(filled[seen >= 0], whole[seen >= 0])
        for plane, size in enumerate(sizes):
            assert 0 <= int(filled[:, plane].min()) <= int(filled[:, plane].max()) < size
        assert torch.equal(concealer.fill(seen[1], level), filled[1])
        assert torch.equal(
            concealer.fill(torch.full((len(sizes), 2, 2), -1), level) >= 0, torch.ones(len(sizes), 2, 2)
        )


def test_estimates_are_means_of_codes():
    torch.manual_seed(0)
    concealer = Concealer([[8], [16]], 2, **SMALL)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(16, (1, 40, 35), generator=generator)
    values = torch.randn(16, 3, generator=generator)
    seen = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.3, -1)
    y, lost = concealer.estimate(seen, 2, values), seen[0] < 0
    assert y.shape == (3, 40, 35)
    assert torch.equal(y[:, ~lost], values[tokens[0][~lost]].T)
    assert bool((y[:, lost] < values.max(0)[0][:, None]).all())
    # Of a network that is sure, the mean is the likeliest code.
    with torch.no_grad():
        concealer.norm.weight.mul_(1e6)
    sure = concealer.estimate(seen[:, :20, :20], 2, values)
    assert torch.allclose(
        sure, values[concealer.fill(seen[:, :20, :20], 2, iterations=1)[0]].permute(2, 0, 1)
    )
    batch = concealer.estimate(torch.stack([seen, tokens]), 2, values)
    assert batch.shape == (2, 3, 40, 35) and torch.equal(batch[1], values[tokens[0]].permute(2, 0, 1))
    with pytest.raises(UsageError, match="use fill"):
        Concealer([[8, 8]], 2, **SMALL).estimate(torch.full((2, 4, 4), -1), 1, values)


def test_any_grid_is_filled_window_by_window():
    concealer = Concealer([[16]], 1, **SMALL)
    seen = torch.randint(16, (1, 1, 700), generator=torch.Generator().manual_seed(0))
    seen[..., 100:140] = seen[..., 500:] = -1
    filled = concealer.fill(seen, 1)
    assert filled.min() >= 0
    assert torch.equal(filled[seen >= 0], seen[seen >= 0])


def test_what_does_not_fit_is_told():
    concealer = Concealer([[8], [16]], 2, **SMALL)
    for call, fact in (
        (lambda: Concealer([], 2), "nothing to conceal"),
        (lambda: Concealer([[8]], 2, width=10, heads=3), "do not divide"),
        (lambda: concealer.fill(torch.zeros(1, 2, 2, dtype=torch.int64), 3), "choose 1 to 2"),
        (lambda: concealer.fill(torch.zeros(2, 2, 2, dtype=torch.int64), 1), r"give \[1, h, w\]"),
    ):
        with pytest.raises(UsageError, match=fact):
            call()


def test_it_learns_what_neighbours_tell():
    """Of patterns that no copy of a neighbour continues, nearly all are restored; more steps do not hurt."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    concealer = Concealer([[8]], 2, width=32, depth=2, heads=2)
    optimizer = torch.optim.AdamW(concealer.parameters(), lr=4e-3)
    for _ in range(150):
        whole = stripes(16, 8, 8, generator)
        seen = draw_erasures(whole)
        lost = (seen < 0)[:, 0]
        loss = F.cross_entropy(concealer(seen, 1)[0][lost], whole[:, 0][lost])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole = stripes(8, 9, 12, generator)
    seen = whole.masked_fill(torch.rand(whole.shape, generator=generator) < 0.3, -1)
    lost = seen < 0

    def correct(filled: torch.Tensor) -> float:
        return float((filled == whole)[lost].float().mean())

    assert correct(concealer.fill(seen, 1)) > 0.95
    assert correct(concealer.fill(seen, 1, iterations=1)) > 0.9
    assert correct(nearest_fill(seen)) < 0.3


# ----------------------------------------------------------------------------------------------------- in files


def test_damage_costs_a_packet_of_a_picture(pictures, scenery, monkeypatch):
    monkeypatch.setattr(image_codec, "TILE", 128)
    data = pictures.encode(scenery[:256, :256], quality=3, packets=4)
    content, intact = container.read(data), pictures.decode(data)
    place = content.offsets[1] + content.lengths[1] // 2
    broken = damaged(data, place)
    with pytest.raises(BitstreamError, match="chunk 1"):
        pictures.decode(broken)
    gray = pictures.decode(broken, partial=True)
    assert (gray.pixels[:128, 128:] == 128).all()
    concealed = pictures.decode(broken, conceal=True)
    assert [str(fault) for fault in concealed.damage] == [
        f"16 of 64 positions are estimated (chunk 1, offset {content.offsets[1]})"
    ]
    margin = pictures.transform.context
    assert np.array_equal(concealed.pixels[128 + margin :], intact.pixels[128 + margin :])
    assert not (concealed.pixels[:128, 128:] == 128).all()
    # Without a network, the nearest tokens stand in.
    expected = []
    for first in range(0, 8, 2):
        tokens = pictures.tokens(data)
        tokens[first : first + 2, 8:] = -1
        tokens[:8, 8:] = nearest_fill(tokens[:8, 8:])
        expected.append(pictures.detokenize(tokens, quality=3).pixels)
    assert sum(np.array_equal(concealed.pixels, pixels) for pixels in expected) == 1
    # What is lost altogether, and what never had packets, is gray.
    whole = damaged(broken, *range(content.offsets[1], content.offsets[1] + content.lengths[1], 2))
    assert (pictures.decode(whole, conceal=True).pixels[:128, 128:] == 128).all()
    single = pictures.encode(scenery[:256, :256], quality=3)
    offset = container.read(single).offsets[1]
    result = pictures.decode(damaged(single, offset + 5), conceal=True)
    assert np.array_equal(result.pixels, pictures.decode(damaged(single, offset + 5), partial=True).pixels)
    cut = pictures.decode(data[: content.offsets[3] + content.lengths[3] // 2], conceal=True)
    assert "are estimated (chunk 3" in str(cut.damage[-1])
    assert np.array_equal(pictures.decode(data, conceal=True).pixels, intact.pixels)


@pytest.mark.parametrize("channels", [1, 2])
def test_damage_costs_a_packet_of_a_sound(sounds, channels, monkeypatch):
    monkeypatch.setattr(audio_codec, "SEGMENT", 4096)
    generator = np.random.default_rng(0)
    samples = np.stack([np.tile(note(generator), 4)[:20_000] for _ in range(channels)]).astype(np.float32)
    data = sounds.encode(Sound(samples, 16000), quality=4, packets=8)
    content, intact = container.read(data), sounds.decode(data)
    for chunk in (1, len(content.chunks) - 1):
        broken = damaged(data, content.offsets[chunk] + content.lengths[chunk] - 3)
        silent = sounds.decode(broken, partial=True)
        concealed = sounds.decode(broken, conceal=True)
        assert len(concealed.damage) == 1
        assert "positions are estimated" in str(concealed.damage[0])
        assert concealed.samples.shape == samples.shape
        first, last = 4096 * chunk, min(4096 * (chunk + 1), 20_000)
        assert not silent.samples[:, first:last].any()
        assert concealed.samples[:, first:last].any()
        margin = sounds.transform.context
        assert np.array_equal(concealed.samples[:, : first - margin], intact.samples[:, : first - margin])
    blocks = sounds.decode_blocks(broken, conceal=True)
    assert np.array_equal(np.concatenate(list(blocks), axis=1), concealed.samples)


def test_a_channel_that_is_lost_takes_its_neighbour(sounds, monkeypatch):
    monkeypatch.setattr(audio_codec, "SEGMENT", 4096)
    generator = np.random.default_rng(0)
    samples = np.stack([np.tile(note(generator), 4)[:9000] for _ in range(2)]).astype(np.float32)
    data = sounds.encode(Sound(samples, 16000), quality=4, packets=1)
    content, intact = container.read(data), sounds.decode(data)
    margin = sounds.transform.context
    inner = slice(4096 + margin, 8192 - margin)
    end = content.offsets[1] + content.lengths[1]
    for place, kept in ((end - 3, 0), (end - content.lengths[1] // 2 - 8, 1)):
        concealed = sounds.decode(damaged(data, place), conceal=True)
        assert "128 of 128 positions are estimated" in str(concealed.damage[0])
        for channel in range(2):
            found, expected = concealed.samples[channel, inner], intact.samples[kept, inner]
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_random_damage_never_surprises(pictures, sounds, scenery):
    generator = np.random.default_rng(3)
    files = (
        (pictures, pictures.encode(scenery[:100, :200], quality=2, packets=5, compact=False)),
        (
            sounds,
            sounds.encode(
                Sound(0.1 * generator.normal(size=(3, 9000)).astype(np.float32), 16000), quality=2, packets=6
            ),
        ),
    )
    decoded = 0
    for codec, data in files:
        for _ in range(60):
            broken = damaged(data, *generator.integers(20, len(data), generator.integers(1, 6)).tolist())
            try:
                codec.decode(broken, conceal=True)
                decoded += 1
            except BitstreamError:
                pass
    assert decoded > 30


def test_the_network_travels_with_the_checkpoint(pictures, scenery, tmp_path):
    codec = build(pictures.info, "cpu", reduced=False)
    codec.add_concealer(**SMALL)
    save(codec, tmp_path / "concealing-v1")
    loaded = compand.load(tmp_path / "concealing-v1", device="cpu")
    assert loaded.concealer is not None
    assert loaded.info.architecture["concealer"] == SMALL
    # Files are the same as without it, and decode with either.
    assert (loaded.info.symbols, loaded.info.synthesis) == (pictures.info.symbols, pictures.info.synthesis)
    assert loaded.info.weights != pictures.info.weights
    data = loaded.encode(scenery[:128, :128], quality=3, packets=4)
    assert np.array_equal(pictures.decode(data).pixels, loaded.decode(data).pixels)
    content = container.read(data)
    broken = damaged(data, content.offsets[0] + content.lengths[0] // 2)
    results = [one.decode(broken, conceal=True) for one in (pictures, loaded)]
    assert len(results[0].damage) == len(results[1].damage) == 1
    assert not np.array_equal(results[0].pixels, results[1].pixels)


def test_on_the_command_line(token_checkpoints, scenery, tmp_path, monkeypatch, capsys):
    def run(*arguments) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        return end.value.code

    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(scenery[:128, :160]).save("a.png")
    Sound(0.1 * np.random.default_rng(0).normal(size=(1, 9000)).astype(np.float32), 16000).save("b.wav")
    for name, medium, suffix in (("a.png", "image", "png"), ("b.wav", "audio", "wav")):
        options = ("-c", token_checkpoints[medium], "--device", "cpu")
        assert run("encode", name, *options, "-q", "2", "--packets", "4") == 0
        data = (tmp_path / f"{name[0]}.cpd").read_bytes()
        content = container.read(data)
        (tmp_path / "c.cpd").write_bytes(damaged(data, content.offsets[0] + content.lengths[0] // 2))
        assert run("decode", "c.cpd", *options) == 1
        assert run("decode", "c.cpd", *options, "--conceal") == 1
        assert "positions are estimated" in capsys.readouterr().err
        assert (tmp_path / f"c.{suffix}").exists()
    for arguments in (("encode", "a.png", "-o", "d.cpd", "--packets", "4"), ("decode", "d.cpd", "--conceal")):
        if arguments[0] == "decode":
            assert run("encode", "a.png", "-o", "d.cpd", "--device", "cpu") == 0
        assert run(*arguments, "--device", "cpu") != 0
        assert "has no tokens" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- training


class AbsoluteDistance(torch.nn.Module):
    """One term that has to be weighed."""

    def forward(self, x_hat: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"absolute": (x_hat - x).abs().mean()}


def test_pictures_of_estimates_teach_too(token_checkpoints):
    """The error of what is decoded has a gradient for the concealer, and falls."""
    path = str(token_checkpoints["image"])
    module = ConcealmentTraining(path, AbsoluteDistance(), {"mse": 1.0, "absolute": 0.0}, **SMALL)
    torch.manual_seed(0)
    batch = torch.rand(2, 3, 32, 32).mul(255).byte()
    terms = module.terms(batch)
    assert set(terms) == {"tokens", "mse", "absolute"}
    terms["mse"].backward()
    assert float(module.concealer.tables[-1].grad.abs().max()) > 0
    with pytest.raises(UsageError, match="differ in absolute"):
        ConcealmentTraining(path, AbsoluteDistance(), {"mse": 1.0}, **SMALL).backward_of(batch)
    with pytest.raises(UsageError, match="codebooks"):
        ConcealmentTraining(str(token_checkpoints["audio"]), AbsoluteDistance(), **SMALL)


@pytest.mark.parametrize(("planes", "height", "width"), [(1, 12, 10), (4, 1, 200)])
def test_erasures_are_of_both_kinds(planes, height, width):
    torch.manual_seed(0)
    tokens = torch.randint(8, (400, planes, height, width))
    seen = draw_erasures(tokens, 0.6)
    lost = seen < 0
    assert torch.equal(seen[~lost], tokens[~lost])
    # Codebooks that remain are the first ones.
    assert bool((lost[:, 1:] >= lost[:, :-1]).all())
    any_lost = lost[:, -1]
    assert 0.27 < float(any_lost.float().mean()) < 0.33
    if height > 1:
        whole_rows = (any_lost.all(2) | ~any_lost.any(2)).all(1)
        assert 0.4 < float(whole_rows.float().mean()) < 0.65


def test_training_export_and_use(token_checkpoints, china, tmp_path, scenery):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(china.read_bytes())
    (folder / "b.jpg").write_bytes(china.read_bytes())
    info = read_info(token_checkpoints["image"])
    weights = {"mse": 10.0, "absolute": 1.0}
    module = ConcealmentTraining(
        str(info.path), AbsoluteDistance(), weights, **SMALL, lr=3e-3, warmup_steps=1
    )
    assert module.concealer.level.requires_grad
    before = {name: value.clone() for name, value in module.codec.state_dict().items()}
    trainer = pl.Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=4,
        val_check_interval=12,
        num_sanity_val_steps=0,
        callbacks=[pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "run", save_top_k=0)],
    )
    trainer.fit(module, ImageFolder(str(folder), batch_size=2, crop=128, held_out=1))
    assert math.isfinite(trainer.callback_metrics["tokens"])
    shown = {"mse", "absolute", "val/filled_right_1", "val/estimated_psnr_3", "val/nearest_absolute"}
    assert shown <= trainer.callback_metrics.keys()
    after = module.codec.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("concealer.") for name in moved)
    run = tmp_path / "run" / "final.ckpt"
    exporting.main(
        [str(run), "-o", str(tmp_path / "new-v2"), "--symbols-of", str(info.path), "--device", "cpu"]
    )
    assert "AbsoluteDistance" in (tmp_path / "new-v2" / "CARD.md").read_text(encoding="utf-8")
    new = compand.load(tmp_path / "new-v2", device="cpu")
    assert (new.info.symbols, new.info.synthesis) == (info.symbols, info.synthesis)
    assert torch.allclose(new.concealer.level, module.concealer.level, atol=1e-3)
    # Trained on: from the run, and from what was exported.
    for source in (run, tmp_path / "new-v2"):
        assert codec_of(str(source)).concealer is not None


def test_sounds_are_trained_alike(token_checkpoints):
    module = ConcealmentTraining(str(token_checkpoints["audio"]), **SMALL)
    batch = torch.randn(2, 1, 1, 4000) * 0.1
    first, second = module.tokens_of(module.windowed(batch), range(3, 5))
    assert (first.shape, second.shape) == ((1, 3, 1, 125), (1, 4, 1, 125))
    alone = module.codec.bottleneck.quantise(
        module.codec.transform.analysis(batch[1:], torch.tensor([4 * 32])), 4 * 32
    )
    assert float((second == alone).float().mean()) > 0.98  # all but ties that rounding decides
    assert module.windowed(batch.repeat(1, 1, 1, 4)).shape == (2, 1, 1, 256 * 32)
    module.terms(batch)["tokens"].backward()
    assert module.concealer.erased.grad is not None
    assert all(
        p.grad is None for name, p in module.codec.named_parameters() if not name.startswith("concealer.")
    )
