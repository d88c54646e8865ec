"""What is trained: a task gives the loop networks, batches and losses; the loop knows nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.config import Thing
from unperturb.defenses.base import Batch, Defense
from unperturb.registry import Registry
from unperturb.training.pairs import Mixture, PairSource, Sampler

objectives: Registry[Task] = Registry("objective")


class Task(Protocol):
    """What the loop can train."""

    sampler: Sampler

    def networks(self) -> dict[str, nn.Module]:
        """The networks that move, by player."""
        ...

    def batch(self, step: int, rank: int, world: int) -> Any:
        """All that one step needs, fixed by (seed, step)."""
        ...

    def losses(self, batch: Any, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield `(player, weighted terms)` once per update."""
        ...


class DefenseTask:
    """A defense learns from pairs, or from their clean half; what is minimized is its own word."""

    def __init__(self, defense: Defense, pairs: PairSource) -> None:
        self.defense, self.pairs, self.sampler = defense, pairs, pairs.sampler

    def networks(self) -> dict[str, nn.Module]:
        return self.defense.networks()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        return self.pairs.batch(step, rank, world, attack=self.defense.learns_from_pairs)

    def losses(self, batch: Batch, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        return self.defense.losses(batch, networks)


@objectives.register("plain")
class PlainClassifier:
    """A classifier learns its labels: cross-entropy, smoothed by `label_smoothing` (Szegedy et al. 2016)."""

    def __init__(self, classifier: nn.Module, sampler: Sampler, *, label_smoothing: float = 0.0) -> None:
        self.classifier, self.sampler, self.label_smoothing = classifier, sampler, label_smoothing

    def networks(self) -> dict[str, nn.Module]:
        return {"classifier": self.classifier}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        images, labels, _ = self.sampler.images(step, rank, world)
        return images, labels

    def losses(
        self, batch: tuple[Tensor, Tensor], networks: dict[str, nn.Module]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        images, labels = batch
        logits = networks["classifier"](images).float()
        yield "classifier", {"cross_entropy": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}


@objectives.register("adversarial")
class AdversarialClassifier(PlainClassifier):
    """A classifier learns its labels on images attacked against itself, as it stands at each step.

    attacks: a mixture as in a defense's pairs. Source: Madry et al. 2018, equation (2.1).
    """

    def __init__(
        self, classifier: nn.Module, sampler: Sampler, *, attacks: list[dict[str, Any]], label_smoothing: float = 0.0
    ) -> None:
        super().__init__(classifier, sampler, label_smoothing=label_smoothing)
        self.mixture = Mixture([Thing(**a) for a in attacks], sampler.seed)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        images, labels, index = self.sampler.images(step, rank, world)
        return self.mixture(self.classifier, images, labels, index, step), labels
