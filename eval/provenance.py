"""Where a number comes from: command, data, hardware, date and versions stand beside every result."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from compand.errors import UsageError

RESULTS = Path(__file__).resolve().parent / "results"
"""Folder of the committed results."""

_PACKAGES = (
    "compand",
    "numpy",
    "torch",
    "torchvision",
    "torchaudio",
    "constriction",
    "scipy",
    "pillow",
    "pillow-jxl-plugin",
    "jpeglib",
    "soundfile",
    "torchmetrics",
    "pytorch-msssim",
    "pesq",
    "pystoi",
    "visqol-python",
    "timm",
    "transformers",
    "compressai",
    "lightning",
)


def provenance(data: str) -> dict[str, Any]:
    """Describe the running program for a table of results.

    Args:
        data: what was measured on, in a few words ("300,000 synthetic symbols, seed 0").

    Returns:
        command, data, hardware (cpu, cores, torch_threads, gpu), date (UTC, ISO 8601), versions by package.
    """
    import torch  # not before a run has started: this takes seconds

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": _command(),
        "data": data,
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpu": gpu,
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | _installed_versions(),
    }


def check_unwritten(path: Path, *, force: bool) -> None:
    """Refuse, before a long measurement, a file that `write_results` would refuse after it.

    Raises:
        UsageError: path exists and force is off.
    """
    if path.exists() and not force:
        raise UsageError(f"{path} exists: pass --force to replace these results")


def write_results(
    path: Path,
    results: Any,
    origin: Mapping[str, Any],
    *,
    report: str = "",
    force: bool = False,
) -> None:
    """Write results with their origin as JSON and, where there is a report, as Markdown beside it.

    Args:
        path: the .json file; its folder is made if need be.
        results: rows or a summary, of JSON's types.
        origin: what `provenance` returned.
        report: Markdown; the origin is added below it.
        force: replace existing files.

    Raises:
        UsageError: a file exists and force is off; nothing is written then.
    """
    written = {path: json.dumps({"provenance": origin, "results": results}, indent=2, allow_nan=False) + "\n"}
    if report:
        written[path.with_suffix(".md")] = f"{report.rstrip()}\n\n{as_markdown(origin)}\n"
    for target in written:
        check_unwritten(target, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in written.items():
        target.write_text(text, encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def as_markdown(origin: Mapping[str, Any]) -> str:
    """What `provenance` returned, as a Markdown list."""
    hardware = origin["hardware"]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['torch_threads']} torch threads"
    if hardware["gpu"]:
        machine += f", {hardware['gpu']}"
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return "\n".join(
        [
            f"- Command: `{origin['command']}`",
            f"- Data: {origin['data']}",
            f"- Hardware: {machine}",
            f"- Date: {origin['date']}",
            f"- Versions: {versions}",
        ]
    )


def _command() -> str:
    """The command line as anyone may type it into a shell, without this machine's folders."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    script = Path(sys.argv[0]).stem
    if script == "compand":
        program = [script]
    elif spec:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = ["python", _portable(sys.argv[0])]
    return shlex.join([*program, *map(_portable, sys.argv[1:])])


def _portable(argument: str) -> str:
    """An argument without this machine's folders: absolute paths become names below the repository, or bare names.

    Paths may stand alone, behind an option ("--output=", "-o"), or in lists ("jpeg,PATH", "jpeg=10;PATH=1,2").
    """
    return "".join(map(_without_folders, _AROUND_PATHS.split(argument)))


_AROUND_PATHS = re.compile(r"(^-\w(?=/)|[=,;])")


def _without_folders(text: str) -> str:
    if not os.path.isabs(text):
        return text
    path = Path(text)
    root = Path(__file__).resolve().parents[1]
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
