"""Batches of clean and adversarial images, drawn afresh each step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attackers import Attacker
from unperturb.attacks.base import Attack, attacks
from unperturb.config import AdversarialBatchesConfig, Augmentation, MixtureConfig, uniform_range
from unperturb.data import ImageSet, augment
from unperturb.defenses.base import Batch
from unperturb.systems import System


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


def _drawn(value: Any, u: float) -> Any:
    """An option: of a range one number, `u` of the way up (whole between whole bounds); anything else as it is."""
    bounds = uniform_range(value)
    if bounds is None:
        return value
    low, high = bounds
    if isinstance(low, int) and isinstance(high, int):
        return low + min(int(u * (high - low + 1)), high - low)
    return low + u * (high - low)


class Mixture:
    """Attacks, each on its fraction of a batch, by attackers of one knowledge; options given as ranges are drawn by
    (seed, step)."""

    def __init__(self, entries: Sequence[MixtureConfig], seed: int, knowledge: str = "white_box") -> None:
        self.seed, self.knowledge = seed, knowledge
        self.parts = [(entry.attack.name, entry.attack.options) for entry in entries]
        total = sum(entry.fraction for entry in entries)
        self.fractions = [entry.fraction / total for entry in entries]
        self.at(0)  # a wrong name or option is met before anything is trained

    def at(self, step: int) -> list[Attack]:
        """The attacks of this step."""
        made = []
        for number, (name, options) in enumerate(self.parts):
            u = per_image_rng.uniform(self.seed, torch.tensor([number]), step, (max(1, len(options)),))[0].tolist()
            made.append(attacks.create(name, **{k: _drawn(v, x) for (k, v), x in zip(options.items(), u)}))
        return made

    def split(self, n: int) -> list[slice]:
        """Where each attack's images lie in a batch of `n`."""
        edges, total = [0], 0.0
        for fraction in self.fractions:
            total += fraction
            edges.append(round(total * n))
        return [slice(a, b) for a, b in pairwise(edges)]

    def __call__(self, system: System, images: Tensor, labels: Tensor, index: Tensor, step: int) -> Tensor:
        """Adversarial images for one batch, made against `system`."""
        x_adv = images.clone()
        for attack, part in zip(self.at(step), self.split(len(images))):
            if part.stop > part.start:
                x_adv[part] = attacked(
                    Attacker(attack, self.knowledge), system, images[part], labels[part], index[part],
                    seed=self.seed + 7_919 * (step + 1),
                )  # fmt: skip
        return x_adv


def attacked(
    attacker: Attacker, system: System, images: Tensor, labels: Tensor, index: Tensor, seed: int = 0
) -> Tensor:
    """What `attacker` makes of `images` against `system`."""
    attack, model = attacker.attack_for(system), attacker.model_for(system)
    return attack(model, images, labels, index=index, seed=seed)


class AdversarialBatches:
    """Clean and adversarial images for a defense: step by step a batch, attacked on one of `systems`, taken in turn.

    systems: the defense in front of each frozen classifier, which is what a loss may go through.
    """

    def __init__(self, sampler: Sampler, recipe: AdversarialBatchesConfig, systems: Sequence[System]) -> None:
        self.sampler, self.systems = sampler, list(systems)
        self.mixture, self.ramp = Mixture(recipe.attacks, sampler.seed, recipe.knowledge), recipe.ramp
        for attack in self.mixture.at(0):
            for system in self.systems:  # as is an attack that cannot be made on a random one
                Attacker(attack, recipe.knowledge).attack_for(system)

    def batch(self, step: int, rank: int = 0, world: int = 1, *, attack: bool = True) -> Batch:
        """The pairs of this step for device `rank` of `world`; without `attack` the clean images stand in for both."""
        images, labels, index = self.sampler.images(step, rank, world)
        system = self.systems[step % len(self.systems)]
        x_adv = images
        if attack:
            x_adv = ramped(images, self.mixture(system, images, labels, index, step), step, self.ramp)
        return Batch(images, x_adv, labels, system.classifier, step)


def ramped(images: Tensor, x_adv: Tensor, step: int, ramp: int) -> Tensor:
    """`x_adv`, its distance from `images` grown from nothing to its full size in the first `ramp` steps."""
    return images + (step + 1) / ramp * (x_adv - images) if step < ramp else x_adv


def hardest(entry: MixtureConfig) -> tuple[str, dict[str, Any]]:
    """An attack of a mixture with every range at its high end: (name, options)."""
    return entry.attack.name, {k: _drawn(v, 1.0) for k, v in entry.attack.options.items()}
