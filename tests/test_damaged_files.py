"""Files that somebody changed, or a disk did: whatever stands in them, they load or are refused in a sentence."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unperturb import runs
from unperturb.classifiers import create_classifier, load_classifier, save_classifier
from unperturb.config import RecipeError, resolve
from unperturb.defenses import create_defense, load_defense, save_defense
from unperturb.defenses.base import with_options
from unperturb.recipe_files import read_recipe
from unperturb.runs import RunError
from unperturb.training import jobs, loop

ZOO = Path(__file__).resolve().parent.parent / "zoo"
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    1e30,
    10**40,
    float("nan"),
    float("-inf"),
    "",
    "unet",
    "ü" * 9,
    [],
    {},
    [[1]],
]
VALUES += [{"name": "x"}, {"name": "unet", "scales": 1e30}, [3, "average"], 70_000]
TIMES = 60


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside `value`."""
    found = []
    if isinstance(value, dict | list):
        for key, inner in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
            found += [(value, key), *places(inner)]
    return found


def another_value(text: bytes, generator: random.Random) -> bytes:
    value = json.loads(text)
    container, key = generator.choice(places(value))
    if generator.random() < 0.2:
        del container[key]
    elif generator.random() < 0.2 and isinstance(container, dict):
        container[key + "s"] = container.pop(key)
    else:
        container[key] = generator.choice(VALUES)
    return json.dumps(generator.choice([value, value, value, value, container, generator.choice(VALUES)])).encode()


def another_byte(text: bytes, generator: random.Random) -> bytes:
    broken, at = bytearray(text), generator.randrange(len(text))
    kind = generator.randrange(4)
    if kind == 0:
        broken[at] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del broken[at:]
    elif kind == 2:
        broken[at:at] = generator.randbytes(3)
    else:
        del broken[at : at + generator.randrange(20)]
    return bytes(broken)


def answer(use: Callable[[], object]) -> str:
    """What is said against it, "" where it goes well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            use()
        except (RunError, RecipeError) as error:
            return str(error)
    return ""


def refused_in_a_sentence(use: Callable[[], object], path: Path, whole: bytes, *, as_json: bool = True) -> int:
    """How many of the changed files were refused; anything but a sentence that names the file fails."""
    refused = 0
    for number in range(TIMES):
        generator = random.Random(number)
        change = another_value if as_json and number % 3 else another_byte
        path.write_bytes(changed := change(whole, generator))
        said = answer(use)
        if said:
            refused += 1
            assert path.name in said or path.parent.name in said, changed
            assert len(said) < 1500, changed
            assert "\n" not in said or path.suffix == ".toml", changed  # a recipe's faults are told all at once
    path.write_bytes(whole)
    return refused


@pytest.mark.parametrize("name", ["convnet", "airbench", "vgg"])
def test_descriptions_of_classifiers(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"convnet": {}, "airbench": {"widths": [4]}, "vgg": {"width": 2, "stages": 2}}[name]
    save_classifier(
        tmp_path, create_classifier(name, channels=1, size=8, classes=3, mean=[0.5], std=[0.25], **options), {"a": 1}
    )
    path = tmp_path / "classifier.json"
    assert refused_in_a_sentence(lambda: load_classifier(tmp_path), path, path.read_bytes()) > TIMES / 2
    load_classifier(tmp_path)


DEFENSES: dict[str, dict[str, Any]] = {
    "paired_gan": {"generator": {"name": "unet", "width": 2, "scales": 2}, "weights": {"repair": 1.0}},
    "magnet": {"structure": [2, "average", 2], "detectors": [{"error": 1, "structure": [2]}, {"temperature": 10}]},
    "defense_gan": {"size": 8, "width": 2, "latent": 3},
    "pipeline": {"parts": [{"name": "bit_depth", "bits": 2}, {"name": "hgd", "denoiser": {"width": 2}}]},
    "jpeg": {"quality": 30},
    "feature_squeezing": {"squeezers": [{"name": "bit_depth", "bits": 2}, {"name": "hgd", "denoiser": {"width": 2}}]},
}


@pytest.mark.parametrize("name", sorted(DEFENSES))
def test_descriptions_of_defenses(name: str, tmp_path: Path) -> None:
    save_defense(tmp_path, create_defense(name, channels=1, **DEFENSES[name]), {"outcome": None, "dataset": "toy"})
    path = tmp_path / "defense.json"
    assert refused_in_a_sentence(lambda: load_defense(tmp_path), path, path.read_bytes()) > TIMES / 4
    load_defense(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"generator": {"name": "unet", "scales": 1e30}}, "does not describe a defense"),
        ({"generator": {"name": "unet", "scales": 10**30}}, "generator.scales must be at most 65,536"),
        ({"generator": {"name": "unet", "width": 60_000}}, r"the network would have more than [0-9,]+ parameters"),
        ({"generator": {"name": "unet", "blocks": 60_000}}, r"the network would have more than [0-9,]+ parameters"),
        ({"generator": {"name": "unet", "sharpness": float("nan")}}, "generator.sharpness must be finite"),
        ({"generator": {"name": "unet", "scale": 2}}, "Did you mean 'scales'"),
    ],
)
def test_networks_that_no_machine_holds_are_not_built(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_defense(tmp_path, create_defense("paired_gan", channels=1, **DEFENSES["paired_gan"]), {})
    described = runs.read_json(tmp_path / "defense.json")
    runs.write_json(tmp_path / "defense.json", {**described, "options": {"channels": 1, **options}})
    with pytest.raises(RunError, match=said) as error:
        load_defense(tmp_path)
    assert "defense.json" in str(error.value)


def test_nor_are_they_from_a_recipe() -> None:
    for options, said in (
        ({"width": 60_000}, "the network would have more than 4,000,000,000 parameters"),
        ({"scales": 10**30}, "generator.scales must be at most 65,536"),
    ):
        with pytest.raises(ValueError, match=said):
            create_defense("paired_gan", channels=1, generator={"name": "unet", **options})
    with pytest.raises(ValueError, match="width must be at most 65,536"):
        create_classifier("vgg", channels=1, size=8, classes=3, mean=[0.5], std=[0.25], width=10**9)


def test_what_a_training_cost(tmp_path: Path) -> None:
    save_defense(tmp_path, create_defense("jpeg"), {})
    path = tmp_path / "training.json"
    cost = {"pflop": 0.5, "seconds": 3.0, "steps": 7, "validation": {"clean": 0.9}}
    runs.write_json(path, cost)
    assert refused_in_a_sentence(lambda: load_defense(tmp_path), path, path.read_bytes()) > TIMES / 2
    loaded = load_defense(tmp_path)
    assert loaded.outcome == runs.Outcome(**cost)  # type: ignore[arg-type]
    assert with_options(loaded, quality=20).outcome == loaded.outcome  # the same training
    path.unlink()
    assert load_defense(tmp_path).outcome is None
    save_defense(tmp_path, create_defense("jpeg"), {"outcome": cost})
    assert load_defense(tmp_path).outcome.pflop == 0.5


RECIPE: dict[str, Any] = {
    "kind": "classifier",
    "dataset": "digits",
    "classifier": {"name": "convnet"},
    "training": {"steps": 3, "lr": 0.1},
}


def test_recipes_and_environments_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve(RECIPE)
    monkeypatch.setattr(jobs, "autotune_precision", lambda _, *of: tuple(of))

    class Task:
        def networks(self) -> dict[str, Any]:
            return {"net": torch.nn.Linear(1, 1)}

    def resume() -> None:
        plan = jobs.decided(recipe, Task(), tmp_path)  # type: ignore[arg-type]
        with jobs._run_folder(tmp_path, plan, {"data": {"source": "digits"}}, resume=True):
            pass

    resume()
    for name in ("recipe.json", "environment.json"):
        refused_in_a_sentence(resume, tmp_path / name, (tmp_path / name).read_bytes())
    runs.write_json(tmp_path / "diverged.json", {"step": 3})
    refused_in_a_sentence(resume, tmp_path / "diverged.json", b'{"step": 3, "said": "no"}')


def test_logs(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = b"".join(
        json.dumps({"step": k, "loss": 1.5, "validation": {"clean": 0.5}}).encode() + b"\n" for k in range(4)
    )
    for number in range(TIMES):
        path.write_bytes(another_byte(whole, random.Random(number)) + b'7\n[1]\n{"step": []}\n')
        loop.Log(path, 2, None).write({"step": 3})
        assert all(json.loads(line)["step"] <= 3 for line in path.read_text(encoding="utf-8").splitlines())


def test_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = 'kind = "classifier"\ndataset = "digits"\nseed = 3\nclassifier = { name = "convnet" }\n'
    text += "# größer\n[training]\nsteps = 3\nlr = 1e-3\nbetas = [0.9, 0.99]\n[augment]\npad = 2\n"
    refused_in_a_sentence(lambda: read_recipe(str(path)), path, text.encode(), as_json=False)
    for broken, said in (
        (text.encode("latin-1"), "mine.toml is not a text in UTF-8"),
        (b"a = " + b"[" * 100_000, "mine.toml is not valid TOML"),
        (b"a = " + b"1" * 5000, "mine.toml is not valid TOML"),
        (text.encode().replace(b'"classifier"', b"[]"), r"unknown kind \[\]"),
        (text.encode().replace(b"1e-3", b"inf"), "training.lr: Input should be a finite number"),
        (text.encode().replace(b"seed = 3", b"seed = 99999999999"), "seed: Input should be less than 4294967296"),
    ):
        path.write_bytes(broken)
        with pytest.raises(RecipeError, match=said):
            read_recipe(str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(RecipeError, match="no recipe at"):
        read_recipe(str(path))


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in ZOO.glob("*/model.safetensors")))
def test_the_zoo_is_what_was_put_there(folder: str) -> None:
    for kind, load in (("classifier", load_classifier), ("defense", load_defense)):
        if (ZOO / folder / f"{kind}.json").exists():
            assert runs.read_json(ZOO / folder / f"{kind}.json")["sha256"], "weights without a digest"
            load(ZOO / folder)
