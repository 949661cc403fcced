"""Many small trainings on few devices: steps that are queued, not waited for, and a process for each device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor


class QueuedSteps:
    """The steps of one training, so that several share a device: their work is queued on a stream of their own.

    On a CUDA device a step is captured once and replayed.

    Args:
        device: where the training is.
        update: one step on a batch, of static shapes, without a value that the host reads.
        rate: the learning rate that `update` uses, a scalar on the device.
        forget: sets what `update` keeps from step to step (moments, gradients) to its beginning.
    """

    def __init__(
        self,
        device: torch.device,
        update: Callable[..., None],
        rate: Tensor,
        forget: Callable[[], None],
    ) -> None:
        self.device, self.rate = device, rate
        self._update, self._forget = update, forget
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: tuple[Tensor, ...] = ()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def captured(self) -> bool:
        """Whether steps are captured on this device."""
        return self._stream is not None

    def queue(self) -> AbstractContextManager[Any]:
        """What is computed inside is queued behind the steps so far."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def wait(self) -> None:
        """Waits until all steps are done."""
        if self._stream is not None:
            self._stream.synchronize()

    def step(self, *batch: Tensor) -> None:
        """Queues a step at the present rate; to be called inside `queue`."""
        if self._stream is None:
            self._update(*batch)
            return
        if self._graph is None:
            self._capture(batch)
        for place, value in zip(self._static, batch, strict=True):
            place.copy_(value)
        assert self._graph is not None
        self._graph.replay()

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        self._static = tuple(x.clone(memory_format=torch.preserve_format) for x in batch)
        rate = self.rate.clone()
        self.rate.zero_()
        for _ in range(3):  # kernels are chosen before the capture; the weights stay as they are
            self._update(*self._static)
        self._forget()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._update(*self._static)
        self.rate.copy_(rate)


def restoring(states: Callable[[], Sequence[Tensor]]) -> Callable[[], None]:
    """What sets tensors back to what they are now; those that do not exist yet to zero.

    Args:
        states: gives the tensors that a step changes whatever its rate. New ones come behind those of before.
    """
    kept = [tensor.clone() for tensor in states()]

    def restore() -> None:
        for place, tensor in enumerate(states()):
            tensor.data.copy_(kept[place]) if place < len(kept) else tensor.data.zero_()

    return restore


def moments(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """The state of an optimiser."""
    return [value for state in optimiser.state.values() for value in state.values()]


def rate_factor(step: int, steps: int, warming: float, final: float) -> float:
    """The share of the peak rate: linear warm-up in so much of the steps, under a cosine that ends at `final`."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min((step + 1) / max(warming * steps, 1), 1) * (final + (1 - final) * cosine)


Work = Callable[..., list[Any]]
"""Called with a device, the jobs that are left, and further arguments; returns an outcome of each job."""


def prepared(device: str) -> torch.device:
    """A device that a process is going to train on."""
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = True
    return place


def devices(named: Sequence[str] | None) -> list[str]:
    """The devices named; else all GPUs, else the CPU."""
    return list(named or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"])


def on_devices(work: Work, places: Sequence[str], jobs: Sequence[Any], *arguments: Any) -> list[Any]:
    """Does the jobs on all devices, each by a process that takes the next job when it has room for one.

    Args:
        work: what a process does, a function of a module.
        places: the devices.
        jobs: what is to be done, picklable and not None.
        arguments: of `work`, behind device and jobs.
    """
    if len(places) == 1:
        return work(places[0], iter(deque(jobs)), *arguments)
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(len(places), context) as pool:
        queue = manager.Queue()
        for job in jobs:
            queue.put(job)
        for _ in places:
            queue.put(None)
        futures = [pool.submit(_from_queue, work, place, queue, *arguments) for place in places]
        return [outcome for future in futures for outcome in future.result()]


def _from_queue(work: Work, device: str, queue: Any, *arguments: Any) -> list[Any]:
    jobs: Iterator[Any] = iter(queue.get, None)
    return work(device, jobs, *arguments)
