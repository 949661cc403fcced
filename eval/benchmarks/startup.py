"""How soon the commands that need no network answer: whole processes, from start to exit."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import compand
from compand.demo import photograph
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results


def seconds(arguments: list[str], repetitions: int) -> list[float]:
    """Wall-clock time of `compand ARGUMENTS`, sorted; the first run, which fills the disk cache, does not count."""
    times = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "compand.cli", *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "startup")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = program.parse(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "photo.cpd")
        file.write_bytes(compand.encode(photograph(), device="cpu"))
        commands = {"--help": ["--help"], "info FILE": ["info", str(file)], "codecs": ["codecs"]}
        measured = {name: seconds(words, arguments.repetitions) for name, words in commands.items()}
    rows = [
        [f"compand {name}", f"{statistics.median(times):.2f}", f"{times[0]:.2f} to {times[-1]:.2f}"]
        for name, times in measured.items()
    ]
    report = f"# Start-up\n\n{__doc__}\n{markdown_table(['command', 'median, s', 'range, s'], rows)}\n"
    origin = provenance(f"{arguments.repetitions} runs of each command")
    write_results(arguments.output, measured, origin, report=report, force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
