"""Decoded sets on disk: pictures become 8-bit pixels once, in bounded memory, and are memory-mapped ever after."""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unperturb.data.sets import DataError, digest

VERSION = 1  # of the cache's layout and of the decoding; part of every key
CHUNK = 512  # pictures decoded at a time: at most some hundred MB, also of photographs
Pixels = NDArray[np.uint8]
Chunk = tuple[Pixels, list[int], bool]


@dataclass(frozen=True)
class Picture:
    """One encoded picture with its label. data: PNG, JPEG, ... bytes or the file that holds them. where: for errors."""

    data: bytes | Path
    label: int
    where: str


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
    return hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()[:12]


# Decoding -----------------------------------------------------------------------------------------------------------


def decode(picture: Picture, size: tuple[int, int] | None, grey: bool) -> tuple[Pixels, bool]:
    """`(H, W, 3)` uint8 (`(H, W)` where `grey`), and whether the picture itself is grey.

    size: (H, W); a picture of another size is resized until it covers it, then center-cropped.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(picture.data) if isinstance(picture.data, bytes) else picture.data) as opened:
            image: Image.Image = opened
            if opened.format in ("JPEG", "MPO"):
                if size and min(opened.size) > 2 * max(size):
                    # A large photograph is decoded at a half, a quarter or an eighth, at least twice what is wanted.
                    opened.draft(opened.mode, (2 * size[1], 2 * size[0]))
                image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
            was_grey = image.mode in ("L", "1")
            image = image.convert("L" if grey else "RGB")
            if size and image.size != (size[1], size[0]):
                scale = max(size[0] / image.height, size[1] / image.width)
                covering = (max(size[1], round(image.width * scale)), max(size[0], round(image.height * scale)))
                image = image.resize(covering, Image.Resampling.BICUBIC, reducing_gap=3.0)
                left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
                image = image.crop((left, top, left + size[1], top + size[0]))
            return np.asarray(image), was_grey
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{picture.where}: not a whole picture ({error}); fetch or export it again") from error


def picture_size(picture: Picture) -> tuple[int, int]:
    """(H, W) by the picture's header."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture.data) if isinstance(picture.data, bytes) else picture.data) as opened:
            width, height = opened.size
            # Orientations 5 to 8 lie on their side.
            return (width, height) if opened.getexif().get(0x0112, 1) >= 5 else (height, width)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{picture.where}: not a whole picture ({error}); fetch or export it again") from error


def most_common_size(pictures: Iterable[Picture]) -> tuple[int, int]:
    """The (H, W) that most of `pictures` have."""
    return collections.Counter(map(picture_size, pictures)).most_common(1)[0][0]


def decode_all(pictures: Iterable[Picture], size: tuple[int, int], grey: bool) -> Iterator[Chunk]:
    """Chunks of pixels `(n, C, H, W)`, their labels, and whether all of the pictures are grey. Threads decode."""
    workers = os.cpu_count() or 1
    pictures = iter(pictures)
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(itertools.islice(pictures, CHUNK)):
            # A slice for each worker: handing over single 28x28 pictures costs more than decoding them.
            slices = [chunk[i::workers] for i in range(workers)]
            done = list(pool.map(lambda part: [decode(p, size, grey) for p in part], slices))
            pixels = np.empty((len(chunk), *size) if grey else (len(chunk), *size, 3), np.uint8)
            for i, part in enumerate(done):
                for j, (one, _) in enumerate(part):
                    pixels[i + j * workers] = one
            channels_first = pixels[:, None] if grey else pixels.transpose(0, 3, 1, 2)
            all_grey = all(was_grey for part in done for _, was_grey in part)
            yield channels_first, [p.label for p in chunk], all_grey


# Folders ------------------------------------------------------------------------------------------------------------


def write(folder: Path, meta: dict[str, Any], splits: Mapping[str, Iterable[Chunk]], keep_color: bool = True) -> None:
    """Decode `splits` into `folder`, which appears whole or not at all, with `meta` and each split's size beside them.

    keep_color: False makes pictures that are grey in all splits one channel. One process writes, others wait for it.
    Raises `DataError` where a split is empty or the disk is full.
    """
    found: dict[str, Any] = {}
    with _disk(folder), _lock(folder):
        if read(folder):
            return  # another process was faster
        for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a killed process, since we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for split, chunks in splits.items():
                found[split] = _write_split(temporary / split, chunks, meta["source"])
            all_grey = not [one for one in found.values() if not one["grey"]]
            for split, one in found.items():
                del one["grey"]
                if all_grey and not keep_color:
                    _drop_color(temporary / f"{split}.pixels", one)
                one["fingerprint"] = fingerprint(*_map(temporary / split, one))
            (temporary / "meta.json").write_text(json.dumps({**meta, "splits": found}, indent=1), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # damaged, or `read` had found it
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]] | None:
    """The meta data and the splits of a folder that `write` made; None where there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return meta, {k: Stored(*_map(folder / k, one), one["fingerprint"]) for k, one in meta["splits"].items()}
    except (OSError, ValueError, KeyError, RuntimeError):
        return None


def intact(folder: Path) -> bool:
    """Whether a folder's pixels still have the fingerprints that they were written with."""
    there = read(folder)
    return there is not None and all(
        fingerprint(one.images, one.labels) == one.fingerprint for one in there[1].values()
    )


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """The fingerprint of a whole split, as `ImageSet.fingerprint` has it; reads a memory map once, in order."""
    chunks = (images[i : i + CHUNK].numpy() for i in range(0, len(images), CHUNK))
    return digest(itertools.chain([repr(tuple(images.shape[1:])).encode()], chunks, [labels.numpy()]))


def _write_split(path: Path, chunks: Iterable[Chunk], source: str) -> dict[str, Any]:
    labels: list[int] = []
    shape: tuple[int, ...] = ()
    all_grey = True
    with path.with_suffix(".pixels").open("wb") as file:
        for pixels, some, grey in chunks:
            file.write(np.ascontiguousarray(pixels).data)
            labels += some
            shape, all_grey = pixels.shape[1:], all_grey and grey
    if not labels:
        raise DataError(f"{source}: its {path.name} split holds no pictures")
    path.with_suffix(".labels").write_bytes(np.asarray(labels, dtype="<i8").tobytes())
    return {"n": len(labels), "shape": list(shape), "grey": all_grey}


def _drop_color(path: Path, found: dict[str, Any]) -> None:
    c, h, w = found["shape"]
    pixels = np.memmap(path, np.uint8, "r", shape=(found["n"], c, h, w))
    narrow = path.with_suffix(".narrow")
    with narrow.open("wb") as file:
        for i in range(0, found["n"], CHUNK):
            file.write(pixels[i : i + CHUNK, :1].tobytes())
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


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    reasons |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "no permission to write there")
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise DataError(
            f"{folder} could not be made: {reasons[error.errno]}. "
            "Free some space, or set UNPERTURB_CACHE to another folder"
        ) from error
