"""What a user deploys: a classifier, alone, behind a purifier, or in another classifier's place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unperturb.data.sets import ImageSet, shape_words
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

    def check_data(self, data: ImageSet) -> None:
        """Raise `ValueError` where a part of it is made for images of another shape than those of `data`."""
        parts = {"classifier": self.classifier, "undefended classifier": self.base, "purifier": self.purifier}
        for what, part in parts.items():
            takes = (part.channels, part.size, part.size) if isinstance(part, Defense) else getattr(part, "takes", None)
            if takes is None or all(want in (None, has) for want, has in zip(takes, data.shape)):
                continue
            size = (
                f"load them with size={takes[1]} (--size {takes[1]}), or " if takes[0] in (None, data.shape[0]) else ""
            )
            raise ValueError(
                f"the {what} of {self.name!r} takes images of {shape_words(takes)}, but those of {data.source} have "
                f"{shape_words(data.shape)}: {size}take another {what} or other images"
            )

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
