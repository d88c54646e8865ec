"""Every attack of ours beside torchattacks, foolbox, ART and adv-lib (those that are installed), in one process.

    python benchmarks/attacks.py                                    # nets trained on the spot, 28x28 and 32x32
    python benchmarks/attacks.py --model runs/mnist-lenet5 --model runs/cifar10-airbench
    python benchmarks/attacks.py --attacks fgsm,jsma --sizes 28,128 --quick
    python benchmarks/attacks.py --attacks jsma --n 16 --keep       # this attack anew, the others as they were

Same model, same images, same settings, one thread, CPU seconds of `attack(...)`; the libraries take turns in each of
`--repeat` rounds, so that a busy moment meets them all. The overhead is

    seconds / (least passes * seconds of one forward+backward of the original model, all images in one batch)

least passes, which are the same for every library: the steps of an attack whose images all stay to the end. Where
images leave, what each image needs: DeepFool, when attacked alone, one forward pass and one backward pass per rival in
each step, and the forward pass that finds it fallen; JSMA one forward and two backward passes a step, and that last
forward pass. For the attacks of `SPENT` there is no such number: what ours spent. A forward or backward pass alone
counts as its share of the time of both.

torchattacks' JSMA takes one image at a time, 10 s each at 32x32: it gets the first four; `n` says so in its row, and
its overhead, images/s and `x ours` are per image. Its APGD-T and FAB-T drop an image at its first success, as ours do
in the cases `-first`; there the question is the same.
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
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy: one thread for every library

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks_cases import NETS, SPENT, Case, Field, cases, line_up, prepare
from attacks_peers import MODULES, PEERS, Makers, Run
from attacks_report import FUSED, OURS, loses, marks, plot, print_table
from unperturb.attacks.deepfool import DeepFool
from unperturb.attacks.jsma import JSMA
from unperturb.attacks.kinds import BallAttack
from unperturb.runs import environment, read_json, write_json

HERE = Path(__file__).resolve().parent
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

    order = {"linf": torch.inf, "l2": 2, "l1": 1, "l0": 0}[case.norm]
    distance = torch.linalg.vector_norm(torch.where(delta.abs() > 1e-6, delta, 0), order, dim=1)
    return {"fell": fooled(x), "fell_8bit": fooled((x * 255).round() / 255), "outside": ~inside, "distance": distance}


def contenders(
    case: Case,
    net: nn.Module,
    fast: nn.Module,
    peers: dict[str, Makers],
    attack: str = "",
    left_out: Collection[str] = (),
) -> dict[str, Run | str]:
    """Those who take part, ready to run, or why they do not; `attack` is the name of the case."""
    found: dict[str, Run | str] = {
        OURS: lambda x, y, t: case.attack(net, x, y, targets=t if case.aimed else None),
        FUSED: lambda x, y, t: case.attack(fast, x, y, targets=t if case.aimed else None),
    }
    for name, makers in peers.items():
        maker = makers.get(type(case.attack).__name__)
        if maker is not None and f"{name}:{attack}" in left_out:
            found[name] = "left out: it would take too long"
        elif maker is not None:
            try:
                found[name] = maker(case.attack)
            except Exception as error:  # a peer that cannot is part of the result
                found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def measure(attack: str, case: Case, field: Field, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per library: seconds, overhead, success, distance; or the error of one that failed."""
    net, images, labels = field.net, field.images, field.labels
    targets = (labels + 1) % field.classes
    runs = contenders(case, net, field.fast, field.peers, attack, options.leave_out)
    passes = least(case, net, images, labels, targets)
    limits = {} if options.whole else {who: min(few, len(images)) for who, few in case.few.items()}
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
                few = limits.get(who, len(images))
                spent, x = cpu_seconds(functools.partial(run, images[:few], labels[:few], targets[:few]), options.fill)
            except Exception as error:
                runs[who] = f"{type(error).__name__}: {error}"[:300]
                continue
            seconds[who].append(spent)
            overheads[who].append(spent / (fewest * few / len(images)) if fewest else 0.0)
            judged[who] = judge(case, net, x, images[:few], labels[:few], targets[:few])
    rows = []
    for who, run in runs.items():
        n = limits.get(who, len(images))
        row: dict[str, Any] = {"model": field.name, "size": images.shape[-1], "n": n, "library": who}
        if isinstance(run, str):
            rows.append(row | {"error": run})
            continue
        row |= {"seconds": spread(seconds[who]), "images_per_second": n / statistics.median(seconds[who])}
        row |= {"passes": statistics.median(units), "overhead": spread(overheads[who]) if passes[0] else None}
        ours = statistics.median(seconds[OURS] or [math.nan]) / len(images)
        row["times_ours"] = statistics.median(seconds[who]) / n / ours
        rows.append(row | told(case, judged[who], {k: v[:n] for k, v in judged.get(OURS, judged[who]).items()}))
    return rows


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def told(case: Case, mine: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Any]:
    """Shares and mean distances: over all images where the budget is fixed, else over those that fell; and over those
    that both this library and ours felled, the fair comparison."""

    def mean(of: dict[str, Tensor], where: Tensor) -> float | None:
        return float(of["distance"][where].mean()) if bool(where.any()) else None

    both = mine["fell"] & ours["fell"]
    shares = {k: float(mine[v].float().mean()) for k, v in (("success", "fell"), ("success_8bit", "fell_8bit"))}
    return shares | {
        "outside": int(mine["outside"].sum()),
        "norm": case.norm,
        "distance": mean(mine, mine["fell"] | isinstance(case.attack, BallAttack)),
        "distance_where_both_fell": {"this": mean(mine, both), "ours": mean(ours, both), "n": int(both.sum())},
    }


# The run ------------------------------------------------------------------------------------------------------------


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
    parser.add_argument("--whole", action="store_true", help="all images for those that take them one by one, too")
    parser.add_argument("--freeze", action="store_true", help="spare the peers the gradients of the parameters")
    parser.add_argument("--keep", action="store_true", help="keep the rows of other models and attacks in --out")
    parser.add_argument("--leave-out", type=listed, default=[], help="LIBRARY:ATTACK,... that would take too long")
    parser.add_argument("--quick", action="store_true", help="16 images, one round: does it run?")
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "results/attacks/attacks.json", help="and a .png beside"
    )
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
    old = read_json(options.out) if options.keep and options.out.exists() else {"models": [], "rows": []}
    rows: list[dict[str, Any]] = old["rows"]
    order = list(cases(0.1))
    record: dict[str, Any] = {
        "what": "attacks, ours and other libraries', in CPU seconds",
        "clock": "time.process_time",
    }
    record |= {k: getattr(options, k) for k in ("n", "repeat", "patience", "freeze", "quick")}
    record |= {"libraries": versions(options.peers), "absent": options.absent, "models": old["models"], "rows": rows}
    record["environment"] = environment()
    for name, make in line_up(options):
        field = prepare(name, make, options)
        shape = tuple(field.images.shape)
        record["models"] = [m for m in record["models"] if m["name"] != name]
        record["models"].append(
            {"name": name, "images": shape, "classes": field.classes}
            | {"folded": field.fast.folded, "channels_last": field.fast.channels_last}
        )
        eps = options.eps or (0.1 if shape[1] == 1 else 8 / 255)
        for attack in options.attacks:
            case = cases(eps)[attack]
            print(f"{name}: {attack}", file=sys.stderr, flush=True)
            kind = "spent" if attack in SPENT else "least"
            found = measure(attack, case, field, options)
            rows[:] = [row for row in rows if (row["model"], row["attack"]) != (name, attack)]
            rows += [{"attack": attack, "settings": repr(case.attack), "passes_are": kind} | row for row in found]
            record["models"].sort(key=lambda m: m["images"][-1])
            rows.sort(key=lambda r: (r["size"], r["model"], order.index(r["attack"])))
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
