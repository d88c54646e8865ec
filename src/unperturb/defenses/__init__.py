"""Defenses. A new one is one file and one line here."""

from unperturb.defenses import ape_gan, defense_gan, identity, magnet, paired_gan
from unperturb.defenses.base import (
    Batch,
    Defense,
    Protected,
    create_defense,
    defenses,
    load_defense,
    save_defense,
    vary,
)

__all__ = [
    "Batch",
    "Defense",
    "Protected",
    "ape_gan",
    "create_defense",
    "defense_gan",
    "defenses",
    "identity",
    "load_defense",
    "magnet",
    "paired_gan",
    "save_defense",
    "vary",
]
