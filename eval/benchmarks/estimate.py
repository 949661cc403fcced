"""Sizes of files against what the model says that they need.

Every picture is encoded at every quality level. The size of its file, and of the payload in it, is held against the
information content of its symbols under the model. The margin is |bytes - content| - (1 % of the content + 16 bytes);
a positive one is a violation. Headers count in the file and not in the payload.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from compand.coding import container
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.image_codec import ImageCodec
from compand.pictures import read_picture

LEVELS = tuple(1 + step / 2 for step in range(15))


class Trial(NamedTuple):
    """One picture at one level."""

    picture: str
    level: float
    file_bytes: int
    payload_bytes: int  # of the file, what entropy coding made
    content_bytes: float  # information content of the symbols

    @property
    def payload_margin(self) -> float:
        return self._margin(self.payload_bytes)

    @property
    def file_margin(self) -> float:
        return self._margin(self.file_bytes)

    def _margin(self, size: int) -> float:
        return abs(size - self.content_bytes) - (0.01 * self.content_bytes + 16)


def measure(codec: ImageCodec, path: Path, level: float) -> Trial:
    """Encode a picture and ask the model what its symbols hold."""
    picture = read_picture(path, strip=True)
    data = codec.encode(picture, quality=level)
    payload = sum(len(chunk or b"") for chunk in container.read(data).chunks)
    return Trial(path.stem, level, len(data), payload, codec.estimate(picture, level) / 8)


def margins(trials: Sequence[Trial], kind: str) -> list[float]:
    """`payload` or `file` margins of all trials."""
    return [trial.payload_margin if kind == "payload" else trial.file_margin for trial in trials]


def render(trials: Sequence[Trial]) -> str:
    """The report in Markdown."""
    levels = [
        [trial for trial in trials if trial.level == level] for level in sorted({t.level for t in trials})
    ]
    points = markdown_table(
        [
            "quality",
            "mean content, bytes",
            "payload against it",
            "largest margin, bytes",
            "of the file, bytes",
        ],
        [
            [
                f"{level[0].level:g}",
                f"{fmean(trial.content_bytes for trial in level):.0f}",
                f"{100 * (sum(t.payload_bytes for t in level) / sum(t.content_bytes for t in level) - 1):+.3f} %",
                f"{max(margins(level, 'payload')):+.1f}",
                f"{max(margins(level, 'file')):+.1f}",
            ]
            for level in levels
        ],
    )
    payload, file = (sum(margin > 0 for margin in margins(trials, kind)) for kind in ("payload", "file"))
    return (
        f"# Sizes of files and the model's estimate\n\n{(__doc__ or '').strip()}\n\n{points}\n\n"
        f"Sizes beyond 1 % + 16 bytes of the information content: {payload} of {len(trials)} payloads, "
        f"{file} of {len(trials)} files with their headers.\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "estimate")
    program.add_codec(parser)
    program.add_pictures(parser, required=True)
    parser.add_argument(
        "--levels", type=float, nargs="+", default=LEVELS, help="quality levels (1, 1.5 .. 8)"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (cpu)")
    parser.add_argument(
        "--reduced",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 transforms; else where the device has it",
    )
    arguments = program.parse(parser, argv)
    codec = program.image_codec(arguments.codec, arguments.device, reduced=arguments.reduced)
    trials = [measure(codec, path, level) for path in arguments.data for level in arguments.levels]
    report = render(trials)
    results = {
        "checkpoint": {
            "name": arguments.codec.name,
            "symbols": arguments.codec.symbols.hex(),
            "device": arguments.device,
        },
        "transforms": str(next(codec.transform.parameters()).dtype).removeprefix("torch."),
        "largest_margin": {kind: max(margins(trials, kind)) for kind in ("payload", "file")},
        "violations": {kind: sum(m > 0 for m in margins(trials, kind)) for kind in ("payload", "file")},
        "trials": [trial._asdict() for trial in trials],
    }
    origin = provenance(f"{program.folder_of(arguments.data)}, {len(arguments.levels)} quality levels")
    write_results(arguments.output, results, origin, report=report, force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
