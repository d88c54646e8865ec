"""What the attacker owns: another classifier, a purifier that he was handed, or one that he trains himself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unperturb import runs
from unperturb.attackers import Attacker
from unperturb.config import DefenseRecipe, resolve, snapshot
from unperturb.data import ImageSet, Splits, load_dataset
from unperturb.defenses.base import Defense, create_defense, load_defense
from unperturb.evaluation.training_cost import earlier_folder
from unperturb.results.schema import file_stem
from unperturb.systems import System
from unperturb.training import jobs
from unperturb.training.loop import total_steps

RETRAIN = "retrain"
_RETRAIN = re.compile(rf"{RETRAIN}(?::([1-9][0-9]{{0,8}}))?")


@dataclass(frozen=True)
class Surrogate:
    """What a transfer or a gray-box attack is made on: a classifier, a protected one, or a purifier of the attacker's
    own, which is put before each undefended classifier. name: as tables show it."""

    name: str
    model: nn.Module


def surrogates_of(classifier: object, purifier: object) -> dict[str, Surrogate]:
    """By the knowledge that needs one, what is handed to the attacker; one that he is to train himself is not among
    them (`retrained`). purifier: a `Defense`, or what `load_defense` takes. Raises `TypeError`, `ValueError` or
    `RunError`."""
    found = {}
    if classifier is not None:
        if not isinstance(classifier, nn.Module) or isinstance(classifier, Defense):
            kind = type(classifier).__name__
            raise TypeError(f"surrogate must be an nn.Module from images to logits, not a {kind}")
        found["transfer"] = Surrogate("surrogate", classifier)
    if purifier is not None and not is_retrain(purifier):
        handed = load_defense(purifier) if isinstance(purifier, str | Path) else purifier
        if not isinstance(handed, Defense):
            kind = type(purifier).__name__
            raise TypeError(
                f"surrogate_defense must be a purifier, such as load_defense gives, or {RETRAIN!r}, not a {kind}"
            )
        found["gray_box"] = Surrogate("surrogate" if handed.folder is None else handed.folder.name, handed)
    return found


# Trained by the attacker --------------------------------------------------------------------------------------------


def is_retrain(entry: object) -> bool:
    """Whether `entry` says that the attacker trains his purifier himself, `retrain` or `retrain:STEPS`; raises
    `ValueError` for steps that are none."""
    if not isinstance(entry, str) or not (entry == RETRAIN or entry.startswith(f"{RETRAIN}:")):
        return False
    if not _RETRAIN.fullmatch(entry):
        raise ValueError(f"surrogate_defense is {entry!r}; expected {RETRAIN}, or {RETRAIN}:500 for 500 steps")
    return True


@dataclass(frozen=True)
class Retrained(Surrogate):
    """A purifier that the attacker trains: the recipe of a system's own, in front of the same classifiers, on the same
    training split, by another seed.

    model: as it is before training, to be counted. system: whose purifier it is a copy of. trainings: (recipe, data),
    first to last, each begun with the weights of the one before. classifiers: that it is trained in front of.

    He knows everything about the defense but its weights, as in the gray box that MagNet names (Meng and Chen 2017).
    MagNet fell to just this attacker, who trained autoencoders of his own: Carlini and Wagner, "MagNet and Efficient
    Defenses Against Adversarial Attacks are Not Robust to Adversarial Examples", 2017 (arXiv 1711.08478). That a
    defense is to be judged by an attacker who knows how it was made: Athalye et al. 2018 (arXiv 1802.00420).
    """

    system: str
    trainings: tuple[tuple[DefenseRecipe, Splits], ...]
    classifiers: tuple[nn.Module, ...]

    def cost(self, device: str) -> jobs.Cost:
        """What training it would take. Raises `ValueError` where it cannot be trained in front of its classifiers."""
        if not all(getattr(classifier, "differentiable", True) for classifier in self.classifiers):
            raise ValueError(
                f"{RETRAIN}: the purifier of {self.system} cannot be trained in front of this classifier, which gives "
                "no gradient"
            )
        costs = []
        for recipe, data in self.trainings:
            fresh = recipe.model_copy(update={"start": None})  # whose weights do not change what a step costs
            try:
                with torch.random.fork_rng(devices=[]):
                    task = jobs.defense_task(fresh, data, self.classifiers, device)
                    costs.append(jobs.estimate(task, recipe.training, device))
            except RuntimeError as error:
                raise ValueError(
                    f"{RETRAIN}: the purifier of {self.system} cannot be trained in front of this classifier, which "
                    f"said: {runs.shortened(str(error), 200)}"
                ) from error
        steps, pflop, minutes = (sum(getattr(cost, key) for cost in costs) for key in ("steps", "pflop", "minutes"))
        return jobs.Cost(steps, float(f"{pflop:.3g}"), costs[-1].convolution_gflops, round(minutes, 1))

    def record(self) -> dict[str, Any]:
        """What fixes it beside the classifiers, for the recipe of a run."""
        return {str(k): snapshot(recipe) for k, (recipe, _) in enumerate(self.trainings)}

    def trained(self, run: Path, device: str, progress: Callable[[int, int], None]) -> Surrogate:
        """Trained in the run folder `run`: what is there already is not trained again, what was stopped goes on.
        progress: gets (step, steps) of each training."""
        start: str | None = None
        for number, (recipe, data) in enumerate(self.trainings):
            out = self._folder(run, number)
            if not (out / "defense.json").exists():
                begun = recipe.model_copy(update={"start": start})
                jobs.train_defense(
                    begun, self.classifiers, data, out=out, device=device, resume=True, progress=progress
                )
            start = str(out)
        return self.in_run(run)

    def in_run(self, run: Path) -> Surrogate:
        """As it was trained in the run folder `run`; raises `RunError` where it is not there."""
        return Surrogate(self.name, load_defense(self._folder(run, len(self.trainings) - 1)))

    def _folder(self, run: Path, number: int) -> Path:
        return run / "surrogates" / file_stem(self.system) / str(number)


def retrained(
    entry: object, attackers: Mapping[str, Sequence[Attacker]], systems: Sequence[System], data: ImageSet
) -> dict[str, Retrained]:
    """By the system, what the attacker trains where `entry` says so (`is_retrain`) and one of `attackers` uses it; else
    nothing.

    data: that the systems are judged on. Raises `ValueError`, which says why, where a defended system cannot be trained
    again, or none is defended.
    """
    gray = any(attacker.knowledge == "gray_box" for sent in attackers.values() for attacker in sent)
    if not isinstance(entry, str) or not is_retrain(entry) or not gray:
        return {}
    match = _RETRAIN.fullmatch(entry)
    steps = int(match[1]) if match and match[1] else None
    defended = list(dict.fromkeys(s.name for s in systems if not s.undefended))
    if not defended:
        raise ValueError(
            f"surrogate_defense is {entry!r}, but no system has a purifier that an attacker could train; leave it out"
        )
    return {name: _retrained(name, [s for s in systems if s.name == name], steps, data) for name in defended}


def _retrained(name: str, systems: Sequence[System], steps: int | None, judged: ImageSet) -> Retrained:
    purifier = systems[0].purifier

    def refused(why: str) -> ValueError:
        return ValueError(f"an attacker cannot train {name} again: {why}. Hand in a purifier as surrogate_defense")

    if purifier is None:
        raise refused("it is a classifier, without a purifier")
    if purifier.folder is None:
        raise refused("its purifier comes from no run folder that holds its recipe")
    try:
        recipes = _recipes(purifier.folder)
        trainings = [(recipe, load_dataset(**recipe.data_options)) for recipe in recipes]
    except (ValueError, LookupError, OSError, runs.RunError) as error:
        raise refused(f"{error.args[0] if error.args else error}".rstrip(".")) from error
    for _, data in trainings:
        for what in ("shape", "class_names"):
            own, other = getattr(data.train, what), getattr(judged, what)
            if own != other:
                said = " and ".join(runs.shortened(str(list(value)), 60) for value in (own, other))
                raise refused(f"it was trained on {data.source}, and is judged on images of another {what} ({said})")
    own = [total_steps(recipe.training, len(data.train)) for recipe, data in trainings]
    taken = own if steps is None else _shared(steps, own)
    with torch.random.fork_rng(devices=[]):
        recipe, data = trainings[-1]
        model = create_defense(recipe.defense.name, channels=data.train.shape[0], **recipe.defense.options).eval()
    if not model.networks():
        raise refused("it has nothing to learn, so that who knows it has it whole (white_box)")
    cut = [
        (recipe if taken == own else _of_steps(recipe, count), data) for (recipe, data), count in zip(trainings, taken)
    ]
    of = f" of {sum(own):,}" if sum(taken) < sum(own) else ""
    return Retrained(
        f"retrained, {sum(taken):,}{of} steps", model, name, tuple(cut), tuple(dict.fromkeys(s.bare for s in systems))
    )


def _recipes(folder: Path, after: tuple[Path, ...] = ()) -> list[DefenseRecipe]:
    """The recipe of the run in `folder` by another seed, after those of the runs whose weights it began with: the
    attacker has these no more than the last. Raises `RunError` or `RecipeError`."""
    values = runs.read_json(folder / "recipe.json", dict[str, Any])
    values = {key: value for key, value in values.items() if key not in ("used", "changes")}
    recipe = resolve(values, str(folder / "recipe.json"))
    if not isinstance(recipe, DefenseRecipe):
        raise runs.RunError(f"{folder / 'recipe.json'} is not the recipe of a purifier")
    recipe = recipe.model_copy(update={"seed": (recipe.seed + 1) % 2**32})
    if recipe.start is None:
        return [recipe]
    before = earlier_folder(recipe.start, folder)
    if before is None or before.resolve() in (*after, folder.resolve()):
        raise runs.RunError(f"its training began with the weights of {recipe.start}, which is not there")
    return [*_recipes(before, (*after, folder.resolve())), recipe]


def _shared(steps: int, own: Sequence[int]) -> list[int]:
    """`steps` in all, over trainings of so many steps by their length; at least one each."""
    taken = [max(1, steps * one // sum(own)) for one in own]
    return [*taken[:-1], max(1, steps - sum(taken[:-1]))]


def _of_steps(recipe: DefenseRecipe, steps: int) -> DefenseRecipe:
    training = recipe.training.model_copy(update={"steps": steps, "epochs": None})
    return recipe.model_copy(update={"training": training})
