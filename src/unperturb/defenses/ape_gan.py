"""APE-GAN: a GAN that is shown an adversarial image and draws the clean one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.defenses.base import Batch, Defense, defenses
from unperturb.defenses.gan_losses import adversarial, discrimination, frozen
from unperturb.defenses.networks import ApeDiscriminator, ApeGenerator


def mse(x_fake: Tensor, x_real: Tensor) -> Tensor:
    """Mean squared error over the pixels of the batch. Source: Shen et al. 2017."""
    return F.mse_loss(x_fake, x_real)


def rmse(x_fake: Tensor, x_real: Tensor) -> Tensor:
    """Its root, over the whole batch at once, as in the authors' TensorFlow code."""
    # The root has no slope at 0, which a generator that copies its input would meet.
    return F.mse_loss(x_fake, x_real).clamp(min=1e-12).sqrt()


CONTENT = {"mse": mse, "rmse": rmse}


@defenses.register("ape_gan")
class ApeGAN(Defense):
    """APE-GAN: a generator repairs adversarial images under a pixel loss and a discriminator.

    channels: of the images. width: channels of both networks' first layer. content: how pixels are compared, `"mse"`
    or `"rmse"`. content_weight, adversarial_weight: of the generator's two terms. generator_updates: per update of the
    discriminator.

    Source: Shen et al. 2017, arXiv 1707.05474, and the authors' code, which updates the generator twice.
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int = 64,
        content: Literal["mse", "rmse"] = "rmse",
        content_weight: float = 0.7,
        adversarial_weight: float = 0.3,
        generator_updates: int = 2,
    ) -> None:
        super().__init__()
        if content not in CONTENT:
            raise ValueError(f"content must be 'mse' or 'rmse', not {content!r}")
        if generator_updates < 1:
            raise ValueError(f"generator_updates must be at least 1, not {generator_updates}")
        self.content = CONTENT[content]
        self.content_weight, self.adversarial_weight = content_weight, adversarial_weight
        self.generator_updates = generator_updates
        self.generator = ApeGenerator(channels, width)
        self.discriminator = ApeDiscriminator(channels, width)

    def purify(self, images: Tensor) -> Tensor:
        return self.generator(images)

    def networks(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator, "generator": self.generator}

    def losses(self, batch: Batch, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        # What G draws is computed once and serves both networks, until G has moved.
        x_fake = networks["generator"](batch.x_adv)
        d_real, d_fake = _asked(networks["discriminator"], batch.x_real, x_fake.detach())
        yield "discriminator", {"discrimination": discrimination(d_real, d_fake)}
        for update in range(self.generator_updates):
            if update:
                x_fake = networks["generator"](batch.x_adv)
            _, d_fake = _asked(frozen(self.discriminator), batch.x_real, x_fake)
            yield (
                "generator",
                {
                    "content": self.content_weight * self.content(x_fake, batch.x_real),
                    "adversarial": self.adversarial_weight * adversarial(d_fake),
                },
            )


def _asked(discriminator: Callable[[Tensor], Tensor], x_real: Tensor, x_fake: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of clean and of restored images, `(N,)` each, asked in one batch in every turn: the statistics of the
    discriminator's batch norms are then those that it has learned to judge by."""
    d = discriminator(torch.cat([x_real, x_fake])).float()
    return d[: len(x_real)], d[len(x_real) :]
