"""The ladder: the attackers that a system has to stand, from the weakest to the strongest, at three budgets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from unperturb.attackers import Attacker
from unperturb.attacks.base import create_attack
from unperturb.registry import unknown
from unperturb.threat_models import ThreatModel


@dataclass(frozen=True)
class Budget:
    """What the ladder's attackers may spend on an image.

    steps: of attacks by gradients. target_classes, fab_classes: that APGD-T and FAB-T aim at; restarts: of APGD.
    queries, decisions: forward passes of Square and of RayS, which sees decisions only; 0 leaves an attack out.
    eot_samples: passes that the gradient of a random system is averaged over.
    """

    steps: int
    target_classes: int
    fab_classes: int
    restarts: int
    queries: int
    decisions: int
    eot_samples: int


# `standard` has the settings of AutoAttack (Croce and Hein 2020) in its white-box and black-box stages.
BUDGETS = {
    "quick": Budget(50, target_classes=9, fab_classes=0, restarts=1, queries=1000, decisions=0, eot_samples=10),
    "standard": Budget(100, target_classes=9, fab_classes=9, restarts=1, queries=5000, decisions=1000, eot_samples=20),
    "thorough": Budget(
        100, target_classes=9, fab_classes=9, restarts=5, queries=10_000, decisions=5000, eot_samples=40
    ),
}


def check_budget(name: str) -> Budget:
    """The budget called `name`; raises `UnknownNameError`, which lists them."""
    if name not in BUDGETS:
        raise unknown("budget", name, BUDGETS)
    return BUDGETS[name]


def check_norm(norm: str) -> None:
    """Raise `ValueError` for a norm without a ladder."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"the ladder's attackers know the norms linf and l2, not {norm!r}")


def ladder(
    threat: ThreatModel,
    budget: str = "standard",
    *,
    classes: int | None = None,
    transfer: bool = False,
    gray_box: bool = False,
    hidden: Collection[str] = (),
) -> dict[str, list[Attacker]]:
    """Attackers by the labels of their attacks, the weakest and cheapest first, as `Plan.attackers` has them.

    Noise; transfer from another classifier; on the undefended classifier; through a purifier of the attacker's own;
    BPDA; the white box (gradients through everything: APGD on cross-entropy, APGD-T, FAB-T, or APGD on DLR where the
    system is random, on the margin where there are two classes, which have no DLR); Square and, with decisions only,
    RayS through the whole. No stage is of more knowledge than `threat` admits.

    threat: its norm, `"linf"` or `"l2"`, and eps are every attacker's. classes: of the data. transfer, gray_box:
    whether there is a surrogate. hidden: kinds of knowledge that meet no gradient, as in an ONNX file: attacks that
    need one are left out.

    Raises `ValueError` for a norm without a ladder, `UnknownNameError` for another budget.
    """
    check_norm(threat.norm)
    own = check_budget(budget)
    ball: dict[str, Any] = {"norm": threat.norm, "eps": threat.eps}
    found: dict[str, list[Attacker]] = {}

    def add(label: str, *knowledge: str, randomness: bool | None = None, **options: Any) -> None:
        attack = create_attack(**options)
        kinds = [k for k in knowledge if threat.admits(k) and not (attack.needs_gradient and k in hidden)]
        if kinds:
            found[label] = [Attacker(attack, k, own.eot_samples, randomness=randomness) for k in kinds]

    elsewhere = ["transfer"] * transfer + ["oblivious"] + ["gray_box"] * gray_box + ["bpda"]
    apgd = {**ball, "steps": own.steps, "restarts": own.restarts, "first_success": True}
    many = {**apgd, "target_classes": own.target_classes}
    fab = {**ball, "steps": own.steps, "target_classes": own.fab_classes, "first_success": True}
    add("noise", "none", name="noise", **ball)
    add(f"pgd-{own.steps}", *elsewhere, name="pgd", **ball, steps=own.steps)
    add("apgd-ce", "white_box", name="apgd", **apgd)
    loss = "margin" if classes == 2 else "dlr"
    add(f"apgd-{loss}", "white_box", name="apgd", **apgd, loss=loss, randomness=True)
    add("apgd-t", "white_box", name="apgd-t", **many, randomness=False)
    if own.fab_classes:
        add("fab-t", "white_box", name="fab-t", **fab, randomness=False)
    add(f"square-{own.queries}", "black_box", name="square", **ball, queries=own.queries)
    if own.decisions and threat.norm == "linf":
        rays = {"eps": threat.eps, "queries": own.decisions}
        add(f"rays-{own.decisions}", "black_box", name="rays", **rays, randomness=False)
    return found
