"""Decoded sets on disk: pictures become 8-bit pixels once, in bounded memory, and are memory-mapped ever after."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unperturb.data.pictures import Picture, Pixels, decode
from unperturb.data.sets import DataError, digest

VERSION = 3  # of the cache's layout and of the decoding; part of every key
CHUNK = 512  # pictures decoded at a time, fewer where they are large
CHUNK_BYTES = 256 * 1024**2
BLOCK = 16 * 1024**2  # bytes of a file that share a digest
WHOLE = 1024**3  # a file up to this size is checked whole whenever it is read
SAMPLED = 16  # how many blocks are checked of a larger one, others each time
Chunk = tuple[Pixels, list[int], bool]


@dataclass(frozen=True)
class Stored:
    """A decoded split. images: `(N, C, H, W)` uint8, memory-mapped. labels: `(N,)` int64."""

    images: Tensor
    labels: Tensor
    fingerprint: str


def cache_root(cache: str | Path | None) -> Path:
    """`cache`, or $UNPERTURB_CACHE, or ~/.cache/unperturb."""
    return Path(cache or os.environ.get("UNPERTURB_CACHE") or Path.home() / ".cache" / "unperturb").expanduser()


def key(*parts: object) -> str:
    """12 hex digits that change with any of `parts`."""
    return hashlib.sha256(repr((VERSION, *parts)).encode(errors="surrogateescape")).hexdigest()[:12]


def decode_all(pictures: Iterable[Picture], size: tuple[int, int], grey: bool, faults: list[str]) -> Iterator[Chunk]:
    """Chunks of pixels `(n, C, H, W)`, their labels, and whether all of the pictures are grey. Threads decode.

    faults: takes a sentence on each picture that cannot be used; it is left out.
    """
    workers = os.cpu_count() or 1
    pictures = iter(pictures)
    at_once = _at_once(size[0] * size[1] * (1 if grey else 3))

    def decoded(picture: Picture) -> tuple[Pixels, bool] | str:
        try:
            return decode(picture, size, grey)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(itertools.islice(pictures, at_once)):
            # A slice for each worker: handing over single 28x28 pictures costs more than decoding them.
            slices = [chunk[i::workers] for i in range(workers)]
            done: list[Any] = [None] * len(chunk)
            for i, part in enumerate(pool.map(lambda some: [decoded(p) for p in some], slices)):
                done[i::workers] = part
            faults += [one for one in done if isinstance(one, str)]
            good = [(one, p.label) for one, p in zip(done, chunk) if not isinstance(one, str)]
            pixels = np.empty((len(good), *size) if grey else (len(good), *size, 3), np.uint8)
            for i, ((one, _), _) in enumerate(good):
                pixels[i] = one
            channels_first = pixels[:, None] if grey else pixels.transpose(0, 3, 1, 2)
            yield channels_first, [label for _, label in good], all(was_grey for (_, was_grey), _ in good)


def _at_once(picture_bytes: int) -> int:
    return max(1, min(CHUNK, CHUNK_BYTES // picture_bytes))


# Folders ------------------------------------------------------------------------------------------------------------


def write(
    folder: Path, splits: Mapping[str, Iterable[Chunk]], about: Callable[[], dict[str, Any]], keep_color: bool = True
) -> None:
    """Decode `splits` into `folder`, which appears whole or not at all.

    about: called when all is decoded; what it returns is kept beside each split's size and digests.
    keep_color: False makes pictures that are grey in all splits one channel. One process writes, others wait for it.
    Raises `DataError` where a split is empty or the disk is full, and what `about` raises.
    """
    found: dict[str, Any] = {}
    with disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
    with disk(folder), _lock(folder):
        if read(folder, whole=True):  # a look at some blocks could miss the damage that brought us here
            return  # another process was faster
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for split, chunks in splits.items():
                found[split] = _write_split(temporary / split, chunks)
            meta = about()
            for split, one in found.items():
                if not one["n"]:
                    raise DataError(f"{meta['source']}: its {split} split holds no pictures")
            all_grey = all(one["grey"] for one in found.values())
            for split, one in found.items():
                del one["grey"]
                if all_grey and not keep_color:
                    _drop_color(temporary / f"{split}.pixels", one)
                one["fingerprint"] = fingerprint(*_map(temporary / split, one))
                one["files"] = {suffix: _seal(temporary / f"{split}.{suffix}") for suffix in ("pixels", "labels")}
            text = json.dumps({**meta, "splits": found})
            (temporary / "meta.json").write_text(f"{digest([text.encode()])}\n{text}\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # damaged, or `read` had found it
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read(folder: Path, *, whole: bool = False) -> tuple[dict[str, Any], dict[str, Stored]] | None:
    """The meta data and the splits of a folder that `write` made; None where there is none or it is damaged.

    Every file is checked against its digests: whole up to `WHOLE` bytes, or where it was written to since, or where
    `whole` asks for it; else a few of its blocks.
    """
    try:
        said, text = (folder / "meta.json").read_text(encoding="utf-8").rstrip("\n").split("\n")
        if digest([text.encode()]) != said:
            return None
        meta = json.loads(text)
        for split, one in meta["splits"].items():
            for suffix, seal in one["files"].items():
                if not _is_whole(folder / f"{split}.{suffix}", seal, whole):
                    return None
        return meta, {k: Stored(*_map(folder / k, one), one["fingerprint"]) for k, one in meta["splits"].items()}
    except (OSError, ValueError, KeyError, RuntimeError):
        return None


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """The fingerprint of a whole split, as `ImageSet.fingerprint` has it; reads a memory map once, in order."""
    chunks = (images[i : i + CHUNK].numpy() for i in range(0, len(images), CHUNK))
    return digest(itertools.chain([repr(tuple(images.shape[1:])).encode()], chunks, [labels.numpy()]))


def _seal(file: Path) -> dict[str, Any]:
    """What a file must be when it is read: its size, when it was written, a digest of each block."""
    status = file.stat()
    blocks = range(-(-status.st_size // BLOCK))
    return {"size": status.st_size, "written": status.st_mtime_ns, "digests": _digests(file, blocks)}


def _is_whole(file: Path, seal: dict[str, Any], whole: bool) -> bool:
    status = file.stat()
    if status.st_size != seal["size"]:
        return False
    blocks: list[int] = list(range(len(seal["digests"])))
    untouched = status.st_mtime_ns == seal["written"]
    whole = whole or status.st_size <= WHOLE or not untouched
    if not whole:
        blocks = random.SystemRandom().sample(blocks, min(SAMPLED, len(blocks)))
    if _digests(file, blocks) != [seal["digests"][i] for i in blocks]:
        return False
    if whole and not untouched:  # copied or moved, and found whole: no need to read all of it again next time
        with contextlib.suppress(OSError):
            os.utime(file, ns=(status.st_atime_ns, seal["written"]))
    return True


def _digests(file: Path, blocks: Iterable[int]) -> list[str]:
    with file.open("rb") as opened, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        number = opened.fileno()
        return list(pool.map(lambda i: digest([os.pread(number, BLOCK, i * BLOCK)]), blocks))


def _write_split(path: Path, chunks: Iterable[Chunk]) -> dict[str, Any]:
    labels: list[int] = []
    shape: tuple[int, ...] = ()
    all_grey = True
    with path.with_suffix(".pixels").open("wb") as file:
        for pixels, some, grey in chunks:
            file.write(np.ascontiguousarray(pixels).data)
            labels += some
            shape, all_grey = pixels.shape[1:], all_grey and grey
    path.with_suffix(".labels").write_bytes(np.asarray(labels, dtype="<i8").tobytes())
    return {"n": len(labels), "shape": list(shape), "grey": all_grey}


def _drop_color(path: Path, found: dict[str, Any]) -> None:
    c, h, w = found["shape"]
    pixels = np.memmap(path, np.uint8, "r", shape=(found["n"], c, h, w))
    narrow = path.with_suffix(".narrow")
    at_once = _at_once(h * w)
    with narrow.open("wb") as file:
        for i in range(0, found["n"], at_once):
            file.write(pixels[i : i + at_once, :1].tobytes())
    narrow.replace(path)
    found["shape"] = [1, h, w]


def _map(path: Path, found: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The memory map of a split's pixels, and its labels; `ValueError` where a file is not as long as it should."""
    n, (c, h, w) = found["n"], found["shape"]
    pixels, labels = path.with_suffix(".pixels"), path.with_suffix(".labels")
    if pixels.stat().st_size != n * c * h * w or labels.stat().st_size != 8 * n:
        raise ValueError(f"{pixels} or {labels} is truncated")
    # Private: a write by mistake stays in this process.
    images = torch.from_file(str(pixels), shared=False, size=n * c * h * w, dtype=torch.uint8).reshape(n, c, h, w)
    return images, torch.from_numpy(np.fromfile(labels, dtype="<i8").astype(np.int64))


# The disk -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold `folder` for writing; `BlockingIOError` where another does and `wait` is off."""
    import fcntl

    # Never through a link that somebody put there.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    number = os.open(folder.with_name(f"{folder.name}.lock"), flags, 0o666)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(number)


def _sweep(root: Path) -> None:
    """Remove what killed processes left half written: a folder whose lock is free has no writer."""
    for leftover in root.glob(".*-*"):
        name = leftover.name[1:].rpartition("-")[0]
        if leftover.is_dir() and not leftover.is_symlink():
            with contextlib.suppress(BlockingIOError), _lock(root / name, wait=False):
                shutil.rmtree(leftover, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """`content` to `path`, whole or not at all; raises `DataError` where the disk does not take it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            with contextlib.suppress(OSError):  # of a kill; another process that writes it now is done in seconds
                if leftover.lstat().st_mtime < time.time() - 3600:
                    leftover.unlink()
        try:
            with temporary.open("xb") as file:  # a new file: a link that somebody put there is not followed
                file.write(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Whatever the disk refuses while `path` is written, as a `DataError`."""
    full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    reasons = full | dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "no permission to write there")
    try:
        yield
    except OSError as error:
        reason = reasons.get(error.errno or 0) or error.strerror or str(error)
        advice = "Free some space, or choose another folder" if error.errno in full else "Choose another folder"
        raise DataError(
            f"{path} could not be written: {reason}. {advice} (--out, or UNPERTURB_CACHE for decoded pixels)"
        ) from error
