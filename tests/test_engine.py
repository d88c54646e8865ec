"""Cells made on Ray: the very rows of one process, whatever is killed or stopped on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from toy import Linear, purifier
from unperturb import runs
from unperturb.classifiers import create_classifier, save_classifier
from unperturb.config import resolve, snapshot
from unperturb.defenses import save_defense
from unperturb.evaluation import adversarials, run
from unperturb.evaluation import engine as engines
from unperturb.evaluation.engine import Ray, parts_of
from unperturb.evaluation.grid import at_work
from unperturb.evaluation.plan import plan_of
from unperturb.evaluation.run import run_evaluation
from unperturb.registry import UnknownNameError
from unperturb.results import samples

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'unperturb[ray]'")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a bare classifier, a purifier and a cache, and Ray with two workers."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    net = create_classifier("convnet", channels=1, size=8, classes=10, mean=[0.3], std=[0.35])
    save_classifier(folder / "digits-convnet", net)
    save_defense(folder / "ours-digits", purifier(), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("UNPERTURB_CACHE", str(folder / "cache"))
        for last in (False, False, True):  # where other tests take all cores, Ray's own processes may start too late
            try:
                ray.init(num_cpus=2, include_dashboard=False, logging_level="error", object_store_memory=80 * 1024**2)
                break
            except Exception:
                ray.shutdown()
                if last:
                    raise
        yield folder
        ray.shutdown()


@pytest.fixture(autouse=True)
def _without_a_probe(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What flags are raised from takes longer than all rows here; nothing is kept from the test before."""
    monkeypatch.setattr(run, "probe", lambda *_, **__: {})
    shutil.rmtree(home / "cache" / "adversarials", ignore_errors=True)


def recipe(home: Path, **changed: Any) -> Any:
    """Attacks on every image, and those of a ladder on what is left."""
    pgd = {"attack": {"name": "pgd", "eps": 0.1, "steps": 300}}
    return resolve(
        {
            "kind": "evaluation",
            "dataset": "digits",
            "size": 8,
            "n": 9,
            "classifiers": [str(home / "digits-convnet")],
            "systems": ["undefended", str(home / "ours-digits")],
            "attacks": [pgd],
            "knowledge": ["oblivious", "white_box"],
            "ladder": {"norm": "linf", "eps": 0.1, "budget": "quick", "knowledge": "bpda", "doubted": 2},
            "batch": 4,
            "shard": 3,
            "samples": 5,
            **changed,
        }
    )


@pytest.fixture(scope="module")
def one(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, which no other shares adversarial images with."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adversarials, "cache_folder", lambda: folder / "cache")
        patch.setattr(run, "probe", lambda *_, **__: {})
        run_evaluation(recipe(home), folder / "run", device="cpu")
    return folder / "run"


def same(one: Path, other: Path) -> None:
    """The same files of rows, bit for bit but for the clock, and the same samples."""
    files = sorted(p.relative_to(one) for p in one.glob("rows/*/*.parquet"))
    assert files == sorted(p.relative_to(other) for p in other.glob("rows/*/*.parquet"))
    assert files
    for file in files:
        a, b = (pd.read_parquet(run / file).drop(columns=["seconds_attack", "seconds_purify"]) for run in (one, other))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    for (cell, tensors), (again, others) in zip(samples.read_samples(one), samples.read_samples(other), strict=True):
        assert cell == again
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_what_can_be_made_at_the_same_time(home: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe(home), "cpu")
    cells = plan.cells()
    with at_work(plan, tmp_path) as work:
        parts = parts_of(work)
    by_shard = [[part for part in parts if part.shard == number] for number in range(3)]
    assert [[p.cells for p in one] for one in by_shard] == [[p.cells for p in by_shard[0]]] * 3
    said = [[str(cells[k]).removeprefix("convnet · ") for k in part.cells] for part in by_shard[0]]
    both = ["undefended · pgd-300 · oblivious", "ours · pgd-300 · oblivious"]
    assert said == [
        both,  # the same images
        ["ours · pgd-300 · white_box"],
        ["ours · pgd-50 · oblivious"],
        [both[0], "undefended · noise · none", "undefended · pgd-50 · oblivious"],
        [
            both[1],
            "ours · pgd-300 · white_box",
            "ours · noise · none",
            "ours · pgd-50 · oblivious",
            "ours · pgd-50 · bpda",
        ],
    ]
    assert [part.after for part in by_shard[0]] == [(), (), (), (0,), (0, 1, 2)]
    assert [part.after for part in by_shard[1]] == [(), (), (), (5,), (5, 6, 7)]


def running() -> list[int]:
    """The workers of this process that are at a part now."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(folder.name)] = (folder / "cmdline").read_text()
            except (OSError, ValueError):
                continue

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid, name in names.items() if name.startswith("ray::_make") and is_ours(pid)]


def test_the_rows_are_those_of_one_process_though_a_worker_is_killed(home: Path, one: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    killed: list[int] = []

    def kill(done: int, total: int, _: str) -> None:
        told.append((done, total))
        if not killed:
            for pid in running()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    found = run_evaluation(recipe(home), tmp_path / "run", device="cpu", engine="ray", progress=kill)
    assert killed
    assert told == [(k, 24) for k in range(1, 25)]  # eight cells of three shards, each as it is done
    same(one, tmp_path / "run")
    assert (found["made_by"] != "").any()


def test_a_run_that_was_stopped_goes_on_here_or_on_ray(home: Path, one: Path, tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    written = json.dumps(snapshot(recipe(home)))
    command = [sys.executable, str(tmp_path / "stopped.py"), written, str(tmp_path / "run")]
    cluster = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(
        command, start_new_session=True, capture_output=True, text=True, env=cluster, timeout=150, check=False
    )
    assert "stopped by Ctrl-C" in done.stdout, done.stderr
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/rows/*/*.parquet")}
    assert kept
    run_evaluation(recipe(home), tmp_path / "run", device="cpu", resume=True)
    same(one, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    lost = sorted(tmp_path.glob("run/rows/*/*.parquet"))[::5]
    for file in (*lost, next(tmp_path.glob("run/samples/*.safetensors"))):
        file.unlink()
    told: list[tuple[int, int]] = []
    run_evaluation(
        recipe(home),
        tmp_path / "run",
        device="cpu",
        engine="ray",
        resume=True,
        progress=lambda *at: told.append(at[:2]),
    )
    assert told[0][0] > 1
    assert told[-1] == (24, 24)
    same(one, tmp_path / "run")


STOPPED = """
import json, os, signal, sys
import torch
from unperturb.config import resolve, snapshot
from unperturb.evaluation import run
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
run.probe = lambda *_, **__: {}



def stop(*_):  # once a cell is made: a terminal sends Ctrl-C to all processes of the command
    os.killpg(os.getpgrp(), signal.SIGINT)


try:
    run.run_evaluation(resolve(json.loads(sys.argv[1])), sys.argv[2], device="cpu", engine="ray", progress=stop)
except KeyboardInterrupt:
    print("stopped by Ctrl-C")
"""


def test_what_goes_wrong_is_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(home)
    with pytest.raises(UnknownNameError, match="unknown engine 'rai'"):
        run_evaluation(asked, tmp_path / "out", engine="rai")  # type: ignore[arg-type]
    own = {asked.classifiers[0]: Linear(classes=10)}
    with pytest.raises(ValueError, match="code of your own"):
        run_evaluation(asked, tmp_path / "out", engine="ray", models=own, device="cpu")
    assert not (tmp_path / "out").exists()
    # A worker that has other code would make other rows.
    monkeypatch.setattr(engines, "code", lambda: "another")
    with pytest.raises(runs.RunError, match="would make other rows: it has another code"):
        run_evaluation(asked, tmp_path / "out", engine=Ray(threads=1), device="cpu")
    assert not list(tmp_path.glob("out/rows/*"))
