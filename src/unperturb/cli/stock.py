"""The verbs that show what there is, or fetch it: demo, list, show, prepare, cache."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from unperturb.cli.options import Out, Overrides, Threads, use_threads
from unperturb.cli.terminal import console, progress_bar, say


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the runs and the report go.")] = Path("runs/demo"),
    threads: Threads = None,
) -> None:
    """The main job on real handwritten digits: train, attack, purify, report. Two to three minutes, no download."""
    from unperturb.demo import run_demo

    use_threads(threads)
    result = run_demo(out, bar=progress_bar, show=say)
    say(result.table)
    say(f"\nThe report: {result.page}\nThe figures: {result.figures}")


def list_things(
    what: Annotated[
        str | None, typer.Argument(help="datasets, classifiers, attacks, defenses, knowledge, zoo or recipes.")
    ] = None,
) -> None:
    """What there is by name: data sets, classifiers, attacks, defenses, kinds of knowledge, the zoo, recipes."""
    from unperturb.available import list_available
    from unperturb.registry import unknown
    from unperturb.screen import width
    from unperturb.zoo import NONE_HERE

    found = list_available()
    if what is not None and what not in found:
        raise unknown("thing to list", what, found)
    for kind, names in found.items():
        if what in (None, kind):
            say(kind if names else f"{kind}: {NONE_HERE}")  # the zoo alone may be empty
            column = max((len(name) for name in names), default=0) + 4
            # Whole lines where a program reads them.
            room = max(width() - column, 24) if console.is_terminal else 10_000
            for name, line in names.items():
                wrapped = _lines(line, room) or [""]
                say(f"  {name}".ljust(column) + f"\n{' ' * column}".join(wrapped))


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
    from unperturb.evaluation.surrogates import is_retrain
    from unperturb.unsaved import missing
    from unperturb.zoo import how_to_make

    entries = [*getattr(recipe, "classifiers", []), *getattr(recipe, "systems", [])]
    entries += [getattr(recipe, key, None) for key in ("surrogate", "surrogate_defense", "start")]
    entries = [e for e in entries if not is_retrain(e)]  # no folder: the attacker trains it in the run
    entries.append(recipe.objective.options.get("teacher") if recipe.kind == "classifier" else None)
    lines = []
    for entry in dict.fromkeys(e for e in entries if e and e != "undefended"):
        gone = missing(entry)
        lines += [f"missing: {f}; {how_to_make(f, classifiers)}" for f in gone] or [f"there: {entry}"]
    return lines


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

    with progress_bar("preparing") as update:
        done = run(name, out=out, size=size, skip_damaged=skip_damaged, progress=update)
    say(done)


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
