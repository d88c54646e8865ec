"""Systems that are broken on purpose, each in one way, and honest ones beside them: a checker is believed when it tells
them apart. All are built on one small net for the 8x8 digits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.attackers import Attacker
from unperturb.attacks import Attack, create_attack
from unperturb.data import ImageSet, load_dataset
from unperturb.defenses import Defense, create_defense
from unperturb.evaluation.run import evaluate
from unperturb.results import Results
from unperturb.systems import System

EPS = 0.1  # in Linf; it breaks every image of the plain net
BATCH = 48  # test images, all probed, all attacked


# The nets that are not broken ----------------------------------------------------------------------------------------


@functools.cache
def _test() -> ImageSet:
    return load_dataset("digits", size=8).test.subset(BATCH)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """`BATCH` test images `(N, 1, 8, 8)` and their labels."""
    return _test().batch(torch.arange(BATCH), torch.device("cpu"))


def _trained(attack: Attack, steps: int) -> nn.Module:
    """A small net, trained on images that `attack` has moved."""
    train = load_dataset("digits", size=8).train
    images, labels = train.batch(torch.arange(len(train)), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    for step in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        y = labels[rows]
        x, _ = attack.solve(net, images[rows], y, index=rows, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@functools.cache
def plain() -> nn.Module:
    """A net without any defense."""
    return _trained(create_attack("noise", eps=EPS), 200)


@functools.cache
def robust() -> nn.Module:
    """An adversarially trained net."""
    return _trained(create_attack("pgd", eps=EPS, steps=2), 200)


# What is broken ------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """`answer(net, images)` in place of the net's logits."""

    def __init__(self, net: nn.Module, answer: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.answer = net, answer

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(self.net, images)


class TinyRandomGradient(torch.autograd.Function):
    """The identity, with noise of 1e-6 for a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.randn_like(gradient) * 1e-6


class LookUp(nn.Module):
    """Knows the test images, and answers the others with noise beyond one gray level from any."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        images, labels = digits()
        self.register_buffer("known", images.flatten(1))
        self.register_buffer("answers", 20.0 * F.one_hot(labels, 10))

    def forward(self, images: Tensor) -> Tensor:
        distance, nearest = torch.cdist(images.flatten(1), self.known, p=torch.inf).min(1)
        return torch.where((distance < 1e-6)[:, None], self.answers[nearest], self.net(images))


class KnowsFGSM(nn.Module):
    """Undoes what looks like one step of FGSM: pixels that differ by the very same amount from a known image."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("known", digits()[0])

    def forward(self, images: Tensor) -> Tensor:
        away = images[:, None] - self.known[None]
        nearest = away.flatten(2).abs().amax(2).argmin(1)
        known, step = self.known[nearest], away[torch.arange(len(images)), nearest].abs().flatten(1)
        inside = ((known > EPS) & (known < 1 - EPS)).flatten(1)  # whose whole step the box has not cut
        one_size = ((step - EPS).abs() < 1e-5) | ~inside
        return self.net(torch.where(one_size.all(1)[:, None, None, None], known, images))


class RandomNoise(nn.Module):
    """Noise on the pixels, and not a word of it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images + 0.2 * torch.randn_like(images))


class BatchStatistics(nn.Module):
    """Its normalization never leaves train mode: it is by the batch that an image comes in."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(F.batch_norm(images, None, None, training=True) * 0.35 + 0.3)


class Refuses(nn.Module):
    """Raises an error for a batch with a dark image in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        if bool(_dark(images).any()):
            raise RuntimeError("too dark")
        return self.net(images)


def _dark(images: Tensor) -> Tensor:
    """One in eight of the test images, and what is as dark."""
    return images.mean((1, 2, 3)) < digits()[0].mean((1, 2, 3)).quantile(1 / 8)


def _nan(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).masked_fill(_dark(x)[:, None], torch.nan)


def _half_detached(net: nn.Module, x: Tensor) -> Tensor:
    early, late = net[:2], net[2:]  # type: ignore[index]
    brightness = x.mean((1, 2, 3), keepdim=True)
    return late(early(x).detach() + brightness - brightness.detach())


def _clipped(net: nn.Module, x: Tensor) -> Tensor:
    logits = net(x)
    return (100 * (logits - logits.topk(2, 1).values.mean(1, keepdim=True))).clamp(-10, 10)


def _by_order(net: nn.Module, x: Tensor) -> Tensor:
    odd = torch.arange(len(x), device=x.device)[:, None] % 2
    return net(x) + 0.3 * odd * net(x).roll(1, 1)


def _by_company(net: nn.Module, x: Tensor) -> Tensor:
    return net(x + 0.5 * (x.mean(0, keepdim=True) - 0.3))


@torch.no_grad()
def _silent(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


@dataclass(frozen=True)
class Sabotage:
    """name: of the system. broken: what is, in words. make: it around a net. flag: which is to catch it. naive: what a
    careless evaluation measures, and the accuracy in percent that it finds (None: it ends in an error)."""

    name: str
    broken: str
    make: Callable[[nn.Module], nn.Module]
    flag: str
    naive: tuple[str, int | None]

    def system(self) -> System:
        """It in the plain net's place."""
        return System(self.name, self.make(plain()), base=plain())


def _broken(answer: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    return lambda net: Broken(net, answer)


SABOTAGED = {
    s.name: s
    for s in (
        Sabotage("rounding", "pixels are rounded to 16 levels, which have no slope",
                 _broken(lambda net, x: net((x * 15).round() / 15)), "gradient-masked", ("pgd-20", 91)),
        Sabotage("no-grad", "the classifier answers under `no_grad`",
                 _broken(_silent), "gradient-masked", ("pgd-20", None)),
        Sabotage("saturated", "logits times 10,000: the softmax is exactly one-hot",
                 _broken(lambda net, x: net(x) * 1e4), "gradient-masked", ("pgd-20", 89)),
        Sabotage("clipped", "logits are cut off above and below, where they become flat",
                 _broken(_clipped), "gradient-masked", ("pgd-20", 86)),
        Sabotage("half-detached", "`detach` halfway: only the brightness has a gradient",
                 _broken(_half_detached), "wrong-gradient", ("pgd-20", 83)),
        Sabotage("tiny-random-gradient", "the gradient is noise of size 1e-6",
                 _broken(lambda net, x: net(TinyRandomGradient.apply(x))), "wrong-gradient", ("pgd-20", 84)),
        Sabotage("probabilities", "probabilities come out, not logits",
                 _broken(lambda net, x: net(x).softmax(1)), "probabilities", ("pgd-20", 0)),
        Sabotage("noise-only", "noise on the pixels, and not a word of it",
                 RandomNoise, "random-answers", ("pgd-20", 9)),
        Sabotage("batch-norm", "batch normalization never leaves train mode",
                 BatchStatistics, "batch-dependent", ("pgd-20", 41)),
        Sabotage("by-company", "the mean of the batch goes into each answer",
                 _broken(_by_company), "batch-dependent", ("pgd-20", 17)),
        Sabotage("by-order", "the place in the batch goes into each answer",
                 _broken(_by_order), "batch-dependent", ("pgd-20", 0)),
        Sabotage("look-up", "the test images are known by heart",
                 LookUp, "exact-pixels", ("clean", 100)),
        Sabotage("knows-fgsm", "one step of FGSM is recognized and undone",
                 KnowsFGSM, "exact-pixels", ("fgsm", 95)),
        Sabotage("nan", "logits are NaN for dark images",
                 _broken(_nan), "no-answer", ("pgd-20", 0)),
        Sabotage("refuses", "dark images raise an error",
                 Refuses, "no-answer", ("pgd-20", None)),
    )
}  # fmt: skip


class Blur(Defense):
    """An honest purifier that helps against nothing: a mean filter."""

    def purify(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 3, stride=1, padding=1)


class GaussianNoise(Defense):
    """An honest random purifier: it says so."""

    random = True

    def purify(self, images: Tensor) -> Tensor:
        return (images + 0.05 * torch.randn_like(images)).clamp(0, 1)


# Systems without a fault, by name.
HONEST: dict[str, Callable[[], System]] = {
    "plain": lambda: System("plain", plain()),
    "robust": lambda: System("robust", robust(), base=plain()),
    "robust alone": lambda: System("robust alone", robust()),
    "blur": lambda: System("blur", plain(), Blur()),
    "median": lambda: System("median", plain(), create_defense("median")),
    "bit depth": lambda: System("bit depth", plain(), create_defense("bit_depth")),
    "noise": lambda: System("noise", plain(), GaussianNoise()),
}


# A small evaluation ---------------------------------------------------------------------------------------------------


def attackers(eps: float = EPS) -> list[Attacker]:
    """An attacker of every kind of knowledge that needs no surrogate, each small."""
    pgd = create_attack("pgd", eps=eps, steps=20)
    targeted = create_attack("apgd-t", eps=eps, steps=8, target_classes=2)
    return [
        Attacker(create_attack("noise", eps=eps), "none"),
        Attacker(pgd, "oblivious"),
        Attacker(create_attack("fgsm", eps=eps), "white_box", eot_samples=4),
        Attacker(pgd, "white_box", eot_samples=4),
        Attacker(targeted, "white_box", randomness=False),
        Attacker(create_attack("deepfool", steps=10), "white_box", randomness=False),
        Attacker(create_attack("square", eps=eps, queries=60), "black_box"),
    ]


def evaluated(
    system: System, out: Path, sent: Sequence[Attacker] | None = None, data: ImageSet | None = None
) -> Results:
    """The results of `sent` (default: `attackers()`) on the digits, or on `data`; `out` is the run folder."""
    evaluate(data or _test(), [system], sent or attackers(), out=out, quiet=True)
    return Results.read(out)


def accuracy(model: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == digits()[1]).float().mean())
