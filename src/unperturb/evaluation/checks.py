"""What `evaluate` is given, checked before anything is computed: a mistake is answered with what to pass instead."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from unperturb.attackers import Attacker, label_of
from unperturb.attacks.base import Attack, attacks
from unperturb.classifiers import wrap
from unperturb.data import ImageSet, Splits
from unperturb.defenses.base import Defense, Protected
from unperturb.evaluation.identity import Identity, identify
from unperturb.systems import System
from unperturb.threat_models import check_knowledge

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


# Data ---------------------------------------------------------------------------------------------------------------


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


# Systems ------------------------------------------------------------------------------------------------------------


def systems_of(given: object) -> list[System]:
    """The systems that `given` names: a dict by name of modules, `Protected` models or systems, or a list of systems.

    Classifiers that are alike become one object. Raises `TypeError` or `ValueError`.
    """
    if isinstance(given, Mapping):
        systems = [_system(name, model) for name, model in given.items()]
    elif isinstance(given, Sequence) and given and all(isinstance(one, System) for one in given):
        systems = list(given)
    elif isinstance(given, Sequence) and not isinstance(given, str) and not given:
        systems = []
    else:
        raise TypeError(
            "systems must be a dict by the names that tables show, such as {'undefended': net}, or a list of System, "
            f"not {_kind(given)}"
        )
    if not systems:
        raise ValueError("systems is empty; pass at least one by name, such as {'undefended': net}")
    systems = _on_shared_classifiers(systems)
    if isinstance(given, Mapping):
        _check_plain(given, systems)
    return systems


def _system(name: object, model: object) -> System:
    check_name("system", name)
    assert isinstance(name, str)
    if isinstance(model, System):
        return replace(model, name=name)
    if isinstance(model, Defense):
        raise TypeError(f"systems[{name!r}] is a purifier alone; pass Protected(classifier, purifier)")
    if not isinstance(model, nn.Module):
        remedy = (
            "make it an nn.Module whose forward gives logits" if callable(model) else "load or build the model first"
        )
        raise TypeError(
            f"systems[{name!r}] must be an nn.Module from images to logits, a Protected or a System, "
            f"not {_kind(model)}; {remedy}"
        )
    return System.of(name, model)


def system_of(model: Any, name: str, base: nn.Module | None = None) -> System:
    """`model`, any callable, as a system under `name`; one that is a `System` says all of it itself."""
    if isinstance(model, System):
        if base is not None:
            raise ValueError("a System says itself what its base is: pass System(name, net, base=...), not base=")
        return model
    return System.of(name, model if isinstance(model, nn.Module) else wrap(model), base)


def _on_shared_classifiers(systems: Sequence[System]) -> list[System]:
    """`systems`, where undefended classifiers that are alike are one object."""
    known: dict[Identity, nn.Module] = {}
    shared = []
    for system in systems:
        base = known.setdefault(identify(system.bare), system.bare)
        if system.bare is system.classifier:
            shared.append(replace(system, classifier=base, base=None))
        else:
            shared.append(replace(system, base=base))
    return shared


def _check_plain(given: Mapping[str, Any], systems: Sequence[System]) -> None:
    """Raise `ValueError` for a plain module beside systems that all stand on another: it may mean two things."""
    behind = [s for s in systems if isinstance(given[s.name], Protected)]
    bases = {id(s.bare) for s in behind}
    for system in systems if len(bases) == 1 else ():
        if id(system.bare) not in bases and not isinstance(given[system.name], System | Protected):
            name = system.name
            raise ValueError(
                f"{name!r} is another classifier than the one behind {', '.join(s.name for s in behind)}: say what it "
                f"is. A defense in that one's place, such as an adversarially trained net: "
                f"{{{name!r}: System({name!r}, net, base=classifier)}}. A classifier beside it, judged apart: "
                f"{{{name!r}: System({name!r}, net)}}"
            )


# Attackers ----------------------------------------------------------------------------------------------------------


def attackers_of(given: object, knowledge: object, eot_samples: int = 20) -> dict[str, list[Attacker]]:
    """The attackers that `given` describes, by the names of their attacks in tables.

    given: a list, or a dict by name, of attacks, which each get every `knowledge` and `eot_samples`, and of attackers,
    which have their own. Raises `TypeError`, `ValueError` or `UnknownNameError`.
    """
    if isinstance(given, Attack | Attacker):
        raise TypeError(f"attacks must be a list: pass [{type(given).__name__}(...)], or a dict by name")
    if isinstance(given, str) or not isinstance(given, Mapping | Sequence):
        raise TypeError(f"attacks must be a list, such as [create_attack('pgd', eps=8/255)], not {_kind(given)}")
    if not given:
        raise ValueError("attacks is empty; pass at least one, such as [create_attack('pgd', eps=8/255)]")
    kinds = _kinds(knowledge)
    check_number("eot_samples", eot_samples, 1)
    found: dict[str, list[Attacker]] = {}
    for one in given.values() if isinstance(given, Mapping) else given:
        _check_attack(one)
    for name, one in given.items() if isinstance(given, Mapping) else ((None, one) for one in given):
        label = name if name is not None else label_of(one.attack if isinstance(one, Attacker) else one)
        check_name("attack", label)
        own = [one] if isinstance(one, Attacker) else [Attacker(one, kind, eot_samples) for kind in kinds]
        before = found.setdefault(label, [])
        other = any(repr(a.attack) != repr(own[0].attack) for a in before)
        if other or {a.knowledge for a in own} & {a.knowledge for a in before}:
            raise ValueError(f"attacks share a name ({label}); give them names of your own: {{name: attack}}")
        before += own
    return found


def _check_attack(attack: object) -> None:
    if isinstance(attack, str):
        known = attack if attack in attacks else "pgd"
        raise TypeError(f"{attack!r} is only a name; pass the attack itself: create_attack({known!r}, eps=8/255)")
    if not isinstance(attack, Attack | Attacker):
        raise TypeError(
            f"an attack is made by create_attack, such as create_attack('pgd', eps=8/255), not {_kind(attack)}"
        )


def _kinds(knowledge: object) -> list[str]:
    """The kinds of knowledge in `knowledge`, each once; raises `TypeError`, `ValueError` or `UnknownNameError`."""
    if isinstance(knowledge, str) or not isinstance(knowledge, Sequence):
        raise TypeError(f"knowledge must be a list, such as ['oblivious', 'white_box'], not {knowledge!r}")
    if not knowledge:
        raise ValueError("knowledge is empty; pass at least one kind, such as ['white_box']")
    return list(dict.fromkeys(check_knowledge(kind) for kind in knowledge))


def _kind(value: Any) -> str:
    """What `value` is, in few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"the text {value!r}"
    return f"a {type(value).__name__}"
