"""Whole evaluations: from a recipe, or from models in hand, to rows."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from unperturb import runs, screen
from unperturb.attackers import Attacker
from unperturb.attacks.base import Attack
from unperturb.config import EvaluationRecipe, snapshot
from unperturb.data import ImageSet
from unperturb.defenses.base import Defense
from unperturb.devices import pick_device
from unperturb.evaluation import training_cost
from unperturb.evaluation.behavior import recognize
from unperturb.evaluation.checks import attackers_of, check_data, check_number, subset, systems_of
from unperturb.evaluation.costs import training_costs
from unperturb.evaluation.engine import Make, Ray, engine_of, local
from unperturb.evaluation.grid import Progress
from unperturb.evaluation.identity import identify
from unperturb.evaluation.measure import predictions
from unperturb.evaluation.plan import UNDEFENDED, Plan, by_name, defense_of, entries_in, plan_of
from unperturb.evaluation.probe import probe
from unperturb.evaluation.surrogates import Retrained, Surrogate, retrained, surrogates_of
from unperturb.mistakes import ModelError, named
from unperturb.recipe_files import read_recipe
from unperturb.registry import unknown
from unperturb.results import schema
from unperturb.systems import System
from unperturb.training.jobs import Cost as TrainingCost

if TYPE_CHECKING:
    import pandas as pd

CELL = ["classifier", "system", "attack", "knowledge"]  # what tells the cells of a run apart


# From a recipe ------------------------------------------------------------------------------------------------------


def only(
    recipe: EvaluationRecipe,
    systems: Sequence[str] = (),
    attacks: Sequence[str] = (),
    knowledge: Sequence[str] = (),
) -> EvaluationRecipe:
    """`recipe` cut to the cells of these systems, attacks (both by their names in tables) and kinds of knowledge; an
    empty list keeps all. Raises `UnknownNameError` for what the recipe does not have, ValueError if no cell is left."""
    if not (systems or attacks or knowledge):
        return recipe
    ladder = recipe.ladder if not (attacks or knowledge) else None
    named = by_name(recipe.systems, recipe.dataset)
    entries = entries_in(recipe)
    kinds = {label: list(entry.knowledge or recipe.knowledge) for label, entry in entries.items()}
    has: dict[str, tuple[Sequence[str], Collection[str]]] = {
        "system": (systems, named),
        "attack": (attacks, entries),
        "knowledge": (knowledge, {kind for own in kinds.values() for kind in own}),
    }
    for what, (asked, known) in has.items():
        for name in asked:
            if name not in known:
                raise unknown(what, name, known)
    kept = {
        label: [kind for kind in own if not knowledge or kind in knowledge]
        for label, own in kinds.items()
        if not attacks or label in attacks
    }
    changed = [entries[label].model_copy(update={"knowledge": own}) for label, own in kept.items() if own]
    if not changed and ladder is None:
        raise ValueError(f"the recipe has no {' or '.join(knowledge)} cell of {', '.join(attacks)}")
    return recipe.model_copy(
        update={
            "systems": [entry for name, entry in named.items() if not systems or name in systems],
            "attacks": changed,
            "ladder": ladder,
        }
    )


def run_evaluation(
    recipe: str | EvaluationRecipe,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    engine: Ray | Literal["local", "ray"] = "local",
    resume: bool = False,
    models: Mapping[str, nn.Module] | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """Make the rows that `recipe` describes, in the run folder `out`, and return them.

    engine: where its cells are made: `"local"` in this process, `"ray"` in those of Ray on this machine, or a
    `unperturb.evaluation.engine.Ray`. The rows are the same, and one may go on where another stopped. models: what
    stands in for an entry of the recipe that names no run folder. progress: gets (done, total, cell) in place of the
    bar that is shown unless `quiet`.

    Raises `RecipeError`, `RunError`, `UnknownNameError` or `ValueError` before anything is computed where the recipe,
    a run folder, an attack or the folder `out` cannot be used.
    """
    recipe = read_recipe(recipe, overrides, "evaluation") if isinstance(recipe, str) else recipe
    folders = by_name(recipe.systems, recipe.dataset)
    with engine_of(engine, recipe, models) as make, screen.shown("evaluating", progress, quiet) as update:
        plan = plan_of(recipe, device, models)
        source = plan.data.source
        about = {
            s.name: training_cost.about(source, s, training_cost.of_folder(folders[s.name]), folders[s.name])
            for s in plan.systems
        }
        return run_plan(plan, Path(out), snapshot(recipe), about, resume, update, make)


# From models in hand ------------------------------------------------------------------------------------------------


def evaluate(
    data: ImageSet,
    systems: Mapping[str, nn.Module | System] | Sequence[System],
    attacks: Sequence[Attack | Attacker] | Mapping[str, Attack | Attacker],
    knowledge: Sequence[str] = ("oblivious", "white_box"),
    *,
    n: int | None = None,
    out: str | Path | None = None,
    surrogate: nn.Module | None = None,
    surrogate_defense: Defense | str | None = None,
    seed: int = 0,
    batch: int = 200,
    draws: int = 10,
    eot_samples: int = 20,
    device: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """Attack systems and keep a row per image.

    data: the images to judge on, such as `load_dataset("mnist").test`. systems: by the names that tables show: a plain
    module is an undefended classifier, a `Protected` a purifier before one; a `System` says all, also of a classifier
    that stands in another's place. They are left as they were: mode, device and all. attacks: a list, or by the name
    they are to have in tables; an `Attacker` has its own knowledge. knowledge: what the attackers of the other attacks
    know. n: a fixed, named random subset of this many images. out: run folder (default: a temporary one). surrogate:
    the classifier that transfer attacks are made on. surrogate_defense: the attacker's own purifier, of gray-box
    attacks; with `"retrain"`, or `"retrain:STEPS"`, one that he trains by each system's own recipe. draws: how often
    each image is shown to a random system. eot_samples: passes that the gradient of a random system is averaged over;
    fewer than 20 flatter it. progress: gets (done, total, cell) in place of the bar that is shown unless `quiet`.

    Returns the rows (`unperturb.results.schema.ROW_COLUMNS`); `unperturb.table` makes a table.

    Raises `TypeError` or `ValueError`, which say what to pass, before anything is computed, and `ModelError` where a
    model fails later on. Warns where a classifier is hardly better than chance, where logits are not finite, and where
    an attacker's gradients were mostly zero.
    """
    data = check_data(data)
    for what, number, least in (("seed", seed, 0), ("batch", batch, 1), ("draws", draws, 1)):
        check_number(what, number, least)
    data, judged = subset(data, n), systems_of(systems)
    attackers = attackers_of(attacks, knowledge, eot_samples)
    plan = Plan(
        data=data,
        systems=judged,
        attackers=attackers,
        surrogates=surrogates_of(surrogate, surrogate_defense),
        retrained=retrained(surrogate_defense, attackers, judged, data),
        seed=seed,
        batch=batch,
        draws=draws,
        device=pick_device(device),
    )
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "run" if out is None else Path(out)
        return run_in_hand(plan, where, resume=resume, progress=progress, quiet=quiet)


def run_in_hand(
    plan: Plan,
    out: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """The rows of a plan of models in hand, made in the run folder `out`; `evaluate` says the rest. settings: what else
    fixes the run."""
    source = plan.data.source
    about = {s.name: training_cost.about(source, s, training_cost.of_system(s)) for s in plan.systems}
    with screen.shown("evaluating", progress, quiet) as update:
        return run_plan(plan, out, {**_record(plan), **(settings or {})}, about, resume, update)


def _record(plan: Plan) -> dict[str, Any]:
    """What fixes a run of models in hand, beside their fingerprints."""

    def record(attacker: Attacker) -> dict[str, Any]:
        backward = attacker.surrogate_backward
        return {
            "attack": repr(attacker.attack),
            "eot_samples": attacker.eot_samples,
            "surrogate_backward": backward and getattr(backward, "__qualname__", repr(backward)),
        }

    cascade = plan.cascade and {**asdict(plan.cascade), "whole": sorted(plan.cascade.whole)}
    return {
        "kind": "evaluation",
        "dataset": plan.data.source,
        "split": plan.data.name,
        "attacks": {label: {a.knowledge: record(a) for a in own} for label, own in plan.attackers.items()},
        "seed": plan.seed,
        "batch": plan.batch,
        "draws": plan.draws,
        **({"cascade": cascade} if plan.cascade else {}),
    }


# A run --------------------------------------------------------------------------------------------------------------


def run_plan(
    plan: Plan,
    out: Path,
    recipe: Mapping[str, Any],
    about: Mapping[str, Any],
    resume: bool,
    progress: Progress | None,
    make: Make = local,
) -> pd.DataFrame:
    """The rows of `plan`, written by `make` in the run folder `out`; the rest as for `opened`."""
    plan.check()
    trainings = training_costs(plan)
    try:
        with named("a model, at a first look,"):
            _warn_near_chance(plan)
        with opened(plan, out, recipe, about, resume=resume):
            if trainings:
                plan = replace(plan, retrained=_trained(plan, trainings, out, progress))
            make(plan, out, progress)
    except ModelError as error:
        error.add_note("What was finished is kept in the folder `out`, if you gave one: resume=True goes on there.")
        raise
    rows = schema.read_rows(out)
    _check_whole(plan, rows, out)
    _warn_of_gradients_and_logits(rows)
    return rows


def _trained(
    plan: Plan, costs: Mapping[str, TrainingCost], out: Path, progress: Progress | None
) -> dict[str, Surrogate]:
    """The purifiers that the attacker trains, kept in the run folder `out`. Raises `RunError` where one is not that
    which rows there were made with."""
    found = {}
    for name, untrained in plan.retrained.items():
        assert isinstance(untrained, Retrained)
        said = f"training the attacker's {name}: {costs[name].steps:,} steps, {costs[name].pflop:g} PFLOP"

        def report(step: int, steps: int, said: str = said) -> None:
            if progress:
                progress(step, steps, said)

        with plan.at_work(), plan.drawing(plan.seed):
            found[name] = untrained.trained(out, str(plan.device), report)
    keys, kept = {name: identify(one.model).key for name, one in found.items()}, out / "surrogates.json"
    if kept.exists() and runs.read_json(kept, dict[str, str]) != keys:
        raise runs.RunError(
            f"{out / 'surrogates'} holds other purifiers than those that rows of this run were made with; choose "
            "another folder"
        )
    runs.write_json(kept, keys)
    return found


@contextlib.contextmanager
def opened(
    plan: Plan, out: Path, recipe: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool
) -> Iterator[None]:
    """`out` as the locked run folder of `plan`: inside, its rows may be made.

    recipe: what fixes the run beside its models. about: of each system, for `systems.json`. Raises `RunError` where
    the folder holds anything else, another process has it, or `resume` is off and it holds this run.
    """
    with runs.lock(out):
        own = sorted(label for label, sent in plan.attackers.items() if any(map(_is_own, sent)))
        if resume and own and (out / "rows").is_dir():
            raise runs.RunError(
                f"{out} cannot be gone on with: {', '.join(own)} holds code of your own, and whether it is that "
                "which the run was begun with cannot be told; choose another folder"
            )
        note = {f"data {plan.data.source}": plan.note} if plan.note else None
        runs.open_run(out, {**recipe, "fingerprints": fingerprints(plan)}, resume=resume, about=note)
        with named("a model, at a first look,"):
            recognize(plan, out)
            runs.write_json(out / "systems.json", about)
            _probe(plan, out)
        yield


def _is_own(attacker: Attacker) -> bool:
    """Whether an attacker holds code that no later process can tell from other code."""
    return attacker.surrogate_backward is not None or not identify(attacker.attack).lasting


def _probe(plan: Plan, out: Path) -> None:
    """Keep in the run folder what a short look at each system shows, once; the flags are raised from it."""
    if not plan.probed or (out / "probe.json").exists():
        return
    data = plan.data.subset(min(plan.probed, len(plan.data)))
    found: dict[str, dict[str, Any]] = {name: {} for name in plan.classifiers}
    threat = plan.threat
    ball: Any = {"eps": threat.eps, "norm": threat.norm}
    with plan.at_work():
        images, labels = data.batch(torch.arange(len(data)), plan.device)
        for classifier in plan.classifiers if len(data) > 1 else ():
            for system in plan.block(classifier):
                found[classifier][system.name] = probe(system, images, labels, **ball)
    runs.write_json(out / "probe.json", found)


def fingerprints(plan: Plan) -> dict[str, Any]:
    """What the names of a run stood for: the same names retrained are another run."""

    def fingerprint(*models: nn.Module) -> str:
        identity = identify(*models)
        return identity.key if identity.lasting else "an object in hand, known by its behavior"

    untrained = {name: one for name, one in plan.retrained.items() if isinstance(one, Retrained)}
    return {
        "data": plan.data.fingerprint,
        "classifiers": {name: fingerprint(model) for name, model in plan.classifiers.items()},
        "systems": {s.name: UNDEFENDED if s.undefended else fingerprint(*defense_of(s).values()) for s in plan.systems},
        "surrogates": {kind: fingerprint(surrogate.model) for kind, surrogate in plan.surrogates.items()},
        **({"retrained": {name: one.record() for name, one in untrained.items()}} if untrained else {}),
    }


def _check_whole(plan: Plan, rows: pd.DataFrame, out: Path) -> None:
    """Raise `RunError` unless `rows` hold every image of every cell in every draw, and nothing else."""
    found: dict[Any, Any] = {cell: sorted(zip(part["draw"], part["index"])) for cell, part in rows.groupby(CELL)}
    index = sorted(plan.data.index.tolist())
    wanted: dict[Any, Any] = {
        c.names: [(d, i) for d in range(plan.draws_of(c.system)) for i in index] for c in plan.cells()
    }
    wrong = [cell for cell in wanted | found if found.get(cell) != wanted.get(cell)]
    if wrong:
        raise runs.RunError(
            f"{out} does not hold {len(index)} images in each of its {len(wanted)} cells, but others or fewer of "
            f"{', '.join(map(str, wrong[0]))}; delete that folder under rows and run again with --resume"
        )


# Warnings -----------------------------------------------------------------------------------------------------------


def _warn_near_chance(plan: Plan) -> None:
    """Warn of a classifier that hardly knows clean images: classes in another order, or images that are not its own."""
    data = plan.data.subset(200)
    if len(data) < 20:
        return
    images, labels = data.batch(torch.arange(len(data)), plan.device)
    for name, classifier in plan.classifiers.items():
        with plan.at_work():
            predicted, _ = predictions(classifier, images, labels, plan.batch)
        right = int((predicted == labels.cpu()).sum())
        if right < min(1.5 / data.classes, 0.6) * len(data):  # of two classes, three quarters are no sign of harm
            shown = ", ".join(data.class_names[:3]) + (", ..." if data.classes > 3 else "")
            warnings.warn(
                f"{name} is right on {right} of {len(data)} clean images of {data.source}, near chance for "
                f"{data.classes} classes. Do its classes stand in another order than the data's ({shown})? Then load "
                "the data with class_names=[...] in the classifier's order. It may also want another normalization "
                "(wrap(mean=..., std=...)) or images of another size",
                stacklevel=4,
            )


def _warn_of_gradients_and_logits(rows: pd.DataFrame) -> None:
    """Warn, once a cell, of answers that are not finite and of gradients that are hidden."""
    views = [f"pred_{view}" for view in ("clean", "adv", "pure_clean", "pure_adv")]
    broken = (rows[views] == -1).any(axis=1) | (rows["nonfinite"] > 0)
    masked = 2 * rows["zero_gradients"] > rows["gradients"].clip(lower=0)
    if not (broken | masked).any():
        return
    for names, cell in rows.groupby(CELL, sort=False):
        what, count = " · ".join(map(str, names)), cell["index"].nunique()
        if len(index := cell["index"][broken[cell.index]].unique()):
            warnings.warn(
                f"{what}: logits are not finite for {len(index)} of {count} images (index {_some(index)}); such an "
                "answer counts as wrong, and its prediction is -1 in the rows",
                stacklevel=4,
            )
        if len(index := cell["index"][masked[cell.index]].unique()) > 0.1 * count:
            warnings.warn(
                f"{what}: for {len(index)} of {count} images (index {_some(index)}) most gradients were exactly "
                "zero: the attack had nothing to follow, so that those still standing prove nothing. Try BPDA, an "
                "attack by queries, or loss='margin'",
                stacklevel=4,
            )


def _some(index: Iterable[int]) -> str:
    numbers = sorted(index)
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


__all__ = ["evaluate", "only", "opened", "run_evaluation", "run_in_hand"]
