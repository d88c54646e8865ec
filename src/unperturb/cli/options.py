"""Options that several verbs have, and what is made of their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from unperturb.cli.terminal import say

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


def use_threads(threads: int | None) -> None:
    from unperturb.devices import set_threads

    set_threads(threads)


def numbers(text: str | None, option: str) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}; expected a number a channel, such as 0.49,0.48,0.45") from None


def own_classifiers(recipe: Any, data: Any, weights: Path | None, mean: str | None, std: str | None) -> dict[str, Any]:
    """The recipe's classifiers that are a user's own, by their import paths."""
    from unperturb.unsaved import import_classifier, is_import_path

    paths = [c for c in recipe.classifiers if is_import_path(c)]
    given = {"--weights": weights, "--mean": mean, "--std": std}
    asked = [option for option, value in given.items() if value is not None]
    if asked and len(paths) != 1:
        raise ValueError(
            f"{', '.join(asked)} say more of one model of your own; give it with --classifier module:object"
        )
    options: dict[str, Any] = {"weights": weights, "mean": numbers(mean, "--mean"), "std": numbers(std, "--std")}
    return {path: import_classifier(path, data, **options) for path in paths}


def with_classifiers(recipe: Any, classifiers: Sequence[str] | None) -> Any:
    return recipe.model_copy(update={"classifiers": list(classifiers)}) if classifiers else recipe


def tell_missing(entries: Sequence[str | None], own: Mapping[str, Any]) -> list[str]:
    """The run folders that a recipe's entries name and that are not there; says how to come by each."""
    from unperturb.classifiers import classifiers
    from unperturb.unsaved import missing
    from unperturb.zoo import how_to_make

    gone = list(dict.fromkeys(f for e in entries if e is not None and e not in own for f in missing(e)))
    for folder in gone:
        say(f"missing: {folder}; {how_to_make(folder, classifiers)}")
    return gone
