"""Several defenses, one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unperturb.defenses.base import Defense, create_defense, defenses


@defenses.register("pipeline")
class Pipeline(Defense):
    """The first part purifies the image, the next what came out, and so on; whatever one part rejects is rejected.

    parts: defenses in hand, or `{"name": ..., options}` each. channels: of the images, for parts that ask. The parts
    are used as they are, not trained together. `random` if any part is, `differentiable` if all are; an attacker's
    gradient goes stage by stage, so a part without one hides only its own.
    """

    def __init__(self, *, parts: Sequence[Defense | Mapping[str, Any]], channels: int | None = None) -> None:
        super().__init__()
        if not parts:
            raise ValueError("a pipeline needs at least one part")
        known = {} if channels is None else {"channels": channels}
        made = [p if isinstance(p, Defense) else create_defense(**{**known, **p}) for p in parts]
        self.parts = nn.ModuleList(made)
        self.differentiable = all(p.differentiable for p in made)
        self.random = any(p.random for p in made)
        self.size = next((p.size for p in made if p.size is not None), None)
        self.channels = next((p.channels for p in made if p.channels is not None), channels)
        self.held_out = min((p.held_out for p in made if p.held_out is not None), default=None)
        if all(p.spec for p in made):
            specs = [{"name": p.spec["name"], **p.spec["options"]} for p in made if p.spec]
            self.spec = {"name": "pipeline", "options": {"parts": specs}}

    def stages(self) -> list[Defense]:
        return [stage for part in self._parts() for stage in part.stages()]

    def purify(self, images: Tensor) -> Tensor:
        for part in self._parts():
            images = part(images)
        return images

    def surrogate_backward(self, images: Tensor) -> Tensor:
        for part in self._parts():
            if part.differentiable:
                images = part(images)
            else:  # its surrogate's gradient, but at the value that the next part really gets
                soft = part.surrogate_backward(images)
                images = soft + (part(images) - soft).detach()
        return images

    def scores(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Every part's scores side by side, `(N, detectors)`, each of the image as it reaches that part."""
        return self.purify_and_score(images, logits_fn)[1]

    def _purify_and_score(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        found = []
        for part in self._parts():
            images, scores = part.purify_and_score(images, logits_fn)
            found.append(scores)
        return images, torch.cat(found, 1)

    @property
    def thresholds(self) -> Tensor:
        return torch.cat([part.thresholds.cpu() for part in self._parts()])

    def calibrate(self, scores: Tensor) -> None:
        at = 0
        for part in self._parts():
            count = len(part.thresholds)
            part.calibrate(scores[:, at : at + count])
            at += count

    def _parts(self) -> list[Defense]:
        return [part for part in self.parts if isinstance(part, Defense)]
