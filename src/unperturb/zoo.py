"""Where a trained thing lies: the zoo's by name, and how to make a run folder that is not there yet."""

from __future__ import annotations

import os
import shlex
from collections.abc import Container
from pathlib import Path

from unperturb.recipe_files import read_recipe, recipe_names
from unperturb.registry import unknown

PREFIX = "zoo:"
VARIABLE = "UNPERTURB_ZOO"  # a folder, for who has no clone
NONE_HERE = (
    "there is no zoo here. Its weights come with the repository and with the source distribution (unperturb-*.tar.gz), "
    "not with the installed package: start inside a clone, or take the folder zoo/ from either and name it in "
    + VARIABLE
)
# By kind, what is written last: where it is, a training is whole.
SAVED = {"classifier": "classifier.json", "defense": "defense.json"}
_PASSED = {
    "classifier": "a classifier, not a purifier: pass it as the model (benchmark, attack), by --classifier (train, "
    "evaluate), or to load_classifier",
    "defense": "a purifier, not a classifier: put it before one, by --defense {name} (benchmark, attack), as one of "
    "the systems of a recipe (evaluate), or in Protected(classifier, load_defense({name!r}))",
}
_VERBS = {"classifier": "train-classifier", "defense": "train"}


def folders() -> dict[str, Path]:
    """The folders of the zoo by name: those in `$UNPERTURB_ZOO`; where it is not set, of the nearest `zoo/` here or
    above, else of the clone that this package is in.

    Empty where there is none: an installed package brings none along. Raises `FileNotFoundError` where the variable
    names a folder without any.
    """
    if named := os.environ.get(VARIABLE):
        if found := _in(Path(named).expanduser()):
            return found
        raise FileNotFoundError(
            f"{VARIABLE} is {named}, where there are no trained models; expected a folder like the repository's zoo/, "
            "which holds a folder for each"
        )
    places = (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[2])
    return next((found for place in places if (found := _in(place / "zoo"))), {})


def _in(zoo: Path) -> dict[str, Path]:
    """The models in this folder, by name."""
    return dict(sorted((f.parent.name, f.parent) for saved in SAVED.values() for f in zoo.glob(f"*/{saved}")))


def find(source: str | Path) -> str | Path:
    """The folder that `zoo:NAME` means; anything else, such as a run folder or `A+B`, as it is.

    Raises `UnknownNameError` for a name that the zoo has not, `FileNotFoundError` where there is no zoo.
    """
    text = str(source)
    if not text.startswith(PREFIX) or "+" in text:
        return source
    there = folders()
    if not there:
        raise FileNotFoundError(f"{text}: {NONE_HERE}")
    name = text.removeprefix(PREFIX)
    if name not in there:
        raise unknown("net of the zoo", name, there)
    return there[name]


def kind_of(folder: str | Path) -> str | None:
    """What a run folder holds, "classifier" or "defense"; None where it holds neither."""
    return next((kind for kind, saved in SAVED.items() if (Path(folder) / saved).exists()), None)


def of_another_kind(source: str | Path, wanted: str) -> str | None:
    """What `source`, `zoo:NAME` or a run folder, is where it is not `wanted` ("classifier" or "defense"), and how that
    is passed; None where it holds neither."""
    kind = "defense" if "+" in str(source) else kind_of(find(source))
    return None if kind in (wanted, None) else f"{source} is {_PASSED[kind].format(name=str(source))}"


def recipe_for(folder: str | Path, families: Container[str]) -> tuple[str, list[str]] | None:
    """The recipe and overrides that make the run folder `folder`, by its name; None where no recipe does.

    families: the classifiers that there are; a bare classifier's folder is called DATASET-FAMILY.
    """
    name = Path(folder).name
    if name in recipe_names():
        return (name, []) if read_recipe(name).kind in _VERBS else None
    for recipe in recipe_names():
        dataset = recipe.removeprefix("classifier-")
        family = name.removeprefix(f"{dataset}-")
        if recipe == dataset or family == name or family not in families:
            continue
        classifier = read_recipe(recipe).classifier
        if family == classifier.name:
            return recipe, []
        # What the recipe sets for its own family, another may not know.
        return recipe, [f'classifier={{name="{family}"}}' if classifier.options else f"classifier.name={family}"]
    return None


def how_to_make(folder: str | Path, families: Container[str], verb: str = "train") -> str:
    """How to come by the run folder `folder`, which is not there: the command that makes it, and the zoo's of its name.

    verb: the command to name where no recipe is known.
    """
    path = Path(folder)
    if path.parent.resolve() in {there.parent.resolve() for there in folders().values()}:
        path = Path("runs") / path.name  # nobody trains into the zoo
    known = recipe_for(path, families)
    if known is None:
        said = f"train one with: unperturb {verb} RECIPE --out {shlex.quote(str(path))}"
    else:
        recipe, overrides = known
        words = ["unperturb", _VERBS[read_recipe(recipe).kind], recipe]
        words += [word for override in overrides for word in ("--set", override)]
        words += [] if path == Path("runs") / path.name else ["--out", str(path)]
        said = f"train one with: {shlex.join(words)}"
    return f"{said}; or take {PREFIX}{path.name}" if path.name in folders() else said


__all__ = [
    "NONE_HERE",
    "PREFIX",
    "VARIABLE",
    "find",
    "folders",
    "how_to_make",
    "kind_of",
    "of_another_kind",
    "recipe_for",
]
