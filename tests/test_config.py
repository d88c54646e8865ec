"""Recipes: every one that comes along loads, and a mistake in one is named with the nearest right key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from unperturb.config import KINDS, ComponentConfig, RecipeError, read_recipe, recipe_names, resolve, snapshot
from unperturb.data import load_dataset

CLASSIFIER: dict[str, Any] = {
    "kind": "classifier",
    "dataset": "digits",
    "classifier": {"name": "convnet"},
    "training": {"steps": 3},
}
DEFENSE: dict[str, Any] = {
    "kind": "defense",
    "dataset": "digits",
    "classifiers": ["runs/a"],
    "defense": {"name": "paired_gan", "generator": {"name": "unet"}},
    "adversarial_batches": {"attacks": [{"name": "fgsm", "eps": 0.1}, {"name": "pgd", "eps": 0.2}]},
    "training": {"epochs": 1},
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_along(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.kind in KINDS
    assert isinstance(recipe, KINDS[recipe.kind])
    # What is kept beside a run is the same recipe.
    assert resolve(json.loads(json.dumps(snapshot(recipe)))) == recipe


def test_the_things_that_recipes_name_are_there() -> None:
    from unperturb.attacks import attacks
    from unperturb.classifiers import classifiers
    from unperturb.data import NAMES
    from unperturb.defenses import create_defense, defenses
    from unperturb.threats import KNOWLEDGE
    from unperturb.training.adversarial_batches import Mixture
    from unperturb.training.objectives import objectives

    for name in recipe_names():
        whole = read_recipe(name)
        for recipe in [whole.classifier, whole.defense, whole.evaluation] if whole.kind == "demo" else [whole]:
            assert recipe.dataset in NAMES, name
            if recipe.kind == "classifier":
                assert recipe.classifier.name in classifiers, name
                assert recipe.objective.name in objectives, name
            elif recipe.kind == "defense":
                assert recipe.defense.name in defenses, name
                create_defense(recipe.defense.name, channels=1, **recipe.defense.options)
                Mixture(recipe.adversarial_batches.attacks, recipe.seed)  # makes every attack
                assert recipe.adversarial_batches.knowledge in KNOWLEDGE, name
            else:
                assert set(recipe.knowledge) <= set(KNOWLEDGE), name
                for attack in recipe.attacks:
                    options = {k: v for k, v in attack.options.items() if k not in ("knowledge", "label")}
                    attacks.create(attack.name, **options)


def test_each_setting_has_a_sentence() -> None:
    def check(model: Any) -> None:
        for name, field in model.model_fields.items():
            if name in ("kind", "adversarial_batches", "training", "classifier", "defense", "evaluation"):
                continue
            assert (field.description or "").endswith("."), f"{model.__name__}.{name}"

    from unperturb.config import AdversarialBatchesConfig, Augmentation, Training

    for model in (*KINDS.values(), Augmentation, AdversarialBatchesConfig, Training, ComponentConfig):
        check(model)


def wrong(values: dict[str, Any], **changed: Any) -> str:
    with pytest.raises(RecipeError) as error:
        resolve({**values, **changed}, "mine")
    return str(error.value)


def test_an_unknown_key_gives_the_nearest() -> None:
    said = wrong(CLASSIFIER, training={"steps": 3, "lear": 0.1, "optimiser": "sgd"})
    assert "mine: unknown key 'training.optimiser'. Did you mean 'training.optimizer'? Choices: " in said
    assert "mine: unknown key 'training.lear'." in said  # all that is wrong at once
    assert "unknown key 'datset'. Did you mean 'dataset'?" in wrong(CLASSIFIER, datset="mnist")
    said = wrong(DEFENSE, adversarial_batches={**DEFENSE["adversarial_batches"], "augment": {"pads": 1}})
    assert "unknown key 'adversarial_batches.augment.pads'. Did you mean 'adversarial_batches.augment.pad'?" in said


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"steps": 3, "batch": "many"}, "training.batch: Input should be a valid integer"),
        ({"steps": 3, "lr": -1}, "training.lr: Input should be greater than 0, not -1"),
        (
            {"steps": 3, "optimizer": "lion"},
            "training.optimizer: Input should be 'adam', 'adamw', 'sgd' or 'muon', not 'lion'",
        ),
        ({"steps": 3, "epochs": 2}, "training: give either epochs or steps"),
        ({}, "training: give either epochs or steps"),
        ({"steps": 3, "keep": "best"}, "training: keep = 'best' needs validate_every"),
    ],
)
def test_a_value_that_does_not_fit(training: dict[str, Any], said: str) -> None:
    assert said in wrong(CLASSIFIER, training=training)


def test_what_is_missing() -> None:
    assert "mine: classifier is missing" in wrong({k: v for k, v in CLASSIFIER.items() if k != "classifier"})
    assert "classifier.name is missing" in wrong(CLASSIFIER, classifier={"width": 3})
    assert "classifiers" in wrong(DEFENSE, classifiers=[])
    assert "adversarial_batches.attacks" in wrong(DEFENSE, adversarial_batches={"attacks": []})


def test_a_wrong_kind() -> None:
    assert "unknown kind 'clasifier'. Did you mean 'classifier'?" in wrong(CLASSIFIER, kind="clasifier")
    assert "unknown kind None" in wrong({k: v for k, v in CLASSIFIER.items() if k != "kind"})
    with pytest.raises(RecipeError, match="classifier-digits is a 'classifier' recipe; this needs a 'defense' recipe"):
        read_recipe("classifier-digits", kind="defense")


def test_a_recipe_cannot_be_changed_in_use() -> None:
    recipe = resolve(CLASSIFIER)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.lr = 1.0


def test_a_thing_keeps_options_that_others_check() -> None:
    thing = ComponentConfig.model_validate({"name": "pgd", "eps": "8/255", "steps": [3, 8]})
    assert (thing.name, thing.options) == ("pgd", {"eps": "8/255", "steps": [3, 8]})
    thing.options.clear()
    assert thing.options  # a copy: nobody edits a recipe by accident


# Files and overrides -------------------------------------------------------------------------------------------------

TOML = """
kind = "defense"
dataset = "digits"
classifiers = ["runs/a", "runs/b"]
defense = { name = "paired_gan", generator = { name = "unet", width = 8 } }
[adversarial_batches]
attacks = [{ name = "fgsm", eps = 0.1 }, { name = "pgd", eps = 0.2 }]
[training]
epochs = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    return str(path)


def test_overrides(file: str) -> None:
    recipe = read_recipe(
        file,
        [
            "training.lr=1e-4",
            "training.optimizer=sgd",  # a bare word
            "dataset='mnist'",
            "defense.generator.width=16",
            "adversarial_batches.attacks.1.eps=8/255",  # a place in a list, and no number
            "adversarial_batches.attacks.0.steps=[3, 8]",
            "adversarial_batches.augment.flip=true",
            "classifiers.1=runs/c",
            "classifiers=['runs/d']",
            "training.epochs = 0.5",
        ],
    )
    assert (recipe.training.lr, recipe.training.optimizer, recipe.training.epochs) == (1e-4, "sgd", 0.5)
    assert recipe.dataset == "mnist"
    assert recipe.defense.options == {"generator": {"name": "unet", "width": 16}}
    assert [a.options for a in recipe.adversarial_batches.attacks] == [{"eps": 0.1, "steps": [3, 8]}, {"eps": "8/255"}]
    assert recipe.adversarial_batches.augment.flip is True
    assert recipe.classifiers == ["runs/d"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lr", "an override reads key=value, such as training.lr=0.001; got 'training.lr'"),
        ("=3", "an override reads key=value"),
        ("training.rate=0.1", "unknown key 'training.rate'"),
        ("trainig.lr=0.1", "unknown key 'trainig'. Did you mean 'training'?"),
        ("adversarial_batches.attacks.2.eps=0.1", "'adversarial_batches.attacks.2.eps' is not a place in this recipe"),
        (
            "adversarial_batches.attacks.first.eps=0.1",
            "'adversarial_batches.attacks.first.eps' is not a place in this recipe",
        ),
        ("classifiers.5=a", "'classifiers.5' is not a place in this recipe"),
        ("dataset.name=mnist", "'dataset.name' is not a place in this recipe"),
        ("training.batch=many", "training.batch: Input should be a valid integer"),
        ("training.steps=3", "training: give either epochs or steps"),
    ],
)
def test_an_override_that_does_not_fit(override: str, said: str, file: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe(file, [override])
    assert said in str(error.value)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'paper-mnst'\. Did you mean 'paper-mnist'"):
        read_recipe("paper-mnst")
    with pytest.raises(
        RecipeError, match=r"no recipe at .*nowhere.toml. Those that come with the program: unperturb list"
    ):
        read_recipe(str(tmp_path / "nowhere.toml"))
    (tmp_path / "broken.toml").write_text("kind = ")
    with pytest.raises(RecipeError, match=r"broken.toml is not valid TOML: Invalid value"):
        read_recipe(str(tmp_path / "broken.toml"))


def test_a_recipe_says_how_its_images_are_read() -> None:
    names = [str(9 - k) for k in range(10)]
    for name in ("classifier-digits", "paper-digits", "compare-digits"):
        recipe = read_recipe(name, [f"class_names={names}", "skip_damaged=true", "size=8"])
        options = {"name": "digits", "size": 8, "class_names": names, "skip_damaged": True}
        assert recipe.data_options == options
    data, plain = load_dataset(**options), load_dataset("digits", size=8)
    assert torch.equal(data.test.labels, 9 - plain.test.labels)
