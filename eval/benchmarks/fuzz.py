"""What damaged files do to the decoder.

Small pictures, some in several tiles, with alpha and a color profile, are encoded; the files are then damaged in many
ways and decoded, once as they are (`decode`) and once with `partial=True`. Each decoding must end in

- the picture as it was;
- with `partial`: a picture whose tiles are as they were, except damaged ones, which are gray, and tiles that lie
  within reach of a damaged one, which are as if that one had been left out;
- or a BitstreamError or CheckpointError of one line.

Some damage has its checksums repaired, so that the entropy decoder and the transforms meet it: there any picture of the
declared size is a permitted end. So it is where only a compact header's 16-bit checksum stood guard and let
damage pass, which the report counts. Anything else (another exception, another picture, a decoding that takes longer
than a minute) is a failure; a crash would leave no report at all.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from compand import image_codec
from compand.coding import container
from compand.coding.container import Container, ImageGeometry
from compand.demo import photograph
from compand.errors import BitstreamError, CheckpointError
from compand.eval.benchmarks import program
from compand.eval.benchmarks.memory import MAXRSS_UNIT
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.image_codec import ImageCodec, tile_rows
from compand.pictures import Picture

TILE = 64
CASES = 24_000
PATIENCE = 60
"""Seconds after which a decoding counts as hung, and the program ends with a traceback."""

HEADER_CRC_BYTES = 4
UNDETECTED = "another picture, past a 16-bit checksum"


@dataclass
class Original:
    """An intact file and what it decodes to."""

    data: bytes
    codec: ImageCodec
    content: Container = field(init=False)
    picture: Picture = field(init=False)
    _without: dict[frozenset[int], Picture] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.content = container.read(self.data)
        self.picture = self.codec.decode(self.data)

    @property
    def payload_start(self) -> int:
        """Where the first chunk begins; what follows the chunks of a compact file is its checksum."""
        return len(self.data) - sum(len(chunk or b"") for chunk in self.content.chunks)

    def without(self, chunks: frozenset[int]) -> Picture:
        """The picture that is left when some chunks are damaged, after proving that this concerns no other tile."""
        if self.content.header.compact and chunks:
            # Its only chunk cannot be damaged apart from its header.
            return replace(self.picture, pixels=np.full_like(self.picture.pixels, 128))
        if chunks not in self._without:
            damaged, start = bytearray(self.data), self.payload_start
            for index, chunk in enumerate(self.content.chunks):
                if index in chunks:
                    damaged[start] ^= 1
                start += len(chunk or b"")
            picture = self.codec.decode(bytes(damaged), partial=True)
            self._prove(picture, chunks)
            self._without[chunks] = picture
        return self._without[chunks]

    def _prove(self, picture: Picture, chunks: frozenset[int]) -> None:
        header, reach = self.content.header, self.codec.transform.context
        pixels = self.picture.pixels
        height, width = pixels.shape[:2]
        tiles = [t for row in tile_rows(height, width, header.chunk_size) for t in row]
        for tile in tiles:
            near = [
                other.index in chunks
                for other in tiles
                if other.top < tile.bottom + reach
                and tile.top - reach < other.bottom
                and other.left < tile.right + reach
                and tile.left - reach < other.right
            ]
            area = np.s_[tile.top : tile.bottom, tile.left : tile.right]
            if tile.index in chunks and (picture.pixels[area] != 128).any():
                raise AssertionError(f"damaged tile {tile.index} is not gray")
            if not any(near) and (picture.pixels[area] != pixels[area]).any():
                raise AssertionError(
                    f"tile {tile.index} changes with damage out of its reach: {sorted(chunks)}"
                )


class Case(NamedTuple):
    """A damaged file."""

    data: bytes
    sources: tuple[Original, ...]  # whose content it may hold
    repaired: bool = False  # whether checksums were made to fit


def make_pictures(seed: int = 0) -> list[Picture]:
    """Parts of a photograph: a long one with alpha and profile, a gray one of odd size, a small and an opaque one."""
    rng = np.random.default_rng(seed)
    with Image.open(photograph()) as image:
        face = np.asarray(image.convert("RGB").crop((100, 40, 420, 240)))
    gray = np.asarray(Image.fromarray(face).convert("L"))[:, :, None]
    fade = np.broadcast_to(np.linspace(0, 255, 320, dtype=np.uint8), (64, 320)).copy()
    return [
        Picture(face[60:124], fade, rng.bytes(300)),
        Picture(gray[:130, 50:151], None, None),
        Picture(face[70:110, 100:148], None, None),
        Picture(face[60:124, 100:164], np.full((64, 64), 255, np.uint8), None),
    ]


# Damage -----------------------------------------------------------------------------------------------------


def flip(rng: random.Random, files: list[Original]) -> Case:
    """One to eight bytes changed."""
    original = rng.choice(files)
    return Case(_flipped(rng, original.data, rng.randint(1, 8)), (original,))


def truncate(rng: random.Random, files: list[Original]) -> Case:
    """The end cut off."""
    original = rng.choice(files)
    return Case(original.data[: rng.randrange(len(original.data))], (original,))


def delete(rng: random.Random, files: list[Original]) -> Case:
    """A run of bytes missing."""
    original = rng.choice(files)
    start = rng.randrange(len(original.data))
    return Case(original.data[:start] + original.data[start + rng.randint(1, 64) :], (original,))


def insert(rng: random.Random, files: list[Original]) -> Case:
    """A run of bytes too many, perhaps at the end."""
    original = rng.choice(files)
    start = rng.randint(0, len(original.data))
    return Case(
        original.data[:start] + rng.randbytes(rng.randint(1, 64)) + original.data[start:], (original,)
    )


def splice(rng: random.Random, files: list[Original]) -> Case:
    """The beginning of one file and the end of another."""
    first, second = rng.choice(files), rng.choice(files)
    data = first.data[: rng.randint(0, len(first.data))] + second.data[rng.randrange(len(second.data)) :]
    return Case(data, (first, second))


def repaired_payload(rng: random.Random, files: list[Original]) -> Case:
    """A chunk changed, cut, or replaced by that of another file, under a checksum that fits."""
    original = rng.choice(files)
    chunks = [chunk or b"" for chunk in original.content.chunks]
    index = rng.randrange(len(chunks))
    chunk = chunks[index]
    chunks[index] = rng.choice(
        (
            _flipped(rng, chunk, rng.randint(1, 8)),
            chunk[: rng.randrange(len(chunk))],
            rng.randbytes(rng.randint(0, 2 * len(chunk))),
            rng.choice(rng.choice(files).content.chunks) or b"",
        )
    )
    extras = [
        replace(extra, payload=_flipped(rng, extra.payload, 1)) if rng.random() < 0.2 else extra
        for extra in original.content.extras
    ]
    header = original.content.header
    return Case(container.write(header, chunks, extras, compact=header.compact), (original,), repaired=True)


def repaired_header(rng: random.Random, files: list[Original]) -> Case:
    """A header of the full form with changed bytes, under a checksum that fits."""
    original = rng.choice([file for file in files if not file.content.header.compact])
    end = original.content.header_bytes - HEADER_CRC_BYTES
    head = original.data[:4] + _flipped(rng, original.data[4:end], rng.randint(1, 3))
    crc = zlib.crc32(head).to_bytes(HEADER_CRC_BYTES, "little")
    return Case(head + crc + original.data[end + HEADER_CRC_BYTES :], (original,), repaired=True)


def forged_size(rng: random.Random, files: list[Original]) -> Case:
    """A header that claims a picture of another size, up to 2^30 pixels an edge, and another quality; half of them in
    tiles, for which chunks of little or nothing are there."""
    original = rng.choice(files)
    header = original.content.header
    bits = 14 if header.compact else 30
    height, width = (rng.randrange(1, 1 << rng.randint(1, bits)) for _ in range(2))
    geometry = ImageGeometry(height, width, rng.choice((1, 3)))
    tile = 0 if header.compact or rng.random() < 0.5 else 64 * rng.randint(1, 40)
    forged = replace(header, geometry=geometry, chunk_size=tile, settings=(rng.randrange(32, 257),))
    content = original.content
    # What is a legal file of this many chunks is bounded by its size; this stays below 10 kB.
    if forged.chunk_count() > 1000:
        forged = replace(forged, geometry=ImageGeometry(min(height, 30 * tile), min(width, 30 * tile), 3))
    chunks = [rng.choice((b"", b"\x07", content.chunks[0] or b"")) for _ in range(forged.chunk_count())]
    data = container.write(forged, chunks, content.extras, compact=header.compact)
    return Case(data, (original,), repaired=True)


DAMAGE: tuple[Callable[[random.Random, list[Original]], Case], ...] = (
    flip, truncate, delete, insert, splice, repaired_payload, repaired_header, forged_size,
)  # fmt: skip


def _flipped(rng: random.Random, data: bytes, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count if changed else 0):
        changed[rng.randrange(len(changed))] ^= rng.randint(1, 255)
    return bytes(changed)


# Verdict ----------------------------------------------------------------------------------------------------


def attempt(codec: ImageCodec, data: bytes, *, partial: bool) -> Picture | Exception:
    """What decoding ends in."""
    try:
        return codec.decode(data, partial=partial)
    except Exception as error:
        return error


def judge(case: Case, end: Picture | Exception) -> tuple[str, bool]:
    """What to call the end of a decoding, and whether it may end so."""
    if isinstance(end, BitstreamError):
        place = "" if end.chunk is None else " naming the chunk"
        place += "" if end.offset is None else " and the offset" if place else " naming the offset"
        return f"BitstreamError{place}", "\n" not in str(end)
    if isinstance(end, CheckpointError):
        return "CheckpointError", "\n" not in str(end)
    if isinstance(end, Exception):
        return f"{type(end).__name__}: {end}", False
    picture = end
    if not picture.damage and any(_same(picture, source.picture) for source in case.sources):
        return "intact picture", True
    chunks = frozenset(error.chunk for error in picture.damage if error.chunk is not None)
    if picture.damage:
        extras_intact = all(error.chunk is not None for error in picture.damage)
        for source in case.sources:
            if len(source.content.chunks) <= max(chunks, default=-1):
                continue
            expected = source.without(chunks)
            if _same(picture, expected, extras=extras_intact):
                return "part of the picture", True
    if case.repaired:
        return "another picture, past repaired checksums", True
    if all(source.content.header.compact for source in case.sources):
        return UNDETECTED, True
    return "another picture", False


def _same(picture: Picture, expected: Picture, *, extras: bool = True) -> bool:
    if not extras:
        return np.array_equal(picture.pixels, expected.pixels)
    if picture.alpha is None or expected.alpha is None:
        same_alpha = picture.alpha is expected.alpha
    else:
        same_alpha = np.array_equal(picture.alpha, expected.alpha)
    return same_alpha and picture.icc == expected.icc and np.array_equal(picture.pixels, expected.pixels)


@dataclass
class Findings:
    """What came of all cases."""

    cases: int = 0
    outcomes: dict[str, Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )  # by damage and mode
    failures: list[str] = field(default_factory=list)  # how to repeat them
    slowest: tuple[float, str] = (0.0, "")  # seconds, case
    memory_before: int = 0  # bytes, largest resident set
    memory_after: int = 0


def run(codec: ImageCodec, cases: int, seed: int = 0) -> Findings:
    """Decode `cases` damaged files, every kind of damage in turns."""
    with patch.object(image_codec, "TILE", TILE):
        files = [Original(codec.encode(picture, quality=3), codec) for picture in make_pictures(seed)]
    findings = Findings(memory_before=_peak_memory())
    for number in range(cases):
        damage = DAMAGE[number % len(DAMAGE)]
        case = damage(random.Random(f"{seed} {number}"), files)
        for partial in (False, True):
            name = f"seed {seed}, case {number} ({damage.__name__}{', partial' if partial else ''})"
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            start = time.perf_counter()
            end = attempt(codec, case.data, partial=partial)
            seconds = time.perf_counter() - start
            faulthandler.cancel_dump_traceback_later()
            outcome, permitted = judge(case, end)
            findings.outcomes[f"{damage.__name__}{', partial' if partial else ''}"][outcome] += 1
            findings.slowest = max(findings.slowest, (seconds, name))
            if not permitted:
                findings.failures.append(f"{name}: {outcome}")
        findings.cases += 1
    findings.memory_after = _peak_memory()
    return findings


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def render(findings: Findings) -> str:
    """The report in Markdown."""
    kinds = sorted({kind for counts in findings.outcomes.values() for kind in counts})
    table = markdown_table(
        ["damage", *kinds],
        [[name, *(str(counts[kind]) for kind in kinds)] for name, counts in findings.outcomes.items()],
    )
    seconds, name = findings.slowest
    return (
        f"# Fuzz\n\n{(__doc__ or '').strip()}\n\n{table}\n\n"
        f"{findings.cases:,} files, each decoded twice; {len(findings.failures)} failures.\n"
        f"Slowest decoding: {seconds:.2f} s ({name}). Largest resident set: {findings.memory_before / 1e6:.0f} MB "
        f"before, {findings.memory_after / 1e6:.0f} MB after.\n"
        + "".join(f"\n- {failure}" for failure in findings.failures[:20])
    )


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "fuzz")
    program.add_codec(parser)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = program.parse(parser, argv)
    torch.set_num_threads(1)  # pictures this small gain nothing from more
    findings = run(program.image_codec(arguments.codec, "cpu"), arguments.cases, arguments.seed)
    report = render(findings)
    origin = provenance(
        f"parts of {photograph().name}, tiles of {TILE} pixels, seed {arguments.seed}, "
        f"checkpoint {arguments.codec.name} ({arguments.codec.symbols.hex()})"
    )
    write_results(arguments.output, vars(findings), origin, report=report, force=arguments.force)
    print(report)
    if findings.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
