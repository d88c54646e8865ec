"""A run resumed with models that no folder rebuilds: do they behave as those that its rows were made with?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from unperturb import per_image_rng, runs
from unperturb.defenses.base import Defense
from unperturb.evaluation.grid import shown_rows
from unperturb.evaluation.identity import identify
from unperturb.evaluation.plan import Plan
from unperturb.modules import ask

IMAGES = 8
TOLERANCE = 0.01


def recognize(plan: Plan, out: Path) -> None:
    """Keep in the run folder `out` how the models that it cannot rebuild behave, or compare with what it kept.

    A few images, clean and with noise, are shown to each; answers and their gradient are what is compared, up to what
    another number of threads or another device may change. Raises `RunError` where a model differs.
    """
    strangers = {name: model for name, model in plan.models().items() if not identify(model).lasting}
    if not strangers:
        return
    rows = shown_rows(plan.data.labels, IMAGES)
    clean, _ = plan.data.batch(rows, plan.device)
    noise = per_image_rng.uniform(0, plan.data.index[rows].to(plan.device), 0, plan.data.shape) - 0.5
    images = torch.cat([clean, (clean + noise / 16).clamp(0, 1)])
    with plan.at_work():
        now = {f"{what} {name}": x for name, model in strangers.items() for what, x in _of(plan, model, images).items()}
    path = out / "behavior.safetensors"
    if not path.exists():
        runs.save_tensors(path, now)
        return
    then = runs.load_tensors(path, finite=False)
    for name in strangers:
        answers, gradient = (
            _off(then.get(f"{what} {name}"), now[f"{what} {name}"]) for what in ("answers", "gradient")
        )
        # Rounding may put an image on the other side of a ReLU's kink, where the gradient is another.
        if answers.max() > TOLERANCE or gradient.median() > TOLERANCE:
            raise runs.RunError(
                f"{out} was begun with another model as {name}: on {len(images)} images this one behaves otherwise. "
                "Resume with the model that the rows were made with (if it draws at random, from torch's generator), "
                "or choose another folder"
            )


def _of(plan: Plan, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    function: Callable[[Tensor], Tensor] = model
    if isinstance(model, Defense):
        bare = next(iter(plan.classifiers.values()))

        def function(x: Tensor) -> Tensor:
            purified, scores = model.purify_and_score(x, lambda seen: ask(bare, seen))
            return torch.cat([purified.flatten(1), scores.to(purified)], 1)

    x = images.clone().requires_grad_()
    gradient = torch.zeros_like(images)
    with torch.enable_grad(), plan.drawing(0):
        answers = ask(function, x)
        if answers.requires_grad:
            weights = torch.linspace(-1, 1, answers.shape[1], device=answers.device)
            with contextlib.suppress(RuntimeError):  # an operation without a backward pass
                (gradient,) = torch.autograd.grad((answers.float() * weights).sum(), x)
    return {"answers": answers.detach().float().cpu(), "gradient": gradient.flatten(1).cpu()}


def _off(old: Tensor | None, new: Tensor) -> Tensor:
    """How far two `(N, M)` lie apart, per image `(N,)`, as a share of the larger."""
    if old is None or old.shape != new.shape or not torch.equal(old.isfinite(), new.isfinite()):
        return torch.full((1,), torch.inf)
    old, new = old.nan_to_num(0, 0, 0), new.nan_to_num(0, 0, 0)
    return (old - new).norm(dim=1) / torch.maximum(old.norm(dim=1), new.norm(dim=1)).clamp(min=1e-30)
