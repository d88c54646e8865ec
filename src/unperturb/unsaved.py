"""Models that no run folder holds: a user's own by its import path, and untrained ones in place of what is missing."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from unperturb import zoo
from unperturb.classifiers import Classifier, classifiers, create_classifier, load_classifier, wrap
from unperturb.classifiers.wrapped import AnswerError
from unperturb.data import ImageSet
from unperturb.data.sets import shape_words
from unperturb.defenses import create_defense, load_defense
from unperturb.mistakes import where
from unperturb.recipe_files import read_recipe

# A user's own -------------------------------------------------------------------------------------------------------


class _RefusedError(ValueError):
    """What is not there, or no model: said by us, where the user's own code may raise anything."""


def is_import_path(text: str) -> bool:
    """Whether `text` reads `module:object` and is neither the zoo's nor a folder."""
    module, colon, name = text.partition(":")
    return bool(colon and module and name) and not text.startswith(zoo.PREFIX) and not Path(text).exists()


def import_classifier(
    path: str,
    data: ImageSet,
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """The classifier at `module:object`, behind `unperturb.wrap`, tried on two images of the size of `data`.

    path: `module` is found from the current folder too, and may be a file, `net.py`; `object` is a model (a module, or
    any other callable from images to logits), or something that takes no arguments and gives one. weights: a
    safetensors file or one of `torch.save(model.state_dict())`, which is read as tensors alone. mean, std: of the
    normalization that the model expects in front of it, if any.

    Raises `ValueError` where the import fails, what is found is no model or fails on such images, or the weights are
    not its own.
    """
    model = import_object(path)
    if not callable(model):
        raise ValueError(
            f"{path} gives a {type(model).__name__}, which cannot be called; expected a model (a torch.nn.Module, or a "
            "function from images to logits), or a function without arguments that gives one"
        )
    if weights is not None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"{path} is a {type(model).__name__}: only a torch.nn.Module can be given weights")
        load_weights(model, Path(weights))
    channels, height, width = data.shape
    size = height if height == width else None
    try:
        classifier = wrap(model, mean, std, size=size, channels=channels, classes=data.classes)
    except (TypeError, ValueError) as error:
        raise ValueError(_refused(path, model, data, error)) from error
    classifier.called = path
    return classifier


def _refused(path: str, model: object, data: ImageSet, error: Exception) -> str:
    """Why the model at `path`, shown images of `data`, is none."""
    if isinstance(error, AnswerError):
        maker = isinstance(model, FunctionType)
        return f"{path}: {error}" + ("; a function that makes a model takes no arguments" if maker else "")
    if (said := error.__cause__) is None:
        return f"{path}, for {data.source} ({shape_words(data.shape)}): {error}"
    hint = isinstance(said, RuntimeError | ValueError | IndexError)  # what torch says of shapes
    return (
        f"{path} fails on images of {data.source} ({shape_words(data.shape)}): {where(said)}{type(said).__name__}: "
        f"{said}" + ("; if it takes images of another size or other channels, choose --size or --data" if hint else "")
    )


def import_object(path: str) -> Any:
    """What is at `module:object`; where that is a class or another callable without arguments, what it makes. Raises
    `ValueError`."""
    with _from_here(path):
        thing = _found(path)
        if isinstance(thing, nn.Module) or not callable(thing) or _takes_images(thing):
            return thing
        try:
            signature(thing).bind()
        except TypeError as error:
            what = "a class" if isinstance(thing, type) else "a function"
            raise _RefusedError(
                f"{path} is {what} that cannot be called without arguments ({error}): make the model in the file, and "
                "name it in its place"
            ) from None
        return thing()


def _takes_images(thing: Any) -> bool:
    """Whether a callable is a model itself: one argument must be given."""
    if isinstance(thing, type):
        return False
    try:
        parameters = signature(thing).parameters.values()
    except (TypeError, ValueError):  # one of C, such as torch.flatten
        return True
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 1


@contextlib.contextmanager
def _from_here(path: str) -> Iterator[None]:
    """Inside, what lies beside the module of `path` can be imported; what the user's own code raises becomes a
    `ValueError` that says where."""
    file = Path(path.partition(":")[0])
    folder = str((file.parent if file.suffix == ".py" else Path()).resolve())
    sys.path.insert(0, folder)
    try:
        yield
    except (Exception, SystemExit) as error:  # it may raise anything, and a script may end itself
        if isinstance(error, _RefusedError):
            raise
        raise ValueError(f"{path} could not be imported: {where(error)}{type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # what is imported when the model is called


def _found(path: str) -> Any:
    place, _, name = path.partition(":")
    thing: Any = _run(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    for part in name.split("."):
        if not hasattr(thing, part):
            near = difflib.get_close_matches(part, dir(thing), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise _RefusedError(f"{path}: {place} has no {part!r}{hint}")
        thing = getattr(thing, part)
    return thing


def _run(file: Path) -> ModuleType:
    """The module in `file`, run anew: another file of that name may have been imported before."""
    if not file.is_file():
        raise _RefusedError(f"there is no file {file}")
    # Named by its place, which errors show: its own name may be that of another module.
    spec = importlib.util.spec_from_file_location(str(file.resolve()), file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is being made
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file, or one of `torch.save(model.state_dict())`, which is read as tensors alone. Raises
    `ValueError` where it is not there, unreadable, or not of this model."""
    if path.suffix != ".safetensors" and torch.__version__ < "2.6":
        raise ValueError(
            f"{path} is not opened: up to torch 2.5 a saved state_dict may run code (CVE-2025-32434), and this is "
            f"torch {torch.__version__}; save it as safetensors, or install torch 2.6 or newer"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no weights at {path}") from None
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}): expected safetensors, or a file of "
            "torch.save(model.state_dict(), ...); a whole pickled model is never opened"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no weights by name; expected what model.state_dict() gives")
    own = model.state_dict()
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        some = ", ".join(sorted(wrong)[:3]) + (", ..." if len(wrong) > 3 else "")
        raise ValueError(f"{path} does not hold the weights of this model ({len(wrong)} of {len(own)} differ: {some})")
    broken = [k for k, _ in model.named_parameters() if not state[k].isfinite().all()]
    if broken:
        raise ValueError(
            f"{path} holds weights that are NaN or infinite ({', '.join(sorted(broken)[:3])}); make it again"
        )
    model.load_state_dict(state)


# Untrained ----------------------------------------------------------------------------------------------------------


def missing(entry: str) -> list[str]:
    """The run folders that `entry` of a recipe (a folder, a filter's name, several joined by `+`) needs and has not."""
    if entry.startswith(zoo.PREFIX) and "+" not in entry:
        zoo.find(entry)
        return []
    if Path(entry).is_file() or zoo.kind_of(entry):
        return []
    if "+" in entry:
        return [folder for part in entry.split("+") for folder in missing(part)]
    looks_like_one = "/" in entry or zoo.recipe_for(entry, classifiers) is not None
    return [entry] if looks_like_one else []


def stand_ins(entries: Iterable[str], data: ImageSet) -> dict[str, nn.Module]:
    """For each of a recipe's `entries` that needs a missing run folder, a model that costs what it will: the zoo's of
    that name, or an untrained one of its recipe. Those that nobody knows how to make are left out.

    For counting operations; what such a model answers means nothing.
    """
    found: dict[str, nn.Module] = {}
    for entry in entries:
        if missing(entry):
            parts = [_stand_in(part, data) if missing(part) else load_defense(part) for part in entry.split("+")]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                found[entry] = known[0] if len(known) == 1 else create_defense("pipeline", parts=known)
    return found


def _stand_in(folder: str, data: ImageSet) -> nn.Module | None:
    same = zoo.folders().get(Path(folder).name)
    if same is not None:
        return load_classifier(same) if zoo.kind_of(same) == "classifier" else load_defense(same)
    known = zoo.recipe_for(folder, classifiers)
    if known is None:
        return None
    recipe = read_recipe(*known)
    channels, size, _ = data.shape
    if recipe.kind == "defense":
        made = create_defense(recipe.defense.name, channels=channels, **recipe.defense.options)
        return made.eval().requires_grad_(False)
    family = recipe.classifier
    middle = [0.5] * channels
    return create_classifier(
        family.name, channels=channels, size=size, classes=data.classes, mean=middle, std=middle, **family.options
    ).eval()
