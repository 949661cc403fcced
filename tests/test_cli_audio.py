"""The command line and the top-level functions on sounds, with a small checkpoint."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import compand
from compand import checkpoint, cli, files, media
from compand.coding import container
from compand.sounds import Sound, SoundWriter, read_sound

RATE = 44100
LONG = 300_000  # samples: more than two segments


@pytest.fixture(scope="module")
def folder(checkpoint_of) -> Path:
    return checkpoint_of("wavelet-audio")


@pytest.fixture(autouse=True)
def default_codec(folder, monkeypatch):
    """The small checkpoint in the place of the released one."""
    released = [info for info in checkpoint.available() if info.medium == "image"]
    infos = (*released, checkpoint.read_info(folder))
    monkeypatch.setattr(checkpoint, "_shipped", lambda: infos)
    monkeypatch.setitem(media.DEFAULT_CODEC, "audio", infos[-1].name)


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tone(samples: int = 6000, channels: int = 2, rate: int = RATE) -> Sound:
    """A chord in every channel, with a little noise."""
    time = np.arange(samples) / rate
    pitches = 220.0 * (1 + np.arange(channels))[:, None]
    noise = np.random.default_rng(samples).normal(0, 0.003, (channels, samples))
    chord = 0.4 * np.sin(2 * np.pi * pitches * time) + 0.2 * np.sin(5 * np.pi * pitches * time)
    return Sound((chord + noise).astype(np.float32), rate)


def sound(path: str, *arguments: int, **options: int) -> Sound:
    made = tone(*arguments, **options)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


def picture(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)).save(path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


def names() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*") if path.is_file())


def layout(path: str) -> tuple[int, int, int]:
    read = read_sound(path)
    return read.channels, read.length, read.rate


def program(*arguments: str, **options) -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "compand.cli", *arguments, "--device", "cpu"]
    return subprocess.run(command, capture_output=True, check=False, **options)


def damaged(path: str) -> None:
    """A flipped bit in the middle of the second segment of a file."""
    data = bytearray(Path(path).read_bytes())
    content = container.read(bytes(data))
    data[content.offsets[1] + len(content.chunks[1]) // 2] ^= 16
    Path(path).write_bytes(data)


# ---------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", ["song.wav", "song.flac", "song.ogg", "song.mp3"])
def test_every_format_comes_back_with_its_length_rate_and_channels(name, capsys):
    sound(name, 5001)
    length = read_sound(name).length
    assert run("encode", name, "-q", "3") == 0
    size = Path("song.cpd").stat().st_size
    line = f"{name} -> song.cpd: 0.{1000 * length / RATE:.0f} s, 44100 Hz, stereo, {size} bytes, "
    assert capsys.readouterr().out == f"{line}{8 * size * RATE / 1000 / length:.2f} kbps\n"
    assert run("decode", "song.cpd", "-o", "back/") == 0
    assert layout("back/song.wav") == (2, length, RATE)


def test_what_is_decoded_is_what_was_encoded():
    original = sound("song.wav", 20_000)
    assert run("encode", "song.wav", "-q", "8") == 0
    assert run("decode", "song.cpd", "-o", "back.wav") == 0
    error = read_sound("back.wav").samples - original.samples
    assert 10 * np.log10(np.mean(error**2)) < 10 * np.log10(np.mean(original.samples**2)) - 10


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        ((), "song.wav", ("WAV", "PCM_16")),
        (("-o", "x.flac"), "x.flac", ("FLAC", "PCM_16")),
        (("-o", "x.ogg"), "x.ogg", ("OGG", "VORBIS")),
        (("-o", "x.mp3"), "x.mp3", ("MP3", "MPEG_LAYER_III")),
        (("--format", "aiff"), "song.aiff", ("AIFF", "PCM_16")),
        (("-o", "x.bin", "--format", "FLAC"), "x.bin", ("FLAC", "PCM_16")),
    ],
)
def test_formats_of_the_output(arguments, name, kind):
    sound("in/song.wav")
    assert run("encode", "in/song.wav", "-o", "song.cpd") == 0
    assert run("decode", "song.cpd", *arguments) == 0
    written = soundfile.info(name)
    assert (written.format, written.subtype) == kind
    assert (written.samplerate, written.channels) == (RATE, 2)


def test_a_folder_of_both_media():
    sound("in/a.wav")
    sound("in/a.flac")
    picture("in/b.png")
    Path("in/notes.txt").touch()
    assert run("encode", "in", "-o", "packed", "-q", "2", "-j", "2", "--device", "cpu") == 0
    assert names()[-3:] == ["packed/a.flac.cpd", "packed/a.wav.cpd", "packed/b.cpd"]
    assert run("decode", "packed", "-o", "back", "--device", "cpu") == 0
    assert [name for name in names() if name.startswith("back")] == [
        "back/a.flac.wav",
        "back/a.wav",
        "back/b.png",
    ]
    assert layout("back/a.wav") == (2, 6000, RATE)


def test_a_codec_takes_its_medium_from_a_folder(folder):
    sound("in/a.wav")
    picture("in/b.png")
    assert run("encode", "in", "-c", str(folder)) == 0
    assert [name for name in names() if name.endswith(".cpd")] == ["in/a.cpd"]


def test_a_file_is_known_by_its_content_where_its_name_says_nothing():
    sound("a.flac")
    Path("a.flac").rename("track 1")
    assert run("encode", "track 1", "-o", "a.cpd") == 0
    assert container.read_header(Path("a.cpd").read_bytes()).geometry.samples == 6000


def test_standard_streams_carry_data_alone(folder, monkeypatch):
    original = sound("a.wav")
    encoded = program("encode", "-", "-c", str(folder), input=Path("a.wav").read_bytes())
    assert encoded.stderr.startswith(b"standard input -> standard output: 0.136 s, 44100 Hz, stereo")
    Path("a.cpd").write_bytes(encoded.stdout)
    with open("a.cpd") as stdin, open("b.flac", "w") as stdout, monkeypatch.context() as streams:
        streams.setattr(sys, "stdin", stdin)
        streams.setattr(sys, "stdout", stdout)
        assert run("decode", "-", "--format", "flac") == 0
    assert soundfile.info("b.flac").format == "FLAC"
    assert layout("b.flac") == (original.channels, original.length, original.rate)


def test_sounds_are_written_block_by_block(monkeypatch):
    sound("a.wav", LONG)
    assert run("encode", "a.wav", "-q", "1") == 0
    sizes, write = [], SoundWriter.write

    def recorded(writer: SoundWriter, samples: np.ndarray) -> None:
        sizes.append(samples.shape[1])
        write(writer, samples)

    monkeypatch.setattr(SoundWriter, "write", recorded)
    assert run("decode", "a.cpd", "-o", "b.wav") == 0
    assert sum(sizes) == LONG
    assert max(sizes) <= 2**18


# -------------------------------------------------------------------------------------------- rates, usage


def test_kbps_and_psnr_are_kept(capsys):
    original = sound("a.wav", 30_000)
    assert run("encode", "a.wav", "--kbps", "200", "-o", "rate.cpd") == 0
    assert 190_000 < 8 * Path("rate.cpd").stat().st_size / original.seconds <= 200_000
    assert run("encode", "a.wav", "--psnr", "32", "-o", "psnr.cpd") == 0
    decoded = compand.decode("psnr.cpd")
    assert 32 <= -10 * np.log10(np.mean((decoded.samples - original.samples) ** 2)) < 32.5
    assert run("encode", "a.wav", "--kbps", "1", "-o", "none.cpd") == 1
    assert "1 kbps cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", "a.wav", "--bpp", "1"), "a.wav is coded as a sound: --bpp is for pictures, give --kbps"),
        (
            ("encode", "b.png", "--kbps", "64"),
            "b.png is coded as a picture: --kbps is for sounds, give --bpp",
        ),
        (("encode", "a.wav", "-q", "2", "--kbps", "64"), "--quality and --kbps exclude each other: give one"),
        (("encode", "a.wav", "-q", "99"), "quality 99"),
        (("encode", "a.wav", "-o", "a.mp3"), "-o a.mp3: encode writes .cpd files; name one, or a folder"),
        (("decode", "c.cpd", "--format", "png"), "c.cpd holds a sound and .png is no sound format"),
        (("decode", "c.cpd", "-o", "x.jpg"), "c.cpd holds a sound and .jpg is no sound format"),
    ],
)
def test_wrong_usage_is_2_and_writes_nothing(arguments, message, capsys):
    sound("a.wav", 2000)
    picture("b.png")
    Path("c.cpd").write_bytes(compand.encode("a.wav"))
    before = names()
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert names() == before


def test_a_rate_for_each_medium_of_a_folder():
    sound("in/a.wav", 20_000)
    picture("in/b.png")
    assert run("encode", "in", "--bpp", "10", "--kbps", "300", "--device", "cpu") == 0
    assert 8 * Path("in/b.cpd").stat().st_size <= 10 * 24 * 32
    assert 8 * Path("in/a.cpd").stat().st_size <= 300_000 * 20_000 / RATE


def test_bad_sounds_are_one_line_each(capsys):
    sound("good.wav")
    Path("text.wav").write_text("no sound")
    Path("empty.flac").touch()
    soundfile.write("none.wav", np.zeros((0, 2), np.float32), RATE)
    soundfile.write("nan.wav", np.full((500, 1), np.nan, np.float32), RATE, subtype="FLOAT")
    bad = ["text.wav", "empty.flac", "none.wav", "nan.wav"]
    assert run("encode", *bad, "good.wav") == 1
    out, err = capsys.readouterr()
    assert out.startswith("good.wav -> good.cpd")
    head, *lines = err.splitlines()
    assert head == "compand: 4 failures:"
    assert [line.split()[0].rstrip(":") for line in lines] == bad
    assert not [name for name in names() if name.endswith(".cpd") and name != "good.cpd"]


def test_too_many_channels_are_a_fault_of_that_file_alone(capsys):
    sound("in/good.wav", 3000)
    soundfile.write("in/many.wav", np.zeros((500, 33), np.float32), RATE)
    assert run("encode", "in", "-o", "out") == 1
    assert "many.wav: the sound has 33 channels: at most 32 can be coded" in capsys.readouterr().err
    assert layout_of_packed() == ["out/good.cpd"]


def layout_of_packed() -> list[str]:
    return [name for name in names() if name.endswith(".cpd")]


def test_a_format_that_cannot_hold_the_sound_is_one_line(capsys):
    sound("a.wav", 4000, channels=6)
    assert run("encode", "a.wav") == 0
    assert run("decode", "a.cpd", "-o", "b.mp3") == 1
    err = capsys.readouterr().err
    assert err.startswith("compand: a.cpd: ") and err.count("\n") == 1 and "6 channels" in err
    assert names() == ["a.cpd", "a.wav"]


# ------------------------------------------------------------------------------------ damage, disk, signals


def test_damage_costs_its_segment_alone(capsys):
    sound("a.wav", LONG)
    assert run("encode", "a.wav", "-q", "2") == 0
    assert run("decode", "a.cpd", "-o", "whole.wav") == 0
    damaged("a.cpd")
    assert run("verify", "a.cpd") == 1
    assert run("decode", "a.cpd", "-o", "b.wav") == 1
    assert not Path("b.wav").exists()
    capsys.readouterr()
    assert run("decode", "a.cpd", "-o", "b.wav", "--partial") == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("compand: decoded in part: a.cpd: ") and "chunk 1" in line
    whole, part = read_sound("whole.wav").samples, read_sound("b.wav").samples
    assert whole.shape == part.shape
    assert np.array_equal(whole[:, :100_000], part[:, :100_000])
    assert np.abs(part[:, 180_000:200_000]).max() == 0


def test_a_file_that_is_cut_off_is_decoded_in_part(capsys):
    sound("a.wav", LONG)
    assert run("encode", "a.wav", "-q", "2") == 0
    data = Path("a.cpd").read_bytes()
    Path("a.cpd").write_bytes(data[: len(data) // 2])
    assert run("decode", "a.cpd", "-o", "b.wav") == 1
    assert run("decode", "a.cpd", "-o", "b.wav", "--partial") == 1
    channels, length, rate = layout("b.wav")
    assert (channels, rate) == (2, RATE)
    assert 100_000 < length <= LONG
    assert "Traceback" not in capsys.readouterr().err


def test_verify_deep_and_shallow(capsys):
    sound("a.wav", LONG)
    assert run("encode", "a.wav", "-q", "1", "--quiet") == 0
    assert run("verify", "a.cpd") == 0
    assert run("verify", "a.cpd", "--deep") == 0
    assert capsys.readouterr().out.count("a.cpd: intact, 3 chunks, ") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX resource limits")
def test_a_write_that_runs_out_of_room_is_one_line_and_leaves_nothing(folder):
    import resource

    sound("a.wav", LONG)
    assert run("encode", "a.wav", "-q", "1", "--quiet") == 0
    Path("a.wav").unlink()

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = program("decode", "a.cpd", "-c", str(folder), preexec_fn=little_room)
    assert done.returncode == 1
    assert done.stderr.decode() == "compand: a.cpd: cannot write a.wav: file too large\n"
    assert names() == ["a.cpd"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), files.Interrupted(2)], ids=type)
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_faults_of_a_stream_pass_through_libsndfile(suffix, fault, capfd):
    class Full(io.BytesIO):
        def write(self, data: bytes) -> int:
            if self.tell() > 1000:
                raise fault
            return super().write(data)

    samples = np.random.default_rng(0).normal(0, 0.1, (2, 100_000)).astype(np.float32)
    with pytest.raises(type(fault)) as raised, SoundWriter(Full(), RATE, 2, suffix) as writer:
        writer.write(samples)
    assert raised.value is fault
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------------------------------------ info, codecs


def test_info_as_text_and_as_json(capsys):
    sound("a.wav", LONG, channels=3)
    assert run("encode", "a.wav", "-q", "3.5", "--quiet") == 0
    assert run("info", "a.cpd") == 0
    text = capsys.readouterr().out
    assert "6.803 s, 44100 Hz, 3 channels, 300000 samples" in text
    assert run("info", "a.cpd", "--json") == 0
    (record,) = json.loads(capsys.readouterr().out)
    size = Path("a.cpd").stat().st_size
    facts = {
        "medium": "audio",
        "quality": 3.5,
        "samples": LONG,
        "sample_rate": RATE,
        "channels": 3,
        "seconds": LONG / RATE,
        "kbps": 8 * size * RATE / (1000 * LONG),
        "chunks": 3,
        "damage": [],
    }
    assert facts.items() <= record.items()
    assert f"segments 3 of {record['chunk_size']} samples" in text


@pytest.mark.parametrize(
    ("samples", "channels", "rate"),
    [(1, 1, RATE), (5000, 2, RATE), (5000, 5, RATE), (4999, 2, 8000), (7001, 1, 96000), (3001, 3, 44101)],
)
def test_info_states_the_shape_of_the_latents(samples, channels, rate, folder, capsys):
    sound("a.wav", samples, channels, rate)
    assert run("encode", "a.wav", "-q", "2", "--quiet") == 0
    assert run("info", "a.cpd", "--json") == 0
    (record,) = json.loads(capsys.readouterr().out)
    latents = compand.load(folder, device="cpu").latents(Path("a.cpd").read_bytes())
    assert record["latent_shape"] == list(latents.shape)
    run("info", "a.cpd")
    assert f"latents  {' x '.join(map(str, latents.shape))}\n" in capsys.readouterr().out


def test_info_needs_no_torch(folder):
    sound("a.wav")
    assert run("encode", "a.wav", "--quiet") == 0
    code = (
        "import sys; from pathlib import Path; from compand import checkpoint, cli\n"
        f"info = checkpoint.read_info(Path({str(folder)!r})); checkpoint._shipped = lambda: (info,)\n"
        "try:\n    cli.main(['info', 'a.cpd'])\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "latents" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 False"


def test_codecs_lists_the_medium(folder, capsys):
    assert run("codecs") == 0
    assert f"{folder.name}  audio" in " ".join(capsys.readouterr().out.split(" " * 3))


# ---------------------------------------------------------------------------------------------- in Python


def test_top_level_functions_choose_by_medium(folder):
    original = sound("a.wav")
    data = compand.encode("a.wav", quality=3)
    assert data == compand.encode(read_sound("a.wav"), quality=3)
    assert data == compand.encode("a.wav", str(folder), quality=3)
    decoded = compand.decode(data)
    assert isinstance(decoded, compand.Sound)
    assert (decoded.samples.shape, decoded.rate) == (original.samples.shape, RATE)
    picture("b.png")
    assert isinstance(compand.decode(compand.encode("b.png", device="cpu"), device="cpu"), compand.Picture)


def test_medium_of_what_is_in_memory():
    import torch

    from compand.pictures import read_picture

    picture("b.png")
    samples = tone(100).samples
    for source in (tone(100), samples, torch.from_numpy(samples), samples[0]):
        assert media.medium_of(source) == "audio"
    pixels = np.zeros((8, 8, 3), np.uint8)
    pillow = Image.new("RGB", (8, 8))
    for source in (read_picture("b.png"), pillow, pixels, pixels[..., 0], torch.rand(3, 8, 8)):
        assert media.medium_of(source) == "image"


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF", "AU", "RF64", "W64"])
def test_sounds_are_told_by_their_first_bytes(kind):
    soundfile.write("a", tone(4000).samples.T, RATE, format=kind)
    assert media.medium_of("a") == "audio"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_pictures_are_told_by_their_first_bytes(kind):
    Image.new("RGB", (8, 8)).save("a", kind)
    assert media.medium_of(Path("a")) == "image"


def test_checkpoints_are_found_without_their_version(folder, tmp_path, monkeypatch):
    copies = []
    for name in ("big-v1", "big-v2", "small-v2"):
        shutil.copytree(folder, tmp_path / name)
        copies.append(checkpoint.read_info(tmp_path / name))
    monkeypatch.setattr(checkpoint, "_shipped", lambda: tuple(copies))
    found = {name: checkpoint.find(name).name for name in ("big", "big-v1", "small", copies[0].codec)}
    assert found == {"big": "big-v2", "big-v1": "big-v1", "small": "small-v2", copies[0].codec: "small-v2"}
