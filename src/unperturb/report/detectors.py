"""Tables of what detectors are worth: do they tell attacked images from clean ones, and what does rejecting buy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unperturb.report.tables import BLOCK, cells_of, numbered, of_cell, records, share

if TYPE_CHECKING:
    import pandas as pd


def detector_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How well each detector tells adversarial images from clean ones, one line per cell and detector.

    Every image of the cell counts once clean and once attacked, also where the attack changed no prediction. Columns:
    the cell, detector (its number, in the order of its defense), n, auroc, and tpr_1 and tpr_5: the share of attacked
    images found at a threshold that at most 1 % and 5 % of the clean ones pass. Empty where nothing detects.
    """
    import numpy as np
    import pandas as pd

    cells, _ = cells_of(rows)
    numbers = numbered(rows, cells)
    lines = []
    for number, cell in records(cells):
        group = rows[numbers == number]
        if not len(group["scores_clean"].iloc[0]):
            continue
        from sklearn.metrics import roc_auc_score, roc_curve  # a second, which most reports need not wait

        clean, attacked = (np.array(group[k].tolist(), np.float64) for k in ("scores_clean", "scores_adv"))
        truth = np.repeat([0, 1], len(group))
        for detector in range(clean.shape[1]):
            scores = np.concatenate([clean[:, detector], attacked[:, detector]])
            scores = np.unique(np.nan_to_num(scores, nan=-np.inf), return_inverse=True)[1]  # no score rejects nothing
            false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
            found = {f"tpr_{p}": float(true[false <= p / 100].max()) for p in (1, 5)}
            line = of_cell(cell) | {"detector": detector, "n": group["index"].nunique()}
            lines.append(line | {"auroc": float(roc_auc_score(truth, scores))} | found)
    columns = [*BLOCK, "defense", "attack", "knowledge", "eps", "detector", "n", "auroc", "tpr_1", "tpr_5"]
    return pd.DataFrame(lines, columns=columns).astype({"eps": "float32"})


def rejection_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What rejecting is worth, one line per cell of a defense that detects: shares of all images, Wilson intervals.

    rejected_clean, rejected_adv: found too suspicious. clean_strict, adv_strict: correct and not rejected. adv_magnet:
    correct or rejected, which is how MagNet counts (Meng and Chen 2017): a detector that rejects everything has 100 %
    there, and 0 % when clean. Each has `_low` and `_high` beside it. Empty where nothing detects.
    """
    import pandas as pd

    cells, _ = cells_of(rows)
    numbers = numbered(rows, cells)
    right = {k: rows[f"pred_pure_{k}"] == rows["label"] for k in ("clean", "adv")}
    counted = pd.DataFrame(
        {
            "index": rows["index"],
            "rejected_clean": rows["rejected_clean"],
            "rejected_adv": rows["rejected_adv"],
            "clean_strict": right["clean"] & ~rows["rejected_clean"],
            "adv_strict": right["adv"] & ~rows["rejected_adv"],
            "adv_magnet": right["adv"] | rows["rejected_adv"],
        }
    )
    names = [str(k) for k in counted.columns[1:]]
    lines = []
    for number, cell in records(cells):
        mine = numbers == number
        if not len(rows["scores_clean"][mine].iloc[0]):
            continue
        line = of_cell(cell) | {"n": rows["index"][mine].nunique()}
        for name, of_images in counted[mine].groupby("index")[names].mean().items():
            found = share(of_images)
            line |= {str(name): found["accuracy"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
        lines.append(line)
    measured = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    columns = [*BLOCK, "defense", "attack", "knowledge", "eps", "n", *measured]
    return pd.DataFrame(lines, columns=columns).astype({"eps": "float32"})
