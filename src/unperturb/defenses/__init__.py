"""Defenses. A new one is one file and one line here."""

from unperturb.defenses import identity, paired_gan
from unperturb.defenses.base import Batch, Defense, Protected, create_defense, defenses, load_defense, save_defense

__all__ = [
    "Batch",
    "Defense",
    "Protected",
    "create_defense",
    "defenses",
    "identity",
    "load_defense",
    "paired_gan",
    "save_defense",
]
