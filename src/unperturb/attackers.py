"""The function that an attacker of each knowledge sees, and the adapters that give a hidden gradient back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unperturb.attacks.base import Attack, attacks
from unperturb.defenses.base import Defense, Protected
from unperturb.modules import ask
from unperturb.systems import System
from unperturb.threat_models import KNOWLEDGE, check_knowledge


def label_of(attack: Attack) -> str:
    """The attack's short name in tables: its registered name, or its class's, norm where not Linf, and steps."""
    name = next((n for n in attacks if attacks[n] is type(attack)), type(attack).__name__.lower())
    norm = getattr(attack, "norm", "linf")
    steps = getattr(attack, "steps", None)
    return name + (f"-{norm}" if norm != "linf" else "") + (f"-{steps}" if steps else "")


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


class Ensemble(nn.Module):
    """The mean logits of several classifiers of the same classes: a surrogate that stands for more of what the
    attacker does not know than one of them would.

    Raises `ValueError` for no classifier at all, and on a call where they differ in the shape of their logits.

    Source: Dong et al. 2018, section 3.3, the ensemble in logits, with equal weights.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one classifier")
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        logits = [ask(model, images) for model in self.models]
        if shapes := sorted({tuple(z.shape) for z in logits} - {tuple(logits[0].shape)}):
            raise ValueError(f"the ensemble's models differ: logits of {tuple(logits[0].shape)} and of {shapes[0]}")
        return torch.stack(logits).mean(0)


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


@dataclass(frozen=True)
class Attacker:
    """An attack and what who makes it knows.

    eot_samples: passes that the gradient of a random system is averaged over. surrogate_backward: for `bpda`, what is
    differentiated in place of the purifier (default: the identity), images to images. randomness: True for an attacker
    who is sent against random systems alone, False for one against all others, None for one against any.

    Raises `UnknownNameError` for another knowledge, `ValueError` for an attack by gradients that is to see outputs only
    or for fewer than one pass.
    """

    attack: Attack
    knowledge: str
    eot_samples: int = 20
    surrogate_backward: Callable[[Tensor], Tensor] | None = None
    randomness: bool | None = None

    def __post_init__(self) -> None:
        check_knowledge(self.knowledge)
        if self.eot_samples < 1:
            raise ValueError(f"a gradient is averaged over at least one pass, not {self.eot_samples}")
        if self.knowledge == "black_box" and self.attack.needs_gradient:
            raise ValueError(
                f"{type(self.attack).__name__} needs a gradient, and black_box gives none: its random start would pass "
                "for robustness. Ask by queries there (square, rays), or give it another knowledge"
            )

    def is_sent_against(self, system: System) -> bool:
        """Whether `system` is one that this attacker is meant for."""
        return self.randomness in (None, system.random)

    @property
    def attacked(self) -> str:
        """What the attack is made on: the undefended "classifier", a "surrogate" or the "system" itself."""
        return KNOWLEDGE[self.knowledge].attacked

    def knowledge_of(self, system: System) -> str:
        """The least knowledge that amounts to the same for `system`: where nothing is defended, who attacks the
        undefended classifier sees all there is; where there is no purifier, its backward pass needs no surrogate."""
        if system.undefended and self.knowledge in ("gray_box", "bpda", "white_box"):
            return "oblivious"
        if system.purifier is None and self.knowledge == "bpda":
            return "white_box"
        return self.knowledge

    def attack_for(self, system: System, surrogate: nn.Module | None = None) -> Attack:
        """The attack as it is to be made: where the attacker meets a random system, one success is a draw, so that no
        attack stops at its first. Raises `ValueError` for a minimal-norm attack there."""
        met = system if self.attacked == "system" else self._own(system, surrogate)
        meets_random = met is not None and met.random
        return self.attack.for_random_model(eot_samples=1) if meets_random else self.attack  # `EOT` averages already

    def model_for(self, system: System, surrogate: nn.Module | None = None) -> nn.Module:
        """The module, images to logits, that this attacker differentiates, or questions.

        surrogate: a model of the attacker's own, or, for gray_box, a purifier that is put before `system.bare`.

        none, oblivious: the undefended classifier (noise needs no gradient). transfer, gray_box: the surrogate, which
        its owner knows whole. bpda: the whole, the purifier's backward pass replaced. white_box: the whole, exact
        gradient; a stage of the purifier that has none to give is differentiated through its own surrogate, at the
        value that it really takes. black_box: the whole, answers only. Gradients of a random system are averaged over
        `eot_samples` passes.

        Raises `ValueError` for a transfer or a gray box without a surrogate.
        """
        owned = self._own(system, surrogate)
        if owned is not None:
            return replace(self, knowledge="white_box").model_for(owned)
        if self.attacked == "surrogate":
            own, key = (
                ("another classifier", "surrogate")
                if self.knowledge == "transfer"
                else ("a purifier", "surrogate_defense")
            )
            raise ValueError(
                f"a {self.knowledge} attack is made on {own} of the attacker's own and needs that surrogate: set {key}"
            )
        if self.attacked == "classifier":
            return system.bare
        if self.knowledge == "black_box":
            return OutputsOnly(system.model)
        if system.purifier is None:
            return system.classifier
        if self.knowledge == "bpda":
            seen: nn.Module = Chain(BPDA(system.purifier, self.surrogate_backward), classifier=system.classifier)
        elif system.differentiable:
            seen = Protected(system.classifier, system.purifier)
        else:
            stages = (s if s.differentiable else BPDA(s, s.surrogate_backward) for s in system.purifier.stages())
            seen = Chain(*stages, classifier=system.classifier)
        return EOT(seen, self.eot_samples) if system.random else seen

    def _own(self, system: System, surrogate: nn.Module | None) -> System | None:
        """The system of the attacker's own that a transfer or a gray-box attack is made on."""
        if self.attacked != "surrogate" or surrogate is None:
            return None
        if isinstance(surrogate, Defense):
            return System("surrogate", system.bare, surrogate)
        return System.of("surrogate", surrogate)
