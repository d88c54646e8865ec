"""Batches of clean and adversarial images, drawn afresh each step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unperturb import per_image_rng
from unperturb.attacks.base import Attack, attacks
from unperturb.config import AdversarialBatchesConfig, Augmentation, ComponentConfig
from unperturb.data import ImageSet, augment
from unperturb.defenses.base import Batch

FRACTION = re.compile(r"[0-9]+/[1-9][0-9]*|[0-9]+(\.[0-9]+)?")


class Sampler:
    """Rows of a training split in an order fixed by (seed, step): every image once an epoch."""

    def __init__(self, data: ImageSet, batch: int, seed: int, augmentation: Augmentation, device: torch.device) -> None:
        if data.split != "train":
            raise ValueError(
                f"training on the {data.split!r} split is refused: what is trained or tuned on it could not be judged "
                "on it. Pass .train"
            )
        self.data, self.batch, self.seed, self.augmentation, self.device = data, batch, seed, augmentation, device
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """Row numbers of this step for device `rank` of `world`."""
        n = len(self.data)
        first = step * self.batch
        wanted = range(first + rank, first + self.batch, world)
        parts = []
        for epoch in range(wanted[0] // n, wanted[-1] // n + 1):
            if epoch != self._epoch:
                self._epoch, self._order = epoch, per_image_rng.permutation(self.seed, epoch, n)
            places = torch.tensor([w - epoch * n for w in wanted if w // n == epoch], dtype=torch.int64)
            parts.append(self._order[places])
        return torch.cat(parts)

    def images(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """(augmented images, labels, index) of this step."""
        rows = self.rows(step, rank, world)
        images, labels = self.data.batch(rows, self.device)
        index = self.data.index[rows].to(self.device)
        a = self.augmentation
        if a.pad or a.flip or a.cutout:
            images = augment(images, index, seed=self.seed, step=step, pad=a.pad, flip=a.flip, cutout=a.cutout)
        return images, labels, index


def _number(value: Any) -> int | float | None:
    """`value` if it is a number, or a fraction such as `"8/255"`."""
    if isinstance(value, str) and FRACTION.fullmatch(value):
        return float(Fraction(value))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _draw(value: Any, u: float) -> Any:
    """An option: a range `[low, high]` becomes one number of it, anything else stays."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return value
    low, high = map(_number, value)
    if low is None or high is None:
        return value
    if low > high:
        raise ValueError(f"a range is [low, high]; got {list(value)}")
    if isinstance(low, int) and isinstance(high, int):
        return low + min(int(u * (high - low + 1)), high - low)
    return low + u * (high - low)


class Mixture:
    """Attacks by share of the batch; options given as ranges are drawn by (seed, step)."""

    def __init__(self, things: Sequence[ComponentConfig], seed: int) -> None:
        self.seed = seed
        self.parts = [(t.name, {k: v for k, v in t.options.items() if k != "share"}) for t in things]
        shares = [float(t.options.get("share", 1.0)) for t in things]
        if min(shares) <= 0:
            raise ValueError("each attack's share must be above 0")
        self.shares = [s / sum(shares) for s in shares]
        self.at(0)  # a wrong name or option is met before anything is trained

    def at(self, step: int) -> list[Attack]:
        """The attacks of this step."""
        made = []
        for number, (name, options) in enumerate(self.parts):
            u = per_image_rng.uniform(self.seed, torch.tensor([number]), step, (max(1, len(options)),))[0].tolist()
            made.append(attacks.create(name, **{k: _draw(v, x) for (k, v), x in zip(options.items(), u)}))
        return made

    def split(self, n: int) -> list[slice]:
        """Where each attack's images lie in a batch of `n`."""
        edges, total = [0], 0.0
        for share in self.shares:
            total += share
            edges.append(round(total * n))
        return [slice(a, b) for a, b in pairwise(edges)]

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, index: Tensor, step: int) -> Tensor:
        """Adversarial images for one batch."""
        x_adv = images.clone()
        for attack, part in zip(self.at(step), self.split(len(images))):
            if part.stop > part.start:
                x_adv[part] = attack(
                    model, images[part], labels[part], index=index[part], seed=self.seed + 7_919 * (step + 1)
                )
        return x_adv


class AdversarialBatches:
    """Pairs for a defense: step by step a batch, attacked on one of the functions it is handed, taken in turn.

    attacked: for each classifier the function that is attacked; logits: for each the frozen classifier that a loss may
    go through.
    """

    def __init__(
        self,
        sampler: Sampler,
        recipe: AdversarialBatchesConfig,
        attacked: Sequence[nn.Module],
        logits: Sequence[nn.Module],
    ) -> None:
        self.sampler = sampler
        self.mixture = Mixture(recipe.attacks, sampler.seed)
        self.attacked, self.logits = list(attacked), list(logits)

    def batch(self, step: int, rank: int = 0, world: int = 1, *, attack: bool = True) -> Batch:
        """The pairs of this step for device `rank` of `world`; without `attack` the clean images stand in for both."""
        images, labels, index = self.sampler.images(step, rank, world)
        turn = step % len(self.attacked)
        x_adv = self.mixture(self.attacked[turn], images, labels, index, step) if attack else images
        return Batch(images, x_adv, labels, self.logits[turn], step)


def hardest(thing: ComponentConfig) -> tuple[str, dict[str, Any]]:
    """An attack of a mixture with every range at its high end: (name, options)."""
    return thing.name, {k: _draw(v, 1.0) for k, v in thing.options.items() if k != "share"}
