"""The contract of every attack: settings in, adversarial images out, inside the ball and inside [0, 1].

A new attack is a frozen dataclass that writes `perturb` alone. It meets the model only through a `AttackContext`, which
counts passes, keeps randomness per image and makes wrong answers of logits that are not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attacks.context import AttackContext, Model, Progress, QueryCounter, not_finite
from unperturb.attacks.losses import LOSSES
from unperturb.attacks.projections import Norm, column, l2_norm, project_
from unperturb.modules import frozen, logits_of
from unperturb.registry import Registry
from unperturb.threat_models import budget
from unperturb.validation import check_images, check_labels

attacks: Registry[Attack] = Registry("attack")


def create_attack(name: str, **options: Any) -> Attack:
    """The attack registered as `name` with these settings; raises `UnknownNameError` for a name or option it lacks."""
    return attacks.create(name, **options)


@dataclass(frozen=True)
class AttackResult:
    """What `Attack.run` found.

    images: `(N, C, H, W)` adversarial images. success, success_8bit: `(N,)` bool, by one clean final forward, as they
    are and rounded to 8 bits. forwards, backwards: batch passes spent by the attack. queries: `(N,)` forward passes
    per image. gradients, zero_gradients: `(N,)` how often an image's gradient was asked for, and how often it was
    exactly zero (a saturated or masked model). nonfinite: `(N,)` passes, the final ones too, whose logits were NaN or
    infinite: a wrong answer. broken_by: N names, of the member of a cascade that felled each image ("" where it still
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
    broken_by: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Settings of one attack. Its repr is its record.

    targets: None leaves the true class; `"least_likely"` or `"random"` picks a class to reach; classes given to the
    call win over both. needs_gradient: of the class, whether it differentiates the model; False where outputs do.
    """

    needs_gradient: ClassVar[bool] = True
    targets: Literal["least_likely", "random"] | None = None

    def perturb(self, context: AttackContext) -> Tensor:
        """Adversarial images for `context`; what a new attack writes."""
        raise TypeError(f"{type(self).__name__} does not say how it perturbs")

    def limit(self, x: Tensor, images: Tensor) -> Tensor:
        """`x` brought back into what this attack may do; [0, 1] alone unless it has a ball."""
        return x.clamp(0, 1)

    def for_random_model(self, eot_samples: int = 20) -> Attack:
        """This attack as a random model must be asked, where one success is a draw: it spends its whole budget on
        every image.

        eot_samples: passes that are averaged where the attack knows how; 1 for a model that averages itself
        (`threats.EOT`). Raises `ValueError` for a minimal-norm attack, whose answer would be the nearest lucky draw.
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
        x, context = self._solve(model, images, labels, targets, index, seed, progress)
        # Whoever has reached a target has no gradient left, and who has not is not told apart without another pass.
        context.counter.warn(torch.full_like(context.labels, not context.targeted, dtype=torch.bool))
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
    ) -> tuple[Tensor, QueryCounter]:
        """The same images as `__call__`, without a warning, with what they cost: for who asks batch by batch."""
        x, context = self._solve(model, images, labels, targets, index, seed, progress)
        return x, context.counter

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
        x, context = self._solve(model, images, labels, targets, index, seed, progress)
        counter = context.counter
        success = []
        with torch.inference_mode(False), frozen(model), torch.no_grad():
            for shown in (x, (x * 255).round() / 255):
                logits = logits_of(model, shown)
                bad = not_finite(logits)
                counter.nonfinite += bad
                success.append(torch.where(bad, not context.targeted, context.fooled(logits)))
        counter.warn(~success[0])
        return AttackResult(
            images=x,
            success=success[0],
            success_8bit=success[1],
            forwards=counter.forwards,
            backwards=counter.backwards,
            queries=counter.queries,
            gradients=counter.gradients,
            zero_gradients=counter.zero_gradients,
            nonfinite=counter.nonfinite,
            broken_by=counter.broken_by,
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
    ) -> tuple[Tensor, AttackContext]:
        images = check_images(images)
        check_labels(images, labels)
        self._check_reach(images)
        images, labels = _plain(images.detach().float()), _plain(labels.to(torch.int64))
        index = torch.arange(len(images), device=images.device) if index is None else _plain(index.to(images.device))
        if index.shape != labels.shape:
            raise ValueError(f"index must have shape {tuple(labels.shape)}, not {tuple(index.shape)}")
        counts = torch.zeros_like(labels)
        counter = QueryCounter(queries=counts, zero_gradients=counts.clone(), progress=progress)
        rows = torch.arange(len(images), device=images.device)
        context = AttackContext(model, images, labels, False, index, seed, counter, rows)
        if not len(images):
            return images.clone(), context
        with frozen(model) as modules:
            tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
            if any(t.is_inference() for t in tensors) and getattr(self, "needs_gradient", True):
                raise ValueError(
                    "the model was made in torch.inference_mode and can give no gradient: make it, or "
                    "copy.deepcopy it, outside"
                )
            if targets is not None or self.targets is not None:
                context = replace(context, labels=self._choose_targets(context, targets), targeted=True)
            x = self.limit(self.perturb(context).detach(), images)
        return x, context

    def _check_reach(self, images: Tensor) -> None:
        """Raise `ValueError` for an L2 budget that no two images are apart by."""
        eps, far = getattr(self, "eps", None), math.sqrt(images[0].numel()) if len(images) else math.inf
        if eps is not None and getattr(self, "norm", None) == "l2" and eps > far:
            raise ValueError(
                f"an L2 budget of {eps:g} is more than any two images of {tuple(images.shape[1:])} in [0, 1] are "
                f"apart ({far:.4g}); divide a budget made for pixels of 0 to 255 by 255"
            )

    def _choose_targets(self, context: AttackContext, given: Tensor | None) -> Tensor:
        labels = context.labels
        if given is not None:
            check_labels(context.images, given)
            if bool((given == labels).any()):
                raise ValueError("a target equals the true class of its image")
            return _plain(given.to(labels))
        logits = context.logits(context.images)
        if self.targets == "least_likely":
            return logits.scatter(1, labels[:, None], torch.inf).argmin(1)
        if self.targets == "random":
            shift = 1 + per_image_rng.integers(context.seed, context.index, 1 << 41, logits.shape[1] - 1).squeeze(1)
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

    def for_random_model(self, eot_samples: int = 20) -> Attack:
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
