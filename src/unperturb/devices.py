"""What this machine computes fastest, found by a probe of a fraction of a second instead of a constant."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Speed:
    """A convolution's forward+backward rate in GFLOP/s, by (precision, memory format)."""

    rates: dict[tuple[str, str], float]

    @property
    def precision(self) -> str:
        """The faster precision, "float32" or "bfloat16"."""
        return max(self.rates, key=lambda k: self.rates[k])[0]


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `"auto"` takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA GPU here; use --device cpu")
    return device


def set_threads(threads: int | None) -> None:
    """Let torch compute on so many CPU threads (None: as many as it likes); raises `ValueError` for a number that no
    machine bears."""
    if threads is None:
        return
    most = max(1024, 4 * (os.cpu_count() or 1))
    if not 1 <= threads <= most:
        raise ValueError(f"{threads} threads were asked for; expected 1 to {most} (this machine has {os.cpu_count()})")
    torch.set_num_threads(threads)


def _rate(device: torch.device, precision: str, memory_format: str, channels: int, size: int, batch: int) -> float:
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    convolution = set_layout(nn.Conv2d(channels, channels, 3, padding=1, device=device), memory_format)
    x = torch.randn(batch, channels, size, size, device=device).to(memory_format=layout).requires_grad_()
    flop = 3 * 2 * 9 * channels**2 * size**2 * batch
    best = float("inf")
    for attempt in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            y = convolution(x)
        y.backward(torch.ones_like(y))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        if attempt:
            best = min(best, seconds)
        if seconds > 0.5:  # an emulated precision: the answer is known
            break
    return flop / min(best, seconds) / 1e9


@functools.cache
def probe(device: str = "cpu", *, channels: int = 64, size: int = 16, batch: int = 64) -> Speed:
    """GFLOP/s of a 3x3 convolution, float32 and bfloat16, contiguous and channels_last; about a quarter second. What it
    computes is not counted by a `FlopCounter` around it."""
    where = torch.device(device)
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        return Speed(
            {
                (precision, layout): _rate(where, precision, layout, channels, size, batch)
                for precision in ("float32", "bfloat16")
                for layout in ("contiguous", "channels_last")
            }
        )


def set_layout(module: nn.Module, memory_format: str) -> nn.Module:
    """`module` with its kernels in `memory_format` ("contiguous" or "channels_last"), in place."""
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    return module.to(memory_format=layout)  # type: ignore[call-overload]


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products inside, backward passes too.

    Torch's own `FlopCounterMode` hooks modules, which `torch.autograd.grad` on an input does not survive; its formulas
    are used here.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
