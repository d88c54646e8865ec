"""The contract of every attack: settings in, adversarial images out, inside the ball and inside [0, 1].

A new attack is a frozen dataclass that writes `perturb` alone. It meets the model only through a `Problem`, which
counts passes, keeps randomness per image and makes wrong answers of logits that are not finite.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from unperturb import draws
from unperturb.attacks.balls import Norm, column, l2_norm, project_
from unperturb.attacks.losses import LOSSES, LossFunction, margin
from unperturb.contract import budget, check_images, check_labels
from unperturb.modules import frozen, logits_of
from unperturb.registry import Registry

attacks: Registry[Attack] = Registry("attack")

Model = Callable[[Tensor], Tensor]
Progress = Callable[[int], None]


class NoGradientError(ValueError):
    """The attacked model gives an attack by gradients none."""

    def __init__(self) -> None:
        super().__init__(
            "the attacked model gives no gradient (it works under no_grad, on detached values or on integers), so an "
            "attack by gradients would stand still and look like robustness: attack it by queries (square, rays), or "
            "give its hidden step a stand-in (knowledge 'bpda', unperturb.threats.BPDA)"
        )


def create_attack(name: str, **options: Any) -> Attack:
    """The attack registered as `name` with these settings; raises `UnknownNameError` for a name or option it lacks."""
    return attacks.create(name, **options)


# The problem --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
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
    felled_by: list[str] = field(default_factory=list)
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


@dataclass
class Problem:
    """A batch to be attacked: the model, the images, and what the attacker wants of them.

    `labels` are the classes to leave, or with `targeted` the classes to reach. `take(rows)` is the same problem for
    some of the images; the tally is shared.
    """

    model: Model
    images: Tensor
    labels: Tensor
    targeted: bool
    index: Tensor
    seed: int
    tally: Tally
    rows: Tensor
    _denial: Tensor | None = field(default=None, init=False, repr=False)

    def take(self, rows: Tensor) -> Problem:
        """The problem for the images at `rows` (positions or a mask)."""
        return Problem(
            self.model,
            self.images[rows],
            self.labels[rows],
            self.targeted,
            self.index[rows],
            self.seed,
            self.tally,
            self.rows[rows],
        )

    def _forward(self, x: Tensor) -> Tensor:
        """Logits, float32; an image's that are not all finite give way to a denial of its label, which is wrong
        for who is to leave it and no success for who is to reach it."""
        logits = logits_of(self.model, x)
        classes = logits.shape[1]
        if self.tally.classes is None:
            _check_classes(self.labels, classes)
            self.tally.classes = classes
        elif classes != self.tally.classes:
            raise ValueError(f"the attacked model returned {classes} classes, and {self.tally.classes} before")
        if self._denial is None:
            self._denial = _denials(self.labels, classes)
        bad = _not_finite(logits)
        self.tally.forwards += 1
        self._count(self.tally.queries)
        self._count(self.tally.nonfinite, bad)
        if self.tally.progress is not None:
            self.tally.progress(self.tally.forwards)
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
        rival = logits.scatter(1, label, -torch.inf).amax(1)
        return 1e-5 * torch.maximum(rival.abs(), logits.gather(1, label).squeeze(1).abs())

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
        self.tally.backwards += 1
        self._count(self.tally.gradients)
        self._count(self.tally.zero_gradients, gradient.flatten(1).abs().amax(1) == 0)
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
        self.tally.backwards += 1
        asked = weights.count_nonzero(1) > 0  # a gradient that nobody wanted is zero for no fault of the model's
        self._count(self.tally.gradients, asked)
        self._count(self.tally.zero_gradients, asked & (gradient.flatten(1).abs().amax(1) == 0))
        return gradient

    def uniform(self, step: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        """Uniform noise shaped like the images, each image's its own."""
        return draws.uniform(self.seed, self.index, step, self.images.shape[1:]).mul_(high - low).add_(low)

    def normal(self, step: int) -> Tensor:
        """Standard normal noise shaped like the images, each image's its own."""
        return draws.normal(self.seed, self.index, step, self.images.shape[1:])

    def random_start(self, eps: float, norm: Norm, step: int) -> Tensor:
        """Uniform in the ball of radius `eps` around the images, projected into [0, 1]."""
        if norm == "linf":
            delta = self.uniform(step) * eps
        else:
            direction = self.normal(step)
            radius = draws.uniform(self.seed, self.index, step + (1 << 40), (1,)).squeeze(1)
            radius = eps * radius ** (1.0 / direction[0].numel())
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


def _not_finite(logits: Tensor) -> Tensor:
    """`(N,)` bool: an image whose logits `(N, K)` are not all finite."""
    return (logits.detach() * 0).sum(1) != 0  # of NaN and infinity 0 times is NaN, which equals nothing


def _denials(labels: Tensor, classes: int) -> Tensor:
    """Logits `(N, K)` that say: anything but the label. No two are equal, so that no loss divides by zero."""
    steps = torch.arange(classes, dtype=torch.float32, device=labels.device) / -classes
    return steps.repeat(len(labels), 1).scatter_(1, labels[:, None], -1.0)


# The attack ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttackResult:
    """What `Attack.run` found.

    images: `(N, C, H, W)` adversarial images. success, success_8bit: `(N,)` bool, by one clean final forward, as they
    are and rounded to 8 bits. forwards, backwards: batch passes spent by the attack. queries: `(N,)` forward passes
    per image. gradients, zero_gradients: `(N,)` how often an image's gradient was asked for, and how often it was
    exactly zero (a saturated or masked model). nonfinite: `(N,)` passes, the final ones too, whose logits were NaN or
    infinite: a wrong answer. felled_by: N names, of the member of a cascade that felled each image ("" where it still
    stands, "clean" where it needed no attack); empty for an attack that is no cascade.
    """

    images: Tensor
    success: Tensor
    success_8bit: Tensor
    forwards: int
    backwards: int
    queries: Tensor
    gradients: Tensor
    zero_gradients: Tensor
    nonfinite: Tensor
    felled_by: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Settings of one attack. Its repr is its record.

    targets: None leaves the true class; `"least_likely"` or `"random"` picks a class to reach; classes given to the
    call win over both. needs_gradient: of the class, whether it differentiates the model; False where outputs do.
    """

    needs_gradient: ClassVar[bool] = True
    targets: Literal["least_likely", "random"] | None = None

    def perturb(self, problem: Problem) -> Tensor:
        """Adversarial images for `problem`; what a new attack writes."""
        raise TypeError(f"{type(self).__name__} does not say how it perturbs")

    def limit(self, x: Tensor, images: Tensor) -> Tensor:
        """`x` brought back into what this attack may do; [0, 1] alone unless it has a ball."""
        return x.clamp(0, 1)

    def for_random_model(self, eot: int = 20) -> Attack:
        """This attack as a random model must be asked, where one success is a draw: it spends its whole budget on
        every image.

        eot: passes that are averaged where the attack knows how; 1 for a model that averages itself (`threats.EOT`).
        Raises `ValueError` for a minimal-norm attack, whose answer would be the nearest lucky draw.
        """
        return self

    @final
    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        index: Tensor | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Adversarial images.

        model: any callable from images to logits `(N, K)`. images: float `(N, C, H, W)` in [0, 1]. labels: `(N,)`
        true classes. targets: `(N,)` classes to reach. index: `(N,)` each image's number in its data set, which its
        random draws depend on (default: its place in the batch). seed: of those draws. progress: called after each
        forward pass with their number so far; nothing is ever printed from inside.

        Raises `TypeError` or `ValueError` for inputs that are not so, `NoGradientError` where an attack by gradients
        meets a model that gives none. Warns of logits that are not finite (wrong answers) and of gradients of zero.
        """
        x, problem = self._solve(model, images, labels, targets, index, seed, progress)
        # Whoever has reached a target has no gradient left, and who has not is not told apart without another pass.
        problem.tally.warn(torch.full_like(problem.labels, not problem.targeted, dtype=torch.bool))
        return x

    @final
    def solve(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        index: Tensor | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tally]:
        """The same images as `__call__`, without a warning, with what they cost: for who asks batch by batch."""
        x, problem = self._solve(model, images, labels, targets, index, seed, progress)
        return x, problem.tally

    @final
    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        index: Tensor | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> AttackResult:
        """The same images as `__call__`, re-checked by clean forward passes, with what they cost."""
        x, problem = self._solve(model, images, labels, targets, index, seed, progress)
        tally = problem.tally
        success = []
        with torch.inference_mode(False), frozen(model), torch.no_grad():
            for shown in (x, (x * 255).round() / 255):
                logits = logits_of(model, shown)
                bad = _not_finite(logits)
                tally.nonfinite += bad
                success.append(torch.where(bad, not problem.targeted, problem.fooled(logits)))
        tally.warn(~success[0])
        return AttackResult(
            images=x,
            success=success[0],
            success_8bit=success[1],
            forwards=tally.forwards,
            backwards=tally.backwards,
            queries=tally.queries,
            gradients=tally.gradients,
            zero_gradients=tally.zero_gradients,
            nonfinite=tally.nonfinite,
            felled_by=tally.felled_by,
        )

    @torch.inference_mode(False)  # where there is no gradient; it would read as robustness
    def _solve(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        index: Tensor | None,
        seed: int,
        progress: Progress | None,
    ) -> tuple[Tensor, Problem]:
        images = check_images(images)
        check_labels(images, labels)
        self._check_reach(images)
        images, labels = _plain(images.detach().float()), _plain(labels.to(torch.int64))
        index = torch.arange(len(images), device=images.device) if index is None else _plain(index.to(images.device))
        if index.shape != labels.shape:
            raise ValueError(f"index must have shape {tuple(labels.shape)}, not {tuple(index.shape)}")
        counts = torch.zeros_like(labels)
        tally = Tally(queries=counts, zero_gradients=counts.clone(), progress=progress)
        rows = torch.arange(len(images), device=images.device)
        problem = Problem(model, images, labels, False, index, seed, tally, rows)
        if not len(images):
            return images.clone(), problem
        with frozen(model) as modules:
            tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
            if any(t.is_inference() for t in tensors) and getattr(self, "needs_gradient", True):
                raise ValueError(
                    "the model was made in torch.inference_mode and can give no gradient: make it, or "
                    "copy.deepcopy it, outside"
                )
            if targets is not None or self.targets is not None:
                problem = replace(problem, labels=self._choose_targets(problem, targets), targeted=True)
            x = self.limit(self.perturb(problem).detach(), images)
        return x, problem

    def _check_reach(self, images: Tensor) -> None:
        """Raise `ValueError` for an L2 budget that no two images are apart by."""
        eps, far = getattr(self, "eps", None), math.sqrt(images[0].numel()) if len(images) else math.inf
        if eps is not None and getattr(self, "norm", None) == "l2" and eps > far:
            raise ValueError(
                f"an L2 budget of {eps:g} is more than any two images of {tuple(images.shape[1:])} in [0, 1] are "
                f"apart ({far:.4g}); divide a budget made for pixels of 0 to 255 by 255"
            )

    def _choose_targets(self, problem: Problem, given: Tensor | None) -> Tensor:
        labels = problem.labels
        if given is not None:
            check_labels(problem.images, given)
            if bool((given == labels).any()):
                raise ValueError("a target equals the true class of its image")
            return _plain(given.to(labels))
        logits = problem.logits(problem.images)
        if self.targets == "least_likely":
            return logits.scatter(1, labels[:, None], torch.inf).argmin(1)
        if self.targets == "random":
            shift = 1 + draws.integers(problem.seed, problem.index, 1 << 41, logits.shape[1] - 1).squeeze(1)
            return (labels + shift) % logits.shape[1]
        raise ValueError(f"targets must be None, 'least_likely' or 'random', not {self.targets!r}")


def _plain(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of one that was made in inference mode and can have no gradient."""
    return tensor.clone() if tensor.is_inference() else tensor


@dataclass(frozen=True, kw_only=True)
class BallAttack(Attack):
    """An attack with a fixed budget: a ball of radius `eps` in pixel units, cut with [0, 1].

    norm: `"linf"` or `"l2"`. eps: radius, a number or a fraction such as `"8/255"`. loss: what is maximized,
    `"cross_entropy"`, or `"margin"` or `"dlr"` (which still have a gradient where the softmax saturates; towards a
    target `"dlr"` is the margin).
    """

    norm: Norm = "linf"
    eps: float
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", budget(self.eps, self.norm))
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', not {self.norm!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {self.loss!r}")

    def limit(self, x: Tensor, images: Tensor) -> Tensor:
        return project_(x, images, self.eps, self.norm)

    def ascend(self, x: Tensor, direction: Tensor, step: float) -> Tensor:
        """`x` moved by `step` along the steepest ascent of this norm; a zero direction moves nothing."""
        if self.norm == "linf":
            return direction.sign().mul_(step).add_(x)
        # First to a size whose square float32 can hold: of a nearly saturated softmax the gradient is tiny, not zero.
        unit = direction / direction.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-37)
        return x + unit * column(step / l2_norm(unit).clamp(min=1e-12), unit)


class MinimalAttack(Attack):
    """An attack without a budget: it seeks the nearest success."""

    def for_random_model(self, eot: int = 20) -> Attack:
        name = type(self).__name__
        raise ValueError(
            f"{name} seeks the nearest point at which one answer changes, and a random model's answer is a draw; "
            "attack it with a budget instead: pgd, apgd, autoattack or square"
        )


class Best:
    """The best point met per image: a fooled one before all others, among these the one with the highest value.

    images: `(N, C, H, W)`. value: `(N,)`, float64, so that it is kept as it was compared. fooled: `(N,)` bool.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.value = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
        self.fooled = torch.zeros_like(self.value, dtype=torch.bool)

    def update(self, x: Tensor, value: Tensor, *, fooled: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Keep `x` `(N, C, H, W)` where it beats what was met before.

        value, fooled: `(N,)`, what the model says of `x` and of no other point; without `fooled` the value decides
        alone. rows: the positions of `x` among all images, where some have left the batch.
        """
        every = rows is None or len(rows) == len(self.images)
        met, hit = (self.value, self.fooled) if every else (self.value[rows], self.fooled[rows])
        better = value > met
        if fooled is not None:
            better = (better & (fooled | ~hit)) | (fooled & ~hit)
            hit = hit | fooled
        value = torch.where(better, value.double(), met)
        # Weights of 0 and 1 copy exactly, and several times as fast as `where` with a condition that is spread out.
        weight = column(better.to(x.dtype), x)
        if every:
            self.value, self.fooled = value, hit
            self.images.lerp_(x, weight)
        else:
            self.value[rows], self.fooled[rows] = value, hit
            self.images[rows] = self.images[rows].lerp_(x, weight)

    def merge(self, other: Best, rows: Tensor | None = None) -> None:
        """Keep what `other` met, its images at `rows` among these, where that is better."""
        self.update(other.images, other.value, fooled=other.fooled, rows=rows)
