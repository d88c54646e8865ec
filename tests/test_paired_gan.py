"""The paper's defense: each loss against numbers worked out by hand, who is updated when, what its generators are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unperturb.classifiers import create_classifier
from unperturb.defenses import Batch, Protected, create_defense, gan_losses, load_defense, paired_gan, save_defense
from unperturb.defenses.networks import ApeDiscriminator, ApeGenerator, UNet, discriminators, generators
from unperturb.defenses.paired_gan import WEIGHTS, PairedGAN
from unperturb.registry import UnknownNameError
from unperturb.runs import RunError

UNET = {"name": "unet", "width": 4}
APE = {"name": "ape", "width": 4}
ONES = dict.fromkeys(WEIGHTS, 1.0)


def gan(**options: Any) -> PairedGAN:
    defense = create_defense("paired_gan", **{"channels": 1, "generator": UNET, **options})
    assert isinstance(defense, PairedGAN)
    return defense


def shake(network: nn.Module) -> None:
    """Weights as training leaves them: none at its first value, batch norms' statistics neither."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn_like(tensor) * 0.03
            tensor.add_(noise.abs() if name.endswith("running_var") else noise)


# Losses by hand ------------------------------------------------------------------------------------------------------


def constant(value: float) -> Tensor:
    return torch.full((2, 1, 3, 3), value)


def test_pixel_losses() -> None:
    # (0.5 - 0.2)^2 = 0.09 everywhere; half of the images off by 0.3 and half by nothing: 0.045.
    for loss in (paired_gan.repair, paired_gan.recovery, paired_gan.isomorphic):
        assert float(loss(constant(0.5), constant(0.2))) == pytest.approx(0.09)
        half = torch.cat([constant(0.5)[:1], constant(0.2)[:1]])
        assert float(loss(half, constant(0.2))) == pytest.approx(0.045)
        assert float(loss(constant(0.5), constant(0.5))) == 0


def test_label_loss() -> None:
    # softmax of (log 3, 0) is (3/4, 1/4): -log 3/4 for the first image, -log 1/4 for the second.
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    expected = (-math.log(3 / 4) - math.log(1 / 4)) / 2
    assert float(paired_gan.label(logits, torch.tensor([0, 1]))) == pytest.approx(expected)


def test_isomorphic_label_loss() -> None:
    # Predictions (3/4, 1/4) restored and (1/2, 1/2) recovered: the recovered one is what to come near to.
    fake, dec = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(paired_gan.isomorphic_label(fake, dec)) == pytest.approx(expected)
    twice = paired_gan.isomorphic_label(fake.repeat(2, 1), dec.repeat(2, 1))
    assert float(twice) == pytest.approx(expected)  # a mean over images
    assert float(paired_gan.isomorphic_label(fake, fake + 5)) == pytest.approx(0, abs=1e-7)


def test_losses_of_the_game() -> None:
    # A logit of log 3 says real with 3/4, one of 0 with 1/2.
    sure, unsure = torch.tensor([math.log(3)]), torch.tensor([0.0])
    assert float(gan_losses.adversarial(sure)) == pytest.approx(-math.log(3 / 4))
    expected = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    assert float(gan_losses.discrimination(sure, unsure)) == pytest.approx(expected)
    expected = (-math.log(1 / 2) - math.log(1 - 3 / 4)) / 2
    assert float(gan_losses.discrimination(unsure, sure)) == pytest.approx(expected)


# What is minimized, and by whom --------------------------------------------------------------------------------------


@pytest.fixture
def batch() -> Batch:
    classifier = create_classifier("convnet", channels=1, size=8, classes=3, mean=[0.4], std=[0.3])
    classifier.requires_grad_(False).eval()
    x_real = torch.rand(6, 1, 8, 8)
    x_adv = (x_real + 0.1 * torch.randn_like(x_real)).clamp(0, 1)
    return Batch(x_real, x_adv, torch.arange(6) % 3, classifier)


def played(defense: PairedGAN, batch: Batch) -> list[tuple[str, dict[str, Tensor]]]:
    return list(defense.losses(batch, defense.networks()))


@pytest.mark.parametrize(
    ("reading", "terms"),
    [
        ("classifier", {"repair", "recovery", "isomorphic", "label"}),
        ("discriminator", {"repair", "recovery", "isomorphic", "adversarial"}),
        ("both", {"repair", "recovery", "isomorphic", "label", "adversarial"}),
    ],
)
def test_label_reading(reading: str, terms: set[str], batch: Batch) -> None:
    weights = {"repair": 1.0, "label": 0.3, "recovery": 1.0, "isomorphic": 1.0}
    defense = gan(discriminator=APE, weights=weights, label_reading=reading)
    defense.eval()  # so that the same images give the same logits again
    (first, d_terms), (second, g_terms) = played(defense, batch)
    assert (first, second) == ("discriminator", "generator")
    assert set(d_terms) == {"discrimination"}
    assert set(g_terms) == terms
    x_fake = defense.purify(batch.x_adv)
    if "label" in terms:
        expected = 0.3 * paired_gan.label(batch.logits_fn(x_fake), batch.y)
        torch.testing.assert_close(g_terms["label"], expected)
    if "adversarial" in terms:
        assert defense.discriminator is not None
        expected = 0.3 * gan_losses.adversarial(defense.discriminator(x_fake))
        torch.testing.assert_close(g_terms["adversarial"], expected)


def test_every_weight_weighs_its_own_term(batch: Batch) -> None:
    plain = gan(discriminator=APE, weights=ONES).eval()
    _, unweighted = played(plain, batch)[1]
    assert set(unweighted) == set(WEIGHTS)
    for key in WEIGHTS:
        heavy = gan(discriminator=APE, weights=ONES | {key: 5.0}).eval()
        heavy.load_state_dict(plain.state_dict())
        _, weighted = played(heavy, batch)[1]
        for term, value in weighted.items():
            torch.testing.assert_close(value, (5.0 if term == key else 1.0) * unweighted[term])


def test_terms_against_the_functions_they_name(batch: Batch) -> None:
    defense = gan(weights=ONES | {"adversarial": 0.0})
    shake(defense)
    ((_, terms),) = played(defense, batch)
    x_fake, x_dec = defense.purify(batch.x_adv), defense.purify(batch.x_real)
    expected = {
        "repair": paired_gan.repair(x_fake, batch.x_real),
        "recovery": paired_gan.recovery(x_dec, batch.x_real),
        "isomorphic": paired_gan.isomorphic(x_fake, x_dec),
        "label": paired_gan.label(batch.logits_fn(x_fake), batch.y),
        "recovery_label": paired_gan.label(batch.logits_fn(x_dec), batch.y),
        "isomorphic_label": paired_gan.isomorphic_label(batch.logits_fn(x_fake), batch.logits_fn(x_dec)),
    }
    assert set(terms) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(terms[key], value)


def test_default_weights_are_the_papers_pixel_losses(batch: Batch) -> None:
    ((_, terms),) = played(gan(), batch)
    assert set(terms) == {"repair", "recovery", "isomorphic"}


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_generator_updates(updates: int, batch: Batch) -> None:
    defense = gan(discriminator=APE, weights={"repair": 1.0, "adversarial": 0.1}, generator_updates=updates)
    assert [network for network, _ in played(defense, batch)] == ["discriminator"] + ["generator"] * updates
    assert [network for network, _ in played(gan(), batch)] == ["generator"]


def test_a_later_update_sees_the_weights_of_the_one_before(batch: Batch) -> None:
    defense = gan(discriminator=APE, weights={"repair": 1.0, "adversarial": 0.1}, generator_updates=2)
    turns = defense.losses(batch, defense.networks())
    next(turns)
    _, first = next(turns)
    shake(defense.generator)
    _, second = next(turns)
    torch.testing.assert_close(second["repair"], paired_gan.repair(defense.purify(batch.x_adv), batch.x_real))
    assert not torch.equal(first["repair"], second["repair"])


class Seeing(nn.Module):
    """A discriminator that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shown = nn.Parameter(torch.ones(())), list[Tensor]()

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(images.detach())
        return self.weight * images.mean((1, 2, 3))


@pytest.mark.parametrize("sees_clean", [False, True])
def test_what_the_discriminator_sees(sees_clean: bool, batch: Batch) -> None:
    defense = gan(discriminator=APE, weights={"repair": 1.0, "adversarial": 1.0}, discriminator_sees_clean=sees_clean)
    shake(defense.generator)
    seeing = defense.discriminator = Seeing()
    played(defense, batch)
    x_fake, x_dec = defense.purify(batch.x_adv).detach(), defense.purify(batch.x_real).detach()
    fake = torch.cat([x_fake, x_dec]) if sees_clean else x_fake
    torch.testing.assert_close(seeing.shown[0], torch.cat([batch.x_real, fake]))
    torch.testing.assert_close(seeing.shown[1], fake)


def test_each_network_moves_alone(batch: Batch) -> None:
    defense = gan(discriminator=APE, weights=ONES)
    shake(defense.generator)  # at its first weights the last layer is zero, and nothing else has a gradient
    for name, terms in defense.losses(batch, defense.networks()):
        defense.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        for other, network in defense.networks().items():
            moved = [p.grad is not None and bool(p.grad.any()) for p in network.parameters()]
            assert all(moved) if other == name else not any(moved), (name, other)


@pytest.mark.parametrize(("fraction", "clean"), [(1.0, 6), (0.5, 3), (0.34, 2), (0.01, 1)])
def test_clean_share(fraction: float, clean: int, batch: Batch) -> None:
    defense = gan(weights={"repair": 1.0, "recovery": 1.0, "isomorphic": 1.0}, clean_share=fraction)
    shake(defense)
    fed: list[int] = []
    defense.generator.register_forward_hook(lambda _, args, __: fed.append(len(args[0])))
    ((_, terms),) = played(defense, batch)
    assert fed == [6 + clean]
    x_fake, x_dec = defense.purify(batch.x_adv), defense.purify(batch.x_real[:clean])
    torch.testing.assert_close(terms["repair"], paired_gan.repair(x_fake, batch.x_real))
    torch.testing.assert_close(terms["recovery"], paired_gan.recovery(x_dec, batch.x_real[:clean]))
    torch.testing.assert_close(terms["isomorphic"], paired_gan.isomorphic(x_fake[:clean], x_dec))


def test_wrong_options() -> None:
    for options, message in (
        ({"weights": {"repiar": 1.0}}, "unknown loss weight 'repiar'; choices: .*repair"),
        ({"weights": {"adversarial": 1.0}}, "needs a discriminator"),
        ({"weights": {"label": 1.0}, "label_reading": "both"}, "needs a discriminator"),
        ({"label_reading": "teacher"}, "label_reading must be"),
        ({"clean_share": 0.0}, r"clean_share must be in \(0, 1\]"),
        ({"clean_share": 1.5}, r"clean_share must be in \(0, 1\]"),
        ({"generator": UNET | {"output": "tanh"}}, "output must be 'residual' or 'threshold'"),
    ):
        with pytest.raises(ValueError, match=message):
            gan(**options)
    with pytest.raises(UnknownNameError, match=r"unknown generator 'unit'\. Did you mean 'unet'"):
        gan(generator={"name": "unit"})
    with pytest.raises(UnknownNameError, match=r"option of generator 'unet', 'widht'\. Did you mean 'width'"):
        gan(generator={"name": "unet", "widht": 3})
    with pytest.raises(UnknownNameError, match="unknown defense 'paired-gan'"):
        create_defense("paired-gan")


# Generators ----------------------------------------------------------------------------------------------------------

UNETS: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda c: UNet(c, width=4),
    "deep": lambda c: UNet(c, width=4, scales=3, blocks=2),
    "squeezed": lambda c: UNet(c, width=4, squeeze=2),
    "one_scale": lambda c: UNet(c, width=4, scales=1),
    "gated": lambda c: UNet(c, width=4, gate=True),
}
GENERATORS = UNETS | {"threshold": lambda c: UNet(c, width=4, output="threshold"), "ape": lambda c: ApeGenerator(c, 4)}


@pytest.mark.parametrize("kind", sorted(UNETS))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 13, 17)])
def test_a_fresh_residual_unet_is_the_identity(kind: str, shape: tuple[int, int, int]) -> None:
    images = torch.rand(2, *shape)
    assert torch.equal(UNETS[kind](shape[0])(images), images)


@pytest.mark.parametrize(("bias", "times"), [(-100.0, 0.0), (0.0, 1.0), (100.0, 2.0)])
def test_a_gate_scales_the_correction_of_each_image(bias: float, times: float) -> None:
    torch.manual_seed(0)
    network = UNet(1, width=4, gate=True)
    plain = UNet(1, width=4)
    with torch.no_grad():
        torch.nn.init.normal_(network.head.weight, std=1e-3)
        network.gate.bias.fill_(bias)  # type: ignore[union-attr]
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("gate.")})
    images = torch.rand(2, 1, 8, 8) / 2 + 0.25
    torch.testing.assert_close(network(images) - images, times * (plain(images) - images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("squeeze", [1, 2])
def test_a_fresh_threshold_unet_is_a_soft_threshold(squeeze: int) -> None:
    images = torch.rand(2, 3, 13, 17)
    expected = 1 / (1 + torch.exp(-6.0 * (images.double() - 0.5)))
    found = UNet(3, width=4, squeeze=squeeze, output="threshold", sharpness=6.0)(images)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(GENERATORS))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 17), (1, 28, 28), (3, 5, 9)])
def test_any_size(kind: str, shape: tuple[int, int, int]) -> None:
    network = GENERATORS[kind](shape[0]).eval()
    shake(network)
    images = torch.rand(3, *shape, requires_grad=True)
    out = network(images)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert 0 <= float(out.detach().min()) <= float(out.detach().max()) <= 1
    (gradient,) = torch.autograd.grad(out.square().sum(), images)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.flatten(1).abs().amax(1).min()) > 0  # an attacker can see through it


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_a_purified_image_does_not_depend_on_the_batch(kind: str) -> None:
    network = GENERATORS[kind](1)
    shake(network)
    network.eval().double()
    images = torch.rand(5, 1, 13, 17, dtype=torch.float64)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone, rtol=0, atol=1e-12)


def test_a_generator_in_training_mode_would_depend_on_it() -> None:
    # That the test above can fail: APE-GAN's own code left its batch norms in this mode.
    network = ApeGenerator(1, 4).train()
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        apart = network(images)[:1] - network(images[:2])[:1]
    assert float(apart.abs().max()) > 1e-4


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 17), (3, 32, 32)])
def test_discriminator(shape: tuple[int, int, int]) -> None:
    assert ApeDiscriminator(shape[0], 4)(torch.rand(3, *shape)).shape == (3,)


def test_registered_networks() -> None:
    assert {"ape", "unet"} <= set(generators)
    assert {"ape"} <= set(discriminators)


# The protected model, and its folder ---------------------------------------------------------------------------------


def test_protected_is_one_differentiable_module() -> None:
    defense = gan()
    shake(defense)
    classifier = create_classifier("convnet", channels=1, size=8, classes=3, mean=[0.4], std=[0.3]).eval()
    protected = Protected(classifier, defense)
    images = torch.rand(4, 1, 8, 8, requires_grad=True)
    logits = protected(images)
    assert torch.equal(logits, classifier(defense.generator(images)))
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    restored = defense.generator(images)
    (at_restored,) = torch.autograd.grad(classifier(restored)[:, 0].sum(), restored, retain_graph=True)
    (by_hand,) = torch.autograd.grad(restored, images, at_restored)
    torch.testing.assert_close(gradient, by_hand)
    assert protected.rejects(images).tolist() == [False] * 4  # no detectors
    assert {k.split(".")[0] for k in protected.state_dict()} == {"classifier", "defense"}
    assert torch.equal(Protected(classifier, create_defense("identity"))(images), classifier(images))


@pytest.mark.parametrize("discriminator", [None, APE])
def test_a_folder_rebuilds_its_defense_bit_for_bit(discriminator: dict[str, Any] | None, tmp_path: Path) -> None:
    defense = gan(channels=3, generator=APE, discriminator=discriminator, weights={"repair": 1.0}, clean_share=0.5)
    shake(defense)
    save_defense(tmp_path, defense, {"dataset": "toy"})
    again = load_defense(tmp_path)
    assert isinstance(again, PairedGAN)
    assert defense.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in defense.state_dict().items())
    images = torch.rand(2, 3, 13, 17)
    assert torch.equal(again.purify(images), defense.eval().purify(images))
    assert (again.spec, again.weights, again.clean_share) == (defense.spec, defense.weights, 0.5)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert json.loads((tmp_path / "defense.json").read_text())["about"] == {"dataset": "toy"}


def test_folders_that_hold_no_defense(tmp_path: Path) -> None:
    assert torch.equal(load_defense("identity").purify(torch.ones(1, 1, 2, 2)), torch.ones(1, 1, 2, 2))
    with pytest.raises(RunError, match="holds no trained defense; train one with"):
        load_defense(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="only a defense made by create_defense"):
        save_defense(tmp_path, PairedGAN(channels=1, generator=UNET), {})
    save_defense(tmp_path, gan(), {})
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="truncated or not a safetensors file"):
        load_defense(tmp_path)
    weights.unlink()
    with pytest.raises(RunError, match="no weights at"):
        load_defense(tmp_path)
    save_defense(tmp_path / "other", gan(generator={"name": "unet", "width": 8}), {})
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"does not hold the weights of .*defense\.json"):
        load_defense(tmp_path)
