"""Whether files decode to the same symbols everywhere.

Every picture or sound is encoded at every quality, and each file is decoded under many settings: one and two threads,
oneDNN off, memory contiguous and channels-last, several payloads at once, reduced and full precision of the
transforms, and on a CUDA GPU with and without TF32 where there is one. Compared are the integers that cross the border
to the entropy coder: the table index of each symbol and the symbol, or the plane of each codebook index and the index.
The first setting is the reference of the others, and what the encoder put in is the reference of all. Latents are
these symbols dequantised in floating point, so they may differ in their last bits between devices, which concerns no
other symbol; their largest difference is given.

`--write FOLDER` keeps files and digests of the encoder's integers, `--compare FOLDER` decodes them, on another machine
for instance. Without either, files are written on the CPU, and on the GPU if there is one, and decoded on both.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from compand.audio_codec import AudioCodec
from compand.bottlenecks.codebook import CodebookBottleneck
from compand.checkpoint import CheckpointInfo
from compand.coding import container
from compand.coding.ans import AnsReader, AnsWriter
from compand.coding.container import ImageGeometry
from compand.coding.tables import TableSet
from compand.errors import BitstreamError
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.image_codec import ImageCodec, tile_rows
from compand.pictures import is_image_path, read_picture
from compand.sounds import is_sound_path, read_sound
from compand.weights import build

LEVELS = tuple(range(1, 9))
DIGESTS = "symbols.json"
BATCH = 6


class Exchange(NamedTuple):
    """What passes between a codec and the entropy coder in one push or pull; both [N]."""

    indexes: NDArray[np.uint16]
    symbols: NDArray[np.int32]


class Payload(NamedTuple):
    """What a file holds of one tile, or of one group of channels of a segment."""

    file: str
    number: int  # in the file
    data: bytes
    shape: tuple[int, int]  # rows and columns of its latents
    quality: int  # in 1/32 level


class Decoded(NamedTuple):
    """A payload under one setting."""

    exchanges: list[Exchange]
    y_hat: Tensor  # [M, h, w]


class Setting(NamedTuple):
    """How to decode."""

    name: str
    codec: ImageCodec | AudioCodec
    threads: int = 1
    onednn: bool = True
    tf32: bool = False
    batch: int = 1


@dataclass
class Outcome:
    """Files under one setting, against the reference setting and the encoder."""

    written_on: str
    setting: str
    files: set[str] = field(default_factory=set)
    symbols: int = 0
    differing_symbols: int = 0
    differing_indexes: int = 0
    wrong_files: set[str] = field(default_factory=set)  # undecodable, or unlike what the encoder put in
    latent_difference: float = 0.0  # largest

    def add(
        self, payload: Payload, expected: str, reference: Decoded | None, decoded: Decoded | None
    ) -> None:
        """Count one payload; `expected` is the digest of what the encoder put in."""
        self.files.add(payload.file)
        if decoded is None or digest(decoded.exchanges) != expected:
            self.wrong_files.add(payload.file)
        if decoded is None or reference is None:
            return
        for (indexes, symbols), (other_indexes, other_symbols) in zip(
            reference.exchanges, decoded.exchanges, strict=True
        ):
            self.symbols += symbols.size
            self.differing_symbols += int(np.count_nonzero(symbols != other_symbols))
            self.differing_indexes += int(np.count_nonzero(indexes != other_indexes))
        difference = float((reference.y_hat - decoded.y_hat).abs().max())
        self.latent_difference = max(self.latent_difference, difference)


@contextmanager
def recorded() -> Iterator[dict[object, list[Exchange]]]:
    """Records what every AnsWriter and AnsReader exchanges with its codec, in the order of their first exchange, and
    the indices of every payload of codebooks."""
    streams: dict[object, list[Exchange]] = defaultdict(list)
    push, pull = AnsWriter.push, AnsReader.pull
    compress, decompress = CodebookBottleneck.compress_indices, CodebookBottleneck.decompress_indices

    def note(coder: object, indexes: ArrayLike, symbols: ArrayLike) -> None:
        streams[coder].append(Exchange(np.array(indexes, dtype=np.uint16), np.array(symbols, dtype=np.int32)))

    def recording_push(self: AnsWriter, values: ArrayLike, indexes: ArrayLike, tables: TableSet) -> None:
        note(self, indexes, values)
        push(self, values, indexes, tables)

    def recording_pull(self: AnsReader, indexes: ArrayLike, tables: TableSet) -> NDArray[np.int32]:
        values = pull(self, indexes, tables)
        note(self, indexes, values)
        return values

    def note_indices(grid: Tensor) -> None:
        planes = np.arange(len(grid)).repeat(grid[0].numel())
        note(object(), planes, grid.cpu().numpy().ravel())

    def recording_compress(self: CodebookBottleneck, indices: Tensor, *args: Any, **options: Any) -> bytes:
        note_indices(indices)
        return compress(self, indices, *args, **options)

    def recording_decompress(self: CodebookBottleneck, *args: Any, **options: Any) -> Tensor:
        indices = decompress(self, *args, **options)
        note_indices(indices)
        return indices

    with (
        patch.object(AnsWriter, "push", recording_push),
        patch.object(AnsReader, "pull", recording_pull),
        patch.object(CodebookBottleneck, "compress_indices", recording_compress),
        patch.object(CodebookBottleneck, "decompress_indices", recording_decompress),
    ):
        yield streams


def digest(exchanges: Sequence[Exchange]) -> str:
    """SHA-256 over all indexes and symbols, little-endian."""
    hash_ = hashlib.sha256()
    for indexes, symbols in exchanges:
        hash_.update(indexes.astype("<u2").tobytes() + symbols.astype("<i4").tobytes())
    return hash_.hexdigest()


def write(
    codec: ImageCodec | AudioCodec, sources: Sequence[Path], levels: Sequence[float], folder: Path
) -> None:
    """Encode pictures or sounds into a folder, with a digest for each payload of what the encoder put in."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for path in sources:
        for level in levels:
            with recorded() as streams:
                if isinstance(codec, AudioCodec):
                    data = codec.encode(read_sound(path), quality=level)
                else:
                    data = codec.encode(read_picture(path, strip=True), quality=level)
            name = f"{path.stem}-{level:g}.cpd"
            (folder / name).write_bytes(data)
            digests[name] = [digest(stream) for stream in streams.values()]
    device = torch.cuda.get_device_name(codec.device) if codec.device.type == "cuda" else "CPU"
    content = {"written_on": device, "files": digests}
    (folder / DIGESTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def files_of(folder: Path, medium: str) -> list[Path]:
    """The pictures ("image") or sounds ("audio") of a folder, sorted by name."""
    fits = is_image_path if medium == "image" else is_sound_path
    return sorted(path for path in folder.glob("*") if fits(path))


def built(info: CheckpointInfo, device: str, *, reduced: bool | None = None) -> ImageCodec | AudioCodec:
    """The codec of a checkpoint; see `compand.weights.build`."""
    codec = build(info, device, reduced=reduced)
    assert isinstance(codec, (ImageCodec, AudioCodec))
    return codec


def settings(info: CheckpointInfo) -> list[Setting]:
    """All that this machine can do, the reference first."""
    full, reduced = (built(info, "cpu", reduced=flag) for flag in (False, True))
    contiguous = built(info, "cpu", reduced=False)
    contiguous.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # its stub lacks this argument
    result = [
        Setting("1 thread", full),
        Setting("2 threads", full, threads=2),
        Setting("oneDNN off", full, onednn=False),
        Setting("oneDNN off, 2 threads", full, threads=2, onednn=False),
        Setting("contiguous memory", contiguous),
        Setting("contiguous memory, oneDNN off", contiguous, onednn=False),
        Setting("batched", full, batch=BATCH),
        Setting("batched, 2 threads", full, threads=2, batch=BATCH),
        Setting("bfloat16 transforms", reduced),
    ]
    if torch.cuda.is_available():
        gpu = built(info, "cuda")
        result += [
            Setting("CUDA", gpu),
            Setting("CUDA, TF32", gpu, tf32=True),
            Setting("CUDA, batched", gpu, batch=BATCH),
        ]
    return result


def payloads_of(folder: Path, file: str, codec: ImageCodec | AudioCodec) -> list[Payload]:
    """All payloads of a file, which the codec can decode."""
    content = container.read((folder / file).read_bytes())
    header, geometry = content.header, content.header.geometry
    if isinstance(codec, AudioCodec):
        split = [codec._split(chunk or b"", header) for chunk in content.chunks]
        pairs = [(data, (1, parts.columns)) for parts in split for data in parts.payloads]
        return [
            Payload(file, number, bytes(data), shape, header.settings[0])
            for number, (data, shape) in enumerate(pairs)
        ]
    assert isinstance(geometry, ImageGeometry)
    stride = codec.transform.stride
    tiles = [tile for row in tile_rows(geometry.height, geometry.width, header.chunk_size) for tile in row]
    return [
        Payload(file, tile.index, chunk or b"", tile.latent_shape(stride), header.settings[0])
        for tile, chunk in zip(tiles, content.chunks, strict=True)
    ]


@contextmanager
def applied(setting: Setting) -> Iterator[None]:
    """The global state that a setting asks for, and the former state afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    former = torch.get_num_threads(), matmul.allow_tf32, cudnn.allow_tf32
    torch.set_num_threads(setting.threads)
    matmul.allow_tf32 = cudnn.allow_tf32 = setting.tf32
    try:
        with warnings.catch_warnings():
            # The context manager also sets TF32 for Intel GPUs, and torch warns that there is none.
            warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
            with torch.backends.mkldnn.flags(enabled=setting.onednn):
                yield
    finally:
        torch.set_num_threads(former[0])
        matmul.allow_tf32, cudnn.allow_tf32 = former[1:]


@torch.inference_mode()
def decode(setting: Setting, payloads: Sequence[Payload]) -> list[Decoded | None]:
    """Decode payloads of one shape and quality; None for those of a batch that does not decode."""
    result: list[Decoded | None] = []
    for start in range(0, len(payloads), setting.batch):
        batch = payloads[start : start + setting.batch]
        data = [payload.data for payload in batch]
        with applied(setting), recorded() as streams:
            try:
                y_hat = setting.codec.bottleneck.decompress(data, batch[0].shape, batch[0].quality).cpu()
            except BitstreamError:
                result += [None] * len(batch)
                continue
        assert len(streams) == len(batch), "a codec whose payloads are not recorded"
        result += [Decoded(*item) for item in zip(streams.values(), y_hat, strict=True)]
    return result


def compare(folder: Path, ways: Sequence[Setting]) -> list[Outcome]:
    """Decode all files that `write` made, under all settings; the first is the reference."""
    written = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    groups: dict[tuple[tuple[int, int], int], list[Payload]] = defaultdict(list)
    for file in sorted(written["files"]):
        for payload in payloads_of(folder, file, ways[0].codec):
            groups[payload.shape, payload.quality].append(payload)
    outcomes = [Outcome(written["written_on"], way.name) for way in ways]
    for payloads in groups.values():
        reference = decode(ways[0], payloads)
        for way, outcome in zip(ways, outcomes, strict=True):
            decoded = reference if way is ways[0] else decode(way, payloads)
            for payload, *pair in zip(payloads, reference, decoded, strict=True):
                outcome.add(payload, written["files"][payload.file][payload.number], *pair)
    return outcomes


def render(outcomes: Sequence[Outcome]) -> str:
    """The report in Markdown."""
    table = markdown_table(
        [
            "written on: decoded with", "files", "symbols", "differing symbols", "differing table indexes",
            "files unlike the encoder's symbols", "largest difference of latents",
        ],
        [
            [
                f"{o.written_on}: {o.setting}", str(len(o.files)), f"{o.symbols:,}", str(o.differing_symbols),
                str(o.differing_indexes), str(len(o.wrong_files)), f"{o.latent_difference:.2g}",
            ]
            for o in outcomes
        ],
    )  # fmt: skip
    return f"# Portability\n\n{(__doc__ or '').strip()}\n\n{table}\n"


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "portability")
    program.add_codec(parser)
    parser.add_argument("--data", type=Path, help="folder of pictures or sounds, whatever the codec is for")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="qualities (1 .. 8)")
    parser.add_argument("--device", default="cpu", help="of --write: auto, cpu or cuda (cpu)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write files and digests there, and no results"
    )
    modes.add_argument("--compare", type=Path, metavar="FOLDER", help="decode what --write left there")
    arguments = parser.parse_args(argv)
    if not (arguments.compare or arguments.data):
        parser.error("the files are missing: give their folder with --data")
    sources = files_of(arguments.data, arguments.codec.medium) if arguments.data else []
    if arguments.data and not sources:
        parser.error(f"{arguments.data} holds nothing for a codec of medium {arguments.codec.medium}")
    if arguments.write:
        codec = built(arguments.codec, arguments.device)
        write(codec, sources, arguments.levels, arguments.write)
        return
    program.parse(parser, argv)
    ways = settings(arguments.codec)
    if arguments.compare:
        outcomes = compare(arguments.compare, ways)
        data = f"{len(outcomes[0].files)} files of {arguments.compare.name}"
    else:
        outcomes = []
        with tempfile.TemporaryDirectory() as folder:
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                codec = built(arguments.codec, device)
                write(codec, sources, arguments.levels, Path(folder, device))
                outcomes += compare(Path(folder, device), ways)
        data = f"{len(sources)} files of {sources[0].parent.name}, {len(arguments.levels)} qualities"
    report = render(outcomes)
    results = [asdict(o) | {"files": len(o.files), "wrong_files": sorted(o.wrong_files)} for o in outcomes]
    origin = provenance(f"{data}, checkpoint {arguments.codec.name} ({arguments.codec.symbols.hex()})")
    write_results(arguments.output, results, origin, report=report, force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
