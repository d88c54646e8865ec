"""FGSM, PGD, MIM and NI-FGSM, the losses they climb and the sets they stay in, against closed forms and libraries."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize, stats
from torch import Tensor, nn

from unperturb.attacks import create_attack
from unperturb.attacks.base import Attack
from unperturb.attacks.context import AttackContext, QueryCounter
from unperturb.attacks.losses import LOSSES, attack_loss, cross_entropy, dlr, margin
from unperturb.attacks.projections import l2_norm, project_

SHAPE = (1, 8, 8)


class Linear(nn.Module):
    """Logits `scale * (W x + b)`."""

    def __init__(self, classes: int = 2, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.weight = torch.randn(classes, math.prod(SHAPE), generator=torch.Generator().manual_seed(seed)) * 0.3
        self.bias = -self.weight.sum(1) / 2
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x.flatten(1) @ self.weight.T + self.bias)


class Recording:
    """A model that keeps what it was shown and what it said."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.shown, self.said = model, list[Tensor](), list[Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        self.shown.append(x.detach().clone())
        self.said.append(logits.detach().clone())
        return logits


def images_of(n: int = 8, low: float = 0.0, high: float = 1.0, seed: int = 1) -> Tensor:
    return low + (high - low) * torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def context_of(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> AttackContext:
    rows, zeros = torch.arange(len(images)), torch.zeros(len(images), dtype=torch.int64)
    return AttackContext(
        model, images, labels, False, rows, 0, QueryCounter(queries=zeros, zero_gradients=zeros.clone()), rows
    )


# Losses --------------------------------------------------------------------------------------------------------------


def test_losses_against_a_loop_over_images() -> None:
    logits = torch.randn(50, 5, dtype=torch.float64) * 3 - 20  # all negative: no zero may win a maximum
    labels = torch.arange(50) % 5
    for z, y, ce, m, d in zip(
        logits.tolist(),
        labels.tolist(),
        cross_entropy(logits, labels).tolist(),
        margin(logits, labels).tolist(),
        dlr(logits, labels).tolist(),
    ):
        others, ordered = [v for k, v in enumerate(z) if k != y], sorted(z, reverse=True)
        assert ce == pytest.approx(math.log(sum(math.exp(v) for v in z)) - z[y])
        assert m == pytest.approx(max(others) - z[y])
        assert d == pytest.approx((max(others) - z[y]) / (ordered[0] - ordered[2]))
    torch.testing.assert_close(dlr(7 * logits + 3, labels), dlr(logits, labels))


def test_dlr_needs_three_classes_and_says_what_to_take_instead() -> None:
    with pytest.raises(ValueError, match="at least 3 classes, the model has 2; use loss='margin'"):
        dlr(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))


# Ball and box --------------------------------------------------------------------------------------------------------


def nearest(x: np.ndarray[Any, Any], center: np.ndarray[Any, Any], eps: float) -> np.ndarray[Any, Any]:
    """The projection by bisection in float64, one image at a time."""

    def at(t: float) -> np.ndarray[Any, Any]:
        return np.clip(center + t * (x - center), 0, 1)

    low, high = 0.0, 1.0
    if np.linalg.norm(at(1.0) - center) <= eps:
        return at(1.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(at(middle) - center) <= eps else (low, middle)
    return at(low)


@pytest.mark.parametrize("size", [3, 64, 3072])
@pytest.mark.parametrize("spread", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("eps", [0.01, 0.7, 5.0])
def test_l2_projection_is_the_nearest_point(size: int, spread: float, eps: float) -> None:
    generator = torch.Generator().manual_seed(size)
    center = torch.rand(12, 1, 1, size, generator=generator)
    center[:4] = center[:4].round()  # most pixels of a written digit lie on the box
    # Sizes over many powers of ten: the box is met at as many different times.
    delta = torch.randn(center.shape, generator=generator) * spread
    delta[::2] *= 10 ** (-4 * torch.rand(center[::2].shape, generator=generator))
    found = project_(center + delta, center, eps, "l2")
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float((found - center).double().flatten(1).norm(dim=1).max()) <= eps + 2e-6
    for row, (x, c) in enumerate(zip((center + delta).double().numpy(), center.double().numpy())):
        np.testing.assert_allclose(found[row].numpy(), nearest(x, c, eps), rtol=0, atol=2e-5 * max(1.0, eps))


def test_the_nearest_point_has_that_form() -> None:
    # That the projection is clip(center + t (x - center)) is claimed, by `project_` and by the bisection above alike.
    rng = np.random.default_rng(0)
    for _ in range(5):
        center, x, eps = rng.random(6), rng.random(6) * 4 - 1.5, 0.4
        solved = optimize.minimize(
            lambda z, x=x: ((z - x) ** 2).sum(),
            center,
            jac=lambda z, x=x: 2 * (z - x),
            bounds=[(0, 1)] * 6,
            constraints={"type": "ineq", "fun": lambda z, c=center, r=eps: r**2 - ((z - c) ** 2).sum()},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(nearest(x, center, eps), solved.x, atol=1e-5)


def test_linf_projection() -> None:
    center, x = images_of(), images_of(low=-1, high=2, seed=5)
    found = project_(x, center, 0.2, "linf")
    expected = np.clip(np.clip(x.numpy(), center.numpy() - 0.2, center.numpy() + 0.2), 0, 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_is_uniform_in_the_ball(norm: Any) -> None:
    images = torch.full((400, *SHAPE), 0.5)
    delta = context_of(Linear(), images, torch.zeros(400, dtype=torch.int64)).random_start(0.1, norm, 0) - images
    if norm == "linf":
        assert stats.kstest(delta.flatten() / 0.1, stats.uniform(-1, 2).cdf).pvalue > 1e-3
        return
    size = math.prod(SHAPE)
    assert stats.kstest((l2_norm(delta) / 0.1).double() ** size, "uniform").pvalue > 1e-3
    # A coordinate of a uniform direction in d dimensions: (1 + u) / 2 is Beta((d - 1) / 2, (d - 1) / 2).
    unit = (delta / l2_norm(delta)[:, None, None, None]).flatten(1)[:, 7].double()
    assert stats.kstest((1 + unit) / 2, stats.beta((size - 1) / 2, (size - 1) / 2).cdf).pvalue > 1e-3


# Closed forms on linear models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_one_step_of_the_whole_budget(norm: str, targeted: bool) -> None:
    model, images = Linear(4), images_of()
    labels = torch.arange(len(images)) % 4
    targets = (labels + 1) % 4
    w, b = model.weight.double().numpy(), model.bias.double().numpy()
    z = images.flatten(1).double().numpy() @ w.T + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    towards = targets if targeted else labels
    gradient = (p - np.eye(4)[towards.numpy()]) @ w * (-1 if targeted else 1)
    unit = np.sign(gradient) if norm == "linf" else gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    expected = np.clip(images.flatten(1).numpy() + 0.2 * unit, 0, 1)
    found = create_attack("fgsm", eps=0.2, norm=norm)(model, images, labels, targets=targets if targeted else None)
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize(
    "attack",
    [
        ("pgd", {"steps": 20}),
        ("pgd", {"steps": 20, "random_start": False}),
        ("mim", {"steps": 10}),
        ("ni_fgsm", {"steps": 10}),
    ],
)
def test_linf_optimum_of_a_linear_model(attack: tuple[str, dict[str, Any]], loss: str) -> None:
    name, options = attack
    model, images = Linear(), images_of()
    images[0], images[1] = 0, 1
    labels = model(images).argmax(1)
    away = (model.weight[1 - labels] - model.weight[labels]).reshape_as(images)
    optimum = (images + 0.3 * away.sign()).clamp(0, 1)
    for targets in (None, 1 - labels):
        found = create_attack(name, eps=0.3, loss=loss, **options)(model, images, labels, targets=targets)
        torch.testing.assert_close(found, optimum, rtol=0, atol=2e-6)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_l2_pgd_reaches_the_optimum_in_ball_and_box(eps: float, random_start: bool) -> None:
    model, images = Linear(), images_of()
    images[:4] = images[:4].round()  # on the box from the start
    labels = model(images).argmax(1)
    away = (model.weight[1 - labels] - model.weight[labels]).double().numpy()
    # Along a sphere a path with the default step, 2.5 eps in all, ends 1.3 % short of the top: give it longer steps.
    attack = create_attack("pgd", norm="l2", eps=eps, steps=200, alpha=10 * eps / 200, random_start=random_start)
    found = attack(model, images, labels).flatten(1).double().numpy()
    for x, start, w in zip(found, images.flatten(1).double().numpy(), away):
        # The best point of a linear function in ball and box is clip(x + t w) with the largest t in the ball.
        low, high = 0.0, 1e6
        for _ in range(200):
            t = (low + high) / 2
            low, high = (t, high) if np.linalg.norm(np.clip(start + t * w, 0, 1) - start) <= eps else (low, t)
        best = w @ (np.clip(start + low * w, 0, 1) - start)
        assert w @ (x - start) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_ni_fgsm_looks_where_its_momentum_leads(decay: float) -> None:
    # Of a linear margin every gradient is the same w: after t steps the momentum is w (1 + mu + ... + mu^(t - 1)).
    model, images = Linear(), images_of(4, 0.3, 0.7)
    labels = model(images).argmax(1)
    w = (model.weight[1 - labels] - model.weight[labels]).double().reshape_as(images)
    w /= w.abs().mean((1, 2, 3), keepdim=True)
    eps, alpha, steps = 0.2, 0.05, 6
    recording = Recording(model)
    create_attack("ni_fgsm", eps=eps, alpha=alpha, steps=steps, decay=decay, loss="margin")(recording, images, labels)
    low, high = images.double() - eps, images.double() + eps  # within [0, 1] here
    for t, shown in enumerate(recording.shown[:-1]):
        x = images + (t * alpha * w.sign()).clamp(-eps, eps)
        ahead = x + alpha * decay * sum(decay**k for k in range(t)) * w
        torch.testing.assert_close(shown.double(), ahead.clamp(0, 1).clamp(low, high), rtol=0, atol=1e-6)
    torch.testing.assert_close(recording.shown[-1].double(), images + eps * w.sign(), rtol=0, atol=1e-6)


# What is returned, and what it cost ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small convolutional network that reads scikit-learn's 8x8 digits, and 48 it has not seen."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(3):
            for rows in torch.randperm(1700).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
    model.eval().requires_grad_(False)
    assert float((model(images[1700:]).argmax(1) == labels[1700:]).float().mean()) > 0.8
    return model, images[-48:], labels[-48:]


@pytest.mark.parametrize(
    ("name", "options", "forwards", "backwards"),
    [
        ("fgsm", {}, 1, 1),
        ("pgd", {"steps": 5}, 6, 5),
        ("pgd", {"steps": 5, "restarts": 3}, 18, 15),
        ("mim", {"steps": 5}, 6, 5),
        ("mim", {"steps": 5, "restarts": 2}, 12, 10),
        ("ni_fgsm", {"steps": 5}, 6, 5),
    ],
)
def test_cost(name: str, options: dict[str, Any], forwards: int, backwards: int) -> None:
    model, images = Linear(3), images_of()
    result = create_attack(name, eps=0.1, **options).run(model, images, model(images).argmax(1))
    assert (result.forwards, result.backwards) == (forwards, backwards)
    assert result.queries.tolist() == [forwards] * len(images)
    assert result.zero_gradients.tolist() == [0] * len(images)


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd", {"steps": 6, "restarts": 3, "alpha": 0.2}),
        ("pgd", {"steps": 6, "norm": "l2"}),
        ("mim", {"steps": 6}),
        ("ni_fgsm", {"steps": 6}),
    ],
)
def test_the_highest_loss_met_is_returned_that_of_a_success_first(
    name: str, options: dict[str, Any], targeted: bool, loss: str, digits: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, images, labels = digits
    targets = (labels + 1) % 10 if targeted else None
    recording = Recording(model)
    found = create_attack(name, eps=0.3, loss=loss, **options)(recording, images, labels, targets=targets)
    sign, towards = (-1, targets) if targeted else (1, labels)
    climbed = attack_loss(loss, targeted=targeted)
    values = torch.stack([sign * climbed(z, towards) for z in recording.said])
    fooled = torch.stack([sign * margin(z, towards) > 0 for z in recording.said])
    highest = torch.where(fooled | ~fooled.any(0), values, -torch.inf).amax(0)
    torch.testing.assert_close(sign * climbed(model(found), towards), highest, rtol=1e-5, atol=1e-5)
    met = torch.stack(recording.shown)
    assert bool(((met - found).abs().amax((2, 3, 4)) <= 1e-6).any(0).all())


@pytest.mark.parametrize("name", ["pgd", "mim", "ni_fgsm", "apgd", "noise", "patch"])
def test_a_success_is_not_given_up_for_a_higher_loss(name: str) -> None:
    def unsure(x: Tensor) -> Tensor:
        """Brighter, the label's probability falls all the way, but the rival that leads at first gives way to two that
        do not: (label, rival, third) at 0.5 and 0.6 in the mean."""
        t = ((x.mean((1, 2, 3)) - 0.5) / 0.1).clamp(0, 1)[:, None]
        return torch.lerp(torch.tensor([0.0, 0.1, -2.0]), torch.tensor([0.0, -0.02, -0.02]), t)

    images, labels = torch.full((2, *SHAPE), 0.5), torch.zeros(2, dtype=torch.int64)
    options: dict[str, Any] = {"area": 1.0, "lr": 0.1, "position": "center"} if name == "patch" else {"eps": 0.1}
    if name in ("pgd", "apgd"):
        options["random_start"] = False
    recording = Recording(unsure)
    options.update({"num_trials": 40} if name == "noise" else {"steps": 4})
    result = create_attack(name, **options).run(recording, images, labels)
    losses = torch.stack([cross_entropy(z, labels) for z in recording.said[:-2]])
    fooled = torch.stack([z.argmax(1) != labels for z in recording.said[:-2]])
    assert bool(result.success.all())
    if name != "noise":  # which has no way to the far end
        assert not bool(fooled.gather(0, losses.argmax(0)[None]).any())  # the highest loss met is no success


@pytest.mark.parametrize("name", ["pgd", "mim", "ni_fgsm", "apgd"])
def test_small_logits_are_told_apart(name: str, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    # Of logits times 1e-6 cross-entropy is log 10 to the last bit but one of float32.
    model, images, labels = digits

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.double(), labels, reduction="none")

    recording = Recording(lambda x: 1e-6 * model(x))
    result = create_attack(name, eps=0.15, steps=10).run(recording, images, labels)
    losses = torch.stack([loss(z) for z in recording.said[:-2]])
    fooled = torch.stack([z.argmax(1) != labels for z in recording.said[:-2]])
    highest = torch.where(fooled | ~fooled.any(0), losses, -torch.inf).amax(0)
    torch.testing.assert_close(loss(1e-6 * model(result.images)), highest, rtol=0, atol=1e-11)
    assert bool(result.success[fooled.any(0)].all())


@pytest.mark.parametrize("name", ["fgsm", "pgd", "mim", "ni_fgsm", "apgd", "apgd-t", "noise", "patch", "autoattack"])
def test_towards_a_target_that_ranks_third_dlr_has_a_slope(name: str) -> None:
    # (the largest - the target) / (the largest - the third largest) would be 1 wherever the target is the third.
    model = Linear(6)
    images = images_of(12)
    targets = model(images).topk(3).indices[:, 2]
    labels = model(images).argmax(1)
    options: dict[str, Any] = {"area": 0.5} if name == "patch" else {"eps": 0.02}
    options.update({"queries": 2, "version": "rand", "eot_samples": 1} if name == "autoattack" else {"loss": "dlr"})
    if name not in ("fgsm", "noise"):
        options["steps"] = 4
    result = create_attack(name, **options).run(model, images, labels, targets=targets)
    assert int(result.zero_gradients.sum()) == 0
    if name not in ("noise", "autoattack"):  # one draws at random, the other stops at its first success
        options["loss"] = "margin"
        assert torch.equal(result.images, create_attack(name, **options)(model, images, labels, targets=targets))


def test_success_is_judged_again_after_rounding_to_8_bits() -> None:
    def fine(x: Tensor) -> Tensor:  # decides at a third of a grey level
        lead = 1e3 * (x.mean((1, 2, 3)) - 100.33 / 255)
        return torch.stack([-lead, lead], 1)

    images, labels = torch.full((2, *SHAPE), 100 / 255), torch.zeros(2, dtype=torch.int64)
    for eps, survives in ((0.4 / 255, False), (0.6 / 255, True)):
        result = create_attack("fgsm", eps=eps).run(fine, images, labels)
        assert result.success.tolist() == [True, True]
        assert result.success_8bit.tolist() == [survives, survives]


def test_more_restarts_never_find_less(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = digits
    last, gained = torch.full((len(images),), -math.inf), 0
    for restarts in (1, 2, 4):
        found = create_attack("pgd", eps=0.15, steps=3, restarts=restarts)(model, images, labels)
        now = cross_entropy(model(found), labels)
        assert bool((now >= last - 1e-6).all())
        gained += int((now > last + 1e-4).sum())
        last = now
    assert gained > len(images)  # beyond the first, from minus infinity


def test_default_steps_are_long_enough() -> None:
    model, images = Linear(), torch.full((3, *SHAPE), 0.5)
    labels = model(images).argmax(1)
    for name, first in (("pgd", 2.5 * 0.2 / 10), ("mim", 0.2 / 10)):
        options = {"random_start": False} if name == "pgd" else {}
        recording = Recording(model)
        create_attack(name, eps=0.2, steps=10, **options)(recording, images, labels)
        moved = (recording.shown[1] - recording.shown[0]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, first), rtol=0, atol=1e-6)


def test_seeds_and_indices_draw_different_starts(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = digits
    same = images[:1].expand(6, -1, -1, -1)
    recording = Recording(model)
    attack = create_attack("pgd", eps=0.1, steps=1)
    attack(recording, same, labels[:1].expand(6), seed=1)
    attack(recording, same, labels[:1].expand(6), seed=2)
    starts = torch.cat([recording.shown[0], recording.shown[2]]).flatten(1)
    assert float(torch.pdist(starts).min()) > 0.1


# Targets -------------------------------------------------------------------------------------------------------------


def test_which_class_is_aimed_at() -> None:
    model = Linear(5)
    images = images_of(600)
    logits = model(images)
    labels = logits.argmax(1)
    attack, context = create_attack("fgsm", eps=0.1, targets="least_likely"), context_of(model, images, labels)
    assert torch.equal(attack._choose_targets(context, None), logits.argmin(1))
    context.labels = logits.argmin(1)  # the least likely class is the true one: the next
    assert torch.equal(attack._choose_targets(context, None), logits.argsort(1)[:, 1])
    context.labels = labels
    chosen = create_attack("fgsm", eps=0.1, targets="random")._choose_targets(context, None)
    ahead = (chosen - labels) % 5
    assert stats.chisquare(torch.bincount(ahead, minlength=5)[1:].numpy()).pvalue > 1e-3
    assert not bool((ahead == 0).any())


# Oracles -------------------------------------------------------------------------------------------------------------

EPS, STEPS, ALPHA = 0.2, 8, 0.04


def last_met(name: str, model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The end of our path: other libraries return it, where we return the best point on the way."""
    recording = Recording(model)
    create_attack(name, eps=EPS, **options)(recording, images, labels)
    return recording.shown[-1]


def assert_same_attack(ours: Tensor, theirs: Tensor, model: nn.Module, labels: Tensor) -> None:
    # A sign flips where rounding decides it, and the paths part: hence a fraction.
    same = (ours - theirs).abs().flatten(1).amax(1) <= 1e-5
    assert float(same.float().mean()) >= 0.9, f"{int(same.sum())} of {len(same)} images are the same"
    agree = (model(ours).argmax(1) == labels) == (model(theirs).argmax(1) == labels)
    assert float(agree.float().mean()) >= 0.95
    assert bool((model(ours).argmax(1) != labels).any())


@pytest.mark.parametrize("name", ["fgsm", "pgd", "mim"])
def test_torchattacks(name: str, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="the oracle torchattacks is not installed")
    model, images, labels = digits
    if name == "fgsm":
        theirs = torchattacks.FGSM(model, eps=EPS)
        ours = create_attack("fgsm", eps=EPS)(model, images, labels)
    elif name == "pgd":
        theirs = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=False)
        ours = last_met("pgd", model, images, labels, alpha=ALPHA, steps=STEPS, random_start=False)
    else:
        theirs = torchattacks.MIFGSM(model, eps=EPS, alpha=ALPHA, steps=STEPS, decay=0.8)
        ours = last_met("mim", model, images, labels, alpha=ALPHA, steps=STEPS, decay=0.8)
    assert_same_attack(ours, theirs(images, labels), model, labels)


def test_torchattacks_nifgsm(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="the oracle torchattacks is not installed")
    model, images, _ = digits
    # Within ball and box: theirs looks ahead outside of both, where ours would have nothing to return.
    images = 0.3 + 0.4 * images
    labels = model(images).argmax(1)
    options = {"alpha": 0.002, "steps": STEPS, "decay": 0.7}
    theirs = torchattacks.NIFGSM(model, eps=EPS, **options)(images, labels)
    ours, plain = (last_met(name, model, images, labels, **options) for name in ("ni_fgsm", "mim"))
    same = (ours - theirs).abs().flatten(1).amax(1) <= 1e-5
    assert float(same.float().mean()) >= 0.9
    assert float((plain - theirs).abs().flatten(1).amax(1).mean()) > 1e-4  # the look ahead has a say


@pytest.mark.parametrize(("name", "norm"), [("fgsm", "linf"), ("fgsm", "l2"), ("pgd", "linf"), ("pgd", "l2")])
def test_foolbox(name: str, norm: str, digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a name that scipy deprecates
        fa = pytest.importorskip("foolbox.attacks", reason="the oracle foolbox is not installed")
        from foolbox import PyTorchModel
    model, images, labels = digits
    if norm == "l2":
        # Away from the box: foolbox projects onto the ball and clips, which is not the nearest point of both.
        images = 0.3 + 0.4 * images
        labels = model(images).argmax(1)
    if name == "fgsm":
        theirs = (fa.LinfFastGradientAttack if norm == "linf" else fa.L2FastGradientAttack)(random_start=False)
        ours = create_attack("fgsm", eps=EPS, norm=norm)(model, images, labels)
    else:
        kind = fa.LinfPGD if norm == "linf" else fa.L2PGD
        theirs = kind(abs_stepsize=ALPHA, steps=STEPS, random_start=False)
        ours = last_met("pgd", model, images, labels, norm=norm, alpha=ALPHA, steps=STEPS, random_start=False)
    found, _, _ = theirs(PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=EPS)
    if norm == "linf":
        assert_same_attack(ours, found, model, labels)
    else:  # at this budget few fall, so there is little to say of success
        assert float((ours - found).abs().max()) <= 1e-5
        assert float((ours - images).abs().amax()) > 0.01


# Faults of public libraries, not to be repeated ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fgsm", "pgd", "mim", "ni_fgsm"])
def test_a_saturated_softmax_is_counted_and_the_margin_still_moves(name: str) -> None:
    model = Linear(4, scale=50.0 * 400)  # confident: the cross-entropy is exactly 0 in float32
    images = images_of()
    labels = model(images).argmax(1)
    assert float(cross_entropy(model(images), labels).max()) == 0
    options = {} if name == "fgsm" else {"steps": 4}
    if name == "pgd":
        options["random_start"] = False
    stuck = create_attack(name, eps=1e-4, **options).run(model, images, labels)
    assert torch.equal(stuck.images, images)
    assert stuck.zero_gradients.tolist() == [stuck.backwards] * len(images)
    for loss in ("margin", "dlr"):
        moved = create_attack(name, eps=1e-4, loss=loss, **options).run(model, images, labels)
        assert moved.zero_gradients.tolist() == [0] * len(images)
        assert bool((margin(model(moved.images), labels) > margin(model(images), labels)).all())


@pytest.mark.parametrize("name", ["mim", "ni_fgsm"])
def test_momentum_of_a_zero_gradient_is_not_nan(name: str) -> None:
    def flat(x: Tensor) -> Tensor:  # no gradient below 1/2, as behind a dead ReLU
        s = (x.amax((1, 2, 3)) - 0.5).clamp(min=0)
        return torch.stack([s, -s], 1)

    images = torch.full((2, *SHAPE), 0.3)
    images[1] = 0.7
    found = create_attack(name, eps=0.1, steps=5)(flat, images, torch.zeros(2, dtype=torch.int64))
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found[0], images[0])
    assert not torch.equal(found[1], images[1])


@dataclass(frozen=True, kw_only=True)
class Gradient(Attack):
    """Shows the gradient that an attack is given."""

    def perturb(self, context: AttackContext) -> Tensor:
        _, gradient, _ = context.gradient(context.images, cross_entropy)
        return 0.5 + gradient / 4


def test_an_images_gradient_does_not_depend_on_the_batch() -> None:
    model, images = Linear(2), images_of(512)
    labels = torch.zeros(512, dtype=torch.int64)
    alone, together = (Gradient()(model, images[:n], labels[:n]) for n in (1, 512))
    assert float((alone - 0.5).abs().max()) > 0.01
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "mim", "ni_fgsm"])
def test_a_tiny_gradient_is_a_direction_like_any_other(name: str) -> None:
    # Its square is zero in float32, and so was the length that one library divides by.
    images = images_of(4)
    labels = torch.zeros(4, dtype=torch.int64)
    options = {} if name == "fgsm" else {"steps": 5}
    for norm, eps in (("linf", 0.1), ("l2", 0.5)):
        attack = create_attack(name, norm=norm, eps=eps, loss="margin", **options)
        tiny = attack.run(Linear(2, scale=2.0**-100), images, labels)
        torch.testing.assert_close(tiny.images, attack(Linear(2), images, labels), rtol=0, atol=1e-5)
        assert tiny.zero_gradients.tolist() == [0] * 4
