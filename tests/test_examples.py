"""Each example runs as it stands, is short, and shows what it says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from unperturb.results import Results, robust_accuracy
from unperturb.threat_models import ThreatModel

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs an example where the zoo is at hand; gives its names."""
    (tmp_path / "zoo").symlink_to(ROOT / "zoo")
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def accuracy(rows: Any, system: str, knowledge: str) -> float:
    threat = ThreatModel("linf", 0.2, knowledge)
    return robust_accuracy(Results(rows), threat, system=system).accuracy


def test_each_is_short_and_tested() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) < 80, path.name
        assert f'run("{path.stem}")' in tests, path.name


def test_a_net_by_its_import_path(run: Any) -> None:
    assert run("own_net")["net"]()(torch.rand(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("no_probe")
def test_own_model_and_data(run: Any) -> None:
    rows = run("own_model_and_data")["rows"]
    assert accuracy(rows, "ours", "oblivious") > accuracy(rows, "undefended", "oblivious") + 0.2
    assert accuracy(rows, "ours", "white_box") <= accuracy(rows, "ours", "oblivious")
    assert Path("runs/own-digits/defense.json").exists()


def test_an_attack_of_another_library(run: Any) -> None:
    pytest.importorskip("foolbox")
    rows = run("attack_of_another_library")["rows"]
    wrong = {name: float((part["pred_adv"] != part["label"]).mean()) for name, part in rows.groupby("attack")}
    assert set(wrong) == {"ours", "foolbox"}
    assert wrong["foolbox"] == pytest.approx(wrong["ours"], abs=0.1)
    assert min(wrong.values()) > 0.3


def test_own_defense(run: Any) -> None:
    rows = run("own_defense")["rows"]
    assert accuracy(rows, "levels", "bpda") < accuracy(rows, "levels", "oblivious")  # BPDA sees through it
    assert accuracy(rows, "levels", "oblivious") > accuracy(rows, "undefended", "oblivious")


def test_own_loss(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shares = run("own_loss")["shares"]
    assert "loss=probability" in capsys.readouterr().out
    assert 0.1 < shares["own"] <= shares["margin"] + 0.05


@pytest.mark.slow
def test_export(run: Any) -> None:
    for library in ("onnx", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed (pip install 'unperturb[onnx]')")
    found = run("export_onnx")
    assert found["logits"].shape == (5, 10)
    assert found["about"]["kind"] == "protected"
    with torch.no_grad():
        expected = found["protected"](torch.from_numpy(found["images"][:5]))
    assert float((torch.from_numpy(found["logits"]) - expected).abs().max()) < 1e-3
    assert Path("protected-int8.onnx").stat().st_size < 0.5 * Path("protected.onnx").stat().st_size
