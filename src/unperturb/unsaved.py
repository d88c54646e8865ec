"""Models that no run folder holds: a user's own by its import path, and untrained ones in place of what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from unperturb import zoo
from unperturb.classifiers import Classifier, classifiers, create_classifier, load_classifier, wrap
from unperturb.config import read_recipe
from unperturb.data import ImageSet
from unperturb.defenses import create_defense, load_defense

# A user's own -------------------------------------------------------------------------------------------------------


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

    path: `module` is found from the current folder too, and may be a file, `net.py`; `object` is a module or a callable
    that gives one without arguments. weights: a safetensors file or one of `torch.save(model.state_dict())`, which is
    read as tensors alone. mean, std: of the normalization that the model expects in front of it, if any.

    Raises `ValueError` where the import fails, what is found is no such module, or the weights are not its own.
    """
    model = _import(path)
    if weights is not None:
        _load_weights(model, Path(weights))
    channels, height, width = data.shape
    size = height if height == width else None
    return wrap(model, mean, std, size=size, channels=channels, classes=data.classes)


def import_object(path: str) -> Any:
    """What is at `module:object`, or what it makes when called without arguments; raises `ValueError`."""
    return _import(path)


def _import(path: str) -> Any:
    place, _, name = path.partition(":")
    file = Path(place)
    folder = file.parent if file.suffix == ".py" else Path()
    sys.path.insert(0, str(folder.resolve()))
    try:
        thing: Any = _run(file) if file.suffix == ".py" else importlib.import_module(place)
        for part in name.split("."):
            thing = getattr(thing, part)
        model = thing if isinstance(thing, nn.Module) or not callable(thing) else thing()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything, and a script may end itself
        raise ValueError(f"{path} could not be imported: {_where(error)}{type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(folder.resolve()))
        if str(folder.resolve()) not in sys.path:
            sys.path.append(str(folder.resolve()))  # what is imported when the model is called
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{path} gives a {type(model).__name__}; expected a torch.nn.Module, or a callable that gives one"
        )
    return model


def _run(file: Path) -> ModuleType:
    """The module in `file`, run anew: another file of that name may have been imported before."""
    if not file.is_file():
        raise ModuleNotFoundError(f"there is no file {file}")
    name = f"_own_{file.stem}_{abs(hash(str(file.resolve())))}"  # its own name may be that of another module
    spec = importlib.util.spec_from_file_location(name, file)
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


def _where(error: BaseException) -> str:
    """The last line of code that is neither ours nor the import machinery's: "net.py, line 3: "."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in (__file__, importlib.__file__)]
    frames = [f for f in frames if not f.filename.startswith("<")]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""


def _load_weights(model: nn.Module, path: Path) -> None:
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
    if Path(entry).exists():
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
        return load_classifier(same) if (same / "classifier.json").exists() else load_defense(same)
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
