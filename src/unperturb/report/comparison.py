"""Defenses side by side, a line each: the paper's Table 2, with the attackers who know of the defense and the costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from unperturb.report.escape import renamed
from unperturb.report.tables import (
    BLOCK,
    KNOWLEDGE,
    UNDEFENDED,
    attacker_name,
    budget_name,
    cells_of,
    groups,
    numbered,
    records,
    share,
    survivors,
)
from unperturb.results.schema import read_costs

if TYPE_CHECKING:
    import pandas as pd

Costs = Mapping[tuple[str, str], Mapping[str, Any]]
KNOWING = ("bpda", "black_box", "white_box")
WORST_OBLIVIOUS, WORST_KNOWING, WORST = "worst: oblivious", "worst: white box", "worst: all"
TABLE = [*BLOCK, "eps"]
COSTS = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms": "ms an image", "pflop": "training PFLOP", "gradient": "gradient"}


def comparison_table(rows: pd.DataFrame, costs: Costs | None = None) -> pd.DataFrame:
    """One line per defense and table, a table being a data set, a classifier and a budget; the bare classifier first.

    Images of one split that were judged in several runs are put together, whatever part of the split each run looked
    at, so n may differ. Attacks without a budget stand in every budget's table. Columns: the table's keys; defense; for
    each measure M its accuracy, `M n`, `M low` and `M high` (95 % Wilson); psnr and ssim of the purified image, a mean
    over the oblivious attacks; ms that purifying takes an image, the median over cells; pflop of training; gradient, as
    the white-box attacker has it: "exact", a "stand-in" (the defense has none to give: BPDA), or "averaged" over draws.

    The measures: clean; noise and the oblivious attacks; `worst: oblivious`; the attacks by who knows of the defense;
    `worst: white box`, per image under all of these; `worst: all`. On the bare classifier every attack is direct: it
    stands in the columns of both attackers.

    rows: as `unperturb.schema.read_rows` gives them. costs: as `unperturb.schema.read_costs` does; by default those of the
    folders in `rows.attrs["runs"]`. What is not known stays empty.
    """
    import pandas as pd

    costs = read_costs(*rows.attrs.get("runs", [])) if costs is None else costs
    rows = rows.assign(split=[split.partition(":")[0] for split in rows["split"]])
    cells, images = cells_of(rows)
    in_cell = pd.Series(numbered(rows, cells), index=rows.index)
    order = {key: i for i, key in enumerate(costs)}
    seen: dict[str, tuple[int, ...]] = {}  # measures, and where they stand
    lines = []
    for (dataset, split, classifier), block in groups(cells, BLOCK):
        defenses = sorted(block["defense"].unique(), key=lambda d: (d != "none", order.get((dataset, d), len(order))))
        for eps in sorted(block["eps"].dropna().unique()) or [float("nan")]:
            here = block[(block["eps"] == eps) | block["eps"].isna()]
            places = _places(here)
            seen |= {name: place for name, (place, _) in places.items()}
            for defense in defenses:
                mine = here[here["defense"] == defense]
                if mine["eps"].isna().all() and not here["eps"].isna().all():
                    continue  # nothing of this budget was tried
                line = dict(zip(TABLE, (dataset, split, classifier, eps)))
                line["defense"] = UNDEFENDED if defense == "none" else defense
                of = {name: _cells_for(mine, *shown, bare=defense == "none") for name, (_, shown) in places.items()}
                line |= _accuracies(images[images["cell"].isin(mine.index)], of)
                oblivious = [n for name, found in of.items() if name.startswith("oblivious: ") for n in found]
                line |= _likeness([rows[in_cell == number] for number in oblivious])
                line["ms"] = 1000 * float(rows["seconds_purify"][in_cell.isin(mine.index)].median())
                lines.append(line | _costs(costs.get((dataset, defense), {})))
    frame = pd.DataFrame(lines)
    for end in (WORST_OBLIVIOUS, WORST_KNOWING, WORST):
        seen[end] = (2 if end == WORST_OBLIVIOUS else 4 if end == WORST_KNOWING else 5,)
    measures = [name for name in sorted(seen, key=lambda name: seen[name]) if frame[f"{name} n"].fillna(0).any()]
    frame = frame.astype({f"{name} n": "Int64" for name in measures} | {"eps": "float32"})
    ends = ("", " n", " low", " high")
    return frame[[*TABLE, "defense", *(f"{name}{end}" for name in measures for end in ends), *COSTS]]


def with_names(costs: Costs, names: Mapping[str, Mapping[str, str]]) -> Costs:
    """`costs` by the names that `unperturb.report.escape.readable` gave."""
    keys = ({"dataset": dataset, "defense": defense} for dataset, defense in costs)
    return {(new["dataset"], new["defense"]): of for new, of in zip((renamed(k, names) for k in keys), costs.values())}


def measures_of(table: pd.DataFrame) -> list[str]:
    """The measures of `comparison_table`'s columns that `table`, a part of it, has numbers for."""
    return [c.removesuffix(" n") for c in table.columns if c.endswith(" n") and table[c].fillna(0).any()]


def comparisons(frame: pd.DataFrame) -> Iterator[tuple[str, int, list[str], list[list[str]]]]:
    """Each table of `comparison_table` as text: title, n that most entries have, heads, and lines of entries.

    The first entry of a line is the defense. Entries are `97.1 [96.0, 98.0]`, in percent, with their n where it is not
    the table's.
    """
    for (dataset, split, classifier, eps), part in groups(frame, TABLE):
        measures = measures_of(part)
        sizes = [n for m in measures for n in part[f"{m} n"].dropna().tolist() if n]
        common = max(set(sizes), key=sizes.count)
        known = [c for c in COSTS if (part[c].notna() & (part[c] != "")).any()]
        lines = []
        for _, line in records(part):
            entries = [entry(line, m, common) for m in measures]
            lines.append([line["defense"], *entries, *(number(line, c) for c in known)])
        budget = f", eps {budget_name(eps)}" if eps == eps else ""
        title = f"{classifier} on {dataset} ({split}){budget}"
        yield title, common, ["defense", *measures, *(COSTS[c] for c in known)], lines


def entry(line: Mapping[str, Any], measure: str, common: int) -> str:
    """One accuracy as text: `97.1 [96.0, 98.0]`, with its n where that is not `common`; empty where nothing is."""
    n = line[f"{measure} n"]
    if n != n or not n:
        return ""
    share, low, high = (100 * line[f"{measure}{end}"] for end in ("", " low", " high"))
    return f"{share:.1f} [{low:.1f}, {high:.1f}]" + (f" n {n:,}" if n != common else "")


def number(line: Mapping[str, Any], column: str) -> str:
    """One entry of the columns beside the accuracies as text."""
    value = line[column]
    if column == "gradient":
        return str(value)
    if value != value:
        return "-"
    return {
        "psnr": f"{value:.1f}",
        "ssim": f"{value:.3f}",
        "ms": f"{value:.2g}" if value < 99.5 else f"{value:,.0f}",
    }.get(column, f"{value:.2g}")


def _places(here: pd.DataFrame) -> dict[str, tuple[tuple[Any, ...], tuple[str, str]]]:
    """The measures of one table's attacks, each with its place among them and its (attacker, attack)."""
    others = here[here["defense"] != "none"]
    found: dict[str, tuple[tuple[Any, ...], tuple[str, str]]] = {"clean": ((0,), ("", ""))}
    for _, cell in records(others if len(others) else here):
        knowledge, attack, rank = cell["knowledge"], cell["short"], cell["rank"]
        if knowledge in ("none", "oblivious"):
            name = "noise" if (knowledge, attack) == ("none", "noise") else f"{attacker_name(knowledge)}: {attack}"
            found[name] = ((1, list(KNOWLEDGE).index(knowledge), rank, attack), (knowledge, attack))
        elif knowledge in KNOWING:
            place = (3, list(KNOWLEDGE).index(knowledge), rank, attack)
            found[f"{attacker_name(knowledge)}: {attack}"] = (place, (knowledge, attack))
    return found


def _cells_for(mine: pd.DataFrame, knowledge: str, attack: str, *, bare: bool) -> list[int]:
    """The numbers of a defense's cells for one measure; what is direct on the bare classifier is white box too."""
    if bare and knowledge in ("bpda", "white_box"):
        knowledge = "oblivious"
    return list(mine.index[(mine["knowledge"] == knowledge) & (mine["short"] == attack)])


def _accuracies(images: pd.DataFrame, of: Mapping[str, list[int]]) -> dict[str, Any]:
    """Every measure of one line; `images` are those of its cells, `of` names the cells of each measure."""
    kinds = {name: name.partition(":")[0] for name in of}
    knowing = {attacker_name(k) for k in KNOWING}
    worst = {
        WORST_OBLIVIOUS: [n for name, found in of.items() if kinds[name] == "oblivious" for n in found],
        WORST_KNOWING: [n for name, found in of.items() if kinds[name] in knowing for n in found],
        WORST: sorted({n for found in of.values() for n in found}),
    }
    found = {"clean": share(images.groupby("index")["clean"].mean())}
    found |= {name: share(images[images["cell"].isin(ns)]["adv"]) for name, ns in of.items() if name != "clean"}
    found |= {name: share(survivors(images, sorted(set(ns)))) for name, ns in worst.items()}
    return {
        f"{name}{end}": value[key]
        for name, value in found.items()
        for end, key in (("", "accuracy"), (" n", "n"), (" low", "low"), (" high", "high"))
    }


def _likeness(parts: list[pd.DataFrame]) -> dict[str, float]:
    """Mean PSNR (identical images left out) and SSIM of the purified images, over cells of rows."""
    import numpy as np

    psnr = [p["psnr_pure_adv"].replace(np.inf, np.nan).mean() for p in parts]
    ssim = [p["ssim_pure_adv"].mean() for p in parts]
    means = {}
    for name, values in (("psnr", psnr), ("ssim", ssim)):
        finite = [float(v) for v in values if v == v]
        means[name] = sum(finite) / len(finite) if finite else float("nan")
    return means


def _costs(about: Mapping[str, Any]) -> dict[str, Any]:
    pflop = about.get("pflop")
    gradient = ""
    if about:
        gradient = ("exact" if about["differentiable"] else "stand-in") + (", averaged" if about["random"] else "")
    return {"pflop": float("nan") if pflop is None else float(pflop), "gradient": gradient}
