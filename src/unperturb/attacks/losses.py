"""Losses that an attacker maximizes: logits `(N, K)` and labels `(N,)` -> one number per image, `(N,)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class OwnLoss:
    """A loss of the user's own. Its repr is its name alone: two of one name may compute different things."""

    function: LossFunction

    def __repr__(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        value = self.function(logits, labels)
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != (len(logits),):
            raise ValueError(f"the loss {self!r} must give one number per image, ({len(logits)},), it gave {shape}")
        if logits.requires_grad and not value.requires_grad:
            raise ValueError(f"the loss {self!r} gives no gradient: compute it from the logits, without detaching them")
        return value


def checked_loss(loss: str | LossFunction) -> str | OwnLoss:
    """The name of one of `LOSSES`, or a user's own loss: any callable (logits `(N, K)`, labels `(N,)`) -> `(N,)`.

    Raises `ValueError` for anything else.
    """
    if isinstance(loss, OwnLoss) or (isinstance(loss, str) and loss in LOSSES):
        return loss
    if isinstance(loss, str) or not callable(loss):
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)}, or a function (logits, labels) -> (N,), not {loss!r}"
        )
    return OwnLoss(loss)


def attack_loss(loss: str | LossFunction, *, targeted: bool) -> LossFunction:
    """The loss of that name, or `loss` itself where it is one. Towards a target, DLR gives way to the margin: where the
    target ranks third the ratio is exactly 1, whatever the image, and its gradient zero."""
    if not isinstance(loss, str):
        return loss
    return margin if targeted and loss == "dlr" else LOSSES[loss]
