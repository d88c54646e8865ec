"""Whole evaluations: from a recipe or from models in hand to rows; resumed, refused, warned of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from toy import Linear, purifier, toy
from unperturb import runs
from unperturb.attackers import EOT
from unperturb.attacks import Attack, create_attack
from unperturb.attacks.context import AttackContext
from unperturb.attacks.losses import cross_entropy
from unperturb.classifiers import create_classifier, save_classifier
from unperturb.config import resolve
from unperturb.data import load_dataset
from unperturb.defenses import Protected, create_defense, save_defense
from unperturb.evaluation import adversarials
from unperturb.evaluation.adversarials import AdversarialStore
from unperturb.evaluation.checks import attackers_of
from unperturb.evaluation.plan import plan_of
from unperturb.evaluation.run import evaluate, only, run_evaluation
from unperturb.recipe_files import read_recipe, recipe_names
from unperturb.registry import UnknownNameError
from unperturb.results import samples, schema
from unperturb.systems import System


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of adversarial images; that of pixels, which take a second to make, is the session's."""
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Two bare digits classifiers and a defense in run folders, and the recipe that crosses them."""
    for name, seed in (("digits-convnet", 0), ("digits-lenet", 1)):
        torch.manual_seed(seed)
        net = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
        save_classifier(tmp_path / name, net)
    save_defense(tmp_path / "ours-digits", purifier(), {})
    return resolve(
        {
            "kind": "evaluation",
            "dataset": "digits",
            "size": 8,
            "n": 8,
            "classifiers": [str(tmp_path / "digits-convnet"), str(tmp_path / "digits-lenet")],
            "surrogate": str(tmp_path / "digits-lenet"),
            "systems": ["undefended", str(tmp_path / "ours-digits")],
            "attacks": [
                {"attack": {"name": "fgsm", "eps": "8/255"}, "label": "small"},
                {"attack": {"name": "pgd", "eps": 0.2, "steps": 2}, "knowledge": ["transfer", "white_box"]},
            ],
            "knowledge": ["oblivious"],
            "batch": 4,
            "shard": 5,
            "samples": 2,
        }
    )


def without_clock(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=["seconds_attack", "seconds_purify"])


def test_a_killed_run_resumes_to_the_same_rows(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told = tmp_path / "out", list[tuple[int, int]]()
    whole = run_evaluation(recipe, out, device="cpu", progress=lambda done, total, _: told.append((done, total)))
    # Two classifiers; fgsm oblivious on two defenses, pgd transferred to two and white box on ours and on none.
    assert set(zip(whole["classifier"], whole["attack"])) == {
        (c, a) for c in ("convnet", "lenet") for a in ("small", "pgd-2")
    }
    cells = 2 * (2 + 2 + 2)
    assert len(whole) == cells * 8
    assert told == [(k, cells * 2) for k in range(1, cells * 2 + 1)]
    assert set(whole.query("knowledge == 'transfer'")["surrogate"]) == {"lenet"}
    assert set(whole.query("knowledge != 'transfer'")["surrogate"]) == {""}

    shards = sorted(out.glob("rows/*/*.parquet"))
    assert len(shards) == cells * 2
    sample = next(iter(sorted(out.glob("samples/*"))))
    cell, tensors = samples.read_sample(sample)
    for cache in ("kept", "lost"):
        for file in (shards[1], shards[8], shards[-1], sample):
            file.unlink()
        if cache == "lost":
            monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "new")
        again = run_evaluation(recipe, out, device="cpu", resume=True)
        pd.testing.assert_frame_equal(without_clock(again), without_clock(whole))
        found, images = samples.read_sample(sample)
        assert found == cell
        assert all(torch.equal(v, tensors[k]) for k, v in images.items())


def test_some_cells_of_a_recipe_alone_are_those_of_the_whole(recipe: Any, tmp_path: Path) -> None:
    recipe = recipe.model_copy(update={"classifiers": recipe.classifiers[:1]})
    whole = run_evaluation(recipe, tmp_path / "whole", device="cpu")
    for chosen, where in (
        ((["ours"], ["pgd-2"], ["white_box"]), "system == 'ours' and attack == 'pgd-2' and knowledge == 'white_box'"),
        ((["undefended", "ours"], ["small"]), "attack == 'small'"),
        (([], [], ["transfer"]), "knowledge == 'transfer'"),
    ):
        some = run_evaluation(only(recipe, *chosen), tmp_path / where, device="cpu")
        expected = whole.query(where)
        assert 0 < len(expected) < len(whole)
        keys = ["classifier", "system", "attack", "knowledge", "index"]
        kept = [without_clock(rows).sort_values(keys).reset_index(drop=True) for rows in (some, expected)]
        pd.testing.assert_frame_equal(*kept)
    assert only(recipe) is recipe  # the whole stays the same run
    with pytest.raises(UnknownNameError, match=r"unknown system 'our'\. Did you mean 'ours'"):
        only(recipe, ["our"])
    with pytest.raises(
        UnknownNameError, match=r"unknown knowledge 'black_box'.*Choices: oblivious, transfer, white_box"
    ):
        only(recipe, knowledge=["black_box"])
    with pytest.raises(ValueError, match=r"the recipe has no white_box cell of small"):
        only(recipe, [], ["small"], ["white_box"])


def test_what_stands_in_the_way_of_a_run(recipe: Any, tmp_path: Path) -> None:
    recipe = recipe.model_copy(update={"n": 2, "classifiers": recipe.classifiers[:1]})
    out = tmp_path / "out"
    run_evaluation(recipe, out, device="cpu")
    with pytest.raises(runs.RunError, match="already holds this run; go on with --resume"):
        run_evaluation(recipe, out, device="cpu")
    with pytest.raises(runs.RunError, match=r"already holds another run: seed was 0 and is 1 now\."):
        run_evaluation(recipe.model_copy(update={"seed": 1}), out, device="cpu", resume=True)
    with runs.lock(out), pytest.raises(runs.RunError, match="is being written by process"):
        run_evaluation(recipe, out, device="cpu", resume=True)
    # The same names, trained again: other rows.
    for folder, key in (
        (recipe.systems[1], "systems.ours"),
        (recipe.surrogate, "surrogates.transfer"),
    ):
        kept = {f: f.read_bytes() for f in Path(folder).iterdir()}
        if key.endswith("ours"):
            save_defense(Path(folder), purifier(5), {})
        else:
            net = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
            save_classifier(Path(folder), net)
        with pytest.raises(runs.RunError, match=rf"another run: the fingerprint of {key} was \w+ and is"):
            run_evaluation(recipe, out, device="cpu", resume=True)
        for file, content in kept.items():
            file.write_bytes(content)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(runs.RunError, match=r"already holds something else \(thesis.txt\)"):
        run_evaluation(recipe, tmp_path / "full", device="cpu")


def test_two_attacks_of_one_name(recipe: Any) -> None:
    things = [{"name": "pgd", "eps": 0.1, "steps": 2}, {"name": "pgd", "eps": 0.2, "steps": 2}]
    twice = resolve({**recipe.model_dump(mode="json"), "attacks": things})
    with pytest.raises(ValueError, match="two attacks are called 'pgd-2'; give one of them a label"):
        plan_of(twice, "cpu")
    with pytest.raises(ValueError, match="attacks share a name"):
        evaluate(toy(), {"undefended": Linear()}, [create_attack(**thing) for thing in things])


def test_a_list_of_budgets_is_an_attack_for_each(recipe: Any) -> None:
    def of(*entries: dict[str, Any]) -> Any:
        return resolve({**recipe.model_dump(mode="json"), "attacks": list(entries)})

    pgd = {"name": "pgd", "eps": [0.1, "8/255"], "steps": 2}
    swept = of(pgd, {"attack": {"name": "fgsm", "eps": [0.1]}, "label": "one step", "knowledge": ["white_box"]})
    plan = plan_of(swept, "cpu")
    assert {label: sent[0].attack.eps for label, sent in plan.attackers.items()} == {
        "pgd-2-0.1": 0.1,
        "pgd-2-8/255": 8 / 255,
        "one step-0.1": 0.1,
    }
    assert [a.knowledge for a in plan.attackers["one step-0.1"]] == ["white_box"]
    assert list(plan_of(only(swept, attacks=["pgd-2-8/255"]), "cpu").attackers) == ["pgd-2-8/255"]
    with pytest.raises(ValueError, match=r"two attacks are called 'pgd-2-0\.1'"):
        plan_of(of({**pgd, "eps": [0.1, "1/10"]}), "cpu")
    with pytest.raises(ValueError, match="eps of 'pgd' is an empty list"):
        plan_of(of({**pgd, "eps": []}), "cpu")
    with pytest.raises(ValueError, match="a budget is a number"):
        plan_of(of({**pgd, "eps": [[0.1]]}), "cpu")


def test_evaluate_digits(tmp_path: Path) -> None:
    data = load_dataset("digits", size=8).test
    torch.manual_seed(0)
    classifier = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    models = {"bare": classifier, "ours": Protected(classifier, purifier())}
    pgd = create_attack("pgd", eps=0.1, steps=2)
    out = tmp_path / "first-look"
    rows = evaluate(data, models, [pgd], ["oblivious", "white_box"], n=15, out=out, device="cpu")
    assert len(rows) == 3 * 15
    assert set(zip(rows["system"], rows["knowledge"])) == {
        ("bare", "oblivious"),
        ("ours", "oblivious"),
        ("ours", "white_box"),
    }
    assert set(rows["classifier"]) == {"convnet"}
    subset = data.subset(15)
    assert set(rows["index"]) == set(subset.index.tolist())
    assert set(rows["split"]) == {"test:15@0"}
    images, labels = subset.batch(torch.arange(15))
    found = rows.query("system == 'ours' and knowledge == 'white_box'").set_index("index").loc[subset.index.tolist()]
    x_adv = pgd(models["ours"].eval(), images, labels, index=subset.index)
    with torch.no_grad():
        right = models["ours"](x_adv).argmax(1) == labels
    assert ((found["pred_pure_adv"] == found["label"]).to_numpy() == right.numpy()).mean() > 0.9
    again = evaluate(data, models, [pgd], ["oblivious", "white_box"], n=15, device="cpu")
    pd.testing.assert_frame_equal(without_clock(again), without_clock(rows))
    pd.testing.assert_frame_equal(schema.read_rows(out), rows)


def refusals() -> Sequence[tuple[Callable[[Path], object], type[Exception], str]]:
    pgd, net = create_attack("pgd", eps=0.1, steps=2), Linear()
    return [
        (
            lambda out: evaluate(toy(), {"undefended": net}, [pgd], ["whitebox"]),
            UnknownNameError,
            "Did you mean 'white_box'",
        ),
        (lambda out: evaluate(toy(), {"undefended": net}, [pgd], ["transfer"]), ValueError, "needs that surrogate"),
        (
            lambda out: evaluate(toy(), {"undefended": net}, [pgd], n=3, out=out, resume=True),
            runs.RunError,
            "another run",
        ),
        (lambda out: evaluate(toy(), {"undefended": net}, [pgd], seed=1, out=out), runs.RunError, "another run"),
        (lambda out: evaluate(toy(), {"undefended": net}, [pgd], out=out), runs.RunError, "already holds this run"),
    ]


@pytest.mark.parametrize("number", range(len(refusals())))
def test_what_evaluate_refuses(number: int, tmp_path: Path) -> None:
    evaluate(
        toy(), {"undefended": Linear()}, [create_attack("pgd", eps=0.1, steps=2)], out=tmp_path / "out", device="cpu"
    )
    call, error, message = refusals()[number]
    with pytest.raises(error, match=message):
        call(tmp_path / "out")


def test_what_cannot_be_asked_is_refused_before_anything_is_written(recipe: Any, tmp_path: Path) -> None:
    alone = recipe.model_copy(update={"surrogate": None})
    with pytest.raises(ValueError, match="needs that surrogate"):
        run_evaluation(alone, tmp_path / "out", device="cpu")
    large = create_defense("defense_gan", channels=1, size=28, width=2, latent=4)
    said = (
        "purifier of 'gan' takes images of .* 28x28 pixels, but those of toy have .* 8x8 pixels: load them with size=28"
    )
    with pytest.raises(ValueError, match=said):
        evaluate(toy(), {"gan": Protected(Linear(), large)}, [create_attack("fgsm", eps=0.1)])
    assert not (tmp_path / "out").exists()


def test_a_random_defense_is_averaged_over_as_many_passes_as_the_recipe_says(recipe: Any) -> None:
    def samples_of(**changed: Any) -> set[int]:
        plan = plan_of(recipe.model_copy(update=changed), "cpu")
        return {attacker.eot_samples for own in plan.attackers.values() for attacker in own}

    assert samples_of() == {20}
    assert samples_of(eot_samples=5) == {5}
    drawn = Protected(Linear(), create_defense("denoised_smoothing", channels=1, denoiser={"width": 2}).eval())
    (attacker,) = attackers_of([create_attack("fgsm", eps=0.1)], ["white_box"], 3)["fgsm"]
    function = attacker.model_for(System.of("drawn", drawn))
    assert isinstance(function, EOT)
    assert function.eot_samples == 3


def test_no_shipped_recipe_flatters_a_random_system() -> None:
    shipped = [read_recipe(name) for name in recipe_names()]
    shipped = [getattr(one, "evaluation", one) for one in shipped]
    assert all((one.eot_samples or 20) >= 20 and one.draws >= 10 for one in shipped if one.kind == "evaluation")


def test_rows_that_were_copied_over_another_cells_are_refused(recipe: Any, tmp_path: Path) -> None:
    small = recipe.model_copy(update={"classifiers": recipe.classifiers[:1], "attacks": recipe.attacks[:1]})
    out = tmp_path / "out"
    run_evaluation(small, out, device="cpu")
    one, other = sorted(f for f in out.glob("rows/*"))
    first, second = (folder / "0000.parquet" for folder in (one, other))
    kept = second.read_bytes()

    def again() -> pd.DataFrame:
        return run_evaluation(small, out, device="cpu", resume=True)

    second.write_bytes(first.read_bytes())
    for read in (again, lambda: schema.read_rows(out)):
        with pytest.raises(
            runs.RunError, match=r"0000.parquet (is of another cell|was copied there).*; delete it and run"
        ):
            read()
    second.write_bytes((other / "0001.parquet").read_bytes())
    with pytest.raises(runs.RunError, match="rows of other images"):
        again()
    second.write_bytes(kept)
    stranger = out / "rows" / "stranger"
    stranger.mkdir()
    (stranger / "0000.parquet").write_bytes(kept)
    with pytest.raises(runs.RunError, match="was copied there"):
        again()
    frame = pd.read_parquet(second).assign(attack="another")
    frame.to_parquet(stranger / "0000.parquet")
    with pytest.raises(runs.RunError, match=r"does not hold 8 images in each of its 2 cells.*another"):
        again()
    shutil.rmtree(stranger)
    second.unlink()
    assert len(again()) == 2 * 8


@dataclass(frozen=True, kw_only=True)
class Blank(Attack):
    """All white."""

    def perturb(self, context: AttackContext) -> Tensor:
        context.gradient(context.images, cross_entropy)
        return torch.ones_like(context.images)


class Fragile(Linear):
    """Says nothing of white images, nor of the one whose first pixel is 0; its gradient ends at bright ones."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        dim = torch.where(flat.mean(1, keepdim=True) < self.bright, flat, flat.detach())
        return super().forward(dim) / (flat.mean(1, keepdim=True) < 1) / (flat[:, :1] != 0)

    bright = 1.0


def test_answers_that_are_not_finite_are_wrong_and_named(tmp_path: Path) -> None:
    data = toy()
    data.images[:, 0, 0, 0] = torch.arange(10)  # the first image begins with a 0
    labels = torch.zeros_like(data.labels)  # NaN would pass for class 0
    data = replace(data, labels=labels)
    blank = {"bare": Fragile()}
    with pytest.warns(
        UserWarning, match="classifier · bare · white · oblivious: logits are not finite for 10 of 10 .*index 100, 101"
    ):
        rows = evaluate(data, blank, {"white": Blank()}, ["oblivious"], out=tmp_path / "out", batch=4, device="cpu")
    rows = rows.sort_values("index")
    assert rows["pred_clean"].tolist()[0] == -1
    assert (rows["pred_clean"][1:] >= 0).all()
    assert set(rows["pred_adv"]) == set(rows["pred_pure_adv"]) == {-1}
    assert set(rows["conf_adv"]) == {0.0}
    assert rows["nonfinite"].tolist() == [1] + [0] * 9  # what the attack met on its way


def test_gradients_that_are_zero_are_counted_and_warned_of(tmp_path: Path) -> None:
    model, data = Fragile(), toy()
    means = data.images.float().mean((1, 2, 3)) / 255
    model.bright = float(means.sort().values[6])  # four of ten have no gradient
    pgd = create_attack("pgd", eps=0.01, steps=3, random_start=False)
    blocked = (means >= model.bright).tolist()
    with pytest.warns(
        UserWarning, match=r"classifier · undefended · pgd-3 · oblivious: for 4 of 10 images .*exactly zero"
    ):
        rows = evaluate(
            data, {"undefended": model}, [pgd], ["oblivious"], out=tmp_path / "out", device="cpu"
        ).sort_values("index")
    assert (rows["zero_gradients"] * 2 > rows["gradients"]).tolist() == blocked
    assert set(rows["gradients"]) == {3}
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    for _ in range(2):  # what is kept of an attack keeps them too
        made = AdversarialStore(tmp_path / "c").get(
            pgd, net, "key", data, torch.arange(10), seed=0, batch=4, device=torch.device("cpu")
        )
        assert (made.gradients.tolist(), made.zero_gradients.tolist()) == ([3] * 10, [0] * 10)


def test_classes_in_another_order_are_said_to_be(recwarn: pytest.WarningsRecorder) -> None:
    data, fgsm = toy(40), [create_attack("fgsm", eps=0.1)]
    evaluate(data, {"undefended": Linear()}, fgsm, ["oblivious"], device="cpu")
    assert not recwarn.list
    turned = replace(data, labels=(data.labels + 1) % 4, class_names=["cat", "dog", "hen", "owl"])
    evaluate(turned.take(torch.arange(19)), {"undefended": Linear()}, fgsm, ["oblivious"], device="cpu")
    assert not recwarn.list  # too few to say
    with pytest.warns(
        UserWarning, match=r"is right on \d of 40 .* near chance for 4 classes.*\(cat, dog, hen, \.\.\.\).*class_names="
    ):
        evaluate(turned, {"undefended": Linear()}, fgsm, ["oblivious"], device="cpu")
