"""Detectors judged: AUROC, hits at few false alarms, and both ways of counting, against numbers counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unperturb
from made_rows import columns, frame
from test_results_tables import OURS
from unperturb.attacks import create_attack
from unperturb.data import ImageSet
from unperturb.defenses import Defense, Protected
from unperturb.intervals import wilson
from unperturb.results import Results, detector_table, rejection_table, render, schema


def rows_of(folder: Path, name: str = "a", **given: Any) -> None:
    """One cell, written and read as an evaluation does it."""
    cell = {"dataset": "digits", "classifier": "net", "system": "magnet", "defended": True}
    cell |= {"attack": "pgd-40", "attack_repr": "PGD()", "label": 1}
    schema.write_rows(folder / "rows" / name / "0000.parquet", columns(len(given["scores_clean"]), **(cell | given)))


def predictions(right: list[int]) -> Any:
    return np.where(np.array(right) == 1, 1, 2)


FOUR = {
    # Clean 1, 2, 3, 4; attacked 2.5, 5, 6, 7: of 16 pairs the attacked one is above in 4 + 4 + 4 + 2.
    "scores_clean": [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]],
    "scores_adv": [[2.5, 0.0], [5.0, 0.0], [6.0, 0.0], [7.0, 1.0]],
    "pred_pure_clean": predictions([1, 1, 1, 0]),
    "pred_pure_adv": predictions([0, 1, 0, 0]),
    "rejected_clean": np.array([False, False, True, True]),
    "rejected_adv": np.array([False, True, True, False]),
}


def test_auroc_and_hits_by_hand(tmp_path: Path) -> None:
    rows_of(tmp_path, **FOUR)
    found = detector_table(Results.read(tmp_path))
    assert list(found["detector"]) == [0, 1]
    # Above all four clean scores lie 5, 6 and 7: with four images 1 % and 5 % both mean no false alarm.
    assert found["auroc"].tolist() == pytest.approx([14 / 16, (12 * 0.5 + 4) / 16])
    assert found["tpr_1"].tolist() == found["tpr_5"].tolist() == [0.75, 0.25]
    assert found["n"].tolist() == [4, 4]
    assert set(found["knowledge"]) == {"oblivious"}


def test_hits_at_one_and_at_five_percent(tmp_path: Path) -> None:
    # Clean scores 1 ... 200. One false alarm in a hundred: the threshold may pass two clean images, so attacked scores
    # above 198 are found; at 5 % those above 190.
    attacked = np.r_[np.full(50, 197.5), np.full(30, 198.5), np.full(20, 500.0), np.full(100, 189.5)]
    clean = np.arange(1.0, 201)
    rows_of(
        tmp_path,
        scores_clean=clean[:, None].tolist(),
        scores_adv=attacked[:, None].tolist(),
        pred_pure_clean=predictions([1] * 200),
        pred_pure_adv=predictions([1] * 200),
    )
    (line,) = detector_table(Results.read(tmp_path)).to_dict("records")
    assert line["tpr_1"] == pytest.approx(50 / 200)
    assert line["tpr_5"] == pytest.approx(100 / 200)
    above = (attacked[:, None] > clean[None]).mean()  # no ties: AUROC is the share of pairs in order
    assert line["auroc"] == pytest.approx(above)


def test_both_ways_of_counting(tmp_path: Path) -> None:
    rows_of(tmp_path, **FOUR)
    (line,) = rejection_table(Results.read(tmp_path)).to_dict("records")
    assert line["rejected_clean"] == 0.5
    assert line["rejected_adv"] == 0.5
    assert line["clean_strict"] == 0.5  # the third is right and rejected: wrong
    assert line["adv_strict"] == 0.0  # the only one right is rejected
    assert line["adv_magnet"] == 0.5  # the second and the third
    for key in ("clean_strict", "adv_strict", "adv_magnet"):
        low, high = wilson(round(4 * line[key]), 4)
        assert (line[f"{key}_low"], line[f"{key}_high"]) == pytest.approx((low, high))


def test_rejecting_everything_is_perfect_one_way_and_worthless_the_other(tmp_path: Path) -> None:
    everything = {"rejected_clean": np.ones(4, bool), "rejected_adv": np.ones(4, bool)}
    rows_of(tmp_path, **{**FOUR, **everything})
    (line,) = rejection_table(Results.read(tmp_path)).to_dict("records")
    assert (line["adv_magnet"], line["adv_strict"], line["clean_strict"]) == (1, 0, 0)


def test_cells_without_detectors_have_no_line(tmp_path: Path) -> None:
    rows_of(tmp_path, **FOUR)
    rows_of(tmp_path, "b", **{**FOUR, "system": "ours", "scores_clean": [[]] * 4, "scores_adv": [[]] * 4})
    rows_of(tmp_path, "c", **{**FOUR, "norm": "", "eps": float("nan"), "knowledge": "white_box"})
    results = Results.read(tmp_path)
    assert list(rejection_table(results)["system"]) == ["magnet", "magnet"]
    assert list(detector_table(results)["knowledge"]) == ["oblivious"] * 2 + ["white_box"] * 2
    only = results.where(system="ours")
    assert detector_table(only).empty
    assert rejection_table(only).empty
    assert render.detector_sheets(only) == []


def test_both_ways_of_counting_and_each_detector_stand_side_by_side(tmp_path: Path) -> None:
    rows_of(tmp_path, **FOUR)
    rows_of(tmp_path, "c", **{**FOUR, "norm": "", "eps": float("nan"), "knowledge": "white_box"})
    (sheet,) = render.detector_sheets(Results.read(tmp_path))
    assert [line[:3] for line in sheet.lines] == [
        ["magnet", "oblivious", "pgd-40, eps 0.3"],
        ["magnet", "white box", "pgd-40"],
    ]
    entries = dict(zip(zip(sheet.groups, sheet.heads), sheet.lines[0]))
    assert entries["right", "or rejected (MagNet)"].startswith("50.0 % [")
    assert entries["each detector", "AUROC"] == "0.875, 0.625"
    assert entries["each detector", "% found at 1 % false"] == "75.0, 25.0"


def test_a_detector_that_gives_no_score_finds_nothing() -> None:
    scores = {"scores_clean": [[0.0]] * 4, "scores_adv": [[np.nan], [np.nan], [1.0], [1.0]]}
    (line,) = detector_table(Results(frame(OURS | scores))).to_dict("records")
    assert (line["auroc"], line["tpr_1"]) == (0.5, 0.5)


class Bright(Defense):
    """Rejects bright images."""

    def purify(self, images: Tensor) -> Tensor:
        return images

    def scores(self, images: Tensor, logits_fn: Any) -> Tensor:
        return images.flatten(1).mean(1, keepdim=True)

    @property
    def thresholds(self) -> Tensor:
        return torch.tensor([0.6])


def test_from_an_evaluation_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = ImageSet(
        images=pixels,
        labels=torch.arange(12) % 3,
        index=torch.arange(12),
        class_names=list("abc"),
        source="toy",
        split="test",
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    systems = {"net": net, "bright": Protected(net, Bright())}
    rows = unperturb.evaluate(data, systems, [create_attack("fgsm", eps=0.2)], ["oblivious"], quiet=True)
    mine = rows[rows["system"] == "bright"].sort_values("index")
    means = pixels.float().div(255).flatten(1).mean(1)
    np.testing.assert_allclose(np.stack(mine["scores_clean"])[:, 0], means, atol=1e-6)
    assert (mine["rejected_clean"].to_numpy() == (means > 0.6).numpy()).all()
    assert list(rejection_table(Results(rows))["system"]) == ["bright"]
