"""The frozen, fused copy of a model: the same function of its input, made cheap to differentiate for an attack."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import fusion

from unperturb.classifiers.base import Classifier, Normalize
from unperturb.modules import ask, check_logits, deep_copy, frozen

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_PROBE_IMAGES = 32


class FusedCopy(nn.Module):
    """A frozen copy of a model, in eval mode for good; its parameters take no gradient.

    folded: how many batch norms went into the layer before them. channels_last: whether its weights are laid out so.
    """

    def __init__(self, module: nn.Module, folded: int, channels_last: bool) -> None:
        super().__init__()
        self.module = module
        self.folded = folded
        self.channels_last = channels_last

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = ask(self.module, images)
        check_logits(logits, len(images))
        return logits

    def train(self, mode: bool = True) -> FusedCopy:
        return super().train(False)


class _Borrowed(nn.Module):
    """A model that cannot be copied, asked as if it were frozen; between calls it is what its owner made of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lender = (model,)  # in a tuple it is no part of this module, whose mode and device are its own

    def forward(self, images: Tensor) -> Tensor:
        (model,) = self.lender
        with frozen(model):
            return ask(model, images)


@torch.inference_mode(False)
def fused_copy(model: nn.Module, example: Tensor | None = None, *, channels_last: bool | None = None) -> FusedCopy:
    """The frozen fast copy of `model`, which stays as it is; one that cannot be copied is asked itself, as if frozen.

    example: images `(N, C, H, W)` in [0, 1] like those to be attacked; they give shape and device of the trials.
    Without them the `spec` of a `Classifier` does; where there is none either, nothing is folded or probed.
    channels_last: None times both memory formats. As they differ in the last bits, a run that is to be repeated bit for
    bit must record `fused_copy.channels_last` and pass it on.

    Batch norms are folded into the convolution or linear layer before them, exactly but for rounding. `Normalize`
    stays: it cannot go into a convolution that pads with zeros. Each change is kept if, on random images, logits (to
    1e-4) and input gradient (to 1e-2, of the median image) stay what they were; else the copy is frozen as it is.
    """
    try:
        module = deep_copy(model).eval()
    except ValueError:
        return FusedCopy(_Borrowed(model), 0, False).eval()
    for parameter in module.parameters():  # TorchScript has no `requires_grad_` of its own
        parameter.requires_grad_(False)
    images = _trial_images(model, example)
    if images is None:
        return FusedCopy(module, 0, False).eval()
    module, folded = _folded(module, images)
    module, is_last = _laid_out(module, images, channels_last)
    return FusedCopy(module, folded, is_last).eval()


def _trial_images(model: nn.Module, example: Tensor | None) -> Tensor | None:
    """Random images like the example, from a generator of their own: the caller's draws stay as they were."""
    if example is not None:
        shape, like = tuple(example.shape[1:]), example
        count = min(len(example), _PROBE_IMAGES)
    elif isinstance(model, Classifier) and model.spec is not None:
        size = model.spec["size"]
        shape, like = (model.spec["channels"], size, size), next(model.parameters())
        count = _PROBE_IMAGES
    else:
        return None
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)).to(like)


# Folding ------------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Leaves `Normalize` whole: its check of the images is a decision that a trace cannot take."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def _folded(plain: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """`plain` with its batch norms folded, and how many; `plain` itself and 0 where that would change what it does."""
    few = images[:8]
    try:
        module = deep_copy(plain)
        pairs = list(_pairs(module))
        for layer, norm in pairs:
            _fold(module, layer, norm)
        if pairs and _agree(plain, module, few):
            return module, len(pairs)
    except Exception:  # a model may do anything inside; what cannot be folded is attacked as it is
        pass
    return plain, 0


def _pairs(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of `(layer, batch norm that is all its output goes to)`.

    A module that cannot be traced, for it decides by its input, is searched child by child.
    """
    try:
        graph = _Tracer().trace(module)
    except Exception:
        for name, child in module.named_children():
            yield from _pairs(child, f"{prefix}{name}.")
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    for node in calls:
        norm = module.get_submodule(node.target)
        if not _can_go(norm) or times[node.target] > 1:
            continue
        before = node.args[0]
        while _commutes(module, before, norm):
            before = before.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        layer = module.get_submodule(str(before.target))
        if _can_take(layer) and times[before.target] == 1 and len(before.users) == 1:
            yield f"{prefix}{before.target}", f"{prefix}{node.target}"


def _can_go(norm: nn.Module) -> bool:
    return type(norm) in _BATCH_NORMS and norm.running_var is not None and not _hooked(norm)


def _can_take(layer: nn.Module) -> bool:
    return type(layer) in (nn.Conv2d, nn.Linear) and not _hooked(layer)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _commutes(module: nn.Module, node: object, norm: nn.Module) -> bool:
    """A max pooling that only the norm reads, where the norm's scale is nowhere negative: the order is then free."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return False
    pool = module.get_submodule(str(node.target))
    weight = getattr(norm, "weight", None)
    return type(pool) is nn.MaxPool2d and not _hooked(pool) and (weight is None or bool((weight >= 0).all()))


def _fold(module: nn.Module, layer: str, norm: str) -> None:
    old, bn = module.get_submodule(layer), module.get_submodule(norm)
    assert isinstance(bn, nn.BatchNorm1d | nn.BatchNorm2d)
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = fusion.fuse_conv_bn_eval(old, bn)
    else:
        assert isinstance(old, nn.Linear)
        new = fusion.fuse_linear_bn_eval(old, bn)
    _put(module, layer, new.requires_grad_(False))
    _put(module, norm, nn.Identity())


def _put(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)


def _agree(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    a, grad_a = _pass(one, images)
    b, grad_b = _pass(other, images)
    same_logits = (a - b).abs().max() <= 1e-4 * a.abs().max()
    # The median image: rounding alone puts a few activations on the other side of a ReLU's kink, and one of them may
    # turn the gradient of its image by a tenth. A wrong fold is wrong for all of them.
    off = (grad_a - grad_b).flatten(1).norm(dim=1) / grad_a.flatten(1).norm(dim=1).clamp_min(1e-30)
    return bool(same_logits and off.median() <= 1e-2)


def _pass(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient with respect to the images of a sum in which no two classes weigh the same."""
    images = images.clone().requires_grad_(True)
    with torch.enable_grad():
        logits = ask(model, images)
        weights = torch.linspace(-1, 1, logits.shape[1], device=logits.device)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), images)
    return logits.detach(), gradient


# Memory format ------------------------------------------------------------------------------------------------------


def _laid_out(module: nn.Module, images: Tensor, channels_last: bool | None) -> tuple[nn.Module, bool]:
    """`module` in the memory format asked for, or the faster one where none is; and whether that is channels last."""
    if channels_last is False:
        return module, False
    try:
        other = deep_copy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if (channels_last or _faster(other, module, images)) and _agree(module, other, images[:8]):
            return other, True
    except Exception:  # a view that needs its memory in the plain order, or no gradient to time
        pass
    return module, False


def _faster(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Whether a pass of `one` takes at most 0.95 of the other's time: near a tie nothing is gained by changing."""
    best = [float("inf"), float("inf")]
    for _ in range(4):  # by turns, so that a busy moment meets both; the first turn is the warm-up
        for i, model in enumerate((one, other)):
            best[i] = min(best[i], _seconds(model, images))
    return best[0] <= 0.95 * best[1]


def _seconds(model: nn.Module, images: Tensor) -> float:
    if not images.is_cuda:
        start = time.thread_time()  # the clock of the wall would time the neighbors on a busy machine
        _pass(model, images)
        return time.thread_time() - start
    torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    _pass(model, images)
    torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
