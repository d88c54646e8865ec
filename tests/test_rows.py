"""Rows and samples as they lie on disk: older ones are filled, all else is one sentence with path and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from unperturb import runs
from unperturb.results import samples, schema
from unperturb.runs import RunError

CELL = {
    "dataset": "toy",
    "split": "test",
    "classifier": "net",
    "defense": "none",
    "attack": "pgd",
    "attack_repr": "PGD()",
    "eps": 0.1,
    "knowledge": "oblivious",
    "surrogate": "",
    "seed": 0,
}


def write(path: Path, n: int = 3, **changed: Any) -> Path:
    blank = {
        k: {"string": "", "list<float32>": [[]] * n, "bool": False}.get(v, 0) for k, v in schema.ROW_COLUMNS.items()
    }
    schema.write_rows(path, blank | CELL | {"index": np.arange(n)} | changed)
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write(tmp_path / "rows" / "cell" / "0000.parquet")


def rewrite(path: Path, **changed: Any) -> None:
    """The file with other columns; None takes one away."""
    table = pq.read_table(path, partitioning=None)
    for name, values in changed.items():
        place = table.column_names.index(name)
        table = table.remove_column(place)
        if values is not None:
            table = table.add_column(place, name, pa.array(values))
    pq.write_table(table, path)


def test_rows_of_the_first_schema_are_still_read(shard: Path, tmp_path: Path) -> None:
    new = dict.fromkeys(schema.ADDED)
    rewrite(shard, schema=pa.array([1] * 3, pa.int16()), **new)
    rows = schema.read_rows(tmp_path)
    assert list(rows.columns) == list(schema.ROW_COLUMNS)
    assert rows["schema"].tolist() == [1] * 3
    for column in new:
        assert rows[column].tolist() == [-1] * 3  # not recorded
        assert str(rows[column].dtype) == "int32"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"linf": None}, "has no column 'linf'"),
        ({"schema": None}, "has no column 'schema'"),
        ({"gradients": None}, "has no column 'gradients'"),  # not of a row that says it is of this schema
        ({"label": ["cat", "dog", "hen"]}, "column 'label' is string, not int32"),
        ({"conf_adv": [0.5, 0.5, 0.5]}, "column 'conf_adv' is double, not float"),
        ({"label": pa.array([0, None, 1], pa.int32())}, "column 'label' has empty entries"),
        ({"schema": pa.array([0, 2, 2], pa.int16())}, "does not say of which schema"),
        ({"schema": ["a", "b", "c"]}, "does not say of which schema"),
        ({"schema": pa.array([9, 2, 2], pa.int16())}, r"was written by a newer unperturb \(row schema 9\)"),
    ],
)
def test_what_are_no_rows_is_said_with_path_and_column(
    changed: dict[str, Any], message: str, shard: Path, tmp_path: Path
) -> None:
    rewrite(shard, **changed)
    with pytest.raises(RunError, match=rf"0000\.parquet:? {message}") as error:
        schema.read_rows(tmp_path)
    assert "\n" not in str(error.value)


def test_a_shard_has_a_place_of_its_own(shard: Path, tmp_path: Path) -> None:
    second = write(shard.with_name("0001.parquet"), index=np.array([3, 4]), n=2)
    assert len(schema.read_rows(tmp_path)) == 5
    schema.check_rows(second, CELL, [3, 4])
    schema.check_rows(write(tmp_path / "nan.parquet", eps=float("nan")), {**CELL, "eps": float("nan")}, [0, 1, 2])
    for cell, index, message in (
        ({**CELL, "attack": "fgsm"}, [3, 4], "its attack is 'pgd', not 'fgsm'"),
        ({**CELL, "eps": 0.2}, [3, 4], "its eps is"),
        (CELL, [4, 3], "rows of other images"),
        (CELL, [3, 4, 5], "holds 2 rows of other images than its 3"),
    ):
        with pytest.raises(RunError, match=message):
            schema.check_rows(second, cell, index)
    other = tmp_path / "rows" / schema.cell_folder("net", "none", "fgsm", "oblivious") / "0000.parquet"
    for place, changed in (
        (second, {"attack": "fgsm", "index": np.array([3, 4]), "n": 2}),  # two cells in one folder
        (second, {"index": np.array([2, 3]), "n": 2}),  # an image twice
        (tmp_path / "rows" / "other" / "0000.parquet", {"index": np.array([7]), "n": 1}),  # a cell in two folders
    ):
        kept = second.read_bytes()
        write(place, **changed)
        with pytest.raises(RunError, match=r"000[01]\.parquet was copied there"):
            schema.read_rows(tmp_path)
        second.write_bytes(kept)
        if place != second:
            place.unlink()
    write(other, attack="fgsm")
    assert len(schema.read_rows(tmp_path)) == 8
    write(other.with_name("0001.parquet"), index=np.array([7]), n=1)  # the file is named that is not at home
    with pytest.raises(
        RunError, match=rf"{other.parent.name}/0001\.parquet was copied there: its rows of .* pgd, obliv"
    ):
        schema.read_rows(tmp_path)


def test_a_folder_that_looks_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    write(tmp_path / "eps=3" / "rows" / "label=7" / "0000.parquet")
    assert schema.read_rows(tmp_path / "eps=3")["label"].tolist() == [0, 0, 0]


def test_costs_are_of_their_schema(tmp_path: Path) -> None:
    entry = {"dataset": "toy", "folder": "", "spec": None, "differentiable": True, "random": False, "seconds": None}
    runs.write_json(tmp_path / "defenses.json", {"ours": {**entry, "pflop": 1.5}})
    assert schema.read_costs(tmp_path)["toy", "ours"]["pflop"] == 1.5
    for wrong, said in (([], "the whole"), ({"ours": {**entry}}, "ours.pflop"), ({"ours": 3}, "ours")):
        runs.write_json(tmp_path / "defenses.json", wrong)
        with pytest.raises(RunError, match=rf"defenses\.json is not what was written there: {said}"):
            schema.read_costs(tmp_path)


SAMPLE = {
    **{k: torch.zeros(2, 1, 8, 8, dtype=torch.uint8) for k in ("clean", "adversarial", "restored", "restored_clean")},
    "index": torch.arange(2),
    "label": torch.zeros(2, dtype=torch.int64),
    "confidence": torch.zeros(2, 4),
    "prediction": torch.full((2, 4), -1),
}
ABOUT = {"cell": json.dumps({**CELL, "class_names": ["a", "b"]})}


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({**SAMPLE, "clean": torch.zeros(2, 1, 8, 8)}, ABOUT, "clean is torch.float32"),
        ({k: v for k, v in SAMPLE.items() if k != "label"}, ABOUT, "expected .*label"),
        ({**SAMPLE, "label": torch.zeros(3, dtype=torch.int64)}, ABOUT, "holds more of one thing than of another"),
        ({**SAMPLE, "confidence": torch.full((2, 4), torch.nan)}, ABOUT, "confidence holds NaN"),
        (SAMPLE, {}, "does not say of which cell"),
        (SAMPLE, {"cell": "3"}, "does not say of which cell"),
        (SAMPLE, {"cell": "{"}, "does not say of which cell"),
        (SAMPLE, {"cell": json.dumps({**CELL})}, "does not say of which class_names"),
    ],
)
def test_what_are_no_samples_is_said_with_the_path(tensors: Any, about: Any, message: str, tmp_path: Path) -> None:
    runs.save_tensors(tmp_path / "samples" / "a.safetensors", tensors, about)
    with pytest.raises(RunError, match=rf"a\.safetensors.* {message}"):
        samples.read_samples(tmp_path)


def test_samples_belong_to_rows_that_are_there(shard: Path, tmp_path: Path) -> None:
    runs.save_tensors(tmp_path / "samples" / "cell.safetensors", SAMPLE, ABOUT)
    assert len(samples.read_samples(tmp_path)) == 1
    other = tmp_path / "samples" / "other.safetensors"
    runs.save_tensors(other, SAMPLE, ABOUT)
    with pytest.raises(RunError, match=r"other\.safetensors is of a cell that .* has no rows of; delete it"):
        samples.read_samples(tmp_path)
    other.write_bytes(other.read_bytes()[:-9])
    shard.rename(shard.with_name("x"))
    with pytest.raises(RunError):
        samples.read_samples(tmp_path)
