"""What a training has come to: one object that the loop changes, and that saves and loads itself.

A checkpoint is two files, the last and the one before, of tensors with their digest; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from unperturb import runs
from unperturb.devices import set_layout

Weights = dict[str, dict[str, Tensor]]  # by network and name
Validate = Callable[[], Mapping[str, float]]
LAST, BEFORE = "checkpoint.safetensors", "checkpoint-before.safetensors"
LARGEST_WEIGHT = 1e5  # of images in [0, 1] no network learns anything with a weight near this


class DivergedError(RuntimeError):
    """A loss was no longer a number, or the weights were no longer sound."""


class _Numbers(BaseModel):
    """What of a state is no tensor. groups, counts: the optimizers' parameter groups, and what they count."""

    model_config = ConfigDict(allow_inf_nan=False)
    step: int = Field(ge=0)
    seconds: float = Field(ge=0)
    logged_step: int = Field(ge=0)
    logged_seconds: float = Field(ge=0)
    kept_step: int = Field(ge=0)
    best_score: float | None
    validation: dict[str, float]
    groups: dict[str, list[dict[str, Any]]]
    counts: dict[str, dict[str, dict[str, int | float]]]


_PLAIN = tuple(name for name in _Numbers.model_fields if name not in ("groups", "counts"))


@dataclass
class TrainingState:
    """A training at a step.

    networks, optimizers: by name, those that learn. average: of the weights, where one is kept; best: the weights that
    did best on validation images so far. step, seconds: done so far. sums: of the loss terms since the last log line,
    which was written at logged_step and logged_seconds. kept_step, validation, best_score: of the weights that would be
    kept now.
    """

    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    average: Weights | None = None
    best: Weights | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    logged_step: int = 0
    logged_seconds: float = 0.0
    kept_step: int = 0
    best_score: float | None = None
    validation: dict[str, float] = field(default_factory=dict)

    # As it learns ---------------------------------------------------------------------------------------------------

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count the loss terms of an update for the next log line."""
        for term, value in terms.items():
            self.sums[term] = self.sums.get(term, 0) + value.detach()

    @torch.no_grad()
    def advance(self, decay: float, seconds: float) -> None:
        """A step is done, in so many seconds: the average, if there is one, moves on with this decay."""
        if self.average is not None:
            # A short memory at first, or the start is never forgotten.
            weight = 1 - min(decay, (1 + self.step) / (10 + self.step))
            for name, network in self.networks.items():
                for key, value in network.state_dict().items():
                    if value.is_floating_point():
                        self.average[name][key].lerp_(value, weight)
                    else:
                        self.average[name][key].copy_(value)
        self.step += 1
        self.seconds += seconds

    def logged(self) -> None:
        """The log line of this step is written."""
        self.sums, self.logged_step, self.logged_seconds = {}, self.step, self.seconds

    def validated(self, validate: Validate, *, keep_best: bool) -> dict[str, float]:
        """Figures of the weights that would be kept now; the networks are left as they were. `"score"` decides which
        weights are the best."""
        now = weights_of(self.networks) if self.average is not None else None
        if self.average is not None:
            self._use(self.average)
        for network in self.networks.values():
            network.eval()
        try:
            figures = {k: round(float(v), 5) for k, v in validate().items()}
        finally:
            if now is not None:
                self._use(now)
            for network in self.networks.values():
                network.train()
        if self.best_score is None or figures["score"] > self.best_score:
            self.best_score = figures["score"]
            if keep_best:
                self.best, self.kept_step, self.validation = self._now(), self.step, figures
        if not keep_best:
            self.validation = figures
        return figures

    def finish(self, validate: Validate | None, *, keep_best: bool) -> None:
        """Leave in the networks the weights that are kept, in eval mode, and know what they are worth."""
        if not keep_best:
            self.kept_step = self.step
        if kept := self.best or self.average:
            self._use(kept)
        for network in self.networks.values():
            set_layout(network.eval(), "contiguous")
        if validate and not self.validation:
            self.validation = dict(validate())

    def check(self) -> None:
        """Raise `DivergedError` where weights are not finite, or so large that nothing can have been learned."""
        for name, network in self.networks.items():
            bounds = {id(p): LARGEST_WEIGHT for p in network.parameters()}
            for weight, tensor in network.state_dict(keep_vars=True).items():
                largest = float(tensor.detach().abs().amax()) if tensor.numel() else 0.0
                if not (math.isfinite(largest) and largest <= bounds.get(id(tensor), math.inf)):
                    raise DivergedError(
                        f"the weights of the {name} are no longer sound: {weight} reaches {largest:.4g}"
                    )

    def _now(self) -> Weights:
        """A copy of the average, or of the weights as they are where there is none."""
        if self.average is None:
            return weights_of(self.networks)
        return {k: {n: t.clone() for n, t in named.items()} for k, named in self.average.items()}

    def _use(self, weights: Weights) -> None:
        for name, network in self.networks.items():
            network.load_state_dict(weights[name])

    # On disk --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the state as `LAST` of `folder`, atomically; what was there becomes `BEFORE`."""
        tensors = {f"sums/{term}": tensor for term, tensor in self.sums.items()}
        for part, weights in (("networks", weights_of(self.networks)), ("average", self.average), ("best", self.best)):
            for network, named in (weights or {}).items():
                tensors |= {f"{part}/{network}/{name}": tensor for name, tensor in named.items()}
        groups: dict[str, Any] = {}
        counts: dict[str, dict[str, Any]] = {}
        for network, optimizer in self.optimizers.items():
            whole = optimizer.state_dict()
            groups[network], counts[network] = whole["param_groups"], {}
            for number, kept in whole["state"].items():
                large = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
                tensors |= {f"optimizers/{network}/{number}/{key}": tensor for key, tensor in large.items()}
                counts[network][str(number)] = {key: value for key, value in kept.items() if key not in large}
        numbers = {name: getattr(self, name) for name in _PLAIN} | {"groups": groups, "counts": counts}
        runs.save_tensors(folder / LAST, tensors, {"numbers": json.dumps(numbers)}, before=folder / BEFORE)

    def load(self, folder: Path, steps: int) -> None:
        """Go on from the last checkpoint of a run of `steps`; where it is damaged from the one before, with a warning.
        Where there is none the state is left as it is.

        Raises `RunError` where nothing that is there can be used.
        """
        if (folder / "checkpoint.pt").exists():
            raise runs.RunError(f"{folder / 'checkpoint.pt'} was written by an older version; delete it to start over")
        there = [folder / name for name in (LAST, BEFORE) if (folder / name).exists()]
        wrong = []
        for path in there:
            try:
                numbers, tensors = _read(path, steps)
                weights = self._weights_in(path, tensors)
                if "networks" not in weights or numbers.groups.keys() != self.optimizers.keys():
                    raise runs.RunError(f"{path} is not a whole checkpoint")
            except runs.RunError as error:
                wrong.append(str(error).partition("; make it again")[0])
                continue
            if wrong:
                warnings.warn(f"{wrong[0]}. Going on from the one before, at step {numbers.step}", stacklevel=3)
                there[0].unlink(missing_ok=True)  # or the next checkpoint would put it in the place of the good one
            self._take(numbers, tensors, weights)
            return
        if wrong:
            names = " and ".join(path.name for path in there)
            raise runs.RunError(f"{wrong[0]}. No checkpoint is left to go on from; delete {names} to start over")

    def _weights_in(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Weights]:
        """The weights among the tensors of a checkpoint, by part, if they are those of these networks."""
        parts: dict[str, Weights] = {}
        for name, tensor in tensors.items():
            part, network, key = [*name.split("/", 2), "", ""][:3]
            if part in ("networks", "average", "best"):
                parts.setdefault(part, {}).setdefault(network, {})[key] = tensor
        own = {k: net.state_dict() for k, net in self.networks.items()}
        for weights in parts.values():
            if not _alike(own, weights):
                raise runs.RunError(f"{path} is not of this run: its networks are others")
            if any(not tensor.isfinite().all() for named in weights.values() for tensor in named.values()):
                raise runs.RunError(f"{path} holds weights that are NaN or infinite")
        return parts

    def _take(self, numbers: _Numbers, tensors: Mapping[str, Tensor], weights: Mapping[str, Weights]) -> None:
        self._use(weights["networks"])
        self.average, self.best = (self._beside(weights.get(part)) for part in ("average", "best"))
        self.sums = {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith("sums/")}
        for network, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Any]] = {int(n): dict(c) for n, c in numbers.counts.get(network, {}).items()}
            prefix = f"optimizers/{network}/"
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    number, _, key = name.removeprefix(prefix).partition("/")
                    state.setdefault(int(number), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": numbers.groups[network]})
            for parameter, kept in optimizer.state.items():
                for key, value in kept.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:  # laid out as its parameter is
                        kept[key] = torch.empty_like(parameter).copy_(value)
        for name in _PLAIN:
            setattr(self, name, getattr(numbers, name))

    def _beside(self, weights: Weights | None) -> Weights | None:
        """`weights`, read from a file, on the devices of the networks."""
        own = weights_of(self.networks)
        return weights and {k: {n: own[k][n].copy_(t) for n, t in named.items()} for k, named in weights.items()}


def weights_of(networks: Mapping[str, nn.Module]) -> Weights:
    """A copy of all weights and statistics of `networks`."""
    return {k: {n: t.detach().clone() for n, t in net.state_dict().items()} for k, net in networks.items()}


def _alike(own: Mapping[str, Mapping[str, Tensor]], others: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether both have the same networks, names, shapes and dtypes."""

    def form(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[str, str], tuple[Any, ...]]:
        return {(k, n): (t.shape, t.dtype) for k, named in weights.items() for n, t in named.items()}

    return form(own) == form(others)


def _read(path: Path, steps: int) -> tuple[_Numbers, dict[str, Tensor]]:
    try:
        tensors = runs.load_tensors(path, require_digest=True, finite=False)
        numbers = _Numbers.model_validate_json(runs.read_metadata(path)["numbers"])
    except (KeyError, ValueError) as error:
        raise runs.RunError(f"{path} is not a checkpoint ({runs.shortened(str(error))})") from None
    if max(numbers.step, numbers.kept_step, numbers.logged_step) > steps:
        raise runs.RunError(f"{path} is not of this run: it is at step {numbers.step} of {steps}")
    return numbers, tensors
