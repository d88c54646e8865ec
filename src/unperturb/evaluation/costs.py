"""What an evaluation will cost, told before it begins and without making it: no attack meets a real model here.

An attack is made on two images of a stand-in, a single convolution, which bills its passes; of each real model one
forward and one backward pass are counted. So a slow model, such as a search per image, is asked once or twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unperturb.attacks.base import Attack
from unperturb.devices import FlopCounter, probe
from unperturb.evaluation.cascade import SHARED
from unperturb.evaluation.identity import identify
from unperturb.evaluation.plan import Cell, Plan
from unperturb.evaluation.surrogates import Retrained
from unperturb.mistakes import named
from unperturb.modules import ask, frozen, logits_of
from unperturb.systems import System
from unperturb.training.jobs import Cost as TrainingCost


@dataclass(frozen=True)
class Cost:
    """What an evaluation would take, nothing being kept from before: at least, where every image falls to the first
    who looks, and at most, where every image stands to the end. PFLOP, and minutes here.

    training_steps, training_pflop: of it, what the attacker's own trainings take.
    """

    cells: int
    images: int
    pflop: float
    minutes: float
    least_pflop: float
    least_minutes: float
    training_steps: int = 0
    training_pflop: float = 0.0

    def __str__(self) -> str:
        said = amount((self.least_pflop, self.pflop), (self.least_minutes, self.minutes))
        if not self.training_steps:
            return said
        return (
            f"{said}; {self.training_pflop:g} PFLOP of it is for {self.training_steps:,} steps in which the attacker "
            "trains a purifier"
        )


def amount(pflop: tuple[float, float], minutes: tuple[float, float]) -> str:
    """A cost between a least and a most, as a person reads it."""
    if pflop[0] == pflop[1]:
        return f"{pflop[1]:.3g} PFLOP, about {minutes[1]:,.1f} minutes"
    low, high = (f"{m:,.1f}" if m < 10 else f"{m:,.0f}" for m in minutes)
    return f"{pflop[0]:.3g} to {pflop[1]:.3g} PFLOP, about {low} to {high} minutes: what falls early is cheap"


def estimate(plan: Plan) -> Cost:
    """Count the operations of `plan`, for all its images. Raises `ValueError` as `Plan.check` does."""
    plan.check()
    with plan.at_work(), plan.drawing(0), named("a model, while its cost was counted,"):
        least, most = (total * len(plan.data) / 1e15 for total in _operations(plan))
    rate = max(v for k, v in probe(plan.device.type).rates.items() if k[0] == "float32")
    trainings = list(training_costs(plan).values())
    training = sum(cost.pflop for cost in trainings)

    def minutes(pflop: float) -> float:
        return round(pflop * 1e6 / (rate * 0.3) / 60 + sum(cost.minutes for cost in trainings), 1)

    return Cost(
        cells=len(plan.cells()),
        images=len(plan.data),
        pflop=float(f"{most + training:.3g}"),
        minutes=minutes(most),
        least_pflop=float(f"{least + training:.3g}"),
        least_minutes=minutes(least),
        training_steps=sum(cost.steps for cost in trainings),
        training_pflop=float(f"{training:.3g}"),
    )


def training_costs(plan: Plan) -> dict[str, TrainingCost]:
    """By the system, what the attacker's training of a purifier like its own takes, where he still has to train one.
    Raises `ValueError` where he cannot."""
    untrained = {name: one for name, one in plan.retrained.items() if isinstance(one, Retrained)}
    with plan.at_work():
        return {name: one.cost(str(plan.device)) for name, one in untrained.items()}


def _operations(plan: Plan) -> tuple[float, float]:
    """Of all cells, per image, at least and at most; what they share is counted once, as it is made once."""
    images, _ = plan.data.batch(torch.arange(min(2, len(plan.data))), plan.device)
    targets: dict[str, tuple[float, float]] = {}
    made: dict[str, tuple[float, float]] = {}
    certain: dict[str, float] = {}
    asked: dict[tuple[int, int], tuple[System, set[str]]] = {}
    cells = plan.cells()
    models = [cell.target() for cell in cells]  # alive until the end: the id of what has gone is given again
    for cell, target in zip(cells, models):
        one, adversarials = identify(target).key, cell.identity(target).key
        if one not in targets:
            targets[one] = _passes(target, images, backward=cell.attacker.attack.needs_gradient)
        if adversarials not in made:
            bills = billed(cell.attacker.attack, images, plan.data.classes)
            low, high = (forwards * targets[one][0] + backwards * targets[one][1] for forwards, backwards in bills)
            made[adversarials] = low, high
        certain[adversarials] = max(certain.get(adversarials, 0.0), _certain(plan, cell))
        for system in (System("", cell.system.bare), cell.system):
            key = id(system.classifier), id(system.purifier)
            asked.setdefault(key, (system, set()))[1].update(("clean", adversarials))
        asked[key][1].add(f"{adversarials} in 8 bits")
    answers = sum(len(seen) * plan.draws_of(system) * _answer(system, images) for system, seen in asked.values())
    least = sum(certain[key] * one for key, (one, _) in made.items())
    return least + answers, sum(most for _, most in made.values()) + answers


def _certain(plan: Plan, cell: Cell) -> float:
    """The share of the images that a cell attacks whatever those before it have broken."""
    if plan.cascade is None or cell.label in plan.cascade.whole or cell.attacker.knowledge == "none":
        return 1.0
    if cell.attacker.knowledge in SHARED and not cell.system.undefended:
        return 1.0
    return min(1.0, plan.cascade.doubted / max(1, len(plan.data)))


def _passes(model: nn.Module, images: Tensor, *, backward: bool) -> tuple[float, float]:
    """Operations of one forward and of one backward pass to the image, per image."""
    x = images.clone().requires_grad_(backward)
    with frozen(model), torch.set_grad_enabled(backward):
        with FlopCounter() as there:
            logits = logits_of(model, x)
        with FlopCounter() as back:
            if logits.requires_grad:
                torch.autograd.grad(logits.sum(), x, allow_unused=True)
    return there.total / len(x), back.total / len(x)


@torch.no_grad()
def _answer(system: System, images: Tensor) -> float:
    """Operations in which the system answers, per image."""
    with FlopCounter() as counter:
        if system.purifier is not None:
            images, _ = system.purifier.purify_and_score(images.clone(), lambda x: ask(system.classifier, x))
        logits_of(system.classifier, images)
    return counter.total / len(images)


class StandIn(nn.Module):
    """A convolution as large as the image, images to logits, which costs next to nothing. `stubborn`: it says class 0
    to anything, so that an attack spends all it has; else it can be fooled, for attacks that need a success to go on.
    """

    def __init__(self, images: Tensor, classes: int, *, stubborn: bool) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        weight = torch.randn(classes, *images.shape[1:], generator=draws) / math.sqrt(images[0].numel())
        self.weight = weight.to(images.device)
        self.bias = torch.tensor([1e3 * stubborn] + [0.0] * (classes - 1), device=images.device)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(images, self.weight, self.bias).flatten(1)


class _Counter(TorchDispatchMode):
    """Counts convolutions inside, forward and backward, in images."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.forwards = self.backwards = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.convolution:
            self.forwards += len(args[0])
        elif func.overloadpacket is torch.ops.aten.convolution_backward:
            self.backwards += len(args[0])
        return out


Bill = tuple[float, float]


def billed(attack: Attack, images: Tensor, classes: int) -> tuple[Bill, Bill]:
    """Forward and backward passes to the image that `attack` makes, per image: of a model that falls at once, and of
    any at most.

    What repeats is tried twice, by few and by twice as many, and carried on along the line through both.

    images: `(N, C, H, W)`, on which it is tried. classes: of the model.
    """
    if getattr(attack, "abort_early", False):
        attack = _with(attack, "abort_early", False)
    for count, few in _REPEATED.items():
        asked = getattr(attack, count, 0)
        if isinstance(asked, int) and asked > 2 * few:
            once, twice = (billed(_with(attack, count, n), images, classes) for n in (few, 2 * few))
            reach = (asked - few) / few
            least, most = ((a[0] + (b[0] - a[0]) * reach, a[1] + (b[1] - a[1]) * reach) for a, b in zip(once, twice))
            return least, most
    key = "" if attack.holds_own else repr(attack)
    if (key, images.shape, classes) in _KNOWN:
        return _KNOWN[key, images.shape, classes]
    bills = []
    for stubborn in (False, True):
        model = StandIn(images, classes, stubborn=stubborn)
        labels = model(images).argmax(1)
        with _Counter() as counter:
            attack.solve(model, images, labels)
        bills.append((counter.forwards / len(images), counter.backwards / len(images)))
    (f, b), (forwards, backwards) = bills
    found = (min(f, forwards), min(b, backwards)), (max(f, forwards), max(b, backwards))
    if key:
        _KNOWN[key, images.shape, classes] = found
    return found


def _with(attack: Any, option: str, value: int) -> Attack:
    found: Attack = replace(attack, **{option: value})
    return found


_REPEATED = {"restarts": 1, "steps": 10, "queries": 50}  # by the option, how few are tried
_KNOWN: dict[tuple[str, torch.Size, int], tuple[Bill, Bill]] = {}  # each attack is tried once in a process
