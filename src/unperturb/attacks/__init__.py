"""Attacks. A new one is one file and one line here."""

from unperturb.attacks import (
    apgd,
    autoattack,
    cw,
    ddn,
    deepfool,
    ead,
    fab,
    fgsm,
    fmn,
    foreign,
    jsma,
    mim,
    nifgsm,
    noise,
    patch,
    pgd,
    rays,
    sparse_rs,
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
    "ead",
    "fab",
    "fgsm",
    "fmn",
    "foreign",
    "jsma",
    "mim",
    "nifgsm",
    "noise",
    "patch",
    "pgd",
    "rays",
    "sparse_rs",
    "square",
    "wrap_attack",
]
