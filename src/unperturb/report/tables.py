"""Tables from rows: accuracy with its interval, the worst case per image, image quality, and the conditions of it all.

Accuracy is over all images given, also those that the bare classifier gets wrong; what a detector rejected does not
enter. Where a defense is random, an image counts with its mean over the draws, so that n is a number of images.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from unperturb import intervals
from unperturb.report.escape import one_line
from unperturb.results.schema import CELL_KEYS

if TYPE_CHECKING:
    import pandas as pd

# What an attacker knows, weakest first, as tables say it.
KNOWLEDGE = {
    "none": "noise",
    "transfer": "transfer",
    "oblivious": "oblivious",
    "bpda": "BPDA",
    "black_box": "black box",
    "white_box": "white box",
    "all": "all together",
}
OBLIVIOUS = ("none", "transfer", "oblivious")  # who knows nothing of the defense attacks the bare classifier
UNDEFENDED = "undefended"
DIRECT = "direct"  # an attack on the bare classifier, made on itself, where others stand beside it
_ORDER = ("noise", "fgsm", "pgd", "mim", "jsma", "cw", "deepfool")  # the paper's, then whatever else there is
wilson = functools.cache(intervals.wilson)  # most tables ask for the same few
BLOCK = ["dataset", "split", "classifier"]
MASKED = 0.1  # share of gradients of exactly zero, beyond which an attack by gradients is not to be believed


def attacker_name(knowledge: str) -> str:
    """What the attacker knows, as tables say it: `white box`."""
    return KNOWLEDGE.get(knowledge, knowledge)


def budget_name(eps: float) -> str:
    """`eps` as people write it: `0.3`, `8/255`; empty for NaN, which means no budget."""
    if eps != eps:
        return ""
    for text, value in ((f"{eps:.3g}", float(f"{eps:.3g}")), (f"{round(eps * 255)}/255", round(eps * 255) / 255)):
        if abs(value - eps) < 1e-6:
            return text
    return f"{eps:.4g}"


def split_name(split: str) -> str:
    """A split, or a fixed part of it, as people say it: `100 of test`."""
    return re.sub(r"^(.+):(\d+)@\d+$", r"\2 of \1", split)


def attack_name(attack: str, eps: float) -> str:
    """The attack and its budget: `pgd-40, eps 0.3`."""
    return f"{attack}, eps {budget_name(eps)}" if eps == eps else attack


def attack_rank(attack: str) -> int:
    """Where an attack stands in a table: the paper's order, then all others."""
    ranks = {name: i for i, name in enumerate(_ORDER)}
    return ranks.get(attack.partition("-")[0], len(ranks))


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per cell, and one with attack "clean" per dataset, classifier and defense.

    rows: as `unperturb.schema.read_rows` gives them. Columns: the cell's keys, then n, accuracy, low, high (95 % Wilson).
    For defense "none", knowledge "oblivious" is white box too: there is nothing to know.
    """
    import pandas as pd

    cells, images = cells_of(rows)
    lines: list[dict[str, Any]] = []
    nothing = dict.fromkeys(["knowledge", "surrogate", "attack_repr"], "")
    for key, group in groups(cells, [*BLOCK, "defense"]):
        seen = images[images["cell"].isin(group.index)].groupby("index")["clean"].mean()
        lines.append(dict(zip([*BLOCK, "defense"], key)) | {"attack": "clean"} | nothing | share(seen))
        for number, cell in records(group):
            lines.append(cell | {"attack": cell["short"]} | share(images[images["cell"] == number]["adv"]))
    first = [*BLOCK, "defense", "attack", "knowledge", "eps", "n", "accuracy", "low", "high"]
    return pd.DataFrame(lines, columns=[*first, "surrogate", "seed", "attack_repr"]).astype(
        {"eps": "float32", "seed": "Int64"}
    )


def worst_case(rows: pd.DataFrame) -> pd.DataFrame:
    """How many images are classified correctly when clean *and* under every attack, per defense, budget and attacker.

    Images are joined over the cells that `covers` names; a random defense has to be right in every draw. Knowledge
    "all" covers every attacker at once; attacks without a budget are taken together. Columns: dataset, split,
    classifier, defense, eps, knowledge, n, accuracy, low, high, covers.
    """
    import pandas as pd

    cells, images = cells_of(rows)
    lines = []
    for key, group in groups(cells, [*BLOCK, "defense", "eps"]):
        found = list(group["knowledge"].unique())
        # The bare classifier has no purifier to look through: its oblivious attacker is its white-box one.
        bare = group["defense"].iloc[0] == "none" and "oblivious" in found and "white_box" not in found
        seen = {k: k for k in found} | ({"white_box": "oblivious"} if bare else {}) | {"all": "all"}
        for knowledge, shown in seen.items():
            covered = group if shown == "all" else group[group["knowledge"] == shown]
            common = survivors(images, list(covered.index))
            parts = groups(covered, "knowledge")
            covers = "; ".join(f"{attacker_name(k)}: {', '.join(part['short'])}" for k, part in parts)
            line = dict(zip([*BLOCK, "defense", "eps"], key)) | {"knowledge": knowledge}
            lines.append(line | share(common) | {"covers": covers})
    return pd.DataFrame(lines).astype({"eps": "float32"})


def wide_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The table to read: a line per attack, and side by side what each attacker leaves of each defense.

    Index: dataset, split, classifier, attack (with "images", "clean" and "worst case"). Columns: (defense, attacker),
    the bare classifier first; its own attacker has no name, or is "direct" beside noise or transfer. Entries are text:
    `97.1 % [96.0, 98.0]`, or empty where there is no such cell.
    """
    import pandas as pd

    cells, images = cells_of(rows)
    worst = worst_case(rows)
    table: dict[tuple[str, str], dict[tuple[str, ...], str]] = {}
    order: dict[tuple[str, ...], None] = {}
    for key, block in groups(cells, BLOCK):
        budgets = sorted(eps for eps in block["eps"].unique() if eps == eps)
        alone = len(block["eps"].unique()) == 1  # else the line says which budget's attacks it covers
        ends = {eps: "worst case" if alone else attack_name("worst case", eps) for eps in budgets}
        names = block.sort_values(["rank", "attack", "eps", "number"], kind="stable")["name"]
        order |= dict.fromkeys((*key, label) for label in ["images", "clean", *names, *ends.values()])
        for (defense, knowledge), group in groups(block, ["defense", "knowledge"]):
            column = table.setdefault(_column(defense, knowledge), {})
            seen = images[images["cell"].isin(group.index)]
            column[(*key, "images")] = _counts(seen.groupby("cell").size())
            column[(*key, "clean")] = percent(share(seen.groupby("index")["clean"].mean()))
            for number, cell in records(group):
                column[(*key, cell["name"])] = percent(share(seen[seen["cell"] == number]["adv"]))
            mine = (worst[[*BLOCK, "defense", "knowledge"]] == [*key, defense, knowledge]).all(axis=1)
            for _, line in records(worst[mine & worst["eps"].notna()]):
                column[(*key, ends[line["eps"]])] = percent(line)
    if len(bare := [column for column in table if column[0] == UNDEFENDED]) > 1 and (UNDEFENDED, "") in bare:
        table[UNDEFENDED, DIRECT] = table.pop((UNDEFENDED, ""))
    frame = pd.DataFrame(table, index=pd.MultiIndex.from_tuples(list(order), names=[*BLOCK, "attack"])).fillna("")
    columns: list[tuple[str, str]] = sorted(table, key=lambda column: column[0] != UNDEFENDED)
    return frame[columns]


def quality_table(rows: pd.DataFrame) -> pd.DataFrame:
    """PSNR (dB) and SSIM against the clean image, one line per cell of a defense, averaged over images.

    before: the adversarial image; after: the adversarial image purified; clean: the clean image purified. Identical
    images have infinite PSNR: they are left out of its average and counted in the `identical_*` columns.
    """
    import numpy as np
    import pandas as pd

    cells, _ = cells_of(rows)
    numbers = numbered(rows, cells)
    lines = []
    for number, cell in records(cells[cells["defense"] != "none"]):
        group = rows[numbers == number]
        line = of_cell(cell)
        line["n"] = group["index"].nunique()
        for name, source in (("before", "adv"), ("after", "pure_adv"), ("clean", "pure_clean")):
            values = group[f"psnr_{source}"].to_numpy(np.float64)
            same = np.isinf(values)
            line[f"psnr_{name}"] = values[~same].mean() if (~same).any() else float("nan")
            line[f"ssim_{name}"] = group[f"ssim_{source}"].to_numpy(np.float64).mean()
            line[f"identical_{name}"] = int(same.sum())
        lines.append(line)
    measured = [f"{what}_{when}" for what in ("psnr", "ssim", "identical") for when in ("before", "after", "clean")]
    return pd.DataFrame(lines, columns=[*BLOCK, "defense", "attack", "knowledge", "eps", "n", *measured]).astype(
        {"eps": "float32"}
    )


def conditions(
    rows: pd.DataFrame, *environments: Mapping[str, Any], names: Mapping[str, Mapping[str, str]] | None = None
) -> pd.DataFrame:
    """What the numbers hold for: columns `what` and `value`.

    Each attack's whole record with its seed and number of images, then device, threads, versions and commit.
    environments: as `unperturb.runs.environment` gives them, one per run folder; equal ones are said once. names: what
    `unperturb.report.escape.readable` has renamed: the whole names are told.
    """
    import pandas as pd

    cells, images = cells_of(rows)
    sizes = images.groupby("cell").size()
    lines: list[tuple[str, str]] = []
    for (dataset, split, name, record, seed), same in groups(
        cells, ["dataset", "split", "name", "attack_repr", "seed"]
    ):
        seen = []
        for knowledge, part in groups(same, "knowledge"):
            made_on = ", ".join(sorted(set(part["surrogate"]) - {""}))
            source = f"{attacker_name(knowledge)} from {made_on}" if made_on else attacker_name(knowledge)
            seen.append(f"{source} n {_counts(sizes[part.index])}")
        lines.append((f"{dataset} {split}: {name}", f"{record}; seed {seed}; {'; '.join(seen)}"))
    renamed = [(column, old, new) for column, of in (names or {}).items() for old, new in of.items()]
    lines += [(f"{column} {new}", old) for column, old, new in renamed if one_line(old) != new]
    for environment in environments:
        for key, value in environment.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
            if (key, text) not in lines:
                lines.append((key, text))
    return pd.DataFrame(lines, columns=["what", "value"])


def notes(rows: pd.DataFrame) -> list[str]:
    """What was wrong with answers and gradients, a sentence each: images whose logits were not finite, and attackers
    who met too many gradients of exactly zero to say anything.

    rows: those written before these were kept (`zero_gradients`, `gradients`; -1: not recorded) say nothing.
    """
    import pandas as pd

    cells, _ = cells_of(rows)
    numbers = pd.Series(numbered(rows, cells), index=rows.index)
    said: list[str] = []
    for (_, _, classifier, defense), mine in groups(cells, [*BLOCK, "defense"]):
        model = classifier if defense == "none" else f"{defense} before {classifier}"
        here = rows[numbers.isin(mine.index)]
        lost = here[(here[["pred_pure_clean", "pred_pure_adv"]] < 0).any(axis=1)]
        if n := lost["index"].nunique():
            where = _listed(mine.loc[sorted(numbers[lost.index].unique())])
            images = "1 image" if n == 1 else f"{n:,} images"
            said.append(f"{model}: {images} gave no finite logits ({where}), which counts as a wrong answer.")
        flat = _flat(here).groupby(numbers).mean()
        masked = mine.loc[[number for number in mine.index if flat.get(number, 0) > MASKED]]
        for knowledge, part in groups(masked, "knowledge"):
            worst = flat[part.index].max()
            seen = classifier if knowledge in OBLIVIOUS else model
            said.append(
                f"{seen}: gradient masked. For {_listed(part)} up to {100 * worst:.0f} % of an image's gradients were "
                "exactly zero: this attack says little, believe those that need no gradient."
            )
    return list(dict.fromkeys(said))


def percent(line: Mapping[str, Any]) -> str:
    """`accuracy`, `low` and `high` as text: `97.1 % [96.0, 98.0]`; empty where there were no images."""
    if not line["n"]:
        return ""
    return f"{100 * line['accuracy']:.1f} % [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"


def groups(frame: pd.DataFrame, by: str | list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """`(key, part)` of `frame`, in the order of its lines; NaN is a key too."""
    yield from frame.groupby(by, sort=False, dropna=False)


def records(frame: pd.DataFrame) -> Iterator[tuple[Any, dict[str, Any]]]:
    """`(number, values by column)` of each line."""
    yield from zip(frame.index, frame.to_dict("records"))


# Cells --------------------------------------------------------------------------------------------------------------


def cells_of(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells in the order of reading, by number; and per image of each: cell, index, share of draws that were right
    (clean, adv) and whether all were (clean_always, adv_always)."""
    if not len(rows):
        raise ValueError("there are no rows to make tables of; make some with `unperturb evaluate`")
    cells = rows[CELL_KEYS].drop_duplicates(ignore_index=True)
    cells["rank"] = [attack_rank(attack) for attack in cells["attack"]]
    places = {k: {v: i for i, v in enumerate(dict.fromkeys(cells[k]))} for k in [*BLOCK, "defense"]}
    places["defense"]["none"] = -1
    places["knowledge"] = {v: i for i, v in enumerate(KNOWLEDGE)}

    def place(column: pd.Series[Any]) -> Any:
        return column.map(places[str(column.name)]) if column.name in places else column

    by = [*BLOCK, "defense", "knowledge", "rank", "attack", "eps", "attack_repr", "surrogate", "seed"]
    cells = cells.sort_values(by, key=place, kind="stable", ignore_index=True)
    # One name for two records in the same column would hide one of them: number them.
    column = [*BLOCK, "defense", "knowledge", "attack", "eps"]
    cells["number"] = cells.groupby(column, dropna=False, sort=False).cumcount()
    again = [f" #{i + 1}" if i else "" for i in cells["number"]]
    cells["short"] = [f"{attack}{i}" for attack, i in zip(cells["attack"], again)]
    cells["name"] = [attack_name(attack, eps) + i for attack, eps, i in zip(cells["attack"], cells["eps"], again)]

    images = rows[["index"]].assign(
        cell=numbered(rows, cells),
        clean=(rows["pred_pure_clean"] == rows["label"]),
        adv=(rows["pred_pure_adv"] == rows["label"]),
    )
    per_image = images.groupby(["cell", "index"], sort=True)[["clean", "adv"]].agg(["mean", "min"])
    per_image.columns = ["clean", "clean_always", "adv", "adv_always"]
    return cells, per_image.reset_index()


def survivors(images: pd.DataFrame, cells: list[int]) -> pd.Series[Any]:
    """Of the images that all of `cells` have in common, by index: right when clean and in each of them, in every draw.

    images: as `cells_of` gives them.
    """
    images = images[images["cell"].isin(cells)]
    right = images["adv_always"] & images["clean_always"]
    per_image = right.groupby(images["index"]).agg(["size", "min"])
    return per_image[per_image["size"] == len(cells)]["min"]


def numbered(rows: pd.DataFrame, cells: pd.DataFrame) -> Any:
    """Each row's cell, by its number in `cells`."""
    numbered = cells[CELL_KEYS].assign(cell=cells.index)
    return rows[CELL_KEYS].merge(numbered, on=CELL_KEYS, how="left")["cell"].to_numpy()


def of_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What names a cell in a table."""
    return {k: cell[k] for k in [*BLOCK, "defense", "knowledge", "eps"]} | {"attack": cell["short"]}


def share(right: pd.Series[Any]) -> dict[str, Any]:
    """n, accuracy and its interval, of one number in [0, 1] per image."""
    n = len(right)
    low, high = wilson(round(float(right.sum())), n)
    return {"n": n, "accuracy": float(right.mean()) if n else float("nan"), "low": low, "high": high}


def _flat(rows: pd.DataFrame) -> pd.Series[Any]:
    """Which share of a row's gradients was exactly zero; 0 where that was not recorded."""
    import pandas as pd

    if "zero_gradients" not in rows:
        return pd.Series(0.0, index=rows.index)
    asked = rows["gradients"].clip(lower=1) if "gradients" in rows else 1
    return (rows["zero_gradients"].astype(float) / asked).clip(0, 1).fillna(0)


def _listed(cells: pd.DataFrame, most: int = 2) -> str:
    named = [f"{name}, {attacker_name(k)}" for name, k in zip(cells["name"], cells["knowledge"])]
    return "; ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")


def _counts(sizes: pd.Series[Any]) -> str:
    return "-".join(f"{n:,}" for n in sorted({int(sizes.min()), int(sizes.max())}))


def _column(defense: str, knowledge: str) -> tuple[str, str]:
    if defense == "none":
        return UNDEFENDED, "" if knowledge in ("oblivious", "white_box") else attacker_name(knowledge)
    return defense, attacker_name(knowledge)
