"""Attacks. A new one is one file and one line here."""

from unperturb.attacks import fgsm, mim, pgd
from unperturb.attacks.base import Attack, AttackResult, attacks, create_attack
from unperturb.contract import budget

__all__ = ["Attack", "AttackResult", "attacks", "budget", "create_attack", "fgsm", "mim", "pgd"]
