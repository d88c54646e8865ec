"""What two networks of a GAN minimize, and how one of them stands still."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def adversarial(d_fake: Tensor) -> Tensor:
    """The generator's side of the game, `(N,)` discriminator logits: be taken for real (non-saturating; Goodfellow et
    al. 2014). Also the other reading of equation (5) of Liu et al. 2020, "used in the two-category"."""
    return F.binary_cross_entropy_with_logits(d_fake, torch.ones_like(d_fake))


def discrimination(d_real: Tensor, d_fake: Tensor) -> Tensor:
    """The discriminator's side: tell clean from restored, `(N,)` logits each."""
    real = F.binary_cross_entropy_with_logits(d_real, torch.ones_like(d_real))
    return (real + F.binary_cross_entropy_with_logits(d_fake, torch.zeros_like(d_fake))) / 2


def frozen(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """`network` as a function whose weights take no gradient: the other network does not move in this turn."""
    weights = {k: v.detach() for k, v in network.named_parameters()}
    return lambda x: torch.func.functional_call(network, weights, (x,))


def gradient_penalty(critic: Callable[[Tensor], Tensor], x_real: Tensor, x_fake: Tensor) -> Tensor:
    """How far the critic's slope is from 1, squared, at one random point between each pair of images `(N, C, H, W)`.

    Source: Gulrajani et al. 2017, equation (3), without its lambda; the norm is over the whole image.
    """
    way = torch.rand(len(x_real), 1, 1, 1, device=x_real.device)
    between = (x_real + way * (x_fake - x_real)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()
