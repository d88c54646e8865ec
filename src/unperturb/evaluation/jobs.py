"""Whole evaluations: from a recipe, or from models in hand, to rows."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unperturb import runs, screen, zoo
from unperturb.attacks.base import Attack, attacks
from unperturb.classifiers import load_classifier
from unperturb.config import ComponentConfig, EvaluationRecipe, read_recipe, snapshot
from unperturb.data import ImageSet, known_copy_note, load_dataset
from unperturb.defenses.base import Defense, Protected, create_defense, load_defense
from unperturb.devices import FlopCounter, pick_device, probe
from unperturb.evaluation import training_cost
from unperturb.evaluation.behavior import recognize
from unperturb.evaluation.checks import (
    check_attacks,
    check_data,
    check_knowledge,
    check_models,
    check_number,
    subset,
)
from unperturb.evaluation.grid import Grid, Progress, answers_of, run_grid
from unperturb.evaluation.identity import identify
from unperturb.registry import unknown
from unperturb.results import schema

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Cost:
    """What an evaluation would take at most, nothing being kept from before."""

    cells: int
    images: int
    pflop: float
    minutes: float


def label_of(attack: Attack) -> str:
    """The attack's short name in tables: its registered name, or its class's, norm where not Linf, and steps."""
    name = next((n for n in attacks if attacks[n] is type(attack)), type(attack).__name__.lower())
    norm = getattr(attack, "norm", "linf")
    steps = getattr(attack, "steps", None)
    return name + (f"-{norm}" if norm != "linf" else "") + (f"-{steps}" if steps else "")


def _attacks(recipe: EvaluationRecipe) -> dict[str, tuple[Attack, Sequence[str]]]:
    found: dict[str, tuple[Attack, Sequence[str]]] = {}
    for thing in recipe.attacks:
        options = thing.options
        kinds = options.pop("knowledge", recipe.knowledge)
        label = options.pop("label", None)
        attack = attacks.create(thing.name, **options)
        label = label or label_of(attack)
        if label in found:
            raise ValueError(f"two attacks are called {label!r}; give one of them a label")
        found[label] = (attack, kinds)
    return found


def grid_of(recipe: EvaluationRecipe, device: str = "auto", models: Mapping[str, nn.Module] | None = None) -> Grid:
    """The grid that `recipe` describes, its classifiers and defenses rebuilt from their run folders.

    models: what stands in for an entry of the recipe that names no run folder.
    """
    given = models or {}

    def classifier(entry: str) -> nn.Module:
        return given[entry] if entry in given else load_classifier(entry)

    def defense(entry: str) -> Defense:
        found = given.get(entry)
        return found if isinstance(found, Defense) else load_defense(entry)

    splits = load_dataset(**recipe.data_options)
    data = splits.test if recipe.split == "test" else splits.val
    defenses = _by_name(recipe.defenses, recipe.dataset)
    instead = {
        k: classifier(d)
        for k, d in defenses.items()
        if (not isinstance(given[d], Defense) if d in given else (Path(zoo.find(d)) / "classifier.json").exists())
    }
    return Grid(
        data=subset(data, recipe.n),
        classifiers={k: classifier(c) for k, c in _by_name(recipe.classifiers, recipe.dataset).items()},
        defenses={k: defense("none" if k in instead else d) for k, d in defenses.items()},
        instead=instead,
        attacks=_attacks(recipe),
        surrogate=(_name(recipe.surrogate, recipe.dataset), classifier(recipe.surrogate)) if recipe.surrogate else None,
        eot_samples=recipe.eot_samples or 20,
        seed=recipe.seed,
        batch=recipe.batch,
        shard=recipe.shard,
        samples=recipe.samples,
        device=pick_device(device),
        note=known_copy_note(splits),
    )


def _name(folder: str, dataset: str) -> str:
    """A run folder's name in tables: without the data set, which the table names already."""
    names = [Path(part.removeprefix(zoo.PREFIX)).name for part in folder.split("+")]
    return "+".join(n.removeprefix(f"{dataset}-").removesuffix(f"-{dataset}") or n for n in names)


def _by_name(folders: Sequence[str], dataset: str) -> dict[str, str]:
    """Run folders by their names in tables."""
    found: dict[str, str] = {}
    for folder in folders:
        name = _name(folder, dataset)
        if name == "none" != folder:
            raise ValueError(
                f"{folder} would be called 'none' in tables, as if there were no defense; rename the folder"
            )
        if name in found:
            raise ValueError(f"{found[name]} and {folder} would both be called {name!r}; rename one of the folders")
        found[name] = folder
    return found


def only(
    recipe: EvaluationRecipe,
    defenses: Sequence[str] = (),
    attacks: Sequence[str] = (),
    knowledge: Sequence[str] = (),
) -> EvaluationRecipe:
    """`recipe` cut to the cells of these defenses, attacks (both by their names in tables) and kinds of knowledge; an
    empty list keeps all. Raises `UnknownNameError` for what the recipe does not have, ValueError if no cell is left."""
    if not (defenses or attacks or knowledge):
        return recipe
    named = _by_name(recipe.defenses, recipe.dataset)
    labels = dict(zip(_attacks(recipe), recipe.attacks))
    kinds = {k: list(thing.options.get("knowledge", recipe.knowledge)) for k, thing in labels.items()}
    has: dict[str, tuple[Sequence[str], Collection[str]]] = {
        "defense": (defenses, named),
        "attack": (attacks, labels),
        "knowledge": (knowledge, {kind for own in kinds.values() for kind in own}),
    }
    for what, (asked, known) in has.items():
        for name in asked:
            if name not in known:
                raise unknown(what, name, known)
    kept = {
        k: [kind for kind in own if not knowledge or kind in knowledge]
        for k, own in kinds.items()
        if not attacks or k in attacks
    }
    changed = [ComponentConfig(**{**labels[k].model_dump(), "knowledge": own}) for k, own in kept.items() if own]
    if not changed:
        raise ValueError(f"the recipe has no {' or '.join(knowledge)} cell of {', '.join(attacks)}")
    return recipe.model_copy(
        update={"defenses": [v for k, v in named.items() if not defenses or k in defenses], "attacks": changed}
    )


def estimate(grid: Grid) -> Cost:
    """Count the operations of each cell on two images, for all of them."""
    grid.check()
    images, labels = grid.data.batch(torch.arange(min(2, len(grid.data))), grid.device)
    with grid.at_work():
        total = sum(_operations(grid, images, labels))
    pflop = total * len(grid.data) / 1e15
    rate = max(v for k, v in probe(grid.device.type).rates.items() if k[0] == "float32")
    return Cost(len(grid.cells()), len(grid.data), float(f"{pflop:.3g}"), round(pflop * 1e6 / (rate * 0.3) / 60, 1))


def _operations(grid: Grid, images: Tensor, labels: Tensor) -> Iterator[float]:
    """Of each cell, per image."""
    made, cleaned = set(), set()
    for cell in grid.cells():
        function, defense = grid.target(cell), grid.defenses[cell.defense]
        with FlopCounter() as counter:
            if (key := (id(function) if cell.knowledge == "oblivious" else cell, cell.attack)) not in made:
                made.add(key)
                cell.attack(function, images, labels)
            with torch.no_grad():
                grid.behind(cell)(defense.purify_and_score(images, grid.behind(cell))[0])
                if (clean := (cell.classifier, cell.defense)) not in cleaned:
                    cleaned.add(clean)  # clean images are purified once for all cells
                    defense.purify_and_score(images, grid.behind(cell))
        yield counter.total / len(images)


def run_evaluation(
    recipe: str | EvaluationRecipe,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    resume: bool = False,
    models: Mapping[str, nn.Module] | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """Make the rows that `recipe` describes, in the run folder `out`, and return them.

    models: what stands in for an entry of the recipe's `classifiers` that names no run folder. progress: gets (done,
    total, cell) in place of the bar that is shown unless `quiet`.

    Raises `RecipeError`, `RunError`, `UnknownNameError` or `ValueError` before anything is computed where the recipe,
    a run folder, an attack or the folder `out` cannot be used.
    """
    recipe = read_recipe(recipe, overrides, "evaluation") if isinstance(recipe, str) else recipe
    out = Path(out)
    grid = grid_of(recipe, device, models)
    folders = _by_name(recipe.defenses, recipe.dataset)
    costs = {
        k: training_cost.about(grid.data.source, grid.defenses[k], training_cost.of_folder(f), f)
        for k, f in folders.items()
    }
    with screen.shown("evaluating", progress, quiet) as update:
        return _run(grid, out, snapshot(recipe), costs, resume, update)


def _run(
    grid: Grid,
    out: Path,
    recipe: Mapping[str, Any],
    costs: Mapping[str, Any],
    resume: bool,
    progress: Progress | None,
) -> pd.DataFrame:
    grid.check()
    _warn_near_chance(grid)
    # The folder's run is fixed by the recipe and by what its names stood for: the same names retrained are another run.
    what = {
        "data": grid.data.fingerprint,
        "classifiers": {k: _fingerprint(v) for k, v in grid.classifiers.items()},
        "defenses": {k: _fingerprint(grid.instead.get(k, v)) for k, v in grid.defenses.items()},
        "surrogate": _fingerprint(grid.surrogate[1]) if grid.surrogate else None,
    }
    with runs.lock(out):
        runs.open_run(
            out,
            {**recipe, "fingerprints": what},
            resume=resume,
            about={f"data {grid.data.source}": grid.note} if grid.note else None,
        )
        recognize(grid, out)
        runs.write_json(out / "defenses.json", costs)
        run_grid(grid, out, progress)
    rows = schema.read_rows(out)
    _check_whole(grid, rows, out)
    _warn_of_gradients_and_logits(rows)
    return rows


def _fingerprint(model: nn.Module) -> str:
    identity = identify(model)
    return identity.key if identity.lasting else "an object in hand, known by its behavior"


def _check_whole(grid: Grid, rows: pd.DataFrame, out: Path) -> None:
    """Raise `RunError` unless `rows` hold every image of every cell, and nothing else."""
    keys = ["classifier", "defense", "attack", "knowledge"]
    found = {cell: sorted(part) for cell, part in rows.groupby(keys)["index"]}
    wanted = {(c.classifier, c.defense, c.label, c.knowledge) for c in grid.cells()}
    index = sorted(grid.data.index.tolist())
    wrong = [cell for cell in wanted | set(found) if cell not in wanted or found.get(cell) != index]
    if wrong:
        raise runs.RunError(
            f"{out} does not hold {len(index)} rows of each of its {len(wanted)} cells, but others or fewer of "
            f"{', '.join(map(str, wrong[0]))}; delete that folder under rows and run again with --resume"
        )


def _warn_near_chance(grid: Grid) -> None:
    """Warn of a classifier that hardly knows clean images: classes in another order, or images that are not its own."""
    data = grid.data.subset(200)
    if len(data) < 20:
        return
    images, labels = data.batch(torch.arange(len(data)), grid.device)
    for name, classifier in grid.classifiers.items():
        with grid.at_work():
            predicted = answers_of(classifier, images, labels, grid.batch)[0]
        right = int((predicted == labels.cpu()).sum())
        if right < min(1.5 / data.classes, 0.6) * len(data):  # of two classes, three quarters are no sign of harm
            shown = ", ".join(data.class_names[:3]) + (", ..." if data.classes > 3 else "")
            warnings.warn(
                f"{name} is right on {right} of {len(data)} clean images of {data.source}, near chance for "
                f"{data.classes} classes. Do its classes stand in another order than the data's ({shown})? Then load "
                "the data with class_names=[...] in the classifier's order. It may also want another normalization "
                "(wrap(mean=..., std=...)) or images of another size",
                stacklevel=3,
            )


def _warn_of_gradients_and_logits(rows: pd.DataFrame) -> None:
    """Warn, once a cell, of answers that are not finite and of gradients that are hidden."""
    views = [f"pred_{view}" for view in ("clean", "adv", "pure_clean", "pure_adv")]
    broken = (rows[views] == -1).any(axis=1) | (rows["nonfinite"] > 0)
    masked = 2 * rows["zero_gradients"] > rows["gradients"].clip(lower=0)
    if not (broken | masked).any():
        return
    for names, cell in rows.groupby(["classifier", "defense", "attack", "knowledge"], sort=False):
        what = " · ".join(map(str, names))
        if len(index := cell["index"][broken[cell.index]]):
            warnings.warn(
                f"{what}: logits are not finite for {len(index)} of {len(cell)} images (index {_some(index)}); such an "
                "answer counts as wrong, and its prediction is -1 in the rows",
                stacklevel=3,
            )
        if len(index := cell["index"][masked[cell.index]]) > 0.1 * len(cell):
            warnings.warn(
                f"{what}: for {len(index)} of {len(cell)} images (index {_some(index)}) most gradients were exactly "
                "zero: the attack had nothing to follow, so that those still standing prove nothing. Try BPDA, an "
                "attack by queries, or loss='margin'",
                stacklevel=3,
            )


def _some(index: pd.Series[Any]) -> str:
    return ", ".join(str(i) for i in sorted(index)[:5]) + (", ..." if len(index) > 5 else "")


def evaluate(
    data: ImageSet,
    models: Mapping[str, nn.Module],
    attacks: Sequence[Attack] | Mapping[str, Attack],
    knowledge: Sequence[str] = ("oblivious", "white_box"),
    *,
    n: int | None = None,
    out: str | Path | None = None,
    surrogate: nn.Module | None = None,
    seed: int = 0,
    batch: int = 200,
    eot_samples: int = 20,
    device: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """Attack models and keep a row per image.

    data: the images to judge on, such as `load_dataset("mnist").test`. models: by name; a `Protected` is judged behind
    its defense, anything else as a bare classifier, or, beside one called "none", in that one's place. They are left as
    they were: mode, device and all. attacks: a list, or by the name they are to have in tables. knowledge: what the
    attacker sees. n: a fixed, named random subset of this many images. out: run folder (default: a temporary one).
    eot_samples: draws that the gradient of a random defense is averaged over; fewer than 20 flatter it. progress: gets
    (done, total, cell) in place of the bar that is shown unless `quiet`. Returns the rows
    (`unperturb.schema.ROW_COLUMNS`); `unperturb.table` makes a table.

    Raises `TypeError` or `ValueError`, which say what to pass, before anything is computed. Warns where a classifier is
    hardly better than chance, where logits are not finite, and where an attacker's gradients were mostly zero.
    """
    data, models, attacks = check_data(data), check_models(models), check_attacks(attacks)
    knowledge, images = check_knowledge(knowledge), subset(data, n)
    for what, number, least in (("seed", seed, 0), ("batch", batch, 1), ("eot_samples", eot_samples, 1)):
        check_number(what, number, least)
    if surrogate is not None and not isinstance(surrogate, nn.Module):
        raise TypeError(f"surrogate must be an nn.Module from images to logits, not a {type(surrogate).__name__}")
    labeled = attacks if isinstance(attacks, Mapping) else {label_of(a): a for a in attacks}
    if len(labeled) < len(attacks):
        raise ValueError(f"attacks share a name ({', '.join(labeled)}); give them names of your own: {{name: attack}}")
    pairs: dict[str, tuple[nn.Module, Defense]] = {}
    for name, model in models.items():
        if isinstance(model, Protected):
            pairs[name] = (model.classifier, model.defense)
        else:
            pairs[name] = (model, create_defense("none"))
    # Beside the bare classifier called "none", another one is a defense of its own that stands in its place.
    own = identify(pairs["none"][0]) if "none" in pairs else None
    instead = {
        name: m for name, m in models.items() if own is not None and not isinstance(m, Protected) and identify(m) != own
    }
    bare = {identify(c): c for name, (c, _) in pairs.items() if name not in instead}
    if len(bare) > 1:
        raise ValueError(
            f"models stand on {len(bare)} different classifiers; pass one and the same object to all of them, evaluate "
            "them in one call each, or write a recipe with several classifiers"
        )
    defenses: dict[str, Defense] = {}
    for name, (_, defense) in pairs.items():
        undefended = name not in instead and identify(defense) == identify(create_defense("none"))
        if undefended and "none" in defenses:
            raise ValueError(f"{name!r} is the bare classifier, which is there already; pass each model once")
        defenses["none" if undefended else name] = defense
    classifier = next(iter(bare.values()))
    spec = getattr(classifier, "spec", None) or {}
    grid = Grid(
        data=images,
        classifiers={spec.get("name", "classifier"): classifier},
        defenses=defenses,
        instead=instead,
        attacks={k: (a, list(knowledge)) for k, a in labeled.items()},
        surrogate=("surrogate", surrogate) if surrogate is not None else None,
        eot_samples=eot_samples,
        seed=seed,
        batch=batch,
        device=pick_device(device),
    )
    recipe = {
        "kind": "evaluation",
        "dataset": data.source,
        "split": grid.data.name,
        "attacks": {k: repr(a) for k, a in labeled.items()},
        "knowledge": list(knowledge),
        "eot_samples": eot_samples,
        "seed": seed,
        "batch": batch,
    }
    costs = {
        k: training_cost.about(data.source, d, training_cost.of_model(d, grid.instead.get(k)))
        for k, d in grid.defenses.items()
    }
    with screen.shown("evaluating", progress, quiet) as update:
        if out is not None:
            return _run(grid, Path(out), recipe, costs, resume, update)
        with tempfile.TemporaryDirectory() as folder:
            return _run(grid, Path(folder) / "run", recipe, costs, resume, update)


__all__ = ["ComponentConfig", "Cost", "estimate", "evaluate", "grid_of", "label_of", "only", "run_evaluation"]
