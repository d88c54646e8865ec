"""Attacks of torchattacks, foolbox and ART as attacks of this package.

None of these libraries is imported: an attack is told by the methods that it has.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from unperturb.attacks.base import Attack
from unperturb.attacks.context import AttackContext, NoGradientError, not_finite
from unperturb.attacks.projections import Norm, project_
from unperturb.modules import logits_of
from unperturb.threat_models import budget

_TOLERANCE = 1e-5  # of a distance, relative and absolute: what float32 does to a point on the edge of its ball
_NO_SETTING = (
    *("attack", "model", "model_name", "device", "attack_mode", "supported_mode", "targeted"),
    "normalization_used",
)


def wrap_attack(
    attack: Any, *, eps: float | str | None, norm: Norm = "linf", needs_gradient: bool = True, name: str | None = None
) -> Attack:
    """An attack of torchattacks, foolbox or ART as an attack of this package.

    attack: an attack object of torchattacks (whichever model it was made for) or of foolbox; or a function, or a class,
    that makes one of any of the three from a `torch.nn.Module`, as ART needs it::

        up.wrap_attack(foolbox.attacks.LinfPGD(steps=10), eps="8/255")
        up.wrap_attack(lambda model: torchattacks.PGD(model, eps=8 / 255), eps="8/255", name="their PGD")
        up.wrap_attack(lambda model: ProjectedGradientDescent(PyTorchClassifier(model, ...), eps=8 / 255), eps="8/255")

    eps, norm: the ball that its answers must lie in; foolbox is given it too. None for an attack without a budget.
    needs_gradient: False where it asks for outputs alone. name: what its repr, the record, says of it (default: its
    class and settings, or the function's name).

    Its answers are cut to [0, 1], and judged like any other. What it draws from the global generators follows the seed,
    but all of a batch together: another batch size gives other images. Passes are counted; `queries` counts every image
    in every pass, for which images a smaller pass shows is not known.

    Raises `TypeError` for what is no such attack, `ValueError` for an attack of ART that is already bound to a model.
    The attack itself raises `ValueError` where an answer lies outside the ball.
    """
    if not isinstance(attack, type) and (_is_art(attack) or _is_torchattacks(attack) or _is_foolbox(attack)):
        if _is_art(attack):
            raise ValueError(
                "an attack of ART is bound to the estimator that it was made with: give a function that makes it, "
                f"lambda model: {type(attack).__name__}(PyTorchClassifier(model, ...), ...)"
            )
        name = name or _described(attack)
    elif not callable(attack):
        raise TypeError(
            f"an attack of torchattacks or foolbox, or a function that makes one of theirs or ART's from a model, was "
            f"expected, not {type(attack).__name__}"
        )
    kind = ForeignAttack if needs_gradient else ForeignQueryAttack
    called = str(getattr(attack, "__name__", type(attack).__name__))
    return kind(attack=attack, eps=eps, norm=norm, name=name or called)


@dataclass(frozen=True, kw_only=True)
class ForeignAttack(Attack):
    """An attack of another library; made by `wrap_attack`."""

    attack: Any = field(repr=False)
    name: str
    norm: Norm = "linf"
    eps: float | str | None

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', not {self.norm!r}")
        if self.eps is not None:
            object.__setattr__(self, "eps", budget(self.eps, self.norm))

    @property
    def holds_own(self) -> bool:
        return True

    def for_random_model(self, eot_samples: int = 20) -> Attack:
        if self.eps is None:
            raise ValueError(
                f"{self.name} has no budget: it seeks the nearest point at which one answer changes, and a random "
                "model's answer is a draw. Attack it with a budget instead"
            )
        return self

    def limit(self, x: Tensor, images: Tensor) -> Tensor:
        return x.clamp(0, 1) if self.eps is None else project_(x, images, float(self.eps), self.norm)

    def perturb(self, context: AttackContext) -> Tensor:
        seen = _Seen(context).eval()
        targets = context.labels if context.targeted else None
        with _seeded(context), torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
            attack = self._made_for(seen)
            if _is_torchattacks(attack):
                answer = _ask_torchattacks(attack, context.images, context.labels, targets)
            elif _is_art(attack):
                answer = _ask_art(attack, context.images, context.labels, targets)
            elif _is_foolbox(attack):
                answer = _ask_foolbox(attack, seen, context.images, context.labels, targets, self.eps)
            else:
                raise TypeError(
                    f"{self.name} made a {type(attack).__name__}, no attack of torchattacks, foolbox or ART"
                )
        return self._checked(answer, context.images)

    def _made_for(self, seen: nn.Module) -> Any:
        if isinstance(self.attack, type) or not (_is_torchattacks(self.attack) or _is_foolbox(self.attack)):
            return self.attack(seen)
        if _is_foolbox(self.attack):
            return self.attack
        # A copy of it, and of the attacks inside, that has this model wherever the old one was.
        made = copy.deepcopy(self.attack, {id(self.attack.model): seen})
        made.set_device(next(seen.parameters()).device)
        return made

    def _checked(self, answer: Any, images: Tensor) -> Tensor:
        x = torch.as_tensor(answer).detach().to(images)
        if x.shape != images.shape:
            raise ValueError(f"{self.name} gave images of shape {tuple(x.shape)}, not {tuple(images.shape)}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"{self.name} gave pixels that are NaN or infinite")
        x = x.clamp(0, 1)
        if self.eps is not None and len(x):
            order = 2 if self.norm == "l2" else torch.inf
            far = torch.linalg.vector_norm((x - images).double().flatten(1), order, dim=1)
            limit = float(self.eps) * (1 + _TOLERANCE) + _TOLERANCE
            if bool((far > limit).any()):
                raise ValueError(
                    f"{self.name} left its ball: {int((far > limit).sum())} of {len(x)} answers lie farther than "
                    f"{self.norm} {float(self.eps):g} from their images, up to {float(far.max()):g}. Give the wrapped "
                    "attack the same budget and norm, or declare its own (eps=None for none)"
                )
        return x


@dataclass(frozen=True, kw_only=True)
class ForeignQueryAttack(ForeignAttack):
    """An attack of another library that asks for outputs alone."""

    needs_gradient: ClassVar[bool] = False


class _Seen(nn.Module):
    """The attacked model as another library sees it: counted, with nothing in it that could be put into another mode,
    and a parameter that tells the device."""

    def __init__(self, context: AttackContext) -> None:
        super().__init__()
        self.context = context
        self.place = nn.Parameter(torch.zeros((), device=context.images.device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        context, counter = self.context, self.context.counter
        asks = x.requires_grad and torch.is_grad_enabled()
        if asks:
            x = x.view_as(x)
            x.register_hook(self._count_gradient)
        logits = logits_of(context.model, x)
        if asks and not logits.requires_grad:
            raise NoGradientError
        bad = not_finite(logits)
        counter.forwards += 1
        counter.queries[context.rows] += 1
        if len(x) == len(context.rows):
            counter.nonfinite[context.rows] += bad
        if counter.progress is not None:
            counter.progress(counter.forwards)
        return torch.where(bad[:, None], 0.0, logits)

    def _count_gradient(self, gradient: Tensor) -> None:
        context, counter = self.context, self.context.counter
        counter.backwards += 1
        if len(gradient) == len(context.rows):
            counter.gradients[context.rows] += 1
            counter.zero_gradients[context.rows] += gradient.flatten(1).abs().amax(1) == 0


@contextlib.contextmanager
def _seeded(context: AttackContext) -> Iterator[None]:
    """Inside, the global generators that other libraries draw from follow the seed and the first image's number; after,
    they are as they were."""
    seed = (context.seed * 1_000_003 + int(context.index[0])) % 2**32
    devices = [context.images.device] if context.images.is_cuda else []
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)  # noqa: NPY002
            random.setstate(pythons)


def _described(attack: Any) -> str:
    """Class and settings, as far as these are plain values."""
    plain = {k: v for k, v in vars(attack).items() if isinstance(v, str | int | float | None) and k not in _NO_SETTING}
    return f"{type(attack).__name__}({', '.join(f'{k}={v!r}' for k, v in plain.items() if k[0] != '_')})"


# One library each ----------------------------------------------------------------------------------------------------


def _has(attack: Any, *methods: str) -> bool:
    return all(hasattr(attack, method) for method in methods)


def _is_torchattacks(attack: Any) -> bool:
    return _has(attack, "set_model", "set_device", "set_mode_targeted_by_label")


def _is_foolbox(attack: Any) -> bool:
    return callable(attack) and _has(attack, "repeat", "distance")


def _is_art(attack: Any) -> bool:
    return _has(attack, "generate", "estimator")


def _ask_torchattacks(attack: Any, images: Tensor, labels: Tensor, targets: Tensor | None) -> Any:
    if getattr(attack, "normalization_used", None):
        raise ValueError(
            f"{type(attack).__name__} expects normalized images (set_normalization_used); here they lie in [0, 1], and "
            "the model normalizes them itself: make the attack without"
        )
    if targets is not None:
        attack.set_mode_targeted_by_label(quiet=True)
    return attack(images.clone(), labels if targets is None else targets)


def _ask_foolbox(
    attack: Any, seen: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None, eps: Any
) -> Tensor:
    foolbox = importlib.import_module(type(attack).__module__.partition(".")[0])
    criteria = foolbox.criteria
    wanted = criteria.Misclassification(labels) if targets is None else criteria.TargetedMisclassification(targets)
    model = foolbox.PyTorchModel(seen, bounds=(0, 1), device=images.device)
    _, clipped, success = attack(model, images.clone(), wanted, epsilons=eps)
    # An attack without a budget gives the original back where it failed; these give anything.
    answer: Tensor = clipped if eps is not None else torch.where(success[:, None, None, None], clipped, images)
    return answer


def _ask_art(attack: Any, images: Tensor, labels: Tensor, targets: Tensor | None) -> Any:
    if targets is not None:
        if not hasattr(attack, "targeted"):
            raise ValueError(f"{type(attack).__name__} knows no targets")
        attack.set_params(targeted=True)
    towards = labels if targets is None else targets
    return attack.generate(images.detach().cpu().numpy(), towards.cpu().numpy())
