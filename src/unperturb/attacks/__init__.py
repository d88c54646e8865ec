"""Attacks. A new one is one file and one line here."""

from unperturb.attacks import (
    apgd,
    autoattack,
    cw,
    ddn,
    deepfool,
    fab,
    fgsm,
    foreign,
    jsma,
    mim,
    nifgsm,
    noise,
    patch,
    pgd,
    rays,
    square,
)
from unperturb.attacks.base import Attack, AttackResult, attacks, create_attack
from unperturb.attacks.foreign import wrap_attack
from unperturb.threat_models import budget

__all__ = [
    "Attack",
    "AttackResult",
    "apgd",
    "attacks",
    "autoattack",
    "budget",
    "create_attack",
    "cw",
    "ddn",
    "deepfool",
    "fab",
    "fgsm",
    "foreign",
    "jsma",
    "mim",
    "nifgsm",
    "noise",
    "patch",
    "pgd",
    "rays",
    "square",
    "wrap_attack",
]
