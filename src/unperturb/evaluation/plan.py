"""The plan of an evaluation: what is crossed with what, and checked, before anything is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unperturb import zoo
from unperturb.attackers import Attacker, label_of
from unperturb.attacks.base import attacks
from unperturb.classifiers import load_classifier
from unperturb.config import AttackerConfig, ComponentConfig, EvaluationRecipe
from unperturb.data import ImageSet, known_copy_note, load_dataset
from unperturb.defenses.base import Defense, load_defense
from unperturb.devices import pick_device
from unperturb.evaluation.adversarials import cache_limit
from unperturb.evaluation.checks import check_name, subset
from unperturb.evaluation.identity import Identity, identify
from unperturb.evaluation.ladder import ladder
from unperturb.evaluation.surrogates import Surrogate, is_retrain, retrained
from unperturb.evaluation.trial import at_work, drawing, try_model
from unperturb.results import schema
from unperturb.results.names import budget_name
from unperturb.systems import System
from unperturb.threat_models import ThreatModel, budget

UNDEFENDED = "undefended"  # the entry of a recipe's `systems` that means the classifier itself


@dataclass(frozen=True, eq=False)
class Cell:
    """One attacker and one system. classifier: the name of the base classifier, in whose block tables compare systems.
    label: the attack's short name. attacker: as it meets this system."""

    classifier: str
    system: System
    label: str
    attacker: Attacker
    surrogate: Surrogate | None = None

    @classmethod
    def of(
        cls, classifier: str, system: System, label: str, attacker: Attacker, surrogate: Surrogate | None = None
    ) -> Cell:
        """The cell in which `attacker` meets `system`. Raises `ValueError` where its attack cannot."""
        attacker = replace(attacker, knowledge=attacker.knowledge_of(system))
        surrogate = surrogate if attacker.attacked == "surrogate" else None
        attack = attacker.attack_for(system, None if surrogate is None else surrogate.model)
        return cls(classifier, system, label, replace(attacker, attack=attack), surrogate)

    @property
    def names(self) -> tuple[str, str, str, str]:
        """(classifier, system, attack, knowledge): what no two cells of a run share."""
        return self.classifier, self.system.name, self.label, self.attacker.knowledge

    @property
    def folder(self) -> str:
        """A file name for the cell, its own."""
        return schema.cell_folder(*self.names)

    def __str__(self) -> str:
        return " · ".join(self.names)

    def target(self, copies: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
        """The function that the cell's attacker sees; copies: of classifiers, which it is built on in their place."""
        system = self.system
        if copies:
            base = None if system.base is None else copies.get(system.base, system.base)
            system = replace(system, classifier=copies.get(system.classifier, system.classifier), base=base)
        return self.attacker.model_for(system, None if self.surrogate is None else self.surrogate.model)

    def identity(self, target: nn.Module) -> Identity:
        """Of the attack on `target`: cells of one identity share adversarial images. target: the cell's `target`, which
        must live as long as the identity is used."""
        return identify(target, self.attacker.attack)


@dataclass(frozen=True)
class Cascade:
    """Each attacker meets only the images that those before it have left standing.

    threat: what breaks an image: an answer that is wrong in every draw, at most eps away in its norm. doubted: so many
    images, the first, are attacked by everyone, broken or not, as if nobody had come before: what each attacker is
    worth alone shows whether one who knows more does worse, which is how a hidden gradient shows. whole: labels of
    attacks that are made on every image all the same, as those are that look at no defense.
    """

    threat: ThreatModel
    doubted: int = 64
    whole: Collection[str] = ()


@dataclass(eq=False)
class Plan:
    """What is crossed with what, and on which images.

    systems: each under the name that tables show, one of a name before each classifier. attackers: by the label of
    their attack. classifiers: the undefended ones by name, each the block of the systems that stand on it (default:
    named after their family). surrogates: by the knowledge that needs one. retrained: by the system, the purifier that
    a gray-box attacker trains to attack it. batch: images attacked at once. shard: images a file of rows. samples:
    images of each cell that are kept to be looked at. draws: how often each image is shown to a random system. cascade:
    what makes of the attackers one after the other (default: each attacks every image). probed: images of a short look
    at each system, for the flags; 0 for none. note: what is wrong with this copy of the data, if anything.
    """

    data: ImageSet
    systems: Sequence[System]
    attackers: Mapping[str, Sequence[Attacker]]
    classifiers: Mapping[str, nn.Module] = field(default_factory=dict)
    surrogates: Mapping[str, Surrogate] = field(default_factory=dict)
    retrained: Mapping[str, Surrogate] = field(default_factory=dict)
    seed: int = 0
    batch: int = 200
    shard: int = 1000
    samples: int = 10
    draws: int = 10
    cascade: Cascade | None = None
    probed: int = 32
    note: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.classifiers = self.classifiers or named_classifiers(self.systems)

    def block(self, classifier: str) -> list[System]:
        """The systems that stand on the undefended classifier of this name."""
        return [s for s in self.systems if s.bare is self.classifiers[classifier]]

    def cells(self) -> list[Cell]:
        """Every cell, each once; those that share adversarial images are neighbors. Raises `ValueError` where an attack
        cannot be made on a system."""
        found: dict[tuple[str, ...], Cell] = {}
        for classifier in self.classifiers:
            for label, attackers in self.attackers.items():
                for attacker in attackers:
                    for system in filter(attacker.is_sent_against, self.block(classifier)):
                        own = self.retrained.get(system.name) if attacker.knowledge == "gray_box" else None
                        surrogate = own or self.surrogates.get(attacker.knowledge)
                        cell = Cell.of(classifier, system, label, attacker, surrogate)
                        found.setdefault(cell.names, cell)
        return list(found.values())

    @property
    def threat(self) -> ThreatModel:
        """The largest ball of any attacker; that of the cascade, if there is one; 8/255 where none has any."""
        if self.cascade is not None:
            return self.cascade.threat
        sent: list[Any] = [attacker.attack for attackers in self.attackers.values() for attacker in attackers]
        balls = [(a.norm, a.eps) for a in sent if getattr(a, "eps", None) and getattr(a, "norm", "") in ("linf", "l2")]
        return max((ThreatModel(norm, eps) for norm, eps in balls), key=_size, default=ThreatModel())

    def draws_of(self, system: System) -> int:
        """How often each image is shown to `system`."""
        return self.draws if system.random else 1

    def about(self, cell: Cell) -> dict[str, Any]:
        """What its rows say of the cell, by `schema.CELL_KEYS`."""
        attack = cell.attacker.attack
        eps = getattr(attack, "eps", None)
        return {
            "dataset": self.data.source,
            "split": self.data.name,
            "classifier": cell.classifier,
            "system": cell.system.name,
            "defended": not cell.system.undefended,
            "attack": cell.label,
            "attack_repr": repr(attack),
            "norm": "" if eps is None else str(getattr(attack, "norm", "linf")),  # RayS knows no other
            "eps": float("nan") if eps is None else eps,
            "knowledge": cell.attacker.knowledge,
            "surrogate": "" if cell.surrogate is None else cell.surrogate.name,
            "seed": self.seed,
        }

    def models(self) -> dict[str, nn.Module]:
        """Everything that is asked, by what it is called in an error."""
        found: dict[str, nn.Module] = {f"classifier {name!r}": model for name, model in self.classifiers.items()}
        for system in self.systems:
            found |= {f"the {what} of {system.name!r}": model for what, model in defense_of(system).items()}
        found |= {f"the surrogate {s.name!r}": s.model for s in self.surrogates.values()}
        return found | {f"the purifier retrained after {name!r}": s.model for name, s in self.retrained.items()}

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, every model is in eval mode on the plan's device; after, mode and place are as they were."""
        with contextlib.ExitStack() as stack:
            for model in {id(m): m for m in self.models().values()}.values():
                stack.enter_context(at_work(model, self.device))
            yield

    def drawing(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """Inside, a random system draws what `seed` gives: a resumed run makes the same rows. The caller's draws
        stay."""
        return drawing(seed, self.device)

    def check(self) -> None:
        """Raise `ValueError` where a cell cannot be asked: before anything is computed or written."""
        cache_limit()
        _check_names(self)
        if len(self.data.index.unique()) < len(self.data):
            raise ValueError(f"two images of {self.data.source} have one index: rows could not tell them apart")
        for system in self.systems:
            system.check_data(self.data)
        for cell in self.cells():
            cell.target()
        with self.at_work():
            for name, model in self.models().items():
                if not isinstance(model, Defense) or model.spec is None:  # ours are tested; some take long
                    try_model(name, model, self.data, self.device)


def _size(threat: ThreatModel) -> tuple[bool, float]:
    return threat.norm == "linf", float(threat.eps)


def named_classifiers(systems: Sequence[System]) -> dict[str, nn.Module]:
    """The undefended classifiers of `systems`, each once, by names of their own: of its family, or "classifier"."""
    found: dict[str, nn.Module] = {}
    for bare in {id(s.bare): s.bare for s in systems}.values():
        family = str((getattr(bare, "spec", None) or {}).get("name", "classifier"))
        name, number = family, 1
        while name in found:
            number += 1
            name = f"{family}-{number}"
        found[name] = bare
    return found


def defense_of(system: System) -> dict[str, nn.Module]:
    """What makes `system` another than its undefended classifier: its purifier, the classifier in the other's place."""
    found: dict[str, nn.Module] = {} if system.purifier is None else {"purifier": system.purifier}
    return found if system.classifier is system.bare else {**found, "classifier": system.classifier}


# From a recipe ------------------------------------------------------------------------------------------------------


def entries_in(recipe: EvaluationRecipe) -> dict[str, AttackerConfig]:
    """The entries of `recipe.attacks` by the labels of their attacks; one whose `eps` is a list is one entry for each,
    with the budget behind the label.

    Raises `ValueError` for a label that comes twice and for a list without a budget.
    """
    found: dict[str, AttackerConfig] = {}
    for entry in recipe.attacks:
        name, options = entry.attack.name, entry.attack.options
        given = options.get("eps")
        if given == []:
            raise ValueError(f"eps of {name!r} is an empty list; give it the budgets, such as [0.1, 0.2]")
        for eps in given if isinstance(given, list) else [None]:
            own = options if eps is None else {**options, "eps": eps}
            label = entry.label or label_of(attacks.create(name, **own))
            one = entry
            if eps is not None:
                label += f"-{budget_name(budget(eps))}"
                one = entry.model_copy(update={"attack": ComponentConfig(name=name, **own), "label": label})
            if label in found:
                raise ValueError(f"two attacks are called {label!r}; give one of them a label")
            found[label] = one
    return found


def attackers_in(recipe: EvaluationRecipe) -> dict[str, list[Attacker]]:
    """The attackers of `recipe` by the labels of their attacks; raises `ValueError` as `entries_in` does."""
    found: dict[str, list[Attacker]] = {}
    for label, entry in entries_in(recipe).items():
        attack = attacks.create(entry.attack.name, **entry.attack.options)
        kinds = dict.fromkeys(entry.knowledge or recipe.knowledge)
        found[label] = [Attacker(attack, kind, recipe.eot_samples or 20) for kind in kinds]
    return found


def name_of(entry: str, dataset: str) -> str:
    """The name in tables of what a recipe's `entry` means: without the data set, which the table names already."""
    names = [Path(part.removeprefix(zoo.PREFIX)).name for part in entry.split("+")]
    return "+".join(n.removeprefix(f"{dataset}-").removesuffix(f"-{dataset}") or n for n in names)


def by_name(entries: Sequence[str], dataset: str) -> dict[str, str]:
    """A recipe's entries by their names in tables; raises `ValueError` where two would have one name."""
    found: dict[str, str] = {}
    for entry in entries:
        name = name_of(entry, dataset)
        if name == UNDEFENDED != entry:
            raise ValueError(
                f"{entry} would be called {UNDEFENDED!r} in tables, as if there were no defense; rename the folder"
            )
        if name in found:
            raise ValueError(f"{found[name]} and {entry} would both be called {name!r}; rename one of the folders")
        found[name] = entry
    return found


def plan_of(recipe: EvaluationRecipe, device: str = "auto", models: Mapping[str, nn.Module] | None = None) -> Plan:
    """The plan that `recipe` describes, its classifiers and purifiers rebuilt from their run folders.

    models: what stands in for an entry of the recipe that names no run folder. Raises `ValueError` or `RunError` where
    an attack, a data set or a folder cannot be used.
    """
    given = models or {}

    def classifier(entry: str) -> nn.Module:
        return given[entry] if entry in given else load_classifier(entry)

    def part(entry: str) -> nn.Module:
        if entry in given:
            return given[entry]
        is_classifier = (Path(zoo.find(entry)) / "classifier.json").exists()
        return load_classifier(entry) if is_classifier else load_defense(entry)

    def surrogate(entry: str, load: Callable[[str], nn.Module]) -> Surrogate:
        return Surrogate(name_of(entry, recipe.dataset), load(entry))

    named = by_name(recipe.systems, recipe.dataset)
    splits = load_dataset(**recipe.data_options)
    data = subset(splits.test if recipe.split == "test" else splits.val, recipe.n)
    attackers, cascade = attackers_in(recipe), None
    if recipe.ladder is not None:
        threat = ThreatModel(recipe.ladder.norm, recipe.ladder.eps, recipe.ladder.knowledge)
        cascade = Cascade(threat, recipe.ladder.doubted, whole=tuple(attackers))
        sent_out = ladder(
            threat,
            recipe.ladder.budget,
            classes=data.classes,
            transfer=bool(recipe.surrogate),
            gray_box=bool(recipe.surrogate_defense),
        )
        for label, sent in sent_out.items():
            if label in attackers:
                raise ValueError(f"an attack of the ladder is called {label!r} too; give the recipe's a label")
            attackers[label] = sent
    classifiers = {name: classifier(entry) for name, entry in by_name(recipe.classifiers, recipe.dataset).items()}
    parts = {name: None if entry == UNDEFENDED else part(entry) for name, entry in named.items()}
    made_on = {}
    if recipe.surrogate:
        made_on["transfer"] = surrogate(recipe.surrogate, classifier)
    if recipe.surrogate_defense and not is_retrain(recipe.surrogate_defense):
        made_on["gray_box"] = surrogate(recipe.surrogate_defense, part)
    systems = [_system(name, one, base) for base in classifiers.values() for name, one in parts.items()]
    return Plan(
        data=data,
        systems=systems,
        attackers=attackers,
        classifiers=classifiers,
        surrogates=made_on,
        retrained=retrained(recipe.surrogate_defense, attackers, systems, data),
        **{key: getattr(recipe, key) for key in ("seed", "batch", "shard", "samples", "draws")},
        cascade=cascade,
        device=pick_device(device),
        note=known_copy_note(splits),
    )


def _system(name: str, part: nn.Module | None, base: nn.Module) -> System:
    if part is None:
        return System(name, base)
    return System(name, base, part) if isinstance(part, Defense) else System(name, part, base=base)


# Checked ------------------------------------------------------------------------------------------------------------


def _check_names(plan: Plan) -> None:
    for what, names in (("classifier", plan.classifiers), ("attack", plan.attackers)):
        for name in names:
            check_name(what, name)
    meant: dict[str, dict[str, str]] = {}
    for classifier in plan.classifiers:
        known: dict[str, System] = {}
        for system in plan.block(classifier):
            check_name("system", system.name)
            if system.name in known:
                raise ValueError(f"two systems are called {system.name!r}; give one of them another name")
            if system.undefended and any(other.undefended for other in known.values()):
                raise ValueError(f"{system.name!r} is the undefended classifier, which is there already; pass it once")
            known[system.name] = system
            parts = {what: identify(model).key for what, model in defense_of(system).items()}
            if meant.setdefault(system.name, parts) != parts:
                raise ValueError(
                    f"{system.name!r} names different defenses of different classifiers; give each its own name"
                )
