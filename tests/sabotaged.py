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

from unperturb import metrics
from unperturb.attackers import Attacker
from unperturb.attacks import Attack, create_attack
from unperturb.data import load_dataset
from unperturb.defenses import Defense, create_defense
from unperturb.evaluation.probe import probe
from unperturb.modules import classes_of, evaluating, logits_of
from unperturb.results import Results
from unperturb.results.schema import cell_folder, write_rows
from unperturb.runs import write_json
from unperturb.systems import System

EPS = 0.1  # in Linf; it breaks every image of the plain net
BATCH = 48  # test images, all probed, all attacked


# The nets that are not broken ----------------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """`BATCH` test images `(N, 1, 8, 8)` and their labels."""
    test = load_dataset("digits", size=8).test.subset(BATCH)
    return test.batch(torch.arange(BATCH), torch.device("cpu"))


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

Cell = tuple[str, Attack, str]  # name, attack, knowledge
CELLS: Sequence[Cell] = (
    ("noise", create_attack("noise", eps=EPS), "none"),
    ("pgd-20", create_attack("pgd", eps=EPS, steps=20), "oblivious"),
    ("fgsm", create_attack("fgsm", eps=EPS), "white_box"),
    ("pgd-20", create_attack("pgd", eps=EPS, steps=20), "white_box"),
    ("apgd-t", create_attack("apgd-t", eps=EPS, steps=8, target_classes=2), "white_box"),
    ("deepfool", create_attack("deepfool", steps=10), "white_box"),
    ("square", create_attack("square", eps=EPS, queries=60), "black_box"),
)


def evaluate(
    systems: Sequence[System],
    out: Path,
    cells: Sequence[Cell] = CELLS,
    *,
    data: tuple[Tensor, Tensor] | None = None,
    eps: float = EPS,
    draws: int = 10,
) -> Results:
    """The results of `cells` on the digits, or on `data`: rows in `out`, with what is known of the systems beside them,
    the probe at `eps` too. An attack that ends in an error has no rows."""
    images, labels = data or digits()
    about: dict[str, Any] = {}
    for system in systems:
        for name, attack, knowledge in cells:
            attacker = Attacker(attack, knowledge, eot_samples=4)
            knowledge = attacker.knowledge_of(system)
            path = out / "rows" / cell_folder("net", system.name, name, knowledge) / "0000.parquet"
            try:
                attack = attacker.attack_for(system)
                x_adv, counter = attack.solve(attacker.model_for(system), images, labels)
            except (ValueError, RuntimeError):  # a minimal-norm attack on a random system, no gradient, a refused image
                continue
            whole = system.model
            repeated = draws if system.random else 1
            order = torch.arange(len(images)).repeat(repeated)
            seen = {
                "pred_clean": _predictions(system.bare, images, 1),
                "pred_adv": _predictions(system.bare, x_adv, 1),
                "pred_pure_clean": _predictions(whole, images, repeated),
                "pred_pure_adv": _predictions(whole, x_adv, repeated),
                "pred_pure_adv_8bit": _predictions(whole, (x_adv * 255).round() / 255, repeated),
            }
            spent = {k: getattr(counter, k) for k in ("gradients", "zero_gradients", "nonfinite")}
            columns = {k: v.repeat(len(order) // len(v)) for k, v in seen.items()}
            columns |= {k: v[order] for k, v in (metrics.distances(x_adv, images) | spent).items()}
            unused = dict.fromkeys(
                (f"{k}_{x}" for k in ("psnr", "ssim") for x in ("adv", "pure_adv", "pure_clean")), 0.0
            )
            unused |= dict.fromkeys(("conf_clean", "conf_adv", "conf_pure_clean", "conf_pure_adv"), 0.0)
            write_rows(
                path,
                {
                    "dataset": "digits", "split": "test", "classifier": "net", "system": system.name,
                    "defended": not system.undefended, "attack": name, "attack_repr": repr(attack),
                    "norm": getattr(attack, "norm", "") if hasattr(attack, "eps") else "",
                    "eps": getattr(attack, "eps", float("nan")), "knowledge": knowledge, "surrogate": "", "seed": 0,
                    "draw": torch.arange(repeated).repeat_interleave(len(images)).numpy(),
                    "index": order.numpy(), "label": labels[order].numpy(), "made_by": "",
                    "rejected_clean": False, "rejected_adv": False, "scores_clean": [[]] * len(order),
                    "scores_adv": [[]] * len(order), "seconds_attack": 0.0, "seconds_purify": 0.0,
                    **unused, **{k: v.numpy() for k, v in columns.items()},
                },
            )  # fmt: skip
        about[system.name] = {
            "dataset": "digits", "folder": "", "spec": None, "differentiable": system.differentiable,
            "random": system.random, "defended": not system.undefended, "pflop": None, "seconds": None,
        }  # fmt: skip
    write_json(out / "systems.json", about)
    few = slice(BATCH)
    write_json(out / "probe.json", {s.name: probe(s, images[few], labels[few], eps=eps) for s in systems})
    return Results.read(out)


def accuracy(model: nn.Module, images: Tensor) -> float:
    return float((_predictions(model, images, 1) == digits()[1]).float().mean())


@torch.no_grad()
def _predictions(model: nn.Module, images: Tensor, draws: int) -> Tensor:
    """`(draws * N,)` classes, one whole draw after the other; -1 where there is no answer."""
    with evaluating(model.modules()), torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.cat([_one_draw(model, images) for _ in range(draws)])


def _one_draw(model: nn.Module, images: Tensor) -> Tensor:
    try:
        return classes_of(logits_of(model, images))
    except RuntimeError:
        if len(images) == 1:
            return torch.full((1,), -1)
        return torch.cat([_one_draw(model, x) for x in images.split(1)])
