"""Checkpoints of the loop: tensors with their digest in two files, the last and the one before."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from unperturb import runs

State = dict[str, dict[str, Tensor]]
LAST, BEFORE = "checkpoint.safetensors", "checkpoint-before.safetensors"
LARGEST_WEIGHT = 1e5  # of images in [0, 1] no network learns anything with a weight near this


class Progress(BaseModel):
    """The numbers of a checkpoint. since: (step, seconds) of the last log line."""

    model_config = ConfigDict(allow_inf_nan=False)
    step: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    kept_step: int = Field(default=0, ge=0)
    best_score: float | None = None
    validation: dict[str, float] = Field(default_factory=dict)
    since: tuple[int, float] = (0, 0.0)


class _Numbers(BaseModel):
    progress: Progress
    groups: dict[str, list[dict[str, Any]]]
    counts: dict[str, dict[str, dict[str, int | float]]]


@dataclass
class Checkpoint:
    """All that a run needs to go on: weights, their average and the best so far by network, optimizers' states, and the
    sums of the loss terms since the last log line."""

    progress: Progress
    networks: State
    optimizers: dict[str, dict[str, Any]]
    average: State | None = None
    best: State | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)


def unsound(networks: Mapping[str, nn.Module]) -> str | None:
    """What is wrong with the weights, if they are not finite or so large that nothing can have been learned."""
    for name, network in networks.items():
        bounds = {id(p): LARGEST_WEIGHT for p in network.parameters()}
        for weight, tensor in network.state_dict(keep_vars=True).items():
            largest = float(tensor.detach().abs().amax()) if tensor.numel() else 0.0
            if not (math.isfinite(largest) and largest <= bounds.get(id(tensor), math.inf)):
                return f"the weights of the {name} are no longer sound: {weight} reaches {largest:.4g}"
    return None


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """The checkpoint as `LAST` of `folder`, atomically; what was there becomes `BEFORE`."""
    tensors = {f"sums/{term}": tensor for term, tensor in checkpoint.sums.items()}
    for part in ("networks", "average", "best"):
        for network, state in (getattr(checkpoint, part) or {}).items():
            tensors |= {f"{part}/{network}/{name}": tensor for name, tensor in state.items()}
    counts: dict[str, dict[str, dict[str, float]]] = {}
    for network, optimizer in checkpoint.optimizers.items():
        for number, state in optimizer["state"].items():
            kept = {k: v for k, v in state.items() if isinstance(v, Tensor)}
            tensors |= {f"optimizers/{network}/{number}/{key}": tensor for key, tensor in kept.items()}
            counts.setdefault(network, {})[str(number)] = {k: v for k, v in state.items() if k not in kept}
    numbers = {
        "progress": checkpoint.progress.model_dump(mode="json"),
        "groups": {network: optimizer["param_groups"] for network, optimizer in checkpoint.optimizers.items()},
        "counts": counts,
    }
    runs.save_tensors(folder / LAST, tensors, {"numbers": json.dumps(numbers)}, before=folder / BEFORE)


def load(folder: Path, networks: Mapping[str, nn.Module], steps: int) -> Checkpoint | None:
    """The last checkpoint of a run of `steps` over `networks`; where it is damaged the one before, with a warning; None
    where there is none. Raises `RunError` where nothing that is there can be used."""
    if (folder / "checkpoint.pt").exists():
        raise runs.RunError(f"{folder / 'checkpoint.pt'} was written by an older version; delete it to start over")
    there = [folder / name for name in (LAST, BEFORE) if (folder / name).exists()]
    wrong = []
    for path in there:
        try:
            found = _read(path, networks, steps)
        except runs.RunError as error:
            wrong.append(str(error).partition("; make it again")[0])
            continue
        if wrong:
            warnings.warn(f"{wrong[0]}. Going on from the one before, at step {found.progress.step}", stacklevel=3)
            there[0].unlink(missing_ok=True)  # or the next checkpoint would put it in the place of the good one
        return found
    if wrong:
        names = " and ".join(path.name for path in there)
        raise runs.RunError(f"{wrong[0]}. No checkpoint is left to go on from; delete {names} to start over")
    return None


def _read(path: Path, networks: Mapping[str, nn.Module], steps: int) -> Checkpoint:
    try:
        tensors = runs.load_tensors(path, require_digest=True, finite=False)
        numbers = _Numbers.model_validate_json(runs.read_metadata(path)["numbers"])
    except (KeyError, ValueError) as error:
        raise runs.RunError(f"{path} is not a checkpoint ({runs.shortened(str(error))})") from None
    progress = numbers.progress
    if max(progress.step, progress.kept_step, progress.since[0]) > steps:
        raise runs.RunError(f"{path} is not of this run: it is at step {progress.step} of {steps}")
    states: dict[str, State] = {}
    optimizers: dict[str, dict[str, Any]] = {}
    own = {name: network.state_dict() for name, network in networks.items()}
    for network, groups in numbers.groups.items():
        counts = {int(number): dict(state) for number, state in numbers.counts.get(network, {}).items()}
        optimizers[network] = {"state": counts, "param_groups": groups}
    sums = {}
    for name, tensor in tensors.items():
        part, *rest = name.split("/", 3 if name.startswith("optimizers/") else 2)
        if part == "sums":
            sums["/".join(rest)] = tensor
        elif part == "optimizers" and len(rest) == 3 and rest[0] in optimizers:
            optimizers[rest[0]]["state"].setdefault(int(rest[1]), {})[rest[2]] = tensor
        elif part in ("networks", "average", "best") and len(rest) == 2:
            states.setdefault(part, {}).setdefault(rest[0], {})[rest[1]] = tensor
    for state in states.values():
        same = state.keys() == own.keys() and all(state[k].keys() == own[k].keys() for k in own)
        every = [(tensor, own[k][name]) for k in own for name, tensor in state[k].items()] if same else []
        if not same or any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in every):
            raise runs.RunError(f"{path} is not of this run: its networks are others")
        if any(not a.isfinite().all() for a, _ in every):
            raise runs.RunError(f"{path} holds weights that are NaN or infinite")
    if "networks" not in states or optimizers.keys() != own.keys():
        raise runs.RunError(f"{path} is not a whole checkpoint")
    return Checkpoint(progress, states["networks"], optimizers, states.get("average"), states.get("best"), sums)


def restore(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give `optimizer` the state of a checkpoint, each tensor laid out in memory as its parameter is."""
    optimizer.load_state_dict(dict(state))
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kept[key] = torch.empty_like(parameter).copy_(value)
