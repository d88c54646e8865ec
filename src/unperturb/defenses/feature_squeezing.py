"""Feature squeezing: an image whose answer changes when it is purified is suspicious."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unperturb.defenses.base import Defense, create_defense, defenses, load_defense
from unperturb.metrics import moved


@defenses.register("feature_squeezing")
class FeatureSqueezing(Defense):
    """A detector made of purifiers: the score of an image is how far the classifier's answer moves when it is purified,
    by the purifier that moves it furthest.

    squeezers: purifiers, each a defense in hand, `{"name": ..., options}`, or the name or run folder of one
    (`load_defense`), which is then copied. channels: of the images, for those that ask. purifies: whether the first
    squeezer's image goes on to the classifier; else, as in the source, the image itself. drop_rate: fraction of clean
    validation images that may be turned away. They are used as they are, not trained, and
    detectors of their own are not asked.

    Source: Xu, Evans and Qi 2018, "Feature squeezing", section III; with a learned purifier it is the reading of this
    project that what a purifier changed tells of an attack.
    """

    learns_from_pairs = False

    def __init__(
        self,
        *,
        squeezers: Sequence[Defense | Mapping[str, Any] | str] = ({"name": "bit_depth"}, {"name": "median"}),
        channels: int | None = None,
        purifies: bool = True,
        drop_rate: float = 0.05,
    ) -> None:
        super().__init__()
        if not squeezers:
            raise ValueError("feature squeezing needs at least one squeezer")
        known = {} if channels is None else {"channels": channels}
        made = [
            s if isinstance(s, Defense) else load_defense(s) if isinstance(s, str) else create_defense(**{**known, **s})
            for s in squeezers
        ]
        self.squeezers = nn.ModuleList(made)
        self.purifies = purifies
        self.differentiable = not purifies or made[0].differentiable
        self.random = any(s.random for s in made)
        self.size = next((s.size for s in made if s.size is not None), None)
        self.channels = next((s.channels for s in made if s.channels is not None), channels)
        self.held_out = min((s.held_out for s in made if s.held_out is not None), default=None)
        self.add_detectors(1, drop_rate)
        if all(s.spec for s in made):  # whole in itself: a copied squeezer's weights lie beside it from now on
            specs = [{"name": s.spec["name"], **s.spec["options"]} for s in made if s.spec]
            options = {"squeezers": specs, "channels": channels, "purifies": purifies, "drop_rate": drop_rate}
            self.spec = {"name": "feature_squeezing", "options": options}

    def purify(self, images: Tensor) -> Tensor:
        return self._all()[0](images) if self.purifies else images

    def surrogate_backward(self, images: Tensor) -> Tensor:
        return self._all()[0].surrogate_backward(images) if self.purifies else images

    def scores(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> Tensor:
        return self._purify_and_score(images, logits_fn)[1]

    def _purify_and_score(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        before = logits_fn(images).float().softmax(1)
        squeezed = [squeezer(images) for squeezer in self._all()]
        found = torch.stack([moved(before, logits_fn(x).float().softmax(1)) for x in squeezed], 1)
        return squeezed[0] if self.purifies else images, found.amax(1, keepdim=True)

    def _all(self) -> list[Defense]:
        return [squeezer for squeezer in self.squeezers if isinstance(squeezer, Defense)]
