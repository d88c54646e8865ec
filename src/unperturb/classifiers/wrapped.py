"""Models of a user's own as classifiers: modules, functions and ONNX files, whatever holds their logits."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unperturb.classifiers.base import Classifier, Normalize
from unperturb.classifiers.onnx_file import OnnxModel
from unperturb.modules import check_logits, deep_copy, frozen, modules_of

LogitsHook = str | int | Callable[[Any], Any]
_HOW = "wrap(model, logits=...): a key, an index, or a function of the answer"


class AnswerError(ValueError):
    """A model's answer in which no logits are found; the message says what it is, and how to tell where they are."""


class Function(nn.Module):
    """A callable as a module. One that is no module is asked as it is: neither copied nor moved to another device.

    During each call the modules behind it are in eval mode and their parameters ask for no gradient, as far as they can
    be found (`unperturb.modules.modules_of`).
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> Function:
        shared = not isinstance(self.function, nn.Module)
        return Function(self.function if shared else copy.deepcopy(self.function, memo)).train(self.training)

    def forward(self, images: Tensor) -> Any:
        with frozen(self.function):
            return self.function(images)


class Answers(nn.Module):
    """The logits in whatever `net` answers, found by `logits`; if `binary`, two made of one (see `wrap`)."""

    def __init__(self, net: nn.Module, logits: LogitsHook | None, binary: bool) -> None:
        super().__init__()
        self.net, self.logits, self.binary = net, logits, binary

    @property
    def takes(self) -> tuple[int | None, int | None, int | None]:
        """Channels, height and width of the images that it is made for, as far as they are known."""
        channels, height, width = self.net.shape if isinstance(self.net, OnnxModel) else (None, None, None)
        return channels, height, width

    def forward(self, images: Tensor) -> Tensor:
        logits = _logits_in(self.net(images), self.logits)
        return _two_logits(logits, len(images)) if self.binary else logits


@torch.inference_mode(False)
def wrap(
    model: Callable[[Tensor], Any] | str | os.PathLike[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    channels: int | None = None,
    classes: int | None = None,
    *,
    logits: LogitsHook | None = None,
    binary: bool = False,
) -> Classifier:
    """Any model of yours as a classifier, frozen and in eval mode, behind `Normalize(mean, std)` if these are given.

    model: a module, which is copied; any other callable, which is asked as it is; or the path of an `.onnx` file, whose
    outputs alone are seen. mean, std: in [0, 1] pixel units. size: side of the images it takes, in pixels; with it, two
    random images in [0, 1] are shown to the model at once. channels: theirs, if there is no mean to count (default 3).
    classes: K, where it should be checked.

    logits: where the logits `(N, K)` are in what the model answers, if that is not one tensor: a key or name
    (`output["logits"]`, `output.logits`), an index (`output[0]`), or a function of the answer. Without it an answer
    with a `.logits` and no second field of that kind, as Hugging Face models give, is understood.
    binary: the model gives one logit z per image, `(N,)` or `(N, 1)`, of which two are made, (0, z): class 1 is what it
    calls positive (z > 0), class 0 the other. Softmax makes of them what sigmoid makes of z.

    A model that gives no gradient is attacked by its outputs only: `differentiable` of what is returned is False for an
    ONNX file, and where the two images of `size` have shown it.

    Raises `TypeError` for what is no model, `ValueError` for a module that cannot be copied, and where the model fails
    on the two images or gives anything but finite logits `(2, K)`; for a file see `OnnxModel`. Warns where the logits
    look like probabilities: attacks and losses here apply the softmax themselves.
    """
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together; give both, or neither if the model normalizes its own input")
    if mean is not None and channels is not None and len(mean) != channels:
        raise ValueError(f"mean and std need one number per channel: {channels}; got {list(mean)}")
    if isinstance(logits, bool) or not (logits is None or isinstance(logits, str | int) or callable(logits)):
        raise TypeError(f"logits={logits!r}; expected {_HOW}")
    normalize = Normalize(mean, std) if mean is not None and std is not None else nn.Identity()
    net = _module_of(model)
    classifier = Classifier(normalize, Answers(net, logits, binary)).freeze()
    classifier.differentiable = getattr(net, "differentiable", True)
    classifier.called = _name_of(model)
    weights = (p for m in modules_of(net) for p in m.parameters(recurse=False))
    at = next((p for p in weights if p.is_floating_point()), torch.zeros(()))
    normalize.to(at.device)
    if size is not None:
        shape = (2, len(mean) if mean is not None else channels or 3, size, size)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(at.device)
        _check_answers(classifier, images, classes)
        classifier.differentiable = _gives_gradient(classifier, images)
    return classifier


def _name_of(model: object) -> str:
    """What its user calls it."""
    if isinstance(model, Classifier):
        return model.called
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    return getattr(model, "__qualname__", type(model).__qualname__)


def _module_of(model: object) -> nn.Module:
    """A copy of a module; a function as a module; the network of a file."""
    if isinstance(model, nn.Module):
        own = deep_copy(model)
        hidden = set(modules_of(own)) - set(own.modules())  # in a plain list, or behind a function that it calls
        return Function(own) if hidden else own
    if isinstance(model, str | os.PathLike):
        if Path(model).suffix.lower() == ".onnx":
            return OnnxModel(model)
        raise TypeError(
            f"wrap takes a model or the path of an .onnx file, not {os.fspath(model)!r}; load_classifier reads a run "
            "folder"
        )
    if isinstance(model, type):
        raise TypeError(f"wrap takes a model, not the class {model.__name__}: make one first, {model.__name__}(...)")
    if not callable(model):
        raise TypeError(
            f"wrap takes a torch.nn.Module, a function from images to logits or the path of an .onnx file, not "
            f"{type(model).__name__}"
        )
    return Function(model)


# Answers ------------------------------------------------------------------------------------------------------------


def _logits_in(answer: Any, where: LogitsHook | None) -> Tensor:
    """The tensor of logits in a model's answer; raises `AnswerError` where none is found."""
    if where is None:
        found = answer if isinstance(answer, Tensor) else _field_called_logits(answer)
    elif callable(where):
        found = where(answer)
    elif isinstance(answer, Tensor):  # its [0] would be the first image's
        raise AnswerError(
            f"logits={where!r} is for a part of what the model answers, and it answers with the one tensor "
            f"{tuple(answer.shape)}: leave logits out"
        )
    else:
        try:
            by_name = isinstance(where, str) and not isinstance(answer, Mapping)
            found = getattr(answer, str(where)) if by_name else answer[where]
        except (AttributeError, LookupError, TypeError):
            raise AnswerError(f"logits={where!r} is not in what the model answers, {_described(answer)}") from None
    if isinstance(found, Tensor):
        return found
    if where is None:
        raise AnswerError(f"the model answers with {_described(answer)}; say where its logits are by {_HOW}")
    raise AnswerError(f"logits={where!r} finds {_described(found)}, where the tensor of logits was expected")


def _field_called_logits(answer: Any) -> Any:
    """`answer.logits`, or None where it has none or another field may be what is meant (`cls_logits`)."""
    others = [name for name, value in _fields(answer).items() if "logits" in name and value is not None]
    return getattr(answer, "logits", None) if others == ["logits"] else None


def _fields(answer: Any) -> dict[str, Any]:
    if isinstance(answer, Mapping):
        return {str(name): value for name, value in answer.items()}
    if hasattr(answer, "_asdict"):
        return dict(answer._asdict())
    return dict(getattr(answer, "__dict__", {}))


def _described(answer: Any) -> str:
    """What an answer is, in few words: "a dict of loss (), logits (2, 10)"."""
    fields = _fields(answer)
    if not fields and isinstance(answer, tuple | list):
        fields = {str(i): value for i, value in enumerate(answer)}
    shown = [f"{k} {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in fields.items()]
    return type(answer).__name__ + (f" of {', '.join(shown[:8])}" if shown else "")


def _two_logits(z: Tensor, count: int) -> Tensor:
    if tuple(z.shape) not in ((count,), (count, 1)):
        raise AnswerError(
            f"binary=True is for a model that gives one logit per image; this one gave {tuple(z.shape)} for {count}"
        )
    z = z.reshape(-1, 1)
    return torch.cat([torch.zeros_like(z), z], 1)


# A trial ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _check_answers(classifier: nn.Module, images: Tensor, classes: int | None) -> None:
    shape = tuple(images.shape)
    try:
        answers = classifier(images)
    except AnswerError:
        raise
    except Exception as error:
        raise ValueError(
            f"the model failed on two float32 images {shape} in [0, 1]; are size and channels its own? It said: "
            f"{type(error).__name__}: {error}"
        ) from error
    logits = check_logits(answers, len(images))
    if classes is not None and logits.shape[1] != classes:
        raise ValueError(f"the model gives {logits.shape[1]} logits an image, where {classes} classes were expected")
    if not logits.isfinite().all():
        raise ValueError(f"the model gives NaN or infinite logits for random images {shape} in [0, 1]")
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(2, device=logits.device), atol=1e-3):
        warnings.warn(
            "the model's outputs are probabilities, not logits (they are >= 0 and sum to 1): remove its softmax, "
            "or attacks will find no gradient and look weaker than they are",
            stacklevel=5,
        )


@torch.enable_grad()
def _gives_gradient(classifier: nn.Module, images: Tensor) -> bool:
    try:
        answer: Tensor = classifier(images.clone().requires_grad_())
    except RuntimeError:  # NumPy takes no tensor that asks for a gradient
        return False
    return answer.requires_grad
