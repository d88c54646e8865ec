"""The paper's defense: a GAN denoiser with repair, recovery and isomorphic losses on clean and adversarial images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.defenses.base import Batch, Defense, defenses
from unperturb.defenses.gan_losses import adversarial, discrimination, frozen
from unperturb.defenses.networks import discriminators, generators

# The losses, as functions of tensors. Images are (N, C, H, W) in [0, 1]; each returns a scalar. The paper's equations
# survive only in words: "repair", "recovery" and "isomorphic" are its names, and where a reading is ours it says so.


def repair(x_fake: Tensor, x_real: Tensor) -> Tensor:
    """l_xf-mse: restored against clean, mean squared error over pixels. Source: equation (4)."""
    return F.mse_loss(x_fake, x_real)


def recovery(x_dec: Tensor, x_real: Tensor) -> Tensor:
    """l_xd: a clean image comes back as it was. Source: section 3 of the paper, part of equation (3)."""
    return F.mse_loss(x_dec, x_real)


def isomorphic(x_fake: Tensor, x_dec: Tensor) -> Tensor:
    """l_df: restored and recovered are one image. Source: section 3 of the paper, part of equation (3)."""
    return F.mse_loss(x_fake, x_dec)


def isomorphic_label(logits_fake: Tensor, logits_dec: Tensor) -> Tensor:
    """KL divergence of the two predictions, `(N, K)` logits each: the isomorphic loss "of images and labels"."""
    log_fake, log_dec = logits_fake.log_softmax(1), logits_dec.log_softmax(1)
    return F.kl_div(log_fake, log_dec, reduction="batchmean", log_target=True)


def label(logits_fake: Tensor, y: Tensor) -> Tensor:
    """l_xf-label: cross-entropy of the frozen classifier on the restored image. Source: equation (5), read as the text
    reads: "the difference between ground truth label and predicted label of the denoised adversarial example"."""
    return F.cross_entropy(logits_fake, y)


LabelReading = Literal["discriminator", "classifier", "both"]
WEIGHTS = {
    "repair": 1.0,
    "label": 0.0,
    "recovery": 1.0,
    "recovery_label": 0.0,
    "isomorphic": 1.0,
    "isomorphic_label": 0.0,
    "adversarial": 0.0,
}


@defenses.register("paired_gan")
class PairedGAN(Defense):
    """One generator G for both x_adv -> x_fake and x_real -> x_dec, with or without a discriminator.

    channels: of the images. generator, discriminator: `{"name": ..., options}`; the discriminator may be None, then
    there is no game. weights: of the loss terms, by the keys of `WEIGHTS`. label_reading: who judges the label loss:
    the discriminator (real or not), the frozen classifier (the true class), or both. discriminator_sees_clean: x_dec
    counts as fake too (default: x_fake only, as in APE-GAN). generator_updates: per update of the discriminator.
    clean_share: part of each batch whose clean images are fed to G as well (1: the paper's; less is cheaper).

    Source: Liu et al. 2020, section 3, figure 2.
    """

    def __init__(
        self,
        *,
        channels: int,
        generator: dict[str, Any],
        discriminator: dict[str, Any] | None = None,
        weights: dict[str, float] | None = None,
        label_reading: LabelReading = "classifier",
        discriminator_sees_clean: bool = False,
        generator_updates: int = 1,
        clean_share: float = 1.0,
    ) -> None:
        super().__init__()
        for key in weights or {}:
            if key not in WEIGHTS:
                raise ValueError(f"unknown loss weight {key!r}; choices: {', '.join(WEIGHTS)}")
        if label_reading not in ("discriminator", "classifier", "both"):
            raise ValueError(f"label_reading must be 'discriminator', 'classifier' or 'both', not {label_reading!r}")
        if not 0 < clean_share <= 1:
            raise ValueError(f"clean_share must be in (0, 1], not {clean_share}")
        self.weights = dict.fromkeys(WEIGHTS, 0.0) | (weights or WEIGHTS)
        self.label_reading = label_reading
        self.discriminator_sees_clean = discriminator_sees_clean
        self.generator_updates = generator_updates
        self.clean_share = clean_share
        self.generator = generators.create(**{"channels": channels, **generator})
        self.size = getattr(self.generator, "size", None)
        self.discriminator: nn.Module | None = None
        if discriminator is not None:
            self.discriminator = discriminators.create(**{"channels": channels, **discriminator})
        elif self.weights["adversarial"] or (self.weights["label"] and label_reading != "classifier"):
            raise ValueError("an adversarial loss, or a label loss read by the discriminator, needs a discriminator")

    def purify(self, images: Tensor) -> Tensor:
        return self.generator(images)

    def networks(self) -> dict[str, nn.Module]:
        if self.discriminator is None:
            return {"generator": self.generator}
        return {"discriminator": self.discriminator, "generator": self.generator}

    def losses(self, batch: Batch, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        clean = max(1, round(self.clean_share * len(batch.x_real)))
        both = torch.cat([batch.x_adv, batch.x_real[:clean]])
        if self.discriminator is not None:
            # The output of G is computed once and serves both networks, until G has moved.
            out = networks["generator"](both)
            fake = out if self.discriminator_sees_clean else out[: len(batch.x_adv)]
            real = batch.x_real
            d = networks["discriminator"](torch.cat([real, fake.detach()])).float()
            yield "discriminator", {"discrimination": discrimination(d[: len(real)], d[len(real) :])}
            yield "generator", self._generator_terms(batch, out, clean)
            for _ in range(self.generator_updates - 1):
                yield "generator", self._generator_terms(batch, networks["generator"](both), clean)
        else:
            yield "generator", self._generator_terms(batch, networks["generator"](both), clean)

    def _generator_terms(self, batch: Batch, out: Tensor, clean: int) -> dict[str, Tensor]:
        w = self.weights
        x_fake, x_dec = out[: len(batch.x_adv)], out[len(batch.x_adv) :]
        terms = {
            "repair": w["repair"] * repair(x_fake, batch.x_real),
            "recovery": w["recovery"] * recovery(x_dec, batch.x_real[:clean]),
            "isomorphic": w["isomorphic"] * isomorphic(x_fake[:clean], x_dec),
        }
        by_classifier = w["label"] and self.label_reading != "discriminator"
        if by_classifier or w["isomorphic_label"] or w["recovery_label"]:
            with_clean = w["isomorphic_label"] or w["recovery_label"]
            logits = batch.logits_fn(out if with_clean else x_fake).float()
            logits_fake, logits_dec = logits[: len(x_fake)], logits[len(x_fake) :]
            if by_classifier:
                terms["label"] = w["label"] * label(logits_fake, batch.y)
            if w["recovery_label"]:
                terms["recovery_label"] = w["recovery_label"] * label(logits_dec, batch.y[:clean])
            if w["isomorphic_label"]:
                terms["isomorphic_label"] = w["isomorphic_label"] * isomorphic_label(logits_fake[:clean], logits_dec)
        if self.discriminator is not None:
            by_discriminator = w["label"] if self.label_reading != "classifier" else 0.0
            if w["adversarial"] + by_discriminator:
                d_fake = frozen(self.discriminator)(out if self.discriminator_sees_clean else x_fake).float()
                terms["adversarial"] = (w["adversarial"] + by_discriminator) * adversarial(d_fake)
        return terms
