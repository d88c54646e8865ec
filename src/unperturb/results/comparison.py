"""Systems side by side: a line each with everything measured of it, or two of them image by image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from unperturb.intervals import mcnemar
from unperturb.results.names import CLEAN, attack_rank
from unperturb.results.results import BLOCK, Block, Results, key_of, reading_order, records
from unperturb.results.robust import ADAPTIVE, Judged, RobustAccuracy, every_system, proportion
from unperturb.threat_models import KNOWLEDGE, ThreatModel

if TYPE_CHECKING:
    import pandas as pd

Column = tuple[str, str, str]  # group, name, number
KEYS = [*BLOCK, "norm", "eps", "system"]
ROBUST, PAPER, COST = "robust", "paper", "cost"  # groups of columns beside "clean" and the kinds of knowledge
NUMBERS = ("accuracy", "n", "low", "high")
COSTS = {"psnr": "float", "ssim": "float", "ms": "float", "pflop": "float"} | dict.fromkeys(
    ("differentiable", "random"), "boolean"
)
_UNTIL = [k for k in KNOWLEDGE if k not in ADAPTIVE]  # who knows nothing of the defense
_PLACES = [CLEAN, *_UNTIL, (ROBUST, "oblivious"), PAPER, *ADAPTIVE, (ROBUST, "white_box"), COST]


def comparison_table(results: Results, eps: float | None = None) -> pd.DataFrame:
    """One line per system and budget, numbers only; what is undefended comes first.

    The index: dataset, split, classifier, norm, eps, system. The columns have three levels, group, name and number:
    ("clean", "", ...); (KNOWLEDGE, ATTACK, ...) for each attack of this budget or without one that was tried on a
    defended system; ("robust", "oblivious", ...) and ("robust", "white_box", ...), the robust accuracy at this budget
    by who knows only the undefended classifier, and by every attacker tried, empty where none of them knows of the
    defense; ("paper", "oblivious", ...), what the paper counts. The numbers of each: accuracy, n, low, high (95 %
    Wilson). Then ("cost", ..., ""): psnr (dB) and ssim of the purified image, a mean over the oblivious attacks; ms
    that purifying takes an image; pflop of training; whether the purifier is differentiable, and random. What is not
    known is empty.

    Images of one split that were judged in several runs are put together, whatever part of it each run looked at, so n
    may differ. Who attacks what is undefended knows all there is: its oblivious attacks stand in the columns of "bpda"
    and "white_box" too. eps: only this budget.
    """
    results = results.whole_splits()
    per_image = results.outcomes.groupby(["cell", "index"])[["right", "clean_right"]].mean()
    beside = _beside(results)
    lines: dict[tuple[Any, ...], dict[Column, Any]] = {}
    by_block: dict[Block, list[Judged]] = {}
    for judged in every_system(results):
        by_block.setdefault(judged.block, []).append(judged)
    for block, systems in by_block.items():
        found = [b for b in results.budgets(block) if eps is None or abs(b[1] - eps) < 1e-6]
        no_budget: list[Any] = [("", float("nan"))] if eps is None else []
        for norm, budget in sorted(found, key=reading_order) or no_budget:
            attacks = _attacks(systems, norm, budget)
            for judged in systems:
                cells = _of_budget(judged.cells, norm, budget)
                if budget == budget and cells["eps"].isna().all():
                    continue  # nothing of this budget was tried
                line = _accuracies(judged, cells, attacks, per_image) | _robust(judged, norm, budget)
                about = results.about(judged.system, block.dataset)
                line |= {(COST, k, ""): v for k, v in _costs(cells, beside, about).items()}
                lines[(*block, norm, budget, judged.system)] = line
    return _framed(lines)


def _of_budget(cells: pd.DataFrame, norm: str, eps: float) -> pd.DataFrame:
    """The cells of a budget, and those without one."""
    return cells[((cells["norm"] == norm) & ((cells["eps"] - eps).abs() < 1e-6)) | cells["eps"].isna()]


def _attacks(systems: Iterable[Judged], norm: str, eps: float) -> list[tuple[str, str]]:
    """(knowledge, attack) of what was tried at a budget on what is defended, or, where nothing is, at all."""
    tried = [
        (judged.defended, cell["knowledge"], cell["short"])
        for judged in systems
        for _, cell in records(_of_budget(judged.cells, norm, eps))
    ]
    defended = [of for of in tried if of[0]]
    return list(dict.fromkeys((knowledge, attack) for _, knowledge, attack in defended or tried))


def _accuracies(
    judged: Judged, cells: pd.DataFrame, attacks: Iterable[tuple[str, str]], per_image: pd.DataFrame
) -> dict[Column, Any]:
    """Clean and under each attack."""
    seen = per_image.loc[list(cells.index)]
    line = _numbers(CLEAN, "", proportion(seen["clean_right"].groupby("index").mean()))
    for knowledge, attack in attacks:
        direct = not judged.defended and knowledge in ("bpda", "white_box")
        asked = "oblivious" if direct else knowledge
        mine = cells.index[(cells["knowledge"] == asked) & (cells["short"] == attack)]
        if len(mine):
            line |= _numbers(knowledge, attack, proportion(seen.loc[mine[0], "right"]))
    return line


def _robust(judged: Judged, norm: Any, eps: float) -> dict[Column, Any]:
    """Robust accuracies, and the paper's."""
    left = judged.left(norm, eps) if eps == eps else dict.fromkeys(("oblivious", "adaptive"))
    line = _numbers(ROBUST, "oblivious", left["oblivious"]) | _numbers(ROBUST, "white_box", left["adaptive"])
    return line | _numbers(PAPER, "oblivious", judged.by_the_paper(eps if eps == eps else None))


def _numbers(group: str, name: str, found: dict[str, Any] | RobustAccuracy | None) -> dict[Column, Any]:
    values = found if isinstance(found, dict) else found.__dict__ if found else {}
    return {(group, name, number): values[number] for number in NUMBERS if number in values}


def _beside(results: Results) -> pd.DataFrame:
    """Per cell: mean psnr (identical images left out) and ssim of the purified image, and median seconds to purify."""
    import numpy as np

    rows = results.rows[["cell", "psnr_pure_adv", "ssim_pure_adv", "seconds_purify"]].replace(np.inf, np.nan)
    of = rows.groupby("cell")
    return of[["psnr_pure_adv", "ssim_pure_adv"]].mean().assign(seconds=of["seconds_purify"].median())


def _costs(cells: pd.DataFrame, beside: pd.DataFrame, about: Any) -> dict[str, Any]:
    oblivious = beside.loc[cells.index[cells["knowledge"] == "oblivious"]]
    return {
        "psnr": oblivious["psnr_pure_adv"].mean(),
        "ssim": oblivious["ssim_pure_adv"].mean(),
        "ms": 1000 * beside.loc[cells.index, "seconds"].median(),
        "pflop": about.get("pflop"),
        "differentiable": about.get("differentiable"),
        "random": about.get("random"),
    }


def _framed(lines: dict[tuple[Any, ...], dict[Column, Any]]) -> pd.DataFrame:
    import pandas as pd

    def place(column: Column) -> tuple[Any, ...]:
        group, name, number = column
        at = _PLACES.index((group, name) if group == ROBUST else group)
        numbers = [*NUMBERS, ""]
        return at, list(COSTS).index(name) if group == COST else attack_rank(name), name, numbers.index(number)

    columns = sorted({column for line in lines.values() for column in line}, key=place)
    data = {i: [line.get(column) for line in lines.values()] for i, column in enumerate(columns)}
    frame = pd.DataFrame(data, index=pd.MultiIndex.from_tuples(lines, names=KEYS))
    frame.columns = pd.MultiIndex.from_tuples(columns, names=["group", "name", "number"])
    kinds = {column: COSTS.get(column[1], "") if column[0] == COST else "float" for column in columns}
    return frame.astype({column: "Int64" if column[2] == "n" else kind for column, kind in kinds.items()})


# Two, image by image -----------------------------------------------------------------------------------------------


def paired_table(a: Results, b: Results) -> pd.DataFrame:
    """Two systems on the same images, or the systems of two runs by their names: clean, under each attack that both
    were given, and their robust accuracies.

    a, b: of each data set, split and classifier that both have, the defended systems of one name are compared, or where
    none is of one name and each has one, these two; then what is undefended, unless the two answered alike. Where each
    holds one system alone, these two, whatever their classifiers.
    Columns: dataset, split, classifier (of a), system_a, system_b, kind ("clean", "attack", "robust", "paper"),
    knowledge, attack, norm, eps, n (images that both were judged on), accuracy_a, accuracy_b, only_a and only_b (images
    that one gets right and the other does not; a random system, in every draw), and p, McNemar's exact two-sided p that
    both are equally good.

    Raises `ValueError` where no two systems can be compared.
    """
    import pandas as pd

    a, b = a.whole_splits(), b.whole_splits()
    lines: list[dict[str, Any]] = []
    for one, other in _pairs(a, b):
        named = dict(zip(BLOCK, one.block)) | {"system_a": one.system, "system_b": other.system}
        pairs = (
            (what, mine.join(of, lsuffix="_a", rsuffix="_b", how="inner")) for what, mine, of in _both(a, one, b, other)
        )
        mine = [named | what | _mcnemar(both) for what, both in pairs if len(both)]
        alike = not any(line["only_a"] or line["only_b"] for line in mine)
        if one.defended or other.defended or not (lines and alike):  # a classifier beside itself says nothing
            lines += mine
    columns = [*BLOCK, "system_a", "system_b", "kind", "knowledge", "attack", "norm", "eps"]
    return pd.DataFrame(lines, columns=[*columns, "n", "accuracy_a", "accuracy_b", "only_a", "only_b", "p"])


def _pairs(a: Results, b: Results) -> list[tuple[Judged, Judged]]:
    """Who is compared with whom, what is undefended last."""
    left, right = every_system(a), every_system(b)
    if len(left) == len(right) == 1 and left[0].block[:2] == right[0].block[:2]:
        return [(left[0], right[0])]
    pairs = [
        pair
        for block in a.blocks
        for pair in _of_one_block([[j for j in of if j.block == block] for of in (left, right)])
    ]
    if not pairs:
        listed = [", ".join(f"{j.system} ({', '.join(j.block)})" for j in side) for side in (left, right)]
        raise ValueError(
            f"no system of the first is in the second. The first has {listed[0]}; the second has {listed[1]}. Say "
            "which two to compare: unperturb compare RUN RUN --system NAME --system NAME"
        )
    return sorted(pairs, key=lambda pair: not any(judged.defended for judged in pair))


def _of_one_block(sides: Sequence[Sequence[Judged]]) -> list[tuple[Judged, Judged]]:
    """Of two sides' systems those of one name, or else the one of each that is defended."""
    left, right = sides
    same = [(one, other) for one in left for other in right if one.system == other.system]
    mine, its = ([one for one in side if one.defended] or side for side in sides)
    if len(mine) == len(its) == 1 and not any(one.defended for one, _ in same):
        return list(dict.fromkeys([(mine[0], its[0]), *same]))
    return same


def _both(a: Results, one: Judged, b: Results, other: Judged) -> Iterable[tuple[dict[str, Any], Any, Any]]:
    """What two systems are compared under, and per image the `mean` and `min` over the draws of each being right."""
    nothing = {"kind": CLEAN, "knowledge": "", "attack": "", "norm": "", "eps": float("nan")}
    labels = [_labels(of, judged) for of, judged in ((a, one), (b, other))]
    common = labels[0].index.intersection(labels[1].index)
    if (labels[0][common] != labels[1][common]).any():
        raise ValueError(
            f"the images of {one.system} are not those of {other.system}: the same numbers have other labels there"
        )
    clean = [_per_image(of, judged.cells.index, "clean_right") for of, judged in ((a, one), (b, other))]
    yield nothing, clean[0], clean[1]
    keys = ["knowledge", "short", "norm", "eps"]
    theirs = {key_of(cell, keys): number for number, cell in records(other.cells)}
    for number, cell in records(one.cells):
        if (same := theirs.get(key_of(cell, keys))) is not None:
            what = {"kind": "attack", "attack": cell["short"]} | {k: cell[k] for k in ("knowledge", "norm", "eps")}
            yield nothing | what, _per_image(a, [number], "right"), _per_image(b, [same], "right")
    for norm, eps in sorted(set(a.budgets(one.block)) & set(b.budgets(other.block)), key=reading_order):
        for knowledge in ["oblivious", *(["white_box"] if one.adaptive and other.adaptive else [])]:
            threat_model = ThreatModel(norm, eps, knowledge)
            if (mine := one.under(threat_model)) and (its := other.under(threat_model)):
                what = {"kind": ROBUST, "knowledge": knowledge, "norm": norm, "eps": eps}
                yield nothing | what, _of_images(mine), _of_images(its)
    if (mine := one.by_the_paper()) and (its := other.by_the_paper()):
        yield nothing | {"kind": PAPER, "knowledge": "oblivious"}, _of_images(mine), _of_images(its)


def _labels(results: Results, judged: Judged) -> pd.Series[Any]:
    mine = results.rows[results.rows["cell"].isin(judged.cells.index)]
    return mine.groupby("index")["label"].first()


def _per_image(results: Results, cells: Any, column: str) -> pd.DataFrame:
    mine = results.outcomes[results.outcomes["cell"].isin(list(cells))]
    return mine.groupby("index")[column].agg(["mean", "min"])


def _of_images(found: RobustAccuracy) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({"mean": found.images, "min": found.images == 1})


def _mcnemar(both: pd.DataFrame) -> dict[str, Any]:
    """both: by image, `mean` and `min` of each side, `_a` and `_b`."""
    a, b = (both[f"min_{side}"].astype(bool) for side in ("a", "b"))
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    means = {f"accuracy_{side}": float(both[f"mean_{side}"].mean()) for side in ("a", "b")}
    return {"n": len(both)} | means | {"only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b)}
