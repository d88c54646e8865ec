"""Adversarial images: exact through the purifier, made once, kept whole, cleared away in order."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toy import Linear, purifier, toy
from unperturb import runs
from unperturb.attackers import Attacker
from unperturb.attacks import Attack, create_attack
from unperturb.attacks.context import AttackContext
from unperturb.attacks.losses import cross_entropy
from unperturb.evaluation import adversarials
from unperturb.evaluation.adversarials import AdversarialStore, from_16_bit, to_16_bit
from unperturb.evaluation.run import evaluate
from unperturb.systems import System

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "cache")


@dataclass(frozen=True, kw_only=True)
class Seen(Attack):
    """Keeps the gradient that an attacker is given, scaled into [0, 1]."""

    def perturb(self, context: AttackContext) -> Tensor:
        return context.gradient(context.images, cross_entropy)[1] / 100 + 0.5


def test_the_white_box_gradient_goes_through_the_purifier_exactly() -> None:
    classifier, defense = Linear(), purifier()
    images, labels = torch.rand(5, 1, 8, 8), torch.arange(5) % 4
    system = System("it", classifier, defense)
    target = Attacker(Seen(), "white_box").model_for(system)
    found = (Seen()(target, images, labels) - 0.5) * 100
    # By hand: W^T (p - y) at the restored image, pulled back through the purifier alone.
    x = images.clone().requires_grad_()
    restored = defense.purify(x)
    p = classifier(restored.detach()).softmax(1)
    at_restored = ((p - F.one_hot(labels, 4)) @ classifier.weight).detach().reshape_as(images)
    (expected,) = torch.autograd.grad(restored, x, at_restored)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    oblivious = (Seen()(Attacker(Seen(), "oblivious").model_for(system), images, labels) - 0.5) * 100
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


@dataclass(frozen=True, kw_only=True)
class Begun(Attack):
    """Halfway from where it begins to white."""

    uses_start = True

    def perturb(self, context: AttackContext) -> Tensor:
        context.logits(context.images)
        return ((context.images if context.start is None else context.start) + 1) / 2


def get(store: AdversarialStore, model: nn.Module, **changed: Any) -> Tensor:
    options: dict[str, Any] = {
        "attack": create_attack("pgd", eps=0.1, steps=2) if "start" not in changed else Begun(),
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
        {"start": torch.zeros(10, 1, 8, 8)},
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
        evaluate(toy(), {"undefended": Linear()}, [create_attack("fgsm", eps=0.1)], out=tmp_path / "out", device="cpu")
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


def test_an_attack_begins_where_it_is_told_to(tmp_path: Path) -> None:
    store, model, starts = AdversarialStore(tmp_path), Counted(), [torch.rand(10, 1, 8, 8) for _ in range(2)]
    found = [get(store, model, start=start) for start in starts]
    for made, start in zip(found, starts):
        torch.testing.assert_close(made, (start + 1) / 2, rtol=0, atol=2e-5)
    spent = model.calls
    assert torch.equal(get(store, model, start=starts[0].clone()), found[0])  # each is kept beside the other
    assert torch.equal(get(store, model, start=starts[1].clone()), found[1])
    assert model.calls == spent
    some = get(store, model, rows=torch.tensor([0, 7, 9]), start=starts[0][[0, 7, 9]])
    torch.testing.assert_close(some, found[0][[0, 7, 9]])


def test_choices_of_images_are_kept_beside_each_other(tmp_path: Path) -> None:
    store, model = AdversarialStore(tmp_path), Counted()
    choices = [torch.tensor([0, 3, 4]), torch.tensor([0, 5, 6])]
    first = [get(store, model, rows=rows) for rows in choices]
    spent = model.calls
    assert all(torch.equal(get(store, model, rows=rows), made) for rows, made in zip(choices, first))
    assert model.calls == spent
