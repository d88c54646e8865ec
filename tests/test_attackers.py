"""What each attacker sees, and that the adapters give back what rounding, randomness and steps hide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unperturb.attackers import BPDA, EOT, Attacker, label_of, rounding
from unperturb.attacks import Attack, attacks, create_attack
from unperturb.defenses import Defense, Protected, create_defense
from unperturb.registry import UnknownNameError
from unperturb.systems import System
from unperturb.threat_models import KNOWLEDGE


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
        return images + 0.05 * torch.randn_like(images)  # of images well inside [0, 1], where nothing is cut


@pytest.fixture
def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()


ATTACK = create_attack("square", eps=0.1)  # asks by outputs, so that every knowledge will do


def seen_by(
    knowledge: str,
    classifier: nn.Module,
    purifier: Defense | None = None,
    surrogate: nn.Module | None = None,
    **options: object,
) -> nn.Module:
    """What an attacker of `knowledge` is given of a purifier before a classifier."""
    attacker = Attacker(ATTACK, knowledge, **options)  # type: ignore[arg-type]
    return attacker.model_for(System("it", classifier, purifier), surrogate)


IMAGES = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1])


def gradient(model: nn.Module, x: Tensor, row: int = 0) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x)[:, row].sum(), x)[0]


def test_oblivious_and_none_see_the_bare_classifier(linear: nn.Module) -> None:
    assert seen_by("oblivious", linear, Halve()) is linear
    assert seen_by("none", linear, Halve()) is linear


def test_white_box_gradient_goes_through_the_purifier(linear: nn.Module) -> None:
    weight = linear[1].weight[0].reshape(1, 1, 4, 4)  # type: ignore[index]
    torch.testing.assert_close(gradient(seen_by("white_box", linear, Halve()), IMAGES), (weight / 2).expand_as(IMAGES))


def test_bpda_answers_exactly_and_differentiates_the_stand_in(linear: nn.Module) -> None:
    weight = linear[1].weight[0].reshape(1, 1, 4, 4)  # type: ignore[index]
    seen = seen_by("bpda", linear, Halve())
    assert torch.equal(seen(IMAGES), linear(IMAGES / 2))
    torch.testing.assert_close(gradient(seen, IMAGES), weight.expand_as(IMAGES))
    thrice = seen_by("bpda", linear, Halve(), surrogate_backward=lambda x: 3 * x)
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
    adapted = nn.Sequential(rounding(), linear)
    assert torch.equal(adapted(IMAGES), Rounded()(IMAGES))
    found = attack.run(adapted, IMAGES, LABELS)
    assert int(found.zero_gradients.max()) == 0
    before = nn.functional.cross_entropy(linear(IMAGES), LABELS, reduction="none")
    assert bool((nn.functional.cross_entropy(linear(found.images), LABELS, reduction="none") > before).all())


def test_a_white_box_attacker_of_a_step_function_gets_the_stand_in(linear: nn.Module) -> None:
    assert float(gradient(seen_by("white_box", linear, Steps()), IMAGES).abs().max()) > 0


def test_a_random_defense_is_averaged(linear: nn.Module) -> None:
    one = seen_by("white_box", linear, Noisy(), eot_samples=1)
    many = seen_by("white_box", linear, Noisy(), eot_samples=400)
    inside = 0.3 + 0.4 * IMAGES
    with torch.no_grad():
        exact = linear(inside)
        assert float((many(inside) - exact).abs().mean()) < float((one(inside) - exact).abs().mean()) / 4


def test_eot_with_a_seed_repeats_itself_and_leaves_the_generator_alone(linear: nn.Module) -> None:
    fixed = EOT(Protected(linear, Noisy()), eot_samples=3, seed=7)
    before = torch.random.get_rng_state()
    assert torch.equal(fixed(IMAGES), fixed(IMAGES))
    assert torch.equal(before, torch.random.get_rng_state())
    fresh = EOT(Protected(linear, Noisy()), eot_samples=3)
    assert not torch.equal(fresh(IMAGES), fresh(IMAGES))
    with pytest.raises(ValueError, match="at least one draw"):
        EOT(linear, eot_samples=0)


def test_black_box_gives_answers_only(linear: nn.Module) -> None:
    seen = seen_by("black_box", linear, Halve())
    assert torch.equal(seen(IMAGES), linear(IMAGES / 2))
    assert not seen(IMAGES.clone().requires_grad_()).requires_grad


def test_transfer_needs_a_surrogate_and_unknown_knowledge_is_named(linear: nn.Module) -> None:
    other = nn.Identity()
    assert seen_by("transfer", linear, Halve(), other) is other
    with pytest.raises(ValueError, match="surrogate"):
        seen_by("transfer", linear, Halve())
    with pytest.raises(UnknownNameError, match="white_box"):
        seen_by("whitebox", linear, Halve())


def test_a_gray_box_is_the_attackers_own_purifier_before_the_undefended_classifier(linear: nn.Module) -> None:
    weight = linear[1].weight[0].reshape(1, 1, 4, 4)  # type: ignore[index]
    seen = seen_by("gray_box", linear, Steps(), Halve())
    assert torch.equal(seen(IMAGES), linear(IMAGES / 2))
    torch.testing.assert_close(gradient(seen, IMAGES), (weight / 2).expand_as(IMAGES))
    stepped = seen_by("gray_box", linear, Halve(), Steps())  # its owner gets past its steps
    assert float(gradient(stepped, IMAGES).abs().max()) > 0
    assert isinstance(seen_by("gray_box", linear, Halve(), Noisy(), eot_samples=3), EOT)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    whole = seen_by("gray_box", linear, Halve(), Protected(other, Halve()))  # another system
    assert torch.equal(whole(IMAGES), other(IMAGES / 2))
    base = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    replaced = System("robust", linear, base=base)
    assert torch.equal(Attacker(ATTACK, "gray_box").model_for(replaced, Halve())(IMAGES), base(IMAGES / 2))
    with pytest.raises(ValueError, match="needs that surrogate: set surrogate_defense"):
        seen_by("gray_box", linear, Halve())


# What a system is ----------------------------------------------------------------------------------------------------


def test_what_each_attacker_of_each_system_meets(linear: nn.Module) -> None:
    base = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    bare, pure, robust = System("a", base), System("b", base, Steps()), System("c", linear, base=base)
    both = System.of("d", Protected(linear, Halve()), base=base)
    assert [s.undefended for s in (bare, pure, robust, both)] == [True, False, False, False]
    assert all(s.bare is base for s in (bare, pure, robust, both))
    assert [s.differentiable for s in (bare, pure, robust, both)] == [True, False, True, True]
    assert System("e", base, Noisy()).random
    assert not any(s.random for s in (bare, pure, robust, both))
    assert torch.equal(both.model(IMAGES), linear(IMAGES / 2))
    assert bare.model is base
    for system in (bare, pure, robust, both):
        assert Attacker(ATTACK, "oblivious").model_for(system) is base
    assert Attacker(ATTACK, "white_box").model_for(robust) is linear
    assert torch.equal(Attacker(ATTACK, "white_box").model_for(both)(IMAGES), linear(IMAGES / 2))
    same = {s.name: [Attacker(ATTACK, kind).knowledge_of(s) for kind in KNOWLEDGE] for s in (bare, pure, robust)}
    assert list(KNOWLEDGE) == ["none", "transfer", "oblivious", "gray_box", "black_box", "bpda", "white_box"]
    assert same["b"] == list(KNOWLEDGE)
    assert same["a"] == ["none", "transfer", "oblivious", "oblivious", "black_box", "oblivious", "oblivious"]
    assert same["c"] == ["none", "transfer", "oblivious", "gray_box", "black_box", "white_box", "white_box"]


def test_the_identity_as_a_purifier_is_a_defense_by_its_name(linear: nn.Module) -> None:
    assert not System("none", linear, create_defense("identity")).undefended
    assert System("none", linear).undefended


def test_whoever_meets_a_draw_is_not_stopped_by_one(linear: nn.Module) -> None:
    attack = create_attack("apgd", eps=0.1, first_success=True)
    stops = {}
    for kind in ("oblivious", "bpda", "white_box"):
        for name, purifier in (("still", Halve()), ("noisy", Noisy())):
            made = Attacker(attack, kind).attack_for(System(name, linear, purifier))
            stops[kind, name] = made.first_success  # type: ignore[attr-defined]
    assert not stops["bpda", "noisy"]
    assert not stops["white_box", "noisy"]
    assert sum(stops.values()) == 4
    mine = Attacker(attack, "gray_box")
    assert mine.attack_for(System("it", linear, Halve()), Halve()) is attack
    assert not mine.attack_for(System("it", linear, Halve()), Noisy()).first_success  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="a random model's answer is a draw"):
        Attacker(create_attack("deepfool"), "white_box").attack_for(System("it", linear, Noisy()))


def test_an_attacker_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="PGD needs a gradient, and black_box gives none"):
        Attacker(create_attack("pgd", eps=0.1), "black_box")
    with pytest.raises(ValueError, match="at least one pass, not 0"):
        Attacker(ATTACK, "white_box", eot_samples=0)
    for kind in KNOWLEDGE:
        assert Attacker(ATTACK, kind).knowledge == kind
        if kind != "black_box":
            assert Attacker(create_attack("pgd", eps=0.1), kind).knowledge == kind


def test_what_differentiates_in_another_place_says_so() -> None:
    assert "surrogate_backward=None" in repr(BPDA(Halve()))
    assert "surrogate_backward=relu" in repr(BPDA(Halve(), nn.functional.relu))


# Names in tables -----------------------------------------------------------------------------------------------------


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


def test_every_attack_has_a_label() -> None:
    made = []
    for name in attacks:
        make = attacks[name]
        try:
            made.append(make())
        except TypeError:
            made.append(make(eps=0.1))
    labels = [label_of(a) for a in made]
    assert len(set(labels)) == len(labels)
