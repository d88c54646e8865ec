"""Sparse-RS: what it paints, what it asks, the optimum of a linear model, and SparseFool, which sees gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from digit_nets import digit_net, known
from unperturb.attacks import create_attack
from unperturb.attacks.losses import margin
from unperturb.attacks.sparse_rs import SparseRS


class Recording(nn.Module):
    """A model that keeps what it was asked."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.asked = model, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        answer: Tensor = self.model(x)
        return answer


def places(x: Tensor, images: Tensor) -> Tensor:
    return (x != images).any(1).flatten(1).sum(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_that_is_asked_differs_at_so_many_places_each_all_the_way(channels: int) -> None:
    images = 0.1 + 0.8 * torch.rand(1, channels, 5, 6)
    stubborn = Recording(lambda x: torch.stack([x.flatten(1).sum(1) * 0 + 1, x.mean((1, 2, 3)) / 9], 1))
    x = create_attack("sparse_rs", pixels=7, queries=120)(stubborn, images, torch.zeros(1, dtype=torch.int64))
    asked = torch.cat(stubborn.asked)
    assert len(asked) == 120
    assert places(asked, images).tolist() == [7] * 120
    changed = asked != images
    assert bool(((asked == 0) | (asked == 1))[changed].all())
    assert bool(changed.any(1).any(0).all())  # every place is tried
    assert bool((x == asked).flatten(1).all(1).any())
    # Later queries exchange fewer places of the held image.
    assert len({tuple(row.flatten().tolist()) for row in changed.any(1)}) > 50


def test_it_comes_near_the_optimum_of_a_linear_model() -> None:
    w = torch.randn(64, generator=torch.Generator().manual_seed(0))
    images, labels = torch.rand(12, 1, 8, 8), torch.zeros(12, dtype=torch.int64)

    def model(x: Tensor) -> Tensor:
        lead = 100 + (x.flatten(1) * w).sum(1)  # nothing falls, so that all of them stay to the end
        return torch.stack([lead, -lead], 1)

    flat = images.flatten(1)
    gain = (w.abs() * torch.where(w < 0, 1 - flat, flat)).sort(dim=1, descending=True).values
    for pixels in (1, 4, 16):
        found = create_attack("sparse_rs", pixels=pixels, queries=1500)(model, images, labels)
        gained = margin(model(found), labels) - margin(model(images), labels)
        best = 2 * gain[:, :pixels].sum(1)
        assert bool((gained <= best + 1e-3).all())
        assert float((gained / best).min()) > 0.9
        assert int(places(found, images).max()) <= pixels


def test_it_counts_what_it_asks_and_asks_no_more_after_a_success() -> None:
    (images, labels), model = known(24), Recording(digit_net())
    result = create_attack("sparse_rs", pixels=8, queries=150).run(model, images, labels)
    asked = model.asked[:-2]
    assert sum(len(x) for x in asked) == int(result.queries.sum())
    assert 2 <= int(result.success.sum()) <= 22
    assert (result.queries[~result.success] == 150).all()
    assert [len(x) for x in asked] == [int((result.queries >= q).sum()) for q in range(1, len(asked) + 1)]
    full = create_attack("sparse_rs", pixels=8, queries=150, first_success=False).run(digit_net(), images, labels)
    assert bool((full.queries == 148).all())  # one, and then three at a time


def test_where_answers_are_draws_the_held_image_is_asked_again() -> None:
    (images, labels), generator = known(24), torch.Generator().manual_seed(0)

    def drawn(x: Tensor) -> Tensor:
        return digit_net()(x) + torch.randn(len(x), 10, generator=generator)

    def falls_again(attack: SparseRS) -> float:
        x = attack(drawn, images, labels)
        return float(torch.stack([drawn(x).argmax(1) != labels for _ in range(40)]).float().mean())

    attack = SparseRS(pixels=12, queries=400)
    assert falls_again(attack.for_random_model()) > falls_again(attack) + 0.1


def test_more_pixels_fell_more_and_nearly_as_many_as_by_gradients() -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="the oracle torchattacks is not installed")
    model, (images, labels) = digit_net(), known(24)
    fell = [
        int(create_attack("sparse_rs", pixels=k, queries=600).run(model, images, labels).success.sum())
        for k in (1, 5, 20, 256)
    ]
    assert fell == sorted(fell)
    assert fell[0] < 12 < 24 == fell[-1]
    theirs = torchattacks.SparseFool(model, steps=20, lam=3, overshoot=0.02)(images, labels)
    few = (model(theirs).argmax(1) != labels) & (((theirs - images).abs() > 1e-6).any(1).flatten(1).sum(1) <= 5)
    assert fell[1] >= int(few.sum())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"pixels": 0}, "pixels and queries"), ({"queries": 0}, "queries"), ({"alpha": 0.0}, "alpha must lie in")],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_attack("sparse_rs", **options)
