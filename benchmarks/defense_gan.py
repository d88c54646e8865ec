"""What a cheaper search costs Defense-GAN: accuracy and reconstruction over steps L and starts R.

    python benchmarks/defense_gan.py runs/defense_gan-mnist --classifier runs/mnist-resnet8
    python benchmarks/defense_gan.py runs/defense_gan-mnist --classifier runs/mnist-resnet8 --n 10   # does it run?

On validation images, because a setting is chosen by it; attackers are oblivious. One search at the full L and R gives
every point: a shorter one is its beginning, and fewer starts are its first.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unperturb.attacks.base import create_attack
from unperturb.classifiers import fused_copy, load_classifier
from unperturb.data import load_dataset
from unperturb.defenses.base import load_defense
from unperturb.defenses.defense_gan import DefenseGAN
from unperturb.devices import FlopCounter
from unperturb.intervals import wilson
from unperturb.runs import environment, write_atomically, write_json
from unperturb.threat_models import budget

STEPS = (5, 10, 25, 50, 100, 200, 400)
STARTS = (1, 2, 5, 10, 20)


def curve(defense: DefenseGAN, classifier: Any, images: Tensor, labels: Tensor, x: Tensor, batch: int) -> list[Any]:
    """A record for each (L, R) of `defense`'s search on `x`, the attacked `images`: accuracy and errors."""
    lengths = [length for length in STEPS if length < defense.steps] + [defense.steps]
    starts = [r for r in STARTS if r < defense.restarts] + [defense.restarts]
    right: dict[tuple[int, int], list[Tensor]] = {}
    errors: dict[tuple[int, int], list[Tensor]] = {}
    away: dict[tuple[int, int], list[Tensor]] = {}
    for rows in torch.arange(len(x)).split(batch):
        for step, z in enumerate(defense.search(x[rows]), start=1):
            if step not in lengths:
                continue
            for r in starts:
                with torch.no_grad():
                    found, error = defense.nearest(z[:, :r], x[rows])
                    right.setdefault((step, r), []).append(classifier(found).argmax(1) == labels[rows])
                errors.setdefault((step, r), []).append(error)
                away.setdefault((step, r), []).append((found - images[rows]).square().flatten(1).mean(1))
        print(f"{int(rows[-1]) + 1} of {len(x)} images", flush=True)
    records = []
    for (step, r), parts in right.items():
        stood, n = int(torch.cat(parts).sum()), len(x)
        records.append(
            {
                "steps": step,
                "restarts": r,
                "n": n,
                "accuracy": stood / n,
                "interval": wilson(stood, n),
                "rmse_to_what_it_saw": float(torch.cat(errors[step, r]).mean().sqrt()),
                "rmse_to_the_clean_image": float(torch.cat(away[step, r]).mean().sqrt()),
            }
        )
    return records


def gflop_per_step(defense: DefenseGAN, images: Tensor) -> float:
    """Operations of one step of one start, counted."""
    with FlopCounter() as counter:
        next(defense.search(images[:4]))
    return counter.total / (4 * defense.restarts) / 1e9


def draw(figures: dict[str, Any], path: Path) -> None:
    """Accuracy against operations an image, a line for each number of starts, a panel for each attacker."""
    from matplotlib.figure import Figure

    from unperturb.results.figures import DPI

    colors = {1: "#E69F00", 2: "#56B4E9", 5: "#009E73", 10: "#0072B2", 20: "#CC79A7"}
    figure = Figure(figsize=(4.1 * len(figures["curves"]), 4.2), dpi=DPI)
    panels = figure.subplots(1, len(figures["curves"]), sharey=True, squeeze=False)[0]
    for axes, (name, records) in zip(panels, figures["curves"].items()):
        for r in sorted({p["restarts"] for p in records}):
            line = sorted((p for p in records if p["restarts"] == r), key=lambda p: int(p["steps"]))
            cost = [p["steps"] * r * figures["gflop_per_step_and_start"] for p in line]
            axes.plot(
                cost, [100 * p["accuracy"] for p in line], "o-", ms=4, lw=1.4, color=colors.get(r), label=f"R = {r}"
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axes.xaxis.set_minor_formatter(lambda v, _: "")
        axes.set_title(name, fontsize=11.5, loc="left", fontweight="bold")
        axes.set_xlabel("GFLOP an image (log scale)", fontsize=11)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 102)
    lengths = ", ".join(str(v) for v in sorted({p["steps"] for p in records}))
    panels[0].set_ylabel(f"accuracy, % of {records[0]['n']} validation images", fontsize=11)
    panels[-1].legend(frameon=False, fontsize=10, loc="lower right", title=f"marks: L = {lengths}", title_fontsize=9)
    figure.tight_layout()
    write_atomically(path, lambda p: figure.savefig(p, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", type=Path, help="run folder of a Defense-GAN")
    parser.add_argument("--classifier", type=Path, required=True, help="run folder of the classifier behind it")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--eps", default="0.3", help="Linf budget of FGSM and PGD-40 (8/255 may be written so)")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50, help="images searched for at a time")
    parser.add_argument(
        "--out", type=Path, default=Path("results/defense_gan/search"), help="writes OUT.json and OUT.png"
    )
    arguments = parser.parse_args()
    defense = load_defense(arguments.defense)
    if not isinstance(defense, DefenseGAN):
        parser.error(f"{arguments.defense} holds a {type(defense).__name__}, not a Defense-GAN")
    data = load_dataset(arguments.dataset).val.subset(arguments.n, seed=0)
    images, labels = data.batch(torch.arange(len(data)))
    classifier = fused_copy(load_classifier(arguments.classifier), images[:2], channels_last=True)
    eps = budget(arguments.eps)
    seen = {
        "clean": images,
        "FGSM": create_attack("fgsm", eps=eps)(classifier, images, labels),
        "PGD-40": create_attack("pgd", eps=eps, alpha=eps / 30, steps=40)(classifier, images, labels),
    }
    step = gflop_per_step(defense, images)
    searches = len(seen) * len(images) * defense.steps * defense.restarts
    print(f"about {searches * step / 1e6:.3g} PFLOP")
    start = time.perf_counter()
    figures: dict[str, Any] = {
        "environment": environment(),
        "dataset": arguments.dataset,
        "split": "validation",
        "eps": eps,
        "knowledge": "oblivious",
        "gflop_per_step_and_start": step,
        "curves": {k: curve(defense, classifier, images, labels, x, arguments.batch) for k, x in seen.items()},
        "seconds": 0.0,
    }
    figures["seconds"] = round(time.perf_counter() - start, 1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out.with_suffix(".json"), figures)
    draw(figures, arguments.out.with_suffix(".png"))
    print(json.dumps({k: v[-1] for k, v in figures["curves"].items()}, indent=1))


if __name__ == "__main__":
    main()
