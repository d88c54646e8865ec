"""Defenses. A new one is one file and one line here."""

from unperturb.defenses import (
    bit_depth,
    denoised_smoothing,
    hgd,
    identity,
    jpeg,
    median,
    paired_gan,
    pipeline,
    total_variation,
)
from unperturb.defenses.base import Batch, Defense, Protected, create_defense, defenses, load_defense, save_defense

__all__ = [
    "Batch",
    "Defense",
    "Protected",
    "bit_depth",
    "create_defense",
    "defenses",
    "denoised_smoothing",
    "hgd",
    "identity",
    "jpeg",
    "load_defense",
    "median",
    "paired_gan",
    "pipeline",
    "save_defense",
    "total_variation",
]
