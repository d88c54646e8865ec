"""Input filters against independent libraries, pipelines against autograd, and what an attacker sees of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor, nn

from unperturb import runs
from unperturb.attackers import EOT, Attacker
from unperturb.attacks import create_attack
from unperturb.defenses import Defense, Protected, create_defense, defenses, load_defense, save_defense
from unperturb.defenses.pipeline import Pipeline
from unperturb.evaluation.identity import identify
from unperturb.systems import System

FILTERS: list[tuple[str, dict[str, Any]]] = [
    ("median", {"kernel": 3}),
    ("median", {"kernel": 5}),
    ("gaussian_blur", {"kernel": 3, "sigma": 1.0}),
    ("gaussian_blur", {"kernel": 7, "sigma": 2.0}),
    ("jpeg", {"quality": 75}),
    ("jpeg", {"quality": 20}),
    ("bit_depth", {"bits": 1}),
    ("bit_depth", {"bits": 4}),
    ("total_variation", {"weight": 0.1, "steps": 12}),
]
NAMES = list(dict(FILTERS))


def seen_by(knowledge: str, classifier: nn.Module, defense: Defense, eot_samples: int = 20) -> nn.Module:
    """What an attacker of this knowledge attacks."""
    attacker = Attacker(create_attack("square", eps=0.1), knowledge, eot_samples)
    return attacker.model_for(System("whole", classifier, defense))


def images(n: int = 3, channels: int = 1, size: int = 12, seed: int = 0) -> Tensor:
    """Random images on the levels of a picture, some pixels at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, size, size, generator=generator) * 1.4 - 0.2
    return (x.clamp(0, 1) * 255).round() / 255


# Each filter against another library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("grad", [False, True])
def test_median_is_scipys(kernel: int, grad: bool) -> None:
    x = images(channels=3)
    found = create_defense("median", kernel=kernel).purify(x.requires_grad_(grad))
    expected = [[ndimage.median_filter(c, size=kernel, mode="mirror") for c in i] for i in x.detach().numpy()]
    np.testing.assert_allclose(found.detach(), np.array(expected), atol=1e-7)


def test_the_medians_gradient_goes_to_the_median_pixel() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3).div(10).requires_grad_()
    out = create_defense("median").purify(x)
    (gradient,) = torch.autograd.grad(out[0, 0, 1, 1], x)
    assert float(out[0, 0, 1, 1].detach()) == pytest.approx(0.4)
    assert gradient.flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("kernel", "sigma"), [(1, 1.0), (3, 0.5), (5, 2.0), (7, 1.5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_gaussian_blur_is_scipys(channels: int, kernel: int, sigma: float) -> None:
    x = images(channels=channels)
    found = create_defense("gaussian_blur", kernel=kernel, sigma=sigma).purify(x)
    blur = partial(ndimage.gaussian_filter, sigma=sigma, radius=kernel // 2, mode="mirror")
    expected = [[blur(channel) for channel in image] for image in x.numpy()]
    np.testing.assert_allclose(found, np.array(expected), atol=1e-6)


def test_the_gradient_of_gaussian_blur_is_exact() -> None:
    defense = create_defense("gaussian_blur", kernel=5, sigma=1.5)
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(defense.purify, (x,))


@pytest.mark.parametrize("quality", [10, 75, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_a_saved_picture_holds(channels: int, quality: int, tmp_path: Path) -> None:
    x = images(channels=channels, size=20)
    found = create_defense("jpeg", quality=quality).purify(x)
    for one, out in zip(x, found):
        pixels = (one.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
        path = tmp_path / "saved.jpg"
        Image.fromarray(pixels.squeeze()).save(path, quality=quality)
        read = np.asarray(Image.open(path)).reshape(20, 20, channels)
        np.testing.assert_allclose(out.numpy().transpose(1, 2, 0), read / np.float32(255), atol=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_stands_in_for_jpeg_is_nearly_jpeg(channels: int) -> None:
    x = images(channels=channels, size=16)
    for quality in (25, 75):
        jpeg = create_defense("jpeg", quality=quality)
        exact, soft = jpeg.purify(x), jpeg.surrogate_backward(x)
        assert soft.shape == x.shape
        assert float((soft - exact).abs().mean()) < 0.5 * float((x - exact).abs().mean())  # nearer than the identity


def test_bit_depth_takes_the_nearest_level() -> None:
    x = images(channels=3)
    for bits in (1, 3, 8):
        levels = np.linspace(0, 1, 2**bits)
        nearest = levels[np.abs(x.numpy()[..., None] - levels).argmin(-1)]
        np.testing.assert_allclose(create_defense("bit_depth", bits=bits).purify(x), nearest, atol=1e-6)
    assert torch.equal(create_defense("bit_depth", bits=8).purify(x), x)


@pytest.mark.parametrize(("weight", "steps"), [(0.05, 1), (0.1, 7), (0.3, 40)])
def test_total_variation_is_scikit_images(weight: float, steps: int) -> None:
    x = images(channels=3)
    found = create_defense("total_variation", weight=weight, steps=steps).purify(x)
    for one, out in zip(x.numpy(), found.numpy()):
        for channel, denoised in zip(one, out):
            # Theirs looks at the image before its dual field moved, so one iteration more is ours; eps 0: all of them.
            expected = denoise_tv_chambolle(channel, weight=weight, eps=0, max_num_iter=steps + 1)
            np.testing.assert_allclose(denoised, expected.clip(0, 1), atol=2e-5)


def test_total_variation_against_its_objective() -> None:
    # One step edge of height 1 on n pixels each side: each plateau moves by weight / n towards the other (the taut
    # string), if many steps are taken.
    x = torch.cat([torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)], 3).expand(1, 1, 8, 8)
    out = create_defense("total_variation", weight=0.2, steps=3000).purify(x)
    torch.testing.assert_close(out[..., :4], torch.full((1, 1, 8, 4), 0.05), atol=2e-3, rtol=0)
    torch.testing.assert_close(out[..., 4:], torch.full((1, 1, 8, 4), 0.95), atol=2e-3, rtol=0)


def test_the_gradient_through_every_step_of_total_variation() -> None:
    defense = create_defense("total_variation", weight=0.2, steps=5)
    x = (torch.rand(1, 1, 5, 5, dtype=torch.float64) * 0.6 + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(defense.purify, (x,), eps=1e-6, atol=1e-5)
    flat = torch.full((1, 1, 5, 5), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(defense.purify(flat).sum(), flat)
    assert bool(gradient.isfinite().all())


# What all of them promise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), FILTERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_range_and_each_image_on_its_own(name: str, options: dict[str, Any], channels: int) -> None:
    defense, x = create_defense(name, **options), images(4, channels, 14)
    before = x.clone()
    out = defense.purify(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert torch.equal(x, before)
    assert torch.equal(out, defense.purify(x))
    torch.testing.assert_close(torch.cat([defense.purify(one[None]) for one in x]), out, rtol=0, atol=1e-6)
    assert defense.purify(x[:0]).shape == (0, channels, 14, 14)
    assert not defense.networks()
    assert not defense.random


@pytest.mark.parametrize(("name", "options"), FILTERS)
def test_a_white_box_attacker_always_has_a_gradient(name: str, options: dict[str, Any]) -> None:
    defense, classifier = create_defense(name, **options), nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    seen, x = seen_by("white_box", classifier, defense), images().requires_grad_()
    logits = seen(x)
    torch.testing.assert_close(logits, classifier(defense.purify(x.detach())), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    by = defense.purify if defense.differentiable else defense.surrogate_backward
    (expected,) = torch.autograd.grad(by(x), x, classifier[1].weight[0].expand(3, -1).reshape(x.shape))
    torch.testing.assert_close(gradient, expected)
    assert float(gradient.abs().max()) > 1e-3


def test_options_that_make_no_filter() -> None:
    for name, options, said in (
        ("median", {"kernel": 4}, "kernel must be odd"),
        ("gaussian_blur", {"kernel": 4}, "kernel must be odd"),
        ("gaussian_blur", {"sigma": 0.0}, "sigma must be above 0"),
        ("jpeg", {"quality": 0}, "quality must be 1 to 95"),
        ("bit_depth", {"bits": 9}, "bits must be 1 to 8"),
        ("total_variation", {"weight": 0.0}, "weight must be above 0"),
        ("pipeline", {"parts": []}, "at least one part"),
    ):
        with pytest.raises(ValueError, match=said):
            create_defense(name, **options)
    with pytest.raises(ValueError, match="JPEG takes grey or RGB images, not 2 channels"):
        create_defense("jpeg").purify(torch.zeros(1, 2, 8, 8))


def test_each_filter_by_its_name_alone() -> None:
    for name in NAMES:
        assert load_defense(name).spec == {"name": name, "options": {}}
    with pytest.raises(runs.RunError, match=r"no defense is called 'jpg'; did you mean 'jpeg'\?"):
        load_defense("jpg")
    with pytest.raises(runs.RunError, match="paired_gan holds no trained defense"):
        load_defense("paired_gan")
    with pytest.raises(runs.RunError, match="hgd holds no trained defense"):
        load_defense("hgd")


@pytest.mark.parametrize("name", [*NAMES, "hgd", "denoised_smoothing"])
def test_each_has_a_card_and_its_recipes(name: str) -> None:
    from unperturb.recipe_files import read_recipe

    assert name in defenses
    card = Path(__file__).resolve().parent.parent / "docs" / "defenses" / f"{name}.md"
    text = card.read_text(encoding="utf-8")
    assert all(f"**{part}.**" in text for part in ("Idea", "Source", "What we changed, and why", "Cost"))
    for dataset in ("mnist", "fashion_mnist", "cifar10", "digits"):
        assert read_recipe(f"{name}-{dataset}", kind="defense").defense.name == name


# Pipelines -----------------------------------------------------------------------------------------------------------


class Scale(Defense):
    """Differentiable: times a factor, with one detector: the mean of what it sees."""

    def __init__(self, factor: float, threshold: float = 0.5) -> None:
        super().__init__()
        self.factor, self.threshold = factor, threshold

    def purify(self, images: Tensor) -> Tensor:
        return self.factor * images.square()

    def scores(self, images: Tensor, logits_fn: Any) -> Tensor:
        return images.flatten(1).mean(1, keepdim=True)

    @property
    def thresholds(self) -> Tensor:
        return torch.tensor([self.threshold])


class Steps(Defense):
    """Five levels, and a surrogate that is neither them nor the identity."""

    differentiable = False

    def purify(self, images: Tensor) -> Tensor:
        return (images * 4).round() / 4

    def surrogate_backward(self, images: Tensor) -> Tensor:
        return 3 * images


class Shift(Defense):
    random = True

    def purify(self, images: Tensor) -> Tensor:
        return images + torch.rand(len(images), 1, 1, 1)


def test_a_chain_that_is_differentiable_has_the_gradient_of_the_composition() -> None:
    stages = [create_defense("total_variation", weight=0.1, steps=3), create_defense("median"), Scale(0.5)]
    chain, x = Pipeline(parts=stages), images()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    by_hand = 0.5 * stages[1].purify(stages[0].purify(b)).square()
    assert torch.equal(chain.purify(a), by_hand)
    weights = torch.rand_like(x)
    found = torch.autograd.grad(chain.purify(a), a, weights)[0]
    assert torch.equal(found, torch.autograd.grad(by_hand, b, weights)[0])
    assert chain.differentiable
    assert not chain.random


def test_the_gradient_through_a_chain_with_a_step_in_it() -> None:
    # f(s(q(s(x)))) with s(x) = 0.8 x^2 and q five levels, its surrogate 3 x: by the chain rule at the exact values
    # w * 2 * 0.8 * q * 3 * 2 * 0.8 * x.
    chain = Pipeline(parts=[Scale(0.8), Steps(), Scale(0.8)])
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    x = images().requires_grad_()
    seen = seen_by("white_box", classifier, chain)
    assert torch.equal(seen(x), classifier(chain.purify(x)))
    (found,) = torch.autograd.grad(seen(x)[:, 0].sum(), x)
    w = classifier[1].weight[0].detach().reshape(1, 1, 12, 12)
    q = ((0.8 * x.detach().square()) * 4).round() / 4
    expected = w * 1.6 * q * 3 * 1.6 * x.detach()
    torch.testing.assert_close(found, expected)
    # The one who takes the identity for the whole sees something else.
    identity = seen_by("bpda", classifier, chain)
    (straight,) = torch.autograd.grad(identity(x)[:, 0].sum(), x)
    torch.testing.assert_close(straight, w.expand_as(x))
    assert not chain.differentiable


def test_chains_of_chains_are_one_chain() -> None:
    inner = Pipeline(parts=[Steps(), Scale(2.0)])
    outer, flat = Pipeline(parts=[Scale(0.3), inner]), Pipeline(parts=[Scale(0.3), Steps(), Scale(2.0)])
    assert [type(stage) for stage in outer.stages()] == [Scale, Steps, Scale]
    classifier, x = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), images().requires_grad_()
    gradients = [
        torch.autograd.grad(seen_by("white_box", classifier, chain)(x)[:, 1].sum(), x)[0] for chain in (outer, flat)
    ]
    assert torch.equal(*gradients)
    # Its surrogate, for who takes the chain as one: the exact value and, again, the same gradient.
    torch.testing.assert_close(outer.surrogate_backward(x), outer.purify(x))
    torch.testing.assert_close(
        torch.autograd.grad(classifier(outer.surrogate_backward(x))[:, 1].sum(), x)[0], gradients[0]
    )


def test_a_chain_is_random_if_any_link_is() -> None:
    chain = Pipeline(parts=[Steps(), Shift()])
    assert chain.random
    assert not chain.differentiable
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    seen = seen_by("white_box", classifier, chain, 3)
    assert isinstance(seen, EOT)
    x = images()
    torch.manual_seed(5)
    found = seen(x)
    torch.manual_seed(5)
    torch.testing.assert_close(found, sum(classifier(chain.purify(x)) for _ in range(3)) / 3)


def test_a_chain_rejects_what_any_part_rejects() -> None:
    # Means 0.2 and 0.6; after 0.8 x^2 (of constant images): 0.032 and 0.288. Thresholds 0.5 and 0.1.
    x = torch.cat([torch.full((1, 1, 4, 4), 0.2), torch.full((1, 1, 4, 4), 0.6), torch.full((1, 1, 4, 4), 0.4)])
    chain = Pipeline(parts=[Scale(0.8, 0.5), create_defense("identity"), Scale(1.0, 0.1)])
    scores = chain.scores(x, nn.Flatten())
    torch.testing.assert_close(scores, torch.tensor([[0.2, 0.032], [0.6, 0.288], [0.4, 0.128]]))
    torch.testing.assert_close(chain.thresholds, torch.tensor([0.5, 0.1]))
    assert Protected(nn.Flatten(), chain).rejects(x).tolist() == [False, True, True]
    assert Protected(nn.Flatten(), Pipeline(parts=[Scale(0.8, 0.5)])).rejects(x).tolist() == [False, True, False]


def test_a_chain_sets_the_thresholds_of_its_parts() -> None:
    parts = [{"name": "magnet", "detectors": [{"error": 2}, {"error": 1}], "drop_rate": 0.1}, {"name": "jpeg"}]
    parts.append({"name": "magnet", "structure": [3], "detectors": [{"error": 1}], "drop_rate": 0.2})
    chain = create_defense("pipeline", parts=parts, channels=1).eval()
    x = images(50)
    with torch.no_grad():
        scores = chain.scores(x, nn.Flatten())
        chain.calibrate(scores)
    assert scores.shape == (50, 3)
    ranked = scores.sort(0, descending=True).values
    assert chain.thresholds.tolist() == [float(ranked[k, i]) for i, k in enumerate((5, 5, 10))]  # a tenth, a fifth


def trained(folder: Path) -> Defense:
    torch.manual_seed(1)
    defense = create_defense("paired_gan", channels=1, generator={"name": "unet", "width": 4})
    for tensor in defense.state_dict().values():
        tensor.add_(torch.randn_like(tensor) * 0.05)
    save_defense(folder, defense.eval(), {})
    return defense


def test_folders_and_names_joined_by_a_plus(tmp_path: Path) -> None:
    defense, x = trained(tmp_path / "ours"), images()
    chain = load_defense(f"{tmp_path / 'ours'}+jpeg")
    jpeg = create_defense("jpeg")
    assert torch.equal(chain.purify(x), jpeg.purify(defense.purify(x)))
    assert not chain.training
    assert not any(p.requires_grad for p in chain.parameters())
    save_defense(tmp_path / "both", chain, {})
    again = load_defense(tmp_path / "both")
    assert torch.equal(again.purify(x), chain.purify(x))
    assert again.spec == chain.spec
    with pytest.raises(runs.RunError, match="nowhere holds no trained defense"):
        load_defense(f"jpeg+{tmp_path / 'nowhere'}")


def test_a_pipeline_from_a_recipes_words() -> None:
    parts = [{"name": "bit_depth", "bits": 2}, {"name": "hgd", "denoiser": {"width": 4}}]
    chain = create_defense("pipeline", parts=parts, channels=3)
    x = images(channels=3)
    torch.testing.assert_close(chain.purify(x), create_defense("bit_depth", bits=2).purify(x))  # hgd starts as identity
    assert chain.spec == {
        "name": "pipeline",
        "options": {
            "parts": [
                {"name": "bit_depth", "bits": 2},
                {"name": "hgd", "channels": 3, "denoiser": {"width": 4}},
            ]
        },
    }


def test_what_is_kept_of_one_attacker_is_not_given_to_another() -> None:
    classifier = nn.Flatten()
    jpegs = [create_defense("jpeg", quality=q) for q in (50, 60)]
    seen = [seen_by(k, classifier, jpegs[0]) for k in ("bpda", "white_box", "black_box")]
    seen += [seen_by("white_box", classifier, jpegs[1]), EOT(seen[1], 2), EOT(seen[1], 3)]
    assert len({identify(s).key for s in seen}) == len(seen)
