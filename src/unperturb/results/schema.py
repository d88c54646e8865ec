"""Rows: one image in one cell. What their columns are, how they are written, and how old ones are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from unperturb.runs import RunError, read_json, write_atomically

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 3

# One image in one cell, and one draw of a random system. Keys first, then what was seen. `clean`/`adv` are the base
# classifier's view, `pure_clean` and `pure_adv` the system's; a confidence is the probability given to the true label.
# A prediction of -1, with confidence 0, is of logits that are not finite: a wrong answer.
ROW_COLUMNS: dict[str, str] = {
    "schema": "int16",
    "dataset": "string",
    "split": "string",
    "classifier": "string",
    "system": "string",
    "defended": "bool",  # false: the undefended classifier itself
    "attack": "string",  # the cell's short name, such as "pgd-40"
    "attack_repr": "string",  # the whole record
    "norm": "string",  # of the budget; "": no budget
    "eps": "float32",  # NaN: no budget
    "knowledge": "string",
    "surrogate": "string",  # transfer: the classifier it was made on, else ""
    "seed": "int64",
    "draw": "int16",  # which draw of a random system; else 0
    "index": "int64",  # the image's number in its split
    "label": "int32",
    # In a cascade an image that is broken is not attacked again: what attack made its adversarial image, and what that
    # attacker knew; both "" where the cell's own attack did.
    "made_by": "string",
    "made_with": "string",
    "pred_clean": "int32",
    "pred_adv": "int32",
    "pred_pure_clean": "int32",
    "pred_pure_adv": "int32",
    "pred_pure_adv_8bit": "int32",  # of the system, x_adv rounded to 8 bits; -2: not recorded
    "conf_clean": "float32",
    "conf_adv": "float32",
    "conf_pure_clean": "float32",
    "conf_pure_adv": "float32",
    "l0": "int32",  # pixels (all channels of a place counted once) that differ between x and x_adv
    "l2": "float32",
    "linf": "float32",
    "psnr_adv": "float32",  # x_adv against x, dB; inf where identical
    "psnr_pure_adv": "float32",  # G(x_adv) against x
    "psnr_pure_clean": "float32",  # G(x) against x
    "ssim_adv": "float32",  # NaN for images smaller than the window
    "ssim_pure_adv": "float32",
    "ssim_pure_clean": "float32",
    "rejected_clean": "bool",
    "rejected_adv": "bool",
    "scores_clean": "list<float32>",
    "scores_adv": "list<float32>",
    "seconds_attack": "float32",  # per image
    "seconds_purify": "float32",  # per attacked image; of its detectors too where the defense has some
    "gradients": "int32",  # how often the attacker asked for the image's gradient
    "zero_gradients": "int32",  # how often it was exactly zero
    "nonfinite": "int32",  # how often the attacked logits were not finite
}
# Columns that older rows lack: the schema that brought them, and what stands for "not recorded".
ADDED: dict[str, tuple[int, int | str]] = {
    **dict.fromkeys(("gradients", "zero_gradients", "nonfinite"), (2, -1)),
    "made_by": (3, ""),
    "made_with": (3, ""),
    "pred_pure_adv_8bit": (3, -2),
}
UNDEFENDED = "undefended"  # how the third schema calls the system that older rows call the defense "none"
CELL_KEYS = [
    "dataset",
    "split",
    "classifier",
    "system",
    "defended",
    "attack",
    "attack_repr",
    "norm",
    "eps",
    "knowledge",
    "surrogate",
    "seed",
]
_NAMES = ["classifier", "system", "attack", "knowledge"]
_FOLDER_KEYS = ["dataset", "split", *_NAMES]


def cell_folder(classifier: str, system: str, attack: str, knowledge: str) -> str:
    """The folder of a cell's rows and the stem of its samples: words to read, then a hash, since other names may have
    the same words; at most 120 characters, different also where a disk takes `A` for `a`."""
    return file_stem(classifier, system, attack, knowledge)


def file_stem(*names: str) -> str:
    """A file's or folder's name for what `names` tell apart; see `cell_folder`."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", ".".join(names))
    return f"{words[:107]}-{hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:12]}"


def of_today(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's values by `CELL_KEYS`, from those of any schema: what older ones called the defense "none" is the
    undefended system, and the norm of a budget stood in the attack's record alone."""
    if "defense" not in cell:
        return dict(cell)
    changed = {k: v for k, v in cell.items() if k != "defense"}
    changed["defended"] = cell["defense"] != "none"
    changed["system"] = cell["defense"] if changed["defended"] else UNDEFENDED
    given = re.search(r"\bnorm='(\w+)'", cell["attack_repr"])
    changed["norm"] = "" if cell["eps"] != cell["eps"] else given[1] if given else "linf"
    return changed


def _schema() -> Any:
    import pyarrow as pa

    types = {"list<float32>": pa.list_(pa.float32()), "bool": pa.bool_(), "string": pa.string()}
    return pa.schema([(k, types.get(v) or getattr(pa, v)()) for k, v in ROW_COLUMNS.items()])


def write_rows(path: Path, columns: Mapping[str, Any]) -> None:
    """One shard of rows to a Parquet file, atomically. `columns` holds every name of `ROW_COLUMNS`: a list or array of
    N values, or one value for all N rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = len(columns["index"])
    full = {k: v if hasattr(v, "__len__") and not isinstance(v, str) else [v] * n for k, v in columns.items()}
    full["schema"] = [SCHEMA_VERSION] * n
    table = pa.table({k: full[k] for k in ROW_COLUMNS}, schema=_schema())
    write_atomically(path, lambda p: pq.write_table(table, p, compression="zstd"))


def read_rows(*runs: str | Path) -> pd.DataFrame:
    """The rows of one or more run folders, in the order of their cells and images; what older rows lack is filled.

    Raises `RunError` where a folder holds none, a file is truncated, is no file of rows or of a newer schema, or where
    a file was copied from another cell's folder.
    """
    import pandas as pd

    _check_same_systems(runs)
    found = []
    for run in runs:
        files = sorted(Path(run).glob("rows/*/*.parquet"))
        if not files:
            raise RunError(f"no rows under {Path(run) / 'rows'}; make them with: unperturb evaluate RECIPE --out {run}")
        rows = pd.concat([_read_shard(file).assign(file=i) for i, file in enumerate(files)], ignore_index=True)
        _check_places(rows, files)
        found.append(rows.drop(columns="file"))
    rows = pd.concat(found, ignore_index=True)
    # Beside the rows, since a folder may be gone when they are looked at; lists, since Parquet keeps them as JSON.
    rows.attrs["systems"] = [[*key, about] for key, about in read_systems(*runs).items()]
    rows.attrs["probes"] = [[*key, numbers] for key, numbers in read_probes(*runs).items()]
    rows.attrs["runs"] = [str(r) for r in runs]  # where the samples and the environment lie
    return rows


def _check_same_systems(runs: Sequence[str | Path]) -> None:
    """Raise `RunError` where one name means two models in two of the run folders, as far as these say."""
    known: dict[tuple[str, str], tuple[str, str | Path]] = {}
    for run in runs if len(runs) > 1 else ():
        path = Path(run) / "recipe.json"
        recipe = read_json(path, dict[str, Any]) if path.exists() else {}
        prints = recipe.get("fingerprints") or {}
        for name, mark in (prints.get("systems") or {}).items():
            key = str(recipe.get("dataset", recipe.get("data", ""))), str(name)
            first, where = known.setdefault(key, (str(mark), run))
            if first != str(mark):
                raise RunError(
                    f"{name} is one model in {where} and another in {run}: read them apart, or give one another name"
                )


def _check_places(rows: pd.DataFrame, files: list[Path]) -> None:
    """Raise `RunError` unless each folder is of one cell, each cell in one folder, and no image there twice."""
    folders = [file.parent for file in files]
    rows = rows[[*CELL_KEYS, "index", "draw", "file"]].assign(folder=[str(folders[i]) for i in rows["file"]])
    cells = rows.drop_duplicates([*CELL_KEYS, "folder"])
    at_home = [
        _is_at_home(Path(folder).name, names, defended)
        for *names, defended, folder in cells[[*_NAMES, "defended", "folder"]].to_numpy().tolist()
    ]
    cells = cells.assign(at_home=at_home).sort_values("at_home", kind="stable")
    names = cells.drop_duplicates([*_FOLDER_KEYS, "folder"])
    wrong = [names[names["folder"].duplicated(keep=False)], cells[cells[CELL_KEYS].duplicated(keep=False)]]
    wrong.append(rows[rows[["folder", "index", "draw"]].duplicated()])
    for first in (part.iloc[0] for part in wrong if len(part)):
        raise RunError(
            f"{files[first['file']]} was copied there: its rows of {', '.join(first[_FOLDER_KEYS])} stand beside those "
            f"of another cell, or elsewhere too; delete it and {AGAIN}"
        )


def _is_at_home(folder: str, names: Sequence[str], defended: bool) -> bool:
    """Whether a cell of these `_NAMES` is kept in `folder`, today or as older rows were."""
    classifier, system, attack, knowledge = names
    called = (system,) if defended else (system, "none")
    return folder in [cell_folder(classifier, name, attack, knowledge) for name in called]


AGAIN = "run again with --resume"


def check_rows(path: Path, cell: Mapping[str, Any], index: Sequence[int], draws: int = 1) -> None:
    """Raise `RunError` unless the shard at `path` holds the images `index` of `cell` (`CELL_KEYS`), in their order, and
    no others, each in the draws 0 to `draws` - 1, one whole draw after the other."""
    import numpy as np

    frame = _read_shard(path)
    for found in frame[CELL_KEYS].drop_duplicates().to_dict("records"):
        for key in CELL_KEYS:
            value, want = found[key], cell[key]
            if ROW_COLUMNS[key] == "float32":
                want = float(np.float32(want))
            if repr(value) != repr(want):  # as text, NaN is itself
                raise RunError(
                    f"{path} is of another cell: its {key} is {value!r}, not {want!r}; delete it and {AGAIN}"
                )
    wanted = [(draw, i) for draw in range(draws) for i in index]
    if list(zip(frame["draw"].tolist(), frame["index"].tolist())) != wanted:
        of = f"{len(index)}" + (f" in {draws} draws" if draws > 1 else "")
        raise RunError(f"{path} holds {len(frame)} rows of other images than its {of}; delete it and {AGAIN}")


def _read_shard(path: Path) -> pd.DataFrame:
    """One file of rows, with every column of `ROW_COLUMNS`; raises `RunError` with path and column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None)
        if not table.num_rows:
            raise RunError(f"{path} holds no rows; delete it and {AGAIN}")
        versions = table["schema"].unique().to_pylist() if "schema" in table.column_names else [SCHEMA_VERSION]
        if not all(isinstance(version, int) and version > 0 for version in versions):
            raise RunError(f"{path} does not say of which schema its rows are; delete it and {AGAIN}")
        if max(versions) > SCHEMA_VERSION:
            raise RunError(f"{path} was written by a newer unperturb (row schema {max(versions)})")
        table = _filled(table, max(versions))
        for field in _schema():
            if field.name not in table.column_names:
                raise RunError(f"{path} has no column {field.name!r}; delete it and {AGAIN}")
            column = table[field.name]
            if column.type != field.type and not (column.type == pa.large_string() and field.type == pa.string()):
                raise RunError(
                    f"{path}: column {field.name!r} is {column.type}, not {field.type}; delete it and {AGAIN}"
                )
            if column.null_count and not pa.types.is_floating(field.type):  # pandas writes NaN so
                raise RunError(f"{path}: column {field.name!r} has empty entries; delete it and {AGAIN}")
        return table.select(list(ROW_COLUMNS)).cast(_schema()).to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunError(f"{path} is truncated or not Parquet ({error}); delete it and {AGAIN}") from None


def _filled(table: Any, version: int) -> Any:
    """An Arrow table of rows of schema `version`, with the columns that older ones lack."""
    import pyarrow as pa

    for name, (since, unknown) in ADDED.items():
        if name not in table.column_names and version < since:
            kind = pa.string() if isinstance(unknown, str) else pa.int32()
            table = table.append_column(name, pa.array([unknown] * table.num_rows, kind))
    old = ["defense", "attack_repr", "eps"]
    if version < 3 and set(old) <= set(table.column_names):
        cells = [of_today(cell) for cell in table.select(old).to_pylist()]
        for name, kind in (("system", pa.string()), ("defended", pa.bool_()), ("norm", pa.string())):
            table = table.append_column(name, pa.array([cell[name] for cell in cells], kind))
    return table


class _System(TypedDict):
    dataset: str
    folder: str
    spec: dict[str, Any] | None
    differentiable: bool
    random: bool
    defended: NotRequired[bool]
    pflop: float | None
    seconds: float | None


def read_systems(*runs: str | Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What one or more run folders keep of their systems, by (data set, name), in the order that they were asked for:
    folder, spec, differentiable, random, defended, and pflop and seconds of training (None: not known). Nothing of
    folders that were written without. Where two folders mean different things by one name, its training cost is not
    known. Raises `RunError` for a damaged file.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        old, path = Path(run) / "defenses.json", Path(run) / "systems.json"
        path = path if path.exists() or not old.exists() else old  # as older rows had it beside them
        for name, about in read_json(path, dict[str, _System]).items() if path.exists() else ():
            defended = about.get("defended", name != "none")
            key = (about["dataset"], UNDEFENDED if path == old and not defended else name)
            same = found.setdefault(key, {**about, "defended": defended})["pflop"] == about["pflop"]
            found[key] = {**about, "defended": defended} | ({} if same else {"pflop": None, "seconds": None})
    return found


def read_probes(*runs: str | Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What a short probe measured of each system, by (data set, classifier, name), from the `probe.json` of one or more
    run folders; nothing of folders without one. The first folder that has a system's numbers gives them. Raises
    `RunError` for a damaged file."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in runs:
        path = Path(run) / "probe.json"
        probes = read_json(path, dict[str, dict[str, dict[str, Any]]]) if path.exists() else {}
        datasets = {name: dataset for dataset, name in read_systems(run)} if probes else {}
        for classifier, of in probes.items():
            for name, numbers in of.items():
                found.setdefault((datasets.get(name, ""), classifier, name), numbers)
    return found
