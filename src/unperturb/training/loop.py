"""The one training loop: it alternates between networks, averages weights, logs, checkpoints and resumes.

It knows neither GANs nor classifiers: a task gives it networks, batches and losses. Batches and draws depend on (seed,
step) alone, so a killed run that is resumed from its last checkpoint ends with the same weights.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unperturb import runs, screen
from unperturb.config import Training
from unperturb.devices import probe, set_layout
from unperturb.runs import Outcome
from unperturb.training import checkpoints
from unperturb.training.checkpoints import Checkpoint, Progress, State
from unperturb.training.muon import Muon
from unperturb.training.objectives import Task
from unperturb.training.profiling import flop_per_image

Validate = Callable[[], Mapping[str, float]]
DIVERGED = "diverged.json"  # kept in the folder of a run that did, so that it may go on with a lower rate


class DivergedError(RuntimeError):
    """A loss was no longer a number, or the weights were no longer sound."""


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


def _optimizer(network: nn.Module, settings: Training) -> torch.optim.Optimizer:
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


def _snapshot(networks: Mapping[str, nn.Module]) -> State:
    return {k: {n: t.detach().clone() for n, t in net.state_dict().items()} for k, net in networks.items()}


def _load(networks: Mapping[str, nn.Module], state: State) -> None:
    for name, network in networks.items():
        network.load_state_dict(state[name])


def _beside(networks: Mapping[str, nn.Module], state: State | None) -> State | None:
    """`state`, read from a file, on the devices of `networks`."""
    own = _snapshot(networks)
    return state and {k: {n: own[k][n].copy_(t) for n, t in tensors.items()} for k, tensors in state.items()}


@torch.no_grad()
def _average(average: State, networks: Mapping[str, nn.Module], decay: float, step: int) -> None:
    weight = 1 - min(decay, (1 + step) / (10 + step))  # a short memory at first, or the start is never forgotten
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                average[name][key].lerp_(value, weight)
            else:
                average[name][key].copy_(value)


class _Log:
    """One line a record: in the file as JSON, on the screen for people."""

    def __init__(self, path: Path, last_step: int, show: Callable[[str], None] | None) -> None:
        self.path, self.show = path, show
        if path.exists():  # what was written after the checkpoint will be written again
            with runs.writing(path):
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= last_step]
            runs.write_text(path, "".join(line + "\n" for line in kept))

    def write(self, record: Mapping[str, Any]) -> None:
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

    Raises `DivergedError` where a loss is not a number, or the weights are not sound where a checkpoint of them is due:
    it names the step, what is wrong and the last good checkpoint.
    """
    from lightning_fabric import Fabric

    # Set-up: devices, precision, memory format, one optimizer a network.
    accelerator = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="32-true",  # autocast is the loop's own, so that it also covers the frozen classifier in a loss
    )
    fabric.launch()
    precision, layout = fabric.broadcast((settings.precision, settings.memory_format))
    settings = settings.model_copy(update={"precision": precision, "memory_format": layout})
    sampler = task.sampler
    n, world, rank = len(sampler.data), fabric.world_size, fabric.global_rank
    steps = total_steps(settings, n)
    torch.manual_seed(seed)
    flop = flop_per_image(task) * settings.batch
    convolution = probe(accelerator).rates[settings.precision, settings.memory_format]
    bare = task.networks()
    wrapped, optimizers = {}, {}
    for name, network in bare.items():
        set_layout(network.train(), settings.memory_format)
        wrapped[name], optimizers[name] = fabric.setup(network, _optimizer(network, settings))
    average = _snapshot(bare) if settings.ema else None

    def autocast() -> torch.autocast:
        # Without the cache of cast weights, which would outlive a network's update.
        return torch.autocast(
            accelerator, torch.bfloat16, enabled=settings.precision == "bfloat16", cache_enabled=False
        )

    # Resume.
    with runs.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    at = Progress()
    sums: dict[str, Tensor] = {}  # of the loss terms since the last log line
    best: State | None = None
    saved = checkpoints.load(folder, bare, steps)
    if saved is not None:
        _load(bare, saved.networks)
        for name, optimizer in optimizers.items():
            checkpoints.restore(optimizer.optimizer, saved.optimizers[name])
        average, best = _beside(bare, saved.average), _beside(bare, saved.best)
        at, sums = saved.progress, saved.sums
    step, seconds, since = at.step, at.seconds, at.since
    kept_step, validation, best_score = at.kept_step, at.validation, at.best_score
    log = _Log(folder / "log.jsonl", step, show if rank == 0 else None) if rank == 0 else None

    def keep_checkpoint() -> None:
        now = Progress(
            step=step, seconds=seconds, kept_step=kept_step, best_score=best_score, validation=validation, since=since
        )
        states = {k: o.state_dict() for k, o in optimizers.items()}
        checkpoints.save(folder, Checkpoint(now, _snapshot(bare), states, average, best, sums))

    def diverged(said: str) -> DivergedError:
        last = folder / checkpoints.LAST
        where = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        said = f"{said}; {where}. Go on with --resume and a lower training.lr, or set training.clip"
        if rank == 0:
            runs.write_json(folder / DIVERGED, {"step": step, "said": said})
        return DivergedError(said)

    # Steps.
    saved_at = time.monotonic()
    every = max(1, round((settings.validate_every or 0) * n / settings.batch))
    while step < steps:
        started = time.perf_counter()
        torch.manual_seed(seed * 1_000_003 + step)  # dropout and the like: fixed by the step, not by what came before
        rate = learning_rate(settings, step, steps)
        with autocast():  # attacks too: in bfloat16 they differentiate the network that learns; images stay float32
            batch = task.batch(step, rank, world)
            for name, terms in task.losses(batch, wrapped):
                loss = torch.stack(list(terms.values())).sum()
                if not bool(torch.isfinite(loss)):
                    listed = ", ".join(f"{k} = {float(v.detach()):.4g}" for k, v in terms.items())
                    raise diverged(f"the loss of the {name} is not a number at step {step}: {listed}")
                optimizer = optimizers[name]
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                optimizer.zero_grad()
                fabric.backward(loss)
                if settings.clip is not None:
                    fabric.clip_gradients(wrapped[name], optimizer, max_norm=settings.clip, error_if_nonfinite=False)
                optimizer.step()
                for term, value in terms.items():
                    sums[term] = sums.get(term, 0) + value.detach()
        if average is not None:
            _average(average, bare, settings.ema, step)
        step += 1
        seconds += time.perf_counter() - started

        if log and (step % settings.log_every == 0 or step == steps):
            spent = max(seconds - since[1], 1e-9)
            record = {
                "step": step,
                "epoch": round(step * settings.batch / n, 3),
                "lr": float(f"{rate:.4g}"),
                **{k: float(f"{float(v) / (step - since[0]):.5g}") for k, v in sums.items()},
                "images_per_second": round(settings.batch * (step - since[0]) / spent, 1),
                "gflops": round(flop * (step - since[0]) / spent / 1e9, 1),
                "pflop": float(f"{flop * step / 1e15:.4g}"),
                "seconds": round(seconds, 2),
            }
            log.write(record)
            sums, since = {}, (step, seconds)
        if validate and settings.validate_every and (step % every == 0 or step == steps):
            figures = _validated(validate, bare, average)
            if log:
                log.write({"step": step, "validation": figures})
            if best_score is None or figures["score"] > best_score:
                best_score = figures["score"]
                if settings.keep == "best":
                    best, kept_step, validation = copy.deepcopy(average or _snapshot(bare)), step, figures
            if settings.keep == "last":
                validation = figures
        if progress and rank == 0:
            progress(step, steps)
        if step == steps or (rank == 0 and time.monotonic() - saved_at >= settings.checkpoint_seconds):
            if wrong := checkpoints.unsound(bare):
                raise diverged(f"{wrong} at step {step}")
            if rank == 0:
                keep_checkpoint()
            saved_at = time.monotonic()

    # What is kept.
    if settings.keep == "last":
        kept_step = steps
    kept = best or average
    if kept is not None:
        _load(bare, kept)
    for network in bare.values():
        set_layout(network.eval(), "contiguous")
    if validate and not validation:
        validation = dict(validate())
    done = settings.batch * steps
    again = probe.__wrapped__(accelerator).rates[settings.precision, settings.memory_format]
    convolution = (convolution + again) / 2
    gflops = flop * steps / seconds / 1e9
    outcome = Outcome(
        steps=steps,
        seconds=round(seconds, 2),
        images_per_second=round(done / seconds, 1),
        pflop=float(f"{flop * steps / 1e15:.4g}"),
        gflops=round(gflops, 1),
        convolution_gflops=round(convolution, 1),
        share=round(gflops / convolution, 3),
        precision=settings.precision,
        memory_format=settings.memory_format,
        kept_step=kept_step,
        validation=validation,
    )
    if rank == 0:
        runs.write_json(folder / "training.json", asdict(outcome))
    return outcome


def _validated(validate: Validate, networks: Mapping[str, nn.Module], average: State | None) -> dict[str, float]:
    """Figures of the weights that would be kept now; the networks are left as they were."""
    now = _snapshot(networks) if average is not None else None
    if average is not None:
        _load(networks, average)
    for network in networks.values():
        network.eval()
    try:
        return {k: round(float(v), 5) for k, v in validate().items()}
    finally:
        if now is not None:
            _load(networks, now)
        for network in networks.values():
            network.train()
