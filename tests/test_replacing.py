"""Classifiers that are defenses themselves, filters, pipelines: what is attacked, what is judged, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from unperturb import runs
from unperturb.attackers import Attacker
from unperturb.attacks import create_attack
from unperturb.classifiers import create_classifier, save_classifier
from unperturb.config import resolve
from unperturb.data import load_dataset
from unperturb.defenses import Protected, create_defense, save_defense
from unperturb.devices import Speed
from unperturb.evaluation import costs as told
from unperturb.evaluation.costs import estimate
from unperturb.evaluation.grid import run_grid
from unperturb.evaluation.plan import Plan, plan_of
from unperturb.evaluation.run import evaluate, run_evaluation
from unperturb.results import schema
from unperturb.systems import System


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_CACHE", str(cache))  # the module's: the digits are decoded once
    monkeypatch.setattr(told, "probe", lambda *_: Speed({("float32", "contiguous"): 10.0}))


def net(seed: int) -> Any:
    torch.manual_seed(seed)
    return create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35]).eval()


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    for name, seed in (("digits-convnet", 0), ("digits-second", 1), ("adversarial-digits", 2)):
        save_classifier(tmp_path / name, net(seed))
    torch.manual_seed(3)
    ours = create_defense("hgd", channels=1, denoiser={"width": 4})
    for tensor in ours.state_dict().values():
        tensor.add_(torch.randn_like(tensor) * 0.05)
    save_defense(tmp_path / "ours-digits", ours, {})
    return resolve(
        {
            "kind": "evaluation",
            "dataset": "digits",
            "size": 8,
            "n": 12,
            "classifiers": [str(tmp_path / "digits-convnet"), str(tmp_path / "digits-second")],
            "systems": [
                "undefended",
                str(tmp_path / "adversarial-digits"),
                f"{tmp_path / 'ours-digits'}+jpeg",
                "median",
            ],
            "attacks": [
                {"name": "pgd", "eps": 0.2, "steps": 3},
                {"attack": {"name": "square", "eps": 0.2, "queries": 3}, "knowledge": ["black_box"]},
            ],
            "knowledge": ["oblivious", "bpda", "white_box"],
            "shard": 5,
            "samples": 2,
        }
    )


def test_a_classifier_that_is_a_defense_stands_in_the_others_place(recipe: Any, tmp_path: Path) -> None:
    keep = {"knowledge": ["oblivious", "white_box"], "systems": recipe.systems[:2]}
    rows = run_evaluation(recipe.model_copy(update=keep), tmp_path / "out", device="cpu")
    assert set(zip(rows["system"], rows["defended"])) == {("undefended", False), ("adversarial", True)}
    data = load_dataset("digits", size=8).test.subset(12)
    x, y = data.batch(torch.arange(12))
    robust, attack = net(2), create_attack("pgd", eps=0.2, steps=3)
    for name, bare in (("convnet", net(0)), ("second", net(1))):
        for knowledge, attacked in (("oblivious", bare), ("white_box", robust)):
            mine = rows.query(f"classifier == '{name}' and system == 'adversarial' and knowledge == '{knowledge}'")
            mine = mine.set_index("index").loc[data.index.tolist()]
            x_adv = attack(attacked, x, y, index=data.index)
            for column, model, images in (
                ("pred_clean", bare, x),
                ("pred_adv", bare, x_adv),
                ("pred_pure_clean", robust, x),
                ("pred_pure_adv", robust, x_adv),
            ):
                with torch.no_grad():
                    found = model(images).argmax(1)
                assert (mine[column].to_numpy() == found.numpy()).mean() > 0.9, (name, knowledge, column)
            assert mine["psnr_pure_adv"].to_numpy() == pytest.approx(mine["psnr_adv"].to_numpy())
    # White box is one and the same before whichever classifier; oblivious is not.
    of = {
        k: [p["linf"].to_numpy() + p["l2"].to_numpy() for _, p in q.sort_values("index").groupby("classifier")]
        for k, q in rows[rows["system"] == "adversarial"].groupby("knowledge")
    }
    np.testing.assert_array_equal(*of["white_box"])
    assert not np.array_equal(*of["oblivious"])


def test_in_python_too() -> None:
    data = load_dataset("digits", size=8).test
    pgd = create_attack("pgd", eps=0.2, steps=2)
    bare, robust = net(0), net(2)
    systems = {
        "bare": bare,
        "robust": System("it", robust, base=bare),
        "ours": Protected(net(0), create_defense("median")),  # another object, and the same function
    }
    rows = evaluate(data, systems, [pgd], n=9, device="cpu")
    assert set(rows["classifier"]) == {"convnet"}
    assert set(zip(rows["system"], rows["knowledge"])) == {
        ("bare", "oblivious"),
        *((d, k) for d in ("robust", "ours") for k in ("oblivious", "white_box")),
    }
    subset = data.subset(9)
    x, _ = subset.batch(torch.arange(9))
    mine = rows.query("system == 'robust' and knowledge == 'oblivious'").set_index("index").loc[subset.index.tolist()]
    for column, seed in (("pred_clean", 0), ("pred_pure_clean", 2)):
        with torch.no_grad():
            assert (mine[column].to_numpy() == net(seed)(x).argmax(1).numpy()).mean() > 0.85
    listed = [System("bare", bare), System("robust", robust, base=bare), System("ours", bare, create_defense("median"))]
    again = evaluate(data, listed, [pgd], n=9, device="cpu")
    without = ["seconds_attack", "seconds_purify"]
    pd.testing.assert_frame_equal(rows.drop(columns=without), again.drop(columns=without))


def test_different_classifiers_in_one_call_are_blocks_of_their_own() -> None:
    data = load_dataset("digits", size=8).test
    pgd = create_attack("pgd", eps=0.2, steps=2)
    first, second, median = net(0), net(1), create_defense("median")
    both = [System("bare", first), System("median", first, median), System("bare", second)]
    both.append(System("median", second, median))
    rows = evaluate(data, both, [pgd], n=9, device="cpu")
    for name, model in (("convnet", first), ("convnet-2", second)):
        alone = evaluate(data, {"bare": model, "median": Protected(model, median)}, [pgd], n=9, device="cpu")
        mine = rows[rows["classifier"] == name].drop(columns=["classifier", "seconds_attack", "seconds_purify"])
        pd.testing.assert_frame_equal(mine.reset_index(drop=True), alone[mine.columns])
    assert not np.array_equal(*(part["l2"].to_numpy() for _, part in rows.groupby("classifier")))


def test_names_and_cost_and_what_is_another_run(recipe: Any, tmp_path: Path) -> None:
    plan = plan_of(recipe, "cpu")
    assert list(plan.classifiers) == ["convnet", "second"]
    for classifier, bare in plan.classifiers.items():
        block = plan.block(classifier)
        assert [s.name for s in block] == ["undefended", "adversarial", "ours+jpeg", "median"]
        assert all(s.bare is bare for s in block)
        assert [s.classifier is bare for s in block] == [True, False, True, True]
    assert len({id(s.purifier) for s in plan.systems if s.name == "median"}) == 1  # one, before both
    # Without a defense white box and BPDA are oblivious; with a classifier in its place BPDA is white box.
    assert len(plan.cells()) == 2 * (2 + 3 + 2 * 4)
    assert estimate(plan).pflop > 0
    small = recipe.model_copy(update={"classifiers": recipe.classifiers[:1], "knowledge": ["oblivious"], "n": 3})
    run_evaluation(small, tmp_path / "out", device="cpu")
    save_classifier(Path(recipe.systems[1]), net(9))
    with pytest.raises(runs.RunError, match=r"another run: the fingerprint of systems\.adversarial was"):
        run_evaluation(small, tmp_path / "out", device="cpu", resume=True)
    twice = recipe.model_copy(
        update={"systems": ["undefended", str(tmp_path / "x" / "ours-digits"), recipe.systems[2][:-5]]}
    )
    with pytest.raises(ValueError, match="would both be called 'ours'"):
        plan_of(twice, "cpu")


def test_pipelines_and_filters_are_judged_as_any_other(recipe: Any, tmp_path: Path) -> None:
    keep = {"classifiers": recipe.classifiers[:1], "systems": recipe.systems[2:]}
    rows = run_evaluation(recipe.model_copy(update=keep), tmp_path / "out", device="cpu")
    assert set(zip(rows["system"], rows["knowledge"])) == {
        (d, k) for d in ("ours+jpeg", "median") for k in ("oblivious", "bpda", "white_box", "black_box")
    }
    (chain,) = {s.purifier for s in plan_of(recipe, "cpu").systems if s.name == "ours+jpeg"}
    assert chain is not None
    data = load_dataset("digits", size=8).test.subset(12)
    x, _ = data.batch(torch.arange(12))
    mine = rows.query("system == 'ours+jpeg' and knowledge == 'bpda'").set_index("index").loc[data.index.tolist()]
    with torch.no_grad():
        clean = net(0)(chain.purify(x)).argmax(1)
    assert (mine["pred_pure_clean"].to_numpy() == clean.numpy()).mean() > 0.9
    # The differentiable codec and the identity are two attackers, and what each made is kept apart.
    both = [
        rows.query(f"system == 'ours+jpeg' and knowledge == '{k}'").sort_values("index")["l2"].to_numpy()
        for k in ("bpda", "white_box")
    ]
    assert not np.array_equal(*both)


def test_a_random_defense_gives_the_same_rows_again(tmp_path: Path) -> None:
    data = load_dataset("digits", size=8).test.subset(10)
    torch.manual_seed(0)
    classifier = net(0)
    noisy = create_defense("denoised_smoothing", channels=1, denoiser={"width": 4}, sigma=0.5).eval()

    fgsm = create_attack("fgsm", eps=0.2)

    def run(out: Path, seed: int = 0) -> pd.DataFrame:
        plan = Plan(
            data=data,
            systems=[System("undefended", classifier), System("noisy", classifier, noisy)],
            attackers={"fgsm": [Attacker(fgsm, kind) for kind in ("oblivious", "white_box")]},
            seed=seed,
            shard=5,
            samples=0,
            draws=3,
        )
        run_grid(plan, out)
        return schema.read_rows(out).drop(columns=["seconds_attack", "seconds_purify"])

    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    whole = run(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's draws are his own
    for shard in sorted((tmp_path / "a").glob("rows/*/*.parquet"))[1::2]:
        shard.unlink()
    torch.manual_seed(12)
    pd.testing.assert_frame_equal(run(tmp_path / "a"), whole)
    other = run(tmp_path / "b", seed=1)
    assert not np.array_equal(whole["psnr_pure_clean"], other["psnr_pure_clean"])
