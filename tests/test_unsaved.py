"""A classifier of a user's own by its import path, and the untrained ones of a dry run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unperturb.benchmarking import model_from
from unperturb.data import Splits, load_dataset
from unperturb.defenses import Defense, Protected
from unperturb.systems import System
from unperturb.unsaved import import_classifier, import_object, is_import_path, missing, stand_ins

NET = """
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.layer = nn.Linear(64, classes)
    def forward(self, images):
        return self.layer(images.flatten(1))

torch.manual_seed(5)
made = Linear()
number = 3
three = lambda: Linear(3)
def needs(width): return Linear()
def fails(): return 1 / 0
def predict(images, scale=2.0): return scale * made(images)
class Caller:
    def __call__(self, images): return made(images)
class Settings:
    pass
class Wide(Linear):
    def __init__(self, width): ...
def deep():
    import math
    return lambda images: made.lager(images)
class Buggy(Linear):
    def forward(self, images):
        return self.layers(images)
def broken(): return Broken()
class Broken(Linear):
    def __init__(self):
        super().__init__()
        nn.Linear(64, self.klasses)
"""
WHOLE = """
from unperturb import Protected, System, create_defense
whole = Protected(made, create_defense('median'))
system = System('mine', made)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's in it."""
    (tmp_path / "own_nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    return tmp_path


def test_an_object_or_a_callable_from_the_current_folder(here: Path, tiny_digits: Splits) -> None:
    images, _ = tiny_digits.test.batch(torch.arange(3))
    path = list(sys.path)
    made = import_classifier("own_nets:made", tiny_digits.train, mean=[0.5], std=[0.25])
    assert sys.path[: len(path)] == path
    assert torch.allclose(made(images), made.net.net.layer(((images - 0.5) / 0.25).flatten(1)))
    assert import_classifier("own_nets:Linear", tiny_digits.train)(images).shape == (3, 10)
    assert import_classifier("own_nets.py:Linear", tiny_digits.train)(images).shape == (3, 10)
    for name, factor in (("predict", 2), ("Caller", 1)):
        called = import_classifier(f"own_nets.py:{name}", tiny_digits.train)
        net = import_object("own_nets.py:made")
        torch.testing.assert_close(called(images), factor * net.layer(images.flatten(1)))
    (here / "other").mkdir()
    (here / "other" / "own_nets.py").write_text(NET.replace("seed(5)", "seed(6)"))
    other = import_classifier("other/own_nets.py:made", tiny_digits.train, mean=[0.5], std=[0.25])
    assert not torch.equal(other.net.net.layer.weight, made.net.net.layer.weight)  # another file of that name


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "checkpoint.pt"])
def test_weights_from_a_file(name: str, here: Path, tiny_digits: Splits) -> None:
    weights = {"layer.weight": torch.full((10, 64), 0.25), "layer.bias": torch.arange(10.0)}
    if name.endswith(".safetensors"):
        save_file(weights, here / name)
    else:
        torch.save({"state_dict": weights} if name == "checkpoint.pt" else weights, here / name)
    loaded = import_classifier("own_nets:Linear", tiny_digits.train, weights=here / name)
    assert torch.equal(loaded.net.net.layer.weight, weights["layer.weight"])


def test_weights_that_are_not_numbers_are_refused(here: Path, tiny_digits: Splits) -> None:
    save_file(
        {"layer.weight": torch.full((10, 64), torch.nan), "layer.bias": torch.zeros(10)}, here / "nan.safetensors"
    )
    with pytest.raises(ValueError, match=r"nan\.safetensors holds weights that are NaN or infinite \(layer\.weight\)"):
        import_classifier("own_nets:Linear", tiny_digits.train, weights=here / "nan.safetensors")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


def test_a_file_with_a_dataclass_and_a_late_import(here: Path, tiny_digits: Splits) -> None:
    (here / "late_part.py").write_text("factor = 2.0")
    (here / "modern.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Settings:\n    a: int = 1\n"
        + NET.replace("return self.layer", "from late_part import factor; return factor * self.layer")
    )
    images, _ = tiny_digits.test.batch(torch.arange(3))
    made = import_classifier("modern.py:made", tiny_digits.train)
    assert torch.allclose(made(images), 2 * made.net.net.layer(images.flatten(1)))
    (here / "script.py").write_text("import sys; sys.exit('usage: script')")
    with pytest.raises(ValueError, match=r"script\.py:net could not be imported: .*SystemExit: usage: script"):
        import_classifier("script.py:net", tiny_digits.train)


def test_what_cannot_be_used_is_a_sentence(here: Path, tiny_digits: Splits) -> None:
    def said(path: str, **options: object) -> str:
        with pytest.raises(ValueError) as error:
            import_classifier(path, tiny_digits.train, **options)  # type: ignore[arg-type]
        return str(error.value)

    assert "No module named 'own_netz'" in said("own_netz:made")
    for place in ("own_nets", "own_nets.py"):
        assert said(f"{place}:maid") == f"{place}:maid: {place} has no 'maid'; did you mean 'made'?"
    assert said("gone.py:net") == "there is no file gone.py"
    assert "own_nets:needs: the model answers with Linear" in said("own_nets:needs")
    assert said("own_nets:needs").endswith("; a function that makes a model takes no arguments")
    for name, gives in (("number", "int"), ("Settings", "Settings")):
        assert f"own_nets:{name} gives a {gives}, which cannot be called; expected a model" in said(f"own_nets:{name}")
    assert (
        "own_nets:Wide is a class that cannot be called without arguments (missing a required argument: 'width'): make "
        "the model in the file, and name it in its place"
    ) in said("own_nets:Wide")
    assert "own_nets:predict is a function: only a torch.nn.Module can be given weights" in said(
        "own_nets:predict", weights="w.pt"
    )
    assert "own_nets.py, line 17: ZeroDivisionError" in said("own_nets:fails")
    assert "3 logits an image, where 10 classes were expected" in said("own_nets:three")
    assert "no weights at gone.pt" in said("own_nets:made", weights="gone.pt")
    torch.save({"layer.weight": torch.zeros(2, 2)}, here / "other.pt")
    assert "does not hold the weights of this model (2 of 2 differ: layer.bias, layer.weight)" in said(
        "own_nets:made", weights="other.pt"
    )
    torch.save({"layer.weight": Bomb()}, here / "bomb.pt")
    assert "a whole pickled model is never opened" in said("own_nets:made", weights="bomb.pt")
    assert not (here / "ran").exists()


def test_what_fails_in_the_users_own_code_is_named_as_they_name_it(here: Path, tiny_digits: Splits) -> None:
    for place, file in (("own_nets", "own_nets.py"), ("own_nets.py", "own_nets.py")):
        for name, said in (
            ("Buggy", "Buggy fails on images of digits (1 channel, 8x8 pixels): {}: 'Buggy' object has no attribute"),
            ("deep", "deep fails on images of digits (1 channel, 8x8 pixels): {}: 'Linear' object has no attribute"),
            ("broken", "broken could not be imported: {}: 'Broken' object has no attribute 'klasses'"),
        ):
            with pytest.raises(ValueError) as error:
                import_classifier(f"{place}:{name}", tiny_digits.train)
            before, after = said.split("{}")
            assert str(error.value).startswith(f"{place}:{before}")
            assert re.search(rf"{file}, line \d+: AttributeError{re.escape(after)}", str(error.value))
            assert "_own" not in str(error.value)
            assert isinstance(
                error.value.__cause__ and (error.value.__cause__.__cause__ or error.value.__cause__), AttributeError
            )


def test_a_model_for_other_images_is_refused_with_both_sides(here: Path, tiny_digits: Splits) -> None:
    larger = load_dataset("digits", size=16)
    with pytest.raises(ValueError) as error:
        import_classifier("own_nets:made", larger.train)
    said = str(error.value)
    assert said.startswith("own_nets:made fails on images of digits (1 channel, 16x16 pixels): ")
    assert "256 and 64x10" in said
    assert said.endswith("if it takes images of another size or other channels, choose --size or --data")
    with pytest.raises(ValueError, match=r"own_nets:made, for digits \(1 channel, 8x8 pixels\): mean and std need one"):
        import_classifier("own_nets:made", tiny_digits.train, mean=[0.1] * 3, std=[0.1] * 3)


def test_a_system_of_ones_own_is_taken_as_it_is(here: Path, tiny_digits: Splits) -> None:
    (here / "deployed.py").write_text(
        NET
        + "\nfrom unperturb import System\nsystem = System('mine', made, base=Linear())\ndef again(): return system\n"
    )
    for name in ("system", "again"):
        judged = model_from(f"deployed.py:{name}", tiny_digits.test)
        assert isinstance(judged, System)
        assert judged.name == "mine"
    with pytest.raises(ValueError, match=r"deployed\.py:system gives a System, which cannot be called"):
        import_classifier("deployed.py:system", tiny_digits.train)


def test_weights_go_into_a_protected_model_of_ones_own(here: Path, tiny_digits: Splits) -> None:
    (here / "deployed.py").write_text(NET + WHOLE)
    fresh = model_from("deployed.py:whole", tiny_digits.test)
    assert isinstance(fresh, Protected)
    other = {name: tensor + 1 for name, tensor in fresh.state_dict().items()}
    torch.save(other, "other.pt")
    loaded = model_from("deployed.py:whole", tiny_digits.test, weights=Path("other.pt"))
    assert isinstance(loaded, Protected)
    assert all(torch.equal(tensor, other[name]) for name, tensor in loaded.state_dict().items())
    torch.save({"layer": torch.ones(1)}, "wrong.pt")
    with pytest.raises(ValueError, match=r"wrong\.pt does not hold the weights of this model"):
        model_from("deployed.py:whole", tiny_digits.test, weights=Path("wrong.pt"))


def test_what_a_model_cannot_take_is_refused_and_not_left_out(here: Path, tiny_digits: Splits) -> None:
    (here / "deployed.py").write_text(NET + WHOLE)
    weights, numbers = Path("other.pt"), {"mean": [0.1], "std": [0.1]}
    for entry, options, said in (
        ("deployed.py:whole", numbers, r"deployed\.py:whole is a Protected, .*: leave out --mean, --std"),
        ("deployed.py:system", {"weights": weights}, r"deployed\.py:system is a System, .*: leave out --weights"),
        ("zoo:mnist-lenet5", {"weights": weights}, r"zoo:mnist-lenet5 .*: leave out --weights"),
        ("zoo:mnist-lenet5", numbers, r"zoo:mnist-lenet5 .*: leave out --mean, --std"),
        ("net.onnx", {"weights": weights}, r"net\.onnx .*: leave out --weights"),
    ):
        with pytest.raises(ValueError, match=said):
            model_from(entry, tiny_digits.test, **options)


def test_what_is_an_import_path(here: Path) -> None:
    assert is_import_path("nets:small")
    assert is_import_path("nets.py:small")
    for other in ("zoo:mnist-resnet8", "runs/a", "runs/a+jpeg", "nets:", ":small"):
        assert not is_import_path(other)


def test_what_is_missing_and_what_stands_in_for_it(
    here: Path, tiny_digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unperturb.zoo.folders", dict)
    (here / "runs" / "digits-convnet").mkdir(parents=True)
    (here / "runs" / "digits-convnet" / "checkpoint.safetensors").touch()  # begun, and no classifier yet
    entries = [
        "none",
        "median",
        "runs/digits-convnet",
        "runs/bit_depth-digits+jpeg",
        "runs/adversarial-digits",
        "runs/own",
    ]
    assert [missing(e) for e in entries] == [
        [], [], ["runs/digits-convnet"], ["runs/bit_depth-digits"], ["runs/adversarial-digits"], ["runs/own"],
    ]  # fmt: skip
    found = stand_ins(entries, tiny_digits.train)
    assert list(found) == ["runs/digits-convnet", "runs/bit_depth-digits+jpeg", "runs/adversarial-digits"]
    images, _ = tiny_digits.test.batch(torch.arange(2))
    assert found["runs/digits-convnet"](images).shape == (2, 10)
    chain = found["runs/bit_depth-digits+jpeg"]
    assert isinstance(chain, Defense)
    assert len(chain.stages()) == 2
