"""What a step of a task costs and in which precision it is quickest here, found by playing a few without updates."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator

import torch
from torch import nn

from unperturb.devices import FlopCounter, set_layout
from unperturb.training.objectives import Task

_FEW = 8  # images of the step that says how long a whole one would take
_STEP_SECONDS = 2.0  # that a step of the probe may take: photographs cost a hundred times what digits do


@contextlib.contextmanager
def _profiled(task: Task, batch: int | None = None) -> Iterator[dict[str, nn.Module]]:
    """The networks of `task`, to be played with; afterwards they are as they were."""
    networks = task.networks()
    before = {k: copy.deepcopy(v.state_dict()) for k, v in networks.items()}
    modes = {k: v.training for k, v in networks.items()}
    real, task.sampler.batch = task.sampler.batch, batch or task.sampler.batch
    try:
        yield {k: v.train() for k, v in networks.items()}
    finally:
        task.sampler.batch = real
        for name, network in networks.items():
            network.load_state_dict(before[name])
            network.train(modes[name]).zero_grad(set_to_none=True)


def _profile_step(task: Task, step: int, networks: dict[str, nn.Module], precision: str) -> None:
    """A step without its updates, attacks and all."""
    device = task.sampler.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
        for _, terms in task.losses(task.batch(step, 0, 1), networks):
            torch.stack(list(terms.values())).sum().backward()


def flop_per_image(task: Task, steps: int = 12, batch: int = 6) -> float:
    """Floating-point operations of one training image, attacks and all, counted over the first few steps on a small
    batch."""
    with _profiled(task, batch) as networks, FlopCounter() as counter:
        for step in range(steps):
            _profile_step(task, step, networks, "float32")
    return counter.total / (steps * batch)


def autotune_precision(task: Task, precision: str = "auto", memory_format: str = "auto") -> tuple[str, str]:
    """The (precision, memory format) in which a step of `task` is quickest here; one that is not `auto` is kept.

    A probe of the task itself, about ten steps of whole batches, or of as many images as take some two seconds: a
    plain convolution can favor bfloat16 where small networks or small batches do not. bfloat16 must win clearly,
    because it costs accuracy.
    """
    device = task.sampler.device.type
    choices = [
        (p, m)
        for p in (("float32", "bfloat16") if precision == "auto" else (precision,))
        for m in (("contiguous", "channels_last") if memory_format == "auto" else (memory_format,))
    ]
    if len(choices) == 1:
        return choices[0]
    seconds: dict[tuple[str, str], float] = {}
    with _profiled(task, min(_FEW, task.sampler.batch)) as networks:
        _profile_step(task, 0, networks, "float32")  # the first step of all builds its kernels
        start = time.perf_counter()
        _profile_step(task, 0, networks, "float32")
        enough = max(2 * _FEW, int(_STEP_SECONDS * _FEW / (time.perf_counter() - start)))
    with _profiled(task, min(enough, task.sampler.batch)) as networks:
        for choice in choices:
            for network in networks.values():
                set_layout(network, choice[1])
            times = []
            for _ in range(3):
                start = time.perf_counter()
                _profile_step(task, 0, networks, choice[0])
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
                if times[-1] > 4 * min(seconds.values(), default=times[-1]):
                    break  # an emulated precision, say: the answer is known
            seconds[choice] = min(times) * (1.25 if choice[0] == "bfloat16" else 1.0)
    return min(seconds, key=lambda k: seconds[k])
