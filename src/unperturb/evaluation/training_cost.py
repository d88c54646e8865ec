"""What the training of each system has cost, kept beside the rows: reports do not see the systems' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unperturb import runs, zoo
from unperturb.systems import System

TrainingCost = tuple[float | None, float | None]
NOTHING: TrainingCost = (0.0, 0.0)  # a filter, or the undefended classifier
UNKNOWN: TrainingCost = (None, None)


def of_folder(source: str | Path, after: tuple[Path, ...] = ()) -> TrainingCost:
    """(PFLOP, seconds) that training cost what `source` names: a run folder, a filter's name, or several joined by `+`.

    A run that began with the weights of another, or learned from a teacher, has cost that one's training too; the
    classifiers that a purifier was trained in front of are not counted. None where nobody kept it. after: the runs
    that began with this one's weights. Raises `RunError` for a file that is damaged.
    """
    folder = Path(zoo.find(source))
    if folder.resolve() in after:
        return UNKNOWN  # it began with itself
    if not any((folder / f"{kind}.json").exists() for kind in ("defense", "classifier")):
        return _sum([of_folder(part, after) for part in str(source).split("+")]) if "+" in str(source) else NOTHING
    recipe = _read(folder / "recipe.json")
    before = [recipe.get("start"), _inside(recipe, "objective").get("teacher")]
    earlier = [_earlier(str(other), folder, (*after, folder.resolve())) for other in before if other]
    return _sum([_own(folder), *earlier])


def of_system(system: System) -> TrainingCost:
    """The same of a system in hand: of its purifier, and of a classifier that stands in the base's place."""
    learned = system.bare is not system.classifier
    if system.purifier is not None:
        if system.purifier.outcome is not None and not learned:
            return system.purifier.outcome.pflop, system.purifier.outcome.seconds
        learned |= any(stage.networks() for stage in system.purifier.stages())
    return UNKNOWN if learned else NOTHING


def earlier_folder(other: str, folder: Path) -> Path | None:
    """Where the run `other` lies, as the recipe of the run in `folder` names it: it may have moved along with that."""
    name = Path(other.removeprefix(zoo.PREFIX)).name
    zoos = zoo.folders().get(name) if other.startswith(zoo.PREFIX) else None
    return next((place for place in (Path(other), zoos, folder.parent / name) if place and place.is_dir()), None)


def about(dataset: str, system: System, cost: TrainingCost, folder: str = "") -> dict[str, Any]:
    """One entry of `systems.json` (`unperturb.results.schema.read_systems`)."""
    pflop, seconds = cost
    return {
        "dataset": dataset,
        "folder": folder,
        "spec": None if system.purifier is None else system.purifier.spec,
        "differentiable": system.differentiable,
        "random": system.random,
        "defended": not system.undefended,
        "pflop": pflop,
        "seconds": seconds,
    }


def _own(folder: Path) -> TrainingCost:
    if (folder / "training.json").exists():
        outcome = runs.read_json(folder / "training.json", runs.Outcome)
        return outcome.pflop, outcome.seconds
    for name, place in (("defense", "about"), ("classifier", "extra")):
        kept = _inside(_inside(_read(folder / f"{name}.json"), place), "outcome")
        if kept:
            pflop, seconds = (
                value if isinstance(value := kept.get(k), float | int) else None for k in ("pflop", "seconds")
            )
            return pflop, seconds
    return UNKNOWN


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = runs.read_json(path, dict[str, Any]) if path.exists() else {}
    return found


def _inside(values: dict[str, Any], key: str) -> dict[str, Any]:
    return value if isinstance(value := values.get(key), dict) else {}


def _earlier(other: str, folder: Path, after: tuple[Path, ...]) -> TrainingCost:
    """What the run `other`, as the recipe of the run in `folder` names it, has cost."""
    place = earlier_folder(other, folder)
    return UNKNOWN if place is None else of_folder(place, after)


def _sum(parts: list[TrainingCost]) -> TrainingCost:
    pflop, seconds = ([part[i] for part in parts] for i in (0, 1))
    return _total(pflop), _total(seconds)


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known):.6g}") if len(known) == len(values) else None
