"""The contract of every attack: settings in, adversarial images out, inside the ball and inside [0, 1].

A new attack is a frozen dataclass that writes `perturb` alone, or of an `IterativeAttack` (`kinds`) its `direction`. It
meets the model only through an `AttackContext`, which counts passes, keeps randomness per image and makes wrong answers
of logits that are not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypedDict, Unpack, final

import torch
from torch import Tensor

from unperturb import per_image_rng
from unperturb.attacks.context import AttackContext, Model, Progress, QueryCounter, not_finite
from unperturb.attacks.losses import OwnLoss
from unperturb.attacks.projections import to_8_bit
from unperturb.modules import frozen, logits_of
from unperturb.registry import Registry
from unperturb.validation import check_images, check_labels

attacks: Registry[Attack] = Registry("attack")


def create_attack(name: str, **options: Any) -> Attack:
    """The attack registered as `name` with these settings; raises `UnknownNameError` for a name or option it lacks."""
    return attacks.create(name, **options)


@dataclass(frozen=True)
class AttackResult:
    """What `Attack.run` found.

    images: `(N, C, H, W)` adversarial images. success, success_8bit: `(N,)` bool, by one clean final forward, as they
    are and rounded to 8 bits. forwards, backwards: batch passes spent by the attack. queries: `(N,)` forward passes
    per image. gradients, zero_gradients: `(N,)` how often an image's gradient was asked for, and how often it was
    exactly zero (a saturated or masked model). nonfinite: `(N,)` passes, the final ones too, whose logits were NaN or
    infinite: a wrong answer. broken_by: N names, of the member of a cascade that felled each image ("" where it still
    stands, "clean" where it needed no attack); empty for an attack that is no cascade.
    """

    images: Tensor
    success: Tensor
    success_8bit: Tensor
    forwards: int
    backwards: int
    queries: Tensor
    gradients: Tensor
    zero_gradients: Tensor
    nonfinite: Tensor
    broken_by: list[str] = field(default_factory=list)


class CallOptions(TypedDict, total=False):
    """What a call of an attack takes besides model, images and labels.

    targets: `(N,)` classes to reach. index: `(N,)` each image's number in its data set, which its random draws depend
    on (default: its place in the batch). seed: of those draws. progress: called after each forward pass with their
    number so far; nothing is ever printed from inside.
    start: `(N, C, H, W)` adversarial images to begin from, brought into the ball first; an attack without `uses_start`
    takes no notice of them. mask: bool or 0 and 1, `(N, 1 or C, H, W)` or a shape that broadcasts to it: pixels where
    it is 0 never change; refused by an attack without `uses_mask`. quantize: whether the answer is rounded to 8 bits
    (whole 255ths), still inside the ball.
    """

    targets: Tensor | None
    index: Tensor | None
    seed: int
    progress: Progress | None
    start: Tensor | None
    mask: Tensor | None
    quantize: bool


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Settings of one attack. Its repr is its record.

    targets: None leaves the true class; `"least_likely"` or `"random"` picks a class to reach; classes given to the
    call win over both. Of the class: needs_gradient, whether it differentiates the model, False where outputs do;
    uses_start and uses_mask, whether a call's `start` and `mask` have a say.
    """

    needs_gradient: ClassVar[bool] = True
    uses_start: ClassVar[bool] = False
    uses_mask: ClassVar[bool] = False
    targets: Literal["least_likely", "random"] | None = None

    def perturb(self, context: AttackContext) -> Tensor:
        """Adversarial images for `context`; what a new attack writes."""
        raise TypeError(f"{type(self).__name__} does not say how it perturbs")

    def limit(self, x: Tensor, images: Tensor) -> Tensor:
        """`x` brought back into what this attack may do; [0, 1] alone unless it has a ball."""
        return x.clamp(0, 1)

    def for_random_model(self, eot_samples: int = 20) -> Attack:
        """This attack as a random model must be asked, where one success is a draw: it spends its whole budget on
        every image.

        eot_samples: passes that are averaged where the attack knows how; 1 for a model that averages itself
        (`attackers.EOT`). Raises `ValueError` for a minimal-norm attack, whose answer would be the nearest lucky draw.
        """
        return self

    @property
    def holds_own(self) -> bool:
        """Whether it holds something of the user's own, such as a loss: then an equal repr is not an equal attack."""
        return isinstance(getattr(self, "loss", None), OwnLoss)

    @final
    def __call__(self, model: Model, images: Tensor, labels: Tensor, **options: Unpack[CallOptions]) -> Tensor:
        """Adversarial images.

        model: any callable from images to logits `(N, K)`. images: float `(N, C, H, W)` in [0, 1]. labels: `(N,)`
        true classes. options: those of `CallOptions`: targets, index, seed, progress, start, mask, quantize.

        Raises `TypeError` or `ValueError` for inputs that are not so, `NoGradientError` where an attack by gradients
        meets a model that gives none. Warns of logits that are not finite (wrong answers) and of gradients of zero.
        """
        x, context = self._solve(model, images, labels, **options)
        # Whoever has reached a target has no gradient left, and who has not is not told apart without another pass.
        context.counter.warn(torch.full_like(context.labels, not context.targeted, dtype=torch.bool))
        return x

    @final
    def solve(
        self, model: Model, images: Tensor, labels: Tensor, **options: Unpack[CallOptions]
    ) -> tuple[Tensor, QueryCounter]:
        """The same images as `__call__`, without a warning, with what they cost: for who asks batch by batch."""
        x, context = self._solve(model, images, labels, **options)
        return x, context.counter

    @final
    def run(self, model: Model, images: Tensor, labels: Tensor, **options: Unpack[CallOptions]) -> AttackResult:
        """The same images as `__call__`, re-checked by clean forward passes, with what they cost."""
        x, context = self._solve(model, images, labels, **options)
        counter = context.counter
        success = []
        with torch.inference_mode(False), frozen(model), torch.no_grad():
            for shown in (x, (x * 255).round() / 255):
                logits = logits_of(model, shown)
                bad = not_finite(logits)
                counter.nonfinite += bad
                success.append(torch.where(bad, not context.targeted, context.fooled(logits)))
        counter.warn(~success[0])
        return AttackResult(
            images=x,
            success=success[0],
            success_8bit=success[1],
            forwards=counter.forwards,
            backwards=counter.backwards,
            queries=counter.queries,
            gradients=counter.gradients,
            zero_gradients=counter.zero_gradients,
            nonfinite=counter.nonfinite,
            broken_by=counter.broken_by,
        )

    @torch.inference_mode(False)  # where there is no gradient; it would read as robustness
    def _solve(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        index: Tensor | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        quantize: bool = False,
    ) -> tuple[Tensor, AttackContext]:
        images = check_images(images)
        check_labels(images, labels)
        self._check_reach(images)
        images, labels = _plain(images.detach().float()), _plain(labels.to(torch.int64))
        index = torch.arange(len(images), device=images.device) if index is None else _plain(index.to(images.device))
        if index.shape != labels.shape:
            raise ValueError(f"index must have shape {tuple(labels.shape)}, not {tuple(index.shape)}")
        counts = torch.zeros_like(labels)
        counter = QueryCounter(queries=counts, zero_gradients=counts.clone(), progress=progress)
        rows = torch.arange(len(images), device=images.device)
        mask = None if mask is None else self._checked_mask(mask, images)
        start = None if start is None else self._checked_start(start, images, mask)
        context = AttackContext(model, images, labels, False, index, seed, counter, rows, start, mask)
        if not len(images):
            return images.clone(), context
        with frozen(model) as modules:
            tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
            if any(t.is_inference() for t in tensors) and getattr(self, "needs_gradient", True):
                raise ValueError(
                    "the model was made in torch.inference_mode and can give no gradient: make it, or "
                    "copy.deepcopy it, outside"
                )
            if targets is not None or self.targets is not None:
                context = replace(context, labels=self._choose_targets(context, targets), targeted=True)
            x = self.limit(self.perturb(context).detach(), images)
        if quantize:
            x = to_8_bit(x, images, getattr(self, "eps", None), getattr(self, "norm", "linf"))
        return x if mask is None else torch.where(mask > 0, x, images), context

    def _checked_mask(self, mask: Tensor, images: Tensor) -> Tensor:
        """`mask` as float zeros and ones that broadcast with the images, one per image."""
        if not self.uses_mask:
            raise ValueError(
                f"{type(self).__name__} cannot keep pixels as they are: mask is for attacks that follow the loss's "
                "gradient (fgsm, pgd, mim and its variants, apgd, apgd-t)"
            )
        try:
            mask = torch.as_tensor(mask, device=images.device)
            torch.broadcast_to(mask, images.shape)
        except (RuntimeError, TypeError, ValueError):
            given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"a mask must be a tensor that broadcasts to the images {tuple(images.shape)}, such as "
                f"{(len(images), 1, *images.shape[2:])}, not {given}"
            ) from None
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError("a mask must be bool or hold 0 and 1 alone: 1 where a pixel may change")
        mask = mask.detach().to(images.dtype)
        mask = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)
        return _plain(mask.expand(len(images), -1, -1, -1))

    def _checked_start(self, start: Tensor, images: Tensor, mask: Tensor | None) -> Tensor | None:
        """`start` brought into what this attack may do; None where it has no say."""
        start = _plain(check_images(start).detach().to(images))
        if start.shape != images.shape:
            raise ValueError(f"start must have the images' shape {tuple(images.shape)}, not {tuple(start.shape)}")
        if not self.uses_start:
            return None
        return self.limit(start if mask is None else torch.where(mask > 0, start, images), images)

    def _check_reach(self, images: Tensor) -> None:
        """Raise `ValueError` for an L2 budget that no two images are apart by."""
        eps, far = getattr(self, "eps", None), math.sqrt(images[0].numel()) if len(images) else math.inf
        if eps is not None and getattr(self, "norm", None) == "l2" and eps > far:
            raise ValueError(
                f"an L2 budget of {eps:g} is more than any two images of {tuple(images.shape[1:])} in [0, 1] are "
                f"apart ({far:.4g}); divide a budget made for pixels of 0 to 255 by 255"
            )

    def _choose_targets(self, context: AttackContext, given: Tensor | None) -> Tensor:
        labels = context.labels
        if given is not None:
            check_labels(context.images, given)
            if bool((given == labels).any()):
                raise ValueError("a target equals the true class of its image")
            return _plain(given.to(labels))
        logits = context.logits(context.images)
        if self.targets == "least_likely":
            return logits.scatter(1, labels[:, None], torch.inf).argmin(1)
        if self.targets == "random":
            shift = 1 + per_image_rng.integers(context.seed, context.index, 1 << 41, logits.shape[1] - 1).squeeze(1)
            return (labels + shift) % logits.shape[1]
        raise ValueError(f"targets must be None, 'least_likely' or 'random', not {self.targets!r}")


def _plain(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of one that was made in inference mode and can have no gradient."""
    return tensor.clone() if tensor.is_inference() else tensor
