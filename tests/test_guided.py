"""The guided purifier: a robust classifier inside decides, a U-Net writes the decision into the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unperturb import runs
from unperturb.classifiers import create_classifier, save_classifier
from unperturb.defenses import Protected, create_defense, load_defense, save_defense
from unperturb.defenses.guided import GuidedUNet
from unperturb.defenses.networks import UNet
from unperturb.defenses.paired_gan import PairedGAN
from unperturb.training import jobs

GUIDED = {"name": "guided", "encoder": {"name": "convnet"}, "size": 8, "classes": 3, "width": 4}


def guided(**options: Any) -> PairedGAN:
    defense = create_defense("paired_gan", channels=1, generator={**GUIDED, **options}, weights={"label": 1.0})
    assert isinstance(defense, PairedGAN)
    return defense


def generator(defense: PairedGAN) -> GuidedUNet:
    assert isinstance(defense.generator, GuidedUNet)
    return defense.generator


def steering(defense: PairedGAN) -> PairedGAN:
    """With a last layer that does something."""
    nn.init.normal_(generator(defense).unet.head.weight, std=0.3)
    nn.init.normal_(generator(defense).nudges, std=0.1)
    return defense


def test_it_begins_as_the_identity_and_takes_one_size() -> None:
    defense = guided()
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(defense(images), images)
    assert defense.size == 8
    with pytest.raises(ValueError, match=r"convnet takes images \(N, 1, 8, 8\)"):
        defense(torch.rand(1, 1, 12, 12))


def test_what_it_does_follows_the_decision() -> None:
    defense = steering(guided())
    g, images = generator(defense), torch.rand(4, 1, 8, 8)
    for decided in range(3):
        with torch.no_grad():
            last = g.encoder.net[-1]
            last.weight.zero_()
            last.bias.copy_(50.0 * torch.eye(3)[decided])
        by_hand = g.unet(images, g.planes[decided].expand(4, -1, -1, -1), g.nudges[decided].expand(4, -1, -1, -1))
        torch.testing.assert_close(defense(images), by_hand.clamp(0, 1))


def test_no_pixel_moves_further_than_its_limit() -> None:
    images = torch.rand(4, 1, 8, 8) * 0.5 + 0.25
    for limit, most in ((0.1, 0.1), ("16/255", 16 / 255)):
        g = generator(guided(limit=limit))
        nn.init.normal_(g.unet.head.weight, std=30)
        moved = float((g(images) - images).abs().max().detach())
        assert most * 0.98 <= moved <= most * (1 + 1e-5)
    # Well inside, the limit changes nothing.
    plain, limited = UNet(1, width=4), UNet(1, width=4, limit=0.5)
    limited.load_state_dict(plain.state_dict())
    for unet in (plain, limited):
        nn.init.constant_(unet.head.bias, 0.01)
    torch.testing.assert_close(plain(images), limited(images), atol=1e-5, rtol=0)


def test_an_attacker_meets_the_encoder_too() -> None:
    defense = steering(guided())
    g = generator(defense)
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    (whole,) = torch.autograd.grad(defense(images).sum(), images)
    guide, nudge = (
        torch.einsum("nk,kchw->nchw", g.encoder(images).softmax(1), t).detach() for t in (g.planes, g.nudges)
    )
    (blind,) = torch.autograd.grad(g.unet(images, guide, nudge).clamp(0, 1).sum(), images)
    assert float((whole - blind).abs().max()) > 1e-6


def test_the_encoder_stays_as_it_is_unless_it_is_to_learn() -> None:
    vgg = {"encoder": {"name": "vgg", "width": 4, "stages": 2}}  # batch norms have statistics that could move
    for learns in (False, True):
        defense = steering(guided(**vgg, train_encoder=learns)).train()
        g = generator(defense)
        before = {k: v.clone() for k, v in g.state_dict().items()}
        optimizer = torch.optim.SGD((p for p in g.parameters() if p.requires_grad), lr=0.1)
        g(torch.rand(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        moved = {k.split(".")[0] for k, v in g.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == {"nudges", "planes", "unet"} | ({"encoder"} if learns else set())


def test_a_run_of_a_classifier_gives_its_weights_to_the_encoder(tmp_path: Path) -> None:
    options = {"channels": 1, "size": 8, "classes": 3, "mean": [0.1], "std": [0.3]}
    robust = create_classifier("convnet", **options).eval()
    save_classifier(tmp_path / "robust", robust)
    defense = guided()
    planes = generator(defense).planes.clone()
    jobs.begin_with(defense, str(tmp_path / "robust"))
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(generator(defense).encoder(images), robust(images))  # its mean and deviation, too
    assert torch.equal(generator(defense).planes, planes)
    save_classifier(tmp_path / "other", create_classifier("lenet5", **{**options, "size": 16}))
    with pytest.raises(runs.RunError, match="other: its networks are not those of this recipe"):
        jobs.begin_with(defense, str(tmp_path / "other"))
    unguided = create_defense("paired_gan", channels=1, generator={"name": "unet", "width": 4})
    with pytest.raises(runs.RunError, match="is a classifier, not a purifier"):
        jobs.begin_with(unguided, str(tmp_path / "robust"))


def test_a_folder_rebuilds_it(tmp_path: Path) -> None:
    defense = steering(guided(limit="16/255"))
    save_defense(tmp_path, defense, {})
    images = torch.rand(4, 1, 8, 8)
    again = load_defense(tmp_path)
    assert torch.equal(again(images), defense.eval()(images))
    classifier = create_classifier("convnet", channels=1, size=8, classes=3, mean=[0.5], std=[0.5]).eval()
    assert Protected(classifier, again)(images).shape == (4, 3)
