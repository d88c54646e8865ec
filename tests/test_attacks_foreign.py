"""Attacks of torchattacks, foolbox and ART, wrapped: made on the model that is attacked, and judged like ours."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unperturb
from unperturb.attacks import create_attack, wrap_attack
from unperturb.attacks.context import NoGradientError

CLASSES, EPS = 4, 0.1


class Linear(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(CLASSES, 64, generator=generator) * 0.3)
        self.bias = nn.Parameter(-self.weight.detach().sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def some_images(n: int = 8) -> Tensor:
    return 0.2 + 0.6 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def torchattacks() -> Any:
    return pytest.importorskip("torchattacks", reason="the library whose attacks are wrapped is not installed")


def foolbox() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a name that scipy deprecates
        return pytest.importorskip("foolbox", reason="the library whose attacks are wrapped is not installed")


def art() -> Any:
    return pytest.importorskip("art.attacks.evasion", reason="the library whose attacks are wrapped is not installed")


def art_classifier(model: nn.Module) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), CLASSES, clip_values=(0.0, 1.0), device_type="cpu"
    )


def their_pgd(library: str, **settings: Any) -> Any:
    """PGD of `library` with these settings (eps, alpha, steps), without a random start, made for another model."""
    eps, alpha, steps = settings["eps"], settings["alpha"], settings["steps"]
    if library == "torchattacks":
        theirs = torchattacks().PGD(Linear(9), eps=eps, alpha=alpha, steps=steps, random_start=False)
        return wrap_attack(theirs, eps=eps)
    if library == "foolbox":
        theirs = foolbox().attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=False)
        return wrap_attack(theirs, eps=eps)
    kind = art().ProjectedGradientDescent
    options = {"eps": eps, "eps_step": alpha, "max_iter": steps, "verbose": False}
    return wrap_attack(lambda model: kind(art_classifier(model), **options), eps=eps, name="PGD of ART")


every_library = pytest.mark.parametrize("library", ["torchattacks", "foolbox", "art"])


@every_library
def test_their_pgd_is_ours(library: str) -> None:
    # On a linear model every path of enough steps ends at the same corner of the ball.
    model, images = Linear(), some_images()
    labels = model(images).argmax(1)
    attack = their_pgd(library, eps=EPS, alpha=0.05, steps=6)
    result = attack.run(model, images, labels)
    ours = create_attack("pgd", eps=EPS, alpha=0.05, steps=6, random_start=False).run(model, images, labels)
    same = (result.images - ours.images).abs().flatten(1).amax(1) < 1e-5
    assert float(same.float().mean()) >= 0.75
    assert torch.equal(result.success, model(result.images).argmax(1) != labels)
    assert bool(result.success.any())
    assert result.backwards >= 6
    assert result.forwards >= 6
    assert int(result.gradients.min()) >= 6
    assert int(result.zero_gradients.sum()) == 0
    assert attack.holds_own
    assert "PGD" in repr(attack) or "ProjectedGradient" in repr(attack)


@every_library
def test_targets(library: str) -> None:
    model, images = Linear(), some_images()
    labels = model(images).argmax(1)
    targets = (labels + 1) % CLASSES
    attack = their_pgd(library, eps=0.2, alpha=0.1, steps=6)
    result = attack.run(model, images, labels, targets=targets)
    assert torch.equal(result.success, model(result.images).argmax(1) == targets)
    assert float(result.success.float().mean()) > 0.5


@every_library
def test_the_model_and_the_generators_are_left_as_they_were(library: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Dropout(0.5), Linear()).train()
    model[0].eval()
    images = some_images()
    labels = torch.zeros(8, dtype=torch.int64)
    attack = their_pgd(library, eps=EPS, alpha=0.05, steps=2)
    capfd.readouterr()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    attack(model, images, labels)
    assert [m.training for m in model.modules()] == [True, False, True]
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert python_state == random.getstate()
    assert capfd.readouterr().out == ""


@every_library
def test_a_model_without_a_gradient_is_no_robust_one(library: str) -> None:
    model, images = Linear(), some_images()
    labels = model(images).argmax(1)
    with pytest.raises(NoGradientError, match="by queries"):
        their_pgd(library, eps=EPS, alpha=0.05, steps=2)(lambda x: model(x.detach()).detach(), images, labels)


@pytest.mark.parametrize("given", ["object", "class", "function"])
def test_their_object_is_made_anew_for_each_model(given: str) -> None:
    library = torchattacks()
    other = Linear(9)
    theirs = {
        "object": library.FGSM(other, eps=8 / 255),
        "class": library.FGSM,
        "function": lambda model: library.FGSM(model, eps=8 / 255),
    }[given]
    attack = wrap_attack(theirs, eps="8/255")
    images = some_images()
    for seed in (0, 1):
        model = Linear(seed)
        labels = model(images).argmax(1)
        expected = create_attack("fgsm", eps="8/255")(model, images, labels)
        torch.testing.assert_close(attack(model, images, labels), expected, rtol=0, atol=1e-6)
    if given == "object":
        assert theirs.model is other
        assert theirs.get_mode() == "default"
        assert "FGSM(eps=0.0313725" in repr(attack)
    else:
        assert f"name='{'FGSM' if given == 'class' else '<lambda>'}'" in repr(attack)


def test_a_cascade_of_theirs_attacks_the_one_model() -> None:
    theirs = torchattacks().AutoAttack(Linear(9), eps=EPS, n_classes=CLASSES)
    model, images = Linear(), some_images()
    labels = model(images).argmax(1)
    result = wrap_attack(theirs, eps=EPS).run(model, images, labels)
    ours = create_attack("autoattack", eps=EPS, queries=100).run(model, images, labels)
    assert abs(int(result.success.sum()) - int(ours.success.sum())) <= 1


def test_a_success_of_theirs_without_a_budget_is_judged_and_a_failure_is_the_original() -> None:
    kind = foolbox().attacks.L2CarliniWagnerAttack

    class Stubborn(nn.Module):
        """Class 0 wherever there is any light at all."""

        def forward(self, x: Tensor) -> Tensor:
            light = x.mean((1, 2, 3))
            return torch.stack([1 + 0 * light, 0.1 * light], 1)

    images, labels = some_images(3), torch.zeros(3, dtype=torch.int64)
    attack = wrap_attack(kind(2, 5, 0.01), eps=None, norm="l2")
    result = attack.run(Stubborn(), images, labels)
    assert torch.equal(result.images, images)
    assert not bool(result.success.any())
    model = Linear()
    found = wrap_attack(kind(4, 60, 0.05), eps=None, norm="l2").run(model, images, model(images).argmax(1))
    assert bool(found.success.all())
    with pytest.raises(ValueError, match="has no budget: it seeks the nearest point"):
        attack.for_random_model()


@pytest.mark.parametrize(
    ("norm", "eps", "make"),
    [
        ("l2", 0.4, lambda: foolbox().attacks.LinfPGD(steps=5)),  # which cuts to the budget by its own norm
        ("linf", 0.05, lambda: torchattacks().PGD(Linear(), eps=0.3, alpha=0.2, steps=3)),
        ("l2", 0.4, lambda: torchattacks().PGD(Linear(), eps=0.3, alpha=0.2, steps=3)),
    ],
)
def test_an_answer_outside_its_ball_is_an_error(norm: Any, eps: float, make: Callable[[], Any]) -> None:
    model, images = Linear(), some_images()
    labels = model(images).argmax(1)
    attack = wrap_attack(make(), eps=eps, norm=norm)
    with pytest.raises(ValueError, match=rf"left its ball: 8 of 8 answers lie farther than {norm} {eps} from"):
        attack(model, images, labels)


@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_draws_follow_the_seed(library: str) -> None:
    model, images = Linear(), some_images()
    labels = model(images).argmax(1)
    theirs = (
        torchattacks().PGD(model, eps=EPS, alpha=1e-3, steps=2)
        if library == "torchattacks"
        else foolbox().attacks.LinfPGD(abs_stepsize=1e-3, steps=2)
    )
    attack = wrap_attack(theirs, eps=EPS)
    first = attack(model, images, labels, seed=3)
    torch.rand(5)
    assert torch.equal(first, attack(model, images, labels, seed=3))
    assert not torch.equal(first, attack(model, images, labels, seed=4))
    assert not torch.equal(first, attack(model, images, labels, seed=3, index=torch.arange(8) + 8))


def test_an_attack_by_queries_needs_no_gradient() -> None:
    theirs = torchattacks().Square(Linear(9), eps=EPS, n_queries=200)
    attack = wrap_attack(theirs, eps=EPS, needs_gradient=False)
    model, images = Linear(), some_images()
    labels = model(images).argmax(1)
    result = attack.run(lambda x: model(x).detach(), images, labels)
    assert bool(result.success.any())
    assert result.backwards == 0
    assert not attack.needs_gradient
    assert wrap_attack(theirs, eps=EPS).needs_gradient


def test_an_answer_may_be_rounded_and_takes_no_mask() -> None:
    model, images = Linear(), (some_images() * 255).round() / 255
    labels = model(images).argmax(1)
    attack = their_pgd("torchattacks", eps=EPS, alpha=0.05, steps=4)
    x = attack(model, images, labels, quantize=True, start=images)
    assert torch.equal(x, (x * 255).round() / 255)
    assert float((x - images).abs().max()) <= EPS + 1e-6
    with pytest.raises(ValueError, match="cannot keep pixels"):
        attack(model, images, labels, mask=torch.ones(8, 8))


def test_what_cannot_be_wrapped() -> None:
    assert unperturb.wrap_attack is wrap_attack
    with pytest.raises(TypeError, match="a function that makes one of theirs or ART's from a model, was expected, not"):
        wrap_attack("pgd", eps=EPS)
    with pytest.raises(ValueError, match="a budget is"):
        wrap_attack(lambda model: model, eps="much")
    with pytest.raises(ValueError, match="norm must be"):
        wrap_attack(lambda model: model, eps=None, norm="l7")  # type: ignore[arg-type]
    images, labels = some_images(), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(TypeError, match="made a Linear, no attack of torchattacks, foolbox or ART"):
        wrap_attack(lambda _: Linear(), eps=None, name="mine")(Linear(), images, labels)


def test_an_attack_of_art_is_asked_for_as_a_function() -> None:
    theirs = art().FastGradientMethod(art_classifier(Linear()), eps=EPS)
    with pytest.raises(ValueError, match=r"give a function that makes it, lambda model: FastGradientMethod\("):
        wrap_attack(theirs, eps=EPS)


def test_normalized_images_are_not_what_is_attacked_here() -> None:
    theirs = torchattacks().FGSM(Linear(), eps=EPS)
    theirs.set_normalization_used(mean=[0.5], std=[0.5])
    with pytest.raises(ValueError, match="expects normalized images"):
        wrap_attack(theirs, eps=EPS)(Linear(), some_images(), torch.zeros(8, dtype=torch.int64))
