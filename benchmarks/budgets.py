"""What the quick ladder says of a system beside the thorough one, on the same images: verdict, time, operations.

    python benchmarks/budgets.py                                         # MNIST's of the zoo, 200 images
    python benchmarks/budgets.py --n 10 --model mnist-robust --out runs/try.json --runs runs/try  # does it run?

A purifier stands before `zoo:mnist-resnet8`. What stands in `--runs` already is read, not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import unperturb as up
from unperturb import runs, zoo

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["mnist-resnet8", "mnist-robust", "adversarial-mnist", "paper-mnist", "protect-mnist", "finetune-mnist"]
BUDGETS = ("quick", "thorough")


def model_of(entry: str) -> nn.Module:
    if (Path(zoo.find(f"zoo:{entry}")) / "classifier.json").exists():
        return up.load_classifier(f"zoo:{entry}")
    return up.Protected(up.load_classifier("zoo:mnist-resnet8"), up.load_defense(f"zoo:{entry}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="of the zoo; repeatable")
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "budgets")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "budgets" / "budgets.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = up.load_dataset("mnist").test
    lines = []
    for entry in options.model or MODELS:
        for budget in BUDGETS:
            out = options.runs / f"{entry}-{budget}"
            found = up.benchmark(
                model_of(entry),
                images,
                eps=options.eps,
                n=options.n,
                budget=budget,
                name=entry,
                out=out,
                resume=out.exists(),
            )
            robust = found.robust
            line = {"model": entry, "budget": budget, "clean": found.clean, "robust": robust.accuracy, "n": robust.n}
            line |= {"low": robust.low, "high": robust.high, "seconds": round(found.seconds, 1)}
            line |= {"pflop_at_most": found.cost.pflop, "flags": [flag.name for flag in found.flags]}
            lines.append(line)
            print(line, flush=True)
            settings = {"eps": options.eps, "n": options.n, "threads": options.threads}
            runs.write_json(
                options.out, {"what": __doc__, **settings, "lines": lines, "environment": runs.environment()}
            )


if __name__ == "__main__":
    main()
