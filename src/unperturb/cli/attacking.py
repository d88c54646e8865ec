"""The verbs that attack: attack, evaluate, benchmark."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from unperturb.cli.options import (
    Cells,
    Classifiers,
    CostOnly,
    Device,
    DryRun,
    Mean,
    Number,
    Out,
    Overrides,
    Resume,
    Size,
    Std,
    Threads,
    Weights,
    numbers,
    own_classifiers,
    tell_missing,
    use_threads,
    with_classifiers,
)
from unperturb.cli.terminal import progress_bar, say, show_recipe


def attack(
    model: Annotated[str, typer.Argument(help="A classifier: a run folder, zoo:NAME, or module:object.")],
    data: Annotated[str, typer.Option(help="A data set: digits, mnist, folder:PATH, ... (see: list datasets)")],
    attack: Annotated[str, typer.Option(help="An attack by name (see: list attacks).")] = "pgd",
    eps: Annotated[str | None, typer.Option(help="The attack's budget: a number or a fraction, such as 8/255.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the attack, such as steps=40. Repeatable."),
    ] = None,
    defense: Annotated[str | None, typer.Option(help="A purifier before it: a run folder, zoo:NAME or a name.")] = None,
    knowledge: Annotated[str, typer.Option(help="white_box, bpda, black_box, or oblivious.")] = "white_box",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    size: Annotated[int | None, typer.Option(min=1, help="Side that pictures are resized to.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="A fixed, named random subset of this many.")] = None,
    seed: Annotated[int, typer.Option(help="Of the attack's random draws.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="How many images are attacked at once.")] = 100,
    out: Out = None,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
    dry_run: CostOnly = False,
) -> None:
    """Write adversarial images as a folder of 8-bit PNGs, each judged once more as it is read back."""
    from unperturb.attack_folder import attack_from, plan_attack_images, run_plan
    from unperturb.manifest import MANIFEST

    use_threads(threads)
    made = attack_from(attack, eps, settings or [])
    choices: dict[str, Any] = {"split": split, "size": size, "n": n, "seed": seed, "batch": batch}
    plan = plan_attack_images(model, data, made, defense=defense, knowledge=knowledge, **choices)
    out = out or Path("runs") / f"{attack}-{Path(model).name.replace(':', '-')}"
    if dry_run:
        for key, value in plan.settings().items():
            say(f"{key} = {value}")
        pflop, minutes = plan.cost(device)
        say(f"cost: {len(plan.data)} images, at most {pflop:g} PFLOP, about {minutes:g} minutes; they go to {out}")
        return
    with progress_bar("attacking") as update:
        done = run_plan(plan, out, device=device, resume=resume, progress=update)
    say(
        f"{out}: {len(done.images)} images by {made!r}. The system is right about {done.right_before} of them, and "
        f"about {done.right_after} as they are in the pictures. A line on each: {out / MANIFEST}"
    )


def evaluate(
    recipe: Annotated[str, typer.Argument(help="An evaluation recipe, such as white_box-mnist, or a TOML file.")],
    out: Out = None,
    overrides: Overrides = None,
    n: Number = None,
    eot_samples: Annotated[
        int | None, typer.Option(min=1, help="Draws that the gradient of a random defense is averaged over.")
    ] = None,
    classifier: Classifiers = None,
    weights: Weights = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    system: Cells = None,
    attack: Cells = None,
    knowledge: Cells = None,
    device: Device = "auto",
    engine: Annotated[
        str, typer.Option(help="local: this process; ray: all cores and GPUs here, or of a cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster, such as auto or ray://HOST:10001; $RAY_ADDRESS is one too.")
    ] = None,
    threads: Threads = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Attack undefended and protected models as each attacker would; keep a row per image."""
    from unperturb.data import load_dataset
    from unperturb.evaluation.costs import estimate
    from unperturb.evaluation.engine import Ray
    from unperturb.evaluation.plan import plan_of
    from unperturb.evaluation.run import only, run_evaluation
    from unperturb.evaluation.surrogates import is_retrain
    from unperturb.recipe_files import read_recipe
    from unperturb.results.render import table
    from unperturb.unsaved import stand_ins

    use_threads(threads)
    if address is not None and engine != "ray":
        raise ValueError("--address names a Ray cluster: add --engine ray")
    where: Any = Ray(address=address, threads=threads or 1) if engine == "ray" else engine
    changes = [
        *(overrides or []),
        *(f"{k}={v}" for k, v in {"n": n, "eot_samples": eot_samples, "size": size}.items() if v),
    ]
    cells = [system or [], attack or [], knowledge or []]
    resolved = only(with_classifiers(read_recipe(recipe, changes, "evaluation"), classifier), *cells)
    out = out or Path("runs") / "-".join([Path(recipe).stem, *(name for part in cells for name in part)])
    data = load_dataset(**resolved.data_options)
    own = own_classifiers(resolved, data.train, weights, mean, std)
    if dry_run:
        named = [*resolved.classifiers, resolved.surrogate, resolved.surrogate_defense, *resolved.systems]
        entries = [entry for entry in named if entry is not None]
        gone = tell_missing(entries, own)
        own |= stand_ins([e for e in entries if e not in own], data.train)
        show_recipe(resolved)
        if unknown := [e for e in entries if e in gone and e not in own]:
            say(f"cost: not counted while {', '.join(unknown)} is missing")
            return
        cost = estimate(plan_of(resolved, device, own))
        say(f"cost: {cost.cells} cells of {cost.images} images, {cost}")
        return
    if is_retrain(resolved.surrogate_defense):
        say(f"cost: {estimate(plan_of(resolved, device, own))}")
    with progress_bar("evaluating") as update:
        rows = run_evaluation(resolved, out, device=device, engine=where, resume=resume, models=own, progress=update)
    say(table(rows))
    say(f"\nrows: {out}. Tables, figures and a page: unperturb report {shlex.quote(str(out))}")


def benchmark(
    model: Annotated[str, typer.Argument(help="A run folder, zoo:NAME, net.onnx, or module:object.")],
    data: Annotated[str, typer.Option(help="A data set: digits, mnist, folder:PATH, ... (see: list datasets)")],
    eps: Annotated[str, typer.Option(help="Every attacker's budget: a number or a fraction.")] = "8/255",
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    budget: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "standard",
    n: Annotated[int | None, typer.Option("--n", min=1, help="A fixed random subset (default: 1,000).")] = None,
    defense: Annotated[str | None, typer.Option(help="A purifier before it: a run folder, zoo:NAME or a name.")] = None,
    base: Annotated[str | None, typer.Option(help="The undefended classifier that MODEL stands in place of.")] = None,
    surrogate: Annotated[str | None, typer.Option(help="Another classifier, for transfer.")] = None,
    surrogate_defense: Annotated[str | None, typer.Option(help="The attacker's purifier, or retrain[:STEPS].")] = None,
    name: Annotated[str, typer.Option(help="What the card calls it.")] = "model",
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    weights: Weights = None,
    mean: Mean = None,
    std: Std = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side that pictures are resized to.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="How often each image is shown to a random model.")] = 10,
    out: Out = None,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
    dry_run: CostOnly = False,
) -> None:
    """Send the ladder of attackers against one model: its robust accuracy, the doubts about it, and a card."""
    from unperturb.benchmarking import benchmark as run_benchmark
    from unperturb.benchmarking import benchmark_plan, model_from
    from unperturb.data import load_dataset
    from unperturb.evaluation.costs import estimate

    use_threads(threads)
    images = getattr(load_dataset(data, size=size), split)
    own: dict[str, Any] = {"weights": weights, "mean": numbers(mean, "--mean"), "std": numbers(std, "--std")}
    judged = model_from(model, images, defense=defense, **own)
    options: Any = {
        "norm": norm,
        "eps": eps,
        "budget": budget,
        "n": n,
        "name": name,
        "draws": draws,
        "device": device,
        "base": None if base is None else model_from(base, images),
        "surrogate": None if surrogate is None else model_from(surrogate, images),
        "surrogate_defense": surrogate_defense,
    }
    called = name if name != "model" else Path(model).name.replace(":", "-")
    out = out or Path("runs") / f"benchmark-{called}"
    cost = estimate(benchmark_plan(judged, images, **options))
    say(f"{cost.images:,} images, {cost.cells} cells, {cost}")
    if dry_run:
        return
    with progress_bar("attacking") as update:
        found = run_benchmark(judged, images, out=out, resume=resume, progress=update, **options)
    say(found)
    say(f"\nthe card: {found.write_card(out / 'card')['html']}")
