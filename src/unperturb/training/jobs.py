"""Whole trainings: from a recipe to a run folder that rebuilds its classifier or defense."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from unperturb import runs, screen, zoo
from unperturb.attackers import Attacker
from unperturb.attacks.base import attacks
from unperturb.classifiers import Classifier, create_classifier, fused_copy, load_classifier, save_classifier
from unperturb.config import ClassifierRecipe, DefenseRecipe, Training, snapshot
from unperturb.data import ImageSet, Splits, load_dataset
from unperturb.defenses.base import Defense, create_defense, load_defense, save_defense
from unperturb.devices import pick_device, probe
from unperturb.modules import classes_of
from unperturb.recipe_files import read_recipe
from unperturb.runs import Outcome
from unperturb.systems import System
from unperturb.training.adversarial_batches import AdversarialBatches, Sampler, attacked, hardest
from unperturb.training.loop import DIVERGED, total_steps, train
from unperturb.training.objectives import DefenseTask, DistilledClassifier, PlainClassifier, Task, objectives
from unperturb.training.profiling import autotune_precision, flop_per_image
from unperturb.training.state import Validate

Show = Callable[[str], None]
Progress = Callable[[int, int], None]
VALIDATION_IMAGES = 500


@dataclass(frozen=True)
class Cost:
    """What a training would take: steps, PFLOP, and minutes here if it reaches half of a plain convolution's rate."""

    steps: int
    pflop: float
    convolution_gflops: float
    minutes: float


def estimate(task: Task, settings: Training, device: str = "cpu") -> Cost:
    """The cost of `task`, from its first few steps on a small batch and a probe of this machine."""
    if not task.networks():
        return Cost(0, 0.0, 0.0, 0.0)
    steps = total_steps(settings, len(task.sampler.data))
    pflop = flop_per_image(task) * settings.batch * steps / 1e15
    rates = probe(pick_device(device).type).rates
    rate = rates.get((settings.precision, settings.memory_format), max(rates.values()))  # auto takes the quickest
    return Cost(steps, float(f"{pflop:.3g}"), round(rate, 1), round(pflop * 1e6 / (rate * 0.5) / 60, 1))


# What of a recipe changes no weight, and so may differ when a run is resumed; one that diverged may go on more slowly.
FREE = {"training.checkpoint_seconds", "training.log_every", "used", "changes"}
SLOWER = {"training.lr", "training.clip"}


@contextlib.contextmanager
def _run_folder(out: Path, recipe: Any, used: dict[str, Any], resume: bool) -> Iterator[None]:
    """The folder of the run that `recipe` and what it was given, `used`, fix."""
    if not screen.is_first():
        yield
        return
    asked = {**snapshot(recipe), "used": used}
    with runs.lock(out):
        diverged = (out / DIVERGED).exists()
        runs.open_run(out, asked, resume=resume, free=FREE | SLOWER if diverged else FREE)
        if diverged:
            _go_slower(out, asked["training"])
        yield


def _go_slower(out: Path, asked: dict[str, Any]) -> None:
    """Keep in the recipe of a run that diverged what it goes on with, and what that was before."""
    kept = runs.read_json(out / "recipe.json", dict[str, Any])
    was = kept["training"]
    changed = {key: was.get(key) for key in (k.partition(".")[2] for k in SLOWER) if was.get(key) != asked[key]}
    if changed:
        at = runs.read_json(out / DIVERGED, dict[str, Any]).get("step")
        kept["training"] = {**was, **{key: asked[key] for key in changed}}
        kept["changes"] = [*kept.get("changes", []), {"diverged_at": at, "training_before": changed}]
        runs.write_json(out / "recipe.json", kept)
    (out / DIVERGED).unlink()


def decided(recipe: Any, task: Task, out: Path, show: Show | None = None) -> Any:
    """`recipe` with precision and memory format chosen where they are `auto`: as the run that `out` holds has them.

    show: told when the choice is tried out, which takes a moment.
    """
    settings, path = recipe.training, out / "recipe.json"
    precision, layout = settings.precision, settings.memory_format
    if "auto" in (precision, layout):
        if not screen.is_first() or not task.networks():  # the first process decides for the others
            kept = _Chosen(precision="float32", memory_format="contiguous")
        else:
            kept = runs.read_json(path, _Kept).training if path.exists() else _Chosen()
        precision = kept.precision if precision == "auto" else precision
        layout = kept.memory_format if layout == "auto" else layout
        if show and "auto" in (precision, layout):
            show("trying a few steps: which precision and memory format is quickest here")
        precision, layout = autotune_precision(task, precision, layout)
    chosen = {"precision": precision, "memory_format": layout}
    return recipe.model_copy(update={"training": settings.model_copy(update=chosen)})


class _Chosen(BaseModel):
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"


class _Kept(BaseModel):
    """The `recipe.json` of any run, as far as a choice made before is looked for in it."""

    training: _Chosen = _Chosen()


def _weights(module: nn.Module) -> str:
    tensors = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor) and not v.is_quantized}
    return runs.digest_of(tensors)[:16]


def _data_used(data: Splits) -> dict[str, Any]:
    return {"source": data.source, "fingerprint": data.train.fingerprint, "shape": list(data.train.shape)}


def _of_data(plan: Any, data: Splits) -> Any:
    """`plan` naming the data that it is given in place of its own, and how that was read."""
    if data.options:
        return plan.model_copy(update={"dataset": data.source, **data.options})
    if data.source == plan.dataset and plan.size in (None, data.train.shape[1]):
        return plan
    return plan.model_copy(update={"dataset": data.source, "size": data.train.shape[1]})


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet, device: torch.device, batch: int = 500) -> float:
    """Fraction of the images of `data` that `model` gives their label."""
    right = 0
    for rows in torch.arange(len(data)).split(batch):
        images, labels = data.batch(rows, device)
        right += int((classes_of(model(images)) == labels).sum())
    return right / len(data)


# Classifiers --------------------------------------------------------------------------------------------------------


def classifier_task(recipe: ClassifierRecipe, data: Splits, device: str = "cpu") -> PlainClassifier:
    """The task that `recipe` describes, on `data`, with a fresh classifier."""
    torch.manual_seed(recipe.seed)
    channels, height, _ = data.train.shape
    mean, std = pixel_statistics(data.train)
    classifier = create_classifier(
        recipe.classifier.name,
        channels=channels,
        size=height,
        classes=data.train.classes,
        mean=mean,
        std=std,
        **recipe.classifier.options,
    ).to(pick_device(device))
    sampler = Sampler(data.train, recipe.training.batch, recipe.seed, recipe.augment, pick_device(device))
    task = objectives.create(recipe.objective.name, classifier, sampler, **recipe.objective.options)
    assert isinstance(task, PlainClassifier)
    return task


def pixel_statistics(data: ImageSet, n: int = 5000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the first `n` images in a fixed shuffle, in [0, 1] units."""
    images, _ = data.subset(min(n, len(data))).batch(torch.arange(min(n, len(data))))
    std, mean = torch.std_mean(images, dim=(0, 2, 3))
    return [round(float(v), 4) for v in mean], [round(float(v), 4) for v in std]


def train_classifier(
    recipe: str | ClassifierRecipe,
    data: Splits | None = None,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    device: str = "auto",
    devices: int = 1,
    resume: bool = False,
    show: Show | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> tuple[Classifier, Outcome]:
    """Train a classifier into the run folder `out`; `unperturb.load_classifier(out)` rebuilds it.

    recipe: a name, a path, or the recipe itself. data: what `load_dataset` returns (default: the recipe's). show: gets
    a line now and then. progress: gets (step, steps) in place of the bar that is shown unless `quiet`. Returns the
    classifier in eval mode and what it cost, with its accuracy on validation and, measured once, on test images.
    """
    plan: ClassifierRecipe = read_recipe(recipe, overrides, "classifier") if isinstance(recipe, str) else recipe
    out = Path(out)
    data = data or load_dataset(**plan.data_options)
    plan = _of_data(plan, data)
    task = classifier_task(plan, data, device)
    plan = decided(plan, task, out, show)
    used = {"data": _data_used(data)}
    if isinstance(task, DistilledClassifier):
        used["teacher"] = {"weights": _weights(task.teacher)}

    with _run_folder(out, plan, used, resume):
        validate = _classifier_validation(plan, data, task, pick_device(device))
        with screen.shown("training", progress, quiet) as update:
            outcome = train(
                task, plan.training, out, seed=plan.seed, device=device, devices=devices,
                validate=validate, show=show, progress=update,
            )  # fmt: skip
        # Once, after everything is decided; nothing looks at this number again.
        right = accuracy(task.classifier.eval(), data.test, pick_device(device))
        outcome = replace(outcome, test={"accuracy": round(right, 5), "n": len(data.test)})
        about = {"dataset": data.source, "fingerprint": data.train.fingerprint, "outcome": asdict(outcome)}
        assert isinstance(task.classifier, Classifier)
        if screen.is_first():
            runs.write_json(out / "training.json", asdict(outcome))
            save_classifier(out, task.classifier, about)
    return task.classifier.eval(), outcome


def _classifier_validation(
    recipe: ClassifierRecipe, data: Splits, task: PlainClassifier, device: torch.device
) -> Validate:
    """Accuracy on validation images; where the objective names attacks, also under each of them on a part of those
    images, and the score is then the lowest: a robustness that is lost overnight shows nowhere else."""
    held_out = data.val.subset(min(VALIDATION_IMAGES, len(data.val)), seed=recipe.seed)

    def validate() -> dict[str, float]:
        classifier = task.classifier.eval()
        clean = accuracy(classifier, data.val, device)
        figures = {}
        for name, attack in task.val_attacks().items():
            images, labels = held_out.batch(torch.arange(len(held_out)), device)
            x_adv = attack(classifier, images, labels, index=held_out.index, seed=recipe.seed)
            with torch.no_grad():
                figures[name] = float((classes_of(classifier(x_adv)) == labels).float().mean())
        return {"clean": clean, **figures, "score": min(clean, *figures.values())} if figures else {"score": clean}

    return validate


# Defenses -----------------------------------------------------------------------------------------------------------


def defense_task(
    recipe: DefenseRecipe, data: Splits, classifiers: Sequence[nn.Module], device: str = "cpu"
) -> DefenseTask:
    """The task that `recipe` describes: a fresh defense, in front of frozen fast copies of the classifiers."""
    torch.manual_seed(recipe.seed)
    where = pick_device(device)
    channels, height, width = data.train.shape
    defense = create_defense(recipe.defense.name, channels=channels, **recipe.defense.options).to(where)
    if defense.size is not None and (height, width) != (defense.size, defense.size):
        raise ValueError(
            f"{recipe.defense.name} is made for {defense.size}x{defense.size} images, but those of "
            f"{recipe.dataset} are {height}x{width}; set defense.size={height}"
        )
    if recipe.start is not None:
        begin_with(defense, recipe.start)
    for classifier in classifiers:
        System(_called(classifier), classifier).check_data(data.train)
    sampler = Sampler(data.train, recipe.training.batch, recipe.seed, recipe.adversarial_batches.augment, where)
    example, _ = data.train.batch(torch.arange(2), where)
    # The layout is given, not probed: a resumed run must draw the same pairs to the last bit.
    fused = [fused_copy(c.to(where), example, channels_last=True) for c in classifiers]
    systems = [System(f"{recipe.defense.name}-{i}", classifier, defense) for i, classifier in enumerate(fused)]
    return DefenseTask(defense, AdversarialBatches(sampler, recipe.adversarial_batches, systems))


def begin_with(defense: Defense, folder: str) -> None:
    """Give `defense` the weights of the run in `folder`. A part that the run has not must be zero yet, as a fresh gate
    is: it adds nothing. A run that holds a classifier gives the weights of the defense's encoder. Raises `RunError`
    where the networks differ otherwise."""
    part: nn.Module = defense
    encoder = getattr(getattr(defense, "generator", None), "encoder", None)
    if isinstance(encoder, Classifier) and (Path(zoo.find(folder)) / "classifier.json").exists():
        part, given = encoder, load_classifier(folder).state_dict()
    else:
        given = load_defense(folder).state_dict()
    fresh = part.state_dict()
    begun = {name: tensor for name, tensor in fresh.items() if name not in given and not tensor.any()}
    try:
        part.load_state_dict(begun | given)
    except RuntimeError as error:
        raise runs.RunError(
            f"training cannot start with {folder}: its networks are not those of this recipe ({error})"
        ) from None


def train_defense(
    recipe: str | DefenseRecipe,
    classifier: nn.Module | Sequence[nn.Module] | None = None,
    data: Splits | None = None,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    devices: int = 1,
    resume: bool = False,
    show: Show | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Defense:
    """Train a defense into the run folder `out` (default `runs/RECIPE`); `unperturb.load_defense(out)` rebuilds it.

    A defense that has nothing to learn is judged on validation images and kept with the options of its recipe.

    recipe: a name, a path, or the recipe itself. classifier: one or several to protect, taken in turn (default: the
    recipe's run folders); they are not changed. data: what `load_dataset` returns (default: the recipe's). show: gets a
    line now and then. progress: gets (step, steps) in place of the bar that is shown unless `quiet`. Returns the
    defense in eval mode; what it cost is in its `outcome`.
    """
    plan: DefenseRecipe = read_recipe(recipe, overrides, "defense") if isinstance(recipe, str) else recipe
    name = Path(recipe).stem if isinstance(recipe, str) else f"{plan.defense.name}-{plan.dataset}"
    out = Path(out or Path("runs") / name)
    data = data or load_dataset(**plan.data_options)
    plan = _of_data(plan, data)
    plan, classifiers = _to_protect(plan, classifier)
    if plan.start is not None and Path(plan.start).resolve() == out.resolve():
        raise runs.RunError(f"training cannot start with {plan.start}, the folder that it is to write")
    task = defense_task(plan, data, classifiers, device)
    plan = decided(plan, task, out, show)
    names = [{"name": _called(c), "spec": getattr(c, "spec", None), "weights": _weights(c)} for c in classifiers]
    used = {"data": _data_used(data), "classifiers": names}
    if plan.start is not None:
        used["start"] = {"weights": _weights(task.defense)}
    with _run_folder(out, plan, used, resume):
        validate = _defense_validation(plan, data, task, pick_device(device))
        if task.networks():
            with screen.shown("training", progress, quiet) as update:
                outcome = train(
                    task, plan.training, out, seed=plan.seed, device=device, devices=devices,
                    validate=validate, show=show, progress=update,
                )  # fmt: skip
        else:
            outcome = _untrained(validate, out)
        _calibrate(task, data.val, plan.seed, pick_device(device))
        about = {"dataset": data.source, "fingerprint": data.train.fingerprint, "classifiers": names}
        if screen.is_first():
            save_defense(out, task.defense, {**about, "outcome": asdict(outcome)})
    defense = task.defense.eval()
    defense.outcome, defense.folder = outcome, out
    return defense


def _to_protect(
    plan: DefenseRecipe, given: nn.Module | Sequence[nn.Module] | None
) -> tuple[DefenseRecipe, list[nn.Module]]:
    """(`plan` naming the classifiers that were given in place of its own, the classifiers)."""
    if given is None:
        return plan, [load_classifier(Path(folder)) for folder in plan.classifiers]
    classifiers = [given] if isinstance(given, nn.Module) else list(given)
    return plan.model_copy(update={"classifiers": [f"in hand: {_called(c)}" for c in classifiers]}), classifiers


def _called(classifier: nn.Module) -> str:
    """The name of a classifier's family, or of what a user wrote."""
    return classifier.called if isinstance(classifier, Classifier) else type(classifier).__qualname__


def _untrained(validate: Validate, out: Path) -> Outcome:
    """The outcome of a defense that has nothing to learn: what it is worth on validation images, at no cost."""
    figures = {k: round(float(v), 5) for k, v in validate().items()}
    outcome = Outcome(pflop=0.0, seconds=0.0, validation=figures)
    if screen.is_first():
        runs.write_json(out / "training.json", asdict(outcome))
    return outcome


def _held_out(data: ImageSet, most: int | None, seed: int) -> ImageSet:
    return data if most is None else data.subset(min(most, len(data)), seed=seed)


@torch.no_grad()
def _calibrate(task: DefenseTask, data: ImageSet, seed: int, device: torch.device) -> None:
    """Let the defense set its thresholds on clean validation images, seen in front of each classifier in turn."""
    defense = task.defense.eval()
    held_out = _held_out(data, defense.held_out, seed)
    scores = []
    for system in task.adversarial_batches.systems:
        for rows in torch.arange(len(held_out)).split(250):
            images, _ = held_out.batch(rows, device)
            scores.append(defense.scores(images, system.classifier))
            if not scores[-1].shape[1]:
                return
    defense.calibrate(torch.cat(scores))


def _defense_validation(recipe: DefenseRecipe, data: Splits, task: DefenseTask, device: torch.device) -> Validate:
    """Accuracy behind the defense on validation images, clean and under each attack that the recipe validates with (or
    of the mixture at its hardest), averaged over the classifiers; the score is their mean, of an attacker who looks at
    the defense the lowest."""
    held_out = _held_out(data.val, task.defense.held_out or VALIDATION_IMAGES, recipe.seed)
    images, labels = held_out.batch(torch.arange(len(held_out)), device)
    knowledge = recipe.adversarial_batches.knowledge
    given = recipe.adversarial_batches.val_attacks
    named = [(a.name, a.options) for a in given] or [hardest(a) for a in recipe.adversarial_batches.attacks]
    attackers = {
        f"{name}-{i}": Attacker(attacks.create(name, **options), knowledge) for i, (name, options) in enumerate(named)
    }
    kept: dict[tuple[str, str], Tensor] = {}  # oblivious examples do not change while the defense learns

    def adversarial(system: System, name: str) -> Tensor:
        if (system.name, name) in kept:
            return kept[system.name, name]
        x_adv = attacked(attackers[name], system, images, labels, held_out.index)
        if knowledge == "oblivious":
            kept[system.name, name] = x_adv
        return x_adv

    def validate() -> dict[str, float]:
        defense = task.defense.eval()
        figures: dict[str, list[float]] = {}
        for system in task.adversarial_batches.systems:
            shown = {"clean": images} | {name: adversarial(system, name) for name in attackers}
            for name, x in shown.items():
                with torch.no_grad():
                    found = torch.cat([classes_of(system.classifier(defense(part))) for part in x.split(250)])
                figures.setdefault(name, []).append(float((found == labels).float().mean()))
        means = {k: sum(v) / len(v) for k, v in figures.items()}
        score = sum(means.values()) / len(means) if knowledge == "oblivious" else min(means.values())
        return {**means, "score": score}

    return validate
