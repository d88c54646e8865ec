"""The control: a purifier that does nothing."""

from __future__ import annotations

from torch import Tensor

from unperturb.defenses.base import Defense, defenses


@defenses.register("identity")
class Identity(Defense):
    """Gives back what it is given."""

    def purify(self, images: Tensor) -> Tensor:
        return images
