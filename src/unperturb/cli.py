"""The command line: each verb a thin shell over one public function."""

from __future__ import annotations

import contextlib
import io
import shlex
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    name="unperturb",
    help="A learned purifier in front of an image classifier: adversarial noise out, clean images kept, the classifier "
    "untouched.\n\nNew here? Run: unperturb demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
RESUMABLE = ("train", "train-classifier", "evaluate", "attack", "benchmark")
console = Console(highlight=False, soft_wrap=True, emoji=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as training.lr=0.001. Repeatable."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The run folder to write.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads (default: one per core).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the resolved recipe and its cost, then stop.")]
CostOnly = Annotated[
    bool, typer.Option("--dry-run", help="Check model and data, tell what it would cost here, then stop.")
]
Cells = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Only these of the recipe's, by their name in tables. Repeatable."),
]
Number = Annotated[
    int | None, typer.Option("--n", min=1, help="Judge a fixed, named random subset of this many images.")
]
Classifiers = Annotated[
    list[str] | None,
    typer.Option(
        "--classifier",
        metavar="CLASSIFIER",
        help="In place of the recipe's classifiers: a run folder, zoo:NAME, or module:object, a model of your own "
        "(or a function without arguments that gives one), also from the current folder. Repeatable.",
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights of your own model: safetensors, or a saved state_dict.", metavar="FILE")
]
Mean = Annotated[
    str | None, typer.Option(help="What your own model expects to be subtracted, a number a channel: 0.49,0.48,0.45.")
]
Std = Annotated[str | None, typer.Option(help="What it expects to be divided by, likewise.")]
Size = Annotated[int | None, typer.Option(min=1, help="Side of the images that your own model takes, in pixels.")]


def say(text: object = "") -> None:
    """A line for people; what is in it from outside can neither style nor steer the terminal."""
    from unperturb.screen import clean

    console.print(clean(text), markup=False)


def complain(text: object, style: str = "red") -> None:
    """The same on the standard error."""
    from unperturb.screen import clean

    errors.print(clean(text), style=style, markup=False)


def _version(asked: bool) -> None:
    if asked:
        from unperturb import __version__

        say(f"unperturb {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar of one stage, under the lines that are said meanwhile."""
    from unperturb.screen import bar

    with bar(what, console) as update:
        update(0, 0)
        yield update


def _show_recipe(recipe: Any) -> None:
    from unperturb.available import to_toml

    say(to_toml(recipe))


def _threads(threads: int | None) -> None:
    from unperturb.devices import set_threads

    set_threads(threads)


def _numbers(text: str | None, option: str) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}; expected a number a channel, such as 0.49,0.48,0.45") from None


def _own(recipe: Any, data: Any, weights: Path | None, mean: str | None, std: str | None) -> dict[str, Any]:
    """The recipe's classifiers that are a user's own, by their import paths."""
    from unperturb.unsaved import import_classifier, is_import_path

    paths = [c for c in recipe.classifiers if is_import_path(c)]
    given = {"--weights": weights, "--mean": mean, "--std": std}
    asked = [option for option, value in given.items() if value is not None]
    if asked and len(paths) != 1:
        raise ValueError(
            f"{', '.join(asked)} say more of one model of your own; give it with --classifier module:object"
        )
    options: dict[str, Any] = {"weights": weights, "mean": _numbers(mean, "--mean"), "std": _numbers(std, "--std")}
    return {path: import_classifier(path, data, **options) for path in paths}


def _with(recipe: Any, classifiers: Sequence[str] | None) -> Any:
    return recipe.model_copy(update={"classifiers": list(classifiers)}) if classifiers else recipe


def _missing(entries: Sequence[str | None], own: Mapping[str, Any]) -> list[str]:
    """The run folders that a recipe's entries name and that are not there; says how to come by each."""
    from unperturb.classifiers import classifiers
    from unperturb.unsaved import missing
    from unperturb.zoo import how_to_make

    gone = list(dict.fromkeys(f for e in entries if e is not None and e not in own for f in missing(e)))
    for folder in gone:
        say(f"missing: {folder}; {how_to_make(folder, classifiers)}")
    return gone


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the runs and the report go.")] = Path("runs/demo"),
    threads: Threads = None,
) -> None:
    """The main job on real handwritten digits: train, attack, purify, report. Two to three minutes, no download."""
    from unperturb.demo import run_demo

    _threads(threads)
    result = run_demo(out, bar=_bar, show=say)
    say(result.table)
    say(f"\nThe report: {result.page}\nThe figures: {result.figures}")


@app.command(name="list")
def list_things(
    what: Annotated[
        str | None, typer.Argument(help="datasets, classifiers, attacks, defenses, knowledge, zoo or recipes.")
    ] = None,
) -> None:
    """What there is by name: data sets, classifiers, attacks, defenses, kinds of knowledge, the zoo, recipes."""
    from unperturb.available import list_available
    from unperturb.registry import unknown
    from unperturb.screen import width

    found = list_available()
    if what is not None and what not in found:
        raise unknown("thing to list", what, found)
    for kind, names in found.items():
        if what in (None, kind):
            say(kind)
            column = max((len(name) for name in names), default=0) + 4
            # Whole lines where a program reads them.
            room = max(width() - column, 24) if console.is_terminal else 10_000
            for name, line in names.items():
                wrapped = _lines(line, room) or [""]
                say(f"  {name}".ljust(column) + f"\n{' ' * column}".join(wrapped))


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A recipe by name (see: list recipes), or a TOML file.")],
    overrides: Overrides = None,
) -> None:
    """Print a recipe whole, with what it is for and what it needs: a file to begin your own with."""
    from unperturb.available import VERBS, describe, to_toml
    from unperturb.recipe_files import read_recipe
    from unperturb.screen import width

    resolved = read_recipe(recipe, overrides or [])
    for line in _lines(describe(recipe), min(width(), 120) - 2):
        say(f"# {line}")
    say(to_toml(resolved, recipe, overrides or []))
    part = getattr(resolved, "evaluation", resolved)
    say(f"# Run it: unperturb {VERBS[resolved.kind]}" + ("" if resolved.kind == "demo" else f" {recipe}"))
    say(f"# It needs the data set {part.dataset}: unperturb prepare {part.dataset}")
    if resolved.kind != "demo":  # which makes its own
        for line in _needs(resolved):
            say(f"# {line}")


def _lines(text: str, room: int) -> list[str]:
    """`text` on lines of `room` columns; a name stays whole, with its hyphens."""
    return textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False)


def _needs(recipe: Any) -> list[str]:
    """A line on each run folder that a recipe names: there, or how to come by it."""
    from unperturb.classifiers import classifiers
    from unperturb.unsaved import missing
    from unperturb.zoo import how_to_make

    entries = [*getattr(recipe, "classifiers", []), *getattr(recipe, "systems", [])]
    entries += [getattr(recipe, key, None) for key in ("surrogate", "surrogate_defense", "start")]
    entries.append(recipe.objective.options.get("teacher") if recipe.kind == "classifier" else None)
    lines = []
    for entry in dict.fromkeys(e for e in entries if e and e != "undefended"):
        gone = missing(entry)
        lines += [f"missing: {f}; {how_to_make(f, classifiers)}" for f in gone] or [f"there: {entry}"]
    return lines


@app.command()
def prepare(
    name: Annotated[
        str, typer.Argument(help="A data set: mnist, cifar10, folder:PATH, hub:NAME, ... (see: list datasets)")
    ],
    out: Out = None,
    size: Annotated[int | None, typer.Option(help="Side that pictures are resized to.")] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out pictures and rows that cannot be used.")
    ] = False,
) -> None:
    """Download or convert a data set, verify its counts, print its fingerprint and save a contact sheet."""
    from unperturb.data import prepare as run

    with _bar("preparing") as update:
        done = run(name, out=out, size=size, skip_damaged=skip_damaged, progress=update)
    say(done)


@app.command()
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

    _threads(threads)
    resolved = read_recipe(recipe, overrides or [], "classifier")
    stem = Path(recipe).stem  # the bare classifiers share a recipe and are told apart by their names
    out = out or Path("runs") / (
        f"{resolved.dataset}-{resolved.classifier.name}" if stem.startswith("classifier-") else stem
    )
    if dry_run:
        data = load_dataset(**resolved.data_options)
        if _missing([resolved.objective.options.get("teacher")], {}):
            _show_recipe(resolved)
            say("cost: not counted while the teacher is missing")
            return
        task = jobs.classifier_task(resolved, data, device)
        resolved = jobs.decided(resolved, task, out, say)
        _show_recipe(resolved)
        _show_cost(jobs.estimate(task, resolved.training, device))
        return
    with _bar("training") as update:
        _, outcome = jobs.train_classifier(
            resolved, out=out, device=device, devices=devices, resume=resume, show=say, progress=update
        )
    _show_outcome(outcome, out)


@app.command()
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

    _threads(threads)
    changes = [*(overrides or []), *([f"size={size}"] if size else [])]
    resolved = _with(read_recipe(recipe, changes, "defense"), classifier)
    out = out or Path("runs") / Path(recipe).stem
    data = load_dataset(**resolved.data_options)
    own = _own(resolved, data.train, weights, mean, std)
    if dry_run:
        gone = _missing([*resolved.classifiers, resolved.start], own)
        own |= stand_ins([c for c in resolved.classifiers if c not in own], data.train)
        known = [own[c] if c in own else load_classifier(c) for c in resolved.classifiers if c in own or c not in gone]
        if not known:
            _show_recipe(resolved)
            say("cost: not counted while no classifier is there")
            return
        start = {"start": None} if resolved.start in gone else {}  # its weights do not change what a step costs
        task = jobs.defense_task(resolved.model_copy(update=start), data, known, device)
        resolved = jobs.decided(resolved, task, out, say)
        _show_recipe(resolved)
        _show_cost(jobs.estimate(task, resolved.training, device))
        return
    models = [own[c] if c in own else load_classifier(c) for c in resolved.classifiers] if own else None
    with _bar("training") as update:
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


@app.command()
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

    _threads(threads)
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
    with _bar("attacking") as update:
        done = run_plan(plan, out, device=device, resume=resume, progress=update)
    say(
        f"{out}: {len(done.images)} images by {made!r}. The system is right about {done.right_before} of them, and "
        f"about {done.right_after} as they are in the pictures. A line on each: {out / MANIFEST}"
    )


@app.command()
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
    threads: Threads = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Attack undefended and protected models as each attacker would; keep a row per image."""
    from unperturb.data import load_dataset
    from unperturb.evaluation.plan import estimate, plan_of
    from unperturb.evaluation.run import only, run_evaluation
    from unperturb.evaluation.surrogates import is_retrain
    from unperturb.recipe_files import read_recipe
    from unperturb.results.render import table
    from unperturb.unsaved import stand_ins

    _threads(threads)
    changes = [
        *(overrides or []),
        *(f"{k}={v}" for k, v in {"n": n, "eot_samples": eot_samples, "size": size}.items() if v),
    ]
    cells = [system or [], attack or [], knowledge or []]
    resolved = only(_with(read_recipe(recipe, changes, "evaluation"), classifier), *cells)
    out = out or Path("runs") / "-".join([Path(recipe).stem, *(name for part in cells for name in part)])
    data = load_dataset(**resolved.data_options)
    own = _own(resolved, data.train, weights, mean, std)
    if dry_run:
        named = [*resolved.classifiers, resolved.surrogate, resolved.surrogate_defense, *resolved.systems]
        entries = [entry for entry in named if entry is not None]
        gone = _missing(entries, own)
        own |= stand_ins([e for e in entries if e not in own], data.train)
        _show_recipe(resolved)
        if unknown := [e for e in entries if e in gone and e not in own]:
            say(f"cost: not counted while {', '.join(unknown)} is missing")
            return
        cost = estimate(plan_of(resolved, device, own))
        say(f"cost: {cost.cells} cells of {cost.images} images, {cost}")
        return
    if is_retrain(resolved.surrogate_defense):
        say(f"cost: {estimate(plan_of(resolved, device, own))}")
    with _bar("evaluating") as update:
        rows = run_evaluation(resolved, out, device=device, resume=resume, models=own, progress=update)
    say(table(rows))
    say(f"\nrows: {out}. Tables, figures and a page: unperturb report {shlex.quote(str(out))}")


@app.command()
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
    from unperturb.evaluation.plan import estimate

    _threads(threads)
    images = getattr(load_dataset(data, size=size), split)
    own: dict[str, Any] = {"weights": weights, "mean": _numbers(mean, "--mean"), "std": _numbers(std, "--std")}
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
    with _bar("attacking") as update:
        found = run_benchmark(judged, images, out=out, resume=resume, progress=update, **options)
    say(found)
    say(f"\nthe card: {found.write_card(out / 'card')['html']}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A purifier or a classifier: a run folder, zoo:NAME, or module:object.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.onnx", help="The file to write.")],
    classifier: Annotated[
        str | None, typer.Option(help="What stands behind the purifier; the file then answers with logits.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images to compare on (default: the data it was trained on).")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side that pictures are resized to.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many test images are compared.")] = 64,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit convolutions, ranged on training images.")] = False,
    threads: Threads = None,
) -> None:
    """Write an ONNX file of a purifier, alone or before its classifier, compared with torch image by image."""
    from unperturb.export import export_named

    _threads(threads)
    say(export_named(model, out, classifier=classifier, data=data, size=size, n=n, int8=int8))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run folder of an evaluation or a benchmark.")],
    second: Annotated[Path, typer.Argument(help="Another, or the same.")],
    system: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The system of both runs to compare; given twice, that of each."),
    ] = None,
) -> None:
    """Two runs side by side on the same images, with McNemar's exact test."""
    from unperturb.results import Results
    from unperturb.results.render import compare_pair

    names = system or []
    if len(names) > 2:
        raise ValueError(f"--system names one system of both runs or one of each, not {len(names)}")
    one, other = Results.read(first), Results.read(second)
    if names:
        one, other = one.where(system=names[0]), other.where(system=names[-1])
    say(compare_pair(one, other))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of evaluations.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("report"),
    title: Annotated[str | None, typer.Option(help="The page's heading.")] = None,
    note: Annotated[str | None, typer.Option(help="What the page says below its heading.")] = None,
) -> None:
    """Remake every table, figure and the page from rows and samples alone."""
    from unperturb.results import Results, compare, table
    from unperturb.results.page import write_report

    with _bar("writing tables, figures and the page"):
        results = Results.read(*runs)
        written = write_report(results, out, title=title, note=note)
    say(table(results))
    if any(len(systems) > 2 for systems in results.systems.values()):
        say(compare(results))
    parts = [name.partition("/")[0] for name in written]
    say(
        f"\nwrote {written['page']}, with {parts.count('figures')} figures and {parts.count('tables')} tables beside it"
    )


@app.command()
def reproduce(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART]...", help="mnist, table1-mnist, figure1, ...: see docs/reproduce.md. Default: all."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where tables, figures and pages go.")] = Path(
        "report/paper"
    ),
    n: Number = None,
    device: Device = "auto",
    threads: Threads = None,
    dry_run: DryRun = False,
) -> None:
    """Make the paper's tables and figures; train and evaluate what they lack. Stopped, it goes on where it was."""
    from unperturb.paper.reproduce import Plan
    from unperturb.paper.reproduce import reproduce as run

    _threads(threads)
    if dry_run:
        for line in Plan.of(parts or [], n).told(device):
            say(line)
        return
    done = run(parts or [], out=out, n=n, device=device, show=say, bar=_bar)
    say(f"\nthe index: {done.page}")
    if done.failed:
        raise ValueError(f"not everything could be made; failed: {', '.join(done.failed)}. Called again, it goes on")


@app.command()
def cache(
    kinds: Annotated[list[str] | None, typer.Argument(help="data, hub, adversarials (default: all).")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
) -> None:
    """How much the cache ($UNPERTURB_CACHE, or ~/.cache/unperturb) holds of what, and a way to clear it."""
    from unperturb.cache import KINDS, cache_contents, clear_cache
    from unperturb.registry import unknown

    for kind in kinds or ():
        if kind not in KINDS:
            raise unknown("kind of cache", kind, KINDS)
    found = [kept for kept in cache_contents() if kept.kind in (kinds or KINDS)]
    for kept in found:
        say(f"{kept.kind:<13} {kept.size / 1e6:>9,.1f} MB  {kept.files:>6,} files  {kept.folder}  ({kept.what})")
    total = sum(kept.size for kept in found)
    say(f"{'in all':<13} {total / 1e6:>9,.1f} MB")
    if not clear:
        return
    if not yes and not sys.stdin.isatty():
        raise ValueError("nothing was deleted: there is nobody here to ask; say --yes")
    if not yes and not typer.confirm("Delete these? Runs and reports are not among them."):
        say("nothing was deleted")
        return
    clear_cache(kept.kind for kept in found)
    say(f"freed {total / 1e6:,.1f} MB")


def _again() -> str:
    """The command that goes on where this one stopped."""
    again = " ".join(shlex.quote(a) for a in ["unperturb", *sys.argv[1:]])
    goes_on = sys.argv[1:2] and sys.argv[1] in RESUMABLE and "--resume" not in sys.argv
    return f"{again} --resume" if goes_on else again


def main() -> None:
    """Run the command line; a user's mistake is answered in a sentence, not in a traceback.

    Exit codes: 0 done; 2 a mistake, or a machine that has no room, said in a sentence; 130 stopped by Ctrl-C and 143 by
    SIGTERM, with how to go on; 1 a fault of the program, with its traceback.
    """
    from unperturb.mistakes import ModelError, interrupted, sentence

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a letter shows its number
            stream.reconfigure(errors="backslashreplace")
    terminated = False
    told: set[str] = set()

    def tell(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in told:  # data that is read twice says the same twice
            told.add(str(message))
            complain(f"note: {message}", style="yellow")

    show_warning, warnings.showwarning = warnings.showwarning, tell

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError):  # in a thread of another program signals are that program's
        signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(prog_name="unperturb", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if interrupted(error):
            code = 130
        elif hasattr(error, "show"):  # a wrong verb or option, in the words of the parser
            where = context.command_path if (context := getattr(error, "ctx", None)) else "unperturb"
            complain(f"error: {error.format_message()} See: {where} --help")  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        elif said := sentence(error):
            goes_on = f". What was finished is kept; go on with: {_again()}" if isinstance(error, ModelError) else ""
            complain(f"error: {said}{goes_on}")
            raise SystemExit(2) from None
        else:
            raise
    finally:
        warnings.showwarning = show_warning
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)
    if code == 130:
        complain(f"\nstopped. Go on with: {_again()}", style="")
    raise SystemExit(143 if code == 130 and terminated else code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
