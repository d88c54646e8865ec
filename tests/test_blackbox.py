"""Square and RayS: query counts, balls, and closed forms on linear models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unperturb.attacks.rays
from unperturb.attacks.base import attacks
from unperturb.attacks.context import AttackContext, QueryCounter
from unperturb.attacks.losses import margin
from unperturb.attacks.square import Square, pyramids

PIXELS = 3 * 5 * 4


class Linear(nn.Module):
    """Logits W x + b that remembers what it was asked."""

    def __init__(self, classes: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = torch.randn(classes, PIXELS, generator=generator)
        self.b = torch.randn(classes, generator=generator)
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        return x.flatten(1) @ self.w.T + self.b


def some_images(n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return low + (high - low) * torch.rand(n, 3, 5, 4, generator=generator)


def whole_context(model: Any, x: Tensor, y: Tensor) -> AttackContext:
    counts, rows = torch.zeros_like(y), torch.arange(len(y))
    return AttackContext(model, x, y, False, rows, 0, QueryCounter(queries=counts, zero_gradients=counts.clone()), rows)


# Square ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.5)])
def test_square_counts_every_query_and_asks_no_more_after_a_success(norm: str, eps: float) -> None:
    model, x = Linear(4), some_images(24)
    y = model(x).argmax(1)
    model.asked.clear()
    result = attacks.create("square", norm=norm, eps=eps, queries=150).run(model, x, y)
    asked = model.asked[:-2]  # without the final checks
    assert sum(len(batch) for batch in asked) == int(result.queries.sum())
    assert result.forwards == len(asked)
    assert 2 <= int(result.success.sum()) <= 22
    assert (result.queries[~result.success] == 150).all()
    assert (result.queries[result.success] < 150).any()
    assert len(asked[-1]) == int((result.queries == result.queries.max()).sum())
    # Whoever left at query q was in the first q batches and in no later one.
    sizes = [len(batch) for batch in asked]
    assert sizes == [int((result.queries >= q).sum()) for q in range(1, len(asked) + 1)]
    assert result.backwards == 0


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.7)])
def test_square_asks_only_inside_ball_and_box(norm: str, eps: float) -> None:
    model, x = Linear(), some_images(1).round()
    attacks.create("square", norm=norm, eps=eps, queries=200)(model, x, model(x).argmin(1))
    model.asked.clear()
    attacks.create("square", norm=norm, eps=eps, queries=200)(model, x, model(x).argmax(1))
    for asked in model.asked[1:]:
        size = (asked - x).flatten(1).norm(dim=1, p=torch.inf if norm == "linf" else 2)
        assert size <= eps + 1e-6
        assert asked.min() >= 0
        assert asked.max() <= 1


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.5)])
def test_square_draws_belong_to_the_image(norm: str, eps: float) -> None:
    model, x = Linear(3), some_images(7)
    y = model(x).argmax(1)
    attack = attacks.create("square", norm=norm, eps=eps, queries=60)
    index = torch.arange(100, 107)
    together = attack(model, x, y, index=index, seed=4)
    apart = torch.cat([attack(model, x[i : i + 1], y[i : i + 1], index=index[i : i + 1], seed=4) for i in range(7)])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    assert not torch.equal(together, attack(model, x, y, index=index, seed=5))
    assert not torch.equal(together, attack(model, x, y, seed=4))


def test_square_linf_comes_near_the_optimum_of_a_linear_model_and_never_beyond() -> None:
    model, x = Linear(), some_images(10)
    y = model(x).argmax(1)
    w = (model.w[1 - y] - model.w[y]).reshape_as(x)
    for eps in (0.02, 0.05):
        best = (x + eps * w.sign()).clamp(0, 1)
        reachable, start = margin(model(best), y), margin(model(x), y)
        result = attacks.create("square", eps=eps, queries=500).run(model, x, y)
        reached = margin(model(result.images), y)
        assert (reached <= reachable + 1e-5).all()
        active = ~result.success
        assert active.any()
        share = ((reached - start) / (reachable - start))[active]
        assert share.min() > 0.9, share


def test_square_l2_spends_the_ball_and_raises_the_margin_far_beyond_its_start() -> None:
    model, x = Linear(), some_images(10, 0.3, 0.7)
    y = model(x).argmax(1)
    eps = 0.2  # never at the box, so that the optimum is along w
    result = attacks.create("square", norm="l2", eps=eps, queries=500).run(model, x, y)
    active = ~result.success
    assert active.sum() >= 5
    delta = (result.images - x).flatten(1)
    torch.testing.assert_close(delta.norm(dim=1), torch.full((10,), eps), atol=1e-4, rtol=0)
    w = model.w[1 - y] - model.w[y]
    cosine = (delta * w).sum(1) / delta.norm(dim=1) / w.norm(dim=1)
    assert cosine[active].min() > 0.4, cosine  # where it starts: 0.0 to 0.2; four seeds end at 0.50 to 0.54
    assert cosine.max() <= 1 + 1e-5


def test_square_windows_stay_in_the_image_and_shrink_by_the_papers_schedule() -> None:
    attack = Square(eps=0.1, queries=10_000)
    limits = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    for halvings, limit in enumerate(limits):
        assert attack._share(limit) == 0.8 / 2**halvings
        assert attack._share(limit + 1) == 0.8 / 2 ** (halvings + 1)
    x = torch.full((300, 3, 5, 4), 0.5)
    context = whole_context(None, x, torch.zeros(300, dtype=torch.int64))
    for share in (0.8, 0.3, 0.01):
        painted = attack._paint_linf(context, x, 3, share) != x
        side = max(1, min(round(math.sqrt(share * 20)), 4))
        assert (painted.flatten(1).sum(1) == 3 * side * side).all()
        # Every place is met, the last row and column too.
        assert painted.any(0).all()


def test_pyramids_have_norm_one_and_two_opposite_halves() -> None:
    for side in (1, 2, 3, 5, 9):
        both = pyramids(side, torch.device("cpu"))
        torch.testing.assert_close(both.flatten(1).norm(dim=1), torch.ones(2))
        torch.testing.assert_close(both[0], both[1].T)
    five = pyramids(5, torch.device("cpu"))[0]
    assert (five[:2] > 0).all()
    assert (five[2:] <= 0).all()
    # Heights 1 + 1/4 + 1/9 at the center of the lower half, 1/4 + 1/9 beside it.
    torch.testing.assert_close(five[3, 2] / five[3, 1], torch.tensor((1 + 1 / 4 + 1 / 9) / (1 / 4 + 1 / 9)))


def test_square_targeted_and_tiny_images() -> None:
    model, x = Linear(4), some_images(8)
    y = model(x).argmax(1)
    result = attacks.create("square", eps=0.5, queries=300).run(model, x, y, targets=(y + 1) % 4)
    assert (model(result.images).argmax(1) == (y + 1) % 4).sum() >= 6
    speck = torch.rand(2, 1, 1, 2)
    for norm in ("linf", "l2"):
        out = attacks.create("square", norm=norm, eps=0.1, queries=20)(
            lambda z: z.flatten(1) - 5.0 * torch.tensor([0, 1]), speck, torch.zeros(2, dtype=torch.int64)
        )
        assert out.shape == speck.shape
    with pytest.raises(ValueError, match="maximizes the margin"):
        attacks.create("square", eps=0.1, loss="cross_entropy")


# RayS -----------------------------------------------------------------------------------------------------------------


def test_rays_finds_the_least_linf_distance_of_a_linear_model_from_decisions_alone() -> None:
    model, x = Linear(), some_images(12, 0.4, 0.6)
    y = model(x).argmax(1)
    w = model.w[1 - y] - model.w[y]
    least = -margin(model(x), y) / w.abs().sum(1)
    near = least < 0.35  # beyond, the box is in the way
    assert near.sum() >= 8

    def decisions(images: Tensor) -> Tensor:
        return nn.functional.one_hot(model(images).argmax(1), 2).float()

    result = attacks.create("rays", queries=1200, tolerance=1e-4).run(decisions, x, y)
    size = (result.images - x).flatten(1).abs().amax(1)
    assert result.success.all()
    assert (size >= least - 1e-5)[near].all()
    torch.testing.assert_close(size[near], least[near], rtol=0.03, atol=2e-4)
    assert (result.queries == 1200).all()


def test_rays_stops_at_its_budget_and_returns_the_original_where_it_failed() -> None:
    model, x = Linear(), some_images(12, 0.4, 0.6)
    y = model(x).argmax(1)
    w = model.w[1 - y] - model.w[y]
    least = -margin(model(x), y) / w.abs().sum(1)
    eps = float(least.median()) * 1.2
    y = torch.cat([y[:11], 1 - y[11:]])  # the last one is misclassified as it is
    result = attacks.create("rays", queries=1500, eps=eps, tolerance=1e-4).run(model, x, y)
    size = (result.images - x).flatten(1).abs().amax(1)
    assert (size <= eps + 1e-6).all()
    assert (size[~result.success] == 0).all()
    assert result.success[least < eps / 1.1].all()
    assert not result.success[:11][least[:11] > eps].any()
    assert result.queries[11] == 1
    assert (result.queries[:11][result.success[:11]] < 1500).all()
    assert (result.queries[~result.success] == 1500).all()


def test_rays_counts_what_the_model_was_asked_and_does_not_depend_on_the_batch() -> None:
    model, x = Linear(3), some_images(9)
    y = model(x).argmax(1)
    attack = attacks.create("rays", queries=200, eps=0.1)
    model.asked.clear()
    together = attack.run(model, x, y)
    assert sum(len(batch) for batch in model.asked[:-2]) == int(together.queries.sum())
    apart = torch.cat([attack(model, x[i : i + 1], y[i : i + 1], index=torch.tensor([i])) for i in range(9)])
    torch.testing.assert_close(together.images, apart, atol=1e-6, rtol=0)


def test_rays_turns_over_every_block_of_every_size() -> None:
    # Nothing fools this model, so the search walks through all its blocks; the corners come in between.
    x = torch.full((1, 1, 2, 3), 0.5)
    asked: list[Tensor] = []

    def stubborn(images: Tensor) -> Tensor:
        asked.append(images.clone())
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    result = attacks.create("rays", queries=40).run(stubborn, x, torch.zeros(1, dtype=torch.int64))
    assert torch.equal(result.images, x)
    rays = {tuple((batch > 0.5).flatten().int().tolist()) for batch in asked[1:]}
    blocks = [(0, 0), (0, 6), (0, 3), (3, 6), (0, 2), (2, 4), (4, 6)] + [(i, i + 1) for i in range(6)]
    assert rays >= {tuple(0 if begin <= i < end else 1 for i in range(6)) for begin, end in blocks}


def test_rays_is_registered_and_checks_its_settings() -> None:
    assert unperturb.attacks.rays.RayS(eps="8/255").eps == 8 / 255
    with pytest.raises(ValueError, match="tolerance"):
        attacks.create("rays", tolerance=0.0)
