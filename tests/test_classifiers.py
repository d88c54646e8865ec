"""Every classifier: shape, cost, independence of the batch, rebuilding from a folder; and models that are not ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unperturb.classifiers import (
    Classifier,
    Normalize,
    classifiers,
    create_classifier,
    fused_copy,
    load_classifier,
    macs,
    save_classifier,
    wrap,
)
from unperturb.registry import UnknownNameError
from unperturb.runs import RunError

# channels and size each is made for; most million multiply-accumulates, most thousand parameters there
MADE_FOR = {
    "lenet5": (1, 28, 0.45, 65),
    "convnet": (1, 28, 0.65, 170),
    "resnet8": (1, 28, 10, 80),
    "resnet14": (1, 28, 21, 180),
    "resnet20": (3, 32, 42, 280),
    "small_cnn": (1, 28, 10.5, 320),
    "vgg": (3, 32, 40, 300),
    "airbench": (3, 32, 55, 1150),
    "mobilenet": (3, 32, 52, 650),
    "resnet18": (3, 128, 160, 2850),
    "convnext": (3, 128, 120, 2200),
}
each = pytest.mark.parametrize("name", sorted(MADE_FOR))


def make(name: str, size: int | None = None, **options: object) -> Classifier:
    channels, natural = MADE_FOR[name][:2]
    stats = {"mean": [0.4, 0.5, 0.6][:channels], "std": [0.2, 0.25, 0.3][:channels]}
    return create_classifier(name, channels=channels, size=size or natural, classes=10, **stats, **options)


def images_for(classifier: Classifier, n: int = 3) -> Tensor:
    assert classifier.spec is not None
    return torch.rand(n, classifier.spec["channels"], classifier.spec["size"], classifier.spec["size"])


def test_every_name_is_in_the_battery() -> None:
    assert sorted(MADE_FOR) == list(classifiers)


@each
def test_logits_do_not_depend_on_the_batch(name: str) -> None:
    classifier = make(name).eval()
    images = images_for(classifier)
    with torch.no_grad():
        logits = classifier(images)
        alone = classifier(images[1:2])
    assert logits.shape == (3, 10)
    assert logits.isfinite().all()
    assert logits.std(0).max() > 1e-4  # a net that does not look at its input passes all the rest
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-5, atol=1e-5)


@each
def test_every_parameter_and_the_image_get_a_gradient(name: str) -> None:
    size = 16 if MADE_FOR[name][1] > 32 else None
    classifier = make(name, size, **({"patch": 2} if name == "convnext" else {})).train()
    images = images_for(classifier, 4).requires_grad_(True)
    loss = nn.functional.cross_entropy(classifier(images), torch.arange(4))
    loss.backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    for parameter_name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name


@each
def test_cost(name: str) -> None:
    channels, size, most_macs, most_parameters = MADE_FOR[name]
    classifier = make(name)
    cost = macs(classifier, (channels, size, size)) / 1e6
    assert 0.8 * most_macs < cost <= most_macs
    parameters = sum(p.numel() for p in classifier.parameters()) / 1e3
    assert 0.8 * most_parameters < parameters <= most_parameters


@each
@pytest.mark.parametrize("size", [28, 32])
def test_grey_and_color_at_both_small_sizes(name: str, size: int) -> None:
    channels = 1 if size == 32 else 3  # the way round that is not natural
    classifier = create_classifier(
        name, channels=channels, size=size, classes=3, mean=[0.5] * channels, std=[0.2] * channels
    )
    assert classifier.eval()(images_for(classifier, 1)).shape == (1, 3)


@each
def test_a_folder_rebuilds_it_bit_for_bit(name: str, tmp_path: Path) -> None:
    classifier = make(name, 32)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    save_classifier(tmp_path, classifier.eval(), {"accuracy": 0.5})
    again = load_classifier(tmp_path)
    images = images_for(classifier)
    assert torch.equal(again(images), classifier(images))
    assert again.spec == classifier.spec
    assert not any(m.training for m in again.modules())
    wants = {k: p.requires_grad for k, p in classifier.named_parameters()}
    assert {k: p.requires_grad for k, p in again.named_parameters()} == wants
    assert json.loads((tmp_path / "classifier.json").read_text())["extra"] == {"accuracy": 0.5}


def test_the_mobilenet_and_the_resnet_fit_large_images_too() -> None:
    assert macs(make("mobilenet", 128), (3, 128, 128)) < 62e6
    assert macs(make("resnet18", width=16), (3, 128, 128)) < 50e6


def test_options_are_kept(tmp_path: Path) -> None:
    classifier = make("airbench", widths=(8, 16), activation="relu")
    save_classifier(tmp_path, classifier)
    again = load_classifier(tmp_path)
    assert again.spec is not None
    assert again.spec["options"] == {"widths": [8, 16], "activation": "relu"}
    assert [m.out_channels for m in again.modules() if isinstance(m, nn.Conv2d)] == [24, 8, 8, 16, 16]


def test_the_scale_of_an_airbench_multiplies_its_logits() -> None:
    usual, large = make("airbench").eval(), make("airbench", scale=11.0).eval()
    large.load_state_dict(usual.state_dict())
    images = images_for(usual)
    torch.testing.assert_close(large(images) / 99, usual(images))


def test_a_mirrored_net_judges_an_image_and_its_mirror_image_together() -> None:
    one, both = make("airbench").eval(), make("airbench", mirror=True).eval()
    both.load_state_dict(one.state_dict())
    images = images_for(one)
    expected = (one(images) + one(images.flip(-1))) / 2
    assert (one(images) - one(images.flip(-1))).abs().max() > 1e-3 * one(images).abs().max()
    torch.testing.assert_close(both(images), expected)
    torch.testing.assert_close(both(images.flip(-1)), expected)
    assert fused_copy(both).folded == fused_copy(one).folded == 6
    torch.testing.assert_close(both.train()(images), one.train()(images))  # learns as the plain net does


def test_macs_have_the_closed_form() -> None:
    classifier = make("convnet")
    classifier.train()
    expected = 14 * 14 * 16 * (4 * 4 * 1) + 7 * 7 * 32 * (4 * 4 * 16) + 7 * 7 * 32 * 100 + 100 * 10
    assert macs(classifier, (1, 28, 28)) == expected
    assert all(m.training for m in classifier.modules())


def test_macs_leave_running_statistics_alone() -> None:
    classifier = make("resnet8")
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    macs(classifier, (1, 28, 28))
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items())


# Bad input ----------------------------------------------------------------------------------------------------------


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet8'"):
        create_classifier("resnet9", channels=1, size=28, classes=10, mean=[0], std=[1])
    with pytest.raises(UnknownNameError, match="Did you mean 'width'"):
        make("resnet8", widht=8)
    with pytest.raises(UnknownNameError, match="Did you mean 'gelu'"):
        make("airbench", activation="glu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.5] * 3, "std": [0.2] * 3}, "one number per channel: 1"),
        ({"mean": [0.5, 0.5]}, "one number per channel"),
        ({"std": [0.0]}, "std above zero"),
        ({"mean": [float("nan")]}, "must be finite"),
        ({"classes": 1}, "two classes"),
        ({"size": 0}, "needs channels, a size"),
        ({"size": 8}, "12x12 pixels or more; got 8x8"),
    ],
)
def test_shapes_and_statistics_that_cannot_be(change: dict[str, object], message: str) -> None:
    given = {"channels": 1, "size": 28, "classes": 10, "mean": [0.5], "std": [0.2]} | change
    with pytest.raises(ValueError, match=message):
        create_classifier("lenet5", **given)


@pytest.mark.parametrize(
    ("name", "size"), [("airbench", 8), ("vgg", 4), ("convnext", 8), ("convnet", 3), ("small_cnn", 15)]
)
def test_images_too_small_for_a_net(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="pixels or more; got"):
        make(name, size)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 32, 32), (2, 1, 28, 32), (1, 28, 28)])
def test_images_that_are_not_its_own(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="takes images"):
        make("resnet8")(torch.rand(shape))


def test_missing_truncated_and_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"classifier\.json is not there"):
        load_classifier(tmp_path)
    save_classifier(tmp_path, make("resnet8"))
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="truncated"):
        load_classifier(tmp_path)
    weights.unlink()
    with pytest.raises(RunError, match="no weights"):
        load_classifier(tmp_path)
    save_classifier(tmp_path / "other", make("resnet8", width=8))
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"does not hold the weights .*net\.0\.weight"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"name": "resnet9"}, "resnet8"), ({"options": {"depth": 3}}, "depth"), ({"std": None}, "std")],
)
def test_a_description_that_cannot_be_built(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save_classifier(tmp_path, make("resnet8"))
    path = tmp_path / "classifier.json"
    described = {k: v for k, v in (json.loads(path.read_text()) | change).items() if v is not None}
    path.write_text(json.dumps(described))
    with pytest.raises(RunError, match=message):
        load_classifier(tmp_path)


# Normalize and wrap -------------------------------------------------------------------------------------------------


def test_normalize_has_the_closed_form() -> None:
    images = torch.rand(2, 3, 4, 4)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]
    out = Normalize(mean, std)(images)
    for c in range(3):
        torch.testing.assert_close(out[:, c], (images[:, c] - mean[c]) / std[c])


def test_normalize_does_not_broadcast_grey_to_color() -> None:
    with pytest.raises(ValueError, match=r"takes images \(N, 3, H, W\); got \(2, 1, 4, 4\)"):
        Normalize([0.5] * 3, [0.2] * 3)(torch.rand(2, 1, 4, 4))


def linear(inputs: int = 3 * 8 * 8, outputs: int = 5) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs), nn.Dropout(0.5))


def test_wrap_normalizes_and_freezes_a_copy() -> None:
    model = linear().train()
    wrapped = wrap(model, [0.1, 0.2, 0.3], [0.5, 0.25, 0.125], size=8, classes=5)
    images = torch.rand(4, 3, 8, 8)
    normal = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    layer = model[1]
    torch.testing.assert_close(wrapped(images), layer(normal.flatten(1)))
    assert not any(p.requires_grad for p in wrapped.parameters())
    assert not any(m.training for m in nn.Sequential(wrapped).train()[0].modules())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    before = wrapped(images)
    nn.init.zeros_(layer.weight)
    assert torch.equal(wrapped(images), before)


def test_wrap_without_statistics_adds_nothing() -> None:
    model, images = linear().eval(), torch.rand(2, 3, 8, 8)
    assert torch.equal(wrap(model, size=8)(images), model(images))


class Returns(nn.Module):
    """Gives back what it was told to."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> object:
        return self.value


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (linear(), {"size": 9}, r"failed on two float32 images \(2, 3, 9, 9\)"),
        (linear(), {"size": 8, "channels": 1}, r"failed on two float32 images \(2, 1, 8, 8\)"),
        (linear(), {"size": 8, "classes": 10}, "gives 5 logits an image, where 10 classes were expected"),
        (linear(), {"mean": [0.5] * 3}, "mean and std go together"),
        (linear(), {"mean": [0.5] * 3, "std": [0.2] * 3, "channels": 1}, "one number per channel: 1"),
        (nn.Identity(), {"size": 8}, r"must return logits of shape \(2, classes\), it returned \(2, 3, 8, 8\)"),
        (Returns(torch.zeros(3, 5)), {"size": 8}, r"it returned \(3, 5\)"),
        (Returns(torch.zeros(2, 1)), {"size": 8}, r"it returned \(2, 1\), one logit per image: .*binary=True"),
        (
            Returns((torch.zeros(2, 5),)),
            {"size": 8},
            r"answers with tuple of 0 \(2, 5\); say where its logits are by wrap\(model, logits=...\)",
        ),
        (Returns(torch.full((2, 5), float("nan"))), {"size": 8}, "NaN or infinite logits"),
        (Returns(torch.tensor([[0.0, 1.0], [0.0, float("inf")]])), {"size": 8}, "NaN or infinite logits"),
    ],
)
def test_wrap_says_what_is_wrong(model: nn.Module, given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(model, **given)


def test_wrap_warns_of_probabilities() -> None:
    with pytest.warns(UserWarning, match="probabilities, not logits"):
        wrap(nn.Sequential(linear(), nn.Softmax(1)), size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(linear(), size=8)


def test_a_wrapped_model_is_not_saved_as_if_it_could_be_rebuilt(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="wrapped model"):
        save_classifier(tmp_path, wrap(linear()))
    assert not list(tmp_path.iterdir())
