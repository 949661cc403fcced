"""The decoding process: it gets a file and nothing else, and its faults cost one item."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import foreign_codecs
import numpy as np
import pytest
from foreign_codecs import DAMAGED, HANGS, KILLS_DECODER, Cheat, Faulty, Raw

from compand.errors import MediaError
from compand.eval import decoder, subjects
from compand.eval.decoder import Decoder
from compand.pictures import Picture
from compand.sounds import Sound


def picture(red: int = 10, size: tuple[int, int] = (6, 9)) -> Picture:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    pixels[0, 0, 0] = red
    return Picture(pixels, None, None)


@pytest.fixture(scope="module")
def client():
    with Decoder(["foreign_codecs"], threads=1) as client:
        yield client


def test_pictures_come_back_exactly(client):
    original = picture()
    data = Raw().encode(original, 8)
    decoded = client.decode("raw", data)
    assert np.array_equal(decoded.signal.pixels, original.pixels)
    assert decoded.size == len(data)
    assert 0 < decoded.seconds < 10


def test_sounds_come_back_exactly(client):
    samples = np.random.default_rng(0).normal(0, 0.1, (2, 777)).astype(np.float32)
    subject = subjects.find("identity", "audio")
    data = subject.encode(Sound(samples, 22050), subject.qualities[0])
    decoded = client.decode("identity", data, medium="audio").signal
    assert np.array_equal(decoded.samples, samples)
    assert decoded.rate == 22050


def test_the_size_is_that_of_the_file(client):
    class Boastful(bytes):
        def __len__(self):
            return 1

    data = Raw().encode(picture(), 8)
    assert client.decode("raw", Boastful(data)).size == len(data)


def test_a_codec_that_remembers_the_original_is_caught(client):
    original, cheat = picture(), Cheat()
    data = cheat.encode(original, 1)
    assert np.array_equal(cheat.decode(data).pixels, original.pixels)
    assert np.array_equal(Cheat().decode(data).pixels, original.pixels)
    assert (client.decode("cheat", data).signal.pixels == 128).all()
    foreign_codecs.remembered = Cheat.remembered = None


def test_the_process_is_told_nothing_of_the_original(client, tmp_path, monkeypatch):
    folder = tmp_path / "original-folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(MediaError) as caught, Decoder(["foreign_codecs"]) as other:
        other.decode("curious", Raw().encode(picture(), 8))
    known = json.loads(str(caught.value).partition(": ")[2])
    assert known["arguments"] == [decoder.__file__]
    assert known["files"] == ["coded"]
    assert known["input"] == ""
    assert "original-folder" not in known["folder"]


def test_what_codecs_print_does_not_mix_with_answers(client):
    data = Faulty().encode(picture(), 8)
    for _ in range(2):
        assert np.array_equal(client.decode("faulty", data).signal.pixels, picture().pixels)


def test_errors_are_one_line_and_the_process_goes_on(client):
    with pytest.raises(MediaError, match=r"faulty.*the file is damaged: get another"):
        client.decode("faulty", Faulty().encode(picture(DAMAGED), 8))
    with pytest.raises(MediaError, match="unexpected") as caught:
        client.decode("raw", b"nonsense")
    assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="no-such-codec"):
        client.decode("no-such-codec", b"")
    assert client.decode("raw", Raw().encode(picture(), 8)).signal.height == 6


def test_a_process_that_dies_is_replaced(client):
    with pytest.raises(MediaError, match=r"exit status 4\): out of luck"):
        client.decode("faulty", Faulty().encode(picture(KILLS_DECODER), 8))
    assert client.decode("raw", Raw().encode(picture(), 8)).signal.height == 6


def test_a_process_that_takes_too_long_is_replaced(client, monkeypatch):
    monkeypatch.setattr(client, "_timeout", 1.0)
    started = time.monotonic()
    with pytest.raises(MediaError, match="decoding with faulty took more than 1 s and was ended"):
        client.decode("faulty", Faulty().encode(picture(HANGS), 8))
    assert time.monotonic() - started < 20
    monkeypatch.setattr(client, "_timeout", 600.0)
    assert client.decode("raw", Raw().encode(picture(), 8)).signal.height == 6


def test_a_plug_in_that_is_not_there_is_named():
    with Decoder(["no_such_module"]) as client, pytest.raises(MediaError, match="no_such_module"):
        client.decode("raw", b"")


def test_nothing_stays_behind(tmp_path):
    with Decoder(folder=tmp_path) as client:
        process = client._process
        assert process.poll() is None
        assert len(list(tmp_path.iterdir())) == 1
    assert process.poll() is not None
    assert list(tmp_path.iterdir()) == []


CLIENT = """
import sys
from pathlib import Path
from compand.eval.decoder import Decoder

client = Decoder(folder=Path(sys.argv[1]))
print(client._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_process_ends_when_its_client_is_killed(tmp_path):
    arguments = [sys.executable, "-c", CLIENT, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        number = int(client.stdout.readline())
        assert is_running(number)
        client.send_signal(signal.SIGKILL)
        client.wait()
        deadline = time.monotonic() + 30
        while is_running(number) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_running(number)


def is_running(number: int) -> bool:
    """Whether a process exists and is not a zombie, which no one may be there to reap."""
    stat = Path(f"/proc/{number}/stat")
    if Path("/proc/self/stat").exists():
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True
