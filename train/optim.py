"""Muon for matrices and Adam for the rest, in one optimiser whose update replays as a CUDA graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of every matrix U S V^T by quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon").

    Args:
        matrices: [batch, rows, columns] with rows <= columns.
        steps: iterations; singular values end within about [0.7, 1.2].
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.float()


class _Stack:
    """Parameters whose matrices have one shape, handled as one batch."""

    def __init__(self, parameters: list[nn.Parameter], transposed: bool) -> None:
        self.parameters = parameters
        self.transposed = transposed

    def gather(self, tensors: Iterable[Tensor]) -> Tensor:
        stacked = torch.stack([tensor.reshape(tensor.shape[0], -1) for tensor in tensors])
        return stacked.mT if self.transposed else stacked

    def scatter(self, stacked: Tensor) -> list[Tensor]:
        stacked = stacked.mT if self.transposed else stacked
        return [row.reshape(p.shape) for row, p in zip(stacked, self.parameters, strict=True)]


class MuonAdam(torch.optim.Optimizer):
    """Muon (momentum, orthogonalised; update scaled to Adam's root mean square) on matrices, Adam on everything else.

    A parameter is a matrix when it has two or four dimensions, more than one output and more than one input; depth-wise
    kernels, biases and density parameters take Adam. All matrices of one shape are orthogonalised in one batch, and on
    a CUDA device the whole update is captured once and replayed: at this model size a step is bound by kernel launches.

    Args:
        params: parameters or groups; a group may set `adam_only`.
        lr: learning rate of both parts.
        momentum: Muon's momentum (Nesterov).
        betas: Adam's.
        cuda_graph: whether updates on CUDA parameters are captured. Gradients must then stay in the same memory.
        clip: largest norm of all gradients together, to which they are scaled down before an update; None: any.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        adam_only: bool = False,
        cuda_graph: bool = False,
        clip: float | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "adam_only": adam_only}
        )
        self.cuda_graph, self.clip = cuda_graph, clip
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0
        self._rates: list[Tensor] = []
        self._stacks: list[list[_Stack]] = []
        self._rest: list[list[nn.Parameter]] = []

    def _prepare(self) -> None:
        self._rates, self._stacks, self._rest = [], [], []
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            rest = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                rows, columns = p.shape[0], p[0].numel()
                if group["adam_only"] or p.ndim not in (2, 4) or p.shape[1] == 1 or rows == 1:
                    rest.append(p)
                    self.state[p].setdefault("square", torch.zeros_like(p))
                    # Whoever restores optimisers leaves a "step" on the CPU, for the sake of torch's own.
                    step = self.state[p].get("step", torch.zeros(()))
                    self.state[p]["step"] = step.to(p.device)
                else:
                    shapes[rows, columns].append(p)
                self.state[p].setdefault("momentum", torch.zeros_like(p))
            self._stacks.append([_Stack(ps, rows > columns) for (rows, columns), ps in shapes.items()])
            self._rest.append(rest)
            self._rates.append(torch.zeros((), device=group["params"][0].device))

    def _update(self) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.clip)
        for group, rate, stacks, rest in zip(
            self.param_groups, self._rates, self._stacks, self._rest, strict=True
        ):
            for stack in stacks:
                parameters: list[Tensor] = list(stack.parameters)
                gradients = [p.grad for p in parameters if p.grad is not None]
                moments = [self.state[p]["momentum"] for p in stack.parameters]
                torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
                direction = torch._foreach_lerp(gradients, moments, group["momentum"])
                stacked = orthogonalise(stack.gather(direction))
                scale = 0.2 * max(stacked.shape[1:]) ** 0.5
                torch._foreach_add_(parameters, stack.scatter(stacked * (rate * -scale)))
            if not rest:
                continue
            beta1, beta2 = group["betas"]
            parameters = list(rest)
            gradients = [p.grad for p in parameters if p.grad is not None]
            moments = [self.state[p]["momentum"] for p in rest]
            squares = [self.state[p]["square"] for p in rest]
            steps = [self.state[p]["step"] for p in rest]
            torch._foreach_add_(steps, 1)
            torch._foreach_lerp_(moments, gradients, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
            step = steps[0]
            denominator = torch._foreach_div(squares, 1 - beta2**step)
            torch._foreach_sqrt_(denominator)
            torch._foreach_add_(denominator, group["eps"])
            update = torch._foreach_div(moments, denominator)
            torch._foreach_mul_(update, -rate / (1 - beta1**step))
            torch._foreach_add_(parameters, list(update))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._rates:
            self._prepare()
        for rate, group in zip(self._rates, self.param_groups, strict=True):
            rate.fill_(group["lr"])
        if not (self.cuda_graph and self._rates[0].is_cuda):
            self._update()
        elif self._graph is not None:
            self._graph.replay()
        elif self._warm < 3:
            self._warm += 1
            self._update()
        else:
            self._graph = torch.cuda.CUDAGraph()
            # Threads that watch the exchange between processes may go on while this one captures.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._update()
            self._graph.replay()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.recapture()

    def recapture(self) -> None:
        """Looks at the parameters and their gradients anew: other ones learn from now on, or gradients moved."""
        self._rates, self._graph, self._warm = [], None, 0
