"""DeepFool, C&W, DDN and noise: closed forms on linear models, an independent library on a small CNN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.attacks.base import Attack
from unperturb.attacks.context import AttackContext, QueryCounter
from unperturb.attacks.cw import CW
from unperturb.attacks.ddn import DDN
from unperturb.attacks.deepfool import DeepFool
from unperturb.attacks.noise import Noise
from unperturb.attacks.projections import l2_norm

MINIMAL = [DeepFool(), DeepFool(norm="linf"), CW(steps=40, search_steps=4), DDN(steps=60)]
IDS = ["deepfool-l2", "deepfool-linf", "cw", "ddn"]
every_attack = pytest.mark.parametrize("attack", MINIMAL, ids=IDS)


class Linear(nn.Module):
    """Logits by products and sums of one image at a time, so that the batch cannot change their last bits."""

    def __init__(self, classes: int = 4, scale: float = 0.3, bias: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 64, generator=generator) * scale)
        self.bias = nn.Parameter(bias - self.weight.detach().sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, None] * self.weight).sum(-1) + self.bias


def grey(n: int = 8, model: Linear | None = None) -> Tensor:
    """Images so far from 0 and 1 that a linear model's boundary, some 0.4 away, is met before the box."""
    images = 0.5 + 0.1 * (torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5)
    weight = (model or Linear()).weight.detach()
    own = F.normalize(weight - weight.mean(0), dim=1)[torch.arange(n) % len(weight)]
    return images + 0.6 * own.reshape(-1, 1, 8, 8)


def closed_form(model: Linear, x: Tensor, labels: Tensor, norm: str = "l2") -> Tensor:
    """Distance `(N, K)` to the boundary with each class, inf for the label itself."""
    logits = model(x).detach()
    gap = logits.gather(1, labels[:, None]) - logits
    slope = (model.weight[None] - model.weight[labels][:, None]).detach()
    length = torch.linalg.vector_norm(slope, 2 if norm == "l2" else 1, dim=2)
    return (gap / length).scatter(1, labels[:, None], torch.inf)


def nearest_in_box(model: Linear, x: Tensor, label: Tensor, target_class: Tensor) -> Tensor:
    """Least L2 distance `(N,)` at which `target_class` meets `label` inside [0, 1]: bisection over the multiplier."""
    slope = (model.weight[target_class] - model.weight[label]).detach().double()
    flat, logits = x.flatten(1).double(), model(x).detach().double()
    gap = (logits.gather(1, label[:, None]) - logits.gather(1, target_class[:, None])).squeeze(1)
    low, high = torch.zeros_like(gap), torch.full_like(gap, 1e4)
    for _ in range(80):
        middle = (low + high) / 2
        gained = (((flat + middle[:, None] * slope).clamp(0, 1) - flat) * slope).sum(1)
        low, high = torch.where(gained < gap, middle, low), torch.where(gained < gap, high, middle)
    return ((flat + high[:, None] * slope).clamp(0, 1) - flat).norm(dim=1)


def distance(x: Tensor, images: Tensor, norm: str = "l2") -> Tensor:
    return torch.linalg.vector_norm((x - images).flatten(1), 2 if norm == "l2" else math.inf, dim=1)


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.model, self.factor, self.shift = model, factor, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.factor + self.shift


@pytest.fixture(scope="module")
def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """A small CNN trained on scikit-learn's digits, and 48 test images that it gets right."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    images = F.interpolate(images, scale_factor=2)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(6):
        for rows in torch.randperm(1500).split(50):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    images, labels = images[1500:], labels[1500:]
    right = (model(images).argmax(1) == labels).nonzero().squeeze(1)[:48]
    assert len(right) == 48
    return model, images[right], labels[right]


def of_foolbox(attack: Any, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Success by one clean forward pass, and L2 distances; its black images are failures, whatever the model says."""
    import foolbox

    wrapped = foolbox.PyTorchModel(model, (0, 1), device="cpu")
    x = attack.run(wrapped, images, foolbox.criteria.Misclassification(labels))
    black = x.flatten(1).amax(1) == 0
    return (model(x).argmax(1) != labels) & ~black, distance(x, images)


# Every attack ---------------------------------------------------------------------------------------------------------


@every_attack
def test_everything_falls_on_a_small_cnn(attack: Attack, cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = cnn
    result = attack.run(model, images, labels)
    assert bool(result.success.all())
    assert torch.equal(model(result.images).argmax(1) != labels, result.success)
    assert bool((l2_norm(result.images - images) > 0).all())
    # 64 gray levels' worth of noise would be no minimal attack.
    assert float(distance(result.images, images, "linf").mean()) < 0.6


@every_attack
@pytest.mark.parametrize("change", [{"factor": 50.0}, {"factor": 1.0, "shift": -500.0}], ids=["saturated", "negative"])
def test_neither_a_saturated_softmax_nor_negative_logits_save_an_image(
    attack: Attack, change: dict[str, float], cnn: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, images, labels = cnn
    result = attack.run(Scaled(model, **change), images, labels)
    plain = attack(model, images, labels)
    assert bool(result.success.all())
    assert int(result.zero_gradients.sum()) == 0  # C&W's own are not the model's: its hinge is at rest once one fell
    if isinstance(attack, DDN) and "shift" not in change:
        return  # the softmax among the other classes is sharper, so the path differs
    if not isinstance(attack, CW) or "shift" in change:
        assert torch.allclose(distance(result.images, images), distance(plain, images), rtol=0.05, atol=0.02)


@every_attack
def test_targets_are_reached(attack: Attack, cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = cnn
    targets = (labels + 3) % 10
    result = attack.run(model, images, labels, targets=targets)
    assert torch.equal(model(result.images).argmax(1) == targets, result.success)
    assert float(result.success.float().mean()) >= 0.95


@every_attack
def test_a_failure_returns_the_original(attack: Attack) -> None:
    constant = torch.nn.Linear(64, 3)
    nn.init.zeros_(constant.weight)
    model = nn.Sequential(nn.Flatten(), constant)
    images = torch.rand(3, 1, 8, 8)
    labels = model(images).argmax(1)
    result = attack.run(model, images, labels)
    assert torch.equal(result.images, images)
    assert not bool(result.success.any())
    assert int(result.zero_gradients.sum()) > 0
    result = attack.run(lambda x: x.flatten(1)[:, :3] * 0, images, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(result.images, images)


@every_attack
def test_what_is_wrong_already_is_returned_as_it_is(attack: Attack) -> None:
    model, images = Linear(), grey()
    wrong = (model(images).argmax(1) + 1) % 4
    result = attack.run(model, images, wrong)
    assert torch.equal(result.images, images)
    assert bool(result.success.all())


@every_attack
def test_the_batch_split_changes_nothing(attack: Attack) -> None:
    model, images = Linear(), torch.rand(7, 1, 8, 8)
    images[0], images[1] = 0, 1
    labels = model(images).argmax(1)
    whole = attack(model, images, labels)
    index = torch.arange(7)
    parts = [attack(model, images[r], labels[r], index=index[r]) for r in (slice(0, 1), slice(1, 4), slice(4, 7))]
    assert torch.equal(whole, torch.cat(parts))


@every_attack
def test_two_classes(attack: Attack) -> None:
    model = Linear(classes=2)
    images = grey(8, model)
    labels = model(images).argmax(1)
    assert bool(attack.run(model, images, labels).success.all())
    assert bool(attack.run(model, images, labels, targets=1 - labels).success.all())


# DeepFool -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("overshoot", [0.02, 0.5])
def test_deepfool_is_the_closed_form_on_a_linear_model(norm: str, overshoot: float) -> None:
    model, images = Linear(), grey(32)
    labels = model(images).argmax(1)
    attack = DeepFool(norm=norm, overshoot=overshoot)  # type: ignore[arg-type]
    result = attack.run(model, images, labels)
    expected = (1 + overshoot) * closed_form(model, images, labels, norm).amin(1)
    assert bool(result.success.all())
    assert torch.allclose(distance(result.images, images, norm), expected, rtol=1e-4)
    assert (result.forwards, result.backwards) == (2, 3)  # one step, one backward pass per rival


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_meets_its_target_on_a_linear_model(norm: str) -> None:
    model = Linear(classes=2)
    images = grey(16, model)
    labels = model(images).argmax(1)
    x = DeepFool(norm=norm)(model, images, labels, targets=1 - labels)  # type: ignore[arg-type]
    expected = 1.02 * closed_form(model, images, labels, norm).amin(1)
    assert torch.allclose(distance(x, images, norm), expected, rtol=1e-4)


def test_deepfool_looks_at_the_top_classes_only() -> None:
    model = Linear(classes=6)
    images = grey(32, model)
    labels = model(images).argmax(1)
    runner_up = model(images).topk(2).indices[:, 1:]
    far = closed_form(model, images, labels)
    assert bool((far.gather(1, runner_up).squeeze(1) > far.amin(1) * 1.05).any()), "the test needs such an image"
    result = DeepFool(top_k=2).run(model, images, labels)
    assert bool(result.success.all())
    x = distance(result.images, images)
    direct = (x / 1.02 - far.gather(1, runner_up).squeeze(1)).abs() < 1e-4 * x
    assert float(direct.float().mean()) > 0.8  # the others met a third class on the way, at the same length or less
    assert int(result.backwards) <= 2


def test_deepfool_steps_over_the_boundary_however_near_it_is() -> None:
    # What stalled elsewhere: the last 1e-4, where a float32 step no longer changes the image.
    model = Linear(classes=2)
    images = grey(16, model)
    labels = model(images).argmax(1)
    almost = DeepFool(overshoot=0.0)(model, images, labels)
    images = (images + (almost - images) * (1 - 1e-6)).clamp(0, 1)
    labels = model(images).argmax(1)
    result = DeepFool(overshoot=0.0).run(model, images, labels)
    assert bool(result.success.all())
    assert float(distance(result.images, images).max()) < 1e-3


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("white", [0.0, 1.0])
def test_deepfool_succeeds_where_the_box_holds_most_pixels_back(norm: str, white: float) -> None:
    # Three pixels can help the rival; the other 61, with most of the gradient, already are at their limit.
    model = Linear(classes=2)
    inwards = 1 - 2 * white
    slope = torch.full((64,), -1.0)
    slope[:3] = torch.tensor([1.0, 0.8, 0.5])
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros(64), slope * inwards]))
        model.bias.copy_(torch.tensor([1.2, 0.0]) - white * model.weight.sum(1))
    image, label = torch.full((1, 1, 8, 8), white), torch.tensor([0])
    result = DeepFool(norm=norm).run(model, image, label)  # type: ignore[arg-type]
    assert bool(result.success.all())
    if norm == "l2":
        assert float(distance(result.images, image)) < 1.1 * float(nearest_in_box(model, image, label, 1 - label))
    else:  # the three by the same amount: 1.2 / 2.3
        assert float(distance(result.images, image, "linf")) < 1.1 * 1.2 / 2.3


def test_deepfool_is_no_farther_than_foolbox(cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    import foolbox

    model, images, labels = cnn
    success, theirs = of_foolbox(foolbox.attacks.L2DeepFoolAttack(candidates=10), model, images, labels)
    result = DeepFool().run(model, images, labels)
    ours = distance(result.images, images)
    assert bool((result.success >= success).all())
    assert float((ours / theirs).mean()) <= 1.002
    assert float((ours <= theirs * 1.03).float().mean()) >= 0.95
    assert float((ours >= theirs * 0.8).float().mean()) >= 0.95  # a much shorter way would be another attack


def test_deepfool_images_leave_when_they_have_fallen(cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = cnn
    result = DeepFool().run(model, images, labels)
    alone = [DeepFool().run(model, images[i : i + 1], labels[i : i + 1]) for i in range(8)]
    assert bool((result.queries[:8] >= torch.cat([r.queries for r in alone])).all())
    assert int(result.queries.max()) > int(result.queries.min())
    # In a batch an image pays for no more than one forward pass per step beyond its own steps.
    assert bool((result.queries[:8] <= 2 * torch.cat([r.queries for r in alone])).all())


# C&W ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_cw_is_near_the_closed_form_on_a_linear_model(classes: int) -> None:
    model = Linear(classes)
    images = grey(16, model)
    labels = model(images).argmax(1)
    result = CW().run(model, images, labels)
    ratio = distance(result.images, images) / closed_form(model, images, labels).amin(1)
    assert bool(result.success.all())
    assert float(ratio.min()) >= 1
    assert float(ratio.median()) < 1.01
    # It may come to rest on the boundary with another rival that is nearly as near.
    assert float(ratio.max()) < (1.02 if classes == 2 else 1.06)


def test_cw_moves_pixels_that_are_exactly_0_or_1() -> None:
    model = Linear(classes=2)
    images = (torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    labels = model(images).argmax(1)
    result = CW(lr=0.05).run(model, images, labels)
    ratio = distance(result.images, images) / nearest_in_box(model, images, labels, 1 - labels)
    assert bool(result.success.all())
    assert float(ratio.min()) > 1 - 1e-4
    assert float(ratio.max()) < 1.05


def test_cw_keeps_its_confidence(cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = cnn
    result = CW(confidence=3.0, steps=60, search_steps=5).run(model, images, labels)
    logits = model(result.images).detach()
    lead = logits.scatter(1, labels[:, None], -torch.inf).amax(1) - logits.gather(1, labels[:, None]).squeeze(1)
    assert bool(result.success.all())
    assert float(lead.min()) >= 3.0 - 1e-4
    assert float(lead.median()) < 3.5


def test_cw_is_no_farther_than_foolbox_at_the_same_passes(cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    import foolbox

    model, images, labels = cnn
    images, labels = images[:24], labels[:24]
    theirs = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=5, steps=60, stepsize=0.05, initial_const=1e-2, abort_early=False
    )
    success, theirs_far = of_foolbox(theirs, model, images, labels)
    result = CW(search_steps=5, steps=60, lr=0.05, initial_const=1e-2).run(model, images, labels)
    ours = distance(result.images, images)
    assert bool(result.success.all())
    assert int(result.queries.max()) <= 5 * 60 + 1
    both = success & result.success
    assert float(ours[both].mean()) <= float(theirs_far[both].mean())
    assert float((ours[both] <= theirs_far[both] * 1.05).float().mean()) >= 0.9


def test_cw_images_that_have_stalled_leave(cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = cnn
    settings: dict[str, Any] = {"steps": 60, "search_steps": 5}
    short = CW(**settings).run(model, images, labels)
    full = CW(**settings, abort_early=False).run(model, images, labels)
    assert bool((full.queries == 5 * 60 + 1).all())
    assert float(short.queries.float().mean()) < 0.9 * 5 * 60
    assert float(distance(short.images, images).mean()) < 1.02 * float(distance(full.images, images).mean())


# DDN ------------------------------------------------------------------------------------------------------------------


def test_ddn_is_near_the_closed_form_on_a_linear_model() -> None:
    model = Linear(classes=2)  # with more, cross-entropy's direction is a mixture of the rivals' at best
    images = grey(16, model)
    labels = model(images).argmax(1)
    result = DDN().run(model, images, labels)
    ratio = distance(result.images, images) / closed_form(model, images, labels).amin(1)
    assert bool(result.success.all())
    assert float(ratio.min()) >= 1
    assert float(ratio.max()) < 1.02


def test_ddn_is_that_of_foolbox(cnn: tuple[nn.Module, Tensor, Tensor]) -> None:
    import foolbox

    model, images, labels = cnn
    success, theirs = of_foolbox(foolbox.attacks.DDNAttack(steps=100), model, images, labels)
    result = DDN(steps=100).run(model, images, labels)
    ratio = distance(result.images, images) / theirs
    assert bool((result.success >= success).all())
    assert float(ratio.mean()) <= 1.002
    assert float(((ratio - 1).abs() < 0.02).float().mean()) >= 0.9


class ManyMeet(nn.Module):
    """A label that eight rivals approach along one half of the image and never pass, while a ninth, which falls there,
    passes it along the other half."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., :4].sum((1, 2, 3)), x[..., 4:].sum((1, 2, 3))
        near = -0.1 - 2 / (1 + left)
        ninth = -1 - left + 1.5 * right
        return torch.stack([torch.zeros_like(left), ninth, *[near] * 8], dim=1)


def test_ddn_leaves_the_place_where_many_classes_meet() -> None:
    import foolbox

    model, images, labels = ManyMeet(), torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    nearest = 1 / 1.5 / 32**0.5  # all 32 pixels of the right half alike
    result = DDN().run(model, images, labels)
    assert bool(result.success.all())
    assert bool((distance(result.images, images) < 1.1 * nearest).all())
    _, theirs = of_foolbox(foolbox.attacks.DDNAttack(steps=100), model, images, labels)
    assert bool((theirs > 2 * nearest).all())  # cross-entropy alone walks up to the eight


# Noise ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_spends_its_budget(kind: str) -> None:
    images = torch.rand(6, 1, 8, 8)
    images[0], images[1] = 0, 1
    x = Noise(norm="l2", eps=0.7, kind=kind)(Linear(), images, torch.zeros(6, dtype=torch.int64))  # type: ignore[arg-type]
    assert torch.allclose(l2_norm(x - images), torch.full((6,), 0.7), rtol=1e-4)
    x = Noise(norm="linf", eps=0.1, kind=kind)(Linear(), grey(6), torch.zeros(6, dtype=torch.int64))  # type: ignore[arg-type]
    assert torch.allclose(distance(x, grey(6), "linf"), torch.full((6,), 0.1), rtol=1e-4)


def test_noise_has_the_moments_of_its_name() -> None:
    images = torch.full((4, 1, 64, 64), 0.5)
    labels = torch.zeros(4, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 2))
    for kind, kurtosis in (("uniform", 1.8), ("gaussian", 3.0)):
        noise = (Noise(norm="l2", eps=2.0, kind=kind)(model, images, labels) - images).flatten(1).double()  # type: ignore[arg-type]
        assert float(noise.mean(1).abs().max()) < 4 * 2.0 / 64 / 64
        assert float((noise**4).mean() / (noise**2).mean() ** 2) == pytest.approx(kurtosis, rel=0.1)
        assert float((noise[0] @ noise[1]).abs()) < 4 * 4.0 / 64


def test_noise_meets_the_model_only_to_choose_among_draws() -> None:
    model, images = Linear(), torch.rand(16, 1, 8, 8)
    labels = model(images).argmax(1)
    one = Noise(eps=0.3).run(model, images, labels)
    assert (one.forwards, one.backwards) == (0, 0)
    many = Noise(eps=0.3, num_trials=20).run(model, images, labels)
    assert (many.forwards, many.backwards) == (20, 0)
    rows = torch.arange(16)
    context = AttackContext(model, images, labels, False, rows, 0, QueryCounter(), rows)
    trials = torch.stack([Noise(eps=0.3)._draw(context, d) for d in range(20)])
    logits = torch.stack([model(d) for d in trials])
    losses = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    fooled = logits.argmax(2) != labels  # a success before any higher loss
    losses = torch.where(fooled | ~fooled.any(0), losses, -torch.inf)
    assert torch.equal(trials[0], one.images)
    assert torch.equal(many.images, trials[losses.argmax(0), rows])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DeepFool(norm="l1"), "norm must be"),  # type: ignore[arg-type]
        (lambda: DeepFool(top_k=1), "top_k"),
        (lambda: CW(smoothing=1.0), "smoothing"),
        (lambda: CW(steps=0), "steps"),
        (lambda: DDN(gamma=1.5), "gamma"),
        (lambda: Noise(eps=0.1, kind="pink"), "kind must be"),  # type: ignore[arg-type]
        (lambda: Noise(eps=0.1, num_trials=0), "num_trials"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
