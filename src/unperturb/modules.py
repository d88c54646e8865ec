"""A model that may be anything: the modules behind it, held still; and how it is asked."""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_MOST = 10_000  # things looked at behind one callable: a closure may hold a whole program
_BARREN = {type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device}  # hold no module
_MODULES_OWN = frozenset(vars(nn.Module()))  # its tables of parts; what is not among them its author has put there


# What is behind a callable ------------------------------------------------------------------------------------------


def modules_of(model: object) -> list[nn.Module]:
    """Every module that a call of `model` may reach, each once.

    model: a module; or a function, lambda, partial, bound method or object around some: arguments, closures, the
    globals that a function names and the attributes of objects are looked through, the nearest first.
    """
    found: dict[int, nn.Module] = {}
    seen: dict[int, object] = {}  # holds what it names, so that no id is given twice
    waiting: deque[object] = deque([model])
    while waiting and len(seen) < _MOST:
        thing = waiting.popleft()
        if type(thing) in _BARREN or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            for module in thing.modules():
                if id(module) not in found:
                    found[id(module)] = module
                    own = vars(module).items()
                    waiting.extend([v for k, v in own if type(v) not in _BARREN and k not in _MODULES_OWN])
        elif isinstance(thing, functools.partial):
            waiting.extend([thing.func, *thing.args, *thing.keywords.values()])
        elif isinstance(thing, MethodType):
            waiting.extend([thing.__self__, thing.__func__])
        elif isinstance(thing, FunctionType):
            waiting.extend(_behind_function(thing))
        elif isinstance(thing, dict):
            waiting.extend(thing.values())
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting.extend(thing)
        elif not isinstance(thing, Tensor | ModuleType | type):
            waiting.extend(getattr(thing, "__dict__", {}).values())
    return list(found.values())


def _behind_function(function: FunctionType) -> Iterator[object]:
    if function.__module__ and function.__module__.partition(".")[0] == "torch":
        return  # the library's own functions hold no model of a user's, and name half the library
    yield from vars(function).values()  # what a decorator wrapped
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield function.__globals__[name]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


# Held still ---------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside: each of `modules` is in eval mode. After: in its own as before."""
    changed = [m for m in modules if getattr(m, "training", False)]  # a frozen TorchScript has no mode
    for m in changed:
        m.training = False
    try:
        yield
    finally:
        for m in changed:
            m.training = True


@contextmanager
def frozen(model: object) -> Iterator[list[nn.Module]]:
    """Inside: all behind `model` is in eval mode, and no parameter asks for a gradient. After: every flag is as it was.
    Yields the modules."""
    modules = modules_of(model)
    with evaluating(modules):
        every = [p for m in modules for p in m.parameters(recurse=False)]
        learning = [p for p in every if p.requires_grad and not p.is_inference()]  # whose flag cannot be set again
        for p in learning:
            p.requires_grad_(False)
        try:
            yield modules
        finally:
            for p in learning:
                p.requires_grad_(True)


@torch.inference_mode(False)
@torch.no_grad()  # TorchScript copies its weights by an operation, whose graph they would keep
def deep_copy(module: nn.Module) -> nn.Module:
    """A copy that shares nothing with `module`; raises `ValueError` where a part of it cannot be copied."""
    # `copy` refuses tensors that have a graph, such as the weight that weight_norm made in the last forward pass.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for m in module.modules()
        for value in vars(m).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # locks, files, generators, streams: each has an error of its own
        raise ValueError(
            f"{type(module).__name__} cannot be copied ({error}), and is to be kept as it is now: take out of it what "
            "copy.deepcopy refuses"
        ) from error


# Asked --------------------------------------------------------------------------------------------------------------


def ask(model: Callable[[Tensor], Any], images: Tensor) -> Any:
    """What `model` says of `images`: it may write over the tensor that it gets, and gets it in a dtype that it takes.

    That is the images' own, or, where the model fails on it, the dtype of its weights.
    """
    try:
        return model(images.clone())
    except RuntimeError:
        modules = modules_of(model)
        tensors: list[Tensor] = [t for m in modules for t in m.parameters(recurse=False)]
        tensors += [t for m in modules for t in m.buffers(recurse=False)]
        others = [t.dtype for t in tensors if t.is_floating_point() and t.dtype != images.dtype]
        if not others:
            raise
        return model(images.to(others[0]))


def logits_of(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """The float32 logits `(N, K)` that `model` gives `images`, at least two each; asked as `ask` does.

    Raises `ValueError` where it returns anything else. Whether they are finite is not looked at.
    """
    return check_logits(ask(model, images), len(images))


def classes_of(logits: Tensor) -> Tensor:
    """The predicted classes `(N,)` of logits `(N, K)`; -1, which is no label, where they are not all finite."""
    return logits.argmax(1).masked_fill(logits.isfinite().all(1).logical_not(), -1)


def check_logits(answer: object, count: int) -> Tensor:
    """What a model answered to `count` images, as float32 logits; raises `ValueError` for all else."""
    shape = tuple(answer.shape) if isinstance(answer, Tensor) else ()
    if not isinstance(answer, Tensor):
        got = f"{type(answer).__name__}: pass a module or function that gives the one tensor, such as output.logits"
    elif shape in ((count,), (count, 1)):
        got = f"{shape}, one logit per image: make two of it with unperturb.wrap(model, binary=True)"
    elif len(shape) != 2 or shape[0] != count:
        squeezed = count == 1 and len(shape) == 1
        got = f"{shape}" + (": a single image is a batch too, and not to be squeezed" if squeezed else "")
    elif not answer.is_floating_point():
        got = f"{answer.dtype}: classes, perhaps, where their logits are needed"
    else:
        return answer.float()
    raise ValueError(f"the model must return logits of shape ({count}, classes), it returned {got}")
