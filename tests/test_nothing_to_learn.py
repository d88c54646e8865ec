"""Defenses that have nothing to learn: the same verb makes their run folder, and judges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unperturb import runs
from unperturb.classifiers import create_classifier
from unperturb.config import resolve
from unperturb.data import load_dataset
from unperturb.defenses import create_defense, load_defense
from unperturb.training import jobs


def net(seed: int) -> Any:
    torch.manual_seed(seed)
    return create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35]).eval()


def test_a_filter_is_trained_by_the_same_verb(tmp_path: Path) -> None:
    data = load_dataset("digits", size=8)
    recipe = resolve(
        {
            "kind": "defense",
            "dataset": "digits",
            "size": 8,
            "classifiers": ["unused"],
            "defense": {"name": "jpeg", "quality": 30},
            "adversarial_batches": {"attacks": [{"name": "fgsm", "eps": 0.1}]},
            "training": {"steps": 1},
        }
    )
    task = jobs.defense_task(recipe, data, [net(0)])
    assert jobs.estimate(task, recipe.training).pflop == 0
    defense = jobs.train_defense(recipe, net(0), data, out=tmp_path / "run", device="cpu")
    assert (defense.outcome.steps, defense.outcome.pflop) == (0, 0.0)
    images, labels = data.val.batch(torch.arange(len(data.val)))
    right = (net(0)(create_defense("jpeg", quality=30).purify(images)).argmax(1) == labels).float().mean()
    assert defense.outcome.validation["clean"] == pytest.approx(float(right.detach()), abs=2.1 / len(images))
    assert set(defense.outcome.validation) == {"clean", "fgsm-0", "score"}
    assert runs.read_json(tmp_path / "run" / "training.json")["validation"] == defense.outcome.validation
    assert torch.equal(load_defense(tmp_path / "run").purify(images), create_defense("jpeg", quality=30).purify(images))
    again = jobs.train_defense(recipe, net(0), data, out=tmp_path / "run", device="cpu", resume=True)
    assert again.outcome.validation == defense.outcome.validation


def test_a_pipeline_of_filters_is_a_recipe_too(tmp_path: Path) -> None:
    data = load_dataset("digits", size=8)
    parts = [{"name": "bit_depth", "bits": 2}, {"name": "median"}]
    recipe = resolve(
        {
            "kind": "defense",
            "dataset": "digits",
            "size": 8,
            "classifiers": ["unused"],
            "defense": {"name": "pipeline", "parts": parts},
            "adversarial_batches": {"knowledge": "white_box", "attacks": [{"name": "fgsm", "eps": 0.1}]},
            "training": {"steps": 1},
        }
    )
    defense = jobs.train_defense(recipe, nn.Sequential(net(0)), data, out=tmp_path / "run", device="cpu")
    assert defense.spec == {"name": "pipeline", "options": {"parts": parts}}
