"""The command line. Commands import what they need when they run: `--help` loads neither torch nor Pillow."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from compand import files
from compand.errors import CheckpointError, CompandError, UsageError

if TYPE_CHECKING:
    from compand import Codec
    from compand.coding.container import Container

SUFFIX = ".cpd"

# Plain help: the rich kind takes longer to import than all the rest.
app = typer.Typer(
    name="compand",
    help="Learned codecs for images: small files that decode on every machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Inputs = Annotated[list[str], typer.Argument(help="Files, folders, patterns, or - for standard input.")]
Files = Annotated[list[str], typer.Argument(help=".cpd files, folders, patterns, or - for standard input.")]
Output = Annotated[
    str | None,
    typer.Option("-o", "--output", help="A file, a folder for several inputs, or - for standard output."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Force = Annotated[bool, typer.Option("-f", "--force", help="Overwrite existing outputs.")]
SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave inputs whose output exists.")]
Recursive = Annotated[bool, typer.Option("-r", "--recursive", help="Search the subfolders of folders too.")]
Workers = Annotated[int, typer.Option("-j", "--jobs", min=1, help="Files worked on at the same time.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 all well, 1 something failed, 2 wrong usage, 128 + signal on one.

    Every error is one line on standard error; with COMPAND_DEBUG=1 a traceback stands above it.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file name may hold what the terminal's encoding does not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = 1
    try:
        with files.interrupts():
            code = _run(arguments)
    except files.Interrupted as stop:
        files.discard_unfinished()
        print("compand: interrupted; finished files are kept, unfinished ones removed", file=sys.stderr)
        _flush()
        # Threads inside native code cannot be stopped, and a regular exit would wait for them.
        os._exit(stop.exit_code)
    _flush()
    raise SystemExit(code)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        app(args=arguments, prog_name="compand")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Exception as error:
        if files.debugging():
            traceback.print_exc()
        message = str(error) if isinstance(error, CompandError) else files.explain(error, "compand")
        print(f"compand: {message.removeprefix('compand: ')}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _flush() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller
        try:
            stream.flush()
        except OSError:
            files.abandon(stream)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"compand {version('compand')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass  # the option's own callback does the work, before a command is looked for


# ---------------------------------------------------------------------------------------- encode, decode


@app.command()
def encode(
    inputs: Inputs,
    output: Output = None,
    codec: Annotated[
        str, typer.Option("-c", "--codec", help="Checkpoint: a name or a folder.")
    ] = "hyperprior",
    quality: Annotated[
        float | None, typer.Option("-q", "--quality", help="Quality, fractions too.", show_default="4")
    ] = None,
    bpp: Annotated[
        float | None, typer.Option("--bpp", help="Search the quality: bits per pixel at most.")
    ] = None,
    psnr: Annotated[
        float | None, typer.Option("--psnr", help="Search the quality: PSNR in dB at least.")
    ] = None,
    strip: Annotated[
        bool, typer.Option("--strip", help="Convert to sRGB and drop the color profile.")
    ] = False,
    compact: Annotated[
        bool | None,
        typer.Option("--compact/--no-compact", help="Shortest header.", show_default="for tiny files"),
    ] = None,
    device: Device = "auto",
    force: Force = False,
    skip_existing: SkipExisting = False,
    recursive: Recursive = False,
    jobs: Workers = 1,
    quiet: Quiet = False,
) -> None:
    """Encode pictures to .cpd files.

    photo.png becomes photo.cpd beside it, or in the folder -o. Where photo.png and photo.jpg both are encoded
    into one folder, they become photo.png.cpd and photo.jpg.cpd.
    """
    rate = {
        name: value
        for name, value in (("quality", quality), ("bpp", bpp), ("psnr", psnr))
        if value is not None
    }
    if len(rate) > 1:
        raise UsageError(f"--{' and --'.join(rate)} exclude each other: give one")
    if output not in (None, files.STREAM) and not Path(output).is_dir() and _is_image(Path(output)):
        raise UsageError(f"-o {output}: encode writes {SUFFIX} files; name one, or a folder")

    def prepare() -> files.Work:
        import compand
        from compand.allocator import tune_allocator

        tune_allocator()
        model = compand.load(codec, device=device)

        def work(job: files.Job, progress: files.Progress) -> files.Done:
            from compand.pictures import read_picture

            path = job.source.path
            picture = read_picture(io.BytesIO(job.source.read()) if path is None else path, strip=strip)
            data = model.encode(picture, compact=compact, progress=progress, **rate)
            files.write_output(job, data, force=force)
            bits = 8 * len(data) / (picture.height * picture.width)
            size = f"{picture.width} x {picture.height}, {len(data)} bytes, {bits:.3f} bpp"
            notes = picture.notes
            if path is not None and len(data) > (before := path.stat().st_size):
                notes += (f"{len(data)} bytes, more than the {before} of the original; try a lower quality",)
            return files.Done(f"{_arrow(job)}: {size}", notes=notes)

        return work

    _convert(
        inputs, output, SUFFIX, _is_image, prepare,
        force=force, skip_existing=skip_existing, recursive=recursive, workers=jobs, quiet=quiet,
    )  # fmt: skip


@app.command()
def decode(
    inputs: Files,
    output: Output = None,
    image_format: Annotated[
        str | None,
        typer.Option("--format", help="png, webp, jpg, tiff, ...", show_default="suffix of -o, or png"),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            "-c", "--codec", help="Checkpoint: a name or a folder.", show_default="what the file asks for"
        ),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Decode what is intact of damaged files; the exit status is 1 then."),
    ] = False,
    device: Device = "auto",
    force: Force = False,
    skip_existing: SkipExisting = False,
    recursive: Recursive = False,
    jobs: Workers = 1,
    quiet: Quiet = False,
) -> None:
    """Decode .cpd files to pictures.

    photo.cpd becomes photo.png beside it, or in the folder -o; photo.jpg.cpd becomes photo.jpg.png.
    """
    several = files.means_several(inputs)
    named = Path(output).suffix if output not in (None, files.STREAM) and not several else ""
    suffix = f".{image_format.lower().lstrip('.')}" if image_format else named.lower() or ".png"

    def prepare() -> files.Work:
        pillow_format = _pillow_format(suffix)
        codec_of = _decoders(device, codec)

        def work(job: files.Job, progress: files.Progress) -> files.Done:
            data = job.source.read()
            picture = codec_of(data).decode(data, partial=partial, progress=progress)
            # In memory first: a picture that cannot be written in this format is then told from a full disk.
            stream = io.BytesIO()
            picture.save(stream, format=pillow_format)
            files.write_output(job, stream.getvalue(), force=force)
            name = job.source.name
            damage = tuple(f"decoded in part: {files.explain(error, name)}" for error in picture.damage)
            return files.Done(f"{_arrow(job)}: {picture.width} x {picture.height}", picture.notes, damage)

        return work

    _convert(
        inputs, output, suffix, _is_cpd, prepare,
        force=force, skip_existing=skip_existing, recursive=recursive, workers=jobs, quiet=quiet,
    )  # fmt: skip


def _convert(
    arguments: list[str],
    output: str | None,
    suffix: str,
    accept: Callable[[Path], bool],
    prepare: Callable[[], files.Work],
    *,
    force: bool,
    skip_existing: bool,
    recursive: bool,
    workers: int,
    quiet: bool,
) -> None:
    """What encode and decode share. `prepare` loads the codec, and is called if something is left to do."""
    if force and skip_existing:
        raise UsageError("--force and --skip-existing exclude each other: give one")
    inputs, failures = files.expand(arguments, accept, recursive=recursive)
    jobs = []
    for job in files.plan(inputs, output, suffix, several=files.means_several(arguments)):
        if job.target is not None:
            if skip_existing and job.target.exists():
                continue
            try:
                files.check_target(job.target, force=force)
            except CompandError as error:
                failures.append(files.Failure(job.source.name, files.explain(error, job.source.name)))
                continue
        jobs.append(job)
    if not jobs:
        files.report_failures(failures)
        raise typer.Exit(1 if failures else 0)
    workers = min(workers, len(jobs))
    good = files.run_batch(
        jobs,
        prepare(),
        failures=failures,
        workers=workers,
        quiet=quiet,
        results=sys.stderr if jobs[0].target is None else sys.stdout,
        prepare_worker=_share_threads(workers) if workers > 1 else None,
    )
    raise typer.Exit(0 if good else 1)


def _share_threads(workers: int) -> Callable[[], None]:
    """Gives each worker its share of the threads that one computation would take alone."""
    import torch

    share = max(1, torch.get_num_threads() // workers)
    return lambda: torch.set_num_threads(share)


def _decoders(device: str, codec: str | None) -> Callable[[bytes], Codec]:
    """A function from a file's bytes to the codec that decodes it, each loaded once."""
    import compand
    from compand.allocator import tune_allocator

    tune_allocator()
    if codec is not None:
        model = compand.load(codec, device=device)
        return lambda data: model
    loaded: dict[str, Codec] = {}
    lock = threading.Lock()

    def codec_of(data: bytes) -> Codec:
        from compand.checkpoint import for_header
        from compand.coding.container import read_header

        name = for_header(read_header(data)).name
        with lock:
            if name not in loaded:
                loaded[name] = compand.load(name, device=device)
        return loaded[name]

    return codec_of


def _is_image(path: Path) -> bool:
    from compand.pictures import is_image_path

    return is_image_path(path)


def _is_cpd(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def _pillow_format(suffix: str) -> str:
    from PIL import Image

    found = Image.registered_extensions().get(suffix)
    if found is None or found not in Image.SAVE:
        raise UsageError(f"{suffix} is no picture format that can be written: use --format png")
    return found


def _arrow(job: files.Job) -> str:
    return f"{job.source.name} -> {'standard output' if job.target is None else job.target}"


# -------------------------------------------------------------------------------- info, verify, codecs


@app.command()
def info(paths: Files, recursive: Recursive = False, as_json: Json = False) -> None:
    """Show what .cpd files hold. Nothing is decoded."""
    from compand.coding import container

    inputs, failures = files.expand(paths, _is_cpd, recursive=recursive)
    records = []
    for item in inputs:
        try:
            data = item.read()
            record = _describe(item.name, data, container.read(data, partial=True))
        except (CompandError, OSError) as error:
            failures.append(files.Failure(item.name, files.explain(error, item.name)))
            continue
        failures.extend(files.Failure(item.name, f"{item.name}: {fault}") for fault in record["damage"])
        records.append(record)
        if not as_json:
            print(_as_text(record))
    if as_json:
        print(json.dumps(records, indent=2))
    files.report_failures(failures)
    raise typer.Exit(1 if failures else 0)


def _describe(name: str, data: bytes, content: Container) -> dict[str, Any]:
    from compand.checkpoint import for_header
    from compand.coding.container import ExtraKind, ImageGeometry
    from compand.registry import QUALITY_STEPS

    header = content.header
    try:
        checkpoint = for_header(header)
        codec, release = checkpoint.codec, checkpoint.name
    except CheckpointError:
        codec, release = header.codec_name or f"codec {header.codec_id}", None
    record: dict[str, Any] = {"file": name, "codec": codec, "checkpoint": release, "bytes": len(data)}
    shape = header.geometry
    if isinstance(shape, ImageGeometry):
        record |= {
            "medium": "image",
            "width": shape.width,
            "height": shape.height,
            "channels": shape.channels,
            "bit_depth": shape.bit_depth,
            "quality": header.settings[0] / QUALITY_STEPS if header.settings else None,
            "bpp": 8 * len(data) / (shape.width * shape.height),
        }
    else:
        record |= {
            "medium": "audio",
            "samples": shape.samples,
            "sample_rate": shape.sample_rate,
            "channels": shape.channels,
            "kbps": 8 * len(data) * shape.sample_rate / (1000 * shape.samples),
        }
    known = {kind.value: kind.name.lower() for kind in ExtraKind}
    return record | {
        "chunks": header.chunk_count(),
        "chunk_size": header.chunk_size,
        "header_bytes": content.header_bytes,
        "extras": {
            known.get(extra.kind, f"kind {extra.kind}"): len(extra.payload) for extra in content.extras
        },
        "compact": header.compact,
        "format_version": header.version,
        "settings": list(header.settings),
        "symbols": header.symbols.hex(),
        "synthesis": header.synthesis.hex(),
        "damage": [str(fault) for fault in content.damage],
    }


def _as_text(record: dict[str, Any]) -> str:
    if record["medium"] == "image":
        color = "gray" if record["channels"] == 1 else "RGB"
        content = f"{record['width']} x {record['height']} pixels, {color}, {record['bit_depth']} bit"
        rate = f"{record['bpp']:.3f} bpp"
    else:
        content = f"{record['samples']} samples at {record['sample_rate']} Hz, {record['channels']} channels"
        rate = f"{record['kbps']:.2f} kbps"
    tiles = f", {record['chunk_size']} a side" if record["chunks"] > 1 and record["medium"] == "image" else ""
    rows = [
        ("codec", f"{record['codec']}, {record['checkpoint'] or 'no checkpoint for it is installed'}"),
        (record["medium"], content),
        ("quality", f"{record['quality']:g}" if record.get("quality") is not None else ""),
        ("size", f"{record['bytes']} bytes, {rate}"),
        ("chunks", f"{record['chunks']}{tiles}"),
        ("header", f"{record['header_bytes']} bytes{', compact' if record['compact'] else ''}"),
        ("extras", ", ".join(f"{kind} ({size} bytes)" for kind, size in record["extras"].items())),
        ("damage", f"{len(record['damage'])} parts" if record["damage"] else ""),
    ]
    return "\n".join([record["file"], *(f"  {label:<8} {value}" for label, value in rows if value)])


@app.command()
def verify(
    paths: Files,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode all symbols too, not the checksums alone.")
    ] = False,
    codec: Annotated[
        str | None,
        typer.Option("-c", "--codec", help="Checkpoint for --deep.", show_default="what the file asks for"),
    ] = None,
    device: Device = "auto",
    recursive: Recursive = False,
    quiet: Quiet = False,
) -> None:
    """Check that .cpd files are intact."""
    from compand.coding import container

    inputs, failures = files.expand(paths, _is_cpd, recursive=recursive)
    codec_of = _decoders(device, codec) if deep and inputs else None

    def work(job: files.Job, progress: files.Progress) -> files.Done:
        data = job.source.read()
        content = container.read(data)
        if codec_of is not None:
            codec_of(data).check(data, progress=progress)
        count = len(content.chunks)
        return files.Done(f"{job.source.name}: intact, {count} chunk{'s' * (count != 1)}, {len(data)} bytes")

    jobs = [files.Job(item, None) for item in inputs]
    raise typer.Exit(0 if files.run_batch(jobs, work, failures=failures, quiet=quiet) else 1)


@app.command()
def codecs(as_json: Json = False) -> None:
    """List the installed checkpoints."""
    import compand

    checkpoints = compand.available()
    if as_json:
        records = [
            {
                "name": item.name,
                "codec": item.codec,
                "codec_id": item.codec_id,
                "version": item.version,
                "medium": item.medium,
                "description": item.description,
                "parameters": item.parameters,
                "bytes": item.size,
                "qualities": list(item.qualities),
                "symbols": item.symbols.hex(),
                "synthesis": item.synthesis.hex(),
                "path": str(item.path),
            }
            for item in checkpoints
        ]
        print(json.dumps(records, indent=2))
        return
    if not checkpoints:
        print("compand: no checkpoint is installed; reinstall compand or train one", file=sys.stderr)
        raise typer.Exit(1)
    head = ("NAME", "MEDIUM", "QUALITY", "PARAMETERS", "SIZE", "DESCRIPTION")
    rows = [
        (
            item.name,
            item.medium,
            "{:g} to {:g}".format(*item.qualities),
            f"{item.parameters / 1e6:.1f} M",
            f"{item.size / 1e6:.1f} MB",
            item.description,
        )
        for item in checkpoints
    ]
    print(table([head, *rows]))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in left-aligned columns.

    >>> print(table([("a", "bc"), ("def", "g")]))
    a    bc
    def  g
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# ------------------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The comparison; the .cpd is put beside it.")
    ] = Path("compand-demo.png"),
    quality: Annotated[float, typer.Option("-q", "--quality", help="Quality, fractions too.")] = 4.0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Encode a photograph and compare it with JPEG and WebP."""
    from compand import demo as demonstration

    result = demonstration.run(output, quality=quality, device=device, force=force)
    head = ("", "BYTES", "BPP", "PSNR dB", "")
    rows = [
        (row.name, str(row.size), f"{row.bpp:.3f}", f"{row.psnr:.2f}", row.remark)
        for row in result.comparisons
    ]
    print(table([head, *rows]))
    print(f"written: {result.bitstream}, {result.picture}")


# ------------------------------------------------------------------------- commands of the other packages


PASS_ON: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}


@app.command(**PASS_ON)
def train(context: typer.Context) -> None:
    """Train a codec (needs the extra: pip install "compand[train]")."""
    _hand_over_signals("compand.train.cli", context.args)


@app.command(**PASS_ON)
def export(context: typer.Context) -> None:
    """Turn a trained model into a checkpoint (needs the extra: pip install "compand[train]")."""
    _hand_over_signals("compand.train.export", context.args)


@app.command("eval", **PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Measure codecs: rate-distortion, machine perception, speed (needs the extra: pip install "compand[eval]")."""
    _entry("compand.eval.cli", "eval")(context.args)


def _entry(module: str, extra: str) -> Callable[[list[str]], None]:
    """The main function of another command line."""
    try:
        main: Callable[[list[str]], None] = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "compand":
            raise
        raise UsageError(f'{error.name} is not installed: pip install "compand[{extra}]"') from error
    return main


def _hand_over_signals(module: str, arguments: list[str]) -> None:
    """Run a command line of training. Signals are its own; unexpected errors keep tracebacks."""
    files.default_signals()
    entry = _entry(module, "train")
    try:
        entry(arguments)
    except CompandError:
        raise
    except Exception:
        traceback.print_exc()
        raise typer.Exit(1) from None


if __name__ == "__main__":
    main()
