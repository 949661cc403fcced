"""A picture in tiles against the same picture in one piece."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compand import image_codec, registry
from compand.coding import container
from compand.image_codec import Tile, tile_rows

IMAGE_CODECS = [entry.name for entry in registry.entries() if entry.medium == "image"]
EDGE = 64
SIZES = [(200, 170), (64, 65), (129, 64), (333, 70), (192, 192)]
ALIKE = {"rtol": 1e-4, "atol": 1e-4}
"""How close latents of tiles are to those of whole pictures: sums of floats in another order."""


@pytest.fixture(scope="module", params=IMAGE_CODECS)
def codec(request, exact):
    return exact(request.param)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(image_codec, "TILE", EDGE)


@given(height=st.integers(1, 500), width=st.integers(1, 500), edge=st.sampled_from([0, 64, 128, 192]))
@settings(deadline=None)
def test_tiles_cover_a_picture_once(height, width, edge):
    seen = np.zeros((height, width), int)
    rows = tile_rows(height, width, edge)
    tiles = [tile for row in rows for tile in row]
    for tile in tiles:
        assert edge == 0 or max(tile.bottom - tile.top, tile.right - tile.left) <= edge
        seen[tile.top : tile.bottom, tile.left : tile.right] += 1
    assert (seen == 1).all() and [tile.index for tile in tiles] == list(range(len(tiles)))
    for row in rows:
        assert len({(tile.top, tile.bottom) for tile in row}) == 1
    geometry = container.ImageGeometry(height, width, 3, 8)
    header = container.Header(1, "", b"abcd", b"efgh", (32,), geometry, edge)
    assert header.chunk_count() == len(tiles)


@given(height=st.integers(1, 300), width=st.integers(1, 300), stride=st.sampled_from([8, 16, 32]))
def test_latents_of_tiles_add_up(height, width, stride):
    rows = tile_rows(height, width, 64)
    assert sum(row[0].latent_shape(stride)[0] for row in rows) == -(-height // stride)
    assert sum(tile.latent_shape(stride)[1] for tile in rows[0]) == -(-width // stride)
    assert Tile(0, 10, 10 + height, 5, 5 + width).latent_shape(stride) == (
        -(-height // stride),
        -(-width // stride),
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_latents_of_a_tile_are_those_of_the_whole_picture(codec, scenery, size):
    pixels = scenery[: size[0], 50 : 50 + size[1]]
    whole = tile_rows(*size, 0)[0][0]
    stride = codec.transform.stride
    with torch.inference_mode():
        expected = codec.analyse(pixels, whole, 100)
        for row in tile_rows(*size, EDGE):
            for tile in row:
                top, left = tile.top // stride, tile.left // stride
                rows, columns = tile.latent_shape(stride)
                part = expected[:, :, top : top + rows, left : left + columns]
                torch.testing.assert_close(codec.analyse(pixels, tile, 100), part, **ALIKE)


def test_without_its_surroundings_a_tile_would_differ(codec, scenery, monkeypatch):
    """That the tests here can fail: the networks do look beyond a tile."""
    pixels = scenery[:192, :192]
    tile = tile_rows(192, 192, EDGE)[1][1]
    with torch.inference_mode():
        aware = codec.analyse(pixels, tile, 100)
        monkeypatch.setattr(codec.transform, "context", 0)
        assert not torch.allclose(codec.analyse(pixels, tile, 100), aware, **ALIKE)


@pytest.mark.parametrize(("size", "channels"), [*((size, 3) for size in SIZES), (SIZES[1], 1)], ids=str)
def test_no_seams(codec, scenery, size, channels, small_tiles):
    """The same latents, synthesised in tiles and whole: at most one level apart, and that seldom."""
    data = codec.encode(scenery[: size[0], 50 : 50 + size[1], :channels], quality=7)
    assert container.read_header(data).chunk_size == EDGE
    with torch.inference_mode():
        x = codec.transform.synthesis(codec.latents(data)[None], torch.tensor([224]))[
            0, :, : size[0], : size[1]
        ]
    if channels == 1:
        x = x.mean(0, keepdim=True)
    whole = (x * 255).round().clamp(0, 255).permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(codec.decode(data).pixels - whole)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_tiles_cost_little(codec, scenery, monkeypatch):
    plain = codec.encode(scenery[:256, :256], quality=5)
    monkeypatch.setattr(image_codec, "TILE", 128)
    tiled = codec.encode(scenery[:256, :256], quality=5)
    assert len(container.read(tiled).chunks) == 4 and len(tiled) < 1.1 * len(plain) + 64


def test_memory_is_bounded_by_rows_of_tiles(codec, scenery, small_tiles, monkeypatch):
    """Decoding reads at most one row ahead, holds three, and synthesises windows of bounded size."""
    held: list[int] = []

    class Watched(deque):
        def append(self, item):
            super().append(item)
            held.append(len(self))

    monkeypatch.setattr(image_codec, "deque", Watched)
    decoded_rows: list[int] = []
    ahead: list[int] = []
    windows: list[tuple[int, int]] = []
    latents, synthesise = codec._latents, codec._synthesise

    def watched_latents(content, tile):
        decoded_rows.append(tile.top // EDGE)
        return latents(content, tile)

    def watched_synthesis(window, tile, *rest):
        ahead.append(decoded_rows[-1] - tile.top // EDGE)
        windows.append(tuple(window[0].shape[1:]))
        return synthesise(window, tile, *rest)

    monkeypatch.setattr(codec, "_latents", watched_latents)
    monkeypatch.setattr(codec, "_synthesise", watched_synthesis)
    codec.decode(codec.encode(scenery[:420, :200]))
    assert len(decoded_rows) == len(windows) == 7 * 4
    assert max(ahead) == 1 and max(held) <= 4
    limit = (EDGE + 2 * codec.transform.context) // codec.transform.stride
    assert max(max(window) for window in windows) <= limit


def test_encoding_sees_bounded_windows(codec, scenery, small_tiles, monkeypatch):
    sizes: list[int] = []
    analysis = codec.transform.analysis

    def watched(x, quality):
        sizes.append(max(x.shape[2:]))
        return analysis(x, quality)

    monkeypatch.setattr(codec.transform, "analysis", watched)
    codec.encode(scenery[:300, :200])
    assert len(sizes) == 5 * 4 and max(sizes) <= EDGE + 2 * codec.transform.context
