"""What a user deploys: a classifier, alone, behind a purifier, or in another classifier's place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unperturb.defenses.base import Defense, Protected


@dataclass(frozen=True, eq=False)
class System:
    """One thing to be judged, under the name that tables show.

    classifier: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`. purifier: what stands before it, if anything. base:
    the undefended classifier, where `classifier` is a defense itself, such as an adversarially trained net in its
    place: an attacker who knows nothing of the defense attacks the base.
    """

    name: str
    classifier: nn.Module
    purifier: Defense | None = None
    base: nn.Module | None = None

    @classmethod
    def of(cls, name: str, model: nn.Module, base: nn.Module | None = None) -> System:
        """`model` as a system; a `Protected` is taken apart."""
        if isinstance(model, Protected):
            return cls(name, model.classifier, model.defense, base)
        return cls(name, model, None, base)

    @property
    def bare(self) -> nn.Module:
        """The undefended classifier: what an attacker attacks who knows nothing of the defense."""
        return self.classifier if self.base is None else self.base

    @property
    def undefended(self) -> bool:
        """Whether this is the undefended classifier itself."""
        return self.purifier is None and self.bare is self.classifier

    @property
    def model(self) -> nn.Module:
        """The whole: one module from images to logits."""
        return self.classifier if self.purifier is None else Protected(self.classifier, self.purifier)

    @property
    def random(self) -> bool:
        """Whether two calls may differ."""
        return self.purifier is not None and self.purifier.random

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow through the whole; an ONNX file gives none."""
        through = self.purifier is None or self.purifier.differentiable
        return through and bool(getattr(self.classifier, "differentiable", True))
