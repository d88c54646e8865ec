"""At the door of `evaluate`: each mistake is answered with what to pass instead, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unperturb.attacks import create_attack
from unperturb.attacks.base import Attack
from unperturb.config import RecipeError, read_recipe, resolve
from unperturb.data import ImageSet, Splits
from unperturb.defenses import Defense, Protected, create_defense
from unperturb.evaluation import adversarials, jobs
from unperturb.evaluation.jobs import evaluate, grid_of


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
EMPTY = data().take(torch.arange(0), name="none of it")
LOADER = DataLoader(TensorDataset(torch.rand(2, 1, 8, 8), torch.zeros(2)))
SPLITS = Splits(train=data(), val=data(), test=data(), class_names=list("abc"), source="toy")


class Grows(Defense):
    def purify(self, images: Tensor) -> Tensor:
        return images.repeat(1, 1, 2, 2)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no models": ({"models": {}}, r'models is empty; pass at least one by name, such as \{"none": net\}'),
    "a bare module": ({"models": net()}, r"models must be a dict by the names that tables show.*not a Sequential"),
    "a lambda": (
        {"models": {"none": lambda x: x}},
        r"models\['none'\] must be an nn.Module.*make it an nn.Module whose",
    ),
    "a folder": ({"models": {"a": "runs/a"}}, r"models\['a'\] must be .* not the text 'runs/a'; load or build"),
    "a class": ({"models": {"a": nn.Flatten}}, "not the class Flatten"),
    "a defense alone": ({"models": {"a": create_defense("jpeg")}}, r"is a defense alone; pass Protected\(classifier"),
    "none that is some": (
        {"models": {"none": Protected(net(), create_defense("jpeg"))}},
        "is a Protected: name it oth",
    ),
    "a number as name": ({"models": {1: net()}}, "model names are what tables show; 1 is no such text"),
    "an escape": ({"models": {"\x1b[31m": net()}}, r"model name '\\x1b\[31m' holds control characters"),
    "two lines": ({"attacks": {"a\nb": FGSM}}, r"attack name 'a\\nb' holds control characters"),
    "no name": ({"attacks": {" ": FGSM}}, "attack names are what tables show"),
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
    "no draws": ({"eot_samples": 0}, "eot_samples must be a whole number of 1 or more"),
    "a seed below 0": ({"seed": -1}, "seed must be a whole number of 0 or more"),
    "a surrogate by name": ({"surrogate": "lenet"}, "surrogate must be an nn.Module"),
    "labels beyond": (
        {"data": data(classes=5)},
        r"gives 3 logits, but toy has images of class 4 \('class 4'\).*class_names=",
    ),
    "other channels": (
        {"data": data(3)},
        r"classifier 'classifier' fails on images of toy, float32 \(2, 3, 8, 8\).*channels",
    ),
    "no logits": (
        {"models": {"none": nn.Flatten(0)}},
        r"classifier 'classifier': the model must return logits of shape",
    ),
    "one logit": ({"models": {"none": net(1)}}, r"one logit per image.*wrap\(model, binary=True\)"),
    "a purifier that grows": ({"models": {"g": Protected(net(), Grows())}}, r"must give images of the shape .*16, 16"),
    "gradients of outputs": ({"knowledge": ["black_box"]}, "FGSM needs a gradient, and black_box gives none"),
}


@pytest.mark.parametrize("what", WRONG)
def test_each_mistake_is_answered_with_what_to_pass(what: str, tmp_path: Path) -> None:
    changed, message = WRONG[what]
    given = {"data": data(), "models": {"none": net()}, "attacks": [FGSM], "device": "cpu", **changed}
    with pytest.raises((TypeError, ValueError), match=message) as error:
        evaluate(given.pop("data"), given.pop("models"), given.pop("attacks"), out=tmp_path / "out", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_gray_purifier_before_color_is_refused() -> None:
    color = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    gray = create_defense("hgd", channels=1, denoiser={"width": 4})
    with pytest.raises(ValueError, match="ours purifies images of 1 channels, but those of toy have 3"):
        evaluate(data(3), {"ours": Protected(color, gray)}, [FGSM], device="cpu")


def test_names_in_any_script_are_peoples_own() -> None:
    rows = evaluate(data(), {"none": net()}, {"шум (8/255) [/red] é 雑音": FGSM}, ["oblivious"], device="cpu")
    assert set(rows["attack"]) == {"шум (8/255) [/red] é 雑音"}


def test_numbers_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="n: Input should be greater than 0, not 0"):
        read_recipe("white_box-mnist", ["n=0"])
    monkeypatch.setattr(jobs, "load_dataset", lambda *_, **__: SPLITS)
    described = {"kind": "evaluation", "dataset": "toy", "n": 7, "attacks": [{"name": "fgsm", "eps": 0.1}]}
    with pytest.raises(ValueError, match="n is 7, but test of toy holds 6 images; leave n out to take all"):
        grid_of(resolve({**described, "classifiers": ["runs/none"]}), "cpu")


def test_a_folder_may_not_pass_for_no_defense(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="runs/none would be called 'none' in tables, as if there were no defense"):
        jobs._by_name(["none", "runs/none"], "digits")
    assert jobs._by_name(["none"], "digits") == {"none": "none"}


# The caller's models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_as_they_were(fails: bool) -> None:
    part = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    model = nn.Sequential(part, nn.Flatten(), nn.Linear(128, 3)).train()
    part[1].eval()
    part[0].weight.requires_grad_(False)
    defense = create_defense("hgd", channels=1, denoiser={"width": 4}).train()
    models = {"none": model, "ours": Protected(model, defense).train(), "other": net().train()}
    part[1].eval()
    everything = {id(m): m for one in models.values() for m in one.modules()}.values()
    modes = [m.training for m in everything]
    wanted = [p.requires_grad for one in models.values() for p in one.parameters()]
    weights = [t.clone() for one in models.values() for t in one.state_dict().values()]
    if fails:
        with pytest.raises(ValueError, match="fails on images"):
            evaluate(data(), {**models, "another": nn.Sequential(model, nn.Linear(9, 9))}, [FGSM], device="cpu")
    else:
        evaluate(data(), models, [FGSM], surrogate=net().train(), device="cpu")
    assert [m.training for m in everything] == modes
    assert [p.requires_grad for one in models.values() for p in one.parameters()] == wanted
    assert all(
        torch.equal(a, b) for a, b in zip(weights, (t for m in models.values() for t in m.state_dict().values()))
    )
    assert all(p.grad is None for one in models.values() for p in one.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_go_back_to_their_device() -> None:
    model, surrogate = net(), net()
    models = {"none": model, "ours": Protected(model, create_defense("hgd", channels=1, denoiser={"width": 4}))}
    evaluate(data(), models, [FGSM], ["oblivious", "white_box", "transfer"], surrogate=surrogate, device="cuda")
    for one in (*models.values(), surrogate):
        assert {t.device.type for t in one.state_dict().values()} == {"cpu"}
