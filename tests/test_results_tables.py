"""Tables of numbers, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from made_rows import frame, only
from unperturb.intervals import wilson
from unperturb.results import Results, accuracy_table, quality_table, robust_accuracy, robust_table
from unperturb.results.tables import attack_table
from unperturb.threat_models import ThreatModel

PGD = {"attack": "pgd-40", "attack_repr": "PGD()"}
BARE = {"system": "undefended", "right_clean": [1, 1, 1, 0], "right_adv": [0, 0, 1, 0]}
OURS = {"system": "ours", "right_clean": [1, 1, 0, 1], "right_adv": [1, 1, 1, 0]}
TINY = (
    BARE,
    BARE | PGD | {"right_adv": [0, 1, 0, 0]},
    OURS,
    OURS | PGD | {"right_adv": [1, 0, 1, 1]},
    OURS | {"right_adv": [0, 0, 0, 1], "knowledge": "white_box"},
)


def tiny(*more: dict[str, Any]) -> Results:
    return Results(frame(*TINY, *more))


def test_accuracy_counted_by_hand() -> None:
    table = accuracy_table(tiny())
    assert len(table) == 5 + 2  # the cells, and clean for each system
    for where, right in (
        ({"system": "undefended", "attack": "fgsm"}, 1),
        ({"system": "undefended", "attack": "clean"}, 3),
        ({"system": "ours", "attack": "fgsm", "knowledge": "oblivious"}, 3),
        ({"system": "ours", "attack": "fgsm", "knowledge": "white_box"}, 1),
        ({"system": "ours", "attack": "clean"}, 3),
    ):
        line = only(table, **where)
        assert (line["n"], line["accuracy"], line["worst"], line["draws"]) == (4, right / 4, right / 4, 1)
        assert (line["low"], line["high"]) == pytest.approx(wilson(right, 4))
    assert only(table, system="undefended", attack="clean")["defended"] == False  # noqa: E712, a numpy bool
    assert all(pd.api.types.is_numeric_dtype(table[k]) for k in ("n", "accuracy", "low", "high", "worst", "eps"))


def test_a_random_system_counts_images_not_draws() -> None:
    draws = [
        OURS | {"right_clean": [1, 1, 1, clean], "right_adv": right, "draw": i}
        for i, (right, clean) in enumerate((([1, 1, 0, 0], 1), ([1, 0, 1, 0], 0)))
    ]
    table = accuracy_table(Results(frame(*draws)))
    line = only(table, attack="fgsm")
    assert (line["n"], line["accuracy"], line["worst"], line["draws"]) == (4, 0.5, 0.25, 2)
    assert (line["low"], line["high"]) == pytest.approx(wilson(2, 4))  # of the images: 1, 1/2, 1/2, 0
    assert (line["worst_low"], line["worst_high"]) == pytest.approx(wilson(1, 4))
    clean = only(table, attack="clean")
    assert (clean["n"], clean["accuracy"], clean["worst"], clean["draws"]) == (4, 0.875, 0.75, 2)


def test_classifiers_and_records_are_never_pooled() -> None:
    other = OURS | {"classifier": "b", "right_adv": [0, 0, 0, 0]}
    again = OURS | {"attack_repr": "FGSM(loss='margin')", "right_adv": [0, 0, 0, 1]}
    table = accuracy_table(Results(frame(OURS, other, again)))
    assert only(table, classifier="a", attack="fgsm")["accuracy"] == 0.75
    assert only(table, classifier="b", attack="fgsm")["accuracy"] == 0
    assert only(table, classifier="a", attack="fgsm #2")["attack_repr"] == "FGSM(loss='margin')"


def test_robust_accuracy_by_system_budget_and_knowledge() -> None:
    small = OURS | {"attack": "small", "eps": 0.1, "linf": 0.1, "right_adv": [1, 1, 1, 0]}
    noise = BARE | {"attack": "noise", "knowledge": "none", "right_adv": [1, 1, 1, 0]}
    results = tiny(small, noise)
    table = robust_table(results)
    # Image 0 alone stands oblivious FGSM and PGD at 0.3; in the white box none does, image 3 falling to the small one.
    for where, standing, attacks in (
        ({"system": "ours", "eps": 0.3, "knowledge": "oblivious"}, 1, 3),
        ({"system": "ours", "eps": 0.3, "knowledge": "white_box"}, 0, 4),
        ({"system": "ours", "eps": 0.1, "knowledge": "oblivious"}, 2, 1),
        ({"system": "ours", "eps": 0.1, "knowledge": "white_box"}, 2, 1),
        # Who attacks what is undefended knows all there is to know.
        ({"system": "undefended", "eps": 0.3, "knowledge": "none"}, 3, 1),
        ({"system": "undefended", "eps": 0.3, "knowledge": "oblivious"}, 0, 3),
        ({"system": "undefended", "eps": 0.3, "knowledge": "white_box"}, 0, 3),
    ):
        line = only(table, **(where | {"eps": np.float32(where["eps"])}))
        assert (line["n"], 4 * line["accuracy"], line["attacks"]) == (4, standing, attacks)
        assert (line["low"], line["high"]) == pytest.approx(wilson(standing, 4))
        assert line["clean"] == 0.75
        found = robust_accuracy(results, ThreatModel("linf", where["eps"], where["knowledge"]), system=where["system"])
        assert (found.accuracy, found.worst) == (line["accuracy"], line["worst"])
    assert len(table) == 7  # and none of 0.1 on the undefended classifier, which nobody attacked within it


def test_robust_accuracy_in_a_norm_of_its_own() -> None:
    far = OURS | {"attack": "pgd-l2", "norm": "l2", "eps": 2.0, "l2": 2.0, "linf": 0.9, "right_adv": [0, 1, 1, 1]}
    table = robust_table(Results(frame(OURS | {"l2": 5.0}, far)))
    assert list(zip(table["norm"], table["eps"], 4 * table["accuracy"])) == [("linf", np.float32(0.3), 2), ("l2", 2, 2)]


def test_quality_averages_decibels_and_counts_identical_images_apart() -> None:
    psnr = {"psnr_adv": [10.0, 14.0, 12.0, 12.0], "psnr_pure_adv": [20, 30, np.inf, 25], "psnr_pure_clean": np.inf}
    ssim = {"ssim_adv": [0.1, 0.2, 0.3, 0.4], "ssim_pure_adv": 0.5, "ssim_pure_clean": np.nan}
    line = only(quality_table(Results(frame(BARE, OURS | psnr | ssim))), system="ours")
    assert (line["psnr_before"], line["psnr_after"]) == (12, 25)
    assert (line["identical_before"], line["identical_after"], line["identical_clean"]) == (0, 1, 4)
    assert line["ssim_before"] == pytest.approx(0.25)
    # What is undefended restores nothing.
    assert quality_table(Results(frame(BARE))).empty


def test_what_the_numbers_hold_for_is_told_per_attack() -> None:
    few = OURS | {"index": np.array([0, 1]), "right_clean": [1, 1], "right_adv": [1, 1], "classifier": "b"}
    made = OURS | {"knowledge": "transfer", "surrogate": "vgg", "seed": 3}
    table = attack_table(tiny(few, made))
    line = only(table, attack="fgsm, eps 0.3", knowledge="oblivious")
    assert (line["attack_repr"], line["least"], line["most"]) == ("FGSM()", 2, 4)
    assert only(table, knowledge="transfer")[["surrogate", "seed"]].tolist() == ["vgg", 3]
