"""The one training loop: it alternates between networks, averages weights, logs, checkpoints and resumes.

It knows neither GANs nor classifiers: a task gives it networks, batches and losses. Batches and draws depend on (seed,
step) alone, so a killed run that is resumed from its last checkpoint ends with the same weights.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from unperturb import runs, screen
from unperturb.config import Training
from unperturb.devices import Speed, probe, set_layout
from unperturb.runs import Outcome
from unperturb.training.muon import Muon
from unperturb.training.objectives import Task
from unperturb.training.profiling import flop_per_image
from unperturb.training.state import LAST, DivergedError, TrainingState, Validate, weights_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

DIVERGED = "diverged.json"  # kept in the folder of a run that did, so that it may go on with a lower rate


def total_steps(settings: Training, n: int) -> int:
    """Steps of a whole run over `n` images."""
    return settings.steps or max(1, math.ceil((settings.epochs or 0) * n / settings.batch))


def learning_rate(settings: Training, step: int, steps: int) -> float:
    """Rate at `step`: a straight way up, then the schedule's way down."""
    warmup = settings.warmup * steps
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, steps - warmup)
    factor = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[settings.schedule]
    return settings.lr * factor


def make_optimizer(network: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """The optimizer of one network; a group's `"scale"` is what its rate is to be multiplied by."""
    kernels = [p for p in network.parameters() if p.dim() >= 2]
    vectors = [p for p in network.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": kernels, "weight_decay": settings.weight_decay, "scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "scale": settings.vector_lr},
    ]
    groups = [g for g in groups if g["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.betas[0], nesterov=settings.betas[0] > 0)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}[settings.optimizer]
    return kind(groups, lr=settings.lr, betas=settings.betas)


class Log:
    """One line a record: in the file as JSON, on the screen for people. One that is not `kept`, as those of all
    processes but the first are not, writes nothing."""

    def __init__(self, path: Path, last_step: int, show: Callable[[str], None] | None, kept: bool = True) -> None:
        self.path, self.show, self.kept = path, show, kept
        if not kept:
            return
        with runs.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # what was written after the checkpoint will be written again
            with runs.writing(path):
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            runs.write_text(path, "".join(line + "\n" for line in lines if _step_of(line) <= last_step))

    def write(self, record: Mapping[str, Any]) -> None:
        if not self.kept:
            return
        line = json.dumps(record)
        with runs.writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self.show:
            self.show(screen.log_line(record))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # half a line, from a kill


def train(
    task: Task,
    settings: Training,
    folder: Path,
    *,
    seed: int = 0,
    device: str = "auto",
    devices: int = 1,
    validate: Validate | None = None,
    show: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Train the networks of `task` as `settings` say (precision and memory format already chosen; where several
    processes train, the first one's choice is everyone's), in `folder`.

    Goes on from the folder's checkpoint where there is one; afterwards the networks hold the weights that are kept.
    validate: figures on validation images, by name; `"score"` is what keep = "best" looks at. show: gets each log line.
    progress: gets (step, steps).

    Raises `ValueError` for a batch that the devices cannot share evenly; `DivergedError` where a loss is not a number,
    or the weights are not sound where a checkpoint of them is due: it names the step, what is wrong and the last good
    checkpoint.
    """
    # Set-up: devices, precision, memory format, one optimizer a network.
    fabric = _launched(device, devices)
    rank, world, kind = fabric.global_rank, fabric.world_size, fabric.device.type
    precision, layout = fabric.broadcast((settings.precision, settings.memory_format))
    settings = settings.model_copy(update={"precision": precision, "memory_format": layout})
    if settings.batch % world:  # the mean of their gradients would not be that of the images
        raise ValueError(f"{world} devices cannot share a batch of {settings.batch} evenly; set training.batch")
    n, keep_best = len(task.sampler.data), settings.keep == "best"
    steps, every = total_steps(settings, n), max(1, round((settings.validate_every or 0) * n / settings.batch))
    torch.manual_seed(seed)
    cost = _Cost(kind, settings, flop_per_image(task), world)
    networks = task.networks()
    wrapped, optimizers = _set_up(fabric, networks, settings)

    # Resume.
    state = TrainingState(networks, {k: o.optimizer for k, o in optimizers.items()})
    state.average = weights_of(networks) if settings.ema else None
    state.load(folder, steps)
    log = Log(folder / "log.jsonl", state.step, show, kept=rank == 0)

    # Steps.
    saved_at = time.monotonic()
    with _diverging(folder, state, rank):
        while state.step < steps:
            started = time.perf_counter()
            # Dropout and the like: fixed by the step alone, on each device another.
            torch.manual_seed(seed * 1_000_003 + state.step + (rank << 40))
            rate = learning_rate(settings, state.step, steps)
            with _autocast(kind, precision):
                for name, terms in task.losses(task.batch(state.step, rank, world), wrapped):
                    state.add(_update(fabric, wrapped[name], optimizers[name], terms, rate, settings.clip))
            state.advance(settings.ema, time.perf_counter() - started)
            last = state.step == steps
            if last or state.step % settings.log_every == 0:
                log.write(cost.record(state, rate, n))
                state.logged()
            if validate and settings.validate_every and (last or state.step % every == 0):
                log.write({"step": state.step, "validation": state.validated(validate, keep_best=keep_best)})
            if progress and rank == 0:
                progress(state.step, steps)
            if last or (rank == 0 and time.monotonic() - saved_at >= settings.checkpoint_seconds):
                state.check()
                if rank == 0:
                    state.save(folder)
                saved_at = time.monotonic()

    # What is kept.
    state.finish(validate, keep_best=keep_best)
    outcome = cost.outcome(state)
    if rank == 0:
        runs.write_json(folder / "training.json", asdict(outcome))
    return outcome


def _launched(device: str, devices: int) -> Fabric:
    from lightning_fabric import Fabric

    hosts = int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # torchrun's word for its --nnodes
    fabric = Fabric(
        accelerator="cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda",
        devices=devices,
        num_nodes=hosts,
        strategy="ddp" if devices * hosts > 1 else "auto",
        precision="32-true",  # autocast is the loop's own, so that it also covers the frozen classifier in a loss
    )
    fabric.launch()
    return fabric


def _set_up(
    fabric: Fabric, networks: Mapping[str, nn.Module], settings: Training
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the networks as a loss is to call them, their optimizers), on their device."""
    wrapped, optimizers = {}, {}
    for name, network in networks.items():
        set_layout(network.train(), settings.memory_format)
        wrapped[name], optimizers[name] = fabric.setup(network, make_optimizer(network, settings))
    return wrapped, optimizers


def _autocast(device: str, precision: str) -> torch.autocast:
    """For attacks too: in bfloat16 they differentiate the network that learns; images stay float32. Without the cache
    of cast weights, which would outlive a network's update."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def _update(
    fabric: Fabric, network: Any, optimizer: Any, terms: Mapping[str, Tensor], rate: float, clip: float | None
) -> dict[str, Tensor]:
    """One step of one network down the sum of its loss terms; returns their means over all devices. Raises
    `DivergedError`, on every device, where the sum of these is not a number."""
    each = torch.stack(list(terms.values()))
    loss = each.sum()
    means = cast(Tensor, fabric.all_reduce(each.detach().clone(), reduce_op="mean"))
    if not bool(torch.isfinite(means.sum())):
        listed = ", ".join(f"{k} = {float(v):.4g}" for k, v in zip(terms, means))
        raise DivergedError(f"a loss is not a number, {listed}")
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    optimizer.zero_grad()
    fabric.backward(loss)
    if clip is not None:
        fabric.clip_gradients(network, optimizer, max_norm=clip, error_if_nonfinite=False)
    optimizer.step()
    return dict(zip(terms, means))


@contextlib.contextmanager
def _diverging(folder: Path, state: TrainingState, rank: int) -> Iterator[None]:
    """A `DivergedError` from inside says at which step it was and how to go on, and is kept in the folder."""
    try:
        yield
    except DivergedError as error:
        last = folder / LAST
        where = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        said = (
            f"at step {state.step} {error}; {where}. Go on with --resume and a lower training.lr, or set training.clip"
        )
        if rank == 0:
            runs.write_json(folder / DIVERGED, {"step": state.step, "said": said})
        raise DivergedError(said) from None


class _Cost:
    """What the steps of a run cost, beside what plain convolutions reach on the same devices."""

    def __init__(self, device: str, settings: Training, flop_per_image: float, devices: int) -> None:
        self.device, self.devices, self.settings = device, devices, settings
        self.flop = flop_per_image * settings.batch
        self.convolution = self._rate(probe)

    def _rate(self, probe: Callable[[str], Speed]) -> float:
        return self.devices * probe(self.device).rates[self.settings.precision, self.settings.memory_format]

    def record(self, state: TrainingState, rate: float, n: int) -> dict[str, Any]:
        """The log line of a step: what has been done since the last one."""
        steps, seconds = state.step - state.logged_step, max(state.seconds - state.logged_seconds, 1e-9)
        return {
            "step": state.step,
            "epoch": round(state.step * self.settings.batch / n, 3),
            "lr": float(f"{rate:.4g}"),
            **{k: float(f"{float(v) / steps:.5g}") for k, v in state.sums.items()},
            "images_per_second": round(self.settings.batch * steps / seconds, 1),
            "gflops": round(self.flop * steps / seconds / 1e9, 1),
            "pflop": float(f"{self.flop * state.step / 1e15:.4g}"),
            "seconds": round(state.seconds, 2),
        }

    def outcome(self, state: TrainingState) -> Outcome:
        """What the whole has cost; the convolution is measured again, for a machine is not always equally quick."""
        convolution = (self.convolution + self._rate(probe.__wrapped__)) / 2
        gflops = self.flop * state.step / state.seconds / 1e9
        return Outcome(
            steps=state.step,
            seconds=round(state.seconds, 2),
            images_per_second=round(self.settings.batch * state.step / state.seconds, 1),
            pflop=float(f"{self.flop * state.step / 1e15:.4g}"),
            gflops=round(gflops, 1),
            convolution_gflops=round(convolution, 1),
            fraction_of_peak=round(gflops / convolution, 3),
            precision=self.settings.precision,
            memory_format=self.settings.memory_format,
            kept_step=state.kept_step,
            validation=state.validation,
        )
