"""What each attacker sees, and that the adapters give back what rounding, randomness and steps hide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unperturb import threats
from unperturb.attacks import create_attack
from unperturb.defenses import Defense
from unperturb.registry import UnknownNameError


class Halve(Defense):
    def purify(self, images: Tensor) -> Tensor:
        return images / 2


class Steps(Defense):
    """To five levels: no gradient."""

    differentiable = False

    def purify(self, images: Tensor) -> Tensor:
        return (images * 4).round() / 4


class Noisy(Defense):
    random = True

    def purify(self, images: Tensor) -> Tensor:
        return images + torch.randn_like(images)


@pytest.fixture
def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()


IMAGES = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1])


def gradient(model: nn.Module, x: Tensor, row: int = 0) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x)[:, row].sum(), x)[0]


def test_oblivious_and_none_see_the_bare_classifier(linear: nn.Module) -> None:
    assert threats.target(linear, Halve(), "oblivious") is linear
    assert threats.target(linear, Halve(), "none") is linear


def test_white_box_gradient_goes_through_the_purifier(linear: nn.Module) -> None:
    weight = linear[1].weight[0].reshape(1, 1, 4, 4)  # type: ignore[index]
    torch.testing.assert_close(
        gradient(threats.target(linear, Halve(), "white_box"), IMAGES), (weight / 2).expand_as(IMAGES)
    )


def test_bpda_answers_exactly_and_differentiates_the_stand_in(linear: nn.Module) -> None:
    weight = linear[1].weight[0].reshape(1, 1, 4, 4)  # type: ignore[index]
    seen = threats.target(linear, Halve(), "bpda")
    assert torch.equal(seen(IMAGES), linear(IMAGES / 2))
    torch.testing.assert_close(gradient(seen, IMAGES), weight.expand_as(IMAGES))
    thrice = threats.target(linear, Halve(), "bpda", surrogate_backward=lambda x: 3 * x)
    torch.testing.assert_close(gradient(thrice, IMAGES), (3 * weight).expand_as(IMAGES))


def test_rounding_hides_the_gradient_and_the_adapter_gives_it_back(linear: nn.Module) -> None:
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = linear((x * 255).round() / 255)
            return out

    attack = create_attack("pgd", eps=0.2, steps=5, random_start=False)
    hidden = attack.run(Rounded(), IMAGES, LABELS)
    assert int(hidden.zero_gradients.min()) == 5
    assert torch.equal(hidden.images, IMAGES)
    adapted = nn.Sequential(threats.rounding(), linear)
    assert torch.equal(adapted(IMAGES), Rounded()(IMAGES))
    found = attack.run(adapted, IMAGES, LABELS)
    assert int(found.zero_gradients.max()) == 0
    before = nn.functional.cross_entropy(linear(IMAGES), LABELS, reduction="none")
    assert bool((nn.functional.cross_entropy(linear(found.images), LABELS, reduction="none") > before).all())


def test_a_white_box_attacker_of_a_step_function_gets_the_stand_in(linear: nn.Module) -> None:
    assert float(gradient(threats.target(linear, Steps(), "white_box"), IMAGES).abs().max()) > 0


def test_a_random_defense_is_averaged(linear: nn.Module) -> None:
    one = threats.target(linear, Noisy(), "white_box", eot_samples=1)
    many = threats.target(linear, Noisy(), "white_box", eot_samples=400)
    exact = linear(IMAGES)
    assert float((many(IMAGES) - exact).abs().mean()) < float((one(IMAGES) - exact).abs().mean()) / 4


def test_eot_with_a_seed_repeats_itself_and_leaves_the_generator_alone(linear: nn.Module) -> None:
    fixed = threats.EOT(threats.Protected(linear, Noisy()), eot_samples=3, seed=7)
    before = torch.random.get_rng_state()
    assert torch.equal(fixed(IMAGES), fixed(IMAGES))
    assert torch.equal(before, torch.random.get_rng_state())
    fresh = threats.EOT(threats.Protected(linear, Noisy()), eot_samples=3)
    assert not torch.equal(fresh(IMAGES), fresh(IMAGES))
    with pytest.raises(ValueError, match="at least one draw"):
        threats.EOT(linear, eot_samples=0)


def test_black_box_gives_answers_only(linear: nn.Module) -> None:
    seen = threats.target(linear, Halve(), "black_box")
    assert torch.equal(seen(IMAGES), linear(IMAGES / 2))
    assert not seen(IMAGES.clone().requires_grad_()).requires_grad


def test_transfer_needs_a_surrogate_and_unknown_knowledge_is_named(linear: nn.Module) -> None:
    other = nn.Identity()
    assert threats.target(linear, Halve(), "transfer", other) is other
    with pytest.raises(ValueError, match="surrogate"):
        threats.target(linear, Halve(), "transfer")
    with pytest.raises(UnknownNameError, match="white_box"):
        threats.target(linear, Halve(), "whitebox")
