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
import secrets
import subprocess
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

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


@pydantic_dataclass(kw_only=True, frozen=True, config=ConfigDict(allow_inf_nan=False))
class Outcome:
    """What a training cost: PFLOP, seconds of training (without validation), steps, images per second, GFLOP/s, and the
    share of what a plain convolution reached on the same machine in the same run; what is in `training.json`."""

    pflop: float
    seconds: float
    steps: int = 0
    images_per_second: float = 0.0
    gflops: float = 0.0
    convolution_gflops: float = 0.0
    share: float = 0.0
    precision: str = "float32"
    memory_format: str = "contiguous"
    kept_step: int = 0
    validation: dict[str, float] = Field(default_factory=dict)
    test: dict[str, int | float] = Field(default_factory=dict)


# Files --------------------------------------------------------------------------------------------------------------

TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.tmp")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the system refuses inside becomes a `RunError` that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = f"the last whole {path.name} is still there" if os.path.lexists(path) else "nothing was there before"
            said = f"the disk is full: could not write {path}; {kept}. Free some space and resume."
        else:
            why = (error.strerror or str(error) or type(error).__name__).lower()
            said = f"could not write {path} ({why}); choose another folder, or make this one writable"
        raise RunError(said) from error


def _temporary(path: Path) -> Path:
    """A new empty file beside `path`, of a name that nobody can foresee: a link planted there would be followed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary


def write_atomically(path: Path, write: Callable[[Path], object], *, before: Path | None = None) -> None:
    """Call `write(temporary path)`, flush it to disk, then rename to `path`; on failure `path` stays as it was.

    before: where the file that `path` replaces goes. Raises `RunError` where the system refuses.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if before is not None and path.exists():
                path.replace(before)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left half written in `folder`; only while its lock is held."""
    for path in folder.rglob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            with writing(path):
                path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` to `path`, atomically."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON to `path`, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, schema: Any = None) -> Any:
    """The JSON in `path`; with a schema (a pydantic model, a dataclass or a type), checked and made into one.

    Raises `RunError` with path and key where the file is missing, cannot be read, is broken, or does not fit.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is not there: {path.parent} holds no finished run") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # JSON, UTF-8 and numbers of thousands of digits
        raise RunError(f"{path} is not valid JSON ({error}); the run folder is damaged") from None
    if schema is None:
        return value
    try:
        return TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        given = shortened(repr(first["input"]))
        raise RunError(f"{path} is not what was written there: {key}: {first['msg']}, not {given}") from None


def shortened(text: str, most: int = 80) -> str:
    """`text` on one line, of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


# Tensors ------------------------------------------------------------------------------------------------------------


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 (64 hex digits) of names, dtypes, shapes and bytes, in the order of the names, and of the metadata."""
    import torch

    sha = hashlib.sha256(json.dumps(sorted((metadata or {}).items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, before: Path | None = None
) -> str:
    """Tensors by name to a safetensors file, atomically, with their digest as its metadata `"sha256"`; returns that.

    before: where the file that `path` replaces goes.
    """
    from safetensors.torch import save

    digest = digest_of(tensors, metadata)
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    packed = save(plain, {**(metadata or {}), "sha256": digest})
    write_atomically(path, lambda p: p.write_bytes(packed), before=before)
    return digest


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; raises as `load_tensors` does."""
    return _read_tensors(path, names=())[1]


def load_tensors(
    path: Path,
    *,
    require_digest: bool = False,
    expect: Mapping[str, tuple[str, tuple[int | None, ...]]] | None = None,
    metadata: Mapping[str, str] | None = None,
    finite: bool = True,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, checked against its digest where it has one.

    require_digest: refuse a file without one. expect: the names that must be there, no others, each with its dtype
    ("float32") and shape (None: any size). metadata: entries that the file's own must hold. finite: refuse NaN and
    infinity.

    Raises `RunError` where the file is missing, truncated, damaged, not safetensors, or not what is expected.
    """
    tensors, own = _read_tensors(path)
    again = "; make it again or fetch it again"
    if require_digest and "sha256" not in own:
        raise RunError(f"{path} holds no digest of its contents{again}")
    if "sha256" in own:
        given = own.pop("sha256")
        if digest_of(tensors, own) != given:
            raise RunError(f"{path} is damaged: its contents do not match their digest{again}")
    for key, value in (metadata or {}).items():
        if own.get(key) != value:
            raise RunError(f"{path} is not what is wanted: its {key} is {own.get(key)!r}, not {value!r}{again}")
    if expect is not None and set(expect) != set(tensors):
        found = ", ".join(sorted(tensors)) or "nothing"
        raise RunError(f"{path} holds {shortened(found)}; expected {', '.join(sorted(expect))}{again}")
    for name, (dtype, shape) in (expect or {}).items():
        tensor = tensors[name]
        fits = tensor.ndim == len(shape) and all(want in (None, has) for want, has in zip(shape, tensor.shape))
        if not fits or str(tensor.dtype) != f"torch.{dtype}":
            raise RunError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {tuple(shape)}{again}"
            )
    if finite:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise RunError(f"{path}: {name} holds NaN or infinity{again}")
    return tensors


def _read_tensors(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError:
        raise RunError(f"no weights at {path}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise RunError(
            f"{path} is truncated or not a safetensors file ({error}); make it again or fetch it again"
        ) from None


def fit_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], folder: Path, described: str, digest: str | None
) -> None:
    """Give `module`, built from the file `described` of `folder`, the `tensors` of `model.safetensors` there.

    Names, shapes and dtypes must be the module's own, except that weights stored in half precision on purpose, which
    the file's metadata says (`"stored_as": "float16"` or `"bfloat16"`), are turned into its own. None may be NaN, and
    none infinite but where the module's own is (a threshold that is not set yet). digest: what `save_tensors` returned
    when they were kept. Raises `RunError`.
    """
    path, own = folder / "model.safetensors", module.state_dict()
    metadata = read_metadata(path)
    allowed = {f"torch.{dtype}" for dtype in {"float16", "bfloat16"} & {metadata.get("stored_as")}}

    def fits(name: str) -> bool:
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            return False
        mine, theirs = own[name], tensors[name]
        return mine.dtype == theirs.dtype or (mine.is_floating_point() and str(theirs.dtype) in allowed)

    strangers = sorted(name for name in own.keys() | tensors.keys() if not fits(name))
    if strangers:
        some = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise RunError(
            f"{path} does not hold the weights of {folder / described} ({len(strangers)} tensors differ in name, shape "
            f"or dtype: {some}); make it again"
        )
    if digest is not None and digest != (metadata.get("sha256") or digest_of(tensors, metadata)):
        raise RunError(
            f"{path} is damaged or of another run: its contents do not match the digest in {described}; make it again "
            "or fetch it again"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (tensor.isfinite() | (tensor == own[name])).all():
            raise RunError(f"{path}: {name} holds NaN or infinity; make it again or fetch it again")
    module.load_state_dict(dict(tensors))


# Folders ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing; raises `RunError` that says who has it where another process does, or why it cannot be
    written."""
    import fcntl

    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            # Not through a link: what it points to would be emptied.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            file = stack.enter_context(os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = file.read().strip() or "another process"
                raise RunError(
                    f"{folder} is being written by {owner}; wait for it, stop it, or choose another folder"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} since {datetime.datetime.now().isoformat(timespec='seconds')}")
            file.flush()
        yield


def open_run(
    folder: Path,
    recipe: Mapping[str, Any],
    *,
    resume: bool,
    about: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
) -> None:
    """Make `folder` the home of the run that `recipe` fixes, or check that it already is; under its lock.

    about: what else the numbers depend on, kept beside the environment. free: keys of the recipe, such as
    `training.log_every`, that may differ from what the folder was begun with. What a killed writer left half written is
    removed. Warns where a run goes on with other threads, device or torch than it began with.

    Raises `RunError` where the folder holds a run and `resume` is off, or holds the run of another recipe (the message
    names the keys that differ), or holds anything else.
    """
    path, beside = folder / "recipe.json", folder / "environment.json"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(p.name for p in folder.iterdir())
    if path.name not in names:
        # Hidden files are the lock, and what a run that was killed at its start left half written.
        strangers = [name for name in names if name[0] != "." and name != beside.name]
        if strangers:
            raise RunError(f"{folder} already holds something else ({', '.join(strangers[:3])}); choose another folder")
        write_json(beside, {**environment(), **(about or {})})
        write_json(path, recipe)  # last: with it the folder is a run
        sweep(folder)
        return
    there = read_json(path, dict[str, Any])
    differs = [key for key in _differences(there, json.loads(json.dumps(recipe))) if key not in free]
    if differs:
        raise RunError(
            f"{folder} already holds another run (it differs in {', '.join(differs[:5])}); choose another folder"
        )
    if not resume:
        raise RunError(f"{folder} already holds this run; go on with --resume, or choose another folder")
    sweep(folder)
    if beside.name not in names:
        write_json(beside, {**environment(), **(about or {})})
    _goes_on(beside)


class Environment(BaseModel):
    """What is in `environment.json`, as far as anybody looks at it; `resumed`: under which others the run went on."""

    model_config = ConfigDict(extra="allow")
    versions: dict[str, str] = Field(default_factory=dict)
    device: str | None = None
    threads: int | None = None
    resumed: list[dict[str, Any]] = Field(default_factory=list)


def _goes_on(path: Path) -> None:
    """Warn, and keep it in the environment's file, where a run goes on under other conditions than it began with."""
    began, now = read_json(path, Environment), environment()
    pairs = {
        "torch": (began.versions.get("torch"), now["versions"]["torch"]),
        "device": (began.device, now["device"]),
        "threads": (began.threads, now["threads"]),
    }
    changed = [f"{what} was {a}, is {b}" for what, (a, b) in pairs.items() if a is not None and a != b]
    if not changed or now in began.resumed:
        return
    warnings.warn(
        f"{path.parent} goes on under other conditions than it began with ({'; '.join(changed)}): the last digits of "
        "its results will not be those of a run that was never stopped",
        stacklevel=3,
    )
    began.resumed.append(now)
    write_json(path, began.model_dump(mode="json"))


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [path]


def environment() -> dict[str, Any]:
    """What a number depends on besides its recipe: versions, processor features, threads, commit, date."""
    import torch

    return {**_machine(), "threads": torch.get_num_threads()}


@functools.cache
def _machine() -> dict[str, Any]:
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
