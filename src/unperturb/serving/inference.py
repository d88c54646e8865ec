"""What is served: a protected model by name, the images that it takes, and what it says of a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unperturb import zoo
from unperturb.classifiers import Classifier, load_classifier, wrap
from unperturb.data.sets import shape_words
from unperturb.defenses import Protected, load_defense
from unperturb.metrics import moved
from unperturb.modules import ask, logits_of
from unperturb.runs import RunError
from unperturb.unsaved import import_object, is_import_path

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Answer:
    """What a protected model says of one image.

    before, after: class probabilities `(K,)` by the classifier alone, and through the purifier. restored: the purified
    image, uint8 `(C, H, W)`. scores: of the purifier's detectors, `(detectors,)`. All on the CPU.
    """

    before: Tensor
    after: Tensor
    restored: Tensor
    scores: Tensor

    @property
    def finite(self) -> bool:
        """Whether every number is one."""
        return all(bool(part.isfinite().all()) for part in (self.before, self.after, self.scores))

    @property
    def suspicion(self) -> float:
        """Total variation distance of `before` and `after`, in [0, 1]: the probability that the purifier moved from
        some classes to others."""
        return float(moved(self.before[None], self.after[None]))


@torch.no_grad()
def answer_batch(model: Protected, images: Sequence[Tensor], device: torch.device) -> list[Answer]:
    """What `model`, in eval mode on `device`, says of images of uint8 `(C, H, W)`.

    Where the purifier changes no pixel of the whole batch, the classifier is asked once only.
    """
    x = torch.stack(list(images)).to(device).float() / 255
    before = logits_of(model.classifier, x)
    purified, scores = ask(lambda z: model.defense.purify_and_score(z, lambda y: logits_of(model.classifier, y)), x)
    after = before if torch.equal(purified, x) else logits_of(model.classifier, purified)
    restored = (255 * purified.float()).round().nan_to_num().to(torch.uint8)
    parts = (before.softmax(1), after.softmax(1), restored, scores.float())
    return [Answer(*each) for each in zip(*(part.cpu() for part in parts))]


def image_shape(model: Protected, size: int | None = None, channels: int | None = None) -> Shape:
    """(C, H, W) of the images that `model` takes. size, channels: theirs, where it does not know them itself; 3
    channels where nobody does.

    Raises `ValueError` where nobody says the size, the model says another, or there are neither 1 nor 3 channels.
    """
    takes = getattr(model.classifier, "takes", (None, None, None))
    own = (model.defense.channels, model.defense.size, model.defense.size)
    known = tuple(a if a is not None else b for a, b in zip(takes, own))
    given = (channels, size, size)
    if any(a is not None and b not in (None, a) for a, b in zip(known, given)):
        raise ValueError(f"the model takes images of {shape_words(known)}: leave out --size and --channels")
    c, h, w = (a if a is not None else b for a, b in zip(known, given))
    if h is None or w is None:
        raise ValueError("the model takes images of any size: say which pictures are resized to, such as --size 32")
    c = 3 if c is None else c
    if c not in (1, 3):
        raise ValueError(f"the model takes images of {c} channels, and pictures have 1 (grey) or 3")
    return c, h, w


def check_model(model: Protected, shape: Shape, batch: int, device: torch.device) -> int:
    """The number of classes that `model` tells apart, after it has seen a batch of black images.

    Raises `ValueError` where it fails on them.
    """
    try:
        answers = answer_batch(model, [torch.zeros(shape, dtype=torch.uint8)] * batch, device)
    except Exception as error:  # a model may raise anything
        raise ValueError(
            f"the model fails on images of {shape_words(shape)}: {type(error).__name__}: {error}; if it takes others, "
            "choose --size and --channels"
        ) from error
    return len(answers[0].before)


def load_protected(
    model: str, classifier: str | None = None, *, size: int | None = None, channels: int | None = None
) -> Protected:
    """The protected model that a command names, in eval mode, on the CPU.

    model: with `classifier`, the purifier: a run folder, `zoo:NAME`, a name such as "median", several of these joined
    by `+`, or `module:object`. Without it, both: a folder that `Protected.save_pretrained` wrote, `owner/name` on the
    hub, or `module:object`. classifier: a run folder, `zoo:NAME`, an ONNX file, or `module:object`. size, channels: a
    classifier of one's own is tried on two such images.

    Raises `RunError`, `ValueError` or `TypeError`, which say what is wrong.
    """
    own = import_object(model) if is_import_path(model) else None
    if classifier is not None:
        return Protected(_classifier(classifier, size, channels), load_defense(model) if own is None else own).eval()
    if own is None:
        if "+" in model or zoo.of_another_kind(model, "classifier"):
            raise RunError(f"{model} is a purifier: name the classifier behind it with --classifier")
        if said := zoo.of_another_kind(model, "defense"):
            raise RunError(said)
        try:
            return Protected.from_pretrained(model)
        except RunError as error:
            raise RunError(f"{error}. A purifier alone needs --classifier") from error
    if not isinstance(own, Protected):
        raise TypeError(f"{model} is a {type(own).__name__}, not a Protected; a purifier alone needs --classifier")
    return own.eval()


def _classifier(entry: str, size: int | None, channels: int | None) -> torch.nn.Module:
    if is_import_path(entry):
        own = import_object(entry)
        return own.eval() if isinstance(own, Classifier) else wrap(own, size=size, channels=channels)
    return wrap(entry) if Path(entry).suffix.lower() == ".onnx" else load_classifier(entry)
