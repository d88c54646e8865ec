"""Adversarial images as a folder of pictures: attacked, rounded to 8 bits, written, read back and judged once more."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unperturb import runs, screen
from unperturb.attackers import Attacker
from unperturb.attacks.base import Attack, attacks
from unperturb.classifiers import load_classifier
from unperturb.data.load import load_dataset
from unperturb.data.sets import DataError, ImageSet
from unperturb.defenses.base import Defense, load_defense
from unperturb.devices import FlopCounter, pick_device, probe
from unperturb.evaluation.identity import identify
from unperturb.manifest import (
    MANIFEST,
    AttackedImage,
    hash_of,
    is_as_written,
    picture_name,
    read_manifest,
    read_picture,
    write_manifest,
    write_picture,
)
from unperturb.mistakes import named
from unperturb.modules import classes_of, frozen, logits_of
from unperturb.systems import System
from unperturb.unsaved import import_classifier, is_import_path

SUMMARY = "summary.json"
_ATTACKABLE = ("white_box", "bpda", "black_box", "oblivious")
_LOOKED_AT = 64  # images by which a model is known that nothing else tells from others
_LEEWAY = 1e-6  # of a distance between two 8-bit images: what float32 makes of eps


@dataclass(frozen=True)
class AttackedImages:
    """What `attack_images` wrote. right_before, right_after: how many of the images the system is right about, as they
    were and as they are in the pictures."""

    out: Path
    images: list[AttackedImage]

    @property
    def right_before(self) -> int:
        return sum(i.before == i.label for i in self.images)

    @property
    def right_after(self) -> int:
        return sum(not i.success for i in self.images)


@dataclass(frozen=True)
class AttackImagesPlan:
    """A folder of adversarial images that is to be made: of `data`, against `system`, by `attack` as an attacker of
    `knowledge` makes it."""

    system: System
    data: ImageSet
    attack: Attack
    knowledge: str = "white_box"
    seed: int = 0
    batch: int = 100

    def settings(self) -> dict[str, Any]:
        """What fixes the images, as it is kept in the folder."""
        return {
            "kind": "attack_images",
            "dataset": self.data.source,
            "split": self.data.name,
            "fingerprint": self.data.fingerprint,
            "n": len(self.data),
            "system": self.system.name,
            "model": _mark(self.system.model, self.data),
            "attack": repr(self.attack),
            "knowledge": self.knowledge,
            "seed": self.seed,
            "batch": self.batch,
        }

    def cost(self, device: str = "auto") -> tuple[float, float]:
        """(PFLOP, minutes on this machine) at most, from the operations on two of the images."""
        where = pick_device(device)
        images, labels = self.data.batch(torch.arange(min(2, len(self.data))), where)
        attack, target = self.attacker(where)
        with FlopCounter() as counter:
            attack.solve(target, images, labels, seed=self.seed)
        pflop = counter.total / len(images) * len(self.data) / 1e15
        rate = max(v for k, v in probe(where.type).rates.items() if k[0] == "float32")
        return float(f"{pflop:.3g}"), round(pflop * 1e6 / (rate * 0.3) / 60, 1)

    def attacker(self, device: torch.device) -> tuple[Attack, nn.Module]:
        """The attack as it is made, and the function that it is made on."""
        attacker = Attacker(self.attack, self.knowledge)
        return attacker.attack_for(self.system), attacker.model_for(self.system).to(device)


def plan_attack_images(
    model: str | Path | nn.Module,
    data: str | ImageSet,
    attack: Attack,
    *,
    defense: str | Path | Defense | None = None,
    knowledge: str = "white_box",
    split: str = "test",
    size: int | None = None,
    n: int | None = None,
    seed: int = 0,
    batch: int = 100,
) -> AttackImagesPlan:
    """What `attack_images` would do, its models and images loaded.

    defense: a purifier in front of the classifier: a run folder, `zoo:NAME`, or the name of one that is not trained.
    knowledge: the attacker's: `white_box` (through all of it), `bpda`, `black_box`, or `oblivious` (on the undefended
    classifier). split, size: of a data set given by name. n: a fixed, named random subset of so many images. seed: of
    the attack. batch: how many are attacked at once.

    Raises `ValueError` for what cannot be attacked so, `RunError` for a folder that holds no such model.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    if knowledge not in _ATTACKABLE:
        raise ValueError(f"knowledge must be one of {', '.join(_ATTACKABLE)}, not {knowledge!r}; evaluate knows more")
    if isinstance(data, str):
        splits = load_dataset(data, size=size)
        if split not in ("train", "val", "test"):
            raise ValueError(f"split must be train, val or test, not {split!r}")
        data = getattr(splits, split)
    assert isinstance(data, ImageSet)
    if data.shape[0] not in (1, 3):
        raise DataError(f"{data.source} has images of {data.shape[0]} channels; a PNG has 1 or 3")
    if not len(data):
        raise DataError(f"{data.name} of {data.source} holds no images")
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    if isinstance(model, str | Path):
        own = is_import_path(str(model))
        model = import_classifier(str(model), data) if own else load_classifier(model)
    system = System.of(name, model)
    if defense is not None:
        purifier = defense if isinstance(defense, Defense) else load_defense(defense)
        system = System(
            f"{name} + {defense if isinstance(defense, str | Path) else type(purifier).__name__}", model, purifier
        )
    system.check_data(data)
    return AttackImagesPlan(system, data.subset(n), attack, knowledge, seed, batch)


def attack_images(
    model: str | Path | nn.Module,
    data: str | ImageSet,
    attack: Attack,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: Callable[..., None] | None = None,
    quiet: bool = False,
    **choices: Any,
) -> AttackedImages:
    """Attack images and keep them in the folder `out`: 8-bit PNGs in `images/`, a line on each in `manifest.csv`, their
    sum in `summary.json`.

    model: a classifier's run folder, `zoo:NAME`, `module:object`, or a module, images -> logits. data: an image set, or
    a data set's name (`folder:PATH` too). choices: what else `plan_attack_images` takes: defense, knowledge, split,
    size, n, seed, batch. resume: go on with what a stopped run left in `out`; pictures that are as they were written
    are not made again. progress: called with (images done, of how many), in place of the bar shown unless `quiet`.

    Each picture is written, read back, and judged by the system as it was read: its distances, and whether it succeeds.

    Raises `RunError` where `out` holds anything else, or a picture lies farther than the attack's eps; `ValueError` for
    what cannot be attacked so; `ModelError` where the model fails.
    """
    plan = plan_attack_images(model, data, attack, **choices)
    return run_plan(plan, out, device=device, resume=resume, progress=progress, quiet=quiet)


def run_plan(
    plan: AttackImagesPlan,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: Callable[..., None] | None = None,
    quiet: bool = False,
) -> AttackedImages:
    """`attack_images` of what is planned."""
    out, where, data = Path(out), pick_device(device), plan.data
    attack, target = plan.attacker(where)
    model = plan.system.model.to(where)
    what = f"{plan.system.name!r}, under {type(attack).__name__} with knowledge {plan.knowledge},"
    with runs.lock(out), screen.shown("attacking", progress, quiet) as update:
        if resume and plan.attack.holds_own and (out / MANIFEST).exists():
            raise runs.RunError(
                f"{out} cannot be gone on with: the attack holds code of your own, and whether it is that which the "
                "folder was begun with cannot be told; choose another folder"
            )
        runs.open_run(out, plan.settings(), resume=resume)
        kept = {line.index: line for line in read_manifest(out) if is_as_written(out, line, data.shape)}
        for rows in torch.arange(len(data)).split(plan.batch):
            index = data.index[rows]
            if not all(i in kept for i in index.tolist()):
                images, labels = data.batch(rows, where)
                with named(what):
                    found = attack.solve(target, images, labels, index=index, seed=plan.seed, quantize=True)[0]
                    for i, picture in zip(index.tolist(), (found * 255).round().to(torch.uint8).cpu()):
                        write_picture(out / picture_name(i), picture)
                    lines = _judge(out, model, images, labels, index, attack, plan.seed)
                kept |= {line.index: line for line in lines}
                write_manifest(out, [kept[i] for i in data.index.tolist() if i in kept])
            if update is not None:
                update(int(rows[-1]) + 1, len(data))
        done = AttackedImages(out, [kept[i] for i in data.index.tolist()])
        write_manifest(out, done.images)
        runs.write_json(out / SUMMARY, _summary(done, plan))
    return done


def attack_from(name: str, eps: str | None, settings: Iterable[str]) -> Attack:
    """The attack called `name` with the budget `eps`, if one is given, and `settings`, "key=value" each.

    Raises `ValueError` where a setting does not read so, or the attack needs a budget; else as `create_attack` does.
    """
    options: dict[str, Any] = {} if eps is None else {"eps": eps}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"a setting of the attack reads key=value, such as steps=40; got {setting!r}")
        try:
            options[key] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            options[key] = text  # a bare word is a string
    budget = inspect.signature(attacks[name]).parameters.get("eps")
    if budget is not None and budget.default is inspect.Parameter.empty and "eps" not in options:
        raise ValueError(f"{name} needs a budget, such as --eps 8/255")
    return attacks.create(name, **options)


def _mark(model: nn.Module, data: ImageSet) -> str:
    """What tells a model from another in any process: what it computes, as far as that can be read, else its class, its
    weights, and what it takes a few images for."""
    identity = identify(model)
    if identity.lasting:
        return identity.key
    weights = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor) and not t.is_quantized}
    place = next(iter(weights.values()), torch.empty(0)).device
    images, _ = data.batch(torch.arange(min(_LOOKED_AT, len(data))), place)
    with frozen(model), torch.no_grad(), named(f"{type(model).__qualname__}, at a first look,"):
        weights["answers"] = classes_of(model(images))
    return f"{type(model).__qualname__} {runs.digest_of(weights)[:16]}"


def _judge(
    out: Path, model: nn.Module, images: Tensor, labels: Tensor, index: Tensor, attack: Attack, seed: int
) -> list[AttackedImage]:
    """What is to be said of the pictures of one batch, by what was read back."""
    numbers = index.tolist()
    read = torch.stack([read_picture(out / picture_name(i), tuple(images.shape[1:])) for i in numbers])  # type: ignore[arg-type]
    x = read.to(images.device).to(torch.float32).div_(255)
    devices = [images.device] if images.is_cuda else []
    with frozen(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # a random system's answers are the same in a run that is resumed
        before, after = (classes_of(logits_of(model, shown)).tolist() for shown in (images, x))
    delta = (x - images).double()
    linf, l2 = (torch.linalg.vector_norm(delta.flatten(1), p, dim=1).tolist() for p in (torch.inf, 2))
    l0 = (delta != 0).any(1).flatten(1).sum(1).tolist()
    eps, far = getattr(attack, "eps", None), l2 if getattr(attack, "norm", "linf") == "l2" else linf
    if eps is not None and max(far) > eps * (1 + _LEEWAY) + _LEEWAY:
        place = out / picture_name(numbers[int(np.argmax(far))])
        raise runs.RunError(
            f"{place} lies {max(far):g} from its image, farther than eps {eps:g}: a fault of the attack"
        )
    return [
        AttackedImage(i, picture_name(i), y, b, a, a != y, n, round(d2, 6), round(dinf, 6), hash_of(p))
        for i, y, b, a, n, d2, dinf, p in zip(numbers, labels.tolist(), before, after, l0, l2, linf, read)
    ]


def _summary(done: AttackedImages, plan: AttackImagesPlan) -> dict[str, Any]:
    return {
        "images": len(done.images),
        "right_before": done.right_before,
        "right_after": done.right_after,
        "farthest": {"linf": max(i.linf for i in done.images), "l2": max(i.l2 for i in done.images)},
        "system": plan.system.name,
        "one_draw_of_a_random_system": plan.system.random,
        "attack": repr(plan.attack),
        "knowledge": plan.knowledge,
    }
