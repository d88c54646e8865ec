"""Models tried before they are attacked, and put to work: do they take the images, and are they left as they were?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unperturb.data import ImageSet
from unperturb.defenses.base import Defense
from unperturb.modules import ask, check_logits


@torch.no_grad()
def try_model(name: str, model: nn.Module, data: ImageSet, device: torch.device) -> None:
    """Ask a model about two images, which takes no time beside an attack and tells much.

    name: what an error calls it. Raises `ValueError`, which says what is wrong.
    """
    images, _ = data.batch(torch.arange(min(2, len(data))), device)
    shape, source = tuple(images.shape), data.source
    try:
        with drawing(0, device):
            out = ask(model, images)
    except Exception as error:
        raise ValueError(
            f"{name} fails on images of {source}, float32 {shape} in [0, 1]: is it for images of other channels or "
            f"another size? It said: {error}"
        ) from error
    if isinstance(model, Defense):
        if not isinstance(out, Tensor) or out.shape != images.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{name} must give images of the shape that it gets, {shape}; it gave {got}")
        return
    try:
        check_logits(out, len(images))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    worst = int(data.labels.max())
    if worst >= out.shape[1]:
        raise ValueError(
            f"{name} gives {out.shape[1]} logits, but {source} has images of class {worst} "
            f"({data.class_names[worst]!r}): take a model for {data.classes} classes, or load the data "
            "with class_names= in the model's order"
        )


@contextlib.contextmanager
def at_work(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, `model` is in eval mode, and on `device` unless its parts are on several: then its owner knows best."""
    modes = [(part, part.training) for part in model.modules() if hasattr(part, "training")]
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    model.eval()
    if len(places) == 1:
        model.to(device)
    try:
        yield
    finally:
        if len(places) == 1:
            model.to(places.pop())
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws what `seed` gives; the caller's draws stay as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
