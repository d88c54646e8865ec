"""What each widget of the page does: values of the widgets in, values or updates of others out."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from unperturb.app import choices, says
from unperturb.app.images import Chosen, amplified, enlarged, from_drawing, from_file, from_set
from unperturb.app.one_image import Attacked, attacked, attacker, climb, look, rungs, system
from unperturb.data import ImageSet
from unperturb.data.sets import DataError
from unperturb.evaluation.grid import shown_rows
from unperturb.mistakes import sentence
from unperturb.systems import System
from unperturb.threat_models import KNOWLEDGE, ThreatModel

P = ParamSpec("P")
R = TypeVar("R")

PICTURES = 20  # of a test set that are offered at once
UNKNOWN = "what the classifier says"
ATTACK_IT = "Nobody has attacked it yet."


def told(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose user's mistakes are shown on the page, in a sentence; a fault of the program stays one."""

    @functools.wraps(function)
    def tell(*args: P.args, **kwargs: P.kwargs) -> R:
        import gradio as gr

        try:
            return function(*args, **kwargs)
        except Exception as error:
            if said := sentence(error):
                raise gr.Error(html.escape(said, quote=False), print_exception=False) from error
            raise

    return tell


def _update(**values: Any) -> dict[str, Any]:
    import gradio as gr

    return gr.update(**values)


# The image ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=3)
def _order(dataset: str) -> Tensor:
    data = choices.test_images(dataset)
    return shown_rows(data.labels, len(data))


def page_of(dataset: str, turn: int) -> list[int]:
    """The rows of the `turn`-th `PICTURES` of a test set, around and around, as many of each class as can be."""
    order = _order(dataset)
    return [int(order[place % len(order)]) for place in range(turn * PICTURES, (turn + 1) * PICTURES)]


def gallery(dataset: str, turn: int) -> list[tuple[Any, str]]:
    """What is offered of a test set: pictures and their classes."""
    data = choices.test_images(dataset)
    rows = page_of(dataset, turn)
    return [(enlarged(from_set(data, row).batch[0]), data.class_names[int(data.labels[row])]) for row in rows]


@told
def other_set(dataset: str, norm: str) -> list[Any]:
    """-> turn, gallery, where one draws, or why one cannot, class, classifier, purifier, budget, chosen image."""
    nets = choices.offered()[choices.check_offered("data set", dataset, choices.offered())]
    data = choices.test_images(dataset)
    return [
        0,
        _update(value=gallery(dataset, 0), selected_index=None),
        _update(visible=data.shape[0] == 1),
        _update(visible=data.shape[0] != 1),
        _update(choices=[UNKNOWN, *data.class_names], value=UNKNOWN, visible=False),
        _update(choices=list(nets.classifiers), value=nets.classifiers[0]),
        _update(choices=list(nets.purifiers), value=nets.purifiers[0]),
        choices.budget_for(dataset, norm),
        from_set(data, page_of(dataset, 0)[0]),
    ]


@told
def others(dataset: str, turn: int) -> tuple[int, Any]:
    """-> turn, gallery."""
    return turn + 1, _update(value=gallery(dataset, turn + 1), selected_index=None)


@told
def pick(dataset: str, turn: int, place: int) -> tuple[Chosen, Any]:
    """place: among the pictures that are offered. -> chosen image, class."""
    return from_set(choices.test_images(dataset), page_of(dataset, turn)[place]), _update(visible=False)


@told
def draw(dataset: str, canvas: dict[str, Any] | None) -> tuple[Chosen, Any]:
    """-> chosen image, class."""
    drawn = None if canvas is None else canvas["composite"]
    if drawn is None:
        raise DataError("nothing is drawn yet: take the brush and draw a digit, then use it")
    return from_drawing(drawn, choices.test_images(dataset)), _update(visible=True, value=UNKNOWN)


@told
def take(dataset: str, file: str) -> tuple[Chosen, Any]:
    """-> chosen image, class."""
    return from_file(file, choices.test_images(dataset)), _update(visible=True, value=UNKNOWN)


def _labeled(chosen: Chosen | None, given: str, data: ImageSet) -> Chosen:
    if chosen is None:
        raise DataError("no image is chosen yet: pick one, draw one, or upload one")
    if chosen.label is not None or given == UNKNOWN:
        return chosen
    return replace(chosen, label=data.class_names.index(choices.check_offered("class", given, data.class_names)))


# The attack ---------------------------------------------------------------------------------------------------------


def effort(attack: str) -> dict[str, Any]:
    """Of the number of steps or queries: whether it is shown, what it is called, its value."""
    name, default = choices.effort_of(attack) or ("", 1)
    return {"visible": bool(name), "label": name.capitalize(), "value": default}


def knowledge(attack: str) -> dict[str, Any]:
    """Of the choice of knowledge: what there is, what is chosen, and that in words."""
    known = [(KNOWLEDGE[name].title, name) for name in choices.knowledge_of(attack)]
    return {"choices": known, "value": "oblivious", "info": meaning("oblivious")}


def meaning(name: str) -> str:
    """What an attacker of this knowledge does, as a sentence."""
    return f"The attack is {KNOWLEDGE[name].meaning}."


def norms(attack: str) -> dict[str, Any]:
    """Of the choice of a norm: what there is, and what is chosen."""
    fits = [("Linf", "linf"), ("L2", "l2")][: len(choices.norms_of(attack))]
    return {"choices": fits, "value": "linf"}


@told
def other_attack(dataset: str, attack: str) -> list[Any]:
    """-> steps or queries, norm, budget, knowledge."""
    choices.check_offered("attack", attack, choices.attack_names())
    budget = choices.budget_for(dataset, "linf")
    return [_update(**effort(attack)), _update(**norms(attack)), budget, _update(**knowledge(attack))]


# What is seen -------------------------------------------------------------------------------------------------------


def bars(probabilities: Tensor, data: ImageSet) -> dict[str, float]:
    """Class names with their probabilities."""
    return dict(zip(data.class_names, probabilities.tolist()))


def _parts(device: str, dataset: str, classifier: str, purifier: str) -> tuple[ImageSet, System]:
    data, one = choices.test_images(dataset), system(dataset, classifier, purifier, device)
    one.check_data(data)
    return data, one


@told
def look_at(device: str, dataset: str, classifier: str, purifier: str, chosen: Chosen | None, given: str) -> list[Any]:
    """The chosen image, before anybody attacks it; what was found of another is taken away.

    -> title, three pictures with their bars, the difference, what it was multiplied by, verdict, ladder.
    """
    data, one = _parts(device, dataset, classifier, purifier)
    chosen = _labeled(chosen, given, data)
    clean = look(System("", one.classifier), chosen.batch.to(device))
    return [chosen.title, enlarged(chosen.batch[0]), bars(clean.probabilities, data), *[None] * 5, "", ATTACK_IT, ""]


@told
def strike(
    device: str,
    dataset: str,
    classifier: str,
    purifier: str,
    chosen: Chosen | None,
    given: str,
    attack: str,
    norm: str,
    eps: str,
    effort: int | None,
    knows: str,
) -> list[Any]:
    """-> three pictures with their bars, the difference, what it was multiplied by, verdict."""
    data, one = _parts(device, dataset, classifier, purifier)
    found = attacked(one, attacker(attack, norm, eps, effort, knows), _labeled(chosen, given, data))
    tiles: list[Any] = []
    for view in (found.clean, found.adversarial, found.restored):
        tiles += [enlarged(view.image), bars(view.probabilities, data)]
    grey, times = amplified(found.adversarial.image, found.clean.image)
    amount = f"Adversarial minus clean, amplified {times:g} times; grey is none."
    return [*tiles, enlarged(grey), amount, says.verdict(found, data.class_names)]


def up_the_ladder(
    device: str, dataset: str, classifier: str, purifier: str, chosen: Chosen | None, given: str, norm: str, eps: str
) -> Iterator[list[Any]]:
    """-> the ladder so far, and whether it can be stopped; after each attacker."""
    try:
        data, one = _parts(device, dataset, classifier, purifier)
        threat = ThreatModel("linf" if norm == "linf" else "l2", eps)
        image, attackers = _labeled(chosen, given, data), rungs(one, threat, data.classes)
        climbed: list[Attacked | None] = []
        yield [says.ladder(climbed, attackers, data.class_names, threat), _update(visible=True)]
        for found in climb(one, attackers, image):
            climbed.append(found)
            more = len(climbed) < len(attackers)
            yield [says.ladder(climbed, attackers, data.class_names, threat), _update(visible=more)]
    except Exception as error:
        _raise(error)


@told
def _raise(error: Exception) -> None:
    raise error
