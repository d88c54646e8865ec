"""Defense-GAN: an image is replaced by the nearest one that a generator of clean images can draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.defenses.base import Batch, Defense, defenses
from unperturb.defenses.gan_losses import frozen, gradient_penalty
from unperturb.devices import probe


def _sides(size: int) -> list[int]:
    """Sides of the images from the smallest stage to the whole: `[4, 7, 14, 28]`."""
    sides = [size]
    while sides[-1] > 4:
        sides.append(-(-sides[-1] // 2))
    return sides[::-1]


def _widths(width: int, stages: int) -> list[int]:
    """Channels at each of `stages` resolutions, from the smallest: four times `width` at most."""
    return [width * min(2**k, 4) for k in reversed(range(stages))]


class LatentGenerator(nn.Module):
    """Latents `(N, latent)` -> images `(N, C, size, size)` in [0, 1]: a linear layer, then 5x5 transposed convolutions.

    Source: the authors' code, `mnist_generator` (which no batch norm is switched on in): 4x4, 7x7, 14x14, 28x28 with
    4, 2 and 1 times `width` channels. Other sizes halve likewise until they reach 4.
    """

    def __init__(self, channels: int, size: int, width: int, latent: int) -> None:
        super().__init__()
        self.sides = _sides(size)
        widths = _widths(width, len(self.sides) - 1)
        self.start = (widths[0], self.sides[0], self.sides[0])
        self.first = nn.Linear(latent, widths[0] * self.sides[0] ** 2)
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 5, stride=2, padding=2, output_padding=1)
            for a, b in zip(widths, [*widths[1:], channels])
        )

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(1, self.start)
        for side, grow in zip(self.sides[1:], self.grow):
            x = grow(F.relu(x))[..., :side, :side]
        return torch.sigmoid(x)


class Critic(nn.Module):
    """Images `(N, C, size, size)` in [0, 1] -> one number each, `(N,)`, the larger the more like a real one.

    Source: the authors' code, `mnist_discriminator`: 5x5 convolutions of stride 2, no batch norm, one linear layer.
    """

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        sides = _sides(size)
        widths = [channels, *reversed(_widths(width, len(sides) - 1))]
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 5, stride=2, padding=2) for a, b in pairwise(widths))
        self.last = nn.Linear(widths[-1] * sides[0] ** 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for shrink in self.shrink:
            x = F.leaky_relu(shrink(x), 0.2)
        return self.last(x.flatten(1)).squeeze(1)


@defenses.register("defense_gan")
class DefenseGAN(Defense):
    """Defense-GAN: each image becomes the nearest one in the range of a WGAN trained on clean images.

    channels, size: of the images, `size` their side. width: channels of both networks' finest layer. latent: length
    of z. steps, restarts: gradient steps per image, and from how many starts (the paper's L and R). lr, momentum: of
    these steps. seed: of the starts, which are the same for every image; None draws them from torch's generator at
    each call. unroll: so many of the last steps keep their graph, so that an attacker can differentiate through them
    (0: none; `steps`: the exact gradient, of memory in proportion). detect: score images by their reconstruction error,
    which costs as much as purifying them. precision: of the search alone, "float32", "bfloat16" or "auto" (the faster
    here); which of its finds is nearest is always judged in float32. drop_rate: fraction of clean validation images
    that this detector may turn away. critic_steps: updates of the critic per update of the generator, each on its own
    part of the batch. penalty: weight of the gradient penalty.

    Source: Samangouei, Kabkab and Chellappa, ICLR 2018, and the authors' code.
    """

    learns_from_pairs = False
    held_out = 50  # two seconds an image

    def __init__(
        self,
        *,
        channels: int,
        size: int,
        width: int = 64,
        latent: int = 128,
        steps: int = 200,
        restarts: int = 10,
        lr: float = 10.0,
        momentum: float = 0.7,
        seed: int | None = 0,
        unroll: int = 0,
        detect: bool = True,
        precision: str = "float32",
        drop_rate: float = 0.05,
        critic_steps: int = 5,
        penalty: float = 10.0,
    ) -> None:
        super().__init__()
        if size < 5:
            raise ValueError(f"size must be at least 5, not {size}")
        for name, value in (("steps", steps), ("restarts", restarts), ("critic_steps", critic_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f'precision must be "auto", "float32" or "bfloat16", not "{precision}"')
        if not 0 <= unroll <= steps:
            raise ValueError(f"unroll must be in [0, steps], not {unroll}")
        self.size, self.latent = size, latent
        self.steps, self.restarts, self.lr, self.momentum = steps, restarts, lr, momentum
        self.seed, self.unroll, self.detect = seed, unroll, detect
        self.precision = precision
        self.critic_steps, self.penalty = critic_steps, penalty
        self.differentiable, self.random = unroll > 0, seed is None
        self.generator = LatentGenerator(channels, size, width, latent)
        self.critic = Critic(channels, size, width)
        self.add_detectors(1 if detect else 0, drop_rate)

    def purify(self, images: Tensor) -> Tensor:
        return self.reconstruct(images)[0]

    def scores(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> Tensor:
        return self.reconstruct(images)[1][:, None] if self.detect else images.new_zeros(len(images), 0)

    def _purify_and_score(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        found, errors = self.reconstruct(images)
        return found, errors[:, None] if self.detect else images.new_zeros(len(images), 0)

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(nearest images that were found, `(N, C, H, W)`; their mean squared errors, `(N,)`), the best of all starts.

        Every image takes its own steps: what the others in the batch are changes nothing.
        """
        unroll = self.unroll if torch.is_grad_enabled() and images.requires_grad else 0
        for z in self.search(images, unroll):
            latents = z
        with torch.set_grad_enabled(unroll > 0):
            return self.nearest(latents if unroll else latents.detach(), images)

    def search(self, images: Tensor, unroll: int = 0) -> Iterator[Tensor]:
        """Yield the latents `(N, restarts, latent)` after each step; those of the last `unroll` steps depend on the
        images."""
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"this generator draws {self.size}x{self.size} images, not {images.shape[-2]}x{images.shape[-1]}; "
                "train one for that size"
            )
        goal = images.repeat_interleave(self.restarts, 0)
        device = images.device.type
        precision = probe(device).precision if self.precision == "auto" else self.precision
        z = self._starts(images)
        velocity = torch.zeros_like(z)
        for step in range(self.steps):
            kept = step >= self.steps - unroll
            if not kept or step == self.steps - unroll:
                z, velocity = z.detach().requires_grad_(), velocity.detach()
            with torch.enable_grad():
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                    found = self.generator(z)
                error = squared_error(found, goal if kept else goal.detach())
                (slope,) = torch.autograd.grad(error.sum(), z, create_graph=kept)
                velocity = self.momentum * velocity + slope
                z = z - self.lr * velocity
            yield z.unflatten(0, (len(images), self.restarts))

    def nearest(self, z: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """(for each image the nearest that one of its latents draws; its mean squared error, `(N,)`), from latents
        `(N, R, latent)`."""
        restarts = z.shape[1]
        found = self.generator(z.flatten(0, 1))
        error = squared_error(found, images.repeat_interleave(restarts, 0)).unflatten(0, (len(images), restarts))
        best = error.argmin(1, keepdim=True)
        rows = torch.arange(len(images), device=images.device) * restarts + best.squeeze(1)
        return found[rows], error.gather(1, best).squeeze(1)

    def _starts(self, images: Tensor) -> Tensor:
        """`(N * restarts, latent)`, normal with standard deviation latent^(-1/2), as in the authors' code."""
        if self.seed is None:
            z = torch.randn(len(images) * self.restarts, self.latent, device=images.device, dtype=images.dtype)
        else:
            drawn = torch.randn(self.restarts, self.latent, generator=torch.Generator().manual_seed(self.seed))
            z = drawn.to(images).repeat(len(images), 1)
        return z * self.latent**-0.5

    def networks(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "generator": self.generator}

    def losses(self, batch: Batch, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        parts = batch.x_real.tensor_split(min(self.critic_steps, len(batch.x_real)))
        for x_real in parts:
            with torch.no_grad():
                x_fake = networks["generator"](self._latents(x_real)).float()
            d = networks["critic"](torch.cat([x_real, x_fake])).float()
            yield (
                "critic",
                {
                    "distance": d[len(x_real) :].mean() - d[: len(x_real)].mean(),
                    "penalty": self.penalty * gradient_penalty(networks["critic"], x_real, x_fake),
                },
            )
        x_fake = networks["generator"](self._latents(parts[0])).float()
        yield "generator", {"generator_loss": -frozen(self.critic)(x_fake).float().mean()}

    def _latents(self, like: Tensor) -> Tensor:
        return torch.randn(len(like), self.latent, device=like.device)


def squared_error(found: Tensor, goal: Tensor) -> Tensor:
    """Mean squared error of each image, `(N,)`. A mean, because the steps' length of 10 is for a mean."""
    return (found - goal).square().flatten(1).mean(1)
