"""Codecs of another package, as --plugin takes them: honest ones, faulty ones, and one that cheats."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np

from compand.errors import MediaError
from compand.eval.subjects import Subject, register_anchor
from compand.pictures import Picture

LOG = "COMPAND_TEST_LOG"
"""Environment variable that names a file for a line per encoding."""

PAUSE = "COMPAND_TEST_PAUSE"
"""Environment variable with the seconds that `slow` takes for a picture."""

KILLS_ENCODER, KILLS_DECODER, DAMAGED, WRONG_SIZE, UNFIT, HANGS = 201, 202, 203, 204, 205, 206
"""Red values of the first pixel with which `faulty` fails."""


class Raw(Subject):
    """Pixels whose lowest bits are cleared: quality q keeps q of 8."""

    title = "raw"
    medium = "image"
    kind = "classical"
    identity = "raw 1"
    settings_note = "keeps the highest bits."
    qualities = (2.0, 4.0, 6.0)
    suffix = ".raw"
    name = "raw"

    def encode(self, signal, quality):
        pixels = signal.pixels >> (8 - int(quality)) << (8 - int(quality))
        return struct.pack("<HH", *pixels.shape[:2]) + zlib.compress(pixels.tobytes(), 1)

    def decode(self, data):
        shape = struct.unpack("<HH", data[:4])
        return Picture(np.frombuffer(zlib.decompress(data[4:]), np.uint8).reshape(*shape, 3), None, None)


class Sized(Raw):
    """Every file has 1,000 bytes; 400 of them count as container."""

    name = "sized"
    qualities = (1.0,)

    def encode(self, signal, quality):
        return struct.pack("<HH", *signal.pixels.shape[:2]).ljust(1000, b"\0")

    def decode(self, data):
        return Picture(np.full((*struct.unpack("<HH", data[:4]), 3), 128, np.uint8), None, None)

    def overhead(self, data):
        return 400


class Cheat(Sized):
    """Remembers what it encoded, in its module and in itself, and "decodes" it from there."""

    name = "cheat"
    remembered: Picture | None = None

    def encode(self, signal, quality):
        global remembered
        self.remembered = remembered = type(self).remembered = signal
        return super().encode(signal, quality)

    def decode(self, data):
        return self.remembered or remembered or super().decode(data)


remembered: Picture | None = None


class Slow(Raw):
    """Takes its time where that is asked for, and logs what it encodes."""

    name = "slow"

    def encode(self, signal, quality):
        with open(os.environ[LOG], "a", encoding="utf-8") as log:
            log.write(f"{signal.pixels[0, 0].tolist()} {quality:g}\n")
        time.sleep(float(os.environ.get(PAUSE, "0")))
        return super().encode(signal, quality)


class Faulty(Raw):
    """Fails by the red value of the first pixel, and prints what disturbs nobody."""

    name = "faulty"

    def encode(self, signal, quality):
        red = signal.pixels[0, 0, 0]
        if red == KILLS_ENCODER:
            os._exit(3)
        if red == UNFIT:
            raise RuntimeError("a bug\nof two lines")
        return bytes([red]) + super().encode(signal, 8)

    def decode(self, data):
        print("a codec may print")
        sys.stdout.flush()
        os.write(1, b"and so may its library\n")
        if data[0] == KILLS_DECODER:
            os.write(2, b"out of luck\n")
            os._exit(4)
        if data[0] == DAMAGED:
            raise MediaError("the file is damaged: get another")
        if data[0] == HANGS:
            time.sleep(3600)
        picture = super().decode(data[1:])
        if data[0] == WRONG_SIZE:
            return Picture(picture.pixels[1:], None, None)
        return picture


class Curious(Raw):
    """Tells, instead of decoding, all that its process was given."""

    name = "curious"

    def decode(self, data):
        known = {
            "arguments": sys.argv,
            "folder": os.getcwd(),
            "files": sorted(str(path.name) for path in Path.cwd().iterdir()),
            "input": sys.stdin.read(),
        }
        raise MediaError(json.dumps(known))


for codec in (Raw, Sized, Cheat, Slow, Faulty, Curious):
    register_anchor(codec.name, codec, "image")
