"""MagNet: small autoencoders move images back to the clean ones, and detectors turn away what lies far from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unperturb.defenses.base import Batch, Defense, defenses
from unperturb.defenses.networks import pad_to

Layer = int | str
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda x: F.avg_pool2d(x, 2),
    "max": lambda x: F.max_pool2d(x, 2),
}


def reconstruction_error(x: Tensor, restored: Tensor, order: int) -> Tensor:
    """Mean of |x - restored|^order over each image, `(N,)`. Source: the authors' code, `AEDetector`."""
    return (x - restored).abs().pow(order).flatten(1).mean(1)


def divergence(a: Tensor, b: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence in nats, `(N,)`, of the predictions of logits `(N, K)` softened by `temperature`.

    Source: the authors' code, `DBDetector`.
    """
    log_p, log_q = (a / temperature).log_softmax(1), (b / temperature).log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1) / 2


class AutoEncoder(nn.Module):
    """3x3 convolutions and poolings, mirrored: `(N, C, H, W)` in [0, 1] -> the activations of every layer, the last
    one the reconstruction, `(N, C, H, W)` in [0, 1]; any size.

    structure: of the encoder: filters of a sigmoid convolution, `"average"` or `"max"` for a 2x2 pooling.

    Source: the authors' code, `DenoisingAutoEncoder`, with Keras's first weights (Glorot's).
    """

    def __init__(self, channels: int, structure: Sequence[Layer]) -> None:
        super().__init__()
        for layer in structure:
            if layer not in POOLS and not (isinstance(layer, int) and layer > 0):
                raise ValueError(f"structure holds filter counts, 'average' and 'max', not {layer!r}")
        self.way = [*structure, *("up" if layer in POOLS else layer for layer in reversed(structure)), channels]
        self.stride = 2 ** sum(layer in POOLS for layer in structure)
        convolutions, width = [], channels
        for layer in self.way:
            if isinstance(layer, int):
                convolutions.append(nn.Conv2d(width, layer, 3, padding=1))
                width = layer
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        self.convolutions = nn.ModuleList(convolutions)

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        x, activations = pad_to(images, self.stride), []
        convolutions = iter(self.convolutions)
        for layer in self.way:
            if layer == "up":
                x = F.interpolate(x, scale_factor=2)
            elif isinstance(layer, str):
                x = POOLS[layer](x)
            else:
                x = torch.sigmoid(next(convolutions)(x))
                activations.append(x)
        return [*activations[:-1], x[..., :height, :width].to(images.dtype)]


class Pack(nn.Module):
    """Several autoencoders side by side: images -> the activations of each."""

    def __init__(self, members: Sequence[AutoEncoder]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        return [member(images) for member in self.members]


@defenses.register("magnet")
class MagNet(Defense):
    """MagNet: a reformer that is an autoencoder, or a pack of them drawn at random, and detectors.

    channels: of the images. structure: of each reformer (see `AutoEncoder`). pack: how many reformers; with more than
    one, each image is restored by one drawn from torch's generator. diversity: weight of the pack's members' distance
    from their mean, which is made large. detectors: each has either `error` (1 or 2: the norm of the reconstruction
    error) or `temperature` (the divergence of the classifier's predictions before and after restoring, softened), and
    may have a `structure` for an autoencoder of its own; without one it asks the first reformer. drop_rate: fraction of
    clean validation images that each detector may turn away. noise: standard deviation of what is added to training
    images. activity: weight of the sum of the squared activations.

    Source: Meng and Chen 2017, arXiv 1705.09064, and the authors' code.
    """

    learns_from_pairs = False

    def __init__(
        self,
        *,
        channels: int,
        structure: Sequence[Layer] = (3, "average", 3),
        pack: int = 1,
        diversity: float = 0.0,
        detectors: Sequence[dict[str, Any]] = ({"error": 2}, {"error": 1, "structure": [3]}),
        drop_rate: float = 0.001,
        noise: float = 0.1,
        activity: float = 1e-9,
    ) -> None:
        super().__init__()
        if pack < 1:
            raise ValueError(f"pack must be at least 1, not {pack}")
        if diversity and pack == 1:
            raise ValueError("diversity needs a pack of more than one")
        for detector in detectors:
            if ("error" in detector) == ("temperature" in detector) or not {*detector} <= {
                "error",
                "temperature",
                "structure",
            }:
                raise ValueError(f"a detector has error or temperature, and may have a structure; not {detector}")
        self.random = pack > 1
        self.diversity, self.noise, self.activity = diversity, noise, activity
        self.reformers = Pack([AutoEncoder(channels, structure) for _ in range(pack)])
        own = [AutoEncoder(channels, d["structure"]) for d in detectors if "structure" in d]
        self.watchers = Pack(own) if own else None
        self.detectors = [dict(d) for d in detectors]
        self.add_detectors(len(detectors), drop_rate)

    def purify(self, images: Tensor) -> Tensor:
        members = self.reformers.members
        if len(members) == 1:
            return members[0](images)[-1]
        drawn = torch.randint(len(members), (len(images),), device=images.device)
        out = torch.empty_like(images)
        for number, member in enumerate(members):
            chosen = (drawn == number).nonzero().squeeze(1)
            out = out.index_copy(0, chosen, member(images[chosen])[-1])
        return out

    def scores(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> Tensor:
        return self._scores(images, self.reformers.members[0](images)[-1], logits_fn)

    def _purify_and_score(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        purified = self.purify(images)
        if self.random:  # drawn from the pack: not the first reformer's
            return purified, self.scores(images, logits_fn)
        return purified, self._scores(images, purified, logits_fn)

    def _scores(self, images: Tensor, by_reformer: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """by_reformer: `images` as the first reformer restores them."""
        watchers = iter(self.watchers.members if self.watchers is not None else ())
        restored = [next(watchers)(images)[-1] if "structure" in d else by_reformer for d in self.detectors]
        answers: dict[int, Tensor] = {}  # what several detectors ask the classifier is asked once

        def answer(x: Tensor) -> Tensor:
            if id(x) not in answers:
                answers[id(x)] = logits_fn(x).float()
            return answers[id(x)]

        columns = [
            reconstruction_error(images, x, d["error"])
            if "error" in d
            else divergence(answer(images), answer(x), d["temperature"])
            for d, x in zip(self.detectors, restored)
        ]
        return torch.stack(columns, 1) if columns else images.new_zeros(len(images), 0)

    def networks(self) -> dict[str, nn.Module]:
        if self.watchers is None:
            return {"reformers": self.reformers}
        return {"reformers": self.reformers, "watchers": self.watchers}

    def losses(self, batch: Batch, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        x = batch.x_real
        noisy = (x + self.noise * torch.randn_like(x)).clamp(0, 1)
        for name, network in networks.items():
            activations = network(noisy)
            restored = torch.stack([layers[-1] for layers in activations])
            squares = [layer.float().square().sum() for layers in activations for layer in layers]
            terms = {
                "reconstruction": (restored - x).square().flatten(1).mean(1).sum(),
                "activity": self.activity * torch.stack(squares).sum(),
            }
            if name == "reformers" and self.diversity:
                apart = (restored - restored.mean(0)).square().flatten(1).mean(1).sum()
                terms["diversity"] = -self.diversity * apart
            yield name, terms
