"""Encode-time refinement: symbols searched for one picture, for a decoder that knows nothing of it.

An encoder network gives latents that are good on average; what is best for this picture, rounding included, is found by
gradient descent through rate and synthesis. Stochastic Gumbel annealing (Yang, Bamler & Mandt 2020, "Improving
Inference for Neural Image Compression", section 3.2): every value is drawn to its two neighbouring integers at random,
nearer ones more likely, by choices that are soft at first and hard in the end.

Nothing here decides a symbol by floating-point numbers that a decoder would have to repeat: the search proposes
latents, and the bottleneck codes them as it codes any other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from compand.coding.tables import TableSet
from compand.errors import UsageError

FIRST_TEMPERATURE = 0.5
"""Of the choice between two integers, at the first step; the paper's too begins there."""


class Schedule(NamedTuple):
    """What an effort is."""

    steps: int  # of gradient descent, for each tile
    coldest: float  # temperature at the last step


SCHEDULES = (Schedule(0, FIRST_TEMPERATURE), Schedule(60, 0.2), Schedule(250, 0.1), Schedule(1000, 0.1))
"""Of each effort. Cooling further costs few steps the time to move, and many the choices that were still open."""

LEARNING_RATE = 0.03
"""Of Adam at the start, in quantisation steps; falls to a tenth."""

NOISE = 0.3
"""Share of the logistic noise that choices are drawn with. The paper's is 1: of so few steps as here, many are then
lost to values that noise alone moves, and a good part of the gain with them."""

MARGIN = 16
"""Values beyond the longest of a set's tables whose cost is told apart; farther ones cost as much as the last."""

NEAREST = 1e-4
"""Least distance to an integer that is told apart: the inverse hyperbolic tangent is infinite at 1."""

SEED = 20_061_021

WARM_STEPS = 3
"""On a CUDA device, before one is captured: libraries choose their kernels in them."""


class Rounded(NamedTuple):
    """Values between two integers each."""

    low: Tensor  # the lower integer, int64
    share: Tensor  # of the upper integer, 0 .. 1; what a gradient goes through

    @property
    def value(self) -> Tensor:
        """The mixture of both."""
        return self.low + self.share


class SoftRounding:
    """Draws values to their neighbouring integers (Yang et al. 2020, equations 8 to 10).

    The lower and the upper neighbour have the logits -atanh(distance) / temperature; the choice is made by the
    Gumbel-softmax of the same temperature, which for two candidates is a sigmoid of logistic noise, here of NOISE.

    Args:
        temperature: above 0; towards 0 choices become hard, and the nearest integer certain. A number, or a scalar on
            the device.
        generator: of the noise.
    """

    def __init__(self, temperature: float | Tensor, generator: torch.Generator) -> None:
        self.temperature, self.generator = temperature, generator

    def __call__(self, x: Tensor) -> Rounded:
        """x: values of any shape, in quantisation steps."""
        low = x.detach().floor()
        above = (x - low).clamp(NEAREST, 1 - NEAREST)
        noise = torch.rand(x.shape, generator=self.generator, device=x.device).logit_(eps=1e-6).mul_(NOISE)
        preference = (torch.atanh(above) - torch.atanh(1 - above)) / self.temperature
        return Rounded(low.long(), torch.sigmoid((preference + noise) / self.temperature))


class TableCosts:
    """What softly rounded values cost with integer tables: linear between the costs of two integers, which is the
    expected cost of choosing one of them.

    Args:
        tables: the set that files are coded with.
        rows: the tables that are asked for, numbered 0 .. len(rows) - 1 here.
        device: where values are.
    """

    def __init__(self, tables: TableSet, rows: Sequence[int], device: torch.device) -> None:
        chosen = np.asarray(rows)
        lows = tables.lows[chosen].astype(np.int64)
        self._first = int(lows.min()) - MARGIN
        values = np.arange(self._first, int((lows + tables.sizes[chosen]).max()) + MARGIN)
        bits = tables.bits(np.tile(values, chosen.size), np.repeat(chosen, values.size))
        self._width = values.size
        self._bits = torch.from_numpy(bits).to(device, torch.float32)

    def __call__(self, x: Rounded, rows: Tensor) -> Tensor:
        """Bits of each value; rows: int64, table of each, broadcastable to the values."""
        at = (x.low - self._first).clamp(0, self._width - 2) + rows * self._width
        return torch.lerp(self._bits[at], self._bits[at + 1], x.share)


class Relaxation(ABC):
    """The latents of one picture or tile while they are searched for: what `Bottleneck.relaxed` gives.

    Attributes:
        variables: what gradient descent changes: offsets from the latents of the analysis, in quantisation steps.
    """

    variables: list[Tensor]

    @abstractmethod
    def sample(self, rounding: SoftRounding) -> tuple[Tensor, Tensor]:
        """Softly rounded latents: their bits, a scalar, and y_hat [1, M, h, w], both differentiable."""

    @abstractmethod
    def code(self) -> tuple[bytes, Tensor]:
        """The payload of the latents as they are, rounded in the order of coding, and the y_hat [1, M, h, w] that a
        decoder makes of it. Without a step of descent it is what `Bottleneck.compress` gives."""


def schedule_of(effort: int) -> Schedule:
    """What an effort means. Raises UsageError where there is no such effort."""
    if not isinstance(effort, int) or not 0 <= effort < len(SCHEDULES):
        raise UsageError(f"effort {effort} does not exist: choose 0 (none) to {len(SCHEDULES) - 1}")
    return SCHEDULES[effort]


def anneal(
    relaxation: Relaxation,
    distortion: Callable[[Tensor], Tensor],
    schedule: Schedule,
    report: Callable[[], None],
) -> None:
    """Moves the variables of a relaxation towards the least R + lambda D.

    Noise comes from a fixed seed, so that the same picture gives the same file.

    Args:
        relaxation: what to refine.
        distortion: y_hat [1, M, h, w] -> lambda D in bits, a scalar; differentiable.
        schedule: how many steps, and how temperature falls with them: geometrically.
        report: called after each.
    """
    descent = _Descent(relaxation, distortion)
    for step in range(schedule.steps):
        done = step / max(schedule.steps - 1, 1)
        rate = LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * done))
        descent.step(rate, FIRST_TEMPERATURE * (schedule.coldest / FIRST_TEMPERATURE) ** done)
        report()


class _Descent:
    """Steps of Adam. On a CUDA device, where they are bound by the launch of kernels, a step is captured after a few
    and replayed from then on. What cannot be captured goes on as it began.
    """

    def __init__(self, relaxation: Relaxation, distortion: Callable[[Tensor], Tensor]) -> None:
        self._relaxation, self._distortion = relaxation, distortion
        device = relaxation.variables[0].device
        self._capturable = device.type == "cuda"
        self._rate, self._temperature = (torch.zeros((), device=device) for _ in range(2))
        self._optimizer = torch.optim.Adam(
            relaxation.variables,
            self._rate if self._capturable else LEARNING_RATE,
            capturable=self._capturable,
        )
        self._generator = torch.Generator(device).manual_seed(SEED)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0

    def step(self, rate: float, temperature: float) -> None:
        """One step, at a learning rate and a temperature."""
        if self._relaxation.variables[0].device.type != "cuda":
            self._optimizer.param_groups[0]["lr"] = rate
            self._update(temperature)
            return
        self._rate.fill_(rate)
        self._temperature.fill_(temperature)
        if self._graph is None and self._warm == WARM_STEPS and self._capturable:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
            return
        self._warm = min(self._warm + 1, WARM_STEPS)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._update(self._temperature)
        torch.cuda.current_stream().wait_stream(side)

    def _update(self, temperature: float | Tensor) -> None:
        bits, y_hat = self._relaxation.sample(SoftRounding(temperature, self._generator))
        self._optimizer.zero_grad()
        (bits + self._distortion(y_hat)).backward()
        self._optimizer.step()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        self._optimizer.zero_grad()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._update(self._temperature)
        except RuntimeError:  # something waits for the device, or is copied to it
            self._capturable = False
            torch.cuda.synchronize()
            torch.cuda.set_stream(stream)  # a capture that fails does not leave its own
            # The former one waits for a graph that there is not.
            self._generator = torch.Generator(self._generator.device).manual_seed(SEED + 1)
            self._optimizer.zero_grad()
            return
        self._graph = graph
