"""Run folders: a resolved recipe, its log, its weights or its rows, and what is needed to rebuild from them.

Everything is written under a new name and then renamed, so a reader never sees half a file and a full disk costs
nothing that was there before.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

SCHEMA_VERSION = 2

# One image in one cell. Keys first, then what was seen. `clean`/`adv` are the bare classifier's view, `pure_clean` and
# `pure_adv` the protected model's; a confidence is the probability given to the true label. A prediction of -1, with
# confidence 0, is of logits that are not finite: a wrong answer.
ROW_COLUMNS: dict[str, str] = {
    "schema": "int16",
    "dataset": "string",
    "split": "string",
    "classifier": "string",
    "defense": "string",  # "none": the bare classifier
    "attack": "string",  # the cell's short name, such as "pgd-40"
    "attack_repr": "string",  # the whole record
    "eps": "float32",  # NaN: no budget
    "knowledge": "string",
    "surrogate": "string",  # transfer: the classifier it was made on, else ""
    "seed": "int64",
    "draw": "int16",  # number of the draw where the defense is random, else 0
    "index": "int64",  # the image's number in its split
    "label": "int32",
    "pred_clean": "int32",
    "pred_adv": "int32",
    "pred_pure_clean": "int32",
    "pred_pure_adv": "int32",
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
ADDED = {"gradients": (2, -1), "zero_gradients": (2, -1), "nonfinite": (2, -1)}
CELL_KEYS = [
    "dataset",
    "split",
    "classifier",
    "defense",
    "attack",
    "attack_repr",
    "eps",
    "knowledge",
    "surrogate",
    "seed",
]
_NAMES = ["classifier", "defense", "attack", "knowledge"]
_FOLDER_KEYS = ["dataset", "split", *_NAMES]


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message says what to do."""


# Files --------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, flush it to disk, then rename to `path`; on failure `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = f"the last whole {path.name} is still there" if path.exists() else "nothing was there before"
            raise RunError(f"the disk is full: could not write {path}; {kept}. Free some space and resume.") from error
        raise


def write_text(path: Path, text: str) -> None:
    """`text` to `path`, atomically."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON to `path`, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`; raises `RunError` where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is not there: {path.parent} holds no finished run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid JSON ({error}); the run folder is damaged") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors by name to a safetensors file, atomically."""
    from safetensors.torch import save

    # No metadata is None: with an empty dict and no tensors, safetensors writes a header that it cannot read.
    packed = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, dict(metadata) if metadata else None)
    write_atomically(path, lambda p: p.write_bytes(packed))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises `RunError` where it is missing, truncated or not safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise RunError(f"no weights at {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(
            f"{path} is truncated or not a safetensors file ({error}); make it again or fetch it again"
        ) from None


# Folders ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing; raises `RunError` that says who has it where another process does."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RunError(
                f"{folder} is being written by {owner}; wait for it, stop it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} since {datetime.datetime.now().isoformat(timespec='seconds')}")
        file.flush()
        yield


def open_run(folder: Path, recipe: Mapping[str, Any], *, resume: bool, about: Mapping[str, Any] | None = None) -> None:
    """Make `folder` the home of the run that `recipe` fixes, or check that it already is.

    Raises `RunError` where the folder holds a run and `resume` is off, or holds the run of another recipe (the message
    names the keys that differ), or holds anything else. about: what else the numbers depend on, kept beside the
    environment.
    """
    path = folder / "recipe.json"
    if not path.exists():
        # Hidden files are the lock, and what a run that was killed at its start left half written.
        strangers = sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder.exists() else []
        if strangers:
            raise RunError(f"{folder} already holds something else ({', '.join(strangers[:3])}); choose another folder")
        write_json(path, recipe)
        write_json(folder / "environment.json", {**environment(), **(about or {})})
        return
    there = read_json(path)
    differs = _differences(there, json.loads(json.dumps(recipe)))
    if differs:
        raise RunError(
            f"{folder} already holds another run (it differs in {', '.join(differs[:5])}); choose another folder"
        )
    if not resume:
        raise RunError(f"{folder} already holds this run; go on with --resume, or choose another folder")


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [path]


@functools.cache
def environment() -> dict[str, Any]:
    """What a number depends on besides its recipe: versions, processor features, threads, commit, date."""
    import importlib.metadata as metadata

    import torch

    versions = {}
    for name in ("unperturb", "torch", "lightning-fabric", "datasets", "kornia", "numpy", "scikit-learn", "pandas"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": versions,
        "device": device,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return out.stdout.strip() if out.returncode == 0 else "unknown"


# Rows and samples ---------------------------------------------------------------------------------------------------


def cell_folder(classifier: str, defense: str, attack: str, knowledge: str) -> str:
    """The folder of a cell's rows and the stem of its samples: words to read, then a hash, since other names may have
    the same words; at most 120 characters, different also where a disk takes `A` for `a`."""
    names = [classifier, defense, attack, knowledge]
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", ".".join(names))
    return f"{words[:107]}-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}"


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

    found = []
    for run in runs:
        files = sorted(Path(run).glob("rows/*/*.parquet"))
        if not files:
            raise RunError(f"no rows under {Path(run) / 'rows'}; make them with: unperturb evaluate RECIPE --out {run}")
        rows = pd.concat([_read_shard(file).assign(file=i) for i, file in enumerate(files)], ignore_index=True)
        _check_places(rows, files)
        found.append(rows.drop(columns="file"))
    rows = pd.concat(found, ignore_index=True)
    rows.attrs["runs"] = [str(r) for r in runs]  # where the samples and the environment lie
    return rows


def _check_places(rows: pd.DataFrame, files: list[Path]) -> None:
    """Raise `RunError` unless each folder is of one cell, each cell in one folder, and no image there twice."""
    folders = [file.parent for file in files]
    rows = rows[[*CELL_KEYS, "index", "draw", "file"]].assign(folder=[str(folders[i]) for i in rows["file"]])
    cells = rows.drop_duplicates([*CELL_KEYS, "folder"])
    at_home = [
        cell_folder(*names) == Path(home).name for *names, home in cells[[*_NAMES, "folder"]].to_numpy().tolist()
    ]
    cells = cells.assign(at_home=at_home).sort_values("at_home", kind="stable")
    names = cells.drop_duplicates([*_FOLDER_KEYS, "folder"])
    wrong = [names[names["folder"].duplicated(keep=False)], cells[cells[CELL_KEYS].duplicated(keep=False)]]
    wrong.append(rows[rows[["folder", "index", "draw"]].duplicated()])
    for first in (part.iloc[0] for part in wrong if len(part)):
        raise RunError(
            f"{files[first['file']]} was copied there: its rows of {', '.join(first[_FOLDER_KEYS])} stand beside those "
            f"of another cell, or elsewhere too; delete it and {_AGAIN}"
        )


_AGAIN = "run again with --resume"


def check_rows(path: Path, cell: Mapping[str, Any], index: Sequence[int]) -> None:
    """Raise `RunError` unless the shard at `path` holds the images `index` of `cell` (`CELL_KEYS`), and no others."""
    import numpy as np

    frame = _read_shard(path)
    for found in frame[CELL_KEYS].drop_duplicates().to_dict("records"):
        for key in CELL_KEYS:
            value, want = found[key], cell[key]
            if ROW_COLUMNS[key] == "float32":
                want = float(np.float32(want))
            if repr(value) != repr(want):  # as text, NaN is itself
                raise RunError(
                    f"{path} is of another cell: its {key} is {value!r}, not {want!r}; delete it and {_AGAIN}"
                )
    if frame["index"].tolist() != list(index):
        raise RunError(f"{path} holds {len(frame)} rows of other images than its {len(index)}; delete it and {_AGAIN}")


def _read_shard(path: Path) -> pd.DataFrame:
    """One file of rows, with every column of `ROW_COLUMNS`; raises `RunError` with path and column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None)
        if not table.num_rows:
            raise RunError(f"{path} holds no rows; delete it and {_AGAIN}")
        versions = table["schema"].unique().to_pylist() if "schema" in table.column_names else [SCHEMA_VERSION]
        if not all(isinstance(version, int) and version > 0 for version in versions):
            raise RunError(f"{path} does not say of which schema its rows are; delete it and {_AGAIN}")
        if max(versions) > SCHEMA_VERSION:
            raise RunError(f"{path} was written by a newer unperturb (row schema {max(versions)})")
        for name, (since, unknown) in ADDED.items():
            if name not in table.column_names and max(versions) < since:
                table = table.append_column(name, pa.array([unknown] * table.num_rows, pa.int32()))
        for field in _schema():
            if field.name not in table.column_names:
                raise RunError(f"{path} has no column {field.name!r}; delete it and {_AGAIN}")
            column = table[field.name]
            if column.type != field.type and not (column.type == pa.large_string() and field.type == pa.string()):
                raise RunError(
                    f"{path}: column {field.name!r} is {column.type}, not {field.type}; delete it and {_AGAIN}"
                )
            if column.null_count and not pa.types.is_floating(field.type):  # pandas writes NaN so
                raise RunError(f"{path}: column {field.name!r} has empty entries; delete it and {_AGAIN}")
        return table.select(list(ROW_COLUMNS)).cast(_schema()).to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunError(f"{path} is truncated or not Parquet ({error}); delete it and {_AGAIN}") from None


def read_costs(*runs: str | Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What one or more run folders keep of their defenses, by (data set, name), in the order that they were asked for:
    folder, spec, differentiable, random, and pflop and seconds of training (None: not known). Nothing of folders that
    were written without. Where two folders mean different things by one name, its training cost is not known.
    """
    from typing_extensions import TypedDict

    class About(TypedDict):
        dataset: str
        folder: str
        spec: dict[str, Any] | None
        differentiable: bool
        random: bool
        pflop: float | None
        seconds: float | None

    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        path = Path(run) / "defenses.json"
        for name, about in read_json(path, dict[str, About]).items() if path.exists() else ():
            key = (about["dataset"], name)
            same = found.setdefault(key, about)["pflop"] == about["pflop"]
            found[key] = about if same else {**about, "pflop": None, "seconds": None}
    return found


# Of each image of a sample: its last dimensions and their type.
SAMPLE_TENSORS = {
    **dict.fromkeys(("clean", "adversarial", "restored", "restored_clean"), ("uint8", (None, None, None, None))),
    **dict.fromkeys(("index", "label"), ("int64", (None,))),
    "confidence": ("float32", (None, 4)),
    "prediction": ("int64", (None, 4)),
}


def write_samples(path: Path, tensors: Mapping[str, Tensor], cell: Mapping[str, Any]) -> None:
    """A few fixed images of one cell for the figures.

    clean, adversarial, restored, restored_clean: `(M, C, H, W)` uint8. index, label: `(M,)`. confidence, prediction:
    `(M, 4)`, of the true label and the winner (-1: none), for f(x), f(x_adv), f(G(x)), f(G(x_adv)). cell: the values of
    `CELL_KEYS` and "class_names".
    """
    save_tensors(path, {k: tensors[k] for k in SAMPLE_TENSORS}, {"cell": json.dumps(dict(cell))})


def read_sample(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`(cell, tensors)` of one file of samples (see `write_samples`); raises `RunError` where it is anything else."""
    tensors = load_tensors(path, expect=SAMPLE_TENSORS)
    try:
        cell = json.loads(read_metadata(path).get("cell", ""))
        lacking = [k for k in (*CELL_KEYS, "class_names") if k not in cell]
    except (ValueError, TypeError):
        lacking = ["cell"]
    if lacking:
        raise RunError(f"{path} does not say of which {lacking[0]} its images are; delete it and {_AGAIN}")
    if len({len(tensor) for tensor in tensors.values()} | {len(tensors["clean"])}) > 1:
        raise RunError(f"{path} holds more of one thing than of another; delete it and {_AGAIN}")
    return cell, tensors


def read_samples(run: str | Path) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """`(cell, tensors)` of every cell of a run folder that has samples (see `write_samples`); raises `RunError` for a
    file that is damaged, or of a cell that the folder has no rows of."""
    found = []
    for file in sorted(Path(run).glob("samples/*.safetensors")):
        if (Path(run) / "rows").is_dir() and not (Path(run) / "rows" / file.stem).is_dir():
            raise RunError(f"{file} is of a cell that {run} has no rows of; delete it")
        found.append(read_sample(file))
    return found
