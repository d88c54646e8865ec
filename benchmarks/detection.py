"""What the suspicion of a purifier is worth: an image whose answer moves when it is purified is turned away.

    python benchmarks/detection.py --data mnist --eps 0.3 --classifier zoo:mnist-resnet8 \
        --defense zoo:finetune-mnist --defense runs/harden-mnist

The threshold turns away 5 % of clean validation images. Each attacker runs APGD on the margin, 100 steps, on what he
knows: the classifier alone (oblivious), classifier and purifier together (white box), and both and the detector
(adaptive: the mean of the logits before and after purifying, so that both say the same wrong class). An attack succeeds
where the answer behind the purifier is wrong and is not turned away.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import unperturb as up
from unperturb import runs
from unperturb.attackers import Ensemble
from unperturb.intervals import wilson

ROOT = Path(__file__).resolve().parent.parent
FALSE_ALARMS = 0.05


def judged(protected: up.Protected, on: nn.Module, images: Tensor, labels: Tensor, limit: float, eps: str) -> Any:
    """One attacker, who attacks `on`: AUROC of the suspicion, and how often he gets through."""
    x = up.create_attack("apgd", eps=eps, steps=100, loss="margin")(on, images, labels)
    with torch.no_grad():
        clean, attacked = protected.suspicion(images), protected.suspicion(x)
        wrong = protected(x).argmax(1) != labels
    through = int((wrong & (attacked <= limit)).sum())
    truth = [0] * len(images) + [1] * len(images)
    low, high = wilson(through, len(images))
    return {
        "auroc": round(float(roc_auc_score(truth, torch.cat([clean, attacked]).tolist())), 4),
        "wrong": round(float(wrong.float().mean()), 4),
        "turned away": round(float((attacked > limit).float().mean()), 4),
        "success": round(through / len(images), 4),
        "success low": round(low, 4),
        "success high": round(high, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--eps", default="0.3", help="in Linf, a number or a fraction such as 8/255")
    parser.add_argument("--classifier", default="zoo:mnist-resnet8")
    parser.add_argument("--defense", action="append", help="repeatable")
    parser.add_argument("--n", type=int, default=500, help="test images, a fixed random subset")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "detection")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = up.load_dataset(options.data)
    images, labels = data.test.subset(options.n).batch(torch.arange(options.n))
    held_out, _ = data.val.subset(1000).batch(torch.arange(1000))
    classifier = up.load_classifier(options.classifier)
    lines = []
    for entry in options.defense or ["zoo:finetune-mnist"]:
        protected = up.Protected(classifier, up.load_defense(entry)).eval()
        limit = float(protected.suspicion(held_out).quantile(1 - FALSE_ALARMS))
        alarms = float((protected.suspicion(images) > limit).float().mean())
        knows = {"oblivious": classifier, "white box": protected, "adaptive": Ensemble(classifier, protected).eval()}
        for knowledge, on in knows.items():
            found = judged(protected, on, images, labels, limit, options.eps)
            name = entry.rsplit("/", 1)[-1].removeprefix("zoo:")
            line = {"data": options.data, "defense": name, "knowledge": knowledge, "n": options.n, "eps": options.eps}
            lines.append(line | {"threshold": round(limit, 4), "false alarms": round(alarms, 4)} | found)
            print(lines[-1], flush=True)
    runs.write_json(options.out / f"{options.data}.json", {"environment": runs.environment(), "lines": lines})


if __name__ == "__main__":
    main()
