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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

if TYPE_CHECKING:
    from torch import Tensor, nn


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message says what to do."""


@pydantic_dataclass(kw_only=True, frozen=True, config=ConfigDict(allow_inf_nan=False))
class Outcome:
    """What a training cost: PFLOP, seconds of training (without validation), steps, images per second, GFLOP/s, and the
    fraction of what a plain convolution reached on the same machine in the same run; what is in `training.json`."""

    pflop: float
    seconds: float
    steps: int = 0
    images_per_second: float = 0.0
    gflops: float = 0.0
    convolution_gflops: float = 0.0
    fraction_of_peak: float = 0.0
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
def lock(folder: Path, name: str = ".lock", *, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for writing by its file `name`; raises `RunError` that says who has it where another process does,
    unless it is to `wait` for that one, or why it cannot be written."""
    import fcntl

    path = folder / name
    with contextlib.ExitStack() as stack:
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            # Not through a link: what it points to would be emptied.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            file = stack.enter_context(os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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
    names the keys that differ, with both values), or holds anything else.
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
    differs = _differences(there, json.loads(json.dumps(recipe)))
    if differs := {key: values for key, values in differs.items() if key not in free}:
        raise RunError(
            f"{folder} already holds another run: {_said(differs)}. Ask for that one, or choose another folder (--out)"
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


# What is made of the other keys, or tells things of one name apart: named only where nothing else differs.
_MADE_OF_OTHERS = ("attacks", "fingerprints", "used")


def _differences(a: Any, b: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Both values by the keys in which `a` and `b` differ, such as `training.lr` and `attacks.0.attack.eps`."""
    inner: Iterable[Any] = ()
    if isinstance(a, dict) and isinstance(b, dict):
        inner = [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys())]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(isinstance(v, dict) for v in a):
        inner = [(str(i), *pair) for i, pair in enumerate(zip(a, b))]
    elif a != b:
        return {path: (a, b)}
    return {k: v for key, x, y in inner for k, v in _differences(x, y, f"{path}.{key}" if path else key).items()}


def _said(differs: Mapping[str, tuple[Any, Any]]) -> str:
    """What differs, for people: "eps was 8/255 and is 0.3 now"."""
    asked = {k: v for k, v in differs.items() if k.partition(".")[0] not in _MADE_OF_OTHERS}
    shown = list((asked or differs).items())[:5]
    said = []
    for key, values in shown:
        where, _, name = key.partition(".")
        named = {"fingerprints": f"the fingerprint of {name}", "used": name}.get(where, key)
        was, now = _apart(*values)
        said.append(f"{named} was {was} and is {now} now")
    more = len(asked or differs) - len(shown)
    return "; ".join(said) + (f"; and {more} more" if more else "")


def _apart(*values: Any) -> list[str]:
    """Two values as text; of long ones of like parts, such as the settings of an attack, the parts that differ."""
    texts = ["not set" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]
    first, second = (text.split(", ") for text in texts)
    if len(first) == len(second) > 1:
        pairs = [pair for pair in zip(first, second) if pair[0] != pair[1]]
        texts = [", ".join(part) for part in zip(*pairs)]
    return [shortened(text, 120) for text in texts]


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
