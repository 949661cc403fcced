"""What every image codec promises, checked on each one that is registered."""

from __future__ import annotations

import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import compand
from compand import image_codec, registry
from compand.bottlenecks.companding import CompandingBottleneck
from compand.coding import ans, container
from compand.errors import BitstreamError, CheckpointError, CompandError, UsageError
from compand.image_codec import tile_rows
from compand.pictures import Picture

IMAGE_CODECS = [entry.name for entry in registry.entries() if entry.medium == "image"]
LEVELS = (32, 51, 96, 133, 200, 256)
"""Qualities in 1/32 level: both ends, whole levels, and some in between."""

slow = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=IMAGE_CODECS)
def codec(request, checkpoint_of):
    return compand.load(checkpoint_of(request.param), device="cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 pixels, so that small pictures have many."""
    monkeypatch.setattr(image_codec, "TILE", 64)


def analysed(codec, pixels: np.ndarray, level: int) -> torch.Tensor:
    """y of a whole picture."""
    with torch.inference_mode():
        return codec.analyse(pixels, tile_rows(*pixels.shape[:2], 0)[0][0], level)


def synthesised(codec, data: bytes, level: int) -> np.ndarray:
    """The samples that the latents of a small picture's file stand for, [H, W, channels], neither rounded nor clipped
    to 0 to 255."""
    geometry = container.read_header(data).geometry
    with torch.inference_mode():
        x = codec.transform.synthesis(codec.latents(data)[None], torch.tensor([level]))[0]
    return 255 * x.permute(1, 2, 0).double().numpy()[: geometry.height, : geometry.width]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def whole_levels(codec, pixels: np.ndarray) -> list[tuple[bytes, float]]:
    """The files of all whole levels, and their PSNR."""
    files = [codec.encode(pixels, quality=quality) for quality in range(1, codec.levels + 1)]
    return [(data, psnr(codec.decode(data).pixels, pixels)) for data in files]


def noise(height: int, width: int) -> np.ndarray:
    """Blocks and single pixels of extreme contrast."""
    generator = np.random.default_rng(5)
    blocks = generator.integers(0, 2, (-(-height // 16), -(-width // 16), 3)).repeat(16, 0).repeat(16, 1)
    single = generator.integers(0, 2, (height, width, 3))
    return ((blocks[:height, :width] ^ (single & (generator.random((height, width, 1)) < 0.3))) * 255).astype(
        np.uint8
    )


def replaced(data: bytes, index: int, chunk: bytes) -> bytes:
    """The file with another chunk and checksums to match."""
    content = container.read(data)
    chunks = [chunk if i == index else old for i, old in enumerate(content.chunks)]
    return container.write(content.header, chunks, content.extras, compact=content.header.compact)


# ------------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_what_is_registered_is_what_the_class_says(entry):
    loaded = entry.load_class()
    assert (loaded.codec_id, loaded.medium) == (entry.codec_id, entry.medium)


def test_ids_never_change():
    assert {"hyperprior": 1, "factorized": 2}.items() <= {
        e.name: e.codec_id for e in registry.entries()
    }.items()
    ids = [entry.codec_id for entry in registry.entries() if entry.codec_id]
    assert len(set(ids)) == len(ids)


def test_facts(codec):
    assert codec.name == codec.info.codec and codec.codec_id == codec.info.codec_id
    assert codec.info.qualities == (1, codec.levels) and codec.device.type == "cpu" and not codec.training
    assert (
        codec.transform.context % codec.transform.stride == 0 and codec.transform.context <= image_codec.TILE
    )
    assert codec.bottleneck.latent_channels == codec.transform.latent_channels


def test_a_codec_of_another_package_travels_by_name(monkeypatch, exact, scenery, tmp_path):
    from compand.weights import save

    monkeypatch.setattr(registry, "_ENTRIES", list(registry.entries()))
    registry.register("guest", "image", f"{__name__}:Guest", "of another package")
    with pytest.raises(UsageError, match="guest exists already"):
        registry.register("guest", "image", "elsewhere:Guest", "again")
    host = exact("factorized")
    guest = Guest(**host.architecture, trainable=False)
    guest.load_state_dict(host.state_dict())
    guest.bottleneck.load_frozen(host.bottleneck.frozen_arrays())
    save(guest, tmp_path / "guest-v1")
    loaded = compand.load(tmp_path / "guest-v1", device="cpu")
    data = loaded.encode(scenery[:40, :40])
    header = container.read_header(data)
    assert (header.codec_id, header.codec_name) == (0, "guest")
    assert loaded.decode(data).pixels.shape == (40, 40, 3)
    with pytest.raises(CheckpointError, match="fingerprint"):
        host.decode(data)


class Guest(registry.by_name("factorized").load_class()):
    codec_id = 0


# ----------------------------------------------------------------------------------------- symbols, bits, bytes


@pytest.mark.parametrize("level", LEVELS)
def test_decompress_gives_exactly_what_forward_promised(codec, scenery, level):
    y = torch.cat([analysed(codec, scenery[i : i + 75, 90 * i : 90 * i + 133], level) for i in range(3)])
    with torch.inference_mode():
        promised = codec.bottleneck(y, torch.full((3,), level)).y_hat
        payloads = codec.bottleneck.compress(y, level)
        batch = codec.bottleneck.decompress(payloads, tuple(y.shape[2:]), level)
        single = [codec.bottleneck.decompress([payload], tuple(y.shape[2:]), level) for payload in payloads]
    assert len(set(payloads)) == 3
    assert (
        batch.dtype == torch.float32
        and torch.equal(batch, promised)
        and torch.equal(batch, torch.cat(single))
    )
    # Quantised, not ignored: finer steps come closer.
    assert 0 < float((batch - y).abs().mean()) < 2 * float(y.abs().mean())


def test_finer_quality_comes_closer(codec, scenery):
    errors = []
    for level in range(32, 257, 32):
        y = analysed(codec, scenery[:128, :128], level)
        with torch.inference_mode():
            errors.append(float((codec.bottleneck(y, torch.tensor([level])).y_hat - y).square().mean()))
    # Each codebook is learned by itself: of a briefly trained one with few codes more, another may be as good. A bit
    # more for each vector of a codebook is far less than one for each number.
    slack, gain = (1.02, 1.3) if codec.vocabulary else (1, 4)
    for coarser, finer in itertools.pairwise(errors):
        assert finer < slack * coarser
    assert errors[0] > gain * errors[-1]


@pytest.mark.parametrize("level", LEVELS)
def test_the_estimate_is_what_the_file_weighs(codec, scenery, level):
    for pixels in (scenery[:200, :333], scenery[200:208, :8], noise(96, 96)):
        data = codec.encode(pixels, quality=level / 32)
        estimate = codec.estimate(pixels, level / 32) / 8
        payload = sum(len(chunk) for chunk in container.read(data).chunks)
        assert abs(payload - estimate) <= 0.01 * estimate + 16
        assert abs(len(data) - estimate) <= 0.01 * estimate + 16 + 32


def test_the_estimate_is_what_the_file_weighs_on_kodak(codec, kodak):
    for path, quality in ((kodak[0], 1), (kodak[-1], 5.25)):
        data = codec.encode(path, quality=quality)
        estimate = codec.estimate(path, quality) / 8
        assert abs(len(data) - estimate) <= 0.01 * estimate + 16 + 32


def test_tiles_are_counted_in_the_estimate(codec, scenery, small_tiles):
    data = codec.encode(scenery[:130, :100], quality=4)
    payload = sum(len(chunk) for chunk in container.read(data).chunks)
    estimate = codec.estimate(scenery[:130, :100], 4) / 8
    assert abs(payload - estimate) <= 0.01 * estimate + 16 * 6


def test_extreme_contrast_passes_through_escapes(codec, monkeypatch):
    escapes = []
    codes = ans.escape_codes
    monkeypatch.setattr(
        ans, "escape_codes", lambda values, *rest: (escapes.extend(values), codes(values, *rest))[1]
    )
    pixels = noise(120, 136)
    y = analysed(codec, pixels, 256) * 50
    with torch.inference_mode():
        y_hat = codec.bottleneck(y, torch.tensor([256])).y_hat
        decoded = codec.bottleneck.decompress(codec.bottleneck.compress(y, 256), tuple(y.shape[2:]), 256)
    assert bool(escapes) != bool(codec.vocabulary) and torch.equal(y_hat, decoded)
    # Coded, not clipped: the error stays that of rounding however large the value (companders and codebooks are bounded
    # by design).
    bounded = isinstance(codec.bottleneck, CompandingBottleneck) or codec.vocabulary
    assert bounded or float((decoded - y).abs().mean()) < 0.02 * float(y.abs().mean())
    data = codec.encode(pixels, quality=8)
    promised = codec.bottleneck(analysed(codec, pixels, 256), torch.tensor([256])).y_hat[0]
    assert torch.equal(codec.latents(data), promised) and codec.decode(data).pixels.shape == pixels.shape


def test_latents_that_are_no_numbers_still_make_a_stream(codec):
    y = torch.zeros(1, codec.transform.latent_channels, 4, 4)
    y[0, :4, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38])
    with torch.inference_mode():
        decoded = codec.bottleneck.decompress(codec.bottleneck.compress(y, 100), (4, 4), 100)
    assert decoded.isfinite().all()


def test_only_frozen_codecs_code_and_only_trainable_ones_train(codec, scenery, trained):
    fresh = registry.by_name(codec.name).load_class()(**codec.architecture, trainable=False)
    with pytest.raises(CheckpointError, match="compand"):
        fresh.encode(scenery[:16, :16])
    with pytest.raises(CheckpointError, match="tables"):
        fresh.bottleneck.compress(torch.zeros(1, codec.transform.latent_channels, 1, 1), 32)
    with pytest.raises(CheckpointError, match="trainable"):
        fresh.bottleneck(torch.zeros(1, codec.transform.latent_channels, 1, 1), torch.tensor([32]))


# ------------------------------------------------------------------------------------------------- any picture


@slow
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    channels=st.sampled_from([1, 3]),
    level=st.integers(32, 256),
)
def test_pictures_of_any_size(codec, scenery, height, width, channels, level):
    pixels = scenery[100 : 100 + height, 200 : 200 + width, :channels]
    data = codec.encode(pixels, quality=level / 32)
    header = container.read_header(data)
    assert (header.geometry.height, header.geometry.width) == (height, width) and header.settings == (level,)
    codec.check(data)
    decoded = codec.decode(data)
    assert decoded.pixels.shape == pixels.shape and decoded.pixels.dtype == np.uint8
    stride = codec.transform.stride
    assert codec.latents(data).shape == (
        codec.transform.latent_channels,
        -(-height // stride),
        -(-width // stride),
    )
    with torch.inference_mode():
        promised = codec.bottleneck(analysed(codec, pixels, level), torch.tensor([level])).y_hat[0]
    assert torch.equal(codec.latents(data), promised)
    x = synthesised(codec, data, level)
    shown = x.mean(2, keepdims=True) if channels == 1 else x
    assert np.abs(decoded.pixels - shown.clip(0, 255)).max() <= 1
    # Of a handful of codes none need be near a few pixels; to convolutions that see zeros around a picture, a small one
    # is all border.
    if not codec.vocabulary and codec.name != "compressai":
        assert np.abs(decoded.pixels.astype(int) - pixels).mean() < 50


def test_the_picture_comes_back(codec, scenery):
    pixels = scenery[:203, :310]
    decoded = codec.decode(codec.encode(pixels, quality=8)).pixels
    shuffled = np.random.default_rng(0).permutation(pixels.reshape(-1, 3)).reshape(pixels.shape)
    assert psnr(decoded, pixels) > psnr(shuffled, pixels) + 6


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (17, 15), (64, 64), (65, 127)])
def test_the_smallest_and_narrowest_pictures_in_tiles(codec, size, small_tiles):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    assert codec.decode(codec.encode(pixels)).pixels.shape == pixels.shape


def test_gray_is_coded_as_its_three_equal_channels_and_comes_back_gray(codec, scenery):
    gray = scenery[:50, :61, :1]
    data, triple = codec.encode(gray), codec.encode(gray.repeat(3, 2))
    assert container.read(data).chunks == container.read(triple).chunks
    decoded = codec.decode(data)
    assert decoded.pixels.shape == gray.shape and decoded.to_pil().mode == "L"
    # The mean of channels that are not clipped yet: that of clipped ones is another.
    three = synthesised(codec, triple, 128)
    assert np.abs(codec.decode(triple).pixels - three.clip(0, 255)).max() <= 1
    assert np.abs(decoded.pixels[..., 0] - three.mean(2).clip(0, 255)).max() <= 1


def test_alpha_is_lossless(codec, scenery):
    alpha = np.random.default_rng(2).integers(0, 256, (40, 50), np.uint8)
    for plane in (alpha, np.full_like(alpha, 255), np.zeros_like(alpha)):
        picture = Image.fromarray(np.dstack([scenery[:40, :50], plane]))
        decoded = codec.decode(codec.encode(picture))
        assert decoded.alpha is not None and np.array_equal(decoded.alpha, plane)
        assert decoded.to_pil().mode == "RGBA"
    assert codec.decode(codec.encode(scenery[:40, :50])).alpha is None
    opaque = codec.encode(np.dstack([scenery[:40, :50], np.full_like(alpha, 255)]), compact=False)
    assert len(opaque) < len(codec.encode(scenery[:40, :50], compact=False)) + 16


def test_profiles_and_depth_travel_in_the_file(codec, scenery, tmp_path):
    profile = bytes(range(256)) * 3
    decoded = codec.decode(codec.encode(Picture(scenery[:30, :30], None, profile)))
    assert decoded.icc == profile and decoded.bit_depth == 8
    deep = Image.fromarray((scenery[:30, :31, 0].astype(np.uint16) << 8) + 77)
    deep.save(tmp_path / "deep.png")
    data = codec.encode(tmp_path / "deep.png", quality=8)
    decoded = codec.decode(data)
    assert (
        decoded.bit_depth == 16 and decoded.pixels.shape == (30, 31, 1) and decoded.pixels.dtype == np.uint8
    )
    assert np.array_equal(decoded.pixels, codec.decode(codec.encode(scenery[:30, :31, 0], quality=8)).pixels)


def test_every_kind_of_source_gives_the_same_file(codec, scenery, tmp_path):
    pixels = scenery[:45, :70]
    Image.fromarray(pixels).save(tmp_path / "same.png")
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    stream.seek(0)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    sources = [
        pixels, Image.fromarray(pixels), Picture(pixels, None, None), tensor, tensor.float() / 255,
        tmp_path / "same.png", str(tmp_path / "same.png"), np.asfortranarray(pixels),
    ]  # fmt: skip
    files = {codec.encode(source, quality=3) for source in sources}
    assert len(files) == 1


# ------------------------------------------------------------------------------------------- quality, bpp, psnr


def test_every_quality_is_stored_and_decodes(codec, scenery):
    pixels = scenery[60:84, 60:95]
    for level in range(32, codec.levels * 32 + 1, 7):
        data = codec.encode(pixels, quality=level / 32)
        assert container.read_header(data).settings == (level,)
        assert codec.decode(data).pixels.shape == pixels.shape
    assert container.read_header(codec.encode(pixels, quality=3.51)).settings == (112,)


def test_quality_buys_bytes_and_fidelity(codec, scenery):
    pixels = scenery[:160, :240]
    files = [codec.encode(pixels, quality=quality) for quality in (1, 2.5, 4, 6, 8)]
    assert [len(data) for data in files] == sorted(len(data) for data in files)
    assert psnr(codec.decode(files[-1]).pixels, pixels) > psnr(codec.decode(files[0]).pixels, pixels)


@pytest.mark.parametrize("quality", [0.99, 8.01, 0, -3, float("nan"), float("inf")])
def test_qualities_that_do_not_exist(codec, scenery, quality):
    with pytest.raises(UsageError, match="choose 1 to 8"):
        codec.encode(scenery[:16, :16], quality=quality)


def test_bpp_is_the_best_quality_that_fits(codec, scenery):
    pixels = scenery[:160, :200]
    if codec.vocabulary:
        files = whole_levels(codec, pixels)
        for size in {len(data) for data, _ in files}:
            best = max((each for each in files if len(each[0]) <= size), key=lambda each: each[1])
            assert codec.encode(pixels, bpp=8 * size / (160 * 200)) == best[0]
        return
    smallest, largest = (8 * len(codec.encode(pixels, quality=q)) / (160 * 200) for q in (1, 8))
    wanted = 0.4 * smallest + 0.6 * largest
    data = codec.encode(pixels, bpp=wanted)
    (level,) = container.read_header(data).settings
    assert 32 <= level < 256 and 8 * len(data) / (160 * 200) <= wanted
    assert 8 * len(codec.encode(pixels, quality=(level + 1) / 32)) / (160 * 200) > wanted
    assert container.read_header(codec.encode(pixels, bpp=50)).settings == (256,)
    assert container.read_header(codec.encode(pixels, bpp=smallest)).settings[0] >= 32


def test_psnr_is_the_smallest_quality_that_reaches_it(codec, scenery):
    pixels = scenery[:128, :128]
    if codec.vocabulary:
        files = whole_levels(codec, pixels)
        for wanted in (reached - 0.01 for _, reached in files):
            least = min((each for each in files if each[1] >= wanted), key=lambda each: len(each[0]))
            data = codec.encode(pixels, psnr=wanted)
            assert len(data) == len(least[0]) and psnr(codec.decode(data).pixels, pixels) >= wanted
        return
    low, high = (psnr(codec.decode(codec.encode(pixels, quality=q)).pixels, pixels) for q in (1, 8))
    wanted = (low + high) / 2
    data = codec.encode(pixels, psnr=wanted)
    (level,) = container.read_header(data).settings
    assert 32 < level <= 256 and psnr(codec.decode(data).pixels, pixels) >= wanted
    assert psnr(codec.decode(codec.encode(pixels, quality=(level - 1) / 32)).pixels, pixels) < wanted
    assert container.read_header(codec.encode(pixels, psnr=1)).settings == (32,)


@pytest.mark.parametrize(
    "target", [{"bpp": 1e-4}, {"bpp": 0}, {"bpp": -1}, {"psnr": 99}, {"psnr": float("inf")}]
)
def test_targets_out_of_reach(codec, scenery, target):
    with pytest.raises(CompandError, match=r"cannot be reached.*(allow more|ask for less)"):
        codec.encode(scenery[:64, :64], **target)


def test_targets_that_make_no_sense(codec, scenery):
    with pytest.raises(UsageError, match="exclude each other"):
        codec.encode(scenery[:16, :16], bpp=1, psnr=30)
    for target in ("bpp", "psnr"):
        with pytest.raises(CompandError):
            codec.encode(scenery[:16, :16], **{target: float("nan")})


# ----------------------------------------------------------------------------------------------------- the file


def test_headers_are_short(codec, scenery):
    tiny = scenery[:20, :20]
    short, long = codec.encode(tiny), codec.encode(tiny, compact=False)
    assert container.read_header(short).compact and not container.read_header(long).compact
    assert container.read(short).chunks == container.read(long).chunks
    payload = len(container.read(short).chunks[0])
    assert len(short) - payload <= 12 and len(long) - payload <= 32
    assert np.array_equal(codec.decode(short).pixels, codec.decode(long).pixels)
    photo = codec.encode(scenery, quality=8)
    payload = len(container.read(photo).chunks[0])
    assert container.read_header(photo).compact == (payload < container.COMPACT_PAYLOAD)
    assert len(photo) - payload <= 32


def test_files_are_the_same_each_time(codec, scenery):
    assert codec.encode(scenery[:99, :99], quality=5.5) == codec.encode(scenery[:99, :99], quality=5.5)


def test_latents_are_what_the_encoder_meant(codec, scenery):
    pixels = scenery[:70, :100]
    level = 150
    with torch.inference_mode():
        promised = codec.bottleneck(analysed(codec, pixels, level), torch.tensor([level])).y_hat[0]
    latents = codec.latents(codec.encode(pixels, quality=level / 32))
    assert latents.dtype == torch.float32 and torch.equal(latents, promised)


def test_latents_of_tiles_lie_side_by_side(codec, scenery, small_tiles):
    data = codec.encode(scenery[:130, :100], quality=5)
    content = container.read(data)
    latents = codec.latents(data)
    stride = codec.transform.stride
    rows, columns, edge = -(-130 // stride), -(-100 // stride), 64 // stride
    assert len(content.chunks) == 6 and latents.shape[1:] == (rows, columns)
    with torch.inference_mode():
        third = codec.bottleneck.decompress([content.chunks[3]], (edge, columns - edge), 160)[0]
    assert torch.equal(latents[:, edge : 2 * edge, edge:], third)


def test_progress_counts_tiles(codec, scenery, small_tiles):
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    data = codec.encode(scenery[:130, :100], progress=note)
    codec.decode(data, progress=note)
    codec.check(data, progress=note)
    assert seen == [(i, 6) for i in range(1, 7)] * 3


def test_check_finds_chunks_that_do_not_decode(codec, scenery, small_tiles):
    data = codec.encode(scenery[:130, :100], quality=5)
    codec.check(data)
    broken = replaced(data, 4, container.read(data).chunks[4][:-5])
    for action in (codec.check, codec.decode, codec.latents):
        with pytest.raises(BitstreamError) as error:
            action(broken)
        assert error.value.chunk == 4
    alpha = codec.encode(np.dstack([scenery[:20, :20], scenery[:20, :20, 0]]))
    content = container.read(alpha)
    extras = [replace(extra, payload=extra.payload[:20]) for extra in content.extras]
    with pytest.raises(BitstreamError):
        codec.check(container.write(content.header, content.chunks, extras))


@pytest.mark.parametrize("damage", ["checksum", "symbols"])
def test_a_damaged_tile_costs_that_tile_alone(codec, scenery, small_tiles, damage):
    pixels = scenery[:320, :320]
    data = codec.encode(pixels, quality=6)
    content = container.read(data)
    if damage == "symbols":
        broken = replaced(data, 12, content.chunks[12][:-4])
    else:
        place = content.offsets[12] + content.lengths[12] // 2
        broken = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
    with pytest.raises(BitstreamError) as error:
        codec.decode(broken)
    assert error.value.chunk == 12
    whole, rest = codec.decode(data), codec.decode(broken, partial=True)
    assert not whole.damage and [fault.chunk for fault in rest.damage] == [12]
    same = (whole.pixels == rest.pixels).all(2)
    assert (rest.pixels[128:192, 128:192] == 128).all()
    # Around it, synthesis misses the latents that were lost, as far as its context reaches.
    context = codec.transform.context
    near = np.zeros((320, 320), bool)
    near[max(128 - context, 0) : 192 + context, max(128 - context, 0) : 192 + context] = True
    assert same[~near].all() and context < 128
    others = near.copy()
    others[128:192, 128:192] = False
    difference = np.abs(whole.pixels.astype(int) - rest.pixels)[others]
    assert difference.mean() < 30


def test_damaged_alpha_costs_alpha_alone(codec, scenery):
    data = codec.encode(np.dstack([scenery[:20, :20], scenery[:20, :20, 0]]))
    content = container.read(data)
    extras = [replace(extra, payload=extra.payload[:20]) for extra in content.extras]
    broken = container.write(content.header, content.chunks, extras)
    decoded = codec.decode(broken, partial=True)
    assert decoded.alpha is None and len(decoded.damage) == 1
    assert np.array_equal(decoded.pixels, codec.decode(data).pixels)


def test_another_checkpoint_is_refused_by_name(codec, scenery):
    data = codec.encode(scenery[:40, :40], compact=False)
    content = container.read(data)
    for change in ({"symbols": b"\1\2\3\4"}, {"codec_id": 99}):
        header = replace(content.header, **change)
        for action in (codec.decode, codec.check, codec.latents):
            with pytest.raises(CheckpointError, match=f"{header.symbols.hex()}.*{codec.info.name}"):
                action(container.write(header, content.chunks, compact=False))
    compact = codec.encode(scenery[:40, :40], compact=True)
    header = replace(container.read_header(compact), symbols=b"zz")
    with pytest.raises(CheckpointError, match="fingerprint 7a7a"):
        codec.decode(container.write(header, container.read(compact).chunks, compact=True))


def test_the_other_codecs_refuse_the_file(codec, scenery, checkpoint_of):
    data = codec.encode(scenery[:40, :40])
    for name in set(IMAGE_CODECS) - {codec.name}:
        with pytest.raises(CheckpointError, match="with the checkpoint that it names"):
            compand.load(checkpoint_of(name), device="cpu").decode(data)


def test_a_newer_synthesis_may_decode_an_older_file(codec, scenery):
    data = codec.encode(scenery[:40, :40], compact=False)
    content = container.read(data)
    other = container.write(replace(content.header, synthesis=b"news"), content.chunks, compact=False)
    assert np.array_equal(codec.decode(other).pixels, codec.decode(data).pixels)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": (31,)},
        {"settings": (257,)},
        {"settings": (128, 128)},
        {"settings": ()},
        {"geometry": container.AudioGeometry(40 * 40, 8000, 1)},
        {"geometry": container.ImageGeometry(4000, 4000, 3, 8)},
        {"geometry": container.ImageGeometry(4000, 4000, 3, 8), "chunk_size": 4032},
    ],
    ids=str,
)
def test_headers_that_no_encoder_writes(codec, scenery, change):
    content = container.read(codec.encode(scenery[:40, :40], compact=False))
    forged = container.write(replace(content.header, **change), content.chunks, compact=False)
    for action in (codec.decode, codec.check, codec.latents):
        with pytest.raises(BitstreamError, match="damaged"):
            action(forged)


@slow
@given(mutation=st.data())
def test_forged_payloads_end_in_an_error_or_a_picture(codec, scenery, mutation):
    data = codec.encode(scenery[:70, :50], quality=3)
    payload = bytearray(container.read(data).chunks[0])
    for _ in range(mutation.draw(st.integers(1, 4))):
        payload[mutation.draw(st.integers(0, len(payload) - 1))] = mutation.draw(st.integers(0, 255))
    cut = mutation.draw(st.integers(0, len(payload)))
    forged = replaced(data, 0, bytes(payload[:cut] if mutation.draw(st.booleans()) else payload))
    # The only chunk is all there is to decode, so a partial result is no more than a whole one.
    for partial in (False, True):
        try:
            assert codec.decode(forged, partial=partial).pixels.shape == (70, 50, 3)
        except BitstreamError as error:
            assert error.chunk == 0
            assert error.offset is not None


def test_a_small_file_cannot_claim_a_large_picture(codec, scenery):
    header = container.read_header(codec.encode(scenery[:64, :64], quality=3, compact=False))
    forged = replace(header, geometry=container.ImageGeometry(20480, 20480, 3), chunk_size=2048)
    for payload in (b"", b"\x07"):
        data = container.write(forged, [payload] * forged.chunk_count())
        for partial in (False, True):
            with pytest.raises(BitstreamError) as caught:
                codec.decode(data, partial=partial)
            assert caught.value.chunk == 0 and caught.value.offset is not None


# ------------------------------------------------------------------------------------------------- portability


def test_symbols_do_not_depend_on_threads_layout_or_library(codec, scenery):
    level = 147
    y = torch.cat([analysed(codec, scenery[i : i + 144, 100 * i : 100 * i + 208], level) for i in range(3)])
    shape = (y.shape[2], y.shape[3])
    with torch.inference_mode():
        payloads = codec.bottleneck.compress(y, level)
        expected = codec.bottleneck.decompress(payloads, shape, level)
    threads = torch.get_num_threads()

    def decoded() -> torch.Tensor:
        with torch.inference_mode():
            single = torch.cat([codec.bottleneck.decompress([payload], shape, level) for payload in payloads])
            batch = codec.bottleneck.decompress(payloads, shape, level)
        assert torch.equal(single, batch)
        return batch

    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for layout in (torch.contiguous_format, torch.channels_last):
                codec.bottleneck.to(memory_format=layout)
                assert torch.equal(decoded(), expected)
                with torch.backends.mkldnn.flags(enabled=False):
                    assert torch.equal(decoded(), expected)
    finally:
        torch.set_num_threads(threads)
        codec.bottleneck.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_torchs_default_dtype_decides_nothing(codec, checkpoint_of, scenery, dtype):
    """Processes that serve language models often set it to half precision."""
    data = codec.encode(scenery[:70, :90], quality=5)
    expected = codec.latents(data)
    torch.set_default_dtype(dtype)
    try:
        loaded = compand.load(checkpoint_of(codec.name), device="cpu")
        for each in (codec, loaded):
            assert torch.equal(each.latents(data), expected)
        other = loaded.encode(scenery[:70, :90], quality=5)
        pixels = loaded.decode(other).pixels
    finally:
        torch.set_default_dtype(torch.float32)
    codec.check(other)
    assert np.abs(codec.decode(other).pixels.astype(int) - pixels).mean() < 1


def test_files_of_one_precision_decode_in_another(codec, checkpoint_of, scenery):
    from compand.checkpoint import read_info
    from compand.weights import build

    info = read_info(checkpoint_of(codec.name))
    plain, reduced = build(info, "cpu", reduced=False), build(info, "cpu", reduced=True)
    for writer, reader in ((plain, reduced), (reduced, plain)):
        data = writer.encode(scenery[:100, :90], quality=6)
        assert torch.equal(writer.latents(data), reader.latents(data))
        difference = writer.decode(data).pixels.astype(int) - reader.decode(data).pixels
        assert np.abs(difference).mean() < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_files_of_one_device_decode_on_another(codec, checkpoint_of, scenery):
    cuda = compand.load(checkpoint_of(codec.name), device="cuda")
    for writer, reader in ((codec, cuda), (cuda, codec)):
        for level in LEVELS:
            data = writer.encode(scenery, quality=level / 32)
            reader.check(data)
            latents = [side.latents(data).cpu() for side in (writer, reader)]
            # The same integers, dequantised in float32 on two devices.
            assert torch.allclose(*latents, rtol=1e-5, atol=1e-6 * float(latents[0].abs().max()))


def test_threads_may_share_a_codec(codec, checkpoint_of, scenery):
    pixels = [scenery[20 * i : 20 * i + 64 + i, :90] for i in range(8)]
    expected = [codec.encode(part, quality=1 + i % 7) for i, part in enumerate(pixels)]
    decoded = [codec.decode(data).pixels for data in expected]
    # A fresh one, whose caches the threads fill together.
    shared = compand.load(checkpoint_of(codec.name), device="cpu")

    def work(i: int) -> tuple[bytes, np.ndarray]:
        data = shared.encode(pixels[i], quality=1 + i % 7)
        return data, shared.decode(data).pixels

    with ThreadPoolExecutor(4) as pool:
        for i, (data, result) in enumerate(pool.map(work, range(8))):
            assert data == expected[i] and np.array_equal(result, decoded[i])


def test_python_arguments_are_checked(checkpoint_of, scenery, tmp_path):
    folder = str(checkpoint_of("hyperprior"))
    loaded = compand.load(folder, device="cpu")
    with pytest.raises(UsageError, match="exclude each other"):
        loaded.encode(scenery[:32, :32], quality=4, bpp=0.5)
    with pytest.raises(UsageError, match="not exist"):
        loaded.encode(scenery[:32, :32], quality="high")
    with pytest.raises(UsageError, match="as its bytes"):
        loaded.decode("photo.cpd")
    with pytest.raises(compand.MediaError, match=r"nothing\.cpd"):
        compand.decode(tmp_path / "nothing.cpd")
    assert compand.__version__.count(".") == 2


def test_decode_takes_a_path(scenery, tmp_path):
    path = tmp_path / "released.cpd"
    path.write_bytes(compand.encode(scenery[:32, :48], quality=3, device="cpu"))
    assert compand.decode(path, device="cpu").pixels.shape == (32, 48, 3)
