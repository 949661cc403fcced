"""The report of an evaluation: plots as PNG files, and one HTML page that holds everything."""

from __future__ import annotations

from pathlib import Path

from compand.files import atomic_write

PAGE = "report.html"

MEGABYTES = 24.0
"""Room in the page for pictures, sounds and spectrograms unless the caller says otherwise."""


def write(out: Path, *, examples: int | None = None, megabytes: float = MEGABYTES) -> list[Path]:
    """Draw the plots of a finished evaluation and write its page; files of an earlier report are replaced.

    Args:
        out: folder with results.json and, for crops and sounds, examples/.
        examples: items to show; None for all that were kept.
        megabytes: room for their files (10^6 bytes; the page is a third larger). Where it does not suffice, rates
            are left out, then items, and the page says so.

    Returns:
        The files written: PNG plots, and last the page.

    Raises:
        UsageError: results.json is missing or is not what an evaluation writes.
        MediaError: a kept example cannot be read, or a file cannot be written.
    """
    from compand.eval.report.examples import select
    from compand.eval.report.page import render
    from compand.eval.report.plots import plots
    from compand.eval.report.results import read_results

    results = read_results(out)
    drawn = plots(results)
    selection = select(out, results, count=examples, megabytes=megabytes)
    content = {out / f"{plot.name}.png": plot.png() for plot in drawn}
    content[out / PAGE] = render(results, drawn, selection).encode()
    for path, data in content.items():
        with atomic_write(path, force=True) as stream:
            stream.write(data)
    return list(content)
