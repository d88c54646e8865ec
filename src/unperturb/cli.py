"""The command line: each verb a thin shell over one public function."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
RESUMABLE = ("train", "train-classifier", "evaluate")
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

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
Cells = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Only these of the recipe's, by their name in tables. Repeatable."),
]
Number = Annotated[
    int | None, typer.Option("--n", min=1, help="Judge a fixed, named random subset of this many images.")
]


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar with time left; calls take (done, total) and an optional text."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int, text: str = "") -> None:
            progress.update(task, completed=done, total=total, description=f"{what}  {text}".rstrip())

        yield update


def _show_recipe(recipe: Any) -> None:
    from unperturb.config import snapshot

    console.print_json(json.dumps(snapshot(recipe)), indent=2)


def _threads(threads: int | None) -> None:
    from unperturb.devices import set_threads

    set_threads(threads)


def _log_line(line: str) -> None:
    console.print(line, markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the runs and the report go.")] = Path("runs/demo"),
    threads: Threads = None,
) -> None:
    """The main job on real handwritten digits: train, attack, purify, report. Two to three minutes, no download."""
    from unperturb.demo import run_demo

    _threads(threads)
    with _bar("demo") as update:
        result = run_demo(out, progress=update, show=lambda text: console.print(text, markup=False))
    console.print(result.table, markup=False)
    console.print(f"\nThe report: {result.page}\nThe figures: {result.figures}", markup=False)


@app.command(name="list")
def list_things(
    what: Annotated[
        str | None, typer.Argument(help="datasets, classifiers, attacks, defenses, recipes or knowledge.")
    ] = None,
) -> None:
    """What there is by name: data sets, classifiers, attacks, defenses, recipes, kinds of knowledge."""
    from unperturb.catalog import catalog
    from unperturb.registry import unknown

    found = catalog()
    if what is not None and what not in found:
        raise unknown("thing to list", what, found)
    for kind, names in found.items():
        if what in (None, kind):
            console.print(f"[bold]{kind}[/bold]")
            for name, line in names.items():
                console.print(f"  {name:<24} {line}", markup=False)


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
    console.print(str(done), markup=False)  # rich would take the record apart


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
    from unperturb.config import read_recipe
    from unperturb.data import load_dataset
    from unperturb.training import jobs

    _threads(threads)
    resolved = read_recipe(recipe, overrides or [], "classifier")
    stem = Path(recipe).stem  # the bare classifiers share a recipe and are told apart by their names
    out = out or Path("runs") / (
        f"{resolved.dataset}-{resolved.classifier.name}" if stem.startswith("classifier-") else stem
    )
    if dry_run:
        task = jobs.classifier_task(resolved, load_dataset(resolved.dataset, size=resolved.size), device)
        resolved = jobs.decided(resolved, task, out)
        _show_recipe(resolved)
        _show_cost(jobs.estimate(task, resolved.training, device))
        return
    with _bar("training") as update:
        _, outcome = jobs.train_classifier(
            resolved, out=out, device=device, devices=devices, resume=resume, show=_log_line, progress=update
        )
    _show_outcome(outcome, out)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A defense recipe, such as protect-mnist, or a TOML file.")],
    out: Out = None,
    overrides: Overrides = None,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(min=1, help="How many devices train together.")] = 1,
    threads: Threads = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Train a defense in front of trained classifiers."""
    from unperturb.classifiers import load_classifier
    from unperturb.config import read_recipe
    from unperturb.data import load_dataset
    from unperturb.training import jobs

    _threads(threads)
    resolved = read_recipe(recipe, overrides or [], "defense")
    out = out or Path("runs") / Path(recipe).stem
    if dry_run:
        classifiers = [load_classifier(c) for c in resolved.classifiers]
        data = load_dataset(resolved.dataset, size=resolved.size)
        task, _ = jobs.defense_task(resolved, data, classifiers, device)
        resolved = jobs.decided(resolved, task, out)
        _show_recipe(resolved)
        _show_cost(jobs.estimate(task, resolved.training, device))
        return
    with _bar("training") as update:
        defense = jobs.train_defense(
            resolved, out=out, device=device, devices=devices, resume=resume, show=_log_line, progress=update
        )
    _show_outcome(defense.outcome, out)


def _show_cost(cost: Any) -> None:
    console.print(
        f"cost: {cost.steps} steps, {cost.pflop:g} PFLOP; a plain convolution reaches {cost.convolution_gflops:g} "
        f"GFLOP/s here, so about {cost.minutes:g} minutes at half of it"
    )


def _show_outcome(outcome: Any, out: Path) -> None:
    validation = ", ".join(f"{k} {100 * v:.2f} %" for k, v in outcome.validation.items())
    cost = (
        f"{outcome.steps} steps in {outcome.seconds:g} s, {outcome.images_per_second:g} images/s, "
        f"{outcome.pflop:g} PFLOP, {outcome.gflops:g} GFLOP/s = {outcome.share:.0%} of a plain convolution "
        f"({outcome.precision}, {outcome.memory_format})"
    )
    console.print(
        f"{out}: {cost if outcome.steps else 'nothing to learn'}; validation: {validation}"
        + (f"; test: {100 * outcome.test['accuracy']:.2f} % of {outcome.test['n']}" if outcome.test else ""),
        markup=False,
    )


@app.command()
def evaluate(
    recipe: Annotated[str, typer.Argument(help="An evaluation recipe, such as white_box-mnist, or a TOML file.")],
    out: Out = None,
    overrides: Overrides = None,
    n: Number = None,
    defense: Cells = None,
    attack: Cells = None,
    knowledge: Cells = None,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Attack bare and protected models as each attacker would; keep a row per image."""
    from unperturb.config import read_recipe
    from unperturb.evaluation import jobs
    from unperturb.report import table

    _threads(threads)
    changes = [*(overrides or []), *([f"n={n}"] if n else [])]
    cells = [defense or [], attack or [], knowledge or []]
    resolved = jobs.only(read_recipe(recipe, changes, "evaluation"), *cells)
    out = out or Path("runs") / "-".join([Path(recipe).stem, *(name for part in cells for name in part)])
    if dry_run:
        _show_recipe(resolved)
        cost = jobs.estimate(jobs.grid_of(resolved, device))
        console.print(
            f"cost: {cost.cells} cells of {cost.images} images, at most {cost.pflop:g} PFLOP, "
            f"about {cost.minutes:g} minutes"
        )
        return
    with _bar("evaluating") as update:
        rows = jobs.run_evaluation(resolved, out, device=device, resume=resume, progress=update)
    console.print(table(rows), markup=False)
    console.print(f"\nrows: {out}. Tables, figures and a page: unperturb report {out}", markup=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of evaluations.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("report"),
    title: Annotated[str | None, typer.Option(help="The page's heading.")] = None,
    note: Annotated[str | None, typer.Option(help="What the page says below its heading.")] = None,
) -> None:
    """Remake every table, figure and the page from rows and samples alone."""
    from unperturb.report import compare, table, write_report
    from unperturb.runs import read_rows

    written = write_report(list(runs), out, title=title, note=note)
    rows = read_rows(*runs)
    console.print(table(rows), markup=False)
    if rows["defense"].nunique() > 2:
        console.print(compare(rows), markup=False)
    parts = [name.partition("/")[0] for name in written]
    console.print(
        f"\nwrote {written['page']}, with {parts.count('figures')} figures and {parts.count('tables')} tables beside "
        "it",
        markup=False,
    )


def main() -> None:
    """Run the command line; a user's mistake is answered in a sentence, not in a traceback."""
    with contextlib.suppress(ValueError):  # in a thread of another program signals are that program's
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop by `kill` ends as one by Ctrl-C does
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if _interrupted(error):
            code = 130
        elif hasattr(error, "show"):  # a wrong verb or option, in the words of the parser
            error.show()
            raise SystemExit(2) from None
        elif isinstance(error, ValueError | TypeError | OSError | RuntimeError) and _is_ours(error):
            errors.print(f"error: {error}", style="red", markup=False)
            raise SystemExit(2) from None
        else:
            raise
    if code == 130:
        again = " ".join(shlex.quote(a) for a in ["unperturb", *sys.argv[1:]])
        if sys.argv[1:2] and sys.argv[1] in RESUMABLE and "--resume" not in sys.argv:
            again += " --resume"
        errors.print(f"\nstopped. Go on with: {again}", markup=False)
    raise SystemExit(code if isinstance(code, int) else 0)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C began it: torch, stopped while it writes a checkpoint, ends in an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_ours(error: BaseException) -> bool:
    """Whether the program itself raised it: what a library raises unasked is a bug and keeps its traceback."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and "unperturb" in Path(traceback.tb_frame.f_code.co_filename).parts


if __name__ == "__main__":
    main()
