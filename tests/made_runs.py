"""Run folders for tests: made-up outcomes over real digits, as an evaluation writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from made_rows import columns
from unperturb import runs
from unperturb.data import load_dataset
from unperturb.results.samples import write_samples
from unperturb.results.schema import cell_folder, write_rows

# By system: how large a budget its median image stands, by what the attacker knows.
MARGINS: dict[str, dict[str, float]] = {
    "undefended": {"none": 0.5, "transfer": 0.25, "oblivious": 0.06},
    "ours": {"none": 2.0, "transfer": 1.6, "oblivious": 1.2, "bpda": 0.4, "white_box": 0.12, "black_box": 0.5},
}
# An attack: its name, its class, its budget (NaN: none), and who of the attackers makes it.
ATTACKS: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("noise", "Noise", 0.3, ("none",)),
    ("fgsm", "FGSM", 0.3, ("transfer", "oblivious")),
    ("pgd-40", "PGD", 0.3, ("oblivious", "bpda", "white_box")),
    ("cw", "CW", float("nan"), ("oblivious", "white_box")),
    ("square", "Square", 0.3, ("black_box",)),
)


def make_run(
    folder: Path,
    *,
    systems: Mapping[str, Mapping[str, float]] = MARGINS,
    attacks: Sequence[tuple[str, str, float, tuple[str, ...]]] = ATTACKS,
    classifiers: Sequence[str] = ("conv",),
    n: int = 30,
    samples: int = 3,
    costs: Mapping[str, tuple[float, float]] | None = None,
    random: Sequence[str] = (),
    class_names: Sequence[str] = (),
) -> Path:
    """A run over the first `n` test digits. An image has a margin, other for each system and attacker; an attack of a
    budget beyond it turns it, one without a budget turns it just there.

    systems: as `MARGINS`; "undefended" has no purifier. costs: by system, milliseconds an image and PFLOP. random: the
    systems that answer in three draws.
    """
    images = load_dataset("digits").test
    clean, labels = images.images[:n], images.labels[:n]
    label, shown = labels.numpy(), clean[:samples].numpy() / 255
    for c, classifier in enumerate(classifiers):
        for s, (system, margins) in enumerate(systems.items()):
            hard = np.random.default_rng([c, s]).normal(size=n)  # an image that is hard is hard for every attack
            right_clean = hard > -2.3
            for a, (attack, kind, eps, kinds) in enumerate(attacks):
                for knowledge in (k for k in kinds if k in margins):
                    rng = np.random.default_rng([c, s, a, len(knowledge)])
                    margin = margins[knowledge] * np.exp(0.35 * hard + 0.1 * rng.normal(size=n)) * (1 + 0.08 * (c + 1))
                    free = eps != eps
                    far = np.minimum(margin, 1) if free else np.full(n, eps)
                    defended = system != "undefended"
                    cell: dict[str, Any] = {
                        "dataset": "digits",
                        "split": f"test:{n}@0",
                        "classifier": classifier,
                        "system": system,
                        "defended": defended,
                        "attack": attack,
                        "attack_repr": f"{kind}()" if free else f"{kind}(norm='linf', eps={eps})",
                        "norm": "" if free else "linf",
                        "eps": eps,
                        "knowledge": knowledge,
                        "surrogate": "another" if knowledge == "transfer" else "",
                        "seed": 0,
                    }
                    draws = 3 if system in random else 1
                    parts = []
                    for draw in range(draws):
                        noise = np.random.default_rng([c, s, a, draw]).normal(size=n) if draws > 1 else np.zeros(n)
                        stands = right_clean & (margin * np.exp(0.1 * noise) > (far if not free else 2.0))
                        parts.append(_seen(label, right_clean, stands, defended, rng) | {"draw": np.full(n, draw)})
                    seen = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
                    again = {"index": np.tile(np.arange(n), draws), "label": np.tile(label, draws)}
                    again |= {"linf": np.tile(far, draws), "l2": np.tile(far * 12, draws), "l0": 500}
                    ms = (costs or {}).get(system, (0.4 if defended else 0.0, 0.0))[0]
                    asked = {"gradients": 40, "zero_gradients": 0, "nonfinite": 0, "seconds_attack": 0.01}
                    filled = columns(n * draws, **cell, **seen, **again, **asked, seconds_purify=ms / 1000)
                    key = cell_folder(classifier, system, attack, knowledge)
                    write_rows(folder / "rows" / key / "00000.parquet", filled)
                    write_samples(
                        folder / "samples" / f"{key}.safetensors",
                        _sample(shown, label, seen, far[:samples], rng, defended),
                        cell | {"class_names": list(class_names or map(str, range(10)))},
                    )
    about = {
        system: {
            "dataset": "digits",
            "folder": f"runs/{system}",
            "spec": None,
            "differentiable": True,
            "random": system in random,
            "defended": system != "undefended",
            "pflop": (costs or {}).get(system, (0.0, 0.05 if system != "undefended" else 0.0))[1],
            "seconds": 60.0,
        }
        for system in systems
    }
    runs.write_json(folder / "systems.json", about)
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


def _seen(label: Any, right_clean: Any, stands: Any, defended: bool, rng: np.random.Generator) -> dict[str, Any]:
    """Predictions, confidences and likeness of one draw."""
    n = len(label)
    bare = (right_clean | (rng.random(n) < 0.5), rng.random(n) < 0.05) if defended else (right_clean, stands)
    views = {"clean": bare[0], "adv": bare[1], "pure_clean": right_clean, "pure_adv": stands}
    seen: dict[str, Any] = {f"pred_{k}": np.where(v, label, (label + 3) % 10) for k, v in views.items()}
    seen |= {f"conf_{k}": np.where(v, 0.98, 0.03) * rng.uniform(0.7, 1, n) for k, v in views.items()}
    far = {"psnr_adv": 12.9, "psnr_pure_adv": 25.3, "psnr_pure_clean": 31.0} if defended else {}
    near = {"ssim_adv": 0.41, "ssim_pure_adv": 0.93, "ssim_pure_clean": 0.98}
    same = {"psnr_adv": 12.9, "psnr_pure_adv": 12.9, "psnr_pure_clean": np.inf}
    seen |= {k: rng.normal(v, 1, n) for k, v in (far or same).items()}
    return seen | {k: rng.normal(v, 0.01, n) for k, v in near.items()}


def _sample(
    clean: Any, label: Any, seen: Mapping[str, Any], far: Any, rng: np.random.Generator, defended: bool
) -> dict[str, Any]:
    """What a run keeps of the first images, for figures."""
    m = len(clean)
    noisy = np.clip(clean + far[:, None, None, None] * np.sign(rng.normal(size=clean.shape)), 0, 1)
    restored = clean + 0.2 * (noisy - clean) if defended else noisy
    views = {"clean": clean, "adversarial": noisy, "restored": restored, "restored_clean": clean}
    tensors = {k: torch.from_numpy((255 * v).round().astype(np.uint8)) for k, v in views.items()}
    tensors["index"] = torch.arange(m)
    tensors["label"] = torch.from_numpy(label[:m].astype(np.int64))
    order = ("clean", "adv", "pure_clean", "pure_adv")
    for name, column, dtype in (("confidence", "conf", np.float32), ("prediction", "pred", np.int64)):
        tensors[name] = torch.from_numpy(np.stack([seen[f"{column}_{k}"][:m] for k in order], 1).astype(dtype))
    return tensors
