"""What all image codecs share: pictures of any size and kind <-> .cpd files, tile by tile."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compand.codec import QUALITY_STEPS, Bottleneck, Codec, Progress, Transform, first_level
from compand.coding import container
from compand.coding.container import Container, Extra, ExtraKind, Header, ImageGeometry
from compand.errors import BitstreamError, CompandError, UsageError
from compand.pictures import Picture, as_picture, decode_alpha, encode_alpha
from compand.pictures import psnr as psnr_of
from compand.refinement import Relaxation, Schedule, anneal, schedule_of

TILE = 1024
"""Edge of the tiles into which larger pictures are cut, in pixels."""

SLACK_BITS = 64
"""How many bits a stream may be shorter than the sum of its symbols' contents, by the coder's rounding."""

MAX_TILE = 2048
"""Largest tile that a decoder accepts; bounds its memory, whatever a file claims."""


@dataclass(frozen=True)
class Tile:
    """A rectangle of the picture: its place in the grid and its pixels [top, bottom) x [left, right)."""

    index: int
    top: int
    bottom: int
    left: int
    right: int

    def latent_shape(self, stride: int) -> tuple[int, int]:
        """Rows and columns of its latents."""
        return -(-(self.bottom - self.top) // stride), -(-(self.right - self.left) // stride)


def tile_rows(height: int, width: int, edge: int) -> list[list[Tile]]:
    """The tiles of a picture, row by row. `edge` 0 means one tile."""
    step_y, step_x = edge or height, edge or width
    columns = -(-width // step_x)
    return [
        [
            Tile(row * columns + column, top, min(top + step_y, height), left, min(left + step_x, width))
            for column, left in enumerate(range(0, width, step_x))
        ]
        for row, top in enumerate(range(0, height, step_y))
    ]


@dataclass
class _Candidate:
    """What is known of a tile that is being refined."""

    relaxation: Relaxation
    payload: bytes  # the best so far
    y_hat: Tensor  # what a decoder makes of it, [1, M, h, w]


class ImageCodec(Codec):
    """A codec for pictures.

    Pictures beyond TILE pixels on an edge are coded in tiles. Analysis and synthesis of a tile see `transform.context`
    pixels (or the latents of that width) of its neighbours, so that tiles fit together as if the picture had been
    transformed whole, while each tile's symbols stand on their own: of a damaged tile, the others show no more than a
    margin of `context` pixels.
    """

    medium = "image"

    def __init__(
        self, transform: Transform, bottleneck: Bottleneck, lambdas: Sequence[float], *, channels: int = 3
    ) -> None:
        """channels: of the samples that the transform takes; 3 serves gray pictures too."""
        super().__init__(transform, bottleneck, lambdas)
        self.channels = channels

    def encode(
        self,
        source: Any,
        *,
        quality: float | None = None,
        bpp: float | None = None,
        psnr: float | None = None,
        compact: bool | None = None,
        packets: int = 0,
        effort: int = 0,
        progress: Progress | None = None,
    ) -> bytes:
        """Encodes a picture.

        Args:
            source: whatever `compand.pictures.as_picture` takes: a path, Pillow image, uint8 array [H, W, C], float
                tensor [C, H, W] in [0, 1], or `Picture`. A codec of other than 3 channels takes pictures of just as
                many.
            quality: 1 (smallest file) to `levels`, fractions in steps of 1/32; 4 unless bpp or psnr is given.
            bpp: instead of `quality`, the best quality whose file has at most this many bits a pixel; of a codec with
                tokens, the whole level of the highest PSNR among those that fit.
            psnr: instead of `quality`, the lowest quality whose decoded picture has at least this PSNR in dB; of a
                codec with tokens, the whole level of the fewest bytes.
            compact: force or forbid the shortest header; None: for tiny files without packets.
            packets: of a codec with tokens: parts of rows into which each tile is cut, up to 255. Each has a checksum,
                so that damage costs the packets that it meets (`decode` with `conceal`) and not the tile. 0: none.
            effort: 1 to 3 search for better symbols, in as many steps of gradient descent a tile as
                `refinement.SCHEDULES` says, for the least rate plus lambda times squared error at this quality. A tile
                that gets no better stays as it is. With bpp or psnr, whose limits are kept, this is done twice: where
                the search ends without it, and where it then shows to end. Decoding takes no longer.
            progress: called after each tile; with effort, after each step.

        Returns:
            The bytes of a .cpd file.

        Raises:
            UsageError: quality out of range, more than one of quality, bpp and psnr, packets of a codec without
                tokens, or an effort that does not exist or not for this codec.
            CompandError: no quality reaches the wanted bpp or psnr for this picture.
            MediaError: the source cannot be read.
        """
        picture = self._picture(source)
        self._check_packets(packets)
        self._check_effort(effort)
        if packets and compact is None:
            compact = False  # its only checksum is of the whole file
        if sum(target is not None for target in (quality, bpp, psnr)) > 1:
            raise UsageError("quality, bpp and psnr exclude each other: give one")
        if any(target is not None and math.isnan(target) for target in (bpp, psnr)):
            raise UsageError("bpp or psnr is not a number: give one")
        if bpp is None and psnr is None:
            level = self.quality_units(min(4.0, self.levels) if quality is None else quality)
            return self._encode(picture, level, compact, packets, progress, effort)
        low, high = QUALITY_STEPS, self.levels * QUALITY_STEPS
        files: dict[int, bytes] = {}

        def psnr_in(data: bytes) -> float:
            return psnr_of(picture.pixels, self.decode(data).pixels)

        def bpp_of(data: bytes) -> float:
            return 8 * len(data) / (picture.height * picture.width)

        def reached_by(data: bytes, factor: float = 1) -> bool:
            """Whether a file has left the wanted range upwards (bpp) or reached it (psnr), if refinement multiplies
            its bpp or PSNR by a factor."""
            if bpp is not None:
                return factor * bpp_of(data) > bpp
            return factor * psnr_in(data) >= float(psnr or 0)

        def unreachable(tried: Sequence[bytes]) -> CompandError:
            if bpp is not None:
                reached = f"{min(map(bpp_of, tried)):.3f} bpp is the least"
                return CompandError(f"{bpp:g} bpp cannot be reached for this picture: {reached}; allow more")
            reached = f"{max(map(psnr_in, tried)):.2f} dB is the most"
            return CompandError(f"{psnr:g} dB cannot be reached for this picture: {reached}; ask for less")

        if self.vocabulary:
            best, tried = self._best_whole_level(
                lambda level: self._encode(picture, level, compact, packets, progress),
                lambda data: reached_by(data) == (bpp is None),
                lambda data: (psnr_in(data) if bpp is not None else 0.0, -len(data)),
            )
            if best is None:
                raise unreachable(tried)
            return best

        def found(factor: float = 1) -> int:
            """The level that the search ends at, outside low .. high where there is none."""

            def reaches(level: int) -> bool:
                if level not in files:
                    files[level] = self._encode(picture, level, compact, packets, progress)
                return reached_by(files[level], factor)

            first = first_level(low, high, reaches)
            return first - 1 if bpp is not None else first

        wanted = found()
        if not low <= wanted <= high:
            raise unreachable([files[low if bpp is not None else high]])
        plain = files[wanted]
        if not effort:
            return plain
        refined = [self._encode(picture, wanted, compact, packets, progress, effort)]
        # What refinement changed tells at which level the limit is used up; there it is done again.
        changed = len(refined[0]) / len(plain) if bpp is not None else psnr_in(refined[0]) / psnr_in(plain)
        level = found(changed)
        if level != wanted and low <= level <= high:
            refined.append(self._encode(picture, level, compact, packets, progress, effort))
        kept = [plain, *(data for data in refined if reached_by(data) == (bpp is None))]
        return min(kept, key=len) if bpp is None else max(kept, key=psnr_in)

    def decode(
        self, data: bytes, *, partial: bool = False, conceal: bool = False, progress: Progress | None = None
    ) -> Picture:
        """Decodes a file written by this codec.

        Args:
            data: the bytes of a .cpd file.
            partial: decode what is intact; damaged tiles come out gray and are listed in `Picture.damage`. Pixels
                within `transform.context` of them differ from those of the intact file.
            conceal: as `partial`, but of a damaged tile tokens are estimated where packets are lost, as long as one is
                intact.
            progress: called after each tile.

        Raises:
            BitstreamError: damage (without `partial` or `conceal`), a damaged header, or no tile that can be decoded.
            CheckpointError: the file needs another checkpoint.
            UsageError: `conceal`, of a codec without tokens.
        """
        if conceal:
            self._require_tokens()
        partial = partial or conceal
        content, geometry, grid = self._read(data, partial)
        damaged = data if conceal else None
        quality = content.header.settings[0]
        total = content.header.chunk_count()
        pixels: NDArray[np.uint8] | None = None
        lost = []
        for done, (tile, window) in enumerate(self._windows(content, grid, partial, damaged), start=1):
            area = np.s_[tile.top : tile.bottom, tile.left : tile.right]
            if window is None:
                lost.append(area)
            else:
                if pixels is None:
                    # Not before a tile has shown that the header's size is meant.
                    pixels = np.zeros((geometry.height, geometry.width, geometry.channels), dtype=np.uint8)
                pixels[area] = self._synthesise(window, tile, quality, geometry)
            if progress is not None:
                progress(done, total)
        if pixels is None:
            first = content.damage[0]
            fact = "no part of the picture is intact: get an intact copy"
            raise BitstreamError(fact, chunk=first.chunk, offset=first.offset)
        for area in lost:
            pixels[area] = 128
        alpha, icc = self._read_extras(content, geometry, partial)
        return Picture(pixels, alpha, icc, geometry.bit_depth, damage=tuple(content.damage))

    def check(self, data: bytes, progress: Progress | None = None) -> None:
        content, geometry, grid = self._read(data, partial=False)
        total = content.header.chunk_count()
        for row in grid:
            for tile in row:
                self._latents(content, tile)
                if progress is not None:
                    progress(tile.index + 1, total)
        self._read_extras(content, geometry, partial=False)

    def latents(self, data: bytes) -> Tensor:
        """The dequantised latents of a file, without synthesis: float32 [M, ceil(H / stride), ceil(W / stride)]."""
        content, _, grid = self._read(data, partial=False)
        return torch.cat(
            [torch.cat([self._latents(content, tile) for tile in row], dim=2) for row in grid], dim=1
        )

    def tokens(self, data: bytes) -> Tensor:
        """The tokens of a file, without synthesis: int64 [ceil(H / stride), ceil(W / stride)] of one codebook,
        [codebooks, ...] of several, on the CPU. Tokens of a codebook count from 0 to below `vocabulary[level - 1]`.

        Raises:
            BitstreamError, CheckpointError: as `decode`.
            UsageError: this codec has no tokens.
        """
        self._require_tokens()
        content, _, grid = self._read(data, partial=False)
        rows = [torch.cat([self._tile_tokens(content, tile) for tile in row], dim=2) for row in grid]
        indices = torch.cat(rows, dim=1)
        return indices[0] if len(indices) == 1 else indices

    def token_geometry(self, data: bytes) -> dict[str, Any]:
        """Size, channels and quality of a file: `detokenize(tokens(data), **token_geometry(data))` has the pixels of
        `decode(data)`."""
        content, geometry, _ = self._read(data, partial=False)
        return {
            "size": (geometry.height, geometry.width),
            "channels": geometry.channels,
            "quality": content.header.settings[0] / QUALITY_STEPS,
        }

    def detokenize(
        self,
        tokens: Any,
        *,
        size: tuple[int, int] | None = None,
        quality: float | None = None,
        channels: int | None = None,
    ) -> Picture:
        """Tokens to a picture.

        Args:
            tokens: integers [h, w] or [codebooks, h, w], an array, tensor or nested list.
            size: height and width in pixels, h x w positions of `stride` at most; None: all of them.
            quality: that of the tokens; None where the number of codebooks tells it.
            channels: of the picture; 1 gives a gray one of a codec of 3. None: those of the codec.

        Raises:
            UsageError: tokens of another shape, beyond the vocabulary, or of a quality that has to be told; a size that
                they are not of.
        """
        indices, chosen = self._checked_tokens(tokens, quality)
        stride = self.transform.stride
        height, width = size or (indices.shape[1] * stride, indices.shape[2] * stride)
        return self.reconstruct(
            self.dequantise(indices.int(), quality=chosen),
            height=height,
            width=width,
            channels=self.channels if channels is None else channels,
            quality=chosen,
        )

    @torch.inference_mode()
    def quantise(self, source: Any, *, quality: float) -> NDArray[np.int32]:
        """The integers of a whole picture, as a packed set keeps them.

        Args:
            source: as `encode` takes it; an alpha plane and a color profile are left out.
            quality: 1 to `levels`.

        Returns:
            [M, ceil(H / stride), ceil(W / stride)]; of a codec with tokens [codebooks, ...].

        Raises:
            UsageError, MediaError: as `encode`.
        """
        picture, level = self._picture(source), self.quality_units(quality)
        rows = [
            torch.cat(
                [
                    self.bottleneck.quantise(self.analyse(picture.pixels, tile, level), level)[0]
                    for tile in row
                ],
                dim=2,
            )
            for row in self._grid(picture.height, picture.width)
        ]
        return torch.cat(rows, dim=1).cpu().numpy()

    @torch.inference_mode()
    def quantise_batch(self, pixels: Tensor, *, quality: float) -> Tensor:
        """As `quantise`, for pictures of equal size in one pass.

        Args:
            pixels: uint8 [batch, channels, H, W], channels those of the codec, or 1 for one of 3.
            quality: 1 to `levels`.

        Returns:
            int32 [batch, M, ceil(H / stride), ceil(W / stride)] on the codec's device; of a codec with tokens
            [batch, codebooks, ...].

        Raises:
            UsageError: another type or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, self.channels):
            given = f"{pixels.dtype} {list(pixels.shape)}"
            raise UsageError(f"pixels are {given}: give uint8 [batch, {self.channels}, H, W]")
        level = self.quality_units(quality)
        grid = self._grid(pixels.shape[2], pixels.shape[3])
        x = pixels.to(self.device)
        rows = [
            torch.cat(
                [self.bottleneck.quantise(self._analyse_batch(x, tile, level), level) for tile in row], dim=3
            )
            for row in grid
        ]
        return torch.cat(rows, dim=2)

    @torch.inference_mode()
    def reconstruct(
        self, latents: Tensor, *, height: int, width: int, channels: int, quality: float
    ) -> Picture:
        """Synthesis of dequantised latents.

        Args:
            latents: float32 [M, ceil(height / stride), ceil(width / stride)], as `dequantise` gives them.
            height, width, channels: of the picture; `channels` 1 gives a gray one of a codec of 3.
            quality: the one that the latents were made with.

        Raises:
            UsageError: the latents have another shape.
        """
        stride, margin = self.transform.stride, self.transform.context // self.transform.stride
        expected = (self.transform.latent_channels, -(-height // stride), -(-width // stride))
        if tuple(latents.shape) != expected or channels not in (
            (1, 3) if self.channels == 3 else (self.channels,)
        ):
            fact = f"latents {list(latents.shape)} are no picture of {height} x {width} x {channels}"
            raise UsageError(f"{fact}: give {list(expected)}")
        level, y_hat = self.quality_units(quality), latents.to(self.device)
        geometry = ImageGeometry(height, width, channels)
        pixels = np.empty((height, width, channels), dtype=np.uint8)
        for tile in (tile for row in self._grid(height, width) for tile in row):
            rows, columns = tile.latent_shape(stride)
            y, x = tile.top // stride, tile.left // stride
            top, left = max(y - margin, 0), max(x - margin, 0)
            window = y_hat[:, top : y + rows + margin, left : x + columns + margin]
            area = np.s_[tile.top : tile.bottom, tile.left : tile.right]
            pixels[area] = self._synthesise((window, y - top, x - left), tile, level, geometry)
        return Picture(pixels, None, None)

    @torch.inference_mode()
    def estimate(self, source: Any, quality: float = 4.0) -> float:
        """Information content of a picture's symbols in bits: what `encode` needs, without header and extras."""
        picture = self._picture(source)
        level = self.quality_units(quality)
        grid = self._grid(picture.height, picture.width)
        levels = torch.tensor([level], device=self.device)
        return sum(
            float(self.bottleneck(self.analyse(picture.pixels, tile, level), levels).bits)
            for row in grid
            for tile in row
        )

    def _grid(self, height: int, width: int) -> list[list[Tile]]:
        """The tiles that a picture is coded in."""
        return tile_rows(height, width, _chunk_size(height, width))

    def _picture(self, source: Any) -> Picture:
        picture = as_picture(source, channels=self.channels)
        found = picture.pixels.shape[2]
        if found != self.channels and (found, self.channels) != (1, 3):
            raise UsageError(
                f"the picture has {found} channels, this codec codes {self.channels}: choose another codec"
            )
        return picture

    # ------------------------------------------------------------------------------------------------- encoding

    @torch.inference_mode()
    def _encode(
        self,
        picture: Picture,
        level: int,
        compact: bool | None,
        packets: int,
        progress: Progress | None,
        effort: int = 0,
    ) -> bytes:
        info = self._frozen_info()
        size = _chunk_size(picture.height, picture.width)
        chunks: list[bytes] = []
        grid = self._grid(picture.height, picture.width)
        if effort:
            with torch.inference_mode(False):
                chunks = self._refined(picture.pixels, grid, level, schedule_of(effort), progress)
        else:
            for tile in (tile for row in grid for tile in row):
                chunks += self._payloads(self.analyse(picture.pixels, tile, level), level, packets)
                if progress is not None:
                    progress(len(chunks), len(grid) * len(grid[0]))
        extras = []
        if picture.alpha is not None:
            opaque = bool((picture.alpha == 255).all())
            kind = ExtraKind.OPAQUE_ALPHA if opaque else ExtraKind.ALPHA
            extras.append(Extra(kind, b"" if opaque else encode_alpha(picture.alpha)))
        if picture.icc is not None:
            extras.append(Extra(ExtraKind.ICC, picture.icc))
        geometry = ImageGeometry(picture.height, picture.width, picture.pixels.shape[2], picture.bit_depth)
        header = Header(
            codec_id=info.codec_id,
            codec_name="" if info.codec_id else info.codec,
            symbols=info.symbols,
            synthesis=info.synthesis,
            settings=(level,),
            geometry=geometry,
            chunk_size=size,
        )
        return container.write(header, chunks, extras, compact=compact)

    def _refined(
        self,
        pixels: NDArray[np.uint8],
        grid: Sequence[Sequence[Tile]],
        level: int,
        schedule: Schedule,
        progress: Progress | None,
    ) -> list[bytes]:
        """Payloads of all tiles, searched for one after another. As each is judged by all pixels that see its latents,
        the cost of the whole picture falls with every tile that changes."""
        candidates: dict[int, _Candidate] = {}
        payloads: list[bytes] = []
        done, total = 0, schedule.steps * len(grid) * len(grid[0])

        def report() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        for index, row in enumerate(grid):
            lines = grid[max(index - 1, 0) : index + 2]
            around = {tile.index for line in lines for tile in line}
            candidates = {place: state for place, state in candidates.items() if place in around}
            for tile in (tile for line in lines for tile in line if tile.index not in candidates):
                with torch.no_grad():
                    y = self.analyse(pixels, tile, level)
                    relaxation = self.bottleneck.relaxed(y, level)
                    candidates[tile.index] = _Candidate(relaxation, *relaxation.code())
            for column, tile in enumerate(row):
                near = [other for line in lines for other in line[max(column - 1, 0) : column + 2]]
                known = [(other, candidates[other.index].y_hat[0]) for other in near]
                self._refine_tile(pixels, tile, candidates[tile.index], known, level, schedule, report)
                payloads.append(candidates[tile.index].payload)
        return payloads

    def _refine_tile(
        self,
        pixels: NDArray[np.uint8],
        tile: Tile,
        candidate: _Candidate,
        near: Sequence[tuple[Tile, Tensor]],
        level: int,
        schedule: Schedule,
        report: Callable[[], None],
    ) -> None:
        """Puts a payload of lower cost in the place of a candidate's, if one is found; near: y_hat [M, h, w] of the
        tiles around and of the tile itself."""
        stride, context = self.transform.stride, self.transform.context
        window, y, x = self._window(tile, candidate.y_hat[0], near, 2 * context // stride)
        rows, columns = tile.latent_shape(stride)
        above, before = self._around(tile)
        seen = torch.from_numpy(pixels[above, before].copy()).to(self.device)
        target = seen.permute(2, 0, 1).float() / 255
        top = y * stride + above.start - tile.top
        left = x * stride + before.start - tile.left
        place = (slice(top, top + target.shape[1]), slice(left, left + target.shape[2]))
        weight = self.multiplier_at(level) * 255**2 / len(target)

        def samples(y_hat: Tensor) -> Tensor:
            latents = window.clone()
            latents[:, y : y + rows, x : x + columns] = y_hat[0]
            return self._samples(latents, place, level, len(target)).clamp(0, 1)

        def distortion(y_hat: Tensor) -> Tensor:
            return weight * (samples(y_hat) - target).square().sum()

        @torch.no_grad()
        def cost(payload: bytes, y_hat: Tensor) -> float:
            error = torch.round(samples(y_hat) * 255) / 255 - target
            return 8 * len(payload) + weight * float(error.double().square().sum())

        with torch.enable_grad():
            anneal(candidate.relaxation, distortion, schedule, report)
        with torch.no_grad():
            found = candidate.relaxation.code()
        if cost(*found) < cost(candidate.payload, candidate.y_hat):
            candidate.payload, candidate.y_hat = found

    def analyse(self, pixels: NDArray[np.uint8], tile: Tile, level: int) -> Tensor:
        """y of one tile, [1, M, h, w], computed with its surroundings.

        Args:
            pixels: the whole picture, uint8 [H, W, 1 | 3].
            level: quality in 1/32 level.
        """
        rows, columns = self._around(tile)
        window = pixels[rows, columns]
        missing = [(0, -edge % self.transform.stride) for edge in window.shape[:2]]
        window = np.pad(window, (*missing, (0, 0)), mode="edge") if any(map(sum, missing)) else window.copy()
        return self._analyse(torch.from_numpy(window).to(self.device).permute(2, 0, 1)[None], tile, level)

    def _analyse_batch(self, pixels: Tensor, tile: Tile, level: int) -> Tensor:
        """As `analyse`, of pictures uint8 [batch, 1 | channels, H, W] on the codec's device."""
        rows, columns = self._around(tile)
        window = pixels[:, :, rows, columns]
        bottom, right = (-edge % self.transform.stride for edge in window.shape[2:])
        if bottom:
            window = torch.cat([window, window[:, :, -1:].expand(-1, -1, bottom, -1)], dim=2)
        if right:
            window = torch.cat([window, window[..., -1:].expand(-1, -1, -1, right)], dim=3)
        return self._analyse(window, tile, level)

    def _around(self, tile: Tile) -> tuple[slice, slice]:
        """Rows and columns of pixels that the analysis of a tile looks at."""
        context = self.transform.context
        return (
            slice(max(tile.top - context, 0), tile.bottom + context),
            slice(max(tile.left - context, 0), tile.right + context),
        )

    def _analyse(self, x: Tensor, tile: Tile, level: int) -> Tensor:
        """y of one tile from what is around it, uint8 [batch, 1 | channels, h, w], both edges multiples of the
        stride."""
        stride = self.transform.stride
        x = x.expand(-1, self.channels, -1, -1)
        if not self.transform.takes_bytes:
            x = x.float().div_(255).contiguous(memory_format=torch.channels_last)
        y = self.transform.analysis(x, torch.full((len(x),), level, device=self.device))
        rows, columns = tile.latent_shape(stride)
        above, before = self._around(tile)
        y0, x0 = (tile.top - above.start) // stride, (tile.left - before.start) // stride
        return y[:, :, y0 : y0 + rows, x0 : x0 + columns]

    # ------------------------------------------------------------------------------------------------- decoding

    def _read(self, data: bytes, partial: bool) -> tuple[Container, ImageGeometry, list[list[Tile]]]:
        content = container.read(data, partial=partial)
        header, info = content.header, self._info_for(content.header)
        geometry = header.geometry
        if (
            not isinstance(geometry, ImageGeometry)
            or len(header.settings) != 1
            or (geometry.channels != self.channels and (geometry.channels, self.channels) != (1, 3))
        ):
            raise _implausible(f"it does not describe a picture of {info.codec}")
        edge = header.chunk_size or max(geometry.height, geometry.width)
        if edge > MAX_TILE:
            raise _implausible(f"it asks for tiles of {edge} pixels, beyond {MAX_TILE}")
        if not QUALITY_STEPS <= header.settings[0] <= self.levels * QUALITY_STEPS:
            raise _implausible(f"it asks for quality {header.settings[0] / QUALITY_STEPS:g}")
        return content, geometry, tile_rows(geometry.height, geometry.width, header.chunk_size)

    @torch.inference_mode()
    def _latents(self, content: Container, tile: Tile) -> Tensor:
        """y_hat of one tile, [M, h, w]. Raises BitstreamError that names the chunk."""
        return self._decoded(
            content, tile, lambda *chunk: self.bottleneck.decompress([chunk[0]], *chunk[1:])[0]
        )

    @torch.inference_mode()
    def _tile_tokens(self, content: Container, tile: Tile) -> Tensor:
        """Tokens of one tile, int64 [codebooks, h, w] on the CPU. Raises BitstreamError that names the chunk."""
        return self._decoded(content, tile, self.bottleneck.decompress_indices).cpu()

    def _decoded(
        self, content: Container, tile: Tile, decode: Callable[[bytes, tuple[int, int], int], Tensor]
    ) -> Tensor:
        """What `decode` makes of payload, latent shape and level of a tile. Raises BitstreamError that names the
        chunk."""
        payload = content.chunks[tile.index]
        if not payload:
            raise BitstreamError("the chunk is damaged", chunk=tile.index, offset=content.offsets[tile.index])
        shape = tile.latent_shape(self.transform.stride)
        if 8 * len(payload) + SLACK_BITS < self.bottleneck.least_bits(shape):
            size = f"{tile.right - tile.left} x {tile.bottom - tile.top} pixels"
            fact = f"{len(payload)} bytes cannot hold {size}: the file is damaged"
            raise BitstreamError(fact, chunk=tile.index, offset=content.offsets[tile.index])
        try:
            return decode(payload, shape, content.header.settings[0])
        except BitstreamError as error:
            raise BitstreamError(str(error), chunk=tile.index, offset=content.offsets[tile.index]) from None

    def _tile_concealed(self, content: Container, tile: Tile, data: bytes) -> Tensor:
        """Latents of a damaged tile of a file, [M, h, w], estimated where packets are lost; says so in the damage.
        Raises BitstreamError where nothing is intact."""
        start = content.offsets[tile.index]
        payload = bytes(data[start : start + content.lengths[tile.index]])
        shape = tile.latent_shape(self.transform.stride)
        latents, lost = self._concealed(payload, shape, content.header.settings[0])
        fact = f"{lost} of {shape[0] * shape[1]} positions are estimated"
        content.damage[:] = [fault for fault in content.damage if fault.chunk != tile.index]
        content.damage.append(BitstreamError(fact, chunk=tile.index, offset=start))
        return latents

    def _windows(
        self, content: Container, grid: Sequence[Sequence[Tile]], partial: bool, data: bytes | None
    ) -> Iterator[tuple[Tile, tuple[Tensor, int, int] | None]]:
        """Every tile with the latents that its synthesis looks at, [M, h, w], and the tile's offset in them.

        At most three rows of tiles are held. A damaged tile comes without latents; to its neighbours they are zero.

        Args:
            data: the file, for tokens of damaged tiles to be estimated; None: they are lost.
        """

        def decoded(row: Sequence[Tile]) -> list[tuple[Tile, Tensor | None]]:
            result: list[tuple[Tile, Tensor | None]] = []
            for tile in row:
                try:
                    result.append((tile, self._latents(content, tile)))
                except BitstreamError as error:
                    if not partial:
                        raise
                    if content.chunks[tile.index] is not None:
                        content.damage.append(error)
                    latents = None
                    if data is not None:
                        with suppress(BitstreamError):
                            latents = self._tile_concealed(content, tile, data)
                    result.append((tile, latents))
            return result

        rows: deque[list[tuple[Tile, Tensor | None]]] = deque(maxlen=3)
        rows.append(decoded(grid[0]))
        for index, row in enumerate(grid):
            last = index + 1 == len(grid)
            if not last:
                rows.append(decoded(grid[index + 1]))
            elif len(rows) == 3:
                rows.popleft()
            for column, (tile, latents) in enumerate(rows[-1 if last else -2]):
                if latents is None:
                    yield tile, None
                    continue
                around = range(max(column - 1, 0), min(column + 2, len(row)))
                near = [line[other] for line in rows for other in around]
                margin = self.transform.context // self.transform.stride
                yield tile, self._window(tile, latents, near, margin)

    def _window(
        self, tile: Tile, latents: Tensor, near: Sequence[tuple[Tile, Tensor | None]], margin: int
    ) -> tuple[Tensor, int, int]:
        """A tile's latents with a margin of so many positions from the tiles near it, as far as there are any."""
        stride = self.transform.stride
        rows, columns = latents.shape[1:]
        y, x = tile.top // stride, tile.left // stride
        bounds = [
            (other.top // stride, other.left // stride, *other.latent_shape(stride)) for other, _ in near
        ]
        top = max(y - margin, min(first for first, _, _, _ in bounds))
        left = max(x - margin, min(first for _, first, _, _ in bounds))
        bottom = min(y + rows + margin, max(first + size for first, _, size, _ in bounds))
        right = min(x + columns + margin, max(first + size for _, first, _, size in bounds))
        window = latents.new_zeros(latents.shape[0], bottom - top, right - left)
        for (first_row, first_column, height, width), (_, part) in zip(bounds, near, strict=True):
            y0, y1 = max(top, first_row), min(bottom, first_row + height)
            x0, x1 = max(left, first_column), min(right, first_column + width)
            if part is not None and y0 < y1 and x0 < x1:
                piece = part[:, y0 - first_row : y1 - first_row, x0 - first_column : x1 - first_column]
                window[:, y0 - top : y1 - top, x0 - left : x1 - left] = piece
        return window, y - top, x - left

    @torch.inference_mode()
    def _synthesise(
        self, window: tuple[Tensor, int, int], tile: Tile, level: int, geometry: ImageGeometry
    ) -> NDArray[np.uint8]:
        latents, row, column = window
        stride = self.transform.stride
        height, width = tile.bottom - tile.top, tile.right - tile.left
        place = (
            slice(row * stride, row * stride + height),
            slice(column * stride, column * stride + width),
        )
        x = self._samples(latents, place, level, geometry.channels)
        return (x * 255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()

    def _samples(self, latents: Tensor, place: tuple[slice, slice], level: int, channels: int) -> Tensor:
        """Samples [channels, h, w] at a place in what latents [M, ...] stand for; not clamped to [0, 1]."""
        y_hat = latents[None].contiguous(memory_format=torch.channels_last)
        # Filled in on the device: what is copied to it could not be captured (`refinement`).
        x = self.transform.synthesis(y_hat, torch.full((1,), level, device=self.device))[0].float()
        x = x[:, place[0], place[1]]
        return x.mean(0, keepdim=True) if channels == 1 != self.channels else x

    def _read_extras(
        self, content: Container, geometry: ImageGeometry, partial: bool
    ) -> tuple[NDArray[np.uint8] | None, bytes | None]:
        alpha, icc = None, None
        for extra, offset in zip(content.extras, content.extra_offsets, strict=True):
            if extra.kind == ExtraKind.ICC:
                icc = extra.payload
            elif extra.kind == ExtraKind.OPAQUE_ALPHA:
                alpha = np.full((geometry.height, geometry.width), 255, dtype=np.uint8)
            elif extra.kind == ExtraKind.ALPHA:
                try:
                    alpha = decode_alpha(extra.payload, geometry.height, geometry.width)
                except BitstreamError as error:
                    damage = BitstreamError(str(error), offset=offset)
                    if not partial:
                        raise damage from None
                    content.damage.append(damage)
        return alpha, icc


def _chunk_size(height: int, width: int) -> int:
    return TILE if max(height, width) > TILE else 0


def _implausible(fact: str) -> BitstreamError:
    return BitstreamError(f"the header is damaged, {fact}: get an intact copy", offset=0)
