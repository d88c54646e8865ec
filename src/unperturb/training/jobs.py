"""Whole trainings: from a recipe to a run folder that rebuilds its classifier or defense."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unperturb import runs, threats
from unperturb.attacks.base import attacks
from unperturb.classifiers import Classifier, create_classifier, load_classifier, save_classifier, twin
from unperturb.config import ClassifierRecipe, DefenseRecipe, Training, read_recipe, snapshot
from unperturb.data import ImageSet, Splits, load_dataset
from unperturb.defenses.base import Defense, create_defense, load_defense, save_defense
from unperturb.devices import pick_device, probe
from unperturb.modules import classes_of
from unperturb.training.loop import Outcome, Validate, total_steps, train
from unperturb.training.objectives import DefenseTask, PlainClassifier, Task, objectives
from unperturb.training.pairs import PairSource, Sampler, hardest
from unperturb.training.rehearsal import fastest, flop_per_image

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
    rate = rates[settings.precision, settings.memory_format]
    return Cost(steps, float(f"{pflop:.3g}"), round(rate, 1), round(pflop * 1e6 / (rate * 0.5) / 60, 1))


@contextlib.contextmanager
def _run_folder(out: Path, recipe: Any, resume: bool) -> Iterator[None]:
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))):  # the first process keeps the folder
        yield
        return
    with runs.lock(out):
        runs.open_run(out, snapshot(recipe), resume=resume)
        yield


def decided(recipe: Any, task: Task, out: Path, resume: bool) -> Any:
    """`recipe` with precision and memory format chosen; a run that is resumed keeps its choice."""
    settings = recipe.training
    if resume and (out / "recipe.json").exists():
        there = runs.read_json(out / "recipe.json")["training"]
        precision, layout = there["precision"], there["memory_format"]
    elif not task.networks():
        precision, layout = "float32", "contiguous"
    else:
        precision, layout = fastest(task, settings.precision, settings.memory_format)
    return recipe.model_copy(
        update={"training": settings.model_copy(update={"precision": precision, "memory_format": layout})}
    )


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet, device: torch.device, batch: int = 500) -> float:
    """Share of the images of `data` that `model` gives their label."""
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
) -> tuple[Classifier, Outcome]:
    """Train a classifier into the run folder `out`; `unperturb.load_classifier(out)` rebuilds it.

    recipe: a name, a path, or the recipe itself. data: what `load_dataset` returns (default: the recipe's). Returns
    the classifier in eval mode and what it cost, with its accuracy on validation and, measured once, on test images.
    """
    plan: ClassifierRecipe = read_recipe(recipe, overrides, "classifier") if isinstance(recipe, str) else recipe
    out = Path(out)
    data = data or load_dataset(plan.dataset, size=plan.size)
    task = classifier_task(plan, data, device)
    plan = decided(plan, task, out, resume)

    with _run_folder(out, plan, resume):
        validate = _classifier_validation(plan, data, task, pick_device(device))
        outcome = train(
            task, plan.training, out, seed=plan.seed, device=device, devices=devices,
            validate=validate, show=show, progress=progress,
        )  # fmt: skip
        # Once, after everything is decided; nothing looks at this number again.
        right = accuracy(task.classifier.eval(), data.test, pick_device(device))
        outcome = replace(outcome, test={"accuracy": round(right, 5), "n": len(data.test)})
        about = {"dataset": plan.dataset, "fingerprint": data.train.fingerprint, "outcome": asdict(outcome)}
        assert isinstance(task.classifier, Classifier)
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
        for name, attack in task.judges().items():
            images, labels = held_out.batch(torch.arange(len(held_out)), device)
            x_adv = attack(classifier, images, labels, index=held_out.index, seed=recipe.seed)
            with torch.no_grad():
                figures[name] = float((classes_of(classifier(x_adv)) == labels).float().mean())
        return {"clean": clean, **figures, "score": min(clean, *figures.values())} if figures else {"score": clean}

    return validate


# Defenses -----------------------------------------------------------------------------------------------------------


def defense_task(
    recipe: DefenseRecipe, data: Splits, classifiers: Sequence[nn.Module], device: str = "cpu"
) -> tuple[DefenseTask, Sequence[nn.Module]]:
    """The task that `recipe` describes, with a fresh defense, and the frozen fast copies of the classifiers."""
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
    sampler = Sampler(data.train, recipe.training.batch, recipe.seed, recipe.pairs.augment, where)
    example, _ = data.train.batch(torch.arange(2), where)
    # The layout is given, not probed: a resumed run must draw the same pairs to the last bit.
    twins = [twin(c.to(where), example, channels_last=True) for c in classifiers]
    attacked = [threats.target(t, defense, recipe.pairs.knowledge) for t in twins]
    return DefenseTask(defense, PairSource(sampler, recipe.pairs, attacked, twins)), twins


def begin_with(defense: Defense, folder: str) -> None:
    """Give `defense` the weights of the run in `folder`. A part that the run has not must be zero yet, as a fresh gate
    is: it adds nothing. Raises `RunError` where the networks differ otherwise."""
    fresh = defense.state_dict()
    given = load_defense(folder).state_dict()
    begun = {name: tensor for name, tensor in fresh.items() if name not in given and not tensor.any()}
    try:
        defense.load_state_dict(begun | given)
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
) -> Defense:
    """Train a defense into the run folder `out` (default `runs/RECIPE`); `unperturb.load_defense(out)` rebuilds it.

    A defense that has nothing to learn is judged on validation images and kept with the options of its recipe.

    recipe: a name, a path, or the recipe itself. classifier: one or several to protect, taken in turn (default: the
    recipe's run folders); they are not changed. data: what `load_dataset` returns (default: the recipe's). Returns the
    defense in eval mode; what it cost is in its `outcome`.
    """
    plan: DefenseRecipe = read_recipe(recipe, overrides, "defense") if isinstance(recipe, str) else recipe
    name = Path(recipe).stem if isinstance(recipe, str) else f"{plan.defense.name}-{plan.dataset}"
    out = Path(out or Path("runs") / name)
    data = data or load_dataset(plan.dataset, size=plan.size)
    if classifier is None:
        classifier = [load_classifier(Path(folder)) for folder in plan.classifiers]
    classifiers = [classifier] if isinstance(classifier, nn.Module) else list(classifier)
    task, twins = defense_task(plan, data, classifiers, device)
    plan = decided(plan, task, out, resume)
    with _run_folder(out, plan, resume):
        validate = _defense_validation(plan, data, task, twins, pick_device(device))
        if task.networks():
            outcome = train(
                task, plan.training, out, seed=plan.seed, device=device, devices=devices,
                validate=validate, show=show, progress=progress,
            )  # fmt: skip
        else:
            outcome = _untrained(validate, out)
        _calibrate(task.defense, data.val, twins, plan.seed, pick_device(device))
        about = {"dataset": plan.dataset, "fingerprint": data.train.fingerprint, "outcome": asdict(outcome)}
        save_defense(out, task.defense, about)
    defense = task.defense.eval()
    defense.outcome = outcome
    return defense


def _untrained(validate: Validate, out: Path) -> Outcome:
    """The outcome of a defense that has nothing to learn: what it is worth on validation images, at no cost."""
    figures = {k: round(float(v), 5) for k, v in validate().items()}
    outcome = Outcome(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "float32", "contiguous", 0, figures)
    runs.write_json(out / "training.json", asdict(outcome))
    return outcome


def _held_out(data: ImageSet, most: int | None, seed: int) -> ImageSet:
    return data if most is None else data.subset(min(most, len(data)), seed=seed)


@torch.no_grad()
def _calibrate(defense: Defense, data: ImageSet, twins: Sequence[nn.Module], seed: int, device: torch.device) -> None:
    """Let `defense` set its thresholds on clean validation images, seen in front of each classifier in turn."""
    held_out = _held_out(data, defense.eval().held_out, seed)
    scores = []
    for classifier in twins:
        for rows in torch.arange(len(held_out)).split(250):
            images, _ = held_out.batch(rows, device)
            scores.append(defense.scores(images, classifier))
            if not scores[-1].shape[1]:
                return
    defense.calibrate(torch.cat(scores))


def _defense_validation(
    recipe: DefenseRecipe, data: Splits, task: DefenseTask, twins: Sequence[nn.Module], device: torch.device
) -> Validate:
    """Accuracy behind the defense on validation images, clean and under each attack of the mixture at its hardest,
    averaged over the classifiers; the score is their mean."""
    held_out = _held_out(data.val, task.defense.held_out or VALIDATION_IMAGES, recipe.seed)
    images, labels = held_out.batch(torch.arange(len(held_out)), device)
    mixture = [hardest(t) for t in recipe.pairs.attacks]
    kept: dict[tuple[int, int], Tensor] = {}  # oblivious examples do not change while the defense learns

    def adversarial(turn: int, number: int) -> Tensor:
        if recipe.pairs.knowledge != "oblivious":
            return attacked(turn, number)
        if (turn, number) not in kept:
            kept[turn, number] = attacked(turn, number)
        return kept[turn, number]

    def attacked(turn: int, number: int) -> Tensor:
        name, options = mixture[number]
        return attacks.create(name, **options)(task.pairs.attacked[turn], images, labels, index=held_out.index)

    def validate() -> dict[str, float]:
        defense = task.defense.eval()
        figures: dict[str, list[float]] = {}
        for turn, classifier in enumerate(twins):
            shown = {"clean": images} | {f"{m[0]}-{i}": adversarial(turn, i) for i, m in enumerate(mixture)}
            for name, x in shown.items():
                with torch.no_grad():
                    found = torch.cat([classes_of(classifier(defense.purify(part))) for part in x.split(250)])
                figures.setdefault(name, []).append(float((found == labels).float().mean()))
        means = {k: sum(v) / len(v) for k, v in figures.items()}
        return {**means, "score": sum(means.values()) / len(means)}

    return validate
