"""Robust accuracy: against its definition spelled out image by image, and monotone whatever the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from made_rows import frame
from unperturb.intervals import wilson
from unperturb.results import Results
from unperturb.results.robust import paper_accuracy, robust_accuracy
from unperturb.threat_models import KNOWLEDGE, ThreatModel

CASES = 60
EPS = (0.05, 0.1, 0.2, 0.3)


def random_rows(case: int, *, system: str = "ours", cells: int | None = None, same: bool = False) -> pd.DataFrame:
    """Rows of one system: a few cells of any knowledge, norm and budget, that saw most of 12 images, in 1 to 3 draws.

    same: all cells saw all images in all draws.
    """
    rng = np.random.default_rng([case, len(system)])
    draws = int(rng.integers(1, 4))
    parts = []
    for number in range(cells or int(rng.integers(1, 7))):
        seen = np.arange(12) if same else np.sort(rng.permutation(12)[: rng.integers(8, 13)])
        n, norm = len(seen), str(rng.choice(["linf", "l2", "l0", ""]))
        hard = np.random.default_rng(case).random((3, 12))  # what is right when clean is the same in all cells
        # Distances on both sides of the budgets, some on a budget to the last bit of 16.
        linf = rng.choice([0.0, 0.04, 0.1, 0.1 + 1e-5, 0.2 - 7e-6, 0.25, 0.3, 0.9], n)
        about = {
            "system": system,
            "attack": f"attack-{number}",
            "attack_repr": f"{rng.choice(['FGSM', 'PGD', 'CW', 'Square'])}(n={number})",
            "norm": norm,
            "eps": float("nan") if norm == "" else float(rng.choice(EPS)),
            "knowledge": str(rng.choice(list(KNOWLEDGE))),
            "index": seen,
            "linf": linf,
            "l2": linf * rng.choice([2.0, 5.0], n),
            "l0": rng.integers(0, 30, n),
            "made_by": "noise",
            "made_with": rng.choice(["", "none"], n),
        }
        for draw in range(draws if same else int(rng.integers(1, draws + 1))):
            right = {"right_clean": hard[draw, seen] < 0.85, "right_adv": rng.random(n) < 0.7}
            parts.append(about | right | {"draw": draw})
    return frame(*parts)


def random_threat_model(rng: np.random.Generator) -> ThreatModel:
    norm = str(rng.choice(["linf", "l2", "l0"]))
    eps = float(rng.choice(EPS)) * {"linf": 1, "l2": 3, "l0": 50}[norm]
    return ThreatModel(norm, round(eps) if norm == "l0" else eps, str(rng.choice(list(KNOWLEDGE))))  # type: ignore[arg-type]


def spelled_out(rows: pd.DataFrame, threat_model: ThreatModel) -> dict[str, Any]:
    """The definition, one image after the other."""
    keys = ["attack", "attack_repr", "norm", "eps", "knowledge"]
    cells = [part for _, part in rows.groupby(keys, dropna=False)]
    draws = set.intersection(*(set(cell["draw"]) for cell in cells))
    images = set.intersection(*(set(cell.loc[cell["draw"] == d, "index"]) for cell in cells for d in draws))
    tolerance = {"linf": 2e-5, "l2": 5e-4, "l0": 0}[threat_model.norm]
    stands = {}
    for image in images:
        kept = []
        for draw in draws:
            mine = rows[(rows["index"] == image) & (rows["draw"] == draw)]
            good = (mine["pred_pure_clean"] == mine["label"]).all()
            for row in mine.to_dict("records"):
                inside = row[threat_model.norm] <= float(threat_model.eps) + tolerance
                if row["knowledge"] in KNOWLEDGE[threat_model.knowledge].includes and inside:
                    good = good and row["pred_pure_adv"] == row["label"]
            kept.append(bool(good))
        stands[image] = kept
    return {"draws": len(draws), "images": stands}


def found(rows: pd.DataFrame, threat_model: ThreatModel) -> Any:
    """The robust accuracy, None where no attack is admitted."""
    try:
        return robust_accuracy(Results(rows), threat_model)
    except ValueError as error:
        if "was tried on" not in str(error):
            raise
        return None


def test_it_is_its_definition_and_its_intervals_are_closed_forms() -> None:
    compared = 0
    for case in range(CASES):
        rows = random_rows(case)
        threat_model = random_threat_model(np.random.default_rng([case, 1]))
        if (robust := found(rows, threat_model)) is None:
            continue
        expected = spelled_out(rows, threat_model)
        kept = np.array(list(expected["images"].values()), float)
        n = len(kept)
        assert robust.draws == expected["draws"]
        assert robust.n == n
        assert robust.images.to_dict() == pytest.approx({k: np.mean(v) for k, v in expected["images"].items()})
        assert robust.accuracy == pytest.approx(kept.mean())
        assert robust.worst == pytest.approx(kept.min(axis=1).mean())
        assert (robust.low, robust.high) == pytest.approx(wilson(round(kept.mean(axis=1).sum()), n))
        assert (robust.worst_low, robust.worst_high) == pytest.approx(wilson(int(kept.min(axis=1).sum()), n))
        compared += 1
    assert compared > CASES / 2


@pytest.mark.parametrize("system", ["undefended", "ours"])
def test_more_knowledge_a_larger_eps_and_more_attacks_never_raise_it(system: str) -> None:
    fell = 0
    for case in range(CASES):
        rows = random_rows(case, system=system, same=True)
        rng = np.random.default_rng([case, 2])
        weaker = random_threat_model(rng)
        attacks = list(rows["attack"].unique())
        some = rows[rows["attack"].isin(attacks[: max(1, len(attacks) // 2)])]
        stronger = [(rows, ThreatModel(weaker.norm, weaker.eps, k)) for k in _above(weaker.knowledge)]
        larger = ThreatModel(weaker.norm, min(1.0, 2 * float(weaker.eps)) if weaker.norm == "linf" else 99, "white_box")
        pairs = [((rows, weaker), other) for other in [*stronger, (rows, larger)]] + [((some, weaker), (rows, weaker))]
        for a, b in pairs:
            before, after = found(*a), found(*b)
            if before is None:
                continue
            assert after is not None  # what was admitted still is
            assert after.n == before.n
            assert after.accuracy <= before.accuracy
            assert after.worst <= before.worst
            assert (after.images <= before.images).all()
            assert set(before.attacks["attack"]) <= set(after.attacks["attack"])
            fell += after.accuracy < before.accuracy
    assert fell > CASES / 4  # that it could have been seen


def _above(knowledge: str) -> list[str]:
    return [name for name, kind in KNOWLEDGE.items() if knowledge in kind.includes]


OURS = {"system": "ours", "right_clean": [1, 1, 1, 0]}
PGD = OURS | {"attack": "pgd-40", "attack_repr": "PGD(eps=0.3)", "right_adv": [1, 0, 1, 1]}
FREE = OURS | {"attack": "cw", "attack_repr": "CW()", "eps": np.nan, "linf": [0.2, 0.6, 0.5, 0.0]}


def test_an_attack_without_a_budget_counts_where_it_stayed_inside() -> None:
    rows = frame(PGD, FREE | {"right_adv": [0, 0, 0, 1]})
    for eps, standing in ((0.2, [0, 1, 1, 0]), (0.3, [0, 0, 1, 0]), (0.6, [0, 0, 0, 0])):
        robust = robust_accuracy(Results(rows), ThreatModel("linf", eps))
        assert robust.images.tolist() == standing
        assert robust.clean == 0.75


def test_the_images_that_all_saw_count_whatever_the_threat_model() -> None:
    few = OURS | {"knowledge": "white_box", "index": np.array([2, 0]), "right_clean": [1, 1], "right_adv": [0, 1]}
    results = Results(frame(PGD, few))
    assert robust_accuracy(results, ThreatModel("linf", 0.3, "oblivious")).images.to_dict() == {0: 1, 2: 1}
    assert robust_accuracy(results, ThreatModel("linf", 0.3, "white_box")).images.to_dict() == {0: 1, 2: 0}
    apart = few | {"index": np.array([8, 9])}
    with pytest.raises(ValueError, match="no image in common"):
        robust_accuracy(Results(frame(PGD, apart)), ThreatModel("linf", 0.3))


def test_a_random_system_faces_all_attacks_in_each_draw_together() -> None:
    cells = [
        OURS | {"attack": attack, "draw": draw, "right_clean": [1] * 4, "right_adv": right}
        for attack, draws in {"a": ([1, 1, 0, 1], [1, 0, 1, 1]), "b": ([1, 1, 1, 0], [1, 1, 0, 1])}.items()
        for draw, right in enumerate(draws)
    ]
    robust = robust_accuracy(Results(frame(*cells)), ThreatModel("linf", 0.3))
    assert robust.images.tolist() == [1, 0.5, 0, 0.5]
    assert (robust.draws, robust.accuracy, robust.worst) == (2, 0.5, 0.25)
    assert (robust.low, robust.high) == pytest.approx(wilson(2, 4))
    assert (robust.worst_low, robust.worst_high) == pytest.approx(wilson(1, 4))


def test_who_attacks_the_undefended_classifier_sees_all_there_is() -> None:
    results = Results(frame(PGD | {"system": "net", "defended": False}))
    for knowledge in ("oblivious", "gray_box", "black_box", "bpda", "white_box"):
        assert robust_accuracy(results, ThreatModel("linf", 0.3, knowledge)).accuracy == 0.5
    with pytest.raises(ValueError, match=r"by transfer was tried on net.* There are oblivious: pgd-40, eps 0\.3"):
        robust_accuracy(results, ThreatModel("linf", 0.3, "transfer"))


def test_an_image_that_an_earlier_stage_broke_stays_broken() -> None:
    maker = {"made_by": ["", "pgd-40", "", ""], "made_with": ["", "oblivious", "", ""]}
    cascade = OURS | {"knowledge": "white_box", "right_adv": [1, 0, 1, 0]} | maker
    results = Results(frame(PGD, cascade))
    assert results.outcomes.loc[results.outcomes["inherited"], "index"].tolist() == [1]
    assert robust_accuracy(results, ThreatModel("linf", 0.3)).images.tolist() == [1, 0, 1, 0]


def test_what_was_tried_on_the_rest_of_a_stronger_attack_says_nothing_of_the_whole() -> None:
    maker = {"made_by": ["", "apgd-ce", "", ""], "made_with": ["", "white_box", "", ""]}
    queries = OURS | {"attack": "square-300", "knowledge": "black_box", "right_adv": [1, 0, 1, 0]} | maker
    results = Results(frame(PGD, queries))
    with pytest.raises(ValueError, match="what a stronger attacker had left"):
        robust_accuracy(results, ThreatModel("linf", 0.3, "black_box"))
    assert robust_accuracy(results, ThreatModel("linf", 0.3, "white_box")).images.tolist() == [1, 0, 1, 0]


def test_no_attack_admitted_is_an_error_and_not_the_clean_accuracy() -> None:
    results = Results(frame(PGD | {"l2": 5.0}))
    for threat_model in (ThreatModel("linf", 0.1), ThreatModel("l2", 0.5), ThreatModel("linf", 0.3, "none")):
        with pytest.raises(ValueError, match="its accuracy would be that on clean images"):
            robust_accuracy(results, threat_model)
    # An attack of the budget counts where it moved nothing: it was tried.
    still = robust_accuracy(Results(frame(PGD | {"linf": 0.0})), ThreatModel("linf", 0.3))
    assert list(still.attacks["attack"]) == ["pgd-40"]


def test_it_is_of_one_system_in_one_block() -> None:
    results = Results(frame(PGD, PGD | {"system": "theirs"}, PGD | {"classifier": "b"}))
    with pytest.raises(ValueError, match=r"here are 3: .*theirs \(digits, test, a\).*; pass system="):
        robust_accuracy(results, ThreatModel("linf", 0.3))
    with pytest.raises(ValueError, match=r"here are 2: .*results\.where\(dataset=, split=, classifier=\)"):
        robust_accuracy(results, ThreatModel("linf", 0.3), system="ours")
    with pytest.raises(ValueError, match="there is no system 'other'; there are: ours"):
        robust_accuracy(results, ThreatModel("linf", 0.3), system="other")
    assert robust_accuracy(results.where(classifier="b"), ThreatModel("linf", 0.3), system="ours").accuracy == 0.5


def test_the_paper_counts_its_six_oblivious_attacks_whatever_their_distance() -> None:
    others = (
        OURS | {"attack": "apgd", "attack_repr": "APGD()", "right_adv": [0, 0, 0, 0]},
        OURS | {"attack": "fgsm", "attack_repr": "FGSM()", "knowledge": "white_box", "right_adv": [0, 0, 0, 0]},
    )
    results = Results(frame(PGD, FREE | {"right_adv": [1, 1, 0, 1]}, *others))
    counted = paper_accuracy(results)
    assert counted.images.tolist() == [1, 0, 0, 0]  # C&W went as far as 0.5
    assert counted.threat_model is None
    assert list(counted.attacks["attack"]) == ["pgd-40", "cw"]
    assert paper_accuracy(results, eps=0.1).images.tolist() == [1, 1, 0, 0]  # C&W alone
    with pytest.raises(ValueError, match=r"none of FGSM, .* was tried on ours"):
        paper_accuracy(Results(frame(*others)))
