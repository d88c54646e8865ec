"""What is known of one system in one block, laid out for doubts: its attacks, its images, and who is ahead of whom."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from unperturb.results.names import attack_name
from unperturb.threat_models import KNOWLEDGE

if TYPE_CHECKING:
    import pandas as pd

    from unperturb.results.results import Block, Results

WHOLE = ("white_box", "bpda")  # the kinds of knowledge that differentiate the whole system
LEAST = 2  # images that a contradiction takes: one may be a draw, or the last bits of a kernel


@dataclass(frozen=True)
class Case:
    """One system in one block.

    cells: its lines of `Results.cells`, by the cell's number. images: a line per cell and image (`images_of`). probe:
    numbers of `unperturb.evaluation.probe`, empty where it was not probed. random: whether it says that two calls may
    differ. trained: whether it is an adversarially trained net, as far as can be told. compared: whether such a one
    stands beside it.
    """

    system: str
    defended: bool
    cells: pd.DataFrame
    images: pd.DataFrame
    probe: Mapping[str, Any] = field(default_factory=dict)
    random: bool = False
    trained: bool = False
    compared: bool = False

    @cached_property
    def attacks(self) -> pd.DataFrame:
        """`cells` with what a check asks of an attack: `sees` (the knowledge that it amounts to: who attacks an
        undefended system sees all), `kind` (its class), `steps` (0 where it has none), `gradients` (it uses them),
        `settings` (its record without steps, restarts and budget), `called` (such as `white box pgd-40, eps 0.3`)."""
        cells = self.cells
        sees = cells["knowledge"].mask((cells["knowledge"] == "oblivious") & (not self.defended), "white_box")
        asked = self.images.groupby("cell")["gradients"].max().reindex(cells.index)
        names = zip(sees, cells["short"], cells["eps"])
        return cells.assign(
            sees=sees,
            kind=[text.partition("(")[0] for text in cells["attack_repr"]],
            steps=[_steps(text) for text in cells["attack_repr"]],
            gradients=asked.fillna(0) > 0,
            settings=[re.sub(r"(?<![a-z_])(steps|restarts|alpha|eps)=[^,)]+", "", t) for t in cells["attack_repr"]],
            called=[f"{KNOWLEDGE[kind].title} {attack_name(short, eps)}" for kind, short, eps in names],
        )

    @property
    def probed(self) -> int:
        """How many images the probe's numbers are of."""
        return round(self.probe.get("n", 0) * (1 - self.probe.get("no_answer", 0)))

    def guessing(self, n: int) -> float:
        """The most that guessing the class of `n` images comes to: three standard errors above chance (a tenth, where
        the number of classes is not known)."""
        chance = 1 / self.probe.get("classes", 10)
        return chance + 3 * (chance * (1 - chance) / max(n, 1)) ** 0.5

    def seeing(self, *kinds: str) -> pd.DataFrame:
        """The attacks of who has one of these kinds of knowledge."""
        return self.attacks[self.attacks["sees"].isin(kinds)]

    def sees_most(self) -> pd.DataFrame:
        """The white-box attacks, or where there are none those by BPDA."""
        most = self.seeing("white_box")
        return most if len(most) else self.seeing("bpda")

    def _called(self, cell: Any) -> str:
        return str(self.attacks["called"][cell])

    def of(self, attacks: pd.DataFrame) -> pd.DataFrame:
        """The images of these attacks."""
        return self.images[self.images["cell"].isin(attacks.index)]

    def broken(self, attacks: pd.DataFrame, norm: str = "", eps: float = float("inf")) -> pd.Series[float]:
        """By image, how often the worst of these attacks breaks it within `eps`: the fraction of draws; 0 where none
        came so near. Without a norm, at any distance."""
        images = self.of(attacks)
        wrong = images["wrong"].where(images[norm] <= eps + slack(norm, eps), 0.0) if norm else images["wrong"]
        return wrong.groupby(images["index"]).max()

    def robust(self, attacks: pd.DataFrame, norm: str = "", eps: float = float("inf")) -> tuple[int, int]:
        """(images that are right when clean and withstand all of these attacks within `eps`, images)."""
        right = self.of(attacks).groupby("index")["clean"].min() > 0.5
        broken = self.broken(attacks, norm, eps) > 0.5
        return int((right & ~broken).sum()), len(broken)

    def ahead(self, weak: pd.DataFrame, strong: pd.DataFrame, least: float) -> Ahead | None:
        """Where the attacks `weak` are ahead of `strong`, image by image, at the budget where most images say so.

        An image counts where it is right when clean, `strong` had that budget and was really tried (not in a cascade
        that had broken it before), and `weak` breaks it in more draws, by half of all, than `strong`. None for
        fewer than `LEAST` images, or for no more than `least` of them, a fraction.
        """
        found = list[Ahead]()
        own = self.images[~self.images["inherited"]]
        mine = own[own["cell"].isin(weak.index) & (own["clean"] > 0.5)]
        budgets = strong[strong["norm"] != ""].drop_duplicates(["norm", "eps"])
        for norm, eps in zip(budgets["norm"], budgets["eps"]):
            as_large = strong[(strong["norm"] == norm) & (strong["eps"] >= eps - 1e-6)]
            tried = mine[mine["index"].isin(own.loc[own["cell"].isin(as_large.index), "index"])]
            shares = self.of(as_large).groupby("cell")["wrong"].mean()
            broken = tried["index"].map(self.broken(strong, norm, eps)).fillna(0)
            hits = tried[(tried[norm] <= eps + slack(norm, eps)) & (tried["wrong"] - broken > 0.5)]
            index, n = sorted(map(int, hits["index"].unique())), tried["index"].nunique()
            if len(index) >= LEAST and len(index) > least * n:
                most, best = (self._called(part.idxmax()) for part in (hits["cell"].value_counts(), shares))
                found.append(Ahead(norm, float(eps), index, n, most, best))
        return max(found, key=lambda a: a.fraction, default=None)


@dataclass(frozen=True)
class Ahead:
    """Images of `n` that some attacks break and others of the same budget do not. weak, strong: what the attack is
    called that breaks most of them, and that of the others which breaks most."""

    norm: str
    eps: float
    images: list[int]
    n: int
    weak: str
    strong: str

    @property
    def fraction(self) -> float:
        return len(self.images) / self.n


def cases_of(results: Results) -> Iterator[tuple[Block, Case]]:
    """Every system of every block."""
    images = images_of(results)
    for block, systems in results.systems.items():
        here = results.cells[(results.cells[list(block._fields)] == list(block)).all(axis=1)]
        probes = {name: results.probe(name, block.dataset, block.classifier) for name in systems}
        defended = {name: bool(here.loc[here["system"] == name, "defended"].any()) for name in systems}
        trained = {name: defended[name] and _is_trained(name, probes[name]) for name in systems}
        for name in systems:
            cells, about = here[here["system"] == name], results.about(name, block.dataset)
            yield (
                block,
                Case(
                    system=name,
                    defended=defended[name],
                    cells=cells,
                    images=images[images["cell"].isin(cells.index)],
                    probe=probes[name],
                    random=bool(about.get("random") or probes[name].get("random")),
                    trained=trained[name],
                    compared=any(trained[other] for other in systems if other != name),
                ),
            )


def _is_trained(name: str, probe: Mapping[str, Any]) -> bool:
    """Whether a defended system is an adversarially trained net: by its name, or since it has no purifier."""
    return bool(re.search("advers|robust", name.lower())) or probe.get("purifier") == 0


def images_of(results: Results) -> pd.DataFrame:
    """One line per cell and image of `results`.

    Columns: cell, index; clean, wrong, wrong_8bit: the fraction of draws in which the system is right on the image, and
    wrong on the adversarial one and on that one rounded to 8 bits (NaN: not recorded); l0, l2, linf; inherited; draws;
    zero: the fraction of gradients that were exactly zero (NaN: none); gradients: how many; unanswered: the fraction of
    draws without a finite answer to either image; base_clean, base_wrong: the base classifier's.
    """
    rows = results.rows
    label, unanswered = rows["label"], (rows["pred_pure_clean"] == -1) | (rows["pred_pure_adv"] == -1)
    frame = rows[["cell", "index", "l0", "l2", "linf", "gradients"]].assign(
        clean=(rows["pred_pure_clean"] == label).astype(float),
        wrong=(rows["pred_pure_adv"] != label).astype(float),
        wrong_8bit=(rows["pred_pure_adv_8bit"] != label).astype(float).mask(rows["pred_pure_adv_8bit"] == -2),
        inherited=rows["made_by"] != "",
        draws=1,
        zero=(rows["zero_gradients"] / rows["gradients"].where(rows["gradients"] > 0)).clip(0, 1),
        unanswered=unanswered.astype(float),
        base_clean=(rows["pred_clean"] == label).astype(float),
        base_wrong=(rows["pred_adv"] != label).astype(float),
    )
    means = dict.fromkeys(("clean", "wrong", "wrong_8bit", "unanswered", "base_clean", "base_wrong"), "mean")
    same = dict.fromkeys(("l0", "l2", "linf", "inherited", "zero", "gradients"), "first")
    return frame.groupby(["cell", "index"], as_index=False).agg({**means, **same, "draws": "sum"})


def slack(norm: str, eps: float) -> float:
    """What storing images at 16 bits may add to a distance: half a level a pixel; in L2 that depends on the size."""
    return {"linf": 2e-5, "l2": 0.01 * eps + 1e-3}.get(norm, 0.5)


def _steps(text: str) -> int:
    """How many steps an attack's record says that it takes, restarts included; 1 for FGSM, 0 where it has none."""
    if text.startswith("FGSM("):
        return 1
    steps, restarts = (re.search(rf"(?<![a-z_]){name}=(\d+)", text) for name in ("steps", "restarts"))
    return int(steps[1]) * (int(restarts[1]) if restarts else 1) if steps else 0
