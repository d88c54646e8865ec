"""What there is by name, with a line on each."""

from __future__ import annotations

from typing import Any


def catalog() -> dict[str, dict[str, str]]:
    """Every registered name by kind: `{"attacks": {"fgsm": "One step ...", ...}, ...}`."""
    from unperturb.attacks import attacks
    from unperturb.classifiers import classifiers
    from unperturb.config import read_recipe, recipe_names
    from unperturb.data import NAMES
    from unperturb.defenses import defenses
    from unperturb.threats import KNOWLEDGE

    return {
        "datasets": {**NAMES, "folder:PATH": "class folders of pictures", "hub:NAME": "any image set on the hub"},
        "classifiers": {n: _line(classifiers[n]) for n in classifiers},
        "attacks": {n: _line(attacks[n]) for n in attacks},
        "defenses": {n: _line(defenses[n]) for n in defenses},
        "knowledge": dict(KNOWLEDGE),
        "recipes": {n: _recipe_line(read_recipe(n)) for n in recipe_names()},
    }


def _recipe_line(recipe: Any) -> str:
    what = {
        "classifier": "train a classifier",
        "defense": "train a defense",
        "evaluation": "attack and judge",
        "demo": "the main job from end to end",
    }[recipe.kind]
    return f"{what} on {recipe.dataset}" if hasattr(recipe, "dataset") else what


def _line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]
