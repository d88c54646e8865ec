"""Models and images as their owners bring them: each is attacked as it is, or refused in a sentence."""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unperturb.attackers import BPDA, Attacker
from unperturb.attacks import create_attack
from unperturb.attacks.context import NoGradientError
from unperturb.classifiers import Classifier, Normalize, create_classifier, fused_copy, wrap
from unperturb.defenses import Defense, Protected, create_defense
from unperturb.modules import ask, classes_of, deep_copy, frozen, logits_of, modules_of
from unperturb.systems import System
from unperturb.threat_models import KNOWLEDGE, budget
from unperturb.validation import check_images

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
PGD = create_attack("pgd", eps=0.2, steps=4, random_start=False)
SQUARE = create_attack("square", eps=0.2, queries=6)


def linear(classes: int = 3, seed: int = 0) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(classes, 64, generator=generator) * 0.3)
        net[1].bias.copy_(-net[1].weight.sum(1) / 2)
    return net.eval()


LABELS = linear()(IMAGES).argmax(1)
EXPECTED = PGD(linear(), IMAGES, LABELS)  # what PGD finds on the plain net


class Around(nn.Module):
    """A function of `net`'s answer, or of what it is given, as a module."""

    def __init__(self, net: nn.Module, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.how = net, forward

    def forward(self, x: Tensor) -> Any:
        return self.how(self.net, x)


# No number -----------------------------------------------------------------------------------------------------------


def test_an_image_without_finite_logits_is_a_wrong_answer_and_harms_no_other() -> None:
    net, images = linear(), IMAGES.clone()
    images[2] = 1.0  # 0.8 at least, wherever an attack of 0.2 leads it; the others 0.7 at most, on average

    def broken(x: Tensor) -> Tensor:
        return torch.where((x.mean((1, 2, 3)) > 0.75)[:, None], torch.nan, net(x))

    with pytest.warns(UserWarning, match="the logits of 1 of 6 images were NaN or infinite"):
        result = SQUARE.run(broken, images, LABELS)
    assert bool(result.success[2])
    torch.testing.assert_close(result.images[3:], SQUARE(net, images, LABELS)[3:], rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="1 of 6"):
        result = PGD.run(broken, images, LABELS)
    # Its gradient is not a number where it stands, so it stays there; the rest is as if nothing had been.
    assert torch.equal(result.images[2], images[2])
    rest = [0, 1, 3, 4, 5]
    torch.testing.assert_close(result.images[rest], EXPECTED[rest], rtol=0, atol=1e-6)
    assert bool(result.success[2])
    assert (result.nonfinite > 0).tolist() == [False, False, True, False, False, False]
    # It is no success for who wants one class of it.
    with pytest.warns(UserWarning, match="1 of 6"):
        aimed = create_attack("pgd", eps=0.0, steps=1).run(broken, images, LABELS, targets=(LABELS + 1) % 3)
    assert not bool(aimed.success[2])


def test_a_gradient_that_is_not_a_number_moves_nothing() -> None:
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.index_fill(0, torch.tensor([0]), torch.nan)

    net = linear()
    for norm in ("linf", "l2"):
        attack = create_attack("pgd", eps=0.2, norm=norm, steps=4, random_start=False)
        with pytest.warns(UserWarning, match="the gradient of 1 of 6 images was exactly zero"):
            found = attack.run(lambda x: net(Root.apply(x)), IMAGES, LABELS)
        assert torch.equal(found.images[0], IMAGES[0])
        assert found.zero_gradients.tolist() == [4, 0, 0, 0, 0, 0]
        torch.testing.assert_close(found.images[1:], attack(net, IMAGES, LABELS)[1:], rtol=0, atol=1e-6)


# No gradient ---------------------------------------------------------------------------------------------------------


def test_inference_mode_is_left() -> None:
    net = linear()
    with torch.inference_mode():
        found = PGD(net, IMAGES.clone(), LABELS.clone())
        result = PGD.run(fused_copy(net, IMAGES.clone()), IMAGES.clone(), LABELS.clone(), index=torch.arange(6))
        wrapped = PGD(wrap(net), IMAGES, LABELS)
    for images in (found, result.images, wrapped):
        torch.testing.assert_close(images, EXPECTED, rtol=0, atol=1e-6)
        assert not images.is_inference()
    assert bool(result.success.any())


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = linear()
    with pytest.raises(ValueError, match=r"was made in torch.inference_mode .* copy.deepcopy it, outside"):
        PGD(net, IMAGES, LABELS)

    class ByQueries(type(SQUARE)):  # type: ignore[misc]
        needs_gradient = False

    assert ByQueries(eps=0.2, queries=6)(net, IMAGES, LABELS).shape == IMAGES.shape
    torch.testing.assert_close(PGD(deep_copy(net), IMAGES, LABELS), EXPECTED, rtol=0, atol=1e-6)


def without_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize("how", [without_grad, lambda net, x: net(x.detach()), lambda net, x: net(x).detach()])
@pytest.mark.parametrize("name", ["pgd", "cw", "deepfool", "apgd"])
def test_no_gradient_is_an_error_and_not_robustness(how: Callable[..., Tensor], name: str) -> None:
    attack = create_attack(name, **({"eps": 0.2} if name in ("pgd", "apgd") else {}))
    with pytest.raises(NoGradientError, match=r"gives no gradient.*\(square, rays\).*bpda"):
        attack(Around(linear(), how), IMAGES, LABELS)
    assert SQUARE(Around(linear(), how), IMAGES, LABELS).shape == IMAGES.shape


def test_zero_gradients_are_told() -> None:
    net = linear()
    with pytest.warns(UserWarning, match="the gradient of 6 of 6 images was exactly zero"):
        x, counter = PGD(lambda x: net((x * 4).round() / 4), IMAGES, LABELS), None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, counter = PGD.solve(lambda x: net((x * 4).round() / 4), IMAGES, LABELS)
        assert torch.equal(PGD(net, IMAGES, LABELS), EXPECTED)
    assert torch.equal(x, IMAGES)
    assert counter.zero_gradients.tolist() == counter.gradients.tolist() == [4] * 6
    assert counter.zero_gradient.tolist() == [1.0] * 6
    _, counter = PGD.solve(net, IMAGES, LABELS)
    assert counter.zero_gradient.tolist() == [0.0] * 6


def test_a_gradient_that_nobody_asked_for_is_not_zero() -> None:
    # C&W's weight on the model is 0 wherever the image has fallen.
    result = create_attack("cw", steps=10, search_steps=2).run(linear(), IMAGES, LABELS)
    assert bool(result.success.all())
    assert int(result.zero_gradients.sum()) == 0
    assert bool((result.gradients < result.queries).all())


# Logits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda net, x: net(x)[:, 0], r"it returned \(6,\), one logit per image: .*wrap\(model, binary=True\)"),
        (lambda net, x: net(x)[:, :1], r"it returned \(6, 1\), one logit per image: .*wrap\(model, binary=True\)"),
        (lambda net, x: {"logits": net(x)}, r"it returned dict: pass .* output\.logits"),
        (lambda net, x: (net(x), x), "it returned tuple"),
        (lambda net, x: net(x).argmax(1)[:, None].expand(-1, 3), "it returned torch.int64: classes, perhaps"),
        (lambda net, x: net(x)[None], r"it returned \(1, 6, 3\)"),
    ],
)
def test_what_is_no_logits(how: Callable[..., Any], message: str) -> None:
    for attack in (PGD, SQUARE):
        with pytest.raises(ValueError, match=message):
            attack(Around(linear(), how), IMAGES, LABELS)


def test_logits_are_looked_at_on_every_pass() -> None:
    net = linear()
    squeezing = Around(net, lambda net, x: net(x).squeeze(0))  # as it must be, but for a batch of one
    assert PGD(squeezing, IMAGES, LABELS).shape == IMAGES.shape
    alone = create_attack("square", eps=1.0, queries=200)
    with pytest.raises(ValueError, match=r"shape \(1, classes\), it returned \(3,\): a single image is a batch too"):
        alone(squeezing, IMAGES[:1], LABELS[:1])
    calls = []

    def growing(x: Tensor) -> Tensor:
        calls.append(1)
        return linear(3 if len(calls) < 3 else 4)(x)

    with pytest.raises(ValueError, match="returned 4 classes, and 3 before"):
        PGD(growing, IMAGES, LABELS)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("function", [True, False])
def test_one_logit_becomes_two(flat: bool, function: bool) -> None:
    net = linear(1)
    model: Any = Around(net, lambda net, x: net(x)[:, 0] if flat else net(x))
    binary = wrap((lambda x: model(x)) if function else model, size=8, channels=1, binary=True)
    logits, z = binary(IMAGES), net(IMAGES)
    assert torch.equal(logits, torch.cat([torch.zeros_like(z), z], 1))
    torch.testing.assert_close(logits.softmax(1)[:, 1:], z.sigmoid())
    result = create_attack("pgd", eps=0.3).run(binary, IMAGES, logits.argmax(1))
    # In Linf the linear net's logit moves by eps |w|_1, less what the box leaves out: all can be turned here.
    assert bool(result.success.all())
    with pytest.raises(ValueError, match=r"gives one logit per image; this one gave \(6, 3\)"):
        wrap(linear(), binary=True)(IMAGES)


@pytest.mark.parametrize("flat", [True, False])
def test_two_logits_decide_and_differentiate_as_the_one(flat: bool) -> None:
    # Seven logits that floats hold exactly, one of them 0, which is not above 0.
    given = torch.tensor([-8.0, -1.0, -0.25, 0.0, 0.25, 1.0, 8.0])
    images = given.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    binary = wrap(lambda x: x[:, 0, 0, 0] if flat else x[:, 0, :1, 0], binary=True)
    assert torch.equal(binary(images).argmax(1), (given > 0).long())
    for label in (0, 1):
        one, two = images.clone().requires_grad_(), images.clone().requires_grad_()
        labels = torch.full((7,), label)
        nn.functional.binary_cross_entropy_with_logits(one[:, 0, 0, 0], labels.float(), reduction="sum").backward()
        nn.functional.cross_entropy(binary(two), labels, reduction="sum").backward()
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-6, atol=1e-7)
    # The margin, z - 0, has the gradient of z, bit for bit.
    x, y = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    net = linear(1)
    logits = wrap(net, binary=True)(x)
    (logits[:, 1] - logits[:, 0]).sum().backward()
    net(y).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


# Callables, and logits that are inside of an answer -------------------------------------------------------------------


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As that of Hugging Face's transformers: fields by name, by key and by place; those that are None are left out."""

    def __init__(self, **fields: Any) -> None:
        super().__init__({name: value for name, value in fields.items() if value is not None})
        for name, value in fields.items():
            setattr(self, name, value)

    def __getitem__(self, key: str | int) -> Any:
        return tuple(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


Named = namedtuple("Named", ["features", "logits"])  # as torchvision's inception in training


@pytest.mark.parametrize("function", [True, False])
@pytest.mark.parametrize(
    ("how", "logits"),
    [
        (lambda net, x: net(x), None),
        (lambda net, x: ModelOutput(loss=None, logits=net(x), hidden_states=(x,)), None),
        (lambda net, x: SimpleNamespace(logits=net(x)), None),
        (lambda net, x: Named(x, net(x)), None),
        (lambda net, x: {"logits": net(x), "loss": None}, "logits"),
        (lambda net, x: {"out": net(x), "cls_logits": x}, "out"),
        (lambda net, x: ModelOutput(logits=net(x), cls_logits=x), "logits"),
        (lambda net, x: ModelOutput(loss=x, logits=net(x)), 1),
        (lambda net, x: (net(x), x), 0),
        (lambda net, x: [x, net(x)], -1),
        (lambda net, x: SimpleNamespace(scores=net(x)), "scores"),
        (lambda net, x: {"deep": [{"y": net(x) / 2}]}, lambda answer: 2 * answer["deep"][0]["y"]),
        (lambda net, x: net(x).double().exp(), torch.log),
    ],
)
def test_logits_are_found_in_the_answer_and_attacked_as_if_they_were_alone(
    how: Callable[..., Any], logits: Any, function: bool
) -> None:
    model = Around(linear(), how)
    wrapped = wrap((lambda x: model(x)) if function else model, size=8, channels=1, classes=3, logits=logits)
    torch.testing.assert_close(wrapped(IMAGES).float(), linear()(IMAGES), rtol=1e-5, atol=1e-5)
    assert wrapped.differentiable
    torch.testing.assert_close(PGD(wrapped, IMAGES, LABELS), EXPECTED, rtol=0, atol=1e-5)
    torch.testing.assert_close(PGD(fused_copy(wrapped, IMAGES), IMAGES, LABELS), EXPECTED, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        PGD(Protected(wrapped, create_defense("identity")), IMAGES, LABELS), EXPECTED, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("how", "logits", "message"),
    [
        (lambda net, x: {"logits": net(x)}, None, r"dict of logits \(6, 3\); say where .* wrap\(model, logits=...\)"),
        (lambda net, x: (net(x), x), None, r"tuple of 0 \(6, 3\), 1 \(6, 1, 8, 8\); say where"),
        (
            lambda net, x: ModelOutput(logits=net(x), cls_logits=x),
            None,
            r"ModelOutput of logits .*, cls_logits .*; say",
        ),
        (lambda net, x: ModelOutput(logits=None, loss=x), None, "ModelOutput of loss .*; say where"),
        (lambda net, x: net(x).detach().numpy(), None, "answers with ndarray; say where"),
        (lambda net, x: None, None, "answers with NoneType; say where"),
        (lambda net, x: {"out": net(x)}, "logits", r"logits='logits' is not in .* dict of out \(6, 3\)"),
        (lambda net, x: {"out": net(x)}, 0, "logits=0 is not in .* dict of out"),
        (lambda net, x: (net(x),), 1, r"logits=1 is not in .* tuple of 0 \(6, 3\)"),
        (lambda net, x: (net(x),), "out", "logits='out' is not in .* tuple"),
        (lambda net, x: (net(x), "text"), 1, "logits=1 finds str, where the tensor"),
        (lambda net, x: net(x), 0, r"answers with the one tensor \(6, 3\): leave logits out"),
        (lambda net, x: {"out": net(x)}, lambda answer: answer, "finds dict of out"),
    ],
)
def test_where_the_logits_are_is_asked_for(how: Callable[..., Any], logits: Any, message: str) -> None:
    model = wrap(Around(linear(), how), logits=logits)
    for attack in (PGD, SQUARE):
        with pytest.raises(ValueError, match=message):
            attack(model, IMAGES, LABELS)


@pytest.mark.parametrize("logits", [True, 1.5, ["out"]])
def test_a_hook_that_cannot_be_one(logits: Any) -> None:
    with pytest.raises(TypeError, match=r"expected wrap\(model, logits=...\): a key, an index, or a function"):
        wrap(linear(), logits=logits)


def test_a_hook_and_one_logit_go_together() -> None:
    net = linear(1)
    binary = wrap(Around(net, lambda net, x: {"score": net(x)}), logits="score", binary=True, size=8, channels=1)
    assert torch.equal(binary(IMAGES)[:, 1:], net(IMAGES))


def test_a_callable_is_a_classifier_and_what_is_behind_it_stays_as_it_is() -> None:
    for number, model in enumerate(around(learning())):
        seen = next(m for m in modules_of(model) if isinstance(m, nn.Dropout))  # in train mode it would draw
        wrapped = wrap(model)
        assert isinstance(wrapped, Classifier)
        first = wrapped(IMAGES)
        assert torch.equal(first, wrapped(IMAGES)), number
        assert seen.training
        assert torch.equal(first, fused_copy(wrapped, IMAGES)(IMAGES))
        assert seen.training
        assert PGD(wrapped, IMAGES, LABELS).shape == IMAGES.shape
        wrapped(IMAGES.clone().requires_grad_()).sum().backward()  # as a training through it does
        assert all(p.grad is None for m in modules_of(model) for p in m.parameters())


def test_a_callable_is_normalized_and_asked_in_the_dtype_that_it_takes() -> None:
    net = linear().double()
    wrapped = wrap(lambda x: net(x), [0.25], [0.5], size=8)
    torch.testing.assert_close(wrapped(IMAGES).float(), linear()((IMAGES - 0.25) / 0.5), rtol=1e-5, atol=1e-5)


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy().reshape(len(x), -1) @ WEIGHTS)


WEIGHTS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)


@pytest.mark.parametrize("how", [by_numpy, lambda x: by_numpy(x.detach()), lambda x: without_grad(linear(), x)])
def test_a_callable_without_a_gradient_is_attacked_by_queries(how: Callable[[Tensor], Tensor]) -> None:
    wrapped = wrap(how, size=8, channels=1)
    assert not wrapped.differentiable
    labels = wrapped(IMAGES).argmax(1)
    assert SQUARE(wrapped, IMAGES, labels).shape == IMAGES.shape
    with pytest.raises((NoGradientError, RuntimeError), match=r"gives no gradient|detach\(\)"):
        PGD(wrapped, IMAGES, labels)
    assert wrap(lambda x: linear()(x), size=8, channels=1).differentiable


def test_a_fused_copy_looks_at_what_it_returns() -> None:
    with pytest.raises(ValueError, match="binary=True"):
        fused_copy(linear(1), IMAGES)(IMAGES)


def test_what_is_not_finite_is_no_class() -> None:
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [0.0, torch.inf], [2.0, 1.0]])
    assert classes_of(logits).tolist() == [1, -1, -1, 0]


# Models that write over what they get --------------------------------------------------------------------------------


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    x -= 0.5
    x *= 2
    return net(x)


@pytest.mark.parametrize("name", ["pgd", "square", "rays", "autoattack", "cw", "fab-t", "jsma"])
def test_each_pass_has_a_tensor_of_its_own(name: str) -> None:
    options: dict[str, Any] = {"autoattack": {"eps": 0.2, "steps": 3, "queries": 6, "target_classes": 1}}.get(name, {})
    options |= {"pgd": {"eps": 0.2, "steps": 3}, "square": {"eps": 0.2, "queries": 6}, "rays": {"queries": 20}}.get(
        name, {}
    )
    options |= {"cw": {"steps": 5, "search_steps": 1}, "fab-t": {"steps": 3}}.get(name, {})
    attack, images = create_attack(name, **options), IMAGES.clone()
    result = attack.run(Around(linear(), in_place), images, LABELS)
    assert torch.equal(images, IMAGES)
    expected = attack.run(Around(linear(), lambda net, x: net((x - 0.5) * 2)), images, LABELS)
    torch.testing.assert_close(result.images, expected.images, rtol=0, atol=1e-6)
    assert torch.equal(result.success, expected.success)
    if hasattr(attack, "eps"):
        assert attack.eps is None or float((result.images - images).abs().max()) <= attack.eps + 1e-6


class InPlace(Defense):
    def purify(self, images: Tensor) -> Tensor:
        return images.mul_(0.5)


def test_protected_writes_over_nothing() -> None:
    images = IMAGES.clone()
    for defense in (InPlace(), create_defense("identity")):
        with torch.no_grad():
            Protected(Around(linear(), in_place), defense)(images)
        wrap(Around(linear(), in_place))(images)
    assert torch.equal(images, IMAGES)


# What is put in front of others is not changed -----------------------------------------------------------------------


def learning() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(72, 3)).train()


class Norm(Defense):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def purify(self, images: Tensor) -> Tensor:
        return self.norm(images).sigmoid()


def flags(module: nn.Module) -> list[bool]:
    return [m.training for m in module.modules()] + [p.requires_grad for p in module.parameters()]


@pytest.mark.parametrize("mode", ["as it is", "train", "a part of it"])
def test_protected_neither_trains_nor_changes_its_parts(mode: str) -> None:
    net, defense = learning(), Norm().train()
    net[1].eval()  # a norm that its owner holds still
    before = {k: v.clone() for m in (net, defense) for k, v in m.state_dict().items()}
    modes = flags(net), flags(defense)
    protected = Protected(net, defense)
    if mode == "train":
        assert protected.train().training
    elif mode == "a part of it":
        nn.Sequential(protected).train()
    first = protected(IMAGES)
    assert torch.equal(first, protected(IMAGES))  # no dropout either
    assert (flags(net), flags(defense)) == modes
    protected.rejects(IMAGES)
    PGD(protected, IMAGES, LABELS)
    assert (flags(net), flags(defense)) == modes
    after = {k: v for m in (net, defense) for k, v in m.state_dict().items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    net.eval(), defense.eval()
    assert torch.equal(protected(IMAGES), first)
    assert not any(m.training for m in Protected(net, defense).train().classifier.modules())
    # A purifier can still be tuned through it.
    first[:, 0].sum().backward()
    assert defense.norm.weight.grad is not None


class Pipeline:
    """No module, but it holds one."""

    def __init__(self, net: nn.Module) -> None:
        self.parts = {"net": [net]}

    def __call__(self, x: Tensor) -> Tensor:
        return self.parts["net"][0](x)

    def predict(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self(x) * scale


def apply(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def inner(*args: Any) -> Tensor:
        return function(*args)

    return inner


GLOBAL = learning()


def around(net: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    yield lambda x: net(x)
    yield functools.partial(apply, net)
    yield net.forward
    yield Pipeline(net)
    yield Pipeline(net).predict
    yield functools.partial(Pipeline(net).predict, scale=2.0)
    yield decorated(lambda x: Pipeline(net)(x))
    yield lambda x: torch.stack([f(x) for f in (net, net)]).mean(0)
    yield lambda x, model=net: model(x)
    yield Around(nn.Identity(), lambda _, x: net(x))
    yield BPDA(lambda x: net(x), surrogate_backward=lambda x: x.flatten(1)[:, :3])
    yield lambda x: GLOBAL(x)


def test_the_module_behind_a_callable_is_seen() -> None:
    net = learning()
    for number, model in enumerate(around(net)):
        seen = GLOBAL if number == 11 else net
        assert seen in modules_of(model), number
        before, modes = {k: v.clone() for k, v in seen.state_dict().items()}, flags(seen)
        assert PGD(model, IMAGES, LABELS).shape == IMAGES.shape
        assert all(torch.equal(v, before[k]) for k, v in seen.state_dict().items()), number
        assert flags(seen) == modes
        assert all(p.grad is None for p in seen.parameters())
        with frozen(model):
            assert not any(flags(seen))
    assert modules_of(lambda x: torch.nn.functional.relu(x)) == []


# Pixels and budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: (x * 255).to(torch.uint8), TypeError, "divide 8-bit images by 255"),
        (lambda x: x * 255, ValueError, r"must lie in \[0, 1\], found .*divide pixels of 0 to 255 by 255"),
        (lambda x: x * 2 - 1, ValueError, "normalization belongs in the classifier's first layer"),
        (lambda x: x[0], ValueError, r"shape \(N, C, H, W\), not \(1, 8, 8\)"),
    ],
)
@pytest.mark.parametrize("gradient", [True, False])
def test_protected_refuses_pixels_of_another_scale(
    change: Callable[[Tensor], Tensor], error: type[Exception], message: str, gradient: bool
) -> None:
    with torch.set_grad_enabled(gradient), pytest.raises(error, match=message):
        Protected(linear(), create_defense("identity"))(change(IMAGES))
    with pytest.raises(error, match=message):
        Protected(linear(), create_defense("identity")).rejects(change(IMAGES))


def test_after_the_first_call_only_what_costs_nothing_is_looked_at_where_a_gradient_is_wanted() -> None:
    protected = Protected(linear(), create_defense("identity"))
    protected(IMAGES)
    protected(IMAGES + 2)
    with pytest.raises(TypeError, match="divide 8-bit"):
        protected((IMAGES * 255).to(torch.uint8))
    with torch.no_grad(), pytest.raises(ValueError, match="must lie in"):
        protected(IMAGES + 2)


def test_an_overshoot_by_rounding_is_cut() -> None:
    images = IMAGES.clone()
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1 + 1e-6, -1e-6
    assert check_images(IMAGES) is IMAGES
    torch.testing.assert_close(check_images(images), images.clamp(0, 1), rtol=0, atol=0)
    assert torch.equal(PGD(linear(), images, LABELS), PGD(linear(), images.clamp(0, 1), LABELS))
    images[0, 0, 0, 0] = 1.00001
    with pytest.raises(ValueError, match=r"found \[-1e-06, 1\.00001\]"):
        check_images(images)


def test_uint8_and_statistics_of_another_scale_are_refused_by_the_normalization() -> None:
    with pytest.raises(TypeError, match="divide 8-bit images by 255"):
        wrap(linear(), [0.5], [0.5])((IMAGES * 255).to(torch.uint8))
    for mean, std in (((123.0,), (58.0,)), ((-0.5,), (0.5,)), ((0.5,), (58.0,))):
        with pytest.raises(ValueError, match="divide those of pixels of 0 to 255 by 255"):
            wrap(linear(), mean, std)
    Normalize([0.0], [1 / 255])  # a model that takes 0 to 255


def test_budgets_of_another_scale_are_refused() -> None:
    for value in (8, "8", 1.5):
        with pytest.raises(ValueError, match=r"at most 1, .*levels of 255 are '.*/255'"):
            budget(value, "linf")
    assert budget(1, "linf") == 1.0
    assert budget(3) == 3.0
    for name in ("pgd", "fab-t", "square"):
        with pytest.raises(ValueError, match="'8/255'"):
            create_attack(name, eps=8)
    with pytest.raises(ValueError, match="'2/255'"):
        create_attack("pgd", eps="8/255", alpha=2)
    with pytest.raises(ValueError, match="'8/255'"):
        create_attack("rays", eps=8)
    far = create_attack("pgd", eps=8, norm="l2", steps=1)
    assert far(linear(), IMAGES, LABELS).shape == IMAGES.shape  # all of the box: sqrt(64) is 8
    with pytest.raises(ValueError, match=r"an L2 budget of 128 is more than any two images .* are apart \(8\)"):
        create_attack("pgd", eps=128, norm="l2")(linear(), IMAGES, LABELS)


# dtypes and kinds of modules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_dtype(dtype: torch.dtype) -> None:
    net = linear().to(dtype)
    seen: list[torch.dtype] = []
    net.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    result = PGD.run(net, IMAGES, LABELS)
    assert result.images.dtype == torch.float32
    assert seen[-1] == dtype
    # A pixel whose gradient is near 0 may go the other way.
    assert float((result.images - EXPECTED).abs().mean()) < (1e-6 if dtype == torch.float64 else 0.01)
    logits = logits_of(net, IMAGES)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, linear()(IMAGES), rtol=0.05, atol=0.05)
    # Behind what normalizes, copies, purifies or adapts, which all stay in float32.
    wrapped = wrap(net, [0.5], [0.5], size=8)
    plain = wrap(linear(), [0.5], [0.5])
    torch.testing.assert_close(logits_of(wrapped, IMAGES), plain(IMAGES), rtol=0.05, atol=0.05)
    for knowledge in ("white_box", "bpda"):
        system = System("jpeg", fused_copy(net, IMAGES), create_defense("jpeg"))
        seen_by = Attacker(PGD, knowledge).model_for(system)
        assert PGD(seen_by, IMAGES, LABELS).dtype == torch.float32
    Protected(net, Norm())(IMAGES)
    Protected(linear(), Norm().to(dtype))(IMAGES)


def test_a_model_that_takes_float32_gets_it_whatever_its_weights_are() -> None:
    # bfloat16 near 1 is half a grey level coarse: who casts after normalizing must not be given coarser images.
    seen: list[torch.dtype] = []

    def casting(net: nn.Module, x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return net(x.to(torch.bfloat16))

    PGD(Around(linear().to(torch.bfloat16), casting), IMAGES, LABELS)
    assert set(seen) == {torch.float32}


def test_an_error_of_the_model_stays_its_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ask(linear(), IMAGES[..., :4])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ask(linear().double(), IMAGES[..., :4])


def traced() -> nn.Module:
    return torch.jit.trace(linear(), IMAGES)


def scripted() -> nn.Module:
    return torch.jit.script(linear())


def frozen_script() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(linear()))


def weight_norm() -> nn.Module:
    net = linear()
    torch.nn.utils.weight_norm(net[1])
    net(IMAGES)  # the weight has a graph now
    return net


def parametrized() -> nn.Module:
    net = linear()
    torch.nn.utils.parametrizations.weight_norm(net[1])
    return net


def keeps_features() -> nn.Module:
    def keep(net: nn.Module, x: Tensor) -> Tensor:
        kept.last = net[0](x)  # type: ignore[assignment]
        kept.last = kept.last * net[1].weight.sum() / net[1].weight.sum()
        return net[1](x.flatten(1))

    kept = Around(linear(), keep)
    kept(IMAGES)
    return kept


def holds_a_lock() -> nn.Module:
    net = linear()
    net.lock = threading.Lock()  # type: ignore[assignment]
    return net


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "make", [traced, scripted, frozen_script, weight_norm, parametrized, keeps_features, holds_a_lock]
)
def test_every_kind_of_module_is_attacked_as_it_is(make: Callable[[], nn.Module]) -> None:
    net = make()
    modes = [getattr(m, "training", None) for m in net.modules()] + [p.requires_grad for p in net.parameters()]
    for model in (
        net,
        lambda x: net(x),
        fused_copy(net, IMAGES, channels_last=True),
        Protected(net, create_defense("identity")),
    ):
        torch.testing.assert_close(PGD(model, IMAGES, LABELS), EXPECTED, rtol=0, atol=1e-5)
    if make is holds_a_lock:
        with pytest.raises(ValueError, match=r"cannot be copied \(cannot pickle '_thread.lock' object\)"):
            wrap(net)
    else:
        torch.testing.assert_close(PGD(wrap(net), IMAGES, LABELS), EXPECTED, rtol=0, atol=1e-5)
    again = [getattr(m, "training", None) for m in net.modules()] + [p.requires_grad for p in net.parameters()]
    assert again == modes


def test_a_fused_copy_of_what_cannot_be_copied_is_frozen_too() -> None:
    net = learning()
    net.lock = threading.Lock()  # type: ignore[assignment]
    before, modes = {k: v.clone() for k, v in net.state_dict().items()}, flags(net)
    x = IMAGES.clone().requires_grad_()
    copy = fused_copy(net, IMAGES)
    copy(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in net.parameters())
    assert flags(net) == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_model_gives_no_gradient_and_is_attacked_by_queries() -> None:
    net = torch.ao.quantization.quantize_dynamic(linear(), {nn.Linear}, dtype=torch.qint8)
    for model in (net, wrap(net), fused_copy(net, IMAGES)):
        with pytest.raises(NoGradientError):
            PGD(model, IMAGES, LABELS)
        assert SQUARE.run(model, IMAGES, LABELS).images.shape == IMAGES.shape


# Types ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((create_defense("median"), linear()), r"classifier comes first: Protected\(classifier, defense\)"),
        ((create_defense("median"), create_defense("jpeg")), "as classifier, not Median"),
        ((lambda x: x, create_defense("jpeg")), "as classifier, not function"),
        ((linear(), "jpeg"), r"load_defense, create_defense.* as defense, not str"),
        ((linear(), linear()), "as defense, not Sequential"),
        ((linear(), Defense), "as defense, not Defense"),
        ((nn.Linear, create_defense("jpeg")), "as classifier, not Linear"),
    ],
)
def test_protected_says_what_to_pass(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Protected(*arguments)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (nn.Linear, r"not the class Linear: make one first, Linear\(...\)"),
        ("resnet18", r"the path of an .onnx file, not 'resnet18'; load_classifier reads a run folder"),
        (Path("runs/mine"), "not 'runs/mine'; load_classifier"),
        (IMAGES, "a function from images to logits or the path of an .onnx file, not Tensor"),
        (None, "not NoneType"),
    ],
)
def test_wrap_says_what_to_pass(thing: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        wrap(thing)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("in_a_pipeline", [False, True])
def test_a_purifier_of_other_channels(channels: int, in_a_pipeline: bool) -> None:
    part = create_defense("hgd", channels=channels, denoiser={"width": 4})
    defense = create_defense("pipeline", parts=[{"name": "median"}, part]) if in_a_pipeline else part
    other = 4 - channels
    images = torch.rand(2, other, 8, 8)
    net = create_classifier("convnet", channels=other, size=8, classes=3, mean=[0.5] * other, std=[0.2] * other)
    for model in (defense, Protected(net, defense)):
        with pytest.raises(ValueError, match=rf"images of {channels} channel\(s\), and these have {other}"):
            model(images)
    assert defense(torch.rand(2, channels, 8, 8)).shape == (2, channels, 8, 8)


def test_black_box_refuses_an_attack_by_gradients() -> None:
    with pytest.raises(ValueError, match=r"PGD needs a gradient, and black_box gives none: .*\(square, rays\)"):
        Attacker(PGD, "black_box")
    for knowledge in set(KNOWLEDGE) - {"black_box"}:
        Attacker(PGD, knowledge)
    with pytest.raises(NoGradientError):
        PGD(Attacker(SQUARE, "black_box").model_for(System("plain", linear())), IMAGES, LABELS)
