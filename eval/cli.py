"""`compand eval`: the commands, and the options that they share.

Commands import what they need when they run: `--help` loads neither torch nor NumPy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from compand import files
from compand.errors import UsageError
from compand.eval.report import MEGABYTES

app = typer.Typer(
    help="Measure codecs: each point is a real file, decoded by a process that never saw the original.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Codecs = Annotated[
    str | None,
    typer.Option(
        "-c",
        "--codecs",
        help="Codecs, checkpoint folders and anchors, with commas between them.",
        show_default="all of the medium",
    ),
]
Qualities = Annotated[
    str | None,
    typer.Option(
        "-q",
        "--qualities",
        help='By codec ("jpeg=10,50;hyperprior=1,2.5"), or one list for every codec of compand ("1,4,8").',
        show_default="each codec's own grid",
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics", help="Distortion metrics, with commas between them.", show_default="all usable here"
    ),
]
Output = Annotated[
    Path,
    typer.Option("-o", "--output", help="Folder for the results; an unfinished run in it is continued."),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", help="Module that registers codecs, anchors or tasks; may be given several times."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("-j", "--jobs", min=1, help="Files measured at the same time.", show_default="cores"),
]
Examples = Annotated[int, typer.Option("--examples", min=0, help="Items whose decoded files the page shows.")]
Force = Annotated[bool, typer.Option("-f", "--force", help="Discard the results in the output folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print problems only.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the commands on `argv`, else on sys.argv; always ends in SystemExit or a CompandError."""
    try:
        app(args=list(argv) if argv is not None else None, prog_name="compand eval")
    except files.Interrupted as stop:
        print("compand: interrupted; what was measured is kept: the same command continues", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "compand":
            raise
        raise UsageError(f'{error.name} is not installed: pip install "compand[eval]"') from error


def separated(text: str | None) -> list[str] | None:
    """The names in an option's value; None stays None.

    >>> separated("jpeg, webp,")
    ['jpeg', 'webp']
    """
    if text is None:
        return None
    return [name for name in map(str.strip, text.split(",")) if name]


@app.callback()
def _group() -> None:
    pass  # keeps `rd` a command of its own, whichever others there are


@app.command()
def rd(
    data: Annotated[Path, typer.Argument(help="A folder of images or of audio files, or one file.")],
    output: Output,
    codecs: Codecs = None,
    qualities: Qualities = None,
    metrics: Metrics = None,
    anchor: Annotated[
        str | None,
        typer.Option(
            "--anchor",
            help="Codec that BD-rates are against.",
            show_default="vtm (published) on Kodak, else jpeg or opus",
        ),
    ] = None,
    medium: Annotated[
        str | None, typer.Option("--medium", help="image or audio, where a folder holds both.")
    ] = None,
    published: Annotated[
        str,
        typer.Option(
            "--published", help="Published curves beside ours: auto (on the 24 Kodak images), kodak, none."
        ),
    ] = "auto",
    examples: Examples = 3,
    plugin: Plugins = None,
    jobs: Jobs = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Rate and distortion of codecs on a folder, with BD-rates, plots and a page."""
    from compand.eval import rd as rate_distortion

    options = rate_distortion.Options(
        data=data,
        output=output,
        codecs=separated(codecs),
        qualities=qualities,
        metrics=separated(metrics),
        anchor=anchor,
        medium=medium,
        published=published,
        examples=examples,
        plugins=tuple(plugin or ()),
        jobs=jobs,
        force=force,
        quiet=quiet,
    )
    raise typer.Exit(rate_distortion.run(options))


@app.command()
def perception(
    task: Annotated[
        str, typer.Argument(help="imagenette, camvid, keywords, digits, separation, or a task of a plug-in.")
    ],
    data: Annotated[Path, typer.Option("--data", help="The folder of the task's items.")],
    output: Output,
    codecs: Codecs = None,
    qualities: Qualities = None,
    metrics: Metrics = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Task model: a name, a folder, or timm:NAME, torchvision:NAME, transformers:NAME, torchaudio:BUNDLE.",
            show_default="the task's reference model",
        ),
    ] = None,
    lossy_model: Annotated[
        list[str] | None,
        typer.Option(
            "--lossy-model",
            help="A second task model, trained on decoded items; may be given several times.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where task models run: auto, cpu or cuda.")
    ] = "cpu",
    examples: Examples = 3,
    plugin: Plugins = None,
    jobs: Jobs = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """What decoding costs a frozen task model: score, rate and distortion, with intervals and paired tests."""
    from compand.eval.perception import runner

    options = runner.Options(
        task=task,
        data=data,
        output=output,
        codecs=separated(codecs),
        qualities=qualities,
        metrics=separated(metrics),
        model=model,
        lossy_models=tuple(lossy_model or ()),
        device=device,
        examples=examples,
        plugins=tuple(plugin or ()),
        jobs=jobs,
        force=force,
        quiet=quiet,
    )
    raise typer.Exit(runner.run(options))


@app.command()
def speed(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")],
    codecs: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--codecs",
            help="NAME[@QUALITY][:SETTING]..., with commas between them. Settings of codecs of compand: float32, "
            "bfloat16, untuned (allocator as it comes).",
            show_default="all of the medium, at the middle of their qualities",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="A folder or a file.",
            show_default="a photograph of 768 x 512, or a synthetic sound",
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers",
            help="Models of CompressAI, NAME[@QUALITY][:tuned], or none.",
            show_default="mbt2018-mean@4,mbt2018-mean@4:tuned",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="What ratios are relative to.",
            show_default="the first peer, else jpeg or opus",
        ),
    ] = None,
    medium: Annotated[str | None, typer.Option("--medium", help="image or audio.")] = None,
    device: Annotated[
        str, typer.Option("--device", help="Of codecs of compand and peers: auto, cpu or cuda.")
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Cores that a process may use.", show_default="all"),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Fresh processes of each codec.")] = 3,
    warm_up: Annotated[
        int, typer.Option("--warm-up", min=0, help="Passes before those that count, in each process.")
    ] = 3,
    repetitions: Annotated[
        int, typer.Option("--repetitions", min=1, help="Passes that count, in each process and direction.")
    ] = 9,
    plugin: Plugins = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace existing results.")] = False,
    quiet: Quiet = False,
) -> None:
    """Speed of encoding and decoding by stages, and memory, with peers in turns; tables on standard output."""
    from compand.eval.speed import runner

    chosen = separated(peers)
    options = runner.Options(
        output=output,
        data=data,
        medium=medium,
        codecs=separated(codecs),
        peers=[] if chosen == ["none"] else chosen,
        reference=reference,
        device=device,
        threads=threads,
        rounds=rounds,
        warm_up=warm_up,
        repetitions=repetitions,
        plugins=tuple(plugin or ()),
        force=force,
        quiet=quiet,
    )
    try:
        code = runner.run(options)
    except files.Interrupted as stop:
        print("compand: interrupted; the results of an unfinished run are not kept", file=sys.stderr)
        code = stop.exit_code
    raise typer.Exit(code)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of a finished evaluation.")],
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples", min=0, help="Items that the page shows.", show_default="all that were kept"
        ),
    ] = None,
    megabytes: Annotated[
        float, typer.Option("--megabytes", min=0, help="Room for their files in the page.")
    ] = MEGABYTES,
) -> None:
    """Draw the plots and the page of a finished evaluation again, with fewer or smaller examples."""
    from compand.eval.report import write

    written = write(results, examples=examples, megabytes=megabytes)
    print(f"written: {', '.join(map(str, written))}")
