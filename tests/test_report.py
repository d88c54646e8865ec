"""Tables counted by hand, figures, and the page, from rows and samples written as a run writes them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from unperturb import runs
from unperturb.intervals import wilson

KEPT = {"oblivious": 0.95, "white_box": 0.1}  # the share of images a defense saves, in the made-up runs


def columns(n: int, **given: Any) -> dict[str, Any]:
    """Every column of `n` rows, dull where not given."""
    blank = {k: {"string": "", "list<float32>": [[]] * n, "bool": False}.get(v, 0) for k, v in runs.ROW_COLUMNS.items()}
    return blank | {"index": np.arange(n), "defense": "none", "knowledge": "oblivious", "split": "test"} | given


def make_run(
    folder: Path,
    *,
    dataset: str = "digits",
    classifiers: tuple[str, ...] = ("lenet5", "conv", "resnet8"),
    defenses: tuple[str, ...] = ("none", "ours"),
    attacks: tuple[str, ...] = ("fgsm", "pgd-40", "mim-10"),
    eps: float = 0.3,
    n: int = 200,
    samples: int = 10,
) -> Path:
    """A run folder of made-up outcomes over real digits."""
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    clean = np.kron(digits[:samples].reshape(-1, 1, 8, 8) / 16, np.ones((1, 1, 3, 3)))
    clean = np.pad(clean, ((0, 0), (0, 0), (2, 2), (2, 2)))
    label = labels[:n]
    for c, classifier in enumerate(classifiers):
        for d, defense in enumerate(defenses):
            for a, attack in enumerate(attacks):
                for knowledge in ("oblivious",) if defense == "none" else ("oblivious", "white_box"):
                    rng = np.random.default_rng([c, d, a, len(knowledge)])
                    kept = 0.05 if defense == "none" else KEPT[knowledge] - 0.02 * a - 0.03 * c

                    hard = np.random.default_rng([c, d]).random(n)  # an image that is hard is hard for every attack

                    def judged(chance: float, jitter: float = 0.02, hard: Any = hard, rng: Any = rng) -> Any:
                        return np.where(hard + jitter * rng.normal(size=n) < chance, label, (label + 1) % 10)

                    bare_clean, bare = judged(0.99, 0), judged(0.05)
                    pure = (bare_clean, bare) if defense == "none" else (judged(0.98, 0), judged(kept))
                    views = [bare_clean, bare, *pure]
                    cell = {
                        "dataset": dataset,
                        "split": "test",
                        "classifier": classifier,
                        "defense": defense,
                        "attack": attack,
                        "attack_repr": f"{attack.partition('-')[0].upper()}(targets=None, norm='linf', eps={eps})",
                        "eps": eps,
                        "knowledge": knowledge,
                        "surrogate": "",
                        "seed": 0,
                    }
                    sure = [np.where(v == label, 0.98, 0.03) * rng.uniform(0.7, 1, n) for v in views]
                    names = ("clean", "adv", "pure_clean", "pure_adv")
                    similar = {
                        "psnr_adv": rng.normal(12.9, 1, n),
                        "psnr_pure_adv": rng.normal(25.3, 1, n) if defense != "none" else np.full(n, 12.9),
                        "psnr_pure_clean": rng.normal(31, 1, n) if defense != "none" else np.full(n, np.inf),
                        "ssim_adv": rng.normal(0.41, 0.03, n),
                        "ssim_pure_adv": rng.normal(0.93, 0.01, n),
                        "ssim_pure_clean": rng.normal(0.98, 0.01, n),
                    }
                    seen = {f"pred_{k}": v for k, v in zip(names, views)} | {f"conf_{k}": v for k, v in zip(names, sure)}
                    key = f"{classifier}-{defense}-{attack}-{knowledge}"
                    shard = folder / "rows" / key / "00000.parquet"
                    runs.write_rows(shard, columns(n, **cell, label=label, **seen, **similar))

                    noisy = np.clip(clean + eps * np.sign(rng.normal(size=clean.shape)), 0, 1)
                    left = 0.08 if knowledge == "oblivious" else 0.5
                    tensors = {
                        "clean": clean,
                        "adversarial": noisy,
                        "restored": clean + left * (noisy - clean),
                        "restored_clean": clean * 0.98,
                    }
                    tensors = {k: torch.from_numpy((255 * v).round().astype(np.uint8)) for k, v in tensors.items()}
                    order = (0, 1, 2, 3)
                    tensors |= {
                        "index": torch.arange(samples),
                        "label": torch.from_numpy(label[:samples].astype(np.int64)),
                        "confidence": torch.tensor(np.stack([sure[i][:samples] for i in order], 1), dtype=torch.float32),
                        "prediction": torch.from_numpy(np.stack([views[i][:samples] for i in order], 1).astype(np.int64)),
                    }
                    words = [str(i) for i in range(10)]
                    runs.write_samples(folder / "samples" / f"{key}.safetensors", tensors, cell | {"class_names": words})
    runs.write_json(folder / "recipe.json", {"name": "made-up"})
    runs.write_json(
        folder / "environment.json",
        {
            "date": "2020-01-01",
            "python": "3.11.0",
            "versions": {"unperturb": "0.1.0", "torch": "2.13.0"},
            "device": "cpu AVX2",
            "threads": 1,
            "commit": "0123abc",
        },
    )
    return folder
