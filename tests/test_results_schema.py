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

from made_rows import columns
from unperturb import runs
from unperturb.results import Results, robust_accuracy, samples, schema
from unperturb.runs import RunError
from unperturb.threat_models import ThreatModel

CELL = {
    "dataset": "toy",
    "split": "test",
    "classifier": "net",
    "system": "undefended",
    "defended": False,
    "attack": "pgd",
    "attack_repr": "PGD()",
    "norm": "linf",
    "eps": 0.1,
    "knowledge": "oblivious",
    "surrogate": "",
    "seed": 0,
}


def write(path: Path, n: int = 3, **changed: Any) -> Path:
    schema.write_rows(path, columns(n) | CELL | changed)
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


def as_it_was(path: Path, version: int, defense: str = "none") -> None:
    """The file as an older schema had it: `defense` for the system, no norm, and less recorded."""
    table = pq.read_table(path, partitioning=None)
    newer = [name for name, (since, _) in schema.ADDED.items() if since > version]
    table = table.drop_columns(["system", "defended", "norm", "schema", *newer])
    table = table.append_column("schema", pa.array([version] * len(table), pa.int16()))
    pq.write_table(table.append_column("defense", pa.array([defense] * len(table))), path)


@pytest.mark.parametrize("version", [1, 2])
def test_rows_of_older_schemas_are_still_read(version: int, shard: Path, tmp_path: Path) -> None:
    as_it_was(shard, version)
    rows = schema.read_rows(tmp_path)
    assert list(rows.columns) == list(schema.ROW_COLUMNS)
    assert rows["schema"].tolist() == [version] * 3
    for column, (since, unknown) in schema.ADDED.items():
        if since > version:
            assert rows[column].tolist() == [unknown] * 3  # not recorded
        assert str(rows[column].dtype) in ("int32", "object", "str")
    assert set(rows["system"]) == {"undefended"}
    assert not rows["defended"].any()


def test_older_rows_say_their_norm_in_the_attacks_record(tmp_path: Path) -> None:
    records = {
        "PGD(targets=None, norm='l2', eps=0.5)": (0.5, "l2"),
        "FGSM(eps=0.1)": (0.1, "linf"),
        "DDN(init_norm=1.0)": (float("nan"), ""),
        "DeepFool(norm='l2')": (float("nan"), ""),
    }
    for record, (eps, _) in records.items():
        name = record.partition("(")[0]
        folder = schema.cell_folder("net", "ours", name, "oblivious")
        path = tmp_path / "rows" / folder / "0000.parquet"
        as_it_was(write(path, attack=name, attack_repr=record, eps=eps), 2, "ours")
    rows = schema.read_rows(tmp_path)
    assert rows["defended"].all()
    assert dict(zip(rows["attack_repr"], rows["norm"])) == {record: norm for record, (_, norm) in records.items()}


def test_older_and_newer_rows_lie_beside_each_other(tmp_path: Path) -> None:
    old = {"index": np.arange(3), "pred_pure_adv": np.array([0, 1, 0]), "linf": 0.1}
    as_it_was(
        write(tmp_path / "a" / "rows" / schema.cell_folder("net", "none", "pgd", "oblivious") / "0.parquet", **old), 1
    )
    new = schema.cell_folder("net", "undefended", "fgsm", "oblivious")
    write(tmp_path / "b" / "rows" / new / "0.parquet", attack="fgsm", pred_pure_adv=np.array([0, 0, 1]), linf=0.1)
    results = Results.read(tmp_path / "a", tmp_path / "b")
    assert list(results.cells["attack"]) == ["fgsm", "pgd"]
    assert robust_accuracy(results, ThreatModel("linf", 0.1)).images.tolist() == [1, 0, 0]
    assert results.outcomes["right_8bit"].isna().all()


def test_older_rows_are_at_home_in_the_folder_that_they_were_given(tmp_path: Path) -> None:
    home = tmp_path / "rows" / schema.cell_folder("net", "none", "pgd", "oblivious") / "0000.parquet"
    as_it_was(write(home), 2)
    copied = tmp_path / "rows" / schema.cell_folder("net", "none", "fgsm", "oblivious") / "0000.parquet"
    as_it_was(write(copied, index=np.arange(3, 6)), 2)
    with pytest.raises(RunError, match=rf"{copied.parent.name}/0000\.parquet was copied there"):
        schema.read_rows(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"linf": None}, "has no column 'linf'"),
        ({"schema": None}, "has no column 'schema'"),
        ({"gradients": None}, "has no column 'gradients'"),  # not of a row that says it is of this schema
        ({"label": ["cat", "dog", "hen"]}, "column 'label' is string, not int32"),
        ({"conf_adv": [0.5, 0.5, 0.5]}, "column 'conf_adv' is double, not float"),
        ({"label": pa.array([0, None, 1], pa.int32())}, "column 'label' has empty entries"),
        ({"system": None}, "has no column 'system'"),
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


def test_a_shard_of_a_random_system_holds_every_draw(tmp_path: Path) -> None:
    path = write(tmp_path / "0000.parquet", n=6, index=np.array([3, 4, 5] * 2), draw=np.repeat([0, 1], 3))
    schema.check_rows(path, CELL, [3, 4, 5], draws=2)
    with pytest.raises(RunError, match="holds 6 rows of other images than its 3 in 3 draws"):
        schema.check_rows(path, CELL, [3, 4, 5], draws=3)
    with pytest.raises(RunError, match="holds 6 rows of other images than its 6"):
        schema.check_rows(path, CELL, [3, 4, 5, 3, 4, 5])


ENTRY = {"dataset": "toy", "folder": "", "spec": None, "differentiable": True, "random": False, "seconds": None}


def test_what_is_kept_of_systems_is_of_its_schema(tmp_path: Path) -> None:
    runs.write_json(tmp_path / "systems.json", {"ours": {**ENTRY, "defended": True, "pflop": 1.5}})
    assert schema.read_systems(tmp_path)["toy", "ours"]["pflop"] == 1.5
    for wrong, said in (([], "the whole"), ({"ours": {**ENTRY}}, "ours.pflop"), ({"ours": 3}, "ours")):
        runs.write_json(tmp_path / "systems.json", wrong)
        with pytest.raises(RunError, match=rf"systems\.json is not what was written there: {said}"):
            schema.read_systems(tmp_path)


def test_what_older_runs_kept_of_defenses_is_read_too(shard: Path, tmp_path: Path) -> None:
    assert schema.read_systems(tmp_path) == {}  # written before there were any
    runs.write_json(tmp_path / "defenses.json", {k: {**ENTRY, "pflop": 0.0} for k in ("none", "ours")})
    found = schema.read_systems(tmp_path)
    assert {key: about["defended"] for key, about in found.items()} == {
        ("toy", "undefended"): False,
        ("toy", "ours"): True,
    }
    as_it_was(shard, 2)
    assert Results.read(tmp_path).about("undefended")["pflop"] == 0


def test_of_one_name_that_means_two_things_the_cost_is_not_known(tmp_path: Path) -> None:
    for folder, pflop in (("a", 0.5), ("b", 0.5), ("c", 0.7)):
        runs.write_json(tmp_path / folder / "systems.json", {"ours": {**ENTRY, "defended": True, "pflop": pflop}})
    assert schema.read_systems(tmp_path / "a", tmp_path / "b")["toy", "ours"]["pflop"] == 0.5
    assert schema.read_systems(tmp_path / "a", tmp_path / "c")["toy", "ours"]["pflop"] is None


def test_what_a_probe_measured_is_found_by_the_system(shard: Path, tmp_path: Path) -> None:
    assert Results.read(tmp_path).probe("undefended") == {}
    runs.write_json(tmp_path / "probe.json", {"net": {"undefended": {"repeat_difference": 0.25}}})
    assert Results.read(tmp_path).probe("undefended") == {"repeat_difference": 0.25}
    runs.write_json(tmp_path / "systems.json", {"undefended": {**ENTRY, "defended": False, "pflop": 0.0}})
    assert schema.read_probes(tmp_path) == {("toy", "net", "undefended"): {"repeat_difference": 0.25}}
    runs.write_json(tmp_path / "probe.json", {"net": {"undefended": 3}})
    with pytest.raises(RunError, match=r"probe\.json is not what was written there: net.undefended"):
        Results.read(tmp_path)


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
        (SAMPLE, {"cell": json.dumps({"defense": "none"})}, "does not say of which cell"),
    ],
)
def test_what_are_no_samples_is_said_with_the_path(tensors: Any, about: Any, message: str, tmp_path: Path) -> None:
    runs.save_tensors(tmp_path / "samples" / "a.safetensors", tensors, about)
    with pytest.raises(RunError, match=rf"a\.safetensors.* {message}"):
        samples.read_samples(tmp_path)


def test_samples_of_older_cells_are_still_read(tmp_path: Path) -> None:
    old = {k: v for k, v in CELL.items() if k not in ("system", "defended", "norm")} | {"defense": "ours"}
    about = {"cell": json.dumps({**old, "class_names": ["a", "b"]})}
    runs.save_tensors(tmp_path / "samples" / "a.safetensors", SAMPLE, about)
    ((cell, _),) = samples.read_samples(tmp_path)
    assert {k: cell[k] for k in ("system", "defended", "norm")} == {"system": "ours", "defended": True, "norm": "linf"}


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
