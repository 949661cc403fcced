"""Where the time of coding goes: hooks around the parts that every codec of compand has.

Nothing is hooked until `codec_stages` or `peer_stages` is entered, and everything is restored when it is left, so that
whole passes can be timed without any of it.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

DIRECTIONS = ("encode", "decode")

STAGES = ("transform", "prior", "entropy_coding", "io", "codec", "other")
"""Names of all stages in the order of tables. "codec" is all that a codec without hooks does; "other" is what no hook
of the others claims."""


class Stopwatch:
    """Seconds by stage; a stage within another one interrupts it, so that no second counts twice.

    Args:
        synchronize: waits until the device has done what it was given; called at both ends of every stage.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._synchronize = synchronize
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time in the block under `name`, less that of stages entered within it."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted under `name`."""

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **named)

        return timed

    def _switch(self) -> None:
        """Gives the time since the last switch to the stage that is running."""
        self._synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


class Hook(NamedTuple):
    """Functions of an object, class or module that belong to a stage."""

    stage: str
    owner: Any
    names: Sequence[str]


def codec_hooks(codec: Any) -> list[Hook]:
    """The hooks of a codec of compand, whichever it is.

    The transform is `analysis` and `synthesis`, entropy coding the methods of `AnsWriter` and `AnsReader`, the prior
    what `compress` and `decompress` of the bottleneck do besides (hyper networks, quantisation, choice of tables), IO
    the container.
    """
    from compand.coding import container
    from compand.coding.ans import AnsReader, AnsWriter
    from compand.coding.container import AudioFrameReader, AudioFrameWriter

    hooks = [Hook("io", container, ("read", "write"))]
    hooks += [Hook("io", framing, _methods(framing)) for framing in (AudioFrameWriter, AudioFrameReader)]
    hooks += [Hook("entropy_coding", coder, _methods(coder)) for coder in (AnsWriter, AnsReader)]
    if hasattr(codec, "transform"):
        hooks.append(Hook("transform", codec.transform, ("analysis", "synthesis")))
    if hasattr(codec, "bottleneck"):
        hooks.append(Hook("prior", codec.bottleneck, ("compress", "decompress")))
    return hooks


def peer_hooks(model: Any) -> list[Hook]:
    """The hooks of a model of compressai, by the names that its models give their parts."""
    networks = {
        "transform": ("g_a", "g_s"),
        "prior": ("h_a", "h_s", "context_prediction", "entropy_parameters"),
    }
    hooks = [
        Hook(stage, getattr(model, part), ("forward",))
        for stage, parts in networks.items()
        for part in parts
        if hasattr(model, part)
    ]
    for part in ("entropy_bottleneck", "gaussian_conditional"):
        if hasattr(model, part):
            hooks.append(Hook("entropy_coding", getattr(model, part), ("compress", "decompress")))
    if hasattr(model, "gaussian_conditional"):
        hooks.append(Hook("prior", model.gaussian_conditional, ("build_indexes",)))
    return hooks


@contextmanager
def hooked(hooks: Sequence[Hook], stopwatch: Stopwatch) -> Iterator[None]:
    """Within the block, the stopwatch sees the functions of all hooks; afterwards all is as before."""
    with ExitStack() as undo:
        for stage, owner, names in hooks:
            for name in names:
                undo.enter_context(_replaced(owner, name, stopwatch.timed(stage, getattr(owner, name))))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    # What the owner itself holds, not what it inherits: an inherited function comes back by itself.
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _methods(owner: type) -> list[str]:
    """The constructor and the public methods that a class defines."""
    return [
        name
        for name, value in vars(owner).items()
        if callable(value) and (name == "__init__" or not name.startswith("_"))
    ]
