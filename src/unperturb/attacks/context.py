"""What an attack meets a model through: a batch of images, what is wanted of them, and what asking costs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attacks.losses import LossFunction, margin
from unperturb.attacks.projections import Norm, column, l2_norm, project_
from unperturb.modules import logits_of

Model = Callable[[Tensor], Tensor]
Progress = Callable[[int], None]


class NoGradientError(ValueError):
    """The attacked model gives an attack by gradients none."""

    def __init__(self) -> None:
        super().__init__(
            "the attacked model gives no gradient (it works under no_grad, on detached values or on integers), so an "
            "attack by gradients would stand still and look like robustness: attack it by queries (square, rays), or "
            "give its hidden step a stand-in (knowledge 'bpda', unperturb.attackers.BPDA)"
        )


@dataclass
class QueryCounter:
    """What an attack spent: batch passes, and per image `(N,)`.

    queries: forward passes. gradients: how often a gradient was asked for, zero_gradients: how often it was exactly
    zero. nonfinite: passes whose logits were not finite. classes: K, once the model has answered.
    """

    forwards: int = 0
    backwards: int = 0
    queries: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    zero_gradients: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    gradients: Tensor = field(init=False)
    nonfinite: Tensor = field(init=False)
    classes: int | None = None
    broken_by: list[str] = field(default_factory=list)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.gradients, self.nonfinite = torch.zeros_like(self.queries), torch.zeros_like(self.queries)

    @property
    def zero_gradient(self) -> Tensor:
        """`(N,)`: the share, in [0, 1], of an image's gradients that was zero; 0 where none was asked for."""
        return self.zero_gradients / self.gradients.clamp(min=1)

    def warn(self, watched: Tensor) -> None:
        """Warn of images with logits that are not finite, and of those of `watched` `(N,)` that gave hardly a gradient.

        watched: whose gradients matter: an image that has fallen needs none, nor one whose logits were no numbers.
        """
        count = len(self.queries)
        if count and (bad := int((self.nonfinite > 0).sum())):
            warnings.warn(
                f"the logits of {bad} of {count} images were NaN or infinite: these count as wrong answers",
                stacklevel=3,
            )
        watched = watched & (self.nonfinite == 0)
        if count and (still := int(((self.zero_gradient >= 0.5) & watched).sum())) > count / 10:
            warnings.warn(
                f"the gradient of {still} of {count} images was exactly zero in at least half of the passes: the model "
                "hides it (by saturation or steps), and that they stand proves little. Try loss='margin', an attack by "
                "queries (square, rays), or a stand-in (knowledge 'bpda')",
                stacklevel=3,
            )


SHARED = {"shared": True}  # metadata of a field of a `PerImage` whose tensor is not per image


class PerImage:
    """Of a dataclass: its tensors have one entry per image, and its images leave together.

    `select(rows)` is the same for some of the images (positions or a mask). It cuts every field that is a tensor or
    `PerImage` itself, so that no value is left with another image's point. All other fields are shared: models,
    numbers, and a tensor that is declared with `field(metadata=SHARED)`.
    """

    def select(self, rows: Tensor) -> Self:
        part, count = copy.copy(self), None
        for f in fields(self):  # type: ignore[arg-type]
            value: Any = getattr(self, f.name)
            if isinstance(value, Tensor) and not f.metadata.get("shared"):
                if count not in (None, len(value)):
                    raise ValueError(f"{f.name} has {len(value)} entries, the tensors beside it {count}")
                count, value = len(value), value[rows]
            elif isinstance(value, PerImage):
                value = value.select(rows)
            else:
                continue
            object.__setattr__(part, f.name, value)  # some are frozen
        return part


@dataclass
class AttackContext(PerImage):
    """A batch to be attacked: the model, the images, and what the attacker wants of them.

    labels: the classes to leave, or with `targeted` the classes to reach. rows: the images' places in the batch that
    the counter counts for. start: images to begin from, inside what the attack may do. mask: float, 1 where a pixel may
    change and 0 where not, of a shape that broadcasts with the images.
    """

    model: Model
    images: Tensor
    labels: Tensor
    targeted: bool
    index: Tensor
    seed: int
    counter: QueryCounter
    rows: Tensor
    start: Tensor | None = None
    mask: Tensor | None = None
    _denial: Tensor | None = field(default=None, init=False, repr=False)

    def _forward(self, x: Tensor) -> Tensor:
        """Logits, float32; an image's that are not all finite give way to a denial of its label, which is wrong
        for who is to leave it and no success for who is to reach it."""
        logits = logits_of(self.model, x)
        classes = logits.shape[1]
        if self.counter.classes is None:
            _check_classes(self.labels, classes)
            self.counter.classes = classes
        elif classes != self.counter.classes:
            raise ValueError(f"the attacked model returned {classes} classes, and {self.counter.classes} before")
        if self._denial is None:
            self._denial = _denials(self.labels, classes)
        bad = not_finite(logits)
        self.counter.forwards += 1
        self._count(self.counter.queries)
        self._count(self.counter.nonfinite, bad)
        if self.counter.progress is not None:
            self.counter.progress(self.counter.forwards)
        return torch.where(bad[:, None], self._denial, logits)

    def _count(self, counts: Tensor, by: Tensor | int = 1) -> None:
        """Add `by` to the `counts` of this problem's images."""
        if len(self.rows) == len(counts):
            counts += by
        else:
            counts[self.rows] += by

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits `(N, K)`, no gradient: one forward pass."""
        return self._forward(x)

    def fooled(self, logits: Tensor) -> Tensor:
        """`(N,)` bool: the attacker has what it wants."""
        hit = logits.argmax(1) == self.labels
        return hit if self.targeted else ~hit

    def clearly_fooled(self, logits: Tensor) -> Tensor:
        """`fooled` by more than float32 rounding, which another batch shape could undo; for minimal-norm attacks."""
        return self.value(logits, margin) > self.rounding(logits)

    def rounding(self, logits: Tensor) -> Tensor:
        """`(N,)`: what float32 may do to a margin: of the two logits that it compares, not of one that is masked."""
        label = self.labels[:, None]
        other = logits.scatter(1, label, -torch.inf).amax(1)
        return 1e-5 * torch.maximum(other.abs(), logits.gather(1, label).squeeze(1).abs())

    def value(self, logits: Tensor, loss: LossFunction) -> Tensor:
        """What the attacker maximizes, `(N,)`: the loss, or minus the loss towards the target."""
        value = loss(logits, self.labels)
        return -value if self.targeted else value

    @torch.enable_grad()
    def gradient(self, x: Tensor, loss: LossFunction) -> tuple[Tensor, Tensor, Tensor]:
        """One forward and one backward pass: (value `(N,)`, its gradient `(N, C, H, W)`, logits `(N, K)`).

        The loss is summed, so an image's gradient does not depend on the rest of the batch.
        """
        x = x.detach().requires_grad_()
        logits = self._forward(x)
        value = self.value(logits, loss)
        gradient = _input_gradient(value.sum(), x)
        self.counter.backwards += 1
        self._count(self.counter.gradients)
        self._count(self.counter.zero_gradients, gradient.flatten(1).abs().amax(1) == 0)
        if self.mask is not None:  # counted before: a mask says nothing of the model
            gradient *= self.mask
        return value.detach(), gradient, logits.detach()

    @torch.enable_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One forward pass kept for `backward`: (the point to differentiate at, logits `(N, K)`)."""
        point = x.detach().requires_grad_()
        return point, self._forward(point)

    def backward(self, point: Tensor, logits: Tensor, weights: Tensor, *, keep: bool = False) -> Tensor:
        """One backward pass: the gradient at `point` of each image's logits times its `weights` `(N, K)`.

        keep: another backward pass through the same forward pass follows.
        """
        gradient = _input_gradient(logits, point, weights, keep=keep)
        self.counter.backwards += 1
        asked = weights.count_nonzero(1) > 0  # a gradient that nobody wanted is zero for no fault of the model's
        self._count(self.counter.gradients, asked)
        self._count(self.counter.zero_gradients, asked & (gradient.flatten(1).abs().amax(1) == 0))
        return gradient

    def uniform(self, step: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        """Uniform noise shaped like the images, each image's its own."""
        return per_image_rng.uniform(self.seed, self.index, step, self.images.shape[1:]).mul_(high - low).add_(low)

    def normal(self, step: int) -> Tensor:
        """Standard normal noise shaped like the images, each image's its own."""
        return per_image_rng.normal(self.seed, self.index, step, self.images.shape[1:])

    def random_start(self, eps: float, norm: Norm, step: int) -> Tensor:
        """Uniform in the ball of radius `eps` around the images (of the pixels that may change), projected into
        [0, 1]."""
        if norm == "linf":
            delta = self.uniform(step) * eps
            delta = delta if self.mask is None else delta * self.mask
        else:
            direction = self.normal(step)
            free: int | Tensor = direction[0].numel()
            if self.mask is not None:
                direction *= self.mask
                free = self.mask.expand_as(direction).flatten(1).sum(1).clamp(min=1)
            radius = per_image_rng.uniform(self.seed, self.index, step + (1 << 40), (1,)).squeeze(1)
            radius = eps * radius ** (1.0 / free)
            delta = direction * column(radius / l2_norm(direction).clamp(min=1e-30), direction)
        return project_(self.images + delta, self.images, eps, norm)


def _input_gradient(of: Tensor, x: Tensor, weights: Tensor | None = None, *, keep: bool = False) -> Tensor:
    """The gradient of `of` at `x`, in memory of its own, 0 where it is not finite; raises `NoGradientError`."""
    if not of.requires_grad:
        raise NoGradientError
    (gradient,) = torch.autograd.grad(of, x, weights, retain_graph=keep, allow_unused=True)
    if gradient is None:
        raise NoGradientError
    # A model that begins by summing pixels gives one number, expanded: it cannot be worked on in place.
    gradient = gradient.clone() if 0 in gradient.stride() else gradient
    # A pixel that is NaN once would be NaN in every step after.
    return gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _check_classes(labels: Tensor, classes: int) -> None:
    if len(labels) and int(labels.max()) >= classes:
        raise ValueError(f"label {int(labels.max())} is out of range: the model has {classes} classes")


def not_finite(logits: Tensor) -> Tensor:
    """`(N,)` bool: an image whose logits `(N, K)` are not all finite."""
    return (logits.detach() * 0).sum(1) != 0  # of NaN and infinity 0 times is NaN, which equals nothing


def _denials(labels: Tensor, classes: int) -> Tensor:
    """Logits `(N, K)` that say: anything but the label. No two are equal, so that no loss divides by zero."""
    steps = torch.arange(classes, dtype=torch.float32, device=labels.device) / -classes
    return steps.repeat(len(labels), 1).scatter_(1, labels[:, None], -1.0)
