"""The card: what one system is worth, on one page, with the doubts about it beside the number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unperturb.results.cost_figure import FREE_MS
from unperturb.results.embedded import CRISP, figure_data, flag_page, image_data, templates
from unperturb.results.figures import ADVERSARIAL, RESTORED, attacker_title, class_name, clean_of, restored_figure, save
from unperturb.results.flags import FLAGS, Flag, flags_of
from unperturb.results.ladder_figure import eps_curve, eps_figure, eps_places, ladder, ladder_figure
from unperturb.results.names import CLEAN, attack_name, attacker_name, budget_name, norm_name, one_line, renamed
from unperturb.results.render import percent
from unperturb.results.results import Block, Results, records
from unperturb.results.robust import ADAPTIVE, TOLERANCE, Judged, RobustAccuracy, proportion, robust_accuracy
from unperturb.results.samples import read_samples
from unperturb.runs import read_json, write_text
from unperturb.threat_models import KNOWLEDGE, ThreatModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1
SHOWN = 6  # images of an attack
RESTORED_CLEAN = 2  # where the system's answer to the clean image stands in a sample's `confidence` and `prediction`
DESK, TELEPHONE = 9.6, 3.6  # inches that a figure has on a wide screen and on a narrow one
Sample = tuple[dict[str, Any], dict[str, Any]]


class Card:
    """One system, the undefended one beside it: headline with its flags, ladder, accuracy against eps, cost, sample
    images, every attack, and all settings.

    results: of one block, or with a system that stands in one alone. system: which, where there are several that are
    defended. threat_model: what the headline is held against; by default all knowledge, at the budget of most cells.
    flags: by default what `flags_of` raises; those of other systems are left out. settings: what the run was asked for,
    by name, nested as it likes; `budget`, if it is there, is named in the headline.

    `data` is all of it, in values that JSON knows. The same rows, flags and settings give the same `data` but for
    `data["times"]`.

    Raises `ValueError` where it is not clear which system is meant, or where no attack on it is admitted.
    """

    def __init__(
        self,
        results: Results,
        *,
        system: str | None = None,
        threat_model: ThreatModel | None = None,
        flags: Iterable[Flag] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        system = _which(results) if system is None else system
        results, original = results.readable(), system
        system = results.renamed("system").get(system, system)
        threat_model = threat_model or _default(results, system)
        block = robust_accuracy(results, threat_model, system=system).block  # says what is wrong, where anything is
        systems = _beside(results, block, system)
        self._results, self._threat_model = results.where(**block._asdict(), system=list(systems)), threat_model
        self._samples = _strongest(results, systems[system], threat_model)
        doubts = [flag for flag in raised(results, flags) if flag.system in (system, original)]
        cost, times = _spent(results, systems[system])
        environments = [read_json(f / "environment.json") for f in results.runs if (f / "environment.json").exists()]
        self.data: dict[str, Any] = _plain(
            _about(systems[system], threat_model, settings or {})
            | _numbers(results, systems, threat_model)
            | {
                "flags": [_flag(flag) for flag in doubts if _concerns(flag, block)],
                "cost": cost,
                "samples": [_views(cell, tensors) for cell, tensors in self._samples],
                "names": results.names,
                "environment": [{k: v for k, v in of.items() if k != "date"} for of in environments],
                "times": times | {"dates": [of.get("date") for of in environments]},
            }
        )

    def json(self) -> str:
        """`data` as indented JSON."""
        return json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def markdown(self, pictures: Mapping[str, str] | None = None) -> str:
        """The card to be read as Markdown. pictures: where those of "ladder", "eps" and "samples-N" lie, if they do."""
        page, of = templates(escape=False).get_template("card.md.jinja"), self.data["ladder"].values()
        tried = {step["knowledge"] for steps in of for step in steps if step["tried"]}
        steps = [kind for kind in (CLEAN, *KNOWLEDGE) if kind in tried]
        return page.render(**self._said(), steps=steps, pictures=pictures or {})

    def html(self) -> str:
        """The card as one page that asks nothing of the network."""
        charts = {
            name: {"wide": figure_data(draw(DESK)), "narrow": figure_data(draw(TELEPHONE))}
            for name, draw in self._charts().items()
        }
        tiles = [
            [[image_data(tensors[view["what"]][i]) for view in image["views"]] for i, image in enumerate(of["images"])]
            for of, (_, tensors) in zip(self.data["samples"], self._samples)
        ]
        page = templates().get_template("card.html.jinja")
        return page.render(**self._said(), charts=charts, tiles=tiles, crisp=CRISP)

    def write(self, out: str | Path) -> dict[str, Path]:
        """Write `card.html`, `card.md`, `card.json` and the pictures that the Markdown shows into the folder `out`;
        returns their paths by name."""
        out = Path(out)
        drawn = {name: save(draw(DESK), out / f"card-{name}.png") for name, draw in self._charts().items()}
        for number, (cell, tensors) in enumerate(self._samples):
            drawn[f"samples-{number}"] = save(restored_figure(cell, tensors), out / f"card-samples-{number}.png")
        written = {name: out / f"card.{name}" for name in ("html", "md", "json")}
        write_text(written["html"], self.html())
        write_text(written["md"], self.markdown({name: path.name for name, path in drawn.items()}))
        write_text(written["json"], self.json())
        return written | {path.stem: path for path in drawn.values()}

    def _charts(self) -> dict[str, Callable[[float], Figure]]:
        """What draws each chart that says something, at a width in inches."""
        results, norm, eps = self._results, self._threat_model.norm, float(self._threat_model.eps)
        charts = {"ladder": lambda width: ladder_figure(results, eps, norm=norm, width=width)}
        if (curves := self.data["against_eps"]) is not None:
            charts["eps"] = lambda width: eps_figure(results, norm=norm, width=width, most=curves["eps"][-1])
        return charts

    def _said(self) -> dict[str, Any]:
        """What the templates say: `data`, and what follows from it in words."""
        data, threat = self.data, self.data["threat_model"]
        bare = {of["system"]: of for of in data["undefended"]}
        bare |= {} if data["defended"] else {data["system"]: data["result"]}
        return {
            "card": data,
            "title": f"{_within(threat)}, {_who(data['result'])}",
            "void": _void(data),
            "pages": {flag["name"]: flag_page(flag["name"]) for flag in data["flags"]},
            "direct": [name for name, of in bare.items() if "white_box" in of["tried"]],  # nobody can know more
            "verdict": _verdict(data),
            "lines": _headline(data),
            "sizes": {data["system"]: data["result"]["n"]} | {of["system"]: of["n"] for of in data["undefended"]},
            "costs": _costs(data),
            "settings": list(_flat(data["settings"])),
            "conditions": [
                *_records(data["attacks"]),
                *((f"{column} {new}", old) for column, of in data["names"].items() for new, old in of.items()),
                *(line for of in data["environment"] for line in _flat(of)),
                *(("date", date) for date in data["times"]["dates"] if date),
            ],
        }


def _which(results: Results) -> str:
    """The one system that can be meant where none is named."""
    systems = results.cells[["system", "defended"]].drop_duplicates()
    for choices in (list(systems["system"][systems["defended"]].unique()), list(systems["system"].unique())):
        if len(choices) == 1:
            return str(choices[0])
    raise ValueError(f"a card is of one system; say which: {', '.join(map(str, systems['system']))}")


def _default(results: Results, system: str) -> ThreatModel:
    """All knowledge, at the budget of most cells of the block."""
    for block, systems in results.systems.items():
        if system in systems and (budgets := results.budgets(block)):
            return ThreatModel(*budgets[0])
    raise ValueError(
        f"no attack on {system} had a budget: say what it is held against, as ThreatModel('linf', '8/255')"
    )


def _beside(results: Results, block: Block, system: str) -> dict[str, Judged]:
    """The system, and what stands undefended beside it where it is defended, by their names."""
    judged = Judged.of(results, block, system)
    others = (Judged.of(results, block, name) for name in results.systems[block] if name != system)
    bare = [other for other in others if judged.defended and not other.defended and len(other.index)]
    return {one.system: one for one in (judged, *bare[:1])}


def _concerns(flag: Flag, block: Block) -> bool:
    """Whether a flag was raised in this block."""
    return flag.dataset in ("", block.dataset) and (not flag.classifiers or block.classifier in flag.classifiers)


def raised(results: Results, flags: Iterable[Flag] | None = None) -> list[Flag]:
    """Flags, by default all that `flags_of` raises, under the names that `results` has made readable."""
    names = {column: results.renamed(column) for column in ("system", "dataset", "classifier")}

    def named(flag: Flag) -> Flag:
        classifiers = tuple(names["classifier"].get(name, name) for name in flag.classifiers)
        system, dataset = (names[k].get(v, v) for k, v in (("system", flag.system), ("dataset", flag.dataset)))
        return replace(flag, system=system, dataset=dataset, classifiers=classifiers)

    return [named(flag) for flag in (flags_of(results) if flags is None else flags)]


# Numbers ------------------------------------------------------------------------------------------------------------


def _about(judged: Judged, threat_model: ThreatModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is judged, and what it is held against."""
    norm, eps, knowledge = threat_model.norm, float(threat_model.eps), threat_model.knowledge
    return {
        "card": VERSION,
        "system": judged.system,
        **judged.block._asdict(),
        "threat_model": {"norm": norm, "eps": eps, "knowledge": knowledge},
        "budget": settings.get("budget"),
        "settings": settings,
        "defended": judged.defended,
        "adaptive": judged.adaptive,
    }


def _numbers(results: Results, systems: Mapping[str, Judged], threat_model: ThreatModel) -> dict[str, Any]:
    """What is left of each system, the first of which is the one that is judged."""
    judged, *bare = systems.values()
    norm, eps = threat_model.norm, float(threat_model.eps)
    return {
        "result": _result(judged, threat_model),
        "undefended": [
            {"system": other.system, "adaptive": other.adaptive} | _result(other, threat_model) for other in bare
        ],
        "ladder": {name: [step._asdict() for step in ladder(one, norm, eps)] for name, one in systems.items()},
        "against_eps": _curves(systems, threat_model),
        "attacks": list(_attacks(results, judged, norm)),
    }


def _result(judged: Judged, threat_model: ThreatModel) -> dict[str, Any]:
    """The accuracies of one system: n, draws, and clean, oblivious, robust, worst (in every draw) and paper, each with
    its interval, None where nothing was tried; tried: what the best informed of the attackers behind `robust` knew."""
    left = judged.under(threat_model)
    oblivious = judged.left(threat_model.norm, float(threat_model.eps))["oblivious"]
    ends = ("accuracy", "low", "high")
    found = {
        "clean": dict(zip(ends, clean_of(judged) or ())),
        "oblivious": _ends(oblivious),
        "robust": _ends(left),
        "worst": left and dict(zip(ends, (left.worst, left.worst_low, left.worst_high))),
        "paper": _ends(judged.by_the_paper(float(threat_model.eps))),
    }
    return {"n": len(judged.index), "draws": len(judged.clean), "tried": left.tried if left else (), **found}


def _ends(found: RobustAccuracy | None) -> dict[str, float] | None:
    return None if found is None else {"accuracy": found.accuracy, "low": found.low, "high": found.high}


def _curves(systems: Mapping[str, Judged], threat_model: ThreatModel) -> dict[str, Any] | None:
    """Robust accuracy at each of `eps`, by system and kind of knowledge that was tried on it; None where no attack had
    that budget and none was without one. None at all where there is one budget, which the ladder shows."""
    norm, cells = threat_model.norm, [one.cells for one in systems.values()]
    tried = {round(float(eps), 7) for of in cells for eps in of["eps"][(of["norm"] == norm) & (of["eps"] > 0)]}
    if len(tried) < 2 and not any(of["eps"].isna().any() for of in cells):
        return None
    tried.add(float(threat_model.eps))
    places = eps_places(sorted(tried), 1.15 * max(tried), norm)

    def curve(one: Judged, knowledge: str) -> list[float | None]:
        budgets = one.cells[one.among(KNOWLEDGE[knowledge].includes)]["eps"].to_numpy(float)
        tried_there = [bool(((budgets != budgets) | (abs(budgets - eps) < 1e-6)).any()) for eps in places]
        return [at if known else None for at, known in zip(eps_curve(one, norm, knowledge, places), tried_there)]

    curves = {
        name: {k: curve(one, k) for k in KNOWLEDGE if (one.cells["knowledge"] == k).any()}
        for name, one in systems.items()
    }
    return {"eps": places, "accuracy": curves}


def _spent(results: Results, judged: Judged) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a system and the attacks on it cost: numbers that stay, and times."""
    about = results.about(judged.system, judged.block.dataset)
    rows = results.rows[results.rows["cell"].isin(judged.cells.index)]
    made = rows[(rows["made_by"] == "") & (rows["draw"] == rows["draw"].min())]
    gradients = int(made["gradients"].clip(lower=0).sum())
    cost = {"training_pflop": about.get("pflop"), "gradients": gradients}
    times = {
        "purify_ms": 1000 * float(rows["seconds_purify"].median()),
        "attack_seconds": float(made["seconds_attack"].clip(lower=0).sum()),
        "training_seconds": about.get("seconds"),
    }
    return cost | {k: about.get(k) for k in ("differentiable", "random")}, times


def _flag(flag: Flag) -> dict[str, Any]:
    return {
        "number": flag.number,
        "name": flag.name,
        "severity": flag.severity,
        "says": flag.says,
        "meaning": FLAGS[flag.name].meaning,
        "evidence": flag.evidence,
    }


def _attacks(results: Results, judged: Judged, norm: str) -> Iterator[dict[str, Any]]:
    """Each attack alone: what it leaves, how far its images are, and how often it met no gradient."""
    outcomes = results.outcomes
    for place, (number, cell) in enumerate(records(judged.cells)):
        mine = outcomes[outcomes["cell"] == number]
        turned = mine[~mine["right"] & mine["clean_right"]]
        yield {
            "knowledge": cell["knowledge"],
            "attacker": attacker_title(cell["knowledge"], defended=judged.defended),
            "attack": cell["short"],
            "name": cell["name"],
            "norm": cell["norm"],
            "eps": float(cell["eps"]),
            "record": cell["attack_repr"],
            "surrogate": cell["surrogate"],
            "seed": int(cell["seed"]),
            **proportion(judged.right[place].mean(axis=0)),
            "distance": float(turned[norm].median()),
            "zero_gradients": float(mine["zero_gradients"].mean()),
            "inherited": float(mine["inherited"].mean()),
        }


def _strongest(results: Results, judged: Judged, threat_model: ThreatModel) -> list[Sample]:
    """What the runs kept of a system under two attacks: those that leave least within the budget, of who does not know
    of it and of who does."""
    within = judged.distances[threat_model.norm] <= float(threat_model.eps) + TOLERANCE[threat_model.norm]
    stands = (judged.right | ~within).mean(axis=(1, 2))
    names = {column: results.renamed(column) for column in results.names}
    left = {}
    keys = ["knowledge", "attack", "attack_repr", "surrogate", "seed"]
    for place, (_, cell) in enumerate(records(judged.cells)):
        left[tuple(cell[k] for k in keys)] = (stands[place], -list(KNOWLEDGE).index(cell["knowledge"]))
    best: dict[bool, tuple[Any, Sample]] = {}
    for run in results.runs:
        for cell, tensors in read_samples(run):
            cell = renamed(cell, names)
            if tuple(cell[k] for k in ("dataset", "split", "classifier")) != judged.block:
                continue
            if cell["system"] != judged.system or (key := tuple(cell[k] for k in keys)) not in left:
                continue
            knows, few = cell["knowledge"] in ADAPTIVE, {k: v[:SHOWN] for k, v in tensors.items()}
            if cell["knowledge"] == "none" or (knows in best and best[knows][0] <= left[key]):
                continue
            best[knows] = (left[key], (cell, few))
    return [best[knows][1] for knows in sorted(best)]


def _views(cell: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What is seen of each sampled image. The system answers to the clean image and to the attacked one; where it
    restores that, the attacked one as it is shows what the undefended classifier makes of it."""
    restores = not bool((tensors["restored"] == tensors["adversarial"]).all())
    views = [("clean", RESTORED_CLEAN), ("adversarial", ADVERSARIAL if restores else RESTORED)]
    views += [("restored", RESTORED)] if restores else []

    def seen(i: int, what: str, view: int) -> dict[str, Any]:
        answer = int(tensors["prediction"][i, view])
        right, sure = answer == int(tensors["label"][i]), float(tensors["confidence"][i, view])
        return {"what": what, "class": class_name(cell, answer), "right": right, "confidence": sure}

    images = [
        {
            "index": int(tensors["index"][i]),
            "label": class_name(cell, int(tensors["label"][i])),
            "views": [seen(i, what, view) for what, view in views],
        }
        for i in range(len(tensors["label"]))
    ]
    name = attack_name(cell["attack"], float(cell["eps"]))
    attacker = attacker_title(cell["knowledge"], defended=cell["defended"])
    about = {"attack": name, "attacker": attacker, "restores": restores}
    return about | {"size": max(tensors["clean"].shape[2:]), "images": images}


def _plain(value: Any) -> Any:
    """`value` in what JSON knows: numbers of six digits behind the point, None for those that are none."""
    if isinstance(value, Mapping):
        return {one_line(key): _plain(of) for key, of in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(of) for of in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):  # of numpy and torch
        return _plain(value.tolist())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return round(value, 6) if abs(value) < float("inf") else None
    return str(value)


# Words --------------------------------------------------------------------------------------------------------------


def _verdict(data: Mapping[str, Any]) -> list[str]:
    """The headline, a sentence each."""
    threat, of = data["threat_model"], data["result"]
    said = [
        f"So many of {of['n']:,} images are right when clean and under every attack that was tried within "
        f"{_within(threat)}, by attackers up to {_who(of)}."
    ]
    if of["draws"] > 1:
        said.append(
            f"The system is random: this is the mean of {of['draws']} draws; right in all of them are "
            f"{percent(of['worst']['accuracy'])}."
        )
    if not data["adaptive"]:
        said.append("Nobody who knows of the system attacked it: this does not say what it is worth once it is known.")
    elif not any(threat["knowledge"] in KNOWLEDGE[kind].includes for kind in of["tried"]):
        said.append(f"No {attacker_name(threat['knowledge'])} attack was tried: it may leave less.")
    if _void(data):
        said.append("A flag says that this number is not what it seems.")
    return said


def _void(data: Mapping[str, Any]) -> bool:
    """Whether a flag says that the headline is too high; nothing is lower than none."""
    broken = any(flag["severity"] == "broken" for flag in data["flags"])
    return broken and data["result"]["robust"]["accuracy"] > 0


def _within(threat_model: Mapping[str, Any]) -> str:
    return f"{norm_name(threat_model['norm'])} {budget_name(threat_model['eps'])}"


def _who(result: Mapping[str, Any]) -> str:
    """What the best informed attackers that were tried knew: `black box and BPDA`."""
    return " and ".join(map(attacker_name, result["tried"]))


def _headline(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the headline's table: what each system keeps, in the order of who attacks."""
    systems = [{"system": data["system"], "adaptive": data["adaptive"]} | data["result"]]
    systems += data["undefended"]
    heads = [("clean", "clean", "no attack"), ("oblivious", "oblivious", "oblivious attackers")]
    heads = [*heads[: 2 if data["defended"] else 1], ("robust", "adaptive", "every attacker tried")]
    naive = data["threat_model"]["knowledge"] not in ADAPTIVE
    lines = []
    for key, style, name in heads:
        shown = [of[key] if key != "robust" or naive or of["adaptive"] else None for of in systems]
        if key == "robust":
            shown = [v and v | {"who": f"up to {_who(of)}"} for of, v in zip(systems, shown)]
        lines.append({"name": name, "style": style, "of": [(of["system"], v) for of, v in zip(systems, shown)]})
    if data["result"]["paper"]:
        shown = [of["paper"] for of in systems]
        name = "paper protocol (oblivious, any distance)"
        lines.append({"name": name, "style": "oblivious", "of": [(o["system"], v) for o, v in zip(systems, shown)]})
    return lines


def _records(attacks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each attack with its whole record and seed, and who made it."""
    found: dict[tuple[str, str], list[str]] = {}
    for of in attacks:
        source = f"{of['attacker']} from {of['surrogate']}" if of["surrogate"] else of["attacker"]
        found.setdefault((of["name"], f"{of['record']}; seed {of['seed']}"), []).append(source)
    for (name, record), sources in found.items():
        yield name, f"{record}; {', '.join(dict.fromkeys(sources))}"


def _costs(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost, times = data["cost"], data["times"]
    free = times["purify_ms"] is not None and times["purify_ms"] < FREE_MS
    said = [("purifying an image", "no purifier" if free else _amount(times["purify_ms"], "ms"))]
    training = [_amount(cost["training_pflop"], "PFLOP"), _amount(times["training_seconds"], "s")]
    said.append(("training", ", ".join(dict.fromkeys(training))))
    said.append(("attacking it", f"{_amount(times['attack_seconds'], 's')}, {cost['gradients']:,} gradients of images"))
    if cost["differentiable"] is not None:
        gradient = "exact" if cost["differentiable"] else "none: a surrogate for the backward pass (BPDA)"
        said.append(("gradient", gradient + (", mean over draws" if cost["random"] else "")))
    return said


def _amount(value: float | None, unit: str) -> str:
    return "not known" if value is None else f"{value:,.0f} {unit}" if value >= 99.5 else f"{value:.2g} {unit}"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of a nest of settings; the innermost of a nest are one line: `attacks 1`, `name pgd, eps 0.3`."""
    if isinstance(value, list) and any(isinstance(of, list | dict) for of in value):
        value = {i + 1: of for i, of in enumerate(value)}
    if not isinstance(value, Mapping):
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    elif name and not any(isinstance(of, list | dict) for of in value.values()):
        yield name, ", ".join(f"{key} {of}" for key, of in value.items())
    else:
        for key, of in value.items():
            yield from _flat(of, f"{name} {key}" if name else str(key))
