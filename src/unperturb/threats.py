"""The function that an attacker of each knowledge sees, and the adapters that give a hidden gradient back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unperturb.defenses.base import Defense, Protected
from unperturb.modules import ask
from unperturb.registry import unknown

KNOWLEDGE = {
    "none": "noise: nothing is known",
    "transfer": "made on another classifier",
    "oblivious": "made on the undefended classifier, the paper's protocol",
    "bpda": "made on the whole, a stand-in for the purifier's backward pass",
    "white_box": "made on classifier and purifier together, exact gradient",
    "black_box": "made on the whole by its outputs alone",
}


class _Replace(torch.autograd.Function):
    """Forward the value, backward into the stand-in."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class BPDA(nn.Module):
    """A function whose gradient is another's: forward `function`, backward `surrogate_backward` (default: the
    identity).

    Source: Athalye et al. 2018, section 4.1, backward pass differentiable approximation.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], surrogate_backward: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.function, self.surrogate_backward = function, surrogate_backward

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value = ask(self.function, x)
        surrogate = x if self.surrogate_backward is None else self.surrogate_backward(x)
        out: Tensor = _Replace.apply(surrogate, value)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:  # adversarial images are kept by what made them: two stand-ins are two attackers
        return f"surrogate_backward={getattr(self.surrogate_backward, '__qualname__', self.surrogate_backward)}"


class EOT(nn.Module):
    """The mean logits of a random model over `eot_samples` passes, so that its gradient is that of the expectation.

    seed: None draws afresh at each call; a number makes every call use the same draws.

    Source: Athalye et al. 2018, expectation over transformation.
    """

    def __init__(self, model: nn.Module, eot_samples: int = 20, seed: int | None = None) -> None:
        super().__init__()
        if eot_samples < 1:
            raise ValueError(f"EOT needs at least one draw, not {eot_samples}")
        self.model, self.eot_samples, self.seed = model, eot_samples, seed

    def extra_repr(self) -> str:
        return f"eot_samples={self.eot_samples}, seed={self.seed}"

    def forward(self, images: Tensor) -> Tensor:
        if self.seed is None:
            return self._mean(images)
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            return self._mean(images)

    def _mean(self, images: Tensor) -> Tensor:
        total: Tensor = self.model(images)
        for _ in range(self.eot_samples - 1):
            total = total + self.model(images)
        return total / self.eot_samples


def rounding(levels: int = 255) -> BPDA:
    """Rounding to `levels` + 1 values, as saving a picture does, its gradient taken for the identity's."""
    return BPDA(lambda x: (x * levels).round() / levels)


class OutputsOnly(nn.Module):
    """A model that answers and gives no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.model(images)
        return out


class Chain(nn.Module):
    """A classifier behind purifiers, one after the other, each of which may be an adapter."""

    def __init__(self, *purifiers: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.purifiers, self.classifier = nn.ModuleList(purifiers), classifier

    def forward(self, images: Tensor) -> Tensor:
        for purifier in self.purifiers:
            images = ask(purifier, images)
        return ask(self.classifier, images)


def check_attacker(attack: object, knowledge: str) -> None:
    """Raise `ValueError` where an attacker who sees outputs only is to use an attack by gradients."""
    if knowledge == "black_box" and getattr(attack, "needs_gradient", True):
        raise ValueError(
            f"{type(attack).__name__} needs a gradient, and black_box gives none: its random start would pass for "
            "robustness. Ask by queries there (square, rays), or give it another knowledge"
        )


def target(
    classifier: nn.Module,
    defense: Defense,
    knowledge: str,
    surrogate: nn.Module | None = None,
    *,
    surrogate_backward: Callable[[Tensor], Tensor] | None = None,
    eot_samples: int = 20,
) -> nn.Module:
    """The module, images to logits, that an attacker differentiates, or questions.

    none: nothing is known (noise needs no gradient; what it asks is answered by the bare classifier). transfer: the
    surrogate. oblivious: the bare classifier, the paper's protocol. bpda: classifier after purifier, the purifier's
    backward pass replaced by that of `surrogate_backward` (default: the identity). white_box: classifier after
    purifier, exact gradient, averaged over `eot_samples` draws where the defense is random. A stage of the defense that
    has no gradient to give is differentiated through its own stand-in, at the value it really takes; the other stages
    keep theirs. black_box: classifier after purifier, answers only.

    Raises `UnknownNameError` for another knowledge, `ValueError` for a transfer without a surrogate.
    """
    if knowledge not in KNOWLEDGE:
        raise unknown("knowledge", knowledge, KNOWLEDGE)
    if knowledge == "transfer":
        if surrogate is None:
            raise ValueError("a transfer attack needs a surrogate classifier; set surrogate in the recipe")
        return surrogate
    if knowledge in ("none", "oblivious"):
        return classifier
    if knowledge == "black_box":
        return OutputsOnly(Protected(classifier, defense))
    if knowledge == "white_box" and defense.differentiable:
        seen: nn.Module = Protected(classifier, defense)
    elif knowledge == "white_box":
        stages = (
            s if s.differentiable else BPDA(s, surrogate_backward or s.surrogate_backward) for s in defense.stages()
        )
        seen = Chain(*stages, classifier=classifier)
    else:
        seen = Chain(BPDA(defense, surrogate_backward), classifier=classifier)
    return EOT(seen, eot_samples) if defense.random else seen
