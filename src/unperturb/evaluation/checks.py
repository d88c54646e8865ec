"""What `evaluate` is given, checked before anything is computed: a mistake is answered with what to pass instead."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from unperturb.attacks.base import Attack, attacks
from unperturb.data import ImageSet, Splits
from unperturb.defenses.base import Defense, Protected
from unperturb.registry import unknown
from unperturb.threats import KNOWLEDGE

_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of characters, ends of lines and paragraphs


def check_name(what: str, name: object) -> None:
    """Raise `ValueError` unless `name` is a name for a table: text, in any script, without control characters."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{what} names are what tables show; {name!r} is no such text")
    if any(unicodedata.category(c) in _UNPRINTABLE for c in name):
        raise ValueError(f"the {what} name {name!r} holds control characters; use letters, digits, spaces and signs")


def check_number(what: str, value: object, least: int) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} must be a whole number of {least} or more, not {value!r}")


def check_data(data: object) -> ImageSet:
    """`data`, if it is an image set with images; raises `TypeError` or `ValueError`."""
    if isinstance(data, Splits):
        raise TypeError("data is a whole data set: pass the images to judge on, such as load_dataset(...).test")
    if not isinstance(data, ImageSet):
        raise TypeError(
            f"data must be an ImageSet, such as load_dataset('mnist').test or load_dataset('folder:PATH').test, "
            f"not {_kind(data)}"
        )
    if not len(data):
        raise ValueError(f"{data.name} of {data.source} holds no images; pass a set that has some")
    return data


def subset(data: ImageSet, n: int | None) -> ImageSet:
    """The fixed subset of `n` images, or all where n is None; raises `ValueError` for more than there are."""
    if n is None:
        return data
    check_number("n", n, 1)
    if n > len(data):
        raise ValueError(
            f"n is {n}, but {data.name} of {data.source} holds {len(data)} images; leave n out to take all"
        )
    return data.subset(n)


def check_models(models: object) -> Mapping[str, nn.Module]:
    """`models`, if it is models by name; raises `TypeError` or `ValueError`."""
    if not isinstance(models, Mapping):
        raise TypeError(
            f'models must be a dict by the names that tables show, such as {{"none": net}}, not {_kind(models)}'
        )
    if not models:
        raise ValueError('models is empty; pass at least one by name, such as {"none": net}')
    for name, model in models.items():
        check_name("model", name)
        if isinstance(model, Defense):
            raise TypeError(f"models[{name!r}] is a defense alone; pass Protected(classifier, defense)")
        if not isinstance(model, nn.Module):
            remedy = (
                "make it an nn.Module whose forward gives logits"
                if callable(model)
                else "load or build the model first"
            )
            raise TypeError(
                f"models[{name!r}] must be an nn.Module from images to logits, not {_kind(model)}; {remedy}"
            )
    if isinstance(models.get("none"), Protected):
        raise ValueError(
            '"none" is the name of the bare classifier, but models["none"] is a Protected: name it otherwise'
        )
    return models


def check_attacks(given: object) -> Mapping[str, Attack] | Sequence[Attack]:
    """`given`, if it is attacks in a list or by name; raises `TypeError` or `ValueError`."""
    if isinstance(given, Attack):
        raise TypeError(f"attacks must be a list: pass [{type(given).__name__}(...)], or a dict by name")
    if isinstance(given, str) or not isinstance(given, Mapping | Sequence):
        raise TypeError(f"attacks must be a list, such as [create_attack('pgd', eps=8/255)], not {_kind(given)}")
    if not given:
        raise ValueError("attacks is empty; pass at least one, such as [create_attack('pgd', eps=8/255)]")
    for attack in given.values() if isinstance(given, Mapping) else given:
        if isinstance(attack, str):
            known = attack if attack in attacks else "pgd"
            raise TypeError(f"{attack!r} is only a name; pass the attack itself: create_attack({known!r}, eps=8/255)")
        if not isinstance(attack, Attack):
            raise TypeError(
                f"an attack is made by create_attack, such as create_attack('pgd', eps=8/255), not {_kind(attack)}"
            )
    for name in given if isinstance(given, Mapping) else ():
        check_name("attack", name)
    return given


def check_knowledge(kinds: object) -> list[str]:
    """The kinds of knowledge in `kinds`; raises `TypeError`, `ValueError` or `UnknownNameError`."""
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise TypeError(f"knowledge must be a list, such as ['oblivious', 'white_box'], not {kinds!r}")
    if not kinds:
        raise ValueError("knowledge is empty; pass at least one kind, such as ['white_box']")
    for kind in kinds:
        if kind not in KNOWLEDGE:
            raise unknown("knowledge", kind, KNOWLEDGE)
    return list(kinds)


def _kind(value: Any) -> str:
    """What `value` is, in few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"the text {value!r}"
    return f"a {type(value).__name__}"
