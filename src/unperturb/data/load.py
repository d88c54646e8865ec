"""`load_dataset`: a name to train, validation and test, decoded once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unperturb import per_image_rng, registry, screen
from unperturb.data import store, tables
from unperturb.data.decode import TEST_SEED, write_digits, write_source
from unperturb.data.folders import find_folder
from unperturb.data.pictures import MAX_PIXELS
from unperturb.data.sets import IN_MEMORY, DataError, ImageSet, Splits
from unperturb.data.sources import SOURCES, Progress
from unperturb.data.store import Stored

NAMES = {
    "digits": "scikit-learn's 1,797 handwritten digits at 28x28, embedded",
    **{name: f"{source.hub} on the hub" for name, source in SOURCES.items()},
}


def load_dataset(
    name: str,
    *,
    size: int | None = None,
    val: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    skip_damaged: bool = False,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Splits:
    """The data set called `name`: digits, mnist, fashion_mnist, cifar10, cifar100, imagenette, imagenet, folder:PATH or
    hub:NAME.

    size: side of the (then square) images in pixels; None keeps the source's own (the most common where its pictures
    differ; 128 for imagenette and imagenet). Pictures of another size are resized to cover it and center-cropped.
    val: how many images are split off train for validation, by `seed`; None takes the source's own validation split, or
    10 % of train and at most 5,000. The test split depends on neither.
    class_names: the classes in the order of a classifier's logits; the labels are renumbered by name.
    skip_damaged: leave out what cannot be used (a damaged picture, a row without a label), which otherwise is an error
    that lists it. The splits say how many that were.
    cache: where decoded pixels are kept; None means $UNPERTURB_CACHE or ~/.cache/unperturb. The first start decodes,
    the next ones map what it left, after a look at its digests.
    progress: called while decoding with (pictures done, of how many as far as is known, split), in place of the bar
    that is shown unless `quiet`.
    Raises `UnknownNameError`, and `DataError` where the source is missing, broken or incomplete. Warns where pictures
    of several sizes were made one, or something was left out.
    """
    with screen.shown(f"decoding {name}", progress, quiet) as update:
        _, _, splits = open_dataset(
            name, size=size, val=val, seed=seed, skip_damaged=skip_damaged, cache=cache, progress=update
        )
    for note in splits.notes:
        warnings.warn(f"{name}: {note}", stacklevel=2)
    return splits if class_names is None else splits.with_class_names(class_names)


def open_dataset(
    name: str,
    *,
    size: int | None = None,
    val: int | None = None,
    seed: int = 0,
    skip_damaged: bool = False,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    whole: bool = False,
) -> tuple[Path, str, Splits]:
    """The folder of decoded pixels, why they have the size that they have, and the splits of `load_dataset`.

    whole: read cached pixels through, however many there are.
    """
    for what, number in (("size", size), ("val", val), ("seed", seed)):
        if number is not None and (not hasattr(number, "__index__") or (what != "seed" and number < 1)):
            raise DataError(f"{what} {number!r}; expected a whole number" + ("" if what == "seed" else ", 1 or more"))
    if size is not None and size**2 > MAX_PIXELS:
        raise DataError(f"size {size}; expected a side of at most {int(MAX_PIXELS**0.5):,} pixels")
    try:
        root = store.cache_root(cache) / "data"
        folder, make = _plan(name, size, skip_damaged, root, progress)
        there = store.read(folder, whole=whole)
    except (OSError, RuntimeError, ValueError) as error:  # pathlib on names and links that lead nowhere
        if isinstance(error, DataError | registry.UnknownNameError):
            raise
        raise DataError(f"{name!r} cannot be read: {error}") from error
    if there is None:
        make()
        there = store.read(folder)
        if there is None:
            raise DataError(f"{folder} was written but cannot be read back; is its disk in order?")
    meta, stored = there
    _check_counts(name, {k: len(v.labels) for k, v in stored.items()}, meta)
    asked = {"size": size, "class_names": None, "skip_damaged": skip_damaged}
    return folder, meta["size"], replace(_split(name, meta, stored, val, seed), options=asked)


def _plan(
    name: str, size: int | None, skip_damaged: bool, root: Path, progress: Progress | None
) -> tuple[Path, Callable[[], None]]:
    """Where the decoded set lies, and how to make it if it does not. Nothing is opened yet."""
    kind, _, rest = str(name).partition(":")
    if name == "digits":
        folder = root / f"digits-{store.key('digits', size)}"
        return folder, lambda: write_digits(folder, size)
    if kind == "folder" and rest:
        found = find_folder(Path(rest).expanduser().resolve(), progress)
        folder = root / f"folder-{store.key(found.where, found.stamp, size, skip_damaged)}"
        return folder, lambda: write_source(folder, name, found, size, None, skip_damaged, progress)
    if kind == "hub" and rest:
        known = None
        local, hub, config = rest, rest, None
    elif name in SOURCES:
        known = SOURCES[name]
        local, hub, config = name, known.hub, known.config
        size = size or known.size
    else:
        if name and Path(name).is_dir():
            raise DataError(f"{name} is a folder of yours? Say folder:{name}")
        raise registry.unknown("data set", name, [*NAMES, "folder:PATH", "hub:NAME"])
    test, label, grey = (known.test, known.label, known.grey) if known else (None, None, None)
    looked_at, files = tables.parquet_files(local)
    if files:
        splits = tables.parquet_splits(files, test)
        state = tables.parquet_stamp(splits)
        folder = root / f"{file_name(name)}-{store.key(str(files[0].parent), state, size, skip_damaged)}"
        return folder, lambda: write_source(
            folder, name, tables.find_parquet(name, splits, label), size, grey, skip_damaged, progress
        )
    folder = root / f"{file_name(name)}-{store.key(hub, config, size, skip_damaged)}"
    where = f"{looked_at}/*.parquet" if looked_at else f"$UNPERTURB_DATA/{local}/*.parquet (UNPERTURB_DATA is not set)"
    advice = (
        f"{name} is not here: looked at {where}, and for {hub} on the hub. "
        f"With a network run: unperturb prepare {name}; without one, put the hub's Parquet files there"
    )

    def make() -> None:
        found = tables.find_hub(hub, config, test, label, root / "hub", advice)
        write_source(folder, name, found, size, grey, skip_damaged, progress)

    return folder, make


def file_name(name: str) -> str:
    """A data set's name as that of a file, short enough for every disk."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name)[-100:]


def _check_counts(name: str, found: dict[str, int], meta: dict[str, Any]) -> None:
    if name not in SOURCES or meta["left_out"]:
        return
    expected = SOURCES[name].counts
    if (found["train"], found.get("test")) not in expected:
        wanted = " or ".join(f"{a:,} + {b:,}" for a, b in expected)
        raise DataError(
            f"{meta['where']} holds {found['train']:,} train + {found.get('test', 0):,} test images; {name} has "
            f"{wanted}. Fetch what is missing (unperturb prepare {name}), or read a part of it as hub:{name} or "
            "folder:PATH"
        )


def _split(name: str, meta: dict[str, Any], stored: dict[str, Stored], val: int | None, seed: int) -> Splits:
    class_names = meta["class_names"]

    def whole(official: str, split: str) -> ImageSet:
        one = stored[official]
        large = one.images.numel() > IN_MEMORY
        return ImageSet(
            images=one.images[:0] if large else one.images,
            labels=one.labels,
            index=torch.arange(len(one.labels)),
            class_names=class_names,
            source=name,
            split=split,
            mapped=one.images if large else None,
            mapped_fingerprint=one.fingerprint,
        )

    train = whole("train", "train")
    if "test" in stored:
        test = whole("test", "test")
    else:  # a seed of its own: the test images stay the same whatever `seed` is
        order = per_image_rng.permutation(TEST_SEED, 0, len(train))
        n = max(1, len(train) // 10)
        test = train.take(order[:n].sort().values, split="test")
        train = train.take(order[n:].sort().values, split="train")
    if "val" in stored and val is None:
        validation = whole("val", "val")
    else:
        n = max(1, min(len(train) // 10, 5_000)) if val is None else val
        if "test" not in stored and val is None:
            n = len(test)
        if val is None and n >= len(train):
            raise DataError(f"{name} has too few images to split: {len(train):,} to train on; expected at least two")
        if not 0 < n < len(train):
            raise DataError(f"val {n} of {name} with {len(train):,} train images; expected 1 to {len(train) - 1:,}")
        order = per_image_rng.permutation(seed, 1, len(train))
        validation = train.take(order[:n].sort().values, split="val")
        train = train.take(order[n:].sort().values, split="train")
    return Splits(
        train=train,
        val=validation,
        test=test,
        class_names=class_names,
        source=name,
        fingerprints={k: one.fingerprint for k, one in stored.items()},
        notes=meta["notes"],
        left_out=len(meta["left_out"]),
    )
