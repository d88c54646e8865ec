"""Adversarial patches: what may change, where they lie, and closed forms on linear models."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb import per_image_rng
from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext, QueryCounter
from unperturb.attacks.patch import PatchAttack


class Linear(nn.Module):
    def __init__(self, classes: int = 2, channels: int = 1, size: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = torch.randn(classes, channels * size * size, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w.T


def some_images(n: int, channels: int = 1, size: int = 8) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def context_of(model: nn.Module, x: Tensor, y: Tensor) -> AttackContext:
    counts, rows = torch.zeros_like(y), torch.arange(len(y))
    return AttackContext(model, x, y, False, rows, 0, QueryCounter(queries=counts, zero_gradients=counts.clone()), rows)


@pytest.mark.parametrize("position", ["center", "random", (0, 5), (2, 1)])
@pytest.mark.parametrize("universal", [False, True])
def test_only_a_square_of_the_asked_area_changes_and_stays_in_the_image(
    position: str | tuple[int, int], universal: bool
) -> None:
    model, x = Linear(3, channels=3), some_images(6, channels=3)
    y = model(x).argmax(1)
    attack = attacks.create("patch", area=0.15, position=position, universal=universal, steps=5)
    out = attack(model, x, y)
    side = 3  # 9 of 64 pixels is the largest square of at most 15 %
    changed = (out != x).any(1)
    places = set()
    for mask in changed:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == side * side
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == side - 1
        places.add((int(rows[0]), int(columns[0])))
    assert out.min() >= 0
    assert out.max() <= 1
    if position == "random":
        assert len(places) > 2
    else:
        assert places == {(2, 2) if position == "center" else position}


def test_random_places_reach_every_corner_of_the_image() -> None:
    x = torch.zeros(400, 1, 6, 5)
    context = context_of(Linear(), x, torch.zeros(400, dtype=torch.int64))
    attack = PatchAttack(area=0.14)
    mask, _ = attack._place(context, attack.side(6, 5), 0)
    assert (mask.flatten(1).sum(1) == 4).all()
    corners = {tuple(m.flatten().nonzero()[0].tolist()) for m in mask}
    assert len(corners) == 5 * 4


def test_the_patch_of_a_linear_model_is_its_closed_form() -> None:
    model, x = Linear(), some_images(5)
    y = torch.tensor([0, 1, 0, 1, 0])
    out = attacks.create("patch", area=0.25, position=(1, 3))(model, x, y)
    rising = (model.w[1 - y] - model.w[y]).reshape_as(x) > 0
    expected = x.clone()
    expected[:, :, 1:5, 3:7] = rising.float()[:, :, 1:5, 3:7]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    one_class = torch.zeros_like(y)
    universal = attacks.create("patch", area=0.25, position=(1, 3), universal=True)(model, x, one_class)
    rising = (model.w[1] - model.w[0]).reshape(1, 8, 8) > 0
    expected[:, :, 1:5, 3:7] = rising.float()[:, 1:5, 3:7]
    torch.testing.assert_close(universal, expected, atol=1e-5, rtol=0)


def test_a_universal_patch_is_one_and_maximizes_the_batchs_sum() -> None:
    model, x = Linear(), some_images(4)
    y = torch.tensor([0, 0, 0, 1])
    attack = attacks.create("patch", area=0.25, position="center", universal=True, loss="margin", steps=60)
    result = attack.run(model, x, y)
    cut = result.images[:, :, 2:6, 2:6]
    torch.testing.assert_close(cut, cut[:1].expand_as(cut), atol=1e-6, rtol=0)
    # Three images pull one way, one the other: the sum follows the three.
    rising = (model.w[1] - model.w[0]).reshape(8, 8)[2:6, 2:6] > 0
    torch.testing.assert_close(cut[0, 0], rising.float(), atol=1e-5, rtol=0)
    assert result.forwards == 61
    assert result.backwards == 60


def test_the_highest_loss_met_is_returned() -> None:
    model, x = Linear(4), some_images(6)
    y = model(x).argmax(1)
    met: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        logits = model(images).sin()  # not monotone, so that the last patch need not be the best
        met.append(F.cross_entropy(logits.detach(), y, reduction="none"))
        return logits

    out = attacks.create("patch", area=0.2, steps=15, lr=0.3)(watched, x, y)
    torch.testing.assert_close(
        F.cross_entropy(model(out).sin(), y, reduction="none"), torch.stack(met).amax(0), atol=1e-5, rtol=0
    )


def test_a_quarter_turn_is_a_quarter_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = PatchAttack(area=0.25, position="center", rotation=90)
    context = context_of(Linear(), torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    patch = torch.rand(1, 1, 4, 4)
    for number, turns in ((1.0, 1), (0.0, -1), (0.5, 0)):
        monkeypatch.setattr(per_image_rng, "uniform", lambda *_, number=number: torch.full((1, 4), number))
        pasted = attack._paste(context, patch, attack._place(context, 4, 0))[0, 0, 2:6, 2:6]
        # Rows count downwards, so a positive angle turns clockwise.
        torch.testing.assert_close(pasted, torch.rot90(patch[0, 0], -turns), atol=1e-5, rtol=0)


def test_turned_and_scaled_patches_keep_their_area_and_stay_whole() -> None:
    x = torch.zeros(200, 1, 40, 40)
    context = context_of(Linear(), x, torch.zeros(200, dtype=torch.int64))
    attack = PatchAttack(area=0.04, rotation=45, scale=(0.5, 1.5))
    mask, _ = attack._place(context, attack.side(40, 40), 7)
    numbers = per_image_rng.uniform(0, context.index, 7, (4,))
    expected = (8 * (0.5 + numbers[:, 3])) ** 2
    area = mask.flatten(1).sum(1)
    assert ((area - expected).abs() <= 0.15 * expected + 4).all()
    assert area.max() > 2 * area.min()


def test_the_gradient_goes_through_the_pasting() -> None:
    model, x = Linear(3, channels=3), some_images(4, channels=3)
    y = torch.tensor([0, 1, 2, 0])
    for universal in (False, True):
        attack = PatchAttack(area=0.3, rotation=40, scale=(0.7, 1.3), universal=universal)
        context = context_of(model, x, y)
        where = attack._place(context, 4, 3)
        patch = torch.rand(1 if universal else 4, 3, 4, 4)
        value, _, gradient = attack._gradient(context, patch, where)

        def total(p: Tensor, where: tuple[Tensor, Tensor] = where) -> Tensor:
            return F.cross_entropy(model(attack._paste(context, p, where)), y, reduction="sum")  # noqa: B023

        torch.testing.assert_close(value.sum().float(), total(patch))
        push = torch.randn(patch.shape, generator=torch.Generator().manual_seed(2))
        slope = (total(patch + 1e-2 * push) - total(patch - 1e-2 * push)) / 2e-2
        torch.testing.assert_close((gradient * push).sum(), slope, rtol=1e-2, atol=1e-3)


def test_eot_makes_one_patch_for_many_places() -> None:
    # Class 1 is a bright image wherever the light is, so a white patch is best at every place and angle.
    def bright(images: Tensor) -> Tensor:
        light = images.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(light), 20 * (light - 0.5)], 1)

    x, y = 0.3 * some_images(5, size=10), torch.zeros(5, dtype=torch.int64)
    attack = attacks.create("patch", area=0.25, rotation=30, scale=(0.8, 1.2), eot_samples=3, steps=25, universal=True)
    result = attack.run(bright, x, y)
    changed = result.images != x
    assert (result.images[changed] > 0.999).all()
    assert result.forwards == result.backwards == 75
    assert torch.equal(result.images, attack(bright, x, y))
    assert not torch.equal(result.images, attack(bright, x, y, seed=1))


def test_per_image_patches_do_not_depend_on_the_batch() -> None:
    model, x = Linear(3), some_images(5)
    y = model(x).argmax(1)
    attack = attacks.create("patch", area=0.1, rotation=20, eot_samples=2, steps=10)
    together = attack(model, x, y, seed=3)
    apart = torch.cat([attack(model, x[i : i + 1], y[i : i + 1], index=torch.tensor([i]), seed=3) for i in range(5)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_settings_are_checked_and_side_never_exceeds_the_area() -> None:
    for height, width, area in ((28, 28, 0.05), (8, 8, 0.25), (5, 40, 1.0), (4, 4, 0.001)):
        side = PatchAttack(area=area).side(height, width)
        assert 1 <= side <= min(height, width)
        assert side == 1 or side**2 <= area * height * width + 1e-6
        assert side in (1, min(height, width)) or (side + 1) ** 2 > area * height * width
    assert math.isclose(PatchAttack(area=0.25).side(8, 8), 4)
    for options in (
        {"area": 0},
        {"position": "left"},
        {"position": (1,)},
        {"scale": (2, 1)},
        {"eot_samples": -1},
        {"loss": "l1"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            PatchAttack(**options)
    model, x = Linear(), some_images(1)
    with pytest.raises(ValueError, match="leaves an image"):
        attacks.create("patch", area=0.25, position=(6, 0))(model, x, torch.tensor([0]))
