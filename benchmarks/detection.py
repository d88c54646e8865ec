"""What the suspicion of a purifier is worth: an image whose answer moves when it is purified is turned away.

    python benchmarks/detection.py --data mnist --eps 0.3 --classifier zoo:mnist-resnet8 \
        --defense zoo:finetune-mnist --defense runs/harden-mnist

The threshold turns away 5 % of clean validation images. Each attacker runs APGD on what he knows: 100 steps on the
margin of the classifier alone (oblivious), or of classifier and purifier together (white box). The adaptive one knows
the detector, too. He goes 200 steps towards each of the likeliest wrong classes by the mean of the log-probabilities
before and after purifying, so that both say the same; of these images the least suspicious that is wrong counts. An
attack succeeds where the answer behind the purifier is wrong and is not turned away.
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
from unperturb.intervals import wilson

ROOT = Path(__file__).resolve().parent.parent
FALSE_ALARMS = 0.05
TARGETS = 3


class Both(nn.Module):
    """The mean of the log-probabilities before and after purifying: high for a class that both answers are sure of."""

    def __init__(self, protected: up.Protected) -> None:
        super().__init__()
        self.protected = protected

    def forward(self, images: Tensor) -> Tensor:
        answers = (self.protected.classifier(images), self.protected(images))
        return torch.stack([answer.log_softmax(1) for answer in answers]).mean(0)


def adversarials(protected: up.Protected, knowledge: str, images: Tensor, labels: Tensor, eps: str) -> list[Tensor]:
    """What an attacker with this knowledge tries."""
    steps = 100
    if knowledge == "adaptive":
        attack, on = up.create_attack("apgd", eps=eps, steps=2 * steps), Both(protected)
        with torch.no_grad():
            likely = on(images).scatter(1, labels[:, None], -torch.inf).topk(TARGETS).indices
        return [attack(on, images, labels, targets=likely[:, k]) for k in range(TARGETS)]
    on = protected if knowledge == "white box" else protected.classifier
    return [up.create_attack("apgd", eps=eps, steps=steps, loss="margin")(on, images, labels)]


def judged(protected: up.Protected, knowledge: str, images: Tensor, labels: Tensor, limit: float, eps: str) -> Any:
    """One attacker: AUROC of the suspicion, and how often he gets through."""
    with torch.no_grad():
        clean = protected.suspicion(images)
        tried = [
            (protected.suspicion(x), protected(x).argmax(1) != labels)
            for x in adversarials(protected, knowledge, images, labels, eps)
        ]
    suspicions, wrongs = (torch.stack(parts) for parts in zip(*tried))
    best = torch.where(wrongs, suspicions, suspicions + 1).argmin(0)  # wrong before right, then the least suspicious
    attacked, wrong = (parts.gather(0, best[None])[0] for parts in (suspicions, wrongs))
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
        for knowledge in ("oblivious", "white box", "adaptive"):
            found = judged(protected, knowledge, images, labels, limit, options.eps)
            name = entry.rsplit("/", 1)[-1].removeprefix("zoo:")
            line = {"data": options.data, "defense": name, "knowledge": knowledge, "n": options.n, "eps": options.eps}
            lines.append(line | {"threshold": round(limit, 4), "false alarms": round(alarms, 4)} | found)
            print(lines[-1], flush=True)
    runs.write_json(options.out / f"{options.data}.json", {"environment": runs.environment(), "lines": lines})


if __name__ == "__main__":
    main()
