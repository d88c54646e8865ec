"""The benchmarks of the attacks run, and write what they say they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unperturb.attacks import attacks

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "attacks.py"


@pytest.mark.slow
def test_the_attack_benchmark_runs_ours_beside_the_peers(tmp_path: Path) -> None:
    out = tmp_path / "attacks.json"
    command = [sys.executable, SCRIPT, "--quick", "--attacks", "fgsm", "--sizes", "28", "--out", out]
    environment = {**os.environ, "COLUMNS": "140"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr

    record = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["library"]: row for row in record["rows"]}
    assert {"ours", "ours, fused copy", "torchattacks", "foolbox", "ART"} <= set(rows)
    assert record["environment"]["threads"] == 1
    assert record["models"][0]["images"] == [16, 1, 28, 28]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for row in rows.values():
        assert "error" not in row, row
        assert row["passes"] == pytest.approx(1)
        assert row["overhead"]["median"] > 0
        # One step of the sign of the gradient: any implementation finds the same images, but for a zero's sign.
        assert row["success"] == pytest.approx(rows["ours"]["success"], abs=1 / 16)
        assert row["distance"] == pytest.approx(0.1, abs=1e-6)
        assert row["images_per_second"] == pytest.approx(16 / row["seconds"]["median"])
    assert 0 < rows["ours"]["success"] <= 1
    assert rows["ours"]["times_ours"] == 1
    for name in ("torchattacks", "foolbox", "ART"):
        told = [line for line in record["loses"] if f"against {name}: slower" in line]
        assert len(told) == (rows[name]["times_ours"] < 1)
    assert "ours, fused copy" in done.stdout


@pytest.mark.slow
def test_no_attack_takes_more_memory_than_two_passes_and_a_few_copies(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    command = [sys.executable, SCRIPT.with_name("attacks_memory.py"), "--sizes", "28", "--n", "16", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["attack"] for row in rows} == set(attacks)
    images = 16 * 28 * 28 * 4
    for row in rows:
        assert row["pass_bytes"] > 4 * images, row  # the activations of a LeNet alone are more
        assert row["bytes"] >= images, row
        assert row["met"], row
