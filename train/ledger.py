"""The ledger of a checkpoint: every run that led to it, one after another, with the GPU hours of them all.

It stands in CARD.md as a table. A run that starts from a checkpoint takes its ledger along, and `compand export` writes
it into the new card with a row more; what the new checkpoint measures is for the author to add.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compand.errors import CheckpointError

HEADING = "## Ledger"
UNMEASURED = "not measured"


class Entry(NamedTuple):
    """A row."""

    run: str  # its name, and what it started from
    steps: int  # of this run
    hours: float  # of GPUs, of this run and of all before it
    measured: str  # what the checkpoint reaches after it


def table(entries: Sequence[Entry], measure: str) -> str:
    """The section of a card, Markdown; measure: what its last column gives, "Kodak BD-rate against VTM"."""
    rows = [f"| {e.run} | {e.steps:,} | {e.hours:.2f} | {e.measured} |" for e in entries]
    return "\n".join(
        [HEADING, "", f"| run | steps | GPU hours (sum) | {measure} |", "|---|---|---|---|", *rows]
    )


def read(card: Path) -> list[Entry]:
    """The rows in a CARD.md; none where there is no card, or no ledger in it.

    Raises:
        CheckpointError: a row is not as `table` writes it.
    """
    if not card.is_file():
        return []
    _, _, section = card.read_text(encoding="utf-8").partition(f"{HEADING}\n")
    lines = [line for line in re.split(r"\n## ", section)[0].splitlines() if line.startswith("|")]
    entries = []
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        try:
            # Cards of the first releases have no last column, or a word behind the hours.
            run, steps, hours, *measured = cells
            sum_of_hours = float(hours.split(" ", 1)[0])
            entries.append(Entry(run, int(steps.replace(",", "")), sum_of_hours, " ".join(measured)))
        except ValueError:
            raise CheckpointError(
                f'{card}: the ledger\'s row "{line}" is not run, steps, GPU hours and what was measured: correct it'
            ) from None
    return entries


def extended(facts: Mapping[str, Any], name: str) -> list[Entry]:
    """The ledger of a run, with a row for the run itself.

    Args:
        facts: what `compand.train.export.load_run` returned.
        name: of the checkpoint that the run became.
    """
    earlier = [Entry(*row) for row in facts["ledger"]]
    hours = (earlier[-1].hours if earlier else 0.0) + facts["gpu_seconds"] / 3600
    run = name
    if facts["started_from"]:
        unknown = "" if earlier else ", whose hours are not known"
        run = f"{name}, from {facts['started_from']}{unknown}"
    return [*earlier, Entry(run, facts["steps"], hours, UNMEASURED)]
