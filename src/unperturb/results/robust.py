"""Robust accuracy, defined once: right when clean and under every attack that a threat model admits."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from unperturb import intervals
from unperturb.results.names import attacker_name, budget_name, norm_name
from unperturb.results.results import BLOCK, Block, Results
from unperturb.threat_models import KNOWLEDGE, ThreatModel

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# How much farther than its budget an attack may seem to go: its images are kept in 16 bits, 7.6e-6 to a pixel, which in
# L2 adds up over the pixels. Places that changed are counted, not measured.
TOLERANCE = {"linf": 2e-5, "l2": 5e-4, "l0": 0.5}
PAPER = ("FGSM", "PGD", "MIM", "JSMA", "CW", "DeepFool")  # the six attacks of the paper, by their classes
# What is known of the defense, where anything is: more than who attacks another classifier, or the undefended one.
ADAPTIVE = tuple(k for k, kind in KNOWLEDGE.items() if kind.includes >= {"transfer", "oblivious"})
wilson = functools.cache(intervals.wilson)  # most tables ask for the same few


@dataclass(frozen=True, eq=False)
class RobustAccuracy:
    """How many images stand, all numbers in [0, 1].

    n: images that every cell of the system saw. accuracy, low, high: the fraction that stands, with its 95 % Wilson
    interval; of a random system the mean over its draws, in each of which all attacks are held against it together.
    draws: how many. worst, worst_low, worst_high: the fraction that stands in every draw. clean: the fraction that is
    right when nobody attacks. attacks: the cells that counted, a part of `Results.cells`. images: by index, in which
    fraction of the draws an image stands. threat_model: None for what the paper counts.
    """

    block: Block
    system: str
    threat_model: ThreatModel | None
    n: int
    accuracy: float
    low: float
    high: float
    draws: int
    worst: float
    worst_low: float
    worst_high: float
    clean: float
    attacks: pd.DataFrame = field(repr=False)
    images: pd.Series[float] = field(repr=False)

    @property
    def tried(self) -> tuple[str, ...]:
        """What the best informed of the attackers that counted knew: those kinds that none of the others includes. Who
        attacks directly what is undefended knows all of it."""
        pairs = zip(self.attacks["knowledge"], self.attacks["defended"])
        known = {"white_box" if kind == "oblivious" and not defended else kind for kind, defended in pairs}
        return tuple(k for k in KNOWLEDGE if k in known and not any(k in KNOWLEDGE[o].includes for o in known - {k}))


def robust_accuracy(results: Results, threat_model: ThreatModel, *, system: str | None = None) -> RobustAccuracy:
    """The fraction of images that a system is right on when clean and under every attack that `threat_model` admits.

    An attack counts against an image where its attacker knows no more than the threat model's, and where the
    adversarial image is at most eps away, in the threat model's norm, by the image's own row: so that an attack that
    minimizes the distance counts where it stayed inside. Only images that every cell of the system saw count, whatever
    those cells know. So more knowledge, more attacks on the same images or a larger eps never raise it.

    results: of one system in one block, or of several with `system` the name of one.

    Raises `ValueError` where it is not clear which system is meant, where no attack that was tried is admitted, or
    where its attacks have no image in common.
    """
    judged = _one_of(results, system)
    found = judged.under(threat_model)
    if found is None:
        tried = "; ".join(f"{attacker_name(k)}: {n}" for k, n in zip(judged.cells["knowledge"], judged.cells["name"]))
        budget = f"{norm_name(threat_model.norm)} {budget_name(float(threat_model.eps))}"
        raise ValueError(
            f"no attack of at most {budget} by {attacker_name(threat_model.knowledge)} was tried on {judged.system}: "
            "its accuracy would be that on clean images; or only on what a stronger attacker had left. There are "
            f"{tried}"
        )
    return found


def paper_accuracy(results: Results, system: str | None = None, *, eps: float | None = None) -> RobustAccuracy:
    """What the paper counts: images that are right when clean and under all of its six attacks that were made on the
    undefended classifier, whatever their distance.

    results, system: as in `robust_accuracy`, and the same images count. eps: only attacks of this budget, or without
    one. Raises `ValueError` as `robust_accuracy` does. Source: the paper, Tables 1-3.
    """
    judged = _one_of(results, system)
    found = judged.by_the_paper(eps)
    if found is None:
        raise ValueError(f"none of {', '.join(PAPER)} was tried on {judged.system} by an oblivious attacker")
    return found


def proportion(fractions: Any) -> dict[str, Any]:
    """n, accuracy and its interval (low, high; 95 % Wilson) of one number in [0, 1] per image."""
    n = len(fractions)
    low, high = wilson(round(float(fractions.sum())), n)
    return {"n": n, "accuracy": float(fractions.mean()) if n else float("nan"), "low": low, "high": high}


@dataclass(frozen=True, eq=False)
class Judged:
    """What one system made of the images that all of its cells saw, in the draws that all of them have.

    cells: a part of `Results.cells`, C lines. index: `(N,)` the images. clean: bool `(D, N)`, right when clean in each
    draw. right: bool `(C, D, N)`. distances: by norm, `(C, D, N)`. made_with: `(C, N)`, what another cell's attacker
    knew, who made the adversarial image, or "".
    """

    block: Block
    system: str
    defended: bool
    cells: pd.DataFrame
    index: np.ndarray[Any, Any]
    clean: np.ndarray[Any, Any]
    right: np.ndarray[Any, Any]
    distances: dict[str, np.ndarray[Any, Any]]
    made_with: np.ndarray[Any, Any]

    @classmethod
    def of(cls, results: Results, block: Block, system: str) -> Judged:
        import numpy as np

        cells = results.cells
        cells = cells[(cells[[*BLOCK, "system"]] == [*block, system]).all(axis=1)]
        seen = results.outcomes[results.outcomes["cell"].isin(cells.index)]
        per_draw = seen.groupby("draw")["cell"].nunique()
        seen = seen[seen["draw"].isin(per_draw.index[per_draw == len(cells)])]
        draws = seen["draw"].nunique()
        per_image = seen.groupby("index").size()
        index = per_image.index[per_image == len(cells) * draws].to_numpy()
        seen = seen[seen["index"].isin(index)]  # in the order of cell, draw and image
        shape = (len(cells), draws, len(index))
        return cls(
            block,
            system,
            bool(cells["defended"].iloc[0]),
            cells,
            index,
            # The cells repeat what is right when clean; where they differ, nothing is taken for right.
            np.asarray(seen["clean_right"].to_numpy().reshape(shape).all(axis=0)),
            seen["right"].to_numpy().reshape(shape),
            {norm: seen[norm].to_numpy().reshape(shape) for norm in TOLERANCE},
            seen["made_with"].to_numpy(dtype=object).reshape(shape)[:, 0] if draws else np.empty((len(cells), 0)),
        )

    @property
    def adaptive(self) -> bool:
        """Whether an attacker of the system itself was tried: of its defense, or directly of what has none."""
        direct = () if self.defended else ("oblivious",)
        return bool(self.cells["knowledge"].isin([*ADAPTIVE, *direct]).any())

    def left(self, norm: Any, eps: float) -> dict[str, RobustAccuracy | None]:
        """Robust accuracy under "oblivious" attackers, and under every attacker that was tried, "adaptive"; None where
        there was no such attacker."""
        tried = {"oblivious": bool((self.cells["knowledge"] == "oblivious").any()), "adaptive": self.adaptive}
        kinds = {"oblivious": "oblivious", "adaptive": "white_box"}
        return {k: self.under(ThreatModel(norm, eps, kinds[k])) if tried[k] else None for k in kinds}

    def only(self, cells: Any) -> Judged:
        """The same images under some of the cells: bool `(C,)`."""
        distances = {norm: of[cells] for norm, of in self.distances.items()}
        parts = {"cells": self.cells[cells], "right": self.right[cells], "made_with": self.made_with[cells]}
        return replace(self, distances=distances, **parts)

    def among(self, kinds: Collection[str]) -> Any:
        """Bool `(C,)`: the cells of attackers of these kinds of knowledge, but for those that a cascade made only on
        what others had left."""
        import numpy as np

        return self.cells["knowledge"].isin(kinds).to_numpy() & np.isin(self.made_with, ["", *kinds]).all(axis=1)

    def under(self, threat_model: ThreatModel) -> RobustAccuracy | None:
        """Its robust accuracy; None where no attack that was tried is admitted, or no image is left to count."""
        import numpy as np

        norm, eps = threat_model.norm, float(threat_model.eps)
        distance, most = self.distances[norm], eps + TOLERANCE[norm]
        admitted = np.array([threat_model.admits(knowledge) for knowledge in self.cells["knowledge"]])
        others = {kind for kind in self.made_with[admitted].ravel() if kind and not threat_model.admits(kind)}
        if others:  # made on what a stronger attacker had left: nobody knows what it does to the rest
            return None
        within = ~(distance > most)  # a distance that is no number is no excuse
        budgeted = (self.cells["norm"] == norm).to_numpy() & (self.cells["eps"] <= most).to_numpy()
        moved = (within & (distance > TOLERANCE[norm])).any(axis=(1, 2))
        return self._against(within & admitted[:, None, None], admitted & (budgeted | moved), threat_model)

    def by_the_paper(self, eps: float | None = None) -> RobustAccuracy | None:
        """What the paper counts; None where none of its attacks was tried."""
        import numpy as np

        kinds = [re.split(r"\W", record, maxsplit=1)[0] for record in self.cells["attack_repr"]]
        mine = np.array([kind in PAPER for kind in kinds]) & (self.cells["knowledge"] == "oblivious").to_numpy()
        if eps is not None:
            budgets = self.cells["eps"].to_numpy(float)
            mine &= np.isnan(budgets) | (np.abs(budgets - eps) < 1e-6)
        return self._against(np.broadcast_to(mine[:, None, None], self.right.shape), mine, None)

    def _against(self, counts: Any, cells: Any, threat_model: ThreatModel | None) -> RobustAccuracy | None:
        """counts: bool `(C, D, N)`, what is held against an image. cells: bool `(C,)`, which of them to name."""
        import pandas as pd

        if not cells.any() or not len(self.index):
            return None
        stands = self.clean & (self.right | ~counts).all(axis=0)
        images = pd.Series(stands.mean(axis=0), index=pd.Index(self.index, name="index"))
        worst = {f"worst_{k}": v for k, v in proportion(stands.all(axis=0)).items()}
        return RobustAccuracy(
            self.block,
            self.system,
            threat_model,
            **proportion(images),
            draws=len(stands),
            worst=worst["worst_accuracy"],
            worst_low=worst["worst_low"],
            worst_high=worst["worst_high"],
            clean=float(self.clean.mean()),
            attacks=self.cells[cells],
            images=images,
        )


def every_system(results: Results) -> list[Judged]:
    """Each system of each block, in the order of reading."""
    return [Judged.of(results, block, system) for block, systems in results.systems.items() for system in systems]


def _one_of(results: Results, system: str | None) -> Judged:
    """The one system that is meant."""
    choices = [(block, name) for block, names in results.systems.items() for name in names]
    mine = [(block, name) for block, name in choices if system in (None, name)]
    if len(mine) == 1:
        judged = Judged.of(results, *mine[0])
        if not len(judged.index):
            raise ValueError(f"the attacks on {judged.system} have no image in common to stand under all of them")
        return judged
    listed = "; ".join(f"{name} ({', '.join(block)})" for block, name in mine or choices)
    if not mine:
        raise ValueError(f"there is no system {system!r}; there are: {listed}")
    how = "pass system=" if system is None else "choose one with results.where(dataset=, split=, classifier=)"
    raise ValueError(f"robust accuracy is of one system in one block, and here are {len(mine)}: {listed}; {how}")
