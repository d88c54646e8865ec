"""At the door of `evaluate`: each mistake is answered with what to pass instead, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unperturb.attackers import Attacker
from unperturb.attacks import create_attack
from unperturb.attacks.base import Attack
from unperturb.benchmarking import benchmark
from unperturb.classifiers import create_classifier, wrap
from unperturb.config import RecipeError, resolve
from unperturb.data import ImageSet, Splits
from unperturb.defenses import Defense, Protected, create_defense
from unperturb.evaluation import adversarials, plan
from unperturb.evaluation.plan import by_name, plan_of
from unperturb.evaluation.run import evaluate
from unperturb.recipe_files import read_recipe
from unperturb.systems import System


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "cache")


def data(channels: int = 1, classes: int = 3) -> ImageSet:
    return ImageSet(
        images=torch.randint(0, 256, (6, channels, 8, 8), dtype=torch.uint8),
        labels=torch.arange(6) % classes,
        index=torch.arange(6),
        class_names=[f"class {k}" for k in range(classes)],
        source="toy",
        split="test",
    )


def net(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


FGSM = create_attack("fgsm", eps=0.1)
NET = net()
EMPTY = data().take(torch.arange(0), name="none of it")
LOADER = DataLoader(TensorDataset(torch.rand(2, 1, 8, 8), torch.zeros(2)))
SPLITS = Splits(train=data(), val=data(), test=data(), class_names=list("abc"), source="toy")


class Grows(Defense):
    def purify(self, images: Tensor) -> Tensor:
        return images.repeat(1, 1, 2, 2)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no systems": (
        {"systems": {}},
        r"systems is empty; pass at least one by name, such as \{'undefended': net\}",
    ),
    "an empty list": ({"systems": []}, "systems is empty"),
    "a bare module": (
        {"systems": net()},
        r"systems must be a dict by the names that tables show.*or a list of System, not a Sequential",
    ),
    "a list of modules": ({"systems": [net()]}, "or a list of System, not a list"),
    "a lambda": (
        {"systems": {"a": lambda x: x}},
        r"systems\['a'\] must be an nn.Module.*make it an nn.Module whose",
    ),
    "a folder": ({"systems": {"a": "runs/a"}}, r"systems\['a'\] must be .* not the text 'runs/a'; load or build"),
    "a class": ({"systems": {"a": nn.Flatten}}, "not the class Flatten"),
    "a purifier alone": ({"systems": {"a": create_defense("jpeg")}}, r"is a purifier alone; pass Protected\(classif"),
    "another classifier": (
        {"systems": {"a": net(), "ours": Protected(net(), create_defense("jpeg")), "b": net()}},
        r"'a' is another classifier than the one behind ours: say what it is.*"
        r"\{'a': System\('a', net, base=classifier\)\}.*judged apart: \{'a': System\('a', net\)\}",
    ),
    "two of one name": ({"systems": [System("a", NET), System("a", NET, create_defense("jpeg"))]}, "two systems are c"),
    "one name, two defenses": (
        {"systems": [System("a", net(), create_defense(name)) for name in ("jpeg", "median")]},
        "'a' names different defenses of different classifiers",
    ),
    "a number as name": ({"systems": {1: net()}}, "system names are what tables show; 1 is no such text"),
    "an escape": ({"systems": {"\x1b[31m": net()}}, r"system name '\\x1b\[31m' holds control characters"),
    "two lines": ({"attacks": {"a\nb": FGSM}}, r"attack name 'a\\nb' holds control characters"),
    "no name": ({"attacks": {" ": FGSM}}, "attack names are what tables show"),
    "a nameless system": ({"systems": [System("", NET)]}, "system names are what tables show"),
    "one attacker": ({"attacks": Attacker(FGSM, "oblivious")}, r"pass \[Attacker\(\.\.\.\)\]"),
    "one attack": ({"attacks": FGSM}, r"attacks must be a list: pass \[FGSM\(\.\.\.\)\]"),
    "a name": (
        {"attacks": ["pgd"]},
        r"'pgd' is only a name; pass the attack itself: create_attack\('pgd', eps=8/255\)",
    ),
    "one name": ({"attacks": "pgd"}, "attacks must be a list, .*not the text 'pgd'"),
    "no attacks": ({"attacks": []}, "attacks is empty; pass at least one"),
    "a class of attacks": ({"attacks": [Attack]}, "made by create_attack.*not the class Attack"),
    "one knowledge": ({"knowledge": "white_box"}, r"knowledge must be a list.*not 'white_box'"),
    "no knowledge": ({"knowledge": []}, "knowledge is empty"),
    "a loader": ({"data": LOADER}, r"data must be an ImageSet, such as load_dataset.*not a DataLoader"),
    "splits": ({"data": SPLITS}, r"pass the images to judge on, such as load_dataset\(\.\.\.\)\.test"),
    "no images": ({"data": EMPTY}, "none of it of toy holds no images"),
    "n of 0": ({"n": 0}, "n must be a whole number of 1 or more, not 0"),
    "half an n": ({"n": 2.5}, "n must be a whole number"),
    "too large an n": ({"n": 7}, "n is 7, but test of toy holds 6 images; leave n out to take all"),
    "no batch": ({"batch": 0}, "batch must be a whole number of 1 or more"),
    "no samples": ({"eot_samples": 0}, "eot_samples must be a whole number of 1 or more"),
    "no draws": ({"draws": 0}, "draws must be a whole number of 1 or more"),
    "a seed below 0": ({"seed": -1}, "seed must be a whole number of 0 or more"),
    "a surrogate by name": ({"surrogate": "lenet"}, "surrogate must be an nn.Module"),
    "a purifier as surrogate": ({"surrogate": create_defense("jpeg")}, "surrogate must be an nn.Module"),
    "a classifier as purifier": ({"surrogate_defense": net()}, "surrogate_defense must be a purifier.*not a Sequen"),
    "no surrogate": ({"knowledge": ["transfer"]}, "another classifier of the attacker's own.*set surrogate$"),
    "no purifier": (
        {"systems": {"a": Protected(net(), create_defense("jpeg"))}, "knowledge": ["gray_box"]},
        "a purifier of the attacker's own.*set surrogate_defense",
    ),
    "labels beyond": (
        {"data": data(classes=5)},
        r"gives 3 logits, but toy has images of class 4 \('class 4'\).*class_names=",
    ),
    "other channels": (
        {"data": data(3)},
        r"classifier 'classifier' fails on images of toy, float32 \(2, 3, 8, 8\).*channels",
    ),
    "no logits": (
        {"systems": {"undefended": nn.Flatten(0)}},
        r"classifier 'classifier': the model must return logits of shape",
    ),
    "one logit": ({"systems": {"undefended": net(1)}}, r"one logit per image.*wrap\(model, binary=True\)"),
    "a purifier that grows": ({"systems": {"g": Protected(net(), Grows())}}, r"must give images of the shape .*16, 16"),
    "gradients of outputs": ({"knowledge": ["black_box"]}, "FGSM needs a gradient, and black_box gives none"),
}


@pytest.mark.parametrize("what", WRONG)
def test_each_mistake_is_answered_with_what_to_pass(what: str, tmp_path: Path) -> None:
    changed, message = WRONG[what]
    given = {"data": data(), "systems": {"undefended": net()}, "attacks": [FGSM], "device": "cpu", **changed}
    with pytest.raises((TypeError, ValueError), match=message) as error:
        evaluate(given.pop("data"), given.pop("systems"), given.pop("attacks"), out=tmp_path / "out", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_gray_purifier_before_color_is_refused() -> None:
    color = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    gray = create_defense("hgd", channels=1, denoiser={"width": 4})
    with pytest.raises(
        ValueError, match=r"purifier of 'ours' takes images of 1 channel, any size, but those of toy have 3 channels"
    ):
        evaluate(data(3), {"ours": Protected(color, gray)}, [FGSM], device="cpu")


def made_for(channels: int, size: int) -> nn.Module:
    half = [0.5] * channels
    return create_classifier("lenet5", channels=channels, size=size, classes=3, mean=half, std=half)


OTHERS = {
    "colors": (System("net", made_for(3, 28)), "the classifier of 'net' takes images of 3 channels, 28x28 pixels", ""),
    "mean": (
        System("net", wrap(nn.Flatten(), [0.5] * 3, [0.5] * 3)),
        "the classifier of 'net' takes images of 3 channels, any size",
        "",
    ),
    "size": (
        System("net", nn.Flatten(), base=made_for(1, 28)),
        "the undefended classifier of 'net' takes images of 1 channel, 28x28 pixels",
        r"load them with size=28 \(--size 28\), or ",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_net_for_other_images_is_refused_with_both_sides(what: str) -> None:
    system, its, advice = OTHERS[what]
    said = f"^{its}, but those of toy have 1 channel, 8x8 pixels: {advice}take another .*classifier or other images$"
    with pytest.raises(ValueError, match=said):
        evaluate(data(), [system], [FGSM], device="cpu")
    with pytest.raises(ValueError, match=said):
        benchmark(system, data(), quiet=True)


def test_names_in_any_script_are_peoples_own() -> None:
    rows = evaluate(data(), {"undefended": net()}, {"шум (8/255) [/red] é 雑音": FGSM}, ["oblivious"], device="cpu")
    assert set(rows["attack"]) == {"шум (8/255) [/red] é 雑音"}


def test_numbers_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="n: Input should be greater than 0, not 0"):
        read_recipe("white_box-mnist", ["n=0"])
    monkeypatch.setattr(plan, "load_dataset", lambda *_, **__: SPLITS)
    described = {"kind": "evaluation", "dataset": "toy", "n": 7, "attacks": [{"name": "fgsm", "eps": 0.1}]}
    with pytest.raises(ValueError, match="n is 7, but test of toy holds 6 images; leave n out to take all"):
        plan_of(resolve({**described, "classifiers": ["runs/none"]}), "cpu")


def test_a_folder_may_not_pass_for_no_defense() -> None:
    with pytest.raises(
        ValueError, match="runs/undefended would be called 'undefended' in tables, as if there were no defense"
    ):
        by_name(["undefended", "runs/undefended"], "digits")
    assert by_name(["undefended", "identity"], "digits") == {"undefended": "undefended", "identity": "identity"}


@pytest.mark.parametrize("names", [("none", "undefended"), ("undefended", "none")])
def test_no_name_means_anything(names: tuple[str, str]) -> None:
    bare, pure = names
    systems = {pure: Protected(NET, create_defense("median")), bare: NET}
    rows = evaluate(data(), systems, {"none": FGSM}, device="cpu")
    assert set(zip(rows["system"], rows["defended"], rows["knowledge"])) == {
        (bare, False, "oblivious"),
        (pure, True, "oblivious"),
        (pure, True, "white_box"),
    }


def test_an_attacker_of_ones_own_keeps_its_knowledge() -> None:
    mine = [Attacker(FGSM, "white_box", eot_samples=2), Attacker(FGSM, "oblivious"), create_attack("mim", eps=0.1)]
    systems = {"it": Protected(NET, create_defense("median"))}
    rows = evaluate(data(), systems, mine, ["bpda"], device="cpu")
    assert set(zip(rows["attack"], rows["knowledge"])) == {
        ("fgsm", "white_box"),
        ("fgsm", "oblivious"),
        ("mim-10", "bpda"),
    }
    with pytest.raises(ValueError, match=r"attacks share a name \(fgsm\)"):
        evaluate(data(), systems, [*mine, Attacker(FGSM, "oblivious", eot_samples=5)], device="cpu")


# The caller's models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_as_they_were(fails: bool) -> None:
    part = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    model = nn.Sequential(part, nn.Flatten(), nn.Linear(128, 3)).train()
    part[1].eval()
    part[0].weight.requires_grad_(False)
    defense = create_defense("hgd", channels=1, denoiser={"width": 4}).train()
    models: dict[str, Any] = {
        "undefended": model,
        "ours": Protected(model, defense).train(),
        "other": System("other", net().train(), base=model),
    }
    part[1].eval()
    parts = [model, models["ours"], models["other"].classifier]
    everything = {id(m): m for one in parts for m in one.modules()}.values()
    modes = [m.training for m in everything]
    wanted = [p.requires_grad for one in parts for p in one.parameters()]
    weights = [t.clone() for one in parts for t in one.state_dict().values()]
    if fails:
        with pytest.raises(ValueError, match="fails on images"):
            evaluate(
                data(),
                {**models, "another": System("x", nn.Sequential(model, nn.Linear(9, 9)), base=model)},
                [FGSM],
                device="cpu",
            )
    else:
        evaluate(data(), models, [FGSM], surrogate=net().train(), device="cpu")
    assert [m.training for m in everything] == modes
    assert [p.requires_grad for one in parts for p in one.parameters()] == wanted
    assert all(torch.equal(a, b) for a, b in zip(weights, (t for m in parts for t in m.state_dict().values())))
    assert all(p.grad is None for one in parts for p in one.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_go_back_to_their_device() -> None:
    model, surrogate = net(), net()
    models = {"undefended": model, "ours": Protected(model, create_defense("hgd", channels=1, denoiser={"width": 4}))}
    evaluate(data(), models, [FGSM], ["oblivious", "white_box", "transfer"], surrogate=surrogate, device="cuda")
    for one in (*models.values(), surrogate):
        assert {t.device.type for t in one.state_dict().values()} == {"cpu"}
