"""Every attack of ours beside torchattacks, foolbox, ART and adv-lib (those that are installed), in one process.

    python benchmarks/attacks.py                                    # nets trained on the spot, 28x28 and 32x32
    python benchmarks/attacks.py --model runs/mnist-lenet5 --model runs/cifar10-airbench
    python benchmarks/attacks.py --attacks fgsm,jsma --sizes 28,128 --quick

Same model, same images, same settings, one thread, CPU seconds of `attack(...)`; the libraries take turns in each of
`--repeat` rounds, so that a busy moment meets them all. The overhead is

    seconds / (least passes * seconds of one forward+backward of the original model, all images in one batch)

least passes, which are the same for every library: the steps of an attack whose images all stay to the end. Where
images leave, what each image needs: DeepFool, when attacked alone, one forward pass and one backward pass per rival in
each step, and the forward pass that finds it fallen; JSMA one forward and two backward passes a step, and that last
forward pass. For the attacks of `SPENT` there is no such number: what ours spent. A forward or backward pass alone
counts as its share of the time of both.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy: one thread for every library

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks_report import loses, marks, plot, print_table
from peers import MODULES, PEERS, Makers, Run
from unperturb.attacks.apgd import APGD, APGDT
from unperturb.attacks.autoattack import AutoAttack
from unperturb.attacks.base import Attack
from unperturb.attacks.cw import CW
from unperturb.attacks.ddn import DDN
from unperturb.attacks.deepfool import DeepFool
from unperturb.attacks.fab import FAB
from unperturb.attacks.fgsm import FGSM
from unperturb.attacks.jsma import JSMA
from unperturb.attacks.mim import MIM
from unperturb.attacks.noise import Noise
from unperturb.attacks.patch import PatchAttack
from unperturb.attacks.pgd import PGD
from unperturb.attacks.rays import RayS
from unperturb.attacks.square import Square
from unperturb.classifiers import create_classifier, load_classifier, twin
from unperturb.classifiers.twin import Twin
from unperturb.data import Splits, load_dataset
from unperturb.runs import environment, read_json, write_json

HERE = Path(__file__).resolve().parent
OURS, TWIN = "ours", "ours, twin"
NETS: dict[int, tuple[str, dict[str, int], int, float]] = {  # by size: family, options, epochs, learning rate
    28: ("lenet5", {}, 6, 3e-3),
    32: ("resnet8", {"width": 8}, 4, 1e-2),
    128: ("resnet18", {"width": 8}, 2, 1e-2),
}


@dataclass(frozen=True)
class Case:
    """One line-up: an attack of ours whose settings everybody gets, and the norm of its distances.

    aimed: at the class after the true one. passes: forward and backward, that every image needs, where that is fixed.
    """

    attack: Attack
    norm: str = "linf"
    aimed: bool = False
    passes: int | None = None


def cases(eps: float) -> dict[str, Case]:
    search = CW(steps=100, search_steps=9, initial_const=0.1, abort_early=False)
    return {
        "fgsm": Case(FGSM(eps=eps), passes=1),
        "pgd": Case(PGD(eps=eps, steps=40), passes=40),
        "mim": Case(MIM(eps=eps, steps=10), passes=10),
        "deepfool": Case(DeepFool(steps=50), "l2"),
        "cw-1x100": Case(CW(steps=100, search_steps=1, initial_const=1.0, abort_early=False), "l2", passes=100),
        "cw-9x100": Case(search, "l2", passes=900),
        "cw-9x100-abort": Case(CW(steps=100, search_steps=9, initial_const=0.1), "l2"),
        "ddn": Case(DDN(steps=100), "l2", passes=100),
        "jsma": Case(JSMA(theta=1.0, gamma=0.145), "l0", aimed=True),
        "apgd-ce": Case(APGD(eps=eps, steps=100), passes=100),
        "apgd-dlr": Case(APGD(eps=eps, steps=100, loss="dlr"), passes=100),
        "apgd-t": Case(APGDT(eps=eps, steps=20)),
        "fab-t": Case(FAB(eps=0.3, steps=20)),
        "square": Case(Square(eps=eps, queries=1000)),
        "autoattack": Case(AutoAttack(eps=eps, steps=20, queries=500)),
        "rays": Case(RayS(queries=1000)),
        "patch": Case(PatchAttack(steps=100), "l0", passes=100),
        "noise": Case(Noise(eps=eps), passes=0),
    }


BIG = 64  # above this side ours run alone
SPENT = ("cw-9x100-abort", "apgd-t", "fab-t", "square", "autoattack", "rays")


@dataclass(frozen=True)
class Field:
    """A model, its twin, the images to attack, and the peers set up for it."""

    name: str
    net: nn.Module
    fast: Twin
    images: Tensor
    labels: Tensor
    classes: int
    peers: dict[str, Makers]


# Models and images --------------------------------------------------------------------------------------------------


def trained(size: int) -> tuple[nn.Module, Splits]:
    """A net for this size, trained on scikit-learn's digits in seconds; in three channels above 28x28."""
    name, options, epochs, lr = NETS[size]
    data = load_dataset("digits", size=size)
    images, labels = batch(data, "train", 1 if size == 28 else 3)
    channels = images.shape[1]
    torch.manual_seed(0)
    shape = {"channels": channels, "size": size, "classes": data.test.classes}
    net = create_classifier(name, mean=[0.2] * channels, std=[0.35] * channels, **shape, **options)
    adam = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=epochs * -(-len(images) // 32))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(32):
            loss = F.cross_entropy(net(images[rows]), labels[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    return net, data


def batch(data: Splits, split: str, channels: int) -> tuple[Tensor, Tensor]:
    part = getattr(data, split)
    images, labels = part.batch(torch.arange(len(part)))
    return (images.expand(-1, channels, -1, -1).contiguous() if images.shape[1] == 1 else images), labels


@torch.no_grad()
def correct(net: nn.Module, images: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first `n` images that the net gets right."""
    right = torch.cat([net(x).argmax(1) for x in images.split(256)]) == labels
    return images[right][:n], labels[right][:n]


def line_up(options: argparse.Namespace) -> list[tuple[str, Callable[[], tuple[nn.Module, Splits]]]]:
    """The models to attack by name, each with what makes it and its data."""

    def load(folder: str) -> tuple[nn.Module, Splits]:
        of = read_json(Path(folder) / "classifier.json")
        return load_classifier(folder), load_dataset(of["extra"]["dataset"], size=of["size"])

    if options.model:
        return [(Path(m).name, functools.partial(load, m)) for m in options.model]
    return [(f"{NETS[s][0]} on digits, {s}x{s}", functools.partial(trained, s)) for s in options.sizes]


# Measuring ----------------------------------------------------------------------------------------------------------


def cpu_seconds(call: Callable[[], Any], fill: float) -> tuple[float, Any]:
    """CPU seconds of one call, all threads, and its last answer; calls are repeated until they fill so many seconds."""
    start, calls = time.process_time(), 0
    while True:
        answer = call()
        calls += 1
        spent = time.process_time() - start
        if spent >= fill:
            return spent / calls, answer


def unit(net: nn.Module, images: Tensor, labels: Tensor, fill: float) -> tuple[float, float]:
    """CPU seconds of a forward pass, and of a forward and a backward pass to the images, all of them in one batch."""

    def both() -> None:
        x = images.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(net(x), labels, reduction="sum"), x)

    flags = [p.requires_grad for p in net.parameters()]
    net.requires_grad_(False)
    with torch.no_grad():
        forward, _ = cpu_seconds(lambda: net(images), fill)
    full, _ = cpu_seconds(both, fill)
    for p, flag in zip(net.parameters(), flags):
        p.requires_grad_(flag)
    return forward, full


def least(case: Case, net: nn.Module, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[float, float]:
    """The least (forward, backward) passes of this attack, a mean over the images; see the top of this file."""
    if case.passes is not None:
        return case.passes, case.passes
    if isinstance(case.attack, DeepFool):
        alone = [
            case.attack.run(net, images[i : i + 1], labels[i : i + 1], index=torch.tensor([i]))
            for i in range(len(images))
        ]
        return statistics.mean(r.forwards for r in alone), statistics.mean(r.backwards for r in alone)
    result = case.attack.run(net, images, labels, targets=targets if case.aimed else None)
    queries = float(result.queries.float().mean())
    if isinstance(case.attack, JSMA):
        return queries, 2 * (queries - 1)
    return queries, queries * result.backwards / max(result.forwards, 1)


@torch.no_grad()
def judge(case: Case, net: nn.Module, x: Tensor, images: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Any]:
    """Success by one clean forward pass (and after 8 bits) inside the limits, and the distances, per image."""
    x = x.detach().float()
    inside = torch.isfinite(x).flatten(1).all(1) & (x.flatten(1).amin(1) >= -1e-6) & (x.flatten(1).amax(1) <= 1 + 1e-6)
    delta = (x - images).flatten(1)
    if hasattr(case.attack, "eps") and case.attack.eps is not None:
        inside &= delta.abs().amax(1) <= case.attack.eps + 1e-5
    inside &= x.flatten(1).amax(1) > 0  # foolbox returns black images for failures

    def fooled(x: Tensor) -> Tensor:
        found = torch.cat([net(part).argmax(1) for part in x.split(256)])
        return inside & ((found == targets) if case.aimed else (found != labels))

    order = {"linf": torch.inf, "l2": 2, "l0": 0}[case.norm]
    distance = torch.linalg.vector_norm(torch.where(delta.abs() > 1e-6, delta, 0), order, dim=1)
    return {"fell": fooled(x), "fell_8bit": fooled((x * 255).round() / 255), "outside": ~inside, "distance": distance}


def contenders(case: Case, net: nn.Module, fast: nn.Module, peers: dict[str, Makers]) -> dict[str, Run | str]:
    """Those who take part, ready to run, or why they cannot."""
    found: dict[str, Run | str] = {
        OURS: lambda x, y, t: case.attack(net, x, y, targets=t if case.aimed else None),
        TWIN: lambda x, y, t: case.attack(fast, x, y, targets=t if case.aimed else None),
    }
    for name, makers in peers.items():
        maker = makers.get(type(case.attack).__name__)
        if maker is not None:
            try:
                found[name] = maker(case.attack)
            except Exception as error:  # a peer that cannot is part of the result
                found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def measure(case: Case, field: Field, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per library: seconds, overhead, success, distance; or the error of one that failed."""
    net, images, labels = field.net, field.images, field.labels
    targets = (labels + 1) % field.classes
    runs = contenders(case, net, field.fast, field.peers)
    passes = least(case, net, images, labels, targets)
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    overheads: dict[str, list[float]] = {who: [] for who in runs}
    units: list[float] = []
    judged: dict[str, dict[str, Tensor]] = {}
    for turn in range(options.repeat):
        forward, full = unit(net, images, labels, options.fill)
        fewest = passes[0] * forward + passes[1] * (full - forward)
        units.append(fewest / full)
        for who, run in runs.items():
            if isinstance(run, str) or sum(seconds[who]) > options.patience:
                continue
            torch.manual_seed(turn)
            np.random.seed(turn)  # noqa: NPY002  # ART draws from numpy's global state
            net.eval()
            try:
                spent, x = cpu_seconds(functools.partial(run, images, labels, targets), options.fill)
            except Exception as error:
                runs[who] = f"{type(error).__name__}: {error}"[:300]
                continue
            seconds[who].append(spent)
            overheads[who].append(spent / fewest if fewest else 0.0)
            judged[who] = judge(case, net, x, images, labels, targets)
    rows = []
    for who, run in runs.items():
        row: dict[str, Any] = {"model": field.name, "size": images.shape[-1], "library": who}
        if isinstance(run, str):
            rows.append(row | {"error": run})
            continue
        row |= {"seconds": spread(seconds[who]), "images_per_second": len(images) / statistics.median(seconds[who])}
        row |= {"passes": statistics.median(units), "overhead": spread(overheads[who]) if passes[0] else None}
        row["times_ours"] = statistics.median(seconds[who]) / statistics.median(seconds[OURS] or [math.nan])
        rows.append(row | told(judged[who], judged.get(OURS, judged[who])) | {"norm": case.norm})
    return rows


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def told(mine: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Any]:
    """Shares and mean distances; also on the images that both this library and ours felled, the fair comparison."""

    def mean(of: dict[str, Tensor], where: Tensor) -> float | None:
        return float(of["distance"][where].mean()) if bool(where.any()) else None

    both = mine["fell"] & ours["fell"]
    shares = {k: float(mine[v].float().mean()) for k, v in (("success", "fell"), ("success_8bit", "fell_8bit"))}
    return shares | {
        "outside": int(mine["outside"].sum()),
        "distance": mean(mine, mine["fell"]),
        "distance_where_both_fell": {"this": mean(mine, both), "ours": mean(ours, both), "n": int(both.sum())},
    }


# The run ------------------------------------------------------------------------------------------------------------


def prepare(name: str, make: Callable[[], tuple[nn.Module, Splits]], options: argparse.Namespace) -> Field:
    """The model, its images, its twin, and the peers that take part; those that cannot are named with their error."""
    net, data = make()
    net = net.eval().requires_grad_(not options.freeze)
    channels = 1 if data.test.shape[1] <= 28 and data.test.shape[0] == 1 else 3
    images, labels = correct(net, *batch(data, "test", channels), options.n)
    peers: dict[str, Makers] = {}
    for library in options.peers if images.shape[-1] <= BIG else []:
        try:
            peers[library] = PEERS[library](net, images, data.test.classes)
        except Exception as error:
            options.absent[library] = f"{type(error).__name__}: {error}"[:300]
    return Field(name, net, twin(net, images), images, labels, data.test.classes, peers)


def parse() -> argparse.Namespace:
    names = list(cases(0.1))

    def listed(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="folder of a classifier, with its own data; may be repeated")
    parser.add_argument("--attacks", type=listed, default=names, help=f"of {','.join(names)}")
    parser.add_argument("--sizes", type=lambda t: [int(s) for s in t.split(",")], default=[28, 32], help="of 28,32,128")
    parser.add_argument("--big", action="store_true", help="128x128 too, ours alone")
    parser.add_argument("--peers", type=listed, default=list(PEERS), help=f"of {','.join(PEERS)}")
    parser.add_argument("--n", type=int, help="images, all classified correctly (default 128)")
    parser.add_argument("--eps", type=float, help="Linf budget (default 0.1 for gray images, 8/255 for color)")
    parser.add_argument("--repeat", type=int, help="rounds (default 5)")
    parser.add_argument("--patience", type=float, default=60.0, help="CPU seconds after which none is run once more")
    parser.add_argument("--freeze", action="store_true", help="spare the peers the gradients of the parameters")
    parser.add_argument("--quick", action="store_true", help="16 images, one round: does it run?")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "attacks.json", help="and a .png beside")
    options = parser.parse_args()
    for given, known in ((options.attacks, names), (options.sizes, list(NETS)), (options.peers, list(PEERS))):
        if strangers := [g for g in given if g not in known]:
            parser.error(f"unknown: {strangers}; there are {known}")
    options.n = options.n or (16 if options.quick else 128)
    options.repeat = options.repeat or (1 if options.quick else 5)
    options.fill = 0.0 if options.quick else 0.2
    options.sizes += [128] if options.big and 128 not in options.sizes else []
    options.absent = {}
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "what": "attacks, ours and other libraries', in CPU seconds",
        "clock": "time.process_time",
    }
    record |= {k: getattr(options, k) for k in ("n", "repeat", "patience", "freeze", "quick")}
    record |= {"libraries": versions(options.peers), "absent": options.absent, "models": [], "rows": rows}
    record["environment"] = environment()
    for name, make in line_up(options):
        field = prepare(name, make, options)
        shape = tuple(field.images.shape)
        record["models"].append(
            {"name": name, "images": shape, "classes": field.classes}
            | {"folded": field.fast.folded, "channels_last": field.fast.channels_last}
        )
        eps = options.eps or (0.1 if shape[1] == 1 else 8 / 255)
        for attack in options.attacks:
            case = cases(eps)[attack]
            print(f"{name}: {attack}", file=sys.stderr, flush=True)
            kind = "spent" if attack in SPENT else "least"
            found = measure(case, field, options)
            rows += [{"attack": attack, "settings": repr(case.attack), "passes_are": kind} | row for row in found]
            record |= {"marks": marks(record), "loses": loses(rows)}
            write_json(options.out, record)  # after each attack: a long run may be broken off
    plot(rows, options.out.with_suffix(".png"))
    print_table(record)
    print(f"wrote {options.out} and {options.out.with_suffix('.png').name}")


def versions(names: list[str]) -> dict[str, str]:
    """The peers that can be imported, with their version."""
    found = {}
    for name in names:
        try:
            found[name] = str(getattr(importlib.import_module(MODULES[name]), "__version__", "unknown"))
        except Exception:  # why is told under "absent"
            continue
    return found


if __name__ == "__main__":
    main()
