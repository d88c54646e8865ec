"""Run folders: nothing half written, one writer at a time, and a damaged file is named with what to do about it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from unperturb import runs
from unperturb.runs import RunError

full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")


# Files ---------------------------------------------------------------------------------------------------------------


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    runs.write_text(path, "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise ValueError("power cut")

    with pytest.raises(ValueError, match="power cut"):
        runs.write_atomically(path, half)
    assert path.read_text() == "old"
    assert hidden(path.parent) == []
    runs.write_text(path, "new")
    assert path.read_text() == "new"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    runs.write_text(path, "old")

    def slow(temporary: Path) -> None:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
        assert path.read_text() == "old"

    runs.write_atomically(path, slow)
    assert path.read_text() == "new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_says_so(there: bool, code: int, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if there:
        runs.write_text(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(code, os.strerror(code))

    kept = "the last whole file.txt is still there" if there else "nothing was there before"
    with pytest.raises(RunError, match=f"the disk is full: could not write .*file.txt; {kept}. Free some space and"):
        runs.write_atomically(path, write)
    assert path.exists() == there
    assert hidden(tmp_path) == []
    with pytest.raises(PermissionError):  # another error is its own
        runs.write_atomically(path, lambda _: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))


def rows(n: int = 5, **changed: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    columns: dict[str, Any] = {}
    for key, kind in runs.ROW_COLUMNS.items():
        if kind == "string":
            columns[key] = f"a {key}"
        elif kind == "bool":
            columns[key] = generator.random(n) < 0.5
        elif kind == "list<float32>":
            columns[key] = [[0.25, 0.5]] * n
        elif kind == "float32":
            columns[key] = generator.random(n).astype(np.float32)
        else:
            columns[key] = np.arange(n)
    return {**columns, **changed}


WRITERS: dict[str, Callable[[Path], None]] = {
    "weights.safetensors": lambda path: runs.save_tensors(path, {"a": torch.zeros(100_000)}),
    "rows.parquet": lambda path: runs.write_rows(path, rows(5000)),
    "recipe.json": lambda path: runs.write_json(path, {"a": "b" * 100_000}),
}


@full_device
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_each_kind_of_file_on_a_disk_that_is_really_full(name: str, tmp_path: Path) -> None:
    # Written to a device without room: what the libraries below raise there is theirs to choose. By a link, since one
    # of them removes the file that it could not write.
    (tmp_path / f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(RunError, match="the disk is full"):
        WRITERS[name](tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"name": "größe", "numbers": [1, 2.5, None, True]}
    runs.write_json(path, value)
    assert runs.read_json(path) == value
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"a.json is not valid JSON \(.*the run folder is damaged"):
        runs.read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="not valid JSON"):
        runs.read_json(path)
    with pytest.raises(RunError, match=r"b.json is not there: .* holds no finished run"):
        runs.read_json(tmp_path / "b.json")


def test_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "weight": torch.randn(3, 4, dtype=torch.float32).to(memory_format=torch.contiguous_format),
        "turned": torch.randn(3, 4).T,
        "count": torch.tensor(3),
        "pixels": torch.arange(256, dtype=torch.uint8),
        "levels": torch.tensor([0, 65_535], dtype=torch.int32).to(torch.uint16),
        "none": torch.zeros(0, 3),
        "learned": torch.nn.Parameter(torch.ones(2)),
    }
    runs.save_tensors(path, tensors)
    again = runs.load_tensors(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items())
    whole = path.read_bytes()
    for broken in (whole[:-3], whole[:20], b"", b"not tensors at all"):
        path.write_bytes(broken)
        with pytest.raises(RunError, match=r"a.safetensors is truncated or not a safetensors file .*make it again"):
            runs.load_tensors(path)
    path.unlink()
    with pytest.raises(RunError, match=r"no weights at .*a\.safetensors"):
        runs.load_tensors(path)


# Folders -------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from unperturb.runs import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError) as error, runs.lock(tmp_path):
            pytest.fail("two writers")
        assert f"{tmp_path} is being written by process {holder.pid} since 20" in str(error.value)
        assert "wait for it, stop it, or choose another folder" in str(error.value)
    finally:
        holder.kill()  # a process that is killed leaves no lock behind
        holder.wait()
    for _ in range(100):
        try:
            with runs.lock(tmp_path):
                assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
            break
        except RunError:
            time.sleep(0.05)
    else:
        pytest.fail("the lock outlived its process")
    with runs.lock(tmp_path):  # and one that is done gives it back
        pass


RECIPE = {"kind": "classifier", "training": {"lr": 0.1, "betas": (0.9, 0.99)}, "attacks": [{"name": "fgsm"}], "seed": 0}


def test_opening_a_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    runs.open_run(out, RECIPE, resume=False)
    assert runs.read_json(out / "recipe.json")["training"] == {"lr": 0.1, "betas": [0.9, 0.99]}
    there = runs.read_json(out / "environment.json")
    assert (
        there["versions"]["torch"] == torch.__version__.split("+")[0] or there["versions"]["torch"] == torch.__version__
    )
    assert {"date", "python", "device", "threads", "commit"} <= set(there)
    runs.open_run(out, RECIPE, resume=True)
    with pytest.raises(RunError, match="already holds this run; go on with --resume, or choose another folder"):
        runs.open_run(out, RECIPE, resume=False)
    for resume in (True, False):
        with pytest.raises(RunError, match=r"already holds another run \(it differs in extra, seed, training.lr\)"):
            runs.open_run(
                out, {**RECIPE, "seed": 1, "extra": 1, "training": {**RECIPE["training"], "lr": 0.2}}, resume=resume
            )
    with pytest.raises(RunError, match=r"it differs in attacks\)"):
        runs.open_run(out, {**RECIPE, "attacks": []}, resume=True)
    assert runs.read_json(out / "recipe.json")["seed"] == 0


def test_what_else_the_numbers_depend_on_lies_beside_the_environment(tmp_path: Path) -> None:
    runs.open_run(tmp_path / "run", RECIPE, resume=False, about={"data mnist": "a JPEG copy"})
    kept = runs.read_json(tmp_path / "run" / "environment.json")
    assert kept["data mnist"] == "a JPEG copy"
    assert kept["versions"] == runs.environment()["versions"]


def test_a_folder_with_strangers_is_refused(tmp_path: Path) -> None:
    for name in ("thesis.txt", "b", "c", "d"):
        (tmp_path / name).touch()
    with pytest.raises(RunError, match=r"already holds something else \(b, c, d\); choose another folder"):
        runs.open_run(tmp_path, RECIPE, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c", "d", "thesis.txt"]


def test_a_locked_folder_may_be_opened_even_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / ".recipe.json.123.tmp").write_text("{")
    with runs.lock(tmp_path):
        runs.open_run(tmp_path, RECIPE, resume=False)


# Rows and samples ----------------------------------------------------------------------------------------------------


def test_rows_round_trip(tmp_path: Path) -> None:
    columns = rows(5, psnr_adv=[np.inf, 1, 2, 3, 4], eps=float("nan"), scores_adv=[[]] * 5, seconds_attack=0.5)
    runs.write_rows(tmp_path / "run" / "rows" / "cell-a" / "0000.parquet", columns)
    runs.write_rows(tmp_path / "run" / "rows" / "cell-a" / "0001.parquet", rows(2, index=[8, 9]))
    runs.write_rows(tmp_path / "other" / "rows" / "cell-b" / "0000.parquet", rows(1, defense="ours"))
    found = runs.read_rows(tmp_path / "run", str(tmp_path / "other"))
    assert list(found.columns) == list(runs.ROW_COLUMNS)
    assert found["index"].tolist() == [0, 1, 2, 3, 4, 8, 9, 0]
    assert found["defense"].tolist() == ["a defense"] * 7 + ["ours"]
    assert found["schema"].tolist() == [runs.SCHEMA_VERSION] * 8
    assert np.isinf(found["psnr_adv"][0])
    assert found["eps"][:5].isna().all()
    assert [list(s) for s in found["scores_adv"][:5]] == [[]] * 5
    assert [list(s) for s in found["scores_clean"]] == [[0.25, 0.5]] * 8
    for key, kind in runs.ROW_COLUMNS.items():
        if not (kind.startswith("list") or kind == "string"):
            assert str(found[key].dtype) == kind, key
    np.testing.assert_array_equal(found["l2"][:5], columns["l2"])
    assert found["rejected_adv"][:5].tolist() == columns["rejected_adv"].tolist()


def test_a_missing_column_or_a_wrong_length(tmp_path: Path) -> None:
    path = tmp_path / "0000.parquet"
    short = rows()
    del short["psnr_adv"]
    with pytest.raises(KeyError, match="psnr_adv"):
        runs.write_rows(path, short)
    with pytest.raises(ValueError, match="length"):
        runs.write_rows(path, rows(5, label=[1, 2]))
    assert not path.exists()


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no rows under .*rows; make them with: unperturb evaluate RECIPE --out"):
        runs.read_rows(tmp_path)
    path = tmp_path / "rows" / "cell" / "0000.parquet"
    runs.write_rows(path, rows())
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:100], b""):
        path.write_bytes(broken)
        with pytest.raises(RunError, match=r"0000.parquet is truncated or not Parquet .*delete it and run again"):
            runs.read_rows(tmp_path)
    path.write_bytes(whole)
    frame = pd.read_parquet(path)
    frame["schema"] = np.int16(runs.SCHEMA_VERSION + 1)
    frame.to_parquet(path)
    with pytest.raises(RunError, match=rf"written by a newer unperturb \(row schema {runs.SCHEMA_VERSION + 1}\)"):
        runs.read_rows(tmp_path)


def test_samples_round_trip(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    tensors = {
        "clean": images,
        "adversarial": 255 - images,
        "restored": images // 2,
        "restored_clean": images // 3,
        "index": torch.tensor([5, 6, 7]),
        "label": torch.tensor([0, 1, 2]),
        "confidence": torch.rand(3, 4),
        "prediction": torch.arange(12).reshape(3, 4),
    }
    cell = dict.fromkeys(runs.CELL_KEYS, "") | {"classifier": "convnet", "eps": 0.1, "class_names": ["a", "b", "ç"]}
    assert runs.read_samples(tmp_path) == []
    runs.write_samples(tmp_path / "samples" / "b.safetensors", {**tensors, "extra": images}, cell)
    runs.write_samples(tmp_path / "samples" / "a.safetensors", tensors, {**cell, "classifier": "lenet"})
    found = runs.read_samples(tmp_path)
    assert [c["classifier"] for c, _ in found] == ["lenet", "convnet"]
    assert found[1][0] == cell
    for _, again in found:
        assert set(again) == set(runs.SAMPLE_TENSORS)
        assert all(torch.equal(again[k], v) for k, v in tensors.items())
    (tmp_path / "samples" / "a.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="truncated or not a safetensors file"):
        runs.read_samples(tmp_path)
