"""A short look at a system, seconds long: what an honest evaluation rests on and rows do not tell."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unperturb import per_image_rng
from unperturb.attackers import Attacker
from unperturb.attacks.base import Attack
from unperturb.attacks.fgsm import FGSM
from unperturb.attacks.losses import LossFunction, cross_entropy
from unperturb.attacks.noise import Noise
from unperturb.attacks.pgd import PGD
from unperturb.attacks.projections import column, l2_norm
from unperturb.modules import classes_of, frozen, logits_of
from unperturb.systems import System
from unperturb.threat_models import budget
from unperturb.validation import check_images, check_labels

Numbers = dict[str, Any]

SAME = 1e-4  # answers that differ by less, of the range of the logits, are the same but for rounding
SWEEP = (0.0625, 0.125, 0.25, 0.5)  # in Linf; at 0.5 every image can be made gray
ROUNDING = 0.02  # the same where the batch has another shape: what bfloat16 inside a model may do; float32 does 1e-5
STEPS = (20, 40)  # of the two searches that are compared
_SWEEP_STEPS = 10
_DRAWS = 4  # answers that the accuracy of a random system is averaged over, and passes per gradient
_DEAR = 4  # images that are asked of a purifier that says it is dear
_ALONE = 8  # images that are asked one by one
_NUDGES = (1e-3, 2 / 255)  # less than a gray level, and enough to change most of them
_LENGTHS = (0.1, 0.01, 0.001)  # L2 steps of the finite differences
_BESIDE = 0.1  # of the ball: how near gradients are compared; honest ones point elsewhere at its edge
_DIRECTIONS = 4  # random ones, beside the gradient's

Norm = Literal["linf", "l2"]


def probe(
    model: System | nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    eps: float | str = 8 / 255,
    norm: Norm = "linf",
) -> Numbers:
    """Numbers, by name, that say what attacks on `model` are worth: what `unperturb.results.flags` reads. Plain floats,
    integers and lists; a key that is missing was not measured, such as attacks where there is no gradient.

    model: a `System`, or what gives logits `(N, K)`. images: float `(N, C, H, W)` in [0, 1], some 16 to 64 test images,
    all of which are used (4 where the purifier says that it is dear: `held_out`). labels: `(N,)`. eps, norm: the budget
    of the evaluation. seed: of every draw.

    The system is asked in eval mode. Modes, flags, buffers and the random generators are then as they were.

    Keys. n, classes, eps, norm; random, differentiable, purifier: what the system says of itself (0 or 1).
    no_answer: fraction of images, clean and noisy, that raise an error or have logits that are not finite; what follows
    is of the others. clean_accuracy. repeat_difference: between repeated calls; batch_difference: between an image's
    answers alone, in another order and beside other images; both of the range of the logits. probabilities: fraction of
    answers that are in [0, 1] and sum to 1. saturated: fraction whose softmax is exactly one-hot in float32.
    autograd_calls: backward passes inside one forward pass. known_images, known_pattern: fraction of clean images, and
    of images of one FGSM step, whose answer is another than those to images moved by less than 2/255, which agree.
    nudged_accuracy: at noise of 1/255. no_gradient: 1 where the attacked function has none. zero_gradient_clean,
    zero_gradient_perturbed: fraction of images whose gradient of the cross-entropy is exactly zero; nan_gradient.
    difference_error: how far finite differences are from the gradient, relative, median over images, the best of
    several step lengths; difference_images: how many had one. gradient_alignment: mean cosine between the gradients at
    an image and at a random point of its ball; alignment_noise: its standard error, were the directions random.
    noise_accuracy, steps, steps_accuracy: at the budget, under noise and under PGD of so many steps. sweep_eps,
    sweep_accuracy: under PGD-10, in Linf. frozen_accuracy: at the last of these, the draws of a random system held.

    Raises `TypeError` or `ValueError` for what are no images and labels, for fewer than two, and for another norm.
    """
    images = check_images(images).detach().float()
    check_labels(images, labels)
    if len(images) < 2:
        raise ValueError(f"a probe needs at least two images, better 32, not {len(images)}")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    if not isinstance(model, System):
        model = System.of("", model if isinstance(model, nn.Module) else _Function(model))
    system = model
    dear = system.purifier is not None and system.purifier.held_out is not None
    if dear:
        images, labels = images[:_DEAR], labels[:_DEAR]
    with torch.inference_mode(False), _untouched(system, images), torch.no_grad():
        torch.manual_seed(seed)
        look = _Look(system, images.clone(), labels.to(torch.int64), seed, budget(eps, norm), norm)
        found = look.what_it_says_of_itself() | look.whether_it_answers()
        if len(look.images) >= 2:
            found |= look.how_it_answers()
            if not dear:
                found |= look.what_it_knows() | look.its_gradients()
        return found


class _Function(nn.Module):
    """A callable that is no module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


@contextlib.contextmanager
def _untouched(system: System, images: Tensor) -> Iterator[None]:
    """Inside: all is in eval mode and frozen. After: modes, flags, buffers and generators are as they were."""
    devices = [images.device] if images.is_cuda else []
    parts = nn.ModuleList([system.model, system.bare])
    with torch.random.fork_rng(devices=devices), _others_generators(), frozen(parts) as modules:
        kept = [(m, name, b, b.clone()) for m in modules for name, b in m.named_buffers(recurse=False)]
        try:
            yield
        finally:
            for module, name, buffer, value in kept:
                setattr(module, name, buffer)
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def _others_generators() -> Iterator[None]:
    """After: NumPy's and Python's own generators are as they were."""
    # The global one, since that is what a model draws from.
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)


class _Held(nn.Module):
    """A random function with its draws held: every call starts the generators at `seed`."""

    def __init__(self, function: nn.Module, seed: int) -> None:
        super().__init__()
        self.function, self.seed = function, seed

    def forward(self, images: Tensor) -> Tensor:
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices), _others_generators():
            torch.manual_seed(self.seed)
            np.random.seed(self.seed % 2**32)  # noqa: NPY002
            random.seed(self.seed)
            out: Tensor = self.function(images)
            return out


@contextlib.contextmanager
def _backward_passes() -> Iterator[list[None]]:
    """Inside, each backward pass adds an entry to the list."""
    # All ways to one, `torch.func` aside, end in this function; older versions of torch call it otherwise.
    names = ["_engine_run_backward"] if hasattr(torch.autograd, "_engine_run_backward") else ["grad", "backward"]
    found: list[None] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            found.append(None)
            return function(*args, **kwargs)

        return run

    own = {name: getattr(torch.autograd, name) for name in names}
    for name, function in own.items():
        setattr(torch.autograd, name, watched(function))
    try:
        yield found
    finally:
        for name, function in own.items():
            setattr(torch.autograd, name, function)


def _smooth_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the label is behind all others, `(N,)`, float64: its gradient does not vanish where a softmax saturates,
    nor jump where another class becomes the second."""
    logits = logits.double()
    true = logits.gather(1, labels[:, None])
    return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - true.squeeze(1)


@dataclass
class _Look:
    """One probe. `images` and `labels` are those that the system has an answer for."""

    system: System
    images: Tensor
    labels: Tensor
    seed: int
    eps: float
    norm: Norm

    def __post_init__(self) -> None:
        self.model = self.system.model
        self.index = torch.arange(len(self.images), device=self.images.device)
        self.classes, self.scale = 0, 1.0  # of the logits: how many, and their range
        self.random, self.needs_batch = self.system.random, False

    def what_it_says_of_itself(self) -> Numbers:
        system = self.system
        said = {"random": system.random, "differentiable": system.differentiable, "purifier": bool(system.purifier)}
        return {"n": len(self.images), "eps": self.eps, "norm": self.norm, **{k: int(v) for k, v in said.items()}}

    # Answers --------------------------------------------------------------------------------------------------------

    def whether_it_answers(self) -> Numbers:
        there = [self._answers(x).isfinite().all(1) for x in (self.images, self._moved(self.images, self.eps, 0))]
        if not bool(torch.cat(there).any()):
            logits_of(self.model, self.images)  # no answer at all is a mistake, and its error says which
        both = there[0] & there[1]
        self.images, self.labels, self.index = self.images[both], self.labels[both], self.index[both]
        return {"classes": self.classes, "no_answer": _fraction(~torch.cat(there))}

    def _answers(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """Logits; NaN for images that raise an error, which are asked alone where the whole batch does."""
        try:
            logits = logits_of(model or self.model, x)
        except Exception:  # whatever a model raises
            if len(x) == 1:
                return torch.full((1, max(self.classes, 1)), torch.nan, device=x.device)
            alone = [self._answers(x[i : i + 1], model) for i in range(len(x))]
            width = max(a.shape[1] for a in alone)
            return torch.cat([a.expand(1, width) if a.shape[1] == 1 else a for a in alone])
        self.classes = logits.shape[1]
        return logits

    def _apart(self, one: Tensor, other: Tensor) -> float:
        """The largest difference of two `(N, K)` answers, of the range of the logits; of those that are finite."""
        return float((one - other).abs().nan_to_num(0, 0, 0).max()) / self.scale

    def _accuracy(self, x: Tensor, model: nn.Module | None = None) -> float:
        answers = [self._answers(x, model) for _ in range(_DRAWS if self.random else 1)]
        return sum(_fraction(classes_of(a) == self.labels) for a in answers) / len(answers)

    def how_it_answers(self) -> Numbers:
        with _backward_passes() as passes:
            logits = self._answers(self.images)
        self.scale = max(float((logits.amax(1) - logits.amin(1)).median()), 1e-12)
        repeated = max(self._apart(self._answers(self.images), logits) for _ in range(3))
        self.random = self.random or repeated > SAME
        likely = (logits >= 0).all(1) & (logits <= 1).all(1) & ((logits.sum(1) - 1).abs() <= 1e-3)
        one_hot = (logits.softmax(1) > 0).sum(1) == 1
        found: Numbers = {
            "clean_accuracy": self._accuracy(self.images),
            "repeat_difference": repeated,
            "probabilities": _fraction(likely),
            "saturated": _fraction(one_hot),
            "autograd_calls": len(passes),
        }
        if not self.random:  # whose noise is laid out as the batch is
            found["batch_difference"] = self._batch_difference(logits)
            self.needs_batch = found["batch_difference"] > ROUNDING
        return found

    def _batch_difference(self, logits: Tensor) -> float:
        n, some = len(self.images), min(_ALONE, len(self.images))
        alone = torch.cat([self._answers(self.images[i : i + 1]) for i in range(some)])
        order = per_image_rng.permutation(self.seed, 1, n).to(self.images.device)
        shuffled = self._answers(self.images[order])
        strangers = self.images.clone()
        strangers[n // 2 :] = per_image_rng.uniform(self.seed, self.index[n // 2 :], 2, self.images.shape[1:])
        beside = self._answers(strangers)[: n // 2]
        pairs = ((alone, logits[:some]), (shuffled, logits[order]), (beside, logits[: n // 2]))
        return max(self._apart(a, b) for a, b in pairs)

    def what_it_knows(self) -> Numbers:
        found = {"known_images": self._jumps(self.images)}
        with contextlib.suppress(Exception):  # where there is no gradient, there is no pattern either
            found["known_pattern"] = self._jumps(self._attacked(FGSM(norm=self.norm, eps=self.eps), self._seen()))
        nudged = [self._accuracy(self._moved(self.images, 1 / 255, step)) for step in (3, 4)]
        return found | {"nudged_accuracy": sum(nudged) / 2}

    def _jumps(self, x: Tensor) -> float:
        """The fraction of `x` whose answer is far from those beside it, which agree: ten times as far as these are from
        each other, and by a tenth of the logits' range, which no smooth model comes near in so short a way."""
        answer = self._answers(x)
        jumped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for length in _NUDGES:
            one, two = (self._answers(self._moved(x, length, step)) for step in (5, 6))
            far, near = ((a - b).abs().amax(1) for a, b in ((answer, one), (one, two)))
            jumped |= (far > 10 * near) & (far > 0.1 * self.scale)
        return _fraction(jumped)

    def _moved(self, x: Tensor, length: float, step: int, norm: Norm = "linf") -> Tensor:
        """`x` with noise: uniform of at most `length` per pixel, or in L2 of that length before the cut with [0, 1]."""
        if norm == "linf":
            noise = per_image_rng.uniform(self.seed, self.index, step, x.shape[1:]).mul(2).sub(1)
        else:
            noise = _unit(per_image_rng.normal(self.seed, self.index, step, x.shape[1:]))
        return (x + noise.to(x) * length).clamp(0, 1)

    # Gradients and attacks ------------------------------------------------------------------------------------------

    def its_gradients(self) -> Numbers:
        seen = self._seen()
        found: Numbers = {"no_gradient": 0}
        for name, x in (("clean", self.images), ("perturbed", self._moved(self.images, self.eps, 7, self.norm))):
            gradient = _gradient(seen, x, self.labels, cross_entropy)
            if gradient is None:
                return {"no_gradient": 1}
            size = gradient.flatten(1).abs().amax(1)  # NaN where one of them is
            found[f"zero_gradient_{name}"] = _fraction(size == 0)
            found["nan_gradient"] = max(found.get("nan_gradient", 0.0), _fraction(~size.isfinite()))
        held = self.random and self._can_be_held()
        if held or not self.random:
            exact = _Held(self._seen(1), self.seed) if held else seen
            model = _Held(self.model, self.seed) if held else self.model
            # Through a stand-in the gradient is another function's; of a whole batch's answer, other images' too.
            if self.system.differentiable and not self.needs_batch:
                found |= self._differences(exact, model)
            found |= self._alignment(exact)
        with contextlib.suppress(Exception):  # a model that raises one at some images on the way
            found |= self._attacks(seen, held)
        return found

    def _seen(self, eot_samples: int = _DRAWS) -> nn.Module:
        """What a white-box attacker differentiates, whatever the attack."""
        return Attacker(Noise(eps=0.0), "white_box", eot_samples=eot_samples).model_for(self.system)

    def _can_be_held(self) -> bool:
        held = _Held(self.model, self.seed)
        return self._apart(self._answers(self.images, held), self._answers(self.images, held)) <= SAME

    def _differences(self, seen: nn.Module, model: nn.Module) -> Numbers:
        """Finite differences against the gradient, along it and along random directions.

        Because of kinks the step length that agrees best counts, and the median image. Points are drawn towards gray,
        so that no step leaves [0, 1], and out of flat regions by noise: where pixels are equal, a maximum or a median
        has a kink in every direction.
        """
        x = self._moved(0.2 + 0.6 * self.images, 0.05, 9)
        gradient = _gradient(seen, x, self.labels, _smooth_margin)
        if gradient is None or not bool((some := _has_gradient(gradient)).any()):
            return {"difference_images": 0}
        noise = [per_image_rng.normal(self.seed, self.index, 10 + i, x.shape[1:]) for i in range(_DIRECTIONS)]
        directions = [_unit(d.to(x)) for d in (gradient, *noise)]
        promised = torch.stack([(gradient.double() * d).flatten(1).sum(1) for d in directions])
        best = torch.full_like(promised[0], torch.inf)
        for length in _LENGTHS:
            up, down = (
                torch.stack(
                    [_smooth_margin(self._answers(x + sign * d * length, model), self.labels) for d in directions]
                )
                for sign in (1, -1)
            )
            slope = (up - down) / (2 * length)
            off, size = (slope - promised).abs(), torch.maximum(slope.abs(), promised.abs()).clamp(min=1e-300)
            error = torch.maximum(off[0] / size[0], off[1:].sum(0) / size[1:].sum(0))
            best = torch.minimum(best, error.nan_to_num(torch.inf))
        return {"difference_error": float(best[some].median()), "difference_images": int(some.sum())}

    def _alignment(self, seen: nn.Module) -> Numbers:
        points = (self.images, self._moved(self.images, self.eps * _BESIDE, 8, self.norm))
        one, other = (_gradient(seen, x, self.labels, _smooth_margin) for x in points)
        if one is None or other is None or not bool((some := _has_gradient(one) & _has_gradient(other)).any()):
            return {}
        cosine = (_unit(one[some]) * _unit(other[some])).flatten(1).sum(1)
        noise = (len(cosine) * one[0].numel()) ** -0.5
        return {"gradient_alignment": float(cosine.mean()), "alignment_noise": noise}

    def _attacks(self, seen: nn.Module, held: bool) -> Numbers:
        found: Numbers = {}
        noise = [self._attacked(Noise(norm=self.norm, eps=self.eps), seen, step) for step in (0, 1)]
        found["noise_accuracy"] = sum(self._accuracy(x) for x in noise) / 2
        found["steps"] = list(STEPS)
        searches = [PGD(norm=self.norm, eps=self.eps, steps=steps) for steps in STEPS]
        found["steps_accuracy"] = [self._accuracy(self._attacked(search, seen)) for search in searches]
        found["sweep_eps"] = list(SWEEP)
        sweep = [PGD(eps=eps, steps=_SWEEP_STEPS) for eps in SWEEP]
        found["sweep_accuracy"] = [self._accuracy(self._attacked(search, seen)) for search in sweep]
        if held:
            model = _Held(self.model, self.seed)
            frozen_too = self._attacked(sweep[-1], _Held(self._seen(1), self.seed))
            found["frozen_accuracy"] = self._accuracy(frozen_too, model)
        return found

    def _attacked(self, attack: Attack, seen: nn.Module, step: int = 0) -> Tensor:
        return attack.solve(seen, self.images, self.labels, index=self.index, seed=self.seed + step)[0]


def _fraction(hits: Tensor) -> float:
    return float(hits.float().mean())


def _unit(direction: Tensor) -> Tensor:
    """Of L2 length 1, image by image; where it is zero, zero."""
    wide = direction.double()
    return wide.div_(column(l2_norm(wide).clamp(min=1e-300), wide)).to(direction)


def _has_gradient(gradient: Tensor) -> Tensor:
    """`(N,)` bool: finite and not zero."""
    size = gradient.flatten(1).abs().amax(1)
    return size.isfinite() & (size > 0)


@torch.enable_grad()
def _gradient(seen: nn.Module, x: Tensor, labels: Tensor, loss: LossFunction) -> Tensor | None:
    """The gradient of the loss at `x`, as it comes; None where the function gives none."""
    x = x.detach().clone().requires_grad_()
    try:
        value = loss(logits_of(seen, x), labels)
        return torch.autograd.grad(value.sum(), x)[0].detach()
    except Exception:  # no graph, an operation without a backward pass, an image that it does not take
        return None
