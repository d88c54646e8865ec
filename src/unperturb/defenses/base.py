"""The contract of every defense, and the protected model that it makes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any, final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from unperturb import runs, zoo
from unperturb.devices import SizeLimit, check_options
from unperturb.hub import Pretrained
from unperturb.metrics import moved
from unperturb.modules import ask, evaluating
from unperturb.registry import Registry
from unperturb.validation import check_form, check_images

defenses: Registry[Defense] = Registry("defense")


@dataclass
class Batch:
    """What a defense learns from in one step.

    x_real, x_adv: `(N, C, H, W)` clean and adversarial images in [0, 1], pair by pair (a defense that does not learn
    from pairs gets the clean ones twice). y: `(N,)` true labels. logits_fn: the frozen classifier, images -> logits,
    through which gradients reach the images. step: the loop's.
    """

    x_real: Tensor
    x_adv: Tensor
    y: Tensor
    logits_fn: Callable[[Tensor], Tensor]
    step: int = 0


class Defense(nn.Module, Pretrained):
    """A purifier, possibly with detectors. A new one writes `purify`; called, it checks, purifies and clamps.

    differentiable: gradients flow through `purify`. random: two calls may differ. Both say what an attacker needs.
    learns_from_pairs: its losses look at adversarial images; where they do not, none are made. size: the only side of
    images that it can purify, channels: their only number of channels (None: any). held_out: at most so many validation
    images are looked at while it is trained and for its thresholds, because purifying is dear (None: as many as the job
    takes for any other).
    """

    kind = "Defense"
    _written = ("defense.json", "model.safetensors")
    differentiable = True
    random = False
    learns_from_pairs = True
    size: int | None = None
    channels: int | None = None
    held_out: int | None = None
    spec: dict[str, Any] | None = None
    outcome: Any = None  # what the training cost (`unperturb.runs.Outcome`), where that is known
    folder: Path | None = None  # the run folder that it was loaded from or trained into, if any

    def purify(self, images: Tensor) -> Tensor:
        """Images `(N, C, H, W)` in [0, 1], to write over if need be -> purified images of the same shape."""
        raise TypeError(f"{type(self).__name__} does not say how it purifies")

    @final  # type: ignore[misc]  # torch declares `forward` as an attribute
    def forward(self, images: Tensor) -> Tensor:
        """Images `(N, C, H, W)` in [0, 1] -> purified images of the same shape, in [0, 1]: `purify` on a copy, cut to
        that range.

        Raises `TypeError` or `ValueError` for images that are not float `(N, C, H, W)` or not of its channels.
        """
        self._check(images)
        return self.purify(images.clone()).clamp(0, 1)  # a pixel in [0, 1] keeps its gradient

    @final
    def purify_and_score(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(what `forward` gives, `scores(images, logits_fn)`), with what the two share done once."""
        self._check(images)
        purified, scores = self._purify_and_score(images.clone(), logits_fn)
        return purified.clamp(0, 1), scores

    def _check(self, images: Tensor) -> None:
        check_form(images)
        if self.channels not in (None, images.shape[1]):
            raise ValueError(
                f"this {type(self).__name__} purifies images of {self.channels} channel(s), and these have "
                f"{images.shape[1]}: pass images of {self.channels}, or train one for {images.shape[1]}"
            )

    def surrogate_backward(self, images: Tensor) -> Tensor:
        """What an attacker differentiates in place of `purify` where that has no gradient to give; by default the
        identity. Images in, images of the same shape out (Athalye et al. 2018, section 4.1)."""
        return images

    def stages(self) -> list[Defense]:
        """The purifiers that this one is a chain of, first to last; itself where it is no chain."""
        return [self]

    def scores(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """How suspicious each image is, `(N, detectors)`; a defense without detectors gives `(N, 0)`."""
        return images.new_zeros(len(images), 0)

    def _purify_and_score(self, images: Tensor, logits_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(`purify(images)`, `scores(images, logits_fn)`); a defense whose two share work does it once here."""
        return self.purify(images.clone()), self.scores(images, logits_fn)

    def add_detectors(self, count: int, drop_rate: float) -> None:
        """Keep a threshold for each of `count` detectors, to be set by `calibrate`; until then nothing is rejected."""
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), not {drop_rate}")
        self.drop_rate = drop_rate
        self.register_buffer("limits", torch.full((count,), float("inf")))

    @property
    def thresholds(self) -> Tensor:
        """`(detectors,)`: an image whose score is above one of these is rejected."""
        limits = self._buffers.get("limits")
        return torch.zeros(0) if limits is None else limits

    @torch.no_grad()
    def calibrate(self, scores: Tensor) -> None:
        """Set the thresholds from `scores` `(M, detectors)` of clean validation images; called once, after training.

        Each detector rejects the `drop_rate` of these images that it finds most suspicious, and no more. Source: MagNet
        (Meng and Chen 2017), `get_thrs` in the authors' code.
        """
        if scores.shape[1]:
            allowed = int(self.drop_rate * len(scores) + 1e-9)
            self.thresholds.copy_(scores.sort(0, descending=True).values[allowed])

    def networks(self) -> dict[str, nn.Module]:
        """The networks to be trained, by name; empty for a defense that is not trained."""
        return {}

    def losses(self, batch: Batch, networks: dict[str, nn.Module]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield `(network, weighted loss terms)`, once per update that the network is to make.

        The loop sums the terms, steps that network's optimizer, and asks on: what is yielded later sees the updated
        weights. `networks` are those of `networks()`, as the loop wrapped them.
        """
        raise TypeError(f"{type(self).__name__} is not trained")

    def _save(self, folder: Path) -> None:
        save_defense(folder, self, {} if self.outcome is None else {"outcome": asdict(self.outcome)})


class Protected(nn.Module, Pretrained):
    """A classifier behind a defense: one module from images to logits.

    classifier: any module from images `(N, C, H, W)` in [0, 1] to logits `(N, K)`. Neither it nor the defense is
    changed: both work in eval mode, whatever mode they or this module are in, and are then back in their own.
    reject_above: an image is rejected if its `suspicion` is higher, in [0, 1]; the defense then becomes the detector
    `feature_squeezing` around it. Not for one that has detectors of its own.

    Images that are not float `(N, C, H, W)`, or of channels that the defense does not purify, are refused. So are those
    that are not in [0, 1] or NaN: at the first call, and at each one without gradients (`torch.no_grad`).
    """

    kind = "Protected"
    _written = ("classifier", "defense")

    def __init__(self, classifier: nn.Module, defense: Defense, reject_above: float | None = None) -> None:
        super().__init__()
        if isinstance(classifier, Defense) and not isinstance(defense, Defense):
            raise TypeError("the classifier comes first: Protected(classifier, defense)")
        if not isinstance(classifier, nn.Module) or isinstance(classifier, Defense):
            raise TypeError(
                f"Protected takes a torch.nn.Module from images to logits as classifier, not {_kind(classifier)}"
            )
        if not isinstance(defense, Defense):
            raise TypeError(
                f"Protected takes a unperturb.Defense (load_defense, create_defense, or a class of yours that writes "
                f"purify) as defense, not {_kind(defense)}"
            )
        self.classifier = classifier
        self.defense = defense if reject_above is None else _watched(defense, reject_above)
        self.met_images = False

    def train(self, mode: bool = True) -> Protected:
        """Nothing but the flag of this module: what is protected is not trained from here. `eval` reaches the parts."""
        if not mode:
            return super().train(False)
        self.training = True
        return self

    def forward(self, images: Tensor) -> Tensor:
        # Where a gradient is asked for only once: an attacker's loop has checked, and must not wait for the device.
        if not (self.met_images and torch.is_grad_enabled()):
            images = check_images(images)
            self.met_images = True
        with evaluating(self.modules()):
            return ask(self.classifier, ask(self.defense, images))

    @torch.no_grad()
    def rejects(self, images: Tensor) -> Tensor:
        """`(N,)` bool: images that a detector of the defense finds too suspicious."""
        images = check_images(images)
        with evaluating(self.modules()):
            scores = self.defense.scores(images.clone(), lambda x: ask(self.classifier, x))
        return (scores > self.defense.thresholds.to(scores)).any(1)

    @torch.no_grad()
    def suspicion(self, images: Tensor) -> Tensor:
        """`(N,)` in [0, 1]: how far the classifier's answer moves when an image is purified (`metrics.moved`); of an
        attack that did not look it is high, who looks can keep it low."""
        images = check_images(images)
        with evaluating(self.modules()):
            answers = (ask(self.classifier, x).float().softmax(1) for x in (images, ask(self.defense, images)))
            return moved(*answers)

    def _save(self, folder: Path) -> None:
        if not isinstance(self.classifier, Pretrained):
            raise runs.RunError(
                f"only a classifier of create_classifier rebuilds from a folder, not {_kind(self.classifier)}: save "
                "the purifier alone, protected.defense.save_pretrained(folder)"
            )
        self.classifier.save_pretrained(folder / "classifier")
        self.defense.save_pretrained(folder / "defense")


def _watched(defense: Defense, reject_above: float) -> Defense:
    if not 0 <= reject_above <= 1:
        raise ValueError(f"reject_above is a suspicion in [0, 1], not {reject_above}")
    if len(defense.thresholds):
        raise ValueError(f"{_kind(defense)} has detectors of its own: calibrate those, and leave reject_above out")
    detector = create_defense("feature_squeezing", squeezers=[defense], channels=defense.channels)
    detector.thresholds.fill_(reject_above)
    return detector


def _kind(thing: object) -> str:
    return thing.__name__ if isinstance(thing, type) else type(thing).__name__


def create_defense(name: str, **options: Any) -> Defense:
    """The defense registered as `name`; it remembers its options, so that a run folder can rebuild it."""
    make = defenses[name]
    takes = signature(make).parameters
    if "channels" not in takes:
        options.pop("channels", None)
    check_options(options)
    with SizeLimit():
        defense = defenses.create(name, **options)
    if defense.channels is None:
        defense.channels = options.get("channels")
    if defense.spec is None:  # a pipeline has told its own: its parts may be defenses in hand
        defense.spec = {"name": name, "options": options}
    return defense


def with_options(defense: Defense, **options: Any) -> Defense:
    """`defense` with other options and the same weights, frozen: `with_options(defense, steps=20)` to see what fewer
    cost.

    Its thresholds are those that `defense` was calibrated to, unless it has more or fewer detectors: then none is set.
    """
    if defense.spec is None:
        raise ValueError("only a defense made by create_defense knows its options and can be varied")
    other = create_defense(defense.spec["name"], **{**defense.spec["options"], **options})
    state = dict(defense.state_dict())
    if len(other.thresholds) != len(defense.thresholds):
        state["limits"] = other.thresholds
    other.load_state_dict(state)
    other.outcome = defense.outcome
    return other.to(next(defense.parameters(), torch.empty(0)).device).eval().requires_grad_(False)


class _About(BaseModel):
    model_config = ConfigDict(extra="allow")
    outcome: runs.Outcome | None = None


class DefenseFile(BaseModel):
    """What is in `defense.json`. sha256: of the weights beside it, by `runs.digest_of`."""

    name: str
    options: dict[str, Any]
    about: _About = Field(default_factory=_About)
    sha256: str | None = None


def save_defense(folder: Path, defense: Defense, about: Mapping[str, Any]) -> None:
    """`defense.json` and `model.safetensors` in `folder`, from which `load_defense` rebuilds."""
    if defense.spec is None:
        raise ValueError("only a defense made by create_defense knows its options and can be saved")
    digest = runs.save_tensors(folder / "model.safetensors", defense.state_dict())
    runs.write_json(folder / "defense.json", {**defense.spec, "about": dict(about), "sha256": digest})


def load_defense(source: str | Path) -> Defense:
    """A defense in eval mode, its weights frozen; what its training cost is in its `outcome`.

    source: a run folder or `zoo:NAME`; or the name of a defense that has nothing to learn (`"jpeg"`, `"median"`, ...),
    then with its default options; or several of these joined by `+`, a pipeline, first to last.

    Raises `RunError` where a folder holds no defense or its files are damaged or do not fit together.
    """
    given, source = source, zoo.find(source)
    name, folder = str(source), Path(source)
    path = folder / "defense.json"
    if not path.exists():
        if "+" in name:
            parts = [load_defense(part) for part in name.split("+")]
            return create_defense("pipeline", parts=parts).eval().requires_grad_(False)
        if name in defenses and (defense := _untrained(name)) is not None:
            return defense.eval()
        raise runs.RunError(zoo.of_another_kind(given, "defense") or _no_defense(name, folder))
    described = runs.read_json(path, DefenseFile)
    tensors = runs.load_tensors(folder / "model.safetensors", finite=False)
    try:
        # A network much larger than its weights is not theirs: no need to build it to find out.
        with SizeLimit(1_000_000 + 2 * sum(t.numel() for t in tensors.values())):
            defense = create_defense(described.name, **described.options)
    except Exception as error:  # whatever its own builder makes of wrong options
        said = runs.shortened(str(error) or type(error).__name__, 400)
        raise runs.RunError(f"{path} does not describe a defense that this version can build: {said}") from error
    runs.fit_weights(defense, tensors, folder, path.name, described.sha256)
    if (folder / "training.json").exists():
        defense.outcome = runs.read_json(folder / "training.json", runs.Outcome)
    else:
        defense.outcome = described.about.outcome
    defense.folder = folder
    return defense.eval().requires_grad_(False)


def _no_defense(name: str, folder: Path) -> str:
    near = difflib.get_close_matches(name, list(defenses), n=1)
    if near and name not in defenses and not folder.exists():
        return f"no defense is called {name!r}; did you mean {near[0]!r}? A trained one is named by its run folder"
    return f"{folder} holds no trained defense; {zoo.how_to_make(folder, ())}"


def _untrained(name: str) -> Defense | None:
    """The defense called `name` with its default options, if it has any and nothing to learn."""
    options = signature(defenses[name]).parameters.values()
    if any(p.default is p.empty and p.kind is p.KEYWORD_ONLY for p in options):
        return None
    defense = create_defense(name)
    return None if defense.networks() else defense
