"""Evaluation: what each attacker sees, adversarial images made once, and rows against a computation by hand."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb import runs, threats
from unperturb.attacks import Attack, attacks, create_attack
from unperturb.attacks.context import AttackContext
from unperturb.attacks.losses import cross_entropy
from unperturb.classifiers import create_classifier, save_classifier
from unperturb.config import read_recipe, recipe_names, resolve
from unperturb.data import ImageSet, load_dataset
from unperturb.defenses import Defense, Protected, create_defense, save_defense
from unperturb.devices import Speed
from unperturb.evaluation import adversarials, jobs, training_cost
from unperturb.evaluation.adversarials import AdversarialStore, from_16_bit, to_16_bit
from unperturb.evaluation.grid import Grid, run_grid, shown_rows
from unperturb.evaluation.jobs import estimate, evaluate, grid_of, label_of, only, run_evaluation
from unperturb.registry import UnknownNameError
from unperturb.results import samples, schema

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of adversarial images; that of pixels, which take a second to make, is the session's."""
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "cache")


class Linear(nn.Module):
    """Logits `W x + b`."""

    def __init__(self, seed: int = 0, classes: int = 4, size: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, size, generator=generator) * 0.3)
        self.bias = nn.Parameter(-self.weight.detach().sum(1) / 2)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def toy(n: int = 10, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        labels = Linear()(images.float() / 255).argmax(1)
    labels[-1] = (labels[-1] + 1) % 4
    names = [str(k) for k in range(4)]
    return ImageSet(
        images=images, labels=labels, index=torch.arange(n) + 100, class_names=names, source="toy", split="test"
    )


def purifier(seed: int = 0) -> Defense:
    torch.manual_seed(seed)
    defense = create_defense(
        "paired_gan", channels=1, generator={"name": "unet", "width": 4, "output": "threshold", "sharpness": 4.0}
    )
    for tensor in defense.state_dict().values():
        tensor.add_(torch.randn_like(tensor) * 0.03)
    return defense.eval()


# What an attacker sees -----------------------------------------------------------------------------------------------


def test_the_function_of_each_knowledge() -> None:
    classifier, surrogate, defense, images = Linear(0), Linear(1), purifier(), torch.rand(3, 1, 8, 8)
    assert threats.target(classifier, defense, "oblivious") is classifier
    assert threats.target(classifier, defense, "none") is classifier
    assert threats.target(classifier, defense, "transfer", surrogate) is surrogate
    whole = threats.target(classifier, defense, "white_box")
    assert torch.equal(whole(images), classifier(defense.purify(images)))
    with pytest.raises(ValueError, match="a transfer attack needs a surrogate"):
        threats.target(classifier, defense, "transfer")
    with pytest.raises(UnknownNameError, match=r"unknown knowledge 'whitebox'\. Did you mean 'white_box'"):
        threats.target(classifier, defense, "whitebox")


@dataclass(frozen=True, kw_only=True)
class Seen(Attack):
    """Keeps the gradient that an attacker is given, scaled into [0, 1]."""

    def perturb(self, context: AttackContext) -> Tensor:
        return context.gradient(context.images, cross_entropy)[1] / 100 + 0.5


def test_the_white_box_gradient_goes_through_the_purifier_exactly() -> None:
    classifier, defense = Linear(), purifier()
    images, labels = torch.rand(5, 1, 8, 8), torch.arange(5) % 4
    target = threats.target(classifier, defense, "white_box")
    found = (Seen()(target, images, labels) - 0.5) * 100
    # By hand: W^T (p - y) at the restored image, pulled back through the purifier alone.
    x = images.clone().requires_grad_()
    restored = defense.purify(x)
    p = classifier(restored.detach()).softmax(1)
    at_restored = ((p - F.one_hot(labels, 4)) @ classifier.weight).detach().reshape_as(images)
    (expected,) = torch.autograd.grad(restored, x, at_restored)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    oblivious = (Seen()(threats.target(classifier, defense, "oblivious"), images, labels) - 0.5) * 100
    assert float((oblivious - expected).abs().max()) > 0.01


# Adversarial images, made once ---------------------------------------------------------------------------------------


def test_16_bits_keep_a_picture_exactly() -> None:
    levels = torch.arange(256, dtype=torch.uint8).float().div_(255)
    assert torch.equal(from_16_bit(to_16_bit(levels)), levels)
    x = torch.rand(10_000)
    assert to_16_bit(x).dtype == torch.uint16
    assert float((from_16_bit(to_16_bit(x)) - x).abs().max()) <= 0.5 / 65_535 * (1 + 1e-3)


class Counted(Linear):
    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images)


def get(store: AdversarialStore, model: nn.Module, **changed: Any) -> Tensor:
    options: dict[str, Any] = {
        "attack": create_attack("pgd", eps=0.1, steps=2),
        "key": "key",
        "data": toy(),
        "rows": torch.arange(10),
        "seed": 0,
        "batch": 4,
        "device": CPU,
        **changed,
    }
    return store.get(options.pop("attack"), model, **options).images


def test_adversarial_images_are_made_once(tmp_path: Path) -> None:
    store, model = AdversarialStore(tmp_path / "store"), Counted()
    first = get(store, model)
    spent = model.calls
    assert spent == 3 * 3  # three batches, two steps and a look at the end
    assert torch.equal(get(store, model), first)
    assert torch.equal(get(AdversarialStore(tmp_path / "store"), model), first)
    assert model.calls == spent
    images, labels = toy().batch(torch.arange(10))
    again = torch.cat(
        [
            create_attack("pgd", eps=0.1, steps=2)(model, images[part], labels[part], index=toy().index[part])
            for part in torch.arange(10).split(4)
        ]
    )
    torch.testing.assert_close(first, again, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"attack": create_attack("pgd", eps=0.1, steps=3)},
        {"key": "another"},
        {"data": toy(seed=1)},
        {"rows": torch.arange(5)},
        {"seed": 1},
        {"batch": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_makes_them_others(change: dict[str, Any], tmp_path: Path) -> None:
    store, model = AdversarialStore(tmp_path), Counted()
    get(store, model)
    spent = model.calls
    get(store, model, **change)
    assert model.calls > spent


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    store, model = AdversarialStore(tmp_path), Counted()
    first = get(store, model)
    (file,) = tmp_path.glob("*/*.safetensors")
    get(store, model, seed=1)
    (other,) = set(tmp_path.glob("*/*.safetensors")) - {file}
    get(store, model, rows=torch.arange(1, 10))
    (shifted,) = set(file.parent.iterdir()) - {file}
    whole, kept, about = file.read_bytes(), runs.load_tensors(file), runs.read_metadata(file)
    assert all(runs.load_tensors(f, require_digest=True) for f in (file, other, shifted))
    flipped = bytearray(whole)
    flipped[-100] ^= 16

    def written(**changed: Tensor) -> bytes:
        runs.save_tensors(tmp_path / "x" / "x", {**kept, **changed}, {k: v for k, v in about.items() if k != "sha256"})
        return (tmp_path / "x" / "x").read_bytes()

    damaged = {
        "cut": whole[:-50],
        "empty": b"",
        "one bit": bytes(flipped),
        "of another attack": other.read_bytes(),
        "of other images": shifted.read_bytes(),
        "floats up to 9": written(images=torch.full((10, 1, 8, 8), 9.0)),
        "fewer rows": written(images=kept["images"][:9]),
        "another shape": written(images=kept["images"].reshape(10, 1, 4, 16)),
        "no time": written(seconds=torch.tensor(float("nan"))),
        "counts of another kind": written(nonfinite=torch.zeros(10)),
    }
    for what, content in damaged.items():
        file.write_bytes(content)
        spent = model.calls
        assert torch.equal(get(store, model), first), what
        assert model.calls == spent + 3 * 3, what  # made again
        assert torch.equal(get(store, model), first)
        assert model.calls == spent + 3 * 3  # and kept
    file.unlink()
    file.mkdir()  # where nothing can be kept, it goes on without
    with pytest.warns(UserWarning, match="adversarial images are not kept for another time"):
        assert torch.equal(get(store, model), first)


@pytest.mark.filterwarnings("ignore:adversarial images are not kept")
def test_many_may_use_one_cache_at_once(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Constant(Attack):
        value: float

        def perturb(self, context: AttackContext) -> Tensor:
            return torch.full_like(context.images, self.value)

    def use(number: int) -> list[float]:
        store, model = AdversarialStore(tmp_path, limit_gb=1e-6), Linear()  # hardly room for one: all clear away
        values = [(number + k) % 3 / 2 for k in range(12)]
        return [float(get(store, model, attack=Constant(value=v)).mean()) - v for v in values]

    with ThreadPoolExecutor(6) as pool:
        assert max(abs(off) for part in pool.map(use, range(6)) for off in part) < 1e-4
    assert len(AdversarialStore(tmp_path).entries()) <= 3


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "lots"])
def test_a_limit_that_is_none_is_refused_before_anything_is_made(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNPERTURB_CACHE_GB", text)
    with pytest.raises(ValueError, match=f"UNPERTURB_CACHE_GB is '{text}'; expected gigabytes, a number of 0 or more"):
        evaluate(toy(), {"none": Linear()}, [create_attack("fgsm", eps=0.1)], out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_the_least_recently_used_leaves_first(tmp_path: Path) -> None:
    model = Linear()
    get(AdversarialStore(tmp_path), model, seed=0)
    size = sum(f.stat().st_size for f in tmp_path.glob("*/*"))
    store = AdversarialStore(tmp_path, limit_gb=2.5 * size / 1e9)
    (first,) = tmp_path.iterdir()
    get(store, model, seed=1)
    (second,) = set(tmp_path.iterdir()) - {first}
    for age, folder in ((2000, first), (1000, second)):
        os.utime(folder, (folder.stat().st_atime, folder.stat().st_mtime - age))
    get(store, model, seed=0)  # used now, so no longer the oldest
    get(store, model, seed=2)
    assert first.exists()
    assert not second.exists()
    get(AdversarialStore(tmp_path, limit_gb=0), model, seed=3)
    assert len(list(tmp_path.iterdir())) == 1  # the one just made stays


# Rows ----------------------------------------------------------------------------------------------------------------


def grid(**changed: Any) -> Grid:
    options: dict[str, Any] = {
        "data": toy(),
        "classifiers": {"linear": Linear()},
        "defenses": {"none": create_defense("none"), "ours": purifier()},
        "attacks": {"pgd": (create_attack("pgd", eps=0.1, steps=3), ["oblivious", "white_box"])},
        "seed": 7,
        "batch": 3,
        "shard": 4,
        "samples": 3,
        **changed,
    }
    return Grid(**options)


def test_cells() -> None:
    fgsm, pgd = create_attack("fgsm", eps=0.1), create_attack("pgd", eps=0.1)
    cells = grid(attacks={"a": (fgsm, ["oblivious", "white_box"]), "b": (pgd, ["oblivious"])}).cells()
    assert [(c.defense, c.label, c.knowledge) for c in cells] == [
        ("none", "a", "oblivious"),
        ("ours", "a", "oblivious"),
        ("ours", "a", "white_box"),
        ("none", "b", "oblivious"),
        ("ours", "b", "oblivious"),
    ]
    assert len({c.folder for c in cells}) == len(cells)


def test_cells_that_would_be_the_same_are_asked_once() -> None:
    fgsm = create_attack("fgsm", eps=0.1)
    kinds = {"a": (fgsm, ["bpda", "white_box"])}
    made = {"none": create_defense("none"), "ours": purifier(), "robust": create_defense("none")}
    cells = grid(attacks=kinds, defenses=made, instead={"robust": Linear(1)}).cells()
    assert [(c.defense, c.knowledge) for c in cells] == [
        ("none", "oblivious"),
        ("ours", "bpda"),
        ("robust", "white_box"),
        ("ours", "white_box"),
    ]


def test_what_cannot_be_asked_is_refused_before_anything_is_written(recipe: Any, tmp_path: Path) -> None:
    alone = recipe.model_copy(update={"surrogate": None})
    with pytest.raises(ValueError, match="needs a surrogate"):
        run_evaluation(alone, tmp_path / "out", device="cpu")
    large = create_defense("defense_gan", channels=1, size=28, width=2, latent=4)
    with pytest.raises(ValueError, match="gan purifies 28x28 images, but those of toy are 8x8"):
        evaluate(toy(), {"gan": Protected(Linear(), large)}, [create_attack("fgsm", eps=0.1)])
    assert not (tmp_path / "out").exists()


def test_a_defense_without_a_gradient_is_still_asked_by_the_white_box_attacker(tmp_path: Path) -> None:
    fgsm = create_attack("fgsm", eps=0.1)
    made = {"none": create_defense("none"), "bits": create_defense("bit_depth", bits=3)}
    run_grid(grid(defenses=made, attacks={"fgsm": (fgsm, ["oblivious", "white_box"])}), tmp_path)
    rows = schema.read_rows(tmp_path)
    kinds = set(zip(rows["defense"], rows["knowledge"]))
    assert kinds == {("none", "oblivious"), ("bits", "oblivious"), ("bits", "white_box")}
    assert (rows["linf"] > 0.05).all()  # through the stand-in's gradient the budget is spent


def test_a_random_defense_is_averaged_over_as_many_draws_as_the_recipe_says(recipe: Any) -> None:
    drawn = create_defense("denoised_smoothing", channels=1, denoiser={"width": 2}).eval()
    cell = grid(defenses={"drawn": drawn}).cells()[1]
    assert cell.knowledge == "white_box"
    for samples in (20, 3):
        function = grid(defenses={"drawn": drawn}, **({} if samples == 20 else {"eot_samples": samples})).target(cell)
        assert isinstance(function, threats.EOT)
        assert function.eot_samples == samples
    assert grid_of(recipe, "cpu").eot_samples == 20
    assert grid_of(recipe.model_copy(update={"eot_samples": 5}), "cpu").eot_samples == 5
    shipped = [read_recipe(name) for name in recipe_names()]
    shipped = [getattr(one, "evaluation", one) for one in shipped]
    assert all((one.eot_samples or 20) >= 20 for one in shipped if one.kind == "evaluation")


def test_no_attack_on_a_random_defense_stops_at_its_first_success() -> None:
    drawn = create_defense("denoised_smoothing", channels=1, denoiser={"width": 2}).eval()
    kinds = {n: (create_attack(n, eps=0.1, first_success=True), ["oblivious", "white_box"]) for n in ("apgd", "square")}
    cells = grid(defenses={"ours": purifier(), "drawn": drawn}, attacks=kinds).cells()
    stops = {(c.defense, c.knowledge): c.attack.first_success for c in cells}  # type: ignore[attr-defined]
    assert stops == {
        ("ours", "oblivious"): True,
        ("ours", "white_box"): True,
        ("drawn", "oblivious"): True,  # who looks at the bare classifier meets no draw
        ("drawn", "white_box"): False,
    }


def psnr(a: Tensor, b: Tensor) -> float:
    error = float((a.double() - b.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def test_rows_against_one_image_at_a_time(tmp_path: Path) -> None:
    model, defense, data = Linear(), purifier(), toy()
    attack = create_attack("pgd", eps=0.1, steps=3)
    run_grid(grid(), tmp_path / "out")
    rows = schema.read_rows(tmp_path / "out")
    assert list(rows.columns) == list(schema.ROW_COLUMNS)
    assert len(rows) == 3 * 10
    assert sorted(f.name for f in (tmp_path / "out" / "rows").glob("*/*"))[::3] == [
        "0000.parquet",
        "0001.parquet",
        "0002.parquet",
    ]
    assert set(rows.groupby(["defense", "knowledge"]).size()) == {10}
    for row in rows.to_dict("records"):
        place = row["index"] - 100
        x, y = data.batch(torch.tensor([place]))
        function = Protected(model, defense) if row["knowledge"] == "white_box" else model
        x_adv = attack(function, x, y, index=torch.tensor([row["index"]]), seed=7)
        purify = (lambda z: z) if row["defense"] == "none" else defense.purify
        with torch.no_grad():
            restored, recovered = purify(x_adv), purify(x)
            views = {"clean": x, "adv": x_adv, "pure_clean": recovered, "pure_adv": restored}
            for name, view in views.items():
                logits = model(view)[0]
                assert row[f"pred_{name}"] == int(logits.argmax())
                assert row[f"conf_{name}"] == pytest.approx(float(logits.softmax(0)[y]), abs=2e-4)
        delta = (x_adv - x)[0, 0]
        assert row["l0"] == int((delta.abs() > 1e-4).sum())
        assert row["l2"] == pytest.approx(float(delta.norm()), abs=1e-4)
        assert row["linf"] == pytest.approx(float(delta.abs().max()), abs=2e-5)
        assert row["linf"] <= 0.1 + 1e-5
        assert row["psnr_adv"] == pytest.approx(psnr(x_adv, x), abs=0.01)
        assert row["psnr_pure_adv"] == pytest.approx(psnr(restored, x), abs=0.01)
        assert row["psnr_pure_clean"] == pytest.approx(psnr(recovered, x), abs=0.01)
        assert all(math.isnan(row[k]) for k in ("ssim_adv", "ssim_pure_adv", "ssim_pure_clean"))  # 8x8: no window
        assert (row["label"], row["seed"], row["dataset"], row["split"]) == (int(y), 7, "toy", "test")
        assert (row["classifier"], row["attack"], row["attack_repr"]) == ("linear", "pgd", repr(attack))
        assert row["eps"] == pytest.approx(0.1)
        assert not row["rejected_adv"]
        assert row["seconds_attack"] > 0
    fooled = rows["pred_adv"] != rows["label"]
    assert 0.2 < fooled.mean() <= 1


def gan() -> Any:
    options = {"size": 8, "width": 2, "latent": 4, "steps": 3, "restarts": 2}
    torch.manual_seed(3)
    return create_defense("defense_gan", channels=1, **options).eval().requires_grad_(False)


def magnet() -> Any:
    torch.manual_seed(4)
    defense = create_defense("magnet", channels=1, detectors=[{"error": 2}, {"temperature": 10}, {"error": 1}])
    defense.limits.fill_(0.09)
    return defense.eval()


def test_what_detects_is_judged_as_purifying_and_scoring_apart_would(tmp_path: Path) -> None:
    chain = create_defense("pipeline", parts=[magnet(), create_defense("bit_depth", bits=2), gan()])
    made = {"none": create_defense("none"), "gan": gan(), "magnet": magnet(), "chain": chain}
    two = {"linear": Linear(), "other": Linear(5)}
    run_grid(grid(defenses=made, classifiers=two, batch=4, shard=5, samples=0), tmp_path)
    rows = schema.read_rows(tmp_path)
    assert len(rows) == 2 * 10 * (1 + 2 * 3)
    x, _ = toy().batch(torch.arange(10))
    for (at, by, knowledge), part in rows.groupby(["classifier", "defense", "knowledge"]):
        with torch.no_grad():
            purified, scores = made[by].purify(x), made[by].scores(x, two[at])
            predicted = two[at](purified).argmax(1)
        mine = part.sort_values("index")
        assert (mine["pred_pure_clean"].to_numpy() == predicted.numpy()).all(), (at, by, knowledge)
        kept = np.stack(mine["scores_clean"].to_numpy()) if scores.shape[1] else np.zeros((10, 0))
        np.testing.assert_allclose(kept, scores.numpy(), rtol=1e-5, atol=1e-7)
        rejected = (scores > made[by].thresholds).any(1).numpy()
        assert (mine["rejected_clean"].to_numpy() == rejected).all()
    # The classifier is asked by one of magnet's detectors: what it says in front of one is not said of the other.
    clean = rows[rows["defense"] == "magnet"].groupby("classifier")["scores_clean"].apply(lambda s: np.stack(s)[:, 1])
    assert np.abs(clean["linear"][:10] - clean["other"][:10]).max() > 1e-4


def test_each_image_is_reconstructed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unperturb.defenses.defense_gan import DefenseGAN

    seen, whole = list[int](), DefenseGAN.reconstruct

    def counted(self: DefenseGAN, images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(DefenseGAN, "reconstruct", counted)
    fgsm, pgd = create_attack("fgsm", eps=0.1), create_attack("pgd", eps=0.1, steps=2)
    kinds = {"a": (fgsm, ["oblivious"]), "b": (pgd, ["oblivious"])}
    run_grid(grid(defenses={"none": create_defense("none"), "gan": gan()}, attacks=kinds), tmp_path)
    assert sum(seen) == 10 * (1 + 2)  # clean images once, and those of each attack


@pytest.mark.parametrize("lost", [0, 1])
def test_a_random_defense_draws_the_same_when_resumed(lost: int, tmp_path: Path) -> None:
    torch.manual_seed(5)
    drawn = create_defense("defense_gan", channels=1, size=8, width=2, latent=4, steps=2, restarts=2, seed=None).eval()
    fgsm, pgd = create_attack("fgsm", eps=0.1), create_attack("pgd", eps=0.1, steps=2)
    many = grid(
        defenses={"none": create_defense("none"), "drawn": drawn},
        attacks={"a": (fgsm, ["oblivious"]), "b": (pgd, ["oblivious"])},
        samples=0,
    )
    run_grid(many, tmp_path)
    first = schema.read_rows(tmp_path)
    sorted(tmp_path.glob("rows/linear.drawn.*"))[lost].joinpath("0001.parquet").unlink()
    run_grid(many, tmp_path)
    pd.testing.assert_frame_equal(without_clock(schema.read_rows(tmp_path)), without_clock(first))


def test_samples_are_a_choice_over_classes_from_all_shards(tmp_path: Path) -> None:
    data, labels = toy(), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 3, 3])  # sorted, as a folder is
    data = replace(data, labels=labels)
    assert labels[shown_rows(labels, 3)].sort().values.tolist() == [0, 1, 3]
    assert labels[shown_rows(labels, 8)].bincount().tolist() == [3, 3, 0, 2]
    assert sorted(shown_rows(labels, 99).tolist()) == list(range(10))
    chosen = shown_rows(labels, 5)
    assert len(set((chosen // 4).tolist())) > 1  # of several shards
    run_grid(grid(data=data, samples=5), tmp_path)
    found = {(cell["defense"], cell["knowledge"]): tensors for cell, tensors in samples.read_samples(tmp_path)}
    assert set(found) == {("none", "oblivious"), ("ours", "oblivious"), ("ours", "white_box")}
    rows = schema.read_rows(tmp_path).query("defense == 'ours' and knowledge == 'white_box'").set_index("index")
    tensors = found["ours", "white_box"]
    assert tensors["index"].tolist() == data.index[chosen].tolist()
    assert torch.equal(tensors["clean"], data.images[chosen])
    rows = rows.loc[tensors["index"].tolist()]
    order = ("clean", "adv", "pure_clean", "pure_adv")
    assert tensors["prediction"].tolist() == rows[[f"pred_{k}" for k in order]].to_numpy().tolist()
    np.testing.assert_allclose(tensors["confidence"], rows[[f"conf_{k}" for k in order]].to_numpy())


def test_names_that_read_alike_are_cells_of_their_own(tmp_path: Path) -> None:
    fgsm = create_attack("fgsm", eps=0.1)
    labels = ["a b", "a_b", "A_B", "eps<4", "eps>4", "雑音", "攻撃", "x" * 300, "x" * 299 + "y"]
    bits = {name: create_defense("bit_depth", bits=3) for name in ("median+jpeg", "median_jpeg")}
    crossed = grid(defenses=bits, attacks={label: (fgsm, ["oblivious"]) for label in labels}, shard=10, samples=2)
    folders = [cell.folder for cell in crossed.cells()]
    assert len({f.casefold() for f in folders}) == len(folders) == 2 * len(labels)
    assert max(map(len, folders)) == 120
    run_grid(crossed, tmp_path)
    rows = schema.read_rows(tmp_path)
    assert rows.groupby(["defense", "attack"])["index"].nunique().tolist() == [10] * len(folders)
    assert len(samples.read_samples(tmp_path)) == len(folders)


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
    with pytest.raises(runs.RunError, match=r"does not hold 8 rows of each of its 2 cells.*another"):
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
    blank = {"none": Fragile()}
    with pytest.warns(
        UserWarning, match="none · white · oblivious: logits are not finite for 10 of 10 .*index 100, 101"
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
    with pytest.warns(UserWarning, match=r"classifier · none · pgd-3 · oblivious: for 4 of 10 images .*exactly zero"):
        rows = evaluate(data, {"none": model}, [pgd], ["oblivious"], out=tmp_path / "out", device="cpu").sort_values(
            "index"
        )
    assert (rows["zero_gradients"] * 2 > rows["gradients"]).tolist() == blocked
    assert set(rows["gradients"]) == {3}
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    for _ in range(2):  # what is kept of an attack keeps them too
        made = AdversarialStore(tmp_path / "c").get(
            pgd, net, "key", data, torch.arange(10), seed=0, batch=4, device=CPU
        )
        assert (made.gradients.tolist(), made.zero_gradients.tolist()) == ([3] * 10, [0] * 10)


def test_classes_in_another_order_are_said_to_be(recwarn: pytest.WarningsRecorder) -> None:
    data, fgsm = toy(40), [create_attack("fgsm", eps=0.1)]
    evaluate(data, {"none": Linear()}, fgsm, ["oblivious"], device="cpu")
    assert not recwarn.list
    turned = replace(data, labels=(data.labels + 1) % 4, class_names=["cat", "dog", "hen", "owl"])
    evaluate(turned.take(torch.arange(19)), {"none": Linear()}, fgsm, ["oblivious"], device="cpu")
    assert not recwarn.list  # too few to say
    with pytest.warns(
        UserWarning, match=r"is right on \d of 40 .* near chance for 4 classes.*\(cat, dog, hen, \.\.\.\).*class_names="
    ):
        evaluate(turned, {"none": Linear()}, fgsm, ["oblivious"], device="cpu")


def test_an_attack_without_a_budget_has_none_in_its_rows(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unbounded(Attack):
        eps: float | None = None

        def perturb(self, context: AttackContext) -> Tensor:
            return 1 - context.images

    run_grid(grid(attacks={"inverse": (Unbounded(), ["oblivious"])}), tmp_path)
    assert schema.read_rows(tmp_path)["eps"].isna().all()


# Whole evaluations ---------------------------------------------------------------------------------------------------


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
            "defenses": ["none", str(tmp_path / "ours-digits")],
            "attacks": [
                {"name": "fgsm", "eps": "8/255", "label": "small"},
                {"name": "pgd", "eps": 0.2, "steps": 2, "knowledge": ["transfer", "white_box"]},
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
        ((["ours"], ["pgd-2"], ["white_box"]), "defense == 'ours' and attack == 'pgd-2' and knowledge == 'white_box'"),
        ((["none", "ours"], ["small"]), "attack == 'small'"),
        (([], [], ["transfer"]), "knowledge == 'transfer'"),
    ):
        some = run_evaluation(only(recipe, *chosen), tmp_path / where, device="cpu")
        expected = whole.query(where)
        assert 0 < len(expected) < len(whole)
        keys = ["classifier", "defense", "attack", "knowledge", "index"]
        kept = [without_clock(rows).sort_values(keys).reset_index(drop=True) for rows in (some, expected)]
        pd.testing.assert_frame_equal(*kept)
    assert only(recipe) is recipe  # the whole stays the same run
    with pytest.raises(UnknownNameError, match=r"unknown defense 'our'\. Did you mean 'ours'"):
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
    with pytest.raises(runs.RunError, match=r"already holds another run \(it differs in .*seed"):
        run_evaluation(recipe.model_copy(update={"seed": 1}), out, device="cpu", resume=True)
    with runs.lock(out), pytest.raises(runs.RunError, match="is being written by process"):
        run_evaluation(recipe, out, device="cpu", resume=True)
    # The same names, trained again: other rows.
    for folder, key in (
        (recipe.defenses[1], "fingerprints.defenses.ours"),
        (recipe.surrogate, "fingerprints.surrogate"),
    ):
        kept = {f: f.read_bytes() for f in Path(folder).iterdir()}
        if key.endswith("ours"):
            save_defense(Path(folder), purifier(5), {})
        else:
            net = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
            save_classifier(Path(folder), net)
        with pytest.raises(runs.RunError, match=rf"another run \(it differs in {key}"):
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
        grid_of(twice, "cpu")
    with pytest.raises(ValueError, match="attacks share a name"):
        evaluate(toy(), {"none": Linear()}, [create_attack(**thing) for thing in things])


def test_cost_of_a_grid_against_a_count_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "probe", lambda device: Speed({("float32", "contiguous"): 10.0}))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.flatten(1))

    attack = create_attack("pgd", eps=0.1, steps=3)
    one = grid(
        classifiers={"net": Net()}, defenses={"none": create_defense("none")}, attacks={"a": (attack, ["oblivious"])}
    )
    forward = 2 * 64 * 4
    cost = estimate(one)
    # Four forward passes and three backward to the image, and one to judge.
    assert cost.pflop * 1e15 == pytest.approx((4 + 3 + 1) * forward * 10, rel=0.01)
    assert (cost.cells, cost.images) == (1, 10)


@pytest.mark.parametrize(
    ("attack", "label"),
    [
        (create_attack("fgsm", eps=0.1), "fgsm"),
        (create_attack("pgd", eps=0.1, steps=7), "pgd-7"),
        (create_attack("pgd", eps=0.1, norm="l2"), "pgd-l2-40"),
        (create_attack("mim", eps=0.1), "mim-10"),
    ],
)
def test_label(attack: Attack, label: str) -> None:
    assert label_of(attack) == label


def test_evaluate_digits(tmp_path: Path) -> None:
    data = load_dataset("digits", size=8).test
    torch.manual_seed(0)
    classifier = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    models = {"none": classifier, "ours": Protected(classifier, purifier())}
    pgd = create_attack("pgd", eps=0.1, steps=2)
    out = tmp_path / "first-look"
    rows = evaluate(data, models, [pgd], ["oblivious", "white_box"], n=15, out=out, device="cpu")
    assert len(rows) == 3 * 15
    assert set(zip(rows["defense"], rows["knowledge"])) == {
        ("none", "oblivious"),
        ("ours", "oblivious"),
        ("ours", "white_box"),
    }
    assert set(rows["classifier"]) == {"convnet"}
    subset = data.subset(15)
    assert set(rows["index"]) == set(subset.index.tolist())
    assert set(rows["split"]) == {"test:15@0"}
    images, labels = subset.batch(torch.arange(15))
    found = rows.query("defense == 'ours' and knowledge == 'white_box'").set_index("index").loc[subset.index.tolist()]
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
        (lambda out: evaluate(toy(), {"none": net}, [pgd], ["whitebox"]), UnknownNameError, "Did you mean 'white_box'"),
        (
            lambda out: evaluate(toy(), {"a": net, "b": Linear(1)}, [pgd]),
            ValueError,
            "stand on 2 different classifiers",
        ),
        (lambda out: evaluate(toy(), {"none": net}, [pgd], ["transfer"]), ValueError, "needs a surrogate"),
        (lambda out: evaluate(toy(), {"none": net}, [pgd], n=3, out=out, resume=True), runs.RunError, "another run"),
        (lambda out: evaluate(toy(), {"none": net}, [pgd], seed=1, out=out), runs.RunError, "another run"),
        (lambda out: evaluate(toy(), {"none": net}, [pgd], out=out), runs.RunError, "already holds this run"),
    ]


@pytest.mark.parametrize("number", range(len(refusals())))
def test_what_evaluate_refuses(number: int, tmp_path: Path) -> None:
    evaluate(toy(), {"none": Linear()}, [create_attack("pgd", eps=0.1, steps=2)], out=tmp_path / "out", device="cpu")
    call, error, message = refusals()[number]
    with pytest.raises(error, match=message):
        call(tmp_path / "out")


def test_every_attack_has_a_label() -> None:
    needs = {"eps": 0.1}
    made = []
    for name in attacks:
        make = attacks[name]
        try:
            made.append(make())
        except TypeError:
            made.append(make(**needs))
    labels = [label_of(a) for a in made]
    assert len(set(labels)) == len(labels)


# What training has cost ----------------------------------------------------------------------------------------------


def trained(folder: Path, kind: str, pflop: float | None, where: str = "training.json", **recipe: Any) -> str:
    """A run folder as far as its cost goes."""
    outcome = {"pflop": pflop, "seconds": 10.0}
    place = {"defense": "about", "classifier": "extra"}[kind]
    kept = {place: {"outcome": outcome}} if where == "inside" and pflop is not None else {}
    runs.write_json(folder / f"{kind}.json", {"name": "paired_gan", **kept})
    if where == "training.json" and pflop is not None:
        runs.write_json(folder / "training.json", outcome)
    runs.write_json(folder / "recipe.json", recipe)
    return str(folder)


@pytest.mark.parametrize("where", ["training.json", "inside"])
def test_what_a_folder_has_cost(where: str, tmp_path: Path) -> None:
    first = trained(tmp_path / "first", "defense", 0.5, where)
    second = trained(tmp_path / "second", "defense", 0.25, where, start=first)
    teacher = trained(tmp_path / "teacher", "classifier", 1.0, where)
    pupil = trained(tmp_path / "pupil", "classifier", 2.0, where, objective={"teacher": "runs/elsewhere/teacher"})
    assert training_cost.of_folder(first) == (0.5, 10.0)
    assert training_cost.of_folder(second) == (0.75, 20.0)  # with what it started from
    assert training_cost.of_folder(teacher) == (1.0, 10.0)
    assert training_cost.of_folder(pupil) == (3.0, 20.0)  # the teacher has moved along with it
    assert training_cost.of_folder(f"{first}+jpeg") == (0.5, 10.0)
    assert training_cost.of_folder(f"{first}+{second}") == (1.25, 30.0)
    assert training_cost.of_folder("median") == training_cost.of_folder("none") == (0.0, 0.0)
    unknown = trained(tmp_path / "unknown", "classifier", None, where)
    assert training_cost.of_folder(unknown) == (None, None)
    assert training_cost.of_folder(f"{first}+{unknown}") == (None, None)
    orphan = trained(tmp_path / "orphan", "defense", 0.25, where, start="runs/gone")
    assert training_cost.of_folder(orphan) == (None, None)
    itself = trained(tmp_path / "itself", "defense", 0.25, where, start=str(tmp_path / "itself"))
    assert training_cost.of_folder(itself) == (None, None)
    runs.write_json(tmp_path / "itself" / "recipe.json", ["not", "a", "recipe"])
    with pytest.raises(runs.RunError, match=r"recipe\.json"):
        training_cost.of_folder(itself)


def test_an_evaluation_keeps_what_its_defenses_have_cost(recipe: Any, tmp_path: Path) -> None:
    runs.write_json(Path(recipe.defenses[1]) / "training.json", {"pflop": 0.125, "seconds": 7.0})
    small = recipe.model_copy(update={"n": 2, "defenses": [*recipe.defenses, f"{recipe.defenses[1]}+bit_depth"]})
    run_evaluation(small, tmp_path / "out", device="cpu")
    kept = schema.read_costs(tmp_path / "out")
    assert [name for _, name in kept] == ["none", "ours", "ours+bit_depth"]
    (source,) = {dataset for dataset, _ in kept}
    assert source == schema.read_rows(tmp_path / "out")["dataset"].iloc[0]
    assert [about["pflop"] for about in kept.values()] == [0.0, 0.125, 0.125]
    assert [about["differentiable"] for about in kept.values()] == [True, True, False]
    assert kept[source, "ours"]["spec"]["name"] == "paired_gan"
    assert kept[source, "ours"]["folder"] == recipe.defenses[1]
    # Models in hand: what was just trained knows its cost, what comes from elsewhere does not.
    bare = Linear()
    models = {"none": bare, "ours": Protected(bare, purifier()), "robust": Linear(1)}
    pgd = create_attack("pgd", eps=0.1, steps=1)
    evaluate(toy(), models, [pgd], ["oblivious"], out=tmp_path / "hand", device="cpu")
    assert {name: about["pflop"] for (_, name), about in schema.read_costs(tmp_path / "hand").items()} == {
        "none": 0.0,
        "ours": None,
        "robust": None,
    }
