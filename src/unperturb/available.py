"""What there is by name, with a line on each; a recipe in words and whole; the page of every key of a recipe."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

VERBS = {"classifier": "train-classifier", "defense": "train", "evaluation": "evaluate", "demo": "demo"}
LONG = 100  # columns of a list; a longer one has an entry a line


def list_available() -> dict[str, dict[str, str]]:
    """Every registered name by kind: `{"attacks": {"fgsm": "One step ...", ...}, ...}`."""
    from unperturb import zoo
    from unperturb.attacks import attacks
    from unperturb.classifiers import classifiers
    from unperturb.data import NAMES
    from unperturb.defenses import defenses
    from unperturb.recipe_files import read_recipe, recipe_names
    from unperturb.threat_models import KNOWLEDGE

    return {
        "datasets": {**NAMES, "folder:PATH": "class folders of pictures", "hub:NAME": "any image set on the hub"},
        "classifiers": {n: _line(classifiers[n]) for n in classifiers},
        "attacks": {n: _line(attacks[n]) for n in attacks},
        "defenses": {n: _line(defenses[n]) for n in defenses},
        "knowledge": {n: kind.meaning for n, kind in KNOWLEDGE.items()},
        "zoo": {f"{zoo.PREFIX}{n}": _card(folder) for n, folder in zoo.folders().items()},
        "recipes": {n: f"{VERBS[read_recipe(n).kind]}: {_phrase(describe(n))}" for n in recipe_names()},
    }


def _line(thing: Any) -> str:
    """The first line of a docstring, or its first sentence where the line breaks off in one."""
    paragraph = (thing.__doc__ or "").strip().split("\n\n")[0]
    first = paragraph.split("\n")[0]
    return first if first.endswith(".") else _sentence(" ".join(paragraph.split())) + "."


def _card(folder: Any) -> str:
    """The first line of a card that is no heading."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.exists() else []
    text = " ".join(lines[1:]).strip().partition("  ")[0]
    return _sentence(text).replace("`", "")


def _sentence(text: str) -> str:
    """The first sentence of `text`, without its period."""
    return re.split(r"\.(?=\s+[^\s\d]|$)", text, maxsplit=1)[0]


def _phrase(text: str) -> str:
    """The first sentence of `text`, without what it explains behind a colon if it already says something before."""
    sentence = _sentence(text)
    for mark in re.finditer(r"[:;] ", sentence):
        head = sentence[: mark.start()]
        if len(head) > 25 and head.count("(") == head.count(")"):
            return head
    return sentence


# A recipe -----------------------------------------------------------------------------------------------------------


def describe(name: str) -> str:
    """What a recipe, by name or path, says of itself: the comment that it, or else its base, begins with."""
    from unperturb.recipe_files import recipe_sources, recipe_text

    for source in recipe_sources(name):
        lines = recipe_text(source).splitlines()
        comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
        if said := " ".join(line.removeprefix("#").strip() for line in comment):
            return said
    return ""


def to_toml(recipe: Any, name: str | None = None, overrides: Sequence[str] = ()) -> str:
    """`recipe` with every key, as TOML that `read_recipe` takes; a key that is not set stands in a comment.

    name: what it was read from, with `overrides`: a comment then says which keys come from which base.
    """
    from unperturb.config import snapshot
    from unperturb.recipe_files import recipe_sources

    sources = {} if name is None else recipe_sources(name)
    changed = [tuple(override.partition("=")[0].strip().split(".")) for override in overrides]

    def origin(path: tuple[str, ...]) -> str:
        if any(path == key[: len(path)] or key == path[: len(key)] for key in changed):
            return ""
        source = next((source for source, said in sources.items() if _says(said, path)), name)
        return "" if source == name else f"  # from {source}"

    return "\n".join(_toml(snapshot(recipe), (), origin)) + "\n"


def _says(table: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(table, dict) or key not in table:
            return False
        table = table[key]
    return True


def _toml(table: Mapping[str, Any], path: tuple[str, ...], origin: Callable[[tuple[str, ...]], str]) -> Iterator[str]:
    inner = {k: v for k, v in table.items() if isinstance(v, dict)}
    if path:
        yield f"\n[{'.'.join(map(_key, path))}]"
    for key, value in table.items():
        if key not in inner:
            line = f"# {_key(key)}: not set" if value is None else f"{_key(key)} = {_value(value)}"
            yield line + origin((*path, key))
    for key, value in inner.items():
        yield from _toml(value, (*path, key), origin)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list):
        if any(isinstance(v, dict) for v in value) or len(str(value)) > LONG:
            return "[\n" + "".join(f"  {_value(v)},\n" for v in value) + "]"
        return f"[{', '.join(map(_value, value))}]"
    return (
        repr(value) if isinstance(value, float) else json.dumps(value)
    )  # 1e-06 and inf are TOML as Python writes them


# The page of every key ----------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Recipes

A recipe is a TOML file that fixes one run completely. `unperturb list recipes` names those that come along,
`unperturb show NAME` prints one whole, with what it needs. Every verb takes a name or a path, so a recipe of your own
begins with `unperturb show protect-mnist > mine.toml`. `--set KEY=VALUE` changes a key: `--set training.lr=0.001`,
`--set adversarial_batches.attacks.0.attack.eps=8/255`, `--set 'classifiers=["zoo:mnist-resnet8"]'`. A key that does not
exist is refused.

A recipe may say only what differs from another: `base = "protect-mnist"` at its top, a name that comes along, or a path
that ends in `.toml`, seen from the recipe. Tables are merged key by key. Everything else is replaced: lists, and tables
that give another `name`. `unperturb show` prints the result, and beside each key the base that it comes from.

A classifier or a defense is named by its run folder (`runs/mnist-resnet8`), by `zoo:NAME` (weights that come with the
repository: `unperturb list zoo`), a filter by its own name (`jpeg`), several purifiers one behind the other by
`A+B`. What has a `name` (a classifier, an objective, a defense, an attack) takes the options of that name: they
follow the keys.

This page is made by `python -m unperturb.available > docs/recipes.md`; a test holds it to the program.
"""
ENTRIES = """\
## The lists of attacks

An entry is an attack, `{ name = "pgd", eps = 0.3 }`, with the options of its name. If the entry says more, the attack
stands in it: `{ attack = { name = "pgd", eps = 0.3 }, label = "mine" }`. In an evaluation `eps` may be a list:
`{ name = "pgd", eps = [0.1, 0.2] }` is an attack for each, its budget behind its label. What an entry may say there:

{evaluation}
And in a mixture (`adversarial_batches.attacks`, or those of the objective `adversarial`), where an option given as
`{ uniform = [low, high] }` is drawn anew each step:

{mixture}"""


def recipes_page() -> str:
    """`docs/recipes.md`: every key of every kind of recipe, and the options of everything that a recipe names."""
    from unperturb.attacks import attacks
    from unperturb.classifiers import classifiers
    from unperturb.config import (
        KINDS,
        AdversarialBatchesConfig,
        AttackerConfig,
        Augmentation,
        MixtureConfig,
        Training,
    )
    from unperturb.defenses import defenses
    from unperturb.training.objectives import objectives

    parts = [INTRODUCTION]
    for kind, model in KINDS.items():
        verb = VERBS[kind]
        parts.append(f"## The {kind} recipe: `unperturb {verb}`\n\n{_line(model)}\n\n{_keys(model, fixed=kind)}")
    for title, part in (
        ("training", Training),
        ("augment", Augmentation),
        ("adversarial_batches", AdversarialBatchesConfig),
    ):
        parts.append(f"## `[{title}]`\n\n{_line(part)}\n\n{_keys(part)}")
    entries = ENTRIES.replace("{evaluation}", _keys(AttackerConfig)).replace("{mixture}", _keys(MixtureConfig))
    parts.append(entries)
    for title, registry in (
        ("Classifiers", classifiers),
        ("Objectives", objectives),
        ("Defenses", defenses),
        ("Attacks", attacks),
    ):
        lines = [f"| `{name}` | {_entry(_line(registry[name]))} | {_options(registry[name])} |" for name in registry]
        parts.append(
            f"## {title}\n\n| name | | options and defaults |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def _keys(model: Any, fixed: str = "") -> str:
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        default = "needed" if field.is_required() else f"`{_shown(field.default)}`"
        if name == "kind":
            default = f'`"{fixed}"`'
        lines.append(f"| `{name}` | {_type(field)} | {default} | {_entry(field.description or _line_of(field))} |")
    return "\n".join(lines) + "\n"


def _type(field: Any) -> str:
    """The type of a key in words, with its bounds."""
    import types
    from typing import Literal, Union, get_args, get_origin

    def words(annotation: Any) -> str:
        origin, inner = get_origin(annotation), get_args(annotation)
        if origin is Literal:
            return ", ".join(f"`{value}`" for value in inner)
        if origin in (Union, types.UnionType):
            return " or ".join(words(a) for a in inner if a is not type(None))
        if origin is list:
            return f"list of {words(inner[0])}"
        if origin is tuple:
            return ", ".join(words(a) for a in inner)
        plain = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
        if annotation in plain:
            return plain[annotation]
        return "`{ name, options }`" if annotation.__name__ == "ComponentConfig" else "table"

    signs = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
    bounds = [f"{said} {getattr(m, sign)}" for m in field.metadata for sign, said in signs.items() if hasattr(m, sign)]
    return " ".join([words(field.annotation), *bounds])


def _entry(text: str) -> str:
    """`text` in a table of Markdown; what Python calls None is a key that is not set."""
    return text.replace("|", "\\|").replace("None", "not set")


def _line_of(field: Any) -> str:
    return _line(field.annotation) if hasattr(field.annotation, "model_fields") else ""


def _shown(value: Any) -> str:
    """A default as a recipe would write it."""
    if value is None:
        return "not set"
    if hasattr(value, "model_dump"):
        value = {k: v for k, v in value.model_dump(mode="json").items() if v is not None}
    return re.sub(r"\n\s*", " ", _value(list(value) if isinstance(value, tuple) else value))


def _options(make: Any) -> str:
    """The keyword options of a constructor, `name = default`; those that the program gives itself are left out."""
    from inspect import Parameter, signature

    given = {"channels", "size", "classes", "classifier", "sampler", "parts"}
    found = []
    for name, option in signature(make).parameters.items():
        if name in given or option.kind is not Parameter.KEYWORD_ONLY:
            continue
        found.append(f"`{name}`" if option.default is Parameter.empty else f"`{name} = {_shown(option.default)}`")
    return ", ".join(found) or "none"


if __name__ == "__main__":
    print(recipes_page(), end="")
