"""Losses that an attacker maximizes: logits `(N, K)` and labels `(N,)` -> one number per image, `(N,)`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LossFunction = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per image, in float64: where logits are small, float32 rounds all of it to the log of K."""
    return F.cross_entropy(logits.double(), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's: positive when misclassified (Carlini & Wagner 2017, f6 untruncated)."""
    true = logits.gather(1, labels[:, None])
    # A masked -inf, not a large constant: with all logits negative a zero would win.
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - true.squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over (largest - third largest logit), blind to the logits' scale.

    Raises `ValueError` for fewer than three classes. Source: Croce & Hein 2020.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the dlr loss needs at least 3 classes, the model has {logits.shape[1]}; use loss='margin'")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, LossFunction] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def attack_loss(name: str, *, targeted: bool) -> LossFunction:
    """The loss of that name. Towards a target, DLR gives way to the margin: where the target ranks third the ratio is
    exactly 1, whatever the image, and its gradient zero."""
    return margin if targeted and name == "dlr" else LOSSES[name]
