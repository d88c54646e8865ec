"""What is trained: a task gives the loop networks, batches and losses; the loop knows nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from unperturb import per_image_rng, runs, zoo
from unperturb.attacks.base import Attack, attacks
from unperturb.classifiers import load_classifier
from unperturb.config import mixture
from unperturb.defenses.base import Batch, Defense
from unperturb.modules import frozen
from unperturb.registry import Registry
from unperturb.systems import System
from unperturb.threat_models import budget
from unperturb.training.adversarial_batches import AdversarialBatches, Mixture, Sampler, hardest, ramped

objectives: Registry[Task] = Registry("objective")


class Task(Protocol):
    """What the loop can train."""

    sampler: Sampler

    def networks(self) -> dict[str, nn.Module]:
        """The networks that move, by name."""
        ...

    def batch(self, step: int, rank: int, world: int) -> Any:
        """All that one step needs, fixed by (seed, step)."""
        ...

    def losses(self, batch: Any, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield `(network, weighted terms)` once per update."""
        ...


class DefenseTask:
    """A defense learns from pairs, or from their clean half; what is minimized is its own word."""

    def __init__(self, defense: Defense, batches: AdversarialBatches) -> None:
        self.defense, self.adversarial_batches, self.sampler = defense, batches, batches.sampler

    def networks(self) -> dict[str, nn.Module]:
        return self.defense.networks()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        return self.adversarial_batches.batch(step, rank, world, attack=self.defense.learns_from_pairs)

    def losses(self, batch: Batch, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        return self.defense.losses(batch, networks)


@objectives.register("plain")
class PlainClassifier:
    """A classifier learns its labels: cross-entropy, smoothed by `label_smoothing` (Szegedy et al. 2016).

    temperature: what logits are divided by while it learns; above 1 it makes a teacher for `distilled`.
    """

    def __init__(
        self, classifier: nn.Module, sampler: Sampler, *, label_smoothing: float = 0.0, temperature: float = 1.0
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.classifier, self.sampler = classifier, sampler
        self.label_smoothing, self.temperature = label_smoothing, temperature

    def val_attacks(self) -> dict[str, Attack]:
        """The attacks that validation images are judged under, by name; none where clean accuracy is all there is."""
        return {}

    def networks(self) -> dict[str, nn.Module]:
        return {"classifier": self.classifier}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        images, labels, _ = self.sampler.images(step, rank, world)
        return images, labels

    def losses(
        self, batch: tuple[Tensor, Tensor], networks: dict[str, nn.Module]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        images, labels = batch
        logits = networks["classifier"](images).float() / self.temperature
        yield "classifier", {"cross_entropy": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}


class _Objective(BaseModel):
    temperature: float = 1.0


class _Trained(BaseModel):
    """A teacher's `recipe.json`, as far as a student looks at it."""

    objective: _Objective


@objectives.register("distilled")
class DistilledClassifier(PlainClassifier):
    """A classifier learns what a teacher says of the images, both at `temperature`; it is used at temperature 1.

    teacher: run folder of a classifier of the same classes, trained by `plain` at this temperature.

    Raises `ValueError` where the teacher was trained at another temperature, or knows other classes.

    Source: Papernot et al. 2016, "Distillation as a defense to adversarial perturbations against deep neural
    networks".
    """

    def __init__(self, classifier: nn.Module, sampler: Sampler, *, teacher: str, temperature: float = 100.0) -> None:
        super().__init__(classifier, sampler, temperature=temperature)
        self.teacher = load_classifier(teacher).freeze().to(sampler.device)
        known = (self.teacher.spec or {}).get("classes")
        if known != sampler.data.classes:
            raise ValueError(f"the teacher in {teacher} knows {known} classes, the data has {sampler.data.classes}")
        trained = runs.read_json(Path(zoo.find(teacher)) / "recipe.json", _Trained).objective.temperature
        if trained != temperature:
            raise ValueError(
                f"the teacher in {teacher} was trained at temperature {trained}, not at "
                f'{temperature}; train one with objective = {{ name = "plain", temperature = {temperature:g} }}'
            )

    @torch.no_grad()
    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Images and, in place of their labels, the teacher's probabilities `(N, K)`."""
        images, _ = super().batch(step, rank, world)
        return images, (self.teacher(images) / self.temperature).softmax(1)


@objectives.register("adversarial")
class AdversarialClassifier(PlainClassifier):
    """A classifier learns its labels on images attacked against itself, as it stands at each step.

    attacks: a mixture as in a defense's `adversarial_batches`. val_attack: the attack on validation images, by which
    keep = "best" chooses (default: PGD-20 at the mixture's highest budget). ramp: steps in which perturbations grow to
    their whole size; a small net that meets 0.3 at once on MNIST learns to say nothing. Source: Madry et al. 2018,
    equation (2.1).
    """

    def __init__(
        self,
        classifier: nn.Module,
        sampler: Sampler,
        *,
        attacks: list[dict[str, Any]],
        val_attack: dict[str, Any] | None = None,
        ramp: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(classifier, sampler, label_smoothing=label_smoothing)
        self.ramp = ramp
        entries = mixture(attacks)
        self.mixture = Mixture(entries, sampler.seed)
        if val_attack is None:
            strongest = max((hardest(entry)[1] for entry in entries), key=lambda o: budget(o.get("eps", 0.0)))
            val_attack = _default_val_attack(strongest.get("eps", 0.0), strongest.get("norm", "linf"))
        self.val_attack = _named(val_attack)

    def val_attacks(self) -> dict[str, Attack]:
        return self.val_attack

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        images, labels, index = self.sampler.images(step, rank, world)
        x_adv = self.mixture(System("classifier", self.classifier), images, labels, index, step)
        x_adv = ramped(images, x_adv, step, self.ramp)
        return x_adv, labels


@objectives.register("trades")
class TradesClassifier(AdversarialClassifier):
    """A classifier learns its labels on clean images, and to say the same of the attacked ones: cross-entropy + beta
    KL(clean || attacked).

    beta: what staying with one's answer is worth. The rest is as in `adversarial`.

    Source: Zhang et al. 2019, "Theoretically principled trade-off between robustness and accuracy", equation (5). There
    the attacker raises the divergence, here what the mixture's attacks raise: cross-entropy, if nothing else is said.
    """

    def __init__(
        self,
        classifier: nn.Module,
        sampler: Sampler,
        *,
        attacks: list[dict[str, Any]],
        beta: float = 6.0,
        val_attack: dict[str, Any] | None = None,
        ramp: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            classifier, sampler, attacks=attacks, val_attack=val_attack, ramp=ramp, label_smoothing=label_smoothing
        )
        if not beta >= 0:
            raise ValueError(f"beta must not be below 0, not {beta}")
        self.beta = beta

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """The clean images and behind them the attacked, `(2N, C, H, W)`; the labels `(N,)`."""
        images, labels, index = self.sampler.images(step, rank, world)
        x_adv = self.mixture(System("classifier", self.classifier), images, labels, index, step)
        return torch.cat([images, ramped(images, x_adv, step, self.ramp)]), labels

    def losses(
        self, batch: tuple[Tensor, Tensor], networks: dict[str, nn.Module]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        images, labels = batch
        clean, attacked = networks["classifier"](images).float().chunk(2)
        log_clean, log_attacked = clean.log_softmax(1), attacked.log_softmax(1)
        yield (
            "classifier",
            {
                "cross_entropy": F.cross_entropy(clean, labels, label_smoothing=self.label_smoothing),
                "divergence": self.beta * F.kl_div(log_attacked, log_clean, reduction="batchmean", log_target=True),
            },
        )


@objectives.register("nfgsm")
class NFGSMClassifier(PlainClassifier):
    """A classifier learns its labels one signed step away from a noisy image; cheap adversarial training.

    eps: the budget to be robust at. The noise is uniform in [-noise * eps, noise * eps], the step `alpha * eps` along
    the sign of the gradient there, and what comes out is cut to [0, 1] but not to the ball, which is why this is a
    way of training and no attack. val_attack: as in `adversarial` (default: PGD-20 at `eps`).

    Source: de Jorge et al. 2022, "Make some noise", N-FGSM, and the authors' code (k = 2, alpha = eps). There the
    gradient is taken in train mode, here in eval mode, as everywhere in this program.
    """

    def __init__(
        self,
        classifier: nn.Module,
        sampler: Sampler,
        *,
        eps: float | str,
        noise: float = 2.0,
        alpha: float = 1.0,
        val_attack: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(classifier, sampler, label_smoothing=label_smoothing)
        self.eps, self.noise, self.alpha = budget(eps), noise, alpha
        self.val_attack = _named(val_attack or _default_val_attack(self.eps, "linf"))

    def val_attacks(self) -> dict[str, Attack]:
        return self.val_attack

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        images, labels, index = self.sampler.images(step, rank, world)
        # A seed of its own: the order and the augmentation of the images are drawn from the sampler's.
        noise = per_image_rng.uniform(self.sampler.seed + 7_919, index, step, images.shape[1:]) * 2 - 1
        start = (images + self.noise * self.eps * noise).clamp(0, 1)
        with frozen(self.classifier), torch.enable_grad():
            at = start.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.classifier(at).float(), labels, reduction="sum"), at)
        return (start + self.alpha * self.eps * gradient.sign()).clamp(0, 1), labels


def _default_val_attack(eps: float | str, norm: str) -> dict[str, Any]:
    return {"name": "pgd", "eps": eps, "norm": norm, "steps": 20}


def _named(thing: dict[str, Any]) -> dict[str, Attack]:
    options = dict(thing)
    name = options.pop("name")
    return {name: attacks.create(name, **options)}
