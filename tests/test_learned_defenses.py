"""APE-GAN, MagNet and Defense-GAN: losses, scores and steps against numbers worked out another way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from unperturb.defenses import Batch, ape_gan, create_defense, defense_gan, gan_losses, magnet
from unperturb.defenses.ape_gan import ApeGAN
from unperturb.defenses.defense_gan import Critic, DefenseGAN, LatentGenerator, squared_error
from unperturb.defenses.magnet import AutoEncoder, MagNet
from unperturb.devices import FlopCounter, Speed, probe


def linear(images: Tensor) -> Tensor:
    """A stand-in for a classifier, `(N, 3)` logits."""
    return images.flatten(1) @ torch.linspace(-1, 1, images[0].numel() * 3).reshape(-1, 3).to(images)


def pairs(n: int = 6) -> Batch:
    x_real = torch.rand(n, 1, 8, 8)
    return Batch(x_real, (x_real + 0.2 * torch.randn_like(x_real)).clamp(0, 1), torch.arange(n) % 3, linear)


# APE-GAN -------------------------------------------------------------------------------------------------------------


def apes(**options: Any) -> ApeGAN:
    defense = create_defense("ape_gan", **{"channels": 1, "width": 4, **options})
    assert isinstance(defense, ApeGAN)
    return defense


def test_content_by_hand() -> None:
    real, fake = torch.zeros(2, 1, 2, 2), torch.stack([torch.full((1, 2, 2), 0.3), torch.full((1, 2, 2), 0.1)])
    assert float(ape_gan.mse(fake, real)) == pytest.approx(0.05)
    assert float(ape_gan.rmse(fake, real)) == pytest.approx(math.sqrt(0.05))  # over the batch, not a mean of roots
    same = real.clone().requires_grad_()
    ape_gan.rmse(same, real).backward()
    assert bool(torch.isfinite(same.grad).all())  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["mse", "rmse"])
def test_what_apes_minimize(content: Any) -> None:
    defense, batch = apes(content=content).eval(), pairs()
    turns = list(defense.losses(batch, defense.networks()))
    assert [network for network, _ in turns] == ["discriminator", "generator", "generator"]
    x_fake = defense.purify(batch.x_adv)
    d_real, d_fake = defense.discriminator(batch.x_real), defense.discriminator(x_fake)
    # -log sigmoid(d) for what is real, -log sigmoid(-d) for what is not, and a mean of the two.
    expected = (nn.functional.softplus(-d_real).mean() + nn.functional.softplus(d_fake).mean()) / 2
    torch.testing.assert_close(turns[0][1]["discrimination"], expected)
    error = (x_fake - batch.x_real).square().mean()
    for _, terms in turns[1:]:
        torch.testing.assert_close(terms["content"], 0.7 * (error if content == "mse" else error.sqrt()))
        torch.testing.assert_close(terms["adversarial"], 0.3 * nn.functional.softplus(-d_fake).mean())


def test_apes_judge_as_the_discriminator_has_learned_to() -> None:
    defense, batch = apes().train(), pairs()
    shown: list[Tensor] = []
    defense.discriminator.body[0].register_forward_hook(lambda _, args, __: shown.append(args[0].detach()))
    list(defense.losses(batch, defense.networks()))
    assert [len(x) for x in shown] == [12, 12, 12]
    for x in shown:  # clean ones first, in the discriminator's own range of [-1, 1]
        torch.testing.assert_close(x[:6], batch.x_real * 2 - 1)


def test_wrong_options_of_apes() -> None:
    with pytest.raises(ValueError, match="content must be 'mse' or 'rmse'"):
        apes(content="mae")
    with pytest.raises(ValueError, match="generator_updates must be at least 1"):
        apes(generator_updates=0)


# MagNet --------------------------------------------------------------------------------------------------------------


def nets(**options: Any) -> MagNet:
    defense = create_defense("magnet", **{"channels": 1, **options})
    assert isinstance(defense, MagNet)
    return defense.eval()


@pytest.mark.parametrize(
    ("structure", "channels", "weights"),
    [
        # conv 1-3, pool, conv 3-3, conv 3-3, up, conv 3-3, conv 3-1: the authors' MNIST_I
        ([3, "average", 3], 1, 30 + 84 + 84 + 84 + 28),
        ([3], 1, 30 + 84 + 28),  # conv 1-3, conv 3-3, conv 3-1: MNIST_II
        ([3], 3, 84 + 84 + 84),
    ],
)
def test_the_autoencoders_of_the_authors(structure: list[Any], channels: int, weights: int) -> None:
    net = AutoEncoder(channels, structure)
    assert sum(p.numel() for p in net.parameters()) == weights
    assert all(not m.bias.any() for m in net.modules() if isinstance(m, nn.Conv2d))  # type: ignore[union-attr]
    layers = net(torch.rand(2, channels, 28, 28))
    assert [x.shape[1:] for x in layers[:-1]] == [
        {1: (3, 28, 28), 2: (3, 14, 14)}[2 if "average" in structure and k in (1, 2) else 1]
        for k in range(len(layers) - 1)
    ]
    assert layers[-1].shape == (2, channels, 28, 28)


def test_an_autoencoder_against_layers_put_together() -> None:
    net, images = AutoEncoder(1, [3, "average", 3]), torch.rand(2, 1, 8, 8)
    c = list(net.convolutions)
    s = nn.Sigmoid()
    by_layers = nn.Sequential(c[0], s, nn.AvgPool2d(2), c[1], s, c[2], s, nn.Upsample(scale_factor=2), c[3], s, c[4], s)
    torch.testing.assert_close(net(images)[-1], by_layers(images))


def test_divergence_against_scipy() -> None:
    a, b = 5 * torch.randn(20, 10), 5 * torch.randn(20, 10)
    for temperature in (1.0, 10.0, 40.0):
        p, q = ((x / temperature).double().softmax(1).numpy() for x in (a, b))
        expected = [jensenshannon(i, j) ** 2 for i, j in zip(p, q)]
        np.testing.assert_allclose(magnet.divergence(a, b, temperature).numpy(), expected, rtol=2e-4)
    assert float(magnet.divergence(a, a + 3).abs().max()) < 1e-6
    sure = torch.tensor([[400.0, 0.0], [0.0, 400.0]])
    torch.testing.assert_close(magnet.divergence(sure, sure.flip(1)), torch.full((2,), math.log(2)))


def test_scores_of_every_detector() -> None:
    detectors = [{"error": 2}, {"error": 1, "structure": [3]}, {"temperature": 10}, {"temperature": 40}]
    defense, images = nets(detectors=detectors), torch.rand(7, 1, 8, 8)
    asked: list[int] = []

    def counted(x: Tensor) -> Tensor:
        asked.append(len(x))
        return linear(x)

    found = defense.scores(images, counted).detach().numpy()
    assert asked == [7, 7]  # the images and what the reformer makes of them, once each for both temperatures
    assert defense.watchers is not None
    x, restored = images.numpy(), defense.purify(images).detach().numpy()
    own = defense.watchers.members[0](images)[-1].detach().numpy()
    np.testing.assert_allclose(found[:, 0], ((x - restored) ** 2).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], np.abs(x - own).mean((1, 2, 3)), rtol=1e-5)
    for column, temperature in ((2, 10), (3, 40)):
        p, q = ((linear(torch.as_tensor(v)) / temperature).softmax(1).double().numpy() for v in (x, restored))
        expected = [jensenshannon(i, j) ** 2 for i, j in zip(p, q)]
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-3, atol=1e-7)


def test_what_magnet_minimizes() -> None:
    defense = nets(pack=3, diversity=0.2, noise=0.3, activity=1e-4)
    batch = pairs()
    torch.manual_seed(2)
    turns = dict(defense.losses(batch, defense.networks()))
    torch.manual_seed(2)
    noisy = (batch.x_real + 0.3 * torch.randn_like(batch.x_real)).clamp(0, 1)
    members = [m(noisy) for m in defense.reformers.members]
    outs = [layers[-1] for layers in members]
    mean = sum(outs) / 3
    squares = sum(float((layer.detach() ** 2).sum()) for layers in members for layer in layers)
    terms = turns["reformers"]
    errors = [float((o - batch.x_real).detach().square().mean()) for o in outs]
    assert float(terms["reconstruction"].detach()) == pytest.approx(sum(errors))
    assert float(terms["diversity"].detach()) == pytest.approx(
        -0.2 * sum(float((o - mean).detach().square().mean()) for o in outs)
    )
    assert float(terms["activity"].detach()) == pytest.approx(1e-4 * squares, rel=1e-5)
    assert set(turns["watchers"]) == {"reconstruction", "activity"}
    assert set(nets(detectors=[]).networks()) == {"reformers"}


def test_a_pack_draws_one_member_for_each_image() -> None:
    defense, images = nets(pack=4), torch.rand(400, 1, 8, 8)
    every = torch.stack([m(images)[-1] for m in defense.reformers.members])
    out = defense.purify(images)
    near = (every - out).flatten(2).abs().amax(2)  # (member, image)
    drawn = near.argmin(0)
    assert float(near.gather(0, drawn[None]).detach().max()) < 1e-6
    assert stats.chisquare(drawn.bincount(minlength=4).numpy()).pvalue > 1e-3
    assert not nets().random


def test_wrong_options_of_magnet() -> None:
    for options, message in (
        ({"structure": [3, "mean"]}, "structure holds filter counts, 'average' and 'max', not 'mean'"),
        ({"pack": 0}, "pack must be at least 1"),
        ({"diversity": 0.1}, "diversity needs a pack"),
        ({"detectors": [{"error": 1, "temperature": 10}]}, "a detector has error or temperature"),
        ({"detectors": [{"structure": [3]}]}, "a detector has error or temperature"),
        ({"detectors": [{"error": 1, "norm": 2}]}, "a detector has error or temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            nets(**options)


# Defense-GAN ---------------------------------------------------------------------------------------------------------


def gans(**options: Any) -> DefenseGAN:
    small = {"channels": 1, "size": 8, "width": 2, "latent": 6, "steps": 5, "restarts": 3}
    defense = create_defense("defense_gan", **{**small, **options})
    assert isinstance(defense, DefenseGAN)
    return defense.eval()


def test_networks_of_the_authors() -> None:
    # mnist_generator: 128 -> 4x4x256, deconvolutions to 128, 64 and 1, 5x5 each; the critic runs back.
    net, critic = LatentGenerator(1, 28, 64, 128), Critic(1, 28, 64)
    sizes: list[tuple[int, ...]] = []
    for layer in [*net.grow, *critic.shrink]:
        layer.register_forward_hook(lambda _, args, __: sizes.append(tuple(args[0].shape[1:])))
    images = net(torch.randn(2, 128))
    assert images.shape == (2, 1, 28, 28)
    assert critic(images).shape == (2,)
    assert sizes == [(256, 4, 4), (128, 7, 7), (64, 14, 14), (1, 28, 28), (64, 14, 14), (128, 7, 7)]
    with FlopCounter() as counter:
        net.requires_grad_(False)
        z = torch.randn(1, 128, requires_grad=True)
        torch.autograd.grad(net(z).sum(), z)
    # What a step costs, as the card says: multiply-accumulates forward, as many back, two operations each.
    assert counter.total == 4 * (128 * 4096 + 16 * 25 * 256 * 128 + 49 * 25 * 128 * 64 + 196 * 25 * 64)
    assert sum(p.numel() for p in net.parameters()) == (
        129 * 4096 + 256 * 128 * 25 + 128 + 128 * 64 * 25 + 64 + 64 * 25 + 1
    )
    for size, channels in ((32, 3), (5, 1), (37, 2)):
        assert LatentGenerator(channels, size, 2, 4)(torch.randn(3, 4)).shape == (3, channels, size, size)
        assert Critic(channels, size, 2)(torch.rand(3, channels, size, size)).shape == (3,)


def test_the_gradient_penalty_of_a_linear_critic() -> None:
    # Its slope is w everywhere: (|w| - 1)^2, whatever the images are.
    w = torch.randn(1, 8, 8)
    found = gan_losses.gradient_penalty(
        lambda x: (x * w).flatten(1).sum(1), torch.rand(5, 1, 8, 8), torch.rand(5, 1, 8, 8)
    )
    assert float(found) == pytest.approx((float(w.norm()) - 1) ** 2, rel=1e-5)


def test_the_gradient_penalty_is_taken_between_the_pairs() -> None:
    # The slope of |x|^2 / 2 at x is x: between an image of length 3 and itself it is 3.
    image = torch.randn(5, 1, 8, 8)
    image = 3 * image / image.flatten(1).norm(dim=1)[:, None, None, None]

    def half(x: Tensor) -> Tensor:
        return x.square().flatten(1).sum(1) / 2

    assert float(gan_losses.gradient_penalty(half, image, image).detach()) == pytest.approx(4, rel=1e-5)
    lengths = [float(gan_losses.gradient_penalty(half, image[:1], -image[:1]).detach().sqrt()) for _ in range(200)]
    # At share u of the way from x to -x the length is 3 |1 - 2u|: the penalty's root is ||3 |1 - 2u|| - 1|.
    u = (torch.arange(2000) + 0.5) / 2000
    expected = (3 * (1 - 2 * u).abs() - 1).abs()
    assert stats.kstest(lengths, expected.numpy()).pvalue > 1e-3


def test_what_the_two_networks_minimize() -> None:
    defense = gans(critic_steps=3)
    batch = pairs(7)
    shown: list[Tensor] = []
    defense.critic.shrink[0].register_forward_hook(lambda _, args, __: shown.append(args[0].detach()))
    torch.manual_seed(4)
    turns = list(defense.losses(batch, defense.networks()))
    assert [network for network, _ in turns] == ["critic"] * 3 + ["generator"]
    real = torch.cat([shown[2 * k][:n] for k, n in enumerate((3, 2, 2))])
    assert torch.equal(real, batch.x_real)  # each update has a part of its own
    for k, n in enumerate((3, 2, 2)):
        d = defense.critic(shown[2 * k])
        torch.testing.assert_close(turns[k][1]["distance"], d[n:].mean() - d[:n].mean())
        between = shown[2 * k + 1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(defense.critic(between).sum(), between)
        expected = 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
        torch.testing.assert_close(turns[k][1]["penalty"], expected)
    torch.testing.assert_close(turns[3][1]["generator_loss"], -defense.critic(shown[6]).mean())
    assert len(list(gans().losses(pairs(2), gans().networks()))) == 3  # a part without images is left out


def test_the_steps_against_torchs_optimizer() -> None:
    defense, images = gans(steps=12, lr=3.0).requires_grad_(False), torch.rand(4, 1, 8, 8)
    starts = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) / math.sqrt(6)
    best = []
    for image in images:  # one image and one start at a time
        found = []
        for start in starts:
            z = start.clone()[None].requires_grad_()
            optimizer = torch.optim.SGD([z], lr=3.0, momentum=0.7)
            for _ in range(12):
                optimizer.zero_grad()
                (defense.generator(z)[0] - image).square().mean().backward()
                optimizer.step()
            out = defense.generator(z)[0].detach()
            found.append((float((out - image).square().mean()), out))
        best.append(min(found, key=lambda pair: pair[0]))
    out, error = defense.reconstruct(images)
    torch.testing.assert_close(out, torch.stack([o for _, o in best]), rtol=0, atol=1e-5)
    torch.testing.assert_close(error, torch.tensor([e for e, _ in best]), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(defense.scores(images, linear), error[:, None])
    assert len({tuple(o.flatten()[:3].tolist()) for _, o in best}) > 1


def test_an_image_that_the_generator_draws_is_found() -> None:
    defense = gans(steps=200, restarts=4, lr=40.0).requires_grad_(False)
    for parameter in defense.generator.parameters():
        parameter.mul_(2)  # a fresh one draws nothing but grey
    drawn = defense.generator(0.4 * torch.randn(5, 6))
    noisy = (drawn + 0.1 * torch.randn_like(drawn)).clamp(0, 1)
    found, _ = defense.reconstruct(noisy)
    assert float((defense.purify(drawn) - drawn).square().mean()) < 1e-4
    assert float((found - drawn).square().mean()) < 0.5 * float((noisy - drawn).square().mean())
    with torch.no_grad():
        assert torch.equal(defense.reconstruct(noisy)[0], found)


def test_the_search_in_bfloat16_finds_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gans(steps=60, restarts=3, lr=20.0, width=8).requires_grad_(False)
    for parameter in exact.generator.parameters():
        parameter.mul_(2)
    coarse = gans(steps=60, restarts=3, lr=20.0, width=8, precision="bfloat16").requires_grad_(False)
    coarse.load_state_dict(exact.state_dict())
    images = (exact.generator(0.4 * torch.randn(8, 6)) + 0.2 * torch.randn(8, 1, 8, 8)).clamp(0, 1)
    (a, a_error), (b, b_error) = exact.reconstruct(images), coarse.reconstruct(images)
    assert a.dtype == b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert float(b_error.mean()) < 1.02 * float(a_error.mean())
    torch.testing.assert_close(b_error, squared_error(b, images))  # judged in float32
    for precision, expected in (("float32", a), ("bfloat16", b)):
        monkeypatch.setattr(defense_gan, "probe", lambda _="cpu", p=precision: Speed({(p, "contiguous"): 1.0}))
        auto = gans(steps=60, restarts=3, lr=20.0, width=8, precision="auto").requires_grad_(False)
        auto.load_state_dict(exact.state_dict())
        assert torch.equal(auto.purify(images), expected)
    with pytest.raises(ValueError, match='precision must be "auto", "float32" or "bfloat16", not "half"'):
        gans(precision="half")


def test_the_probe_for_the_faster_precision_is_not_counted_as_work() -> None:
    with FlopCounter() as counter:
        probe(channels=2, size=4, batch=3)  # asked for nowhere else: not kept from before
    assert counter.total == 0


def test_what_an_attacker_may_differentiate() -> None:
    images = torch.rand(2, 1, 8, 8)
    hidden = gans().requires_grad_(False)
    assert not hidden.differentiable
    assert not hidden.purify(images.clone().requires_grad_()).requires_grad
    gradients = []
    for unroll in (1, 3, 5):
        defense = gans(unroll=unroll).requires_grad_(False)
        defense.load_state_dict(hidden.state_dict())
        assert defense.differentiable
        at = images.clone().requires_grad_()
        out = defense.purify(at)
        torch.testing.assert_close(out.detach(), hidden.purify(images))
        gradients.append(torch.autograd.grad(out.square().sum(), at)[0])
        assert not defense.purify(images).requires_grad  # nobody asked for a gradient
    assert float((gradients[2] - gradients[0]).norm()) > 0.1 * float(gradients[2].norm())


def test_starts() -> None:
    images = torch.rand(3, 1, 8, 8)
    fixed = gans()
    assert torch.equal(fixed._starts(images).reshape(3, 3, 6)[0], fixed._starts(images).reshape(3, 3, 6)[2])
    assert not torch.equal(gans(seed=1)._starts(images), fixed._starts(images))
    drawn = gans(seed=None, restarts=400)
    assert drawn.random
    assert not torch.equal(drawn._starts(images), drawn._starts(images))
    assert stats.kstest(drawn._starts(images).flatten().numpy() * math.sqrt(6), "norm").pvalue > 1e-3


def test_wrong_options_of_defense_gan() -> None:
    for options, message in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"unroll": 6}, r"unroll must be in \[0, steps\]"),
        ({"size": 4}, "size must be at least 5"),
        ({"drop_rate": 1.0}, "drop_rate must be"),
    ):
        with pytest.raises(ValueError, match=message):
            gans(**options)
