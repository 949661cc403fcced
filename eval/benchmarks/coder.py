"""Entropy coder against CompressAI's: symbols per second both ways, and bytes over the information content.

Both code the same symbols with the same 64 Gaussian tables. Ours is timed from an int32 array and uint8
indexes to bytes and back: grouping, table look-up and scatter count. CompressAI's is timed as
`EntropyModel.compress` and `decompress` call it, from int32 tensors through Python lists to bytes and back,
and once more with every list made beforehand, which is the best that its coder could do. Rounding and
dequantisation count for neither.
Indexes are uniform over the tables (log-uniform scales) or sparse (mostly small scales, as in latents). With --data,
the latents of a picture, with the tables of a checkpoint, are coded as well, at qualities 1, 4 and 8.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compressai import ans as compressai_ans
from compressai._CXX import pmf_to_quantized_cdf
from numpy.typing import NDArray

from compand.bottlenecks.hyperprior import HyperpriorBottleneck
from compand.codec import QUALITY_STEPS
from compand.coding.ans import AnsReader, AnsWriter
from compand.coding.tables import TableSet
from compand.errors import UsageError
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.image_codec import ImageCodec, tile_rows
from compand.pictures import read_picture

SCALES = np.exp(np.linspace(math.log(0.11), math.log(256), 64))
"""Standard deviations of CompressAI's own scale table."""

SYMBOLS = 300_000


class Contender(NamedTuple):
    """One coder, bound to one set of symbols."""

    name: str
    encode: Callable[[], bytes]
    decode: Callable[[bytes], Any]


class Measurement(NamedTuple):
    """Medians over all repetitions."""

    indexes: str
    coder: str
    encode_rate: float  # million symbols per second
    decode_rate: float  # million symbols per second
    size: int  # bytes
    overhead: float  # of size over the information content under our tables, 0.01 is one percent


class CompressAiTables(NamedTuple):
    """The buffers of a CompressAI `EntropyModel`."""

    cdf: torch.Tensor  # int32 [T, longest + 2], 16-bit cumulative frequencies, padded with zeros
    lengths: torch.Tensor  # int32 [T]
    offsets: torch.Tensor  # int32 [T]

    @classmethod
    def from_tables(cls, tables: TableSet) -> CompressAiTables:
        """Derive 16-bit tables from ours with CompressAI's own quantiser."""
        rows = [pmf_to_quantized_cdf((table / table.sum()).tolist(), 16) for table in tables.frequencies]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        cdf = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int32)
        for t, row in enumerate(rows):
            cdf[t, : len(row)] = torch.tensor(row, dtype=torch.int32)
        return cls(cdf, lengths, torch.from_numpy(tables.lows.copy()))

    def lists(self) -> tuple[list[list[int]], list[int], list[int]]:
        return self.cdf.tolist(), self.lengths.tolist(), self.offsets.tolist()


def draw_indexes(kind: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Table of each symbol: "uniform" over the tables, or "sparse" with mostly small scales."""
    if kind == "uniform":
        return rng.integers(0, SCALES.size, SYMBOLS).astype(np.uint8)
    return np.minimum(rng.exponential(12, SYMBOLS), SCALES.size - 1).astype(np.uint8)


def contenders(values: NDArray[np.int32], indexes: NDArray[np.uint8], tables: TableSet) -> list[Contender]:
    """All coders on the same symbols; the first is ours."""

    def encode() -> bytes:
        writer = AnsWriter()
        writer.push(values, indexes, tables)
        return writer.finish()

    def decode(data: bytes) -> NDArray[np.int32]:
        reader = AnsReader(data)
        decoded = reader.pull(indexes, tables)
        reader.finish()
        return decoded

    peer = CompressAiTables.from_tables(tables)
    encoder, decoder = compressai_ans.RansEncoder(), compressai_ans.RansDecoder()
    value_tensor, index_tensor = torch.from_numpy(values), torch.from_numpy(indexes.astype(np.int32))
    value_list, index_list, table_lists = value_tensor.tolist(), index_tensor.tolist(), peer.lists()

    def peer_encode() -> bytes:
        data: bytes = encoder.encode_with_indexes(value_tensor.tolist(), index_tensor.tolist(), *peer.lists())
        return data

    def peer_decode(data: bytes) -> torch.Tensor:
        decoded = decoder.decode_with_indexes(data, index_tensor.tolist(), *peer.lists())
        return torch.tensor(decoded, dtype=torch.int32)

    def bare_encode() -> bytes:
        data: bytes = encoder.encode_with_indexes(value_list, index_list, *table_lists)
        return data

    def bare_decode(data: bytes) -> list[int]:
        decoded: list[int] = decoder.decode_with_indexes(data, index_list, *table_lists)
        return decoded

    return [
        Contender("compand", encode, decode),
        Contender("CompressAI", peer_encode, peer_decode),
        Contender("CompressAI, lists given", bare_encode, bare_decode),
    ]


def measure(kind: str, repetitions: int, seed: int = 0) -> list[Measurement]:
    """Time every coder on one kind of indexes, each by itself, so that none finds the caches of another.

    Raises:
        RuntimeError: a coder does not return the symbols it was given.
    """
    rng = np.random.default_rng(seed)
    indexes = draw_indexes(kind, rng)
    values = np.rint(rng.normal(size=SYMBOLS) * SCALES[indexes]).astype(np.int32)
    return compare(kind, values, indexes, TableSet.gaussian(SCALES.tolist()), repetitions)


def latents(
    codec: ImageCodec, picture: Path, level: int
) -> tuple[NDArray[np.int32], NDArray[np.uint8], TableSet]:
    """Symbols, table indexes and tables of a picture's latents under a hyperprior codec."""
    bottleneck = codec.bottleneck
    if not isinstance(bottleneck, HyperpriorBottleneck) or bottleneck.y_tables is None:
        raise UsageError("only a checkpoint of hyperprior has tables by scale: choose one")
    pixels = read_picture(picture, strip=True).pixels
    (tile,) = tile_rows(pixels.shape[0], pixels.shape[1], 0)[0]
    with torch.inference_mode():
        y = codec.analyse(pixels, tile, level * QUALITY_STEPS)
        indexes, symbols = bottleneck.count(y, level * QUALITY_STEPS)[1]
    return symbols, indexes.astype(np.uint8), bottleneck.y_tables


def compare(
    kind: str, values: NDArray[np.int32], indexes: NDArray[np.uint8], tables: TableSet, repetitions: int
) -> list[Measurement]:
    """Time every coder on the same symbols and tables."""
    content = tables.bits(values, indexes).sum() / 8
    measurements = []
    for coder in contenders(values, indexes, tables):
        stream = coder.encode()
        if not np.array_equal(np.asarray(coder.decode(stream)), values):
            raise RuntimeError(f"{coder.name} does not return the symbols it was given")
        encode_seconds = _median_seconds(coder.encode, repetitions)
        decode_seconds = _median_seconds(partial(coder.decode, stream), repetitions)
        measurements.append(
            Measurement(
                kind,
                coder.name,
                values.size / encode_seconds / 1e6,
                values.size / decode_seconds / 1e6,
                len(stream),
                len(stream) / content - 1,
            )
        )
    return measurements


def _median_seconds(action: Callable[[], object], repetitions: int) -> float:
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def render(measurements: list[Measurement]) -> str:
    """The report in Markdown."""
    ours = {m.indexes: m for m in measurements if m.coder == "compand"}
    rows = [
        [
            f"{m.indexes}: {m.coder}",
            f"{m.encode_rate:.1f}",
            f"{m.decode_rate:.1f}",
            _ratio(ours[m.indexes].encode_rate, m.encode_rate),
            _ratio(ours[m.indexes].decode_rate, m.decode_rate),
            f"{m.size:,}",
            f"{100 * m.overhead:+.3f} %",
        ]
        for m in measurements
    ]
    header = [
        "indexes: coder",
        "encode, M symbols/s",
        "decode, M symbols/s",
        "compand is faster, encode",
        "decode",
        "bytes",
        "over information content",
    ]
    return f"# Entropy coder\n\n{__doc__.strip()}\n\n{markdown_table(header, rows)}\n"


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.1f} x" if ours != theirs else ""


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "coder")
    parser.add_argument("--repetitions", type=int, default=31)
    program.add_codec(parser)
    program.add_pictures(parser)
    arguments = program.parse(parser, argv)
    measurements = [m for kind in ("uniform", "sparse") for m in measure(kind, arguments.repetitions)]
    if arguments.data:
        codec = program.image_codec(arguments.codec, "cpu")
        for level in (1, 4, 8):
            kind = f"{arguments.data[0].stem}, quality {level}"
            measurements += compare(kind, *latents(codec, arguments.data[0], level), arguments.repetitions)
    report = render(measurements)
    origin = provenance(
        f"{SYMBOLS:,} synthetic Gaussian symbols, 64 tables, seed 0, {arguments.repetitions} repetitions"
    )
    results = [m._asdict() for m in measurements]
    write_results(arguments.output, results, origin, report=report, force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
