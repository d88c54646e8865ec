"""A denoiser that is guided by the classifier's logits instead of by pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.defenses.base import Batch, Defense, defenses
from unperturb.defenses.networks import generators


def guide(logits_restored: Tensor, logits_clean: Tensor) -> Tensor:
    """Mean absolute difference of logits, `(N, K)` each. Source: Liao et al. 2018, the LGD loss."""
    return F.l1_loss(logits_restored, logits_clean)


@defenses.register("hgd")
class HGD(Defense):
    """A U-Net that adds a correction to the image, trained until the frozen classifier answers as on the clean one.

    channels: of the images. denoiser: `{"name": ..., options}`, by default the residual U-Net. clean_share: part of
    each batch whose clean images are learned from too, so that they stay as they were (0: attacked ones only).

    Source: Liao et al. 2018, "Defense against adversarial attacks using high-level representation guided denoiser",
    the logits-guided LGD.
    """

    def __init__(self, *, channels: int, denoiser: dict[str, Any] | None = None, clean_share: float = 0.5) -> None:
        super().__init__()
        if not 0 <= clean_share <= 1:
            raise ValueError(f"clean_share must be in [0, 1], not {clean_share}")
        self.clean_share = clean_share
        self.denoiser = generators.create(**{"channels": channels, "name": "unet", **(denoiser or {})})

    def purify(self, images: Tensor) -> Tensor:
        return self.denoiser(images)

    def networks(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser}

    def losses(self, batch: Batch, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        clean = round(self.clean_share * len(batch.x_real))
        with torch.no_grad():
            wanted = batch.logits_fn(batch.x_real).float()
        out = networks["denoiser"](torch.cat([batch.x_adv, batch.x_real[:clean]]))
        found = batch.logits_fn(out).float()
        yield "denoiser", {"guide": guide(found, torch.cat([wanted, wanted[:clean]]))}
