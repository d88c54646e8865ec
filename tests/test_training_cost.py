"""What training has cost, kept beside the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from toy import Linear, purifier, toy
from unperturb import runs
from unperturb.attacks import create_attack
from unperturb.classifiers import create_classifier, save_classifier
from unperturb.config import resolve
from unperturb.defenses import Protected, save_defense
from unperturb.evaluation import adversarials, training_cost
from unperturb.evaluation.run import evaluate, run_evaluation
from unperturb.results import schema
from unperturb.systems import System


def trained(folder: Path, kind: str, pflop: float | None, where: str = "training.json", **recipe: Any) -> str:
    """A run folder as far as its cost goes."""
    outcome = {"pflop": pflop, "seconds": 10.0}
    place = {"defense": "about", "classifier": "extra"}[kind]
    kept = {place: {"outcome": outcome}} if where == "inside" and pflop is not None else {}
    runs.write_json(folder / f"{kind}.json", {"name": "paired_gan", **kept})
    if where == "training.json" and pflop is not None:
        runs.write_json(folder / "training.json", outcome)
    runs.write_json(folder / "recipe.json", recipe)
    return str(folder)


@pytest.mark.parametrize("where", ["training.json", "inside"])
def test_what_a_folder_has_cost(where: str, tmp_path: Path) -> None:
    first = trained(tmp_path / "first", "defense", 0.5, where)
    second = trained(tmp_path / "second", "defense", 0.25, where, start=first)
    teacher = trained(tmp_path / "teacher", "classifier", 1.0, where)
    pupil = trained(tmp_path / "pupil", "classifier", 2.0, where, objective={"teacher": "runs/elsewhere/teacher"})
    assert training_cost.of_folder(first) == (0.5, 10.0)
    assert training_cost.of_folder(second) == (0.75, 20.0)  # with what it started from
    assert training_cost.of_folder(teacher) == (1.0, 10.0)
    assert training_cost.of_folder(pupil) == (3.0, 20.0)  # the teacher has moved along with it
    assert training_cost.of_folder(f"{first}+jpeg") == (0.5, 10.0)
    assert training_cost.of_folder(f"{first}+{second}") == (1.25, 30.0)
    assert training_cost.of_folder("median") == training_cost.of_folder("undefended") == (0.0, 0.0)
    unknown = trained(tmp_path / "unknown", "classifier", None, where)
    assert training_cost.of_folder(unknown) == (None, None)
    assert training_cost.of_folder(f"{first}+{unknown}") == (None, None)
    orphan = trained(tmp_path / "orphan", "defense", 0.25, where, start="runs/gone")
    assert training_cost.of_folder(orphan) == (None, None)
    itself = trained(tmp_path / "itself", "defense", 0.25, where, start=str(tmp_path / "itself"))
    assert training_cost.of_folder(itself) == (None, None)
    runs.write_json(tmp_path / "itself" / "recipe.json", ["not", "a", "recipe"])
    with pytest.raises(runs.RunError, match=r"recipe\.json"):
        training_cost.of_folder(itself)


def test_an_evaluation_keeps_what_its_systems_have_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarials, "cache_folder", lambda: tmp_path / "cache")
    torch.manual_seed(0)
    net = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    save_classifier(tmp_path / "digits-convnet", net)
    save_classifier(tmp_path / "robust-digits", net)
    ours = str(tmp_path / "ours-digits")
    save_defense(Path(ours), purifier(), {})
    runs.write_json(Path(ours) / "training.json", {"pflop": 0.125, "seconds": 7.0})
    recipe = {
        "kind": "evaluation",
        "dataset": "digits",
        "size": 8,
        "n": 2,
        "classifiers": [str(tmp_path / "digits-convnet")],
        "systems": ["undefended", ours, f"{ours}+bit_depth", str(tmp_path / "robust-digits")],
        "attacks": [{"name": "fgsm", "eps": 0.1}],
    }
    run_evaluation(resolve(recipe), tmp_path / "out", device="cpu")
    kept = schema.read_systems(tmp_path / "out")
    assert [name for _, name in kept] == ["undefended", "ours", "ours+bit_depth", "robust"]
    (source,) = {dataset for dataset, _ in kept}
    assert source == schema.read_rows(tmp_path / "out")["dataset"].iloc[0]
    assert [about["pflop"] for about in kept.values()] == [0.0, 0.125, 0.125, None]
    assert [about["differentiable"] for about in kept.values()] == [True, True, False, True]
    assert [about["defended"] for about in kept.values()] == [False, True, True, True]
    assert kept[source, "ours"]["spec"]["name"] == "paired_gan"
    assert kept[source, "ours"]["folder"] == ours
    # Models in hand: what was just trained knows its cost, what comes from elsewhere does not.
    bare = Linear()
    systems = {"bare": bare, "ours": Protected(bare, purifier()), "robust": System("robust", Linear(1), base=bare)}
    fgsm = create_attack("fgsm", eps=0.1)
    evaluate(toy(), systems, [fgsm], ["oblivious"], out=tmp_path / "hand", device="cpu")
    assert {name: about["pflop"] for (_, name), about in schema.read_systems(tmp_path / "hand").items()} == {
        "bare": 0.0,
        "ours": None,
        "robust": None,
    }
