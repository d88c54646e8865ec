"""HopSkipJump: what it asks, the optimum of a linear model from decisions alone, and foolbox's at equal queries."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from digit_nets import digit_net, known
from unperturb.attacks import create_attack


class Decisions(nn.Module):
    """A model that tells its class alone, and counts what it is asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        logits = self.model(x)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        lead = ((x.flatten(1) - 0.5)[:, None] * self.w).sum((1, 2))
        return torch.stack([lead, -lead], 1)


def far(x: Tensor, images: Tensor) -> Tensor:
    return (x - images).flatten(1).norm(dim=1)


def grey(n: int) -> Tensor:
    return 0.5 + 0.3 * (torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5)


def test_it_finds_the_least_l2_distance_of_a_linear_model_from_decisions_alone() -> None:
    model, images = Linear(), grey(8)
    logits = model(images)
    least = (logits[:, 0].abs() / model.w.norm()).detach()
    seen = Decisions(model)
    last = torch.full((8,), torch.inf)
    for queries in (400, 2500):
        result = create_attack("hop_skip_jump", queries=queries).run(seen, images, logits.argmax(1))
        now = far(result.images, images)
        assert bool(result.success.all())
        assert bool((now >= least - 1e-5).all())
        assert bool((now <= last + 1e-6).all())  # it walks on from where fewer queries ended
        last = now
    assert float((last / least).median()) < 1.1


def test_it_counts_what_it_asks_and_never_asks_more() -> None:
    model, (images, labels) = digit_net(), known(12)
    labels = torch.cat([(labels[:1] + 1) % 10, labels[1:]])
    for queries in (1, 5, 30, 400):
        seen = Decisions(model)
        result = create_attack("hop_skip_jump", queries=queries, evaluations=20).run(seen, images, labels)
        assert sum(len(x) for x in seen.asked[:-2]) == int(result.queries.sum())
        assert int(result.queries.max()) <= queries
        assert int(result.queries[0]) == 1  # it is of another class as it is
        assert torch.equal(result.images[0], images[0])
        assert torch.equal(result.images[~result.success], images[~result.success])
        asked = torch.cat(seen.asked[:-2])
        assert float(asked.min()) >= 0
        assert float(asked.max()) <= 1
    assert int(result.queries.max()) > 0.8 * queries


def test_it_begins_at_a_start_of_another_class() -> None:
    model, (images, labels) = digit_net(), known(12)
    start = images.roll(1, 0)
    usable = model(start).argmax(1) != labels
    assert bool(usable.any())
    seen = Decisions(model)
    result = create_attack("hop_skip_jump", queries=20).run(seen, images, labels, start=start)
    assert torch.equal(seen.asked[1], start)
    assert bool(result.success[usable].all())
    assert bool((far(result.images, images) < far(start, images))[usable].all())
    # Towards a class: random images seldom are of it, an image of it is.
    targets = torch.where(usable, labels.roll(1, 0), (labels + 1) % 10)
    result = create_attack("hop_skip_jump", queries=300).run(model, images, labels, targets=targets, start=start)
    assert torch.equal(model(result.images).argmax(1) == targets, result.success)
    assert bool(result.success[usable].all())
    assert float((far(result.images, images) / far(start, images))[usable].mean()) < 0.8


def test_it_is_no_farther_than_foolbox_at_equal_queries() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a name that scipy deprecates
        foolbox = pytest.importorskip("foolbox", reason="the oracle foolbox is not installed")
    (images, labels), seen = known(16), Decisions(digit_net())
    wrapped = foolbox.PyTorchModel(seen.eval(), (0, 1), device="cpu")
    torch.manual_seed(0)
    theirs = foolbox.attacks.HopSkipJumpAttack(steps=6).run(wrapped, images, foolbox.criteria.Misclassification(labels))
    queries = sum(len(x) for x in seen.asked) // len(images)
    result = create_attack("hop_skip_jump", queries=queries).run(digit_net(), images, labels)
    assert bool(result.success.all())
    assert float(far(result.images, images).mean()) <= 1.1 * float(far(theirs, images).mean())


def test_nothing_else_is_said_than_the_class_so_logits_make_no_difference() -> None:
    model, (images, labels) = digit_net(), known(8)
    attack = create_attack("hop_skip_jump", queries=200, evaluations=20)
    assert torch.equal(attack(model, images, labels), attack(Decisions(model), images, labels))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"queries": 0}, "queries and evaluations"), ({"evaluations": 0}, "evaluations"), ({"gamma": 0.0}, "gamma")],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_attack("hop_skip_jump", **options)
