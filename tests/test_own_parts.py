"""A user's own parts in an evaluation: each row is what it would be with a well-behaved twin of theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import unperturb as up
from unperturb.attackers import Attacker
from unperturb.data import ImageSet
from unperturb.systems import System

NET = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).requires_grad_(False)
NET[1].weight.copy_(torch.randn(4, 64, generator=torch.Generator().manual_seed(3)))
MEASURED = ["pred_clean", "pred_adv", "pred_pure_clean", "pred_pure_adv", "linf", "psnr_adv", "psnr_pure_clean"]


def pictures(n: int = 30) -> ImageSet:
    pixels = torch.randint(60, 190, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = NET(pixels.float() / 255).argmax(1)
    index = torch.arange(n)
    return ImageSet(images=pixels, labels=labels, index=index, class_names=list("abcd"), source="own", split="test")


def rows(
    systems: dict[str, nn.Module], attacks: Any = None, knowledge: tuple[str, ...] = ("oblivious",)
) -> pd.DataFrame:
    attacks = attacks or [up.create_attack("pgd", eps=0.02, steps=3)]
    return up.evaluate(pictures(), systems, attacks, knowledge, device="cpu", quiet=True)


class Flat(up.Defense):
    """All grey; with a detector that asks the classifier."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.add_detectors(1, 0.1)
        self.limits.fill_(0.5)

    def purify(self, images: Tensor) -> Tensor:
        return images.mul_(0.5).add_(0.2) if self.in_place else images * 0.5 + 0.2

    def scores(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> Tensor:
        return (logits_fn(images).softmax(1) - logits_fn(images * 0.9).softmax(1)).abs().sum(1, keepdim=True)


class Centered(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.net, self.in_place = NET, in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x -= 0.5
            return self.net(x)
        return self.net(x - 0.5)


def test_parts_that_work_in_place_change_no_row() -> None:
    found = [rows({"p": up.Protected(Centered(a), Flat(b))}) for a, b in ((False, False), (True, False), (False, True))]
    for other in found[1:]:
        pd.testing.assert_frame_equal(found[0][MEASURED], other[MEASURED], rtol=1e-4)
        assert found[0]["rejected_clean"].tolist() == other["rejected_clean"].tolist()
        assert torch.allclose(*(torch.tensor(f["scores_adv"].map(float_of).tolist()) for f in (found[0], other)))


def float_of(values: Any) -> float:
    (value,) = values
    return float(value)


class Noisy(up.Defense):
    random = True

    def purify(self, images: Tensor) -> Tensor:
        return images.add_(0.3 * torch.randn_like(images))


@pytest.mark.parametrize("knowledge", ["white_box", "bpda"])
def test_draws_of_a_purifier_that_works_in_place_do_not_pile_up(knowledge: str) -> None:
    images = torch.full((200, 1, 8, 8), 0.5)
    attacker = Attacker(up.create_attack("pgd", eps=0.1), knowledge, eot_samples=16)
    logits = attacker.model_for(System("noisy", NET, Noisy()))(images)
    one = 0.3 * NET[1].weight.norm(dim=1)  # of one draw; the mean of 16 spreads a quarter as far
    assert (logits.std(0) / one).sub(0.25).abs().max() < 0.1
    assert torch.equal(images, torch.full_like(images, 0.5))


def test_a_hook_on_all_modules_mixes_no_cells() -> None:
    models = {name: up.Protected(NET, up.create_defense(name)) for name in ("median", "bit_depth")}
    knowledge = ("oblivious", "white_box", "bpda")
    before = rows({"undefended": NET, **models}, knowledge=knowledge)
    hook = register_module_forward_hook(lambda *_: None)
    try:
        after = rows({"undefended": NET, **models}, knowledge=knowledge)
    finally:
        hook.remove()
    pd.testing.assert_frame_equal(before[[*MEASURED, "l2"]], after[[*MEASURED, "l2"]])


@dataclass(frozen=True, kw_only=True)
class Shift(up.Attack):
    by: float = field(default=0.0, repr=False, compare=False)

    def perturb(self, context: Any) -> Tensor:
        return (context.images + self.by).clamp(0, 1)


def test_two_attacks_that_read_alike_are_two() -> None:
    found = rows({"undefended": NET}, {"near": Shift(), "far": Shift(by=0.2)})
    assert found.groupby("attack")["linf"].max().to_dict() == pytest.approx({"near": 0.0, "far": 0.2}, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_own_class_of_another_dtype_is_judged(dtype: torch.dtype) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4).to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1))

    assert len(rows({"undefended": Own()})) == 30
    assert len(rows({"p": up.Protected(Own(), Flat(False))})) == 30


def test_a_frozen_script_is_judged() -> None:
    script = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()))
    assert len(rows({"p": up.Protected(script, up.create_defense("median"))}, knowledge=("oblivious", "bpda"))) == 60


class Masked(nn.Module):
    """Classes that this data set does not use, masked."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([NET(x), torch.full((len(x), 2), -1e9)], 1)


@pytest.mark.parametrize("name", ["ddn", "cw", "deepfool", "fab-t", "jsma"])
def test_a_masked_class_saves_no_image(name: str) -> None:
    images, labels = pictures(12).batch(torch.arange(12))
    result = up.create_attack(name).run(Masked(), images, labels)
    assert int(result.success.sum()) >= 10
