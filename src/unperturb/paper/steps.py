"""The plan: which trainings and evaluations a part needs, which of them are done, and what the others cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from unperturb import runs, zoo
from unperturb.classifiers import classifiers, load_classifier
from unperturb.config import snapshot
from unperturb.data import load_dataset
from unperturb.devices import pick_device, probe
from unperturb.evaluation.costs import amount
from unperturb.evaluation.costs import estimate as estimate_evaluation
from unperturb.evaluation.plan import plan_of
from unperturb.evaluation.run import fingerprints, run_evaluation
from unperturb.recipe_files import read_recipe
from unperturb.training import jobs
from unperturb.unsaved import stand_ins

VERBS = {"classifier": "train-classifier", "defense": "train", "evaluation": "evaluate"}


@dataclass(frozen=True)
class Cost:
    """What a step would take, at most and at least."""

    pflop: float = 0.0
    minutes: float = 0.0
    least_pflop: float = 0.0
    least_minutes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __str__(self) -> str:
        return amount((self.least_pflop, self.pflop), (self.least_minutes, self.minutes))


@dataclass(frozen=True)
class Step:
    """One training or evaluation.

    folder: its run folder, as recipes name it. recipe: resolved, with the zoo's entries where these stand in for run
    folders; None where no recipe is known that makes the folder. command: that does the same. needs: the folders of the
    steps before it. found: where a trained thing is there already, the folder or `zoo:NAME`.
    """

    folder: str
    recipe: Any
    command: str
    needs: tuple[str, ...] = ()
    found: str | None = None

    @property
    def name(self) -> str:
        """Its folder, and what stands in for it, if anything."""
        return self.folder if self.found in (None, self.folder) else f"{self.folder}, as {self.found}"

    @property
    def trains(self) -> bool:
        """Whether it is a training."""
        return self.recipe is None or self.recipe.kind != "evaluation"

    @property
    def place(self) -> Path:
        """The folder that its result is, or will be, read from."""
        return Path(zoo.find(self.found or self.folder))

    def done(self) -> bool:
        """Whether there is nothing left to do: a thing is trained, or each row of an evaluation of just these models is
        there."""
        if self.trains:
            return self.found is not None or is_trained(self.folder)
        if not (self.place / "recipe.json").exists():
            return False
        plan = plan_of(self.recipe)
        kept = runs.read_json(self.place / "recipe.json", dict[str, Any])
        if kept != json.loads(json.dumps({**snapshot(self.recipe), "fingerprints": fingerprints(plan)})):
            return False
        shards = range(-(-len(plan.data) // plan.shard))
        files = (self.place / "rows" / cell.folder / f"{i:04d}.parquet" for cell in plan.cells() for i in shards)
        return all(file.exists() for file in files)

    def run(self, *, device: str = "auto", show: Callable[[str], None] | None = None, progress: Any = None) -> None:
        """Do it, or go on with it where it was stopped. Raises what the training or the evaluation does."""
        if self.recipe is None:
            raise runs.RunError(f"{self.folder} is not there; {zoo.how_to_make(self.folder, classifiers)}")
        how: dict[str, Any] = {"device": device, "resume": True, "progress": progress}
        if self.recipe.kind == "classifier":
            jobs.train_classifier(self.recipe, out=self.folder, show=show, **how)
        elif self.recipe.kind == "defense":
            jobs.train_defense(self.recipe, out=self.folder, show=show, **how)
        else:
            run_evaluation(self.recipe, self.folder, **how)

    def cost(self, device: str = "auto") -> Cost | None:
        """What it would take from its beginning; None where that cannot be told. Models that are not there yet are
        stood in for by untrained ones."""
        if self.recipe is None:
            return None
        data = load_dataset(**self.recipe.data_options)
        models = stand_ins([e for e in entries(self.recipe) if not _is_there(e)], data.train)
        if any(e not in models and not _is_there(e) for e in entries(self.recipe)):
            return None
        if self.recipe.kind == "evaluation":
            told = estimate_evaluation(plan_of(self.recipe, device, models))
            return Cost(told.pflop, told.minutes, told.least_pflop, told.least_minutes)
        speed = probe(pick_device(device).type)
        precision, layout = max(speed.rates, key=lambda kind: speed.rates[kind])
        quick = {"precision": precision, "memory_format": layout}
        recipe = self.recipe.model_copy(update={"training": self.recipe.training.model_copy(update=quick)})
        if recipe.kind == "classifier":
            if models:  # what a teacher that is not there costs, nobody asks
                return None
            task: Any = jobs.classifier_task(recipe, data, device)
        else:
            before = [models[e] if e in models else load_classifier(e) for e in recipe.classifiers]
            start = {"start": None} if recipe.start in models else {}
            task = jobs.defense_task(recipe.model_copy(update=start), data, before, device)
        cost = jobs.estimate(task, recipe.training, device)
        return Cost(cost.pflop, cost.minutes, cost.pflop, cost.minutes)


@dataclass
class Steps:
    """The steps of one or more evaluations, by folder, each behind those that it needs."""

    by_folder: dict[str, Step] = field(default_factory=dict)

    def evaluation(self, name: str, n: int | None = None) -> Step:
        """The step of the evaluation recipe `name`, with those that it needs before it. n: judge so many images, in a
        folder of its own."""
        overrides = [] if n is None else [f"n={n}"]
        folder = str(Path("runs") / (name if n is None else f"{name}-n{n}"))
        if folder not in self.by_folder:
            recipe = read_recipe(name, overrides, "evaluation")
            words = [name, *(["--n", str(n), "--out", folder] if n else [])]
            self._add(folder, recipe, words)
        return self.by_folder[folder]

    def before(self, folder: str) -> Iterator[Step]:
        """The step of `folder` and all that it needs, itself last."""
        seen: dict[str, Step] = {}

        def walk(one: str) -> None:
            step = self.by_folder[one]
            for need in step.needs:
                if need not in seen:
                    walk(need)
            seen[one] = step

        walk(folder)
        yield from seen.values()

    def _add(self, folder: str, recipe: Any, words: Iterable[str]) -> None:
        needs = dict.fromkeys(part for entry in entries(recipe) for part in _folders(entry))
        for need in needs:
            if need not in self.by_folder:
                self._add_training(need)
        found = {need: self.by_folder[need].found or need for need in needs}
        command = shlex.join(["unperturb", VERBS[recipe.kind], *words])
        self.by_folder[folder] = Step(folder, replaced(recipe, found), command, tuple(needs))

    def _add_training(self, folder: str) -> None:
        name = Path(folder).name
        known = zoo.recipe_for(folder, classifiers)
        at_hand = folder if is_trained(folder) else f"{zoo.PREFIX}{name}" if name in zoo.folders() else None
        if known is None:
            self.by_folder[folder] = Step(folder, None, "", found=at_hand)
            return
        recipe_name, overrides = known
        recipe = read_recipe(recipe_name, overrides)
        words = [recipe_name, *(word for override in overrides for word in ("--set", override))]
        if at_hand is None:
            self._add(folder, recipe, words)
        else:  # what it was made from is not needed any more
            command = shlex.join(["unperturb", VERBS[recipe.kind], *words])
            self.by_folder[folder] = Step(folder, recipe, command, found=at_hand)


def is_trained(folder: str) -> bool:
    """Whether a run folder holds what it was to train, whole."""
    return zoo.kind_of(folder) is not None


def entries(recipe: Any) -> list[str]:
    """What a recipe names of what was trained before: classifiers, purifiers, a start, a teacher."""
    named = [*getattr(recipe, "classifiers", []), *getattr(recipe, "systems", [])]
    named += [getattr(recipe, key, None) for key in ("surrogate", "surrogate_defense", "start")]
    named.append(recipe.objective.options.get("teacher") if recipe.kind == "classifier" else None)
    return [entry for entry in dict.fromkeys(named) if entry and _folders(entry)]


def replaced(recipe: Any, places: Mapping[str, str]) -> Any:
    """`recipe` with other places for the run folders that it names."""

    def place(entry: str) -> str:
        return "+".join(places.get(part, part) for part in entry.split("+"))

    update: dict[str, Any] = {}
    for key in ("classifiers", "systems"):
        if hasattr(recipe, key):
            update[key] = [place(entry) for entry in getattr(recipe, key)]
    for key in ("surrogate", "surrogate_defense", "start"):
        if getattr(recipe, key, None):
            update[key] = place(getattr(recipe, key))
    if recipe.kind == "classifier" and (teacher := recipe.objective.options.get("teacher")):
        update["objective"] = recipe.objective.model_copy(update={"teacher": place(teacher)})
    return recipe.model_copy(update=update)


def _folders(entry: str) -> list[str]:
    """The run folders in an entry; a filter's name, and what the zoo has by name, is none."""
    return [part for part in entry.split("+") if "/" in part]


def _is_there(entry: str) -> bool:
    return all(is_trained(folder) for folder in _folders(entry))
