"""DI-FGSM, SI-NI-FGSM, VMI-FGSM and ensembles: what their gradients are, and how far their images carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit_nets import digit_net, known
from unperturb.attackers import Attacker, Ensemble
from unperturb.attacks import create_attack
from unperturb.attacks.difgsm import resized
from unperturb.systems import System

EPS = 0.15


class Recording:
    """A model that keeps what it was shown."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.shown = model, list[Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        self.shown.append(x.detach().clone())
        return self.model(x)


def slope(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)[0]


def inner(n: int) -> tuple[Tensor, Tensor]:
    """Images away from 0 and 1, and what the model says of them."""
    images = 0.3 + 0.4 * known(n)[0]
    return images, digit_net()(images).argmax(1)


# DI-FGSM -------------------------------------------------------------------------------------------------------------


def test_a_resized_image_is_interpolated_and_padded() -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width, rate in ((16, 16, 0.7), (9, 14, 0.5), (3, 2, 0.9)):
        x = torch.rand(20, 2, height, width, generator=generator)
        draws = torch.rand(20, 3, generator=generator)
        found, seen = resized(x, draws, rate), set()
        for row in range(20):
            share, top, left = draws[row].tolist()
            sides = []
            for old in (height, width):
                least = min(int(rate * old), old - 1)
                sides.append(max(least + int(share * (old - least)), 1))
            h, w = sides
            up, to_left = int(top * (height - h + 1)), int(left * (width - w + 1))
            small = F.interpolate(x[row : row + 1], size=(h, w), mode="bilinear", align_corners=False)
            expected = F.pad(small, (to_left, width - w - to_left, up, height - h - up))[0]
            torch.testing.assert_close(found[row], expected, rtol=0, atol=2e-6)
            seen.add((h, up))
        assert len(seen) > (3 if height > 3 else 1)


def test_without_diversity_it_is_mim() -> None:
    model, (images, labels) = digit_net(), known(12)
    plain = create_attack("mim", eps=EPS, steps=6)(model, images, labels)
    assert torch.equal(create_attack("di_fgsm", eps=EPS, steps=6, diversity_prob=0.0)(model, images, labels), plain)
    assert not torch.equal(create_attack("di_fgsm", eps=EPS, steps=6)(model, images, labels), plain)


def test_each_image_is_resized_its_own_way_as_often_as_is_said() -> None:
    recording, (images, labels) = Recording(digit_net()), known(40)
    steps = 8
    create_attack("di_fgsm", eps=1e-6, steps=steps, diversity_prob=0.3)(recording, images, labels)
    assert len(recording.shown) == steps + 1
    changed = torch.stack([(x - images).abs().flatten(1).amax(1) > 1e-3 for x in recording.shown[:-1]])
    assert 0.2 < float(changed.float().mean()) < 0.4
    assert not bool(changed.all(1).any())
    assert not bool(((recording.shown[-1] - images).abs() > 1e-5).any())


def test_its_gradient_goes_through_the_resizing() -> None:
    # The same draws, the same loss, by autograd alone.
    from unperturb import per_image_rng
    from unperturb.attacks.difgsm import _DRAWS

    model, (images, labels) = digit_net(), inner(12)
    index, alpha = torch.arange(12), 0.01
    recording = Recording(model)
    attack = create_attack("di_fgsm", eps=EPS, alpha=alpha, steps=2, decay=0.0, diversity_prob=1.0)
    attack(recording, images, labels, seed=3)
    assert torch.equal(recording.shown[0], images)  # so that a start is seen as it is
    first = slope(model, images, labels)
    x = images + alpha * first.sign()
    draws = per_image_rng.uniform(3, index, _DRAWS + 1, (4,))
    second = slope(lambda x: model(resized(x, draws[:, :3], 0.9)), x, labels)
    clear = (first.abs() > 1e-6) & (second.abs() > 1e-5 * second.abs().amax())
    moved = recording.shown[-1] - images
    torch.testing.assert_close(moved[clear], alpha * (first.sign() + second.sign())[clear], rtol=0, atol=1e-6)
    assert bool((first.sign() != second.sign())[clear].any())


# SI-NI-FGSM ----------------------------------------------------------------------------------------------------------


def test_of_one_copy_it_is_ni_fgsm() -> None:
    model, (images, labels) = digit_net(), known(12)
    plain = create_attack("ni_fgsm", eps=EPS, steps=6)(model, images, labels)
    assert torch.equal(create_attack("si_ni_fgsm", eps=EPS, steps=6, copies=1)(model, images, labels), plain)


def test_torchattacks_sinifgsm() -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="the oracle torchattacks is not installed")
    # Within ball and box: theirs looks ahead outside of both.
    model, (images, labels) = digit_net(), inner(48)
    options = {"alpha": 0.002, "steps": 8, "decay": 0.7}
    theirs = torchattacks.SINIFGSM(model, eps=EPS, m=4, **options)(images, labels)
    ends = []
    for name, more in (("si_ni_fgsm", {"copies": 4}), ("ni_fgsm", {})):
        recording = Recording(model)
        create_attack(name, eps=EPS, **options, **more)(recording, images, labels)
        ends.append((recording.shown[-1] - theirs).abs().flatten(1).amax(1))
    assert float((ends[0] <= 1e-5).float().mean()) >= 0.9
    assert float((ends[1] > 1e-4).float().mean()) > 0.5  # the copies have a say


# VMI-FGSM ------------------------------------------------------------------------------------------------------------


def test_each_gradient_is_corrected_by_the_variance_of_the_one_before() -> None:
    model, (images, labels) = digit_net(), inner(24)
    steps, samples, alpha, decay, beta = 4, 3, 0.01, 0.6, 1.5
    recording = Recording(model)
    options = {"alpha": alpha, "steps": steps, "decay": decay}
    create_attack("vmi_fgsm", eps=0.1, samples=samples, beta=beta, **options)(recording, images, labels)
    shown = recording.shown
    assert len(shown) == steps + (steps - 1) * samples + 1
    x, momentum, variance = images, torch.zeros_like(images), torch.zeros_like(images)
    for step in range(steps):
        first = step * (samples + 1)
        torch.testing.assert_close(shown[first], x, rtol=0, atol=1e-6)
        x = shown[first]  # the same point to the last bit, so that no ReLU is on its other side
        g = slope(model, x, labels)
        tuned = g + variance
        momentum = decay * momentum + tuned / tuned.abs().mean((1, 2, 3), keepdim=True)
        if step + 1 < steps:
            around = shown[first + 1 : first + 1 + samples]
            apart = torch.stack(around) - x
            assert float(apart.abs().max()) <= 0.1 * beta + 1e-6
            assert float(apart.std()) == pytest.approx(0.1 * beta / 3**0.5, rel=0.05)
            variance = torch.stack([slope(model, near, labels) for near in around]).mean(0) - g
        clear = momentum.abs() > 1e-3
        x = torch.where(clear, x + alpha * momentum.sign(), shown[first + 1 + (samples if step + 1 < steps else 0)])


def test_of_a_linear_model_the_variance_is_zero() -> None:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor) -> Tensor:
        lead = (x.flatten(1) * weight).sum(1)
        return torch.stack([lead, -lead], 1)

    images, labels = torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)
    for norm in ("linf", "l2"):
        plain, tuned = (
            create_attack(name, eps=0.1, norm=norm, steps=5, loss="margin")(model, images, labels)
            for name in ("mim", "vmi_fgsm")
        )
        torch.testing.assert_close(tuned, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "cost"),
    [
        ("di_fgsm", {"restarts": 2}, (12, 10)),
        ("si_ni_fgsm", {"copies": 3}, (16, 15)),
        ("vmi_fgsm", {"samples": 2}, (14, 13)),
    ],
)
def test_cost(name: str, options: dict[str, Any], cost: tuple[int, int]) -> None:
    model, (images, labels) = digit_net(), known(4)
    result = create_attack(name, eps=EPS, steps=5, **options).run(model, images, labels)
    assert (result.forwards, result.backwards) == cost
    assert result.queries.tolist() == [cost[0]] * 4


# How far they carry --------------------------------------------------------------------------------------------------


def carried(attack: Any, source: nn.Module, images: Tensor, labels: Tensor, target: nn.Module) -> float:
    return float((target(attack(source, images, labels)).argmax(1) != labels).float().mean())


@pytest.mark.parametrize("name", ["di_fgsm", "si_ni_fgsm", "vmi_fgsm"])
def test_they_transfer_no_less_than_torchattacks(name: str) -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="the oracle torchattacks is not installed")
    source, target = digit_net("wide"), digit_net("layers")
    images, labels = known(150, "wide", "layers")
    shared: dict[str, Any] = {"eps": EPS, "alpha": EPS / 10, "steps": 10, "decay": 1.0}
    kind = {"di_fgsm": "DIFGSM", "si_ni_fgsm": "SINIFGSM", "vmi_fgsm": "VMIFGSM"}[name]
    torch.manual_seed(0)
    theirs = getattr(torchattacks, kind)(source, **shared)
    ours = carried(create_attack(name, **shared), source, images, labels, target)
    other = float((target(theirs(images, labels)).argmax(1) != labels).float().mean())
    assert 0.05 < ours < 0.99
    assert ours >= other - 0.04


def test_an_ensemble_carries_further_than_its_members_do_on_the_average() -> None:
    members, target = [digit_net("wide"), digit_net("layers")], digit_net("convolutions")
    images, labels = known(150, "wide", "layers", "convolutions")
    attack = create_attack("mim", eps=EPS, steps=10)
    alone = [carried(attack, member, images, labels, target) for member in members]
    both = Ensemble(*members)
    assert carried(attack, both, images, labels, target) > sum(alone) / 2 + 0.05
    torch.testing.assert_close(both(images), (members[0](images) + members[1](images)) / 2)
    # As what an attacker of knowledge transfer owns.
    seen = Attacker(attack, "transfer").model_for(System.of("bare", target), both)
    torch.testing.assert_close(seen(images), both(images))


def test_an_ensemble_of_models_that_differ_is_refused() -> None:
    few = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    with pytest.raises(ValueError, match=r"the ensemble's models differ: logits of \(2, 10\) and of \(2, 3\)"):
        Ensemble(digit_net(), few)(torch.rand(2, 1, 16, 16))
    with pytest.raises(ValueError, match="at least one classifier"):
        Ensemble()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("di_fgsm", {"resize_rate": 1.0}, "resize_rate must lie in"),
        ("di_fgsm", {"diversity_prob": 1.5}, "diversity_prob in"),
        ("si_ni_fgsm", {"copies": 0}, "copies must be at least 1, not 0"),
        ("vmi_fgsm", {"samples": 0}, "samples must be at least 1"),
        ("vmi_fgsm", {"beta": 0.0}, "beta positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_attack(name, eps=0.1, **options)
