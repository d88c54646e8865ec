"""What one attacker does to one image in front of one system; and the ladder of attackers for that image."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb import metrics
from unperturb.app.choices import NO_PURIFIER, check_offered, effort_of, norms_of, offered
from unperturb.app.images import Chosen
from unperturb.attackers import Attacker
from unperturb.attacks.base import create_attack
from unperturb.classifiers import load_classifier
from unperturb.defenses import load_defense
from unperturb.evaluation.ladder import ladder
from unperturb.evaluation.measure import detection
from unperturb.evaluation.trial import drawing
from unperturb.modules import logits_of
from unperturb.systems import System
from unperturb.threat_models import ThreatModel

SECONDS = 120.0  # that one attack may take
DRAWS = 10  # of a random purifier: it falls to an image that it gets wrong in each, as in an evaluation
BUDGET = "quick"  # of the ladder
# Who attacks a model holds it still, and draws from torch's generator: one at a time, also after "Stop".
_turn = threading.Lock()


class TooLongError(RuntimeError):
    """An attack that was stopped because it took too long."""


@functools.lru_cache(maxsize=8)
def system(dataset: str, classifier: str, purifier: str, device: str = "cpu") -> System:
    """A classifier of the zoo on `device`, behind a purifier that is offered for this data set.

    Raises `UnknownNameError` for what is not offered, `RunError` for damaged files.
    """
    nets = offered()[check_offered("data set", dataset, offered())]
    check_offered("classifier", classifier, nets.classifiers)
    check_offered("purifier", purifier, nets.purifiers)
    net = load_classifier(classifier).to(device)
    if purifier == NO_PURIFIER:
        return System(classifier, net)
    return System(f"{purifier} before {classifier}", net, load_defense(purifier).to(device))


def attacker(attack: str, norm: str, eps: str, effort: int | None, knowledge: str) -> Attacker:
    """An attacker by the names of the page. effort: steps or queries, if the attack takes any. Raises `ValueError`."""
    options: dict[str, object] = {"eps": ThreatModel("linf" if norm == "linf" else "l2", eps).eps}
    if len(norms_of(attack)) > 1:
        options["norm"] = norm
    elif norm not in norms_of(attack):
        raise ValueError(f"{attack} knows the norm {norms_of(attack)[0]} alone, not {norm}")
    if (has := effort_of(attack)) and effort is not None:
        options[has[0]] = effort
    return Attacker(create_attack(attack, **options), knowledge)


@dataclass(frozen=True, eq=False)
class View:
    """What a system makes of one image.

    image: `(C, H, W)` as its classifier sees it. probabilities: `(K,)`, of the first draw. classes: the most probable,
    one a draw. rejected: whether a detector finds it too suspicious.
    """

    image: Tensor
    probabilities: Tensor
    classes: list[int]
    rejected: bool

    @property
    def prediction(self) -> int:
        """The class of the first draw."""
        return self.classes[0]

    def wrong(self, label: int) -> int:
        """In how many draws it is not `label`."""
        return sum(found != label for found in self.classes)


@torch.no_grad()
def look(one: System, image: Tensor, draws: int = DRAWS) -> View:
    """`image` `(1, C, H, W)` in [0, 1] as `one` sees it; a random system is asked `draws` times, by fixed seeds."""
    seen, probabilities, rejected = [], [], False
    for draw in range(draws if one.random else 1):
        with drawing(draw, image.device):
            purified = detection(one, image, batch=1)
            probabilities.append(logits_of(one.classifier, purified.images).softmax(1)[0].cpu())
        seen.append(purified.images[0].cpu())
        rejected |= draw == 0 and bool(purified.rejected[0])
    return View(seen[0], probabilities[0], [int(p.argmax()) for p in probabilities], rejected)


@dataclass(frozen=True, eq=False)
class Attacked:
    """One image under one attacker. label: its class. The classifier alone: `clean` and `adversarial`; the whole
    system: `restored`, and `restored_clean`, what it makes of the clean image.

    defended: whether the system has a purifier. attacker: who made it. far: how far it was moved, by norm. forwards,
    backwards, seconds: that it took.
    """

    label: int
    clean: View
    adversarial: View
    restored: View
    restored_clean: View
    defended: bool
    attacker: Attacker
    far: dict[str, float]
    forwards: int
    backwards: int
    seconds: float

    @property
    def fooled_alone(self) -> bool:
        """Whether the classifier alone is wrong."""
        return self.adversarial.prediction != self.label

    @property
    def broken(self) -> bool:
        """Whether the system is wrong, in every draw."""
        return self.restored.wrong(self.label) == len(self.restored.classes)


def label_of(one: System, chosen: Chosen) -> int:
    """The image's class; where nobody knows it, what the classifier alone says."""
    if chosen.label is not None:
        return chosen.label
    return look(System("", one.classifier), chosen.batch.to(_device(one))).prediction


def attacked(one: System, who: Attacker, chosen: Chosen, seconds: float = SECONDS) -> Attacked:
    """The image under one attacker. Raises `TooLongError` after `seconds`, `ValueError` for one who cannot attack
    it."""
    with _turn:
        return _attacked(one, who, chosen, seconds)


def _attacked(one: System, who: Attacker, chosen: Chosen, seconds: float) -> Attacked:
    device = _device(one)
    images, label = chosen.batch.to(device), label_of(one, chosen)
    start = time.perf_counter()
    with drawing(0, device):
        found = who.attack_for(one).run(
            who.model_for(one),
            images,
            torch.tensor([label], device=device),
            index=torch.tensor([chosen.index], device=device),
            progress=_until(start + seconds, seconds),
        )
    took = time.perf_counter() - start
    alone = System("", one.classifier)
    far = metrics.distances(found.images, images)
    return Attacked(
        label,
        look(alone, images),
        look(alone, found.images),
        look(one, found.images),
        look(one, images),
        one.purifier is not None,
        who,
        {name: float(values[0]) for name, values in far.items()},
        found.forwards,
        found.backwards,
        took,
    )


def _until(end: float, seconds: float) -> Callable[[int], None]:
    def check(_: int) -> None:
        if time.perf_counter() > end:
            raise TooLongError(f"stopped after {seconds:g} seconds: take fewer steps, or another purifier")

    return check


def _device(one: System) -> torch.device:
    return next(one.classifier.parameters()).device


# The ladder ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One attacker of the ladder. label: the attack's. knowledge: what the attacker's comes to for the system."""

    label: str
    knowledge: str
    attacker: Attacker


def rungs(one: System, threat: ThreatModel, classes: int) -> list[Rung]:
    """The attackers of the quick ladder for `one`, from the weakest to the strongest; each that is another one before
    for this system, such as BPDA where nothing purifies, is left out.

    classes: of the data. Raises `ValueError` for a norm without a ladder.
    """
    found: dict[tuple[str, str], Rung] = {}
    for label, attackers in ladder(threat, BUDGET, classes=classes).items():
        for who in attackers:
            known = who.knowledge_of(one)
            if who.is_sent_against(one):
                found.setdefault((label, known), Rung(label, known, who))
    return list(found.values())


def climb(one: System, attackers: list[Rung], chosen: Chosen, seconds: float = SECONDS) -> Iterator[Attacked | None]:
    """The image under each of `attackers`, as it is done; None for one who took longer than `seconds`."""
    for rung in attackers:
        try:
            yield attacked(one, rung.attacker, chosen, seconds)
        except TooLongError:
            yield None
