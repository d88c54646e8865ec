"""Auto-PGD: projected gradient ascent that sets its own step size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext, PerImage
from unperturb.attacks.kinds import BallAttack, Best
from unperturb.attacks.losses import LossFunction, attack_loss, margin
from unperturb.attacks.projections import Norm, l2_norm, projection

_MOMENTUM = 0.75  # alpha of algorithm 1: the weight of the new step against the last one
_FEWER = 0.95  # images leave together, when so few are left: each parting copies the others
_RISES = 0.75  # rho of condition 1: the share of steps that must raise the loss


def checkpoints(steps: int) -> list[int]:
    """The steps after which the step size may be halved: w_j = ceil(p_j steps)."""
    last, now, found = 0, 22, []  # p_j in hundredths: floats would round 22.000000000000004 up to 23
    while now < 100:
        found.append(-(-now * steps // 100))
        last, now = now, now + max(now - last - 3, 6)
    return sorted({w for w in found if w < steps})


def target_classes(context: AttackContext, logits: Tensor, count: int) -> Tensor:
    """`(N, M)` classes to aim at: the `count` strongest others of `logits`, as many as there are; targeted, the one."""
    if context.targeted:
        return context.labels[:, None]
    others = logits.scatter(1, context.labels[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


@dataclass(frozen=True)
class TargetedLoss(PerImage):
    """The loss of an attacker who aims at the classes `target_class` `(N,)`: their logit minus the label's.

    scaled: over the largest minus the mean of the third and fourth logit, the targeted DLR loss (Croce & Hein 2020);
    with fewer than four classes not, since over the largest minus the third of three the loss is constant, and its
    gradient zero, wherever label and target class are first and last. targeted: the labels are the classes
    to reach, and it is the lead over all other classes, not scaled, for the same reason.
    """

    target_class: Tensor
    targeted: bool
    scaled: bool = False

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        classes = logits.shape[1]
        if self.targeted:
            return margin(logits, labels)
        ahead = (logits.gather(1, self.target_class[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
        if not self.scaled or classes < 4:
            return ahead
        top = logits.topk(4, dim=1).values
        return ahead / (top[:, 0] - top[:, 2:].mean(1) + 1e-12)


def mean_gradient(
    context: AttackContext, x: Tensor, loss: LossFunction, eot_samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`context.gradient`, averaged over `eot_samples` passes of a random model: (value, gradient, logits)."""
    value, gradient, logits = context.gradient(x, loss)
    for _ in range(eot_samples - 1):
        more = context.gradient(x, loss)
        value, gradient, logits = value + more[0], gradient + more[1], logits + more[2]
    return value / eot_samples, gradient / eot_samples, logits / eot_samples


def mean_logits(context: AttackContext, x: Tensor, eot_samples: int) -> Tensor:
    """`context.logits`, averaged over `eot_samples` passes of a random model."""
    logits = context.logits(x)
    for _ in range(eot_samples - 1):
        logits = logits + context.logits(x)
    return logits / eot_samples


@dataclass
class _Climb(PerImage):
    """Where a climb stands: the point `x` and the one before it, what the model says of `x`, the highest point met by
    `loss`, the step size, and how often the loss rose since the last mark. rows: the images' places in the answer."""

    context: AttackContext
    loss: LossFunction
    rows: Tensor
    x: Tensor
    before: Tensor
    value: Tensor
    gradient: Tensor
    top: Best
    top_gradient: Tensor
    size: Tensor
    rises: Tensor
    top_then: Tensor
    halved: Tensor

    def ahead(self, norm: Norm, project: Callable[[Tensor], Tensor], *, momentum: bool) -> Tensor:
        """The next point."""
        if norm == "linf":
            ahead = torch.addcmul(self.x, self.gradient.sign(), self.size)
        else:
            step = self.size / l2_norm(self.gradient).clamp(min=1e-30)[:, None, None, None]
            ahead = torch.addcmul(self.x, self.gradient, step)
        ahead = project(ahead)
        if momentum:  # z moves on, pulled along by the last move: x + a (z - x) + (1 - a) (x - x_before)
            ahead = ahead.sub_(self.x).mul_(_MOMENTUM).add_(self.x).add_(self.x - self.before, alpha=1 - _MOMENTUM)
            ahead = project(ahead)
        return ahead

    def mark(self, steps: int) -> None:
        """Halve the step, and go back to the top, where too few of the last `steps` steps have raised the loss."""
        halve = (self.rises < _RISES * steps) | (~self.halved & (self.top.value <= self.top_then))
        back = halve[:, None, None, None]
        self.size = torch.where(back, self.size / 2, self.size)
        self.x = torch.where(back, self.top.images, self.x)
        self.gradient = torch.where(back, self.top_gradient, self.gradient)
        self.value = torch.where(halve, self.top.value, self.value)
        self.top_then, self.halved = self.top.value, halve
        self.rises = torch.zeros_like(self.rises)


def run_apgd(
    context: AttackContext,
    start: Tensor,
    loss: LossFunction,
    *,
    eps: float,
    norm: Norm,
    steps: int,
    eot_samples: int = 1,
    selection_loss: LossFunction | None = None,
    first_success: bool = False,
) -> Best:
    """Algorithm 1 from `start`: the best points met by `selection_loss` (default: `loss`), a clear success before any
    other.

    The climb itself goes back to the highest `loss`. first_success: an image that has fallen goes no further.
    Costs `steps` passes forward and backward and one forward, each `eot_samples` times.
    """
    project, marks = projection(context.images, eps, norm), set(checkpoints(steps))
    value, gradient, logits = mean_gradient(context, start, loss, eot_samples)
    top, answer = Best(start), Best(start)
    top.update(start, value)
    chosen = _selection_value(context, logits, value, selection_loss)
    answer.update(start, chosen, fooled=context.clearly_fooled(logits))
    now = _Climb(
        context=context,
        loss=loss,
        rows=torch.arange(len(start), device=start.device),
        x=start,
        before=start,
        value=value,
        gradient=gradient,
        top=top,
        top_gradient=gradient,
        size=torch.full_like(start[:, :1, :1, :1], 2 * eps),
        rises=torch.zeros_like(value),
        top_then=top.value,
        halved=torch.zeros_like(value, dtype=torch.bool),
    )
    last_mark = 0
    for step in range(1, steps + 1):
        if first_success:
            active = (~answer.fooled[now.rows]).nonzero().squeeze(1)
            if not len(active):
                return answer
            if len(active) <= _FEWER * len(now.x):
                now = now.select(active)
                project = projection(now.context.images, eps, norm)
        value_before, ahead = now.value, now.ahead(norm, project, momentum=step > 1)
        now.before, now.x = now.x, ahead
        if step < steps:
            now.value, now.gradient, logits = mean_gradient(now.context, now.x, now.loss, eot_samples)
            higher = (now.value > now.top.value)[:, None, None, None]
            now.top_gradient = torch.where(higher, now.gradient, now.top_gradient)
        else:
            logits = mean_logits(now.context, now.x, eot_samples)
            now.value = now.context.value(logits, now.loss)
        now.top.update(now.x, now.value)
        # Now: below, x may go back to the top, and these logits would be another point's.
        chosen = _selection_value(now.context, logits, now.value, selection_loss)
        answer.update(now.x, chosen, fooled=now.context.clearly_fooled(logits), rows=now.rows)
        now.rises += now.value > value_before
        if step in marks:
            now.mark(step - last_mark)
            last_mark = step
    return answer


def _selection_value(
    context: AttackContext, logits: Tensor, value: Tensor, selection_loss: LossFunction | None
) -> Tensor:
    return value if selection_loss is None else context.value(logits, selection_loss)


def in_turn(
    context: AttackContext, count: int, attempt: Callable[[int, AttackContext, Tensor], Best], *, first_success: bool
) -> Best:
    """The best of `count` attempts, each `(number, context, rows) -> Best`; with `first_success` each meets only the
    images, at `rows` of the context, that still stand."""
    best, rows = Best(context.images), torch.arange(len(context.images), device=context.images.device)
    part = context
    for number in range(count):
        if first_success and number:
            rows = (~best.fooled).nonzero().squeeze(1)
            if not len(rows):
                break
            part = context.select(rows)
        best.merge(attempt(number, part, rows), rows)
    return best


@attacks.register("apgd")
@dataclass(frozen=True, kw_only=True)
class APGD(BallAttack):
    """Gradient ascent with momentum whose step starts at 2 eps and is halved, back at the best point, when the loss
    no longer rises; the highest loss met is returned, that of a clear success before any other.

    steps: forward+backward passes per restart. random_start: start uniformly in the ball. restarts: independent
    starts, of which the best per image is kept (only the first may start at the image itself, or at a given start).
    eot_samples: passes averaged per step, for a random model. first_success: an image leaves at its first success: for
    those who ask only whether it falls, as `autoattack` does. Without it the whole budget is spent on every image.

    Source: Croce & Hein 2020, "Reliable evaluation of adversarial robustness", algorithm 1.
    """

    uses_start: ClassVar[bool] = True
    uses_mask: ClassVar[bool] = True

    steps: int = 100
    random_start: bool = True
    restarts: int = 1
    eot_samples: int = 1
    first_success: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.restarts < 1 or self.eot_samples < 1:
            raise ValueError("steps, restarts and eot_samples must be at least 1")

    def perturb(self, context: AttackContext) -> Tensor:
        return self.restart(context, attack_loss(self.loss, targeted=context.targeted), 0, None).images

    def for_random_model(self, eot_samples: int = 20) -> APGD:
        return replace(self, first_success=False, eot_samples=max(self.eot_samples, eot_samples))

    def restart(
        self, context: AttackContext, loss: LossFunction, first: int, selection_loss: LossFunction | None
    ) -> Best:
        """The best of all climbs, their random starts numbered from `first`; by `selection_loss`, or else by `loss`."""

        def attempt(number: int, part: AttackContext, rows: Tensor) -> Best:
            part_loss = loss.select(rows) if isinstance(loss, PerImage) else loss
            return self.search(part, part_loss, first + number, selection_loss)

        return in_turn(context, self.restarts, attempt, first_success=self.first_success)

    def search(
        self, context: AttackContext, loss: LossFunction, restart: int, selection_loss: LossFunction | None = None
    ) -> Best:
        """The best of one climb, by `selection_loss`, or else by `loss`; `restart` numbers its random start."""
        return run_apgd(
            context,
            self.first_point(context, restart, random_start=self.random_start),
            loss,
            eps=self.eps,
            norm=self.norm,
            steps=self.steps,
            eot_samples=self.eot_samples,
            selection_loss=selection_loss,
            first_success=self.first_success,
        )


@attacks.register("apgd-t")
@dataclass(frozen=True, kw_only=True)
class APGDT(APGD):
    """APGD towards each of several classes in turn; the highest margin met is returned (`first_success`: the first).

    loss: `"dlr"` (targeted DLR) or `"margin"` (plain difference of logits; used anyway for two or three classes, and
    where a target is given).
    target_classes: how many, the strongest others on the clean image first, at most all of them. A given start is where
    the first climb towards the first class begins; the others begin at random.

    Source: Croce & Hein 2020, the targeted DLR loss.
    """

    loss: str = "dlr"
    target_classes: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("dlr", "margin"):
            raise ValueError(f"loss must be 'dlr' or 'margin', not {self.loss!r}: it compares two classes")
        if self.target_classes < 1:
            raise ValueError("target_classes must be at least 1")

    def perturb(self, context: AttackContext) -> Tensor:
        logits = mean_logits(context, context.images, self.eot_samples)
        classes = target_classes(context, logits, self.target_classes)

        def attempt(number: int, part: AttackContext, rows: Tensor) -> Best:
            return self.attack_target(part, classes[rows, number], number)

        return in_turn(context, classes.shape[1], attempt, first_success=self.first_success).images

    def attack_target(self, context: AttackContext, target_class: Tensor, number: int) -> Best:
        """The best of all restarts towards the classes `target_class` `(N,)`, the `number`-th, by the margin."""
        loss = TargetedLoss(target_class, context.targeted, scaled=self.loss == "dlr")
        return self.restart(context, loss, number * self.restarts, margin)
