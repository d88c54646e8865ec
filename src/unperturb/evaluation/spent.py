"""What the training of each judged defense has cost, kept beside the rows: reports do not see the defenses' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from unperturb import runs, zoo
from unperturb.defenses.base import Defense

Spent = tuple[float | None, float | None]
NOTHING: Spent = (0.0, 0.0)  # a filter, or no defense at all
UNKNOWN: Spent = (None, None)


def of_folder(source: str | Path) -> Spent:
    """(PFLOP, seconds) that training cost what `source` names: a run folder, a filter's name, or several joined by `+`.

    A run that began with the weights of another, or learned from a teacher, has cost that one's training too; the
    classifiers that a purifier was trained in front of are not counted. None where nobody kept it.
    """
    folder = Path(zoo.find(source))
    if not any((folder / f"{kind}.json").exists() for kind in ("defense", "classifier")):
        return _sum([of_folder(part) for part in str(source).split("+")]) if "+" in str(source) else NOTHING
    recipe = runs.read_json(folder / "recipe.json") if (folder / "recipe.json").exists() else {}
    before = [recipe.get("start"), (recipe.get("objective") or {}).get("teacher")]
    return _sum([_own(folder), *(_earlier(other, folder) for other in before if other)])


def of_model(defense: Defense, classifier: nn.Module | None = None) -> Spent:
    """The same of a defense in hand; classifier: the one that stands in the bare one's place, if it does."""
    if defense.outcome is not None:
        return defense.outcome.pflop, defense.outcome.seconds
    learned = classifier is not None or any(link.networks() for link in defense.links())
    return UNKNOWN if learned else NOTHING


def about(dataset: str, defense: Defense, spent: Spent, folder: str = "") -> dict[str, Any]:
    """One entry of `defenses.json` (`unperturb.runs.read_costs`)."""
    pflop, seconds = spent
    return {
        "dataset": dataset,
        "folder": folder,
        "spec": defense.spec,
        "differentiable": defense.differentiable,
        "random": defense.random,
        "pflop": pflop,
        "seconds": seconds,
    }


def _own(folder: Path) -> Spent:
    outcome: dict[str, Any] | None = None
    if (folder / "training.json").exists():
        outcome = runs.read_json(folder / "training.json")
    else:
        for name, place in (("defense", "about"), ("classifier", "extra")):
            if (folder / f"{name}.json").exists():
                outcome = (runs.read_json(folder / f"{name}.json").get(place) or {}).get("outcome")
    return (outcome.get("pflop"), outcome.get("seconds")) if outcome else UNKNOWN


def _earlier(other: str, folder: Path) -> Spent:
    """What the run `other`, as a recipe names it, has cost; it may have moved along with `folder`."""
    name = Path(other.removeprefix(zoo.PREFIX)).name
    for place in (Path(other), zoo.folders().get(name) if other.startswith(zoo.PREFIX) else None, folder.parent / name):
        if place and place.is_dir():
            return of_folder(place)
    return UNKNOWN


def _sum(parts: list[Spent]) -> Spent:
    pflop, seconds = ([part[i] for part in parts] for i in (0, 1))
    return _total(pflop), _total(seconds)


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known):.6g}") if len(known) == len(values) else None
