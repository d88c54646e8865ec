"""The function that an attacker of each knowledge sees."""

from __future__ import annotations

from torch import nn

from unperturb.defenses.base import Defense, Protected
from unperturb.registry import unknown

KNOWLEDGE = {
    "none": "noise: nothing is known",
    "transfer": "made on another classifier",
    "oblivious": "made on the undefended classifier, the paper's protocol",
    "white_box": "made on classifier and purifier together, exact gradient",
}


def target(classifier: nn.Module, defense: Defense, knowledge: str, surrogate: nn.Module | None = None) -> nn.Module:
    """The module, images to logits, that an attacker differentiates.

    none: nothing is known (noise needs no gradient; what it asks is answered by the bare classifier). transfer: the
    surrogate. oblivious: the bare classifier, the paper's protocol. white_box: classifier after purifier, exact
    gradient.

    Raises `UnknownNameError` for another knowledge, `ValueError` for a transfer without a surrogate.
    """
    if knowledge == "transfer":
        if surrogate is None:
            raise ValueError("a transfer attack needs a surrogate classifier; set surrogate in the recipe")
        return surrogate
    if knowledge in ("none", "oblivious"):
        return classifier
    if knowledge == "white_box":
        return Protected(classifier, defense)
    raise unknown("knowledge", knowledge, KNOWLEDGE)
