"""AutoAttack: a cascade of parameter-free attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from unperturb.attacks.apgd import APGD, APGDT, mean_logits, target_classes
from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext
from unperturb.attacks.fab import FAB
from unperturb.attacks.kinds import BallAttack, Best
from unperturb.attacks.losses import attack_loss, cross_entropy, margin
from unperturb.attacks.projections import project_
from unperturb.attacks.square import Square

# A stage of the cascade: (its member's name, the images still standing and their target classes (N, M) -> images).
Stage = tuple[str, Callable[[AttackContext, Tensor], Tensor]]


@attacks.register("autoattack")
@dataclass(frozen=True, kw_only=True)
class AutoAttack(BallAttack):
    """APGD-CE, APGD-T, FAB-T and Square one after the other; each meets only the images that still stand, and an image
    leaves it at its first success (`"rand"`: after the whole climb).

    version: `"standard"`, or `"rand"` for a random model: APGD-CE and APGD-DLR, with gradients, and the logits that say
    who has fallen, averaged over `eot_samples` passes. steps: of APGD and FAB. target_classes: of APGD-T and FAB-T, at
    most all others. queries: of Square. With two classes DLR gives way to the margin.

    A given start is looked at first: an image that it fools has fallen to "start"; the first climb and Square begin
    there. An image that never falls comes back as the one with the highest margin met; `AttackResult.broken_by` names
    who felled the others. Each member judges by the margin, so `loss` has no say; towards a target so does DLR.

    Source: Croce & Hein 2020.
    """

    uses_start: ClassVar[bool] = True

    loss: str = "margin"
    version: Literal["standard", "rand"] = "standard"
    steps: int = 100
    target_classes: int = 9
    queries: int = 5000
    eot_samples: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "margin":
            raise ValueError(f"autoattack chooses its members' losses itself, loss cannot be {self.loss!r}")
        if self.version not in ("standard", "rand"):
            raise ValueError(f"version must be 'standard' or 'rand', not {self.version!r}")
        self._members()  # their constructors check the rest

    def perturb(self, context: AttackContext) -> Tensor:
        eot_samples = self.eot_samples if self.version == "rand" else 1
        found = Best(context.images)
        logits = mean_logits(context, context.images, eot_samples)
        fooled = context.clearly_fooled(logits)
        broken_by = ["clean" if hit else "" for hit in fooled.tolist()]
        classes = target_classes(context, logits, self.target_classes)
        rows = (~fooled).nonzero().squeeze(1)
        for name, attack in self._stages(context, logits.shape[1], classes.shape[1]):
            if not len(rows):
                break
            part = context.select(rows)
            x = project_(attack(part, classes[rows]), part.images, self.eps, self.norm)
            logits = mean_logits(part, x, eot_samples)
            fooled = part.clearly_fooled(logits)
            found.update(x, part.value(logits, margin), fooled=fooled, rows=rows)
            for row in rows[fooled].tolist():
                broken_by[row] = name
            rows = rows[~fooled]
        context.counter.broken_by = broken_by
        return found.images

    def for_random_model(self, eot_samples: int = 20) -> AutoAttack:
        return self if self.version == "rand" else replace(self, version="rand", eot_samples=eot_samples)

    def _members(self) -> tuple[APGD, APGDT, FAB, Square]:
        random = self.version == "rand"  # then one success is a draw, not a fall: the climb goes on
        ball: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "steps": self.steps}
        apgd = APGD(**ball, eot_samples=self.eot_samples if random else 1, first_success=not random)
        apgd_t = APGDT(**ball, target_classes=self.target_classes, first_success=True)
        fab = FAB(**ball, target_classes=self.target_classes, first_success=True)
        return apgd, apgd_t, fab, Square(norm=self.norm, eps=self.eps, queries=self.queries)

    def _stages(self, context: AttackContext, classes: int, count: int) -> Iterator[Stage]:
        """One stage per member, and within a targeted member one per class: whom the first target fells leaves then."""
        apgd, apgd_t, fab, square = self._members()
        if context.start is not None:
            yield "start", lambda p, _: p.images if p.start is None else p.start
        yield "apgd-ce", lambda p, _: apgd.search(p, cross_entropy, 0, margin).images
        if self.version == "rand":
            dlr = attack_loss("dlr" if classes > 2 else "margin", targeted=context.targeted)
            yield "apgd-dlr", lambda p, _: apgd.search(p, dlr, 1, margin).images
            return
        for number in range(count):
            yield "apgd-t", partial(_apgd_t, apgd_t, number)
        for number in range(count):
            yield "fab-t", partial(_fab_t, fab, number)
        yield "square", lambda p, _: square.perturb(p)


def _apgd_t(member: APGDT, number: int, context: AttackContext, classes: Tensor) -> Tensor:
    return member.attack_target(context, classes[:, number], number).images


def _fab_t(member: FAB, number: int, context: AttackContext, classes: Tensor) -> Tensor:
    return member.attack_target(context, classes[:, number], number)[0]
