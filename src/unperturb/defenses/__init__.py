"""Defenses. A new one is one file and one line here."""

from unperturb.defenses import (
    ape_gan,
    bit_depth,
    defense_gan,
    denoised_smoothing,
    hgd,
    identity,
    jpeg,
    magnet,
    median,
    paired_gan,
    pipeline,
    total_variation,
)
from unperturb.defenses.base import (
    Batch,
    Defense,
    Protected,
    create_defense,
    defenses,
    load_defense,
    save_defense,
    with_options,
)

__all__ = [
    "Batch",
    "Defense",
    "Protected",
    "ape_gan",
    "bit_depth",
    "create_defense",
    "defense_gan",
    "defenses",
    "denoised_smoothing",
    "hgd",
    "identity",
    "jpeg",
    "load_defense",
    "magnet",
    "median",
    "paired_gan",
    "pipeline",
    "save_defense",
    "total_variation",
    "with_options",
]
