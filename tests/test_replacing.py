"""Classifiers that are defenses themselves, filters, pipelines: what is attacked, what is judged, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from unperturb import runs
from unperturb.attacks import create_attack
from unperturb.classifiers import create_classifier, save_classifier
from unperturb.config import resolve
from unperturb.data import load_dataset
from unperturb.defenses import Protected, create_defense, save_defense
from unperturb.devices import Speed
from unperturb.evaluation import jobs as evaluation_jobs
from unperturb.evaluation.grid import Grid, run_grid
from unperturb.evaluation.jobs import estimate, evaluate, grid_of, run_evaluation
from unperturb.results import schema
from unperturb.training import jobs


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_CACHE", str(cache))  # the module's: the digits are decoded once
    monkeypatch.setattr(evaluation_jobs, "probe", lambda *_: Speed({("float32", "contiguous"): 10.0}))


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
            "defenses": ["none", str(tmp_path / "adversarial-digits"), f"{tmp_path / 'ours-digits'}+jpeg", "median"],
            "attacks": [
                {"name": "pgd", "eps": 0.2, "steps": 3},
                {"name": "square", "eps": 0.2, "queries": 3, "knowledge": ["black_box"]},
            ],
            "knowledge": ["oblivious", "bpda", "white_box"],
            "shard": 5,
            "samples": 2,
        }
    )


def test_a_classifier_that_is_a_defense_stands_in_the_others_place(recipe: Any, tmp_path: Path) -> None:
    keep = {"knowledge": ["oblivious", "white_box"], "defenses": recipe.defenses[:2]}
    rows = run_evaluation(recipe.model_copy(update=keep), tmp_path / "out", device="cpu")
    assert set(rows["defense"]) == {"none", "adversarial"}
    data = load_dataset("digits", size=8).test.subset(12)
    x, y = data.batch(torch.arange(12))
    robust, attack = net(2), create_attack("pgd", eps=0.2, steps=3)
    for name, bare in (("convnet", net(0)), ("second", net(1))):
        for knowledge, attacked in (("oblivious", bare), ("white_box", robust)):
            mine = rows.query(f"classifier == '{name}' and defense == 'adversarial' and knowledge == '{knowledge}'")
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
        for k, q in rows[rows["defense"] == "adversarial"].groupby("knowledge")
    }
    np.testing.assert_array_equal(*of["white_box"])
    assert not np.array_equal(*of["oblivious"])


def test_in_python_too() -> None:
    data = load_dataset("digits", size=8).test
    pgd = create_attack("pgd", eps=0.2, steps=2)
    models = {"none": net(0), "robust": net(2), "ours": Protected(net(0), create_defense("median"))}
    rows = evaluate(data, models, [pgd], n=9, device="cpu")
    assert set(zip(rows["defense"], rows["knowledge"])) == {
        ("none", "oblivious"),
        *((d, k) for d in ("robust", "ours") for k in ("oblivious", "white_box")),
    }
    subset = data.subset(9)
    x, _ = subset.batch(torch.arange(9))
    mine = rows.query("defense == 'robust' and knowledge == 'oblivious'").set_index("index").loc[subset.index.tolist()]
    for column, seed in (("pred_clean", 0), ("pred_pure_clean", 2)):
        with torch.no_grad():
            assert (mine[column].to_numpy() == net(seed)(x).argmax(1).numpy()).mean() > 0.85
    with pytest.raises(ValueError, match="stand on 2 different classifiers"):
        evaluate(data, {"none": net(0), "ours": Protected(net(2), create_defense("median"))}, [pgd], n=3)


def test_names_and_cost_and_what_is_another_run(recipe: Any, tmp_path: Path) -> None:
    grid = grid_of(recipe, "cpu")
    assert list(grid.defenses) == ["none", "adversarial", "ours+jpeg", "median"]
    assert list(grid.instead) == ["adversarial"]
    # Without a defense white box and BPDA are oblivious; with a classifier in its place BPDA is white box.
    assert len(grid.cells()) == 2 * (2 + 3 + 2 * 4)
    assert estimate(grid).pflop > 0
    small = recipe.model_copy(update={"classifiers": recipe.classifiers[:1], "knowledge": ["oblivious"], "n": 3})
    run_evaluation(small, tmp_path / "out", device="cpu")
    save_classifier(Path(recipe.defenses[1]), net(9))
    with pytest.raises(runs.RunError, match=r"another run \(it differs in fingerprints\.defenses\.adversarial"):
        run_evaluation(small, tmp_path / "out", device="cpu", resume=True)
    twice = recipe.model_copy(
        update={"defenses": ["none", str(tmp_path / "x" / "ours-digits"), recipe.defenses[2][:-5]]}
    )
    with pytest.raises(ValueError, match="would both be called 'ours'"):
        grid_of(twice, "cpu")


def test_pipelines_and_filters_are_judged_as_any_other(recipe: Any, tmp_path: Path) -> None:
    keep = {"classifiers": recipe.classifiers[:1], "defenses": recipe.defenses[2:]}
    rows = run_evaluation(recipe.model_copy(update=keep), tmp_path / "out", device="cpu")
    assert set(zip(rows["defense"], rows["knowledge"])) == {
        (d, k) for d in ("ours+jpeg", "median") for k in ("oblivious", "bpda", "white_box", "black_box")
    }
    chain = grid_of(recipe, "cpu").defenses["ours+jpeg"]
    data = load_dataset("digits", size=8).test.subset(12)
    x, _ = data.batch(torch.arange(12))
    mine = rows.query("defense == 'ours+jpeg' and knowledge == 'bpda'").set_index("index").loc[data.index.tolist()]
    with torch.no_grad():
        clean = net(0)(chain.purify(x)).argmax(1)
    assert (mine["pred_pure_clean"].to_numpy() == clean.numpy()).mean() > 0.9
    # The differentiable codec and the identity are two attackers, and what each made is kept apart.
    both = [
        rows.query(f"defense == 'ours+jpeg' and knowledge == '{k}'").sort_values("index")["l2"].to_numpy()
        for k in ("bpda", "white_box")
    ]
    assert not np.array_equal(*both)


def test_a_random_defense_gives_the_same_rows_again(tmp_path: Path) -> None:
    data = load_dataset("digits", size=8).test.subset(10)
    torch.manual_seed(0)
    classifier = net(0)
    noisy = create_defense("denoised_smoothing", channels=1, denoiser={"width": 4}, sigma=0.5).eval()

    def run(out: Path, seed: int = 0) -> pd.DataFrame:
        grid = Grid(
            data=data,
            classifiers={"net": classifier},
            defenses={"none": create_defense("none"), "noisy": noisy},
            attacks={"fgsm": (create_attack("fgsm", eps=0.2), ["oblivious", "white_box"])},
            seed=seed,
            shard=5,
            samples=0,
        )
        run_grid(grid, out)
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


# A defense that has nothing to learn ----------------------------------------------------------------------------------


def test_a_filter_is_trained_by_the_same_verb(tmp_path: Path) -> None:
    data = load_dataset("digits", size=8)
    recipe = resolve(
        {
            "kind": "defense",
            "dataset": "digits",
            "size": 8,
            "classifiers": ["unused"],
            "defense": {"name": "jpeg", "quality": 30},
            "adversarial_batches": {"attacks": [{"name": "fgsm", "eps": 0.1}]},
            "training": {"steps": 1},
        }
    )
    task = jobs.defense_task(recipe, data, [net(0)])
    assert jobs.estimate(task, recipe.training).pflop == 0
    defense = jobs.train_defense(recipe, net(0), data, out=tmp_path / "run", device="cpu")
    assert (defense.outcome.steps, defense.outcome.pflop) == (0, 0.0)
    images, labels = data.val.batch(torch.arange(len(data.val)))
    right = (net(0)(create_defense("jpeg", quality=30).purify(images)).argmax(1) == labels).float().mean()
    assert defense.outcome.validation["clean"] == pytest.approx(float(right.detach()), abs=2.1 / len(images))
    assert set(defense.outcome.validation) == {"clean", "fgsm-0", "score"}
    assert runs.read_json(tmp_path / "run" / "training.json")["validation"] == defense.outcome.validation
    from unperturb.defenses import load_defense

    assert torch.equal(load_defense(tmp_path / "run").purify(images), create_defense("jpeg", quality=30).purify(images))
    again = jobs.train_defense(recipe, net(0), data, out=tmp_path / "run", device="cpu", resume=True)
    assert again.outcome.validation == defense.outcome.validation


def test_a_pipeline_of_filters_is_a_recipe_too(tmp_path: Path) -> None:
    data = load_dataset("digits", size=8)
    parts = [{"name": "bit_depth", "bits": 2}, {"name": "median"}]
    recipe = resolve(
        {
            "kind": "defense",
            "dataset": "digits",
            "size": 8,
            "classifiers": ["unused"],
            "defense": {"name": "pipeline", "parts": parts},
            "adversarial_batches": {"knowledge": "white_box", "attacks": [{"name": "fgsm", "eps": 0.1}]},
            "training": {"steps": 1},
        }
    )
    defense = jobs.train_defense(recipe, nn.Sequential(net(0)), data, out=tmp_path / "run", device="cpu")
    assert defense.spec == {"name": "pipeline", "options": {"parts": parts}}
