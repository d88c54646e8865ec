"""The probe: each of its numbers against a model of which it is known, and nothing of the model is changed."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabotaged import EPS, HONEST, Blur, GaussianNoise, accuracy, digits, plain
from unperturb.defenses import Defense, Protected
from unperturb.evaluation.probe import probe
from unperturb.systems import System

CLASSES = 4


class Linear(nn.Module):
    """Four classes of 4x4 images, told by the mean of a quarter: logits of a known size, gradients of a known one."""

    def __init__(self, scale: float = 40.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * F.avg_pool2d(images, 2).flatten(1)


def quarters(n: int = 16) -> tuple[Tensor, Tensor]:
    """`n` images of which the label's quarter is brighter, and the labels."""
    labels = torch.arange(n) % CLASSES
    images = torch.full((n, 1, 4, 4), 0.4)
    for image, label in zip(images, labels.tolist()):
        image[0, label // 2 * 2 : label // 2 * 2 + 2, label % 2 * 2 : label % 2 * 2 + 2] = 0.6
    return images + 0.01 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)), labels


def numbers(model: Any, **options: Any) -> dict[str, Any]:
    return probe(model, *quarters(), **{"eps": 0.05, **options})


NET = Linear()


def test_a_linear_model_is_what_it_is() -> None:
    found = numbers(NET)
    assert (found["n"], found["classes"], found["no_answer"], found["clean_accuracy"]) == (16, CLASSES, 0.0, 1.0)
    assert (found["random"], found["differentiable"], found["purifier"]) == (0, 1, 0)
    for nothing in (
        "repeat_difference", "batch_difference", "probabilities", "saturated", "known_images", "known_pattern",
        "no_gradient", "zero_gradient_clean", "zero_gradient_perturbed", "nan_gradient", "autograd_calls",
    ):  # fmt: skip
        assert found[nothing] == pytest.approx(0, abs=1e-5), nothing
    assert found["difference_error"] < 1e-3
    assert found["gradient_alignment"] > 0.9  # the weights of the other classes shift a little
    assert found["alignment_noise"] == pytest.approx(1 / math.sqrt(16 * 16))
    # A step of 0.05 up and 0.05 down closes half of the gap of 0.2; one of 0.25 turns it around.
    assert found["steps_accuracy"] == [1.0, 1.0]
    assert found["sweep_eps"] == [0.0625, 0.125, 0.25, 0.5]
    assert found["sweep_accuracy"] == [1.0, 0.0, 0.0, 0.0]
    assert found["noise_accuracy"] == 1.0
    assert "frozen_accuracy" not in found


def test_a_probe_is_the_same_twice_and_can_be_kept_as_json() -> None:
    torch.manual_seed(1)
    first = numbers(Linear())
    torch.manual_seed(2)
    assert numbers(Linear()) == first == json.loads(json.dumps(first, allow_nan=False))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_size_of_the_logits_is_no_fault(scale: float) -> None:
    found = numbers(Linear(scale))
    assert found["repeat_difference"] == 0
    assert found["batch_difference"] < 1e-4
    assert found["difference_error"] < 1e-2
    assert found["known_images"] == 0


# Answers -------------------------------------------------------------------------------------------------------------


def test_random_answers() -> None:
    assert numbers(lambda x: NET(x) + 0.1 * torch.randn(len(x), CLASSES))["repeat_difference"] > 1e-2
    assert numbers(lambda x: NET(x) + 1e-7 * torch.randn(len(x), CLASSES))["repeat_difference"] < 1e-4


@pytest.mark.parametrize("draw", [torch.rand, np.random.rand, lambda n: random.random()])
def test_a_random_model_can_be_held_whatever_it_draws_from(draw: Callable[[int], Any]) -> None:
    found = numbers(lambda x: NET(x) * (1 + 0.5 * torch.as_tensor(draw(1))).float())
    assert found["repeat_difference"] > 1e-4
    assert found["frozen_accuracy"] == 0.0
    assert found["difference_error"] < 1e-3
    assert "batch_difference" not in found


def test_what_cannot_be_held_is_not_measured() -> None:
    own = torch.Generator().manual_seed(0)
    found = numbers(lambda x: NET(x) * (1 + torch.rand(1, generator=own)))
    assert found["repeat_difference"] > 1e-4
    assert not {"frozen_accuracy", "difference_error", "gradient_alignment"} & set(found)


def test_probabilities_and_saturation() -> None:
    assert numbers(lambda x: NET(x).softmax(1))["probabilities"] == 1.0
    assert numbers(lambda x: NET(x).log_softmax(1))["probabilities"] == 0.0
    for scale, expected in ((100.0, 0.0), (1e4, 1.0)):  # the first logit is ahead by 20, and by 2000
        found = numbers(Linear(scale))
        assert found["saturated"] == expected
        assert found["zero_gradient_clean"] == expected


BATCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "its mean": lambda x: NET(x + x.mean(0, keepdim=True) - 0.5),
    "its size": lambda x: NET(x) + len(x) * torch.eye(CLASSES)[0] / 4,
    "its order": lambda x: NET(x) * (1 + torch.arange(len(x))[:, None] % 2),
    "its first image": lambda x: NET(x) + NET(x[:1]),
    "batch norm that has no memory": nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), NET),
}


@pytest.mark.parametrize("model", BATCHES.values(), ids=BATCHES)
def test_what_depends_on_the_batch(model: Callable[[Tensor], Tensor]) -> None:
    assert numbers(model)["batch_difference"] > 0.05


def test_batch_norm_that_is_merely_in_train_mode_is_asked_in_eval_mode() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), NET).train()
    assert numbers(net)["batch_difference"] < 1e-4
    assert net[0].training


def test_autograd_inside() -> None:
    def searches(x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().clone().requires_grad_()
            for _ in range(3):
                z = z - 0.1 * torch.autograd.grad((z - x).square().sum(), z)[0]
        return NET(z)

    def goes_back(x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().clone().requires_grad_()
            z.square().sum().backward()
        return NET(x)

    before = torch.autograd.grad, torch.autograd.backward
    assert numbers(searches)["autograd_calls"] == 3
    assert numbers(goes_back)["autograd_calls"] == 1
    assert (torch.autograd.grad, torch.autograd.backward) == before


def test_images_without_an_answer() -> None:
    dark = quarters()[0][:, 0, :2, :2].mean((1, 2)) < 0.5  # three in four

    def nan(x: Tensor) -> Tensor:
        return NET(x).masked_fill((x[:, 0, :2, :2].mean((1, 2)) < 0.5)[:, None], torch.nan)

    def raises(x: Tensor) -> Tensor:
        if bool((x[:, 0, :2, :2].mean((1, 2)) < 0.5).any()):
            raise KeyError("dark")
        return NET(x)

    for model in (nan, raises):
        found = numbers(model)
        assert found["no_answer"] == pytest.approx(float(dark.float().mean()))
        assert found["clean_accuracy"] == 1.0  # of the images that have one
        json.dumps(found, allow_nan=False)
    with pytest.raises(KeyError, match="nothing"):
        numbers(lambda x: {}["nothing"])
    with pytest.raises(ValueError, match="must return logits"):
        numbers(lambda x: x)
    assert numbers(lambda x: NET(x) * torch.nan)["no_answer"] == 1.0


def test_images_and_patterns_that_are_known() -> None:
    images, labels = quarters()

    def looks_up(x: Tensor) -> Tensor:
        known = (x[:, None] == images[None]).flatten(2).all(2)
        return torch.where(known.any(1, keepdim=True), 9.0 * F.one_hot(labels[known.float().argmax(1)], 4), NET(x))

    def by_gray_level(x: Tensor) -> Tensor:
        known = ((x[:, None] * 255).round() == (images[None] * 255).round()).flatten(2).all(2)
        return torch.where(known.any(1, keepdim=True), 9.0 * F.one_hot(labels[known.float().argmax(1)], 4), NET(x))

    def undoes_a_step(x: Tensor) -> Tensor:
        away = x[:, None] - images[None]
        nearest = away.flatten(2).abs().amax(2).argmin(1)
        step = away[torch.arange(len(x)), nearest].abs().flatten(1)
        known = (step - 0.05).abs().amax(1) < 1e-5
        return NET(torch.where(known[:, None, None, None], images[nearest], x)) * (1 + known[:, None])

    assert numbers(looks_up)["known_images"] == 1.0
    assert numbers(by_gray_level)["known_images"] == 1.0
    assert numbers(undoes_a_step)["known_images"] == 0.0
    assert numbers(undoes_a_step)["known_pattern"] == 1.0
    # An answer by heart in front of nothing: one gray level of noise, and it is gone.
    assert numbers(lambda x: looks_up(x) * (looks_up(x) == 9.0))["nudged_accuracy"] < 0.5


# Gradients -----------------------------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """The identity, with a gradient of another size, or of noise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (torch.randn_like(gradient) if ctx.factor == 0 else gradient * ctx.factor), None


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "half of it": lambda x: NET((x + x.detach()) / 2),
    "twice": lambda x: NET(Scaled.apply(x, 2.0)),
    "the other way": lambda x: NET(Scaled.apply(x, -1.0)),
    "noise": lambda x: NET(Scaled.apply(x, 0.0)),
    "of the left side alone": lambda x: NET(torch.cat([x[..., :2], x[..., 2:].detach()], 3)),
}


@pytest.mark.parametrize("model", WRONG.values(), ids=WRONG)
def test_a_gradient_that_is_not_the_slope(model: Callable[[Tensor], Tensor]) -> None:
    assert numbers(model)["difference_error"] > 0.3


HONEST_KINKS: dict[str, nn.Module] = {
    "relu": nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES)),
    "max pooling": nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)),
    "absolute value of flat pixels": nn.Sequential(nn.Hardtanh(0.4, 0.6), NET),
    "bfloat16": nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES)).bfloat16(),
}


@pytest.mark.parametrize("name", HONEST_KINKS)
def test_kinks_and_few_bits_are_no_wrong_gradient(name: str) -> None:
    net = HONEST_KINKS[name]
    for seed, p in enumerate(net.parameters()):
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(seed))
    assert numbers(net)["difference_error"] < 0.25


def test_a_gradient_that_is_missing_or_none() -> None:
    @torch.no_grad()
    def silent(x: Tensor) -> Tensor:
        return NET(x)

    found = numbers(silent)
    assert found["no_gradient"] == 1
    assert not {"zero_gradient_clean", "sweep_accuracy", "known_pattern"} & set(found)
    rounded = numbers(lambda x: NET((x * 15).round() / 15))
    assert (rounded["no_gradient"], rounded["zero_gradient_clean"], rounded["difference_images"]) == (0, 1.0, 0)
    roots = numbers(lambda x: NET(x) + (x.flatten(1).sum(1, keepdim=True) * 0).sqrt())
    assert roots["nan_gradient"] == 1.0


def test_gradients_of_noise_are_not_aligned() -> None:
    found = numbers(WRONG["noise"])
    assert abs(found["gradient_alignment"]) < 6 * found["alignment_noise"]  # the sum of 16 random cosines


def test_an_attack_that_goes_nowhere_is_seen_at_half_of_the_range() -> None:
    assert numbers(WRONG["the other way"])["sweep_accuracy"][-1] > 0.5  # but for its random start it would be 1
    assert numbers(NET)["sweep_accuracy"][-1] == 0.0


def test_l2() -> None:
    # A step of L2 length d moves each of 2 x 4 pixels by d / sqrt(8): 0.1 of each takes d = 0.28.
    assert numbers(NET, norm="l2", eps=0.2)["steps_accuracy"] == [1.0, 1.0]
    assert numbers(NET, norm="l2", eps=0.4)["steps_accuracy"] == [0.0, 0.0]
    assert numbers(NET, norm="l2", eps="1/10")["eps"] == 0.1


# Systems -------------------------------------------------------------------------------------------------------------


class Steps(Defense):
    """Rounding that says it has no gradient: an attacker gets its surrogate's."""

    differentiable = False

    def purify(self, images: Tensor) -> Tensor:
        return (images * 15).round() / 15


class Dear(Blur):
    held_out = 100

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def purify(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return super().purify(images)


def test_what_is_declared_is_probed_as_an_attacker_meets_it() -> None:
    found = numbers(System("steps", NET, Steps()))
    assert (found["differentiable"], found["purifier"], found["zero_gradient_clean"]) == (0, 1, 0.0)
    assert "difference_error" not in found, "a surrogate's gradient is another function's"
    assert found["sweep_accuracy"][-1] == 0.0
    noisy = numbers(System("noise", NET, GaussianNoise()))
    assert noisy["random"] == 1
    assert noisy["difference_error"] < 0.01
    assert noisy["frozen_accuracy"] == 0.0
    assert numbers(Protected(NET, Blur()))["purifier"] == 1


def test_a_dear_purifier_is_asked_little() -> None:
    purifier = Dear()
    found = numbers(System("dear", NET, purifier))
    assert found["n"] == 4
    assert "batch_difference" in found
    assert "sweep_accuracy" not in found
    assert purifier.images < 60


@pytest.mark.parametrize("name", HONEST)
def test_honest_systems_are_far_from_every_limit(name: str) -> None:
    system = HONEST[name]()
    found = probe(system, *digits(), eps=EPS)
    for nothing in ("saturated", "zero_gradient_clean", "zero_gradient_perturbed", "known_images", "known_pattern"):
        assert found[nothing] <= 0.05, nothing
    assert found.get("batch_difference", 0) < 1e-3
    assert found.get("difference_error", 0) < 0.1
    assert found["gradient_alignment"] > 10 * found["alignment_noise"]
    assert found["sweep_accuracy"][-1] <= 0.05
    assert found["clean_accuracy"] - found["nudged_accuracy"] <= 0.05
    if not system.random:
        assert found["clean_accuracy"] == pytest.approx(accuracy(system.model, digits()[0]))


# What is left behind -------------------------------------------------------------------------------------------------


class Moody(nn.Module):
    """Moves its buffer in every mode, and draws from everybody's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        self.seen = self.seen + float(np.random.rand()) + random.random() + torch.rand(1)  # noqa: NPY002
        return NET(images) * self.weight


def test_nothing_is_changed() -> None:
    net = Moody().train()
    buffer = net.seen
    images, labels = quarters()
    kept = images.clone(), labels.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    probe(net, images, labels)
    assert net.training
    assert net.weight.requires_grad
    assert net.weight.grad is None
    assert net.seen is buffer
    assert float(net.seen) == 0.0
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert torch.is_grad_enabled()


def test_a_model_that_writes_over_its_input_writes_over_no_image() -> None:
    images, labels = quarters()
    kept = images.clone()
    probe(lambda x: NET(x.mul_(0.5)), images, labels)
    assert torch.equal(images, kept)


def test_it_says_nothing_and_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers(Linear(1e5))  # whose gradients are zero: attacks warn of that


def test_inference_mode_is_left() -> None:
    with torch.inference_mode():
        assert numbers(NET)["no_gradient"] == 0


def test_what_is_no_data_is_a_sentence() -> None:
    images, labels = quarters()
    with pytest.raises(ValueError, match="at least two images, better 32, not 1"):
        probe(NET, images[:1], labels[:1])
    with pytest.raises(ValueError, match="need labels of shape"):
        probe(NET, images, labels[:3])
    with pytest.raises(ValueError, match="norm must be"):
        probe(NET, images, labels, norm="l0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must lie in"):
        probe(NET, images * 255, labels)


def test_the_plain_net_of_the_digits_is_worth_its_name() -> None:
    images, _ = digits()
    assert accuracy(plain(), images) > 0.85
