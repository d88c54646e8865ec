"""Denoisers guided by the classifier: losses against numbers by hand, what they start as, and that noise is noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unperturb.defenses import Batch, create_defense, denoised_smoothing, hgd
from unperturb.defenses.denoised_smoothing import DenoisedSmoothing
from unperturb.defenses.hgd import HGD

SMALL = {"width": 4}


def guided(**options: Any) -> HGD:
    defense = create_defense("hgd", channels=1, denoiser=SMALL, **options)
    assert isinstance(defense, HGD)
    return defense


def smoothing(**options: Any) -> DenoisedSmoothing:
    defense = create_defense("denoised_smoothing", channels=1, denoiser=SMALL, **options)
    assert isinstance(defense, DenoisedSmoothing)
    return defense


class Sums(nn.Module):
    """Logits: the sum over each image, and twice that."""

    def forward(self, images: Tensor) -> Tensor:
        total = images.flatten(1).sum(1, keepdim=True)
        return torch.cat([total, 2 * total], 1)


def batch(n: int = 4) -> Batch:
    x_real = torch.rand(n, 1, 8, 8)
    x_adv = (x_real + 0.2 * torch.randn_like(x_real)).clamp(0, 1)
    return Batch(x_real, x_adv, torch.zeros(n, dtype=torch.int64), Sums())


# HGD -----------------------------------------------------------------------------------------------------------------


def test_the_guide_is_the_mean_distance_of_logits() -> None:
    a, b = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.5, -0.5]])
    assert float(hgd.guide(a, b)) == pytest.approx((1 + 2 + 0.5 + 0.5) / 4)


def test_hgd_starts_as_the_identity_and_its_loss_is_that_of_the_bare_classifier() -> None:
    defense, given = guided(clean_share=0.5), batch()
    torch.testing.assert_close(defense.purify(given.x_adv), given.x_adv)
    ((network, terms),) = defense.losses(given, defense.networks())
    far = (given.x_adv - given.x_real).flatten(1).sum(1).abs()  # 1 and 2 times this are the two logits' distances
    # Four attacked images and two clean ones, the latter at no distance yet.
    assert network == "denoiser"
    assert float(terms["guide"].detach()) == pytest.approx(float((3 * far).sum()) / (6 * 2), rel=1e-5)
    ((_, alone),) = guided(clean_share=0.0).losses(given, guided().networks())
    assert float(alone["guide"].detach()) == pytest.approx(float((3 * far).sum()) / (4 * 2), rel=1e-5)


def test_hgd_looks_at_logits_alone() -> None:
    # What the classifier does not see is not repaired: images that differ where logits agree cost nothing.
    given = batch()
    swapped = Batch(given.x_real, given.x_real.flip(2), given.y, Sums())
    defense = guided()
    ((_, terms),) = defense.losses(swapped, defense.networks())
    assert float(terms["guide"].detach()) == pytest.approx(0, abs=1e-5)


def test_hgd_learns_what_a_constant_shift_hides() -> None:
    defense, given = guided(), batch(16)
    shifted = Batch(given.x_real * 0.8, given.x_real * 0.8 + 0.1, given.y, Sums())
    optimizer = torch.optim.Adam(defense.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        ((_, terms),) = defense.losses(shifted, defense.networks())
        optimizer.zero_grad()
        terms["guide"].backward()
        optimizer.step()
        losses.append(float(terms["guide"].detach()))
    # Images shifted by 0.1 over 64 pixels: 6.4 and 12.8 apart, two of three images shifted.
    assert losses[0] == pytest.approx(2 / 3 * (6.4 + 12.8) / 2, rel=1e-4)
    assert losses[-1] < losses[0] / 4


# Denoised smoothing --------------------------------------------------------------------------------------------------


def test_stability_asks_the_classifier_not_the_label() -> None:
    # Clean predictions 0 and 1; denoised ones 3/4 for 0, and 1/2: -(log 3/4 + log 1/2) / 2.
    clean = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    denoised = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    expected = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    assert float(denoised_smoothing.stability(denoised, clean)) == pytest.approx(expected)


def test_its_losses_are_of_its_own_noise() -> None:
    defense, given = smoothing(sigma=0.3, weights={"stability": 2.0, "mse": 5.0}), batch()
    torch.manual_seed(3)
    ((network, terms),) = defense.losses(given, defense.networks())
    torch.manual_seed(3)
    noisy = given.x_real + 0.3 * torch.randn_like(given.x_real)
    out = noisy.clamp(0, 1)  # the denoiser starts as the identity, cut to the range of images
    assert network == "denoiser"
    assert float(terms["mse"].detach()) == pytest.approx(5 * float((out - given.x_real).square().mean()), rel=1e-4)
    clean = Sums()(given.x_real).argmax(1)
    expected = nn.functional.cross_entropy(Sums()(out), clean)
    assert float(terms["stability"].detach()) == pytest.approx(2 * float(expected), rel=1e-4, abs=1e-7)
    # The attacked images are not looked at, and a weight of 0 leaves its loss out.
    torch.manual_seed(3)
    blind = Batch(given.x_real, torch.full_like(given.x_adv, float("nan")), given.y, Sums())
    ((_, same),) = defense.losses(blind, defense.networks())
    assert {k: float(v.detach()) for k, v in same.items()} == {k: float(v.detach()) for k, v in terms.items()}
    ((_, alone),) = smoothing().losses(given, smoothing().networks())
    assert set(alone) == {"stability"}


def test_each_call_is_another_draw() -> None:
    defense, x = smoothing(sigma=0.1).eval(), torch.full((200, 1, 8, 8), 0.5)
    assert defense.random
    assert not torch.equal(defense.purify(x), defense.purify(x))
    noise = defense.noisy(x) - x
    assert float(noise.std()) == pytest.approx(0.1, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0, abs=0.003)
    torch.manual_seed(4)
    once = defense.purify(x)
    torch.manual_seed(4)
    assert torch.equal(defense.purify(x), once)


def test_options_that_make_no_denoiser() -> None:
    with pytest.raises(ValueError, match=r"clean_share must be in \[0, 1\]"):
        guided(clean_share=1.5)
    with pytest.raises(ValueError, match="sigma must be above 0"):
        smoothing(sigma=0.0)
    with pytest.raises(ValueError, match="weights are of 'stability' and 'mse'"):
        smoothing(weights={"pixel": 1.0})
