"""What is measured of attacked images: predictions, image quality and detection, once an image and draw."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unperturb import metrics
from unperturb.evaluation.adversarials import COUNTS, Adversarials
from unperturb.evaluation.plan import Cell, Plan
from unperturb.modules import ask, logits_of
from unperturb.systems import System

SCORES = ("scores_clean", "scores_adv")  # of any number of detectors: lists
CLEAN = "clean"  # the key of images as they are, beside those of adversarial ones


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """(classes, confidence in the label), `(N,)` each, on the CPU; -1 and 0 where an answer is not finite: it is wrong.

    images: `(N, C, H, W)` in [0, 1], `batch` of them asked at once. labels: `(N,)`.
    """
    logits = torch.cat([logits_of(model, x) for x in images.split(batch)])
    broken = ~logits.isfinite().all(1)
    confidence = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return logits.argmax(1).masked_fill(broken, -1).cpu(), confidence.masked_fill(broken, 0).cpu()


def image_quality(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """(PSNR in dB, SSIM) of `images` against `reference`, both `(N, C, H, W)` in [0, 1]: `(N,)` each, on the CPU."""
    return metrics.psnr(images, reference).cpu(), metrics.ssim(images, reference).cpu()


@dataclass(frozen=True)
class Purified:
    """What a system's purifier makes of images: `(N, C, H, W)`, what its detectors think of each, `(N, detectors)`
    scores and `(N,)` whether it is rejected, and seconds per image for both (they are often one and the same work)."""

    images: Tensor
    scores: Tensor
    rejected: Tensor
    seconds: float


@torch.no_grad()
def detection(system: System, images: Tensor, batch: int) -> Purified:
    """`images` `(N, C, H, W)` purified, looked at by the detectors on the way; as they are where nothing purifies."""
    if system.purifier is None:
        rejected = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        return Purified(images, images.new_zeros(len(images), 0), rejected, 0.0)
    start = time.perf_counter()
    parts = [
        system.purifier.purify_and_score(x.clone(), lambda seen: ask(system.classifier, seen))
        for x in images.split(batch)
    ]
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    seconds = (time.perf_counter() - start) / len(images)
    purified, scores = (torch.cat(part) for part in zip(*parts))
    return Purified(purified, scores, (scores > system.purifier.thresholds.to(scores)).any(1), seconds)


# A shard of a plan --------------------------------------------------------------------------------------------------


@dataclass
class Shard:
    """Some images of a plan: rows: `(N,)`, their places in its data. number: its place among the shards. known: what
    several cells share, which is computed once."""

    plan: Plan
    number: int
    rows: Tensor
    known: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def images(self) -> Tensor:
        """`(N, C, H, W)` in [0, 1], on the plan's device."""
        return self._batch[0]

    @property
    def labels(self) -> Tensor:
        """`(N,)`, on the plan's device."""
        return self._batch[1]

    @property
    def index(self) -> Tensor:
        """`(N,)`: the images' numbers in their data set."""
        return self.plan.data.index[self.rows]

    @property
    def _batch(self) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor]
        found = self.once("batch", lambda: self.plan.data.batch(self.rows, self.plan.device))
        return found

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for this `key`."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


@dataclass(frozen=True)
class _View:
    """What a system makes of the images of a shard in one draw: `(N,)` each, scores `(N, detectors)`; purified: the
    images that its classifier got, kept of the first draw alone."""

    classes: Tensor
    confidence: Tensor
    psnr: Tensor
    ssim: Tensor
    rejected: Tensor
    scores: Tensor
    seconds: float
    purified: Tensor | None


def _view(system: System, shard: Shard, images: Tensor, key: Hashable, draw: int) -> _View:
    """key: of `images`, which may be asked for again."""
    seen = _purified(system, shard, images, key, draw)
    if system.purifier is None:
        psnr, ssim = shard.once(("quality", key), lambda: image_quality(images, shard.images))
    else:
        psnr, ssim = image_quality(seen.images, shard.images)
    classes, confidence = _answers(system, shard, seen.images, key)
    purified = seen.images if draw == 0 else None
    return _View(classes, confidence, psnr, ssim, seen.rejected.cpu(), seen.scores.cpu(), seen.seconds, purified)


def _purified(system: System, shard: Shard, images: Tensor, key: Hashable, draw: int) -> Purified:
    def purify() -> Purified:
        what = CLEAN if key == CLEAN else "adversarial"
        with shard.plan.drawing(seed_of("purify", shard.plan.seed, int(shard.rows[0]), what, draw)):
            return detection(system, images, shard.plan.batch)

    # Detectors may ask the classifier; where there are none, what is purified is the same in front of every one.
    shared = key == CLEAN and system.purifier is not None and not system.random and not len(system.purifier.thresholds)
    return shard.once(("purified", id(system.purifier)), purify) if shared else purify()


def _answers(system: System, shard: Shard, purified: Tensor, key: Hashable) -> tuple[Tensor, Tensor]:
    def ask_all() -> tuple[Tensor, Tensor]:
        return predictions(system.classifier, purified, shard.labels, shard.plan.batch)

    found: tuple[Tensor, Tensor]
    found = shard.once(("answers", id(system.classifier), key), ask_all) if system.purifier is None else ask_all()
    return found


def seed_of(*parts: object) -> int:
    """A seed of its own for whatever `parts` tell apart."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16)


def measure(
    cell: Cell, shard: Shard, made: Adversarials, key: Hashable, made_by: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The rows of one shard of `cell`, by column, one draw after the other, and the images of its first draw.

    made: the adversarial images of the shard. key: of these images; cells that name the same share what is measured of
    them. made_by: of each image, (attack, knowledge) of the earlier cell that made it, or ("", "").
    """
    draws = [_of_draw(cell, shard, made, key, draw) for draw in range(shard.plan.draws_of(cell.system))]
    views = {"clean": shard.images, "adversarial": made.images}
    for name, column in (("restored", "pure_adv"), ("restored_clean", "pure_clean")):
        views[name] = draws[0].pop(column)
    once = _of_image(cell, shard, made, key)
    for column, names in zip(("made_by", "made_with"), zip(*made_by)):
        once[column] = np.array(names, dtype=object)
    columns: dict[str, Any] = {name: np.concatenate([values] * len(draws)) for name, values in once.items()}
    for name in draws[0]:
        parts = [draw[name] for draw in draws]
        columns[name] = [one for part in parts for one in part] if name in SCORES else np.concatenate(parts)
    columns["draw"] = np.arange(len(draws)).repeat(len(shard.rows))
    return shard.plan.about(cell) | columns, views


def _of_image(cell: Cell, shard: Shard, made: Adversarials, key: Hashable) -> dict[str, Any]:
    """What does not hang on a draw: distances, cost, and what the undefended classifier answers."""
    bare = System("", cell.system.bare)
    clean, attacked = (_answers(bare, shard, images, of) for images, of in ((shard.images, CLEAN), (made.images, key)))
    psnr, ssim = shard.once(("quality", key), lambda: image_quality(made.images, shard.images))
    far = shard.once(("distances", key), lambda: metrics.distances(made.images, shard.images))
    return {
        "index": shard.index.numpy(),
        "label": shard.labels.cpu().numpy(),
        **_named("clean", clean),
        **_named("adv", attacked),
        **{name: values.cpu().numpy() for name, values in far.items()},
        "psnr_adv": psnr.numpy(),
        "ssim_adv": ssim.numpy(),
        "seconds_attack": made.seconds.numpy(),
        **{count: getattr(made, count).numpy() for count in COUNTS},
    }


def _of_draw(cell: Cell, shard: Shard, made: Adversarials, key: Hashable, draw: int) -> dict[str, Any]:
    """What the system makes of clean and of adversarial images in one draw; the first draw's images beside it."""
    system = cell.system
    parts = (id(system.classifier), id(system.purifier))
    clean = shard.once(("view", *parts, draw), lambda: _view(system, shard, shard.images, CLEAN, draw))
    attacked = _view(system, shard, made.images, key, draw)
    rounded = (made.images * 255).round() / 255
    again = _purified(system, shard, rounded, (key, "8 bits"), draw).images
    answers_8bit, _ = _answers(system, shard, again, (key, "8 bits"))
    columns: dict[str, Any] = {"pred_pure_adv_8bit": answers_8bit.numpy()}
    for name, view in (("clean", clean), ("adv", attacked)):
        columns |= _named(f"pure_{name}", (view.classes, view.confidence))
        columns[f"psnr_pure_{name}"], columns[f"ssim_pure_{name}"] = view.psnr.numpy(), view.ssim.numpy()
        columns[f"rejected_{name}"], columns[f"scores_{name}"] = view.rejected.numpy(), view.scores.tolist()
    columns["seconds_purify"] = np.full(len(shard.rows), attacked.seconds, np.float32)
    if draw == 0:
        columns |= {"pure_clean": clean.purified, "pure_adv": attacked.purified}
    return columns


def _named(view: str, answers: tuple[Tensor, Tensor]) -> dict[str, Any]:
    return {f"pred_{view}": answers[0].numpy(), f"conf_{view}": answers[1].numpy()}
