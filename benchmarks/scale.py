"""Rows per second of one process and of 1, 2 and 4 workers of Ray on this machine; operations for all of ImageNet.

    python benchmarks/scale.py                            # a small evaluation on the embedded digits, several times
    python benchmarks/scale.py --workers 8 --n 2000       # on a larger machine
    python benchmarks/scale.py --imagenet                 # count operations instead: no data needed, untrained nets

Each run makes the same rows anew, by untrained nets: an attack costs the same. Seconds are those of the cells, with
the start of the workers, which load the models; Ray is started, and the models are checked, before. CPU seconds are of
all processes together, Ray's own too: they hardly depend on what else the machine does, seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from torch import nn

from unperturb.classifiers import create_classifier, save_classifier
from unperturb.config import resolve, snapshot
from unperturb.data import ImageSet, Splits
from unperturb.defenses import Protected, create_defense, save_defense
from unperturb.devices import FlopCounter
from unperturb.evaluation.costs import billed
from unperturb.evaluation.engine import engine_of
from unperturb.evaluation.ladder import ladder
from unperturb.evaluation.plan import plan_of
from unperturb.recipe_files import read_recipe
from unperturb.results.schema import read_rows
from unperturb.runs import environment, write_json
from unperturb.threat_models import ThreatModel
from unperturb.training import jobs
from unperturb.training.profiling import flop_per_image

TICK = os.sysconf("SC_CLK_TCK")


def recipe_in(folder: Path, n: int, shard: int) -> Any:
    """An evaluation of two systems by two attackers, its untrained nets kept in `folder`."""
    torch.manual_seed(0)
    net = create_classifier("resnet8", channels=1, size=28, classes=10, mean=[0.3], std=[0.35])
    save_classifier(folder / "net", net)
    options = read_recipe("protect-mnist").defense.options
    save_defense(folder / "ours", create_defense("paired_gan", channels=1, **options).eval(), {})
    pgd = {"attack": {"name": "pgd", "eps": 0.3, "steps": 20}}
    values = {"kind": "evaluation", "dataset": "digits", "n": n, "shard": shard, "batch": shard, "attacks": [pgd]}
    models = {"classifiers": [str(folder / "net")], "systems": ["undefended", str(folder / "ours")]}
    return resolve({**values, **models, "knowledge": ["oblivious", "white_box"]})


def cpu_seconds() -> float:
    """Of this process and of all that it started."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        stats[int(path.parent.name)] = int(fields[1]), sum(map(int, fields[11:15])) / TICK

    def is_ours(pid: int) -> bool:
        while pid in stats and pid != os.getpid():
            pid = stats[pid][0]
        return pid == os.getpid()

    return sum(seconds for pid, (_, seconds) in stats.items() if is_ours(pid))


def measured(recipe: Any, folder: Path, workers: int) -> dict[str, Any]:
    """One run anew; workers: 0 is this process alone."""
    os.environ["UNPERTURB_CACHE"] = str(folder / f"cache-{workers}")
    out = folder / f"run-{workers}"
    if workers:
        ray.init(num_cpus=workers, include_dashboard=False, logging_level="error")
    write_json(out / "recipe.json", snapshot(recipe))  # by which a worker knows the folder
    plan = plan_of(recipe, "cpu")
    with engine_of("ray" if workers else "local", recipe) as make:
        began, cpu = time.perf_counter(), cpu_seconds()
        make(plan, out, None)
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    ray.shutdown()
    rows = read_rows(out)
    return {
        "processes": workers or "this one, no Ray",
        "rows": len(rows),
        "seconds": round(seconds, 1),
        "rows_per_second": round(len(rows) / seconds, 2),
        "cpu_seconds_per_1000_rows": round(1000 * cpu / len(rows), 1),
    }


def imagenet() -> dict[str, float]:
    """TFLOP per image of the `imagenet` recipes, and of the standard ladder at 4/255 where no image falls.

    The nets are convolutions all through, so operations grow as pixels do: they are counted at 32x32, times 16.
    """

    def images(split: str) -> ImageSet:
        pixels = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
        labels, names = torch.arange(24), [str(k) for k in range(1000)]
        return ImageSet(images=pixels, labels=labels, index=labels, class_names=names, source="imagenet", split=split)

    data = Splits(**{s: images(s) for s in ("train", "val", "test")}, class_names=images("val").class_names, source="")
    task = jobs.classifier_task(read_recipe("classifier-imagenet"), data)
    net = task.classifier.eval()
    flop = {"classifier-imagenet, a training image": flop_per_image(task, steps=2, batch=2)}
    for name in ("paper-imagenet", "protect-imagenet"):
        learns = jobs.defense_task(read_recipe(name), data, [net])
        flop[f"{name}, a training image"] = flop_per_image(learns, steps=4, batch=20)
    x, _ = data.test.batch(torch.arange(1))
    attackers = ladder(ThreatModel("linf", 4 / 255, "white_box"), "standard", classes=1000)
    for name, model in (("the bare net", net), ("protect-imagenet", Protected(net, learns.defense.eval()))):
        forward, backward = passes(model, x)
        flop[f"{name}, an answer"] = forward
        total = 0.0
        for sent in attackers.values():
            for attacker in sent:
                if attacker.knowledge in ("white_box", "black_box") and attacker.randomness is not True:
                    _, (forwards, backwards) = billed(attacker.attack, torch.rand(2, 3, 8, 8), 1000)
                    total += forwards * forward + backwards * backward
        flop[f"{name}, white box and black box of the standard ladder"] = total
    return {name: float(f"{16 * one / 1e12:.3g}") for name, one in flop.items()}


def passes(model: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Operations of a forward pass and of a backward pass to the image."""
    x = x.clone().requires_grad_()
    model.requires_grad_(False)
    with FlopCounter() as there:
        logits = model(x)
    with FlopCounter() as back:
        torch.autograd.grad(logits.sum(), x)
    return there.total, back.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--shard", type=int, default=25)
    parser.add_argument("--imagenet", action="store_true", help="count operations instead")
    parser.add_argument("--out", type=Path, help="a JSON file (default: only the screen)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"environment": environment(), "cores": os.cpu_count()}
    if options.imagenet:
        found["tflop"] = imagenet()
    else:
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_in(Path(folder), options.n, options.shard)
            found["load_before"] = os.getloadavg()[0]
            found["runs"] = [measured(recipe, Path(folder), workers) for workers in (0, *options.workers)]
    if options.out:
        write_json(options.out, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
