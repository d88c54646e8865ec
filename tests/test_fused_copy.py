"""The frozen, fused copy: the same logits and input gradient as the original, which stays untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from unperturb.classifiers import classifiers, create_classifier, wrap
from unperturb.classifiers.fused_copy import fused_copy

NORMS = {
    "airbench": 6,
    "convnet": 0,
    "convnext": 0,
    "lenet5": 0,
    "mobilenet": 34,
    "resnet8": 9,
    "resnet14": 15,
    "resnet18": 20,
    "resnet20": 21,
    "small_cnn": 0,
    "vgg": 6,
}


def lived_in(model: nn.Module) -> nn.Module:
    """Batch norms as training leaves them: no statistic and no parameter at its first value."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.weight.requires_grad:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                with torch.no_grad():
                    module.weight[::3] *= -1
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def logits_and_gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_(True)
    logits = model(images)
    labels = torch.arange(len(images)) % logits.shape[1]
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), images)
    return logits.detach(), gradient


def assert_same(model: nn.Module, frozen: nn.Module, images: Tensor) -> None:
    logits, gradient = logits_and_gradient(copy.deepcopy(model).eval(), images)
    fused_logits, fused_gradient = logits_and_gradient(frozen, images)
    # In float64 the fold is exact for all that matters; in float32 an activation may cross a ReLU's kink by rounding.
    exact = images.dtype == torch.float64
    assert (logits - fused_logits).abs().max() <= (1e-9 if exact else 1e-4) * logits.abs().max()
    off = (gradient - fused_gradient).flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
    assert (off.max() if exact else off.median()) <= (1e-9 if exact else 1e-4)


def net(*layers: nn.Module) -> nn.Module:
    return lived_in(nn.Sequential(*layers))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(NORMS))
def test_every_classifier(name: str, dtype: torch.dtype) -> None:
    model = create_classifier(name, channels=3, size=16, classes=4, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    lived_in(model).to(dtype)
    frozen = fused_copy(model, channels_last=True)
    assert frozen.folded == NORMS[name]
    assert frozen.channels_last
    assert_same(model, frozen, torch.rand(4, 3, 16, 16, dtype=dtype))


def test_the_list_of_norms_is_whole() -> None:
    assert sorted(NORMS) == list(classifiers)


def test_folded_weights_have_the_closed_form() -> None:
    conv, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    model = net(conv, norm, *head(3))
    frozen = fused_copy(model, torch.rand(4, 2, 8, 8), channels_last=False)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = frozen.module.get_submodule("0")
    torch.testing.assert_close(folded.weight, conv.weight.detach() * scale.detach().view(-1, 1, 1, 1))
    torch.testing.assert_close(folded.bias, ((conv.bias - norm.running_mean) * scale + norm.bias).detach())


def test_the_original_stays_as_it_was() -> None:
    model = lived_in(create_classifier("resnet8", channels=1, size=8, classes=3, mean=[0.1], std=[0.3]))
    model.train()
    model.net.get_submodule("1").eval()  # a norm that its owner holds still
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    frozen = fused_copy(model, torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert frozen.folded > 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert modes == [m.training for m in model.modules()]
    assert wants == [p.requires_grad for p in model.parameters()]
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_for_good() -> None:
    model = create_classifier("resnet8", channels=1, size=8, classes=3, mean=[0.1], std=[0.3])
    frozen = fused_copy(model).train()
    assert not any(m.training for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert {p.data_ptr() for p in frozen.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


def test_a_norm_after_a_linear_layer_is_folded() -> None:
    model = net(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    images = torch.rand(4, 1, 8, 8)
    frozen = fused_copy(model, images)
    assert frozen.folded == 1
    assert_same(model, frozen, images)


@pytest.mark.parametrize(("scale", "folded"), [(1.0, 1), (-1.0, 0)])
def test_a_norm_behind_a_max_pooling_is_folded_only_where_its_scale_keeps_the_order(scale: float, folded: int) -> None:
    model = net(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), *head(4))
    nn.init.constant_(model.get_submodule("2").weight, scale)
    images = torch.rand(4, 1, 8, 8)
    frozen = fused_copy(model, images)
    assert frozen.folded == folded
    assert_same(model, frozen, images)


class Shared(nn.Module):
    """One convolution, read twice: folding it would change the second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(self.conv(images))).mean((2, 3)))


class TwoReaders(Shared):
    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        return self.last((self.norm(x) + x).mean((2, 3)))


@pytest.mark.parametrize("kind", [Shared, TwoReaders])
def test_a_convolution_that_others_need_is_left_alone(kind: type[nn.Module]) -> None:
    model, images = lived_in(kind()), torch.rand(4, 3, 8, 8)
    frozen = fused_copy(model, images)
    assert frozen.folded == 0
    assert_same(model, frozen, images)


class Deciding(nn.Module):
    """Data-dependent control flow, which no trace can follow, around layers called by hand."""

    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        self.parts = parts
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(self.parts(images)))
        if x.mean() > 100:
            x = -x
        return self.last(x.relu().mean((2, 3)))


def test_what_cannot_be_traced_is_attacked_as_it_is() -> None:
    model, images = lived_in(Deciding(nn.Identity())), torch.rand(4, 3, 8, 8)
    frozen = fused_copy(model, images)
    assert frozen.folded == 0
    assert_same(model, frozen, images)


def test_the_traceable_parts_of_the_untraceable_are_folded() -> None:
    model, images = lived_in(Deciding(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))), torch.rand(4, 3, 8, 8)
    frozen = fused_copy(model, images)
    assert frozen.folded == 1
    assert_same(model, frozen, images)


class Reading(nn.Module):
    """Looks into its own norm while it runs, so that a fold changes its result."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.last = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.parts(images)
        return self.last((x * float(isinstance(self.parts[1], nn.BatchNorm2d)) + x.mean()).mean((2, 3)))


def test_a_fold_that_changes_the_logits_is_taken_back() -> None:
    # The trace sees nothing wrong here: only the comparison can notice.
    model, images = lived_in(Reading()), torch.rand(4, 3, 8, 8)
    frozen = fused_copy(model, images)
    assert frozen.folded == 0
    assert_same(model, frozen, images)


class NeedsPlainMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        return self.last(x.as_strided((len(x), 256), (256, 1)))


def test_a_model_that_needs_plain_memory_keeps_it() -> None:
    model, images = NeedsPlainMemory(), torch.rand(4, 3, 8, 8)
    frozen = fused_copy(model, images, channels_last=True)
    assert not frozen.channels_last
    assert_same(model, frozen, images)


def test_without_a_shape_to_try_nothing_is_changed() -> None:
    model = wrap(net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *head(4)), [0.5] * 3, [0.2] * 3)
    images = torch.rand(4, 3, 8, 8)
    assert fused_copy(model).folded == 0
    assert fused_copy(model, images).folded == 1
    assert torch.equal(fused_copy(model)(images), model(images))
    assert_same(model, fused_copy(model, images), images)
