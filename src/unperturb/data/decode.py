"""A source decoded once, into the folder of its pixels."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unperturb import per_image_rng
from unperturb.data import store
from unperturb.data.pictures import Picture, Pixels, picture_size
from unperturb.data.sets import DataError, some
from unperturb.data.sources import SOURCES, Found, Progress

_DIGITS_TEST = 360
TEST_SEED = 0x74657374  # of what is drawn for the test split, whatever the seed of a run


def write_source(
    folder: Path,
    name: str,
    found: Found,
    size: int | None,
    grey: bool | None,
    skip_damaged: bool,
    progress: Progress | None,
) -> None:
    """Decode a source. grey: None finds out."""
    names = found.class_names()
    faults: list[str] = []
    done = 0
    shape, why, mixed = _choose_size(name, size, found, progress)
    _check_room(folder, name, found.total * shape[0] * shape[1] * (1 if grey else 3))
    total = max(map(sum, SOURCES[name].counts)) if name in SOURCES else found.total

    def counted(split: str) -> Iterator[Picture]:
        nonlocal done
        for picture in found.splits[split]():
            done += 1
            if progress and done % 100 == 0:
                progress(done, max(done, total), split)
            yield picture

    def chunks(split: str) -> Iterator[store.Chunk]:
        for chunk in store.decode_all(counted(split), shape, bool(grey), faults):
            if progress:
                progress(done, max(done, total), split)
            yield chunk

    def about() -> dict[str, Any]:
        if faults and not skip_damaged:
            raise _damaged(name, faults, done)
        left_out = [f"{len(faults):,} of {done:,} pictures left out: {some(faults, 3)}"] if faults else []
        return {
            "source": name,
            "where": found.where,
            "class_names": list(SOURCES[name].names if name in SOURCES else ()) or names,
            "size": why,
            "notes": [*([why] if mixed else []), *found.notes, *left_out],
            "left_out": faults,
        }

    store.write(folder, {split: chunks(split) for split in found.splits}, about, keep_color=grey is not None)


def _choose_size(
    name: str, size: int | None, found: Found, progress: Progress | None
) -> tuple[tuple[int, int], str, bool]:
    """(H, W), why it is that, and whether pictures of several sizes were made one unasked."""
    if size:
        asked = name not in SOURCES or size != SOURCES[name].size
        return (size, size), f"{size}x{size}, " + ("as asked" if asked else "the default of this set"), False
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    faults: list[str] = []
    for n, picture in enumerate(found.sample(), 1):
        try:
            sizes[picture_size(picture)] += 1
        except DataError as error:
            faults.append(str(error))
        if progress and n % 100 == 0:
            progress(n, n, "looking at sizes")
    if not sizes:
        if faults:
            raise _damaged(name, faults, len(faults))
        raise DataError(f"{name}: its train split holds no pictures")
    (h, w), n = sizes.most_common(1)[0]
    if len(sizes) == 1:
        return (h, w), f"{h}x{w}, that of all {n:,} pictures looked at", False
    why = f"{h}x{w}, that of {n:,} of {sizes.total():,} pictures looked at; the others were resized and cropped to it"
    return (h, w), f"{why} (size=... or --size makes all of them square)", True


def _damaged(name: str, faults: list[str], total: int) -> DataError:
    return DataError(
        f"{len(faults):,} of {total:,} pictures of {name} cannot be used: {some(faults, 5)}. "
        "Mend or remove them, or leave them out with skip_damaged=True (--skip-damaged)"
    )


def _check_room(folder: Path, name: str, needed: int) -> None:
    """Raise `DataError` where the disk has no room for what would be decoded: better now than in an hour."""
    there = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DataError(
            f"{name} decoded takes {needed / 1e9:,.1f} GB, and the disk of {there} has {free / 1e9:,.1f}: "
            "take a smaller size (size=..., --size), or set UNPERTURB_CACHE to another folder"
        )


# The embedded digits ------------------------------------------------------------------------------------------------


def write_digits(folder: Path, size: int | None) -> None:
    """scikit-learn's 1,797 digits of 8x8, enlarged to 20x20 in the middle of 28x28, as MNIST's lie."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    values, labels = digits.images.astype(np.int64), torch.from_numpy(digits.target.astype(np.int64))
    # Bilinear weights are tenths here, so whole numbers give the same bytes on every machine.
    places = np.clip(4 * np.arange(20) - 3, 0, 70)
    weights = np.zeros((20, 8), np.int64)
    weights[np.arange(20), places // 10] += 10 - places % 10
    weights[np.arange(20), np.minimum(places // 10 + 1, 7)] += places % 10
    enlarged = (weights @ values @ weights.T * 255 + 800) // 1600
    pixels: Pixels = np.pad(enlarged, ((0, 0), (4, 4), (4, 4))).astype(np.uint8)[:, None]
    if size and size != 28:
        floats = torch.from_numpy(pixels).float()
        resized = torch.nn.functional.interpolate(floats, (size, size), mode="bilinear", antialias=True)
        pixels = resized.round().clamp(0, 255).to(torch.uint8).numpy()

    # The same 36 of each class to test, whatever `seed` is.
    order = per_image_rng.permutation(TEST_SEED, 0, len(labels))
    test = torch.cat([order[labels[order] == k][: _DIGITS_TEST // 10] for k in range(10)]).sort().values
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[test] = False

    def chunk(rows: Tensor) -> list[store.Chunk]:
        return [(pixels[rows.numpy()], labels[rows].tolist(), True)]

    meta = {
        "source": "digits",
        "where": "scikit-learn",
        "class_names": [str(i) for i in range(10)],
        "size": f"{size}x{size}, as asked" if size else "28x28, the default of this set",
        "notes": [],
        "left_out": [],
    }
    store.write(folder, {"train": chunk(rest.nonzero()[:, 0]), "test": chunk(test)}, lambda: meta)
