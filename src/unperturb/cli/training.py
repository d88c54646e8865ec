"""The verbs that train: train-classifier, train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unperturb.cli.options import (
    Classifiers,
    Device,
    DryRun,
    Mean,
    Out,
    Overrides,
    Resume,
    Size,
    Std,
    Threads,
    Weights,
    own_classifiers,
    tell_missing,
    use_threads,
    with_classifiers,
)
from unperturb.cli.terminal import progress_bar, say, show_recipe


def train_classifier(
    recipe: Annotated[str, typer.Argument(help="A classifier recipe, such as classifier-mnist, or a TOML file.")],
    out: Out = None,
    overrides: Overrides = None,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(min=1, help="How many devices train together.")] = 1,
    threads: Threads = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Train a classifier to protect."""
    from unperturb.data import load_dataset
    from unperturb.recipe_files import read_recipe
    from unperturb.training import jobs

    use_threads(threads)
    resolved = read_recipe(recipe, overrides or [], "classifier")
    stem = Path(recipe).stem  # the bare classifiers share a recipe and are told apart by their names
    out = out or Path("runs") / (
        f"{resolved.dataset}-{resolved.classifier.name}" if stem.startswith("classifier-") else stem
    )
    if dry_run:
        data = load_dataset(**resolved.data_options)
        if tell_missing([resolved.objective.options.get("teacher")], {}):
            show_recipe(resolved)
            say("cost: not counted while the teacher is missing")
            return
        task = jobs.classifier_task(resolved, data, device)
        resolved = jobs.decided(resolved, task, out, say)
        show_recipe(resolved)
        _show_cost(jobs.estimate(task, resolved.training, device))
        return
    with progress_bar("training") as update:
        _, outcome = jobs.train_classifier(
            resolved, out=out, device=device, devices=devices, resume=resume, show=say, progress=update
        )
    _show_outcome(outcome, out)


def train(
    recipe: Annotated[str, typer.Argument(help="A defense recipe, such as protect-mnist, or a TOML file.")],
    out: Out = None,
    overrides: Overrides = None,
    classifier: Classifiers = None,
    weights: Weights = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(min=1, help="How many devices train together.")] = 1,
    threads: Threads = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Train a defense in front of trained classifiers."""
    from unperturb.classifiers import load_classifier
    from unperturb.data import load_dataset
    from unperturb.recipe_files import read_recipe
    from unperturb.training import jobs
    from unperturb.unsaved import stand_ins

    use_threads(threads)
    changes = [*(overrides or []), *([f"size={size}"] if size else [])]
    resolved = with_classifiers(read_recipe(recipe, changes, "defense"), classifier)
    out = out or Path("runs") / Path(recipe).stem
    data = load_dataset(**resolved.data_options)
    own = own_classifiers(resolved, data.train, weights, mean, std)
    if dry_run:
        gone = tell_missing([*resolved.classifiers, resolved.start], own)
        own |= stand_ins([c for c in resolved.classifiers if c not in own], data.train)
        known = [own[c] if c in own else load_classifier(c) for c in resolved.classifiers if c in own or c not in gone]
        if not known:
            show_recipe(resolved)
            say("cost: not counted while no classifier is there")
            return
        start = {"start": None} if resolved.start in gone else {}  # its weights do not change what a step costs
        task = jobs.defense_task(resolved.model_copy(update=start), data, known, device)
        resolved = jobs.decided(resolved, task, out, say)
        show_recipe(resolved)
        _show_cost(jobs.estimate(task, resolved.training, device))
        return
    models = [own[c] if c in own else load_classifier(c) for c in resolved.classifiers] if own else None
    with progress_bar("training") as update:
        defense = jobs.train_defense(
            resolved, models, data, out=out, device=device, devices=devices, resume=resume, show=say, progress=update
        )
    _show_outcome(defense.outcome, out)


def _show_cost(cost: Any) -> None:
    say(
        f"cost: {cost.steps} steps, {cost.pflop:g} PFLOP; a plain convolution reaches {cost.convolution_gflops:g} "
        f"GFLOP/s here, so about {cost.minutes:g} minutes at half of it"
    )


def _show_outcome(outcome: Any, out: Path) -> None:
    validation = ", ".join(f"{k} {100 * v:.2f} %" for k, v in outcome.validation.items())
    cost = (
        f"{outcome.steps} steps in {outcome.seconds:g} s, {outcome.images_per_second:g} images/s, "
        f"{outcome.pflop:g} PFLOP, {outcome.gflops:g} GFLOP/s = {outcome.fraction_of_peak:.0%} of a plain convolution "
        f"({outcome.precision}, {outcome.memory_format})"
    )
    say(
        f"{out}: {cost if outcome.steps else 'nothing to learn'}; validation: {validation}"
        + (f"; test: {100 * outcome.test['accuracy']:.2f} % of {outcome.test['n']}" if outcome.test else "")
    )
