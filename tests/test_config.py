"""Recipes: every one that comes along loads, and a mistake in one is named with the nearest right key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from unperturb.available import describe, to_toml
from unperturb.config import (
    KINDS,
    AttackerConfig,
    ComponentConfig,
    MixtureConfig,
    RecipeError,
    mixture,
    resolve,
    snapshot,
    uniform_range,
)
from unperturb.data import load_dataset
from unperturb.recipe_files import read_recipe, recipe_names, recipe_sources
from unperturb.threat_models import KNOWLEDGE

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
    from unperturb.threat_models import KNOWLEDGE
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
                for entry in recipe.attacks:
                    assert set(entry.knowledge or []) <= set(KNOWLEDGE), name
                    attacks.create(entry.attack.name, **entry.attack.options)


def test_each_setting_has_a_sentence() -> None:
    def check(model: Any) -> None:
        for name, field in model.model_fields.items():
            if name in ("kind", "adversarial_batches", "training", "classifier", "defense", "evaluation"):
                continue
            assert (field.description or "").endswith("."), f"{model.__name__}.{name}"

    from unperturb.config import AdversarialBatchesConfig, Augmentation, Training

    parts = (Augmentation, AdversarialBatchesConfig, Training, ComponentConfig, AttackerConfig, MixtureConfig)
    for model in (*KINDS.values(), *parts):
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


def test_a_recipe_knows_every_kind_of_knowledge_and_no_other() -> None:
    values = {"kind": "evaluation", "dataset": "digits", "classifiers": ["a"], "attacks": [{"name": "fgsm"}]}
    assert resolve({**values, "knowledge": list(KNOWLEDGE)}).knowledge == list(KNOWLEDGE)
    with pytest.raises(RecipeError, match=r"knowledge.0: Input should be 'none', .* or 'white_box', not 'grey_box'"):
        resolve({**values, "knowledge": ["grey_box"]})


def test_a_thing_keeps_options_that_others_check() -> None:
    thing = ComponentConfig.model_validate({"name": "pgd", "eps": "8/255", "steps": {"uniform": [3, 8]}})
    assert (thing.name, thing.options) == ("pgd", {"eps": "8/255", "steps": {"uniform": [3, 8]}})
    thing.options.clear()
    assert thing.options  # a copy: nobody edits a recipe by accident


# Attacks in lists ----------------------------------------------------------------------------------------------------


def test_an_entry_is_an_attack_or_says_more() -> None:
    short = AttackerConfig.model_validate({"name": "pgd", "eps": 0.3})
    assert short == AttackerConfig(attack=ComponentConfig.model_validate({"name": "pgd", "eps": 0.3}))
    assert (short.knowledge, short.label) == (None, None)
    long = {"attack": {"name": "pgd"}, "knowledge": ["bpda"], "label": "mine"}
    entry = AttackerConfig.model_validate(long)
    assert (entry.knowledge, entry.label, entry.attack.options) == (["bpda"], "mine", {})
    assert [e.fraction for e in mixture([{"name": "pgd"}, {"attack": {"name": "fgsm"}, "fraction": 0.2}])] == [1.0, 0.2]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"name": "pgd", "eps": 0.1, "fraction": 0.5},
            'fraction cannot stand inside an attack; write { attack = { name = "pgd", ... }, fraction = ... }',
        ),
        ({"name": "pgd", "label": "mine"}, "label cannot stand inside an attack"),
        ({"attack": {"name": "pgd"}, "label": "mine"}, "unknown key 'adversarial_batches.attacks.0.label'"),
        ({"attack": {"eps": 0.1}}, "adversarial_batches.attacks.0.attack.name is missing"),
        ({"eps": 0.1}, "adversarial_batches.attacks.0.attack is missing"),
        ({"attack": {"name": "pgd"}, "fraction": -1}, "fraction: Input should be greater than 0, not -1"),
    ],
)
def test_an_entry_that_does_not_fit(entry: dict[str, Any], said: str) -> None:
    assert said in wrong(DEFENSE, adversarial_batches={"attacks": [entry]})


def test_ranges() -> None:
    assert uniform_range({"uniform": [0.1, 0.3]}) == (0.1, 0.3)
    assert uniform_range({"uniform": (2, 2)}) == (2, 2)
    assert uniform_range({"uniform": ["2/255", "0.5"]}) == (2 / 255, 0.5)
    plain: list[Any] = [0.3, [0.8, 1.1], "8/255", {"name": "unet"}, None, True]
    assert [uniform_range(value) for value in plain] == [None] * len(plain)


@pytest.mark.parametrize(
    "uniform", [[0.1], [0.1, 0.2, 0.3], 0.1, "0.1", ["a", "b"], [True, False], [0.1, float("inf")], [float("nan"), 1]]
)
def test_a_range_that_is_none(uniform: Any) -> None:
    attack = {"name": "pgd", "eps": {"uniform": uniform}}
    said = wrong(DEFENSE, adversarial_batches={"attacks": [attack]})
    assert "attacks.0: eps: a range is { uniform = [low, high] } with two numbers, not {'uniform': " in said
    with pytest.raises(RecipeError, match=r"mixture: attacks.0: eps: a range is \{ uniform = "):
        mixture([attack])


def test_a_range_holds_nothing_else() -> None:
    with pytest.raises(ValueError, match="with two numbers, not"):
        uniform_range({"uniform": [0.1, 0.2], "steps": 3})


# Recipes with a base -------------------------------------------------------------------------------------------------


@pytest.fixture
def based(tmp_path: Path) -> Path:
    """A recipe that holds what differs from another one beside it, which is based on one that comes along."""
    folder = tmp_path / "deep"
    folder.mkdir()
    (tmp_path / "first.toml").write_text(
        """
# What the first is.
base = "protect-digits"
seed = 7
[adversarial_batches]
attacks = [{ name = "fgsm", eps = 0.1 }]
[training]
lr = 1e-4
"""[1:]
    )
    path = folder / "second.toml"
    path.write_text(
        """
base = "../first.toml"
defense = { generator = { width = 8 } }
[training]
epochs = 2
"""
    )
    return path


def test_a_recipe_holds_what_differs_from_its_base(based: Path) -> None:
    recipe, ours = read_recipe(str(based)), snapshot(read_recipe("protect-digits"))
    ours["seed"] = 7
    ours["training"] |= {"lr": 1e-4, "epochs": 2.0}
    ours["defense"]["generator"]["width"] = 8  # table by table, key by key
    ours["adversarial_batches"]["attacks"] = [{"attack": {"name": "fgsm", "eps": 0.1}, "fraction": 1.0}]  # lists whole
    assert snapshot(recipe) == ours
    assert [*recipe_sources(str(based))] == [
        str(based),
        str(based.parent / "../first.toml"),
        "protect-digits",
        "protect-mnist",
    ]
    # A table of another name is another thing: no option of the first one stays.
    based.write_text('base = "protect-digits"\ndefense = { name = "median" }')
    assert read_recipe(str(based)).defense.options == {}
    based.write_text('base = "protect-digits"\ndefense = { name = "paired_gan" }')
    assert read_recipe(str(based)).defense == read_recipe("protect-digits").defense
    assert read_recipe(str(based), ["training.lr=1"]).training.lr == 1  # after the merge


def test_what_is_shown_says_where_it_comes_from(based: Path) -> None:
    shown = to_toml(read_recipe(str(based), ["training.clip=2"]), str(based), ["training.clip=2"]).splitlines()
    first = based.parent / "../first.toml"
    for line in (
        'kind = "defense"  # from protect-mnist',
        'dataset = "digits"  # from protect-digits',
        f"seed = 7  # from {first}",
        f"lr = 0.0001  # from {first}",
        "epochs = 2.0",  # its own
        "width = 8",
        "clip = 2.0",  # changed by hand
        "cutout = 0",  # what nobody says
        "scales = 2  # from protect-mnist",
    ):
        assert line in shown, line
    assert describe(str(based)) == "What the first is."
    based.write_text("# Mine.\n" + based.read_text())
    assert describe(str(based)) == "Mine."
    assert "# from" not in to_toml(read_recipe("protect-mnist"), "protect-mnist")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("'second.toml'", r"a recipe cannot be its own base: .*second.toml is based on .*second.toml"),
        ("'third.toml'", r"its own base: .*second.toml is based on .*third.toml is based on .*second.toml"),
        ("'protect-mnst'", r"second.toml: its base: unknown recipe 'protect-mnst'\. Did you mean 'protect-mnist'"),
        ("'nowhere.toml'", r"second.toml: its base: no recipe at .*deep/nowhere.toml"),
        ('"\\u0000.toml"', r"second.toml: its base: no recipe at "),
        (f"'{'x' * 300}.toml'", r"second.toml: its base: no recipe at "),
        ("'broken.toml'", r"broken.toml is not valid TOML"),
        ("3", r"second.toml: base is the name of a recipe, or a path that ends in .toml, not 3"),
        ("'classifier-digits'", r"second.toml: unknown key 'defense'"),
    ],
)
def test_a_base_that_cannot_be(base: str, said: str, based: Path) -> None:
    (based.parent / "third.toml").write_text('base = "second.toml"')
    (based.parent / "broken.toml").write_text("kind = ")
    based.write_text(f"base = {base}\ndefense = {{ generator = {{ width = 8 }} }}")
    with pytest.raises(RecipeError, match=said):
        read_recipe(str(based))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("adversarial_large-fashion_mnist", {"training.epochs": 15, "objective.ramp": 3000, "augment.flip": True}),
        ("bit_depth-fashion_mnist", {"defense": {"name": "bit_depth", "bits": 3}, "training.steps": 1}),
        ("classifier-cifar100", {"classifier.name": "airbench", "training.lr": 8e-3, "training.schedule": "linear"}),
        ("distilled-cifar10", {"classifier.scale": 11.0, "training.optimizer": "muon", "training.ema": 0.99}),
        ("finetune-cifar10", {"size": 32, "training.steps": 3800, "training.ema": 0.99, "defense.weights.repair": 50}),
        ("hgd-cifar10", {"size": None, "defense.denoiser.width": 48, "training.validate_every": 0.5}),
        ("jpeg-cifar10", {"defense": {"name": "jpeg", "quality": 25}, "classifiers": ["runs/cifar10-airbench"]}),
        ("paper-imagenet", {"training.epochs": 1, "training.validate_every": 0.5, "defense.label_reading": "both"}),
        ("protect-fashion_mnist", {"defense.generator.output": "residual", "training.precision": "auto"}),
        ("protect-imagenet", {"size": 128, "training.epochs": 1, "adversarial_batches.augment.pad": 8}),
        ("protect_wide-cifar10", {"training.lr": 3e-3, "defense.generator.scales": 3, "defense.weights.repair": 50}),
        ("table2-cifar10", {"systems.3": "runs/bit_depth-cifar10", "knowledge": ["oblivious"], "ladder.eps": "8/255"}),
        (
            "table2-mnist-defense_gan",
            {"n": 100, "ladder.knowledge": "bpda", "ladder.eps": 0.3, "attacks.3.label": None},
        ),
        ("table2-fashion_mnist-small", {"ladder.eps": 0.1, "ladder.budget": "standard", "attacks.0.attack.eps": 0.1}),
        ("white_box-cifar10", {"attacks.1.attack.alpha": "1/255", "surrogate": "runs/cifar10-surrogate"}),
        ("oblivious-mnist", {"knowledge": ["oblivious"], "n": None, "systems.0": "undefended"}),
        ("zoo-mnist", {"knowledge": ["oblivious", "white_box"], "attacks.0.knowledge": None}),
    ],
)
def test_what_recipes_resolve_to(name: str, keys: dict[str, Any]) -> None:
    whole = snapshot(read_recipe(name))
    for key, expected in keys.items():
        found: Any = whole
        for part in key.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        assert found == expected, key


# Files and overrides -------------------------------------------------------------------------------------------------

TOML = """
kind = "defense"
dataset = "digits"
classifiers = ["runs/a", "runs/b"]
defense = { name = "paired_gan", generator = { name = "unet", width = 8 } }
[adversarial_batches]
attacks = [{ name = "fgsm", eps = 0.1 }, { attack = { name = "pgd", eps = 0.2 }, fraction = 3 }]
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
            "adversarial_batches.attacks.1.attack.eps=8/255",  # a place in a list, and no number
            "adversarial_batches.attacks.0.attack.steps={ uniform = [3, 8] }",
            "adversarial_batches.attacks.0.fraction=0.5",
            "adversarial_batches.augment.flip=true",
            "classifiers.1=runs/c",
            "classifiers=['runs/d']",
            "training.epochs = 0.5",
        ],
    )
    assert (recipe.training.lr, recipe.training.optimizer, recipe.training.epochs) == (1e-4, "sgd", 0.5)
    assert recipe.dataset == "mnist"
    assert recipe.defense.options == {"generator": {"name": "unet", "width": 16}}
    first, second = recipe.adversarial_batches.attacks
    assert (first.attack.options, first.fraction) == ({"eps": 0.1, "steps": {"uniform": [3, 8]}}, 0.5)
    assert (second.attack.options, second.fraction) == ({"eps": "8/255"}, 3.0)
    assert recipe.adversarial_batches.augment.flip is True
    assert recipe.classifiers == ["runs/d"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lr", "an override reads key=value, such as training.lr=0.001; got 'training.lr'"),
        ("=3", "an override reads key=value"),
        ("training.rate=0.1", "unknown key 'training.rate'"),
        ("trainig.lr=0.1", "unknown key 'trainig'. Did you mean 'training'?"),
        (
            "adversarial_batches.attacks.0.eps=0.1",
            "unknown key 'adversarial_batches.attacks.0.eps'. Did you mean 'adversarial_batches.attacks.0.attack.eps'?",
        ),
        (
            "adversarial_batches.attacks.0.knowledge=['none']",
            "unknown key 'adversarial_batches.attacks.0.knowledge'",
        ),
        ("adversarial_batches.attacks.0.fraction=0", "attacks.0.fraction: Input should be greater than 0, not 0"),
        (
            "adversarial_batches.attacks.0.attack.eps={ uniform = [0.3, 0.1] }",
            "attacks.0: eps: a range goes up, { uniform = [0.1, 0.3] }, not down, [0.3, 0.1]",
        ),
        (
            "adversarial_batches.attacks.2.attack.eps=0.1",
            "'adversarial_batches.attacks.2.attack.eps' is not a place in this recipe",
        ),
        (
            "adversarial_batches.attacks.first.attack=0.1",
            "'adversarial_batches.attacks.first.attack' is not a place in this recipe",
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
