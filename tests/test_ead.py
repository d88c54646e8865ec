"""The elastic net: its fixed points on a linear model, what it is for, and foolbox's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from digit_nets import digit_net, known
from unperturb.attacks import create_attack
from unperturb.attacks.losses import margin


def length(delta: Tensor, decision: str, beta: float = 0.01) -> Tensor:
    size = delta.flatten(1).abs()
    return size.sum(1) if decision == "l1" else beta * size.sum(1) + size.square().sum(1)


def test_on_a_linear_model_it_is_near_the_least_elastic_net_distance_and_steep_pixels_change() -> None:
    # Least beta |d|_1 + |d|_2^2 with w d = gap is d = sign(w) (t |w| - beta / 2)+ for one t, inside the box.
    w = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor) -> Tensor:
        lead = ((x.flatten(1) - 0.5) * w).sum(1)
        return torch.stack([lead, -lead], 1)

    beta = 0.05
    images = 0.5 + 0.1 * (torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5)
    labels = model(images).argmax(1)
    gap = -margin(model(images), labels) / 2
    low, high = torch.zeros(12), torch.full((12,), 10.0)
    for _ in range(60):
        t = (low + high) / 2
        moved = (t[:, None] * w.abs() - beta / 2).clamp(min=0)
        short = (moved * w.abs()).sum(1) < gap
        low, high = torch.where(short, t, low), torch.where(short, high, t)
    best = length(moved, "elastic_net", beta)
    result = create_attack("ead", beta=beta, steps=300, lr=0.02, search_steps=9).run(model, images, labels)
    ratio = length(result.images - images, "elastic_net", beta) / best
    assert bool(result.success.all())
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.median()) < 1.25  # a threshold that does not shrink with the step is not that least exactly
    changed = (result.images != images).flatten(1)
    steep = w.abs().expand(12, -1)
    assert float(steep[changed].min()) > float(steep[~changed].median())


def test_a_larger_beta_changes_fewer_pixels() -> None:
    model, (images, labels) = digit_net(), known(24)
    changed, sizes = [], []
    for beta in (0.001, 0.01, 0.05):
        x = create_attack("ead", beta=beta, decision="l1", search_steps=5)(model, images, labels)
        changed.append(float((x != images).flatten(1).sum(1).float().mean()))
        sizes.append(float(length(x - images, "l1").mean()))
    assert changed == sorted(changed, reverse=True)
    assert sizes[-1] < sizes[0]
    nearest = create_attack("fmn", norm="l2", steps=100)(model, images, labels)
    assert min(sizes) < 0.7 * float(length(nearest - images, "l1").mean())  # what an L2 attack spends in L1


@pytest.mark.parametrize("decision", ["elastic_net", "l1"])
def test_it_is_no_farther_than_foolbox_at_the_same_steps(decision: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a name that scipy deprecates
        foolbox = pytest.importorskip("foolbox", reason="the oracle foolbox is not installed")
    model, (images, labels) = digit_net(), known(24)
    theirs = foolbox.attacks.EADAttack(
        binary_search_steps=5,
        steps=60,
        initial_stepsize=0.02,
        initial_const=0.1,
        regularization=0.01,
        decision_rule={"elastic_net": "EN", "l1": "L1"}[decision],
        abort_early=False,
    ).run(foolbox.PyTorchModel(model, (0, 1), device="cpu"), images, foolbox.criteria.Misclassification(labels))
    fell = (model(theirs).argmax(1) != labels) & (theirs.flatten(1).amax(1) > 0)  # black images are its failures
    attack = create_attack("ead", search_steps=5, steps=60, lr=0.02, initial_const=0.1, beta=0.01, decision=decision)
    result = attack.run(model, images, labels)
    both = fell & result.success
    assert int(result.success.sum()) >= int(fell.sum())
    assert int(both.sum()) >= 12
    ours, their_far = (length((x - images)[both], decision) for x in (result.images, theirs))
    assert float(ours.mean()) <= 1.005 * float(their_far.mean())
    assert result.backwards == 5 * 60
    assert result.forwards == 2 * 5 * 60


def test_it_keeps_its_confidence() -> None:
    model, (images, labels) = digit_net(), known(12)
    result = create_attack("ead", confidence=2.0, search_steps=5, lr=0.02).run(model, images, labels)
    assert bool(result.success.all())
    assert float(margin(model(result.images), labels).min()) >= 2 - 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decision": "l2"}, "decision must be 'elastic_net' or 'l1', not 'l2'"),
        ({"steps": 0}, "steps and search_steps"),
        ({"beta": -0.1}, "beta and confidence not negative"),
        ({"initial_const": 0.0}, "initial_const must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_attack("ead", **options)
