"""Recipes: every key that fixes a run, with its default and its bounds; checked, and kept beside what it made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unperturb.registry import unknown
from unperturb.threat_models import KNOWLEDGE


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, what was wrong, and the nearest right one."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ComponentConfig(BaseModel):
    """A registered thing by name, with options that its own constructor checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="The name it is registered under.")

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


_BESIDE = {"attack", "knowledge", "label", "fraction"}


def long_form(entry: Any) -> Any:
    """An entry of a list of attacks in its long form, `{ attack = { name = ... } }`."""
    return {"attack": entry} if isinstance(entry, dict) and "name" in entry and not _BESIDE & set(entry) else entry


class _Entry(_Settings):
    """An attack, and beside it what a list says of it; an entry with a `name` is the attack itself."""

    attack: ComponentConfig = Field(description="Which attack.")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if isinstance(value, dict) and "name" in value and (beside := sorted(_BESIDE & set(value))):
            long = f'{{ attack = {{ name = "{value["name"]}", ... }}, {beside[-1]} = ... }}'
            raise ValueError(f"{' and '.join(beside)} cannot stand inside an attack; write {long}")
        return long_form(value)


if TYPE_CHECKING:
    KnowledgeName = str
else:
    KnowledgeName = Literal[tuple(KNOWLEDGE)]


class AttackerConfig(_Entry):
    """An attack of an evaluation."""

    knowledge: list[KnowledgeName] | None = Field(None, description="What its attacker knows; None: the recipe's.")
    label: str | None = Field(None, description="Its name in tables; None: made of its name, norm and steps.")


class MixtureConfig(_Entry):
    """An attack of a mixture; an option given as `{ uniform = [low, high] }` is drawn anew each step."""

    fraction: float = Field(1.0, gt=0, description="Its part of each batch, beside those of the others.")

    @model_validator(mode="after")
    def _ranges(self) -> MixtureConfig:
        for option, value in self.attack.options.items():
            try:
                uniform_range(value)
            except ValueError as error:
                raise ValueError(f"{option}: {error}") from None
        return self


_FRACTION = re.compile(r"[0-9]+/[1-9][0-9]*|[0-9]+(\.[0-9]+)?")


def _number(value: Any) -> int | float | None:
    """`value` if it is a finite number, or a fraction such as `"8/255"`."""
    if isinstance(value, str) and _FRACTION.fullmatch(value):
        return float(Fraction(value))
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def uniform_range(value: Any) -> tuple[int | float, int | float] | None:
    """(low, high) of an option that is a range, `{ uniform = [low, high] }`; None for any other option.

    Raises `ValueError` for a range that is none.
    """
    if not (isinstance(value, Mapping) and "uniform" in value):
        return None
    given = value["uniform"]
    low, high = map(_number, given) if isinstance(given, list | tuple) and len(given) == 2 else (None, None)
    if len(value) != 1 or low is None or high is None:
        raise ValueError(f"a range is {{ uniform = [low, high] }} with two numbers, not {dict(value)}")
    if low > high:
        raise ValueError(f"a range goes up, {{ uniform = [{given[1]}, {given[0]}] }}, not down, {list(given)}")
    return low, high


class Training(_Settings):
    """How the loop steps."""

    epochs: float | None = Field(None, gt=0, description="Passes over the training images; or give steps.")
    steps: int | None = Field(None, gt=0, description="Batches; or give epochs.")
    batch: int = Field(128, gt=0, description="Images a step, over all devices together.")
    optimizer: Literal["adam", "adamw", "sgd", "muon"] = Field("adamw", description="Which update.")
    lr: float = Field(1e-3, gt=0, description="Highest learning rate.")
    vector_lr: float = Field(1.0, gt=0, description="Times lr for biases and other vectors.")
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam's averaging; with sgd the first is the momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Decay of matrices and kernels; vectors are never decayed.")
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="The way down after the warm-up.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Fraction of the steps in which the learning rate rises.")
    clip: float | None = Field(None, gt=0, description="Largest gradient norm a network may step with.")
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of the weight average that is kept; 0 keeps the last weights."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of networks in training; auto probes."
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = Field("auto", description="Likewise.")
    validate_every: float | None = Field(None, gt=0, description="Epochs between looks at the validation images.")
    keep: Literal["last", "best"] = Field(
        "last", description="Which weights are the result; best needs validate_every."
    )
    log_every: int = Field(50, gt=0, description="Steps between log lines.")
    checkpoint_seconds: float = Field(60.0, ge=0, description="Seconds between checkpoints.")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if self.keep == "best" and self.validate_every is None:
            raise ValueError("keep = 'best' needs validate_every")
        return self


class Augmentation(_Settings):
    """Random changes of training images that keep their class."""

    pad: int = Field(default=0, ge=0, description="Pixels of padding before a random crop.")
    flip: bool = Field(default=False, description="Mirror half of the images left to right.")
    cutout: int = Field(default=0, ge=0, description="Side of a square set to grey, in pixels.")


class AdversarialBatchesConfig(_Settings):
    """How clean and adversarial images are paired."""

    knowledge: Literal["oblivious", "white_box", "bpda"] = Field("oblivious", description="What the attacker sees.")
    attacks: list[MixtureConfig] = Field(min_length=1, description="The mixture.")
    ramp: int = Field(0, ge=0, description="Steps in which perturbations grow to their full size.")
    val_attacks: list[ComponentConfig] = Field(
        [], description="What validation images are attacked with; none: the mixture's attacks at their hardest."
    )
    augment: Augmentation = Field(Augmentation(), description="Of the clean images, before they are attacked.")


class DataRecipe(_Settings):
    """What every recipe says of its images."""

    kind: str
    dataset: str = Field(description="A name that load_dataset knows.")
    size: int | None = Field(None, gt=0, description="Side of the images; None keeps the source's own.")
    class_names: list[str] | None = Field(
        None, description="The classes in the order of a classifier's logits; labels are renumbered by name."
    )
    skip_damaged: bool = Field(False, description="Leave damaged pictures out instead of stopping at them.")

    @property
    def data_options(self) -> dict[str, Any]:
        """What `load_dataset` is to be called with."""
        options = {"size": self.size, "class_names": self.class_names, "skip_damaged": self.skip_damaged}
        return {"name": self.dataset, **options}


class ClassifierRecipe(DataRecipe):
    """Train a classifier."""

    kind: Literal["classifier"] = "classifier"
    classifier: ComponentConfig = Field(description="Which network.")
    objective: ComponentConfig = Field(ComponentConfig(name="plain"), description="plain, or another way of training.")
    augment: Augmentation = Field(Augmentation(), description="Of the training images.")
    training: Training
    seed: int = Field(0, ge=0, lt=2**32, description="Of weights, order, augmentation and attacks.")


class DefenseRecipe(DataRecipe):
    """Train a defense in front of one classifier or several."""

    kind: Literal["defense"] = "defense"
    classifiers: list[str] = Field(
        min_length=1, description="Run folders of the classifiers to protect, taken in turn."
    )
    defense: ComponentConfig = Field(description="Which defense.")
    start: str | None = Field(None, description="Run folder of a defense like it, whose weights training begins with.")
    adversarial_batches: AdversarialBatchesConfig
    training: Training
    seed: int = Field(0, ge=0, lt=2**32, description="Of weights, order, augmentation and attacks.")


class LadderConfig(_Settings):
    """The attackers that a system has to stand, weakest first; each meets only what the others have left standing."""

    norm: Literal["linf", "l2"] = Field("linf", description="Of every attacker.")
    eps: float | str = Field(description="Of every attacker: a number or a fraction such as 8/255.")
    budget: Literal["quick", "standard", "thorough"] = Field("standard", description="What each may spend on an image.")
    knowledge: KnowledgeName = Field("white_box", description="The most that any of them knows.")
    doubted: int = Field(64, ge=0, description="So many images are attacked by everyone, to see who is worth what.")


class EvaluationRecipe(DataRecipe):
    """Cross classifiers, defenses, attacks and kinds of knowledge, and keep a row per image."""

    kind: Literal["evaluation"] = "evaluation"
    split: Literal["test", "val"] = Field("test", description="Which images; tune on val only.")
    n: int | None = Field(None, gt=0, description="A fixed, named random subset of this many; None takes all.")
    classifiers: list[str] = Field(min_length=1, description="Run folders.")
    surrogate: str | None = Field(None, description="Run folder of the classifier that a transfer attack is made on.")
    surrogate_defense: str | None = Field(
        None,
        description="Run folder of the purifier of the attacker's own that a gray-box attack is made through; retrain, "
        "or retrain:500 for 500 steps, trains one by each system's recipe.",
    )
    systems: list[str] = Field(
        ["undefended"],
        min_length=1,
        description="Run folders, or filters by name; undefended is the classifier itself.",
    )
    attacks: list[AttackerConfig] = Field([], description="Each with its own knowledge and label, if any.")
    ladder: LadderConfig | None = Field(None, description="After them, the attackers of a ladder.")
    knowledge: list[KnowledgeName] = Field(
        ["oblivious", "white_box"], description="For attacks without a list of their own."
    )
    eot_samples: int | None = Field(
        None, gt=0, description="Draws of a random defense that a gradient is averaged over; None means 20."
    )
    draws: int = Field(10, gt=0, description="How often each image is shown to a random system.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the attacks' draws.")
    batch: int = Field(200, gt=0, description="Images attacked at once.")
    shard: int = Field(1000, gt=0, description="Rows a file; a killed run goes on at the next missing one.")
    samples: int = Field(10, ge=0, description="Images per cell that are kept for the figures.")

    @model_validator(mode="after")
    def _someone_attacks(self) -> EvaluationRecipe:
        if not self.attacks and self.ladder is None:
            raise ValueError("give attacks, or a ladder")
        return self


class DemoRecipe(_Settings):
    """The main job from end to end."""

    kind: Literal["demo"] = "demo"
    classifier: ClassifierRecipe
    defense: DefenseRecipe
    evaluation: EvaluationRecipe


Recipe = Annotated[ClassifierRecipe | DefenseRecipe | EvaluationRecipe | DemoRecipe, Field(discriminator="kind")]
KINDS: dict[str, type[_Settings]] = {
    "classifier": ClassifierRecipe,
    "defense": DefenseRecipe,
    "evaluation": EvaluationRecipe,
    "demo": DemoRecipe,
}


def resolve(values: dict[str, Any], name: str = "recipe") -> Any:
    """The checked recipe that `values` describe; raises `RecipeError`."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecipeError(f"{name}: " + str(unknown("kind", kind, KINDS)))
    return _checked(KINDS[kind], values, name)


def _checked(model: type[BaseModel], values: Any, name: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{name}: {_explain(model, e)}" for e in error.errors())) from None


def mixture(entries: Sequence[Mapping[str, Any]]) -> list[MixtureConfig]:
    """The mixture that `entries` describe, as in a recipe; raises `RecipeError`."""
    return _checked(AdversarialBatchesConfig, {"attacks": list(entries)}, "mixture").attacks


def snapshot(recipe: BaseModel) -> dict[str, Any]:
    """Every key of `recipe`, resolved, as JSON-able values."""
    return recipe.model_dump(mode="json")


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys that the settings at `path` know."""
    for part in path:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        annotation: Any = model.model_fields[part].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _explain(model: type[BaseModel], error: Any) -> str:
    path = error["loc"]
    where = ".".join(str(p) for p in path)
    if error["type"] == "extra_forbidden":
        fields = _fields(model, path[:-1])
        known = [*fields, f"attack.{path[-1]}"] if "attack" in fields else fields  # an option of the attack, perhaps
        return str(unknown("key", where, [".".join(map(str, (*path[:-1], field))) for field in known]))
    if error["type"] == "missing":
        return f"{where} is missing"
    given = f", not {error['input']!r:.80}" if not isinstance(error["input"], dict) else ""
    return f"{where + ': ' if where else ''}{error['msg'].removeprefix('Value error, ')}{given}"
