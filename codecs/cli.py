"""The command line. Commands import what they need when they run: `--help` loads neither torch nor Pillow."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from compand import files, media
from compand.errors import CheckpointError, CompandError, UsageError

if TYPE_CHECKING:
    from compand import BitstreamError, Codec
    from compand.audio_codec import AudioCodec
    from compand.coding.container import AudioGeometry, Container, ImageGeometry

SUFFIX = ".cpd"

# Plain help: the rich kind takes longer to import than all the rest.
app = typer.Typer(
    name="compand",
    help="Learned codecs for images and audio: small files that decode on every machine.",
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
        str | None,
        typer.Option(
            "-c",
            "--codec",
            help="Checkpoint: a name or a folder.",
            show_default="hyperprior for pictures, wavelet-stereo-2x for sounds",
        ),
    ] = None,
    quality: Annotated[
        float | None, typer.Option("-q", "--quality", help="Quality, fractions too.", show_default="4")
    ] = None,
    bpp: Annotated[
        float | None, typer.Option("--bpp", help="Search the quality: bits per pixel at most.")
    ] = None,
    kbps: Annotated[
        float | None, typer.Option("--kbps", help="Search the quality: kilobits per second at most.")
    ] = None,
    psnr: Annotated[
        float | None, typer.Option("--psnr", help="Search the quality: PSNR in dB at least.")
    ] = None,
    strip: Annotated[
        bool, typer.Option("--strip", help="Pictures: convert to sRGB and drop the color profile.")
    ] = False,
    compact: Annotated[
        bool | None,
        typer.Option(
            "--compact/--no-compact", help="Pictures: shortest header.", show_default="for tiny files"
        ),
    ] = None,
    packets: Annotated[
        int,
        typer.Option(
            "--packets",
            min=0,
            max=255,
            help="Codecs with tokens: parts of a tile or segment that damage costs one by one; 0: none.",
        ),
    ] = 0,
    effort: Annotated[
        int,
        typer.Option(
            "--effort",
            min=0,
            max=3,
            help="Pictures: search for better symbols in 60, 250 or 1000 steps (1, 2, 3). On a CPU a step takes about "
            "half a second for 768 x 512 pixels.",
        ),
    ] = 0,
    device: Device = "auto",
    force: Force = False,
    skip_existing: SkipExisting = False,
    recursive: Recursive = False,
    jobs: Workers = 1,
    quiet: Quiet = False,
) -> None:
    """Encode pictures and sounds to .cpd files.

    photo.png becomes photo.cpd beside it, or in the folder -o. Where photo.png and photo.jpg both are encoded
    into one folder, they become photo.png.cpd and photo.jpg.cpd.
    """
    values = {"quality": quality, "bpp": bpp, "kbps": kbps, "psnr": psnr}
    targets = {name: value for name, value in values.items() if value is not None}
    for other_medium in ("bpp", "kbps"):  # these two do not exclude each other: a folder may hold both media
        given = [name for name in targets if name != other_medium]
        if len(given) > 1:
            raise UsageError(f"--{' and --'.join(given)} exclude each other: give one")
    if output not in (None, files.STREAM) and not Path(output).is_dir() and _is_medium(Path(output)):
        raise UsageError(f"-o {output}: encode writes {SUFFIX} files; name one, or a folder")
    only = None if codec is None else _medium_of_codec(codec)

    def prepare(planned: Sequence[files.Job]) -> files.Work:
        import compand
        from compand.allocator import tune_allocator

        medium_of = {job: only or _medium_of_input(job.source) for job in planned}
        options_of = {job: _rate_options(job, medium, targets) for job, medium in medium_of.items()}
        sounds = [job.source.name for job, medium in medium_of.items() if medium == "audio"]
        if effort and sounds:
            raise UsageError(f"{sounds[0]} is coded as a sound: --effort is for pictures, leave it out")
        tune_allocator()
        models = {
            medium: compand.load(codec or media.DEFAULT_CODEC[medium], device=device)
            for medium in sorted(set(medium_of.values()))
        }
        # Left out where it is not asked for, so that codecs of other packages need not know it.
        asked = {"packets": packets, "effort": effort}
        parts = {name: value for name, value in asked.items() if value}

        def work(job: files.Job, progress: files.Progress) -> files.Done:
            model, options = models[medium_of[job]], options_of[job] | parts
            if medium_of[job] == "audio":
                return _encode_sound(job, cast("AudioCodec", model), progress, options, force=force)
            return _encode_picture(job, model, progress, options, strip=strip, compact=compact, force=force)

        return work

    _convert(
        inputs, output, SUFFIX, lambda path: _is_medium(path, only), prepare,
        force=force, skip_existing=skip_existing, recursive=recursive, workers=jobs, quiet=quiet,
    )  # fmt: skip


def _encode_picture(
    job: files.Job,
    model: Codec,
    progress: files.Progress,
    options: dict[str, Any],
    *,
    strip: bool,
    compact: bool | None,
    force: bool,
) -> files.Done:
    from compand.pictures import read_picture

    path = job.source.path
    picture = read_picture(io.BytesIO(job.source.read()) if path is None else path, strip=strip)
    data = model.encode(picture, compact=compact, progress=progress, **options)
    files.write_output(job, data, force=force)
    bits = 8 * len(data) / (picture.height * picture.width)
    size = f"{picture.width} x {picture.height}, {len(data)} bytes, {bits:.3f} bpp"
    return files.Done(f"{_arrow(job)}: {size}", notes=(*picture.notes, *_growth(job, data)))


def _encode_sound(
    job: files.Job, model: AudioCodec, progress: files.Progress, options: dict[str, Any], *, force: bool
) -> files.Done:
    from compand.coding.container import AudioGeometry, read_header

    path = job.source.path
    with nullcontext(path) if path is not None else files.spooled_stdin() as source:
        data = model.encode(source, progress=progress, **options)
    files.write_output(job, data, force=force)
    shape = read_header(data).geometry
    assert isinstance(shape, AudioGeometry)
    kbps = 8 * len(data) * shape.sample_rate / (1000 * shape.samples)
    recording = _recording(shape.samples, shape.sample_rate, shape.channels)
    line = f"{_arrow(job)}: {recording}, {len(data)} bytes, {kbps:.2f} kbps"
    return files.Done(line, notes=_growth(job, data))


def _growth(job: files.Job, data: bytes) -> tuple[str, ...]:
    """A note where the file is larger than what was encoded."""
    path = job.source.path
    if path is None or len(data) <= (before := path.stat().st_size):
        return ()
    return (f"{len(data)} bytes, more than the {before} of the original; try a lower quality",)


def _rate_options(job: files.Job, medium: str, targets: dict[str, float]) -> dict[str, float]:
    """The options of a medium's rate. Raises UsageError where there is one of the other medium alone."""
    thing, own, other, others = (
        ("sound", "kbps", "bpp", "pictures") if medium == "audio" else ("picture", "bpp", "kbps", "sounds")
    )
    if tuple(targets) == (other,):
        raise UsageError(f"{job.source.name} is coded as a {thing}: --{other} is for {others}, give --{own}")
    return {name: value for name, value in targets.items() if name != other}


@app.command()
def decode(
    inputs: Files,
    output: Output = None,
    media_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="png, webp, jpg, wav, flac, mp3, ...", show_default="suffix of -o, or png, wav"
        ),
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
    conceal: Annotated[
        bool,
        typer.Option(
            "--conceal", help="As --partial; lost packets of tokens (encode --packets) are estimated."
        ),
    ] = False,
    device: Device = "auto",
    force: Force = False,
    skip_existing: SkipExisting = False,
    recursive: Recursive = False,
    jobs: Workers = 1,
    quiet: Quiet = False,
) -> None:
    """Decode .cpd files to pictures and sounds.

    photo.cpd becomes photo.png beside it, or in the folder -o; photo.jpg.cpd becomes photo.jpg.png. song.cpd
    becomes song.wav.
    """
    several = files.means_several(inputs)
    named = Path(output).suffix if output not in (None, files.STREAM) and not several else ""
    chosen = f".{media_format.lower().lstrip('.')}" if media_format else named.lower()

    def suffix_of(item: files.Input) -> str:
        return _output_suffix(item.name, item.opening(media.OPENING_BYTES), chosen)

    def prepare(planned: Sequence[files.Job]) -> files.Work:
        codec_of = _decoders(device, codec, partial=partial or conceal)
        # As with packets of `encode`.
        options: dict[str, Any] = {"partial": partial} | ({"conceal": True} if conceal else {})

        def work(job: files.Job, progress: files.Progress) -> files.Done:
            data = job.source.read()
            suffix = _output_suffix(job.source.name, data, chosen)
            model = codec_of(data)
            if model.medium == "audio":
                sounds = cast("AudioCodec", model)
                return _decode_sound(job, sounds, data, suffix, progress, options, force=force)
            return _decode_picture(job, model, data, suffix, progress, options, force=force)

        return work

    _convert(
        inputs, output, suffix_of, _is_cpd, prepare,
        force=force, skip_existing=skip_existing, recursive=recursive, workers=jobs, quiet=quiet,
    )  # fmt: skip


def _decode_picture(
    job: files.Job,
    model: Codec,
    data: bytes,
    suffix: str,
    progress: files.Progress,
    options: Mapping[str, bool],
    *,
    force: bool,
) -> files.Done:
    picture = model.decode(data, progress=progress, **options)
    # In memory first: a picture that cannot be written in this format is then told from a full disk.
    stream = io.BytesIO()
    picture.save(stream, format=suffix)
    files.write_output(job, stream.getvalue(), force=force)
    line = f"{_arrow(job)}: {picture.width} x {picture.height}"
    return files.Done(line, picture.notes, _losses(job, picture.damage))


def _decode_sound(
    job: files.Job,
    model: AudioCodec,
    data: bytes,
    suffix: str,
    progress: files.Progress,
    options: Mapping[str, bool],
    *,
    force: bool,
) -> files.Done:
    from compand.sounds import SoundWriter

    samples = 0
    blocks = model.decode_blocks(data, progress=progress, **options)
    with (
        files.open_output(job, force=force) as stream,
        SoundWriter(stream, blocks.rate, blocks.channels, format=suffix) as writer,
    ):
        for block in blocks:
            writer.write(block)
            samples += block.shape[1]
    line = f"{_arrow(job)}: {_recording(samples, blocks.rate, blocks.channels)}"
    return files.Done(line, warnings=_losses(job, blocks.damage))


def _losses(job: files.Job, damage: Sequence[BitstreamError]) -> tuple[str, ...]:
    return tuple(f"decoded in part: {files.explain(error, job.source.name)}" for error in damage)


def _convert(
    arguments: list[str],
    output: str | None,
    suffix: str | Callable[[files.Input], str],
    accept: Callable[[Path], bool],
    prepare: Callable[[Sequence[files.Job]], files.Work],
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
        prepare(jobs),
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


def _decoders(device: str, codec: str | None, *, partial: bool = False) -> Callable[[bytes], Codec]:
    """A function from a file's bytes to the codec that decodes it, each loaded once.

    partial: whether the end of the file may be missing.
    """
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

        name = for_header(read_header(data, partial=partial)).name
        with lock:
            if name not in loaded:
                loaded[name] = compand.load(name, device=device)
        return loaded[name]

    return codec_of


def _is_medium(path: Path, only: str | None = None) -> bool:
    """Whether a name is a picture's or a sound's; with `only`, of that medium."""
    from compand.pictures import is_image_path
    from compand.sounds import is_sound_path

    return (only != "audio" and is_image_path(path)) or (only != "image" and is_sound_path(path))


def _medium_of_codec(codec: str) -> str:
    from compand.checkpoint import find

    return find(codec).medium


def _medium_of_input(item: files.Input) -> str:
    if item.path is None:
        return media.medium_of_opening(item.opening(media.OPENING_BYTES))
    return media.medium_of_path(item.path)


def _is_cpd(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def _output_suffix(name: str, opening: bytes, chosen: str) -> str:
    """The suffix, and by it the format, of what a .cpd file becomes.

    Args:
        opening: its first bytes, which tell its medium.
        chosen: what the user asked for; "": WAV, PNG, or a numpy array where no picture format has as many bands.

    Raises:
        UsageError: there is no such format for what the file holds.
    """
    kind = media.kind_of_cpd(opening)
    if kind == "audio":
        from compand.sounds import is_sound_path

        if chosen and not is_sound_path(f"sound{chosen}"):
            fact = f"{chosen} is no sound format that can be written"
            raise UsageError(f"{name} holds a sound and {fact}: use --format wav")
        return chosen or ".wav"
    if kind is not None and chosen not in ("", ".npy"):
        from PIL import Image

        if Image.registered_extensions().get(chosen) not in Image.SAVE:
            fact = f"{chosen} is no picture format that can be written"
            raise UsageError(f"{name} holds a picture and {fact}: use --format png")
    return chosen or (".npy" if kind == "bands" else ".png")


def _recording(samples: int, rate: int, channels: int) -> str:
    """Duration, sample rate and channels, for a reader."""
    layout = {1: "mono", 2: "stereo"}.get(channels, f"{channels} channels")
    duration = _duration(samples / rate) if samples else "unknown length"
    return f"{duration}, {rate} Hz, {layout}"


def _duration(seconds: float) -> str:
    """
    >>> _duration(0.25), _duration(62.5), _duration(3600)
    ('0.250 s', '1:02.500', '1:00:00.000')
    """
    whole, milliseconds = divmod(round(1000 * seconds), 1000)
    if whole < 60:
        return f"{whole}.{milliseconds:03d} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{clock}:{rest:02d}.{milliseconds:03d}"


def _arrow(job: files.Job) -> str:
    return f"{job.source.name} -> {'standard output' if job.target is None else job.target}"


# -------------------------------------------------------------------------------- info, verify, codecs


@app.command()
def info(
    paths: Annotated[
        list[str], typer.Argument(help=".cpd files, folders, patterns, packed sets, or - for standard input.")
    ],
    recursive: Recursive = False,
    as_json: Json = False,
    grid: Annotated[
        Path | None, typer.Option("--grid", help="Packed set of pictures: write the first 16 here, decoded.")
    ] = None,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Show what .cpd files and packed sets hold. Nothing is decoded, but for --grid."""
    from compand.coding import container

    sets = [path for path in paths if _is_packed(path)]
    if grid is not None and not len(paths) == len(sets) == 1:
        raise UsageError("--grid shows one packed set: name one")
    inputs, failures = files.expand(
        [path for path in paths if path not in sets], _is_cpd, recursive=recursive
    )
    records = []
    for path in sets:
        from compand.data.describe import as_text, describe, write_grid

        try:
            record = describe(path)
        except (CompandError, OSError) as error:
            failures.append(files.Failure(path, files.explain(error, path)))
            continue
        records.append(record)
        if not as_json:
            print(as_text(record))
        if grid is not None:
            write_grid(path, grid, device=device, force=force)
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
    from compand.registry import QUALITY_STEPS, entries

    header = content.header
    latent = None
    try:
        checkpoint = for_header(header)
        codec, release, latent = checkpoint.codec, checkpoint.name, checkpoint.latent
    except CheckpointError:
        named = {entry.codec_id: entry.name for entry in entries() if entry.codec_id}
        codec = header.codec_name or named.get(header.codec_id, f"codec {header.codec_id}")
        release = None
    record: dict[str, Any] = {"file": name, "codec": codec, "checkpoint": release, "bytes": len(data)}
    shape = header.geometry
    record["quality"] = header.settings[0] / QUALITY_STEPS if header.settings else None
    record["latent_shape"] = _latent_shape(shape, latent)
    record |= _token_facts(shape, latent, header.settings)
    if isinstance(shape, ImageGeometry):
        record |= {
            "medium": "image",
            "width": shape.width,
            "height": shape.height,
            "channels": shape.channels,
            "bit_depth": shape.bit_depth,
            "bpp": 8 * len(data) / (shape.width * shape.height),
        }
    else:
        record |= {
            "medium": "audio",
            "samples": shape.samples,
            "sample_rate": shape.sample_rate,
            "channels": shape.channels,
            "seconds": shape.samples / shape.sample_rate,
            "kbps": 8 * len(data) * shape.sample_rate / (1000 * shape.samples) if shape.samples else None,
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


def _latent_shape(shape: ImageGeometry | AudioGeometry, layout: Mapping[str, Any] | None) -> list[int] | None:
    """The shape of what `Codec.latents` returns for a file, from `Codec.latent_layout`; None where it is not known."""
    from compand.coding.container import ImageGeometry

    if layout is None:
        return None
    channels, stride = layout["channels"], layout["stride"]
    if isinstance(shape, ImageGeometry):
        return [channels, -(-shape.height // stride), -(-shape.width // stride)]
    if not shape.samples:
        return None
    from compand.sounds import resampling_ratio

    groups = -(-shape.channels // layout["group"])
    coded = math.ceil(shape.samples * resampling_ratio(shape.sample_rate, layout["rate"]))
    return [*([groups] if groups > 1 else []), channels, -(-coded // stride)]


def _token_facts(
    shape: ImageGeometry | AudioGeometry, layout: Mapping[str, Any] | None, settings: Sequence[int]
) -> dict[str, Any]:
    """The shape of what `Codec.tokens` returns for a file, the codes of each codebook and, of sounds, frames a second;
    each None where there are none, or it is not known."""
    from compand.coding.container import ImageGeometry
    from compand.registry import QUALITY_STEPS

    facts: dict[str, Any] = {"token_shape": None, "vocabulary": None, "token_rate": None}
    level = settings[0] // QUALITY_STEPS if settings else 0
    if layout is None or not 1 <= level <= len(layout.get("vocabulary", ())):
        return facts
    facts["vocabulary"] = sizes = layout["vocabulary"][level - 1]
    latents, stride = _latent_shape(shape, layout), layout["stride"]
    if isinstance(shape, ImageGeometry):
        assert latents is not None
        facts["token_shape"] = [*([len(sizes)] if len(sizes) > 1 else []), *latents[1:]]
        return facts
    facts["token_rate"] = (layout["rate"] or shape.sample_rate) / stride
    if latents is not None:
        frames = latents[-1] + 2 * layout.get("edge", 0) // stride
        facts["token_shape"] = [*latents[:-2], len(sizes), frames]
    return facts


def _tokens_as_text(record: dict[str, Any]) -> str:
    from compand.data.info import sizes_as_text

    if record["vocabulary"] is None:
        return ""
    shape = f"{' x '.join(map(str, record['token_shape']))} " if record["token_shape"] else ""
    rate = f", {record['token_rate']:g} frames/s" if record["token_rate"] else ""
    return f"{shape}of {sizes_as_text(record['vocabulary'])} codes{rate}"


def _missing(record: dict[str, Any]) -> str:
    return f"no checkpoint with symbols fingerprint {record['symbols']} is installed"


def _as_text(record: dict[str, Any]) -> str:
    if record["medium"] == "image":
        color = {1: "gray", 3: "RGB"}.get(record["channels"], f"{record['channels']} bands")
        content = f"{record['width']} x {record['height']} pixels, {color}, {record['bit_depth']} bit"
        rate = f"{record['bpp']:.3f} bpp"
        parts, size = "tiles", f", {record['chunk_size']} a side"
    else:
        content = _recording(record["samples"], record["sample_rate"], record["channels"])
        content += f", {record['samples']} samples" if record["samples"] else ""
        rate = f"{record['kbps']:.2f} kbps" if record["samples"] else "an unknown rate"
        parts, size = "segments", f" of {record['chunk_size']} samples"
    rows = [
        ("codec", f"{record['codec']}, {record['checkpoint'] or _missing(record)}"),
        (record["medium"], content),
        ("quality", f"{record['quality']:g}" if record["quality"] is not None else ""),
        ("size", f"{record['bytes']} bytes, {rate}"),
        (parts, f"{record['chunks']}{size if record['chunks'] > 1 else ''}"),
        ("latents", " x ".join(map(str, record["latent_shape"] or ()))),
        ("tokens", _tokens_as_text(record)),
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
    """Check that .cpd files and packed sets are intact."""
    from compand.coding import container

    sets = [path for path in paths if _is_packed(path)]
    inputs, failures = files.expand(
        [path for path in paths if path not in sets], _is_cpd, recursive=recursive
    )
    for path in sets:
        failures += _verify_set(path, quiet=quiet)
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


def _is_packed(path: str) -> bool:
    """Whether a path is a packed set or a shard of one."""
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, name)) for name in ("packed.json", "packing.json"))
    return path.endswith(".parquet")


def _verify_set(path: str, *, quiet: bool) -> list[files.Failure]:
    from compand.data.packed import PackedReader, check_set

    faults = check_set(path)
    if not faults and not quiet:
        files.say(f"{path}: intact, {len(PackedReader(path))} rows", sys.stdout)
    return [files.Failure(path, files.explain(fault, path)) for fault in faults]


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
                "vocabulary": (item.latent or {}).get("vocabulary"),
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


# ------------------------------------------------------------------------------------------ packed data sets


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a manifest (.csv, .tsv, .jsonl), Parquet, a Hugging Face data set or hf:NAME[:SPLIT]."
        ),
    ],
    target: Annotated[str, typer.Argument(help="Folder or URL of the packed set.")],
    codec: Annotated[str, typer.Option("-c", "--codec", help="Checkpoint: a name or a folder.")],
    quality: Annotated[float, typer.Option("-q", "--quality", help="Quality, fractions too.")] = 4.0,
    profile: Annotated[
        str,
        typer.Option(
            "--profile", help="train (fastest to read), archive (smaller) or cpd (a .cpd file a row)."
        ),
    ] = "train",
    compression: Annotated[
        str, typer.Option("--compression", help="Of the profile train: zstd or lz4.")
    ] = "zstd",
    shard_mb: Annotated[float, typer.Option("--shard-mb", help="Size of a shard at most, about.")] = 256,
    rows_per_shard: Annotated[int, typer.Option("--rows-per-shard", help="Rows of a shard at most.")] = 4096,
    order: Annotated[
        str, typer.Option("--order", help="hashed (classes mixed) or sorted, by the key.")
    ] = "hashed",
    label: Annotated[
        str | None, typer.Option("--label", help="Column of the labels.", show_default="label")
    ] = None,
    media_column: Annotated[
        str | None,
        typer.Option("--media", help="Column of the media.", show_default="path, or the one of bytes"),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="Column of the keys.", show_default="key, or path or row number"),
    ] = None,
    allow_empty_class: Annotated[
        bool, typer.Option("--allow-empty-class", help="Leave class folders without a file out.")
    ] = False,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray: on a cluster.")] = "local",
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="End at the first input that cannot be packed.")
    ] = False,
    device: Device = "auto",
    jobs: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            min=1,
            help="Processes; threads that read, on a GPU; actors, on Ray.",
            show_default="1",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("-f", "--force", help="Begin anew where TARGET holds a packed set.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Pack a data set of pictures or sounds for training.

    Rows hold latents, so that nothing has to be decoded to learn from them. Labels are the names of class folders, or
    a column. Inputs that cannot be packed are listed in failures.csv and left out; the exit status is 1 then. After an
    interruption the same command goes on.
    """
    from compand.data.local_engine import run_local
    from compand.data.meter import Meter
    from compand.data.pack import start

    if engine not in ("local", "ray"):
        raise UsageError(f"--engine {engine} does not exist: choose local or ray")
    packing = start(
        source, target, codec=codec, quality=quality, profile=profile, compression=compression,
        shard_mb=shard_mb, rows_per_shard=rows_per_shard, order=order, label=label, media=media_column, key=key,
        device=device, allow_empty_class=allow_empty_class, fail_fast=fail_fast, force=force,
    )  # fmt: skip
    with Meter(packing, shown=not quiet) as meter:
        if engine == "ray":
            from compand.data import ray_engine

            summary = ray_engine.pack(packing, workers=jobs, progress=meter.add_chunk)
        else:
            # After an interrupt, Python's tracker of semaphores removes those of the workers, and need not say so.
            sys.warnoptions.append("ignore:resource_tracker:UserWarning")
            run_local(packing, jobs=jobs or 1, progress=meter.add)
            summary = packing.finish()
    if not quiet:
        files.say(meter.summary(summary), sys.stdout)
    if summary.failures:
        fact = f"{summary.failures} input{'s' * (summary.failures != 1)} could not be packed"
        print(f"compand: {fact}: see {target}/failures.csv", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def unpack(
    source: Annotated[str, typer.Argument(help="A packed set, or a shard of one.")],
    target: Annotated[str, typer.Argument(help="Folder or URL of the files.")],
    media_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="png, jpg, wav, flac, ...; cpd; npy: the integers of the latents.",
            show_default="png, wav; with --to webdataset what the set holds",
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="files, or webdataset: tar shards.")] = "files",
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Restore files from a packed set, named by their keys, or export it for webdataset."""
    from compand.allocator import tune_allocator
    from compand.data.unpack import unpack as restore

    if to not in ("files", "webdataset"):
        raise UsageError(f"--to {to} does not exist: choose files or webdataset")
    tune_allocator()
    count, damaged = restore(
        source, target, media_format=media_format, webdataset=to == "webdataset", device=device, force=force
    )
    files.report_failures([files.Failure(key, reason) for key, reason in damaged])
    if not quiet:
        files.say(f"{source} -> {target}: {count} row{'s' * (count != 1)}", sys.stdout)
    raise typer.Exit(1 if damaged else 0)


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


@app.command("import-compressai", **PASS_ON)
def import_compressai(context: typer.Context) -> None:
    """Turn weights of CompressAI into a checkpoint (needs the extra: pip install "compand[train]")."""
    _hand_over_signals("compand.train.import_compressai", context.args)


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
