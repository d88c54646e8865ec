"""The files that recipes lie in: found by name or path, put over their bases, overridden by key, and read."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from unperturb.config import RecipeError, long_form, resolve
from unperturb.registry import unknown


def recipe_names() -> list[str]:
    """The recipes that come with the program."""
    folder = resources.files("unperturb") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """The TOML of the recipe called `name`, or at that path, comments and all; raises `RecipeError`."""
    path = Path(name)
    if path.suffix == ".toml":
        if not os.path.isfile(path):  # which also takes names that no file can have
            raise RecipeError(f"no recipe at {path}. Those that come with the program: unperturb list recipes")
        return _text(path)
    if name not in recipe_names():
        said = str(unknown("recipe", name, recipe_names())).partition(" Choices: ")[0]
        raise RecipeError(f"{said} All of them: unperturb list recipes; one of your own is a path that ends in .toml")
    return (resources.files("unperturb") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def recipe_sources(name: str) -> dict[str, dict[str, Any]]:
    """What a recipe, by name or path, and those that it is based on say themselves, by name or path: it first, then
    its `base`, and so on.

    A base is the name of a recipe that comes with the program, or a path that ends in .toml, seen from the recipe.
    Raises `RecipeError` for one that is not there, is no TOML, or is based on itself.
    """
    found: dict[str, dict[str, Any]] = {}
    places: set[str] = set()
    at: str | None = name
    while at is not None:
        try:
            values = tomllib.loads(recipe_text(at))
        except RecipeError as error:
            raise RecipeError(f"{[*found][-1]}: its base: {error}" if found else str(error)) from None
        except (ValueError, RecursionError) as error:  # its own error, and numbers of thousands of digits
            raise RecipeError(f"{at} is not valid TOML: {error}") from None
        place = os.path.realpath(at) if at.endswith(".toml") else at
        if place in places:
            raise RecipeError(f"a recipe cannot be its own base: {' is based on '.join([*found, at])}")
        places.add(place)
        base = values.pop("base", None)
        if not isinstance(base, str | None):
            raise RecipeError(f"{at}: base is the name of a recipe, or a path that ends in .toml, not {base!r:.80}")
        found[at] = values
        at = str(Path(at).parent / base) if base is not None and base.endswith(".toml") else base
    return found


def _merged(below: Any, above: Any) -> Any:
    """`above` over `below`: tables key by key, all else replaced; a table of another `name` too, for options belong to
    a name."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "name" in above and above["name"] != below.get("name"):
        return above
    return {**below, **{key: _merged(below[key], value) if key in below else value for key, value in above.items()}}


def read_recipe(name: str, overrides: Sequence[str] = (), kind: str | None = None) -> Any:
    """The recipe called `name` (one of `recipe_names()`, or a path to a TOML file), with `key=value` overrides.

    A recipe with `base = "another"` holds only what differs from it: tables are merged key by key, all else is
    replaced. kind: what it must be ("classifier", "defense", "evaluation", "demo").

    Raises `RecipeError` for a name, key, type or value that does not fit.
    """
    values: Any = {}
    for said in reversed(recipe_sources(name).values()):
        values = _merged(values, said)
    values = _written_out(values)
    for override in overrides:
        _override(values, override)
    if kind is not None and values.get("kind") != kind:
        raise RecipeError(f"{name} is a {values.get('kind')!r} recipe; this needs a {kind!r} recipe")
    return resolve(values, name)


def _written_out(values: Any) -> Any:
    """`values` with each attack of a list in its long form, which is the one that overrides speak of."""
    if isinstance(values, list):
        return [_written_out(value) for value in values]
    if not isinstance(values, dict):
        return values
    values = {key: _written_out(value) for key, value in values.items()}
    if isinstance(values.get("attacks"), list):
        values["attacks"] = [long_form(entry) for entry in values["attacks"]]
    return values


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text in UTF-8: {error}") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from None


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"an override reads key=value, such as training.lr=0.001; got {override!r}")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    place: Any = values  # a table, or a list of them
    *path, last = key.strip().split(".")
    try:
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise RecipeError(f"{key!r} is not a place in this recipe") from None
