"""The zoo by name, and how to make what is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unperturb import cli, zoo
from unperturb.classifiers import classifiers, load_classifier
from unperturb.defenses import load_defense
from unperturb.evaluation import training_cost
from unperturb.evaluation.plan import name_of
from unperturb.registry import UnknownNameError
from unperturb.runs import RunError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside every clone, with the package installed elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNPERTURB_ZOO", raising=False)
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "lib" / "python3" / "unperturb" / "zoo.py"))
    return tmp_path


def test_the_zoo_is_found_from_inside_a_clone_and_by_a_package_that_runs_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ROOT / "zoo" / "mnist-lenet5"
    for place in (ROOT, ROOT / "docs" / "defenses", tmp_path):
        monkeypatch.chdir(place)
        assert zoo.find("zoo:mnist-lenet5") == there
    assert load_classifier("zoo:mnist-lenet5").spec == load_classifier(there).spec
    assert load_defense("zoo:protect-mnist").spec == load_defense(ROOT / "zoo" / "protect-mnist").spec
    assert len(load_defense("zoo:protect-mnist+jpeg").stages()) == 2
    assert zoo.find("runs/x") == "runs/x"


def test_away_from_a_clone_the_error_says_where_to_get_it(away: Path) -> None:
    for load in (load_classifier, load_defense):
        with pytest.raises(
            FileNotFoundError, match=r"zoo:mnist-lenet5: there is no zoo here\. .* inside a clone, .* in UNPERTURB_ZOO$"
        ):
            load("zoo:mnist-lenet5")
    listed = CliRunner().invoke(cli.app, ["list", "zoo"])
    assert listed.exit_code == 0
    assert "there is no zoo here" in listed.output
    (away / "zoo").symlink_to(ROOT / "zoo")
    assert load_classifier("zoo:mnist-lenet5").spec


def test_away_from_a_clone_the_zoo_may_be_named(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_ZOO", str(ROOT / "zoo"))
    assert zoo.find("zoo:mnist-lenet5") == ROOT / "zoo" / "mnist-lenet5"
    assert load_classifier("zoo:mnist-lenet5").spec == load_classifier(ROOT / "zoo" / "mnist-lenet5").spec
    # It comes before a zoo that lies here.
    (away / "zoo" / "mnist-lenet5").mkdir(parents=True)
    (away / "zoo" / "mnist-lenet5" / "classifier.json").write_text("{}")
    assert zoo.find("zoo:mnist-lenet5") == ROOT / "zoo" / "mnist-lenet5"
    # A mistake in it is not passed over in silence.
    monkeypatch.setenv("UNPERTURB_ZOO", str(away / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"UNPERTURB_ZOO is .*nowhere, where there are no trained models"):
        zoo.find("zoo:mnist-lenet5")


def test_a_name_that_the_zoo_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UnknownNameError, match="Did you mean 'mnist-resnet8'"):
        zoo.find("zoo:mnist-resnet9")
    with pytest.raises(UnknownNameError):
        zoo.find("zoo:../src")


def test_tables_call_the_zoos_as_they_call_run_folders() -> None:
    assert name_of("zoo:finetune-mnist", "mnist") == name_of("runs/finetune-mnist", "mnist") == "finetune"
    assert name_of("zoo:finetune-mnist+jpeg", "mnist") == "finetune+jpeg"


def test_what_the_zoos_have_cost_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    first, last = (
        json.loads((ROOT / "zoo" / n / "training.json").read_text()) for n in ("protect-mnist", "finetune-mnist")
    )
    assert training_cost.of_folder("zoo:finetune-mnist")[0] == pytest.approx(first["pflop"] + last["pflop"], rel=1e-4)
    # A run that began with the zoo's weights has cost theirs too; away from the zoo nobody knows.
    (tmp_path / "defense.json").write_text("{}")
    (tmp_path / "training.json").write_text('{"pflop": 1.0, "seconds": 2.0}')
    (tmp_path / "recipe.json").write_text('{"start": "zoo:protect-mnist"}')
    assert training_cost.of_folder(tmp_path)[0] == pytest.approx(1 + first["pflop"], rel=1e-4)
    monkeypatch.setattr(zoo, "folders", dict)
    assert training_cost.of_folder(tmp_path) == training_cost.UNKNOWN


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("runs/digits-convnet", "train one with: unperturb train-classifier classifier-digits"),
        ("runs/digits-lenet5", "unperturb train-classifier classifier-digits --set classifier.name=lenet5"),
        (
            "runs/fashion_mnist-lenet5",
            """unperturb train-classifier classifier-fashion_mnist --set 'classifier={name="lenet5"}'""",
        ),
        ("runs/adversarial-digits", "unperturb train-classifier adversarial-digits"),
        ("runs/hgd-digits", "unperturb train hgd-digits"),
        ("mine/hgd-digits", "unperturb train hgd-digits --out mine/hgd-digits"),
        ("runs/own", "unperturb train RECIPE --out runs/own"),
        ("runs/white_box-mnist", "unperturb train RECIPE --out runs/white_box-mnist"),
    ],
)
def test_how_to_make_a_run_folder(folder: str, said: str, away: Path) -> None:
    assert zoo.how_to_make(folder, classifiers).endswith(said)


def test_a_missing_run_is_answered_with_the_command_and_the_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RunError, match=r"train-classifier classifier-mnist --out .*; or take zoo:mnist-resnet8$"):
        load_classifier(tmp_path / "mnist-resnet8")
    with pytest.raises(
        RunError, match=r"holds no trained defense; train one with: unperturb train protect-mnist .*zoo:pro"
    ):
        load_defense(tmp_path / "protect-mnist")


def test_what_is_of_another_kind_is_called_so_and_nobody_is_sent_into_the_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    purifier = r"is a purifier, not a classifier: put it before one, by --defense"
    for given in ("zoo:finetune-mnist", "zoo/finetune-mnist", ROOT / "zoo" / "finetune-mnist", "jpeg+median"):
        with pytest.raises(RunError, match=f"^{re.escape(str(given))} {purifier} {re.escape(str(given))} ") as error:
            load_classifier(given)
        assert "train" not in str(error.value)
    classifier = r"^zoo:mnist-lenet5 is a classifier, not a purifier: pass it as the model .* by --classifier"
    with pytest.raises(RunError, match=classifier) as error:
        load_defense("zoo:mnist-lenet5")
    assert "--out" not in str(error.value)
    with pytest.raises(RunError, match=r"^zoo:mnist-lenet5 is a classifier"):
        load_defense("jpeg+zoo:mnist-lenet5")
    for load, name in ((load_classifier, "hgd-digits"), (load_classifier, "nobody"), (load_defense, "nobody")):
        with pytest.raises(RunError, match="train one with: unperturb train") as error:
            load(ROOT / "zoo" / name)
        assert "--out runs/nobody" in str(error.value) or "--out" not in str(error.value)
