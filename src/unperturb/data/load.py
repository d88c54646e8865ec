"""`load_dataset`: a name to train, validation and test, decoded once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unperturb import draws, registry, screen
from unperturb.data import sources, store
from unperturb.data.sets import IN_MEMORY, DataError, ImageSet, Splits
from unperturb.data.sources import SOURCES, Found
from unperturb.data.store import Pixels, Stored

NAMES = {
    "digits": "scikit-learn's 1,797 handwritten digits at 28x28, embedded",
    **{name: f"{source.hub} on the hub" for name, source in SOURCES.items()},
}
Progress = Callable[[int, int, str], None]
_DIGITS_TEST = 360
_TEST_SEED = 0x74657374


def load_dataset(
    name: str,
    *,
    size: int | None = None,
    val: int | None = None,
    seed: int = 0,
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
    cache: where decoded pixels are kept; None means $UNPERTURB_CACHE or ~/.cache/unperturb. The first start decodes,
    the next ones map what it left.
    progress: called while decoding with (pictures done, of how many as far as is known, split), in place of the bar
    that is shown unless `quiet`.
    Raises `UnknownNameError`, and `DataError` where the source is missing, broken or incomplete.
    """
    with screen.shown(f"decoding {name}", progress, quiet) as update:
        _, splits = open_dataset(name, size=size, val=val, seed=seed, cache=cache, progress=update)
    return splits


def open_dataset(
    name: str,
    *,
    size: int | None = None,
    val: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Path, Splits]:
    """The folder of decoded pixels and the splits of `load_dataset`."""
    if size is not None and size < 1:
        raise DataError(f"size {size}; expected a side in pixels, 1 or more")
    root = store.cache_root(cache) / "data"
    folder, make = _plan(name, size, root, progress)
    there = store.read(folder)
    if there is None:
        make()
        there = store.read(folder)
        if there is None:
            raise DataError(f"{folder} was written but cannot be read back; is its disk in order?")
    meta, stored = there
    _check_counts(name, {k: len(v.labels) for k, v in stored.items()}, meta["where"])
    return folder, _split(name, meta["class_names"], stored, val, seed)


def _plan(name: str, size: int | None, root: Path, progress: Progress | None) -> tuple[Path, Callable[[], None]]:
    """Where the decoded set lies, and how to make it if it does not. Nothing is opened yet."""
    kind, _, rest = name.partition(":")
    if name == "digits":
        folder = root / f"digits-{store.key('digits', size)}"
        return folder, lambda: _write_digits(folder, size)
    if kind == "folder" and rest:
        found = sources.find_folder(Path(rest).expanduser().resolve())
        folder = root / f"folder-{store.key(found.where, found.stamp, size)}"
        return folder, lambda: _write(folder, name, found, size, None, progress)
    if kind == "hub" and rest:
        known = None
        local, hub, config = rest, rest, None
    elif name in SOURCES:
        known = SOURCES[name]
        local, hub, config = name, known.hub, known.config
        size = size or known.size
    else:
        raise registry.unknown("data set", name, [*NAMES, "folder:PATH", "hub:NAME"])
    test, label = (known.test, known.label) if known else (None, None)
    looked_at, files = sources.parquet_files(local)
    hub_cache = root / "hub"
    file_name = name.replace(":", "-").replace("/", "-")
    if files:
        found = sources.find_parquet(name, files, test, label, hub_cache)
        folder = root / f"{file_name}-{store.key(found.where, found.stamp, size)}"
        return folder, lambda: _write(folder, name, found, size, known.grey if known else None, progress)
    folder = root / f"{file_name}-{store.key(hub, config, size)}"
    where = f"{looked_at}/*.parquet" if looked_at else f"$UNPERTURB_DATA/{local}/*.parquet (UNPERTURB_DATA is not set)"
    advice = (
        f"{name} is not here: looked at {where}, and for {hub} on the hub. "
        f"With a network run: unperturb prepare {name}; without one, put the hub's Parquet files there"
    )

    def make() -> None:
        found = sources.find_hub(hub, config, test, label, hub_cache, advice)
        _write(folder, name, found, size, known.grey if known else None, progress)

    return folder, make


def _write(
    folder: Path, name: str, found: Found, size: int | None, grey: bool | None, progress: Progress | None
) -> None:
    """Decode a source. grey: None finds out."""
    found.check()
    splits = found.labeled_splits()
    shape = (size, size) if size else store.most_common_size(itertools.islice(splits["train"](), found.sample))
    total = max(map(sum, SOURCES[name].counts)) if name in SOURCES else found.total
    done = 0

    def counted(split: str) -> Iterator[store.Chunk]:
        nonlocal done
        for chunk in store.decode_all(splits[split](), shape, bool(grey)):
            done += len(chunk[1])
            if progress:
                progress(done, max(done, total), split)
            yield chunk

    names = list(SOURCES[name].names) if name in SOURCES else []
    meta = {"source": name, "where": found.where, "class_names": names or found.class_names()}
    store.write(folder, meta, {split: counted(split) for split in splits}, keep_color=grey is not None)


def _check_counts(name: str, found: dict[str, int], where: str) -> None:
    if name not in SOURCES:
        return
    expected = SOURCES[name].counts
    if (found["train"], found.get("test")) not in expected:
        wanted = " or ".join(f"{a:,} + {b:,}" for a, b in expected)
        raise DataError(
            f"{where} holds {found['train']:,} train + {found['test']:,} test images; {name} has {wanted}. "
            f"Fetch what is missing (unperturb prepare {name}), or read a part of it as hub:{name} or folder:PATH"
        )


def _split(name: str, class_names: list[str], stored: dict[str, Stored], val: int | None, seed: int) -> Splits:
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
        order = draws.permutation(_TEST_SEED, 0, len(train))
        n = max(1, len(train) // 10)
        test = train.take(order[:n].sort().values, split="test")
        train = train.take(order[n:].sort().values, split="train")
    if "val" in stored and val is None:
        validation = whole("val", "val")
    else:
        n = min(len(train) // 10, 5_000) if val is None else val
        if "test" not in stored and val is None:
            n = len(test)
        if not 0 < n < len(train):
            raise DataError(f"val {n} of {name} with {len(train):,} train images; expected 1 to {len(train) - 1:,}")
        order = draws.permutation(seed, 1, len(train))
        validation = train.take(order[:n].sort().values, split="val")
        train = train.take(order[n:].sort().values, split="train")
    return Splits(
        train=train,
        val=validation,
        test=test,
        class_names=class_names,
        source=name,
        fingerprints={k: one.fingerprint for k, one in stored.items()},
    )


# The embedded digits ------------------------------------------------------------------------------------------------


def _write_digits(folder: Path, size: int | None) -> None:
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
    order = draws.permutation(_TEST_SEED, 0, len(labels))
    test = torch.cat([order[labels[order] == k][: _DIGITS_TEST // 10] for k in range(10)]).sort().values
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[test] = False

    def chunk(rows: Tensor) -> list[store.Chunk]:
        return [(pixels[rows.numpy()], labels[rows].tolist(), True)]

    meta = {"source": "digits", "where": "scikit-learn", "class_names": [str(i) for i in range(10)]}
    store.write(folder, meta, {"train": chunk(rest.nonzero()[:, 0]), "test": chunk(test)})
