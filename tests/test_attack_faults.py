"""Faults seen in public attack libraries, each with the case that shows it: theirs fails it, ours does not.

Faults whose cases need no library stand beside the attack they belong to: pixels at exactly 0 or 1, saturated softmax,
zero gradients, few classes, success after rounding (`test_attacks_first_order.py`, `test_attacks_minimal.py`,
`test_autoattack.py`).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unperturb.attacks import create_attack

torchattacks = pytest.importorskip("torchattacks", reason="the library whose faults these are is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports a name that scipy deprecates
    foolbox = pytest.importorskip("foolbox", reason="the library whose faults these are is not installed")
pytest.importorskip("art", reason="the library whose faults these are is not installed")


class Linear(nn.Module):
    """Logits W x + b + shift, of grey 8x8 images."""

    def __init__(self, classes: int = 4, shift: float = 0.0, scale: float = 0.3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 64, generator=generator) * scale)
        self.bias = nn.Parameter(shift - self.weight.detach().sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def some_images(n: int = 8, low: float = 0.3, high: float = 0.7) -> Tensor:
    return low + (high - low) * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def of_foolbox(attack: Any, model: nn.Module, x: Tensor, y: Tensor, **ball: float) -> Tensor:
    wrapped = foolbox.PyTorchModel(model, (0, 1), device="cpu")
    found: Tensor = attack.run(wrapped, x, foolbox.criteria.Misclassification(y), **ball)
    return found


def of_art(model: nn.Module) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 4, clip_values=(0.0, 1.0), device_type="cpu")


# foolbox ------------------------------------------------------------------------------------------------------------


def test_momentum_sums_gradients_not_their_signs() -> None:
    # One pixel's sum of L1-normalized gradients is negative where its sum of signs is 0.
    class Uneven(nn.Module):
        """Away from the start the slope of the first pixel turns and grows, that of the others shrinks."""

        def forward(self, x: Tensor) -> Tensor:
            first, rest = x[:, 0, 0, 0], x.sum((1, 2, 3)) - x[:, 0, 0, 0]
            near = (rest / 63 < 0.5 + 1e-4).float()
            lead = near * (0.1 * first + rest) + (1 - near) * (-first + 0.01 * rest)
            return torch.stack([-lead, lead], 1)

    model = Uneven()
    x, y = torch.full((1, 1, 8, 8), 0.5), torch.zeros(1, dtype=torch.int64)
    # Step 1: g = (0.1, 1, ...) / mean, all signs +. Step 2: g of the first pixel is -1 / mean(|(-1, 0.01, ...)|), far
    # more than 0.1: the sum is negative, the sum of signs 0.
    alpha = 0.05
    expected = torch.full((1, 1, 8, 8), 0.5 + 2 * alpha)
    expected[0, 0, 0, 0] = 0.5
    seen: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return model(images)

    create_attack("mim", eps=0.3, alpha=alpha, steps=2, loss="margin")(watched, x, y)
    torch.testing.assert_close(seen[-1], expected)
    theirs = of_foolbox(
        foolbox.attacks.LinfMomentumIterativeFastGradientMethod(
            momentum=1.0, abs_stepsize=alpha, steps=2, random_start=False
        ),
        model,
        x,
        y,
        epsilon=0.3,
    )
    assert float((theirs - expected).abs().max()) > 0.01


def test_a_failure_is_no_black_image() -> None:
    class Stubborn(nn.Module):
        """Class 0 wherever there is any light at all."""

        def forward(self, x: Tensor) -> Tensor:
            light = x.mean((1, 2, 3))
            return torch.stack([torch.where(light > 0, 1 + 0 * light, -1 + light), 0.1 * light], 1)

    model, x, y = Stubborn(), some_images(3), torch.zeros(3, dtype=torch.int64)
    theirs = of_foolbox(foolbox.attacks.L2CarliniWagnerAttack(2, 5, 0.01), model, x, y)
    assert bool((model(theirs).argmax(1) != y).all())  # "100 % success"
    assert float(theirs.max()) == 0
    result = create_attack("cw", steps=5, search_steps=2).run(model, x, y)
    assert torch.equal(result.images, x)
    assert not bool(result.success.any())


# torchattacks -------------------------------------------------------------------------------------------------------


def test_negative_logits_do_not_stop_cw() -> None:
    model, x = Linear(shift=-100.0), some_images()
    y = model(x).argmax(1)
    theirs = torchattacks.CW(model, c=10, steps=50, lr=0.05)(x, y)
    assert float((model(theirs).argmax(1) != y).float().mean()) < 0.5  # zero, its masked maximum, wins
    ours = create_attack("cw", steps=50, search_steps=1, initial_const=10.0).run(model, x, y)
    assert bool(ours.success.all())


def test_neighbors_do_not_stop_cw() -> None:
    # Theirs leaves once the batch's summed cost no longer falls: an image's answer depends on its neighbors.
    class Two(Linear):
        """Bright images have logits a hundred times as large, and a cost that overshoots early."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + 99 * (x.mean((1, 2, 3)) > 0.8).float())[:, None]

    model = Two()
    x = torch.cat([some_images(2), some_images(2, 0.85, 0.95)])
    y = model(x).argmax(1)
    options = {"steps": 60, "search_steps": 2, "initial_const": 1.0}
    alone, together = (create_attack("cw", **options)(model, x[:n], y[:n])[:2] for n in (2, 4))
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    alone, together = (torchattacks.CW(model, c=1, steps=60, lr=0.05)(x[:n], y[:n])[:2] for n in (2, 4))
    assert float((alone - together).abs().max()) > 1e-3


def test_deepfool_does_not_stall_on_the_boundary() -> None:
    model, x = Linear(2), some_images(16)
    y = model(x).argmax(1)
    almost = create_attack("deepfool", overshoot=0.0)(model, x, y)
    x = (x + (almost - x) * (1 - 1e-6)).clamp(0, 1)  # a last bit away from the boundary
    y = model(x).argmax(1)
    theirs = torchattacks.DeepFool(model, steps=50, overshoot=0.0)(x, y)
    assert not bool((model(theirs).argmax(1) != y).all())
    assert bool(create_attack("deepfool", overshoot=0.0).run(model, x, y).success.all())


def test_jsma_takes_any_number_of_classes() -> None:
    model, x = Linear(4), some_images(16)
    y = model(x).argmax(1)
    last = y == 3
    assert bool(last.any())
    with pytest.raises(IndexError):  # its default target is the next of ten classes, whatever the model has
        torchattacks.JSMA(model, theta=1.0, gamma=0.5)(x[last], y[last])
    for targets in (None, (y + 1) % 4):
        result = create_attack("jsma", gamma=0.5).run(model, x, y, targets=targets)
        assert float(result.success.float().mean()) > 0.5


def test_normalized_images_are_refused_not_clamped() -> None:
    model, x = Linear(), some_images() * 4 - 2  # "mean 0, deviation 1"
    y = model(x).argmax(1)
    theirs = torchattacks.FGSM(model, eps=0.01)(x, y)
    assert float((theirs - x).abs().max()) > 0.5  # far outside its ball, without a word
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        create_attack("fgsm", eps=0.01)(model, x, y)


# ART ----------------------------------------------------------------------------------------------------------------


def test_the_model_is_back_in_training_mode() -> None:
    from art.attacks.evasion import FastGradientMethod

    model, x = nn.Sequential(Linear(), nn.Dropout(0.5)).train(), some_images()
    y = torch.zeros(len(x), dtype=torch.int64)
    FastGradientMethod(of_art(model), eps=0.1).generate(x.numpy(), y.numpy())
    assert not all(m.training for m in model)
    model.train()
    create_attack("fgsm", eps=0.1)(model, x, y)
    assert all(m.training for m in model)


def test_no_global_generator_decides() -> None:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    model, x = Linear(), some_images()
    y = model(x).argmax(1)

    def theirs() -> Any:
        attack = ProjectedGradientDescentPyTorch(
            of_art(model), eps=0.1, eps_step=1e-4, max_iter=1, num_random_init=1, verbose=False
        )
        return attack.generate(x.numpy(), y.numpy())

    def ours() -> Any:
        return create_attack("pgd", eps=0.1, alpha=1e-4, steps=1)(model, x, y, seed=3).numpy()

    found = {}
    for run in (theirs, ours):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  # the state that ART draws from
        first = run()
        torch.manual_seed(0)
        np.random.seed(1)  # noqa: NPY002
        found[run] = np.array_equal(first, run())
    assert found == {theirs: False, ours: True}


def test_cw_finds_its_constant_from_far_below() -> None:
    # Doubling from 1e-6 would reach 2.6e-4 in nine steps.
    model, x = Linear(2), some_images()
    y = model(x).argmax(1)
    assert bool(create_attack("cw", steps=40, initial_const=1e-6).run(model, x, y).success.all())


@pytest.mark.parametrize("factor", [1.0, 255.0])
def test_deepfools_overshoot_does_not_grow_with_the_range_of_the_pixels(factor: float) -> None:
    # A model that takes 0..255 inside: the attack sees [0, 1], and its answer is the same.
    model, x = Linear(2), some_images()
    y = model(x).argmax(1)
    scaled = create_attack("deepfool")(lambda images: model(images * factor / factor), x, y)
    torch.testing.assert_close(scaled, create_attack("deepfool")(model, x, y), rtol=0, atol=1e-5)
