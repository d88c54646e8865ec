"""The control: no defense at all."""

from __future__ import annotations

from torch import Tensor

from unperturb.defenses.base import Defense, defenses


@defenses.register("none")
class Identity(Defense):
    """Gives back what it is given: the row that every table needs."""

    def purify(self, images: Tensor) -> Tensor:
        return images
