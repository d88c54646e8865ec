"""Doubts: each is raised by what it is about and by nothing less, and says so in one sentence."""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sabotaged import BATCH, HONEST, SABOTAGED, attackers, digits, evaluated
from sabotaged import EPS as SMALL
from unperturb.attackers import Attacker
from unperturb.attacks import attacks, create_attack
from unperturb.attacks.kinds import MinimalAttack
from unperturb.classifiers import load_classifier
from unperturb.data import load_dataset
from unperturb.defenses import load_defense
from unperturb.evaluation.probe import probe
from unperturb.results import Results
from unperturb.results.flags import FLAGS, Flag, flags_of
from unperturb.results.schema import ROW_COLUMNS
from unperturb.systems import System

ROOT = Path(__file__).resolve().parent.parent
N = 100
EPS = 0.3
KINDS: list[Any] = [attacks[name] for name in attacks]
MINIMAL = [kind for kind in KINDS if issubclass(kind, MinimalAttack)]


# Rows without a run ---------------------------------------------------------------------------------------------------


def cell(
    attack: str,
    knowledge: str,
    breaks: Collection[int] = (),
    *,
    n: int = N,
    draws: int = 1,
    only: Collection[int] | None = None,
    base_breaks: Collection[int] = range(N),
    **columns: Any,
) -> pd.DataFrame:
    """The rows of one attack with a budget of `EPS` on `n` images of class 1, right when clean.

    breaks: which it breaks, in all of `draws`, or in `only` these; base_breaks: which of the base classifier's. The
    system is called as if it were adversarially trained: what it withstands is no claim to be compared.
    """
    kind, _, steps = attack.partition("-")
    record = {"fgsm": f"FGSM(eps={EPS})", "pgd": f"PGD(eps={EPS}, alpha=None, steps={steps}, restarts=1)"}
    index, draw = np.tile(np.arange(n), draws), np.repeat(np.arange(draws), n)
    broken = np.isin(index, list(breaks)) & np.isin(draw, list(only if only is not None else range(draws)))
    gradients = 0 if kind in ("noise", "square") else 10
    known: dict[str, Any] = {"int": 0, "bool": False, "string": "", "float32": 0.0, "list<float32>": None}
    rows: dict[str, Any] = {
        name: next(value for start, value in known.items() if dtype.startswith(start))
        for name, dtype in ROW_COLUMNS.items()
    }
    rows |= {"dataset": "digits", "split": "test", "classifier": "net", "system": "robust", "defended": True}
    rows |= {"attack": attack, "attack_repr": record.get(kind, f"{kind.capitalize()}(eps={EPS})")}
    rows |= {"norm": "linf", "eps": EPS, "linf": EPS, "l2": 1.0, "l0": 10, "knowledge": knowledge, "label": 1}
    rows |= {"pred_clean": 1, "pred_pure_clean": 1, "pred_adv": 1 - np.isin(index, list(base_breaks))}
    rows |= {"pred_pure_adv": 1 - broken, "pred_pure_adv_8bit": 1 - broken, "gradients": gradients, "zero_gradients": 0}
    return pd.DataFrame({**rows, "index": index, "draw": draw, **columns})


def results(
    *cells: pd.DataFrame, probe: Mapping[str, Any] | None = None, about: Mapping[str, Any] | None = None
) -> Results:
    rows = pd.concat(cells, ignore_index=True)
    return Results(rows, about={("digits", "robust"): about or {}}, probes={("digits", "", "robust"): probe or {}})


def flags(*cells: pd.DataFrame, **known: Any) -> list[Flag]:
    return flags_of(results(*cells, **known))


def names(*cells: pd.DataFrame, **known: Any) -> set[str]:
    return {flag.name for flag in flags(*cells, **known)}


STRONG = functools.partial(cell, "pgd-40", "white_box")
SOUND = STRONG(range(95))  # an evaluation that says nothing against itself: 5 of 100 withstand it


def test_a_sound_evaluation_raises_nothing() -> None:
    assert flags(SOUND) == []
    everything = (
        cell("noise", "none", range(2)),
        cell("pgd-40", "transfer", range(10)),
        cell("pgd-40", "oblivious", range(20)),
        cell("fgsm", "white_box", range(60)),
        cell("pgd-40", "bpda", range(40)),
        SOUND,
        cell("square", "black_box", range(50)),
    )
    assert flags(*everything) == []


# Who knows more ------------------------------------------------------------------------------------------------------

WEAKER = {
    "none": "knows-more-does-worse",
    "transfer": "knows-more-does-worse",
    "oblivious": "knows-more-does-worse",
    "gray_box": "knows-more-does-worse",
    "black_box": "black-box-wins",
    "bpda": "wrong-gradient",
}


@pytest.mark.parametrize(("knowledge", "name"), WEAKER.items())
def test_who_knows_more_and_does_worse_is_named_with_the_images(knowledge: str, name: str) -> None:
    (flag,) = flags(cell("pgd-40", knowledge, range(10, 60)), STRONG(range(20)))
    assert (flag.name, flag.severity, flag.system) == (name, "broken", "robust")
    assert flag.evidence["images"] == [20, 21, 22, 23, 24]
    assert flag.evidence["count"] == 40
    assert " breaks 40 of 100 images that white box pgd-40, eps 0.3" in flag.says
    assert "images 20, 21, 22, 23, 24 and others" in flag.says


@pytest.mark.parametrize(("knowledge", "name"), WEAKER.items())
def test_one_image_is_a_draw_and_a_few_are_a_doubt(knowledge: str, name: str) -> None:
    weak = functools.partial(cell, "pgd-40", knowledge)
    assert name not in names(weak([96]), SOUND)
    (flag,) = flags(weak([96, 97]), SOUND)
    assert (flag.name, flag.severity) == (name, "doubt")
    # 0.2 points, of many images.
    many = STRONG(range(1900), n=2000)
    assert name not in names(weak(range(1900, 1904), n=2000), many)
    assert name in names(weak(range(1900, 1905), n=2000), many)


def test_only_what_is_near_enough_and_really_tried_is_compared() -> None:
    weak, strong = cell("pgd-40", "oblivious", range(50)), STRONG(range(20))
    assert "knows-more-does-worse" in names(weak, strong)
    assert "knows-more-does-worse" not in names(weak.assign(linf=0.31), strong), "outside the stronger one's budget"
    assert "knows-more-does-worse" not in names(weak, strong.assign(norm="l2", eps=0.5)), "another norm"
    # A cascade does not try again what is broken.
    cascade = STRONG(range(50)).assign(made_by=["oblivious: pgd-40"] * 50 + [""] * 50)
    assert "knows-more-does-worse" not in names(weak, cascade)
    # A minimal-norm attack that came near enough has broken them too.
    nearest = cell("deepfool", "white_box", range(N), norm="", eps=float("nan"), attack_repr="DeepFool()")
    assert "knows-more-does-worse" not in names(weak, strong, nearest.assign(linf=0.2))
    assert "knows-more-does-worse" in names(weak, strong, nearest.assign(linf=0.4))


def test_images_that_are_wrong_when_clean_count_for_nobody() -> None:
    weak, strong = (c.assign(pred_pure_clean=0) for c in (cell("pgd-40", "oblivious", range(50)), STRONG(range(20))))
    assert "knows-more-does-worse" not in names(weak, strong)


def test_of_an_undefended_system_the_oblivious_attacker_sees_all() -> None:
    plain = cell("pgd-40", "oblivious", range(50), defended=False)
    assert names(plain) == set()
    assert names(plain, cell("square", "black_box", range(90), defended=False)) == {"black-box-wins"}
    assert names(plain, cell("pgd-40", "transfer", range(60), defended=False)) == {"knows-more-does-worse"}


def test_a_random_system_is_not_judged_by_one_draw() -> None:
    declared = {"about": {"random": True}}
    lucky = cell("pgd-40", "oblivious", range(50), draws=10, only=[3])
    often = cell("pgd-40", "oblivious", range(50), draws=10, only=range(8))
    strong = STRONG(range(20), draws=10)
    assert "knows-more-does-worse" not in names(lucky, strong, **declared)
    assert "knows-more-does-worse" in names(often, strong, **declared)


# Rows ----------------------------------------------------------------------------------------------------------------


def test_zero_gradients_count_on_images_that_withstand() -> None:
    # Of the broken images all gradients were zero: they needed none any more.
    fooled = np.where(np.arange(N) < 95, 10, 0)
    assert "gradient-masked" not in names(SOUND.assign(zero_gradients=fooled))
    assert "gradient-masked" in names(SOUND.assign(zero_gradients=10 - fooled))
    assert "gradient-masked" not in names(SOUND.assign(zero_gradients=1)), "a tenth is the limit"
    assert "gradient-masked" in names(SOUND.assign(zero_gradients=2))
    targeted = SOUND.assign(zero_gradients=10, attack_repr=f"PGD(targets='least_likely', eps={EPS}, steps=40)")
    assert "gradient-masked" not in names(targeted), "who has reached a target has no gradient left"
    assert "gradient-masked" not in names(SOUND.assign(gradients=-1, zero_gradients=-1)), "not recorded"
    assert "gradient-masked" not in names(STRONG(range(99)).assign(zero_gradients=10)), "one image"


def test_a_single_step_beats_many_only_where_both_attack_the_whole() -> None:
    one, many = cell("fgsm", "white_box", range(40)), STRONG(range(20))
    assert names(one, many) == {"single-step-wins"}
    assert names(cell("fgsm", "white_box", range(21)), many) == set(), "one image"
    assert names(cell("fgsm", "oblivious", range(40)), cell("pgd-40", "oblivious", range(20))) == set()


def test_a_larger_budget_leaves_no_more() -> None:
    def at(eps: float, breaks: Iterable[int]) -> pd.DataFrame:
        record = f"PGD(eps={eps}, alpha=None, steps=40, restarts=1)"
        return STRONG(list(breaks)).assign(eps=eps, linf=eps, attack_repr=record)

    assert names(at(0.1, range(50)), at(0.2, range(80)), at(0.5, range(90))) == set()
    (flag,) = flags(at(0.1, range(50)), at(0.2, range(40)))
    assert flag.name == "not-monotone"
    assert "leaves 60.0 % at Linf 0.2, and 50.0 % at 0.1" in flag.says
    (flag,) = flags(at(0.5, range(70)))
    assert flag.name == "not-monotone"
    assert "gray (guessing: at most 19.0 %)" in flag.says


def test_an_attack_without_a_budget_breaks_nearly_all() -> None:
    def unbounded(breaks: Collection[int], record: str, knowledge: str = "white_box") -> pd.DataFrame:
        return cell("x", knowledge, breaks, norm="", eps=float("nan"), linf=0.5, attack_repr=record)

    assert "unbounded-fails" in names(SOUND, unbounded(range(90), "DeepFool(steps=50)"))
    assert "unbounded-fails" not in names(SOUND, unbounded(range(95), "DeepFool(steps=50)"))
    assert "unbounded-fails" not in names(SOUND, unbounded(range(50), "JSMA(gamma=0.145)")), "it has a limit of its own"
    assert "unbounded-fails" not in names(SOUND, unbounded(range(50), "CW(steps=9)", "oblivious"))
    both = unbounded(range(60), "DeepFool(steps=50)"), unbounded(range(40, N), "CW(steps=9)", "bpda")
    assert "unbounded-fails" not in names(SOUND, *both), "what one leaves, another breaks"
    by_gradients = {kind.__name__ for kind in MINIMAL if kind.needs_gradient} - {"JSMA"}
    assert {"EAD", "FMN"} < by_gradients
    for kind in by_gradients:
        assert "unbounded-fails" in names(SOUND, unbounded(range(90), f"{kind}(steps=50)")), kind


def test_more_steps_that_break_what_all_others_leave() -> None:
    few, many = STRONG(range(50)), STRONG(range(60)).assign(attack="pgd-80")
    many["attack_repr"] = many["attack_repr"].str.replace("steps=40", "steps=80")
    (flag,) = flags(few, many)
    assert (flag.name, flag.severity, flag.evidence["count"]) == ("not-converged", "doubt", 10)
    others = cell("apgd", "white_box", range(60), attack_repr=f"APGD(eps={EPS}, steps=100)")
    assert names(few, many, others) == set(), "what more steps break is broken by others too"
    near = many.assign(attack_repr=many["attack_repr"].str.replace("steps=80", "steps=50"))
    assert names(few, near) == set(), "not twice as many"


def test_noise_that_does_as_well() -> None:
    noise = functools.partial(cell, "noise", "none")
    assert names(noise(range(30)), STRONG(range(30))) == {"noise-does-as-well"}
    assert names(noise(range(30)), STRONG(range(60))) == set()
    assert names(noise(range(1)), STRONG(range(1))) == set(), "who is hardly touched says nothing"
    assert names(noise(range(95)), STRONG(range(95))) == set(), "nor who is broken by both"


def test_a_random_system_needs_draws() -> None:
    def drawn(draws: int) -> list[Flag]:
        return flags(STRONG(range(95), draws=draws), about={"random": True})

    (flag,) = drawn(1)
    assert flag.name == "few-draws"
    assert "1 draw," in flag.says
    assert [f.name for f in drawn(9)] == ["few-draws"]
    assert drawn(10) == []


def test_rounding_to_8_bits_changes_little() -> None:
    def rounded(breaks: Collection[int], *others: pd.DataFrame) -> set[str]:
        return names(STRONG(range(90)).assign(pred_pure_adv_8bit=1 - np.isin(np.arange(N), list(breaks))), *others)

    assert rounded(range(88)) == set(), "2 %"
    assert rounded(range(80)) == {"eight-bit-differs"}
    assert rounded(range(80), cell("square", "black_box", range(90))) == set(), "another attack breaks them rounded too"
    assert rounded(range(N), cell("square", "black_box", range(90, N))) == {"eight-bit-differs", "black-box-wins"}
    assert names(SOUND.assign(pred_pure_adv_8bit=-2)) == set(), "not recorded"


def test_what_lies_outside_its_ball_or_was_not_moved() -> None:
    far = np.where(np.arange(N) == 7, 0.31, 0.3)
    (flag,) = flags(SOUND.assign(linf=far))
    assert (flag.name, flag.evidence["count"]) == ("outside-the-ball", 1)
    assert "images 7" in flag.says
    assert names(SOUND.assign(linf=EPS + 1e-5)) == set(), "16-bit storage"
    assert names(SOUND.assign(norm="l2", eps=2.0, l2=2.01)) == set(), "the same, in L2"
    assert names(SOUND.assign(norm="l2", eps=2.0, l2=2.1)) == {"outside-the-ball"}
    still = np.where(np.arange(N) < 3, 0.0, 0.3)
    assert names(SOUND.assign(linf=still)) == {"outside-the-ball"}
    assert names(SOUND.assign(linf=still, pred_pure_clean=0)) == set(), "wrong when clean: no attack is needed"
    assert "HopSkipJump" in {kind.__name__ for kind in MINIMAL}
    for kind in MINIMAL:
        assert names(SOUND.assign(linf=still, attack_repr=f"{kind.__name__}(eps=0.3)")) == set(), "it fails so"


def test_attacks_that_the_base_withstands_say_nothing() -> None:
    weak = cell("pgd-40", "oblivious", range(5), base_breaks=range(40))
    assert names(weak, SOUND) == {"attack-too-weak"}
    assert names(weak, cell("cw", "oblivious", range(5), attack_repr="CW()", base_breaks=range(90)), SOUND) == set()
    assert names(cell("pgd-40", "oblivious", range(5), base_breaks=range(50)), SOUND) == set()
    assert names(weak.assign(defended=False)) == set(), "a robust net alone is no weak attack"


def test_a_claim_stands_beside_adversarial_training() -> None:
    claims = STRONG(range(60), system="ours")
    (flag,) = flags(claims)
    assert (flag.name, flag.severity) == ("no-adversarial-training", "note")
    assert names(claims, STRONG(range(40))) == set()
    assert names(claims.assign(system="adversarial")) == set(), "it is one"
    in_place = Results(claims, about={}, probes={("digits", "", "ours"): {"purifier": 0}})
    assert flags_of(in_place) == [], "it is one, as far as can be told"
    assert names(claims.assign(defended=False)) == set()
    assert names(STRONG(range(85), system="ours")) == set(), "what is broken claims nothing"


def test_answers_that_are_none() -> None:
    assert names(SOUND.assign(pred_pure_adv=np.where(np.arange(N) == 3, -1, SOUND["pred_pure_adv"]))) == {"no-answer"}


# The probe's numbers -------------------------------------------------------------------------------------------------

RAISED = {
    "random-answers": ({"repeat_difference": 1e-3}, {"repeat_difference": 1e-5}),
    "probabilities": ({"probabilities": 1.0}, {"probabilities": 0.5}),
    "gradient-masked": ({"zero_gradient_clean": 0.2}, {"zero_gradient_clean": 0.05}),
    "autograd-inside": ({"autograd_calls": 1}, {"autograd_calls": 0}),
    "not-monotone": (
        {"sweep_eps": [0.25, 0.5], "sweep_accuracy": [0.3, 0.3]},
        {"sweep_eps": [0.25, 0.5], "sweep_accuracy": [0.3, 0.1]},
    ),
    "not-converged": ({"steps_accuracy": [0.0, 0.0]}, {"steps_accuracy": [0.6, 0.6]}),
    "frozen-withstands": ({"frozen_accuracy": 0.5}, {"frozen_accuracy": 0.2}),
    "wrong-gradient": ({"difference_error": 0.5}, {"difference_error": 0.05}),
    "gradients-not-aligned": ({"gradient_alignment": 0.01}, {"gradient_alignment": 0.2}),
    "batch-dependent": ({"batch_difference": 0.1}, {"batch_difference": 1e-3}),
    "exact-pixels": ({"known_images": 1.0}, {"known_images": 0.03}),
    "no-answer": ({"no_answer": 0.1}, {"no_answer": 0.0}),
}
PROBE = {"n": 32, "eps": EPS, "norm": "linf", "classes": 10, "clean_accuracy": 1.0, "steps": [20, 40]}
PROBE |= {"difference_images": 32, "alignment_noise": 0.0063}


@pytest.mark.parametrize(("name", "numbers"), RAISED.items())
def test_each_number_of_the_probe_is_read(name: str, numbers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    rows = STRONG(range(60))
    raised, quiet = numbers
    assert names(rows, probe=PROBE | raised) == {name}
    assert names(rows, probe=PROBE | quiet) == set()


@pytest.mark.parametrize(
    "raised",
    [
        {"no_gradient": 1},
        {"nan_gradient": 0.5},
        {"zero_gradient_perturbed": 0.5},
        {"zero_gradient_clean": 1.0, "saturated": 1.0},
    ],
)
def test_every_way_to_have_no_gradient(raised: dict[str, Any]) -> None:
    (flag,) = flags(SOUND, probe=PROBE | raised)
    assert (flag.name, flag.severity) == ("gradient-masked", "broken")
    assert ("the softmax is saturated" in flag.says) == ("saturated" in raised)


def test_where_no_attack_by_gradients_was_sent_to_what_gives_none_no_number_is_false() -> None:
    queries = cell("square-300", "black_box", range(95))
    (flag,) = flags(cell("noise", "none"), queries, probe=PROBE | {"no_gradient": 1})
    assert (flag.name, flag.severity) == ("gradient-masked", "doubt")


def test_what_else_says_that_pixels_are_recognized() -> None:
    assert names(SOUND, probe=PROBE | {"known_pattern": 1.0}) == {"exact-pixels"}
    assert names(SOUND, probe=PROBE | {"nudged_accuracy": 0.5}) == {"exact-pixels"}
    assert names(SOUND, probe=PROBE | {"nudged_accuracy": 0.95}) == set()


def test_the_probe_goes_further_than_the_evaluation() -> None:
    rows = STRONG(range(60))
    moving = {"steps_accuracy": [0.5, 0.3]}
    (flag,) = flags(rows, probe=PROBE | moving)
    assert flag.name == "not-converged"
    assert "doubling the steps" in flag.says
    assert names(SOUND, probe=PROBE | moving) == set(), "the evaluation went further than the probe"
    assert names(rows, probe=PROBE | moving | {"eps": 0.1}) == set(), "another budget"


def test_a_system_that_says_it_is_random_is_not_blamed_for_it() -> None:
    rows = STRONG(range(95), draws=10)
    assert names(rows, probe=PROBE | {"repeat_difference": 0.5, "random": 1}) == set()
    assert names(rows, probe=PROBE | {"repeat_difference": 0.5}, about={"random": True}) == set()


# Order, and what is said ---------------------------------------------------------------------------------------------


def test_the_most_damning_comes_first_and_causes_before_what_they_explain() -> None:
    probe = PROBE | {"batch_difference": 0.5, "autograd_calls": 3, "difference_error": 0.9}
    found = flags(cell("pgd-40", "oblivious", range(50)), STRONG(range(20)), probe=probe)
    order = ["batch-dependent", "wrong-gradient", "knows-more-does-worse", "autograd-inside"]
    assert [flag.name for flag in found] == order


def test_one_sentence_for_a_system_in_front_of_several_classifiers() -> None:
    parts = [
        part.assign(classifier=net)
        for net, breaks in (("a", range(30)), ("b", range(80)))
        for part in (cell("pgd-40", "oblivious", breaks), STRONG(range(20)))
    ]
    (flag,) = flags(*parts)
    assert flag.classifiers == ("b", "a")
    assert flag.evidence["count"] == 60


def test_systems_are_doubted_one_by_one() -> None:
    other = [c.assign(system="other") for c in (cell("pgd-40", "oblivious", range(50)), STRONG(range(20)))]
    (flag,) = flags(SOUND, *other)
    assert (flag.system, flag.name) == ("other", "knows-more-does-worse")


# Pages ---------------------------------------------------------------------------------------------------------------


def test_every_flag_has_a_number_and_a_page_that_says_it() -> None:
    assert [kind.number for kind in FLAGS.values()] == list(range(1, len(FLAGS) + 1))
    for name, kind in FLAGS.items():
        page = (ROOT / "docs" / "flags" / f"{name}.md").read_text(encoding="utf-8")
        lines = page.splitlines()
        assert lines[0] == f"# {kind.number}. `{name}`"
        assert f"Severity: **{kind.severity}**" in page
        assert kind.meaning in page
        for heading in ("When raised", "What it means", "What to do", "Source"):
            assert f"**{heading}.**" in page, (name, heading)
        assert len(lines) <= 25
        assert max(map(len, lines)) <= 120
    assert {p.stem for p in (ROOT / "docs" / "flags").glob("*.md")} == set(FLAGS) | {"README"}
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert packed["wheel"]["force-include"]["docs/flags"] == "unperturb/results/flag_pages"
    assert "/docs" in packed["sdist"]["include"]  # of which wheels are made
    index = (ROOT / "docs" / "flags" / "README.md").read_text(encoding="utf-8")
    for name, kind in FLAGS.items():
        assert f"| {kind.number} | [{name}]({name}.md) | {kind.severity} | {kind.meaning} |" in index


def _table() -> dict[str, tuple[str, str, str]]:
    """name -> (what is broken, what is seen, flag) of the rows in docs/sabotaged.md."""
    text = (ROOT / "docs" / "sabotaged.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| (.+?) \| (.+?) \| \[(.+?)\]\(flags/\4\.md\) \|$", text, flags=re.M)
    return {name: (broken, seen, flag) for name, broken, seen, flag in rows}


def test_the_table_of_sabotaged_systems_is_that_of_the_tests() -> None:
    table = _table()
    assert list(table) == list(SABOTAGED)
    for name, sabotage in SABOTAGED.items():
        attack, percent = sabotage.naive
        seen = f"{attack}: {'an error' if percent is None else f'{percent} %'}"
        assert table[name] == (sabotage.broken, seen, sabotage.flag)


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SABOTAGED if name != "refuses"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_broken_is_flagged_for_its_own_reason(name: str, tmp_path: Path) -> None:
    sabotage = SABOTAGED[name]
    attack, percent = sabotage.naive
    sent = attackers(SMALL)
    if percent is None:
        with pytest.raises(ValueError, match="gives no gradient"):
            evaluated(sabotage.system(), tmp_path / "all", sent)
        sent = [a for a in sent if not (a.attack.needs_gradient and a.knowledge == "white_box")]
    found = evaluated(sabotage.system(), tmp_path / "run", sent)
    assert flags_of(found)[0].name == sabotage.flag
    if percent is not None:
        rows = found.rows
        if attack == "clean":
            seen = (rows["pred_pure_clean"] == rows["label"])[rows["knowledge"] == "none"]
        else:
            rows = rows[(rows["attack"] == attack) & (rows["knowledge"] == "white_box")]
            seen = rows["pred_pure_adv"] == rows["label"]
        # The net is trained here and now: on another processor it is a little another.
        assert abs(100 * seen.mean() - percent) <= 15


def test_what_raises_an_error_is_flagged_before_it_ends_an_evaluation(tmp_path: Path) -> None:
    sabotage = SABOTAGED["refuses"]
    with pytest.raises((RuntimeError, ValueError), match="too dark"):
        evaluated(sabotage.system(), tmp_path)
    numbers = probe(sabotage.system(), *digits(), eps=SMALL)
    (flag,) = flags(SOUND, probe=numbers)
    assert (flag.name, flag.evidence["probed"]) == (sabotage.flag, numbers["no_answer"])


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.filterwarnings("ignore")
def test_what_is_honest_is_not(name: str, tmp_path: Path) -> None:
    found = evaluated(HONEST[name](), tmp_path)
    assert flags_of(found) == []
    assert len(found.cells) >= 5
    assert found.rows["index"].nunique() == BATCH


ZOO: dict[str, Callable[[], System]] = {
    "mnist-robust": lambda: System("net", load_classifier(ROOT / "zoo" / "mnist-robust")),
    "finetune-mnist": lambda: System(
        "net", load_classifier(ROOT / "zoo" / "mnist-resnet8"), load_defense(ROOT / "zoo" / "finetune-mnist")
    ),
}
REAL = os.environ.get("UNPERTURB_DATA", "")
NO_MNIST = pytest.mark.skipif(not (Path(REAL) / "mnist").is_dir(), reason="no mnist under $UNPERTURB_DATA")
MNIST = pytest.param("mnist", marks=[pytest.mark.slow, pytest.mark.data, NO_MNIST])


@pytest.mark.parametrize("source", ["digits", MNIST])  # both are 28x28 and gray
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore")
def test_the_nets_of_the_zoo_are_honest(name: str, source: str, tmp_path: Path) -> None:
    pgd = create_attack("pgd", eps=EPS, steps=40)
    sent = [Attacker(create_attack("noise", eps=EPS), "none"), Attacker(pgd, "oblivious"), Attacker(pgd, "white_box")]
    found = evaluated(ZOO[name](), tmp_path, sent, load_dataset(source).test.subset(16))
    assert flags_of(found) == []
    if name == "finetune-mnist":  # who attacks the whole breaks it: a result, and no flag
        rows = found.rows[found.rows["knowledge"] == "white_box"]
        assert (rows["pred_pure_adv"] == rows["label"]).mean() <= 0.15
