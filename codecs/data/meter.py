"""How far a packing is, on standard error, and what it came to."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from compand.data.pack import ChunkReport, Packing, Summary

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 30.0


class Meter:
    """Rows, rows a second, bits and bytes while a set is packed: one line that changes on a terminal, else a line every
    30 seconds. A context manager.

    Args:
        packing: what is packed.
        shown: False: say nothing.
    """

    def __init__(self, packing: Packing, *, shown: bool = True) -> None:
        self._all = len(packing.source.records)
        self._audio = packing.spec.info.medium == "audio"
        self._target = packing.spec.target
        left = sum(len(records) for _, records in packing.todo())
        self._before = self._all - left
        self._shown = shown and sys.stderr is not None
        self._terminal = self._shown and sys.stderr.isatty()
        self._rows = self._failures = self._bytes = 0
        self._extent = 0.0
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Meter:
        if self._shown and 0 < self._before < self._all:
            print(f"note: {self._before} of {self._all} inputs were packed before", file=sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def add(self, rows: int, payload_bytes: int, extent: float, failures: int) -> None:
        """Counts what has been packed; see `compand.data.pack.Progress`."""
        self._rows += rows
        self._bytes += payload_bytes
        self._extent += extent
        self._failures += failures
        now = time.monotonic()
        if self._shown and now - self._last >= (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
            self._last = now
            line = f"{self._before + self._rows + self._failures}/{self._all} rows, {self._speed()}"
            if self._rows:
                line += f", {_rate(self._bytes, self._extent, self._audio)}, {self._bytes / 1e6:.1f} MB"
            line += f", {self._failures} failed" if self._failures else ""
            ends = ("\r\x1b[K", "") if self._terminal else ("", "\n")
            print(f"{ends[0]}{line}", end=ends[1], file=sys.stderr, flush=True)

    def add_chunk(self, report: ChunkReport) -> None:
        """Counts a chunk that was packed."""
        self.add(report.rows, report.payload_bytes, report.extent, len(report.failures))

    def summary(self, summary: Summary) -> str:
        """The closing line."""
        shards = len(summary.shards)
        line = f"{self._target}: {summary.rows} rows in {shards} shard{'s' * (shards != 1)}"
        line += f", {summary.bytes / 1e6:.2f} MB, {_rate(summary.bytes, summary.extent, self._audio)}"
        if summary.source_bytes:
            line += f", {100 * summary.bytes / summary.source_bytes:.1f} % of the source's bytes"
        return line + (f", {self._speed()}" if self._rows else ", complete before")

    def _speed(self) -> str:
        return f"{(self._rows + self._failures) / max(time.monotonic() - self._start, 1e-9):.0f} rows/s"


def _rate(size: int, extent: float, audio: bool) -> str:
    return f"{size / 125 / extent:.2f} kbps" if audio else f"{8 * size / extent:.3f} bpp"
