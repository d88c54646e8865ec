"""What a classifier is here: a module from [0, 1] images to logits that normalizes its own input."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from unperturb import zoo
from unperturb.devices import SizeLimit, check_options
from unperturb.hub import Pretrained
from unperturb.modules import ask, evaluating
from unperturb.registry import Registry
from unperturb.runs import RunError, fit_weights, load_tensors, read_json, save_tensors, shortened, write_json
from unperturb.validation import check_form

# A builder is `(*, channels, size, classes, **options) -> nn.Module`: normalized images (N, C, size, size) -> logits.
classifiers: Registry[nn.Module] = Registry("classifier")


class Normalize(nn.Module):
    """`(images - mean) / std`, channel by channel.

    mean, std: of images in [0, 1]. Raises `ValueError` for those of 0 to 255, and where images have other channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        m, s = torch.tensor(list(mean), dtype=torch.float32), torch.tensor(list(std), dtype=torch.float32)
        if m.ndim != 1 or m.shape != s.shape or not len(m):
            raise ValueError(f"mean and std need one number per channel each; got {list(mean)} and {list(std)}")
        if not (m.isfinite().all() and s.isfinite().all() and (s > 0).all()):
            raise ValueError(f"mean must be finite and std above zero; got {list(mean)} and {list(std)}")
        if (m < 0).any() or (m > 1).any() or (s > 1).any():
            raise ValueError(
                f"mean and std are those of images in [0, 1]; {list(mean)} and {list(std)} are not: divide those of "
                "pixels of 0 to 255 by 255; for pixels of -1 to 1 both are 0.5"
            )
        self.register_buffer("mean", m.view(1, -1, 1, 1))
        self.register_buffer("std", s.view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # One grey channel would broadcast against three means without a word.
        if images.ndim != 4 or images.shape[1] != self.mean.shape[1]:
            wanted = f"(N, {self.mean.shape[1]}, H, W)"
            raise ValueError(f"this classifier takes images {wanted}; got {tuple(images.shape)}")
        check_form(images)
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Classifier(nn.Module, Pretrained):
    """A network behind its normalization: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.

    spec: what rebuilds it (name, options, channels, size, classes, mean, std), JSON-able; None for a model that was
    wrapped, not built here: such a one gets its input in a dtype that it takes, and may write over it. A frozen one
    stays in eval mode whatever it is part of. differentiable: False where the net is known to give no gradient. called:
    its family, or the class, function or file that was wrapped: what messages and run folders call it.
    """

    kind = "Classifier"
    _written = ("classifier.json", "model.safetensors")

    def __init__(self, normalize: nn.Module, net: nn.Module, spec: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.normalize = normalize
        self.net = net
        self.spec = None if spec is None else dict(spec)
        self.frozen = False
        self.differentiable = True
        self.called: str = type(net).__qualname__ if spec is None else spec["name"]

    @property
    def takes(self) -> tuple[int | None, int | None, int | None]:
        """Channels, height and width of the images that it is made for; None where they may be any, or nobody knows."""
        if self.spec is not None:
            return self.spec["channels"], self.spec["size"], self.spec["size"]
        channels, height, width = getattr(self.net, "takes", (None, None, None))
        mean = getattr(self.normalize, "mean", None)
        return channels if mean is None else mean.shape[1], height, width

    def forward(self, images: Tensor) -> Tensor:
        if self.spec is None:
            return ask(self.net, self.normalize(images))
        if images.shape[2:] != (self.spec["size"], self.spec["size"]):
            wanted = f"(N, {', '.join(map(str, self.takes))})"
            raise ValueError(f"{self.spec['name']} takes images {wanted}; got {tuple(images.shape)}")
        return self.net(self.normalize(images))

    def freeze(self) -> Classifier:
        """Eval mode for good, and no gradient for any parameter; returns itself."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode and not self.frozen)
        return self

    def _save(self, folder: Path) -> None:
        save_classifier(folder, self)


def create_classifier(
    name: str, *, channels: int, size: int, classes: int, mean: Sequence[float], std: Sequence[float], **options: Any
) -> Classifier:
    """A fresh classifier of the family `name`, for images `(N, channels, size, size)` in [0, 1].

    mean, std: of the training images, one number per channel. Raises `UnknownNameError` for a name or an option that is
    not there, `ValueError` for a shape that the family cannot take.
    """
    if channels < 1 or size < 1 or classes < 2:
        raise ValueError(f"a classifier needs channels, a size and two classes; got {channels=}, {size=}, {classes=}")
    normalize = Normalize(mean, std)
    if normalize.mean.shape[1] != channels:
        raise ValueError(f"mean and std need one number per channel: {channels}; got {list(mean)} and {list(std)}")
    check_options({"channels": channels, "size": size, "classes": classes, **options})
    with SizeLimit():
        net = classifiers.create(name, channels=channels, size=size, classes=classes, **options)
    spec = {"name": name, "options": options, "channels": channels, "size": size, "classes": classes}
    spec |= {"mean": [float(m) for m in mean], "std": [float(s) for s in std]}
    try:
        spec = json.loads(json.dumps(spec))
    except TypeError as error:
        raise ValueError(f"the options of classifier {name!r} must be plain numbers, texts or lists: {error}") from None
    return Classifier(normalize, net, spec)


def save_classifier(folder: Path, classifier: Classifier, extra: Mapping[str, Any] | None = None) -> None:
    """`model.safetensors` and `classifier.json` (spec and `extra`) in `folder`: all that `load_classifier` needs."""
    if classifier.spec is None:
        raise RunError(
            "only a classifier of create_classifier rebuilds from a folder; save a wrapped model where you made it"
        )
    digest = save_tensors(folder / "model.safetensors", classifier.state_dict())
    write_json(folder / "classifier.json", {**classifier.spec, "extra": dict(extra or {}), "sha256": digest})


class ClassifierFile(BaseModel):
    """What is in `classifier.json`. sha256: of the weights beside it, by `unperturb.runs.digest_of`."""

    name: str
    options: dict[str, Any]
    channels: int
    size: int
    classes: int
    mean: list[float]
    std: list[float]
    extra: dict[str, Any] = Field(default_factory=dict)
    sha256: str | None = None


def load_classifier(folder: str | Path) -> Classifier:
    """The classifier of a run folder, or `zoo:NAME`, in eval mode, on the CPU.

    Raises `RunError` where a file is missing or damaged, the folder holds a purifier, or the weights are not those of
    the classifier described.
    """
    source, folder = folder, Path(zoo.find(folder))
    path = folder / "classifier.json"
    if not path.exists():
        if said := zoo.of_another_kind(source, "classifier"):
            raise RunError(said)
        how = zoo.how_to_make(folder, classifiers, "train-classifier")
        raise RunError(f"{path} is not there: {folder} holds no finished run; {how}")
    described = read_json(path, ClassifierFile)
    tensors = load_tensors(folder / "model.safetensors", finite=False)
    try:
        # A network much larger than its weights is not theirs: no need to build it to find out.
        with SizeLimit(1_000_000 + 2 * sum(t.numel() for t in tensors.values())):
            spec = described.model_dump(exclude={"options", "extra", "sha256"})
            classifier = create_classifier(**spec, **described.options)
    except Exception as error:  # whatever its own builder makes of wrong options
        said = shortened(str(error) or type(error).__name__, 400)
        raise RunError(f"{path} does not describe a classifier that this version can build: {said}") from error
    fit_weights(classifier, tensors, folder, path.name, described.sha256)
    return classifier.eval()


def macs(module: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image of `shape` (C, H, W), forward only."""
    from torch.utils.flop_counter import FlopCounterMode

    at = next(module.parameters(), torch.zeros(()))
    counter = FlopCounterMode(display=False)
    with evaluating(module.modules()), torch.no_grad(), counter:
        module(torch.zeros(1, *shape, device=at.device))
    return counter.get_total_flops() // 2
