"""Muon: momentum whose direction is made orthogonal, for kernels; Adam for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Newton-Schulz coefficients that bring every singular value near 1 in five rounds (Jordan 2024).
_COEFFICIENTS, _ROUNDS = (3.4445, -4.7750, 2.0315), 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """`matrix` `(M, N)` with its singular values brought to between about 0.7 and 1.2, its singular vectors kept."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (torch.linalg.matrix_norm(wide) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """Kernels, taken as matrices `(outputs, everything else)`, step along their orthogonalized Nesterov momentum;
    vectors step by Adam. Both decay decoupled from the gradient.

    A kernel's step is as long as 0.2 sqrt(max(M, N)) orthogonal rows, which has the root mean square of Adam's, so that
    one `lr` suits both. betas: Adam's; momentum: the kernels'.

    Source: Jordan 2024, "Muon: an optimizer for hidden layers in neural networks"; the length is that of Liu et al.
    2025, "Muon is scalable for LLM training", section 2.2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients there are."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                (self._kernel if p.dim() >= 2 else self._vector)(p, p.grad, group)
        return loss

    def _kernel(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(average, group["momentum"]).reshape(len(p), -1)
        length = 0.2 * max(ahead.shape) ** 0.5
        p.add_(orthogonalized(ahead).reshape(p.shape), alpha=-group["lr"] * length)

    def _vector(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        state["step"] += 1
        first, second = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - first)
        square = state["square"].lerp_(gradient.square(), 1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(1e-8)
        p.addcdiv_(mean / (1 - first ** state["step"]), root, value=-group["lr"])
