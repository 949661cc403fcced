"""Decoding in a process of its own, which gets the coded file and nothing else.

`Decoder` starts `python -m compand.eval.decoder` and keeps it. The two exchange one line of JSON a request:

| | |
|---|---|
| setup, once | `{"path": [...], "plugins": [...]}`: where Python finds modules, and modules that register codecs |
| its answer | `{"ready": true}` or `{"error": "one line"}` |
| request | `{"codec": "jpeg", "medium": "image", "file": ".../coded", "output": ".../decoded.npz"}` |
| its answer | `{"seconds": 0.012}` or `{"error": "one line"}` |

The file lies under the same name for every item in a folder made for this process, so that neither a name, a path nor
an argument says which original it came from, and no memory is shared with the encoder. Samples come back as arrays in
an .npz file: `pixels` (uint8 [H, W, C]), or `samples` (float32 [channels, N]) and `rate` (Hz).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from compand import files
from compand.errors import MediaError
from compand.eval.items import Signal
from compand.pictures import Picture
from compand.sounds import Sound

if TYPE_CHECKING:
    from compand.eval.subjects import Subject

_END_SECONDS = 5  # that a process may take to end once its input is closed


class Decoded(NamedTuple):
    """What came back for one coded file."""

    signal: Signal
    size: int  # bytes of the file that was decoded, as the file system counts them
    seconds: float  # in the codec; reading the file and handing over samples are not counted


class Decoder:
    """Client of a decoding process. Use it as a context manager; the process ends with it, or with this process.

    Args:
        plugins: modules that register third-party codecs, imported by the process.
        threads: computing threads of the process; None: its libraries decide.
        folder: where the temporary folder with coded and decoded files is made; None: the system's place.
        timeout: seconds that the process may take for a file, or to start; then it is killed.
    """

    def __init__(
        self,
        plugins: Sequence[str] = (),
        *,
        threads: int | None = None,
        folder: Path | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._plugins = tuple(plugins)
        self._threads = threads
        self._timeout = timeout
        self._place = tempfile.TemporaryDirectory(prefix="compand-", dir=folder, ignore_cleanup_errors=True)
        self._coded = Path(self._place.name, "coded")
        self._output = Path(self._place.name, "decoded.npz")
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._ready = False
        self._start()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def decode(self, codec: str, data: bytes, *, medium: str | None = None) -> Decoded:
        """Write a coded file and have the process decode it.

        Args:
            codec: what `compand.eval.subjects.find` takes, a folder by its absolute path.
            data: content of the file.
            medium: "image" or "audio", for names that both media have.

        Raises:
            MediaError: the codec refuses the file, or the process ended or took too long; the next call then starts
                another.
        """
        self._coded.write_bytes(data)
        self._output.unlink(missing_ok=True)  # an answer must never be an earlier request's
        if self._process is None:
            self._start()
        if not self._ready:
            self._check(self._read(codec))
            self._ready = True
        self._write(
            codec,
            {"codec": codec, "medium": medium, "file": str(self._coded), "output": str(self._output)},
        )
        answer = self._check(self._read(codec))
        return Decoded(_read_signal(self._output), os.path.getsize(self._coded), float(answer["seconds"]))

    def close(self) -> None:
        """End the process and remove its folder."""
        self._end()
        self._place.cleanup()

    def _start(self) -> None:
        threads = {} if self._threads is None else {"OMP_NUM_THREADS": str(self._threads)}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compand.eval.decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=self._place.name,
            env=os.environ | threads,
        )
        self._ready = False
        path = [os.path.abspath(entry) for entry in sys.path]
        self._write("", {"path": path, "plugins": self._plugins})

    def _write(self, codec: str, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._death(codec) from None

    def _read(self, codec: str) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        expired = threading.Event()

        def kill(process: subprocess.Popen[bytes]) -> None:
            expired.set()
            process.kill()

        # A timer, since Windows cannot wait for a pipe for a limited time.
        timer = threading.Timer(self._timeout, kill, [self._process])
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if expired.is_set():
            self._end()
            raise MediaError(f"decoding with {codec} took more than {self._timeout:g} s and was ended")
        if not line.endswith(b"\n"):
            raise self._death(codec)
        answer: dict[str, Any] = json.loads(line)
        return answer

    @staticmethod
    def _check(answer: dict[str, Any]) -> dict[str, Any]:
        if "error" in answer:
            raise MediaError(answer["error"])
        return answer

    def _death(self, codec: str) -> MediaError:
        """The error for a process that ended by itself; forgets the process."""
        process, log = self._process, self._log
        assert process is not None and log is not None
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
        self._end()
        last = f": {lines[-1].strip()}" if lines else ""
        return MediaError(f"decoding with {codec} ended its process (exit status {process.returncode}){last}")

    def _end(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
            self._process.terminate()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


def _read_signal(path: Path) -> Signal:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "pixels" in arrays:
                return Picture(arrays["pixels"], None, None)
            return Sound(arrays["samples"], int(arrays["rate"]))
    except (OSError, KeyError, ValueError) as error:
        raise MediaError(f"the decoder gave no samples ({error}): try again") from None


# ------------------------------------------------------------------------------------- the process itself


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the client decides
    # What a codec prints must not mix with the answers, nor may it read the requests.
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    try:
        _set_up(json.loads(requests.readline() or b"{}"))
        answer({"ready": True})
    except Exception as error:
        answer({"error": files.explain(error, "decoder")})
        return
    subjects: dict[tuple[str, str | None], Subject] = {}
    for line in requests:
        request = json.loads(line)
        try:
            answer({"seconds": _decode(subjects, **request)})
        except Exception as error:
            answer({"error": files.explain(error, f"decoding with {request['codec']}")})


def _set_up(setup: dict[str, Any]) -> None:
    from compand.allocator import tune_allocator
    from compand.eval import subjects

    tune_allocator()
    sys.path[:] = setup.get("path", sys.path)
    subjects.load_plugins(setup.get("plugins", ()))


def _decode(
    subjects: dict[tuple[str, str | None], Subject], codec: str, medium: str | None, file: str, output: str
) -> float:
    """Decode a file with a codec that is kept for further files. Returns the seconds in the codec, loaded before."""
    from compand.eval.subjects import find

    subject = subjects.get((codec, medium))
    if subject is None:
        subject = subjects[codec, medium] = find(codec, medium)
        subject.prepare()
    data = Path(file).read_bytes()
    start = time.perf_counter()
    decoded = subject.decode(data)
    seconds = time.perf_counter() - start
    if isinstance(decoded, Picture):
        np.savez(output, pixels=decoded.pixels)
    else:
        np.savez(output, samples=decoded.samples, rate=decoded.rate)
    return seconds


if __name__ == "__main__":
    main()
