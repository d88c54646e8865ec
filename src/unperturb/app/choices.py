"""What the page offers: images, the nets that take them, attacks and what they may spend."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from inspect import signature
from typing import Any

from unperturb import zoo
from unperturb.attacks import attacks
from unperturb.data import ImageSet, load_dataset
from unperturb.data.sources import SOURCES
from unperturb.registry import unknown
from unperturb.runs import read_json

NO_PURIFIER = "none"
FILTERS = ("jpeg", "median", "gaussian_blur", "bit_depth", "total_variation")  # have nothing to learn
MADE_LIKE = {"digits": "mnist"}  # always here, and without nets of its own: those of MNIST read it
# What the page begins with, where the zoo has it; else with the first.
FIRST = {"mnist-resnet8", "fashion_mnist-resnet8", "cifar10-airbench", "cifar100-airbench", "imagenette-resnet18"}
FIRST |= {"finetune-mnist", "finetune-fashion_mnist", "finetune-cifar10"}
# By data set, what an attacker may usually do to its images; by norm.
BUDGETS = {"mnist": {"linf": "0.3", "l2": "2"}, "fashion_mnist": {"linf": "0.1", "l2": "1"}}
USUAL = {"linf": "8/255", "l2": "0.5"}


@dataclass(frozen=True)
class Nets:
    """What the zoo has for one data set: entries for `load_classifier`, and for `load_defense` or `NO_PURIFIER`; each
    with what is shown first at its head."""

    classifiers: tuple[str, ...]
    purifiers: tuple[str, ...]


@functools.cache
def offered() -> dict[str, Nets]:
    """The nets by data set, those with a source of their own first. Raises `FileNotFoundError` where there is no zoo,
    `RunError` where a file of it is damaged."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, folder in zoo.folders().items():
        kind = zoo.kind_of(folder) or ""
        saved = read_json(folder / zoo.SAVED[kind], dict[str, Any])
        dataset = saved["extra" if kind == "classifier" else "about"].get("dataset")
        found.setdefault(str(dataset), {"classifier": [], "defense": []})[kind].append(zoo.PREFIX + name)
    found = {data: kinds for data, kinds in found.items() if kinds["classifier"]}
    if not found:
        zoo.find(f"{zoo.PREFIX}mnist-resnet8")  # says where a zoo is looked for
        raise FileNotFoundError("the zoo here has no classifier of a known data set; start inside a clone")
    order = [name for name in (*SOURCES, *found) if name in found]
    order += [data for data, like in MADE_LIKE.items() if like in found and data not in found]
    return {data: _nets(found[MADE_LIKE.get(data, data)]) for data in dict.fromkeys(order)}


def _nets(kinds: dict[str, list[str]]) -> Nets:
    def first(entries: list[str]) -> tuple[str, ...]:
        return tuple(sorted(entries, key=lambda entry: entry.removeprefix(zoo.PREFIX) not in FIRST))

    return Nets(first(kinds["classifier"]), (*first(kinds["defense"]), *FILTERS, NO_PURIFIER))


@functools.lru_cache(maxsize=3)
def test_images(dataset: str) -> ImageSet:
    """The test images of a data set that is offered. Raises `UnknownNameError`, or `DataError` where it is not here."""
    check_offered("data set", dataset, offered())
    return load_dataset(dataset, quiet=True).test


def check_offered(what: str, name: str, choices: Collection[str]) -> str:
    """`name`, if it is one of `choices`; raises `UnknownNameError`, which lists them."""
    if name not in choices:
        raise unknown(what, name, choices)
    return name


def budget_for(dataset: str, norm: str) -> str:
    """The budget that the page begins with: a number or a fraction."""
    return BUDGETS.get(MADE_LIKE.get(dataset, dataset), USUAL)[norm]


# Attacks ------------------------------------------------------------------------------------------------------------


def attack_names() -> list[str]:
    """The attacks that are told how far they may go; of one without a budget, how far it went is the result."""
    return [name for name in attacks if "eps" in signature(attacks[name]).parameters]


def norms_of(attack: str) -> tuple[str, ...]:
    """The norms that an attack's budget may have."""
    return ("linf", "l2") if "norm" in signature(attacks[attack]).parameters else ("linf",)


def effort_of(attack: str) -> tuple[str, int] | None:
    """The option by which an attack is given more time, `"steps"` or `"queries"`, and its default; None where it takes
    none."""
    options = signature(attacks[attack]).parameters
    name = next((name for name in ("steps", "queries") if name in options), None)
    return None if name is None else (name, options[name].default)


def knowledge_of(attack: str) -> tuple[str, ...]:
    """What one who makes this attack may know: of the whole its gradients, or its outputs alone."""
    needs_gradient = getattr(attacks[attack], "needs_gradient", True)
    return ("oblivious", "bpda", "white_box") if needs_gradient else ("oblivious", "black_box")
