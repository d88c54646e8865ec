"""Tables of numbers, one line per thing counted: what a column holds is never text to be read back.

Accuracy is over all images given, also those that the undefended classifier gets wrong; what a detector rejected does
not enter. Where a system is random, an image counts with its mean over the draws, so that n is a number of images, and
the columns `worst` count it where every draw is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from unperturb.results.names import CLEAN
from unperturb.results.results import BLOCK, Results, reading_order, records
from unperturb.results.robust import every_system, proportion
from unperturb.threat_models import KNOWLEDGE, ThreatModel

if TYPE_CHECKING:
    import pandas as pd

SYSTEM = [*BLOCK, "system", "defended"]
CELL = [*SYSTEM, "attack", "knowledge", "norm", "eps"]
COUNTED = ["n", "accuracy", "low", "high", "draws", "worst", "worst_low", "worst_high"]
WHENS = ("before", "after", "clean")
_SOURCES = ("adv", "pure_adv", "pure_clean")  # the columns of rows that `WHENS` stand for


def accuracy_table(results: Results) -> pd.DataFrame:
    """One line per cell, and before them one per system with attack "clean" and no knowledge.

    Columns: the cell, then n, accuracy, low, high (95 % Wilson), draws, and worst, worst_low, worst_high (right in
    every draw); surrogate, seed, attack_repr.
    """
    outcomes = results.outcomes
    per_image = outcomes.groupby(["cell", "index"])["right"].agg(["mean", "min"])
    draws = outcomes.groupby("cell")["draw"].nunique()
    lines: list[dict[str, Any]] = []
    clean = {"attack": CLEAN, "knowledge": "", "norm": "", "surrogate": "", "attack_repr": ""}
    for cells in results.parts(SYSTEM):
        of_system = dict(zip(SYSTEM, cells[SYSTEM].iloc[0]))
        mine = outcomes[outcomes["cell"].isin(cells.index)].groupby("index")["clean_right"].agg(["mean", "min"])
        lines.append(of_system | clean | _counted(mine) | {"draws": int(draws[cells.index].max())})
        for number, cell in records(cells):
            counted = _counted(per_image.loc[number])
            lines.append(cell | {"attack": cell["short"]} | counted | {"draws": int(draws[number])})
    return _frame(lines, [*CELL, *COUNTED, "surrogate", "seed", "attack_repr"])


def robust_table(results: Results) -> pd.DataFrame:
    """Robust accuracy: one line per system, budget that an attack of its block was given, and kind of knowledge.

    A line is there where an attacker of this knowledge was tried on the system, or, where nothing is defended, on
    another system of the block. Columns: the system, norm, eps, knowledge, clean (the accuracy that nobody attacks, on
    the same images), n, accuracy, low, high (95 % Wilson), draws, worst, worst_low, worst_high, and attacks: how many
    cells count (`RobustAccuracy`).
    """
    lines = []
    tried = {block: set(part["knowledge"]) for block, part in zip(results.blocks, results.parts(BLOCK))}
    for judged in every_system(results):
        mine = set(judged.cells["knowledge"])
        if not judged.defended and "oblivious" in mine:
            # Who attacks it knows all there is, whatever there is to know of the others.
            mine |= {k for k in tried[judged.block] if "oblivious" in KNOWLEDGE[k].includes}
        first = dict(zip(SYSTEM, (*judged.block, judged.system, judged.defended)))
        for norm, eps in sorted(results.budgets(judged.block), key=reading_order):
            for knowledge in (k for k in KNOWLEDGE if k in mine):
                found = judged.under(ThreatModel(norm, eps, knowledge))
                if found is not None:
                    numbers = {k: getattr(found, k) for k in ("clean", *COUNTED)}
                    named = {"norm": norm, "eps": eps, "knowledge": knowledge}
                    lines.append(first | named | numbers | {"attacks": len(found.attacks)})
    return _frame(lines, [*SYSTEM, "norm", "eps", "knowledge", "clean", *COUNTED, "attacks"])


def quality_table(results: Results) -> pd.DataFrame:
    """PSNR (dB) and SSIM against the clean image, one line per cell of a defended system, averaged over images.

    before: the adversarial image; after: the adversarial image purified; clean: the clean image purified. Identical
    images have infinite PSNR: they are left out of its average and counted in the `identical_*` columns.
    """
    import numpy as np

    lines = []
    for cell, rows in _rows_of_cells(results, [f"{what}_{of}" for what in ("psnr", "ssim") for of in _SOURCES]):
        if not cell["defended"]:
            continue
        line = cell | {"n": rows["index"].nunique()}
        for when, source in zip(WHENS, _SOURCES):
            values = rows[f"psnr_{source}"].to_numpy(np.float64)
            same = np.isinf(values)
            line[f"psnr_{when}"] = values[~same].mean() if (~same).any() else float("nan")
            line[f"ssim_{when}"] = rows[f"ssim_{source}"].to_numpy(np.float64).mean()
            line[f"identical_{when}"] = int(same.sum())
        lines.append(line)
    return _frame(lines, [*CELL, "n", *(f"{what}_{when}" for what in ("psnr", "ssim", "identical") for when in WHENS)])


def detector_table(results: Results) -> pd.DataFrame:
    """How well each detector tells adversarial images from clean ones, one line per cell and detector.

    Every image of the cell counts once clean and once attacked, also where the attack changed no prediction. Columns:
    the cell, detector (its number, in the order of its defense), n, auroc, and tpr_1 and tpr_5: the fraction of
    attacked images found at a threshold that at most 1 % and 5 % of the clean ones pass. Empty where nothing detects.
    """
    import numpy as np

    lines = []
    for cell, rows in _rows_of_cells(results, ["scores_clean", "scores_adv"]):
        if not len(rows["scores_clean"].iloc[0]):
            continue
        from sklearn.metrics import roc_auc_score, roc_curve  # a second, which most reports need not wait

        clean, attacked = (np.array(rows[k].tolist(), np.float64) for k in ("scores_clean", "scores_adv"))
        truth = np.repeat([0, 1], len(rows))
        for detector in range(clean.shape[1]):
            scores = np.concatenate([clean[:, detector], attacked[:, detector]])
            scores = np.unique(np.nan_to_num(scores, nan=-np.inf), return_inverse=True)[1]  # no score rejects nothing
            false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
            found = {f"tpr_{p}": float(true[false <= p / 100].max()) for p in (1, 5)}
            line = cell | {"detector": detector, "n": rows["index"].nunique()}
            lines.append(line | {"auroc": float(roc_auc_score(truth, scores))} | found)
    return _frame(lines, [*CELL, "detector", "n", "auroc", "tpr_1", "tpr_5"])


def rejection_table(results: Results) -> pd.DataFrame:
    """What rejecting is worth, one line per cell of a system that detects: fractions of all images, Wilson intervals.

    rejected_clean, rejected_adv: found too suspicious. clean_strict, adv_strict: correct and not rejected. adv_magnet:
    correct or rejected, which is how MagNet counts (Meng and Chen 2017): a detector that rejects everything has 100 %
    there, and 0 % when clean. Each has `_low` and `_high` beside it. Empty where nothing detects.
    """
    names = ["rejected_clean", "rejected_adv", "clean_strict", "adv_strict", "adv_magnet"]
    seen = ["scores_clean", "label", "pred_pure_clean", "pred_pure_adv", "rejected_clean", "rejected_adv"]
    lines = []
    for cell, rows in _rows_of_cells(results, seen):
        if not len(rows["scores_clean"].iloc[0]):
            continue
        right = {k: rows[f"pred_pure_{k}"] == rows["label"] for k in ("clean", "adv")}
        counted = rows[["index", "rejected_clean", "rejected_adv"]].assign(
            clean_strict=right["clean"] & ~rows["rejected_clean"],
            adv_strict=right["adv"] & ~rows["rejected_adv"],
            adv_magnet=right["adv"] | rows["rejected_adv"],
        )
        line = cell | {"n": rows["index"].nunique()}
        for name, of_images in counted.groupby("index")[names].mean().items():
            found = proportion(of_images)
            line |= {str(name): found["accuracy"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
        lines.append(line)
    return _frame(lines, [*CELL, "n", *(f"{name}{end}" for name in names for end in ("", "_low", "_high"))])


def attack_table(results: Results) -> pd.DataFrame:
    """What the numbers hold for: one line per attack of each data set, its knowledge and what it was made on.

    Columns: dataset, split, attack (with its budget), attack_repr (the whole record), seed, knowledge, surrogate, and
    least and most images that a cell of it saw.
    """
    sizes = results.outcomes.groupby("cell")["index"].nunique()
    keys = ["dataset", "split", "name", "attack_repr", "seed", "knowledge", "surrogate"]
    lines = []
    for cells in results.parts(keys):
        seen = sizes[cells.index]
        lines.append(dict(zip(keys, cells[keys].iloc[0])) | {"least": int(seen.min()), "most": int(seen.max())})
    return _frame(lines, [*keys, "least", "most"]).rename(columns={"name": "attack"})


# Lines --------------------------------------------------------------------------------------------------------------


def _rows_of_cells(results: Results, columns: list[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """What names each cell in a table, and these columns of its rows: the others, text above all, are dear to copy."""
    rows = results.rows[["cell", "index", *columns]].groupby("cell", sort=False)
    for number, cell in records(results.cells):
        yield {k: cell["short" if k == "attack" else k] for k in CELL}, rows.get_group(number)


def _counted(per_image: pd.DataFrame) -> dict[str, Any]:
    """`COUNTED` but for the draws; per_image: per image, `mean` and `min` over them."""
    worst = {k.replace("accuracy", "worst"): v for k, v in proportion(per_image["min"]).items() if k != "n"}
    return proportion(per_image["mean"]) | {k if k == "worst" else f"worst_{k}": v for k, v in worst.items()}


def _frame(lines: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    import pandas as pd

    kinds = {"eps": "float32", "seed": "Int64", "defended": "bool"}
    return pd.DataFrame(lines, columns=columns).astype({k: v for k, v in kinds.items() if k in columns})
