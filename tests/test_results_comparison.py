"""Systems side by side, counted by hand, and two of them image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from made_rows import frame, only
from test_results_tables import OURS, PGD, TINY
from unperturb.intervals import mcnemar, wilson
from unperturb.results import Results, comparison_table, paired_table

FREE = {"attack": "cw", "attack_repr": "CW()", "eps": np.nan, "linf": 0.5}
MARGIN = {"attack": "margin-40", "attack_repr": "PGD(loss='margin')"}
BARE = TINY[0]
SIDE_BY_SIDE = (
    *TINY,
    BARE | FREE | {"right_adv": [0, 0, 0, 0]},
    OURS | FREE | {"right_adv": [0, 1, 1, 1]},
    BARE | MARGIN | {"right_adv": [1, 1, 1, 0]},
    OURS | MARGIN | {"right_adv": [1, 1, 0, 0], "knowledge": "white_box"},
)


def line_of(table: Any, system: str, eps: float = 0.3) -> dict[tuple[str, str, str], Any]:
    found = [line for key, line in zip(table.index, table.to_dict("records")) if key[-1] == system and key[-2] == eps]
    assert len(found) == 1
    return found[0]


def measures(table: Any) -> list[tuple[str, str]]:
    return [(group, name) for group, name, number in table.columns if number == "n"]


def test_side_by_side_counted_by_hand() -> None:
    table = comparison_table(Results(frame(*SIDE_BY_SIDE)))
    assert table.index.names == ["dataset", "split", "classifier", "norm", "eps", "system"]
    assert table.index.tolist() == [("digits", "test", "a", "linf", 0.3, s) for s in ("undefended", "ours")]
    assert measures(table) == [
        ("clean", ""),
        ("oblivious", "fgsm"),
        ("oblivious", "pgd-40"),
        ("oblivious", "cw"),
        ("robust", "oblivious"),
        ("paper", "oblivious"),
        ("white_box", "fgsm"),
        ("white_box", "margin-40"),  # which was no oblivious attack on what is defended
        ("robust", "white_box"),
    ]
    bare, ours = (line_of(table, system) for system in ("undefended", "ours"))
    assert [4 * ours[(*m, "accuracy")] for m in measures(table)] == [3, 3, 3, 3, 1, 0, 1, 2, 0]
    # Direct attacks stand in the white-box columns too; what they leave is robust against whoever knows all.
    assert [4 * bare[(*m, "accuracy")] for m in measures(table)] == [3, 1, 1, 0, 0, 0, 1, 3, 0]
    assert all(line[(*m, "n")] == 4 for line in (bare, ours) for m in measures(table))
    assert (ours["clean", "", "low"], ours["clean", "", "high"]) == pytest.approx(wilson(3, 4))
    assert (ours["robust", "oblivious", "low"], ours["robust", "oblivious", "high"]) == pytest.approx(wilson(1, 4))


def test_the_paper_counts_what_went_farther_and_robust_accuracy_does_not() -> None:
    # C&W turns image 0 at a distance of 0.5: it counts for the paper alone.
    ours = line_of(comparison_table(Results(frame(*SIDE_BY_SIDE))), "ours")
    assert ours["robust", "oblivious", "accuracy"] == 0.25
    assert ours["paper", "oblivious", "accuracy"] == 0
    near = [cell | ({"linf": 0.2} if cell["attack"] == "cw" else {}) for cell in SIDE_BY_SIDE if "attack" in cell]
    ours = line_of(comparison_table(Results(frame(*near))), "ours")
    assert ours["robust", "oblivious", "accuracy"] == ours["paper", "oblivious", "accuracy"]


def test_where_nobody_knew_of_the_defense_there_is_no_robust_accuracy_of_all_knowledge() -> None:
    table = comparison_table(Results(frame(*TINY[:4])))
    assert line_of(table, "ours")["robust", "oblivious", "n"] == 4
    assert np.isnan(line_of(table, "ours")["robust", "white_box", "accuracy"])
    assert line_of(table, "undefended")["robust", "white_box", "n"] == 4


def test_parts_of_a_split_are_joined_and_say_their_n() -> None:
    part = {"system": "gan", "split": "test:2@0", "right_clean": [1, 1], "right_adv": [1, 0]}
    whole = [cell | {"split": "test:4@0"} for cell in SIDE_BY_SIDE]
    table = comparison_table(Results(frame(*whole, part)))
    assert [key[-1] for key in table.index] == ["undefended", "ours", "gan"]
    assert {key[1] for key in table.index} == {"test"}
    gan = line_of(table, "gan")
    assert (gan["clean", "", "n"], gan["oblivious", "fgsm", "n"]) == (2, 2)
    assert gan["robust", "oblivious", "accuracy"] == 0.5
    assert np.isnan(gan["oblivious", "pgd-40", "accuracy"])
    # The same cell of another part is one more image of it, not another cell.
    more = OURS | {"split": "test:5@0", "index": np.array([9]), "right_clean": [1], "right_adv": [1]}
    ours = line_of(comparison_table(Results(frame(*whole, more))), "ours")
    assert (ours["oblivious", "fgsm", "n"], ours["oblivious", "fgsm", "accuracy"]) == (5, 4 / 5)
    assert ours["robust", "oblivious", "n"] == 4  # image 9 was not shown to the others


def test_a_table_for_each_budget() -> None:
    small = OURS | {"eps": 0.1, "linf": 0.1, "attack": "fgsm-small"}
    results = Results(frame(*SIDE_BY_SIDE, small))
    table = comparison_table(results)
    assert [key[-2:] for key in table.index] == [(0.3, "undefended"), (0.3, "ours"), (0.1, "ours")]
    line = line_of(table, "ours", 0.1)
    assert line["oblivious", "fgsm-small", "accuracy"] == 0.75
    assert line["oblivious", "cw", "accuracy"] == 0.75  # without a budget: in each table
    assert np.isnan(line["oblivious", "fgsm", "accuracy"])
    assert comparison_table(results, eps=0.1).index.tolist() == [table.index[-1]]


def test_attacks_without_any_budget_have_a_table_too() -> None:
    table = comparison_table(Results(frame(SIDE_BY_SIDE[5], SIDE_BY_SIDE[6])))
    assert [key[3] for key in table.index] == ["", ""]
    assert measures(table) == [("clean", ""), ("oblivious", "cw"), ("paper", "oblivious")]


def test_quality_time_and_cost() -> None:
    psnr = {"psnr_pure_adv": [20.0, 30.0, np.inf, 25.0], "ssim_pure_adv": 0.5, "seconds_purify": 0.004}
    again = {"psnr_pure_adv": 35.0, "ssim_pure_adv": 0.7, "seconds_purify": 0.002}
    cells = [TINY[2] | psnr, TINY[3] | again, TINY[4] | {"psnr_pure_adv": 1.0, "seconds_purify": 9.0}]
    about = {
        ("digits", "ours"): {"pflop": 0.25, "differentiable": False, "random": True},
        ("mnist", "ours"): {"pflop": 7.0, "differentiable": True, "random": False},
    }
    table = comparison_table(Results(frame(*TINY[:2], *cells), about=about))
    cost = {name: value for (group, name, _), value in line_of(table, "ours").items() if group == "cost"}
    assert cost["psnr"] == pytest.approx((25 + 35) / 2)
    assert cost["ssim"] == pytest.approx(0.6)
    assert cost["ms"] == pytest.approx(4)  # the median of cells: one that had to wait does not count
    assert (cost["pflop"], cost["differentiable"], cost["random"]) == (0.25, False, True)
    bare = line_of(table, "undefended")
    assert np.isnan(bare["cost", "pflop", ""])


# Two, image by image -------------------------------------------------------------------------------------------------


def many(system: str, right: Any, **other: Any) -> dict[str, Any]:
    return {"system": system, "right_clean": [1] * len(right), "right_adv": right} | other


A = many("a", [1] * 8 + [0] * 2 + [1] * 10)
B = many("b", [0] * 8 + [1] * 2 + [1] * 10)


def test_two_systems_on_the_same_images() -> None:
    results = Results(frame(A, B, A | PGD, B | PGD | {"right_adv": [1] * 20}, A | FREE))
    table = paired_table(results.where(system="a"), results.where(system="b"))
    line = only(table, kind="attack", attack="fgsm")
    assert (line["system_a"], line["system_b"], line["n"]) == ("a", "b", 20)
    assert (line["accuracy_a"], line["accuracy_b"]) == (0.9, 0.6)
    assert (line["only_a"], line["only_b"]) == (8, 2)
    assert line["p"] == pytest.approx(mcnemar(8, 2)) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    robust = only(table, kind="robust", knowledge="oblivious")
    assert (robust["norm"], robust["eps"]) == ("linf", 0.3)
    assert (robust["accuracy_a"], robust["accuracy_b"], robust["only_a"], robust["only_b"]) == (0.9, 0.6, 8, 2)
    assert only(table, kind="clean")["p"] == 1
    assert set(table["kind"]) == {"clean", "attack", "robust", "paper"}
    assert "cw" not in set(table["attack"])  # b was not given it


def test_two_runs_are_compared_by_the_names_of_their_systems_on_the_images_of_both() -> None:
    before = Results(frame(A, B))
    shorter = {"right_clean": [1] * 10, "right_adv": [1] * 10}
    after = Results(frame(A | shorter, B, many("c", [1] * 20)))
    table = paired_table(before, after)
    assert set(zip(table["system_a"], table["system_b"])) == {("a", "a"), ("b", "b")}
    line = only(table, system_a="a", kind="attack")
    assert (line["n"], line["accuracy_a"], line["accuracy_b"], line["only_b"]) == (10, 0.8, 1, 2)
    with pytest.raises(
        ValueError, match=r"The first has a \(digits, test, a\), b .*; the second has c .*compare RUN RUN --system NAME"
    ):
        paired_table(before, Results(frame(many("c", [1] * 20), many("d", [1] * 20))))
    with pytest.raises(ValueError, match="no system of the first is in the second"):
        paired_table(before.where(system="a"), Results(frame(A | {"dataset": "mnist"})))


def pairs_of(a: Results, b: Results) -> list[tuple[str, str]]:
    table = paired_table(a, b)
    return list(dict.fromkeys(zip(table["system_a"], table["system_b"])))


def test_what_is_defended_comes_first_and_a_classifier_beside_itself_not_at_all() -> None:
    bare, other = many("undefended", [1] * 5 + [0] * 15), many("undefended", [1] * 4 + [0] * 16)
    assert pairs_of(Results(frame(bare, A)), Results(frame(bare, A))) == [("a", "a")]
    assert pairs_of(Results(frame(bare, A)), Results(frame(other, A))) == [("a", "a"), ("undefended", "undefended")]
    assert pairs_of(Results(frame(bare)), Results(frame(bare))) == [("undefended", "undefended")]
    # The one defended system of each, whatever its name; also where the other run has none.
    assert pairs_of(Results(frame(bare, A)), Results(frame(bare, B))) == [("a", "b")]
    assert pairs_of(Results(frame(bare, A)), Results(frame(other))) == [
        ("a", "undefended"),
        ("undefended", "undefended"),
    ]
    two = [cell | {"classifier": name} for name in ("x", "y") for cell in (bare, A)]
    table = paired_table(Results(frame(*two)), Results(frame(*two)))
    assert list(dict.fromkeys(zip(table["classifier"], table["system_a"]))) == [("x", "a"), ("y", "a")]


def test_all_knowledge_is_compared_where_both_faced_somebody_who_knows() -> None:
    white = {"knowledge": "white_box"}
    both = Results(frame(A, A | white, B, B | white))
    assert len(only(paired_table(both.where(system="a"), both.where(system="b")), kind="robust", knowledge="white_box"))
    one = Results(frame(A, A | white, B))
    table = paired_table(one.where(system="a"), one.where(system="b"))
    assert set(table[table["kind"] == "robust"]["knowledge"]) == {"oblivious"}


def test_a_random_system_is_right_where_every_draw_is() -> None:
    draws = [many("a", right, draw=i) for i, right in enumerate(([1, 1, 0, 1], [1, 0, 0, 1]))]
    results = Results(frame(*draws, many("b", [0, 1, 0, 0])))
    line = only(paired_table(results.where(system="a"), results.where(system="b")), kind="attack")
    assert (line["accuracy_a"], line["accuracy_b"]) == (0.625, 0.25)
    assert (line["only_a"], line["only_b"]) == (2, 1)
